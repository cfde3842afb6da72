package kernel

import "unsafe"

// fetch is memory that tile kernels ask for while they compute, because what comes next will read it: reading it then
// from beyond the second cache would take as long as a good part of the product. It is up to three stretches, of A, B and C.
type fetch struct {
	part [3]stretch
	at   int // bytes asked for
	pace int
}

type stretch struct {
	place uintptr
	bytes int
}

func stretchOf(x []float32, from, to int) stretch {
	from, to = max(0, from), min(len(x), to)
	if from >= to {
		return stretch{}
	}
	return stretch{uintptr(unsafe.Pointer(&x[from])), 4 * (to - from)}
}

// spread plans to ask for all of it in a number of requests.
func (f *fetch) spread(requests int) {
	f.pace = max(0, f.left()+requests-1) / max(1, requests)
}

// left returns how many bytes are still to be asked for.
func (f *fetch) left() int { return f.part[0].bytes + f.part[1].bytes + f.part[2].bytes - f.at }

// next says where and at what pace to go on with some requests.
func (f *fetch) next(requests int) (place uintptr, pace int) {
	at := f.at
	f.at += f.pace * requests
	for _, p := range f.part {
		if at < p.bytes {
			return p.place + uintptr(at), f.pace
		}
		at -= p.bytes
	}
	return f.part[0].place, 0
}

// ahead returns what is read after piece i of n of a step: its share of the next step's operands, or the rows of A of the
// next piece.
func (g *Gemm) ahead(step, i, n int) (f fetch) {
	if g.outer {
		kb := step + 1
		if kb == len(g.aRuns) {
			return f
		}
		if g.packA && g.columns {
			f.part[0] = partOf(g.av, &g.a, g.bi, kb*g.kLen, min(g.k, (kb+1)*g.kLen), i, n)
		}
		if g.packB && !g.given && g.byRows {
			f.part[1] = partOf(g.bv, &g.b, g.bi, kb*g.kLen, min(g.k, (kb+1)*g.kLen), i, n)
		}
		return f
	}
	if g.columns || g.nPieces > 1 || i+1 >= g.pieces {
		return f
	}
	t0, t1 := g.tilesOf(i + 1)
	r0, r1 := t0*g.height, min(g.m, t1*g.height)
	f.part[0] = dense(g.av, &g.a, g.bi, r0, r1)
	f.part[2] = g.result(g.bi, r0, r1)
	return f
}

// result returns the memory of some rows of C, if little else lies in it.
func (g *Gemm) result(bi, r0, r1 int) stretch {
	from, to := int(g.cBatch[bi]+g.cRows[r0]), int(g.cBatch[bi]+g.cRows[r1-1])+g.n
	if to-from > 2*(r1-r0)*g.n {
		return stretch{}
	}
	return stretchOf(g.cv, from, to)
}

// nextBatch returns the operands and the result of a batch, as far as they lie dense.
func (g *Gemm) nextBatch(bi int) (f fetch) {
	if bi < g.batches {
		f.part[0] = dense(g.av, &g.a, bi, 0, g.m)
		f.part[1] = dense(g.bv, &g.b, bi, 0, g.n)
		f.part[2] = g.result(bi, 0, g.m)
	}
	return f
}

// dense returns the memory of some rows of an operand, if little else lies in it.
func dense(x []float32, o *Operand, bi, r0, r1 int) stretch {
	k := len(o.K)
	from, to := int(o.Batch[bi]+o.Rows[r0]), int(o.Batch[bi]+o.Rows[r1-1]+o.K[k-1])+1
	if to-from > 2*(r1-r0)*k {
		return stretch{}
	}
	return stretchOf(x, from, to)
}

// partOf returns a share of k from k0 to k1 of an operand whose rows lie side by side, if little else lies between them.
func partOf(x []float32, o *Operand, bi, k0, k1, i, n int) stretch {
	rows := len(o.Rows)
	from := int(o.Batch[bi] + o.Rows[0] + o.K[k0])
	to := int(o.Batch[bi]+o.Rows[0]+o.K[k1-1]) + rows
	if size := to - from; size > 0 && size <= 2*rows*(k1-k0) {
		return stretchOf(x, from+size*i/n, from+size*(i+1)/n)
	}
	return stretch{}
}

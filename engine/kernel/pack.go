package kernel

import "slices"

// Packed operands. B is packed by blocks of k and panels, A by blocks of k and tiles: [k][width], with the width of a
// panel, which is whole vectors, and of a tile.

// packRows is how many k a piece packs that packs by rows.
const packRows = 32

// Workspace is the memory that products use while they run: Grow it for every Gemm that will use it, then run them one
// after the other.
type Workspace struct {
	a, b   []float32 // packed operands
	c      []float32 // parts of a result
	worker []workerSpace
}

type workerSpace struct {
	a, b  []float32
	args  tileArgs
	one   [1]run
	fetch fetch
	_     [64]byte
}

// NewWorkspace returns an empty workspace for a pool of that many workers.
func NewWorkspace(threads int) *Workspace { return &Workspace{worker: make([]workerSpace, threads)} }

// Bytes returns the memory held.
func (w *Workspace) Bytes() (n int) {
	n = 4 * (len(w.a) + len(w.b) + len(w.c))
	for i := range w.worker {
		n += 4 * (len(w.worker[i].a) + len(w.worker[i].b))
	}
	return n
}

// Grow makes room for a product.
func (w *Workspace) Grow(g *Gemm) {
	w.c = atLeast(w.c, (g.parts-1)*g.m*g.n)
	if !g.small && g.parts == 1 {
		buffers := min(2, len(w.worker))
		if g.packB && !g.given {
			n := g.PackedSize()
			if g.outer {
				n = min(n, g.bBuffer()*buffers)
			}
			w.b = atLeast(w.b, n)
		}
		if g.packA && g.outer {
			w.a = atLeast(w.a, g.aBuffer()*buffers)
		}
	}
	for i := range w.worker {
		s := &w.worker[i]
		if g.packB && (g.small || g.parts > 1 && !g.given) {
			s.b = atLeast(s.b, g.bBuffer())
		}
		if g.packA && g.parts > 1 {
			s.a = atLeast(s.a, g.aBuffer())
		} else if g.packA && !g.outer {
			s.a = atLeast(s.a, (2*g.blockRows()/g.height+1)*g.tileLen())
		}
	}
}

func atLeast(s []float32, n int) []float32 {
	if len(s) < n {
		return make([]float32, n)
	}
	return s
}

// tileLen is the length of a packed tile. It is not a multiple of a page, so that tiles packed side by side do not
// compete for the same lines of the first cache.
func (g *Gemm) tileLen() int { return g.set.tile.ar*g.kLen + 16 }
func (g *Gemm) aBuffer() int { return g.tiles * g.tileLen() }
func (g *Gemm) bBuffer() int { return g.vectors * g.set.tile.lanes * g.kLen }

// packsOfB is in how many pieces a block of B is packed.
func (g *Gemm) packsOfB() int {
	if g.byRows {
		return g.bParts * g.packsOfK()
	}
	return g.panels
}

// packsOfA is in how many pieces a block of A is packed.
func (g *Gemm) packsOfA() int {
	if g.columns {
		return g.aParts * g.packsOfK()
	}
	return (g.tiles + packTiles - 1) / packTiles
}

// packsOfK is in how many stretches of k a block is packed.
func (g *Gemm) packsOfK() int { return (g.kLen + packRows - 1) / packRows }

// packTiles is how many tiles of A a piece packs.
const packTiles = 6

// gemmPack packs B alone.
type gemmPack Gemm

func (j *gemmPack) Do(_, i int) {
	g := (*Gemm)(j)
	kb := i / g.packsOfB()
	g.packBOf(g.packed[g.blockAt(kb):], g.bi, kb, i%g.packsOfB())
}

// packBOf packs piece i of a block of B into d, which begins with the block.
func (g *Gemm) packBOf(d []float32, bi, kb, i int) {
	if !g.byRows {
		g.packPanel(d[g.panelAt(i, kb):], bi, i, kb)
		return
	}
	b := g.bv[int(g.b.Batch[bi])+int(g.b.Rows[0]):]
	kk, lanes := g.blockLen(kb), g.set.tile.lanes
	wide := g.set.tile.nv * lanes
	p0, p1 := share(g.panels, i/g.packsOfK(), g.bParts)
	i %= g.packsOfK()
	whole := min(g.whole, g.n/wide, p1)
	for k := i * packRows; k < min(kk, (i+1)*packRows); k++ {
		row := b[g.b.K[kb*g.kLen+k]:][:g.n]
		if whole > p0 {
			g.set.copyPanels(&d[(p0*kk+k)*wide], wide*kk, &row[p0*wide], wide, whole-p0, wide/8)
		}
		for p := max(p0, whole); p < p1; p++ {
			first, vectors := g.panel(p)
			q, r := d[first*lanes*kk+k*vectors*lanes:][:vectors*lanes], row[first*lanes:]
			clear(q[copy(q, r):])
		}
	}
}

// packPanel packs the columns of one panel, padded.
func (g *Gemm) packPanel(d []float32, bi, p, kb int) {
	b := g.bv[g.b.Batch[bi]:]
	first, vectors := g.panel(p)
	j0, nr, k0, kk := first*g.set.tile.lanes, vectors*g.set.tile.lanes, kb*g.kLen, g.blockLen(kb)
	col := g.columnsOf(p)
	cols := len(col)
	if n := g.bSides[p]; n == cols || n >= 8 && cols%n == 0 { // copy whole stretches
		for k := range kk {
			q := d[k*nr : k*nr+nr]
			at := int(g.b.K[k0+k])
			for j := 0; j < cols; j += n {
				copy(q[j:j+n], b[at+int(col[j]):])
			}
			clear(q[cols:])
		}
		return
	}
	if g.bRuns != nil && nr%8 == 0 {
		for j := 0; j < cols; j += 8 { // what lies behind is never looked at
			g.packEight(d[j:], nr, b, g.bEights, j0+j, g.bRuns[kb])
		}
		return
	}
	if cols < nr {
		clear(d[:kk*nr])
	}
	for j, o := range col {
		for k := range kk {
			d[k*nr+j] = b[int(o)+int(g.b.K[k0+k])]
		}
	}
}

// packEight packs the eight rows that begin with number j, which have their k in runs side by side, to d[k*stride+i].
// rows has eight more than there are.
func (g *Gemm) packEight(d []float32, stride int, src []float32, rows []int32, j int, runs []run) {
	k := 0
	for _, r := range runs {
		g.set.packEight(&d[k*stride], stride, &src[r.off], &rows[j : j+8][0], r.n)
		k += r.n
	}
}

// eightMore returns a table with its last entry repeated.
func eightMore(t []int32) []int32 {
	if len(t) == 0 {
		return nil
	}
	return append(slices.Clone(t), slices.Repeat(t[len(t)-1:], 8)...)
}

// packAPiece packs piece i of a block of A into d, which begins with the block.
func (g *Gemm) packAPiece(d []float32, kb, i int) {
	if g.columns {
		t0, t1 := share(g.tiles, i/g.packsOfK(), g.aParts)
		i %= g.packsOfK()
		g.packColumns(d[t0*g.tileLen():], g.bi, kb, t0, t1, i*packRows, min(g.blockLen(kb), (i+1)*packRows))
		return
	}
	t0 := i * packTiles
	g.packTiles(d[t0*g.tileLen():], g.bi, kb, t0, min(g.tiles, t0+packTiles))
}

// packTiles packs tiles t0 to t1 of A into d.
func (g *Gemm) packTiles(d []float32, bi, kb, t0, t1 int) {
	if g.columns {
		g.packColumns(d, bi, kb, t0, t1, 0, g.blockLen(kb))
		return
	}
	a, ar, k0, kk := g.av[g.a.Batch[bi]:], g.set.tile.ar, kb*g.kLen, g.blockLen(kb)
	runs := g.aRuns[kb]
	eights := g.aK == 1 && ar == 8 && kk >= 4*len(runs)
	for t := t0; t < t1; t++ {
		rows := g.a.Rows[t*g.height : min(g.m, (t+1)*g.height)]
		if eights {
			g.packEight(d, ar, a, g.aEights, t*g.height, runs)
		} else {
			for x, o := range rows {
				for k := range kk {
					d[k*ar+x] = a[int(o)+int(g.a.K[k0+k])]
				}
			}
		}
		d = d[g.tileLen():]
	}
}

// packColumns packs k from to end of tiles t0 to t1 of A, whose rows lie side by side in stretches, into d.
func (g *Gemm) packColumns(d []float32, bi, kb, t0, t1, from, end int) {
	a := g.av[g.a.Batch[bi]:]
	ar, tile := g.set.tile.ar, g.tileLen()
	for t := t0; t < t1; {
		r0 := t * g.height
		rows := min(g.m, t1*g.height, r0-r0%g.stretch+g.stretch) - r0 // to the end of the stretch
		n := rows / g.height
		if r0+rows == g.m {
			n = (rows + g.height - 1) / g.height
		}
		q := d[(t-t0)*tile:]
		if n == 0 { // a tile that runs over the end of a stretch
			for k := from; k < end; k++ {
				for i, o := range g.a.Rows[r0:min(g.m, r0+g.height)] {
					q[k*ar+i] = a[int(o)+int(g.a.K[kb*g.kLen+k])]
				}
			}
			t++
			continue
		}
		whole := 0 // tiles whose eight elements are all there
		if ar == 8 && rows >= 8 {
			whole = min(n, (rows-8)/g.height+1)
		}
		for k := from; k < end; k++ {
			row := a[int(g.a.Rows[r0])+int(g.a.K[kb*g.kLen+k]):][:rows]
			if whole > 0 {
				g.set.copyPanels(&q[k*ar], tile, &row[0], g.height, whole, 1)
			}
			for i := whole; i < n; i++ {
				copy(q[i*tile+k*ar:][:g.height], row[i*g.height:])
			}
		}
		t += n
	}
}

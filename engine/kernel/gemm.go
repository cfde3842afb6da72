package kernel

import "unsafe"

// kBlock is the length into which contractions are cut, so that a panel of B stays in the first cache. It fixes the
// order of summation, so it is the same at every level and for any number of workers.
const kBlock = 256

// mBlock is about the number of rows that one piece of work computes.
const mBlock = 96

// Operand says where the elements of a matrix lie in a slice: element (b, i, k) at Batch[b] + Rows[i] + K[k]. Tables of
// offsets express transposes, batch axes, slices and the windows of a convolution alike. K[0] is 0.
type Operand struct{ Batch, Rows, K []int32 }

// Gemm is a planned product C[b,m,n] = sum over k of A[b,m,k] * B[b,n,k], for given shapes and places. Both operands
// are addressed by rows and k; C has rows of N contiguous elements. A Gemm holds the state of its run, so it must not
// run twice at once.
type Gemm struct {
	m, n, k, batches int
	a, b             Operand
	cBatch, cRows    []int32
	set              *Set

	// A's rows or k at a constant stride; 0 where they are not.
	aRow, aK int
	packA    bool
	packB    bool
	bK       int // stride of B's k if constant, else 0
	panels   int
	blocks   [][]run // A's runs of each block of k
	small    bool    // whole batches are pieces of work
	perPiece int     // batches (small) or rows of a piece
	pieces   int
	nSplit   int // panels of a piece
	nPieces  int
	byRows   bool // B is packed a few k at a time, all panels

	// the run
	ws         *Workspace
	av, bv, cv []float32
	packed     []float32
	bi, add    int
}

// NewGemm plans a product of A with B, whose rows are C's columns. C's row i of batch b begins at cBatch[b] + cRows[i].
func NewGemm(set *Set, a, b Operand, cBatch, cRows []int32) *Gemm {
	m, n, k := len(a.Rows), len(b.Rows), len(a.K)
	g := &Gemm{m: m, n: n, k: k, batches: len(cBatch), a: a, b: b, cBatch: cBatch, cRows: cRows, set: set}
	t := &set.tile
	aRow, rowsRegular := stride(a.Rows)
	aK, kRegular := stride(a.K)
	if rowsRegular {
		g.aRow = aRow
	}
	g.aK = 1
	if kRegular {
		g.aK = aK
	}
	for k0 := 0; k0 < k; k0 += kBlock {
		g.blocks = append(g.blocks, runsOf(a.K[k0:min(k, k0+kBlock)], g.aK))
	}
	shortRuns := !kRegular && len(g.blocks) > 0 && min(k, kBlock)/len(g.blocks[0]) < 3
	g.panels = (n + t.nr - 1) / t.nr
	// Rows of A are read in place unless that would be slow: every element of k on another cache line, or rows so far
	// apart that they fall onto the same lines of the cache.
	reuse := n > 2*t.nr && m > 24
	far := rowsRegular && k > kBlock && aRow >= 512 && aRow%256 == 0
	g.packA = shortRuns || reuse && (g.aK != 1 || far)
	bk, bKRegular := stride(b.K)
	if bKRegular {
		g.bK = bk
	}
	g.packB = m > 64 || m > t.mr && bKRegular && bk >= 512 || !g.halvesContiguous()

	g.small = g.batches > 1 && (m*n*k <= 1<<20 || g.batches >= 64)
	if g.small {
		g.perPiece = max(1, (1<<17)/max(1, m*n*k))
		g.pieces, g.nPieces, g.nSplit = (g.batches+g.perPiece-1)/g.perPiece, 1, g.panels
		return g
	}
	mb := (m + mBlock - 1) / mBlock
	g.perPiece = ((m+mb-1)/max(1, mb) + t.mr - 1) / t.mr * t.mr
	g.byRows = g.panels > 1 && sideBySide(b.Rows) == n
	return g
}

// divide cuts a product into pieces for a number of workers: by rows, and by panels if those are too few.
func (g *Gemm) divide(threads int) {
	rows := (g.m + g.perPiece - 1) / g.perPiece
	g.nPieces = 1
	if threads > 1 && rows < 4*threads {
		g.nPieces = min(g.panels, (4*threads+rows-1)/rows)
	}
	g.nSplit = (g.panels + g.nPieces - 1) / g.nPieces
	g.nPieces = (g.panels + g.nSplit - 1) / g.nSplit
	g.pieces = rows * g.nPieces
}

// halvesContiguous says whether B can be read without packing: the columns of each half of a panel lie side by side.
func (g *Gemm) halvesContiguous() bool {
	half := g.set.tile.nr / 2
	for j := 0; j < g.n; j += half {
		c := g.b.Rows[j:min(g.n, j+half)]
		if len(c) < half && !g.set.tile.masked || len(c) > 1 && !contiguous(c) {
			return false
		}
	}
	return true
}

// stride returns the constant distance of a table's entries, if there is one.
func stride(t []int32) (int, bool) {
	if len(t) < 2 {
		return 1, true
	}
	s := t[1] - t[0]
	for i := 2; i < len(t); i++ {
		if t[i]-t[i-1] != s {
			return 0, false
		}
	}
	return int(s), true
}

func contiguous(t []int32) bool { s, ok := stride(t); return ok && s == 1 }

// runsOf cuts a table into stretches of the given stride.
func runsOf(t []int32, s int) (runs []run) {
	for i := 0; i < len(t); {
		e := i + 1
		for e < len(t) && int(t[e]-t[e-1]) == s {
			e++
		}
		runs = append(runs, run{int(t[i]), e - i})
		i = e
	}
	return runs
}

// Flops returns the number of multiplications and additions.
func (g *Gemm) Flops() float64 {
	return 2 * float64(g.batches) * float64(g.m) * float64(g.n) * float64(g.k)
}

// Workspace is the memory that products use while they run: Grow it for every Gemm that will use it, then run them one
// after the other.
type Workspace struct {
	shared []float32
	worker []workerSpace
}

type workerSpace struct {
	a, b []float32
	args tileArgs
	one  [1]run
	_    [64]byte
}

// NewWorkspace returns an empty workspace for a pool of that many workers.
func NewWorkspace(threads int) *Workspace { return &Workspace{worker: make([]workerSpace, threads)} }

// Bytes returns the memory held.
func (w *Workspace) Bytes() (n int) {
	n = 4 * len(w.shared)
	for i := range w.worker {
		n += 4 * (len(w.worker[i].a) + len(w.worker[i].b))
	}
	return n
}

// Grow makes room for a product.
func (w *Workspace) Grow(g *Gemm) {
	kk, t := min(g.k, kBlock), &g.set.tile
	if g.packB && !g.small {
		w.shared = atLeast(w.shared, g.panels*t.nr*g.k)
	}
	for i := range w.worker {
		s := &w.worker[i]
		if g.packB && g.small {
			s.b = atLeast(s.b, g.panels*t.nr*kk)
		}
		if g.packA {
			s.a = atLeast(s.a, (mBlock+4*maxTileRows)*kk)
		}
	}
}

func atLeast(s []float32, n int) []float32 {
	if len(s) < n {
		return make([]float32, n)
	}
	return s
}

// Run computes c from a and b, which begin where the tables' offset 0 points, or adds to c.
func (g *Gemm) Run(pool *Pool, ws *Workspace, a, b, c []float32, add bool) {
	if g.m == 0 || g.n == 0 || g.batches == 0 {
		return
	}
	if g.k == 0 {
		if add {
			return
		}
		for _, o := range g.cBatch {
			for _, r := range g.cRows {
				clear(c[int(o)+int(r):][:g.n])
			}
		}
		return
	}
	g.ws, g.av, g.bv, g.cv, g.add = ws, a, b, c, 0
	if add {
		g.add = 1
	}
	if g.small {
		g.spread(pool, g.pieces, (*gemmBatches)(g))
	} else {
		for g.bi = range g.batches {
			if g.packB {
				g.packed = ws.shared
				g.pack(pool)
			}
			g.tiles(pool)
		}
	}
	g.av, g.bv, g.cv, g.packed = nil, nil, nil, nil
}

// Packable says whether B can be packed once for many products: one batch, and not too small.
func (g *Gemm) Packable() bool { return g.batches == 1 && g.k > 0 && g.m > 0 && g.n >= g.set.tile.nr }

// UsePacked makes the product take B as Pack lays it out.
func (g *Gemm) UsePacked() { g.packB, g.small = true, false }

// PackedSize returns the number of elements that Pack writes.
func (g *Gemm) PackedSize() int { return g.panels * g.set.tile.nr * g.k }

// Pack lays b out for RunPacked, of this or another product with the same operand B.
func (g *Gemm) Pack(pool *Pool, b, packed []float32) {
	g.bi, g.bv, g.packed = 0, b, packed
	g.pack(pool)
	g.bv, g.packed = nil, nil
}

// RunPacked is Run with B packed.
func (g *Gemm) RunPacked(pool *Pool, ws *Workspace, a, packed, c []float32, add bool) {
	g.ws, g.av, g.cv, g.packed, g.bi, g.add = ws, a, c, packed, 0, 0
	if add {
		g.add = 1
	}
	g.tiles(pool)
	g.av, g.cv, g.packed = nil, nil, nil
}

func (g *Gemm) pack(pool *Pool) {
	if g.byRows {
		g.spread(pool, (g.k+packRows-1)/packRows, (*gemmPackRows)(g))
	} else {
		g.spread(pool, len(g.blocks)*g.panels, (*gemmPack)(g))
	}
}

func (g *Gemm) tiles(pool *Pool) {
	g.divide(pool.Threads())
	g.spread(pool, g.pieces, (*gemmTiles)(g))
}

// spread runs a job, on several workers if the product is large enough to be worth waking them.
func (g *Gemm) spread(pool *Pool, n int, job Job) {
	if g.Flops() < 1<<19 {
		for i := range n {
			job.Do(0, i)
		}
		return
	}
	pool.Run(n, job)
}

// gemmBatches does whole batches, one after the other.
type gemmBatches Gemm

func (j *gemmBatches) Do(worker, i int) {
	g := (*Gemm)(j)
	w := &g.ws.worker[worker]
	for bi := i * g.perPiece; bi < min(g.batches, (i+1)*g.perPiece); bi++ {
		for kb := range g.blocks {
			if g.packB {
				for p := range g.panels {
					g.packPanel(w.b[g.panelAt(p, kb):], bi, p, kb)
				}
			}
			g.block(w, w.b, bi, kb, 0, g.m, 0, g.panels)
		}
	}
}

// gemmPack packs one panel of one block of k.
type gemmPack Gemm

func (j *gemmPack) Do(_, i int) {
	g := (*Gemm)(j)
	kb, p := i/g.panels, i%g.panels
	g.packPanel(g.packed[g.blockAt(kb)+g.panelAt(p, kb):], g.bi, p, kb)
}

// packRows is how many k gemmPackRows packs; it divides kBlock.
const packRows = 32

// gemmPackRows packs some k of all panels, reading whole rows of B, which have their columns side by side.
type gemmPackRows Gemm

func (j *gemmPackRows) Do(_, i int) {
	g := (*Gemm)(j)
	b := g.bv[int(g.b.Batch[g.bi])+int(g.b.Rows[0]):]
	nr := g.set.tile.nr
	for k := i * packRows; k < min(g.k, (i+1)*packRows); k++ {
		kb := k / kBlock
		row, to := b[g.b.K[k]:][:g.n], g.packed[g.blockAt(kb):]
		panel, at := nr*g.blockLen(kb), (k-kb*kBlock)*nr
		for len(row) >= nr {
			copy(to[at:at+nr], row)
			row, at = row[nr:], at+panel
		}
		if n := len(row); n > 0 {
			w := nr
			if g.halfWide(n) { // the last panel is narrower
				w = nr / 2
				at -= (k - kb*kBlock) * (nr - w)
			}
			copy(to[at:at+n], row)
			clear(to[at+n : at+w])
		}
	}
}

// gemmTiles computes some rows and panels of C.
type gemmTiles Gemm

func (j *gemmTiles) Do(worker, i int) {
	g := (*Gemm)(j)
	m0, p0 := i/g.nPieces*g.perPiece, i%g.nPieces*g.nSplit
	for kb := range g.blocks {
		var packed []float32
		if g.packB {
			packed = g.packed[g.blockAt(kb):]
		}
		g.block(&g.ws.worker[worker], packed, g.bi, kb, m0, min(g.m, m0+g.perPiece), p0, min(g.panels, p0+g.nSplit))
	}
}

func (g *Gemm) blockLen(kb int) int    { return min(kBlock, g.k-kb*kBlock) }
func (g *Gemm) blockAt(kb int) int     { return kb * kBlock * g.panels * g.set.tile.nr }
func (g *Gemm) panelAt(p, kb int) int  { return p * g.set.tile.nr * g.blockLen(kb) }
func (g *Gemm) panelCols(p int) int    { return min(g.set.tile.nr, g.n-p*g.set.tile.nr) }
func (g *Gemm) halfWide(cols int) bool { return cols*2 <= g.set.tile.nr }

// block adds one block of k to rows m0 to m1 and panels p0 to p1 of C, a few rows at a time, so that their part of A
// stays in cache.
func (g *Gemm) block(w *workerSpace, packedB []float32, bi, kb, m0, m1, p0, p1 int) {
	most := mBlock + 2*maxTileRows
	parts := (m1 - m0 + most - 1) / most
	for i := range parts {
		g.rows(w, packedB, bi, kb, m0+(m1-m0)*i/parts, m0+(m1-m0)*(i+1)/parts, p0, p1)
	}
}

func (g *Gemm) rows(w *workerSpace, packedB []float32, bi, kb, m0, m1, p0, p1 int) {
	t, kk := &g.set.tile, g.blockLen(kb)
	a, c := g.av[g.a.Batch[bi]:], g.cv[g.cBatch[bi]:]
	var b []float32
	if !g.packB {
		b = g.bv[g.b.Batch[bi]:]
	}
	n := (m1 - m0 + t.mr - 1) / t.mr // tiles, of nearly equal heights
	first := func(i int) int { return m0 + (m1-m0)*i/n }
	runs, args := g.blocks[kb], &w.args
	args.aks, args.acc = g.aK, min(kb+g.add, 1)
	kernels := &t.packed
	if !g.packB {
		kernels = &t.table
	}
	if g.packA {
		w.one[0] = run{0, kk}
		runs, args.aks = w.one[:], t.mr
		if g.aRow == 1 && (m1-m0)%t.mr == 0 {
			g.packColumns(w.a, a, m0, m1, kb)
		} else {
			for i := range n {
				g.packA1(w.a[i*t.mr*kk:], a, first(i), first(i+1), kb)
			}
		}
	}
	for p := p0; p < p1; p++ {
		args.cols = g.panelCols(p)
		j0, wide := p*t.nr, 1
		if g.halfWide(args.cols) {
			wide = 0
		}
		if g.packB {
			args.b, args.bks = &packedB[g.panelAt(p, kb)], t.nr*4>>(1-wide)
		} else {
			args.b, args.table, args.next = &b[g.b.Rows[j0]], &g.b.K[kb*kBlock], 0
			if wide == 1 {
				args.next = int(g.b.Rows[j0+t.nr/2] - g.b.Rows[j0])
			}
		}
		for i := range n {
			r, end := first(i), first(i+1)
			for x := range end - r {
				if g.packA {
					args.rows[x] = &w.a[i*t.mr*kk+x]
				} else {
					args.rows[x] = &a[g.a.Rows[r+x]]
				}
				args.c[x] = &c[int(g.cRows[r+x])+j0]
			}
			args.runs, args.n, args.done = &runs[0], len(runs), 0
			kernels[wide][end-r](args)
		}
	}
}

// eight is eight float32 in a form that the compiler copies through registers.
type eight struct{ a, b, c, d uint64 }

// packColumns lays rows m0 to m1 of A, a whole number of tiles that lie side by side, out as [tile][k][mr].
func (g *Gemm) packColumns(d, a []float32, m0, m1, kb int) {
	mr, kk := g.set.tile.mr, g.blockLen(kb)
	o := int(g.a.Rows[m0])
	for k, at := range g.a.K[kb*kBlock:][:kk] {
		row := a[o+int(at):][:m1-m0]
		for i := k * mr; len(row) >= mr; i += mr * kk {
			if mr == 8 {
				*(*eight)(unsafe.Pointer(&d[i : i+8][0])) = *(*eight)(unsafe.Pointer(&row[:8][0]))
			} else {
				copy(d[i:i+mr], row)
			}
			row = row[mr:]
		}
	}
}

// packA1 lays rows r to end of A out as [k][mr].
func (g *Gemm) packA1(d, a []float32, r, end, kb int) {
	mr, k0, kk := g.set.tile.mr, kb*kBlock, g.blockLen(kb)
	for x := range end - r {
		o := int(g.a.Rows[r+x])
		if g.aK == 1 && len(g.blocks[kb]) == 1 {
			q := unsafe.Pointer(&d[x])
			for k, v := range a[o+int(g.a.K[k0]):][:kk] {
				*(*float32)(unsafe.Add(q, k*mr*4)) = v
			}
			continue
		}
		for k := range kk {
			d[k*mr+x] = a[o+int(g.a.K[k0+k])]
		}
	}
}

// packPanel lays the columns of one panel out as [k][nr], or [k][nr/2] if that is enough, padded with zeros.
func (g *Gemm) packPanel(d []float32, bi, p, kb int) {
	b := g.bv[g.b.Batch[bi]:]
	nr, k0, kk, cols := g.set.tile.nr, kb*kBlock, g.blockLen(kb), g.panelCols(p)
	if g.halfWide(cols) {
		nr /= 2
	}
	col := g.b.Rows[p*g.set.tile.nr:][:cols]
	if n := sideBySide(col); n == cols || n >= 8 && cols%n == 0 { // copy whole stretches
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
	if cols < nr {
		clear(d[:kk*nr])
	}
	j := 0
	if g.bK == 1 {
		for ; j+4 <= cols; j += 4 {
			at := int(g.b.K[k0])
			s0, s1 := b[at+int(col[j]):][:kk], b[at+int(col[j+1]):][:kk]
			s2, s3 := b[at+int(col[j+2]):][:kk], b[at+int(col[j+3]):][:kk]
			q := unsafe.Pointer(&d[j])
			for k := range kk {
				e := (*[4]float32)(unsafe.Add(q, k*nr*4))
				e[0], e[1], e[2], e[3] = s0[k], s1[k], s2[k], s3[k]
			}
		}
	}
	for ; j < cols; j++ {
		o := int(col[j])
		for k := range kk {
			d[k*nr+j] = b[o+int(g.b.K[k0+k])]
		}
	}
}

// sideBySide returns the largest n such that the entries lie side by side in stretches of n.
func sideBySide(t []int32) int {
	n := 1
	for n < len(t) && t[n] == t[n-1]+1 {
		n++
	}
	for i := n; i < len(t); i++ {
		if i%n != 0 && t[i] != t[i-1]+1 {
			return 1
		}
	}
	return n
}

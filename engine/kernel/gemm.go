package kernel

import "sync/atomic"

// kBlock is the most of a contraction that is done at once, so that a panel of B stays in the first cache; kBlockLong is
// that of a product with more rows than are packed together, which reads panels from the second cache instead and updates C more rarely.
// The blocks fix the order of summation, so they depend on the shapes alone, not on the level or the workers.
const kBlock, kBlockLong = 192, 512

// kResident is up to how many k a panel of B surely stays in the first cache.
const kResident = 128

const (
	mBlock = 96 // about the number of rows that one piece of work computes, twice as many if B is larger than bCached
	// The most rows of A that are packed for one block of k together, and so many if A's k lie side by side: then it is
	// cheap to pack tiles one after the other.
	mOuter, mOuterDense = 768, 512

	bCached = 1 << 18 // elements of B that stay in the second cache: what is larger is read anew for each piece

	// Of a product whose contraction is cut into parts: the most elements of its result, so that a step is so short that
	// waiting for others would tell, and of all parts.
	maxPart, maxParts = 1 << 16, 1 << 18
)

// Operand says where the elements of a matrix lie in a slice: element (b, i, k) at Batch[b] + Rows[i] + K[k]. Tables of
// offsets express transposes, batch axes, slices and the windows of a convolution alike. K[0] is 0.
type Operand struct{ Batch, Rows, K []int32 }

// Gemm is a planned product C[b,m,n] = sum over k of A[b,m,k] * B[b,n,k], for given shapes and places. Both operands
// are addressed by rows and k; C has rows of N contiguous elements. A Gemm holds the state of its run, so it must not
// run twice at once.
//
// C is cut into tiles of a few rows and one panel, which is as many columns. A large product runs as a sequence of
// steps, each of which packs what it needs of the operands and then computes tiles. If there are few rows, a step is
// one block of k, so that all that it touches stays in the second cache; else there is a single step, which packs B,
// and tiles go through all blocks of k and pack their own rows of A.
type Gemm struct {
	m, n, k, batches int
	a, b             Operand
	cBatch, cRows    []int32
	set              *Set

	kLen    int     // of a block of k; the last may be shorter
	aK      int     // stride of A's k within runs
	aRuns   [][]run // A's runs of each block of k
	bRuns   [][]run // B's, of stride 1, if these are long; else nil
	packA   bool
	packB   bool
	aEights []int32 // rows of A and B, and the last one eight times again; where they are packed by eights
	bEights []int32
	byRows  bool  // B is packed a few k at a time, all panels
	bSides  []int // of each panel: columns of B that lie side by side
	columns bool  // A is packed a few k at a time, all tiles
	stretch int   // rows of A that lie side by side

	height, tiles int // rows of a tile (the last may have fewer), tiles of all rows
	vectors       int // of all columns, the last perhaps in part
	panels, whole int // panels, and how many of them are as wide as a tile can be: the others follow

	small    bool // whole batches are pieces of work
	perPiece int  // batches of a piece (small)
	pieces   int
	outer    bool // a step is one block of k
	parts    int  // of a long contraction, which are summed apart and then together; else 1
	partRows []int32
	cInOrder bool // the rows of C lie side by side
	apart    int  // elements from one part's memory to the next's
	given    bool // B is packed by Pack
	rPieces  int  // pieces along the rows
	nPieces  int  // and along n
	byPanels bool // pieces go through all rows before they go on to other panels
	aParts   int  // parts of the tiles that are packed apart, where A is packed a few k at a time
	bParts   int  // and of the panels

	// the run
	ws         *Workspace
	av, bv, cv []float32
	packed     []float32
	bi, add    int
	steps      int
	buffers    int // of packed operands, used in turn by the steps
	aPacks     int // pieces of packing A, of a step
	bPacks     int // and B
	progress   []progress
	failed     atomic.Bool
}

// progress counts the pieces of a step that are done, and holds those to do.
type progress struct {
	packed, tiled atomic.Int32
	a, b, tiles   queues
}

// NewGemm plans a product of A with B, whose rows are C's columns. C's row i of batch b begins at cBatch[b] + cRows[i].
func NewGemm(set *Set, a, b Operand, cBatch, cRows []int32) *Gemm {
	m, n, k := len(a.Rows), len(b.Rows), len(a.K)
	g := &Gemm{m: m, n: n, k: k, batches: len(cBatch), a: a, b: b, cBatch: cBatch, cRows: cRows, set: set, aParts: 1, bParts: 1}
	t := &set.tile
	aK, kRegular := stride(a.K)
	g.aK = 1
	if kRegular {
		g.aK = aK
	}
	most, tall := kBlock, m > mOuter || m > mOuterDense && g.aK == 1
	if tall {
		most = kBlockLong
	}
	blocks := max(1, (k+most-1)/most)
	g.kLen = max(8, ((k+blocks-1)/blocks+7)&^7)
	bRuns := 0
	for k0 := 0; k0 < k; k0 += g.kLen {
		k1 := min(k, k0+g.kLen)
		g.aRuns = append(g.aRuns, runsOf(a.K[k0:k1], g.aK))
		g.bRuns = append(g.bRuns, runsOf(b.K[k0:k1], 1))
		bRuns += len(g.bRuns[len(g.bRuns)-1])
	}
	if k < 6*bRuns {
		g.bRuns = nil
	}
	g.cut(n)
	g.tiles = (m + t.mr - 1) / t.mr
	g.height = max(1, (m+g.tiles-1)/max(1, g.tiles))
	g.tiles = (m + g.height - 1) / g.height

	shortRuns := !kRegular && len(g.aRuns) > 0 && min(k, g.kLen)/len(g.aRuns[0]) < 3
	// Rows of A are read in place unless every element of k lies on another cache line.
	g.packA = shortRuns || g.aK != 1 && g.panels > 2 && m > 24
	g.stretch = sideBySide(a.Rows)
	g.columns = m > 1 && (g.stretch == m || g.stretch >= 2*t.mr)
	bk, bKRegular := stride(b.K)
	g.packB = m > 64 || m > t.mr && bKRegular && bk >= 512 || !g.vectorsContiguous()
	g.byRows = g.panels > 1 && sideBySide(b.Rows) == n
	for p := range g.panels {
		g.bSides = append(g.bSides, sideBySide(g.columnsOf(p)))
	}

	if g.packA {
		g.aEights = eightMore(a.Rows)
	}
	g.bEights = eightMore(b.Rows)

	g.small = g.batches > 1 && (m*n*k <= 1<<20 || g.batches >= 64)
	if g.small {
		g.perPiece = max(1, (1<<17)/max(1, m*n*k))
		g.pieces = (g.batches + g.perPiece - 1) / g.perPiece
	}
	g.outer = !g.small && !tall && len(g.aRuns) > 0
	g.part()
	g.progress = make([]progress, max(1, len(g.aRuns)))
	return g
}

// part cuts a long contraction whose result is small: its parts need not wait for each other, where the steps of one block
// after the other would be short. How many depends on the shapes alone, as the order of summation does.
func (g *Gemm) part() {
	g.parts = 1
	if !g.outer || g.m*g.n > maxPart {
		return
	}
	for g.parts < 8 && len(g.aRuns) >= 4*g.parts && (2*g.parts-1)*g.m*g.n <= maxParts {
		g.parts *= 2
	}
	if g.parts > 1 {
		g.partRows = multiples(g.m, g.n)
		d, regular := stride(g.cRows)
		g.cInOrder = regular && d == g.n
	}
}

// cut divides n columns into panels: as many whole ones as leave no vector alone behind them, then narrower ones.
func (g *Gemm) cut(n int) {
	nv := g.set.tile.nv
	g.vectors = (n + g.set.tile.lanes - 1) / g.set.tile.lanes
	g.panels, g.whole = (g.vectors+nv-1)/nv, g.vectors/nv
	if nv > 2 && g.whole > 0 && g.vectors%nv == 1 {
		g.whole--
	}
}

// vectorsContiguous says whether B can be read without packing: the columns of each vector lie side by side.
func (g *Gemm) vectorsContiguous() bool {
	lanes := g.set.tile.lanes
	for j := 0; j < g.n; j += lanes {
		c := g.b.Rows[j:min(g.n, j+lanes)]
		if len(c) < lanes && !g.set.tile.masked || len(c) > 1 && !contiguous(c) {
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

// multiples returns 0, s, 2s, ..., n of them.
func multiples(n, s int) []int32 {
	t := make([]int32, n)
	for i := range t {
		t[i] = int32(i * s)
	}
	return t
}

// Flops returns the number of multiplications and additions.
func (g *Gemm) Flops() float64 {
	return 2 * float64(g.batches) * float64(g.m) * float64(g.n) * float64(g.k)
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
	g.begin(ws, a, b, c, add)
	if g.small {
		g.spread(g.pieces, (*gemmBatches)(g), pool.Run)
	} else {
		for g.bi = range g.batches {
			g.run(pool)
		}
	}
	g.end()
}

// Packable says whether B can be packed once for many products: one batch, and not too small.
func (g *Gemm) Packable() bool {
	return g.batches == 1 && g.k > 0 && g.m > 0 && g.n >= 2*g.set.tile.lanes
}

// UsePacked makes the product take B as Pack lays it out.
func (g *Gemm) UsePacked() { g.packB, g.small, g.given = true, false, true }

// PackedSize returns the number of elements that Pack writes.
func (g *Gemm) PackedSize() int { return g.vectors * g.set.tile.lanes * g.k }

// Pack lays b out for RunPacked, of this or another product with the same operand B.
func (g *Gemm) Pack(pool *Pool, b, packed []float32) {
	g.bi, g.bv, g.packed = 0, b, packed
	g.spread(len(g.aRuns)*g.packsOfB(), (*gemmPack)(g), pool.Run)
	g.bv, g.packed = nil, nil
}

// RunPacked is Run with B packed.
func (g *Gemm) RunPacked(pool *Pool, ws *Workspace, a, packed, c []float32, add bool) {
	g.begin(ws, a, nil, c, add)
	g.packed = packed
	g.run(pool)
	g.end()
}

func (g *Gemm) begin(ws *Workspace, a, b, c []float32, add bool) {
	g.ws, g.av, g.bv, g.cv, g.add, g.bi = ws, a, b, c, 0, 0
	if add {
		g.add = 1
	}
}

// end lets go of the operands.
func (g *Gemm) end() {
	for i := range g.ws.worker {
		g.ws.worker[i].args = tileArgs{}
	}
	g.ws, g.av, g.bv, g.cv, g.packed = nil, nil, nil, nil, nil
}

// run computes one batch, in steps or in parts.
func (g *Gemm) run(pool *Pool) {
	if g.parts > 1 {
		g.runParts(pool)
		return
	}
	g.divide(pool.Threads())
	g.steps, g.aPacks, g.bPacks, g.buffers = 1, 0, 0, 1
	if g.outer {
		g.steps = len(g.aRuns)
		if g.packA {
			g.aPacks = g.packsOfA()
		}
		if pool.Threads() > 1 {
			g.buffers = 2
		}
	}
	if g.packB && !g.given {
		g.packed = g.ws.b
		g.bPacks = g.packsOfB()
		if !g.outer {
			g.bPacks *= len(g.aRuns)
		}
	}
	for i := range g.steps {
		p := &g.progress[i]
		p.packed.Store(0)
		p.tiled.Store(0)
		if len(p.tiles) != pool.Threads() {
			p.a, p.b, p.tiles = make(queues, pool.Threads()), make(queues, pool.Threads()), make(queues, pool.Threads())
		}
		p.a.set(g.aPacks)
		p.b.set(g.bPacks)
		p.tiles.set(g.pieces)
	}
	g.failed.Store(false)
	g.spread(g.steps*(g.aPacks+g.bPacks+g.pieces), (*gemmStep)(g), pool.RunInOrder)
}

// divide cuts the tiles of a step into pieces for a number of workers. Each begins with some of the rows or of the panels,
// whichever are more, unless the panels are too few to be shared evenly: what it packs of that operand, it reads itself.
func (g *Gemm) divide(threads int) {
	rows := g.blockRows()
	g.rPieces, g.nPieces = max(1, (g.tiles*g.height+rows/2)/rows), 1
	g.aParts, g.bParts, g.byPanels = 1, 1, false
	if threads > 1 {
		few := evenPieces * threads
		g.byPanels = g.n >= g.m && (g.panels >= few || g.tiles < few)
		if g.byPanels {
			g.nPieces = min(g.panels, few)
			if g.rPieces == 1 {
				g.nPieces = min(g.panels, 2*few)
			}
		} else {
			g.rPieces = min(g.tiles, (g.rPieces+threads-1)/threads*threads)
			if g.rPieces < few {
				g.nPieces = min(g.panels, (few+g.rPieces-1)/g.rPieces)
			}
		}
		if g.byPanels && g.byRows && g.outer {
			g.bParts = threads
		}
		if !g.byPanels && g.columns && g.outer {
			g.aParts = threads
		}
	}
	g.pieces = g.rPieces * g.nPieces
}

// large says whether B does not stay in the second cache.
func (g *Gemm) large() bool { return g.n*g.k > bCached }

// blockRows is about the number of rows of a piece.
func (g *Gemm) blockRows() int {
	if g.large() {
		return 2 * mBlock
	}
	return mBlock
}

// evenPieces is how many pieces for each worker make up for their different sizes.
const evenPieces = 4

// tilesOf returns the tiles of a piece, panelsOf its panels.
func (g *Gemm) tilesOf(i int) (t0, t1 int) {
	if g.byPanels {
		i %= g.rPieces
	} else {
		i /= g.nPieces
	}
	return share(g.tiles, i, g.rPieces)
}

func (g *Gemm) panelsOf(i int) (p0, p1 int) {
	if g.byPanels {
		i /= g.rPieces
	} else {
		i %= g.nPieces
	}
	return share(g.panels, i, g.nPieces)
}

// share returns the part i of parts of n things.
func share(n, i, parts int) (from, to int) { return n * i / parts, n * (i + 1) / parts }

// spread runs a job, on several workers if the product is large enough to be worth waking them.
func (g *Gemm) spread(n int, job Job, run func(int, Job)) {
	if g.Flops() < 1<<19 {
		for i := range n {
			job.Do(0, i)
		}
		return
	}
	run(n, job)
}

// gemmStep is the work of all steps, in order: the packing of a step, then its tiles. Workers take turns in
// order, so whoever waits, waits for pieces that others have begun; which pieces of its kind a turn does is the worker's to
// choose.
type gemmStep Gemm

func (j *gemmStep) Do(worker, i int) {
	g := (*Gemm)(j)
	packs := g.aPacks + g.bPacks
	step := i / (packs + g.pieces)
	i %= packs + g.pieces
	done := false
	defer func() {
		if !done {
			g.failed.Store(true) // or the others would wait for ever
		}
	}()
	now := &g.progress[step]
	if i < packs {
		// the buffers may still be read by tiles
		if step < g.buffers || g.await(&g.progress[step-g.buffers].tiled, g.pieces) {
			if i < g.bPacks {
				i, _ := now.b.take(worker) // there are as many as turns
				kb, at := step, 0
				if g.outer {
					at = step % g.buffers * g.bBuffer()
				} else {
					kb, i = i/g.packsOfB(), i%g.packsOfB()
					at = g.blockAt(kb)
				}
				g.packBOf(g.packed[at:], g.bi, kb, i)
			} else {
				i, _ := now.a.take(worker)
				g.packAPiece(g.ws.a[step%g.buffers*g.aBuffer():], step, i)
			}
			now.packed.Add(1)
		}
	} else if (step == 0 || g.await(&g.progress[step-1].tiled, g.pieces)) && g.await(&now.packed, packs) {
		i, _ := now.tiles.take(worker)
		g.piece(worker, step, i)
		now.tiled.Add(1)
	}
	done = true
}

// runParts computes the parts and adds them up in their order. A worker alone adds each one while it is in the cache.
func (g *Gemm) runParts(pool *Pool) {
	if pool.Threads() > 1 {
		g.apart = g.m * g.n
		g.spread(g.parts, (*gemmParts)(g), pool.Run)
		g.spread(g.sums(), (*gemmSums)(g), pool.Run)
		return
	}
	g.apart = 0
	for i := range g.parts {
		(*gemmParts)(g).Do(0, i)
		if i > 0 {
			g.addPart(i, 0, g.m)
		}
	}
}

// gemmParts are the parts of the contraction. The first goes to C, each other one to memory of its own.
type gemmParts Gemm

func (j *gemmParts) Do(worker, i int) {
	g := (*Gemm)(j)
	w := &g.ws.worker[worker]
	to := g.c(g.bi)
	from, end := share(len(g.aRuns), i, g.parts)
	if i > 0 {
		to = target{g.ws.c[(i-1)*g.apart:], g.partRows, from}
	}
	for kb := from; kb < end; kb++ {
		w.fetch = fetch{}
		if kb+1 < end {
			w.fetch = g.ahead(kb, 0, 1)
		}
		b := w.b
		if g.given {
			b = g.packed[g.blockAt(kb):]
		} else if g.packB {
			for i := range g.packsOfB() {
				g.packBOf(b, g.bi, kb, i)
			}
		}
		if g.packA {
			g.packTiles(w.a, g.bi, kb, 0, g.tiles)
		}
		g.block(w, w.a, b, g.bi, to, kb, 0, g.tiles, 0, g.panels)
	}
}

// gemmSums adds the parts to C, some rows at a time.
type gemmSums Gemm

func (g *Gemm) sums() int { return max(1, g.parts*g.m*g.n>>16) }

func (j *gemmSums) Do(_, i int) {
	g := (*Gemm)(j)
	from, end := share(g.m, i, g.sums())
	for p := 1; p < g.parts; p++ {
		g.addPart(p, from, end)
	}
}

// addPart adds some rows of a part to C.
func (g *Gemm) addPart(part, from, end int) {
	add, n := g.set.Binary[Add], g.n
	c, q := g.cv[g.cBatch[g.bi]:], g.ws.c[(part-1)*g.apart:]
	if at := int(g.cRows[0]); g.cInOrder {
		add(c[at+from*n:at+end*n], c[at+from*n:at+end*n], q[from*n:end*n])
		return
	}
	for r := from; r < end; r++ {
		d := c[g.cRows[r]:][:n]
		add(d, d, q[r*n:r*n+n])
	}
}

// target is where a product goes: rows of C, which blocks of k from the first on are added to.
type target struct {
	c     []float32
	rows  []int32
	first int // the block that replaces what is there; -1 if none does
}

// c returns C of a batch.
func (g *Gemm) c(bi int) target { return target{g.cv[g.cBatch[bi]:], g.cRows, -g.add} }

// await waits until a counter of pieces reaches n. It is false if a piece failed.
func (g *Gemm) await(c *atomic.Int32, n int) bool {
	for spin := 0; int(c.Load()) < n; spin++ {
		if g.failed.Load() {
			return false
		}
		pause(spin)
	}
	return true
}

// piece computes some tiles and panels of C.
func (g *Gemm) piece(worker, step, i int) {
	w := &g.ws.worker[worker]
	w.fetch = g.ahead(step, i, g.pieces)
	t0, t1 := g.tilesOf(i)
	p0, p1 := g.panelsOf(i)
	if g.outer {
		var a, b []float32
		if g.packA {
			a = g.ws.a[step%g.buffers*g.aBuffer()+t0*g.tileLen():]
		}
		switch {
		case g.given:
			b = g.packed[g.blockAt(step):]
		case g.packB:
			b = g.packed[step%g.buffers*g.bBuffer():]
		}
		g.block(w, a, b, g.bi, g.c(g.bi), step, t0, t1, p0, p1)
		return
	}
	for kb := range g.aRuns {
		var a, b []float32
		if g.packA {
			a = w.a
			g.packTiles(a, g.bi, kb, t0, t1)
		}
		if g.packB {
			b = g.packed[g.blockAt(kb):]
		}
		g.block(w, a, b, g.bi, g.c(g.bi), kb, t0, t1, p0, p1)
	}
}

// gemmBatches does whole batches, one after the other.
type gemmBatches Gemm

func (j *gemmBatches) Do(worker, i int) {
	g := (*Gemm)(j)
	w := &g.ws.worker[worker]
	for bi := i * g.perPiece; bi < min(g.batches, (i+1)*g.perPiece); bi++ {
		w.fetch = g.nextBatch(bi + 1)
		for kb := range g.aRuns {
			if g.packB {
				for i := range g.packsOfB() {
					g.packBOf(w.b, bi, kb, i)
				}
			}
			most := max(1, mBlock/g.height)
			for t0 := 0; t0 < g.tiles; t0 += most {
				t1 := min(g.tiles, t0+most)
				if g.packA {
					g.packTiles(w.a, bi, kb, t0, t1)
				}
				g.block(w, w.a, w.b, bi, g.c(bi), kb, t0, t1, 0, g.panels)
			}
		}
	}
}

func (g *Gemm) blockLen(kb int) int   { return min(g.kLen, g.k-kb*g.kLen) }
func (g *Gemm) blockAt(kb int) int    { return kb * g.kLen * g.vectors * g.set.tile.lanes }
func (g *Gemm) panelAt(p, kb int) int { return g.panelCol(p) * g.blockLen(kb) }

// panel returns the first vector of a panel and their number.
func (g *Gemm) panel(p int) (first, n int) {
	if nv := g.set.tile.nv; p < g.whole {
		return p * nv, nv
	} else {
		rest := min(2, g.vectors-g.whole*nv)
		return g.whole*nv + (p-g.whole)*rest, rest
	}
}

// panelCol returns the first column of a panel.
func (g *Gemm) panelCol(p int) int {
	first, _ := g.panel(p)
	return first * g.set.tile.lanes
}

// columnsOf returns where the columns of a panel begin in B.
func (g *Gemm) columnsOf(p int) []int32 {
	first, vectors := g.panel(p)
	lanes := g.set.tile.lanes
	return g.b.Rows[first*lanes : min(g.n, (first+vectors)*lanes)]
}

// block adds one block of k to tiles t0 to t1 and panels p0 to p1 of C. a is the packed tiles from t0 on, if A is
// packed, b all packed panels of the block, if B is.
func (g *Gemm) block(w *workerSpace, a, b []float32, bi int, to target, kb, t0, t1, p0, p1 int) {
	t, args := &g.set.tile, &w.args
	runs := g.aRuns[kb]
	kernels := &t.packed
	args.aks, args.acc, args.long = g.aK, min(kb-to.first, 1), 0
	if g.blockLen(kb) > kResident {
		args.long = 1
	}
	if g.packA {
		w.one[0] = run{0, g.blockLen(kb)}
		runs, args.aks, args.rows = w.one[:], t.ar, &firstRows[0]
	} else {
		args.a = &g.av[g.a.Batch[bi]]
	}
	if !g.packB {
		kernels = &t.table
		args.table = &g.b.K[kb*g.kLen]
	}
	f, requests := &w.fetch, (t1-t0)*g.blockLen(kb)
	panelAhead := g.packB && t1-t0 >= 8 && g.large()
	if panelAhead {
		requests /= 2
	}
	f.spread(requests * (p1 - p0))
	for p := p0; p < p1; p++ {
		first, vectors := g.panel(p)
		j0 := first * t.lanes
		var soon fetch // the next panel
		if panelAhead && p+1 < p1 {
			soon.part[0] = stretchOf(b, g.panelAt(p+1, kb), g.panelAt(min(p+2, g.panels), kb))
			soon.spread(requests)
		}
		args.cols = min(vectors*t.lanes, g.n-j0)
		if g.packB {
			args.b, args.bks = &b[g.panelAt(p, kb)], vectors*t.lanes*4
		} else {
			args.b = &g.bv[int(g.b.Batch[bi])+int(g.b.Rows[j0])]
			for i := range vectors - 1 {
				j := j0 + i*t.lanes
				args.next[i] = int(g.b.Rows[j+t.lanes] - g.b.Rows[j])
			}
		}
		args.c = &to.c[j0]
		for i := t0; i < t1; i++ {
			r := i * g.height
			if g.packA {
				args.a = &a[(i-t0)*g.tileLen()]
			} else {
				args.rows = &g.a.Rows[r]
			}
			args.cRows, args.runs, args.n, args.done = &to.rows[r], &runs[0], len(runs), 0
			now := f
			if soon.left() > 0 {
				now = &soon
			}
			args.ahead, args.pace = now.next(g.blockLen(kb))
			kernels[vectors][min(g.height, g.m-r)](args)
		}
	}
}

// firstRows are the offsets of the rows of a packed tile.
var firstRows = [maxTileRows]int32{0, 1, 2, 3, 4, 5, 6, 7}

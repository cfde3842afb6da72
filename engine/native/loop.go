package native

import (
	"fmt"
	"math"
	"slices"

	"github.com/lathe-ml/lathe/engine/kernel"
)

// block is about the number of elements that a loop computes at a time: few enough that all intermediate values of a
// block stay in the first or second cache.
const block = 1024

const (
	chunkSize = 16 << 10 // elements of a chunk, the unit of parallel work
	maxChunks = 32
	maxAxes   = 8 // of a loop, besides the last
	// streamBytes is more than the second cache holds beside other things.
	streamBytes = 1 << 20
)

// program is a fused loop: instructions that are carried out block by block. Its iteration space is rows of cols
// elements.
type program struct {
	dims       []int // the space, axes joined where every operand allows
	rows, cols int
	blockRows  int // rows of a block if a row fits, else 1
	blockCols  int
	code       []instr
	slots      int // vectors that instructions name
	registers  int // vectors of a block's size that a worker needs
	whole      []operand
	fixed      []operand // the same in every block: one element, or one row for all rows
	register   []int     // of each slot, or -1
	results    []result
	folds      []*folding
	set        *kernel.Set

	// streams is set if the operands do not stay in the second cache, and one or two instructions would not wait for
	// memory all the time anyway: operands of the next block are then asked for while a block is computed.
	streams bool

	chunks   int
	align    int // rows; chunks begin at multiples of it
	partials int // elements that each chunk after the first needs for its own reductions
}

// operand is memory that the loop reads: in order, one element for all, or through strides.
type operand struct {
	base *value
	off  int
	slot int
	str  []int // of the axes but the last
	last int   // stride of the last axis
}

// result is memory that the loop writes in order.
type result struct {
	slot int
	v    *value
}

type opcode uint8

const (
	opUnary opcode = iota
	opBinary
	opSelect
	opMulAdd
	opLoad
	opFold
	opRow  // an elementwise function of row values
	opAdam // a step of AdamW
	opNone // merged into another
)

// instr is one instruction: d = f(a, b, c) on slots.
type instr struct {
	code    opcode
	d       int
	arg     slots
	apply   apply
	unary   func(dst, x []float32)
	binary  func(dst, a, b []float32)
	ternary func(dst, a, b, c []float32)
	load    operand
	fold    *folding
	row     *value
	rowArgs [3]rowArg
	adam    *adamStep
}

// slots are an instruction's operands; -1 is none.
type slots [4]int

func slotsOf(s ...int) (a slots) {
	for i := range a {
		a[i] = -1
	}
	copy(a[:], s)
	return a
}

// rowArg is an operand of a function of row values: memory with one element for each row, or a scalar's slot.
type rowArg struct {
	base *value
	off  int
	slot int // of a scalar, else -1
}

// folding is a reduction inside a loop.
type folding struct {
	v     *value
	op    foldOp
	str   []int // of the result along the loop's axes but the last
	last  int
	byRow bool // the result is one element for each row
	toRow bool // a sum whose result is one row
	join  func(dst, a, b []float32)
	at    int // in a chunk's partial results
	n     int
}

// loopCompiler turns the members of a group into a program.
type loopCompiler struct {
	*program
	group  *group
	space  []int
	slotOf map[*value]int // of values that the loop computes
	loads  []*operand
	loaded map[loadKey]int // slot of an operand
	// products are the instructions, by slot, whose result a single other instruction uses.
	products map[int]int
	uses     map[*value]int
}

type loadKey struct {
	base *value
	off  int
	str  string
}

func (x *executable) compileLoop(g *group) (*program, error) {
	c := &loopCompiler{
		program: &program{set: x.b.set}, group: g, space: g.space,
		slotOf: map[*value]int{}, loaded: map[loadKey]int{}, products: map[int]int{}, uses: map[*value]int{},
	}
	if len(c.space) == 0 {
		c.space = []int{1}
	}
	for _, v := range g.members {
		for _, r := range v.reads() {
			c.uses[r.base]++
		}
	}
	for _, v := range g.members {
		switch {
		case v.kind == kindReduce:
			c.reduce(v)
		case v.row:
			c.rowFunction(v)
		default:
			c.function(v)
		}
	}
	c.fuseAdam(x)
	if err := c.shape(); err != nil {
		return nil, err
	}
	c.operands()
	c.assign()
	c.cut()
	c.streams = len(c.code) >= 3 && 4*c.rows*c.cols*(len(c.whole)+len(c.results)) > streamBytes
	return c.program, nil
}

// over returns a view's strides over the space.
func (c *loopCompiler) over(v view) []int {
	if v.size() == 1 {
		return make([]int, len(c.space))
	}
	return split(v.dims, v.str, c.space)
}

func (c *loopCompiler) slot() int { c.slots++; return c.slots - 1 }

// use returns the slot of an operand: a result of this loop, or memory, which needs an instruction to load it.
func (c *loopCompiler) use(v view) int {
	if s, ok := c.slotOf[v.base]; ok && !v.base.row {
		return s
	}
	str := c.over(v)
	k := loadKey{v.base, v.off, fmt.Sprint(str)}
	if s, ok := c.loaded[k]; ok {
		return s
	}
	o := &operand{base: v.base, off: v.off, slot: c.slot(), str: str}
	c.loaded[k] = o.slot
	c.loads = append(c.loads, o)
	c.code = append(c.code, instr{code: opLoad, d: o.slot, arg: slotsOf()})
	return o.slot
}

// reduce adds a reduction.
func (c *loopCompiler) reduce(v *value) {
	f := &folding{v: v, op: v.fold.op, byRow: v.row, n: size(v.dims)}
	f.join = c.set.Binary[[...]kernel.BinaryOp{kernel.Add, kernel.Max, kernel.Min, kernel.Mul}[f.op]]
	dims, out := v.space(), rowMajor(v.dims)
	str, kept := make([]int, len(dims)), 0
	for a := range dims {
		if !slices.Contains(v.fold.axes, a) {
			str[a] = out[kept]
			kept++
		}
	}
	f.str = c.over(view{nil, 0, dims, str})
	c.folds = append(c.folds, f)
	c.code = append(c.code, instr{code: opFold, d: -1, arg: slotsOf(c.use(v.operand(0))), fold: f})
}

// kernels sets the instruction's function.
func (c *loopCompiler) kernels(in *instr, a apply) {
	in.apply = a
	switch a.args {
	case 1:
		in.unary = c.set.Unary[a.unary]
	case 2:
		in.binary = c.set.Binary[a.binary]
	default:
		in.ternary = c.set.Select
	}
}

// rowFunction adds an elementwise function of row values. They are memory, or scalars.
func (c *loopCompiler) rowFunction(v *value) {
	in := instr{code: opRow, d: -1, arg: slotsOf(), row: v}
	c.kernels(&in, v.apply)
	for i := range v.in {
		r := v.operand(i)
		in.rowArgs[i] = rowArg{r.base, r.off, -1}
		if size(r.base.dims) == 1 {
			in.rowArgs[i].slot = c.use(view{r.base, r.off, []int{}, []int{}})
		}
	}
	c.code = append(c.code, in)
}

// function adds an elementwise function. A sum takes over a product that nothing else uses.
func (c *loopCompiler) function(v *value) {
	in := instr{code: opcode(v.apply.args - 1), arg: slotsOf()}
	for i := range v.in {
		in.arg[i] = c.use(v.operand(i))
	}
	c.kernels(&in, v.apply)
	if v.apply.args == 2 && v.apply.binary == kernel.Add && in.arg[0] != in.arg[1] {
		for i := range 2 {
			if at, ok := c.products[in.arg[i]]; ok {
				m := &c.code[at]
				in.code, in.ternary, in.arg = opMulAdd, c.set.MulAdd, slotsOf(m.arg[0], m.arg[1], in.arg[1-i])
				m.code = opNone
				break
			}
		}
	}
	in.d = c.slot()
	c.slotOf[v] = in.d
	if v.store {
		c.results = append(c.results, result{in.d, v})
	}
	if v.apply.args == 2 && v.apply.binary == kernel.Mul && !v.store && c.uses[v] == 1 {
		c.products[in.d] = len(c.code)
	}
	c.code = append(c.code, in)
}

// shape joins the axes that every operand runs through evenly, and cuts the space into blocks.
func (c *loopCompiler) shape() error {
	var strides []*[]int
	for _, o := range c.loads {
		strides = append(strides, &o.str)
	}
	for _, f := range c.folds {
		strides = append(strides, &f.str)
	}
	dims := slices.Clone(c.space)
	for i := len(dims) - 2; i >= 0; i-- {
		ok := c.group.rowLen == 0 || i < len(dims)-2 // a row stays an axis
		for _, s := range strides {
			ok = ok && (*s)[i] == dims[i+1]*(*s)[i+1]
		}
		if !ok {
			continue
		}
		dims[i+1] *= dims[i]
		dims = slices.Delete(dims, i, i+1)
		for _, s := range strides {
			*s = slices.Delete(*s, i, i+1)
		}
	}
	last := len(dims) - 1
	if last > maxAxes {
		return fmt.Errorf("a loop over %d axes", len(dims))
	}
	c.dims, c.cols = dims, dims[last]
	c.rows = size(dims) / c.cols
	c.blockRows, c.blockCols = 1, c.cols
	if c.cols > block && c.group.rowLen == 0 {
		c.blockCols = block
	} else {
		c.blockRows = max(1, block/c.cols)
	}
	for _, f := range c.folds {
		f.last, f.str = f.str[last], f.str[:last]
		f.toRow = f.op == foldSum && f.last == 1 && !slices.ContainsFunc(f.str, func(s int) bool { return s != 0 })
	}
	return nil
}

// operands decides how each operand is read. Those in order, and those that are the same in every block, need no
// instruction.
func (c *loopCompiler) operands() {
	last, order := len(c.dims)-1, rowMajor(c.dims)
	strided := map[int]*operand{}
	for _, o := range c.loads {
		inOrder, fixed := true, true
		for a, s := range o.str {
			inOrder = inOrder && (s == order[a] || c.dims[a] == 1)
			fixed = fixed && (s == 0 || s == 1 && a == last && c.rows > 1 && c.blockCols == c.cols)
		}
		o.last, o.str = o.str[last], o.str[:last]
		switch {
		case fixed:
			c.fixed = append(c.fixed, *o)
		case inOrder:
			c.whole = append(c.whole, *o)
		default:
			strided[o.slot] = o
		}
	}
	kept := c.code[:0]
	for _, in := range c.code {
		if in.code == opLoad {
			o := strided[in.d]
			if o == nil {
				continue
			}
			in.load = *o
		}
		if in.code != opNone {
			kept = append(kept, in)
		}
	}
	c.code = kept
}

// assign gives registers to the slots that are not memory. A register is free again after the last use of its slot.
func (p *program) assign() {
	p.register = make([]int, p.slots)
	memory := make([]bool, p.slots)
	lastUse := make([]int, p.slots)
	for i := range p.register {
		p.register[i] = -1
	}
	for _, o := range p.whole {
		memory[o.slot] = true
	}
	for _, r := range p.results {
		memory[r.slot] = true
	}
	for _, o := range p.fixed { // filled once
		p.register[o.slot] = p.registers
		p.registers++
		memory[o.slot] = true
	}
	for i, in := range p.code {
		for _, a := range in.arg {
			if a >= 0 && in.code != opLoad && in.code != opRow {
				lastUse[a] = i
			}
		}
	}
	var free []int
	for i, in := range p.code {
		if in.code != opLoad && in.code != opRow {
			for j, a := range in.arg {
				if a >= 0 && lastUse[a] == i && !memory[a] && !slices.Contains(in.arg[:j], a) {
					free = append(free, p.register[a])
				}
			}
		}
		if in.d < 0 || memory[in.d] {
			continue
		}
		if len(free) == 0 {
			free = append(free, p.registers)
			p.registers++
		}
		p.register[in.d] = free[len(free)-1]
		free = free[:len(free)-1]
		if lastUse[in.d] < i { // never read
			free = append(free, p.register[in.d])
		}
	}
}

// cut divides the loop into chunks. How many depends on the sizes alone, so that the order of summation does.
func (p *program) cut() {
	p.chunks, p.align = 1, p.blockRows
	total := p.rows * p.cols
	own := 0 // elements of results that all chunks add to
	outer := p.rows
	if len(p.dims) > 1 {
		outer = p.rows / p.dims[0]
	}
	apart := len(p.dims) > 1
	for _, f := range p.folds {
		if !f.byRow {
			apart = apart && f.str[0] != 0
		}
	}
	for _, f := range p.folds {
		if f.byRow || apart {
			continue
		}
		f.at = own
		own += (f.n + 15) &^ 15
	}
	if apart && len(p.folds) > 0 {
		for _, f := range p.folds {
			if !f.byRow {
				p.align = max(p.align, outer) // whole steps of the outermost axis
				if p.align%outer != 0 {
					p.align = (p.align + outer - 1) / outer * outer
				}
			}
		}
	}
	p.chunks = min(maxChunks, total/chunkSize)
	if own > 0 {
		p.chunks = min(p.chunks, total/(4*own))
	}
	if p.rows > 1 {
		p.chunks = min(p.chunks, (p.rows+p.align-1)/p.align)
	}
	p.chunks = max(1, p.chunks)
	p.partials = own
}

// span returns the rows, or, of a loop of one row, the columns, of a chunk.
func (p *program) span(i int) (from, to int) {
	n, align := p.rows, p.align
	if p.rows == 1 {
		n, align = p.cols, 16
	}
	units := (n + align - 1) / align
	return min(n, units*i/p.chunks*align), min(n, units*(i+1)/p.chunks*align)
}

// loopSpace is a worker's memory for loops.
type loopSpace struct {
	registers []float32
	slots     [][]float32
	temp      []float32
	adam      kernel.Adam
	_         [64]byte
}

func (s *loopSpace) grow(p *program) {
	n := p.blockRows * p.blockCols
	if len(s.registers) < n*p.registers {
		s.registers = aligned(n * p.registers)
	}
	if len(s.slots) < p.slots {
		s.slots = make([][]float32, p.slots)
	}
	if len(s.temp) < n {
		s.temp = aligned(n)
	}
}

var foldStart = [...]float32{foldSum: 0, foldMax: float32(math.Inf(-1)), foldMin: float32(math.Inf(1)), foldProduct: 1}

// loopJob runs the chunks of a program.
type loopJob struct {
	x *executable
	p *program
}

// Do runs one chunk.
func (j *loopJob) Do(worker, i int) {
	s := &j.x.loops[worker]
	var own []float32
	if i > 0 && j.p.partials > 0 {
		own = j.x.partials[(i-1)*j.p.partials : i*j.p.partials]
		j.p.start(own)
	}
	from, to := j.p.span(i)
	j.p.run(s, from, to, own)
}

// start sets a chunk's partial results.
func (p *program) start(own []float32) {
	for _, f := range p.folds {
		if !f.byRow {
			fill(f.target(own), foldStart[f.op])
		}
	}
}

func fill(x []float32, v float32) {
	for i := range x {
		x[i] = v
	}
}

// target returns where a chunk gathers a reduction.
func (f *folding) target(own []float32) []float32 {
	if own == nil {
		return f.v.buf
	}
	return own[f.at : f.at+f.n]
}

// runLoop runs a program and joins what its chunks gathered.
func (x *executable) runLoop(p *program) {
	p.start(nil)
	x.job = loopJob{x, p}
	if p.chunks == 1 {
		x.job.Do(0, 0)
		return
	}
	x.b.pool.Run(p.chunks, &x.job)
	if p.partials > 0 {
		for i := 1; i < p.chunks; i++ {
			own := x.partials[(i-1)*p.partials : i*p.partials]
			for _, f := range p.folds {
				if !f.byRow {
					f.join(f.v.buf, f.v.buf, f.target(own))
				}
			}
		}
	}
}

// run computes some rows, or some columns of the only row.
func (p *program) run(s *loopSpace, from, to int, own []float32) {
	size := p.blockRows * p.blockCols
	slots := s.slots[:p.slots]
	for i := range p.fixed {
		o := &p.fixed[i]
		r := p.register[o.slot]
		d := s.registers[r*size : (r+1)*size]
		slots[o.slot] = d
		if o.last == 0 {
			fill(d, o.base.buf[o.off])
			continue
		}
		for d = d[:min(size, (to-from)*p.cols)]; len(d) > 0; d = d[p.cols:] {
			copy(d[:p.cols], o.base.buf[o.off:])
		}
	}
	if p.rows == 1 {
		for c := from; c < to; c += p.blockCols {
			p.block(s, slots, 0, 1, c, min(p.blockCols, to-c), own)
		}
		return
	}
	for r := from; r < to; r += p.blockRows {
		for c := 0; c < p.cols; c += p.blockCols {
			p.block(s, slots, r, min(to, r+p.blockRows), c, min(p.blockCols, p.cols-c), own)
		}
	}
}

// block computes columns c0 to c0+w of rows r0 to r1. More than one row comes with all columns only.
func (p *program) block(s *loopSpace, slots [][]float32, r0, r1, c0, w int, own []float32) {
	n, at, size := (r1-r0)*w, r0*p.cols+c0, p.blockRows*p.blockCols
	for i := range p.whole {
		o := &p.whole[i]
		slots[o.slot] = o.base.buf[o.off+at:][:n]
	}
	for i := range p.results {
		slots[p.results[i].slot] = p.results[i].v.buf[at:][:n]
	}
	get := func(slot int) []float32 { return slots[slot][:n] }
	for i := range p.code {
		if p.streams {
			p.ahead(i, at+n)
		}
		in := &p.code[i]
		if in.d >= 0 && p.register[in.d] >= 0 {
			slots[in.d] = s.registers[p.register[in.d]*size:][:n]
		}
		switch in.code {
		case opUnary:
			in.unary(get(in.d), get(in.arg[0]))
		case opBinary:
			in.binary(get(in.d), get(in.arg[0]), get(in.arg[1]))
		case opSelect, opMulAdd:
			in.ternary(get(in.d), get(in.arg[0]), get(in.arg[1]), get(in.arg[2]))
		case opAdam:
			in.adam.run(p.set, &s.adam, in, slots, n)
		case opLoad:
			p.load(get(in.d), &in.load, r0, r1, c0, w)
		case opFold:
			p.fold(s, in.fold, get(in.arg[0]), r0, r1, c0, w, own)
		case opRow:
			p.row(in, slots, r0, r1)
		}
	}
}

// ahead asks for a part of the next block, which begins at an element: what instruction i is to wait for.
func (p *program) ahead(i, at int) {
	n := min(p.blockRows*p.blockCols, p.rows*p.cols-at)
	lines := (n + 15) / 16
	from, to := lines*i/len(p.code), lines*(i+1)/len(p.code)
	if to <= from {
		return
	}
	for k := range p.whole {
		o := &p.whole[k]
		prefetch(&o.base.buf[o.off+at+16*from], to-from)
	}
	for k := range p.results {
		prefetch(&p.results[k].v.buf[at+16*from], to-from)
	}
}

func (p *program) row(in *instr, slots [][]float32, r0, r1 int) {
	arg := func(i int) []float32 {
		a := &in.rowArgs[i]
		if a.slot >= 0 {
			return slots[a.slot][:r1-r0]
		}
		return a.base.buf[a.off+r0 : a.off+r1]
	}
	d := in.row.buf[r0:r1]
	switch {
	case in.unary != nil:
		in.unary(d, arg(0))
	case in.binary != nil:
		in.binary(d, arg(0), arg(1))
	default:
		in.ternary(d, arg(0), arg(1), arg(2))
	}
}

// cursor walks over the rows of a strided operand.
type cursor struct {
	dims, str []int
	i         [maxAxes]int
	off       int
}

// seek goes to a row. The dimensions are the loop's, without the last.
func (c *cursor) seek(dims, str []int, row int) {
	c.dims, c.str, c.off = dims, str, 0
	for k := len(str) - 1; k >= 0; k-- {
		c.i[k] = row % dims[k]
		row /= dims[k]
		c.off += c.i[k] * str[k]
	}
}

func (c *cursor) next() {
	for k := len(c.str) - 1; k >= 0; k-- {
		c.i[k]++
		c.off += c.str[k]
		if c.i[k] < c.dims[k] {
			return
		}
		c.off -= c.i[k] * c.str[k]
		c.i[k] = 0
	}
}

// load reads a strided operand into d.
func (p *program) load(d []float32, o *operand, r0, r1, c0, w int) {
	src := o.base.buf
	if o.last == 0 && len(o.str) == 1 && o.str[0] == 1 && r1-r0 > 1 {
		p.set.FillRows(d, src[o.off+r0:o.off+r1], w)
		return
	}
	var c cursor
	c.seek(p.dims, o.str, r0)
	for range r1 - r0 {
		row := d[:w]
		d = d[w:]
		from := o.off + c.off + c0*o.last
		switch o.last {
		case 0:
			fill(row, src[from])
		case 1:
			copy(row, src[from:from+w])
		default:
			for i := range row {
				row[i] = src[from]
				from += o.last
			}
		}
		c.next()
	}
}

// fold gathers a block into a reduction.
func (p *program) fold(s *loopSpace, f *folding, x []float32, r0, r1, c0, w int, own []float32) {
	if f.byRow {
		foldRows(p.set, f, f.v.buf[r0:r1], x, w)
		return
	}
	out := f.target(own)
	var c cursor
	c.seek(p.dims, f.str, r0)
	if f.last == 0 {
		t := s.temp[:r1-r0]
		foldRows(p.set, f, t, x, w)
		for _, v := range t {
			out[c.off] = f.op.join(out[c.off], v)
			c.next()
		}
		return
	}
	if f.toRow && w == p.cols {
		p.set.SumCols(out[c.off:c.off+w], x)
		return
	}
	for range r1 - r0 {
		row := x[:w]
		x = x[w:]
		at := c.off + c0*f.last
		if f.last == 1 {
			q := out[at : at+w]
			f.join(q, q, row)
		} else {
			for _, v := range row {
				out[at] = f.op.join(out[at], v)
				at += f.last
			}
		}
		c.next()
	}
}

func foldRows(set *kernel.Set, f *folding, d, x []float32, w int) {
	switch f.op {
	case foldSum:
		set.SumRows(d, x, w)
	case foldMax:
		set.MaxRows(d, x, w)
	default:
		for r := range d {
			a := foldStart[f.op]
			for _, v := range x[r*w : r*w+w] {
				a = f.op.join(a, v)
			}
			d[r] = a
		}
	}
}

func (o foldOp) join(a, b float32) float32 {
	switch o {
	case foldMax:
		return max(a, b)
	case foldMin:
		return min(a, b)
	case foldProduct:
		return a * b
	}
	return a + b
}

package native

import (
	"fmt"
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
	// pace counts, for each instruction, the parts of those before it, and at the end all: as many shares of the next block's
	// memory are asked for.
	pace []int

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
	// inverse is set if all that the loop does with the operand, one element for each row, is to divide by it.
	inverse bool
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
	inverse bool // a division by an operand that may have been inverted
	parts   int  // a function that takes long is computed in so many parts, and memory is asked for before each
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
	c.pace = []int{0}
	for i := range c.code {
		in := &c.code[i]
		in.parts = 1
		if c.streams && in.code == opUnary && !quick[in.apply.unary] {
			in.parts = 4
		}
		c.pace = append(c.pace, c.pace[i]+in.parts)
	}
	return c.program, nil
}

// quick are the functions that take about as long as to read their argument.
var quick = map[kernel.UnaryOp]bool{
	kernel.Copy: true, kernel.Neg: true, kernel.Abs: true, kernel.Square: true, kernel.Sign: true, kernel.Floor: true,
	kernel.Ceil: true, kernel.Round: true, kernel.Not: true, kernel.IsNaN: true, kernel.IsFinite: true,
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
	c.divisors()
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

// divisors marks the operands of one element for each row that the loop only divides by. A multiplication by the inverse is
// several times as fast, and the inverse is worth having for long rows.
func (c *loopCompiler) divisors() {
	only := map[int]bool{} // slots that no instruction does anything else with
	for i := range c.code {
		in := &c.code[i]
		if in.code == opAdam { // it names more slots
			return
		}
		divides := in.code == opBinary && in.apply.binary == kernel.Div
		for j, a := range in.arg {
			if a >= 0 && in.code != opNone {
				other, seen := only[a]
				only[a] = divides && j == 1 && (other || !seen)
			}
		}
	}
	for _, in := range c.code {
		for _, a := range in.rowArgs {
			if in.code == opRow && a.slot >= 0 {
				only[a.slot] = false
			}
		}
	}
	mark := func(o *operand) {
		o.inverse = o.last == 0 && c.cols >= minInverse && only[o.slot]
		for i := range c.code {
			if in := &c.code[i]; o.inverse && in.code == opBinary && in.arg[1] == o.slot {
				in.inverse = true
			}
		}
	}
	for i := range c.fixed {
		mark(&c.fixed[i])
	}
	for _, o := range c.loads {
		mark(o)
	}
}

// minInverse is the length of the rows whose divisors are inverted.
const minInverse = 32

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

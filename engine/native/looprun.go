package native

import (
	"math"

	"github.com/lathe-ml/lathe/engine/kernel"
)

// Running a fused loop: chunk by chunk, block by block, instruction by instruction.

// loopSpace is a worker's memory for loops.
type loopSpace struct {
	registers []float32
	slots     [][]float32
	inverted  []bool // slots that hold the inverse of their operand
	temp      []float32
	streams   [][]float32 // what a loop asks for ahead
	adam      kernel.Adam
	_         [64]byte
}

func (s *loopSpace) grow(p *program) {
	n := p.blockRows * p.blockCols
	if len(s.registers) < n*p.registers {
		s.registers = aligned(n * p.registers)
	}
	if len(s.slots) < p.slots {
		s.slots, s.inverted = make([][]float32, p.slots), make([]bool, p.slots)
	}
	if len(s.temp) < n {
		s.temp = aligned(n)
	}
	if n := len(p.whole) + len(p.results); p.streams && cap(s.streams) < n {
		s.streams = make([][]float32, 0, n)
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
			v := s.temp[:1]
			v[0] = o.base.buf[o.off]
			if o.inverse {
				v[0], s.inverted[o.slot] = inverse(v[0])
			}
			p.set.FillRows(d, v, len(d))
			continue
		}
		for d = d[:min(size, (to-from)*p.cols)]; len(d) > 0; d = d[p.cols:] {
			copy(d[:p.cols], o.base.buf[o.off:])
		}
	}
	if p.streams {
		p.streamed(s)
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
		in := &p.code[i]
		if p.streams && in.parts == 1 {
			p.ahead(s, p.pace[i], at+n)
		}
		if in.d >= 0 && p.register[in.d] >= 0 {
			slots[in.d] = s.registers[p.register[in.d]*size:][:n]
		}
		switch in.code {
		case opUnary:
			if in.parts == 1 {
				in.unary(get(in.d), get(in.arg[0]))
				break
			}
			d, x := get(in.d), get(in.arg[0])
			for k := range in.parts {
				p.ahead(s, p.pace[i]+k, at+n)
				lo, hi := n*k/in.parts&^15, n*(k+1)/in.parts&^15
				if k+1 == in.parts {
					hi = n
				}
				in.unary(d[lo:hi], x[lo:hi])
			}
		case opBinary:
			if in.inverse && s.inverted[in.arg[1]] {
				p.set.Binary[kernel.Mul](get(in.d), get(in.arg[0]), get(in.arg[1]))
				break
			}
			in.binary(get(in.d), get(in.arg[0]), get(in.arg[1]))
		case opSelect, opMulAdd:
			in.ternary(get(in.d), get(in.arg[0]), get(in.arg[1]), get(in.arg[2]))
		case opAdam:
			in.adam.run(p.set, &s.adam, in, slots, n)
		case opLoad:
			if in.load.inverse {
				s.inverted[in.d] = p.invert(s.temp[:r1-r0], &in.load, r0)
				if s.inverted[in.d] {
					p.set.FillRows(get(in.d), s.temp[:r1-r0], w)
					break
				}
			}
			slots[in.d] = p.load(get(in.d), &in.load, r0, r1, c0, w)
		case opFold:
			p.fold(s, in.fold, get(in.arg[0]), r0, r1, c0, w, own)
		case opRow:
			p.row(in, slots, r0, r1)
		}
	}
}

// streamed gathers the memory that the loop runs through: its operands in order and its results, each once.
func (p *program) streamed(s *loopSpace) {
	s.streams = s.streams[:0]
	add := func(x []float32) {
		for _, y := range s.streams {
			if &x[0] == &y[0] {
				return
			}
		}
		s.streams = append(s.streams, x)
	}
	for i := range p.whole {
		add(p.whole[i].base.buf[p.whole[i].off:])
	}
	for i := range p.results {
		add(p.results[i].v.buf)
	}
}

// ahead asks for a part of the next block, which begins at an element: part i of as many as the pace has.
func (p *program) ahead(s *loopSpace, i, at int) {
	lines := (min(p.blockRows*p.blockCols, p.rows*p.cols-at) + 15) / 16
	parts := p.pace[len(p.code)]
	from, to := lines*i/parts, lines*(i+1)/parts
	if to <= from {
		return
	}
	for _, x := range s.streams {
		kernel.Prefetch(&x[at+16*from], to-from)
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

// rowSet are rows that begin at constant distances along the two innermost axes: outer times inner of them.
type rowSet struct {
	outer, inner         int
	outerStep, innerStep int
}

func (t rowSet) rows() int { return t.outer * t.inner }

// sideBySide says whether rows of w elements follow each other in memory.
func (t rowSet) sideBySide(w int) bool {
	return (t.inner == 1 || t.innerStep == w) && (t.outer == 1 || t.outerStep == t.inner*w)
}

// ahead is what follows, most rows at most.
func (c *cursor) ahead(most int) rowSet {
	k := len(c.str) - 1
	if k < 0 {
		return rowSet{1, 1, 0, 0}
	}
	if k > 0 && c.i[k] == 0 && most >= c.dims[k] {
		return rowSet{min(most/c.dims[k], c.dims[k-1]-c.i[k-1]), c.dims[k], c.str[k-1], c.str[k]}
	}
	return rowSet{1, min(most, c.dims[k]-c.i[k]), 0, c.str[k]}
}

// skip goes behind what ahead returned.
func (c *cursor) skip(t rowSet) {
	if k := len(c.str) - 1; k >= 0 {
		c.i[k] += t.inner - 1
		c.off += (t.inner - 1) * t.innerStep
		if t.outer > 1 {
			c.i[k-1] += t.outer - 1
			c.off += (t.outer - 1) * t.outerStep
		}
	}
	c.next()
}

// load reads a strided operand into block, and returns it. What lies side by side is returned where it is.
func (p *program) load(block []float32, o *operand, r0, r1, c0, w int) []float32 {
	d, src := block, o.base.buf
	var c cursor
	c.seek(p.dims, o.str, r0)
	for r := r0; r < r1; {
		t := c.ahead(r1 - r)
		from := o.off + c.off + c0*o.last
		if o.last == 1 && t.rows() == r1-r0 && t.sideBySide(w) {
			return src[from:][:len(block)]
		}
		rows := d[:t.rows()*w]
		switch o.last {
		case 0:
			p.repeatRows(rows, src, from, w, t)
		case 1:
			copyRows(rows, src, from, w, t)
		default:
			spreadRows(rows, src, from, w, o.last, t)
		}
		d = d[len(rows):]
		r += t.rows()
		c.skip(t)
	}
	return block
}

// invert writes the inverse of an operand of one element for each row, from row r0 on. It is false if a product with one of them
// might be far from the quotient.
func (p *program) invert(rows []float32, o *operand, r0 int) bool {
	var c cursor
	c.seek(p.dims, o.str, r0)
	for i := range rows {
		var ok bool
		if rows[i], ok = inverse(o.base.buf[o.off+c.off]); !ok {
			return false
		}
		c.next()
	}
	return true
}

// inverse returns 1/x, or x and false if x or 1/x is zero, subnormal or infinite.
func inverse(x float32) (float32, bool) {
	const smallest, largest = 0x1p-126, 0x1p126
	if a := math.Abs(float64(x)); a >= smallest && a <= largest {
		return 1 / x, true
	}
	return x, false
}

// repeatRows writes rows of w equal elements, each the element of src where the row begins.
func (p *program) repeatRows(dst, src []float32, from, w int, t rowSet) {
	for range t.outer {
		rows := dst[:t.inner*w]
		switch {
		case t.innerStep == 1:
			p.set.FillRows(rows, src[from:from+t.inner], w)
		case t.innerStep == 0:
			p.set.FillRows(rows, src[from:from+1], len(rows))
		default:
			at := from
			for ; len(rows) > 0; rows = rows[w:] {
				if w < 8 {
					fill(rows[:w], src[at])
				} else {
					p.set.FillRows(rows[:w], src[at:at+1], w)
				}
				at += t.innerStep
			}
		}
		dst = dst[t.inner*w:]
		from += t.outerStep
	}
}

// spreadRows writes rows of w elements that lie step apart in src.
func spreadRows(dst, src []float32, from, w, step int, t rowSet) {
	for range t.outer {
		start := from
		for range t.inner {
			at := start
			for i := range dst[:w] {
				dst[i] = src[at]
				at += step
			}
			dst = dst[w:]
			start += t.innerStep
		}
		from += t.outerStep
	}
}

// copyRows copies rows of w elements, the first at from in src, one after the other to dst. Short rows, as of a few
// channels, are moved without calls.
func copyRows(dst, src []float32, from, w int, t rowSet) {
	if t.sideBySide(w) {
		copy(dst, src[from:from+len(dst)])
		return
	}
	short := w%8 == 0 && w <= 64
	for range t.outer {
		at := from
		for range t.inner {
			row, to := src[at:at+w], dst[:w]
			if short {
				for j := 0; j+8 <= len(row) && j+8 <= len(to); j += 8 {
					*(*[8]float32)(to[j:]) = *(*[8]float32)(row[j:])
				}
			} else {
				copy(to, row)
			}
			dst = dst[w:]
			at += t.innerStep
		}
		from += t.outerStep
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
	for r := r0; r < r1; {
		t := c.ahead(r1 - r)
		from := c.off + c0*f.last
		if wide := t.inner * w; f.last == 1 && f.op == foldSum && t.innerStep == w && t.outerStep == 0 { // rows that lie side by side make one
			p.set.SumCols(out[from:from+wide], x[:t.outer*wide])
			x = x[t.outer*wide:]
			r += t.rows()
			c.skip(t)
			continue
		}
		for range t.outer {
			at := from
			if f.last == 1 && t.innerStep == 0 && f.op == foldSum { // rows that fall on one
				p.set.SumCols(out[at:at+w], x[:t.inner*w])
				x = x[t.inner*w:]
			} else {
				for range t.inner {
					f.put(out, at, x[:w])
					x = x[w:]
					at += t.innerStep
				}
			}
			from += t.outerStep
		}
		r += t.rows()
		c.skip(t)
	}
}

// put gathers a row into the result from an element on.
func (f *folding) put(out []float32, at int, row []float32) {
	if f.last == 1 {
		q := out[at : at+len(row)]
		f.join(q, q, row)
		return
	}
	for _, v := range row {
		out[at] = f.op.join(out[at], v)
		at += f.last
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

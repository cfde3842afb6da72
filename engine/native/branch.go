package native

import (
	"reflect"
	"slices"
	"sort"

	"github.com/gomlx/compute"
	"github.com/gomlx/compute/dtypes"
)

// Loops, branches and sorts. Their closures are plans of their own, whose parameters and results are bound to the memory
// that has them: nothing is copied to call one.

// slot is the memory of a value: of float32, or of another type.
type slot struct {
	buf  []float32
	flat any
}

func (v *value) slot() slot { return slot{v.buf, v.flat} }

func (s slot) copy(from slot) {
	if s.flat != nil {
		reflect.Copy(reflect.ValueOf(s.flat), reflect.ValueOf(from.flat))
		return
	}
	copy(s.buf, from.buf)
}

func newSlot(v *value) slot {
	if v.isForeign() {
		return slot{flat: typed(v.dtype).cast(aligned(v.words()), size(v.dims))}
	}
	return slot{buf: aligned(size(v.dims))}
}

// closure plans a closure. It returns nil for one that cannot be planned.
func (p *plan) closure(f *Function, outer []*node) *executable {
	x, err := planFunction(p.b, f, outer...)
	if err != nil {
		panic(err) // planning the whole fails
	}
	if x != nil {
		p.inner = append(p.inner, x)
	}
	return x
}

// solid returns a value whose elements lie in order and fill their memory, as closures want them.
func (p *plan) solid(n *node) *value {
	v := p.values[n]
	switch {
	case !v.isForeign() && n.shape.DType == dtypes.Bool:
		return p.toBool(v, n)
	case v.isForeign() && v.kind == kindView:
		return p.copyTyped(v)
	case v.kind == kindView:
		return p.copyOf(v.view)
	}
	return v
}

func (p *plan) solids(nodes []*node) (v []*value) {
	for _, n := range nodes {
		v = append(v, p.solid(n))
	}
	return v
}

func wholeViews(values ...*value) (v []view) {
	for _, x := range values {
		v = append(v, x.view)
	}
	return v
}

// bind makes memory a parameter of the closure.
func (x *executable) bind(i int, s slot) {
	v := x.params[i]
	v.buf, v.flat = s.buf, s.flat
}

// runInto runs the closure with its results in the memory given.
func (x *executable) runInto(to []slot) error {
	x.bindMemory()
	for i, v := range x.p.outs {
		if v.group >= 0 && v.kind != kindForeign {
			v.buf, v.flat = to[i].buf, to[i].flat
		}
	}
	if err := x.run(); err != nil {
		return err
	}
	for i, v := range x.p.outs {
		if v.group >= 0 && v.kind != kindForeign || v.given && same(v.slot(), to[i]) {
			continue
		}
		to[i].copy(v.slot())
	}
	for i, v := range x.p.outs {
		if v.kind == kindForeign && v.group >= 0 && !slices.Contains(x.p.outs[:i], v) {
			if err := v.foreign.Finalize(); err != nil {
				return err
			}
			v.foreign, v.flat = nil, nil
		}
	}
	return nil
}

// same says whether two slots are the same memory.
func same(a, b slot) bool {
	if a.flat != nil {
		return reflect.ValueOf(a.flat).Pointer() == reflect.ValueOf(b.flat).Pointer()
	}
	return len(a.buf) > 0 && len(b.buf) > 0 && &a.buf[0] == &b.buf[0]
}

// whileStep runs a body as long as a condition holds. Each value of the state lies in the step's result, or, where the
// body does not write it in place, there and in a spare by turns.
type whileStep struct {
	state, outer []*value
	cond, body   *executable
	out          []*value

	now, next, spare []slot
	pred             []slot
	holds            []bool
	inPlace          []bool
}

func (p *plan) while(c *call) stepInto {
	a := c.attr.(closures)
	s := &whileStep{cond: p.closure(a.fns[0], a.outer), body: p.closure(a.fns[1], a.outer)}
	if s.cond == nil || s.body == nil {
		return nil
	}
	state := len(c.in) - len(a.outer)
	s.state, s.outer = p.solids(c.in[:state]), p.solids(c.in[state:])
	for i, v := range s.body.p.outs {
		b := s.body.p.reuse[v]
		s.inPlace = append(s.inPlace, v.given && v.param == i || b != nil && b.param == i)
	}
	return s
}

func (s *whileStep) into(out []*value) { s.out = out }
func (s *whileStep) reads() []view     { return wholeViews(slices.Concat(s.state, s.outer)...) }
func (s *whileStep) prepare(*executable) {
	n := len(s.state)
	s.now, s.next, s.spare = make([]slot, n), make([]slot, n), make([]slot, n)
	for i, v := range s.out {
		if !s.inPlace[i] {
			s.spare[i] = newSlot(v)
		}
	}
	s.holds = make([]bool, 1)
	s.pred = []slot{{flat: s.holds}}
}

func (s *whileStep) run(*executable, []float32) {
	for i, v := range s.out {
		s.now[i] = v.slot()
		s.now[i].copy(s.state[i].slot())
	}
	for i, v := range s.outer {
		s.cond.bind(len(s.state)+i, v.slot())
		s.body.bind(len(s.state)+i, v.slot())
	}
	for {
		for i, m := range s.now {
			s.cond.bind(i, m)
			s.body.bind(i, m)
		}
		check(s.cond.runInto(s.pred))
		if !s.holds[0] {
			break
		}
		for i, m := range s.now {
			switch {
			case s.inPlace[i]:
				s.next[i] = m
			case same(m, s.out[i].slot()):
				s.next[i] = s.spare[i]
			default:
				s.next[i] = s.out[i].slot()
			}
		}
		check(s.body.runInto(s.next))
		s.now, s.next = s.next, s.now
	}
	for i, v := range s.out {
		if m := v.slot(); !same(m, s.now[i]) {
			m.copy(s.now[i])
		}
	}
}

// check turns an error of a closure into a panic, which becomes the error of the whole run.
func check(err error) {
	if err != nil {
		panic(err)
	}
}

// ifStep runs one of two closures.
type ifStep struct {
	pred    *value
	outer   []*value
	yes, no *executable
	out     []*value
	to      []slot
}

func (p *plan) branch(c *call) stepInto {
	a := c.attr.(closures)
	s := &ifStep{yes: p.closure(a.fns[0], a.outer), no: p.closure(a.fns[1], a.outer)}
	if s.yes == nil || s.no == nil {
		return nil
	}
	s.pred, s.outer = p.solid(c.in[0]), p.solids(c.in[1:])
	return s
}

func (s *ifStep) into(out []*value)   { s.out, s.to = out, make([]slot, len(out)) }
func (s *ifStep) reads() []view       { return wholeViews(append([]*value{s.pred}, s.outer...)...) }
func (s *ifStep) prepare(*executable) {}
func (s *ifStep) run(*executable, []float32) {
	x := s.no
	if flat[bool](s.pred)[0] {
		x = s.yes
	}
	for i, v := range s.outer {
		x.bind(i, v.slot())
	}
	for i, v := range s.out {
		s.to[i] = v.slot()
	}
	check(x.runInto(s.to))
}

// sortStep sorts several values alike along an axis. The usual comparators, of one value by one operation, are functions
// of Go; others are closures that run for every comparison.
type sortStep struct {
	in, outer []*value
	axis      int
	stable    bool
	out       []*value

	key  int
	op   compute.OpType // of the usual comparators, else invalid
	less func(i, j int) bool

	comparator *executable
	pair       []slot // its operands
	holds      []bool
	result     []slot
	perm       []int
	at, str    int // of the row that is sorted
}

func (p *plan) sort(c *call) stepInto {
	a := c.attr.(closures)
	s := &sortStep{axis: a.axis, stable: a.stable, key: -1}
	n := len(c.in) - len(a.outer)
	f := a.fns[0]
	if last := f.out[0].call; f.out[0].fn == f && len(last.in) == 2 {
		k := slices.Index(f.params, last.in[0])
		if t := typed(c.in[max(0, k/2)].shape.DType); k >= 0 && k%2 == 0 && last.in[1] == f.params[k+1] && t.less != nil {
			switch last.op {
			case compute.OpTypeLessThan, compute.OpTypeLessOrEqual, compute.OpTypeGreaterThan, compute.OpTypeGreaterOrEqual:
				s.key, s.op = k/2, last.op
			}
		}
	}
	if s.key < 0 {
		if s.comparator = p.closure(f, a.outer); s.comparator == nil {
			return nil
		}
		s.outer = p.solids(c.in[n:])
	}
	s.in = p.solids(c.in[:n])
	return s
}

func (s *sortStep) into(out []*value) { s.out = out }
func (s *sortStep) reads() []view     { return wholeViews(slices.Concat(s.in, s.outer)...) }
func (s *sortStep) prepare(*executable) {
	dims := s.in[0].dims
	s.perm, s.str = make([]int, dims[s.axis]), size(dims[s.axis+1:])
	if s.comparator == nil {
		return
	}
	for _, q := range s.comparator.params[:2*len(s.in)] {
		s.pair = append(s.pair, newSlot(q))
	}
	s.holds = make([]bool, 1)
	s.result = []slot{{flat: s.holds}}
	s.less = s.compare
}

// compare asks the comparator.
func (s *sortStep) compare(i, j int) bool {
	for k, v := range s.in {
		for side, e := range [2]int{i, j} {
			v.copyElement(s.pair[2*k+side], s.at+e*s.str)
		}
	}
	check(s.comparator.runInto(s.result))
	return s.holds[0]
}

// copyElement copies one element into memory of its own.
func (v *value) copyElement(to slot, i int) {
	if to.flat == nil {
		to.buf[0] = v.buf[i]
		return
	}
	n := v.elementSize()
	copy(bytesOf(to.flat), v.bytes()[i*n:][:n])
}

func (s *sortStep) run(*executable, []float32) {
	for i, m := range s.pair {
		s.comparator.bind(i, m)
	}
	for i, v := range s.outer {
		s.comparator.bind(len(s.pair)+i, v.slot())
	}
	n := len(s.perm)
	for row := range size(s.in[0].dims) / max(1, n) {
		s.at = row/s.str*n*s.str + row%s.str
		for i := range s.perm {
			s.perm[i] = i
		}
		if s.comparator == nil {
			v := s.in[s.key]
			t := typed(dtypes.Float32)
			if v.isForeign() {
				t = typed(v.dtype)
			}
			s.less = t.less(s.op, v.view, s.at, s.str)
		}
		if s.stable {
			sort.Stable((*permutation)(s))
		} else {
			sort.Sort((*permutation)(s))
		}
		for k, v := range s.out {
			t := typed(dtypes.Float32)
			if v.isForeign() {
				t = typed(v.dtype)
			}
			t.permute(v, s.in[k], s.at, s.str, s.perm)
		}
	}
}

// permutation sorts the places of a row.
type permutation sortStep

func (s *permutation) Len() int           { return len(s.perm) }
func (s *permutation) Less(i, j int) bool { return s.less(s.perm[i], s.perm[j]) }
func (s *permutation) Swap(i, j int)      { s.perm[i], s.perm[j] = s.perm[j], s.perm[i] }

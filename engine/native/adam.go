package native

import (
	"slices"

	"github.com/lathe-ml/lathe/engine/kernel"
)

// adamStep is the slots of a step of AdamW; the instruction's operands are w, m, v and the gradient, its result the new
// w.
type adamStep struct {
	m2, v2                  int // results
	beta1, grad1, bias1     int // constants
	beta2, grad2, bias2     int
	eps, rate, decay        int // decay is -1 if there is none
	weights, m, v, gradient int
}

// run computes n elements. c is the worker's.
func (a *adamStep) run(set *kernel.Set, c *kernel.Adam, in *instr, slots [][]float32, n int) {
	*c = kernel.Adam{
		Beta1: slots[a.beta1][0], Grad1: slots[a.grad1][0], Bias1: slots[a.bias1][0],
		Beta2: slots[a.beta2][0], Grad2: slots[a.grad2][0], Bias2: slots[a.bias2][0],
		Eps: slots[a.eps][0], Rate: slots[a.rate][0],
	}
	if a.decay >= 0 {
		c.Decay, c.Decayed = slots[a.decay][0], true
	}
	set.Adam(slots[in.d][:n], slots[a.m2][:n], slots[a.v2][:n],
		slots[in.arg[0]][:n], slots[in.arg[1]][:n], slots[in.arg[2]][:n], slots[in.arg[3]][:n], c)
}

// fuseAdam makes one instruction of the dozen that AdamW consists of, as learn/optim writes it, with the same result to
// the last bit: weights, moments and gradients are more than the caches hold, and are then read and written once.
func (c *loopCompiler) fuseAdam(x *executable) {
	m := c.matcher()
	for i := range c.code {
		a, members := m.adam(i)
		if a == nil || c.overwritten(x, a, i) {
			continue
		}
		d := c.code[i].d
		for _, k := range members {
			c.code[k] = instr{code: opNone, d: -1, arg: slotsOf()}
		}
		c.code[i] = instr{code: opAdam, d: d, arg: slotsOf(a.weights, a.m, a.v, a.gradient), adam: a}
	}
}

// overwritten says whether any result of the loop but the step's own is written over one of its operands. Their last
// reader was another instruction when places were given out.
func (c *loopCompiler) overwritten(x *executable, a *adamStep, at int) bool {
	own := []int{a.m2, a.v2, c.code[at].d}
	for _, o := range c.loads {
		if !slices.Contains([]int{a.weights, a.m, a.v, a.gradient}, o.slot) {
			continue
		}
		for _, r := range c.results {
			same := x.p.reuse[r.v] == o.base || x.inArena(r.v) && x.inArena(o.base) && r.v.place == o.base.place
			if same && !slices.Contains(own, r.slot) {
				return true
			}
		}
	}
	return false
}

// matcher finds patterns among a loop's instructions.
type matcher struct {
	code    []instr
	maker   map[int]int  // instruction of a slot
	readers map[int]int  // how many operands a slot is
	stored  map[int]bool // slots that are memory
	scalar  map[int]bool // slots that hold one number
	members []int        // instructions of the pattern
	ok      bool
}

func (c *loopCompiler) matcher() *matcher {
	m := &matcher{code: c.code, maker: map[int]int{}, readers: map[int]int{}, stored: map[int]bool{}, scalar: map[int]bool{}}
	for i, in := range c.code {
		if in.code == opNone {
			continue
		}
		if in.d >= 0 {
			m.maker[in.d] = i
		}
		for _, s := range in.arg {
			m.readers[s]++
		}
		for _, a := range in.rowArgs {
			m.readers[a.slot]++
		}
	}
	for _, r := range c.results {
		m.stored[r.slot] = true
	}
	for _, o := range c.loads {
		m.scalar[o.slot] = !slices.ContainsFunc(o.str, func(s int) bool { return s != 0 })
	}
	return m
}

// take returns the operands of the instruction that makes a slot for a single reader, and counts it as a member.
func (m *matcher) take(slot int, stored bool, is func(in *instr) bool) slots {
	i, ok := m.maker[slot]
	if !ok || m.readers[slot] != 1 || m.stored[slot] != stored || !is(&m.code[i]) {
		m.ok = false
		return slotsOf()
	}
	m.members = append(m.members, i)
	return m.code[i].arg
}

func (m *matcher) binary(slot int, op kernel.BinaryOp) (a, b int) {
	q := m.take(slot, false, func(in *instr) bool { return in.code == opBinary && in.apply.binary == op })
	return q[0], q[1]
}

// with is a binary function whose second operand is a number.
func (m *matcher) with(slot int, op kernel.BinaryOp) (a, number int) {
	a, number = m.binary(slot, op)
	m.ok = m.ok && m.scalar[number]
	return a, number
}

// moment is old*beta + x*weight, stored.
func (m *matcher) moment(slot int) (old, beta, x, weight int) {
	q := m.take(slot, true, func(in *instr) bool { return in.code == opMulAdd })
	m.ok = m.ok && m.scalar[q[1]]
	x, weight = m.with(q[2], kernel.Mul)
	return q[0], q[1], x, weight
}

// adam matches w - m/bias1 / (sqrt(v/bias2) + eps) * rate that ends with instruction i, or returns nil.
func (m *matcher) adam(i int) (*adamStep, []int) {
	end := &m.code[i]
	if end.code != opBinary || end.apply.binary != kernel.Sub {
		return nil, nil
	}
	a := &adamStep{weights: end.arg[0], decay: -1}
	m.members, m.ok = nil, true
	var d, q, root int
	d, a.rate = m.with(end.arg[1], kernel.Mul)
	if k, ok := m.maker[d]; ok && m.code[k].code == opMulAdd {
		s := m.take(d, false, func(*instr) bool { return true })
		m.ok = m.ok && s[0] == a.weights && m.scalar[s[1]]
		a.decay, d = s[1], s[2]
	}
	q, root = m.binary(d, kernel.Div)
	a.m2, a.bias1 = m.with(q, kernel.Div)
	root, a.eps = m.with(root, kernel.Add)
	q = m.take(root, false, func(in *instr) bool { return in.code == opUnary && in.apply.unary == kernel.Sqrt })[0]
	a.v2, a.bias2 = m.with(q, kernel.Div)
	a.m, a.beta1, a.gradient, a.grad1 = m.moment(a.m2)
	a.v, a.beta2, q, a.grad2 = m.moment(a.v2)
	x, y := m.binary(q, kernel.Mul)
	if !m.ok || x != a.gradient || y != a.gradient || slices.Contains([]int{a.weights, a.m, a.v, a.gradient}, -1) {
		return nil, nil
	}
	return a, m.members
}

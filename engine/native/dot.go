package native

import (
	"fmt"
	"slices"

	"github.com/lathe-ml/lathe/engine/kernel"
)

// dotPart is a product of two views.
type dotPart struct {
	a, b   view
	qa, qb kernel.Operand
	// packed is B, packed once for all products that use it, or nil.
	packed *value
	gemm   *kernel.Gemm
}

// dotStep is a sum of products of the same shape; most have one.
type dotStep struct {
	parts []dotPart
	// joined is the parts whose operands lie alike in the arena as one product, along the contraction, and others the
	// rest. It reads both operands at places in the arena.
	joined       *kernel.Gemm
	aBase, bBase int
	others       []dotPart
}

func (s *dotStep) reads() (v []view) {
	for _, q := range s.parts {
		v = append(v, q.a)
		if q.packed != nil {
			v = append(v, q.packed.view)
		} else {
			v = append(v, q.b)
		}
	}
	return v
}

func (s *dotStep) prepare(x *executable) {
	s.join(x)
	if s.joined != nil {
		x.space.Grow(s.joined)
	}
	for _, q := range s.others {
		x.space.Grow(q.gemm)
	}
}

func (s *dotStep) run(x *executable, out []float32) {
	if s.joined != nil {
		s.joined.Run(x.b.pool, x.space, x.arena[s.aBase:], x.arena[s.bBase:], out, false)
	}
	for i, q := range s.others {
		a, add := q.a.base.buf[q.a.low():], i > 0 || s.joined != nil
		if q.packed != nil {
			q.gemm.RunPacked(x.b.pool, x.space, a, q.packed.buf, out, add)
		} else {
			q.gemm.Run(x.b.pool, x.space, a, q.b.base.buf[q.b.low():], out, add)
		}
	}
}

// join makes one product of the parts whose operands lie alike in the arena, if there are several.
func (s *dotStep) join(x *executable) {
	var alike []dotPart
	s.joined, s.others = nil, nil
	for _, q := range s.parts {
		ok := q.packed == nil && x.inArena(q.a.base) && x.inArena(q.b.base) && len(q.qa.Batch) == 1
		if ok && len(alike) > 0 {
			ok = slices.Equal(q.qa.Rows, alike[0].qa.Rows) && slices.Equal(q.qb.Rows, alike[0].qb.Rows)
		}
		if ok {
			alike = append(alike, q)
		} else {
			s.others = append(s.others, q)
		}
	}
	if len(alike) < 2 {
		s.others = s.parts
		return
	}
	place := func(v view) int { return v.base.place + v.low() }
	s.aBase, s.bBase = place(alike[0].a), place(alike[0].b)
	for _, q := range alike {
		s.aBase, s.bBase = min(s.aBase, place(q.a)), min(s.bBase, place(q.b))
	}
	a := kernel.Operand{Batch: alike[0].qa.Batch, Rows: alike[0].qa.Rows}
	b := kernel.Operand{Batch: alike[0].qb.Batch, Rows: alike[0].qb.Rows}
	for _, q := range alike {
		for _, k := range q.qa.K {
			a.K = append(a.K, k+int32(place(q.a)-s.aBase))
		}
		for _, k := range q.qb.K {
			b.K = append(b.K, k+int32(place(q.b)-s.bBase))
		}
	}
	s.joined = kernel.NewGemm(x.b.set, a, b, []int32{0}, multiples(len(a.Rows), len(b.Rows)))
}

// dot plans a general product: C[batch, a's other axes, b's other axes].
func (p *plan) dot(a, b view, q dotAttr, dims []int) *value {
	ax, bx := rest(len(a.dims), q.lc, q.lb), rest(len(b.dims), q.rc, q.rb)
	part := dotPart{
		a: a, b: b,
		qa: kernel.Operand{Batch: a.offsets(q.lb), Rows: a.offsets(ax), K: a.offsets(q.lc)},
		qb: kernel.Operand{Batch: b.offsets(q.rb), Rows: b.offsets(bx), K: b.offsets(q.rc)},
	}
	m, n := len(part.qa.Rows), len(part.qb.Rows)
	part.gemm = kernel.NewGemm(p.b.set, part.qa, part.qb, multiples(len(part.qa.Batch), m*n), multiples(m, n))
	return p.add(&value{kind: kindStep, dims: dims, step: &dotStep{parts: []dotPart{part}}})
}

// multiples returns 0, s, 2s, ..., n of them.
func multiples(n, s int) []int32 {
	t := make([]int32, n)
	for i := range t {
		t[i] = int32(i * s)
	}
	return t
}

// sumProducts makes one step of a product that is only added to another, as gradients of weights are that a network
// uses several times: they are then summed while they are computed, where possible as one long product.
func (p *plan) sumProducts() {
	uses := p.countUses()
	for _, v := range p.order {
		if v.kind != kindElem || v.apply.args != 2 || v.apply.binary != kernel.Add {
			continue
		}
		var parts []dotPart
		for _, in := range v.in {
			b := in.view.base
			if s, ok := b.step.(*dotStep); ok && b.kind == kindStep && uses[b] == 1 && slices.Equal(in.view.dims, v.dims) {
				parts = append(parts, s.oriented(p.b.set, in.view)...)
			} else {
				parts = nil
				break
			}
		}
		if len(parts) >= 2 {
			v.kind, v.step, v.in = kindStep, &dotStep{parts: parts}, nil
		}
	}
}

// oriented returns the parts of a product such that its result lies in memory as a view of it has it: as it is, or
// transposed. It returns nil for other views.
func (s *dotStep) oriented(set *kernel.Set, v view) []dotPart {
	if v.whole() {
		return s.parts
	}
	q := s.parts[0]
	m, n := len(q.qa.Rows), len(q.qb.Rows)
	if len(q.qa.Batch) != 1 || v.off != 0 || v.size() != m*n {
		return nil
	}
	t, ok := view{v.base, 0, []int{n, m}, []int{1, n}}.reshape(v.dims)
	if !ok || !slices.Equal(t.str, v.str) {
		return nil
	}
	var parts []dotPart
	for _, q := range s.parts {
		parts = append(parts, dotPart{a: q.b, b: q.a, qa: q.qb, qb: q.qa, gemm: kernel.NewGemm(set, q.qb, q.qa, []int32{0}, multiples(n, m))})
	}
	return parts
}

// shareB packs an operand that several products with few rows read, as the weights of a recurrent network, only once.
func (p *plan) shareB() {
	type user struct {
		at   int
		part *dotPart
	}
	users := map[string][]user{}
	var keys []string
	for i, v := range p.order {
		s, ok := v.step.(*dotStep)
		if !ok || v.kind != kindStep || len(s.parts) != 1 {
			continue
		}
		q := &s.parts[0]
		if len(q.qa.Rows) > 128 || !q.gemm.Packable() {
			continue
		}
		key := fmt.Sprint(q.b.base.id, q.b.off, q.b.dims, q.b.str, len(q.qb.Rows), q.qb.Rows[len(q.qb.Rows)-1], q.qb.K[len(q.qb.K)-1])
		if users[key] == nil {
			keys = append(keys, key)
		}
		users[key] = append(users[key], user{i, q})
	}
	before := map[int][]*value{}
	for _, key := range keys {
		list := users[key]
		if len(list) < 3 {
			continue
		}
		q := list[0].part
		v := &value{id: -1, kind: kindStep, dims: []int{q.gemm.PackedSize()}, step: &packStep{b: q.b, gemm: q.gemm}}
		v.view = view{v, 0, v.dims, []int{1}}
		before[list[0].at] = append(before[list[0].at], v)
		for _, u := range list {
			u.part.packed = v
			u.part.gemm.UsePacked()
		}
	}
	if len(before) == 0 {
		return
	}
	var order []*value
	for i, v := range p.order {
		order = append(append(order, before[i]...), v)
	}
	p.order = order
}

// packStep packs an operand for several products.
type packStep struct {
	b    view
	gemm *kernel.Gemm
}

func (s *packStep) reads() []view       { return []view{s.b} }
func (s *packStep) prepare(*executable) {}
func (s *packStep) run(x *executable, out []float32) {
	s.gemm.Pack(x.b.pool, s.b.base.buf[s.b.low():], out)
}

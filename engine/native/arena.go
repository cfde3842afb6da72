package native

import (
	"slices"

	"github.com/lathe-ml/lathe/engine/kernel"
)

// allocate gives every stored value its place in one arena: the smallest gap that is free for as long as the value is
// needed. An elementwise result takes the place of an operand that dies with it. Outputs are not in the arena; p.reuse
// says which of them may be written over a parameter, if that is given away.
func (p *plan) allocate() {
	out := map[*value]bool{}
	for _, v := range p.outs {
		out[v] = true
	}
	begin, end := make([][]*value, len(p.groups)), make([][]*value, len(p.groups)+1)
	for _, v := range p.order {
		if v.group >= 0 && v.store && v.kind != kindForeign && !out[v] {
			begin[v.group] = append(begin[v.group], v)
			end[v.last] = append(end[v.last], v)
		}
	}
	type span struct{ at, n int }
	var free []span
	gone := map[*value]bool{} // overwritten
	top := 0
	for g := range p.groups {
		for _, v := range begin[g] {
			b := p.overwrite(v, func(b *value) bool {
				return b.group >= 0 && b.store && !out[b] && !b.isForeign() && !gone[b]
			})
			if b != nil {
				v.place, gone[b] = b.place, true
				continue
			}
			n, best := p.room(v), -1
			for i, f := range free {
				if f.n >= n && (best < 0 || f.n < free[best].n) {
					best = i
				}
			}
			switch {
			case best >= 0:
				v.place = free[best].at
				free[best].at += n
				free[best].n -= n
			case len(free) > 0 && free[len(free)-1].at+free[len(free)-1].n == top: // grow the last gap
				f := &free[len(free)-1]
				v.place = f.at
				top = f.at + n
				free = free[:len(free)-1]
			default:
				v.place = top
				top += n
			}
			v.place += p.guard()
		}
		for _, v := range end[g] {
			if gone[v] {
				continue
			}
			free = append(free, span{v.place - p.guard(), p.room(v)})
		}
		slices.SortFunc(free, func(a, b span) int { return a.at - b.at })
		joined := free[:0]
		for _, f := range free {
			if k := len(joined) - 1; k >= 0 && joined[k].at+joined[k].n == f.at {
				joined[k].n += f.n
			} else if f.n > 0 {
				joined = append(joined, f)
			}
		}
		free = joined
	}
	p.arena = top
	for _, v := range p.outs {
		if v.isForeign() {
			continue
		}
		if b := p.overwrite(v, func(b *value) bool { return b.kind == kindParam && !gone[b] && !out[b] }); b != nil {
			gone[b] = true
			p.reuse[v] = b
		}
	}
}

// overwrite returns an operand, direct or through other values of the loop, among those that allowed accepts, whose
// memory an elementwise value can take: it is read in order, for the last time in the value's loop, and not after the
// value is written.
func (p *plan) overwrite(v *value, allowed func(b *value) bool) *value {
	if v.kind != kindElem || v.row || v.group < 0 {
		return nil
	}
	members := p.groups[v.group].members
	at := slices.Index(members, v)
	n := size(v.dims)
	// when says at which member's turn member i reads its operands: a product may be merged into the sum that follows.
	when := func(i int) int {
		m := members[i]
		if m.kind == kindElem && m.apply.args == 2 && m.apply.binary == kernel.Mul && !m.store {
			for j := i + 1; j < len(members); j++ {
				if slices.ContainsFunc(members[j].reads(), func(r view) bool { return r.base == m }) {
					i = j
				}
			}
		}
		return i
	}
	// what the loop makes the value of, its own operands first
	var reads []view
	made := []*value{v}
	for i := 0; i < len(made); i++ {
		for _, r := range made[i].reads() {
			reads = append(reads, r)
			if r.base.group == v.group && !slices.Contains(made, r.base) {
				made = append(made, r.base)
			}
		}
	}
	for _, r := range reads {
		b := r.base
		if b.last != v.group || b.group == v.group || size(b.dims) != n || !r.whole() || !allowed(b) {
			continue
		}
		ok := true
		for i, m := range members {
			for _, q := range m.reads() {
				if q.base == b && (!q.whole() || m.row || when(i) > at) {
					ok = false
				}
			}
		}
		if ok {
			return b
		}
	}
	return nil
}

// words returns the memory of a value, in units of a float32.
func (v *value) words() int {
	if v.isForeign() {
		return (size(v.dims)*typed(v.dtype).size + 3) / 4
	}
	return size(v.dims)
}

// room returns the place that a value takes in the arena, in multiples of a cache line.
func (p *plan) room(v *value) int { return (max(1, v.words())+15)&^15 + 2*p.guard() }

// guard returns how many words lie before and behind a value to see whether somebody writes there: in tests.
func (p *plan) guard() int {
	if p.b.mem.watched != nil {
		return guardWords
	}
	return 0
}

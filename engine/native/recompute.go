package native

import (
	"slices"

	"github.com/lathe-ml/lathe/engine/kernel"
)

const (
	// A value is computed again where it is read if it has at least recomputeSize elements, so that writing and reading it
	// would leave the cache, and takes at most recomputeOps cheap functions.
	recomputeSize = 64 << 10
	recomputeOps  = 8
)

// recompute removes large values from memory that later loops can as well compute again, from what they read anyway or
// from one operand in the value's stead: what a rectifier passes, what it was given, normalised activations. The results
// of a training step's forward pass are mostly waiting for such readers.
func (p *plan) recompute() {
	if p.b.recomputeFrom == 0 {
		return
	}
	r := &recomputer{plan: p, readers: map[*value][]*value{}, out: map[*value]bool{}, dead: map[*value]bool{}}
	for _, v := range p.outs {
		r.out[v] = true
	}
	for _, v := range p.order {
		for _, q := range v.reads() {
			r.readers[q.base] = append(r.readers[q.base], v)
		}
	}
	// later values first, whose copies read earlier ones
	for i := len(p.order) - 1; i >= 0; i-- {
		r.value(p.order[i])
	}
	p.order = slices.DeleteFunc(p.order, func(v *value) bool { return r.dead[v] })
	for _, v := range r.added {
		if !r.dead[v] {
			p.order = append(p.order, v)
		}
	}
	r.closeGaps()
}

// closeGaps removes groups without members.
func (r *recomputer) closeGaps() {
	kept := r.groups[:0]
	for _, g := range r.groups {
		if len(g.members) == 0 {
			continue
		}
		for _, v := range g.members {
			v.group = len(kept)
		}
		kept = append(kept, g)
	}
	r.groups = kept
}

type recomputer struct {
	*plan
	readers map[*value][]*value // of each value; one that reads it twice is there twice
	out     map[*value]bool
	dead    map[*value]bool
	added   []*value
}

// cheap says whether a function takes no longer than reading its result.
func (a apply) cheap() bool {
	switch a.args {
	case 1:
		return slices.Contains([]kernel.UnaryOp{kernel.Copy, kernel.Neg, kernel.Abs, kernel.Sign, kernel.Not, kernel.Square}, a.unary)
	case 2:
		return a.binary != kernel.Div && a.binary != kernel.Pow && a.binary != kernel.Rem
	}
	return true
}

// again says whether a value is one that may be computed again.
func (r *recomputer) again(v *value) bool {
	return v.kind == kindElem && !v.row && v.group >= 0 && v.apply.cheap() && !r.dead[v]
}

// value treats one value.
func (r *recomputer) value(v *value) {
	if !r.again(v) || r.out[v] || size(v.dims) < r.b.recomputeFrom {
		return
	}
	var groups []int
	for _, w := range r.readers[v] {
		if w.group == v.group {
			continue
		}
		if !r.fits(v, w) {
			return
		}
		if !slices.Contains(groups, w.group) {
			groups = append(groups, w.group)
		}
	}
	for _, g := range groups {
		left := recomputeOps
		leaves, ok := r.leaves(v, &left, nil)
		if !ok || r.unread(leaves, g) > 1 {
			return
		}
	}
	for _, g := range groups {
		r.move(v, g)
	}
	r.drop(v)
}

// fits says whether w reads v element by element, in a loop that has room for more.
func (r *recomputer) fits(v, w *value) bool {
	if w.kind != kindElem && w.kind != kindReduce || w.row || !slices.Equal(w.space(), v.dims) || len(r.groups[w.group].members)+recomputeOps > 2*maxMembers {
		return false
	}
	return !slices.ContainsFunc(w.reads(), func(q view) bool { return q.base == v && (!q.whole() || !slices.Equal(q.dims, v.dims)) })
}

// leaves adds the operands as large as v that have to be read to compute it, or says that it would take too much.
func (r *recomputer) leaves(v *value, left *int, all []*value) ([]*value, bool) {
	if *left--; *left < 0 {
		return nil, false
	}
	for i := range v.in {
		u := v.operand(i).base
		switch {
		case size(u.dims) < size(v.dims): // a scalar, a row
		case r.stored(u):
			if !slices.Contains(all, u) {
				all = append(all, u)
			}
		case r.again(u) && v.operand(i).whole() && slices.Equal(u.dims, v.dims):
			var ok bool
			if all, ok = r.leaves(u, left, all); !ok {
				return nil, false
			}
		default:
			return nil, false
		}
	}
	return all, true
}

// stored says whether a value is in memory.
func (r *recomputer) stored(u *value) bool {
	return u.kind != kindElem || u.group < 0 || r.out[u] || slices.ContainsFunc(r.readers[u], func(w *value) bool { return w.group != u.group })
}

// unread counts the values that nothing in a group reads.
func (r *recomputer) unread(all []*value, g int) (n int) {
	for _, u := range all {
		if !slices.ContainsFunc(r.readers[u], func(w *value) bool { return w.group == g }) {
			n++
		}
	}
	return n
}

// move makes the readers of v in group g read a copy that the group computes.
func (r *recomputer) move(v *value, g int) {
	group := r.groups[g]
	at := slices.IndexFunc(group.members, func(w *value) bool { return slices.Contains(r.readers[v], w) })
	var fresh []*value
	clone := r.clone(v, g, &fresh)
	group.members = slices.Insert(group.members, at, fresh...)
	for _, w := range r.readers[v] {
		if w.group != g || slices.Contains(fresh, w) {
			continue
		}
		for i := range w.in {
			if w.in[i].view.base == v {
				w.in[i] = clone
				r.readers[clone] = append(r.readers[clone], w)
			}
		}
	}
	r.readers[v] = slices.DeleteFunc(r.readers[v], func(w *value) bool { return w.group == g })
}

// clone returns a copy of v for a group, with copies of the operands that are not in memory.
func (r *recomputer) clone(v *value, g int, fresh *[]*value) *value {
	c := &value{id: v.id, kind: kindElem, dims: v.dims, src: v.src, in: slices.Clone(v.in), apply: v.apply, group: g}
	c.view = view{c, 0, c.dims, rowMajor(c.dims)}
	for i := range c.in {
		if u := v.operand(i).base; size(u.dims) == size(v.dims) && !r.stored(u) {
			c.in[i] = r.clone(u, g, fresh)
		}
		u := c.in[i].view.base
		r.readers[u] = append(r.readers[u], c)
	}
	*fresh = append(*fresh, c)
	r.added = append(r.added, c)
	return c
}

// drop removes a value that nothing reads any more, and what only it read.
func (r *recomputer) drop(v *value) {
	if v.kind != kindElem || v.group < 0 || r.out[v] || len(r.readers[v]) > 0 || r.dead[v] {
		return
	}
	r.dead[v] = true
	g := r.groups[v.group]
	g.members = slices.DeleteFunc(g.members, func(w *value) bool { return w == v })
	for _, q := range v.reads() {
		r.readers[q.base] = slices.DeleteFunc(r.readers[q.base], func(w *value) bool { return w == v })
		r.drop(q.base)
	}
}

package native

import (
	"slices"

	"github.com/gomlx/compute"
)

// group is work that is done at once: a fused loop, one step, or a region of the portable backend.
type group struct {
	members []*value
	// loop: the iteration space, without axes of length 1, and, if rowLen is not 0, its last axis is a row: reductions
	// over exactly that axis are finished inside the loop, and their results, one for each row, are used there.
	space  []int
	rowLen int
	// prog is the compiled loop, region the compiled graph of the portable backend.
	prog   *program
	region *region
	kind   groupKind
}

type groupKind uint8

const (
	loopGroup groupKind = iota
	stepGroup
	regionGroup
)

const (
	maxMembers = 64   // of a loop
	maxRow     = 4096 // elements of a row that a loop keeps in cache
	lookBack   = 48   // groups that a value may join
)

// reads returns the views of memory that a value reads.
func (v *value) reads() (views []view) {
	switch v.kind {
	case kindElem, kindReduce:
		for i := range v.in {
			views = append(views, v.operand(i))
		}
	case kindStep, kindTyped:
		return v.step.reads()
	case kindForeign:
		for _, x := range v.in {
			views = append(views, x.view)
		}
	}
	return views
}

// space returns the dimensions that a value's loop runs over.
func (v *value) space() []int {
	if v.kind == kindReduce {
		return v.in[0].dims
	}
	return v.dims
}

// operand returns operand i, stretched to the dimensions that the loop runs over.
func (v *value) operand(i int) view {
	if v.kind == kindReduce {
		return v.in[i].view
	}
	return v.in[i].view.stretch(v.dims)
}

// schedule puts each value into a group: an earlier one that can take it, not before its operands' groups, or a new one.
func (p *plan) schedule() {
	for _, v := range p.order {
		if p.given(v) {
			v.group = -1
			continue
		}
		reads, need := v.reads(), 0
		for _, r := range reads {
			need = max(need, r.base.group)
		}
		if len(v.set) > 0 && v.set[0] != v {
			v.group = v.set[0].group
			p.groups[v.group].members = append(p.groups[v.group].members, v)
			continue
		}
		v.group = -1
		for g := len(p.groups) - 1; g >= max(need, len(p.groups)-lookBack); g-- {
			if p.groups[g].take(g, v, reads) {
				v.group = g
				break
			}
		}
		if v.group < 0 {
			v.group = len(p.groups)
			p.groups = append(p.groups, newGroup(v))
		}
	}
	p.recompute()
	p.live()
}

// given says whether a value is known before the first group: an input, or computed once from constants alone.
func (p *plan) given(v *value) bool {
	switch v.kind {
	case kindParam, kindConst:
		return true
	case kindForeign:
		switch {
		case v.given:
			return true
		case v.src.call.op == compute.OpTypeConstant:
			v.constant = true
			return true
		case slices.ContainsFunc(v.in, func(x *value) bool { return !x.constant || x.kind != kindForeign }):
			return false
		}
		v.constant = true
		p.constants = append(p.constants, v)
		return true
	case kindStep, kindTyped:
		// a constant is not ours to give away, so an output is not one
		if !v.folds || slices.Contains(p.outs, v) || slices.ContainsFunc(v.reads(), func(r view) bool { return !r.base.constant }) {
			return false
		}
		for _, r := range v.reads() {
			r.base.imported = true
		}
		v.constant = true
		p.constants = append(p.constants, v)
		return true
	}
	return false
}

func newGroup(v *value) *group {
	g := &group{members: []*value{v}}
	switch v.kind {
	case kindElem, kindReduce:
		g.space = factors(v.space())
		g.markRow(v)
	case kindForeign:
		g.kind = regionGroup
	default:
		g.kind = stepGroup
	}
	return g
}

// take adds a value to the group, which has number i, if it can be computed there.
func (g *group) take(i int, v *value, reads []view) bool {
	ok := false
	switch {
	case g.kind == regionGroup && v.kind == kindForeign:
		ok = true
	case g.kind == loopGroup && (v.kind == kindElem || v.kind == kindReduce) && len(g.members) < maxMembers:
		ok = g.takeRow(i, v, reads) || g.takeElem(i, v, reads)
	}
	if ok {
		g.members = append(g.members, v)
	}
	return ok
}

// takeRow adds an elementwise function of row values.
func (g *group) takeRow(i int, v *value, reads []view) bool {
	n := size(v.dims)
	if g.rowLen == 0 || v.kind != kindElem || n == 1 || n != size(g.space)/g.rowLen {
		return false
	}
	any := false
	for _, r := range reads {
		if r.base.group == i {
			if !r.base.row || !r.whole() {
				return false
			}
			any = true
		} else if !r.contiguous() && size(r.base.dims) != 1 {
			return false
		}
	}
	v.row = any
	return any
}

// takeElem adds a function or a reduction over the group's space, which may get finer by it.
func (g *group) takeElem(i int, v *value, reads []view) bool {
	space, ok := refine(g.space, v.space())
	if !ok || g.rowLen > 0 && (len(space) == 0 || space[len(space)-1] != g.rowLen) {
		return false
	}
	for _, r := range reads {
		b := r.base
		switch {
		case b.group != i:
		case b.row: // a row value, repeated along the row
			if r.off != 0 || r.size() == 1 {
				return false
			}
			str, row := split(r.dims, r.str, space), rowMajor(space)
			last := len(space) - 1
			for k := range last {
				if str[k]*g.rowLen != row[k] {
					return false
				}
			}
			if str[last] != 0 {
				return false
			}
		case b.kind == kindReduce || !r.whole():
			return false
		}
	}
	g.space = space
	g.markRow(v)
	return true
}

// markRow makes the last axis a row if v reduces exactly it.
func (g *group) markRow(v *value) {
	if v.kind != kindReduce || len(g.space) == 0 {
		return
	}
	n := g.space[len(g.space)-1]
	if n < 8 || n > maxRow || len(g.space) == 1 || g.rowLen != 0 && g.rowLen != n {
		return
	}
	dims, count := v.space(), 1
	for _, a := range v.fold.axes {
		count *= dims[a]
	}
	if count != n {
		return
	}
	a := len(dims) - 1
	for reduced := 1; reduced < n; a-- {
		if dims[a] != 1 && !slices.Contains(v.fold.axes, a) {
			return
		}
		reduced *= dims[a]
	}
	g.rowLen, v.row = n, true
}

// live finds out which values need memory, and until when.
func (p *plan) live() {
	for _, v := range p.order {
		v.last = v.group
	}
	for _, v := range p.order {
		if v.group < 0 {
			continue
		}
		for _, r := range v.reads() {
			b := r.base
			if b.group != v.group || b.kind != kindElem || b.row || p.groups[v.group].kind != loopGroup {
				b.store = true
			}
			b.last = max(b.last, v.group)
		}
		if v.kind != kindElem || v.row {
			v.store = true
		}
	}
	for _, v := range p.outs {
		v.store = true
		v.last = len(p.groups)
	}
}

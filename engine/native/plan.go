package native

import (
	"fmt"
	"slices"

	"github.com/gomlx/compute"
	"github.com/gomlx/compute/dtypes"

	"github.com/lathe-ml/lathe/engine/kernel"
)

// kind says how a value comes about.
type kind uint8

const (
	kindParam   kind = iota // an input of the computation
	kindConst               // known when compiling
	kindView                // another value's memory, read through other strides
	kindElem                // an elementwise function, fused into loops
	kindReduce              // a reduction, fused into loops
	kindStep                // an operation with memory and a kernel of its own
	kindTyped               // like kindStep, of another type than float32
	kindForeign             // of any type: an input, a constant, or computed by the portable backend
)

// value is one tensor of the plan. Native values are float32, masks included; foreign ones have a type of their own and
// lie in memory of the plan (kindTyped), or in buffers of the portable backend (kindForeign).
type value struct {
	id    int
	kind  kind
	dims  []int
	dtype dtypes.DType // of foreign values
	src   *node        // what it stands for; nil for values that the planner adds

	in    []*value // operands; where their elements lie is in their views
	view  view     // where the elements lie (native)
	apply apply    // kindElem
	fold  fold     // kindReduce
	step  step     // kindStep, kindTyped
	given bool     // a parameter
	param int      // which parameter of the computation
	// set is all results of the step, if it has several: they share the step.
	set []*value
	// folds says that the step is computed once, when planning, if its operands are constant.
	folds bool
	// constant marks a value that depends on foreign constants alone and is computed when planning.
	constant bool
	// imported marks a constant that a step reads when planning.
	imported bool

	// The schedule: which group computes it, and the last that reads it.
	group, last int
	// row marks a value that has one element for each row of its group.
	row bool
	// store says that the elements are written to memory, not only passed on inside a loop.
	store bool

	place int // in the arena

	// At run time.
	buf     []float32      // of native values
	flat    any            // of foreign values: a slice of their type
	foreign compute.Buffer // the buffer that has it, if there is one
}

// isForeign says whether a value, or the one that it is a view of, has a type of its own.
func (v *value) isForeign() bool { k := v.view.base.kind; return k == kindForeign || k == kindTyped }

// apply is an elementwise function.
type apply struct {
	args   int
	unary  kernel.UnaryOp
	binary kernel.BinaryOp
	// sel makes the three operands those of Select rather than of MulAdd.
	sel bool
}

// foldOp is what a reduction does.
type foldOp uint8

const (
	foldSum foldOp = iota
	foldMax
	foldMin
	foldProduct
)

// fold is a reduction over some axes.
type fold struct {
	op   foldOp
	axes []int
}

// step is an operation that is not fused. Its operands are the views that reads returns.
type step interface {
	reads() []view
	// prepare is called once, when all memory is known.
	prepare(x *executable)
	run(x *executable, out []float32)
}

// plan turns a recorded function into groups of work.
type plan struct {
	b      *Backend
	f      *Function
	params []*node // the function's, then what it uses of functions around it
	values map[*node]*value
	order  []*value // in an order of computing
	groups []*group
	outs   []*value
	pads   map[string]*value // copies, by what they are copies of
	masks  map[*value]*value // native copies of foreign values
	arena  int               // float32 elements
	reuse  map[*value]*value // outputs that may be written over a parameter
	// constants are computed once, when the plan is made.
	constants []*value
	native    int           // values with a kernel
	inner     []*executable // plans of closures
}

func newPlan(b *Backend, f *Function, outside []*node) *plan {
	return &plan{b: b, f: f, params: slices.Concat(f.params, outside), values: map[*node]*value{}, pads: map[string]*value{}, masks: map[*value]*value{}, reuse: map[*value]*value{}}
}

func (p *plan) add(v *value) *value {
	v.id = len(p.order)
	if v.kind != kindView {
		v.view = view{v, 0, v.dims, rowMajor(v.dims)}
	}
	p.order = append(p.order, v)
	if v.kind == kindElem || v.kind == kindReduce || v.kind == kindStep {
		p.native++
	}
	return v
}

func (p *plan) elem(dims []int, a apply, in ...*value) *value {
	return p.add(&value{kind: kindElem, dims: dims, apply: a, in: in})
}

func (p *plan) unary(op kernel.UnaryOp, x *value) *value {
	return p.elem(x.dims, apply{args: 1, unary: op}, x)
}

// viewOf returns a value that is a view.
func (p *plan) viewOf(v view) *value { return &value{kind: kindView, dims: v.dims, view: v} }

// copyOf writes a view out.
func (p *plan) copyOf(v view) *value { return p.unary(kernel.Copy, p.viewOf(v)) }

// isNative says whether a type is held as float32.
func isNative(d dtypes.DType) bool { return d == dtypes.Float32 || d == dtypes.Bool }

// build plans the whole function.
func (p *plan) build() error {
	live := map[*call]bool{}
	var mark func(n *node)
	mark = func(n *node) {
		if n.fn != p.f || live[n.call] {
			return
		}
		live[n.call] = true
		for _, m := range n.call.in {
			mark(m)
		}
	}
	for _, n := range p.f.out {
		mark(n)
	}
	for i, n := range p.params {
		k := &value{kind: kindParam, dims: n.shape.Dimensions, src: n, given: true, param: i}
		if n.shape.DType != dtypes.Float32 {
			k.kind, k.dtype = kindForeign, n.shape.DType
		}
		p.values[n] = p.add(k)
	}
	for _, c := range p.f.calls {
		if live[c] && c.op != compute.OpTypeParameter {
			if err := p.lower(c); err != nil {
				return fmt.Errorf("%s: %w", c.op, err)
			}
		}
	}
	// each output is memory of its own, to be given away
	taken := map[*value]bool{}
	for i, n := range p.f.out {
		v := p.values[n]
		if !v.isForeign() && n.shape.DType == dtypes.Bool {
			v = p.toBool(v, n)
		}
		own := v.kind != kindView && v.kind != kindParam && v.kind != kindConst && !taken[v]
		switch {
		case n.shape.Size() == 0 && !v.isForeign():
			v = p.add(&value{kind: kindConst, dims: n.shape.Dimensions, buf: []float32{}})
		case p.f.parent != nil && v.given && v.param == i: // a loop's state that its body leaves alone
		case v.kind == kindForeign: // copied when it is handed out, where need be
		case own:
		case v.isForeign():
			v = p.copyTyped(v)
		default:
			v = p.copyOf(v.view)
		}
		taken[v] = true
		p.outs = append(p.outs, v)
	}
	p.sweep()
	p.sumProducts()
	p.sumPads()
	p.sweep()
	p.shareB()
	p.schedule()
	p.allocate()
	return nil
}

// sweep drops values that nothing reads.
func (p *plan) sweep() {
	used := map[*value]bool{}
	var mark func(v *value)
	mark = func(v *value) {
		if used[v] {
			return
		}
		used[v] = true
		for _, u := range v.set {
			mark(u)
		}
		for _, r := range v.reads() {
			mark(r.base)
		}
	}
	for _, v := range p.outs {
		mark(v)
	}
	kept := p.order[:0]
	for _, v := range p.order {
		if used[v] || v.kind == kindParam || v.kind == kindForeign {
			kept = append(kept, v)
		} else if v.kind != kindConst {
			p.native--
		}
	}
	p.order = kept
}

// countUses counts how often each value is read or handed out.
func (p *plan) countUses() map[*value]int {
	uses := map[*value]int{}
	for _, v := range p.order {
		for _, r := range v.reads() {
			uses[r.base]++
		}
	}
	for _, v := range p.outs {
		uses[v]++
	}
	return uses
}

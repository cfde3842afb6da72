package native

import (
	"fmt"
	"reflect"
	"slices"

	"github.com/gomlx/compute"
	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/notimplemented"
	"github.com/gomlx/compute/shapes"
)

// Value is what GoMLX holds for the result of an operation: a *node here.
type Value = compute.Value

// emit writes an operation again, onto any function.
type emit func(f compute.Function, in []Value) ([]Value, error)

// call is one recorded operation.
type call struct {
	op   compute.OpType
	in   []*node
	attr any
	emit emit
	out  []*node
}

// node is one result of a call.
type node struct {
	id    int
	fn    *Function
	call  *call
	shape shapes.Shape
	// shadow is the same value in the portable backend's graph, which is built alongside: it checks every operation,
	// knows the shapes, recognises equal operations, and is what runs when the kernels have nothing to do.
	shadow Value
}

// Builder implements compute.Builder.
type Builder struct {
	notimplemented.Builder
	backend *Backend
	name    string
	shadow  compute.Builder
	main    *Function
	// functions are all of them, closures included.
	functions []*Function
	done      bool
}

// Function implements compute.Function.
type Function struct {
	notimplemented.Function
	b      *Builder
	parent *Function
	name   string
	shadow compute.Function

	calls  []*call
	nodes  []*node
	params []*node
	names  []string
	known  map[Value]*node // by shadow
	out    []*node
	closed bool
}

func notImplemented(op compute.OpType) error {
	return fmt.Errorf("native: operation %s: %w", op, compute.ErrNotImplemented)
}

// Builder starts a computation.
func (b *Backend) Builder(name string) compute.Builder {
	n := &Builder{backend: b, name: name, shadow: b.host.Builder(name)}
	n.ErrFn = notImplemented
	n.main = n.function(compute.MainName, n.shadow.Main(), nil)
	return n
}

func (b *Builder) function(name string, shadow compute.Function, parent *Function) *Function {
	f := &Function{b: b, name: name, shadow: shadow, parent: parent, known: map[Value]*node{}}
	f.ErrFn = notImplemented
	b.functions = append(b.functions, f)
	return f
}

// Name returns the name given to Backend.Builder.
func (b *Builder) Name() string { return b.name }

// Main returns the function that is compiled.
func (b *Builder) Main() compute.Function { return b.main }

// NewFunction starts a function that others can Call.
func (b *Builder) NewFunction(name string) (compute.Function, error) {
	s, err := b.shadow.NewFunction(name)
	if err != nil {
		return nil, err
	}
	return b.function(name, s, nil), nil
}

// OpShape returns the shape of a value.
func (b *Builder) OpShape(v Value) (shapes.Shape, error) { return b.main.Shape(v) }

// DeviceAssignment accepts the only device, 0.
func (b *Builder) DeviceAssignment(devices ...compute.DeviceNum) error {
	if len(devices) != 1 || devices[0] != 0 {
		return fmt.Errorf("native: devices %v; there is one device, 0", devices)
	}
	return nil
}

// Name returns the function's name, "" for closures.
func (f *Function) Name() string { return f.name }

// Builder returns the function's builder.
func (f *Function) Builder() compute.Builder { return f.b }

// Parent returns the function that a closure belongs to, or nil.
func (f *Function) Parent() compute.Function {
	if f.parent == nil {
		return nil
	}
	return f.parent
}

// Closure starts a function for While, If or Sort, which may use the values of f.
func (f *Function) Closure() (compute.Function, error) {
	s, err := f.shadow.Closure()
	if err != nil {
		return nil, err
	}
	return f.b.function("", s, f), nil
}

// Shape returns the shape of a value.
func (f *Function) Shape(v Value) (shapes.Shape, error) {
	n, err := f.node(v)
	if err != nil {
		return shapes.Invalid(), err
	}
	return n.shape, nil
}

func (f *Function) node(v Value) (*node, error) {
	n, ok := v.(*node)
	if !ok || n == nil || n.fn.b != f.b {
		return nil, fmt.Errorf("native: a value of type %T is not one of this computation", v)
	}
	return n, nil
}

// record adds an operation and returns its results; an operation equal to an earlier one gives that one's results.
// attr is for the planner.
func (f *Function) record(op compute.OpType, attr any, e emit, in ...Value) ([]*node, error) {
	if f.b.done || f.closed {
		return nil, fmt.Errorf("native: %s: the function %q has been returned or compiled", op, f.name)
	}
	c := &call{op: op, attr: attr, emit: e}
	shadows := make([]Value, len(in))
	for i, v := range in {
		n, err := f.node(v)
		if err != nil {
			return nil, fmt.Errorf("native: %s, operand %d: %w", op, i, err)
		}
		c.in, shadows[i] = append(c.in, n), n.shadow
	}
	outs, err := e(f.shadow, shadows)
	if err != nil {
		return nil, err
	}
	return f.add(c, outs)
}

// add makes the results of a call known, given what they are on the portable backend.
func (f *Function) add(c *call, shadows []Value) ([]*node, error) {
	nodes, old := make([]*node, len(shadows)), 0
	for i, s := range shadows {
		if nodes[i] = f.known[s]; nodes[i] != nil {
			old++
		}
	}
	if old == len(shadows) {
		return nodes, nil
	}
	for i, s := range shadows {
		shape, err := f.shadow.Shape(s)
		if err != nil {
			return nil, err
		}
		nodes[i] = &node{id: len(f.nodes), fn: f, call: c, shape: shape.Clone(), shadow: s}
		f.nodes = append(f.nodes, nodes[i])
		f.known[s] = nodes[i]
	}
	c.out = nodes
	f.calls = append(f.calls, c)
	return nodes, nil
}

func one(n []*node, err error) (Value, error) {
	if err != nil {
		return nil, err
	}
	return n[0], nil
}

func values(n []*node, err error) ([]Value, error) {
	if err != nil {
		return nil, err
	}
	v := make([]Value, len(n))
	for i := range n {
		v[i] = n[i]
	}
	return v, nil
}

// single makes the emit of an operation with one result.
func single(e func(f compute.Function, in []Value) (Value, error)) emit {
	return func(f compute.Function, in []Value) ([]Value, error) {
		v, err := e(f, in)
		if err != nil {
			return nil, err
		}
		return []Value{v}, nil
	}
}

// op records an operation with one result.
func (f *Function) op(op compute.OpType, attr any, e func(f compute.Function, in []Value) (Value, error), in ...Value) (Value, error) {
	return one(f.record(op, attr, single(e), in...))
}

// Parameter adds an input.
func (f *Function) Parameter(name string, shape shapes.Shape, sharding *compute.ShardingSpec) (Value, error) {
	s, err := f.shadow.Parameter(name, shape, sharding)
	if err != nil {
		return nil, err
	}
	n, err := f.add(&call{op: compute.OpTypeParameter}, []Value{s})
	if err != nil {
		return nil, err
	}
	f.params, f.names = append(f.params, n[0]), append(f.names, name)
	return n[0], nil
}

// Constant adds values that are known now; they are copied.
func (f *Function) Constant(flat any, dims ...int) (Value, error) {
	s, err := f.shadow.Constant(flat, dims...)
	if err != nil {
		return nil, err
	}
	if n := f.known[s]; n != nil {
		return n, nil
	}
	dtype := dtypes.FromGoType(reflect.TypeOf(flat).Elem())
	keep := dtypes.MakeAnySlice(dtype, shapes.Make(dtype, dims...).Size())
	if err := copyFlat(keep, flat); err != nil {
		return nil, err
	}
	again := single(func(g compute.Function, _ []Value) (Value, error) { return g.Constant(keep, slices.Clone(dims)...) })
	return one(f.add(&call{op: compute.OpTypeConstant, attr: keep, emit: again}, []Value{s}))
}

// Return ends the function.
func (f *Function) Return(outputs []Value, shardings []*compute.ShardingSpec) error {
	shadows := make([]Value, len(outputs))
	out := make([]*node, len(outputs))
	for i, v := range outputs {
		n, err := f.node(v)
		if err != nil {
			return fmt.Errorf("native: output %d: %w", i, err)
		}
		out[i], shadows[i] = n, n.shadow
	}
	if err := f.shadow.Return(shadows, shardings); err != nil {
		return err
	}
	f.out, f.closed = out, true
	return nil
}

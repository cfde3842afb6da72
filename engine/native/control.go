package native

import (
	"fmt"
	"slices"

	"github.com/gomlx/compute"
)

// Functions and closures. A call is written out in place. Loops, branches and sorts are steps that run plans of their
// closures (branch.go); where one runs on the portable backend nevertheless, its closures are written again there, with
// the values that they use of the functions around them as operands.

// Call implements compute.Function.
func (f *Function) Call(callee compute.Function, inputs ...Value) ([]Value, error) {
	fn, ok := callee.(*Function)
	if !ok || fn.b != f.b || !fn.closed {
		return nil, fmt.Errorf("native: Call: function %q is not one of this computation that has returned", callee.Name())
	}
	if len(inputs) != len(fn.params) {
		return nil, fmt.Errorf("native: Call: function %q takes %d values, got %d", fn.name, len(fn.params), len(inputs))
	}
	for i, v := range inputs {
		n, err := f.node(v)
		if err != nil {
			return nil, fmt.Errorf("native: Call: input %d: %w", i, err)
		}
		if !n.shape.Equal(fn.params[i].shape) {
			return nil, fmt.Errorf("native: Call: input %d of function %q has shape %s, want %s", i, fn.name, n.shape, fn.params[i].shape)
		}
	}
	return fn.write(f, inputs, nil)
}

// write writes the body of f again onto g and returns its results there. outer holds values that are not f's own.
func (f *Function) write(g compute.Function, params []Value, outer map[*node]Value) ([]Value, error) {
	env := make(map[*node]Value, len(f.nodes))
	for i, p := range f.params {
		env[p] = params[i]
	}
	find := func(n *node) (Value, error) {
		if v, ok := env[n]; ok {
			return v, nil
		}
		if v, ok := outer[n]; ok {
			return v, nil
		}
		return nil, fmt.Errorf("native: function %q uses a value of shape %s that is neither its own nor its parents'", f.name, n.shape)
	}
	for _, c := range f.calls {
		if c.op == compute.OpTypeParameter {
			continue
		}
		in := make([]Value, len(c.in))
		for i, n := range c.in {
			v, err := find(n)
			if err != nil {
				return nil, err
			}
			in[i] = v
		}
		out, err := c.emit(g, in)
		if err != nil {
			return nil, err
		}
		for i, n := range c.out {
			env[n] = out[i]
		}
	}
	out := make([]Value, len(f.out))
	for i, n := range f.out {
		v, err := find(n)
		if err != nil {
			return nil, err
		}
		out[i] = v
	}
	return out, nil
}

// outside returns the values that a closure uses of the functions around it.
func (f *Function) outside() (outer []*node) {
	look := func(n *node) {
		if n.fn != f && !slices.Contains(outer, n) {
			outer = append(outer, n)
		}
	}
	for _, c := range f.calls {
		for _, n := range c.in {
			look(n)
		}
	}
	for _, n := range f.out {
		look(n)
	}
	return outer
}

// closures is the attribute of an operation that takes closures.
type closures struct {
	fns    []*Function
	outer  []*node // what they use of the functions around them
	axis   int     // of Sort
	stable bool
}

// withClosures records an operation that takes closures. The closures' outside values become further operands.
func (f *Function) withClosures(op compute.OpType, a closures, called []compute.Function, in []Value,
	e func(g compute.Function, c []compute.Function, in []Value) ([]Value, error),
) ([]Value, error) {
	var shadows []compute.Function
	var outer []*node
	for _, c := range called {
		fn, ok := c.(*Function)
		if !ok || fn.b != f.b || fn.parent != f || !fn.closed {
			return nil, fmt.Errorf("native: %s: a closure is not one of function %q that has returned", op, f.name)
		}
		a.fns, shadows = append(a.fns, fn), append(shadows, fn.shadow)
		for _, n := range fn.outside() {
			if !slices.Contains(outer, n) {
				outer = append(outer, n)
			}
		}
	}
	a.outer = outer
	c := &call{op: op, attr: a}
	var own []Value
	for i, v := range in {
		n, err := f.node(v)
		if err != nil {
			return nil, fmt.Errorf("native: %s, operand %d: %w", op, i, err)
		}
		c.in, own = append(c.in, n), append(own, n.shadow)
	}
	out, err := e(f.shadow, shadows, own)
	if err != nil {
		return nil, err
	}
	c.in = append(c.in, outer...)
	c.emit = func(g compute.Function, v []Value) ([]Value, error) {
		env := make(map[*node]Value, len(outer))
		for i, n := range outer {
			env[n] = v[len(in)+i]
		}
		var again []compute.Function
		for _, fn := range a.fns {
			h, err := g.Closure()
			if err != nil {
				return nil, err
			}
			var params []Value
			for i, p := range fn.params {
				q, err := h.Parameter(fn.names[i], p.shape, nil)
				if err != nil {
					return nil, err
				}
				params = append(params, q)
			}
			results, err := fn.write(h, params, env)
			if err != nil {
				return nil, err
			}
			if err := h.Return(results, nil); err != nil {
				return nil, err
			}
			again = append(again, h)
		}
		return e(g, again, v[:len(in)])
	}
	return values(f.add(c, out))
}

// Sort implements compute.Function.
func (f *Function) Sort(comparator compute.Function, axis int, stable bool, inputs ...Value) ([]Value, error) {
	return f.withClosures(compute.OpTypeSort, closures{axis: axis, stable: stable}, []compute.Function{comparator}, inputs,
		func(g compute.Function, c []compute.Function, in []Value) ([]Value, error) {
			return g.Sort(c[0], axis, stable, in...)
		})
}

// While implements compute.Function.
func (f *Function) While(cond, body compute.Function, state ...Value) ([]Value, error) {
	return f.withClosures(compute.OpTypeWhile, closures{}, []compute.Function{cond, body}, state,
		func(g compute.Function, c []compute.Function, in []Value) ([]Value, error) {
			return g.While(c[0], c[1], in...)
		})
}

// If implements compute.Function.
func (f *Function) If(pred Value, yes, no compute.Function) ([]Value, error) {
	return f.withClosures(compute.OpTypeIf, closures{}, []compute.Function{yes, no}, []Value{pred},
		func(g compute.Function, c []compute.Function, in []Value) ([]Value, error) {
			return g.If(in[0], c[0], c[1])
		})
}

package native

import (
	"fmt"

	"github.com/gomlx/compute"
	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
)

// region is a part of the graph that the portable backend computes as one graph of its own.
type region struct {
	exec    compute.Executable
	inputs  []regionInput
	outputs []*value
	in      []compute.Buffer
}

// regionInput is an operand: a buffer of the portable backend as it is, or anything else copied into one that is kept.
type regionInput struct {
	v      *value
	shape  shapes.Shape
	copier copier
	copy   compute.Buffer
	flat   any
}

// compileRegion writes the calls of some foreign values onto a graph of the portable backend.
func (x *executable) compileRegion(members []*value) (*region, error) {
	r := &region{}
	b := x.b.host.Builder("region")
	f := b.Main()
	env := map[*value]Value{}
	find := func(v *value, n *node) (Value, error) {
		if q, ok := env[v]; ok {
			return q, nil
		}
		in := regionInput{v: v, shape: n.shape}
		if !v.isForeign() {
			in.shape = shapes.Make(dtypes.Float32, n.shape.Dimensions...)
			in.copier = newCopier(v.view, 0, rowMajor(v.dims))
		}
		q, err := f.Parameter(fmt.Sprint("p", len(r.inputs)), n.shape, nil)
		if err != nil {
			return nil, err
		}
		r.inputs = append(r.inputs, in)
		env[v] = q
		return q, nil
	}
	done := map[*call]bool{}
	for _, v := range members {
		c := v.src.call
		if done[c] {
			continue
		}
		done[c] = true
		var in []Value
		for i, u := range v.in {
			q, err := find(u, c.in[i])
			if err != nil {
				return nil, err
			}
			in = append(in, q)
		}
		out, err := c.emit(f, in)
		if err != nil {
			return nil, fmt.Errorf("%s on the portable backend: %w", c.op, err)
		}
		for i, n := range c.out {
			env[x.p.values[n]] = out[i]
		}
	}
	var results []Value
	for _, v := range members {
		// The portable backend fails where only the first results of an operation are asked for.
		if v.last > v.group || v.imported || len(v.src.call.out) > 1 {
			r.outputs = append(r.outputs, v)
			results = append(results, env[v])
		}
	}
	if len(results) == 0 {
		return r, nil
	}
	if err := f.Return(results, nil); err != nil {
		return nil, err
	}
	exec, err := b.Compile()
	if err != nil {
		return nil, err
	}
	r.exec, r.in = exec, make([]compute.Buffer, len(r.inputs))
	return r, nil
}

// run computes the region's values.
func (r *region) run(x *executable) error {
	if r.exec == nil {
		return nil
	}
	for i := range r.inputs {
		in := &r.inputs[i]
		if in.v.foreign != nil {
			r.in[i] = in.v.foreign
			continue
		}
		if in.copy == nil {
			var err error
			if in.copy, in.flat, err = x.b.host.NewSharedBuffer(0, in.shape); err != nil {
				return err
			}
		}
		if in.v.isForeign() {
			if err := copyFlat(in.flat, in.v.flat); err != nil {
				return err
			}
		} else {
			in.copier.copy(in.flat.([]float32), 0, 0)
		}
		r.in[i] = in.copy
	}
	out, err := r.exec.Execute(r.in, nil, 0)
	if err != nil {
		return err
	}
	for i, v := range r.outputs {
		v.foreign = out[i]
		if v.flat, err = out[i].Data(); err != nil {
			return err
		}
	}
	return nil
}

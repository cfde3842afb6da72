package native

import (
	"math"
	"slices"

	"github.com/gomlx/compute"
	"github.com/gomlx/compute/dtypes"
)

// stepOf returns a float32 value that is computed by a step, which is not in the plan yet.
func (p *plan) stepOf(dims []int) *value {
	v := &value{kind: kindStep, dims: dims}
	v.view = view{v, 0, dims, rowMajor(dims)}
	return v
}

// typedValue adds a value of another type.
func (p *plan) typedValue(n *node, s step) *value {
	return p.add(&value{kind: kindTyped, dims: n.shape.Dimensions, dtype: n.shape.DType, src: n, step: s, folds: true})
}

// copyTyped writes a view of a foreign value out.
func (p *plan) copyTyped(v *value) *value {
	d := v.view.base.dtype
	c := &value{kind: kindTyped, dims: v.dims, dtype: d, folds: true}
	c.step = typed(d).place(c, []padPart{{v.view, rowMajor(v.dims), 0}}, view{})
	return p.add(c)
}

// ofNothing plans a call of which an operand has no elements, but not the result.
func (p *plan) ofNothing(c *call, dims []int) *value {
	fill := func(x float32) *value {
		b := make([]float32, size(dims))
		for i := range b {
			b[i] = x
		}
		p.native++ // or the whole graph would go to the portable backend
		return p.add(&value{kind: kindConst, dims: dims, buf: b})
	}
	switch c.op {
	case compute.OpTypeDotGeneral, compute.OpTypeConvGeneral, compute.OpTypeReduceSum, compute.OpTypeReduceLogicalOr:
		if f32(c.in[0]) || c.in[0].shape.DType == dtypes.Bool {
			return fill(0)
		}
	case compute.OpTypeReduceProduct, compute.OpTypeReduceLogicalAnd:
		return fill(1)
	case compute.OpTypeReduceMax:
		return fill(float32(math.Inf(-1)))
	case compute.OpTypeReduceMin:
		return fill(float32(math.Inf(1)))
	case compute.OpTypeScatterSum, compute.OpTypeDynamicUpdateSlice:
		return p.viewOf(p.load(c.in[0]).view)
	case compute.OpTypePad:
		return p.pad(p.load(c.in[0]).view, p.load(c.in[1]).view, c.attr.([]compute.PadAxis), dims)
	case compute.OpTypeConcatenate:
		s := &concatStep{axis: c.attr.(int), dims: dims}
		for _, n := range c.in {
			s.parts = append(s.parts, p.load(n).view)
		}
		return p.add(&value{kind: kindStep, dims: dims, step: s})
	}
	return nil
}

// viewed returns the result of an operation that only moves elements, as a view, if that is possible.
func viewed(c *call, x view, dims []int) (view, bool) {
	switch c.op {
	case compute.OpTypeReshape:
		return x.reshape(dims)
	case compute.OpTypeTranspose:
		return x.transpose(c.attr.([]int)), true
	case compute.OpTypeBroadcastInDim:
		return x.broadcast(dims, c.attr.([]int)), true
	case compute.OpTypeSlice:
		return x.slice(dims, c.attr.(sliceAttr)), true
	case compute.OpTypeReverse:
		return x.reverse(c.attr.([]int)), true
	}
	return view{}, false
}

// typedCompare plans a comparison of values that are not float32.
func (p *plan) typedCompare(c *call) *value {
	t := typed(c.in[0].shape.DType)
	if t == nil || t.compare == nil {
		return nil
	}
	v := p.stepOf(c.out[0].shape.Dimensions)
	v.folds = true
	if v.step = t.compare(c.op, v, p.values[c.in[0]].view.stretch(v.dims), p.values[c.in[1]].view.stretch(v.dims)); v.step == nil {
		return nil
	}
	return p.add(v)
}

// dynamicUpdate plans a copy of a value with a part overwritten.
func (p *plan) dynamicUpdate(c *call, dst *value) step {
	d := c.out[0].shape.DType
	part := func(i int) view {
		if isNative(d) {
			return p.load(c.in[i]).view
		}
		return p.values[c.in[i]].view
	}
	var starts []view
	for _, n := range c.in[2:] {
		if !isInteger(n.shape.DType) {
			return nil
		}
		starts = append(starts, p.values[n].view)
	}
	if d == dtypes.Bool { // held as a mask
		d = dtypes.Float32
	}
	return typed(d).update(dst, part(0), part(1), starts)
}

// typed1 plans a call whose only result has another type, or returns nil.
func (p *plan) typed1(c *call) *value {
	out := c.out[0]
	t := typed(out.shape.DType)
	if t == nil || isNative(out.shape.DType) {
		return nil
	}
	for _, n := range c.in {
		if n.shape.Size() == 0 || typed(n.shape.DType) == nil {
			return nil
		}
	}
	dims := out.shape.Dimensions
	same := len(c.in) > 0 && c.in[0].shape.DType == out.shape.DType
	if same {
		if v, ok := viewed(c, p.values[c.in[0]].view, dims); ok {
			return p.viewOf(v)
		}
	}
	v := &value{kind: kindTyped, dims: dims, dtype: out.shape.DType, folds: true}
	if v.step = p.typedStep(c, v, t, same); v.step == nil {
		return nil
	}
	return p.add(v)
}

func (p *plan) typedStep(c *call, v *value, t *typeOps, same bool) step {
	arg := func(i int) view { return p.values[c.in[i]].view.stretch(v.dims) }
	switch c.op {
	case compute.OpTypeReshape:
		if same {
			x := p.copyTyped(p.values[c.in[0]])
			return t.place(v, []padPart{{view{x, 0, v.dims, rowMajor(v.dims)}, rowMajor(v.dims), 0}}, view{})
		}
	case compute.OpTypeIota:
		if t.iota != nil {
			return t.iota(v, c.attr.(int))
		}
	case compute.OpTypeConvertDType:
		from := c.in[0].shape.DType
		switch {
		case t.load[0] == nil:
		case isNative(from): // masks are float32 here
			return newConvert(v, p.load(c.in[0]).view, typed(dtypes.Float32), t)
		case typed(from).load[0] != nil:
			return newConvert(v, p.values[c.in[0]].view, typed(from), t)
		}
	case compute.OpTypeBitcast:
		x := p.values[c.in[0]].view
		if c.in[0].shape.DType != dtypes.Bool && x.contiguous() {
			return &bitcastStep{v, x}
		}
	case compute.OpTypeWhere:
		return t.where(v, p.load(c.in[0]).view.stretch(v.dims), arg(1), arg(2))
	case compute.OpTypeConcatenate:
		axis, row, off := c.attr.(int), rowMajor(v.dims), 0
		var parts []padPart
		for _, n := range c.in {
			parts = append(parts, padPart{p.values[n].view, row, off})
			off += n.shape.Dimensions[axis] * row[axis]
		}
		return t.place(v, parts, view{})
	case compute.OpTypePad:
		return t.place(v, []padPart{padding(p.values[c.in[0]].view, c.attr.([]compute.PadAxis), v.dims)}, p.values[c.in[1]].view)
	case compute.OpTypeGather:
		if isInteger(c.in[1].shape.DType) {
			return t.gather(gather(v, p.values[c.in[0]].view, p.values[c.in[1]].view, c.attr.(gatherAttr)))
		}
	case compute.OpTypeArgMinMax:
		of := c.in[0].shape.DType
		if from := typed(of); from.argBest != nil && t.load[0] != nil {
			x := p.values[c.in[0]].view
			if f32(c.in[0]) {
				x = p.load(c.in[0]).view
			}
			return &argStep{dst: v, x: x, make: from.argBest, a: c.attr.(argAttr), store: t.store[0].(func(*value, int, []int64))}
		}
	case compute.OpTypeCumSum:
		if t.cumSum != nil {
			return t.cumSum(v, p.values[c.in[0]].view, c.attr.(cumSumAttr))
		}
	case compute.OpTypeDynamicUpdateSlice:
		return p.dynamicUpdate(c, v)
	}
	if axes, ok := c.attr.([]int); ok && t.reduce != nil && len(c.in) == 1 {
		return t.reduce(c.op, v, p.values[c.in[0]].view, axes)
	}
	switch {
	case !same || c.attr != nil:
	case len(c.in) == 1 && t.unary != nil:
		return t.unary(c.op, v, arg(0))
	case len(c.in) == 2 && t.binary != nil && c.in[1].shape.DType == c.in[0].shape.DType:
		return t.binary(c.op, v, arg(0), arg(1))
	}
	return nil
}

// stepInto is a step with several results.
type stepInto interface {
	step
	into(results []*value)
}

// several plans a call with several results, or returns nil.
func (p *plan) several(c *call) (vs []*value) {
	for _, n := range slices.Concat(c.in, c.out) {
		if typed(n.shape.DType) == nil {
			return nil
		}
	}
	var s stepInto
	switch c.op {
	case compute.OpTypeRNGBitGenerator:
		if isNative(c.out[1].shape.DType) || p.values[c.in[0]].kind == kindView {
			return nil
		}
		r := &randomStep{state: p.values[c.in[0]]}
		vs = p.results(c, r)
		r.next, r.bits = vs[0], vs[1]
		return vs
	case compute.OpTypeWhile:
		s = p.while(c)
	case compute.OpTypeIf:
		s = p.branch(c)
	case compute.OpTypeSort:
		s = p.sort(c)
	}
	if s == nil {
		return nil
	}
	vs = p.results(c, s)
	s.into(vs)
	return vs
}

// results adds the values of a step with several results.
func (p *plan) results(c *call, s step) []*value {
	set := make([]*value, len(c.out))
	for i, n := range c.out {
		v := &value{kind: kindTyped, dims: n.shape.Dimensions, dtype: n.shape.DType, step: s, set: set, src: n}
		if f32(n) {
			v.kind = kindStep
		}
		set[i] = p.add(v)
	}
	return set
}

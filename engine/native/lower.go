package native

import (
	"slices"

	"github.com/gomlx/compute"
	"github.com/gomlx/compute/dtypes"

	"github.com/lathe-ml/lathe/engine/kernel"
)

var unaryOps = map[compute.OpType]kernel.UnaryOp{
	compute.OpTypeAbs: kernel.Abs, compute.OpTypeNeg: kernel.Neg, compute.OpTypeSqrt: kernel.Sqrt, compute.OpTypeRsqrt: kernel.Rsqrt,
	compute.OpTypeExp: kernel.Exp, compute.OpTypeExpm1: kernel.Expm1, compute.OpTypeLog: kernel.Log, compute.OpTypeLog1p: kernel.Log1p,
	compute.OpTypeTanh: kernel.Tanh, compute.OpTypeLogistic: kernel.Logistic, compute.OpTypeErf: kernel.Erf, compute.OpTypeSin: kernel.Sin,
	compute.OpTypeCos: kernel.Cos, compute.OpTypeSign: kernel.Sign, compute.OpTypeFloor: kernel.Floor, compute.OpTypeCeil: kernel.Ceil,
	compute.OpTypeRound: kernel.Round, compute.OpTypeIsNaN: kernel.IsNaN, compute.OpTypeIsFinite: kernel.IsFinite,
	compute.OpTypeLogicalNot: kernel.Not,
}

var binaryOps = map[compute.OpType]kernel.BinaryOp{
	compute.OpTypeAdd: kernel.Add, compute.OpTypeSub: kernel.Sub, compute.OpTypeMul: kernel.Mul, compute.OpTypeDiv: kernel.Div,
	compute.OpTypeMax: kernel.Max, compute.OpTypeMin: kernel.Min, compute.OpTypePow: kernel.Pow, compute.OpTypeRem: kernel.Rem,
	compute.OpTypeEqual: kernel.Eq, compute.OpTypeNotEqual: kernel.Ne, compute.OpTypeLessThan: kernel.Lt,
	compute.OpTypeLessOrEqual: kernel.Le, compute.OpTypeGreaterThan: kernel.Gt, compute.OpTypeGreaterOrEqual: kernel.Ge,
	compute.OpTypeLogicalAnd: kernel.Mul, compute.OpTypeLogicalOr: kernel.Max, compute.OpTypeLogicalXor: kernel.Ne,
}

var foldOps = map[compute.OpType]foldOp{
	compute.OpTypeReduceSum: foldSum, compute.OpTypeReduceMax: foldMax, compute.OpTypeReduceMin: foldMin,
	compute.OpTypeReduceProduct: foldProduct, compute.OpTypeReduceLogicalAnd: foldMin, compute.OpTypeReduceLogicalOr: foldMax,
}

// lower plans one call: with kernels if its operands, its result and its attributes allow, else as a foreign one.
func (p *plan) lower(c *call) error {
	out := c.out[0]
	if c.op == compute.OpTypeConstant {
		v := &value{kind: kindConst, dims: out.shape.Dimensions, src: out}
		if f, ok := c.attr.([]float32); ok {
			v.buf = f
		} else {
			v.kind, v.dtype = kindForeign, out.shape.DType
		}
		p.values[out] = p.add(v)
		return nil
	}
	if c.op == compute.OpTypeIdentity || c.op == compute.OpTypeSchedulingBarrier {
		p.values[out] = p.values[c.in[0]]
		return nil
	}
	if vs := p.nothing(c); vs != nil {
		for i, n := range c.out {
			p.values[n] = vs[i]
		}
		return nil
	}
	if len(c.out) == 1 {
		v := (*value)(nil)
		if isNative(out.shape.DType) {
			v = p.native1(c)
		}
		if v == nil {
			v = p.typed1(c)
		}
		if v != nil {
			v.src = out
			p.values[out] = v
			return nil
		}
	}
	if vs := p.several(c); vs != nil {
		for i, n := range c.out {
			vs[i].src = n
			p.values[n] = vs[i]
		}
		return nil
	}
	var in []*value
	for _, n := range c.in {
		v := p.values[n]
		switch {
		case !v.isForeign() && n.shape.DType == dtypes.Bool: // masks go over as booleans
			v = p.toBool(v, n)
		case v.isForeign() && v.kind == kindView:
			v = p.copyTyped(v)
		}
		in = append(in, v)
	}
	for _, n := range c.out {
		p.values[n] = p.add(&value{kind: kindForeign, dims: n.shape.Dimensions, dtype: n.shape.DType, src: n, in: in})
	}
	return nil
}

// emptyStep computes no elements.
type emptyStep struct{}

func (emptyStep) reads() []view              { return nil }
func (emptyStep) prepare(*executable)        {}
func (emptyStep) run(*executable, []float32) {}

// nothing returns values without elements for a call that has only such results, else nil.
func (p *plan) nothing(c *call) (vs []*value) {
	for _, n := range c.out {
		if n.shape.Size() > 0 || !isNative(n.shape.DType) && typed(n.shape.DType) == nil {
			return nil
		}
	}
	for _, n := range c.out {
		if isNative(n.shape.DType) {
			p.native++ // or the whole graph would go to the portable backend
			vs = append(vs, p.add(&value{kind: kindConst, dims: n.shape.Dimensions, src: n, buf: []float32{}}))
		} else {
			vs = append(vs, p.typedValue(n, emptyStep{}))
		}
	}
	return vs
}

// native1 plans a call whose only result is float32 or a mask with kernels, or returns nil.
func (p *plan) native1(c *call) *value {
	dims := c.out[0].shape.Dimensions
	if slices.ContainsFunc(c.in, func(n *node) bool { return n.shape.Size() == 0 }) {
		return p.ofNothing(c, dims)
	}
	// all says whether every operand from i on has a type held as float32, and returns them.
	all := func(i int) ([]*value, bool) {
		var in []*value
		for _, n := range c.in[i:] {
			if !isNative(n.shape.DType) {
				return nil, false
			}
		}
		for _, n := range c.in[i:] {
			in = append(in, p.load(n))
		}
		return in, true
	}
	if c.op == compute.OpTypeConvertDType {
		from, to := c.in[0].shape.DType, c.out[0].shape.DType
		switch {
		case from == to:
			return p.viewOf(p.load(c.in[0]).view)
		case from == dtypes.Bool:
			return p.unary(kernel.Copy, p.load(c.in[0]))
		case from == dtypes.Float32:
			x := p.load(c.in[0])
			return p.elem(dims, apply{args: 2, binary: kernel.Ne}, x, p.scalar(0))
		case typed(from) == nil || typed(from).load[0] == nil || from == dtypes.Float64 && to == dtypes.Bool:
			return nil
		case to == dtypes.Float32:
			return p.viewOf(p.load(c.in[0]).view)
		}
		return p.elem(dims, apply{args: 2, binary: kernel.Ne}, p.load(c.in[0]), p.scalar(0))
	}
	if op, ok := unaryOps[c.op]; ok {
		if in, ok := all(0); ok {
			return p.elem(dims, apply{args: 1, unary: op}, in...)
		}
		return nil
	}
	if op, ok := binaryOps[c.op]; ok {
		in, ok := all(0)
		if !ok {
			return p.typedCompare(c)
		}
		if s, ok := constantScalar(in[1]); ok && op == kernel.Pow && s == 2 {
			return p.elem(dims, apply{args: 1, unary: kernel.Square}, in[0])
		}
		if s, ok := constantScalar(in[1]); ok && op == kernel.Add && s == 0 && slices.Equal(in[0].view.dims, dims) {
			return p.viewOf(in[0].view)
		}
		return p.elem(dims, apply{args: 2, binary: op}, in...)
	}
	if op, ok := foldOps[c.op]; ok {
		in, ok := all(0)
		if !ok {
			return nil
		}
		return p.add(&value{kind: kindReduce, dims: dims, fold: fold{op, c.attr.([]int)}, in: in})
	}
	switch c.op {
	case compute.OpTypeWhere:
		if in, ok := all(0); ok {
			if s, ok := constantScalar(in[0]); ok { // the choice is known
				chosen := in[1]
				if s == 0 {
					chosen = in[2]
				}
				if slices.Equal(chosen.view.dims, dims) {
					return p.viewOf(chosen.view)
				}
			}
			return p.elem(dims, apply{args: 3, sel: true}, in...)
		}
	case compute.OpTypeReshape:
		if in, ok := all(0); ok {
			if v, ok := in[0].view.reshape(dims); ok {
				return p.viewOf(v)
			}
			v, _ := p.copyOf(in[0].view).view.reshape(dims)
			return p.viewOf(v)
		}
	case compute.OpTypeTranspose:
		if in, ok := all(0); ok {
			return p.viewOf(in[0].view.transpose(c.attr.([]int)))
		}
	case compute.OpTypeBroadcastInDim:
		if in, ok := all(0); ok {
			return p.viewOf(in[0].view.broadcast(dims, c.attr.([]int)))
		}
	case compute.OpTypeSlice:
		if in, ok := all(0); ok {
			return p.viewOf(in[0].view.slice(dims, c.attr.(sliceAttr)))
		}
	case compute.OpTypeReverse:
		if in, ok := all(0); ok {
			return p.viewOf(in[0].view.reverse(c.attr.([]int)))
		}
	case compute.OpTypeConcatenate:
		if in, ok := all(0); ok {
			s := &concatStep{axis: c.attr.(int), dims: dims}
			for _, v := range in {
				s.parts = append(s.parts, v.view)
			}
			return p.add(&value{kind: kindStep, dims: dims, step: s})
		}
	case compute.OpTypePad:
		if in, ok := all(0); ok {
			return p.pad(in[0].view, in[1].view, c.attr.([]compute.PadAxis), dims)
		}
	case compute.OpTypeGather:
		if f32(c.in[0]) && isInteger(c.in[1].shape.DType) {
			v := p.stepOf(dims)
			v.step = newGather[float32](gather(v, p.load(c.in[0]).view, p.values[c.in[1]].view, c.attr.(gatherAttr)))
			return p.add(v)
		}
	case compute.OpTypeScatterSum:
		if f32(c.in[0]) && f32(c.in[2]) && isInteger(c.in[1].shape.DType) {
			return p.scatterSum(p.load(c.in[0]).view, p.values[c.in[1]].view, p.load(c.in[2]).view, c.attr.(scatterAttr))
		}
	case compute.OpTypeReduceWindow:
		if f32(c.in[0]) {
			return p.window(p.load(c.in[0]).view, view{}, c.attr.(windowAttr), false, dims)
		}
	case compute.OpTypeSelectAndScatterMax, compute.OpTypeSelectAndScatterMin:
		if f32(c.in[0]) && f32(c.in[1]) {
			return p.window(p.load(c.in[0]).view, p.load(c.in[1]).view, c.attr.(windowAttr), true, dims)
		}
	case compute.OpTypeDotGeneral:
		if a, ok := c.attr.(dotAttr); ok && f32(c.in[0]) && f32(c.in[1]) {
			in, _ := all(0)
			return p.dot(in[0].view, in[1].view, a, dims)
		}
	case compute.OpTypeCumSum:
		v := p.stepOf(dims)
		v.step = newCumSum[float32](v, p.load(c.in[0]).view, c.attr.(cumSumAttr))
		return p.add(v)
	case compute.OpTypeIota:
		v := p.stepOf(dims)
		v.step, v.folds = &iotaStep[float32]{v, c.attr.(int)}, true
		return p.add(v)
	case compute.OpTypeDynamicUpdateSlice:
		v := p.stepOf(dims)
		if v.step = p.dynamicUpdate(c, v); v.step != nil {
			return p.add(v)
		}
	case compute.OpTypeConvGeneral:
		if a := c.attr.(convAttr); f32(c.in[0]) && f32(c.in[1]) {
			in, _ := all(0)
			return p.conv(in[0].view, in[1].view, a, dims)
		}
	}
	return nil
}

func f32(n *node) bool { return n.shape.DType == dtypes.Float32 }

// scalar returns a constant of one element.
func (p *plan) scalar(x float32) *value {
	return p.add(&value{kind: kindConst, dims: []int{}, buf: []float32{x}})
}

// constantScalar returns the only element of a constant.
func constantScalar(v *value) (float32, bool) {
	b := v.view.base
	if b != nil && b.kind == kindConst && len(b.buf) == 1 {
		return b.buf[0], true
	}
	return 0, false
}

// load returns the native value of a node, converting one that the portable backend computes.
func (p *plan) load(n *node) *value {
	v := p.values[n]
	if !v.isForeign() {
		return v
	}
	if m := p.masks[v]; m != nil {
		return m
	}
	m := p.stepOf(v.dims)
	m.folds = true
	if n.shape.DType == dtypes.Float32 {
		m.step = newPlace[float32](m, []padPart{{v.view, rowMajor(v.dims), 0}}, view{})
	} else if n.shape.DType == dtypes.Bool {
		m.step = newMap(m, each(mask), v.view)
	} else {
		m.step = newConvert(m, v.view, typed(n.shape.DType), typed(dtypes.Float32))
	}
	p.add(m)
	p.masks[v] = m
	return m
}

// toBool makes a mask a foreign value of booleans.
func (p *plan) toBool(v *value, n *node) *value {
	f := p.typedValue(n, nil)
	f.step = newMap(f, each(func(x float32) bool { return x != 0 }), v.view)
	p.masks[f] = v
	p.values[n] = f
	return f
}

func mask(b bool) float32 {
	if b {
		return 1
	}
	return 0
}

// pad writes a view into larger memory, with fill around and between its elements.
func (p *plan) pad(x, fill view, axes []compute.PadAxis, dims []int) *value {
	s := &padStep{fill: fill, dims: dims, parts: []padPart{padding(x, axes, dims)}}
	return p.add(&value{kind: kindStep, dims: dims, step: s})
}

// padding returns where the elements of a view lie in its padded copy.
func padding(x view, axes []compute.PadAxis, dims []int) padPart {
	axes = append(slices.Clone(axes), make([]compute.PadAxis, len(dims)-len(axes))...)
	q := padPart{str: rowMajor(dims)}
	src := view{x.base, x.off, slices.Clone(x.dims), slices.Clone(x.str)}
	row := rowMajor(dims)
	for i, a := range axes {
		step := a.Interior + 1
		q.str[i] *= step
		// leave out the elements that a negative padding cuts off
		first, last := a.Start, a.Start+(src.dims[i]-1)*step
		for src.dims[i] > 0 && first < 0 {
			first += step
			src.off += src.str[i]
			src.dims[i]--
		}
		for src.dims[i] > 0 && last >= dims[i] {
			last -= step
			src.dims[i]--
		}
		q.off += first * row[i]
	}
	q.src = src
	return q
}

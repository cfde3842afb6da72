package native

import (
	"slices"

	"github.com/gomlx/compute"
	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
)

// The operations. Each is recorded with what writes it again on another function; the interface's documentation says
// what it computes.

func (f *Function) unary(op compute.OpType, e func(compute.Function, Value) (Value, error), x Value) (Value, error) {
	return f.op(op, nil, func(g compute.Function, v []Value) (Value, error) { return e(g, v[0]) }, x)
}

func (f *Function) binary(op compute.OpType, e func(f compute.Function, a, b Value) (Value, error), a, b Value) (Value, error) {
	return f.op(op, nil, func(g compute.Function, v []Value) (Value, error) { return e(g, v[0], v[1]) }, a, b)
}

func (f *Function) reduce(op compute.OpType, e func(f compute.Function, x Value, axes ...int) (Value, error), x Value, axes []int) (Value, error) {
	n, err := f.node(x)
	if err != nil {
		return nil, err
	}
	axes = slices.Clone(axes)
	if len(axes) == 0 {
		for i := range n.shape.Rank() {
			axes = append(axes, i)
		}
	}
	return f.op(op, axes, func(g compute.Function, v []Value) (Value, error) { return e(g, v[0], axes...) }, x)
}

// Abs implements compute.Function.
func (f *Function) Abs(x Value) (Value, error) {
	return f.unary(compute.OpTypeAbs, compute.Function.Abs, x)
}

// BitCount implements compute.Function.
func (f *Function) BitCount(x Value) (Value, error) {
	return f.unary(compute.OpTypeBitCount, compute.Function.BitCount, x)
}

// BitwiseNot implements compute.Function.
func (f *Function) BitwiseNot(x Value) (Value, error) {
	return f.unary(compute.OpTypeBitwiseNot, compute.Function.BitwiseNot, x)
}

// Ceil implements compute.Function.
func (f *Function) Ceil(x Value) (Value, error) {
	return f.unary(compute.OpTypeCeil, compute.Function.Ceil, x)
}

// Clz implements compute.Function.
func (f *Function) Clz(x Value) (Value, error) {
	return f.unary(compute.OpTypeClz, compute.Function.Clz, x)
}

// Conj implements compute.Function.
func (f *Function) Conj(x Value) (Value, error) {
	return f.unary(compute.OpTypeConj, compute.Function.Conj, x)
}

// Cos implements compute.Function.
func (f *Function) Cos(x Value) (Value, error) {
	return f.unary(compute.OpTypeCos, compute.Function.Cos, x)
}

// Erf implements compute.Function.
func (f *Function) Erf(x Value) (Value, error) {
	return f.unary(compute.OpTypeErf, compute.Function.Erf, x)
}

// Exp implements compute.Function.
func (f *Function) Exp(x Value) (Value, error) {
	return f.unary(compute.OpTypeExp, compute.Function.Exp, x)
}

// Expm1 implements compute.Function.
func (f *Function) Expm1(x Value) (Value, error) {
	return f.unary(compute.OpTypeExpm1, compute.Function.Expm1, x)
}

// Floor implements compute.Function.
func (f *Function) Floor(x Value) (Value, error) {
	return f.unary(compute.OpTypeFloor, compute.Function.Floor, x)
}

// Imag implements compute.Function.
func (f *Function) Imag(x Value) (Value, error) {
	return f.unary(compute.OpTypeImag, compute.Function.Imag, x)
}

// IsFinite implements compute.Function.
func (f *Function) IsFinite(x Value) (Value, error) {
	return f.unary(compute.OpTypeIsFinite, compute.Function.IsFinite, x)
}

// IsNaN implements compute.Function.
func (f *Function) IsNaN(x Value) (Value, error) {
	return f.unary(compute.OpTypeIsNaN, compute.Function.IsNaN, x)
}

// Log implements compute.Function.
func (f *Function) Log(x Value) (Value, error) {
	return f.unary(compute.OpTypeLog, compute.Function.Log, x)
}

// Log1p implements compute.Function.
func (f *Function) Log1p(x Value) (Value, error) {
	return f.unary(compute.OpTypeLog1p, compute.Function.Log1p, x)
}

// LogicalNot implements compute.Function.
func (f *Function) LogicalNot(x Value) (Value, error) {
	return f.unary(compute.OpTypeLogicalNot, compute.Function.LogicalNot, x)
}

// Logistic implements compute.Function.
func (f *Function) Logistic(x Value) (Value, error) {
	return f.unary(compute.OpTypeLogistic, compute.Function.Logistic, x)
}

// Neg implements compute.Function.
func (f *Function) Neg(x Value) (Value, error) {
	return f.unary(compute.OpTypeNeg, compute.Function.Neg, x)
}

// Real implements compute.Function.
func (f *Function) Real(x Value) (Value, error) {
	return f.unary(compute.OpTypeReal, compute.Function.Real, x)
}

// Round implements compute.Function.
func (f *Function) Round(x Value) (Value, error) {
	return f.unary(compute.OpTypeRound, compute.Function.Round, x)
}

// Rsqrt implements compute.Function.
func (f *Function) Rsqrt(x Value) (Value, error) {
	return f.unary(compute.OpTypeRsqrt, compute.Function.Rsqrt, x)
}

// Sign implements compute.Function.
func (f *Function) Sign(x Value) (Value, error) {
	return f.unary(compute.OpTypeSign, compute.Function.Sign, x)
}

// Sin implements compute.Function.
func (f *Function) Sin(x Value) (Value, error) {
	return f.unary(compute.OpTypeSin, compute.Function.Sin, x)
}

// Sqrt implements compute.Function.
func (f *Function) Sqrt(x Value) (Value, error) {
	return f.unary(compute.OpTypeSqrt, compute.Function.Sqrt, x)
}

// Tanh implements compute.Function.
func (f *Function) Tanh(x Value) (Value, error) {
	return f.unary(compute.OpTypeTanh, compute.Function.Tanh, x)
}

// Add implements compute.Function.
func (f *Function) Add(a, b Value) (Value, error) {
	return f.binary(compute.OpTypeAdd, compute.Function.Add, a, b)
}

// Atan2 implements compute.Function.
func (f *Function) Atan2(a, b Value) (Value, error) {
	return f.binary(compute.OpTypeAtan2, compute.Function.Atan2, a, b)
}

// BitwiseAnd implements compute.Function.
func (f *Function) BitwiseAnd(a, b Value) (Value, error) {
	return f.binary(compute.OpTypeBitwiseAnd, compute.Function.BitwiseAnd, a, b)
}

// BitwiseOr implements compute.Function.
func (f *Function) BitwiseOr(a, b Value) (Value, error) {
	return f.binary(compute.OpTypeBitwiseOr, compute.Function.BitwiseOr, a, b)
}

// BitwiseXor implements compute.Function.
func (f *Function) BitwiseXor(a, b Value) (Value, error) {
	return f.binary(compute.OpTypeBitwiseXor, compute.Function.BitwiseXor, a, b)
}

// Complex implements compute.Function.
func (f *Function) Complex(a, b Value) (Value, error) {
	return f.binary(compute.OpTypeComplex, compute.Function.Complex, a, b)
}

// Div implements compute.Function.
func (f *Function) Div(a, b Value) (Value, error) {
	return f.binary(compute.OpTypeDiv, compute.Function.Div, a, b)
}

// Equal implements compute.Function.
func (f *Function) Equal(a, b Value) (Value, error) {
	return f.binary(compute.OpTypeEqual, compute.Function.Equal, a, b)
}

// EqualTotalOrder implements compute.Function.
func (f *Function) EqualTotalOrder(a, b Value) (Value, error) {
	return f.binary(compute.OpTypeEqualTotalOrder, compute.Function.EqualTotalOrder, a, b)
}

// GreaterOrEqual implements compute.Function.
func (f *Function) GreaterOrEqual(a, b Value) (Value, error) {
	return f.binary(compute.OpTypeGreaterOrEqual, compute.Function.GreaterOrEqual, a, b)
}

// GreaterOrEqualTotalOrder implements compute.Function.
func (f *Function) GreaterOrEqualTotalOrder(a, b Value) (Value, error) {
	return f.binary(compute.OpTypeGreaterOrEqualTotalOrder, compute.Function.GreaterOrEqualTotalOrder, a, b)
}

// GreaterThan implements compute.Function.
func (f *Function) GreaterThan(a, b Value) (Value, error) {
	return f.binary(compute.OpTypeGreaterThan, compute.Function.GreaterThan, a, b)
}

// GreaterThanTotalOrder implements compute.Function.
func (f *Function) GreaterThanTotalOrder(a, b Value) (Value, error) {
	return f.binary(compute.OpTypeGreaterThanTotalOrder, compute.Function.GreaterThanTotalOrder, a, b)
}

// LessOrEqual implements compute.Function.
func (f *Function) LessOrEqual(a, b Value) (Value, error) {
	return f.binary(compute.OpTypeLessOrEqual, compute.Function.LessOrEqual, a, b)
}

// LessOrEqualTotalOrder implements compute.Function.
func (f *Function) LessOrEqualTotalOrder(a, b Value) (Value, error) {
	return f.binary(compute.OpTypeLessOrEqualTotalOrder, compute.Function.LessOrEqualTotalOrder, a, b)
}

// LessThan implements compute.Function.
func (f *Function) LessThan(a, b Value) (Value, error) {
	return f.binary(compute.OpTypeLessThan, compute.Function.LessThan, a, b)
}

// LessThanTotalOrder implements compute.Function.
func (f *Function) LessThanTotalOrder(a, b Value) (Value, error) {
	return f.binary(compute.OpTypeLessThanTotalOrder, compute.Function.LessThanTotalOrder, a, b)
}

// LogicalAnd implements compute.Function.
func (f *Function) LogicalAnd(a, b Value) (Value, error) {
	return f.binary(compute.OpTypeLogicalAnd, compute.Function.LogicalAnd, a, b)
}

// LogicalOr implements compute.Function.
func (f *Function) LogicalOr(a, b Value) (Value, error) {
	return f.binary(compute.OpTypeLogicalOr, compute.Function.LogicalOr, a, b)
}

// LogicalXor implements compute.Function.
func (f *Function) LogicalXor(a, b Value) (Value, error) {
	return f.binary(compute.OpTypeLogicalXor, compute.Function.LogicalXor, a, b)
}

// Max implements compute.Function.
func (f *Function) Max(a, b Value) (Value, error) {
	return f.binary(compute.OpTypeMax, compute.Function.Max, a, b)
}

// Min implements compute.Function.
func (f *Function) Min(a, b Value) (Value, error) {
	return f.binary(compute.OpTypeMin, compute.Function.Min, a, b)
}

// Mul implements compute.Function.
func (f *Function) Mul(a, b Value) (Value, error) {
	return f.binary(compute.OpTypeMul, compute.Function.Mul, a, b)
}

// NotEqual implements compute.Function.
func (f *Function) NotEqual(a, b Value) (Value, error) {
	return f.binary(compute.OpTypeNotEqual, compute.Function.NotEqual, a, b)
}

// NotEqualTotalOrder implements compute.Function.
func (f *Function) NotEqualTotalOrder(a, b Value) (Value, error) {
	return f.binary(compute.OpTypeNotEqualTotalOrder, compute.Function.NotEqualTotalOrder, a, b)
}

// Pow implements compute.Function.
func (f *Function) Pow(a, b Value) (Value, error) {
	return f.binary(compute.OpTypePow, compute.Function.Pow, a, b)
}

// Rem implements compute.Function.
func (f *Function) Rem(a, b Value) (Value, error) {
	return f.binary(compute.OpTypeRem, compute.Function.Rem, a, b)
}

// ShiftLeft implements compute.Function.
func (f *Function) ShiftLeft(a, b Value) (Value, error) {
	return f.binary(compute.OpTypeShiftLeft, compute.Function.ShiftLeft, a, b)
}

// ShiftRightArithmetic implements compute.Function.
func (f *Function) ShiftRightArithmetic(a, b Value) (Value, error) {
	return f.binary(compute.OpTypeShiftRightArithmetic, compute.Function.ShiftRightArithmetic, a, b)
}

// ShiftRightLogical implements compute.Function.
func (f *Function) ShiftRightLogical(a, b Value) (Value, error) {
	return f.binary(compute.OpTypeShiftRightLogical, compute.Function.ShiftRightLogical, a, b)
}

// Sub implements compute.Function.
func (f *Function) Sub(a, b Value) (Value, error) {
	return f.binary(compute.OpTypeSub, compute.Function.Sub, a, b)
}

// ReduceBitwiseAnd implements compute.Function.
func (f *Function) ReduceBitwiseAnd(x Value, axes ...int) (Value, error) {
	return f.reduce(compute.OpTypeReduceBitwiseAnd, compute.Function.ReduceBitwiseAnd, x, axes)
}

// ReduceBitwiseOr implements compute.Function.
func (f *Function) ReduceBitwiseOr(x Value, axes ...int) (Value, error) {
	return f.reduce(compute.OpTypeReduceBitwiseOr, compute.Function.ReduceBitwiseOr, x, axes)
}

// ReduceBitwiseXor implements compute.Function.
func (f *Function) ReduceBitwiseXor(x Value, axes ...int) (Value, error) {
	return f.reduce(compute.OpTypeReduceBitwiseXor, compute.Function.ReduceBitwiseXor, x, axes)
}

// ReduceLogicalAnd implements compute.Function.
func (f *Function) ReduceLogicalAnd(x Value, axes ...int) (Value, error) {
	return f.reduce(compute.OpTypeReduceLogicalAnd, compute.Function.ReduceLogicalAnd, x, axes)
}

// ReduceLogicalOr implements compute.Function.
func (f *Function) ReduceLogicalOr(x Value, axes ...int) (Value, error) {
	return f.reduce(compute.OpTypeReduceLogicalOr, compute.Function.ReduceLogicalOr, x, axes)
}

// ReduceLogicalXor implements compute.Function.
func (f *Function) ReduceLogicalXor(x Value, axes ...int) (Value, error) {
	return f.reduce(compute.OpTypeReduceLogicalXor, compute.Function.ReduceLogicalXor, x, axes)
}

// ReduceMax implements compute.Function.
func (f *Function) ReduceMax(x Value, axes ...int) (Value, error) {
	return f.reduce(compute.OpTypeReduceMax, compute.Function.ReduceMax, x, axes)
}

// ReduceMin implements compute.Function.
func (f *Function) ReduceMin(x Value, axes ...int) (Value, error) {
	return f.reduce(compute.OpTypeReduceMin, compute.Function.ReduceMin, x, axes)
}

// ReduceProduct implements compute.Function.
func (f *Function) ReduceProduct(x Value, axes ...int) (Value, error) {
	return f.reduce(compute.OpTypeReduceProduct, compute.Function.ReduceProduct, x, axes)
}

// ReduceSum implements compute.Function.
func (f *Function) ReduceSum(x Value, axes ...int) (Value, error) {
	return f.reduce(compute.OpTypeReduceSum, compute.Function.ReduceSum, x, axes)
}

// Identity implements compute.Function.
func (f *Function) Identity(x Value) (Value, error) {
	n, err := f.node(x)
	if err != nil {
		return nil, err
	}
	if n.fn == f {
		return x, nil
	}
	return f.unary(compute.OpTypeIdentity, compute.Function.Identity, x)
}

// Clamp implements compute.Function.
func (f *Function) Clamp(low, x, high Value) (Value, error) {
	v, err := f.Max(low, x)
	if err != nil {
		return nil, err
	}
	return f.Min(v, high)
}

// Where implements compute.Function.
func (f *Function) Where(cond, a, b Value) (Value, error) {
	return f.op(compute.OpTypeWhere, nil, func(g compute.Function, v []Value) (Value, error) { return g.Where(v[0], v[1], v[2]) }, cond, a, b)
}

// ConvertDType implements compute.Function.
func (f *Function) ConvertDType(x Value, dtype dtypes.DType) (Value, error) {
	return f.op(compute.OpTypeConvertDType, dtype, func(g compute.Function, v []Value) (Value, error) { return g.ConvertDType(v[0], dtype) }, x)
}

// Bitcast implements compute.Function.
func (f *Function) Bitcast(x Value, dtype dtypes.DType) (Value, error) {
	return f.op(compute.OpTypeBitcast, dtype, func(g compute.Function, v []Value) (Value, error) { return g.Bitcast(v[0], dtype) }, x)
}

// Iota implements compute.Function.
func (f *Function) Iota(shape shapes.Shape, axis int) (Value, error) {
	shape = shape.Clone()
	return f.op(compute.OpTypeIota, axis, func(g compute.Function, _ []Value) (Value, error) { return g.Iota(shape, axis) })
}

// Reshape implements compute.Function.
func (f *Function) Reshape(x Value, dims ...int) (Value, error) {
	dims = slices.Clone(dims)
	return f.op(compute.OpTypeReshape, nil, func(g compute.Function, v []Value) (Value, error) { return g.Reshape(v[0], dims...) }, x)
}

// Transpose implements compute.Function.
func (f *Function) Transpose(x Value, permutation ...int) (Value, error) {
	p := slices.Clone(permutation)
	return f.op(compute.OpTypeTranspose, p, func(g compute.Function, v []Value) (Value, error) { return g.Transpose(v[0], p...) }, x)
}

// BroadcastInDim implements compute.Function.
func (f *Function) BroadcastInDim(x Value, shape shapes.Shape, axes []int) (Value, error) {
	axes, shape = slices.Clone(axes), shape.Clone()
	return f.op(compute.OpTypeBroadcastInDim, axes, func(g compute.Function, v []Value) (Value, error) {
		return g.BroadcastInDim(v[0], shape, slices.Clone(axes))
	}, x)
}

type sliceAttr struct{ starts, strides []int }

// Slice implements compute.Function.
func (f *Function) Slice(x Value, starts, limits, strides []int) (Value, error) {
	starts, limits, strides = slices.Clone(starts), slices.Clone(limits), slices.Clone(strides)
	return f.op(compute.OpTypeSlice, sliceAttr{starts, strides}, func(g compute.Function, v []Value) (Value, error) {
		return g.Slice(v[0], starts, limits, strides)
	}, x)
}

// Reverse implements compute.Function.
func (f *Function) Reverse(x Value, axes ...int) (Value, error) {
	axes = slices.Clone(axes)
	return f.op(compute.OpTypeReverse, axes, func(g compute.Function, v []Value) (Value, error) { return g.Reverse(v[0], axes...) }, x)
}

// Concatenate implements compute.Function.
func (f *Function) Concatenate(axis int, operands ...Value) (Value, error) {
	return f.op(compute.OpTypeConcatenate, axis, func(g compute.Function, v []Value) (Value, error) { return g.Concatenate(axis, v...) }, operands...)
}

// Pad implements compute.Function.
func (f *Function) Pad(x, fill Value, axes ...compute.PadAxis) (Value, error) {
	axes = slices.Clone(axes)
	return f.op(compute.OpTypePad, axes, func(g compute.Function, v []Value) (Value, error) { return g.Pad(v[0], v[1], axes...) }, x, fill)
}

type dotAttr struct{ lc, lb, rc, rb []int }

// dotTypes is a product with types of its own for the sum or the result; the portable backend computes it.
type dotTypes struct {
	dotAttr
	config compute.DotGeneralConfig
}

// DotGeneral implements compute.Function.
func (f *Function) DotGeneral(l Value, lc, lb []int, r Value, rc, rb []int, config compute.DotGeneralConfig) (Value, error) {
	a := dotAttr{slices.Clone(lc), slices.Clone(lb), slices.Clone(rc), slices.Clone(rb)}
	var attr any = a
	if config != (compute.DotGeneralConfig{}) {
		attr = dotTypes{a, config}
	}
	return f.op(compute.OpTypeDotGeneral, attr, func(g compute.Function, v []Value) (Value, error) {
		return g.DotGeneral(v[0], slices.Clone(a.lc), slices.Clone(a.lb), v[1], slices.Clone(a.rc), slices.Clone(a.rb), config)
	}, l, r)
}

type convAttr struct {
	axes             compute.ConvolveAxesConfig
	strides          []int
	pads             [][2]int
	inDil, kernDil   []int
	groups, batchGrp int
}

// ConvGeneral implements compute.Function.
func (f *Function) ConvGeneral(x, k Value, axes compute.ConvolveAxesConfig, strides []int, pads [][2]int, inDil, kernDil []int, groups, batchGroups int) (Value, error) {
	a := convAttr{axes.Clone(), slices.Clone(strides), slices.Clone(pads), slices.Clone(inDil), slices.Clone(kernDil), groups, batchGroups}
	return f.op(compute.OpTypeConvGeneral, a, func(g compute.Function, v []Value) (Value, error) {
		return g.ConvGeneral(v[0], v[1], a.axes.Clone(), slices.Clone(a.strides), slices.Clone(a.pads), slices.Clone(a.inDil), slices.Clone(a.kernDil), groups, batchGroups)
	}, x, k)
}

type gatherAttr struct {
	indexAxis                           int
	offsetAxes, collapsed, start, sizes []int
	sorted                              bool
}

// Gather implements compute.Function.
func (f *Function) Gather(x, indices Value, indexVectorAxis int, offsetOutputAxes, collapsedSliceAxes, startIndexMap, sliceSizes []int, sorted bool) (Value, error) {
	a := gatherAttr{indexVectorAxis, slices.Clone(offsetOutputAxes), slices.Clone(collapsedSliceAxes), slices.Clone(startIndexMap), slices.Clone(sliceSizes), sorted}
	return f.op(compute.OpTypeGather, a, func(g compute.Function, v []Value) (Value, error) {
		return g.Gather(v[0], v[1], a.indexAxis, slices.Clone(a.offsetAxes), slices.Clone(a.collapsed), slices.Clone(a.start), slices.Clone(a.sizes), sorted)
	}, x, indices)
}

type scatterAttr struct {
	indexAxis               int
	window, inserted, toOps []int
	sorted, unique          bool
}

type scatterFunc func(f compute.Function, x, indices, updates Value, indexVectorAxis int, window, inserted, toOperand []int, sorted, unique bool) (Value, error)

func (f *Function) scatter(op compute.OpType, e scatterFunc, x, indices, updates Value, indexVectorAxis int, window, inserted, toOperand []int, sorted, unique bool) (Value, error) {
	a := scatterAttr{indexVectorAxis, slices.Clone(window), slices.Clone(inserted), slices.Clone(toOperand), sorted, unique}
	return f.op(op, a, func(g compute.Function, v []Value) (Value, error) {
		return e(g, v[0], v[1], v[2], a.indexAxis, slices.Clone(a.window), slices.Clone(a.inserted), slices.Clone(a.toOps), sorted, unique)
	}, x, indices, updates)
}

// ScatterSum implements compute.Function.
func (f *Function) ScatterSum(x, indices, updates Value, indexVectorAxis int, window, inserted, toOperand []int, sorted, unique bool) (Value, error) {
	return f.scatter(compute.OpTypeScatterSum, compute.Function.ScatterSum, x, indices, updates, indexVectorAxis, window, inserted, toOperand, sorted, unique)
}

// ScatterMax implements compute.Function.
func (f *Function) ScatterMax(x, indices, updates Value, indexVectorAxis int, window, inserted, toOperand []int, sorted, unique bool) (Value, error) {
	return f.scatter(compute.OpTypeScatterMax, compute.Function.ScatterMax, x, indices, updates, indexVectorAxis, window, inserted, toOperand, sorted, unique)
}

// ScatterMin implements compute.Function.
func (f *Function) ScatterMin(x, indices, updates Value, indexVectorAxis int, window, inserted, toOperand []int, sorted, unique bool) (Value, error) {
	return f.scatter(compute.OpTypeScatterMin, compute.Function.ScatterMin, x, indices, updates, indexVectorAxis, window, inserted, toOperand, sorted, unique)
}

type argAttr struct {
	axis  int
	isMin bool
}

// ArgMinMax implements compute.Function.
func (f *Function) ArgMinMax(x Value, axis int, dtype dtypes.DType, isMin bool) (Value, error) {
	return f.op(compute.OpTypeArgMinMax, argAttr{axis, isMin}, func(g compute.Function, v []Value) (Value, error) { return g.ArgMinMax(v[0], axis, dtype, isMin) }, x)
}

type cumSumAttr struct {
	axis    int
	options compute.CumSumOptions
}

// CumSum implements compute.Function.
func (f *Function) CumSum(x Value, axis int, o compute.CumSumOptions) (Value, error) {
	return f.op(compute.OpTypeCumSum, cumSumAttr{axis, o}, func(g compute.Function, v []Value) (Value, error) { return g.CumSum(v[0], axis, o) }, x)
}

// DynamicSlice implements compute.Function.
func (f *Function) DynamicSlice(x Value, starts []Value, sizes []int) (Value, error) {
	sizes = slices.Clone(sizes)
	return f.op(compute.OpTypeDynamicSlice, sizes, func(g compute.Function, v []Value) (Value, error) {
		return g.DynamicSlice(v[0], slices.Clone(v[1:]), slices.Clone(sizes))
	}, append([]Value{x}, starts...)...)
}

// DynamicUpdateSlice implements compute.Function.
func (f *Function) DynamicUpdateSlice(x, update Value, starts []Value) (Value, error) {
	return f.op(compute.OpTypeDynamicUpdateSlice, nil, func(g compute.Function, v []Value) (Value, error) {
		return g.DynamicUpdateSlice(v[0], v[1], slices.Clone(v[2:]))
	}, append([]Value{x, update}, starts...)...)
}

type windowAttr struct {
	reduce                          compute.ReduceOpType
	size, strides, inDil, windowDil []int
	pads                            [][2]int
}

// ReduceWindow implements compute.Function.
func (f *Function) ReduceWindow(x Value, reduce compute.ReduceOpType, size, strides, inDil, windowDil []int, pads [][2]int) (Value, error) {
	a := windowAttr{reduce, slices.Clone(size), slices.Clone(strides), slices.Clone(inDil), slices.Clone(windowDil), slices.Clone(pads)}
	return f.op(compute.OpTypeReduceWindow, a, func(g compute.Function, v []Value) (Value, error) {
		return g.ReduceWindow(v[0], reduce, slices.Clone(a.size), slices.Clone(a.strides), slices.Clone(a.inDil), slices.Clone(a.windowDil), slices.Clone(a.pads))
	}, x)
}

// SelectAndScatterMax implements compute.Function.
func (f *Function) SelectAndScatterMax(x, source Value, size, strides []int, pads [][2]int) (Value, error) {
	a := windowAttr{reduce: compute.ReduceOpMax, size: slices.Clone(size), strides: slices.Clone(strides), pads: slices.Clone(pads)}
	return f.op(compute.OpTypeSelectAndScatterMax, a, func(g compute.Function, v []Value) (Value, error) {
		return g.SelectAndScatterMax(v[0], v[1], slices.Clone(a.size), slices.Clone(a.strides), slices.Clone(a.pads))
	}, x, source)
}

// SelectAndScatterMin implements compute.Function.
func (f *Function) SelectAndScatterMin(x, source Value, size, strides []int, pads [][2]int) (Value, error) {
	a := windowAttr{reduce: compute.ReduceOpMin, size: slices.Clone(size), strides: slices.Clone(strides), pads: slices.Clone(pads)}
	return f.op(compute.OpTypeSelectAndScatterMin, a, func(g compute.Function, v []Value) (Value, error) {
		return g.SelectAndScatterMin(v[0], v[1], slices.Clone(a.size), slices.Clone(a.strides), slices.Clone(a.pads))
	}, x, source)
}

// RNGBitGenerator implements compute.Function.
func (f *Function) RNGBitGenerator(state Value, shape shapes.Shape) (newState, bits Value, err error) {
	shape = shape.Clone()
	n, err := f.record(compute.OpTypeRNGBitGenerator, nil, func(g compute.Function, v []Value) ([]Value, error) {
		s, b, err := g.RNGBitGenerator(v[0], shape)
		return []Value{s, b}, err
	}, state)
	if err != nil {
		return nil, nil, err
	}
	return n[0], n[1], nil
}

// OptimizationBarrier implements compute.Function. The planner does not look for what it would have to stop at.
func (f *Function) OptimizationBarrier(operands ...Value) ([]Value, error) {
	for _, v := range operands {
		if _, err := f.node(v); err != nil {
			return nil, err
		}
	}
	return operands, nil
}

// SchedulingBarrier implements compute.Function.
func (f *Function) SchedulingBarrier(operand Value, dependencies ...Value) (Value, error) {
	return f.op(compute.OpTypeSchedulingBarrier, nil, func(g compute.Function, v []Value) (Value, error) {
		return g.SchedulingBarrier(v[0], v[1:]...)
	}, append([]Value{operand}, dependencies...)...)
}

package native

import (
	"cmp"
	"math"
	"math/bits"
	"unsafe"

	"github.com/gomlx/compute"
	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/dtypes/bfloat16"
	"github.com/gomlx/compute/dtypes/float16"
)

// Values of other types than float32: integers, booleans that stay such, float64. They are computed by plain Go loops,
// one operation at a time, so that the integers of a training step (labels, indices, random bits, counters) need not go
// over to the portable backend and back. Half-precision and complex values are moved, but not computed with.

type integer interface {
	int8 | int16 | int32 | int64 | uint8 | uint16 | uint32 | uint64
}

type number interface{ integer | float32 | float64 }

// typeOps is what is known of one type. Functions that are missing, or return nil, leave an operation to the portable
// backend.
type typeOps struct {
	size    int
	cast    func(words []float32, n int) any
	place   func(dst *value, parts []padPart, fill view) step
	gather  func(gatherPlan) step
	where   func(dst *value, cond, a, b view) step
	update  func(dst *value, x, update view, starts []view) step
	permute func(dst, src *value, at, str int, perm []int)

	unary   func(op compute.OpType, dst *value, x view) step
	binary  func(op compute.OpType, dst *value, a, b view) step
	compare func(op compute.OpType, dst *value, a, b view) step
	reduce  func(op compute.OpType, dst *value, x view, axes []int) step
	cumSum  func(dst *value, x view, a cumSumAttr) step
	iota    func(dst *value, axis int) step
	argBest func(x view, a argAttr) func(i int) int
	less    func(op compute.OpType, x view, at, str int) func(i, j int) bool
	// by intermediate type: int64, or uint64 for uint64, or float64
	load  [3]any
	store [3]any
	via   int
}

var typeTable = map[dtypes.DType]*typeOps{
	dtypes.Bool: moved[bool](), dtypes.Float16: moved[float16.Float16](), dtypes.BFloat16: moved[bfloat16.BFloat16](),
	dtypes.Complex64: moved[complex64](), dtypes.Complex128: moved[complex128](),
	dtypes.Int8: integers[int8](), dtypes.Int16: integers[int16](), dtypes.Int32: integers[int32](), dtypes.Int64: integers[int64](),
	dtypes.Uint8: integers[uint8](), dtypes.Uint16: integers[uint16](), dtypes.Uint32: integers[uint32](), dtypes.Uint64: integers[uint64](),
	dtypes.Float32: numbers[float32](), dtypes.Float64: floats(),
}

// typed returns what is known of a type, or nil for types of which several elements share a byte.
func typed(d dtypes.DType) *typeOps { return typeTable[d] }

// flat returns the memory of a value of type T.
func flat[T any](v *value) []T {
	if v.flat != nil {
		return v.flat.([]T)
	}
	return any(v.buf).([]T)
}

func moved[T any]() *typeOps {
	var z T
	return &typeOps{
		size: int(unsafe.Sizeof(z)),
		cast: func(words []float32, n int) any {
			if n == 0 {
				return []T{}
			}
			return unsafe.Slice((*T)(unsafe.Pointer(unsafe.SliceData(words))), n)
		},
		update: newUpdate[T],
		permute: func(dst, src *value, at, str int, perm []int) {
			d, f := flat[T](dst), flat[T](src)
			for i, from := range perm {
				d[at+i*str] = f[at+from*str]
			}
		},
		place:  newPlace[T],
		gather: newGather[T],
		where: func(dst *value, cond, a, b view) step {
			return &whereStep[T]{dst: dst, cond: newOperand[float32](cond), a: newOperand[T](a), b: newOperand[T](b)}
		},
	}
}

func numbers[T number]() *typeOps {
	t := moved[T]()
	t.compare = newCompare[T]
	t.iota = func(dst *value, axis int) step { return &iotaStep[T]{dst, axis} }
	t.argBest = argBest[T]
	t.less = lessOf[T]
	t.reduce = func(op compute.OpType, dst *value, x view, axes []int) step {
		return newTypedFold(dst, x, axes, arithmetic[T](op))
	}
	t.cumSum = func(dst *value, x view, a cumSumAttr) step { return newCumSum[T](dst, x, a) }
	t.load = [3]any{loadAs[T, int64], loadAs[T, uint64], loadAs[T, float64]}
	t.store = [3]any{storeAs[int64, T], storeAs[uint64, T], storeAs[float64, T]}
	t.via = 2
	return t
}

func integers[T integer]() *typeOps {
	t := numbers[T]()
	if t.via = 0; T(0)-1 > 0 && t.size == 8 {
		t.via = 1
	}
	t.unary = func(op compute.OpType, dst *value, x view) step { return newMap(dst, integerUnary[T](op), x) }
	t.binary = func(op compute.OpType, dst *value, a, b view) step { return newMap2(dst, integerBinary[T](op), a, b) }
	t.reduce = func(op compute.OpType, dst *value, x view, axes []int) step {
		return newTypedFold(dst, x, axes, integerFold[T](op))
	}
	return t
}

func floats() *typeOps {
	t := numbers[float64]()
	t.unary = func(op compute.OpType, dst *value, x view) step { return newMap(dst, floatUnary(op), x) }
	t.binary = func(op compute.OpType, dst *value, a, b view) step { return newMap2(dst, floatBinary(op), a, b) }
	return t
}

// each lifts a function of one element.
func each[T, D any](f func(T) D) func(d []D, x []T) {
	return func(d []D, x []T) {
		x = x[:len(d)]
		for i, v := range x {
			d[i] = f(v)
		}
	}
}

func each2[T, D any](f func(a, b T) D) func(d []D, a, b []T) {
	return func(d []D, a, b []T) {
		a, b = a[:len(d)], b[:len(d)]
		for i, v := range a {
			d[i] = f(v, b[i])
		}
	}
}

func integerUnary[T integer](op compute.OpType) func(d, x []T) {
	switch op {
	case compute.OpTypeNeg:
		return each(func(x T) T { return -x })
	case compute.OpTypeAbs:
		return each(func(x T) T {
			if x < 0 {
				return -x
			}
			return x
		})
	case compute.OpTypeSign:
		return each(func(x T) T { return T(cmp.Compare(x, 0)) })
	case compute.OpTypeBitwiseNot:
		return each(func(x T) T { return ^x })
	case compute.OpTypeBitCount:
		return each(func(x T) T { return T(bits.OnesCount64(unsigned(x))) })
	case compute.OpTypeClz:
		width := int(8 * unsafe.Sizeof(T(0)))
		return each(func(x T) T { return T(bits.LeadingZeros64(unsigned(x)) - 64 + width) })
	}
	return nil
}

// unsigned returns the bits of an integer.
func unsigned[T integer](x T) uint64 {
	return uint64(x) << (64 - 8*unsafe.Sizeof(x)) >> (64 - 8*unsafe.Sizeof(x))
}

// arithmetic returns the functions that all numbers have.
func arithmetic[T number](op compute.OpType) func(a, b T) T {
	switch op {
	case compute.OpTypeAdd, compute.OpTypeReduceSum:
		return func(a, b T) T { return a + b }
	case compute.OpTypeSub:
		return func(a, b T) T { return a - b }
	case compute.OpTypeMul, compute.OpTypeReduceProduct:
		return func(a, b T) T { return a * b }
	case compute.OpTypeDiv:
		return func(a, b T) T { return a / b }
	case compute.OpTypeMax, compute.OpTypeReduceMax:
		return func(a, b T) T { return max(a, b) }
	case compute.OpTypeMin, compute.OpTypeReduceMin:
		return func(a, b T) T { return min(a, b) }
	}
	return nil
}

func integerFold[T integer](op compute.OpType) func(a, b T) T {
	switch op {
	case compute.OpTypeReduceBitwiseAnd, compute.OpTypeBitwiseAnd:
		return func(a, b T) T { return a & b }
	case compute.OpTypeReduceBitwiseOr, compute.OpTypeBitwiseOr:
		return func(a, b T) T { return a | b }
	case compute.OpTypeReduceBitwiseXor, compute.OpTypeBitwiseXor:
		return func(a, b T) T { return a ^ b }
	}
	return arithmetic[T](op)
}

func integerBinary[T integer](op compute.OpType) func(d, a, b []T) {
	f := integerFold[T](op)
	switch op {
	case compute.OpTypeRem:
		f = func(a, b T) T { return a % b }
	case compute.OpTypeShiftLeft:
		f = func(a, b T) T { return a << uint(b) }
	case compute.OpTypeShiftRightArithmetic:
		f = func(a, b T) T { return a >> uint(b) }
	case compute.OpTypeShiftRightLogical:
		f = func(a, b T) T { return T(unsigned(a) >> uint(b)) }
	}
	if f == nil {
		return nil
	}
	return each2(f)
}

var floatFunctions = map[compute.OpType]func(x float64) float64{
	compute.OpTypeNeg: func(x float64) float64 { return -x }, compute.OpTypeAbs: math.Abs, compute.OpTypeSqrt: math.Sqrt,
	compute.OpTypeRsqrt: func(x float64) float64 { return 1 / math.Sqrt(x) }, compute.OpTypeExp: math.Exp, compute.OpTypeLog: math.Log,
	compute.OpTypeExpm1: math.Expm1, compute.OpTypeLog1p: math.Log1p, compute.OpTypeTanh: math.Tanh, compute.OpTypeErf: math.Erf,
	compute.OpTypeSin: math.Sin, compute.OpTypeCos: math.Cos, compute.OpTypeFloor: math.Floor, compute.OpTypeCeil: math.Ceil,
	compute.OpTypeRound: math.RoundToEven, compute.OpTypeSign: func(x float64) float64 {
		if x > 0 {
			return 1
		} else if x < 0 {
			return -1
		}
		return 0
	},
}

func floatUnary(op compute.OpType) func(d, x []float64) {
	if f := floatFunctions[op]; f != nil {
		return each(f)
	}
	return nil
}

func floatBinary(op compute.OpType) func(d, a, b []float64) {
	if f := arithmetic[float64](op); f != nil {
		return each2(f)
	}
	return nil
}

// newCompare returns a step that writes a mask.
func newCompare[T number](op compute.OpType, dst *value, a, b view) step {
	switch op {
	case compute.OpTypeGreaterThan:
		return newCompare[T](compute.OpTypeLessThan, dst, b, a)
	case compute.OpTypeGreaterOrEqual:
		return newCompare[T](compute.OpTypeLessOrEqual, dst, b, a)
	}
	return newMap2(dst, comparison[T](op), a, b)
}

// comparison returns the loop of a comparison, without a call for each element: one-hot rows are many of them.
func comparison[T number](op compute.OpType) func(d []float32, a, b []T) {
	switch op {
	case compute.OpTypeEqual:
		return func(d []float32, a, b []T) {
			for i := range d {
				d[i] = mask(a[i] == b[i])
			}
		}
	case compute.OpTypeNotEqual:
		return func(d []float32, a, b []T) {
			for i := range d {
				d[i] = mask(a[i] != b[i])
			}
		}
	case compute.OpTypeLessThan:
		return func(d []float32, a, b []T) {
			for i := range d {
				d[i] = mask(a[i] < b[i])
			}
		}
	case compute.OpTypeLessOrEqual:
		return func(d []float32, a, b []T) {
			for i := range d {
				d[i] = mask(a[i] <= b[i])
			}
		}
	}
	return nil
}

// lessOf compares two elements of a row that begins at a place.
func lessOf[T number](op compute.OpType, x view, at, str int) func(i, j int) bool {
	f := flat[T](x.base)
	switch op {
	case compute.OpTypeLessThan:
		return func(i, j int) bool { return f[at+i*str] < f[at+j*str] }
	case compute.OpTypeLessOrEqual:
		return func(i, j int) bool { return f[at+i*str] <= f[at+j*str] }
	case compute.OpTypeGreaterThan:
		return func(i, j int) bool { return f[at+i*str] > f[at+j*str] }
	case compute.OpTypeGreaterOrEqual:
		return func(i, j int) bool { return f[at+i*str] >= f[at+j*str] }
	}
	return nil
}

// loadAs reads elements of an operand, from a place in their order on, as another type.
func loadAs[T, V number](o *stridedView, d []V, at int) {
	src := flat[T](o.base)
	o.walk(at, len(d), func(k, from, str, n int) {
		for i := range n {
			d[k+i] = V(src[from+i*str])
		}
	})
}

func storeAs[V, D number](v *value, at int, s []V) {
	d := flat[D](v)[at:][:len(s)]
	for i, x := range s {
		d[i] = D(x)
	}
}

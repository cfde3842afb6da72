package native_test

import (
	"fmt"
	"math"
	"slices"
	"testing"

	"github.com/gomlx/compute"
	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	. "github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine/kernel"
	"github.com/lathe-ml/lathe/engine/native"
)

// levels opens a backend for each processor level that is here.
func levels(t *testing.T) (all []*native.Backend) {
	top, _ := kernel.Detect()
	for l := kernel.Generic; l <= top; l++ {
		all = append(all, native.OpenWatched(t, "threads=2,isa="+l.String()))
	}
	return all
}

func isEqual(a, b float64) bool {
	return a == b || math.IsNaN(a) && math.IsNaN(b) || math.Abs(a-b) <= 1e-5*math.Max(1, math.Abs(b))
}

// TestSpecialValuesFlow holds NaN, infinities and signed zero against the functions of package math, at every place of
// vectors of several lengths.
func TestSpecialValuesFlow(t *testing.T) {
	nan, inf := math.NaN(), math.Inf(1)
	specials := []float64{nan, inf, -inf, 0, math.Copysign(0, -1), 1, -1, 2.5, 1e30, -1e30, 88, -104}
	mask := func(b bool) float64 {
		if b {
			return 1
		}
		return 0
	}
	number := func(x *Node) *Node { return ConvertDType(x, dtypes.Float32) }
	one := map[string]struct {
		node func(x *Node) *Node
		f    func(x float64) float64
	}{
		"exp": {Exp, math.Exp}, "log": {Log, math.Log}, "sqrt": {Sqrt, math.Sqrt}, "tanh": {Tanh, math.Tanh}, "erf": {Erf, math.Erf},
		"logistic": {Sigmoid, func(x float64) float64 { return 1 / (1 + math.Exp(-x)) }},
		"abs":      {Abs, math.Abs}, "neg": {Neg, func(x float64) float64 { return -x }}, "floor": {Floor, math.Floor},
		"rsqrt": {Rsqrt, func(x float64) float64 { return 1 / math.Sqrt(x) }},
		"log1p": {Log1P, math.Log1p}, "isNaN": {func(x *Node) *Node { return number(IsNaN(x)) }, func(x float64) float64 { return mask(x != x) }},
		"isFinite": {func(x *Node) *Node { return number(IsFinite(x)) }, func(x float64) float64 { return mask(x-x == 0) }},
	}
	two := map[string]struct {
		node func(x, y *Node) *Node
		f    func(x, y float64) float64
	}{
		"add": {Add, func(x, y float64) float64 { return x + y }}, "sub": {Sub, func(x, y float64) float64 { return x - y }},
		"mul": {Mul, func(x, y float64) float64 { return float64(float32(x * y)) }},
		"div": {Div, func(x, y float64) float64 { return float64(float32(x / y)) }},
		"max": {Max, func(x, y float64) float64 { return max(x, y) }}, "min": {Min, func(x, y float64) float64 { return min(x, y) }},
		"less":  {func(x, y *Node) *Node { return number(LessThan(x, y)) }, func(x, y float64) float64 { return mask(x < y) }},
		"equal": {func(x, y *Node) *Node { return number(Equal(x, y)) }, func(x, y float64) float64 { return mask(x == y) }},
		"other": {func(x, y *Node) *Node { return number(NotEqual(x, y)) }, func(x, y float64) float64 { return mask(x != y) }},
		"where": {func(x, y *Node) *Node { return Where(GreaterOrEqual(x, y), x, y) }, func(x, y float64) float64 {
			if x >= y {
				return x
			}
			return y
		}},
	}
	var x, y []float32
	for _, a := range specials {
		for _, b := range specials {
			x, y = append(x, float32(a)), append(y, float32(b))
		}
	}
	for _, b := range levels(t) {
		for _, n := range []int{len(x), 1, 17} {
			for name, c := range one {
				out := call(t, b, func(in []*Node) []*Node { return []*Node{c.node(in[0])} }, x[:n])
				for i, v := range tensors.MustCopyFlatData[float32](out[0]) {
					if want := c.f(float64(x[i])); !isEqual(float64(v), float64(float32(want))) {
						t.Errorf("%s: %s(%g) = %g, want %g", b.Description(), name, x[i], v, want)
					}
				}
			}
			for name, c := range two {
				out := call(t, b, func(in []*Node) []*Node { return []*Node{c.node(in[0], in[1])} }, x[:n], y[:n])
				for i, v := range tensors.MustCopyFlatData[float32](out[0]) {
					if want := c.f(float64(x[i]), float64(y[i])); !isEqual(float64(v), float64(float32(want))) {
						t.Errorf("%s: %s(%g, %g) = %g, want %g", b.Description(), name, x[i], y[i], v, want)
					}
				}
			}
		}
	}
}

// TestDivisionOfRows divides long rows by one number each, and all by one, where the program multiplies by the inverse if
// that is safe: with every special value in the place of a divisor, alone in its row.
func TestDivisionOfRows(t *testing.T) {
	nan, inf := float32(math.NaN()), float32(math.Inf(1))
	tiny := math.Float32frombits(3) // its inverse is infinite
	divisors := []float32{3, -7, 1e30, 0x1p-126, -0x1p126, 0x1p127, math.MaxFloat32, tiny, -tiny, 0, float32(math.Copysign(0, -1)), inf, -inf, nan}
	const cols = 48
	for _, b := range levels(t) {
		for _, rows := range []int{1, 5, 70} {
			for at, d := range divisors {
				x, y := make([]float32, rows*cols), make([]float32, rows)
				for i := range x {
					x[i] = divisors[(i+at)%len(divisors)] * []float32{1, 1e-3, 0.1}[i%3]
				}
				for i := range y {
					y[i] = float32(i%9) - 4.5
				}
				y[at%rows] = d
				out := call(t, b, func(in []*Node) []*Node {
					x := Reshape(in[0], rows, cols)
					return []*Node{Div(x, Reshape(in[1], rows, 1)), Div(x, Reshape(Slice(in[1], AxisElem(at%rows)), 1, 1))}
				}, x, y)
				for k, o := range out {
					for i, got := range tensors.MustCopyFlatData[float32](o) {
						by := d
						if k == 0 {
							by = y[i/cols]
						}
						want := float64(x[i] / by)
						near := math.Abs(float64(got)-want) <= 2.5e-7*math.Abs(want)+0x1p-149
						if !near && !isEqual(float64(got), want) {
							t.Fatalf("%s: %d rows: %g / %g = %g, want %g", b.Description(), rows, x[i], by, got, want)
						}
					}
				}
			}
		}
	}
}

// TestSpecialValuesReachWhatTheyShould puts one NaN or infinity into sums, products and softmax: it shows in what
// depends on it, and nowhere else.
func TestSpecialValuesReachWhatTheyShould(t *testing.T) {
	for _, b := range levels(t) {
		for _, n := range []int{3, 17, 40} {
			for _, special := range []float32{float32(math.NaN()), float32(math.Inf(1))} {
				for at := range n {
					x := make([]float32, n*n)
					for i := range x {
						x[i] = float32(i%7) - 3
					}
					x[at*n+(at*5)%n] = special
					out := call(t, b, func(in []*Node) []*Node {
						x := in[0]
						return []*Node{
							ReduceSum(x, 1), ReduceMax(x, 1), Dot(x, OnesLike(x)).MatMul(), Softmax(x, 1), ReduceSum(Dot(x, ZerosLike(x)).MatMul(), 1),
						}
					}, tensors.FromFlatDataAndDimensions(x, n, n))
					for k, o := range out {
						v := tensors.MustCopyFlatData[float32](o)
						for i := range v {
							row := i / (len(v) / n)
							finite := v[i]-v[i] == 0
							if row != at && !finite || row == at && finite && k != 3 {
								t.Fatalf("%s, %g in row %d of %d: output %d has %g in row %d", b.Description(), special, at, n, k, v[i], row)
							}
						}
						if special == special && k == 1 && v[at] != special {
							t.Fatalf("%s: the largest of row %d is %g, want %g", b.Description(), at, v[at], special)
						}
					}
				}
			}
		}
	}
}

// TestNothing defines what operations give for axes without elements, of which the portable backend leaves some undefined.
func TestNothing(t *testing.T) {
	inf := float32(math.Inf(1))
	zeros := func(n int) []float32 { return make([]float32, n) }
	for name, c := range map[string]struct {
		dims []int
		f    func(e, x *Node) *Node // of no elements, and of 2 rows of 3
		want []float32
	}{
		"sum":            {[]int{2, 0}, func(e, _ *Node) *Node { return ReduceSum(e, 1) }, zeros(2)},
		"sum of all":     {[]int{2, 0}, func(e, _ *Node) *Node { return ReduceAllSum(e) }, zeros(1)},
		"product":        {[]int{2, 0}, func(e, _ *Node) *Node { return ReduceMultiply(e, 1) }, []float32{1, 1}},
		"largest":        {[]int{2, 0}, func(e, _ *Node) *Node { return ReduceMax(e, 1) }, []float32{-inf, -inf}},
		"smallest":       {[]int{0, 2}, func(e, _ *Node) *Node { return ReduceMin(e, 0) }, []float32{inf, inf}},
		"sum of no rows": {[]int{0, 2}, func(e, _ *Node) *Node { return ReduceSum(e, 1) }, nil},
		"product over 0": {[]int{3, 0}, func(e, x *Node) *Node { return Dot(e, Reshape(e, 0, 3)).MatMul() }, zeros(9)},
		"product with 0": {[]int{0, 2}, func(e, x *Node) *Node { return Dot(e, x).MatMul() }, nil},
		"concatenated":   {[]int{2, 0}, func(e, x *Node) *Node { return Concatenate([]*Node{e, x, e}, 1) }, []float32{1, 2, 3, 4, 5, 6}},
		"padded": {[]int{2, 0}, func(e, x *Node) *Node {
			return Pad(e, scalar(e.Graph(), 7), compute.PadAxis{}, compute.PadAxis{Start: 1, End: 1})
		}, []float32{7, 7, 7, 7}},
		"transposed":     {[]int{2, 0}, func(e, _ *Node) *Node { return TransposeAllDims(Tanh(e), 1, 0) }, nil},
		"view of a view": {[]int{2, 0, 3}, func(e, _ *Node) *Node { return ReduceSum(Reverse(Reshape(TransposeAllDims(e, 2, 0, 1), 6, 0), 0), 1) }, zeros(6)},
		"integers": {[]int{2, 0}, func(e, _ *Node) *Node {
			return ConvertDType(Add(ConvertDType(e, dtypes.Int32), ConvertDType(e, dtypes.Int32)), dtypes.Float32)
		}, nil},
		"gradient":        {[]int{2, 0}, func(e, x *Node) *Node { return Gradient(Add(ReduceAllSum(Square(e)), ReduceAllSum(Square(x))), x)[0] }, []float32{2, 4, 6, 8, 10, 12}},
		"gradient of sum": {[]int{2, 0}, func(e, x *Node) *Node { return Gradient(ReduceAllSum(Mul(Concatenate([]*Node{e, x}, 1), x)), x)[0] }, []float32{2, 4, 6, 8, 10, 12}},
	} {
		for _, b := range levels(t) {
			out := call(t, b, func(in []*Node) []*Node { return []*Node{c.f(in[0], in[1])} },
				tensors.FromShape(shapes.Make(dtypes.Float32, c.dims...)), [][]float32{{1, 2, 3}, {4, 5, 6}})
			if got := tensors.MustCopyFlatData[float32](out[0]); !slices.Equal(got, c.want) {
				t.Errorf("%s: %s gives %v, want %v", b.Description(), name, got, c.want)
			}
		}
	}
}

// TestWorkIsSharedWithoutChangingIt runs loops, long enough to be cut into pieces, with 1 to 8 workers.
func TestWorkIsSharedWithoutChangingIt(t *testing.T) {
	x := make([]float32, 300*1000)
	for i := range x {
		x[i] = float32(math.Sin(float64(i)))
	}
	var want []float32
	for threads := 1; threads <= 8; threads++ {
		out := call(t, native.Open(t, fmt.Sprint("threads=", threads)), func(in []*Node) []*Node {
			x := in[0]
			y := Exp(MulScalar(Add(x, Square(x)), 0.3))
			return []*Node{ReduceAllSum(y), ReduceSum(y, 0), ReduceMax(y, 1), Softmax(x, 1), ReduceSum(TransposeAllDims(y, 1, 0), 1)}
		}, tensors.FromFlatDataAndDimensions(x, 300, 1000))
		var got []float32
		for _, o := range out {
			got = append(got, tensors.MustCopyFlatData[float32](o)...)
		}
		if threads == 1 {
			want = got
		} else if !slices.Equal(got, want) {
			t.Errorf("%d threads change the result", threads)
		}
	}
}

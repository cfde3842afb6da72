package native_test

import (
	"math"
	"testing"

	"github.com/gomlx/compute"
	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	. "github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine/native"
)

// onNative runs a graph function on native, watched, and says that nothing of it ran on the portable backend.
func onNative(t *testing.T, f func(in []*Node) []*Node, args ...any) []*tensors.Tensor {
	t.Helper()
	b := native.OpenWatched(t, "")
	b.Observe(func(r native.Report) {
		if r.OnHost || r.Regions > 0 {
			t.Errorf("not native: %v", r)
		}
	})
	call(t, b, f, args...)
	return call(t, b, f, args...) // from the cache
}

func wantFlat(t *testing.T, what string, got *tensors.Tensor, want any) {
	t.Helper()
	w, err := tensors.FromAnyValue(want)
	if err != nil || !w.Equal(got) {
		t.Errorf("%s: %v, want %v", what, got.Value(), want)
	}
}

func TestWhile(t *testing.T) {
	// Two states that change places, one that stays, one of booleans; an operand from outside that is a view.
	for steps := range 4 {
		out := onNative(t, func(in []*Node) []*Node {
			g := in[0].Graph()
			turned := TransposeAllDims(in[1], 1, 0)
			params := func(g *Graph) []*Node {
				return []*Node{
					Parameter(g, "i", shapes.Make(dtypes.Int64)), Parameter(g, "a", in[0].Shape()), Parameter(g, "b", in[0].Shape()),
					Parameter(g, "kept", in[2].Shape()), Parameter(g, "odd", shapes.Make(dtypes.Bool)),
				}
			}
			r := While(NewClosure(g, func(g *Graph) []*Node {
				return []*Node{LessThan(params(g)[0], Const(g, int64(steps)))}
			}), NewClosure(g, func(g *Graph) []*Node {
				p := params(g)
				return []*Node{AddScalar(p[0], 1), p[2], Add(p[1], turned), p[3], LogicalNot(p[4])}
			}), Const(g, int64(0)), in[0], MulScalar(in[0], 1), in[2], Const(g, false))
			return []*Node{Reshape(r[1], 4), r[0], r[3], r[4]}
		}, [][]float32{{1, 2}, {3, 4}}, [][]float32{{5, 4}, {3, 2}}, []int32{7, 8})
		a, b := []float32{1, 2, 3, 4}, []float32{1, 2, 3, 4}
		for range steps {
			a, b = b, []float32{a[0] + 5, a[1] + 3, a[2] + 4, a[3] + 2}
		}
		wantFlat(t, "state", out[0], a)
		wantFlat(t, "count", out[1], int64(steps))
		wantFlat(t, "kept", out[2], []int32{7, 8})
		wantFlat(t, "odd", out[3], steps%2 == 1)
	}
}

// TestNestedLoopsAndBranches is written on the backend's own interface: GoMLX's closures cannot be nested.
func TestNestedLoopsAndBranches(t *testing.T) {
	b := native.OpenWatched(t, "")
	bd := b.Builder("nested")
	ok := func(v compute.Value, err error) compute.Value {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	closure := func(f compute.Function, define func(g compute.Function) []compute.Value) compute.Function {
		t.Helper()
		g, err := f.Closure()
		if err != nil {
			t.Fatal(err)
		}
		if err := g.Return(define(g), nil); err != nil {
			t.Fatal(err)
		}
		return g
	}
	number := func(g compute.Function, v int32) compute.Value { return ok(g.Constant([]int32{v})) }
	vector, index := shapes.Make(dtypes.Float32, 3), shapes.Make(dtypes.Int32)
	// loop repeats body(i, s) for i from 0 to limit-1.
	loop := func(f compute.Function, limit, start compute.Value, body func(g compute.Function, i, s compute.Value) compute.Value) compute.Value {
		t.Helper()
		state := func(g compute.Function) (i, s compute.Value) {
			return ok(g.Parameter("i", index, nil)), ok(g.Parameter("s", vector, nil))
		}
		out, err := f.While(closure(f, func(g compute.Function) []compute.Value {
			i, _ := state(g)
			return []compute.Value{ok(g.LessThan(i, limit))}
		}), closure(f, func(g compute.Function) []compute.Value {
			i, s := state(g)
			return []compute.Value{ok(g.Add(i, number(g, 1))), body(g, i, s)}
		}), number(f, 0), start)
		if err != nil {
			t.Fatal(err)
		}
		return out[1]
	}
	f := bd.Main()
	x := ok(f.Tanh(ok(f.Parameter("x", vector, nil))))
	// the sum over i < 4 of x^i, by an inner loop, where i is odd, else of -i
	sum := loop(f, number(f, 4), ok(f.Sub(x, x)), func(g compute.Function, i, s compute.Value) compute.Value {
		odd := ok(g.Equal(ok(g.Rem(i, number(g, 2))), number(g, 1)))
		v, err := g.If(odd, closure(g, func(h compute.Function) []compute.Value {
			one := ok(h.Exp(ok(h.Sub(x, x))))
			return []compute.Value{loop(h, i, one, func(k compute.Function, _, p compute.Value) compute.Value { return ok(k.Mul(p, x)) })}
		}), closure(g, func(h compute.Function) []compute.Value {
			n := ok(h.Neg(ok(h.ConvertDType(i, dtypes.Float32))))
			return []compute.Value{ok(h.BroadcastInDim(n, vector, nil))}
		}))
		if err != nil {
			t.Fatal(err)
		}
		return ok(g.Add(s, v[0]))
	})
	if err := f.Return([]compute.Value{sum}, nil); err != nil {
		t.Fatal(err)
	}
	exec, err := bd.Compile()
	if err != nil {
		t.Fatal(err)
	}
	in := []float32{0.5, -2, 9}
	for range 2 {
		out, err := exec.Execute(buffers(t, b, []*tensors.Tensor{tensors.FromValue(in)}), nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]float32, 3)
		if err := out[0].ToFlatData(got); err != nil {
			t.Fatal(err)
		}
		for i, v := range in {
			x := math.Tanh(float64(v))
			if want := x - 2 + x*x*x; math.Abs(float64(got[i])-want) > 1e-5 {
				t.Errorf("element %d: %g, want %g", i, got[i], want)
			}
		}
	}
}

func TestSort(t *testing.T) {
	x := [][]float32{{3, 1, 2, 1}, {-1, float32(math.Inf(1)), 0, -5}}
	out := onNative(t, func(in []*Node) []*Node {
		g, x := in[0].Graph(), in[0]
		index := Iota(g, shapes.Make(dtypes.Int32, 2, 4), 1)
		pair := func(g *Graph) (p []*Node) {
			for i, d := range []dtypes.DType{dtypes.Float32, dtypes.Float32, dtypes.Int32, dtypes.Int32} {
				p = append(p, Parameter(g, []string{"a", "b", "i", "j"}[i], shapes.Make(d)))
			}
			return p
		}
		byValue := SortFunc(NewClosure(g, func(g *Graph) []*Node { p := pair(g); return []*Node{LessThan(p[0], p[1])} }), 1, true, x, index)
		// a comparator of its own, with a value from outside: distance to the middle
		mid := ReduceAllMin(in[1])
		near := SortFunc(NewClosure(g, func(g *Graph) []*Node {
			p := pair(g)
			return []*Node{LessThan(Abs(Sub(p[0], mid)), Abs(Sub(p[1], mid)))}
		}), 1, true, x, index)
		return []*Node{byValue[0], byValue[1], Sort(x, 0, false), near[1], Sort(in[1], 0, true)}
	}, x, []float32{2, 9, 4})
	inf := float32(math.Inf(1))
	wantFlat(t, "values", out[0], [][]float32{{1, 1, 2, 3}, {-5, -1, 0, inf}})
	wantFlat(t, "places", out[1], [][]int32{{1, 3, 2, 0}, {3, 0, 2, 1}})
	wantFlat(t, "down axis 0", out[2], [][]float32{{3, inf, 2, 1}, {-1, 1, 0, -5}})
	wantFlat(t, "nearest to 2", out[3], [][]int32{{2, 0, 1, 3}, {2, 0, 3, 1}})
	wantFlat(t, "ascending", out[4], []float32{2, 4, 9})
}

func TestCallsAndIfsShareMemory(t *testing.T) {
	out := onNative(t, func(in []*Node) []*Node {
		g := in[0].Graph()
		r := If(GreaterThan(ReduceAllSum(in[0]), scalar(g, 0)),
			NewClosure(g, func(g *Graph) []*Node { return []*Node{in[0], Const(g, []int32{1, 2}), ReduceAllMax(in[0])} }),
			NewClosure(g, func(g *Graph) []*Node { return []*Node{Neg(in[0]), Const(g, []int32{3, 4}), ReduceAllMin(in[0])} }))
		return []*Node{r[0], Add(r[1], r[1]), r[2]}
	}, []float32{-1, 0.5})
	wantFlat(t, "branch", out[0], []float32{1, -0.5})
	wantFlat(t, "integers", out[1], []int32{6, 8})
	wantFlat(t, "least", out[2], float32(-1))
}

// TestIntegersAgreeWithGo runs what is computed by plain loops beside a float32 graph.
func TestIntegersAgreeWithGo(t *testing.T) {
	for _, d := range []dtypes.DType{dtypes.Int8, dtypes.Int16, dtypes.Int32, dtypes.Int64, dtypes.Uint8, dtypes.Uint16, dtypes.Uint32, dtypes.Uint64, dtypes.Float64} {
		f := func(in []*Node) []*Node {
			x, y := ConvertDType(in[0], d), ConvertDType(in[1], d)
			row := Slice(x, AxisRange(), AxisRange(1, 2))
			turned := TransposeAllDims(x, 1, 0)
			out := []*Node{
				Add(x, y), Sub(x, row), Mul(x, y), Max(x, y), Min(row, y), Where(GreaterThan(in[0], in[1]), x, y),
				ReduceSum(turned, 1), ReduceMax(x, 0), ReduceMin(x), Concatenate([]*Node{x, Reverse(y, 0)}, 1), turned,
				Pad(x, Scalar(x.Graph(), d, 5), compute.PadAxis{Start: 1, Interior: 1}, compute.PadAxis{End: 2}),
				Gather(turned, Const(x.Graph(), [][]int32{{2}, {0}})), CumSum(x, 0), Reshape(turned, 6),
				DynamicUpdateSlice(x, row, []*Node{Const(x.Graph(), int64(0)), Const(x.Graph(), int64(9))}),
				ConvertDType(LessThan(x, y), dtypes.Int32), ConvertDType(ArgMin(x, 1, dtypes.Int16), d), ConvertDType(x, dtypes.Float64),
				Iota(x.Graph(), shapes.Make(d, 2, 3), 1), Tanh(ConvertDType(x, dtypes.Float32)), Abs(x), Sign(x),
			}
			if d.IsInt() {
				out = append(out, Mod(x, AddScalar(Abs(y), 1)), BitwiseAnd(x, y), BitwiseXor(x, y), BitwiseNot(x), BitCount(x),
					BitwiseShiftRightLogical(x, OnesLike(x)), BitwiseShiftLeft(x, OnesLike(x)))
			} else {
				out = append(out, Exp(Neg(Abs(x))), Sqrt(Abs(x)), Div(x, y), Log1P(Abs(x)))
			}
			return out
		}
		a, b := [][]float32{{1, 7, 3}, {100, 0, 5}}, [][]float32{{2, 3, 3}, {4, 50, 6}}
		want := call(t, goBackend(t), f, a, b)
		got := onNative(t, f, a, b)
		for i := range want {
			same := got[i].Equal(want[i])
			if !same && want[i].DType().IsFloat() { // rounding of functions
				same = got[i].InDelta(want[i], 1e-6)
			}
			if !same {
				t.Errorf("%s, output %d: %v, want %v", d, i, got[i].Value(), want[i].Value())
			}
		}
	}
}

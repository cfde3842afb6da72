package native_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/gomlx/compute"
	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/gobackend"
	"github.com/gomlx/compute/shapes"
	. "github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine/native"
)

// call runs a graph function on a backend.
func call(t *testing.T, b compute.Backend, f func(in []*Node) []*Node, args ...any) []*tensors.Tensor {
	t.Helper()
	e, err := NewExec(b, f)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Finalize()
	out, err := e.Call(args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestEmptyTensors(t *testing.T) {
	b := native.Open(t, "")
	empty := tensors.FromShape(shapes.Make(dtypes.Float32, 3, 0))
	full := []float32{1, 2, 3}
	out := call(t, b, func(in []*Node) []*Node {
		e, x := in[0], in[1]
		return []*Node{
			Tanh(e), Add(e, e), ReduceSum(e, 1), TransposeAllDims(e, 1, 0), Concatenate([]*Node{e, Reshape(x, 3, 1)}, 1),
			Add(ReduceSum(e, 1), x), Dot(e, TransposeAllDims(e, 1, 0)).MatMul(),
		}
	}, empty, full)
	for i, want := range [][]float32{{}, {}, {0, 0, 0}, {}, {1, 2, 3}, {1, 2, 3}, make([]float32, 9)} {
		if got := tensors.MustCopyFlatData[float32](out[i]); !slices.Equal(got, want) {
			t.Errorf("output %d is %v, want %v", i, got, want)
		}
	}
}

func TestOutputsThatAreInputsOrShared(t *testing.T) {
	b := native.Open(t, "")
	x := []float32{1, 2, 3, 4}
	out := call(t, b, func(in []*Node) []*Node {
		s := Square(in[0])
		return []*Node{in[0], s, s, Reshape(s, 2, 2), Const(in[0].Graph(), []float32{7}), in[1], in[1], GreaterThan(in[0], s)}
	}, x, []int32{5})
	for i, want := range []any{x, []float32{1, 4, 9, 16}, []float32{1, 4, 9, 16}, [][]float32{{1, 4}, {9, 16}}, []float32{7}, []int32{5}, []int32{5}, []bool{false, false, false, false}} {
		if w, err := tensors.FromAnyValue(want); err != nil || !w.Equal(out[i]) {
			t.Errorf("output %d is %v, want %v", i, out[i].Value(), want)
		}
	}
	// each is memory of its own
	for i := range out {
		if err := out[i].FinalizeAll(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestRandomBitsEqualGo(t *testing.T) {
	f := func(in []*Node) []*Node {
		s, u := RandomUniform(in[0], shapes.Make(dtypes.Float32, 1000))
		s, n := RandomNormal(s, shapes.Make(dtypes.Float32, 33))
		return []*Node{s, u, MulScalar(n, 0)}
	}
	state := []uint64{1234567, 89, 42}
	host, err := gobackend.New("ops_sequential")
	if err != nil {
		t.Fatal(err)
	}
	got, want := call(t, native.Open(t, ""), f, state), call(t, host, f, state)
	// go leaves the third word of the state undefined
	if g, w := got[0].Value().([]uint64)[:2], want[0].Value().([]uint64)[:2]; !slices.Equal(g, w) {
		t.Errorf("state %v, go's %v", g, w)
	}
	if !got[1].Equal(want[1]) {
		t.Error("the bits differ from go's")
	}
}

func TestOtherTypes(t *testing.T) {
	b := native.Open(t, "")
	var reports []native.Report
	b.Observe(func(r native.Report) { reports = append(reports, r) })
	out := call(t, b, func(in []*Node) []*Node { return []*Node{Exp(in[0]), Add(in[1], in[1])} }, []float64{0, 1}, []int64{1, 2})
	if got := out[1].Value().([]int64); !slices.Equal(got, []int64{2, 4}) {
		t.Errorf("got %v", got)
	}
	if len(reports) != 1 || !reports[0].OnHost {
		t.Errorf("reports: %v", reports)
	}
	reports = nil
	call(t, b, func(in []*Node) []*Node {
		return []*Node{Add(Exp(in[0]), ConvertDType(Mul(in[1], in[1]), dtypes.Float32))}
	}, []float32{0, 1}, []int64{1, 2})
	if len(reports) != 1 || reports[0].OnHost || reports[0].Regions != 0 {
		t.Errorf("reports: %v", reports)
	}
}

func TestRefusals(t *testing.T) {
	for config, want := range map[string]string{
		"threads=0": "1 to 256", "threads=x": "1 to 256", "threads=9999": "1 to 256", "isa=mmx": "highest", "speed=11": "unknown option",
	} {
		if _, err := native.New(config); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("config %q: error %v, want one that contains %q", config, err, want)
		}
	}
	b := native.Open(t, "")
	for _, c := range []struct {
		flat  any
		shape shapes.Shape
	}{
		{[]float32{1, 2}, shapes.Make(dtypes.Float32, 3)},
		{[]float64{1, 2}, shapes.Make(dtypes.Float32, 2)},
		{3, shapes.Make(dtypes.Float32)},
		{nil, shapes.Make(dtypes.Float32, 1)},
	} {
		if _, err := b.BufferFromFlatData(0, c.flat, c.shape); err == nil {
			t.Errorf("values %v were accepted for shape %s", c.flat, c.shape)
		}
	}
	x, err := b.BufferFromFlatData(0, []float32{1}, shapes.Make(dtypes.Float32, 1))
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := x.Finalize(); err != nil {
			t.Error(err)
		}
	}
	if _, err := x.Data(); err == nil {
		t.Error("a finalized buffer gave its values")
	}
}

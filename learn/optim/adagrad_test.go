package optim_test

import (
	"math"
	"testing"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/learn/optim"
)

// run feeds gradients of shape dims to an optimiser at rate lr and returns the parameter, which starts at 1, after each.
func run(t *testing.T, o optim.Optimizer, lr, decay float64, dims []int, grads ...[]float64) (w [][]float64) {
	t.Helper()
	ex, err := engine.NewExec(enginetest.Backend(), func(in []*graph.Node) []*graph.Node {
		u := optim.Update{W: in[0], Grad: in[1], Slots: in[2:], LR: graph.Scalar(in[0].Graph(), dtypes.Float64, lr), Decay: decay}
		u.NormSq = graph.ReduceAllSum(graph.Mul(u.Grad, u.Grad))
		v, s := o.Apply(u)
		return append([]*graph.Node{v}, s...)
	})
	if err != nil {
		t.Fatal(err)
	}
	defer ex.Finalize()
	shape := shapes.Make(dtypes.Float64, dims...)
	ones := make([]float64, shape.Size())
	for i := range ones {
		ones[i] = 1
	}
	args := []any{tensors.FromFlatDataAndDimensions(ones, dims...), nil}
	for i := range o.Slots() {
		s := shape
		if x, ok := o.(optim.SlotShaper); ok {
			s = x.SlotShape(i, shape)
		}
		args = append(args, tensors.FromShape(s))
	}
	for _, g := range grads {
		args[1] = tensors.FromFlatDataAndDimensions(g, dims...)
		out, err := ex.Call(args...)
		if err != nil {
			t.Fatal(err)
		}
		args[0] = out[0]
		for i, v := range out[1:] {
			args[2+i] = v
		}
		w = append(w, tensors.MustCopyFlatData[float64](out[0]))
	}
	return w
}

func equal(t *testing.T, what string, got, want []float64) {
	t.Helper()
	for i := range want {
		if math.Abs(got[i]-want[i]) > 1e-9 {
			t.Errorf("%s: %v, want %v", what, got, want)
			return
		}
	}
}

func TestAdaGradByHand(t *testing.T) {
	// v = 9, then 25: steps of 0.1·3/3 and 0.1·4/5.
	w := run(t, optim.AdaGrad{}, .1, 0, []int{2}, []float64{3, 0}, []float64{4, 0})
	equal(t, "first step", w[0], []float64{.9, 1})
	equal(t, "second step", w[1], []float64{.82, 1})
	w = run(t, optim.AdaGrad{Momentum: .5}, .1, .2, []int{1}, []float64{2})
	equal(t, "momentum halves the first gradient, decay takes lr·decay·w", w[0], []float64{1 - .1*(.5+.2)})
}

func TestAdaGradNormSharesOneRate(t *testing.T) {
	// ‖g‖² = 25, v₀ = 0.01.
	w := run(t, optim.AdaGradNorm{}, 1, 0, []int{2}, []float64{3, 4})
	r := math.Sqrt(25.01) + 1e-10
	equal(t, "first step", w[0], []float64{1 - 3/r, 1 - 4/r})
}

func TestAdaGradNormOfOneScalarIsAdaGrad(t *testing.T) {
	g := [][]float64{{.5}, {-2}, {0}, {.03}}
	norm := run(t, optim.AdaGradNorm{Momentum: .3}, .7, .1, []int{1}, g...)
	rows := run(t, optim.AdaGradNorm{Momentum: .3, RowWise: true}, .7, .1, []int{1, 1}, g...)
	elem := run(t, optim.AdaGrad{Init: 1e-2, Momentum: .3}, .7, .1, []int{1}, g...)
	for i := range g {
		equal(t, "norm", norm[i], elem[i])
		equal(t, "rows", rows[i], elem[i])
	}
}

func TestRowsHaveRatesOfTheirOwn(t *testing.T) {
	o := optim.AdaGradNorm{RowWise: true}
	w := run(t, o, 1, 0, []int{2, 2}, []float64{3, 4, 0, .1})
	r0, r1 := math.Sqrt(25.01)+1e-10, math.Sqrt(.02)+1e-10
	equal(t, "matrix", w[0], []float64{1 - 3/r0, 1 - 4/r0, 1, 1 - .1/r1})
	kernel := run(t, o, 1, 0, []int{2, 1, 1, 2}, []float64{3, 4, 0, .1})
	equal(t, "kernel", kernel[0], w[0])
	vector := run(t, o, 1, 0, []int{2}, []float64{3, .1})
	equal(t, "vector", vector[0], []float64{1 - 3/(math.Sqrt(9.01)+1e-10), 1 - .1/r1})
	if s := o.SlotShape(0, shapes.Make(dtypes.Float32, 8, 3, 3, 4)); s.Rank() != 1 || s.Dimensions[0] != 8 {
		t.Errorf("state of a kernel is %s", s)
	}
	if s := (optim.AdaGradNorm{}).SlotShape(0, shapes.Make(dtypes.Float32, 8, 4)); s.Rank() != 0 {
		t.Errorf("state is %s, want a scalar", s)
	}
}

func TestNamesAreKnown(t *testing.T) {
	for _, n := range optim.Names() {
		if o, err := optim.ByName(n, .1); err != nil || o.WeightDecay() != .1 {
			t.Errorf("%s: %v, %v", n, o, err)
		}
	}
	if _, err := optim.ByName("warp", 0); err == nil {
		t.Error("an unknown optimiser was accepted")
	}
}

func TestCosineSamples(t *testing.T) {
	f := optim.CosineSamples(1000, 200, .1)
	for s, want := range map[int]float64{0: 0, 100: .5, 200: 1, 600: .55, 1000: .1, 5000: .1} {
		if got := f(s); math.Abs(got-want) > 1e-12 {
			t.Errorf("after %d cases %g, want %g", s, got, want)
		}
	}
}

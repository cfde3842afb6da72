package learn_test

import (
	"math"
	"slices"
	"testing"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/fold"
)

// maskedBatchNorm trains one step of a batch norm over x [1, tokens, 3] with a mask (nil: none) and a rate so low that
// only the state moves; it returns the network and the loss, which is Σ sin(k)·y over the first four tokens.
func maskedBatchNorm(t *testing.T, op nn.BatchNorm, x, mask []float32) (*nn.Network, float64) {
	t.Helper()
	tokens := len(x) / 3
	b := nn.NewBuilder(1)
	in := []string{b.Input("x", shapes.Make(dtypes.Float32, 1, tokens, 3))}
	batch := []*tensors.Tensor{tensors.FromFlatDataAndDimensions(x, 1, tokens, 3)}
	if mask != nil {
		in = append(in, b.Input("mask", shapes.Make(dtypes.Float32, 1, tokens)))
		batch = append(batch, tensors.FromFlatDataAndDimensions(mask, 1, tokens))
	}
	n, err := b.Finish(b.Add("bn", op, in...))
	if err != nil {
		t.Fatal(err)
	}
	tr, err := learn.NewTrainer(enginetest.Backend(), &n.Params, func(env *nn.Env, in []*graph.Node) *graph.Node {
		v := map[string]*graph.Node{"x": in[0]}
		if mask != nil {
			v["mask"] = in[1]
		}
		y := graph.SliceAxis(n.Lower(env, v)[0], 1, graph.AxisRange(0, 4))
		return graph.ReduceAllSum(graph.Mul(y, graph.Sin(graph.AddScalar(graph.MulScalar(graph.IotaFull(env.G, y.Shape()), 1), 1))))
	}, learn.Options{LR: 1e-30})
	if err != nil {
		t.Fatal(err)
	}
	defer tr.Finalize()
	info, err := tr.Step(batch...)
	if err != nil {
		t.Fatal(err)
	}
	return n, info.Loss
}

func TestBatchNormMaskLeavesTokensOut(t *testing.T) {
	x := make([]float32, 12)
	rng.Normal(rng.New(1, "x"), x, 2)
	padded := append(slices.Clone(x), 100, -50, 7, 1e3, 2, 3)
	for _, op := range []nn.BatchNorm{{}, {Biased: true}, {Always: true, NoAffine: false}} {
		a, la := maskedBatchNorm(t, op, x, nil)
		b, lb := maskedBatchNorm(t, op, padded, []float32{1, 1, 1, 1, 0, 0})
		if math.Abs(la-lb) > 1e-5 {
			t.Errorf("%+v: loss %g without padding, %g with masked padding", op, la, lb)
		}
		for _, s := range []string{"bn.mean", "bn.var"} {
			for i, v := range a.Params.Get(s).Data() {
				if w := b.Params.Get(s).Data()[i]; math.Abs(float64(v-w)) > 1e-5 {
					t.Errorf("%+v: %s[%d] is %g without padding, %g with", op, s, i, v, w)
				}
			}
		}
		c, lc := maskedBatchNorm(t, op, padded, make([]float32, 6))
		if math.IsNaN(lc) || slices.ContainsFunc(c.Params.Get("bn.mean").Data(), func(v float32) bool { return v != 0 }) {
			t.Errorf("%+v: a batch without a valid token gives loss %g and mean %v", op, lc, c.Params.Get("bn.mean").Data())
		}
		for _, v := range c.Params.Get("bn.var").Data() {
			if math.Abs(float64(v-1)) > 1e-6 {
				t.Errorf("%+v: a batch without a valid token moves the variance to %g", op, v)
			}
		}
	}
}

func TestMaskedBatchNormGradient(t *testing.T) {
	x := make([]float32, 15)
	rng.Normal(rng.New(2, "x"), x, 1)
	wide := make([]float64, len(x))
	for i, v := range x {
		wide[i] = float64(v)
	}
	node := &nn.Node{Name: "bn", Op: nn.BatchNorm{}, P: map[string]string{"mean": "mean", "var": "var"}}
	loss := func(x *graph.Node) *graph.Node {
		g := x.Graph()
		state := map[string]*graph.Node{"mean": graph.Zeros(g, shapes.Make(dtypes.Float64, 3)), "var": graph.Ones(g, shapes.Make(dtypes.Float64, 3))}
		env := &nn.Env{G: g, Training: true, DType: dtypes.Float64, Param: func(s string) *graph.Node { return state[s] }, Update: func(string, *graph.Node) {}}
		y := node.Op.Lower(&nn.Ctx{Env: env, Node: node}, []*graph.Node{x, graph.Const(g, []float64{1, 0, 1, 1, 0})})[0]
		return graph.ReduceAllSum(graph.Mul(y, graph.Sin(graph.IotaFull(g, y.Shape()))))
	}
	e, err := engine.NewExec(enginetest.Backend(), func(in []*graph.Node) []*graph.Node {
		l := loss(in[0])
		return append([]*graph.Node{l}, graph.Gradient(l, in[0])...)
	})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Finalize()
	eval := func(d []float64) (float64, []float64) {
		out, err := e.Call(tensors.FromFlatDataAndDimensions(d, 5, 3))
		if err != nil {
			t.Fatal(err)
		}
		return nn.Float64s(out[0])[0], nn.Float64s(out[1])
	}
	_, dx := eval(wide)
	for i := range wide {
		at := func(d float64) float64 { v := slices.Clone(wide); v[i] += d; l, _ := eval(v); return l }
		if want := (at(1e-5) - at(-1e-5)) / 2e-5; math.Abs(dx[i]-want) > 1e-5*max(1, math.Abs(want)) {
			t.Errorf("dx[%d] = %g, finite difference %g", i, dx[i], want)
		}
	}
}

func TestNormsRefuseAWrongMask(t *testing.T) {
	for _, dims := range [][]int{{3, 2}, {2}, {2, 3, 4}} {
		b := nn.NewBuilder(1)
		x := b.Input("x", shapes.Make(dtypes.Float32, 2, 3, 4))
		b.Add("bn", nn.BatchNorm{}, x, b.Input("mask", shapes.Make(dtypes.Float32, dims...)))
		if b.Err() == nil {
			t.Errorf("a mask %v was accepted for x [2, 3, 4]", dims)
		}
	}
}

func TestFoldBatchNormDropsTheMask(t *testing.T) {
	b := nn.NewBuilder(1)
	x := b.Add("fc", nn.Dense{Out: 4}, b.Input("x", shapes.Make(dtypes.Float32, 1, 3, 2)))
	n, err := b.Finish(b.Add("bn", nn.BatchNorm{}, x, b.Input("mask", shapes.Make(dtypes.Float32, 1, 3))))
	if err != nil {
		t.Fatal(err)
	}
	if folded, err := fold.BatchNorm(n); err != nil || len(folded) != 1 {
		t.Errorf("folded %v: %v", folded, err)
	}
}

package fold_test

import (
	"errors"
	"math"
	"testing"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/fold"
	"github.com/lathe-ml/lathe/nn/zoo"
)

func normal(name string, n int) []float32 {
	v := make([]float32, n)
	rng.Normal(rng.New(1, name), v, 1)
	return v
}

// mustFold folds a copy and compares it with the network on an input.
func mustFold(t *testing.T, net *nn.Network, x *tensors.Tensor) fold.Report {
	t.Helper()
	folded := net.Clone()
	r, err := fold.Norms(folded)
	if err != nil {
		t.Fatal(err)
	}
	var out [2][]float64
	for i, n := range []*nn.Network{net, folded} {
		y, err := n.Run(enginetest.Backend(), []*tensors.Tensor{x})
		if err != nil {
			t.Fatal(err)
		}
		out[i] = nn.Float64s(y[0])
	}
	for i, want := range out[0] {
		if !(math.Abs(out[1][i]-want) <= 1e-5*max(1, math.Abs(want))) {
			t.Fatalf("folded: [%d] is %g, want %g", i, out[1][i], want)
		}
	}
	return r
}

func TestFoldingKeepsWhatIsNotAffine(t *testing.T) {
	net, err := zoo.ViT(zoo.ViTOptions{Size: 14, Dim: 16, Depth: 2, Heads: 2})
	if err != nil {
		t.Fatal(err)
	}
	r, err := fold.Norms(net)
	if err != nil || len(r.Kept) != 5 || len(r.Folded)+len(r.Explicit) > 0 {
		t.Errorf("layer norm: %+v, %v", r, err)
	}
	if _, _, err := (nn.BatchNorm{Always: true}).Affine(nil); !errors.Is(err, nn.ErrNotAffine) {
		t.Errorf("batch statistics at inference: %v", err)
	}
}

// A norm that maps channels onto others, or is read by something nonlinear or tied, gets its scale and shift written out.
func TestFoldingGoesThroughTokensOnly(t *testing.T) {
	for name, c := range map[string]struct {
		op   nn.Op
		fold bool
	}{
		"mean over tokens":    {nn.Reduce{Fn: "ReduceMean", Axes: []int{1}}, true},
		"largest token":       {nn.Reduce{Fn: "ReduceMax", Axes: []int{1}}, false},
		"mean over channels":  {nn.Reduce{Fn: "ReduceMean", Axes: []int{2}, Keep: true}, false},
		"some tokens":         {nn.Slice{Axis: 1, From: 1, To: 3}, true},
		"some channels":       {nn.Slice{Axis: 2, From: 0, To: 3}, false},
		"tokens in one row":   {nn.Reshape{Dims: []int{0, 24}}, false},
		"tokens in two rows":  {nn.Reshape{Dims: []int{0, 2, 2, 6}}, true},
		"channels in front":   {nn.Transpose{Perm: []int{0, 2, 1}}, false},
		"tokens in front":     {nn.Transpose{Perm: []int{1, 0, 2}}, true},
		"a nonlinearity":      {nn.ReLU, false},
		"square, by accident": {nn.Reshape{Dims: []int{0, 6, 4}}, false},
	} {
		t.Run(name, func(t *testing.T) {
			b := nn.NewBuilder(1)
			x := b.Add("norm", nn.BatchNorm{}, b.Input("x", shapes.Make(dtypes.Float32, 2, 4, 6)))
			x = b.Add("head", nn.Dense{Out: 3}, b.Add("between", c.op, x))
			net, err := b.Finish(x)
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range []string{"w", "b", "mean", "var"} {
				v := normal(p, 6)
				for i := range v {
					v[i] = float32(math.Abs(float64(v[i]))) + .1
				}
				if err := net.Param(net.Node("norm"), p).SetData(v); err != nil {
					t.Fatal(err)
				}
			}
			r := mustFold(t, net, tensors.FromFlatDataAndDimensions(normal("x", 48), 2, 4, 6))
			if (len(r.Folded) == 1) != c.fold || (len(r.Explicit) == 0) != c.fold {
				t.Errorf("folded %v, explicit %v", r.Folded, r.Explicit)
			}
		})
	}
}

func TestFoldingTheLanguageModel(t *testing.T) {
	for _, tied := range []bool{false, true} {
		net, err := zoo.Decoder(zoo.DecoderOptions{Symbols: 11, Context: 6, Dim: 16, Depth: 2, Heads: 2, Norm: nn.BatchNorm{}, Tied: tied})
		if err != nil {
			t.Fatal(err)
		}
		for _, x := range net.Nodes {
			if _, ok := x.Op.(nn.BatchNorm); ok {
				if err := net.Param(x, "mean").SetData(normal(x.Name, 16)); err != nil {
					t.Fatal(err)
				}
			}
		}
		r := mustFold(t, net, tensors.FromFlatDataAndDimensions([]int32{1, 2, 3, 10, 0, 5}, 1, 6))
		if want := map[bool]int{false: 5, true: 4}[tied]; len(r.Folded) != want || len(r.Explicit) != 5-want {
			t.Errorf("tied %v: folded %v, explicit %v", tied, r.Folded, r.Explicit)
		}
	}
}

func TestFoldingDropsTheMask(t *testing.T) {
	b := nn.NewBuilder(1)
	x, mask := b.Input("x", shapes.Make(dtypes.Float32, 2, 3, 4)), b.Input("mask", shapes.Make(dtypes.Float32, 2, 3))
	net, err := b.Finish(b.Add("head", nn.Dense{Out: 2}, b.Add("norm", nn.BatchNorm{}, x, b.Add("valid", nn.ReLU, mask))))
	if err != nil {
		t.Fatal(err)
	}
	if r, err := fold.Norms(net); err != nil || len(r.Folded) != 1 || net.Node("valid") != nil || net.Node("norm") != nil {
		t.Errorf("%+v, %v", r, err)
	}
}

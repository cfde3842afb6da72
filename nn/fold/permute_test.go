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
)

// convolutional has batch norms, a depthwise convolution, a residual sum and pooling behind its layers.
func convolutional(t *testing.T) *nn.Network {
	t.Helper()
	b := nn.NewBuilder(3)
	x := b.Input("x", shapes.Make(dtypes.Float32, 1, 8, 8, 3))
	x = b.Add("stem", nn.Conv2D(6, 3, 1), x)
	h := b.Add("act", nn.ReLU, b.Add("norm", nn.BatchNorm{}, b.Add("wide", nn.Conv2D(10, 1, 1), x)))
	deep := nn.Conv2D(10, 3, 1)
	deep.Groups = 10
	h = b.Add("deep.act", nn.GELU{}, b.Add("deep", deep, h))
	h = b.Add("narrow", nn.Conv2D(6, 1, 1), h)
	x = b.Add("sum", nn.Add, x, h)
	x = b.Add("tail", nn.Dense{Out: 7}, b.Add("ln", nn.LayerNorm{}, b.Add("pool", nn.GlobalAveragePool, b.Add("last", nn.Conv2D(9, 3, 2), x))))
	net, err := b.Finish(b.Add("head", nn.Dense{Out: 4}, b.Add("tail.act", nn.ReLU, x)))
	if err != nil {
		t.Fatal(err)
	}
	r := rng.New(4, "convolutional")
	for p := range net.Params.All() {
		v := p.Data()
		for i := range v {
			v[i] += float32(.2 * math.Abs(r.NormFloat64()))
		}
		if err := p.SetData(v); err != nil {
			t.Fatal(err)
		}
	}
	return net
}

func TestPermutedChannelsKeepTheFunction(t *testing.T) {
	r := rng.New(5, "input")
	v := make([]float32, 2*8*8*3)
	for i := range v {
		v[i] = float32(r.NormFloat64())
	}
	run := func(net *nn.Network) []float32 {
		out, err := net.Run(enginetest.Backend(), []*tensors.Tensor{tensors.FromFlatDataAndDimensions(v, 2, 8, 8, 3)})
		if err != nil {
			t.Fatal(err)
		}
		return nn.Floats(out[0])
	}
	for site, channels := range map[string]int{"wide": 10, "last": 9, "tail": 7} {
		net := convolutional(t)
		want := run(net)
		before := net.Param(net.Node(site), "w").Data()
		perm := r.Perm(channels)
		if err := fold.PermuteOutputs(net, site, perm); err != nil {
			t.Fatalf("%s: %v", site, err)
		}
		after := net.Param(net.Node(site), "w").Data()
		per := len(before) / channels
		for i, from := range perm {
			if after[i*per] != before[from*per] {
				t.Errorf("%s: row %d is not old row %d", site, i, from)
			}
		}
		for i, y := range run(net) {
			if math.Abs(float64(y-want[i])) > 1e-5*(1+math.Abs(float64(want[i]))) {
				t.Errorf("%s: output %d is %g, want %g", site, i, y, want[i])
			}
		}
	}
}

func TestTiedChannelsAreRefused(t *testing.T) {
	for site, channels := range map[string]int{"stem": 6, "narrow": 6, "head": 4} {
		net := convolutional(t)
		want := net.Param(net.Node(site), "w").Data()
		perm := make([]int, channels)
		for i := range perm {
			perm[i] = channels - 1 - i
		}
		if err := fold.PermuteOutputs(net, site, perm); !errors.Is(err, fold.ErrTiedChannels) {
			t.Errorf("%s: %v", site, err)
		}
		for i, v := range net.Param(net.Node(site), "w").Data() {
			if v != want[i] {
				t.Fatalf("%s was changed", site)
			}
		}
	}
	for name, perm := range map[string][]int{"short": {0, 1}, "twice": {0, 0, 2, 3, 4, 5, 6, 7, 8, 9}, "long": {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10}} {
		if err := fold.PermuteOutputs(convolutional(t), "wide", perm); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if err := fold.PermuteOutputs(convolutional(t), "nothing", nil); err == nil {
		t.Error("a node that is not there was reordered")
	}
}

package prune

import (
	"bytes"
	"context"
	"math"
	"path/filepath"
	"slices"
	"testing"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/onnx"
	"github.com/lathe-ml/lathe/nn/safetensors"
	"github.com/lathe-ml/lathe/nn/zoo"
)

func must(t *testing.T) func(net *nn.Network, err error) *nn.Network {
	return func(net *nn.Network, err error) *nn.Network {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return net
	}
}

func TestActivationLayersAreFound(t *testing.T) {
	vit := zoo.ViTOptions{Size: 8, Patch: 4, Dim: 16, Depth: 2, Heads: 2, MLP: 24}
	type layer struct {
		name, function string
		exact, gated   bool
		width          int
		value, site    string
	}
	for name, c := range map[string]struct {
		net  func() (*nn.Network, error)
		want []layer
	}{
		"relu": {func() (*nn.Network, error) { o := vit; o.Act = nn.ReLU; return zoo.ViT(o) }, []layer{
			{"blk.0.act", "ReLU", true, false, 24, "blk.0.act", "blk.0.fc2"}, {"blk.1.act", "ReLU", true, false, 24, "blk.1.act", "blk.1.fc2"},
		}},
		"gelu with dropout": {func() (*nn.Network, error) { o := vit; o.Depth, o.Dropout = 1, .1; return zoo.ViT(o) }, []layer{
			{"blk.0.act", "GELU", false, false, 24, "blk.0.act", "blk.0.fc2"},
		}},
		"top-k": {func() (*nn.Network, error) { o := vit; o.Depth, o.Act = 1, ReLUTopK{K: 3}; return zoo.ViT(o) }, []layer{
			{"blk.0.act", "ReLU top-k", true, false, 24, "blk.0.act", "blk.0.fc2"},
		}},
		"gated relu": {func() (*nn.Network, error) { return zoo.Decoder(zoo.DecoderOptions{Depth: 1, Act: nn.ReLU}) }, []layer{
			{"blk.0.act", "ReLU", true, true, 384, "blk.0.act", "blk.0.down"},
		}},
		"gated silu": {func() (*nn.Network, error) { return zoo.Decoder(zoo.DecoderOptions{Depth: 1}) }, []layer{
			{"blk.0.act", "Silu", false, true, 384, "blk.0.gated", "blk.0.down"},
		}},
		"mixer": {func() (*nn.Network, error) {
			o := vit
			o.Depth, o.Act, o.MeanPool, o.Mixer = 1, nn.ReLU, true, zoo.TokenMixing(6, nn.ReLU)
			return zoo.ViT(o)
		}, []layer{
			{"blk.0.attn.act", "ReLU", true, false, 6, "blk.0.attn.act", "blk.0.attn.fc2"}, {"blk.0.act", "ReLU", true, false, 24, "blk.0.act", "blk.0.fc2"},
		}},
		"squared relu, two readers": {func() (*nn.Network, error) {
			b := nn.NewBuilder(1)
			x := b.Add("act", nn.ReLU, b.Input("x", shapes.Make(dtypes.Float32, 1, 6)))
			x = b.Add("square", nn.Mul, x, x)
			return b.Finish(b.Add("a", nn.Dense{Out: 2}, x), b.Add("b", nn.Dense{Out: 3}, x))
		}, []layer{{"act", "ReLU", true, false, 6, "act", "a"}}},
		"convolutions of size 1": {func() (*nn.Network, error) {
			b := nn.NewBuilder(1)
			x := b.Add("act", nn.Clip{Lo: 0, Hi: 6}, b.Image("x", 4, 4, 5))
			x = b.Add("point", nn.Conv{Out: 7, Kernel: []int{1, 1}}, x)
			return b.Finish(b.Add("wide", nn.Conv2D(3, 3, 1), b.Add("act2", nn.ReLU, x)))
		}, []layer{{"act", "clipped ReLU", true, false, 5, "act", "point"}}},
	} {
		got, err := ActivationLayers(must(t)(c.net()))
		if err != nil || len(got) != len(c.want) {
			t.Errorf("%s: %+v (%v)", name, got, err)
			continue
		}
		for i, w := range c.want {
			g := got[i]
			if (layer{g.Name, g.Function, g.Exact, g.Gated, g.Width, g.Value, g.Sites[0]}) != w {
				t.Errorf("%s: got %+v, want %+v", name, g, w)
			}
		}
	}
	if _, err := ActivationLayers(must(t)(zoo.MLP(zoo.MLPOptions{Hidden: []int{}}))); err == nil {
		t.Error("a network without activations: no error")
	}
}

// relu is a small trained-looking network and examples for it.
func relu(t *testing.T, act nn.Op) (*nn.Network, compress.Examples) {
	t.Helper()
	net := must(t)(zoo.ViT(zoo.ViTOptions{Size: 8, Patch: 4, Dim: 16, Depth: 2, Heads: 2, MLP: 24, Act: act, MeanPool: true, Seed: 3}))
	x := make([]float32, 10*64)
	rng.Normal(rng.New(1, "cases"), x, 1)
	e, err := compress.FloatExamples(x, 10, 8, 8, 1)
	if err != nil {
		t.Fatal(err)
	}
	return net, e
}

func TestMeasureActivations(t *testing.T) {
	ctx, b := context.Background(), engine.Go()
	net, x := relu(t, nn.ReLU)
	layers, err := ActivationLayers(net)
	if err != nil {
		t.Fatal(err)
	}
	var p SparsityProbe
	if err := MeasureActivations(ctx, b, net, x, layers, &p, MeasureOptions{Batch: 4}); err != nil { // the last batch is filled up
		t.Fatal(err)
	}
	got, err := p.Report()
	if err != nil {
		t.Fatal(err)
	}
	for i, l := range got {
		a, _, err := compress.Capture(ctx, b, net, x, 4, layers[i].Value)
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for _, v := range a[0] {
			if v > 0 {
				n++
			}
		}
		if want := float64(n) / float64(len(a[0])); l.Tokens != 40 || math.Abs(l.NonZero-want) > 1e-12 {
			t.Errorf("%+v: want 40 tokens and a share of %g", l, want)
		}
	}
	valid := make([]bool, 40)
	for i := range valid {
		valid[i] = i%4 < 2
	}
	var half SparsityProbe
	if err := MeasureActivations(ctx, b, net, x, layers, &half, MeasureOptions{Batch: 4, Valid: valid}); err != nil {
		t.Fatal(err)
	}
	if r, err := half.Report(); err != nil || r[0].Tokens != 20 {
		t.Errorf("%+v (%v): want the 20 tokens that count", r, err)
	}
	for _, valid := range [][]bool{valid[:39], valid[:20]} {
		if MeasureActivations(ctx, b, net, x, layers, &SparsityProbe{}, MeasureOptions{Valid: valid}) == nil {
			t.Errorf("%d marks for 40 tokens: no error", len(valid))
		}
	}
}

func TestLimitActivations(t *testing.T) {
	ctx, b := context.Background(), engine.Go()
	for _, act := range []nn.Op{nn.ReLU, nn.GELU{}} {
		net, x := relu(t, act)
		layers, err := ActivationLayers(net)
		if err != nil {
			t.Fatal(err)
		}
		want, _, err := compress.Evaluate(ctx, b, net, x, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, k := range []int{24, 23, 2} {
			limited, err := LimitActivations(net, layers, k)
			if err != nil {
				t.Fatal(err)
			}
			got, _, err := compress.Evaluate(ctx, b, limited, x, 0)
			if err != nil {
				t.Fatal(err)
			}
			if same := slices.Equal(got, want); same != (k == 24) && !(k == 23 && act == nn.Op(nn.ReLU)) {
				t.Errorf("%T, k = %d: the outputs stay: %t", act, k, same)
			}
			if k == 2 {
				a, _, err := compress.Capture(ctx, b, limited, x, 0, layers[1].Name+".topk")
				if err != nil {
					t.Fatal(err)
				}
				for at := 0; at < len(a[0]); at += 24 {
					if n := 24 - count0(a[0][at:at+24]); n > 2 {
						t.Fatalf("%T: a token keeps %d activations", act, n)
					}
				}
			}
		}
		if _, err := LimitActivations(net, layers, 0); err == nil {
			t.Error("k = 0: no error")
		}
		if net.Node("blk.0.act.topk") != nil {
			t.Error("the network given was changed")
		}
	}
}

func count0(v []float32) (n int) {
	for _, x := range v {
		if x == 0 {
			n++
		}
	}
	return n
}

func TestLimitGatedActivations(t *testing.T) {
	for _, act := range []nn.Op{nn.ReLU, nn.SiLU} {
		net := must(t)(zoo.Decoder(zoo.DecoderOptions{Depth: 1, Dim: 16, MLP: 32, Heads: 2, Context: 4, Act: act}))
		layers, err := ActivationLayers(net)
		if err != nil {
			t.Fatal(err)
		}
		limited, err := LimitActivations(net, layers, 3)
		if err != nil {
			t.Fatal(err)
		}
		tokens := tensors.FromFlatDataAndDimensions([]int32{1, 2, 3, 4}, 1, 4)
		down := limited.Node("blk.0.down").In[0]
		out, err := limited.Run(engine.Go(), []*tensors.Tensor{tokens}, down)
		if err != nil {
			t.Fatal(err)
		}
		a := nn.Floats(out[1])
		for at := 0; at < len(a); at += 32 {
			if n := 32 - count0(a[at:at+32]); n > 3 {
				t.Errorf("%v: %d inputs of the second product are not 0", act, n)
			}
		}
	}
}

func TestTopKIsStored(t *testing.T) {
	for _, act := range []nn.Op{ReLUTopK{K: 3}, ReLUTopK{K: 3, Buckets: 12}, MagnitudeTopK{K: 4}} {
		net, x := relu(t, act)
		path := filepath.Join(t.TempDir(), "net.safetensors")
		if err := safetensors.WriteNetwork(path, net); err != nil {
			t.Fatal(err)
		}
		back, err := safetensors.ReadNetwork(path, StoredTypes()...)
		if err != nil {
			t.Fatal(err)
		}
		want, _, err := compress.Evaluate(context.Background(), engine.Go(), net, x, 0)
		if err != nil {
			t.Fatal(err)
		}
		got, _, err := compress.Evaluate(context.Background(), engine.Go(), back, x, 0)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%+v: another network came back (%v)", act, err)
		}
		file, err := onnx.Marshal(net, onnx.WriteOptions{})
		if err != nil || !bytes.Contains(file, []byte("TopK")) {
			t.Errorf("%+v: no TopK in the ONNX file (%v)", act, err)
		}
	}
}

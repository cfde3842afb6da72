package norm_test

import (
	"context"
	"math"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/design/norm"
	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/learn/optim"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/fold"
	"github.com/lathe-ml/lathe/nn/onnx"
	"github.com/lathe-ml/lathe/nn/safetensors"
	"github.com/lathe-ml/lathe/nn/zoo"
)

var shortUnified = norm.Unified{Window: 2, Warmup: 2, CompensationStart: 2}

func smallViT(t *testing.T, o zoo.ViTOptions) *nn.Network {
	t.Helper()
	o.Size, o.Dim, o.Depth, o.Heads = 14, 16, 2, 2
	net, err := zoo.ViT(o)
	if err != nil {
		t.Fatal(err)
	}
	return net
}

func pictures(seed uint64, n, size int) []*tensors.Tensor {
	x := make([]float32, n*size*size)
	r := rng.New(seed, "pictures")
	rng.Uniform(r, x, 0, 1)
	y := make([]int32, n)
	for i := range y {
		y[i] = int32(r.IntN(10))
	}
	return []*tensors.Tensor{tensors.FromFlatDataAndDimensions(x, n, size, size, 1), tensors.FromFlatDataAndDimensions(y, n)}
}

// trained gives a classifier's norms statistics, gains and biases of their own.
func trained(t *testing.T, net *nn.Network, steps int) *nn.Network {
	t.Helper()
	tr, err := learn.NewTrainer(enginetest.Backend(), &net.Params, learn.Classifier(net), learn.Options{LR: .02})
	if err != nil {
		t.Fatal(err)
	}
	defer tr.Finalize()
	for k := range steps {
		if _, err := tr.Step(pictures(uint64(k), 8, 14)...); err != nil {
			t.Fatal(err)
		}
	}
	return net
}

// mustFold folds a copy and compares it with the network on an input.
func mustFold(t *testing.T, net *nn.Network, x *tensors.Tensor) (*nn.Network, fold.Report) {
	t.Helper()
	folded := net.Clone()
	r, err := fold.Norms(folded)
	if err != nil {
		t.Fatal(err)
	}
	want, err := net.Run(enginetest.Backend(), []*tensors.Tensor{x})
	if err != nil {
		t.Fatal(err)
	}
	got, err := folded.Run(enginetest.Backend(), []*tensors.Tensor{x})
	if err != nil {
		t.Fatal(err)
	}
	near(t, "the folded network's output", nn.Float64s(got[0]), nn.Float64s(want[0]), 1e-5)
	return folded, r
}

func TestFoldedNetworkIsTheSame(t *testing.T) {
	pre := []string{"blk.0.norm1", "blk.0.norm2", "blk.1.norm1", "blk.1.norm2", "norm"}
	for name, c := range map[string]struct {
		o                zoo.ViTOptions
		folded, explicit []string
	}{
		"pre-norm, mean pooling":      {zoo.ViTOptions{Norm: shortUnified, MeanPool: true}, pre, nil},
		"pre-norm, class token":       {zoo.ViTOptions{Norm: shortUnified}, pre, nil},
		"batch norm":                  {zoo.ViTOptions{Norm: nn.BatchNorm{}, MeanPool: true}, pre, nil},
		"post-norm keeps its streams": {zoo.ViTOptions{Norm: shortUnified, MeanPool: true, Scheme: zoo.PostNorm{}}, []string{"blk.1.norm2", "norm"}, pre[:3]},
	} {
		t.Run(name, func(t *testing.T) {
			net := trained(t, smallViT(t, c.o), 5)
			folded, r := mustFold(t, net, pictures(50, 6, 14)[0])
			if !slices.Equal(r.Folded, c.folded) || !slices.Equal(r.Explicit, c.explicit) || len(r.Kept) > 0 {
				t.Errorf("folded %v, explicit %v, kept %v", r.Folded, r.Explicit, r.Kept)
			}
			for _, x := range folded.Nodes {
				if _, ok := x.Op.(nn.AffineNorm); ok {
					t.Errorf("%q is still a norm", x.Name)
				}
			}
			for _, s := range c.explicit {
				if x := folded.Node(s); x == nil || x.Op != nn.Add || folded.Node(s+".scaled").Op != nn.Mul {
					t.Errorf("%q has no scale and shift", s)
				}
			}
			if again, err := fold.Norms(folded); err != nil || len(again.Folded)+len(again.Explicit) > 0 {
				t.Errorf("folding again: %+v, %v", again, err)
			}
		})
	}
}

// The whole network on real pictures, to 1e-4 of the largest logit.
func TestFoldedNetworkOnRealImages(t *testing.T) {
	data.RequireTest(t, "fashion-mnist")
	test, err := data.FashionMNIST(context.Background(), false)
	if err != nil {
		t.Fatal(err)
	}
	test = test.First(1000)
	net, err := zoo.ViT(zoo.ViTOptions{Dim: 48, MLP: 96, Norm: norm.Unified{Warmup: 4, CompensationStart: 4}, MeanPool: true})
	if err != nil {
		t.Fatal(err)
	}
	tr, err := learn.NewTrainer(enginetest.Backend(), &net.Params, learn.Classifier(net), learn.Options{LR: 2e-3})
	if err != nil {
		t.Fatal(err)
	}
	defer tr.Finalize()
	batch := func(from, to int) []*tensors.Tensor {
		idx := make([]int, to-from)
		for i := range idx {
			idx[i] = from + i
		}
		labels, err := test.LabelsTensor(idx)
		if err != nil {
			t.Fatal(err)
		}
		return []*tensors.Tensor{tensors.FromFlatDataAndDimensions(test.Floats(idx, nil), len(idx), 28, 28, 1), labels}
	}
	for k := range 8 {
		if _, err := tr.Step(batch(32*k, 32*k+32)...); err != nil {
			t.Fatal(err)
		}
	}
	folded := net.Clone()
	if r, err := fold.Norms(folded); err != nil || len(r.Folded) != 9 {
		t.Fatalf("%+v, %v", r, err)
	}
	in := []*tensors.Tensor{batch(0, 1000)[0]}
	want, err := net.Run(enginetest.Backend(), in)
	if err != nil {
		t.Fatal(err)
	}
	got, err := folded.Run(enginetest.Backend(), in)
	if err != nil {
		t.Fatal(err)
	}
	largest, worst := 0., 0.
	w, g := nn.Float64s(want[0]), nn.Float64s(got[0])
	for i := range w {
		largest, worst = max(largest, math.Abs(w[i])), max(worst, math.Abs(w[i]-g[i]))
	}
	if !(worst <= 1e-4*largest) {
		t.Errorf("differs by %g, largest logit %g", worst, largest)
	}
}

func TestFoldingRefusesAnUntrainedNorm(t *testing.T) {
	net := smallViT(t, zoo.ViTOptions{Norm: shortUnified, MeanPool: true})
	nodes := len(net.Nodes)
	before := net.Params.Clone()
	_, err := fold.Norms(net)
	if err == nil || !strings.Contains(err.Error(), "blk.0.norm1") || !strings.Contains(err.Error(), "no training step") {
		t.Fatalf("%v", err)
	}
	if len(net.Nodes) != nodes {
		t.Error("the network was changed all the same")
	}
	for p := range before.All() {
		if q := net.Params.Get(p.Name); q == nil || !slices.Equal(q.Data(), p.Data()) {
			t.Errorf("parameter %q was changed all the same", p.Name)
		}
	}
	trained(t, net, 1)
	net.Param(net.Node("blk.1.norm1"), "var").Value = tensors.FromFlatDataAndDimensions(slices.Repeat([]float32{float32(math.NaN())}, 16), 16)
	if _, err := fold.Norms(net); err == nil || !strings.Contains(err.Error(), "blk.1.norm1") {
		t.Errorf("a statistic that is no number: %v", err)
	}
}

func TestFoldingIntoWhatStandsInFront(t *testing.T) {
	b := nn.NewBuilder(3)
	x := b.Image("image", 14, 14, 1)
	x = b.Add("norm0", nn.BatchNorm{}, b.Add("conv", nn.Conv{Out: 4, Kernel: []int{3, 3}, NoBias: true}, x))
	x = b.Add("act", nn.ReLU, x)
	x = b.Add("flat", nn.Reshape{Dims: []int{0, 12 * 12 * 4}}, x)
	x = b.Add("fc", nn.Dense{Out: 8}, x)
	x = b.Add("act2", nn.ReLU, b.Add("norm1", shortUnified, x))
	net, err := b.Finish(b.Add("head", nn.Dense{Out: 10}, x))
	if err != nil {
		t.Fatal(err)
	}
	folded, r := mustFold(t, trained(t, net, 4), pictures(51, 5, 14)[0])
	if !slices.Equal(r.Folded, []string{"norm0", "norm1"}) || folded.Node("fc") != nil || folded.Node("norm1").Op.Kind() != "dense" {
		t.Errorf("%+v", r)
	}
}

func TestUnifiedInFiles(t *testing.T) {
	net := trained(t, smallViT(t, zoo.ViTOptions{Norm: shortUnified, MeanPool: true, Scheme: zoo.PostNorm{}}), 5)
	x := pictures(52, 3, 14)[0]
	want, err := net.Run(enginetest.Backend(), []*tensors.Tensor{x})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	file := filepath.Join(dir, "net.safetensors")
	if err := safetensors.WriteNetwork(file, net); err != nil {
		t.Fatal(err)
	}
	back, err := safetensors.ReadNetwork(file, norm.Unified{})
	if err != nil {
		t.Fatal(err)
	}
	for p := range net.Params.All() {
		if q := back.Params.Get(p.Name); q == nil || q.Role != p.Role || !slices.Equal(q.Data(), p.Data()) {
			t.Errorf("parameter %q did not survive", p.Name)
		}
	}
	if x := back.Node("norm"); x.Op != shortUnified || back.Param(x, "steps").Data()[0] != 5 {
		t.Errorf("%+v", x)
	}
	folded := net.Clone()
	if _, err := fold.Norms(folded); err != nil {
		t.Fatal(err)
	}
	for name, n := range map[string]*nn.Network{"unfolded": net, "folded": folded} {
		file := filepath.Join(dir, name+".onnx")
		if err := onnx.WriteFile(file, n, onnx.WriteOptions{}); err != nil {
			t.Fatal(err)
		}
		back, err := onnx.ReadFile(file, onnx.Options{})
		if err != nil {
			t.Fatal(err)
		}
		got, err := back.Run(enginetest.Backend(), []*tensors.Tensor{x})
		if err != nil {
			t.Fatal(err)
		}
		near(t, name+" ONNX", nn.Float64s(got[0]), nn.Float64s(want[0]), 1e-5)
	}
}

// Evaluation moves no state; a resumed training goes on as if it had not stopped.
func TestUnifiedStateIsKept(t *testing.T) {
	file := filepath.Join(t.TempDir(), "checkpoint")
	fit := func(net *nn.Network, from, to int, resume bool) {
		tr, err := learn.NewTrainer(enginetest.Backend(), &net.Params, learn.Classifier(net), learn.Options{Optimizer: optim.AdamW{}, LR: .01})
		if err != nil {
			t.Fatal(err)
		}
		defer tr.Finalize()
		if resume {
			if _, err := tr.Load(file, nil); err != nil {
				t.Fatal(err)
			}
		}
		for k := from; k < to; k++ {
			if _, err := tr.Step(pictures(uint64(k), 8, 14)...); err != nil {
				t.Fatal(err)
			}
		}
		if err := tr.Save(file, nil); err != nil {
			t.Fatal(err)
		}
	}
	options := zoo.ViTOptions{Norm: shortUnified, MeanPool: true}
	whole := smallViT(t, options)
	fit(whole, 0, 9, false)

	first := smallViT(t, options)
	fit(first, 0, 5, false)
	for _, training := range []bool{false, true} {
		r, err := nn.NewRunner(enginetest.Backend(), first, nn.RunOptions{Training: training})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.Run(pictures(1, 4, 14)[0]); err != nil {
			t.Fatal(err)
		}
		r.Finalize()
	}
	if k := first.Params.Get("norm.steps").Data()[0]; k != 5 {
		t.Errorf("running the network moved the counter to %g", k)
	}
	second := smallViT(t, options)
	fit(second, 5, 9, true)
	for p := range whole.Params.All() {
		if !slices.Equal(p.Data(), second.Params.Get(p.Name).Data()) {
			t.Errorf("parameter %q differs after the resumption", p.Name)
		}
	}
	if rates := norm.SkipRates(whole); len(rates) != 5 || rates["norm"] < 0 || rates["norm"] > 1 {
		t.Errorf("%v", rates)
	}
}

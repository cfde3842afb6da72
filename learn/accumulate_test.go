package learn_test

import (
	"math"
	"slices"
	"testing"

	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/learn/optim"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// part returns cases from to to of a batch.
func part(x, y *tensors.Tensor, from, to int) []*tensors.Tensor {
	d := x.Shape().Dimensions
	size := x.Shape().Size() / d[0]
	labels := make([]int32, to-from)
	for i := range labels {
		labels[i] = int32(nn.Floats(y)[from+i])
	}
	return []*tensors.Tensor{
		tensors.FromFlatDataAndDimensions(slices.Clone(nn.Floats(x)[from*size:to*size]), append([]int{to - from}, d[1:]...)...),
		tensors.FromFlatDataAndDimensions(labels, to-from),
	}
}

func TestMicroBatchesEqualOneBatch(t *testing.T) {
	x, y := images(8)
	for name, o := range map[string]learn.Options{
		"adamw":       {Optimizer: optim.AdamW{Decay: .1}, ClipNorm: .5, EMA: .9},
		"adagrad":     {Optimizer: optim.AdaGrad{Momentum: .9}, LR: .05},
		"adagradnorm": {Optimizer: optim.AdaGradNorm{}, LR: 1},
		"rows":        {Optimizer: optim.AdaGradNorm{RowWise: true}, LR: .1},
	} {
		a, b := vit(t, 0), vit(t, 0)
		one, err := learn.NewTrainer(enginetest.Backend(), &a.Params, learn.Classifier(a), o)
		if err != nil {
			t.Fatal(err)
		}
		many, err := learn.NewTrainer(enginetest.Backend(), &b.Params, learn.Classifier(b), o)
		if err != nil {
			t.Fatal(err)
		}
		for range 3 {
			i, err := one.Step(x, y)
			if err != nil {
				t.Fatal(err)
			}
			j, err := many.StepMicro(many.LR(), [][]*tensors.Tensor{part(x, y, 0, 3), part(x, y, 3, 6), part(x, y, 6, 8)})
			if err != nil {
				t.Fatal(err)
			}
			if i.Step != j.Step || math.Abs(i.Loss-j.Loss) > 1e-4 || math.Abs(i.Metrics["accuracy"]-j.Metrics["accuracy"]) > 1e-6 {
				t.Errorf("%s: %+v in one batch, %+v in three", name, i, j)
			}
		}
		for p := range a.Params.All() {
			q := b.Params.Get(p.Name).Data()
			for i, v := range p.Data() {
				// Elements whose gradients are rounding noise take steps of full size either way.
				if d := math.Abs(float64(v - q[i])); name == "adagradnorm" && d > 1e-4 || d > .05 {
					t.Fatalf("%s: %s[%d] is %g and %g", name, p.Name, i, v, q[i])
				}
			}
		}
	}
}

func TestRefusedMicroBatchKeepsEverything(t *testing.T) {
	n, err := zoo.ViT(zoo.ViTOptions{Dim: 16, Depth: 1, Heads: 2, Norm: nn.BatchNorm{}, Seed: 5})
	if err != nil {
		t.Fatal(err)
	}
	x, y := images(8)
	tr, err := learn.NewTrainer(enginetest.Backend(), &n.Params, learn.Classifier(n), learn.Options{})
	if err != nil {
		t.Fatal(err)
	}
	before := n.Clone()
	bad := tensors.FromFlatDataAndDimensions(make([]float32, 4*27*28), 4, 27, 28, 1)
	for _, micro := range [][][]*tensors.Tensor{nil, {{}}, {part(x, y, 0, 4), {bad, part(x, y, 4, 8)[1]}}} {
		if _, err := tr.StepMicro(.1, micro); err == nil {
			t.Fatal("a bad micro-batch was accepted")
		}
	}
	for p := range before.Params.All() {
		if !slices.Equal(p.Data(), n.Params.Get(p.Name).Data()) {
			t.Errorf("%s changed", p.Name)
		}
	}
	if info, err := tr.StepMicro(.1, [][]*tensors.Tensor{part(x, y, 0, 4), part(x, y, 4, 8)}); err != nil || info.Step != 1 || tr.Steps() != 1 {
		t.Errorf("step after refused ones: %+v, %v", info, err)
	}
	if slices.Equal(before.Params.Get("norm.mean").Data(), n.Params.Get("norm.mean").Data()) {
		t.Error("running statistics did not move")
	}
}

func TestMaskedGradientsDoNotSlowTheOthers(t *testing.T) {
	// AdaGradNorm's rate comes from what may change: with all but one weight frozen by a mask, its first step is lr·g/√(g²+v₀).
	n := vit(t, 0)
	w := n.Params.Get("head.w")
	mask := make([]float32, w.Value.Shape().Size())
	mask[0] = 1
	before := w.Data()[0]
	x, y := images(4)
	tr, err := learn.NewTrainer(enginetest.Backend(), &n.Params, learn.Classifier(n), learn.Options{
		Optimizer: optim.AdaGradNorm{Init: 1e-12}, LR: .5,
		Masks: map[string]*tensors.Tensor{"head.w": tensors.FromFlatDataAndDimensions(mask, w.Value.Shape().Dimensions...)},
		Factors: func(p *nn.Param) learn.Factors {
			if p.Name != "head.w" {
				return learn.Factors{}
			}
			return learn.DefaultFactors(p)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tr.Step(x, y); err != nil {
		t.Fatal(err)
	}
	if d := math.Abs(float64(n.Params.Get("head.w").Data()[0] - before)); math.Abs(d-.5) > 1e-3 {
		t.Errorf("moved by %g, want 0.5", d)
	}
}

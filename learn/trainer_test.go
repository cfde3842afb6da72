package learn_test

import (
	"math"
	"testing"

	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/learn/optim"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/zoo"
)

func images(n int) (x, y *tensors.Tensor) {
	r := rng.New(1, "data")
	d := make([]float32, n*28*28)
	l := make([]int32, n)
	for i := range n {
		l[i] = int32(r.IntN(10))
		for j := range 784 {
			d[i*784+j] = float32(r.NormFloat64()*.3) + float32((int(l[i])*7+j)%10)/10
		}
	}
	return tensors.FromFlatDataAndDimensions(d, n, 28, 28, 1), tensors.FromFlatDataAndDimensions(l, n)
}

func vit(t *testing.T, drop float64) *nn.Network {
	t.Helper()
	n, err := zoo.ViT(zoo.ViTOptions{Dim: 32, Depth: 2, Heads: 2, Dropout: drop, Seed: 3})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestTrainingLowersTheLoss(t *testing.T) {
	b := enginetest.Backend()
	x, y := images(16)
	for name, opt := range map[string]optim.Optimizer{"adamw": optim.AdamW{Decay: .05}, "sgd": optim.SGD{Momentum: .9}, "nesterov": optim.SGD{Momentum: .9, Nesterov: true, Decay: 1e-4}} {
		t.Run(name, func(t *testing.T) {
			n := vit(t, .1)
			lr := 2e-3
			if name != "adamw" {
				lr = .02
			}
			tr, err := learn.NewTrainer(b, &n.Params, learn.Classifier(n), learn.Options{Optimizer: opt, LR: lr, ClipNorm: 1, EMA: .9, EMAWarmup: true})
			if err != nil {
				t.Fatal(err)
			}
			var first, last learn.Info
			for i := range 30 {
				info, err := tr.Step(x, y)
				if err != nil {
					t.Fatal(err)
				}
				if last = info; i == 0 {
					first = info
				}
			}
			if !(last.Loss < .7*first.Loss) || math.IsNaN(last.Norm) {
				t.Errorf("loss went from %g to %g, norm %g", first.Loss, last.Loss, last.Norm)
			}
			if _, ok := last.Metrics["accuracy"]; !ok {
				t.Error("accuracy was not reported")
			}
			if tr.EMA().Get("head.w") == nil {
				t.Error("no EMA")
			}
		})
	}
}

func TestCloneSurvivesTraining(t *testing.T) {
	n := vit(t, 0)
	x, y := images(4)
	tr, err := learn.NewTrainer(enginetest.Backend(), &n.Params, learn.Classifier(n), learn.Options{})
	if err != nil {
		t.Fatal(err)
	}
	c := n.Clone()
	before := c.Params.Get("head.w").Data()
	for range 3 {
		if _, err := tr.Step(x, y); err != nil {
			t.Fatal(err)
		}
	}
	after := c.Params.Get("head.w").Data()
	for i := range before {
		if before[i] != after[i] {
			t.Fatal("training the original changed the clone")
		}
	}
}

func TestRefusedBatchKeepsParameters(t *testing.T) {
	n := vit(t, 0)
	x, y := images(4)
	tr, err := learn.NewTrainer(enginetest.Backend(), &n.Params, learn.Classifier(n), learn.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tr.Step(tensors.FromFlatDataAndDimensions(make([]float32, 4*27*28), 4, 27, 28, 1), y); err == nil {
		t.Fatal("a batch of another image size was accepted")
	} else {
		t.Log(err)
	}
	if _, err := tr.Step(x, y); err != nil {
		t.Fatalf("step after a refused batch: %v", err)
	}
}

func TestMaskAndFactorsFreeze(t *testing.T) {
	n := vit(t, 0)
	x, y := images(4)
	w := n.Params.Get("head.w")
	mask := make([]float32, w.Value.Shape().Size())
	mask[0] = 1
	before, norm := w.Data(), n.Params.Get("norm.w").Data()
	tr, err := learn.NewTrainer(enginetest.Backend(), &n.Params, learn.Classifier(n), learn.Options{
		Masks: map[string]*tensors.Tensor{"head.w": tensors.FromFlatDataAndDimensions(mask, w.Value.Shape().Dimensions...)},
		Factors: func(p *nn.Param) learn.Factors {
			if p.Name == "norm.w" {
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
	after := n.Params.Get("head.w").Data()
	for i := range after {
		if changed := after[i] != before[i]; changed != (i == 0) {
			t.Fatalf("head.w[%d] changed: %v", i, changed)
		}
	}
	for i, v := range n.Params.Get("norm.w").Data() {
		if v != norm[i] {
			t.Fatal("a parameter with rate 0 changed")
		}
	}
}

func TestAdamWMatchesHandValue(t *testing.T) {
	// One parameter w = 1 with gradient 2: m = .2, v = .004, both corrected to 2 and 4: w = 1 − lr(2/2 + decay).
	b := nn.NewBuilder(1)
	x := b.Input("x", tensors.FromValue([][]float32{{1}}).Shape())
	n, err := b.Finish(b.Add("w", nn.Dense{Out: 1, NoBias: true, W: nn.Plain{Init: nn.Fill(1)}}, x))
	if err != nil {
		t.Fatal(err)
	}
	tr, err := learn.NewTrainer(enginetest.Backend(), &n.Params, func(env *nn.Env, batch []*graph.Node) *graph.Node {
		return graph.ReduceAllSum(graph.MulScalar(n.Lower(env, map[string]*graph.Node{"x": batch[0]})[0], 2))
	}, learn.Options{Optimizer: optim.AdamW{Decay: .5}, LR: .1})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tr.Step(tensors.FromValue([][]float32{{1}})); err != nil {
		t.Fatal(err)
	}
	if got := n.Params.Get("w.w").Data()[0]; math.Abs(float64(got)-.85) > 1e-6 {
		t.Errorf("w = %g, want 0.85", got)
	}
}

func TestMovesFollowTheValues(t *testing.T) {
	n := vit(t, 0)
	x, y := images(4)
	w := n.Params.Get("head.w")
	mask := make([]float32, w.Value.Shape().Size())
	for i := range mask {
		mask[i] = float32(min(i%3, 1))
	}
	tr, err := learn.NewTrainer(enginetest.Backend(), &n.Params, learn.Classifier(n), learn.Options{
		Optimizer: optim.AdamW{Decay: .5}, LR: .05,
		Masks: map[string]*tensors.Tensor{"head.w": tensors.FromFlatDataAndDimensions(mask, w.Value.Shape().Dimensions...)},
		Moves: func(param string, w *graph.Node) *graph.Node { // what is positive
			if param != "head.w" {
				return nil
			}
			return graph.ConvertDType(graph.GreaterThan(w, graph.ZerosLike(w)), w.DType())
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	fc := n.Params.Get("blk.0.fc1.w").Data()
	for step := range 4 { // signs change on the way
		before := n.Params.Get("head.w").Data()
		if _, err := tr.Step(x, y); err != nil {
			t.Fatal(err)
		}
		for i, v := range n.Params.Get("head.w").Data() {
			if may := before[i] > 0 && mask[i] > 0; (v != before[i]) != may {
				t.Fatalf("step %d: head.w[%d], which was %g (mask %g), is %g", step, i, before[i], mask[i], v)
			}
		}
	}
	if after := n.Params.Get("blk.0.fc1.w").Data(); after[0] == fc[0] {
		t.Error("a parameter of which all may move has stood still")
	}
}

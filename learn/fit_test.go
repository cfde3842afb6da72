package learn_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/learn/optim"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/zoo"
)

func trainer(t *testing.T) (*nn.Network, *learn.Trainer) {
	t.Helper()
	n, err := zoo.ViT(zoo.ViTOptions{Dim: 16, Depth: 1, Heads: 2, Dropout: .2, Norm: nn.BatchNorm{}, Seed: 5})
	if err != nil {
		t.Fatal(err)
	}
	tr, err := learn.NewTrainer(enginetest.Backend(), &n.Params, learn.Classifier(n), learn.Options{
		Optimizer: optim.AdamW{Decay: .1}, EMA: .99, Schedule: optim.Cosine(12, 2, 0), Seed: 9,
	})
	if err != nil {
		t.Fatal(err)
	}
	return n, tr
}

func allData(n *nn.Network, e *nn.Params) (d []float32) {
	for p := range n.Params.All() {
		d = append(d, p.Data()...)
	}
	for p := range e.All() {
		d = append(d, p.Data()...)
	}
	return d
}

func TestResumeIsBitExact(t *testing.T) {
	x, y := images(8)
	batch := func(int) ([]*tensors.Tensor, error) { return []*tensors.Tensor{x, y}, nil }
	whole, tr := trainer(t)
	if _, err := tr.Fit(t.Context(), learn.FitOptions{Steps: 12, Batch: batch}); err != nil {
		t.Fatal(err)
	}
	want := allData(whole, tr.EMA())

	path := filepath.Join(t.TempDir(), "run.ckpt")
	_, tr = trainer(t)
	ctx, stop := context.WithCancel(t.Context())
	_, err := tr.Fit(ctx, learn.FitOptions{Steps: 12, Batch: batch, Checkpoint: path, After: []learn.Hook{func(_ *learn.Trainer, i learn.Info) error {
		if i.Step == 5 {
			stop()
		}
		return nil
	}}})
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("stopped run returned %v", err)
	}
	n, tr := trainer(t)
	first := 0
	_, err = tr.Fit(t.Context(), learn.FitOptions{Steps: 12, Batch: batch, Checkpoint: path, Before: []learn.Hook{func(_ *learn.Trainer, i learn.Info) error {
		if first == 0 {
			first = i.Step
		}
		return nil
	}}})
	if err != nil {
		t.Fatal(err)
	}
	if first != 6 {
		t.Errorf("resumed at step %d, want 6", first)
	}
	if got := allData(n, tr.EMA()); !slices.Equal(got, want) {
		t.Error("the resumed run differs from the one that was never stopped")
	}
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Error("the checkpoint was not removed at the end")
	}
}

func TestLoadRefusesForeignCheckpoint(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run.ckpt")
	_, tr := trainer(t)
	if err := tr.Save(path, nil); err != nil {
		t.Fatal(err)
	}
	n, err := zoo.MLP(zoo.MLPOptions{})
	if err != nil {
		t.Fatal(err)
	}
	other, err := learn.NewTrainer(enginetest.Backend(), &n.Params, learn.Classifier(n), learn.Options{})
	if err != nil {
		t.Fatal(err)
	}
	before := n.Params.Get("head.w").Data()
	if ok, err := other.Load(path, nil); ok || err == nil {
		t.Fatalf("a foreign checkpoint was loaded: %v %v", ok, err)
	}
	if !slices.Equal(before, n.Params.Get("head.w").Data()) {
		t.Error("a refused checkpoint changed the parameters")
	}
	if err := os.WriteFile(path, []byte("no checkpoint"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := other.Load(path, nil); err == nil {
		t.Error("a corrupt checkpoint was loaded")
	}
}

func TestDivergenceIsReported(t *testing.T) {
	x, y := images(4)
	n, err := zoo.MLP(zoo.MLPOptions{Hidden: []int{16}})
	if err != nil {
		t.Fatal(err)
	}
	tr, err := learn.NewTrainer(enginetest.Backend(), &n.Params, learn.Classifier(n), learn.Options{Optimizer: optim.SGD{}, LR: 1e30})
	if err != nil {
		t.Fatal(err)
	}
	flat := tensors.FromFlatDataAndDimensions(nn.Floats(x), 4, 784)
	_, err = tr.Fit(t.Context(), learn.FitOptions{Steps: 20, Batch: func(int) ([]*tensors.Tensor, error) { return []*tensors.Tensor{flat, y}, nil }})
	if !errors.Is(err, learn.ErrDiverged) {
		t.Errorf("got %v", err)
	}
}

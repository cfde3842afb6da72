package normtable_test

import (
	"context"
	"iter"
	"math"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/lab/normtable"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// setup is a small vision transformer on pictures whose brightness is their class.
func setup() normtable.Setup {
	batch := func(seed uint64, step int) ([]*tensors.Tensor, error) {
		r := rng.New(seed, "batch")
		x, y := make([]float32, 16*8*8), make([]int32, 16)
		for i := range y {
			y[i] = int32(r.IntN(2))
			for j := range 64 {
				x[i*64+j] = float32(y[i]) + float32(r.NormFloat64())
			}
		}
		return []*tensors.Tensor{tensors.FromFlatDataAndDimensions(x, 16, 8, 8, 1), tensors.FromFlatDataAndDimensions(y, 16)}, nil
	}
	return normtable.Setup{
		Title: "vit on brightness", Accuracy: true, Loss: learn.Classifier, Batch: batch, Steps: 20, LR: 3e-3, Seeds: []uint64{0, 1}, Rounds: 3,
		Build: func(n nn.Norm, s zoo.Scheme, seed uint64) (*nn.Network, error) {
			return zoo.ViT(zoo.ViTOptions{Size: 8, Patch: 4, Dim: 8, Depth: 2, Heads: 2, Classes: 2, MeanPool: true, Norm: n, Scheme: s, Seed: seed})
		},
		Test: func() iter.Seq2[float64, []*tensors.Tensor] {
			return func(yield func(float64, []*tensors.Tensor) bool) {
				b, err := batch(99, 0)
				if err == nil {
					yield(16, b)
				}
			}
		},
	}
}

func TestTableComparesNorms(t *testing.T) {
	c, err := normtable.ParseCandidates("layer, batch,rms@post,none", true)
	if err != nil {
		t.Fatal(err)
	}
	table, err := normtable.Run(t.Context(), enginetest.Backend(), setup(), c, normtable.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for i, r := range table.Rows {
		if r.Candidate != c[i] || r.Error != "" {
			t.Errorf("row %d: %s: %s", i, r.Candidate, r.Error)
			continue
		}
		if !(r.Loss > 0) || r.LossLow > r.Loss || r.LossHigh < r.Loss || !(r.Accuracy >= 0 && r.Accuracy <= 100) {
			t.Errorf("%s: loss %g (%g … %g), accuracy %g", r.Candidate, r.Loss, r.LossLow, r.LossHigh, r.Accuracy)
		}
		if len(r.Gradients) != 2 || !(r.Evenness >= 1) || !(r.Step > 0) || !(r.Inference > 0) || !(r.Fused > 0) {
			t.Errorf("%s: %+v", r.Candidate, r)
		}
		if want := map[string]int{"batch": 5}[r.Norm]; r.Folded != want || r.FoldError > 1e-4 {
			t.Errorf("%s: %d norms folded, want %d, with an error of %g", r.Candidate, r.Folded, want, r.FoldError)
		}
	}
	text := string(table.Markdown())
	if !strings.Contains(text, "rms@post") || strings.Count(text, "\n|") < 5 {
		t.Errorf("the table reads\n%s", text)
	}
}

func TestStoppedTableGoesOn(t *testing.T) {
	c, err := normtable.ParseCandidates("layer,rms", true)
	if err != nil {
		t.Fatal(err)
	}
	whole, err := normtable.Run(t.Context(), enginetest.Backend(), setup(), c, normtable.Options{})
	if err != nil {
		t.Fatal(err)
	}
	o := normtable.Options{State: filepath.Join(t.TempDir(), "state.json"), Recipe: "r"}
	ctx, cancel := context.WithCancel(t.Context())
	o.Progress = func(label string, done, _ int) {
		if strings.HasPrefix(label, "rms seed 0") {
			cancel()
		}
	}
	if _, err := normtable.Run(ctx, enginetest.Backend(), setup(), c, o); err == nil {
		t.Fatal("the run was not stopped")
	}
	trained := map[string]bool{}
	o.Progress = func(label string, _, _ int) { trained[label] = true }
	again, err := normtable.Run(t.Context(), enginetest.Backend(), setup(), c, o)
	if err != nil {
		t.Fatal(err)
	}
	if trained["layer seed 0"] || trained["layer seed 1"] || !trained["rms seed 0"] {
		t.Errorf("after the stop these were trained: %v", trained)
	}
	for i := range again.Rows {
		if again.Rows[i].Loss != whole.Rows[i].Loss {
			t.Errorf("%s: loss %g after a stop, %g without", again.Rows[i].Candidate, again.Rows[i].Loss, whole.Rows[i].Loss)
		}
	}
}

func TestWhatDoesNotFitIsSaid(t *testing.T) {
	s := setup()
	s.LR = math.MaxFloat32
	c, err := normtable.ParseCandidates("none,group", true)
	if err != nil {
		t.Fatal(err)
	}
	table, err := normtable.Run(t.Context(), enginetest.Backend(), s, c, normtable.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if table.Rows[0].Error != "the training diverged" {
		t.Errorf("a learning rate of 1e38: %+v", table.Rows[0])
	}
	for _, bad := range []string{"", "layers", "layer@middle", "layer,layer"} {
		if c, err := normtable.ParseCandidates(bad, true); err == nil {
			t.Errorf("%q gives %v", bad, c)
		}
	}
	if _, err := normtable.ParseCandidates("layer@post", false); err == nil {
		t.Error("a place for a norm in a network that has none to choose")
	}
}

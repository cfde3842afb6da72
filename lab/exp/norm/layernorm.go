// Package norm holds the experiments of design/norm.
package norm

import (
	"context"
	"fmt"
	"math"

	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/data"
	method "github.com/lathe-ml/lathe/design/norm"
	"github.com/lathe-ml/lathe/lab"
	"github.com/lathe-ml/lathe/lab/exp/recipe"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/learn/optim"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// Experiments lists the experiments of the family.
func Experiments() []lab.Experiment {
	return []lab.Experiment{LayerNorm(), PreRMSNorm(), LayerNormScaling(), MixLN(), PowerNorm(), UnifiedNorm(), SLAB(), EvoNorm()}
}

// layerNormSizes are the sizes of the experiment at a scale.
type layerNormSizes struct {
	Train, Test        int // images
	Hidden             int // of the perceptron
	Steps128, Steps4   int
	Characters         int // of text, 90 % for training
	Embedding, Units   int
	Length, Batch      int
	TextSteps          int // evaluated at a quarter, a half and the end
	ImageRate, CharSpd float64
}

func sizesOf(s lab.Scale) layerNormSizes {
	z := layerNormSizes{Train: 20_000, Test: 5_000, Hidden: 256, Steps128: 1000, Steps4: 4000, Characters: 300_000, Embedding: 32, Units: 64, Length: 32, Batch: 32, TextSteps: 400, ImageRate: 1e-3, CharSpd: 2e-3}
	if s == lab.Smoke {
		z.Train, z.Test, z.Hidden, z.Steps128, z.Steps4, z.Characters, z.Units, z.TextSteps = 2_000, 200, 32, 60, 60, 30_000, 32, 60
	}
	return z
}

// LayerNorm compares layer norm with batch norm and none in a perceptron at batch sizes 128 and 4, and in an LSTM
// language model (arXiv:1607.06450, sections 6.3 to 6.6).
func LayerNorm() lab.Experiment {
	e := lab.Experiment{
		Method: "layernorm",
		Title:  "perceptron on Fashion-MNIST at batch 128 and 4; LSTM language model on Austen's novels",
		Recipe: []layerNormSizes{sizesOf(lab.Smoke), sizesOf(lab.Full)},
		Claims: []lab.Claim{
			{
				ID: "C1", Text: "batch 4: LN's loss over the first quarter of training is at most 0.85 of BN's", Paper: "LN is robust at batch 4 where BN degrades", Unit: "×",
				Measure: lab.Ratio("layer-b4", "batch-b4", "early_loss"), Bound: lab.AtMost(.85),
			},
			{
				ID: "C2", Text: "batch 128: LN's loss over the first quarter of training is at most 0.92 of the plain network's", Paper: "faster convergence", Unit: "×",
				Measure: lab.Ratio("layer-b128", "none-b128", "early_loss"), Bound: lab.AtMost(.92),
			},
			{
				ID: "C3", Text: "LN-LSTM after half of the steps is at most at the plain LSTM's bits per character after all", Paper: "best model at about 60 % of the training time", Unit: "bits",
				Measure: func(m lab.Metrics) float64 { return m.Get("ln-lstm", "bpc_half") - m.Get("lstm", "bpc_end") }, Bound: lab.AtMost(0),
			},
			{
				ID: "C4", Text: "the batch-4 BN network's test NLL with batch statistics exceeds that with running averages by 0.1", Paper: "BN degrades at batch 4", Unit: "nats",
				Measure: func(m lab.Metrics) float64 {
					return m.Get("batch-b4", "test_nll_batch_statistics") - m.Get("batch-b4", "test_nll")
				}, Bound: lab.AtLeast(.1),
			},
			{
				ID: "C5", Text: "leaving out the norm of the cell state costs 0.05 bits per character after a quarter of the steps", Paper: "(ablation)", Unit: "bits",
				Measure: func(m lab.Metrics) float64 {
					return m.Get("ln-lstm-no-cell", "bpc_quarter") - m.Get("ln-lstm", "bpc_quarter")
				}, Bound: lab.AtLeast(.05),
			},
		},
	}
	for _, batch := range []int{128, 4} {
		for _, kind := range []string{"none", "batch", "layer"} {
			e.Arms = append(e.Arms, lab.Arm{
				Name: fmt.Sprintf("%s-b%d", kind, batch), Baseline: kind != "layer",
				Run: func(ctx context.Context, t *lab.Trial) error { return perceptron(ctx, t, kind, batch) },
			})
		}
	}
	for _, a := range []struct {
		name string
		norm nn.RecurrentNorm
	}{
		{"lstm", nn.RecurrentNorm{}},
		{"ln-lstm", nn.FullNorm},
		{"ln-lstm-no-cell", nn.RecurrentNorm{Input: true, Recurrent: true}},
		{"ln-lstm-no-recurrent", nn.RecurrentNorm{Input: true, Cell: true}},
	} {
		e.Arms = append(e.Arms, lab.Arm{
			Name: a.name, Baseline: a.name == "lstm",
			Run: func(ctx context.Context, t *lab.Trial) error { return charModel(ctx, t, a.norm) },
		})
	}
	return e
}

func perceptron(ctx context.Context, t *lab.Trial, kind string, batch int) error {
	z := sizesOf(t.Scale)
	images := recipe.Images{TrainN: z.Train, TestN: z.Test, Flat: true}
	sets, err := images.Sets(ctx, t)
	if err != nil {
		return err
	}
	o := zoo.MLPOptions{Hidden: []int{z.Hidden, z.Hidden}, Seed: t.Seed}
	if kind != "none" {
		if o.Norm, err = method.New(kind, method.Config{}); err != nil {
			return err
		}
	}
	net, err := zoo.MLP(o)
	if err != nil {
		return err
	}
	steps := z.Steps128
	if batch == 4 {
		steps = z.Steps4
	}
	loss := learn.Classifier(net)
	tr, err := learn.NewTrainer(t.Backend, &net.Params, loss, learn.Options{Optimizer: optim.AdamW{}, LR: z.ImageRate, Seed: t.Seed})
	if err != nil {
		return err
	}
	defer tr.Finalize()
	order, err := data.NewBatcher(sets.Train.N, batch, t.Seed)
	if err != nil {
		return err
	}
	early, every := 0., max(1, steps/50)
	window := 0.
	_, err = tr.Fit(ctx, learn.FitOptions{
		Steps: steps,
		Batch: func(step int) ([]*tensors.Tensor, error) { return images.Tensors(sets, sets.Train, order.At(step)) },
		After: []learn.Hook{func(_ *learn.Trainer, i learn.Info) error {
			if i.Step <= steps/4 {
				early += i.Loss / float64(steps/4)
			}
			if window += i.Loss / float64(every); i.Step%every == 0 {
				t.Series("loss", float64(i.Step), window)
				window = 0
				t.Progress(i.Step, steps)
			}
			return nil
		}},
	})
	if err != nil {
		return err
	}
	t.Record("early_loss", early)
	nll, metrics, err := learn.Evaluate(t.Backend, &net.Params, loss, images.TestBatches(sets, 500))
	if err != nil {
		return err
	}
	t.Record("test_nll", nll)
	t.Record("test_accuracy", 100*metrics["accuracy"])
	if kind == "batch" && batch == 4 {
		always := net.Clone() // batch statistics at inference: the same parameters, evaluated four cases at a time
		for _, x := range always.Nodes {
			if bn, ok := x.Op.(nn.BatchNorm); ok {
				bn.Always = true
				x.Op = bn
			}
		}
		nll, _, err := learn.Evaluate(t.Backend, &always.Params, learn.Classifier(always), images.TestBatches(sets, 4))
		if err != nil {
			return err
		}
		t.Record("test_nll_batch_statistics", nll)
	}
	return nil
}

func charModel(ctx context.Context, t *lab.Trial, norm nn.RecurrentNorm) error {
	z := sizesOf(t.Scale)
	text := recipe.Text{Characters: z.Characters, Context: z.Length, Loop: recipe.Loop{Batch: z.Batch}}
	corpus, err := text.Corpus(ctx, t)
	if err != nil {
		return err
	}
	net, err := zoo.CharLSTM(zoo.CharLSTMOptions{Symbols: corpus.Symbols, Embedding: z.Embedding, Hidden: z.Units, Length: z.Length, Norm: norm, Seed: t.Seed})
	if err != nil {
		return err
	}
	loss := learn.LanguageModel(net)
	tr, err := learn.NewTrainer(t.Backend, &net.Params, loss, learn.Options{LR: z.CharSpd, ClipNorm: 5, Seed: t.Seed})
	if err != nil {
		return err
	}
	defer tr.Finalize()
	names := map[int]string{z.TextSteps / 4: "bpc_quarter", z.TextSteps / 2: "bpc_half", z.TextSteps: "bpc_end"}
	_, err = tr.Fit(ctx, learn.FitOptions{
		Steps: z.TextSteps,
		Batch: func(step int) ([]*tensors.Tensor, error) { return text.Batch(corpus, t.Seed, step) },
		After: []learn.Hook{func(tr *learn.Trainer, i learn.Info) error {
			t.Progress(i.Step, z.TextSteps)
			if i.Step%(z.TextSteps/20) != 0 && names[i.Step] == "" {
				return nil
			}
			nll, err := text.Evaluate(t, net, corpus)
			if err != nil {
				return err
			}
			bpc := nll / math.Ln2
			t.Series("validation_bpc", float64(i.Step), bpc)
			if name := names[i.Step]; name != "" {
				t.Record(name, bpc)
			}
			return nil
		}},
	})
	return err
}

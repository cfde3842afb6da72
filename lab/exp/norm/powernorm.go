package norm

import (
	"context"
	"fmt"
	"slices"

	method "github.com/lathe-ml/lathe/design/norm"
	"github.com/lathe-ml/lathe/internal/stat"
	"github.com/lathe-ml/lathe/lab"
	"github.com/lathe-ml/lathe/lab/exp/recipe"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// powerNormSizes are the sizes of the experiment at a scale.
type powerNormSizes struct {
	Text   recipe.Text
	Images recipe.Images
	Depth  int
	Width  int // the feed-forward part is four times as wide
	Heads  int
	Std    float64 // of the language model's initial weights
	Warmup int     // of PowerNorm, in steps
	From   int     // first step whose statistics count
}

func powerNormSizesOf(s lab.Scale) powerNormSizes {
	loop := recipe.Loop{Batch: 16, Steps: 250, Warmup: 30, LR: 2e-3, Floor: .1, ClipNorm: 1}
	z := powerNormSizes{
		Text:   recipe.Text{Characters: 300_000, Context: 32},
		Images: recipe.Images{TrainN: 10_000, TestN: 1_000, Standardize: true},
		Depth:  4, Width: 48, Heads: 4, Std: .02, Warmup: 30, From: 50,
	}
	if s == lab.Smoke {
		z.Text.Characters, z.Images.TrainN, z.Images.TestN = 20_000, 500, 200
		z.Depth, z.Width, z.Warmup, z.From = 2, 32, 5, 8
		loop.Steps, loop.Warmup = 30, 5
	}
	z.Text.Loop, z.Images.Loop = loop, loop
	return z
}

// PowerNorm compares PowerNorm with layer norm, batch norm and its intermediate variant PN-V in a character language
// model, and the fluctuation of batch norm's statistics on text with that on images (arXiv:2003.07845, sections 3 to 5).
func PowerNorm() lab.Experiment {
	e := lab.Experiment{
		Method: "powernorm",
		Title:  "character language model of width 48 on Austen's novels under layer, batch and power norm; statistics of batches of text and of images",
		Recipe: []powerNormSizes{powerNormSizesOf(lab.Smoke), powerNormSizesOf(lab.Full)},
		Claims: []lab.Claim{
			{
				ID: "C1a", Text: "pre-norm: PowerNorm's validation loss is at most layer norm's", Paper: "better by 3 to 5.6 perplexity", Unit: "nats",
				Measure: lab.Difference("pn", "ln", "validation_loss"), Bound: lab.AtMost(0),
			},
			{
				ID: "C1b", Text: "post-norm: PowerNorm's validation loss is at most layer norm's", Paper: "better by 3 to 5.6 perplexity", Unit: "nats",
				Measure: lab.Difference("pn-post", "ln-post", "validation_loss"), Bound: lab.AtMost(0),
			},
			{
				ID: "C2", Text: "batch norm's validation loss exceeds PowerNorm's by 0.04", Paper: "batch norm is far worse: 60.7 against 47.6 perplexity on PTB", Unit: "nats",
				Measure: lab.Difference("bn", "pn", "validation_loss"), Bound: lab.AtLeast(.04),
			},
			{
				ID: "C3a", Text: "PowerNorm's validation loss is at most 0.01 above that of PN-V", Paper: "47.6 against 55.3 perplexity on PTB", Unit: "nats",
				Measure: lab.Difference("pn", "pn-v", "validation_loss"), Bound: lab.AtMost(.01),
			},
			{
				ID: "C3b", Text: "PN-V's validation loss is below batch norm's", Paper: "55.3 against 60.7 perplexity on PTB", Unit: "nats",
				Measure: lab.Difference("pn-v", "bn", "validation_loss"), Bound: lab.AtMost(0),
			},
			{
				ID: "C4a", Text: "batch norm's batch variance lies 1.2 times as far from the running one on text as on images, relatively", Paper: "orders of magnitude at full scale", Unit: "×",
				Measure: func(m lab.Metrics) float64 { return m.Get("bn", "fluctuation") / m.Get("bn-images", "fluctuation") }, Bound: lab.AtLeast(1.2),
			},
			{
				ID: "C4b", Text: "the statistic that PowerNorm applies changes per step by half of batch norm's variance, relatively, or less", Paper: "(smooth statistics are its aim)", Unit: "×",
				Measure: func(m lab.Metrics) float64 { return m.Get("pn", "step_change") / m.Get("bn", "step_change") }, Bound: lab.AtMost(.5),
			},
			{
				ID: "C5", Text: "without the backward statistic (ν = 0) the validation loss is at least PowerNorm's", Paper: "(ablation)", Unit: "nats",
				Measure: lab.Difference("pn-no-correction", "pn", "validation_loss"), Bound: lab.AtLeast(0),
			},
		},
	}
	pn := func(change func(*method.PowerNorm)) func(powerNormSizes) nn.Norm {
		return func(z powerNormSizes) nn.Norm {
			d := method.PowerNorm{Warmup: z.Warmup}
			change(&d)
			return d
		}
	}
	fixed := func(n nn.Norm) func(powerNormSizes) nn.Norm { return func(powerNormSizes) nn.Norm { return n } }
	power := pn(func(*method.PowerNorm) {})
	for _, a := range []struct {
		name   string
		norm   func(powerNormSizes) nn.Norm
		scheme zoo.Scheme
	}{
		{"ln", fixed(nn.LayerNorm{}), zoo.PreNorm{}},
		{"bn", fixed(nn.BatchNorm{}), zoo.PreNorm{}},
		{"pn-v", pn(func(d *method.PowerNorm) { d.BatchOnly = true }), zoo.PreNorm{}},
		{"pn", power, zoo.PreNorm{}},
		{"pn-no-correction", pn(func(d *method.PowerNorm) { d.NoCorrection = true }), zoo.PreNorm{}},
		{"pn-running", pn(func(d *method.PowerNorm) { d.BackwardScale = method.RunningScale }), zoo.PreNorm{}},
		{"pn-4-groups", pn(func(d *method.PowerNorm) { d.Groups = 4 }), zoo.PreNorm{}},
		{"ln-post", fixed(nn.LayerNorm{}), zoo.PostNorm{}},
		{"bn-post", fixed(nn.BatchNorm{}), zoo.PostNorm{}},
		{"pn-post", power, zoo.PostNorm{}},
	} {
		e.Arms = append(e.Arms, lab.Arm{
			Name: a.name, Baseline: slices.Contains([]string{"ln", "bn", "ln-post", "bn-post"}, a.name),
			Run: func(ctx context.Context, t *lab.Trial) error {
				z := powerNormSizesOf(t.Scale)
				return languageModel(ctx, t, z, a.norm(z), a.scheme)
			},
		})
	}
	e.Arms = append(e.Arms, lab.Arm{Name: "bn-images", Baseline: true, Run: imageStatistics})
	return e
}

// languageModel trains a decoder and records its validation loss, and what the norm's statistics did.
func languageModel(ctx context.Context, t *lab.Trial, z powerNormSizes, op nn.Norm, scheme zoo.Scheme) error {
	corpus, err := z.Text.Corpus(ctx, t)
	if err != nil {
		return err
	}
	net, err := zoo.Decoder(zoo.DecoderOptions{
		Symbols: corpus.Symbols, Context: z.Text.Context, Dim: z.Width, Depth: z.Depth, Heads: z.Heads, MLP: 4 * z.Width,
		Act: nn.ReLU, Ungated: true, Std: z.Std, Norm: op, Scheme: scheme, Seed: t.Seed,
	})
	if err != nil {
		return err
	}
	if scheme == zoo.Scheme(zoo.PostNorm{}) { // the last block ends with a norm: there is none behind it
		if err := net.Bypass("norm"); err != nil {
			return err
		}
	}
	if slices.Contains([]string{"bn", "pn", "pn-v"}, t.Arm) {
		err = recordStatistics(t, z, net, func(r *method.StatRecorder) error { return z.Text.Train(ctx, t, net, corpus, r.Hook) })
	} else {
		err = z.Text.Train(ctx, t, net, corpus)
	}
	if err != nil {
		return err
	}
	nll, err := z.Text.Evaluate(t, net, corpus)
	if err != nil {
		return err
	}
	t.Record("validation_loss", nll)
	return nil
}

// imageStatistics trains a batch-norm vision transformer of the language model's size and records its statistics.
func imageStatistics(ctx context.Context, t *lab.Trial) error {
	z := powerNormSizesOf(t.Scale)
	sets, err := z.Images.Sets(ctx, t)
	if err != nil {
		return err
	}
	net, err := zoo.ViT(zoo.ViTOptions{
		Dim: z.Width, Depth: z.Depth, Heads: z.Heads, MLP: 4 * z.Width, Act: nn.ReLU, MeanPool: true, Norm: nn.BatchNorm{}, Seed: t.Seed,
	})
	if err != nil {
		return err
	}
	err = recordStatistics(t, z, net, func(r *method.StatRecorder) error { return z.Images.Train(ctx, t, net, sets, r.Hook) })
	if err != nil {
		return err
	}
	_, accuracy, err := z.Images.Evaluate(t, net, sets)
	if err != nil {
		return err
	}
	t.Record("test_accuracy", accuracy)
	return nil
}

// recordStatistics trains with a recorder of all norms and records medians over layers and steps.
func recordStatistics(t *lab.Trial, z powerNormSizes, net *nn.Network, train func(r *method.StatRecorder) error) error {
	r := method.NewStatRecorder()
	restore, err := r.Watch(net)
	if err != nil {
		return err
	}
	defer restore()
	if err := train(r); err != nil {
		return fmt.Errorf("training with a recorder of statistics: %w", err)
	}
	steps := z.Text.Loop.Steps
	relative := func(p method.StatPoint) float64 { return p.Relative }
	for name, figure := range map[string]func(method.StatPoint) float64{
		"fluctuation":             relative,
		"step_change":             func(p method.StatPoint) float64 { return p.Change },
		"distance_mean":           func(p method.StatPoint) float64 { return p.Mean },
		"distance_variance":       func(p method.StatPoint) float64 { return p.Var },
		"distance_gradient_mean":  func(p method.StatPoint) float64 { return p.GradMean },
		"distance_gradient_scale": func(p method.StatPoint) float64 { return p.GradScale },
	} {
		t.Record(name, r.Median(figure, z.From, steps))
	}
	layers := r.Layers()
	for at := 0; at < steps; at += max(1, steps/50) {
		var over []float64
		for _, layer := range layers {
			over = append(over, relative(r.Points(layer)[at]))
		}
		t.Series("fluctuation", float64(at+1), stat.Median(over))
	}
	return nil
}

package norm

import (
	"context"
	"fmt"
	"math"

	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/data"
	method "github.com/lathe-ml/lathe/design/norm"
	"github.com/lathe-ml/lathe/internal/stat"
	"github.com/lathe-ml/lathe/lab"
	"github.com/lathe-ml/lathe/lab/exp/recipe"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// unifiedSizes are the sizes of the experiment at a scale.
type unifiedSizes struct {
	Images       recipe.Images
	ShortSteps   int // of the trainings with outliers
	Every, After int // every so many steps after that step (from 0), a batch is an outlier
	Width, Depth int
	Warmup       int // of the norm
	Last         int // steps at the end whose statistics count
	Text         powerNormSizes
	Rounds       int // of the timing
}

func unifiedSizesOf(s lab.Scale) unifiedSizes {
	z := unifiedSizes{
		Images: recipe.Images{
			TrainN: 10_000, TestN: 2_000,
			Loop: recipe.Loop{Batch: 64, Steps: 400, LR: 1e-3, Floor: 1},
		},
		ShortSteps: 200, Every: 20, After: 40, Width: 48, Depth: 4, Warmup: 30, Last: 100, Text: powerNormSizesOf(s), Rounds: 61,
	}
	z.Text.Std = 0 // the decoder's own
	if s == lab.Smoke {
		z.Images.TrainN, z.Images.TestN, z.Images.Batch, z.Images.Steps = 500, 200, 16, 40
		z.ShortSteps, z.Every, z.After, z.Width, z.Depth, z.Warmup, z.Last, z.Rounds = 20, 5, 10, 16, 2, 6, 10, 3
		z.Text.Text.Steps, z.Text.Text.Characters, z.Text.Depth = 10, 10_000, 1
	}
	return z
}

// unifiedArm is one training of the experiment.
type unifiedArm struct {
	name     string
	baseline bool
	norm     func(warmup int) nn.Norm
	short    bool       // trained for as long as the arms with outliers
	factor   float64    // of outliers; 0: there are none
	scheme   zoo.Scheme // of the language model; nil: images
	watch    bool       // records how the statistics move
}

// UnifiedNorm compares Unified Normalization with layer and batch norm in a vision transformer, with and without outlier
// batches, and in a character language model, and times the folded network (arXiv:2208.01313, sections 4 and 5).
func UnifiedNorm() lab.Experiment {
	e := lab.Experiment{
		Method: "unified-norm",
		Title:  "vision transformer on Fashion-MNIST with and without outlier batches; character language model on Austen's novels; folded inference",
		Recipe: []unifiedSizes{unifiedSizesOf(lab.Smoke), unifiedSizesOf(lab.Full)},
		Claims: []lab.Claim{
			{
				ID: "C1", Text: "clean images: UN's accuracy is at least layer norm's less 1.5 points", Paper: "on par with LN", Unit: "points",
				Measure: lab.Difference("un", "ln", "accuracy"), Bound: lab.AtLeast(-1.5),
			},
			{
				ID: "C2a", Text: "outliers of 30 times the values: UN with filtration and FreezeOnSkip loses at most 2 points to its clean training", Paper: "filtration keeps training stable", Unit: "points",
				Measure: lab.Difference("un-freeze-x30", "un-freeze-short", "accuracy"), Bound: lab.AtLeast(-2),
			},
			{
				ID: "C2b", Text: "outliers of 30 times the values: UN with filtration and FreezeOnSkip beats UN without filtration by 5 points", Paper: "filtration keeps training stable", Unit: "points",
				Measure: lab.Difference("un-freeze-x30", "un-unfiltered-x30", "accuracy"), Bound: lab.AtLeast(5),
			},
			{
				ID: "C3", Text: "outliers of 30 times the values: batch norm loses at least 10 points to its clean training", Paper: "BN is worse, or collapses, without outlier handling", Unit: "points",
				Measure: lab.Difference("bn-short", "bn-x30", "accuracy"), Bound: lab.AtLeast(10),
			},
			{
				ID: "C4a", Text: "text, post-norm: UN's validation loss is at least 0.02 below batch norm's", Paper: "BN is worse", Unit: "nats",
				Measure: lab.Difference("text-un-post", "text-bn-post", "validation_loss"), Bound: lab.AtMost(-.02),
			},
			{
				ID: "C4b", Text: "text, post-norm: UN's validation loss is at most 0.03 above layer norm's", Paper: "on par with LN, within a few tenths BLEU", Unit: "nats",
				Measure: lab.Difference("text-un-post", "text-ln-post", "validation_loss"), Bound: lab.AtMost(.03),
			},
			{
				ID: "C5a", Text: "over the last 100 steps the statistic that normalises moves more from step to step without a window than with one of 4, in every layer", Paper: "(ablation)", Unit: "×",
				Measure: func(m lab.Metrics) float64 {
					least := math.Inf(1)
					for i := 0; ; i++ {
						one, four := m.Get("un-window1", variation(i)), m.Get("un", variation(i))
						if math.IsNaN(one) && math.IsNaN(four) && i > 0 {
							return least
						}
						if least = min(least, one/four); math.IsNaN(least) {
							return least
						}
					}
				}, Bound: lab.AtLeast(1),
			},
			{
				ID: "C5b", Text: "without a window, UN's accuracy is at most 0.5 points higher", Paper: "(ablation)", Unit: "points",
				Measure: lab.Difference("un-window1", "un", "accuracy"), Bound: lab.AtMost(.5),
			},
			{
				ID: "C6a", Text: "the folded network takes at most 0.95 of the layer norm network's time at batch 64", Paper: "about 31 % faster on a GPU", Unit: "×",
				Measure: func(m lab.Metrics) float64 {
					return m.Get("speed", "folded_seconds_b64") / m.Get("speed", "ln_seconds_b64")
				}, Bound: lab.AtMost(.95),
			},
			{
				ID: "C6b", Text: "the folded network's outputs on 1,000 test images are the unfolded one's, relative to the largest", Paper: "(folding is exact)",
				Measure: func(m lab.Metrics) float64 { return m.Get("speed", "folded_error") }, Bound: lab.AtMost(1e-4),
			},
		},
	}
	un := func(change func(*method.Unified)) func(int) nn.Norm {
		return func(warmup int) nn.Norm {
			d := method.Unified{Warmup: warmup, CompensationStart: warmup}
			if change != nil {
				change(&d)
			}
			return d
		}
	}
	ln, bn := func(int) nn.Norm { return nn.LayerNorm{} }, func(int) nn.Norm { return nn.BatchNorm{} }
	freeze := un(func(d *method.Unified) { d.FreezeOnSkip = true })
	unfiltered := un(func(d *method.Unified) { d.Unfiltered = true })
	for _, a := range []unifiedArm{
		{name: "ln", baseline: true, norm: ln},
		{name: "bn", baseline: true, norm: bn, watch: true},
		{name: "un", norm: un(nil), watch: true},
		{name: "un-freeze", norm: freeze},
		{name: "un-unfiltered", norm: unfiltered},
		{name: "un-window1", norm: un(func(d *method.Unified) { d.Window = 1 }), watch: true},

		{name: "ln-short", baseline: true, norm: ln, short: true},
		{name: "bn-short", baseline: true, norm: bn, short: true},
		{name: "un-freeze-short", norm: freeze, short: true},
		{name: "ln-x30", baseline: true, norm: ln, short: true, factor: 30},
		{name: "bn-x30", baseline: true, norm: bn, short: true, factor: 30},
		{name: "un-x30", norm: un(nil), short: true, factor: 30},
		{name: "un-freeze-x30", norm: freeze, short: true, factor: 30},
		{name: "un-unfiltered-x30", norm: unfiltered, short: true, factor: 30},
		{name: "un-freeze-x8", norm: freeze, short: true, factor: 8},
		{name: "un-unfiltered-x8", norm: unfiltered, short: true, factor: 8},

		{name: "text-ln-post", baseline: true, norm: ln, scheme: zoo.PostNorm{}},
		{name: "text-bn-post", baseline: true, norm: bn, scheme: zoo.PostNorm{}},
		{name: "text-un-post", norm: unfiltered, scheme: zoo.PostNorm{}},
		{name: "text-ln-pre", baseline: true, norm: ln, scheme: zoo.PreNorm{}},
		{name: "text-bn-pre", baseline: true, norm: bn, scheme: zoo.PreNorm{}},
		{name: "text-un-pre", norm: unfiltered, scheme: zoo.PreNorm{}},
	} {
		e.Arms = append(e.Arms, lab.Arm{Name: a.name, Baseline: a.baseline, Run: func(ctx context.Context, t *lab.Trial) error {
			z := unifiedSizesOf(t.Scale)
			if a.scheme != nil {
				return languageModel(ctx, t, z.Text, a.norm(z.Text.Warmup), a.scheme)
			}
			return unifiedImages(ctx, t, z, a)
		}})
	}
	e.Arms = append(e.Arms, lab.Arm{Name: "speed", Run: func(ctx context.Context, t *lab.Trial) error {
		return foldedSpeed(ctx, t, unifiedSizesOf(t.Scale), freeze)
	}})
	return e
}

// variation is the metric of layer i that says how its normalising statistic moves: the root mean square of its relative
// change from one step to the next.
func variation(i int) string { return fmt.Sprintf("variation_%d", i) }

// vit is the experiment's network, less its norm and seed.
func (z unifiedSizes) vit(op nn.Norm, seed uint64) (*nn.Network, error) {
	return zoo.ViT(zoo.ViTOptions{Dim: z.Width, Depth: z.Depth, MLP: 2 * z.Width, MeanPool: true, Norm: op, Seed: seed})
}

// unifiedImages trains a classifier and records its accuracy and what the norms did.
func unifiedImages(ctx context.Context, t *lab.Trial, z unifiedSizes, a unifiedArm) error {
	sets, err := z.Images.Sets(ctx, t)
	if err != nil {
		return err
	}
	net, err := z.vit(a.norm(z.Warmup), t.Seed)
	if err != nil {
		return err
	}
	if a.short {
		z.Images.Steps = z.ShortSteps
	}
	if a.watch {
		err = watchUnified(ctx, t, z, net, sets)
	} else {
		err = z.train(ctx, t, net, sets, a.factor)
	}
	if err != nil {
		return err
	}
	nll, accuracy, err := z.Images.Evaluate(t, net, sets)
	if err != nil {
		return err
	}
	t.Record("accuracy", accuracy)
	t.Record("test_loss", nll)
	if rates := method.SkipRates(net); len(rates) > 0 {
		var all []float64
		for _, r := range rates {
			all = append(all, 100*r)
		}
		t.Record("skipped_percent", stat.Mean(all))
	}
	return nil
}

// train is on the sets' images; outliers are batches whose values are multiplied by factor, if it is not 0.
func (z unifiedSizes) train(ctx context.Context, t *lab.Trial, net *nn.Network, sets *recipe.Sets, factor float64) error {
	if factor == 0 {
		return z.Images.Train(ctx, t, net, sets)
	}
	order, err := data.NewBatcher(sets.Train.N, z.Images.Batch, t.Seed)
	if err != nil {
		return err
	}
	return z.Images.Fit(ctx, t, net, learn.Classifier(net), func(step int) ([]*tensors.Tensor, error) {
		batch, err := z.Images.Tensors(sets, sets.Train, order.At(step))
		if err != nil || step <= z.After || step%z.Every != 0 {
			return batch, err
		}
		x := nn.Floats(batch[0])
		for i := range x {
			x[i] *= float32(factor)
		}
		batch[0] = tensors.FromFlatDataAndDimensions(x, batch[0].Shape().Dimensions...)
		return batch, nil
	}, nil)
}

// watchUnified trains and records the fluctuation of the statistics.
func watchUnified(ctx context.Context, t *lab.Trial, z unifiedSizes, net *nn.Network, sets *recipe.Sets) error {
	r := method.NewStatRecorder()
	restore, err := r.Watch(net)
	if err != nil {
		return err
	}
	defer restore()
	if err := z.Images.Train(ctx, t, net, sets, r.Hook); err != nil {
		return err
	}
	from, to := z.Images.Steps-z.Last+1, z.Images.Steps
	for i, layer := range r.Layers() {
		sum, n := 0., 0.
		for _, p := range r.Points(layer) {
			if p.Step >= from {
				sum, n = sum+p.Change*p.Change, n+1
			}
		}
		t.Record(variation(i), math.Sqrt(sum/n))
	}
	t.Record("activation_fluctuation", r.Median(func(p method.StatPoint) float64 { return p.Relative }, from, to))
	t.Record("gradient_fluctuation", r.Median(func(p method.StatPoint) float64 { return p.GradRelative }, from, to))
	return nil
}

// foldedSpeed compares the time of a forward pass of the folded network with that of a layer norm network of its size,
// and its outputs with those of the network before folding.
func foldedSpeed(ctx context.Context, t *lab.Trial, z unifiedSizes, op func(int) nn.Norm) error {
	sets, err := z.Images.Sets(ctx, t)
	if err != nil {
		return err
	}
	z.Images.Steps = z.ShortSteps
	trained := func(op nn.Norm) (*nn.Network, error) {
		net, err := z.vit(op, t.Seed)
		if err != nil {
			return nil, err
		}
		return net, z.Images.Train(ctx, t, net, sets)
	}
	ln, err := trained(nn.LayerNorm{})
	if err != nil {
		return err
	}
	un, err := trained(op(z.Warmup))
	if err != nil {
		return err
	}
	return compareFolded(ctx, t, z.Images, sets, z.Rounds, ln, "un", un)
}

package norm

import (
	"context"
	"fmt"
	"math"
	"slices"

	"github.com/gomlx/gomlx/core/tensors"

	method "github.com/lathe-ml/lathe/design/norm"
	"github.com/lathe-ml/lathe/internal/stat"
	"github.com/lathe-ml/lathe/lab"
	"github.com/lathe-ml/lathe/lab/exp/recipe"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// depthSizes are the sizes of the experiments on the depth of a language model, at a scale.
type depthSizes struct {
	Text    recipe.Text
	Depth   int
	Width   int
	MLP     int
	Last    int // steps at the end over which gradient norms are averaged
	Batches int // validation batches for angles and removed layers
	// of the pretrained model: passages of so many tokens each, and characters read for them
	Passages, Tokens int
}

func depthSizesOf(s lab.Scale, rate float64) depthSizes {
	z := depthSizes{
		Text:  recipe.Text{Characters: 300_000, Context: 32, Loop: recipe.Loop{Batch: 16, Steps: 200, Warmup: 20, LR: rate, Floor: .1}},
		Depth: 12, Width: 48, MLP: 128, Last: 20, Batches: 3, Passages: 8, Tokens: 128,
	}
	if s == lab.Smoke {
		z.Text.Characters, z.Text.Steps, z.Text.Warmup = 20_000, 30, 5
		z.Depth, z.Width, z.MLP, z.Last, z.Passages, z.Tokens = 6, 32, 64, 5, 1, 8
	}
	return z
}

// std is the standard deviation of the initial weights that keeps the gain of the 768 wide model at 0.02.
func (z depthSizes) std() float64 { return .02 * math.Sqrt(768/float64(z.Width)) }

// run trains a decoder under a scheme and records what its layers do.
func (z depthSizes) run(ctx context.Context, t *lab.Trial, scheme zoo.Scheme) error {
	corpus, err := z.Text.Corpus(ctx, t)
	if err != nil {
		return err
	}
	net, err := zoo.Decoder(zoo.DecoderOptions{
		Symbols: corpus.Symbols, Context: z.Text.Context, Dim: z.Width, Depth: z.Depth, Heads: 4, MLP: z.MLP, Std: z.std(), Scheme: scheme, Seed: t.Seed,
	})
	if err != nil {
		return err
	}
	norms := make([]float64, z.Depth)
	text := z.Text
	text.Probe = learn.GradientNorms{Group: method.LayerGroup}
	err = text.Train(ctx, t, net, corpus, func(_ *learn.Trainer, i learn.Info) error {
		if i.Step > text.Steps-z.Last {
			for l := range norms {
				norms[l] += nn.Float64s(i.Probed[0][fmt.Sprint(l+1)])[0] / float64(z.Last)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	loss, err := z.Text.Evaluate(t, net, corpus)
	if err != nil {
		return err
	}
	t.Record("validation_loss", loss)
	t.Record("gradient_ratio", slices.Max(norms)/slices.Min(norms))
	t.Record("gradient_first", stat.Mean(norms[:z.Depth/4]))
	t.Record("gradient_last", stat.Mean(norms[z.Depth-z.Depth/4:]))
	var batches [][]*tensors.Tensor
	for _, b := range z.Text.Validation(corpus, z.Text.Loop.Batch, z.Batches*z.Text.Loop.Batch) {
		batches = append(batches, b)
	}
	d, err := method.DepthReport(ctx, t.Backend, net, batches, method.DepthOptions{})
	if err != nil {
		return err
	}
	for l := range norms {
		x := float64(l + 1)
		t.Series("gradient_norm", x, norms[l])
		t.Series("removal_loss", x, d.Removal[l])
		t.Series("angular_distance", x, d.Angular[1][l])
	}
	for l, v := range d.Variance {
		t.Series("stream_variance", float64(l), v)
	}
	t.Record("removal_deep_half", stat.Mean(d.Removal[z.Depth/2:]))
	t.Record("angular_deep_half", stat.Mean(d.Angular[1][z.Depth/2:]))
	t.Record("variance_growth", d.Variance[z.Depth]/d.Variance[1])
	return nil
}

// arms are one arm per scheme.
func (e depthExperiment) arms() (arms []lab.Arm) {
	for _, a := range e.schemes {
		arms = append(arms, lab.Arm{
			Name: a.name, Baseline: a.baseline,
			Run: func(ctx context.Context, t *lab.Trial) error {
				return depthSizesOf(t.Scale, e.rate).run(ctx, t, a.scheme)
			},
		})
	}
	return arms
}

type depthExperiment struct {
	rate    float64
	schemes []depthScheme
}

type depthScheme struct {
	name     string
	baseline bool
	scheme   zoo.Scheme
}

// MixLN compares schemes of norm placement in a character language model of 12 layers (arXiv:2412.13795, sections 3 and 4).
func MixLN() lab.Experiment {
	x := depthExperiment{2e-3, []depthScheme{
		{"pre", true, method.Pre{}},
		{"post", true, method.Post{}},
		{"mix-0.25", false, method.MixLN{Alpha: .25}},
		{"mix-0.5", false, method.MixLN{Alpha: .5}},
		{"prepost-3", false, method.PrePost{K: 3}},
		{"sandwich", true, method.Sandwich{}},
		{"deepnorm", true, method.DeepNorm{}},
	}}
	return lab.Experiment{
		Method: "mix-ln",
		Title:  "character language model of 12 layers on Austen's novels: where the norms stand, and how evenly the layers learn",
		Recipe: []depthSizes{depthSizesOf(lab.Smoke, x.rate), depthSizesOf(lab.Full, x.rate)},
		Arms:   x.arms(),
		Claims: []lab.Claim{
			{
				ID: "C1", Text: "mix(0.25)'s validation loss is 0.1 below pre-norm's", Paper: "LLaMA-130M: perplexity 26.07 against 26.73", Unit: "nats",
				Measure: lab.Difference("mix-0.25", "pre", "validation_loss"), Bound: lab.AtMost(-.1),
			},
			{
				ID: "C2", Text: "the largest gradient norm of a layer over the smallest, at the end, is at most half of pre-norm's", Paper: "gradients are more even", Unit: "×",
				Measure: lab.Ratio("mix-0.25", "pre", "gradient_ratio"), Bound: lab.AtMost(.5),
			},
			{
				ID: "C3a", Text: "pre-norm: the first quarter of the layers has larger gradients than the last", Paper: "deep layers of pre-norm models get small gradients", Unit: "",
				Measure: func(m lab.Metrics) float64 { return m.Get("pre", "gradient_first") - m.Get("pre", "gradient_last") }, Bound: lab.AtLeast(0),
			},
			{
				ID: "C3b", Text: "post-norm: the last quarter has larger gradients than the first", Paper: "early layers of post-norm models get small gradients", Unit: "",
				Measure: func(m lab.Metrics) float64 { return m.Get("post", "gradient_last") - m.Get("post", "gradient_first") }, Bound: lab.AtLeast(0),
			},
			{
				ID: "C4", Text: "removing a layer of the deep half costs at least what it costs in pre-norm", Paper: "deep layers become more effective", Unit: "nats",
				Measure: lab.Difference("mix-0.25", "pre", "removal_deep_half"), Bound: lab.AtLeast(0),
			},
			{
				ID: "C5", Text: "the reversed order, pre in front of post, has a higher loss or less even gradients than mix(0.25)", Paper: "(ablation)", Unit: "",
				Measure: func(m lab.Metrics) float64 {
					return max(lab.Difference("prepost-3", "mix-0.25", "validation_loss")(m), lab.Ratio("prepost-3", "mix-0.25", "gradient_ratio")(m)-1)
				}, Bound: lab.AtLeast(0),
			},
		},
	}
}

// LayerNormScaling compares scaled norms with plain ones in the same model, and measures what the layers of a pretrained
// model are worth (arXiv:2502.05795, sections 2 to 5).
func LayerNormScaling() lab.Experiment {
	x := depthExperiment{6e-3, []depthScheme{
		{"pre", true, method.Pre{}},
		{"lns", false, method.LayerNormScaling{}},
		{"const", false, method.LayerNormScaling{Const: true}},
		{"scaled-init", true, method.ScaledInit{}},
		{"lns-scaled-init", false, method.LayerNormScaling{ScaledInit: true}},
		{"lns-branch", false, method.LayerNormScaling{AfterBranch: true}},
		{"scaled-residual", true, method.ScaledResidual{Start: 1e-3}},
		{"post", true, method.Post{}},
	}}
	e := lab.Experiment{
		Method: "layernorm-scaling",
		Title:  "character language model of 12 layers on Austen's novels; what the 30 layers of SmolLM2-135M are worth",
		Recipe: []depthSizes{depthSizesOf(lab.Smoke, x.rate), depthSizesOf(lab.Full, x.rate)},
		Arms:   x.arms(),
		Claims: []lab.Claim{
			{
				ID: "C1", Text: "the validation loss with scaled norms is 0.02 below pre-norm's", Paper: "LLaMA-130M: perplexity 25.76 against 26.73, 0.037 nats", Unit: "nats",
				Measure: lab.Difference("lns", "pre", "validation_loss"), Bound: lab.AtMost(-.02),
			},
			{
				ID: "C2", Text: "the stream's variance grows from the first layer to the last by at most half of pre-norm's factor", Paper: "growth is bounded", Unit: "×",
				Measure: lab.Ratio("lns", "pre", "variance_growth"), Bound: lab.AtMost(.5),
			},
			{
				ID: "C3", Text: "the same factor 1/√L in every layer is worse by 0.01", Paper: "(ablation)", Unit: "nats",
				Measure: lab.Difference("const", "lns", "validation_loss"), Bound: lab.AtLeast(.01),
			},
			{
				ID: "C4", Text: "together with scaled initialisation it is not better than scaled initialisation alone by more than 0.01", Paper: "the authors advise against the combination", Unit: "nats",
				Measure: lab.Difference("lns-scaled-init", "scaled-init", "validation_loss"), Bound: lab.AtLeast(-.01),
			},
			{
				ID: "C5", Text: "SmolLM2-135M: the median loss of removing one of layers 16 to 29 is at most a third of the mean of layers 1 to 3", Paper: "deep layers of pre-norm models can be dropped almost freely", Unit: "×",
				Measure: func(m lab.Metrics) float64 {
					return m.Get("smollm2", "removal_deep") / m.Get("smollm2", "removal_first")
				}, Bound: lab.AtMost(1. / 3),
			},
		},
	}
	e.Arms = append(e.Arms, lab.Arm{Name: "smollm2", Baseline: true, Once: true, Run: pretrainedDepth})
	return e
}

// pretrainedDepth removes each layer of a pretrained language model in turn.
func pretrainedDepth(ctx context.Context, t *lab.Trial) error {
	z := depthSizesOf(t.Scale, 0)
	m, err := recipe.NewSmolLM2(ctx, 0)
	if err != nil {
		return err
	}
	batch, err := m.Passages(ctx, z.Passages, z.Tokens)
	if err != nil {
		return err
	}
	o := method.DepthOptions{Progress: t.Progress}
	if t.Scale == lab.Smoke {
		o.Remove = []int{1, 16, 30}
	}
	d, err := method.DepthReport(ctx, t.Backend, m.Net, [][]*tensors.Tensor{batch}, o)
	if err != nil {
		return err
	}
	for l, v := range d.Removal {
		t.Series("removal_loss", float64(l+1), v)
		t.Series("angular_distance", float64(l+1), d.Angular[1][l])
	}
	for l, v := range d.Variance {
		t.Series("stream_variance", float64(l), v)
	}
	t.Record("loss", d.Loss)
	t.Record("removal_first", stat.Mean(d.Removal[:3]))
	t.Record("removal_deep", stat.Quantile(d.Removal[15:29], .5))
	t.Record("removal_last", d.Removal[29])
	return nil
}

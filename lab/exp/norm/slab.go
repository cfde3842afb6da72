package norm

import (
	"context"
	"math"
	"strings"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/tensors"

	method "github.com/lathe-ml/lathe/design/norm"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/internal/timing"
	"github.com/lathe-ml/lathe/lab"
	"github.com/lathe-ml/lathe/lab/exp/recipe"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// slabSizes are the sizes of the experiment at a scale.
type slabSizes struct {
	Images recipe.Images
	Width  int // the feed-forward part is twice as wide
	Depth  int
	Heads  int
	Fade   int // steps on which layer norm becomes RepBN
	Rounds int // of the timing

	Text     powerNormSizes
	TextFade int // steps of warm-up, and then steps on which RMS norm becomes RepBN

	// The attention layers that are timed: of this width, with so many heads, on so many maps of Sides² tokens.
	Sides       [3]int
	LayerWidth  int
	LayerHeads  int
	LayerBatch  int
	LayerRounds int // of their timing
}

func slabSizesOf(s lab.Scale) slabSizes {
	z := slabSizes{
		Images: recipe.Images{
			TrainN: 20_000, TestN: 4_000, Standardize: true,
			Loop: recipe.Loop{Batch: 64, Steps: 500, LR: 3e-3, Decay: .05, ClipNorm: 5},
		},
		Width: 32, Depth: 2, Heads: 2, Fade: 250, Text: powerNormSizesOf(s), Rounds: 61,
		Sides: [3]int{7, 14, 28}, LayerWidth: 64, LayerHeads: 4, LayerBatch: 4, LayerRounds: 15,
	}
	if s == lab.Smoke {
		z.Images.TrainN, z.Images.TestN, z.Images.Steps, z.Fade, z.Rounds = 2_000, 200, 40, 20, 3
		z.Images.Batch = 16
		z.Sides, z.LayerBatch, z.LayerRounds = [3]int{2, 4, 8}, 1, 3
		z.Text.Text.Steps, z.Text.Text.Characters, z.Text.Depth = 10, 10_000, 1
	}
	z.TextFade = z.Text.Text.Steps / 3
	return z
}

// slabArm is one training of the experiment on images.
type slabArm struct {
	name     string
	baseline bool
	norm     func(slabSizes) nn.Norm
	linear   *zoo.LinearAttentionOptions // nil: softmax attention
}

// The metrics of attention layers on the small, the middle and the large map.
var slabMaps = [3]string{"small", "middle", "large"}

// SLAB compares PRepBN with layer norm, batch norm and its two halves, and simplified linear attention with softmax
// attention, in a small vision transformer and a character language model; it times the folded network and the attention
// layers (arXiv:2405.11582, sections 3 and 4).
func SLAB() lab.Experiment {
	layers := func(a, b string) func(lab.Metrics) float64 {
		return func(m lab.Metrics) float64 {
			return m.Get("attention-speed", a+"_seconds") / m.Get("attention-speed", b+"_seconds")
		}
	}
	e := lab.Experiment{
		Method: "slab",
		Title:  "vision transformer of width 32 on Fashion-MNIST under layer, batch and progressive norms, with softmax and linear attention; folded inference; attention layers on 49, 196 and 784 tokens; character language model",
		Recipe: []slabSizes{slabSizesOf(lab.Smoke), slabSizesOf(lab.Full)},
		Claims: []lab.Claim{
			{
				ID: "C1", Text: "PRepBN's accuracy is at least layer norm's less 0.5 points", Paper: "0.1 to 1.4 points better on ImageNet", Unit: "points",
				Measure: lab.Difference("prepbn", "ln", "accuracy"), Bound: lab.AtLeast(-.5),
			},
			{
				ID: "C2", Text: "PRepBN's accuracy is at least 0.2 points above batch norm's", Paper: "batch norm in its place is worse, or collapses", Unit: "points",
				Measure: lab.Difference("prepbn", "bn", "accuracy"), Bound: lab.AtLeast(.2),
			},
			{
				ID: "C3a", Text: "the folded PRepBN network takes at most 0.97 of the layer norm network's time at batch 64", Paper: "lower latency at equal accuracy", Unit: "×",
				Measure: func(m lab.Metrics) float64 {
					return m.Get("speed", "folded_seconds_b64") / m.Get("speed", "ln_seconds_b64")
				}, Bound: lab.AtMost(.97),
			},
			{
				ID: "C3b", Text: "the folded network predicts what the unfolded one does on at least 99.9 % of the test images", Paper: "(folding is exact)", Unit: "%",
				Measure: func(m lab.Metrics) float64 { return m.Get("speed", "folded_agreement") }, Bound: lab.AtLeast(99.9),
			},
			{
				ID: "C4a", Text: "on 784 tokens linear attention takes at most 0.5 of softmax attention's time", Paper: "linear in the number of tokens", Unit: "×",
				Measure: layers("linear_large", "softmax_large"), Bound: lab.AtMost(.5),
			},
			{
				ID: "C4b", Text: "from 196 to 784 tokens linear attention's time grows by at most 6 times", Paper: "linear in the number of tokens", Unit: "×",
				Measure: layers("linear_large", "linear_middle"), Bound: lab.AtMost(6),
			},
			{
				ID: "C4c", Text: "from 196 to 784 tokens softmax attention's time grows by at least 8 times", Paper: "quadratic in the number of tokens", Unit: "×",
				Measure: layers("softmax_large", "softmax_middle"), Bound: lab.AtLeast(8),
			},
			{
				ID: "C5a", Text: "with layer norm, linear attention's accuracy is at least softmax attention's less 0.3 points", Paper: "on par or better", Unit: "points",
				Measure: lab.Difference("ln-sla", "ln", "accuracy"), Bound: lab.AtLeast(-.3),
			},
			{
				ID: "C5b", Text: "linear attention's accuracy is at least 0.5 points above that without its convolution", Paper: "(ablation)", Unit: "points",
				Measure: lab.Difference("ln-sla", "ln-sla-no-dwc", "accuracy"), Bound: lab.AtLeast(.5),
			},
			{
				ID: "C5c", Text: "with linear attention, PRepBN's accuracy is at least layer norm's less 0.5 points", Paper: "DeiT-T 74.3 against 73.6 % with softmax attention, DeiT-S 80.0 against 80.2 %", Unit: "points",
				Measure: lab.Difference("prepbn-sla", "ln-sla", "accuracy"), Bound: lab.AtLeast(-.5),
			},
		},
	}
	fixed := func(n nn.Norm) func(slabSizes) nn.Norm { return func(slabSizes) nn.Norm { return n } }
	ln, sla := fixed(nn.LayerNorm{}), &zoo.LinearAttentionOptions{}
	for _, a := range []slabArm{
		{name: "ln", baseline: true, norm: ln},
		{name: "bn", baseline: true, norm: fixed(nn.BatchNorm{})},
		{name: "repbn", norm: fixed(method.RepBN{})},
		{name: "progressive-bn", norm: func(z slabSizes) nn.Norm {
			return method.PRepBN{RepBN: method.RepBN{NoShortcut: true}, Steps: z.Fade}
		}},
		{name: "prepbn", norm: slabNorm},
		{name: "ln-sla", norm: ln, linear: sla},
		{name: "ln-sla-no-dwc", norm: ln, linear: &zoo.LinearAttentionOptions{NoConv: true}},
		{name: "prepbn-sla", norm: slabNorm, linear: sla},
	} {
		e.Arms = append(e.Arms, lab.Arm{Name: a.name, Baseline: a.baseline, Run: func(ctx context.Context, t *lab.Trial) error {
			z := slabSizesOf(t.Scale)
			net, sets, err := z.classifier(ctx, t, a)
			if err != nil {
				return err
			}
			nll, accuracy, err := z.Images.Evaluate(t, net, sets)
			if err != nil {
				return err
			}
			t.Record("accuracy", accuracy)
			t.Record("test_loss", nll)
			return nil
		}})
	}
	e.Arms = append(e.Arms,
		lab.Arm{Name: "speed", Run: slabSpeed},
		lab.Arm{Name: "attention-speed", Run: attentionSpeed},
	)
	for _, a := range []struct {
		name     string
		baseline bool
		norm     func(slabSizes) nn.Norm
	}{
		{"text-rms", true, fixed(nn.RMSNorm{})},
		{"text-bn", true, fixed(nn.BatchNorm{})},
		{"text-prepbn", false, func(z slabSizes) nn.Norm {
			return method.PRepBN{RepBN: method.RepBN{ZeroInit: true}, First: method.RMSFirst, Warmup: z.TextFade, Steps: z.TextFade}
		}},
		{"text-prepbn-ones", false, func(z slabSizes) nn.Norm { // with the initial values of vision models
			return method.PRepBN{First: method.RMSFirst, Warmup: z.TextFade, Steps: z.TextFade}
		}},
	} {
		e.Arms = append(e.Arms, lab.Arm{Name: a.name, Baseline: a.baseline, Run: func(ctx context.Context, t *lab.Trial) error {
			z := slabSizesOf(t.Scale)
			return languageModel(ctx, t, z.Text, a.norm(z), zoo.PreNorm{})
		}})
	}
	return e
}

// slabNorm is the method at the experiment's size.
func slabNorm(z slabSizes) nn.Norm { return method.PRepBN{Steps: z.Fade} }

// vit is the experiment's network. Weights and positions are drawn by Glorot and Bengio's rule, with the standard deviation
// √(2/(in + out)): with the smaller positions of ViT softmax attention lags at this length of training.
func (z slabSizes) vit(op nn.Norm, linear *zoo.LinearAttentionOptions, seed uint64) (*nn.Network, error) {
	o := zoo.ViTOptions{Dim: z.Width, Depth: z.Depth, Heads: z.Heads, MLP: 2 * z.Width, MeanPool: true, Norm: op, Seed: seed}
	if linear != nil {
		o.Mixer = linear.Mixer()
	}
	net, err := zoo.ViT(o)
	if err != nil {
		return nil, err
	}
	glorot := func(p *nn.Param, out int) error {
		w := p.Data()
		rng.Normal(rng.New(seed, "glorot:"+p.Name), w, math.Sqrt(2/float64(out+len(w)/out)))
		return p.SetData(w)
	}
	for _, x := range net.Sites() {
		if conv, ok := x.Op.(nn.Conv); ok && conv.Groups > 1 {
			continue
		}
		p := net.Param(x, "w")
		if err := glorot(p, p.Value.Shape().Dimensions[0]); err != nil {
			return nil, err
		}
	}
	return net, glorot(net.Params.Get("pos.w"), z.Width)
}

// classifier trains an arm's network.
func (z slabSizes) classifier(ctx context.Context, t *lab.Trial, a slabArm) (*nn.Network, *recipe.Sets, error) {
	sets, err := z.Images.Sets(ctx, t)
	if err != nil {
		return nil, nil, err
	}
	net, err := z.vit(a.norm(z), a.linear, t.Seed)
	if err != nil {
		return nil, nil, err
	}
	return net, sets, z.Images.Train(ctx, t, net, sets)
}

// slabSpeed compares a trained PRepBN network, folded, with itself and with a layer norm network of its size.
func slabSpeed(ctx context.Context, t *lab.Trial) error {
	z := slabSizesOf(t.Scale)
	net, sets, err := z.classifier(ctx, t, slabArm{norm: slabNorm})
	if err != nil {
		return err
	}
	ln, err := z.vit(nn.LayerNorm{}, nil, t.Seed)
	if err != nil {
		return err
	}
	return compareFolded(ctx, t, z.Images, sets, z.Rounds, ln, "prepbn", net)
}

// attentionSpeed times one layer of softmax and of linear attention on maps of three sizes. The two larger ones take turns
// with each other, so that a slow spell of the machine does not look like growth.
func attentionSpeed(ctx context.Context, t *lab.Trial) error {
	z := slabSizesOf(t.Scale)
	var names []string
	var tokens []int
	var passes []func() error
	for i, side := range z.Sides {
		n := side * side
		data := make([]float32, z.LayerBatch*n*z.LayerWidth)
		rng.Normal(rng.New(t.Seed, "tokens"), data, 1)
		x := tensors.FromFlatDataAndDimensions(data, z.LayerBatch, n, z.LayerWidth)
		for _, name := range []string{"softmax", "linear"} {
			b := nn.NewBuilder(t.Seed)
			y := b.Input("x", shapes.Make(dtypes.Float32, 1, n, z.LayerWidth))
			if name == "softmax" {
				y = zoo.Attention(b, "attn", y, zoo.AttentionOptions{Heads: z.LayerHeads})
			} else {
				y = zoo.LinearAttention(b, "attn", y, zoo.LinearAttentionOptions{Heads: z.LayerHeads, Grid: [2]int{side, side}})
			}
			net, err := b.Finish(y)
			if err != nil {
				return err
			}
			r, err := nn.NewRunner(t.Backend, net, nn.RunOptions{})
			if err != nil {
				return err
			}
			defer r.Finalize()
			names, tokens, passes = append(names, name+"_"+slabMaps[i]), append(tokens, n), append(passes, pass(r, x))
		}
	}
	small, err := timing.Interleaved(ctx, z.LayerRounds, nil, passes[:2]...)
	if err != nil {
		return err
	}
	large, err := timing.Interleaved(ctx, z.LayerRounds, t.Progress, passes[2:]...)
	if err != nil {
		return err
	}
	for i, times := range append(small, large...) {
		t.Record(names[i]+"_seconds", times.Median())
		t.Series(strings.TrimSuffix(names[i], "_"+slabMaps[i/2])+"_seconds", float64(tokens[i]), times.Median())
	}
	return nil
}

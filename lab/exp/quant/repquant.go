package quant

import (
	"context"
	"fmt"
	"math"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	method "github.com/lathe-ml/lathe/compress/quant"
	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/lab"
	"github.com/lathe-ml/lathe/lab/exp/recipe"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// repquantSizes are what RepQuant is calibrated on, and its language model.
type repquantSizes struct {
	Images, Sequences int // calibration cases
	Windows           int // of the held-out text that are judged
	Decoder           zoo.DecoderOptions
	Text              recipe.Text
	Steps             int // of clipping
}

func repquantOf(s lab.Scale) repquantSizes {
	z := repquantSizes{
		Images: 128, Sequences: 64, Windows: 256, Steps: 200,
		Decoder: zoo.DecoderOptions{MLP: 344},
		Text:    recipe.Text{Context: 128, Loop: recipe.Loop{Batch: 16, Steps: 800, Warmup: 50, LR: 2e-3, Floor: .1, Decay: .1, ClipNorm: 1}},
	}
	if s == lab.Smoke {
		z.Images, z.Sequences, z.Windows, z.Steps = 32, 4, 4, 20
		z.Decoder = zoo.DecoderOptions{Context: 16, Dim: 16, Depth: 1, Heads: 2}
		z.Text = recipe.Text{Characters: 20_000, Context: 16, Loop: recipe.Loop{Batch: 8, Steps: 10, LR: 2e-3}}
	}
	return z
}

// repquantVariants are RepQuant and its ablations, by the names of their arms.
var repquantVariants = []struct {
	name string
	q    method.RepQuant
}{
	{"repq", method.RepQuant{NoClip: true, NoFit: true}},
	{"clip", method.RepQuant{NoFit: true}},
	{"fit", method.RepQuant{NoClip: true}},
	{"repquant", method.RepQuant{}},
	{"repquant-smallridge", method.RepQuant{Fit: method.ReconstructOptions{Ridge: .01}}},
	{"repquant-channelwise", method.RepQuant{Norms: method.ChannelWise}},
	{"repquant-log2", method.RepQuant{Softmax: method.SoftmaxLog2}},
	{"repquant-uniform", method.RepQuant{Softmax: method.SoftmaxUniform}},
}

// RepQuant compares RepQ-ViT with what RepQuant adds to it, alone and together, on three versions of the vision
// transformer (as trained; with spread channel ranges; with some entries of the stream multiplied by 8), and on a language
// model of characters.
var RepQuant = lab.Experiment{
	Method: "repquant",
	Title:  "Post-training quantisation with learnt clipping and fitted weights: a vision transformer on Fashion-MNIST and a language model of characters",
	Arms:   repquantArms(),
	Recipe: []any{repquantOf(lab.Smoke), repquantOf(lab.Full), ViTA(lab.Full), SpreadFactor, spikes},
	Claims: []lab.Claim{
		{
			ID: "C1", Text: "spread, W4A4: logit MSE of RepQuant over RepQ", Paper: "+6.2 points on DeiT-S", Unit: "×",
			Measure: lab.Ratio("repquant-w4a4-spread", "repq-w4a4-spread", "logit MSE"), Bound: lab.AtMost(.95),
		},
		{
			ID: "C2a", Text: "spread, W3A3: logit MSE of RepQuant over RepQ", Paper: "the gap widens as bits fall", Unit: "×",
			Measure: lab.Ratio("repquant-w3a3-spread", "repq-w3a3-spread", "logit MSE"), Bound: lab.AtMost(.85),
		},
		{
			ID: "C2b", Text: "spread, W3A3: accuracy of RepQuant minus RepQ", Unit: "points",
			Measure: func(m lab.Metrics) float64 {
				return 100 * lab.Difference("repquant-w3a3-spread", "repq-w3a3-spread", "accuracy")(m)
			}, Bound: lab.AtLeast(.5),
		},
		{
			ID: "C3", Text: "groups of a norm and its readers, 4 bits: share whose output error on other images clipping lowers, against the channels' whole ranges", Unit: "%",
			Measure: func(m lab.Metrics) float64 { return m.Get("clipping", "better than whole ranges") }, Bound: lab.AtLeast(75),
		},
		{
			ID: "C4a", Text: "spread, W3A3: logit MSE of RepQ with fitted weights over RepQ", Unit: "×",
			Measure: lab.Ratio("fit-w3a3-spread", "repq-w3a3-spread", "logit MSE"), Bound: lab.AtMost(.9),
		},
		{
			ID: "C4b", Text: "spread, W3A3: logit MSE of RepQuant without fitting over RepQuant", Unit: "×",
			Measure: lab.Ratio("clip-w3a3-spread", "repquant-w3a3-spread", "logit MSE"), Bound: lab.AtLeast(1),
		},
		{
			ID: "C5", Text: "language model, W4A4: bits per character of RepQuant minus RepQ", Unit: "bits",
			Measure: lab.Difference("repquant-w4a4-llama", "repq-w4a4-llama", "bits per character"), Bound: lab.AtMost(0),
		},
	},
}

func repquantArms() []lab.Arm {
	arms := []lab.Arm{
		{Name: "float-plain", Baseline: true, Once: true, Run: quantiseVersion(nil, "plain")},
		{Name: "float-spiky", Baseline: true, Run: quantiseVersion(nil, "spiky")},
		{Name: "float-llama", Baseline: true, Once: true, Run: quantiseText(nil)},
		{Name: "clipping", Run: clipGroups},
	}
	for _, c := range []struct {
		version  string
		bits     []int
		variants int
	}{{"spread", []int{4, 3}, 8}, {"plain", []int{4, 3}, 4}, {"spiky", []int{4}, 4}, {"llama", []int{4}, 6}} {
		for _, bits := range c.bits {
			for _, v := range repquantVariants[:c.variants] {
				q := v.q
				q.WeightBits, q.ActBits, q.SkipSiteErrors = bits, bits, true
				a := lab.Arm{Name: fmt.Sprintf("%s-w%da%d-%s", v.name, bits, bits, c.version), Baseline: v.name == "repq"}
				if a.Run = quantiseVersion(&q, c.version); c.version == "llama" {
					a.Run = quantiseText(&q)
				}
				arms = append(arms, a)
			}
		}
	}
	return arms
}

// version is a network with its own outputs on the test images.
type version struct {
	net    *nn.Network
	logits []float32
}

// versionOf returns a version of ViT-A; that with spikes differs from seed to seed, and is another function.
func versionOf(ctx context.Context, t *lab.Trial, name string) (*bench, *version, error) {
	b, err := shared(ctx, t)
	if err != nil {
		return nil, nil, err
	}
	if name != "spiky" {
		return b, &version{b.nets[name], b.logits}, nil
	}
	v, err := t.Shared("spiky", func() (any, error) {
		net := b.nets["plain"].Clone()
		if err := spike(net, t.Seed); err != nil {
			return nil, err
		}
		logits, _, err := compress.Evaluate(ctx, t.Backend, net, b.test, evalBatch)
		return &version{net, logits}, err
	})
	if err != nil {
		return nil, nil, err
	}
	return b, v.(*version), nil
}

// spikes say how the stream that enters block 1 is disturbed.
var spikes = struct{ Share, Factor float64 }{.01, 8}

// spike multiplies some (token, channel) entries of the stream that enters block 1, the same for all images.
func spike(net *nn.Network, seed uint64) error {
	sh, err := net.Shapes(1)
	if err != nil {
		return err
	}
	const stream = "blk.0.res2"
	s, ok := sh[stream]
	if !ok {
		return fmt.Errorf("the network has no value %q", stream)
	}
	mask := make([]float32, s.Size())
	r := rng.New(seed, "spikes")
	for i := range mask {
		if mask[i] = 1; r.Float64() < spikes.Share {
			mask[i] = float32(spikes.Factor)
		}
	}
	readers, _ := net.Readers(stream)
	first := readers[0]
	value, err := net.InsertBefore(first.Name, 0, "spikes", nn.Mul)
	if err != nil {
		return err
	}
	dims := s.Dimensions[1:]
	at := 0
	for net.Nodes[at] != value {
		at++
	}
	table := &nn.Node{Name: "spikes.table", Op: nn.Value{Shape: shapes.Make(dtypes.Float32, append([]int{1}, dims...)...), Role: nn.Constant}, Out: []string{"spikes.table"}, P: map[string]string{}}
	net.Nodes = append(net.Nodes[:at:at], append([]*nn.Node{table}, net.Nodes[at:]...)...)
	net.SetParam(table, "w", nn.Constant, mask, append([]int{1}, dims...)...)
	value.In = []string{stream, "spikes.table"}
	for _, r := range readers {
		for i, v := range r.In {
			if v == stream {
				r.In[i] = "spikes"
			}
		}
	}
	return net.Check()
}

// quantiseVersion runs a method on a version of ViT-A; nil: the network as it is.
func quantiseVersion(q *method.RepQuant, name string) func(ctx context.Context, t *lab.Trial) error {
	return func(ctx context.Context, t *lab.Trial) error {
		b, v, err := versionOf(ctx, t, name)
		if err != nil {
			return err
		}
		judged := *b
		judged.logits = v.logits
		if q == nil {
			return record(t, &judged, v.net, v.logits)
		}
		z := repquantOf(t.Scale)
		calib, err := b.calibration(t.Seed, z.Images)
		if err != nil {
			return err
		}
		m := *q
		m.Seed, m.Clip.Steps = t.Seed, z.Steps
		res, err := m.Compress(ctx, t.Backend, v.net, calib)
		if err != nil {
			return err
		}
		logits, _, err := compress.Evaluate(ctx, t.Backend, res.Network, b.test, evalBatch)
		if err != nil {
			return err
		}
		return record(t, &judged, res.Network, logits)
	}
}

// quantiseText runs a method on the language model; nil: the model as it is.
func quantiseText(q *method.RepQuant) func(ctx context.Context, t *lab.Trial) error {
	return func(ctx context.Context, t *lab.Trial) error {
		z := repquantOf(t.Scale)
		corpus, err := z.Text.Corpus(ctx, t)
		if err != nil {
			return err
		}
		v, err := t.Shared("repquant-llama", func() (any, error) {
			o := z.Decoder
			o.Symbols = corpus.Symbols
			return t.Network([]any{"repquant-llama", o, z.Text}, func() (*nn.Network, error) { return zoo.Decoder(o) }, func(net *nn.Network) error {
				return z.Text.Train(ctx, t, net, corpus)
			})
		})
		if err != nil {
			return err
		}
		net := v.(*nn.Network)
		if q != nil {
			starts, err := data.TrainWindows(rng.New(t.Seed, "calibration"), len(corpus.Train), z.Text.Context, z.Sequences)
			if err != nil {
				return err
			}
			in, _ := data.Windows(corpus.Train, starts, z.Text.Context)
			m := *q
			m.Seed, m.Clip.Steps = t.Seed, z.Steps
			m.Select = func(n *nn.Node) bool { _, table := n.Op.(nn.Embedding); return !table }
			res, err := m.Compress(ctx, t.Backend, net, compress.Examples{tensors.FromFlatDataAndDimensions(in, z.Sequences, z.Text.Context)})
			if err != nil {
				return err
			}
			net = res.Network
		}
		nll, _, err := learn.Evaluate(t.Backend, &net.Params, learn.LanguageModel(net), z.Text.Validation(corpus, min(32, z.Windows), z.Windows))
		if err != nil {
			return err
		}
		t.Record("bits per character", nll/math.Ln2)
		t.Record("bytes", float64(compress.Size(net)))
		return nil
	}
}

// clipGroups learns the grids of every norm's channels in the three versions of the network at 4 bits, and judges them on
// test images, beside grids of the whole ranges and of percentiles.
func clipGroups(ctx context.Context, t *lab.Trial) error {
	z := repquantOf(t.Scale)
	groups, whole, percentile, logWhole := 0., 0., 0., 0.
	for _, name := range []string{"spread", "plain", "spiky"} {
		b, v, err := versionOf(ctx, t, name)
		if err != nil {
			return err
		}
		calib, err := b.calibration(t.Seed, z.Images)
		if err != nil {
			return err
		}
		held, err := b.test.Slice(0, min(attentionImages, b.test.Len()), 0)
		if err != nil {
			return err
		}
		for _, norm := range v.net.Nodes {
			var w []float32
			if _, ok := norm.Op.(nn.LayerNorm); ok {
				w = denseReaders(v.net, norm)
			}
			if w == nil {
				continue
			}
			fit, dims, err := compress.Capture(ctx, t.Backend, v.net, calib, 0, norm.Out[0])
			if err != nil {
				return err
			}
			judge, _, err := compress.Capture(ctx, t.Backend, v.net, held, 0, norm.Out[0])
			if err != nil {
				return err
			}
			d := dims[0][len(dims[0])-1]
			rows := []int{len(fit[0]) / d, d}
			learnt, _, err := method.DualClip(ctx, t.Backend, fit[0], w, d, 4, method.DualClipOptions{Steps: z.Steps, Seed: t.Seed})
			if err != nil {
				return err
			}
			ranges, err := method.CalibrateUniform(fit[0], rows, 1, 4, method.Percentiles(1))
			if err != nil {
				return err
			}
			searched, err := method.CalibrateUniform(fit[0], rows, 1, 4)
			if err != nil {
				return err
			}
			var e [3]float64
			for i, g := range []method.Affine{learnt, ranges, searched} {
				if e[i], err = g.OutputMSE(judge[0], w, d); err != nil {
					return err
				}
			}
			t.Record(fmt.Sprintf("%s %s: learnt over whole ranges", name, norm.Name), e[0]/e[1])
			if groups++; e[0] < e[1] {
				whole++
			}
			if e[0] < e[2] {
				percentile++
			}
			logWhole += math.Log(e[0] / e[1])
		}
	}
	t.Record("better than whole ranges", 100*whole/groups)
	t.Record("better than percentiles", 100*percentile/groups)
	t.Record("error over that of whole ranges", math.Exp(logWhole/groups))
	return nil
}

// denseReaders stacks the weights of a norm's readers; nil when something else than a dense layer reads it.
func denseReaders(net *nn.Network, norm *nn.Node) (w []float32) {
	readers, _ := net.Readers(norm.Out[0])
	for _, r := range readers {
		if _, ok := r.Op.(nn.Dense); !ok {
			return nil
		}
		w = append(w, net.Param(r, "w").Data()...)
	}
	return w
}

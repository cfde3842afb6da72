package norm

import (
	"context"
	"fmt"
	"iter"
	"math"

	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/internal/timing"
	"github.com/lathe-ml/lathe/lab"
	"github.com/lathe-ml/lathe/lab/exp/recipe"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/fold"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// preRMSSizes are the sizes of the experiment at a scale.
type preRMSSizes struct {
	Images recipe.Images
	ViT    zoo.ViTOptions
	Path   int // steps over which losses are compared
	Rounds int // of timing
	Batch  int // of the timed inference
	Chain  int // norms behind each other, timed alone on as many rows as the network has tokens
	Wide   zoo.ViTOptions
	WideN  int // batch of the wide network
}

func preRMSSizesOf(s lab.Scale) preRMSSizes {
	z := preRMSSizes{
		Images: recipe.Images{TrainN: 20_000, TestN: 5_000, Loop: recipe.Loop{Batch: 64, Steps: 300, LR: 1e-3, Floor: 1, Decay: .05}},
		ViT:    zoo.ViTOptions{Dim: 64, Depth: 4, Heads: 4, MLP: 128, MeanPool: true},
		Path:   100, Rounds: 101, Batch: 64, Chain: 9,
		Wide: zoo.ViTOptions{Patch: 4, Dim: 384, Depth: 6, Heads: 6, MLP: 1536, MeanPool: true}, WideN: 8,
	}
	if s == lab.Smoke {
		z.Images.TrainN, z.Images.TestN, z.Images.Steps, z.Path, z.Rounds, z.Batch, z.Chain = 2_000, 200, 40, 20, 3, 8, 3
		z.ViT.Dim, z.ViT.Depth, z.ViT.MLP = 32, 1, 64
		z.Wide, z.WideN = zoo.ViTOptions{Patch: 7, Dim: 96, Depth: 1, Heads: 3, MeanPool: true}, 2
	}
	return z
}

// network is the experiment's vision transformer.
func (z preRMSSizes) network(seed uint64) (*nn.Network, error) {
	o := z.ViT
	o.Seed = seed
	return zoo.ViT(o)
}

// PreRMSNorm converts a trained pre-norm vision transformer to RMS norms and to a compressed stream, trains it in the
// re-centred form beside the layer norms, and measures speed (arXiv:2305.14858, sections 3 and 4).
func PreRMSNorm() lab.Experiment {
	get := func(arm, metric string) func(lab.Metrics) float64 {
		return func(m lab.Metrics) float64 { return m.Get(arm, metric) }
	}
	const equivalent = "the three networks are equivalent"
	e := lab.Experiment{
		Method: "pre-rmsnorm",
		Title:  "vision transformer of width 64 on Fashion-MNIST under layer norm, RMS norm and compressed RMS norm: converted, trained and timed",
		Recipe: []preRMSSizes{preRMSSizesOf(lab.Smoke), preRMSSizesOf(lab.Full)},
		Claims: []lab.Claim{
			{
				ID: "C1a", Text: "converted to RMS norms: logits differ by at most 1e-3 of 1 plus the largest", Paper: equivalent, Unit: "×",
				Measure: get("converted", "rms_difference"), Bound: lab.AtMost(1e-3),
			},
			{
				ID: "C1b", Text: "converted to RMS norms: the same class for every test image", Paper: equivalent, Unit: "%",
				Measure: get("converted", "rms_agreement"), Bound: lab.AtLeast(100),
			},
			{
				ID: "C1c", Text: "converted to a compressed stream: logits differ by at most 1e-3 of 1 plus the largest", Paper: equivalent, Unit: "×",
				Measure: get("converted", "crms_difference"), Bound: lab.AtMost(1e-3),
			},
			{
				ID: "C1d", Text: "converted to a compressed stream: the same class for 99.9 % of the test images", Paper: equivalent, Unit: "%",
				Measure: get("converted", "crms_agreement"), Bound: lab.AtLeast(99.9),
			},
			{
				ID: "C2a", Text: "re-centred training: over the first 100 steps the loss differs from layer norm's by at most 1e-4", Paper: "equivalent in training", Unit: "nats",
				Measure: get("pre-rms", "path_gap"), Bound: lab.AtMost(1e-4),
			},
			{
				ID: "C2b", Text: "re-centred training: final accuracies differ by at most 0.2 points", Paper: "accuracy identical", Unit: "points",
				Measure: func(m lab.Metrics) float64 {
					return math.Abs(m.Get("pre-rms", "test_accuracy") - m.Get("pre-ln", "test_accuracy"))
				}, Bound: lab.AtMost(.2),
			},
			{
				ID: "C3a", Text: "layer norms swapped for RMS norms without re-centring: 0.3 % of the test images change class", Paper: "(ablation)", Unit: "%",
				Measure: func(m lab.Metrics) float64 { return 100 - m.Get("converted", "swapped_agreement") }, Bound: lab.AtLeast(.3),
			},
			{
				ID: "C3b", Text: "RMS norms without re-centring: the loss leaves layer norm's by 1e-2 within 100 steps", Paper: "(ablation)", Unit: "nats",
				Measure: get("naive-rms", "path_gap"), Bound: lab.AtLeast(1e-2),
			},
			{
				ID: "C4a", Text: "the RMS norm alone takes at most 0.9 of layer norm's time", Paper: "(norms are 10 to 15 % of the time)", Unit: "×",
				Measure: get("speed", "norm_ratio_rms"), Bound: lab.AtMost(.9),
			},
			{
				ID: "C4b", Text: "inference with RMS norms takes at most the time with layer norms", Paper: "0.90 to 0.99 of the time", Unit: "×",
				Measure: get("speed", "inference_ratio_rms"), Bound: lab.AtMost(1),
			},
		},
	}
	keep := func(*nn.Network) error { return nil }
	zeroMean := func(compress bool) func(*nn.Network) error {
		return func(net *nn.Network) error { _, err := fold.ZeroMeanForm(net, compress); return err }
	}
	e.Arms = []lab.Arm{
		{Name: "pre-ln", Baseline: true, Run: preRMSTraining(keep)},
		{Name: "pre-rms", Run: preRMSTraining(zeroMean(false))},
		{Name: "pre-crms", Run: preRMSTraining(zeroMean(true))},
		{Name: "naive-rms", Run: preRMSTraining(func(net *nn.Network) error { swapNorms(net); return nil })},
		{Name: "converted", Run: preRMSConversion},
		{Name: "speed", Run: preRMSSpeed},
	}
	return e
}

// swapNorms puts RMS norms with gain and bias in the place of layer norms, and leaves everything else.
func swapNorms(net *nn.Network) {
	for _, x := range net.Nodes {
		if op, ok := x.Op.(nn.LayerNorm); ok {
			x.Op = nn.RMSNorm{Eps: op.Epsilon(), Bias: true}
		}
	}
}

// preRMSRun is a network that was trained, with the losses of its first steps.
type preRMSRun struct {
	net      *nn.Network
	losses   []float64
	accuracy float64
}

// trained trains the network in a form.
func (z preRMSSizes) trained(ctx context.Context, t *lab.Trial, form func(*nn.Network) error) (preRMSRun, error) {
	var r preRMSRun
	sets, err := z.Images.Sets(ctx, t)
	if err != nil {
		return r, err
	}
	if r.net, err = z.network(t.Seed); err != nil {
		return r, err
	}
	if err := form(r.net); err != nil {
		return r, err
	}
	err = z.Images.Train(ctx, t, r.net, sets, func(_ *learn.Trainer, i learn.Info) error {
		if i.Step <= z.Path {
			r.losses = append(r.losses, i.Loss)
		}
		return nil
	})
	if err != nil {
		return r, err
	}
	_, r.accuracy, err = z.Images.Evaluate(t, r.net, sets)
	return r, err
}

// reference is the network with layer norms, which all arms of a seed share.
func (z preRMSSizes) reference(ctx context.Context, t *lab.Trial) (preRMSRun, error) {
	v, err := t.Shared("pre-ln", func() (any, error) { return z.trained(ctx, t, func(*nn.Network) error { return nil }) })
	if err != nil {
		return preRMSRun{}, err
	}
	return v.(preRMSRun), nil
}

// preRMSTraining trains a form of the network and compares the path of its loss with layer norm's.
func preRMSTraining(form func(*nn.Network) error) func(context.Context, *lab.Trial) error {
	return func(ctx context.Context, t *lab.Trial) error {
		z := preRMSSizesOf(t.Scale)
		want, err := z.reference(ctx, t)
		if err != nil {
			return err
		}
		got := want
		if t.Arm != "pre-ln" {
			if got, err = z.trained(ctx, t, form); err != nil {
				return err
			}
		}
		gap := 0.
		for i, loss := range got.losses {
			gap = max(gap, math.Abs(loss-want.losses[i]))
			t.Series("difference of the loss from layer norm's", float64(i+1), math.Abs(loss-want.losses[i]))
		}
		t.Record("path_gap", gap)
		t.Record("test_accuracy", got.accuracy)
		t.Record("parameters", float64(got.net.Params.Count()))
		return nil
	}
}

// preRMSConversion converts the trained network and compares logits on the test images.
func preRMSConversion(ctx context.Context, t *lab.Trial) error {
	z := preRMSSizesOf(t.Scale)
	sets, err := z.Images.Sets(ctx, t)
	if err != nil {
		return err
	}
	ref, err := z.reference(ctx, t)
	if err != nil {
		return err
	}
	var pictures iter.Seq2[[]*tensors.Tensor, error] = func(yield func([]*tensors.Tensor, error) bool) {
		for _, batch := range z.Images.TestBatches(sets, 500) {
			if !yield(batch[:1], nil) {
				return
			}
		}
	}
	t.Record("parameters", float64(ref.net.Params.Count()))
	for _, c := range []struct {
		name    string
		convert func(*nn.Network) error
	}{
		{"rms", func(n *nn.Network) error { _, err := fold.ToPreRMS(n); return err }},
		{"crms", func(n *nn.Network) error { _, err := fold.ToPreCRMS(n); return err }},
		{"swapped", func(n *nn.Network) error { swapNorms(n); return nil }},
	} {
		net := ref.net.Clone()
		if err := c.convert(net); err != nil {
			return err
		}
		e, err := fold.VerifyEquivalence(t.Backend, ref.net, net, pictures)
		if err != nil {
			return err
		}
		_, accuracy, err := z.Images.Evaluate(t, net, sets)
		if err != nil {
			return err
		}
		t.Record(c.name+"_difference", e.Relative)
		t.Record(c.name+"_max_difference", e.MaxDiff)
		t.Record(c.name+"_agreement", 100*e.Top1)
		t.Record(c.name+"_accuracy", accuracy)
		t.Record(c.name+"_parameters", float64(net.Params.Count()))
	}
	return nil
}

// preRMSSpeed times inference of the network in its three forms, of a wider one, and the norms alone.
func preRMSSpeed(ctx context.Context, t *lab.Trial) error {
	z := preRMSSizesOf(t.Scale)
	ref, err := z.reference(ctx, t)
	if err != nil {
		return err
	}
	wideOptions := z.Wide
	wideOptions.Seed = t.Seed
	wide, err := zoo.ViT(wideOptions)
	if err != nil {
		return err
	}
	forms := []string{"ln", "rms", "crms"}
	record := func(what string, rounds int, f ...func() error) error {
		times, err := timing.Interleaved(ctx, rounds, nil, f...)
		if err != nil {
			return err
		}
		for i, v := range times {
			t.Record(fmt.Sprintf("%s_ms_%s", what, forms[i]), 1e3*v.Median())
			if i > 0 {
				ratio, _, _ := v.Ratio(times[0])
				t.Record(fmt.Sprintf("%s_ratio_%s", what, forms[i]), ratio)
			}
		}
		return nil
	}
	for i, c := range []struct {
		what          string
		net           *nn.Network
		batch, rounds int
	}{{"inference", ref.net, z.Batch, z.Rounds}, {"inference_wide", wide, z.WideN, (z.Rounds + 2) / 3}} {
		x := make([]float32, c.batch*28*28)
		rng.Uniform(rng.New(t.Seed, "prermsnorm:"+c.what), x, 0, 1)
		in := tensors.FromFlatDataAndDimensions(x, c.batch, 28, 28, 1)
		var passes []func() error
		for _, form := range forms {
			net := c.net.Clone()
			switch form {
			case "rms":
				_, err = fold.ToPreRMS(net)
			case "crms":
				_, err = fold.ToPreCRMS(net)
			}
			if err != nil {
				return err
			}
			r, err := nn.NewRunner(t.Backend, net, nn.RunOptions{})
			if err != nil {
				return err
			}
			defer r.Finalize()
			passes = append(passes, func() error { _, err := r.Run(in); return err })
		}
		if err := record(c.what, c.rounds, passes...); err != nil {
			return err
		}
		t.Progress(i+1, 3)
	}
	var passes []func() error
	for _, form := range forms {
		width, rows := z.ViT.Dim, 16*z.Batch
		if form == "crms" {
			width--
		}
		x := make([]float32, rows*width)
		rng.Normal(rng.New(t.Seed, "prermsnorm:norm"), x, 1)
		in := tensors.FromFlatDataAndDimensions(x, rows, width)
		e, err := engine.NewExec(t.Backend, func(in []*graph.Node) []*graph.Node {
			y := in[0]
			for range z.Chain { // one alone would be measured with the making of its result
				if form == "crms" {
					y = nn.CompressedRMS(y, 1e-5, -1)
				} else {
					y = nn.Standardize(y, nil, nil, 1e-5, form == "ln", -1)
				}
			}
			return []*graph.Node{y}
		})
		if err != nil {
			return err
		}
		defer e.Finalize()
		passes = append(passes, func() error { _, err := e.Call(in); return err })
	}
	return record("norm", z.Rounds, passes...)
}

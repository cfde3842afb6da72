package prune

import (
	"context"
	"fmt"
	"math"
	"slices"

	"github.com/lathe-ml/lathe/compress"
	method "github.com/lathe-ml/lathe/compress/prune"
	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/internal/metric"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/internal/timing"
	"github.com/lathe-ml/lathe/lab"
	"github.com/lathe-ml/lathe/lab/exp/recipe"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// lazySizes are the sizes of the experiment at a scale.
type lazySizes struct {
	Images      recipe.Images // of the arms that are compared in accuracy
	Study       recipe.Images // of the controlled studies
	Random      int           // pictures with random labels or random pixels
	RandomSteps int           // of training on them
	Text        recipe.Text
	Patch       int
	Depth       int
	Dim         int
	MLP         int // hidden units; the Top-k arms keep a sixteenth
	TextDim     int
	TextMLP     int
	Noise       float64 // share of training labels redrawn
	Probed      int     // test pictures on which activations are measured
	Corrupted   int     // test pictures on which each corruption is tried
	Rounds      int     // of the timing of the kernel
}

func lazySizesOf(s lab.Scale) lazySizes {
	loop := recipe.Loop{Batch: 16, LR: 1e-3, Warmup: 50, Floor: .1, Decay: .01, ClipNorm: 1}
	z := lazySizes{
		Images: recipe.Images{TrainN: 20_000, TestN: 5_000, Standardize: true},
		Study:  recipe.Images{TrainN: 5_000, TestN: 1_000, Standardize: true},
		Text:   recipe.Text{Characters: 300_000, Context: 64},
		Random: 2_000, Patch: 4, Depth: 4, Dim: 64, MLP: 256, TextDim: 128, TextMLP: 512,
		Noise: .4, Probed: 200, Corrupted: 500, Rounds: 15,
	}
	z.Images.Loop, z.Study.Loop, z.Text.Loop = loop, loop, loop
	z.Images.Batch = 32
	z.Images.Steps, z.Study.Steps, z.Text.Steps, z.Text.Loop.Batch = 4*20_000/32, 2*5_000/16, 300, 16
	z.RandomSteps = 12 * z.Random / 16
	if s == lab.Smoke {
		z.Images.TrainN, z.Images.TestN, z.Study.TrainN, z.Study.TestN, z.Random = 400, 100, 200, 50, 100
		z.Patch, z.Depth, z.Dim, z.MLP, z.TextDim, z.TextMLP = 14, 2, 32, 64, 32, 64
		z.Images.Steps, z.Study.Steps, z.Text.Steps, z.RandomSteps = 20, 8, 8, 8
		z.Images.Batch, z.Study.Batch, z.Text.Loop.Batch = 16, 16, 4
		z.Images.Warmup, z.Study.Warmup, z.Text.Warmup = 2, 2, 2
		z.Text.Characters, z.Text.Context = 12_000, 24
		z.Probed, z.Corrupted, z.Rounds = 20, 20, 2
	}
	return z
}

// lazyArm is one trained vision transformer.
type lazyArm struct {
	name     string
	baseline bool
	change   func(z lazySizes, o *zoo.ViTOptions)
	study    bool // the smaller recipe
	once     bool // no claim reads it: one seed is enough
	random   bool // as many steps as random labels need
	noise    bool // training labels are redrawn with probability Noise
	data     func(z lazySizes, t *lab.Trial, s *recipe.Sets, all *data.Images) (train, probe *data.Images, err error)
}

// LazyNeuron measures how sparse the hidden activations of small transformers become in training, under the controlled
// conditions of the paper, and what the Top-k Transformer gains under label noise and corrupted inputs
// (arXiv:2210.06313). The arms that no claim reads run with the first seed only.
func LazyNeuron() lab.Experiment {
	sparser := func(arm string) func(lab.Metrics) float64 {
		return func(m lab.Metrics) float64 { return m.Get(arm, "nonzero") / m.Get(arm, "nonzero_initial") }
	}
	e := lab.Experiment{
		Method: "lazy-neuron",
		Title:  "activation sparsity of vision transformers on Fashion-MNIST and of a character language model; Top-k activations under label noise and corruption",
		Recipe: []lazySizes{lazySizesOf(lab.Smoke), lazySizesOf(lab.Full)},
		Claims: []lab.Claim{
			{
				ID: "C1a", Text: "vision transformer: the share of active neurons ends at 0.6 of its initial value or less", Paper: "50 % falls to 6.3 % in ViT-B/16", Unit: "×",
				Measure: sparser("relu"), Bound: lab.AtMost(.6),
			},
			{
				ID: "C1b", Text: "character language model: the share of active neurons ends at 0.6 of its initial value or less", Paper: "50 % falls to 3.0 % in T5-Base", Unit: "×",
				Measure: sparser("text"), Bound: lab.AtMost(.6),
			},
			{
				ID: "C2", Text: "a smaller share of 1024 hidden units is active than of 64", Paper: "wider is sparser",
				Measure: lab.Difference("width-1024", "width-64", "nonzero"), Bound: lab.AtMost(0),
			},
			{
				ID: "C3a", Text: "with random labels the share of active neurons ends at 0.8 of its initial value or less", Paper: "sparsity without any signal", Unit: "×",
				Measure: sparser("random-labels"), Bound: lab.AtMost(.8),
			},
			{
				ID: "C3b", Text: "fewer than 20 % of the neurons are dead", Paper: "nearly every neuron is active for some input", Unit: "%",
				Measure: func(m lab.Metrics) float64 { return 100 * m.Get("relu", "dead") }, Bound: lab.AtMost(20),
			},
			{
				ID: "C4a", Text: "clean labels: Top-k is at most 1 point below ReLU", Paper: "74.83 against 74.85 % on ImageNet", Unit: "points",
				Measure: lab.Difference("topk", "relu", "test_accuracy"), Bound: lab.AtLeast(-1),
			},
			{
				ID: "C4b", Text: "with 40 % label noise Top-k is 0.5 points above ReLU", Paper: "62.13 against 59.44 % on ImageNet", Unit: "points",
				Measure: lab.Difference("topk-noise", "relu-noise", "test_accuracy"), Bound: lab.AtLeast(.5),
			},
			{
				ID: "C5a", Text: "with 40 % label noise Top-k has the lower calibration error", Paper: "better calibrated",
				Measure: lab.Difference("topk-noise", "relu-noise", "ece"), Bound: lab.AtMost(0),
			},
			{
				ID: "C5b", Text: "trained on clean labels, Top-k is at least as accurate as ReLU on noisy pictures", Paper: "better under gaussian, impulse and shot noise", Unit: "points",
				Measure: lab.Difference("topk", "relu", "corrupted_accuracy"), Bound: lab.AtLeast(0),
			},
		},
	}
	topk := func(z lazySizes, o *zoo.ViTOptions) { o.Act = method.ReLUTopK{K: z.MLP / 16} }
	none := func(lazySizes, *zoo.ViTOptions) {}
	width := func(n int) func(lazySizes, *zoo.ViTOptions) {
		return func(_ lazySizes, o *zoo.ViTOptions) { o.MLP = n }
	}
	depth := func(n int) func(lazySizes, *zoo.ViTOptions) {
		return func(_ lazySizes, o *zoo.ViTOptions) { o.Depth = n }
	}
	for _, a := range []lazyArm{
		{name: "relu", baseline: true, change: none},
		{name: "gelu", baseline: true, change: func(_ lazySizes, o *zoo.ViTOptions) { o.Act = nn.GELU{} }, study: true, once: true},
		{name: "topk", change: topk},
		{name: "relu-noise", baseline: true, change: none, noise: true},
		{name: "topk-noise", change: topk, noise: true},
		{name: "study", change: none, study: true, once: true},
		{name: "width-64", change: width(64), study: true},
		{name: "width-1024", change: width(1024), study: true},
		{name: "depth-2", change: depth(2), study: true, once: true},
		{name: "depth-8", change: depth(8), study: true, once: true},
		{name: "random-labels", change: none, study: true, data: randomLabels, random: true},
		{name: "random-inputs", change: none, study: true, data: randomInputs, random: true, once: true},
		{name: "fresh", change: none, study: true, data: freshPictures, once: true},
		{name: "mixer", change: func(_ lazySizes, o *zoo.ViTOptions) { o.Mixer = zoo.TokenMixing(64, nn.ReLU) }, study: true, once: true},
	} {
		e.Arms = append(e.Arms, lab.Arm{
			Name: a.name, Baseline: a.baseline, Once: a.once,
			Run: func(ctx context.Context, t *lab.Trial) error { return a.run(ctx, t, lazySizesOf(t.Scale)) },
		})
	}
	e.Arms = append(e.Arms,
		lab.Arm{Name: "mlp", Once: true, Run: func(ctx context.Context, t *lab.Trial) error { return perceptron(ctx, t, lazySizesOf(t.Scale)) }},
		lab.Arm{Name: "text", Run: func(ctx context.Context, t *lab.Trial) error { return lazyText(ctx, t, lazySizesOf(t.Scale)) }},
		lab.Arm{Name: "gradient", Run: gradients},
	)
	return e
}

// randomLabels gives pictures labels that say nothing about them.
func randomLabels(z lazySizes, t *lab.Trial, s *recipe.Sets, _ *data.Images) (train, probe *data.Images, err error) {
	few := *s.Train.First(z.Random)
	few.Labels, err = data.UniformNoise(few.Labels, few.Classes(), 1, t.Seed, "train")
	return &few, s.Test, err
}

// randomInputs are pictures of gaussian noise, with the labels of real ones.
func randomInputs(z lazySizes, t *lab.Trial, s *recipe.Sets, _ *data.Images) (train, probe *data.Images, err error) {
	grey := func(m *data.Images, seed uint64) (*data.Images, error) {
		out := *m
		out.Pixels = make([]uint8, len(m.Pixels))
		for i := range out.Pixels {
			out.Pixels[i] = 128
		}
		return out.Corrupted(data.GaussianNoise{Sigma: .25}, seed)
	}
	if train, err = grey(s.Train.First(z.Random), t.Seed); err != nil {
		return nil, nil, err
	}
	probe, err = grey(s.Test, t.Seed+1<<32)
	return train, probe, err
}

// freshPictures are so many that none is seen twice.
func freshPictures(z lazySizes, t *lab.Trial, s *recipe.Sets, all *data.Images) (train, probe *data.Images, err error) {
	idx, _, err := all.Stratified(min(all.N, z.Study.Steps*z.Study.Batch), t.Seed)
	if err != nil {
		return nil, nil, err
	}
	train, err = all.Subset(idx)
	return train, s.Test, err
}

// run trains a transformer, looks at its activations before, while and after, and at its predictions.
func (a lazyArm) run(ctx context.Context, t *lab.Trial, z lazySizes) error {
	r := z.Images
	if a.study {
		if r = z.Study; a.random {
			r.Steps = z.RandomSteps
		}
	}
	sets, err := r.Sets(ctx, t)
	if err != nil {
		return err
	}
	train, probe := sets.Train, sets.Test
	switch {
	case a.data != nil:
		all, err := data.FashionMNIST(ctx, true)
		if err != nil {
			return err
		}
		if train, probe, err = a.data(z, t, sets, all); err != nil {
			return err
		}
	case a.noise: // the same labels in every epoch
		noisy := *train
		if noisy.Labels, err = data.UniformNoise(train.Labels, train.Classes(), z.Noise, t.Seed, "train"); err != nil {
			return err
		}
		train = &noisy
	}
	o := zoo.ViTOptions{Patch: z.Patch, Dim: z.Dim, Depth: z.Depth, MLP: z.MLP, Act: nn.ReLU, MeanPool: true, Seed: t.Seed}
	a.change(z, &o)
	net, err := zoo.ViT(o)
	if err != nil {
		return err
	}
	if err := glorot(net); err != nil {
		return err
	}
	watch := &watcher{t: t, net: net, probe: probe.First(z.Probed), examples: examplesOf(r, sets)}
	if err := watch.run(ctx, func(hook learn.Hook) error { return r.TrainOn(ctx, t, net, sets, train, hook) }, r.Steps); err != nil {
		return err
	}
	seen, err := watch.measure(ctx, train.First(z.Probed))
	if err != nil {
		return err
	}
	t.Record("nonzero_train", method.MeanNonZero(seen))
	return a.predictions(t, z, r, sets, net)
}

// glorot gives the feed-forward parts the initial weights of the paper's vision transformers (arXiv:2010.11929): of
// variance 2/(in + out) instead of 1/in.
func glorot(net *nn.Network) error {
	for _, site := range net.Sites() {
		w := net.Param(site, "w")
		d := w.Value.Shape().Dimensions
		if _, ok := site.Op.(nn.Dense); !ok || d[0] == d[1] || site.Name == "head" {
			continue
		}
		scale, values := float32(math.Sqrt(2*float64(d[1])/float64(d[0]+d[1]))), w.Data()
		for i := range values {
			values[i] *= scale
		}
		if err := w.SetData(values); err != nil {
			return err
		}
	}
	return nil
}

// examplesOf turns pictures into a network's inputs.
func examplesOf(r recipe.Images, s *recipe.Sets) func(m *data.Images) (compress.Examples, error) {
	return func(m *data.Images) (compress.Examples, error) {
		batch, err := r.Tensors(s, m, data.Range(m.N))
		if err != nil {
			return nil, err
		}
		return batch[:1], nil
	}
}

// watcher measures the activations of a network of pictures.
type watcher struct {
	t        *lab.Trial
	net      *nn.Network
	probe    *data.Images
	examples func(m *data.Images) (compress.Examples, error)
}

func (w *watcher) measure(ctx context.Context, m *data.Images) ([]method.LayerSparsity, error) {
	x, err := w.examples(m)
	if err != nil {
		return nil, err
	}
	return measure(ctx, w.t, w.net, x)
}

// measure returns the sparsity of all layers on the examples.
func measure(ctx context.Context, t *lab.Trial, net *nn.Network, x compress.Examples) ([]method.LayerSparsity, error) {
	layers, err := method.ActivationLayers(net)
	if err != nil {
		return nil, err
	}
	var p method.SparsityProbe
	if err := method.MeasureActivations(ctx, t.Backend, net, x, layers, &p, method.MeasureOptions{Batch: 100}); err != nil {
		return nil, err
	}
	return p.Report()
}

// run trains, and records what the activations are before, meanwhile (of a few pictures) and after.
func (w *watcher) run(ctx context.Context, train func(learn.Hook) error, steps int) error {
	before, err := w.measure(ctx, w.probe)
	if err != nil {
		return err
	}
	recordSparsity(w.t, before, "_initial")
	few := w.probe.First(50)
	every := max(1, steps/8)
	err = train(func(_ *learn.Trainer, i learn.Info) error {
		if i.Step%every != 0 {
			return nil
		}
		layers, err := w.measure(ctx, few)
		if err != nil {
			return err
		}
		w.t.Series("nonzero", float64(i.Step), method.MeanNonZero(layers))
		return nil
	})
	if err != nil {
		return err
	}
	after, err := w.measure(ctx, w.probe)
	if err != nil {
		return err
	}
	recordSparsity(w.t, after, "")
	for i, l := range after {
		w.t.Series("nonzero over layers", float64(i+1), l.NonZero)
	}
	return nil
}

// recordSparsity records the means over the layers.
func recordSparsity(t *lab.Trial, layers []method.LayerSparsity, suffix string) {
	t.Record("nonzero"+suffix, method.MeanNonZero(layers))
	t.Record("dead"+suffix, method.DeadShare(layers))
	energy := 0.
	for _, l := range layers {
		energy += l.EnergyTop10 / float64(len(layers))
	}
	t.Record("energy_top10"+suffix, energy)
}

// predictions records accuracy and calibration on clean pictures, and the accuracy on noisy ones.
func (a lazyArm) predictions(t *lab.Trial, z lazySizes, r recipe.Images, sets *recipe.Sets, net *nn.Network) error {
	if a.data != nil { // trained on no real task, or on another set
		return nil
	}
	runner, err := nn.NewRunner(t.Backend, net, nn.RunOptions{})
	if err != nil {
		return err
	}
	defer runner.Finalize()
	of := func(m *data.Images) (metric.Calibration, error) {
		var logits []float32
		for idx := range data.Batches(m.N, 250) {
			batch, err := r.Tensors(sets, m, idx)
			if err != nil {
				return metric.Calibration{}, err
			}
			out, err := runner.Run(batch[0])
			if err != nil {
				return metric.Calibration{}, err
			}
			logits = append(logits, nn.Floats(out[0])...)
		}
		labels := make([]int, m.N)
		for i := range labels {
			labels[i] = int(m.Labels[i])
		}
		s, err := metric.ScoreLogits(logits, m.Classes(), labels, 1)
		if err != nil {
			return metric.Calibration{}, err
		}
		return s.Calibration(metric.Bins{UpperClosed: true})
	}
	c, err := of(sets.Test)
	if err != nil {
		return err
	}
	t.Record("test_accuracy", 100*c.Accuracy)
	t.Record("ece", c.ECE)
	t.Record("nll", c.NLL)
	if a.study || a.noise {
		return nil
	}
	mean, kinds := 0., data.NoiseKinds()
	for _, kind := range kinds {
		of5 := 0.
		for severity := 1; severity <= data.Severities; severity++ {
			noise, err := data.NoiseOf(kind, severity)
			if err != nil {
				return err
			}
			noisy, err := sets.Test.First(z.Corrupted).Corrupted(noise, t.Seed)
			if err != nil {
				return err
			}
			c, err := of(noisy)
			if err != nil {
				return err
			}
			of5 += 100 * c.Accuracy / data.Severities
			t.Series(kind+" noise: accuracy over severity", float64(severity), 100*c.Accuracy)
		}
		t.Record(kind+"_accuracy", of5)
		mean += of5 / float64(len(kinds))
	}
	t.Record("corrupted_accuracy", mean)
	return nil
}

// perceptron trains two hidden layers on flat pictures.
func perceptron(ctx context.Context, t *lab.Trial, z lazySizes) error {
	r := z.Study
	r.Flat = true
	sets, err := r.Sets(ctx, t)
	if err != nil {
		return err
	}
	net, err := zoo.MLP(zoo.MLPOptions{Hidden: []int{z.MLP, z.MLP}, Seed: t.Seed})
	if err != nil {
		return err
	}
	w := &watcher{t: t, net: net, probe: sets.Test.First(z.Probed), examples: examplesOf(r, sets)}
	if err := w.run(ctx, func(hook learn.Hook) error { return r.Train(ctx, t, net, sets, hook) }, r.Steps); err != nil {
		return err
	}
	_, accuracy, err := r.Evaluate(t, net, sets)
	t.Record("test_accuracy", accuracy)
	return err
}

// lazyText trains a character language model with ReLU, and times the sparse kernel on its activations.
func lazyText(ctx context.Context, t *lab.Trial, z lazySizes) error {
	corpus, err := z.Text.Corpus(ctx, t)
	if err != nil {
		return err
	}
	net, err := zoo.Decoder(zoo.DecoderOptions{
		Symbols: corpus.Symbols, Context: z.Text.Context, Dim: z.TextDim, Depth: z.Depth, MLP: z.TextMLP, Act: nn.ReLU, Ungated: true, Seed: t.Seed,
	})
	if err != nil {
		return err
	}
	var x compress.Examples
	for _, batch := range z.Text.Validation(corpus, max(1, z.Probed/4), max(1, z.Probed/4)) {
		x = compress.Examples(batch[:1])
		break
	}
	before, err := measure(ctx, t, net, x)
	if err != nil {
		return err
	}
	recordSparsity(t, before, "_initial")
	if err := z.Text.Train(ctx, t, net, corpus); err != nil {
		return err
	}
	after, err := measure(ctx, t, net, x)
	if err != nil {
		return err
	}
	recordSparsity(t, after, "")
	for i, l := range after {
		t.Series("nonzero over layers", float64(i+1), l.NonZero)
	}
	nll, err := z.Text.Evaluate(t, net, corpus)
	if err != nil {
		return err
	}
	t.Record("validation_loss", nll)
	return timeKernel(ctx, t, z, net, x)
}

// timeKernel decodes tokens one by one through each block's feed-forward part, with and without skipping what is zero.
func timeKernel(ctx context.Context, t *lab.Trial, z lazySizes, net *nn.Network, x compress.Examples) error {
	var taps []string
	var kernels []*method.SparseFFN
	for i := range z.Depth {
		up, down := net.Node(fmt.Sprintf("blk.%d.up", i)), net.Node(fmt.Sprintf("blk.%d.down", i))
		f, err := method.NewSparseFFN(net.Param(up, "w").Data(), nil, net.Param(down, "w").Data(), nil, z.TextDim, z.TextMLP, 0)
		if err != nil {
			return err
		}
		taps, kernels = append(taps, up.In[0]), append(kernels, f)
	}
	few, err := x.Slice(0, 1, 0)
	if err != nil {
		return err
	}
	in, _, err := compress.Capture(ctx, t.Backend, net, few, 1, taps...)
	if err != nil {
		return err
	}
	y := make([]float32, z.TextDim)
	active, all := 0, 0
	each := func(f func(k *method.SparseFFN, token []float32) error) func() error {
		return func() error {
			active, all = 0, 0
			for i, k := range kernels {
				for at := 0; at < len(in[i]); at += z.TextDim {
					if err := f(k, in[i][at:at+z.TextDim]); err != nil {
						return err
					}
				}
			}
			return nil
		}
	}
	sparse := each(func(k *method.SparseFFN, token []float32) error {
		n, err := k.Forward(y, token)
		active, all = active+n, all+z.TextMLP
		return err
	})
	if err := sparse(); err != nil {
		return err
	}
	share := float64(active) / float64(all)
	times, err := timing.Interleaved(ctx, z.Rounds, nil, sparse, each(func(k *method.SparseFFN, token []float32) error { return k.Dense(y, token) }))
	if err != nil {
		return err
	}
	speedup, _, _ := times[1].Ratio(times[0])
	t.Record("kernel_nonzero", share)
	t.Record("kernel_speedup", speedup)
	t.Record("kernel_speedup_ideal", 2/(1+share))
	return nil
}

// gradients records the expected gradient of an active entry at initialisation, in standard errors.
func gradients(_ context.Context, t *lab.Trial) error {
	r := rng.New(t.Seed, "lazy-neuron/gradient")
	a := make([]float64, 64)
	for i := range a {
		a[i] = max(0, r.NormFloat64())
	}
	draws := 20_000
	if t.Scale == lab.Smoke {
		draws = 500
	}
	for _, loss := range []method.Loss{method.CrossEntropy, method.SquareLoss} {
		mean, stderr, err := method.ActivationGradient(a, method.GradientOptions{Classes: 10, Loss: loss, Draws: draws}, r)
		if err != nil {
			return err
		}
		var z []float64
		for i := range a {
			if a[i] > 0 {
				z = append(z, mean[i]/stderr[i])
			}
		}
		slices.Sort(z)
		t.Record("z_median_"+string(loss), z[len(z)/2])
		positive := 0
		for _, v := range z {
			if v > 0 {
				positive++
			}
		}
		t.Record("positive_"+string(loss), float64(positive)/float64(len(z)))
	}
	return nil
}

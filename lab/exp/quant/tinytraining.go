package quant

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/compress/tiny"
	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/lab"
	"github.com/lathe-ml/lathe/lab/exp/recipe"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/nn"
)

// tinySizes are the sizes of the experiment at a scale.
type tinySizes struct {
	Network     string
	Channels    []int // stem, then of every inverted bottleneck
	Strides     []int // of the bottlenecks
	Pretraining recipe.Loop
	Calibration int
	PerClass    int // training images of each of the five other classes of Fashion-MNIST
	Digits      int // training digits
	Test        int // test images of each task, at most
	Held        int // every so many-th training case chooses the learning rate
	Epochs      int
	Rates       []float64 // of float and scaled gradients
	Few         []float64 // of these, where the classifier or biases alone are trained
	Plain       []float64 // of gradients of codes as they are
	Budgets     []int     // of the sparse schemes, bytes by the formula
	Analysis    int       // training cases of the contribution analysis; 0: by gradients
	Ratios      []float64
}

func tinySizesOf(s lab.Scale) tinySizes {
	z := tinySizes{
		Network: "mobilenet-like", Channels: []int{16, 16, 24, 24, 48, 48, 48}, Strides: []int{1, 2, 1, 2, 1, 1},
		Pretraining: recipe.Loop{Batch: 64, Steps: 900, Warmup: 50, LR: 2e-3, Decay: .01},
		Calibration: 128, PerClass: 300, Digits: 1000, Test: 1000, Held: 5, Epochs: 5,
		Rates: []float64{.01, .03, .1, .3}, Few: []float64{.1, .3, 1, 3}, Plain: []float64{1, 10, 100, 1000},
		Budgets: []int{20_000, 40_000}, Analysis: 300, Ratios: []float64{.25, 1},
	}
	if s == lab.Smoke {
		z.Channels, z.Strides = []int{8, 8, 12}, []int{2, 2}
		z.Pretraining = recipe.Loop{Batch: 16, Steps: 10, LR: 2e-3}
		z.Calibration, z.PerClass, z.Digits, z.Test, z.Epochs, z.Analysis = 16, 12, 50, 50, 1, 0
		z.Rates, z.Few, z.Plain, z.Budgets = []float64{.01}, []float64{.1}, []float64{.1}, []int{2000, 4000}
	}
	return z
}

// inverted builds the network: a stem of stride 2 and inverted bottlenecks of expansion 4 with ReLU6, as MobileNetV2 has
// them, over 28×28 grey images. At full scale it has 60 thousand weights; the channels are twice those of
// the pilot's description, which gives a third of that.
func (z tinySizes) inverted(classes int, seed uint64) (*nn.Network, error) {
	b := nn.NewBuilder(seed)
	conv := func(name, x string, out, k, stride int, depthwise, act bool) string {
		c := nn.Conv2D(out, k, stride)
		fan := k * k * b.Shape(x).Dimensions[3]
		if c.NoBias = true; depthwise {
			c.Groups, fan = out, k*k
		}
		c.W = nn.Plain{Init: nn.FanIn(fan, math.Sqrt2)}
		x = b.Add(name+".norm", nn.BatchNorm{}, b.Add(name, c, x))
		if act {
			x = b.Add(name+".act", nn.Clip{Lo: 0, Hi: 6}, x)
		}
		return x
	}
	x := conv("stem", b.Image("image", 28, 28, 1), z.Channels[0], 3, 2, false, true)
	for i, stride := range z.Strides {
		in, out := z.Channels[i], z.Channels[i+1]
		name := fmt.Sprintf("block.%d.", i)
		h := conv(name+"expand", x, 4*in, 1, 1, false, true)
		h = conv(name+"depthwise", h, 4*in, 3, stride, true, true)
		h = conv(name+"project", h, out, 1, 1, false, false)
		if stride == 1 && in == out {
			h = b.Add(name+"add", nn.Add, x, h)
		}
		x = h
	}
	return b.Finish(b.Add("head", nn.Dense{Out: classes}, b.Add("pool", nn.GlobalAveragePool, x)))
}

// tinyTask is a transfer task.
type tinyTask struct {
	name              string
	train, held, test *tiny.Examples
	classes           int
}

// tinyBench is what all arms of one seed share.
type tinyBench struct {
	net     *tiny.Net // int8, with the classifier of the first five classes
	bases   map[string]*tiny.Net
	tasks   []*tinyTask
	schemes map[string]tiny.Scheme
	pre     float64 // accuracy of the float network on its own classes, percent
	preInt  float64
}

// tinySets are the ways to choose what is trained, in the order of the arms.
var tinySets = []string{"classifier", "biases", "last-2", "last-4", "last-6", "last-10", "sparse-0", "sparse-1", "full"}

// TinyTraining carries an int8 network of inverted bottlenecks from five classes of Fashion-MNIST over to the other five and
// to digits: float, int8 and scaled int8 gradients, and sparse schemes found by contribution analysis beside the last
// layers and everything (arXiv:2206.15472).
func TinyTraining() lab.Experiment {
	best := func(m lab.Metrics, budget int) float64 { // of the last layers within twice a sparse scheme's memory
		limit, top := 2*m.Get(fmt.Sprintf("qas-sparse-%d", budget), "budget"), math.NaN()
		for _, set := range tinySets {
			arm := "qas-" + set
			if (set == "classifier" || set == "full" || set[:4] == "last") && m.Get(arm, "extra bytes") <= limit {
				if a := m.Get(arm, "accuracy"); !(a <= top) {
					top = a
				}
			}
		}
		return top
	}
	e := lab.Experiment{
		Method: "tiny-training",
		Title:  "An int8 network adapted to new classes within a memory budget: scaled gradients, sparse update, planned memory",
		Recipe: []tinySizes{tinySizesOf(lab.Smoke), tinySizesOf(lab.Full)},
		Claims: []lab.Claim{
			{
				ID: "C1", Text: "last 6 layers: accuracy of scaled int8 gradients less plain ones, each at its best rate", Paper: "84.3 to 88.1 % on Flowers", Unit: "points",
				Measure: lab.Difference("qas-last-6", "int8-last-6", "accuracy"), Bound: lab.AtLeast(1),
			},
			{
				ID: "C2", Text: "last 6 layers: distance of scaled int8 training from float training", Paper: "QAS matches float", Unit: "points",
				Measure: func(m lab.Metrics) float64 {
					return math.Abs(m.Get("float-last-6", "accuracy") - m.Get("qas-last-6", "accuracy"))
				},
				Bound: lab.AtMost(2),
			},
			{
				ID: "C3a", Text: "the smaller sparse scheme less the best of the last layers within twice its memory", Paper: "better at 4.5 to 7.5 times less memory", Unit: "points",
				Measure: func(m lab.Metrics) float64 { return m.Get("qas-sparse-0", "accuracy") - best(m, 0) }, Bound: lab.AtLeast(-.3),
			},
			{
				ID: "C3b", Text: "the larger sparse scheme less the best of the last layers within twice its memory", Paper: "better at 4.5 to 7.5 times less memory", Unit: "points",
				Measure: func(m lab.Metrics) float64 { return m.Get("qas-sparse-1", "accuracy") - best(m, 1) }, Bound: lab.AtLeast(-.3),
			},
			{
				ID: "C4a", Text: "the larger sparse scheme less biases alone", Paper: "biases alone saturate", Unit: "points",
				Measure: lab.Difference("qas-sparse-1", "qas-biases", "accuracy"), Bound: lab.AtLeast(.5),
			},
			{
				ID: "C4b", Text: "the larger sparse scheme less the classifier alone", Paper: "+6 points and more", Unit: "points",
				Measure: lab.Difference("qas-sparse-1", "qas-classifier", "accuracy"), Bound: lab.AtLeast(.5),
			},
			{
				ID: "C5a", Text: "planned arena: everything over the smaller sparse scheme, both with late updates", Paper: "sparse update saves 4.5 to 7.5 times the extra memory", Unit: "×",
				Measure: func(m lab.Metrics) float64 {
					return m.Get("qas-sparse-0", "full arena") / m.Get("qas-sparse-0", "late arena")
				}, Bound: lab.AtLeast(2),
			},
			{
				ID: "C5b", Text: "planned arena of the smaller sparse scheme: bytes saved by updating early", Paper: "reordering saves up to 2.4 times", Unit: "bytes",
				Measure: func(m lab.Metrics) float64 {
					return m.Get("qas-sparse-0", "late arena") - m.Get("qas-sparse-0", "arena")
				}, Bound: lab.AtLeast(1),
			},
		},
	}
	arm := func(kind, set string) {
		e.Arms = append(e.Arms, lab.Arm{Name: kind + "-" + set, Baseline: kind != "qas" || set[:4] != "spar", Once: kind != "qas" && set == "full", Run: func(ctx context.Context, t *lab.Trial) error {
			return tinyArm(ctx, t, kind, set)
		}})
	}
	for _, set := range tinySets {
		arm("qas", set)
	}
	for _, set := range []string{"last-6", "full"} {
		arm("float", set)
		arm("int8", set)
	}
	e.Arms = append(e.Arms, lab.Arm{Name: "mismatch", Once: true, Run: func(ctx context.Context, t *lab.Trial) error {
		b, err := tinyShared(ctx, t)
		if err != nil {
			return err
		}
		layers, err := tiny.Mismatches(ctx, b.bases["fashion"], b.tasks[0].held)
		if err != nil {
			return err
		}
		worst := [2]float64{}
		for i, l := range layers {
			t.Series("log10 weight over gradient: float", float64(i), l.Float)
			t.Series("log10 weight over gradient: int8", float64(i), l.Int8)
			t.Series("log10 weight over gradient: scaled int8", float64(i), l.Scaled)
			worst[0], worst[1] = max(worst[0], math.Abs(l.Int8-l.Float)), max(worst[1], math.Abs(l.Scaled-l.Float))
		}
		t.Record("int8: decades off, worst layer", worst[0])
		t.Record("scaled int8: decades off, worst layer", worst[1])
		return nil
	}})
	return e
}

// tinyShared pre-trains, quantises, and finds the sparse schemes, once per seed.
func tinyShared(ctx context.Context, t *lab.Trial) (*tinyBench, error) {
	v, err := t.Shared("tiny", func() (any, error) { return newTinyBench(ctx, t) })
	if err != nil {
		return nil, err
	}
	return v.(*tinyBench), nil
}

func newTinyBench(ctx context.Context, t *lab.Trial) (*tinyBench, error) {
	z := tinySizesOf(t.Scale)
	all, err := data.FashionMNIST(ctx, true)
	if err != nil {
		return nil, err
	}
	tests, err := data.FashionMNIST(ctx, false)
	if err != nil {
		return nil, err
	}
	first, err := someClasses(all, 0, 5, 6000)
	if err != nil {
		return nil, err
	}
	net, err := t.Network(struct {
		Tiny tinySizes
		Seed uint64
	}{tinySizes{Network: z.Network, Channels: z.Channels, Strides: z.Strides, Pretraining: z.Pretraining}, t.Seed},
		func() (*nn.Network, error) { return z.inverted(5, t.Seed) },
		func(net *nn.Network) error { return pretrain(ctx, t, z, net, first) })
	if err != nil {
		return nil, err
	}
	b := &tinyBench{bases: map[string]*tiny.Net{}, schemes: map[string]tiny.Scheme{}}
	x, err := first.Float32(rng.New(t.Seed, "calibration").Perm(first.N)[:z.Calibration])
	if err != nil {
		return nil, err
	}
	if b.net, err = tiny.Quantize(ctx, t.Backend, net, compress.Examples{x}, tiny.QuantizeOptions{}); err != nil {
		return nil, err
	}
	known, err := someClasses(tests, 0, 5, 1000)
	if err != nil {
		return nil, err
	}
	known = known.First(min(z.Test, known.N))
	images := recipe.Images{}
	if _, b.pre, err = images.Evaluate(t, net, &recipe.Sets{Test: known, Std: 1}); err != nil {
		return nil, err
	}
	q, err := tiny.Evaluate(ctx, b.net, examplesOf(known, data.Range(known.N)))
	if err != nil {
		return nil, err
	}
	b.preInt = 100 * q.Accuracy

	other, err := someClasses(all, 5, 10, z.PerClass)
	if err != nil {
		return nil, err
	}
	otherTest, err := someClasses(tests, 5, 10, 1000)
	if err != nil {
		return nil, err
	}
	digits, digitsTest, err := largeDigits(ctx, z.Digits, t.Seed)
	if err != nil {
		return nil, err
	}
	for _, d := range []struct {
		name        string
		train, test *data.Images
	}{{"fashion", other, otherTest}, {"digits", digits, digitsTest}} {
		task := &tinyTask{name: d.name, classes: len(d.train.ClassNames)}
		order := rng.New(t.Seed, "tiny:"+d.name).Perm(d.train.N)
		var train, held []int
		for i, k := range order {
			if i%z.Held == 0 {
				held = append(held, k)
			} else {
				train = append(train, k)
			}
		}
		task.train, task.held = examplesOf(d.train, train), examplesOf(d.train, held)
		task.test = examplesOf(d.test, rng.New(t.Seed, "tiny:test").Perm(d.test.N)[:min(z.Test, d.test.N)])
		b.tasks = append(b.tasks, task)
		for kind, float := range map[string]bool{"": false, "float:": true} {
			base, err := b.net.WithClasses(task.classes)
			if err != nil {
				return nil, err
			}
			base.Float = float
			b.bases[kind+d.name] = base
		}
	}
	for _, set := range tinySets {
		var s tiny.Scheme
		k := 0
		switch {
		case set == "biases":
			s = tiny.Scheme{Biases: len(b.net.Convs())}
		case set == "full":
			s = tiny.Everything(b.net)
		case set[:4] == "last":
			if _, err := fmt.Sscanf(set, "last-%d", &k); err != nil {
				return nil, err
			}
			s = tiny.LastLayers(b.net, min(k, len(b.net.Convs())))
		}
		b.schemes[set] = s
	}
	return b, b.analyse(ctx, t, z)
}

// analyse measures contributions on the first task, and takes the best scheme for every budget.
func (b *tinyBench) analyse(ctx context.Context, t *lab.Trial, z tinySizes) error {
	task, base := b.tasks[0], b.bases["fashion"]
	var c *tiny.Contrib
	var err error
	if z.Analysis == 0 {
		c, err = tiny.GradientContribution(ctx, base, task.held, z.Ratios)
	} else {
		part := task.train.Pick(data.Range(min(z.Analysis, task.train.Len())))
		c, err = tiny.Contribution(ctx, base, part, task.held, tiny.ContribOptions{Ratios: z.Ratios, Train: tiny.TrainOptions{Epochs: 1, LR: .1}, Progress: t.Progress})
		part.Forget()
	}
	if err != nil {
		return err
	}
	for i, budget := range z.Budgets {
		x, err := tiny.Search(ctx, c, budget, tiny.SearchOptions{Seed: t.Seed})
		if err != nil {
			return err
		}
		exact, err := tiny.Exact(c, float64(budget))
		if err != nil {
			return err
		}
		if x.Gain < exact.Gain {
			t.Logf("the evolution finds gain %.4f within %d bytes, the best is %.4f", x.Gain, budget, exact.Gain)
		}
		s := exact.Scheme(c.Ratios)
		b.schemes[fmt.Sprintf("sparse-%d", i)] = s
		t.Logf("%d bytes: biases of the last %d layers, weights %v", budget, s.Biases, s.Weights)
	}
	for k, g := range c.GainBias {
		t.Series("gain of the last biases", float64(k), 100*g)
	}
	for l, g := range c.GainWeight {
		t.Series("gain of a layer's weights", float64(l), 100*slices.Max(g))
	}
	return nil
}

func pretrain(ctx context.Context, t *lab.Trial, z tinySizes, net *nn.Network, m *data.Images) error {
	order, err := data.NewBatcher(m.N, z.Pretraining.Batch, t.Seed)
	if err != nil {
		return err
	}
	return z.Pretraining.Fit(ctx, t, net, learn.Classifier(net), func(step int) ([]*tensors.Tensor, error) {
		idx := order.At(step)
		x := m.Floats(idx, nil)
		flip := rng.New(t.Seed, fmt.Sprintf("tiny:flip:%d", step))
		for i := range idx {
			if flip.IntN(2) == 1 {
				mirror(x[i*m.H*m.W:(i+1)*m.H*m.W], m.W, 1)
			}
		}
		labels, err := m.LabelsTensor(idx)
		return []*tensors.Tensor{tensors.FromFlatDataAndDimensions(x, len(idx), m.H, m.W, m.C), labels}, err
	}, nil)
}

// someClasses are the first so many pictures of each class from (inclusive) to (exclusive), in the set's order, with labels
// from 0.
func someClasses(m *data.Images, from, to, each int) (*data.Images, error) {
	var idx []int
	count := make([]int, to)
	for i, l := range m.Labels {
		if int(l) >= from && int(l) < to && count[l] < each {
			count[l]++
			idx = append(idx, i)
		}
	}
	s, err := m.Subset(idx)
	if err != nil {
		return nil, err
	}
	s.Labels = slices.Clone(s.Labels)
	for i := range s.Labels {
		s.Labels[i] -= int32(from)
	}
	s.ClassNames = m.ClassNames[from:to]
	return s, nil
}

func examplesOf(m *data.Images, idx []int) *tiny.Examples {
	e := &tiny.Examples{}
	size := shapes.Make(dtypes.Float32, m.H, m.W, m.C).Size()
	x := m.Floats(idx, nil)
	for i, k := range idx {
		e.X, e.Labels = append(e.X, x[i*size:(i+1)*size]), append(e.Labels, int(m.Labels[k]))
	}
	return e
}

// tinyArm trains one update set on both tasks, with the rate that does best on held-out cases.
func tinyArm(ctx context.Context, t *lab.Trial, kind, set string) error {
	b, err := tinyShared(ctx, t)
	if err != nil {
		return err
	}
	z := tinySizesOf(t.Scale)
	s := b.schemes[set]
	rates := z.Rates
	o := tiny.TrainOptions{CompileOptions: tiny.CompileOptions{NoQAS: kind == "int8"}, Order: t.Seed}
	switch {
	case kind == "int8":
		rates = z.Plain
	case set == "classifier" || set == "biases":
		rates = z.Few
	}
	mean := 0.
	for i, task := range b.tasks {
		base := b.bases[task.name]
		if kind == "float" {
			base = b.bases["float:"+task.name]
		}
		top, rate := math.Inf(-1), 0.
		var q tiny.Quality
		for k, lr := range rates {
			o.LR, o.Epochs = lr, z.Epochs
			r, err := tiny.Train(ctx, base, s, task.train, task.held, o)
			if err != nil && !errors.Is(err, tiny.ErrDiverged) {
				return err
			}
			if err == nil && r.Validation.Accuracy > top { // of equals the lower rate
				top, rate = r.Validation.Accuracy, lr
				if q, err = tiny.Evaluate(ctx, r.Net, task.test); err != nil {
					return err
				}
			}
			t.Progress(i*len(rates)+k+1, len(b.tasks)*len(rates))
		}
		if rate == 0 {
			t.Logf("%s: training diverges at every rate", task.name)
		}
		for _, e := range []*tiny.Examples{task.train, task.held, task.test} {
			e.Forget()
		}
		t.Record(task.name+" accuracy", 100*q.Accuracy)
		t.Record(task.name+" rate", rate)
		mean += 100 * q.Accuracy / float64(len(b.tasks))
	}
	t.Record("accuracy", mean)
	t.Record("pre-trained accuracy, float", b.pre)
	t.Record("pre-trained accuracy, int8", b.preInt)
	t.Record("extra bytes", float64(s.ExtraBytes(b.net)))
	budget := s.ExtraBytes(b.net)
	if k := 0; set[:4] == "spar" {
		if _, err := fmt.Sscanf(set, "sparse-%d", &k); err != nil {
			return err
		}
		budget = z.Budgets[k]
	}
	t.Record("budget", float64(budget))
	plan, err := tiny.MakePlan(b.bases[b.tasks[0].name], s, tiny.CompileOptions{InPlace: true})
	if err != nil {
		return err
	}
	t.Record("arena", float64(plan.Peak))
	t.Record("late arena", float64(plan.Late))
	t.Record("full arena", float64(plan.Full))
	t.Record("inference arena", float64(plan.Inference))
	t.Record("multiply-adds per step", float64(plan.MACs))
	return nil
}

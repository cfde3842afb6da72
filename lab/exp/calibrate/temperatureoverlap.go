// Package calibrate holds the experiments of adapt/calibrate.
package calibrate

import (
	"context"
	"fmt"
	"math"

	"github.com/gomlx/compute"
	"github.com/gomlx/gomlx/core/tensors"

	method "github.com/lathe-ml/lathe/adapt/calibrate"
	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/internal/metric"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/lab"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// Experiments lists the experiments of the family.
func Experiments() []lab.Experiment { return []lab.Experiment{TemperatureOverlap()} }

// training says how a perceptron is trained.
type training struct {
	Train, Calibration, Test int // cases
	Hidden                   []int
	Epochs, Batch            int
	Rate                     float64
}

type overlapSizes struct {
	Paired, Images, Gaussians training
}

func overlapSizesOf(s lab.Scale) overlapSizes {
	z := overlapSizes{
		Paired: training{1000, 400, 4000, []int{96, 96}, 80, 100, 2e-3},
		// As many epochs as plain training needs to interpolate half of the labels flipped: without that the effect is weak.
		Images:    training{8000, 1000, 10_000, []int{256, 256}, 80, 200, 1e-3},
		Gaussians: training{3600, 400, 1000, []int{96, 96}, 80, 100, 2e-3},
	}
	if s == lab.Smoke {
		z.Paired = training{300, 150, 300, []int{32, 32}, 20, 100, 2e-3}
		z.Images = training{300, 150, 300, []int{32, 32}, 10, 100, 2e-3}
		z.Gaussians = z.Paired
	}
	return z
}

// paired are the conditions of the synthetic law: the number of classes at one overlap, the overlap at most classes.
var paired = []method.Overlap{{Classes: 2, Mass: .6}, {Classes: 8, Mass: .6}, {Classes: 32, Mass: .6}, {Classes: 32, Mass: .2}, {Classes: 32, Mass: 1}}

// mixSizes are the methods: how many examples a training case combines.
var mixSizes = []struct {
	name string
	size int
}{{"erm", 1}, {"mixup", 2}, {"mixup4", 4}}

// TemperatureOverlap compares temperature scaling of plainly trained perceptrons with Mixup and d-Mixup where classes
// overlap: on a synthetic law whose exact posterior is known, on Fashion-MNIST with label noise, and on two Gaussians
// (arXiv:2306.00740, section 5).
func TemperatureOverlap() lab.Experiment {
	name := func(mix string, o method.Overlap) string { return fmt.Sprintf("%s-k%d-o%g", mix, o.Classes, o.Mass) }
	difference := func(arm, metric, other, otherMetric string) func(lab.Metrics) float64 {
		return func(m lab.Metrics) float64 { return m.Get(arm, metric) - m.Get(other, otherMetric) }
	}
	ratio := func(arm, metric, other, otherMetric string) func(lab.Metrics) float64 {
		return func(m lab.Metrics) float64 { return m.Get(arm, metric) / m.Get(other, otherMetric) }
	}
	few, many := paired[0], paired[2]
	e := lab.Experiment{
		Method: "temperature-overlap",
		Title:  "temperature scaling against Mixup where classes overlap: paired regions, Fashion-MNIST with label noise, two Gaussians",
		Recipe: []any{overlapSizesOf(lab.Smoke), overlapSizesOf(lab.Full), paired, mixSizesRecipe(), noiseRates},
		Claims: []lab.Claim{
			{
				ID: "C1", Text: "the NLL that scaling leaves above Bayes is at least 0.1 larger with 32 classes than with 2", Paper: "excess grows like log k", Unit: "nats",
				Measure: difference(name("erm", many), "excess_scaled", name("erm", few), "excess_scaled"), Bound: lab.AtLeast(.1),
			},
			{
				ID: "C2a", Text: "32 classes: NLL of 4-Mixup without scaling is at least 0.03 below that of plain training with scaling", Paper: "d-Mixup stays bounded", Unit: "nats",
				Measure: difference(name("mixup4", many), "nll", name("erm", many), "nll_scaled"), Bound: lab.AtMost(-.03),
			},
			{
				ID: "C2b", Text: "32 classes: NLL of Mixup without scaling is at most that of plain training with scaling", Paper: "Mixup beats scaling", Unit: "nats",
				Measure: difference(name("mixup", many), "nll", name("erm", many), "nll_scaled"), Bound: lab.AtMost(0),
			},
			{
				ID: "C3a", Text: "32 classes: what scaling leaves grows from overlap 0.2 to 0.6", Paper: "excess grows with the overlap", Unit: "nats",
				Measure: difference(name("erm", many), "excess_scaled", name("erm", paired[3]), "excess_scaled"), Bound: lab.AtLeast(0),
			},
			{
				ID: "C3b", Text: "32 classes: what scaling leaves grows from overlap 0.6 to 1", Paper: "excess grows with the overlap", Unit: "nats",
				Measure: difference(name("erm", paired[4]), "excess_scaled", name("erm", many), "excess_scaled"), Bound: lab.AtLeast(0),
			},
			{
				ID: "C4a", Text: "Fashion-MNIST, half of the labels flipped, noisy test: NLL of Mixup with scaling is at most plain training's", Paper: "clearly better", Unit: "nats",
				Measure: difference("mixup-noise0.5", "nll_scaled", "erm-noise0.5", "nll_scaled"), Bound: lab.AtMost(0),
			},
			{
				ID: "C4b", Text: "the same for the average calibration error (ACE)", Paper: "clearly better",
				Measure: difference("mixup-noise0.5", "ace_scaled", "erm-noise0.5", "ace_scaled"), Bound: lab.AtMost(0),
			},
			{
				ID: "C4c", Text: "without label noise the two differ by less than 0.05 in NLL", Paper: "without overlap, scaling suffices", Unit: "nats",
				Measure: func(m lab.Metrics) float64 {
					return math.Abs(m.Get("mixup-noise0", "nll_scaled") - m.Get("erm-noise0", "nll_scaled"))
				}, Bound: lab.AtMost(.05),
			},
			{
				ID: "C5a", Text: "half of the labels flipped: ECE of Mixup without scaling is at most 0.6 of plain training's", Paper: "clearly better, raw", Unit: "×",
				Measure: ratio("mixup-noise0.5", "ece", "erm-noise0.5", "ece"), Bound: lab.AtMost(.6),
			},
			{
				ID: "C5b", Text: "32 classes: ECE of Mixup without scaling is at most 0.6 of plain training's", Paper: "clearly better, raw", Unit: "×",
				Measure: ratio(name("mixup", many), "ece", name("erm", many), "ece"), Bound: lab.AtMost(.6),
			},
			{
				ID: "C6a", Text: "plain training: at half the mean distance of neighbours the logit gap is at least half of that at the training points", Paper: "gaps persist around training points", Unit: "×",
				Measure: ratio(name("erm", many), "gap_between", name("erm", many), "gap_at"), Bound: lab.AtLeast(.5),
			},
			{
				ID: "C6b", Text: "the gap there is smaller with 4-Mixup", Paper: "Mixup constrains the network between training points",
				Measure: difference(name("mixup4", many), "gap_between", name("erm", many), "gap_between"), Bound: lab.AtMost(0),
			},
		},
	}
	for _, o := range paired {
		for _, mix := range mixSizes {
			e.Arms = append(e.Arms, lab.Arm{
				Name: name(mix.name, o), Baseline: mix.size == 1,
				Run: func(ctx context.Context, t *lab.Trial) error { return pairedArm(ctx, t, o, mix.size) },
			})
		}
	}
	for _, eta := range noiseRates {
		for _, mix := range mixSizes {
			e.Arms = append(e.Arms, lab.Arm{
				Name: fmt.Sprintf("%s-noise%g", mix.name, eta), Baseline: mix.size == 1,
				Run: func(ctx context.Context, t *lab.Trial) error { return imagesArm(ctx, t, eta, mix.size) },
			})
		}
	}
	for _, mix := range mixSizes {
		e.Arms = append(e.Arms, lab.Arm{
			Name: mix.name + "-gaussians", Baseline: mix.size == 1,
			Run: func(ctx context.Context, t *lab.Trial) error { return gaussiansArm(ctx, t, mix.size) },
		})
	}
	return e
}

func mixSizesRecipe() (sizes []int) {
	for _, m := range mixSizes {
		sizes = append(sizes, m.size)
	}
	return sizes
}

var noiseRates = []float64{0, .25, .5}

// cases are points [n, dim] and their labels.
type cases struct {
	x []float32
	y []int32
}

func (c cases) labels() []int {
	out := make([]int, len(c.y))
	for i, y := range c.y {
		out[i] = int(y)
	}
	return out
}

// problem is a classification problem in three parts.
type problem struct {
	dim, classes             int
	train, calibration, test cases
	bayes                    float64 // NLL of the exact posterior on the test cases; of label noise alone, its entropy
	clean                    []int32 // labels of the test cases before the noise; nil where there is a law instead
}

func pairedArm(ctx context.Context, t *lab.Trial, o method.Overlap, mix int) error {
	z := overlapSizesOf(t.Scale).Paired
	v, err := t.Shared(fmt.Sprintf("paired-%d-%g", o.Classes, o.Mass), func() (any, error) {
		law, err := method.NewPairedOverlap(method.PairedOverlap{Overlap: o}, t.Seed)
		if err != nil {
			return nil, err
		}
		return draw(law.Dim, o.Classes, z, t.Seed, law.Sample, law.Posterior)
	})
	if err != nil {
		return err
	}
	p := v.(*problem)
	net, err := train(ctx, t, p, z, mix)
	if err != nil {
		return err
	}
	if err := measure(t, net, p); err != nil {
		return err
	}
	return probe(t, net, p)
}

func gaussiansArm(ctx context.Context, t *lab.Trial, mix int) error {
	z := overlapSizesOf(t.Scale).Gaussians
	v, err := t.Shared("gaussians", func() (any, error) {
		law := method.TwoGaussians{Dim: 300, Delta: .1}
		return draw(law.Dim, 2, z, t.Seed, law.Sample, law.Posterior)
	})
	if err != nil {
		return err
	}
	p := v.(*problem)
	net, err := train(ctx, t, p, z, mix)
	if err != nil {
		return err
	}
	return measure(t, net, p)
}

// draw samples the three parts of a problem from a law and measures the law's posterior on the test cases.
func draw(dim, classes int, z training, seed uint64, sample func(*rng.Rand, int) ([]float32, []int32), posterior func([]float32) ([]float64, error)) (*problem, error) {
	p := &problem{dim: dim, classes: classes}
	for _, part := range []struct {
		name string
		n    int
		to   *cases
	}{{"train", z.Train, &p.train}, {"calibration", z.Calibration, &p.calibration}, {"test", z.Test, &p.test}} {
		part.to.x, part.to.y = sample(rng.New(seed, "points/"+part.name), part.n)
	}
	exact, err := posterior(p.test.x)
	if err != nil {
		return nil, err
	}
	s, err := metric.ScoreProbabilities(exact, classes, p.test.labels())
	if err != nil {
		return nil, err
	}
	c, err := s.Calibration(metric.Bins{})
	p.bayes = c.NLL
	return p, err
}

func imagesArm(ctx context.Context, t *lab.Trial, eta float64, mix int) error {
	z := overlapSizesOf(t.Scale).Images
	v, err := t.Shared(fmt.Sprintf("images-%g", eta), func() (any, error) { return images(ctx, z, eta, t.Seed) })
	if err != nil {
		return err
	}
	p := v.(*problem)
	net, err := train(ctx, t, p, z, mix)
	if err != nil {
		return err
	}
	return measure(t, net, p)
}

// images are Fashion-MNIST with every label flipped to its class's partner with probability eta, in all three parts.
func images(ctx context.Context, z training, eta float64, seed uint64) (*problem, error) {
	all, err := data.FashionMNIST(ctx, true)
	if err != nil {
		return nil, err
	}
	test, err := data.FashionMNIST(ctx, false)
	if err != nil {
		return nil, err
	}
	pick, _, err := all.Stratified(z.Train+z.Calibration, seed)
	if err != nil {
		return nil, err
	}
	if all, err = all.Subset(pick); err != nil {
		return nil, err
	}
	trainIdx, calibrationIdx, err := all.Stratified(z.Train, seed)
	if err != nil {
		return nil, err
	}
	p := &problem{dim: all.H * all.W * all.C, classes: all.Classes()}
	mean, std := all.Moments()
	part := func(name string, m *data.Images, idx []int) (c cases, clean []int32, err error) {
		c.x = m.Floats(idx, nil)
		for i := range c.x {
			c.x[i] = (c.x[i] - mean) / std
		}
		for _, i := range idx {
			clean = append(clean, m.Labels[i])
		}
		c.y, _, err = data.PartnerNoise(clean, p.classes, eta, seed, name)
		return c, clean, err
	}
	if p.train, _, err = part("train", all, trainIdx); err != nil {
		return nil, err
	}
	if p.calibration, _, err = part("calibration", all, calibrationIdx); err != nil {
		return nil, err
	}
	test = test.First(z.Test)
	if p.test, p.clean, err = part("test", test, data.Range(test.N)); err != nil {
		return nil, err
	}
	// Of a classifier that never errs on the class before the noise.
	for _, q := range []float64{eta, 1 - eta} {
		if q > 0 {
			p.bayes -= q * math.Log(q)
		}
	}
	return p, nil
}

// train fits a perceptron to combinations of mix examples; 1 is plain training.
func train(ctx context.Context, t *lab.Trial, p *problem, z training, mix int) (*nn.Network, error) {
	net, err := zoo.MLP(zoo.MLPOptions{Inputs: p.dim, Hidden: z.Hidden, Classes: p.classes, Seed: t.Seed})
	if err != nil {
		return nil, err
	}
	tr, err := learn.NewTrainer(t.Backend, &net.Params, learn.MixupClassifier(net), learn.Options{LR: z.Rate, Seed: t.Seed})
	if err != nil {
		return nil, err
	}
	defer tr.Finalize()
	order, err := data.NewBatcher(len(p.train.y), z.Batch, t.Seed)
	if err != nil {
		return nil, err
	}
	steps := z.Epochs * order.StepsPerEpoch()
	_, err = tr.Fit(ctx, learn.FitOptions{
		Steps: steps,
		Batch: func(step int) ([]*tensors.Tensor, error) {
			idx := order.At(step)
			x, y := make([]float32, 0, len(idx)*p.dim), make([]int32, 0, len(idx))
			for _, i := range idx {
				x = append(x, p.train.x[i*p.dim:(i+1)*p.dim]...)
				y = append(y, p.train.y[i])
			}
			batch := []*tensors.Tensor{tensors.FromFlatDataAndDimensions(x, len(idx), p.dim), tensors.FromFlatDataAndDimensions(y, len(idx))}
			if mix == 1 {
				return batch, nil
			}
			m, err := learn.Mixup{Size: mix}.Draw(rng.New(t.Seed, fmt.Sprintf("mixup/%d", step)), len(idx))
			return append(batch, m.Tensors()...), err
		},
		Progress: func(done, total int, _ learn.Info) { t.Progress(done, total) },
	})
	return net, err
}

// logitsOf returns the network as a function of points.
func logitsOf(b compute.Backend, net *nn.Network, dim int) (f func(x []float32) ([]float32, error), done func(), err error) {
	r, err := nn.NewRunner(b, net, nn.RunOptions{})
	if err != nil {
		return nil, nil, err
	}
	return func(x []float32) ([]float32, error) {
		const most = 1000
		var out []float32
		for at := 0; at < len(x); at += most * dim {
			part := x[at:min(at+most*dim, len(x))]
			z, err := r.Run(tensors.FromFlatDataAndDimensions(part, len(part)/dim, dim))
			if err != nil {
				return nil, err
			}
			flat, err := tensors.CopyFlatData[float32](z[0])
			if err != nil {
				return nil, err
			}
			out = append(out, flat...)
		}
		return out, nil
	}, r.Finalize, nil
}

// measure records the calibration figures as the network predicts, and after a temperature fitted on the calibration
// cases, on test cases of the training law. Where there is label noise, it also records them on the labels before it,
// which mixes calibration with robustness.
func measure(t *lab.Trial, net *nn.Network, p *problem) error {
	logits, done, err := logitsOf(t.Backend, net, p.dim)
	if err != nil {
		return err
	}
	defer done()
	onTrain, err := logits(p.train.x)
	if err != nil {
		return err
	}
	accuracy, err := metric.Accuracy(onTrain, p.classes, p.train.labels())
	if err != nil {
		return err
	}
	t.Record("train_accuracy", 100*accuracy)
	z, err := logits(p.calibration.x)
	if err != nil {
		return err
	}
	fit, err := method.FitTemperature(z, p.classes, p.calibration.labels())
	if err != nil {
		return err
	}
	released, err := method.FitRelease(z, p.classes, p.calibration.labels())
	if err != nil {
		return err
	}
	// What a user who has the calibration cases alone would be told.
	diagnosis, err := method.Diagnose(z, p.classes, p.calibration.labels(), fit.T)
	if err != nil {
		return err
	}
	if z, err = logits(p.test.x); err != nil {
		return err
	}
	oracle, err := method.FitTemperature(z, p.classes, p.test.labels())
	if err != nil {
		return err
	}
	record := func(labels []int, temperature float64, prefix, suffix string) (metric.Calibration, error) {
		s, err := metric.ScoreLogits(z, p.classes, labels, temperature)
		if err != nil {
			return metric.Calibration{}, err
		}
		c, err := s.Calibration(metric.Bins{})
		if err != nil {
			return c, err
		}
		for _, m := range []struct {
			name  string
			value float64
		}{{"nll", c.NLL}, {"ece", c.ECE}, {"mce", c.MCE}, {"ace", c.ACE}, {"adaptive_ece", c.AdaptiveECE}, {"brier", c.Brier}} {
			t.Record(prefix+m.name+suffix, m.value)
		}
		return c, nil
	}
	raw, err := record(p.test.labels(), 1, "", "")
	if err != nil {
		return err
	}
	scaled, err := record(p.test.labels(), fit.T, "", "_scaled")
	if err != nil {
		return err
	}
	t.Record("test_accuracy", 100*raw.Accuracy)
	t.Record("temperature", fit.T)
	t.Record("temperature_released_fit", released.T)
	if p.clean == nil {
		t.Record("nll_bayes", p.bayes)
		t.Record("excess", raw.NLL-p.bayes)
		t.Record("excess_scaled", scaled.NLL-p.bayes)
	} else { // nobody knows the true classes' posterior: the least that the noise alone allows
		t.Record("nll_label_noise", p.bayes)
	}
	t.Record("nll_oracle_scaled", oracle.NLLAfter)
	t.Record("diagnosed_gain", diagnosis.Gain)
	t.Record("diagnosed_partners", diagnosis.Partners)
	diagram := func(name string, c metric.Calibration) {
		for _, b := range c.Bins {
			if b.Count > 0 {
				t.Series(name, b.Confidence, b.Accuracy)
			}
		}
	}
	diagram("accuracy over confidence", raw)
	diagram("accuracy over confidence, scaled", scaled)
	if p.clean == nil {
		return nil
	}
	clean := cases{y: p.clean}.labels()
	if _, err = record(clean, 1, "clean_", ""); err != nil {
		return err
	}
	c, err := record(clean, fit.T, "clean_", "_scaled")
	t.Record("clean_accuracy", 100*c.Accuracy)
	return err
}

// probe records how the logit gap decays around training points.
func probe(t *lab.Trial, net *nn.Network, p *problem) error {
	logits, done, err := logitsOf(t.Backend, net, p.dim)
	if err != nil {
		return err
	}
	defer done()
	near, err := method.NearestNeighbourDistance(p.train.x, p.dim)
	if err != nil {
		return err
	}
	at := func(radii []float64) ([]method.GapPoint, error) {
		return method.LogitGapProbe{Radii: radii, Seed: t.Seed}.Measure(p.train.x, p.dim, p.train.labels(), p.classes, logits)
	}
	gaps, err := at([]float64{0, near / 2})
	if err != nil {
		return err
	}
	t.Record("gap_at", gaps[0].Gap)
	t.Record("gap_between", gaps[1].Gap)
	t.Record("neighbour_distance", near)
	curve, err := at(nil)
	for _, g := range curve {
		t.Series("logit gap over radius", g.Radius, g.Gap)
	}
	return err
}

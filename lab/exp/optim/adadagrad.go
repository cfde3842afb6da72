// Package optim holds the experiments of learn/optim and learn/batchsize.
package optim

import (
	"context"
	"fmt"
	"math"
	"sync"
	"time"

	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/internal/stat"
	"github.com/lathe-ml/lathe/lab"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/learn/batchsize"
	method "github.com/lathe-ml/lathe/learn/optim"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// Experiments lists the experiments of the family.
func Experiments() []lab.Experiment { return []lab.Experiment{AdAdaGrad()} }

// adadagradSizes are the sizes of the experiment at a scale.
type adadagradSizes struct {
	Train, Validation, Test int // pictures
	Budget                  int // training cases of every arm
	Start, Max              int // batches
	Hidden                  int // of the perceptron
	AdaGradRates, NormRates []float64
	SelectionSeed           uint64
	ConvexCases, ConvexStep int // of the convergence part
	ConvexEvery             int // steps between full gradients
	Checks                  int // comparisons of the variance estimates
}

func adadagradSizesOf(s lab.Scale) adadagradSizes {
	z := adadagradSizes{
		Train: 54_000, Validation: 6_000, Test: 10_000, Budget: 360_000, Start: 16, Max: 8192, Hidden: 128,
		AdaGradRates: []float64{.02, .05, .1}, NormRates: []float64{.3, 1, 3}, ConvexCases: 5000, ConvexStep: 2000, ConvexEvery: 10, Checks: 60,
	}
	if s == lab.Smoke {
		z.Train, z.Validation, z.Test, z.Budget, z.Max, z.Hidden = 1_600, 400, 400, 3_200, 128, 16
		z.AdaGradRates, z.NormRates = z.AdaGradRates[:1], z.NormRates[:1]
		z.ConvexCases, z.ConvexStep, z.Checks = 200, 60, 4
	}
	return z
}

// adadagradModels are the two models: softmax regression, which is convex, and a perceptron.
var adadagradModels = []string{"softmax", "mlp"}

// adadagradEtas are the thresholds of the norm test.
var adadagradEtas = []float64{.25, .5, .9}

// sizeRule is how an arm chooses its batches, and by what it updates.
type sizeRule struct {
	constant int // batch; 0: adaptive
	test     batchsize.Test
	joint    bool // AdaGradNorm instead of AdaGrad
	gentle   bool // a test every 100 steps, growth of at most 1.5
	ramp     bool // no test, but the sizes of the norm test's run at the middle threshold on a line
}

// AdAdaGrad compares AdaGrad at constant batch sizes with batches that grow by a variance test of the gradient
// (arXiv:2402.11215), on softmax regression and a perceptron at one budget of cases.
func AdAdaGrad() lab.Experiment {
	e := lab.Experiment{
		Method: "adadagrad",
		Title:  "softmax regression and a perceptron on Fashion-MNIST at one budget of cases: constant, adaptive and ramped batches",
		Recipe: []adadagradSizes{adadagradSizesOf(lab.Smoke), adadagradSizesOf(lab.Full)},
		Claims: []lab.Claim{
			{
				ID: "C1a", Text: "norm test (best threshold by validation): at least the test accuracy of batch 16 less 0.7 points, in the worse of the two models", Paper: "fewer steps than small batches", Unit: "points",
				Measure: worst(func(m lab.Metrics, model string) float64 {
					return m.Get(bestEta(m, model), model+"_accuracy") - m.Get("constant-16", model+"_accuracy")
				}), Bound: lab.AtLeast(-.7),
			},
			{
				ID: "C1b", Text: "and it takes at most half of the steps of batch 16, in the worse of the two models", Paper: "fewer steps than small batches", Unit: "×",
				Measure: func(m lab.Metrics) float64 {
					return -worst(func(m lab.Metrics, model string) float64 {
						return -m.Get(bestEta(m, model), model+"_steps") / m.Get("constant-16", model+"_steps")
					})(m)
				}, Bound: lab.AtMost(.5),
			},
			{
				ID: "C2", Text: "norm test (best threshold by validation): 0.5 points above batch 4096 after as many cases, in the worse of the two models", Paper: "generalises better than large constant batches", Unit: "points",
				Measure: worst(func(m lab.Metrics, model string) float64 {
					return m.Get(bestEta(m, model), model+"_accuracy") - m.Get("constant-4096", model+"_accuracy")
				}), Bound: lab.AtLeast(.5),
			},
			{
				ID: "C3a", Text: "the last batch is at least 8 times the first, for every threshold and model", Unit: "×",
				Measure: worst(func(m lab.Metrics, model string) float64 {
					least := math.Inf(1)
					for _, eta := range adadagradEtas {
						least = min(least, m.Get(normArm(eta), model+"_final_batch")/m.Get(normArm(eta), model+"_first_batch"))
					}
					return least
				}), Bound: lab.AtLeast(8),
			},
			{
				ID: "C3b", Text: "the mean batch falls as the threshold rises (0.25, 0.5, 0.9): the smallest ratio of neighbours, over both models", Unit: "×",
				Measure: worst(func(m lab.Metrics, model string) float64 {
					least := math.Inf(1)
					for i, eta := range adadagradEtas[1:] {
						least = min(least, m.Get(normArm(adadagradEtas[i]), model+"_mean_batch")/m.Get(normArm(eta), model+"_mean_batch"))
					}
					return least
				}), Bound: lab.AtLeast(1),
			},
			{
				ID: "C4a", Text: "softmax regression, AdaGradNorm with the norm test: log-log slope of the smallest squared full gradient against the steps", Paper: "O(1/K)", Unit: "",
				Measure: func(m lab.Metrics) float64 { return m.Get("convergence-adaptive", "slope") }, Bound: lab.AtMost(-.8),
			},
			{
				ID: "C4b", Text: "that slope less the one at constant batch 16", Paper: "O(1/K) against O(1/√K)", Unit: "",
				Measure: func(m lab.Metrics) float64 {
					return m.Get("convergence-adaptive", "slope") - m.Get("convergence-16", "slope")
				}, Bound: lab.AtMost(-.2),
			},
			{
				ID: "C5", Text: "exact and grouped variance (16 groups) of the same batches differ by at most 25 % in the median over the training", Unit: "%",
				Measure: func(m lab.Metrics) float64 { return m.Get("variance", "median_difference") }, Bound: lab.AtMost(25),
			},
		},
	}
	add := func(name string, baseline bool, rule sizeRule) {
		e.Arms = append(e.Arms, lab.Arm{Name: name, Baseline: baseline, Run: func(ctx context.Context, t *lab.Trial) error {
			for i, model := range adadagradModels {
				r, err := measured(ctx, t, name, model, rule, t.Seed)
				if err != nil {
					return err
				}
				r.record(t, model)
				t.Progress(i+1, len(adadagradModels))
			}
			return nil
		}})
	}
	for _, b := range []int{16, 256, 4096} {
		add(fmt.Sprintf("constant-%d", b), true, sizeRule{constant: b})
	}
	for _, eta := range adadagradEtas {
		add(normArm(eta), false, sizeRule{test: batchsize.NormTest{Eta: eta}})
	}
	add("coordinate-0.5-q0.9", false, sizeRule{test: batchsize.CoordinateTest{Eta: .5, Quantile: .9}})
	add("adagradnorm-0.5", false, sizeRule{test: batchsize.NormTest{Eta: .5}, joint: true})
	add("norm-0.5-gentle", false, sizeRule{test: batchsize.NormTest{Eta: .5}, gentle: true})
	add("ramp", true, sizeRule{ramp: true})
	e.Arms = append(
		e.Arms,
		lab.Arm{Name: "convergence-16", Baseline: true, Run: func(ctx context.Context, t *lab.Trial) error { return convergence(ctx, t, nil) }},
		lab.Arm{Name: "convergence-adaptive", Run: func(ctx context.Context, t *lab.Trial) error {
			return convergence(ctx, t, batchsize.NormTest{Eta: .5})
		}},
		lab.Arm{Name: "variance", Run: varianceEstimates},
	)
	return e
}

func normArm(eta float64) string { return fmt.Sprintf("norm-%g", eta) }

// bestEta is the arm of the threshold with the highest validation accuracy.
func bestEta(m lab.Metrics, model string) string {
	best := normArm(adadagradEtas[0])
	for _, eta := range adadagradEtas[1:] {
		if m.Get(normArm(eta), model+"_validation_accuracy") > m.Get(best, model+"_validation_accuracy") {
			best = normArm(eta)
		}
	}
	return best
}

// worst is the smallest value over the models, NaN if one of them is.
func worst(f func(m lab.Metrics, model string) float64) func(lab.Metrics) float64 {
	return func(m lab.Metrics) float64 {
		least := math.Inf(1)
		for _, model := range adadagradModels {
			least = min(least, f(m, model))
		}
		return least
	}
}

// linearRamp is a schedule of sizes that starts at first, ends at last and has the given mean over the steps: it rises on a
// line, after a while at first or before a while at last.
func linearRamp(first, last int, mean float64, budget int) func(samples int) int {
	a, b := float64(first), float64(last)
	steps := float64(budget) / mean
	// The line takes the share s of the steps; the rest is spent at first (mean below the middle) or at last.
	middle := (a + b) / 2
	hold, s := a, 1.
	if b > a {
		if mean > middle {
			hold = b
		}
		s = min(1, (mean-hold)/(middle-hold))
	}
	line := s * steps
	return func(samples int) int {
		x := float64(samples)
		if hold == a && s < 1 {
			if x -= a * (steps - line); x <= 0 {
				return first
			}
		}
		// on the line after k steps: x = a·k + (b−a)k²/(2·line)
		slope := (b - a) / max(line, 1)
		k := x / a
		if slope > 0 {
			k = (-a + math.Sqrt(a*a+2*slope*x)) / slope
		}
		return int(math.Round(min(b, a+slope*k)))
	}
}

// sets are the pictures of a seed.
type sets struct{ train, validation, test *data.Images }

func pictures(ctx context.Context, t *lab.Trial, seed uint64) (sets, error) {
	v, err := t.Shared(fmt.Sprintf("pictures:%d", seed), func() (any, error) {
		z := adadagradSizesOf(t.Scale)
		var s sets
		all, err := data.FashionMNIST(ctx, true)
		if err != nil {
			return nil, err
		}
		if s.test, err = data.FashionMNIST(ctx, false); err != nil {
			return nil, err
		}
		s.test = s.test.First(z.Test)
		drawn, rest, err := all.Stratified(z.Train, seed)
		if err != nil {
			return nil, err
		}
		if s.train, err = all.Subset(drawn); err != nil {
			return nil, err
		}
		s.validation, err = all.Subset(rest[:z.Validation])
		return s, err
	})
	if err != nil {
		return sets{}, err
	}
	return v.(sets), nil
}

func newModel(t *lab.Trial, model string, seed uint64) (*nn.Network, error) {
	o := zoo.MLPOptions{Hidden: []int{adadagradSizesOf(t.Scale).Hidden}, Seed: seed}
	if model == "softmax" {
		o.Hidden = []int{}
	}
	return zoo.MLP(o)
}

// outcome is one training.
type outcome struct {
	rate, validation, accuracy, loss float64
	steps, samples, first, final     int
	mean, seconds                    float64
	made, passed, stationary         int
	batches, losses                  [][2]float64 // against training cases
}

func (r *outcome) record(t *lab.Trial, model string) {
	for _, m := range []struct {
		name  string
		value float64
	}{
		{"accuracy", r.accuracy},
		{"validation_accuracy", r.validation},
		{"steps", float64(r.steps)},
		{"first_batch", float64(r.first)},
		{"final_batch", float64(r.final)},
		{"mean_batch", r.mean},
		{"loss", r.loss},
		{"learning_rate", r.rate},
		{"seconds", r.seconds},
		{"tests", float64(r.made)},
		{"tests_passed", float64(r.passed)},
	} {
		t.Record(model+"_"+m.name, m.value)
	}
	for _, p := range r.batches {
		t.Series(model+"_batch", p[0], p[1])
	}
	for _, p := range r.losses {
		t.Series(model+"_loss", p[0], p[1])
	}
}

// rates keeps the learning rates that were selected in this process: they do not depend on the trial's seed.
var (
	ratesMu sync.Mutex
	rates   = map[string]float64{}
)

// measured trains an arm's model at the rate that does best on the validation pictures at one seed.
func measured(ctx context.Context, t *lab.Trial, arm, model string, rule sizeRule, seed uint64) (*outcome, error) {
	v, err := t.Shared(fmt.Sprintf("run:%s:%s:%d", arm, model, seed), func() (any, error) {
		z := adadagradSizesOf(t.Scale)
		key := fmt.Sprintf("%s:%s:%s:%s", t.Scale, engine.Name(t.Backend), arm, model)
		ratesMu.Lock()
		rate, known := rates[key]
		ratesMu.Unlock()
		var selected *outcome
		if !known {
			candidates := z.AdaGradRates
			if rule.joint {
				candidates = z.NormRates
			}
			for _, lr := range candidates {
				if len(candidates) == 1 {
					rate = lr
					break
				}
				r, err := trainOnce(ctx, t, model, rule, lr, z.SelectionSeed)
				if err != nil {
					return nil, err
				}
				if selected == nil || r.validation > selected.validation {
					selected, rate = r, lr
				}
			}
			ratesMu.Lock()
			rates[key] = rate
			ratesMu.Unlock()
		}
		if selected != nil && seed == z.SelectionSeed {
			return selected, nil
		}
		return trainOnce(ctx, t, model, rule, rate, seed)
	})
	if err != nil {
		return nil, err
	}
	return v.(*outcome), nil
}

func trainOnce(ctx context.Context, t *lab.Trial, model string, rule sizeRule, rate float64, seed uint64) (*outcome, error) {
	z := adadagradSizesOf(t.Scale)
	s, err := pictures(ctx, t, seed)
	if err != nil {
		return nil, err
	}
	net, err := newModel(t, model, seed)
	if err != nil {
		return nil, err
	}
	a := &batchsize.AdaptiveBatcher{Test: rule.test, N: s.train.N, Initial: z.Start, Max: min(z.Max, s.train.N), Seed: seed}
	if rule.constant > 0 {
		a.Initial = min(rule.constant, s.train.N)
		a.Max = a.Initial
	}
	if rule.gentle {
		a.TestInterval, a.MaxGrowth = 100, 1.5
	}
	if rule.ramp {
		like, err := measured(ctx, t, normArm(.5), model, sizeRule{test: batchsize.NormTest{Eta: .5}}, seed)
		if err != nil {
			return nil, err
		}
		a.Ramp, a.Ladder = linearRamp(z.Start, like.final, like.mean, z.Budget), 1.1 // rounding up must not raise the mean much
	}
	probe, err := a.Probe(net)
	if err != nil {
		return nil, err
	}
	var o method.Optimizer = method.AdaGrad{}
	if rule.joint {
		o = method.AdaGradNorm{}
	}
	loss := learn.Classifier(net)
	tr, err := learn.NewTrainer(t.Backend, &net.Params, loss, learn.Options{Optimizer: o, LR: rate, Seed: seed, Probe: probe})
	if err != nil {
		return nil, err
	}
	defer tr.Finalize()
	r := &outcome{rate: rate, first: a.Size()}
	started, window, cases := time.Now(), 0., 0
	every := max(1, z.Budget/60)
	_, err = tr.Fit(ctx, learn.FitOptions{
		Steps: math.MaxInt,
		Done:  func() bool { return a.Samples() >= z.Budget },
		Step: func(tr *learn.Trainer) (learn.Info, error) {
			before := a.Samples()
			info, err := a.Step(tr, rate, func(idx []int) ([]*tensors.Tensor, error) { return flatBatch(s.train, idx) })
			if err != nil {
				return info, err
			}
			r.final = a.Samples() - before
			window, cases = window+info.Loss*float64(r.final), cases+r.final
			if before/every != a.Samples()/every || before == 0 {
				r.batches = append(r.batches, [2]float64{float64(a.Samples()), float64(r.final)})
				r.losses = append(r.losses, [2]float64{float64(a.Samples()), window / float64(cases)})
				window, cases = 0, 0
			}
			return info, nil
		},
	})
	if err != nil {
		return nil, err
	}
	r.seconds = time.Since(started).Seconds()
	r.steps, r.samples = tr.Steps(), a.Samples()
	r.mean = float64(r.samples) / float64(r.steps)
	r.made, r.passed, r.stationary = a.Tests()
	r.loss = r.losses[len(r.losses)-1][1]
	for _, part := range []struct {
		set      *data.Images
		accuracy *float64
	}{{s.validation, &r.validation}, {s.test, &r.accuracy}} {
		_, metrics, err := learn.Evaluate(t.Backend, &net.Params, loss, flatBatches(part.set, 500))
		if err != nil {
			return nil, err
		}
		*part.accuracy = 100 * metrics["accuracy"]
	}
	return r, nil
}

func flatBatch(m *data.Images, idx []int) ([]*tensors.Tensor, error) {
	labels, err := m.LabelsTensor(idx)
	return []*tensors.Tensor{tensors.FromFlatDataAndDimensions(m.Floats(idx, nil), len(idx), m.H*m.W*m.C), labels}, err
}

func flatBatches(m *data.Images, size int) func(func(float64, []*tensors.Tensor) bool) {
	return func(yield func(float64, []*tensors.Tensor) bool) {
		for idx := range data.Batches(m.N, size) {
			batch, err := flatBatch(m, idx)
			if err != nil || !yield(float64(len(idx)), batch) {
				return
			}
		}
	}
}

// convergence follows the squared norm of the full gradient of softmax regression under AdaGradNorm at rate 1.
func convergence(ctx context.Context, t *lab.Trial, test batchsize.Test) error {
	z := adadagradSizesOf(t.Scale)
	s, err := pictures(ctx, t, t.Seed)
	if err != nil {
		return err
	}
	train := s.train.First(z.ConvexCases)
	net, err := newModel(t, "softmax", t.Seed)
	if err != nil {
		return err
	}
	a := &batchsize.AdaptiveBatcher{Test: test, N: train.N, Initial: z.Start, Max: min(z.Max, train.N), Seed: t.Seed}
	probe, err := a.Probe(net)
	if err != nil {
		return err
	}
	tr, err := learn.NewTrainer(t.Backend, &net.Params, learn.Classifier(net), learn.Options{Optimizer: method.AdaGradNorm{}, LR: 1, Seed: t.Seed, Probe: probe})
	if err != nil {
		return err
	}
	defer tr.Finalize()
	// The full gradient is that of a batch of all cases; a trainer at rate 0 on a copy reports its norm before clipping.
	full := net.Clone()
	meter, err := learn.NewTrainer(t.Backend, &full.Params, learn.Classifier(full), learn.Options{Optimizer: method.SGD{}, ClipNorm: math.MaxFloat32})
	if err != nil {
		return err
	}
	defer meter.Finalize()
	all, err := flatBatch(train, data.Range(train.N))
	if err != nil {
		return err
	}
	least := math.Inf(1)
	var k, g []float64
	final := 0
	for step := 1; step <= z.ConvexStep; step++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		final = a.Size()
		if _, err := a.Step(tr, 1, func(idx []int) ([]*tensors.Tensor, error) { return flatBatch(train, idx) }); err != nil {
			return err
		}
		if step%z.ConvexEvery != 0 {
			continue
		}
		if err := full.Params.CopyFrom(&net.Params); err != nil {
			return err
		}
		info, err := meter.StepLR(0, all...)
		if err != nil {
			return err
		}
		least = min(least, info.Norm*info.Norm)
		k, g = append(k, float64(step)), append(g, least)
		t.Series("least_squared_gradient", float64(step), least)
		t.Series("convergence_batch", float64(step), float64(final))
		t.Progress(step, z.ConvexStep)
	}
	t.Record("slope", logSlope(k, g, 20))
	t.Record("least_squared_gradient", least)
	t.Record("final_batch", float64(final))
	t.Record("samples", float64(a.Samples()))
	return nil
}

// logSlope is the least-squares slope of log y against log x over points whose x are spread evenly on the logarithmic axis.
func logSlope(x, y []float64, points int) float64 {
	var u, v []float64
	at := -1
	for i := range points {
		want := math.Log(x[0]) + float64(i)/float64(points-1)*(math.Log(x[len(x)-1])-math.Log(x[0]))
		j := max(at, 0)
		for j+1 < len(x) && math.Abs(math.Log(x[j+1])-want) <= math.Abs(math.Log(x[j])-want) {
			j++
		}
		if j == at {
			continue
		}
		at = j
		u, v = append(u, math.Log(x[j])), append(v, math.Log(y[j]))
	}
	mu, mv := stat.Mean(u), stat.Mean(v)
	up, down := 0., 0.
	for i := range u {
		up += (u[i] - mu) * (v[i] - mv)
		down += (u[i] - mu) * (u[i] - mu)
	}
	return up / down
}

// varianceEstimates trains the perceptron with the norm test and compares, on the same batches, the exact variance of
// single cases with the estimate from 16 groups.
func varianceEstimates(ctx context.Context, t *lab.Trial) error {
	const groups = 16
	z := adadagradSizesOf(t.Scale)
	s, err := pictures(ctx, t, t.Seed)
	if err != nil {
		return err
	}
	net, err := newModel(t, "mlp", t.Seed)
	if err != nil {
		return err
	}
	// doubled sizes divide into groups
	a := &batchsize.AdaptiveBatcher{Test: batchsize.NormTest{Eta: .5}, N: s.train.N, Initial: z.Start, Max: min(z.Max, s.train.N), Ladder: 2, Seed: t.Seed}
	probe, err := a.Probe(net)
	if err != nil {
		return err
	}
	loss := learn.Classifier(net)
	tr, err := learn.NewTrainer(t.Backend, &net.Params, loss, learn.Options{Optimizer: method.AdaGrad{}, LR: z.AdaGradRates[0], Seed: t.Seed, Probe: probe})
	if err != nil {
		return err
	}
	defer tr.Finalize()
	var differences []float64
	every, next := max(1, z.Budget/z.Checks), 0
	for a.Samples() < z.Budget {
		if err := ctx.Err(); err != nil {
			return err
		}
		// groups of one case are the exact estimate itself
		check := a.Samples() >= next && a.Size()%groups == 0 && a.Size() > groups
		made, _, _ := a.Tests()
		estimate := 0.
		_, err := a.Step(tr, z.AdaGradRates[0], func(idx []int) ([]*tensors.Tensor, error) {
			if check {
				c := len(idx) / groups
				var micro [][]*tensors.Tensor
				for g := range groups {
					b, err := flatBatch(s.train, idx[g*c:(g+1)*c])
					if err != nil {
						return nil, err
					}
					micro = append(micro, b)
				}
				grads, _, err := batchsize.Gradients(t.Backend, &net.Params, loss, micro)
				if err != nil {
					return nil, err
				}
				var means [][]float64
				for _, g := range grads {
					var flat []float64
					for _, x := range g {
						flat = append(flat, x...)
					}
					means = append(means, flat)
				}
				st, err := batchsize.GroupStats(means, c)
				if err != nil {
					return nil, err
				}
				estimate = st.VarL1
			}
			return flatBatch(s.train, idx)
		})
		if err != nil {
			return err
		}
		if now, _, _ := a.Tests(); check && now > made {
			exact := a.Last().VarL1
			d := 100 * math.Abs(estimate-exact) / exact
			differences = append(differences, d)
			t.Series("difference", float64(a.Samples()), d)
			t.Series("exact_variance", float64(a.Samples()), exact)
			t.Series("grouped_variance", float64(a.Samples()), estimate)
			next = a.Samples() + every
			t.Progress(min(a.Samples(), z.Budget), z.Budget)
		}
	}
	t.Record("median_difference", stat.Median(differences))
	t.Record("worst_difference", stat.Quantile(differences, 1))
	t.Record("comparisons", float64(len(differences)))
	return nil
}

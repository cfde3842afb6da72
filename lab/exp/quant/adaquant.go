package quant

import (
	"context"
	"fmt"
	"math"
	"slices"

	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	method "github.com/lathe-ml/lathe/compress/quant"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/lab"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/learn/optim"
	"github.com/lathe-ml/lathe/nn"
)

// adaSizes are how much the AdaQuant experiment does at a scale.
type adaSizes struct {
	Network     ResNet8Recipe
	Calibration int   // images
	Iterations  int   // per layer
	Curve       []int // calibration sizes of the curve, beside Calibration
	Weights     []int // bits of weights, at 4-bit activations
	TuneSteps   int   // of the end-to-end fine-tuning
	TuneBatch   int
	Budgets     []float64 // bits per weight
	Random      int       // random allocations per budget
}

func adaSizesOf(s lab.Scale) adaSizes {
	z := adaSizes{
		Network: ResNet8(s, 0), Calibration: 128, Iterations: 100, Curve: []int{8, 32, 512}, Weights: []int{4, 3, 2},
		TuneSteps: 200, TuneBatch: 50, Budgets: []float64{3, 4, 5}, Random: 10,
	}
	if s == lab.Smoke {
		z.Calibration, z.Iterations, z.Curve, z.TuneSteps, z.TuneBatch, z.Random = 32, 10, []int{8, 32}, 3, 16, 1
	}
	return z
}

// AdaQuant quantises ResNet-8 to 4, 3 and 2 bits of weights at 4-bit activations from 128 unlabelled images: by rounding,
// by layer-wise fitting, and with statistics tuning, against fine-tuning with labels; and spends budgets of bits by the
// integer programme, against random and uniform allocations.
var AdaQuant = adaQuant()

const (
	rounding   = "rtn"
	light      = "rtn-bn"
	parallel   = "parallel"
	sequential = "sequential"
	advanced   = "sequential-bn"
	fineTuned  = "fine-tuned"
)

func adaArm(how string, bits int) string { return fmt.Sprintf("%s-w%da4", how, bits) }

func adaCurve(bits, n int) string { return fmt.Sprintf("%s-w%da4-%d-images", sequential, bits, n) }

// accuracyOf is an arm's accuracy in percent.
func accuracyOf(m lab.Metrics, arm string) float64 { return m.Get(arm, "accuracy") }

func adaQuant() lab.Experiment {
	e := lab.Experiment{
		Method: "adaquant",
		Title:  "Layer-wise calibration, integer programming and statistics tuning of ResNet-8 on Fashion-MNIST, 128 unlabelled images",
		Recipe: []adaSizes{adaSizesOf(lab.Smoke), adaSizesOf(lab.Full)},
	}
	arm := func(name string, baseline bool, run func(ctx context.Context, t *lab.Trial, b *bench, z adaSizes) error) {
		e.Arms = append(e.Arms, lab.Arm{Name: name, Baseline: baseline, Run: func(ctx context.Context, t *lab.Trial) error {
			b, err := resNet8(ctx, t)
			if err != nil {
				return err
			}
			return run(ctx, t, b, adaSizesOf(t.Scale))
		}})
	}
	arm("float", true, func(ctx context.Context, t *lab.Trial, b *bench, _ adaSizes) error {
		return recordPercent(ctx, t, b, b.nets["plain"])
	})
	for _, bits := range adaSizesOf(lab.Full).Weights {
		for _, how := range []string{rounding, light, parallel, sequential, advanced} {
			arm(adaArm(how, bits), how == rounding, func(ctx context.Context, t *lab.Trial, b *bench, z adaSizes) error {
				return compressAda(ctx, t, b, z.Calibration, adaMethod(how, bits, z))
			})
		}
		arm(adaArm(fineTuned, bits), true, func(ctx context.Context, t *lab.Trial, b *bench, z adaSizes) error {
			return fineTune(ctx, t, b, z, bits)
		})
	}
	for _, bits := range []int{3, 2} {
		for _, n := range adaSizesOf(lab.Full).Curve {
			arm(adaCurve(bits, n), false, func(ctx context.Context, t *lab.Trial, b *bench, z adaSizes) error {
				return compressAda(ctx, t, b, min(n, slices.Max(z.Curve)), adaMethod(sequential, bits, z))
			})
		}
	}
	arm("mixed", false, mixedPrecision)

	e.Claims = []lab.Claim{
		{
			ID: "C1", Text: "W2A4: accuracy of sequential AdaQuant minus rounding", Paper: "4 bits from unusable to less than 1 % lost", Unit: "points",
			Measure: func(m lab.Metrics) float64 {
				return accuracyOf(m, adaArm(sequential, 2)) - accuracyOf(m, adaArm(rounding, 2))
			}, Bound: lab.AtLeast(20),
		},
		{
			ID: "C2", Text: "W2A4: accuracy of rounding with batch norm tuning (light pipeline) minus rounding", Paper: "the light pipeline is surprisingly accurate", Unit: "points",
			Measure: func(m lab.Metrics) float64 {
				return accuracyOf(m, adaArm(light, 2)) - accuracyOf(m, adaArm(rounding, 2))
			}, Bound: lab.AtLeast(15),
		},
		{
			ID: "C3", Text: "W3A4: accuracy of sequential minus parallel AdaQuant", Unit: "points",
			Measure: func(m lab.Metrics) float64 {
				return accuracyOf(m, adaArm(sequential, 3)) - accuracyOf(m, adaArm(parallel, 3))
			}, Bound: lab.AtLeast(.5),
		},
		{
			ID: "C4", Text: "W2A4: accuracy of sequential AdaQuant minus fine-tuning with the labels of the same images", Paper: "much less prone to overfitting", Unit: "points",
			Measure: func(m lab.Metrics) float64 {
				return accuracyOf(m, adaArm(sequential, 2)) - accuracyOf(m, adaArm(fineTuned, 2))
			}, Bound: lab.AtLeast(1),
		},
	}
	// over is the programme's accuracy minus another's, at the worst budget.
	over := func(layers, what string) func(m lab.Metrics) float64 {
		return func(m lab.Metrics) float64 {
			least := math.Inf(1)
			for _, b := range adaSizesOf(lab.Full).Budgets {
				least = math.Min(least, m.Get("mixed", mixedMetric(layers, b, "programme"))-m.Get("mixed", mixedMetric(layers, b, what))) // NaN stays
			}
			return least
		}
	}
	e.Claims = append(e.Claims,
		lab.Claim{
			ID: "C5a", Text: "rounded layers, budgets of 3, 4 and 5 bits per weight: accuracy of the programme's allocation minus the best of 10 random ones, the worst budget", Unit: "points",
			Measure: over(roundedLayers, "random, best"), Bound: lab.AtLeast(-.3),
		},
		lab.Claim{
			ID: "C5b", Text: "the same minus the mean of the random ones", Unit: "points",
			Measure: over(roundedLayers, "random, mean"), Bound: lab.AtLeast(3),
		},
		lab.Claim{
			ID: "C5c", Text: "C5a with layers fitted at each precision and batch norm tuning", Unit: "points",
			Measure: over(fittedLayers, "random, best"), Bound: lab.AtLeast(-.3),
		},
		lab.Claim{
			ID: "C5d", Text: "C5b with layers fitted at each precision and batch norm tuning", Unit: "points",
			Measure: over(fittedLayers, "random, mean"), Bound: lab.AtLeast(3),
		},
		lab.Claim{
			ID: "C6", Text: "W4A4: accuracy that sequential AdaQuant loses to float", Paper: "less than 1 % with 4-bit weights and activations on ResNet-50", Unit: "points",
			Measure: func(m lab.Metrics) float64 {
				return accuracyOf(m, "float") - accuracyOf(m, adaArm(sequential, 4))
			}, Bound: lab.AtMost(1),
		})
	return e
}

// adaMethod is a configuration at 4-bit activations, first and last layer at 8 bits.
func adaMethod(how string, bits int, z adaSizes) method.AdaQuant {
	q := method.AdaQuant{WeightBits: bits, ActBits: 4, Iterations: z.Iterations, Tune: method.TuneNone, SkipSiteErrors: true}
	switch how {
	case rounding:
		q.Iterations = -1
	case light:
		q.Iterations, q.Tune = -1, method.TuneBatchNorm
	case parallel:
		q.Parallel = true
	case advanced:
		q.Tune = method.TuneBatchNorm
	}
	return q
}

func compressAda(ctx context.Context, t *lab.Trial, b *bench, images int, q method.AdaQuant) error {
	calib, err := b.calibration(t.Seed, images)
	if err != nil {
		return err
	}
	q.Seed = t.Seed
	r, err := q.Compress(ctx, t.Backend, b.nets["plain"], calib)
	if err != nil {
		return err
	}
	return recordPercent(ctx, t, b, r.Network)
}

func recordPercent(ctx context.Context, t *lab.Trial, b *bench, net *nn.Network) error {
	acc, err := b.accuracy(ctx, t.Backend, net)
	if err != nil {
		return err
	}
	t.Record("accuracy", 100*acc)
	t.Record("bytes", float64(compress.Size(net)))
	return nil
}

// fineTune trains the quantised network end to end on the calibration images with their labels.
func fineTune(ctx context.Context, t *lab.Trial, b *bench, z adaSizes, bits int) error {
	idx := b.calibrationIndex(t.Seed, z.Calibration)
	calib, err := b.calibration(t.Seed, z.Calibration)
	if err != nil {
		return err
	}
	net, err := adaMethod(rounding, bits, z).Trainable(ctx, t.Backend, b.nets["plain"], calib)
	if err != nil {
		return err
	}
	tr, err := learn.NewTrainer(t.Backend, &net.Params, learn.Classifier(net), learn.Options{
		Optimizer: optim.AdamW{}, LR: 1e-3, Seed: t.Seed,
	})
	if err != nil {
		return err
	}
	defer tr.Finalize()
	draw := rng.New(t.Seed, "fine-tune")
	_, err = tr.Fit(ctx, learn.FitOptions{Steps: z.TuneSteps, Batch: func(int) ([]*tensors.Tensor, error) {
		pick := make([]int, z.TuneBatch)
		for i, k := range draw.Perm(len(idx))[:z.TuneBatch] {
			pick[i] = idx[k]
		}
		x, err := b.train.Float32(pick)
		if err != nil {
			return nil, err
		}
		labels, err := b.train.LabelsTensor(pick)
		return []*tensors.Tensor{x, labels}, err
	}})
	if err != nil {
		return err
	}
	if err := method.FreezeRanges(net); err != nil {
		return err
	}
	return recordPercent(ctx, t, b, net)
}

// The two ways in which allocations are put together.
const (
	roundedLayers = "rounded" // plainly rounded, nothing tuned: the integer programme alone
	fittedLayers  = "fitted"  // each layer fitted alone (parallel) at each precision, then batch norm tuning
)

// mixedMetric names what the mixed-precision arm records for a budget.
func mixedMetric(layers string, budget float64, what string) string {
	return fmt.Sprintf("%s, %g bits: %s", layers, budget, what)
}

// mixedPrecision spends budgets of weight bits from {8, 4, 2}, activations at 8 bits.
func mixedPrecision(ctx context.Context, t *lab.Trial, b *bench, z adaSizes) error {
	calib, err := b.calibration(t.Seed, z.Calibration)
	if err != nil {
		return err
	}
	for i, layers := range []string{roundedLayers, fittedLayers} {
		m := mixer{layers: layers, bench: b, calib: calib, choices: []int{8, 4, 2}}
		if err := m.prepare(ctx, t, z); err != nil {
			return err
		}
		for k, budget := range z.Budgets {
			if err := m.spend(ctx, t, budget, z.Random); err != nil {
				return err
			}
			t.Progress(i*len(z.Budgets)+k+1, 2*len(z.Budgets))
		}
	}
	return nil
}

// mixer puts networks of several precisions together from networks of one.
type mixer struct {
	layers  string
	bench   *bench
	calib   compress.Examples
	choices []int

	nets    map[int]*nn.Network // by bits
	targets map[string]method.BNTarget
	want    []float32 // outputs of the float network on the calibration images
	sites   []string
	size    []float64
	total   float64
	delta   [][]float64
}

// prepare quantises the network at every precision and measures what each layer loses at each.
func (m *mixer) prepare(ctx context.Context, t *lab.Trial, z adaSizes) error {
	float := m.bench.nets["plain"]
	m.nets = map[int]*nn.Network{}
	for _, k := range append([]int{5, 3}, m.choices...) { // 5 and 3: uniform allocations
		how := parallel
		if m.layers == roundedLayers {
			how = rounding
		}
		q := adaMethod(how, k, z)
		q.ActBits, q.Seed, q.Bits = 8, t.Seed, map[string]compress.Bits{}
		for _, n := range float.Sites() {
			q.Bits[n.Name] = compress.Bits{Weight: k, Act: 8}
		}
		r, err := q.Compress(ctx, t.Backend, float, m.calib)
		if err != nil {
			return err
		}
		m.nets[k] = r.Network
	}
	var err error
	if m.targets, err = method.FoldBatchNorm(float.Clone()); err != nil {
		return err
	}
	if m.want, _, err = compress.Evaluate(ctx, t.Backend, float, m.calib, 0); err != nil {
		return err
	}
	s := compress.Sensitivity{Target: m.want, Forms: compress.WeightForms(m.choices, func(net *nn.Network, site *nn.Node, bits int) error {
		return graft(net, m.nets[bits], site.Name)
	})}
	base := m.nets[m.choices[0]]
	effects, err := s.Measure(ctx, t.Backend, base, m.calib)
	if err != nil {
		return err
	}
	m.delta = method.DeltaLoss(effects, 0)
	for i, e := range effects {
		n := float64(base.Param(base.Node(e.Site), "q").Value.Shape().Size())
		m.sites, m.size, m.total = append(m.sites, e.Site), append(m.size, n), m.total+n
		for j, d := range m.delta[i] {
			t.Series(fmt.Sprintf("%s: divergence at %d bits, by layer", m.layers, m.choices[j]), float64(i), d)
		}
	}
	return nil
}

// judge returns the accuracy of an allocation in percent, and its divergence from the float network on the calibration
// images, before any tuning, in nats.
func (m *mixer) judge(ctx context.Context, t *lab.Trial, bits []int) (accuracy, kl float64, err error) {
	net := m.nets[m.choices[0]].Clone()
	for j, site := range m.sites {
		if err := graft(net, m.nets[bits[j]], site); err != nil {
			return 0, 0, err
		}
	}
	got, width, err := compress.Evaluate(ctx, t.Backend, net, m.calib, 0)
	if err != nil {
		return 0, 0, err
	}
	a, err := compress.Compare(m.want, got, m.calib.Len(), width)
	if err != nil {
		return 0, 0, err
	}
	if m.layers == fittedLayers {
		if err := method.TuneBN(ctx, t.Backend, net, m.calib, m.targets, method.BNOptions{}); err != nil {
			return 0, 0, err
		}
	}
	accuracy, err = m.bench.accuracy(ctx, t.Backend, net)
	return 100 * accuracy, a.KL, err
}

// spend judges the programme's allocation of a budget, the uniform one and random ones.
func (m *mixer) spend(ctx context.Context, t *lab.Trial, budget float64, random int) error {
	got, err := compress.AllocateBits(m.size, m.delta, m.choices, budget*m.total)
	if err != nil {
		return err
	}
	record := func(what string, v float64) { t.Record(mixedMetric(m.layers, budget, what), v) }
	acc, kl, err := m.judge(ctx, t, got.Bits)
	if err != nil {
		return err
	}
	t.Logf("%s, %g bits per weight: %v", m.layers, budget, got.Bits)
	record("programme", acc)
	record("predicted divergence", got.Loss)
	record("measured divergence", kl)
	record("bits spent", got.Size/m.total)
	if acc, _, err = m.judge(ctx, t, slices.Repeat([]int{int(budget)}, len(m.size))); err != nil {
		return err
	}
	record("uniform", acc)
	mean, best := 0., 0.
	draw := rng.New(t.Seed, fmt.Sprintf("allocations:%g", budget))
	for range random {
		if acc, _, err = m.judge(ctx, t, randomAllocation(draw, m.size, m.choices, budget*m.total)); err != nil {
			return err
		}
		mean, best = mean+acc/float64(random), max(best, acc)
	}
	record("random, mean", mean)
	record("random, best", best)
	return nil
}

// randomAllocation draws bits until they add up to between 95 and 100 % of the budget.
func randomAllocation(r *rng.Rand, size []float64, choices []int, budget float64) []int {
	bits := make([]int, len(size))
	for range 1_000_000 {
		sum := 0.
		for i := range bits {
			bits[i] = choices[r.IntN(len(choices))]
			sum += size[i] * float64(bits[i])
		}
		if sum <= budget && sum >= .95*budget {
			break
		}
	}
	return bits
}

// graft gives a site of dst the weight, bias and input grid that it has in src, a network quantised from the same
// one in the same way but for bits: it changes nodes that are there, where compress.Graft adds the other network's, which a
// measurement that starts between the quantiser and the site cannot compute.
func graft(dst, src *nn.Network, site string) error {
	to, from := dst.Node(site), src.Node(site)
	for _, pair := range [][2]*nn.Node{{to, from}, {dst.Producer(to.In[0]), src.Producer(from.In[0])}} {
		to, from := pair[0], pair[1]
		if to == nil || from == nil || to.Name != from.Name {
			return fmt.Errorf("site %q is built otherwise in the two networks", site)
		}
		to.Op = from.Op
		for local, name := range from.P {
			p := *src.Params.Get(name)
			p.Name = to.P[local]
			dst.Params.Put(&p)
		}
	}
	return nil
}

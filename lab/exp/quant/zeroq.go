package quant

import (
	"cmp"
	"context"
	"fmt"
	"image"
	"image/color"
	"math"
	"slices"
	"time"

	"github.com/gomlx/gomlx/core/tensors"
	"golang.org/x/image/draw"
	"gonum.org/v1/gonum/stat"

	"github.com/lathe-ml/lathe/compress"
	method "github.com/lathe-ml/lathe/compress/quant"
	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/lab"
	clock "github.com/lathe-ml/lathe/lab/bench"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// zeroSizes are how much the ZeroQ experiment does at a scale.
type zeroSizes struct {
	Network    ResNet8Recipe
	Images     int // distilled, drawn or taken from the training set
	Steps      int // of the distillation
	Reference  int // real images that sensitivities are compared with
	Budgets    []float64
	Random     int // random allocations per budget
	LiteSize   int // side of EfficientNet-Lite0's input
	LiteCrops  int // of photographs, that it is judged on
	LiteImages int // distilled; 0: the method's own number
	LiteSteps  int // 0: the method's own number
}

func zeroSizesOf(s lab.Scale) zeroSizes {
	z := zeroSizes{Network: ResNet8(s, 0), Images: 32, Steps: 200, Reference: 256, Budgets: []float64{3, 4, 5}, Random: 10, LiteSize: 224, LiteCrops: 240}
	if s == lab.Smoke {
		z.Images, z.Steps, z.Reference, z.Random = 16, 20, 16, 1
		z.LiteSize, z.LiteCrops, z.LiteImages, z.LiteSteps = 32, 4, 1, 1
	}
	return z
}

// Fashion-MNIST's pixels, from 0 to 1, have this mean and deviation over the training set.
const fashionMean, fashionStd = .2860, .3530

// ZeroQ quantises ResNet-8 without data: with images distilled from its batch norms, against noise and real images; then
// spends budgets of bits by what the sites lose on distilled images, against random, uniform and real-data allocations. A
// second network, EfficientNet-Lite0 with its published weights, is judged by how often it agrees with itself in float.
var ZeroQ = zeroQ()

// inRange is the arm whose images are kept between 0 and 1.
const inRange = "distilled-in-range"

// The sources that the experiment compares.
var zeroSources = []method.DataSource{method.DistilledData, method.GaussianNoise, method.UniformNoise, method.GivenData}

var zeroSettings = []struct {
	name            string
	weight, activat int
}{{"w8a8", 8, 8}, {"w8a4", 8, 4}, {"w4a4", 4, 4}}

func zeroQ() lab.Experiment {
	e := lab.Experiment{
		Method: "zeroq",
		Title:  "Quantisation without data: ResNet-8 on Fashion-MNIST and EfficientNet-Lite0, from images distilled out of their batch norms",
		Recipe: []zeroSizes{zeroSizesOf(lab.Smoke), zeroSizesOf(lab.Full)},
	}
	arm := func(name string, baseline bool, run func(ctx context.Context, t *lab.Trial, b *bench, z zeroSizes) error) {
		e.Arms = append(e.Arms, lab.Arm{Name: name, Baseline: baseline, Run: func(ctx context.Context, t *lab.Trial) error {
			b, err := resNet8(ctx, t)
			if err != nil {
				return err
			}
			return run(ctx, t, b, zeroSizesOf(t.Scale))
		}})
	}
	arm("float", true, func(ctx context.Context, t *lab.Trial, b *bench, _ zeroSizes) error {
		return recordPercent(ctx, t, b, b.nets["plain"])
	})
	for _, source := range zeroSources {
		arm(string(source), source != method.DistilledData, func(ctx context.Context, t *lab.Trial, b *bench, z zeroSizes) error {
			return zeroSource(ctx, t, b, z, source)
		})
	}
	arm(inRange, false, zeroInRange)
	arm("mixed", false, zeroMixed)
	for _, source := range []method.DataSource{method.DistilledData, method.GaussianNoise, method.GivenData} {
		e.Arms = append(e.Arms, lab.Arm{Name: liteArm(source), Baseline: source != method.DistilledData, Once: true, Run: func(ctx context.Context, t *lab.Trial) error {
			return zeroLite(ctx, t, source, 0)
		}})
	}
	e.Arms = append(e.Arms, lab.Arm{Name: liteArm(method.DistilledData) + "-6bits", Once: true, Run: func(ctx context.Context, t *lab.Trial) error {
		return zeroLite(ctx, t, method.DistilledData, 6)
	}})
	distilled, real := string(method.DistilledData), string(method.GivenData)
	claim := func(id, text, paper, unit string, bound lab.Bound, f func(m lab.Metrics) float64) {
		e.Claims = append(e.Claims, lab.Claim{ID: id, Text: text, Paper: paper, Unit: unit, Bound: bound, Measure: f})
	}
	claim("C1a", "mismatch L after distillation over L at its start", "", "%", lab.AtMost(5), func(m lab.Metrics) float64 {
		return 100 * m.Get(distilled, "mismatch") / m.Get(distilled, "mismatch at the start")
	})
	claim("C1b", "L of distilled images over L of Gaussian noise", "", "%", lab.AtMost(10), func(m lab.Metrics) float64 {
		return 100 * m.Get(distilled, "mismatch") / m.Get(string(method.GaussianNoise), "mismatch")
	})
	claim("C2", "W8A8 on distilled images: accuracy lost to float", "0.04 to 0.21 points", "points", lab.AtMost(.3), func(m lab.Metrics) float64 {
		return m.Get("float", "accuracy") - m.Get(distilled, "w8a8")
	})
	claim("C3a", "W8A4: accuracy with distilled images minus uniform noise", "", "points", lab.AtLeast(0), func(m lab.Metrics) float64 {
		return m.Get(distilled, "w8a4") - m.Get(string(method.UniformNoise), "w8a4")
	})
	claim("C3b", "W8A4: accuracy with real images minus distilled ones", "", "points", lab.AtMost(.5), func(m lab.Metrics) float64 {
		return m.Get(real, "w8a4") - m.Get(distilled, "w8a4")
	})
	claim("C4a", "correlation of the sensitivities on distilled images with those on 256 real ones", "", "", lab.AtLeast(.8), func(m lab.Metrics) float64 {
		return m.Get(distilled, "correlation")
	})
	claim("C4b", "the same minus the correlation for Gaussian noise", "", "", lab.AtLeast(0), func(m lab.Metrics) float64 {
		return m.Get(distilled, "correlation") - m.Get(string(method.GaussianNoise), "correlation")
	})
	// over is ZeroQ's accuracy minus another's, at the worst budget.
	over := func(what string) func(m lab.Metrics) float64 {
		return func(m lab.Metrics) float64 {
			least := math.Inf(1)
			for _, b := range zeroSizesOf(lab.Full).Budgets {
				least = math.Min(least, m.Get("mixed", zeroMetric(b, "zeroq"))-m.Get("mixed", zeroMetric(b, what))) // NaN stays
			}
			return least
		}
	}
	claim("C5a", "budgets of 3, 4 and 5 bits per weight, A8: accuracy of ZeroQ's allocation minus the mean of 10 random ones, the worst budget", "", "points", lab.AtLeast(3), over("random, mean"))
	claim("C5b", "the same minus the uniform allocation", "", "points", lab.AtLeast(-.5), over("uniform"))
	claim("L1", "EfficientNet-Lite0, W8A8: agreement with float on photographs, distilled minus 12 real photographs", "", "points", lab.AtLeast(-3), func(m lab.Metrics) float64 {
		return m.Get(liteArm(method.DistilledData), "same class") - m.Get(liteArm(method.GivenData), "same class")
	})
	claim("L2", "EfficientNet-Lite0, W8A8: processor seconds to distil, calibrate and quantise (120 are a minute of two cores)", "below 30 s for ResNet-50 on 8 GPUs", "s", lab.AtMost(120), func(m lab.Metrics) float64 {
		return m.Get(liteArm(method.DistilledData), "processor seconds")
	})
	return e
}

func liteArm(source method.DataSource) string { return "efficientnet-lite0-" + string(source) }

// zeroMethod is the method on ResNet-8 at a width, on given data.
func zeroMethod(t *lab.Trial, z zeroSizes, source method.DataSource) method.ZeroQ {
	q := method.ZeroQ{
		Images: z.Images, Data: source, Batch: z.Images,
		// The paper's rate, 0.5, is for inputs of deviation 1.
		Distill: method.Distill{Steps: z.Steps, LR: .5 * fashionStd, InputMean: []float64{fashionMean}, InputStd: []float64{fashionStd}, Batch: z.Images},
	}
	q.Seed = t.Seed
	return q
}

// zeroData is what a source gives, made once per seed, with the trace of the distillation.
func zeroData(ctx context.Context, t *lab.Trial, b *bench, z zeroSizes, source method.DataSource) (*method.ZeroQPlan, error) {
	v, err := t.Shared("zeroq:"+string(source), func() (any, error) {
		var calib compress.Examples
		if source == method.GivenData {
			var err error
			if calib, err = b.calibration(t.Seed, z.Images); err != nil {
				return nil, err
			}
		}
		q := zeroMethod(t, z, source)
		q.Budget = 8 // every site is measured at every width
		q.Distill.Progress = func(done, total int, _ float64) { t.Progress(done, total) }
		_, p, err := q.Run(ctx, t.Backend, b.nets["plain"], calib)
		return p, err
	})
	if err != nil {
		return nil, err
	}
	return v.(*method.ZeroQPlan), nil
}

// reuse is the source under which a plan's data are given again.
func reuse(source method.DataSource) method.DataSource {
	if source == method.GivenData {
		return source
	}
	return method.SyntheticData
}

// zeroSource calibrates on one source's data at three widths, and compares the sensitivities on them with real ones.
func zeroSource(ctx context.Context, t *lab.Trial, b *bench, z zeroSizes, source method.DataSource) error {
	p, err := zeroData(ctx, t, b, z, source)
	if err != nil {
		return err
	}
	q := zeroMethod(t, z, reuse(source))
	l, err := q.Distill.Mismatch(ctx, t.Backend, b.nets["plain"], p.Data)
	if err != nil {
		return err
	}
	t.Record("mismatch", l)
	if len(p.Trace) > 0 {
		t.Record("mismatch at the start", p.Trace[0])
		for i, l := range p.Trace {
			t.Series("mismatch", float64(i), l)
		}
	}
	t.Image("images: "+string(source), contactSheet(p.Data, 8, 28, 1, 0, 1))
	if err := zeroAccuracies(ctx, t, b, q, p.Data, ""); err != nil {
		return err
	}
	if source == method.DistilledData {
		q.Data = method.GivenData
		if err := zeroAccuracies(ctx, t, b, q, p.Data, ", pooled features by their own range"); err != nil {
			return err
		}
	}
	v, err := t.Shared("zeroq:reference", func() (any, error) {
		calib, err := b.calibration(t.Seed+1000, z.Reference) // others than the 32
		if err != nil {
			return nil, err
		}
		q := zeroMethod(t, z, method.GivenData)
		q.Budget = 8
		_, p, err := q.Run(ctx, t.Backend, b.nets["plain"], calib)
		return p, err
	})
	if err != nil {
		return err
	}
	want := flatEffects(v.(*method.ZeroQPlan).Effects)
	t.Record("correlation", stat.Correlation(flatEffects(p.Effects), want, nil))
	return nil
}

// zeroAccuracies quantises to all settings on given data and records the accuracies.
func zeroAccuracies(ctx context.Context, t *lab.Trial, b *bench, q method.ZeroQ, x compress.Examples, suffix string) error {
	for _, s := range zeroSettings {
		q.WeightBits, q.ActBits = s.weight, s.activat
		r, err := q.Compress(ctx, t.Backend, b.nets["plain"], x)
		if err != nil {
			return err
		}
		acc, err := b.accuracy(ctx, t.Backend, r.Network)
		if err != nil {
			return err
		}
		t.Record(s.name+suffix, 100*acc)
	}
	return nil
}

// zeroInRange distils images that are kept within the range of pixels, at a fifth of the rate.
func zeroInRange(ctx context.Context, t *lab.Trial, b *bench, z zeroSizes) error {
	q := zeroMethod(t, z, method.DistilledData)
	q.Distill.LR /= 5
	q.Distill.InputRange = []float64{0, 1}
	r, err := q.Distill.Run(ctx, t.Backend, b.nets["plain"], z.Images)
	if err != nil {
		return err
	}
	t.Record("mismatch", r.Trace[len(r.Trace)-1])
	t.Image("images: distilled within the range of pixels", contactSheet(r.X, 8, 28, 1, 0, 1))
	q.Data = method.SyntheticData
	return zeroAccuracies(ctx, t, b, q, r.X, "")
}

// flatEffects are the divergences of all sites and widths.
func flatEffects(effects []compress.SiteEffects) (out []float64) {
	for _, e := range effects {
		for _, f := range e.Effects {
			out = append(out, f.KL)
		}
	}
	return out
}

func zeroMetric(budget float64, what string) string { return fmt.Sprintf("%g bits: %s", budget, what) }

// zeroMixed spends budgets of weight bits with activations at 8 bits, ranges from distilled images.
func zeroMixed(ctx context.Context, t *lab.Trial, b *bench, z zeroSizes) error {
	p, err := zeroData(ctx, t, b, z, method.DistilledData)
	if err != nil {
		return err
	}
	real, err := zeroData(ctx, t, b, z, method.GivenData)
	if err != nil {
		return err
	}
	size := make([]float64, len(p.Effects))
	for i, e := range p.Effects {
		size[i] = float64(e.Weights)
		for k, f := range e.Effects {
			t.Series("divergence at "+f.Form+", by layer", float64(i), f.KL)
			t.Series("divergence at "+f.Form+", by layer, real images", float64(i), real.Effects[i].Effects[k].KL)
		}
	}
	for _, a := range p.Frontier {
		t.Series("frontier: divergence by bits per weight", a.Size/float64(p.Weights), a.Loss)
	}
	judge := func(bits []int) (float64, error) {
		q := zeroMethod(t, z, method.SyntheticData)
		q.Bits = map[string]compress.Bits{}
		for i, k := range bits {
			q.Bits[p.Sites[i]] = compress.Bits{Weight: k}
		}
		r, err := q.Compress(ctx, t.Backend, b.nets["plain"], p.Data)
		if err != nil {
			return 0, err
		}
		acc, err := b.accuracy(ctx, t.Backend, r.Network)
		return 100 * acc, err
	}
	for i, budget := range z.Budgets {
		limit := budget * float64(p.Weights)
		for what, front := range map[string][]compress.Allocation{"zeroq": p.Frontier, "real-data sensitivity": real.Frontier} {
			a, err := compress.AtBudget(front, limit)
			if err != nil {
				return err
			}
			acc, err := judge(a.Bits)
			if err != nil {
				return err
			}
			t.Record(zeroMetric(budget, what), acc)
			t.Record(zeroMetric(budget, what+", bits spent"), a.Size/float64(p.Weights))
			t.Logf("%g bits, %s: %v", budget, what, a.Bits)
		}
		acc, err := judge(slices.Repeat([]int{int(budget)}, len(size)))
		if err != nil {
			return err
		}
		t.Record(zeroMetric(budget, "uniform"), acc)
		mean, best := 0., 0.
		r := rng.New(t.Seed, fmt.Sprintf("allocations:%g", budget))
		for range z.Random {
			if acc, err = judge(randomAllocation(r, size, []int{2, 4, 8}, limit)); err != nil {
				return err
			}
			mean, best = mean+acc/float64(z.Random), max(best, acc)
		}
		t.Record(zeroMetric(budget, "random, mean"), mean)
		t.Record(zeroMetric(budget, "random, best"), best)
		t.Progress(i+1, len(z.Budgets))
	}
	return nil
}

// zeroLite quantises EfficientNet-Lite0, to 8 bits or under a budget of weight bits, and compares it with itself in float
// on crops of photographs.
func zeroLite(ctx context.Context, t *lab.Trial, source method.DataSource, budget float64) error {
	z := zeroSizesOf(t.Scale)
	path, err := data.Path(ctx, "efficientnet-lite0", "model.safetensors")
	if err != nil {
		return err
	}
	net, err := zoo.ReadEfficientNetLite0(path, zoo.EfficientNetLite0Options{Size: z.LiteSize})
	if err != nil {
		return err
	}
	test, err := photographCrops(ctx, z.LiteCrops, z.LiteSize, 1)
	if err != nil {
		return err
	}
	var calib compress.Examples
	if source == method.GivenData {
		if calib, err = photographCrops(ctx, 12, z.LiteSize, 2); err != nil {
			return err
		}
	}
	q := method.ZeroQ{Data: source, Images: z.LiteImages, Budget: budget, Fold: true, Distill: method.Distill{
		Steps: z.LiteSteps, InputStd: []float64{.5}, InputRange: []float64{-1, 1}, Progress: func(done, total int, _ float64) { t.Progress(done, total) },
	}}
	q.Seed = t.Seed
	start, computed := time.Now(), clock.ProcessorTime()
	r, p, err := q.Run(ctx, t.Backend, net, calib)
	if err != nil {
		return err
	}
	t.Record("seconds", time.Since(start).Seconds())
	t.Record("processor seconds", cmp.Or(clock.ProcessorTime()-computed, time.Since(start)).Seconds())
	for i, l := range p.Trace {
		t.Series("mismatch", float64(i), l)
	}
	t.Image("images for EfficientNet-Lite0: "+string(source), contactSheet(p.Data, 4, z.LiteSize, 3, -1, 1))
	want, width, err := compress.Evaluate(ctx, t.Backend, net, test, 8)
	if err != nil {
		return err
	}
	got, _, err := compress.Evaluate(ctx, t.Backend, r.Network, test, 8)
	if err != nil {
		return err
	}
	a, err := compress.Compare(want, got, test.Len(), width)
	if err != nil {
		return err
	}
	t.Record("same class", 100*a.Top1)
	t.Record("kl", a.KL)
	t.Record("cosine", a.Cosine)
	t.Record("bytes", float64(compress.Size(r.Network)))
	return nil
}

// photographCrops cuts squares out of the twelve photographs in turn, of a third to all of the shorter side, as
// EfficientNet-Lite takes them: (x − 127)/128.
func photographCrops(ctx context.Context, n, side int, seed uint64) (compress.Examples, error) {
	photos, err := data.Photographs(ctx)
	if err != nil {
		return nil, err
	}
	r := rng.New(seed, "photograph crops")
	x := make([]float32, 0, n*side*side*3)
	for i := range n {
		m := photos[i%len(photos)].Image
		b := m.Bounds()
		s := min(b.Dx(), b.Dy())
		s = s/3 + r.IntN(s-s/3+1)
		at := image.Pt(b.Min.X+r.IntN(b.Dx()-s+1), b.Min.Y+r.IntN(b.Dy()-s+1))
		crop := image.NewRGBA(image.Rect(0, 0, side, side))
		draw.BiLinear.Scale(crop, crop.Bounds(), m, image.Rectangle{Min: at, Max: at.Add(image.Pt(s, s))}, draw.Src, nil)
		for p := range side * side {
			for c := range 3 {
				x = append(x, (float32(crop.Pix[4*p+c])-127)/128)
			}
		}
	}
	return compress.Examples{tensors.FromFlatDataAndDimensions(x, n, side, side, 3)}, nil
}

// contactSheet shows the first images of a set, [n, side, side, channels], side by side; values from lo to hi are black to
// white.
func contactSheet(x compress.Examples, n, side, channels int, lo, hi float64) image.Image {
	n = min(n, x.Len())
	v := nn.Floats(x[0])
	out := image.NewRGBA(image.Rect(0, 0, n*side, side))
	for i := range n {
		for p := range side * side {
			var rgb [3]uint8
			for c := range rgb {
				y := (float64(v[(i*side*side+p)*channels+min(c, channels-1)]) - lo) / (hi - lo)
				rgb[c] = uint8(math.Round(255 * min(max(y, 0), 1)))
			}
			out.SetRGBA(i*side+p%side, p/side, color.RGBA{rgb[0], rgb[1], rgb[2], 255})
		}
	}
	return out
}

package calibrate

import (
	"math"
	"slices"
	"testing"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/gomlx/core/graph"

	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/internal/fixture"
	"github.com/lathe-ml/lathe/internal/metric"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/internal/stat"
	"github.com/lathe-ml/lathe/learn"
)

func TestFixtures(t *testing.T) {
	logits := func(c *fixture.Case) ([]float64, int, []int) {
		z := c.Inputs["logits"]
		return z.Floats(), z.Shape[1], c.Inputs["labels"].Ints()
	}
	fixture.Run(t, 49, map[string]fixture.Func{
		"calibration_metrics": func(t *testing.T, c *fixture.Case) map[string]any {
			z, k, y := logits(c)
			r, err := Calibration(z, k, y, c.Params["bins"].Int())
			if err != nil {
				t.Fatal(err)
			}
			var counts []int
			for _, b := range r.Bins {
				counts = append(counts, b.Count)
			}
			return map[string]any{"ece": r.ECE, "mce": r.MCE, "ace": r.ACE, "nll": r.NLL, "accuracy": r.Accuracy, "brier": r.Brier, "bin_count": counts}
		},
		"temperature_scaling": func(t *testing.T, c *fixture.Case) map[string]any {
			z, k, y := logits(c)
			best, err := FitTemperature(z, k, y)
			if err != nil {
				t.Fatal(err)
			}
			release, err := FitRelease(z, k, y)
			if err != nil {
				t.Fatal(err)
			}
			return map[string]any{"temperature": best.T, "nll_before": best.NLLBefore, "nll_after": best.NLLAfter, "release_lbfgs_temperature": release.T}
		},
		"d_mixup": func(t *testing.T, c *fixture.Case) map[string]any {
			ex, err := engine.NewExec(enginetest.Backend(), func(in []*graph.Node) []*graph.Node {
				x, soft := learn.DMixup(in[0], graph.OneHot(in[1], c.Params["classes"].Int(), dtypes.Float64), in[2], in[3])
				loss := learn.SoftCrossEntropy(in[4], soft)
				return []*graph.Node{x, soft, loss, graph.Gradient(loss, in[4])[0]}
			})
			if err != nil {
				t.Fatal(err)
			}
			in := c.Inputs
			out, err := ex.Call(in["x"].Tensor(dtypes.Float64), in["labels"].Tensor(dtypes.Int32), in["weights"].Tensor(dtypes.Float64), in["perms"].Tensor(dtypes.Int32), in["logits"].Tensor(dtypes.Float64))
			if err != nil {
				t.Fatal(err)
			}
			return map[string]any{"mixed_x": out[0], "soft_labels": out[1], "loss": out[2], "grad_logits": out[3]}
		},
		"overlap_theory": func(t *testing.T, c *fixture.Case) map[string]any {
			p := c.Params
			o, err := Overlap{Classes: p["classes"].Int(), Mass: p["overlap_mass"].Float(), Group: p["group"].Int()}.Theory(p["logit_gap"].Float())
			if err != nil {
				t.Fatal(err)
			}
			return map[string]any{"error": o.Error, "nll_best_temperature": o.NLLScaled, "nll_bayes": o.NLLBayes, "excess": o.Excess, "best_temperature": o.Temperature, "nll_uniform": o.NLLUniform}
		},
		"logit_gap": func(t *testing.T, c *fixture.Case) map[string]any {
			z, k, y := logits(c)
			gap, err := LogitGap(z, k, y)
			if err != nil {
				t.Fatal(err)
			}
			return map[string]any{"gap": gap}
		},
	})
}

// overconfident draws logits and labels from softmax(logits/by).
func overconfident(seed uint64, n, classes int, by float64) (z []float64, y []int) {
	r := rng.New(seed, "logits")
	z, y = make([]float64, n*classes), make([]int, n)
	p := make([]float64, classes)
	for i := range n {
		row := z[i*classes : (i+1)*classes]
		for c := range row {
			row[c] = 2 * by * r.NormFloat64()
			p[c] = row[c] / by
		}
		stat.Softmax(p, p)
		u := r.Float64()
		for y[i] = 0; y[i] < classes-1 && u >= p[y[i]]; y[i]++ {
			u -= p[y[i]]
		}
	}
	return z, y
}

func TestTemperatureScalingInvariants(t *testing.T) {
	for seed := range uint64(20) {
		k := 2 + int(seed)%7
		z, y := overconfident(seed, 150, k, .5+float64(seed)/4)
		fit, err := FitTemperature(z, k, y)
		if err != nil {
			t.Fatal(err)
		}
		if fit.Separable || fit.Uninformative {
			t.Fatalf("seed %d: %+v", seed, fit)
		}
		if fit.NLLAfter > fit.NLLBefore {
			t.Errorf("NLL rose from %v to %v", fit.NLLBefore, fit.NLLAfter)
		}
		before, err := Calibration(z, k, y, 15)
		if err != nil {
			t.Fatal(err)
		}
		p, err := Probabilities(z, k, fit.T)
		if err != nil {
			t.Fatal(err)
		}
		s, err := metric.ScoreProbabilities(p, k, y)
		if err != nil {
			t.Fatal(err)
		}
		after, err := s.Calibration(metric.Bins{})
		if err != nil {
			t.Fatal(err)
		}
		classes, _ := metric.ScoreLogits(z, k, y, 1)
		if !slices.Equal(classes.Predicted, s.Predicted) || before.Accuracy != after.Accuracy {
			t.Error("scaling changed predictions")
		}
		if math.Abs(after.NLL-fit.NLLAfter) > 1e-9 || math.Abs(before.NLL-fit.NLLBefore) > 1e-9 {
			t.Errorf("NLL %v and %v, measured %v and %v", fit.NLLBefore, fit.NLLAfter, before.NLL, after.NLL)
		}
		// Optimality: the mean logit under the prediction is the mean logit of the label.
		expected, got := 0., 0.
		for i, l := range y {
			got += z[i*k+l] / float64(len(y))
			for c := range k {
				expected += p[i*k+c] * z[i*k+c] / float64(len(y))
			}
		}
		if math.Abs(expected-got) > 1e-5 {
			t.Errorf("at T* the mean logit is %v under the prediction, %v of the labels", expected, got)
		}
		for _, scale := range []float64{.01, 3, 200} {
			scaled := slices.Clone(z)
			for i := range scaled {
				scaled[i] *= scale
			}
			other, err := FitTemperature(scaled, k, y)
			if err != nil || math.Abs(other.T/(fit.T*scale)-1) > 1e-4 {
				t.Errorf("logits times %v: T %v, %v; want %v", scale, other.T, err, fit.T*scale)
			}
		}
	}
}

func TestTemperatureFindsTheLaw(t *testing.T) {
	z, y := overconfident(1, 20_000, 6, 3)
	fit, err := FitTemperature(z, 6, y)
	if err != nil || math.Abs(fit.T-3) > .1 {
		t.Errorf("labels of softmax(z/3): T %v, %v", fit.T, err)
	}
	scaled := slices.Clone(z)
	for i := range scaled {
		scaled[i] /= 3
	}
	r, err := Calibration(scaled, 6, y, 15)
	if err != nil || r.ECE > .02 {
		t.Errorf("samples of the predicted probabilities: ECE %v, %v; want below 0.02", r.ECE, err)
	}
	// The released fit stays near its start.
	release, err := FitRelease(z, 6, y)
	if err != nil || release.T > 1.5 || release.NLLAfter < fit.NLLAfter {
		t.Errorf("released fit: %+v, %v", release, err)
	}
}

func TestTemperatureAtTheEnds(t *testing.T) {
	for _, c := range []struct {
		name                     string
		z                        []float64
		y                        []int
		separable, uninformative bool
	}{
		{"all right", []float64{2, 0, 0, 1}, []int{0, 1}, true, false},
		{"all right and certain", []float64{1e6, 0, 0, 1e6}, []int{0, 1}, true, false},
		{"all wrong", []float64{2, 0, 0, 1}, []int{1, 0}, false, true},
		{"constant", []float64{.1, .1, .3, .3}, []int{1, 0}, false, true},
		{"one case, right", []float64{2, 0}, []int{0}, true, false},
		{"one case, wrong", []float64{2, 0}, []int{1}, false, true},
		{"huge", []float64{1e100, -1e100, -1e100, 1e100}, []int{0, 0}, false, true},
	} {
		got, err := FitTemperature(c.z, 2, c.y)
		want := 1.
		if c.separable {
			want = MinTemperature
		} else if c.uninformative {
			want = MaxTemperature
		}
		if err != nil || got.Separable != c.separable || got.Uninformative != c.uninformative || got.T != want {
			t.Errorf("%s: %+v, %v", c.name, got, err)
		}
		if math.IsNaN(got.NLLAfter) || math.IsInf(got.NLLAfter, 0) || got.NLLAfter > got.NLLBefore {
			t.Errorf("%s: NLL from %v to %v", c.name, got.NLLBefore, got.NLLAfter)
		}
	}
}

func TestCertainPredictionsWork(t *testing.T) {
	r, err := Calibration([]float32{2000, 0, 0, 2000}, 2, []int{0, 1}, 15)
	if err != nil || r.ECE != 0 || r.MCE != 0 || r.ACE != 0 || r.AdaptiveECE != 0 || r.Brier != 0 || r.NLL != 0 {
		t.Errorf("%+v, %v", r, err)
	}
}

func TestOverlapTheory(t *testing.T) {
	for _, c := range []struct {
		k           int
		want, bayes float64
	}{{4, .836988, .346574}, {100, 1.711115, .346574}} {
		o, err := Overlap{Classes: c.k, Mass: .5}.Theory(10)
		if err != nil || math.Abs(o.NLLScaled-c.want) > 1e-6 || math.Abs(o.NLLBayes-c.bayes) > 1e-6 {
			t.Errorf("k = %d: %+v, %v; want %v and %v", c.k, o, err, c.want, c.bayes)
		}
	}
	// The temperature of the theory is what the fit finds on its law.
	const k, n = 8, 4000
	z, y := make([]float64, n*k), make([]int, n)
	for i := range n {
		y[i] = i % k
		at := y[i]
		if i%4 == 1 { // a quarter of the cases is taken for the partner: ρ = ½
			at ^= 1
		}
		z[i*k+at] = 10
	}
	o, _ := Overlap{Classes: k, Mass: .5}.Theory(10)
	fit, err := FitTemperature(z, k, y)
	if err != nil || math.Abs(fit.T-o.Temperature) > 1e-6 || math.Abs(fit.NLLAfter-o.NLLScaled) > 1e-9 {
		t.Errorf("fit %+v, %v; theory %+v", fit, err, o)
	}
	if o, err := (Overlap{Classes: 3, Mass: 0}).Theory(1); err != nil || o.NLLScaled != 0 || o.Excess != 0 {
		t.Errorf("without overlap: %+v, %v", o, err)
	}
	if o, err := (Overlap{Classes: 5, Mass: 1, Group: 5}).Theory(1); err != nil || math.Abs(o.Excess) > 1e-12 {
		t.Errorf("all classes in one region: %+v, %v", o, err)
	}
}

func TestLawsKnowTheirPosterior(t *testing.T) {
	for name, l := range map[string]PairedOverlap{
		"pairs": {Overlap: Overlap{Classes: 8, Mass: .6}}, "groups": {Overlap: Overlap{Classes: 9, Mass: .4, Group: 3}},
		"all shared": {Overlap: Overlap{Classes: 4, Mass: 1}}, "none shared": {Overlap: Overlap{Classes: 4}},
		"balls": {Overlap: Overlap{Classes: 8, Mass: .6}, Ball: true}, "close": {Overlap: Overlap{Classes: 4, Mass: .3}, Dim: 2, Sigma: 1},
	} {
		law, err := NewPairedOverlap(l, 1)
		if err != nil {
			t.Fatal(err)
		}
		x, y := law.Sample(rng.New(2, "points"), 6000)
		p, err := law.Posterior(x)
		if err != nil {
			t.Fatal(err)
		}
		labels := make([]int, len(y))
		for i := range y {
			labels[i] = int(y[i])
		}
		s, err := metric.ScoreProbabilities(p, law.Classes, labels)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		c, err := s.Calibration(metric.Bins{})
		if err != nil {
			t.Fatal(err)
		}
		if c.ECE > .025 {
			t.Errorf("%s: the exact posterior has an ECE of %v", name, c.ECE)
		}
		theory, _ := law.Theory(1)
		if name != "close" && math.Abs(c.NLL-theory.NLLBayes) > .04 {
			t.Errorf("%s: Bayes NLL %v, theory %v", name, c.NLL, theory.NLLBayes)
		}
	}
	g := TwoGaussians{Delta: .1}
	x, y := g.Sample(rng.New(3, "points"), 3000)
	p, err := g.Posterior(x)
	if err != nil {
		t.Fatal(err)
	}
	labels := make([]int, len(y))
	for i := range y {
		labels[i] = int(y[i])
	}
	s, err := metric.ScoreProbabilities(p, 2, labels)
	if err != nil {
		t.Fatal(err)
	}
	c, _ := s.Calibration(metric.Bins{})
	// Accuracy of the best rule is Φ(δ√d/2).
	if want := stat.NormalCDF(.05 * math.Sqrt(300)); math.Abs(c.Accuracy-want) > .03 || c.ECE > .04 {
		t.Errorf("two Gaussians: accuracy %v, want %v; ECE %v", c.Accuracy, want, c.ECE)
	}
}

func TestDiagnoseTellsOverlapFromOverconfidence(t *testing.T) {
	z, y := overconfident(5, 3000, 20, 3)
	d := diagnose(t, z, 20, y)
	if d.Overlap || d.Biased || d.Gain > .01 {
		t.Errorf("over-confidence alone: %+v", d)
	}
	// An interpolator under paired overlap: half of the shared points get the partner's label.
	const k, n = 20, 3000
	r := rng.New(6, "labels")
	z, y = make([]float64, n*k), make([]int, n)
	for i := range n {
		y[i] = r.IntN(k)
		at := y[i]
		if r.Float64() < .3 {
			at ^= 1
		}
		for c := range k {
			z[i*k+c] = r.NormFloat64()
		}
		z[i*k+at] += 10
	}
	d = diagnose(t, z, k, y)
	if !d.Overlap || math.Abs(d.Partners-1) > .01 || math.Abs(d.OverlapMass-.6) > .06 || math.Abs(d.ErrorRate-.3) > .03 {
		t.Errorf("paired overlap: %+v", d)
	}
	theory, _ := Overlap{Classes: k, Mass: .6}.Theory(1)
	if math.Abs(d.ExpectedExcess-theory.Excess) > .1 {
		t.Errorf("expected excess %v, theory %v", d.ExpectedExcess, theory.Excess)
	}
	if d.Confusions[0].Predicted^1 != d.Confusions[0].Label {
		t.Errorf("most frequent confusion %+v is no pair", d.Confusions[0])
	}
	// Two classes, equally confident: one prediction is right in 97 % of the cases, the other in 60 %.
	z, y = make([]float64, 2*n), make([]int, n)
	for i := range n {
		at := i % 2
		z[2*i+at] = 3
		if y[i] = at; r.Float64() > []float64{.97, .6}[at] {
			y[i] = 1 - at
		}
	}
	if d = diagnose(t, z, 2, y); d.Overlap || !d.Biased {
		t.Errorf("a biased class: %+v", d)
	}
	if d = diagnose(t, []float64{1, 0, 1, 0}, 2, []int{0, 1}); d.Partners != 0 || d.Overlap {
		t.Errorf("two cases: %+v", d)
	}
}

func diagnose(t *testing.T, z []float64, k int, y []int) Diagnosis {
	t.Helper()
	fit, err := FitTemperature(z, k, y)
	if err != nil {
		t.Fatal(err)
	}
	d, err := Diagnose(z, k, y, fit.T)
	if err != nil {
		t.Fatal(err)
	}
	if d.Advice() == "" {
		t.Error("no advice")
	}
	return d
}

func TestLogitGapProbe(t *testing.T) {
	// A linear network of two classes, z = (x₀, 0): moving by r along a random direction changes the gap by r·u₀, whose mean
	// is 0 and whose mean square is r²/d.
	const d = 4
	linear := func(x []float32) ([]float32, error) {
		var z []float32
		for i := 0; i < len(x); i += d {
			z = append(z, x[i], 0)
		}
		return z, nil
	}
	points := []float32{3, 0, 0, 0, 5, 1, 1, 1}
	got, err := LogitGapProbe{Directions: 20_000, Radii: []float64{0, 2}}.Measure(points, d, []int{0, 0}, 2, linear)
	if err != nil {
		t.Fatal(err)
	}
	if math.Abs(got[0].Gap-4) > 1e-9 || math.Abs(got[1].Gap-4) > .05 {
		t.Errorf("mean gaps %+v, want 4 at both radii", got)
	}
	if want := math.Sqrt((1 + 4./d) / 20_000); math.Abs(got[1].StdErr/want-1) > .05 {
		t.Errorf("standard error %v, want %v", got[1].StdErr, want)
	}
	if got, err := (LogitGapProbe{}).Measure(points, d, []int{0, 0}, 2, linear); err != nil || len(got) != 10 || got[9].Radius != 10 {
		t.Errorf("defaults: %v, %v", got, err)
	}
	if got, err := NearestNeighbourDistance([]float32{0, 0, 3, 4, 3, 5}, 2); err != nil || math.Abs(got-(5+1+1)/3.) > 1e-9 {
		t.Errorf("nearest neighbours at %v, %v; want 7/3", got, err)
	}
}

func TestBadInputIsRefused(t *testing.T) {
	ok, nan := []float64{1, 0, 0, 1}, math.NaN()
	fit := func(z []float64, k int, y ...int) func() error {
		return func() error {
			_, a := FitTemperature(z, k, y)
			_, b := FitRelease(z, k, y)
			_, c := Calibration(z, k, y, 15)
			_, d := Diagnose(z, k, y, 1)
			_, e := LogitGap(z, k, y)
			for _, err := range []error{a, b, c, d, e} {
				if err == nil {
					return nil
				}
			}
			return a
		}
	}
	law := func(l PairedOverlap) func() error {
		return func() error { _, err := NewPairedOverlap(l, 0); return err }
	}
	theory := func(o Overlap, gap float64) func() error {
		return func() error { _, err := o.Theory(gap); return err }
	}
	for name, f := range map[string]func() error{
		"one class":      fit([]float64{1, 2}, 1, 0, 0),
		"label":          fit(ok, 2, 0, 2),
		"negative label": fit(ok, 2, 0, -1),
		"NaN":            fit([]float64{1, nan, 0, 0}, 2, 0, 1),
		"infinite":       fit([]float64{1, math.Inf(-1), 0, 0}, 2, 0, 1),
		"no case":        fit(nil, 2),
		"size":           fit(ok[:3], 2, 0, 1),
		"labels missing": fit(ok, 2, 0),
		"bins":           func() error { _, err := Calibration(ok, 2, []int{0, 1}, 0); return err },
		"temperature":    func() error { _, err := Probabilities(ok, 2, 0); return err },
		"ragged":         func() error { _, err := Probabilities(ok, 3, 1); return err },
		"NaN logit":      func() error { _, err := Probabilities([]float64{nan, 1}, 2, 1); return err },
		"diagnosis":      func() error { _, err := Diagnose(ok, 2, []int{0, 1}, -1); return err },
		"odd pairs":      law(PairedOverlap{Overlap: Overlap{Classes: 5, Mass: .5}}),
		"uneven groups":  law(PairedOverlap{Overlap: Overlap{Classes: 8, Mass: .5, Group: 3}}),
		"one class law":  law(PairedOverlap{Overlap: Overlap{Classes: 1, Mass: .5}}),
		"mass":           law(PairedOverlap{Overlap: Overlap{Classes: 4, Mass: 1.1}}),
		"sigma":          law(PairedOverlap{Overlap: Overlap{Classes: 4}, Sigma: -1}),
		"huge dimension": law(PairedOverlap{Overlap: Overlap{Classes: 4}, Dim: 1 << 30}),
		"group":          theory(Overlap{Classes: 4, Mass: .5, Group: 5}, 1),
		"NaN mass":       theory(Overlap{Classes: 4, Mass: nan}, 1),
		"gap":            theory(Overlap{Classes: 4, Mass: .5}, 0),
		"probe radius": func() error {
			_, err := LogitGapProbe{Radii: []float64{-1}}.Measure([]float32{1}, 1, []int{0}, 2, nil)
			return err
		},
		"probe points": func() error { _, err := LogitGapProbe{}.Measure([]float32{1}, 2, []int{0}, 2, nil); return err },
		"probe direction": func() error {
			_, err := LogitGapProbe{Directions: -1}.Measure([]float32{1}, 1, []int{0}, 2, nil)
			return err
		},
		"one point": func() error { _, err := NearestNeighbourDistance([]float32{1, 2}, 2); return err },
		"gaussians": func() error { _, err := TwoGaussians{Dim: 2}.Posterior([]float32{1}); return err },
	} {
		if f() == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

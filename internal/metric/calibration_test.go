package metric

import (
	"math"
	"math/rand/v2"
	"testing"
)

func scored(t *testing.T, p []float64, classes int, labels ...int) *Scored {
	t.Helper()
	s, err := ScoreProbabilities(p, classes, labels)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestBinsAreClosedBelowOrAbove(t *testing.T) {
	s := scored(t, []float64{.5, .5, .75, .25, 1, 0, .6, .4}, 2, 0, 0, 0, 1)
	for _, c := range []struct {
		bins Bins
		want []int
	}{
		{Bins{Count: 4}, []int{0, 0, 2, 2}},
		{Bins{Count: 4, UpperClosed: true}, []int{0, 1, 2, 1}},
		{Bins{Count: 1}, []int{4}},
		{Bins{Count: 1, UpperClosed: true}, []int{4}},
	} {
		got, err := s.Calibration(c.bins)
		if err != nil {
			t.Fatal(err)
		}
		for k, n := range c.want {
			if got.Bins[k].Count != n {
				t.Errorf("%+v: bin %d holds %d cases, want %d", c.bins, k, got.Bins[k].Count, n)
			}
		}
	}
	if got := (Bins{UpperClosed: true}).of(0, 15); got != 0 {
		t.Errorf("confidence 0 is in bin %d, want 0", got)
	}
}

func TestCalibrationByHand(t *testing.T) {
	// Bins [.5, .75): two cases, confidence .6, one right; [.75, 1]: three cases, confidence .9, all right.
	s := scored(t, []float64{.6, .4, .4, .6, .9, .1, .9, .1, .1, .9}, 2, 0, 0, 0, 0, 1)
	c, err := s.Calibration(Bins{Count: 4})
	if err != nil {
		t.Fatal(err)
	}
	for name, v := range map[string][2]float64{
		"accuracy": {c.Accuracy, .8},
		"ECE":      {c.ECE, .4*.1 + .6*.1},
		"MCE":      {c.MCE, .1},
		"ACE":      {c.ACE, .1},
		"NLL":      {c.NLL, -(math.Log(.6) + math.Log(.4) + 3*math.Log(.9)) / 5},
		"Brier":    {c.Brier, (2*.16 + 2*.36 + 3*2*.01) / 5},
	} {
		if math.Abs(v[0]-v[1]) > 1e-12 {
			t.Errorf("%s is %v, want %v", name, v[0], v[1])
		}
	}
	// Adaptive, two bins of 2 and 3 cases: {.6 .6} with half right, {.9 .9 .9} all right.
	c, _ = s.Calibration(Bins{Count: 2})
	if want := (2*.1 + 3*.1) / 5; math.Abs(c.AdaptiveECE-want) > 1e-12 {
		t.Errorf("adaptive ECE %v, want %v", c.AdaptiveECE, want)
	}
	if c.ECE == c.AdaptiveECE {
		t.Error("adaptive and equal-width error are the same: the test cannot tell them apart")
	}
}

func TestAdaptiveECEIgnoresTheOrderOfTies(t *testing.T) {
	a := scored(t, []float64{.7, .3, .7, .3, .7, .3, .7, .3}, 2, 0, 0, 1, 1)
	b := scored(t, []float64{.7, .3, .7, .3, .7, .3, .7, .3}, 2, 1, 0, 1, 0)
	x, _ := a.Calibration(Bins{Count: 2})
	y, _ := b.Calibration(Bins{Count: 2})
	if x.AdaptiveECE != y.AdaptiveECE || math.Abs(x.AdaptiveECE-.2) > 1e-12 {
		t.Errorf("adaptive ECE %v and %v, want 0.2 of both", x.AdaptiveECE, y.AdaptiveECE)
	}
}

func TestCalibrationLimits(t *testing.T) {
	for _, c := range []struct {
		name   string
		labels []int
		want   float64
	}{{"confident and right", []int{0, 1}, 0}, {"confident and wrong", []int{1, 0}, 1}} {
		got, err := scored(t, []float64{1, 0, 0, 1}, 2, c.labels...).Calibration(Bins{})
		if err != nil {
			t.Fatal(err)
		}
		if got.ECE != c.want || got.MCE != c.want || got.ACE != c.want || got.AdaptiveECE != c.want || got.Brier != 2*c.want {
			t.Errorf("%s: %+v, want all errors %v", c.name, got, c.want)
		}
		if want := -c.want * math.Log(1e-300); math.Abs(got.NLL-want) > 1e-9 {
			t.Errorf("%s: NLL %v, want %v", c.name, got.NLL, want)
		}
	}
}

func TestCalibrationInequalities(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	for range 50 {
		n, k := 1+r.IntN(200), 2+r.IntN(5)
		z, y := make([]float64, n*k), make([]int, n)
		for i := range z {
			z[i] = 3 * r.NormFloat64()
		}
		for i := range y {
			y[i] = r.IntN(k)
		}
		s, err := ScoreLogits(z, k, y, 1)
		if err != nil {
			t.Fatal(err)
		}
		c, err := s.Calibration(Bins{Count: 1 + r.IntN(20)})
		if err != nil {
			t.Fatal(err)
		}
		if c.ECE > c.MCE+1e-12 || c.ECE > 1 || c.ACE > c.MCE+1e-12 || c.AdaptiveECE > 1 {
			t.Errorf("ECE %v, ACE %v, adaptive %v, MCE %v", c.ECE, c.ACE, c.AdaptiveECE, c.MCE)
		}
		one, _ := s.Calibration(Bins{Count: 1})
		mean := 0.
		for _, v := range s.Confidence {
			mean += v / float64(n)
		}
		if want := math.Abs(one.Accuracy - mean); math.Abs(one.ECE-want) > 1e-12 || math.Abs(one.AdaptiveECE-want) > 1e-12 {
			t.Errorf("one bin: ECE %v, adaptive %v, want %v", one.ECE, one.AdaptiveECE, want)
		}
	}
}

func TestACEIsECEWithEquallyFullBins(t *testing.T) {
	c, _ := scored(t, []float64{.6, .4, .6, .4, .9, .1, .9, .1}, 2, 0, 1, 0, 1).Calibration(Bins{Count: 4})
	if math.Abs(c.ACE-c.ECE) > 1e-12 || c.ACE == 0 {
		t.Errorf("ACE %v, ECE %v", c.ACE, c.ECE)
	}
}

func TestLogitsAndProbabilitiesAgree(t *testing.T) {
	z := []float32{2, -1, 0, 0.5, 0.5, -3}
	s, err := ScoreLogits(z, 3, []int{2, 0}, 2)
	if err != nil {
		t.Fatal(err)
	}
	p := make([]float64, len(z))
	for i := 0; i < len(z); i += 3 {
		sum := 0.
		for c := range 3 {
			p[i+c] = math.Exp(float64(z[i+c]) / 2)
			sum += p[i+c]
		}
		for c := range 3 {
			p[i+c] /= sum
		}
	}
	q := scored(t, p, 3, 2, 0)
	a, _ := s.Calibration(Bins{})
	b, _ := q.Calibration(Bins{})
	if math.Abs(a.NLL-b.NLL) > 1e-12 || math.Abs(a.Brier-b.Brier) > 1e-12 || math.Abs(a.ECE-b.ECE) > 1e-12 || s.Predicted[1] != 0 {
		t.Errorf("of logits %+v, of probabilities %+v", a, b)
	}
	// A label of vanishing probability keeps its exact loss.
	far, err := ScoreLogits([]float64{5000, 0}, 2, []int{1}, 1)
	if err != nil || far.LogLoss[0] != 5000 {
		t.Errorf("log loss %v, %v; want 5000", far.LogLoss, err)
	}
}

func TestBootstrapAndConsistency(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	const n = 20_000
	p, y := make([]float64, 2*n), make([]int, n)
	for i := range n {
		p[2*i] = r.Float64()
		p[2*i+1] = 1 - p[2*i]
		if r.Float64() >= p[2*i] {
			y[i] = 1
		}
	}
	s := scored(t, p, 2, y...)
	c, err := s.Calibration(Bins{})
	if err != nil || c.ECE > .02 {
		t.Errorf("labels drawn from the probabilities: ECE %v, %v; want below 0.02", c.ECE, err)
	}
	floor, err := s.ECEIfCalibrated(Bins{}, 50, r)
	if err != nil {
		t.Fatal(err)
	}
	more := 0
	for _, f := range floor {
		if f > .02 {
			t.Errorf("a calibrated model shows an ECE of %v on %d cases", f, n)
		}
		if f >= c.ECE {
			more++
		}
	}
	if more == 0 {
		t.Errorf("the calibrated ECE %v lies beyond all resampled ones %v", c.ECE, floor)
	}
	boot, err := s.Bootstrap(Bins{}, 50, r)
	if err != nil {
		t.Fatal(err)
	}
	mean, sd := 0., 0.
	for _, b := range boot {
		if b.Cases != n {
			t.Fatalf("a resample has %d cases", b.Cases)
		}
		mean += b.Accuracy / 50
	}
	for _, b := range boot {
		sd += (b.Accuracy - mean) * (b.Accuracy - mean) / 49
	}
	want := math.Sqrt(c.Accuracy * (1 - c.Accuracy) / n)
	if math.Abs(mean-c.Accuracy) > 3*want || math.Abs(math.Sqrt(sd)-want) > .5*want {
		t.Errorf("bootstrap accuracy %v ± %v, want %v ± %v", mean, math.Sqrt(sd), c.Accuracy, want)
	}
}

func TestCalibrationRefuses(t *testing.T) {
	nan := math.NaN()
	for name, f := range map[string]func() error{
		"one class":       func() error { _, err := ScoreLogits([]float64{1}, 1, []int{0}, 1); return err },
		"no case":         func() error { _, err := ScoreLogits([]float64{}, 2, nil, 1); return err },
		"label":           func() error { _, err := ScoreLogits([]float64{1, 2}, 2, []int{2}, 1); return err },
		"negative label":  func() error { _, err := ScoreLogits([]float64{1, 2}, 2, []int{-1}, 1); return err },
		"size":            func() error { _, err := ScoreLogits([]float64{1, 2, 3}, 2, []int{0}, 1); return err },
		"NaN logit":       func() error { _, err := ScoreLogits([]float64{1, nan}, 2, []int{0}, 1); return err },
		"infinite logit":  func() error { _, err := ScoreLogits([]float64{1, math.Inf(1)}, 2, []int{0}, 1); return err },
		"temperature":     func() error { _, err := ScoreLogits([]float64{1, 2}, 2, []int{0}, 0); return err },
		"NaN temperature": func() error { _, err := ScoreLogits([]float64{1, 2}, 2, []int{0}, nan); return err },
		"sum":             func() error { _, err := ScoreProbabilities([]float64{.5, .49}, 2, []int{0}); return err },
		"NaN probability": func() error { _, err := ScoreProbabilities([]float64{nan, .5}, 2, []int{0}); return err },
		"negative":        func() error { _, err := ScoreProbabilities([]float64{1.1, -.1}, 2, []int{0}); return err },
		"bins":            func() error { _, err := scored(t, []float64{1, 0}, 2, 0).Calibration(Bins{Count: -1}); return err },
		"bins of bootstrap": func() error {
			_, err := scored(t, []float64{1, 0}, 2, 0).Bootstrap(Bins{Count: 1e9}, 1, rand.New(rand.NewPCG(1, 1)))
			return err
		},
	} {
		if f() == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

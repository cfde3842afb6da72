package data

import (
	"math"
	"slices"
	"testing"

	"github.com/lathe-ml/lathe/internal/rng"
)

// momentsOf spoils n values of v and returns their mean and variance.
func momentsOf(t *testing.T, n Noise, v float32) (mean, variance float64) {
	t.Helper()
	x := slices.Repeat([]float32{v}, 200_000)
	if err := n.Add(rng.New(1, "noise"), x); err != nil {
		t.Fatal(err)
	}
	for _, y := range x {
		mean += float64(y) / float64(len(x))
	}
	for _, y := range x {
		variance += (float64(y) - mean) * (float64(y) - mean) / float64(len(x))
	}
	return mean, variance
}

func TestNoiseHasItsMoments(t *testing.T) {
	for name, c := range map[string]struct {
		noise          Noise
		value          float32
		mean, variance float64
	}{
		"gaussian":           {GaussianNoise{Sigma: .05}, .5, .5, .0025},
		"gaussian unclipped": {GaussianNoise{Sigma: .2, Unclipped: true}, 1, 1, .04},
		"shot":               {ShotNoise{Photons: 100}, .4, .4, .004},
		"shot unclipped":     {ShotNoise{Photons: 12, Unclipped: true}, 1, 1, 1. / 12},
		"shot of black":      {ShotNoise{Photons: 12}, 0, 0, 0},
		"impulse":            {ImpulseNoise{.1}, .5, .5, .025},
		"impulse all":        {ImpulseNoise{1}, .3, .5, .25},
		"none":               {ImpulseNoise{0}, .3, .3, 0},
	} {
		mean, variance := momentsOf(t, c.noise, c.value)
		if math.Abs(mean-c.mean) > .003 || math.Abs(variance-c.variance) > .02*c.variance+1e-6 {
			t.Errorf("%s: mean %g, variance %g; want %g, %g", name, mean, variance, c.mean, c.variance)
		}
	}
}

func TestNoiseGrowsWithSeverity(t *testing.T) {
	for _, kind := range NoiseKinds() {
		last := 0.
		for severity := 1; severity <= Severities; severity++ {
			n, err := NoiseOf(kind, severity)
			if err != nil {
				t.Fatal(err)
			}
			_, variance := momentsOf(t, n, .4)
			if n.Name() != kind || variance <= last {
				t.Errorf("%s %d: variance %g after %g", kind, severity, variance, last)
			}
			last = variance
		}
	}
}

func TestCorruptedPictures(t *testing.T) {
	m := &Images{N: 3, H: 4, W: 4, C: 1, Pixels: make([]uint8, 48), Labels: make([]int32, 3), ClassNames: []string{"a"}}
	for i := range m.Pixels {
		m.Pixels[i] = uint8(5 * i)
	}
	clean := slices.Clone(m.Pixels)
	all, err := m.Corrupted(GaussianNoise{Sigma: .1}, 7)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(m.Pixels, clean) || slices.Equal(all.Pixels, clean) {
		t.Error("the set given was changed, or nothing was")
	}
	some, err := m.First(1).Corrupted(GaussianNoise{Sigma: .1}, 7)
	if err != nil || !slices.Equal(some.Pixels, all.At(0)) {
		t.Errorf("the noise of a picture depends on the others (%v)", err)
	}
	same, err := m.Corrupted(GaussianNoise{}, 7)
	if err != nil || !slices.Equal(same.Pixels, clean) {
		t.Errorf("no noise changes pictures (%v)", err)
	}
}

func TestNoiseRefuses(t *testing.T) {
	for name, n := range map[string]Noise{
		"sigma": GaussianNoise{Sigma: -1}, "NaN": GaussianNoise{Sigma: math.NaN()}, "no photons": ShotNoise{}, "share": ImpulseNoise{1.1}, "NaN share": ImpulseNoise{math.NaN()},
	} {
		x := []float32{.5}
		if n.Add(rng.New(0, ""), x) == nil || x[0] != .5 {
			t.Errorf("%s: no error, or a changed value", name)
		}
	}
	for name, c := range map[string]struct {
		kind     string
		severity int
	}{"kind": {"fog", 1}, "zero": {"shot", 0}, "six": {"shot", 6}} {
		if _, err := NoiseOf(c.kind, c.severity); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if _, err := (&Images{N: 1, H: 2, W: 2, C: 1}).Corrupted(GaussianNoise{}, 0); err == nil {
		t.Error("pictures without pixels: no error")
	}
}

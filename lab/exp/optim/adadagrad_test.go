package optim

import (
	"math"
	"testing"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/lab/labtest"
)

func TestAdAdaGradSmoke(t *testing.T) {
	data.RequireTest(t, "fashion-mnist")
	labtest.Smoke(t, AdAdaGrad())
}

func TestLinearRampHasTheMean(t *testing.T) {
	for _, c := range []struct {
		first, last int
		mean        float64
	}{{16, 1024, 520}, {16, 1024, 100}, {16, 1024, 900}, {16, 16, 16}} {
		f := linearRamp(c.first, c.last, c.mean, 360_000)
		samples, steps, previous := 0, 0, 0
		for samples < 360_000 {
			b := f(samples)
			if b < previous || b < c.first || b > c.last {
				t.Fatalf("%+v: size %d after %d", c, b, previous)
			}
			previous, samples, steps = b, samples+b, steps+1
		}
		if mean := float64(samples) / float64(steps); math.Abs(mean/c.mean-1) > .05 || float64(previous) < .95*float64(c.last) {
			t.Errorf("%+v: mean %g, last %d", c, mean, previous)
		}
	}
}

func TestLogSlope(t *testing.T) {
	var x, y []float64
	for k := 10.; k <= 2000; k += 10 {
		x, y = append(x, k), append(y, 3*math.Pow(k, -.8))
	}
	if s := logSlope(x, y, 20); math.Abs(s+.8) > 1e-9 {
		t.Errorf("slope %g, want -0.8", s)
	}
}

package stat

import (
	"math"
	"math/rand/v2"
	"testing"
)

func TestWilsonInterval(t *testing.T) {
	for _, c := range []struct {
		k, n   int
		lo, hi float64
	}{ // R: prop.test(k, n, correct = FALSE)$conf.int
		{5, 10, 0.2365931, 0.7634069},
		{0, 10, 0, 0.2775328},
		{10, 10, 0.7224672, 1},
		{95, 100, 0.8882500, 0.9784521},
	} {
		lo, hi := Wilson(c.k, c.n, .95)
		near(t, "low", lo, c.lo, 1e-4)
		near(t, "high", hi, c.hi, 1e-4)
	}
	for _, c := range [][2]int{{1, 0}, {-1, 3}, {4, 3}} {
		if lo, hi := Wilson(c[0], c[1], .95); !math.IsNaN(lo) || !math.IsNaN(hi) {
			t.Errorf("%v: %g to %g", c, lo, hi)
		}
	}
}

func TestBootstrapIntervalOfNormalValuesIsStudents(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	xs := make([]float64, 400)
	for i := range xs {
		xs[i] = 3 + r.NormFloat64()
	}
	_, lo, hi := MeanCI(xs, .95)
	blo, bhi := BootstrapCI(xs, .95, 2000, r)
	near(t, "low", blo, lo, .02)
	near(t, "high", bhi, hi, .02)
	if lo, hi := BootstrapCI(xs[:1], .95, 100, r); !math.IsInf(lo, -1) || !math.IsInf(hi, 1) {
		t.Errorf("one value: %g to %g", lo, hi)
	}
	if lo, hi := BootstrapCI([]float64{2, 2, 2}, .95, 100, r); lo != 2 || hi != 2 {
		t.Errorf("equal values: %g to %g", lo, hi)
	}
}

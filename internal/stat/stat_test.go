package stat

import (
	"math"
	"testing"
)

func near(t *testing.T, what string, got, want, tol float64) {
	t.Helper()
	if math.IsNaN(want) && math.IsNaN(got) || got == want {
		return
	}
	if !(math.Abs(got-want) <= tol) {
		t.Errorf("%s: got %.12g, want %.12g", what, got, want)
	}
}

func TestQuantileInterpolatesAtPNMinusOne(t *testing.T) {
	for _, c := range []struct {
		xs   []float64
		p    float64
		want float64
	}{
		{[]float64{4, 1, 3, 2}, 0.5, 2.5}, // numpy.quantile
		{[]float64{4, 1, 3, 2}, 0.25, 1.75},
		{[]float64{4, 1, 3, 2}, 0, 1},
		{[]float64{4, 1, 3, 2}, 1, 4},
		{[]float64{10, 20, 30}, 0.9, 28},
		{[]float64{7}, 0.3, 7},
		{[]float64{1, 2}, -3, 1},
		{[]float64{1, math.Inf(1)}, 0, 1},
		{nil, 0.5, math.NaN()},
		{[]float64{1, math.NaN()}, 0.5, math.NaN()},
	} {
		near(t, "quantile", Quantile(c.xs, c.p), c.want, 1e-12)
	}
}

func TestMomentsKeepASmallVarianceOnALargeMean(t *testing.T) {
	var m, a, b Moments
	for i := range 1000 {
		x := 1e9 + float64(i%2)
		m.Add(x)
		if i < 300 {
			a.Add(x)
		} else {
			b.Add(x)
		}
	}
	near(t, "variance", m.PopVariance(), 0.25, 1e-9)
	a.Merge(b)
	near(t, "merged mean", a.Mean(), m.Mean(), 1e-6)
	near(t, "merged variance", a.Variance(), m.Variance(), 1e-9)
	if a.Len() != 1000 {
		t.Errorf("merged length %d", a.Len())
	}
}

func TestMeanCIIsStudents(t *testing.T) {
	// t(0.975, 2) = 4.302653, standard error 1/sqrt(3)
	mean, lo, hi := MeanCI([]float64{1, 2, 3}, 0.95)
	near(t, "mean", mean, 2, 1e-12)
	near(t, "lo", lo, 2-4.302652729911275/math.Sqrt(3), 1e-6)
	near(t, "hi", hi, 2+4.302652729911275/math.Sqrt(3), 1e-6)
	if _, lo, hi = MeanCI([]float64{5}, 0.95); !math.IsInf(lo, -1) || !math.IsInf(hi, 1) {
		t.Errorf("one value: [%g, %g], want an infinite interval", lo, hi)
	}
	if mean, lo, hi = MeanCI([]float64{4, 4, 4}, 0.95); mean != 4 || lo != 4 || hi != 4 {
		t.Errorf("equal values: %g [%g, %g]", mean, lo, hi)
	}
	if mean, lo, _ = MeanCI(nil, 0.95); !math.IsNaN(mean) || !math.IsNaN(lo) {
		t.Errorf("no values: %g, %g", mean, lo)
	}
	mean, lo, hi, err := PairedCI([]float64{2, 4, 6}, []float64{1, 2, 3}, 0.95)
	if err != nil {
		t.Fatal(err)
	}
	near(t, "paired mean", mean, 2, 1e-12)
	near(t, "paired width", hi-lo, 2*4.302652729911275/math.Sqrt(3), 1e-6)
	if _, _, _, err = PairedCI([]float64{1}, nil, 0.95); err == nil {
		t.Error("unequal lengths must be refused")
	}
}

func TestNormalFunctions(t *testing.T) {
	for _, x := range []float64{-3, -0.5, 0, 1.2, 4} {
		near(t, "H+Φ", H(x)+NormalCDF(x), 1, 1e-15)
		near(t, "HInv", HInv(H(x)), x, 1e-9)
	}
	near(t, "Φ(1.96)", NormalCDF(1.959963984540054), 0.975, 1e-12)
	if !math.IsInf(HInv(0), 1) {
		t.Error("HInv(0) is not +Inf")
	}
	x, w := GaussLegendre(40, -8, 8)
	s := 0.
	for i := range x {
		s += w[i] * NormalPDF(x[i])
	}
	near(t, "mass", s, 1, 1e-9)
}

func TestLogSumExp(t *testing.T) {
	near(t, "large", LogSumExp([]float64{1000, 1000}), 1000+math.Ln2, 1e-9)
	if !math.IsInf(LogSumExp(nil), -1) || !math.IsInf(LogSumExp([]float64{math.Inf(-1)}), -1) {
		t.Error("empty sum is not -Inf")
	}
	p := []float64{1, 2, 3}
	Softmax(p, p)
	near(t, "softmax", p[0]+p[1]+p[2], 1, 1e-12)
}

func TestGoldenSectionNarrowsAMinimum(t *testing.T) {
	for _, at := range []float64{0, .1, .618, 1} {
		f := func(x float64) float64 { return math.Abs(x - at) }
		if got := GoldenSection(f, 0, 1, 30); math.Abs(got-at) > 1e-6 {
			t.Errorf("minimum at %g, found at %g", at, got)
		}
	}
}

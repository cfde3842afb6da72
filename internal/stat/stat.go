// Package stat holds the statistics that several rooms need and gonum does not have in the form that the papers use:
// quantiles at p(n-1), streaming moments, Student-t intervals of means and of paired differences, and the functions
// of the standard normal law that theories of learning are written in.
//
// Functions that summarise a sample answer NaN for an empty one, as a missing measurement, not an error.
package stat

import (
	"fmt"
	"math"
	"slices"

	"gonum.org/v1/gonum/integrate/quad"
	"gonum.org/v1/gonum/stat/distuv"
)

// Mean returns the arithmetic mean, NaN for no values.
func Mean(xs []float64) float64 {
	var m Moments
	for _, x := range xs {
		m.Add(x)
	}
	return m.Mean()
}

// StdDev returns the unbiased standard deviation (divisor n-1), NaN for fewer than two values.
func StdDev(xs []float64) float64 {
	var m Moments
	for _, x := range xs {
		m.Add(x)
	}
	return math.Sqrt(m.Variance())
}

// Moments accumulates the mean and variance of a stream (Welford's recurrence), so that a large mean does not cancel
// a small variance. The zero value is an empty stream.
type Moments struct {
	n        int
	mean, m2 float64
}

// Add takes one more value into account.
func (m *Moments) Add(x float64) {
	m.n++
	d := x - m.mean
	m.mean += d / float64(m.n)
	m.m2 += d * (x - m.mean)
}

// Merge takes all values of another stream into account (Chan's formula).
func (m *Moments) Merge(o Moments) {
	switch {
	case o.n == 0:
		return
	case m.n == 0:
		*m = o
		return
	}
	n := float64(m.n + o.n)
	d := o.mean - m.mean
	m.m2 += o.m2 + d*d*float64(m.n)*float64(o.n)/n
	m.mean += d * float64(o.n) / n
	m.n += o.n
}

// Len returns the number of values.
func (m *Moments) Len() int { return m.n }

// Mean returns the mean, NaN for no values.
func (m *Moments) Mean() float64 {
	if m.n == 0 {
		return math.NaN()
	}
	return m.mean
}

// Variance returns the unbiased variance (divisor n-1), NaN for fewer than two values.
func (m *Moments) Variance() float64 {
	if m.n < 2 {
		return math.NaN()
	}
	return m.m2 / float64(m.n-1)
}

// PopVariance returns the biased variance (divisor n), NaN for no values.
func (m *Moments) PopVariance() float64 {
	if m.n == 0 {
		return math.NaN()
	}
	return m.m2 / float64(m.n)
}

// Quantile returns the p-quantile with linear interpolation at position p(n-1) of the sorted values: numpy's default
// (gonum interpolates at p·n). xs need not be sorted and is not changed. p is clipped to [0, 1]; NaN for no values or
// when one of them is NaN.
func Quantile(xs []float64, p float64) float64 {
	if len(xs) == 0 || math.IsNaN(p) {
		return math.NaN()
	}
	s := slices.Clone(xs)
	slices.Sort(s) // NaNs come first
	if math.IsNaN(s[0]) {
		return math.NaN()
	}
	at := min(max(p, 0), 1) * float64(len(s)-1)
	i := int(at)
	if i+1 >= len(s) || s[i] == s[i+1] {
		return s[i]
	}
	f := at - float64(i)
	if f == 0 {
		return s[i]
	}
	return s[i]*(1-f) + s[i+1]*f
}

// Median returns the 0.5-quantile: the middle value, or the mean of the two middle ones.
func Median(xs []float64) float64 { return Quantile(xs, 0.5) }

// MeanCI returns the mean and its two-sided Student-t interval at a level in (0, 1), such as 0.95. One value gives an
// infinite interval, since nothing is known of its spread; no values, or a NaN among them, give NaN. A level outside
// (0, 1) gives NaN bounds.
func MeanCI(xs []float64, level float64) (mean, lo, hi float64) {
	mean = Mean(xs)
	n := len(xs)
	switch {
	case math.IsNaN(mean) || math.IsInf(mean, 0) || !(level > 0 && level < 1):
		return mean, math.NaN(), math.NaN()
	case n == 1:
		return mean, math.Inf(-1), math.Inf(1)
	}
	t := distuv.StudentsT{Mu: 0, Sigma: 1, Nu: float64(n - 1)}.Quantile(0.5 + level/2)
	h := t * StdDev(xs) / math.Sqrt(float64(n))
	return mean, mean - h, mean + h
}

// PairedCI returns the mean of the differences a[i]-b[i] with its Student-t interval: what two arms that ran on the
// same seeds differ by.
func PairedCI(a, b []float64, level float64) (mean, lo, hi float64, err error) {
	if len(a) != len(b) {
		return 0, 0, 0, fmt.Errorf("stat: paired samples of %d and %d values; they must be of equal length", len(a), len(b))
	}
	d := make([]float64, len(a))
	for i := range a {
		d[i] = a[i] - b[i]
	}
	mean, lo, hi = MeanCI(d, level)
	return mean, lo, hi, nil
}

// LogSumExp returns ln Σ exp(x), shifted by the maximum so that nothing overflows; -Inf for no values.
func LogSumExp(xs []float64) float64 {
	if len(xs) == 0 {
		return math.Inf(-1)
	}
	m := slices.Max(xs)
	if math.IsInf(m, 0) || math.IsNaN(m) {
		return m
	}
	s := 0.
	for _, x := range xs {
		s += math.Exp(x - m)
	}
	return m + math.Log(s)
}

// Softmax writes exp(x-LogSumExp(x)) into dst, which may be x itself and must have its length.
func Softmax(dst, x []float64) {
	z := LogSumExp(x)
	for i, v := range x {
		dst[i] = math.Exp(v - z)
	}
}

// NormalPDF is the density of the standard normal law.
func NormalPDF(x float64) float64 { return math.Exp(-x*x/2) / math.Sqrt(2*math.Pi) }

// NormalCDF is the distribution function Φ of the standard normal law.
func NormalCDF(x float64) float64 { return 0.5 * math.Erfc(-x/math.Sqrt2) }

// H is the upper tail of the standard normal law, H(x) = 1-Φ(x) = ½ erfc(x/√2).
func H(x float64) float64 { return 0.5 * math.Erfc(x/math.Sqrt2) }

// HInv is the inverse of H on [0, 1]: +Inf at 0, -Inf at 1, NaN outside.
func HInv(p float64) float64 { return math.Sqrt2 * math.Erfcinv(2*p) }

// GaussLegendre returns n nodes and weights for integrals over [a, b], exact for polynomials of degree 2n-1.
// It panics when n < 1 or a >= b, as gonum's rule does; callers pass constants.
func GaussLegendre(n int, a, b float64) (x, w []float64) {
	x, w = make([]float64, n), make([]float64, n)
	quad.Legendre{}.FixedLocations(x, w, a, b)
	return x, w
}

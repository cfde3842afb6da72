package quant

import (
	"fmt"
	"math"
	"slices"
)

// CalibOption changes how CalibrateUniform chooses a range.
type CalibOption func(*calibration)

type calibration struct {
	percentiles []float64
	minMax      bool
	symmetric   bool
	full        bool
	group       int
}

// Percentiles replaces the searched percentiles, each in (0.5, 1]; the default is 0.999, 0.9999, 0.99999.
func Percentiles(p ...float64) CalibOption {
	return func(c *calibration) { c.percentiles = slices.Clone(p) }
}

// MinMax takes the whole range of the values, widened to hold 0, instead of searching percentiles.
func MinMax() CalibOption { return func(c *calibration) { c.minMax = true } }

// Symmetric takes scale = max|x|/(2^(b-1)-1) and the zero point 2^(b-1): the codes, minus that zero point, stay in
// ±(2^(b-1)-1). It implies MinMax.
func Symmetric() CalibOption { return func(c *calibration) { c.symmetric = true } }

// FullRange takes the whole range of the values as it is: scale (max−min)/(2^b−1), zero point −round(min/scale), which is
// no code where all values have one sign. Values within 1e-8 of each other are stored as a constant.
func FullRange() CalibOption { return func(c *calibration) { c.full = true } }

// Groups splits every row along axis 0 into blocks of n consecutive values.
func Groups(n int) CalibOption { return func(c *calibration) { c.group = n } }

// CalibrateUniform fits scale and zero point to each group of x, a row-major tensor of the given shape. Axis -1 is
// one group; any other axis gives one group per index of it: 0 for the rows of a weight, len(shape)-1 for the channels
// of an activation.
//
// By default it searches the percentiles p = 0.999, 0.9999, 0.99999 (arXiv:2212.08254 and its reference code):
//
//	hi = quantile(x, p), lo = quantile(x, 1-p)     linear interpolation at index p(n-1)
//	s = (hi-lo)/(2^b-1), z = round(-lo/s)
//
// and keeps the pair of least mean squared error, the first one on ties. Zero need not lie in the range, so z may fall
// outside [0, 2^b-1]. A constant group gets the range from 0 to its value (s = max(|x|, 1e-8)/(2^b-1)). Cost: one
// selection and one error pass per percentile, O(n).
//
// Errors: ErrBits, ErrEmpty, ErrNotFinite, a shape that does not fit.
func CalibrateUniform(x []float32, shape []int, axis, bits int, opt ...CalibOption) (Affine, error) {
	c := calibration{percentiles: defaultPercentiles}
	for _, o := range opt {
		o(&c)
	}
	a := Affine{Bits: bits, Axis: axis, Group: c.group}
	if err := checkBits(bits); err != nil {
		return a, err
	}
	for _, p := range c.percentiles {
		if !(p > 0.5 && p <= 1) {
			return a, fmt.Errorf("quant: percentile %g; accepted: above 0.5 and at most 1", p)
		}
	}
	l, err := newLayout(len(x), shape, axis, c.group)
	if err != nil {
		return a, err
	}
	if len(x) == 0 || l.groups == 0 {
		return a, fmt.Errorf("quant: calibration: %w", ErrEmpty)
	}
	if err := checkFinite(x); err != nil {
		return a, err
	}
	a.Scale, a.Zero = make([]float64, l.groups), make([]float64, l.groups)
	per := len(x) / l.groups
	buf, scratch := make([]float32, per), make([]float32, per)
	for g := range l.groups {
		v := buf[:0]
		if l.groups == 1 {
			v = x
		} else {
			for start := g * l.inner; start < len(x); start += l.groups * l.inner {
				v = append(v, x[start:start+l.inner]...)
			}
		}
		a.Scale[g], a.Zero[g] = c.fit(v, scratch[:len(v)], bits)
	}
	return a, nil
}

var defaultPercentiles = []float64{0.999, 0.9999, 0.99999}

// fit chooses one group's scale and zero point; scratch is as long as v.
func (c *calibration) fit(v, scratch []float32, bits int) (scale, zero float64) {
	lo, hi := slices.Min(v), slices.Max(v)
	switch {
	case c.symmetric:
		return RangeSymmetric(lo, hi, bits)
	case c.minMax:
		return RangeAffine(lo, hi, bits)
	case lo == hi, c.full && float64(hi)-float64(lo) < 1e-8:
		return constant(lo, bits)
	case c.full:
		return fullRange(float64(lo), float64(hi), bits)
	}
	copy(scratch, v)
	n := len(v)
	var ks []int
	for _, p := range c.percentiles {
		for _, q := range []float64{p, 1 - p} {
			i := int(q * float64(n-1))
			ks = append(ks, i, min(i+1, n-1))
		}
	}
	slices.Sort(ks)
	selectRanks(scratch, 0, slices.Compact(ks))
	best, top := 1e10, float32(int(1)<<bits-1)
	for _, p := range c.percentiles {
		h, l := ranked(scratch, p), ranked(scratch, 1-p)
		s := (h - l) / top
		if !(s >= smallestNormal) || math.IsInf(float64(s), 0) {
			continue
		}
		z := float32(math.RoundToEven(float64(-l / s)))
		var sum float64
		for _, x := range v {
			d := float64(x - (code(x, s, z, top)-z)*s)
			sum += d * d
		}
		if e := sum / float64(n); e < best {
			best, scale, zero = e, float64(s), float64(z)
		}
	}
	if scale == 0 { // a spike with rare outliers: every percentile range is empty
		return RangeAffine(lo, hi, bits)
	}
	return scale, zero
}

const smallestNormal = 0x1p-126

// RangeAffine is the grid whose range is [lo, hi], widened to hold 0; the zero point is a code. An empty range (all
// values 0) gets scale 1.
func RangeAffine(lo, hi float32, bits int) (scale, zero float64) {
	l, h := min(float64(lo), 0), max(float64(hi), 0)
	s := float32((h - l) / float64(int(1)<<bits-1))
	if s < smallestNormal {
		return 1, 0
	}
	z := math.RoundToEven(float64(float32(-l) / s))
	return float64(s), min(z, float64(int(1)<<bits-1))
}

// fullRange is the grid from lo to hi, at least 1e-8 apart.
func fullRange(lo, hi float64, bits int) (scale, zero float64) {
	s := float32((hi - lo) / float64(int(1)<<bits-1))
	return float64(s), -math.RoundToEven(lo / float64(s))
}

// RangeSymmetric is the grid with scale max(|lo|,|hi|)/(2^(b-1)-1) and zero point 2^(b-1); all values 0 give scale 1.
func RangeSymmetric(lo, hi float32, bits int) (scale, zero float64) {
	m := max(math.Abs(float64(lo)), math.Abs(float64(hi)))
	s := float32(m / float64(int(1)<<(bits-1)-1))
	if s < smallestNormal {
		s = 1
	}
	return float64(s), float64(int(1) << (bits - 1))
}

// constant puts the value at one end of the range and 0 at the other.
func constant(v float32, bits int) (scale, zero float64) {
	top := float64(int(1)<<bits - 1)
	s := float64(float32(max(math.Abs(float64(v)), 1e-8) / top))
	if v < 0 {
		return s, top
	}
	return s, 0
}

// Quantile is the linearly interpolated order statistic at index p(n-1), p in [0,1]. It panics on no values.
func Quantile(x []float32, p float64) float64 {
	s := slices.Clone(x)
	i := int(p * float64(len(s)-1))
	selectRanks(s, 0, slices.Compact([]int{i, min(i+1, len(s)-1)}))
	return float64(ranked(s, p))
}

// ranked interpolates at index p(n-1); the two order statistics beside it must be in place.
func ranked(x []float32, p float64) float32 {
	at := p * float64(len(x)-1)
	i := int(at)
	a, b := x[i], x[min(i+1, len(x)-1)]
	if a == b {
		return a
	}
	return a + float32(at-float64(i))*(b-a)
}

// selectRanks moves the order statistics of the given sorted ranks to their places (quickselect on all of them at
// once); x[0] has rank base.
func selectRanks[F float32 | float64](x []F, base int, ranks []int) {
	for depth := 0; len(ranks) > 0; depth++ {
		if len(x) <= 64 || depth > 60 {
			slices.Sort(x)
			return
		}
		a, b, c := x[0], x[len(x)/2], x[len(x)-1]
		pivot := max(min(a, b), min(max(a, b), c))
		lt, i, gt := 0, 0, len(x) // x[:lt] < pivot, x[lt:i] == pivot, x[gt:] > pivot
		for i < gt {
			switch v := x[i]; {
			case v < pivot:
				x[i], x[lt] = x[lt], v
				lt++
				i++
			case v > pivot:
				gt--
				x[i], x[gt] = x[gt], v
			default:
				i++
			}
		}
		left, _ := slices.BinarySearch(ranks, base+lt)
		right, _ := slices.BinarySearch(ranks, base+gt)
		selectRanks(x[:lt], base, ranks[:left])
		x, base, ranks = x[gt:], base+gt, ranks[right:]
	}
}

package quant

import (
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/lathe-ml/lathe/internal/rng"
)

// TanQ is the quantiser of DopQ-ViT for attention probabilities (Yang, Gong, Gu, arXiv:2408.03291): a grid that is dense
// near 0, where most probabilities are, and also near 1, where the few are that carry the attention. With L = 2^Bits-1,
// A = tan(ακ) and B = tan(α(1-κ)):
//
//	u = clip(x/s, 0, 1);   T(u) = (tan(α(u-κ)) + A)/(A+B);   c = round(L·T(u))
//	x_hat = s(κ + atan((c/L)(A+B) - A)/α)
//
// T grows from 0 to 1; its slope, and with it the resolution, is least at the centre κ. κ = 0.5 is symmetric; κ = 1 is
// finest at 0 and grows coarser up to 1; α → 0 is the uniform grid. Code 0 is exactly 0 and code L exactly s, so one-hot
// attention is kept as it is. Decoding is a table of 2^Bits entries (LookupSums): unlike the grid of LogSqrt2 it
// needs no shifts and has none.
//
// The paper's text was not at hand; it describes a tangent grid that is precise near 0 and near 1. The centre is a
// parameter of this implementation, of which the paper's shapes are cases.
type TanQ struct {
	Bits  int     // 2 to 8
	Scale float64 // s > 0: the value of the highest code, to which greater ones clip
	Alpha float64 // curvature, above 0 and below (π/2)/max(κ, 1-κ)
	Kappa float64 // centre κ, in [0,1]
}

// Check reports parameters outside their range. Errors: ErrBits.
func (q TanQ) Check() error {
	if err := checkBits(q.Bits); err != nil {
		return err
	}
	if !(q.Scale > 0) || math.IsInf(q.Scale, 0) {
		return fmt.Errorf("quant: scale %g of a tangent grid is not positive", q.Scale)
	}
	if !(q.Kappa >= 0 && q.Kappa <= 1) {
		return fmt.Errorf("quant: centre %g of a tangent grid; accepted: 0 to 1", q.Kappa)
	}
	if limit := alphaLimit(q.Kappa); !(q.Alpha > 0 && q.Alpha < limit) {
		return fmt.Errorf("quant: curvature %g of a tangent grid with centre %g; accepted: above 0 and below %g", q.Alpha, q.Kappa, limit)
	}
	return nil
}

// alphaLimit is the curvature at which the tangent reaches its pole within [0,1].
func alphaLimit(kappa float64) float64 { return math.Pi / 2 / max(kappa, 1-kappa) }

// tanCurve is TanQ with what does not depend on the value worked out.
type tanCurve struct {
	TanQ
	top, a, sum float64 // L, A, A+B
}

func (q TanQ) curve() tanCurve {
	a := math.Tan(q.Alpha * q.Kappa)
	return tanCurve{TanQ: q, top: float64(int(1)<<q.Bits - 1), a: a, sum: a + math.Tan(q.Alpha*(1-q.Kappa))}
}

// warp is T(u) of u in [0,1].
func (q tanCurve) warp(u float64) float64 { return (math.Tan(q.Alpha*(u-q.Kappa)) + q.a) / q.sum }

func (q tanCurve) code(x float64) float64 {
	return min(max(math.RoundToEven(q.top*q.warp(min(max(x/q.Scale, 0), 1))), 0), q.top)
}

// Code returns the code of a value, 0 to 2^Bits-1. The grid must pass Check; negative values get code 0.
func (q TanQ) Code(x float64) uint8 { return uint8(q.curve().code(x)) }

// Levels are the 2^Bits reconstruction points in ascending order, from 0 to Scale.
func (q TanQ) Levels() []float64 {
	k := q.curve()
	out := make([]float64, 1<<q.Bits)
	for c := range out {
		out[c] = q.Scale * (q.Kappa + math.Atan(float64(c)/k.top*k.sum-k.a)/q.Alpha)
	}
	out[0], out[len(out)-1] = 0, q.Scale // exact, whatever rounding did
	return out
}

// Levels16 is the table for integer kernels: round(level/s·32767); the product with V is scaled by s/32767.
func (q TanQ) Levels16() []int16 {
	levels := q.Levels()
	out := make([]int16, len(levels))
	for i, v := range levels {
		out[i] = int16(math.Round(v / q.Scale * math.MaxInt16))
	}
	return out
}

// Encode writes the code of every value of x to codes, which is as long. Errors: ErrBits and other parameters outside
// their range; ErrNegative; ErrNotFinite.
func (q TanQ) Encode(x []float32, codes []uint8) error {
	if err := q.Check(); err != nil {
		return err
	}
	if len(codes) != len(x) {
		return fmt.Errorf("quant: room for %d codes of %d values", len(codes), len(x))
	}
	if err := checkProbabilities(x); err != nil {
		return err
	}
	k := q.curve()
	for i, v := range x {
		codes[i] = uint8(k.code(float64(v)))
	}
	return nil
}

// Decode returns the value of every code; codes above 2^Bits-1 stand for the highest.
func (q TanQ) Decode(codes []uint8) []float32 {
	levels := narrow(q.Levels())
	out := make([]float32, len(codes))
	for i, c := range codes {
		out[i] = levels[min(int(c), len(levels)-1)]
	}
	return out
}

// FakeQuant returns each value moved to its grid point. Errors: as Encode.
func (q TanQ) FakeQuant(x []float32) ([]float32, error) {
	codes := make([]uint8, len(x))
	if err := q.Encode(x, codes); err != nil {
		return nil, err
	}
	return q.Decode(codes), nil
}

// LookupSums computes A·V for codes [m,k] of A and V [k,n] without building A: rows of V weighted by the entries of
// Levels16, and one product with s/32767 at the end. It agrees with decoding A and multiplying up to the table's
// rounding, 1/65534 of s per probability.
func (q TanQ) LookupSums(codes []uint8, m, k int, v []float32, n int) ([]float32, error) {
	if err := q.Check(); err != nil {
		return nil, err
	}
	if m < 0 || k < 0 || n < 0 || len(codes) != m*k || len(v) != k*n {
		return nil, fmt.Errorf("quant: sums of codes [%d,%d] (%d given) and values [%d,%d] (%d given)", m, k, len(codes), k, n, len(v))
	}
	table := q.Levels16()
	out, sum := make([]float32, m*n), make([]float64, n)
	for i := range m {
		clear(sum)
		for j, c := range codes[i*k : (i+1)*k] {
			if int(c) >= len(table) {
				return nil, fmt.Errorf("quant: code %d at row %d, column %d; accepted: 0 to %d", c, i, j, len(table)-1)
			}
			w := float64(table[c])
			for t, x := range v[j*n : (j+1)*n] {
				sum[t] += w * float64(x)
			}
		}
		for t, x := range sum {
			out[i*n+t] = float32(x * q.Scale / math.MaxInt16)
		}
	}
	return out, nil
}

// TanQMetric is what CalibrateTanQ minimises.
type TanQMetric string

const (
	// TanQAttention is the mean of (Â-A)².
	TanQAttention TanQMetric = "attention"
	// TanQOutput is the mean of (ÂV-AV)²: what the errors do to the attention's output.
	TanQOutput TanQMetric = "output"
)

// TanQOptions are the knobs of CalibrateTanQ; the zero value is the default.
type TanQOptions struct {
	Percentiles []float64  // the scale is one of these quantiles, each in [0,1]; nil: 0.999, 0.9999, 0.99999, 1
	Kappas      []float64  // centres, each in [0,1]; nil: 0, 0.25, 0.5, 0.625, 0.75, 0.875, 1
	Gains       []float64  // curvatures as shares of their limit, each in (0, 0.99]; nil: 0.1, 0.2, ... 0.9, 0.95, 0.98, 0.99
	Metric      TanQMetric // "": TanQAttention
	Sample      int        // greatest number of probabilities that are judged, drawn when there are more; 0: 200,000, or 20,000 for TanQOutput
	Seed        uint64     // of the draw

	// Values are V for TanQOutput, [batch, Keys, Width] where the probabilities are [batch, queries, Keys]. V must not be
	// quantised: the grid would be fitted to that error, too.
	Values      []float32
	Keys, Width int
}

func (o TanQOptions) withDefaults() (TanQOptions, error) {
	if o.Percentiles == nil {
		o.Percentiles = []float64{.999, .9999, .99999, 1}
	}
	if o.Kappas == nil {
		o.Kappas = []float64{0, .25, .5, .625, .75, .875, 1}
	}
	if o.Gains == nil {
		o.Gains = []float64{.1, .2, .3, .4, .5, .6, .7, .8, .9, .95, .98, .99}
	}
	for _, list := range []struct {
		what   string
		v      []float64
		lo, hi float64
		open   bool
	}{{"percentile", o.Percentiles, 0, 1, false}, {"centre", o.Kappas, 0, 1, false}, {"curvature share", o.Gains, 0, .99, true}} {
		if len(list.v) == 0 {
			return o, fmt.Errorf("quant: tangent grid: the list of %ss to search is empty; leave it nil for the default", list.what)
		}
		for _, v := range list.v {
			if !(v >= list.lo && v <= list.hi) || list.open && v == list.lo {
				return o, fmt.Errorf("quant: tangent grid: %s %g; accepted: %g to %g", list.what, v, list.lo, list.hi)
			}
		}
	}
	switch o.Metric {
	case "", TanQAttention:
		o.Metric = TanQAttention
	case TanQOutput:
	default:
		return o, fmt.Errorf("quant: tangent grid: metric %q; accepted: %s, %s", o.Metric, TanQAttention, TanQOutput)
	}
	if o.Sample < 0 {
		return o, fmt.Errorf("quant: tangent grid: a sample of %d probabilities", o.Sample)
	}
	if o.Sample == 0 {
		if o.Sample = 200_000; o.Metric == TanQOutput {
			o.Sample = 20_000
		}
	}
	return o, nil
}

// CalibrateTanQ searches scale, centre and curvature for attention probabilities a and returns the grid of least error
// with that error. The search is exhaustive, and the first of equal ones wins:
//
//	for each percentile p: s = quantile(a, p), linear interpolation at index p(n-1), s = 0 skipped
//	  for each centre κ: for each share g: α = g·(π/2)/max(κ, 1-κ)
//
// Cost: 336 passes over the (sorted) sample, about 0.1 s for 200,000 probabilities; with TanQOutput as many products of
// the sample with V. Errors: ErrBits, ErrEmpty, ErrNegative, ErrNotFinite; probabilities that are all 0.
func CalibrateTanQ[F float32 | float64](a []F, bits int, o TanQOptions) (TanQ, float64, error) {
	if err := checkBits(bits); err != nil {
		return TanQ{}, 0, err
	}
	if len(a) == 0 {
		return TanQ{}, 0, fmt.Errorf("quant: tangent grid: %w", ErrEmpty)
	}
	if err := checkProbabilities(a); err != nil {
		return TanQ{}, 0, err
	}
	o, err := o.withDefaults()
	if err != nil {
		return TanQ{}, 0, err
	}
	if slices.Max(a) == 0 {
		return TanQ{}, 0, errors.New("quant: tangent grid: all probabilities are 0")
	}
	sample, err := newTanSample(a, o)
	if err != nil {
		return TanQ{}, 0, err
	}
	best, least := TanQ{}, math.Inf(1)
	for _, s := range quantiles(a, o.Percentiles) {
		if !(s > 0) {
			continue
		}
		for _, kappa := range o.Kappas {
			for _, g := range o.Gains {
				q := TanQ{Bits: bits, Scale: s, Alpha: g * alphaLimit(kappa), Kappa: kappa}
				if e := sample.mse(q); e < least {
					best, least = q, e
				}
				if least == 0 {
					return best, 0, nil
				}
			}
		}
	}
	if best.Bits == 0 {
		return TanQ{}, 0, fmt.Errorf("quant: tangent grid: the percentiles %v of the probabilities are all 0; include 1", o.Percentiles)
	}
	return best, least, nil
}

// quantiles interpolates linearly at index p(n-1), in float64.
func quantiles[F float32 | float64](a []F, ps []float64) []float64 {
	x := slices.Clone(a)
	n := len(x)
	var ranks []int
	for _, p := range ps {
		i := int(p * float64(n-1))
		ranks = append(ranks, i, min(i+1, n-1))
	}
	slices.Sort(ranks)
	selectRanks(x, 0, slices.Compact(ranks))
	out := make([]float64, len(ps))
	for k, p := range ps {
		at := p * float64(n-1)
		i := int(at)
		lo, hi := float64(x[i]), float64(x[min(i+1, n-1)])
		out[k] = lo + (at-float64(i))*(hi-lo)
	}
	return out
}

// tanSample is what a calibration measures grids on.
type tanSample struct {
	sorted []float64
	// For TanQOutput:
	place  []int       // of each sorted value in the sample
	errs   []float64   // Â-A in the sample's order
	values [][]float64 // V of each row of the sample, [keys, width]
	keys   int
	width  int
}

func newTanSample[F float32 | float64](a []F, o TanQOptions) (*tanSample, error) {
	s := &tanSample{}
	if o.Metric == TanQAttention {
		for _, i := range draw(len(a), o.Sample, o.Seed) {
			s.sorted = append(s.sorted, float64(a[i]))
		}
		slices.Sort(s.sorted)
		return s, nil
	}
	s.keys, s.width = o.Keys, o.Width
	if s.keys <= 0 || s.width <= 0 || len(a)%s.keys != 0 || len(o.Values) == 0 || len(o.Values)%(s.keys*s.width) != 0 {
		return nil, fmt.Errorf("quant: tangent grid: %d probabilities and %d values do not make rows over %d keys and values [%d, %d]", len(a), len(o.Values), s.keys, s.keys, s.width)
	}
	if err := checkFinite(o.Values); err != nil {
		return nil, fmt.Errorf("attention values: %w", err)
	}
	rows, batch := len(a)/s.keys, len(o.Values)/(s.keys*s.width)
	if rows%batch != 0 {
		return nil, fmt.Errorf("quant: tangent grid: %d rows of probabilities do not divide among %d matrices of values", rows, batch)
	}
	matrices := make([][]float64, batch)
	var x []float64
	for _, r := range draw(rows, max(1, o.Sample/s.keys), o.Seed) {
		m := r / (rows / batch)
		if matrices[m] == nil {
			matrices[m] = widen(o.Values[m*s.keys*s.width : (m+1)*s.keys*s.width])
		}
		s.values = append(s.values, matrices[m])
		for _, v := range a[r*s.keys : (r+1)*s.keys] {
			x = append(x, float64(v))
		}
	}
	s.place = make([]int, len(x))
	for i := range s.place {
		s.place[i] = i
	}
	slices.SortStableFunc(s.place, func(i, j int) int {
		switch {
		case x[i] < x[j]:
			return -1
		case x[i] > x[j]:
			return 1
		}
		return 0
	})
	s.errs = make([]float64, len(x))
	for _, i := range s.place {
		s.sorted = append(s.sorted, x[i])
	}
	return s, nil
}

// draw chooses at most k of n indices, one of each of k stretches of equal length, in ascending order.
func draw(n, k int, seed uint64) []int {
	r := rng.New(seed, "tangent-sample")
	out := make([]int, min(n, k))
	for i := range out {
		out[i] = i
		if n > k {
			from, to := i*n/k, (i+1)*n/k
			out[i] = from + r.IntN(to-from)
		}
	}
	return out
}

// mse measures a grid. Codes ascend with the values, so the sorted sample falls into one stretch per code, whose ends
// are found by bisection.
func (s *tanSample) mse(q TanQ) float64 {
	k, levels := q.curve(), q.Levels()
	var sum float64
	for c, from := 0, 0; from < len(s.sorted); c++ {
		to := len(s.sorted)
		if c < len(levels)-1 {
			n, _ := slices.BinarySearchFunc(s.sorted[from:], float64(c), func(x, c float64) int {
				if k.code(x) <= c {
					return -1
				}
				return 1
			})
			to = from + n
		}
		if s.place == nil {
			for _, x := range s.sorted[from:to] {
				d := levels[c] - x
				sum += d * d
			}
		} else {
			for i, x := range s.sorted[from:to] {
				s.errs[s.place[from+i]] = levels[c] - x
			}
		}
		from = to
	}
	if s.place == nil {
		return sum / float64(len(s.sorted))
	}
	out := make([]float64, s.width)
	for r, v := range s.values {
		clear(out)
		for j, e := range s.errs[r*s.keys : (r+1)*s.keys] {
			for t, x := range v[j*s.width : (j+1)*s.width] {
				out[t] += e * x
			}
		}
		for _, d := range out {
			sum += d * d
		}
	}
	return sum / float64(len(s.values)*s.width)
}

// checkProbabilities refuses NaN, infinite and negative values.
func checkProbabilities[F float32 | float64](a []F) error {
	for i, v := range a {
		switch {
		case v-v != 0:
			return fmt.Errorf("quant: value %d is %g: %w", i, v, ErrNotFinite)
		case v < 0:
			return fmt.Errorf("quant: value %d is %g: %w", i, v, ErrNegative)
		}
	}
	return nil
}

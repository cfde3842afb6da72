package quant

import (
	"fmt"
	"math"
	"slices"
)

// LogSqrt2 is the softmax quantiser of RepQ-ViT (arXiv:2212.08254, eq. 13-16): a grid of powers of √2 below Scale, with
// an exact zero. For a >= 0:
//
//	c = round(-2 log2(a/s));   c >= 2^b: a_hat = 0, stored as the code 2^b
//	a_hat = s * 2^(-ceil(c/2)) * ((c mod 2)(√2-1) + 1) = s * √2^(-c),   0 <= c < 2^b
//
// Values above Scale clip to code 0. The relative error of a value in range is at most 2^(1/4)-1 = 18.9 %. Since the
// parity of c only chooses between the scales s and s√2, a product with a matrix is two sums of shifted rows
// (ShiftSums): what a log2 unit computes.
type LogSqrt2 struct {
	Bits  int     // 2 to 8
	Scale float64 // the value of code 0, > 0
}

// Log2 is the coarser grid of powers of two: c = round(-log2(a/s)), a_hat = s * 2^(-c), c >= 2^b gives 0 (stored as the
// code 2^b). Relative error of a value in range: at most √2-1 = 41.4 %.
type Log2 struct {
	Bits  int
	Scale float64
}

// Codes returns the code of every value: 0 to 2^Bits-1, or 2^Bits for what becomes exactly 0. Negative and NaN values
// are refused (ErrNegative, ErrNotFinite).
func (q LogSqrt2) Codes(a []float32) ([]int32, error) { return logGrid{q.Bits, q.Scale, 2}.codes(a) }

// Decode returns the value of every code.
func (q LogSqrt2) Decode(codes []int32) []float32 { return logGrid{q.Bits, q.Scale, 2}.decode(codes) }

// FakeQuant returns each value moved to its grid point.
func (q LogSqrt2) FakeQuant(a []float32) ([]float32, error) {
	return logGrid{q.Bits, q.Scale, 2}.fakeQuant(a)
}

// Codes returns the code of every value, as LogSqrt2.Codes.
func (q Log2) Codes(a []float32) ([]int32, error) { return logGrid{q.Bits, q.Scale, 1}.codes(a) }

// Decode returns the value of every code.
func (q Log2) Decode(codes []int32) []float32 { return logGrid{q.Bits, q.Scale, 1}.decode(codes) }

// FakeQuant returns each value moved to its grid point.
func (q Log2) FakeQuant(a []float32) ([]float32, error) {
	return logGrid{q.Bits, q.Scale, 1}.fakeQuant(a)
}

// ShiftSums computes A·V for codes [m,k] of A and V [k,n] without building A (the base change of section 3.3):
//
//	A·V = s Σ_even 2^(-c/2) V + s√2 Σ_odd 2^(-(c+1)/2) V
//
// Each sum shifts rows of V (here by the exponent of a float) and adds; the two scales multiply once at the end. It
// agrees with decoding A and multiplying, up to rounding.
func (q LogSqrt2) ShiftSums(codes []int32, m, k int, v []float32, n int) ([]float32, error) {
	if m < 0 || k < 0 || n < 0 || len(codes) != m*k || len(v) != k*n {
		return nil, fmt.Errorf("quant: shift sums of codes [%d,%d] (%d given) and values [%d,%d] (%d given)", m, k, len(codes), k, n, len(v))
	}
	out := make([]float32, m*n)
	even, odd := make([]float64, n), make([]float64, n)
	for i := range m {
		clear(even)
		clear(odd)
		for j, c := range codes[i*k : (i+1)*k] {
			if c < 0 || c > 1<<q.Bits {
				return nil, fmt.Errorf("quant: code %d at row %d, column %d; accepted: 0 to %d", c, i, j, 1<<q.Bits)
			}
			if c == 1<<q.Bits {
				continue
			}
			sum := even
			if c%2 == 1 {
				sum = odd
			}
			shift := -int(c+1) / 2
			for t, x := range v[j*n : (j+1)*n] {
				sum[t] += math.Ldexp(float64(x), shift)
			}
		}
		for t := range n {
			out[i*n+t] = float32(q.Scale*even[t] + q.Scale*math.Sqrt2*odd[t])
		}
	}
	return out, nil
}

// CalibrateLogSqrt2 chooses the scale among the percentiles 0.999, 0.9999 and 0.99999 of a by the least mean squared
// error, the first one on ties; all values 0 give scale 1. Errors: ErrBits, ErrEmpty, ErrNegative, ErrNotFinite.
func CalibrateLogSqrt2(a []float32, bits int) (LogSqrt2, error) {
	s, err := calibrateLog(a, bits, 2)
	return LogSqrt2{bits, s}, err
}

// CalibrateLog2 is CalibrateLogSqrt2 for the grid of powers of two.
func CalibrateLog2(a []float32, bits int) (Log2, error) {
	s, err := calibrateLog(a, bits, 1)
	return Log2{bits, s}, err
}

func calibrateLog(a []float32, bits, perOctave int) (float64, error) {
	if err := checkBits(bits); err != nil {
		return 0, err
	}
	if len(a) == 0 {
		return 0, fmt.Errorf("quant: calibration: %w", ErrEmpty)
	}
	if err := checkProbabilities(a); err != nil {
		return 0, err
	}
	top := slices.Max(a)
	if top < smallestNormal {
		return 1, nil
	}
	scratch := slices.Clone(a)
	n := len(a)
	var ks []int
	for _, p := range defaultPercentiles {
		i := int(p * float64(n-1))
		ks = append(ks, i, min(i+1, n-1))
	}
	slices.Sort(ks)
	selectRanks(scratch, 0, slices.Compact(ks))
	scale, best := float64(top), 1e10
	for _, p := range defaultPercentiles {
		s := ranked(scratch, p)
		if s < smallestNormal {
			continue
		}
		if e := (logGrid{bits, float64(s), perOctave}).mse(a); e < best {
			best, scale = e, float64(s)
		}
	}
	return scale, nil
}

// logGrid has perOctave levels per factor of two.
type logGrid struct {
	bits      int
	scale     float64
	perOctave int
}

// code of a >= 0; 2^bits stands for zero.
func (q logGrid) code(a float32) int32 {
	c := math.RoundToEven(-float64(q.perOctave) * math.Log2(float64(a/float32(q.scale))))
	return int32(max(0, min(c, float64(int(1)<<q.bits)))) // a = 0: c = +Inf
}

// table holds the value of every code, zero code included.
func (q logGrid) table() []float32 {
	t := make([]float32, 1<<q.bits+1)
	for c := range 1 << q.bits {
		if q.perOctave == 2 {
			v := math.Ldexp(q.scale, -(c+1)/2)
			if c%2 == 1 {
				v *= math.Sqrt2
			}
			t[c] = float32(v)
		} else {
			t[c] = float32(math.Ldexp(q.scale, -c))
		}
	}
	return t
}

func (q logGrid) check(a []float32) error {
	if err := checkBits(q.bits); err != nil {
		return err
	}
	if !(q.scale > 0) || math.IsInf(q.scale, 0) {
		return fmt.Errorf("quant: scale %g of a log quantiser is not positive", q.scale)
	}
	return checkProbabilities(a)
}

func (q logGrid) codes(a []float32) ([]int32, error) {
	if err := q.check(a); err != nil {
		return nil, err
	}
	out := make([]int32, len(a))
	for i, v := range a {
		out[i] = q.code(v)
	}
	return out, nil
}

func (q logGrid) decode(codes []int32) []float32 {
	t := q.table()
	out := make([]float32, len(codes))
	for i, c := range codes {
		out[i] = t[max(0, min(int(c), len(t)-1))]
	}
	return out
}

func (q logGrid) fakeQuant(a []float32) ([]float32, error) {
	codes, err := q.codes(a)
	if err != nil {
		return nil, err
	}
	return q.decode(codes), nil
}

func (q logGrid) mse(a []float32) float64 {
	t := q.table()
	var sum float64
	for _, v := range a {
		d := float64(v - t[q.code(v)])
		sum += d * d
	}
	return sum / float64(len(a))
}

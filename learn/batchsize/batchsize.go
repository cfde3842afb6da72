// Package batchsize adapts the number of cases per training step to the noise of the gradient (AdAdaGrad: Lau, Liu,
// Kolar, arXiv:2402.11215).
//
// After every step a [Test] compares the sampling noise of the batch's gradient with its size. When the noise is too
// large, the next batch is as large as it would have to be to pass; it never shrinks. Early in the training a few cases
// are enough, late in it steps become few and parallel, and there is no schedule to tune.
//
// The pieces: tests on the statistics of a gradient ([GradStats]); ways to get these statistics, from [SampleStats] over
// single cases to [PerSampleSquaredNorms], which needs one backward pass, and [GroupStats], which needs nothing but
// micro-batches; and the [AdaptiveBatcher], which draws the cases, steps a trainer and keeps its state in the checkpoint.
package batchsize

import (
	"errors"
	"fmt"
	"math"
	"slices"
)

// GradStats says how the gradients of the cases of a batch are spread about their mean.
type GradStats struct {
	B      int     // cases in the batch
	MeanSq float64 // ‖ḡ‖², the squared norm of the mean gradient over all parameters
	VarL1  float64 // ‖Var‖₁, the sum over all coordinates of the unbiased variance of a single case's gradient

	// Var and Mean are the same by coordinate; nil when they were not gathered. CoordinateTest needs them.
	Var, Mean []float64
	// Inner is nil when it was not gathered. InnerProductTest and AugmentedTest need it.
	Inner *InnerStats
}

// InnerStats is the spread of a case's gradient along the mean gradient and across it. Both are computed per parameter
// tensor, with the tensor's own mean gradient, and summed.
type InnerStats struct {
	Along  float64 // V = Σ Var_i⟨g_i, ḡ⟩
	Across float64 // W = Σ ‖Var_i(g_i − ⟨g_i,ḡ⟩ḡ/‖ḡ‖²)‖₁
}

// ErrStationary says that a test is undefined because the batch's gradient is zero. The size is kept.
var ErrStationary = errors.New("stationary batch gradient")

// Test decides on the size of the next batch.
type Test interface {
	Name() string
	// Next returns the size of the next batch, at least current, and whether the batch passed. It fails on fewer than two
	// cases, on statistics that are not finite or were not gathered, and on thresholds of 0 and less; with a zero gradient
	// it returns current and ErrStationary.
	Next(s GradStats, current int) (next int, passed bool, err error)
}

var (
	_ Test = NormTest{}
	_ Test = CoordinateTest{}
	_ Test = InnerProductTest{}
	_ Test = AugmentedTest{}
)

func (s GradStats) check(name string, current int, thresholds ...float64) error {
	for _, t := range thresholds {
		if !(t > 0) || math.IsInf(t, 0) {
			return fmt.Errorf("batchsize: %s test: a threshold of %g; use a positive number, such as 0.5", name, t)
		}
	}
	switch {
	case s.B < 2:
		return fmt.Errorf("batchsize: %s test: a batch of %d has no variance; use 2 cases or more", name, s.B)
	case current < 1:
		return fmt.Errorf("batchsize: %s test: the present size is %d; want at least 1", name, current)
	case !finite(s.MeanSq) || !finite(s.VarL1) || s.MeanSq < 0 || s.VarL1 < 0:
		return fmt.Errorf("batchsize: %s test: squared norm %g and variance %g of the gradient; want finite numbers of at least 0 (lower the learning rate)", name, s.MeanSq, s.VarL1)
	case s.MeanSq == 0:
		return fmt.Errorf("batchsize: %s test: %w", name, ErrStationary)
	}
	return nil
}

func finite(x float64) bool { return !math.IsNaN(x) && !math.IsInf(x, 0) }

// decide turns the size that would pass, a real number, into what Next returns.
func (s GradStats) decide(need float64, current int) (int, bool, error) {
	n := math.MaxInt
	if need = math.Ceil(need * (1 - 1e-12)); need < math.MaxInt32 { // the factor: 2 cases stay 2 in spite of rounding
		n = int(need)
	}
	return max(current, n), n <= s.B, nil
}

// NormTest passes when ‖Var‖₁/b ≤ Eta²‖ḡ‖²; the size that would pass is ⌈‖Var‖₁/(Eta²‖ḡ‖²)⌉ (arXiv:2402.11215, section
// 3; Byrd et al. 2012). The smaller Eta, the larger the batches. The theory has it in (0, 1); any positive number works.
type NormTest struct {
	Eta float64
}

// Name returns "norm".
func (NormTest) Name() string { return "norm" }

// Next applies the test.
func (t NormTest) Next(s GradStats, current int) (int, bool, error) {
	if err := s.check(t.Name(), current, t.Eta); err != nil {
		return current, false, err
	}
	return s.decide(s.VarL1/(t.Eta*t.Eta*s.MeanSq), current)
}

// CoordinateTest passes when Var_j/b ≤ Eta²ḡ_j² for every coordinate j; the size that would pass is the largest of
// ⌈Var_j/(Eta²ḡ_j²)⌉. Some ḡ_j are next to 0 in practice, which asks for the largest batch at once: with a Quantile below
// 1 it is enough that this share of the coordinates passes. Coordinates without variance pass and are not counted.
type CoordinateTest struct {
	Eta      float64
	Quantile float64 // in (0, 1]; 0: 1, the paper's condition
}

// Name returns "coordinate".
func (CoordinateTest) Name() string { return "coordinate" }

// Next applies the test.
func (t CoordinateTest) Next(s GradStats, current int) (int, bool, error) {
	q := t.Quantile
	if q == 0 {
		q = 1
	}
	switch err := s.check(t.Name(), current, t.Eta); {
	case err != nil:
		return current, false, err
	case !(q > 0 && q <= 1):
		return current, false, fmt.Errorf("batchsize: coordinate test: quantile %g; use a number in (0, 1]", q)
	case len(s.Var) == 0 || len(s.Var) != len(s.Mean):
		return current, false, fmt.Errorf("batchsize: coordinate test: variances of %d coordinates and means of %d; it needs both, of as many", len(s.Var), len(s.Mean))
	}
	ratio := t.ratios(s)
	ratio = slices.DeleteFunc(ratio, func(r float64) bool { return r == 0 })
	if len(ratio) == 0 {
		return current, true, nil
	}
	for _, r := range ratio {
		if math.IsNaN(r) || r < 0 {
			return current, false, errors.New("batchsize: coordinate test: a coordinate's variance or mean is not a number; lower the learning rate")
		}
	}
	return s.decide(orderStatistic(ratio, max(0, int(math.Ceil(q*float64(len(ratio))-1e-9))-1)), current)
}

// ratios are Var_j/(Eta²ḡ_j²): 0 without variance, infinite where only the mean is 0.
func (t CoordinateTest) ratios(s GradStats) []float64 {
	out := make([]float64, len(s.Var))
	for j, v := range s.Var {
		if v != 0 {
			out[j] = v / (t.Eta * t.Eta * s.Mean[j] * s.Mean[j])
		}
	}
	return out
}

// orderStatistic returns the k-th smallest value, from 0; it reorders x. Hoare's selection with a median of three: linear,
// where sorting hundreds of thousands of coordinates at every step is not.
func orderStatistic(x []float64, k int) float64 {
	lo, hi := 0, len(x)-1
	for lo < hi {
		mid := lo + (hi-lo)/2
		a, b, c := x[lo], x[mid], x[hi]
		pivot := max(min(a, b), min(max(a, b), c))
		i, j := lo, hi
		for i <= j {
			for x[i] < pivot {
				i++
			}
			for x[j] > pivot {
				j--
			}
			if i <= j {
				x[i], x[j] = x[j], x[i]
				i, j = i+1, j-1
			}
		}
		switch {
		case k <= j:
			hi = j
		case k >= i:
			lo = i
		default:
			return x[k]
		}
	}
	return x[k]
}

// InnerProductTest looks at the noise along the gradient alone: with V of InnerStats it passes when V/b ≤ Theta²‖ḡ‖⁴
// (Bollapragada, Byrd, Nocedal 2018). It asks for smaller batches than NormTest.
type InnerProductTest struct {
	Theta float64
}

// Name returns "inner".
func (InnerProductTest) Name() string { return "inner" }

// Next applies the test.
func (t InnerProductTest) Next(s GradStats, current int) (int, bool, error) {
	if err := s.check(t.Name(), current, t.Theta); err != nil {
		return current, false, err
	}
	if err := s.Inner.check(t.Name()); err != nil {
		return current, false, err
	}
	return s.decide(s.Inner.Along/(t.Theta*t.Theta*s.MeanSq*s.MeanSq), current)
}

// AugmentedTest is the inner product test and a bound on the noise across the gradient: with W of InnerStats it also wants
// W/b ≤ Nu²‖ḡ‖² (Bollapragada, Byrd, Nocedal 2018).
type AugmentedTest struct {
	Theta, Nu float64
}

// Name returns "augmented".
func (AugmentedTest) Name() string { return "augmented" }

// Next applies the test.
func (t AugmentedTest) Next(s GradStats, current int) (int, bool, error) {
	if err := s.check(t.Name(), current, t.Theta, t.Nu); err != nil {
		return current, false, err
	}
	if err := s.Inner.check(t.Name()); err != nil {
		return current, false, err
	}
	return s.decide(max(s.Inner.Along/(t.Theta*t.Theta*s.MeanSq*s.MeanSq), s.Inner.Across/(t.Nu*t.Nu*s.MeanSq)), current)
}

func (s *InnerStats) check(name string) error {
	switch {
	case s == nil:
		return fmt.Errorf("batchsize: %s test: the spread along the gradient was not gathered", name)
	case !finite(s.Along) || !finite(s.Across) || s.Along < 0 || s.Across < 0:
		return fmt.Errorf("batchsize: %s test: variances %g along the gradient and %g across it; want finite numbers of at least 0 (lower the learning rate)", name, s.Along, s.Across)
	}
	return nil
}

// needs says which statistics beside the sums a test reads.
func needs(t Test) (vectors, inner bool) {
	switch t.(type) {
	case NormTest:
		return false, false
	case CoordinateTest:
		return true, false
	case InnerProductTest, AugmentedTest:
		return false, true
	}
	return true, true
}

// NewTest returns a test by name: norm and coordinate with threshold eta (the latter at the 0.9 quantile), inner with Theta
// = eta, augmented with Theta = eta and Nu = 1.2, the last three with the settings of the reference implementation.
func NewTest(name string, eta float64) (Test, error) {
	if !(eta > 0) || math.IsInf(eta, 0) {
		return nil, fmt.Errorf("batchsize: eta %g: must be positive; 0.1 to 0.9 is usual, and smaller means larger batches", eta)
	}
	switch name {
	case "norm":
		return NormTest{Eta: eta}, nil
	case "coordinate":
		return CoordinateTest{Eta: eta, Quantile: .9}, nil
	case "inner":
		return InnerProductTest{Theta: eta}, nil
	case "augmented":
		return AugmentedTest{Theta: eta, Nu: 1.2}, nil
	}
	return nil, fmt.Errorf("batchsize: there is no test %q; use one of norm, coordinate, inner, augmented", name)
}

// TestNames lists what NewTest knows.
func TestNames() []string { return []string{"norm", "coordinate", "inner", "augmented"} }

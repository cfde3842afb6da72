package quant

import (
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/lathe-ml/lathe/internal/stat"
)

// PowerGrid is the grid of a power law: magnitudes are quantised uniformly after they were raised to Exponent, so that
// below 1 the grid is finer near zero (Yvinec, Dapogny, Bailly, arXiv:2301.09858, eq. 5; arXiv:2308.05600). With L the
// greatest code and m the greatest magnitude,
//
//	E(w) = round(L · sign(w)·(|w|/m)^a)          half to even; |w| > m saturates; m = 0 gives 0
//	D(c) = sign(c) · m·(|c|/L)^(1/a)
//
// Power functions keep products (and nothing else does that is continuous): E without the rounding of a product is the
// product of the E, so codes multiply through small tables (MatMulLUT). Sums are not kept: they are taken after decoding.
// An exponent of 1 is the uniform symmetric grid, one of ½ decodes to signed squares of integers.
type PowerGrid struct {
	Bits     int     // 2 to 8
	Exponent float64 // a > 0
	// Unsigned takes codes 0 to 2^Bits−1 for values that are never negative, such as those behind a ReLU; else codes are
	// ±(2^(Bits−1)−1). The paper has signed grids only.
	Unsigned bool
}

// ErrExponent: the exponent of a power grid is no positive number.
var ErrExponent = errors.New("the exponent must be positive and finite")

// Check reports bits outside 2..8 and an exponent that is no positive number.
func (g PowerGrid) Check() error {
	if err := checkBits(g.Bits); err != nil {
		return err
	}
	if !(g.Exponent > 0) || math.IsInf(g.Exponent, 0) {
		return fmt.Errorf("quant: power grid: exponent %g: %w", g.Exponent, ErrExponent)
	}
	return nil
}

// Top is the greatest code, L.
func (g PowerGrid) Top() int {
	if g.Unsigned {
		return 1<<g.Bits - 1
	}
	return 1<<(g.Bits-1) - 1
}

// least is the smallest code.
func (g PowerGrid) least() int {
	if g.Unsigned {
		return 0
	}
	return -g.Top()
}

// Latent is E before rounding, L·sign(w)·(|w|/m)^a, not limited.
func (g PowerGrid) Latent(w, m float64) float64 {
	if m == 0 {
		return 0
	}
	return math.Copysign(float64(g.Top())*math.Pow(math.Abs(w)/m, g.Exponent), w)
}

// Code is E(w) for the maximum m.
func (g PowerGrid) Code(w, m float64) int {
	return int(min(max(math.RoundToEven(g.Latent(w, m)), float64(g.least())), float64(g.Top())))
}

// Level is D(c) for m = 1. Codes need be neither whole nor within the grid.
func (g PowerGrid) Level(c float64) float64 {
	return math.Copysign(math.Pow(math.Abs(c)/float64(g.Top()), 1/g.Exponent), c)
}

// Levels are D of all codes in ascending order, for m = 1.
func (g PowerGrid) Levels() []float64 {
	out := make([]float64, 0, g.Top()-g.least()+1)
	for c := g.least(); c <= g.Top(); c++ {
		out = append(out, g.Level(float64(c)))
	}
	return out
}

// Slope is the secant D(c+½) − D(c−½) for m = 1: what stands for D's derivative when codes are learned. The derivative
// itself is 0 at c = 0 for a < 1, where weights would never leave, and infinite for a > 1.
func (g PowerGrid) Slope(c int) float64 { return g.Level(float64(c)+.5) - g.Level(float64(c)-.5) }

// ExponentSlope is ∂D/∂a at c for m = 1: −D(c)·ln(|c|/L)/a², 0 at c = 0.
func (g PowerGrid) ExponentSlope(c int) float64 {
	if c == 0 {
		return 0
	}
	return -g.Level(float64(c)) * math.Log(math.Abs(float64(c))/float64(g.Top())) / (g.Exponent * g.Exponent)
}

// PowerCodes are values on power grids of one exponent, row-major, with a maximum per row (axis 0) or one for all.
type PowerCodes struct {
	PowerGrid
	Shape []int
	Max   []float64 // one per row, or one
	Codes []int16
}

// Granularity says which values share a maximum.
type Granularity int

// The granularities: weights take one maximum per row, activations one for the tensor.
const (
	PerRow Granularity = iota
	PerTensor
)

// PowerQuant puts w, row-major with output channels along axis 0, on the grid g. The maxima are those of the values'
// magnitudes; rows of zeros get codes 0. Errors: ErrBits, ErrExponent, ErrNotFinite, negative values for an unsigned grid,
// a shape that does not fit.
func PowerQuant[F float32 | float64](w []F, shape []int, g PowerGrid, granularity Granularity) (*PowerCodes, error) {
	if err := g.Check(); err != nil {
		return nil, err
	}
	m, err := rowMaxima(w, shape, granularity)
	if err != nil {
		return nil, err
	}
	p := &PowerCodes{PowerGrid: g, Shape: slices.Clone(shape), Max: m, Codes: make([]int16, len(w))}
	per := max(1, len(w)/len(m))
	for i, v := range w {
		if g.Unsigned && v < 0 {
			return nil, fmt.Errorf("quant: value %d is %g on an unsigned power grid: %w", i, v, ErrNegative)
		}
		p.Codes[i] = int16(g.Code(float64(v), m[i/per]))
	}
	return p, nil
}

// rowMaxima are the greatest magnitudes of the rows, or of all values.
func rowMaxima[F float32 | float64](w []F, shape []int, granularity Granularity) ([]float64, error) {
	axis := 0
	if granularity == PerTensor || len(shape) == 0 {
		axis = -1
	}
	l, err := newLayout(len(w), shape, axis, 0)
	if err != nil {
		return nil, err
	}
	m := make([]float64, max(1, l.groups))
	for i, v := range w {
		if v-v != 0 {
			return nil, fmt.Errorf("quant: value %d is %g: %w", i, v, ErrNotFinite)
		}
		m[l.group(i)] = max(m[l.group(i)], math.Abs(float64(v)))
	}
	return m, nil
}

// Decode returns the values of the codes.
func (p *PowerCodes) Decode() []float64 {
	levels, least := p.Levels(), p.least()
	out := make([]float64, len(p.Codes))
	per := max(1, len(out)/len(p.Max))
	for i, c := range p.Codes {
		out[i] = p.Max[i/per] * levels[int(c)-least]
	}
	return out
}

// Table is the form in which the weight is stored: codes become indices into the grid's levels, maxima the rows' scales.
func (p *PowerCodes) Table() *TableWeights {
	t := &TableWeights{Bits: p.Bits, Shape: slices.Clone(p.Shape), Codes: make([]uint8, len(p.Codes)), Tables: [][]float32{narrow(p.Levels())}}
	for i, c := range p.Codes {
		t.Codes[i] = uint8(int(c) - p.least())
	}
	t.Scale = narrow(p.Max)
	if len(t.Scale) == 1 && p.Shape[0] != 1 {
		t.Scale = slices.Repeat(t.Scale, p.Shape[0])
	}
	return t
}

// PowerGradient is what learning codes goes by: from latents theta [rows·columns], the rows' maxima m and the gradient
// gradW of the loss with respect to the decoded weight, it returns the codes c = clip(round(θ), −L, L) and the surrogate
// gradients
//
//	dθ = gradW · m·Slope(c) · 1[−L−½ ≤ θ ≤ L+½]
//	da = Σ gradW · m·ExponentSlope(c)
//
// arXiv:2308.05600 says that codes are learned over the whole range and that the exponent's gradient is made stable; the
// secant and the bounded form m·t^(1/a)·|ln t|/a² ≤ m/(e·a) are this package's choice of how.
func (g PowerGrid) PowerGradient(theta, m, gradW []float64) (codes []int16, dTheta []float64, da float64, err error) {
	if err := g.Check(); err != nil {
		return nil, nil, 0, err
	}
	if len(m) == 0 || len(theta)%len(m) != 0 || len(gradW) != len(theta) {
		return nil, nil, 0, fmt.Errorf("quant: power grid: %d latents, %d maxima and %d gradients do not fit together", len(theta), len(m), len(gradW))
	}
	t := g.tables()
	codes, dTheta = make([]int16, len(theta)), make([]float64, len(theta))
	per := len(theta) / len(m)
	for i, v := range theta {
		c := t.code(v)
		codes[i] = c
		k := int(c) - t.least
		if v >= float64(t.least)-.5 && v <= float64(t.top)+.5 {
			dTheta[i] = gradW[i] * m[i/per] * t.slope[k]
		}
		da += gradW[i] * m[i/per] * t.exponent[k]
	}
	return codes, dTheta, da, nil
}

// powerTables are the functions of a grid's codes, in ascending order.
type powerTables struct {
	least, top             int
	level, slope, exponent []float64
}

func (g PowerGrid) tables() powerTables {
	t := powerTables{least: g.least(), top: g.Top(), level: g.Levels()}
	for c := t.least; c <= t.top; c++ {
		t.slope, t.exponent = append(t.slope, g.Slope(c)), append(t.exponent, g.ExponentSlope(c))
	}
	return t
}

func (t powerTables) code(theta float64) int16 {
	return int16(min(max(math.RoundToEven(theta), float64(t.least)), float64(t.top)))
}

// SearchOptions are the knobs of SearchExponent. The zero value is the paper's search per row.
type SearchOptions struct {
	Granularity Granularity
	P           float64   // power of the error that is summed; 0: 2
	Grid        []float64 // exponents that are tried before the best one is refined; nil: 0.20, 0.25, ... 1.50
	Unsigned    bool      // values that are never negative, on unsigned grids
	// Sample is how many values of a layer are looked at, evenly spaced; larger layers' errors are scaled up. 0: 2¹⁶,
	// negative: all.
	Sample int
}

// ExponentPoint is the summed error of an exponent.
type ExponentPoint struct{ Exponent, Error float64 }

// SearchExponent finds the exponent for which rounding to the power grid loses least:
//
//	err(a) = Σ_layers Σ |W − D_a(E_a(W))|^p
//
// It scans the grid, then refines in the bracket around the best one by golden section to 1e-3, and returns the better of
// the two, with the points of the scan. Over several layers it gives the one exponent that serves them all. Where 1 is on
// the grid, the result is never worse than the uniform grid of the same bits. Cost: some 40 roundings of all values.
//
// Errors: ErrBits, ErrEmpty, ErrExponent, ErrNotFinite, shapes that do not fit.
func SearchExponent[F float32 | float64](layers [][]F, shapes [][]int, bits int, o SearchOptions) (best float64, curve []ExponentPoint, err error) {
	grid := o.Grid
	if grid == nil {
		for i := 4; i <= 30; i++ {
			grid = append(grid, float64(i)/20)
		}
	}
	if o.P == 0 {
		o.P = 2
	}
	if len(layers) == 0 || len(layers) != len(shapes) || len(grid) == 0 {
		return 0, nil, fmt.Errorf("quant: exponent search over %d layers with %d shapes and %d exponents: %w", len(layers), len(shapes), len(grid), ErrEmpty)
	}
	if !(o.P > 0) || math.IsInf(o.P, 0) {
		return 0, nil, fmt.Errorf("quant: exponent search: norm %g; accepted: a positive number, 0 for 2", o.P)
	}
	for _, a := range grid {
		if err := (PowerGrid{Bits: bits, Exponent: a}).Check(); err != nil {
			return 0, nil, err
		}
	}
	s := make([]powerSample, len(layers))
	for i, w := range layers {
		if s[i], err = newPowerSample(w, shapes[i], o); err != nil {
			return 0, nil, fmt.Errorf("layer %d: %w", i, err)
		}
	}
	loss := func(a float64) (sum float64) {
		for _, l := range s {
			sum += l.error(PowerGrid{Bits: bits, Exponent: a, Unsigned: o.Unsigned}, o.P)
		}
		return sum
	}
	at := 0
	for i, a := range grid {
		curve = append(curve, ExponentPoint{a, loss(a)})
		if curve[i].Error < curve[at].Error {
			at = i
		}
	}
	best = curve[at].Exponent
	sorted := slices.Sorted(slices.Values(grid))
	i, _ := slices.BinarySearch(sorted, best)
	lo, hi := sorted[max(i-1, 0)], sorted[min(i+1, len(sorted)-1)]
	steps := int(math.Ceil(math.Log((hi-lo)*1e3) / math.Log(math.Phi)))
	if a := stat.GoldenSection(loss, lo, hi, max(steps, 0)); loss(a) < curve[at].Error {
		best = a
	}
	return best, curve, nil
}

// powerSample is what the search needs of a layer: magnitudes as shares of their maximum, and the maxima.
type powerSample struct {
	log    []float64 // ln(|w|/m), −Inf at 0
	share  []float64 // |w|/m
	weight []float64 // m
	scale  float64   // values that one of the sample stands for
}

func newPowerSample[F float32 | float64](w []F, shape []int, o SearchOptions) (powerSample, error) {
	if len(w) == 0 {
		return powerSample{}, fmt.Errorf("quant: exponent search: %w", ErrEmpty)
	}
	m, err := rowMaxima(w, shape, o.Granularity)
	if err != nil {
		return powerSample{}, err
	}
	n := o.Sample
	if n == 0 {
		n = 1 << 16
	}
	if n < 0 || n > len(w) {
		n = len(w)
	}
	s := powerSample{make([]float64, n), make([]float64, n), make([]float64, n), float64(len(w)) / float64(n)}
	per := max(1, len(w)/len(m))
	for k := range n {
		i := k
		if n < len(w) {
			i = int((float64(k) + .5) * s.scale)
		}
		if s.weight[k] = m[i/per]; m[i/per] > 0 {
			s.share[k] = math.Abs(float64(w[i])) / m[i/per]
		}
		s.log[k] = math.Log(s.share[k])
	}
	return s, nil
}

func (s powerSample) error(g PowerGrid, p float64) (sum float64) {
	top := float64(g.Top())
	levels := g.Levels()[-g.least():] // of the codes from 0 up
	for k, t := range s.share {
		var power float64
		if g.Exponent == 1 {
			power = t
		} else {
			power = expNegative(g.Exponent * s.log[k])
		}
		d := math.Abs(t-levels[int(math.RoundToEven(min(top*power, top)))]) * s.weight[k]
		if p == 2 {
			sum += d * d
		} else {
			sum += math.Pow(d, p)
		}
	}
	return sum * s.scale
}

package calibrate

import (
	"fmt"
	"math"

	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/internal/stat"
)

// PairedOverlap draws from an Overlap whose regions are Gaussians around random centres: class y is uniform; with
// probability Mass the point comes from the region that the classes of y's group share, otherwise from y's own. The exact
// probabilities of the classes are known. It has the properties that the theorems of arXiv:2306.00740 use; the geometry of
// the paper's own definition differs.
type PairedOverlap struct {
	Overlap
	Dim   int     // of the points; 0: 20
	Sigma float64 // standard deviation around the centres, which are N(0, I); 0: 0.5
	// Ball draws uniformly from balls around the centres instead, of the radius that holds the same mean square distance.
	Ball bool

	own, shared [][]float64 // centres of the classes and of the groups
}

// NewPairedOverlap checks a law and draws its centres from the seed. Groups must divide the classes evenly: an odd number
// of classes has no pairs.
func NewPairedOverlap(l PairedOverlap, seed uint64) (*PairedOverlap, error) {
	if l.Group == 0 {
		l.Group = 2
	}
	if l.Dim == 0 {
		l.Dim = 20
	}
	if l.Sigma == 0 {
		l.Sigma = .5
	}
	if _, err := l.Theory(1); err != nil {
		return nil, err
	}
	switch {
	case l.Classes%l.Group != 0:
		return nil, fmt.Errorf("calibrate: %d classes do not divide into groups of %d", l.Classes, l.Group)
	case l.Dim < 1 || l.Dim > 1<<16 || l.Classes > 1<<16:
		return nil, fmt.Errorf("calibrate: %d classes in %d dimensions; want 2 to 65536 and 1 to 65536", l.Classes, l.Dim)
	case !(l.Sigma > 0) || math.IsInf(l.Sigma, 0):
		return nil, fmt.Errorf("calibrate: standard deviation %g; want a positive number", l.Sigma)
	}
	r := rng.New(seed, "overlap/centres")
	draw := func(n int) [][]float64 {
		out := make([][]float64, n)
		for i := range out {
			out[i] = make([]float64, l.Dim)
			for j := range out[i] {
				out[i][j] = r.NormFloat64()
			}
		}
		return out
	}
	l.own, l.shared = draw(l.Classes), draw(l.Classes/l.Group)
	return &l, nil
}

// radius is that of the balls: E|u|² = R² d/(d+2) of a uniform ball equals dσ².
func (l *PairedOverlap) radius() float64 { return l.Sigma * math.Sqrt(float64(l.Dim+2)) }

// Sample draws n points [n, Dim] and their classes.
func (l *PairedOverlap) Sample(r *rng.Rand, n int) (x []float32, y []int32) {
	x, y = make([]float32, n*l.Dim), make([]int32, n)
	step := make([]float64, l.Dim)
	for i := range n {
		c := r.IntN(l.Classes)
		y[i] = int32(c)
		centre := l.own[c]
		if r.Float64() < l.Mass {
			centre = l.shared[c/l.Group]
		}
		norm := 0.
		for j := range step {
			step[j] = r.NormFloat64()
			norm += step[j] * step[j]
		}
		scale := l.Sigma
		if l.Ball {
			scale = l.radius() * math.Pow(r.Float64(), 1/float64(l.Dim)) / math.Sqrt(norm)
		}
		for j, s := range step {
			x[i*l.Dim+j] = float32(centre[j] + scale*s)
		}
	}
	return x, y
}

// Posterior returns the exact probabilities of the classes at points [n, Dim], [n, Classes].
func (l *PairedOverlap) Posterior(x []float32) ([]float64, error) {
	if len(x)%l.Dim != 0 {
		return nil, fmt.Errorf("calibrate: %d numbers are not points of %d dimensions", len(x), l.Dim)
	}
	n := len(x) / l.Dim
	out := make([]float64, n*l.Classes)
	ownMass, sharedMass := math.Log1p(-l.Mass), math.Log(l.Mass) // -Inf where a region is never drawn from
	shared := make([]float64, len(l.shared))
	for i := range n {
		p := x[i*l.Dim : (i+1)*l.Dim]
		for g, c := range l.shared {
			shared[g] = sharedMass + l.logDensity(p, c)
		}
		row := out[i*l.Classes : (i+1)*l.Classes]
		for c := range row {
			row[c] = logAdd(ownMass+l.logDensity(p, l.own[c]), shared[c/l.Group])
		}
		if math.IsInf(stat.LogSumExp(row), -1) { // outside all balls: nothing is known
			for c := range row {
				row[c] = 0
			}
		}
		stat.Softmax(row, row)
	}
	return out, nil
}

// logDensity of a region around c, up to a constant.
func (l *PairedOverlap) logDensity(x []float32, c []float64) float64 {
	sq := 0.
	for j, v := range x {
		d := float64(v) - c[j]
		sq += d * d
	}
	if !l.Ball {
		return -sq / (2 * l.Sigma * l.Sigma)
	}
	if math.Sqrt(sq) > l.radius()*(1+1e-6) { // points are float32
		return math.Inf(-1)
	}
	return 0
}

func logAdd(a, b float64) float64 { return stat.LogSumExp([]float64{a, b}) }

// TwoGaussians is the law of two overlapping classes N(0, I) and N(δ·1, I) in Dim dimensions, each half of the points
// (arXiv:2306.00740, section 5.1).
type TwoGaussians struct {
	Dim   int     // 0: 300
	Delta float64 // distance of the means in every dimension; the paper: 0.25, 0.1, 0.05, 0.01
}

func (l TwoGaussians) dim() int {
	if l.Dim == 0 {
		return 300
	}
	return l.Dim
}

// Sample draws n points [n, Dim] and their classes.
func (l TwoGaussians) Sample(r *rng.Rand, n int) (x []float32, y []int32) {
	d := l.dim()
	x, y = make([]float32, n*d), make([]int32, n)
	for i := range n {
		y[i] = int32(r.IntN(2))
		for j := range d {
			x[i*d+j] = float32(r.NormFloat64() + l.Delta*float64(y[i]))
		}
	}
	return x, y
}

// Posterior returns the exact probabilities of the two classes at points [n, Dim], [n, 2]: that of the second is
// sigmoid(δ Σx − ½ Dim δ²).
func (l TwoGaussians) Posterior(x []float32) ([]float64, error) {
	d := l.dim()
	if d < 1 || len(x)%d != 0 {
		return nil, fmt.Errorf("calibrate: %d numbers are not points of %d dimensions", len(x), d)
	}
	out := make([]float64, 0, 2*len(x)/d)
	for at := 0; at < len(x); at += d {
		s := -float64(d) * l.Delta * l.Delta / 2
		for _, v := range x[at : at+d] {
			s += l.Delta * float64(v)
		}
		row := []float64{0, s}
		stat.Softmax(row, row)
		out = append(out, row...)
	}
	return out, nil
}

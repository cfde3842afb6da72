package calibrate

import (
	"fmt"
	"math"

	"github.com/lathe-ml/lathe/internal/metric"
	"github.com/lathe-ml/lathe/internal/rng"
)

// LogitGap returns z_y − max_{c≠y} z_c of every row of logits [n, classes]: how far the label's logit stands above the
// others, negative where the prediction is wrong.
func LogitGap[F metric.Float](logits []F, classes int, labels []int) ([]float64, error) {
	if err := checkLogits(logits, classes, labels); err != nil {
		return nil, err
	}
	out := make([]float64, len(labels))
	for i, y := range labels {
		best := math.Inf(-1)
		for c, v := range logits[i*classes : (i+1)*classes] {
			if c != y {
				best = max(best, float64(v))
			}
		}
		out[i] = float64(logits[i*classes+y]) - best
	}
	return out, nil
}

// LogitGapProbe measures how the logit gap of a network decays around its training points. Gaps that persist are what
// makes temperature scaling fail where classes overlap (arXiv:2306.00740, assumption 3.3 and section 5).
type LogitGapProbe struct {
	Directions int       // random points per radius, dealt out over the training points; 0: 500
	Radii      []float64 // distances from the training points; nil: 10 values from 0 to 10
	Seed       uint64    // of the directions, which are the same for every radius
}

// GapPoint is the mean gap at a radius.
type GapPoint struct {
	Radius float64 `json:"radius"`
	Gap    float64 `json:"gap"`
	StdErr float64 `json:"std_err"` // of the mean
}

// Measure moves points [n, dim] along random directions and returns the mean gap of the points' labels at each radius.
// logits is the network: points [m, dim] in, logits [m, classes] out.
func (p LogitGapProbe) Measure(points []float32, dim int, labels []int, classes int, logits func(x []float32) ([]float32, error)) ([]GapPoint, error) {
	if p.Directions == 0 {
		p.Directions = 500
	}
	if p.Radii == nil {
		for i := range 10 {
			p.Radii = append(p.Radii, 10*float64(i)/9)
		}
	}
	switch {
	case dim < 1 || len(labels) == 0 || len(points) != len(labels)*dim:
		return nil, fmt.Errorf("calibrate: %d numbers for %d labelled points of %d dimensions; want dim for each, and at least one", len(points), len(labels), dim)
	case p.Directions < 1 || p.Directions > 1<<20:
		return nil, fmt.Errorf("calibrate: %d directions; want 1 to %d, 500 is usual", p.Directions, 1<<20)
	}
	for _, r := range p.Radii {
		if !(r >= 0) || math.IsInf(r, 0) {
			return nil, fmt.Errorf("calibrate: radius %g; want at least 0", r)
		}
	}
	r := rng.New(p.Seed, "probe")
	direction := make([]float64, p.Directions*dim)
	y := make([]int, p.Directions)
	base := make([]int, p.Directions)
	order := r.Perm(len(labels))
	for i := range p.Directions {
		base[i] = order[i%len(order)]
		y[i] = labels[base[i]]
		d := direction[i*dim : (i+1)*dim]
		norm := 0.
		for norm == 0 {
			for j := range d {
				d[j] = r.NormFloat64()
				norm += d[j] * d[j]
			}
		}
		for j := range d {
			d[j] /= math.Sqrt(norm)
		}
	}
	x := make([]float32, p.Directions*dim)
	var out []GapPoint
	for _, radius := range p.Radii {
		for i, b := range base {
			for j := range dim {
				x[i*dim+j] = points[b*dim+j] + float32(radius*direction[i*dim+j])
			}
		}
		z, err := logits(x)
		if err != nil {
			return nil, err
		}
		gaps, err := LogitGap(z, classes, y)
		if err != nil {
			return nil, err
		}
		mean, square := 0., 0.
		for _, g := range gaps {
			mean += g / float64(len(gaps))
		}
		for _, g := range gaps {
			square += (g - mean) * (g - mean)
		}
		n := float64(len(gaps))
		out = append(out, GapPoint{radius, mean, math.Sqrt(square / max(n-1, 1) / n)})
	}
	return out, nil
}

// NearestNeighbourDistance is the mean Euclidean distance of points [n, dim] to their nearest other point, at least two
// points; the work grows with n².
func NearestNeighbourDistance(points []float32, dim int) (float64, error) {
	if dim < 1 || len(points)%dim != 0 || len(points)/dim < 2 {
		return 0, fmt.Errorf("calibrate: %d numbers are not two or more points of %d dimensions", len(points), dim)
	}
	n := len(points) / dim
	best := make([]float64, n)
	for i := range best {
		best[i] = math.Inf(1)
	}
	for i := range n {
		for k := range i {
			s := 0.
			for j := range dim {
				d := float64(points[i*dim+j]) - float64(points[k*dim+j])
				s += d * d
			}
			best[i], best[k] = min(best[i], s), min(best[k], s)
		}
	}
	sum := 0.
	for _, s := range best {
		sum += math.Sqrt(s)
	}
	return sum / float64(n), nil
}

package cluster

import (
	"fmt"
	"math"
	"slices"
	"sort"
)

// Line is Lloyd's k-means of numbers, started at their quantiles (k+½)/K, interpolated linearly. Sorted centroids stay
// sorted, so a step costs O(K log n) after the numbers have been sorted once. A centroid without numbers stays where it
// is; of two equally near ones the lower index wins.
type Line struct {
	K       int // centroids, at least 1; more than numbers are allowed, and repeat them
	MaxIter int // updates of the centroids; 0: 100
}

// LineResult is a clustering of numbers.
type LineResult struct {
	Centroids  []float64 // ascending; empty ones and repetitions included
	Assignment []int     // nearest centroid of each number, the lowest among equals
	Objective  []float64 // sum of squared distances at each assignment, the last one that of the result
	Converged  bool      // a fixed point was reached within MaxIter
}

// Fit clusters x. Errors: no numbers, one that is not finite, K below 1.
func (l Line) Fit(x []float64) (*LineResult, error) {
	if l.K < 1 {
		return nil, fmt.Errorf("cluster: %d centroids; at least one is needed", l.K)
	}
	if len(x) == 0 {
		return nil, fmt.Errorf("cluster: no numbers; at least one is needed")
	}
	for i, v := range x {
		if math.IsNaN(v) || math.IsInf(v, 0) {
			return nil, fmt.Errorf("cluster: number %d is %g; all must be finite", i, v)
		}
	}
	sorted := slices.Sorted(slices.Values(x))
	sum, squares := make([]float64, len(x)+1), make([]float64, len(x)+1)
	for i, v := range sorted {
		sum[i+1], squares[i+1] = sum[i]+v, squares[i]+v*v
	}
	r := &LineResult{Centroids: make([]float64, l.K)}
	for k := range r.Centroids {
		at := (float64(k) + .5) / float64(l.K) * float64(len(x)-1)
		i := int(at)
		r.Centroids[k] = sorted[i] + (at-float64(i))*(sorted[min(i+1, len(x)-1)]-sorted[i])
	}
	iterations := l.MaxIter
	if iterations <= 0 {
		iterations = 100
	}
	ends, previous := make([]int, l.K), make([]int, l.K)
	for step := 0; ; step++ {
		r.bounds(sorted, ends)
		objective, from := 0., 0
		for k, c := range r.Centroids {
			n := float64(ends[k] - from)
			objective += squares[ends[k]] - squares[from] - 2*c*(sum[ends[k]]-sum[from]) + n*c*c
			from = ends[k]
		}
		r.Objective = append(r.Objective, max(objective, 0))
		if step > 0 && slices.Equal(ends, previous) {
			r.Converged = true
			break
		}
		if step == iterations {
			break
		}
		copy(previous, ends)
		from = 0
		for k := range r.Centroids {
			if n := ends[k] - from; n > 0 {
				r.Centroids[k] = (sum[ends[k]] - sum[from]) / float64(n)
			}
			from = ends[k]
		}
	}
	r.Assignment = make([]int, len(x))
	for i, v := range x {
		r.Assignment[i] = Nearest(r.Centroids, v)
	}
	return r, nil
}

// bounds finds where each centroid's numbers end.
func (r *LineResult) bounds(sorted []float64, ends []int) {
	from := 0
	for k := range r.Centroids {
		if k == len(r.Centroids)-1 {
			ends[k] = len(sorted)
			return
		}
		n := sort.Search(len(sorted)-from, func(i int) bool { return Nearest(r.Centroids, sorted[from+i]) > k })
		from += n
		ends[k] = from
	}
}

// Nearest is the index of the centroid, of ascending ones, that lies nearest to x, the lowest among equals.
func Nearest(centroids []float64, x float64) int {
	j := sort.SearchFloat64s(centroids, x) // the first that is not below x
	if j == len(centroids) || j > 0 && x-centroids[j-1] <= centroids[j]-x {
		j--
	}
	for j > 0 && centroids[j-1] == centroids[j] {
		j--
	}
	return j
}

// Package cluster groups points: Lloyd's k-means, Euclidean or spherical.
package cluster

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"

	"gonum.org/v1/gonum/floats"
	"gonum.org/v1/gonum/mat"

	"github.com/lathe-ml/lathe/internal/rng"
)

// EmptyRule says what becomes of a cluster that no point is nearest to.
type EmptyRule int

const (
	// EmptyFarthest gives it the point that is farthest from its own centroid (the lowest index among equals), so that k
	// clusters stay in use.
	EmptyFarthest EmptyRule = iota
	// EmptyKeep leaves its centroid where it is.
	EmptyKeep
	// EmptyDrop leaves its centroid where it is until the end, then removes the cluster and renumbers the others.
	EmptyDrop
)

// KMeans is Lloyd's algorithm: assign every point to its nearest centroid, set every centroid to the mean of its points,
// repeat. It finds a local optimum of Σ dist(xᵢ, c(xᵢ)) that depends on the start; Restarts keeps the best of several.
// One iteration costs O(n·k·d). All ties go to the lowest index, and the result depends on the seed alone, not on the
// number of processors.
type KMeans struct {
	K         int        // number of clusters, 1 to n; ignored when Init is given
	Spherical bool       // points and centroids on the unit sphere, distance 1-cos, instead of the squared Euclidean one
	Init      *mat.Dense // start from these centroids [k, d]; nil: k-means++ (Arthur and Vassilvitskii, SODA 2007)
	Restarts  int        // runs from different k-means++ starts, the best is kept; 0: 1
	MaxIter   int        // 0: 100
	// Tol stops the iteration when the centroids' squared shifts sum to at most Tol times the mean variance of the
	// features (scikit-learn's rule). 0: only a fixed point stops it before MaxIter.
	Tol   float64
	Empty EmptyRule
	Seed  uint64
}

// Result is a clustering of n points.
type Result struct {
	Centroids  *mat.Dense // [k, d]; unit rows when spherical
	Assignment []int      // cluster of each point
	Distance   []float64  // of each point to its centroid: 1-cos in [0, 2], or squared Euclidean
	Size       []int      // points per cluster
	Objective  []float64  // sum of distances at each assignment, the last one that of the result
	Iterations int        // updates of the centroids
	Converged  bool       // reached a fixed point or Tol within MaxIter
}

// Inertia is the sum of distances of all points to their centroids.
func (r *Result) Inertia() float64 { return floats.Sum(r.Distance) }

// UnitRows returns x with every row scaled to length 1. A row of zeros, or one that holds NaN or Inf, is an error that
// names its index.
func UnitRows(x mat.Matrix) (*mat.Dense, error) {
	n, d := x.Dims()
	out := mat.DenseCopyOf(x)
	for i := range n {
		row := out.RawRowView(i)[:d]
		// scaled by the largest entry first, so that neither tiny nor huge rows lose their length
		largest := 0.
		for j, v := range row {
			if math.IsNaN(v) || math.IsInf(v, 0) {
				return nil, fmt.Errorf("cluster: row %d column %d is %g; all values must be finite", i, j, v)
			}
			largest = max(largest, math.Abs(v))
		}
		if largest == 0 {
			return nil, fmt.Errorf("cluster: row %d has length 0, so it has no direction; remove it or use Euclidean distances", i)
		}
		for j := range row {
			row[j] /= largest
		}
		floats.Scale(1/math.Sqrt(floats.Dot(row, row)), row)
	}
	return out, nil
}

// Assign returns the nearest centroid of every point and the distance to it. Spherical normalises both first.
func Assign(x, centroids *mat.Dense, spherical bool) (assignment []int, distance []float64, err error) {
	if err := check(x, centroids); err != nil {
		return nil, nil, err
	}
	if spherical {
		if x, err = UnitRows(x); err != nil {
			return nil, nil, err
		}
		if centroids, err = UnitRows(centroids); err != nil {
			return nil, nil, fmt.Errorf("centroids: %w", err)
		}
	}
	n, _ := x.Dims()
	assignment, distance = make([]int, n), make([]float64, n)
	assign(x, centroids, spherical, assignment, distance)
	return assignment, distance, nil
}

func check(x, centroids *mat.Dense) error {
	if x == nil || x.IsEmpty() {
		return fmt.Errorf("cluster: no points; at least one row is needed")
	}
	n, d := x.Dims()
	for i := range n {
		for j, v := range x.RawRowView(i) {
			if math.IsNaN(v) || math.IsInf(v, 0) {
				return fmt.Errorf("cluster: row %d column %d is %g; all values must be finite", i, j, v)
			}
		}
	}
	if centroids == nil {
		return nil
	}
	if centroids.IsEmpty() {
		return fmt.Errorf("cluster: no centroids; at least one is needed")
	}
	if k, cd := centroids.Dims(); cd != d {
		return fmt.Errorf("cluster: %d centroids of %d features for points of %d features; both must agree", k, cd, d)
	}
	return nil
}

// Fit clusters the rows of x [n, d]. It returns ctx's error when it is cancelled between iterations.
func (m KMeans) Fit(ctx context.Context, x *mat.Dense) (*Result, error) {
	if err := check(x, m.Init); err != nil {
		return nil, err
	}
	n, _ := x.Dims()
	k := m.K
	if m.Init != nil {
		k, _ = m.Init.Dims()
	}
	if k < 1 || k > n {
		return nil, fmt.Errorf("cluster: %d clusters of %d points; use 1 to %d", k, n, n)
	}
	if m.Spherical {
		var err error
		if x, err = UnitRows(x); err != nil {
			return nil, err
		}
	}
	restarts := max(m.Restarts, 1)
	if m.Init != nil {
		restarts = 1
	}
	r := rng.New(m.Seed, "kmeans")
	var best *Result
	for range restarts {
		c, err := m.start(x, k, r)
		if err != nil {
			return nil, err
		}
		res, err := m.lloyd(ctx, x, c)
		if err != nil {
			return nil, err
		}
		if best == nil || res.Inertia() < best.Inertia() {
			best = res
		}
	}
	if m.Empty == EmptyDrop {
		best.dropEmpty()
	}
	return best, nil
}

// start returns the first centroids: those given, or k-means++, which draws each next one with probability
// proportional to its distance from the nearest one chosen so far.
func (m KMeans) start(x *mat.Dense, k int, r *rand.Rand) (*mat.Dense, error) {
	if m.Init != nil {
		if m.Spherical {
			c, err := UnitRows(m.Init)
			if err != nil {
				return nil, fmt.Errorf("centroids: %w", err)
			}
			return c, nil
		}
		return mat.DenseCopyOf(m.Init), nil
	}
	n, d := x.Dims()
	c := mat.NewDense(k, d, nil)
	nearest := make([]float64, n)
	for i := range nearest {
		nearest[i] = math.Inf(1)
	}
	at := r.IntN(n)
	for j := range k {
		if j > 0 {
			total := floats.Sum(nearest)
			if total == 0 {
				return nil, fmt.Errorf("cluster: %d clusters, but the %d points have only %d distinct positions; use at most %d clusters", k, n, j, j)
			}
			u := r.Float64() * total
			at = -1
			for i, dist := range nearest {
				if dist > 0 {
					at = i // the last one with a distance, should rounding leave u positive
					if u -= dist; u < 0 {
						break
					}
				}
			}
		}
		c.SetRow(j, x.RawRowView(at))
		chosen := c.RawRowView(j)
		for i := range n {
			dist := m.distance(x.RawRowView(i), chosen)
			if m.Spherical && dist < 1e-12 {
				dist = 0 // the same direction but for rounding
			}
			nearest[i] = min(nearest[i], dist)
		}
	}
	return c, nil
}

func (m KMeans) distance(a, b []float64) float64 {
	if m.Spherical {
		return max(0, 1-floats.Dot(a, b))
	}
	return squared(a, b, math.Inf(1))
}

func (m KMeans) lloyd(ctx context.Context, x, c *mat.Dense) (*Result, error) {
	n, _ := x.Dims()
	k, _ := c.Dims()
	maxIter := m.MaxIter
	if maxIter <= 0 {
		maxIter = 100
	}
	tol := 0.
	if m.Tol > 0 {
		tol = m.Tol * meanVariance(x)
	}
	res := &Result{Centroids: c, Assignment: make([]int, n), Distance: make([]float64, n), Size: make([]int, k)}
	previous := make([]int, n)
	old := mat.NewDense(c.RawMatrix().Rows, c.RawMatrix().Cols, nil)
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		copy(previous, res.Assignment)
		assign(x, c, m.Spherical, res.Assignment, res.Distance)
		moved := m.count(x, res, res.Iterations == maxIter)
		res.Objective = append(res.Objective, res.Inertia())
		if res.Converged || res.Iterations == maxIter {
			return res, nil
		}
		if res.Iterations > 0 && !moved && slices.Equal(previous, res.Assignment) {
			res.Converged = true // the centroids are those of this assignment already
			return res, nil
		}
		old.Copy(c)
		m.update(x, res)
		res.Iterations++
		if tol > 0 {
			shift := 0.
			for j := range k {
				shift += squared(old.RawRowView(j), c.RawRowView(j), math.Inf(1))
			}
			res.Converged = shift <= tol // one more assignment makes the result consistent
		}
	}
}

// count fills Size and gives empty clusters a point when the rule says so; it reports whether a point was moved. When
// no update of the centroids follows (last), the moved point itself becomes the centroid.
func (m KMeans) count(x *mat.Dense, res *Result, last bool) (moved bool) {
	clear(res.Size)
	for _, a := range res.Assignment {
		res.Size[a]++
	}
	if m.Empty != EmptyFarthest {
		return false
	}
	last = last || res.Converged
	for j, size := range res.Size {
		if size > 0 {
			continue
		}
		far := -1
		for i, d := range res.Distance {
			if res.Size[res.Assignment[i]] > 1 && (far < 0 || d > res.Distance[far]) {
				far = i
			}
		}
		if far < 0 {
			return moved
		}
		res.Size[res.Assignment[far]]--
		res.Assignment[far], res.Distance[far] = j, 0
		res.Size[j], moved = 1, true
		if last {
			res.Centroids.SetRow(j, x.RawRowView(far))
		}
	}
	return moved
}

// update sets every centroid to the mean of its points, re-normalised when spherical. A cluster without points, or
// whose unit vectors cancel, keeps its centroid.
func (m KMeans) update(x *mat.Dense, res *Result) {
	k, d := res.Centroids.Dims()
	sum := mat.NewDense(k, d, nil)
	for i, a := range res.Assignment {
		floats.Add(sum.RawRowView(a), x.RawRowView(i))
	}
	for j := range k {
		if res.Size[j] == 0 {
			continue
		}
		row := sum.RawRowView(j)
		length := float64(res.Size[j])
		if m.Spherical {
			norm := math.Sqrt(floats.Dot(row, row))
			if norm <= 1e-12*length {
				continue
			}
			length = norm
		}
		floats.Scale(1/length, row)
		res.Centroids.SetRow(j, row)
	}
}

func (r *Result) dropEmpty() {
	k, d := r.Centroids.Dims()
	to := make([]int, k)
	var kept []float64
	var size []int
	for j := range k {
		if r.Size[j] == 0 {
			continue
		}
		to[j] = len(size)
		size = append(size, r.Size[j])
		kept = append(kept, r.Centroids.RawRowView(j)...)
	}
	for i, a := range r.Assignment {
		r.Assignment[i] = to[a]
	}
	r.Size, r.Centroids = size, mat.NewDense(len(size), d, kept)
}

// assign finds every point's nearest centroid, the lowest index among equals, on all processors.
func assign(x, c *mat.Dense, spherical bool, assignment []int, distance []float64) {
	n, _ := x.Dims()
	k, _ := c.Dims()
	const block = 64
	next := make(chan int, (n+block-1)/block)
	for lo := 0; lo < n; lo += block {
		next <- lo
	}
	close(next)
	work := func() {
		for lo := range next {
			for i := lo; i < min(lo+block, n); i++ {
				row := x.RawRowView(i)
				best, at := math.Inf(1), 0
				for j := range k {
					var dist float64
					if spherical {
						dist = max(0, 1-floats.Dot(row, c.RawRowView(j)))
					} else {
						dist = squared(row, c.RawRowView(j), best)
					}
					if dist < best {
						best, at = dist, j
					}
				}
				assignment[i], distance[i] = at, best
			}
		}
	}
	var wg sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), len(next)) - 1 {
		wg.Go(work)
	}
	work()
	wg.Wait()
}

// squared returns ‖a-b‖², or something no smaller than limit as soon as the partial sum reaches it.
func squared(a, b []float64, limit float64) (s float64) {
	for len(a) > 16 {
		for j, v := range a[:16] {
			d := v - b[j]
			s += d * d
		}
		if s >= limit {
			return s
		}
		a, b = a[16:], b[16:]
	}
	for j, v := range a {
		d := v - b[j]
		s += d * d
	}
	return s
}

func meanVariance(x *mat.Dense) float64 {
	n, d := x.Dims()
	mean, total := make([]float64, d), 0.
	for i := range n {
		floats.Add(mean, x.RawRowView(i))
	}
	floats.Scale(1/float64(n), mean)
	for i := range n {
		total += squared(x.RawRowView(i), mean, math.Inf(1))
	}
	return total / float64(n*d)
}

package cluster

import (
	"context"
	"math"
	"runtime"
	"slices"
	"strings"
	"testing"

	"gonum.org/v1/gonum/mat"

	"github.com/lathe-ml/lathe/internal/rng"
)

func blobs(n, k, d int, noise float64) (*mat.Dense, []int) {
	r := rng.New(1, "blobs")
	x, y := mat.NewDense(n, d, nil), make([]int, n)
	centers := mat.NewDense(k, d, nil)
	for j := range k {
		for f := range d {
			centers.Set(j, f, r.NormFloat64())
		}
	}
	for i := range n {
		y[i] = i % k
		for f := range d {
			x.Set(i, f, centers.At(y[i], f)+noise*r.NormFloat64())
		}
	}
	return x, y
}

func fit(t *testing.T, m KMeans, x *mat.Dense) *Result {
	t.Helper()
	r, err := m.Fit(context.Background(), x)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestKMeansRecoversSeparatedBlobs(t *testing.T) {
	x, y := blobs(120, 4, 20, 0.05)
	for _, spherical := range []bool{false, true} {
		r := fit(t, KMeans{K: 4, Spherical: spherical, Restarts: 10, Tol: 1e-4, MaxIter: 300}, x)
		name := map[int]int{}
		for i, a := range r.Assignment {
			if want, ok := name[y[i]]; ok && want != a {
				t.Fatalf("spherical %v: point %d of blob %d is in cluster %d, others in %d", spherical, i, y[i], a, want)
			}
			name[y[i]] = a
		}
		if len(name) != 4 || !slices.Equal(r.Size, []int{30, 30, 30, 30}) || !r.Converged {
			t.Errorf("spherical %v: sizes %v, converged %v", spherical, r.Size, r.Converged)
		}
	}
}

func TestObjectiveNeverIncreases(t *testing.T) {
	x, _ := blobs(300, 7, 5, 0.7)
	for _, spherical := range []bool{false, true} {
		for seed := range uint64(5) {
			r := fit(t, KMeans{K: 12, Spherical: spherical, Seed: seed}, x)
			for i := 1; i < len(r.Objective); i++ {
				if r.Objective[i] > r.Objective[i-1]+1e-9 {
					t.Fatalf("spherical %v seed %d: objective rose from %g to %g", spherical, seed, r.Objective[i-1], r.Objective[i])
				}
			}
			a, d, err := Assign(x, r.Centroids, spherical)
			if err != nil || !slices.Equal(a, r.Assignment) || !slices.Equal(d, r.Distance) && spherical == false {
				t.Errorf("the result is not the assignment to its own centroids (%v)", err)
			}
		}
	}
}

func TestResultDependsOnSeedOnly(t *testing.T) {
	x, _ := blobs(500, 5, 33, 1)
	a := fit(t, KMeans{K: 6, Seed: 3}, x)
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	b := fit(t, KMeans{K: 6, Seed: 3}, x)
	if !slices.Equal(a.Assignment, b.Assignment) || !mat.Equal(a.Centroids, b.Centroids) {
		t.Error("one processor gives another clustering than several")
	}
}

func TestSphericalIgnoresLength(t *testing.T) {
	x, _ := blobs(60, 3, 4, 0.5)
	y := mat.DenseCopyOf(x)
	for i := range 60 {
		for j, v := range y.RawRowView(i) {
			y.Set(i, j, v*math.Ldexp(1, i%9-4))
		}
	}
	a, b := fit(t, KMeans{K: 5, Spherical: true}, x), fit(t, KMeans{K: 5, Spherical: true}, y)
	if !slices.Equal(a.Assignment, b.Assignment) {
		t.Error("scaling the points changed the clustering")
	}
}

func TestEmptyRules(t *testing.T) {
	x := mat.NewDense(4, 1, []float64{0, 1, 2, 10})
	init := mat.NewDense(3, 1, []float64{1, 100, 200}) // nothing is near the last two
	if r := fit(t, KMeans{Init: init}, x); slices.Contains(r.Size, 0) {
		t.Errorf("farthest point: sizes %v", r.Size)
	}
	if r := fit(t, KMeans{Init: init, Empty: EmptyKeep}, x); !slices.Equal(r.Size, []int{4, 0, 0}) || r.Centroids.At(1, 0) != 100 {
		t.Errorf("keep: sizes %v, centroid %g", r.Size, r.Centroids.At(1, 0))
	}
	init = mat.NewDense(3, 1, []float64{-50, 1, 200})
	if r := fit(t, KMeans{Init: init, Empty: EmptyDrop}, x); !slices.Equal(r.Size, []int{4}) || r.Assignment[3] != 0 {
		t.Errorf("drop: sizes %v, assignment %v", r.Size, r.Assignment)
	}
}

func TestTiesGoToTheLowestIndex(t *testing.T) {
	a, d, err := Assign(mat.NewDense(1, 1, []float64{0}), mat.NewDense(3, 1, []float64{2, 1, -1}), false)
	if err != nil || a[0] != 1 || d[0] != 1 {
		t.Errorf("got cluster %v at %v (%v), want 1 at 1", a, d, err)
	}
}

func TestFitRefuses(t *testing.T) {
	ones := mat.NewDense(5, 2, []float64{1, 1, 2, 2, 1, 1, 3, 3, 1, 1})
	for _, c := range []struct {
		name string
		m    KMeans
		x    *mat.Dense
		want string
	}{
		{"no points", KMeans{K: 1}, &mat.Dense{}, "no points"},
		{"k above n", KMeans{K: 6}, ones, "use 1 to 5"},
		{"k zero", KMeans{}, ones, "use 1 to 5"},
		{"one direction", KMeans{K: 2, Spherical: true}, ones, "1 distinct"},
		{"three positions", KMeans{K: 4}, ones, "3 distinct"},
		{"NaN", KMeans{K: 1}, mat.NewDense(2, 1, []float64{1, math.NaN()}), "row 1 column 0"},
		{"zero row", KMeans{K: 1, Spherical: true}, mat.NewDense(2, 2, []float64{1, 1, 0, 0}), "row 1 has length 0"},
		{"init shape", KMeans{Init: mat.NewDense(1, 3, nil)}, ones, "3 features"},
	} {
		if _, err := c.m.Fit(context.Background(), c.x); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want an error with %q", c.name, err, c.want)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := (KMeans{K: 2}).Fit(ctx, ones); err == nil {
		t.Error("a cancelled context must stop the fit")
	}
}

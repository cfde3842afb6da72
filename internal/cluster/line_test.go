package cluster_test

import (
	"context"
	"math"
	"slices"
	"testing"

	"gonum.org/v1/gonum/mat"

	"github.com/lathe-ml/lathe/internal/cluster"
	"github.com/lathe-ml/lathe/internal/rng"
)

func TestLineIsLloydOnNumbers(t *testing.T) {
	r := rng.New(1, "line")
	for n := 1; n < 60; n += 7 {
		x := make([]float64, n)
		for i := range x {
			x[i] = math.Round(8*r.NormFloat64()) / 8 // with ties
		}
		for _, k := range []int{1, 2, 3, 5, 8} {
			got, err := cluster.Line{K: k, MaxIter: 50}.Fit(x)
			if err != nil {
				t.Fatal(err)
			}
			sorted := slices.Sorted(slices.Values(x))
			init := mat.NewDense(k, 1, nil)
			for j := range k {
				at := (float64(j) + .5) / float64(k) * float64(n-1)
				i := int(at)
				init.Set(j, 0, sorted[i]+(at-float64(i))*(sorted[min(i+1, n-1)]-sorted[i]))
			}
			want, err := cluster.KMeans{Init: init, MaxIter: 50, Empty: cluster.EmptyKeep}.Fit(context.Background(), mat.NewDense(n, 1, slices.Clone(x)))
			if k > n {
				if err == nil {
					t.Error("the general routine takes more clusters than points")
				}
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			for j := range k {
				if d := got.Centroids[j] - want.Centroids.At(j, 0); math.Abs(d) > 1e-12 {
					t.Errorf("n %d, k %d: centroid %d is %g, want %g", n, k, j, got.Centroids[j], want.Centroids.At(j, 0))
				}
			}
			if !slices.Equal(got.Assignment, want.Assignment) {
				t.Errorf("n %d, k %d: %v, want %v", n, k, got.Assignment, want.Assignment)
			}
		}
	}
}

func TestLineNeverGetsWorse(t *testing.T) {
	r := rng.New(2, "line")
	x := make([]float64, 500)
	for i := range x {
		x[i] = r.NormFloat64() * math.Exp(r.NormFloat64())
	}
	res, err := cluster.Line{K: 8}.Fit(x)
	if err != nil || !res.Converged {
		t.Fatal(res, err)
	}
	for i := 1; i < len(res.Objective); i++ {
		if res.Objective[i] > res.Objective[i-1]*(1+1e-12) {
			t.Errorf("step %d: %g after %g", i, res.Objective[i], res.Objective[i-1])
		}
	}
	sum, n := make([]float64, 8), make([]float64, 8)
	for i, a := range res.Assignment {
		sum[a] += x[i]
		n[a]++
	}
	for k, c := range res.Centroids {
		if math.Abs(sum[k]/n[k]-c) > 1e-12 {
			t.Errorf("centroid %d is %g, its numbers' mean is %g", k, c, sum[k]/n[k])
		}
	}
}

func TestLineTakesFewNumbers(t *testing.T) {
	for name, x := range map[string][]float64{"one": {3}, "constant": {2, 2, 2, 2, 2}, "two": {-1, 1}} {
		res, err := cluster.Line{K: 4}.Fit(x)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if res.Objective[len(res.Objective)-1] > 1e-12 {
			t.Errorf("%s: objective %v", name, res.Objective)
		}
		for i, a := range res.Assignment {
			if res.Centroids[a] != x[i] || a > 0 && res.Centroids[a-1] == x[i] {
				t.Errorf("%s: %g is given to %d of %v", name, x[i], a, res.Centroids)
			}
		}
	}
	for name, x := range map[string][]float64{"none": nil, "nan": {1, math.NaN()}, "inf": {math.Inf(1)}} {
		if _, err := (cluster.Line{K: 2}).Fit(x); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if _, err := (cluster.Line{}).Fit([]float64{1}); err == nil {
		t.Error("no centroids were accepted")
	}
}

package curate

import (
	"context"
	"math"
	"testing"

	"gonum.org/v1/gonum/floats"

	"github.com/lathe-ml/lathe/internal/rng"
)

func TestMaxMarginOfTwoPoints(t *testing.T) {
	// separated by the bisector: w·x = 1 on both
	w, err := maxMargin(context.Background(), [][]float64{{2, 0}, {0, 1}})
	if err != nil || math.Abs(w[0]-0.5) > 1e-4 || math.Abs(w[1]-1) > 1e-4 {
		t.Errorf("got %v (%v), want [0.5 1]", w, err)
	}
}

func TestMaxMarginSatisfiesItsConditions(t *testing.T) {
	r := rng.New(1, "test")
	x := make([][]float64, 200)
	for i := range x {
		x[i] = make([]float64, 20)
		for j := range x[i] {
			x[i][j] = r.NormFloat64()
		}
		if x[i][0] < 0 {
			floats.Scale(-1, x[i])
		}
	}
	w, err := maxMargin(context.Background(), x)
	if err != nil {
		t.Fatal(err)
	}
	// any other separating direction has a smaller margin
	margin := func(w []float64) float64 {
		least := math.Inf(1)
		for _, row := range x {
			least = min(least, floats.Dot(w, row)/floats.Norm(w, 2))
		}
		return least
	}
	best := margin(w)
	if math.Abs(best-1/floats.Norm(w, 2)) > 1e-4 {
		t.Errorf("margin %g, want 1/‖w‖ = %g", best, 1/floats.Norm(w, 2))
	}
	for range 200 {
		v := make([]float64, len(w))
		for j := range v {
			v[j] = w[j] + 0.02*floats.Norm(w, 2)*r.NormFloat64()
		}
		if m := margin(v); m > best+1e-6 {
			t.Fatalf("another direction has margin %g, more than %g", m, best)
		}
	}
}

package linalg_test

import (
	"errors"
	"math"
	"testing"

	"gonum.org/v1/gonum/mat"

	"github.com/lathe-ml/lathe/internal/linalg"
)

func TestInverseUpperFactorsTheInverse(t *testing.T) {
	a := mat.NewSymDense(3, []float64{4, 1, .5, 1, 3, .2, .5, .2, 2})
	c, added, err := linalg.Cholesky(a, linalg.Damping{})
	if err != nil || added != 0 {
		t.Fatal(added, err)
	}
	u, err := linalg.InverseUpper(c)
	if err != nil {
		t.Fatal(err)
	}
	var inv, one mat.Dense
	inv.Mul(u.T(), u)
	one.Mul(&inv, a)
	for i := range 3 {
		for j := range 3 {
			want := 0.
			if i == j {
				want = 1
			}
			if math.Abs(one.At(i, j)-want) > 1e-12 || i > j && u.At(i, j) != 0 {
				t.Errorf("(%d,%d): UᵀUA = %g, U = %g", i, j, one.At(i, j), u.At(i, j))
			}
		}
	}
}

func TestDampingMakesASingularMatrixPositive(t *testing.T) {
	a := mat.NewSymDense(2, []float64{1, 1, 1, 1}) // rank 1
	if _, _, err := linalg.Cholesky(a, linalg.Damping{}); err == nil {
		t.Fatal("a singular matrix was factored")
	} else if e := (*linalg.SingularError)(nil); !errors.As(err, &e) || e.Size != 2 || math.Abs(e.Smallest) > 1e-12 {
		t.Errorf("error %v", err)
	}
	if _, added, err := linalg.Cholesky(a, linalg.Damping{Relative: .01}); err != nil || added != .01 {
		t.Errorf("added %g: %v", added, err)
	}
	minus := mat.NewSymDense(1, []float64{-1})
	if _, added, err := linalg.Cholesky(minus, linalg.Damping{Absolute: .02, Retries: 3, Grow: 10}); err != nil || math.Abs(added-2) > 1e-9 {
		t.Errorf("grown to %g: %v", added, err)
	}
	if _, added, err := linalg.Cholesky(minus, linalg.Damping{Absolute: .3, Retries: 3}); err != nil || math.Abs(added-1.2) > 1e-9 {
		t.Errorf("added again to %g: %v", added, err)
	}
	if _, _, err := linalg.Cholesky(mat.NewSymDense(1, []float64{math.NaN()}), linalg.Damping{Absolute: 1}); err == nil {
		t.Error("NaN was factored")
	}
}

func TestGramIsTheSecondMoment(t *testing.T) {
	x := make([]float32, 700*2)
	want := [3]float64{}
	for i := range 700 {
		a, b := float32(i%7)-3, float32(i%5)
		x[2*i], x[2*i+1] = a, b
		want[0] += float64(a * a)
		want[1] += float64(a * b)
		want[2] += float64(b * b)
	}
	s := mat.NewSymDense(2, nil)
	for _, part := range [][]float32{x[:600], x[600:]} {
		if err := linalg.Gram(s, part, 2); err != nil {
			t.Fatal(err)
		}
	}
	if s.At(0, 0) != want[0] || s.At(0, 1) != want[1] || s.At(1, 0) != want[1] || s.At(1, 1) != want[2] {
		t.Errorf("got %v, want %v", mat.Formatted(s), want)
	}
	if linalg.Gram(s, x[:3], 2) == nil {
		t.Error("three values passed as rows of two")
	}
}

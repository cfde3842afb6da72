package rng_test

import (
	"math"
	"testing"

	"github.com/lathe-ml/lathe/internal/rng"
)

func TestStreamsDependOnSeedAndName(t *testing.T) {
	a := rng.New(1, "data").Uint64()
	if a != rng.New(1, "data").Uint64() {
		t.Error("one stream, two values")
	}
	if a == rng.New(2, "data").Uint64() || a == rng.New(1, "init").Uint64() {
		t.Error("streams coincide")
	}
}

func TestOrthogonal(t *testing.T) {
	const n = 24
	q := rng.Orthogonal(rng.New(3, "q"), n)
	for i := range n {
		for j := range n {
			dot, want := 0., 0.
			for k := range n {
				dot += q[i*n+k] * q[j*n+k]
			}
			if i == j {
				want = 1
			}
			if math.Abs(dot-want) > 1e-12 {
				t.Fatalf("row %d·row %d = %g", i, j, dot)
			}
		}
	}
}

func TestNormalAndUniform(t *testing.T) {
	d := make([]float32, 20000)
	rng.Normal(rng.New(1, "n"), d, 2)
	sum, sq := 0., 0.
	for _, v := range d {
		sum += float64(v)
		sq += float64(v) * float64(v)
	}
	if m, s := sum/20000, math.Sqrt(sq/20000); math.Abs(m) > .05 || math.Abs(s-2) > .05 {
		t.Errorf("mean %g, deviation %g", m, s)
	}
	rng.Uniform(rng.New(1, "u"), d, -1, 3)
	for _, v := range d {
		if v < -1 || v >= 3 {
			t.Fatalf("%g is not in [-1, 3)", v)
		}
	}
}

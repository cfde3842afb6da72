package nn_test

import (
	"math"
	"testing"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/nn"
)

// lowered runs one op on float32 values.
func lowered(t *testing.T, op nn.Op, v []float32, dims ...int) ([]float32, error) {
	t.Helper()
	b := nn.NewBuilder(1)
	net, err := b.Finish(b.Add("y", op, b.Input("x", shapes.Make(dtypes.Float32, dims...))))
	if err != nil {
		return nil, err
	}
	out, err := net.Run(enginetest.Backend(), []*tensors.Tensor{tensors.FromFlatDataAndDimensions(v, dims...)})
	if err != nil {
		return nil, err
	}
	return nn.Floats(out[0]), nil
}

// TestRoPEDependsOnDistance: the product of a query at s and a key at t depends on s−t alone, position 0 is left as it
// is, and lengths are kept (arXiv:2104.09864, section 3.2).
func TestRoPEDependsOnDistance(t *testing.T) {
	const tokens, heads, width = 9, 2, 8
	r := rng.New(1, "rope")
	one := make([]float32, heads*width)
	q, k := make([]float32, 0), make([]float32, 0)
	for _, v := range []*[]float32{&q, &k} {
		rng.Normal(r, one, 1)
		for range tokens {
			*v = append(*v, one...)
		}
	}
	rq, err := lowered(t, nn.RoPE{}, q, 1, tokens, heads, width)
	if err != nil {
		t.Fatal(err)
	}
	rk, err := lowered(t, nn.RoPE{}, k, 1, tokens, heads, width)
	if err != nil {
		t.Fatal(err)
	}
	at := func(v []float32, token, head int) []float32 { return v[(token*heads+head)*width:][:width] }
	dot := func(a, b []float32) (s float64) {
		for i := range a {
			s += float64(a[i]) * float64(b[i])
		}
		return s
	}
	for h := range heads {
		for i, x := range at(rq, 0, h) {
			if x != at(q, 0, h)[i] {
				t.Errorf("head %d, feature %d at position 0 is %v, was %v", h, i, x, at(q, 0, h)[i])
			}
		}
		for s := range tokens {
			if a, b := dot(at(rq, s, h), at(rq, s, h)), dot(at(q, s, h), at(q, s, h)); math.Abs(a-b) > 1e-5*b {
				t.Errorf("the square of position %d is %v, was %v", s, a, b)
			}
			for u := range s + 1 {
				if a, b := dot(at(rq, s, h), at(rk, u, h)), dot(at(rq, s-u, h), at(rk, 0, h)); math.Abs(a-b) > 1e-5 {
					t.Errorf("head %d: positions %d and %d give %v, their distance from 0 gives %v", h, s, u, a, b)
				}
			}
		}
	}
	// The pair (j, j+h) turns by t·base^(−2j/width): at 1 with j = 0 by one radian, with j = 1 by 10000^(−1/4).
	x, err := lowered(t, nn.RoPE{}, []float32{0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0}, 1, 2, 1, 8)
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range map[int]float64{8: math.Cos(1), 12: math.Sin(1), 9: math.Cos(.1), 13: math.Sin(.1)} {
		if math.Abs(float64(x[i])-want) > 1e-6 {
			t.Errorf("element %d is %v, want %v", i, x[i], want)
		}
	}
	if _, err := lowered(t, nn.RoPE{}, make([]float32, 6), 1, 2, 1, 3); err == nil {
		t.Error("an odd width was accepted")
	}
}

func TestCausalMaskHidesTheFuture(t *testing.T) {
	v := []float32{1, 2, 3, 4, 5, 6}
	y, err := lowered(t, nn.CausalMask{}, v, 2, 3) // the two last queries of three
	if err != nil {
		t.Fatal(err)
	}
	for i, x := range y {
		if hidden := i == 2; hidden != (x < -1e8) || !hidden && x != v[i] {
			t.Errorf("element %d is %v", i, x)
		}
	}
	if _, err := lowered(t, nn.CausalMask{}, v, 3, 2); err == nil {
		t.Error("more queries than keys were accepted")
	}
}

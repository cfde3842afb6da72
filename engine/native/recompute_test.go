package native_test

import (
	"math/rand/v2"
	"slices"
	"testing"

	. "github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine/native"
)

// TestRectifiersKeepNoMasks takes the gradient of a scaled, shifted and clipped product: neither the affine values nor the
// clipped ones nor the masks need memory until the gradient reads them.
func TestRectifiersKeepNoMasks(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	matrix := func(rows, cols int) [][]float32 {
		m := make([][]float32, rows)
		for i := range m {
			m[i] = make([]float32, cols)
			for j := range m[i] {
				m[i][j] = float32(r.NormFloat64())
			}
		}
		return m
	}
	x, w, gain, w2 := matrix(64, 24), matrix(24, 40), matrix(1, 40), matrix(40, 8)
	run := func(from int) (out [][]float32, report native.Report) {
		b := native.OpenFrom(t, "threads=2", from)
		b.Observe(func(r native.Report) { report = r })
		for _, o := range call(t, b, func(in []*Node) []*Node {
			g := in[0].Graph()
			h := AddScalar(Mul(Dot(in[0], in[1]).MatMul(), in[2]), 0.1)
			h = Min(Max(h, scalar(g, 0)), scalar(g, 1.5))
			loss := ReduceAllSum(Square(Dot(h, in[3]).MatMul()))
			return append(Gradient(loss, in[0], in[1], in[2], in[3]), loss)
		}, x, w, gain, w2) {
			out = append(out, tensors.MustCopyFlatData[float32](o))
		}
		return out, report
	}
	kept, plain := run(0)
	again, lean := run(64 * 40)
	if !slices.EqualFunc(kept, again, slices.Equal[[]float32]) {
		t.Error("computing values again changed a result")
	}
	// the product, what is clipped and its gradient remain
	if most := plain.Arena - 2*4*64*40; lean.Arena > most {
		t.Errorf("%d bytes with values computed again, %d without: want at most %d", lean.Arena, plain.Arena, most)
	}
}

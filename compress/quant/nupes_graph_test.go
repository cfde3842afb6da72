package quant

import (
	"math"
	"testing"
)

func TestPowerQuantizeEqualsItsGrid(t *testing.T) {
	x := normal(9, 4*6, 6)
	for _, op := range []PowerQuantize{{Bits: 4, Exponent: .5}, {Bits: 2, Exponent: 1}, {Bits: 8, Exponent: .37}, {Bits: 6, Exponent: 1.4, Unsigned: true}} {
		v := make([]float32, len(x))
		for i, u := range x {
			if v[i] = u; op.Unsigned {
				v[i] = max(u, 0)
			}
		}
		v[3] = 0
		g := op.Grid()
		const m = 1.7
		for i, got := range runOp(t, op, v, []float64{m}, nil) {
			want := m * g.Level(float64(g.Code(float64(v[i]), m)))
			if math.Abs(float64(got)-want) > 1e-6 {
				t.Errorf("%+v: %g becomes %g, want %g", op, v[i], got, want)
			}
		}
	}
}

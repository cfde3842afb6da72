package half_test

import (
	"math"
	"testing"

	"github.com/lathe-ml/lathe/internal/half"
)

// TestEveryHalfIsItsValue computes all 65536 values from sign, exponent and mantissa.
func TestEveryHalfIsItsValue(t *testing.T) {
	for h := range 1 << 16 {
		exp, man := h>>10&31, float64(h&1023)
		want := math.Ldexp(1024+man, exp-25)
		switch {
		case exp == 0:
			want = math.Ldexp(man, -24)
		case exp == 31 && man == 0:
			want = math.Inf(1)
		case exp == 31:
			want = math.NaN()
		}
		if h>>15 == 1 {
			want = -want
		}
		got := float64(half.FromF16(uint16(h)))
		if got != want && !(math.IsNaN(got) && math.IsNaN(want)) || math.Signbit(got) != (h>>15 == 1) {
			t.Errorf("%#04x is %g, want %g", h, got, want)
		}
		if b := half.FromBF16(uint16(h)); math.Float32bits(b) != uint32(h)<<16 {
			t.Errorf("bfloat16 %#04x is %g", h, b)
		}
	}
}

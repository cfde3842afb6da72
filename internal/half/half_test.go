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

// TestRoundingToHalf finds every half again, and rounds what lies between two of them to the nearer, or to the even one.
func TestRoundingToHalf(t *testing.T) {
	for h := range 0x7c00 {
		for sign := uint16(0); sign <= 0x8000; sign += 0x8000 {
			a := uint16(h) | sign
			x := half.FromF16(a)
			if got := half.ToF16(x); got != a {
				t.Fatalf("%g is %#04x, want %#04x", x, got, a)
			}
			next := float32(65536)
			if h < 0x7bff {
				next = half.FromF16(uint16(h) + 1)
			}
			if sign != 0 {
				next = -next
			}
			even := a + a&1
			for _, c := range []struct {
				x    float32
				want uint16
			}{{x + .25*(next-x), a}, {x + .5*(next-x), even}, {x + .75*(next-x), a + 1}} {
				if got := half.ToF16(c.x); got != c.want {
					t.Fatalf("%g is %#04x, want %#04x", c.x, got, c.want)
				}
			}
			if sign == 0x8000 {
				break
			}
		}
	}
	for x, want := range map[float32]uint16{float32(math.Inf(1)): 0x7c00, float32(math.Inf(-1)): 0xfc00, 1e30: 0x7c00, 1e-30: 0} {
		if got := half.ToF16(x); got != want {
			t.Errorf("%g is %#04x, want %#04x", x, got, want)
		}
	}
	if got := half.ToF16(float32(math.NaN())); got&0x7c00 != 0x7c00 || got&0x3ff == 0 {
		t.Errorf("NaN is %#04x", got)
	}
}

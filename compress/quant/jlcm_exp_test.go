package quant

import (
	"math"
	"testing"
)

func TestFastExponential(t *testing.T) {
	for x := 0.; x > -79; x -= .0137 {
		if got, want := expNegative(x), math.Exp(x); math.Abs(got-want) > 1e-12*want {
			t.Fatalf("exp(%g) = %g, want %g", x, got, want)
		}
	}
	if expNegative(-1000) != 0 || expNegative(math.Inf(-1)) != 0 || expNegative(0) != 1 {
		t.Error("exp of −1000, −∞ or 0")
	}
}

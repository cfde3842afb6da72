package data

import (
	"math"
	"slices"
	"testing"
)

func TestPartnerNoise(t *testing.T) {
	const n, classes = 20_000, 7
	y := make([]int32, n)
	for i := range y {
		y[i] = int32(i % classes)
	}
	for _, eta := range []float64{0, .25, 1} {
		noisy, partner, err := PartnerNoise(y, classes, eta, 3, "train")
		if err != nil {
			t.Fatal(err)
		}
		flipped := 0.
		for i, l := range noisy {
			switch l {
			case y[i]:
			case partner[y[i]]:
				flipped++
			default:
				t.Fatalf("label %d became %d, neither itself nor its partner %d", y[i], l, partner[y[i]])
			}
		}
		if math.Abs(flipped/n-eta) > .01 {
			t.Errorf("eta %g: %g of the labels changed", eta, flipped/n)
		}
		for c, p := range partner {
			if int(p) == c || p < 0 || p >= classes {
				t.Errorf("the partner of class %d is %d", c, p)
			}
		}
		other, same, _ := PartnerNoise(y, classes, eta, 3, "test")
		if !slices.Equal(same, partner) {
			t.Error("another stream has other partners")
		}
		if eta == .25 && slices.Equal(other, noisy) {
			t.Error("another stream has the same flips")
		}
	}
	if y[0] != 0 || y[1] != 1 {
		t.Error("the labels given were changed")
	}
}

func TestPartnerNoiseRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		labels  []int32
		classes int
		eta     float64
	}{"one class": {nil, 1, 0}, "eta": {nil, 2, 1.5}, "NaN": {nil, 2, math.NaN()}, "label": {[]int32{2}, 2, 0}, "negative": {[]int32{-1}, 2, 0}} {
		if _, _, err := PartnerNoise(c.labels, c.classes, c.eta, 0, ""); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestUniformNoise(t *testing.T) {
	const n, classes = 20_000, 5
	y := make([]int32, n)
	for i := range y {
		y[i] = int32(i % classes)
	}
	var before []int32
	for _, q := range []float64{0, .4, 1} {
		noisy, err := UniformNoise(y, classes, q, 3, "train")
		if err != nil {
			t.Fatal(err)
		}
		wrong := 0.
		for i, l := range noisy {
			if l < 0 || l >= classes {
				t.Fatalf("label %d", l)
			}
			if l != y[i] {
				wrong++
			}
			if before != nil && before[i] != y[i] && l == y[i] {
				t.Fatalf("example %d is wrong at a lower q and right at %g", i, q)
			}
		}
		if want := q * (classes - 1) / classes; math.Abs(wrong/n-want) > .01 {
			t.Errorf("q %g: %g of the labels are wrong, want %g", q, wrong/n, want)
		}
		again, _ := UniformNoise(y, classes, q, 3, "train")
		other, _ := UniformNoise(y, classes, q, 3, "test")
		if !slices.Equal(again, noisy) || q > 0 && slices.Equal(other, noisy) {
			t.Errorf("q %g: the noise is not one of seed and stream", q)
		}
		before = noisy
	}
	for name, c := range map[string]struct {
		labels  []int32
		classes int
		q       float64
	}{"one class": {nil, 1, 0}, "q": {nil, 2, 1.5}, "below 0": {nil, 2, -.1}, "NaN": {nil, 2, math.NaN()}, "label": {[]int32{2}, 2, 0}, "negative": {[]int32{-1}, 2, 0}} {
		if _, err := UniformNoise(c.labels, c.classes, c.q, 0, ""); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

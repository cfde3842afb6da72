package metric

import (
	"math"
	"testing"
)

func TestSpearman(t *testing.T) {
	for _, c := range []struct {
		x, y []float64
		want float64
	}{
		{[]float64{1, 2, 3}, []float64{10, 20, 400}, 1},
		{[]float64{1, 2, 3}, []float64{3, 2, 1}, -1},
		// ranks 1 2.5 2.5 4 5 and 1 2 3.5 5 3.5: Σdx·dy = 7.25, Σdx² = Σdy² = 9.5
		{[]float64{1, 2, 2, 4, 5}, []float64{5, 6, 7, 8, 7}, 7.25 / 9.5},
	} {
		if got := Spearman(c.x, c.y); math.Abs(got-c.want) > 1e-12 {
			t.Errorf("%v %v: %v, want %v", c.x, c.y, got, c.want)
		}
	}
	for _, c := range [][2][]float64{{{1}, {1}}, {{1, 2}, {3, 3}}, {{1, 2}, {1}}} {
		if got := Spearman(c[0], c[1]); !math.IsNaN(got) {
			t.Errorf("%v: %v, want NaN", c, got)
		}
	}
}

package compress_test

import (
	"errors"
	"math"
	"slices"
	"testing"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/internal/rng"
)

// bruteForce tries every allocation.
func bruteForce(size []float64, delta [][]float64, bits []int, fits func(size, loss float64) bool, better func(size, loss, bestSize, bestLoss float64) bool) (float64, float64) {
	bestSize, bestLoss := math.Inf(1), math.Inf(1)
	n := int(math.Pow(float64(len(bits)), float64(len(size))))
	for code := range n {
		s, l, c := 0., 0., code
		for i := range size {
			k := c % len(bits)
			c /= len(bits)
			s += size[i] * float64(bits[k])
			l += delta[i][k]
		}
		if fits(s, l) && better(s, l, bestSize, bestLoss) {
			bestSize, bestLoss = s, l
		}
	}
	return bestSize, bestLoss
}

func TestAllocationIsExact(t *testing.T) {
	r := rng.New(1, "allocation")
	bits := []int{8, 4, 2}
	for trial := range 40 {
		n := 1 + trial%6
		size, delta := make([]float64, n), make([][]float64, n)
		full := 0.
		for i := range size {
			size[i] = float64(1 + r.IntN(50))
			full += 8 * size[i]
			d := r.Float64()
			delta[i] = []float64{0, max(d*r.Float64(), 1e-6), max(d*(1+r.Float64()), 1e-6)}
		}
		last := math.Inf(1)
		for _, share := range []float64{.25, .3, .5, .7, .9, 1} {
			a, err := compress.AllocateBits(size, delta, bits, share*full)
			if err != nil {
				t.Fatal(err)
			}
			_, want := bruteForce(size, delta, bits, func(s, _ float64) bool { return s <= share*full+1e-9 }, func(_, l, _, best float64) bool { return l < best })
			if math.Abs(a.Loss-want) > 1e-12 || a.Size > share*full+1e-6 {
				t.Errorf("%d sites, %g of the size: loss %g, the best is %g", n, share, a.Loss, want)
			}
			if a.Loss > last {
				t.Errorf("the loss rises from %g to %g with the budget", last, a.Loss)
			}
			last = a.Loss
			if share == 1 && slices.ContainsFunc(a.Bits, func(b int) bool { return b != 8 }) {
				t.Errorf("the full budget gives %v", a.Bits)
			}
			dual, err := compress.AllocateSmallest(size, delta, bits, a.Loss)
			if err != nil {
				t.Fatal(err)
			}
			if dual.Size > a.Size || dual.Loss > a.Loss+1e-9 {
				t.Errorf("the dual finds size %g for a loss of %g where %g is enough", dual.Size, a.Loss, a.Size)
			}
		}
		if _, err := compress.AllocateBits(size, delta, bits, full/4-1); !errors.Is(err, compress.ErrInfeasible) {
			t.Errorf("a budget below the minimum: %v", err)
		}
		if _, err := compress.AllocateSmallest(size, delta, bits, -1); !errors.Is(err, compress.ErrInfeasible) {
			t.Errorf("a negative allowance: %v", err)
		}
	}
}

func TestAllocationRefuses(t *testing.T) {
	ok := [][]float64{{0, 1}, {0, 1}}
	for name, c := range map[string]struct {
		size   []float64
		delta  [][]float64
		bits   []int
		budget float64
	}{
		"nothing":       {nil, nil, []int{8, 4}, 1},
		"ragged":        {[]float64{1, 1}, [][]float64{{0, 1}, {0}}, []int{8, 4}, 100},
		"rows":          {[]float64{1}, ok, []int{8, 4}, 100},
		"negative size": {[]float64{1, -1}, ok, []int{8, 4}, 100},
		"NaN loss":      {[]float64{1, 1}, [][]float64{{0, math.NaN()}, {0, 1}}, []int{8, 4}, 100},
		"NaN budget":    {[]float64{1, 1}, ok, []int{8, 4}, math.NaN()},
		"no bits":       {[]float64{1, 1}, [][]float64{{}, {}}, nil, 100},
		"zero bits":     {[]float64{1, 1}, ok, []int{8, 0}, 100},
	} {
		if _, err := compress.AllocateBits(c.size, c.delta, c.bits, c.budget); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

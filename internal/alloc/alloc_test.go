package alloc_test

import (
	"errors"
	"math"
	"testing"

	"github.com/lathe-ml/lathe/internal/alloc"
	"github.com/lathe-ml/lathe/internal/rng"
)

// all enumerates every choice.
func all(items [][]alloc.Option) (points []alloc.Point) {
	choice := make([]int, len(items))
	for {
		p := alloc.Point{Choice: append([]int{}, choice...)}
		for i, k := range choice {
			p.Size += items[i][k].Size
			p.Cost += items[i][k].Cost
		}
		points = append(points, p)
		i := 0
		for ; i < len(items); i++ {
			if choice[i]++; choice[i] < len(items[i]) {
				break
			}
			choice[i] = 0
		}
		if i == len(items) {
			return points
		}
	}
}

func random(seed uint64, n int) (items [][]alloc.Option) {
	r := rng.New(seed, "alloc")
	for range n {
		var opts []alloc.Option
		for range 1 + r.IntN(4) {
			opts = append(opts, alloc.Option{Size: float64(r.IntN(20)), Cost: float64(r.IntN(50)) - 10})
		}
		items = append(items, opts)
	}
	return items
}

func TestFrontierIsThatOfEnumeration(t *testing.T) {
	for seed := range uint64(200) {
		items := random(seed, int(seed%7))
		front, err := alloc.Frontier(items, alloc.Options{})
		if err != nil {
			t.Fatal(err)
		}
		points := all(items)
		for i, p := range front {
			if i > 0 && !(p.Size > front[i-1].Size && p.Cost < front[i-1].Cost) {
				t.Fatalf("seed %d: point %d is no step along a frontier: %v", seed, i, front)
			}
		}
		for _, q := range points {
			covered := false
			for _, p := range front {
				covered = covered || p.Size <= q.Size && p.Cost <= q.Cost
			}
			if !covered {
				t.Fatalf("seed %d: %v is not covered by %v", seed, q, front)
			}
		}
		for _, budget := range []float64{0, 13, 40, 1e9} {
			got, err := alloc.WithinSize(items, budget)
			best := math.Inf(1)
			for _, q := range points {
				if q.Size <= budget {
					best = min(best, q.Cost)
				}
			}
			if math.IsInf(best, 1) != errors.Is(err, alloc.ErrInfeasible) || err == nil && got.Cost != best {
				t.Fatalf("seed %d, budget %g: cost %g (%v), best %g", seed, budget, got.Cost, err, best)
			}
			small := math.Inf(1)
			for _, q := range points {
				if q.Cost <= budget-20 {
					small = min(small, q.Size)
				}
			}
			got, err = alloc.WithinCost(items, budget-20)
			if math.IsInf(small, 1) != errors.Is(err, alloc.ErrInfeasible) || err == nil && got.Size != small {
				t.Fatalf("seed %d, cost %g: size %g (%v), smallest %g", seed, budget-20, got.Size, err, small)
			}
		}
	}
}

func TestBucketsBoundTheFrontier(t *testing.T) {
	r := rng.New(1, "buckets")
	var items [][]alloc.Option
	for range 60 {
		var opts []alloc.Option
		for k := range 3 {
			opts = append(opts, alloc.Option{Size: float64(k+1) * (1 + r.Float64()), Cost: r.Float64() / float64(k+1)})
		}
		items = append(items, opts)
	}
	front, err := alloc.Frontier(items, alloc.Options{Buckets: 512})
	if err != nil {
		t.Fatal(err)
	}
	if len(front) > 512 || len(front) < 100 {
		t.Errorf("%d points of at most 512", len(front))
	}
	p, err := alloc.BySize(front, 150)
	if err != nil || p.Size > 150 || p.Size < 140 {
		t.Errorf("size %g for a budget of 150: %v", p.Size, err)
	}
}

func TestRefuses(t *testing.T) {
	for name, items := range map[string][][]alloc.Option{
		"no option": {{{1, 1}}, {}}, "negative size": {{{-1, 1}}}, "no number": {{{1, math.NaN()}}}, "endless": {{{math.Inf(1), 1}}},
	} {
		if _, err := alloc.Frontier(items, alloc.Options{}); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	p, err := alloc.WithinSize([][]alloc.Option{{{3, 1}, {5, 0}}}, 2)
	if !errors.Is(err, alloc.ErrInfeasible) || p.Size != 3 {
		t.Errorf("%v %v: the least feasible choice is returned with the error", p, err)
	}
}

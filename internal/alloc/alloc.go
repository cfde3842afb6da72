// Package alloc chooses one option per item under a budget: bits for each layer, for example. Costs are assumed to add
// up, so the result is exact for the sum and should be reported beside what is measured afterwards.
package alloc

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"slices"
)

// ErrInfeasible: no choice meets the limit. The error that wraps it names the least one that can be met.
var ErrInfeasible = errors.New("no choice meets the limit")

// Option is one possibility for an item: what it takes from the budget, and what it costs.
type Option struct{ Size, Cost float64 }

// Point is one choice for all items.
type Point struct {
	Size, Cost float64 // sums
	Choice     []int   // the option of each item
}

// Limits of what is worth computing exactly.
const (
	maxItems  = 1 << 16
	maxPoints = 1 << 21 // kept choices of one step
)

// Options of a frontier.
type Options struct {
	// Buckets, if positive, rounds sizes up to multiples of 1/Buckets of the largest total before items are combined, which
	// bounds the number of points kept; sizes and budgets of the result are the true ones. 0: exact.
	Buckets int
}

// Frontier returns every choice that no other one equals or beats in both sums, by size: sizes rise strictly, costs fall
// strictly. Items are combined one after the other, keeping what may still become optimal (Cai et al.,
// arXiv:2001.00281, appendix); options of equal sums lose to the one with the smaller index.
func Frontier(items [][]Option, o Options) ([]Point, error) {
	if err := check(items); err != nil {
		return nil, err
	}
	grain := 0.
	if o.Buckets > 0 {
		top := 0.
		for _, opts := range items {
			top += slices.MaxFunc(opts, func(a, b Option) int { return cmp.Compare(a.Size, b.Size) }).Size
		}
		grain = top / float64(o.Buckets)
	}
	front := []state{{back: -1}}
	var history [][]state
	for _, opts := range items {
		history = append(history, front)
		next := make([]state, 0, len(front)*len(opts))
		for b, s := range front {
			for k, opt := range opts {
				next = append(next, state{s.size + opt.Size, s.cost + opt.Cost, int32(k), int32(b)})
			}
		}
		front = undominated(next, grain)
		if len(front) > maxPoints {
			return nil, fmt.Errorf("alloc: more than %d choices are optimal for some budget; round sizes with Buckets", maxPoints)
		}
	}
	out := make([]Point, len(front))
	for i, s := range front {
		p := Point{Choice: make([]int, len(items))}
		for at := len(items) - 1; at >= 0; at-- {
			p.Choice[at] = int(s.option)
			s = history[at][s.back]
		}
		for j, k := range p.Choice { // in the items' order, so that a caller who adds up gets the same number
			p.Size += items[j][k].Size
			p.Cost += items[j][k].Cost
		}
		out[i] = p
	}
	return out, nil
}

// state is a choice for the first items, linked to the one for all but the last of them.
type state struct {
	size, cost float64
	option     int32
	back       int32
}

func check(items [][]Option) error {
	if len(items) > maxItems {
		return fmt.Errorf("alloc: %d items; at most %d are allowed", len(items), maxItems)
	}
	for i, opts := range items {
		if len(opts) == 0 {
			return fmt.Errorf("alloc: item %d has no option", i)
		}
		for k, o := range opts {
			if !(o.Size >= 0) || math.IsInf(o.Size, 0) || math.IsNaN(o.Cost) || math.IsInf(o.Cost, 0) {
				return fmt.Errorf("alloc: option %d of item %d has size %g and cost %g; want a finite cost and a size of at least 0", k, i, o.Size, o.Cost)
			}
		}
	}
	return nil
}

// undominated sorts by size and keeps what costs strictly less than everything smaller. The sort is stable, so of equals
// the first stays.
func undominated(s []state, grain float64) []state {
	key := func(x float64) float64 {
		if grain > 0 {
			return math.Ceil(x / grain)
		}
		return x
	}
	slices.SortStableFunc(s, func(a, b state) int {
		return cmp.Or(cmp.Compare(key(a.size), key(b.size)), cmp.Compare(a.cost, b.cost), cmp.Compare(a.size, b.size))
	})
	out := s[:0]
	best := math.Inf(1)
	for _, x := range s {
		if x.cost < best {
			best = x.cost
			out = append(out, x)
		}
	}
	return slices.Clip(out)
}

// slack forgives rounding in the sum of sizes.
func slack(limit float64) float64 { return 1e-9 * math.Max(1, math.Abs(limit)) }

// WithinSize returns the choice of least cost whose size is at most the budget (inclusive).
func WithinSize(items [][]Option, budget float64) (Point, error) {
	front, err := Frontier(items, Options{})
	if err != nil {
		return Point{}, err
	}
	return BySize(front, budget)
}

// BySize is the last point of a frontier within the budget.
func BySize(front []Point, budget float64) (Point, error) {
	for i := len(front) - 1; i >= 0; i-- {
		if front[i].Size <= budget+slack(budget) {
			return front[i], nil
		}
	}
	if len(front) == 0 {
		return Point{}, fmt.Errorf("alloc: an empty frontier: %w", ErrInfeasible)
	}
	return front[0], fmt.Errorf("alloc: budget %g, and the smallest choice takes %g: %w", budget, front[0].Size, ErrInfeasible)
}

// WithinCost returns the smallest choice whose cost is at most the limit (inclusive).
func WithinCost(items [][]Option, limit float64) (Point, error) {
	front, err := Frontier(items, Options{})
	if err != nil {
		return Point{}, err
	}
	for _, p := range front {
		if p.Cost <= limit+slack(limit) {
			return p, nil
		}
	}
	last := front[len(front)-1]
	return last, fmt.Errorf("alloc: cost %g is allowed, and the least is %g: %w", limit, last.Cost, ErrInfeasible)
}

package compress

import (
	"fmt"
	"slices"

	"github.com/lathe-ml/lathe/internal/alloc"
)

// FrontierOptions bound the work of ParetoFrontier.
type FrontierOptions struct {
	// Buckets, if positive, rounds sizes up to multiples of 1/Buckets of the largest total while sites are combined: at
	// most that many allocations are kept, and the frontier is near, not at, the best. 0: exact up to ExactSites sites, and
	// 2^14 beyond. -1: always exact.
	Buckets int
}

// ExactSites is the number of sites up to which ParetoFrontier is exact when the caller does not say.
const ExactSites = 20

// ParetoFrontier returns every allocation of bits that no other one equals or beats in both size and loss, by size, which
// rises strictly while the loss falls strictly (Cai et al., arXiv:2001.00281, section 3.2 and appendix):
//
//	minimise Σᵢ costᵢ(kᵢ)   under   Σᵢ sizeᵢ·kᵢ ≤ S   for all S at once
//
// size holds the weights of each site, cost[i][j] what the network loses when site i alone has bits[j]; losses are taken
// to add up. The first allocation is the one of least bits, the last the one of least loss; AtBudget finds the one for a
// budget. One call so serves every budget, in |bits|·sites·(points kept) steps; AllocateBits answers one budget with less.
//
// Errors: an empty set of bits, duplicates, a table that does not fit, negative sizes, values that are not finite.
func ParetoFrontier(size []float64, cost [][]float64, bits []int, o FrontierOptions) ([]Allocation, error) {
	if s := slices.Sorted(slices.Values(bits)); len(slices.Compact(s)) != len(bits) {
		return nil, fmt.Errorf("compress: frontier: bits %v name one width twice", bits)
	}
	items, err := allocationItems(size, cost, bits)
	if err != nil {
		return nil, err
	}
	buckets := max(o.Buckets, 0)
	if o.Buckets == 0 && len(items) > ExactSites {
		buckets = 1 << 14
	}
	front, err := alloc.Frontier(items, alloc.Options{Buckets: buckets})
	if err != nil {
		return nil, fmt.Errorf("compress: frontier: %w", err)
	}
	out := make([]Allocation, len(front))
	for i, p := range front {
		out[i] = allocation(p, bits)
	}
	return out, nil
}

// AtBudget is the allocation of least loss whose size is at most the budget (inclusive). Its error wraps ErrInfeasible
// and names the smallest size there is.
func AtBudget(frontier []Allocation, budget float64) (Allocation, error) {
	points := make([]alloc.Point, len(frontier))
	for i, a := range frontier {
		points[i] = alloc.Point{Size: a.Size, Cost: a.Loss, Choice: []int{i}}
	}
	p, err := alloc.BySize(points, budget)
	if err != nil {
		return Allocation{}, fmt.Errorf("compress: frontier: %w", err)
	}
	return frontier[p.Choice[0]], nil
}

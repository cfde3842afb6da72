package compress

import (
	"fmt"
	"math"
	"slices"

	"github.com/lathe-ml/lathe/internal/alloc"
)

// ErrInfeasible: no allocation meets the budget. The error that wraps it names the least one that can be met.
var ErrInfeasible = alloc.ErrInfeasible

// Allocation gives each site its bits.
type Allocation struct {
	Bits []int   // by site
	Loss float64 // Σ ΔL: what the sites lose one by one, added up
	Size float64 // Σ size·bits
}

// AllocateBits gives every site one of the bit-widths so that the losses add up to the least under a budget of size
// (Hubara et al., arXiv:2006.10518, section 4, the integer programme):
//
//	min Σᵢ ΔLᵢ(kᵢ)   such that   Σᵢ sizeᵢ·kᵢ ≤ budget
//
// size holds the parameters of each site (or the multiply-adds times the bits of the activation, for a budget of bit
// operations), delta[i][j] what the network loses when site i alone has bits[j], and budget what size·bits may add up to
// (inclusive): c·32·Σ size for a network c times as large as in float32. The sum is minimised exactly; that losses add up
// is the assumption. Of equal allocations the smaller one wins, then the one whose first bits come first.
//
// Errors: ErrInfeasible; a table that does not fit; a size that is negative; values that are not finite.
func AllocateBits(size []float64, delta [][]float64, bits []int, budget float64) (Allocation, error) {
	items, err := allocationItems(size, delta, bits)
	if err != nil {
		return Allocation{}, err
	}
	if math.IsNaN(budget) {
		return Allocation{}, fmt.Errorf("compress: allocation: the budget is NaN")
	}
	p, err := alloc.WithinSize(items, budget)
	if err != nil {
		return Allocation{}, fmt.Errorf("compress: allocation: %w", err)
	}
	return allocation(p, bits), nil
}

// AllocateSmallest is the dual: the smallest allocation whose losses add up to at most allowed (inclusive).
func AllocateSmallest(size []float64, delta [][]float64, bits []int, allowed float64) (Allocation, error) {
	items, err := allocationItems(size, delta, bits)
	if err != nil {
		return Allocation{}, err
	}
	if math.IsNaN(allowed) {
		return Allocation{}, fmt.Errorf("compress: allocation: the allowed loss is NaN")
	}
	p, err := alloc.WithinCost(items, allowed)
	if err != nil {
		return Allocation{}, fmt.Errorf("compress: allocation: %w", err)
	}
	return allocation(p, bits), nil
}

func allocationItems(size []float64, delta [][]float64, bits []int) ([][]alloc.Option, error) {
	switch {
	case len(size) == 0 || len(delta) != len(size):
		return nil, fmt.Errorf("compress: allocation: %d sizes and %d rows of losses; want one of each for every site", len(size), len(delta))
	case len(bits) == 0 || slices.Min(bits) < 1:
		return nil, fmt.Errorf("compress: allocation: bits %v; want one or more positive numbers", bits)
	}
	items := make([][]alloc.Option, len(size))
	for i, row := range delta {
		if len(row) != len(bits) {
			return nil, fmt.Errorf("compress: allocation: site %d has %d losses for %d bit-widths", i, len(row), len(bits))
		}
		if !(size[i] >= 0) || math.IsInf(size[i], 0) {
			return nil, fmt.Errorf("compress: allocation: site %d has size %g; want a finite number of at least 0", i, size[i])
		}
		for j, d := range row {
			if math.IsNaN(d) || math.IsInf(d, 0) {
				return nil, fmt.Errorf("compress: allocation: site %d loses %g at %d bits; want finite losses", i, d, bits[j])
			}
			items[i] = append(items[i], alloc.Option{Size: size[i] * float64(bits[j]), Cost: d})
		}
	}
	return items, nil
}

func allocation(p alloc.Point, bits []int) Allocation {
	a := Allocation{Loss: p.Cost, Size: p.Size}
	for _, k := range p.Choice {
		a.Bits = append(a.Bits, bits[k])
	}
	return a
}

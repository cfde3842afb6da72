package compress

import (
	"errors"
	"math"
	"math/rand/v2"
	"strings"
	"testing"
)

// enumerate lists the sizes and losses of all allocations.
func enumerate(size []float64, cost [][]float64, bits []int) (all []Allocation) {
	var walk func(i int, a Allocation)
	walk = func(i int, a Allocation) {
		if i == len(size) {
			all = append(all, a)
			return
		}
		for j, b := range bits {
			walk(i+1, Allocation{Size: a.Size + size[i]*float64(b), Loss: a.Loss + cost[i][j]})
		}
	}
	walk(0, Allocation{})
	return all
}

func TestParetoFrontierIsWhatEnumerationFinds(t *testing.T) {
	bits := []int{2, 4, 8}
	for seed := range uint64(20) {
		r := rand.New(rand.NewPCG(seed, 1))
		n := 1 + r.IntN(8)
		size, cost := make([]float64, n), make([][]float64, n)
		least := 0.
		for i := range size {
			size[i] = float64(1 + r.IntN(60))
			least += 2 * size[i]
			for range bits {
				cost[i] = append(cost[i], math.Round(r.Float64()*16)/16) // ties
			}
		}
		front, err := ParetoFrontier(size, cost, bits, FrontierOptions{})
		if err != nil {
			t.Fatal(err)
		}
		all := enumerate(size, cost, bits)
		best := math.Inf(1)
		for _, a := range all {
			best = min(best, a.Loss)
		}
		if front[0].Size != least || math.Abs(front[len(front)-1].Loss-best) > 1e-12 {
			t.Errorf("seed %d: from size %g to loss %g, want %g and %g", seed, front[0].Size, front[len(front)-1].Loss, least, best)
		}
		for i, p := range front {
			if i > 0 && !(p.Size > front[i-1].Size && p.Loss < front[i-1].Loss) {
				t.Errorf("seed %d: point %d, %+v, does not rise and fall from %+v", seed, i, p, front[i-1])
			}
			var s, l float64
			for k, b := range p.Bits {
				s += size[k] * float64(b)
				for j := range bits {
					if bits[j] == b {
						l += cost[k][j]
					}
				}
			}
			if s != p.Size || math.Abs(l-p.Loss) > 1e-12 {
				t.Errorf("seed %d: bits %v add up to %g and %g, not %+v", seed, p.Bits, s, l, p)
			}
		}
		for _, a := range all {
			got, err := AtBudget(front, a.Size)
			if err != nil || got.Loss > a.Loss+1e-12 {
				t.Fatalf("seed %d: budget %g gives %+v, and %+v is better (%v)", seed, a.Size, got, a, err)
			}
		}
		if _, err := AtBudget(front, least-1); !errors.Is(err, ErrInfeasible) || !strings.Contains(err.Error(), "takes") {
			t.Errorf("below the smallest: %v", err)
		}
	}
}

func TestRoundedFrontierStaysNearTheExactOne(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 1))
	bits := []int{2, 4, 8}
	size, cost := make([]float64, 14), make([][]float64, 14)
	for i := range size {
		size[i] = float64(100 + r.IntN(5000))
		c := r.Float64()
		cost[i] = []float64{c, c * .3, c * .01}
	}
	exact, err := ParetoFrontier(size, cost, bits, FrontierOptions{Buckets: -1})
	if err != nil {
		t.Fatal(err)
	}
	near, err := ParetoFrontier(size, cost, bits, FrontierOptions{Buckets: 1 << 10})
	if err != nil {
		t.Fatal(err)
	}
	top := exact[len(exact)-1].Size
	for _, p := range exact {
		got, err := AtBudget(near, p.Size+float64(len(size))*top/(1<<10))
		if err != nil || got.Loss > p.Loss+1e-12 {
			t.Fatalf("%+v against %+v (%v)", got, p, err)
		}
	}
}

func TestParetoFrontierRefuses(t *testing.T) {
	row := [][]float64{{1, 2}}
	for name, f := range map[string]func() ([]Allocation, error){
		"duplicate bits": func() ([]Allocation, error) {
			return ParetoFrontier([]float64{1}, row, []int{4, 4}, FrontierOptions{})
		},
		"no bits": func() ([]Allocation, error) { return ParetoFrontier([]float64{1}, row, nil, FrontierOptions{}) },
		"NaN": func() ([]Allocation, error) {
			return ParetoFrontier([]float64{1}, [][]float64{{1, math.NaN()}}, []int{2, 4}, FrontierOptions{})
		},
		"short": func() ([]Allocation, error) {
			return ParetoFrontier([]float64{1, 2}, row, []int{2, 4}, FrontierOptions{})
		},
	} {
		if _, err := f(); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if _, err := AtBudget(nil, 4); !errors.Is(err, ErrInfeasible) {
		t.Errorf("an empty frontier: %v", err)
	}
}

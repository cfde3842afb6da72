// Package search holds the evolutionary searches that several methods share. It knows nothing of what is evolved: an
// individual is a genome of any type with scores of which higher is better.
//
// Everything random comes from streams named after the number of a proposal, so that a search that was stopped goes on as
// if it had not been, and two searches of one seed see the same random individuals.
package search

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/internal/stat"
)

// Individual is a genome that was evaluated.
type Individual[G any] struct {
	Genome G
	Scores []float64 // one per task, higher is better
	Born   int       // number of its proposal
}

// ParetoFront returns the indices, ascending, of the rows that no other row dominates: at least as good in every column
// and better in one. Equal rows on the front are all kept. A row with NaN is never on it.
func ParetoFront(scores [][]float64) (front []int) {
	valid := func(r []float64) bool { return !slices.ContainsFunc(r, math.IsNaN) }
	for i, a := range scores {
		if !valid(a) {
			continue
		}
		dominated := slices.ContainsFunc(scores, func(b []float64) bool { return valid(b) && dominates(b, a) })
		if !dominated {
			front = append(front, i)
		}
	}
	return front
}

// dominates says whether a is at least as good as b everywhere and better somewhere.
func dominates(a, b []float64) bool {
	better := false
	for k := range b {
		if a[k] < b[k] {
			return false
		}
		better = better || a[k] > b[k]
	}
	return better
}

// BestAverage is the index of the row with the highest mean, the first of equals; -1 when there is none.
func BestAverage(scores [][]float64) int {
	best, top := -1, math.Inf(-1)
	for i, r := range scores {
		if m := stat.Mean(r); m > top {
			best, top = i, m
		}
	}
	return best
}

// Selection is how a tournament is won.
type Selection int

const (
	// Pareto takes any individual of the tournament's Pareto front, all with the same chance.
	Pareto Selection = iota
	// Average takes the one with the best mean score.
	Average
)

// String returns "pareto" or "average".
func (s Selection) String() string { return [...]string{"pareto", "average"}[s] }

// Ageing is an evolution in which individuals die of age: the population is the newest Window individuals that were
// accepted; a proposal mutates the winner of a tournament among Tournament of them, or is a fresh random individual with
// probability Fresh, and always while the population is empty (Real et al., arXiv:1802.01548; Liu et al.,
// arXiv:2004.02967, section 3.3).
type Ageing[G any] struct {
	Window     int // 0: 2500
	Tournament int // clipped to the population; 0: a twentieth of the window, at least 1
	Fresh      float64
	Select     Selection
	Random     func(r *rng.Rand) G
	Mutate     func(r *rng.Rand, parent G) G

	members []Individual[G]
}

// Members are the population, oldest first. They are shared.
func (a *Ageing[G]) Members() []Individual[G] { return a.members }

// Accept adds an individual and lets the oldest die if there are too many.
func (a *Ageing[G]) Accept(x Individual[G]) {
	a.members = append(a.members, x)
	if w := a.window(); len(a.members) > w {
		a.members = a.members[len(a.members)-w:]
	}
}

func (a *Ageing[G]) window() int {
	if a.Window == 0 {
		return 2500
	}
	return max(a.Window, 1)
}

// Propose makes proposal number i of a seed from the population as it is. Parent is the number of the proposal that was
// mutated, -1 for a random individual. The random individual of a proposal depends on the seed and i alone.
func (a *Ageing[G]) Propose(seed uint64, i int) (child G, parent int) {
	r := rng.New(seed, fmt.Sprintf("search:parent:%d", i))
	if fresh := r.Float64() < a.Fresh; fresh || len(a.members) == 0 {
		return a.Random(rng.New(seed, fmt.Sprintf("search:random:%d", i))), -1
	}
	size := a.Tournament
	if size == 0 {
		size = max(1, a.window()/20)
	}
	size = min(size, len(a.members))
	group := r.Perm(len(a.members))[:size]
	slices.Sort(group)
	scores := make([][]float64, size)
	for k, m := range group {
		scores[k] = a.members[m].Scores
	}
	var k int
	if a.Select == Average {
		k = max(BestAverage(scores), 0)
	} else if front := ParetoFront(scores); len(front) > 0 {
		k = front[r.IntN(len(front))]
	}
	winner := a.members[group[k]]
	return a.Mutate(r, winner.Genome), winner.Born
}

// ErrInfeasible says that no individual within the constraints was found.
var ErrInfeasible = errors.New("search: no feasible individual was found")

// Elite is an evolution by generations: the Parents best survive, and Mutants of them and Crossovers between them are
// added to the next generation (arXiv:1904.00420, algorithm 1; arXiv:1908.09791, section 3.5). The best fitness never
// falls.
type Elite[G any] struct {
	Population  int // of the first generation
	Parents     int // that survive; at least 1
	Generations int // after the first
	Mutants     int // per generation
	Crossovers  int // per generation
	Random      func(r *rng.Rand) G
	Mutate      func(r *rng.Rand, parent G) G
	Cross       func(r *rng.Rand, a, b G) G
	// Feasible rejects individuals before they are evaluated; nil: all are feasible. Tries is the number of draws for
	// one individual after which a draw fails; 0: 10,000.
	Feasible func(g G) bool
	Tries    int
}

// Run evolves under a seed. Fitness is what is maximised; NaN counts as the worst. It returns the last generation, best
// first (the older of equals), and the best fitness after the first and every further generation. A first generation
// without a feasible individual is ErrInfeasible; a child that stays infeasible is left out.
func (e Elite[G]) Run(ctx context.Context, seed uint64, fitness func(ctx context.Context, g G) (float64, error)) (last []Individual[G], best []float64, err error) {
	if e.Population < 1 || e.Parents < 1 || e.Mutants < 0 || e.Crossovers < 0 || e.Generations < 0 {
		return nil, nil, fmt.Errorf("search: population %d, %d parents, %d mutants, %d crossovers, %d generations: want at least 1 individual and parent", e.Population, e.Parents, e.Mutants, e.Crossovers, e.Generations)
	}
	tries := e.Tries
	if tries == 0 {
		tries = 10_000
	}
	born := 0
	var all []Individual[G]
	add := func(draw func(r *rng.Rand) G) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		r := rng.New(seed, fmt.Sprintf("search:elite:%d", born))
		for range tries {
			g := draw(r)
			if e.Feasible != nil && !e.Feasible(g) {
				continue
			}
			f, err := fitness(ctx, g)
			if err != nil {
				return err
			}
			if math.IsNaN(f) {
				f = math.Inf(-1)
			}
			all = append(all, Individual[G]{g, []float64{f}, born})
			born++
			return nil
		}
		born++
		return nil
	}
	rank := func() {
		slices.SortStableFunc(all, func(a, b Individual[G]) int {
			switch {
			case a.Scores[0] > b.Scores[0]:
				return -1
			case a.Scores[0] < b.Scores[0]:
				return 1
			}
			return a.Born - b.Born
		})
		best = append(best, all[0].Scores[0])
	}
	for range e.Population {
		if err := add(e.Random); err != nil {
			return nil, nil, err
		}
		if len(all) == 0 {
			return nil, nil, fmt.Errorf("%w in %d draws; widen the limit", ErrInfeasible, tries)
		}
	}
	rank()
	for range e.Generations {
		all = all[:min(e.Parents, len(all))]
		parents := slices.Clone(all)
		for range e.Mutants {
			if err := add(func(r *rng.Rand) G { return e.Mutate(r, parents[r.IntN(len(parents))].Genome) }); err != nil {
				return nil, nil, err
			}
		}
		for range e.Crossovers {
			if err := add(func(r *rng.Rand) G {
				return e.Cross(r, parents[r.IntN(len(parents))].Genome, parents[r.IntN(len(parents))].Genome)
			}); err != nil {
				return nil, nil, err
			}
		}
		rank()
	}
	return all, best, nil
}

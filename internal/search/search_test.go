package search_test

import (
	"context"
	"errors"
	"math"
	"slices"
	"testing"

	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/internal/search"
)

func TestParetoFront(t *testing.T) {
	nan := math.NaN()
	for _, c := range []struct {
		scores [][]float64
		want   []int
	}{
		{nil, nil},
		{[][]float64{{1, 2}, {2, 1}, {0, 0}}, []int{0, 1}},
		{[][]float64{{1, 2}, {1, 2}, {1, 1}}, []int{0, 1}}, // duplicates of front points stay
		{[][]float64{{3}, {5}, {5}, {4}}, []int{1, 2}},     // one column: the maxima
		{[][]float64{{nan, 9}, {1, 1}}, []int{1}},
		{[][]float64{{2, 2}, {2, 1}, {1, 2}}, []int{0}},
	} {
		if got := search.ParetoFront(c.scores); !slices.Equal(got, c.want) {
			t.Errorf("%v: front %v, want %v", c.scores, got, c.want)
		}
	}
}

func TestFrontContainsTheBestAverage(t *testing.T) {
	r := rng.New(1, "scores")
	for range 200 {
		scores := make([][]float64, 1+r.IntN(20))
		for i := range scores {
			scores[i] = []float64{float64(r.IntN(5)), float64(r.IntN(5)), float64(r.IntN(5))}
		}
		if front := search.ParetoFront(scores); !slices.Contains(front, search.BestAverage(scores)) {
			t.Fatalf("%v: front %v lacks %d", scores, front, search.BestAverage(scores))
		}
	}
	if search.BestAverage(nil) != -1 {
		t.Error("the best of nothing")
	}
}

// Numbers are evolved towards 100: what counts is the number and its negative square's distance.
func numbers(sel search.Selection) *search.Ageing[int] {
	return &search.Ageing[int]{
		Window: 10, Tournament: 50, Fresh: .2, Select: sel,
		Random: func(r *rng.Rand) int { return r.IntN(50) },
		Mutate: func(r *rng.Rand, p int) int { return p + r.IntN(7) - 3 },
	}
}

func TestAgeingKeepsTheNewest(t *testing.T) {
	for _, sel := range []search.Selection{search.Pareto, search.Average} {
		history := func() (all []int) {
			a := numbers(sel)
			for i := range 300 {
				g, parent := a.Propose(7, i)
				if i == 0 && parent != -1 {
					t.Error("an empty population had a parent")
				}
				if parent >= i {
					t.Errorf("proposal %d has parent %d", i, parent)
				}
				all = append(all, g)
				a.Accept(search.Individual[int]{Genome: g, Scores: []float64{-math.Abs(100 - float64(g))}, Born: i})
				if m := a.Members(); len(m) > 10 || m[len(m)-1].Born != i || m[0].Born != max(0, i-9) {
					t.Fatalf("after %d: window %v", i, m)
				}
			}
			return all
		}
		one := history()
		if !slices.Equal(one, history()) {
			t.Errorf("%v: one seed, two histories", sel)
		}
		if top := slices.Max(one); top < 90 {
			t.Errorf("%v: reached only %d", sel, top)
		}
	}
}

func TestRandomIndividualsAreThoseOfRandomSearch(t *testing.T) {
	evolution, random := numbers(search.Pareto), numbers(search.Pareto)
	random.Fresh = 1
	shared := 0
	for i := range 50 {
		g, parent := evolution.Propose(3, i)
		h, _ := random.Propose(3, i)
		if parent < 0 {
			shared++
			if g != h {
				t.Errorf("proposal %d: random %d and %d", i, g, h)
			}
		}
		evolution.Accept(search.Individual[int]{Genome: g, Scores: []float64{float64(g)}, Born: i})
	}
	if shared < 2 || shared == 50 {
		t.Errorf("%d of 50 were random", shared)
	}
}

func TestEliteNeverForgetsTheBest(t *testing.T) {
	e := search.Elite[int]{
		Population: 10, Parents: 4, Generations: 20, Mutants: 6, Crossovers: 4,
		Random:   func(r *rng.Rand) int { return r.IntN(50) },
		Mutate:   func(r *rng.Rand, p int) int { return p + r.IntN(21) - 10 },
		Cross:    func(_ *rng.Rand, a, b int) int { return (a + b) / 2 },
		Feasible: func(g int) bool { return g < 90 },
	}
	calls := 0
	fitness := func(_ context.Context, g int) (float64, error) {
		calls++
		if g >= 90 {
			t.Errorf("%d was evaluated", g)
		}
		if g%7 == 0 {
			return math.NaN(), nil
		}
		return float64(g), nil
	}
	last, best, err := e.Run(context.Background(), 5, fitness)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.IsSorted(best) || len(best) != 21 || best[20] < 85 || last[0].Scores[0] != best[20] {
		t.Errorf("best %v, last %v", best, last[0])
	}
	again, _, _ := e.Run(context.Background(), 5, fitness)
	if again[0].Genome != last[0].Genome || again[3].Born != last[3].Born {
		t.Error("one seed, two results")
	}

	e.Feasible, e.Tries = func(int) bool { return false }, 10
	if _, _, err := e.Run(context.Background(), 5, fitness); !errors.Is(err, search.ErrInfeasible) {
		t.Errorf("got %v", err)
	}
	e.Parents = 0
	if _, _, err := e.Run(context.Background(), 5, fitness); err == nil {
		t.Error("no parents were accepted")
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	e.Parents, e.Feasible = 4, nil
	if _, _, err := e.Run(ctx, 5, fitness); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

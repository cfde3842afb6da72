// Package curate chooses which examples a network learns from: it ranks them by difficulty and keeps a share.
//
// Scores have one orientation everywhere: high = hard = keep first. A [Metric] scores, [Select] keeps, and a [Selector]
// does both. Beyond neural scaling laws (Sorscher et al., arXiv:2206.14486) says when hard examples are the right ones
// to keep and when easy ones are: see [PerceptronTheory], [Auto] and [Prune].
package curate

import (
	"context"
	"fmt"
	"math"
	"slices"

	"gonum.org/v1/gonum/mat"
)

// Mode says which end of the ranking is kept.
type Mode int

const (
	// Hard keeps the examples of the highest scores: right when there is plenty of data.
	Hard Mode = iota
	// Easy keeps the examples of the lowest scores: right when data are scarce.
	Easy
)

// String returns "hard" or "easy".
func (m Mode) String() string {
	switch m {
	case Hard:
		return "hard"
	case Easy:
		return "easy"
	}
	return fmt.Sprintf("mode(%d)", int(m))
}

// ParseMode is the inverse of String.
func ParseMode(s string) (Mode, error) {
	switch s {
	case "hard":
		return Hard, nil
	case "easy":
		return Easy, nil
	}
	return 0, fmt.Errorf("curate: unknown mode %q; accepted: hard, easy", s)
}

// MarshalText writes the mode's name.
func (m Mode) MarshalText() ([]byte, error) {
	if m != Hard && m != Easy {
		return nil, fmt.Errorf("curate: unknown mode %d; accepted: Hard, Easy", int(m))
	}
	return []byte(m.String()), nil
}

// UnmarshalText reads the mode's name.
func (m *Mode) UnmarshalText(b []byte) error {
	v, err := ParseMode(string(b))
	if err == nil {
		*m = v
	}
	return err
}

// Auto returns Easy when there are fewer than threshold examples per class, else Hard (arXiv:2206.14486, section 3: the
// theory's and the experiments' crossing from "keep easy" to "keep hard" as data grow). Where the crossing lies depends
// on the task; a threshold of 0 always answers Hard.
func Auto(examples, classes, threshold int) Mode {
	if float64(examples) < float64(threshold)*float64(max(classes, 1)) {
		return Easy
	}
	return Hard
}

// Examples is what a Selector may look at: the features of n examples and, where there are any, their labels.
type Examples struct {
	Features *mat.Dense // [n, d], raw or unit length; what needs unit rows normalises them
	Labels   []int      // of each example, 0 and up; nil when unknown
	// Test examples that are never selected; only influence scores need them.
	TestFeatures *mat.Dense
	TestLabels   []int
}

// Len returns the number of examples.
func (e *Examples) Len() int {
	if e.Features == nil || e.Features.IsEmpty() {
		return 0
	}
	n, _ := e.Features.Dims()
	return n
}

// Selection is what a Selector keeps, and why.
type Selection struct {
	Kept    []int     // indices of the kept examples, ascending
	Score   []float64 // of every example, high = hard; nil when the selector does not rank
	Cluster []int     // of every example; nil when the selector does not cluster
}

// Selector ranks or selects examples from their features: it keeps a share in (0, 1] of them.
type Selector interface {
	Select(ctx context.Context, e *Examples, keep float64) (*Selection, error)
}

// Ranking is a difficulty for every example.
type Ranking struct {
	Score    []float64 // high = hard = keep first
	Clusters *Clusters // of metrics that cluster; else nil
}

// Metric scores the difficulty of examples.
type Metric interface {
	Rank(ctx context.Context, e *Examples) (*Ranking, error)
}

// Select returns the indices, ascending, of the round(keep·n) examples (half to even) to train on.
//
// Every group (class or cluster) first keeps its ⌊balance·kept/groups⌋ best-ranked examples, or all it has, so that
// ranking cannot make a group vanish (the paper uses balance 0.5); the rest is filled from the ranking of all. Best is
// the highest score for Hard and the lowest for Easy; equal scores go by the lower index.
//
// groups[i] ≥ 0 is the group of example i; nil puts all in one. keep lies in (0, 1], balance in [0, 1]. Refused are
// NaN scores, unequal lengths, values out of range, and a keep that leaves no example.
func Select(scores []float64, groups []int, keep, balance float64, m Mode) ([]int, error) {
	distinct := map[int]bool{}
	for _, g := range groups {
		distinct[g] = true
	}
	return selectBalanced(scores, groups, max(len(distinct), 1), keep, balance, m)
}

// selectBalanced is Select with a given number of groups, of which some may have no example.
func selectBalanced(scores []float64, groups []int, count int, keep, balance float64, m Mode) ([]int, error) {
	n := len(scores)
	kept, err := keptCount(n, keep)
	if err != nil {
		return nil, err
	}
	switch {
	case !(balance >= 0 && balance <= 1):
		return nil, fmt.Errorf("curate: balance %g; it is the share of the kept examples that is dealt out evenly, 0 to 1", balance)
	case groups != nil && len(groups) != n:
		return nil, fmt.Errorf("curate: %d groups for %d scores; both must be of equal length", len(groups), n)
	case m != Hard && m != Easy:
		return nil, fmt.Errorf("curate: unknown mode %d; accepted: Hard, Easy", int(m))
	}
	for i, s := range scores {
		if math.IsNaN(s) {
			return nil, fmt.Errorf("curate: score %d is NaN; every example needs a score (repair or remove it first)", i)
		}
	}
	for i, g := range groups {
		if g < 0 {
			return nil, fmt.Errorf("curate: group %d of example %d; groups are 0 and up", g, i)
		}
	}

	order := rank(scores, m)
	// the small term keeps 0.29·100 from falling to 28 by rounding
	quota := int(math.Floor(balance*float64(kept)/float64(count) + 1e-9))
	taken, have := make([]bool, n), 0
	if groups != nil {
		used := map[int]int{}
		for _, i := range order {
			if g := groups[i]; used[g] < quota {
				used[g]++
				taken[i], have = true, have+1
			}
		}
	}
	for _, i := range order {
		if have >= kept {
			break
		}
		if !taken[i] {
			taken[i], have = true, have+1
		}
	}
	out := make([]int, 0, kept)
	for i, t := range taken {
		if t {
			out = append(out, i)
		}
	}
	return out, nil
}

// keptCount is round(keep·n), half to even.
func keptCount(n int, keep float64) (int, error) {
	if !(keep > 0 && keep <= 1) {
		return 0, fmt.Errorf("curate: keep %g; it is the share of examples that stays, above 0 and at most 1", keep)
	}
	if n == 0 {
		return 0, fmt.Errorf("curate: no examples to select from")
	}
	kept := int(math.RoundToEven(keep * float64(n)))
	if kept == 0 {
		return 0, fmt.Errorf("curate: keep %g of %d examples leaves none; use at least %.3g", keep, n, 1/float64(n))
	}
	return kept, nil
}

// rank returns all indices, the ones to keep first in front.
func rank(scores []float64, m Mode) []int {
	order := make([]int, len(scores))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int {
		switch x, y := scores[a], scores[b]; {
		case x == y:
			return 0
		case (x > y) == (m == Hard):
			return -1
		}
		return 1
	})
	return order
}

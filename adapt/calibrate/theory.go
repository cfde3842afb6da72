package calibrate

import (
	"fmt"
	"math"
)

// Overlap is the idealised law of overlapping classes: Classes classes in groups of Group; a point comes with probability
// Mass from a region that its group shares, where each class of the group is equally likely, otherwise from a region of its
// own.
type Overlap struct {
	Classes int     // k, at least 2
	Mass    float64 // ρ, probability of a shared region, 0 to 1
	Group   int     // m, classes that share a region, 1 to Classes; 0: 2
}

// OverlapTheory is what temperature scaling can reach on an Overlap with a network that interpolates its training set:
// one with the same logit gap everywhere and equal other logits (derived for this idealisation; arXiv:2306.00740, theorem
// 4.2, proves the order). All losses are in nats.
type OverlapTheory struct {
	Error       float64 // e = ρ(1 − 1/m), share of wrong predictions
	NLLScaled   float64 // −(1−e) ln(1−e) − e ln(e/(k−1)), the best that a temperature reaches
	NLLBayes    float64 // ρ ln m, the least that anything reaches
	Excess      float64 // their difference, which grows like e·ln k
	Temperature float64 // the best one, gap / ln((1−e)(k−1)/e); +Inf where uniform predictions are best, 0 without errors
	NLLUniform  float64 // ln k
}

// Theory evaluates the law for a network of a given logit gap, above 0.
func (o Overlap) Theory(gap float64) (OverlapTheory, error) {
	if o.Group == 0 {
		o.Group = 2
	}
	switch {
	case o.Classes < 2:
		return OverlapTheory{}, fmt.Errorf("calibrate: overlap of %d classes; want at least 2", o.Classes)
	case !(o.Mass >= 0 && o.Mass <= 1):
		return OverlapTheory{}, fmt.Errorf("calibrate: overlap mass %g; want 0 to 1", o.Mass)
	case o.Group < 1 || o.Group > o.Classes:
		return OverlapTheory{}, fmt.Errorf("calibrate: %d of %d classes share a region; want 1 to %d", o.Group, o.Classes, o.Classes)
	case !(gap > 0) || math.IsInf(gap, 0):
		return OverlapTheory{}, fmt.Errorf("calibrate: logit gap %g; want a positive number", gap)
	}
	return overlapTheory(float64(o.Classes), o.Mass, float64(o.Group), gap), nil
}

// overlapTheory takes a group of any size of at least 1, as it is estimated from confusions.
func overlapTheory(k, mass, group, gap float64) OverlapTheory {
	e := mass * (1 - 1/group)
	t := OverlapTheory{Error: e, NLLBayes: mass * math.Log(group), NLLUniform: math.Log(k)}
	if e > 0 {
		t.NLLScaled = -(1-e)*math.Log1p(-e) - e*math.Log(e/(k-1))
		// The predicted class holds 1−e and every other e/(k−1) at the best temperature; where that is no more, the best is
		// to predict uniformly.
		if odds := math.Log((1 - e) * (k - 1) / e); odds > 0 {
			t.Temperature = gap / odds
		} else {
			t.Temperature, t.NLLScaled = math.Inf(1), math.Log(k)
		}
	}
	t.Excess = t.NLLScaled - t.NLLBayes
	return t
}

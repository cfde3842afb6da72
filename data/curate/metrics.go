package curate

import (
	"fmt"
	"math"
	"math/bits"
)

// EL2N scores examples by the mean over models of ‖p(x) - onehot(y)‖₂, early in training (a few epochs; at its end all
// errors are near 0 and rank nothing). Paul et al., arXiv:2107.07075.
//
// probs is [model][example][class], each row summing to 1 within 1e-3, labels are 0 to classes-1. Scores lie in
// [0, √2]; one model is enough to rank, ten rank better.
func EL2N(probs [][][]float64, labels []int) ([]float64, error) {
	if len(probs) == 0 {
		return nil, fmt.Errorf("curate: EL2N of no models; at least one is needed")
	}
	out := make([]float64, len(labels))
	for k, model := range probs {
		if len(model) != len(labels) {
			return nil, fmt.Errorf("curate: model %d has probabilities of %d examples, there are %d labels", k, len(model), len(labels))
		}
		for i, p := range model {
			if err := checkProbs(p, k, i); err != nil {
				return nil, err
			}
			if labels[i] < 0 || labels[i] >= len(p) {
				return nil, fmt.Errorf("curate: label %d of example %d is out of range; there are %d classes", labels[i], i, len(p))
			}
			s := 0.
			for c, v := range p {
				if c == labels[i] {
					v -= 1
				}
				s += v * v
			}
			out[i] += math.Sqrt(s) / float64(len(probs))
		}
	}
	return out, nil
}

func checkProbs(p []float64, model, example int) error {
	sum := 0.
	for c, v := range p {
		if !(v >= -1e-6 && v <= 1+1e-3) {
			return fmt.Errorf("curate: probability %g of class %d (model %d, example %d); it must lie in [0, 1]: pass softmax outputs, not logits", v, c, model, example)
		}
		sum += v
	}
	if !(math.Abs(sum-1) <= 1e-3) {
		return fmt.Errorf("curate: the probabilities of model %d, example %d sum to %g; they must sum to 1 within 1e-3", model, example, sum)
	}
	return nil
}

// Forgetting counts for every example the epochs in which it is wrong after having been right in the one before; an
// example that was never right gets the number of epochs. Toneva et al., arXiv:1812.05159.
//
// correct is [epoch][example], all epochs of one length.
func Forgetting(correct [][]bool) ([]float64, error) {
	if len(correct) == 0 {
		return nil, fmt.Errorf("curate: forgetting over no epochs; at least one is needed")
	}
	n := len(correct[0])
	out, learnt := make([]float64, n), make([]bool, n)
	for t, now := range correct {
		if len(now) != n {
			return nil, fmt.Errorf("curate: epoch %d has %d examples, epoch 0 has %d", t, len(now), n)
		}
		for i, ok := range now {
			if t > 0 && correct[t-1][i] && !ok {
				out[i]++
			}
			learnt[i] = learnt[i] || ok
		}
	}
	for i, ok := range learnt {
		if !ok {
			out[i] = float64(len(correct))
		}
	}
	return out, nil
}

// SubsetScores are the difficulties that models trained on random subsets reveal, for each training example. A score
// that would need an empty set of models is 0.
type SubsetScores struct {
	Memorization    []float64 // P[right | trained on] - P[right | not trained on], in [-1, 1]
	InfluenceMax    []float64 // the largest influence on a test example, signed, in [-1, 1]
	InfluenceSumAbs []float64 // the sum of the influences' sizes over the test examples
	DDD             []float64 // share of the models not trained on it that get it wrong, in [0, 1]
	ActiveLearning  []float64 // entropy in nats of their mean prediction; nil without probabilities
	Undefined       []bool    // the example was in every subset or in none, so some of its scores are 0 for want of models
}

// SubsetStats compares models trained on random subsets (the paper: 70 %) by what they saw: memorization and influence
// (Feldman and Zhang, arXiv:2008.03703), dichotomous data difficulty (Meding et al., arXiv:2110.05922) and the ensemble
// entropy of active learning (Chitta et al., arXiv:1905.12737; the paper used a released subset of theirs, so that its
// equivalence to the entropy of held-out predictions is an assumption here).
//
// included and correctTrain are [model][training example], correctTest [model][test example], probs
// [model][training example][class] or nil. The influence of i on test example j is
// P[j right | i trained on] - P[j right | i not trained on].
func SubsetStats(included, correctTrain, correctTest [][]bool, probs [][][]float64) (*SubsetScores, error) {
	models := len(included)
	if models < 2 {
		return nil, fmt.Errorf("curate: %d subset models; at least 2 are needed, 20 or more are useful", models)
	}
	if len(correctTrain) != models || len(correctTest) != models || probs != nil && len(probs) != models {
		return nil, fmt.Errorf("curate: %d models in included, %d in correctTrain, %d in correctTest, %d in probs; all must agree",
			models, len(correctTrain), len(correctTest), len(probs))
	}
	n, m := len(included[0]), len(correctTest[0])
	for k := range models {
		if len(included[k]) != n || len(correctTrain[k]) != n || len(correctTest[k]) != m || probs != nil && len(probs[k]) != n {
			return nil, fmt.Errorf("curate: model %d has other numbers of examples than model 0 (%d training, %d test)", k, n, m)
		}
	}
	in, right, test := columns(included, n), columns(correctTrain, n), columns(correctTest, m)
	s := &SubsetScores{
		Memorization: make([]float64, n), InfluenceMax: make([]float64, n), InfluenceSumAbs: make([]float64, n),
		DDD: make([]float64, n), Undefined: make([]bool, n),
	}
	for i := range n {
		ins := in[i].count()
		outs := models - ins
		rightIn := in[i].and(right[i])
		rightOut := right[i].count() - rightIn
		if outs > 0 {
			s.DDD[i] = float64(outs-rightOut) / float64(outs)
		}
		if ins == 0 || outs == 0 {
			s.Undefined[i] = true
			continue
		}
		difference := func(in, out int) float64 { return float64(in)/float64(ins) - float64(out)/float64(outs) }
		s.Memorization[i] = difference(rightIn, rightOut)
		for j, t := range test {
			both := in[i].and(t)
			v := difference(both, t.count()-both)
			if j == 0 || v > s.InfluenceMax[i] {
				s.InfluenceMax[i] = v
			}
			s.InfluenceSumAbs[i] += math.Abs(v)
		}
	}
	if probs == nil {
		return s, nil
	}
	s.ActiveLearning = make([]float64, n)
	classes := 0
	for k, model := range probs {
		for i, p := range model {
			if k == 0 && i == 0 {
				classes = len(p)
			}
			if len(p) != classes {
				return nil, fmt.Errorf("curate: %d probabilities of model %d, example %d; the first has %d classes", len(p), k, i, classes)
			}
			if err := checkProbs(p, k, i); err != nil {
				return nil, err
			}
		}
	}
	mean := make([]float64, classes)
	for i := range n {
		clear(mean)
		outs := 0.
		for k := range models {
			if included[k][i] {
				continue
			}
			outs++
			for c, v := range probs[k][i] {
				mean[c] += v
			}
		}
		if outs == 0 {
			continue
		}
		for _, v := range mean {
			if v > 0 {
				s.ActiveLearning[i] -= v / outs * math.Log(v/outs)
			}
		}
	}
	return s, nil
}

// bitset holds one bit per model, so that the influence of n examples on m others costs n·m·models/64.
type bitset []uint64

func columns(rows [][]bool, n int) []bitset {
	words := (len(rows) + 63) / 64
	flat := make([]uint64, n*words)
	out := make([]bitset, n)
	for i := range out {
		out[i] = flat[i*words : (i+1)*words]
	}
	for k, row := range rows {
		for i, v := range row {
			if v {
				out[i][k/64] |= 1 << (k % 64)
			}
		}
	}
	return out
}

func (b bitset) count() (n int) {
	for _, w := range b {
		n += bits.OnesCount64(w)
	}
	return n
}

func (b bitset) and(o bitset) (n int) {
	for i, w := range b {
		n += bits.OnesCount64(w & o[i])
	}
	return n
}

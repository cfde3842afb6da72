package curate

import (
	"context"
	"fmt"
	"math"
	"slices"

	"gonum.org/v1/gonum/mat"

	"github.com/lathe-ml/lathe/internal/rng"
)

// Prune is data pruning (Sorscher et al., arXiv:2206.14486): score every example with Metric, then keep a share of them
// as Select does. Test error usually falls as a slow power law in the number of examples because most new ones are
// redundant; keeping the right ones bends that law. Use it to cut a training set by 20 to 50 %; not for tiny sets, nor
// for very noisy labels (hard is then often wrong), nor for heavy imbalance without Balance.
type Prune struct {
	Metric  Metric  // nil: Prototypes{}
	Balance float64 // share of the kept examples dealt out evenly over labels, or over clusters without labels; the paper uses 0.5
	Mode    Mode    // Hard when data are plentiful, Easy when scarce; see Auto
}

var (
	_ Selector = Prune{}
	_ Metric   = Random{}
	_ Metric   = Prototypes{}
	_ Metric   = ClassPrototypes{}
	_ Metric   = Probe{}
)

// Select keeps the share keep of the examples.
func (p Prune) Select(ctx context.Context, e *Examples, keep float64) (*Selection, error) {
	if _, err := keptCount(e.Len(), keep); err != nil { // before the costly part
		return nil, err
	}
	m := p.Metric
	if m == nil {
		m = Prototypes{}
	}
	r, err := m.Rank(ctx, e)
	if err != nil {
		return nil, err
	}
	s := &Selection{Score: r.Score}
	if r.Clusters != nil {
		s.Cluster = r.Clusters.Assignment
	}
	groups := e.Labels
	if groups == nil {
		groups = s.Cluster
	}
	s.Kept, err = Select(r.Score, groups, keep, p.Balance, p.Mode)
	return s, err
}

// Random scores uniformly at random in [0, 1): the baseline that every metric has to beat.
type Random struct{ Seed uint64 }

// Rank draws one score for each example.
func (m Random) Rank(_ context.Context, e *Examples) (*Ranking, error) {
	r := rng.New(m.Seed, "random-scores")
	s := make([]float64, e.Len())
	for i := range s {
		s[i] = r.Float64()
	}
	return &Ranking{Score: s}, nil
}

// Prototypes scores by the distance to the nearest of K prototypes: PrototypeScores. It needs no labels.
type Prototypes struct {
	K    int // 0: 20, but no more than half the examples
	Seed uint64
}

// Rank clusters the features.
func (m Prototypes) Rank(ctx context.Context, e *Examples) (*Ranking, error) {
	k := m.K
	if k == 0 {
		k = min(20, max(1, e.Len()/2))
	}
	s, cl, err := prototypeScores(ctx, e.Features, k, m.Seed)
	if err != nil {
		return nil, err
	}
	return &Ranking{Score: s, Clusters: cl}, nil
}

// ClassPrototypes scores by the distance to the prototype of the example's own class: ClassPrototypeScores.
type ClassPrototypes struct{}

// Rank needs labels.
func (ClassPrototypes) Rank(_ context.Context, e *Examples) (*Ranking, error) {
	if e.Labels == nil {
		return nil, needLabels("supervised-prototypes")
	}
	s, err := ClassPrototypeScores(e.Features, e.Labels)
	if err != nil {
		return nil, err
	}
	return &Ranking{Score: s}, nil
}

// ProbeScore names a score that needs trained models.
type ProbeScore string

// The scores that Probe can give.
const (
	ScoreEL2N            ProbeScore = "el2n"
	ScoreForgetting      ProbeScore = "forgetting"
	ScoreMemorization    ProbeScore = "memorization"
	ScoreInfluenceMax    ProbeScore = "influence-max"
	ScoreInfluenceSumAbs ProbeScore = "influence-sum-abs"
	ScoreDDD             ProbeScore = "ddd"
	ScoreActiveLearning  ProbeScore = "active-learning"
)

// ProbeScores lists all of them.
func ProbeScores() []ProbeScore {
	return []ProbeScore{ScoreEL2N, ScoreForgetting, ScoreMemorization, ScoreInfluenceMax, ScoreInfluenceSumAbs, ScoreDDD, ScoreActiveLearning}
}

// Probe scores features by training linear softmax classifiers on them, on the host: the supervised metrics of the
// paper for whoever has embeddings and labels but no training run to record. Where there is one, a [TrainRecorder] in it or
// models trained on subsets of it (SubsetStats) know the network's own difficulties, which are the better ones. One
// epoch of one model costs O(n·d·classes).
type Probe struct {
	Score  ProbeScore // "": el2n
	Models int        // 0: 10 for el2n, 1 for forgetting, 20 for the scores of models trained on subsets
	Epochs int        // 0: 2 for el2n (early in training), 8 for forgetting, 10 for the others
	Share  float64    // of the examples that a subset model is trained on; 0: 0.7
	Seed   uint64
}

// Rank trains the probes.
func (p Probe) Rank(ctx context.Context, e *Examples) (*Ranking, error) {
	if p.Score == "" {
		p.Score = ScoreEL2N
	}
	if !slices.Contains(ProbeScores(), p.Score) {
		return nil, fmt.Errorf("curate: unknown score %q; accepted: %v", p.Score, ProbeScores())
	}
	n := e.Len()
	classes, err := classCount(e.Labels, n, string(p.Score))
	if err != nil {
		return nil, err
	}
	models, epochs := 20, 10
	switch p.Score {
	case ScoreEL2N:
		models, epochs = 10, 2
	case ScoreForgetting:
		models, epochs = 1, 8
	}
	if p.Models > 0 {
		models = p.Models
	}
	if p.Epochs > 0 {
		epochs = p.Epochs
	}
	influence := p.Score == ScoreInfluenceMax || p.Score == ScoreInfluenceSumAbs
	if influence && e.TestFeatures == nil {
		return nil, fmt.Errorf("curate: %s needs test examples: set TestFeatures and TestLabels (--test and --test-labels)", p.Score)
	}
	x, test, err := standardise(e.Features, e.TestFeatures)
	if err != nil {
		return nil, err
	}
	if test != nil && len(e.TestLabels) != test.RawMatrix().Rows {
		return nil, fmt.Errorf("curate: %d test labels for %d test examples; both must agree", len(e.TestLabels), test.RawMatrix().Rows)
	}

	if p.Score == ScoreForgetting {
		// several models: the mean of their counts
		score := make([]float64, n)
		for k := range models {
			rec := NewTrainRecorder(n, classes)
			pr := newProbe(x, e.Labels, classes, nil, p.Seed, k)
			for range epochs {
				if err := pr.epoch(ctx); err != nil {
					return nil, err
				}
				rec.observe(pr.predict(x), e.Labels)
				rec.EndEpoch()
			}
			f, err := Forgetting(rec.Correct())
			if err != nil {
				return nil, err
			}
			for i, v := range f {
				score[i] += v / float64(models)
			}
		}
		return &Ranking{Score: score}, nil
	}

	share := 1.
	if p.Score != ScoreEL2N {
		if share = p.Share; share == 0 {
			share = 0.7
		}
		if !(share > 0 && share < 1) {
			return nil, fmt.Errorf("curate: subset share %g; it must lie between 0 and 1 (the paper: 0.7)", share)
		}
	}
	var included, right, rightTest [][]bool
	var probs [][][]float64
	for k := range models {
		var in []bool
		if share < 1 {
			in = Subset(n, share, p.Seed, k)
		}
		pr := newProbe(x, e.Labels, classes, in, p.Seed, k)
		for range epochs {
			if err := pr.epoch(ctx); err != nil {
				return nil, err
			}
		}
		q := pr.predict(x)
		probs, included = append(probs, q), append(included, in)
		right = append(right, correct(q, e.Labels))
		if influence {
			rightTest = append(rightTest, correct(pr.predict(test), e.TestLabels))
		} else {
			rightTest = append(rightTest, nil)
		}
	}
	if p.Score == ScoreEL2N {
		s, err := EL2N(probs, e.Labels)
		return &Ranking{Score: s}, err
	}
	s, err := SubsetStats(included, right, rightTest, probs)
	if err != nil {
		return nil, err
	}
	score := map[ProbeScore][]float64{
		ScoreMemorization: s.Memorization, ScoreInfluenceMax: s.InfluenceMax, ScoreInfluenceSumAbs: s.InfluenceSumAbs,
		ScoreDDD: s.DDD, ScoreActiveLearning: s.ActiveLearning,
	}[p.Score]
	return &Ranking{Score: score}, nil
}

// Subset marks the random round(share·n) examples that subset model number k is trained on.
func Subset(n int, share float64, seed uint64, k int) []bool {
	in := make([]bool, n)
	r := rng.New(seed, fmt.Sprintf("subset-%d", k))
	for _, i := range r.Perm(n)[:int(math.Round(share*float64(n)))] {
		in[i] = true
	}
	return in
}

func needLabels(method string) error {
	return fmt.Errorf("curate: %s needs labels; without them use prototypes or random", method)
}

// classCount is one more than the largest label, at least 2.
func classCount(labels []int, n int, method string) (int, error) {
	if labels == nil {
		return 0, needLabels(method)
	}
	if len(labels) != n {
		return 0, fmt.Errorf("curate: %d labels for %d examples; both must agree", len(labels), n)
	}
	for i, y := range labels {
		if y < 0 || y >= 1<<16 {
			return 0, fmt.Errorf("curate: label %d of example %d; labels are 0 to %d", y, i, 1<<16-1)
		}
	}
	return max(2, slices.Max(labels)+1), nil
}

func correct(probs [][]float64, labels []int) []bool {
	out := make([]bool, len(probs))
	for i, p := range probs {
		best := 0
		for c, v := range p {
			if v > p[best] {
				best = c
			}
		}
		out[i] = best == labels[i]
	}
	return out
}

// standardise gives every feature mean 0 and variance 1 over x, and applies the same map to the test features.
func standardise(x, test *mat.Dense) (*mat.Dense, *mat.Dense, error) {
	n, d := x.Dims()
	if test != nil {
		if _, td := test.Dims(); td != d {
			return nil, nil, fmt.Errorf("curate: test examples of %d features, the others have %d", td, d)
		}
		test = mat.DenseCopyOf(test)
	}
	x = mat.DenseCopyOf(x)
	col := make([]float64, n)
	for j := range d {
		mat.Col(col, j, x)
		mean, ss := 0., 0.
		for i, v := range col {
			if math.IsNaN(v) || math.IsInf(v, 0) {
				return nil, nil, fmt.Errorf("curate: feature %d of example %d is %g; all must be finite", j, i, v)
			}
			mean += v / float64(n)
		}
		for _, v := range col {
			ss += (v - mean) * (v - mean) / float64(n)
		}
		scale := 0.
		if ss > 0 {
			scale = 1 / math.Sqrt(ss)
		}
		for i, v := range col {
			x.Set(i, j, (v-mean)*scale)
		}
		if test != nil {
			rows, _ := test.Dims()
			for i := range rows {
				test.Set(i, j, (test.At(i, j)-mean)*scale)
			}
		}
	}
	return x, test, nil
}

package curate

import (
	"context"
	"math"
	"slices"
	"strings"
	"testing"

	"gonum.org/v1/gonum/mat"

	"github.com/lathe-ml/lathe/internal/rng"
)

// blobs are n points around the given number of centres, with their labels; flipped marks the share of points that
// carry a wrong label.
func blobs(n, classes, d int, noise, wrong float64) (e *Examples, flipped []bool) {
	r := rng.New(5, "blobs")
	centre := mat.NewDense(classes, d, nil)
	for c := range classes {
		for j := range d {
			centre.Set(c, j, r.NormFloat64())
		}
	}
	e, flipped = &Examples{Features: mat.NewDense(n, d, nil), Labels: make([]int, n)}, make([]bool, n)
	for i := range n {
		c := i % classes
		for j := range d {
			e.Features.Set(i, j, centre.At(c, j)+noise*r.NormFloat64())
		}
		e.Labels[i] = c
		if flipped[i] = r.Float64() < wrong; flipped[i] {
			e.Labels[i] = (c + 1) % classes
		}
	}
	return e, flipped
}

func refuses(t *testing.T, what string, err error, want string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("%s: got %v, want an error with %q", what, err, want)
	}
}

func TestEL2NLiesBetweenZeroAndRootTwo(t *testing.T) {
	const c = 4.
	s, err := EL2N([][][]float64{{{1, 0, 0, 0}, {0, 1, 0, 0}, {1 / c, 1 / c, 1 / c, 1 / c}}}, []int{0, 0, 2})
	if err != nil {
		t.Fatal(err)
	}
	near(t, "certain and right", s[0], 0, 1e-15)
	near(t, "certain and wrong", s[1], math.Sqrt2, 1e-15)
	near(t, "uniform", s[2], math.Sqrt((c-1)/c), 1e-15)

	ok := [][][]float64{{{0.5, 0.5}}}
	for _, b := range []struct {
		name   string
		probs  [][][]float64
		labels []int
		want   string
	}{
		{"no models", nil, nil, "no models"},
		{"label", ok, []int{2}, "label 2 of example 0"},
		{"negative label", ok, []int{-1}, "label -1"},
		{"lengths", ok, []int{0, 1}, "2 labels"},
		{"sum", [][][]float64{{{0.5, 0.4}}}, []int{0}, "sum to 0.9"},
		{"logits", [][][]float64{{{3, -2}}}, []int{0}, "softmax"},
		{"NaN", [][][]float64{{{math.NaN(), 1}}}, []int{0}, "NaN"},
	} {
		_, err := EL2N(b.probs, b.labels)
		refuses(t, b.name, err, b.want)
	}
}

func TestForgettingCountsFromRightToWrong(t *testing.T) {
	s, err := Forgetting([][]bool{{true, false, false}, {false, false, true}, {true, false, true}, {false, false, true}})
	if err != nil || !slices.Equal(s, []float64{2, 4, 0}) {
		t.Errorf("got %v (%v), want twice forgotten, never learnt (4 epochs), never forgotten", s, err)
	}
	_, err = Forgetting(nil)
	refuses(t, "no epochs", err, "no epochs")
	_, err = Forgetting([][]bool{{true}, {true, false}})
	refuses(t, "ragged", err, "epoch 1 has 2")
}

func TestSubsetStatsAreZeroAndFlaggedWithoutModels(t *testing.T) {
	// example 0 is in every subset, example 1 in none, example 2 in half of them
	included := [][]bool{{true, false, true}, {true, false, false}}
	right := [][]bool{{true, false, true}, {true, true, false}}
	test := [][]bool{{true, false}, {true, true}}
	s, err := SubsetStats(included, right, test, [][][]float64{{{1, 0}, {1, 0}, {1, 0}}, {{1, 0}, {0, 1}, {0.5, 0.5}}})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ got, want []float64 }{
		"memorization":      {s.Memorization, []float64{0, 0, 1}},
		"influence max":     {s.InfluenceMax, []float64{0, 0, 0}},
		"influence sum abs": {s.InfluenceSumAbs, []float64{0, 0, 1}},
		"ddd":               {s.DDD, []float64{0, 0.5, 1}},
		"active learning":   {s.ActiveLearning, []float64{0, math.Ln2, math.Ln2}},
	} {
		for i := range c.want {
			near(t, name, c.got[i], c.want[i], 1e-12)
		}
	}
	if !slices.Equal(s.Undefined, []bool{true, true, false}) {
		t.Errorf("undefined: %v", s.Undefined)
	}

	_, err = SubsetStats(included[:1], right[:1], test[:1], nil)
	refuses(t, "one model", err, "at least 2")
	_, err = SubsetStats(included, right[:1], test, nil)
	refuses(t, "models differ", err, "1 in correctTrain")
	_, err = SubsetStats(included, [][]bool{{true}, {true}}, test, nil)
	refuses(t, "examples differ", err, "other numbers")
	_, err = SubsetStats(included, right, test, [][][]float64{{{1, 0}, {1, 0}, {1, 0.2}}, {{1, 0}, {0, 1}, {1, 0}}})
	refuses(t, "sum", err, "sum to 1.2")
}

func TestPrototypeScores(t *testing.T) {
	e, _ := blobs(90, 3, 8, 0.4, 0)
	s, cl, err := PrototypeScores(e.Features, 5, 1)
	if err != nil {
		t.Fatal(err)
	}
	for i, v := range s {
		if !(v >= 0 && v <= 2) {
			t.Errorf("score %d is %g", i, v)
		}
	}
	if at, _, err := ScorePrototypes(cl.Centroids, cl.Centroids); err != nil || slices.Max(at) > 1e-12 {
		t.Errorf("a point at its centroid scores %v (%v), want 0", at, err)
	}
	scaled := mat.NewDense(90, 8, nil)
	scaled.Scale(1024, e.Features)
	t2, _, err := PrototypeScores(scaled, 5, 1)
	if err != nil {
		t.Fatal(err)
	}
	for i := range s {
		near(t, "scaled embeddings", t2[i], s[i], 1e-12)
	}

	_, _, err = PrototypeScores(e.Features, 91, 1)
	refuses(t, "k above n", err, "91 clusters of 90")
	_, _, err = PrototypeScores(mat.NewDense(3, 2, []float64{1, 1, 2, 2, 3, 3}), 2, 1)
	refuses(t, "duplicates only", err, "1 distinct")
	_, _, err = PrototypeScores(mat.NewDense(2, 2, []float64{1, 1, 0, 0}), 1, 1)
	refuses(t, "zero row", err, "row 1")

	c, err := ClassPrototypeScores(mat.NewDense(4, 2, []float64{3, 0, 1, 0, 0, 1, 0, -5}), []int{7, 7, 2, 2})
	if err != nil || !slices.Equal(c, []float64{0, 0, 1, 1}) {
		t.Errorf("class prototypes: %v (%v); the second class cancels", c, err)
	}
	_, err = ClassPrototypeScores(e.Features, []int{1})
	refuses(t, "labels", err, "1 labels for 90")
	_, err = ClassPrototypeScores(mat.NewDense(1, 1, []float64{1}), []int{-3})
	refuses(t, "negative label", err, "label -3")
}

func TestSelectKeepsExactlyAndBalances(t *testing.T) {
	r := rng.New(3, "select")
	for trial := range 300 {
		n := 1 + r.IntN(60)
		score, groups := make([]float64, n), make([]int, n)
		size := map[int]int{}
		for i := range n {
			score[i] = float64(r.IntN(8)) // ties
			groups[i] = r.IntN(1 + r.IntN(6))
			size[groups[i]]++
		}
		keep, balance := (1+r.Float64()*float64(n-1))/float64(n), r.Float64()
		m := Mode(r.IntN(2))
		kept, err := Select(score, groups, keep, balance, m)
		if err != nil {
			t.Fatal(err)
		}
		want := int(math.RoundToEven(keep * float64(n)))
		if len(kept) != want || !slices.IsSorted(kept) || len(slices.Compact(slices.Clone(kept))) != want {
			t.Fatalf("trial %d: kept %v, want %d ascending indices", trial, kept, want)
		}
		have := map[int]int{}
		for _, i := range kept {
			have[groups[i]]++
		}
		for g, all := range size {
			if least := min(all, int(balance*float64(want)/float64(len(size)))); have[g] < least {
				t.Fatalf("trial %d: group %d has %d of at least %d", trial, g, have[g], least)
			}
		}
		negative := make([]float64, n)
		for i, s := range score {
			negative[i] = -s
		}
		mirrored, err := Select(negative, groups, keep, balance, 1-m)
		if err != nil || !slices.Equal(kept, mirrored) {
			t.Fatalf("trial %d: %v keeps %v, the other mode with -score %v (%v)", trial, m, kept, mirrored, err)
		}
	}
}

func TestSelectTiesAndSingleGroup(t *testing.T) {
	for _, groups := range [][]int{nil, {4, 4, 4, 4}} {
		for _, m := range []Mode{Hard, Easy} {
			if kept, err := Select([]float64{1, 1, 1, 1}, groups, 0.5, 0.5, m); err != nil || !slices.Equal(kept, []int{0, 1}) {
				t.Errorf("ties: kept %v (%v), want the lowest indices", kept, err)
			}
		}
	}
	if kept, err := Select([]float64{9, 8, 7, 1}, []int{0, 0, 0, 1}, 0.5, 1, Hard); err != nil || !slices.Equal(kept, []int{0, 3}) {
		t.Errorf("full balance: kept %v (%v), want one of each group", kept, err)
	}
}

func TestSelectRefuses(t *testing.T) {
	s := []float64{1, 2, 3}
	for _, c := range []struct {
		name          string
		score         []float64
		groups        []int
		keep, balance float64
		m             Mode
		want          string
	}{
		{"keep 0", s, nil, 0, 0, Hard, "keep 0"},
		{"keep above 1", s, nil, 1.5, 0, Hard, "keep 1.5"},
		{"keep NaN", s, nil, math.NaN(), 0, Hard, "keep NaN"},
		{"none left", s, nil, 0.1, 0, Hard, "leaves none"},
		{"no examples", nil, nil, 0.5, 0, Hard, "no examples"},
		{"balance", s, nil, 0.5, 2, Hard, "balance 2"},
		{"groups", s, []int{1}, 0.5, 0, Hard, "1 groups for 3 scores"},
		{"negative group", s, []int{0, -1, 0}, 0.5, 0, Hard, "group -1 of example 1"},
		{"NaN score", []float64{1, math.NaN()}, nil, 0.5, 0, Hard, "score 1 is NaN"},
		{"mode", s, nil, 0.5, 0, Mode(9), "mode 9"},
	} {
		_, err := Select(c.score, c.groups, c.keep, c.balance, c.m)
		refuses(t, c.name, err, c.want)
	}
}

func TestAutoKeepsEasyExamplesWhenDataAreScarce(t *testing.T) {
	if Auto(200, 10, 50) != Easy || Auto(4000, 10, 50) != Hard || Auto(500, 10, 50) != Hard || Auto(3, 10, 0) != Hard {
		t.Error("the threshold is not the number of examples per class")
	}
}

// Every metric of the supervised kind should find mislabelled examples hard; the ones without labels cannot.
func TestSupervisedMetricsRankWrongLabelsHard(t *testing.T) {
	e, flipped := blobs(300, 3, 10, 0.5, 0.1)
	test, _ := blobs(60, 3, 10, 0.5, 0)
	e.TestFeatures, e.TestLabels = test.Features, test.Labels
	for _, name := range MetricNames() {
		m, err := NewMetric(name, Options{Seed: 2})
		if err != nil {
			t.Fatal(err)
		}
		r, err := m.Rank(context.Background(), e)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		var wrong, right, nw, nr float64
		for i, s := range r.Score {
			if flipped[i] {
				wrong, nw = wrong+s, nw+1
			} else {
				right, nr = right+s, nr+1
			}
		}
		switch name {
		case "supervised-prototypes", "el2n", "forgetting", "ddd":
			if wrong/nw <= 1.5*right/nr {
				t.Errorf("%s: wrong labels score %g, right ones %g", name, wrong/nw, right/nr)
			}
		}
		again, err := m.Rank(context.Background(), e)
		if err != nil || !slices.Equal(again.Score, r.Score) {
			t.Errorf("%s: a second run gives other scores", name)
		}
	}
}

func TestPruneSelects(t *testing.T) {
	e, _ := blobs(100, 4, 6, 0.3, 0)
	sel, err := Prune{Balance: 0.5}.Select(context.Background(), e, 0.6)
	if err != nil || len(sel.Kept) != 60 || len(sel.Score) != 100 || len(sel.Cluster) != 100 {
		t.Fatalf("%v: %d kept", err, len(sel.Kept))
	}
	e.Labels = nil
	if sel, err = (Prune{Balance: 1}).Select(context.Background(), e, 0.5); err != nil || len(sel.Kept) != 50 {
		t.Errorf("without labels: %v", err)
	}
	_, err = Prune{Metric: Probe{}}.Select(context.Background(), e, 0.5)
	refuses(t, "no labels", err, "needs labels")
	_, err = Prune{}.Select(context.Background(), &Examples{}, 0.5)
	refuses(t, "no examples", err, "no examples")
	_, err = Prune{}.Select(context.Background(), e, 2)
	refuses(t, "keep", err, "keep 2")
	_, err = NewMetric("prototype", Options{})
	refuses(t, "near miss", err, "did you mean prototypes?")
	e.Labels = make([]int, 100)
	_, err = Probe{Score: ScoreInfluenceMax}.Rank(context.Background(), e)
	refuses(t, "influence", err, "test examples")
}

func TestTrainRecorderEqualsTheMetrics(t *testing.T) {
	r := NewTrainRecorder(3, 2)
	labels := []int{0, 1, 0}
	observe := func(index []int, scores ...float32) {
		t.Helper()
		l := make([]int, len(index))
		for k, i := range index {
			l[k] = labels[i]
		}
		if err := r.Observe(index, scores, l); err != nil {
			t.Fatal(err)
		}
	}
	observe([]int{0, 1}, 1, 0, 1, 0) // 0 right, 1 wrong
	observe([]int{2}, 0, 1)          // wrong
	r.EndEpoch()
	observe([]int{1, 0}, 0, 1, 0, 1) // 1 right, 0 forgotten; 2 is not seen
	r.EndEpoch()
	if want := [][]bool{{true, false, false}, {false, true, false}}; !slices.EqualFunc(r.Correct(), want, slices.Equal[[]bool]) {
		t.Errorf("correct: %v, want %v", r.Correct(), want)
	}
	if f, err := r.Forgetting(); err != nil || !slices.Equal(f, []float64{1, 0, 2}) {
		t.Errorf("forgetting: %v (%v)", f, err)
	}
	if err := r.Snapshot([]float32{0, 0, 100, 0, 100, 0}); err != nil {
		t.Fatal(err)
	}
	s, err := r.EL2N(labels)
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []float64{math.Sqrt(0.5), math.Sqrt2, 0} {
		near(t, "el2n", s[i], want, 1e-12)
	}
	refuses(t, "index", r.Observe([]int{3}, []float32{0, 1}, []int{0}), "example 3")
	refuses(t, "length", r.Observe([]int{0}, []float32{0}, []int{0}), "1 scores")
	refuses(t, "snapshot", r.Snapshot([]float32{1}), "1 logits")
	refuses(t, "diverged", r.Snapshot([]float32{0, 0, float32(math.NaN()), 0, 0, 0}), "diverged")
}

func TestModeText(t *testing.T) {
	for _, m := range []Mode{Hard, Easy} {
		b, err := m.MarshalText()
		var back Mode
		if err != nil || back.UnmarshalText(b) != nil || back != m {
			t.Errorf("%v does not survive its text %q", m, b)
		}
	}
	_, err := ParseMode("medium")
	refuses(t, "mode", err, "hard, easy")
}

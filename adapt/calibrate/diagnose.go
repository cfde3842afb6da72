package calibrate

import (
	"cmp"
	"fmt"
	"math"
	"slices"

	"github.com/lathe-ml/lathe/internal/metric"
	"github.com/lathe-ml/lathe/internal/stat"
)

// Diagnosis says whether one temperature can be enough: what the confusions of a network tell about overlapping classes.
type Diagnosis struct {
	Cases     int     `json:"cases"`
	Classes   int     `json:"classes"`
	ErrorRate float64 `json:"error_rate"`
	// Partners is the effective number of other classes that the wrong predictions of a class really belong to: 1 where two
	// classes are mistaken for each other, Classes−1 where errors go anywhere. 0: too few errors to tell.
	Partners float64 `json:"partners"`
	// OverlapMass is the share ρ of cases in regions that Partners+1 classes share, which would explain the errors.
	OverlapMass float64 `json:"overlap_mass"`
	// ExpectedExcess is what the theory (Overlap.Theory) lets temperature scaling leave over, in nats, if all errors came from
	// such an overlap and the network were equally confident everywhere: the scale of the problem, not a prediction.
	ExpectedExcess float64 `json:"expected_excess"`
	// Gain is how much lower the negative log likelihood becomes, in nats per case, when the scaled prediction is mixed with
	// the usual confusions of the predicted class (leave-one-out): what one temperature provably leaves over. GainStdErr is
	// its standard error.
	Gain       float64     `json:"gain"`
	GainStdErr float64     `json:"gain_std_err"`
	Confusions []Confusion `json:"confusions,omitempty"` // the most frequent, at most ten
	// Overlap says that Gain is beyond doubt and worth having, and that errors concentrate on less than half of the other
	// classes: temperature scaling is the wrong tool here.
	Overlap bool `json:"temperature_fails"`
	// Biased says that Gain is beyond doubt and worth having though errors go to many classes, or there are only two: some
	// classes are predicted too often or with another confidence than others.
	Biased bool `json:"classes_biased"`
}

// Confusion is how often a class is predicted where another is right.
type Confusion struct {
	Predicted int `json:"predicted"`
	Label     int `json:"label"`
	Count     int `json:"count"`
}

const (
	leastErrors = 10  // wrong predictions from which confusions mean something
	worthwhile  = .02 // nats per case from which a better calibration is worth the trouble
	beyondDoubt = 3.  // standard errors
)

// Diagnose looks for the failure of temperature scaling that arXiv:2306.00740 describes in held-out logits [n, classes],
// labels and the temperature fitted to them.
//
// The sign of it is that errors concentrate: given the predicted class, the label is one of a few. A temperature spreads
// the doubt over all classes instead. Both parts are estimated without a model of the data: the effective number of
// partners from the probability that two errors of one predicted class have the same label, and the loss from how much
// p = (1−λ)·softmax(z/T') + λ·P(label | predicted class) improves on softmax(z/T), with T' ≤ T and λ fitted and the
// counts of a case taken without the case itself.
func Diagnose[F metric.Float](logits []F, classes int, labels []int, temperature float64) (Diagnosis, error) {
	if err := checkLogits(logits, classes, labels); err != nil {
		return Diagnosis{}, err
	}
	if !(temperature > 0) || math.IsInf(temperature, 0) {
		return Diagnosis{}, fmt.Errorf("calibrate: temperature %g; want a positive number", temperature)
	}
	s, err := metric.ScoreLogits(logits, classes, labels, temperature)
	if err != nil {
		return Diagnosis{}, fmt.Errorf("calibrate: %w", err)
	}
	d := Diagnosis{Cases: s.Len(), Classes: classes}
	count, total, wrong := map[[2]int]int{}, map[int]int{}, map[int]int{}
	for i, p := range s.Predicted {
		count[[2]int{p, labels[i]}]++
		total[p]++
		if p != labels[i] {
			wrong[p]++
		}
	}
	errors, same, pairs := 0, 0., 0.
	for _, n := range wrong {
		errors += n
		pairs += float64(n) * float64(n-1)
	}
	for key, n := range count {
		if key[0] != key[1] {
			d.Confusions = append(d.Confusions, Confusion{key[0], key[1], n})
			same += float64(n) * float64(n-1)
		}
	}
	slices.SortFunc(d.Confusions, func(a, b Confusion) int {
		return cmp.Or(b.Count-a.Count, a.Predicted-b.Predicted, a.Label-b.Label)
	})
	d.Confusions = slices.Clip(d.Confusions[:min(len(d.Confusions), 10)])
	d.ErrorRate = float64(errors) / float64(d.Cases)
	if errors < leastErrors || pairs == 0 {
		return d, nil
	}
	d.Partners = float64(classes - 1)
	if same > 0 {
		d.Partners = min(max(pairs/same, 1), d.Partners)
	}
	group := d.Partners + 1
	d.OverlapMass = min(d.ErrorRate/(1-1/group), 1)
	d.ExpectedExcess = max(overlapTheory(float64(classes), d.OverlapMass, group, 1).Excess, 0)

	// The usual labels of case i's predicted class, counted without i, with one case more spread over all classes.
	usual := make([]float64, d.Cases)
	for i, p := range s.Predicted {
		usual[i] = (float64(count[[2]int{p, labels[i]}]-1) + 1/float64(classes)) / float64(total[p])
	}
	best := math.Inf(1)
	var losses []float64
	for _, f := range []float64{1, .7, .5, .35, .25, .15} {
		sharp, err := metric.ScoreLogits(logits, classes, labels, temperature*f)
		if err != nil {
			return Diagnosis{}, fmt.Errorf("calibrate: %w", err)
		}
		loss := func(lambda float64, i int) float64 {
			return -math.Log(max((1-lambda)*math.Exp(-sharp.LogLoss[i])+lambda*usual[i], 1e-300))
		}
		mean := func(lambda float64) (sum float64) {
			for i := range usual {
				sum += loss(lambda, i)
			}
			return sum / float64(d.Cases)
		}
		lambda := stat.GoldenSection(mean, 0, 1, 30) // the mean is convex in λ
		if m := mean(lambda); m < best {
			best, losses = m, losses[:0]
			for i := range usual {
				losses = append(losses, loss(lambda, i))
			}
		}
	}
	var sum, square float64
	for i, l := range losses {
		g := s.LogLoss[i] - l
		sum += g
		square += g * g
	}
	n := float64(d.Cases)
	d.Gain = sum / n
	d.GainStdErr = math.Sqrt(max(square/n-d.Gain*d.Gain, 0) / max(n-1, 1))
	if d.Gain >= worthwhile && d.Gain >= beyondDoubt*d.GainStdErr {
		d.Overlap = d.Partners <= float64(classes-1)/2
		d.Biased = !d.Overlap
	}
	return d, nil
}

// Advice says in plain words what the diagnosis means for someone who wants calibrated probabilities.
func (d Diagnosis) Advice() string {
	switch {
	case d.Partners == 0:
		return fmt.Sprintf("There are too few wrong predictions among %d cases to tell whether classes overlap.", d.Cases)
	case d.Overlap:
		return fmt.Sprintf("One temperature is not enough here: classes overlap. %.0f %% of the predictions are wrong, and the wrong ones of a class "+
			"belong to about %.1f other classes, where %d would be possible. A temperature can only spread that doubt over all %d classes: it leaves at "+
			"least %.2g nats per case (standard error %.1g) that knowing the usual confusions removes. The more classes, the more it leaves. Look at the "+
			"labels of the classes that are mistaken for each other, merge them, or train with d-Mixup (learn.Mixup).",
			100*d.ErrorRate, d.Partners, d.Classes-1, d.Classes, d.Gain, d.GainStdErr)
	case d.Biased:
		return fmt.Sprintf("One temperature is not enough here: knowing what the predicted class usually turns out to be would gain %.2g nats per case "+
			"(standard error %.1g). Errors do not gather on few classes, so some classes are predicted too often, or with another confidence than "+
			"others: compare their shares in training and here, or fit a bias and a factor per class.", d.Gain, d.GainStdErr)
	}
	if d.Gain < 1e-3 {
		return "No sign that one temperature is too little: knowing the usual confusions of the predicted class would gain nothing."
	}
	return fmt.Sprintf("No clear sign that one temperature is too little: knowing the usual confusions of the predicted class would gain %.2g nats per case "+
		"(standard error %.1g).", d.Gain, d.GainStdErr)
}

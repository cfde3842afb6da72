package metric

import (
	"cmp"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
)

// Float is what scores are given in.
type Float interface{ ~float32 | ~float64 }

// Bins says how cases are grouped by the confidence of their predicted class. The zero value is the usual 15 bins of equal
// width, [lo, hi) with the last closed.
type Bins struct {
	Count       int  // of equal width on [0, 1], 1 to 1e6; 0: 15
	UpperClosed bool // bins are (lo, hi], the first closed below
}

func (b Bins) count() (int, error) {
	switch {
	case b.Count == 0:
		return 15, nil
	case b.Count < 1 || b.Count > 1e6:
		return 0, fmt.Errorf("metric: %d confidence bins; want 1 to 1000000 (15 is usual)", b.Count)
	}
	return b.Count, nil
}

// of is the bin of a confidence in [0, 1].
func (b Bins) of(confidence float64, count int) int {
	at := int(confidence * float64(count))
	if b.UpperClosed {
		at = int(math.Ceil(confidence*float64(count))) - 1
	}
	return min(max(at, 0), count-1)
}

// Bin is one bar of a reliability diagram.
type Bin struct {
	Low        float64 `json:"low"`
	High       float64 `json:"high"`
	Count      int     `json:"count"`
	Accuracy   float64 `json:"accuracy"`   // share of right predictions; 0 where Count is
	Confidence float64 `json:"confidence"` // mean probability of the predicted class; 0 where Count is
}

// Gap is how far accuracy and mean confidence are apart.
func (b Bin) Gap() float64 { return math.Abs(b.Accuracy - b.Confidence) }

// Reliability is a reliability diagram: all bins in order, empty ones included.
type Reliability []Bin

// ECE is the expected calibration error, Σ n_b/n · |accuracy − confidence|; 0 without cases.
func (r Reliability) ECE() float64 {
	n, s := 0, 0.
	for _, b := range r {
		n += b.Count
		s += float64(b.Count) * b.Gap()
	}
	return s / float64(max(n, 1))
}

// MCE is the maximum calibration error: the largest gap of a bin.
func (r Reliability) MCE() float64 {
	m := 0.
	for _, b := range r {
		m = max(m, b.Gap())
	}
	return m
}

// ACE is the average calibration error: the mean gap of the bins that are not empty. It is not the adaptive error, whose
// bins hold equally many cases.
func (r Reliability) ACE() float64 {
	n, s := 0, 0.
	for _, b := range r {
		if b.Count > 0 {
			n++
			s += b.Gap()
		}
	}
	return s / float64(max(n, 1))
}

// Calibration holds the figures that say whether predicted probabilities mean what they say.
type Calibration struct {
	Cases       int         `json:"cases"`
	Classes     int         `json:"classes"`
	Accuracy    float64     `json:"accuracy"`     // share in [0, 1]
	ECE         float64     `json:"ece"`          // expected calibration error, [0, 1]
	MCE         float64     `json:"mce"`          // maximum calibration error, [0, 1]
	ACE         float64     `json:"ace"`          // average calibration error over bins that are not empty, [0, 1]
	AdaptiveECE float64     `json:"adaptive_ece"` // expected calibration error over bins of equally many cases, [0, 1]
	NLL         float64     `json:"nll"`          // mean −log of the label's probability, nats
	Brier       float64     `json:"brier"`        // mean Σ (p − onehot)², [0, 2]
	Bins        Reliability `json:"bins"`
}

// Scored is what the calibration figures need of each case. All slices are of one length.
type Scored struct {
	Classes      int
	Confidence   []float64 // largest probability
	Predicted    []int     // its class, the first of equals
	Labels       []int
	LogLoss      []float64 // −log of the label's probability
	SquaredError []float64 // Σ (p − onehot)²

	order []int // by confidence, ascending
}

// tiny is the smallest probability whose logarithm is reported.
const tiny = 1e-300

// ScoreProbabilities scores distributions p [cases, classes] against labels in [0, classes). A row that does not sum to
// 1 within 1e-3, or that has a value outside [0, 1], is refused. The logarithm of a probability below 1e-300 is that of
// 1e-300.
func ScoreProbabilities[F Float](p []F, classes int, labels []int) (*Scored, error) {
	return score(len(p), classes, labels, func(i int, row []float64) (float64, error) {
		sum := 0.
		for c := range row {
			v := float64(p[i*classes+c])
			if !(v >= 0 && v <= 1+1e-3) {
				return 0, fmt.Errorf("metric: probability %g of class %d in row %d; want 0 to 1 (logits go to ScoreLogits)", v, c, i)
			}
			row[c] = v
			sum += v
		}
		if !(math.Abs(sum-1) <= 1e-3) {
			return 0, fmt.Errorf("metric: the probabilities of row %d sum to %g; want 1 (logits go to ScoreLogits)", i, sum)
		}
		return -math.Log(max(row[labels[i]], tiny)), nil
	})
}

// ScoreLogits scores softmax(z/temperature) of logits z [cases, classes] against labels in [0, classes). Logits that are
// not finite and a temperature that is not a positive number are refused.
func ScoreLogits[F Float](z []F, classes int, labels []int, temperature float64) (*Scored, error) {
	if !(temperature > 0) || math.IsInf(temperature, 0) {
		return nil, fmt.Errorf("metric: temperature %g; want a positive number", temperature)
	}
	return score(len(z), classes, labels, func(i int, row []float64) (float64, error) {
		top := math.Inf(-1)
		for c := range row {
			v := float64(z[i*classes+c])
			if math.IsNaN(v) || math.IsInf(v, 0) {
				return 0, fmt.Errorf("metric: logit %g of class %d in row %d; want finite numbers", v, c, i)
			}
			row[c] = v
			top = max(top, v)
		}
		y, sum := row[labels[i]], 0.
		for c, v := range row {
			row[c] = math.Exp(v/temperature - top/temperature)
			sum += row[c]
		}
		for c := range row {
			row[c] /= sum
		}
		return max(math.Log(sum)-(y/temperature-top/temperature), 0), nil
	})
}

// score fills a Scored from rows of probabilities, which fill writes with the case's log loss as its answer.
func score(size, classes int, labels []int, fill func(i int, row []float64) (float64, error)) (*Scored, error) {
	n := len(labels)
	switch {
	case classes < 2:
		return nil, fmt.Errorf("metric: calibration of %d classes; want at least 2 (a single score s of two classes is the pair 0, s)", classes)
	case n == 0 || size%classes != 0 || size/classes != n:
		return nil, fmt.Errorf("metric: %d scores for %d labels of %d classes; want classes for each label, and at least one", size, n, classes)
	}
	for i, y := range labels {
		if y < 0 || y >= classes {
			return nil, fmt.Errorf("metric: label %d of row %d; want 0 to %d", y, i, classes-1)
		}
	}
	s := &Scored{
		Classes: classes, Labels: slices.Clone(labels), Confidence: make([]float64, n), Predicted: make([]int, n),
		LogLoss: make([]float64, n), SquaredError: make([]float64, n), order: make([]int, n),
	}
	row := make([]float64, classes)
	for i, y := range labels {
		loss, err := fill(i, row)
		if err != nil {
			return nil, err
		}
		best, sq := 0, 0.
		for c, v := range row {
			if v > row[best] {
				best = c
			}
			if c == y {
				v -= 1
			}
			sq += v * v
		}
		s.Confidence[i], s.Predicted[i], s.LogLoss[i], s.SquaredError[i], s.order[i] = min(row[best], 1), best, loss, sq, i
	}
	slices.SortStableFunc(s.order, func(a, b int) int { return cmp.Compare(s.Confidence[a], s.Confidence[b]) })
	return s, nil
}

// Len is the number of cases.
func (s *Scored) Len() int { return len(s.Labels) }

// Correct says whether case i is predicted right.
func (s *Scored) Correct(i int) bool { return s.Predicted[i] == s.Labels[i] }

// Calibration computes all figures.
func (s *Scored) Calibration(b Bins) (Calibration, error) {
	count, err := b.count()
	if err != nil {
		return Calibration{}, err
	}
	return s.figures(b, count, nil, s.hits()), nil
}

func (s *Scored) hits() []float64 {
	hit := make([]float64, s.Len())
	for i := range hit {
		if s.Correct(i) {
			hit[i] = 1
		}
	}
	return hit
}

// figures computes the figures of the cases counted weight times each (nil: once). hit is 1 where a case counts as right.
func (s *Scored) figures(b Bins, count int, weight []int, hit []float64) Calibration {
	of := func(i int) int {
		if weight == nil {
			return 1
		}
		return weight[i]
	}
	c := Calibration{Classes: s.Classes, Bins: make(Reliability, count)}
	for k := range c.Bins {
		c.Bins[k].Low, c.Bins[k].High = float64(k)/float64(count), float64(k+1)/float64(count)
	}
	for i, conf := range s.Confidence {
		n := of(i)
		w := float64(n)
		bin := &c.Bins[b.of(conf, count)]
		bin.Count += n
		bin.Accuracy += w * hit[i]
		bin.Confidence += w * conf
		c.Cases += n
		c.Accuracy += w * hit[i]
		c.NLL += w * s.LogLoss[i]
		c.Brier += w * s.SquaredError[i]
	}
	for k := range c.Bins {
		if bin := &c.Bins[k]; bin.Count > 0 {
			bin.Accuracy /= float64(bin.Count)
			bin.Confidence /= float64(bin.Count)
		}
	}
	n := float64(c.Cases)
	c.Accuracy, c.NLL, c.Brier = c.Accuracy/n, c.NLL/n, c.Brier/n
	c.ECE, c.MCE, c.ACE = c.Bins.ECE(), c.Bins.MCE(), c.Bins.ACE()
	c.AdaptiveECE = s.adaptive(count, c.Cases, of, hit)
	return c
}

// adaptive is the expected calibration error over bins that hold the cases ⌊b·n/bins⌋ to ⌊(b+1)·n/bins⌋ by confidence.
// Equally confident cases share their accuracy, so that the order of the cases does not matter.
func (s *Scored) adaptive(bins, n int, of func(int) int, hit []float64) float64 {
	total, gap := 0., 0.
	at, bin := 0, 0
	end := func() int { return int(int64(bin+1) * int64(n) / int64(bins)) }
	for from := 0; from < len(s.order); {
		conf := s.Confidence[s.order[from]]
		size, right := 0, 0.
		to := from
		for ; to < len(s.order) && s.Confidence[s.order[to]] == conf; to++ {
			i := s.order[to]
			size += of(i)
			right += float64(of(i)) * hit[i]
		}
		from = to
		for left := size; left > 0; {
			for end() <= at {
				total += math.Abs(gap)
				gap = 0
				bin++
			}
			part := min(left, end()-at)
			gap += float64(part) * (right/float64(size) - conf)
			at += part
			left -= part
		}
	}
	return (total + math.Abs(gap)) / float64(n)
}

// Bootstrap computes the figures of samples of the cases drawn with replacement, as many as there are cases each. Their
// quantiles are the error bars of the figures.
func (s *Scored) Bootstrap(b Bins, samples int, r *rand.Rand) ([]Calibration, error) {
	count, err := b.count()
	if err != nil {
		return nil, err
	}
	hit, weight := s.hits(), make([]int, s.Len())
	var out []Calibration
	for range samples {
		clear(weight)
		for range weight {
			weight[r.IntN(len(weight))]++
		}
		out = append(out, s.figures(b, count, weight, hit))
	}
	return out, nil
}

// ECEIfCalibrated draws the expected calibration errors that a perfectly calibrated model of these confidences would show
// on as many cases (Bröcker and Smith 2007, consistency resampling). An error among them is no evidence against it.
func (s *Scored) ECEIfCalibrated(b Bins, samples int, r *rand.Rand) ([]float64, error) {
	count, err := b.count()
	if err != nil {
		return nil, err
	}
	sums := make([]float64, count) // Σ hit − confidence of a bin; |sums| summed over the bins is n·ECE
	bin := make([]int, s.Len())
	for i, c := range s.Confidence {
		bin[i] = b.of(c, count)
	}
	var out []float64
	for range samples {
		clear(sums)
		for i, c := range s.Confidence {
			if r.Float64() < c {
				sums[bin[i]]++
			}
			sums[bin[i]] -= c
		}
		e := 0.
		for _, v := range sums {
			e += math.Abs(v)
		}
		out = append(out, e/float64(s.Len()))
	}
	return out, nil
}

// Package calibrate makes the probabilities of a trained classifier mean what they say, measures whether they do, and
// tells when the usual cure cannot work.
//
// The usual cure is temperature scaling ([FitTemperature]): divide all logits by one number, fitted on held-out cases.
// Where classes overlap (ambiguous cases, wrong labels), a network that fits its training set to the last case is
// confidently wrong on a fixed share of new ones, and all that one number can do is to flatten every prediction over all
// classes: what remains grows with the logarithm of their number (Chidambaram and Ge, "On the Limitations of Temperature
// Scaling for Distributions with Overlaps", ICLR 2024, arXiv:2306.00740). [Diagnose] looks for that case in logits and
// labels, [OverlapTheory] says what to expect of it, [PairedOverlap] draws from a law that has it. The paper's own cure
// belongs to training: learn.Mixup with three or more examples in a combination.
package calibrate

import (
	"fmt"
	"math"

	"github.com/lathe-ml/lathe/internal/metric"
)

// Report holds the calibration figures of a set of predictions.
type Report = metric.Calibration

// Calibration computes the figures of softmax(logits) for logits [n, classes] and labels in [0, classes), with bins of
// equal width, [lo, hi), on the probability of the predicted class; 15 are usual. Fewer than one bin or two classes, no
// case, a label out of range and a logit that is not finite are refused.
func Calibration[F metric.Float](logits []F, classes int, labels []int, bins int) (Report, error) {
	if bins < 1 {
		return Report{}, fmt.Errorf("calibrate: %d confidence bins; want at least 1 (15 is usual)", bins)
	}
	s, err := metric.ScoreLogits(logits, classes, labels, 1)
	if err != nil {
		return Report{}, fmt.Errorf("calibrate: %w", err)
	}
	return s.Calibration(metric.Bins{Count: bins})
}

// Probabilities returns softmax(logits/temperature), [n, classes].
func Probabilities[F metric.Float](logits []F, classes int, temperature float64) ([]F, error) {
	if classes < 1 || len(logits)%classes != 0 {
		return nil, fmt.Errorf("calibrate: %d logits are not rows of %d classes", len(logits), classes)
	}
	if !(temperature > 0) || math.IsInf(temperature, 0) {
		return nil, fmt.Errorf("calibrate: temperature %g; want a positive number", temperature)
	}
	out := make([]F, len(logits))
	row := make([]float64, classes)
	for at := 0; at < len(logits); at += classes {
		top := math.Inf(-1)
		for c, v := range logits[at : at+classes] {
			z := float64(v)
			if math.IsNaN(z) || math.IsInf(z, 0) {
				return nil, fmt.Errorf("calibrate: logit %g of class %d in row %d; want finite numbers", z, c, at/classes)
			}
			row[c] = z / temperature
			top = max(top, row[c])
		}
		sum := 0.
		for c := range row {
			row[c] = math.Exp(row[c] - top)
			sum += row[c]
		}
		for c, v := range row {
			out[at+c] = F(v / sum)
		}
	}
	return out, nil
}

// checkLogits refuses what no temperature can be fitted to. Magnitudes are bounded so that differences of logits times
// the largest inverse temperature stay finite.
func checkLogits[F metric.Float](logits []F, classes int, labels []int) error {
	n := len(labels)
	switch {
	case classes < 2:
		return fmt.Errorf("calibrate: logits of %d classes; want at least 2 (a single score s of two classes is the pair 0, s)", classes)
	case n == 0 || len(logits)%classes != 0 || len(logits)/classes != n:
		return fmt.Errorf("calibrate: %d logits for %d labels of %d classes; want classes for each label, and at least one", len(logits), n, classes)
	}
	for i, y := range labels {
		if y < 0 || y >= classes {
			return fmt.Errorf("calibrate: label %d of row %d; want 0 to %d", y, i, classes-1)
		}
	}
	for i, v := range logits {
		if z := float64(v); !(math.Abs(z) <= 1e100) {
			return fmt.Errorf("calibrate: logit %g of class %d in row %d; want finite numbers of at most 1e100", z, i%classes, i/classes)
		}
	}
	return nil
}

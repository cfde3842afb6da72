// Package metric measures: classification accuracy and agreement, image fidelity, and the distance of distributions.
// Everything is summed in float64 and takes plain slices, so that every room can use it.
package metric

import (
	"fmt"
	"math"
)

// ArgMax returns the index of the largest value; the first wins among equals, NaN never does. Of an empty or all-NaN
// row it is -1.
func ArgMax(row []float32) int {
	best := -1
	for i, v := range row {
		if v == v && (best < 0 || v > row[best]) {
			best = i
		}
	}
	return best
}

// Classes returns the predicted class of each row of scores [rows, classes].
func Classes(scores []float32, classes int) ([]int, error) {
	if classes < 1 || len(scores)%classes != 0 {
		return nil, fmt.Errorf("metric: %d scores are not rows of %d classes", len(scores), classes)
	}
	out := make([]int, len(scores)/classes)
	for i := range out {
		out[i] = ArgMax(scores[i*classes : (i+1)*classes])
	}
	return out, nil
}

// Accuracy is the share in [0, 1] of rows of scores [rows, classes] whose first largest score is the label's.
func Accuracy(scores []float32, classes int, labels []int) (float64, error) {
	got, err := Classes(scores, classes)
	if err != nil {
		return 0, err
	}
	if len(got) != len(labels) || len(labels) == 0 {
		return 0, fmt.Errorf("metric: %d rows of scores for %d labels; both must be equal and at least 1", len(got), len(labels))
	}
	return share(got, labels), nil
}

// Agreement is the share in [0, 1] of rows whose predicted classes are the same in a and b, both [rows, classes].
func Agreement(a, b []float32, classes int) (float64, error) {
	if len(a) != len(b) || len(a) == 0 {
		return 0, fmt.Errorf("metric: agreement of %d and %d scores; both must be equal and at least 1", len(a), len(b))
	}
	x, err := Classes(a, classes)
	if err != nil {
		return 0, err
	}
	y, err := Classes(b, classes)
	if err != nil {
		return 0, err
	}
	return share(x, y), nil
}

func share(a, b []int) float64 {
	n := 0
	for i := range a {
		if a[i] == b[i] {
			n++
		}
	}
	return float64(n) / float64(len(a))
}

// MSE is the mean squared difference.
func MSE(a, b []float32) (float64, error) {
	if len(a) != len(b) || len(a) == 0 {
		return 0, fmt.Errorf("metric: mean squared error of %d and %d values; both must be equal and at least 1", len(a), len(b))
	}
	s := 0.
	for i := range a {
		d := float64(a[i]) - float64(b[i])
		s += d * d
	}
	return s / float64(len(a)), nil
}

// PSNR is the peak signal-to-noise ratio 10·log10(peak²/MSE) in decibels; +Inf for equal signals.
func PSNR(a, b []float32, peak float64) (float64, error) {
	if !(peak > 0) || math.IsInf(peak, 0) {
		return 0, fmt.Errorf("metric: peak %v of a PSNR is not a positive number", peak)
	}
	mse, err := MSE(a, b)
	if err != nil {
		return 0, err
	}
	return 10 * math.Log10(peak*peak/mse), nil
}

const ssimWindow = 11

// SSIM is the mean structural similarity of two planes of h×w values (Wang et al. 2004): an 11×11 Gaussian window of
// σ = 1.5 at every position inside the plane, K1 = 0.01, K2 = 0.03. It is 1 for equal planes. Planes smaller than the
// window are refused.
func SSIM(a, b []float32, h, w int, peak float64) (float64, error) {
	if h < ssimWindow || w < ssimWindow {
		return 0, fmt.Errorf("metric: SSIM of %d×%d values; its window needs at least %d×%d", w, h, ssimWindow, ssimWindow)
	}
	if len(a) != len(b) || len(a)/h != w || len(a)%h != 0 {
		return 0, fmt.Errorf("metric: SSIM of %d and %d values as %d×%d", len(a), len(b), w, h)
	}
	if !(peak > 0) || math.IsInf(peak, 0) {
		return 0, fmt.Errorf("metric: peak %v of an SSIM is not a positive number", peak)
	}
	kernel := make([]float64, ssimWindow)
	sum := 0.
	for i := range kernel {
		x := float64(i-ssimWindow/2) / 1.5
		kernel[i] = math.Exp(-x * x / 2)
		sum += kernel[i]
	}
	for i := range kernel {
		kernel[i] /= sum
	}
	// The five moments are filtered row by row, and down the columns through a ring of the last 11 filtered rows.
	ow := w - ssimWindow + 1
	var ring [ssimWindow][5][]float64
	for i := range ring {
		for m := range ring[i] {
			ring[i][m] = make([]float64, ow)
		}
	}
	c1, c2 := 0.01*peak*0.01*peak, 0.03*peak*0.03*peak
	total := 0.
	for y := range h {
		row := &ring[y%ssimWindow]
		for x := range ow {
			var s [5]float64
			for j, k := range kernel {
				p, q := float64(a[y*w+x+j]), float64(b[y*w+x+j])
				s[0] += k * p
				s[1] += k * q
				s[2] += k * p * p
				s[3] += k * q * q
				s[4] += k * p * q
			}
			for m := range s {
				row[m][x] = s[m]
			}
		}
		if y < ssimWindow-1 {
			continue
		}
		for x := range ow {
			var s [5]float64
			for j, k := range kernel {
				r := &ring[(y+1+j)%ssimWindow] // the oldest row first
				for m := range s {
					s[m] += k * r[m][x]
				}
			}
			va, vb, cov := s[2]-s[0]*s[0], s[3]-s[1]*s[1], s[4]-s[0]*s[1]
			total += (2*s[0]*s[1] + c1) * (2*cov + c2) / ((s[0]*s[0] + s[1]*s[1] + c1) * (va + vb + c2))
		}
	}
	return total / float64(ow*(h-ssimWindow+1)), nil
}

// SoftmaxKL is the mean over rows of KL(softmax(p) ‖ softmax(q)) in nats, of logits [rows, classes].
func SoftmaxKL[F Float](p, q []F, classes int) (float64, error) {
	if classes < 1 || len(p) != len(q) || len(p) == 0 || len(p)%classes != 0 {
		return 0, fmt.Errorf("metric: divergence of %d and %d logits in rows of %d classes", len(p), len(q), classes)
	}
	total := 0.
	for i := 0; i < len(p); i += classes {
		a, b := p[i:i+classes], q[i:i+classes]
		la, lb := logSumExp(a), logSumExp(b)
		for j := range a {
			if math.IsInf(float64(a[j]), -1) {
				continue // p = 0 adds nothing
			}
			lp, lq := float64(a[j])-la, float64(b[j])-lb
			total += math.Exp(lp) * (lp - lq)
		}
	}
	return max(total, 0) / float64(len(p)/classes), nil
}

// KL is the mean over rows of KL(p ‖ q) in nats, of distributions [rows, classes]. Values below 1e-12 count as 1e-12, and
// every row is divided by its sum: SoftmaxKL of the logarithms, without an exponential.
func KL[F Float](p, q []F, classes int) (float64, error) {
	if classes < 1 || len(p) != len(q) || len(p) == 0 || len(p)%classes != 0 {
		return 0, fmt.Errorf("metric: divergence of %d and %d probabilities in rows of %d classes", len(p), len(q), classes)
	}
	const floor = 1e-12
	total := 0.
	for i := 0; i < len(p); i += classes {
		var sum, zp, zq float64
		for j, v := range p[i : i+classes] {
			a, b := max(float64(v), floor), max(float64(q[i+j]), floor)
			zp, zq = zp+a, zq+b
			if a != b {
				sum += a * math.Log(a/b)
			}
		}
		total += sum/zp + math.Log(zq/zp)
	}
	return max(total, 0) / float64(len(p)/classes), nil
}

// logSumExp is log Σ exp(x) without overflow; -Inf of nothing.
func logSumExp[F Float](x []F) float64 {
	m := math.Inf(-1)
	for _, v := range x {
		m = max(m, float64(v))
	}
	if math.IsInf(m, 0) {
		return m
	}
	s := 0.
	for _, v := range x {
		s += math.Exp(float64(v) - m)
	}
	return m + math.Log(s)
}

// Cosine is the cosine similarity of two vectors. A zero vector has none: the result is then 1 if both are zero, else 0.
func Cosine(a, b []float32) (float64, error) {
	if len(a) != len(b) || len(a) == 0 {
		return 0, fmt.Errorf("metric: cosine of %d and %d values; both must be equal and at least 1", len(a), len(b))
	}
	ab, aa, bb := 0., 0., 0.
	for i := range a {
		x, y := float64(a[i]), float64(b[i])
		ab += x * y
		aa += x * x
		bb += y * y
	}
	switch {
	case aa == 0 && bb == 0:
		return 1, nil
	case aa == 0 || bb == 0:
		return 0, nil
	}
	return ab / math.Sqrt(aa) / math.Sqrt(bb), nil
}

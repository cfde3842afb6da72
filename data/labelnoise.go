package data

import (
	"fmt"

	"github.com/lathe-ml/lathe/internal/rng"
)

// PartnerNoise makes classes overlap: for every class c a fixed other class f(c) is drawn once, and every label y becomes
// f(y) with probability eta, independently (arXiv:2306.00740, section 5). The best prediction is then 1−eta for y and eta
// for f(y). The partners depend on seed and classes alone, and the flips on the seed and stream: training, calibration and
// test labels of one law take one seed and streams of their own. Labels are in [0, classes), classes is at least 2, eta in
// [0, 1]. It returns new labels and the partner of every class.
func PartnerNoise(labels []int32, classes int, eta float64, seed uint64, stream string) (noisy, partner []int32, err error) {
	if classes < 2 {
		return nil, nil, fmt.Errorf("data: label noise among %d classes; want at least 2", classes)
	}
	if !(eta >= 0 && eta <= 1) {
		return nil, nil, fmt.Errorf("data: label noise with the probability %g; want 0 to 1", eta)
	}
	r := rng.New(seed, "data/partners")
	partner = make([]int32, classes)
	for c := range partner {
		partner[c] = int32(r.IntN(classes - 1))
		if partner[c] >= int32(c) {
			partner[c]++
		}
	}
	r = rng.New(seed, "data/flips/"+stream)
	noisy = make([]int32, len(labels))
	for i, y := range labels {
		if y < 0 || int(y) >= classes {
			return nil, nil, fmt.Errorf("data: label %d of example %d; want 0 to %d", y, i, classes-1)
		}
		noisy[i] = y
		if r.Float64() < eta {
			noisy[i] = partner[y]
		}
	}
	return noisy, partner, nil
}

// UniformNoise replaces the label of a share q of the examples, each with that probability, by a class drawn uniformly
// from all, the true one included: a share q·(classes−1)/classes of the labels ends up wrong. Draws depend on seed, stream
// and position alone, so that the noise stays the same over the epochs of a training. Labels are in [0, classes), classes
// is at least 2, q in [0, 1]. It returns new labels.
func UniformNoise(labels []int32, classes int, q float64, seed uint64, stream string) ([]int32, error) {
	if classes < 2 {
		return nil, fmt.Errorf("data: label noise among %d classes; want at least 2", classes)
	}
	if !(q >= 0 && q <= 1) {
		return nil, fmt.Errorf("data: label noise with the probability %g; want 0 to 1", q)
	}
	r := rng.New(seed, "data/uniform/"+stream)
	noisy := make([]int32, len(labels))
	for i, y := range labels {
		if y < 0 || int(y) >= classes {
			return nil, fmt.Errorf("data: label %d of example %d; want 0 to %d", y, i, classes-1)
		}
		u, c := r.Float64(), int32(r.IntN(classes))
		if noisy[i] = y; u < q {
			noisy[i] = c
		}
	}
	return noisy, nil
}

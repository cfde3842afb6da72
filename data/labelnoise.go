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

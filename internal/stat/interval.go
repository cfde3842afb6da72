package stat

import (
	"math"
	"math/rand/v2"
)

// Wilson is the two-sided interval of a share, k of n cases, at a level in (0, 1) (Wilson, 1927): unlike the normal one
// it stays inside [0, 1] and is right for shares near the ends. No cases, or k outside [0, n], give NaN.
func Wilson(k, n int, level float64) (lo, hi float64) {
	if n <= 0 || k < 0 || k > n || !(level > 0 && level < 1) {
		return math.NaN(), math.NaN()
	}
	z := math.Sqrt2 * math.Erfinv(level)
	p, m := float64(k)/float64(n), float64(n)
	mid, half := p+z*z/(2*m), z*math.Sqrt(p*(1-p)/m+z*z/(4*m*m))
	lo, hi = (mid-half)/(1+z*z/m), (mid+half)/(1+z*z/m)
	if k == 0 {
		lo = 0
	}
	if k == n {
		hi = 1
	}
	return lo, hi
}

// BootstrapCI is the percentile bootstrap interval of a mean at a level in (0, 1): the quantiles of the means of draws
// samples of len(xs) values, drawn with repetition. It makes no assumption about the distribution, which for KL
// divergences is skewed. Fewer than two values give an infinite interval.
func BootstrapCI(xs []float64, level float64, draws int, r *rand.Rand) (lo, hi float64) {
	if len(xs) < 2 || draws < 2 || !(level > 0 && level < 1) {
		return math.Inf(-1), math.Inf(1)
	}
	means := make([]float64, draws)
	for i := range means {
		sum := 0.
		for range xs {
			sum += xs[r.IntN(len(xs))]
		}
		means[i] = sum / float64(len(xs))
	}
	return Quantile(means, (1-level)/2), Quantile(means, (1+level)/2)
}

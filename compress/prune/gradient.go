package prune

import (
	"fmt"
	"math"

	"github.com/lathe-ml/lathe/internal/rng"
)

// Loss is a loss of a linear read-out f = V a with a label y.
type Loss string

// The losses: cross-entropy of softmax(V a), and the square loss ½‖V a − onehot(y)‖².
const (
	CrossEntropy Loss = "cross-entropy"
	SquareLoss   Loss = "square"
)

// LossGradient is ∂ℓ/∂a for a read-out V [classes, len(a)] and a label: Vᵀ(softmax(V a) − onehot) for the cross-entropy,
// Vᵀ(V a − onehot) for the square loss (arXiv:2210.06313, section 3).
func LossGradient(v, a []float64, label int, loss Loss) ([]float64, error) {
	if len(a) == 0 || len(v) == 0 || len(v)%len(a) != 0 {
		return nil, fmt.Errorf("prune: a read-out of %d weights for %d activations; want [classes, activations]", len(v), len(a))
	}
	classes := len(v) / len(a)
	if label < 0 || label >= classes {
		return nil, fmt.Errorf("prune: label %d; want 0 to %d", label, classes-1)
	}
	if loss != CrossEntropy && loss != SquareLoss {
		return nil, fmt.Errorf("prune: there is no loss %q; accepted: %s, %s", loss, CrossEntropy, SquareLoss)
	}
	r := make([]float64, classes)
	top := math.Inf(-1)
	for c := range r {
		for i, x := range a {
			r[c] += v[c*len(a)+i] * x
		}
		top = max(top, r[c])
	}
	if loss == CrossEntropy {
		sum := 0.
		for c := range r {
			r[c] = math.Exp(r[c] - top)
			sum += r[c]
		}
		for c := range r {
			r[c] /= sum
		}
	}
	r[label]--
	g := make([]float64, len(a))
	for c, e := range r {
		for i := range g {
			g[i] += v[c*len(a)+i] * e
		}
	}
	return g, nil
}

// GradientOptions say how ActivationGradient draws.
type GradientOptions struct {
	Classes int     // rows of V, at least 2
	Loss    Loss    // "": CrossEntropy
	Sigma   float64 // standard deviation of V's entries; 0: 1/√len(a)
	Draws   int     // of V and the label; 0: 10,000
}

// ActivationGradient estimates E[∂ℓ/∂a] over random read-outs V, as at initialisation, and uniform labels, and the
// standard errors of the estimate. It is positive wherever a is (arXiv:2210.06313, theorem 3.1): the first steps of
// gradient descent shrink active entries whatever the data. Of the square loss it is Classes·Sigma²·a. It takes
// O(Draws·Classes·len(a)).
func ActivationGradient(a []float64, o GradientOptions, r *rng.Rand) (mean, stderr []float64, err error) {
	if o.Loss == "" {
		o.Loss = CrossEntropy
	}
	if o.Sigma == 0 {
		o.Sigma = 1 / math.Sqrt(float64(max(len(a), 1)))
	}
	if o.Draws == 0 {
		o.Draws = 10_000
	}
	switch {
	case len(a) == 0:
		return nil, nil, fmt.Errorf("prune: there are no activations to differentiate with respect to")
	case o.Classes < 2 || o.Classes > 1<<20/len(a)+2:
		return nil, nil, fmt.Errorf("prune: a read-out of %d classes from %d activations; want at least 2 classes and at most a million weights", o.Classes, len(a))
	case o.Draws < 2:
		return nil, nil, fmt.Errorf("prune: %d draws; a standard error needs at least 2", o.Draws)
	case !(o.Sigma > 0) || math.IsInf(o.Sigma, 0):
		return nil, nil, fmt.Errorf("prune: a standard deviation of %g; want a positive number", o.Sigma)
	}
	for i, x := range a {
		if math.IsNaN(x) || math.IsInf(x, 0) {
			return nil, nil, fmt.Errorf("prune: activation %d is %g; want finite numbers", i, x)
		}
	}
	v := make([]float64, o.Classes*len(a))
	mean, squares := make([]float64, len(a)), make([]float64, len(a))
	for n := 1; n <= o.Draws; n++ {
		for i := range v {
			v[i] = r.NormFloat64() * o.Sigma
		}
		g, err := LossGradient(v, a, r.IntN(o.Classes), o.Loss)
		if err != nil {
			return nil, nil, err
		}
		for i, x := range g { // Welford
			d := x - mean[i]
			mean[i] += d / float64(n)
			squares[i] += d * (x - mean[i])
		}
	}
	stderr = squares
	for i, s := range squares {
		stderr[i] = math.Sqrt(s / float64(o.Draws-1) / float64(o.Draws))
	}
	return mean, stderr, nil
}

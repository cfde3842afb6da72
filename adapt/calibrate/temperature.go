package calibrate

import (
	"fmt"
	"math"

	"github.com/lathe-ml/lathe/internal/metric"
)

// The range in which a temperature is looked for.
const (
	MinTemperature = 1e-4
	MaxTemperature = 1e4
)

// Temperature is a fitted temperature.
type Temperature struct {
	T         float64 `json:"temperature"` // logits are divided by it: above 1 it lowers confidence, below 1 it raises it
	NLLBefore float64 `json:"nll_before"`  // at T = 1, nats
	NLLAfter  float64 `json:"nll_after"`
	// Separable says that every case is predicted right with a margin, so that the fit would go on to ever lower
	// temperatures: T is MinTemperature and means nothing. More cases, or others, are needed.
	Separable bool `json:"separable,omitempty"`
	// Uninformative says that the logits tell nothing about the labels, or the contrary, so that the best is to predict all
	// classes alike: T is MaxTemperature.
	Uninformative bool `json:"uninformative,omitempty"`
}

// FitTemperature minimises the mean negative log likelihood of softmax(logits/T) over T, for held-out logits
// [n, classes] and labels (arXiv:1706.04599, section 4.2). The loss is convex in β = 1/T; its derivative is brought to
// zero by Newton's method within a bracket of log β, [log 1e-4, log 1e4], to a relative 1e-10, at the cost of some ten
// passes over the logits. Predictions and accuracy stay as they are. A fit that runs to either end is reported, not
// refused.
func FitTemperature[F metric.Float](logits []F, classes int, labels []int) (Temperature, error) {
	if err := checkLogits(logits, classes, labels); err != nil {
		return Temperature{}, err
	}
	loss := scaledLoss[F]{logits, classes, labels}
	t := Temperature{T: 1}
	t.NLLBefore, _, _ = loss.at(1)
	lo, hi := 1/MaxTemperature, 1/MinTemperature // of β
	_, atLow, _ := loss.at(lo)
	if atLow >= 0 { // convex: the loss rises from here on
		t.T, t.Uninformative = MaxTemperature, true
		t.NLLAfter, _, _ = loss.at(lo)
		return t, nil
	}
	_, atHigh, _ := loss.at(hi)
	if atHigh <= 0 {
		t.T, t.Separable = MinTemperature, true
		t.NLLAfter, _, _ = loss.at(hi)
		return t, nil
	}
	beta := 1.
	for range 200 {
		_, d, dd := loss.at(beta)
		switch {
		case d > 0:
			hi = beta
		case d < 0:
			lo = beta
		default:
			lo, hi = beta, beta
		}
		if math.Log(hi/lo) < 1e-10 {
			break
		}
		next := math.Sqrt(lo * hi)
		if newton := beta - d/dd; dd > 0 && newton > lo && newton < hi {
			next = newton
		}
		if math.Abs(next-beta) <= 1e-12*beta {
			break
		}
		beta = next
	}
	t.T = 1 / beta
	t.NLLAfter, _, _ = loss.at(beta)
	if t.NLLAfter > t.NLLBefore { // by rounding alone, when T is 1
		t.T, t.NLLAfter = 1, t.NLLBefore
	}
	return t, nil
}

// FitRelease is the fit of the paper's released code: one call of PyTorch's L-BFGS on T itself, from T = 1 with rate 0.01,
// at most 20 steps and no line search. In one dimension L-BFGS is the secant rule. It usually stops far from the optimum,
// near 1, which makes a network look worse than it is after scaling, and where the loss is flat the secant can even jump to a
// negative T: it is here for comparison with published figures.
func FitRelease[F metric.Float](logits []F, classes int, labels []int) (Temperature, error) {
	if err := checkLogits(logits, classes, labels); err != nil {
		return Temperature{}, err
	}
	const rate, steps, changeTolerance, gradientTolerance = .01, 20, 1e-9, 1e-7
	scaled := scaledLoss[F]{logits, classes, labels}
	loss := func(t float64) (nll, gradient float64) {
		nll, d, _ := scaled.at(1 / t)
		return nll, -d / (t * t)
	}
	t := 1.
	nll, g := loss(t)
	out := Temperature{T: t, NLLBefore: nll, NLLAfter: nll}
	if math.Abs(g) <= gradientTolerance {
		return out, nil
	}
	curvature := 1. // s/y of the pair that was kept last
	var last, lastGradient float64
	for step := range steps {
		if step > 0 {
			if s, y := last, g-lastGradient; s*y > 1e-10 {
				curvature = s / y
			}
		}
		direction := -g * curvature
		size := rate
		if step == 0 {
			size = min(1, 1/math.Abs(g)) * rate
		}
		if direction*g > -changeTolerance {
			break
		}
		last, lastGradient = size*direction, g
		before := nll
		t += last
		if t == 0 || math.IsNaN(t) || math.IsInf(t, 0) {
			return out, fmt.Errorf("calibrate: the released fit ran to the temperature %g; use FitTemperature", t)
		}
		nll, g = loss(t)
		out.T, out.NLLAfter = t, nll
		if math.Abs(g) <= gradientTolerance || math.Abs(last) <= changeTolerance || math.Abs(nll-before) < changeTolerance {
			break
		}
	}
	return out, nil
}

// scaledLoss is the mean negative log likelihood of softmax(β z) as a function of β. Rows are taken as differences to the
// label's logit, d_c = z_c − z_y, so that the loss is the mean of log Σ exp(β d_c) and constant rows are exactly constant.
type scaledLoss[F metric.Float] struct {
	logits  []F
	classes int
	labels  []int
}

// at returns the loss and its first and second derivative in β: means of log Σ exp(β d), E_p[d] and Var_p[d].
func (l scaledLoss[F]) at(beta float64) (nll, first, second float64) {
	row, exp := make([]float64, l.classes), make([]float64, l.classes)
	for i, y := range l.labels {
		z := l.logits[i*l.classes : (i+1)*l.classes]
		top := math.Inf(-1)
		for c, v := range z {
			row[c] = float64(v) - float64(z[y])
			top = max(top, beta*row[c])
		}
		sum, m1, m2 := 0., 0., 0.
		for c, v := range row {
			exp[c] = 0
			if x := beta*v - top; x > -700 { // below, exp is 0 beside the largest term, and slow
				exp[c] = math.Exp(x)
			}
			sum += exp[c]
			m1 += exp[c] * v
		}
		m1 /= sum
		for c, v := range row {
			m2 += exp[c] * (v - m1) * (v - m1)
		}
		nll += top + math.Log(sum)
		first += m1
		second += m2 / sum
	}
	n := float64(len(l.labels))
	return nll / n, first / n, second / n
}

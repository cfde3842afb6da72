package curate

import (
	"fmt"
	"math"
	"slices"

	"gonum.org/v1/gonum/optimize"

	"github.com/lathe-ml/lathe/internal/stat"
)

// PerceptronPoint is the typical max-margin student of one pruned data set in the limit of many inputs.
type PerceptronPoint struct {
	R     float64 `json:"r"`     // cosine between student and teacher
	Rho   float64 `json:"rho"`   // cosine between student and probe; R for a perfect probe
	Kappa float64 `json:"kappa"` // margin in units of the student's length
	Error float64 `json:"error"` // generalisation error arccos(R)/π
}

// PerceptronTheory returns the test error of a max-margin perceptron that learns from pruned data (Sorscher et al.,
// arXiv:2206.14486, section 2 and appendix A), by the replica method: exact as the number of inputs N goes to infinity.
//
// A teacher T labels inputs x ~ N(0, I) by sign(T·x). A probe at the angle thetaRad to T ranks them by their margins
// |probe·x|; the share keep with the smallest margins (Hard) or the largest (Easy) is kept, alphaPrune = kept/N
// examples in all. The student maximises its margin on them, without bias.
//
// Instead of iterating the paper's saddle-point equations it solves the problem that they are the stationarity
// conditions of: for an overlap R let κ(R) solve α·E[(κ-t)₊²] = 1-R², where t = R|u| + √(1-R²)·z, u ~ N(0, 1) under the
// pruning and z ~ N(0, 1); the student is at the maximum of κ(R). With an imperfect probe there are two overlaps. Both
// agree with the printed equations to 1e-6. A perfect probe takes a millisecond, an imperfect one tens of them.
//
// alphaPrune is positive and finite, keep in (0, 1], thetaRad in [0, π/2).
func PerceptronTheory(alphaPrune, keep, thetaRad float64, mode Mode) (PerceptronPoint, error) {
	switch {
	case !(alphaPrune > 0) || math.IsInf(alphaPrune, 1):
		return PerceptronPoint{}, fmt.Errorf("curate: alpha %g examples per input; it must be positive and finite", alphaPrune)
	case !(keep > 0 && keep <= 1):
		return PerceptronPoint{}, fmt.Errorf("curate: keep %g; it is the share of examples that stays, above 0 and at most 1", keep)
	case !(thetaRad >= 0 && thetaRad < math.Pi/2):
		return PerceptronPoint{}, fmt.Errorf("curate: probe angle %g rad; it lies in [0, π/2)", thetaRad)
	case mode != Hard && mode != Easy:
		return PerceptronPoint{}, fmt.Errorf("curate: unknown mode %d; accepted: Hard, Easy", int(mode))
	}
	// the probe's margins |p| that pruning leaves
	p := perceptron{alpha: alphaPrune, keep: keep, lo: 0, hi: math.Inf(1)}
	switch {
	case keep == 1:
	case mode == Hard:
		p.hi = stat.HInv((1 - keep) / 2)
	default:
		p.lo = stat.HInv(keep / 2)
	}
	p.hi = min(p.hi, max(10, p.lo+6))
	var pt PerceptronPoint
	var angle float64
	if thetaRad == 0 {
		angle, pt.Kappa = p.perfect()
		pt.R = math.Cos(angle)
		pt.Rho = pt.R
	} else {
		p.sin, p.cos = math.Sincos(thetaRad)
		var w float64
		var err error
		if pt.R, w, pt.Kappa, angle, err = p.imperfect(); err != nil {
			return PerceptronPoint{}, err
		}
		pt.Rho = p.cos*pt.R + p.sin*w
	}
	pt.Error = angle / math.Pi
	if math.IsNaN(pt.Error) || math.IsNaN(pt.Kappa) {
		return PerceptronPoint{}, fmt.Errorf("curate: no solution for alpha %g, keep %g, angle %g rad: too extreme for float64", alphaPrune, keep, thetaRad)
	}
	return pt, nil
}

// PerceptronPareto returns the share to keep, hard examples first and at least minKeep, that is best for a training set
// of alphaPrune examples per input, and what it reaches: one point of the Pareto frontier over pools of up to
// alphaPrune/minKeep examples per input. As pools grow, the frontier of a perfect probe falls exponentially with
// alphaPrune, where the error without pruning falls as 1/alphaPrune; an imperfect probe bends it back to a power law.
//
// minKeep lies in (0, 1]; the other arguments are those of PerceptronTheory.
func PerceptronPareto(alphaPrune, thetaRad, minKeep float64) (keep float64, best PerceptronPoint, err error) {
	if !(minKeep > 0 && minKeep <= 1) {
		return 0, PerceptronPoint{}, fmt.Errorf("curate: least share to keep %g; it must be above 0 and at most 1", minKeep)
	}
	if best, err = PerceptronTheory(alphaPrune, 1, thetaRad, Hard); err != nil {
		return 0, PerceptronPoint{}, err
	}
	const grid = 12
	lo, at := math.Log(minKeep), 0. // logarithms of the share
	try := func(x float64) {
		p, e := PerceptronTheory(alphaPrune, math.Exp(x), thetaRad, Hard)
		if e != nil {
			err = e
		} else if p.Error < best.Error {
			best, at = p, x
		}
	}
	for i := range grid {
		try(lo * float64(i+1) / grid)
	}
	for step := -lo / grid; step > 0.01; { // refine around the best grid point
		step /= 2
		for _, x := range []float64{at - step, at + step} {
			if x >= lo && x <= 0 {
				try(x)
			}
		}
	}
	if err != nil {
		return 0, PerceptronPoint{}, err
	}
	return math.Exp(at), best, nil
}

// perceptron is one instance of the problem: kept examples per input, kept share, the interval of probe margins, and
// the probe's angle to the teacher.
type perceptron struct {
	alpha, keep, lo, hi float64
	sin, cos            float64
}

// sums are α·E[g] and its derivatives, g(Δ, s) = E_z[(Δ-sz)₊²] = (Δ²+s²)Φ(Δ/s) + Δsφ(Δ/s), with Δ = κ - Ra - wb.
type sums struct {
	g, dKappa  float64 // α·E[g], its derivative by κ
	dFirst, dW float64 // by R and w through Δ alone: -α·E[a·g'], -α·E[b·g']
	tail       float64 // α·E[Φ(Δ/s)], half the derivative by s over s
}

func (t *sums) add(weight, kappa, r, w, s, a, b float64) {
	d := kappa - r*a - w*b
	x := d / s
	if x < -38 {
		return
	}
	cdf, pdf := stat.NormalCDF(x), stat.NormalPDF(x)
	slope := 2 * (d*cdf + s*pdf)
	t.g += weight * ((d*d+s*s)*cdf + d*s*pdf)
	t.dKappa += weight * slope
	t.dFirst -= weight * slope * a
	t.dW -= weight * slope * b
	t.tail += weight * cdf
}

// reach is how many standard deviations s of a margin violation count; beyond, Φ is below 1e-19.
const reach = 9

var (
	nodes64, weights64 = stat.GaussLegendre(64, 0, 1)
	nodes32, weights32 = stat.GaussLegendre(32, 0, 1)
)

// perfect solves the problem of a probe that is the teacher, by bisection on the sign of dκ/dR. It returns the angle
// between student and teacher, which unlike R keeps its digits near 0, and κ.
func (p perceptron) perfect() (angle, kappa float64) {
	lo, hi := 0., math.Pi/2
	kappa = 1 / math.Sqrt(p.alpha)
	for range 100 {
		angle = (lo + hi) / 2
		s, r := math.Sincos(angle)
		var t sums
		kappa, t = p.margin(kappa, s*s, func(kappa float64) sums { return p.line(kappa, r, s) })
		// κ'(R) = -F_R/F_κ of F = α·E[g] - (1-R²); it is positive where the student is too far from the teacher
		if slope := t.dFirst - 2*r*t.tail + 2*r; slope < 0 {
			hi = angle
		} else {
			lo = angle
		}
		if hi-lo <= 1e-14*hi {
			break
		}
	}
	return angle, kappa
}

// line integrates over the probe's margin u: up to where violations end, in two pieces because the integrand bends at
// u = κ/R within some s.
func (p perceptron) line(kappa, r, s float64) (t sums) {
	from := p.lo
	for _, to := range []float64{(kappa - reach*s) / r, (kappa + reach*s) / r} {
		to = min(to, p.hi)
		if to <= from {
			continue
		}
		for i, x := range nodes64 {
			u := from + (to-from)*x
			weight := weights64[i] * (to - from) * 2 * stat.NormalPDF(u) / p.keep * p.alpha
			t.add(weight, kappa, r, 0, s, u, 0)
		}
		from = to
	}
	return t
}

// margin solves α·E[g] = target for κ. The left side is convex and increasing, so that Newton's steps from the right
// of the root never cross it; from the left they are bounded.
func (p perceptron) margin(kappa, target float64, at func(kappa float64) sums) (float64, sums) {
	t, step := at(kappa), max(1e-3, math.Abs(kappa))
	for range 200 {
		d := (t.g - target) / t.dKappa
		if !(d >= -step) { // too far to the left, or no violations at all
			d = -step
			step *= 2
		}
		kappa -= d
		t = at(kappa)
		if math.Abs(d) <= 1e-13*max(math.Abs(kappa), 1e-6) {
			break
		}
	}
	return kappa, t
}

// imperfect solves the problem of a probe at an angle. The student is J = R·T + w·e + √Q·n with e the direction of the
// probe orthogonal to the teacher, so that its overlap with the probe is cR + sw and Q = 1-R²-w²: the paper's overlaps in
// coordinates that stay well conditioned as the probe's angle goes to 0. κ is maximised over the student's polar angles,
// R = cos(a)cos(b), w = cos(a)sin(b), √Q = sin(a), by BFGS with the exact gradient.
func (p perceptron) imperfect() (r, w, kappa, angle float64, err error) {
	start, warm := p.perfect() // the perfect probe's solution is near, and the natural scale of a
	grad := make([]float64, 2)
	// x is (ln tan a, tan b): no bounds to run into
	eval := func(x []float64) {
		a, b := math.Atan(math.Exp(x[0])), math.Atan(x[1])
		sa, ca := math.Sincos(a)
		sb, cb := math.Sincos(b)
		r, w = ca*cb, ca*sb
		angle = math.Atan2(math.Hypot(sa, w), r) // keeps its digits near 0, unlike arccos(R)
		var t sums
		kappa, t = p.margin(warm, sa*sa, func(kappa float64) sums { return p.plane(kappa, r, w, sa) })
		if math.IsNaN(kappa) {
			return
		}
		warm = kappa
		// of F = α·E[g] - Q along both angles
		da := -sa*(t.dFirst*cb+t.dW*sb) + 2*sa*ca*(t.tail-1)
		db := ca * (t.dW*cb - t.dFirst*sb)
		grad[0], grad[1] = da/t.dKappa*sa*ca, db/t.dKappa*cb*cb
	}
	var last []float64
	at := func(x []float64) {
		if !slices.Equal(x, last) {
			last = slices.Clone(x)
			eval(x)
		}
	}
	res, err := optimize.Minimize(optimize.Problem{
		Func: func(x []float64) float64 {
			if at(x); math.IsNaN(kappa) {
				return math.Inf(1)
			}
			return -kappa
		},
		Grad: func(g, x []float64) {
			at(x)
			copy(g, grad)
		},
	}, []float64{math.Log(math.Tan(start)), 0}, &optimize.Settings{GradientThreshold: 1e-9, MajorIterations: 80}, &optimize.BFGS{})
	if res == nil {
		return 0, 0, 0, 0, fmt.Errorf("curate: perceptron with an imperfect probe: %w", err)
	}
	at(res.X)
	// a line search that stalls on rounding near the maximum is no error
	if size := math.Hypot(grad[0], grad[1]); !(size <= 1e-5*max(1, math.Abs(kappa))) {
		return 0, 0, 0, 0, fmt.Errorf("curate: perceptron with an imperfect probe: no maximum found (gradient %g)", size)
	}
	return r, w, kappa, angle, nil
}

// plane integrates over the probe's margin p > 0 (its mirror image p < 0 contributes the same) and the direction q
// orthogonal to it: the teacher's field is u = cp + sq, the field along e is v = sp - cq. The label sign(u) jumps at
// u = 0, so both sides are integrated apart, each only as far as violations reach.
func (p perceptron) plane(kappa, r, w, s float64) (t sums) {
	const far = 8.5 // standard deviations of q
	// R·u + w·v = pSlope·p + qSlope·q
	pSlope, qSlope := r*p.cos+w*p.sin, r*p.sin-w*p.cos
	limit := kappa + reach*s
	hi := p.hi
	if pSlope > 0 {
		// beyond, the side u > 0 has no violations and the side u < 0 no mass
		end := max(far*p.sin/p.cos, (limit+far*math.Abs(qSlope))/pSlope)
		if end <= p.lo {
			return t
		}
		hi = min(hi, end)
	}
	span := hi - p.lo
	for i, x := range nodes64 {
		m := p.lo + span*x
		outer := weights64[i] * span * 2 * stat.NormalPDF(m) / p.keep * p.alpha
		zero := -p.cos / p.sin * m
		for _, sign := range []float64{-1, 1} {
			lo, hi := -far, min(zero, far)
			if sign > 0 {
				lo, hi = max(zero, -far), far
			}
			if lo >= hi {
				continue
			}
			// violations: sign·(pSlope·m + qSlope·q) < limit; the bend is at the same place with κ-9s
			cuts := [2]float64{hi, hi}
			switch k := sign * qSlope; {
			case k > 0:
				cuts = [2]float64{((kappa - reach*s) - sign*pSlope*m) / k, (limit - sign*pSlope*m) / k}
			case k < 0:
				lo = max(lo, (limit-sign*pSlope*m)/k)
				cuts = [2]float64{((kappa - reach*s) - sign*pSlope*m) / k, hi}
			}
			from := lo
			for _, to := range cuts {
				if to = min(to, hi); to <= from {
					continue
				}
				for j, y := range nodes32 {
					q := from + (to-from)*y
					weight := outer * weights32[j] * (to - from) * stat.NormalPDF(q)
					u, v := p.cos*m+p.sin*q, p.sin*m-p.cos*q
					t.add(weight, kappa, r, w, s, sign*u, sign*v)
				}
				from = to
			}
		}
	}
	return t
}

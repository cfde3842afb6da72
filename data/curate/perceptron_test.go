package curate

import (
	"math"
	"strings"
	"testing"

	"github.com/lathe-ml/lathe/internal/stat"
)

func solve(t *testing.T, alpha, keep, thetaDeg float64, m Mode) PerceptronPoint {
	t.Helper()
	p, err := PerceptronTheory(alpha, keep, thetaDeg*math.Pi/180, m)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func near(t *testing.T, what string, got, want, tol float64) {
	t.Helper()
	if !(math.Abs(got-want) <= tol) {
		t.Errorf("%s: got %.10g, want %.10g within %g", what, got, want, tol)
	}
}

func TestSolutionsSatisfyThePublishedSaddlePointEquations(t *testing.T) {
	// arXiv:2206.14486, equations of the perfect probe, hard examples kept
	x, w := stat.GaussLegendre(4000, 0, 1)
	for _, c := range []struct{ alpha, keep float64 }{{0.2, 1}, {1, 1}, {10, 1}, {0.5, 0.5}, {2, 0.5}, {4, 0.2}, {1, 0.1}, {8, 0.05}, {30, 0.3}} {
		p := solve(t, c.alpha, c.keep, 0, Hard)
		s := math.Sqrt(1 - p.R*p.R)
		gamma := math.Inf(1)
		if c.keep < 1 {
			gamma = stat.HInv((1 - c.keep) / 2)
		}
		lo := min(-10, p.Kappa-10)
		var first, second float64
		for i := range x {
			u := lo + (p.Kappa-lo)*x[i]
			weight := w[i] * (p.Kappa - lo)
			// e^{-R²t²/2s²} times the bracket, with its exponents joined so that neither overflows
			e := math.Exp(-p.R * p.R * u * u / (2 * s * s))
			tail := 0.
			if !math.IsInf(gamma, 1) {
				e -= math.Exp(-(p.R*p.R*u*u + gamma*(gamma-2*p.R*u)) / (2 * s * s))
				tail = stat.H(-(p.R*u - gamma) / s)
			}
			first += weight * stat.NormalPDF(u) * e * (p.Kappa - u)
			second += weight * stat.NormalPDF(u) * (stat.H(-p.R*u/s) - tail) * (p.Kappa - u) * (p.Kappa - u)
		}
		near(t, "R", 2*c.alpha/(c.keep*math.Sqrt(2*math.Pi)*s)*first, p.R, 1e-5)
		near(t, "1-R²", 2*c.alpha/c.keep*second, 1-p.R*p.R, 1e-5)
	}
}

func TestKeepingEverythingIsTheClassicPerceptron(t *testing.T) {
	for _, theta := range []float64{0, 20} {
		hard, easy := solve(t, 2, 1, theta, Hard), solve(t, 2, 1, theta, Easy)
		near(t, "easy against hard", easy.Error, hard.Error, 1e-9)
		near(t, "a probe has no say when all is kept", hard.Error, solve(t, 2, 1, 0, Hard).Error, 1e-6)
	}
	near(t, "ε at α = 1", solve(t, 1, 1, 0, Hard).Error, 0.265711471201, 1e-8)
	// max-margin learning curve: ε ~ 0.500/α for large α (Opper and Kinzel)
	near(t, "α·ε at α = 2000", 2000*solve(t, 2000, 1, 0, Hard).Error, 0.5, 0.01)
}

func TestErrorAndMarginFallWithMoreData(t *testing.T) {
	for _, c := range []struct {
		keep, theta float64
		m           Mode
	}{{1, 0, Hard}, {0.5, 0, Hard}, {0.2, 0, Hard}, {0.5, 0, Easy}, {0.5, 15, Hard}, {0.5, 40, Easy}} {
		last := PerceptronPoint{Error: 1, Kappa: math.Inf(1)}
		alphas := []float64{0.05, 0.3, 1, 3, 10, 40}
		if c.theta > 0 {
			alphas = []float64{0.3, 1, 3, 10}
		}
		for _, alpha := range alphas {
			p := solve(t, alpha, c.keep, c.theta, c.m)
			if p.Error >= last.Error || p.Kappa >= last.Kappa || p.Kappa <= 0 || p.Error <= 0 || p.Error > 0.5 {
				t.Errorf("%+v: α = %g gives ε %g, κ %g after %g, %g", c, alpha, p.Error, p.Kappa, last.Error, last.Kappa)
			}
			last = p
		}
	}
}

func TestSmallAngleIsThePerfectProbe(t *testing.T) {
	for _, m := range []Mode{Hard, Easy} {
		for _, alpha := range []float64{1, 4} {
			a, b := solve(t, alpha, 0.3, 0, m), solve(t, alpha, 0.3, 0.01, m)
			near(t, "R", b.R, a.R, 1e-3)
			near(t, "κ", b.Kappa, a.Kappa, 1e-3)
			near(t, "ρ", b.Rho, a.Rho, 1e-3)
		}
	}
}

func TestTheoryOfTheExperiment(t *testing.T) {
	near(t, "hard, α 4, f 0.2", solve(t, 4, 0.2, 0, Hard).Error, 0.025, 5e-4)
	near(t, "random, α 4", solve(t, 4, 1, 0, Hard).Error, 0.114, 5e-4)
	near(t, "easy, α 0.5", solve(t, 0.5, 0.5, 0, Easy).Error, 0.250, 5e-4)
	near(t, "random, α 0.5", solve(t, 0.5, 1, 0, Hard).Error, 0.329, 5e-4)
	near(t, "hard, α 0.5", solve(t, 0.5, 0.5, 0, Hard).Error, 0.406, 5e-4)
}

func TestParetoFrontierBeatsAnyPowerLaw(t *testing.T) {
	// a power law is straight in log-log coordinates, the frontier of a perfect probe bends down
	var e []float64
	for _, alpha := range []float64{1, 2, 4} {
		keep, p, err := PerceptronPareto(alpha, 0, 1e-4)
		if err != nil {
			t.Fatal(err)
		}
		if keep < 1e-4 || keep > 1 || p.Error > solve(t, alpha, 1, 0, Hard).Error {
			t.Errorf("α %g: keep %g gives ε %g, worse than no pruning", alpha, keep, p.Error)
		}
		e = append(e, math.Log(p.Error))
	}
	if e[2]-e[1] >= 1.5*(e[1]-e[0]) {
		t.Errorf("log errors %v at doubling α do not bend down", e)
	}
	// exponential: halfway between straight lines in α
	if slope := (e[2] - e[1]) / 2; !(slope < 0.7*(e[1]-e[0])) {
		t.Errorf("log errors %v: the decay per α slows from %g to %g", e, e[1]-e[0], slope)
	}
	if _, _, err := PerceptronPareto(1, 0, 0); err == nil {
		t.Error("a least share of 0 must be refused")
	}
}

func TestExtremeProblemsAnswerOrRefuse(t *testing.T) {
	for _, alpha := range []float64{1e-6, 0.1, 200} {
		for _, keep := range []float64{1e-2, 0.5} {
			for _, theta := range []float64{0, 1, 80} {
				for _, m := range []Mode{Hard, Easy} {
					p, err := PerceptronTheory(alpha, keep, theta*math.Pi/180, m)
					if err == nil && !(p.Error > 0 && p.Error <= 0.5+1e-9 && p.R >= -1e-9 && p.R <= 1) {
						t.Errorf("α %g keep %g θ %g %v: %+v", alpha, keep, theta, m, p)
					} else if err != nil {
						t.Logf("α %g keep %g θ %g %v: %v", alpha, keep, theta, m, err)
					}
				}
			}
		}
	}
}

func TestTheoryRefuses(t *testing.T) {
	for _, c := range []struct {
		alpha, keep, theta float64
		m                  Mode
		want               string
	}{
		{0, 1, 0, Hard, "alpha 0"},
		{-1, 1, 0, Hard, "positive"},
		{math.Inf(1), 1, 0, Hard, "finite"},
		{math.NaN(), 1, 0, Hard, "alpha NaN"},
		{1, 0, 0, Hard, "keep 0"},
		{1, 1.1, 0, Hard, "at most 1"},
		{1, math.NaN(), 0, Hard, "keep NaN"},
		{1, 1, -0.1, Hard, "[0, π/2)"},
		{1, 1, math.Pi / 2, Hard, "[0, π/2)"},
		{1, 1, 0, Mode(7), "mode 7"},
	} {
		if _, err := PerceptronTheory(c.alpha, c.keep, c.theta, c.m); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: got %v", c, err)
		}
	}
}

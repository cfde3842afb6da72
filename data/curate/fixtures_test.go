package curate

import (
	"math"
	"testing"

	"gonum.org/v1/gonum/mat"

	"github.com/lathe-ml/lathe/internal/fixture"
	"github.com/lathe-ml/lathe/internal/stat"
)

func TestFixtures(t *testing.T) {
	theory := func(t *testing.T, c *fixture.Case) map[string]any {
		alpha, fraction, mode := c.Inputs["alpha_prune"].Floats(), c.Inputs["fraction"].Floats(), c.Params["keep"].Strings()
		theta := c.Params["theta_deg"].Floats()
		var r, rho, kappa, e []float64
		for i := range alpha {
			m, err := ParseMode(mode[i])
			if err != nil {
				t.Fatal(err)
			}
			p, err := PerceptronTheory(alpha[i], fraction[i], theta[min(i, len(theta)-1)]*math.Pi/180, m)
			if err != nil {
				t.Fatal(err)
			}
			r, rho, kappa, e = append(r, p.R), append(rho, p.Rho), append(kappa, p.Kappa), append(e, p.Error)
		}
		return map[string]any{"R": r, "rho": rho, "kappa": kappa, "error": e}
	}
	fixture.Run(t, 17, map[string]fixture.Func{
		"perceptron_theory":           theory,
		"perceptron_theory_imperfect": theory,
		"el2n": func(t *testing.T, c *fixture.Case) map[string]any {
			probs := cube(c.Inputs["logits"])
			for _, model := range probs {
				for _, p := range model {
					stat.Softmax(p, p)
				}
			}
			s, err := EL2N(probs, c.Inputs["labels"].Ints())
			return result(t, err, "score", s)
		},
		"forgetting": func(t *testing.T, c *fixture.Case) map[string]any {
			s, err := Forgetting(bools(c.Inputs["correct"]))
			return result(t, err, "score", s)
		},
		"subset_models": func(t *testing.T, c *fixture.Case) map[string]any {
			s, err := SubsetStats(bools(c.Inputs["included"]), bools(c.Inputs["correct_train"]), bools(c.Inputs["correct_test"]), cube(c.Inputs["probs_train"]))
			if err != nil {
				t.Fatal(err)
			}
			return map[string]any{
				"memorization": s.Memorization, "influence_max": s.InfluenceMax, "influence_sum_abs": s.InfluenceSumAbs,
				"ddd": s.DDD, "active_learning": s.ActiveLearning,
			}
		},
		"prototypes": func(t *testing.T, c *fixture.Case) map[string]any {
			x := dense(c.Inputs["x"])
			self, a, err := ScorePrototypes(x, dense(c.Inputs["centroids"]))
			if err != nil {
				t.Fatal(err)
			}
			sup, err := ClassPrototypeScores(x, c.Inputs["labels"].Ints())
			if err != nil {
				t.Fatal(err)
			}
			return map[string]any{"assignment": a, "self_supervised": self, "supervised": sup}
		},
		"prune_select": func(t *testing.T, c *fixture.Case) map[string]any {
			m, err := ParseMode(c.Params["mode"].String())
			if err != nil {
				t.Fatal(err)
			}
			kept, err := selectBalanced(c.Inputs["score"].Floats(), c.Inputs["labels"].Ints(), c.Params["classes"].Int(),
				c.Params["keep"].Float(), c.Params["balance"].Float(), m)
			return result(t, err, "kept_sorted", kept)
		},
	})
}

func result(t *testing.T, err error, name string, v any) map[string]any {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	return map[string]any{name: v}
}

func dense(v fixture.Value) *mat.Dense { return mat.NewDense(v.Shape[0], v.Shape[1], v.Floats()) }

func bools(v fixture.Value) [][]bool {
	out := make([][]bool, v.Shape[0])
	for i, row := range v.Rows() {
		out[i] = make([]bool, len(row))
		for j, x := range row {
			out[i][j] = x != 0
		}
	}
	return out
}

func cube(v fixture.Value) [][][]float64 {
	flat, a, b, c := v.Floats(), v.Shape[0], v.Shape[1], v.Shape[2]
	out := make([][][]float64, a)
	for i := range out {
		out[i] = make([][]float64, b)
		for j := range out[i] {
			out[i][j] = make([]float64, c)
			for k := range out[i][j] {
				out[i][j][k] = flat[(i*b+j)*c+k]
			}
		}
	}
	return out
}

package curate

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"

	"gonum.org/v1/gonum/floats"
	"gonum.org/v1/gonum/mat"

	method "github.com/lathe-ml/lathe/data/curate"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/internal/stat"
	"github.com/lathe-ml/lathe/lab"
)

// point is a condition of the perceptron experiment: examples per input in the pool, and the share that is kept.
type point struct{ Alpha, Keep float64 }

func (p point) name(degrees float64) string {
	return fmt.Sprintf("alpha%g_keep%g_angle%g", p.Alpha, p.Keep, degrees)
}

// perceptronSizes are the sizes of part (a).
type perceptronSizes struct {
	Inputs, Runs int
	Points       []point
	Degrees      []float64 // angles of the probe
}

var perceptronPoints = []point{{4, .5}, {20, .2}, {1, .5}}

func perceptronSizesOf(s lab.Scale) perceptronSizes {
	z := perceptronSizes{Inputs: 100, Runs: 8, Points: perceptronPoints, Degrees: []float64{0, 20}}
	if s == lab.Smoke {
		z.Inputs, z.Runs = 30, 1
	}
	return z
}

// selections are the arms of part (a).
var selections = []string{"random", "hard", "easy"}

// perceptrons trains max-margin students on pruned Gaussian data and compares their errors with the theory's.
func perceptrons(ctx context.Context, t *lab.Trial, selection string) error {
	z := perceptronSizesOf(t.Scale)
	done, total := 0, len(z.Points)*len(z.Degrees)*z.Runs
	for _, degrees := range z.Degrees {
		deviation := 0.
		for _, p := range z.Points {
			keep, mode := p.Keep, method.Hard
			switch selection {
			case "random":
				keep = 1
			case "easy":
				mode = method.Easy
			}
			theory, err := method.PerceptronTheory(p.Alpha*p.Keep, keep, degrees*math.Pi/180, mode)
			if err != nil {
				return err
			}
			mean := 0.
			for run := range z.Runs {
				e, err := student(ctx, z.Inputs, p, degrees, selection, t.Seed*uint64(z.Runs)+uint64(run))
				if err != nil {
					return err
				}
				mean += e / float64(z.Runs)
				done++
				t.Progress(done, total)
			}
			t.Record("error_"+p.name(degrees), mean)
			t.Record("theory_"+p.name(degrees), theory.Error)
			deviation += math.Abs(mean-theory.Error) / theory.Error / float64(len(z.Points))
		}
		t.Record(fmt.Sprintf("deviation_angle%g", degrees), deviation)
	}
	return nil
}

// student draws a teacher, a probe and a pool, prunes the pool, and returns the error arccos(R)/π of the max-margin
// student. Selections of one seed share teacher and pool.
func student(ctx context.Context, inputs int, p point, degrees float64, selection string, seed uint64) (float64, error) {
	r := rng.New(seed, "perceptron")
	unit := func() []float64 {
		v := make([]float64, inputs)
		for i := range v {
			v[i] = r.NormFloat64()
		}
		floats.Scale(1/floats.Norm(v, 2), v)
		return v
	}
	teacher, other := unit(), unit()
	floats.AddScaled(other, -floats.Dot(other, teacher), teacher)
	floats.Scale(1/floats.Norm(other, 2), other)
	sin, cos := math.Sincos(degrees * math.Pi / 180)
	probe := make([]float64, inputs)
	floats.AddScaled(probe, cos, teacher)
	floats.AddScaled(probe, sin, other)

	n := int(math.Round(p.Alpha * float64(inputs)))
	x, margin := make([][]float64, n), make([]float64, n)
	for i := range x {
		x[i] = make([]float64, inputs)
		for j := range x[i] {
			x[i][j] = r.NormFloat64()
		}
		margin[i] = -math.Abs(floats.Dot(x[i], probe)) // small margin = hard = high score
		if floats.Dot(x[i], teacher) < 0 {
			floats.Scale(-1, x[i]) // y·x is all that the student sees
		}
	}
	mode := method.Hard
	switch selection {
	case "random":
		for i := range margin {
			margin[i] = r.Float64()
		}
	case "easy":
		mode = method.Easy
	}
	kept, err := method.Select(margin, nil, p.Keep, 0, mode)
	if err != nil {
		return 0, err
	}
	data := make([][]float64, len(kept))
	for k, i := range kept {
		data[k] = x[i]
	}
	w, err := maxMargin(ctx, data)
	if err != nil {
		return 0, err
	}
	cosine := floats.Dot(w, teacher) / floats.Norm(w, 2)
	return math.Acos(max(-1, min(1, cosine))) / math.Pi, nil
}

// maxMargin returns the shortest w with w·x ≥ 1 for all rows x (each already multiplied by its label): the hard-margin
// support vector machine without bias. It is solved exactly as a least-distance problem (Lawson and Hanson, Solving
// Least Squares Problems, chapter 23): the non-negative u that minimises ‖Σ uᵢxᵢ‖² + (1-Σuᵢ)² gives w = Σ uᵢxᵢ/(1-Σuᵢ),
// and an active-set method finds it. Coordinate ascent on the dual stalls where margins are tiny, which is what keeping
// hard examples makes them. Rows that no w separates are an error.
func maxMargin(ctx context.Context, x [][]float64) ([]float64, error) {
	const tolerance = 1e-8
	n := len(x)
	gram := mat.NewSymDense(n, nil)
	for i := range n {
		for j := range i + 1 {
			gram.SetSym(i, j, floats.Dot(x[i], x[j])+1)
		}
	}
	w, u := make([]float64, len(x[0])), make([]float64, n)
	var support []int
	fail := fmt.Errorf("max-margin perceptron: %d examples of %d inputs have no separating direction", n, len(w))
	for range 20 * n {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		clear(w)
		rest := 1.
		for _, i := range support {
			floats.AddScaled(w, u[i], x[i])
			rest -= u[i]
		}
		if rest <= 1e-12 {
			return nil, fail
		}
		floats.Scale(1/rest, w)
		worst, enter := tolerance, -1
		for i, row := range x {
			if gap := 1 - floats.Dot(w, row); gap > worst && u[i] == 0 {
				worst, enter = gap, i
			}
		}
		if enter < 0 {
			return w, nil
		}
		support = append(support, enter)
		for len(support) > 0 {
			best, ok := solveOnes(gram, support) // regardless of sign
			if !ok {
				return nil, fail
			}
			// go there, but only until the first weight reaches 0 and leaves
			step, leave := 1., -1
			for k, i := range support {
				if best[k] <= 0 {
					if s := u[i] / (u[i] - best[k]); leave < 0 || s < step {
						step, leave = s, i
					}
				}
			}
			for k, i := range support {
				u[i] = max(0, u[i]+step*(best[k]-u[i]))
			}
			if leave < 0 {
				break
			}
			u[leave] = 0
			support = slices.DeleteFunc(support, func(i int) bool { return u[i] == 0 })
		}
	}
	return nil, fail
}

// solveOnes solves G a = 1 on the rows and columns of the support.
func solveOnes(gram *mat.SymDense, support []int) ([]float64, bool) {
	k := len(support)
	g, ones := mat.NewSymDense(k, nil), mat.NewVecDense(k, nil)
	for p, i := range support {
		ones.SetVec(p, 1)
		for q, j := range support[:p+1] {
			g.SetSym(p, q, gram.At(i, j))
		}
	}
	var c mat.Cholesky
	if !c.Factorize(g) {
		return nil, false
	}
	var a mat.VecDense
	var condition mat.Condition
	if err := c.SolveVecTo(&a, ones); err != nil && !errors.As(err, &condition) {
		return nil, false
	}
	return a.RawVector().Data, true
}

func perceptronClaims() []lab.Claim {
	// the errors at angle 0 of the condition (alpha, keep)
	e := func(m lab.Metrics, selection string, p point) float64 {
		return m.Get("perceptron-"+selection, "error_"+p.name(0))
	}
	plenty, scarce := perceptronPoints[1], perceptronPoints[2]
	return []lab.Claim{
		{
			ID: "C1", Text: "simulated perceptrons differ from the theory by at most 12 % on average, in the worst of hard and easy at 0 and 20 degrees", Paper: "theory matches simulation", Unit: "%",
			Measure: func(m lab.Metrics) float64 {
				var all []float64
				for _, s := range []string{"hard", "easy"} {
					for _, d := range perceptronSizesOf(lab.Full).Degrees {
						all = append(all, m.Get("perceptron-"+s, fmt.Sprintf("deviation_angle%g", d)))
					}
				}
				return 100 * stat.Quantile(all, 1)
			}, Bound: lab.AtMost(12),
		},
		{
			ID: "C2a", Text: "plenty of data (20 examples per input, 20 % kept): hard examples have at most 0.4 of random ones' error", Paper: "theory 0.025 against 0.114", Unit: "×",
			Measure: func(m lab.Metrics) float64 { return e(m, "hard", plenty) / e(m, "random", plenty) }, Bound: lab.AtMost(.4),
		},
		{
			ID: "C2b", Text: "scarce data (1 example per input, 50 % kept): easy examples beat random ones", Paper: "theory 0.250 against 0.329", Unit: "error",
			Measure: func(m lab.Metrics) float64 { return e(m, "random", scarce) - e(m, "easy", scarce) }, Bound: lab.AtLeast(0),
		},
		{
			ID: "C2c", Text: "scarce data (1 example per input, 50 % kept): random examples beat hard ones", Paper: "theory 0.329 against 0.406", Unit: "error",
			Measure: func(m lab.Metrics) float64 { return e(m, "hard", scarce) - e(m, "random", scarce) }, Bound: lab.AtLeast(0),
		},
	}
}

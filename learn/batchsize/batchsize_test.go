package batchsize_test

import (
	"errors"
	"fmt"
	"math"
	"testing"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/internal/fixture"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/learn/batchsize"
	"github.com/lathe-ml/lathe/learn/optim"
)

// samples reads g0, g1, …: [b, …] each.
func samples(c *fixture.Case) (g [][][]float64) {
	for {
		v, ok := c.Inputs[fmt.Sprintf("g%d", len(g))]
		if !ok {
			return g
		}
		g = append(g, rows(v.Floats(), v.Shape[0]))
	}
}

func rows(d []float64, n int) (out [][]float64) {
	w := len(d) / n
	for i := range n {
		out = append(out, d[i*w:(i+1)*w])
	}
	return out
}

// train runs an optimiser in float64 on given gradients and returns the parameter after each step and all states.
func train(t *testing.T, o optim.Optimizer, c *fixture.Case) (params, states []float64) {
	t.Helper()
	lr := c.Params["lr"].Float()
	p0, g := c.Inputs["p0"], c.Inputs["g"]
	ex, err := engine.NewExec(enginetest.Backend(), func(in []*graph.Node) []*graph.Node {
		u := optim.Update{W: in[0], Grad: in[1], Slots: in[2:], LR: graph.Scalar(in[0].Graph(), dtypes.Float64, lr)}
		u.NormSq = graph.ReduceAllSum(graph.Mul(u.Grad, u.Grad))
		w, s := o.Apply(u)
		return append([]*graph.Node{w}, s...)
	})
	if err != nil {
		t.Fatal(err)
	}
	defer ex.Finalize()
	shape := p0.Tensor(dtypes.Float64).Shape()
	args := []any{p0.Tensor(dtypes.Float64), nil}
	for i := range o.Slots() {
		s := shape
		if x, ok := o.(optim.SlotShaper); ok {
			s = x.SlotShape(i, shape)
		}
		args = append(args, tensors.FromShape(s))
	}
	for _, step := range rows(g.Floats(), g.Shape[0]) {
		args[1] = fixture.Tensor(step, dtypes.Float64, p0.Shape...)
		out, err := ex.Call(args...)
		if err != nil {
			t.Fatal(err)
		}
		for i, v := range out {
			args[i+min(i, 1)] = v
			d := tensors.MustCopyFlatData[float64](v)
			if i == 0 {
				params = append(params, d...)
			} else {
				states = append(states, d...)
			}
		}
	}
	return params, states
}

func TestFixtures(t *testing.T) {
	judge := func(t *testing.T, c *fixture.Case, test batchsize.Test) (batchsize.GradStats, map[string]any) {
		t.Helper()
		s, err := batchsize.SampleStats(samples(c))
		if err != nil {
			t.Fatal(err)
		}
		next, _, err := test.Next(s, s.B)
		if err != nil {
			t.Fatal(err)
		}
		return s, map[string]any{"new_batch": []int{next}, "variance_l1": []float64{s.VarL1}, "grad_norm_sq": []float64{s.MeanSq}}
	}
	fixture.Run(t, 15, map[string]fixture.Func{
		"norm_test": func(t *testing.T, c *fixture.Case) map[string]any {
			_, out := judge(t, c, batchsize.NormTest{Eta: c.Params["eta"].Float()})
			return out
		},
		"coordinate_norm_test": func(t *testing.T, c *fixture.Case) map[string]any {
			eta := c.Params["eta"].Float()
			s, out := judge(t, c, batchsize.CoordinateTest{Eta: eta})
			ratio, pass := make([]float64, len(s.Var)), make([]float64, len(s.Var))
			for j := range ratio { // each coordinate on its own
				one := batchsize.GradStats{B: s.B, MeanSq: s.Mean[j] * s.Mean[j], VarL1: s.Var[j], Var: s.Var[j : j+1], Mean: s.Mean[j : j+1]}
				ratio[j] = s.Var[j] / (eta * eta * s.Mean[j] * s.Mean[j])
				switch _, ok, err := (batchsize.CoordinateTest{Eta: eta}).Next(one, s.B); {
				case errors.Is(err, batchsize.ErrStationary): // a coordinate without a mean passes if it does not vary
					ok = s.Var[j] == 0
					fallthrough
				case err == nil:
					if ok {
						pass[j] = 1
					}
				default:
					t.Fatal(err)
				}
			}
			out["variance"], out["mean_grad"], out["ratio"], out["pass"] = s.Var, s.Mean, ratio, pass
			return out
		},
		"inner_product_test": func(t *testing.T, c *fixture.Case) map[string]any {
			s, out := judge(t, c, batchsize.InnerProductTest{Theta: c.Params["theta"].Float()})
			out["variance"] = []float64{s.Inner.Along}
			return out
		},
		"augmented_inner_product_test": func(t *testing.T, c *fixture.Case) map[string]any {
			s, out := judge(t, c, batchsize.AugmentedTest{Theta: c.Params["theta"].Float(), Nu: c.Params["nu"].Float()})
			out["variance_ip"], out["variance_orth"] = []float64{s.Inner.Along}, []float64{s.Inner.Across}
			return out
		},
		"norm_test_accumulate": func(t *testing.T, c *fixture.Case) map[string]any {
			g := c.Inputs["g"]
			m, b := g.Shape[0], g.Shape[1]
			var means, within [][]float64
			for _, d := range rows(g.Floats(), m) {
				s, err := batchsize.SampleStats([][][]float64{rows(d, b)})
				if err != nil {
					t.Fatal(err)
				}
				means, within = append(means, s.Mean), append(within, s.Var)
			}
			s, err := batchsize.TotalStats(means, within, b)
			if err != nil {
				t.Fatal(err)
			}
			next, _, err := batchsize.NormTest{Eta: c.Params["eta"].Float()}.Next(s, m*b)
			if err != nil {
				t.Fatal(err)
			}
			return map[string]any{"new_batch": []int{next}, "variance_l1": []float64{s.VarL1}, "grad_norm_sq": []float64{s.MeanSq}}
		},
		"group_variance": func(t *testing.T, c *fixture.Case) map[string]any {
			h := c.Inputs["micro_means"]
			s, err := batchsize.GroupStats(rows(h.Floats(), h.Shape[0]), c.Params["micro_batch"].Int())
			if err != nil {
				t.Fatal(err)
			}
			return map[string]any{"variance_l1": []float64{s.VarL1}}
		},
		"adagrad": func(t *testing.T, c *fixture.Case) map[string]any {
			p, _ := train(t, optim.AdaGrad{Eps: c.Params["eps"].Float(), Init: c.Params["init_acc"].Float()}, c)
			return map[string]any{"p": fixture.Tensor(p, dtypes.Float64, c.Inputs["g"].Shape...)}
		},
		"adagradnorm": func(t *testing.T, c *fixture.Case) map[string]any {
			init := c.Params["init_acc"].Float()
			p, v := train(t, optim.AdaGradNorm{Eps: c.Params["eps"].Float(), Init: init}, c)
			for i := range v {
				v[i] += init // the state is kept without it
			}
			return map[string]any{"p": fixture.Tensor(p, dtypes.Float64, c.Inputs["g"].Shape...), "v": v}
		},
		"adagradnorm_rowwise": func(t *testing.T, c *fixture.Case) map[string]any {
			p, _ := train(t, optim.AdaGradNorm{Eps: c.Params["eps"].Float(), Init: c.Params["init_acc"].Float(), RowWise: true}, c)
			return map[string]any{"p": fixture.Tensor(p, dtypes.Float64, c.Inputs["g"].Shape...)}
		},
		"micro_batching": func(_ *testing.T, c *fixture.Case) map[string]any {
			get := func(name string) int { return c.Params[name].Int() }
			micro, acc, global := batchsize.MicroBatching(get("requested"), get("workers"), get("accumulation"), get("max_micro"), get("max_batch"))
			return map[string]any{"micro": []int{micro}, "accumulation": []int{acc}, "global": []int{global}}
		},
	})
}

var allTests = []batchsize.Test{
	batchsize.NormTest{Eta: .5},
	batchsize.CoordinateTest{Eta: .5},
	batchsize.CoordinateTest{Eta: .5, Quantile: .6},
	batchsize.InnerProductTest{Theta: .5},
	batchsize.AugmentedTest{Theta: .5, Nu: 1.2},
}

// random draws gradients of cases about a mean.
func random(seed uint64, cases, dim int, noise float64) [][][]float64 {
	r := rng.New(seed, "gradients")
	mean := make([]float64, dim)
	for j := range mean {
		mean[j] = r.NormFloat64()
	}
	g := make([][][]float64, 2)
	for range cases {
		a, b := make([]float64, dim), make([]float64, 3)
		for j := range a {
			a[j] = mean[j] + noise*r.NormFloat64()
		}
		for j := range b {
			b[j] = mean[j%dim] + noise*r.NormFloat64()
		}
		g[0], g[1] = append(g[0], a), append(g[1], b)
	}
	return g
}

func stats(t *testing.T, g [][][]float64) batchsize.GradStats {
	t.Helper()
	s, err := batchsize.SampleStats(g)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestHandCase(t *testing.T) {
	s := stats(t, [][][]float64{{{1}, {3}}})
	if s.MeanSq != 4 || s.VarL1 != 2 {
		t.Fatalf("got %+v", s)
	}
	for eta, want := range map[float64]int{.5: 2, .4: 4} {
		next, passed, err := batchsize.NormTest{Eta: eta}.Next(s, 2)
		if err != nil || next != want || passed != (want == 2) {
			t.Errorf("eta %g: %d, passed %v, %v; want %d", eta, next, passed, err, want)
		}
	}
}

func TestIdenticalGradientsPass(t *testing.T) {
	s := stats(t, [][][]float64{{{1, -2}, {1, -2}, {1, -2}}, {{0}, {0}, {0}}})
	for _, x := range allTests {
		if next, passed, err := x.Next(s, 3); next != 3 || !passed || err != nil {
			t.Errorf("%s: %d, %v, %v", x.Name(), next, passed, err)
		}
	}
}

func TestScaleChangesNoOutcome(t *testing.T) {
	for seed := range uint64(20) {
		g := random(seed, 6, 4, 1)
		scaled := random(seed, 6, 4, 1)
		for _, cases := range scaled {
			for _, c := range cases {
				for j := range c {
					c[j] *= 1 << 20
				}
			}
		}
		for _, x := range allTests {
			a, pa, _ := x.Next(stats(t, g), 6)
			b, pb, _ := x.Next(stats(t, scaled), 6)
			if a != b || pa != pb || a < 6 {
				t.Errorf("%s: %d %v becomes %d %v", x.Name(), a, pa, b, pb)
			}
		}
	}
}

func TestCoordinateTestImpliesNormTest(t *testing.T) {
	passed := 0
	for seed := range uint64(200) {
		s := stats(t, random(seed, 12, 3, .3+float64(seed%5)/10))
		_, coordinate, err := batchsize.CoordinateTest{Eta: .9}.Next(s, 12)
		if err != nil {
			t.Fatal(err)
		}
		if coordinate {
			passed++
			if _, norm, _ := (batchsize.NormTest{Eta: .9}).Next(s, 12); !norm {
				t.Errorf("seed %d: every coordinate passes and the norm does not", seed)
			}
		}
	}
	if passed < 10 {
		t.Errorf("only %d of 200 passed: the test shows nothing", passed)
	}
}

func TestCoordinateQuantile(t *testing.T) {
	// Ratios 1, 2, …, 10 at eta 1, and one coordinate without variance that does not count.
	s := batchsize.GradStats{B: 2, MeanSq: 11, VarL1: 55, Var: []float64{7, 3, 10, 1, 0, 9, 2, 5, 8, 4, 6}, Mean: []float64{1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1}}
	for q, want := range map[float64]int{0: 10, 1: 10, .9: 9, .5: 5, .1: 2} {
		if next, _, err := (batchsize.CoordinateTest{Eta: 1, Quantile: q}).Next(s, 2); err != nil || next != want {
			t.Errorf("quantile %g: %d, %v; want %d", q, next, err, want)
		}
	}
	s.Mean[2] = 0 // variance without a mean: infinite
	if next, passed, err := (batchsize.CoordinateTest{Eta: 1}).Next(s, 2); err != nil || passed || next < 1<<30 {
		t.Errorf("a coordinate without a mean: %d, %v, %v", next, passed, err)
	}
}

func TestGroupedEstimateIsUnbiased(t *testing.T) {
	// A population of cases; batches of 12 in 4 groups of 3, with replacement.
	g := random(3, 200, 3, 1)
	population := stats(t, g[:1])
	truth := population.VarL1 * 199 / 200 // of a draw from the population
	r := rng.New(5, "batches")
	const draws = 4000
	sum, square := 0., 0.
	for range draws {
		means := make([][]float64, 4)
		for i := range means {
			means[i] = make([]float64, 3)
			for range 3 {
				for j, x := range g[0][r.IntN(200)] {
					means[i][j] += x / 3
				}
			}
		}
		s, err := batchsize.GroupStats(means, 3)
		if err != nil {
			t.Fatal(err)
		}
		sum, square = sum+s.VarL1, square+s.VarL1*s.VarL1
	}
	mean := sum / draws
	se := math.Sqrt((square/draws - mean*mean) / draws)
	if math.Abs(mean-truth) > 3*se {
		t.Errorf("mean of the estimates %g ± %g, variance %g", mean, se, truth)
	}
}

func TestGroupsOfOneAreSingleCases(t *testing.T) {
	g := random(1, 9, 4, 1)[:1]
	a := stats(t, g)
	b, err := batchsize.GroupStats(g[0], 1)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []float64{a.VarL1 - b.VarL1, a.MeanSq - b.MeanSq, a.Inner.Along - b.Inner.Along, a.Inner.Across - b.Inner.Across} {
		if math.Abs(d) > 1e-12 {
			t.Errorf("%+v and %+v", a, b)
		}
	}
}

func TestStationaryGradientKeepsTheSize(t *testing.T) {
	s := stats(t, [][][]float64{{{1, 2}, {-1, -2}}})
	for _, x := range allTests {
		next, passed, err := x.Next(s, 2)
		if next != 2 || passed || !errors.Is(err, batchsize.ErrStationary) {
			t.Errorf("%s: %d, %v, %v", x.Name(), next, passed, err)
		}
	}
}

func TestRefusals(t *testing.T) {
	good := stats(t, random(1, 4, 2, 1))
	nan := good
	nan.VarL1 = math.NaN()
	one := good
	one.B = 1
	for _, x := range allTests {
		for name, s := range map[string]batchsize.GradStats{"NaN": nan, "one case": one} {
			if next, passed, err := x.Next(s, 4); err == nil || passed || next != 4 {
				t.Errorf("%s: %s was accepted (%d)", x.Name(), name, next)
			}
		}
	}
	for _, x := range []batchsize.Test{
		batchsize.NormTest{},
		batchsize.NormTest{Eta: -1},
		batchsize.NormTest{Eta: math.NaN()},
		batchsize.CoordinateTest{},
		batchsize.CoordinateTest{Eta: .5, Quantile: 1.5},
		batchsize.CoordinateTest{Eta: .5, Quantile: -1},
		batchsize.InnerProductTest{},
		batchsize.AugmentedTest{Theta: 1},
		batchsize.AugmentedTest{Nu: 1},
	} {
		if _, _, err := x.Next(good, 4); err == nil {
			t.Errorf("%#v was accepted", x)
		}
	}
	bare := batchsize.GradStats{B: 4, MeanSq: 1, VarL1: 1}
	for _, x := range allTests[1:] {
		if _, _, err := x.Next(bare, 4); err == nil {
			t.Errorf("%s judged what was not gathered", x.Name())
		}
	}
	for name, g := range map[string][][][]float64{"nothing": nil, "one case": {{{1}}}, "NaN": {{{1}, {math.NaN()}}}, "ragged": {{{1, 2}, {1}}}, "lengths": {{{1}, {2}}, {{1}}}} {
		if _, err := batchsize.SampleStats(g); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
	if _, err := batchsize.GroupStats([][]float64{{1}}, 4); err == nil {
		t.Error("one group was accepted")
	}
	if _, err := batchsize.TotalStats([][]float64{{1}}, [][]float64{{1}}, 1); err == nil {
		t.Error("micro-batches of one case have no variance")
	}
	for _, name := range batchsize.TestNames() {
		if x, err := batchsize.NewTest(name, .5); err != nil || x.Name() != name {
			t.Errorf("%s: %v, %v", name, x, err)
		}
		if _, err := batchsize.NewTest(name, 0); err == nil {
			t.Errorf("%s: eta 0 was accepted", name)
		}
	}
	if _, err := batchsize.NewTest("warp", .5); err == nil {
		t.Error("an unknown test was accepted")
	}
}

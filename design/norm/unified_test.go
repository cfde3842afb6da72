package norm_test

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/design/norm"
	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/internal/fixture"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/nn"
)

// unifiedLayer is one Unified norm with its parameters in float64, stepped by hand.
type unifiedLayer struct {
	op    norm.Unified
	p     map[string]*tensors.Tensor
	names []string
	train *engine.Exec
	infer *engine.Exec
}

// unifiedStep is what a training step gives.
type unifiedStep struct {
	y, dx, dgain, dbias, variance, rate []float64
	skip                                float64
}

func newUnifiedLayer(t *testing.T, op norm.Unified, channels int, masked bool) *unifiedLayer {
	t.Helper()
	l := &unifiedLayer{op: op, p: map[string]*tensors.Tensor{}}
	for _, s := range op.Params([]shapes.Shape{shapes.Make(dtypes.Float64, 2, 2, channels)}) {
		d := make([]float32, s.Shape.Size())
		if s.Init != nil {
			s.Init(rng.New(1, s.Name), d)
		}
		l.set(s.Name, nn.Float64s(tensors.FromFlatDataAndDimensions(d, len(d))), s.Shape.Dimensions...)
	}
	l.names = slices.Sorted(maps.Keys(l.p))
	node := &nn.Node{Name: "norm", Op: op, P: map[string]string{}}
	for _, n := range l.names {
		node.P[n] = n
	}
	lower := func(in []*graph.Node, training bool) (cur map[string]*graph.Node, env *nn.Env, y *graph.Node) {
		cur = map[string]*graph.Node{}
		for i, n := range l.names {
			cur[n] = in[i]
		}
		env = &nn.Env{
			G: in[0].Graph(), DType: dtypes.Float64, Training: training, Tap: map[string]*graph.Node{},
			Param: func(s string) *graph.Node { return cur[s] }, Update: func(s string, v *graph.Node) { cur[s] = v },
		}
		x := in[len(l.names):][:1]
		if masked && training {
			x = append(slices.Clone(x), in[len(l.names)+2])
		}
		return cur, env, op.Lower(&nn.Ctx{Env: env, Node: node}, x)[0]
	}
	var err error
	l.train, err = engine.NewExec(enginetest.Backend(), func(in []*graph.Node) []*graph.Node {
		x, dy := in[len(l.names)], in[len(l.names)+1]
		w, b := in[slices.Index(l.names, "w")], in[slices.Index(l.names, "b")]
		cur, env, y := lower(in, true)
		out := append([]*graph.Node{y}, graph.Gradient(graph.ReduceAllSum(graph.Mul(y, dy)), x, w, b)...)
		out = append(out, env.Tap["norm:var"], env.Tap["norm:rate"], env.Tap["norm:skip"])
		for _, n := range l.names {
			out = append(out, cur[n])
		}
		return out
	})
	if err != nil {
		t.Fatal(err)
	}
	l.infer, err = engine.NewExec(enginetest.Backend(), func(in []*graph.Node) []*graph.Node {
		_, _, y := lower(in, false)
		return []*graph.Node{y}
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.train.Finalize(); l.infer.Finalize() })
	return l
}

func (l *unifiedLayer) set(name string, data []float64, dims ...int) {
	l.p[name] = fixture.Tensor(data, dtypes.Float64, dims...)
}

func (l *unifiedLayer) state(name string) []float64 { return nn.Float64s(l.p[name]) }

func (l *unifiedLayer) args(rest ...*tensors.Tensor) []any {
	var a []any
	for _, n := range l.names {
		a = append(a, l.p[n])
	}
	for _, r := range rest {
		a = append(a, r)
	}
	return a
}

// step trains on x with the gradient dy of the output (and a mask).
func (l *unifiedLayer) step(t *testing.T, in ...*tensors.Tensor) unifiedStep {
	t.Helper()
	out, err := l.train.Call(l.args(in...)...)
	if err != nil {
		t.Fatal(err)
	}
	for i, n := range l.names {
		l.p[n] = out[7+i]
	}
	f := func(i int) []float64 { return nn.Float64s(out[i]) }
	return unifiedStep{f(0), f(1), f(2), f(3), f(4), f(5), f(6)[0]}
}

func (l *unifiedLayer) run(t *testing.T, x *tensors.Tensor) []float64 {
	t.Helper()
	out, err := l.infer.Call(l.args(x)...)
	if err != nil {
		t.Fatal(err)
	}
	return nn.Float64s(out[0])
}

func TestFixturesUnified(t *testing.T) {
	fixture.Run(t, 10, map[string]fixture.Func{
		"unified_norm": func(t *testing.T, c *fixture.Case) map[string]any {
			p := c.Params
			mask := c.Inputs["mask"]
			x, dy := c.Inputs["x"], c.Inputs["dy"]
			channels := x.Shape[3]
			l := newUnifiedLayer(t, norm.Unified{
				Window: p["window_fwd"].Int(), BackwardWindow: p["window_bwd"].Int(), Warmup: max(p["warmup_steps"].Int(), 1),
				CompensationStart: max(p["compensation_start"].Int(), 1), Decay: p["momentum"].Float(), Eps: p["eps"].Float(),
				Unfiltered: !p["outlier_filtration"].Bool(),
			}, channels, mask.Present())
			for local, name := range map[string]string{"w": "gain", "b": "bias", "var": "running_var0", "ema_gz": "ema_gz0", "buf_x2": "buffer_x20", "buf_gz": "buffer_gz0"} {
				l.set(local, c.Inputs[name].Floats(), c.Inputs[name].Shape...)
			}
			l.set("steps", []float64{p["start_step"].Float()})
			got := map[string][][]float64{}
			size := x.Shape[1] * x.Shape[2] * channels
			for k := range x.Shape[0] {
				part := func(v fixture.Value) *tensors.Tensor {
					return fixture.Tensor(v.Floats()[k*size:(k+1)*size], dtypes.Float64, x.Shape[1:]...)
				}
				in := []*tensors.Tensor{part(x), part(dy)}
				if mask.Present() {
					in = append(in, mask.Tensor(dtypes.Float64))
				}
				s := l.step(t, in...)
				for name, v := range map[string][]float64{
					"y": s.y, "dx": s.dx, "dgain": s.dgain, "dbias": s.dbias, "var": s.variance, "r": s.rate, "skipped": {s.skip},
					"running_var": l.state("var"), "ema_gz": l.state("ema_gz"),
				} {
					got[name] = append(got[name], v)
				}
			}
			out := map[string]any{}
			for name, v := range got {
				out[name] = slices.Concat(v...)
			}
			if in := c.Inputs["x_infer"]; in.Present() {
				out["y_infer"] = l.run(t, in.Tensor(dtypes.Float64))
			}
			return out
		},
		"fold_into_next_linear": func(t *testing.T, c *fixture.Case) map[string]any {
			in := c.Inputs
			scale, shift, err := norm.Unified{Eps: c.Params["eps"].Float()}.Affine(func(local string) []float64 {
				if local == "steps" {
					return []float64{1}
				}
				return in[map[string]string{"w": "gain", "b": "bias", "var": "running_var"}[local]].Floats()
			})
			if err != nil {
				t.Fatal(err)
			}
			w, bias, x := in["W"].Rows(), in["b"].Floats(), in["x"].Rows()
			folded := make([][]float64, len(w))
			y := make([][]float64, len(x))
			for o := range w {
				folded[o] = make([]float64, len(scale))
				for i := range scale {
					folded[o][i] = w[o][i] * scale[i]
					bias[o] += w[o][i] * shift[i]
				}
			}
			for r := range x {
				y[r] = slices.Clone(bias)
				for o := range w {
					for i := range scale {
						y[r][o] += folded[o][i] * x[r][i]
					}
				}
			}
			return map[string]any{"W_folded": folded, "b_folded": bias, "y": y}
		},
	})
}

// meanSquare is that of every channel.
func meanSquare(x *tensors.Tensor) []float64 {
	d := nn.Float64s(x)
	c := x.Shape().Dimensions[x.Rank()-1]
	m := make([]float64, c)
	for i, v := range d {
		m[i%c] += v * v * float64(c) / float64(len(d))
	}
	return m
}

// Without a window the norm divides by the batch's quadratic mean, with the gradient of autodiff through it.
func TestUnifiedWithWindowOneIsExact(t *testing.T) {
	l := newUnifiedLayer(t, norm.Unified{Window: 1, Warmup: 1, CompensationStart: 1}, 5, false)
	gain, bias := []float64{1, -2, .5, 3, 1}, []float64{0, 1, -1, .2, 0}
	l.set("w", gain, 5)
	l.set("b", bias, 5)
	for k := range uint64(4) {
		x, dy := draw(k, 2, 3, 4, 5), draw(100+k, 1, 3, 4, 5)
		want := call(t, func(in []*graph.Node) []*graph.Node {
			x, dy, w, b := in[0], in[1], in[2], in[3]
			up := func(v *graph.Node) *graph.Node { return graph.ExpandLeftToRank(v, 3) }
			z := graph.Div(x, up(graph.Sqrt(graph.AddScalar(graph.ReduceMean(graph.Square(x), 0, 1), 1e-5))))
			y := graph.Add(graph.Mul(z, up(w)), up(b))
			return append([]*graph.Node{y}, graph.Gradient(graph.ReduceAllSum(graph.Mul(y, dy)), x, w, b)...)
		}, x, dy, gain, bias)
		s := l.step(t, x, dy)
		for i, got := range [][]float64{s.y, s.dx, s.dgain, s.dbias} {
			near(t, fmt.Sprintf("step %d, output %d", k+1, i), got, nn.Float64s(want[i]), 1e-9)
		}
		if s.skip != 1 || l.state("skipped")[0] != 0 {
			t.Errorf("step %d: skip %g, %g outliers", k+1, s.skip, l.state("skipped")[0])
		}
	}
}

// Before the warm-up ends the batch's own statistic normalises, while the gradient takes the running backward one.
func TestUnifiedWarmup(t *testing.T) {
	l := newUnifiedLayer(t, norm.Unified{Warmup: 10}, 3, false)
	ema := make([]float64, 3)
	for k := range uint64(6) {
		x, dy := draw(k, 1, 2, 6, 3), draw(50+k, 1, 2, 6, 3)
		running := l.state("var")
		s := l.step(t, x, dy)
		x2 := meanSquare(x)
		near(t, "var", s.variance, x2, 1e-12)
		near(t, "rate", s.rate, []float64{1, 1, 1}, 0)
		in, d := nn.Float64s(x), nn.Float64s(dy)
		gz := make([]float64, 3)
		for i := range in {
			gz[i%3] += d[i] * in[i] / math.Sqrt(x2[i%3]+1e-5) / 12
		}
		for i := range ema {
			ema[i] = .9*ema[i] + .1*gz[i]
			running[i] = .9*running[i] + .1*x2[i]
		}
		near(t, "running", l.state("var"), running, 1e-12)
		near(t, "ema_gz", l.state("ema_gz"), ema, 1e-12)
		want := make([]float64, len(in))
		for i := range in {
			root := math.Sqrt(x2[i%3] + 1e-5)
			want[i] = (d[i] - ema[i%3]*in[i]/root) / root
		}
		near(t, "dx", s.dx, want, 1e-10)
	}
}

// The same batch over and over is no outlier, and its own statistic normalises it.
func TestUnifiedOnAConstantStream(t *testing.T) {
	l := newUnifiedLayer(t, norm.Unified{Warmup: 4, CompensationStart: 4}, 4, false)
	x, dy := draw(1, 3, 2, 5, 4), draw(2, 1, 2, 5, 4)
	for k := range 20 {
		s := l.step(t, x, dy)
		near(t, "var", s.variance, meanSquare(x), 1e-12)
		if s.skip != 0 {
			t.Fatalf("step %d was skipped", k+1)
		}
	}
	if l.state("skipped")[0] != 0 || l.state("steps")[0] != 20 {
		t.Errorf("%g of %g steps were outliers", l.state("skipped")[0], l.state("steps")[0])
	}
}

func TestUnifiedFiltersOutliers(t *testing.T) {
	batch := func(seed uint64, scale float64) *tensors.Tensor { // channels of different scales, as networks have them
		v := nn.Float64s(draw(seed, scale, 8, 16, 4))
		for i := range v {
			v[i] *= float64(i%4 + 1)
		}
		return fixture.Tensor(v, dtypes.Float64, 8, 16, 4)
	}
	calm := func(l *unifiedLayer) {
		for k := range uint64(11) {
			if s := l.step(t, batch(k, 1), draw(50+k, 1, 8, 16, 4)); s.skip != 0 {
				t.Fatalf("calm step %d was skipped", k+1)
			}
		}
	}
	x, dy := batch(99, 40), draw(98, 1, 8, 16, 4)
	for _, freeze := range []bool{false, true} {
		l := newUnifiedLayer(t, norm.Unified{Warmup: 5, CompensationStart: 5, FreezeOnSkip: freeze}, 4, false)
		calm(l)
		running, ema := l.state("var"), l.state("ema_gz")
		s := l.step(t, x, dy) // step 12: row 0
		if s.skip != 1 || l.state("skipped")[0] != 1 {
			t.Fatalf("freeze %v: skip %g, %g outliers", freeze, s.skip, l.state("skipped")[0])
		}
		near(t, "the buffer's row", l.state("buf_x2")[:4], running, 0)
		near(t, "the backward buffer's row", l.state("buf_gz")[:4], ema, 0)
		near(t, "var", s.variance, meanSquare(x), 1e-12)
		near(t, "rate", s.rate, []float64{1, 1, 1, 1}, 0)
		want := slices.Clone(running)
		if !freeze {
			for i, v := range meanSquare(x) {
				want[i] = .9*want[i] + .1*v
			}
		}
		near(t, "running", l.state("var"), want, 1e-12)
		if s = l.step(t, batch(60, 1), dy); freeze && s.skip != 0 {
			t.Error("the step after an outlier was skipped although the statistic was frozen")
		}
	}
	l := newUnifiedLayer(t, norm.Unified{Warmup: 5, Unfiltered: true}, 4, false)
	calm(l)
	if s := l.step(t, x, dy); s.skip != 0 || l.state("skipped")[0] != 0 {
		t.Error("a norm without filtration skipped")
	}
}

// What the test for outliers rests on: Var(√x) ≤ AM − GM ≤ M·Var(√x) for M non-negative numbers.
func TestMeansAreApartByTheVarianceOfTheRoots(t *testing.T) {
	r := rng.New(7, "rows")
	for range 2000 {
		m := 2 + r.IntN(7)
		am, lg, s1, s2 := 0., 0., 0., 0.
		for range m {
			v := math.Exp(3 * r.NormFloat64())
			am += v / float64(m)
			lg += math.Log(v) / float64(m)
			s1 += math.Sqrt(v) / float64(m)
			s2 += v / float64(m)
		}
		gap, variance := am-math.Exp(lg), s2-s1*s1
		if gap < variance-1e-9*am || gap > float64(m)*variance+1e-9*am {
			t.Fatalf("M = %d: gap %g, variance %g", m, gap, variance)
		}
	}
}

// r compensates between the batches' statistic and the running one, within [1/5, 5], and only late.
func TestUnifiedCompensation(t *testing.T) {
	l := newUnifiedLayer(t, norm.Unified{Window: 2, Warmup: 1, CompensationStart: 4, Unfiltered: true}, 3, false)
	l.set("var", []float64{1e-4, 1, 1e4}, 3)
	seen := map[float64]bool{}
	for k := range uint64(8) {
		x, dy := draw(k, 1, 4, 8, 3), draw(20+k, 1, 4, 8, 3)
		running := l.state("var")
		s := l.step(t, x, dy)
		for i, r := range s.rate {
			seen[r] = true
			want := min(max(math.Sqrt(s.variance[i]+1e-5)/math.Sqrt(running[i]+1e-5), .2), 5)
			if k < 4 {
				want = 1
			}
			near(t, fmt.Sprintf("step %d", k+1), []float64{r}, []float64{want}, 1e-12)
		}
		z := 0.
		for i, v := range nn.Float64s(x) {
			if i%3 == 0 {
				z += v * nn.Float64s(dy)[i]
			}
		}
		near(t, "dgain", s.dgain[:1], []float64{s.rate[0] * z / math.Sqrt(s.variance[0]+1e-5)}, 1e-9)
	}
	if !seen[.2] {
		t.Error("the lower bound of r was never reached")
	}
}

func TestUnifiedWindowsMayDiffer(t *testing.T) {
	l := newUnifiedLayer(t, norm.Unified{Window: 3, BackwardWindow: 2, Warmup: 1, Unfiltered: true}, 2, false)
	if a, b := l.p["buf_x2"].Shape().Dimensions, l.p["buf_gz"].Shape().Dimensions; a[0] != 3 || b[0] != 2 {
		t.Fatalf("buffers %v and %v", a, b)
	}
	var x2 [][]float64
	for k := range uint64(7) {
		x := draw(k, 1, 2, 4, 2)
		x2 = append(x2, meanSquare(x))
		s := l.step(t, x, draw(30+k, 1, 2, 4, 2))
		want := slices.Clone(x2[k])
		if k >= 3 {
			for i := range want {
				want[i] = math.Cbrt(x2[k][i] * x2[k-1][i] * x2[k-2][i])
			}
		}
		near(t, fmt.Sprintf("var of step %d", k+1), s.variance, want, 1e-10)
	}
}

func TestUnifiedInferenceIsAffinePerToken(t *testing.T) {
	l := newUnifiedLayer(t, norm.Unified{Warmup: 5}, 4, false)
	for k := range uint64(5) {
		l.step(t, draw(k, 2, 2, 3, 4), draw(10+k, 1, 2, 3, 4))
	}
	x := draw(77, 1, 3, 2, 4)
	all := l.run(t, x)
	one := l.run(t, fixture.Tensor(nn.Float64s(x)[8:12], dtypes.Float64, 1, 1, 4))
	near(t, "a token alone", one, all[8:12], 0)
	scale, shift, err := l.op.Affine(l.state)
	if err != nil {
		t.Fatal(err)
	}
	for i, v := range nn.Float64s(x) {
		near(t, "affine", all[i:i+1], []float64{scale[i%4]*v + shift[i%4]}, 1e-12)
	}
	if k := l.state("steps")[0]; k != 5 {
		t.Errorf("inference moved the counter to %g", k)
	}
}

func TestUnifiedMask(t *testing.T) {
	l := newUnifiedLayer(t, norm.Unified{Warmup: 5}, 2, true)
	x := fixture.Tensor([]float64{1, 2, 3, 4, 100, 100}, dtypes.Float64, 1, 3, 2)
	dy := draw(1, 1, 1, 3, 2)
	mask := func(v ...float64) *tensors.Tensor { return fixture.Tensor(v, dtypes.Float64, 1, 3) }
	s := l.step(t, x, dy, mask(1, 1, 0))
	near(t, "var", s.variance, []float64{5, 10}, 1e-12)
	before := map[string][]float64{}
	for _, n := range l.names {
		before[n] = l.state(n)
	}
	s = l.step(t, x, dy, mask(0, 0, 0))
	near(t, "var without a valid token", s.variance, before["var"], 1e-12)
	for _, n := range l.names {
		near(t, n+" after a batch without a valid token", l.state(n), before[n], 0)
	}
}

func TestUnifiedDeadChannel(t *testing.T) {
	l := newUnifiedLayer(t, norm.Unified{Window: 2, Warmup: 2, CompensationStart: 2}, 2, false)
	for k := range uint64(6) {
		v := nn.Float64s(draw(k, 1, 2, 4, 2))
		for i := 0; i < len(v); i += 2 {
			v[i] = 0
		}
		s := l.step(t, fixture.Tensor(v, dtypes.Float64, 2, 4, 2), draw(9+k, 1, 2, 4, 2))
		for i, y := range slices.Concat(s.y, s.dx) {
			if math.IsNaN(y) || math.IsInf(y, 0) {
				t.Fatalf("step %d: [%d] is %g", k+1, i, y)
			}
		}
		if s.y[0] != 0 || s.variance[0] > 1e-20 {
			t.Errorf("step %d: a dead channel gives %g with statistic %g", k+1, s.y[0], s.variance[0])
		}
	}
}

func TestUnifiedNonFiniteBatch(t *testing.T) {
	for _, skip := range []bool{false, true} {
		l := newUnifiedLayer(t, norm.Unified{Window: 2, Warmup: 2, SkipNonFinite: skip}, 2, false)
		dy := draw(9, 1, 1, 2, 2)
		for k := range uint64(3) {
			l.step(t, draw(k, 1, 1, 2, 2), dy)
		}
		before := map[string][]float64{}
		for _, n := range l.names {
			before[n] = l.state(n)
		}
		s := l.step(t, fixture.Tensor([]float64{math.Inf(1), 1, 2, 3}, dtypes.Float64, 1, 2, 2), dy)
		if finite := !slices.ContainsFunc(s.y, func(v float64) bool { return math.IsNaN(v) || math.IsInf(v, 0) }); finite {
			t.Error("an infinite value did not show in the output")
		}
		for _, n := range l.names {
			if skip {
				near(t, n, l.state(n), before[n], 0)
			}
		}
		if !skip && l.state("steps")[0] != 4 {
			t.Error("the step was not counted")
		}
		// A gradient that is not finite spoils nothing either.
		ema := l.state("ema_gz")
		l.step(t, draw(5, 1, 1, 2, 2), fixture.Tensor([]float64{math.Inf(1), 1, 1, 1}, dtypes.Float64, 1, 2, 2))
		if skip {
			near(t, "ema_gz", l.state("ema_gz"), ema, 0)
		}
	}
}

func TestUnifiedRefusals(t *testing.T) {
	in := []shapes.Shape{shapes.Make(dtypes.Float32, 2, 3, 4)}
	for want, d := range map[string]norm.Unified{
		"windows of -1":    {Window: -1},
		"and -2 batches":   {BackwardWindow: -2},
		"decay 1 is":       {Decay: 1},
		"decay -0.1":       {Decay: -.1},
		"decay NaN":        {Decay: math.NaN()},
		"eps is -1":        {Eps: -1},
		"eps is NaN":       {Eps: math.NaN()},
		"warm-up of -1":    {Warmup: -1},
		"step -3":          {CompensationStart: -3},
		"use at least 4":   {Warmup: 2},
		"use at least 100": {Window: 100, Warmup: 99},
	} {
		err := nn.Catch(func() { d.Params(in) })
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, want %q", d, err, want)
		}
	}
	for _, d := range []norm.Unified{{Warmup: 2, Unfiltered: true}, {Window: 1, Warmup: 1}, {Warmup: 4}} {
		if err := nn.Catch(func() { d.Params(in) }); err != nil {
			t.Errorf("%+v: %v", d, err)
		}
	}
	f := func(dtype dtypes.DType, d ...int) shapes.Shape { return shapes.Make(dtype, d...) }
	for name, s := range map[string][]shapes.Shape{
		"integers": {f(dtypes.Int32, 2, 3, 4)},
		"a mask of another shape": {
			f(dtypes.Float32, 2, 3, 4), f(dtypes.Float32, 3, 2),
		},
		"a mask of another rank": {f(dtypes.Float32, 2, 3, 4), f(dtypes.Float32, 2)},
		"no channels":            {f(dtypes.Float32, 2, 0)},
	} {
		b := nn.NewBuilder(1)
		var ins []string
		for i, x := range s {
			ins = append(ins, b.Input(fmt.Sprint("in", i), x))
		}
		b.Add("blk.norm", norm.Unified{}, ins...)
		if err := b.Err(); err == nil || !strings.Contains(err.Error(), "blk.norm") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

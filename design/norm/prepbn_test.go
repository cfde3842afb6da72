package norm_test

import (
	"context"
	"maps"
	"math"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/design/norm"
	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/internal/fixture"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/learn/optim"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/fold"
	"github.com/lathe-ml/lathe/nn/onnx"
	"github.com/lathe-ml/lathe/nn/safetensors"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// blend runs a norm in float64.
type blend struct {
	op     nn.Norm
	p      map[string]*tensors.Tensor // parameters and state, by local name
	lambda *float64                   // in place of that of the step
	step   *float64                   // of the trainer; nil: there is none
	frozen bool                       // state cannot be updated
}

func newBlend(op nn.Norm, channels int) *blend {
	b := &blend{op: op, p: map[string]*tensors.Tensor{}}
	for _, s := range op.Params([]shapes.Shape{shapes.Make(dtypes.Float64, 2, channels)}) {
		v := make([]float32, s.Shape.Size())
		if s.Init != nil {
			s.Init(nil, v)
		}
		d := make([]float64, len(v))
		for i := range v {
			d[i] = float64(v[i])
		}
		b.p[s.Name] = fixture.Tensor(d, dtypes.Float64, s.Shape.Dimensions...)
	}
	return b
}

func (b *blend) set(local string, v ...float64) {
	b.p[local] = fixture.Tensor(v, dtypes.Float64, b.p[local].Shape().Dimensions...)
}

func (b *blend) get(local string) []float64 { return nn.Float64s(b.p[local]) }

// run is one pass: y, and the gradients of Σ y·dy by x ("x") and by parameter. It moves the state.
func (b *blend) run(x, dy, mask *tensors.Tensor, training bool) (y []float64, grads map[string][]float64, err error) {
	names := slices.Sorted(maps.Keys(b.p))
	args := []any{x, dy}
	for _, n := range names {
		args = append(args, b.p[n])
	}
	if mask != nil {
		args = append(args, mask)
	}
	e, err := engine.NewExec(enginetest.Backend(), func(in []*graph.Node) []*graph.Node {
		cur, node := map[string]*graph.Node{}, &nn.Node{Name: "norm", Op: b.op, P: map[string]string{}}
		for i, n := range names {
			cur[n], node.P[n] = in[2+i], n
		}
		env := &nn.Env{
			G: in[0].Graph(), Training: training, DType: in[0].DType(), Param: func(n string) *graph.Node { return cur[n] },
			Override: map[string]*graph.Node{},
		}
		if !b.frozen {
			env.Update = func(n string, v *graph.Node) { cur[n] = v }
		}
		if b.lambda != nil {
			env.Override["norm:lambda"] = graph.Scalar(env.G, dtypes.Float64, *b.lambda)
		}
		if b.step != nil {
			env.Step = graph.Scalar(env.G, dtypes.Float32, *b.step)
		}
		xs := []*graph.Node{in[0]}
		if mask != nil {
			xs = append(xs, in[len(in)-1])
		}
		y := b.op.Lower(&nn.Ctx{Env: env, Node: node}, xs)[0]
		out := append([]*graph.Node{y}, graph.Gradient(graph.ReduceAllSum(graph.Mul(y, in[1])), append([]*graph.Node{in[0]}, in[2:2+len(names)]...)...)...)
		for _, n := range names {
			out = append(out, cur[n])
		}
		return out
	})
	if err != nil {
		return nil, nil, err
	}
	defer e.Finalize()
	out, err := e.Call(args...)
	if err != nil {
		return nil, nil, err
	}
	grads = map[string][]float64{"x": nn.Float64s(out[1])}
	for i, n := range names {
		grads[n] = nn.Float64s(out[2+i])
		b.p[n] = out[2+len(names)+i]
	}
	return nn.Float64s(out[0]), grads, nil
}

func (b *blend) mustRun(t *testing.T, x, dy, mask *tensors.Tensor, training bool) ([]float64, map[string][]float64) {
	t.Helper()
	y, grads, err := b.run(x, dy, mask, training)
	if err != nil {
		t.Fatal(err)
	}
	return y, grads
}

func TestFixturesPRepBN(t *testing.T) {
	fixture.Run(t, 2, map[string]fixture.Func{
		"prepbn": func(t *testing.T, c *fixture.Case) map[string]any {
			op := norm.PRepBN{
				RepBN:    norm.RepBN{Eps: c.Params["bn_eps"].Float(), Decay: 1 - c.Params["momentum"].Float()},
				FirstEps: c.Params["norm1_eps"].Float(),
			}
			if c.Params["norm1"].String() == "rmsnorm" {
				op.First = norm.RMSFirst
			}
			lambda := c.Params["lambda"].Float()
			b := newBlend(op, len(c.Inputs["gamma"].Floats()))
			b.lambda = &lambda
			for local, name := range map[string]string{"w": "gamma", "b": "beta", "eta": "eta", "first_w": "norm1_gain", "first_b": "norm1_bias", "mean": "running_mean", "var": "running_var"} {
				if b.p[local] != nil {
					b.set(local, c.Inputs[name].Floats()...)
				}
			}
			y, g := b.mustRun(t, c.Inputs["x"].Tensor(dtypes.Float64), c.Inputs["dy"].Tensor(dtypes.Float64), nil, c.Params["train"].Bool())
			out := map[string]any{
				"y": y, "dx": g["x"], "dgamma": g["w"], "dbeta": g["b"], "deta": g["eta"], "dnorm1_gain": g["first_w"], "dnorm1_bias": g["first_b"],
				"new_running_mean": b.get("mean"), "new_running_var": b.get("var"),
			}
			if op.First == norm.RMSFirst {
				out["dnorm1_bias"] = make([]float64, len(g["w"]))
			}
			return out
		},
		"fold_repbn": func(t *testing.T, c *fixture.Case) map[string]any {
			op := norm.RepBN{Eps: c.Params["bn_eps"].Float()}
			w, x := c.Inputs["W"], c.Inputs["x"]
			bias := c.Inputs["b"]
			dense := nn.Dense{Out: w.Shape[0], NoBias: !bias.Present()}
			b := nn.NewBuilder(0)
			v := b.Input("x", shapes.Make(dtypes.Float32, x.Shape...))
			if c.Params["direction"].String() == "forward" {
				v = b.Add("fc", dense, b.Add("norm", op, v))
			} else {
				v = b.Add("norm", op, b.Add("fc", dense, v))
			}
			set := func(node, local string, value fixture.Value, dims ...int) {
				b.Set(node, local, fixture.Tensor(value.Floats(), dtypes.Float32, dims...))
			}
			n := len(c.Inputs["gamma"].Floats())
			for local, name := range map[string]string{"w": "gamma", "b": "beta", "mean": "running_mean", "var": "running_var"} {
				set("norm", local, c.Inputs[name], n)
			}
			set("norm", "eta", c.Inputs["eta"])
			set("fc", "w", w, w.Shape...)
			if bias.Present() {
				set("fc", "b", bias, w.Shape[0])
			}
			net, err := b.Finish(v)
			if err != nil {
				t.Fatal(err)
			}
			node := net.Node("norm")
			scale, shift, err := op.Affine(func(local string) []float64 { return nn.Float64s(net.Param(node, local).Value) })
			if err != nil {
				t.Fatal(err)
			}
			if r, err := fold.Norms(net); err != nil || !slices.Equal(r.Folded, []string{"norm"}) || len(net.Nodes) != 1 {
				t.Fatalf("%+v, %v", r, err)
			}
			y, err := net.Run(enginetest.Backend(), []*tensors.Tensor{x.Tensor(dtypes.Float32)})
			if err != nil {
				t.Fatal(err)
			}
			fc := net.Nodes[0]
			return map[string]any{"scale": scale, "shift": shift, "W_folded": net.Param(fc, "w").Value, "b_folded": net.Param(fc, "b").Value, "y": y[0]}
		},
		"sla": func(t *testing.T, _ *fixture.Case) map[string]any { t.Skip("in nn/zoo"); return nil },
	})
}

// learned gives a norm parameters and statistics of its own.
func learned(b *blend) *blend {
	for i, local := range slices.Sorted(maps.Keys(b.p)) {
		if local == "steps" {
			continue
		}
		v := nn.Float64s(draw(uint64(20+i), .7, b.p[local].Shape().Size()))
		for j := range v {
			if local == "var" {
				v[j] = .5 + math.Abs(v[j])
			}
		}
		b.set(local, v...)
	}
	return b
}

// copyTo gives another norm this one's parameters, as far as it has them.
func (b *blend) copyTo(op nn.Norm) *blend {
	o := &blend{op: op, p: map[string]*tensors.Tensor{}}
	for _, s := range op.Params([]shapes.Shape{shapes.Make(dtypes.Float64, 2, b.p["mean"].Shape().Size())}) {
		o.p[s.Name] = b.p[s.Name]
	}
	return o
}

func at(v float64) *float64 { return &v }

func TestPRepBNFadesFromTheFirstNormToRepBN(t *testing.T) {
	x, dy := draw(1, 2, 3, 4, 5), draw(2, 1, 3, 4, 5)
	for first, plain := range map[norm.First]nn.Norm{norm.LayerFirst: nn.LayerNorm{Eps: 1e-6}, norm.RMSFirst: nn.RMSNorm{}} {
		op := norm.PRepBN{First: first, Steps: 100, Warmup: 10}
		b := learned(newBlend(op, 5))
		start := maps.Clone(b.p)
		begin := func(step float64) *blend { b.p, b.step = maps.Clone(start), at(step); return b }

		alone := &blend{op: plain, p: map[string]*tensors.Tensor{"w": b.p["first_w"]}}
		if first == norm.LayerFirst {
			alone.p["b"] = b.p["first_b"]
		}
		want, _ := alone.mustRun(t, x, dy, nil, true)
		for _, step := range []float64{0, 10} {
			got, _ := begin(step).mustRun(t, x, dy, nil, true)
			near(t, "y of the first norm", got, want, 1e-6)
		}
		rep := b.copyTo(op.RepBN)
		rep.p = maps.Clone(rep.p)
		want, _ = rep.mustRun(t, x, dy, nil, true)
		for _, step := range []float64{110, 5000} {
			got, _ := begin(step).mustRun(t, x, dy, nil, true)
			near(t, "y of RepBN", got, want, 1e-6)
		}
		for _, step := range []float64{0, 60, 200} { // evaluation ignores λ
			eval, _ := begin(step).mustRun(t, x, dy, nil, false)
			other := &blend{op: op.RepBN, p: map[string]*tensors.Tensor{}}
			for local := range rep.p {
				other.p[local] = start[local]
			}
			want, _ := other.mustRun(t, x, dy, nil, false)
			near(t, "y at inference", eval, want, 0)
		}
	}
}

func TestLambda(t *testing.T) {
	d := norm.PRepBN{Warmup: 40, Steps: 100}
	half := norm.PRepBN{Warmup: 40, Steps: 100, Start: .5}
	for _, c := range []struct {
		step       int
		want, half float64
	}{{0, 1, 1}, {39, 1, 1}, {40, 1, .5}, {90, .5, .25}, {139, .01, .005}, {140, 0, 0}, {1 << 40, 0, 0}} {
		if l := d.Lambda(c.step); math.Abs(l-c.want) > 1e-12 {
			t.Errorf("λ(%d) = %g, want %g", c.step, l, c.want)
		}
		if l := half.Lambda(c.step); math.Abs(l-c.half) > 1e-12 {
			t.Errorf("from 1/2: λ(%d) = %g, want %g", c.step, l, c.half)
		}
	}
	if l := (norm.PRepBN{}).Lambda(150_000); l != .5 {
		t.Errorf("the default's λ after 150,000 steps is %g", l)
	}
}

// While the first norm stands alone the running statistics stay, from step Warmup on they follow the batches.
func TestPRepBNStatisticsDuringWarmup(t *testing.T) {
	b := newBlend(norm.PRepBN{Warmup: 3, Steps: 4}, 2)
	mean, variance := []float64{0, 0}, []float64{1, 1}
	for step := range 6 {
		x := draw(uint64(step), 3, 4, 2)
		b.step = at(float64(step))
		b.mustRun(t, x, draw(1, 1, 4, 2), nil, true)
		if step >= 3 {
			v := nn.Float64s(x)
			for c := range 2 {
				m, s := 0., 0.
				for i := c; i < 8; i += 2 {
					m += v[i] / 4
				}
				for i := c; i < 8; i += 2 {
					s += (v[i] - m) * (v[i] - m) / 3
				}
				mean[c], variance[c] = .9*mean[c]+.1*m, .9*variance[c]+.1*s
			}
		}
		near(t, "running mean", b.get("mean"), mean, 1e-12)
		near(t, "running variance", b.get("var"), variance, 1e-12)
		if steps := b.get("steps")[0]; steps != float64(step+1) {
			t.Errorf("%g steps after %d", steps, step+1)
		}
	}
}

// The step counts, not the passes: micro-batches share it; a new trainer does not start to fade again; without a trainer
// the passes count.
func TestPRepBNCountsStepsOfTheTrainer(t *testing.T) {
	x := draw(1, 1, 4, 2)
	b := newBlend(norm.PRepBN{Steps: 10}, 2)
	steps := func(want float64) {
		t.Helper()
		b.mustRun(t, x, x, nil, true)
		if got := b.get("steps")[0]; got != want {
			t.Fatalf("%g steps, want %g", got, want)
		}
	}
	for s := range 3 {
		for range 4 {
			b.step = at(float64(s))
			steps(float64(s + 1))
		}
	}
	b.set("steps", 50)
	b.step = at(0)
	steps(50)
	b.step = nil
	steps(51)
	b.frozen = true
	steps(51)
}

func TestRepBNIsAnAffineMapAtInference(t *testing.T) {
	x := draw(1, 2, 6, 4)
	b := learned(newBlend(norm.RepBN{}, 4))
	y, _ := b.mustRun(t, x, x, nil, false)
	scale, shift, err := norm.RepBN{}.Affine(b.get)
	if err != nil {
		t.Fatal(err)
	}
	bn := b.copyTo(nn.BatchNorm{}) // gain' = gain + η√(σ²+ε), bias' = bias + ημ
	eta, gain, bias := b.get("eta")[0], b.get("w"), b.get("b")
	for i := range gain {
		gain[i] += eta * math.Sqrt(b.get("var")[i]+1e-5)
		bias[i] += eta * b.get("mean")[i]
	}
	bn.set("w", gain...)
	bn.set("b", bias...)
	same, _ := bn.mustRun(t, x, x, nil, false)
	near(t, "batch norm", same, y, 1e-5)
	want := nn.Float64s(x)
	for i := range want {
		want[i] = scale[i%4]*want[i] + shift[i%4]
	}
	near(t, "scale and shift", want, y, 1e-5)
}

func TestRepBNWithoutOnePart(t *testing.T) {
	x, dy := draw(1, 2, 6, 4), draw(2, 1, 6, 4)
	for _, training := range []bool{false, true} {
		b := learned(newBlend(norm.RepBN{}, 4))
		b.set("eta", 0)
		bn, without := b.copyTo(nn.BatchNorm{}), b.copyTo(norm.RepBN{NoShortcut: true})
		y, _ := b.mustRun(t, x, dy, nil, training)
		want, _ := bn.mustRun(t, x, dy, nil, training)
		near(t, "η = 0", y, want, 0)
		y, _ = without.mustRun(t, x, dy, nil, training)
		near(t, "without η", y, want, 0)

		b = learned(newBlend(norm.RepBN{}, 4))
		b.set("w", 0, 0, 0, 0)
		b.set("b", 0, 0, 0, 0)
		eta := b.get("eta")[0]
		y, _ = b.mustRun(t, x, dy, nil, training)
		scaled := nn.Float64s(x)
		for i := range scaled {
			scaled[i] *= eta
		}
		near(t, "gain = bias = 0", y, scaled, 0)
	}
}

func TestPRepBNInitialValues(t *testing.T) {
	for _, c := range []struct {
		op        nn.Norm
		gain, eta float64
	}{
		{norm.PRepBN{}, 1, 1},
		{norm.PRepBN{RepBN: norm.RepBN{ZeroInit: true}, First: norm.RMSFirst}, 0, 0},
		{norm.RepBN{GainInit: .5, EtaInit: -2}, .5, -2},
	} {
		b := newBlend(c.op, 3)
		near(t, "gain", b.get("w"), []float64{c.gain, c.gain, c.gain}, 0)
		near(t, "η", b.get("eta"), []float64{c.eta}, 0)
		near(t, "bias", b.get("b"), make([]float64, 3), 0)
	}
}

// η is a scalar of the layer, trained without weight decay.
func TestShortcutIsKeptOutOfWeightDecay(t *testing.T) {
	net := smallViT(t, zoo.ViTOptions{Norm: norm.PRepBN{Steps: 5}, MeanPool: true})
	p := net.Params.Get("norm.eta")
	if p == nil || p.Value.Shape().Size() != 1 || !p.Trainable() {
		t.Fatalf("%+v", p)
	}
	if f := learn.DefaultFactors(p); f.LR != 1 || f.Decay != 0 {
		t.Errorf("%+v", f)
	}
}

func TestPRepBNGradientByFiniteDifferences(t *testing.T) {
	x, dy := nn.Float64s(draw(1, 1, 2, 3, 4)), draw(2, 1, 2, 3, 4)
	mask := fixture.Tensor([]float64{1, 1, 0, 1, 1, 1}, dtypes.Float64, 2, 3)
	for name, c := range map[string]struct {
		op     nn.Norm
		mask   *tensors.Tensor
		lambda float64
	}{
		"repbn":               {norm.RepBN{}, nil, 0},
		"repbn, masked":       {norm.RepBN{}, mask, 0},
		"prepbn":              {norm.PRepBN{}, nil, .4},
		"prepbn, rms, masked": {norm.PRepBN{First: norm.RMSFirst}, mask, .7},
		"prepbn, no shortcut": {norm.PRepBN{RepBN: norm.RepBN{NoShortcut: true}}, nil, .4},
	} {
		b := learned(newBlend(c.op, 4))
		b.lambda, b.frozen = &c.lambda, true
		tx := func(v []float64) *tensors.Tensor { return fixture.Tensor(v, dtypes.Float64, 2, 3, 4) }
		loss := func(v []float64) (sum float64) {
			y, _ := b.mustRun(t, tx(v), dy, c.mask, true)
			for i, d := range nn.Float64s(dy) {
				sum += d * y[i]
			}
			return sum
		}
		_, grads := b.mustRun(t, tx(x), dy, c.mask, true)
		check := func(what string, got []float64, i int, at func(d float64) float64) {
			want := (at(1e-5) - at(-1e-5)) / 2e-5
			if math.Abs(got[i]-want) > 1e-3*max(1e-3, math.Abs(want)) {
				t.Errorf("%s: d%s[%d] = %g, finite difference %g", name, what, i, got[i], want)
			}
		}
		for i := range x {
			if i%3 == 0 {
				check("x", grads["x"], i, func(d float64) float64 { v := slices.Clone(x); v[i] += d; return loss(v) })
			}
		}
		for local := range b.p {
			if slices.Contains([]string{"mean", "var", "steps"}, local) {
				continue
			}
			old := b.get(local)
			check(local, grads[local], 0, func(d float64) float64 {
				v := slices.Clone(old)
				v[0] += d
				b.set(local, v...)
				defer b.set(local, old...)
				return loss(x)
			})
		}
	}
}

func TestPRepBNMask(t *testing.T) {
	valid := nn.Float64s(draw(1, 1, 4, 3))
	padded := append(slices.Clone(valid), 1e3, -1e3, 5, 7, 1e4, 2)
	dy := append(nn.Float64s(draw(2, 1, 4, 3)), make([]float64, 6)...)
	for _, op := range []nn.Norm{norm.RepBN{}, norm.PRepBN{Steps: 2}} {
		short := newBlend(op, 3)
		long := newBlend(op, 3)
		for range 2 {
			a, ga := short.mustRun(t, fixture.Tensor(valid, dtypes.Float64, 1, 4, 3), fixture.Tensor(dy[:12], dtypes.Float64, 1, 4, 3), nil, true)
			b, gb := long.mustRun(t, fixture.Tensor(padded, dtypes.Float64, 1, 6, 3), fixture.Tensor(dy, dtypes.Float64, 1, 6, 3), fixture.Tensor([]float64{1, 1, 1, 1, 0, 0}, dtypes.Float64, 1, 6), true)
			near(t, "y", b[:12], a, 1e-12)
			near(t, "dx", gb["x"][:12], ga["x"], 1e-12)
			near(t, "running mean", long.get("mean"), short.get("mean"), 1e-12)
			near(t, "running variance", long.get("var"), short.get("var"), 1e-12)
		}
		for n := range 2 { // too few valid tokens: the running statistics normalise, and stay
			m := make([]float64, 6)
			m[0] = float64(n)
			mean, variance := long.get("mean"), long.get("var")
			y, g := long.mustRun(t, fixture.Tensor(padded, dtypes.Float64, 1, 6, 3), fixture.Tensor(dy, dtypes.Float64, 1, 6, 3), fixture.Tensor(m, dtypes.Float64, 1, 6), true)
			near(t, "kept mean", long.get("mean"), mean, 1e-15)
			near(t, "kept variance", long.get("var"), variance, 1e-15)
			for _, v := range append(y, g["x"]...) {
				if math.IsNaN(v) || math.IsInf(v, 0) {
					t.Fatalf("%s: %d valid tokens give %g", op.Kind(), n, v)
				}
			}
			if err := norm.CheckMask(fixture.Tensor(m, dtypes.Float64, 1, 6)); err == nil || !strings.Contains(err.Error(), "at least 2") {
				t.Errorf("a mask of %d valid tokens: %v", n, err)
			}
		}
	}
	if err := norm.CheckMask(tensors.FromFlatDataAndDimensions([]bool{true, false, true}, 1, 3)); err != nil {
		t.Error(err)
	}
}

func TestPRepBNRefusals(t *testing.T) {
	x := draw(1, 1, 2, 3)
	for want, c := range map[string]struct {
		op norm.PRepBN
		x  *tensors.Tensor
	}{
		"at least 1 (0: 300000)": {norm.PRepBN{Steps: -1}, x},
		"warm-up of -1":          {norm.PRepBN{Warmup: -1}, x},
		"λ starts at 1.5":        {norm.PRepBN{Start: 1.5}, x},
		"λ starts at NaN":        {norm.PRepBN{Start: math.NaN()}, x},
		"eps is -1":              {norm.PRepBN{RepBN: norm.RepBN{Eps: -1}}, x},
		"old statistics 1":       {norm.PRepBN{RepBN: norm.RepBN{Decay: 1}}, x},
		"beside ZeroInit":        {norm.PRepBN{RepBN: norm.RepBN{ZeroInit: true, EtaInit: 1}}, x},
		"first norm first(7)":    {norm.PRepBN{First: 7}, x},
		"eps of the first norm":  {norm.PRepBN{FirstEps: -1}, x},
		"has 1 tokens":           {norm.PRepBN{}, draw(1, 1, 1, 3)},
		"over one channel":       {norm.PRepBN{}, draw(1, 1, 4, 1)},
	} {
		b := &blend{op: c.op}
		channels := c.x.Shape().Dimensions[c.x.Rank()-1]
		good := newBlend(norm.PRepBN{First: norm.RMSFirst}, channels)
		b.p = good.p
		if c.op.First == norm.LayerFirst {
			b.p["first_b"] = b.p["b"]
		}
		if _, _, err := b.run(c.x, c.x, nil, true); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q, got %v", want, err)
		}
	}
	// One token is enough at inference.
	one := newBlend(norm.PRepBN{}, 3)
	one.mustRun(t, draw(1, 1, 1, 3), draw(1, 1, 1, 3), nil, false)
}

func TestRepBNAffineRefusesBadStatistics(t *testing.T) {
	for local, v := range map[string]float64{"var": -1, "mean": math.NaN()} {
		for _, v := range []float64{v, math.Inf(1)} {
			b := newBlend(norm.RepBN{}, 3)
			b.set(local, 1, v, 1)
			if _, _, err := (norm.RepBN{}).Affine(b.get); err == nil || !strings.Contains(err.Error(), "channel 1") {
				t.Errorf("%s %g: %v", local, v, err)
			}
		}
	}
}

// foldRelative folds a copy and compares it with the network on an input, to 1e-5 of the largest output: the shortcut lets
// the stream grow, and logits are as large as 20.
func foldRelative(t *testing.T, net *nn.Network, x *tensors.Tensor) (*nn.Network, fold.Report) {
	t.Helper()
	folded := net.Clone()
	r, err := fold.Norms(folded)
	if err != nil {
		t.Fatal(err)
	}
	var out [2][]float64
	for i, n := range []*nn.Network{net, folded} {
		y, err := n.Run(enginetest.Backend(), []*tensors.Tensor{x})
		if err != nil {
			t.Fatal(err)
		}
		out[i] = nn.Float64s(y[0])
	}
	largest := 0.
	for _, v := range out[0] {
		largest = max(largest, math.Abs(v))
	}
	for i := range out[0] {
		out[0][i] /= largest
		out[1][i] /= largest
	}
	near(t, "the folded network's output", out[1], out[0], 1e-5)
	return folded, r
}

func TestFoldingPRepBN(t *testing.T) {
	op := norm.PRepBN{Steps: 5}
	options := zoo.ViTOptions{Norm: op, MeanPool: true}
	early := trained(t, smallViT(t, options), 4)
	nodes, count := len(early.Nodes), early.Params.Count()
	if _, err := fold.Norms(early); err == nil || !strings.Contains(err.Error(), `"blk.0.norm1"`) || !strings.Contains(err.Error(), "λ is 0.2") {
		t.Fatalf("folded too early: %v", err)
	}
	if _, err := norm.Reparameterize(early, false); err == nil || !strings.Contains(err.Error(), "force") {
		t.Fatalf("re-parameterised too early: %v", err)
	}
	if len(early.Nodes) != nodes || early.Params.Count() != count {
		t.Fatal("the network was changed all the same")
	}
	forced := early.Clone()
	if names, err := norm.Reparameterize(forced, true); err != nil || len(names) != 5 {
		t.Fatalf("%v, %v", names, err)
	}
	if d := count - forced.Params.Count(); forced.Node("norm").Op.Kind() != "repbn" || d != 5*(2*16+1) || forced.Params.Get("norm.first_w") != nil {
		t.Errorf("%d parameters went", d)
	}
	if _, r := foldRelative(t, forced, pictures(50, 6, 14)[0]); len(r.Folded) != 5 {
		t.Errorf("%+v", r)
	}

	late := trained(t, smallViT(t, options), 7)
	folded, r := foldRelative(t, late, pictures(50, 6, 14)[0])
	if want := []string{"blk.0.norm1", "blk.0.norm2", "blk.1.norm1", "blk.1.norm2", "norm"}; !slices.Equal(r.Folded, want) || len(r.Explicit)+len(r.Kept) > 0 {
		t.Errorf("%+v", r)
	}
	for _, x := range folded.Nodes {
		if _, ok := x.Op.(nn.Norm); ok && strings.Contains(x.Op.Kind(), "bn") {
			t.Errorf("%q is still a norm", x.Name)
		}
	}
}

// A norm between a patch convolution and the stream folds into the convolution; one on the stream itself, which others
// read too, stays as a scale and a shift.
func TestRepBNFoldsBackward(t *testing.T) {
	b := nn.NewBuilder(1)
	x := b.Image("image", 14, 14, 1)
	x = b.Add("patch", nn.Conv{Out: 8, Kernel: []int{7, 7}, Stride: []int{7, 7}, NoBias: true}, x)
	x = b.Add("flat", nn.Reshape{Dims: []int{0, 4, 8}}, b.Add("patch.norm", norm.RepBN{}, x))
	h := b.Add("stream.norm", norm.RepBN{}, b.Add("fc0", nn.Dense{Out: 8}, x))
	x = b.Add("sum", nn.Add, x, b.Add("fc", nn.Dense{Out: 8}, b.Add("own.norm", norm.RepBN{}, h)))
	x = b.Add("sum2", nn.Add, x, h)
	x = b.Add("pool", nn.Reduce{Fn: "ReduceMean", Axes: []int{1}}, x)
	net, err := b.Finish(b.Add("head", nn.Dense{Out: 10}, x))
	if err != nil {
		t.Fatal(err)
	}
	folded, r := foldRelative(t, trained(t, net, 4), pictures(50, 6, 14)[0])
	if want := []string{"patch.norm", "stream.norm", "own.norm"}; !slices.Equal(r.Folded, want) || len(r.Explicit) > 0 {
		t.Errorf("%+v", r)
	}
	if x := folded.Node("patch.norm"); x == nil || x.Op.Kind() != "conv" || folded.Param(x, "b") == nil {
		t.Error("the patch convolution has not taken its norm in")
	}

	post := trained(t, smallViT(t, zoo.ViTOptions{Norm: norm.RepBN{}, MeanPool: true, Scheme: zoo.PostNorm{}}), 4)
	if _, r := foldRelative(t, post, pictures(50, 6, 14)[0]); !slices.Equal(r.Explicit, []string{"blk.0.norm1", "blk.0.norm2", "blk.1.norm1"}) {
		t.Errorf("post-norm: %+v", r)
	}
}

func TestPRepBNFoldedOnRealImages(t *testing.T) {
	data.RequireTest(t, "fashion-mnist")
	test, err := data.FashionMNIST(context.Background(), false)
	if err != nil {
		t.Fatal(err)
	}
	test = test.First(1000)
	net, err := zoo.ViT(zoo.ViTOptions{Dim: 32, Depth: 2, Heads: 2, Norm: norm.PRepBN{Steps: 4}, MeanPool: true, Mixer: zoo.LinearAttentionOptions{}.Mixer()})
	if err != nil {
		t.Fatal(err)
	}
	tr, err := learn.NewTrainer(enginetest.Backend(), &net.Params, learn.Classifier(net), learn.Options{LR: 2e-3})
	if err != nil {
		t.Fatal(err)
	}
	defer tr.Finalize()
	batch := func(from, to int) []*tensors.Tensor {
		idx := make([]int, to-from)
		for i := range idx {
			idx[i] = from + i
		}
		labels, err := test.LabelsTensor(idx)
		if err != nil {
			t.Fatal(err)
		}
		return []*tensors.Tensor{tensors.FromFlatDataAndDimensions(test.Floats(idx, nil), len(idx), 28, 28, 1), labels}
	}
	for k := range 8 {
		if _, err := tr.Step(batch(32*k, 32*k+32)...); err != nil {
			t.Fatal(err)
		}
	}
	if _, r := foldRelative(t, net, batch(0, 1000)[0]); len(r.Folded) != 5 {
		t.Errorf("%+v", r)
	}
}

func TestPRepBNInFiles(t *testing.T) {
	op := norm.PRepBN{RepBN: norm.RepBN{Decay: .8}, Steps: 3, First: norm.RMSFirst}
	net := trained(t, smallViT(t, zoo.ViTOptions{Norm: op, MeanPool: true}), 5)
	x := pictures(52, 3, 14)[0]
	want, err := net.Run(enginetest.Backend(), []*tensors.Tensor{x})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	same := func(name string, n *nn.Network) {
		t.Helper()
		got, err := n.Run(enginetest.Backend(), []*tensors.Tensor{x})
		if err != nil {
			t.Fatal(err)
		}
		near(t, name, nn.Float64s(got[0]), nn.Float64s(want[0]), 1e-4) // backends differ by 1.3e-4 of the first output
	}
	file := filepath.Join(dir, "net.safetensors")
	if err := safetensors.WriteNetwork(file, net); err != nil {
		t.Fatal(err)
	}
	back, err := safetensors.ReadNetwork(file, norm.PRepBN{}, norm.RepBN{})
	if err != nil {
		t.Fatal(err)
	}
	if got := back.Node("norm").Op; got != op || back.Params.Get("norm.steps").Data()[0] != 5 {
		t.Errorf("%+v", got)
	}
	same("safetensors", back)
	plain := net.Clone()
	if _, err := norm.Reparameterize(plain, false); err != nil {
		t.Fatal(err)
	}
	folded := plain.Clone()
	if _, err := fold.Norms(folded); err != nil {
		t.Fatal(err)
	}
	for name, n := range map[string]*nn.Network{"prepbn": net, "repbn": plain, "folded": folded} {
		file := filepath.Join(dir, name+".onnx")
		if err := onnx.WriteFile(file, n, onnx.WriteOptions{}); err != nil {
			t.Fatal(err)
		}
		back, err := onnx.ReadFile(file, onnx.Options{})
		if err != nil {
			t.Fatal(err)
		}
		same(name+" ONNX", back)
	}
}

// A training in micro-batches fades at the same pace as one in whole batches, and a resumed one goes on.
func TestPRepBNInATraining(t *testing.T) {
	op := norm.PRepBN{Steps: 6, Warmup: 1}
	build := func() *nn.Network { return smallViT(t, zoo.ViTOptions{Norm: op, MeanPool: true}) }
	trainer := func(net *nn.Network) *learn.Trainer {
		tr, err := learn.NewTrainer(enginetest.Backend(), &net.Params, learn.Classifier(net), learn.Options{Optimizer: optim.AdamW{}, LR: .01})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(tr.Finalize)
		return tr
	}
	micro := build()
	tr := trainer(micro)
	for k := range 3 {
		if _, err := tr.StepMicro(.01, [][]*tensors.Tensor{pictures(uint64(k), 4, 14), pictures(uint64(9+k), 4, 14)}); err != nil {
			t.Fatal(err)
		}
	}
	if s := micro.Params.Get("norm.steps").Data()[0]; s != 3 {
		t.Errorf("%g steps after 3 of two micro-batches", s)
	}

	file := filepath.Join(t.TempDir(), "checkpoint")
	steps := func(tr *learn.Trainer, from, to int) {
		for k := from; k < to; k++ {
			if _, err := tr.Step(pictures(uint64(k), 8, 14)...); err != nil {
				t.Fatal(err)
			}
		}
	}
	whole := build()
	steps(trainer(whole), 0, 6)
	first := trainer(build())
	steps(first, 0, 3)
	if err := first.Save(file, nil); err != nil {
		t.Fatal(err)
	}
	resumed := build()
	second := trainer(resumed)
	if _, err := second.Load(file, nil); err != nil {
		t.Fatal(err)
	}
	steps(second, 3, 6)
	for p := range whole.Params.All() {
		if !slices.Equal(p.Data(), resumed.Params.Get(p.Name).Data()) {
			t.Errorf("parameter %q differs after the resumption", p.Name)
		}
	}
}

func TestPRepBNCanBeWatched(t *testing.T) {
	net := smallViT(t, zoo.ViTOptions{Norm: norm.PRepBN{Steps: 3}, MeanPool: true})
	r := norm.NewStatRecorder()
	restore, err := r.Watch(net)
	if err != nil {
		t.Fatal(err)
	}
	defer restore()
	if n := len(r.Layers()); n != 5 {
		t.Errorf("%d layers are watched", n)
	}
}

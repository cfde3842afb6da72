package norm_test

import (
	"math"
	"path/filepath"
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
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/fold"
	"github.com/lathe-ml/lathe/nn/onnx"
	"github.com/lathe-ml/lathe/nn/safetensors"
)

// power drives a PowerNorm step by step in float64.
type power struct {
	t          *testing.T
	op         norm.PowerNorm
	gain, bias []float64
	state      map[string][]float64
	steps      map[bool]*engine.Exec
}

func newPower(t *testing.T, op norm.PowerNorm, channels int) *power {
	p := &power{t: t, op: op, state: map[string][]float64{}, steps: map[bool]*engine.Exec{}}
	for _, s := range op.Params([]shapes.Shape{shapes.Make(dtypes.Float64, 1, channels)}) {
		v := make([]float32, s.Shape.Size())
		if s.Init != nil {
			s.Init(nil, v)
		}
		d := make([]float64, len(v))
		for i := range v {
			d[i] = float64(v[i])
		}
		switch s.Name {
		case "w":
			p.gain = d
		case "b":
			p.bias = d
		default:
			p.state[s.Name] = d
		}
	}
	return p
}

func (p *power) names() []string {
	names := []string{"phi"}
	for _, s := range []string{"nu", "count", "skipped"} {
		if _, ok := p.state[s]; ok {
			names = append(names, s)
		}
	}
	return names
}

// lower lowers the op on nodes; state holds its state by name, and takes the updates.
func (p *power) lower(x, mask, gain, bias *graph.Node, state map[string]*graph.Node, training bool) *graph.Node {
	node := &nn.Node{Name: "norm", Op: p.op, P: map[string]string{"w": "w", "b": "b"}}
	for s := range state {
		node.P[s] = s
	}
	env := &nn.Env{
		G: x.Graph(), DType: x.DType(), Training: training,
		Param: func(s string) *graph.Node {
			switch s {
			case "w":
				return gain
			case "b":
				return bias
			}
			return state[s]
		},
		Update: func(s string, v *graph.Node) { state[s] = v },
	}
	in := []*graph.Node{x}
	if mask != nil {
		in = append(in, mask)
	}
	return p.op.Lower(&nn.Ctx{Env: env, Node: node}, in)[0]
}

type powerStep struct{ y, dx, dgain, dbias []float64 }

// step trains one step; the last axis of x are the channels. A nil mask is none.
func (p *power) step(x, dy *tensors.Tensor, mask *tensors.Tensor) powerStep {
	p.t.Helper()
	dims := []int{len(p.gain)}
	args := []any{x, dy, fixture.Tensor(p.gain, dtypes.Float64, dims...), fixture.Tensor(p.bias, dtypes.Float64, dims...)}
	names := p.names()
	for _, s := range names {
		if s == "count" || s == "skipped" {
			args = append(args, tensors.FromScalar(p.state[s][0]))
		} else {
			args = append(args, fixture.Tensor(p.state[s], dtypes.Float64, dims...))
		}
	}
	if mask != nil {
		args = append(args, mask)
	}
	e := p.steps[mask != nil]
	if e == nil {
		var err error
		e, err = engine.NewExec(enginetest.Backend(), func(in []*graph.Node) []*graph.Node {
			state := map[string]*graph.Node{}
			for i, s := range names {
				state[s] = in[4+i]
			}
			var m *graph.Node
			if mask != nil {
				m = in[4+len(names)]
			}
			y := p.lower(in[0], m, in[2], in[3], state, true)
			out := append([]*graph.Node{y}, graph.Gradient(graph.ReduceAllSum(graph.Mul(y, in[1])), in[0], in[2], in[3])...)
			for _, s := range names {
				out = append(out, state[s])
			}
			return out
		})
		if err != nil {
			p.t.Fatal(err)
		}
		p.t.Cleanup(e.Finalize)
		p.steps[mask != nil] = e
	}
	out, err := e.Call(args...)
	if err != nil {
		p.t.Fatal(err)
	}
	for i, s := range names {
		p.state[s] = nn.Float64s(out[4+i])
	}
	return powerStep{nn.Float64s(out[0]), nn.Float64s(out[1]), nn.Float64s(out[2]), nn.Float64s(out[3])}
}

func (p *power) infer(x *tensors.Tensor) []float64 {
	p.t.Helper()
	args := []any{x}
	for _, d := range [][]float64{p.gain, p.bias, p.state["phi"]} {
		args = append(args, fixture.Tensor(d, dtypes.Float64, len(d)))
	}
	return nn.Float64s(call(p.t, func(in []*graph.Node) []*graph.Node {
		return []*graph.Node{p.lower(in[0], nil, in[1], in[2], map[string]*graph.Node{"phi": in[3]}, false)}
	}, args...)[0])
}

// draw is a float64 tensor of normal values times scale.
func draw(seed uint64, scale float64, dims ...int) *tensors.Tensor {
	n := 1
	for _, d := range dims {
		n *= d
	}
	v := make([]float64, n)
	r := rng.New(seed, "draw")
	for i := range v {
		v[i] = r.NormFloat64() * scale
	}
	return fixture.Tensor(v, dtypes.Float64, dims...)
}

func near(t *testing.T, what string, got, want []float64, tol float64) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%s has %d values, want %d", what, len(got), len(want))
	}
	for i := range got {
		if !(math.Abs(got[i]-want[i]) <= tol*max(1, math.Abs(want[i]))) {
			t.Fatalf("%s[%d] = %.9g, want %.9g", what, i, got[i], want[i])
		}
	}
}

func TestFixturesPowerNorm(t *testing.T) {
	fixture.Run(t, 6, map[string]fixture.Func{
		"power_norm": func(t *testing.T, c *fixture.Case) map[string]any {
			if eps := c.Params["group_scaling_eps"]; eps.Present() && eps.Float() != 1e-5 {
				t.Fatalf("group scaling with eps %g is not a PowerNorm", eps.Float())
			}
			op := norm.PowerNorm{
				AlphaForward: c.Params["alpha_fwd"].Float(), AlphaBackward: c.Params["alpha_bwd"].Float(), Eps: c.Params["eps"].Float(),
				Warmup: c.Params["warmup_steps"].Int(), Groups: c.Params["groups"].Int(), NoGroupScaling: !c.Params["group_scaling"].Bool(),
			}
			op.ZeroForward, op.ZeroBackward, op.NoWarmup = op.AlphaForward == 0, op.AlphaBackward == 0, op.Warmup == 0
			if c.Params["backward_scale"].String() == norm.RunningScale.String() {
				op.BackwardScale = norm.RunningScale
			}
			x, dy := c.Inputs["x"], c.Inputs["dy"]
			steps, dims := x.Shape[0], x.Shape[1:]
			channels := dims[len(dims)-1]
			p := newPower(t, op, channels)
			p.gain, p.bias = c.Inputs["gain"].Floats(), c.Inputs["bias"].Floats()
			var mask *tensors.Tensor
			if m, ok := c.Inputs["mask"]; ok && m.Present() {
				mask = m.Tensor(dtypes.Float64)
			}
			size := len(x.Floats()) / steps
			var y, dx, dgain, dbias, phi, nu []float64
			for i := range steps {
				part := func(v fixture.Value) *tensors.Tensor {
					return fixture.Tensor(v.Floats()[i*size:(i+1)*size], dtypes.Float64, dims...)
				}
				s := p.step(part(x), part(dy), mask)
				y, dx, dgain, dbias = append(y, s.y...), append(dx, s.dx...), append(dgain, s.dgain...), append(dbias, s.dbias...)
				phi, nu = append(phi, p.state["phi"]...), append(nu, p.state["nu"]...)
			}
			per := func(v []float64) *tensors.Tensor { return fixture.Tensor(v, dtypes.Float64, steps, channels) }
			all := func(v []float64) *tensors.Tensor { return fixture.Tensor(v, dtypes.Float64, x.Shape...) }
			infer := c.Inputs["x_infer"]
			return map[string]any{
				"y": all(y), "dx": all(dx), "dgain": per(dgain), "dbias": per(dbias), "running_phi": per(phi), "nu": per(nu),
				"y_infer": fixture.Tensor(p.infer(infer.Tensor(dtypes.Float64)), dtypes.Float64, infer.Shape...),
			}
		},
		"power_norm_v": func(t *testing.T, c *fixture.Case) map[string]any {
			p := newPower(t, norm.PowerNorm{Eps: c.Params["eps"].Float(), BatchOnly: true, NoGroupScaling: true}, c.Inputs["x"].Shape[1])
			p.gain, p.bias = c.Inputs["gain"].Floats(), c.Inputs["bias"].Floats()
			s := p.step(c.Inputs["x"].Tensor(dtypes.Float64), c.Inputs["dy"].Tensor(dtypes.Float64), nil)
			shape := c.Inputs["x"].Shape
			return map[string]any{
				"y": fixture.Tensor(s.y, dtypes.Float64, shape...), "dx": fixture.Tensor(s.dx, dtypes.Float64, shape...),
				"dgain": fixture.Tensor(s.dgain, dtypes.Float64, shape[1]), "dbias": fixture.Tensor(s.dbias, dtypes.Float64, shape[1]),
			}
		},
	})
}

// After the warm-up the statistics are the running ones: another row changes no bit of this one.
func TestPowerNormRowsAreIndependentAfterWarmup(t *testing.T) {
	for _, op := range []norm.PowerNorm{{Warmup: 2}, {Warmup: 2, NoGroupScaling: true, BackwardScale: norm.RunningScale}} {
		rows := func(change float64) (y []float64) {
			p := newPower(t, op, 4)
			for i := range uint64(3) {
				x := nn.Float64s(draw(i, 1, 6, 4))
				if i == 2 {
					x[5*4+1] += change
				}
				y = p.step(fixture.Tensor(x, dtypes.Float64, 6, 4), draw(9, 1, 6, 4), nil).y
			}
			return y
		}
		if a, b := rows(0), rows(100); !slices.Equal(a[:20], b[:20]) || slices.Equal(a[20:], b[20:]) {
			t.Errorf("%+v: a changed row changes others, or not itself", op)
		}
	}
}

// With ψ² the last batch's and a constant stream, the forward pass is PN-V's from the second step on.
func TestPowerNormWithoutMemoryIsPNV(t *testing.T) {
	x, dy := draw(1, 2, 12, 5), draw(2, 1, 12, 5)
	v := newPower(t, norm.PowerNorm{BatchOnly: true, NoGroupScaling: true}, 5)
	want := v.step(x, dy, nil).y
	p := newPower(t, norm.PowerNorm{ZeroForward: true, NoWarmup: true, NoGroupScaling: true}, 5)
	p.step(x, dy, nil)
	for range 3 {
		near(t, "y", p.step(x, dy, nil).y, want, 1e-5)
	}
}

// On repeated x and dy, ν converges to mean(g·z)/mean(z²), and dx to the exact gradient of PN-V.
func TestPowerNormBackwardConverges(t *testing.T) {
	x, dy := draw(3, 1.5, 10, 3), draw(4, 1, 10, 3)
	gain := []float64{.5, 2, -1}
	for _, scale := range []norm.Scale{norm.BatchScale, norm.RunningScale} {
		p := newPower(t, norm.PowerNorm{NoWarmup: true, NoGroupScaling: true, BackwardScale: scale}, 3)
		v := newPower(t, norm.PowerNorm{BatchOnly: true, NoGroupScaling: true}, 3)
		p.gain, v.gain = gain, gain
		var got powerStep
		for range 500 {
			got = p.step(x, dy, nil)
		}
		g, z := nn.Float64s(dy), got.y
		for c := range 3 {
			var lambda, gamma float64
			for i := c; i < 30; i += 3 {
				lambda += g[i] * gain[c] * z[i] / gain[c] / 10
				gamma += z[i] * z[i] / gain[c] / gain[c] / 10
			}
			if d := math.Abs(p.state["nu"][c] - lambda/gamma); d > 1e-4 {
				t.Errorf("%s: ν[%d] differs from Λ/Γ by %g", scale, c, d)
			}
		}
		near(t, "dx", got.dx, v.step(x, dy, nil).dx, 1e-4)
	}
}

func TestPNVGradientByFiniteDifferences(t *testing.T) {
	for name, op := range map[string]norm.PowerNorm{
		"plain":   {BatchOnly: true, NoGroupScaling: true},
		"grouped": {BatchOnly: true, Groups: 2},
	} {
		for _, masked := range []bool{false, true} {
			x, dy := nn.Float64s(draw(5, 1, 4, 6)), draw(6, 1, 4, 6)
			var mask *tensors.Tensor
			if masked {
				mask = fixture.Tensor([]float64{1, 1, 0, 1}, dtypes.Float64, 4)
			}
			p := newPower(t, op, 6)
			p.gain = []float64{1, -.5, 2, .3, 1.5, 1}
			at := func(i int, d float64) (loss float64) {
				v := slices.Clone(x)
				v[i] += d
				for j, y := range p.step(fixture.Tensor(v, dtypes.Float64, 4, 6), dy, mask).y {
					loss += y * nn.Float64s(dy)[j]
				}
				return loss
			}
			got := p.step(fixture.Tensor(x, dtypes.Float64, 4, 6), dy, mask).dx
			for i := range x {
				want := (at(i, 1e-5) - at(i, -1e-5)) / 2e-5
				if math.Abs(got[i]-want) > 1e-3*max(1e-3, math.Abs(want)) {
					t.Errorf("%s, masked %t: dx[%d] = %g, finite difference %g", name, masked, i, got[i], want)
				}
			}
		}
	}
}

// Without ν and with the batch's own statistic, PowerNorm's gradient is that of dividing by a constant, through GroupScale.
func TestPowerNormGradientThroughGroupScale(t *testing.T) {
	x, dy := nn.Float64s(draw(7, 1, 3, 4)), draw(8, 1, 3, 4)
	op := norm.PowerNorm{Groups: 2, NoWarmup: true, NoCorrection: true, BackwardScale: norm.RunningScale}
	loss := func(v []float64) (sum float64) { // ψ² is 1 on the first step: a constant
		for i, y := range newPower(t, op, 4).step(fixture.Tensor(v, dtypes.Float64, 3, 4), dy, nil).y {
			sum += y * nn.Float64s(dy)[i]
		}
		return sum
	}
	p := newPower(t, op, 4)
	got := p.step(fixture.Tensor(x, dtypes.Float64, 3, 4), dy, nil).dx
	for i := range x {
		at := func(d float64) float64 { v := slices.Clone(x); v[i] += d; return loss(v) }
		want := (at(1e-5) - at(-1e-5)) / 2e-5
		if math.Abs(got[i]-want) > 1e-3*max(1e-3, math.Abs(want)) {
			t.Errorf("dx[%d] = %g, finite difference %g", i, got[i], want)
		}
	}
	near(t, "ν without correction", p.state["nu"], make([]float64, 4), 0)
}

func TestPowerNormWarmupStartsAtTheBatch(t *testing.T) {
	x := nn.Float64s(draw(1, 3, 8, 2))
	p := newPower(t, norm.PowerNorm{Warmup: 2, NoGroupScaling: true}, 2)
	p.step(fixture.Tensor(x, dtypes.Float64, 8, 2), draw(2, 1, 8, 2), nil)
	want := make([]float64, 2)
	for i, v := range x {
		want[i%2] += v * v / 8
	}
	near(t, "ψ²", p.state["phi"], want, 1e-14)
	if p.state["count"][0] != 1 {
		t.Errorf("count is %g after one step", p.state["count"][0])
	}
}

func TestPowerNormIgnoresScaleInTheLimit(t *testing.T) {
	x, dy := nn.Float64s(draw(1, 1, 6, 3)), draw(2, 1, 6, 3)
	run := func(c float64) (y, phi []float64) {
		p := newPower(t, norm.PowerNorm{NoWarmup: true, NoGroupScaling: true, Eps: 1e-12}, 3)
		v := make([]float64, len(x))
		for i := range v {
			v[i] = c * x[i]
		}
		for range 300 {
			y = p.step(fixture.Tensor(v, dtypes.Float64, 6, 3), dy, nil).y
		}
		return y, p.state["phi"]
	}
	y, phi := run(1)
	y5, phi5 := run(5)
	for i := range phi {
		phi[i] *= 25
	}
	near(t, "ψ² of 5x", phi5, phi, 1e-6)
	near(t, "y of 5x", y5, y, 1e-6)
}

// A mask leaves tokens out of ψ_B², whatever they hold.
func TestPowerNormMask(t *testing.T) {
	for _, op := range []norm.PowerNorm{{Warmup: 5}, {BatchOnly: true}, {NoWarmup: true, NoGroupScaling: true}} {
		valid := nn.Float64s(draw(1, 1, 4, 3))
		short := newPower(t, op, 3)
		a := short.step(fixture.Tensor(valid, dtypes.Float64, 1, 4, 3), draw(2, 1, 1, 4, 3), nil)
		long := newPower(t, op, 3)
		dy := append(nn.Float64s(draw(2, 1, 1, 4, 3)), make([]float64, 6)...)
		padded := append(slices.Clone(valid), 1e3, -1e3, 5, 7, 1e4, 2)
		b := long.step(fixture.Tensor(padded, dtypes.Float64, 1, 6, 3), fixture.Tensor(dy, dtypes.Float64, 1, 6, 3), fixture.Tensor([]float64{1, 1, 1, 1, 0, 0}, dtypes.Float64, 1, 6))
		near(t, "ψ²", long.state["phi"], short.state["phi"], 1e-12)
		near(t, "y", b.y[:12], a.y, 1e-12)
		near(t, "dx", b.dx[:12], a.dx, 1e-12)

		before := slices.Clone(long.state["phi"])
		c := long.step(fixture.Tensor(padded, dtypes.Float64, 1, 6, 3), fixture.Tensor(dy, dtypes.Float64, 1, 6, 3), fixture.Tensor(make([]float64, 6), dtypes.Float64, 1, 6))
		near(t, "ψ² of no token", long.state["phi"], before, 0)
		for _, v := range append(c.y, c.dx...) {
			if math.IsNaN(v) || math.IsInf(v, 0) {
				t.Fatalf("%+v: no valid token gives %g", op, v)
			}
		}
	}
}

func TestPowerNormSkipsNonFinite(t *testing.T) {
	bad := func(v float64) *tensors.Tensor { return fixture.Tensor([]float64{1, v, 3, 4}, dtypes.Float64, 2, 2) }
	good, dy := draw(1, 1, 2, 2), draw(2, 1, 2, 2)
	for _, v := range []float64{math.NaN(), math.Inf(1), 1e200} { // the last one's square is infinite
		p := newPower(t, norm.PowerNorm{Warmup: 3, NoGroupScaling: true, SkipNonFinite: true}, 2)
		p.step(good, dy, nil)
		state := map[string][]float64{"phi": slices.Clone(p.state["phi"]), "nu": slices.Clone(p.state["nu"]), "count": slices.Clone(p.state["count"])}
		p.step(bad(v), dy, nil)
		for s, want := range state {
			near(t, s+" after a bad batch", p.state[s], want, 0)
		}
		if p.state["skipped"][0] != 1 {
			t.Errorf("%g: skipped is %g, want 1", v, p.state["skipped"][0])
		}
		p.step(good, bad(math.NaN()), nil) // a bad gradient spoils ν alone
		if p.state["skipped"][0] != 2 || p.state["count"][0] != 2 || math.IsNaN(p.state["nu"][0]+p.state["nu"][1]) {
			t.Errorf("after a bad gradient: %v", p.state)
		}
		open := newPower(t, norm.PowerNorm{Warmup: 3, NoGroupScaling: true}, 2)
		open.step(bad(v), dy, nil)
		if phi := open.state["phi"][1]; !math.IsNaN(phi) && !math.IsInf(phi, 0) {
			t.Errorf("%g: without SkipNonFinite ψ² is %g: the failure is hidden", v, phi)
		}
	}
}

func TestPowerNormOfOneTokenAndOneChannel(t *testing.T) {
	p := newPower(t, norm.PowerNorm{Groups: 1, NoGroupScaling: true, Warmup: 1}, 1)
	x := fixture.Tensor([]float64{3}, dtypes.Float64, 1, 1)
	if y := p.step(x, x, nil).y[0]; math.Abs(y-1) > 1e-5 {
		t.Errorf("y = %g, want 1", y)
	}
	near(t, "ψ²", p.state["phi"], []float64{.9 + .1*9}, 1e-12)
	if s := p.step(x, x, nil); math.IsNaN(s.y[0] + s.dx[0]) {
		t.Error("one token is not a number")
	}
}

func TestPowerNormRefusals(t *testing.T) {
	f32 := func(d ...int) shapes.Shape { return shapes.Make(dtypes.Float32, d...) }
	for name, c := range map[string]struct {
		op   norm.PowerNorm
		x    shapes.Shape
		mask []int
		says string
	}{
		"forward weight":  {norm.PowerNorm{AlphaForward: 1}, f32(2, 4), nil, "[0, 1)"},
		"backward weight": {norm.PowerNorm{AlphaBackward: -.1}, f32(2, 4), nil, "[0, 1)"},
		"weight nan":      {norm.PowerNorm{AlphaBackward: math.NaN()}, f32(2, 4), nil, "[0, 1)"},
		"eps":             {norm.PowerNorm{Eps: -1e-5}, f32(2, 4), nil, "eps"},
		"eps nan":         {norm.PowerNorm{Eps: math.NaN()}, f32(2, 4), nil, "eps"},
		"groups":          {norm.PowerNorm{Groups: 3}, f32(2, 4), nil, "3 groups do not divide 4"},
		"negative groups": {norm.PowerNorm{Groups: -1}, f32(2, 4), nil, "groups"},
		"warm-up":         {norm.PowerNorm{Warmup: -1}, f32(2, 4), nil, "warm-up"},
		"scale":           {norm.PowerNorm{BackwardScale: 2}, f32(2, 4), nil, "BatchScale"},
		"integers":        {norm.PowerNorm{}, shapes.Make(dtypes.Int32, 2, 4), nil, "floating"},
		"no channels":     {norm.PowerNorm{}, f32(2, 0), nil, "floating"},
		"vector":          {norm.PowerNorm{}, f32(4), nil, "channels"},
		"no tokens":       {norm.PowerNorm{}, f32(0, 4), nil, "no tokens"},
		"mask":            {norm.PowerNorm{}, f32(2, 3, 4), []int{3, 2}, "mask"},
		"mask rank":       {norm.PowerNorm{}, f32(2, 3, 4), []int{2}, "mask"},
	} {
		b := nn.NewBuilder(1)
		in := []string{b.Input("x", c.x)}
		if c.mask != nil {
			in = append(in, b.Input("mask", f32(c.mask...)))
		}
		b.Add("pn", c.op, in...)
		if err := b.Err(); err == nil || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), `"pn"`) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// powerNet is a small network with PowerNorms in pre-norm places, trained a little so that the statistics are its own.
func powerNet(t *testing.T, op norm.PowerNorm) (*nn.Network, *tensors.Tensor) {
	t.Helper()
	b := nn.NewBuilder(3)
	x := b.Add("in", nn.Dense{Out: 8}, b.Input("x", shapes.Make(dtypes.Float32, 1, 5, 6)))
	h := b.Add("norm1", op, x)
	h = b.Add("up", nn.Mul, b.Add("fc1", nn.Dense{Out: 8}, h), b.Add("fc2", nn.Dense{Out: 8, NoBias: true}, h))
	x = b.Add("res", nn.Add, x, h)
	n, err := b.Finish(b.Add("head", nn.Dense{Out: 3}, b.Add("norm2", op, x)))
	if err != nil {
		t.Fatal(err)
	}
	batch := tensors.FromFlatDataAndDimensions(nn.Floats(draw(1, 1, 4, 5, 6)), 4, 5, 6)
	tr, err := learn.NewTrainer(enginetest.Backend(), &n.Params, func(env *nn.Env, in []*graph.Node) *graph.Node {
		y := n.Lower(env, map[string]*graph.Node{"x": in[0]})[0]
		return learn.MSE(y, graph.SliceAxis(in[0], -1, graph.AxisRange(0, 3)))
	}, learn.Options{LR: 1e-2})
	if err != nil {
		t.Fatal(err)
	}
	defer tr.Finalize()
	first, last := 0., 0.
	for i := range 20 {
		info, err := tr.Step(batch)
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			first = info.Loss
		}
		last = info.Loss
	}
	if !(last < first) {
		t.Errorf("training does not lower the loss: %g, then %g", first, last)
	}
	return n, batch
}

func run(t *testing.T, n *nn.Network, x *tensors.Tensor) []float64 {
	t.Helper()
	out, err := n.Run(enginetest.Backend(), []*tensors.Tensor{x})
	if err != nil {
		t.Fatal(err)
	}
	return nn.Float64s(out[0])
}

// The trainer moves ψ², ν (inside the gradient) and the count once per step.
func TestPowerNormStateMovesInTraining(t *testing.T) {
	n, _ := powerNet(t, norm.PowerNorm{Warmup: 4})
	for _, name := range []string{"norm1", "norm2"} {
		if c := n.Params.Get(name + ".count").Data()[0]; c != 20 {
			t.Errorf("%s: count %g after 20 steps", name, c)
		}
		for s, initial := range map[string]float32{"phi": 1, "nu": 0} {
			if slices.Contains(n.Params.Get(name+"."+s).Data(), initial) {
				t.Errorf("%s: %s stood still in a channel", name, s)
			}
		}
		if n.Params.Get(name+".phi").Role != nn.State {
			t.Errorf("%s: ψ² is not state", name)
		}
	}
}

func TestFoldedPowerNormKeepsTheFunction(t *testing.T) {
	n, x := powerNet(t, norm.PowerNorm{NoGroupScaling: true, Warmup: 4})
	want := run(t, n, x)
	r, err := fold.Norms(n)
	if err != nil || len(r.Folded) != 2 {
		t.Fatalf("folded %v: %v", r, err)
	}
	for _, x := range n.Nodes {
		if _, ok := x.Op.(norm.PowerNorm); ok {
			t.Errorf("%s is still there", x.Name)
		}
	}
	if n.Params.Get("norm1.phi") != nil {
		t.Error("folding left state behind")
	}
	near(t, "folded", run(t, n, x), want, 1e-5)
}

func TestGroupScalingIsNotFolded(t *testing.T) {
	n, x := powerNet(t, norm.PowerNorm{})
	want := run(t, n, x)
	r, err := fold.Norms(n)
	if err != nil || len(r.Folded) != 0 || len(r.Kept) != 2 || !strings.Contains(r.Kept[0].Reason, "NoGroupScaling") {
		t.Errorf("%v, %v", r, err)
	}
	near(t, "kept", run(t, n, x), want, 0)
}

// What is written to a file computes the same: the graph in safetensors, standard operators in ONNX.
func TestPowerNormTravelsInFiles(t *testing.T) {
	dir := t.TempDir()
	for name, op := range map[string]norm.PowerNorm{
		"groups":  {Groups: 2, Warmup: 4, BackwardScale: norm.RunningScale},
		"group":   {Warmup: 4, SkipNonFinite: true},
		"plain":   {NoGroupScaling: true, NoWarmup: true},
		"pn-v":    {BatchOnly: true},
		"no-bias": {Warmup: 3, ZeroForward: true},
	} {
		n, x := powerNet(t, op)
		want := run(t, n, x)
		path := filepath.Join(dir, name+".safetensors")
		if err := safetensors.WriteNetwork(path, n); err != nil {
			t.Fatal(err)
		}
		got, err := safetensors.ReadNetwork(path, norm.PowerNorm{})
		if err != nil {
			t.Fatal(err)
		}
		if got.Node("norm1").Op != nn.Op(op) {
			t.Errorf("%s: read as %+v", name, got.Node("norm1").Op)
		}
		near(t, name+" from safetensors", run(t, got, x), want, 0)
		for _, opset := range []int{17, 21} {
			path = filepath.Join(dir, name+".onnx")
			if err := onnx.WriteFile(path, n, onnx.WriteOptions{Opset: opset}); err != nil {
				t.Fatalf("%s, operator set %d: %v", name, opset, err)
			}
			back, err := onnx.ReadFile(path, onnx.Options{})
			if err != nil {
				t.Fatalf("%s, operator set %d: %v", name, opset, err)
			}
			near(t, name+" from ONNX", run(t, back, x), want, 1e-5)
		}
	}
}

func TestPowerNormInHalfPrecisionKeepsItsState(t *testing.T) {
	p := newPower(t, norm.PowerNorm{NoWarmup: true}, 4)
	out := call(t, func(in []*graph.Node) []*graph.Node {
		x := graph.ConvertDType(in[0], dtypes.BFloat16)
		half := func(v *graph.Node) *graph.Node { return graph.ConvertDType(v, dtypes.BFloat16) }
		state := map[string]*graph.Node{"phi": in[1], "nu": in[2], "count": in[3]}
		y := p.lower(x, nil, half(in[1]), half(in[2]), state, true)
		if y.DType() != dtypes.BFloat16 {
			t.Errorf("y is %s", y.DType())
		}
		return []*graph.Node{state["count"], state["phi"]}
	}, [][]float32{{1, 2, 3, 4}, {-1, 0, 1, 2}}, []float32{1, 1, 1, 1}, make([]float32, 4), float32(1000))
	if got := nn.Floats(out[0])[0]; got != 1001 {
		t.Errorf("count is %g, want 1001: bfloat16 cannot count", got)
	}
}

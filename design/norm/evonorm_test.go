package norm_test

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/design/norm"
	"github.com/lathe-ml/lathe/internal/fixture"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/internal/search"
	"github.com/lathe-ml/lathe/nn"
)

// lowered runs an op on float64 values: x, then the named parameters. It returns what f makes of the output, the inputs
// and the updated state.
func lowered(t *testing.T, op nn.Op, training bool, args []*tensors.Tensor, locals []string, f func(y *graph.Node, in []*graph.Node, state map[string]*graph.Node) []*graph.Node) []*tensors.Tensor {
	t.Helper()
	var in []any
	for _, a := range args {
		in = append(in, a)
	}
	return call(t, func(in []*graph.Node) []*graph.Node {
		cur, state := map[string]*graph.Node{}, map[string]*graph.Node{}
		node := &nn.Node{Name: "evo", Op: op, P: map[string]string{}}
		for i, l := range locals {
			cur[l], state[l], node.P[l] = in[i+1], in[i+1], l
		}
		env := &nn.Env{
			G: in[0].Graph(), Training: training, DType: in[0].DType(), Param: func(s string) *graph.Node { return cur[s] },
			Update: func(s string, v *graph.Node) { state[s] = v },
		}
		return f(op.Lower(&nn.Ctx{Env: env, Node: node}, in[:1])[0], in, state)
	}, in...)
}

func TestFixturesEvoNorm(t *testing.T) {
	fixture.Run(t, 16, map[string]fixture.Func{
		"evonorm": func(t *testing.T, c *fixture.Case) map[string]any {
			op := norm.EvoNorm{
				Layer: norm.EvoLayer(c.Params["kind"].String()), Groups: c.Params["groups"].Int(), Eps: c.Params["eps"].Float(),
				Decay: c.Params["decay"].Float(), Linear: !c.Params["nonlinearity"].Bool(),
			}
			var args []*tensors.Tensor
			for _, name := range []string{"x", "gamma", "beta", "v", "running_var", "dy"} {
				args = append(args, c.Inputs[name].Tensor(dtypes.Float64))
			}
			out := lowered(t, op, c.Params["train"].Bool(), args, []string{"w", "b", "v", "var", "dy"}, func(y *graph.Node, in []*graph.Node, state map[string]*graph.Node) []*graph.Node {
				return append(graph.Gradient(graph.ReduceAllSum(graph.Mul(y, in[5])), in[:4]...), y, state["var"])
			})
			return map[string]any{"dx": out[0], "dgamma": out[1], "dbeta": out[2], "dv": out[3], "y": out[4], "new_running_var": out[5]}
		},
		"layer_graph": func(t *testing.T, c *fixture.Case) map[string]any {
			var l norm.LayerGraph
			if err := c.Params["nodes"].Decode(&l.Nodes); err != nil {
				t.Fatal(err)
			}
			op, err := l.Build(norm.EvoOptions{Groups: c.Params["groups"].Int(), Eps: c.Params["eps"].Float()})
			if err != nil {
				t.Fatal(err)
			}
			return map[string]any{"y": runGraph(t, op, true, c.Inputs["x"].Tensor(dtypes.Float64), c.Inputs["v0"].Floats(), c.Inputs["v1"].Floats())}
		},
		"pareto_front": func(_ *testing.T, c *fixture.Case) map[string]any {
			scores := c.Inputs["scores"].Rows()
			return map[string]any{"front_indices": search.ParetoFront(scores), "best_average": search.BestAverage(scores)}
		},
	})
}

// runGraph runs a layer graph with the given per-channel values, unit gain, no bias and fresh running values.
func runGraph(t *testing.T, op nn.Norm, training bool, x *tensors.Tensor, v0, v1 []float64) *tensors.Tensor {
	t.Helper()
	dims := x.Shape().Dimensions
	args, locals := []*tensors.Tensor{x}, []string{}
	for _, s := range op.Params([]shapes.Shape{shapes.Make(dtypes.Float32, dims...)}) {
		d := make([]float64, s.Shape.Size())
		switch s.Name {
		case "v0":
			copy(d, v0)
		case "v1":
			copy(d, v1)
		default:
			d32 := make([]float32, len(d))
			if s.Init != nil {
				s.Init(nil, d32)
			}
			for i, v := range d32 {
				d[i] = float64(v)
			}
		}
		args, locals = append(args, fixture.Tensor(d, x.DType(), s.Shape.Dimensions...)), append(locals, s.Name)
	}
	return lowered(t, op, training, args, locals, func(y *graph.Node, _ []*graph.Node, _ map[string]*graph.Node) []*graph.Node {
		return []*graph.Node{y}
	})[0]
}

// evoMaps are random maps of type float64 with other means and deviations per channel.
func evoMaps(seed uint64, b, h, w, c int) *tensors.Tensor {
	r := rng.New(seed, "maps")
	d := make([]float64, b*h*w*c)
	for i := range d {
		d[i] = r.NormFloat64()*(1+.3*float64(i%c)) + .5*float64(i%c) - .7
	}
	return fixture.Tensor(d, dtypes.Float64, b, h, w, c)
}

func scaledMaps(x *tensors.Tensor, f float64) *tensors.Tensor {
	d := nn.Float64s(x)
	for i := range d {
		d[i] *= f
	}
	return fixture.Tensor(d, dtypes.Float64, x.Shape().Dimensions...)
}

// evo runs one of the six layers with unit gain, no bias, and given v and running variance (nil: 1).
func evo(t *testing.T, d norm.EvoNorm, training bool, x *tensors.Tensor, v, variance []float64) []float64 {
	t.Helper()
	c := x.Shape().Dimensions[3]
	fill := func(d []float64, value float64) *tensors.Tensor {
		if d == nil {
			d = slices.Repeat([]float64{value}, c)
		}
		return fixture.Tensor(d, x.DType(), c)
	}
	return nn.Float64s(lowered(t, d, training, []*tensors.Tensor{x, fill(nil, 1), fill(nil, 0), fill(v, 1), fill(variance, 1)}, []string{"w", "b", "v", "var"},
		func(y *graph.Node, _ []*graph.Node, _ map[string]*graph.Node) []*graph.Node { return []*graph.Node{y} })[0])
}

func furthest(a, b []float64) (d float64) {
	for i := range a {
		d = max(d, math.Abs(a[i]-b[i])/max(1, math.Abs(b[i])))
	}
	return d
}

// channelVariance is the biased variance of every channel.
func channelVariance(x *tensors.Tensor) []float64 {
	d, c := nn.Float64s(x), x.Shape().Dimensions[3]
	mean, v := make([]float64, c), make([]float64, c)
	n := float64(len(d) / c)
	for i, y := range d {
		mean[i%c] += y / n
	}
	for i, y := range d {
		v[i%c] += (y - mean[i%c]) * (y - mean[i%c]) / n
	}
	return v
}

func TestBLayersOfOneCaseUseItsOwnVariance(t *testing.T) {
	one := evoMaps(1, 1, 4, 5, 6)
	variance := channelVariance(one)
	for _, l := range []norm.EvoLayer{norm.B0, norm.B1, norm.B2} {
		if d := furthest(evo(t, norm.EvoNorm{Layer: l}, true, one, nil, nil), evo(t, norm.EvoNorm{Layer: l}, false, one, nil, variance)); d > 1e-6 {
			t.Errorf("%s, one case: training and inference with its variance differ by %g", l, d)
		}
		batch := evoMaps(2, 3, 4, 5, 6)
		if d := furthest(evo(t, norm.EvoNorm{Layer: l}, true, batch, nil, nil), evo(t, norm.EvoNorm{Layer: l}, false, batch, nil, channelVariance(batch))); d > 1e-6 {
			t.Errorf("%s, batch: training and inference with its variance differ by %g", l, d)
		}
	}
	// With one case s²_bwh is s²_wh, so B0 is x / (max(0, v·x) + √(s²+ε)).
	x, c := nn.Float64s(one), 6
	want := make([]float64, len(x))
	for i, v := range x {
		want[i] = v / (max(0, v) + math.Sqrt(variance[i%c]+1e-5))
	}
	if d := furthest(evo(t, norm.EvoNorm{}, true, one, nil, nil), want); d > 1e-6 {
		t.Errorf("B0 of one case is off by %g", d)
	}
}

func TestSLayersTreatEveryCaseAlone(t *testing.T) {
	for _, l := range []norm.EvoLayer{norm.S0, norm.S1, norm.S2} {
		d := norm.EvoNorm{Layer: l, Groups: 2}
		x := evoMaps(3, 4, 3, 3, 6)
		train := evo(t, d, true, x, nil, nil)
		if !slices.Equal(train, evo(t, d, false, x, nil, []float64{9, 9, 9, 9, 9, 9})) {
			t.Errorf("%s: training and inference differ", l)
		}
		other := nn.Float64s(x)
		for i := len(other) / 2; i < len(other); i++ {
			other[i] = 7 - other[i]
		}
		if got := evo(t, d, true, fixture.Tensor(other, dtypes.Float64, 4, 3, 3, 6), nil, nil); !slices.Equal(got[:len(got)/2], train[:len(got)/2]) {
			t.Errorf("%s: cases see each other", l)
		}
	}
}

func TestEvoNormScales(t *testing.T) {
	x := evoMaps(4, 3, 5, 5, 4)
	const f = 3.5
	if d := furthest(evo(t, norm.EvoNorm{}, true, scaledMaps(x, f), nil, nil), evo(t, norm.EvoNorm{}, true, x, nil, nil)); d > 1e-4 {
		t.Errorf("B0 notices the scale of its input: %g", d)
	}
	s0 := norm.EvoNorm{Layer: norm.S0, Groups: 2}
	if d := furthest(evo(t, s0, true, scaledMaps(x, f), nil, nil), evo(t, s0, true, x, []float64{f, f, f, f}, nil)); d > 1e-4 {
		t.Errorf("S0: scaling x is not scaling v: %g", d)
	}
}

func TestEvoNormOfAConstantMap(t *testing.T) {
	const c, eps = .8, 1e-5
	x := fixture.Tensor(slices.Repeat([]float64{c}, 2*3*3*4), dtypes.Float64, 2, 3, 3, 4)
	for _, k := range []struct {
		layer norm.EvoLayer
		want  float64
	}{{norm.B0, c / (c + math.Sqrt(eps))}, {norm.S0, c / (1 + math.Exp(-c)) / math.Sqrt(eps)}} {
		for _, got := range evo(t, norm.EvoNorm{Layer: k.layer}, true, x, nil, nil) {
			if math.Abs(got-k.want) > 1e-6*k.want {
				t.Fatalf("%s: got %g, want %g", k.layer, got, k.want)
			}
		}
	}
}

func TestLinearSlotIsGainAndBias(t *testing.T) {
	g, err := norm.GraphOf("bn-relu")
	if err != nil {
		t.Fatal(err)
	}
	built, err := g.Build(norm.EvoOptions{})
	if err != nil {
		t.Fatal(err)
	}
	x := evoMaps(5, 2, 3, 3, 4)
	gain, bias := []float64{2, -1, 0, 3}, []float64{.5, 0, 1, -2}
	for _, d := range []nn.Norm{norm.EvoNorm{}.AsLinear(), norm.EvoNorm{Layer: norm.S0, Linear: true}, built.(norm.GraphNorm).AsLinear()} {
		if n := len(d.Params([]shapes.Shape{shapes.Make(dtypes.Float32, 2, 3, 3, 4)})); n != 2 {
			t.Errorf("%s: %d parameters", d.Kind(), n)
		}
		got := nn.Float64s(lowered(t, d, true, []*tensors.Tensor{x, fixture.Tensor(gain, dtypes.Float64, 4), fixture.Tensor(bias, dtypes.Float64, 4)}, []string{"w", "b"},
			func(y *graph.Node, _ []*graph.Node, _ map[string]*graph.Node) []*graph.Node { return []*graph.Node{y} })[0])
		for i, v := range nn.Float64s(x) {
			if got[i] != v*gain[i%4]+bias[i%4] {
				t.Fatalf("%s: [%d] = %g", d.Kind(), i, got[i])
			}
		}
	}
	zero := norm.EvoNorm{ZeroGain: true}
	in := []shapes.Shape{shapes.Make(dtypes.Float32, 2, 3, 3, 4)}
	for want, d := range map[float32]nn.Norm{0: zero.AsLinear(), 1: zero} {
		v := []float32{9}
		d.Params(in)[0].Init(nil, v)
		if v[0] != want {
			t.Errorf("linear %v: the gain starts at %g", want == 0, v[0])
		}
	}
}

func TestEvoNormGradientsAreRight(t *testing.T) {
	for _, l := range norm.EvoLayers() {
		d := norm.EvoNorm{Layer: l, Groups: 2}
		x := evoMaps(6, 2, 3, 2, 4)
		loss := func(x *tensors.Tensor, grad bool) []*tensors.Tensor {
			ones := func(v float64) *tensors.Tensor {
				return fixture.Tensor([]float64{v, v + .1, v + .2, v + .3}, dtypes.Float64, 4)
			}
			return lowered(t, d, true, []*tensors.Tensor{x, ones(1), ones(.1), ones(.7), ones(1)}, []string{"w", "b", "v", "var"}, func(y *graph.Node, in []*graph.Node, _ map[string]*graph.Node) []*graph.Node {
				s := graph.ReduceAllSum(graph.Mul(y, graph.Sin(graph.Iota(y.Graph(), y.Shape(), 1))))
				s = graph.Add(s, graph.ReduceAllSum(graph.Mul(graph.Mul(y, y), graph.Cos(graph.Iota(y.Graph(), y.Shape(), 2)))))
				if grad {
					return graph.Gradient(s, in[0])
				}
				return []*graph.Node{s}
			})
		}
		got, data := nn.Float64s(loss(x, true)[0]), nn.Float64s(x)
		for _, i := range []int{0, 5, 17, 30, 47} {
			at := func(h float64) float64 {
				e := slices.Clone(data)
				e[i] += h
				return nn.Float64s(loss(fixture.Tensor(e, dtypes.Float64, 2, 3, 2, 4), false)[0])[0]
			}
			if num := (at(1e-6) - at(-1e-6)) / 2e-6; math.Abs(got[i]-num) > 1e-3*max(1, math.Abs(num)) {
				t.Errorf("%s: ∂/∂x[%d] = %g, finite difference %g", l, i, got[i], num)
			}
		}
	}
}

func TestEvoNormRefusals(t *testing.T) {
	f32 := func(d ...int) shapes.Shape { return shapes.Make(dtypes.Float32, d...) }
	for name, c := range map[string]struct {
		s    shapes.Shape
		op   norm.EvoNorm
		want string
	}{
		"rank":     {f32(2, 3, 4), norm.EvoNorm{}, "maps"},
		"channels": {f32(2, 3, 3, 0), norm.EvoNorm{}, "maps"},
		"integers": {shapes.Make(dtypes.Int32, 2, 3, 3, 4), norm.EvoNorm{}, "floating"},
		"groups":   {f32(2, 3, 3, 4), norm.EvoNorm{Layer: norm.S0, Groups: -1}, "groups"},
		"eps":      {f32(2, 3, 3, 4), norm.EvoNorm{Eps: -1e-5}, "eps"},
		"nan eps":  {f32(2, 3, 3, 4), norm.EvoNorm{Eps: math.NaN()}, "eps"},
		"decay":    {f32(2, 3, 3, 4), norm.EvoNorm{Decay: 1}, "decay"},
		"negative": {f32(2, 3, 3, 4), norm.EvoNorm{Decay: -.1}, "decay"},
		"layer":    {f32(2, 3, 3, 4), norm.EvoNorm{Layer: "c0"}, "c0"},
	} {
		b := nn.NewBuilder(1)
		b.Add("evo", c.op, b.Input("x", c.s))
		if err := b.Err(); err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), `"evo"`) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func TestEvoNormOfTinyMaps(t *testing.T) {
	for _, l := range norm.EvoLayers() {
		for _, training := range []bool{true, false} {
			for _, x := range []*tensors.Tensor{evoMaps(7, 1, 1, 1, 3), evoMaps(7, 5, 1, 1, 3), evoMaps(7, 1, 1, 1, 1)} {
				if y := evo(t, norm.EvoNorm{Layer: l}, training, x, nil, nil); slices.ContainsFunc(y, func(v float64) bool { return math.IsNaN(v) || math.IsInf(v, 0) }) {
					t.Errorf("%s of %s (training %v) is %v", l, x.Shape(), training, y)
				}
			}
		}
	}
}

func TestHalfPrecisionMapsKeepTheirStatistics(t *testing.T) {
	x := fixture.Tensor([]float64{256, 258, 260, 262}, dtypes.Float32, 1, 4, 1, 1)
	one, zero := fixture.Tensor([]float64{1}, dtypes.Float32, 1), fixture.Tensor([]float64{0}, dtypes.Float32, 1)
	out := call(t, func(in []*graph.Node) []*graph.Node {
		cur := map[string]*graph.Node{"w": in[1], "b": in[2], "v": in[1]}
		op := norm.EvoNorm{Layer: norm.S0}
		env := &nn.Env{G: in[0].Graph(), Training: true, DType: dtypes.BFloat16, Param: func(s string) *graph.Node { return cur[s] }}
		y := op.Lower(&nn.Ctx{Env: env, Node: &nn.Node{Op: op, P: map[string]string{"w": "w", "b": "b", "v": "v"}}}, []*graph.Node{graph.ConvertDType(in[0], dtypes.BFloat16)})[0]
		if y.DType() != dtypes.BFloat16 {
			panic(fmt.Errorf("the output is %s", y.Shape()))
		}
		return []*graph.Node{graph.ConvertDType(y, dtypes.Float32)}
	}, x, one, zero)
	for i, v := range nn.Float64s(out[0]) {
		if want := (256 + 2*float64(i)) / math.Sqrt(5); math.Abs(v-want) > .01*want {
			t.Errorf("[%d] = %g, want %g", i, v, want)
		}
	}
}

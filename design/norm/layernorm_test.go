package norm_test

import (
	"math"
	"slices"
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
)

func call(t *testing.T, f func(in []*graph.Node) []*graph.Node, args ...any) []*tensors.Tensor {
	t.Helper()
	e, err := engine.NewExec(enginetest.Backend(), f)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Finalize()
	out, err := e.Call(args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// recurrent runs an op on a fixture: sequences are [T,B,...] and matrices [in, out] there.
func recurrent(t *testing.T, c *fixture.Case, op nn.Op, params map[string]string) []*tensors.Tensor {
	t.Helper()
	var args []any
	locals := []string{}
	for local, name := range params {
		v := c.Inputs[name]
		data, shape := v.Floats(), v.Shape
		if len(shape) == 2 { // [in, out] -> [out, in]
			tr := make([]float64, len(data))
			for i := range shape[0] {
				for j := range shape[1] {
					tr[j*shape[0]+i] = data[i*shape[1]+j]
				}
			}
			data, shape = tr, []int{shape[1], shape[0]}
		}
		locals = append(locals, local)
		args = append(args, fixture.Tensor(data, dtypes.Float64, shape...))
	}
	inputs := []string{"x", "mask", "h0"}
	if _, ok := op.(nn.LSTM); ok {
		inputs = append(inputs, "c0")
	}
	for _, name := range inputs {
		args = append(args, c.Inputs[name].Tensor(dtypes.Float64))
	}
	return call(t, func(in []*graph.Node) []*graph.Node {
		cur := map[string]*graph.Node{}
		node := &nn.Node{Name: "rnn", Op: op, P: map[string]string{}}
		for i, l := range locals {
			cur[l], node.P[l] = in[i], l
		}
		x := in[len(locals):]
		x[0], x[1] = graph.TransposeAllAxes(x[0], 1, 0, 2), graph.TransposeAllAxes(x[1], 1, 0)
		out := op.Lower(&nn.Ctx{Env: &nn.Env{G: x[0].Graph(), DType: dtypes.Float64, Param: func(s string) *graph.Node { return cur[s] }}, Node: node}, x)
		for i := range out {
			out[i] = graph.TransposeAllAxes(out[i], 1, 0, 2)
		}
		return out
	}, args...)
}

func TestFixtures(t *testing.T) {
	fixture.Run(t, 42, map[string]fixture.Func{
		"layer_norm": func(t *testing.T, c *fixture.Case) map[string]any {
			out := call(t, func(in []*graph.Node) []*graph.Node {
				y := norm.LayerNorm(in[0], in[1], in[2], norm.LayerNormOptions{Eps: c.Params["eps"].Float(), ZeroEps: true})
				return append([]*graph.Node{y}, graph.Gradient(graph.ReduceAllSum(graph.Mul(y, in[3])), in[:3]...)...)
			}, c.Inputs["x"].Tensor(dtypes.Float64), c.Inputs["gain"].Tensor(dtypes.Float64), c.Inputs["bias"].Tensor(dtypes.Float64), c.Inputs["dy"].Tensor(dtypes.Float64))
			return map[string]any{"y": out[0], "dx": out[1], "dgain": out[2], "dbias": out[3]}
		},
		"ln_lstm": func(t *testing.T, c *fixture.Case) map[string]any {
			n := nn.FullNorm
			n.Eps = c.Params["eps"].Float()
			out := recurrent(t, c, nn.LSTM{Hidden: c.Inputs["h0"].Shape[1], Norm: n}, map[string]string{
				"w": "W", "u": "U", "b": "b", "gx": "gain_x", "bx": "bias_x", "gh": "gain_h", "bh": "bias_h", "gc": "gain_c", "bc": "bias_c",
			})
			return map[string]any{"h": out[0], "c": out[1]}
		},
		"ln_gru": func(t *testing.T, c *fixture.Case) map[string]any {
			n := nn.FullNorm
			n.Eps = c.Params["eps"].Float()
			out := recurrent(t, c, nn.GRU{Hidden: c.Inputs["h0"].Shape[1], Norm: n}, map[string]string{
				"w": "W", "u": "U", "b": "b", "wc": "Wc", "uc": "Uc", "bc": "bc", "gx": "gain_x", "bx": "bias_x", "gxc": "gain_xc", "bxc": "bias_xc",
				"gh": "gain_h", "bh": "bias_h", "ghc": "gain_hc", "bhc": "bias_hc",
			})
			return map[string]any{"h": out[0]}
		},
	})
}

func normal(seed uint64, rows, cols int) *tensors.Tensor {
	d := make([]float32, rows*cols)
	rng.Normal(rng.New(seed, "x"), d, 2)
	for i := range d {
		d[i] += 3
	}
	return tensors.FromFlatDataAndDimensions(d, rows, cols)
}

func layerNorm(t *testing.T, eps float64, x any) []float64 {
	t.Helper()
	return nn.Float64s(call(t, func(in []*graph.Node) []*graph.Node {
		return []*graph.Node{norm.LayerNorm(in[0], nil, nil, norm.LayerNormOptions{Eps: eps, ZeroEps: true})}
	}, x)[0])
}

func TestLayerNormWorkedValue(t *testing.T) {
	got := layerNorm(t, 0, [][]float64{{1, 2, 3, 4}})
	for i, want := range []float64{-1.341641, -.447214, .447214, 1.341641} {
		if math.Abs(got[i]-want) > 1e-6 {
			t.Errorf("[%d] = %g, want %g", i, got[i], want)
		}
	}
}

func TestLayerNormStandardises(t *testing.T) {
	x := normal(1, 6, 32)
	y := layerNorm(t, 1e-5, x)
	in := nn.Float64s(x)
	stats := func(r []float64) (mean, variance float64) {
		for _, v := range r {
			mean += v / float64(len(r))
		}
		for _, v := range r {
			variance += (v - mean) * (v - mean) / float64(len(r))
		}
		return mean, variance
	}
	for i := range 6 {
		m, v := stats(y[i*32 : (i+1)*32])
		_, vx := stats(in[i*32 : (i+1)*32])
		if math.Abs(m) > 1e-6 || math.Abs(v-vx/(vx+1e-5)) > 1e-5 {
			t.Errorf("row %d has mean %g and variance %g", i, m, v)
		}
	}
}

func TestLayerNormIgnoresScaleAndShiftOfARow(t *testing.T) {
	x := nn.Floats(normal(1, 4, 16))
	want := layerNorm(t, 1e-5, tensors.FromFlatDataAndDimensions(x, 4, 16))
	for _, a := range []float32{3, -2} {
		y := make([]float32, len(x))
		for i := range x {
			y[i] = a*x[i] + 5
		}
		for i, v := range layerNorm(t, 1e-5, tensors.FromFlatDataAndDimensions(y, 4, 16)) {
			if math.Abs(v-want[i]*math.Copysign(1, float64(a))) > 1e-4 {
				t.Fatalf("scaled by %g: [%d] = %g, want ±%g", a, i, v, want[i])
			}
		}
	}
}

// Table 1 of the paper for LN: the whole weight matrix scaled or re-centred changes nothing, one unit's weights scaled do.
func TestLayerNormInvariancesOfWeights(t *testing.T) {
	x, w := normal(1, 5, 8), nn.Floats(normal(2, 6, 8))
	eval := func(w []float32) []float64 {
		return nn.Float64s(call(t, func(in []*graph.Node) []*graph.Node {
			return []*graph.Node{norm.LayerNorm(graph.Dot(in[0], in[1]).General([]int{1}, nil, []int{1}, nil), nil, nil, norm.LayerNormOptions{})}
		}, x, tensors.FromFlatDataAndDimensions(w, 6, 8))[0])
	}
	want := eval(w)
	scaled, centred, one := slices.Clone(w), slices.Clone(w), slices.Clone(w)
	for i := range w {
		scaled[i] *= 2.5
		centred[i] += .3 * float32(i%8)
		if i < 8 {
			one[i] *= 2.5
		}
	}
	diff := func(a []float64) (d float64) {
		for i := range a {
			d = max(d, math.Abs(a[i]-want[i]))
		}
		return d
	}
	if d := diff(eval(scaled)); d > 1e-4 {
		t.Errorf("scaling the matrix changes the output by %g", d)
	}
	if d := diff(eval(centred)); d > 1e-4 {
		t.Errorf("re-centring the matrix changes the output by %g", d)
	}
	if d := diff(eval(one)); d < 1e-2 {
		t.Errorf("scaling one unit changes the output by only %g", d)
	}
}

// A row's output is the same bits alone and in a batch, in both modes: layer norm has no gap between them.
func TestLayerNormRowsAreIndependent(t *testing.T) {
	b := nn.NewBuilder(1)
	n, err := b.Finish(b.Add("norm", nn.LayerNorm{}, b.Input("x", shapes.Make(dtypes.Float32, 1, 24))))
	if err != nil {
		t.Fatal(err)
	}
	x := normal(3, 7, 24)
	for _, training := range []bool{false, true} {
		r, err := nn.NewRunner(enginetest.Backend(), n, nn.RunOptions{Training: training})
		if err != nil {
			t.Fatal(err)
		}
		all, err := r.Run(x)
		if err != nil {
			t.Fatal(err)
		}
		for i := range 7 {
			one, err := r.Run(tensors.FromFlatDataAndDimensions(nn.Floats(x)[i*24:(i+1)*24], 1, 24))
			if err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(nn.Floats(one[0]), nn.Floats(all[0])[i*24:(i+1)*24]) {
				t.Errorf("training=%v: row %d differs alone and in the batch", training, i)
			}
		}
	}
}

func TestLayerNormGradientIsOrthogonal(t *testing.T) {
	x, dy := normal(4, 5, 16), normal(5, 5, 16)
	out := call(t, func(in []*graph.Node) []*graph.Node {
		y := norm.LayerNorm(in[0], nil, nil, norm.LayerNormOptions{})
		return append(graph.Gradient(graph.ReduceAllSum(graph.Mul(y, in[1])), in[0]), y)
	}, x, dy)
	dx, y := nn.Float64s(out[0]), nn.Float64s(out[1])
	for i := range 5 {
		sum, dot := 0., 0.
		for j := range 16 {
			sum += dx[i*16+j]
			dot += dx[i*16+j] * y[i*16+j]
		}
		if math.Abs(sum) > 1e-5 || math.Abs(dot) > 1e-3 {
			t.Errorf("row %d: Σdx = %g, Σdx·x̂ = %g", i, sum, dot)
		}
	}
}

func TestConstantRowGivesTheBias(t *testing.T) {
	out := call(t, func(in []*graph.Node) []*graph.Node {
		return []*graph.Node{norm.LayerNorm(in[0], in[1], in[2], norm.LayerNormOptions{})}
	}, [][]float32{{4, 4, 4}}, []float32{2, 3, 4}, []float32{.1, .2, .3})
	if got := nn.Floats(out[0]); !slices.Equal(got, []float32{.1, .2, .3}) {
		t.Errorf("got %v", got)
	}
}

func TestOneElementBareFunction(t *testing.T) {
	out := call(t, func(in []*graph.Node) []*graph.Node {
		y := norm.LayerNorm(in[0], in[1], in[2], norm.LayerNormOptions{})
		return append([]*graph.Node{y}, graph.Gradient(graph.ReduceAllSum(y), in[0], in[1])...)
	}, [][]float32{{4}, {7}}, []float32{2}, []float32{.5})
	for i, want := range [][]float32{{.5, .5}, {0, 0}, {0}} {
		if !slices.Equal(nn.Floats(out[i]), want) {
			t.Errorf("output %d is %v, want %v", i, nn.Floats(out[i]), want)
		}
	}
}

// Single-pass variance would lose all digits here.
func TestLargeMeanKeepsItsDigits(t *testing.T) {
	got := layerNorm(t, 1e-12, [][]float32{{1e6, 1e6 + 1, 1e6 + 2, 1e6 + 3}})
	if math.Abs(got[0]+1.341641) > 1e-4 {
		t.Errorf("got %v", got)
	}
}

func TestHalfPrecisionUsesFloat32Statistics(t *testing.T) {
	out := call(t, func(in []*graph.Node) []*graph.Node {
		h := graph.ConvertDType(in[0], dtypes.BFloat16)
		return []*graph.Node{graph.ConvertDType(norm.LayerNorm(h, nil, nil, norm.LayerNormOptions{}), dtypes.Float32)}
	}, [][]float32{{256, 258, 260, 262}})
	if got := nn.Floats(out[0]); math.Abs(float64(got[0])+1.3416) > 5e-3 {
		t.Errorf("got %v", got)
	}
}

func TestLayerNormRefusals(t *testing.T) {
	f32 := func(d ...int) shapes.Shape { return shapes.Make(dtypes.Float32, d...) }
	for name, c := range map[string]struct {
		x, gain shapes.Shape
		o       norm.LayerNormOptions
	}{
		"negative eps":    {f32(2, 3), f32(3), norm.LayerNormOptions{Eps: -1}},
		"repeated axis":   {f32(2, 3), f32(3), norm.LayerNormOptions{Axes: []int{1, -1}}},
		"missing axis":    {f32(2, 3), f32(3), norm.LayerNormOptions{Axes: []int{2}}},
		"gain size":       {f32(2, 3), f32(4), norm.LayerNormOptions{}},
		"integers":        {shapes.Make(dtypes.Int32, 2, 3), f32(3), norm.LayerNormOptions{}},
		"nothing to norm": {f32(2, 0), f32(0), norm.LayerNormOptions{}},
	} {
		err := nn.Catch(func() {
			g := graph.NewGraph(enginetest.Backend(), "refusal")
			defer g.Finalize()
			norm.LayerNorm(graph.Parameter(g, "x", c.x), graph.Parameter(g, "gain", c.gain), nil, c.o)
		})
		if err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
	if _, err := norm.New("lyer", norm.Config{}); err == nil {
		t.Error("an unknown kind was accepted")
	}
	if _, err := norm.New("layer", norm.Config{Eps: -1}); err == nil {
		t.Error("a negative eps was accepted")
	}
}

func recurrentNet(t *testing.T, op nn.Op, states int) *nn.Network {
	t.Helper()
	b := nn.NewBuilder(2)
	f32 := func(d ...int) shapes.Shape { return shapes.Make(dtypes.Float32, d...) }
	in := []string{b.Input("x", f32(2, 3, 4)), b.Input("mask", f32(2, 3))}
	for _, s := range []string{"h0", "c0"}[:states] {
		in = append(in, b.Input(s, f32(2, 5)))
	}
	out := b.Add("rnn", op, in...)
	outputs := []string{out}
	if states == 2 {
		outputs = append(outputs, out+".1")
	}
	n, err := b.Finish(outputs...)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestMaskedStepsRepeatTheState(t *testing.T) {
	n := recurrentNet(t, nn.LSTM{Hidden: 5, Norm: nn.FullNorm}, 2)
	h0, c0 := normal(1, 2, 5), normal(2, 2, 5)
	x := tensors.FromFlatDataAndDimensions(nn.Floats(normal(3, 2, 4)), 2, 1, 4)
	out, err := n.Run(enginetest.Backend(), []*tensors.Tensor{x, tensors.FromFlatDataAndDimensions([]float32{0, 0}, 2, 1), h0, c0})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(nn.Floats(out[0]), nn.Floats(h0)) || !slices.Equal(nn.Floats(out[1]), nn.Floats(c0)) {
		t.Error("a fully masked step changed the state")
	}
	seq := nn.Floats(normal(4, 6, 4))
	short, err := n.Run(enginetest.Backend(), []*tensors.Tensor{tensors.FromFlatDataAndDimensions(seq, 2, 3, 4), tensors.FromFlatDataAndDimensions([]float32{1, 1, 1, 1, 1, 1}, 2, 3), h0, c0})
	if err != nil {
		t.Fatal(err)
	}
	long := slices.Concat(seq[:12], make([]float32, 8), seq[12:], make([]float32, 8))
	padded, err := n.Run(enginetest.Backend(), []*tensors.Tensor{tensors.FromFlatDataAndDimensions(long, 2, 5, 4), tensors.FromFlatDataAndDimensions([]float32{1, 1, 1, 0, 0, 1, 1, 1, 0, 0}, 2, 5), h0, c0})
	if err != nil {
		t.Fatal(err)
	}
	for b := range 2 {
		last, valid := nn.Floats(padded[0])[(b*5+4)*5:(b*5+5)*5], nn.Floats(padded[0])[(b*5+2)*5:(b*5+3)*5]
		if !slices.Equal(last, valid) {
			t.Errorf("case %d: masked steps changed the state", b)
		}
		for i, v := range nn.Floats(short[0])[(b*3+2)*5 : (b*3+3)*5] {
			if math.Abs(float64(v-last[i])) > 1e-6 { // products of other sizes round differently
				t.Errorf("case %d: padding changed the last state by %g", b, v-last[i])
			}
		}
	}
}

func TestRecurrentRefusesAWrongMask(t *testing.T) {
	for _, op := range []nn.Op{nn.LSTM{Hidden: 5}, nn.GRU{Hidden: 5}} {
		b := nn.NewBuilder(1)
		x := b.Input("x", shapes.Make(dtypes.Float32, 2, 3, 4))
		b.Add("rnn", op, x, b.Input("mask", shapes.Make(dtypes.Float32, 3, 2)))
		if b.Err() == nil {
			t.Errorf("%s accepted a mask [time, batch]", op.Kind())
		}
	}
	b := nn.NewBuilder(1)
	b.Add("rnn", nn.LSTM{}, b.Input("x", shapes.Make(dtypes.Float32, 2, 3, 4)))
	if b.Err() == nil {
		t.Error("an LSTM without units was accepted")
	}
}

func TestOneStepAndOneCaseWork(t *testing.T) {
	for _, op := range []nn.Op{nn.LSTM{Hidden: 5, Norm: nn.FullNorm}, nn.GRU{Hidden: 5, Norm: nn.FullNorm}, nn.LSTM{Hidden: 5}, nn.GRU{Hidden: 5}} {
		b := nn.NewBuilder(1)
		n, err := b.Finish(b.Add("rnn", op, b.Input("x", shapes.Make(dtypes.Float32, 1, 1, 4))))
		if err != nil {
			t.Fatal(err)
		}
		out, err := n.Run(enginetest.Backend(), []*tensors.Tensor{tensors.FromFlatDataAndDimensions([]float32{1, 2, -1, .5}, 1, 1, 4)})
		if err != nil || out[0].Shape().Size() != 5 {
			t.Errorf("%s: %v %v", op.Kind(), out, err)
		}
	}
}

// With h0 = 0 and rows of zeros, every norm multiplies its gradient by 1/√eps at each step. Standardised inputs do not.
func TestZeroRowsBlowUpTheGradient(t *testing.T) {
	const steps = 24
	b := nn.NewBuilder(3)
	n, err := b.Finish(b.Add("rnn", nn.LSTM{Hidden: 8, Norm: nn.FullNorm}, b.Input("x", shapes.Make(dtypes.Float32, 1, steps, 4))))
	if err != nil {
		t.Fatal(err)
	}
	step := func(x []float32) error {
		tr, err := learn.NewTrainer(enginetest.Backend(), &n.Clone().Params, func(env *nn.Env, batch []*graph.Node) *graph.Node {
			y := n.Lower(env, map[string]*graph.Node{"x": batch[0]})[0]
			return learn.MSE(y, graph.Iota(env.G, y.Shape(), 2)) // another target for every unit: a common one has no gradient
		}, learn.Options{ClipNorm: 5})
		if err != nil {
			t.Fatal(err)
		}
		info, err := tr.Step(tensors.FromFlatDataAndDimensions(x, 1, steps, 4))
		if err != nil {
			t.Fatal(err)
		}
		if math.IsNaN(info.Norm) || math.IsInf(info.Norm, 0) || info.Norm > 1e6 {
			return learn.ErrDiverged
		}
		return nil
	}
	zeros := make([]float32, steps*4)
	if step(zeros) == nil {
		t.Error("rows of zeros gave a bounded gradient: the warning in the documentation is out of date")
	}
	rng.Normal(rng.New(1, "x"), zeros, 1)
	if err := step(zeros); err != nil {
		t.Errorf("standardised rows: %v", err)
	}
}

func TestRecurrentGradientsAreRight(t *testing.T) {
	for _, op := range []nn.Op{nn.LSTM{Hidden: 3, Norm: nn.FullNorm}, nn.GRU{Hidden: 3, Norm: nn.FullNorm}} {
		b := nn.NewBuilder(4)
		n, err := b.Finish(b.Add("rnn", op, b.Input("x", shapes.Make(dtypes.Float32, 2, 3, 4))))
		if err != nil {
			t.Fatal(err)
		}
		names := []string{}
		args := []any{fixture.Tensor(nn.Float64s(normal(6, 6, 4)), dtypes.Float64, 2, 3, 4)}
		for p := range n.Params.All() {
			names = append(names, p.Name)
			args = append(args, fixture.Tensor(nn.Float64s(p.Value), dtypes.Float64, p.Value.Shape().Dimensions...))
		}
		loss := func(in []*graph.Node) *graph.Node {
			cur := map[string]*graph.Node{}
			for i, name := range names {
				cur[name] = in[i+1]
			}
			y := n.Lower(&nn.Env{G: in[0].Graph(), DType: dtypes.Float64, Param: func(s string) *graph.Node { return cur[s] }}, map[string]*graph.Node{"x": in[0]})[0]
			return graph.ReduceAllSum(graph.Mul(y, graph.Sin(graph.Iota(y.Graph(), y.Shape(), 2))))
		}
		grads := call(t, func(in []*graph.Node) []*graph.Node { return graph.Gradient(loss(in), in...) }, args...)
		value := func() float64 {
			return nn.Float64s(call(t, func(in []*graph.Node) []*graph.Node { return []*graph.Node{loss(in)} }, args...)[0])[0]
		}
		for i, g := range grads {
			d := nn.Float64s(args[i].(*tensors.Tensor))
			dims := args[i].(*tensors.Tensor).Shape().Dimensions
			j := len(d) / 2
			at := func(v float64) float64 {
				e := slices.Clone(d)
				e[j] = v
				old := args[i]
				args[i] = fixture.Tensor(e, dtypes.Float64, dims...)
				defer func() { args[i] = old }()
				return value()
			}
			num := (at(d[j]+1e-5) - at(d[j]-1e-5)) / 2e-5
			if got := nn.Float64s(g)[j]; math.Abs(got-num) > 1e-3*max(1e-3, math.Abs(num)) {
				t.Errorf("%s: gradient of argument %d: %g, finite difference %g", op.Kind(), i, got, num)
			}
		}
	}
}

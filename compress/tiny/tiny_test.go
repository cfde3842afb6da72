package tiny

import (
	"bytes"
	"cmp"
	"context"
	"encoding/gob"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/compress/quant"
	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/internal/fixture"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/onnx"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// moved reorders [n, c, ...] so that the channels come last, or back.
func moved(x []float64, shape []int, last bool) []float64 {
	inner := 1
	for _, d := range shape[2:] {
		inner *= d
	}
	out := make([]float64, len(x))
	for n := range shape[0] {
		for c := range shape[1] {
			for i := range inner {
				a, b := (n*shape[1]+c)*inner+i, (n*inner+i)*shape[1]+c
				if last {
					out[b] = x[a]
				} else {
					out[a] = x[b]
				}
			}
		}
	}
	return out
}

func TestFixtures(t *testing.T) {
	fixture.Run(t, 62, map[string]fixture.Func{
		"qconv": func(t *testing.T, c *fixture.Case) map[string]any {
			bits := 8
			if c.Params["bits"].Present() {
				bits = c.Params["bits"].Int()
			}
			w, x, g := c.Inputs["w_float"], c.Inputs["x_int"], c.Inputs["grad_out"]
			ws, xs, gs := w.Shape, x.Shape, g.Shape
			pad, stride := c.Params["padding"].Int(), c.Params["stride"].Int()
			q := &QConv{
				Bits: bits, In: xs[1], Out: ws[0], Groups: c.Params["groups"].Int(), Kernel: [2]int{ws[2], ws[3]}, Stride: [2]int{stride, stride}, Pad: [2]int{pad, pad},
				SX: c.Params["s_x"].Float(), SY: c.Params["s_y"].Float(), ZeroX: c.Params["zero_x"].Float(), ZeroY: c.Params["zero_y"].Float(),
			}
			q.SW, q.W, q.B = QuantizeWeights(moved(w.Floats(), ws, true), c.Inputs["b_float"].Floats(), ws[0], bits, q.SX)
			xf, gf := moved(x.Floats(), xs, true), moved(g.Floats(), gs, true)
			var y, gx []float64
			total := QGrad{W: make([]float64, len(q.W)), B: make([]float64, len(q.B))}
			for n := range xs[0] {
				xn, gn := xf[n*len(xf)/xs[0]:(n+1)*len(xf)/xs[0]], gf[n*len(gf)/gs[0]:(n+1)*len(gf)/gs[0]]
				yn, inside := q.Forward(xn, xs[2], xs[3])
				b := q.Backward(xn, xs[2], xs[3], gn, inside)
				y, gx = append(y, yn...), append(gx, b.X...)
				for i := range b.W {
					total.W[i] += b.W[i]
				}
				for i := range b.B {
					total.B[i] += b.B[i]
				}
			}
			qw, qb := q.QAS(total)
			back := func(v []float64) []float64 { return moved(v, ws, false) }
			return map[string]any{
				"s_w": q.SW, "w_int": back(q.W), "b_int": q.B, "y_int": moved(y, gs, false), "grad_x": moved(gx, xs, false),
				"grad_w": back(total.W), "grad_b": total.B, "qas_grad_w": back(qw), "qas_grad_b": qb,
			}
		},
		"qadd": func(t *testing.T, c *fixture.Case) map[string]any {
			f := func(n string) float64 { return c.Params[n].Float() }
			a := QAdd{S1: f("s_x1"), Z1: f("zero_x1"), S2: f("s_x2"), Z2: f("zero_x2"), SY: f("s_y"), ZY: f("zero_y")}
			y, inside := a.Forward(c.Inputs["x1"].Floats(), c.Inputs["x2"].Floats())
			g1, g2 := a.Backward(c.Inputs["grad_out"].Floats(), inside)
			return map[string]any{"y": y, "grad_x1": g1, "grad_x2": g2}
		},
		"saved_memory_bits": func(t *testing.T, c *fixture.Case) map[string]any {
			in, out, kernel, dw := c.Inputs["in_shape"].Ints(), c.Inputs["out_shape"].Ints(), c.Inputs["kernel"].Ints(), c.Inputs["depthwise"].Ints()
			var layers []LayerMemory
			for i := range kernel {
				layers = append(layers, LayerMemory{[3]int(in[3*i : 3*i+3]), [3]int(out[3*i : 3*i+3]), kernel[i] * kernel[i], dw[i] != 0})
			}
			var named map[string]float64
			if err := json.Unmarshal(c.Params["weight_update"].Raw, &named); err != nil {
				t.Fatal(err)
			}
			weights := map[int]float64{}
			for k, v := range named {
				i, err := strconv.Atoi(k)
				if err != nil {
					t.Fatal(err)
				}
				weights[i] = v
			}
			n := func(s string) int { return c.Params[s].Int() }
			var act, weight []float64
			sum := 0.
			for _, m := range SavedMemory(layers, n("n_bias_update"), weights, Bits{n("act_bits"), n("weight_bits"), n("bias_bits"), n("mask_bits")}) {
				act, weight = append(act, float64(m.Activation)), append(weight, float64(m.Weight))
				sum += float64(m.Activation + m.Weight)
			}
			return map[string]any{"activation_bits": act, "weight_bits": weight, "total_kib": []float64{sum / 8192}}
		},
		"select_channels": func(t *testing.T, c *fixture.Case) map[string]any {
			w := c.Inputs["W"]
			taps := len(w.Floats()) / (w.Shape[0] * w.Shape[1])
			keep := make([]int, w.Shape[1])
			for _, i := range SelectChannels(moved(w.Floats(), w.Shape, true), w.Shape[0], taps, w.Shape[1], false, c.Params["ratio"].Float(), c.Params["criterion"].String(), 0) {
				keep[i] = 1
			}
			return map[string]any{"keep": keep}
		},
		"scheme_search": func(t *testing.T, c *fixture.Case) map[string]any {
			x := &Contrib{Ratios: c.Params["ratios"].Floats(), GainBias: c.Inputs["gain_bias"].Floats(), MemBias: c.Inputs["mem_bias"].Floats(), GainWeight: c.Inputs["gain_weight"].Rows(), MemWeight: c.Inputs["mem_weight"].Rows()}
			best, err := Exact(x, c.Params["limit"].Float())
			if err != nil {
				t.Fatal(err)
			}
			return map[string]any{"best_gain": []float64{best.Gain}, "n_bias": []int{best.Biases}, "ratio_index": best.Ratio, "memory": []float64{best.Memory}}
		},
	})
}

// small is a float network of every kind of layer: a stem with padding, an inverted bottleneck with a residual, one with a
// stride, ReLU6 and ReLU.
func small(t testing.TB) *nn.Network {
	t.Helper()
	b := nn.NewBuilder(3)
	conv := func(name, x string, out, k, stride int, depthwise, act bool) string {
		c := nn.Conv2D(out, k, stride)
		if c.NoBias = true; depthwise {
			c.Groups = out
		}
		x = b.Add(name+".norm", nn.BatchNorm{}, b.Add(name, c, x))
		if act {
			x = b.Add(name+".act", nn.Clip{Lo: 0, Hi: 6}, x)
		}
		return x
	}
	x := b.Image("image", 8, 8, 2)
	x = conv("stem", x, 8, 3, 1, false, true)
	h := conv("b1.expand", x, 16, 1, 1, false, true)
	h = conv("b1.depthwise", h, 16, 3, 1, true, true)
	h = conv("b1.project", h, 8, 1, 1, false, false)
	x = b.Add("b1.add", nn.Add, x, h)
	h = conv("b2.expand", x, 16, 1, 1, false, true)
	h = conv("b2.depthwise", h, 16, 3, 2, true, true)
	x = conv("b2.project", h, 12, 1, 1, false, false)
	x = b.Add("act", nn.ReLU, conv("last", x, 16, 3, 2, false, false))
	x = b.Add("pool", nn.GlobalAveragePool, x)
	net, err := b.Finish(b.Add("head", nn.Dense{Out: 4}, x))
	if err != nil {
		t.Fatal(err)
	}
	r := rng.New(9, "norms")
	for p := range net.Params.All() {
		d := p.Data()
		for i := range d {
			switch p.Role {
			case nn.Gain:
				d[i] = float32(.7 + .6*r.Float64())
			case nn.Bias:
				d[i] = float32(.3 * r.NormFloat64())
			}
		}
		if err := p.SetData(d); err != nil {
			t.Fatal(err)
		}
	}
	return net
}

func cases(n, size int) [][]float32 {
	r := rng.New(5, "cases")
	x := make([][]float32, n)
	for i := range x {
		x[i] = make([]float32, size)
		rng.Normal(r, x[i], 1)
	}
	return x
}

func calibration(x [][]float32, dims ...int) compress.Examples {
	return compress.Examples{tensors.FromFlatDataAndDimensions(slices.Concat(x...), append([]int{len(x)}, dims...)...)}
}

func quantized(t testing.TB) (*nn.Network, *Net, [][]float32) {
	t.Helper()
	net, x := small(t), cases(24, 8*8*2)
	q, err := Quantize(context.Background(), enginetest.Backend(), net, calibration(x, 8, 8, 2), QuantizeOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return net, q, x
}

func logits(t testing.TB, q *Net, x [][]float32) (out []float32) {
	t.Helper()
	p, err := Compile(q, nil, CompileOptions{Inference: true})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	for _, v := range x {
		y, err := p.Classify(v)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, y...)
	}
	return out
}

func TestIntegersFollowTheFloatNetwork(t *testing.T) {
	net, q, x := quantized(t)
	want, _, err := compress.Evaluate(context.Background(), enginetest.Backend(), net, calibration(x, 8, 8, 2), 0)
	if err != nil {
		t.Fatal(err)
	}
	compare := func(what string, got []float32, tol float64) {
		t.Helper()
		dot, a, b := 0., 0., 0.
		for i := range got {
			dot, a, b = dot+float64(got[i])*float64(want[i]), a+float64(got[i])*float64(got[i]), b+float64(want[i])*float64(want[i])
		}
		if c := dot / math.Sqrt(a*b); c < 1-tol {
			t.Errorf("%s: cosine with the float network is %g", what, c)
		}
	}
	compare("int8", logits(t, q, x), 2e-3)
	f := q.Clone()
	f.Float = true
	compare("without rounding", logits(t, f, x), 1e-6)

	// the network that is written computes the same up to a step of the last activation, and so does its ONNX file
	back, err := q.Network()
	if err != nil {
		t.Fatal(err)
	}
	file, err := onnx.Marshal(back, onnx.WriteOptions{})
	if err != nil {
		t.Fatal(err)
	}
	read, err := onnx.Read(file, onnx.Options{})
	if err != nil {
		t.Fatal(err)
	}
	ints := logits(t, q, x)
	step := 0.
	for _, w := range q.Head.W {
		step = max(step, math.Abs(float64(w))*q.Features().Scale*float64(q.Features().C))
	}
	for _, n := range []*nn.Network{back, read} {
		got, _, err := compress.Evaluate(context.Background(), enginetest.Backend(), n, calibration(x, 8, 8, 2), 0)
		if err != nil {
			t.Fatal(err)
		}
		far := 0
		for i := range got {
			if math.Abs(float64(got[i]-ints[i])) > 1e-4 {
				far++
			}
			if math.Abs(float64(got[i]-ints[i])) > step {
				t.Fatalf("logit %d: fake-quantised %g, integers %g", i, got[i], ints[i])
			}
		}
		if far > len(got)/2 { // averages of four pixels often lie on a half, which falls to either side
			t.Errorf("%d of %d logits differ", far, len(got))
		}
		again, err := Quantize(context.Background(), enginetest.Backend(), n, calibration(x, 8, 8, 2), QuantizeOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for i := range q.Tensors {
			if math.Abs(again.Tensors[i].Scale/q.Tensors[i].Scale-1) > 1e-6 || again.Tensors[i].Zero != q.Tensors[i].Zero {
				t.Errorf("activation %d is on another grid: %+v, was %+v", i, again.Tensors[i], q.Tensors[i])
			}
		}
		for i, v := range logits(t, again, x) {
			if math.Abs(float64(v-ints[i])) > 1e-4 {
				t.Fatalf("read back, logit %d is %g, was %g", i, v, ints[i])
			}
		}
	}
}

// reference runs the network by QConv and QAdd and returns the gradients of the codes, by convolution.
func reference(q *Net, x []float32, label int) (loss float64, grads []QGrad) {
	acts := map[int][]float64{}
	in := make([]float32, q.Tensors[0].Size())
	if err := q.quantizeInput(in, x); err != nil {
		panic(err)
	}
	wide := func(x []float32) []float64 {
		y := make([]float64, len(x))
		for i, v := range x {
			y[i] = float64(v)
		}
		return y
	}
	round := func(x []float32) []float64 {
		y := wide(x)
		for i := range y {
			y[i] = math.RoundToEven(y[i])
		}
		return y
	}
	acts[0] = wide(in)
	inside := map[*Layer][]bool{}
	convs := map[*Layer]*QConv{}
	for _, l := range q.Layers {
		a, o := q.Tensors[l.In[0]], q.Tensors[l.Out]
		switch l.Kind {
		case Conv:
			c := &QConv{In: a.C, Out: o.C, Groups: 1, Kernel: l.Kernel, Stride: l.Stride, Pad: [2]int{l.Pad[0][0], l.Pad[1][0]}, SX: a.Scale, SY: o.Scale, ZeroX: float64(a.Zero), ZeroY: float64(o.Zero), SW: l.Scale, W: round(l.Weight), B: round(l.Bias)}
			if l.Depthwise {
				c.Groups = a.C
			}
			convs[l] = c
			acts[l.Out], inside[l] = c.Forward(acts[l.In[0]], a.H, a.W)
		case Add:
			b := q.Tensors[l.In[1]]
			acts[l.Out], inside[l] = QAdd{a.Scale, float64(a.Zero), b.Scale, float64(b.Zero), o.Scale, float64(o.Zero)}.Forward(acts[l.In[0]], acts[l.In[1]])
		case Pool:
			y := make([]float64, o.C)
			for i, v := range acts[l.In[0]] {
				y[i%o.C] += v
			}
			for i := range y {
				y[i] = math.RoundToEven(y[i] / float64(a.H*a.W))
			}
			acts[l.Out] = y
		}
	}
	f := q.Features()
	last := q.Layers[len(q.Layers)-1].Out
	z := make([]float64, q.Head.Classes)
	top := math.Inf(-1)
	for k := range z {
		z[k] = float64(q.Head.B[k])
		for c, v := range acts[last] {
			z[k] += (v - float64(f.Zero)) * f.Scale * float64(q.Head.W[k*f.C+c])
		}
		top = max(top, z[k])
	}
	sum := 0.
	for _, v := range z {
		sum += math.Exp(v - top)
	}
	loss = math.Log(sum) + top - z[label]
	grad := map[int][]float64{last: make([]float64, f.C)}
	for k, v := range z {
		d := math.Exp(v-top) / sum
		if k == label {
			d--
		}
		for c := range f.C {
			grad[last][c] += d * float64(q.Head.W[k*f.C+c]) * f.Scale
		}
	}
	put := func(t int, g []float64) {
		if grad[t] == nil {
			grad[t] = make([]float64, len(g))
		}
		for i, v := range g {
			grad[t][i] += v
		}
	}
	for _, l := range slices.Backward(q.Layers) {
		a, o := q.Tensors[l.In[0]], q.Tensors[l.Out]
		g := grad[l.Out]
		switch l.Kind {
		case Conv:
			r := convs[l].Backward(acts[l.In[0]], a.H, a.W, g, inside[l])
			put(l.In[0], r.X)
			grads = append(grads, r)
		case Add:
			b := q.Tensors[l.In[1]]
			g1, g2 := QAdd{a.Scale, float64(a.Zero), b.Scale, float64(b.Zero), o.Scale, float64(o.Zero)}.Backward(g, inside[l])
			put(l.In[0], g1)
			put(l.In[1], g2)
		case Pool:
			dx := make([]float64, a.Size())
			for i := range dx {
				dx[i] = g[i%o.C] / float64(a.H*a.W)
			}
			put(l.In[0], dx)
		}
	}
	slices.Reverse(grads)
	return loss, grads
}

// gradients runs a step of a program at rate 0 and returns the gradients that it computed, by layer.
func gradients(t *testing.T, q *Net, s *Scheme, o CompileOptions, x []float32, label int) (p *Program, loss float64, w, b [][]float32) {
	t.Helper()
	p, err := Compile(q, s, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	// take the gradients when they are there: their buffers are used again
	w, b = make([][]float32, len(p.convs)), make([][]float32, len(p.convs))
	for _, op := range p.ops {
		run := op.run
		op.run = func() {
			run()
			for i, c := range p.convs {
				if op.name == "gradient "+c.layer.Name+" weights" {
					w[i] = slices.Clone(p.at(c.gradW))
				}
				if op.name == "gradient "+c.layer.Name+" biases" {
					b[i] = slices.Clone(p.at(c.gradB))
				}
			}
		}
	}
	if loss, err = p.Step(x, label, 0); err != nil {
		t.Fatal(err)
	}
	return p, loss, w, b
}

func TestProgramComputesTheReferenceGradients(t *testing.T) {
	_, q, x := quantized(t)
	want, ref := reference(q, x[3], 2)
	for name, o := range map[string]CompileOptions{"pruned": {}, "unpruned": {NoPrune: true}, "late updates": {NoReorder: true}, "summed": {Accumulate: 4}} {
		p, loss, w, b := gradients(t, q, nil, o, x[3], 2)
		if math.Abs(loss-want) > 1e-5 {
			t.Errorf("%s: loss %g, want %g", name, loss, want)
		}
		n := float64(max(o.Accumulate, 1))
		for i, c := range p.convs {
			check := func(what string, got []float32, at func(j int) float64) {
				t.Helper()
				scale := 1e-12
				for j := range got {
					scale = max(scale, math.Abs(at(j)))
				}
				for j, v := range got {
					if d := math.Abs(float64(v)*n - at(j)); d > 2e-6*scale {
						t.Fatalf("%s: %s of %s: element %d is %g, want %g", name, what, c.layer.Name, j, float64(v)*n, at(j))
					}
				}
			}
			if len(w[i]) != len(ref[i].W) || len(b[i]) != len(ref[i].B) {
				t.Fatalf("%s: %d weights and %d biases of %s", name, len(w[i]), len(b[i]), c.layer.Name)
			}
			check("weights", w[i], func(j int) float64 { return ref[i].W[c.index[j]] })
			check("biases", b[i], func(j int) float64 { return ref[i].B[j] })
		}
	}
	// a sparse program computes the same for what it trains, and nothing else
	s := Scheme{Biases: 5, Weights: map[int]float64{3: .5, 4: .25, 5: .5, 7: 1}}
	p, _, w, b := gradients(t, q, &s, CompileOptions{}, x[3], 2)
	for i, c := range p.convs {
		r, trained := s.Weights[i]
		if trained != (w[i] != nil) || (i >= 3) != (b[i] != nil) {
			t.Errorf("%s: gradients of weights %t, of biases %t", c.layer.Name, w[i] != nil, b[i] != nil)
		}
		scale := 0.
		for _, v := range ref[i].W {
			scale = max(scale, math.Abs(v))
		}
		for j, v := range w[i] {
			if d := math.Abs(float64(v) - ref[i].W[c.index[j]]); d > 2e-6*scale {
				t.Fatalf("sparse: weight %d of %s has gradient %g, want %g", c.index[j], c.layer.Name, v, ref[i].W[c.index[j]])
			}
		}
		if trained && len(w[i]) != int(math.Floor(r*float64(c.in.C)))*len(c.layer.Weight)/c.in.C && !c.layer.Depthwise {
			t.Errorf("%s: %d weights at a share of %g of %d", c.layer.Name, len(w[i]), r, len(c.layer.Weight))
		}
	}
	for _, name := range p.Operations() {
		if strings.HasPrefix(name, "backward stem") || strings.HasPrefix(name, "backward b1.project") {
			t.Errorf("%q was not pruned", name)
		}
	}
}

func TestScaledStepIsTheFloatStep(t *testing.T) {
	_, q, x := quantized(t)
	_, ref := reference(q, x[0], 1)
	s := Everything(q)
	p, err := Compile(q, &s, CompileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	const rate = .01
	if _, err := p.Step(x[0], 1, rate); err != nil {
		t.Fatal(err)
	}
	trained := p.Trained()
	for i, l := range q.Convs() {
		per, sx := len(l.Weight)/len(l.Bias), q.Tensors[l.In[0]].Scale
		for j, v := range trained.Convs()[i].Weight {
			sw := l.Scale[j/per]
			// the gradient of a float weight is that of its code over the scale
			want := sw*float64(l.Weight[j]) - rate*ref[i].W[j]/sw
			if lim := 127 * sw; math.Abs(want) < lim && math.Abs(sw*float64(v)-want) > 1e-6*max(1, math.Abs(want)) {
				t.Fatalf("%s: weight %d is %g after the step, the float step gives %g", l.Name, j, sw*float64(v), want)
			}
		}
		for o, v := range trained.Convs()[i].Bias {
			s := l.Scale[o] * sx
			if want := s*float64(l.Bias[o]) - rate*ref[i].B[o]/s; math.Abs(s*float64(v)-want) > 1e-6*max(1, math.Abs(want)) {
				t.Fatalf("%s: bias %d is %g after the step, the float step gives %g", l.Name, o, s*float64(v), want)
			}
		}
	}
}

func labelled(x [][]float32) *Examples {
	e := &Examples{X: x}
	for i := range x {
		e.Labels = append(e.Labels, i%4)
	}
	return e
}

func TestFrozenTensorsStayAsTheyAre(t *testing.T) {
	_, q, x := quantized(t)
	s := Scheme{Biases: 4, Weights: map[int]float64{4: .5, 5: .25, 7: .25}}
	for _, inPlace := range []bool{false, true} {
		r, err := Train(context.Background(), q, s, labelled(x), nil, TrainOptions{Epochs: 3, LR: .05, CompileOptions: CompileOptions{InPlace: inPlace}})
		if err != nil {
			t.Fatal(err)
		}
		if !(r.Losses[2] < r.Losses[0]) {
			t.Errorf("in place %t: losses %v do not fall", inPlace, r.Losses)
		}
		for i, l := range r.Net.Convs() {
			old := q.Convs()[i]
			ci := q.Tensors[l.In[0]].C
			chosen := s.channels(q, i)
			changed := 0
			for j := range l.Weight {
				ch := j % ci
				if l.Depthwise {
					ch = j / l.taps()
				}
				if l.Weight[j] != old.Weight[j] {
					changed++
					if !slices.Contains(chosen, ch) {
						t.Fatalf("%s: weight %d of frozen channel %d changed", l.Name, j, ch)
					}
				}
			}
			if (len(chosen) > 0) != (changed > 0) {
				t.Errorf("in place %t: %s: %d weights changed, channels %v are trained", inPlace, l.Name, changed, chosen)
			}
			if same := slices.Equal(l.Bias, old.Bias); same != (i < 4) {
				t.Errorf("%s: biases unchanged: %t", l.Name, same)
			}
		}
	}
}

func TestSaturatedOutputsHaveNoGradient(t *testing.T) {
	q := &QConv{In: 1, Out: 1, Groups: 1, Kernel: [2]int{1, 1}, Stride: [2]int{1, 1}, SX: 1, SY: 1, SW: []float64{1}, W: []float64{100}, B: []float64{0}}
	x := []float64{-2, -1.28, 0, 1.27, 1.28, 2}
	y, inside := q.Forward(x, 1, 6)
	g := q.Backward(x, 1, 6, []float64{1, 1, 1, 1, 1, 1}, inside)
	if !slices.Equal(y, []float64{-128, -128, 0, 127, 127, 127}) || !slices.Equal(g.X, []float64{0, 100, 100, 100, 0, 0}) {
		t.Errorf("outputs %v, gradients %v: the ends of the range pass, what lies beyond does not", y, g.X)
	}
	a := QAdd{S1: 1, S2: 1, SY: 1}
	y, inside = a.Forward([]float64{100, 100}, []float64{27, 28})
	g1, _ := a.Backward([]float64{1, 1}, inside)
	if !slices.Equal(y, []float64{127, 127}) || !slices.Equal(g1, []float64{1, 0}) {
		t.Errorf("sums %v, gradients %v", y, g1)
	}
}

func TestMemoryPlans(t *testing.T) {
	_, q, _ := quantized(t)
	all := Everything(q)
	sparse := Scheme{Biases: 4, Weights: map[int]float64{4: .5, 7: .25}}
	peaks := map[string]int{}
	for name, c := range map[string]struct {
		s *Scheme
		o CompileOptions
	}{
		"inference": {&Scheme{}, CompileOptions{Inference: true}},
		"full":      {&all, CompileOptions{}},
		"full late": {&all, CompileOptions{NoReorder: true}},
		"sparse":    {&sparse, CompileOptions{}},
		"late":      {&sparse, CompileOptions{NoReorder: true}},
		"in place":  {&sparse, CompileOptions{InPlace: true}},
		"summed":    {&sparse, CompileOptions{Accumulate: 8}},
	} {
		p, err := Compile(q, c.s, c.o)
		if err != nil {
			t.Fatal(err)
		}
		again, err := Compile(q, c.s, c.o)
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(p.Buffers(), again.Buffers()) {
			t.Errorf("%s: two plans differ", name)
		}
		peaks[name] = p.PeakBytes()
		sum := 0
		bs := p.Buffers()
		for i, a := range bs {
			sum += (a.Bytes + align - 1) / align * align
			for _, b := range bs[i+1:] {
				if a.First <= b.Last && b.First <= a.Last && a.Offset < b.Offset+b.Bytes && b.Offset < a.Offset+a.Bytes {
					t.Errorf("%s: %+v and %+v overlap", name, a, b)
				}
			}
			if a.Offset%align != 0 || a.Offset+a.Bytes > p.PeakBytes() {
				t.Errorf("%s: %+v in an arena of %d", name, a, p.PeakBytes())
			}
		}
		if p.PeakBytes() < p.LowerBound() || p.PeakBytes() > sum {
			t.Errorf("%s: peak %d, bound %d, sum %d", name, p.PeakBytes(), p.LowerBound(), sum)
		}
		p.Close()
		again.Close()
	}
	if !(peaks["inference"] < peaks["sparse"] && peaks["sparse"] < peaks["late"] && peaks["late"] < peaks["full late"] && peaks["full"] < peaks["full late"]) {
		t.Errorf("peaks %v are in another order", peaks)
	}
}

func TestPlacement(t *testing.T) {
	r := rng.New(1, "placement")
	for range 200 {
		var bs []*Buffer
		sum := 0
		for i := range 1 + r.IntN(20) {
			first := r.IntN(20)
			bs = append(bs, &Buffer{Name: fmt.Sprint(i), Bytes: r.IntN(100), First: first, Last: first + r.IntN(8)})
			sum += (bs[i].Bytes + align - 1) / align * align
		}
		peak := Place(bs)
		if peak < LowerBound(bs) || peak > sum {
			t.Fatalf("peak %d, bound %d, sum %d", peak, LowerBound(bs), sum)
		}
		for i, a := range bs {
			for _, b := range bs[i+1:] {
				if a.First <= b.Last && b.First <= a.Last && a.Offset < b.Offset+b.Bytes && b.Offset < a.Offset+a.Bytes {
					t.Fatalf("%+v and %+v overlap", a, b)
				}
			}
		}
	}
}

func TestMemoryGrowsWithBiasesAndShares(t *testing.T) {
	_, q, _ := quantized(t)
	n := len(q.Convs())
	last := -1
	for k := 0; k <= n; k++ {
		m := Scheme{Biases: k}.ExtraBytes(q)
		if m <= last {
			t.Errorf("%d biases take %d bytes, one less %d", k, m, last)
		}
		last = m
	}
	if (Scheme{}).ExtraBytes(q) != 0 {
		t.Error("the classifier is counted")
	}
	last = (Scheme{Biases: n}).ExtraBytes(q)
	for _, r := range DefaultRatios {
		m := Scheme{Biases: n, Weights: map[int]float64{4: r}}.ExtraBytes(q)
		if m <= last {
			t.Errorf("a share of %g takes %d bytes, less of it %d", r, m, last)
		}
		last = m
	}
}

func TestSearchFindsWhatEnumerationFinds(t *testing.T) {
	for seed := range uint64(12) {
		r := rng.New(seed, "contributions")
		c := &Contrib{Ratios: []float64{.25, .5, 1}}
		const n = 4
		for k := range n + 1 {
			c.GainBias, c.MemBias = append(c.GainBias, float64(k)*r.Float64()), append(c.MemBias, float64(3*k))
		}
		for range n {
			g, m := make([]float64, 3), make([]float64, 3)
			for i := range g {
				g[i], m[i] = r.Float64()*4-1, float64(1+r.IntN(12))
			}
			c.GainWeight, c.MemWeight = append(c.GainWeight, g), append(c.MemWeight, m)
		}
		for _, budget := range []int{0, 7, 15, 30, 100} {
			best := 0.
			for k := range n + 1 {
				for code := range 256 {
					x := Choice{Biases: k}
					for l, rest := 0, code; l < n; l, rest = l+1, rest/4 {
						x.Ratio = append(x.Ratio, rest%4-1)
						if l < n-k {
							x.Ratio[l] = -1
						}
					}
					if g, m := c.sum(x); m <= float64(budget) {
						best = max(best, g)
					}
				}
			}
			exact, err := Exact(c, float64(budget))
			if err != nil {
				t.Fatal(err)
			}
			if math.Abs(exact.Gain-best) > 1e-9 || exact.Memory > float64(budget) {
				t.Errorf("seed %d, budget %d: gain %g of %g bytes, enumeration finds %g", seed, budget, exact.Gain, exact.Memory, best)
			}
			found, err := Search(context.Background(), c, budget, SearchOptions{Seed: seed})
			if err != nil {
				t.Fatal(err)
			}
			if found.Memory > float64(budget) || found.Gain < best-1e-9 {
				t.Errorf("seed %d, budget %d: evolution finds gain %g of %g bytes, the best is %g", seed, budget, found.Gain, found.Memory, best)
			}
			if s := found.Scheme(c.Ratios); budget == 0 && (s.Biases != 0 || len(s.Weights) != 0) {
				t.Errorf("budget 0 trains %+v", s)
			}
		}
		c.MemBias[0] = 5
		if _, err := Search(context.Background(), c, 4, SearchOptions{}); !errors.Is(err, ErrBudget) {
			t.Errorf("a budget below the classifier's: error %v", err)
		}
	}
}

func TestContributionAndFit(t *testing.T) {
	_, q, x := quantized(t)
	e := labelled(x)
	c, err := Contribution(context.Background(), q, e, e, ContribOptions{Ratios: []float64{.25, 1}, Train: TrainOptions{Epochs: 1}})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Check(); err != nil {
		t.Fatal(err)
	}
	g, err := GradientContribution(context.Background(), q, e, nil)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.IsSorted(g.GainBias) || g.GainBias[1] <= 0 || !slices.IsSorted(g.GainWeight[4]) {
		t.Errorf("gradients contribute %v, %v", g.GainBias, g.GainWeight[4])
	}
	full, err := MakePlan(q, Everything(q), CompileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, budget := range []int{full.Peak, full.Peak / 2, full.Peak * 3 / 4} {
		plan, err := Fit(context.Background(), q, e, budget, FitOptions{Contrib: g})
		if err != nil {
			t.Fatal(err)
		}
		if plan.Peak > budget || plan.Peak < plan.Bound || plan.Inference > plan.Peak || plan.Late < plan.Peak {
			t.Errorf("budget %d: plan %+v", budget, plan)
		}
		if len(plan.Layers) == 0 {
			t.Errorf("budget %d trains the classifier alone", budget)
		}
	}
	if _, err := Fit(context.Background(), q, e, 100, FitOptions{}); !errors.Is(err, ErrBudget) || !strings.Contains(err.Error(), "classifier alone takes") {
		t.Errorf("100 bytes: error %v", err)
	}
	all := Everything(q)
	if _, err := Fit(context.Background(), q, e, full.Peak/2, FitOptions{Scheme: &all}); !errors.Is(err, ErrBudget) {
		t.Errorf("everything in half the memory: error %v", err)
	}
}

func TestKeptActivationsChangeNothing(t *testing.T) {
	_, q, x := quantized(t)
	s := Scheme{Biases: 2, Weights: map[int]float64{6: .5, 7: 1}}
	e := labelled(x[:16])
	a, err := Train(context.Background(), q, s, e, e, TrainOptions{Epochs: 2})
	if err != nil {
		t.Fatal(err)
	}
	p, err := Compile(q, &s, CompileOptions{Accumulate: 8})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if p.cut == 0 {
		t.Fatal("nothing is kept")
	}
	// the same steps, each from the input on
	b, err := Train(context.Background(), q, s, labelled(x[:16]), nil, TrainOptions{Epochs: 2})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(a.Net.Head.W, b.Net.Head.W) {
		t.Error("two trainings differ")
	}
	seen := 0
	for epoch := range 2 {
		for _, i := range rng.New(0, fmt.Sprintf("tiny:order:%d", epoch)).Perm(16) {
			rate := .05 * .5 * (1 + math.Cos(math.Pi*float64(seen/8)/4))
			if _, err := p.Step(x[i], i%4, rate); err != nil {
				t.Fatal(err)
			}
			seen++
		}
	}
	for i, l := range p.Trained().Convs() {
		for j, v := range l.Weight {
			if math.Abs(float64(v-a.Net.Convs()[i].Weight[j])) > 1e-4*(1+math.Abs(float64(v))) {
				t.Fatalf("%s: weight %d is %g from the input on, %g from kept activations", l.Name, j, v, a.Net.Convs()[i].Weight[j])
			}
		}
	}
}

// stopping trains until so many cases are seen in this run, in steps of 64 as Progress counts.
func stopping(q *Net, s Scheme, e *Examples, o TrainOptions, after int) (*Trained, error) {
	ctx, stop := context.WithCancel(context.Background())
	defer stop()
	first := -1
	o.Progress = func(done, _ int, _ float64) {
		if first < 0 {
			first = done - 64
		}
		if done-first >= after {
			stop()
		}
	}
	return Train(ctx, q, s, e, e, o)
}

func TestAStoppedTrainingGoesOn(t *testing.T) {
	_, q, x := quantized(t)
	s := Scheme{Biases: 4, Weights: map[int]float64{4: .5, 5: .25, 7: 1}}
	journal := func(dir string) *compress.Journal {
		j, err := compress.OpenJournal(dir)
		if err != nil {
			t.Fatal(err)
		}
		return j
	}
	for name, o := range map[string]CompileOptions{
		"plain":       {Accumulate: 1, Decay: 1e-3},
		"accumulated": {Accumulate: 3, GradBits: 8},
		"in place":    {Accumulate: 1, InPlace: true, Seed: 3},
		"at the end":  {Accumulate: 5, NoReorder: true},
	} {
		dir := filepath.Join(t.TempDir(), "run")
		o := TrainOptions{CompileOptions: o, Epochs: 11, LR: .02, Order: 5}
		e := labelled(x[:23])
		whole, err := Train(context.Background(), q, s, e, e, o)
		if err != nil {
			t.Fatal(err)
		}
		compare := func(what string, r *Trained) {
			t.Helper()
			if !slices.Equal(r.Losses, whole.Losses) || r.Validation != whole.Validation || r.PeakBytes != whole.PeakBytes || !slices.Equal(r.Net.Head.W, whole.Net.Head.W) || !slices.Equal(r.Net.Head.B, whole.Net.Head.B) {
				t.Errorf("%s, %s: losses %v, validation %+v; undisturbed %v, %+v", name, what, r.Losses, r.Validation, whole.Losses, whole.Validation)
			}
			for i, l := range r.Net.Convs() {
				if w := whole.Net.Convs()[i]; !slices.Equal(l.Weight, w.Weight) || !slices.Equal(l.Bias, w.Bias) {
					t.Errorf("%s, %s: layer %s differs", name, what, l.Name)
				}
			}
		}
		// stopped by the context: twice, in the middle of an epoch and of an update
		o.Journal = journal(dir)
		for range 2 {
			if _, err := stopping(q, s, e, o, 64); !errors.Is(err, context.Canceled) {
				t.Fatalf("%s: stopped: %v", name, err)
			}
		}
		if n := o.Journal.Len(); n != 1 {
			t.Errorf("%s: %d checkpoints", name, n)
		}
		first := 0
		o.Progress = func(done, _ int, _ float64) { first = max(first, cmp.Or(first, done)) }
		r, err := Train(context.Background(), q, s, labelled(x[:23]), e, o)
		if err != nil {
			t.Fatal(err)
		}
		if compare("stopped", r); first != 192 {
			t.Errorf("%s: it goes on in front of case %d", name, first)
		}
		first, o.Progress = 0, func(done, _ int, _ float64) { first = done }
		if r, err = Train(context.Background(), q, s, e, e, o); err != nil || first != 0 {
			t.Fatalf("%s: a finished training trains again up to %d: %v", name, first, err)
		}
		compare("finished", r)

		// killed: what the journal held at some moment, with nothing saved after it
		killed, alive := filepath.Join(t.TempDir(), "killed"), filepath.Join(t.TempDir(), "alive")
		o.Journal, o.SaveEvery = journal(alive), 1
		o.Progress = func(done, _ int, _ float64) {
			if done == 128 {
				if err := os.CopyFS(killed, os.DirFS(alive)); err != nil {
					t.Error(err)
				}
			}
		}
		if r, err = Train(context.Background(), q, s, e, e, o); err != nil {
			t.Fatal(err)
		}
		compare("saved at every step", r)
		first, o.Journal = 0, journal(killed)
		o.Progress = func(done, _ int, _ float64) { first = cmp.Or(first, done) }
		if r, err = Train(context.Background(), q, s, e, e, o); err != nil {
			t.Fatal(err)
		}
		if compare("killed", r); first != 128 {
			t.Errorf("%s: after a kill it goes on in front of case %d", name, first)
		}

		// another training does not take it over
		o.LR, first = .03, 0
		if _, err := Train(context.Background(), q, s, e, e, o); err != nil || first != 64 {
			t.Errorf("%s: at another rate it goes on in front of case %d: %v", name, first, err)
		}
	}
}

func TestACheckpointOfAnotherNetworkIsRefused(t *testing.T) {
	_, q, x := quantized(t)
	j, err := compress.OpenJournal(filepath.Join(t.TempDir(), "run"))
	if err != nil {
		t.Fatal(err)
	}
	e, o := labelled(x), TrainOptions{Epochs: 1, Journal: j}
	if _, err := Train(context.Background(), q, Scheme{}, e, nil, o); err != nil {
		t.Fatal(err)
	}
	other, err := q.WithClasses(5)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Train(context.Background(), other, Scheme{}, e, nil, o); err == nil || !strings.Contains(err.Error(), "remove the journal") {
		t.Errorf("error %v", err)
	}
}

func TestAStoppedAnalysisTrainsNothingTwice(t *testing.T) {
	_, q, x := quantized(t)
	e := labelled(x)
	o := ContribOptions{Ratios: []float64{1}, Train: TrainOptions{Epochs: 4}}
	want, err := Contribution(context.Background(), q, e, e, o)
	if err != nil {
		t.Fatal(err)
	}
	if o.Train.Journal, err = compress.OpenJournal(filepath.Join(t.TempDir(), "run")); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	o.Progress = func(done, _ int) {
		if done == 3 {
			stop()
		}
	}
	if _, err := Contribution(ctx, q, e, e, o); !errors.Is(err, context.Canceled) {
		t.Fatalf("stopped: %v", err)
	}
	trained := 0
	o.Progress, o.Train.Progress = nil, func(int, int, float64) { trained++ }
	got, err := Contribution(context.Background(), q, e, e, o)
	if err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%v, undisturbed %v", got, want)
	}
	if n := 2 * len(q.Convs()); trained != n+1-4 { // one report each
		t.Errorf("%d trainings after 4 of %d", trained, n+1)
	}
}

func TestANetworkSurvivesGob(t *testing.T) {
	_, q, x := quantized(t)
	var b bytes.Buffer
	if err := gob.NewEncoder(&b).Encode(&q); err != nil {
		t.Fatal(err)
	}
	var back *Net
	if err := gob.NewDecoder(&b).Decode(&back); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(logits(t, back, x), logits(t, q, x)) {
		t.Error("other logits")
	}
	var files [2][]byte
	for i, n := range []*Net{q, back} {
		net, err := n.Network()
		if err != nil {
			t.Fatal(err)
		}
		if files[i], err = onnx.Marshal(net, onnx.WriteOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(files[0], files[1]) {
		t.Error("another file")
	}
}

// A sum may lie where its first operand was, so that the same buffer holds different values in front of different cuts.
func TestKeptActivationsAreThoseOfTheCut(t *testing.T) {
	net, err := zoo.ResNet(zoo.ResNetOptions{Size: 8, Width: 4, Classes: 4, Seed: 1})
	if err != nil {
		t.Fatal(err)
	}
	x := cases(24, 64)
	q, err := Quantize(context.Background(), enginetest.Backend(), net, calibration(x, 8, 8, 1), QuantizeOptions{})
	if err != nil {
		t.Fatal(err)
	}
	shared, judged := labelled(x[:16]), labelled(x[16:])
	for k := range len(q.Convs()) + 1 {
		s := Scheme{Biases: k}
		a, err := Train(context.Background(), q, s, shared, judged, TrainOptions{Epochs: 1})
		if err != nil {
			t.Fatal(err)
		}
		b, err := Train(context.Background(), q, s, labelled(x[:16]), labelled(x[16:]), TrainOptions{Epochs: 1})
		if err != nil {
			t.Fatal(err)
		}
		if a.Losses[0] != b.Losses[0] || a.Validation != b.Validation {
			t.Errorf("biases of the last %d: loss %v and %+v with what other trainings kept, %v and %+v without", k, a.Losses, a.Validation, b.Losses, b.Validation)
		}
	}
}

func TestScalingRepairsTheMismatch(t *testing.T) {
	_, q, x := quantized(t)
	_, ref := reference(q, x[1], 0)
	worst := [2]float64{}
	for i, l := range q.Convs() {
		per := len(l.Weight) / len(l.Bias)
		w, wf, gf := make([]float64, len(l.Weight)), make([]float64, len(l.Weight)), make([]float64, len(l.Weight))
		for j, v := range l.Weight {
			w[j], wf[j] = float64(v), float64(v)*l.Scale[j/per]
			gf[j] = ref[i].W[j] / l.Scale[j/per]
		}
		c := &QConv{Out: len(l.Bias), SW: l.Scale, SX: q.Tensors[l.In[0]].Scale}
		scaled, _ := c.QAS(ref[i])
		float := Mismatch(wf, gf)
		worst[0] = max(worst[0], math.Abs(Mismatch(w, ref[i].W)-float))
		worst[1] = max(worst[1], math.Abs(Mismatch(w, scaled)-float))
	}
	if worst[0] < 2 || worst[1] > 1 {
		t.Errorf("log10(‖W‖/‖G‖) is off by up to %g as it is, and %g scaled", worst[0], worst[1])
	}
	if !math.IsNaN(Mismatch([]float64{1}, []float64{0})) {
		t.Error("a tensor without gradient has a ratio")
	}
}

func TestRefusals(t *testing.T) {
	ctx, be := context.Background(), enginetest.Backend()
	net, q, x := quantized(t)
	build := func(f func(b *nn.Builder, x string) string) *nn.Network {
		b := nn.NewBuilder(1)
		n, err := b.Finish(f(b, b.Image("image", 8, 8, 2)))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	calib := calibration(x, 8, 8, 2)
	tail := func(b *nn.Builder, x string) string {
		return b.Add("head", nn.Dense{Out: 4}, b.Add("pool", nn.GlobalAveragePool, x))
	}
	for name, c := range map[string]struct {
		net  *nn.Network
		want string
	}{
		"sigmoid": {build(func(b *nn.Builder, x string) string {
			return tail(b, b.Add("gate", nn.Sigmoid, b.Add("c", nn.Conv2D(4, 3, 1), x)))
		}), "gate"},
		"pooling": {build(func(b *nn.Builder, x string) string {
			return tail(b, b.Add("shrink", nn.Pool{Max: true, Kernel: []int{2, 2}}, b.Add("c", nn.Conv2D(4, 3, 1), x)))
		}), "shrink"},
		"norm without a convolution": {build(func(b *nn.Builder, x string) string {
			return tail(b, b.Add("c", nn.Conv2D(4, 3, 1), b.Add("norm", nn.BatchNorm{}, b.Add("r", nn.ReLU, b.Add("c0", nn.Conv2D(4, 3, 1), x)))))
		}), "norm"},
		"groups": {build(func(b *nn.Builder, x string) string {
			c := nn.Conv2D(8, 3, 1)
			c.Groups = 2
			return tail(b, b.Add("grouped", c, b.Add("c", nn.Conv2D(4, 3, 1), x)))
		}), "grouped"},
		"no classifier": {build(func(b *nn.Builder, x string) string { return b.Add("c", nn.Conv2D(4, 3, 1), x) }), "classifier"},
	} {
		if _, err := Quantize(ctx, be, c.net, calib, QuantizeOptions{}); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v does not name %q", name, err, c.want)
		}
	}
	if _, err := Quantize(ctx, be, net, nil, QuantizeOptions{}); !errors.Is(err, ErrEmpty) {
		t.Errorf("no calibration: error %v", err)
	}
	nan := slices.Clone(x[0])
	nan[7] = float32(math.NaN())
	if _, err := Quantize(ctx, be, net, calibration([][]float32{nan}, 8, 8, 2), QuantizeOptions{}); !errors.Is(err, quant.ErrNotFinite) {
		t.Errorf("NaN in the calibration: error %v", err)
	}
	for name, s := range map[string]Scheme{
		"too many biases":    {Biases: 9},
		"negative biases":    {Biases: -1},
		"outside the last k": {Biases: 2, Weights: map[int]float64{1: 1}},
		"layer 99":           {Biases: 2, Weights: map[int]float64{99: 1}},
		"share 0":            {Biases: 8, Weights: map[int]float64{1: 0}},
		"share 2":            {Biases: 8, Weights: map[int]float64{1: 2}},
		"NaN share":          {Biases: 8, Weights: map[int]float64{1: math.NaN()}},
		"selection":          {Biases: 8, Select: "luck"},
	} {
		if _, err := Compile(q, &s, CompileOptions{}); !errors.Is(err, ErrScheme) {
			t.Errorf("%s: error %v", name, err)
		}
	}
	p, err := Compile(q, nil, CompileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		x     []float32
		label int
		rate  float64
	}{
		"label 4": {x[0], 4, .1}, "label -1": {x[0], -1, .1}, "NaN": {nan, 0, .1}, "size": {x[0][:5], 0, .1}, "rate": {x[0], 0, math.NaN()},
	} {
		if _, err := p.Step(c.x, c.label, c.rate); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
	p.Close()
	if _, err := p.Step(x[0], 0, .1); err == nil {
		t.Error("a closed program went on")
	}
	if _, err := Train(ctx, q, Scheme{}, &Examples{}, nil, TrainOptions{}); !errors.Is(err, ErrEmpty) {
		t.Errorf("no examples: error %v", err)
	}
	if _, err := Train(ctx, q, Everything(q), labelled(x), nil, TrainOptions{LR: 1e30}); !errors.Is(err, ErrDiverged) {
		t.Errorf("a huge rate: error %v", err)
	}
}

func TestEdgesWork(t *testing.T) {
	_, q, x := quantized(t)
	// a share of less than a channel trains nothing of the weights
	s := Scheme{Biases: 2, Weights: map[int]float64{7: 1. / 64}}
	r, err := Train(context.Background(), q, s, labelled(x), nil, TrainOptions{Epochs: 1})
	if err != nil || !slices.Equal(r.Net.Convs()[7].Weight, q.Convs()[7].Weight) {
		t.Errorf("less than a channel: %v", err)
	}
	// dead channels and constant activations
	net := small(t)
	w := net.Params.Get("last.w")
	d := w.Data()
	clear(d[:len(d)/16])
	if err := w.SetData(d); err != nil {
		t.Fatal(err)
	}
	constant := make([][]float32, 3)
	for i := range constant {
		constant[i] = make([]float32, 8*8*2)
	}
	c, err := Quantize(context.Background(), enginetest.Backend(), net, calibration(constant, 8, 8, 2), QuantizeOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Train(context.Background(), c, Everything(c), &Examples{X: constant, Labels: []int{0, 1, 2}}, nil, TrainOptions{Epochs: 1, LR: 1e-3}); err != nil {
		t.Errorf("constant activations: %v", err)
	}
	// another classifier, eight-bit gradients
	other, err := q.WithClasses(7)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Train(context.Background(), other, LastLayers(other, 3), labelled(x), nil, TrainOptions{Epochs: 1, CompileOptions: CompileOptions{GradBits: 8}}); err != nil {
		t.Error(err)
	}
	for _, sel := range Selections {
		w := []float64{1, 5, 3, 4, 2, 0}
		if got := SelectChannels(w, 1, 1, 6, false, .5, sel, 3); len(got) != 3 || !slices.IsSorted(got) {
			t.Errorf("%s chooses %v", sel, got)
		}
	}
	if got := SelectChannels([]float64{1, 5, 3, 4, 2, 0}, 1, 1, 6, false, .5, "magnitude-", 0); !slices.Equal(got, []int{0, 4, 5}) {
		t.Errorf("smallest are %v", got)
	}
}

package quant

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/internal/fixture"
	"github.com/lathe-ml/lathe/internal/metric"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/onnx"
	"github.com/lathe-ml/lathe/nn/zoo"
)

func TestFixturesZeroQ(t *testing.T) {
	fixture.Run(t, 78, map[string]fixture.Func{
		"asym_quant": func(t *testing.T, c *fixture.Case) map[string]any {
			x, lo, hi := c.Inputs["x"].Floats(), c.Inputs["min"].Floats(), c.Inputs["max"].Floats()
			per := len(x)
			if c.Params["mode"].String() == "rows" {
				per = len(x) / max(c.Inputs["x"].Shape[0], 1)
			}
			out := make([]float64, len(x))
			for i, v := range x {
				out[i] = Asymmetric{c.Params["bits"].Int(), lo[i/per], hi[i/per]}.Value(v)
			}
			return map[string]any{"x_q": out}
		},
		"distill": func(t *testing.T, c *fixture.Case) map[string]any {
			net, x := fixtureNet(t, c)
			d := Distill{Steps: c.Params["steps"].Int(), LR: c.Params["lr"].Float(), Patience: 1 << 30, dtype: dtypes.Float64}
			loss, grad := lossAndGradient(t, d, net, x)
			r, final := distilFrom(t, d, net, x)
			return map[string]any{"loss": []float64{loss}, "grad_x": toNCHW(grad, c.Inputs["x"].Shape), "trace": r.Trace, "x_after": toNCHW(final, c.Inputs["x"].Shape)}
		},
		"kl_sensitivity": func(t *testing.T, c *fixture.Case) map[string]any {
			kl, err := metric.SoftmaxKL(c.Inputs["logits_fp"].Floats(), c.Inputs["logits_q"].Floats(), c.Inputs["logits_fp"].Shape[1])
			if err != nil {
				t.Fatal(err)
			}
			return map[string]any{"kl": []float64{kl}}
		},
		"pareto": func(t *testing.T, c *fixture.Case) map[string]any {
			front, err := compress.ParetoFrontier(c.Inputs["size"].Floats(), c.Inputs["sensitivity"].Rows(), c.Params["bits"].Ints(), compress.FrontierOptions{})
			if err != nil {
				t.Fatal(err)
			}
			best, err := compress.AtBudget(front, c.Params["budget_bits"].Float())
			if err != nil {
				t.Fatal(err)
			}
			var size, sens []float64
			for _, p := range front {
				size, sens = append(size, p.Size), append(sens, p.Loss)
			}
			return map[string]any{"frontier_size": size, "frontier_sens": sens, "choice_bits": best.Bits, "best_sens": []float64{best.Loss}}
		},
	})
}

// fixtureNet builds [conv3x3 -> BN -> ReLU]·layers of a case in float64, and the input with channels last.
func fixtureNet(t *testing.T, c *fixture.Case) (*nn.Network, []float64) {
	t.Helper()
	s := c.Inputs["x"].Shape
	b := nn.NewBuilder(0)
	v := b.Image("image", s[2], s[3], s[1])
	pad := c.Params["padding"].Int()
	layers := c.Params["layers"].Int()
	for i := range layers {
		w := c.Inputs[fmt.Sprintf("W%d", i)].Shape
		v = b.Add(fmt.Sprint("conv", i), nn.Conv{Out: w[0], Kernel: w[2:4], Pad: [][2]int{{pad, pad}, {pad, pad}}, NoBias: true}, v)
		v = b.Add(fmt.Sprint("norm", i), nn.BatchNorm{Eps: c.Params["bn_eps"].Float()}, v)
		v = b.Add(fmt.Sprint("act", i), nn.ReLU, v)
	}
	net, err := b.Finish(v)
	if err != nil {
		t.Fatal(err)
	}
	for i := range layers {
		w := c.Inputs[fmt.Sprintf("W%d", i)]
		set := func(node, local string, data []float64, dims ...int) {
			p := net.Param(net.Node(node), local)
			p.Value = tensors.FromFlatDataAndDimensions(data, dims...)
		}
		set(fmt.Sprint("conv", i), "w", toNHWC(w.Floats(), w.Shape), w.Shape[0], w.Shape[2], w.Shape[3], w.Shape[1])
		for local, name := range map[string]string{"w": "gamma", "b": "beta", "mean": "mean", "var": "var"} {
			d := c.Inputs[fmt.Sprint(name, i)].Floats()
			set(fmt.Sprint("norm", i), local, d, len(d))
		}
	}
	return net, toNHWC(c.Inputs["x"].Floats(), s)
}

func toNHWC(x []float64, nchw []int) []float64 {
	out := make([]float64, 0, len(x))
	n, c, hw := nchw[0], nchw[1], nchw[2]*nchw[3]
	for i := range n {
		for p := range hw {
			for k := range c {
				out = append(out, x[(i*c+k)*hw+p])
			}
		}
	}
	return out
}

func toNCHW(x []float64, nchw []int) []float64 {
	out := make([]float64, len(x))
	n, c, hw := nchw[0], nchw[1], nchw[2]*nchw[3]
	for i := range n {
		for p := range hw {
			for k := range c {
				out[(i*c+k)*hw+p] = x[(i*hw+p)*c+k]
			}
		}
	}
	return out
}

func lossAndGradient(t *testing.T, d Distill, net *nn.Network, x []float64) (float64, []float64) {
	t.Helper()
	per := net.Inputs[0].Shape.Size() / net.Inputs[0].Shape.Dimensions[0]
	m, err := d.matcher(enginetest.Backend(), net, len(x)/per)
	if err != nil {
		t.Fatal(err)
	}
	defer m.exec.Finalize()
	loss, grad, err := m.gradient(x)
	if err != nil {
		t.Fatal(err)
	}
	return loss, grad
}

func distilFrom(t *testing.T, d Distill, net *nn.Network, x []float64) (*Distilled, []float64) {
	t.Helper()
	per := net.Inputs[0].Shape.Size() / net.Inputs[0].Shape.Dimensions[0]
	m, err := d.matcher(enginetest.Backend(), net, len(x)/per)
	if err != nil {
		t.Fatal(err)
	}
	defer m.exec.Finalize()
	r, final, err := m.run(context.Background(), x)
	if err != nil {
		t.Fatal(err)
	}
	return r, final
}

// smallResNet is a small residual network with four batch norms whose statistics are those of smooth random images.
func smallResNet(t *testing.T) *nn.Network {
	t.Helper()
	net, err := zoo.ResNet(zoo.ResNetOptions{Size: 8, Channels: 2, Width: 4, StemStride: 1, Classes: 5, Seed: 2})
	if err != nil {
		t.Fatal(err)
	}
	r := rng.New(4, "statistics")
	for _, n := range net.Nodes {
		if _, ok := n.Op.(nn.BatchNorm); ok {
			mean, variance := net.Param(n, "mean").Data(), net.Param(n, "var").Data()
			for i := range mean {
				mean[i], variance[i] = float32(.2*r.NormFloat64()), float32(.3+r.Float64())
			}
			net.SetParam(n, "mean", nn.State, mean, len(mean))
			net.SetParam(n, "var", nn.State, variance, len(variance))
		}
	}
	return net
}

func wide(n int) []float64 {
	x := make([]float64, n)
	r := rng.New(9, "x")
	for i := range x {
		x[i] = r.NormFloat64()
	}
	return x
}

func TestDistillationGradientMatchesDifferences(t *testing.T) {
	net, d := smallResNet(t), Distill{dtype: dtypes.Float64, InputMean: []float64{.1, -.2}, InputStd: []float64{.5, .7}}
	for _, n := range []int{1, 3} {
		x := wide(n * 8 * 8 * 2)
		_, grad := lossAndGradient(t, d, net, x)
		m, err := d.matcher(enginetest.Backend(), net, n)
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range []int{0, 17, 63, len(x) - 1} {
			const h = 1e-5
			y := slices.Clone(x)
			y[i] += h
			up, _, err := m.gradient(y)
			if err != nil {
				t.Fatal(err)
			}
			y[i] -= 2 * h
			down, _, err := m.gradient(y)
			if err != nil {
				t.Fatal(err)
			}
			if want := (up - down) / (2 * h); math.Abs(grad[i]-want) > 1e-5*math.Max(1, math.Abs(want)) {
				t.Errorf("%d images: dL/dx[%d] = %g, differences give %g", n, i, grad[i], want)
			}
		}
		m.exec.Finalize()
	}
}

func TestNoMismatchWhereEveryStatisticIsMet(t *testing.T) {
	// One image whose own statistics become the network's: L and its gradient vanish.
	net := smallResNet(t)
	x := wide(8 * 8 * 2)
	stat := func(v []float64, channels int) (mean, std []float64) {
		mean, std = make([]float64, channels), make([]float64, channels)
		n := float64(len(v) / channels)
		for i, y := range v {
			mean[i%channels] += y / n
		}
		for i, y := range v {
			std[i%channels] += (y - mean[i%channels]) * (y - mean[i%channels]) / (n - 1)
		}
		return mean, std
	}
	d := Distill{dtype: dtypes.Float64}
	d.InputMean, d.InputStd = stat(x, 2)
	for c, v := range d.InputStd {
		d.InputStd[c] = math.Sqrt(v + statEps)
	}
	set := func(n *nn.Node, local string, v []float64) {
		net.Param(n, local).Value = tensors.FromFlatDataAndDimensions(v, len(v))
	}
	for _, n := range net.Nodes { // in order: a norm's statistics change what follows
		if _, ok := n.Op.(nn.BatchNorm); !ok {
			continue
		}
		f := valueOf(t, net, n.In[0], x)
		mean, variance := stat(f, net.Param(n, "mean").Value.Shape().Size())
		set(n, "mean", mean)
		set(n, "var", variance)
	}
	loss, grad := lossAndGradient(t, d, net, x)
	if loss > 1e-16 {
		t.Errorf("L = %g", loss)
	}
	for i, g := range grad {
		if math.Abs(g) > 1e-8 {
			t.Fatalf("dL/dx[%d] = %g", i, g)
		}
	}
}

// valueOf runs the network in float64 on one image.
func valueOf(t *testing.T, net *nn.Network, value string, x []float64) []float64 {
	t.Helper()
	r, err := nn.NewRunner(enginetest.Backend(), net, nn.RunOptions{DType: dtypes.Float64, Taps: []string{value}})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Finalize()
	dims := slices.Clone(net.Inputs[0].Shape.Dimensions)
	dims[0] = 1
	out, err := r.Run(tensors.FromFlatDataAndDimensions(slices.Clone(x), dims...))
	if err != nil {
		t.Fatal(err)
	}
	return nn.Float64s(out[1])
}

func TestMismatchIsAMeanOverImages(t *testing.T) {
	net, d := smallResNet(t), Distill{dtype: dtypes.Float64, Batch: 2}
	x := wide(3 * 8 * 8 * 2)
	once, _ := distilFrom(t, Distill{dtype: dtypes.Float64, Steps: -1}, net, x)
	twice, _ := distilFrom(t, Distill{dtype: dtypes.Float64, Steps: -1, Batch: 4}, net, append(slices.Clone(x), x...))
	if a, b := once.Trace[0], twice.Trace[0]; math.Abs(a-b) > 1e-12*a {
		t.Errorf("L = %g, and %g of the batch repeated", a, b)
	}
	// Images in portions move as in one.
	d.Steps = 5
	whole := d
	whole.Batch = 3
	a, xa := distilFrom(t, d, net, x)
	b, xb := distilFrom(t, whole, net, x)
	for i := range a.Trace {
		if math.Abs(a.Trace[i]-b.Trace[i]) > 1e-9*a.Trace[i] {
			t.Errorf("step %d: %g in portions, %g in one", i, a.Trace[i], b.Trace[i])
		}
	}
	for i := range xa {
		if math.Abs(xa[i]-xb[i]) > 1e-7 {
			t.Fatalf("x[%d] = %g in portions, %g in one", i, xa[i], xb[i])
		}
	}
}

func TestDistillationLeavesTheNetworkAlone(t *testing.T) {
	net := smallResNet(t)
	before := net.Clone()
	r, err := Distill{Steps: 30, LR: .1}.Run(context.Background(), enginetest.Backend(), net, 3)
	if err != nil {
		t.Fatal(err)
	}
	if first, last := r.Trace[0], r.Trace[len(r.Trace)-1]; len(r.Trace) != 31 || !(last < .5*first) || r.Norms != 9 {
		t.Errorf("L from %g to %g in %d steps over %d norms", first, last, len(r.Trace)-1, r.Norms)
	}
	if l, err := (Distill{}).Mismatch(context.Background(), enginetest.Backend(), net, r.X); err != nil || math.Abs(l-r.Trace[30]) > 1e-4*l {
		t.Errorf("the result's mismatch is %g (%v), the trace ends at %g", l, err, r.Trace[30])
	}
	for p := range before.Params.All() {
		a, b := p.Value, net.Params.Get(p.Name).Value
		same := false
		if err := a.ConstBytes(func(x []byte) { _ = b.ConstBytes(func(y []byte) { same = bytes.Equal(x, y) }) }); err != nil || !same {
			t.Errorf("parameter %q is not what it was", p.Name)
		}
	}
	again, err := Distill{Steps: 30, LR: .1}.Run(context.Background(), enginetest.Backend(), net, 3)
	if err != nil || !slices.Equal(again.Trace, r.Trace) {
		t.Error("the same seed gives another run")
	}
}

func TestDistillationStopsAndSlowsDown(t *testing.T) {
	net := smallResNet(t)
	full, err := Distill{Steps: 40, LR: .1}.Run(context.Background(), enginetest.Backend(), net, 2)
	if err != nil {
		t.Fatal(err)
	}
	at := full.Trace[10] / float64(full.Norms+1)
	r, err := Distill{Steps: 40, LR: .1, StopAt: at}.Run(context.Background(), enginetest.Backend(), net, 2)
	if err != nil || len(r.Trace) > 13 {
		t.Errorf("%d steps (%v); want an end after step 11", len(r.Trace)-1, err)
	}
	p := plateau{rate: 1, patience: 2, least: .05}
	var rates []float64
	for _, l := range []float64{5, 4, 4, 4, 4, 3, 3, 3, 3, 3, 3, 3} {
		p.after(l)
		rates = append(rates, p.rate)
	}
	if want := []float64{1, 1, 1, 1, .1, .1, .1, .1, .05, .05, .05, .05}; !slices.EqualFunc(rates, want, func(a, b float64) bool { return math.Abs(a-b) < 1e-12 }) {
		t.Errorf("rates %v, want %v", rates, want)
	}
}

func TestDistillationOfOddNetworks(t *testing.T) {
	ctx, be := context.Background(), enginetest.Backend()
	// Dense layers with batch norm: values without space.
	b := nn.NewBuilder(3)
	x := b.Input("x", shapes.Make(dtypes.Float32, 1, 6))
	h := b.Add("norm", nn.BatchNorm{}, b.Add("fc1", nn.Dense{Out: 4}, x))
	flat, err := b.Finish(b.Add("fc2", nn.Dense{Out: 3}, b.Add("act", nn.ReLU, h)))
	if err != nil {
		t.Fatal(err)
	}
	// Channels first, as from ONNX; a channel of variance 0; one channel; one pixel.
	b = nn.NewBuilder(3)
	x = b.Input("x", shapes.Make(dtypes.Float32, 1, 1, 6, 6))
	h = b.Add("last", nn.Transpose{Perm: []int{0, 2, 3, 1}}, x)
	h = b.Add("norm1", nn.BatchNorm{}, b.Add("conv1", nn.Conv2D(3, 3, 1), h))
	h = b.Add("norm2", nn.BatchNorm{}, b.Add("conv2", nn.Conv{Out: 2, Kernel: []int{6, 6}}, b.Add("act", nn.ReLU, h)))
	first, err := b.Finish(b.Add("fc", nn.Dense{Out: 3}, b.Add("pool", nn.GlobalAveragePool, h)))
	if err != nil {
		t.Fatal(err)
	}
	n := first.Node("norm1")
	first.SetParam(n, "var", nn.State, []float32{0, 1, 1}, 3)
	if axis := channelAxis(first, "x"); axis != 1 {
		t.Errorf("channels of x lie on axis %d", axis)
	}
	for name, net := range map[string]*nn.Network{"dense": flat, "channels first": first} {
		for _, images := range []int{1, 3} {
			r, err := Distill{Steps: 40, LR: 2e-3, Batch: 2}.Run(ctx, be, net, images)
			if err != nil {
				t.Fatal(name, err)
			}
			if r.X.Len() != images || !(slices.Min(r.Trace) < r.Trace[0]) {
				t.Errorf("%s: %d images, L from %g to %g", name, r.X.Len(), r.Trace[0], r.Trace[40])
			}
		}
		if _, err := (ZeroQ{Images: 2, Distill: Distill{Steps: 3}}).Compress(ctx, be, net, nil); err != nil {
			t.Error(name, err)
		}
	}
}

func TestZeroQRefuses(t *testing.T) {
	ctx, be := context.Background(), enginetest.Backend()
	vit := smallViT(t, nil)
	quick := Distill{Steps: 2}
	_, err := ZeroQ{Distill: quick}.Compress(ctx, be, vit, nil)
	if !errors.Is(err, ErrNoBatchNorm) || !strings.Contains(err.Error(), "give examples") {
		t.Errorf("a transformer without examples: %v", err)
	}
	if r, err := (ZeroQ{}).Compress(ctx, be, vit, images(4, 8, 8, 1)); err != nil || !strings.Contains(strings.Join(r.Notes, " "), "4 examples given") {
		t.Errorf("a transformer with examples: %v", err)
	}
	for name, v := range map[string]float32{"negative": -1, "NaN": float32(math.NaN())} {
		bad := smallResNet(t)
		n := bad.Node("stage.1.0.conv2.norm")
		vars := bad.Param(n, "var").Data()
		vars[1] = v
		bad.SetParam(n, "var", nn.State, vars, len(vars))
		if _, err := (ZeroQ{Distill: quick}).Compress(ctx, be, bad, nil); err == nil || !strings.Contains(err.Error(), n.Name) {
			t.Errorf("%s variance: %v", name, err)
		}
	}
	net := smallResNet(t)
	for name, z := range map[string]ZeroQ{
		"bits":             {WeightBits: 9},
		"activation bits":  {ActBits: 16},
		"choices":          {Budget: 4, Choices: []int{4, 4}},
		"choice":           {Budget: 4, Choices: []int{1, 4}},
		"budget":           {Budget: -1},
		"NaN budget":       {Budget: math.NaN()},
		"data":             {Data: "dreams"},
		"no given data":    {Data: GivenData},
		"images":           {Images: -2},
		"rate":             {Distill: Distill{LR: -1}},
		"statistics":       {Distill: Distill{InputMean: []float64{1, 2, 3}}},
		"input range":      {Distill: Distill{InputRange: []float64{1, 0}}},
		"half a range":     {Distill: Distill{InputRange: []float64{1}}},
		"deviation":        {Distill: Distill{InputStd: []float64{-1}}},
		"unknown override": {Options: compress.Options{Bits: map[string]compress.Bits{"none": {Weight: 4}}}},
		"nothing selected": {Options: compress.Options{Select: func(*nn.Node) bool { return false }}},
	} {
		z.Distill.Steps = 2
		if _, err := z.Compress(ctx, be, net, nil); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if _, err := (Distill{}).Run(ctx, be, net, 0); err == nil {
		t.Error("no images: no error")
	}
	_, err = ZeroQ{Budget: 1.5, Images: 2, Distill: quick}.Compress(ctx, be, net, nil)
	if !errors.Is(err, compress.ErrInfeasible) || !strings.Contains(err.Error(), "takes") {
		t.Errorf("a budget below the narrowest choice: %v", err)
	}
	x, err := Distill{LR: 1e30, Steps: 20}.Run(ctx, be, net, 1)
	if err == nil || !strings.Contains(err.Error(), "lower rate") {
		t.Errorf("a run that explodes: %v, %v", x, err)
	}
	r, err := ZeroQ{Images: 2, Distill: quick}.Compress(ctx, be, net, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := (ZeroQ{Images: 2, Distill: quick}).Compress(ctx, be, r.Network, nil); err == nil || !strings.Contains(err.Error(), "already") {
		t.Errorf("a network that is quantised already: %v", err)
	}
}

func TestAsymmetricGrid(t *testing.T) {
	r := rng.New(3, "grid")
	for range 200 {
		lo := 4 * r.NormFloat64()
		hi := lo + 5*r.Float64()
		bits := 2 + r.IntN(7)
		a := Asymmetric{bits, lo, hi}
		step := max(hi-lo, 1e-8) / float64(int(1)<<bits-1)
		for range 20 {
			x := lo + (hi-lo)*r.Float64()
			if d := math.Abs(a.Value(x) - x); d > step*(1+1e-12) {
				t.Fatalf("%+v moves %g by %g, a step is %g", a, x, d, step)
			}
		}
		x := []float32{float32(lo), float32(hi), float32((lo + hi) / 2), float32(.3*lo + .7*hi)}
		g, err := CalibrateUniform(x, []int{1, 4}, 0, bits, FullRange())
		if err != nil {
			t.Fatal(err)
		}
		got, err := g.FakeQuant(x, []int{1, 4})
		if err != nil {
			t.Fatal(err)
		}
		for i, v := range x { // the stored grid is the same one in float32
			if d := math.Abs(float64(got[i]) - float64(v)); d > 1.001*step+1e-5*math.Abs(lo) {
				t.Errorf("%+v moves %g by %g", a, v, d)
			}
		}
	}
	// A filter whose weights are all alike is stored as it is.
	for _, v := range []float32{.37, -.37, 0, 1e-9} {
		x := []float32{v, v, v, v}
		g, err := CalibrateUniform(x, []int{1, 4}, 0, 8, FullRange())
		if err != nil {
			t.Fatal(err)
		}
		got, err := g.FakeQuant(x, []int{1, 4})
		if err != nil || math.Abs(float64(got[0]-v)) > 1e-8 {
			t.Errorf("the constant %g becomes %g (%v)", v, got[0], err)
		}
	}
}

func TestZeroQMixedPrecision(t *testing.T) {
	ctx, be := context.Background(), enginetest.Backend()
	net := smallResNet(t)
	z := ZeroQ{Images: 4, Budget: 4, Distill: Distill{Steps: 20, LR: .1}}
	for _, fold := range []bool{false, true} {
		z.Fold = fold
		r, p, err := z.Run(ctx, be, net, nil)
		if err != nil {
			t.Fatal(err)
		}
		if len(p.Effects) != len(net.Sites()) || len(p.Frontier) < 3 {
			t.Fatalf("%d sites, %d points", len(p.Effects), len(p.Frontier))
		}
		bits, weights := 0, 0
		for _, s := range r.Sites {
			n := 1
			for _, d := range s.Shape {
				n *= d
			}
			bits += n * s.WeightBits
			weights += n
			if s.WeightBits != p.Bits[s.Name] || s.InputBits != 8 {
				t.Errorf("%s has W%dA%d, chosen %d", s.Name, s.WeightBits, s.InputBits, p.Bits[s.Name])
			}
		}
		if got := float64(bits) / float64(weights); got > 4 || got < 2 || float64(bits) != p.Chosen.Size {
			t.Errorf("%g bits per weight, planned %g", got, p.Chosen.Size/float64(weights))
		}
		norms := 0
		for _, n := range r.Network.Nodes {
			if _, ok := n.Op.(nn.BatchNorm); ok {
				norms++
			}
		}
		if (norms > 0) == fold {
			t.Errorf("%d batch norms are left", norms)
		}
		for _, e := range p.Effects {
			for _, f := range e.Effects {
				if f.KL < 0 {
					t.Errorf("a divergence of %g", f.KL)
				}
			}
		}
	}
	// Overridden and unselected sites take no part.
	z.Bits = map[string]compress.Bits{"stem": {Weight: 6}}
	z.Select = func(n *nn.Node) bool { return n.Name != "head" }
	r, p, err := z.Run(ctx, be, net, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range r.Sites {
		want := p.Bits[s.Name]
		switch s.Name {
		case "stem":
			want = 6
		case "head":
			want = 32
		}
		if s.WeightBits != want || want == 0 {
			t.Errorf("%s has %d bits, want %d", s.Name, s.WeightBits, want)
		}
	}
}

func TestSensitivityIsZeroForWeightsOnTheGrid(t *testing.T) {
	net := smallResNet(t)
	for _, n := range net.Sites() {
		p := net.Param(n, "w")
		w := p.Data()
		for i := range w {
			w[i] = float32(i % 4) // 2-bit codes
		}
		if err := p.SetData(w); err != nil {
			t.Fatal(err)
		}
	}
	_, p, err := ZeroQ{Images: 2, Budget: 8, Data: GaussianNoise}.Run(context.Background(), enginetest.Backend(), net, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range p.Effects {
		if e.Effects[0].KL != 0 || e.Effects[0].MSE != 0 {
			t.Errorf("%s: %+v at 2 bits", e.Site, e.Effects[0])
		}
	}
	if p.Chosen.Size != 2*float64(p.Weights) {
		t.Errorf("chosen %+v where 2 bits lose nothing", p.Chosen)
	}
}

func TestRangesOfSyntheticImages(t *testing.T) {
	net := smallResNet(t)
	r, p, err := ZeroQ{Images: 3, Distill: Distill{Steps: 10, LR: .1, InputRange: []float64{-.4, .6}}}.Run(context.Background(), enginetest.Backend(), net, nil)
	if err != nil {
		t.Fatal(err)
	}
	ranges, err := compress.Ranges(context.Background(), enginetest.Backend(), r.Reference, p.Data, 4, "stage.2.0.act2", "image")
	if err != nil {
		t.Fatal(err)
	}
	if ranges[1].Lo < -.4 || ranges[1].Hi > .6 {
		t.Errorf("images range from %g to %g", ranges[1].Lo, ranges[1].Hi)
	}
	checked := 0
	for _, n := range r.Network.Nodes {
		d, ok := n.Op.(nn.QuantizeDequantize)
		if !ok {
			continue
		}
		scale, zero := float64(r.Network.Param(n, "scale").Data()[0]), float64(r.Network.Param(n, "zero").Data()[0])
		lo, hi := -zero*scale, (255-zero)*scale
		if d.Bits != 8 || lo > 0 || hi < 0 {
			t.Errorf("%s covers %g to %g", n.Name, lo, hi)
		}
		if strings.HasPrefix(n.Name, "image") { // has the range that was given
			checked++
			if math.Abs(lo+.4) > .005 || math.Abs(hi-.6) > .005 {
				t.Errorf("the input gets the range from %g to %g", lo, hi)
			}
		}
		if strings.HasPrefix(n.Name, "pool") { // what is averaged bounds the average
			checked++
			if math.Abs(hi-float64(ranges[0].Hi)) > 1e-4*hi {
				t.Errorf("the pooled features get the range to %g, what is pooled goes to %g", hi, ranges[0].Hi)
			}
		}
	}
	if checked != 2 {
		t.Errorf("%d quantisers of the input and of pooled features", checked)
	}
}

func TestZeroQGoesOnWhereItWas(t *testing.T) {
	net, ctx := smallResNet(t), context.Background()
	dir := t.TempDir()
	open := func() compress.Options {
		j, err := compress.OpenJournal(dir)
		if err != nil {
			t.Fatal(err)
		}
		return compress.Options{Journal: j}
	}
	steps := 0
	z := ZeroQ{Options: open(), Images: 2, Budget: 4, Distill: Distill{Steps: 5, Progress: func(int, int, float64) { steps++ }}}
	a, err := z.Compress(ctx, enginetest.Backend(), net, nil)
	if err != nil {
		t.Fatal(err)
	}
	z.Options = open()
	b, err := z.Compress(ctx, enginetest.Backend(), net, nil)
	if err != nil {
		t.Fatal(err)
	}
	if steps != 5 {
		t.Errorf("%d steps in two runs; want 5", steps)
	}
	x := images(4, 8, 8, 2)
	if !slices.Equal(outputs(t, a.Network, x), outputs(t, b.Network, x)) {
		t.Error("the second run gives another network")
	}
}

// Channels of one sign have zero points far from the codes; the file holds bytes (or nibbles) all the same.
func TestZeroQExportsSmallFiles(t *testing.T) {
	net := smallResNet(t)
	p := net.Param(net.Node("stage.1.0.conv1"), "w")
	w := p.Data()
	for i := range w[:len(w)/2] {
		w[i] = 1 + .01*w[i]
	}
	if err := p.SetData(w); err != nil {
		t.Fatal(err)
	}
	for _, z := range []ZeroQ{{WeightBits: 8}, {WeightBits: 4, Fold: true}} {
		z.Images, z.Distill = 2, Distill{Steps: 5, LR: .1}
		r, err := z.Compress(context.Background(), enginetest.Backend(), net, nil)
		if err != nil {
			t.Fatal(err)
		}
		file, err := onnx.Marshal(r.Network, onnx.WriteOptions{Opset: 21})
		if err != nil {
			t.Fatal(err)
		}
		plain, err := onnx.Marshal(net, onnx.WriteOptions{Opset: 21})
		if err != nil {
			t.Fatal(err)
		}
		weights := 0
		for _, s := range r.Sites {
			weights += int(s.FloatBytes) / 4
		}
		if saved := len(plain) - len(file); saved < (4-z.WeightBits/8)*weights/2 {
			t.Errorf("%d bits: %d bytes, %d in float, %d weights", z.WeightBits, len(file), len(plain), weights)
		}
		back, err := onnx.Read(file, onnx.Options{})
		if err != nil {
			t.Fatal(err)
		}
		x := images(4, 8, 8, 2)
		if e := compress.RelativeError(outputs(t, r.Network, x), outputs(t, back, x)); e > 1e-6 {
			t.Errorf("%d bits: the file's network differs by %g", z.WeightBits, e)
		}
	}
}

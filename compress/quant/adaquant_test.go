package quant

import (
	"context"
	"errors"
	"maps"
	"math"
	"slices"
	"testing"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/engine/native"
	"github.com/lathe-ml/lathe/internal/fixture"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/onnx"
	"github.com/lathe-ml/lathe/nn/zoo"
)

func TestFixturesAdaQuant(t *testing.T) {
	fixture.Run(t, 47, map[string]fixture.Func{
		"minmax": func(t *testing.T, c *fixture.Case) map[string]any {
			x := c.Inputs["x"]
			if c.Params["kind"].String() == "rows" {
				r, m, err := RowRanges(x.Floats(), x.Shape[0])
				if err != nil {
					t.Fatal(err)
				}
				return map[string]any{"range": r, "zero_point": m}
			}
			r, m, err := MeanRange(x.Floats(), x.Shape[0])
			if err != nil {
				t.Fatal(err)
			}
			return map[string]any{"range": []float64{r}, "zero_point": []float64{m}}
		},
		"fake_quant": func(t *testing.T, c *fixture.Case) map[string]any {
			exec, err := engine.NewExec(enginetest.Backend(), func(in []*graph.Node) []*graph.Node {
				y := FakeQuantRange(in[0], in[1], in[2], c.Params["bits"].Int())
				return append([]*graph.Node{y}, graph.Gradient(graph.ReduceAllSum(graph.Mul(y, in[3])), in[0], in[1], in[2])...)
			})
			if err != nil {
				t.Fatal(err)
			}
			defer exec.Finalize()
			var args []any
			for _, k := range []string{"x", "range", "zero_point", "grad_out"} {
				args = append(args, c.Inputs[k].Tensor(dtypes.Float64))
			}
			out, err := exec.Call(args...)
			if err != nil {
				t.Fatal(err)
			}
			return map[string]any{"x_q": out[0], "grad_x": out[1], "grad_range": out[2], "grad_zero_point": out[3]}
		},
		"adaquant": fixtureAdaQuant,
		"bn_tune_fold": func(t *testing.T, c *fixture.Case) map[string]any {
			target := BNTarget{Gamma: c.Inputs["gamma"].Floats(), Beta: c.Inputs["beta"].Floats(), Eps: c.Params["eps"].Float()}
			mean, variance := channelMoments(c.Inputs["y"].Floats(), len(target.Gamma))
			k, bias, err := target.Fold(c.Inputs["bias"].Floats(), mean, variance)
			if err != nil {
				t.Fatal(err)
			}
			w := c.Inputs["W"].Floats()
			for i := range w {
				w[i] *= k[i/c.Inputs["W"].Shape[1]]
			}
			return map[string]any{"bn_weight": target.Weight(), "mean": mean, "var": variance, "W": w, "bias": bias}
		},
		"bias_correction": func(t *testing.T, c *fixture.Case) map[string]any {
			b, err := BiasCorrection(c.Inputs["bias"].Floats(), c.Inputs["y_float"].Floats(), c.Inputs["y_quant"].Floats())
			if err != nil {
				t.Fatal(err)
			}
			return map[string]any{"bias": b}
		},
		"ip_allocate": func(t *testing.T, c *fixture.Case) map[string]any {
			a, err := compress.AllocateBits(c.Inputs["size"].Floats(), c.Inputs["delta_loss"].Rows(), c.Params["bits"].Ints(), c.Params["budget_bits"].Float())
			if err != nil {
				t.Fatal(err)
			}
			return map[string]any{"choice_bits": a.Bits, "loss": []float64{a.Loss}, "memory_bits": []float64{a.Size}}
		},
	})
}

func fixtureAdaQuant(t *testing.T, c *fixture.Case) map[string]any {
	var lr struct{ W, B, Qin, Qw float64 }
	if err := c.Params["lr"].Decode(&lr); err != nil {
		t.Fatal(err)
	}
	x, y := c.Inputs["X"].Tensor(dtypes.Float64), c.Inputs["Y"].Tensor(dtypes.Float64)
	rows := c.Inputs["W"].Shape[0]
	net := &nn.Network{Inputs: []nn.Input{{Name: "in", Shape: x.Shape()}}, Outputs: []string{"fc"}}
	n := &nn.Node{Name: "fc", Op: nn.Dense{Out: rows}, In: []string{"in"}, Out: []string{"fc"}, P: map[string]string{}}
	net.Nodes = []*nn.Node{n}
	net.SetParam(n, "w", nn.Weight, c.Inputs["W"].Float32s(), c.Inputs["W"].Shape...)
	net.SetParam(n, "b", nn.Bias, c.Inputs["bias"].Float32s(), rows)
	site, rates, err := rangedSite(net, n, x, compress.Bits{Weight: c.Params["weight_bits"].Int(), Act: c.Params["act_bits"].Int()},
		AdaRates{Weight: lr.W, Bias: lr.B, InputRange: lr.Qin, WeightRange: lr.Qw})
	if err != nil {
		t.Fatal(err)
	}
	wr, wm, err := RowRanges(c.Inputs["W"].Floats(), rows)
	if err != nil {
		t.Fatal(err)
	}
	xr, xm, err := MeanRange(c.Inputs["X"].Floats(), c.Inputs["X"].Shape[0])
	if err != nil {
		t.Fatal(err)
	}
	for name, v := range map[string][]float64{
		"y.w": c.Inputs["W"].Floats(), "y.b": c.Inputs["bias"].Floats(), "y.range": wr, "y.min": wm, "x.ranged.range": {xr}, "x.ranged.min": {xm},
	} {
		p := site.Params.Get(name)
		p.Value = tensors.FromFlatDataAndDimensions(v, p.Value.Shape().Dimensions...)
	}
	f := NewSiteFitter(enginetest.Backend())
	defer f.Close()
	tr, err := f.Fit(t.Context(), site, x, y, SiteFit{Iterations: c.Params["iters"].Int(), Rates: rates, DType: dtypes.Float64})
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]any{"loss": append(slices.Clone(tr.Loss), tr.End)}
	for name, p := range map[string]string{"W": "y.w", "bias": "y.b", "in_range": "x.ranged.range", "in_zero_point": "x.ranged.min", "w_range": "y.range", "w_zero_point": "y.min"} {
		out[name] = site.Params.Get(p).Value
	}
	return out
}

func TestFakeQuantRangeKeepsZeroAndStaysWithinHalfAStep(t *testing.T) {
	for _, bits := range []int{2, 4, 8} {
		for _, m := range []float64{0, -.3, -2} {
			const r = 2.
			s := r / float64(int(1)<<bits-1)
			x := []float64{0}
			for v := m; v <= m+r; v += r / 97 {
				x = append(x, v)
			}
			exec, err := engine.NewExec(enginetest.Backend(), func(in []*graph.Node) []*graph.Node {
				return []*graph.Node{FakeQuantRange(in[0], in[1], in[2], bits)}
			})
			if err != nil {
				t.Fatal(err)
			}
			out, err := exec.Call(x, []float64{r}, []float64{m})
			if err != nil {
				t.Fatal(err)
			}
			y := nn.Float64s(out[0])
			exec.Finalize()
			if y[0] != 0 {
				t.Errorf("%d bits from %g: zero becomes %g", bits, m, y[0])
			}
			grid, err := RangeGrid([]float64{r}, []float64{m}, bits, -1)
			if err != nil {
				t.Fatal(err)
			}
			stored, err := grid.FakeQuant(narrow(x), []int{len(x)})
			if err != nil {
				t.Fatal(err)
			}
			lo, hi := -grid.Zero[0]*s, (float64(grid.Max())-grid.Zero[0])*s
			for i, v := range x {
				if v >= lo && v <= hi && math.Abs(y[i]-v) > s/2+1e-9 {
					t.Errorf("%d bits from %g: %g becomes %g, more than half of %g away", bits, m, v, y[i], s)
				}
				if d := math.Abs(float64(stored[i]) - y[i]); d > 1e-6 && math.Abs(math.Abs(v/s-math.Round(v/s))-.5) > 1e-4 {
					t.Errorf("%d bits from %g: %g is stored as %g and trained as %g", bits, m, v, stored[i], y[i])
				}
			}
		}
	}
}

// mobileNet is a small network with batch norms, a depthwise convolution and a layer without bias.
func mobileNet(t *testing.T) *nn.Network {
	t.Helper()
	b := nn.NewBuilder(5)
	x := b.Input("image", shapes.Make(dtypes.Float32, 1, 8, 8, 3))
	add := func(name string, op nn.Op, in ...string) string { return b.Add(name, op, in...) }
	x = add("stem.act", nn.ReLU, add("stem.norm", nn.BatchNorm{}, add("stem", nn.Conv2D(8, 3, 1), x)))
	depth := nn.Conv2D(8, 3, 2)
	depth.Groups, depth.NoBias = 8, true
	x = add("depth.act", nn.ReLU, add("depth.norm", nn.BatchNorm{}, add("depth", depth, x)))
	point := nn.Conv2D(6, 1, 1)
	point.NoBias = true
	x = add("point.act", nn.ReLU, add("point", point, x))
	net, err := b.Finish(add("head", nn.Dense{Out: 4}, add("pool", nn.GlobalAveragePool, x)))
	if err != nil {
		t.Fatal(err)
	}
	r := rng.New(6, "statistics")
	for _, n := range net.Nodes {
		if _, ok := n.Op.(nn.BatchNorm); !ok {
			continue
		}
		for _, local := range []string{"w", "b", "mean", "var"} {
			p := net.Param(n, local)
			d := p.Data()
			for i := range d {
				d[i] += float32(.4 * r.Float64())
			}
			if err := p.SetData(d); err != nil {
				t.Fatal(err)
			}
		}
	}
	return net
}

func networkError(t *testing.T, ref, net *nn.Network, x compress.Examples) float64 {
	t.Helper()
	return compress.RelativeError(outputs(t, ref, x), outputs(t, net, x))
}

func TestAdaQuantBeatsItsStart(t *testing.T) {
	x := images(24, 8, 8, 3)
	net := mobileNet(t)
	q := AdaQuant{WeightBits: 3, ActBits: 4, EdgeBits: 4, Tune: TuneNone, SkipSiteErrors: true}
	e := map[string]float64{}
	for name, c := range map[string]func(*AdaQuant){
		"start":      func(q *AdaQuant) { q.Iterations = -1 },
		"parallel":   func(q *AdaQuant) { q.Parallel = true },
		"sequential": func(q *AdaQuant) {},
		"last":       func(q *AdaQuant) { q.LastIterate = true },
	} {
		m := q
		m.Batch, m.Iterations = 10, 40
		c(&m)
		r, err := m.Compress(t.Context(), enginetest.Backend(), net, x)
		if err != nil {
			t.Fatal(name, err)
		}
		e[name] = networkError(t, net, r.Network, x)
	}
	if !(e["sequential"] < .8*e["start"] && e["last"] < .8*e["start"] && e["parallel"] < e["start"]) {
		t.Errorf("errors %v", e)
	}
}

func TestWithoutIterationsAdaQuantIsMinMax(t *testing.T) {
	x := images(8, 8, 8, 3)
	net := mobileNet(t)
	r, err := AdaQuant{WeightBits: 4, ActBits: 8, Iterations: -1, Tune: TuneNone}.Compress(t.Context(), enginetest.Backend(), net, x)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range r.Sites {
		if s.InputBits != 8 || !(s.OutputErr < .1) {
			t.Errorf("site %+v", s)
		}
		n := r.Network.Node(s.Name)
		u := n.Op.(nn.Linear).Repr().(Uniform)
		got, err := u.Grid(r.Network, n)
		if err != nil {
			t.Fatal(err)
		}
		w := r.Reference.Param(r.Reference.Node(s.Name), "w")
		lo, hi, err := rowExtremes(w.Data(), len(got.Scale))
		if err != nil {
			t.Fatal(err)
		}
		for i := range lo {
			scale, zero := RangeAffine(float32(lo[i]), float32(hi[i]), u.Bits)
			if math.Abs(got.Scale[i]-scale) > 1e-6*scale || got.Zero[i] != zero {
				t.Errorf("%s row %d: scale %g and zero %g, want %g and %g", s.Name, i, got.Scale[i], got.Zero[i], scale, zero)
			}
		}
	}
}

func TestKeepBestNeverEndsAboveItsStart(t *testing.T) {
	net := mobileNet(t)
	if _, err := FoldBatchNorm(net); err != nil {
		t.Fatal(err)
	}
	x := images(7, 8, 8, 3)[0]
	n := net.Sites()[0]
	y, err := runSite(enginetest.Backend(), net, n, x)
	if err != nil {
		t.Fatal(err)
	}
	f := NewSiteFitter(enginetest.Backend())
	defer f.Close()
	for _, rate := range []float64{1e-3, .3, 1e4} { // the last two diverge
		site, rates, err := rangedSite(net, n, x, compress.Bits{Weight: 8, Act: 8}, AdaRates{Weight: rate, Bias: rate, InputRange: rate, WeightRange: rate})
		if err != nil {
			t.Fatal(err)
		}
		tr, err := f.Fit(t.Context(), site, x, y, SiteFit{Iterations: 10, Batch: 3, Rates: rates, KeepBest: true})
		if err != nil || !(tr.End <= tr.Start) {
			t.Errorf("rate %g: from %g to %g, error %v", rate, tr.Start, tr.End, err)
		}
		again, err := f.Fit(t.Context(), site, x, y, SiteFit{Batch: 3, Rates: rates})
		if err != nil || math.Abs(again.Start-tr.End) > 1e-6*tr.End {
			t.Errorf("rate %g: the kept parameters have loss %g, reported %g (%v)", rate, again.Start, tr.End, err)
		}
	}
	if len(f.fits) != 3 {
		t.Errorf("%d compiled fits for three sets of rates", len(f.fits))
	}
}

func TestBatchNormTuningRestoresStatistics(t *testing.T) {
	net := mobileNet(t)
	x := images(16, 8, 8, 3)
	ref := net.Clone()
	targets, err := FoldBatchNorm(ref)
	if err != nil || len(targets) != 2 || targets["stem"].Gamma == nil {
		t.Fatal(targets, err)
	}
	moments := func(net *nn.Network, site string) (mean, variance []float64) {
		v, _, err := compress.Capture(t.Context(), enginetest.Backend(), net, x, 0, net.Node(site).Out[0])
		if err != nil {
			t.Fatal(err)
		}
		return channelMoments(v[0], len(targets[site].Gamma))
	}
	r, err := AdaQuant{WeightBits: 2, Iterations: -1, Tune: TuneNone}.Compress(t.Context(), enginetest.Backend(), net, x)
	if err != nil {
		t.Fatal(err)
	}
	if err := TuneBN(t.Context(), enginetest.Backend(), r.Network, x, targets, BNOptions{}); err != nil {
		t.Fatal(err)
	}
	for name, target := range targets {
		mean, variance := moments(r.Network, name)
		for c := range mean {
			if math.Abs(mean[c]-target.Beta[c]) > 1e-4 || math.Abs(variance[c]-target.Gamma[c]*target.Gamma[c]) > 1e-4 {
				t.Errorf("%s channel %d: mean %g and variance %g, want %g and %g", name, c, mean[c], variance[c], target.Beta[c], target.Gamma[c]*target.Gamma[c])
			}
		}
	}
	// A network that has the statistics already does not change.
	same := r.Network.Clone()
	if err := TuneBN(t.Context(), enginetest.Backend(), same, x, targets, BNOptions{}); err != nil {
		t.Fatal(err)
	}
	if e := networkError(t, r.Network, same, x); e > 1e-8 {
		t.Errorf("tuning again changes the output by %g", e)
	}
	if err := TuneBN(t.Context(), enginetest.Backend(), same, x, targets, BNOptions{Momentum: .1, Batch: 4}); err != nil {
		t.Fatal(err)
	}
	if e := networkError(t, r.Network, same, x); e > .1 {
		t.Errorf("a running average over the same statistics changes the output by %g", e)
	}
}

func TestBatchNormTargetFolds(t *testing.T) {
	target := BNTarget{Gamma: []float64{2, .5}, Beta: []float64{-1, .25}}
	k, b, err := target.Fold([]float64{.1, .2}, []float64{-1, .25}, []float64{4, .25})
	if err != nil || math.Abs(k[0]-1) > 1e-6 || math.Abs(k[1]-1) > 1e-6 || math.Abs(b[0]-.1) > 1e-6 || math.Abs(b[1]-.2) > 1e-6 {
		t.Errorf("perfect statistics give factors %v and biases %v (%v)", k, b, err)
	}
	k, _, err = target.Fold([]float64{0, 0}, []float64{0, 0}, []float64{0, 0})
	if err != nil || !finite(k[0]) {
		t.Errorf("a dead channel gives %v, %v", k, err)
	}
	for name, bad := range map[string]BNTarget{
		"no gains": {}, "zero gains": {Gamma: []float64{0, 0}, Beta: []float64{0, 0}}, "ragged": {Gamma: []float64{1}, Beta: []float64{0, 0}},
		"NaN": {Gamma: []float64{math.NaN()}, Beta: []float64{0}},
	} {
		if bad.Check() == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestBiasCorrectionRestoresMeans(t *testing.T) {
	net := mobileNet(t)
	x := images(16, 8, 8, 3)
	r, err := AdaQuant{WeightBits: 2, ActBits: 3, Iterations: -1, Tune: TuneCorrection}.Compress(t.Context(), enginetest.Backend(), net, x)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range r.Sites {
		var m [2][]float64
		for i, net := range []*nn.Network{r.Reference, r.Network} {
			v, d, err := compress.Capture(t.Context(), enginetest.Backend(), net, x, 0, net.Node(s.Name).Out[0])
			if err != nil {
				t.Fatal(err)
			}
			m[i], _ = channelMoments(v[0], d[0][len(d[0])-1])
		}
		for c := range m[0] {
			if math.Abs(m[0][c]-m[1][c]) > 1e-5 {
				t.Errorf("%s channel %d: mean %g, want %g", s.Name, c, m[1][c], m[0][c])
			}
		}
	}
}

func TestBiasTuningLowersTheDivergence(t *testing.T) {
	net := smallViT(t, nil)
	x := images(12, 8, 8, 1)
	r, err := AdaQuant{WeightBits: 3, ActBits: 4, Iterations: -1}.Compress(t.Context(), enginetest.Backend(), net, x)
	if err != nil {
		t.Fatal(err)
	}
	codes := r.Network.Param(r.Network.Sites()[1], "q").Value
	before, after, err := TuneBias(t.Context(), enginetest.Backend(), r.Reference, r.Network, x, BiasTuning{Epochs: 2, Passes: 4})
	if err != nil || !(after < before) {
		t.Fatalf("divergence from %g to %g: %v", before, after, err)
	}
	a, err := compress.Compare(outputs(t, r.Reference, x), outputs(t, r.Network, x), 12, 5)
	if err != nil || math.Abs(a.KL-after) > 1e-5 {
		t.Errorf("divergence %g, reported %g (%v)", a.KL, after, err)
	}
	if r.Network.Param(r.Network.Sites()[1], "q").Value != codes {
		t.Error("codes changed")
	}
	if _, _, err := TuneBias(t.Context(), enginetest.Backend(), mobileNet(t), mobileNet(t), images(3, 8, 8, 3), BiasTuning{}); err == nil {
		t.Error("a network with batch norms was accepted")
	}
}

// Of outputs that are probabilities at every position, bias tuning lowers what Compare says.
func TestBiasTuningOfSequencesOfProbabilities(t *testing.T) {
	b := nn.NewBuilder(5)
	h := b.Add("act", nn.ReLU, b.Add("fc1", nn.Dense{Out: 12}, b.Input("x", shapes.Make(dtypes.Float32, 1, 4, 6))))
	h = b.Add("act2", nn.ReLU, b.Add("fc2", nn.Dense{Out: 12}, h))
	net, err := b.Finish(b.Add("out", nn.Softmax{Axis: -1}, b.Add("fc3", nn.Dense{Out: 5}, h)))
	if err != nil {
		t.Fatal(err)
	}
	values := make([]float32, 12*4*6)
	r := rng.New(1, "sequences")
	for i := range values {
		values[i] = float32(r.NormFloat64())
	}
	x, err := compress.FloatExamples(values, 12, 4, 6)
	if err != nil {
		t.Fatal(err)
	}
	res, err := AdaQuant{WeightBits: 2, ActBits: 3, Iterations: -1}.Compress(t.Context(), enginetest.Backend(), net, x)
	if err != nil {
		t.Fatal(err)
	}
	before, after, err := TuneBias(t.Context(), enginetest.Backend(), res.Reference, res.Network, x, BiasTuning{Epochs: 3, Passes: 10})
	if err != nil || !(after < before) {
		t.Fatalf("divergence from %g to %g: %v", before, after, err)
	}
	a, err := compress.Compare(outputs(t, res.Reference, x), outputs(t, res.Network, x), 12, 5)
	if err != nil || math.Abs(a.KL-after) > 1e-5 {
		t.Errorf("divergence %g, reported %g (%v)", a.KL, after, err)
	}
}

func TestEdgesAreFoundAcrossResiduals(t *testing.T) {
	b := nn.NewBuilder(1)
	x := b.Input("x", shapes.Make(dtypes.Float32, 1, 4))
	h := b.Add("in", nn.Dense{Out: 4}, x)
	for _, block := range []string{"a", "b"} {
		h = b.Add(block+".sum", nn.Add, h, b.Add(block+".down", nn.Dense{Out: 4}, b.Add(block+".up", nn.Dense{Out: 8}, h)))
	}
	net, err := b.Finish(b.Add("end", nn.ReLU, h))
	if err != nil {
		t.Fatal(err)
	}
	if f := slices.Sorted(maps.Keys(firstSites(net))); !slices.Equal(f, []string{"in"}) {
		t.Errorf("first sites %v", f)
	}
	if l := slices.Sorted(maps.Keys(lastSites(net))); !slices.Equal(l, []string{"b.down"}) {
		t.Errorf("last sites %v", l)
	}
	if e := slices.Sorted(maps.Keys(edgeSites(net))); !slices.Equal(e, []string{"b.down", "in"}) {
		t.Errorf("edges %v", e)
	}
}

func TestAdaQuantServesTransformers(t *testing.T) {
	net := smallViT(t, nil)
	x := images(12, 8, 8, 1)
	q := AdaQuant{WeightBits: 4, ActBits: 6, Iterations: 10, SkipSiteErrors: true}
	r, err := q.Compress(t.Context(), enginetest.Backend(), net, x)
	if err != nil {
		t.Fatal(err)
	}
	products := 0
	for _, n := range r.Network.Nodes {
		if _, ok := n.Op.(nn.MatMul); ok {
			for _, v := range n.In {
				if _, ok := r.Network.Producer(v).Op.(nn.QuantizeDequantize); ok {
					products++
				}
			}
		}
	}
	if products != 8 {
		t.Errorf("%d quantised operands of products, want 8", products)
	}
	if e := networkError(t, net, r.Network, x); !(e < .2) {
		t.Errorf("error %g", e)
	}
	again, err := q.Compress(t.Context(), enginetest.Backend(), net, x)
	if err != nil || networkError(t, r.Network, again.Network, x) != 0 {
		t.Error("two runs differ", err)
	}
	if data, err := onnx.Marshal(r.Network, onnx.WriteOptions{Opset: 21}); err != nil || len(data) == 0 {
		t.Errorf("export: %v", err)
	}
}

func TestFrozenRangesComputeTheSame(t *testing.T) {
	net := mobileNet(t)
	x := images(8, 8, 8, 3)
	q := AdaQuant{WeightBits: 3, ActBits: 4, Iterations: -1, Tune: TuneNone}
	train, err := q.Trainable(t.Context(), enginetest.Backend(), net, x)
	if err != nil {
		t.Fatal(err)
	}
	frozen := train.Clone()
	if err := FreezeRanges(frozen); err != nil {
		t.Fatal(err)
	}
	r, err := q.Compress(t.Context(), enginetest.Backend(), net, x)
	if err != nil {
		t.Fatal(err)
	}
	if e := networkError(t, train, frozen, x); e > 1e-6 {
		t.Errorf("freezing changes the output by %g", e)
	}
	if e := networkError(t, r.Network, frozen, x); e > 1e-6 {
		t.Errorf("the start of the fits differs by %g from what Compress stores without iterations", e)
	}
	if compress.Size(frozen) != compress.Size(r.Network) {
		t.Errorf("%d bytes, want %d", compress.Size(frozen), compress.Size(r.Network))
	}
}

func TestAdaQuantHonoursOptions(t *testing.T) {
	net := mobileNet(t)
	x := images(9, 8, 8, 3)
	j, err := compress.OpenJournal(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	steps, restored := 0, 0
	q := AdaQuant{Iterations: 6, WeightBits: 4, ActBits: 32, Options: compress.Options{
		Journal: j, Bits: map[string]compress.Bits{"depth": {Weight: 6, Act: 8}, "head": {Weight: 32, Act: 5}},
		Select: func(n *nn.Node) bool { return n.Name != "stem" },
		Progress: func(s compress.Step) {
			steps++
			if s.Restored {
				restored++
			}
		},
	}}
	first, err := q.Compress(t.Context(), enginetest.Backend(), net, x)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string][2]int{}
	for _, s := range first.Sites {
		got[s.Name] = [2]int{s.WeightBits, s.InputBits}
	}
	want := map[string][2]int{"stem": {32, 32}, "depth": {6, 8}, "point": {4, 32}, "head": {32, 5}}
	for name, b := range want {
		if got[name] != b {
			t.Errorf("%s has bits %v, want %v", name, got[name], b)
		}
	}
	second, err := q.Compress(t.Context(), enginetest.Backend(), net, x)
	if err != nil || steps != 6 || restored != 3 {
		t.Fatalf("%d steps, %d restored: %v", steps, restored, err)
	}
	if e := networkError(t, first.Network, second.Network, x); e != 0 {
		t.Errorf("the resumed run differs by %g", e)
	}
	if _, err := (AdaQuant{Iterations: -1}).Compress(t.Context(), enginetest.Backend(), first.Network, x); err == nil {
		t.Error("a quantised network was accepted")
	}
	rest := AdaQuant{Iterations: -1, Options: compress.Options{Select: func(n *nn.Node) bool { return n.Name == "stem" }}}
	if _, err := rest.Compress(t.Context(), enginetest.Backend(), first.Network, x); err != nil {
		t.Errorf("the sites that were left cannot be quantised: %v", err)
	}
}

func TestAdaQuantSpendsABudget(t *testing.T) {
	net := mobileNet(t)
	x := images(12, 8, 8, 3)
	q := AdaQuant{Iterations: -1, ActBits: 8, MeanBits: 4.5, SkipSiteErrors: true}
	r, err := q.Compress(t.Context(), enginetest.Backend(), net, x)
	if err != nil {
		t.Fatal(err)
	}
	total, weights := 0, 0
	for _, s := range r.Sites {
		size := shapes.Make(dtypes.Float32, s.Shape...).Size()
		total += size * s.WeightBits
		weights += size
	}
	if mean := float64(total) / float64(weights); mean > 4.5 || mean < 3.5 {
		t.Errorf("%g bits per weight, want at most 4.5", mean)
	}
	q.MeanBits = 1.5
	if _, err := q.Compress(t.Context(), enginetest.Backend(), net, x); !errors.Is(err, compress.ErrInfeasible) {
		t.Errorf("a budget below the smallest choice: %v", err)
	}
}

func TestAdaQuantRefuses(t *testing.T) {
	net := mobileNet(t)
	x := images(4, 8, 8, 3)
	nan := images(4, 8, 8, 3)
	v := nn.Floats(nan[0])
	v[9] = float32(math.NaN())
	nan[0] = tensors.FromFlatDataAndDimensions(v, 4, 8, 8, 3)
	for name, c := range map[string]struct {
		q AdaQuant
		x compress.Examples
		e error
	}{
		"one bit":     {AdaQuant{WeightBits: 1}, x, ErrBits},
		"nine bits":   {AdaQuant{ActBits: 9}, x, ErrBits},
		"empty":       {AdaQuant{}, nil, ErrEmpty},
		"NaN":         {AdaQuant{}, nan, ErrNotFinite},
		"shape":       {AdaQuant{}, images(4, 8, 8, 2), nil},
		"rate":        {AdaQuant{Rates: AdaRates{Weight: -1}}, x, nil},
		"tuning":      {AdaQuant{Tune: "magic"}, x, nil},
		"choices":     {AdaQuant{Choices: []int{8, 1}, MeanBits: 4}, x, ErrBits},
		"nothing":     {AdaQuant{Options: compress.Options{Select: func(*nn.Node) bool { return false }}}, x, nil},
		"no such one": {AdaQuant{Options: compress.Options{Bits: map[string]compress.Bits{"x": {Weight: 4}}}}, x, nil},
	} {
		if _, err := c.q.Compress(t.Context(), enginetest.Backend(), net, c.x); err == nil || c.e != nil && !errors.Is(err, c.e) {
			t.Errorf("%s: error %v", name, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := (AdaQuant{}).Compress(ctx, enginetest.Backend(), net, x); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	mlp, err := zoo.MLP(zoo.MLPOptions{Inputs: 3, Hidden: []int{4}, Classes: 2})
	if err != nil {
		t.Fatal(err)
	}
	if err := TuneBN(t.Context(), enginetest.Backend(), mlp, images(2, 3), nil, BNOptions{}); err == nil {
		t.Error("batch norm tuning without targets was accepted")
	}
}

func TestAdaQuantWorksOnLittle(t *testing.T) {
	mlp, err := zoo.MLP(zoo.MLPOptions{Inputs: 3, Hidden: []int{4}, Classes: 2})
	if err != nil {
		t.Fatal(err)
	}
	w := mlp.Param(mlp.Sites()[0], "w").Data()
	for i := range 3 { // a row of zeros, a constant one
		w[i], w[3+i] = 0, .5
	}
	if err := mlp.Param(mlp.Sites()[0], "w").SetData(w); err != nil {
		t.Fatal(err)
	}
	for name, x := range map[string]compress.Examples{"one example": images(1, 3), "zeros": {tensors.FromFlatDataAndDimensions(make([]float32, 6), 2, 3)}} {
		r, err := AdaQuant{Iterations: 5}.Compress(t.Context(), enginetest.Backend(), mlp, x)
		if err != nil {
			t.Fatal(name, err)
		}
		for _, v := range outputs(t, r.Network, x) {
			if v-v != 0 {
				t.Errorf("%s: output %g", name, v)
			}
		}
	}
}

// What a fit is said to hold is what the native backend takes for it.
func TestFitBytesAreThoseOfTheBackend(t *testing.T) {
	b, err := engine.Open("native")
	if err != nil {
		t.Skip(err)
	}
	defer b.Finalize()
	var held int64
	b.(*native.Backend).Observe(func(r native.Report) { held += int64(r.Arena) })
	for name, op := range map[string]nn.Conv{
		"pointwise": {Out: 24, Kernel: []int{1, 1}}, "dense 3x3": nn.Conv2D(24, 3, 1), "stride 2": nn.Conv2D(24, 3, 2), "depthwise": {Out: 16, Kernel: []int{3, 3}, Pad: [][2]int{{1, 1}, {1, 1}}, Groups: 16},
	} {
		for _, bits := range []int{8, 32} {
			x := images(12, 32, 32, 16)[0]
			bl := nn.NewBuilder(1)
			net, err := bl.Finish(bl.Add("y", op, bl.Input("x", x.Shape())))
			if err != nil {
				t.Fatal(err)
			}
			out, err := net.Run(b, []*tensors.Tensor{x})
			if err != nil {
				t.Fatal(err)
			}
			site, rates, err := rangedSite(net, net.Node("y"), x, compress.Bits{Weight: 4, Act: bits}, AdaRates{Weight: 1e-3, Bias: 1e-3, InputRange: 1e-2, WeightRange: 1e-3})
			if err != nil {
				t.Fatal(err)
			}
			f := NewSiteFitter(b)
			held = 0
			if _, err := f.Fit(t.Context(), site, x, out[0], SiteFit{Iterations: 1, Batch: 8, Rates: rates}); err != nil {
				t.Fatal(err)
			}
			f.Close()
			// Less where a float input is given up for the one with zeros around it; rows are rounded up to cache lines.
			if want := fitBytes(op, x.Shape(), out[0].Shape(), 8, bits != 32); float64(held) < .7*float64(want) || float64(held) > 1.15*float64(want) {
				t.Errorf("%s, activations of %d bits: the backend holds %d bytes, and %d were forecast", name, bits, held, want)
			}
		}
	}
}

func TestFitsAreDroppedToMakeRoom(t *testing.T) {
	self := func(b int64) int64 { return b }
	for _, c := range []struct {
		fits   []int64
		coming int64
		want   int
	}{
		{nil, maxFitBytes + 1, 0}, // the one in use is kept, whatever it takes
		{[]int64{1, 2, 3}, 4, 0},
		{[]int64{1, 1, 1, 1, 1, 1, 1, 1}, 1, 1},
		{[]int64{maxFitBytes / 2, maxFitBytes / 4, maxFitBytes / 4}, maxFitBytes / 2, 1},
		{[]int64{5, maxFitBytes}, 1, 2},
	} {
		if got := surplusFits(c.fits, c.coming, self); got != c.want {
			t.Errorf("%v and %d: %d go, want %d", c.fits, c.coming, got, c.want)
		}
	}
}

// Three sites, of which the second and the third share what is compiled: two fits, and two walks.
func TestAdaQuantHolds(t *testing.T) {
	b := nn.NewBuilder(1)
	h := b.Add("fc1", nn.Dense{Out: 6}, b.Input("x", shapes.Make(dtypes.Float32, 1, 4)))
	net, err := b.Finish(b.Add("fc3", nn.Dense{Out: 6}, b.Add("fc2", nn.Dense{Out: 6}, h)))
	if err != nil {
		t.Fatal(err)
	}
	const cases = 10
	walks, err := compress.WalkPairsBytes(net, cases)
	if err != nil {
		t.Fatal(err)
	}
	fits := int64(4 * cases * (5*4 + 4*6 + 5*6 + 4*6))
	if got, err := (AdaQuant{}).Holds(net, cases); err != nil || got != walks+fits {
		t.Errorf("%d bytes, want %d (%v)", got, walks+fits, err)
	}
	few, err := AdaQuant{Batch: 2}.Holds(net, cases)
	if err != nil || few != walks+fits/5 {
		t.Errorf("%d bytes in batches of 2, want %d (%v)", few, walks+fits/5, err)
	}
	if _, err := (AdaQuant{WeightBits: 9}).Holds(net, cases); err == nil {
		t.Error("9 bits accepted")
	}
}

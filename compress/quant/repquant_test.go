package quant

import (
	"context"
	"errors"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"
	"gonum.org/v1/gonum/mat"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/internal/fixture"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/onnx"
	"github.com/lathe-ml/lathe/nn/zoo"
)

func TestFixturesRepQuant(t *testing.T) {
	fixture.Run(t, 8, map[string]fixture.Func{"dual_clip": dualClipCase, "reconstruct": reconstructCase})
}

func dualClipCase(t *testing.T, c *fixture.Case) map[string]any {
	x, w, bits := c.Inputs["x"], c.Inputs["W"], c.Params["bits"].Int()
	n, d, out := x.Shape[0], x.Shape[1], w.Shape[0]
	lo, hi := slices.Clone(x.Floats()[:d]), slices.Clone(x.Floats()[:d])
	for i, v := range x.Floats() {
		lo[i%d], hi[i%d] = min(lo[i%d], v), max(hi[i%d], v)
	}
	gram := mat.NewDense(d, d, nil)
	m := mat.NewDense(out, d, w.Floats())
	gram.Mul(m.T(), m)
	gram.Scale(1/float64(out), gram)
	e, err := engine.NewExec(enginetest.Backend(), func(in []*graph.Node) []*graph.Node {
		r := clip(in[0], in[1], in[2], in[3], bits, false)
		q := r.quantise(in[4], bits)
		loss := outputLoss(graph.Sub(in[4], q.hat), in[5])
		g := graph.Gradient(loss, in[0], in[1])
		return []*graph.Node{r.upper, r.lower, r.scale, r.zero, q.codes, q.hat, loss, g[0], g[1]}
	})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Finalize()
	f64 := func(v []float64, dims ...int) any { return fixture.Tensor(v, dtypes.Float64, dims...) }
	got, err := e.Call(f64(c.Inputs["a"].Floats(), d), f64(c.Inputs["c"].Floats(), d), f64(hi, d), f64(lo, d), f64(x.Floats(), n, d), f64(gram.RawMatrix().Data, d, d))
	if err != nil {
		t.Fatal(err)
	}
	r := map[string]any{}
	for i, name := range []string{"upper", "lower", "scale", "zero_point", "codes", "x_hat", "loss", "grad_a", "grad_c"} {
		r[name] = nn.Float64s(got[i])
	}
	return r
}

func reconstructCase(t *testing.T, c *fixture.Case) map[string]any {
	x := c.Inputs["X_q"]
	grid := Affine{Bits: c.Params["bits"].Int(), Scale: c.Inputs["scale"].Floats(), Zero: c.Inputs["zero_point"].Floats()}
	o := ReconstructOptions{Damp: c.Params["damp"].Float(), NoRidge: !c.Params["ridge"].Bool(), Grid: &grid}
	if o.Damp == 0 {
		o.Damp = -1
	}
	r, err := Reconstruct(c.Inputs["W"].Floats(), x.Floats(), c.Inputs["Y"].Floats(), x.Shape[1], grid.Bits, o)
	if err != nil {
		t.Fatal(err)
	}
	return map[string]any{"W_star": r.Target, "codes": r.Codes, "W_q": r.Weight, "mse": r.MSE, "mse_rtn": r.Rounded}
}

// clipRows is x [n, d] with a few outliers in one channel, an offset in another.
func clipRows(n, d int) []float32 {
	x := make([]float32, n*d)
	r := rng.New(5, "clip rows")
	rng.Normal(r, x, 1)
	for i := range n {
		x[i*d+1] += 3
		if i%300 == 7 {
			x[i*d] = 9
		}
	}
	return x
}

func normal64(name string, n int, std float64) []float64 {
	v := make([]float64, n)
	r := rng.New(1, name)
	for i := range v {
		v[i] = std * r.NormFloat64()
	}
	return v
}

func TestDualClipWithoutClippingIsTheRange(t *testing.T) {
	e, err := engine.NewExec(enginetest.Backend(), func(in []*graph.Node) []*graph.Node {
		r := clip(in[0], in[1], in[2], in[3], 4, false)
		return []*graph.Node{r.upper, r.lower}
	})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Finalize()
	got, err := e.Call([]float64{30, 30}, []float64{30, 30}, []float64{2.5, .3}, []float64{-7, -.1})
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range [][]float64{{2.5, .3}, {-7, -.1}} {
		for j, v := range nn.Float64s(got[i]) {
			if math.Abs(v-want[j]) > 1e-9 {
				t.Errorf("end %d of channel %d is %g, want %g", i, j, v, want[j])
			}
		}
	}
}

func TestDualClipLowersTheOutputError(t *testing.T) {
	const n, d, out = 600, 8, 12
	x, w := clipRows(n, d), narrow(normal64("w", out*d, 1))
	grid, trace, err := DualClip(context.Background(), enginetest.Backend(), x, w, d, 4, DualClipOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if trace.After > trace.Before || trace.After > .8*trace.MinMax || len(trace.Losses) != 11 {
		t.Errorf("loss %g before, %g after, %g of the whole ranges, %d looks", trace.Before, trace.After, trace.MinMax, len(trace.Losses))
	}
	if trace.Upper[0] > .9 || trace.Ratio() > .98 {
		t.Errorf("the channel with outliers keeps %g of its range above 0, all keep %g", trace.Upper[0], trace.Ratio())
	}
	got, err := grid.OutputMSE(x, w, d)
	if err != nil || math.Abs(got/trace.After-1) > 1e-3 {
		t.Errorf("the grid costs %g, the loss that was kept is %g: %v", got, trace.After, err)
	}
	for i, z := range grid.Zero {
		if z != math.Trunc(z) || !(grid.Scale[i] > 0) {
			t.Errorf("channel %d: scale %g, zero point %g", i, grid.Scale[i], z)
		}
	}
	again, _, err := DualClip(context.Background(), enginetest.Backend(), x, w, d, 4, DualClipOptions{})
	if err != nil || !slices.Equal(again.Scale, grid.Scale) {
		t.Error("another result with the same seed", err)
	}
}

func TestDualClipOnOddChannels(t *testing.T) {
	const n, d = 40, 4
	x := make([]float32, n*d)
	for i := range n {
		x[i*d], x[i*d+1], x[i*d+2], x[i*d+3] = 7, -2-float32(i)/10, 0, float32(i%5)-2 // constant, negative, zero, few levels
	}
	for _, symmetric := range []bool{false, true} {
		grid, trace, err := DualClip(context.Background(), enginetest.Backend(), x, []float32{1, -1, 2, .5}, d, 3, DualClipOptions{Steps: 30, Symmetric: symmetric})
		if err != nil {
			t.Fatal(err)
		}
		if err := grid.Validate(); err != nil || trace.After > trace.Before {
			t.Error(trace, err)
		}
		hat, err := grid.FakeQuant(x, []int{n, d})
		if err != nil || math.Abs(float64(hat[0])-7) > 1e-5 && !symmetric || hat[2] != 0 {
			t.Errorf("constant channels became %g and %g: %v", hat[0], hat[2], err)
		}
		for _, z := range grid.Zero {
			if symmetric && z != 4 || math.Abs(z) > 100 {
				t.Errorf("symmetric %t: zero points %v", symmetric, grid.Zero)
			}
		}
	}
	if _, _, err := DualClip(context.Background(), enginetest.Backend(), []float32{1, 2, 3}, []float32{1, 1, 1}, 3, 4, DualClipOptions{Steps: 5}); err != nil {
		t.Errorf("one token: %v", err)
	}
}

// The codes of the folded norm under the common grid are the channel-wise codes that were learnt.
func TestLearntGridsFoldExactly(t *testing.T) {
	const n, d, out = 300, 8, 5
	x, w := clipRows(n, d), normal64("w", out*d, 1)
	grid, _, err := DualClip(context.Background(), enginetest.Backend(), x, narrow(w), d, 4, DualClipOptions{Steps: 50})
	if err != nil {
		t.Fatal(err)
	}
	norm := &NormParams{Gamma: slices.Repeat([]float64{1}, d), Beta: make([]float64, d)}
	s, z, err := ReparamNorm(norm, []*LinearParams{{W: w, Out: out}}, grid.Scale, grid.Zero, ReparamOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for i, v := range x {
		c := i % d
		if f := math.Abs(math.Mod(float64(v)/grid.Scale[c], 1)); math.Abs(f-.5) < 1e-5 {
			continue
		}
		want := grid.code64(float64(v), c)
		if got := (Affine{Bits: 4, Scale: []float64{s}, Zero: []float64{z}}).code64(float64(v)*norm.Gamma[c]+norm.Beta[c], 0); got != want {
			t.Fatalf("value %d: code %d, channel-wise %d", i, got, want)
		}
	}
}

func TestReconstructBeatsRounding(t *testing.T) {
	const n, d, out = 400, 16, 6
	x, w := normal64("x", n*d, 1), normal64("w", out*d, 1)
	for i := range n { // correlated columns
		for j := 1; j < d; j++ {
			x[i*d+j] += .8 * x[i*d+j-1]
		}
	}
	var y mat.Dense
	y.Mul(mat.NewDense(n, d, x), mat.NewDense(out, d, w).T())
	for _, c := range []struct {
		bits int
		most float64
		o    ReconstructOptions
	}{{8, 1, ReconstructOptions{}}, {3, .6, ReconstructOptions{}}, {3, .6, ReconstructOptions{Descending: true}}, {3, .6, ReconstructOptions{NoRidge: true}}, {3, .6, ReconstructOptions{Ridge: HeldOutRidge}}} {
		r, err := Reconstruct(w, x, y.RawMatrix().Data, d, c.bits, c.o)
		if err != nil {
			t.Fatal(err)
		}
		if r.MSE > c.most*r.Rounded {
			t.Errorf("%d bits, %+v: error %g, rounded %g", c.bits, c.o, r.MSE, r.Rounded)
		}
		var got mat.Dense
		got.Mul(mat.NewDense(n, d, x), mat.NewDense(out, d, r.Weight).T())
		got.Sub(&got, &y)
		direct := mat.Norm(&got, 2)
		if direct *= direct / float64(n*out); math.Abs(direct/r.MSE-1) > 1e-6 {
			t.Errorf("%d bits, %+v: the error from moments is %g, from the outputs %g", c.bits, c.o, r.MSE, direct)
		}
	}
}

func TestReconstructDoesNotPropagateAcrossOrthogonalInputs(t *testing.T) {
	const d, out = 4, 3
	x := []float64{2, 0, 0, 0, 0, 2, 0, 0, 0, 0, 2, 0, 0, 0, 0, 2} // XᵀX/n = I
	w := normal64("w", out*d, 1)
	y := normal64("y", d*out, 2)
	for _, o := range []ReconstructOptions{{}, {Damp: .5}, {NoRidge: true}, {Descending: true}} {
		r, err := Reconstruct(w, x, y, d, 4, o)
		if err != nil {
			t.Fatal(err)
		}
		for i, v := range r.Target {
			if want := r.Grid.code64(v, i/d); r.Codes[i] != want {
				t.Errorf("%+v: code %d is %d, rounding gives %d", o, i, r.Codes[i], want)
			}
		}
	}
	one, err := Reconstruct([]float64{.3, -.8}, []float64{1, 2, -1}, []float64{.2, -.9, .5, -1.7, -.3, .8}, 1, 4, ReconstructOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for i, v := range one.Target {
		if one.Codes[i] != one.Grid.code64(v, i) {
			t.Errorf("one column: code %d of %g", one.Codes[i], v)
		}
	}
}

func TestRidgeTargetRecoversTheMap(t *testing.T) {
	const n, d, out = 50, 6, 4
	x, a := normal64("x", n*d, 1), normal64("a", out*d, 1)
	var y mat.Dense
	y.Mul(mat.NewDense(n, d, x), mat.NewDense(out, d, a).T())
	r, err := Reconstruct(normal64("w", out*d, 1), x, y.RawMatrix().Data, d, 8, ReconstructOptions{Damp: 1e-12})
	if err != nil {
		t.Fatal(err)
	}
	for i := range a {
		if math.Abs(r.Target[i]-a[i]) > 1e-6 {
			t.Fatalf("target %d is %g, want %g", i, r.Target[i], a[i])
		}
	}
}

// With two noisy tokens per column the equations' small ridge fits the noise.
func TestHeldOutRidgeKeepsToTheWeightWhereTokensAreFew(t *testing.T) {
	const d, out = 16, 4
	w := normal64("w", out*d, 1)
	data := func(name string, n int) (x, y []float64) {
		x = normal64(name, n*d, 1)
		var m mat.Dense
		m.Mul(mat.NewDense(n, d, x), mat.NewDense(out, d, w).T())
		y = m.RawMatrix().Data
		for i, v := range normal64(name+" noise", len(y), 2) {
			y[i] += v
		}
		return x, y
	}
	x, y := data("few", 2*d)
	hx, hy := data("held", 400)
	var errs [2]float64
	for i, ridge := range []float64{0, HeldOutRidge} {
		r, err := Reconstruct(w, x, y, d, 8, ReconstructOptions{Ridge: ridge})
		if err != nil {
			t.Fatal(err)
		}
		var m mat.Dense
		m.Mul(mat.NewDense(400, d, hx), mat.NewDense(out, d, r.Weight).T())
		m.Sub(&m, mat.NewDense(400, out, hy))
		if errs[i] = mat.Norm(&m, 2); i == 1 && r.Ridge < .1 {
			t.Errorf("chose %g", r.Ridge)
		}
	}
	if errs[1] > .95*errs[0] {
		t.Errorf("held-out error %g, with the small ridge %g", errs[1], errs[0])
	}
}

func TestReconstructOnOddInputs(t *testing.T) {
	w := []float64{1, -2, .5, .25}
	for name, c := range map[string]struct {
		x, y []float64
		d    int
	}{
		"fewer tokens than columns": {[]float64{1, 2, 3, 4}, []float64{1}, 4},
		"a dead column":             {[]float64{1, 0, 2, 1, 2, 0, 1, 3, 4, 0, 1, 1, 1, 0, 1, 5}, []float64{1, 2, 3, 4}, 4},
		"nothing flows":             {make([]float64, 8), make([]float64, 2), 4},
		"one column":                {[]float64{1, 2}, []float64{1, 1, 1, 1, 2, 2, 2, 2}, 1},
	} {
		for _, ridge := range []float64{0, HeldOutRidge} {
			r, err := Reconstruct(w, c.x, c.y, c.d, 4, ReconstructOptions{Ridge: ridge})
			if err != nil {
				t.Fatal(name, err)
			}
			for i, v := range r.Weight {
				if math.IsNaN(v) || r.Codes[i] < 0 || r.Codes[i] > 15 {
					t.Errorf("%s: weight %d is %g of code %d", name, i, v, r.Codes[i])
				}
			}
			if name == "a dead column" && ridge == 0 && math.Abs(r.Target[1]+2) > 1e-9 {
				t.Errorf("the weight of a dead column became %g", r.Target[1])
			}
		}
	}
}

func TestRepQuantPartsRefuse(t *testing.T) {
	ctx, b := context.Background(), enginetest.Backend()
	x, w := clipRows(10, 4), make([]float32, 8)
	bad := slices.Clone(x)
	bad[3] = float32(math.NaN())
	for name, c := range map[string]struct {
		x, w []float32
		d, n int
		o    DualClipOptions
		want error
	}{
		"1 bit":      {x, w, 4, 1, DualClipOptions{}, ErrBits},
		"9 bits":     {x, w, 4, 9, DualClipOptions{}, ErrBits},
		"no tokens":  {nil, w, 4, 4, DualClipOptions{}, ErrEmpty},
		"no readers": {x, nil, 4, 4, DualClipOptions{}, ErrEmpty},
		"columns":    {x, w[:6], 4, 4, DualClipOptions{}, nil},
		"NaN":        {bad, w, 4, 4, DualClipOptions{}, ErrNotFinite},
		"NaN weight": {x, bad[:8], 4, 4, DualClipOptions{}, ErrNotFinite},
		"steps":      {x, w, 4, 4, DualClipOptions{Steps: -1}, nil},
	} {
		if _, _, err := DualClip(ctx, b, c.x, c.w, c.d, c.n, c.o); err == nil || c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("dual clip, %s: %v", name, err)
		}
	}
	y := make([]float32, 20)
	for name, c := range map[string]struct {
		w, x, y []float32
		bits    int
		o       ReconstructOptions
		want    error
	}{
		"1 bit":    {w, x, y, 1, ReconstructOptions{}, ErrBits},
		"no rows":  {w, nil, nil, 4, ReconstructOptions{}, ErrEmpty},
		"columns":  {w[:7], x, y, 4, ReconstructOptions{}, nil},
		"outputs":  {w, x, y[:19], 4, ReconstructOptions{}, nil},
		"NaN":      {w, bad, y, 4, ReconstructOptions{}, ErrNotFinite},
		"singular": {w[:4], x[:4], y[:1], 4, ReconstructOptions{Damp: -1}, ErrSingular},
		"grid":     {w, x, y, 4, ReconstructOptions{Grid: &Affine{Bits: 4, Scale: []float64{1}, Zero: []float64{0}}}, nil},
		"ridge":    {w, x, y, 4, ReconstructOptions{Ridge: -3}, nil},
	} {
		if _, err := Reconstruct(c.w, c.x, c.y, 4, c.bits, c.o); err == nil || c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("reconstruct, %s: %v", name, err)
		}
	}
}

// sameNetwork compares parameters bit by bit.
func sameNetwork(t *testing.T, a, b *nn.Network) {
	t.Helper()
	n := 0
	for p := range a.Params.All() {
		q := b.Params.Get(p.Name)
		if n++; q == nil || !slices.Equal(nn.Floats(p.Value), nn.Floats(q.Value)) {
			t.Errorf("parameter %q differs", p.Name)
		}
	}
	for range b.Params.All() {
		n--
	}
	if n != 0 {
		t.Errorf("%d parameters more in one network", n)
	}
}

func TestRepQuantWithoutItsStepsIsRepQViT(t *testing.T) {
	x := images(12, 8, 8, 1)
	net := smallViT(t, nil)
	if _, err := SpreadChannels(net, 6, 1); err != nil {
		t.Fatal(err)
	}
	for _, norms := range []NormGranularity{"", ChannelWise} {
		a, err := RepQViT{Norms: norms}.Compress(context.Background(), enginetest.Backend(), net, x)
		if err != nil {
			t.Fatal(err)
		}
		b, err := RepQuant{Norms: norms, NoClip: true, NoFit: true}.Compress(context.Background(), enginetest.Backend(), net, x)
		if err != nil {
			t.Fatal(err)
		}
		sameNetwork(t, a.Network, b.Network)
	}
}

// What the method reports of a layer is what the finished network does: it fits on the inputs that the layer will have.
func TestRepQuantFitsOnTheInputsOfTheFinishedNetwork(t *testing.T) {
	x := images(24, 8, 8, 1)
	net := smallViT(t, nil)
	traced := map[string]RepQuantLayer{}
	res, err := RepQuant{Clip: DualClipOptions{Steps: 20}, Trace: func(l RepQuantLayer) { traced[l.Name] = l }}.Compress(context.Background(), enginetest.Backend(), net, x)
	if err != nil {
		t.Fatal(err)
	}
	layers, norms := 0, 0
	for _, s := range res.Sites {
		l, ok := traced[s.Name]
		if !ok {
			if s.Kind != "conv" {
				t.Errorf("site %q was not fitted", s.Name)
			}
			continue
		}
		layers++
		v, _, err := compress.Capture(context.Background(), enginetest.Backend(), res.Reference, x, 0, s.Name)
		if err != nil {
			t.Fatal(err)
		}
		power := 0.
		for _, y := range v[0] {
			power += float64(y) * float64(y) / float64(len(v[0]))
		}
		if got := s.OutputErr * power; math.Abs(got/l.Corrected-1) > .02 {
			t.Errorf("site %q: mean squared error %g, reported %g", s.Name, got, l.Corrected)
		}
	}
	for _, l := range traced {
		if l.Clip != nil {
			norms++
		}
	}
	if layers != 13 || norms != 4 {
		t.Errorf("%d layers and %d norms; want 13 and 4", layers, norms)
	}
}

func TestRepQuantAtEightBitsIsCloseToFloat(t *testing.T) {
	x := images(24, 8, 8, 1)
	for name, c := range map[string]struct {
		norm nn.Norm
		q    RepQuant
	}{
		"layer norm":           {nn.LayerNorm{}, RepQuant{}},
		"without bias":         {nn.LayerNorm{NoBias: true}, RepQuant{}},
		"RMS norm":             {nn.RMSNorm{}, RepQuant{}},
		"RMS norm, symmetric":  {nn.RMSNorm{}, RepQuant{Symmetric: true}},
		"symmetric, unclipped": {nn.RMSNorm{}, RepQuant{Symmetric: true, NoClip: true}},
		"channel-wise":         {nn.LayerNorm{}, RepQuant{Norms: ChannelWise}},
		"descending":           {nn.LayerNorm{}, RepQuant{Fit: ReconstructOptions{Descending: true}}},
		"weights only":         {nn.LayerNorm{}, RepQuant{ActBits: 32}},
		"rounded head":         {nn.LayerNorm{}, RepQuant{RoundedHead: true}},
	} {
		net := smallViT(t, c.norm)
		want := outputs(t, net, x)
		c.q.WeightBits, c.q.Softmax, c.q.Clip.Steps = 8, SoftmaxUniform, 20
		if c.q.ActBits == 0 {
			c.q.ActBits = 8
		}
		res, err := c.q.Compress(context.Background(), enginetest.Backend(), net, x)
		if err != nil {
			t.Fatal(name, err)
		}
		if e := compress.RelativeError(want, outputs(t, res.Network, x)); e > 1e-3 {
			t.Errorf("%s: relative error %g", name, e)
		}
		for _, n := range res.Network.Nodes {
			switch op := n.Op.(type) {
			case nn.RMSNorm:
				if c.q.Symmetric && op.Bias {
					t.Errorf("%s: norm %q got a bias", name, n.Name)
				}
			case nn.QuantizeDequantize:
				p := res.Network.Producer(n.In[0])
				if op.PerChannel != (c.q.Norms == ChannelWise && p != nil && p.Op.Kind() == "layernorm") {
					t.Errorf("%s: quantiser %q per channel: %t", name, n.Name, op.PerChannel)
				}
			}
		}
		if b, err := onnx.Marshal(res.Network, onnx.WriteOptions{Opset: 21}); err != nil {
			t.Error(name, err)
		} else if back, err := onnx.Read(b, onnx.Options{}); err != nil {
			t.Error(name, err)
		} else if e := compress.RelativeError(outputs(t, res.Network, x), outputs(t, back, x)); e > 1e-3 {
			t.Errorf("%s: ONNX gives another function: relative error %g", name, e)
		}
	}
}

// smallBERT is a post-norm encoder over 12 tokens, and texts for it.
func smallBERT(t *testing.T) (*nn.Network, compress.Examples) {
	t.Helper()
	net, err := zoo.BERT(zoo.BERTOptions{Symbols: 40, Positions: 12, Tokens: 12, Dim: 16, Depth: 2, Heads: 2, Pool: true, Normalize: true, Std: .3, Seed: 2})
	if err != nil {
		t.Fatal(err)
	}
	ids, mask := make([]int32, 20*12), make([]int32, 20*12)
	r := rng.New(1, "texts")
	for i := range ids {
		if i%12 < 4+i/12%9 {
			ids[i], mask[i] = int32(r.IntN(40)), 1
		}
	}
	return net, compress.Examples{tensors.FromFlatDataAndDimensions(ids, 20, 12), tensors.FromFlatDataAndDimensions(mask, 20, 12)}
}

func TestRepQuantServesPostNormNetworks(t *testing.T) {
	net, x := smallBERT(t)
	want := outputs(t, net, x)
	q := RepQuant{WeightBits: 8, ActBits: 8, Softmax: SoftmaxUniform, Clip: DualClipOptions{Steps: 20}}
	res, err := q.Compress(context.Background(), enginetest.Backend(), net, x)
	if err != nil {
		t.Fatal(err)
	}
	if e := compress.RelativeError(want, outputs(t, res.Network, x)); e > 1e-3 {
		t.Errorf("relative error %g", e)
	}
	split := 0
	for _, n := range res.Network.Nodes {
		if strings.HasSuffix(n.Name, ".linear") {
			split++
		}
	}
	if split != 4 || len(res.Notes) == 0 || !strings.Contains(strings.Join(res.Notes, " "), "post-norm") {
		t.Errorf("%d copies of norms; notes %q", split, res.Notes)
	}
	for _, s := range res.Sites {
		if s.Kind == "dense" && (s.WeightBits != 8 || s.InputBits != 8) {
			t.Errorf("site %+v", s)
		}
	}
	q.Shared = RefuseShared
	if _, err := q.Compress(context.Background(), enginetest.Backend(), net, x); !errors.Is(err, ErrSharedNorm) {
		t.Errorf("refusing: %v", err)
	}
}

// Networks read from ONNX hold the stream as [batch, width, tokens] and turn it in front of the dense layers.
func TestRepQuantOnTurnedStreams(t *testing.T) {
	b := nn.NewBuilder(1)
	x := b.Input("x", shapes.Make(dtypes.Float32, 1, 8, 6))
	n := b.Add("turned", nn.Transpose{Perm: []int{0, 2, 1}}, b.Add("norm", nn.LayerNorm{Axes: []int{1}}, x))
	y := b.Add("back", nn.Transpose{Perm: []int{0, 2, 1}}, b.Add("fc2", nn.Dense{Out: 8}, b.Add("act", nn.GELU{}, b.Add("fc1", nn.Dense{Out: 16}, n))))
	net, err := b.Finish(b.Add("sum", nn.Add, x, y))
	if err != nil {
		t.Fatal(err)
	}
	calib := images(32, 8, 6)
	for name, m := range map[string]compress.Method{"repquant": RepQuant{WeightBits: 8, ActBits: 8, Clip: DualClipOptions{Steps: 10}}, "repq-vit": RepQViT{WeightBits: 8, ActBits: 8}} {
		res, err := m.Compress(context.Background(), enginetest.Backend(), net, calib)
		if err != nil {
			t.Fatal(name, err)
		}
		if s := res.Sites[0]; s.Name != "fc1" || s.Note != "per tensor, after norm norm" {
			t.Errorf("%s: %+v", name, s)
		}
		if e := compress.RelativeError(outputs(t, net, calib), outputs(t, res.Network, calib)); e > 1e-3 {
			t.Errorf("%s: relative error %g", name, e)
		}
	}
}

func TestRepQuantGoesOnFromItsJournal(t *testing.T) {
	net, x := smallViT(t, nil), images(12, 8, 8, 1)
	q := RepQuant{Clip: DualClipOptions{Steps: 10}, SkipSiteErrors: true}
	dir := t.TempDir()
	var restored [2]int
	var nets [2]*nn.Network
	for i := range 2 {
		j, err := compress.OpenJournal(dir)
		if err != nil {
			t.Fatal(err)
		}
		q.Journal, q.Progress = j, func(s compress.Step) {
			if s.Restored {
				restored[i]++
			}
		}
		res, err := q.Compress(context.Background(), enginetest.Backend(), net, x)
		if err != nil {
			t.Fatal(err)
		}
		nets[i] = res.Network
	}
	sameNetwork(t, nets[0], nets[1])
	if restored != [2]int{0, 14} {
		t.Errorf("restored %v sites", restored)
	}
}

func TestRepQuantTakesOptionsAndRefuses(t *testing.T) {
	ctx, b := context.Background(), enginetest.Backend()
	net, x := smallViT(t, nil), images(12, 8, 8, 1)
	q := RepQuant{Clip: DualClipOptions{Steps: 10}}
	q.Bits = map[string]compress.Bits{"blk.0.fc1": {Weight: 6, Act: 8}}
	q.Select = func(n *nn.Node) bool { return strings.HasPrefix(n.Name, "blk.0.") }
	res, err := q.Compress(ctx, b, net, x)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range res.Sites {
		want := [2]int{32, 32}
		if strings.HasPrefix(s.Name, "blk.0.") {
			want = [2]int{4, 4}
		}
		if s.Name == "blk.0.fc1" {
			want = [2]int{6, 8}
		}
		if s.WeightBits != want[0] || s.InputBits != want[1] {
			t.Errorf("%s: %d and %d bits, want %v", s.Name, s.WeightBits, s.InputBits, want)
		}
	}
	again := RepQuant{Clip: DualClipOptions{Steps: 10}}
	if _, err := again.Compress(ctx, b, res.Network, x); err == nil {
		t.Error("sites were quantised twice")
	}
	conv := nn.NewBuilder(1)
	plain, err := conv.Finish(conv.Add("fc", nn.Dense{Out: 2}, conv.Input("x", shapes.Make(dtypes.Float32, 1, 4))))
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		net  *nn.Network
		x    compress.Examples
		q    RepQuant
		want error
	}{
		"1 bit":       {net, x, RepQuant{WeightBits: 1}, ErrBits},
		"9 bits":      {net, x, RepQuant{ActBits: 9}, ErrBits},
		"no examples": {net, nil, RepQuant{}, ErrEmpty},
		"shared":      {net, x, RepQuant{Shared: "so"}, nil},
		"norms":       {net, x, RepQuant{Norms: "so"}, nil},
		"softmax":     {net, x, RepQuant{Softmax: "so"}, nil},
		"no norm":     {plain, images(4, 4), RepQuant{}, nil},
		"damping":     {net, x, RepQuant{Fit: ReconstructOptions{Damp: math.NaN()}}, nil},
		"steps":       {net, x, RepQuant{Clip: DualClipOptions{Steps: -1}}, nil},
	} {
		if _, err := c.q.Compress(ctx, b, c.net, c.x); err == nil || c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

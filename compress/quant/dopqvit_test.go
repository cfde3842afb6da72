package quant

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/nn"
)

func TestMedianScaleMinimisesTheMeanAbsoluteDeviation(t *testing.T) {
	r := rng.New(1, "mosf")
	for d := 1; d < 20; d++ {
		s, z := make([]float64, d), make([]float64, d)
		for i := range s {
			s[i], z[i] = math.Exp(r.NormFloat64()), math.Round(8*r.NormFloat64())
		}
		scale, zero, rep, err := MOSF(s, z, nil)
		if err != nil {
			t.Fatal(err)
		}
		if scale != TargetMedian(s) || zero != math.Trunc(zero) || rep.Channels != d {
			t.Errorf("%d channels: scale %g, zero point %g of %v, %v", d, scale, zero, s, z)
		}
		mean, _, _, err := MOSF(s, z, TargetMean)
		if err != nil {
			t.Fatal(err)
		}
		deviation := func(v, p float64) (sum float64) {
			for _, x := range s {
				sum += math.Pow(math.Abs(x-v), p) / float64(d)
			}
			return sum
		}
		for _, v := range append(slices.Clone(s), mean, 1, scale*1.01, mean*.99) {
			if deviation(v, 1) < rep.MADMedian-1e-12 {
				t.Errorf("%g has the absolute deviation %g, the median %g", v, deviation(v, 1), rep.MADMedian)
			}
			if deviation(v, 2) < deviation(mean, 2)-1e-12 {
				t.Errorf("%g has the squared deviation %g, the mean %g", v, deviation(v, 2), deviation(mean, 2))
			}
		}
	}
}

func TestOutlierReport(t *testing.T) {
	_, _, rep, err := MOSF([]float64{1, 1.2, 1, 30, .9}, make([]float64, 5), nil)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(rep.Outliers, []int{3}) || rep.Median != 1 || math.Abs(rep.Mean-6.82) > 1e-12 || rep.FarMedian != .2 || math.Abs(rep.FarMean-1) > 1e-12 {
		t.Errorf("%+v", rep)
	}
}

func TestMOSFRefuses(t *testing.T) {
	for name, c := range map[string][2][]float64{
		"no channels": {nil, nil}, "zero scale": {{1, 0}, {0, 0}}, "negative scale": {{-1}, {0}}, "NaN scale": {{math.NaN()}, {0}},
		"infinite scale": {{math.Inf(1)}, {0}}, "NaN zero point": {{1}, {math.NaN()}}, "lengths": {{1, 2}, {0}},
	} {
		if _, _, _, err := MOSF(c[0], c[1], nil); err == nil {
			t.Errorf("%s accepted", name)
		}
	}
	if s, z, _, err := MOSF([]float64{3}, []float64{2}, nil); s != 3 || z != 2 || err != nil {
		t.Error("one channel:", s, z, err)
	}
}

// With whole zero points and refitted weights the common scale is a gauge: twice of it changes nothing.
func TestCommonScaleIsAGauge(t *testing.T) {
	output := func(k float64) []float64 {
		x, n, ls, act := reparamCase(t, 16)
		sT, zT, err := ReparamNorm(n, ls, act.Scale, act.Zero, ReparamOptions{Choose: func(s, z []float64) (float64, float64) { return k * TargetMedian(s), TargetMedian(z) }})
		if err != nil {
			t.Fatal(err)
		}
		h, err := Affine{Bits: act.Bits, Axis: -1, Scale: []float64{sT}, Zero: []float64{zT}}.FakeQuant(float32s(layerNorm(x, n, 1e-5)), []int{len(x)})
		if err != nil {
			t.Fatal(err)
		}
		w := float32s(ls[0].W)
		g, err := CalibrateUniform(w, []int{ls[0].Out, 16}, 0, 4)
		if err != nil {
			t.Fatal(err)
		}
		wq, err := g.FakeQuant(w, []int{ls[0].Out, 16})
		if err != nil {
			t.Fatal(err)
		}
		return linear(float64s(h), &LinearParams{W: float64s(wq), Out: ls[0].Out, Bias: ls[0].Bias})
	}
	one, two := output(1), output(2)
	for i := range one {
		if math.Abs(one[i]-two[i]) > 1e-5*math.Max(1, math.Abs(one[i])) {
			t.Fatalf("output %d is %g, and %g with twice the scale", i, one[i], two[i])
		}
	}
}

func TestEqualScalesChangeNothing(t *testing.T) {
	_, n, ls, _ := reparamCase(t, 8)
	gamma, w := slices.Clone(n.Gamma), slices.Clone(ls[0].W)
	s, z, _, err := MOSF(slices.Repeat([]float64{.37}, 8), slices.Repeat([]float64{5}, 8), nil)
	if err != nil {
		t.Fatal(err)
	}
	choose := func(_, _ []float64) (float64, float64) { return s, z }
	if _, _, err := ReparamNorm(n, ls, slices.Repeat([]float64{.37}, 8), slices.Repeat([]float64{5}, 8), ReparamOptions{Choose: choose}); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(n.Gamma, gamma) || !slices.Equal(ls[0].W, w) {
		t.Error("gain or weights have changed")
	}
}

func TestTangentInTheGraphEqualsTheHost(t *testing.T) {
	a := attention(9, 4, 17)
	a[3], a[4], a[5] = 0, 1, 2
	for _, q := range tanGrids() {
		op := TanQuantize{Bits: q.Bits}
		b := nn.NewBuilder(1)
		net, err := b.Finish(b.Add("y", op, b.Input("x", shapes.Make(dtypes.Float32, 4, 17))))
		if err != nil {
			t.Fatal(err)
		}
		if err := op.SetGrid(net, net.Node("y"), q); err != nil {
			t.Fatal(err)
		}
		got := outputs(t, net, compress.Examples{tensors.FromFlatDataAndDimensions(a, 4, 17)})
		want, err := q.FakeQuant(a)
		if err != nil {
			t.Fatal(err)
		}
		curve := q.curve()
		for i, v := range got {
			// Values within float32 rounding of a tie may go either way.
			at := curve.top * curve.warp(min(float64(a[i])/q.Scale, 1))
			if tie := math.Abs(at - math.Floor(at) - .5); v != want[i] && tie > 2e-3 {
				t.Fatalf("%+v: %g becomes %g, on the host %g", q, a[i], v, want[i])
			}
		}
	}
}

func TestTangentPassesGradientsWithinItsGrid(t *testing.T) {
	q := TanQ{Bits: 3, Scale: .5, Alpha: 1, Kappa: 1}
	op := TanQuantize{Bits: 3}
	b := nn.NewBuilder(1)
	net, err := b.Finish(b.Add("y", op, b.Input("x", shapes.Make(dtypes.Float32, 4))))
	if err != nil {
		t.Fatal(err)
	}
	if err := op.SetGrid(net, net.Node("y"), q); err != nil {
		t.Fatal(err)
	}
	x := []float32{0, .2, .5, .7}
	e, err := engine.NewExec(enginetest.Backend(), func(in []*graph.Node) []*graph.Node {
		g := in[0].Graph()
		env := &nn.Env{G: g, Training: true, Param: func(name string) *graph.Node { return graph.Const(g, net.Params.Get(name).Value) }}
		y := net.Lower(env, map[string]*graph.Node{"x": in[0]})[0]
		return []*graph.Node{y, graph.Gradient(graph.ReduceAllSum(y), in[0])[0]}
	})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Finalize()
	out, err := e.Call(x)
	if err != nil {
		t.Fatal(err)
	}
	want, _ := q.FakeQuant(x)
	for i, v := range nn.Floats(out[0]) {
		if math.Abs(float64(v-want[i])) > 1e-6 {
			t.Errorf("value %d is %g, want %g", i, v, want[i])
		}
	}
	if g := nn.Floats(out[1]); !slices.Equal(g, []float32{1, 1, 1, 0}) {
		t.Errorf("gradient %v", g)
	}
}

func TestDopQViTIsRepQViTWithOtherGrids(t *testing.T) {
	net, x := smallViT(t, nil), images(8, 8, 8, 1)
	res, err := DopQViT{}.Compress(context.Background(), enginetest.Backend(), net, x)
	if err != nil {
		t.Fatal(err)
	}
	rep, err := RepQViT{}.Compress(context.Background(), enginetest.Backend(), net, x)
	if err != nil {
		t.Fatal(err)
	}
	for i, s := range res.Sites {
		if r := rep.Sites[i]; s.Name != r.Name || s.WeightBits != 4 || s.InputBits != r.InputBits || s.Bytes != r.Bytes || s.Note != r.Note {
			t.Errorf("%+v, of RepQ-ViT %+v", s, r)
		}
	}
	for i := range 2 {
		ctx := res.Network.Node(fmt.Sprintf("blk.%d.attn.ctx", i))
		op, ok := res.Network.Producer(ctx.In[0]).Op.(TanQuantize)
		if !ok || op.Bits != 4 {
			t.Errorf("attention of block %d is quantised by %v", i, res.Network.Producer(ctx.In[0]).Op)
		}
		if _, ok := res.Network.Producer(ctx.In[1]).Op.(nn.QuantizeDequantize); !ok {
			t.Errorf("the values of block %d are not on a uniform grid", i)
		}
	}
	if len(res.Notes) != 1 || !strings.Contains(res.Notes[0], "norm channels") {
		t.Error(res.Notes)
	}
}

func TestDopQViTTakesTheMedianOfTheChannels(t *testing.T) {
	net, x := smallViT(t, nil), images(8, 8, 8, 1)
	channel, err := RepQViT{Norms: ChannelWise}.Compress(context.Background(), enginetest.Backend(), net, x)
	if err != nil {
		t.Fatal(err)
	}
	s := float64s(channel.Network.Param(channel.Network.Node("blk.0.norm1.quant"), "scale").Data())
	z := float64s(channel.Network.Param(channel.Network.Node("blk.0.norm1.quant"), "zero").Data())
	reports := map[string]OutlierReport{}
	for scale, target := range map[NormScale]Target{ScaleMedian: TargetMedian, ScaleMean: TargetMean, ScaleMax: TargetMax} {
		for _, folding := range []Folding{FoldRefit, FoldFrozen, FoldFractional, FoldNone} {
			q := DopQViT{Scale: scale, Folding: folding, Outliers: func(norm string, r OutlierReport) { reports[norm] = r }}
			res, err := q.Compress(context.Background(), enginetest.Backend(), net, x)
			if err != nil {
				t.Fatal(err)
			}
			q1 := res.Network.Node("blk.0.norm1.quant")
			zero := target(z)
			if folding != FoldFractional {
				zero = math.RoundToEven(zero)
			}
			if got := res.Network.Param(q1, "scale").Data(); len(got) != 1 || got[0] != float32(target(s)) {
				t.Errorf("%s, %s: scale %v, want %g", scale, folding, got, target(s))
			}
			if got := res.Network.Param(q1, "zero").Data(); len(got) != 1 || got[0] != float32(zero) {
				t.Errorf("%s, %s: zero point %v, want %g", scale, folding, got, zero)
			}
			changed := !slices.Equal(res.Network.Params.Get("blk.0.norm1.w").Data(), net.Params.Get("blk.0.norm1.w").Data())
			if changed != (folding != FoldNone) {
				t.Errorf("%s, %s: the norm's gain has changed: %t", scale, folding, changed)
			}
		}
	}
	if r := reports["blk.0.norm1"]; len(reports) != 4 || r.Channels != 16 || r.Median != TargetMedian(s) {
		t.Errorf("%+v", reports)
	}
}

func TestSearchedScaleIsNoWorseForTheReaders(t *testing.T) {
	rows := normal(11, 64*12, 12)
	for i := range rows { // two channels stick out
		if c := i % 12; c == 3 || c == 7 {
			rows[i] *= 20
		}
	}
	grid, err := CalibrateUniform(rows, []int{64, 12}, 1, 4)
	if err != nil {
		t.Fatal(err)
	}
	c := normChoice{
		norm: "norm", grid: grid, rows: rows, bits: []int{4, 32},
		readers: []*LinearParams{{Name: "q", W: float64s(normal(12, 9*12, 12)), Out: 9}, {Name: "k", W: float64s(normal(13, 5*12, 12)), Out: 5}},
	}
	for _, f := range []Folding{FoldRefit, FoldFrozen, FoldFractional, FoldNone} {
		c.folded = f != FoldNone
		s, z, err := searchScale(c, f)
		if err != nil {
			t.Fatal(err)
		}
		trial := newScaleTrial(c, f)
		found, _ := trial.error(s, z)
		for name, target := range map[string]Target{"median": TargetMedian, "mean": TargetMean} {
			e, err := trial.error(target(grid.Scale), target(grid.Zero))
			if err != nil {
				t.Fatal(err)
			}
			if found > e*(1+1e-5) { // the median stays where the others win by rounding
				t.Errorf("%s: %s has the error %g, the search found %g", f, name, e, found)
			}
		}
		if f == FoldRefit { // a gauge: only the zero point can have won
			e, _ := trial.error(2*s, z)
			if math.Abs(e-found) > 1e-4*found {
				t.Errorf("twice the scale has the error %g, once %g", e, found)
			}
		}
	}
}

// At 8 bits every variant must stay close to the float network; a mistake in the rewriting shows at once.
func TestDopQViTAtEightBitsIsCloseToFloat(t *testing.T) {
	x := images(12, 8, 8, 1)
	for _, norm := range []nn.Norm{nn.LayerNorm{}, nn.RMSNorm{}, nn.LayerNorm{NoGain: true, NoBias: true}} {
		net := smallViT(t, norm)
		want := outputs(t, net, x)
		for _, q := range []DopQViT{
			{},
			{Scale: ScaleSearch},
			{Scale: ScaleMean, Folding: FoldFractional},
			{Folding: FoldFrozen},
			{TanQ: TanQOptions{Metric: TanQOutput}},
			{TanQ: TanQOptions{Kappas: []float64{.5}}},
			{ActBits: 32},
			{Fit: &ReconstructOptions{}, Scale: ScaleSearch},
		} {
			q.WeightBits = 8
			if q.ActBits == 0 {
				q.ActBits = 8
			}
			res, err := q.Compress(context.Background(), enginetest.Backend(), net, x)
			if err != nil {
				t.Fatal(err)
			}
			bound := 1e-3
			if q.Folding == FoldFrozen { // W' overflows the grid of W
				bound = .1
			}
			if e := compress.RelativeError(want, outputs(t, res.Network, x)); e > bound {
				t.Errorf("%T %+v: relative error %g", norm, q, e)
			}
		}
	}
}

// postNorm is a block whose first norm also feeds the residual.
func postNorm(t *testing.T) *nn.Network {
	t.Helper()
	b := nn.NewBuilder(1)
	n1 := b.Add("norm1", nn.LayerNorm{}, b.Input("x", shapes.Make(dtypes.Float32, 1, 4, 8)))
	h := b.Add("fc2", nn.Dense{Out: 8}, b.Add("act", nn.GELU{}, b.Add("fc1", nn.Dense{Out: 16}, n1)))
	net, err := b.Finish(b.Add("norm2", nn.LayerNorm{}, b.Add("res", nn.Add, n1, h)))
	if err != nil {
		t.Fatal(err)
	}
	return net
}

func TestDopQViTOnPostNormNetworks(t *testing.T) {
	net, x := postNorm(t), images(6, 4, 8)
	want := outputs(t, net, x)
	split, err := DopQViT{WeightBits: 8, ActBits: 8}.Compress(context.Background(), enginetest.Backend(), net, x)
	if err != nil {
		t.Fatal(err)
	}
	if n := len(split.Network.Nodes) - len(net.Nodes); n != 3 { // a copy of norm1, two quantisers
		t.Errorf("%d nodes more than before", n)
	}
	if e := compress.RelativeError(want, outputs(t, split.Network, x)); e > 1e-2 {
		t.Errorf("split: relative error %g", e)
	}
	if _, err := (DopQViT{Shared: RefuseShared}).Compress(context.Background(), enginetest.Backend(), net, x); !errors.Is(err, ErrSharedNorm) {
		t.Error(err)
	}
	res, err := DopQViT{WeightBits: 8, ActBits: 8, Shared: UnfoldShared}.Compress(context.Background(), enginetest.Backend(), net, x)
	if err != nil {
		t.Fatal(err)
	}
	q := res.Network.Producer(res.Network.Node("fc1").In[0])
	if op, ok := q.Op.(nn.QuantizeDequantize); !ok || op.PerChannel {
		t.Errorf("fc1 reads %v", q.Op)
	}
	if in := res.Network.Node("res").In[0]; in != "norm1" {
		t.Errorf("the residual reads %s", in)
	}
	if res.Network.Params.Get("norm1.w") == nil || !slices.Equal(res.Network.Params.Get("norm1.w").Data(), net.Params.Get("norm1.w").Data()) {
		t.Error("the norm has changed")
	}
	if e := compress.RelativeError(want, outputs(t, res.Network, x)); e > 1e-2 {
		t.Errorf("unfolded: relative error %g", e)
	}
	if len(res.Notes) != 2 || !strings.Contains(res.Notes[0], "norm1") {
		t.Error(res.Notes)
	}
}

func TestDopQViTHonoursTheOptions(t *testing.T) {
	ctx, be, net, x := context.Background(), enginetest.Backend(), smallViT(t, nil), images(8, 8, 8, 1)
	j, err := compress.OpenJournal(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	steps, restored := 0, 0
	q := DopQViT{Scale: ScaleSearch, Options: compress.Options{
		Journal: j, Bits: map[string]compress.Bits{"head": {Weight: 8}},
		Select:   func(n *nn.Node) bool { return n.Name != "blk.1.fc2" && n.Name != "blk.1.attn.ctx" },
		Progress: func(s compress.Step) { steps++; restored += map[bool]int{true: 1}[s.Restored] },
	}}
	res, err := q.Compress(ctx, be, net, x)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range res.Sites {
		if want := map[string]int{"head": 8, "blk.1.fc2": 32}[s.Name]; s.WeightBits != want && want+s.WeightBits != 4 {
			t.Errorf("%s has %d bits", s.Name, s.WeightBits)
		}
	}
	if p := res.Network.Producer(res.Network.Node("blk.1.attn.ctx").In[0]); p.Op.Kind() == (TanQuantize{}).Kind() {
		t.Error("a product that is not selected is quantised")
	}
	if steps != len(res.Sites)-1 || restored != 0 || j.Len() == 0 {
		t.Errorf("%d steps, %d restored, %d pieces kept", steps, restored, j.Len())
	}
	pieces := j.Len()
	again, err := q.Compress(ctx, be, net, x)
	if err != nil {
		t.Fatal(err)
	}
	if restored != len(res.Sites)-1 || j.Len() != pieces || !slices.Equal(outputs(t, again.Network, x), outputs(t, res.Network, x)) {
		t.Errorf("%d restored; %d pieces, then %d", restored, pieces, j.Len())
	}
	q.Bits = map[string]compress.Bits{"nowhere": {}}
	if _, err := q.Compress(ctx, be, net, x); err == nil {
		t.Error("bits of a node that is not there accepted")
	}
}

func TestDopQViTRefuses(t *testing.T) {
	ctx, be, net, x := context.Background(), enginetest.Backend(), smallViT(t, nil), images(4, 8, 8, 1)
	for _, q := range []DopQViT{{WeightBits: 1}, {ActBits: 9}, {InputBits: 16}} {
		if _, err := q.Compress(ctx, be, net, x); !errors.Is(err, ErrBits) {
			t.Error(q, err)
		}
	}
	for _, q := range []DopQViT{{Scale: "mode"}, {Folding: "half"}, {Shared: "keep"}, {Folding: FoldFrozen, Fit: &ReconstructOptions{}}, {TanQ: TanQOptions{Gains: []float64{1.2}}}} {
		if _, err := q.Compress(ctx, be, net, x); err == nil || !strings.Contains(err.Error(), "dopq-vit") {
			t.Error(q, err)
		}
	}
	if _, err := (DopQViT{}).Compress(ctx, be, net, nil); !errors.Is(err, ErrEmpty) {
		t.Error(err)
	}
	res, err := DopQViT{SkipSiteErrors: true}.Compress(ctx, be, net, x)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := (DopQViT{}).Compress(ctx, be, res.Network, x); err == nil || !strings.Contains(err.Error(), "quantised already") {
		t.Error("a quantised network:", err)
	}
	b := nn.NewBuilder(1)
	plain, err := b.Finish(b.Add("fc", nn.Dense{Out: 3}, b.Input("x", shapes.Make(dtypes.Float32, 1, 8))))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := (DopQViT{}).Compress(ctx, be, plain, images(4, 8)); err == nil || !strings.Contains(err.Error(), "min-max") {
		t.Error("no transformer:", err)
	}
}

func TestOutlierChannelsKeepTheFunction(t *testing.T) {
	net, x := smallViT(t, nil), images(4, 8, 8, 1)
	want := outputs(t, net, x)
	before := net.Params.Get("blk.0.norm1.w").Data()
	norms, err := OutlierChannels(net, 2, 20, 1)
	if err != nil || len(norms) != 4 {
		t.Fatal(norms, err)
	}
	moved := 0
	for i, v := range net.Params.Get("blk.0.norm1.w").Data() {
		if v != before[i] {
			moved++
		}
	}
	if moved != 2 {
		t.Errorf("%d channels have changed", moved)
	}
	if e := compress.RelativeError(want, outputs(t, net, x)); e > 1e-10 {
		t.Errorf("relative error %g", e)
	}
	if _, err := OutlierChannels(net, 2, 0, 1); err == nil {
		t.Error("factor 0 accepted")
	}
}

// Where nothing can be folded, outliers ruin the grid of the whole range, and not that of the median.
func TestMedianScaleSurvivesOutliersWithoutFolding(t *testing.T) {
	net, x := smallViT(t, nil), images(16, 8, 8, 1)
	if _, err := OutlierChannels(net, 1, 50, 1); err != nil {
		t.Fatal(err)
	}
	want := outputs(t, net, x)
	e := map[NormScale]float64{}
	for _, scale := range []NormScale{ScaleMedian, ScaleMinMax, ScaleSearch} {
		res, err := DopQViT{Scale: scale, Folding: FoldNone}.Compress(context.Background(), enginetest.Backend(), net, x)
		if err != nil {
			t.Fatal(err)
		}
		e[scale] = compress.RelativeError(want, outputs(t, res.Network, x))
	}
	if e[ScaleMedian] >= e[ScaleMinMax] || e[ScaleSearch] >= e[ScaleMinMax] {
		t.Error(e)
	}
	if _, err := (DopQViT{Scale: ScaleMinMax}).Compress(context.Background(), enginetest.Backend(), net, x); err == nil {
		t.Error("the range of the tensor was folded")
	}
}

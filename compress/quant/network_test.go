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
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/onnx"
	"github.com/lathe-ml/lathe/nn/safetensors"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// smallViT is a transformer of two blocks with random weights, large enough that its activations matter.
func smallViT(t *testing.T, norm nn.Norm) *nn.Network {
	t.Helper()
	net, err := zoo.ViT(zoo.ViTOptions{Size: 8, Patch: 4, Dim: 16, Depth: 2, Heads: 2, Classes: 5, Norm: norm, Seed: 3})
	if err != nil {
		t.Fatal(err)
	}
	r := rng.New(4, "perturb")
	for p := range net.Params.All() {
		if p.Role == nn.Gain || p.Role == nn.Bias {
			d := p.Data()
			for i := range d {
				d[i] += float32(.3 * r.NormFloat64())
			}
			if err := p.SetData(d); err != nil {
				t.Fatal(err)
			}
		}
	}
	return net
}

func images(n int, dims ...int) compress.Examples {
	s := append([]int{n}, dims...)
	x := make([]float32, shapes.Make(dtypes.Float32, s...).Size())
	r := rng.New(uint64(n), "images")
	for i := range x {
		x[i] = float32(r.NormFloat64() * .7)
	}
	return compress.Examples{tensors.FromFlatDataAndDimensions(x, s...)}
}

func outputs(t *testing.T, net *nn.Network, x compress.Examples) []float32 {
	t.Helper()
	y, _, err := compress.Evaluate(context.Background(), enginetest.Backend(), net, x, 0)
	if err != nil {
		t.Fatal(err)
	}
	return y
}

func TestGraphQuantisersEqualHostQuantisers(t *testing.T) {
	x := normal(7, 4*6, 6)
	prob := make([]float32, 24)
	for i := range prob {
		prob[i] = float32(math.Exp2(-float64(i) * .37))
	}
	prob[5] = 0
	for _, bits := range []int{2, 4, 8} {
		for _, axis := range []int{-1, 1} {
			a, err := CalibrateUniform(x, []int{4, 6}, axis, bits)
			if err != nil {
				t.Fatal(err)
			}
			want, err := a.FakeQuant(x, []int{4, 6})
			if err != nil {
				t.Fatal(err)
			}
			got := runOp(t, nn.QuantizeDequantize{Bits: bits, PerChannel: axis == 1}, x, a.Scale, a.Zero)
			if !slices.Equal(got, want) {
				t.Errorf("%d bits, axis %d: graph %v, host %v", bits, axis, got, want)
			}
		}
		for k := 1; k <= 2; k++ {
			g := logGrid{bits, .8, k}
			want, err := g.fakeQuant(prob)
			if err != nil {
				t.Fatal(err)
			}
			for i, v := range runOp(t, LogQuantize{Bits: bits, PerOctave: k}, prob, []float64{.8}, nil) {
				if math.Abs(float64(v-want[i])) > 1e-5*float64(want[i]) {
					t.Errorf("%d bits, %d per octave, %g: graph %g, host %g", bits, k, prob[i], v, want[i])
				}
			}
		}
	}
}

func runOp(t *testing.T, op nn.Op, x []float32, scale, zero []float64) []float32 {
	t.Helper()
	b := nn.NewBuilder(1)
	in := b.Input("x", shapes.Make(dtypes.Float32, 4, 6))
	y := b.Add("y", op, in)
	net, err := b.Finish(y)
	if err != nil {
		t.Fatal(err)
	}
	net.SetParam(net.Node("y"), "scale", nn.Constant, narrow(scale), len(scale))
	if zero != nil {
		net.SetParam(net.Node("y"), "zero", nn.Constant, narrow(zero), len(zero))
	}
	return outputs(t, net, compress.Examples{tensors.FromFlatDataAndDimensions(x, 4, 6)})
}

func TestUniformWeightEqualsItsGrid(t *testing.T) {
	x := images(3, 8)
	for _, g := range []WeightGrid{{Bits: 4}, {Bits: 8, PerTensor: true}, {Bits: 4, Group: 4}, {Bits: 3, Symmetric: true}} {
		b := nn.NewBuilder(2)
		net, err := b.Finish(b.Add("fc", nn.Dense{Out: 6}, b.Input("x", shapes.Make(dtypes.Float32, 1, 8))))
		if err != nil {
			t.Fatal(err)
		}
		before := outputs(t, net, x)
		s, err := siteOf(net, net.Node("fc"))
		if err != nil {
			t.Fatal(err)
		}
		r, params, err := g.Quantize(context.Background(), s)
		if err != nil {
			t.Fatal(err)
		}
		a, _ := g.Fit(s)
		w, err := a.FakeQuant(s.Weight, s.Shape)
		if err != nil {
			t.Fatal(err)
		}
		restore, err := net.Substitute("fc", r, params)
		if err != nil {
			t.Fatal(err)
		}
		got := outputs(t, net, x)
		ref := net.Clone()
		restoreInto(t, ref, w, s.Shape)
		want := outputs(t, ref, x)
		for i := range got {
			if math.Abs(float64(got[i]-want[i])) > 1e-5 {
				t.Fatalf("%+v: output %d is %g, want %g", g, i, got[i], want[i])
			}
		}
		if n := compress.WeightBytes(net, net.Node("fc")); n < int64(48*g.Bits/8) || n > int64(48*g.Bits/8+12*5) {
			t.Errorf("%+v: %d bytes", g, n)
		}
		restore()
		if !slices.Equal(outputs(t, net, x), before) {
			t.Errorf("%+v: restoring does not give the old outputs", g)
		}
	}
}

func restoreInto(t *testing.T, net *nn.Network, w []float32, shape []int) {
	t.Helper()
	n := net.Node("fc")
	n.Op = n.Op.(nn.Linear).WithRepr(nn.Plain{})
	net.SetParam(n, "w", nn.Weight, w, shape...)
}

func TestRepQViTQuantisesWhatThePaperSays(t *testing.T) {
	net := smallViT(t, nil)
	before := outputs(t, net, images(4, 8, 8, 1))
	res, err := RepQViT{}.Compress(context.Background(), enginetest.Backend(), net, images(8, 8, 8, 1))
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(before, outputs(t, net, images(4, 8, 8, 1))) {
		t.Error("the given network has changed")
	}
	want := map[string]int{"patch": 8, "head": 4}
	for i := range 2 {
		for _, s := range []string{"attn.q", "attn.k", "attn.v", "attn.o", "fc1", "fc2"} {
			want[fmt.Sprintf("blk.%d.%s", i, s)] = 4
		}
	}
	if len(res.Sites) != len(want) {
		t.Errorf("%d sites, want %d", len(res.Sites), len(want))
	}
	for _, s := range res.Sites {
		if s.WeightBits != 4 || s.InputBits != want[s.Name] || s.Bytes >= s.FloatBytes || !(s.WeightErr > 0) || !(s.OutputErr > 0) || s.OutputErr > 1 {
			t.Errorf("%+v", s)
		}
	}
	for i := range 2 {
		probs, q := res.Network.Node(fmt.Sprintf("blk.%d.attn.ctx", i)), ""
		q = probs.In[0]
		if op, ok := res.Network.Producer(q).Op.(LogQuantize); !ok || op.PerOctave != 2 || op.Bits != 4 {
			t.Errorf("attention probabilities of block %d are quantised by %v", i, res.Network.Producer(q).Op)
		}
		for _, v := range append(res.Network.Node(fmt.Sprintf("blk.%d.attn.logits", i)).In, probs.In[1]) {
			if _, ok := res.Network.Producer(v).Op.(nn.QuantizeDequantize); !ok {
				t.Errorf("operand %s is not quantised", v)
			}
		}
	}
	if compress.Size(res.Network) >= compress.Size(net)/3 {
		t.Errorf("%d bytes of %d", compress.Size(res.Network), compress.Size(net))
	}
}

// At 8 bits every variant must stay close to the float network; a mistake in the rewriting shows at once.
func TestRepQViTAtEightBitsIsCloseToFloat(t *testing.T) {
	x := images(12, 8, 8, 1)
	for _, norm := range []nn.Norm{nn.LayerNorm{}, nn.RMSNorm{}, nn.LayerNorm{NoBias: true}, nn.LayerNorm{NoGain: true, NoBias: true}} {
		net := smallViT(t, norm)
		if _, err := SpreadChannels(net, 6, 1); err != nil {
			t.Fatal(err)
		}
		want := outputs(t, net, x)
		for _, q := range []RepQViT{
			{},
			{Norms: ChannelWise},
			{Softmax: SoftmaxUniform},
			{Reparam: ReparamOptions{FractionalZero: true}},
			{Reparam: ReparamOptions{Target: TargetMedian}},
			{Reparam: ReparamOptions{Target: TargetMax}},
		} {
			q.WeightBits, q.ActBits = 8, 8
			res, err := q.Compress(context.Background(), enginetest.Backend(), net, x)
			if err != nil {
				t.Fatal(err)
			}
			// A grid of powers of √2 is no finer at 8 bits than at 4: up to 19 % per probability.
			bound := 1e-3
			if q.Softmax != SoftmaxUniform {
				bound = 2e-2
			}
			if e := compress.RelativeError(want, outputs(t, res.Network, x)); e > bound {
				t.Errorf("%T %+v: relative error %g", norm, q, e)
			}
		}
	}
}

func TestQuantisedNetworksSurviveFiles(t *testing.T) {
	net, x := smallViT(t, nil), images(8, 8, 8, 1)
	for name, m := range map[string]compress.Method{
		"repq": RepQViT{}, "channel-wise": RepQViT{Norms: ChannelWise}, "uniform": RepQViT{Softmax: SoftmaxUniform, WeightBits: 3},
		"fractional": RepQViT{Reparam: ReparamOptions{FractionalZero: true}}, "min-max": MinMaxPTQ{},
		"tangent": DopQViT{}, "tangent, unfolded": DopQViT{Folding: FoldNone, Scale: ScaleSearch}, "tangent, 8 bits": DopQViT{WeightBits: 8, ActBits: 8},
	} {
		res, err := m.Compress(context.Background(), enginetest.Backend(), net, x)
		if err != nil {
			t.Fatal(err)
		}
		want := outputs(t, res.Network, x)
		f, err := safetensors.EncodeNetwork(res.Network)
		if err != nil {
			t.Fatal(name, err)
		}
		back, err := safetensors.DecodeNetwork(f, StoredTypes()...)
		if err != nil {
			t.Fatal(name, err)
		}
		if !slices.Equal(outputs(t, back, x), want) {
			t.Errorf("%s: safetensors gives another function", name)
		}
		for _, opset := range []int{17, 21} {
			b, err := onnx.Marshal(res.Network, onnx.WriteOptions{Opset: opset})
			if err != nil {
				t.Fatal(name, err)
			}
			back, err := onnx.Read(b, onnx.Options{})
			if err != nil {
				t.Fatal(name, err)
			}
			if e := compress.RelativeError(want, outputs(t, back, x)); e > 1e-3 { // ties may round the other way
				t.Errorf("%s: ONNX of operator set %d gives another function: relative error %g", name, opset, e)
			}
		}
	}
}

func TestWeightsOfEveryGranularityAreWrittenToONNX(t *testing.T) {
	x := images(5, 8)
	for _, g := range []WeightGrid{{Bits: 4}, {Bits: 8, PerTensor: true}, {Bits: 4, Group: 4}, {Bits: 3, Symmetric: true}, {Bits: 4, Group: 2, Symmetric: true}} {
		for _, shift := range []float32{0, 5} { // a row without zero in its range has a zero point that is no code
			b := nn.NewBuilder(2)
			net, err := b.Finish(b.Add("fc", nn.Dense{Out: 6}, b.Input("x", shapes.Make(dtypes.Float32, 1, 8))))
			if err != nil {
				t.Fatal(err)
			}
			s, err := siteOf(net, net.Node("fc"))
			if err != nil {
				t.Fatal(err)
			}
			for i := range s.Weight {
				s.Weight[i] += shift
			}
			r, params, err := g.Quantize(context.Background(), s)
			if err != nil {
				t.Fatal(err)
			}
			if err := install(net, net.Node("fc"), r, params); err != nil {
				t.Fatal(err)
			}
			for _, opset := range []int{17, 21} {
				file, err := onnx.Marshal(net, onnx.WriteOptions{Opset: opset})
				if err != nil {
					t.Fatal(err)
				}
				back, err := onnx.Read(file, onnx.Options{})
				if err != nil {
					t.Fatalf("%+v, operator set %d: %v", g, opset, err)
				}
				if e := compress.RelativeError(outputs(t, net, x), outputs(t, back, x)); e > 1e-10 {
					t.Errorf("%+v, operator set %d: relative error %g", g, opset, e)
				}
			}
		}
	}
}

func TestSpreadChannelsKeepsTheFunction(t *testing.T) {
	net := smallViT(t, nil)
	x := images(4, 8, 8, 1)
	want := outputs(t, net, x)
	norms, err := SpreadChannels(net, 6, 1)
	if err != nil || len(norms) != 4 {
		t.Fatal(norms, err)
	}
	if e := compress.RelativeError(want, outputs(t, net, x)); e > 1e-10 {
		t.Errorf("relative error %g", e)
	}
}

func TestReparameterisedCodesEqualChannelWiseCodesInTheNetwork(t *testing.T) {
	net := smallViT(t, nil)
	x := images(8, 8, 8, 1)
	codes := map[NormGranularity][]float64{}
	for _, g := range []NormGranularity{ChannelWise, Reparameterized} {
		res, err := RepQViT{Norms: g}.Compress(context.Background(), enginetest.Backend(), net, x)
		if err != nil {
			t.Fatal(err)
		}
		q := res.Network.Node("blk.0.norm1.quant")
		data, _, err := compress.Capture(context.Background(), enginetest.Backend(), res.Network, x, 0, q.Out[0])
		if err != nil {
			t.Fatal(err)
		}
		s, z := res.Network.Param(q, "scale").Data(), res.Network.Param(q, "zero").Data()
		for i, v := range data[0] {
			codes[g] = append(codes[g], math.Round(float64(v)/float64(s[i%len(s)]))+float64(z[i%len(z)]))
		}
	}
	differ := 0
	for i, c := range codes[ChannelWise] {
		if codes[Reparameterized][i] != c {
			differ++
		}
	}
	if differ > len(codes[ChannelWise])/500 { // values within rounding of a tie may move
		t.Errorf("%d of %d codes differ", differ, len(codes[ChannelWise]))
	}
}

func TestRepQViTOnFusedQKV(t *testing.T) {
	b := nn.NewBuilder(5)
	x := b.Input("x", shapes.Make(dtypes.Float32, 1, 6, 8))
	n := b.Add("norm", nn.LayerNorm{}, x)
	qkv := b.Add("qkv", nn.Dense{Out: 24}, n)
	qkv = b.Add("heads", nn.Reshape{Dims: []int{0, 6, 3, 2, 4}}, qkv)
	qkv = b.Add("order", nn.Transpose{Perm: []int{2, 0, 3, 1, 4}}, qkv)
	part := func(name string, i int) string {
		return b.Add(name+".r", nn.Reshape{Dims: []int{-1, 2, 6, 4}}, b.Add(name, nn.Slice{Axis: 0, From: i, To: i + 1}, qkv))
	}
	q, k, v := part("q", 0), b.Add("kt", nn.Transpose{Perm: []int{0, 1, 3, 2}}, part("k", 1)), part("v", 2)
	p := b.Add("probs", nn.Softmax{}, b.Add("logits", nn.MatMul{Scale: .5}, q, k))
	o := b.Add("merge", nn.Reshape{Dims: []int{0, 6, 8}}, b.Add("ctx.t", nn.Transpose{Perm: []int{0, 2, 1, 3}}, b.Add("ctx", nn.MatMul{}, p, v)))
	net, err := b.Finish(b.Add("res", nn.Add, x, b.Add("proj", nn.Dense{Out: 8}, o)))
	if err != nil {
		t.Fatal(err)
	}
	in := images(16, 6, 8)
	res, err := RepQViT{WeightBits: 8, ActBits: 8}.Compress(context.Background(), enginetest.Backend(), net, in)
	if err != nil {
		t.Fatal(err)
	}
	if e := compress.RelativeError(outputs(t, net, in), outputs(t, res.Network, in)); e > 1e-2 {
		t.Errorf("relative error %g", e)
	}
	if op := res.Network.Node("norm.quant").Op.(nn.QuantizeDequantize); op.PerChannel {
		t.Error("the norm's grid is still channel-wise")
	}
	if _, ok := res.Network.Producer(res.Network.Node("ctx").In[0]).Op.(LogQuantize); !ok {
		t.Error("the attention probabilities are not on a log grid")
	}
}

func TestRepQViTRefuses(t *testing.T) {
	ctx, be, x := context.Background(), enginetest.Backend(), images(4, 8, 8, 1)
	net := smallViT(t, nil)
	for _, q := range []RepQViT{{WeightBits: 1}, {ActBits: 9}, {WeightBits: -4}, {InputBits: 16}} {
		if _, err := q.Compress(ctx, be, net, x); !errors.Is(err, ErrBits) {
			t.Error(q, err)
		}
	}
	for _, q := range []RepQViT{{Norms: "none"}, {Softmax: "sqrt"}} {
		if _, err := q.Compress(ctx, be, net, x); err == nil {
			t.Error(q, "accepted")
		}
	}
	if _, err := (RepQViT{}).Compress(ctx, be, net, nil); !errors.Is(err, ErrEmpty) {
		t.Error(err)
	}
	if _, err := (RepQViT{}).Compress(ctx, be, net, images(4, 9, 8, 1)); err == nil {
		t.Error("examples of another shape accepted")
	}

	bad := net.Clone()
	d := bad.Params.Get("blk.1.fc2.w").Data()
	d[3] = float32(math.NaN())
	bad.SetParam(bad.Node("blk.1.fc2"), "w", nn.Weight, d, 16, 32)
	if _, err := (RepQViT{}).Compress(ctx, be, bad, x); !errors.Is(err, ErrNotFinite) || !strings.Contains(err.Error(), "blk.1.fc2") {
		t.Error("NaN weight:", err)
	}
	nan := images(4, 8, 8, 1)
	tensors.MustMutableFlatData(nan[0], func(v []float32) { v[5] = float32(math.Inf(1)) })
	if _, err := (RepQViT{}).Compress(ctx, be, net, nan); !errors.Is(err, ErrNotFinite) || !strings.Contains(err.Error(), "patch") {
		t.Error("infinite input:", err)
	}

	b := nn.NewBuilder(1) // post-norm: the norm also feeds the residual
	in := b.Input("x", shapes.Make(dtypes.Float32, 1, 4, 8))
	n1 := b.Add("norm1", nn.LayerNorm{}, in)
	h := b.Add("fc2", nn.Dense{Out: 8}, b.Add("act", nn.GELU{}, b.Add("fc1", nn.Dense{Out: 16}, n1)))
	post, err := b.Finish(b.Add("norm2", nn.LayerNorm{}, b.Add("res", nn.Add, n1, h)))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := (RepQViT{}).Compress(ctx, be, post, images(4, 4, 8)); !errors.Is(err, ErrSharedNorm) || !strings.Contains(err.Error(), "norm1") || !strings.Contains(err.Error(), "res") {
		t.Error("post-norm:", err)
	}
	if _, err := (RepQViT{Norms: LayerWise}).Compress(ctx, be, post, images(4, 4, 8)); err != nil {
		t.Error("layer-wise needs no rewriting:", err)
	}

	b = nn.NewBuilder(1)
	mlp, err := b.Finish(b.Add("fc", nn.Dense{Out: 3}, b.Input("x", shapes.Make(dtypes.Float32, 1, 8))))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := (RepQViT{}).Compress(ctx, be, mlp, images(4, 8)); err == nil || !strings.Contains(err.Error(), "min-max") {
		t.Error("a network without norms:", err)
	}
	twice, err := RepQViT{}.Compress(ctx, be, net, x)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range []compress.Method{RepQViT{}, MinMaxPTQ{}} {
		if _, err := m.Compress(ctx, be, twice.Network, x); err == nil || !strings.Contains(err.Error(), "already") {
			t.Errorf("%T on a quantised network: %v", m, err)
		}
	}
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := (RepQViT{}).Compress(cancelled, be, net, x); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func convNet(t *testing.T) *nn.Network {
	t.Helper()
	b := nn.NewBuilder(7)
	x := b.Image("x", 8, 8, 3)
	c := nn.Conv2D(8, 3, 2)
	c.NoBias = true
	x = b.Add("conv1", c, x)
	x = b.Add("bn1", nn.BatchNorm{}, x)
	x = b.Add("act1", nn.ReLU, x)
	dw := nn.Conv2D(8, 3, 1)
	dw.Groups, dw.NoBias = 8, true
	y := b.Add("act2", nn.ReLU, b.Add("bn2", nn.BatchNorm{}, b.Add("dw", dw, x)))
	x = b.Add("sum", nn.Add, x, b.Add("pw", nn.Conv2D(8, 1, 1), y))
	net, err := b.Finish(b.Add("fc", nn.Dense{Out: 4}, b.Add("pool", nn.GlobalAveragePool, x)))
	if err != nil {
		t.Fatal(err)
	}
	r := rng.New(8, "bn")
	for _, bn := range []string{"bn1", "bn2"} {
		for _, l := range []string{"w", "b", "mean", "var"} {
			p := net.Param(net.Node(bn), l)
			d := p.Data()
			for i := range d {
				d[i] = float32(math.Exp(1.5 * r.NormFloat64()))
			}
			if err := p.SetData(d); err != nil {
				t.Fatal(err)
			}
		}
	}
	return net
}

func TestMinMaxPTQ(t *testing.T) {
	ctx, be := context.Background(), enginetest.Backend()
	net, x := convNet(t), images(70, 8, 8, 3)
	want := outputs(t, net, x)
	var weight []float64
	for _, q := range []MinMaxPTQ{{}, {PerTensor: true}} {
		res, err := q.Compress(ctx, be, net, x)
		if err != nil {
			t.Fatal(err)
		}
		if len(res.Sites) != 4 || res.Network.Node("conv1").Op.Kind() != "conv" {
			t.Errorf("sites %+v", res.Sites)
		}
		for _, s := range res.Sites {
			if s.WeightBits != 8 || s.InputBits != 8 || s.Bytes*3 > s.FloatBytes && s.FloatBytes > 400 {
				t.Errorf("%+v", s)
			}
		}
		if e := compress.RelativeError(want, outputs(t, res.Network, x)); e > 1e-3 {
			t.Errorf("%+v: relative error %g", q, e)
		}
		weight = append(weight, res.Sites[1].WeightErr)
	}
	if weight[1] < 2*weight[0] { // the folded depthwise kernels differ in range
		t.Errorf("weight errors per channel and per tensor: %v", weight)
	}
	if !slices.Equal(want, outputs(t, net, x)) {
		t.Error("the given network has changed")
	}
	if _, err := (MinMaxPTQ{WeightBits: 1}).Compress(ctx, be, net, x); !errors.Is(err, ErrBits) {
		t.Error(err)
	}
	if _, err := (MinMaxPTQ{}).Compress(ctx, be, net, nil); !errors.Is(err, ErrEmpty) {
		t.Error(err)
	}
	nan := images(4, 8, 8, 3)
	tensors.MustMutableFlatData(nan[0], func(v []float32) { v[5] = float32(math.Inf(1)) })
	if _, err := (MinMaxPTQ{}).Compress(ctx, be, net, nan); !errors.Is(err, ErrNotFinite) {
		t.Error(err)
	}
	bad := net.Clone()
	bad.SetParam(bad.Node("fc"), "w", nn.Weight, slices.Repeat([]float32{float32(math.NaN())}, 32), 4, 8)
	if _, err := (MinMaxPTQ{}).Compress(ctx, be, bad, x); !errors.Is(err, ErrNotFinite) || !strings.Contains(err.Error(), `"fc"`) {
		t.Error(err)
	}
}

func TestQuantisedActivationsAreTheSameWhileTraining(t *testing.T) {
	// Training mode must give the same values as inference up to rounding: the gradient trick adds and subtracts x.
	net := smallViT(t, nil)
	x := images(8, 8, 8, 1)
	res, err := RepQViT{Softmax: SoftmaxUniform}.Compress(context.Background(), enginetest.Backend(), net, x)
	if err != nil {
		t.Fatal(err)
	}
	r, err := nn.NewRunner(enginetest.Backend(), res.Network, nn.RunOptions{Training: true})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Finalize()
	out, err := r.Run(x...)
	if err != nil {
		t.Fatal(err)
	}
	if e := compress.RelativeError(outputs(t, res.Network, x), nn.Floats(out[0])); e > .05 {
		t.Errorf("relative difference %g", e)
	}
}

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
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/internal/fixture"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/learn/optim"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/onnx"
	"github.com/lathe-ml/lathe/nn/safetensors"
)

// signScale runs the decomposition in float64: w, the shift, and the gradients of the sign and every t.
func signScale(t *testing.T, rescale bool, sign, grad *tensors.Tensor, latents ...*tensors.Tensor) (w, shift []float64, grads [][]float64) {
	t.Helper()
	ex, err := engine.NewExec(enginetest.Backend(), func(in []*graph.Node) []*graph.Node {
		w, s := SignScale(in[1], in[2:], rescale)
		return append([]*graph.Node{w, s}, graph.Gradient(graph.ReduceAllSum(graph.Mul(w, graph.StopGradient(in[0]))), in[1:]...)...)
	})
	if err != nil {
		t.Fatal(err)
	}
	defer ex.Finalize()
	args := []any{grad, sign}
	for _, l := range latents {
		args = append(args, l)
	}
	out, err := ex.Call(args...)
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range out[2:] {
		grads = append(grads, nn.Float64s(g))
	}
	return nn.Float64s(out[0]), nn.Float64s(out[1]), grads
}

func TestFixturesDenseShift(t *testing.T) {
	fixture.Run(t, 77, map[string]fixture.Func{
		"dense_shift": func(t *testing.T, c *fixture.Case) map[string]any {
			var l []*tensors.Tensor
			for i := range c.Params["T"].Int() {
				l = append(l, c.Inputs[fmt.Sprintf("t%d", i+1)].Tensor(dtypes.Float64))
			}
			w, s, g := signScale(t, c.Params["rescale"].Bool(), c.Inputs["w_sign"].Tensor(dtypes.Float64), c.Inputs["grad_out"].Tensor(dtypes.Float64), l...)
			out := map[string]any{"w": w, "shift": s, "grad_sign": g[0]}
			for i := range l {
				out[fmt.Sprintf("grad_t%d", i+1)] = g[i+1]
			}
			return out
		},
		"exponent_add": func(t *testing.T, c *fixture.Case) map[string]any {
			x, signs, shift := c.Inputs["x"].Float32s(), c.Inputs["sign"].Floats(), c.Inputs["shift"].Ints()
			product, dot := make([]float32, len(signs)), make([]float64, len(signs)/len(x))
			for i := range product {
				product[i] = ShiftF32(x[i%len(x)], shift[i], signs[i] < 0)
				dot[i/len(x)] += float64(product[i])
			}
			return map[string]any{"product": product, "dot": dot}
		},
		"freezing": func(t *testing.T, c *fixture.Case) map[string]any {
			w := c.Inputs["weights"]
			var m FreezingMeter
			per := len(w.Floats()) / w.Shape[0]
			for k := range w.Shape[0] {
				if err := m.Record(w.Float32s()[k*per : (k+1)*per]); err != nil {
					t.Fatal(err)
				}
			}
			return map[string]any{"flip_rate": m.FlipRate(), "sign_flip_rate": m.SignFlipRate(), "frozen_fraction": []float64{m.FrozenFraction()}}
		},
	})
}

func f64(x ...float64) *tensors.Tensor { return tensors.FromFlatDataAndDimensions(x, len(x)) }

func TestShiftIsTheRunOfOnesAtTheEnd(t *testing.T) {
	for h, want := range map[string]float64{"000": 0, "111": 3, "011": 2, "001": 1, "101": 1, "110": 0, "010": 0, "100": 0} {
		var l []*tensors.Tensor
		for _, c := range h {
			v := -.5
			if c == '1' {
				v = 1e-9
			}
			l = append(l, f64(v, 0*v))
		}
		w, s, _ := signScale(t, true, f64(0, math.Copysign(0, -1)), f64(1, 1), l...)
		if s[0] != want || w[0] != math.Exp2(want) {
			t.Errorf("%s: shift %g, weight %g; want %g", h, s[0], w[0], want)
		}
		if s[1] != 0 || w[1] != 1 { // latents that are exactly zero: H = 0, sgn = +1
			t.Errorf("zero latents give shift %g and weight %g", s[1], w[1])
		}
	}
}

func TestBackwardTakesTheRootForThePower(t *testing.T) {
	one := f64(1)
	_, _, g := signScale(t, true, one, one, f64(1), f64(1), f64(1))
	// dS/dt3 = S2+1 = 3, and dL/dS = 0.25 at S = 3
	if g[0][0] != 2 || math.Abs(g[3][0]-.75) > 1e-12 {
		t.Errorf("at S = 3: sign %g, t3 %g; want 2 and 3·0.25", g[0][0], g[3][0])
	}
	_, _, g = signScale(t, true, one, one, f64(-1), f64(-1), f64(-1))
	if g[0][0] != 1 || g[3][0] != .5 {
		t.Errorf("at S = 0: sign %g, t3 %g; want 1 and 0.5", g[0][0], g[3][0])
	}
	if g[1][0] != 0 || g[2][0] != 0 {
		t.Errorf("a last latent below zero lets gradients %g, %g through to the others", g[1][0], g[2][0])
	}
}

func TestRescalingChangesNoValue(t *testing.T) {
	r := rng.New(1, "latents")
	for _, T := range []int{1, 3, 7, 15} {
		var l []*tensors.Tensor
		for range T + 1 {
			x := make([]float64, 400)
			for i := range x {
				x[i] = r.NormFloat64() * 1e-3
			}
			l = append(l, f64(x...))
		}
		ones := f64(slices.Repeat([]float64{1}, 400)...)
		a, s, _ := signScale(t, true, l[0], ones, l[1:]...)
		b, _, _ := signScale(t, false, l[0], ones, l[1:]...)
		if !slices.Equal(a, b) {
			t.Errorf("T = %d: the weights differ", T)
		}
		for i := range a {
			if math.Abs(a[i]) != math.Exp2(s[i]) || s[i] < 0 || s[i] > float64(T) {
				t.Fatalf("T = %d: weight %g at shift %g", T, a[i], s[i])
			}
		}
	}
}

func TestMeanOfRandomWeights(t *testing.T) {
	for bits := 2; bits <= 4; bits++ {
		const n = 40_000
		T := shifts(bits)
		r := rng.New(uint64(bits), "latents")
		draw := func() []float32 { x := make([]float32, n); rng.Normal(r, x, 1e-3); return x }
		var l [][]float32
		for range T {
			l = append(l, draw())
		}
		w, err := PackShift(draw(), l, bits)
		if err != nil {
			t.Fatal(err)
		}
		sum, square := 0., 0.
		for _, v := range w.Decode() {
			sum += math.Abs(float64(v))
			square += float64(v) * float64(v)
		}
		mean, want := sum/n, float64(T)/2+1
		se := math.Sqrt((meanSquare(bits) - want*want) / n)
		if math.Abs(mean-want) > 3*se {
			t.Errorf("%d bits: mean |w| is %g, want %g ± %g", bits, mean, want, 3*se)
		}
		if got := square / n; math.Abs(got-meanSquare(bits)) > .1*meanSquare(bits) {
			t.Errorf("%d bits: mean square %g, want %g", bits, got, meanSquare(bits))
		}
	}
}

func randomShifts(bits int, shape ...int) *ShiftWeights {
	size := 1
	for _, d := range shape {
		size *= d
	}
	w := &ShiftWeights{Bits: bits, Shape: shape, Codes: make([]uint8, size)}
	r := rng.New(uint64(bits), "codes")
	for i := range w.Codes {
		w.Codes[i] = uint8(r.IntN(1 << bits))
	}
	return w
}

func TestDotF32EqualsMultiplication(t *testing.T) {
	r := rng.New(3, "dot")
	for bits := 2; bits <= 5; bits++ {
		for _, zeros := range []bool{false, true} {
			w := randomShifts(bits, 7, 33)
			x, y := make([]float32, 33), make([]float32, 7)
			rng.Normal(r, x, 3)
			if zeros {
				x[0], x[5], x[32] = 0, float32(math.Copysign(0, -1)), 0
			}
			if err := w.DotF32(x, y); err != nil {
				t.Fatal(err)
			}
			d := w.Decode()
			for o := range y {
				var sum float32
				for i := range x {
					p := d[o*33+i] * x[i]
					sum += p
				}
				if y[o] != sum {
					t.Errorf("%d bits, row %d: %g, multiplication gives %g", bits, o, y[o], sum)
				}
			}
		}
	}
}

func TestDotIntEqualsMultiplication(t *testing.T) {
	for bits := 2; bits <= 5; bits++ {
		w := randomShifts(bits, 5, 20)
		x, y := make([]int32, 20), make([]int64, 5)
		for i := range x {
			x[i] = int32(i*i*7919) - 1<<20
		}
		if err := w.DotInt(x, y); err != nil {
			t.Fatal(err)
		}
		d := w.Decode()
		for o := range y {
			var sum int64
			for i := range x {
				sum += int64(d[o*20+i]) * int64(x[i])
			}
			if y[o] != sum {
				t.Errorf("%d bits, row %d: %d, multiplication gives %d", bits, o, y[o], sum)
			}
		}
	}
}

func TestExponentAdditionGuards(t *testing.T) {
	inf, nan := float32(math.Inf(1)), float32(math.NaN())
	big, tiny := float32(math.MaxFloat32), math.Float32frombits(0x00000001)
	smallest := math.Float32frombits(1 << 23)
	for _, c := range []struct {
		x        float32
		s        int
		negative bool
		want     float32
	}{
		{0, 3, false, 0},
		{0, 3, true, float32(math.Copysign(0, -1))},
		{tiny, 7, false, 0},
		{-tiny, 7, false, float32(math.Copysign(0, -1))},
		{big, 1, false, inf},
		{big, 1, true, -inf},
		{-big, 15, false, -inf},
		{big, 0, true, -big},
		{inf, 3, true, -inf},
		{-inf, 0, false, -inf},
		{nan, 3, false, nan},
		{1.5, 3, false, 12},
		{1.5, -1, true, -.75},
		{smallest, -1, false, 0},
		{smallest, 1, false, 2 * smallest},
	} {
		got := ShiftF32(c.x, c.s, c.negative)
		if math.Float32bits(got) != math.Float32bits(c.want) && !(got != got && c.want != c.want) {
			t.Errorf("%g·2^%d, negative %t: %g, want %g", c.x, c.s, c.negative, got, c.want)
		}
		for _, rest := range [][]float32{{1}, {0}} { // the kernel guards too, with and without other zeros
			w := &ShiftWeights{Bits: 5, Shape: []int{1, 2}, Codes: []uint8{uint8(max(c.s, 0)), 0}}
			y := make([]float32, 1)
			if err := w.DotF32([]float32{c.x, rest[0]}, y); err != nil {
				t.Fatal(err)
			}
			if want := ShiftF32(c.x, max(c.s, 0), false) + rest[0]; y[0] != want && !(y[0] != y[0] && want != want) {
				t.Errorf("dot of %g: %g, want %g", c.x, y[0], want)
			}
		}
	}
	for _, c := range []struct {
		x        uint16
		s        int
		negative bool
		want     uint16
	}{
		{0x3c00, 3, false, 0x4800}, {0x3c00, 0, true, 0xbc00}, {0, 3, true, 0x8000}, {1, 3, false, 0}, {0x7bff, 1, false, 0x7c00}, {0x7c00, 2, true, 0xfc00}, {0x7e00, 2, false, 0x7e00},
	} {
		if got := ShiftF16(c.x, c.s, c.negative); got != c.want {
			t.Errorf("half %04x·2^%d, negative %t: %04x, want %04x", c.x, c.s, c.negative, got, c.want)
		}
	}
	w := &ShiftWeights{Bits: 3, Shape: []int{1, 2}, Codes: []uint8{3, 4}}
	y := make([]float32, 1)
	if err := w.DotF16([]uint16{0x3c00, 0x4000}, y); err != nil || y[0] != 8-2 {
		t.Errorf("8·1 − 1·2 in half precision: %g (%v)", y[0], err)
	}
}

func TestPackedCodesRoundTrip(t *testing.T) {
	for bits := 2; bits <= 5; bits++ {
		w := randomShifts(bits, 3, 2, 2, 5)
		p := w.Packed()
		if len(p) != (60*bits+7)/8 {
			t.Errorf("%d bits: %d bytes", bits, len(p))
		}
		back, err := UnpackShift(p, bits, w.Shape...)
		if err != nil || !slices.Equal(back.Codes, w.Codes) {
			t.Errorf("%d bits: codes changed (%v)", bits, err)
		}
	}
	if _, err := UnpackShift(make([]byte, 3), 3, 4, 4); err == nil {
		t.Error("too few bytes were accepted")
	}
	if _, err := UnpackShift(nil, 3, 1<<20, 1<<20, 1<<20); err == nil {
		t.Error("a huge shape was accepted")
	}
}

func TestPackRefuses(t *testing.T) {
	nan := float32(math.NaN())
	for _, c := range []struct {
		sign []float32
		t    [][]float32
		bits int
		want string
	}{
		{[]float32{1}, nil, 1, "1 bits"},
		{[]float32{1}, make([][]float32, 31), 6, "6 bits"},
		{[]float32{1}, [][]float32{{1}, {1}}, 3, "2 shift latents"},
		{[]float32{1, 2}, [][]float32{{1}}, 2, "has 1 values"},
		{[]float32{nan}, [][]float32{{1}}, 2, "NaN"},
		{[]float32{1}, [][]float32{{nan}}, 2, "NaN"},
	} {
		if _, err := PackShift(c.sign, c.t, c.bits); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%d bits: error %v, want one with %q", c.bits, err, c.want)
		}
	}
	for _, w := range []*ShiftWeights{
		{Bits: 3, Shape: []int{2}, Codes: []uint8{8, 0}},
		{Bits: 3, Shape: []int{3}, Codes: []uint8{1, 0}},
		{Bits: 7, Shape: []int{1}, Codes: []uint8{1}},
	} {
		if w.Check() == nil {
			t.Errorf("%+v was accepted", w)
		}
		if err := w.DotF32([]float32{1, 1}, make([]float32, 5)); err == nil {
			t.Errorf("%+v took 2 values to 5", w)
		}
		if err := w.DotInt([]int32{1, 1}, make([]int64, 5)); err == nil {
			t.Errorf("%+v took 2 integers to 5", w)
		}
	}
}

// shiftNet is a small residual network with a depthwise convolution.
func shiftNet(t *testing.T, norm bool) *nn.Network {
	t.Helper()
	b := nn.NewBuilder(5)
	x := b.Image("image", 8, 8, 2)
	conv := func(name, x string, c nn.Conv) string {
		c.NoBias = norm
		x = b.Add(name, c, x)
		if norm {
			x = b.Add(name+".norm", nn.BatchNorm{}, x)
		}
		return b.Add(name+".act", nn.ReLU, x)
	}
	x = conv("stem", x, nn.Conv2D(8, 3, 1))
	dw := nn.Conv2D(8, 3, 2)
	dw.Groups = 8
	x = conv("depthwise", x, dw)
	grouped := nn.Conv2D(12, 3, 1)
	grouped.Groups = 2
	x = conv("grouped", x, grouped)
	x = conv("point", x, nn.Conv2D(6, 1, 1))
	x = b.Add("pool", nn.GlobalAveragePool, x)
	net, err := b.Finish(b.Add("head", nn.Dense{Out: 3}, x))
	if err != nil {
		t.Fatal(err)
	}
	return net
}

func TestDenseShiftConverts(t *testing.T) {
	net := shiftNet(t, true)
	names, err := DenseShift{Options: compress.Options{Seed: 4, Bits: map[string]compress.Bits{"point": {Weight: 2}}}}.Convert(net)
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"depthwise", "grouped", "point"}; !slices.Equal(names, want) {
		t.Fatalf("converted %v, want %v", names, want)
	}
	if p := net.Node("point").P; p["t1"] == "" || p["t2"] != "" || p["w"] != "" || net.Params.Get("point.w") != nil {
		t.Errorf("the 2-bit site has parameters %v", p)
	}
	again := shiftNet(t, true)
	if _, err := (DenseShift{Options: compress.Options{Seed: 4, Bits: map[string]compress.Bits{"point": {Weight: 2}}}}).Convert(again); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(net.Params.Get("grouped.sign").Data(), again.Params.Get("grouped.sign").Data()) {
		t.Error("one seed, two draws")
	}
	latents := net.Clone()
	x := images(3, 8, 8, 2)
	before := outputs(t, net, x)
	if err := Settle(net); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(outputs(t, net, x), before) {
		t.Error("freezing changed the function")
	}
	if got, want := compress.WeightBytes(net, net.Node("grouped")), int64(12*9*4*3/8+4*8); got != want {
		t.Errorf("the frozen site takes %d bytes, want %d", got, want)
	}
	if _, err := (DenseShift{Options: compress.Options{Select: func(n *nn.Node) bool { return n.Name == "grouped" }}}).Convert(net); err == nil {
		t.Error("a frozen site was converted")
	}
	// files keep latents and codes
	for _, n := range []*nn.Network{latents, net} {
		path := t.TempDir() + "/n.safetensors"
		if err := safetensors.WriteNetwork(path, n); err != nil {
			t.Fatal(err)
		}
		back, err := safetensors.ReadNetwork(path, StoredTypes()...)
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(outputs(t, back, x), before) {
			t.Error("the file's network computes something else")
		}
	}
	file, err := onnx.Marshal(net, onnx.WriteOptions{})
	if err != nil {
		t.Fatal(err)
	}
	back, err := onnx.Read(file, onnx.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for i, v := range outputs(t, back, x) {
		if math.Abs(float64(v-before[i])) > 1e-3*(1+math.Abs(float64(before[i]))) {
			t.Errorf("output %d of the ONNX file is %g, want %g", i, v, before[i])
		}
	}
}

func TestShiftKernelsRunTheNetwork(t *testing.T) {
	net := shiftNet(t, true)
	names, err := DenseShift{}.Convert(net)
	if err != nil {
		t.Fatal(err)
	}
	if err := Settle(net); err != nil {
		t.Fatal(err)
	}
	x := images(1, 8, 8, 2) // a batch of one
	var values []string
	for _, n := range names {
		values = append(values, net.Node(n).In[0], net.Node(n).Out[0])
	}
	data, dims, err := compress.Capture(context.Background(), enginetest.Backend(), net, x, 1, values...)
	if err != nil {
		t.Fatal(err)
	}
	for i, name := range names {
		w, err := ShiftsOf(net, net.Node(name))
		if err != nil {
			t.Fatal(err)
		}
		op, in, want := net.Node(name).Op.(nn.Conv), data[2*i], data[2*i+1]
		y, oh, ow, err := w.ConvF32(op, in, dims[2*i][1], dims[2*i][2])
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal([]int{1, oh, ow, op.Out}, dims[2*i+1]) {
			t.Fatalf("%s: %d×%d, want %v", name, oh, ow, dims[2*i+1])
		}
		codes := make([]int32, len(in))
		for k, v := range in {
			codes[k] = int32(math.RoundToEven(float64(v) * 64))
		}
		ints, _, _, err := w.ConvInt(op, codes, dims[2*i][1], dims[2*i][2])
		if err != nil {
			t.Fatal(err)
		}
		for k := range y {
			if math.Abs(float64(y[k]-want[k])) > 1e-4*(1+math.Abs(float64(want[k]))) {
				t.Fatalf("%s: output %d by exponents is %g, the graph gives %g", name, k, y[k], want[k])
			}
			if d := math.Abs(float64(ints[k])/64 - float64(want[k])); d > 8*.5/64*float64(len(w.Codes)/op.Out) {
				t.Fatalf("%s: output %d by shifts is %g, the graph gives %g", name, k, float64(ints[k])/64, want[k])
			}
		}
	}
	if _, err := ShiftsOf(net, net.Node("head")); err == nil {
		t.Error("a float site has shifts")
	}
}

func TestDenseShiftRefuses(t *testing.T) {
	for _, c := range []struct {
		d    DenseShift
		norm bool
		want string
	}{
		{DenseShift{WeightBits: 1}, true, "1 bits"},
		{DenseShift{WeightBits: 6}, true, "6 bits"},
		{DenseShift{Std: math.NaN()}, true, "deviation"},
		{DenseShift{}, false, "no norm behind it"},
		{DenseShift{Options: compress.Options{Bits: map[string]compress.Bits{"nowhere": {Weight: 3}}}}, true, "no node"},
		{DenseShift{Options: compress.Options{Bits: map[string]compress.Bits{"point": {Weight: 8}}}}, true, "8 bits"},
		{DenseShift{Options: compress.Options{Select: func(*nn.Node) bool { return false }}}, true, "no site"},
	} {
		net := shiftNet(t, c.norm)
		if _, err := c.d.Convert(net); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: error %v, want one with %q", c.d, err, c.want)
		}
		if net.Node("point").P["w"] == "" {
			t.Error("a refused network was changed")
		}
	}
	if _, err := (DenseShift{WeightBits: 9}).Convert(shiftNet(t, true)); !errors.Is(err, ErrShiftBits) {
		t.Errorf("error %v is not ErrShiftBits", err)
	}
}

func TestScaledSitesKeepTheVariance(t *testing.T) {
	net := shiftNet(t, false)
	if _, err := (DenseShift{Scale: true}).Convert(net); err != nil {
		t.Fatal(err)
	}
	if err := Settle(net); err != nil {
		t.Fatal(err)
	}
	w, err := ShiftsOf(net, net.Node("grouped"))
	if err != nil {
		t.Fatal(err)
	}
	if want := int(math.RoundToEven(-math.Log2(36*11.5) / 2)); w.Offset != want {
		t.Errorf("offset %d, want %d", w.Offset, want)
	}
}

// TestFewValuedWeightsTrain holds that graph and frozen form of every trainable form are the same function, that they take
// the values they promise, and that training them lowers the loss.
func TestFewValuedWeightsTrain(t *testing.T) {
	x := images(16, 8, 8, 2)
	for _, c := range []struct {
		name   string
		train  func(net *nn.Network) ([]string, error)
		levels int // of a row
	}{
		{"dense shift", func(net *nn.Network) ([]string, error) { return DenseShift{}.Convert(net) }, 8},
		{"dense shift, 2 bits, plain gradient", func(net *nn.Network) ([]string, error) {
			return DenseShift{WeightBits: 2, PlainGradient: true}.Convert(net)
		}, 4},
		{"power of two", func(net *nn.Network) ([]string, error) { return TrainOn(net, compress.Options{}, PowerOfTwo{Bits: 3}) }, 7},
		{"power of two, 2 bits", func(net *nn.Network) ([]string, error) { return TrainOn(net, compress.Options{}, PowerOfTwo{Bits: 2}) }, 3},
		{"s3", func(net *nn.Network) ([]string, error) { return TrainOn(net, compress.Options{Seed: 1}, S3{}) }, 7},
		{"ternary", func(net *nn.Network) ([]string, error) { return TrainOn(net, compress.Options{}, Ternary{}) }, 3},
	} {
		t.Run(c.name, func(t *testing.T) {
			net := shiftNet(t, true)
			names, err := c.train(net)
			if err != nil {
				t.Fatal(err)
			}
			loss := S3Penalty(net, learn.Classifier(net), 1e-5)
			tr, err := learn.NewTrainer(enginetest.Backend(), &net.Params, loss, learn.Options{Optimizer: optim.SGD{Momentum: .9, Decay: 1e-4}, LR: .05})
			if err != nil {
				t.Fatal(err)
			}
			defer tr.Finalize()
			labels := make([]int32, 16)
			for i := range labels {
				labels[i] = int32(i % 3)
			}
			batch := func(int) ([]*tensors.Tensor, error) {
				return []*tensors.Tensor{x[0], tensors.FromFlatDataAndDimensions(labels, 16)}, nil
			}
			first, err := tr.Fit(context.Background(), learn.FitOptions{Steps: 1, Batch: batch})
			if err != nil {
				t.Fatal(err)
			}
			last, err := tr.Fit(context.Background(), learn.FitOptions{Steps: 30, Batch: batch})
			if err != nil {
				t.Fatal(err)
			}
			if !(last.Loss < first.Loss) {
				t.Errorf("the loss went from %g to %g", first.Loss, last.Loss)
			}
			before := outputs(t, net, x)
			if err := Settle(net); err != nil {
				t.Fatal(err)
			}
			for i, v := range outputs(t, net, x) {
				if math.Abs(float64(v-before[i])) > 1e-5*(1+math.Abs(float64(before[i]))) {
					t.Fatalf("output %d is %g frozen, %g in training", i, v, before[i])
				}
			}
			for _, n := range names {
				q := net.Param(net.Node(n), "q").Data()
				slices.Sort(q)
				if seen := len(slices.Compact(q)); seen > c.levels || seen < 2 {
					t.Errorf("%s takes %d values, at most %d are allowed", n, seen, c.levels)
				}
			}
		})
	}
}

func TestSignScaleRefusesLatentsOfOtherShapes(t *testing.T) {
	err := nn.Catch(func() {
		g := graph.NewGraph(engine.Go(), "refuse")
		SignScale(graph.Const(g, []float32{1, 2}), []*graph.Node{graph.Const(g, []float32{1})}, true)
	})
	if err == nil || !strings.Contains(err.Error(), "t1") {
		t.Errorf("error %v does not name the latent", err)
	}
	net := shiftNet(t, true)
	if _, err := (DenseShift{}).Convert(net); err != nil {
		t.Fatal(err)
	}
	net.Params.Delete("grouped.t2")
	delete(net.Node("grouped").P, "t2")
	if _, err := net.Run(enginetest.Backend(), images(1, 8, 8, 2)); err == nil || !strings.Contains(err.Error(), "t2") {
		t.Errorf("a missing latent: error %v", err)
	}
	if err := Settle(net); err == nil || !strings.Contains(err.Error(), "t2") {
		t.Errorf("freezing with a missing latent: error %v", err)
	}
}

func TestFreezingMeter(t *testing.T) {
	var m FreezingMeter
	if m.Record([]float32{1, float32(math.NaN())}) == nil {
		t.Error("NaN was recorded")
	}
	if err := errors.Join(m.Record([]float32{1, 2, -1}), m.Record([]float32{1, 1, 1})); err != nil {
		t.Fatal(err)
	}
	if m.Record([]float32{1}) == nil {
		t.Error("a record of another length was taken")
	}
	if got := m.FrozenFraction(); got != 1./3 {
		t.Errorf("frozen fraction %g, want a third", got)
	}
}

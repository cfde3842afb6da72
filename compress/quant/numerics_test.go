package quant

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"testing"

	"github.com/lathe-ml/lathe/internal/fixture"
	"github.com/lathe-ml/lathe/internal/rng"
)

func TestFixtures(t *testing.T) {
	fixture.Run(t, 67, map[string]fixture.Func{
		"uniform_calibrate": func(t *testing.T, c *fixture.Case) map[string]any {
			x := c.Inputs["x"]
			axis, ok := map[string]int{"tensor": -1, "dim0": 0, "last_dim": len(x.Shape) - 1}[c.Params["granularity"].String()]
			if !ok {
				t.Fatalf("granularity %s", c.Params["granularity"])
			}
			a, err := CalibrateUniform(x.Float32s(), x.Shape, axis, c.Params["bits"].Int())
			if err != nil {
				t.Fatal(err)
			}
			codes, err := a.Codes(x.Float32s(), x.Shape)
			if err != nil {
				t.Fatal(err)
			}
			deq, err := a.Decode(codes, x.Shape)
			if err != nil {
				t.Fatal(err)
			}
			return map[string]any{"delta": a.Scale, "zero_point": a.Zero, "codes": codes, "dequant": deq}
		},
		"log_sqrt2_calibrate": func(t *testing.T, c *fixture.Case) map[string]any {
			x := c.Inputs["x"].Float32s()
			q, err := CalibrateLogSqrt2(x, c.Params["bits"].Int())
			if err != nil {
				t.Fatal(err)
			}
			codes, err := q.Codes(x)
			if err != nil {
				t.Fatal(err)
			}
			return map[string]any{"delta": []float64{q.Scale}, "codes": codes, "dequant": q.Decode(codes)}
		},
		"reparameterize": func(t *testing.T, c *fixture.Case) map[string]any {
			s, z := c.Inputs["act_delta"].Floats(), c.Inputs["act_zero_point"].Floats()
			n := &NormParams{Gamma: c.Inputs["gamma"].Floats(), Beta: c.Inputs["beta"].Floats()}
			gamma, beta := slices.Clone(n.Gamma), slices.Clone(n.Beta)
			l := &LinearParams{W: c.Inputs["W"].Floats(), Out: c.Inputs["W"].Shape[0]}
			if c.Params["has_bias"].Bool() {
				l.Bias = c.Inputs["bias"].Floats()
			}
			target, ok := map[string]Target{"mean": TargetMean, "median": TargetMedian, "max": TargetMax}[c.Params["target"].String()]
			if !ok {
				t.Fatalf("target %s", c.Params["target"])
			}
			sT, zT, err := ReparamNorm(n, []*LinearParams{l}, s, z, ReparamOptions{Target: target, FractionalZero: !c.Params["round_zero_point"].Bool()})
			if err != nil {
				t.Fatal(err)
			}
			r, shift := make([]float64, len(s)), make([]float64, len(s))
			for i := range r {
				r[i] = gamma[i] / n.Gamma[i]
				shift[i] = beta[i]/r[i] - n.Beta[i]
			}
			return map[string]any{
				"target_delta": []float64{sT}, "target_zero_point": []float64{zT}, "r": r, "shift": shift,
				"gamma": n.Gamma, "beta": n.Beta, "W": l.W, "bias": l.Bias,
			}
		},
		"ln_linear_quant": func(t *testing.T, c *fixture.Case) map[string]any {
			x, w := c.Inputs["x"], c.Inputs["W"]
			d, out, eps := w.Shape[1], w.Shape[0], c.Params["ln_eps"].Float()
			n := &NormParams{Gamma: c.Inputs["gamma"].Floats(), Beta: c.Inputs["beta"].Floats()}
			l := &LinearParams{W: w.Floats(), Out: out, Bias: c.Inputs["bias"].Floats()}
			h := layerNorm(x.Floats(), n, eps)
			yfp := linear(h, l)
			act, err := CalibrateUniform(float32s(h), x.Shape, len(x.Shape)-1, c.Params["act_bits"].Int())
			if err != nil {
				t.Fatal(err)
			}
			sT, zT, err := ReparamNorm(n, []*LinearParams{l}, act.Scale, act.Zero, ReparamOptions{FractionalZero: !c.Params["round_zero_point"].Bool()})
			if err != nil {
				t.Fatal(err)
			}
			q := Affine{Bits: act.Bits, Axis: -1, Scale: []float64{sT}, Zero: []float64{zT}}
			hq, err := q.FakeQuant(float32s(layerNorm(x.Floats(), n, eps)), x.Shape)
			if err != nil {
				t.Fatal(err)
			}
			wa, err := CalibrateUniform(float32s(l.W), []int{out, d}, 0, c.Params["weight_bits"].Int())
			if err != nil {
				t.Fatal(err)
			}
			wq, err := wa.FakeQuant(float32s(l.W), []int{out, d})
			if err != nil {
				t.Fatal(err)
			}
			return map[string]any{"y_fp": yfp, "y_quant": linear(float64s(hq), &LinearParams{W: float64s(wq), Out: out, Bias: l.Bias})}
		},
	})
}

func float32s(x []float64) []float32 {
	out := make([]float32, len(x))
	for i, v := range x {
		out[i] = float32(v)
	}
	return out
}

func float64s(x []float32) []float64 {
	out := make([]float64, len(x))
	for i, v := range x {
		out[i] = float64(v)
	}
	return out
}

func layerNorm(x []float64, n *NormParams, eps float64) []float64 {
	d := len(n.Gamma)
	out := make([]float64, len(x))
	for i := 0; i < len(x); i += d {
		var mean, variance float64
		for _, v := range x[i : i+d] {
			mean += v / float64(d)
		}
		for _, v := range x[i : i+d] {
			variance += (v - mean) * (v - mean) / float64(d)
		}
		for j, v := range x[i : i+d] {
			out[i+j] = (v - mean) / math.Sqrt(variance+eps) * n.Gamma[j]
			if n.Beta != nil {
				out[i+j] += n.Beta[j]
			}
		}
	}
	return out
}

func linear(x []float64, l *LinearParams) []float64 {
	d := len(l.W) / l.Out
	out := make([]float64, len(x)/d*l.Out)
	for i := range len(x) / d {
		for o := range l.Out {
			var sum float64
			for j := range d {
				sum += x[i*d+j] * l.W[o*d+j]
			}
			if l.Bias != nil {
				sum += l.Bias[o]
			}
			out[i*l.Out+o] = sum
		}
	}
	return out
}

// normal returns n values with a spread that differs by column.
func normal(seed uint64, n, cols int) []float32 {
	r := rng.New(seed, "quant-test")
	out := make([]float32, n)
	for i := range out {
		c := i % cols
		out[i] = float32(r.NormFloat64()*math.Exp2(float64(c%5-2)) + float64(c%3-1))
	}
	return out
}

// reparamCase is a norm of d channels with two consumers, its inputs and its channel-wise grid.
func reparamCase(t *testing.T, d int) (x []float64, n *NormParams, ls []*LinearParams, act Affine) {
	t.Helper()
	x = float64s(normal(1, 40*d, d))
	n = &NormParams{Name: "norm", Gamma: float64s(normal(2, d, d)), Beta: float64s(normal(3, d, d))}
	ls = []*LinearParams{
		{Name: "q", W: float64s(normal(4, 7*d, d)), Out: 7, Bias: float64s(normal(5, 7, 7))},
		{Name: "k", W: float64s(normal(6, 3*d, d)), Out: 3},
	}
	act, err := CalibrateUniform(float32s(layerNorm(x, n, 1e-5)), []int{40, d}, 1, 4)
	if err != nil {
		t.Fatal(err)
	}
	return x, n, ls, act
}

func TestReparamNormPreservesTheFunction(t *testing.T) {
	half := func(v []float64) float64 { return TargetMean(v) / 2 }
	for name, o := range map[string]ReparamOptions{
		"mean": {}, "fractional": {FractionalZero: true}, "median": {Target: TargetMedian}, "max": {Target: TargetMax}, "custom": {Target: half},
	} {
		t.Run(name, func(t *testing.T) {
			x, n, ls, act := reparamCase(t, 16)
			h := layerNorm(x, n, 1e-5)
			want := [][]float64{linear(h, ls[0]), linear(h, ls[1])}
			if _, _, err := ReparamNorm(n, ls, act.Scale, act.Zero, o); err != nil {
				t.Fatal(err)
			}
			h = layerNorm(x, n, 1e-5)
			for i, l := range ls {
				got, top := linear(h, l), 0.
				for _, w := range want[i] {
					top = max(top, math.Abs(w))
				}
				for j := range got {
					if math.Abs(got[j]-want[i][j]) > 1e-10*top {
						t.Fatalf("consumer %d, output %d: %g became %g", i, j, want[i][j], got[j])
					}
				}
			}
		})
	}
}

func TestReparamNormKeepsTheCodes(t *testing.T) {
	x, n, ls, act := reparamCase(t, 16)
	h := layerNorm(x, n, 1e-5)
	sT, zT, err := ReparamNorm(n, ls, act.Scale, act.Zero, ReparamOptions{})
	if err != nil {
		t.Fatal(err)
	}
	after := layerNorm(x, n, 1e-5)
	for i := range h {
		c := i % 16
		if f := h[i]/act.Scale[c] - math.Floor(h[i]/act.Scale[c]); math.Abs(f-.5) < 1e-5 {
			continue
		}
		before := code(float32(h[i]), float32(act.Scale[c]), float32(act.Zero[c]), 15)
		if got := code(float32(after[i]), float32(sT), float32(zT), 15); got != before {
			t.Fatalf("value %d: code %g became %g", i, before, got)
		}
	}
}

func TestReparamNormOfEqualChannelsChangesNothing(t *testing.T) {
	_, n, ls, _ := reparamCase(t, 6)
	n0, l0 := slices.Clone(n.Gamma), slices.Clone(ls[0].W)
	b0, c0 := slices.Clone(n.Beta), slices.Clone(ls[0].Bias)
	s, z := slices.Repeat([]float64{0.1}, 6), slices.Repeat([]float64{7}, 6)
	sT, zT, err := ReparamNorm(n, ls, s, z, ReparamOptions{})
	if err != nil || sT != .1 || zT != 7 {
		t.Fatal(sT, zT, err)
	}
	if !slices.Equal(n0, n.Gamma) || !slices.Equal(b0, n.Beta) || !slices.Equal(l0, ls[0].W) || !slices.Equal(c0, ls[0].Bias) || ls[1].Bias != nil {
		t.Fatal("equal channels must leave norm and consumers as they are")
	}
}

func TestReparamNormOfRMSNorm(t *testing.T) {
	x, n, ls, act := reparamCase(t, 8)
	n.Beta = nil
	if _, _, err := ReparamNorm(n, ls, act.Scale, act.Zero, ReparamOptions{}); err == nil {
		t.Fatal("a norm without bias cannot absorb unequal zero points")
	}
	h := layerNorm(x, n, 1e-5)
	want := linear(h, ls[0])
	if _, _, err := ReparamNorm(n, ls, act.Scale, act.Zero, ReparamOptions{AddBeta: true}); err != nil || n.Beta == nil {
		t.Fatal(err)
	}
	for i, g := range linear(layerNorm(x, n, 1e-5), ls[0]) {
		if math.Abs(g-want[i]) > 1e-9 {
			t.Fatalf("output %d: %g became %g", i, want[i], g)
		}
	}
	// Symmetric quantisation has one zero point, so no bias is needed.
	_, n, ls, _ = reparamCase(t, 8)
	n.Beta = nil
	sym, err := CalibrateUniform(float32s(h), []int{40, 8}, 1, 4, Symmetric())
	if err != nil {
		t.Fatal(err)
	}
	if _, zT, err := ReparamNorm(n, ls, sym.Scale, sym.Zero, ReparamOptions{}); err != nil || n.Beta != nil || zT != 8 {
		t.Fatal(zT, n.Beta, err)
	}
}

func TestReparamNormRefuses(t *testing.T) {
	for name, change := range map[string]func(n *NormParams, ls []*LinearParams, a *Affine){
		"zero scale":        func(_ *NormParams, _ []*LinearParams, a *Affine) { a.Scale[3] = 0 },
		"NaN scale":         func(_ *NormParams, _ []*LinearParams, a *Affine) { a.Scale[3] = math.NaN() },
		"NaN zero":          func(_ *NormParams, _ []*LinearParams, a *Affine) { a.Zero[3] = math.NaN() },
		"fewer scales":      func(_ *NormParams, _ []*LinearParams, a *Affine) { a.Scale = a.Scale[1:] },
		"no channels":       func(n *NormParams, _ []*LinearParams, _ *Affine) { n.Gamma = nil },
		"beta of other len": func(n *NormParams, _ []*LinearParams, _ *Affine) { n.Beta = n.Beta[1:] },
		"other width":       func(_ *NormParams, ls []*LinearParams, _ *Affine) { ls[0].W = ls[0].W[7:] },
		"NaN weight":        func(_ *NormParams, ls []*LinearParams, _ *Affine) { ls[0].W[2] = math.NaN() },
	} {
		t.Run(name, func(t *testing.T) {
			_, n, ls, act := reparamCase(t, 8)
			change(n, ls, &act)
			if _, _, err := ReparamNorm(n, ls, act.Scale, act.Zero, ReparamOptions{}); err == nil {
				t.Fatal("accepted")
			}
		})
	}
}

func TestUniformErrorIsHalfAStepInRange(t *testing.T) {
	for _, bits := range []int{2, 4, 8} {
		x := normal(9, 600, 6)
		a, err := CalibrateUniform(x, []int{100, 6}, 1, bits)
		if err != nil {
			t.Fatal(err)
		}
		q, err := a.FakeQuant(x, []int{100, 6})
		if err != nil {
			t.Fatal(err)
		}
		codes, err := a.Codes(x, []int{100, 6})
		if err != nil {
			t.Fatal(err)
		}
		for i, v := range x {
			s, z := a.Scale[i%6], a.Zero[i%6]
			if f := float64(v); f >= -z*s && f <= (float64(a.Max())-z)*s && math.Abs(f-float64(q[i])) > s/2*(1+1e-5) {
				t.Fatalf("bits %d: %g became %g with step %g", bits, v, q[i], s)
			}
			if codes[i] < 0 || codes[i] > int32(a.Max()) {
				t.Fatalf("code %d", codes[i])
			}
		}
	}
}

func TestCalibrateUniformDegenerateGroups(t *testing.T) {
	for _, v := range []float32{0, 3, -3, 1e-20, 1e30, -1e30} {
		for n := range 3 {
			a, err := CalibrateUniform(slices.Repeat([]float32{v}, n+1), []int{n + 1}, -1, 4)
			if err != nil {
				t.Fatal(err)
			}
			want := max(math.Abs(float64(v)), 1e-8) / 15
			if math.Abs(a.Scale[0]/want-1) > 1e-6 {
				t.Errorf("%d times %g: scale %g, want %g", n+1, v, a.Scale[0], want)
			}
			q, err := a.FakeQuant([]float32{v, 0}, []int{2})
			if err != nil || math.Abs(float64(q[0]-v)) > max(1e-8, 1e-6*math.Abs(float64(v))) || q[1] != 0 {
				t.Errorf("%g became %g, 0 became %g, %v", v, q[0], q[1], err)
			}
		}
	}
	spike := make([]float32, 1_000_000) // all percentiles are 0, yet the tensor is not constant
	spike[17] = 5
	a, err := CalibrateUniform(spike, []int{len(spike)}, -1, 8)
	if err != nil || !(a.Scale[0] > 0) {
		t.Fatal(a, err)
	}
}

func TestCalibrateUniformGranularity(t *testing.T) {
	x := normal(3, 6*8, 8)
	for _, c := range []struct {
		axis, group, want int
		opt               []CalibOption
	}{{-1, 0, 1, nil}, {0, 0, 6, nil}, {1, 0, 8, nil}, {0, 4, 12, []CalibOption{Groups(4)}}, {0, 4, 12, []CalibOption{Groups(4), Symmetric()}}, {-1, 0, 1, []CalibOption{MinMax()}}} {
		a, err := CalibrateUniform(x, []int{6, 8}, c.axis, 8, c.opt...)
		if err != nil || len(a.Scale) != c.want || a.Validate() != nil {
			t.Fatalf("axis %d group %d: %d groups, %v", c.axis, c.group, len(a.Scale), err)
		}
		q, err := a.FakeQuant(x, []int{6, 8})
		if err != nil {
			t.Fatal(err)
		}
		for i := range q {
			if math.Abs(float64(q[i]-x[i])) > .1 {
				t.Fatalf("axis %d: %g became %g", c.axis, x[i], q[i])
			}
		}
	}
	if _, err := CalibrateUniform(x, []int{6, 8}, 0, 8, Groups(3)); err == nil {
		t.Fatal("3 does not divide 8")
	}
}

func TestSymmetricRangeStopsAtPlusMinusMax(t *testing.T) {
	a, err := CalibrateUniform([]float32{-1, .25, 1}, []int{3}, -1, 4, Symmetric())
	if err != nil {
		t.Fatal(err)
	}
	codes, err := a.Codes([]float32{-1, 0, 1}, []int{3})
	if err != nil || !slices.Equal(codes, []int32{1, 8, 15}) {
		t.Fatal(codes, err)
	}
}

func TestCalibrationRefuses(t *testing.T) {
	nan, inf := float32(math.NaN()), float32(math.Inf(1))
	one := []float32{1}
	for _, bits := range []int{-1, 0, 1, 9, 64} {
		if _, err := CalibrateUniform(one, []int{1}, -1, bits); !errors.Is(err, ErrBits) {
			t.Error(bits, err)
		}
		if _, err := CalibrateLogSqrt2(one, bits); !errors.Is(err, ErrBits) {
			t.Error(bits, err)
		}
	}
	for _, v := range []float32{nan, inf, -inf} {
		if _, err := CalibrateUniform([]float32{0, v}, []int{2}, -1, 4); !errors.Is(err, ErrNotFinite) {
			t.Error(v, err)
		}
		if _, err := CalibrateLog2([]float32{0, v}, 4); !errors.Is(err, ErrNotFinite) {
			t.Error(v, err)
		}
	}
	if _, err := CalibrateUniform(nil, []int{0}, -1, 4); !errors.Is(err, ErrEmpty) {
		t.Error(err)
	}
	if _, err := CalibrateLogSqrt2(nil, 4); !errors.Is(err, ErrEmpty) {
		t.Error(err)
	}
	if _, err := CalibrateLogSqrt2([]float32{.1, -.1}, 4); !errors.Is(err, ErrNegative) {
		t.Error(err)
	}
	if _, err := (LogSqrt2{4, 1}).Codes([]float32{-.1}); !errors.Is(err, ErrNegative) {
		t.Error(err)
	}
	for _, axis := range []int{-2, 1, 7} {
		if _, err := CalibrateUniform(one, []int{1}, axis, 4); err == nil {
			t.Error("axis", axis)
		}
	}
	if _, err := CalibrateUniform(one, []int{2}, -1, 4); err == nil {
		t.Error("a shape of two values for one")
	}
}

func TestLogSqrt2Codes(t *testing.T) {
	q := LogSqrt2{Bits: 4, Scale: 1}
	for _, c := range []struct {
		a, want float64
		code    int32
	}{
		{1, 1, 0}, {.5, .5, 2}, {math.Sqrt2 / 2, 0.70710678, 1}, {math.Exp2(-8), 0, 16}, {math.Exp2(-7.5), 0.00552427, 15}, {0, 0, 16}, {3, 1, 0},
	} {
		codes, err := q.Codes([]float32{float32(c.a)})
		if err != nil || codes[0] != c.code {
			t.Errorf("%g: code %v, want %d (%v)", c.a, codes, c.code, err)
			continue
		}
		if v := q.Decode(codes)[0]; math.Abs(float64(v)-c.want) > 1e-7 {
			t.Errorf("%g: value %g, want %g", c.a, v, c.want)
		}
	}
}

func TestLogQuantisersRelativeError(t *testing.T) {
	var a []float32
	for i := range 4000 {
		a = append(a, float32(math.Exp2(-float64(i)*7.2/4000)))
	}
	half, err := (LogSqrt2{4, 1}).FakeQuant(a)
	if err != nil {
		t.Fatal(err)
	}
	whole, err := (Log2{4, 1}).FakeQuant(a)
	if err != nil {
		t.Fatal(err)
	}
	worst := [2]float64{}
	for i, v := range a {
		for j, q := range []float32{half[i], whole[i]} {
			worst[j] = max(worst[j], math.Abs(float64(q-v))/float64(v))
		}
	}
	for j, bound := range []float64{math.Exp2(.25) - 1, math.Sqrt2 - 1} {
		if worst[j] > bound*(1+1e-4) || worst[j] < bound*.98 {
			t.Errorf("worst relative error %g, the bound %g is attained", worst[j], bound)
		}
	}
}

func TestLogSqrt2HasTwoToTheBitsPlusOneValues(t *testing.T) {
	for _, bits := range []int{2, 4, 6} {
		q := LogSqrt2{Bits: bits, Scale: .7}
		a := []float32{0}
		for i := range 1 << bits {
			a = append(a, float32(.7*math.Exp2(-float64(i)/2)))
		}
		codes, err := q.Codes(a)
		if err != nil {
			t.Fatal(err)
		}
		seen := map[float32]bool{}
		for i, v := range q.Decode(codes) {
			if codes[i] < 0 || codes[i] > 1<<bits {
				t.Fatal(codes[i])
			}
			seen[v] = true
		}
		if len(seen) != 1<<bits+1 {
			t.Errorf("%d bits: %d values", bits, len(seen))
		}
	}
}

func TestShiftSumsEqualDequantisedProduct(t *testing.T) {
	r := rng.New(5, "shift")
	const m, k, n = 9, 17, 5
	a, v := make([]float32, m*k), make([]float32, k*n)
	for i := range a {
		a[i] = float32(math.Exp2(-10 * r.Float64()))
	}
	a[3] = 0
	for i := range v {
		v[i] = float32(r.NormFloat64())
	}
	for _, bits := range []int{2, 4, 8} {
		q, err := CalibrateLogSqrt2(a, bits)
		if err != nil {
			t.Fatal(err)
		}
		codes, err := q.Codes(a)
		if err != nil {
			t.Fatal(err)
		}
		got, err := q.ShiftSums(codes, m, k, v, n)
		if err != nil {
			t.Fatal(err)
		}
		d := q.Decode(codes)
		for i := range m {
			for j := range n {
				var want, size float64
				for s := range k {
					want += float64(d[i*k+s]) * float64(v[s*n+j])
					size += math.Abs(float64(d[i*k+s]) * float64(v[s*n+j]))
				}
				if math.Abs(want-float64(got[i*n+j])) > 1e-6*size {
					t.Fatalf("%d bits, [%d,%d]: %g, want %g", bits, i, j, got[i*n+j], want)
				}
			}
		}
		if _, err := q.ShiftSums(codes, m, k+1, v, n); err == nil {
			t.Fatal("wrong shape accepted")
		}
		if _, err := q.ShiftSums(slices.Repeat([]int32{1<<bits + 1}, m*k), m, k, v, n); err == nil {
			t.Fatal("wrong code accepted")
		}
	}
}

func TestLogCalibrationOfZeros(t *testing.T) {
	q, err := CalibrateLogSqrt2(make([]float32, 5), 4)
	if err != nil || q.Scale != 1 {
		t.Fatal(q, err)
	}
	out, err := q.FakeQuant(make([]float32, 5))
	if err != nil || slices.Max(out) != 0 {
		t.Fatal(out, err)
	}
}

func TestQuantileInterpolatesAtIndexPTimesNMinus1(t *testing.T) {
	x := []float32{4, 1, 3, 2}
	for p, want := range map[float64]float64{0: 1, 1: 4, .5: 2.5, 1. / 3: 2, .25: 1.75} {
		if got := Quantile(x, p); math.Abs(got-want) > 1e-6 {
			t.Errorf("p=%g: %g, want %g", p, got, want)
		}
	}
}

func TestSelectRanksEqualsSorting(t *testing.T) {
	r := rng.New(2, "select")
	for _, n := range []int{1, 2, 65, 1000, 5000} {
		for _, distinct := range []int{1, 3, 1 << 30} {
			t.Run(fmt.Sprint(n, distinct), func(t *testing.T) {
				x := make([]float32, n)
				for i := range x {
					x[i] = float32(r.IntN(distinct))
				}
				want := slices.Clone(x)
				slices.Sort(want)
				ranks := slices.Compact([]int{0, n / 3, n / 2, n - 1})
				ranks = slices.Compact(slices.Sorted(slices.Values(ranks)))
				selectRanks(x, 0, ranks)
				for _, k := range ranks {
					if x[k] != want[k] {
						t.Fatalf("rank %d: %g, want %g", k, x[k], want[k])
					}
				}
			})
		}
	}
}

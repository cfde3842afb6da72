package quant_test

import (
	"context"
	"errors"
	"math"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
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

func TestFixturesNUPES(t *testing.T) {
	granularity := map[string]quant.Granularity{"row": quant.PerRow, "tensor": quant.PerTensor}
	fixture.Run(t, 30, map[string]fixture.Func{
		"power_quant": func(t *testing.T, c *fixture.Case) map[string]any {
			w := c.Inputs["W"]
			p, err := quant.PowerQuant(w.Floats(), w.Shape, quant.PowerGrid{Bits: c.Params["bits"].Int(), Exponent: c.Params["exponent"].Float()}, granularity[c.Params["granularity"].String()])
			if err != nil {
				t.Fatal(err)
			}
			return map[string]any{"max": p.Max, "codes": p.Codes, "W_q": p.Decode()}
		},
		"exponent_scan": func(t *testing.T, c *fixture.Case) map[string]any {
			o := quant.SearchOptions{Granularity: granularity[c.Params["granularity"].String()], P: c.Params["p"].Float(), Grid: c.Inputs["grid"].Floats()}
			var layers [][]float64
			var shapes [][]int
			for i := range c.Params["layers"].Int() {
				w := c.Inputs["W"+strconv.Itoa(i)]
				layers, shapes = append(layers, w.Floats()), append(shapes, w.Shape)
			}
			_, curve, err := quant.SearchExponent(layers, shapes, c.Params["bits"].Int(), o)
			if err != nil {
				t.Fatal(err)
			}
			var e []float64
			best := curve[0]
			for _, p := range curve {
				if e = append(e, p.Error); p.Error < best.Error {
					best = p
				}
			}
			return map[string]any{"error": e, "best": []float64{best.Exponent}}
		},
		"nupes_grad": func(t *testing.T, c *fixture.Case) map[string]any {
			g := quant.PowerGrid{Bits: c.Params["bits"].Int(), Exponent: c.Params["exponent"].Float()}
			theta, m := c.Inputs["theta"].Floats(), c.Inputs["max"].Floats()
			codes, dTheta, da, err := g.PowerGradient(theta, m, c.Inputs["grad_out"].Floats())
			if err != nil {
				t.Fatal(err)
			}
			p := &quant.PowerCodes{PowerGrid: g, Shape: c.Inputs["theta"].Shape, Max: m, Codes: codes}
			slope := make([]float64, len(codes))
			for i, k := range codes {
				slope[i] = m[i/(len(codes)/len(m))] * g.Slope(int(k))
			}
			return map[string]any{"codes": codes, "W_q": p.Decode(), "slope": slope, "grad_theta": dTheta, "grad_exponent": []float64{da}}
		},
		"lut_matmul": func(t *testing.T, c *fixture.Case) map[string]any {
			codes := func(what string, max []float64) *quant.PowerCodes {
				v := c.Inputs[what+"_codes"]
				p := &quant.PowerCodes{PowerGrid: quant.PowerGrid{Bits: c.Params[what+"_bits"].Int(), Exponent: c.Params[what+"_exponent"].Float()}, Shape: v.Shape, Max: max}
				for _, k := range v.Ints() {
					p.Codes = append(p.Codes, int16(k))
				}
				return p
			}
			w, x, bits := codes("w", c.Inputs["w_max"].Floats()), codes("x", []float64{c.Params["x_max"].Float()}), c.Params["table_bits"].Int()
			y, acc, err := quant.MatMulLUT(w, x, bits)
			if err != nil {
				t.Fatal(err)
			}
			return map[string]any{"w_table": w.LookupTable(bits), "x_table": x.LookupTable(bits), "acc": acc, "y": y}
		},
	})
}

// bell returns n values of a bell-shaped, heavy-tailed distribution.
func bell(seed uint64, n int) []float64 {
	r := rng.New(seed, "bell")
	out := make([]float64, n)
	for i := range out {
		out[i] = r.NormFloat64() * math.Exp(.4*r.NormFloat64())
	}
	return out
}

func TestPowerGridOfExponentOneIsUniform(t *testing.T) {
	w := bell(1, 12*31)
	for bits := 2; bits <= 8; bits++ {
		p, err := quant.PowerQuant(w, []int{12, 31}, quant.PowerGrid{Bits: bits, Exponent: 1}, quant.PerRow)
		if err != nil {
			t.Fatal(err)
		}
		got := p.Decode()
		top := float64(int(1)<<(bits-1) - 1)
		for i, v := range w {
			m := 0.
			for _, u := range w[i/31*31 : i/31*31+31] {
				m = max(m, math.Abs(u))
			}
			if want := math.RoundToEven(top * (v / m)); float64(p.Codes[i]) != want || got[i] != m*(want/top) {
				t.Fatalf("%d bits, value %d: code %d, %g; want %g", bits, i, p.Codes[i], got[i], want)
			}
		}
	}
}

func TestPowersKeepProducts(t *testing.T) {
	r := rng.New(2, "products")
	for range 200 {
		w, x, mw, mx, a := r.NormFloat64(), r.NormFloat64(), 3., 4., .1+1.9*r.Float64()
		left := math.Pow(math.Abs(w)/mw, a) * math.Pow(math.Abs(x)/mx, a)
		if right := math.Pow(math.Abs(w*x)/(mw*mx), a); math.Abs(left-right) > 1e-12 {
			t.Errorf("a = %g: %g and %g", a, left, right)
		}
	}
}

func TestPowerGridLevels(t *testing.T) {
	for bits := 2; bits <= 8; bits++ {
		for _, a := range []float64{.1, .3, .5, .77, 1, 1.5, 2} {
			g := quant.PowerGrid{Bits: bits, Exponent: a}
			levels := g.Levels()
			for i, v := range levels {
				c := i - g.Top()
				if got := g.Code(2.5*v, 2.5); got != c {
					t.Fatalf("%d bits, a = %g: E(D(%d)) = %d", bits, a, c, got)
				}
				if i > 0 && !(levels[i-1] < v) || levels[len(levels)-1-i] != -v {
					t.Fatalf("%d bits, a = %g: levels %v are not odd or not ascending", bits, a, levels)
				}
			}
			if g.Level(0) != 0 || g.Level(float64(g.Top())) != 1 {
				t.Errorf("%d bits, a = %g: D(0) = %g, D(L) = %g", bits, a, g.Level(0), g.Level(float64(g.Top())))
			}
		}
	}
	g := quant.PowerGrid{Bits: 4, Exponent: .5}
	for _, f := range []struct {
		what      string
		got, want float64
	}{
		{"D(3)", g.Level(3), 9. / 49},
		{"D(7)", g.Level(7), 1},
		{"E(0.25)", float64(g.Code(.25, 1)), 4},
		{"slope(0)", g.Slope(0), 2. / (14 * 14)},
		{"∂D/∂a at L", g.ExponentSlope(7), 0},
		{"∂D/∂a at 0", g.ExponentSlope(0), 0},
		{"E beyond the maximum", float64(g.Code(-9, 1)), -7},
		{"E for m = 0", float64(g.Code(0, 0)), 0},
		{"unsigned", float64(quant.PowerGrid{Bits: 4, Exponent: .5, Unsigned: true}.Code(1, 1)), 15},
	} {
		if math.Abs(f.got-f.want) > 1e-12 {
			t.Errorf("%s is %g, want %g", f.what, f.got, f.want)
		}
	}
}

func TestSlopesAreDifferencesOfLevels(t *testing.T) {
	for _, a := range []float64{.4, 1, 1.7} {
		g := quant.PowerGrid{Bits: 5, Exponent: a}
		for c := -15; c <= 15; c++ {
			const e = 1e-6
			up, down := g, g
			up.Exponent, down.Exponent = a+e, a-e
			if want := (up.Level(float64(c)) - down.Level(float64(c))) / (2 * e); math.Abs(g.ExponentSlope(c)-want) > 1e-8 {
				t.Errorf("a = %g, c = %d: ∂D/∂a = %g, by differences %g", a, c, g.ExponentSlope(c), want)
			}
			if s := g.Slope(c); !(s > 0) || math.IsInf(s, 0) {
				t.Errorf("a = %g, c = %d: slope %g", a, c, s)
			}
		}
	}
}

func TestSearchedExponentIsNoWorseThanUniform(t *testing.T) {
	for bits := 2; bits <= 8; bits++ {
		layers, dims := [][]float64{bell(uint64(bits), 40*25), bell(9, 30)}, [][]int{{40, 25}, {3, 10}}
		a, curve, err := quant.SearchExponent(layers, dims, bits, quant.SearchOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if len(curve) != 27 {
			t.Errorf("%d points", len(curve))
		}
		loss := func(a float64) (sum float64) {
			for i, w := range layers {
				p, err := quant.PowerQuant(w, dims[i], quant.PowerGrid{Bits: bits, Exponent: a}, quant.PerRow)
				if err != nil {
					t.Fatal(err)
				}
				for j, v := range p.Decode() {
					sum += (v - w[j]) * (v - w[j])
				}
			}
			return sum
		}
		best := loss(a)
		for _, p := range curve {
			if math.Abs(p.Error-loss(p.Exponent)) > 1e-9*p.Error {
				t.Errorf("%d bits: err(%g) = %g, want %g", bits, p.Exponent, p.Error, loss(p.Exponent))
			}
			if best > p.Error*(1+1e-12) {
				t.Errorf("%d bits: err(%g) = %g is above err(%g) = %g", bits, a, best, p.Exponent, p.Error)
			}
		}
	}
}

func TestScalingAWeightScalesOnlyTheMaxima(t *testing.T) {
	w := bell(3, 5*20)
	scaled := slices.Clone(w)
	for i := range scaled {
		scaled[i] *= 8
	}
	g := quant.PowerGrid{Bits: 4, Exponent: .7}
	p, _ := quant.PowerQuant(w, []int{5, 20}, g, quant.PerRow)
	q, _ := quant.PowerQuant(scaled, []int{5, 20}, g, quant.PerRow)
	if !slices.Equal(p.Codes, q.Codes) {
		t.Error("the codes changed")
	}
	for i := range p.Max {
		if q.Max[i] != 8*p.Max[i] {
			t.Errorf("maximum %g became %g", p.Max[i], q.Max[i])
		}
	}
}

func TestPowerQuantTakesEdgeCases(t *testing.T) {
	for name, c := range map[string]struct {
		w     []float64
		shape []int
		bits  int
		codes []int16
	}{
		"a row of zeros":   {[]float64{0, 0, 1, -1}, []int{2, 2}, 4, []int16{0, 0, 7, -7}},
		"one nonzero":      {[]float64{0, -2, 0}, []int{1, 3}, 3, []int16{0, -3, 0}},
		"negative only":    {[]float64{-1, -1e-9, -.5}, []int{1, 3}, 2, []int16{-1, 0, -1}},
		"a kernel":         {[]float64{1, 2, 4, 8, 4, 2, 1, 0}, []int{2, 2, 2, 1}, 2, []int16{0, 0, 1, 1, 1, 1, 0, 0}},
		"no rows":          {nil, []int{0, 3}, 4, nil},
		"subnormal maxima": {[]float64{5e-324, 0}, []int{1, 2}, 4, []int16{7, 0}},
	} {
		p, err := quant.PowerQuant(c.w, c.shape, quant.PowerGrid{Bits: c.bits, Exponent: .9}, quant.PerRow)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if !slices.Equal(p.Codes, c.codes) {
			t.Errorf("%s: codes %v, want %v", name, p.Codes, c.codes)
		}
	}
}

func TestPowerQuantRefuses(t *testing.T) {
	good := quant.PowerGrid{Bits: 4, Exponent: .5}
	for name, c := range map[string]struct {
		w     []float64
		shape []int
		grid  quant.PowerGrid
		want  error
	}{
		"1 bit":         {[]float64{1}, []int{1, 1}, quant.PowerGrid{Bits: 1, Exponent: 1}, quant.ErrBits},
		"9 bits":        {[]float64{1}, []int{1, 1}, quant.PowerGrid{Bits: 9, Exponent: 1}, quant.ErrBits},
		"exponent 0":    {[]float64{1}, []int{1, 1}, quant.PowerGrid{Bits: 4}, quant.ErrExponent},
		"exponent < 0":  {[]float64{1}, []int{1, 1}, quant.PowerGrid{Bits: 4, Exponent: -1}, quant.ErrExponent},
		"exponent NaN":  {[]float64{1}, []int{1, 1}, quant.PowerGrid{Bits: 4, Exponent: math.NaN()}, quant.ErrExponent},
		"exponent +Inf": {[]float64{1}, []int{1, 1}, quant.PowerGrid{Bits: 4, Exponent: math.Inf(1)}, quant.ErrExponent},
		"NaN":           {[]float64{math.NaN()}, []int{1, 1}, good, quant.ErrNotFinite},
		"Inf":           {[]float64{math.Inf(-1)}, []int{1, 1}, good, quant.ErrNotFinite},
		"shape":         {[]float64{1, 2, 3}, []int{1, 2}, good, nil},
		"negative":      {[]float64{-1}, []int{1, 1}, quant.PowerGrid{Bits: 4, Exponent: 1, Unsigned: true}, quant.ErrNegative},
	} {
		if _, err := quant.PowerQuant(c.w, c.shape, c.grid, quant.PerRow); err == nil || c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("%s: error %v, want %v", name, err, c.want)
		}
	}
	if _, _, err := quant.SearchExponent[float64](nil, nil, 4, quant.SearchOptions{}); !errors.Is(err, quant.ErrEmpty) {
		t.Errorf("a search over nothing: %v", err)
	}
	if _, _, err := quant.SearchExponent([][]float64{{1}}, [][]int{{1, 1}}, 4, quant.SearchOptions{Grid: []float64{-1}}); !errors.Is(err, quant.ErrExponent) {
		t.Errorf("a search over -1: %v", err)
	}
}

func TestLookupProductsAgreeWithDecodedOnes(t *testing.T) {
	const out, in, n = 6, 50, 4
	for _, c := range []struct{ w, x quant.PowerGrid }{
		{quant.PowerGrid{Bits: 4, Exponent: .5}, quant.PowerGrid{Bits: 8, Exponent: .5}},
		{quant.PowerGrid{Bits: 3, Exponent: .8}, quant.PowerGrid{Bits: 6, Exponent: 1}},
		{quant.PowerGrid{Bits: 8, Exponent: .3}, quant.PowerGrid{Bits: 2, Exponent: 1.4}},
	} {
		w, err := quant.PowerQuant(bell(4, out*in), []int{out, in}, c.w, quant.PerRow)
		if err != nil {
			t.Fatal(err)
		}
		x, err := quant.PowerQuant(bell(5, n*in), []int{n, in}, c.x, quant.PerTensor)
		if err != nil {
			t.Fatal(err)
		}
		y, _, err := quant.MatMulLUT(w, x, 15)
		if err != nil {
			t.Fatal(err)
		}
		wv, xv := w.Decode(), x.Decode()
		check := func(what string, y []float64, tol float64) {
			t.Helper()
			for i := range n {
				for o := range out {
					want := 0.
					for j := range in {
						want += xv[i*in+j] * wv[o*in+j]
					}
					if d := math.Abs(y[i*out+o] - want); d > tol*w.Max[o]*x.Max[0]*in {
						t.Errorf("%s: output (%d,%d) is %g, want %g", what, i, o, y[i*out+o], want)
					}
				}
			}
		}
		check("tables", y, 2e-4)
		y, _, err = quant.MatMulSquares(w, x)
		if half := c.w.Exponent == .5 && c.x.Exponent == .5; (err == nil) != half {
			t.Errorf("squares of exponents %g and %g: %v", c.w.Exponent, c.x.Exponent, err)
		} else if half {
			check("squares", y, 1e-14)
		}
	}
	w, _ := quant.PowerQuant(bell(4, 6), []int{2, 3}, quant.PowerGrid{Bits: 4, Exponent: .5}, quant.PerRow)
	x, _ := quant.PowerQuant(bell(4, 8), []int{2, 4}, quant.PowerGrid{Bits: 4, Exponent: .5}, quant.PerTensor)
	if _, _, err := quant.MatMulLUT(w, x, 15); err == nil {
		t.Error("columns that do not fit were multiplied")
	}
	if _, _, err := quant.MatMulLUT(w, w, 15); err == nil {
		t.Error("activations with a maximum per row were multiplied")
	}
	if _, _, err := quant.MatMulLUT(w, x, 40); err == nil {
		t.Error("tables of 40 bits were built")
	}
}

// dense is a layer with correlated inputs, whose wanted outputs are its own.
func dense(seed uint64, out, in, n int) (w []float32, bias []float32, x, y *tensors.Tensor) {
	r := rng.New(seed, "dense")
	for _, v := range bell(seed, out*in) {
		w = append(w, float32(v)*.1)
	}
	xs, ys := make([]float32, n*in), make([]float32, n*out)
	for i := range n {
		common := r.NormFloat64()
		for j := range in {
			xs[i*in+j] = float32(common + r.NormFloat64()*(.2+float64(j%3)))
		}
	}
	for o := range out {
		bias = append(bias, float32(r.NormFloat64()))
		for i := range n {
			sum := bias[o]
			for j := range in {
				sum += w[o*in+j] * xs[i*in+j]
			}
			ys[i*out+o] = sum
		}
	}
	return w, bias, tensors.FromFlatDataAndDimensions(xs, n, in), tensors.FromFlatDataAndDimensions(ys, n, out)
}

func TestMomentsGiveTheLossOfASite(t *testing.T) {
	ctx, b := context.Background(), enginetest.Backend()
	for name, op := range map[string]nn.Op{
		"dense": nn.Dense{Out: 6}, "conv": nn.Conv{Out: 6, Kernel: []int{3, 3}, Stride: []int{2, 2}, Pad: [][2]int{{1, 1}, {1, 1}}},
		"grouped": nn.Conv{Out: 6, Kernel: []int{3, 2}, Groups: 2, Dilation: []int{1, 2}}, "depthwise": nn.Conv{Out: 4, Kernel: []int{3, 3}, Groups: 4}, "1-d": nn.Conv{Out: 5, Kernel: []int{3}},
	} {
		nb := nn.NewBuilder(7)
		dims := []int{3, 9, 8, 4}
		if name == "1-d" || name == "dense" {
			dims = []int{3, 9, 4}
		}
		net, err := nb.Finish(nb.Add("site", op, nb.Input("x", shapes.Make(dtypes.Float32, append([]int{1}, dims[1:]...)...))))
		if err != nil {
			t.Fatal(err)
		}
		site := net.Node("site")
		r := rng.New(8, name)
		draw := func(dims ...int) *tensors.Tensor {
			v := make([]float32, shapes.Make(dtypes.Float32, dims...).Size())
			for i := range v {
				v[i] = float32(r.NormFloat64())
			}
			return tensors.FromFlatDataAndDimensions(v, dims...)
		}
		x := draw(dims...)
		out, err := net.Run(b, []*tensors.Tensor{x})
		if err != nil {
			t.Fatal(err)
		}
		y := draw(out[0].Shape().Dimensions...)
		w, bias := net.Param(site, "w").Data(), net.Param(site, "b").Data()
		m, err := quant.SiteMoments(ctx, b, op, w, bias, x, y)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		d, err := m.Descend(b)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		loss := func(w []float32) float64 {
			if err := net.Param(site, "w").SetData(w); err != nil {
				t.Fatal(err)
			}
			out, err := net.Run(b, []*tensors.Tensor{x})
			if err != nil {
				t.Fatal(err)
			}
			sum := 0.
			want := nn.Floats(y)
			for i, v := range nn.Floats(out[0]) {
				sum += (float64(v) - float64(want[i])) * (float64(v) - float64(want[i]))
			}
			return sum / float64(len(want))
		}
		other := slices.Clone(w)
		for i := range other {
			other[i] += float32(.1 * r.NormFloat64())
		}
		for _, v := range [][]float32{w, other} {
			got, g, err := d.At(v)
			if err != nil {
				t.Fatal(err)
			}
			want := loss(v)
			if math.Abs(got-want) > 1e-4*want || math.Abs(m.Loss(v)-want) > 1e-4*want {
				t.Errorf("%s: loss %g and %g, want %g", name, got, m.Loss(v), want)
			}
			for _, i := range []int{0, len(v) / 2, len(v) - 1} {
				const e = .01
				up, down := slices.Clone(v), slices.Clone(v)
				up[i] += e
				down[i] -= e
				if slope := (loss(up) - loss(down)) / (2 * e); math.Abs(float64(g[i])-slope) > 1e-3*(1+math.Abs(slope)) {
					t.Errorf("%s: gradient %d is %g, by differences %g", name, i, g[i], slope)
				}
			}
		}
	}
}

func TestLearningPowerCodes(t *testing.T) {
	ctx, b := context.Background(), enginetest.Backend()
	const out, in = 8, 24
	w, bias, x, y := dense(1, out, in, 200)
	m, err := quant.SiteMoments(ctx, b, nn.Dense{Out: out}, w, bias, x, y)
	if err != nil {
		t.Fatal(err)
	}
	start, err := quant.PowerQuant(w, []int{out, in}, quant.PowerGrid{Bits: 3, Exponent: .8}, quant.PerRow)
	if err != nil {
		t.Fatal(err)
	}
	learn := func(o quant.PowerLearning) (*quant.PowerCodes, quant.PowerTrace) {
		t.Helper()
		p, tr, err := quant.LearnPower(ctx, b, m, start, o)
		if err != nil {
			t.Fatal(err)
		}
		if loss := m.Loss(float32s64(p.Decode())); math.Abs(loss-tr.End) > 1e-3*tr.Start {
			t.Errorf("%+v: the kept codes give %g, the trace says %g", o, loss, tr.End)
		}
		if tr.End > tr.Start {
			t.Errorf("%+v: the error rose from %g to %g", o, tr.Start, tr.End)
		}
		return p, tr
	}
	_, plain := learn(quant.PowerLearning{FixedExponent: true})
	if plain.End > .9*plain.Start || plain.Moved == 0 {
		t.Errorf("learning codes took the error from %g to %g", plain.Start, plain.End)
	}
	if p, _ := learn(quant.PowerLearning{FixedExponent: true}); p.Exponent != .8 {
		t.Errorf("a fixed exponent became %g", p.Exponent)
	}
	if p, _ := learn(quant.PowerLearning{}); p.Exponent == .8 {
		t.Error("the exponent was not learned")
	}
	_, polished := learn(quant.PowerLearning{FixedExponent: true, Polish: 10})
	if polished.End > plain.End {
		t.Errorf("polishing took the error from %g to %g", plain.End, polished.End)
	}
	alone, rounded := learn(quant.PowerLearning{Steps: -1})
	if rounded.Start != rounded.End || !slices.Equal(alone.Codes, start.Codes) {
		t.Error("no steps changed the codes")
	}
	if _, swept := learn(quant.PowerLearning{Steps: -1, Polish: 10}); swept.End > .9*swept.Start {
		t.Errorf("polishing alone took the error from %g to %g", swept.Start, swept.End)
	}
	_, _, _, other := dense(3, out, in, 200) // outputs of another weight: codes have to go far
	if m, err = quant.SiteMoments(ctx, b, nn.Dense{Out: out}, w, bias, x, other); err != nil {
		t.Fatal(err)
	}
	fast := quant.PowerLearning{FixedExponent: true, CodeRate: 1e-2}
	_, entire := learn(fast)
	fast.Space = quant.UpDownSpace
	_, updown := learn(fast)
	if entire.Far == 0 || updown.Far != 0 || updown.Moved == 0 {
		t.Errorf("share of codes that moved by more than one: %g in the entire space, %g up or down", entire.Far, updown.Far)
	}
}

func float32s64(x []float64) []float32 {
	out := make([]float32, len(x))
	for i, v := range x {
		out[i] = float32(v)
	}
	return out
}

func TestTwoBitsLeaveTheExponentWithoutGradient(t *testing.T) {
	g := quant.PowerGrid{Bits: 2, Exponent: .7}
	_, _, da, err := g.PowerGradient([]float64{-1.2, .3, .9, 0}, []float64{2}, []float64{1, -1, 3, 2})
	if err != nil || da != 0 {
		t.Errorf("da = %g, %v", da, err)
	}
}

func TestLearningPowerCodesRefuses(t *testing.T) {
	ctx, b := context.Background(), enginetest.Backend()
	w, bias, x, y := dense(1, 4, 6, 20)
	start, err := quant.PowerQuant(w, []int{4, 6}, quant.PowerGrid{Bits: 3, Exponent: 1}, quant.PerRow)
	if err != nil {
		t.Fatal(err)
	}
	silent, err := quant.SiteMoments(ctx, b, nn.Dense{Out: 4}, w, bias, tensors.FromFlatDataAndDimensions(make([]float32, 20*6), 20, 6), y)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := quant.LearnPower(ctx, b, silent, start, quant.PowerLearning{}); !errors.Is(err, quant.ErrNoSignal) {
		t.Errorf("inputs of zeros: %v", err)
	}
	m, err := quant.SiteMoments(ctx, b, nn.Dense{Out: 4}, w, bias, x, y)
	if err != nil {
		t.Fatal(err)
	}
	for name, o := range map[string]quant.PowerLearning{"rate": {CodeRate: -1}, "exponent rate": {ExponentRate: math.NaN()}, "space": {Space: "down"}} {
		if _, _, err := quant.LearnPower(ctx, b, m, start, o); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	short := *start
	short.Codes = short.Codes[1:]
	if _, _, err := quant.LearnPower(ctx, b, m, &short, quant.PowerLearning{}); err == nil {
		t.Error("codes that do not fit were learned")
	}
	for name, y := range map[string]*tensors.Tensor{"cases": tensors.FromFlatDataAndDimensions(make([]float32, 19*4), 19, 4), "outputs": tensors.FromFlatDataAndDimensions(make([]float32, 20*5), 20, 5)} {
		if _, err := quant.SiteMoments(ctx, b, nn.Dense{Out: 4}, w, bias, x, y); err == nil {
			t.Errorf("%s that do not fit were summed up", name)
		}
	}
	w[3] = float32(math.NaN())
	if _, err := quant.SiteMoments(ctx, b, nn.Dense{Out: 4}, w, bias, x, y); !errors.Is(err, quant.ErrNotFinite) {
		t.Errorf("a weight that is NaN: %v", err)
	}
}

// tinyResNet is a convolutional network with batch norms whose statistics are not the initial ones.
func tinyResNet(t *testing.T) *nn.Network {
	t.Helper()
	net, err := zoo.ResNet(zoo.ResNetOptions{Size: 8, Width: 4, Classes: 5, StemStride: 1, Seed: 5})
	if err != nil {
		t.Fatal(err)
	}
	r := rng.New(6, "statistics")
	for p := range net.Params.All() {
		v := p.Data()
		if p.Role != nn.State && p.Role != nn.Gain && p.Role != nn.Bias {
			continue
		}
		for i := range v {
			v[i] += float32(.3 * math.Abs(r.NormFloat64()))
		}
		if err := p.SetData(v); err != nil {
			t.Fatal(err)
		}
	}
	return net
}

func pictures(n, size int) compress.Examples {
	r := rng.New(uint64(n), "pictures")
	v := make([]float32, n*size*size)
	for i := range v {
		v[i] = r.Float32()
	}
	return compress.Examples{tensors.FromFlatDataAndDimensions(v, n, size, size, 1)}
}

func TestNUPESOnANetwork(t *testing.T) {
	ctx, b := context.Background(), enginetest.Backend()
	net, calib := tinyResNet(t), pictures(24, 8)
	short := quant.PowerLearning{Steps: 60, CodeRate: 5e-3}
	mean := map[string]float64{}
	for name, q := range map[string]quant.NUPES{
		"data-free": {WeightBits: 3, DataFree: true}, "learned": {WeightBits: 3, Learning: short},
		"global": {WeightBits: 3, DataFree: true, Rule: quant.ExponentGlobal}, "squares": {WeightBits: 3, DataFree: true, Rule: quant.ExponentFixed},
		"activations": {WeightBits: 4, ActBits: 6, Learning: short}, "uniform activations": {WeightBits: 4, ActBits: 6, DataFree: true, Acts: quant.ActUniform},
		"shared": {WeightBits: 4, ActBits: 6, DataFree: true, Acts: quant.ActShared}, "activations only": {WeightBits: 32, ActBits: 4},
	} {
		var steps []compress.Step
		q.Progress = func(s compress.Step) { steps = append(steps, s) }
		res, err := q.Compress(ctx, b, net, calib)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if len(steps) != 10 || steps[9].Done != 10 || steps[9].Total != 10 {
			t.Errorf("%s: %d steps reported", name, len(steps))
		}
		for _, s := range res.Sites {
			if q.WeightBits != 32 && (s.WeightBits != q.WeightBits || s.WeightErr <= 0) || q.ActBits != 0 && s.InputBits != q.ActBits || !(s.OutputErr > 0 && s.OutputErr < 1) {
				t.Errorf("%s: site %+v", name, s)
			}
			mean[name] += s.OutputErr / 10
		}
		agreesAsONNX(t, name, res.Network, calib)
	}
	if mean["learned"] > .8*mean["data-free"] {
		t.Errorf("mean output error %g when learned, %g when rounded", mean["learned"], mean["data-free"])
	}
}

// agreesAsONNX writes a network as ONNX, reads it back and compares the outputs.
func agreesAsONNX(t *testing.T, name string, net *nn.Network, x compress.Examples) {
	t.Helper()
	ctx, b := context.Background(), enginetest.Backend()
	file, err := onnx.Marshal(net, onnx.WriteOptions{Opset: 21})
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	back, err := onnx.Read(file, onnx.Options{})
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	want, width, err := compress.Evaluate(ctx, b, net, x, 0)
	if err != nil {
		t.Fatal(err)
	}
	got, _, err := compress.Evaluate(ctx, b, back, x, 0)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	if a, err := compress.Compare(want, got, x.Len(), width); err != nil || a.Cosine < .9999 {
		t.Errorf("%s: as ONNX %+v, %v", name, a, err)
	}
}

func TestNUPESResumesFromItsJournal(t *testing.T) {
	ctx, b := context.Background(), enginetest.Backend()
	net, calib := tinyResNet(t), pictures(8, 8)
	j, err := compress.OpenJournal(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	q := quant.NUPES{WeightBits: 3, ActBits: 5, Learning: quant.PowerLearning{Steps: 20}, SkipSiteErrors: true}
	q.Journal = j
	stopped, cancel := context.WithCancel(ctx)
	q.Progress = func(s compress.Step) {
		if s.Done == 4 {
			cancel()
		}
	}
	if _, err := q.Compress(stopped, b, net, calib); !errors.Is(err, context.Canceled) {
		t.Fatalf("stopped: %v", err)
	}
	restored := 0
	q.Progress = func(s compress.Step) {
		if s.Restored {
			restored++
		}
	}
	res, err := q.Compress(ctx, b, net, calib)
	if err != nil {
		t.Fatal(err)
	}
	if restored != 4 {
		t.Errorf("%d sites came from the journal", restored)
	}
	q.Journal = nil
	fresh, err := q.Compress(ctx, b, net, calib)
	if err != nil {
		t.Fatal(err)
	}
	for p := range fresh.Network.Params.All() {
		if !slices.Equal(p.Data(), res.Network.Params.Get(p.Name).Data()) {
			t.Errorf("parameter %q differs from an uninterrupted run's", p.Name)
		}
	}
}

func TestNUPESHonoursOptions(t *testing.T) {
	ctx, b := context.Background(), enginetest.Backend()
	net := tinyResNet(t)
	q := quant.NUPES{DataFree: true}
	q.Select = func(n *nn.Node) bool { return n.Name != "head" }
	q.Bits = map[string]compress.Bits{"stem": {Weight: 8}}
	res, err := q.Compress(ctx, b, net, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range res.Sites {
		if want := map[string]int{"stem": 8, "head": 32}[s.Name]; s.WeightBits != max(want, 4) {
			t.Errorf("site %s has %d bits", s.Name, s.WeightBits)
		}
	}
	if _, err := q.Compress(ctx, b, res.Network, nil); err == nil || !strings.Contains(err.Error(), "already") {
		t.Errorf("quantised twice: %v", err)
	}
	q.Select = func(n *nn.Node) bool { return n.Name == "head" }
	if _, err := q.Compress(ctx, b, res.Network, nil); err != nil {
		t.Errorf("the site that was left out: %v", err)
	}
}

func TestNUPESRefuses(t *testing.T) {
	ctx, b := context.Background(), enginetest.Backend()
	net := tinyResNet(t)
	for name, c := range map[string]struct {
		q     quant.NUPES
		calib compress.Examples
		want  error
	}{
		"weight bits":           {quant.NUPES{WeightBits: 9}, pictures(2, 8), quant.ErrBits},
		"activation bits":       {quant.NUPES{ActBits: 1}, pictures(2, 8), quant.ErrBits},
		"exponent":              {quant.NUPES{Rule: quant.ExponentFixed, Exponent: -1}, pictures(2, 8), quant.ErrExponent},
		"rule":                  {quant.NUPES{Rule: "best"}, pictures(2, 8), nil},
		"activations' exponent": {quant.NUPES{Acts: "best"}, pictures(2, 8), nil},
		"no examples":           {quant.NUPES{}, nil, quant.ErrEmpty},
		"activations, no data":  {quant.NUPES{DataFree: true, ActBits: 8}, nil, quant.ErrEmpty},
		"pictures of 9":         {quant.NUPES{}, pictures(2, 9), nil},
		"learning":              {quant.NUPES{Learning: quant.PowerLearning{Space: "far"}}, pictures(2, 8), nil},
	} {
		if _, err := c.q.Compress(ctx, b, net, c.calib); err == nil || c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("%s: error %v, want %v", name, err, c.want)
		}
	}
	none := quant.NUPES{DataFree: true}
	none.Select = func(*nn.Node) bool { return false }
	if _, err := none.Compress(ctx, b, net, nil); err == nil {
		t.Error("nothing was selected, and no error came")
	}
	bad := tinyResNet(t)
	p := bad.Param(bad.Node("stage.1.0.conv1"), "w")
	v := p.Data()
	v[0] = float32(math.NaN())
	if err := p.SetData(v); err != nil {
		t.Fatal(err)
	}
	if _, err := (quant.NUPES{DataFree: true}).Compress(ctx, b, bad, nil); !errors.Is(err, quant.ErrNotFinite) || !strings.Contains(err.Error(), "stage.1.0.conv1") {
		t.Errorf("a weight that is NaN: %v", err)
	}
}

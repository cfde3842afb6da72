package quant

import (
	"errors"
	"math"
	"slices"
	"testing"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/internal/fixture"
	"github.com/lathe-ml/lathe/internal/rng"
)

func TestFixturesDopQViT(t *testing.T) {
	fixture.Run(t, 65, map[string]fixture.Func{
		"tanq": func(t *testing.T, c *fixture.Case) map[string]any {
			q := TanQ{Bits: c.Params["bits"].Int(), Scale: c.Params["scale"].Float(), Alpha: c.Params["alpha"].Float(), Kappa: c.Params["kappa"].Float()}
			if err := q.Check(); err != nil {
				t.Fatal(err)
			}
			codes, dequant := tanEncode(q, c.Inputs["x"].Floats())
			return map[string]any{"codes": codes, "dequant": dequant, "levels": q.Levels()}
		},
		"tanq_calibrate": func(t *testing.T, c *fixture.Case) map[string]any {
			x := c.Inputs["x"].Floats()
			q, mse, err := CalibrateTanQ(x, c.Params["bits"].Int(), TanQOptions{Kappas: c.Params["kappas"].Floats()})
			if err != nil {
				t.Fatal(err)
			}
			_, dequant := tanEncode(q, x)
			return map[string]any{
				"scale": []float64{q.Scale}, "alpha": []float64{q.Alpha}, "kappa": []float64{q.Kappa}, "mse": []float64{mse}, "dequant": dequant,
			}
		},
		"mosf": func(t *testing.T, c *fixture.Case) map[string]any {
			s, z := c.Inputs["act_delta"].Floats(), c.Inputs["act_zero_point"].Floats()
			target, ok := map[string]Target{"median": TargetMedian, "mean": TargetMean, "max": TargetMax}[c.Params["zero"].String()]
			if !ok {
				t.Fatalf("zero %s", c.Params["zero"])
			}
			sT, _, rep, err := MOSF(s, z, nil)
			if err != nil {
				t.Fatal(err)
			}
			zT := target(z)
			n := &NormParams{Gamma: c.Inputs["gamma"].Floats(), Beta: c.Inputs["beta"].Floats()}
			l := &LinearParams{W: c.Inputs["W"].Floats(), Out: c.Inputs["W"].Shape[0], Bias: c.Inputs["bias"].Floats()}
			gamma, beta := slices.Clone(n.Gamma), slices.Clone(n.Beta)
			if _, _, err := ReparamNorm(n, []*LinearParams{l}, s, z, ReparamOptions{Target: TargetMedian}); err != nil {
				t.Fatal(err)
			}
			r, shift := make([]float64, len(s)), make([]float64, len(s))
			for d := range r {
				r[d] = gamma[d] / n.Gamma[d]
				shift[d] = beta[d]/r[d] - n.Beta[d]
			}
			return map[string]any{
				"target_delta": []float64{sT}, "target_zero_point": []float64{zT}, "r": r, "shift": shift,
				"gamma": n.Gamma, "beta": n.Beta, "W": l.W, "bias": l.Bias,
				"mad_median": []float64{rep.MADMedian}, "mad_mean": []float64{rep.MADMean},
			}
		},
	})
}

func tanEncode(q TanQ, x []float64) (codes []int, dequant []float64) {
	levels := q.Levels()
	for _, v := range x {
		c := q.Code(v)
		codes, dequant = append(codes, int(c)), append(dequant, levels[c])
	}
	return codes, dequant
}

// attention returns rows of a softmax over k keys, some peaked and some flat.
func attention(seed uint64, rows, k int) []float32 {
	r := rng.New(seed, "attention")
	out := make([]float32, 0, rows*k)
	for range rows {
		sharp, sum := math.Exp(r.NormFloat64()*1.2), 0.
		e := make([]float64, k)
		for j := range e {
			e[j] = math.Exp(3 * sharp * r.NormFloat64())
			sum += e[j]
		}
		for _, v := range e {
			out = append(out, float32(v/sum))
		}
	}
	return out
}

// grids are tangent grids over the whole range of their parameters.
func tanGrids() (grids []TanQ) {
	for _, bits := range []int{2, 3, 4, 6, 8} {
		for _, kappa := range []float64{0, .3, .5, .875, 1} {
			for _, share := range []float64{1e-3, .5, .9, .99} {
				grids = append(grids, TanQ{Bits: bits, Scale: .83, Alpha: share * alphaLimit(kappa), Kappa: kappa})
			}
		}
	}
	return grids
}

func TestTangentGoesFromZeroToOneAndGrows(t *testing.T) {
	for _, q := range tanGrids() {
		k := q.curve()
		if k.warp(0) != 0 || math.Abs(k.warp(1)-1) > 1e-12 {
			t.Errorf("%+v: T(0) = %g, T(1) = %g", q, k.warp(0), k.warp(1))
		}
		last := 0.
		for i := 1; i <= 1000; i++ {
			v := k.warp(float64(i) / 1000)
			if v <= last {
				t.Fatalf("%+v: T(%g) = %g after %g", q, float64(i)/1000, v, last)
			}
			last = v
		}
		levels := q.Levels()
		if levels[0] != 0 || math.Abs(levels[len(levels)-1]-q.Scale) > 1e-12 {
			t.Errorf("%+v: levels from %g to %g", q, levels[0], levels[len(levels)-1])
		}
	}
}

func TestEveryLevelEncodesToItself(t *testing.T) {
	for _, q := range tanGrids() {
		for c, v := range q.Levels() {
			if got := q.Code(v); int(got) != c {
				t.Errorf("%+v: level %d = %g has code %d", q, c, v, got)
			}
		}
	}
}

func TestFlatTangentIsTheUniformGrid(t *testing.T) {
	for _, kappa := range []float64{0, .5, 1} {
		q := TanQ{Bits: 4, Scale: 1, Alpha: 1e-6, Kappa: kappa}
		for i := range 2000 {
			u := float64(i) / 1999
			if at := 15 * u; math.Abs(at-math.Floor(at)-.5) > 1e-6 && q.Code(u) != uint8(math.RoundToEven(at)) {
				t.Errorf("κ=%g: code of %g is %d", kappa, u, q.Code(u))
			}
		}
	}
}

func TestCentredTangentIsSymmetric(t *testing.T) {
	for _, share := range []float64{.2, .7, .99} {
		k := TanQ{Bits: 4, Scale: 1, Alpha: share * math.Pi, Kappa: .5}.curve()
		for i := range 101 {
			if u := float64(i) / 100; math.Abs(k.warp(1-u)-(1-k.warp(u))) > 1e-12 {
				t.Errorf("share %g: T(%g) = %g, T(%g) = %g", share, u, k.warp(u), 1-u, k.warp(1-u))
			}
		}
	}
}

func TestTangentLevelsByHand(t *testing.T) {
	got := TanQ{Bits: 2, Scale: 1, Alpha: math.Pi / 2, Kappa: .5}.Levels() // A = B = 1
	x := .5 - math.Atan(1./3)*2/math.Pi
	for i, want := range []float64{0, x, 1 - x, 1} {
		if math.Abs(got[i]-want) > 1e-12 {
			t.Errorf("level %d is %.9g, want %.9g", i, got[i], want)
		}
	}
	if math.Abs(x-.295167) > 1e-6 {
		t.Error(x)
	}
}

// The bisection over the sorted sample must find what a plain loop over all grids finds.
func TestCalibrationFindsTheLeastError(t *testing.T) {
	a := attention(1, 40, 12)
	o, err := TanQOptions{}.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	for _, bits := range []int{2, 4, 8} {
		best, least := TanQ{}, math.Inf(1)
		for _, p := range o.Percentiles {
			for _, kappa := range o.Kappas {
				for _, g := range o.Gains {
					q := TanQ{Bits: bits, Scale: quantiles(a, []float64{p})[0], Alpha: g * alphaLimit(kappa), Kappa: kappa}
					_, d := tanEncode(q, float64s(a))
					var sum float64
					for i := range d {
						sum += (d[i] - float64(a[i])) * (d[i] - float64(a[i]))
					}
					if sum /= float64(len(d)); sum < least {
						best, least = q, sum
					}
				}
			}
		}
		got, mse, err := CalibrateTanQ(a, bits, TanQOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if got != best || math.Abs(mse-least) > 1e-12 {
			t.Errorf("%d bits: %+v with %g, want %+v with %g", bits, got, mse, best, least)
		}
	}
}

func TestTangentBeatsLogAndUniformOnAttention(t *testing.T) {
	fit, held := attention(2, 200, 17), attention(3, 200, 17)
	mse := func(y []float32, err error) float64 {
		if err != nil {
			t.Fatal(err)
		}
		return compress.RelativeError(held, y)
	}
	for _, bits := range []int{2, 3, 4, 6} {
		q, _, err := CalibrateTanQ(fit, bits, TanQOptions{})
		if err != nil {
			t.Fatal(err)
		}
		l, err := CalibrateLogSqrt2(fit, bits)
		if err != nil {
			t.Fatal(err)
		}
		u, err := CalibrateUniform(fit, []int{len(fit)}, -1, bits)
		if err != nil {
			t.Fatal(err)
		}
		tan, log, uniform := mse(q.FakeQuant(held)), mse(l.FakeQuant(held)), mse(u.FakeQuant(held, []int{len(held)}))
		if tan >= log || tan >= uniform {
			t.Errorf("%d bits: tangent %g, log√2 %g, uniform %g", bits, tan, log, uniform)
		}
	}
}

func TestOutputMetricJudgesTheProduct(t *testing.T) {
	const batch, queries, keys, width = 6, 5, 9, 4
	a, v := attention(4, batch*queries, keys), normal(5, batch*keys*width, width)
	for i := range v { // keys of weight: only what multiplies the first key matters
		if i/width%keys > 0 {
			v[i] = 0
		}
	}
	o := TanQOptions{Metric: TanQOutput, Values: v, Keys: keys, Width: width}
	q, got, err := CalibrateTanQ(a, 3, o)
	if err != nil {
		t.Fatal(err)
	}
	product := func(q TanQ) float64 {
		y, err := q.FakeQuant(a)
		if err != nil {
			t.Fatal(err)
		}
		var sum float64
		for r := range batch * queries {
			for c := range width {
				var d float64
				for k := range keys {
					d += (float64(y[r*keys+k]) - float64(a[r*keys+k])) * float64(v[(r/queries*keys+k)*width+c])
				}
				sum += d * d
			}
		}
		return sum / (batch * queries * width)
	}
	if want := product(q); math.Abs(got-want) > 1e-6*want {
		t.Errorf("error %g, by hand %g", got, want)
	}
	plain, _, err := CalibrateTanQ(a, 3, TanQOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if q == plain || got >= product(plain) {
		t.Errorf("%+v for the product (error %g), %+v for the attention (error %g)", q, got, plain, product(plain))
	}
	o.Sample = 20 // rows are drawn whole
	if _, e, err := CalibrateTanQ(a, 3, o); err != nil || !(e > 0) {
		t.Error(e, err)
	}
	for name, spoil := range map[string]func(o *TanQOptions){
		"keys": func(o *TanQOptions) { o.Keys = 7 }, "width": func(o *TanQOptions) { o.Width = 0 },
		"values": func(o *TanQOptions) { o.Values = v[:keys*width*4] }, "metric": func(o *TanQOptions) { o.Metric = "AV" },
	} {
		o := TanQOptions{Metric: TanQOutput, Values: v, Keys: keys, Width: width}
		spoil(&o)
		if _, _, err := CalibrateTanQ(a, 3, o); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestCalibrationDrawsFromLargeSamples(t *testing.T) {
	a := attention(6, 4000, 17)
	whole, e, err := CalibrateTanQ(a, 4, TanQOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for seed := range uint64(3) {
		q, s, err := CalibrateTanQ(a, 4, TanQOptions{Sample: 20_000, Seed: seed})
		if err != nil {
			t.Fatal(err)
		}
		if q.Scale > slices.Max(float64s(a)) || math.Abs(s-e) > .1*e {
			t.Errorf("seed %d: %+v (error %g), of all values %+v (error %g)", seed, q, s, whole, e)
		}
		again, _, _ := CalibrateTanQ(a, 4, TanQOptions{Sample: 20_000, Seed: seed})
		if again != q {
			t.Errorf("seed %d gives %+v and %+v", seed, q, again)
		}
	}
}

func TestTangentKeepsOneHotAndUniformAttention(t *testing.T) {
	for name, a := range map[string][]float32{
		"one-hot": {0, 0, 1, 0, 1, 0, 0, 0, 0}, "uniform": slices.Repeat([]float32{1. / 17}, 34), "one token": {1},
	} {
		for _, bits := range []int{2, 4, 8} {
			q, mse, err := CalibrateTanQ(a, bits, TanQOptions{})
			if err != nil {
				t.Fatal(name, err)
			}
			got, err := q.FakeQuant(a)
			if err != nil {
				t.Fatal(name, err)
			}
			if mse != 0 || !slices.Equal(got, a) {
				t.Errorf("%s, %d bits: %v becomes %v, error %g", name, bits, a, got, mse)
			}
		}
	}
}

func TestTangentClipsAboveItsScale(t *testing.T) {
	q := TanQ{Bits: 4, Scale: .5, Alpha: 1, Kappa: 1}
	got, err := q.FakeQuant([]float32{.5, .6, 9, 0})
	if err != nil || !slices.Equal(got, []float32{.5, .5, .5, 0}) {
		t.Error(got, err)
	}
}

func TestLookupSumsAgreeWithDecoding(t *testing.T) {
	const m, k, n = 6, 17, 5
	a, v := attention(7, m, k), normal(8, k*n, n)
	q, _, err := CalibrateTanQ(a, 4, TanQOptions{})
	if err != nil {
		t.Fatal(err)
	}
	codes := make([]uint8, m*k)
	if err := q.Encode(a, codes); err != nil {
		t.Fatal(err)
	}
	got, err := q.LookupSums(codes, m, k, v, n)
	if err != nil {
		t.Fatal(err)
	}
	d := q.Decode(codes)
	for i := range m {
		for c := range n {
			var want, size float64
			for j := range k {
				want += float64(d[i*k+j]) * float64(v[j*n+c])
				size += math.Abs(float64(v[j*n+c]))
			}
			if math.Abs(float64(got[i*n+c])-want) > size*q.Scale/65534+1e-6 {
				t.Errorf("(%d,%d): %g, want %g", i, c, got[i*n+c], want)
			}
		}
	}
	if t16 := q.Levels16(); t16[0] != 0 || t16[15] != math.MaxInt16 {
		t.Error(t16)
	}
	codes[3] = 16
	if _, err := q.LookupSums(codes, m, k, v, n); err == nil {
		t.Error("code 16 of 4 bits accepted")
	}
	if _, err := q.LookupSums(codes[:5], m, k, v, n); err == nil {
		t.Error("too few codes accepted")
	}
}

func TestTangentRefuses(t *testing.T) {
	nan := float32(math.NaN())
	good := TanQ{Bits: 4, Scale: 1, Alpha: 1, Kappa: .5}
	for name, q := range map[string]TanQ{
		"no curvature": {4, 1, 0, .5}, "the pole": {4, 1, math.Pi, .5}, "beyond the pole": {4, 1, 1.6, 0}, "NaN": {4, 1, math.NaN(), .5},
		"centre below 0": {4, 1, 1, -.1}, "centre above 1": {4, 1, 1, 1.1}, "scale 0": {4, 0, 1, .5}, "scale ∞": {4, math.Inf(1), 1, .5},
	} {
		if err := q.Check(); err == nil {
			t.Errorf("%s accepted", name)
		}
	}
	for _, bits := range []int{-1, 0, 1, 9} {
		q := good
		if q.Bits = bits; !errors.Is(q.Check(), ErrBits) {
			t.Errorf("%d bits: %v", bits, q.Check())
		}
		if _, _, err := CalibrateTanQ([]float32{1}, bits, TanQOptions{}); !errors.Is(err, ErrBits) {
			t.Errorf("%d bits: %v", bits, err)
		}
	}
	for _, c := range []struct {
		a    []float32
		want error
	}{{nil, ErrEmpty}, {[]float32{.5, nan}, ErrNotFinite}, {[]float32{.5, float32(math.Inf(1))}, ErrNotFinite}, {[]float32{.5, -.1}, ErrNegative}} {
		if _, _, err := CalibrateTanQ(c.a, 4, TanQOptions{}); !errors.Is(err, c.want) {
			t.Errorf("%v: %v, want %v", c.a, err, c.want)
		}
		if _, err := good.FakeQuant(c.a); len(c.a) > 0 && !errors.Is(err, c.want) {
			t.Errorf("%v: %v, want %v", c.a, err, c.want)
		}
	}
	if _, _, err := CalibrateTanQ(make([]float32, 9), 4, TanQOptions{}); err == nil {
		t.Error("probabilities that are all 0 accepted")
	}
	for name, o := range map[string]TanQOptions{
		"no centres": {Kappas: []float64{}}, "centre": {Kappas: []float64{2}}, "share 0": {Gains: []float64{0}}, "share 1": {Gains: []float64{1}},
		"percentile": {Percentiles: []float64{1.1}}, "sample": {Sample: -1}, "NaN": {Gains: []float64{math.NaN()}},
	} {
		if _, _, err := CalibrateTanQ([]float32{.5, 1}, 4, o); err == nil {
			t.Errorf("%s accepted", name)
		}
	}
	if err := good.Encode([]float32{1, 2}, make([]uint8, 1)); err == nil {
		t.Error("too little room accepted")
	}
}

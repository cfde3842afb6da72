package prune

import (
	"math"
	"slices"
	"testing"

	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/internal/fixture"
	"github.com/lathe-ml/lathe/internal/metric"
	"github.com/lathe-ml/lathe/internal/rng"
)

func TestFixtures(t *testing.T) {
	fixture.Run(t, 63, map[string]fixture.Func{
		"topk_ffn": func(t *testing.T, c *fixture.Case) map[string]any {
			names := []string{"x", "K", "bk", "V", "bv", "grad_y"}
			var in []any
			for _, n := range names {
				in = append(in, c.Inputs[n].Tensor(c.DType()))
			}
			e, err := engine.NewExec(engine.Go(), func(v []*graph.Node) []*graph.Node {
				x, k, bk, w, bv, gy := v[0], v[1], v[2], v[3], v[4], v[5]
				times := func(a, b *graph.Node) *graph.Node { return graph.Dot(a, b).General([]int{1}, nil, []int{1}, nil) }
				a := TopK(graph.Add(times(x, k), graph.ExpandLeftToRank(bk, 2)), c.Params["k"].Int())
				y := graph.Add(times(a, w), graph.ExpandLeftToRank(bv, 2))
				return append([]*graph.Node{a, y}, graph.Gradient(graph.ReduceAllSum(graph.Mul(y, gy)), x, k, bk, w)...)
			})
			if err != nil {
				t.Fatal(err)
			}
			out, err := e.Call(in...)
			if err != nil {
				t.Fatal(err)
			}
			got := map[string]any{}
			for i, n := range []string{"a", "y", "grad_x", "grad_K", "grad_bk", "grad_V"} {
				got[n] = out[i]
			}
			return got
		},
		"activation_stats": func(t *testing.T, c *fixture.Case) map[string]any {
			a := c.Inputs["a"]
			var p SparsityProbe
			if err := observe(&p, "a", a.Floats(), a.Shape[1], Tokens{}); err != nil {
				t.Fatal(err)
			}
			r, err := p.Report()
			if err != nil {
				t.Fatal(err)
			}
			var perToken []int
			for _, row := range a.Rows() {
				n := 0
				for _, v := range row {
					if v > 0 {
						n++
					}
				}
				perToken = append(perToken, n)
			}
			counts := make([]int64, a.Shape[1]+1)
			for _, n := range perToken {
				counts[n]++
			}
			if !slices.Equal(counts, r[0].PerToken) {
				t.Errorf("tokens by active entries: %v, want %v", r[0].PerToken, counts)
			}
			return map[string]any{
				"nonzero_fraction": r[0].NonZero, "per_neuron_rate": r[0].Rates, "dead": r[0].Dead, "per_token": perToken, "energy_top10pct": r[0].EnergyTop10,
			}
		},
		"ece": func(t *testing.T, c *fixture.Case) map[string]any {
			p := c.Inputs["p"]
			s, err := metric.ScoreProbabilities(p.Floats(), p.Shape[1], c.Inputs["y"].Ints())
			if err != nil {
				t.Fatal(err)
			}
			r, err := s.Calibration(metric.Bins{Count: c.Params["bins"].Int(), UpperClosed: true})
			if err != nil {
				t.Fatal(err)
			}
			return map[string]any{"ece": r.ECE}
		},
		"activation_gradient": func(t *testing.T, c *fixture.Case) map[string]any {
			v, a := c.Inputs["V"].Floats(), c.Inputs["a"].Floats()
			got := map[string]any{}
			for name, loss := range map[string]Loss{"ce": CrossEntropy, "mse_half": SquareLoss} {
				g, err := LossGradient(v, a, c.Params["label"].Int(), loss)
				if err != nil {
					t.Fatal(err)
				}
				got[name] = g
			}
			var expected []float64
			sigma := c.Params["sigma"].Float()
			for _, x := range a {
				expected = append(expected, float64(c.Inputs["V"].Shape[0])*sigma*sigma*x)
			}
			got["expected_mse_half"] = expected
			return got
		},
		"ffn_flops": func(_ *testing.T, c *fixture.Case) map[string]any {
			dense, sparse := FFNFLOPs(c.Params["d"].Int(), c.Params["d_ff"].Int(), c.Params["tokens"].Int(), c.Params["nonzero"].Float())
			return map[string]any{"dense": dense, "sparse_second": sparse}
		},
	})
}

// apply runs a function of one graph node on rows of a width, in float64.
func apply(t *testing.T, x []float64, width int, f func(x *graph.Node) *graph.Node) []float64 {
	t.Helper()
	e, err := engine.NewExec(engine.Go(), func(v []*graph.Node) []*graph.Node { return []*graph.Node{f(v[0])} })
	if err != nil {
		t.Fatal(err)
	}
	out, err := e.Call(tensors.FromFlatDataAndDimensions(x, len(x)/width, width))
	if err != nil {
		t.Fatal(err)
	}
	return tensors.MustCopyFlatData[float64](out[0])
}

func normals(n int, seed uint64) []float64 {
	r := rng.New(seed, "test")
	x := make([]float64, n)
	for i := range x {
		x[i] = r.NormFloat64()
	}
	return x
}

// byHand is top-k of max(x, 0) as its definition says: sort by value, then by index.
func byHand(row []float64, k int) []float64 {
	idx := make([]int, 0, len(row))
	for i, v := range row {
		if v > 0 {
			idx = append(idx, i)
		}
	}
	slices.SortStableFunc(idx, func(a, b int) int {
		switch {
		case row[a] > row[b]:
			return -1
		case row[a] < row[b]:
			return 1
		}
		return 0
	})
	out := make([]float64, len(row))
	for n, i := range idx {
		if k == 0 || n < k {
			out[i] = row[i]
		}
	}
	return out
}

func TestTopKKeepsTheLargest(t *testing.T) {
	const width, rows = 24, 40
	x := normals(width*rows, 1)
	for i := range x[:width*10] { // a tenth of a unit: ties, and rows of wide range
		x[i] = math.Round(2*x[i]) / 2
	}
	for i := range width {
		x[10*width+i] = math.Ldexp(x[10*width+i], 40*(i%5)-100)
		x[11*width+i] = -math.Abs(x[11*width+i])
		x[12*width+i] = 0
		x[13*width+i] = 1
	}
	for _, k := range []int{0, 1, 3, 7, width - 1, width, width + 5} {
		got := apply(t, x, width, func(x *graph.Node) *graph.Node { return TopK(x, k) })
		for r := range rows {
			row, want := x[r*width:(r+1)*width], byHand(x[r*width:(r+1)*width], k)
			if !slices.Equal(got[r*width:(r+1)*width], want) {
				t.Fatalf("k = %d, row %v: got %v, want %v", k, row, got[r*width:(r+1)*width], want)
			}
			f32 := make([]float32, width)
			for i, v := range row {
				f32[i] = float32(v)
			}
			kept := largest(f32, k)
			hand := make([]float64, width)
			for _, i := range kept {
				hand[i] = row[i]
			}
			if !slices.Equal(hand, want) {
				t.Fatalf("k = %d, row %v: the kernel keeps %v", k, row, kept)
			}
		}
	}
}

func TestTopKGradientGoesThroughWhatIsKept(t *testing.T) {
	const width, rows, k = 9, 6, 3
	x, w := normals(width*rows, 2), normals(width*rows, 3)
	loss := func(x *graph.Node) *graph.Node {
		y := TopK(x, k)
		return graph.ReduceAllSum(graph.Mul(graph.Mul(y, y), graph.Const(x.Graph(), tensors.FromFlatDataAndDimensions(w, rows, width))))
	}
	g := apply(t, x, width, func(x *graph.Node) *graph.Node { return graph.Gradient(loss(x), x)[0] })
	a := apply(t, x, width, func(x *graph.Node) *graph.Node { return TopK(x, k) })
	at := func(x []float64) float64 { return apply(t, x, width, loss)[0] }
	for i := 0; i < len(x); i += 5 {
		const h = 1e-6
		up, down := slices.Clone(x), slices.Clone(x)
		up[i] += h
		down[i] -= h
		if d := (at(up) - at(down)) / (2 * h); math.Abs(d-g[i]) > 1e-5 {
			t.Errorf("entry %d: gradient %g, finite difference %g", i, g[i], d)
		}
		if a[i] == 0 && g[i] != 0 {
			t.Errorf("entry %d is dropped and has the gradient %g", i, g[i])
		}
	}
}

func TestTopKOfANaNShowsIt(t *testing.T) {
	x := []float64{1, math.NaN(), 2, 3}
	for _, d := range []ReLUTopK{{K: 1}, {K: 1, Buckets: 2}} {
		got := apply(t, x, 4, func(x *graph.Node) *graph.Node { return d.Lower(nil, []*graph.Node{x})[0] })
		if !math.IsNaN(got[1]) {
			t.Errorf("%+v: got %v", d, got)
		}
	}
}

func TestBuckets(t *testing.T) {
	const width = 12
	apart := []float64{9, 1, 2, 3, 8, 0, -1, 7, 6, 1, 1, 6} // the largest of four buckets: 9 8 7 6
	for _, c := range []struct {
		d      ReLUTopK
		want   []float64
		recall float64
	}{
		{ReLUTopK{Buckets: 4}, []float64{9, 0, 0, 0, 8, 0, 0, 7, 0, 0, 0, 6}, .75}, // 9 8 7 6, and the first 6 is in 7's bucket
		{ReLUTopK{K: 2, Buckets: 4}, []float64{9, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0}, 1},
		{ReLUTopK{K: 2, Buckets: 2}, []float64{9, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0}, .5},
		{ReLUTopK{K: 12, Buckets: 12}, []float64{9, 1, 2, 3, 8, 0, 0, 7, 6, 1, 1, 6}, 1},
	} {
		got := apply(t, apart, width, func(x *graph.Node) *graph.Node { return c.d.Lower(nil, []*graph.Node{x})[0] })
		if !slices.Equal(got, c.want) {
			t.Errorf("%+v: got %v, want %v", c.d, got, c.want)
		}
		f := make([]float32, width)
		for i, v := range apart {
			f[i] = float32(v)
		}
		recall, err := c.d.Recall(f, width)
		if err != nil || recall != c.recall {
			t.Errorf("%+v: recall %g (%v), want %g", c.d, recall, err, c.recall)
		}
	}
	tie := []float64{5, 5, 1, 1}
	if got := apply(t, tie, 4, func(x *graph.Node) *graph.Node { return ReLUTopK{Buckets: 2}.Lower(nil, []*graph.Node{x})[0] }); !slices.Equal(got, []float64{5, 0, 1, 0}) {
		t.Errorf("ties in a bucket: %v", got)
	}
	r := rng.New(5, "apart") // the k largest in different buckets
	row := make([]float32, 64)
	for i := range row {
		row[i] = r.Float32()
		if i%8 == 3 {
			row[i] += 2
		}
	}
	if recall, err := (ReLUTopK{Buckets: 8}).Recall(row, 64); err != nil || recall != 1 {
		t.Errorf("the largest are in different buckets and the recall is %g (%v)", recall, err)
	}
}

func TestMagnitudeTopK(t *testing.T) {
	x := []float64{-3, 1, 2, -2, 0, .5}
	got := apply(t, x, 6, func(x *graph.Node) *graph.Node { return MagnitudeTopK{K: 2}.Lower(nil, []*graph.Node{x})[0] })
	if !slices.Equal(got, []float64{-3, 0, 2, 0, 0, 0}) {
		t.Errorf("got %v", got)
	}
}

func TestTopKRefuses(t *testing.T) {
	for name, d := range map[string]ReLUTopK{"k": {K: -1}, "buckets": {Buckets: -2}, "fewer buckets than k": {K: 4, Buckets: 2}, "uneven": {Buckets: 5}} {
		if d.Check(8) == nil {
			t.Errorf("%s: no error", name)
		}
		if _, err := d.Recall(make([]float32, 8), 8); err == nil {
			t.Errorf("%s: no error of the recall", name)
		}
	}
	if (ReLUTopK{K: 4}).Check(0) == nil {
		t.Error("no entries: no error")
	}
	if err := (ReLUTopK{K: 100}).Check(8); err != nil {
		t.Errorf("more than there are: %v", err)
	}
	if _, err := (ReLUTopK{K: 1, Buckets: 2}).Recall([]float32{1, float32(math.NaN())}, 2); err == nil {
		t.Error("NaN: no error")
	}
}

func TestScalingLeavesTheActiveSet(t *testing.T) {
	const width = 16
	x := normals(width*8, 4)
	scaled := make([]float64, len(x))
	for i, v := range x {
		scaled[i] = 4 * v
	}
	f := func(x *graph.Node) *graph.Node { return TopK(x, 5) }
	a, b := apply(t, x, width, f), apply(t, scaled, width, f)
	for i := range a {
		if b[i] != 4*a[i] {
			t.Fatalf("entry %d: %g and %g", i, a[i], b[i])
		}
	}
}

func TestActivationGradientIsPositive(t *testing.T) {
	const classes, sigma, draws = 10, .5, 20_000
	a := []float64{1, .5, 0, 2}
	for _, loss := range []Loss{CrossEntropy, SquareLoss} {
		mean, stderr, err := ActivationGradient(a, GradientOptions{Classes: classes, Loss: loss, Sigma: sigma, Draws: draws}, rng.New(1, "draws"))
		if err != nil {
			t.Fatal(err)
		}
		for i, x := range a {
			if x > 0 && mean[i] < 5*stderr[i] {
				t.Errorf("%s: E[∂ℓ/∂a] = %g ± %g at a = %g", loss, mean[i], stderr[i], x)
			}
			if want := classes * sigma * sigma * x; loss == SquareLoss && math.Abs(mean[i]-want) > 3*stderr[i] {
				t.Errorf("square loss: E[∂ℓ/∂a] = %g ± %g at a = %g, want %g", mean[i], stderr[i], x, want)
			}
		}
	}
	for name, o := range map[string]GradientOptions{"classes": {Classes: 1}, "loss": {Classes: 2, Loss: "hinge"}, "sigma": {Classes: 2, Sigma: -1}, "draws": {Classes: 2, Draws: 1}} {
		if _, _, err := ActivationGradient(a, o, rng.New(1, "")); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if _, _, err := ActivationGradient(nil, GradientOptions{Classes: 2}, rng.New(1, "")); err == nil {
		t.Error("no activations: no error")
	}
	if _, _, err := ActivationGradient([]float64{math.NaN()}, GradientOptions{Classes: 2}, rng.New(1, "")); err == nil {
		t.Error("NaN: no error")
	}
	if _, err := LossGradient([]float64{1, 2}, []float64{1}, 2, CrossEntropy); err == nil {
		t.Error("label out of range: no error")
	}
}

func TestProbe(t *testing.T) {
	a := []float32{1, 0, 2, 0, 0, 0, 0, 0, 3, 4, 5, 0, 9, 9, 9, 9}
	var p SparsityProbe
	if err := p.ObserveTokens("fc", a, 4, Tokens{Valid: []bool{true, true, true, false}}); err != nil {
		t.Fatal(err)
	}
	r, err := p.Report()
	if err != nil {
		t.Fatal(err)
	}
	l := r[0]
	if want := (2. + 0 + 3) / 12; math.Abs(l.NonZero-want) > 1e-12 || l.Tokens != 3 || l.Dead != 1 {
		t.Errorf("%+v, want a share of %g, 3 tokens, 1 dead neuron", l, want)
	}
	if want := (4./5 + 1 + 25./50) / 3; math.Abs(l.EnergyTop10-want) > 1e-12 {
		t.Errorf("the top tenth holds %g of the energy, want %g", l.EnergyTop10, want)
	}
	if l.Spread != [5]float64{0, 0, .5, .5, .75} {
		t.Errorf("spread %v", l.Spread)
	}
	if want := (1. + 0 + 1) / 12; math.Abs(l.Kept(1)-want) > 1e-12 {
		t.Errorf("one of each token keeps %g, want %g", l.Kept(1), want)
	}
	var relative SparsityProbe
	if err := relative.ObserveTokens("g", []float32{-.5, .004, 0, 1}, 4, Tokens{Relative: .01}); err != nil {
		t.Fatal(err)
	}
	if r, _ := relative.Report(); r[0].NonZero != .5 {
		t.Errorf("share above a hundredth of the largest: %g", r[0].NonZero)
	}
}

func TestProbeRefuses(t *testing.T) {
	for name, f := range map[string]func(p *SparsityProbe) error{
		"NaN":      func(p *SparsityProbe) error { return p.Observe("a", []float32{1, float32(math.NaN())}, 2) },
		"infinite": func(p *SparsityProbe) error { return p.Observe("a", []float32{float32(math.Inf(1))}, 1) },
		"no width": func(p *SparsityProbe) error { return p.Observe("a", nil, 0) },
		"rows":     func(p *SparsityProbe) error { return p.Observe("a", make([]float32, 3), 2) },
		"marks": func(p *SparsityProbe) error {
			return p.ObserveTokens("a", make([]float32, 4), 2, Tokens{Valid: []bool{true}})
		},
		"relative": func(p *SparsityProbe) error {
			return p.ObserveTokens("a", make([]float32, 4), 2, Tokens{Relative: 1})
		},
		"another width": func(p *SparsityProbe) error {
			_ = p.Observe("a", make([]float32, 4), 2)
			return p.Observe("a", make([]float32, 4), 4)
		},
		"empty": func(p *SparsityProbe) error { _, err := p.Report(); return err },
		"all padding": func(p *SparsityProbe) error {
			_ = p.ObserveTokens("a", make([]float32, 2), 2, Tokens{Valid: []bool{false}})
			_, err := p.Report()
			return err
		},
	} {
		if f(&SparsityProbe{}) == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestSparseFFNEqualsDense(t *testing.T) {
	for _, c := range []struct{ d, dff, topk, tokens int }{{5, 12, 0, 4}, {8, 32, 4, 3}, {7, 9, 40, 1}, {16, 64, 1, 2}, {3, 1, 0, 1}} {
		draw := func(n int, name string) []float32 {
			v := make([]float32, n)
			rng.Normal(rng.New(3, name), v, 1)
			return v
		}
		k, bk, v, bv, x := draw(c.d*c.dff, "k"), draw(c.dff, "bk"), draw(c.d*c.dff, "v"), draw(c.d, "bv"), draw(c.d*c.tokens, "x")
		for _, negative := range []bool{false, true} {
			if negative {
				for i := range bk {
					bk[i] = -1e3
				}
			}
			f, err := NewSparseFFN(k, bk, v, bv, c.d, c.dff, c.topk)
			if err != nil {
				t.Fatal(err)
			}
			y, same := make([]float32, len(x)), make([]float32, len(x))
			active, err := f.Forward(y, x)
			if err != nil {
				t.Fatal(err)
			}
			if err := f.Dense(same, x); err != nil {
				t.Fatal(err)
			}
			used := 0
			for tok := range c.tokens {
				pre := make([]float64, c.dff)
				for i := range pre {
					pre[i] = float64(bk[i])
					for j := range c.d {
						pre[i] += float64(k[i*c.d+j]) * float64(x[tok*c.d+j])
					}
				}
				a := byHand(pre, c.topk)
				for _, u := range a {
					if u > 0 {
						used++
					}
				}
				for o := range c.d {
					want := float64(bv[o])
					for i, u := range a {
						want += float64(v[o*c.dff+i]) * u
					}
					for name, got := range map[string]float32{"sparse": y[tok*c.d+o], "dense": same[tok*c.d+o]} {
						if math.Abs(float64(got)-want) > 1e-5*max(1, math.Abs(want)) {
							t.Errorf("%+v %s: %g, want %g", c, name, got, want)
						}
					}
					if negative && y[tok*c.d+o] != bv[o] {
						t.Errorf("%+v: no neuron is active and the output is %g, want the bias %g", c, y[tok*c.d+o], bv[o])
					}
				}
			}
			if active != used {
				t.Errorf("%+v: %d columns were used, want %d", c, active, used)
			}
		}
	}
}

func TestSparseFFNRefuses(t *testing.T) {
	w := make([]float32, 6)
	for name, f := range map[string]func() error{
		"no hidden units": func() error { _, err := NewSparseFFN(nil, nil, nil, nil, 2, 0, 0); return err },
		"k":               func() error { _, err := NewSparseFFN(w, nil, w, nil, 2, 3, -1); return err },
		"weights":         func() error { _, err := NewSparseFFN(w, nil, w[:4], nil, 2, 3, 0); return err },
		"huge":            func() error { _, err := NewSparseFFN(w, nil, w, nil, 2, math.MaxInt, 0); return err },
		"bias":            func() error { _, err := NewSparseFFN(w, w, w, nil, 2, 3, 0); return err },
		"output bias":     func() error { _, err := NewSparseFFN(w, nil, w, w, 2, 3, 0); return err },
	} {
		if f() == nil {
			t.Errorf("%s: no error", name)
		}
	}
	f, err := NewSparseFFN(w, nil, w, nil, 2, 3, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Forward(make([]float32, 3), make([]float32, 3)); err == nil {
		t.Error("part of a token: no error")
	}
	if _, err := f.Forward(make([]float32, 2), []float32{float32(math.NaN()), 0}); err == nil {
		t.Error("NaN: no error")
	}
}

func TestCalibrationOfCertainPredictions(t *testing.T) {
	for name, c := range map[string]struct {
		labels []int
		bins   int
		want   float64
	}{"right": {[]int{0, 1, 0, 1}, 15, 0}, "wrong": {[]int{1, 0, 1, 0}, 15, 1}, "a single bin": {[]int{0, 1, 1, 1}, 1, .25}} {
		s, err := metric.ScoreProbabilities([]float64{1, 0, 0, 1, 1, 0, 0, 1}, 2, c.labels)
		if err != nil {
			t.Fatal(err)
		}
		if r, err := s.Calibration(metric.Bins{Count: c.bins, UpperClosed: true}); err != nil || math.Abs(r.ECE-c.want) > 1e-12 {
			t.Errorf("%s: ECE %g (%v), want %g", name, r.ECE, err, c.want)
		}
	}
}

func TestHalfOfTheNeuronsAreActiveAtRandom(t *testing.T) {
	const d, dff, tokens = 64, 256, 400
	r := rng.New(2, "init")
	x, k := make([]float32, d*tokens), make([]float32, d*dff)
	rng.Normal(r, x, 1)
	rng.Normal(r, k, 1./8)
	e, err := engine.NewExec(engine.Go(), func(v []*graph.Node) []*graph.Node {
		return []*graph.Node{TopK(graph.Dot(v[0], v[1]).General([]int{1}, nil, []int{1}, nil), 0)}
	})
	if err != nil {
		t.Fatal(err)
	}
	out, err := e.Call(tensors.FromFlatDataAndDimensions(x, tokens, d), tensors.FromFlatDataAndDimensions(k, dff, d))
	if err != nil {
		t.Fatal(err)
	}
	var p SparsityProbe
	if err := p.Observe("fc", tensors.MustCopyFlatData[float32](out[0]), dff); err != nil {
		t.Fatal(err)
	}
	l, err := p.Report()
	if err != nil || math.Abs(l[0].NonZero-.5) > .02 {
		t.Errorf("%g of the entries are active (%v), want 0.5 ± 0.02", l[0].NonZero, err)
	}
}

package quant

import (
	"context"
	"errors"
	"math"
	"path/filepath"
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
	"github.com/lathe-ml/lathe/internal/fixture"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/learn/optim"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/onnx"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// inGraph runs f once.
func inGraph(t *testing.T, f func(in []*graph.Node) []*graph.Node, in ...*tensors.Tensor) []*tensors.Tensor {
	t.Helper()
	e, err := engine.NewExec(enginetest.Backend(), f)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Finalize()
	args := make([]any, len(in))
	for i, x := range in {
		args[i] = x
	}
	out, err := e.Call(args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// gradient is that of Σ y·grad_out.
func gradient(y, out *graph.Node, of ...*graph.Node) []*graph.Node {
	return graph.Gradient(graph.ReduceAllSum(graph.Mul(y, out)), of...)
}

func TestFixturesOFQ(t *testing.T) {
	fixture.Run(t, 69, map[string]fixture.Func{
		"statsq": func(t *testing.T, c *fixture.Case) map[string]any {
			bits, w := c.Params["bits"].Int(), c.Inputs["W"]
			out := inGraph(t, func(in []*graph.Node) []*graph.Node {
				s, _, _ := statsPlace(in[0], bits)
				q, k := StatsQ(in[0], bits)
				return append([]*graph.Node{graph.Reshape(s, s.Shape().Size()), k, q}, gradient(q, in[1], in[0])...)
			}, w.Tensor(c.DType()), c.Inputs["grad_out"].Tensor(c.DType()))
			scale, codes, err := StatsCodes(w.Float32s(), w.Shape[0], bits, false)
			if err != nil {
				t.Fatal(err)
			}
			for i, k := range nn.Floats(out[1]) {
				if int32(k) != codes[i] {
					t.Errorf("code %d: %g in the graph, %d on the host", i, k, codes[i])
				}
			}
			return map[string]any{"scale": scale, "level_index": out[1], "W_q": out[2], "grad_W": out[3]}
		},
		"lsq_weight": func(t *testing.T, c *fixture.Case) map[string]any {
			bits, w := c.Params["bits"].Int(), c.Inputs["W"]
			start, err := LSQWeight{Bits: bits}.Start(&Site{Weight: w.Float32s(), Shape: w.Shape})
			if err != nil {
				t.Fatal(err)
			}
			step := make([]float64, w.Shape[0])
			for i, s := range start["step"] {
				step[i] = float64(s) * c.Params["step_factor"].Float()
			}
			out := inGraph(t, func(in []*graph.Node) []*graph.Node {
				q := LSQ(in[0], in[1], bits, false)
				return append([]*graph.Node{q}, gradient(q, in[2], in[0], in[1])...)
			}, w.Tensor(c.DType()), fixture.Tensor(step, c.DType(), len(step), 1), c.Inputs["grad_out"].Tensor(c.DType()))
			return map[string]any{"step_init": start["step"], "W_q": out[0], "grad_W": out[1], "grad_step": nn.Float64s(out[2])}
		},
		"lsq_token": func(t *testing.T, c *fixture.Case) map[string]any {
			bits, positive, x := c.Params["bits"].Int(), c.Params["all_positive"].Bool(), c.Inputs["x"]
			tokens := x.Shape[1]
			var steps []float64
			for n := range tokens {
				sum := 0.
				for i, v := range x.Floats() {
					if i/x.Shape[2]%tokens == n {
						sum += math.Abs(v)
					}
				}
				steps = append(steps, LSQStep(sum/float64(x.Shape[0]*x.Shape[2]), bits, positive))
			}
			out := inGraph(t, func(in []*graph.Node) []*graph.Node {
				q := LSQ(in[0], graph.Reshape(in[1], 1, tokens, 1), bits, positive)
				return append([]*graph.Node{q}, gradient(q, in[2], in[0], in[1])...)
			}, x.Tensor(c.DType()), fixture.Tensor(steps, c.DType(), tokens), c.Inputs["grad_out"].Tensor(c.DType()))
			return map[string]any{"step_init": steps, "x_q": out[0], "grad_x": out[1], "grad_step": out[2]}
		},
		"cga_freeze_mask": func(t *testing.T, c *fixture.Case) map[string]any {
			bits, boundary, w := c.Params["bits"].Int(), c.Params["boundary"].Float(), c.Inputs["W"]
			near, err := CGAMask(w.Float32s(), w.Shape[0], w.Shape[1], bits, boundary)
			if err != nil {
				t.Fatal(err)
			}
			frozen := make([]bool, len(near))
			for i, m := range near {
				frozen[i] = !m
			}
			return map[string]any{"frozen": frozen}
		},
		"track_oscillation": func(t *testing.T, c *fixture.Case) map[string]any {
			codes := c.Inputs["codes"]
			o := OscillationTracker{Momentum: c.Params["momentum"].Float()}
			per := len(codes.Floats()) / codes.Shape[0]
			var ema []float64
			for step := range codes.Shape[0] {
				k := make([]int32, per)
				for i := range k {
					k[i] = int32(codes.Ints()[step*per+i])
				}
				if err := o.Update(k); err != nil {
					t.Fatal(err)
				}
				ema = append(ema, o.Frequency()...)
			}
			return map[string]any{"ema": ema, "total": o.Counts(), "last_direction": o.Directions()}
		},
		"qkr": func(t *testing.T, c *fixture.Case) map[string]any {
			heads, bits := c.Params["heads"].Int(), c.Params["bits"].Int()
			out := inGraph(t, func(in []*graph.Node) []*graph.Node {
				fp, p, _ := QKRLogits(in[2], in[0], in[1], heads, 0)
				q, _, pq := QKRLogits(in[2], in[0], in[1], heads, bits)
				return []*graph.Node{p, pq, fp, q}
			}, c.Inputs["Wq"].Tensor(c.DType()), c.Inputs["Wk"].Tensor(c.DType()), c.Inputs["x"].Tensor(c.DType()))
			return map[string]any{"W_qk": out[0], "W_qk_q": out[1], "logits_fp": out[2], "logits_q": out[3]}
		},
	})
}

func TestStatsQByHand(t *testing.T) {
	w := tensors.FromFlatDataAndDimensions([]float32{1, -1, .2, -.2}, 1, 4)
	out := inGraph(t, func(in []*graph.Node) []*graph.Node { q, _ := StatsQ(in[0], 2); return []*graph.Node{q} }, w)
	for i, want := range []float32{.9, -.9, .3, -.3} {
		if got := nn.Floats(out[0])[i]; math.Abs(float64(got-want)) > 1e-6 {
			t.Errorf("weight %d: %g, want %g", i, got, want)
		}
	}
}

func TestStatsQIsEquivariantOddAndZeroFree(t *testing.T) {
	w := normal(3, 5*17, 17)
	w = append(w, make([]float32, 17)...) // a row with one weight
	w[5*17+3] = -.25
	for bits := 1; bits <= 8; bits++ {
		q := func(f float32) []float32 {
			v := slices.Clone(w)
			for i := range v {
				v[i] *= f
			}
			return nn.Floats(inGraph(t, func(in []*graph.Node) []*graph.Node { q, _ := StatsQ(in[0], bits); return []*graph.Node{q} },
				tensors.FromFlatDataAndDimensions(v, 6, 17))[0])
		}
		one, eight, minus := q(1), q(8), q(-1)
		levels := map[int]map[float32]bool{}
		for i, v := range one {
			if eight[i] != 8*v { // a power of two is exact
				t.Errorf("%d bits, weight %d: %g for 8·W, %g for W", bits, i, eight[i], v)
			}
			if w[i] != 0 && minus[i] != -v { // 0 is a tie
				t.Errorf("%d bits, weight %d (%g): %g for −W, %g for W", bits, i, w[i], minus[i], v)
			}
			if v == 0 {
				t.Errorf("%d bits, weight %d is 0", bits, i)
			}
			if row := i / 17; levels[row] == nil {
				levels[row] = map[float32]bool{}
			}
			levels[i/17][v] = true
		}
		for row, l := range levels {
			if len(l) > 1<<bits {
				t.Errorf("%d bits: row %d has %d values", bits, row, len(l))
			}
		}
	}
}

// The gradient of StatsQ is, by definition, that of the identity: finite differences of what it claims to be.
func TestStatsQPassesGradientsEverywhere(t *testing.T) {
	out := inGraph(t, func(in []*graph.Node) []*graph.Node {
		q, _ := StatsQ(in[0], 2)
		return gradient(q, in[1], in[0])
	}, tensors.FromFlatDataAndDimensions([]float32{9, -9, .1, 0, .3, -.2}, 2, 3), tensors.FromFlatDataAndDimensions([]float32{1, 2, 3, 4, 5, 6}, 2, 3))
	if got := nn.Floats(out[0]); !slices.Equal(got, []float32{1, 2, 3, 4, 5, 6}) {
		t.Errorf("gradient %v", got)
	}
}

func TestLSQStepGradient(t *testing.T) {
	x := []float32{.4, 3, -5}
	out := inGraph(t, func(in []*graph.Node) []*graph.Node {
		q := LSQ(in[0], in[1], 2, false)
		return append(gradient(q, graph.OnesLike(q), in[1], in[0]), q)
	}, tensors.FromFlatDataAndDimensions(x, 3), tensors.FromFlatDataAndDimensions([]float32{1}, 1))
	want := -1.4 / math.Sqrt(1*3)
	if got := float64(nn.Floats(out[0])[0]); math.Abs(got-want) > 1e-6 {
		t.Errorf("gradient of the step %g, want %g", got, want)
	}
	if got := nn.Floats(out[1]); !slices.Equal(got, []float32{1, 0, 0}) {
		t.Errorf("gradient of the values %v, want it inside the grid only", got)
	}
	// What the step's gradient claims: the derivative of s·(x/s + c) with the rounding error c held fixed, and of the
	// ends of the grid outside.
	const h = 1e-3
	y := func(s float64) (sum float64) {
		for _, v := range x {
			r := math.RoundToEven(float64(v)) - float64(v)
			sum += s * min(max(float64(v)/s+r, -2), 1)
		}
		return sum
	}
	if d := (y(1+h) - y(1-h)) / (2 * h) / math.Sqrt(3); math.Abs(d-want) > 1e-4 {
		t.Errorf("finite difference %g, want %g", d, want)
	}
}

func TestLSQStepRecoversFromTheFloor(t *testing.T) {
	out := inGraph(t, func(in []*graph.Node) []*graph.Node {
		q := LSQ(in[0], in[1], 3, true)
		return append(gradient(q, graph.OnesLike(q), in[1]), q)
	}, tensors.FromFlatDataAndDimensions([]float32{1, 2}, 2), tensors.FromFlatDataAndDimensions([]float32{-4}, 1))
	if g, q := nn.Floats(out[0])[0], nn.Floats(out[1])[0]; g <= 0 || math.Abs(float64(q)-7e-5) > 1e-9 {
		t.Errorf("a step below the floor: gradient %g, value %g", g, q)
	}
}

func TestQueryKeyEqualsOrdinaryAttention(t *testing.T) {
	const tokens, dim, heads = 3, 8, 2
	wq, wk, x := normal(1, dim*dim, dim), normal(2, dim*dim, dim), normal(3, tokens*dim, dim)
	logits := nn.Floats(inGraph(t, func(in []*graph.Node) []*graph.Node {
		l, _, _ := QKRLogits(in[0], in[1], in[2], heads, 0)
		return []*graph.Node{l}
	}, tensors.FromFlatDataAndDimensions(x, 1, tokens, dim), tensors.FromFlatDataAndDimensions(wq, dim, dim), tensors.FromFlatDataAndDimensions(wk, dim, dim))[0])
	dot := func(w []float32, row int, v []float32) (s float64) {
		for i := range v {
			s += float64(w[row*dim+i]) * float64(v[i])
		}
		return s
	}
	for h := range heads {
		for i := range tokens {
			for j := range tokens {
				want := 0.
				for r := h * dim / heads; r < (h+1)*dim/heads; r++ {
					want += dot(wq, r, x[i*dim:(i+1)*dim]) * dot(wk, r, x[j*dim:(j+1)*dim]) / math.Sqrt(dim/heads)
				}
				if got := float64(logits[(h*tokens+i)*tokens+j]); math.Abs(got-want) > 1e-5*max(1, math.Abs(want)) {
					t.Errorf("head %d, %d to %d: %g, want %g", h, i, j, got, want)
				}
			}
		}
	}
}

func TestQueryKeyGradientReachesBothWeights(t *testing.T) {
	const dim, heads = 4, 2
	wq, wk, g := normal(1, dim*dim, dim), normal(2, dim*dim, dim), normal(3, heads*dim*dim, dim)
	out := inGraph(t, func(in []*graph.Node) []*graph.Node {
		q, _ := StatsQ(QueryKey(in[0], in[1], heads), 2)
		return gradient(q, in[2], in[0], in[1])
	}, tensors.FromFlatDataAndDimensions(wq, dim, dim), tensors.FromFlatDataAndDimensions(wk, dim, dim), tensors.FromFlatDataAndDimensions(g, heads*dim, dim))
	f := func(q, k []float32) (s float64) { // straight through: the product itself
		for i, p := range queryKey(q, k, heads, dim/heads) {
			s += float64(p) * float64(g[i])
		}
		return s
	}
	const h = 1e-2
	for which, w := range [][]float32{wq, wk} {
		for i := range w {
			up, down := slices.Clone(w), slices.Clone(w)
			up[i] += h
			down[i] -= h
			var d float64
			if which == 0 {
				d = (f(up, wk) - f(down, wk)) / float64(up[i]-down[i])
			} else {
				d = (f(wq, up) - f(wq, down)) / float64(up[i]-down[i])
			}
			if got := float64(nn.Floats(out[which])[i]); math.Abs(got-d) > 1e-3 {
				t.Errorf("weight %d of %d: gradient %g, finite difference %g", i, which, got, d)
			}
		}
	}
}

func TestCGAMaskIsAlikeOnHostAndInTheGraph(t *testing.T) {
	w := normal(11, 6*20, 20)
	for bits := 1; bits <= 4; bits++ {
		for _, boundary := range []float64{0, .01, .2, .5} {
			near, err := CGAMask(w, 6, 20, bits, boundary)
			if err != nil {
				t.Fatal(err)
			}
			out := inGraph(t, func(in []*graph.Node) []*graph.Node { return []*graph.Node{cgaMask(in[0], bits, boundary)} }, tensors.FromFlatDataAndDimensions(w, 6, 20))
			for i, m := range nn.Floats(out[0]) {
				if (m == 1) != near[i] {
					t.Errorf("%d bits, boundary %g, weight %d: %g in the graph, %t on the host", bits, boundary, i, m, near[i])
				}
			}
		}
	}
	near, err := CGAMask([]float32{1, -1, .2, -.2, .6, 0}, 1, 6, 2, .5) // s = 1: v = 1.5−, −2.5, −.1, −.9, .7, −.5
	if err != nil {
		t.Fatal(err)
	}
	if want := []bool{false, false, true, true, true, true}; !slices.Equal(near, want) {
		t.Errorf("boundary 0.5: %v, want every weight between the extreme codes: %v", near, want)
	}
}

func TestOscillationTracker(t *testing.T) {
	run := func(codes ...int32) (o OscillationTracker) {
		for _, k := range codes {
			if err := o.Update([]int32{k}); err != nil {
				t.Fatal(err)
			}
		}
		return o
	}
	if o := run(0, 1, 0, 1, 0); o.Total() != 3 || o.FlipRate() != 1 || o.Share(.005) != 1 {
		t.Errorf("0 1 0 1 0: %d oscillations, %g flips per step, share %g", o.Total(), o.FlipRate(), o.Share(.005))
	}
	if o := run(-2, -1, -1, 0, 1); o.Total() != 0 || o.FlipRate() != .75 || o.Share(0) != 0 {
		t.Errorf("a ramp: %d oscillations, %g flips per step", o.Total(), o.FlipRate())
	}
	o := run(1)
	if err := o.Update([]int32{1, 2}); err == nil {
		t.Error("another number of codes is accepted")
	}
}

// oneLayer is a dense layer of statistical weights, its codes' input and a trainer on a regression.
func oneLayer(t *testing.T, w []float32, rows, bits int, o learn.Options) (*nn.Network, *learn.Trainer, []*tensors.Tensor) {
	t.Helper()
	cols := len(w) / rows
	b := nn.NewBuilder(1)
	net, err := b.Finish(b.Add("fc", nn.Dense{Out: rows, NoBias: true}, b.Input("x", shapes.Make(dtypes.Float32, 1, cols))))
	if err != nil {
		t.Fatal(err)
	}
	net.SetParam(net.Node("fc"), "w", nn.Weight, w, rows, cols)
	if err := MakeLatent(net, net.Node("fc"), StatsWeight{Bits: bits}); err != nil {
		t.Fatal(err)
	}
	tr, err := learn.NewTrainer(enginetest.Backend(), &net.Params, func(env *nn.Env, batch []*graph.Node) *graph.Node {
		return learn.MSE(net.Lower(env, map[string]*graph.Node{"x": batch[0]})[0], batch[1])
	}, o)
	if err != nil {
		t.Fatal(err)
	}
	return net, tr, []*tensors.Tensor{
		tensors.FromFlatDataAndDimensions(normal(5, 8*cols, cols), 8, cols), tensors.FromFlatDataAndDimensions(normal(6, 8*rows, rows), 8, rows),
	}
}

func TestFrozenWeightsKeepEveryBit(t *testing.T) {
	w := normal(21, 4*30, 30)
	for _, boundary := range []float64{0, .1} {
		net, tr, batch := oneLayer(t, w, 4, 2, learn.Options{Optimizer: optim.AdamW{Decay: .5}, LR: .01, Moves: func(name string, v *graph.Node) *graph.Node {
			return cgaMask(v, 2, boundary)
		}})
		for range 3 {
			before := net.Param(net.Node("fc"), "w").Data()
			near, err := CGAMask(before, 4, 30, 2, boundary)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := tr.Step(batch...); err != nil {
				t.Fatal(err)
			}
			moved := 0
			for i, v := range net.Param(net.Node("fc"), "w").Data() {
				if v != before[i] {
					moved++
					if !near[i] {
						t.Fatalf("boundary %g: weight %d moved from %g to %g", boundary, i, before[i], v)
					}
				}
			}
			if boundary == 0 && moved > 0 || boundary > 0 && moved == 0 {
				t.Errorf("boundary %g: %d weights moved", boundary, moved)
			}
		}
		tr.Finalize()
	}
}

// smallStudent trains a few steps of everything that OFQ has on a transformer with biases.
func smallOFQ(steps int) OFQ {
	return OFQ{
		WeightBits: 2, ActBits: 4, QAT: QAT{Steps: steps, Batch: 8, LR: 2e-3}, AnnealSteps: 3, Boundary: .05,
		Options: compress.Options{Seed: 5},
	}
}

func TestOFQTrainsStoresAndExports(t *testing.T) {
	ctx, b := context.Background(), enginetest.Backend()
	net := smallViT(t, nn.LayerNorm{})
	before := net.Clone()
	x := images(24, 8, 8, 1)
	q := smallOFQ(12)
	q.Labels = make([]int, 24)
	for i := range q.Labels {
		q.Labels[i] = i % 5
	}
	var steps []compress.Step
	q.Progress = func(s compress.Step) { steps = append(steps, s) }
	p, err := q.Prepare(ctx, b, net, x)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := outputs(t, p.Reference, x), outputs(t, net, x); !near(got, want, 1e-4) {
		t.Errorf("the query-key products change the float network: %v, want %v", got[:5], want[:5])
	}
	if _, err := p.Train(ctx, b, x); err != nil {
		t.Fatal(err)
	}
	if _, err := p.Anneal(ctx, b, x); err != nil {
		t.Fatal(err)
	}
	trained := outputs(t, p.Student, x)
	r, err := p.Finish(ctx, b, x)
	if err != nil {
		t.Fatal(err)
	}
	if got := outputs(t, r.Network, x); !near(got, trained, 1e-3) {
		t.Errorf("stored %v, trained %v", got[:5], trained[:5])
	}
	bits := map[string][2]int{}
	for _, s := range r.Sites {
		bits[s.Name] = [2]int{s.WeightBits, s.InputBits}
		if s.WeightBits < 32 && (s.Bytes <= 0 || s.WeightErr <= 0 || s.WeightErr > .6) {
			t.Errorf("site %+v", s)
		}
	}
	for name, want := range map[string][2]int{
		"patch": {8, 8}, "head": {8, 8}, "blk.0.attn.logits.qk": {2, 4}, "blk.1.attn.v": {2, 4}, "blk.0.attn.o": {2, 4}, "blk.1.fc2": {2, 4},
	} {
		if bits[name] != want {
			t.Errorf("site %q has %v bits, want %v", name, bits[name], want)
		}
	}
	for v := range before.Params.All() {
		if !slices.Equal(v.Data(), net.Params.Get(v.Name).Data()) {
			t.Errorf("the input's parameter %q has changed", v.Name)
		}
	}
	if len(steps) == 0 || steps[len(steps)-1].Bytes == 0 {
		t.Errorf("progress %v", steps)
	}
	folded := 0
	for _, n := range r.Network.Nodes {
		if op, ok := n.Op.(LearnedStep); ok && op.NoAfter {
			folded++
		}
	}
	if folded != 2*3+1 {
		t.Errorf("%d quantisers have handed their shift on, want those in front of o, fc1 and fc2 of two blocks and of the head", folded)
	}
	for _, opset := range []int{17, 21} {
		path := filepath.Join(t.TempDir(), "ofq.onnx")
		if err := onnx.WriteFile(path, r.Network, onnx.WriteOptions{Opset: opset}); err != nil {
			t.Fatal(err)
		}
		back, err := onnx.ReadFile(path, onnx.Options{})
		if err != nil {
			t.Fatal(err)
		}
		if got := outputs(t, back, x); !near(got, outputs(t, r.Network, x), 1e-4) {
			t.Errorf("opset %d: read back %v, want %v", opset, got[:5], outputs(t, r.Network, x)[:5])
		}
	}
}

func TestAnnealingFreezesConfidentWeights(t *testing.T) {
	ctx, b := context.Background(), enginetest.Backend()
	net, x := smallViT(t, nn.LayerNorm{}), images(8, 8, 8, 1)
	q := smallOFQ(1)
	q.AnnealSteps, q.AnnealLR, q.Boundary = 1, .01, .1
	p, err := q.Prepare(ctx, b, net, x)
	if err != nil {
		t.Fatal(err)
	}
	before := p.Student.Params.Clone()
	if _, err := p.Anneal(ctx, b, x); err != nil {
		t.Fatal(err)
	}
	statistical := 0
	for _, n := range p.Student.Sites() {
		form, ok := n.Op.(nn.Linear).Repr().(StatsWeight)
		if !ok {
			continue
		}
		statistical++
		w := p.Student.Param(n, "w")
		old, s := before.Get(w.Name).Data(), w.Value.Shape().Dimensions
		near, err := CGAMask(old, s[0], len(old)/s[0], form.Bits, .1)
		if err != nil {
			t.Fatal(err)
		}
		moved := 0
		for i, v := range w.Data() {
			if v == old[i] {
				continue
			}
			if moved++; !near[i] {
				t.Fatalf("%q: weight %d is far from a threshold and went from %g to %g", n.Name, i, old[i], v)
			}
		}
		if moved == 0 {
			t.Errorf("%q: no weight moved", n.Name)
		}
	}
	if statistical != 2*4 {
		t.Errorf("%d sites with statistical weights, want v, o, fc1 and fc2 of two blocks", statistical)
	}
	if r := p.Student.Node("blk.0.attn.logits.qk").Op.(nn.Linear).Repr(); r != (QueryKeyWeight{Heads: 2, Width: 8, Bits: 2}) {
		t.Errorf("after annealing the product is %+v", r)
	}
}

func TestAnnealingMasksTheGradientOfProducts(t *testing.T) {
	const dim, heads = 4, 2
	wq, wk, g := normal(1, dim*dim, dim), normal(2, dim*dim, dim), normal(3, heads*dim*dim, dim)
	grad := func(boundary float64) []float32 {
		b := nn.NewBuilder(1)
		net, err := b.Finish(b.Add("p", nn.Dense{Out: heads * dim, NoBias: true}, b.Input("x", shapes.Make(dtypes.Float32, 1, dim))))
		if err != nil {
			t.Fatal(err)
		}
		n := net.Node("p")
		form := QueryKeyWeight{Heads: heads, Width: dim / heads, Bits: 2, Boundary: boundary}
		if err := setLatents(net, n, form, []int{heads * dim, dim}, map[string][]float32{"wq": wq, "wk": wk}); err != nil {
			t.Fatal(err)
		}
		return nn.Floats(inGraph(t, func(in []*graph.Node) []*graph.Node {
			env := &nn.Env{G: in[0].Graph(), Training: true, Param: func(name string) *graph.Node {
				return map[string]*graph.Node{n.P["wq"]: in[0], n.P["wk"]: in[1]}[name]
			}}
			return gradient(form.Value(&nn.Ctx{Env: env, Node: n}), in[2], in[0])
		}, tensors.FromFlatDataAndDimensions(wq, dim, dim), tensors.FromFlatDataAndDimensions(wk, dim, dim), tensors.FromFlatDataAndDimensions(g, heads*dim, dim))[0])
	}
	const boundary = .15
	product := queryKey(wq, wk, heads, dim/heads)
	near, err := CGAMask(product, heads*dim, dim, 2, boundary)
	if err != nil {
		t.Fatal(err)
	}
	want := make([]float64, dim*dim) // Σ over the products near a threshold
	for h := range heads {
		for d := range dim {
			for e := range dim {
				if at := (h*dim+d)*dim + e; near[at] {
					for r := h * dim / heads; r < (h+1)*dim/heads; r++ {
						want[r*dim+d] += float64(g[at]) * float64(wk[r*dim+e])
					}
				}
			}
		}
	}
	got := grad(boundary)
	for i, w := range want {
		if math.Abs(float64(got[i])-w) > 1e-5 {
			t.Errorf("weight %d: gradient %g, want %g", i, got[i], w)
		}
	}
	if slices.Equal(got, grad(0)) {
		t.Error("the mask changes nothing")
	}
}

func near(a, b []float32, tol float64) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if !(math.Abs(float64(a[i]-b[i])) <= tol*max(1, math.Abs(float64(b[i])))) {
			return false
		}
	}
	return true
}

func TestStatisticalWeightsExportAtAllBits(t *testing.T) {
	x := images(3, 6)
	for bits := 1; bits <= 8; bits++ {
		net := twoLayers(t, func(b *nn.Builder, x string) []string { return []string{x} })
		for _, n := range net.Sites() {
			if err := MakeLatent(net, n, StatsWeight{Bits: bits}); err != nil {
				t.Fatal(err)
			}
		}
		trained := outputs(t, net, x)
		if err := Settle(net); err != nil {
			t.Fatal(err)
		}
		if got := outputs(t, net, x); !near(got, trained, 1e-5) {
			t.Errorf("%d bits: stored %v, trained %v", bits, got[:3], trained[:3])
		}
		for _, opset := range []int{17, 21} {
			path := filepath.Join(t.TempDir(), "w.onnx")
			if err := onnx.WriteFile(path, net, onnx.WriteOptions{Opset: opset}); err != nil {
				t.Fatal(err)
			}
			back, err := onnx.ReadFile(path, onnx.Options{})
			if err != nil {
				t.Fatal(err)
			}
			if got := outputs(t, back, x); !near(got, trained, 1e-5) {
				t.Errorf("%d bits, opset %d: read back %v, want %v", bits, opset, got[:3], trained[:3])
			}
		}
	}
}

func TestOFQVariantsRun(t *testing.T) {
	x := images(8, 8, 8, 1)
	net := smallViT(t, nn.LayerNorm{})
	for name, change := range map[string]func(q *OFQ){
		"learned scales":     func(q *OFQ) { q.Weights = LearnedScale },
		"fixed scales":       func(q *OFQ) { q.Weights = FixedScale },
		"float activations":  func(q *OFQ) { q.ActBits = 32 },
		"separate, 1 bit":    func(q *OFQ) { q.NoQueryKey, q.WeightBits = true, 1 },
		"dampening":          func(q *OFQ) { q.Dampening = 1e-3 },
		"freezing":           func(q *OFQ) { q.FreezeAbove = 1e-3 },
		"one step per value": func(q *OFQ) { q.PerTensor = true },
		"some sites": func(q *OFQ) {
			q.Select = func(n *nn.Node) bool { return strings.HasSuffix(n.Name, ".fc1") }
			q.Options.Bits = map[string]compress.Bits{"blk.0.fc1": {Weight: 3, Act: 5}}
		},
	} {
		q := smallOFQ(2)
		change(&q)
		r, err := q.Compress(context.Background(), enginetest.Backend(), net, x)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for _, v := range outputs(t, r.Network, x) {
			if v-v != 0 {
				t.Errorf("%s: outputs %g", name, v)
				break
			}
		}
		if name == "some sites" {
			for _, s := range r.Sites {
				want := [2]int{32, 32}
				if s.Name == "blk.0.fc1" {
					want = [2]int{3, 5}
				} else if s.Name == "blk.1.fc1" {
					want = [2]int{2, 4}
				}
				if got := [2]int{s.WeightBits, s.InputBits}; got != want {
					t.Errorf("site %q: %v bits, want %v", s.Name, got, want)
				}
			}
		}
	}
}

func TestOFQServesConvolutions(t *testing.T) {
	net, err := zoo.ResNet(zoo.ResNetOptions{Size: 8, Width: 4, Seed: 1})
	if err != nil {
		t.Fatal(err)
	}
	size := slices.Clone(net.Inputs[0].Shape.Dimensions)
	x := images(8, size[1:]...)
	r, err := smallOFQ(2).Compress(context.Background(), enginetest.Backend(), net, x)
	if err != nil {
		t.Fatal(err)
	}
	few := 0
	for _, s := range r.Sites {
		if s.WeightBits == 2 && s.InputBits == 4 {
			few++
		}
	}
	if few < 3 {
		t.Errorf("%d of %d sites have 2-bit weights and 4-bit inputs: %+v", few, len(r.Sites), r.Sites)
	}
}

func TestOFQGoesOnWhereItWasStopped(t *testing.T) {
	ctx, b := context.Background(), enginetest.Backend()
	net, x := smallViT(t, nn.LayerNorm{}), images(16, 8, 8, 1)
	whole, err := smallOFQ(6).Compress(ctx, b, net, x)
	if err != nil {
		t.Fatal(err)
	}
	j, err := compress.OpenJournal(filepath.Join(t.TempDir(), "journal"))
	if err != nil {
		t.Fatal(err)
	}
	q := smallOFQ(6)
	q.Journal = j
	stopped, stop := context.WithCancel(ctx)
	q.After = []learn.Hook{func(_ *learn.Trainer, i learn.Info) error {
		if i.Step == 4 {
			stop()
		}
		return nil
	}}
	if _, err := q.Compress(stopped, b, net, x); !errors.Is(err, context.Canceled) {
		t.Fatalf("stopped: %v", err)
	}
	first := 0
	q.After = []learn.Hook{func(_ *learn.Trainer, i learn.Info) error {
		if first == 0 {
			first = i.Step
		}
		return nil
	}}
	again, err := q.Compress(ctx, b, net, x)
	if err != nil {
		t.Fatal(err)
	}
	if first != 5 {
		t.Errorf("it goes on at step %d, want 5", first)
	}
	if !near(outputs(t, again.Network, x), outputs(t, whole.Network, x), 1e-5) {
		t.Error("a run that was stopped ends elsewhere")
	}
	first = 0
	if _, err := q.Compress(ctx, b, net, x); err != nil || first != 0 {
		t.Errorf("a finished run trains again from step %d: %v", first, err)
	}
}

// The first and the last layer are found behind a norm of the inputs and in front of what the network does to its outputs.
func TestOFQKeepsBitsAtTheEdges(t *testing.T) {
	b := nn.NewBuilder(1)
	x := b.Add("norm", nn.LayerNorm{}, b.Input("x", shapes.Make(dtypes.Float32, 1, 8)))
	for i, name := range []string{"first", "middle", "last"} {
		x = b.Add(name, nn.Dense{Out: []int{6, 7, 5}[i]}, x)
	}
	net, err := b.Finish(b.Add("end", nn.ReLU, x))
	if err != nil {
		t.Fatal(err)
	}
	d := make([]float32, 16*8)
	rng.Normal(rng.New(1, "x"), d, 1)
	calib, err := compress.FloatExamples(d, 16, 8)
	if err != nil {
		t.Fatal(err)
	}
	p, err := OFQ{WeightBits: 3, QAT: QAT{Steps: 2, Batch: 8}}.Prepare(context.Background(), enginetest.Backend(), net, calib)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]compress.Bits{"first": {Weight: 8, Act: 8}, "middle": {Weight: 3, Act: 3}, "last": {Weight: 8, Act: 8}} {
		if p.bits[name] != want {
			t.Errorf("%s has %+v, want %+v", name, p.bits[name], want)
		}
	}
}

func TestOFQRefuses(t *testing.T) {
	ctx, b := context.Background(), enginetest.Backend()
	net, x := smallViT(t, nn.LayerNorm{}), images(8, 8, 8, 1)
	dead := net.Clone()
	w := dead.Params.Get("blk.0.fc1.w")
	d := w.Data()
	clear(d[16:32])
	if err := w.SetData(d); err != nil {
		t.Fatal(err)
	}
	nan := net.Clone()
	w = nan.Params.Get("blk.0.fc1.w")
	d = w.Data()
	d[3] = float32(math.NaN())
	if err := w.SetData(d); err != nil {
		t.Fatal(err)
	}
	done, err := smallOFQ(1).Compress(ctx, b, net, x)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		net    *nn.Network
		change func(q *OFQ)
		calib  compress.Examples
		want   string
	}{
		"9 bits":              {net, func(q *OFQ) { q.WeightBits = 9 }, x, "1 to 8"},
		"negative bits":       {net, func(q *OFQ) { q.WeightBits = -1 }, x, "1 to 8"},
		"1-bit learned scale": {net, func(q *OFQ) { q.WeightBits, q.Weights = 1, LearnedScale }, x, "2 to 8"},
		"boundary":            {net, func(q *OFQ) { q.Boundary = .6 }, x, "0 to 0.5"},
		"negative boundary":   {net, func(q *OFQ) { q.Boundary = -.1 }, x, "0 to 0.5"},
		"row of zeros":        {dead, func(*OFQ) {}, x, "blk.0.fc1"},
		"NaN":                 {nan, func(*OFQ) {}, x, "blk.0.fc1"},
		"labels":              {net, func(q *OFQ) { q.Labels = []int{1, 2} }, x, "2 labels for 8"},
		"label":               {net, func(q *OFQ) { q.Labels = []int{1, 2, 3, 4, 5, 0, 0, 0} }, x, "label 5"},
		"no target":           {net, func(q *OFQ) { q.NoTeacher = true }, x, "labels"},
		"no examples":         {net, func(*OFQ) {}, nil, "empty"},
		"quantised":           {done.Network, func(*OFQ) {}, x, "quantised already"},
		"scales":              {net, func(q *OFQ) { q.Weights = "other" }, x, "statistical"},
		"no such site":        {net, func(q *OFQ) { q.Options.Bits = map[string]compress.Bits{"x": {}} }, x, "no node"},
		"nothing selected":    {net, func(q *OFQ) { q.Select = func(*nn.Node) bool { return false } }, x, "selected"},
	} {
		q := smallOFQ(1)
		c.change(&q)
		if _, err := q.Compress(ctx, b, c.net, c.calib); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want an error with %q", name, err, c.want)
		}
	}
	q := smallOFQ(1)
	q.ZeroRows = true
	if _, err := q.Compress(ctx, b, dead, x); err != nil {
		t.Errorf("a row of zeros that is accepted: %v", err)
	}
	if _, _, err := StatsCodes(make([]float32, 4), 2, 2, false); !errors.Is(err, ErrZeroRow) {
		t.Errorf("a row of zeros: %v", err)
	}
	if _, _, err := StatsCodes([]float32{1, 2, 3}, 2, 2, false); err == nil {
		t.Error("3 weights in 2 rows are accepted")
	}
	e, err := engine.NewExec(b, func(in []*graph.Node) []*graph.Node { return []*graph.Node{QueryKey(in[0], in[0], 3)} })
	if err != nil {
		t.Fatal(err)
	}
	defer e.Finalize()
	if _, err := e.Call(tensors.FromFlatDataAndDimensions(make([]float32, 16), 4, 4)); err == nil || !strings.Contains(err.Error(), "3 heads") {
		t.Errorf("4 rows in 3 heads: %v", err)
	}
}

func TestLearnedStepsFixTheNumberOfTokens(t *testing.T) {
	b := nn.NewBuilder(1)
	net, err := b.Finish(b.Add("q", LearnedStep{Bits: 4, Axis: -2}, b.Input("x", shapes.Make(dtypes.Float32, 1, 3, 2))))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := net.Run(enginetest.Backend(), []*tensors.Tensor{tensors.FromFlatDataAndDimensions(make([]float32, 8), 1, 4, 2)}); err == nil || !strings.Contains(err.Error(), "3 steps") {
		t.Errorf("4 tokens for 3 steps: %v", err)
	}
}

// fusedAttention is attention whose queries, keys and values come from one layer, taken apart as exporters do it.
func fusedAttention(t *testing.T, split bool) *nn.Network {
	t.Helper()
	const tokens, dim, heads = 5, 8, 2
	b := nn.NewBuilder(4)
	x := b.Input("x", shapes.Make(dtypes.Float32, 1, tokens, dim))
	x = b.Add("first", nn.Dense{Out: dim}, x)
	qkv := b.Add("qkv", nn.Dense{Out: 3 * dim}, x)
	var part [3]string
	if split {
		s := b.Add("parts", nn.Split{Axis: 2, Sizes: []int{dim, dim, dim}}, qkv)
		for i, v := range []string{s, "parts.1", "parts.2"} {
			h := b.Add("heads"+string(rune('a'+i)), nn.Reshape{Dims: []int{0, tokens, heads, dim / heads}}, v)
			part[i] = b.Add("turned"+string(rune('a'+i)), nn.Transpose{Perm: []int{0, 2, 1, 3}}, h)
		}
	} else {
		h := b.Add("heads", nn.Reshape{Dims: []int{0, tokens, 3, heads, dim / heads}}, qkv)
		h = b.Add("turned", nn.Transpose{Perm: []int{2, 0, 3, 1, 4}}, h)
		for i := range part {
			v := b.Add("part"+string(rune('a'+i)), nn.Slice{Axis: 0, From: i, To: i + 1}, h)
			part[i] = b.Add("flat"+string(rune('a'+i)), nn.Reshape{Dims: []int{-1, heads, tokens, dim / heads}}, v)
		}
	}
	q := b.Add("scaled", nn.Affine{Scale: .5}, part[0])
	p := b.Add("probs", nn.Softmax{}, b.Add("logits", nn.MatMul{}, q, b.Add("k.t", nn.Transpose{Perm: []int{0, 1, 3, 2}}, part[1])))
	c := b.Add("merge", nn.Reshape{Dims: []int{0, tokens, dim}}, b.Add("ctx.t", nn.Transpose{Perm: []int{0, 2, 1, 3}}, b.Add("ctx", nn.MatMul{}, p, part[2])))
	net, err := b.Finish(b.Add("last", nn.Dense{Out: 3}, c))
	if err != nil {
		t.Fatal(err)
	}
	net.SetParam(net.Node("qkv"), "b", nn.Bias, normal(9, 3*dim, dim), 3*dim)
	return net
}

func TestQueryKeyOfOneLayer(t *testing.T) {
	x := images(6, 5, 8)
	for _, split := range []bool{false, true} {
		net := fusedAttention(t, split)
		out, s, err := reparamQueryKey(enginetest.Backend(), net, "logits")
		if err != nil {
			t.Fatal(err)
		}
		if s.value == "" || out.Node("qkv") != nil || net.Node("qkv") == nil {
			t.Errorf("split %t: the layer is not taken apart: %+v", split, s)
		}
		if got, want := outputs(t, out, x), outputs(t, net, x); !near(got, want, 1e-5) {
			t.Errorf("split %t: %v, want %v", split, got[:3], want[:3])
		}
		r, err := smallOFQ(2).Compress(context.Background(), enginetest.Backend(), net, x)
		if err != nil {
			t.Fatal(err)
		}
		for _, site := range r.Sites {
			if want := map[string]int{"logits.qk": 2, "qkv.v": 2}[site.Name]; want != 0 && site.WeightBits != want {
				t.Errorf("split %t: %+v", split, site)
			}
		}
	}
	net := fusedAttention(t, true)
	net.Outputs = append(net.Outputs, "parts.1")
	if _, _, err := reparamQueryKey(enginetest.Backend(), net, "logits"); !errors.Is(err, errNoProduct) {
		t.Errorf("keys that are an output, too: %v", err)
	}
}

func TestIterativeFreezingHoldsWhatOscillates(t *testing.T) {
	net := twoLayers(t, func(_ *nn.Builder, x string) []string { return []string{x} })
	n := net.Node("second")
	if err := MakeLatent(net, n, StatsWeight{Bits: 2}); err != nil {
		t.Fatal(err)
	}
	f, err := newIterativeFreezing(net, .005)
	if err != nil {
		t.Fatal(err)
	}
	p := net.Param(n, "w")
	codes := func() []int32 {
		_, k, err := StatsCodes(p.Data(), 4, 2, false)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	start, other := p.Data(), codes()
	for step := range 8 { // weight 0 jumps between the innermost levels, the others stand still
		w := p.Data()
		w[0] = .01
		if step%2 == 1 {
			w[0] = -.01
		}
		if err := p.SetData(w); err != nil {
			t.Fatal(err)
		}
		if err := f.after(nil, learn.Info{}); err != nil {
			t.Fatal(err)
		}
	}
	if !f.sites[0].frozen[0] || slices.Contains(f.sites[0].frozen[1:], true) {
		t.Fatalf("frozen %v, want the first weight alone", f.sites[0].frozen)
	}
	scale, _, _ := StatsCodes(p.Data(), 4, 2, false)
	if got, want := float64(p.Data()[0]), scale[0]*(f.sites[0].code[0]+.5)/2; math.Abs(got-want) > .1*math.Abs(want) { // it counts in the scale of its row itself
		t.Errorf("the frozen weight is %g, want the middle of its level, %g", got, want)
	}
	if float64(codes()[0]) != f.sites[0].code[0] || !slices.Equal(codes()[1:], other[1:]) || p.Data()[1] != start[1] {
		t.Errorf("codes %v, want %g and then %v", codes(), f.sites[0].code[0], other[1:])
	}
}

func TestDampeningDrawsToTheMiddleOfLevels(t *testing.T) {
	net := twoLayers(t, func(_ *nn.Builder, x string) []string { return []string{x} })
	n := net.Node("second")
	if err := MakeLatent(net, n, StatsWeight{Bits: 2}); err != nil {
		t.Fatal(err)
	}
	p := &OFQNetwork{Student: net, Settings: OFQ{Dampening: .5}}
	w := net.Param(n, "w")
	out := inGraph(t, func(in []*graph.Node) []*graph.Node {
		l := p.dampening(&nn.Env{G: in[0].Graph(), Param: func(string) *graph.Node { return in[0] }})
		q, _ := StatsQ(in[0], 2)
		return []*graph.Node{l, graph.Gradient(l, in[0])[0], q}
	}, w.Value)
	scale, _, err := StatsCodes(w.Data(), 4, 2, false)
	if err != nil {
		t.Fatal(err)
	}
	q, loss := nn.Floats(out[2]), func(w []float32, q []float32) (sum float64) {
		for i, v := range w {
			most := scale[i/8] * .75
			d := float64(q[i]) - min(max(float64(v), -most), most)
			sum += .5 * d * d
		}
		return sum
	}
	if got, want := float64(nn.Floats(out[0])[0]), loss(w.Data(), q); math.Abs(got-want) > 1e-5*want {
		t.Errorf("penalty %g, want %g", got, want)
	}
	for i, g := range nn.Floats(out[1]) {
		up, down := w.Data(), w.Data()
		up[i] += 1e-3
		down[i] -= 1e-3
		if d := (loss(up, q) - loss(down, q)) / float64(up[i]-down[i]); math.Abs(d-float64(g)) > 1e-4 {
			t.Errorf("weight %d: gradient %g, finite difference %g", i, g, d)
		}
	}
}

// A step of the student on a batch and a pass of the teacher: x [4, 6] -> fc1 [4, 8] -> fc2 [4, 3].
func TestOFQHolds(t *testing.T) {
	b := nn.NewBuilder(1)
	net, err := b.Finish(b.Add("fc2", nn.Dense{Out: 3}, b.Add("fc1", nn.Dense{Out: 8}, b.Input("x", shapes.Make(dtypes.Float32, 1, 6)))))
	if err != nil {
		t.Fatal(err)
	}
	// All values; the most alive in a pass (x, fc1), twice, of the teacher with a copy of the largest; the sites' inputs.
	const want = 4 * 4 * ((8 + 3) + (6 + 8) + (6 + 8) + 8 + (6 + 8))
	if got, err := (OFQ{QAT: QAT{Batch: 4}}).Holds(net, 100); err != nil || got != want {
		t.Errorf("%d bytes, want %d (%v)", got, want, err)
	}
	if got, err := (OFQ{ActBits: 32, QAT: QAT{Batch: 4}}).Holds(net, 100); err != nil || got != want-4*4*(6+8) {
		t.Errorf("%d bytes with inputs in float, want %d (%v)", got, want-4*4*(6+8), err)
	}
}

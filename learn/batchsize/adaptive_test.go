package batchsize_test

import (
	"context"
	"encoding/json"
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

	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/learn/batchsize"
	"github.com/lathe-ml/lathe/learn/optim"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// images are n pictures of side s with labels that can be learnt; flat ones are [n, s²].
func images(n, s int, flat bool) func(idx []int) ([]*tensors.Tensor, error) {
	r := rng.New(7, "images")
	px, labels := make([]float32, n*s*s), make([]int32, n)
	for i := range n {
		labels[i] = int32(r.IntN(10))
		for j := range s * s {
			px[i*s*s+j] = float32(r.NormFloat64()*.5) + float32((int(labels[i])*5+j)%10)/10
		}
	}
	return func(idx []int) ([]*tensors.Tensor, error) {
		var x []float32
		var y []int32
		for _, i := range idx {
			x, y = append(x, px[i*s*s:(i+1)*s*s]...), append(y, labels[i])
		}
		dims := []int{len(idx), s, s, 1}
		if flat {
			dims = []int{len(idx), s * s}
		}
		return []*tensors.Tensor{tensors.FromFlatDataAndDimensions(x, dims...), tensors.FromFlatDataAndDimensions(y, len(idx))}, nil
	}
}

func mlp(t *testing.T) *nn.Network {
	t.Helper()
	n, err := zoo.MLP(zoo.MLPOptions{Inputs: 64, Hidden: []int{12}, Seed: 3})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func layers(t *testing.T, build func(b *nn.Builder) string) *nn.Network {
	t.Helper()
	b := nn.NewBuilder(2)
	n, err := b.Finish(build(b))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestSinglePassEqualsSingleCases(t *testing.T) {
	vit, err := zoo.ViT(zoo.ViTOptions{Size: 8, Patch: 4, Dim: 8, Depth: 1, Heads: 2, Seed: 1})
	if err != nil {
		t.Fatal(err)
	}
	resnet, err := zoo.ResNet(zoo.ResNetOptions{Size: 8, Width: 4, Norm: nn.GroupNorm{Groups: 2}})
	if err != nil {
		t.Fatal(err)
	}
	conv := layers(t, func(b *nn.Builder) string { // few positions and many channels, and the reverse; dilation, padding, stride
		x := b.Image("x", 8, 8, 1)
		x = b.Add("wide", nn.Conv2D(12, 3, 2), x)
		x = b.Add("act", nn.ReLU, x)
		x = b.Add("dilated", nn.Conv{Out: 12, Kernel: []int{2, 3}, Dilation: []int{1, 2}, Pad: [][2]int{{0, 1}, {2, 2}}}, x)
		x = b.Add("norm", nn.RMSNorm{Bias: true}, x)
		return b.Add("head", nn.Dense{Out: 10}, b.Add("flat", nn.Reshape{Dims: []int{0, 4 * 4 * 12}}, x))
	})
	tokens := layers(t, func(b *nn.Builder) string {
		x := b.Input("x", shapes.Make(dtypes.Int32, 1, 6))
		x = b.Add("embed", nn.Embedding{N: 5, Dim: 3}, x)
		x = b.Add("fc", nn.Dense{Out: 4}, x) // over a sequence: fewer coordinates than positions
		x = b.Add("wide", nn.Dense{Out: 40}, x)
		x = b.Add("mean", nn.Reduce{Fn: "ReduceMean", Axes: []int{1}}, x)
		return b.Add("head", nn.Dense{Out: 10}, x)
	})
	words := func(idx []int) ([]*tensors.Tensor, error) {
		x, y := make([]int32, 6*len(idx)), make([]int32, len(idx))
		for k, i := range idx {
			r := rng.New(uint64(i), "words")
			y[k] = int32(r.IntN(10))
			for j := range 6 {
				x[6*k+j] = int32(r.IntN(5))
			}
		}
		return []*tensors.Tensor{tensors.FromFlatDataAndDimensions(x, len(idx), 6), tensors.FromFlatDataAndDimensions(y, len(idx))}, nil
	}
	pictures := images(6, 8, false)
	for name, c := range map[string]struct {
		net  *nn.Network
		data func([]int) ([]*tensors.Tensor, error)
	}{"perceptron": {mlp(t), images(6, 8, true)}, "convolutions": {conv, pictures}, "sequence": {tokens, words}, "transformer": {vit, pictures}, "residual": {resnet, pictures}} {
		for _, test := range []batchsize.Test{batchsize.NormTest{Eta: 1}, batchsize.CoordinateTest{Eta: 1}, batchsize.AugmentedTest{Theta: 1, Nu: 1}} {
			t.Run(name+"/"+test.Name(), func(t *testing.T) {
				loss := learn.Classifier(c.net)
				var cases [][]*tensors.Tensor
				for i := range 6 {
					b, _ := c.data([]int{i})
					cases = append(cases, b)
				}
				want, err := batchsize.Exact(enginetest.Backend(), &c.net.Params, loss, cases, 0)
				if err != nil {
					t.Fatal(err)
				}
				for _, micro := range []int{6, 4} { // at once, and as 4 and 2
					net := c.net.Clone()
					a := &batchsize.AdaptiveBatcher{Test: test, N: 60, Initial: 6, Max: 60, MaxMicro: micro, Ladder: 2}
					probe, err := a.Probe(net)
					if err != nil {
						t.Fatal(err)
					}
					tr, err := learn.NewTrainer(enginetest.Backend(), &net.Params, learn.Classifier(net), learn.Options{Optimizer: optim.SGD{}, LR: 1e-9, Probe: probe})
					if err != nil {
						t.Fatal(err)
					}
					from, size := 0, 6
					if micro == 4 { // two full micro-batches: 4, 5, 0, 1 and 2, 3, 4, 5
						from, size = -2, 8
						var twice [][]*tensors.Tensor
						for i := range size {
							twice = append(twice, cases[(i+4)%6])
						}
						if want, err = batchsize.Exact(enginetest.Backend(), &c.net.Params, loss, twice, 0); err != nil {
							t.Fatal(err)
						}
					}
					_, err = a.Step(tr, 1e-9, func(idx []int) ([]*tensors.Tensor, error) {
						use := make([]int, len(idx))
						for i := range use {
							use[i] = (from + i + 6) % 6
						}
						from += len(idx)
						return c.data(use)
					})
					if err != nil {
						t.Fatal(err)
					}
					got := a.Last()
					if got.B != size {
						t.Fatalf("batch of %d, want %d", got.B, size)
					}
					near := func(what string, got, want, scale float64) {
						if math.Abs(got-want) > 1e-4*max(scale, math.Abs(want)) {
							t.Errorf("micro %d: %s is %g, single cases give %g", micro, what, got, want)
						}
					}
					if got.MeanSq == 0 || want.VarL1 == 0 {
						t.Fatal("no gradient")
					}
					near("‖ḡ‖²", got.MeanSq, want.MeanSq, 0)
					if got.Inner == nil || micro == 6 { // several micro-batches give an estimate of the inner statistics
						near("‖Var‖₁", got.VarL1, want.VarL1, 0)
					}
					if test.Name() == "coordinate" {
						if len(got.Var) != c.net.Params.Count() {
							t.Fatalf("%d coordinates of %d", len(got.Var), c.net.Params.Count())
						}
						sum := 0.
						for _, v := range got.Var {
							sum += v
						}
						near("Σ Var_j", sum, want.VarL1, 0)
					}
					if test.Name() == "augmented" && micro == 6 {
						near("V", got.Inner.Along, want.Inner.Along, 1e-3*want.MeanSq)
						near("W", got.Inner.Across, want.Inner.Across, 0)
					}
				}
			})
		}
	}
}

func TestCoordinatesInOnePass(t *testing.T) {
	// Var_j by coordinate, in the order of the parameters' names, against single cases.
	net := mlp(t)
	data := images(40, 8, true)
	a := &batchsize.AdaptiveBatcher{Test: batchsize.CoordinateTest{Eta: 1}, N: 40, Initial: 8}
	probe, err := a.Probe(net)
	if err != nil {
		t.Fatal(err)
	}
	before := net.Clone()
	tr, err := learn.NewTrainer(enginetest.Backend(), &net.Params, learn.Classifier(net), learn.Options{Optimizer: optim.SGD{}, LR: .1, Probe: probe})
	if err != nil {
		t.Fatal(err)
	}
	var cases [][]*tensors.Tensor
	if _, err := a.Step(tr, .1, func(idx []int) ([]*tensors.Tensor, error) {
		for _, i := range idx {
			c, _ := data([]int{i})
			cases = append(cases, c)
		}
		return data(idx)
	}); err != nil {
		t.Fatal(err)
	}
	grads, names, err := batchsize.Gradients(enginetest.Backend(), &before.Params, learn.Classifier(before), cases)
	if err != nil {
		t.Fatal(err)
	}
	sorted := slices.Sorted(slices.Values(names))
	var byTensor [][][]float64
	for _, n := range sorted {
		var one [][]float64
		for i := range cases {
			one = append(one, grads[i][slices.Index(names, n)])
		}
		byTensor = append(byTensor, one)
	}
	want := stats(t, byTensor)
	got := a.Last()
	for j, v := range want.Var {
		if math.Abs(got.Var[j]-v) > 1e-5*max(1e-2, v) || math.Abs(got.Mean[j]-want.Mean[j]) > 1e-5 {
			t.Fatalf("coordinate %d: variance %g, mean %g; want %g, %g", j, got.Var[j], got.Mean[j], v, want.Mean[j])
		}
	}
}

func TestGroupedStatisticsOfAStep(t *testing.T) {
	for _, test := range allTests {
		net := mlp(t)
		data := images(64, 8, true)
		a := &batchsize.AdaptiveBatcher{Test: test, N: 64, Initial: 16, Groups: 4}
		probe, err := a.Probe(net)
		if err != nil {
			t.Fatal(err)
		}
		before := net.Clone()
		tr, err := learn.NewTrainer(enginetest.Backend(), &net.Params, learn.Classifier(net), learn.Options{Optimizer: optim.SGD{}, LR: .1, Probe: probe})
		if err != nil {
			t.Fatal(err)
		}
		var groups [][]*tensors.Tensor
		if _, err := a.Step(tr, .1, func(idx []int) ([]*tensors.Tensor, error) {
			b, err := data(idx)
			groups = append(groups, b)
			return b, err
		}); err != nil {
			t.Fatal(err)
		}
		grads, _, err := batchsize.Gradients(enginetest.Backend(), &before.Params, learn.Classifier(before), groups)
		if err != nil {
			t.Fatal(err)
		}
		var flat [][]float64
		for _, g := range grads {
			flat = append(flat, slices.Concat(g...))
		}
		want, err := batchsize.GroupStats(flat, 4)
		if err != nil {
			t.Fatal(err)
		}
		got := a.Last()
		if len(groups) != 4 || got.B != 16 || math.Abs(got.VarL1-want.VarL1) > 1e-4*want.VarL1 || math.Abs(got.MeanSq-want.MeanSq) > 1e-4*want.MeanSq {
			t.Errorf("%s: %d groups, got %+v, want ‖Var‖₁ %g and ‖ḡ‖² %g", test.Name(), len(groups), got.VarL1, want.VarL1, want.MeanSq)
		}
	}
}

func TestUncoveredNetworksAreRefused(t *testing.T) {
	bn, err := zoo.ResNet(zoo.ResNetOptions{Size: 8, Width: 4})
	if err != nil {
		t.Fatal(err)
	}
	lstm, err := zoo.CharLSTM(zoo.CharLSTMOptions{Symbols: 4, Hidden: 4, Embedding: 4, Length: 3})
	if err != nil {
		t.Fatal(err)
	}
	grouped := layers(t, func(b *nn.Builder) string {
		c := nn.Conv2D(4, 3, 1)
		c.Groups = 2
		return b.Add("grouped", c, b.Input("x", shapes.Make(dtypes.Float32, 1, 4, 4, 4)))
	})
	tied := layers(t, func(b *nn.Builder) string {
		x := b.Add("a", nn.Dense{Out: 4, NoBias: true}, b.Input("x", shapes.Make(dtypes.Float32, 1, 4)))
		return b.Share("w", "a.w").Add("b", nn.Dense{Out: 4, NoBias: true}, x)
	})
	for want, n := range map[string]*nn.Network{"statistics of the batch": bn, "not covered": lstm, "convolution in groups": grouped, "shares parameter": tied} {
		a := &batchsize.AdaptiveBatcher{Test: batchsize.NormTest{Eta: .5}, N: 100}
		_, err := a.Probe(n)
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "Groups") {
			t.Errorf("want a refusal with %q and a remedy, got %v", want, err)
		}
		a = &batchsize.AdaptiveBatcher{Test: batchsize.NormTest{Eta: .5}, N: 100, Groups: 8}
		if _, err := a.Probe(n); err != nil {
			t.Errorf("micro-batches serve every network, got %v", err)
		}
	}
	// A loss that lowers the network twice is noticed when the step is built.
	net := mlp(t)
	a := &batchsize.AdaptiveBatcher{Test: batchsize.NormTest{Eta: .5}, N: 40}
	probe, err := a.Probe(net)
	if err != nil {
		t.Fatal(err)
	}
	twice := func(env *nn.Env, b []*graph.Node) *graph.Node {
		return graph.Add(learn.Classifier(net)(env, b), learn.Classifier(net)(env, b))
	}
	tr, err := learn.NewTrainer(enginetest.Backend(), &net.Params, twice, learn.Options{Probe: probe})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.Step(tr, .1, images(40, 8, true)); err == nil || !strings.Contains(err.Error(), "used 2 times") {
		t.Errorf("two lowerings: %v", err)
	}
}

func TestBatcherRefusals(t *testing.T) {
	test := batchsize.NormTest{Eta: .5}
	for name, a := range map[string]*batchsize.AdaptiveBatcher{
		"no cases":        {Test: test},
		"one case":        {Test: test, N: 100, Initial: 1},
		"max below start": {Test: test, N: 100, Initial: 16, Max: 8},
		"max above N":     {Test: test, N: 100, Max: 101},
		"eta":             {Test: batchsize.NormTest{}, N: 100},
		"nu":              {Test: batchsize.AugmentedTest{Theta: 1}, N: 100},
		"quantile":        {Test: batchsize.CoordinateTest{Eta: 1, Quantile: 2}, N: 100},
		"ladder":          {Test: test, N: 100, Ladder: 1},
		"micro":           {Test: test, N: 100, MaxMicro: -1},
		"one group":       {Test: test, N: 100, Groups: 1},
		"many groups":     {Test: test, N: 100, Max: 50, Groups: 51},
		"interval":        {Test: test, N: 100, TestInterval: -1},
		"growth":          {Test: test, N: 100, MaxGrowth: .5},
	} {
		if err := a.Start(); err == nil {
			t.Errorf("%s was accepted", name)
		}
		if _, err := a.Next(); err == nil {
			t.Errorf("%s drew a batch", name)
		}
	}
	a := &batchsize.AdaptiveBatcher{Test: test, N: 64}
	net := mlp(t)
	tr, err := learn.NewTrainer(enginetest.Backend(), &net.Params, learn.Classifier(net), learn.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.Step(tr, .1, images(64, 8, true)); err == nil || !strings.Contains(err.Error(), "probe") {
		t.Errorf("a trainer without the probe: %v", err)
	}
}

func TestEveryEpochDrawsEveryCaseOnce(t *testing.T) {
	sizes := []int{7, 11, 11, 40, 23, 50, 50, 50, 8}
	a := &batchsize.AdaptiveBatcher{N: 50, Initial: 7, Seed: 3, Ladder: 1.01, Ramp: nil}
	k := 0
	a.Ramp = func(int) int { k++; return sizes[k-1] }
	var all []int
	for range sizes {
		idx, err := a.Next()
		if err != nil {
			t.Fatal(err)
		}
		seen := map[int]bool{}
		for _, i := range idx {
			if seen[i] {
				t.Fatalf("case %d twice in one batch", i)
			}
			seen[i] = true
		}
		all = append(all, idx...)
	}
	for from := 0; from+50 <= len(all); from += 50 {
		epoch := slices.Sorted(slices.Values(all[from : from+50]))
		for i, v := range epoch {
			if i != v {
				t.Fatalf("epoch from %d: draws %v", from, epoch)
			}
		}
	}
	if a.Samples() != len(all) {
		t.Errorf("%d samples, drew %d", a.Samples(), len(all))
	}
	if slices.Equal(all[:50], all[50:100]) {
		t.Error("two epochs in one order")
	}
}

func TestSizesClimbTheLadder(t *testing.T) {
	grow := func(a *batchsize.AdaptiveBatcher, to float64) int {
		t.Helper()
		if _, err := a.Next(); err != nil {
			t.Fatal(err)
		}
		old := a.Size()
		if err := a.Update(batchsize.GradStats{B: old, MeanSq: 4, VarL1: to}); err != nil { // eta² ‖ḡ‖² = 1
			t.Fatal(err)
		}
		if a.Size() < old {
			t.Fatalf("size fell from %d to %d", old, a.Size())
		}
		return a.Size()
	}
	test := batchsize.NormTest{Eta: .5}
	a := &batchsize.AdaptiveBatcher{Test: test, N: 1000, Initial: 16, Max: 300}
	for _, c := range []struct {
		need float64
		want int
	}{{10, 16}, {17, 24}, {24, 24}, {20, 24}, {25, 36}, {100, 122}, {299, 300}, {1e300, 300}, {2, 300}} {
		if got := grow(a, c.need); got != c.want {
			t.Errorf("%g cases would pass: size %d, want %d", c.need, got, c.want)
		}
	}
	a = &batchsize.AdaptiveBatcher{Test: test, N: 1000, Initial: 16, MaxMicro: 50}
	for _, c := range []struct {
		need float64
		want int
	}{{17, 24}, {40, 50}, {51, 100}, {420, 450}, {2000, 1000}} {
		if got := grow(a, c.need); got != c.want {
			t.Errorf("micro-batches of 50: %g cases would pass: size %d, want %d", c.need, got, c.want)
		}
	}
	a = &batchsize.AdaptiveBatcher{Test: test, N: 1000, Initial: 16, Groups: 8, MaxMicro: 30}
	for _, c := range []struct {
		need float64
		want int
	}{{17, 24}, {26, 40}, {230, 240}, {250, 270}, {5000, 990}} {
		if got := grow(a, c.need); got != c.want {
			t.Errorf("groups of 8: %g cases would pass: size %d, want %d", c.need, got, c.want)
		}
	}
	a = &batchsize.AdaptiveBatcher{Test: test, N: 1000, Initial: 2, MaxGrowth: 2, Ladder: 1.01}
	if got := grow(a, 1e9); got != 4 {
		t.Errorf("growth of at most 2: size %d after 2", got)
	}
	a = &batchsize.AdaptiveBatcher{Test: test, N: 1000, Initial: 16, Max: 16}
	if got := grow(a, 1e9); got != 16 {
		t.Errorf("max = start: size %d", got)
	}
	if made, _, _ := a.Tests(); made != 0 {
		t.Errorf("max = start: %d tests", made)
	}
	a = &batchsize.AdaptiveBatcher{Test: test, N: 1000, Initial: 16, TestInterval: 3}
	for i, want := range []int{16, 16, 122} {
		if got := grow(a, 100); got != want {
			t.Errorf("interval 3, step %d: size %d, want %d", i+1, got, want)
		}
	}
	a = &batchsize.AdaptiveBatcher{Test: test, N: 1000, Initial: 2}
	grow(a, 1)
	if err := a.Update(batchsize.GradStats{B: 2}); err != nil {
		t.Errorf("a zero gradient: %v", err)
	}
	if made, passed, stationary := a.Tests(); made != 2 || passed != 1 || stationary != 1 || a.Size() != 2 {
		t.Errorf("%d tests, %d passed, %d stationary, size %d", made, passed, stationary, a.Size())
	}
}

func TestStateOfAnotherBatcherIsRefused(t *testing.T) {
	a := &batchsize.AdaptiveBatcher{N: 100, Seed: 1 << 63}
	for range 9 {
		if _, err := a.Next(); err != nil {
			t.Fatal(err)
		}
	}
	state, err := json.Marshal(a)
	if err != nil {
		t.Fatal(err)
	}
	same := &batchsize.AdaptiveBatcher{N: 100, Seed: 1 << 63}
	if err := json.Unmarshal(state, same); err != nil {
		t.Fatal(err)
	}
	for range 5 {
		x, _ := a.Next()
		y, _ := same.Next()
		if !slices.Equal(x, y) {
			t.Fatalf("%v after restoring, want %v", y, x)
		}
	}
	for _, other := range []*batchsize.AdaptiveBatcher{{N: 101, Seed: 1 << 63}, {N: 100}, {N: 100, Seed: 1 << 63, Max: 50}, {N: 100, Seed: 1 << 63, Initial: 8}, {N: 100, Seed: 1 << 63, Groups: 8}} {
		if err := json.Unmarshal(state, other); err == nil {
			t.Errorf("%+v took a foreign state", other)
		}
	}
	for _, bad := range []string{`{"size":3}`, strings.Replace(string(state), `"position":`, `"position":1`, 1), strings.Replace(string(state), `"head":[`, `"head":[-1,`, 1)} {
		if bad != string(state) {
			if err := json.Unmarshal([]byte(bad), same); err == nil {
				t.Errorf("%s was accepted", bad)
			}
		}
	}
}

// fit trains a perceptron from batches of 4 for 600 cases; the context is cancelled after stop steps.
func fit(t *testing.T, path string, stop, groups int) (*nn.Network, *batchsize.AdaptiveBatcher, []int, error) {
	t.Helper()
	net := mlp(t)
	data := images(120, 8, true)
	a := &batchsize.AdaptiveBatcher{Test: batchsize.NormTest{Eta: .5}, N: 120, Initial: 4, MaxGrowth: 1.3, TestInterval: 2, MaxMicro: 20, Groups: groups, Seed: 5}
	probe, err := a.Probe(net)
	if err != nil {
		t.Fatal(err)
	}
	tr, err := learn.NewTrainer(enginetest.Backend(), &net.Params, learn.Classifier(net), learn.Options{Optimizer: optim.AdaGradNorm{Momentum: .5}, LR: 1, Probe: probe})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var sizes []int
	schedule := optim.CosineSamples(600, 40, .1)
	_, err = tr.Fit(ctx, learn.FitOptions{
		Steps: math.MaxInt, Checkpoint: path, Extra: a,
		Done: func() bool { return a.Samples() >= 600 },
		Step: func(tr *learn.Trainer) (learn.Info, error) {
			sizes = append(sizes, a.Size())
			return a.Step(tr, schedule(a.Samples()), data)
		},
		After: []learn.Hook{func(_ *learn.Trainer, i learn.Info) error {
			if i.Step == stop {
				cancel()
			}
			return nil
		}},
	})
	return net, a, sizes, err
}

func TestResumeIsBitExact(t *testing.T) {
	for _, groups := range []int{0, 4} {
		want, whole, sizes, err := fit(t, "", -1, groups)
		if err != nil {
			t.Fatal(err)
		}
		if first, last := sizes[0], sizes[len(sizes)-1]; last <= first || !slices.IsSorted(sizes) {
			t.Errorf("sizes %v do not grow", sizes)
		}
		path := filepath.Join(t.TempDir(), "a.ckpt")
		if _, _, _, err := fit(t, path, 7, groups); !errors.Is(err, context.Canceled) {
			t.Fatalf("stopped run: %v", err)
		}
		got, resumed, rest, err := fit(t, path, -1, groups)
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(rest, sizes[7:]) {
			t.Errorf("sizes %v after resuming, want %v", rest, sizes[7:])
		}
		for p := range want.Params.All() {
			if !slices.Equal(p.Data(), got.Params.Get(p.Name).Data()) {
				t.Errorf("%s differs from the run that was never stopped", p.Name)
			}
		}
		a, _ := json.Marshal(whole)
		b, _ := json.Marshal(resumed)
		if string(a) != string(b) {
			t.Errorf("state %s, want %s", b, a)
		}
	}
}

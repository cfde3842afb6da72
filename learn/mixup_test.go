package learn_test

import (
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/internal/stat"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/zoo"
)

func TestDirichletMoments(t *testing.T) {
	r := rng.New(1, "mixup")
	for _, c := range []struct {
		m        int
		alpha    float64
		mean, va float64
	}{{2, 1, .5, 1. / 12}, {4, 1, .25, .25 * .75 / 5}, {2, .2, .5, .25 / 1.4}, {3, 5, 1. / 3, 2. / 9 / 16}} {
		const n = 40_000
		var first stat.Moments
		for range n {
			mix, err := learn.Mixup{Size: c.m, Alpha: c.alpha}.Draw(r, 1)
			if err != nil {
				t.Fatal(err)
			}
			first.Add(float64(mix.Weights[0]))
		}
		if math.Abs(first.Mean()-c.mean) > 5*math.Sqrt(c.va/n) || math.Abs(first.PopVariance()/c.va-1) > .04 {
			t.Errorf("Dirichlet(%g) of %d: mean %v, variance %v; want %v, %v", c.alpha, c.m, first.Mean(), first.PopVariance(), c.mean, c.va)
		}
	}
	mix, err := learn.Mixup{Alpha: 1e-4}.Draw(r, 1) // both Gamma draws would be 0
	if err != nil || mix.Validate() != nil {
		t.Errorf("alpha 1e-4: %v, %v, %v", mix.Weights, err, mix.Validate())
	}
}

func TestDrawIsAMix(t *testing.T) {
	for _, m := range []learn.Mixup{{}, {Size: 1}, {Size: 4}, {Size: 3, PerSample: true}} {
		mix, err := m.Draw(rng.New(2, "mixup"), 7)
		if err != nil {
			t.Fatal(err)
		}
		if err := mix.Validate(); err != nil {
			t.Errorf("%+v: %v", m, err)
		}
		if !slices.Equal(mix.Perms[:7], []int32{0, 1, 2, 3, 4, 5, 6}) {
			t.Errorf("%+v: the first permutation is %v, want the identity", m, mix.Perms[:7])
		}
	}
}

func TestMixupRefuses(t *testing.T) {
	r := rng.New(3, "mixup")
	for name, m := range map[string]learn.Mixup{"size": {Size: -1}, "alpha": {Alpha: -1}, "NaN": {Alpha: math.NaN()}, "infinite": {Alpha: math.Inf(1)}, "huge": {Size: 1 << 20}} {
		if _, err := m.Draw(r, 4); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if _, err := (learn.Mixup{}).Draw(r, 0); err == nil {
		t.Error("empty batch: no error")
	}
	ok := learn.Mix{Size: 2, Batch: 2, Weights: []float32{.5, .5}, Perms: []int32{0, 1, 1, 0}}
	if err := ok.Validate(); err != nil {
		t.Error(err)
	}
	for name, x := range map[string]learn.Mix{
		"twice":    {Size: 2, Batch: 2, Weights: ok.Weights, Perms: []int32{0, 1, 1, 1}},
		"outside":  {Size: 2, Batch: 2, Weights: ok.Weights, Perms: []int32{0, 1, 2, 0}},
		"negative": {Size: 2, Batch: 2, Weights: ok.Weights, Perms: []int32{0, 1, -1, 0}},
		"sum":      {Size: 2, Batch: 2, Weights: []float32{.5, .6}, Perms: ok.Perms},
		"below 0":  {Size: 2, Batch: 2, Weights: []float32{1.5, -.5}, Perms: ok.Perms},
		"short":    {Size: 2, Batch: 2, Weights: ok.Weights[:1], Perms: ok.Perms},
		"rows":     {Size: 2, Batch: 2, PerSample: true, Weights: ok.Weights, Perms: ok.Perms},
	} {
		if x.Validate() == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// mixed runs DMixup and the loss on logits in float64.
func mixed(t *testing.T, mix learn.Mix, x [][]float64, labels []int32, classes int, logits [][]float64) (out []*tensors.Tensor) {
	t.Helper()
	ex, err := engine.NewExec(enginetest.Backend(), func(in []*graph.Node) []*graph.Node {
		xm, soft := learn.DMixup(in[0], graph.OneHot(in[1], classes, in[0].DType()), in[2], in[3])
		loss := learn.SoftCrossEntropy(in[4], soft)
		return []*graph.Node{xm, soft, loss, graph.Gradient(loss, in[4])[0]}
	})
	if err != nil {
		t.Fatal(err)
	}
	m := mix.Tensors()
	w := make([]float64, len(mix.Weights))
	for i, v := range mix.Weights {
		w[i] = float64(v)
	}
	if out, err = ex.Call(x, labels, tensors.FromFlatDataAndDimensions(w, m[0].Shape().Dimensions...), m[1], logits); err != nil {
		t.Fatal(err)
	}
	return out
}

func TestMixedLossIsTheWeightedSumOfLosses(t *testing.T) {
	r := rng.New(5, "mixup")
	const batch, classes = 5, 3
	x, z := make([][]float64, batch), make([][]float64, batch)
	labels := make([]int32, batch)
	for i := range x {
		x[i] = []float64{r.NormFloat64(), r.NormFloat64()}
		z[i] = []float64{r.NormFloat64(), r.NormFloat64(), r.NormFloat64()}
		labels[i] = int32(r.IntN(classes))
	}
	p := make([][]float64, batch)
	for i := range p {
		p[i] = make([]float64, classes)
		stat.Softmax(p[i], z[i])
	}
	for _, m := range []learn.Mixup{{Size: 1}, {Size: 2}, {Size: 4}, {Size: 3, PerSample: true}} {
		mix, err := m.Draw(r, batch)
		if err != nil {
			t.Fatal(err)
		}
		out := mixed(t, mix, x, labels, classes, z)
		xm, soft, grad := nn.Float64s(out[0]), nn.Float64s(out[1]), nn.Float64s(out[3])
		want := 0.
		for i := range batch {
			total, row := 0., make([]float64, classes)
			var at [2]float64
			for j := range mix.Size {
				w := mix.Weights[j]
				if m.PerSample {
					w = mix.Weights[i*mix.Size+j]
				}
				k := mix.Perms[j*batch+i]
				row[labels[k]] += float64(w)
				at[0] += float64(w) * x[k][0]
				at[1] += float64(w) * x[k][1]
				want -= float64(w) * math.Log(p[i][labels[k]]) / batch
			}
			for c := range classes {
				total += soft[i*classes+c]
				if math.Abs(soft[i*classes+c]-row[c]) > 1e-9 {
					t.Errorf("%+v: soft label %v of row %d, want %v", m, soft[i*classes+c], i, row[c])
				}
				if g := (p[i][c] - row[c]) / batch; math.Abs(grad[i*classes+c]-g) > 1e-7 { // the float32 weights sum to 1 within 1e-7
					t.Errorf("%+v: gradient %v, want %v", m, grad[i*classes+c], g)
				}
			}
			if math.Abs(total-1) > 1e-6 || math.Abs(xm[2*i]-at[0]) > 1e-9 || math.Abs(xm[2*i+1]-at[1]) > 1e-9 {
				t.Errorf("%+v: row %d: labels sum to %v, x %v; want 1, %v", m, i, total, xm[2*i:2*i+2], at)
			}
		}
		if got := nn.Float64s(out[2])[0]; math.Abs(got-want) > 1e-9 {
			t.Errorf("%+v: loss %v, want %v", m, got, want)
		}
	}
}

func TestUnmixedMixupIsPlainTraining(t *testing.T) {
	const batch = 6
	b := enginetest.Backend()
	x, y := images(batch)
	train := func(loss func(*nn.Network) learn.LossFunc, extra ...*tensors.Tensor) []float32 {
		n, err := zoo.MLP(zoo.MLPOptions{Inputs: 784, Hidden: []int{8}, Seed: 4})
		if err != nil {
			t.Fatal(err)
		}
		tr, err := learn.NewTrainer(b, &n.Params, loss(n), learn.Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer tr.Finalize()
		flat := tensors.FromFlatDataAndDimensions(tensors.MustCopyFlatData[float32](x), batch, 784)
		for range 3 {
			if _, err := tr.Step(append([]*tensors.Tensor{flat, y}, extra...)...); err != nil {
				t.Fatal(err)
			}
		}
		return n.Params.Get("head.w").Data()
	}
	plain := train(learn.Classifier)
	one, err := learn.Mixup{Size: 1}.Draw(rng.New(1, "mixup"), batch)
	if err != nil {
		t.Fatal(err)
	}
	three, err := learn.Mixup{Size: 3}.Draw(rng.New(1, "mixup"), batch)
	if err != nil {
		t.Fatal(err)
	}
	three.Weights = []float32{1, 0, 0}
	for name, mix := range map[string]learn.Mix{"m = 1": one, "w = (1, 0, 0)": three} {
		if got := train(learn.MixupClassifier, mix.Tensors()...); !slices.Equal(got, plain) {
			t.Errorf("%s: the weights differ from plain training's", name)
		}
	}
	if got := train(learn.MixupClassifier); !slices.Equal(got, plain) {
		t.Error("batches without a mix: the weights differ from plain training's")
	}
}

func TestDMixupRefusesShapes(t *testing.T) {
	for name, c := range map[string]struct {
		args []any
		want string
	}{
		"perms":   {[]any{[][]float32{{1}, {2}}, [][]float32{{1, 0}, {0, 1}}, []float32{1}, [][]int32{{0}}}, "permutations"},
		"weights": {[]any{[][]float32{{1}, {2}}, [][]float32{{1, 0}, {0, 1}}, []float32{1, 0, 0}, [][]int32{{0, 1}}}, "weights"},
		"types":   {[]any{[][]int32{{1}, {2}}, [][]float32{{1, 0}, {0, 1}}, []float32{1}, [][]int32{{0, 1}}}, "floating"},
		"target":  {[]any{[][]float32{{1}, {2}}, [][]float32{{1, 0}}, []float32{1}, [][]int32{{0, 1}}}, "permutations"},
	} {
		ex, err := engine.NewExec(enginetest.Backend(), func(in []*graph.Node) []*graph.Node {
			a, b := learn.DMixup(in[0], in[1], in[2], in[3])
			return []*graph.Node{a, b}
		})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ex.Call(c.args...); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want an error about %s", name, err, c.want)
		}
	}
}

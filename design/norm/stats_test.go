package norm_test

import (
	"math"
	"slices"
	"testing"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/design/norm"
	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/nn"
)

// statNet is one norm over tokens of 3 channels, whose loss is Σ y·dy, and the batch of a step.
func statNet(t *testing.T, op nn.Norm) (*nn.Network, learn.LossFunc, func(step uint64) []*tensors.Tensor) {
	t.Helper()
	b := nn.NewBuilder(1)
	x := b.Add("scale", nn.Dense{Out: 3, NoBias: true}, b.Input("x", shapes.Make(dtypes.Float32, 1, 3)))
	n, err := b.Finish(b.Add("norm", op, x))
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Params.Get("scale.w").SetData([]float32{1, 0, 0, 0, 1, 0, 0, 0, 1}); err != nil {
		t.Fatal(err)
	}
	loss := func(env *nn.Env, in []*graph.Node) *graph.Node {
		return graph.ReduceAllSum(graph.Mul(n.Lower(env, map[string]*graph.Node{"x": in[0]})[0], in[1]))
	}
	return n, loss, func(step uint64) []*tensors.Tensor {
		out := []*tensors.Tensor{}
		for i := range uint64(2) {
			out = append(out, tensors.FromFlatDataAndDimensions(nn.Floats(draw(2*step+i, 1, 8, 3)), 8, 3))
		}
		return out
	}
}

func train(t *testing.T, n *nn.Network, loss learn.LossFunc, batch func(uint64) []*tensors.Tensor, steps int, hook learn.Hook) {
	t.Helper()
	tr, err := learn.NewTrainer(enginetest.Backend(), &n.Params, loss, learn.Options{LR: 1e-30})
	if err != nil {
		t.Fatal(err)
	}
	defer tr.Finalize()
	for i := range steps {
		info, err := tr.Step(batch(uint64(i))...)
		if err != nil {
			t.Fatal(err)
		}
		if err := hook(tr, info); err != nil {
			t.Fatal(err)
		}
	}
}

func l2(v []float64) float64 {
	s := 0.
	for _, x := range v {
		s += x * x
	}
	return math.Sqrt(s)
}

// The recorded figures of batch norm are those computed by hand, and the training is the one without a recorder.
func TestStatRecorderOfBatchNorm(t *testing.T) {
	const steps = 3
	n, loss, batch := statNet(t, nn.BatchNorm{Biased: true})
	plain, plainLoss, _ := statNet(t, nn.BatchNorm{Biased: true})
	r := norm.NewStatRecorder("norm")
	restore, err := r.Watch(n)
	if err != nil {
		t.Fatal(err)
	}
	train(t, n, loss, batch, steps, r.Hook)
	restore()
	train(t, plain, plainLoss, batch, steps, func(*learn.Trainer, learn.Info) error { return nil })
	if n.Params.Len() != plain.Params.Len() || n.Node("norm").Op != nn.Op(nn.BatchNorm{Biased: true}) || len(n.Node("norm").P) != 4 {
		t.Errorf("restore left something behind: %v", n.Node("norm"))
	}
	for p := range plain.Params.All() {
		if !slices.Equal(p.Data(), n.Params.Get(p.Name).Data()) {
			t.Errorf("watching changed %s", p.Name)
		}
	}
	mean, variance := make([]float64, 3), []float64{1, 1, 1}
	gmean, gscale, before := make([]float64, 3), make([]float64, 3), make([]float64, 3)
	points := r.Points("norm")
	if len(points) != steps || !slices.Equal(r.Layers(), []string{"norm"}) {
		t.Fatalf("%d points of %v", len(points), r.Layers())
	}
	for i, p := range points {
		in := batch(uint64(i))
		x, dy := nn.Float64s(in[0]), nn.Float64s(in[1])
		m, v, gm, gs := make([]float64, 3), make([]float64, 3), make([]float64, 3), make([]float64, 3)
		for j := range x {
			m[j%3] += x[j] / 8
		}
		for j := range x {
			v[j%3] += (x[j] - m[j%3]) * (x[j] - m[j%3]) / 8
		}
		for j := range x {
			gm[j%3] += dy[j] / 8
			gs[j%3] += dy[j] * (x[j] - m[j%3]) / math.Sqrt(v[j%3]+1e-5) / 8
		}
		sub := func(a, b []float64) []float64 { return []float64{a[0] - b[0], a[1] - b[1], a[2] - b[2]} }
		near(t, "figures", []float64{p.Mean, p.Var, p.Relative, p.GradMean, p.GradScale}, []float64{
			l2(sub(m, mean)) / 3, l2(sub(v, variance)) / 3, l2(sub(v, variance)) / l2(variance), l2(sub(gm, gmean)) / 3, l2(sub(gs, gscale)) / 3,
		}, 1e-5)
		if i == 0 {
			if !math.IsNaN(p.Change) {
				t.Errorf("change at the first step is %g", p.Change)
			}
		} else {
			near(t, "change", []float64{p.Change}, []float64{l2(sub(v, before)) / l2(before)}, 1e-5)
		}
		for c := range 3 {
			mean[c], variance[c] = .9*mean[c]+.1*m[c], .9*variance[c]+.1*v[c]
			gmean[c], gscale[c] = .9*gmean[c]+.1*gm[c], .9*gscale[c]+.1*gs[c]
		}
		before = v
	}
	if got := r.Median(func(p norm.StatPoint) float64 { return p.Var }, 2, 2); got != points[1].Var {
		t.Errorf("median of one point is %g, want %g", got, points[1].Var)
	}
	if got := r.Median(func(p norm.StatPoint) float64 { return p.Var }, 10, 20); !math.IsNaN(got) {
		t.Errorf("median of no points is %g", got)
	}
}

// What PowerNorm applies after the warm-up is the running statistic, which moves by a tenth of the batch's distance.
func TestStatRecorderOfPowerNorm(t *testing.T) {
	n, loss, batch := statNet(t, norm.PowerNorm{NoWarmup: true, NoGroupScaling: true})
	r := norm.NewStatRecorder()
	restore, err := r.Watch(n)
	if err != nil {
		t.Fatal(err)
	}
	defer restore()
	train(t, n, loss, batch, 6, r.Hook)
	points := r.Points("norm")
	for i := 1; i < 6; i++ {
		near(t, "change", []float64{points[i].Change}, []float64{.1 * points[i-1].Relative}, 1e-5)
		if points[i].Mean != 0 || !(points[i].GradScale > 0) {
			t.Errorf("step %d: %+v", i, points[i])
		}
	}
}

func TestStatRecorderRefusals(t *testing.T) {
	none, _, _ := statNet(t, nn.LayerNorm{})
	if _, err := norm.NewStatRecorder().Watch(none); err == nil {
		t.Error("a network without running statistics was accepted")
	}
	n, loss, batch := statNet(t, nn.BatchNorm{})
	params := n.Params.Len()
	if _, err := norm.NewStatRecorder("norm", "scale").Watch(n); err == nil || n.Params.Len() != params || n.Node("norm").Op != nn.Op(nn.BatchNorm{}) {
		t.Errorf("a name that is no norm was accepted, or left something behind: %v", err)
	}
	r := norm.NewStatRecorder()
	restore, err := r.Watch(n)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := norm.NewStatRecorder().Watch(n); err == nil {
		t.Error("a network was watched twice")
	}
	restore()
	tr, err := learn.NewTrainer(enginetest.Backend(), &n.Params, loss, learn.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer tr.Finalize()
	info, err := tr.Step(batch(0)...)
	if err != nil {
		t.Fatal(err)
	}
	if r.Hook(tr, info) == nil {
		t.Error("a step that reports nothing was accepted")
	}
}

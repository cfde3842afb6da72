package quant

import (
	"context"
	"fmt"
	"math"

	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	method "github.com/lathe-ml/lathe/compress/quant"
	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/lab"
	"github.com/lathe-ml/lathe/lab/exp/recipe"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/learn/optim"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// ofqRecipe says how the float network and its low-bit versions are trained.
type ofqRecipe struct {
	Network zoo.ViTOptions
	Images  recipe.Images // the float network's training
	Steps   int           // of quantisation-aware training
	Batch   int
	LR      float64
	Warmup  int
	Tail    int // steps of the tail
	TailLR  float64
	Every   int // steps of the tail between two looks at TailTest test images
	Curve   int // test images that the tail's curve is measured on
}

func ofqAt(s lab.Scale) ofqRecipe {
	r := ofqRecipe{
		Network: zoo.ViTOptions{Dim: 32, Depth: 3, Heads: 2, MLP: 64},
		Images:  recipe.Images{TrainN: 60_000, TestN: 10_000, Loop: recipe.Loop{Batch: 128, Steps: 1500, Warmup: 100, LR: 2e-3, Decay: .05}},
		Steps:   600, Batch: 64, LR: 1e-3, Warmup: 50, Tail: 150, TailLR: 1e-4, Every: 5, Curve: 2000,
	}
	if s == lab.Smoke {
		r.Network.Depth = 1
		r.Images.TrainN, r.Images.TestN = 1000, 200
		r.Images.Loop.Steps, r.Images.Loop.Warmup, r.Images.Loop.Batch = 40, 4, 64
		r.Steps, r.Batch, r.Warmup, r.Tail, r.Curve = 40, 32, 4, 10, 100
	}
	return r
}

// build makes the untrained network. Its weights begin uniform in ±1/√inputs, as PyTorch's layers do: few levels serve
// such weights better than normal ones.
func (r ofqRecipe) build() (*nn.Network, error) {
	net, err := zoo.ViT(r.Network)
	if err != nil {
		return nil, err
	}
	for _, n := range net.Sites() {
		p := net.Param(n, "w")
		w := p.Data()
		bound := 1 / math.Sqrt(float64(len(w)/p.Value.Shape().Dimensions[0]))
		rng.Uniform(rng.New(r.Network.Seed, "ofq-vit:"+n.Name), w, -bound, bound)
		if err := p.SetData(w); err != nil {
			return nil, err
		}
	}
	return net, nil
}

const (
	ofqBits     = 2
	ofqBoundary = .005
)

// OFQ compares ways to train 2-bit weights: scales that are learnt, fixed or statistical, and query and key weights
// quantised apart or as a product; with float activations (w2) and 4-bit ones (w2a4). The tails go on from the
// statistical model of w2, plainly and with confidence-guided annealing.
var OFQ = lab.Experiment{
	Method: "ofq",
	Title:  "Quantisation-aware training of a vision transformer on Fashion-MNIST: 2-bit weights, the float network as teacher",
	Arms:   ofqArms(),
	Recipe: []ofqRecipe{ofqAt(lab.Smoke), ofqAt(lab.Full)},
	Claims: []lab.Claim{
		{
			ID: "C1", Text: "final accuracy, 2-bit weights: statistical minus learnt scales", Paper: "statistical scales are better at every low bit-width", Unit: "points",
			Measure: func(m lab.Metrics) float64 {
				return m.Get("statistical-w2", "accuracy") - m.Get("learned-w2", "accuracy")
			}, Bound: lab.AtLeast(-.2),
		},
		{
			ID: "C2", Text: "accuracy after the tail: annealed minus plain", Paper: "annealing improves the final model", Unit: "points",
			Measure: func(m lab.Metrics) float64 {
				return m.Get("tail-annealed", "accuracy") - m.Get("tail-plain", "accuracy")
			}, Bound: lab.AtLeast(-.1),
		},
		{
			ID: "C3", Text: "share of weights that oscillate at the end of the tail: annealed over plain", Unit: "×",
			Measure: func(m lab.Metrics) float64 {
				return m.Get("tail-annealed", "oscillating weights") / m.Get("tail-plain", "oscillating weights")
			},
			Bound: lab.AtMost(.7),
		},
		{
			ID: "C4", Text: "error of the query-key product at 2 bits, mean over layers of the float network: quantised as a product over quantised apart", Paper: "separate quantisation intertwines the errors", Unit: "×",
			Measure: func(m lab.Metrics) float64 {
				return m.Get("products", "error, product") / m.Get("products", "error, apart")
			}, Bound: lab.AtMost(1),
		},
		{
			ID: "C5", Text: "final accuracy, 2-bit weights: query-key product minus separate", Paper: "the product adds accuracy at 2 bits", Unit: "points",
			Measure: func(m lab.Metrics) float64 {
				return m.Get("product-w2", "accuracy") - m.Get("statistical-w2", "accuracy")
			}, Bound: lab.AtLeast(-.5),
		},
	},
}

func ofqArms() []lab.Arm {
	arms := []lab.Arm{{Name: "float", Baseline: true, Run: func(ctx context.Context, t *lab.Trial) error {
		b, err := newOFQBench(ctx, t)
		if err != nil {
			return err
		}
		return b.record(ctx, t, b.net)
	}}, {Name: "products", Run: ofqProducts}}
	for _, act := range []int{32, 4} {
		for _, v := range []struct {
			name string
			q    method.OFQ
		}{
			{"learned", method.OFQ{Weights: method.LearnedScale}},
			{"fixed", method.OFQ{Weights: method.FixedScale}},
			{"statistical", method.OFQ{NoQueryKey: true}},
			{"product", method.OFQ{}},
		} {
			v.q.ActBits = act
			name := v.name + "-w2"
			if act != 32 {
				name += fmt.Sprintf("a%d", act)
			}
			arms = append(arms, lab.Arm{Name: name, Baseline: v.q.Weights != "", Run: func(ctx context.Context, t *lab.Trial) error { return ofqArm(ctx, t, v.q) }})
		}
	}
	for _, annealed := range []bool{false, true} {
		name := "tail-plain"
		if annealed {
			name = "tail-annealed"
		}
		arms = append(arms, lab.Arm{Name: name, Baseline: !annealed, Run: func(ctx context.Context, t *lab.Trial) error { return ofqTail(ctx, t, annealed) }})
	}
	return arms
}

// ofqBench is what all arms of one seed share.
type ofqBench struct {
	ofqRecipe
	net         *nn.Network
	train, test compress.Examples
	classes     []int // of the training images
	labels      []int // of the test images
}

func newOFQBench(ctx context.Context, t *lab.Trial) (*ofqBench, error) {
	v, err := t.Shared("ofq", func() (any, error) {
		r := ofqAt(t.Scale)
		s, err := r.Images.Sets(ctx, t)
		if err != nil {
			return nil, err
		}
		b := &ofqBench{ofqRecipe: r}
		r.Network.Seed = t.Seed
		b.net, err = t.Network(struct {
			Network, Init string
			Options       zoo.ViTOptions
			Images        recipe.Images
		}{"ofq-vit", "uniform", r.Network, r.Images}, r.build,
			func(net *nn.Network) error { return r.Images.Train(ctx, t, net, s) })
		if err != nil {
			return nil, err
		}
		x, err := s.Train.Float32(nil)
		if err != nil {
			return nil, err
		}
		y, err := s.Test.Float32(nil)
		if err != nil {
			return nil, err
		}
		b.train, b.test = compress.Examples{x}, compress.Examples{y}
		for _, l := range s.Train.Labels {
			b.classes = append(b.classes, int(l))
		}
		for _, l := range s.Test.Labels {
			b.labels = append(b.labels, int(l))
		}
		return b, nil
	})
	if err != nil {
		return nil, err
	}
	return v.(*ofqBench), nil
}

// record keeps the accuracy in percent and the stored size of a network.
func (b *ofqBench) record(ctx context.Context, t *lab.Trial, net *nn.Network) error {
	acc, err := b.accuracy(ctx, t, net)
	if err != nil {
		return err
	}
	t.Record("accuracy", acc)
	t.Record("bytes", float64(compress.Size(net)))
	return nil
}

func (b *ofqBench) accuracy(ctx context.Context, t *lab.Trial, net *nn.Network) (float64, error) {
	logits, width, err := compress.Evaluate(ctx, t.Backend, net, b.test, evalBatch)
	if err != nil {
		return 0, err
	}
	acc, err := compress.Accuracy(logits, width, b.labels)
	return 100 * acc, err
}

// ofqRun is a network in training and what is followed of it.
type ofqRun struct {
	*method.OFQNetwork
	start float64 // accuracy before the first step
	seen  method.OscillationTracker
}

// watch follows the codes of the network's block weights from now on, and calls each after every step.
func (r *ofqRun) watch(each func(step int) error) error {
	codes, err := method.LatentCodes(r.Student, func(n *nn.Node) bool { return n.Name != "patch" && n.Name != "head" })
	if err != nil {
		return err
	}
	follow := func() error {
		k, err := codes()
		if err != nil {
			return err
		}
		return r.seen.Update(k)
	}
	r.Settings.After = []learn.Hook{func(_ *learn.Trainer, i learn.Info) error {
		if err := follow(); err != nil {
			return err
		}
		if each != nil {
			return each(i.Step)
		}
		return nil
	}}
	return follow()
}

// record keeps what was measured of a run, and stores its weights.
func (b *ofqBench) recordRun(ctx context.Context, t *lab.Trial, r *ofqRun) error {
	t.Record("accuracy before training", r.start)
	t.Record("oscillating weights", 100*r.seen.Share(.005))
	t.Record("oscillations", float64(r.seen.Total()))
	t.Record("flips per step", 100*r.seen.FlipRate())
	net := r.Student.Clone()
	if err := method.Settle(net); err != nil {
		return err
	}
	return b.record(ctx, t, net)
}

// trained prepares a network and trains it; the order of the images is that of the seed.
func (b *ofqBench) trained(ctx context.Context, t *lab.Trial, q method.OFQ) (*ofqRun, error) {
	q.WeightBits, q.Boundary = ofqBits, ofqBoundary
	q.Options = compress.Options{Seed: t.Seed, Progress: func(s compress.Step) { t.Progress(s.Done, s.Total) }}
	q.QAT = method.QAT{Labels: b.classes, Steps: b.Steps, Batch: b.Batch, LR: b.LR, Warmup: b.Warmup}
	q.AnnealSteps, q.AnnealLR = b.Tail, b.TailLR
	p, err := q.Prepare(ctx, t.Backend, b.net, b.train)
	if err != nil {
		return nil, err
	}
	r := &ofqRun{OFQNetwork: p}
	if r.start, err = b.accuracy(ctx, t, r.Student); err != nil {
		return nil, err
	}
	if err := r.watch(nil); err != nil {
		return nil, err
	}
	_, err = r.Train(ctx, t.Backend, b.train)
	return r, err
}

// separate is the run with statistical scales and float activations, which the tails share.
func (b *ofqBench) separate(ctx context.Context, t *lab.Trial) (*ofqRun, error) {
	v, err := t.Shared("ofq statistical", func() (any, error) { return b.trained(ctx, t, method.OFQ{NoQueryKey: true, ActBits: 32}) })
	if err != nil {
		return nil, err
	}
	return v.(*ofqRun), nil
}

func ofqArm(ctx context.Context, t *lab.Trial, q method.OFQ) error {
	b, err := newOFQBench(ctx, t)
	if err != nil {
		return err
	}
	var r *ofqRun
	if q.Weights == "" && q.NoQueryKey && q.ActBits == 32 {
		r, err = b.separate(ctx, t)
	} else {
		r, err = b.trained(ctx, t, q)
	}
	if err != nil {
		return err
	}
	return b.recordRun(ctx, t, r)
}

// ofqTail goes on from the statistical model at a constant rate.
func ofqTail(ctx context.Context, t *lab.Trial, annealed bool) error {
	b, err := newOFQBench(ctx, t)
	if err != nil {
		return err
	}
	base, err := b.separate(ctx, t)
	if err != nil {
		return err
	}
	p := *base.OFQNetwork
	p.Student = base.Student.Clone()
	r := &ofqRun{OFQNetwork: &p}
	if r.start, err = b.accuracy(ctx, t, r.Student); err != nil {
		return err
	}
	few, err := b.test.Slice(0, min(b.Curve, b.test.Len()), 0)
	if err != nil {
		return err
	}
	eval, err := compress.NewEvaluator(t.Backend, r.Student, evalBatch)
	if err != nil {
		return err
	}
	defer eval.Close()
	look := func(step int) error {
		if step%b.Every != 0 {
			return nil
		}
		logits, width, err := eval.Outputs(ctx, few)
		if err != nil {
			return err
		}
		acc, err := compress.Accuracy(logits, width, b.labels[:few.Len()])
		t.Series("accuracy", float64(step), 100*acc)
		t.Series("oscillating weights", float64(step), 100*r.seen.Share(.005))
		return err
	}
	if err := r.watch(look); err != nil {
		return err
	}
	if annealed {
		_, err = r.Anneal(ctx, t.Backend, b.train)
	} else {
		_, err = r.Settings.QAT.Train(ctx, t.Backend, r.Student, r.Reference, b.train, r.Settings.Options, method.Phase{
			Name: "tail", Seed: t.Seed, First: b.Steps, Steps: b.Tail, LR: b.TailLR, Schedule: optim.Constant(),
		})
	}
	if err != nil {
		return err
	}
	return b.recordRun(ctx, t, r)
}

// ofqProducts measures ‖P_q − P‖/‖P‖ of every layer's product P of query and key weights, quantised as one and as the
// product of two quantised weights.
func ofqProducts(ctx context.Context, t *lab.Trial) error {
	b, err := newOFQBench(ctx, t)
	if err != nil {
		return err
	}
	heads := b.Network.Heads
	e, err := engine.NewExec(t.Backend, func(in []*graph.Node) []*graph.Node {
		p := method.QueryKey(in[0], in[1], heads)
		one, _ := method.StatsQ(p, ofqBits)
		q, _ := method.StatsQ(in[0], ofqBits)
		k, _ := method.StatsQ(in[1], ofqBits)
		norm := func(x *graph.Node) *graph.Node { return graph.Sqrt(graph.ReduceAllSum(graph.Mul(x, x))) }
		size := norm(p)
		return []*graph.Node{graph.Div(norm(graph.Sub(one, p)), size), graph.Div(norm(graph.Sub(method.QueryKey(q, k, heads), p)), size)}
	})
	if err != nil {
		return err
	}
	defer e.Finalize()
	var product, apart float64
	for i := range b.Network.Depth {
		weight := func(name string) *tensors.Tensor {
			return b.net.Params.Get(fmt.Sprintf("blk.%d.attn.%s.w", i, name)).Value
		}
		out, err := e.Call(weight("q"), weight("k"))
		if err != nil {
			return err
		}
		p, a := float64(nn.Floats(out[0])[0]), float64(nn.Floats(out[1])[0])
		t.Record(fmt.Sprintf("layer %d: product", i), p)
		t.Record(fmt.Sprintf("layer %d: apart", i), a)
		product += p / float64(b.Network.Depth)
		apart += a / float64(b.Network.Depth)
	}
	t.Record("error, product", product)
	t.Record("error, apart", apart)
	return nil
}

package norm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/gomlx/compute"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/internal/stat"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/learn/optim"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// ProxyData are the images on which layers are judged; both are standardised by the training images' moments.
type ProxyData struct{ Train, Validation *data.Images }

// ProxyOptions say how layers are judged. The zero value is the paper's protocol, with its lengths.
type ProxyOptions struct {
	Layer EvoOptions // groups, ε and decay of the layers; Linear and ZeroGain must be false

	Batch  int     // 0: 128
	LR     float64 // of SGD with Nesterov momentum 0.9 and weight decay 1e-4; 0: 0.1
	Cosine bool    // the rate falls along a cosine (the paper's S search) instead of staying (B)
	Steps  int     // of the training whose validation accuracies are the scores; 0: 2000

	QualitySteps int     // after which the quality is tested; at most Steps; 0: 100
	MinAccuracy  float64 // below which a layer is rejected; 0: 2/classes, or with two classes 0.75

	StabilitySteps int     // 0: 100
	StabilityBatch int     // 0: 16
	MaxGradient    float64 // gradient norm above which a layer is rejected; 0: 1e8
	StabilityRate  float64 // length of a step as a share of the weights' norm; 0: 0.05 (the paper does not say)
	// FiniteDifference takes the Hessian-vector product from two gradients instead of differentiating twice.
	FiniteDifference bool

	Timeout time.Duration // for one layer, looked at between steps; 0: 2 min
	Seed    uint64        // of initial weights and the order of the images
}

func (o ProxyOptions) withDefaults() ProxyOptions {
	o.Batch = cmp.Or(o.Batch, 128)
	o.LR = cmp.Or(o.LR, .1)
	o.Steps = cmp.Or(o.Steps, 2000)
	o.QualitySteps = min(cmp.Or(o.QualitySteps, 100), o.Steps)
	o.StabilitySteps = cmp.Or(o.StabilitySteps, 100)
	o.StabilityBatch = cmp.Or(o.StabilityBatch, 16)
	o.MaxGradient = cmp.Or(o.MaxGradient, 1e8)
	o.StabilityRate = cmp.Or(o.StabilityRate, .05)
	o.Timeout = cmp.Or(o.Timeout, 2*time.Minute)
	return o
}

// Proxy judges layers on the same networks, images, order and initial weights. It may be used from several goroutines.
type Proxy struct {
	o          ProxyOptions
	b          compute.Backend
	archs      []Arch
	classes    int
	batches    [][]*tensors.Tensor // by step, cyclic
	validation [][]*tensors.Tensor
	weights    []float64 // of the validation batches
	stability  []*tensors.Tensor
}

// NewProxy prepares the images. It refuses no architecture, images of differing shape, fewer images than a batch, and
// options outside their ranges.
func NewProxy(b compute.Backend, archs []Arch, d ProxyData, o ProxyOptions) (*Proxy, error) {
	o = o.withDefaults()
	switch {
	case len(archs) == 0:
		return nil, errors.New("norm: a search needs at least one architecture")
	case d.Train == nil || d.Validation == nil || d.Validation.N == 0:
		return nil, errors.New("norm: a search needs training and validation images")
	case d.Train.H != d.Validation.H || d.Train.W != d.Validation.W || d.Train.C != d.Validation.C || d.Train.Classes() != d.Validation.Classes():
		return nil, fmt.Errorf("norm: training images are %d×%d×%d of %d classes, validation images %d×%d×%d of %d", d.Train.H, d.Train.W, d.Train.C, d.Train.Classes(), d.Validation.H, d.Validation.W, d.Validation.C, d.Validation.Classes())
	case d.Train.Classes() < 2:
		return nil, fmt.Errorf("norm: the images have %d classes; want at least 2", d.Train.Classes())
	case o.Batch < 1 || o.StabilityBatch < 1 || d.Train.N < max(o.Batch, o.StabilityBatch):
		return nil, fmt.Errorf("norm: batches of %d and %d of %d training images", o.Batch, o.StabilityBatch, d.Train.N)
	case o.Steps < 1 || o.QualitySteps < 1 || o.StabilitySteps < 1:
		return nil, fmt.Errorf("norm: %d steps, %d of them before the quality test, %d of the stability test: want at least 1", o.Steps, o.QualitySteps, o.StabilitySteps)
	case !(o.LR > 0) || !(o.MaxGradient > 0) || !(o.StabilityRate > 0) || !(o.MinAccuracy >= 0 && o.MinAccuracy < 1) || o.Timeout < 0:
		return nil, fmt.Errorf("norm: rate %g, largest gradient %g, step %g, least accuracy %g, timeout %v: want positive numbers and an accuracy below 1", o.LR, o.MaxGradient, o.StabilityRate, o.MinAccuracy, o.Timeout)
	case o.Layer.Linear || o.Layer.ZeroGain:
		return nil, errors.New("norm: the layers of a search are not linear; leave Linear and ZeroGain false")
	}
	if err := o.Layer.check(); err != nil {
		return nil, fmt.Errorf("norm: %w", err)
	}
	if o.MinAccuracy == 0 {
		o.MinAccuracy = min(2/float64(d.Train.Classes()), (1+1/float64(d.Train.Classes()))/2)
	}
	p := &Proxy{o: o, b: b, archs: archs, classes: d.Train.Classes()}
	mean, std := d.Train.Moments()
	pick := func(m *data.Images, idx []int) ([]*tensors.Tensor, error) {
		x := m.Floats(idx, nil)
		for i := range x {
			x[i] = (x[i] - mean) / std
		}
		labels, err := m.LabelsTensor(idx)
		return []*tensors.Tensor{tensors.FromFlatDataAndDimensions(x, len(idx), m.H, m.W, m.C), labels}, err
	}
	order, err := data.NewBatcher(d.Train.N, o.Batch, o.Seed)
	if err != nil {
		return nil, err
	}
	for step := range min(o.Steps, 4096) {
		batch, err := pick(d.Train, order.At(step))
		if err != nil {
			return nil, err
		}
		p.batches = append(p.batches, batch)
	}
	for idx := range data.Batches(d.Validation.N, 1000) {
		batch, err := pick(d.Validation, idx)
		if err != nil {
			return nil, err
		}
		p.validation, p.weights = append(p.validation, batch), append(p.weights, float64(len(idx)))
	}
	p.stability, err = pick(d.Train, rng.New(o.Seed, "stability").Perm(d.Train.N)[:o.StabilityBatch])
	return p, err
}

// Archs are the names of the architectures, in the order of the scores.
func (p *Proxy) Archs() (names []string) {
	for _, a := range p.archs {
		names = append(names, a.Name)
	}
	return names
}

// The verdicts on a layer.
const (
	Accepted    = "accepted"
	ByStatic    = "static"    // rejected: the output does not depend on x
	ByQuality   = "quality"   // rejected: too little accuracy after the first steps
	ByStability = "stability" // rejected: an adversary drives the gradient beyond the limit
	ByNaN       = "nan"       // rejected: the loss is no longer finite
	ByTimeout   = "timeout"   // rejected: took too long
	ByError     = "error"     // rejected: could not be built or run
)

// Judgement is what a Proxy found about a layer.
type Judgement struct {
	Verdict string    `json:"verdict"`
	Reason  string    `json:"reason,omitempty"` // of a rejection
	Scores  []float64 `json:"scores,omitempty"` // validation accuracy in [0, 1] by architecture, as far as it got
	// Peak is the largest gradient norm that the stability test met, Iterations how many steps it made; 0: it was not made.
	Peak       float64 `json:"peak,omitempty"`
	Iterations int     `json:"iterations,omitempty"`
}

// Mean is the mean score.
func (j Judgement) Mean() float64 { return stat.Mean(j.Scores) }

var errTimeout = errors.New("took too long")

// rejection turns what went wrong with a candidate into a verdict; an ended ctx is the caller's error.
func rejection(ctx context.Context, j Judgement, err error) (Judgement, error) {
	if ctx.Err() != nil {
		return j, ctx.Err()
	}
	j.Reason = err.Error()
	switch {
	case errors.Is(err, errTimeout):
		j.Verdict = ByTimeout
	case errors.Is(err, learn.ErrDiverged):
		j.Verdict = ByNaN
	default:
		j.Verdict = ByError
	}
	return j, nil
}

// Judge takes a layer through the whole protocol (arXiv:2004.02967, section 3.3): the quality test on every architecture,
// the stability test on the first, and the training whose accuracies are the scores. Whatever goes wrong with the layer is
// a rejection; an error is ctx's.
func (p *Proxy) Judge(ctx context.Context, layer zoo.NormAct) (Judgement, error) {
	deadline := time.Now().Add(p.o.Timeout)
	j, nets, err := p.quality(ctx, layer, deadline)
	defer func() {
		for _, t := range nets {
			t.trainer.Finalize()
		}
	}()
	if err != nil || j.Verdict != Accepted {
		return j, err
	}
	norms, err := p.ascend(ctx, layer, deadline)
	if len(norms) > 0 {
		j.Peak, j.Iterations = finitePeak(norms), len(norms)
	}
	switch {
	case errors.Is(err, errUnstable):
		j.Verdict, j.Reason = ByStability, err.Error()
		return j, nil
	case err != nil:
		return rejection(ctx, j, err)
	}
	if p.o.Steps > p.o.QualitySteps {
		for i, t := range nets {
			if j.Scores[i], err = p.train(ctx, t, p.o.Steps, deadline); err != nil {
				return rejection(ctx, j, err)
			}
		}
	}
	return j, nil
}

// finitePeak is the largest gradient norm; one that is not finite, which JSON cannot hold, counts as the largest number.
func finitePeak(norms []float64) (peak float64) {
	for _, v := range norms {
		if math.IsNaN(v) || v > math.MaxFloat32 {
			v = math.MaxFloat32
		}
		peak = max(peak, v)
	}
	return peak
}

// Train trains every architecture for all steps, without tests, and returns the validation accuracies: for the layers
// that the found ones are compared with. An architecture whose loss is not finite scores 0.
func (p *Proxy) Train(ctx context.Context, layer zoo.NormAct) ([]float64, error) {
	scores := make([]float64, len(p.archs))
	for i, a := range p.archs {
		t, err := p.start(a, layer)
		if err != nil {
			return nil, err
		}
		scores[i], err = p.train(ctx, t, p.o.Steps, time.Time{})
		t.trainer.Finalize()
		if err != nil && !errors.Is(err, learn.ErrDiverged) {
			return nil, err
		}
	}
	return scores, nil
}

// Quality is the quality test alone.
func (p *Proxy) Quality(ctx context.Context, layer zoo.NormAct) (Judgement, error) {
	j, nets, err := p.quality(ctx, layer, time.Now().Add(p.o.Timeout))
	for _, t := range nets {
		t.trainer.Finalize()
	}
	return j, err
}

// Stability is the stability test alone: whether the layer is rejected, and the gradient norms of its steps.
func (p *Proxy) Stability(ctx context.Context, layer zoo.NormAct) (rejected bool, norms []float64, err error) {
	norms, err = p.ascend(ctx, layer, time.Now().Add(p.o.Timeout))
	if errors.Is(err, errUnstable) {
		return true, norms, nil
	}
	if err != nil && ctx.Err() == nil {
		return true, norms, nil
	}
	return false, norms, err
}

// RejectQuality is Proxy.Quality for a single layer.
func RejectQuality(ctx context.Context, b compute.Backend, l LayerGraph, archs []Arch, d ProxyData, o ProxyOptions) (rejected bool, report Judgement, err error) {
	p, err := NewProxy(b, archs, d, o)
	if err != nil {
		return false, report, err
	}
	n, err := l.Build(o.Layer)
	if err != nil {
		return true, Judgement{Verdict: ByStatic, Reason: err.Error()}, nil
	}
	report, err = p.Quality(ctx, zoo.NormAct{Norm: n})
	return report.Verdict != Accepted, report, err
}

// RejectStability is Proxy.Stability for a single layer.
func RejectStability(ctx context.Context, b compute.Backend, l LayerGraph, arch Arch, d ProxyData, o ProxyOptions) (rejected bool, norms []float64, err error) {
	p, err := NewProxy(b, []Arch{arch}, d, o)
	if err != nil {
		return false, nil, err
	}
	n, err := l.Build(o.Layer)
	if err != nil {
		return true, nil, nil
	}
	return p.Stability(ctx, zoo.NormAct{Norm: n})
}

// proxyNet is one network in training.
type proxyNet struct {
	net     *nn.Network
	trainer *learn.Trainer
}

// start builds an architecture with a layer; its training step is compiled at the first step and reused.
func (p *Proxy) start(a Arch, layer zoo.NormAct) (*proxyNet, error) {
	net, err := a.Build(layer, p.o.Seed)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", a.Name, err)
	}
	schedule := optim.Constant()
	if p.o.Cosine {
		schedule = optim.Cosine(p.o.Steps, 0, 0)
	}
	tr, err := learn.NewTrainer(p.b, &net.Params, learn.Classifier(net), learn.Options{
		Optimizer: optim.SGD{Momentum: .9, Nesterov: true, Decay: 1e-4}, LR: p.o.LR, Schedule: schedule, Seed: p.o.Seed,
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", a.Name, err)
	}
	return &proxyNet{net, tr}, nil
}

// train goes on to so many steps in all and returns the validation accuracy.
func (p *Proxy) train(ctx context.Context, t *proxyNet, steps int, deadline time.Time) (float64, error) {
	for t.trainer.Steps() < steps {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		if !deadline.IsZero() && time.Now().After(deadline) {
			return 0, errTimeout
		}
		step := t.trainer.Steps()
		info, err := t.trainer.Step(p.batches[step%len(p.batches)]...)
		if err != nil {
			return 0, err
		}
		if math.IsNaN(info.Loss) || math.IsInf(info.Loss, 0) {
			return 0, fmt.Errorf("step %d: %w", step+1, learn.ErrDiverged)
		}
	}
	loss, metrics, err := learn.Evaluate(p.b, &t.net.Params, learn.Classifier(t.net), func(yield func(float64, []*tensors.Tensor) bool) {
		for i, batch := range p.validation {
			if !yield(p.weights[i], batch) {
				return
			}
		}
	})
	if err != nil {
		return 0, err
	}
	if math.IsNaN(loss) || math.IsInf(loss, 0) {
		return 0, fmt.Errorf("validation: %w", learn.ErrDiverged)
	}
	return metrics["accuracy"], nil
}

// quality trains every architecture for QualitySteps and rejects at the first that does not learn. The caller finalizes
// the trainers, with which an accepted layer goes on.
func (p *Proxy) quality(ctx context.Context, layer zoo.NormAct, deadline time.Time) (j Judgement, nets []*proxyNet, err error) {
	for _, a := range p.archs {
		t, err := p.start(a, layer)
		if err != nil {
			j, err = rejection(ctx, j, err)
			return j, nets, err
		}
		nets = append(nets, t)
		accuracy, err := p.train(ctx, t, p.o.QualitySteps, deadline)
		if err != nil {
			j, err = rejection(ctx, j, fmt.Errorf("%s: %w", a.Name, err))
			return j, nets, err
		}
		j.Scores = append(j.Scores, accuracy)
		if accuracy < p.o.MinAccuracy {
			j.Verdict = ByQuality
			j.Reason = fmt.Sprintf("%s: accuracy %.3f after %d steps, want %.3f", a.Name, accuracy, p.o.QualitySteps, p.o.MinAccuracy)
			return j, nets, nil
		}
	}
	j.Verdict = Accepted
	return j, nets, nil
}

var errUnstable = errors.New("the gradient norm passes the limit")

// ascend is the stability test: from the initial weights of the first architecture's convolutions θ, on one batch, it
// climbs g(θ) = ‖∂ℓ/∂θ‖ by steps of length StabilityRate·‖θ‖ along ∇g. The error is errUnstable when g passes the limit or
// is not finite. ∇g is H·u with u = ∇ℓ/‖∇ℓ‖, from differentiating twice or from (∇ℓ(θ+hu) − ∇ℓ(θ))/h with h = 1e-3·‖θ‖.
func (p *Proxy) ascend(ctx context.Context, layer zoo.NormAct, deadline time.Time) (norms []float64, err error) {
	net, err := p.archs[0].Build(layer, p.o.Seed)
	if err != nil {
		return nil, err
	}
	var names, rest []string // θ, and what stays
	conv := map[string]bool{}
	for _, x := range net.Nodes {
		if _, ok := x.Op.(nn.Conv); ok {
			conv[x.P["w"]] = true
		}
	}
	for q := range net.Params.All() {
		if conv[q.Name] {
			names = append(names, q.Name)
		} else {
			rest = append(rest, q.Name)
		}
	}
	if len(names) == 0 {
		return nil, errors.New("the network has no convolution")
	}
	exec, err := engine.NewExec(p.b, func(in []*graph.Node) []*graph.Node {
		return p.ascent(net, names, rest, in)
	})
	if err != nil {
		return nil, err
	}
	defer exec.Finalize()
	var theta []*tensors.Tensor
	for _, name := range names {
		theta = append(theta, net.Params.Get(name).Value)
	}
	for range p.o.StabilitySteps {
		if err := ctx.Err(); err != nil {
			return norms, err
		}
		if time.Now().After(deadline) {
			return norms, errTimeout
		}
		var args []any
		for _, v := range theta {
			args = append(args, v)
		}
		for _, name := range rest {
			args = append(args, net.Params.Get(name).Value)
		}
		out, err := exec.Call(append(args, p.stability[0], p.stability[1])...)
		if err != nil {
			return norms, err
		}
		g, slope := nn.Float64s(out[len(names)])[0], nn.Float64s(out[len(names)+1])[0]
		norms = append(norms, g)
		if math.IsNaN(g) || g > p.o.MaxGradient {
			return norms, fmt.Errorf("%w: %.3g after %d of %d steps", errUnstable, g, len(norms), p.o.StabilitySteps)
		}
		if slope == 0 || math.IsNaN(slope) || math.IsInf(slope, 0) {
			break // nothing to climb
		}
		theta = out[:len(names)]
	}
	return norms, nil
}

// ascent is one step of the stability test as a graph: the next θ, g and ‖∇g‖.
func (p *Proxy) ascent(net *nn.Network, names, rest []string, in []*graph.Node) []*graph.Node {
	g := in[0].Graph()
	theta, others, batch := in[:len(names)], in[len(names):len(names)+len(rest)], in[len(names)+len(rest):]
	gradient := func(theta []*graph.Node) []*graph.Node {
		cur := map[string]*graph.Node{}
		for i, n := range names {
			cur[n] = theta[i]
		}
		for i, n := range rest {
			cur[n] = others[i]
		}
		env := &nn.Env{G: g, Training: true, SecondOrder: !p.o.FiniteDifference, Param: func(n string) *graph.Node { return cur[n] }}
		logits := net.Lower(env, map[string]*graph.Node{net.Inputs[0].Name: batch[0]})[0]
		return graph.Gradient(learn.CrossEntropy(logits, batch[1]), theta...)
	}
	length := func(v []*graph.Node) *graph.Node {
		var sum *graph.Node
		for _, x := range v {
			if s := graph.ReduceAllSum(graph.Mul(x, x)); sum == nil {
				sum = s
			} else {
				sum = graph.Add(sum, s)
			}
		}
		return graph.Sqrt(sum)
	}
	moved := func(by *graph.Node, along []*graph.Node) (out []*graph.Node) {
		for i, v := range theta {
			out = append(out, graph.Add(v, graph.Mul(along[i], by)))
		}
		return out
	}
	grads := gradient(theta)
	norm, size := length(grads), length(theta)
	var up []*graph.Node // ∇g
	if p.o.FiniteDifference {
		h := graph.MulScalar(size, 1e-3)
		for i, v := range gradient(moved(graph.Div(h, norm), grads)) {
			up = append(up, graph.Div(graph.Sub(v, grads[i]), h))
		}
	} else {
		up = graph.Gradient(norm, theta...)
	}
	slope := length(up)
	return append(moved(graph.Div(graph.MulScalar(size, p.o.StabilityRate), slope), up), norm, slope)
}

// build is the op of a layer in this proxy.
func (p *Proxy) build(l LayerGraph) (zoo.NormAct, error) {
	n, err := l.Prune().Build(p.o.Layer)
	return zoo.NormAct{Norm: n}, err
}

// rank gives the indices of scored layers, best mean first, the older of equals.
func rank(scores [][]float64) []int {
	order := data.Range(len(scores))
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(stat.Mean(scores[b]), stat.Mean(scores[a])) })
	return order
}

package norm

import (
	"cmp"
	"fmt"
	"math"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"

	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/onnx"
)

// PowerNorm scales every channel by a running quadratic mean over tokens instead of the batch's own statistics, in the
// forward and in the backward pass (Shen et al., arXiv:2003.07845, algorithm 2). With x [..., d] after GroupScale, ψ² [d]
// the running quadratic mean and ν [d] the running backward statistic, one training step is
//
//	ψ_B² = mean_tokens(x²)
//	z    = x/√(ψ² + eps),  y = gain·z + bias
//	ψ²   = AlphaForward·ψ² + (1 − AlphaForward)·ψ_B²
//	a    = gain·dy − ν·z
//	ν    = ν + (1 − AlphaBackward)·mean_tokens(a·z)
//	dx   = a/√(s + eps)
//
// where s is ψ_B² or the ψ² of the forward pass (BackwardScale), and no gradient flows through ψ² or ν. On the first
// Warmup steps the batch's ψ_B² normalises, and ψ² is also their cumulative mean. Inference is y = gain·x/√(ψ² + eps) +
// bias after GroupScale:
//
//	x ← x/√(mean_group(x²) + 1e-5)   of each token
//
// Both passes are smooth where batch norm's statistics jump from batch to batch, as they do on text; with the running
// scale the gradient is bounded as long as 1 − (1 − AlphaBackward)·mean(z²) stays in (0, 1) (theorem 4). Inference uses
// fixed statistics, so without group scaling fold.Norms merges the norm into the linear layers around it. Prefer layer
// norm for batches of very few tokens, or where a token must not depend on others while training.
//
// The zero value is the reference code's. Parameters: gain "w", bias "b", and state "phi" (ψ², 1 at first), "nu" (ν, 0)
// and "count" (training steps done). An optional second input is a mask [...] of x's tokens, 1 (or true) where valid:
// only those enter ψ_B², while the mean over a·z takes all, as the reference does (a loss gives padding no gradient). A
// batch without a valid token keeps the statistics. Statistics are of float32 at least. It panics at build time, naming
// the value, on knobs out of range, groups that do not divide the channels, a mask of another shape, no tokens, or
// integers.
type PowerNorm struct {
	AlphaForward  float64 // weight of the old ψ², in [0, 1); 0: 0.9
	AlphaBackward float64 // weight of the old ν, in [0, 1); 0: 0.9
	ZeroForward   bool    // AlphaForward is 0 rather than its default: ψ² is the last batch's
	ZeroBackward  bool    // AlphaBackward is 0 rather than its default

	Eps float64 // inside the roots of ψ² and s, above 0; 0: 1e-5

	// Warmup is how many steps normalise by the batch's statistic; 0: 10000. Make it the learning rate's warm-up, or about a
	// tenth of the steps of a short training. NoWarmup leaves it out.
	Warmup   int
	NoWarmup bool

	// Groups is the number of groups of neighbouring channels of GroupScale, which must divide the channels; 0: 1. The
	// paper's translation models have one for each attention head. As many groups as channels leave nothing but signs.
	Groups         int
	NoGroupScaling bool // without GroupScale

	BackwardScale Scale // what the gradient is divided by; the zero value is the batch's statistic

	// BatchOnly is PN-V (section 4.1): ψ_B² normalises at every training step, with its exact gradient, and ψ² is kept for
	// inference. There is no warm-up and no ν then.
	BatchOnly bool
	// NoCorrection keeps ν at 0: dx = gain·dy/√(s + eps). It shows what the backward statistic is worth.
	NoCorrection bool

	// SkipNonFinite leaves the statistics alone on a batch whose own are infinite or not a number, and counts it in the
	// state "skipped". By default such a batch spoils them, so that training fails visibly.
	SkipNonFinite bool
}

// Scale is what a PowerNorm's gradient is divided by.
type Scale int

// The scales: the root of the batch's ψ_B², which produced the paper's released results, and that of the running ψ² of
// the forward pass, which is the paper's algorithm 2 and what its bound on the gradient is about.
const (
	BatchScale Scale = iota
	RunningScale
)

// String returns "batch" or "running".
func (s Scale) String() string {
	switch s {
	case BatchScale:
		return "batch"
	case RunningScale:
		return "running"
	}
	return fmt.Sprintf("scale(%d)", int(s))
}

var (
	_ nn.AffineNorm = PowerNorm{}
	_ onnx.Exporter = PowerNorm{}
)

// groupEps is inside GroupScale's root.
const groupEps = 1e-5

// Kind returns "powernorm".
func (PowerNorm) Kind() string { return "powernorm" }

// Epsilon is Eps with its default.
func (d PowerNorm) Epsilon() float64 { return cmp.Or(d.Eps, 1e-5) }

// WarmupSteps is Warmup with its default.
func (d PowerNorm) WarmupSteps() int {
	if d.NoWarmup {
		return 0
	}
	return cmp.Or(d.Warmup, 10_000)
}

func (d PowerNorm) alphas() (forward, backward float64) {
	forward, backward = cmp.Or(d.AlphaForward, .9), cmp.Or(d.AlphaBackward, .9)
	if d.ZeroForward {
		forward = 0
	}
	if d.ZeroBackward {
		backward = 0
	}
	return forward, backward
}

// check refuses knobs out of range and shapes that cannot be normalised.
func (d PowerNorm) check(s shapes.Shape) {
	wantTokens(s)
	forward, backward := d.alphas()
	n := s.Dimensions[s.Rank()-1]
	switch {
	case !decayOK(forward) || !decayOK(backward):
		panic(fmt.Errorf("weights of old statistics %g and %g: want [0, 1)", forward, backward))
	case !(d.Epsilon() > 0) || math.IsInf(d.Eps, 0):
		panic(fmt.Errorf("eps %g: want above 0", d.Eps))
	case d.Warmup < 0:
		panic(fmt.Errorf("warm-up of %d steps: want at least 0", d.Warmup))
	case d.Groups < 0 || n%cmp.Or(d.Groups, 1) != 0:
		panic(fmt.Errorf("%d groups do not divide %d channels", d.Groups, n))
	case d.BackwardScale != BatchScale && d.BackwardScale != RunningScale:
		panic(fmt.Errorf("backward %s: want BatchScale or RunningScale", d.BackwardScale))
	case s.Size() == 0:
		panic(fmt.Errorf("%s has no tokens to take statistics of", s))
	}
}

// Params are gain and bias per channel and the running statistics.
func (d PowerNorm) Params(in []shapes.Shape) []nn.Spec {
	d.check(in[0])
	n := in[0].Dimensions[in[0].Rank()-1]
	state := []stateSpec{{name: "phi", fill: 1, dims: []int{n}}}
	if !d.BatchOnly {
		state = append(state, stateSpec{name: "nu", dims: []int{n}}, stateSpec{name: "count"})
	}
	if d.SkipNonFinite {
		state = append(state, stateSpec{name: "skipped"})
	}
	return channelSpecs(in[0], state...)
}

// Lower normalises with the statistics of the mode.
func (d PowerNorm) Lower(c *nn.Ctx, xs []*graph.Node) []*graph.Node {
	oncePerStep(c)
	s := d.statistics(c, xs)
	var z *graph.Node
	switch {
	case !c.Training:
		z = graph.Mul(s.x, perChannel(s.root(s.phi), s.x))
	case d.BatchOnly:
		z = graph.Mul(s.x, perChannel(s.root(s.batch), s.x))
		d.updateForward(c, s)
	default:
		d.updateForward(c, s)
		z = scaled(s.x, s.root(s.applied), func(g *graph.Node) *graph.Node { return d.backward(c, s, z, g) })
	}
	if z.DType() != xs[0].DType() {
		z = graph.ConvertDType(z, xs[0].DType())
	}
	return []*graph.Node{affine(c, z)}
}

// powerStats are the statistics of one forward pass: x [..., d] after GroupScale, and ψ² [d] in its three forms.
type powerStats struct {
	x       *graph.Node
	eps     float64
	phi     *graph.Node // running, before this step's update
	batch   *graph.Node // of the valid tokens; the running one without any
	applied *graph.Node // what normalises while training
	count   *graph.Node // of this step, from 1; nil for PN-V
	keep    *graph.Node // scalar condition for an update; nil: always
	finite  *graph.Node // scalar, whether the batch's statistic is; nil: not asked for
}

func (s powerStats) root(psi2 *graph.Node) *graph.Node {
	return graph.Reciprocal(graph.Sqrt(graph.AddScalar(psi2, s.eps)))
}

// statistics computes what normalises and changes no state.
func (d PowerNorm) statistics(c *nn.Ctx, xs []*graph.Node) powerStats {
	d.check(xs[0].Shape())
	x, mask := tokens(xs)
	if x.DType().Bits() < 32 {
		x = graph.ConvertDType(x, dtypes.Float32)
		if mask != nil {
			mask = graph.ConvertDType(mask, dtypes.Float32)
		}
	}
	s := powerStats{x: d.groupScale(x), eps: d.Epsilon(), phi: exactState(c, "phi", x.DType())}
	if !c.Training {
		s.applied = s.phi
		return s
	}
	batch, some := channelMean(graph.Mul(s.x, s.x), mask)
	s.keep = some
	if d.SkipNonFinite {
		s.finite = allFinite(batch)
		s.keep = both(some, s.finite)
	}
	s.batch = when(some, batch, s.phi)
	s.applied = s.batch
	if d.BatchOnly {
		return s
	}
	s.count = graph.AddScalar(exactState(c, "count", x.DType()), 1)
	s.applied = s.phi
	if w := d.WarmupSteps(); w > 0 {
		s.applied = when(graph.LessOrEqual(s.count, graph.Scalar(x.Graph(), x.DType(), w)), s.batch, s.phi)
	}
	return s
}

// updateForward moves ψ² and the count. Below the warm-up's last step ψ² is the cumulative mean first, and averaged like
// every other then: the reference does both.
func (d PowerNorm) updateForward(c *nn.Ctx, s powerStats) {
	forward, _ := d.alphas()
	next := s.phi
	if w := d.WarmupSteps(); w > 1 && !d.BatchOnly {
		t := s.count
		mean := graph.Add(graph.Mul(s.phi, graph.Div(graph.AddScalar(t, -1), t)), graph.Div(s.batch, t))
		next = when(graph.LessThan(t, graph.Scalar(t.Graph(), t.DType(), w)), mean, s.phi)
	}
	c.Set("phi", graph.StopGradient(when(s.keep, mix(next, s.batch, forward), s.phi)))
	if s.count != nil {
		c.Set("count", when(s.keep, s.count, graph.AddScalar(s.count, -1)))
	}
	if d.SkipNonFinite {
		countSkip(c, graph.LogicalNot(s.finite))
	}
}

// countSkip adds one to the state "skipped" where the condition holds.
func countSkip(c *nn.Ctx, cond *graph.Node) {
	old := c.Param(c.Node.P["skipped"])
	c.Set("skipped", graph.Add(old, graph.ConvertDType(cond, old.DType())))
}

// backward gives dx from g = gain·dy at z, and moves ν.
func (d PowerNorm) backward(c *nn.Ctx, s powerStats, z, g *graph.Node) *graph.Node {
	a := g
	if !d.NoCorrection {
		nu := exactState(c, "nu", z.DType())
		_, alpha := d.alphas()
		a = graph.Sub(g, graph.Mul(perChannel(nu, z), z))
		change, _ := channelMean(graph.Mul(a, z), nil)
		keep := s.keep
		if d.SkipNonFinite {
			finite := allFinite(change)
			keep = both(keep, finite)
			countSkip(c, graph.LogicalAnd(s.finite, graph.LogicalNot(finite))) // the forward pass counted the others
		}
		c.Set("nu", when(keep, graph.Add(nu, graph.MulScalar(change, 1-alpha)), nu))
	}
	by := s.batch
	if d.BackwardScale == RunningScale {
		by = s.applied
	}
	return graph.Mul(a, perChannel(graph.StopGradient(s.root(by)), a))
}

// groupScale divides every token by the root mean square of each group of channels.
func (d PowerNorm) groupScale(x *graph.Node) *graph.Node {
	if d.NoGroupScaling {
		return x
	}
	dims := x.Shape().Dimensions
	r, groups := len(dims), cmp.Or(d.Groups, 1)
	if groups == 1 {
		return nn.Standardize(x, nil, nil, groupEps, false, -1)
	}
	split := append(append([]int{}, dims[:r-1]...), groups, dims[r-1]/groups)
	return graph.Reshape(nn.Standardize(graph.Reshape(x, split...), nil, nil, groupEps, false, -1), dims...)
}

// exactState is a state parameter in a type of at least its own precision: counters and averages in half precision would
// stand still.
func exactState(c *nn.Ctx, local string, dtype dtypes.DType) *graph.Node {
	v := c.Param(c.Node.P[local])
	if v.DType() != dtype {
		v = graph.ConvertDType(v, dtype)
	}
	return v
}

// Affine is what the norm computes at inference without group scaling: gain/√(ψ² + eps) and the bias, for nn/fold to
// merge into the linear layers around it. With group scaling every token has a factor of its own, which no weight can take
// over: it fails with nn.ErrNotAffine then.
func (d PowerNorm) Affine(p func(local string) []float64) (scale, shift []float64, err error) {
	if !d.NoGroupScaling {
		return nil, nil, fmt.Errorf("group scaling gives every token a factor of its own (%w); train with NoGroupScaling to fold", nn.ErrNotAffine)
	}
	return d.affine(p)
}

// affine is the norm after GroupScale at inference.
func (d PowerNorm) affine(p func(local string) []float64) (scale, shift []float64, err error) {
	gain, bias, psi2 := p("w"), p("b"), p("phi")
	if len(psi2) == 0 || len(gain) != len(psi2) || len(bias) != len(psi2) {
		return nil, nil, fmt.Errorf("%d gains, %d biases and %d running statistics do not belong together", len(gain), len(bias), len(psi2))
	}
	scale = make([]float64, len(gain))
	for i := range gain {
		if !(psi2[i] >= 0) {
			return nil, nil, fmt.Errorf("the running quadratic mean of channel %d is %g; it must not be negative", i, psi2[i])
		}
		scale[i] = gain[i] / math.Sqrt(psi2[i]+d.Epsilon())
	}
	return scale, bias, nil
}

// ExportONNX writes the norm as it is at inference: GroupScale, then one factor and one addend per channel.
func (d PowerNorm) ExportONNX(e *onnx.Emitter, n *nn.Node) error {
	s := e.Shape(n.In[0]).Dimensions
	if len(s) < 2 {
		return fmt.Errorf("its input has shape %v, want [..., channels]", s)
	}
	x := e.In(n, 0)
	if !d.NoGroupScaling {
		groups, r := cmp.Or(d.Groups, 1), len(s)
		lead := make([]int, r-1) // 0 keeps an axis
		if groups > 1 {
			x = e.Node("Reshape", n.Name+"/groups", []string{x, e.List(append(append([]int{}, lead...), groups, s[r-1]/groups)...)})
		}
		square := e.Node("Mul", n.Name+"/square", []string{x, x})
		mean := ""
		if e.Opset() < 18 {
			mean = e.Node("ReduceMean", n.Name+"/mean_square", []string{square}, onnx.Ints("axes", -1), onnx.Int("keepdims", 1))
		} else {
			mean = e.Node("ReduceMean", n.Name+"/mean_square", []string{square, e.List(-1)}, onnx.Int("keepdims", 1))
		}
		root := e.Node("Sqrt", n.Name+"/root", []string{e.Node("Add", n.Name+"/shifted", []string{mean, e.Scalar(groupEps)})})
		x = e.Node("Div", n.Name+"/scaled", []string{x, root})
		if groups > 1 {
			x = e.Node("Reshape", n.Name+"/merged", []string{x, e.List(append(lead, s[r-1])...)})
		}
	}
	return exportScaleShift(e, n, x, d.affine)
}

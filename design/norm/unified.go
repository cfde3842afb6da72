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

// Unified is Unified Normalization (Yang et al., arXiv:2208.01313): a batch norm for transformers that does not centre,
// smooths its statistics over the last few batches, forward and backward, and leaves the smoothing out for a batch unlike
// them. At inference it is a scale and a shift per channel, which fold.Norms merges into the neighbouring linear layers.
// With M = Window, at training step k (from 1), per channel:
//
//	x² ← mean over valid tokens of x²                     into row k mod M of the buffer
//	outlier: a channel whose arithmetic − geometric mean over the buffer's rows exceeds M·Var(√rows before this step)
//	σ² = geometric mean of the rows                       x² for k ≤ M, k < Warmup and outliers
//	z  = x/√(σ² + eps),  y = gain·z + bias
//	running = Decay·running + (1 − Decay)·σ²
//
// and backward, with the rate r = √(σ² + eps)/√(running + eps) in [1/5, 5] (1 up to step CompensationStart, and for
// outliers) and g = gain·dy·r:
//
//	ψ = mean of g·z over the last BackwardWindow batches   of this batch alone for k ≤ BackwardWindow, k < Warmup and outliers
//	running' = Decay·running' + (1 − Decay)·ψ
//	dx = (g − running'·z)/√(σ² + eps)                      ψ in place of running' for outliers and M = 1
//	dgain = Σ dy·r·z,  dbias = Σ dy
//
// Nothing is differentiated through the statistics. A second input, if there is one, is a mask [batch, tokens], 1 where a
// token is valid: it keeps padding out of x² alone. Without a valid token the state stays, and the running statistic
// normalises. Parameters: gain "w", bias "b"; state "var" (the running σ²), "ema_gz" (running'), "buf_x2" [M, channels],
// "buf_gz", "steps" (k) and "skipped" (outliers so far); the counts are float32, good for 16 million steps.
//
// It needs batches of more than a few tokens, a pass per step (an accumulated gradient counts every part as a step), and a
// training: putting it into a network that was trained with layer norm does not work. PowerNorm is its relative that
// normalises with the running statistic itself.
type Unified struct {
	Window            int     // M, batches in the smoothed statistic; 0: 4; 1: the batch's own, with its exact gradient
	BackwardWindow    int     // the same of the backward statistic; 0: Window
	Warmup            int     // steps from which on statistics are smoothed and tested; 0: 4000, about a tenth suits short runs; 1: none
	CompensationStart int     // no compensation r up to this step or Warmup, the later; 0: 1000, as the released code has it
	Decay             float64 // weight of the old running values, in (0, 1); 0: 0.9
	Eps               float64 // inside the root; 0: 1e-5

	// Unfiltered leaves out the test for outliers: the paper's setting for text. Vision keeps it.
	Unfiltered bool
	// FreezeOnSkip leaves the running statistic alone on an outlier. The released code averages the rejected batch in, and
	// one batch of large values then spoils inference, and the test of the batches after it.
	FreezeOnSkip bool
	// SkipNonFinite leaves all state alone on a batch with values that are infinite or not numbers. They show in the loss
	// either way.
	SkipNonFinite bool
}

var (
	_ nn.AffineNorm = Unified{}
	_ watchable     = Unified{}
	_ onnx.Exporter = Unified{}
)

// Kind returns "unifiednorm".
func (Unified) Kind() string { return "unifiednorm" }

// resolved fills in the defaults, and panics on settings out of range.
func (d Unified) resolved() Unified {
	switch {
	case d.Window < 0 || d.BackwardWindow < 0:
		panic(fmt.Errorf("windows of %d and %d batches; want at least 1 (0: 4)", d.Window, d.BackwardWindow))
	case d.Warmup < 0 || d.CompensationStart < 0:
		panic(fmt.Errorf("warm-up of %d steps, compensation from step %d on; want at least 0", d.Warmup, d.CompensationStart))
	case d.Decay != 0 && !(d.Decay > 0 && d.Decay < 1):
		panic(fmt.Errorf("decay %g is not in (0, 1); the default is 0.9", d.Decay))
	case !(d.Eps >= 0) || math.IsInf(d.Eps, 1):
		panic(fmt.Errorf("eps is %g; want a small positive number (0: 1e-5)", d.Eps))
	}
	d.Window = cmp.Or(d.Window, 4)
	d.BackwardWindow = cmp.Or(d.BackwardWindow, d.Window)
	d.Warmup = cmp.Or(d.Warmup, 4000)
	d.CompensationStart = max(cmp.Or(d.CompensationStart, 1000), d.Warmup)
	d.Decay = cmp.Or(d.Decay, .9)
	d.Eps = cmp.Or(d.Eps, 1e-5)
	if d.filters() && d.Warmup < d.Window {
		panic(fmt.Errorf("a warm-up of %d steps does not fill the window of %d batches that outliers are held against; use at least %d, or Unfiltered", d.Warmup, d.Window, d.Window))
	}
	return d
}

func (d Unified) filters() bool { return !d.Unfiltered && d.Window > 1 }

// Params are gain, bias and state.
func (d Unified) Params(in []shapes.Shape) []nn.Spec {
	d = d.resolved()
	wantTokens(in[0])
	n := in[0].Dimensions[in[0].Rank()-1]
	return channelSpecs(in[0],
		stateSpec{"var", 1, []int{n}}, stateSpec{"ema_gz", 0, []int{n}},
		stateSpec{"buf_x2", 0, []int{d.Window, n}}, stateSpec{"buf_gz", 0, []int{d.BackwardWindow, n}},
		stateSpec{"steps", 0, nil}, stateSpec{"skipped", 0, nil},
	)
}

// Lower normalises. Half precision values have their statistics in float32.
func (d Unified) Lower(c *nn.Ctx, xs []*graph.Node) []*graph.Node {
	oncePerStep(c)
	s := d.resolved().statistics(c, xs)
	z, gain := s.hat, c.P("w")
	if c.Training {
		z = s.normalize(c)
		gain = graph.IdentityWithCustomGradient(gain, func(_, v *graph.Node) *graph.Node {
			return graph.Mul(v, graph.ConvertDType(s.rate, v.DType()))
		})
	}
	if z.DType() != xs[0].DType() {
		z = graph.ConvertDType(z, xs[0].DType())
	}
	return []*graph.Node{graph.Add(graph.Mul(z, perChannel(gain, z)), perChannel(c.P("b"), z))}
}

// unifiedStats are one forward pass; all but x, hat and running only while training.
type unifiedStats struct {
	Unified               // with its defaults filled in
	x, hat    *graph.Node // the input, and z without a gradient (with that of autodiff at inference)
	k         *graph.Node // scalar, this step, from 1
	x2        *graph.Node // [C], the batch's mean square
	running   *graph.Node // [C], before this step's update
	rows, old *graph.Node // [M, C], the ring with this batch and without
	outlier   *graph.Node // scalar bool
	skip      *graph.Node // scalar bool, whether this step is left unsmoothed: an outlier, or M = 1
	variance  *graph.Node // [C], σ²
	inverse   *graph.Node // [C], 1/√(σ² + eps)
	rate      *graph.Node // [C], r
	some      *graph.Node // scalar bool, whether there is a valid token; nil without a mask
	finite    *graph.Node // scalar bool, whether x2 is; nil when not asked for
}

// inverseRoot is 1/√(v + eps).
func (d Unified) inverseRoot(v *graph.Node) *graph.Node {
	return graph.Reciprocal(graph.Sqrt(graph.AddScalar(v, d.Eps)))
}

// statistics computes what normalises and changes no state.
func (d Unified) statistics(c *nn.Ctx, xs []*graph.Node) unifiedStats {
	x, mask := tokens(xs)
	if x.DType().Bits() < 32 {
		x = graph.ConvertDType(x, dtypes.Float32)
		if mask != nil {
			mask = graph.ConvertDType(mask, dtypes.Float32)
		}
	}
	s := unifiedStats{Unified: d, x: x, running: exactState(c, "var", x.DType())}
	if !c.Training {
		s.hat = graph.Mul(x, perChannel(d.inverseRoot(s.running), x))
		return s
	}
	if x.Shape().Size() == 0 {
		panic(fmt.Errorf("%s has no tokens to take statistics of", x.Shape()))
	}
	known := graph.StopGradient(x)
	s.x2, s.some = channelMean(graph.Square(known), mask)
	if d.SkipNonFinite {
		s.finite = allFinite(s.x2)
	}
	s.k = graph.AddScalar(exactState(c, "steps", x.DType()), 1)
	s.old = exactState(c, "buf_x2", x.DType())
	s.rows = intoRow(s.old, s.k, s.x2)
	s.outlier = graph.Const(c.G, false)
	if d.filters() {
		s.outlier = graph.LogicalAnd(graph.LogicalNot(s.upTo(d.Warmup-1)), d.unlike(s.old, s.rows))
		s.rows = when(s.outlier, intoRow(s.old, s.k, s.running), s.rows)
	}
	s.skip = s.outlier
	if d.Window == 1 {
		s.skip = graph.Const(c.G, true)
	}
	s.variance = when(graph.LogicalOr(s.upTo(max(d.Window, d.Warmup-1)), s.skip), s.x2, geometricMean(s.rows))
	s.variance = when(s.some, s.variance, s.running)
	s.inverse = d.inverseRoot(s.variance)
	s.rate = graph.ClipScalar(graph.Div(d.inverseRoot(s.running), s.inverse), .2, 5)
	s.rate = when(graph.LogicalOr(s.upTo(d.CompensationStart), s.skip), graph.OnesLike(s.rate), s.rate)
	s.hat = graph.Mul(known, perChannel(s.inverse, x))
	return s
}

// upTo says whether this step is one of the first so many.
func (s unifiedStats) upTo(steps int) *graph.Node {
	return graph.LessOrEqual(s.k, graph.Scalar(s.k.Graph(), s.k.DType(), steps))
}

// normalize is z with its gradient, and moves the state.
func (s unifiedStats) normalize(c *nn.Ctx) *graph.Node {
	c.Record("var", s.variance)
	c.Record("rate", s.rate)
	c.Record("skip", graph.ConvertDType(s.skip, s.x.DType()))
	next := mix(s.running, s.variance, s.Decay)
	if s.FreezeOnSkip {
		next = when(s.outlier, s.running, next)
	}
	valid := both(s.some, s.finite)
	skipped := exactState(c, "skipped", s.x.DType())
	c.Set("var", when(valid, next, s.running))
	c.Set("buf_x2", when(valid, s.rows, s.old))
	c.Set("steps", when(valid, s.k, graph.AddScalar(s.k, -1)))
	c.Set("skipped", when(valid, graph.Add(skipped, graph.ConvertDType(s.outlier, skipped.DType())), skipped))
	return scaled(s.x, s.inverse, func(g *graph.Node) *graph.Node { return s.backward(c, g, valid) })
}

// backward gives dx from gain·dy, and moves the state where valid.
func (s unifiedStats) backward(c *nn.Ctx, g, valid *graph.Node) *graph.Node {
	g = graph.Mul(g, perChannel(s.rate, g))
	gz, _ := channelMean(graph.Mul(g, s.hat), nil) // padding included
	running, old := exactState(c, "ema_gz", g.DType()), exactState(c, "buf_gz", g.DType())
	if s.SkipNonFinite {
		valid = both(valid, allFinite(gz))
	}
	rows := intoRow(old, s.k, when(s.skip, running, gz))
	psi := when(graph.LogicalOr(s.upTo(max(s.BackwardWindow, s.Warmup-1)), s.skip), gz, graph.ReduceMean(rows, 0))
	next := when(valid, mix(running, psi, s.Decay), running)
	c.Set("ema_gz", next)
	c.Set("buf_gz", when(valid, rows, old))
	a := graph.Sub(g, graph.Mul(perChannel(when(s.skip, psi, next), g), s.hat))
	return graph.Mul(a, perChannel(s.inverse, g))
}

// watch tells the quadratic means; the backward statistic counts padding, as the norm's own does.
func (d Unified) watch(c *nn.Ctx, xs []*graph.Node) normStats {
	s := d.resolved().statistics(c, xs)
	return normStats{scale: s.x2, running: s.running, applied: s.variance, hat: s.hat}
}

// unlike says whether the newest row of a buffer is unlike those before: in some channel, the gap between the arithmetic
// and the geometric mean of the rows exceeds M times the variance that the roots of the recorded ones have, all channels
// together. For numbers of that variance it cannot. Gaps below a millionth of the mean are rounding.
func (d Unified) unlike(recorded, rows *graph.Node) *graph.Node {
	roots := graph.Sqrt(recorded)
	roots = graph.Sub(roots, graph.ReduceAllMean(roots))
	limit := graph.MulScalar(graph.ReduceAllSum(graph.Square(roots)), float64(d.Window)/float64(max(recorded.Shape().Size()-1, 1)))
	mean := graph.ReduceMean(rows, 0)
	gap := graph.Sub(mean, geometricMean(rows))
	beyond := graph.GreaterThan(gap, graph.BroadcastToShape(limit, gap.Shape()))
	return graph.LogicalAny(graph.LogicalAnd(beyond, graph.GreaterThan(gap, graph.MulScalar(mean, 1e-6))))
}

// geometricMean is that of the rows; of a channel without any activity it is 1e-30.
func geometricMean(rows *graph.Node) *graph.Node {
	return graph.Exp(graph.ReduceMean(graph.Log(graph.MaxScalar(rows, 1e-30)), 0))
}

// intoRow writes v into row k mod M of a ring [M, channels].
func intoRow(ring, k, v *graph.Node) *graph.Node {
	m := ring.Shape().Dimensions[0]
	row := graph.Sub(k, graph.MulScalar(graph.Floor(graph.DivScalar(k, float64(m))), float64(m)))
	at := graph.Iota(ring.Graph(), shapes.Make(ring.DType(), ring.Shape().Dimensions...), 0)
	here := graph.Equal(at, graph.BroadcastToShape(row, at.Shape()))
	return graph.Where(here, graph.BroadcastToShape(graph.InsertAxes(v, 0), ring.Shape()), ring)
}

// Affine is what the norm computes at inference: gain/√(var + eps) and the bias. It refuses a norm that has seen no
// training step, whose running statistic means nothing.
func (d Unified) Affine(p func(local string) []float64) (scale, shift []float64, err error) {
	if err := nn.Catch(func() { d = d.resolved() }); err != nil {
		return nil, nil, err
	}
	if steps := p("steps"); len(steps) != 1 || !(steps[0] >= 1) {
		return nil, nil, fmt.Errorf("it has seen no training step, so its running statistic is still the initial 1; train the network before folding")
	}
	return d.affine(p)
}

func (d Unified) affine(p func(local string) []float64) (scale, shift []float64, err error) {
	gain, bias, variance := p("w"), p("b"), p("var")
	if len(gain) != len(variance) || len(bias) != len(variance) {
		return nil, nil, fmt.Errorf("%d gains, %d biases and %d running statistics do not belong together", len(gain), len(bias), len(variance))
	}
	scale = make([]float64, len(gain))
	for i := range gain {
		if !(variance[i] >= 0) {
			return nil, nil, fmt.Errorf("the running statistic of channel %d is %g; it must not be negative", i, variance[i])
		}
		scale[i] = gain[i] / math.Sqrt(variance[i]+d.Eps)
	}
	return scale, bias, nil
}

// ExportONNX writes scale·x + shift.
func (d Unified) ExportONNX(e *onnx.Emitter, n *nn.Node) error {
	return exportScaleShift(e, n, e.In(n, 0), d.resolved().affine)
}

// exportScaleShift writes a norm as the scale and shift per channel of x that it is at inference: Mul and Add.
func exportScaleShift(e *onnx.Emitter, n *nn.Node, x string, affine func(p func(local string) []float64) (scale, shift []float64, err error)) error {
	net := e.Network()
	s, t, err := affine(func(local string) []float64 {
		if p := net.Param(n, local); p != nil {
			return nn.Float64s(p.Value)
		}
		return nil
	})
	if err != nil {
		return err
	}
	vector := func(name string, v []float64) string {
		f := make([]float32, len(v))
		for i := range v {
			f[i] = float32(v[i])
		}
		return e.Floats(n.Name+"/"+name, f, len(f))
	}
	product := e.Node("Mul", n.Name+"/scaled", []string{x, vector("scale", s)})
	e.Out(n, nil, "Add", []string{product, vector("shift", t)})
	return nil
}

// SkipRates is the share of training steps that every Unified norm of a network took for outliers, by node name. Norms
// without a step are left out.
func SkipRates(net *nn.Network) map[string]float64 {
	rates := map[string]float64{}
	for _, x := range net.Nodes {
		if _, ok := x.Op.(Unified); !ok {
			continue
		}
		steps, skipped := net.Param(x, "steps"), net.Param(x, "skipped")
		if steps == nil || skipped == nil {
			continue
		}
		if k := nn.Float64s(steps.Value)[0]; k > 0 {
			rates[x.Name] = nn.Float64s(skipped.Value)[0] / k
		}
	}
	return rates
}

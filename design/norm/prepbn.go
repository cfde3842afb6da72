package norm

import (
	"cmp"
	"fmt"
	"math"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/onnx"
)

// RepBN is re-parameterised batch norm (Guo et al., arXiv:2405.11582, eq. 6): a batch norm beside a learned shortcut. With
// mean μ and variance σ² per channel over all tokens of the batch, of the running statistics at inference:
//
//	y = gain·(x − μ)/√(σ² + Eps) + bias + η·x
//
// η is one trained scalar of the layer. At inference that is y = a·x + b with
//
//	a = gain/√(σ² + Eps) + η,  b = bias − gain·μ/√(σ² + Eps)
//
// which fold.Norms merges into the neighbouring linear layers: the norm costs nothing then. The variance that normalises is
// the biased one, the running one is unbiased, as in PyTorch. PRepBN is how to train a transformer with it.
//
// Parameters: gain "w", bias "b", "eta" (role nn.Gain, so that no weight decay touches it), state "mean" and "var". An
// optional second input is a mask [batch, tokens], 1 (or true) where valid: the other tokens stay out of the statistics.
// Where fewer than two are valid the running statistics normalise and stay as they are; CheckMask refuses such a mask on
// the host. It panics at build time, naming the value, on knobs out of range, and on a training batch of fewer than two
// tokens.
type RepBN struct {
	Eps   float64 // inside the root; 0: 1e-5
	Decay float64 // weight of the old running statistics, in [0, 1); 0: 0.9

	GainInit float64 // initial gain; 0: 1
	EtaInit  float64 // initial η; 0: 1
	ZeroInit bool    // gain and η start at 0, as in the paper's language models; the two fields above must be 0

	NoShortcut bool // without η: batch norm
}

var (
	_ nn.AffineNorm = RepBN{}
	_ watchable     = RepBN{}
	_ onnx.Exporter = RepBN{}
)

// Kind returns "repbn".
func (RepBN) Kind() string { return "repbn" }

// batchNorm is the part beside the shortcut.
func (d RepBN) batchNorm() nn.BatchNorm { return nn.BatchNorm{Eps: d.Eps, Decay: d.Decay} }

// check refuses knobs out of range.
func (d RepBN) check(s shapes.Shape) {
	wantTokens(s)
	switch {
	case !(d.Eps >= 0) || math.IsInf(d.Eps, 1):
		panic(fmt.Errorf("eps is %g; want a small positive number (0: 1e-5)", d.Eps))
	case !decayOK(d.Decay):
		panic(fmt.Errorf("weight of the old statistics %g: want [0, 1) (0: 0.9)", d.Decay))
	case math.IsNaN(d.GainInit+d.EtaInit) || math.IsInf(d.GainInit+d.EtaInit, 0):
		panic(fmt.Errorf("initial gain %g and η %g: want finite numbers", d.GainInit, d.EtaInit))
	case d.ZeroInit && (d.GainInit != 0 || d.EtaInit != 0):
		panic(fmt.Errorf("initial gain %g and η %g beside ZeroInit; leave them 0", d.GainInit, d.EtaInit))
	}
}

// Params are gain, bias, η and the running statistics.
func (d RepBN) Params(in []shapes.Shape) []nn.Spec {
	d.check(in[0])
	n := in[0].Dimensions[in[0].Rank()-1]
	specs := channelSpecs(in[0], stateSpec{name: "mean", dims: []int{n}}, stateSpec{name: "var", fill: 1, dims: []int{n}})
	gain, eta := float32(cmp.Or(d.GainInit, 1)), float32(cmp.Or(d.EtaInit, 1))
	if d.ZeroInit {
		gain, eta = 0, 0
	}
	specs[0].Init = nn.Fill(gain)
	if !d.NoShortcut {
		specs = append(specs, nn.Spec{Name: "eta", Shape: shapes.Make(dtypes.Float32), Role: nn.Gain, Init: nn.Fill(eta)})
	}
	return specs
}

// Lower normalises with the statistics of the mode, in float32 at least.
func (d RepBN) Lower(c *nn.Ctx, xs []*graph.Node) []*graph.Node {
	d.check(xs[0].Shape())
	exact, x, mask := inFloat32(c, xs)
	return []*graph.Node{like(d.lower(exact, x, mask, nil), xs[0])}
}

// lower is RepBN; the running statistics move where the scalar condition active holds (nil: always).
func (d RepBN) lower(c *nn.Ctx, x, mask, active *graph.Node) *graph.Node {
	in := []*graph.Node{x}
	if c.Training {
		if rows := x.Shape().Size() / x.Shape().Dimensions[x.Rank()-1]; rows < 2 {
			panic(fmt.Errorf("a batch of %s has %d tokens; training takes statistics of at least 2", x.Shape(), rows))
		}
		if mask != nil { // of fewer than two valid tokens batch norm is told that there is none
			count := graph.ReduceAllSum(mask)
			enough := graph.GreaterOrEqual(count, graph.Scalar(count.Graph(), count.DType(), 2))
			in = append(in, graph.Mul(mask, graph.ConvertDType(enough, mask.DType())))
		}
	}
	env := *c.Env
	if update := c.Update; update != nil && active != nil {
		env.Update = func(name string, v *graph.Node) {
			update(name, when(active, v, like(c.Param(name), v)))
		}
	}
	y := d.batchNorm().Lower(&nn.Ctx{Env: &env, Node: c.Node}, in)[0]
	if d.NoShortcut {
		return y
	}
	return graph.Add(y, graph.Mul(x, c.P("eta")))
}

// inFloat32 is a context that lowers in float32 at least, and the inputs of a norm in its type.
func inFloat32(c *nn.Ctx, xs []*graph.Node) (exact *nn.Ctx, x, mask *graph.Node) {
	x, mask = tokens(xs)
	if x.DType().Bits() >= 32 {
		return c, x, mask
	}
	env := *c.Env
	env.DType = dtypes.Float32
	if mask != nil {
		mask = graph.ConvertDType(mask, env.DType)
	}
	return &nn.Ctx{Env: &env, Node: c.Node}, graph.ConvertDType(x, env.DType), mask
}

// like converts v to the type of x.
func like(v, x *graph.Node) *graph.Node {
	if v.DType() == x.DType() {
		return v
	}
	return graph.ConvertDType(v, x.DType())
}

// watch tells the batch norm's statistics.
func (d RepBN) watch(c *nn.Ctx, xs []*graph.Node) normStats {
	return batchNorm{d.batchNorm()}.watch(c, xs)
}

// Affine is the a and b of inference. It refuses statistics that are negative or not finite.
func (d RepBN) Affine(p func(local string) []float64) (scale, shift []float64, err error) {
	mean, variance := p("mean"), p("var")
	for i, v := range variance {
		if !(v >= 0) || math.IsInf(v, 1) {
			return nil, nil, fmt.Errorf("the running variance of channel %d is %g; it must be finite and not negative", i, v)
		}
	}
	for i, v := range mean {
		if math.IsNaN(v) || math.IsInf(v, 0) {
			return nil, nil, fmt.Errorf("the running mean of channel %d is %g; it must be finite", i, v)
		}
	}
	scale, shift, err = d.batchNorm().Affine(p)
	if err != nil || d.NoShortcut {
		return scale, shift, err
	}
	eta := p("eta")
	if len(eta) != 1 {
		return nil, nil, fmt.Errorf("η has %d elements, want 1", len(eta))
	}
	for i := range scale {
		scale[i] += eta[0]
	}
	return scale, shift, nil
}

// ExportONNX writes a·x + b.
func (d RepBN) ExportONNX(e *onnx.Emitter, n *nn.Node) error {
	return exportScaleShift(e, n, e.In(n, 0), d.Affine)
}

// PRepBN trains a transformer into one with RepBN (Guo et al., arXiv:2405.11582, eq. 5): it begins as layer norm, or RMS
// norm, and fades linearly into RepBN. At training step t, from 0:
//
//	y = λ·LN(x) + (1 − λ)·RepBN(x),   λ(t) = Start·max(0, 1 − (t − Warmup)/Steps)   from step Warmup on
//	y = LN(x)                                                                       before
//
// A direct exchange of layer norm by batch norm trains worse or not at all; once λ is 0 nothing is left of the layer norm.
// Inference is RepBN alone at every t, so that a network that is evaluated early looks bad. The running statistics stay at
// their initial values before step Warmup, and move from then on although λ is still 1.
//
// t is the trainer's step (nn.Env.Step), the same for all layers however many passes a step takes, and never less than what
// the network has behind it: a network that is trained on with another trainer does not start to fade again. Without a
// trainer t counts the passes that update state.
//
// Parameters are RepBN's, gain "first_w" and bias "first_b" (of layer norm) of the first norm, and the state "steps",
// training steps done: float32, good for 16 million. Folding is refused before λ has reached 0, because the function that
// was trained is not RepBN yet; Reparameterize with force overrides that. A mask is RepBN's. Both norms are computed at
// every training step; use RepBN alone to save that, if the network trains so.
//
//	PRepBN{Steps: steps / 2}                                                           // images, a short training
//	PRepBN{RepBN: RepBN{ZeroInit: true}, First: RMSFirst, Warmup: 10_000, Steps: 18_000} // the paper's LLaMA
type PRepBN struct {
	RepBN

	// Steps is T, on which λ falls to 0; 0: 300000, most of 300 epochs of ImageNet. The paper's SLAB models take 60000 (DeiT,
	// Swin) and 120000 (CSwin). Half of a short training is a good choice: the network needs steps behind the change.
	Steps    int
	Warmup   int     // steps with the first norm alone; 0: none
	Start    float64 // λ at step Warmup, in (0, 1]; 0: 1
	First    First   // the zero value is layer norm
	FirstEps float64 // of the first norm; 0: 1e-6 (Swin has 1e-5)
}

// First is the norm that a PRepBN starts with.
type First int

// The first norms: layer norm for vision transformers, RMS norm for models of the kind of LLaMA.
const (
	LayerFirst First = iota
	RMSFirst
)

// String returns "layer" or "rms".
func (f First) String() string {
	switch f {
	case LayerFirst:
		return "layer"
	case RMSFirst:
		return "rms"
	}
	return fmt.Sprintf("first(%d)", int(f))
}

var (
	_ nn.AffineNorm = PRepBN{}
	_ onnx.Exporter = PRepBN{} // RepBN's: what it is at inference
)

// Kind returns "prepbn".
func (PRepBN) Kind() string { return "prepbn" }

// fadeSteps is Steps with its default.
func (d PRepBN) fadeSteps() int { return cmp.Or(d.Steps, 300_000) }

// Lambda is the share of the first norm at a training step, from 0.
func (d PRepBN) Lambda(step int) float64 { return d.lambda(float64(step)) }

func (d PRepBN) lambda(t float64) float64 {
	if t < float64(d.Warmup) {
		return 1
	}
	return cmp.Or(d.Start, 1) * max(0, 1-(t-float64(d.Warmup))/float64(d.fadeSteps()))
}

// check refuses knobs out of range.
func (d PRepBN) check(s shapes.Shape) {
	d.RepBN.check(s)
	start := cmp.Or(d.Start, 1)
	switch {
	case d.Steps < 0:
		panic(fmt.Errorf("the norm changes on %d steps; want at least 1 (0: 300000)", d.Steps))
	case d.Warmup < 0:
		panic(fmt.Errorf("warm-up of %d steps: want at least 0", d.Warmup))
	case !(start > 0 && start <= 1):
		panic(fmt.Errorf("λ starts at %g: want (0, 1] (0: 1)", d.Start))
	case !(d.FirstEps >= 0) || math.IsInf(d.FirstEps, 1):
		panic(fmt.Errorf("eps of the first norm is %g; want a small positive number (0: 1e-6)", d.FirstEps))
	case d.First != LayerFirst && d.First != RMSFirst:
		panic(fmt.Errorf("first norm %s: want LayerFirst or RMSFirst", d.First))
	case d.First == LayerFirst && s.Dimensions[s.Rank()-1] < 2:
		panic(fmt.Errorf("layer norm over one channel would give its bias whatever the input; use RMSFirst or RepBN"))
	}
}

// Params are RepBN's, the first norm's and the steps.
func (d PRepBN) Params(in []shapes.Shape) []nn.Spec {
	d.check(in[0])
	n := in[0].Dimensions[in[0].Rank()-1]
	first := channelSpecs(in[0], stateSpec{name: "steps"})
	specs := append(d.RepBN.Params(in), first[2], nn.Spec{Name: "first_w", Shape: shapes.Make(dtypes.Float32, n), Role: nn.Gain, Init: nn.Fill(1)})
	if d.First == LayerFirst {
		specs = append(specs, nn.Spec{Name: "first_b", Shape: shapes.Make(dtypes.Float32, n), Role: nn.Bias})
	}
	return specs
}

// Lower blends while training and is RepBN otherwise. The blend's λ is recorded as "lambda".
func (d PRepBN) Lower(c *nn.Ctx, xs []*graph.Node) []*graph.Node {
	d.check(xs[0].Shape())
	if !c.Training {
		return d.RepBN.Lower(c, xs)
	}
	c, x, mask := inFloat32(c, xs)
	t := d.step(c, x.DType())
	begun := graph.GreaterOrEqual(t, graph.Scalar(c.G, t.DType(), d.Warmup))
	lambda := graph.MulScalar(graph.AddScalar(t, -float64(d.Warmup)), -1/float64(d.fadeSteps()))
	lambda = graph.MulScalar(graph.MaxScalar(graph.AddScalar(lambda, 1), 0), cmp.Or(d.Start, 1))
	lambda = c.Record("lambda", when(begun, lambda, graph.OnesLike(lambda)))

	first := nn.Standardize(x, c.P("first_w"), c.P("first_b"), cmp.Or(d.FirstEps, 1e-6), d.First == LayerFirst, -1)
	second := d.lower(c, x, mask, begun)
	y := graph.Add(graph.Mul(first, lambda), graph.Mul(second, graph.OneMinus(lambda)))
	return []*graph.Node{like(y, xs[0])}
}

// step is t, and moves the state.
func (d PRepBN) step(c *nn.Ctx, dtype dtypes.DType) *graph.Node {
	t := exactState(c, "steps", dtype)
	if c.Step != nil {
		t = graph.Max(graph.AddScalar(t, -1), graph.ConvertDType(c.Step, dtype))
	}
	c.Set("steps", graph.AddScalar(t, 1))
	return t
}

// Affine is RepBN's. It refuses a norm whose λ has not reached 0.
func (d PRepBN) Affine(p func(local string) []float64) (scale, shift []float64, err error) {
	if err := d.finished(p("steps")); err != nil {
		return nil, nil, err
	}
	return d.RepBN.Affine(p)
}

// finished says why a norm of so many training steps is not RepBN yet.
func (d PRepBN) finished(steps []float64) error {
	if len(steps) != 1 {
		return fmt.Errorf("its state \"steps\" has %d elements, want 1", len(steps))
	}
	if l := d.lambda(steps[0]); !(l <= 0) {
		return fmt.Errorf("after %g training steps λ is %.3g: it is still trained as a blend with %s norm, and RepBN alone from step %d on; train on, or use norm.Reparameterize with force", steps[0], l, d.First, d.Warmup+d.fadeSteps())
	}
	return nil
}

// Reparameterize replaces every PRepBN of a network by the RepBN that it is at inference, drops the first norms' gains and
// biases, and returns the nodes' names. It refuses a network in which λ has not reached 0, unless force is set, and leaves
// it as it was.
func Reparameterize(net *nn.Network, force bool) ([]string, error) {
	var nodes []*nn.Node
	for _, x := range net.Nodes {
		d, ok := x.Op.(PRepBN)
		if !ok {
			continue
		}
		nodes = append(nodes, x)
		var steps []float64
		if p := net.Param(x, "steps"); p != nil {
			steps = nn.Float64s(p.Value)
		}
		if err := d.finished(steps); err != nil && !force {
			return nil, fmt.Errorf("norm: %q: %w", x.Name, err)
		}
	}
	var names []string
	for _, x := range nodes {
		x.Op = x.Op.(PRepBN).RepBN
		names = append(names, x.Name)
		for _, local := range []string{"steps", "first_w", "first_b"} {
			if full, ok := x.P[local]; ok {
				if !net.SharedParam(x, local) {
					net.Params.Delete(full)
				}
				delete(x.P, local)
			}
		}
	}
	return names, nil
}

// CheckMask refuses a mask of tokens, 1 (or true) where valid, that leaves fewer than the two valid tokens that statistics
// of a batch need. A graph cannot refuse it: there, such a batch is normalised by the running statistics.
func CheckMask(mask *tensors.Tensor) error {
	valid := 0
	if mask.DType() == dtypes.Bool {
		for _, v := range tensors.MustCopyFlatData[bool](mask) {
			if v {
				valid++
			}
		}
	} else {
		for _, v := range nn.Float64s(mask) {
			if v != 0 {
				valid++
			}
		}
	}
	if valid < 2 {
		return fmt.Errorf("norm: the mask %s has %d valid tokens; batch statistics need at least 2", mask.Shape(), valid)
	}
	return nil
}

// Package learn trains networks: one training step and one loop over nn.Params, for every method.
//
// A loss is a function of an nn.Env and a batch; it may lower any number of networks any number of times. The step
// differentiates it, clips, and applies an optimiser from learn/optim with the learning rate fed as an input. The loop
// adds hooks, checkpoints that resume bit for bit on the same backend, and a clean stop.
package learn

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"

	"github.com/gomlx/compute"
	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/learn/optim"
	"github.com/lathe-ml/lathe/nn"
)

// LossFunc builds a scalar loss from a batch. It may call Network.Lower any number of times, on several networks whose
// parameters are all in the trained set, and Report intermediate figures.
type LossFunc func(env *nn.Env, batch []*graph.Node) *graph.Node

// Report makes a scalar appear in Info.Metrics after every step.
func Report(env *nn.Env, name string, v *graph.Node) {
	if env.Tap != nil {
		env.Tap[metricPrefix+name] = graph.StopGradient(v)
	}
}

const metricPrefix = "metric\x00"

// Factors scale the rates of one parameter.
type Factors struct {
	LR    float64 // multiplies the learning rate; 0 freezes the parameter
	Decay float64 // multiplies the weight decay
}

// DefaultFactors are 1 and 1 for weights, 1 and 0 for biases, gains and everything else: norms and biases do not decay.
func DefaultFactors(p *nn.Param) Factors {
	if p.Role == nn.Weight {
		return Factors{1, 1}
	}
	return Factors{1, 0}
}

// Options say how a Trainer steps.
type Options struct {
	Optimizer optim.Optimizer // nil: AdamW{}
	LR        float64         // peak learning rate; 0: 1e-3
	Schedule  optim.Schedule  // nil: constant
	ClipNorm  float64         // largest joint L2 norm of all gradients; 0: no limit
	ClipValue float64         // largest absolute value of a gradient's element; 0: no limit
	EMA       float64         // decay of an exponential moving average of parameters and state; 0: none
	EMAWarmup bool            // use min(EMA, (1+t)/(10+t)) at step t

	Factors func(p *nn.Param) Factors // nil: DefaultFactors
	// Masks are 0/1 tensors by parameter name, shaped like the parameter: where 0, it never changes.
	Masks map[string]*tensors.Tensor
	// Moves is asked at every step which elements of a trained parameter may move: 1 or 0 for each, a node of w's shape
	// and type, or nil for all. Where it is 0, the gradient counts as 0 and the element keeps its value bit for bit, against
	// momentum and decay too. Unlike Masks, it may follow the values. nil: all move.
	Moves func(param string, w *graph.Node) *graph.Node

	Probe Probe // takes further figures out of every step's graph; nil: none

	Seed        uint64       // of dropout and the like
	DType       dtypes.DType // of the computation; parameters are stored in their own type. Zero value: float32
	SecondOrder bool         // the loss takes gradients itself
}

// Info is what one step reports.
type Info struct {
	Step    int // 1 for the first
	Loss    float64
	LR      float64
	Norm    float64                      // joint L2 norm of the gradients before clipping; NaN without ClipNorm and Probe
	Metrics map[string]float64           // what the loss reported
	Probed  []map[string]*tensors.Tensor // what Options.Probe observed, once for every micro-batch
}

// Trainer runs training steps. Between steps, the parameters are in the nn.Params that it was made with and may be read
// and changed there.
type Trainer struct {
	b      compute.Backend
	params *nn.Params
	loss   LossFunc
	o      Options

	train, state, rest []string
	factors            map[string]Factors
	slots              map[string][]*tensors.Tensor
	ema                map[string]*tensors.Tensor
	rng                *tensors.Tensor
	step               int
	exec               *engine.Exec
	micro, finish      *engine.Exec // the two halves of a step over micro-batches
	metrics, probed    []string
}

// NewTrainer prepares steps that lower loss over params. The roles of the parameters say what is trained; the loss is
// compiled at the first step, once per shape of the batch.
func NewTrainer(b compute.Backend, params *nn.Params, loss LossFunc, o Options) (*Trainer, error) {
	if o.Optimizer == nil {
		o.Optimizer = optim.AdamW{}
	}
	if o.LR == 0 {
		o.LR = 1e-3
	}
	if o.Schedule == nil {
		o.Schedule = optim.Constant()
	}
	if o.Factors == nil {
		o.Factors = DefaultFactors
	}
	if o.EMA < 0 || o.EMA >= 1 || o.ClipNorm < 0 || o.ClipValue < 0 || o.LR < 0 || math.IsNaN(o.LR) {
		return nil, fmt.Errorf("learn: rate %g, EMA %g, clipping %g and %g: want rates and limits of at least 0 and EMA in [0, 1)", o.LR, o.EMA, o.ClipNorm, o.ClipValue)
	}
	t := &Trainer{b: b, params: params, loss: loss, o: o, factors: map[string]Factors{}}
	for p := range params.All() {
		f := o.Factors(p)
		switch {
		case p.Role == nn.State && !p.Frozen:
			t.state = append(t.state, p.Name)
		case p.Trainable() && f.LR != 0:
			t.train = append(t.train, p.Name)
			t.factors[p.Name] = f
		default:
			t.rest = append(t.rest, p.Name)
		}
	}
	if len(t.train) == 0 {
		return nil, errors.New("learn: no parameter is trainable")
	}
	for name, m := range o.Masks {
		p := params.Get(name)
		if p == nil || t.factors[name] == (Factors{}) {
			return nil, fmt.Errorf("learn: mask for %q, which is not a trained parameter", name)
		}
		if !slices.Equal(m.Shape().Dimensions, p.Value.Shape().Dimensions) {
			return nil, fmt.Errorf("learn: mask of %q is %s, the parameter %s", name, m.Shape(), p.Value.Shape())
		}
	}
	if err := t.Reset(o.Seed); err != nil {
		return nil, err
	}
	var err error
	for _, e := range []struct {
		exec  **engine.Exec
		build func(in []*graph.Node) []*graph.Node
	}{{&t.exec, t.build}, {&t.micro, t.buildMicro}, {&t.finish, t.buildFinish}} {
		if *e.exec, err = engine.NewExec(b, e.build); err != nil {
			return nil, err
		}
		(*e.exec).NoLimit()
	}
	return t, nil
}

// Reset starts over: step 0, empty optimiser state and EMA, another random stream. Parameters stay as they are; together
// with Network.Reinit it trains a fresh network without compiling again.
func (t *Trainer) Reset(seed uint64) error {
	t.step, t.slots, t.ema = 0, map[string][]*tensors.Tensor{}, map[string]*tensors.Tensor{}
	for _, name := range t.train {
		for i := range t.o.Optimizer.Slots() {
			shape := t.params.Get(name).Value.Shape()
			if s, ok := t.o.Optimizer.(optim.SlotShaper); ok {
				shape = s.SlotShape(i, shape)
			}
			t.slots[name] = append(t.slots[name], tensors.FromShape(shape))
		}
	}
	if t.o.EMA > 0 {
		for _, name := range t.averaged() {
			c, err := t.params.Get(name).Value.LocalClone()
			if err != nil {
				return fmt.Errorf("learn: %w", err)
			}
			t.ema[name] = c
		}
	}
	var err error
	t.rng, err = graph.RNGStateFromSeed(int64(seed))
	return err
}

func (t *Trainer) averaged() []string { return append(slices.Clone(t.train), t.state...) }

// derivative is what one batch says about the parameters.
type derivative struct {
	grads, state []*graph.Node
	rng, loss    *graph.Node
	reported     []*graph.Node // metrics, then what the probe observed
}

// differentiate lowers the loss on a batch, or on one of several whose gradients are added up.
func (t *Trainer) differentiate(w, state, rest []*graph.Node, rng, step *graph.Node, batch []*graph.Node, partial bool) derivative {
	g := w[0].Graph()
	cur := map[string]*graph.Node{}
	for i, name := range t.train {
		cur[name] = w[i]
	}
	for i, name := range t.state {
		cur[name] = state[i]
	}
	for i, name := range t.rest {
		cur[name] = rest[i]
	}
	next, use := graph.RNGStateSplit(rng)
	env := &nn.Env{
		G: g, Training: true, DType: t.o.DType, RNG: use, SecondOrder: t.o.SecondOrder, Tap: map[string]*graph.Node{},
		Step: graph.AddScalar(step, -1), Partial: partial,
		Param: func(n string) *graph.Node {
			if cur[n] == nil {
				panic(fmt.Errorf("learn: parameter %q is not in the trained set", n))
			}
			return cur[n]
		},
		Update: func(n string, v *graph.Node) {
			if v.DType() != cur[n].DType() {
				v = graph.ConvertDType(v, cur[n].DType())
			}
			cur[n] = v
		},
	}
	if t.o.Probe != nil {
		t.o.Probe.Begin(env, batch)
	}
	l := t.loss(env, batch)
	if !l.IsScalar() {
		panic(fmt.Errorf("learn: the loss is %s, want a scalar", l.Shape()))
	}
	of := slices.Clone(w)
	if t.o.Probe != nil {
		of = append(of, t.o.Probe.Wants()...)
	}
	grads := graph.Gradient(l, of...) // custom gradients may call Update too
	d := derivative{grads: grads[:len(w)], rng: next, loss: l}
	for _, name := range t.state {
		d.state = append(d.state, cur[name])
	}
	t.metrics, t.probed = nil, nil
	for _, k := range slices.Sorted(maps.Keys(env.Tap)) {
		if name, ok := strings.CutPrefix(k, metricPrefix); ok {
			v := env.Tap[k]
			if !v.IsScalar() {
				panic(fmt.Errorf("learn: reported %q is %s, want a scalar", name, v.Shape()))
			}
			t.metrics = append(t.metrics, name)
			d.reported = append(d.reported, graph.ConvertDType(v, dtypes.Float32))
		}
	}
	if t.o.Probe != nil {
		byName := map[string]*graph.Node{}
		for i, name := range t.train {
			byName[name] = d.grads[i]
		}
		seen := t.o.Probe.Observe(byName, grads[len(w):])
		t.probed = slices.Sorted(maps.Keys(seen))
		for _, name := range t.probed {
			d.reported = append(d.reported, graph.StopGradient(seen[name]))
		}
	}
	return d
}

// updated is what a step makes of the parameters.
type updated struct {
	w, slots, ema []*graph.Node
	norm          *graph.Node
}

// update clips, applies the optimiser and averages. state is the next one.
func (t *Trainer) update(w, grads, slots, ema, state []*graph.Node, masks map[string]*graph.Node, lr, step, decay *graph.Node) (u updated) {
	g := w[0].Graph()
	dtype := t.o.DType
	if dtype == dtypes.InvalidDType {
		dtype = dtypes.Float32
	}
	grads = slices.Clone(grads)
	if t.o.Moves != nil {
		masks = maps.Clone(masks)
		for i, name := range t.train {
			m := t.o.Moves(name, w[i])
			if m == nil {
				continue
			}
			m = graph.StopGradient(m)
			grads[i] = graph.Where(graph.GreaterThan(m, graph.ZerosLike(m)), grads[i], graph.ZerosLike(grads[i]))
			if fixed := masks[name]; fixed != nil {
				m = graph.Mul(m, graph.ConvertDType(fixed, m.DType()))
			}
			masks[name] = m
		}
	}
	square := func() (sum *graph.Node) {
		for _, gr := range grads {
			if s := graph.ConvertDType(graph.ReduceAllSum(graph.Mul(gr, gr)), dtype); sum == nil {
				sum = s
			} else {
				sum = graph.Add(sum, s)
			}
		}
		return sum
	}
	u.norm = graph.Scalar(g, dtype, math.NaN())
	if t.o.ClipNorm > 0 || t.o.Probe != nil {
		u.norm = graph.Sqrt(square())
	}
	if t.o.ClipNorm > 0 {
		// max/(norm+1e-6), at most 1: torch.nn.utils.clip_grad_norm_
		factor := graph.MinScalar(graph.Div(graph.Scalar(g, dtype, t.o.ClipNorm), graph.AddScalar(u.norm, 1e-6)), 1)
		for i := range grads {
			grads[i] = graph.Mul(grads[i], graph.ConvertDType(factor, grads[i].DType()))
		}
	}
	keep := func(name string, v, old *graph.Node) *graph.Node {
		if m := masks[name]; m != nil {
			return graph.Where(graph.GreaterThan(m, graph.ZerosLike(m)), v, old)
		}
		return v
	}
	for i := range grads {
		if t.o.ClipValue > 0 {
			grads[i] = graph.ClipScalar(grads[i], -t.o.ClipValue, t.o.ClipValue)
		}
	}
	var joint *graph.Node
	if j, ok := t.o.Optimizer.(optim.Joint); ok && j.NeedsJointNorm() {
		for i, name := range t.train { // what never changes has no say in the others' rate
			grads[i] = keep(name, grads[i], graph.ZerosLike(grads[i]))
		}
		joint = square()
	}
	ns := t.o.Optimizer.Slots()
	for i, name := range t.train {
		f := t.factors[name]
		rate, at := graph.ConvertDType(lr, w[i].DType()), graph.ConvertDType(step, w[i].DType())
		if f.LR != 1 {
			rate = graph.MulScalar(rate, f.LR)
		}
		o := optim.Update{W: w[i], Grad: grads[i], Slots: slots[i*ns : (i+1)*ns], LR: rate, Step: at, Decay: f.Decay * t.o.Optimizer.WeightDecay()}
		if joint != nil {
			o.NormSq = graph.ConvertDType(joint, w[i].DType())
		}
		v, s := t.o.Optimizer.Apply(o)
		u.w, u.slots = append(u.w, keep(name, v, w[i])), append(u.slots, s...)
	}
	next := append(slices.Clone(u.w), state...)
	for i, v := range ema {
		d := graph.ConvertDType(decay, v.DType())
		u.ema = append(u.ema, graph.Add(graph.Mul(v, d), graph.Mul(next[i], graph.OneMinus(d))))
	}
	return u
}

// taker splits the inputs of a graph.
type taker []*graph.Node

func (t *taker) take(n int) []*graph.Node { v := (*t)[:n]; *t = (*t)[n:]; return v }

// takeEMA takes the averages, if there are any.
func (t *Trainer) takeEMA(in *taker) []*graph.Node {
	if t.o.EMA == 0 {
		return nil
	}
	return in.take(len(t.train) + len(t.state))
}

func (t *Trainer) takeMasks(in *taker) map[string]*graph.Node {
	masks := map[string]*graph.Node{}
	for _, n := range slices.Sorted(maps.Keys(t.o.Masks)) {
		masks[n] = in.take(1)[0]
	}
	return masks
}

// build is the whole step as one graph. Inputs: trained, slots, ema, state, rest, masks, rng, lr, step, emaDecay, batch.
// Outputs: trained, slots, ema, state, rng, loss, norm, reported.
func (t *Trainer) build(inputs []*graph.Node) []*graph.Node {
	in := taker(inputs)
	w, slots := in.take(len(t.train)), in.take(t.o.Optimizer.Slots()*len(t.train))
	ema := t.takeEMA(&in)
	state, rest := in.take(len(t.state)), in.take(len(t.rest))
	masks := t.takeMasks(&in)
	scalars := in.take(4)
	d := t.differentiate(w, state, rest, scalars[0], scalars[2], in, false)
	u := t.update(w, d.grads, slots, ema, d.state, masks, scalars[1], scalars[2], scalars[3])
	return slices.Concat(u.w, u.slots, u.ema, d.state, []*graph.Node{d.rng, d.loss, u.norm}, d.reported)
}

// Steps is the number of steps done.
func (t *Trainer) Steps() int { return t.step }

// LR is the learning rate of the next step.
func (t *Trainer) LR() float64 { return t.o.LR * t.o.Schedule(t.step) }

// Step does one update on a batch. A batch that the loss refuses leaves the parameters as they were.
func (t *Trainer) Step(batch ...*tensors.Tensor) (Info, error) { return t.StepLR(t.LR(), batch...) }

// StepLR is Step at a given learning rate, for callers with a schedule of their own.
func (t *Trainer) StepLR(lr float64, batch ...*tensors.Tensor) (Info, error) {
	var vals []*tensors.Tensor
	var donated []bool
	add := func(donate bool, v *tensors.Tensor) { vals, donated = append(vals, v), append(donated, donate) }
	for _, n := range t.train {
		add(true, t.params.Get(n).Value)
	}
	for _, v := range t.optimizerState() {
		add(true, v)
	}
	for _, n := range t.state {
		add(true, t.params.Get(n).Value)
	}
	for _, n := range t.rest {
		add(false, t.params.Get(n).Value)
	}
	for _, n := range slices.Sorted(maps.Keys(t.o.Masks)) {
		add(false, t.o.Masks[n])
	}
	add(true, t.rng)
	for _, v := range []float64{lr, float64(t.step + 1), t.emaDecay()} {
		add(false, tensors.FromScalar(float32(v)))
	}
	for _, v := range batch {
		add(false, v)
	}
	out, err := t.exec.CallDonating(vals, donated)
	if err != nil {
		return Info{}, fmt.Errorf("learn: step %d: %w", t.step+1, err)
	}
	next := func() *tensors.Tensor { v := out[0]; out = out[1:]; return v }
	t.replaceTrained(next)
	for _, n := range t.state {
		t.params.Get(n).Value = next()
	}
	t.rng = next()
	t.step++
	info := Info{Step: t.step, LR: lr, Loss: scalar(next()), Norm: scalar(next()), Metrics: map[string]float64{}}
	for _, m := range t.metrics {
		info.Metrics[m] = scalar(next())
	}
	if t.o.Probe != nil {
		seen := map[string]*tensors.Tensor{}
		for _, name := range t.probed {
			seen[name] = next()
		}
		info.Probed = append(info.Probed, seen)
	}
	return info, nil
}

// optimizerState is what a step replaces beside parameters: the optimiser's slots, then the averages.
func (t *Trainer) optimizerState() (v []*tensors.Tensor) {
	for _, n := range t.train {
		v = append(v, t.slots[n]...)
	}
	if t.o.EMA > 0 {
		for _, n := range t.averaged() {
			v = append(v, t.ema[n])
		}
	}
	return v
}

// replaceTrained takes what a step gives, one after the other: trained parameters, slots, averages.
func (t *Trainer) replaceTrained(next func() *tensors.Tensor) {
	for _, n := range t.train {
		t.params.Get(n).Value = next()
	}
	for _, n := range t.train {
		for i := range t.slots[n] {
			t.slots[n][i] = next()
		}
	}
	if t.o.EMA > 0 {
		for _, n := range t.averaged() {
			t.ema[n] = next()
		}
	}
}

// emaDecay is the weight of the old average at this step.
func (t *Trainer) emaDecay() float64 {
	if t.o.EMAWarmup {
		return min(t.o.EMA, float64(1+t.step)/float64(10+t.step))
	}
	return t.o.EMA
}

func scalar(t *tensors.Tensor) float64 { return nn.Float64s(t)[0] }

// EMA returns the averaged parameters: a copy of the set with trained parameters and state replaced. It is nil without
// Options.EMA.
func (t *Trainer) EMA() *nn.Params {
	if t.o.EMA == 0 {
		return nil
	}
	c := t.params.Clone()
	for _, n := range t.averaged() {
		p := c.Get(n)
		v, err := t.ema[n].LocalClone()
		if err != nil {
			return nil
		}
		p.Value = v
	}
	return &c
}

// Finalize frees the compiled steps.
func (t *Trainer) Finalize() {
	for _, e := range []*engine.Exec{t.exec, t.micro, t.finish} {
		e.Finalize()
	}
}

// environment lowers with parameters that are the first inputs, and leaves state alone.
func environment(names []string, in []*graph.Node, training bool) *nn.Env {
	cur := map[string]*graph.Node{}
	for i, n := range names {
		cur[n] = in[i]
	}
	return &nn.Env{G: in[0].Graph(), Training: training, Param: func(n string) *graph.Node { return cur[n] }, Tap: map[string]*graph.Node{}}
}

// Evaluate lowers a loss without training behaviour and returns its mean over batches, weighted by weight, and those
// of what it reports.
func Evaluate(b compute.Backend, params *nn.Params, loss LossFunc, batches func(yield func(weight float64, batch []*tensors.Tensor) bool)) (mean float64, metrics map[string]float64, err error) {
	names := []string{}
	for p := range params.All() {
		names = append(names, p.Name)
	}
	var reported []string
	ex, err := engine.NewExec(b, func(in []*graph.Node) []*graph.Node {
		env := environment(names, in, false)
		out := []*graph.Node{loss(env, in[len(names):])}
		reported = nil
		for _, k := range slices.Sorted(maps.Keys(env.Tap)) {
			if name, ok := strings.CutPrefix(k, metricPrefix); ok {
				reported = append(reported, name)
				out = append(out, graph.ConvertDType(env.Tap[k], dtypes.Float32))
			}
		}
		return out
	})
	if err != nil {
		return 0, nil, err
	}
	defer ex.Finalize()
	ex.NoLimit()
	metrics = map[string]float64{}
	total := 0.
	batches(func(weight float64, batch []*tensors.Tensor) bool {
		args := []any{}
		for _, n := range names {
			args = append(args, params.Get(n).Value)
		}
		for _, v := range batch {
			args = append(args, v)
		}
		var out []*tensors.Tensor
		if out, err = ex.Call(args...); err != nil {
			return false
		}
		total += weight
		mean += weight * scalar(out[0])
		for i, n := range reported {
			metrics[n] += weight * scalar(out[i+1])
		}
		return true
	})
	if err != nil {
		return 0, nil, err
	}
	if total > 0 {
		mean /= total
		for k := range metrics {
			metrics[k] /= total
		}
	}
	return mean, metrics, nil
}

package learn

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/nn"
)

// Probe looks into the graph of every step and takes figures out of it that need more than the gradients of the
// parameters: those of single cases, for example. It is called while a graph is built, once per shape of a batch.
type Probe interface {
	// Begin is called before the loss is lowered. It may wrap env.Param to see which parameters are used.
	Begin(env *nn.Env, batch []*graph.Node)
	// Wants is called when the loss is lowered (env.Tap is full) and returns values whose gradients Observe gets.
	Wants() []*graph.Node
	// Observe gets the gradients of the loss by trained parameter, before clipping, and those of the wanted values. What
	// it returns appears in Info.Probed. The names must be the same for all shapes of batches.
	Observe(grads map[string]*graph.Node, wanted []*graph.Node) map[string]*graph.Node
}

// StepMicro does one update on the mean gradient of several micro-batches: what Step does on their concatenation, up to
// rounding, when the loss is a mean over cases. Micro-batches of one shape are compiled once, whatever their number, and
// one that is smaller counts for less. Batch norm sees the micro-batches one by one;
// norms whose statistics must move once per step refuse to be trained this way. Info has the
// weighted means of the losses and metrics. An error leaves the parameters as they were.
func (t *Trainer) StepMicro(lr float64, micro [][]*tensors.Tensor) (Info, error) {
	fail := func(err error) (Info, error) { return Info{}, fmt.Errorf("learn: step %d: %w", t.step+1, err) }
	total := 0
	for _, m := range micro {
		if len(m) == 0 || m[0].Rank() == 0 || m[0].Shape().Dimensions[0] == 0 {
			return fail(errors.New("a micro-batch is empty"))
		}
		total += m[0].Shape().Dimensions[0]
	}
	if total == 0 {
		return fail(errors.New("there are no micro-batches"))
	}
	info := Info{Step: t.step + 1, LR: lr, Metrics: map[string]float64{}}
	var sum, state []*tensors.Tensor // of this step; nothing of the trainer's is donated before all batches are through
	for _, n := range t.train {
		sum = append(sum, tensors.FromShape(t.params.Get(n).Value.Shape()))
	}
	for _, n := range t.state {
		state = append(state, t.params.Get(n).Value)
	}
	rng, step := t.rng, tensors.FromScalar(float32(t.step+1))
	for i, m := range micro {
		share := float64(m[0].Shape().Dimensions[0]) / float64(total)
		var vals []*tensors.Tensor
		var donated []bool
		add := func(donate bool, v ...*tensors.Tensor) {
			for _, x := range v {
				vals, donated = append(vals, x), append(donated, donate)
			}
		}
		for _, n := range t.train {
			add(false, t.params.Get(n).Value)
		}
		add(true, sum...)
		add(i > 0, state...)
		for _, n := range t.rest {
			add(false, t.params.Get(n).Value)
		}
		add(i > 0, rng)
		add(false, step, tensors.FromScalar(float32(share)))
		add(false, m...)
		out, err := t.micro.CallDonating(vals, donated)
		if err != nil {
			return fail(fmt.Errorf("micro-batch %d of %d: %w", i+1, len(micro), err))
		}
		next := func(n int) []*tensors.Tensor { v := out[:n]; out = out[n:]; return v }
		sum, state, rng = next(len(sum)), next(len(state)), next(1)[0]
		info.Loss += share * scalar(next(1)[0])
		for _, name := range t.metrics {
			info.Metrics[name] += share * scalar(next(1)[0])
		}
		if t.o.Probe != nil {
			seen := map[string]*tensors.Tensor{}
			for _, name := range t.probed {
				seen[name] = next(1)[0]
			}
			info.Probed = append(info.Probed, seen)
		}
	}
	var vals []*tensors.Tensor
	var donated []bool
	add := func(donate bool, v *tensors.Tensor) { vals, donated = append(vals, v), append(donated, donate) }
	for _, n := range t.train {
		add(true, t.params.Get(n).Value)
	}
	for _, v := range sum {
		add(true, v)
	}
	for _, v := range t.optimizerState() {
		add(true, v)
	}
	for _, v := range state {
		add(false, v)
	}
	for _, n := range slices.Sorted(maps.Keys(t.o.Masks)) {
		add(false, t.o.Masks[n])
	}
	for _, v := range []float64{lr, float64(t.step + 1), t.emaDecay()} {
		add(false, tensors.FromScalar(float32(v)))
	}
	out, err := t.finish.CallDonating(vals, donated)
	if err != nil {
		return fail(err)
	}
	next := func() *tensors.Tensor { v := out[0]; out = out[1:]; return v }
	t.replaceTrained(next)
	for i, n := range t.state {
		t.params.Get(n).Value = state[i]
	}
	t.rng = rng
	t.step++
	info.Norm = scalar(next())
	return info, nil
}

// buildMicro adds one micro-batch's share of the gradient. Inputs: trained, sums, state, rest, rng, step, share, batch.
// Outputs: sums, state, rng, loss, reported.
func (t *Trainer) buildMicro(inputs []*graph.Node) []*graph.Node {
	in := taker(inputs)
	w, sum := in.take(len(t.train)), in.take(len(t.train))
	state, rest := in.take(len(t.state)), in.take(len(t.rest))
	scalars := in.take(3)
	d := t.differentiate(w, state, rest, scalars[0], scalars[1], in, true)
	var out []*graph.Node
	for i, s := range sum {
		out = append(out, graph.Add(s, graph.Mul(d.grads[i], graph.ConvertDType(scalars[2], s.DType()))))
	}
	return slices.Concat(out, d.state, []*graph.Node{d.rng, d.loss}, d.reported)
}

// buildFinish updates by the summed gradient. Inputs: trained, sums, slots, ema, state, masks, lr, step, emaDecay.
// Outputs: trained, slots, ema, norm.
func (t *Trainer) buildFinish(inputs []*graph.Node) []*graph.Node {
	in := taker(inputs)
	w, sum, slots := in.take(len(t.train)), in.take(len(t.train)), in.take(t.o.Optimizer.Slots()*len(t.train))
	ema := t.takeEMA(&in)
	state := in.take(len(t.state))
	masks := t.takeMasks(&in)
	scalars := in.take(3)
	u := t.update(w, sum, slots, ema, state, masks, scalars[0], scalars[1], scalars[2])
	return slices.Concat(u.w, u.slots, u.ema, []*graph.Node{u.norm})
}

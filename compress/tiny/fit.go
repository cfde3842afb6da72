package tiny

import (
	"context"
	"errors"
	"fmt"
	"math"
)

// GradientContribution estimates what each choice contributes from one pass over the examples: the squared norm of the
// mean gradient of what it trains, in units of float weights, which is the first-order fall of the loss per unit of
// learning rate. It costs one short training of the classifier and one backward pass per example, where Contribution
// trains once for every choice. (Ours; the paper trains.)
func GradientContribution(ctx context.Context, net *Net, e *Examples, ratios []float64) (*Contrib, error) {
	c, err := newContrib(net, ratios)
	if err != nil {
		return nil, err
	}
	p, err := meanGradients(ctx, net, e)
	if err != nil {
		return nil, err
	}
	defer p.Close()
	n := len(p.convs)
	for k := 1; k <= n; k++ {
		r := p.convs[n-k]
		c.GainBias[k] = c.GainBias[k-1]
		for o, v := range p.at(r.gradB) {
			g := float64(v) / (r.layer.Scale[o] * r.in.Scale)
			c.GainBias[k] += g * g
		}
	}
	for l, r := range p.convs {
		square := make(map[int]float64) // by input channel
		dw, per := p.at(r.gradW), len(r.layer.Weight)/r.out.C
		for j, i := range r.index {
			g := float64(dw[j]) / r.layer.Scale[int(i)/per]
			square[r.channels[j%len(r.channels)]] += g * g
		}
		for k, ratio := range c.Ratios {
			for _, ch := range (Scheme{Biases: n, Weights: map[int]float64{l: ratio}}).channels(net, l) {
				c.GainWeight[l][k] += square[ch]
			}
		}
	}
	return c, c.Check()
}

// meanGradients trains the classifier a little, without which nothing flows back, and runs a program that leaves the mean
// gradients of everything in its buffers, up to a common factor.
func meanGradients(ctx context.Context, net *Net, e *Examples) (*Program, error) {
	head, err := Train(ctx, net, Scheme{}, e, nil, TrainOptions{Epochs: 3})
	if err != nil {
		return nil, err
	}
	all := Everything(net)
	p, err := Compile(head.Net, &all, CompileOptions{Accumulate: e.Len() + 1})
	if err != nil {
		return nil, err
	}
	for i, x := range e.X {
		if err = ctx.Err(); err == nil {
			_, err = p.Step(x, e.Labels[i], 0)
		}
		if err != nil {
			p.Close()
			return nil, fmt.Errorf("case %d: %w", i, err)
		}
	}
	return p, nil
}

// LayerMismatch is log10(‖W‖/‖G‖) of a convolution's weights in float, as codes, and as codes with scaled gradients.
type LayerMismatch struct {
	Name                string
	Float, Int8, Scaled float64
}

// Mismatches measures the ratio of weights to gradients on examples, the diagnostic of quantisation-aware scaling.
func Mismatches(ctx context.Context, net *Net, e *Examples) ([]LayerMismatch, error) {
	p, err := meanGradients(ctx, net, e)
	if err != nil {
		return nil, err
	}
	defer p.Close()
	var out []LayerMismatch
	for _, r := range p.convs {
		dw, per := p.at(r.gradW), len(r.layer.Weight)/r.out.C
		n := len(dw)
		w, wf, g, gf, gs := make([]float64, n), make([]float64, n), make([]float64, n), make([]float64, n), make([]float64, n)
		for j, i := range r.index {
			s := r.layer.Scale[int(i)/per]
			w[j], g[j] = float64(r.layer.Weight[i]), float64(dw[j])
			wf[j], gf[j], gs[j] = w[j]*s, g[j]/s, g[j]/(s*s)
		}
		out = append(out, LayerMismatch{r.layer.Name, Mismatch(wf, gf), Mismatch(w, g), Mismatch(w, gs)})
	}
	return out, nil
}

// FitOptions say how a scheme for a budget is found.
type FitOptions struct {
	Contrib *Contrib // what choices contribute; nil: GradientContribution of the examples
	Scheme  *Scheme  // takes this scheme and only checks that it fits
	Compile CompileOptions
}

// Plan is a scheme with the memory of its program.
type Plan struct {
	Scheme Scheme `json:"scheme"`
	Extra  int    `json:"extra_bytes"` // over inference, by the formula
	Peak   int    `json:"peak_bytes"`  // of the compiled program: what must fit
	Bound  int    `json:"lower_bound"` // no placement is smaller

	Inference int `json:"inference_bytes"`       // arena of the forward pass alone
	Full      int `json:"full_bytes"`            // training everything
	Late      int `json:"without_reorder_bytes"` // the scheme, all updates at the end

	MACs          int64         `json:"multiply_adds"`           // of a step
	InferenceMACs int64         `json:"inference_multiply_adds"` // of one forward pass
	Layers        []PlannedConv `json:"layers"`                  // that are trained, in execution order
	Buffers       []Buffer      `json:"buffers"`                 // by offset
	Operations    []string      `json:"operations"`
}

// PlannedConv is what is trained of a convolution.
type PlannedConv struct {
	Number   int    `json:"number"`
	Name     string `json:"name"`
	Biases   int    `json:"biases"`
	Channels int    `json:"channels"` // whose weights are trained
	Of       int    `json:"of_channels"`
	Weights  int    `json:"weights"`
}

// MakePlan compiles a scheme and says what it takes.
func MakePlan(net *Net, s Scheme, o CompileOptions) (*Plan, error) {
	o.Inference = false
	p, err := compile(net, &s, o, true)
	if err != nil {
		return nil, err
	}
	r := &Plan{Scheme: s, Extra: s.ExtraBytes(net), Peak: p.peak, Bound: p.LowerBound(), MACs: p.MACs(), Buffers: p.Buffers(), Operations: p.Operations()}
	late, all := o, Everything(net)
	late.NoReorder = true
	for _, v := range []struct {
		s    *Scheme
		o    CompileOptions
		peak *int
		macs *int64
	}{{&Scheme{}, CompileOptions{Inference: true}, &r.Inference, &r.InferenceMACs}, {&all, late, &r.Full, nil}, {&s, late, &r.Late, nil}} {
		q, err := compile(net, v.s, v.o, true)
		if err != nil {
			return nil, err
		}
		if *v.peak = q.peak; v.macs != nil {
			*v.macs = q.MACs()
		}
	}
	for i, c := range p.convs {
		if i < len(p.convs)-s.Biases {
			continue
		}
		l := PlannedConv{Number: i, Name: c.layer.Name, Biases: c.out.C, Of: c.in.C}
		if _, ok := s.Weights[i]; ok {
			l.Channels, l.Weights = len(c.channels), len(c.index)
		}
		r.Layers = append(r.Layers, l)
	}
	return r, nil
}

// Fit finds the scheme of greatest gain whose compiled program fits into so many bytes, by Exact under ever closer limits on
// the formula's memory. Errors: ErrBudget, with what the smallest training takes.
func Fit(ctx context.Context, net *Net, e *Examples, budget int, o FitOptions) (*Plan, error) {
	peak := func(s Scheme) (int, error) {
		p, err := compile(net, &s, o.Compile, true)
		if err != nil {
			return 0, err
		}
		return p.peak, nil
	}
	if o.Scheme != nil {
		need, err := peak(*o.Scheme)
		switch {
		case err != nil:
			return nil, err
		case need > budget:
			return nil, fmt.Errorf("%w: %d bytes; the scheme takes %d", ErrBudget, budget, need)
		}
		return MakePlan(net, *o.Scheme, o.Compile)
	}
	least, err := peak(Scheme{})
	switch {
	case err != nil:
		return nil, err
	case least > budget:
		return nil, fmt.Errorf("%w: %d bytes; the classifier alone takes %d", ErrBudget, budget, least)
	}
	c := o.Contrib
	if c == nil {
		if c, err = GradientContribution(ctx, net, e, nil); err != nil {
			return nil, err
		}
	}
	best := Choice{Ratio: nil, Gain: 0}
	lo, hi := c.MemBias[0], float64(budget)
	for try := 0; try < 24 && hi-lo > 1; try++ {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		limit := hi
		if try > 0 {
			limit = math.Floor((lo + hi) / 2)
		}
		x, err := Exact(c, limit)
		if err != nil {
			if errors.Is(err, ErrBudget) {
				break
			}
			return nil, err
		}
		need, err := peak(x.Scheme(c.Ratios))
		if err != nil {
			return nil, err
		}
		if need > budget {
			hi = min(limit, x.Memory)
			continue
		}
		if x.Gain > best.Gain {
			best = x
		}
		if lo = limit; try == 0 {
			break
		}
	}
	return MakePlan(net, best.Scheme(c.Ratios), o.Compile)
}

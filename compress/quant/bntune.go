package quant

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"

	"github.com/gomlx/compute"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/fold"
)

// BNTarget is what a batch norm promises of the output of the layer that it was folded into, channel by channel: mean
// Beta and variance Gamma².
type BNTarget struct {
	Gamma, Beta []float64
	Eps         float64 // of the norm; 0: 1e-5
}

// Weight is the gain with which the norm is put back, √(γ² + eps): together with running statistics β and γ² it leaves
// a perfect layer as it is (Hubara et al., arXiv:2006.10518, section 3.3).
func (t BNTarget) Weight() []float64 {
	w := make([]float64, len(t.Gamma))
	for i, g := range t.Gamma {
		w[i] = math.Sqrt(g*g + t.eps())
	}
	return w
}

func (t BNTarget) eps() float64 {
	if t.Eps == 0 {
		return 1e-5
	}
	return t.Eps
}

// Check reports a target that cannot be tuned to.
func (t BNTarget) Check() error {
	if len(t.Gamma) == 0 || len(t.Gamma) != len(t.Beta) {
		return fmt.Errorf("quant: batch norm target: %d gains and %d biases; want one of each per channel", len(t.Gamma), len(t.Beta))
	}
	if err := errors.Join(checkFinite64("gain", t.Gamma), checkFinite64("bias", t.Beta)); err != nil {
		return err
	}
	if !(t.Eps >= 0) {
		return fmt.Errorf("quant: batch norm target: eps %g; want at least 0", t.Eps)
	}
	if !slices.ContainsFunc(t.Gamma, func(g float64) bool { return g != 0 }) {
		return errors.New("quant: batch norm target: all gains are 0; there is no variance to restore")
	}
	return nil
}

// Fold returns the factor k of each output channel and its new bias when the measured mean and (biased) variance of the
// quantised output are moved to the target's: k = √(γ²+eps)/√(v+eps), b' = (b − μ)·k + β. A dead channel, of variance 0,
// gets a finite factor through eps.
func (t BNTarget) Fold(bias, mean, variance []float64) (k, b []float64, err error) {
	n := len(t.Gamma)
	if err := t.Check(); err != nil {
		return nil, nil, err
	}
	if len(bias) != n || len(mean) != n || len(variance) != n {
		return nil, nil, fmt.Errorf("quant: batch norm tuning: %d biases, %d means and %d variances for %d channels", len(bias), len(mean), len(variance), n)
	}
	k, b = t.Weight(), make([]float64, n)
	for i := range k {
		k[i] /= math.Sqrt(variance[i] + t.eps())
		b[i] = (bias[i]-mean[i])*k[i] + t.Beta[i]
	}
	return k, b, errors.Join(checkFinite64("factor", k), checkFinite64("bias", b))
}

// FoldBatchNorm is fold.BatchNorm that remembers what the norms promised of the layers that took them in, by the layers'
// names.
func FoldBatchNorm(net *nn.Network) (map[string]BNTarget, error) {
	norms := map[string]BNTarget{}
	for _, n := range net.Nodes {
		op, ok := n.Op.(nn.BatchNorm)
		if !ok {
			continue
		}
		t := BNTarget{Eps: op.Epsilon()}
		if g := net.Param(n, "w"); g != nil {
			t.Gamma = widen(g.Data())
		} else if m := net.Param(n, "mean"); m != nil {
			t.Gamma = slices.Repeat([]float64{1}, m.Value.Shape().Size())
		}
		if t.Beta = make([]float64, len(t.Gamma)); net.Param(n, "b") != nil {
			t.Beta = widen(net.Param(n, "b").Data())
		}
		norms[n.Name] = t
	}
	folded, err := fold.BatchNorm(net)
	if err != nil {
		return nil, err
	}
	targets := map[string]BNTarget{}
	for _, name := range folded { // the layer's value has taken the norm's name
		if n := net.Producer(name); n != nil {
			targets[n.Name] = norms[name]
		}
	}
	return targets, nil
}

// BNOptions say how TuneBN takes statistics. The zero value pools all cases exactly.
type BNOptions struct {
	Momentum float64 // weight of a new batch in a running average that starts at the target; 0: exact statistics of all cases
	Batch    int     // cases of a batch, with Momentum; 0: 50
}

// TuneBN restores the statistics of a quantised network whose batch norms are folded, in place: each layer that has a
// target is scaled and shifted, channel by channel, until its output on the examples has the target's mean and variance.
// It goes front to back, so that each layer's statistics are those of what the tuned layers before it give. Stored codes
// stay as they are; their scales and the layer's bias change. Nothing else is left at inference.
//
// Targets come from FoldBatchNorm. Cost: two passes over the examples and no gradient.
func TuneBN(ctx context.Context, b compute.Backend, net *nn.Network, calib compress.Examples, targets map[string]BNTarget, o BNOptions) error {
	if calib.Len() == 0 {
		return fmt.Errorf("quant: batch norm tuning: %w", ErrEmpty)
	}
	if len(targets) == 0 {
		return errors.New("quant: batch norm tuning: the network has no folded batch norm whose gain and bias are known; use bias correction or bias tuning")
	}
	if !(o.Momentum >= 0 && o.Momentum <= 1) || o.Batch < 0 {
		return fmt.Errorf("quant: batch norm tuning: momentum %g and batch %d; want a momentum in [0,1] and a batch of at least 0", o.Momentum, o.Batch)
	}
	for _, name := range slices.Sorted(maps.Keys(targets)) {
		if err := targets[name].Check(); err != nil {
			return fmt.Errorf("site %q: %w", name, err)
		}
		if n := net.Node(name); n == nil || !isQuantisable(n) {
			return fmt.Errorf("quant: batch norm tuning: the network has no dense layer or convolution %q", name)
		}
	}
	return compress.Walk(ctx, b, net, calib, func(n *nn.Node, value func(string) *tensors.Tensor) error {
		t, ok := targets[n.Name]
		if !ok {
			return nil
		}
		y, err := runSite(b, net, n, value(n.In[0]))
		if err != nil {
			return err
		}
		mean, variance, err := t.statistics(y, o)
		if err != nil {
			return err
		}
		k, bias, err := t.Fold(biasOf(net, n, len(t.Gamma)), mean, variance)
		if err != nil {
			return err
		}
		if err := scaleRows(net, n, k); err != nil {
			return err
		}
		setBias(net, n, bias)
		return nil
	})
}

// statistics are the mean and the biased variance of each channel (last axis), or running averages of those.
func (t BNTarget) statistics(y *tensors.Tensor, o BNOptions) (mean, variance []float64, err error) {
	x, channels := nn.Floats(y), len(t.Gamma)
	if d := y.Shape().Dimensions; d[len(d)-1] != channels {
		return nil, nil, fmt.Errorf("quant: batch norm tuning: %d channels and a target of %d", d[len(d)-1], channels)
	}
	if o.Momentum == 0 {
		mean, variance = channelMoments(x, channels)
		return mean, variance, nil
	}
	mean, variance = slices.Clone(t.Beta), make([]float64, channels)
	for i, g := range t.Gamma {
		variance[i] = g * g
	}
	per := len(x) / y.Shape().Dimensions[0]
	size := per * max(o.Batch, 1)
	if o.Batch == 0 {
		size = per * 50
	}
	for part := range slices.Chunk(x, size) {
		m, v := channelMoments(part, channels)
		for i := range m {
			mean[i] += o.Momentum * (m[i] - mean[i])
			variance[i] += o.Momentum * (v[i] - variance[i])
		}
	}
	return mean, variance, nil
}

// channelMoments are mean and biased variance over all but the last axis.
func channelMoments[F float32 | float64](x []F, channels int) (mean, variance []float64) {
	mean, variance = make([]float64, channels), make([]float64, channels)
	rows := float64(len(x) / channels)
	for i := 0; i < len(x); i += channels {
		for c, v := range x[i : i+channels] {
			mean[c] += float64(v)
		}
	}
	for c := range mean {
		mean[c] /= rows
	}
	for i := 0; i < len(x); i += channels {
		for c, v := range x[i : i+channels] {
			d := float64(v) - mean[c]
			variance[c] += d * d
		}
	}
	for c := range variance {
		variance[c] /= rows
	}
	return mean, variance
}

package quant

import (
	"context"
	"fmt"

	"github.com/gomlx/compute"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/nn"
)

// BiasCorrection returns the bias with which a quantised layer's output has, channel by channel, the mean of the float
// layer's: b − mean(y_q − y). y and yq are [..., channels], row-major.
func BiasCorrection[F float32 | float64](bias []float64, y, yq []F) ([]float64, error) {
	n := len(bias)
	if n == 0 || len(y) == 0 || len(y) != len(yq) || len(y)%n != 0 {
		return nil, fmt.Errorf("quant: bias correction: outputs of %d and %d values for %d channels", len(y), len(yq), n)
	}
	shift := make([]float64, n)
	for i := range y {
		shift[i%n] += float64(yq[i]) - float64(y[i])
	}
	rows := float64(len(y) / n)
	out := make([]float64, n)
	for c := range out {
		out[c] = bias[c] - shift[c]/rows
	}
	return out, checkFinite64("bias", out)
}

// CorrectBias gives the output of each selected dense layer and convolution of net, a quantised copy of ref, the mean per
// channel that it has in ref, in place and front to back: each layer is corrected on what the corrected layers before it
// give. A layer without a bias gets one. selected nil: all that are quantised.
func CorrectBias(ctx context.Context, b compute.Backend, ref, net *nn.Network, calib compress.Examples, selected func(site *nn.Node) bool) error {
	if calib.Len() == 0 {
		return fmt.Errorf("quant: bias correction: %w", ErrEmpty)
	}
	return compress.WalkPairs(ctx, b, ref, net, calib, func(p compress.Pair) error {
		n := p.Site
		if !isQuantisable(n) || selected != nil && !selected(n) || selected == nil && nn.IsPlain(n.Op) {
			return nil
		}
		y, err := runSite(b, net, n, p.Xq)
		if err != nil {
			return err
		}
		d := y.Shape().Dimensions
		bias, err := BiasCorrection(biasOf(net, n, d[len(d)-1]), nn.Floats(p.Y), nn.Floats(y))
		if err != nil {
			return err
		}
		setBias(net, n, bias)
		return nil
	})
}

// runSite computes the output of one site from its input.
func runSite(b compute.Backend, net *nn.Network, n *nn.Node, x *tensors.Tensor) (*tensors.Tensor, error) {
	if x == nil {
		return nil, fmt.Errorf("input %q has not been computed", n.In[0])
	}
	one := &nn.Network{Inputs: []nn.Input{{Name: n.In[0], Shape: x.Shape()}}, Nodes: []*nn.Node{n}, Outputs: n.Out[:1]}
	for _, p := range n.P {
		if q := net.Params.Get(p); q != nil {
			one.Params.Put(q)
		}
	}
	out, err := one.Run(b, []*tensors.Tensor{x})
	if err != nil {
		return nil, err
	}
	return out[0], nil
}

// biasOf is the bias of a dense layer or a convolution, zeros where it has none.
func biasOf(net *nn.Network, n *nn.Node, channels int) []float64 {
	if p := net.Param(n, "b"); p != nil {
		return widen(p.Data())
	}
	return make([]float64, channels)
}

// setBias gives a dense layer or a convolution a bias.
func setBias(net *nn.Network, n *nn.Node, bias []float64) {
	net.SetParam(n, "b", nn.Bias, narrow(bias), len(bias))
	switch op := n.Op.(type) {
	case nn.Dense:
		op.NoBias = false
		n.Op = op
	case nn.Conv:
		op.NoBias = false
		n.Op = op
	}
}

// scaleRows multiplies the rows of a site's weight, one per output channel, by positive factors: plain weights
// themselves, stored ones by their scales.
func scaleRows(net *nn.Network, n *nn.Node, k []float64) error {
	times := func(local string) error {
		p := net.Param(n, local)
		if p == nil || p.Value.Shape().Size()%len(k) != 0 {
			return fmt.Errorf("its parameter %q does not fit %d output channels", local, len(k))
		}
		d := p.Data()
		per := len(d) / len(k)
		for i := range d {
			d[i] = float32(float64(d[i]) * k[i/per])
		}
		net.SetParam(n, local, p.Role, d, p.Value.Shape().Dimensions...)
		return nil
	}
	switch r := n.Op.(nn.Linear).Repr().(type) {
	case nn.Plain:
		return times("w")
	case Uniform:
		if r.Axis == 0 {
			return times("scale")
		}
		s, z := net.Param(n, "scale"), net.Param(n, "zero")
		if s == nil || z == nil {
			return fmt.Errorf("its scale or its zero point is missing")
		}
		scale, zero := make([]float32, len(k)), make([]float32, len(k))
		for i := range k {
			scale[i], zero[i] = float32(float64(s.Data()[0])*k[i]), z.Data()[0]
		}
		net.SetParam(n, "scale", s.Role, scale, len(k))
		net.SetParam(n, "zero", z.Role, zero, len(k))
		n.Op = n.Op.(nn.Linear).WithRepr(Uniform{Bits: r.Bits})
		return nil
	case Table:
		if r.Scaled {
			return times("scale")
		}
		net.SetParam(n, "scale", nn.Constant, narrow(k), len(k))
		r.Scaled = true
		n.Op = n.Op.(nn.Linear).WithRepr(r)
		return nil
	default:
		return fmt.Errorf("its weight is stored as %s, whose rows cannot be scaled", r.Kind())
	}
}

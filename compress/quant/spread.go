package quant

import (
	"fmt"
	"math"

	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/nn"
)

// SpreadChannels makes the channel ranges of every norm that only dense layers read uneven without changing the
// function: gain and bias of channel d are multiplied by t_d = exp(u), u uniform in [-ln factor, ln factor], and the
// readers' columns divided by it. Small networks trained here have mild channel variation; ranges of large vision
// transformers differ by tens of times, as after SpreadChannels with factor 6. It works in place and returns the norms
// that it changed.
func SpreadChannels(net *nn.Network, factor float64, seed uint64) (norms []string, err error) {
	if !(factor >= 1) || math.IsInf(factor, 0) {
		return nil, fmt.Errorf("quant: spread factor %g; accepted: at least 1", factor)
	}
	r := rng.New(seed, "spread-channels")
	return scaleChannels(net, func(scale []float64) {
		for i := range scale {
			scale[i] = math.Exp((2*r.Float64() - 1) * math.Log(factor))
		}
	})
}

// OutlierChannels makes some channels of every norm that only dense layers read stick out without changing the function:
// gain and bias of n channels, drawn for each norm, are multiplied by factor, and the readers' columns divided by it. It
// works in place and returns the norms that it changed.
func OutlierChannels(net *nn.Network, n int, factor float64, seed uint64) (norms []string, err error) {
	if !(factor > 0) || math.IsInf(factor, 0) || n < 0 {
		return nil, fmt.Errorf("quant: %d outlier channels by a factor of %g; accepted: at least 0, above 0", n, factor)
	}
	r := rng.New(seed, "outlier-channels")
	return scaleChannels(net, func(scale []float64) {
		for k, i := range r.Perm(len(scale)) {
			if scale[i] = 1; k < n {
				scale[i] = factor
			}
		}
	})
}

// scaleChannels multiplies the channels of every norm that only dense layers read by what draw gives, and divides the
// readers' columns by it.
func scaleChannels(net *nn.Network, draw func(scale []float64)) (norms []string, err error) {
	t, err := findTransformer(net)
	if err != nil {
		return nil, err
	}
	for _, n := range net.Nodes {
		readers := t.norms[n.Name]
		gain := net.Param(n, "w")
		if len(readers) == 0 || gain == nil {
			continue
		}
		g := gain.Data()
		scale := make([]float64, len(g))
		draw(scale)
		for i := range g {
			g[i] = float32(float64(g[i]) * scale[i])
		}
		net.SetParam(n, "w", nn.Gain, g, len(g))
		if p := net.Param(n, "b"); p != nil {
			b := p.Data()
			for i := range b {
				b[i] = float32(float64(b[i]) * scale[i])
			}
			net.SetParam(n, "b", nn.Bias, b, len(b))
		}
		for _, d := range readers {
			p := net.Param(d, "w")
			w := p.Data()
			for i := range w {
				w[i] = float32(float64(w[i]) / scale[i%len(scale)])
			}
			net.SetParam(d, "w", nn.Weight, w, p.Value.Shape().Dimensions...)
		}
		norms = append(norms, n.Name)
	}
	return norms, nil
}

package quant

import (
	"fmt"
	"math"
	"slices"
)

// NormParams are the gain and bias of a LayerNorm or RMSNorm over d channels.
type NormParams struct {
	Name  string // for messages
	Gamma []float64
	Beta  []float64 // nil: the norm has no bias (RMSNorm)
}

// LinearParams are the weights of a linear layer, y = W x + bias, that reads a norm.
type LinearParams struct {
	Name string
	W    []float64 // [Out, d], row-major
	Out  int
	Bias []float64 // [Out]; nil: none, and the rewrite creates one when it needs one
}

// Target condenses channel-wise scales, or zero points, into one number.
type Target func(v []float64) float64

// TargetMean is the mean, RepQ-ViT's choice (equal values give exactly that value).
func TargetMean(v []float64) float64 {
	if i := slices.IndexFunc(v, func(x float64) bool { return x != v[0] }); i < 0 {
		return v[0]
	}
	var sum float64
	for _, x := range v {
		sum += x
	}
	return sum / float64(len(v))
}

// TargetMedian is the lower median, DopQ-ViT's choice (arXiv:2408.03291): a few outlying channels do not move it.
func TargetMedian(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	return s[(len(s)-1)/2]
}

// TargetMax is the greatest value.
func TargetMax(v []float64) float64 { return slices.Max(v) }

// ReparamOptions are the knobs of ReparamNorm; the zero value is the default.
type ReparamOptions struct {
	// Target chooses the common scale and zero point from the channels'. If nil: TargetMean.
	Target Target
	// Choose, if not nil, chooses both at once, in place of Target.
	Choose func(s, z []float64) (sT, zT float64)
	// FractionalZero keeps the common zero point as Target gives it, as the paper's reference code does. If false it
	// is rounded half to even: then the codes of the rewritten activation under the common grid equal the channel-wise
	// codes of the original one, and the zero point is a true integer.
	FractionalZero bool
	// AddBeta gives a norm without bias one when the rewrite needs it. If false, such a norm is refused unless all
	// zero points are equal (symmetric quantisation).
	AddBeta bool
}

// common condenses the channels' scales and zero points.
func (o ReparamOptions) common(s, z []float64) (sT, zT float64) {
	if o.Choose != nil {
		sT, zT = o.Choose(s, z)
	} else {
		target := o.Target
		if target == nil {
			target = TargetMean
		}
		sT, zT = target(s), target(z)
	}
	if !o.FractionalZero {
		zT = math.RoundToEven(zT)
	}
	return sT, zT
}

// checkScales refuses scales of channels that are not positive numbers.
func checkScales(s []float64) error {
	for i, v := range s {
		if !(v > 0) || math.IsInf(v, 0) {
			return fmt.Errorf("scale of channel %d is %g; it must be positive", i, v)
		}
	}
	return nil
}

// ReparamNorm folds channel-wise activation scales s and zero points z, one per channel of the norm, into the norm and
// every linear layer that reads it, in place, so that one scale and one zero point serve all channels
// (arXiv:2212.08254, section 3.2):
//
//	s~ = target(s), z~ = round(target(z)),  r = s/s~,  b = s~(z~ - z)
//	gamma' = gamma/r, beta' = beta/r - b,   W' = W diag(r), bias' = bias + W' b
//
// The float function does not change. The weights' own grids must be fitted again, since r widens the rows of W.
// Errors name the layer: s <= 0, a consumer of another width, a norm without bias (see AddBeta), NaN.
func ReparamNorm(n *NormParams, consumers []*LinearParams, s, z []float64, o ReparamOptions) (sT, zT float64, err error) {
	d := len(n.Gamma)
	switch {
	case d == 0:
		return 0, 0, fmt.Errorf("quant: norm %q has no channels", n.Name)
	case len(s) != d || len(z) != d:
		return 0, 0, fmt.Errorf("quant: norm %q: %d scales and %d zero points for %d channels", n.Name, len(s), len(z), d)
	case n.Beta != nil && len(n.Beta) != d:
		return 0, 0, fmt.Errorf("quant: norm %q: %d biases for %d channels", n.Name, len(n.Beta), d)
	}
	if err := checkScales(s); err != nil {
		return 0, 0, fmt.Errorf("quant: norm %q: %w", n.Name, err)
	}
	if err := checkFinite64(fmt.Sprintf("norm %q: zero point", n.Name), z); err != nil {
		return 0, 0, err
	}
	for _, c := range consumers {
		if c.Out <= 0 || len(c.W) != c.Out*d {
			return 0, 0, fmt.Errorf("quant: %q reads norm %q of %d channels but its %d weights in %d rows have %d columns",
				c.Name, n.Name, d, len(c.W), c.Out, len(c.W)/max(1, c.Out))
		}
		if c.Bias != nil && len(c.Bias) != c.Out {
			return 0, 0, fmt.Errorf("quant: %q: %d biases for %d rows", c.Name, len(c.Bias), c.Out)
		}
		if err := checkFinite64(fmt.Sprintf("%q: weight", c.Name), c.W); err != nil {
			return 0, 0, err
		}
	}
	sT, zT = o.common(s, z)
	if !(sT > 0) || math.IsInf(sT, 0) || math.IsNaN(zT) || math.IsInf(zT, 0) {
		return 0, 0, fmt.Errorf("quant: norm %q: target scale %g and zero point %g", n.Name, sT, zT)
	}
	r, b := make([]float64, d), make([]float64, d)
	shifts := false
	for i := range d {
		r[i] = s[i] / sT
		b[i] = sT * (zT - z[i]) // = m_d/r_d - m~ with m = -z s
		shifts = shifts || b[i] != 0
	}
	if n.Beta == nil && shifts {
		if !o.AddBeta {
			return 0, 0, fmt.Errorf("quant: norm %q has no bias to absorb the zero points; give it one (AddBeta) or quantise its output symmetrically", n.Name)
		}
		n.Beta = make([]float64, d)
	}
	for i := range d {
		n.Gamma[i] /= r[i]
		if n.Beta != nil {
			n.Beta[i] = n.Beta[i]/r[i] - b[i]
		}
	}
	for _, c := range consumers {
		if c.Bias == nil && shifts {
			c.Bias = make([]float64, c.Out)
		}
		for row := range c.Out {
			w := c.W[row*d : (row+1)*d]
			var sum float64
			for i := range w {
				w[i] *= r[i]
				sum += w[i] * b[i]
			}
			if c.Bias != nil {
				c.Bias[row] += sum
			}
		}
	}
	return sT, zT, nil
}

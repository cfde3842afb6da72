package nn

import (
	"errors"
	"fmt"
	"math"
)

// AffineNorm is a norm that at inference is a fixed scale and shift per channel, y = scale·x + shift, because its
// statistics are running ones. nn/fold merges such norms into the linear maps around them.
type AffineNorm interface {
	Norm
	// Affine gives the scale and the shift, one entry per channel. p returns a copy of the node's parameter of that local
	// name, nil where it has none. The error wraps ErrNotAffine where the norm, as it is set, is no such map: it then
	// stays in the network. Any other error refuses the folding, for example of a norm that was never trained.
	Affine(p func(local string) []float64) (scale, shift []float64, err error)
}

// ErrNotAffine says that a norm depends on more than its running statistics at inference.
var ErrNotAffine = errors.New("the norm is not a fixed scale and shift per channel")

var _ AffineNorm = BatchNorm{}

// Affine is gain/√(var + eps) and bias − mean·scale. With Always it is ErrNotAffine.
func (d BatchNorm) Affine(p func(local string) []float64) (scale, shift []float64, err error) {
	if d.Always {
		return nil, nil, fmt.Errorf("%w: it takes the statistics of every batch", ErrNotAffine)
	}
	mean, variance, gain, bias := p("mean"), p("var"), p("w"), p("b")
	n := len(mean)
	if len(variance) != n || gain != nil && len(gain) != n || bias != nil && len(bias) != n {
		return nil, nil, fmt.Errorf("batch norm: %d means, %d variances, %d gains and %d biases do not belong together", n, len(variance), len(gain), len(bias))
	}
	scale, shift = make([]float64, n), make([]float64, n)
	for i := range mean {
		scale[i] = 1 / math.Sqrt(variance[i]+d.Epsilon())
		if gain != nil {
			scale[i] *= gain[i]
		}
		if shift[i] = -mean[i] * scale[i]; bias != nil {
			shift[i] += bias[i]
		}
	}
	return scale, shift, nil
}

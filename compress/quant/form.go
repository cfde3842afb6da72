package quant

import (
	"context"
	"fmt"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/nn"
)

// RoundForm is the form, for compress.Sensitivity, of a site that is rounded to nearest: its weight on the grid of WeightGrid,
// one scale per output channel, and the activation that it reads on one grid over its range. Weight or Act of 32 bits, or
// a site without a range, leave the one or the other in float.
func RoundForm(bits compress.Bits, ranges map[string]compress.Range) compress.Form {
	return compress.Form{Name: fmt.Sprintf("w%da%d", bits.Weight, bits.Act), Put: func(_ context.Context, net *nn.Network, n *nn.Node) error {
		if !isQuantisable(n) {
			return fmt.Errorf("site %q is a %s: %w", n.Name, n.Op.Kind(), compress.ErrForm)
		}
		if r, ok := ranges[n.Name]; ok && bits.Act != 32 {
			s, z := RangeAffine(r.Lo, r.Hi, bits.Act)
			if _, err := insertQuantizer(net, n, 0, nn.QuantizeDequantize{Bits: bits.Act}, []float64{s}, []float64{z}); err != nil {
				return err
			}
		}
		if bits.Weight == 32 {
			return nil
		}
		s, err := siteOf(net, n)
		if err != nil {
			return fmt.Errorf("%w: %w", err, compress.ErrForm)
		}
		grid, err := WeightGrid{Bits: bits.Weight}.Fit(s)
		if err != nil {
			return err
		}
		_, err = storeOnGrid(net, n, s, grid)
		return err
	}}
}

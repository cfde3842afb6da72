package quant

import (
	"fmt"
	"math"
	"slices"

	"gonum.org/v1/gonum/mat"
)

// OutlierReport says how uneven a norm's channel-wise scales are and how well a common one stands for them.
type OutlierReport struct {
	Channels int
	Outliers []int // channels whose scale is above three times the median

	Median, Mean       float64 // of the scales; the lower median
	MADMedian, MADMean float64 // mean absolute deviation (1/D)Σ|s_d - s~| from the median and from the mean
	// FarMedian and FarMean are the shares of channels that the common scale stretches or shrinks by more than 1.5:
	// |log(s_d/s~)| > log 1.5 with s~ the median and the mean.
	FarMedian, FarMean float64
}

// MOSF chooses the common scale and zero point that stand for channel-wise ones (median scaling factor of DopQ-ViT,
// arXiv:2408.03291): t(s) and t(z), two independent statistics. With t nil they are the lower medians, which keep whole
// zero points whole and which a few outlying channels do not move; the median minimises the mean absolute deviation.
//
// What the choice can change: where the scale is folded into the norm and its readers (ReparamNorm), the zero point is
// whole and the weights are fitted again, s~ is a gauge. Multiplying it by k multiplies all of W' and its grid by 1/k and
// changes no code. Only z~ matters then, through the size of what multiplies the weights' errors. The scale itself
// counts where weight grids are kept, where zero points are fractional, and where nothing can be folded.
//
// Errors: no channels, different numbers of scales and zero points, a scale that is not positive (naming the channel),
// ErrNotFinite.
func MOSF(s, z []float64, t Target) (sT, zT float64, rep OutlierReport, err error) {
	if len(s) == 0 || len(z) != len(s) {
		return 0, 0, rep, fmt.Errorf("quant: %d scales and %d zero points of channels", len(s), len(z))
	}
	if err := checkScales(s); err != nil {
		return 0, 0, rep, fmt.Errorf("quant: %w", err)
	}
	if err := checkFinite64("zero point", z); err != nil {
		return 0, 0, rep, err
	}
	if t == nil {
		t = TargetMedian
	}
	sT, zT = t(s), t(z)
	if !(sT > 0) || math.IsInf(sT, 0) || math.IsNaN(zT) || math.IsInf(zT, 0) {
		return 0, 0, rep, fmt.Errorf("quant: common scale %g and zero point %g; the scale must be positive and both finite", sT, zT)
	}
	rep = OutlierReport{Channels: len(s), Median: TargetMedian(s), Mean: TargetMean(s)}
	far := func(v, by float64) float64 {
		if math.Abs(math.Log(v/by)) > math.Log(1.5) {
			return 1 / float64(len(s))
		}
		return 0
	}
	for d, v := range s {
		if v > 3*rep.Median {
			rep.Outliers = append(rep.Outliers, d)
		}
		rep.MADMedian += math.Abs(v-rep.Median) / float64(len(s))
		rep.MADMean += math.Abs(v-rep.Mean) / float64(len(s))
		rep.FarMedian += far(v, rep.Median)
		rep.FarMean += far(v, rep.Mean)
	}
	return sT, zT, rep, nil
}

// searchRows is how many rows of a norm's output the search for its scale looks at.
const searchRows = 256

// searchScale tries common scales and zero points for a norm and keeps the pair with the least mean squared error of what
// its readers give, their weights quantised too. First the scale: mean and median of both, then median zero point with
// the mean scale and ten quantiles of the scales; then, at the best scale, mean and ten quantiles of the zero points.
// Strictly less wins, so that the median stays where the choice is a gauge.
func searchScale(c normChoice, f Folding) (scale, zero float64, err error) {
	s, z := c.grid.Scale, c.grid.Zero
	t := newScaleTrial(c, f)
	scale, zero = TargetMedian(s), TargetMedian(z)
	least, err := t.error(scale, zero)
	if err != nil {
		return 0, 0, err
	}
	try := func(sT, zT float64) error {
		e, err := t.error(sT, zT)
		if err == nil && e < least*(1-1e-6) {
			least, scale, zero = e, sT, zT
		}
		return err
	}
	if err := try(TargetMean(s), TargetMean(z)); err != nil {
		return 0, 0, err
	}
	zM := TargetMedian(z)
	for _, sT := range append([]float64{TargetMean(s)}, quantiles(s, tenths)...) {
		if err := try(sT, zM); err != nil {
			return 0, 0, err
		}
	}
	best := scale
	for _, zT := range append([]float64{TargetMean(z)}, quantiles(z, tenths)...) {
		if err := try(best, zT); err != nil {
			return 0, 0, err
		}
	}
	return scale, zero, nil
}

// tenths are ten quantiles from the least to the greatest value.
var tenths = []float64{0, 1. / 9, 2. / 9, 3. / 9, 4. / 9, 5. / 9, 6. / 9, 7. / 9, 8. / 9, 1}

// scaleTrial measures common scales on a norm's readers.
type scaleTrial struct {
	normChoice
	folding Folding
	d, n    int
	want    []*mat.Dense // of each reader, [n, out], without bias
}

func newScaleTrial(c normChoice, f Folding) *scaleTrial {
	d := len(c.grid.Scale)
	t := &scaleTrial{normChoice: c, folding: f, d: d, n: len(c.rows) / d}
	x := mat.NewDense(t.n, d, widen(c.rows))
	for _, r := range c.readers {
		y := mat.NewDense(t.n, r.Out, nil)
		y.Mul(x, mat.NewDense(r.Out, d, r.W).T())
		t.want = append(t.want, y)
	}
	return t
}

// error is the mean squared error of the readers' outputs with a common scale and zero point.
func (t *scaleTrial) error(scale, zero float64) (float64, error) {
	if t.folding != FoldFractional {
		zero = math.RoundToEven(zero)
	}
	grid := Affine{Bits: t.grid.Bits, Axis: -1, Scale: []float64{scale}, Zero: []float64{zero}}
	x := slices.Clone(t.rows)
	r, b := make([]float64, t.d), make([]float64, t.d) // x' = x/r - b, W' = W diag(r)
	for i := range t.d {
		if r[i] = 1; t.folded {
			r[i], b[i] = t.grid.Scale[i]/scale, scale*(zero-t.grid.Zero[i])
		}
	}
	for i := range x {
		x[i] = float32(float64(x[i])/r[i%t.d] - b[i%t.d])
	}
	xq, err := grid.FakeQuant(x, []int{len(x)})
	if err != nil {
		return 0, err
	}
	in := mat.NewDense(t.n, t.d, widen(xq))
	var sum float64
	size := 0
	for k, l := range t.readers {
		w := make([]float32, len(l.W))
		bias := make([]float64, l.Out) // W' b
		for i, v := range l.W {
			w[i] = float32(v * r[i%t.d])
			bias[i/t.d] += v * r[i%t.d] * b[i%t.d]
		}
		if bits := t.bits[k]; bits != 32 {
			fit := w
			if t.folding == FoldFrozen || !t.folded {
				fit = narrow(l.W)
			}
			shape := []int{l.Out, t.d}
			g, err := WeightGrid{Bits: bits}.Fit(&Site{Name: l.Name, Weight: fit, Shape: shape})
			if err != nil {
				return 0, err
			}
			if w, err = g.FakeQuant(w, shape); err != nil {
				return 0, err
			}
		}
		y := mat.NewDense(t.n, l.Out, nil)
		y.Mul(in, mat.NewDense(l.Out, t.d, widen(w)).T())
		for i := range t.n {
			for o := range l.Out {
				d := y.At(i, o) + bias[o] - t.want[k].At(i, o)
				sum += d * d
			}
		}
		size += t.n * l.Out
	}
	return sum / float64(max(1, size)), nil
}

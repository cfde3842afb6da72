package quant

import (
	"context"
	"fmt"

	"github.com/gomlx/compute"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/nn"
)

// NormScale is how DopQViT chooses the one scale (and zero point) that stands for a norm's channels.
type NormScale string

const (
	// ScaleMedian is the lower median: the method's, which a few outlying channels do not move.
	ScaleMedian NormScale = "median"
	// ScaleMean is RepQ-ViT's.
	ScaleMean NormScale = "mean"
	// ScaleMax is the greatest scale; outliers decide it.
	ScaleMax NormScale = "max"
	// ScaleMinMax is the grid of the whole tensor's range, which the widest channel decides, for FoldNone: a baseline.
	ScaleMinMax NormScale = "min-max"
	// ScaleSearch tries median, mean and ten quantiles and keeps what gives the least error of the readers' outputs.
	ScaleSearch NormScale = "search"
)

// Folding is what becomes of a norm's channel-wise scales in DopQViT.
type Folding string

const (
	// FoldRefit folds them into the norm and its readers and fits the readers' weight grids again. With whole zero points
	// the common scale is then a gauge: see MOSF.
	FoldRefit Folding = "refit"
	// FoldFrozen folds them, but keeps the weight grids fitted before.
	FoldFrozen Folding = "frozen"
	// FoldFractional is FoldRefit with the common zero point as the statistic gives it, not rounded, as in RepQ-ViT's
	// reference code. The lower median of whole zero points is whole; the mean is not.
	FoldFractional Folding = "fractional"
	// FoldNone folds nothing: the common scale is used as it is.
	FoldNone Folding = "none"
)

// UnfoldShared, beside SplitShared and RefuseShared, uses the common scale as it is for the linear readers of a norm that
// something else reads, too. It needs no further norm, but the median clips outlying channels, which in a trained post-norm
// network may be the ones that matter (all-MiniLM-L6-v2 is lost at 8 bits).
const UnfoldShared SharedNorms = "unfold"

// DopQViT quantises a trained vision transformer after training, from about 32 unlabelled examples, without a gradient
// step (Yang, Gong, Gu, DopQ-ViT, arXiv:2408.03291). It is RepQViT with two parts exchanged: attention probabilities go
// to a tangent grid (TanQ), which is fine near 0 and near 1, where log grids are coarse; and the scale that stands for a
// norm's channels is the median of theirs (MOSF), not their mean, which a few outlying channels drag along. Everything
// else (which tensor gets which grid, calibration, order, refitted weights) is as described there.
//
// A norm that also feeds something that cannot take up a scale, such as the residual of a post-norm network, is copied for
// its linear readers, or the common scale is used as it is (Shared).
//
// Prefer it to RepQViT at every number of bits where a kernel can look up a table of 2^bits levels; RepQViT's log grid
// runs on shifts. Cost: as RepQViT and a search of 336 grids per attention layer, about 0.1 s each.
//
// The paper's 4-bit figures on ImageNet are far above RepQ-ViT's; they may include a reconstruction of the weights, which
// its abstract does not name. Fit adds RepQuant's as a third stage.
//
// The zero value is W4A4.
type DopQViT struct {
	compress.Options

	WeightBits int // 2 to 8; 0: 4
	ActBits    int // 2 to 8, or 32: activations stay in float; 0: 4
	InputBits  int // of the network's input, 2 to 8, or 32; 0: 8, or 32 with ActBits 32

	Scale   NormScale   // "": ScaleMedian
	Folding Folding     // "": FoldRefit
	Shared  SharedNorms // "": SplitShared; not asked with FoldNone
	TanQ    TanQOptions // of the search for the attention's grid; Seed, Values, Keys and Width are set by the method

	// Fit, if not nil, fits the weights of dense layers to the float network's outputs, in the order in which the layers run
	// (RepQuant, Reconstruct): the third stage. It wants some 128 examples, and not FoldFrozen.
	Fit *ReconstructOptions

	// Outliers, if not nil, is told how uneven each norm's channels are.
	Outliers func(norm string, r OutlierReport)

	// SkipSiteErrors leaves Result.Sites without output errors, which cost two more passes over the examples.
	SkipSiteErrors bool
}

var _ compress.Method = DopQViT{}

// Compress returns a quantised copy of net. Errors: ErrBits; ErrEmpty; ErrNotFinite, naming the layer; ErrSharedNorm with
// RefuseShared; ErrSingular with Fit; a network without a norm in front of linear layers and without attention.
func (q DopQViT) Compress(ctx context.Context, b compute.Backend, net *nn.Network, calib compress.Examples) (*compress.Result, error) {
	r := RepQViT{
		Options: q.Options, WeightBits: q.WeightBits, ActBits: q.ActBits, InputBits: q.InputBits,
		SkipSiteErrors: q.SkipSiteErrors,
	}
	switch q.Folding {
	case "", FoldRefit:
		q.Folding = FoldRefit
	case FoldFrozen:
		r.NoRefit = true
	case FoldFractional:
		r.Reparam.FractionalZero = true
	case FoldNone:
		r.Norms = Unfolded
	default:
		return nil, fmt.Errorf("quant: dopq-vit: folding %q; accepted: %s, %s, %s, %s", q.Folding, FoldRefit, FoldFrozen, FoldFractional, FoldNone)
	}
	if q.Folding == FoldFrozen && q.Fit != nil {
		return nil, fmt.Errorf("quant: dopq-vit: folding %q keeps the weight grids that Fit chooses anew; use one of the two", q.Folding)
	}
	switch q.Scale {
	case "":
		q.Scale = ScaleMedian
	case ScaleMedian, ScaleMean, ScaleMax, ScaleSearch:
	case ScaleMinMax:
		if q.Folding != FoldNone {
			return nil, fmt.Errorf("quant: dopq-vit: scale %q is that of the whole tensor; it needs folding %q", q.Scale, FoldNone)
		}
	default:
		return nil, fmt.Errorf("quant: dopq-vit: scale %q; accepted: %s, %s, %s, %s, %s", q.Scale, ScaleMedian, ScaleMean, ScaleMax, ScaleSearch, ScaleMinMax)
	}
	if _, err := q.TanQ.withDefaults(); err != nil {
		return nil, fmt.Errorf("quant: dopq-vit: %w", err)
	}
	uneven := &unevenness{}
	v := repqVariant{name: "dopq-vit", softmax: q.tangent}
	switch q.Shared {
	case "", SplitShared:
		v.split = q.Folding != FoldNone
	case UnfoldShared:
		v.unfold = true
	case RefuseShared:
	default:
		return nil, fmt.Errorf("quant: dopq-vit: shared norms %q; accepted: %s, %s, %s", q.Shared, SplitShared, UnfoldShared, RefuseShared)
	}
	v.target = func(c normChoice) (float64, float64, error) { return q.choose(c, uneven) }
	if q.Scale == ScaleSearch {
		v.rows = searchRows
	}
	if q.Fit != nil {
		fitter, last := RepQuant{Fit: *q.Fit}, fitInput{}
		v.fit = func(_ context.Context, w *repqWalk, n *nn.Node, s *Site, xq *tensors.Tensor, pair compress.Pair) (*fittedWeight, error) {
			f, _, err := fitter.fit(w, n, s, xq, pair, &last)
			return f, err
		}
	}
	res, err := r.compress(ctx, b, net, calib, v)
	if err != nil {
		return nil, err
	}
	res.Notes = append(res.Notes, uneven.notes()...)
	return res, nil
}

// tangent puts the tangent quantiser in front of attention probabilities.
func (q DopQViT) tangent(w *repqWalk, n *nn.Node, p point, bits int, value func(string) *tensors.Tensor) (*nn.Node, error) {
	var grid TanQ
	_, err := w.Journal.Do(fmt.Sprintf("%s/attention/%s/%d", w.name, n.Name, p.input), &grid, func() (err error) {
		o := q.TanQ
		o.Seed = q.Seed
		a := value(n.In[p.input])
		if v := value(n.In[1]); o.Metric == TanQOutput {
			if p.input != 0 || v == nil || v.Shape().Rank() != a.Shape().Rank() {
				return fmt.Errorf("the attention's values are not the right-hand side of its product; use the metric %s", TanQAttention)
			}
			d := v.Shape().Dimensions
			o.Values, o.Keys, o.Width = nn.Floats(v), d[len(d)-2], d[len(d)-1]
		}
		grid, _, err = CalibrateTanQ(nn.Floats(a), bits, o)
		return err
	})
	if err != nil {
		return nil, err
	}
	op := TanQuantize{Bits: bits}
	node, err := insertQuantizer(w.net, n, p.input, op, []float64{grid.Scale}, nil)
	if err != nil {
		return nil, err
	}
	return node, op.SetGrid(w.net, node, grid)
}

// choose picks a norm's common scale and zero point.
func (q DopQViT) choose(c normChoice, uneven *unevenness) (scale, zero float64, err error) {
	target := map[NormScale]Target{ScaleMedian: TargetMedian, ScaleMean: TargetMean, ScaleMax: TargetMax}[q.Scale]
	scale, zero, rep, err := MOSF(c.grid.Scale, c.grid.Zero, target)
	if err != nil {
		return 0, 0, fmt.Errorf("norm %q: %w", c.norm, err)
	}
	uneven.add(rep)
	if q.Outliers != nil {
		q.Outliers(c.norm, rep)
	}
	switch q.Scale {
	case ScaleSearch:
	case ScaleMinMax:
		scale, zero = RangeAffine(c.lo, c.hi, c.grid.Bits)
		return scale, zero, nil
	default:
		return scale, zero, nil
	}
	var best struct{ Scale, Zero float64 }
	_, err = q.Journal.Do("dopq-vit/scale/"+c.norm, &best, func() (err error) {
		best.Scale, best.Zero, err = searchScale(c, q.Folding)
		return err
	})
	return best.Scale, best.Zero, err
}

// unevenness sums the outlier reports up.
type unevenness struct {
	norms, channels, outliers, with int
	farMedian, farMean              float64
}

func (u *unevenness) add(r OutlierReport) {
	u.norms++
	u.channels += r.Channels
	u.outliers += len(r.Outliers)
	if len(r.Outliers) > 0 {
		u.with++
	}
	u.farMedian += r.FarMedian
	u.farMean += r.FarMean
}

func (u *unevenness) notes() []string {
	if u.norms == 0 {
		return nil
	}
	n := float64(u.norms)
	return []string{fmt.Sprintf("%d of %d norm channels, in %d of %d norms, have more than three times the median scale; the median stretches or shrinks %.0f %% of the channels by more than 1.5, the mean %.0f %%",
		u.outliers, u.channels, u.with, u.norms, 100*u.farMedian/n, 100*u.farMean/n)}
}

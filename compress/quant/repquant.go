package quant

import (
	"context"
	"fmt"
	"math"

	"github.com/gomlx/compute"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/nn"
)

// SharedNorms is what RepQuant does with a norm that feeds linear layers and something else, as in post-norm networks.
type SharedNorms string

const (
	// SplitShared gives the linear layers a copy of the norm, which takes their scale up: exact, for one more norm.
	SplitShared SharedNorms = "split"
	// RefuseShared fails with ErrSharedNorm.
	RefuseShared SharedNorms = "refuse"
)

// RepQuant quantises weights and activations of a trained transformer to 3 to 6 bits from some 128 unlabelled examples
// (Li, Liu, Zhang, Gu, arXiv:2402.05628). It goes the way of RepQViT, whose successor it is, and adds two steps that
// learn, layer by layer and in the order in which the layers run, so that each sees what the finished network in front of
// it gives:
//
//   - the grid of each channel of a norm's output is learnt against the output error of its readers, clipped from above
//     and below (DualClip), before the channels' scales are folded into the norm and its readers (ReparamNorm);
//   - the weight of each dense layer is fitted, column by column, to the float network's outputs on the inputs which the
//     quantised network gives it (Reconstruct), and its bias absorbs the mean error that is left.
//
// Nothing of this is left at inference: grids of one scale per activation and per row of a weight, as RepQViT leaves them.
// Convolutions are rounded as RepQViT does, embeddings stay in float. Networks that are post-norm (BERT) are served: their
// norms also feed the residual stream and cannot take up a scale, so linear layers get a copy of the norm that can.
//
// Cost: beside RepQViT's walk, one run of the float network, 200 small steps per norm and O(n·d² + d³ + out·d²) in float64
// per layer of d inputs on n tokens: 2 s for the ViT of the experiments, a minute for a sentence encoder of 22 million
// parameters. From 6 bits on it buys little over RepQViT. Where an encoder has a mask of its tokens, padding does not count.
//
// The zero value is W4A4.
type RepQuant struct {
	compress.Options

	WeightBits int // 2 to 8; 0: 4
	ActBits    int // 2 to 8, or 32: activations stay in float, nothing is clipped; 0: 4
	InputBits  int // of the network's input, 2 to 8, or 32; 0: 8, or 32 with ActBits 32

	Norms   NormGranularity // "": Reparameterized; ChannelWise is the upper bound that integer kernels cannot use
	Softmax SoftmaxGrid     // "": SoftmaxLogSqrt2
	Reparam ReparamOptions  // as in RepQViT
	// Symmetric gives all channels of a norm one zero point in the middle, so that a norm without a bias (RMSNorm) needs
	// none. False: such a norm gets a bias.
	Symmetric bool
	Shared    SharedNorms // "": SplitShared

	NoClip      bool               // channels' grids by percentiles, as RepQViT has them: an ablation
	Clip        DualClipOptions    // its Seed and Symmetric are set from those of the method
	NoFit       bool               // weights rounded to nearest, as RepQViT does: an ablation
	Fit         ReconstructOptions // its Ridge 0: HeldOutRidge
	RoundedHead bool               // layers that give the network's outputs are rounded to nearest

	// SkipSiteErrors leaves Result.Sites without output errors, which cost two more passes over the examples.
	SkipSiteErrors bool
	// Trace, if not nil, is told of every norm and layer as it is done. What a journal restores is not told.
	Trace func(RepQuantLayer)
}

// RepQuantLayer is what RepQuant learnt about a norm or a layer.
type RepQuantLayer struct {
	Name string
	Clip *DualClipTrace // of a norm
	// Of a layer: the mean squared error of its outputs on the calibration set, its weight rounded to nearest and as
	// fitted, and with the bias corrected; Power is the mean square of the outputs.
	Rounded, Fitted, Corrected, Power float64
}

var _ compress.Method = RepQuant{}

// Compress returns a quantised copy of net. Errors: ErrBits; ErrEmpty; ErrNotFinite, naming the layer; ErrSingular;
// ErrSharedNorm with RefuseShared; a network without a norm in front of linear layers and without attention.
func (q RepQuant) Compress(ctx context.Context, b compute.Backend, net *nn.Network, calib compress.Examples) (*compress.Result, error) {
	v := repqVariant{name: "repquant", inOrder: !q.NoClip || !q.NoFit}
	switch q.Shared {
	case "", SplitShared:
		v.split = true
	case RefuseShared:
	default:
		return nil, fmt.Errorf("quant: repquant: shared norms %q; accepted: %s, %s", q.Shared, SplitShared, RefuseShared)
	}
	q.Clip.Seed, q.Clip.Symmetric = q.Seed, q.Symmetric
	if !q.NoClip || q.Symmetric {
		v.channels = func(ctx context.Context, c normChoice, bits int) (Affine, error) { return q.channels(ctx, b, c, bits) }
	}
	if q.Fit.Ridge == 0 {
		q.Fit.Ridge = HeldOutRidge
	}
	var fitted int
	var won float64
	if !q.NoFit {
		var last fitInput
		v.fit = func(_ context.Context, w *repqWalk, n *nn.Node, s *Site, xq *tensors.Tensor, pair compress.Pair) (*fittedWeight, error) {
			f, l, err := q.fit(w, n, s, xq, pair, &last)
			if f != nil && l.Rounded > 0 {
				fitted++
				won += math.Log(l.Corrected / l.Rounded)
			}
			return f, err
		}
	}
	base := RepQViT{
		Options: q.Options, WeightBits: q.WeightBits, ActBits: q.ActBits, InputBits: q.InputBits,
		Norms: q.Norms, Softmax: q.Softmax, Reparam: q.Reparam, SkipSiteErrors: q.SkipSiteErrors,
	}
	r, err := base.compress(ctx, b, net, calib, v)
	if err == nil && fitted > 0 {
		r.Notes = append(r.Notes, fmt.Sprintf("fitting lowered the output error of %d layers to %.0f %% of that of rounding (geometric mean, on the calibration set)", fitted, 100*math.Exp(won/float64(fitted))))
	}
	return r, err
}

// channels learns the grids of a norm's channels.
func (q RepQuant) channels(ctx context.Context, b compute.Backend, c normChoice, bits int) (Affine, error) {
	d := len(c.readers[0].W) / c.readers[0].Out
	if q.NoClip {
		return CalibrateUniform(c.rows, []int{len(c.rows) / d, d}, 1, bits, Symmetric())
	}
	var w []float32
	for i, r := range c.readers {
		if c.bits[i] != 32 {
			w = append(w, narrow(r.W)...)
		}
	}
	grid, trace, err := DualClip(ctx, b, c.rows, w, d, bits, q.Clip)
	if err != nil {
		return grid, fmt.Errorf("norm %q: %w", c.norm, err)
	}
	if q.Trace != nil {
		q.Trace(RepQuantLayer{Name: c.norm, Clip: &trace})
	}
	return grid, nil
}

// fitInput is the input of the layer that was fitted last: queries, keys and values read the same.
type fitInput struct {
	value string
	*layerInput
}

// fit quantises a dense layer's weight.
func (q RepQuant) fit(w *repqWalk, n *nn.Node, s *Site, xq *tensors.Tensor, pair compress.Pair, last *fitInput) (*fittedWeight, RepQuantLayer, error) {
	l := RepQuantLayer{Name: n.Name}
	if _, ok := n.Op.(nn.Dense); !ok {
		return nil, l, nil
	}
	if _, isOut := w.net.Readers(n.Out[0]); isOut && q.RoundedHead {
		return nil, l, nil
	}
	x, _ := w.padding.drop(xq)
	y, _ := w.padding.drop(pair.Y)
	out := s.Shape[0]
	if b := w.net.Param(n, "b"); b != nil {
		for i, v := range b.Data() {
			for j := i; j < len(y); j += out {
				y[j] -= v
			}
		}
	}
	if last.layerInput == nil || last.value != n.In[0] {
		in, err := newLayerInput(x, s.Shape[1], q.Fit)
		if err != nil {
			return nil, l, err
		}
		*last = fitInput{n.In[0], in}
	}
	r, err := reconstruct(last.layerInput, s.Weight, x, y, w.bitsOf(n).Weight, q.Fit)
	if err != nil {
		return nil, l, err
	}
	for _, v := range y {
		l.Power += float64(v) * float64(v) / float64(len(y))
	}
	l.Rounded, l.Fitted, l.Corrected = r.Rounded, r.MSE, r.MSE
	for _, v := range r.Bias {
		l.Corrected -= v * v / float64(out)
	}
	if q.Trace != nil {
		q.Trace(l)
	}
	f := &fittedWeight{Grid: r.Grid, Codes: r.Codes, Bias: r.Bias}
	if l.Power > 0 {
		f.Err = l.Corrected / l.Power
	}
	return f, l, nil
}

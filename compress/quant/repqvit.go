package quant

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/gomlx/compute"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/nn"
)

// NormGranularity is how RepQViT quantises what a norm gives to its linear layers.
type NormGranularity string

const (
	// Reparameterized calibrates one grid per channel and folds them into norm and readers: one grid at inference.
	Reparameterized NormGranularity = "reparameterized"
	// LayerWise uses one grid for the whole tensor from the start: the baseline.
	LayerWise NormGranularity = "layer-wise"
	// ChannelWise keeps one grid per channel, which integer kernels cannot use: the reference.
	ChannelWise NormGranularity = "channel-wise"
)

// SoftmaxGrid is how RepQViT quantises attention probabilities.
type SoftmaxGrid string

// The grids: log√2 is the method's.
const (
	SoftmaxLogSqrt2 SoftmaxGrid = "log-sqrt2"
	SoftmaxLog2     SoftmaxGrid = "log2"
	SoftmaxUniform  SoftmaxGrid = "uniform"
)

// RepQViT quantises weights and activations of a trained pre-norm transformer after training, from about 32 unlabelled
// examples, without a gradient step (Li, Xiao, Yang, Gu, ICCV 2023, arXiv:2212.08254). The two activations that break
// plain quantisation are calibrated with accurate grids and then rewritten for simple hardware: norm outputs, whose
// channels differ in range by tens of times, from one grid per channel to one per tensor (ReparamNorm); attention
// probabilities on a log√2 grid that a log2 shift unit computes (LogSqrt2.ShiftSums).
//
// It follows the network's edges, so networks built here and ones read from ONNX, with q, k and v apart or in one layer,
// are the same to it:
//
//   - norm → dense layers only: one uniform grid per channel, then reparameterised;
//   - softmax → product with V: log√2; all other operands of products: one uniform grid;
//   - input of the network's first layers: one grid of InputBits; inputs of all other layers: one grid;
//   - weights of dense layers and convolutions: one uniform grid per output channel;
//   - embeddings, norms, activation functions, softmax and residual sums stay in float.
//
// All grids come from the percentile search of CalibrateUniform, in execution order with everything before already
// quantised. Cost: one walk over the network and one selection per tensor: seconds for a ViT-B. Below 4-bit weights and
// activations the accuracy collapses. For networks without this structure use MinMaxPTQ.
//
// The zero value is W4A4 as in the paper.
type RepQViT struct {
	WeightBits int // 2 to 8; 0: 4
	ActBits    int // 2 to 8; 0: 4
	InputBits  int // of the network's input, 2 to 8; 0: 8

	Norms   NormGranularity // "": Reparameterized
	Softmax SoftmaxGrid     // "": SoftmaxLogSqrt2
	Reparam ReparamOptions  // target statistic, fractional zero points; a norm without bias gets one when it needs it

	// NoRefit keeps the weight grids fitted before W' = W diag(r): an ablation.
	NoRefit bool

	// SkipSiteErrors leaves Result.Sites without output errors, which cost two more passes over the examples.
	SkipSiteErrors bool

	// Progress, if not nil, is called after each node of the walk.
	Progress func(done, total int)
}

var _ compress.Method = RepQViT{}

func (q RepQViT) withDefaults() (RepQViT, error) {
	for _, p := range []struct {
		v   *int
		def int
	}{{&q.WeightBits, 4}, {&q.ActBits, 4}, {&q.InputBits, 8}} {
		if *p.v == 0 {
			*p.v = p.def
		}
		if err := checkBits(*p.v); err != nil {
			return q, err
		}
	}
	switch q.Norms {
	case "":
		q.Norms = Reparameterized
	case Reparameterized, LayerWise, ChannelWise:
	default:
		return q, fmt.Errorf("quant: norm granularity %q; accepted: %s, %s, %s", q.Norms, Reparameterized, LayerWise, ChannelWise)
	}
	switch q.Softmax {
	case "":
		q.Softmax = SoftmaxLogSqrt2
	case SoftmaxLogSqrt2, SoftmaxLog2, SoftmaxUniform:
	default:
		return q, fmt.Errorf("quant: softmax grid %q; accepted: %s, %s, %s", q.Softmax, SoftmaxLogSqrt2, SoftmaxLog2, SoftmaxUniform)
	}
	return q, nil
}

// Compress returns a quantised copy of net. Errors: ErrBits; ErrEmpty; ErrNotFinite, naming the layer; ErrSharedNorm for
// a norm that feeds linear layers and something else (post-norm networks); a network without a norm in front of linear
// layers and without attention.
func (q RepQViT) Compress(ctx context.Context, b compute.Backend, net *nn.Network, calib compress.Examples) (*compress.Result, error) {
	q, err := q.withDefaults()
	if err != nil {
		return nil, err
	}
	if calib.Len() == 0 {
		return nil, fmt.Errorf("quant: repq-vit: %w", ErrEmpty)
	}
	if err := refuseQuantised(net); err != nil {
		return nil, fmt.Errorf("quant: repq-vit: %w", err)
	}
	ref := net.Clone()
	w := &repqWalk{
		RepQViT: q, net: net.Clone(), quantised: map[string]string{}, isQuantised: map[string]bool{},
		grids: map[string]Affine{}, weights: map[string]*Site{}, channel: map[string]Affine{}, werr: map[string]float64{},
	}
	if w.t, err = findTransformer(w.net); err != nil {
		return nil, fmt.Errorf("quant: repq-vit: %w", err)
	}
	if q.Norms == Reparameterized {
		if shared := slices.Sorted(maps.Keys(w.t.shared)); len(shared) > 0 {
			other := w.t.shared[shared[0]]
			if other == "" {
				other = "the network's output"
			}
			return nil, fmt.Errorf("quant: repq-vit: norm %q feeds linear layers and also %s: %w; use min-max for a post-norm network", shared[0], other, ErrSharedNorm)
		}
	}
	if len(w.t.norms)+len(w.t.shared)+w.t.softmx == 0 {
		return nil, errors.New("quant: repq-vit: the network has no layer norm in front of dense layers and no softmax attention; it is for pre-norm transformers, use min-max for other networks")
	}
	total, done := len(w.net.Nodes), 0
	err = compress.Walk(ctx, b, w.net, calib, func(n *nn.Node, value func(string) *tensors.Tensor) error {
		if done++; q.Progress != nil {
			q.Progress(done, total)
		}
		return w.visit(ctx, n, value)
	})
	if err != nil {
		return nil, fmt.Errorf("quant: repq-vit: %w", err)
	}
	if q.Norms == Reparameterized {
		for _, norm := range w.net.Nodes {
			if _, ok := w.channel[norm.Name]; ok {
				if err := w.reparameterize(norm); err != nil {
					return nil, fmt.Errorf("quant: repq-vit: %w", err)
				}
			}
		}
	}
	if err := w.net.Check(); err != nil {
		return nil, err
	}
	sites, err := describe(ctx, b, ref, w.net, calib, min(calib.Len(), compress.DefaultBatch), w.werr, !q.SkipSiteErrors)
	if err != nil {
		return nil, err
	}
	return &compress.Result{Network: w.net, Reference: ref, Sites: sites, Notes: w.notes()}, nil
}

// repqWalk is the state of one compression.
type repqWalk struct {
	RepQViT
	net         *nn.Network
	t           *transformer
	quantised   map[string]string  // value -> its quantiser's value
	isQuantised map[string]bool    // values of quantisers
	grids       map[string]Affine  // site -> weight grid
	weights     map[string]*Site   // site -> float weight
	channel     map[string]Affine  // norm -> channel-wise activation grid
	werr        map[string]float64 // site -> relative weight error
}

// visit quantises what a node reads, and its weight.
func (w *repqWalk) visit(ctx context.Context, n *nn.Node, value func(string) *tensors.Tensor) error {
	for _, p := range w.t.points[n.Name] {
		v := n.In[p.input]
		if w.isQuantised[v] {
			continue
		}
		t := value(v)
		if t == nil {
			return fmt.Errorf("input %q has not been computed", v)
		}
		q, err := w.quantiseValue(n, p, nn.Floats(t), t.Shape().Dimensions)
		if err != nil {
			return fmt.Errorf("input %q: %w", v, err)
		}
		w.quantised[v], w.isQuantised[q.Out[0]] = q.Out[0], true
		for _, m := range w.net.Nodes { // one quantiser serves every later reader, too
			for _, o := range w.t.points[m.Name] {
				if m.In[o.input] == v {
					m.In[o.input] = q.Out[0]
				}
			}
		}
	}
	if !isQuantisable(n) || !nn.IsPlain(n.Op) {
		return nil
	}
	s, err := siteOf(w.net, n)
	if err != nil {
		return err
	}
	grid, err := WeightGrid{Bits: w.WeightBits}.Fit(s)
	if err != nil {
		return err
	}
	w.weights[n.Name], w.grids[n.Name] = s, grid
	return w.store(n, s, grid)
}

// store writes a site's weight on a grid.
func (w *repqWalk) store(n *nn.Node, s *Site, grid Affine) error {
	r, params, err := grid.Store(s.Weight, s.Shape)
	if err != nil {
		return err
	}
	fq, err := grid.FakeQuant(s.Weight, s.Shape)
	if err != nil {
		return err
	}
	w.werr[n.Name] = compress.RelativeError(s.Weight, fq)
	return install(w.net, n, r, params)
}

func (w *repqWalk) quantiseValue(n *nn.Node, p point, x []float32, shape []int) (*nn.Node, error) {
	bits := w.ActBits
	switch p.role {
	case roleSoftmax:
		switch w.Softmax {
		case SoftmaxLogSqrt2:
			g, err := CalibrateLogSqrt2(x, bits)
			if err != nil {
				return nil, err
			}
			return insertQuantizer(w.net, n, p.input, LogQuantize{Bits: bits, PerOctave: 2}, []float64{g.Scale}, nil)
		case SoftmaxLog2:
			g, err := CalibrateLog2(x, bits)
			if err != nil {
				return nil, err
			}
			return insertQuantizer(w.net, n, p.input, LogQuantize{Bits: bits, PerOctave: 1}, []float64{g.Scale}, nil)
		}
	case roleNorm:
		if w.Norms == LayerWise {
			break
		}
		g, err := CalibrateUniform(x, shape, len(shape)-1, bits)
		if err != nil {
			return nil, err
		}
		w.channel[w.net.Producer(n.In[p.input]).Name] = g
		return insertQuantizer(w.net, n, p.input, nn.QuantizeDequantize{Bits: bits, PerChannel: true}, g.Scale, g.Zero)
	case roleInput:
		bits = w.InputBits
	}
	g, err := CalibrateUniform(x, shape, -1, bits)
	if err != nil {
		return nil, err
	}
	return insertQuantizer(w.net, n, p.input, nn.QuantizeDequantize{Bits: bits}, g.Scale, g.Zero)
}

// reparameterize folds a norm's channel-wise grid into it and its readers and refits their weights.
func (w *repqWalk) reparameterize(norm *nn.Node) error {
	grid := w.channel[norm.Name]
	d := len(grid.Scale)
	p := &NormParams{Name: norm.Name, Gamma: slices.Repeat([]float64{1}, d)}
	if g := w.net.Param(norm, "w"); g != nil {
		p.Gamma = widen(g.Data())
	}
	if b := w.net.Param(norm, "b"); b != nil {
		p.Beta = widen(b.Data())
	}
	readers := w.t.norms[norm.Name]
	linear := make([]*LinearParams, len(readers))
	for i, r := range readers {
		s := w.weights[r.Name]
		linear[i] = &LinearParams{Name: r.Name, W: widen(s.Weight), Out: s.Shape[0]}
		if b := w.net.Param(r, "b"); b != nil {
			linear[i].Bias = widen(b.Data())
		}
	}
	o := w.Reparam
	o.AddBeta = true
	scale, zero, err := ReparamNorm(p, linear, grid.Scale, grid.Zero, o)
	if err != nil {
		return err
	}
	w.net.SetParam(norm, "w", nn.Gain, narrow(p.Gamma), d)
	if p.Beta != nil {
		w.net.SetParam(norm, "b", nn.Bias, narrow(p.Beta), d)
	}
	switch op := norm.Op.(type) {
	case nn.LayerNorm:
		op.NoGain, op.NoBias = false, p.Beta == nil
		norm.Op = op
	case nn.RMSNorm:
		op.NoGain, op.Bias = false, p.Beta != nil
		norm.Op = op
	}
	q := w.net.Producer(w.quantised[norm.Out[0]])
	q.Op = nn.QuantizeDequantize{Bits: w.ActBits}
	w.net.SetParam(q, "scale", nn.Constant, []float32{float32(scale)}, 1)
	w.net.SetParam(q, "zero", nn.Constant, []float32{float32(zero)}, 1)
	for i, r := range readers {
		s := &Site{Name: r.Name, Weight: narrow(linear[i].W), Shape: w.weights[r.Name].Shape}
		grid := w.grids[r.Name]
		if !w.NoRefit {
			if grid, err = (WeightGrid{Bits: w.WeightBits}).Fit(s); err != nil {
				return err
			}
		}
		if err := w.store(r, s, grid); err != nil {
			return err
		}
		if b := linear[i].Bias; b != nil {
			w.net.SetParam(r, "b", nn.Bias, narrow(b), len(b))
			op := r.Op.(nn.Dense)
			op.NoBias = false
			r.Op = op
		}
	}
	return nil
}

func (w *repqWalk) notes() (notes []string) {
	var float []string
	for _, n := range w.net.Sites() {
		if _, ok := w.grids[n.Name]; !ok {
			float = append(float, n.Name)
		}
	}
	if len(float) > 0 {
		notes = append(notes, fmt.Sprintf("left in float: %v", float))
	}
	for _, norm := range slices.Sorted(maps.Keys(w.t.shared)) {
		notes = append(notes, fmt.Sprintf("norm %s also feeds %s: quantised per tensor", norm, w.t.shared[norm]))
	}
	return notes
}

// QuantizeViT is RepQViT.Compress by the name that the paper's reference code gives the pipeline.
func QuantizeViT(ctx context.Context, b compute.Backend, net *nn.Network, calib compress.Examples, q RepQViT) (*compress.Result, error) {
	return q.Compress(ctx, b, net, calib)
}

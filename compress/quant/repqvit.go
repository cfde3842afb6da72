package quant

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/gomlx/compute"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/fold"
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
	// Unfolded condenses the channels' grids into one (ReparamOptions) and uses it as it is: nothing is folded, so that it
	// also serves norms that something beside dense layers reads.
	Unfolded NormGranularity = "unfolded"
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
// Options.Select is asked for products, too. A norm of whose readers some are not selected is reparameterised all the
// same: those read it unquantised and take the scale up exactly, in float.
//
// The zero value is W4A4 as in the paper.
type RepQViT struct {
	compress.Options

	WeightBits int // 2 to 8; 0: 4
	ActBits    int // 2 to 8, or 32: activations stay in float; 0: 4
	InputBits  int // of the network's input, 2 to 8, or 32; 0: 8, or 32 with ActBits 32

	Norms   NormGranularity // "": Reparameterized
	Softmax SoftmaxGrid     // "": SoftmaxLogSqrt2
	Reparam ReparamOptions  // target statistic, fractional zero points; a norm without bias gets one when it needs it

	// NoRefit keeps the weight grids fitted before W' = W diag(r): an ablation.
	NoRefit bool

	// SkipSiteErrors leaves Result.Sites without output errors, which cost two more passes over the examples.
	SkipSiteErrors bool
}

var _ compress.Method = RepQViT{}

func (q RepQViT) withDefaults() (RepQViT, error) {
	q.WeightBits, q.ActBits = cmp.Or(q.WeightBits, 4), cmp.Or(q.ActBits, 4)
	if q.InputBits == 0 {
		if q.InputBits = 8; q.ActBits == 32 {
			q.InputBits = 32
		}
	}
	if err := errors.Join(checkBits(q.WeightBits), checkAct(q.ActBits), checkAct(q.InputBits)); err != nil {
		return q, err
	}
	switch q.Norms {
	case "":
		q.Norms = Reparameterized
	case Reparameterized, LayerWise, ChannelWise, Unfolded:
	default:
		return q, fmt.Errorf("quant: norm granularity %q; accepted: %s, %s, %s, %s", q.Norms, Reparameterized, LayerWise, ChannelWise, Unfolded)
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
	return q.compress(ctx, b, net, calib, repqVariant{name: "repq-vit"})
}

// repqVariant is what a method that goes RepQ-ViT's way does otherwise.
type repqVariant struct {
	name string // for messages and the journal
	// softmax, if not nil, quantises attention probabilities in place of Softmax.
	softmax func(w *repqWalk, n *nn.Node, p point, bits int, value func(string) *tensors.Tensor) (*nn.Node, error)
	// target, if not nil, chooses a norm's common scale and zero point in place of Reparam.Target.
	target func(c normChoice) (sT, zT float64, err error)
	// rows is how many rows of a norm's output target wants to see.
	rows int
	// unfold quantises norms that something else reads, too, as Unfolded does, instead of refusing them.
	unfold bool
	// inOrder folds norms before they run, so that what is behind them meets the inputs of the finished network, instead of
	// all at the end.
	inOrder bool
	// split gives the linear readers of such a norm a copy of it, which can take their scale up.
	split bool
	// channels, if not nil, fits the grid of a norm's channels to its output, all rows of it, and its readers, in place of
	// CalibrateUniform.
	channels func(ctx context.Context, c normChoice, bits int) (Affine, error)
	// fit, if not nil, quantises a site's weight in place of WeightGrid, and its bias; it may return nil to leave the site to
	// that.
	fit func(ctx context.Context, w *repqWalk, n *nn.Node, s *Site, xq *tensors.Tensor, pair compress.Pair) (*fittedWeight, error)
}

// fittedWeight is a site as repqVariant.fit leaves it.
type fittedWeight struct {
	Grid  Affine
	Codes []int32
	Bias  []float64 // to add to the site's
	Err   float64   // of its output on the calibration set, relative
}

// normChoice is what the choice of a norm's common grid may look at.
type normChoice struct {
	norm    string
	grid    Affine          // of the channels
	rows    []float32       // some of the norm's output, [n, channels]
	readers []*LinearParams // before the scale is folded into them
	bits    []int           // of the readers' weights; 32: float
	folded  bool            // false: the grid is used as it is
	lo, hi  float32         // of the norm's output, if not folded
}

func (q RepQViT) compress(ctx context.Context, b compute.Backend, net *nn.Network, calib compress.Examples, v repqVariant) (*compress.Result, error) {
	q, err := q.withDefaults()
	if err != nil {
		return nil, err
	}
	if calib.Len() == 0 {
		return nil, fmt.Errorf("quant: %s: %w", v.name, ErrEmpty)
	}
	if err := errors.Join(q.Check(net), refuseQuantisedSites(net, q.Selected)); err != nil {
		return nil, fmt.Errorf("quant: %s: %w", v.name, err)
	}
	ref := net.Clone()
	if _, err := fold.LastAxis(ref); err != nil {
		return nil, fmt.Errorf("quant: %s: %w", v.name, err)
	}
	w := &repqWalk{
		RepQViT: q, repqVariant: v, b: b, net: ref.Clone(), common: map[string]Affine{}, quantised: map[repqValue]string{}, isQuantised: map[string]bool{},
		grids: map[string]Affine{}, weights: map[string]*Site{}, channel: map[string]normGrid{}, werr: map[string]float64{},
	}
	if v.split {
		if err := w.splitNorms(); err != nil {
			return nil, fmt.Errorf("quant: %s: %w", v.name, err)
		}
	}
	w.padding = findPadding(ref, calib)
	if w.t, err = findTransformer(w.net); err != nil {
		return nil, fmt.Errorf("quant: %s: %w", v.name, err)
	}
	if len(w.t.norms)+len(w.t.shared)+w.t.softmx == 0 {
		return nil, fmt.Errorf("quant: %s: the network has no layer norm in front of dense layers and no softmax attention; it is for pre-norm transformers, use min-max for other networks", v.name)
	}
	if err := w.restrict(); err != nil {
		return nil, fmt.Errorf("quant: %s: %w", v.name, err)
	}
	err = compress.WalkBeside(ctx, b, ref, w.net, calib, func(n *nn.Node, value func(string) *tensors.Tensor, pair func() (compress.Pair, error)) error {
		if w.sequential() && w.t.norms[n.Name] != nil {
			return w.foldFirst(ctx, n, value)
		}
		return w.visit(ctx, n, value, pair)
	})
	if err != nil {
		return nil, fmt.Errorf("quant: %s: %w", v.name, err)
	}
	if q.Norms == Reparameterized && !w.sequential() {
		for _, norm := range w.net.Nodes {
			if _, ok := w.channel[norm.Name]; ok {
				if err := w.reparameterize(norm); err != nil {
					return nil, fmt.Errorf("quant: %s: %w", v.name, err)
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
	repqVariant
	b           compute.Backend
	net         *nn.Network
	t           *transformer
	total       int                  // selected sites
	quantised   map[repqValue]string // the quantiser's value
	isQuantised map[string]bool      // values of quantisers
	grids       map[string]Affine    // site -> weight grid
	weights     map[string]*Site     // site, or other reader of a norm -> float weight
	channel     map[string]normGrid  // norm -> channel-wise activation grid
	padding     padding
	common      map[string]Affine  // norm that was folded before it ran -> the grid of its output
	werr        map[string]float64 // site -> relative weight error
	splits      []string           // norms that were given a copy for their linear readers
}

// repqValue is a value at some bits.
type repqValue struct {
	name string
	bits int
}

// normGrid is the channel-wise grid of a norm's output, and its quantiser's value.
type normGrid struct {
	Affine
	value string
	rows  []float32 // some of the norm's output, for repqVariant.target
}

// restrict takes what is not selected out of the plan, and checks the bits.
func (w *repqWalk) restrict() error {
	points := 0
	for _, n := range w.net.Nodes {
		if w.isSite(n) {
			w.total++
			bits := w.bitsOf(n)
			if err := errors.Join(checkBits(bits.Weight), checkAct(bits.Act)); err != nil {
				return fmt.Errorf("site %q: %w", n.Name, err)
			}
		}
	}
	for _, norm := range w.net.Nodes {
		if readers := w.t.norms[norm.Name]; readers != nil {
			if err := w.restrictNorm(norm, readers); err != nil {
				return err
			}
		}
		if other, ok := w.t.shared[norm.Name]; ok {
			if err := w.restrictShared(norm, other); err != nil {
				return err
			}
		}
	}
	for name, p := range w.t.points {
		n := w.net.Node(name)
		p = slices.DeleteFunc(p, func(p point) bool { return p.role != roleNorm && (!w.Selected(n) || w.actBits(n, p) == 32) })
		w.t.points[name] = p
		points += len(p)
	}
	if w.total+points == 0 {
		return errors.New("nothing of what it could quantise is selected")
	}
	return nil
}

// restrictNorm decides behind which edges of a norm its quantiser stands: those to the readers that are selected. A norm
// none of whose readers wants one stays as it is.
func (w *repqWalk) restrictNorm(norm *nn.Node, readers []*nn.Node) error {
	wants := func(n *nn.Node) bool { return w.isSite(n) && w.bitsOf(n).Act != 32 }
	sh, err := w.net.Shapes(0)
	if err != nil {
		return err
	}
	direct, _ := w.net.Readers(norm.Out[0])
	quantised, mixed := false, false
	for _, r := range direct {
		behind := []*nn.Node{r}
		if !isQuantisable(r) {
			behind, _ = absorbers(w.net, r.Out[0], sh)
		}
		some := slices.ContainsFunc(behind, wants)
		all := !slices.ContainsFunc(behind, func(n *nn.Node) bool { return !wants(n) })
		quantised, mixed = quantised || some, mixed || some && !all
		if !some {
			w.t.points[r.Name] = slices.DeleteFunc(w.t.points[r.Name], func(p point) bool { return p.role == roleNorm && r.In[p.input] == norm.Out[0] })
		}
	}
	if quantised && !mixed {
		return nil
	}
	delete(w.t.norms, norm.Name)
	for _, r := range direct {
		w.t.points[r.Name] = slices.DeleteFunc(w.t.points[r.Name], func(p point) bool { return p.role == roleNorm && r.In[p.input] == norm.Out[0] })
	}
	if mixed { // one op hands the norm's output to sites of both kinds: each selected one gets a grid of its own
		for _, r := range readers {
			w.t.points[r.Name] = append(w.t.points[r.Name], point{0, roleTensor})
		}
		w.t.shared[norm.Name] = "sites that are not selected"
	}
	return nil
}

// restrictShared refuses a norm whose scale a selected site should take up, but something else reads too; an earlier
// method's work is no reason to refuse.
func (w *repqWalk) restrictShared(norm *nn.Node, other string) error {
	sh, err := w.net.Shapes(0)
	if err != nil {
		return err
	}
	dense, others := absorbers(w.net, norm.Out[0], sh)
	if !slices.ContainsFunc(dense, func(n *nn.Node) bool { return w.isSite(n) && w.bitsOf(n).Act != 32 }) {
		delete(w.t.shared, norm.Name)
		return nil
	}
	if w.Norms != Reparameterized && w.Norms != Unfolded {
		return nil
	}
	if w.unfold || w.Norms == Unfolded { // readers behind reshapes keep the grid of the whole tensor
		readers, _ := w.net.Readers(norm.Out[0])
		for _, r := range readers {
			for i, p := range w.t.points[r.Name] {
				if p.role == roleTensor && r.In[p.input] == norm.Out[0] && isQuantisable(r) {
					w.t.points[r.Name][i].role = roleUnfolded
				}
			}
		}
		return nil
	}
	if w.split { // what cannot be split keeps one grid for the whole tensor
		return nil
	}
	for _, name := range others {
		if n := w.net.Node(name); n != nil {
			lin, ok := n.Op.(nn.Linear)
			if _, quantiser := n.Op.(nn.QuantizeDequantize); quantiser || ok && !nn.IsPlain(lin) {
				continue
			}
		}
		if name == "" {
			name = "the network's output"
		}
		return fmt.Errorf("norm %q feeds linear layers and also %s: %w; use min-max for a post-norm network", norm.Name, name, ErrSharedNorm)
	}
	return nil
}

// isSite says whether a node's weight is to be quantised, or has been in this walk.
func (w *repqWalk) isSite(n *nn.Node) bool {
	_, done := w.grids[n.Name]
	return isQuantisable(n) && (done || nn.IsPlain(n.Op)) && w.Selected(n)
}

// bitsOf are the bits of a site; the network's input has its own.
func (w *repqWalk) bitsOf(n *nn.Node) compress.Bits {
	def := compress.Bits{Weight: w.WeightBits, Act: w.ActBits}
	if slices.ContainsFunc(w.t.points[n.Name], func(p point) bool { return p.role == roleInput }) {
		def.Act = w.InputBits
	}
	return w.BitsOf(n.Name, def)
}

// actBits are the bits of the quantiser that stands at a point: of a norm's, the most that a reader asks for.
func (w *repqWalk) actBits(n *nn.Node, p point) int {
	if p.role == roleNorm {
		bits := 0
		for _, r := range w.t.norms[w.net.Producer(n.In[p.input]).Name] {
			if act := w.bitsOf(r).Act; w.isSite(r) && act != 32 {
				bits = max(bits, act)
			}
		}
		return bits
	}
	return w.bitsOf(n).Act
}

// visit quantises what a node reads, and its weight.
func (w *repqWalk) visit(ctx context.Context, n *nn.Node, value func(string) *tensors.Tensor, pair func() (compress.Pair, error)) error {
	for _, p := range w.t.points[n.Name] {
		v := n.In[p.input]
		if w.isQuantised[v] {
			continue
		}
		t := value(v)
		if t == nil {
			return fmt.Errorf("input %q has not been computed", v)
		}
		key := repqValue{v, w.actBits(n, p)}
		q, err := w.quantiseValue(ctx, n, p, key.bits, t, value)
		if err != nil {
			return fmt.Errorf("input %q: %w", v, err)
		}
		w.quantised[key], w.isQuantised[q.Out[0]] = q.Out[0], true
		for _, m := range w.net.Nodes { // one quantiser serves every later reader, too
			for _, o := range w.t.points[m.Name] {
				if m.In[o.input] == v && w.actBits(m, o) == key.bits {
					m.In[o.input] = q.Out[0]
				}
			}
		}
	}
	if !w.isSite(n) {
		return nil
	}
	s, err := siteOf(w.net, n)
	if err != nil {
		return err
	}
	if w.fit != nil {
		if done, err := w.fitSite(ctx, n, s, value, pair); done || err != nil {
			return err
		}
	}
	var grid Affine
	restored, err := w.Journal.Do(w.name+"/weight/"+n.Name, &grid, func() (err error) {
		grid, err = WeightGrid{Bits: w.bitsOf(n).Weight}.Fit(s)
		return err
	})
	if err != nil {
		return err
	}
	w.weights[n.Name], w.grids[n.Name] = s, grid
	if err := w.store(n, s, grid); err != nil {
		return err
	}
	w.Report(compress.Step{Site: n.Name, Done: len(w.grids), Total: w.total, Bytes: compress.WeightBytes(w.net, n), Err: w.werr[n.Name], Restored: restored})
	return nil
}

// store writes a site's weight on a grid.
func (w *repqWalk) store(n *nn.Node, s *Site, grid Affine) (err error) {
	w.werr[n.Name], err = storeOnGrid(w.net, n, s, grid)
	return err
}

func (w *repqWalk) quantiseValue(ctx context.Context, n *nn.Node, p point, bits int, t *tensors.Tensor, value func(string) *tensors.Tensor) (*nn.Node, error) {
	if p.role == roleNorm {
		if g, ok := w.common[w.net.Producer(n.In[p.input]).Name]; ok {
			return insertQuantizer(w.net, n, p.input, nn.QuantizeDequantize{Bits: g.Bits}, g.Scale, g.Zero)
		}
	}
	values, shape := w.padding.drop(t)
	axis := -1
	perOctave := 0
	switch {
	case p.role == roleSoftmax && w.softmax != nil:
		return w.softmax(w, n, p, bits, value)
	case p.role == roleSoftmax && w.Softmax == SoftmaxLogSqrt2:
		perOctave = 2
	case p.role == roleSoftmax && w.Softmax == SoftmaxLog2:
		perOctave = 1
	case p.role == roleNorm && w.Norms != LayerWise, p.role == roleUnfolded:
		axis = len(shape) - 1
	}
	var grid Affine
	_, err := w.Journal.Do(fmt.Sprintf("%s/input/%s/%d", w.name, n.Name, p.input), &grid, func() (err error) {
		switch x := values; perOctave {
		case 2:
			g, err := CalibrateLogSqrt2(x, bits)
			grid.Scale = []float64{g.Scale}
			return err
		case 1:
			g, err := CalibrateLog2(x, bits)
			grid.Scale = []float64{g.Scale}
			return err
		default:
			if axis >= 0 {
				grid, err = w.channelGrid(ctx, w.net.Producer(n.In[p.input]), t, bits)
				grid.Axis = t.Shape().Rank() - 1
			} else {
				grid, err = CalibrateUniform(x, shape, axis, bits)
			}
			return err
		}
	})
	if err != nil {
		return nil, err
	}
	if perOctave > 0 {
		return insertQuantizer(w.net, n, p.input, LogQuantize{Bits: bits, PerOctave: perOctave}, grid.Scale, nil)
	}
	norm := w.net.Producer(n.In[p.input])
	if p.role == roleUnfolded || p.role == roleNorm && w.Norms == Unfolded {
		s, z, err := w.unfolded(norm, grid, t)
		if err != nil {
			return nil, err
		}
		return insertQuantizer(w.net, n, p.input, nn.QuantizeDequantize{Bits: bits}, []float64{s}, []float64{z})
	}
	q, err := insertQuantizer(w.net, n, p.input, nn.QuantizeDequantize{Bits: bits, PerChannel: axis >= 0}, grid.Scale, grid.Zero)
	if err == nil && axis >= 0 {
		w.channel[norm.Name] = normGrid{grid, q.Out[0], w.sample(t)}
	}
	return q, err
}

// sample copies some rows of a norm's output, evenly spaced.
func (w *repqWalk) sample(t *tensors.Tensor) []float32 {
	if w.rows == 0 {
		return nil
	}
	x, d := nn.Floats(t), t.Shape().Dimensions[t.Shape().Rank()-1]
	n := len(x) / d
	k := min(n, w.rows)
	out := make([]float32, 0, k*d)
	for i := range k {
		r := i * n / k
		out = append(out, x[r*d:(r+1)*d]...)
	}
	return out
}

// unfolded condenses a norm's channel-wise grid into one that is used as it is.
func (w *repqWalk) unfolded(norm *nn.Node, grid Affine, t *tensors.Tensor) (scale, zero float64, err error) {
	sh, err := w.net.Shapes(0)
	if err != nil {
		return 0, 0, err
	}
	dense, _ := absorbers(w.net, norm.Out[0], sh)
	readers, bits, err := w.linear(dense)
	if err != nil {
		return 0, 0, err
	}
	x := nn.Floats(t)
	o, err := w.reparam(normChoice{
		norm: norm.Name, grid: grid, rows: w.sample(t), readers: readers, bits: bits, lo: slices.Min(x), hi: slices.Max(x),
	})
	if err != nil {
		return 0, 0, err
	}
	scale, zero = o.common(grid.Scale, grid.Zero)
	return scale, zero, nil
}

// reparam are the options of one norm's rewrite.
func (w *repqWalk) reparam(c normChoice) (ReparamOptions, error) {
	o := w.Reparam
	o.AddBeta = true
	if w.target == nil {
		return o, nil
	}
	scale, zero, err := w.target(c)
	o.Choose = func(_, _ []float64) (float64, float64) { return scale, zero }
	return o, err
}

// linear are the float weights of a norm's readers and their bits.
func (w *repqWalk) linear(readers []*nn.Node) ([]*LinearParams, []int, error) {
	out, bits := make([]*LinearParams, len(readers)), make([]int, len(readers))
	for i, r := range readers {
		if w.weights[r.Name] == nil { // not selected, or yet to come
			s, err := siteOf(w.net, r)
			if err != nil {
				return nil, nil, err
			}
			w.weights[r.Name] = s
		}
		s := w.weights[r.Name]
		out[i] = &LinearParams{Name: r.Name, W: widen(s.Weight), Out: s.Shape[0]}
		if b := w.net.Param(r, "b"); b != nil {
			out[i].Bias = widen(b.Data())
		}
		if bits[i] = 32; w.isSite(r) {
			bits[i] = w.bitsOf(r).Weight
		}
	}
	return out, bits, nil
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
	linear, bits, err := w.linear(readers)
	if err != nil {
		return err
	}
	o, err := w.reparam(normChoice{norm: norm.Name, grid: grid.Affine, rows: grid.rows, readers: linear, bits: bits, folded: true})
	if err != nil {
		return err
	}
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
	w.common[norm.Name] = Affine{Bits: grid.Bits, Axis: -1, Scale: []float64{scale}, Zero: []float64{zero}}
	if q := w.net.Producer(grid.value); q != nil {
		q.Op = nn.QuantizeDequantize{Bits: grid.Bits}
		w.net.SetParam(q, "scale", nn.Constant, []float32{float32(scale)}, 1)
		w.net.SetParam(q, "zero", nn.Constant, []float32{float32(zero)}, 1)
	}
	for i, r := range readers {
		s := &Site{Name: r.Name, Weight: narrow(linear[i].W), Shape: w.weights[r.Name].Shape}
		if err := w.storeAgain(r, s); err != nil {
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

// storeAgain stores what has become of the weight of a norm's reader.
func (w *repqWalk) storeAgain(n *nn.Node, s *Site) error {
	grid, ok := w.grids[n.Name]
	if !ok {
		w.net.SetParam(n, "w", nn.Weight, s.Weight, s.Shape...)
		return nil
	}
	if !w.NoRefit {
		_, err := w.Journal.Do(w.name+"/refit/"+n.Name, &grid, func() (err error) {
			grid, err = WeightGrid{Bits: grid.Bits}.Fit(s)
			return err
		})
		if err != nil {
			return err
		}
	}
	return w.store(n, s, grid)
}

func (w *repqWalk) notes() (notes []string) {
	var float []string
	for _, n := range w.net.Sites() {
		if _, ok := w.grids[n.Name]; !ok && w.Selected(n) {
			float = append(float, n.Name)
		}
	}
	if len(float) > 0 {
		notes = append(notes, fmt.Sprintf("left in float: %v", float))
	}
	if len(w.splits) > 0 {
		notes = append(notes, w.splitNote())
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

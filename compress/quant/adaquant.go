package quant

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/gomlx/compute"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/nn"
)

// Tuning is what repairs the statistics of a network after its layers are quantised.
type Tuning string

const (
	// TuneAuto is TuneBatchNorm for layers that a batch norm was folded into, and nothing for the others.
	TuneAuto Tuning = ""
	// TuneNone leaves the network as its layers were fitted.
	TuneNone Tuning = "none"
	// TuneBatchNorm moves each layer's mean and variance to those that the folded batch norm promised (TuneBN).
	TuneBatchNorm Tuning = "bn"
	// TuneCorrection moves each layer's mean to the float layer's (CorrectBias).
	TuneCorrection Tuning = "bias-correction"
	// TuneBiases trains the biases by the divergence of the outputs, which must be logits (TuneBias).
	TuneBiases Tuning = "bias"
)

// AdaRates are the learning rates of AdaQuant's four Adam optimisers, in the units of what they move. A zero means the
// default, which suits small convolutional networks; transformers want a Weight of 1e-4, and the paper's own values, for
// networks of ImageNet's size, are 1e-5, 1e-3, 1e-1 and 1e-3.
type AdaRates struct {
	Weight      float64 // 0: 1e-3
	Bias        float64 // 0: 1e-3
	InputRange  float64 // range and minimum of the activation; 0: 1e-2
	WeightRange float64 // ranges and minima of the rows; 0: 1e-3
}

// AdaQuant quantises a trained feed-forward network to 2 to 8 bits from some tens to a thousand unlabelled examples
// (Hubara, Nahshan, Hanani, Banner, Soudry, arXiv:2006.10518). For each dense layer and convolution with float output Y it
// minimises, by Adam on minibatches, over weight, bias, the range of each row of the weight and that of the input
//
//	mean (Q_w(W')·Q_x(X_in) + b' − Y)²
//
// so that weights may move anywhere, not only to the next level up or down. X_in is what the already quantised layers
// before give (sequential, the default: later layers absorb the errors of earlier ones) or the float input (Parallel).
// Then the statistics are tuned (Tune), and at inference nothing is left but integer layers.
//
// Iterations < 0 skips the fitting: with batch norm tuning this is the paper's light pipeline, without gradients. With
// MeanBits, an integer programme first gives each site its bits.
//
// Ranges begin at the extremes: of each row for weights, of each example, averaged, for activations. Batch norm is folded
// first. The first and the last sites get EdgeBits. Operands of attention products are quantised at ActBits by their
// averaged extremes. Everything else stays in float. Cost: Iterations forward and backward passes of Batch examples; all
// examples' activations at one layer are in memory at a time.
//
// The zero value is W4A4, sequential, 100 iterations.
type AdaQuant struct {
	compress.Options

	WeightBits int // 2 to 8; 0: 4
	ActBits    int // 2 to 8, or 32: activations stay in float; 0: 4
	EdgeBits   int // of weights and activations of the first and last sites, unless Options.Bits says otherwise; 0: 8

	Parallel    bool
	Iterations  int // 0: 100; negative: none
	Batch       int // examples per iteration; 0: 50, fewer (at least 8) where their outputs have more than 2¹⁶ positions
	Rates       AdaRates
	LastIterate bool // keep what the last iteration gives, as the paper does, even where the loss over all examples was lower before

	Tune     Tuning
	BN       BNOptions
	BiasTune BiasTuning // with TuneBiases

	// MeanBits, if positive, is a budget: bits per weight, averaged over the selected sites' weights, that the integer
	// programme (compress.AllocateBits) spends where they matter, by the divergence that each site alone causes. 8·c·4 of
	// it is a compression to the share c of the float size. It replaces WeightBits and EdgeBits of weights; sites that
	// Options.Bits names keep those bits.
	MeanBits float64
	Choices  []int // bits that the programme may give; nil: 8, 4, 2. The largest is the base against which losses count

	// SkipSiteErrors leaves Result.Sites without output errors, which cost two more passes over the examples.
	SkipSiteErrors bool
}

var (
	_ compress.Method = AdaQuant{}
	_ compress.Holder = AdaQuant{}
)

func (q AdaQuant) withDefaults() (AdaQuant, error) {
	q.WeightBits, q.ActBits, q.EdgeBits = cmp.Or(q.WeightBits, 4), cmp.Or(q.ActBits, 4), cmp.Or(q.EdgeBits, 8)
	q.Iterations = max(cmp.Or(q.Iterations, 100), 0)
	r := &q.Rates
	r.Weight, r.Bias = cmp.Or(r.Weight, 1e-3), cmp.Or(r.Bias, 1e-3)
	r.InputRange, r.WeightRange = cmp.Or(r.InputRange, 1e-2), cmp.Or(r.WeightRange, 1e-3)
	if err := errors.Join(checkBits(q.WeightBits), checkAct(q.ActBits), checkBits(q.EdgeBits)); err != nil {
		return q, err
	}
	for _, v := range []float64{r.Weight, r.Bias, r.InputRange, r.WeightRange} {
		if !(v > 0) || math.IsInf(v, 0) {
			return q, fmt.Errorf("quant: learning rate %g; want a positive number", v)
		}
	}
	if q.Batch < 0 || !(q.MeanBits >= 0) {
		return q, fmt.Errorf("quant: %d examples per iteration and a budget of %g bits; want at least 0", q.Batch, q.MeanBits)
	}
	if q.Choices == nil {
		q.Choices = []int{8, 4, 2}
	}
	for _, b := range q.Choices {
		if err := checkBits(b); err != nil {
			return q, err
		}
	}
	switch q.Tune {
	case TuneAuto, TuneNone, TuneBatchNorm, TuneCorrection, TuneBiases:
	default:
		return q, fmt.Errorf("quant: tuning %q; accepted: %s, %s, %s, %s, or nothing", q.Tune, TuneNone, TuneBatchNorm, TuneCorrection, TuneBiases)
	}
	return q, nil
}

// Compress returns a quantised copy of net. Errors: ErrBits; ErrEmpty; ErrNotFinite, naming the site;
// compress.ErrInfeasible for a budget below the smallest choice; a network without a dense layer or convolution that is
// selected; one whose selected sites are quantised already.
func (q AdaQuant) Compress(ctx context.Context, b compute.Backend, net *nn.Network, calib compress.Examples) (*compress.Result, error) {
	q, err := q.withDefaults()
	if err != nil {
		return nil, err
	}
	a, err := q.prepare(net, calib)
	if err != nil {
		return nil, fmt.Errorf("quant: adaquant: %w", err)
	}
	a.b, a.fitter = b, NewSiteFitter(b)
	defer a.fitter.Close()
	if q.MeanBits > 0 {
		if err := a.allocate(ctx, calib); err != nil {
			return nil, fmt.Errorf("quant: adaquant: %w", err)
		}
	}
	if a.net, err = a.quantise(ctx, calib); err != nil {
		return nil, fmt.Errorf("quant: adaquant: %w", err)
	}
	if err := a.tune(ctx, calib); err != nil {
		return nil, fmt.Errorf("quant: adaquant: %w", err)
	}
	if err := a.net.Check(); err != nil {
		return nil, err
	}
	sites, err := describe(ctx, b, a.ref, a.net, calib, min(calib.Len(), compress.DefaultBatch), a.werr, !q.SkipSiteErrors)
	if err != nil {
		return nil, err
	}
	return &compress.Result{Network: a.net, Reference: a.ref, Sites: sites, Notes: a.notes}, nil
}

// Holds is what a compression on so many cases holds at most: the values of two networks, and the compiled fits that are kept
// for the sites up to the one under way.
func (q AdaQuant) Holds(net *nn.Network, cases int) (int64, error) {
	q, err := q.withDefaults()
	if err != nil {
		return 0, err
	}
	walks, err := compress.WalkPairsBytes(net, cases)
	if err != nil {
		return 0, err
	}
	sh, err := net.Shapes(cases)
	if err != nil {
		return 0, err
	}
	type fit struct {
		key   string
		bytes int64
	}
	var kept []fit // as SiteFitter keeps them
	var most int64
	for _, n := range net.Sites() {
		if !isQuantisable(n) || !nn.IsPlain(n.Op) || !q.Selected(n) {
			continue
		}
		x, y, bits := sh[n.In[0]], sh[n.Out[0]], q.BitsOf(n.Name, compress.Bits{Weight: q.WeightBits, Act: q.ActBits})
		f := fit{key: fmt.Sprintf("%#v %v %v %v", n.Op, x, y, bits)}
		f.bytes = fitBytes(n.Op, x, y, min(cmp.Or(q.Batch, batchFor(y)), cases), bits.Act != 32)
		if i := slices.Index(kept, f); i >= 0 {
			kept = slices.Delete(kept, i, i+1)
		} else {
			kept = slices.Delete(kept, 0, surplusFits(kept, f.bytes, func(f fit) int64 { return f.bytes }))
		}
		kept = append(kept, f)
		var held int64
		for _, f := range kept {
			held += f.bytes
		}
		most = max(most, held)
	}
	return walks + most, nil
}

// adaRun is the state of one compression.
type adaRun struct {
	AdaQuant
	b      compute.Backend
	fitter *SiteFitter

	ref, net *nn.Network
	targets  map[string]BNTarget
	bits     map[string]compress.Bits // of the sites that are quantised
	order    []string                 // those sites
	werr     map[string]float64
	notes    []string
}

// prepare checks the arguments, folds batch norms and chooses sites and bits.
func (q AdaQuant) prepare(net *nn.Network, calib compress.Examples) (*adaRun, error) {
	if err := q.Check(net); err != nil {
		return nil, err
	}
	if calib.Len() == 0 {
		return nil, ErrEmpty
	}
	if err := calib.Check(net); err != nil {
		return nil, err
	}
	if err := refuseQuantisedSites(net, q.Selected); err != nil {
		return nil, err
	}
	a := &adaRun{AdaQuant: q, ref: net.Clone(), bits: map[string]compress.Bits{}, werr: map[string]float64{}}
	var err error
	if a.targets, err = FoldBatchNorm(a.ref); err != nil {
		return nil, err
	}
	if len(a.targets) > 0 {
		a.notes = append(a.notes, fmt.Sprintf("%d batch norms folded into the layers before them", len(a.targets)))
	}
	edge := edgeSites(a.ref)
	var float []string
	for _, n := range a.ref.Sites() {
		if !isQuantisable(n) || !nn.IsPlain(n.Op) {
			if nn.IsPlain(n.Op) {
				float = append(float, n.Name)
			}
			continue
		}
		if !a.Selected(n) {
			continue
		}
		bits := compress.Bits{Weight: q.WeightBits, Act: q.ActBits}
		if edge[n.Name] {
			bits.Weight = q.EdgeBits
			if bits.Act != 32 {
				bits.Act = q.EdgeBits
			}
		}
		bits = q.BitsOf(n.Name, bits)
		if bits.Weight != 32 {
			err = checkBits(bits.Weight)
		}
		if err := errors.Join(err, checkAct(bits.Act)); err != nil {
			return nil, fmt.Errorf("site %q: %w", n.Name, err)
		}
		if bits.Weight == 32 && bits.Act == 32 {
			continue
		}
		a.bits[n.Name] = bits
		a.order = append(a.order, n.Name)
	}
	if len(a.order) == 0 {
		return nil, errors.New("no selected dense layer or convolution with a plain weight; select sites that are in float")
	}
	if len(float) > 0 {
		a.notes = append(a.notes, fmt.Sprintf("left in float: %s", strings.Join(float, ", ")))
	}
	return a, nil
}

// adaSite is a site as AdaQuant leaves it: what a journal keeps.
type adaSite struct {
	Weight         []float32 // W'
	Bias           []float32 // nil: none
	Ranges, Minima []float64 // of the rows; nil: the weight stays in float
	Range, Minimum float64   // of the input
	Start, End     float64   // mean squared error of the output before and after
	Kept           int       // iterations after which the parameters were taken
}

// quantise returns a copy of the reference whose sites are fitted one after the other.
func (a *adaRun) quantise(ctx context.Context, calib compress.Examples) (*nn.Network, error) {
	net := a.ref.Clone()
	if err := a.quantiseProducts(ctx, net, calib); err != nil {
		return nil, err
	}
	done := 0
	err := compress.WalkPairs(ctx, a.b, a.ref, net, calib, func(p compress.Pair) error {
		bits, ok := a.bits[p.Site.Name]
		if !ok {
			return nil
		}
		x := p.Xq
		if a.Parallel {
			x = p.X
		}
		var f adaSite
		restored, err := a.Journal.Do(a.key(p.Site.Name, bits), &f, func() (err error) {
			f, err = a.fit(ctx, a.ref, p.Float, x, p.Y, bits)
			return err
		})
		if err != nil {
			return err
		}
		if err := a.install(net, p.Site, &f, bits); err != nil {
			return err
		}
		done++
		y := meanSquareOf(p.Y)
		a.Report(compress.Step{
			Site: p.Site.Name, Done: done, Total: len(a.order), Bytes: compress.WeightBytes(net, p.Site), Err: f.End / max(y, math.SmallestNonzeroFloat64), Restored: restored,
		})
		return nil
	})
	return net, err
}

// key names a fitted site in the journal.
func (a *adaRun) key(site string, bits compress.Bits) string {
	return fmt.Sprintf("adaquant/%s/%+v/%t/%d/%d/%+v/%t", site, bits, a.Parallel, a.Iterations, a.Batch, a.Rates, a.LastIterate)
}

// quantiseProducts puts quantisers in front of the operands of attention products, front to back.
func (a *adaRun) quantiseProducts(ctx context.Context, net *nn.Network, calib compress.Examples) error {
	products := map[string]bool{}
	for _, n := range net.Nodes {
		if _, ok := n.Op.(nn.MatMul); ok && a.ActBits != 32 && a.Selected(n) {
			products[n.Name] = true
		}
	}
	if len(products) == 0 {
		return nil
	}
	done := map[string]string{}
	return compress.Walk(ctx, a.b, net, calib, func(n *nn.Node, value func(string) *tensors.Tensor) error {
		if !products[n.Name] {
			return nil
		}
		for i, v := range n.In {
			if by, ok := done[v]; ok {
				n.In[i] = by
				continue
			}
			t := value(v)
			if t == nil || !t.DType().IsFloat() || t.Shape().Rank() == 0 {
				continue
			}
			var r [2]float64
			_, err := a.Journal.Do(fmt.Sprintf("adaquant/product/%s/%d", n.Name, i), &r, func() (err error) {
				r[0], r[1], err = MeanRange(nn.Floats(t), t.Shape().Dimensions[0])
				return err
			})
			if err != nil {
				return fmt.Errorf("input %q: %w", v, err)
			}
			q, err := a.insertRange(net, n, i, r[0], r[1], a.ActBits)
			if err != nil {
				return err
			}
			done[v] = q.Out[0]
		}
		return nil
	})
}

func (a *adaRun) insertRange(net *nn.Network, n *nn.Node, input int, r, m float64, bits int) (*nn.Node, error) {
	g, err := RangeGrid([]float64{r}, []float64{m}, bits, -1)
	if err != nil {
		return nil, err
	}
	return insertQuantizer(net, n, input, nn.QuantizeDequantize{Bits: bits}, g.Scale, g.Zero)
}

// fit fits one site of net to y, reading x.
func (a *adaRun) fit(ctx context.Context, net *nn.Network, n *nn.Node, x, y *tensors.Tensor, bits compress.Bits) (f adaSite, err error) {
	site, rates, err := rangedSite(net, n, x, bits, a.Rates)
	if err != nil {
		return f, err
	}
	if err := checkFinite(nn.Floats(y)); err != nil {
		return f, fmt.Errorf("output: %w", err)
	}
	tr, err := a.fitter.Fit(ctx, site, x, y, SiteFit{
		Iterations: a.Iterations, Batch: cmp.Or(a.Batch, batchFor(y.Shape())), Rates: rates, KeepBest: !a.LastIterate, Seed: a.Seed,
	})
	if err != nil {
		return f, err
	}
	fitted := site.Node("y")
	f = adaSite{Weight: site.Param(fitted, "w").Data(), Start: tr.Start, End: tr.End, Kept: tr.Kept}
	if p := site.Param(fitted, "b"); p != nil {
		f.Bias = p.Data()
	}
	if bits.Weight != 32 {
		f.Ranges, f.Minima = widen(site.Param(fitted, "range").Data()), widen(site.Param(fitted, "min").Data())
	}
	if bits.Act != 32 {
		q := site.Producer(fitted.In[0])
		f.Range, f.Minimum = widen(site.Param(q, "range").Data())[0], widen(site.Param(q, "min").Data())[0]
	}
	return f, nil
}

// batchFor is the number of examples per iteration: one example gives an equation per position of the output, so that few
// of large outputs determine a layer (arXiv:2006.10518, section 3.2).
func batchFor(y shapes.Shape) int {
	d := y.Dimensions
	positions := max(y.Size()/max(d[0]*d[len(d)-1], 1), 1)
	return min(max(1<<16/positions, 8), 50)
}

// rangedSite makes a site of net a network of its own, from "x" to "y", on learned ranges, and says at which rates its
// parameters move.
func rangedSite(net *nn.Network, n *nn.Node, x *tensors.Tensor, bits compress.Bits, r AdaRates) (*nn.Network, map[string]float64, error) {
	y := &nn.Node{Name: "y", Op: n.Op, In: []string{"x"}, Out: []string{"y"}, P: map[string]string{}}
	site := &nn.Network{Inputs: []nn.Input{{Name: "x", Shape: x.Shape()}}, Nodes: []*nn.Node{y}, Outputs: []string{"y"}}
	rates := map[string]float64{}
	for _, l := range []struct {
		local string
		rate  float64
	}{{"w", r.Weight}, {"b", r.Bias}} {
		if p := net.Param(n, l.local); p != nil {
			site.SetParam(y, l.local, p.Role, p.Data(), p.Value.Shape().Dimensions...)
			rates[y.P[l.local]] = l.rate
		}
	}
	weight, input, err := putRanges(site, y, x, bits)
	if err != nil {
		return nil, nil, err
	}
	for _, name := range weight {
		rates[name] = r.WeightRange
	}
	for _, name := range input {
		rates[name] = r.InputRange
	}
	return site, rates, nil
}

// install stores a fitted site in net.
func (a *adaRun) install(net *nn.Network, n *nn.Node, f *adaSite, bits compress.Bits) error {
	s, err := siteOf(net, n)
	if err != nil {
		return err
	}
	if len(f.Weight) != len(s.Weight) {
		return fmt.Errorf("%d fitted weights for a site of %d", len(f.Weight), len(s.Weight))
	}
	if f.Bias != nil {
		setBias(net, n, widen(f.Bias))
	}
	if bits.Act != 32 {
		if _, err := a.insertRange(net, n, 0, f.Range, f.Minimum, bits.Act); err != nil {
			return err
		}
	}
	if bits.Weight == 32 {
		net.SetParam(n, "w", nn.Weight, f.Weight, s.Shape...)
		return nil
	}
	grid, err := RangeGrid(f.Ranges, f.Minima, bits.Weight, 0)
	if err != nil {
		return err
	}
	fq, err := grid.FakeQuant(f.Weight, s.Shape)
	if err != nil {
		return err
	}
	a.werr[n.Name] = compress.RelativeError(s.Weight, fq)
	r, params, err := grid.Store(f.Weight, s.Shape)
	if err != nil {
		return err
	}
	return install(net, n, r, params)
}

// Trainable returns net as it is at the start of the fits, batch norms folded and ranges at the extremes, in a form that
// learn.Trainer trains end to end, ranges included; FreezeRanges then stores it. Quantisation-aware training is the
// alternative to this method where labels are at hand.
func (q AdaQuant) Trainable(ctx context.Context, b compute.Backend, net *nn.Network, calib compress.Examples) (*nn.Network, error) {
	q, err := q.withDefaults()
	if err != nil {
		return nil, err
	}
	a, err := q.prepare(net, calib)
	if err != nil {
		return nil, fmt.Errorf("quant: adaquant: %w", err)
	}
	a.b = b
	out := a.ref.Clone()
	if err := a.quantiseProducts(ctx, out, calib); err != nil {
		return nil, fmt.Errorf("quant: adaquant: %w", err)
	}
	err = compress.Walk(ctx, b, out, calib, func(n *nn.Node, value func(string) *tensors.Tensor) error {
		bits, ok := a.bits[n.Name]
		if !ok {
			return nil
		}
		_, _, err := putRanges(out, n, value(n.In[0]), bits)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("quant: adaquant: %w", err)
	}
	return out, out.Check()
}

// tune repairs the statistics.
func (a *adaRun) tune(ctx context.Context, calib compress.Examples) error {
	tune := a.Tune
	targets := map[string]BNTarget{}
	for name, t := range a.targets {
		if _, ok := a.bits[name]; ok && t.Check() == nil {
			targets[name] = t
		}
	}
	if tune == TuneAuto {
		if tune = TuneNone; len(targets) > 0 {
			tune = TuneBatchNorm
		}
	}
	chosen := func(n *nn.Node) bool { _, ok := a.bits[n.Name]; return ok }
	switch tune {
	case TuneBatchNorm:
		if err := TuneBN(ctx, a.b, a.net, calib, targets, a.BN); err != nil {
			return err
		}
		a.notes = append(a.notes, fmt.Sprintf("batch norm tuning of %d layers", len(targets)))
	case TuneCorrection:
		return CorrectBias(ctx, a.b, a.ref, a.net, calib, chosen)
	case TuneBiases:
		o := a.BiasTune
		if o.Selected == nil {
			last := lastSites(a.net)
			o.Selected = func(n *nn.Node) bool { return chosen(n) && !last[n.Name] }
		}
		before, after, err := TuneBias(ctx, a.b, a.ref, a.net, calib, o)
		if err != nil {
			return err
		}
		a.notes = append(a.notes, fmt.Sprintf("bias tuning: divergence from the original %.3g before, %.3g nats after", before, after))
	}
	return nil
}

func meanSquareOf(t *tensors.Tensor) (m float64) {
	x := nn.Floats(t)
	for _, v := range x {
		m += float64(v) * float64(v)
	}
	return m / float64(max(len(x), 1))
}

// allocate gives each site its weight bits under the budget. Losses are divergences of the output when one site alone is
// rounded to a choice, all others at the largest.
func (a *adaRun) allocate(ctx context.Context, calib compress.Examples) error {
	base := slices.Max(a.Choices)
	var free []string
	var size []float64
	fixed, budget := 0., 0.
	for _, name := range a.order {
		n := a.ref.Node(name)
		weights := float64(a.ref.Param(n, "w").Value.Shape().Size())
		budget += a.MeanBits * weights
		if a.Bits[name].Weight != 0 || a.bits[name].Weight == 32 {
			fixed += weights * float64(a.bits[name].Weight)
			continue
		}
		free, size = append(free, name), append(size, weights)
		a.bits[name] = compress.Bits{Weight: base, Act: a.bits[name].Act}
	}
	if len(free) == 0 {
		return errors.New("a budget is given, and the bits of all sites; leave some out of the bits")
	}
	plain := *a
	plain.Iterations, plain.Parallel, plain.Journal, plain.Progress, plain.werr = 0, true, nil, nil, map[string]float64{}
	start, err := plain.quantise(ctx, calib)
	if err != nil {
		return err
	}
	s := compress.Sensitivity{Select: func(n *nn.Node) bool { return slices.Contains(free, n.Name) }, Journal: a.Journal, Key: fmt.Sprintf("adaquant/%d/%d", base, a.ActBits)}
	if s.Target, _, err = compress.Evaluate(ctx, a.b, a.ref, calib, min(calib.Len(), compress.DefaultBatch)); err != nil {
		return err
	}
	s.Forms = compress.WeightForms(a.Choices, func(net *nn.Network, n *nn.Node, bits int) error {
		w := a.ref.Param(a.ref.Node(n.Name), "w")
		dims := w.Value.Shape().Dimensions
		r, m, err := RowRanges(w.Data(), dims[0])
		if err != nil {
			return err
		}
		grid, err := RangeGrid(r, m, bits, 0)
		if err != nil {
			return err
		}
		form, params, err := grid.Store(w.Data(), dims)
		if err != nil {
			return err
		}
		_, err = net.Substitute(n.Name, form, params)
		return err
	})
	effects, err := s.Measure(ctx, a.b, start, calib)
	if err != nil {
		return err
	}
	delta := DeltaLoss(effects, slices.Index(a.Choices, base))
	got, err := compress.AllocateBits(size, delta, a.Choices, budget-fixed)
	if err != nil {
		return err
	}
	for i, name := range free {
		a.bits[name] = compress.Bits{Weight: got.Bits[i], Act: a.bits[name].Act}
	}
	a.notes = append(a.notes, fmt.Sprintf("bits by site for %.3g per weight: %v; predicted divergence %.3g nats above that of %d bits everywhere", a.MeanBits, got.Bits, got.Loss, base))
	return nil
}

// DeltaLoss turns measured effects into the table of the integer programme: what each site loses at each form against
// the form with the number base, at least 1e-6; 0 at the base.
func DeltaLoss(effects []compress.SiteEffects, base int) [][]float64 {
	out := make([][]float64, len(effects))
	for i, e := range effects {
		for j, f := range e.Effects {
			d := 0.
			if j != base {
				d = max(f.KL-e.Effects[base].KL, 1e-6)
			}
			out[i] = append(out[i], d)
		}
	}
	return out
}

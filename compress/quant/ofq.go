package quant

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/gomlx/compute"
	"github.com/gomlx/gomlx/core/graph"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/learn/optim"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/fold"
)

// WeightTraining is how OFQ quantises the weights of blocks while it trains.
type WeightTraining string

const (
	// Statistical takes the scale of each row from the row itself (StatsQ): the method's.
	Statistical WeightTraining = "statistical"
	// LearnedScale learns a step per row (LSQ): the baseline.
	LearnedScale WeightTraining = "learned"
	// FixedScale keeps LSQ's first steps.
	FixedScale WeightTraining = "fixed"
)

// OFQ trains a network to run on weights and activations of 2 to 4 bits without the weights oscillating between levels
// (Liu et al., ICML 2023, arXiv:2302.02210). Starting from the float network, which is also the teacher (QAT), it
//
//   - takes the scales of weights from statistics instead of learning them (StatsQ), so that no update moves all
//     thresholds;
//   - quantises the product of attention's query and key weights instead of each of them (QueryKeyWeight), where two dense
//     layers of plain weights make the logits; elsewhere both are quantised, and a note says why;
//   - quantises activations by learnt steps, one per token position, between learnt shifts (LearnedStep);
//   - at the end freezes every weight that is far from a threshold and lets the rest settle (CGAMask).
//
// The first and the last layer keep EdgeBits, with learnt steps. Batch norm is folded first. Cost: Steps training steps,
// each 1 to 2.5 times one of the float network; where a post-training method keeps the accuracy, that is the cheaper way.
// Attention with many heads grows: a product has heads·D² weights for the 2·D² of query and key.
//
// The zero value trains 4-bit weights and activations for 600 steps of 64 cases.
type OFQ struct {
	compress.Options
	QAT

	WeightBits int // 1 to 8; 0: 4
	ActBits    int // 2 to 8, or 32: activations stay in float; 0: WeightBits, at least 2
	// EdgeBits are those of weight and input of the first and the last layer, 2 to 8 or 32; 0: 8. Their inputs stay in float
	// where ActBits is 32.
	EdgeBits int

	Weights    WeightTraining // "": Statistical
	NoQueryKey bool           // quantise query and key weights separately
	PerTensor  bool           // one step per activation instead of one per token position, for inputs of any length
	ZeroRows   bool           // accept output channels whose weights are all zero; otherwise they are ErrZeroRow

	AnnealSteps int     // steps of confidence-guided annealing after the training; 0: a tenth of Steps; -1: none
	AnnealLR    float64 // their rate; 0: FloorLR
	Boundary    float64 // distance from a threshold, in levels, up to which weights move then; at most 0.5; 0: 0.005

	// Dampening adds Dampening·Σ(W_q − clip(W))² over the statistical weights to the loss (Nagel et al.,
	// arXiv:2203.11086, eq. 9). 0: off.
	Dampening float64
	// FreezeAbove freezes a weight to the code that it has on average when its oscillation frequency exceeds this
	// (ibid., section 4.2), until the end of the training. 0: off.
	FreezeAbove float64
}

var (
	_ compress.Method = OFQ{}
	_ compress.Holder = OFQ{}
)

// Holds is what training on so many cases holds at most: a step of the student, with the quantised inputs of its sites, beside a
// pass of the teacher.
func (q OFQ) Holds(net *nn.Network, cases int) (int64, error) {
	batch := q.QAT.withDefaults(cases).Batch
	step, err := compress.TrainBytes(net, batch)
	if err != nil {
		return 0, err
	}
	teacher, err := compress.WalkBytes(net, batch)
	if err != nil {
		return 0, err
	}
	sh, err := net.Shapes(batch)
	if err != nil {
		return 0, err
	}
	var inputs int64
	for _, n := range net.Sites() {
		if isQuantisable(n) && q.Selected(n) && q.BitsOf(n.Name, compress.Bits{Act: q.ActBits}).Act != 32 {
			inputs += int64(sh[n.In[0]].ByteSize())
		}
	}
	return step + teacher + inputs, nil
}

func (q OFQ) withDefaults() OFQ {
	q.WeightBits = cmp.Or(q.WeightBits, 4)
	q.ActBits = cmp.Or(q.ActBits, max(q.WeightBits, 2))
	q.EdgeBits = cmp.Or(q.EdgeBits, 8)
	q.Weights = cmp.Or(q.Weights, Statistical)
	q.Boundary = cmp.Or(q.Boundary, .005)
	return q
}

func (q OFQ) check(net *nn.Network, calib compress.Examples) error {
	switch {
	case !slices.Contains([]WeightTraining{Statistical, LearnedScale, FixedScale}, q.Weights):
		return fmt.Errorf("weights are trained with scales that are %q; accepted: %s, %s, %s", q.Weights, Statistical, LearnedScale, FixedScale)
	case q.AnnealSteps < -1 || q.AnnealLR < 0 || q.Dampening < 0 || q.FreezeAbove < 0:
		return fmt.Errorf("%d steps of annealing at rate %g, dampening %g, freezing above %g; none may be negative", q.AnnealSteps, q.AnnealLR, q.Dampening, q.FreezeAbove)
	case calib.Len() == 0:
		return ErrEmpty
	}
	return errors.Join(checkBoundary(q.Boundary), q.checkBits(compress.Bits{Weight: q.WeightBits, Act: q.ActBits}, q.Weights),
		q.checkBits(compress.Bits{Weight: q.EdgeBits, Act: q.EdgeBits}, LearnedScale), q.Check(net), refuseQuantisedSites(net, q.Selected))
}

func (q OFQ) checkBits(b compress.Bits, form WeightTraining) error {
	if b.Weight == 32 {
		return checkAct(b.Act)
	}
	if form == Statistical {
		return errors.Join(checkStatsBits(b.Weight), checkAct(b.Act))
	}
	return errors.Join(checkBits(b.Weight), checkAct(b.Act))
}

// OFQNetwork is a network that is ready for OFQ's training.
type OFQNetwork struct {
	Student   *nn.Network
	Reference *nn.Network // float, with the same sites: the teacher
	Notes     []string

	Settings OFQ // with defaults filled in; training rates and hooks may be changed between phases

	bits map[string]compress.Bits // of every site that is quantised
}

// Prepare returns a copy of net with latent weights and learnt activation quantisers, whose first steps are measured on
// at most Batch of the examples. OFQ.Compress is Prepare, Train, Anneal and Finish.
//
// Errors: ErrEmpty, ErrZeroRow, ErrNotFinite; bits out of range; sites that are quantised already; a network without a
// site.
func (q OFQ) Prepare(ctx context.Context, b compute.Backend, net *nn.Network, calib compress.Examples) (*OFQNetwork, error) {
	p, err := q.prepare(ctx, b, net, calib)
	if err != nil {
		return nil, fmt.Errorf("quant: ofq: %w", err)
	}
	return p, nil
}

func (q OFQ) prepare(ctx context.Context, b compute.Backend, net *nn.Network, calib compress.Examples) (*OFQNetwork, error) {
	q = q.withDefaults()
	if err := errors.Join(q.check(net, calib), q.CheckTraining(net, calib)); err != nil {
		return nil, err
	}
	p := &OFQNetwork{Reference: net.Clone(), Settings: q, bits: map[string]compress.Bits{}}
	folded, err := fold.BatchNorm(p.Reference)
	if err != nil {
		return nil, err
	}
	if len(folded) > 0 {
		p.Notes = append(p.Notes, fmt.Sprintf("%d batch norms folded into the layers before them", len(folded)))
	}
	if err := p.choose(); err != nil {
		return nil, err
	}
	var products map[string]*queryKeySite
	if !q.NoQueryKey && q.Weights == Statistical {
		if products, err = p.multiply(b); err != nil {
			return nil, err
		}
	}
	p.Student = p.Reference.Clone()
	if err := p.latents(products); err != nil {
		return nil, err
	}
	few, err := calib.Slice(0, q.QAT.withDefaults(calib.Len()).Batch, 0)
	if err != nil {
		return nil, err
	}
	plan, err := learnedInputs(p.Student, p.inputBits, !q.PerTensor)
	if err != nil {
		return nil, err
	}
	if err := insertLearned(ctx, b, p.Student, few, plan, true); err != nil {
		return nil, err
	}
	return p, p.Student.Check()
}

// choose fixes the bits of every site that is quantised.
func (p *OFQNetwork) choose() error {
	edge := edgeSites(p.Reference)
	plain := 0
	var float []string
	for _, n := range p.Reference.Sites() {
		if !isQuantisable(n) || !nn.IsPlain(n.Op) {
			float = append(float, n.Name)
			continue
		}
		plain++
		if !p.Settings.Selected(n) {
			continue
		}
		def, form := compress.Bits{Weight: p.Settings.WeightBits, Act: p.Settings.ActBits}, p.Settings.Weights
		if edge[n.Name] {
			def, form = compress.Bits{Weight: p.Settings.EdgeBits, Act: p.Settings.EdgeBits}, LearnedScale
			if p.Settings.ActBits == 32 {
				def.Act = 32
			}
		}
		bits := p.Settings.BitsOf(n.Name, def)
		if err := p.Settings.checkBits(bits, form); err != nil {
			return fmt.Errorf("site %q: %w", n.Name, err)
		}
		p.bits[n.Name] = bits
	}
	switch {
	case plain == 0:
		return errors.New("the network has no dense layer and no convolution with a plain weight")
	case len(p.bits) == 0:
		return fmt.Errorf("none of the network's %d dense layers and convolutions is selected", plain)
	case len(float) > 0:
		p.Notes = append(p.Notes, fmt.Sprintf("left in float: %v", float))
	}
	return nil
}

// multiply replaces query and key layers by their product where both are quantised alike.
func (p *OFQNetwork) multiply(b compute.Backend) (map[string]*queryKeySite, error) {
	products := map[string]*queryKeySite{}
	net := p.Reference
	for _, n := range slices.Clone(net.Nodes) {
		if _, ok := n.Op.(nn.MatMul); !ok || !p.Settings.Selected(n) {
			continue
		}
		sh, err := net.Shapes(0)
		if err != nil {
			return nil, err
		}
		if softmaxBehind(net, n.Out[0], sh) == nil {
			continue
		}
		trial, s, err := reparamQueryKey(b, net, n.Name)
		if errors.Is(err, errNoProduct) {
			p.Notes = append(p.Notes, fmt.Sprintf("query and key weights are quantised separately: %v", err))
			continue
		}
		if err != nil {
			return nil, err
		}
		bq, okq := p.bits[s.query]
		bk, okk := p.bits[s.key]
		if !okq || !okk || bq != bk || bq.Weight == 32 {
			p.Notes = append(p.Notes, fmt.Sprintf("query and key weights of %q are not multiplied: %q and %q are not quantised alike", n.Name, s.query, s.key))
			continue
		}
		*net = *trial
		products[s.name] = s
		delete(p.bits, s.query)
		delete(p.bits, s.key)
		p.bits[s.name] = bq
		if s.value != "" {
			p.bits[s.value] = bq
		}
	}
	for _, n := range net.Sites() {
		if s := products[n.Name]; s != nil {
			p.Notes = append(p.Notes, fmt.Sprintf("%q stores the product of %q and %q: %d weights for %d", s.name, s.query, s.key, net.Param(n, "w").Value.Shape().Size(), len(s.wq)+len(s.wk)))
		}
	}
	return products, nil
}

// latents makes the weights of the student latent.
func (p *OFQNetwork) latents(products map[string]*queryKeySite) error {
	edge := edgeSites(p.Student)
	for _, n := range p.Student.Sites() {
		bits, ok := p.bits[n.Name]
		if !ok || bits.Weight == 32 {
			continue
		}
		if s := products[n.Name]; s != nil {
			form := QueryKeyWeight{Heads: s.heads, Width: s.width, Bits: bits.Weight}
			shape := p.Student.Param(n, "w").Value.Shape().Dimensions
			if err := setLatents(p.Student, n, form, shape, map[string][]float32{"wq": s.wq, "wk": s.wk}); err != nil {
				return err
			}
			continue
		}
		var form Latent = StatsWeight{Bits: bits.Weight, ZeroRows: p.Settings.ZeroRows}
		if edge[n.Name] || p.Settings.Weights != Statistical {
			form = LSQWeight{Bits: bits.Weight, Fixed: p.Settings.Weights == FixedScale && !edge[n.Name]}
		}
		if err := MakeLatent(p.Student, n, form); err != nil {
			return err
		}
	}
	return nil
}

// inputBits is what learnedInputs asks.
func (p *OFQNetwork) inputBits(n *nn.Node, _ int) int {
	if _, ok := n.Op.(nn.MatMul); ok {
		if !p.Settings.Selected(n) {
			return 32
		}
		return p.Settings.ActBits
	}
	if b, ok := p.bits[n.Name]; ok {
		return b.Act
	}
	return 32
}

// Train is the first phase: quantisation-aware training of everything.
func (p *OFQNetwork) Train(ctx context.Context, b compute.Backend, calib compress.Examples) (Trained, error) {
	q := p.Settings.QAT
	phase := Phase{Name: "OFQ, training", Seed: p.Settings.Seed}
	if p.Settings.Dampening > 0 {
		phase.Penalty = p.dampening
	}
	if p.Settings.FreezeAbove > 0 {
		f, err := newIterativeFreezing(p.Student, p.Settings.FreezeAbove)
		if err != nil {
			return Trained{}, err
		}
		q.After = append(slices.Clone(q.After), f.after)
	}
	return q.Train(ctx, b, p.Student, p.Reference, calib, p.Settings.Options, phase)
}

// Anneal is the second phase: confidence-guided annealing. Statistical weights that are further than Boundary from a
// threshold keep their values bit for bit; products of query and key weights get a gradient near thresholds only.
func (p *OFQNetwork) Anneal(ctx context.Context, b compute.Backend, calib compress.Examples) (Trained, error) {
	q := p.Settings.QAT
	d := q.withDefaults(calib.Len())
	phase := Phase{
		Name: "OFQ, annealing", Seed: p.Settings.Seed, First: d.Steps,
		Steps: cmp.Or(p.Settings.AnnealSteps, max(1, d.Steps/10)), LR: cmp.Or(p.Settings.AnnealLR, d.FloorLR), Schedule: optim.Constant(),
		Moves: p.moves(),
	}
	p.setBoundary(p.Settings.Boundary)
	defer p.setBoundary(0)
	return q.Train(ctx, b, p.Student, p.Reference, calib, p.Settings.Options, phase)
}

// moves says which statistical weights are near a threshold.
func (p *OFQNetwork) moves() func(param string, w *graph.Node) *graph.Node {
	bits := map[string]int{}
	for _, n := range p.Student.Sites() {
		if f, ok := n.Op.(nn.Linear).Repr().(StatsWeight); ok {
			bits[n.P["w"]] = f.Bits
		}
	}
	return func(param string, w *graph.Node) *graph.Node {
		if b := bits[param]; b > 0 {
			return cgaMask(w, b, p.Settings.Boundary)
		}
		return nil
	}
}

// setBoundary turns the masks of products on or, with 0, off.
func (p *OFQNetwork) setBoundary(boundary float64) {
	for _, n := range p.Student.Sites() {
		lin := n.Op.(nn.Linear)
		if f, ok := lin.Repr().(QueryKeyWeight); ok {
			f.Boundary = boundary
			n.Op = lin.WithRepr(f)
		}
	}
}

// describedCases is how many of the examples, which may be a training set, the errors of sites are measured on.
const describedCases = 512

// Finish stores the trained weights and describes what became of the network.
func (p *OFQNetwork) Finish(ctx context.Context, b compute.Backend, calib compress.Examples) (*compress.Result, error) {
	before := map[string][]float32{}
	sh, err := p.Student.Shapes(0)
	if err != nil {
		return nil, err
	}
	for _, n := range p.Student.Sites() {
		form, ok := n.Op.(nn.Linear).Repr().(Latent)
		if !ok {
			continue
		}
		l, err := latentsOf(p.Student, n, weightShape(n, sh))
		if err != nil {
			return nil, err
		}
		if before[n.Name] = l.Values["w"]; before[n.Name] == nil {
			before[n.Name] = form.(QueryKeyWeight).product(l)
		}
	}
	if err := Settle(p.Student); err != nil {
		return nil, err
	}
	werr := map[string]float64{}
	for i, n := range p.Student.Sites() {
		if w := before[n.Name]; w != nil {
			werr[n.Name] = compress.RelativeError(w, decoded(p.Student, n))
			p.Settings.Report(compress.Step{Site: n.Name, Done: i + 1, Total: len(p.Student.Sites()), Bytes: compress.WeightBytes(p.Student, n), Err: werr[n.Name]})
		}
	}
	few, err := calib.Slice(0, min(calib.Len(), describedCases), 0)
	if err != nil {
		return nil, err
	}
	sites, err := describe(ctx, b, p.Reference, p.Student, few, p.Settings.QAT.withDefaults(few.Len()).Batch, werr, true)
	if err != nil {
		return nil, err
	}
	return &compress.Result{Network: p.Student, Reference: p.Reference, Sites: sites, Notes: p.Notes}, nil
}

// Compress trains and stores. With a journal, a stopped run goes on within the training.
//
// Errors: those of Prepare; learn.ErrDiverged.
func (q OFQ) Compress(ctx context.Context, b compute.Backend, net *nn.Network, calib compress.Examples) (*compress.Result, error) {
	p, err := q.Prepare(ctx, b, net, calib)
	if err != nil {
		return nil, err
	}
	t, err := p.Train(ctx, b, calib)
	if err != nil {
		return nil, fmt.Errorf("quant: ofq: %w", err)
	}
	classes := ""
	if q.Labels != nil {
		classes = " with their classes"
	}
	p.Notes = append(p.Notes, fmt.Sprintf("trained on %d cases%s, %d steps of %d: loss %.3g to %.3g", calib.Len(), classes, t.Steps, t.Batch, t.First, t.Last))
	if q.AnnealSteps >= 0 && cmp.Or(q.Weights, Statistical) == Statistical {
		if t, err = p.Anneal(ctx, b, calib); err != nil {
			return nil, fmt.Errorf("quant: ofq: %w", err)
		}
		p.Notes = append(p.Notes, fmt.Sprintf("annealed for %d steps: loss %.3g to %.3g", t.Steps, t.First, t.Last))
	}
	r, err := p.Finish(ctx, b, calib)
	if err != nil {
		return nil, fmt.Errorf("quant: ofq: %w", err)
	}
	return r, nil
}

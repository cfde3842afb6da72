package quant

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/gomlx/compute"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/fold"
)

// DataSource says what ZeroQ runs the network on.
type DataSource string

// The sources of data. Noise is there to compare with.
const (
	AutoData      DataSource = ""          // the examples that are given, else distilled ones
	DistilledData DataSource = "distilled" // from the batch norms' statistics; examples that are given are not looked at
	GivenData     DataSource = "given"
	// SyntheticData are examples that are given and were distilled before: averages over space get the range of what is
	// averaged.
	SyntheticData DataSource = "synthetic"
	GaussianNoise DataSource = "gaussian" // of the input's mean and deviation
	UniformNoise  DataSource = "uniform"  // of the same mean and deviation
)

// DataSources lists the sources by name.
func DataSources() []DataSource {
	return []DataSource{DistilledData, GivenData, SyntheticData, GaussianNoise, UniformNoise}
}

// ZeroQ quantises a network without data (Cai et al., arXiv:2001.00281). It synthesises images from the statistics in the
// network's batch norms (Distill), takes the ranges of the activations from them, and, when a Budget is given, measures on
// them what each site loses at each width of its weights,
//
//	Ωᵢ(k) = mean over images of KL(softmax M(x) ‖ softmax M with site i at k bits),
//
// and chooses the widths of least Σ Ωᵢ under the budget from the exact frontier of size and loss. Weights get one
// asymmetric grid per output channel, over the channel's whole range; activations one asymmetric grid per tensor, whose
// range holds 0. What is averaged over space takes the range of what it is the average of: images whose every statistic
// is that of the training set have nearly the same average features, far narrower than real ones.
//
// Cost: a forward and a backward pass per image and step of the distillation, and about half a forward pass per image,
// site and width. Prefer it when there is no data; with some hundred real examples AdaQuant gives more at few bits. A
// network without batch norms is refused (ErrNoBatchNorm) unless examples are given.
//
// The zero value is W8A8.
type ZeroQ struct {
	compress.Options

	WeightBits int // 2 to 8, of every site when there is no Budget; 0: 8
	ActBits    int // 2 to 8, or 32: activations stay in float; 0: 8
	InputBits  int // of the network's input; 0: 8, or 32 when ActBits is
	// Budget, if positive, is the mean number of bits per weight of the selected sites: mixed precision. Sites whose
	// weight bits are overridden in Options.Bits keep those.
	Budget  float64
	Choices []int // widths to choose from under a budget; nil: 2, 4, 8
	// Images is how many are distilled; 0: 32, or as many, at least 4, as 1.6·10⁹ multiply-adds take in one pass.
	Images int
	Data   DataSource
	// Distill says how. Its Steps 0 stands for 500, or as many, at least 60, as 10¹¹ multiply-adds of forward passes allow;
	// its LR 0, with fewer than 500 steps, for a tenth of the input's deviation.
	Distill Distill
	// Fold merges batch norms into the layers before them after the distillation: the same function and grids, and fewer
	// operations. Without it they stay in float, as in the reference.
	Fold    bool
	Batch   int // cases per pass; 0: as the distillation has it
	Buckets int // of the frontier, see compress.FrontierOptions
}

var _ compress.Method = ZeroQ{}

// ZeroQPlan is what ZeroQ finds out before it quantises: it serves every budget.
type ZeroQPlan struct {
	Data     compress.Examples
	Source   DataSource
	Trace    []float64              // of the distillation; nil: there was none
	Norms    int                    // batch norms that were matched
	Effects  []compress.SiteEffects // of the weights at each of Choices, by site; nil without Budget
	Frontier []compress.Allocation  // Bits by site of Effects; Size in bits
	Sites    []string               // of Effects
	Weights  int                    // of these sites
	Bits     map[string]int         // chosen, by site
	Chosen   compress.Allocation    // the point of the frontier
}

// Compress returns a quantised copy of net. Examples may be missing (nil). Errors: ErrNoBatchNorm; compress.ErrInfeasible
// for a budget below the narrowest choice; ErrBits; those of Distill.Run.
func (z ZeroQ) Compress(ctx context.Context, b compute.Backend, net *nn.Network, calib compress.Examples) (*compress.Result, error) {
	r, _, err := z.Run(ctx, b, net, calib)
	return r, err
}

// Run is Compress that also tells what was found on the way.
func (z ZeroQ) Run(ctx context.Context, b compute.Backend, net *nn.Network, calib compress.Examples) (*compress.Result, *ZeroQPlan, error) {
	z, err := z.withDefaults(net)
	if err != nil {
		return nil, nil, fmt.Errorf("quant: zeroq: %w", err)
	}
	p := &ZeroQPlan{Bits: map[string]int{}}
	if err := z.data(ctx, b, net, calib, p); err != nil {
		return nil, nil, err
	}
	ref := net.Clone()
	var notes []string
	if z.Fold {
		folded, err := fold.BatchNorm(ref)
		if err != nil {
			return nil, nil, err
		}
		if len(folded) > 0 {
			notes = append(notes, fmt.Sprintf("%d batch norms folded into the layers before them", len(folded)))
		}
	}
	if z.Batch == 0 {
		z.Batch = min(p.Data.Len(), cmp.Or(z.Distill.Batch, 8))
	}
	if z.Budget > 0 {
		if err := z.allocate(ctx, b, ref, p); err != nil {
			return nil, nil, fmt.Errorf("quant: zeroq: %w", err)
		}
	}
	r, err := z.quantise(ctx, b, ref, p)
	if err != nil {
		return nil, nil, fmt.Errorf("quant: zeroq: %w", err)
	}
	r.Notes = append(p.notes(), notes...)
	if sites := len(net.Sites()); p.Norms > 0 && 2*p.Norms < sites {
		r.Notes = append(r.Notes, fmt.Sprintf("only %d batch norms for %d layers with weights: the ranges behind the others are less sure; give examples if there are any", p.Norms, sites))
	}
	return r, p, nil
}

func (z ZeroQ) withDefaults(net *nn.Network) (ZeroQ, error) {
	z.WeightBits, z.ActBits = cmp.Or(z.WeightBits, 8), cmp.Or(z.ActBits, 8)
	if z.InputBits == 0 {
		z.InputBits = 8
		if z.ActBits == 32 {
			z.InputBits = 32
		}
	}
	if err := errors.Join(checkBits(z.WeightBits), checkAct(z.ActBits), checkAct(z.InputBits), z.Check(net), refuseQuantisedSites(net, z.Selected)); err != nil {
		return z, err
	}
	if len(z.Choices) == 0 {
		z.Choices = []int{2, 4, 8}
	}
	z.Choices = slices.Clone(z.Choices)
	for _, k := range z.Choices {
		if err := checkBits(k); err != nil {
			return z, err
		}
	}
	slices.Sort(z.Choices)
	if len(slices.Compact(slices.Clone(z.Choices))) != len(z.Choices) {
		return z, fmt.Errorf("the choices %v name one width twice", z.Choices)
	}
	if z.Budget < 0 || math.IsNaN(z.Budget) || math.IsInf(z.Budget, 0) {
		return z, fmt.Errorf("a budget of %g bits per weight; want a positive number, or 0 for %d bits everywhere", z.Budget, z.WeightBits)
	}
	if z.Data != AutoData && !slices.Contains(DataSources(), z.Data) {
		return z, fmt.Errorf("data %q; accepted: %q", z.Data, DataSources())
	}
	if z.Images < 0 {
		return z, fmt.Errorf("%d images; want at least 1, or 0 for the default", z.Images)
	}
	return z, nil
}

// data finds what the network is run on.
func (z ZeroQ) data(ctx context.Context, b compute.Backend, net *nn.Network, calib compress.Examples, p *ZeroQPlan) error {
	p.Source = z.Data
	if p.Source == AutoData {
		if p.Source = DistilledData; calib.Len() > 0 {
			p.Source = GivenData
		}
	}
	if p.Source == GivenData || p.Source == SyntheticData {
		if calib.Len() == 0 {
			return fmt.Errorf("quant: zeroq: data %q: %w", p.Source, ErrEmpty)
		}
		p.Data = calib
		return calib.Check(net)
	}
	d, n, err := z.effort(net)
	if err != nil {
		return err
	}
	if p.Source != DistilledData {
		p.Data, err = d.noise(net, n, p.Source)
		return err
	}
	var piece struct {
		X     []float32
		Dims  []int
		Trace []float64
		Norms int
	}
	d.Progress = z.Distill.Progress
	key := fmt.Sprintf("zeroq:distil:%d:%d:%g:%d:%g:%g:%v:%v:%v:%d", n, d.Steps, d.LR, d.Patience, d.MinLR, d.StopAt, d.InputMean, d.InputStd, d.InputRange, d.Seed)
	_, err = z.Journal.Do(key, &piece, func() error {
		r, err := d.Run(ctx, b, net, n)
		if err != nil {
			return err
		}
		piece.X, piece.Dims, piece.Trace, piece.Norms = nn.Floats(r.X[0]), r.X[0].Shape().Dimensions, r.Trace, r.Norms
		return nil
	})
	if err != nil {
		return err
	}
	p.Data = compress.Examples{tensors.FromFlatDataAndDimensions(piece.X, piece.Dims...)}
	p.Trace, p.Norms = piece.Trace, piece.Norms
	return nil
}

// What a distillation takes by default, in multiply-adds of forward passes.
const (
	passWork    = 1.6e9
	distillWork = 1e11
)

// effort fits the number of images and steps to the network.
func (z ZeroQ) effort(net *nn.Network) (Distill, int, error) {
	d, n := z.Distill, z.Images
	d.Seed = z.Seed
	cost, err := net.Cost(1)
	if err != nil {
		return d, 0, err
	}
	macs := float64(max(cost.MACs, 1))
	if n == 0 {
		n = min(max(int(passWork/macs), 4), 32)
	}
	if d.Steps == 0 {
		d.Steps = min(max(int(distillWork/(macs*float64(n))), 60), 500)
	}
	if d.LR == 0 && d.Steps < 500 {
		d.LR = .1 * d.inputScale()
	}
	return d, n, nil
}

// allocate measures every site at every width and chooses under the budget.
func (z ZeroQ) allocate(ctx context.Context, b compute.Backend, ref *nn.Network, p *ZeroQPlan) error {
	forms := compress.WeightForms(z.Choices, func(net *nn.Network, n *nn.Node, bits int) error {
		_, err := asymmetricWeight(net, n, bits)
		return err
	})
	free := func(n *nn.Node) bool {
		return isQuantisable(n) && nn.IsPlain(n.Op) && z.Selected(n) && z.Bits[n.Name].Weight == 0
	}
	if !slices.ContainsFunc(ref.Sites(), free) {
		return errors.New("no site is left to choose bits for")
	}
	var err error
	p.Effects, err = compress.Sensitivity{
		Forms: forms, Select: free, Batch: z.Batch, Journal: z.Journal, Progress: z.Progress,
		Key: fmt.Sprintf("zeroq:%s:%d", p.Source, p.Data.Len()),
	}.Measure(ctx, b, ref, p.Data)
	if err != nil {
		return err
	}
	size, cost := make([]float64, len(p.Effects)), make([][]float64, len(p.Effects))
	for i, e := range p.Effects {
		p.Sites = append(p.Sites, e.Site)
		p.Weights += e.Weights
		size[i] = float64(e.Weights)
		for _, f := range e.Effects {
			cost[i] = append(cost[i], f.KL)
		}
	}
	if p.Frontier, err = compress.ParetoFrontier(size, cost, z.Choices, compress.FrontierOptions{Buckets: z.Buckets}); err != nil {
		return err
	}
	p.Chosen, err = compress.AtBudget(p.Frontier, z.Budget*float64(p.Weights))
	if err != nil {
		return fmt.Errorf("%g bits for each of %d weights: %w", z.Budget, p.Weights, err)
	}
	for i, k := range p.Chosen.Bits {
		p.Bits[p.Sites[i]] = k
	}
	return nil
}

// quantise puts the grids in.
func (z ZeroQ) quantise(ctx context.Context, b compute.Backend, ref *nn.Network, p *ZeroQPlan) (*compress.Result, error) {
	out := ref.Clone()
	sh, err := ref.Shapes(0)
	if err != nil {
		return nil, err
	}
	q := MinMaxPTQ{Options: z.Options, WeightBits: z.WeightBits, ActBits: z.ActBits, Batch: z.Batch}
	q.Bits = map[string]compress.Bits{}
	for _, n := range ref.Sites() {
		over := z.Bits[n.Name]
		over.Weight = cmp.Or(over.Weight, p.Bits[n.Name])
		if from := source(ref, n.In[0], sh); slices.ContainsFunc(ref.Inputs, func(in nn.Input) bool { return in.Name == from }) {
			over.Act = cmp.Or(over.Act, z.InputBits)
		}
		if over != (compress.Bits{}) {
			q.Bits[n.Name] = over
		}
	}
	plan, err := q.plan(out)
	if err != nil {
		return nil, err
	}
	if err := q.quantiseInputs(ctx, b, ref, out, plan, p.Data); err != nil {
		return nil, err
	}
	if p.Source != GivenData {
		if err := z.boundRanges(ctx, b, ref, out, sh, p.Data); err != nil {
			return nil, err
		}
	}
	werr := map[string]float64{}
	for i, n := range plan.sites {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		bits, err := q.bitsOf(n.Name)
		if err != nil {
			return nil, err
		}
		if werr[n.Name], err = asymmetricWeight(out, n, bits.Weight); err != nil {
			return nil, err
		}
		z.Report(compress.Step{Site: n.Name, Done: i + 1, Total: len(plan.sites), Bytes: compress.WeightBytes(out, n), Err: werr[n.Name]})
	}
	if err := out.Check(); err != nil {
		return nil, err
	}
	sites, err := describe(ctx, b, ref, out, p.Data, z.Batch, werr, true)
	if err != nil {
		return nil, err
	}
	return &compress.Result{Network: out, Reference: ref, Sites: sites}, nil
}

// asymmetricWeight stores a site's weight with a grid over the whole range of each output channel, and returns the
// relative error.
func asymmetricWeight(net *nn.Network, n *nn.Node, bits int) (float64, error) {
	s, err := siteOf(net, n)
	if err != nil {
		return 0, err
	}
	a, err := CalibrateUniform(s.Weight, s.Shape, 0, bits, FullRange())
	if err != nil {
		return 0, fmt.Errorf("weight of %q: %w", n.Name, err)
	}
	return storeOnGrid(net, n, s, a)
}

// Asymmetric is the reference's quantiser of a range, in float64 and with signed codes (arXiv:2001.00281, its
// quant_utils.py):
//
//	a = (2^b − 1)/max(Hi − Lo, 1e-8),  z = round(a·Lo) + 2^(b−1)
//	q = clip(round(a·x − z), −2^(b−1), 2^(b−1) − 1),  x̂ = (q + z)/a
//
// FullRange fits the same grid in float32 with codes from 0, which is how weights are stored.
type Asymmetric struct {
	Bits   int
	Lo, Hi float64
}

// Value moves x to the grid.
func (r Asymmetric) Value(x float64) float64 {
	half := float64(int(1) << (r.Bits - 1))
	a := (2*half - 1) / max(r.Hi-r.Lo, 1e-8)
	z := math.RoundToEven(a*r.Lo) + half
	q := min(max(math.RoundToEven(a*x-z), -half), half-1)
	return (q + z) / a
}

// averaged follows a value back to what it is the average of, or moves the values of: the range of that holds it.
func averaged(net *nn.Network, value string, sh map[string]shapes.Shape) string {
	for {
		value = source(net, value, sh)
		p := net.Producer(value)
		if p == nil {
			return value
		}
		switch op := p.Op.(type) {
		case nn.Reduce:
			if op.Fn != "ReduceMean" {
				return value
			}
		case nn.Pool:
			if op.Max {
				return value
			}
		default:
			return value
		}
		value = p.In[0]
	}
}

// boundRanges gives quantisers the ranges that are known without data: what is averaged bounds the average, and the input
// has the range that Distill was told.
func (z ZeroQ) boundRanges(ctx context.Context, b compute.Backend, ref, out *nn.Network, sh map[string]shapes.Shape, x compress.Examples) error {
	set := func(n *nn.Node, lo, hi float32) {
		s, zero := RangeAffine(lo, hi, n.Op.(nn.QuantizeDequantize).Bits)
		out.SetParam(n, "scale", nn.Constant, []float32{float32(s)}, 1)
		out.SetParam(n, "zero", nn.Constant, []float32{float32(zero)}, 1)
	}
	var quantisers []*nn.Node
	var values []string
	for _, n := range out.Nodes {
		if _, ok := n.Op.(nn.QuantizeDequantize); !ok || ref.Node(n.Name) != nil {
			continue
		}
		from := source(ref, n.In[0], sh)
		if from == ref.Inputs[0].Name && z.Distill.InputRange != nil {
			set(n, float32(z.Distill.InputRange[0]), float32(z.Distill.InputRange[1]))
		}
		if v := averaged(ref, from, sh); v != from {
			quantisers, values = append(quantisers, n), append(values, v)
		}
	}
	if len(values) == 0 {
		return nil
	}
	ranges, err := compress.Ranges(ctx, b, ref, x, z.Batch, values...)
	if err != nil {
		return err
	}
	for i, n := range quantisers {
		set(n, ranges[i].Lo, ranges[i].Hi)
	}
	return nil
}

// noise draws inputs of the input's mean and deviation.
func (d Distill) noise(net *nn.Network, n int, kind DataSource) (compress.Examples, error) {
	if err := d.validate(net, n); err != nil {
		return nil, err
	}
	dims := slices.Clone(net.Inputs[0].Shape.Dimensions)
	dims[0] = n
	axis := channelAxis(net, net.Inputs[0].Name)
	target, err := d.inputTarget(dims[axis])
	if err != nil {
		return nil, err
	}
	inner, size := 1, 1
	for i, dim := range dims {
		if size *= dim; i > axis {
			inner *= dim
		}
	}
	x := make([]float32, size)
	r := rng.New(d.Seed, "zeroq:"+string(kind))
	if kind == UniformNoise {
		rng.Uniform(r, x, -math.Sqrt(3), math.Sqrt(3))
	} else {
		rng.Normal(r, x, 1)
	}
	for i, v := range x {
		c := i / inner % dims[axis]
		x[i] = float32(target[0][c] + target[1][c]*float64(v))
	}
	return compress.Examples{tensors.FromFlatDataAndDimensions(x, dims...)}, nil
}

// notes say what a user should know of the run.
func (p *ZeroQPlan) notes() (notes []string) {
	switch p.Source {
	case DistilledData:
		notes = append(notes, fmt.Sprintf("no data: %d images distilled from the statistics of %d batch norms; their mismatch fell from %.4g to %.4g in %d steps", p.Data.Len(), p.Norms, p.Trace[0], p.Trace[len(p.Trace)-1], len(p.Trace)-1))
	case GivenData, SyntheticData:
		notes = append(notes, fmt.Sprintf("calibrated on the %d examples given", p.Data.Len()))
	default:
		notes = append(notes, fmt.Sprintf("calibrated on %d images of %s noise", p.Data.Len(), p.Source))
	}
	if p.Frontier != nil {
		notes = append(notes, fmt.Sprintf("%.3f bits per weight chosen from %d points of the frontier; the sites' losses add up to a divergence of %.3g", p.Chosen.Size/float64(p.Weights), len(p.Frontier), p.Chosen.Loss))
	}
	return notes
}

package restore

import (
	"context"
	"errors"
	"fmt"
	"image"
	"io/fs"
	"math"
	"os"
	"slices"
	"strconv"

	"github.com/gomlx/compute"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/data/imaging"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/learn/optim"
	"github.com/lathe-ml/lathe/nn"
)

// Photo is a training image with the name that errors use.
type Photo struct {
	Name  string
	Image image.Image
}

// Training says how a network learns from pairs of low- and high-resolution patches. The zero value is the recipe that
// Lathe's own networks are trained with: 2,000 steps of Adam from 1e-3 to 1e-4 along a cosine.
type Training struct {
	Steps int // 0: 2000
	Batch int // patches a step; 0: 16
	Patch int // side of a patch in low-resolution pixels; 0: 17

	Degradation Degradation // nil: BicubicShrink
	NoAugment   bool        // without flips and quarter turns
	// Tone in [0, 1) multiplies the contrast of each patch by a random factor in [1-Tone, 1+Tone] and moves it to a random
	// brightness within the studio range: all tones are then learnt equally well, where photographs alone leave the
	// brightest ones to a few skies, and tanh compresses them. 0: photographs as they are, as in the paper.
	Tone float64
	// Grid takes patches from the paper's grid, at every Patch - Σ(k mod 2) pixels, in a new random order each epoch,
	// instead of from anywhere.
	Grid bool

	Optimizer optim.Optimizer // nil: Adam
	LR        float64         // first learning rate; 0: 1e-3 (the paper: 0.01)
	FinalLR   float64         // last learning rate; 0: LR/10 (the paper: 0.0001)
	// LastLayer multiplies the learning rate of the last convolution; 0: 1. The paper has 0.1.
	LastLayer float64
	// Plateau lowers the rate as the paper does instead of along a cosine: whenever an epoch (as many patches as the
	// grid has) improves the mean cost by less than this relative threshold μ, the rate is multiplied by 0.5, down to
	// FinalLR; after Patience epochs without improvement training stops. 0: cosine. The paper does not give μ.
	Plateau  float64
	Patience int // epochs; 0: 100

	// AfterShuffle computes the loss on the shuffled output instead of on the features before the shuffle. The loss
	// and its gradients are the same; the shuffle then costs time in every step.
	AfterShuffle bool

	Seed       uint64
	Checkpoint string // file to resume from and keep up to date while training; "": none
	// Progress is called after every step. Optional.
	Progress func(done, total int, loss float64)
}

func (c Training) withDefaults() (Training, error) {
	if c.Steps == 0 {
		c.Steps = 2000
	}
	if c.Batch == 0 {
		c.Batch = 16
	}
	if c.Patch == 0 {
		c.Patch = 17
	}
	if c.LR == 0 {
		c.LR = 1e-3
	}
	if c.FinalLR == 0 {
		c.FinalLR = c.LR / 10
	}
	if c.LastLayer == 0 {
		c.LastLayer = 1
	}
	if c.Patience == 0 {
		c.Patience = 100
	}
	if c.Degradation == nil {
		c.Degradation = BicubicShrink{}
	}
	if c.Optimizer == nil {
		c.Optimizer = optim.AdamW{}
	}
	switch {
	case c.Steps < 0 || c.Batch < 0 || c.Patch < 1 || c.Batch > 1<<16 || c.Patch > 1<<12:
		return c, fmt.Errorf("restore: %d steps of %d patches of %d×%d pixels; none may be negative, and at most %d patches of %d pixels fit", c.Steps, c.Batch, c.Patch, c.Patch, 1<<16, 1<<12)
	case !(c.LR > 0) || !(c.FinalLR > 0) || c.FinalLR > c.LR || math.IsInf(c.LR, 0):
		return c, fmt.Errorf("restore: learning rates from %v to %v; both must be positive and the last no larger", c.LR, c.FinalLR)
	case !(c.Tone >= 0 && c.Tone < 1):
		return c, fmt.Errorf("restore: tone augmentation %v is not in [0, 1)", c.Tone)
	case !(c.LastLayer > 0) || !(c.Plateau >= 0) || c.Patience < 0:
		return c, fmt.Errorf("restore: last layer's factor %v, plateau threshold %v, patience %d; the first must be positive and none negative", c.LastLayer, c.Plateau, c.Patience)
	}
	return c, nil
}

// PreShuffledMSE is the mean squared error between features [N, h, w, C·r²] and a high-resolution target
// [N, r·h, r·w, C], compared in low-resolution space: the shuffle is a permutation, so loss and gradient equal those of
// the shuffled output, and the shuffle itself is saved (arXiv:1609.05158, sec. 2.3).
func PreShuffledMSE(features, target *graph.Node, r int, order nn.ShuffleOrder) *graph.Node {
	return learn.MSE(features, PixelUnshuffle(target, r, order))
}

// TrainESPCN trains a network of architecture m on photographs: luminance for one channel, RGB for three. Images are
// cropped to a multiple of the factor. It fails without images, and names an image that is smaller than one patch or
// holds samples that are not finite. When ctx ends it returns ctx's error and leaves a checkpoint, if one is named.
func TrainESPCN(ctx context.Context, b compute.Backend, photos []Photo, m ESPCN, c Training) (*nn.Network, error) {
	m = m.withDefaults()
	if err := m.check(); err != nil {
		return nil, err
	}
	c, err := c.withDefaults()
	if err != nil {
		return nil, err
	}
	pairs, err := Pairs(photos, m.Factor, m.Channels, c.Degradation)
	if err != nil {
		return nil, err
	}
	net, err := m.Network(c.Seed)
	if err != nil {
		return nil, err
	}
	if err := FitESPCN(ctx, b, net, m, pairs, c); err != nil {
		return nil, err
	}
	net.Meta["degradation"] = c.Degradation.String()
	net.Meta["steps"] = strconv.Itoa(c.Steps)
	net.Meta["seed"] = strconv.FormatUint(c.Seed, 10)
	return net, nil
}

// FitESPCN trains an existing network of architecture m on pairs.
func FitESPCN(ctx context.Context, b compute.Backend, net *nn.Network, m ESPCN, pairs []Pair, c Training) error {
	m = m.withDefaults()
	c, err := c.withDefaults()
	if err != nil {
		return err
	}
	s, err := newSampler(pairs, m.Factor, c, m.Kernels)
	if err != nil {
		return err
	}
	loss := func(env *nn.Env, batch []*graph.Node) *graph.Node {
		y := net.Lower(env, map[string]*graph.Node{lowInput: batch[0]})[0]
		if c.AfterShuffle {
			return learn.MSE(y, batch[1])
		}
		return PreShuffledMSE(env.Tap[lowFeatures], batch[1], m.Factor, m.Order)
	}
	return fit(ctx, b, net, lowFeatures, loss, s, c)
}

// FitDirect trains any network of one image input on pairs, by the mean squared error of its output: SRCNN, with pairs
// that EnlargePairs prepared and a patch in high-resolution pixels, and FixedUpscaler. The factor is that between the
// two sides of a pair.
func FitDirect(ctx context.Context, b compute.Backend, net *nn.Network, factor int, pairs []Pair, c Training) error {
	c, err := c.withDefaults()
	if err != nil {
		return err
	}
	s, err := newSampler(pairs, factor, c, nil)
	if err != nil {
		return err
	}
	last := ""
	for _, x := range net.Sites() {
		last = x.Name
	}
	loss := func(env *nn.Env, batch []*graph.Node) *graph.Node {
		return learn.MSE(net.Lower(env, map[string]*graph.Node{net.Inputs[0].Name: batch[0]})[0], batch[1])
	}
	return fit(ctx, b, net, last, loss, s, c)
}

// fit is the loop: Adam along a cosine, or the paper's plateau rule.
func fit(ctx context.Context, b compute.Backend, net *nn.Network, last string, loss learn.LossFunc, s *sampler, c Training) error {
	rate := &plateau{c: c, lr: c.LR, epoch: max(1, s.grid/max(c.Batch, 1))}
	o := learn.Options{
		Optimizer: c.Optimizer, LR: c.LR, Seed: c.Seed,
		Schedule: optim.Cosine(max(c.Steps-1, 1), 0, c.FinalLR/c.LR),
		Factors: func(p *nn.Param) learn.Factors {
			f := learn.DefaultFactors(p)
			if p.Name == last+".w" || p.Name == last+".b" {
				f.LR = c.LastLayer
			}
			return f
		},
	}
	if c.Plateau > 0 {
		o.Schedule = optim.Constant()
	}
	t, err := learn.NewTrainer(b, &net.Params, loss, o)
	if err != nil {
		return err
	}
	defer t.Finalize()
	progress := func(done int, loss float64) {
		if c.Progress != nil {
			c.Progress(done, c.Steps, loss)
		}
	}
	if c.Plateau > 0 {
		return rate.run(ctx, t, s, progress)
	}
	_, err = t.Fit(ctx, learn.FitOptions{
		Steps: c.Steps, Batch: s.batch, Checkpoint: c.Checkpoint,
		Progress: func(done, _ int, i learn.Info) { progress(done, i.Loss) },
	})
	return err
}

// plateau is the paper's schedule. Its state is saved with the checkpoint.
type plateau struct {
	c     Training
	lr    float64
	epoch int // steps

	State struct {
		Cost, Best float64 // sum of this epoch, best mean so far (0: none)
		LR         float64
		Idle       int // epochs since the best
	}
}

// run steps until the steps are done or patience ends.
func (p *plateau) run(ctx context.Context, t *learn.Trainer, s *sampler, progress func(int, float64)) error {
	p.State.LR = p.lr
	if p.c.Checkpoint != "" {
		if _, err := t.Load(p.c.Checkpoint, &p.State); err != nil {
			return err
		}
	}
	save := func() error {
		if p.c.Checkpoint == "" {
			return nil
		}
		return t.Save(p.c.Checkpoint, p.State)
	}
	for t.Steps() < p.c.Steps && p.State.Idle < p.c.Patience {
		if err := ctx.Err(); err != nil {
			if serr := save(); serr != nil {
				return fmt.Errorf("%w (and the checkpoint failed: %w)", err, serr)
			}
			return err
		}
		batch, err := s.batch(t.Steps())
		if err != nil {
			return err
		}
		info, err := t.StepLR(p.State.LR, batch...)
		if err != nil {
			return err
		}
		if math.IsNaN(info.Loss) || math.IsInf(info.Loss, 0) {
			return fmt.Errorf("restore: step %d: %w (%g); lower the learning rate", info.Step, learn.ErrDiverged, info.Loss)
		}
		progress(info.Step, info.Loss)
		p.State.Cost += info.Loss
		if info.Step%p.epoch != 0 {
			continue
		}
		p.step(p.State.Cost / float64(p.epoch))
		p.State.Cost = 0
		if err := save(); err != nil {
			return err
		}
	}
	return removeIfThere(p.c.Checkpoint)
}

// step ends an epoch of that mean cost.
func (p *plateau) step(cost float64) {
	st := &p.State
	switch {
	case st.Best == 0:
		st.Best = cost
		return
	case cost < st.Best:
		gain := 1 - cost/st.Best
		st.Best, st.Idle = cost, 0
		if gain >= p.c.Plateau {
			return
		}
	default:
		st.Idle++
	}
	st.LR = max(st.LR/2, p.c.FinalLR)
}

// Pair is one training or test image at both resolutions: HR is exactly factor times LR.
type Pair struct {
	Name   string
	LR, HR *imaging.Image
}

// Pairs degrades photographs: each is cropped to a multiple of the factor and reduced to luminance for one channel.
func Pairs(photos []Photo, factor, channels int, d Degradation) ([]Pair, error) {
	if len(photos) == 0 {
		return nil, fmt.Errorf("restore: no images to make training pairs from")
	}
	if d == nil {
		d = BicubicShrink{}
	}
	out := make([]Pair, len(photos))
	for i, p := range photos {
		m, err := imaging.FromImage(p.Image)
		if err != nil {
			return nil, fmt.Errorf("restore: image %q: %w", p.Name, err)
		}
		if out[i], err = NewPair(p.Name, m.Color, factor, channels, d); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// NewPair degrades one image: grey or RGB in [0, 1]. With one channel the pair holds the luminance.
func NewPair(name string, hr *imaging.Image, factor, channels int, d Degradation) (Pair, error) {
	fail := func(err error) (Pair, error) { return Pair{}, fmt.Errorf("restore: image %q: %w", name, err) }
	if err := hr.Check(); err != nil {
		return fail(err)
	}
	hr, err := hr.CropToMultiple(factor)
	if err != nil {
		return fail(err)
	}
	switch {
	case channels == 1:
		hr, err = imaging.Luma(hr)
	case channels == 3 && hr.C == 1:
		hr, err = imaging.Merge(hr, hr, hr)
	case channels != 3 || hr.C != 3:
		err = fmt.Errorf("%d channels for a network of %d; 1 and 3 are possible", hr.C, channels)
	}
	if err != nil {
		return fail(err)
	}
	lr, err := d.Degrade(hr, factor)
	if err != nil {
		return fail(err)
	}
	if lr.H*factor != hr.H || lr.W*factor != hr.W {
		return fail(fmt.Errorf("the degradation %s made %d×%d pixels of %d×%d", d, lr.W, lr.H, hr.W, hr.H))
	}
	return Pair{name, lr, hr}, nil
}

// EnlargePairs replaces the low-resolution side by its bicubic enlargement, as SRCNN sees it.
func EnlargePairs(pairs []Pair, factor int) ([]Pair, error) {
	out := make([]Pair, len(pairs))
	for i, p := range pairs {
		m, err := imaging.Bicubic(p.LR, float64(factor), float64(factor), true)
		if err != nil {
			return nil, fmt.Errorf("restore: image %q: %w", p.Name, err)
		}
		out[i] = Pair{p.Name, m, p.HR}
	}
	return out, nil
}

// sampler cuts batches of patches. A step's batch depends on the seed and the step alone.
type sampler struct {
	pairs  []Pair
	factor int
	c      Training
	stride int
	grid   int   // patches on the paper's grid over all images
	starts []int // first grid patch of each image
}

func newSampler(pairs []Pair, factor int, c Training, kernels []int) (*sampler, error) {
	if len(pairs) == 0 {
		return nil, fmt.Errorf("restore: the set of training images is empty")
	}
	s := &sampler{pairs: pairs, factor: factor, c: c, stride: c.Patch}
	for _, k := range kernels {
		s.stride -= k % 2
	}
	s.stride = max(s.stride, 1)
	channels := pairs[0].LR.C
	for _, p := range pairs {
		if p.LR.W < c.Patch || p.LR.H < c.Patch {
			return nil, fmt.Errorf("restore: image %q has %d×%d pixels at low resolution, a patch %d×%d; leave it out or take smaller patches", p.Name, p.LR.W, p.LR.H, c.Patch, c.Patch)
		}
		if p.HR.W != p.LR.W*factor || p.HR.H != p.LR.H*factor || p.LR.C != channels || p.HR.C != channels {
			return nil, fmt.Errorf("restore: image %q is a pair of %d×%d×%d and %d×%d×%d; the second must be %d times the first, all with %d channels", p.Name, p.LR.W, p.LR.H, p.LR.C, p.HR.W, p.HR.H, p.HR.C, factor, channels)
		}
		if err := p.LR.Check(); err != nil {
			return nil, fmt.Errorf("restore: image %q: %w", p.Name, err)
		}
		if err := p.HR.Check(); err != nil {
			return nil, fmt.Errorf("restore: image %q: %w", p.Name, err)
		}
		s.starts = append(s.starts, s.grid)
		s.grid += s.gridSide(p.LR.W) * s.gridSide(p.LR.H)
	}
	return s, nil
}

func (s *sampler) gridSide(n int) int { return (n-s.c.Patch)/s.stride + 1 }

// batch returns low-resolution patches [B, p, p, C] and high-resolution ones [B, r·p, r·p, C].
func (s *sampler) batch(step int) ([]*tensors.Tensor, error) {
	r := rng.New(s.c.Seed, "patches:"+strconv.Itoa(step))
	p, f, c := s.c.Patch, s.factor, s.pairs[0].LR.C
	low := make([]float32, 0, s.c.Batch*p*p*c)
	high := make([]float32, 0, s.c.Batch*p*p*f*f*c)
	var epoch int
	var perm []int
	for i := range s.c.Batch {
		var pair Pair
		var x, y int
		if s.c.Grid {
			at := step*s.c.Batch + i
			if e := at / s.grid; perm == nil || e != epoch {
				epoch, perm = e, rng.New(s.c.Seed, "epoch:"+strconv.Itoa(e)).Perm(s.grid)
			}
			g := perm[at%s.grid]
			n := len(s.starts) - 1
			for s.starts[n] > g {
				n--
			}
			pair, g = s.pairs[n], g-s.starts[n]
			w := s.gridSide(pair.LR.W)
			x, y = g%w*s.stride, g/w*s.stride
		} else {
			pair = s.pairs[r.IntN(len(s.pairs))]
			x, y = r.IntN(pair.LR.W-p+1), r.IntN(pair.LR.H-p+1)
		}
		lr, err := pair.LR.Crop(x, y, p, p)
		if err != nil {
			return nil, err
		}
		hr, err := pair.HR.Crop(x*f, y*f, p*f, p*f)
		if err != nil {
			return nil, err
		}
		if !s.c.NoAugment {
			o := r.IntN(8)
			lr, hr = lr.Orient(o), hr.Orient(o)
		}
		if s.c.Tone > 0 {
			retone(r, s.c.Tone, lr, hr)
		}
		low, high = append(low, lr.Pix...), append(high, hr.Pix...)
	}
	return []*tensors.Tensor{
		tensors.FromFlatDataAndDimensions(low, s.c.Batch, p, p, c),
		tensors.FromFlatDataAndDimensions(high, s.c.Batch, p*f, p*f, c),
	}, nil
}

// retone applies one random linear map to both sides of a pair, which keeps them a pair: degradations are linear.
func retone(r *rng.Rand, tone float64, lr, hr *imaging.Image) {
	const black, white = 16. / 255, 235. / 255
	a, u := 1+tone*(2*r.Float64()-1), r.Float64()
	lo, hi := float64(slices.Min(hr.Pix)), float64(slices.Max(hr.Pix))
	if span := hi - lo; a*span > white-black {
		a = (white - black) / span
	}
	b := black - a*lo + u*(white-black-a*(hi-lo))
	for _, m := range []*imaging.Image{lr, hr} {
		for i, v := range m.Pix {
			m.Pix[i] = float32(a*float64(v) + b)
		}
	}
}

func removeIfThere(path string) error {
	if path == "" {
		return nil
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

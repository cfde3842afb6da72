package batchsize

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"

	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/nn"
)

// AdaptiveBatcher draws the cases of every step, steps a learn.Trainer on them, and lets a Test decide on the size of the
// next batch. Every epoch is a new permutation; a batch that is larger than what is left of an epoch continues into the
// next one, without drawing a case twice. Set the fields, call [AdaptiveBatcher.Start], make the trainer with
// [AdaptiveBatcher.Probe], then call [AdaptiveBatcher.Step], or let Trainer.Fit call it:
//
//	a := &batchsize.AdaptiveBatcher{Test: batchsize.NormTest{Eta: .5}, N: train.N, Initial: 16, Max: 8192}
//	probe, err := a.Probe(net)
//	t, err := learn.NewTrainer(b, &net.Params, learn.Classifier(net), learn.Options{Optimizer: optim.AdaGradNorm{}, LR: 1, Probe: probe})
//	t.Fit(ctx, learn.FitOptions{Steps: math.MaxInt, Extra: a, Done: func() bool { return a.Samples() >= budget }, Step: func(t *learn.Trainer) (learn.Info, error) {
//		return a.Step(t, t.LR(), batch)
//	}})
//
// The loss must be a mean over the cases of the batch (axis 0 of its first tensor): the weight of a case must not depend on
// the others, and weight decay belongs into the optimiser. The test looks at the batch just used and changes only the next.
type AdaptiveBatcher struct {
	Test Test // nil: the size never changes

	N       int    // number of training cases
	Initial int    // cases of the first batch; at least 2 for a test; 0: 16
	Max     int    // largest batch; 0: N
	Seed    uint64 // of the order

	// Ladder is the factor between the sizes that batches have, at least 1.01; 0: 1.5. A size is rounded up to the next one,
	// because every size is compiled on its own.
	Ladder float64
	// MaxMicro is the largest number of cases that are in memory at once; a larger batch is so many micro-batches of that
	// size. 0: Max.
	MaxMicro int
	// Groups, if not 0, estimates the variance from so many micro-batches (GroupStats) instead of from single cases. It
	// works for every network, and costs so many smaller passes per step. At least 2; 8 or more are advised.
	Groups int

	TestInterval int     // steps from one test to the next; 0: 1
	MaxGrowth    float64 // largest factor by which one test may enlarge the batch, at least 1; 0: no limit

	// Ramp, if not nil, takes the place of Test: the size of a batch before which so many cases were seen.
	Ramp func(samples int) int

	ready   bool
	s       batcherState
	last    GradStats
	order   []int
	orderOf int
	probe   *probe
}

// batcherState is what a checkpoint keeps.
type batcherState struct {
	N       int     `json:"n"`
	Initial int     `json:"initial"`
	Max     int     `json:"max"`
	Micro   int     `json:"micro"`
	Groups  int     `json:"groups"`
	Ladder  float64 `json:"ladder"`
	Seed    uint64  `json:"seed,string"`

	Size       int `json:"size"` // of the next batch
	Samples    int `json:"samples"`
	Steps      int `json:"steps"`
	Tests      int `json:"tests"`
	Passed     int `json:"passed"`
	Stationary int `json:"stationary"`

	Epoch    int   `json:"epoch"`
	Position int   `json:"position"`       // cases of the epoch that were drawn
	Head     []int `json:"head,omitempty"` // cases of the last batch that came from the epoch before
	Taken    int   `json:"taken,omitempty"`
}

// Start checks the fields, fills defaults in and begins at the first batch. The other methods do it when it was not done.
func (a *AdaptiveBatcher) Start() error {
	a.Initial, a.Max = cmp.Or(a.Initial, 16), cmp.Or(a.Max, a.N)
	a.Ladder, a.TestInterval, a.MaxMicro = cmp.Or(a.Ladder, 1.5), cmp.Or(a.TestInterval, 1), cmp.Or(a.MaxMicro, a.Max)
	switch {
	case a.N < 1:
		return fmt.Errorf("batchsize: %d training cases; give at least 1", a.N)
	case a.Initial < 1 || a.Test != nil && a.Initial < 2:
		return fmt.Errorf("batchsize: a first batch of %d has no variance; use 2 cases or more", a.Initial)
	case a.Max < a.Initial:
		return fmt.Errorf("batchsize: the largest batch (%d) is below the first (%d)", a.Max, a.Initial)
	case a.Max > a.N:
		return fmt.Errorf("batchsize: the largest batch (%d) exceeds the %d training cases, and a case is drawn once per batch; use at most %d", a.Max, a.N, a.N)
	case !(a.Ladder >= 1.01) || math.IsInf(a.Ladder, 0):
		return fmt.Errorf("batchsize: ladder of factor %g; use at least 1.01, such as 1.5", a.Ladder)
	case a.MaxMicro < 1:
		return fmt.Errorf("batchsize: micro-batches of %d cases; use at least 1", a.MaxMicro)
	case a.Groups < 0 || a.Groups == 1 || a.Groups > a.Max:
		return fmt.Errorf("batchsize: %d groups; use 2 to %d, 8 or more are advised (0: single cases)", a.Groups, a.Max)
	case a.TestInterval < 1:
		return fmt.Errorf("batchsize: a test every %d steps; use at least 1", a.TestInterval)
	case a.MaxGrowth != 0 && !(a.MaxGrowth >= 1):
		return fmt.Errorf("batchsize: growth of at most %g; use at least 1, or 0 for no limit", a.MaxGrowth)
	}
	if a.Test != nil { // refuses thresholds of 0 before anything is computed
		if _, _, err := a.Test.Next(GradStats{B: 2, MeanSq: 1, VarL1: 1, Var: []float64{1}, Mean: []float64{1}, Inner: &InnerStats{}}, 2); err != nil {
			return err
		}
	}
	a.s = batcherState{N: a.N, Initial: a.Initial, Max: a.Max, Micro: a.MaxMicro, Groups: a.Groups, Ladder: a.Ladder, Seed: a.Seed}
	a.order, a.last = nil, GradStats{}
	a.s.Size, _ = a.plan(a.Initial)
	a.ready = true
	return nil
}

func (a *AdaptiveBatcher) start() error {
	if a.ready {
		return nil
	}
	return a.Start()
}

// MicroBatching splits a requested batch among workers that accumulate gradients, as the reference implementation does:
// with B = min(requested, maxBatch), micro-batches of ⌈B/(workers·accumulation)⌉ cases; where that exceeds maxMicro, of
// maxMicro cases, ⌈B/(maxMicro·workers)⌉ of them per worker. global is what the step sees, at most maxBatch. Arguments
// below 1 count as 1.
func MicroBatching(requested, workers, accumulation, maxMicro, maxBatch int) (micro, acc, global int) {
	ceil := func(a, b int) int { return (a + b - 1) / b }
	requested, workers, acc, maxMicro, maxBatch = max(requested, 1), max(workers, 1), max(accumulation, 1), max(maxMicro, 1), max(maxBatch, 1)
	b := min(requested, maxBatch)
	if micro = ceil(b, workers*acc); micro > maxMicro {
		micro = maxMicro
		acc = ceil(b, micro*workers)
	}
	return micro, acc, min(micro*workers*acc, maxBatch)
}

// rung rounds up to the next of first, ⌈first·Ladder⌉, …, at most top.
func (a *AdaptiveBatcher) rung(n, first, top int) int {
	r := first
	for r < n && r < top {
		r = max(r+1, int(math.Ceil(float64(r)*a.Ladder)))
	}
	return min(r, top)
}

// plan rounds a requested size up to one that batches have, at most Max, and says how many cases its micro-batches have.
func (a *AdaptiveBatcher) plan(n int) (size, micro int) {
	n = min(max(n, a.Initial), a.Max)
	if a.Groups == 0 {
		if n <= a.MaxMicro {
			size = a.rung(n, min(a.Initial, a.MaxMicro), min(a.MaxMicro, a.Max))
			return size, size
		}
		micro, _, size = MicroBatching(n, 1, 1, a.MaxMicro, a.Max)
		return size, micro
	}
	// equal micro-batches, at least Groups of them
	ceil := func(x, y int) int { return (x + y - 1) / y }
	micro = a.rung(ceil(n, a.Groups), ceil(a.Initial, a.Groups), min(a.MaxMicro, max(1, a.Max/a.Groups)))
	count := a.Groups
	if micro == a.MaxMicro {
		count = max(count, ceil(n, micro))
	}
	return micro * min(count, max(a.Groups, a.Max/micro)), micro
}

// Size is the number of cases of the next batch, as it will be.
func (a *AdaptiveBatcher) Size() int { return a.s.Size }

// Samples is the number of cases drawn so far.
func (a *AdaptiveBatcher) Samples() int { return a.s.Samples }

// Tests says how many tests were made, how many of them a batch passed, and how many were undefined because its gradient
// was zero.
func (a *AdaptiveBatcher) Tests() (made, passed, stationary int) {
	return a.s.Tests, a.s.Passed, a.s.Stationary
}

// Last returns the statistics of the last batch that was tested.
func (a *AdaptiveBatcher) Last() GradStats { return a.last }

// Next draws the next batch: indices in [0, N), none twice. The caller owns the slice.
func (a *AdaptiveBatcher) Next() ([]int, error) {
	if err := a.start(); err != nil {
		return nil, err
	}
	size := a.s.Size
	if a.Ramp != nil {
		size, _ = a.plan(a.Ramp(a.s.Samples))
		a.s.Size = size
	}
	var out []int
	if left := a.N - a.s.Position; left < size {
		out = slices.Clone(a.epoch()[a.s.Position:])
		a.s.Epoch, a.s.Position = a.s.Epoch+1, 0
		a.s.Head, a.s.Taken = slices.Clone(out), size-len(out)
	}
	k := size - len(out)
	out = append(out, a.epoch()[a.s.Position:a.s.Position+k]...)
	a.s.Position += k
	a.s.Samples += size
	a.s.Steps++
	return out, nil
}

// epoch is the order of the present epoch. Where a batch reaches into it from the epoch before, the cases that the batch
// has already come behind those that complete it.
func (a *AdaptiveBatcher) epoch() []int {
	if a.order != nil && a.orderOf == a.s.Epoch {
		return a.order
	}
	p := rng.New(a.Seed, "batchsize/epoch/"+strconv.Itoa(a.s.Epoch)).Perm(a.N)
	if len(a.s.Head) > 0 {
		had := make(map[int]bool, len(a.s.Head))
		for _, i := range a.s.Head {
			had[i] = true
		}
		first, rest := make([]int, 0, a.s.Taken), make([]int, 0, a.N)
		for _, i := range p {
			if len(first) < a.s.Taken && !had[i] {
				first = append(first, i)
			} else {
				rest = append(rest, i)
			}
		}
		p = append(first, rest...)
	}
	a.order, a.orderOf = p, a.s.Epoch
	return p
}

// Update lets the test judge the statistics of the batch just used and sets the size of the next one. Between the tests, at
// the largest size and without a test it does nothing. A zero gradient keeps the size; Tests counts it.
func (a *AdaptiveBatcher) Update(s GradStats) error {
	if err := a.start(); err != nil {
		return err
	}
	if !a.due() {
		return nil
	}
	a.last = s
	next, passed, err := a.Test.Next(s, a.s.Size)
	if errors.Is(err, ErrStationary) {
		a.s.Tests++
		a.s.Stationary++
		return nil
	}
	if err != nil {
		return err
	}
	a.s.Tests++
	if passed {
		a.s.Passed++
	}
	if a.MaxGrowth != 0 {
		next = min(next, max(a.s.Size, int(math.Floor(min(float64(a.s.Size)*a.MaxGrowth, math.MaxInt32)))))
	}
	if next > a.s.Size {
		size, _ := a.plan(next)
		a.s.Size = max(a.s.Size, size)
	}
	return nil
}

// due says whether the step just drawn is to be tested.
func (a *AdaptiveBatcher) due() bool {
	largest, _ := a.plan(a.Max)
	return a.Test != nil && a.Ramp == nil && a.s.Size < largest && a.s.Steps%a.TestInterval == 0
}

// Probe returns what the trainer's Options.Probe must be: nil without a test. It refuses networks whose single cases have
// no gradients of their own, unless Groups is set.
func (a *AdaptiveBatcher) Probe(net *nn.Network) (learn.Probe, error) {
	if err := a.start(); err != nil {
		return nil, err
	}
	if a.Test == nil || a.Ramp != nil {
		return nil, nil
	}
	p := &probe{net: net, exact: a.Groups == 0}
	p.vectors, p.inner = needs(a.Test)
	if p.exact {
		if err := Check(net); err != nil {
			return nil, err
		}
	}
	a.probe = p
	return p, nil
}

// Step draws a batch, makes tensors of it with batch (axis 0 of each is that of the cases), does one step of the trainer at
// rate lr, in micro-batches where need be, and tests it.
func (a *AdaptiveBatcher) Step(t *learn.Trainer, lr float64, batch func(idx []int) ([]*tensors.Tensor, error)) (learn.Info, error) {
	idx, err := a.Next()
	if err != nil {
		return learn.Info{}, err
	}
	_, micro := a.plan(len(idx))
	var parts [][]*tensors.Tensor
	for part := range slices.Chunk(idx, micro) {
		b, err := batch(part)
		if err != nil {
			return learn.Info{}, fmt.Errorf("batchsize: batch of step %d: %w", t.Steps()+1, err)
		}
		parts = append(parts, b)
	}
	var info learn.Info
	if len(parts) == 1 {
		info, err = t.StepLR(lr, parts[0]...)
	} else {
		info, err = t.StepMicro(lr, parts)
	}
	if err != nil {
		return info, err
	}
	if !a.due() || !finite(info.Loss) { // a diverged step is the loop's to report
		return info, nil
	}
	s, err := a.stats(info, len(idx), micro)
	if err != nil {
		return info, err
	}
	return info, a.Update(s)
}

// stats puts together what the probe saw of the micro-batches of a step.
func (a *AdaptiveBatcher) stats(info learn.Info, size, micro int) (GradStats, error) {
	if a.probe == nil || len(info.Probed) == 0 || info.Probed[0][seenMeanSq] == nil {
		return GradStats{}, errors.New("batchsize: the trainer has no probe; give it that of AdaptiveBatcher.Probe (learn.Options.Probe)")
	}
	vectors, inner := needs(a.Test)
	values := func(part int, name string) []float64 { return nn.Float64s(info.Probed[part][name]) }
	grouped := a.Groups > 0 || inner && len(info.Probed) > 1
	if grouped && (vectors || inner) {
		var means [][]float64
		for i := range info.Probed {
			if (i+1)*micro <= size { // a smaller last one is left out
				means = append(means, values(i, seenMean))
			}
		}
		return groupStats(means, micro, a.probe.offsets)
	}
	b, m := float64(size), float64(len(info.Probed))
	s := GradStats{B: size}
	sum, between := 0., 0.
	for i := range info.Probed {
		between += total(values(i, seenMeanSq))
	}
	if s.MeanSq = between; m > 1 {
		s.MeanSq = info.Norm * info.Norm
	}
	if grouped {
		c := b / m
		s.VarL1 = max(0, c/(m-1)*(between-m*s.MeanSq))
		return s, nil
	}
	for i := range info.Probed {
		sum += total(values(i, seenSquares))
	}
	s.VarL1 = max(0, (sum-b*s.MeanSq)/(b-1))
	if vectors {
		var second []float64
		for i := range info.Probed {
			share := float64(min(micro, size-i*micro)) / b
			sec, mean := values(i, seenSecond), values(i, seenMean)
			if i == 0 {
				second, s.Mean = make([]float64, len(sec)), make([]float64, len(mean))
			}
			for j := range sec {
				second[j] += sec[j]
				s.Mean[j] += share * mean[j]
			}
		}
		s.Var = second
		for j, q := range second {
			s.Var[j] = (q - b*s.Mean[j]*s.Mean[j]) / (b - 1)
			if s.Var[j] < 1e-6*q/(b-1) { // rounding of float32 sums
				s.Var[j] = 0
			}
		}
	}
	if inner {
		s.Inner = &InnerStats{}
		sq, along, mean := values(0, seenSquares), values(0, seenAlong), values(0, seenMeanSq)
		for t := range sq {
			s.Inner.add(b, sq[t], along[t], mean[t])
		}
	}
	return s, nil
}

func total(x []float64) (sum float64) {
	for _, v := range x {
		sum += v
	}
	return sum
}

// MarshalJSON writes where the batcher stands: what learn.FitOptions.Extra keeps in the checkpoint.
func (a *AdaptiveBatcher) MarshalJSON() ([]byte, error) {
	if err := a.start(); err != nil {
		return nil, err
	}
	return json.Marshal(a.s)
}

// UnmarshalJSON continues from there: the next batch is the one that would have followed. It refuses the state of another
// data set, seed or range of sizes, and changes nothing then.
func (a *AdaptiveBatcher) UnmarshalJSON(b []byte) error {
	if err := a.start(); err != nil {
		return err
	}
	var s batcherState
	if err := json.Unmarshal(b, &s); err != nil {
		return fmt.Errorf("batchsize: state: %w", err)
	}
	mine, theirs := a.s, s
	for _, x := range []*batcherState{&mine, &theirs} {
		*x = batcherState{N: x.N, Initial: x.Initial, Max: x.Max, Micro: x.Micro, Groups: x.Groups, Ladder: x.Ladder, Seed: x.Seed}
	}
	switch size, _ := a.plan(s.Size); {
	case theirs.N != mine.N || theirs.Initial != mine.Initial || theirs.Max != mine.Max || theirs.Micro != mine.Micro || theirs.Groups != mine.Groups || theirs.Ladder != mine.Ladder || theirs.Seed != mine.Seed:
		return fmt.Errorf("batchsize: the saved state is of %d cases, batches of %d to %d (micro %d, groups %d, ladder %g) and seed %d; this one of %d, %d to %d (%d, %d, %g) and %d",
			s.N, s.Initial, s.Max, s.Micro, s.Groups, s.Ladder, s.Seed, a.N, a.Initial, a.Max, a.MaxMicro, a.Groups, a.Ladder, a.Seed)
	case s.Size < 1 || a.Ramp == nil && s.Size != size || s.Samples < 0 || s.Steps < 0 || s.Epoch < 0 || s.Position < 0 || s.Position > s.N || s.Taken < 0 || s.Taken > s.N || len(s.Head)+s.Taken > s.N:
		return fmt.Errorf("batchsize: the saved state is no state of this batcher (size %d, epoch %d, position %d)", s.Size, s.Epoch, s.Position)
	}
	for _, i := range s.Head {
		if i < 0 || i >= s.N {
			return fmt.Errorf("batchsize: the saved state names case %d of %d", i, s.N)
		}
	}
	a.s, a.order = s, nil
	return nil
}

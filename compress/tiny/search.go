package tiny

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/lathe-ml/lathe/internal/alloc"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/internal/search"
)

// Contrib is what every choice contributes, over training the classifier alone, and what it takes: gains add up by
// assumption, memories by the formula. Any unit will do for the gains.
type Contrib struct {
	Ratios []float64 // shares of channels that were looked at, ascending

	GainBias   []float64   // [k] of training the biases of the last k convolutions; [0] is 0
	MemBias    []float64   // [k] in bytes
	GainWeight [][]float64 // [convolution][ratio] of training its weights too
	MemWeight  [][]float64 // [convolution][ratio] in bytes; negative: not to be had, as a share of less than a channel
	// Base is the accuracy with the classifier alone, where it was measured.
	Base float64
}

// Check reports what does not fit together.
func (c *Contrib) Check() error {
	n := len(c.GainWeight)
	if len(c.GainBias) == 0 || len(c.GainBias) != len(c.MemBias) || len(c.GainBias) > n+1 || len(c.MemWeight) != n {
		return fmt.Errorf("tiny: contributions of %d and %d numbers of biases, %d and %d layers", len(c.GainBias), len(c.MemBias), n, len(c.MemWeight))
	}
	for l := range n {
		if len(c.GainWeight[l]) != len(c.Ratios) || len(c.MemWeight[l]) != len(c.Ratios) {
			return fmt.Errorf("tiny: contributions of convolution %d for %d and %d shares; there are %d", l, len(c.GainWeight[l]), len(c.MemWeight[l]), len(c.Ratios))
		}
	}
	for _, v := range slices.Concat(append(slices.Clone(c.GainWeight), c.GainBias, c.MemBias)...) {
		if math.IsNaN(v) || math.IsInf(v, 0) {
			return fmt.Errorf("tiny: a contribution is %g", v)
		}
	}
	return nil
}

// Choice is a scheme as the search sees it.
type Choice struct {
	Gain, Memory float64 // sums
	Biases       int
	Ratio        []int // of every convolution: index into Ratios, −1: frozen
}

// Scheme is the choice with its shares.
func (c Choice) Scheme(ratios []float64) Scheme {
	s := Scheme{Biases: c.Biases, Weights: map[int]float64{}}
	for l, r := range c.Ratio {
		if r >= 0 {
			s.Weights[l] = ratios[r]
		}
	}
	return s
}

// Exact returns the choice of greatest gain whose memory is within the limit: for every number of biases the best options
// of the convolutions that it reaches, by dynamic programming over what is optimal for some memory. Of equal gains the
// smaller memory wins.
func Exact(c *Contrib, limit float64) (Choice, error) {
	if err := c.Check(); err != nil {
		return Choice{}, err
	}
	n := len(c.GainWeight)
	best := Choice{Gain: math.Inf(-1)}
	for k := range c.GainBias {
		left := limit - c.MemBias[k]
		if left < 0 {
			continue
		}
		var items [][]alloc.Option
		var ratios [][]int
		for l := n - k; l < n; l++ {
			opts, index := []alloc.Option{{}}, []int{-1}
			for r := range c.Ratios {
				if m := c.MemWeight[l][r]; m >= 0 && m <= left {
					opts, index = append(opts, alloc.Option{Size: m, Cost: -c.GainWeight[l][r]}), append(index, r)
				}
			}
			items, ratios = append(items, opts), append(ratios, index)
		}
		front, err := alloc.Frontier(items, alloc.Options{})
		if err != nil {
			if front, err = alloc.Frontier(items, alloc.Options{Buckets: 4096}); err != nil {
				return Choice{}, err
			}
		}
		p, err := alloc.BySize(front, left)
		if err != nil {
			return Choice{}, err
		}
		x := Choice{Biases: k, Ratio: slices.Repeat([]int{-1}, n)}
		for i, o := range p.Choice {
			x.Ratio[n-k+i] = ratios[i][o]
		}
		x.Gain, x.Memory = c.sum(x)
		if x.Gain > best.Gain || x.Gain == best.Gain && x.Memory < best.Memory {
			best = x
		}
	}
	if math.IsInf(best.Gain, -1) {
		return best, fmt.Errorf("%w: %g, and training the classifier alone takes %g", ErrBudget, limit, c.MemBias[0])
	}
	return best, nil
}

func (c *Contrib) sum(x Choice) (gain, memory float64) {
	gain, memory = c.GainBias[x.Biases], c.MemBias[x.Biases]
	for l, r := range x.Ratio {
		if r >= 0 {
			gain += c.GainWeight[l][r]
			memory += c.MemWeight[l][r]
		}
	}
	return gain, memory
}

// SearchOptions are the sizes of the evolutionary search. The zero value is the paper's kind of search at sizes of our
// choosing: a population of 64 over 25 generations of which the best quarter survives.
type SearchOptions struct {
	Population  int     // 0: 64
	Generations int     // 0: 25
	Mutation    float64 // probability of each gene to change; 0: 0.1
	Seed        uint64
}

// Search returns the best scheme within a budget of bytes by evolution: children take the number of biases from one
// parent and each layer's share from either, or mutate; those beyond the budget drop the choices of least gain per byte
// until they fit; the best is polished by changing one or two choices. For this additive gain Exact finds the optimum, which the evolution reaches or nearly so; it serves when
// gains are to be judged in another way. Budget 0 trains the classifier alone.
func Search(ctx context.Context, c *Contrib, budget int, o SearchOptions) (Choice, error) {
	if err := c.Check(); err != nil {
		return Choice{}, err
	}
	if o.Population == 0 {
		o.Population = 64
	}
	if o.Generations == 0 {
		o.Generations = 25
	}
	if o.Mutation == 0 {
		o.Mutation = .1
	}
	if o.Population < 4 || o.Generations < 0 || !(o.Mutation > 0 && o.Mutation <= 1) {
		return Choice{}, fmt.Errorf("tiny: population %d, %d generations, mutation %g; want at least 4 and 0, and a probability", o.Population, o.Generations, o.Mutation)
	}
	if float64(budget) < c.MemBias[0] {
		return Choice{}, fmt.Errorf("%w: %d, and training the classifier alone takes %g", ErrBudget, budget, c.MemBias[0])
	}
	n := len(c.GainWeight)
	gene := func(r *rng.Rand) int { return r.IntN(len(c.Ratios)+1) - 1 }
	repair := func(x Choice) Choice { return c.repair(x, float64(budget)) }
	quarter := max(1, o.Population/4)
	children := o.Population - quarter
	e := search.Elite[Choice]{
		Population: o.Population, Parents: quarter, Generations: o.Generations, Mutants: children / 2, Crossovers: children - children/2,
		Random: func(r *rng.Rand) Choice {
			x := Choice{Biases: r.IntN(len(c.GainBias)), Ratio: make([]int, n)}
			for l := range x.Ratio {
				x.Ratio[l] = gene(r)
			}
			return repair(x)
		},
		Mutate: func(r *rng.Rand, p Choice) Choice {
			x := Choice{Biases: p.Biases, Ratio: slices.Clone(p.Ratio)}
			sure := r.IntN(n + 1) // a child that equals its parent is no use
			if r.Float64() < o.Mutation || sure == n {
				x.Biases = r.IntN(len(c.GainBias))
			}
			for l := range x.Ratio {
				if r.Float64() < o.Mutation || sure == l {
					x.Ratio[l] = gene(r)
				}
			}
			return repair(x)
		},
		Cross: func(r *rng.Rand, a, b Choice) Choice {
			x := Choice{Biases: a.Biases, Ratio: slices.Clone(a.Ratio)}
			for l := range x.Ratio {
				if r.IntN(2) == 1 {
					x.Ratio[l] = b.Ratio[l]
				}
			}
			return repair(x)
		},
	}
	last, _, err := e.Run(ctx, o.Seed, func(_ context.Context, x Choice) (float64, error) { return x.Gain, nil })
	if err != nil {
		return Choice{}, err
	}
	return c.polish(last[0].Genome, float64(budget)), nil
}

// polish improves a choice by changes of one or two layers, or of a layer and the number of biases, until none helps.
func (c *Contrib) polish(x Choice, budget float64) Choice {
	n := len(x.Ratio)
	for better := true; better; {
		better = false
		start := x
		try := func(changes ...[2]int) {
			y := Choice{Biases: start.Biases, Ratio: slices.Clone(start.Ratio)}
			for _, ch := range changes {
				if ch[0] == n {
					y.Biases = ch[1]
				} else {
					y.Ratio[ch[0]] = ch[1]
				}
			}
			for l, r := range y.Ratio {
				if r >= 0 && (l < n-y.Biases || c.MemWeight[l][r] < 0) {
					return
				}
			}
			if y.Gain, y.Memory = c.sum(y); y.Memory <= budget && y.Gain > x.Gain {
				x, better = y, true
			}
		}
		var single [][2]int
		for l := range n {
			for r := -1; r < len(c.Ratios); r++ {
				single = append(single, [2]int{l, r})
			}
		}
		for k := range c.GainBias {
			single = append(single, [2]int{n, k})
		}
		for i, a := range single {
			try(a)
			for _, b := range single[:i] {
				if a[0] != b[0] {
					try(a, b)
				}
			}
		}
	}
	return x
}

// repair makes a choice feasible: layers that the biases do not reach are frozen, choices that lose or are not to be had
// dropped, then those of least gain per byte, and at last biases.
func (c *Contrib) repair(x Choice, budget float64) Choice {
	n := len(x.Ratio)
	for {
		for l, r := range x.Ratio {
			if r >= 0 && (l < n-x.Biases || c.MemWeight[l][r] < 0 || c.GainWeight[l][r] < 0) {
				x.Ratio[l] = -1
			}
		}
		if x.Gain, x.Memory = c.sum(x); x.Memory <= budget {
			return x
		}
		worst, least := -1, math.Inf(1)
		for l, r := range x.Ratio {
			if r < 0 {
				continue
			}
			if v := c.GainWeight[l][r] / max(c.MemWeight[l][r], 1e-9); v < least {
				worst, least = l, v
			}
		}
		switch {
		case worst >= 0:
			x.Ratio[worst] = -1
		case x.Biases > 0:
			x.Biases--
		default:
			return x
		}
	}
}

// DefaultRatios are the paper's shares of channels.
var DefaultRatios = []float64{1. / 8, 1. / 4, 1. / 2, 1}

// memories fills in what the choices take by the formula.
func (c *Contrib) memories(net *Net) {
	layers := net.memory()
	total := func(m []Memory) (bytes float64) {
		for _, x := range m {
			bytes += float64(x.Activation+x.Weight) / 8
		}
		return bytes
	}
	for k := range len(layers) + 1 {
		c.MemBias = append(c.MemBias, total(SavedMemory(layers, k, nil, DeviceBits)))
	}
	for l := range layers {
		k := len(layers) - l
		row := make([]float64, len(c.Ratios))
		for i, r := range c.Ratios {
			if row[i] = total(SavedMemory(layers, k, map[int]float64{l: r}, DeviceBits)) - c.MemBias[k]; row[i] == 0 {
				row[i] = -1 // not one channel
			}
		}
		c.MemWeight = append(c.MemWeight, row)
	}
}

// ContribOptions say how contributions are measured.
type ContribOptions struct {
	Ratios   []float64    // nil: DefaultRatios
	Train    TrainOptions // with a journal a stopped analysis trains nothing twice
	Progress func(done, total int)
}

// Contribution measures by training what each choice contributes to the accuracy over training the classifier alone, on
// a proxy task: the biases of the last k convolutions for every k, and the weights of each convolution at each share with
// the biases from it on. It takes as many short trainings as there are choices.
func Contribution(ctx context.Context, net *Net, train, validation *Examples, o ContribOptions) (*Contrib, error) {
	if validation == nil {
		return nil, errors.New("tiny: contributions are accuracies on validation examples; there are none")
	}
	c, err := newContrib(net, o.Ratios)
	if err != nil {
		return nil, err
	}
	n := len(net.Convs())
	accuracy := func(s Scheme) (float64, error) {
		r, err := Train(ctx, net, s, train, validation, o.Train)
		if errors.Is(err, ErrDiverged) {
			return 0, nil
		}
		if err != nil {
			return 0, err
		}
		return r.Validation.Accuracy, nil
	}
	if c.Base, err = accuracy(Scheme{}); err != nil {
		return nil, err
	}
	done, total := 0, n+n*len(c.Ratios)
	step := func() {
		if done++; o.Progress != nil {
			o.Progress(done, total)
		}
	}
	for k := 1; k <= n; k++ {
		a, err := accuracy(Scheme{Biases: k})
		if err != nil {
			return nil, err
		}
		c.GainBias[k] = a - c.Base
		step()
	}
	for l := range n {
		for i, r := range c.Ratios {
			step()
			if c.MemWeight[l][i] < 0 {
				continue
			}
			a, err := accuracy(Scheme{Biases: n - l, Weights: map[int]float64{l: r}})
			if err != nil {
				return nil, err
			}
			// over the biases that it is trained with
			c.GainWeight[l][i] = a - c.Base - c.GainBias[n-l]
		}
	}
	return c, nil
}

func newContrib(net *Net, ratios []float64) (*Contrib, error) {
	c := &Contrib{Ratios: ratios}
	if c.Ratios == nil {
		c.Ratios = DefaultRatios
	}
	for _, r := range c.Ratios {
		if !(r > 0 && r <= 1) {
			return nil, fmt.Errorf("%w: a share of %g of the channels; want one in (0, 1]", ErrScheme, r)
		}
	}
	n := len(net.Convs())
	c.GainBias = make([]float64, n+1)
	for range n {
		c.GainWeight = append(c.GainWeight, make([]float64, len(c.Ratios)))
	}
	c.memories(net)
	return c, nil
}

// Package prune makes networks sparse and measures how sparse they are. Here is the sparsity of activations: what share of
// a feed-forward layer's hidden units is active for a token, and what can be saved by not multiplying with the others.
package prune

import (
	"fmt"
	"math"
	"slices"
)

// SparsityProbe collects how sparse the hidden activations of feed-forward layers are (arXiv:2210.06313, section 2):
// for a map a = σ(K x + b) of [tokens, width] the share of active entries per token, the rate at which each neuron is
// active, neurons that never are, and how much of the energy the largest entries hold. Layers are kept in the order in
// which they are first seen. The zero value is ready.
type SparsityProbe struct {
	layers []*layerCounts
}

// Tokens says how activations are read.
type Tokens struct {
	// Valid marks the tokens that count, one for each row; nil: all. Padding must not be counted.
	Valid []bool
	// Relative is for activations without exact zeros (GELU, SiLU): an entry is active if its magnitude exceeds Relative
	// times the largest of its token. 0: an entry is active if it is above 0.
	Relative float64
}

// Observe adds the activations a [tokens, width] of a layer; an entry is active if it is above 0. NaN and infinite values
// are refused, and so is another width than the layer had before; nothing is counted then.
func (p *SparsityProbe) Observe(layer string, a []float32, width int) error {
	return p.ObserveTokens(layer, a, width, Tokens{})
}

// ObserveTokens is Observe for some of the tokens, or for activations without exact zeros.
func (p *SparsityProbe) ObserveTokens(layer string, a []float32, width int, o Tokens) error {
	return observe(p, layer, a, width, o)
}

func observe[F float32 | float64](p *SparsityProbe, layer string, a []F, width int, o Tokens) error {
	switch {
	case width < 1:
		return fmt.Errorf("prune: layer %q has rows of %d activations; want at least 1", layer, width)
	case len(a)%width != 0:
		return fmt.Errorf("prune: layer %q: %d activations are not rows of %d", layer, len(a), width)
	case o.Valid != nil && len(o.Valid) != len(a)/width:
		return fmt.Errorf("prune: layer %q: %d marks of valid tokens for %d tokens", layer, len(o.Valid), len(a)/width)
	case !(o.Relative >= 0 && o.Relative < 1):
		return fmt.Errorf("prune: layer %q: a relative threshold of %g; want 0 (above 0 is active) to 1", layer, o.Relative)
	}
	for i, v := range a {
		if math.IsNaN(float64(v)) || math.IsInf(float64(v), 0) {
			return fmt.Errorf("prune: layer %q: activation %d of token %d is %g; the network or its inputs are broken", layer, i%width, i/width, float64(v))
		}
	}
	var l *layerCounts
	for _, k := range p.layers {
		if k.name == layer {
			l = k
		}
	}
	if l == nil {
		l = &layerCounts{name: layer, relative: o.Relative, active: make([]int64, width), perToken: make([]int64, width+1)}
		p.layers = append(p.layers, l)
	}
	switch {
	case len(l.active) != width:
		return fmt.Errorf("prune: layer %q has %d neurons here and had %d before", layer, width, len(l.active))
	case l.relative != o.Relative:
		return fmt.Errorf("prune: layer %q is counted with the threshold %g here and %g before", layer, o.Relative, l.relative)
	}
	square := make([]float64, width)
	for t := 0; t*width < len(a); t++ {
		if o.Valid == nil || o.Valid[t] {
			addToken(l, a[t*width:(t+1)*width], square)
		}
	}
	return nil
}

// layerCounts is what a probe knows of a layer.
type layerCounts struct {
	name     string
	relative float64
	tokens   int64
	active   []int64 // tokens that activate each neuron
	perToken []int64 // tokens by their number of active entries
	energy   float64 // sum over tokens of the top tenth's share
}

func addToken[F float32 | float64](l *layerCounts, row []F, square []float64) {
	least := 0.
	if l.relative > 0 {
		for _, v := range row {
			least = max(least, math.Abs(float64(v)))
		}
		least *= l.relative
	}
	n, total := 0, 0.
	for i, v := range row {
		x := float64(v)
		square[i] = x * x
		total += square[i]
		if l.relative > 0 {
			x = math.Abs(x)
		}
		if x > least {
			n++
			l.active[i]++
		}
	}
	l.tokens++
	l.perToken[n]++
	if total == 0 {
		l.energy++
		return
	}
	tenth := (len(row) + 9) / 10
	if n <= tenth && l.relative == 0 && !slices.ContainsFunc(row, func(v F) bool { return v < 0 }) {
		l.energy++
		return
	}
	l.energy += sumOfLargest(square, tenth) / total
}

// sumOfLargest is the sum of the k largest of v; it reorders v.
func sumOfLargest(v []float64, k int) float64 {
	t, s, n := kth(v, k), 0., 0
	for _, x := range v {
		if x > t {
			s += x
			n++
		}
	}
	return s + float64(k-n)*t
}

// LayerSparsity is what a probe saw of one layer.
type LayerSparsity struct {
	Layer    string  `json:"layer"`
	Tokens   int64   `json:"tokens"`
	Width    int     `json:"width"`                        // neurons
	Relative float64 `json:"relative_threshold,omitempty"` // active is above so much of the token's largest magnitude; 0: above 0
	// NonZero is the share of active entries, averaged over the tokens: the headline figure.
	NonZero float64 `json:"nonzero"`
	// Spread is how that share is distributed over the tokens: least, quartiles and greatest.
	Spread [5]float64 `json:"nonzero_quartiles"`
	Dead   int        `json:"dead"` // neurons that no token activated
	// EnergyTop10 is the share of Σa² that the largest tenth of a token's entries holds, averaged over the tokens (a token
	// of zeros: 1).
	EnergyTop10 float64   `json:"energy_top10"`
	Rates       []float64 `json:"-"` // share of the tokens that activate each neuron
	PerToken    []int64   `json:"-"` // tokens by their number of active entries, 0 to Width
}

// Kept is the share of entries that are left, averaged over the tokens, when no token keeps more than k.
func (l LayerSparsity) Kept(k int) float64 {
	s := 0.
	for n, tokens := range l.PerToken {
		s += float64(tokens) * float64(min(n, k))
	}
	return s / (float64(l.Tokens) * float64(l.Width))
}

// Report gives the layers in order. A probe that saw no token is refused.
func (p *SparsityProbe) Report() ([]LayerSparsity, error) {
	var out []LayerSparsity
	for _, l := range p.layers {
		if l.tokens == 0 {
			return nil, fmt.Errorf("prune: layer %q saw no token that counts", l.name)
		}
		r := LayerSparsity{Layer: l.name, Tokens: l.tokens, Width: len(l.active), Relative: l.relative, EnergyTop10: l.energy / float64(l.tokens), PerToken: slices.Clone(l.perToken)}
		r.NonZero = r.Kept(r.Width)
		for _, n := range l.active {
			if n == 0 {
				r.Dead++
			}
			r.Rates = append(r.Rates, float64(n)/float64(l.tokens))
		}
		for i := range r.Spread {
			rank, seen := int64(i)*(l.tokens-1)/4, int64(0)
			for n, tokens := range l.perToken {
				if seen += tokens; seen > rank {
					r.Spread[i] = float64(n) / float64(r.Width)
					break
				}
			}
		}
		out = append(out, r)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("prune: the probe has not observed any activation")
	}
	return out, nil
}

// MeanNonZero is the share of active entries over all layers, each counting alike.
func MeanNonZero(layers []LayerSparsity) float64 {
	s := 0.
	for _, l := range layers {
		s += l.NonZero
	}
	return s / float64(max(len(layers), 1))
}

// DeadShare is the share of the neurons of all layers that no token activated.
func DeadShare(layers []LayerSparsity) float64 {
	dead, all := 0, 0
	for _, l := range layers {
		dead += l.Dead
		all += l.Width
	}
	return float64(dead) / float64(max(all, 1))
}

package quant

import (
	"cmp"
	"fmt"

	"github.com/lathe-ml/lathe/nn"
)

// OscillationTracker follows the codes of weights in training, step by step, and tells how many go back and forth
// (Nagel et al., arXiv:2203.11086, eq. 7 and 8). With d_t = sign(k_{t−1} − k_t) and dir the last d that was not zero,
// an oscillation is a step on which the direction turns round, and its frequency is averaged:
//
//	osc_t = [dir·d_t = −1],  f_t = m·osc_t + (1−m)·f_{t−1}
//
// The zero value is ready for use.
type OscillationTracker struct {
	Momentum float64 // m; 0: 0.01

	last      []int32
	direction []int8
	frequency []float64
	count     []int
	flips     int64
	steps     int
}

// Update takes the codes after a step; the first call sets the start. The number of codes must not change.
func (o *OscillationTracker) Update(codes []int32) error {
	if o.last == nil {
		n := len(codes)
		o.last, o.direction, o.frequency, o.count = append([]int32{}, codes...), make([]int8, n), make([]float64, n), make([]int, n)
		return nil
	}
	if len(codes) != len(o.last) {
		return fmt.Errorf("quant: oscillation: %d codes after %d", len(codes), len(o.last))
	}
	m := cmp.Or(o.Momentum, .01)
	for i, k := range codes {
		d := int8(cmp.Compare(o.last[i], k))
		osc := 0.
		if d != 0 {
			o.flips++
			if o.direction[i] == -d {
				osc = 1
				o.count[i]++
			}
			o.direction[i] = d
		}
		o.frequency[i] = m*osc + (1-m)*o.frequency[i]
	}
	copy(o.last, codes)
	o.steps++
	return nil
}

// Frequency is f of every weight.
func (o *OscillationTracker) Frequency() []float64 { return o.frequency }

// Counts are the oscillations of every weight.
func (o *OscillationTracker) Counts() []int { return o.count }

// Directions are the last directions of every weight: 1 down, -1 up, 0 never moved.
func (o *OscillationTracker) Directions() []int8 { return o.direction }

// Total is the number of oscillations of all weights.
func (o *OscillationTracker) Total() (n int) {
	for _, c := range o.count {
		n += c
	}
	return n
}

// Share is the share of weights whose frequency is above a threshold, usually 0.005.
func (o *OscillationTracker) Share(threshold float64) float64 {
	n := 0
	for _, f := range o.frequency {
		if f > threshold {
			n++
		}
	}
	return float64(n) / float64(max(len(o.frequency), 1))
}

// FlipRate is the share of weights whose code changes in a step, on average.
func (o *OscillationTracker) FlipRate() float64 {
	return float64(o.flips) / float64(max(o.steps*len(o.last), 1))
}

// coded is a Latent whose weights have codes.
type coded interface {
	Latent
	codes(l *Latents) ([]int32, error)
}

// LatentCodes returns a function that reads the codes of the weights of a network in training, site after site, where
// of is true (nil: everywhere); latent forms without codes are left out.
func LatentCodes(net *nn.Network, of func(site *nn.Node) bool) (read func() ([]int32, error), err error) {
	sh, err := net.Shapes(0)
	if err != nil {
		return nil, err
	}
	type site struct {
		node  *nn.Node
		form  coded
		shape []int
	}
	var sites []site
	for _, n := range net.Sites() {
		if c, ok := n.Op.(nn.Linear).Repr().(coded); ok && (of == nil || of(n)) {
			sites = append(sites, site{n, c, weightShape(n, sh)})
		}
	}
	return func() (codes []int32, err error) {
		for _, s := range sites {
			l, err := latentsOf(net, s.node, s.shape)
			if err != nil {
				return nil, err
			}
			k, err := s.form.codes(l)
			if err != nil {
				return nil, fmt.Errorf("quant: node %q: %w", s.node.Name, err)
			}
			codes = append(codes, k...)
		}
		return codes, nil
	}, nil
}

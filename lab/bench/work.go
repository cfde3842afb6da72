package bench

import (
	"fmt"
	"slices"

	"github.com/lathe-ml/lathe/nn"
)

// Work is the least that a training step of a network must do, whatever computes it.
type Work struct {
	Network    string `json:"network"`
	What       string `json:"what"`
	Parameters int    `json:"parameters"` // trained scalars
	// FLOPs are the operations of the products and convolutions: two per multiply-add, forward, for the gradient of the
	// weights and for that of the input, where a gradient is wanted. Elementwise work is not counted.
	FLOPs float64 `json:"flops"`
	// Bytes is the traffic that cannot be avoided without computing things twice, if nothing stays in a cache: the batch
	// is read; parameters and both moments of AdamW are read and written; what goes into a product is written on the way
	// forward and read on the way back.
	Bytes float64 `json:"bytes"`
}

// Work counts a step of the network.
func (n Network) Work() (Work, error) {
	net, _, batch, err := n.make()
	if err != nil {
		return Work{}, err
	}
	w := Work{Network: n.Name, What: n.What}
	for _, t := range batch {
		w.Bytes += float64(t.Shape().ByteSize())
	}
	for p := range net.Params.All() {
		if p.Trainable() {
			w.Parameters += p.Value.Shape().Size()
		}
	}
	w.Bytes += 6 * 4 * float64(w.Parameters)
	size := batch[0].Shape().Dimensions[0]
	cost, err := net.Cost(size)
	if err != nil {
		return w, err
	}
	shapes, err := net.Shapes(size)
	if err != nil {
		return w, err
	}
	// What depends on a parameter has a gradient.
	wanted, saved := map[string]bool{}, map[string]bool{}
	for _, x := range net.Nodes {
		trained := false
		for _, p := range x.P {
			trained = trained || net.Params.Get(p).Trainable()
		}
		reached := slices.ContainsFunc(x.In, func(v string) bool { return wanted[v] })
		for _, o := range x.Out {
			wanted[o] = trained || reached
		}
		macs := float64(cost.ByNode[x.Name])
		if macs == 0 {
			continue
		}
		passes := 1. // forward
		if trained {
			passes++
		}
		for _, v := range x.In {
			if wanted[v] {
				passes++
			}
			if _, input := inputNamed(net, v); !input && v != "" && !saved[v] {
				saved[v] = true
				w.Bytes += 2 * float64(shapes[v].ByteSize())
			}
		}
		w.FLOPs += 2 * macs * passes
	}
	if w.FLOPs == 0 {
		return w, fmt.Errorf("bench: network %q has no products to count", n.Name)
	}
	return w, nil
}

func inputNamed(net *nn.Network, value string) (nn.Input, bool) {
	i := slices.IndexFunc(net.Inputs, func(x nn.Input) bool { return x.Name == value })
	if i < 0 {
		return nn.Input{}, false
	}
	return net.Inputs[i], true
}

// Roofline is the least time in milliseconds that the machine needs for the work: that of the operations at their peak or
// that of the traffic at full bandwidth, whichever is longer (Williams, Waterman, Patterson, doi:10.1145/1498765.1498785).
func (w Work) Roofline(m Machine) float64 { return 1e3 * max(w.FLOPs/m.FMA, w.Bytes/m.Bandwidth) }

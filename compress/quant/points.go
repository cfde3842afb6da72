package quant

import (
	"context"
	"fmt"
	"slices"

	"github.com/gomlx/compute"
	"github.com/gomlx/compute/shapes"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/nn"
)

// role says how an activation is quantised.
type role int

const (
	roleTensor   role = iota // one uniform grid
	roleInput                // the network's input: one uniform grid of InputBits
	roleNorm                 // a norm's output that only linear layers read: channel-wise, then reparameterised
	roleSoftmax              // attention probabilities
	roleUnfolded             // a norm's output that something else reads, too: the channels' grids condensed into one
)

// point is an input of a node at which an activation quantiser stands.
type point struct {
	input int
	role  role
}

// carries says whether an op hands its first input on without changing a value, and whether the last axis stays the
// last; sh gives the shapes of the network's values.
func carries(n *nn.Node, sh map[string]shapes.Shape) (values, lastAxis bool) {
	switch op := n.Op.(type) {
	case nn.Dropout, nn.DropPath:
		return true, true
	case nn.Unary:
		return op.Fn == "Identity", op.Fn == "Identity"
	case nn.Reshape:
		in, out := sh[n.In[0]], sh[n.Out[0]]
		same := in.Rank() > 0 && out.Rank() > 0 && in.Dimensions[in.Rank()-1] == out.Dimensions[out.Rank()-1]
		return true, same
	case nn.Transpose:
		r := len(op.Perm)
		return true, r > 0 && op.Perm[r-1] == r-1
	}
	return false, false
}

// source follows a value back through ops that only move values.
func source(net *nn.Network, value string, sh map[string]shapes.Shape) string {
	for {
		p := net.Producer(value)
		if p == nil || len(p.In) == 0 {
			return value
		}
		if ok, _ := carries(p, sh); !ok {
			return value
		}
		value = p.In[0]
	}
}

// normChannels says whether a node is a norm with one gain per channel of the last axis, and how many.
func normChannels(n *nn.Node, sh map[string]shapes.Shape) (int, bool) {
	s := sh[n.Out[0]]
	last := func(axes []int) bool {
		return len(axes) == 0 || (len(axes) == 1 && (axes[0] == -1 || axes[0] == s.Rank()-1))
	}
	ok := false
	switch op := n.Op.(type) {
	case nn.LayerNorm:
		ok = last(op.Axes)
	case nn.RMSNorm:
		ok = last(op.Axes)
	}
	if !ok || s.Rank() == 0 {
		return 0, false
	}
	return s.Dimensions[s.Rank()-1], true
}

// absorbers follows a norm's output along the edges to what reads it: the dense layers that can take up a scale per
// channel, and everything else ("" stands for an output of the network).
func absorbers(net *nn.Network, value string, sh map[string]shapes.Shape) (dense []*nn.Node, others []string) {
	readers, isOutput := net.Readers(value)
	if isOutput {
		others = append(others, "")
	}
	for _, r := range readers {
		if _, ok := r.Op.(nn.Dense); ok && nn.IsPlain(r.Op) {
			dense = append(dense, r)
			continue
		}
		if _, ok := carries(r, sh); ok {
			d, o := absorbers(net, r.Out[0], sh)
			if len(d) > 0 {
				dense, others = append(dense, d...), append(others, o...)
				continue
			}
		}
		others = append(others, r.Name)
	}
	return dense, others
}

// isQuantisable says whether a node is a site whose input and weight are quantised: dense layers and convolutions.
func isQuantisable(n *nn.Node) bool {
	switch n.Op.(type) {
	case nn.Dense, nn.Conv:
		return true
	}
	return false
}

// storedBits is a stored form of few bits; describe and refuseQuantisedSites read them.
type storedBits interface{ WeightBits() int }

// quantiserOf returns the node that quantises an input of a node, looking through ops that only move values, and its
// bits; nil when the input is in float.
func quantiserOf(net *nn.Network, n *nn.Node, input int, sh map[string]shapes.Shape) (q *nn.Node, bits int) {
	p := net.Producer(source(net, n.In[input], sh))
	if p == nil {
		return nil, 32
	}
	switch op := p.Op.(type) {
	case nn.QuantizeDequantize:
		return p, op.Bits
	case LogQuantize:
		return p, op.Bits
	case TanQuantize:
		return p, op.Bits
	case PowerQuantize:
		return p, op.Bits
	case LearnedStep:
		return p, op.Bits
	}
	return nil, 32
}

// refuseQuantisedSites fails when a node that is selected (nil: every one) has been through a quantiser already: its
// grids would be fitted to grid points. Quantised nodes that are not selected are no obstacle: a recipe runs several
// methods over one network.
func refuseQuantisedSites(net *nn.Network, selected func(*nn.Node) bool) error {
	sh, err := net.Shapes(0)
	if err != nil {
		return err
	}
	for _, n := range net.Nodes {
		if selected != nil && !selected(n) {
			continue
		}
		inputs := 0
		switch op := n.Op.(type) {
		case nn.Linear:
			if s, ok := op.Repr().(storedBits); ok {
				return fmt.Errorf("site %q is quantised already, to %d bits; start from the float network, or leave the site out", n.Name, s.WeightBits())
			}
			inputs = min(1, len(n.In))
		case nn.MatMul:
			inputs = len(n.In)
		}
		for i := range inputs {
			if q, bits := quantiserOf(net, n, i, sh); q != nil {
				return fmt.Errorf("what node %q reads is quantised already, to %d bits by %q; start from the float network, or leave the node out", n.Name, bits, q.Name)
			}
		}
	}
	return nil
}

// transformer is what RepQ-ViT needs to know of a network.
type transformer struct {
	points map[string][]point    // by node name
	norms  map[string][]*nn.Node // norm -> the dense layers that absorb its scale
	shared map[string]string     // norm with dense readers -> something else that reads it
	softmx int                   // attention products
}

// findTransformer finds norms with their dense readers, attention products and sites by following edges.
func findTransformer(net *nn.Network) (*transformer, error) {
	sh, err := net.Shapes(0)
	if err != nil {
		return nil, err
	}
	t := &transformer{points: map[string][]point{}, norms: map[string][]*nn.Node{}, shared: map[string]string{}}
	add := func(n *nn.Node, input int, r role) { t.points[n.Name] = append(t.points[n.Name], point{input, r}) }
	covered := map[string]bool{} // dense layers behind a norm's quantiser
	for _, n := range net.Nodes {
		if _, ok := normChannels(n, sh); !ok {
			continue
		}
		dense, others := absorbers(net, n.Out[0], sh)
		if len(dense) == 0 {
			continue
		}
		if len(others) > 0 {
			t.shared[n.Name] = others[0]
			continue
		}
		t.norms[n.Name] = dense
		for _, d := range dense {
			covered[d.Name] = true
		}
		readers, _ := net.Readers(n.Out[0])
		for _, r := range readers {
			for i, v := range r.In {
				if v == n.Out[0] {
					add(r, i, roleNorm)
				}
			}
		}
	}
	for _, n := range net.Nodes {
		if _, ok := n.Op.(nn.MatMul); ok {
			for i, v := range n.In {
				r := roleTensor
				if p := net.Producer(source(net, v, sh)); p != nil {
					if s, ok := p.Op.(nn.Softmax); ok && !s.Log {
						r = roleSoftmax
						t.softmx++
					}
				}
				add(n, i, r)
			}
		}
		if isQuantisable(n) && nn.IsPlain(n.Op) && !covered[n.Name] {
			r := roleTensor
			from := source(net, n.In[0], sh)
			if slices.ContainsFunc(net.Inputs, func(in nn.Input) bool { return in.Name == from }) {
				r = roleInput
			}
			add(n, 0, r)
		}
	}
	return t, nil
}

// freshName makes a node name that is not taken.
func freshName(net *nn.Network, base string) string {
	name := base
	for i := 2; net.Node(name) != nil || net.Producer(name) != nil; i++ {
		name = fmt.Sprintf("%s%d", base, i)
	}
	return name
}

// insertQuantizer puts an activation quantiser in front of a node's input.
func insertQuantizer(net *nn.Network, n *nn.Node, input int, op nn.Op, scale, zero []float64) (*nn.Node, error) {
	q, err := net.InsertBefore(n.Name, input, freshName(net, n.In[input]+".quant"), op)
	if err != nil {
		return nil, err
	}
	net.SetParam(q, "scale", nn.Constant, narrow(scale), len(scale))
	if zero != nil {
		net.SetParam(q, "zero", nn.Constant, narrow(zero), len(zero))
	}
	return q, nil
}

// describe lists the sites of a compressed network with their sizes and errors.
func describe(ctx context.Context, b compute.Backend, ref, net *nn.Network, calib compress.Examples, batch int, weightErr map[string]float64, outputErr bool) ([]compress.Site, error) {
	sh, err := net.Shapes(0)
	if err != nil {
		return nil, err
	}
	var sites []compress.Site
	var values []string
	for _, n := range net.Sites() {
		lin := n.Op.(nn.Linear)
		s := compress.Site{Name: n.Name, Kind: n.Op.Kind(), WeightBits: 32, Bytes: compress.WeightBytes(net, n)}
		if r, ok := lin.Repr().(storedBits); ok {
			s.WeightBits = r.WeightBits()
		}
		in := make([]shapes.Shape, len(n.In))
		for i, v := range n.In {
			in[i] = sh[v]
		}
		w := lin.WeightShape(in)
		s.Shape, s.FloatBytes = slices.Clone(w.Dimensions), 4*int64(w.Size())
		var q *nn.Node
		q, s.InputBits = quantiserOf(net, n, 0, sh)
		switch {
		case q == nil:
		case q.Op.Kind() != nn.QuantizeDequantize{}.Kind():
			s.Note = q.Op.Kind()
		case q.Op.(nn.QuantizeDequantize).PerChannel:
			s.Note = "per channel"
		default:
			s.Note = "per tensor"
			if m := net.Producer(q.In[0]); m != nil {
				if _, ok := normChannels(m, sh); ok {
					s.Note = "per tensor, after norm " + m.Name
				}
			}
		}
		s.WeightErr = weightErr[n.Name]
		sites, values = append(sites, s), append(values, n.Out[0])
	}
	if len(values) == 0 || !outputErr {
		return sites, nil
	}
	errs, err := compress.SiteErrors(ctx, b, ref, net, calib, batch, values)
	if err != nil {
		return nil, err
	}
	for i := range sites {
		sites[i].OutputErr = errs[i]
	}
	return sites, nil
}

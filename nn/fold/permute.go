package fold

import (
	"errors"
	"fmt"
	"slices"

	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/nn"
)

// ErrTiedChannels: a layer's output channels meet others (a residual sum, attention heads, the network's output), so that
// they cannot be reordered on their own.
var ErrTiedChannels = errors.New("the channels are tied to others")

// PermuteOutputs reorders the output channels of a dense layer or convolution and, so that the network computes the same,
// whatever has an element per channel behind it: norms, depthwise convolutions, and the input columns of every layer that
// reads them. New channel i is old channel perm[i]. The network is left as it is when the channels are tied
// (ErrTiedChannels, with the node that ties them), or a layer stores its weight other than plainly or shares it.
func PermuteOutputs(n *nn.Network, site string, perm []int) error {
	x := n.Node(site)
	if x == nil {
		return fmt.Errorf("fold: there is no node %q", site)
	}
	sh, err := n.Shapes(0)
	if err != nil {
		return err
	}
	p := &permutation{n: n, sh: sh, perm: perm}
	if err := p.site(x); err != nil {
		return fmt.Errorf("fold: reordering the channels of %q: %w", site, err)
	}
	seen := slices.Clone(perm)
	slices.Sort(seen)
	for i, v := range seen {
		if v != i || len(perm) != sh[x.Out[0]].Dimensions[sh[x.Out[0]].Rank()-1] {
			return fmt.Errorf("fold: reordering the channels of %q: %v is no order of its %d channels", site, perm, sh[x.Out[0]].Dimensions[sh[x.Out[0]].Rank()-1])
		}
	}
	if err := p.follow(x.Out[0]); err != nil {
		return fmt.Errorf("fold: reordering the channels of %q: %w", site, err)
	}
	for _, e := range p.edits {
		e()
	}
	return nil
}

// permutation collects the changes, and makes them when all is known to fit.
type permutation struct {
	n     *nn.Network
	sh    map[string]shapes.Shape
	perm  []int
	edits []func()
}

// site reorders the rows of a layer's weight, and its bias.
func (p *permutation) site(x *nn.Node) error {
	switch x.Op.(type) {
	case nn.Dense, nn.Conv:
	default:
		return fmt.Errorf("%q is a %s; want a dense layer or a convolution", x.Name, x.Op.Kind())
	}
	if c, ok := x.Op.(nn.Conv); ok && c.Groups > 1 && c.Groups != c.Out {
		return fmt.Errorf("%q has %d groups of channels: %w", x.Name, c.Groups, ErrTiedChannels)
	}
	if !nn.IsPlain(x.Op) {
		return fmt.Errorf("%q stores its weight as %s; want a plain one", x.Name, x.Op.(nn.Linear).Repr().Kind())
	}
	return p.params(x, "w", "b")
}

// params reorders parameters along their first axis.
func (p *permutation) params(x *nn.Node, locals ...string) error {
	for _, local := range locals {
		q := p.n.Param(x, local)
		if q == nil {
			continue
		}
		if p.n.SharedParam(x, local) {
			return fmt.Errorf("%q shares its parameter %q with another node: %w", x.Name, local, ErrTiedChannels)
		}
		if d := q.Value.Shape().Dimensions; len(d) == 0 || d[0] != len(p.perm) {
			return fmt.Errorf("parameter %q of %q is %v, not one row per channel: %w", local, x.Name, d, ErrTiedChannels)
		}
		p.edits = append(p.edits, func() { setRows(q, 1, p.perm) })
	}
	return nil
}

// columns reorders a reader's weight along its last axis.
func (p *permutation) columns(x *nn.Node) error {
	w := p.n.Param(x, "w")
	if !nn.IsPlain(x.Op) || w == nil || p.n.SharedParam(x, "w") {
		return fmt.Errorf("%q, which reads them, does not store a plain weight of its own", x.Name)
	}
	d := w.Value.Shape().Dimensions
	if d[len(d)-1] != len(p.perm) {
		return fmt.Errorf("%q, which reads them, has %d input columns: %w", x.Name, d[len(d)-1], ErrTiedChannels)
	}
	p.edits = append(p.edits, func() { setRows(w, w.Value.Shape().Size()/len(p.perm), p.perm) })
	return nil
}

// setRows reorders the second of three axes of a parameter read as [outer, len(perm), rest].
func setRows(q *nn.Param, outer int, perm []int) {
	v := q.Data()
	out := make([]float32, 0, len(v))
	rest := len(v) / outer / len(perm)
	for o := range outer {
		for _, from := range perm {
			at := (o*len(perm) + from) * rest
			out = append(out, v[at:at+rest]...)
		}
	}
	q.Value = tensors.FromFlatDataAndDimensions(out, q.Value.Shape().Dimensions...)
}

// follow goes on to whatever reads a value whose last axis is the channels.
func (p *permutation) follow(value string) error {
	readers, isOutput := p.n.Readers(value)
	if isOutput {
		return fmt.Errorf("they are an output of the network: %w", ErrTiedChannels)
	}
	for _, r := range readers {
		if err := p.reader(r, value); err != nil {
			return err
		}
	}
	return nil
}

func (p *permutation) reader(r *nn.Node, value string) error {
	tied := fmt.Errorf("%q (%s) reads them: %w", r.Name, r.Op.Kind(), ErrTiedChannels)
	in, out := p.sh[value], p.sh[r.Out[0]]
	last := func(axes []int) bool {
		return len(axes) == 0 || len(axes) == 1 && (axes[0]+in.Rank())%in.Rank() == in.Rank()-1
	}
	if len(r.In) == 0 || r.In[0] != value || slices.Contains(r.In[1:], value) {
		return tied
	}
	through := func() error {
		if len(r.Out) > 1 {
			return tied
		}
		return p.follow(r.Out[0])
	}
	switch op := r.Op.(type) {
	case nn.Dense:
		return p.columns(r)
	case nn.Conv:
		if op.Groups > 1 {
			if err := p.site(r); err != nil {
				return err
			}
			return through()
		}
		return p.columns(r)
	case nn.BatchNorm:
		if err := p.params(r, "w", "b", "mean", "var"); err != nil {
			return err
		}
		return through()
	case nn.LayerNorm, nn.RMSNorm:
		var axes []int
		if l, ok := op.(nn.LayerNorm); ok {
			axes = l.Axes
		} else {
			axes = op.(nn.RMSNorm).Axes
		}
		if !last(axes) {
			return tied
		}
		if err := p.params(r, "w", "b"); err != nil {
			return err
		}
		return through()
	case nn.Unary, nn.GELU, nn.LeakyReLU, nn.HardSigmoid, nn.Clip, nn.Affine:
		return through()
	case nn.QuantizeDequantize:
		if op.PerChannel {
			return tied
		}
		return through()
	case nn.Pool:
		return through()
	}
	if len(r.In) == 1 && keepsChannels(r.Op, in, out) {
		return through()
	}
	return tied
}

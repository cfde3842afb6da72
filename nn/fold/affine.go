package fold

import (
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"

	"github.com/lathe-ml/lathe/nn"
)

// Report says what became of a network's norms. Nodes go by the names that they had.
type Report struct {
	Folded   []string // gone: merged into the linear layers around them
	Explicit []string // y = scale·x + shift in their place, two elementwise nodes: something else than dense layers reads them
	Kept     []Kept   // still there, because they are no scale and shift at inference
}

// Kept is a norm that stays.
type Kept struct{ Node, Reason string }

// Norms turns every norm that is a scale s and a shift t per channel at inference (nn.AffineNorm: batch norm and the
// norms of design/norm with running statistics) into the weights of its neighbours, so that it costs nothing:
//
//	after a plain convolution or dense layer that nobody else reads    W' = diag(s)·W,  b' = s·b + t
//	in front of plain dense layers alone                               W' = W·diag(s),  b' = b + W·t
//
// In between may be whatever averages, selects or rearranges tokens, as the mean pooling in front of a head does. Where
// the norm's output is itself the residual stream (post-norm blocks), or feeds anything else, its readers get an explicit
// x·s + t: dense layers read that too, since a second, folded path around it would save nothing. The norm's value keeps
// its name there, and so does a layer's value that has taken a norm in.
//
// The network then computes the same at inference, to rounding, and must not be trained with dropout between norm and
// layer. Nothing is changed when an error is returned: a norm that was never trained, for one.
func Norms(n *nn.Network) (Report, error) {
	var r Report
	if err := n.Check(); err != nil {
		return r, err
	}
	sh, err := n.Shapes(0)
	if err != nil {
		return r, err
	}
	type job struct {
		node         *nn.Node
		name         string // folding another norm may rename the node
		scale, shift []float64
	}
	var jobs []job
	for _, x := range n.Nodes {
		op, ok := x.Op.(nn.AffineNorm)
		if !ok {
			if isNorm(x.Op) {
				r.Kept = append(r.Kept, Kept{x.Name, "it takes statistics of every case at inference"})
			}
			continue
		}
		s, t, err := affineOf(n, x, op)
		switch {
		case errors.Is(err, nn.ErrNotAffine):
			r.Kept = append(r.Kept, Kept{x.Name, err.Error()})
			continue
		case err != nil:
			return Report{}, err
		}
		if d := sh[x.In[0]].Dimensions; len(s) != d[len(d)-1] {
			return Report{}, fmt.Errorf("fold: norm %q has %d channels, its input is %s", x.Name, len(s), sh[x.In[0]])
		}
		jobs = append(jobs, job{x, x.Name, s, t})
	}
	masked := false
	for _, j := range slices.Backward(jobs) { // the last first: a norm of a norm then meets what the other folded into
		x := j.node
		masked = masked || len(x.In) > 1
		x.In = x.In[:1] // a mask matters while training only
		folded := true
		if prod := soleProducer(n, x); prod != nil {
			err = intoProducer(n, x, prod, j.scale, j.shift)
		} else if readers := denseReaders(n, x.Out[0], sh); len(readers) > 0 {
			err = IntoReaders(n, readers, j.scale, j.shift)
		} else {
			folded = false
			err = explicit(n, x, j.scale, j.shift)
		}
		if err == nil && folded {
			err = n.Bypass(x.Name)
		}
		if err != nil {
			return r, err
		}
		if folded {
			r.Folded = append(r.Folded, j.name)
		} else {
			r.Explicit = append(r.Explicit, j.name)
		}
	}
	if masked {
		n.Prune()
	}
	slices.Reverse(r.Folded)
	slices.Reverse(r.Explicit)
	return r, nil
}

// isNorm knows the norms of nn that can never be folded.
func isNorm(op nn.Op) bool {
	switch op.(type) {
	case nn.LayerNorm, nn.RMSNorm, nn.GroupNorm:
		return true
	}
	return false
}

// affineOf asks a norm for its scale and shift, and refuses what is not finite.
func affineOf(n *nn.Network, x *nn.Node, op nn.AffineNorm) (scale, shift []float64, err error) {
	scale, shift, err = op.Affine(func(local string) []float64 {
		p := n.Param(x, local)
		if p == nil {
			return nil
		}
		return nn.Float64s(p.Value)
	})
	if errors.Is(err, nn.ErrNotAffine) {
		return nil, nil, err
	}
	if err == nil && len(scale) != len(shift) {
		err = fmt.Errorf("%d scales and %d shifts do not belong together", len(scale), len(shift))
	}
	for i := 0; err == nil && i < len(scale); i++ {
		if v := scale[i] + shift[i]; math.IsNaN(v) || math.IsInf(v, 0) {
			err = fmt.Errorf("channel %d has scale %g and shift %g; its statistics or its gain are not finite", i, scale[i], shift[i])
		}
	}
	if err != nil {
		return nil, nil, fmt.Errorf("fold: norm %q (%s): %w", x.Name, op.Kind(), err)
	}
	return scale, shift, nil
}

// soleProducer is the plain convolution or dense layer in front of a node that nobody else reads, or nil.
func soleProducer(n *nn.Network, x *nn.Node) *nn.Node {
	prod := n.Producer(x.In[0])
	if prod == nil || !nn.IsPlain(prod.Op) || n.SharedParam(prod, "w") {
		return nil
	}
	switch prod.Op.(type) {
	case nn.Conv, nn.Dense:
	default:
		return nil
	}
	if readers, isOut := n.Readers(x.In[0]); len(readers) != 1 || isOut {
		return nil
	}
	return prod
}

// intoProducer merges a norm's scale and shift into the layer in front of it, which gets a bias.
func intoProducer(n *nn.Network, x, prod *nn.Node, scale, shift []float64) error {
	p := n.Param(prod, "w")
	w := p.Data()
	if len(scale) == 0 || p.Value.Shape().Dimensions[0] != len(scale) {
		return fmt.Errorf("fold: norm %q has %d channels, weight of %q is %s", x.Name, len(scale), prod.Name, p.Value.Shape())
	}
	bias := dataOr(n.Param(prod, "b"), len(scale), 0)
	per := len(w) / len(scale)
	for o, s := range scale {
		for i := o * per; i < (o+1)*per; i++ {
			w[i] = float32(float64(w[i]) * s)
		}
		bias[o] = float32(float64(bias[o])*s + shift[o])
	}
	n.SetParam(prod, "w", nn.Weight, w, p.Value.Shape().Dimensions...)
	n.SetParam(prod, "b", nn.Bias, bias, len(bias))
	hasBias(prod)
	return nil
}

// hasBias says of a dense layer or a convolution that it has got a bias.
func hasBias(n *nn.Node) {
	switch d := n.Op.(type) {
	case nn.Conv:
		d.NoBias = false
		n.Op = d
	case nn.Dense:
		d.NoBias = false
		n.Op = d
	}
}

// denseReaders are the plain dense layers that read a value, through ops that keep its channels; nil when anything else
// reads it.
func denseReaders(n *nn.Network, value string, sh map[string]shapes.Shape) (dense []*nn.Node) {
	readers, isOut := n.Readers(value)
	if isOut {
		return nil
	}
	for _, r := range readers {
		switch {
		case allPlainDense(n, []*nn.Node{r}):
			dense = append(dense, r)
		case len(r.In) == 1 && len(r.Out) == 1 && keepsChannels(r.Op, sh[value], sh[r.Out[0]]):
			behind := denseReaders(n, r.Out[0], sh)
			if behind == nil {
				return nil
			}
			dense = append(dense, behind...)
		default:
			return nil
		}
	}
	return dense
}

// keepsChannels says whether an op of one input averages, selects or rearranges the axes in front of the channels (the
// last axis): a scale and a shift per channel may stand behind it as well as in front of it.
func keepsChannels(op nn.Op, in, out shapes.Shape) bool {
	r := in.Rank()
	if r < 1 || out.Rank() < 1 || in.Dimensions[r-1] != out.Dimensions[out.Rank()-1] {
		return false
	}
	last := func(axis int) bool { return axis == r-1 || axis == -1 }
	switch d := op.(type) {
	case nn.Reduce:
		for _, a := range d.Axes {
			if last(a) {
				return false
			}
		}
		return d.Fn == "ReduceMean" && len(d.Axes) > 0
	case nn.Slice:
		return !last(d.Axis)
	case nn.Transpose:
		return len(d.Perm) == r && d.Perm[r-1] == r-1
	case nn.Reshape, nn.Dropout:
		return true
	}
	return false
}

// explicit puts scale·x + shift in a norm's place: the sum takes the node's name.
func explicit(n *nn.Network, x *nn.Node, scale, shift []float64) error {
	at := slices.Index(n.Nodes, x)
	n.Remove(x.Name)
	var added []*nn.Node
	node := func(name string, op nn.Op, in ...string) string {
		y := &nn.Node{Name: name, Op: op, In: in, Out: []string{name}, P: map[string]string{}}
		added = append(added, y)
		return name
	}
	value := func(name string, role nn.Role, v []float64) string {
		data := make([]float32, len(v))
		for i := range v {
			data[i] = float32(v[i])
		}
		node(name, nn.Value{Shape: shapes.Make(dtypes.Float32, len(v)), Role: role})
		n.SetParam(added[len(added)-1], "w", role, data, len(v))
		return name
	}
	scaled := node(x.Name+".scaled", nn.Mul, x.In[0], value(x.Name+".scale", nn.Gain, scale))
	node(x.Name, nn.Add, scaled, value(x.Name+".shift", nn.Bias, shift))
	added[len(added)-1].Out = x.Out
	n.Nodes = slices.Insert(n.Nodes, at, added...)
	return n.Check()
}

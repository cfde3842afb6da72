package nn

import (
	"cmp"
	"fmt"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
)

// CRMSNorm is RMSNorm on a compressed stream: x holds the first d' = d−1 coordinates of a vector of mean zero, whose last
// one is −Σx:
//
//	y = x/√((Σx² + (Σx)²)/(d'+1) + eps)
//
// which are the first d' coordinates of RMSNorm of the whole vector, eps included (Jiang et al., arXiv:2305.14858, eq. 8).
// It has no parameters: gain and bias belong into the layers that read it. The axis has at least one element. nn/fold
// makes a pre-norm network such a one.
type CRMSNorm struct {
	Eps  float64 // inside the root; 0: 1e-5
	Axis int     // 0: the last (the batch axis cannot be meant)
}

var _ Norm = CRMSNorm{}

// Kind returns "crmsnorm".
func (CRMSNorm) Kind() string { return "crmsnorm" }

// Epsilon is Eps with its default.
func (d CRMSNorm) Epsilon() float64 { return cmp.Or(d.Eps, 1e-5) }

// Params are none.
func (d CRMSNorm) Params(in []shapes.Shape) []Spec {
	affineSpecs(in[0], normAxes(in[0], []int{cmp.Or(d.Axis, -1)}), true, true) // checks the input
	return nil
}

// Lower normalises.
func (d CRMSNorm) Lower(_ *Ctx, xs []*graph.Node) []*graph.Node {
	return []*graph.Node{CompressedRMS(xs[0], d.Epsilon(), cmp.Or(d.Axis, -1))}
}

// CompressedRMS is the kernel of CRMSNorm on plain values, over one axis (negative: from the end). Statistics of half precision values are
// computed in float32. It panics, as graph functions do, on integers and scalars.
func CompressedRMS(x *graph.Node, eps float64, axis int) *graph.Node {
	dtype := x.DType()
	if !dtype.IsFloat() || x.Rank() < 1 || x.Shape().Dimensions[normAxes(x.Shape(), []int{axis})[0]] < 1 {
		panic(fmt.Errorf("cannot normalise %s: want floats [..., d-1]", x.Shape()))
	}
	v := x
	if dtype.Bits() < 32 {
		v = graph.ConvertDType(x, dtypes.Float32)
	}
	last := graph.ReduceAndKeep(v, graph.ReduceSum, axis) // minus the coordinate that was left out
	sum := graph.Add(graph.ReduceAndKeep(graph.Mul(v, v), graph.ReduceSum, axis), graph.Mul(last, last))
	d := float64(x.Shape().Dimensions[normAxes(x.Shape(), []int{axis})[0]] + 1)
	y := graph.Mul(v, rsqrt(graph.AddScalar(graph.MulScalar(sum, 1/d), eps)))
	if y.DType() != dtype {
		y = graph.ConvertDType(y, dtype)
	}
	return y
}

// ZeroMeanOut makes a writer of a residual stream write vectors of mean zero while it trains: Of is a Dense, Conv (of one
// group), Embedding or Value with a plain weight, which keeps its parameters, and every lowering subtracts from the weight
// and the bias their mean over the output axis:
//
//	y = (W − mean_out W)·x + b − mean b
//
// (arXiv:2305.14858, section 3.1; LinearZeroMeanOutput in the authors' code). A layer norm that reads the stream cannot
// see the difference, so the gradient of the parameters is that of the plain layer and every optimiser takes the same
// path. nn/fold puts it in place, and resolves it into a plain layer when the training is over.
type ZeroMeanOut struct {
	Of   Op
	Drop bool // leaves the last coordinate of the output out, as CRMSNorm wants it
}

var _ Parametric = ZeroMeanOut{}

// Kind returns "zeromeanout".
func (ZeroMeanOut) Kind() string { return "zeromeanout" }

// OutputAxis is the axis of a stream writer's weight "w" along which its output lies: 0 of a dense layer or convolution,
// the last one (-1) of a table or value. ok is false for what cannot be re-centred: other ops, convolutions of several
// groups, weights that are not stored plainly.
func OutputAxis(op Op) (axis int, ok bool) {
	switch d := op.(type) {
	case Dense:
		return 0, IsPlain(d)
	case Conv:
		return 0, IsPlain(d) && d.groups() == 1
	case Embedding:
		return -1, IsPlain(d)
	case Value:
		return -1, len(d.Shape.Dimensions) > 0
	}
	return 0, false
}

// Params are those of the layer.
func (z ZeroMeanOut) Params(in []shapes.Shape) []Spec {
	if _, ok := OutputAxis(z.Of); !ok {
		panic(fmt.Errorf("zeromeanout of %T: want a plain dense layer, convolution of one group, embedding or value", z.Of))
	}
	return z.Of.(Parametric).Params(in)
}

// Narrower is the layer with one output fewer.
func Narrower(op Op) Op {
	switch d := op.(type) {
	case Dense:
		d.Out--
		return d
	case Conv:
		d.Out--
		return d
	case Embedding:
		d.Dim--
		return d
	case Value:
		d.Shape = d.Shape.Clone()
		d.Shape.Dimensions[len(d.Shape.Dimensions)-1]--
		return d
	}
	return op
}

// Lower lowers the layer with its parameters re-centred.
func (z ZeroMeanOut) Lower(c *Ctx, x []*graph.Node) []*graph.Node {
	axis, ok := OutputAxis(z.Of)
	if !ok {
		panic(fmt.Errorf("zeromeanout of %T: want a plain dense layer, convolution of one group, embedding or value", z.Of))
	}
	op, local := z.Of, map[string]*graph.Node{}
	if z.Drop {
		op = Narrower(op)
	}
	for name := range c.Node.P {
		v := c.P(name)
		a := (axis + v.Rank()) % v.Rank()
		v = graph.Sub(v, graph.ReduceAndKeep(v, graph.ReduceMean, a))
		if z.Drop {
			v = graph.SliceAxis(v, a, graph.AxisRange(0, v.Shape().Dimensions[a]-1))
		}
		local[name] = v
	}
	return op.Lower(c.with(local), x)
}

// MACs are the layer's.
func (z ZeroMeanOut) MACs(in, out []shapes.Shape) int64 {
	if k, ok := z.Of.(Coster); ok {
		return k.MACs(in, out)
	}
	return 0
}

// CompressedIn is a dense layer that reads CRMSNorm while it trains: it keeps its weight W [out, d] for the whole stream,
// and takes the gain and the bias of the norm, whose parameters it shares, into every lowering:
//
//	W' = W·diag(gain),  y = Σ_{j<d} (W'[:,j] − W'[:,d])·x_j + b + W·shift
//
// since the coordinate that x lacks is minus the sum of the others (arXiv:2305.14858, section 3.2). nn/fold puts it in
// place, and resolves it into a plain layer when the training is over.
type CompressedIn struct {
	Of Op // a Dense with a plain weight
	// Gain and Shift say whether there are parameters "gain" and "shift" [d], the norm's.
	Gain, Shift bool
	// Factor multiplies the shift: what stands between norm and layer; 0: 1.
	Factor float64
}

var _ Parametric = CompressedIn{}

// Kind returns "compressedin".
func (CompressedIn) Kind() string { return "compressedin" }

func (d CompressedIn) dense() Dense {
	op, ok := d.Of.(Dense)
	if !ok || !IsPlain(op) {
		panic(fmt.Errorf("compressedin of %T: want a dense layer with a plain weight", d.Of))
	}
	return op
}

// Params are the layer's and the norm's.
func (d CompressedIn) Params(in []shapes.Shape) []Spec {
	wantRank(in[0], 1, -1)
	wide := in[0].Clone()
	wide.Dimensions[wide.Rank()-1]++
	n := wide.Dimensions[wide.Rank()-1]
	s := d.dense().Params(append([]shapes.Shape{wide}, in[1:]...))
	if d.Gain {
		s = append(s, Spec{"gain", f32(n), Gain, Fill(1)})
	}
	if d.Shift {
		s = append(s, Spec{"shift", f32(n), Bias, nil})
	}
	return s
}

// Lower multiplies.
func (d CompressedIn) Lower(c *Ctx, x []*graph.Node) []*graph.Node {
	op, w := d.dense(), c.P("w")
	n := x[0].Shape().Dimensions[x[0].Rank()-1]
	if w.Rank() != 2 || w.Shape().Dimensions[1] != n+1 {
		panic(fmt.Errorf("input %s does not fit weight %s [out, width+1]", x[0].Shape(), w.Shape()))
	}
	local := map[string]*graph.Node{}
	if !op.NoBias {
		local["b"] = c.P("b")
	}
	if d.Shift {
		b := graph.Dot(w, graph.MulScalar(c.P("shift"), cmp.Or(d.Factor, 1))).General([]int{1}, nil, []int{0}, nil)
		if local["b"] != nil {
			b = graph.Add(local["b"], b)
		}
		op.NoBias, local["b"] = false, b
	}
	if d.Gain {
		w = graph.Mul(w, graph.ExpandLeftToRank(c.P("gain"), 2))
	}
	local["w"] = graph.Sub(graph.SliceAxis(w, 1, graph.AxisRange(0, n)), graph.SliceAxis(w, 1, graph.AxisRange(n, n+1)))
	return op.Lower(c.with(local), x)
}

// MACs are those of the layer on the compressed stream.
func (d CompressedIn) MACs(in, out []shapes.Shape) int64 { return d.dense().MACs(in, out) }

// with is the context of an op whose parameters are values of the graph.
func (c *Ctx) with(local map[string]*graph.Node) *Ctx {
	env, node := *c.Env, *c.Node
	node.P = map[string]string{}
	for name := range local {
		node.P[name] = name
	}
	env.Param = func(name string) *graph.Node { return local[name] }
	return &Ctx{Env: &env, Node: &node}
}

// FullStream appends the coordinate that a compressed stream [..., d-1] lacks, minus the sum of the others: [..., d].
func FullStream(x *graph.Node) *graph.Node {
	return graph.Concatenate([]*graph.Node{x, graph.Neg(graph.ReduceAndKeep(x, graph.ReduceSum, -1))}, -1)
}

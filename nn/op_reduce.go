package nn

import (
	"fmt"
	"math"
	"slices"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
)

// reducers is the table of reductions, by their ONNX names.
var reducers = map[string]func(x *graph.Node, axes ...int) *graph.Node{
	"ReduceMean": graph.ReduceMean, "ReduceSum": graph.ReduceSum, "ReduceMax": graph.ReduceMax, "ReduceMin": graph.ReduceMin,
	"ReduceL2": func(x *graph.Node, axes ...int) *graph.Node {
		return graph.Sqrt(graph.ReduceSum(graph.Mul(x, x), axes...))
	},
}

// Reduce reduces axes by ReduceMean (also global average pooling), ReduceSum, ReduceMax, ReduceMin or ReduceL2.
type Reduce struct {
	Fn   string
	Axes []int // negative ones count from the end; nil: all
	Keep bool  // reduced axes stay, with size 1
}

// GlobalAveragePool averages [batch, height, width, channels] over height and width.
var GlobalAveragePool = Reduce{Fn: "ReduceMean", Axes: []int{1, 2}}

// Kind returns "reduce".
func (Reduce) Kind() string { return "reduce" }

// Lower reduces.
func (r Reduce) Lower(_ *Ctx, x []*graph.Node) []*graph.Node {
	f := reducers[r.Fn]
	if f == nil {
		panic(fmt.Errorf("there is no reduction %q; use one of %v", r.Fn, sortedKeys(reducers)))
	}
	axes := make([]int, x[0].Rank())
	for i := range axes {
		axes[i] = i
	}
	if len(r.Axes) > 0 {
		axes = normAxes(x[0].Shape(), r.Axes)
	}
	y := f(x[0], axes...)
	if r.Keep {
		d := slices.Clone(x[0].Shape().Dimensions)
		for _, a := range axes {
			d[a] = 1
		}
		y = graph.Reshape(y, d...)
	}
	return []*graph.Node{y}
}

// Softmax over an axis (0: the last; the batch axis cannot be meant). With Log, its logarithm.
type Softmax struct {
	Axis int
	Log  bool
}

// Kind returns "softmax" or "logsoftmax".
func (s Softmax) Kind() string {
	if s.Log {
		return "logsoftmax"
	}
	return "softmax"
}

// Lower subtracts the maximum, exponentiates and normalises.
func (s Softmax) Lower(_ *Ctx, x []*graph.Node) []*graph.Node {
	axis := s.Axis
	if axis == 0 {
		axis = -1
	}
	if s.Log {
		return []*graph.Node{LogSoftmaxOf(x[0], axis)}
	}
	return []*graph.Node{SoftmaxOf(x[0], axis)}
}

// SoftmaxOf is exp(x)/Σexp(x) over an axis, computed without overflow.
func SoftmaxOf(x *graph.Node, axis int) *graph.Node {
	e := graph.Exp(graph.Sub(x, graph.StopGradient(graph.ReduceAndKeep(x, graph.ReduceMax, axis))))
	return graph.Div(e, graph.ReduceAndKeep(e, graph.ReduceSum, axis))
}

// LogSoftmaxOf is x − log Σexp(x) over an axis, computed without overflow.
func LogSoftmaxOf(x *graph.Node, axis int) *graph.Node {
	m := graph.Sub(x, graph.StopGradient(graph.ReduceAndKeep(x, graph.ReduceMax, axis)))
	return graph.Sub(m, graph.Log(graph.ReduceAndKeep(graph.Exp(m), graph.ReduceSum, axis)))
}

// MatMul multiplies two computed values over the last two axes: [..., m, k]·[..., k, n]. Leading axes broadcast.
type MatMul struct {
	Scale float64 // multiplies the result; 0: 1
}

// Kind returns "matmul".
func (MatMul) Kind() string { return "matmul" }

// Lower multiplies.
func (m MatMul) Lower(_ *Ctx, x []*graph.Node) []*graph.Node {
	a, b := x[0], x[1]
	if a.Rank() < 1 || b.Rank() < 1 {
		panic(fmt.Errorf("matmul of scalars: %s and %s", a.Shape(), b.Shape()))
	}
	var y *graph.Node
	ra, rb := a.Rank(), b.Rank()
	switch {
	case rb <= 2:
		y = graph.MatMul(a, b)
	case ra >= 2 && !slices.Equal(a.Shape().Dimensions[:ra-2], b.Shape().Dimensions[:rb-2]):
		dims := broadcastDims(a.Shape().Dimensions[:ra-2], b.Shape().Dimensions[:rb-2])
		wide := func(v *graph.Node) *graph.Node {
			d := v.Shape().Dimensions
			return graph.BroadcastToDims(graph.ExpandLeftToRank(v, len(dims)+2), append(slices.Clone(dims), d[len(d)-2:]...)...)
		}
		y = batchedMatMul(wide(a), wide(b))
	case ra == rb:
		y = batchedMatMul(a, b)
	default:
		y = graph.MatMul(a, b)
	}
	if m.Scale != 0 && m.Scale != 1 {
		y = graph.MulScalar(y, m.Scale)
	}
	return []*graph.Node{y}
}

func batchedMatMul(a, b *graph.Node) *graph.Node {
	r := a.Rank()
	batch := make([]int, r-2)
	for i := range batch {
		batch[i] = i
	}
	return graph.Dot(a, b).General([]int{r - 1}, batch, []int{r - 2}, batch)
}

func broadcastDims(a, b []int) []int {
	r := max(len(a), len(b))
	out := make([]int, r)
	at := func(d []int, i int) int {
		if j := i - (r - len(d)); j >= 0 {
			return d[j]
		}
		return 1
	}
	for i := range out {
		x, y := at(a, i), at(b, i)
		if x != y && x != 1 && y != 1 {
			panic(fmt.Errorf("leading axes %v and %v do not broadcast", a, b))
		}
		out[i] = max(x, y)
		if x == 0 || y == 0 {
			out[i] = 0
		}
	}
	return out
}

// MACs is outputs times the contracted axis.
func (MatMul) MACs(in, out []shapes.Shape) int64 {
	return int64(out[0].Size()) * int64(in[0].Dimensions[in[0].Rank()-1])
}

// Pool takes the maximum or the mean over windows of the spatial axes of [batch, spatial..., channels].
type Pool struct {
	Max    bool
	Kernel []int
	Stride []int    // nil: the kernel
	Pad    [][2]int // nil: none
	// CountPad lets padding count in the mean's denominator (ONNX count_include_pad).
	CountPad bool
}

// Kind returns "maxpool" or "avgpool".
func (p Pool) Kind() string {
	if p.Max {
		return "maxpool"
	}
	return "avgpool"
}

// Lower pools.
func (p Pool) Lower(c *Ctx, xs []*graph.Node) []*graph.Node {
	x := xs[0]
	n := len(p.Kernel)
	if x.Rank() != n+2 {
		panic(fmt.Errorf("a window of %d axes does not fit %s", n, x.Shape()))
	}
	pad, stride, padded := p.Pad, p.Stride, false
	if stride == nil {
		stride = p.Kernel
	}
	if pad == nil {
		pad = make([][2]int, n)
	}
	for i, k := range p.Kernel {
		if k < 1 || stride[i] < 1 {
			panic(fmt.Errorf("window %v, stride %v: want positive sizes", p.Kernel, stride))
		}
		if x.Shape().Dimensions[i+1]+pad[i][0]+pad[i][1] < k {
			panic(fmt.Errorf("window %v is larger than the padded input %s", p.Kernel, x.Shape()))
		}
		padded = padded || pad[i] != [2]int{}
	}
	if p.tiles(x, stride, padded) {
		return []*graph.Node{p.reduceTiles(x)}
	}
	if c.SecondOrder {
		return []*graph.Node{p.gathered(x, stride, pad)}
	}
	if p.Max {
		return []*graph.Node{graph.MaxPool(x).WindowPerAxis(p.Kernel...).StridePerAxis(stride...).PaddingPerDim(pad).Done()}
	}
	sum := graph.SumPool(x).WindowPerAxis(p.Kernel...).StridePerAxis(stride...).PaddingPerDim(pad).Done()
	if !padded || p.CountPad {
		size := 1
		for _, k := range p.Kernel {
			size *= k
		}
		return []*graph.Node{graph.MulScalar(sum, 1/float64(size))}
	}
	ones := graph.OnesLike(x)
	count := graph.SumPool(ones).WindowPerAxis(p.Kernel...).StridePerAxis(stride...).PaddingPerDim(pad).Done()
	return []*graph.Node{graph.Div(sum, graph.StopGradient(count))}
}

// tiles says whether the windows cut the input into equal blocks.
func (p Pool) tiles(x *graph.Node, stride []int, padded bool) bool {
	for i, k := range p.Kernel {
		if stride[i] != k || padded || x.Shape().Dimensions[i+1]%k != 0 {
			return false
		}
	}
	return true
}

func (p Pool) reduceTiles(x *graph.Node) *graph.Node {
	s := x.Shape().Dimensions
	dims, axes := []int{s[0]}, []int{}
	for i, k := range p.Kernel {
		dims = append(dims, s[i+1]/k, k)
		axes = append(axes, 2*i+2)
	}
	x = graph.Reshape(x, append(dims, s[len(s)-1])...)
	if p.Max {
		return graph.ReduceMax(x, axes...)
	}
	return graph.ReduceMean(x, axes...)
}

// gathered reduces explicit shifted windows, which can be differentiated twice.
func (p Pool) gathered(x *graph.Node, stride []int, pad [][2]int) *graph.Node {
	fill := 0.
	if p.Max {
		fill = math.Inf(-1)
	}
	pads := make([][2]int, x.Rank())
	copy(pads[1:], pad)
	ones := graph.OnesLike(x)
	if slices.ContainsFunc(pad, func(q [2]int) bool { return q != [2]int{} }) {
		x = Pad{Pads: pads, Value: fill}.Lower(nil, []*graph.Node{x})[0]
		ones = Pad{Pads: pads}.Lower(nil, []*graph.Node{ones})[0]
	}
	var y, count *graph.Node
	Conv{Kernel: p.Kernel}.taps(func(_ int, off []int) {
		axes := []graph.SliceAxisSpec{graph.AxisRange()}
		for i := range p.Kernel {
			n := (x.Shape().Dimensions[i+1] - p.Kernel[i]) / stride[i]
			axes = append(axes, graph.AxisRange(off[i], off[i]+n*stride[i]+1).Stride(stride[i]))
		}
		axes = append(axes, graph.AxisRange())
		w, o := graph.Slice(x, axes...), graph.Slice(ones, axes...)
		switch {
		case y == nil:
			y, count = w, o
		case p.Max:
			y = graph.Max(y, w)
		default:
			y, count = graph.Add(y, w), graph.Add(count, o)
		}
	})
	if p.Max {
		return y
	}
	if p.CountPad {
		size := 1
		for _, k := range p.Kernel {
			size *= k
		}
		return graph.MulScalar(y, 1/float64(size))
	}
	return graph.Div(y, graph.StopGradient(count))
}

// ArgMax is the position of the first maximum along an axis, as int32; the axis stays with size 1 when Keep is set.
type ArgMax struct {
	Axis int
	Keep bool
}

// Kind returns "argmax".
func (ArgMax) Kind() string { return "argmax" }

// Lower finds the maximum.
func (d ArgMax) Lower(_ *Ctx, x []*graph.Node) []*graph.Node {
	axis := normAxes(x[0].Shape(), []int{d.Axis})[0]
	y := graph.ArgMax(x[0], axis, dtypes.Int32)
	if d.Keep {
		y = graph.InsertAxes(y, axis)
	}
	return []*graph.Node{y}
}

// Dropout zeroes values with probability Rate while training and scales the others by 1/(1−Rate); it is the identity
// otherwise, and without randomness.
type Dropout struct{ Rate float64 }

// Kind returns "dropout".
func (Dropout) Kind() string { return "dropout" }

// Lower draws a mask from the node's own stream.
func (d Dropout) Lower(c *Ctx, x []*graph.Node) []*graph.Node {
	if d.Rate < 0 || d.Rate >= 1 {
		panic(fmt.Errorf("rate %g is not in [0, 1)", d.Rate))
	}
	return []*graph.Node{dropMask(c, x[0], d.Rate, x[0].Shape())}
}

// DropPath drops whole residual branches, per case (stochastic depth, arXiv:1603.09382), scaled like Dropout.
type DropPath struct{ Rate float64 }

// Kind returns "droppath".
func (DropPath) Kind() string { return "droppath" }

// Lower draws one number per case.
func (d DropPath) Lower(c *Ctx, x []*graph.Node) []*graph.Node {
	if d.Rate < 0 || d.Rate >= 1 {
		panic(fmt.Errorf("rate %g is not in [0, 1)", d.Rate))
	}
	s := x[0].Shape().Clone()
	for i := 1; i < s.Rank(); i++ {
		s.Dimensions[i] = 1
	}
	return []*graph.Node{dropMask(c, x[0], d.Rate, s)}
}

func dropMask(c *Ctx, x *graph.Node, rate float64, shape shapes.Shape) *graph.Node {
	rng := c.Random()
	if !c.Training || rng == nil || rate == 0 {
		return x
	}
	_, u := graph.RandomUniform(rng, shape)
	keep := graph.ConvertDType(graph.GreaterOrEqual(u, graph.Scalar(c.G, u.DType(), rate)), x.DType())
	return graph.Mul(x, graph.MulScalar(keep, 1/(1-rate)))
}

// Func wraps any graph function. It trains and captures like every op, but cannot be written to a file.
type Func struct {
	Name  string
	Specs []Spec
	F     func(c *Ctx, x []*graph.Node) []*graph.Node
}

// Kind returns "func:" and the name.
func (f Func) Kind() string { return "func:" + f.Name }

// Params are the declared ones.
func (f Func) Params([]shapes.Shape) []Spec { return f.Specs }

// Lower calls the function.
func (f Func) Lower(c *Ctx, x []*graph.Node) []*graph.Node { return f.F(c, x) }

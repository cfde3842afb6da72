package nn

import (
	"fmt"
	"math"
	"slices"

	"github.com/gomlx/compute"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine"
)

// Plain stores a weight as it is, in parameter "w".
type Plain struct {
	Init Init // nil: N(0, 1/fan-in)
}

// Kind returns "plain".
func (Plain) Kind() string { return "plain" }

// Specs is the one parameter "w".
func (p Plain) Specs(w shapes.Shape) []Spec {
	init := p.Init
	if init == nil {
		init = FanIn(w.Size()/max(w.Dimensions[0], 1), 1)
	}
	return []Spec{{"w", w, Weight, init}}
}

// Value is the parameter itself.
func (Plain) Value(c *Ctx) *graph.Node { return c.P("w") }

func orPlain(r Repr) Repr {
	if r == nil {
		return Plain{}
	}
	return r
}

// IsPlain says whether a site's weight is stored as it is.
func IsPlain(op Op) bool {
	l, ok := op.(Linear)
	if !ok {
		return false
	}
	_, ok = l.Repr().(Plain)
	return ok
}

// Applier is a Repr that multiplies without building the weight: y = x Wᵀ for x [rows, in], as low-rank products do.
type Applier interface {
	Apply(c *Ctx, x *graph.Node) *graph.Node
}

// Dense is y = x Wᵀ + b over the last axis: x [..., in], W [out, in], b [out].
type Dense struct {
	Out    int
	NoBias bool
	W      Repr // nil: Plain
}

var _ Linear = Dense{}

// Kind returns "dense".
func (Dense) Kind() string { return "dense" }

// Repr is how W is stored.
func (d Dense) Repr() Repr { return orPlain(d.W) }

// WithRepr returns the op with another storage of W.
func (d Dense) WithRepr(r Repr) Op { d.W = r; return d }

// WeightShape is [out, in].
func (d Dense) WeightShape(in []shapes.Shape) shapes.Shape {
	wantRank(in[0], 1, -1)
	return f32(d.Out, in[0].Dimensions[in[0].Rank()-1])
}

// Params are W's and "b".
func (d Dense) Params(in []shapes.Shape) []Spec {
	if d.Out < 1 {
		panic(fmt.Errorf("out is %d, want at least 1", d.Out))
	}
	s := d.Repr().Specs(d.WeightShape(in))
	if !d.NoBias {
		s = append(s, Spec{"b", f32(d.Out), Bias, nil})
	}
	return s
}

// Lower multiplies.
func (d Dense) Lower(c *Ctx, x []*graph.Node) []*graph.Node {
	in := x[0].Shape().Dimensions
	k := in[len(in)-1]
	rows := x[0]
	if len(in) != 2 {
		rows = graph.Reshape(rows, x[0].Shape().Size()/max(k, 1), k)
	}
	var y *graph.Node
	if a, ok := d.Repr().(Applier); ok {
		y = a.Apply(c, rows)
	} else {
		w := d.Repr().Value(c)
		if w.Rank() != 2 || w.Shape().Dimensions[1] != k {
			panic(fmt.Errorf("input %s does not fit weight %s [out, in]", x[0].Shape(), w.Shape()))
		}
		y = graph.Dot(rows, w).General([]int{1}, nil, []int{1}, nil)
	}
	if !d.NoBias {
		y = graph.Add(y, graph.ExpandLeftToRank(c.P("b"), 2))
	}
	if len(in) != 2 {
		y = graph.Reshape(y, append(slices.Clone(in[:len(in)-1]), d.Out)...)
	}
	return []*graph.Node{y}
}

// MACs is outputs times in.
func (d Dense) MACs(in, out []shapes.Shape) int64 {
	return int64(out[0].Size()) * int64(in[0].Dimensions[in[0].Rank()-1])
}

// Conv is an n-dimensional convolution: x [batch, spatial..., in], kernel [out, k..., in/groups], b [out].
type Conv struct {
	Out      int
	Kernel   []int    // size per spatial axis
	Stride   []int    // nil: 1
	Dilation []int    // nil: 1
	Pad      [][2]int // zeros before and after each spatial axis; nil: none
	Groups   int      // 0: 1; equal to the input channels: depthwise
	NoBias   bool
	W        Repr // nil: Plain
}

var _ Linear = Conv{}

// Conv2D is a square convolution of stride s that keeps the size for s = 1 (padding k/2, as PyTorch's models have it).
func Conv2D(out, k, s int) Conv {
	p := k / 2
	return Conv{Out: out, Kernel: []int{k, k}, Stride: []int{s, s}, Pad: [][2]int{{p, p}, {p, p}}}
}

// Kind returns "conv".
func (Conv) Kind() string { return "conv" }

// Repr is how the kernel is stored.
func (d Conv) Repr() Repr { return orPlain(d.W) }

// WithRepr returns the op with another storage of the kernel.
func (d Conv) WithRepr(r Repr) Op { d.W = r; return d }

func (d Conv) groups() int { return max(d.Groups, 1) }
func (d Conv) stride(i int) int {
	if i < len(d.Stride) {
		return max(d.Stride[i], 1)
	}
	return 1
}

func (d Conv) dilation(i int) int {
	if i < len(d.Dilation) {
		return max(d.Dilation[i], 1)
	}
	return 1
}

func (d Conv) pad(i int) [2]int {
	if i < len(d.Pad) {
		return d.Pad[i]
	}
	return [2]int{}
}

// WeightShape is [out, k..., in/groups].
func (d Conv) WeightShape(in []shapes.Shape) shapes.Shape {
	n := len(d.Kernel)
	if n < 1 || n > 3 {
		panic(fmt.Errorf("kernel %v has %d axes, want 1 to 3", d.Kernel, n))
	}
	wantRank(in[0], n+2, n+2)
	ci, g := in[0].Dimensions[n+1], d.groups()
	if d.Out < 1 || ci%g != 0 || d.Out%g != 0 {
		panic(fmt.Errorf("%d groups do not divide %d input and %d output channels", g, ci, d.Out))
	}
	return f32(append(append([]int{d.Out}, d.Kernel...), ci/g)...)
}

// Params are the kernel's and "b".
func (d Conv) Params(in []shapes.Shape) []Spec {
	s := d.Repr().Specs(d.WeightShape(in))
	if !d.NoBias {
		s = append(s, Spec{"b", f32(d.Out), Bias, nil})
	}
	return s
}

// outSize is the number of outputs along spatial axis i.
func (d Conv) outSize(i, in int) int {
	p := d.pad(i)
	span := (d.Kernel[i]-1)*d.dilation(i) + 1
	n := (in+p[0]+p[1]-span)/d.stride(i) + 1
	if in+p[0]+p[1] < span {
		panic(fmt.Errorf("kernel %v (dilation %v) is larger than the padded input %d along spatial axis %d", d.Kernel, d.Dilation, in+p[0]+p[1], i))
	}
	return n
}

// Lower convolves. On backends whose convolution is slow, and where second derivatives are asked for, it gathers
// patches and multiplies; depthwise kernels become a sum of shifted products there.
func (d Conv) Lower(c *Ctx, xs []*graph.Node) []*graph.Node {
	x, w := xs[0], d.Repr().Value(c)
	n := len(d.Kernel)
	if x.Rank() != n+2 || w.Shape().Dimensions[n+1]*d.groups() != x.Shape().Dimensions[n+1] {
		panic(fmt.Errorf("input %s does not fit kernel %s [out, k..., in/groups] with %d groups", x.Shape(), w.Shape(), d.groups()))
	}
	var y *graph.Node
	switch {
	case d.pointwise():
		y = d.product(x, w)
	case !c.SecondOrder && !engine.GatherConvolution(c.G.Backend()) && !d.stridesAndDilates():
		y = d.native(x, w)
	case d.groups() == x.Shape().Dimensions[n+1] && d.Out == d.groups():
		y = d.shifted(x, w)
	default:
		y = d.gathered(x, w)
	}
	if !d.NoBias {
		y = graph.Add(y, graph.ExpandLeftToRank(c.P("b"), n+2))
	}
	return []*graph.Node{y}
}

// pointwise convolutions are a dense product of the channels.
func (d Conv) pointwise() bool {
	for i, k := range d.Kernel {
		if k != 1 || d.stride(i) != 1 || d.pad(i) != [2]int{} {
			return false
		}
	}
	return d.groups() == 1
}

// stridesAndDilates kernels are refused by GoMLX's convolution.
func (d Conv) stridesAndDilates() bool {
	strides, dilates := false, false
	for i := range d.Kernel {
		strides, dilates = strides || d.stride(i) > 1, dilates || d.dilation(i) > 1
	}
	return strides && dilates
}

func (d Conv) product(x, w *graph.Node) *graph.Node {
	s := x.Shape().Dimensions
	ci := s[len(s)-1]
	y := graph.Dot(graph.Reshape(x, x.Shape().Size()/max(ci, 1), ci), graph.Reshape(w, d.Out, ci)).General([]int{1}, nil, []int{1}, nil)
	return graph.Reshape(y, append(slices.Clone(s[:len(s)-1]), d.Out)...)
}

func (d Conv) native(x, w *graph.Node) *graph.Node {
	n := len(d.Kernel)
	perm := make([]int, 0, n+2) // [out, k..., in] -> [k..., in, out]
	for i := range n + 1 {
		perm = append(perm, i+1)
	}
	stride, dilation, pad := make([]int, n), make([]int, n), make([][2]int, n)
	for i := range n {
		stride[i], dilation[i], pad[i] = d.stride(i), d.dilation(i), d.pad(i)
		d.outSize(i, x.Shape().Dimensions[i+1])
	}
	if d.groups() > 1 {
		return d.grouped(x, w)
	}
	cv := graph.Convolve(x, graph.TransposeAllAxes(w, append(perm, 0)...)).StridePerAxis(stride...).PaddingPerDim(pad)
	if slices.Max(dilation) > 1 {
		cv = cv.DilationPerAxis(dilation...)
	}
	return cv.Done()
}

func (d Conv) padded(x *graph.Node) *graph.Node {
	if !slices.ContainsFunc(d.Pad, func(p [2]int) bool { return p != [2]int{} }) {
		return x
	}
	axes := make([]compute.PadAxis, len(d.Kernel)+2)
	for i := range d.Kernel {
		p := d.pad(i)
		axes[i+1] = compute.PadAxis{Start: p[0], End: p[1]}
	}
	return graph.Pad(x, graph.ScalarZero(x.Graph(), x.DType()), axes...)
}

// taps calls f with the offset of every kernel element and its number.
func (d Conv) taps(f func(k int, offset []int)) {
	n := len(d.Kernel)
	at := make([]int, n)
	for k := 0; ; k++ {
		off := make([]int, n)
		for i := range n {
			off[i] = at[i] * d.dilation(i)
		}
		f(k, off)
		i := n - 1
		for ; i >= 0; i-- {
			if at[i]++; at[i] < d.Kernel[i] {
				break
			}
			at[i] = 0
		}
		if i < 0 {
			return
		}
	}
}

// shifted is a depthwise convolution as a sum of k² shifted products.
func (d Conv) shifted(x, w *graph.Node) *graph.Node {
	n := len(d.Kernel)
	in := x.Shape().Dimensions
	out := make([]int, n)
	for i := range n {
		out[i] = d.outSize(i, in[i+1])
	}
	x = d.padded(x)
	ci := in[n+1]
	flat := graph.Reshape(w, ci, w.Shape().Size()/ci)
	var y *graph.Node
	d.taps(func(k int, off []int) {
		axes := []graph.SliceAxisSpec{graph.AxisRange()}
		for i := range n {
			axes = append(axes, graph.AxisRange(off[i], off[i]+(out[i]-1)*d.stride(i)+1).Stride(d.stride(i)))
		}
		win := graph.Slice(x, append(axes, graph.AxisRange())...)
		t := graph.Mul(win, graph.ExpandLeftToRank(graph.Reshape(graph.Slice(flat, graph.AxisRange(), graph.AxisElem(k)), ci), n+2))
		if y == nil {
			y = t
		} else {
			y = graph.Add(y, t)
		}
	})
	return y
}

// gathered takes all patches by one gather with constant indices and multiplies them with the kernel.
func (d Conv) gathered(x, w *graph.Node) *graph.Node {
	n := len(d.Kernel)
	in := x.Shape().Dimensions
	out := make([]int, n)
	for i := range n {
		out[i] = d.outSize(i, in[i+1])
	}
	x = d.padded(x)
	pd := x.Shape().Dimensions
	batch, ci, g := pd[0], pd[n+1], d.groups()
	pixels, kk := 1, 1
	for i := range n {
		pixels *= pd[i+1]
		kk *= d.Kernel[i]
	}
	var offs []int // position of every tap relative to its patch's corner
	d.taps(func(_ int, off []int) {
		p := 0
		for i := range n {
			p = p*pd[i+1] + off[i]
		}
		offs = append(offs, p)
	})
	spots := 1
	for _, o := range out {
		spots *= o
	}
	if int64(batch)*int64(spots)*int64(kk) > math.MaxInt32 || int64(batch)*int64(pixels) > math.MaxInt32 {
		panic(fmt.Errorf("input %s is too large for one convolution; use a smaller batch or tiles", x.Shape()))
	}
	idx := make([]int32, 0, batch*spots*kk)
	at := make([]int, n)
	for b := range batch {
		for range spots {
			corner := 0
			for i := range n {
				corner = corner*pd[i+1] + at[i]*d.stride(i)
			}
			for _, o := range offs {
				idx = append(idx, int32(b*pixels+corner+o))
			}
			for i := n - 1; i >= 0; i-- {
				if at[i]++; at[i] < out[i] {
					break
				}
				at[i] = 0
			}
		}
	}
	ix := graph.ConstTensor(x.Graph(), tensors.FromFlatDataAndDimensions(idx, len(idx), 1))
	p := graph.Gather(graph.Reshape(x, batch*pixels, ci), ix) // [rows*kk, ci]
	rows := batch * spots
	var y *graph.Node
	if g == 1 {
		y = graph.Dot(graph.Reshape(p, rows, kk*ci), graph.Reshape(w, d.Out, kk*ci)).General([]int{1}, nil, []int{1}, nil)
	} else {
		cg, og := ci/g, d.Out/g
		p = graph.Reshape(graph.TransposeAllAxes(graph.Reshape(p, rows, kk, g, cg), 2, 0, 1, 3), g, rows, kk*cg)
		y = graph.Dot(p, graph.Reshape(w, g, og, kk*cg)).General([]int{2}, []int{0}, []int{2}, []int{0}) // [g, rows, og]
		y = graph.TransposeAllAxes(y, 1, 0, 2)
	}
	return graph.Reshape(y, append(append([]int{batch}, out...), d.Out)...)
}

// MACs is outputs times the taps that each of them sums.
func (d Conv) MACs(in, out []shapes.Shape) int64 {
	k := int64(in[0].Dimensions[in[0].Rank()-1] / d.groups())
	for _, s := range d.Kernel {
		k *= int64(s)
	}
	return int64(out[0].Size()) * k
}

// Embedding looks up rows of W [n, dim]: integer x [...] -> [..., dim].
type Embedding struct {
	N, Dim int
	W      Repr // nil: Plain with N(0, 0.02²)
}

var _ Linear = Embedding{}

// Kind returns "embedding".
func (Embedding) Kind() string { return "embedding" }

// Repr is how the table is stored.
func (e Embedding) Repr() Repr {
	if e.W == nil {
		return Plain{Init: Normal(.02)}
	}
	return e.W
}

// WithRepr returns the op with another storage of the table.
func (e Embedding) WithRepr(r Repr) Op { e.W = r; return e }

// WeightShape is [n, dim].
func (e Embedding) WeightShape([]shapes.Shape) shapes.Shape { return f32(e.N, e.Dim) }

// Params are the table's.
func (e Embedding) Params(in []shapes.Shape) []Spec { return e.Repr().Specs(e.WeightShape(in)) }

// Lower gathers rows. Out-of-range indices are clipped by the backend.
func (e Embedding) Lower(c *Ctx, x []*graph.Node) []*graph.Node {
	if !x[0].DType().IsInt() {
		panic(fmt.Errorf("embedding needs integer indices, got %s", x[0].Shape()))
	}
	return []*graph.Node{graph.Gather(e.Repr().Value(c), graph.InsertAxes(x[0], -1))}
}

func wantRank(s shapes.Shape, lo, hi int) {
	if s.Rank() < lo || (hi >= 0 && s.Rank() > hi) {
		if lo == hi {
			panic(fmt.Errorf("input has %d axes (%s), want %d", s.Rank(), s, lo))
		}
		panic(fmt.Errorf("input has %d axes (%s), want at least %d", s.Rank(), s, lo))
	}
}

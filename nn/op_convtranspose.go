package nn

import (
	"fmt"

	"github.com/gomlx/compute"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
)

// ConvTranspose is the transpose of a strided convolution, a learned upsampling: x [batch, spatial..., in], kernel
// [out, k..., in/groups], b [out]. Output position o of an axis gets Σ x[i]·W[t] over i·Stride + t·Dilation = o + Pad, so
// an axis of n becomes (n−1)·Stride + (k−1)·Dilation + 1 + OutPad − pads (ONNX ConvTranspose). Output channel o belongs
// to group ⌊o·Groups/Out⌋.
type ConvTranspose struct {
	Out      int
	Kernel   []int    // size per spatial axis
	Stride   []int    // nil: 1
	Dilation []int    // nil: 1
	Pad      [][2]int // cut off before and after each spatial axis; nil: nothing
	OutPad   []int    // appended after each spatial axis; nil: nothing
	Groups   int      // 0: 1
	NoBias   bool
	W        Repr // nil: Plain
}

var _ Linear = ConvTranspose{}

// Kind returns "convtranspose".
func (ConvTranspose) Kind() string { return "convtranspose" }

// Repr is how the kernel is stored.
func (d ConvTranspose) Repr() Repr { return orPlain(d.W) }

// WithRepr returns the op with another storage of the kernel.
func (d ConvTranspose) WithRepr(r Repr) Op { d.W = r; return d }

// conv is the stride-1 convolution of the spread input that computes the same.
func (d ConvTranspose) conv() Conv {
	return Conv{Out: d.Out, Kernel: d.Kernel, Dilation: d.Dilation, Groups: d.Groups, NoBias: true}
}

// WeightShape is [out, k..., in/groups].
func (d ConvTranspose) WeightShape(in []shapes.Shape) shapes.Shape { return d.conv().WeightShape(in) }

// Params are the kernel's and "b".
func (d ConvTranspose) Params(in []shapes.Shape) []Spec {
	s := d.Repr().Specs(d.WeightShape(in))
	if !d.NoBias {
		s = append(s, Spec{"b", f32(d.Out), Bias, nil})
	}
	return s
}

// Lower multiplies every input pixel with the whole kernel where windows do not overlap; otherwise it spreads the input
// by Stride with zeros between and convolves with the mirrored kernel.
func (d ConvTranspose) Lower(c *Ctx, xs []*graph.Node) []*graph.Node {
	x, w := xs[0], d.Repr().Value(c)
	n := len(d.Kernel)
	if x.Rank() != n+2 || w.Shape().Dimensions[n+1]*max(d.Groups, 1) != x.Shape().Dimensions[n+1] {
		panic(fmt.Errorf("input %s does not fit kernel %s [out, k..., in/groups] with %d groups", x.Shape(), w.Shape(), max(d.Groups, 1)))
	}
	var y *graph.Node
	if d.tiles() {
		y = d.tiled(x, w)
	} else {
		y = d.spread(c, x, w)
	}
	if !d.NoBias {
		y = graph.Add(y, graph.ExpandLeftToRank(c.P("b"), n+2))
	}
	return []*graph.Node{y}
}

// tiles says whether the windows lie side by side.
func (d ConvTranspose) tiles() bool {
	s := Conv{Stride: d.Stride, Dilation: d.Dilation, Pad: d.Pad}
	for i, k := range d.Kernel {
		if s.stride(i) != k || s.dilation(i) != 1 || s.pad(i) != [2]int{} || (i < len(d.OutPad) && d.OutPad[i] != 0) {
			return false
		}
	}
	return max(d.Groups, 1) == 1
}

// tiled multiplies with the kernel as [k..., out, in], so that the channels of an output pixel come out side by side.
func (d ConvTranspose) tiled(x, w *graph.Node) *graph.Node {
	n := len(d.Kernel)
	s := x.Shape().Dimensions
	order := make([]int, n, n+2)
	for i := range d.Kernel {
		order[i] = i + 1
	}
	w = graph.TransposeAllAxes(w, append(order, 0, n+1)...)
	y := graph.Dot(x, w).General([]int{n + 1}, nil, []int{n + 1}, nil)
	// [batch, spatial..., k..., out] -> [batch, spatial_0, k_0, ..., out]
	perm := []int{0}
	out := []int{s[0]}
	for i, k := range d.Kernel {
		perm = append(perm, i+1, n+1+i)
		out = append(out, s[i+1]*k)
	}
	y = graph.TransposeAllAxes(y, append(perm, 2*n+1)...)
	return graph.Reshape(y, append(out, d.Out)...)
}

func (d ConvTranspose) spread(c *Ctx, x, w *graph.Node) *graph.Node {
	n := len(d.Kernel)
	q := Conv{Stride: d.Stride, Dilation: d.Dilation, Pad: d.Pad}
	axes := make([]compute.PadAxis, n+2)
	cut := []graph.SliceAxisSpec{graph.AxisRange()}
	flip := make([]int, n)
	for i, k := range d.Kernel {
		span := (k - 1) * q.dilation(i)
		end := span
		if i < len(d.OutPad) {
			end += d.OutPad[i]
		}
		axes[i+1] = compute.PadAxis{Start: span, End: end, Interior: q.stride(i) - 1}
		p := q.pad(i)
		size := (x.Shape().Dimensions[i+1]-1)*q.stride(i) + 1 + span + end - span
		if size-p[0]-p[1] < 1 {
			panic(fmt.Errorf("pads %v leave nothing of %s", d.Pad, x.Shape()))
		}
		cut = append(cut, graph.AxisRange(p[0], size-p[1]))
		flip[i] = i + 1
	}
	x = graph.Pad(x, graph.ScalarZero(x.Graph(), x.DType()), axes...)
	w = graph.Reverse(w, flip...)
	plain := d.conv()
	plain.W = fixedWeight{w}
	y := plain.Lower(c, []*graph.Node{x})[0]
	return graph.Slice(y, append(cut, graph.AxisRange())...)
}

// fixedWeight is a weight that is a value of the graph already.
type fixedWeight struct{ w *graph.Node }

func (fixedWeight) Kind() string              { return "value" }
func (fixedWeight) Specs(shapes.Shape) []Spec { return nil }
func (f fixedWeight) Value(*Ctx) *graph.Node  { return f.w }

// MACs is inputs times the taps that each of them feeds.
func (d ConvTranspose) MACs(in, _ []shapes.Shape) int64 {
	k := int64(d.Out / max(d.Groups, 1))
	for _, s := range d.Kernel {
		k *= int64(s)
	}
	return int64(in[0].Size()) * k
}

package nn

import (
	"fmt"
	"slices"

	"github.com/gomlx/compute"
	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
)

// Reshape changes the shape. As in ONNX, 0 keeps the input's axis of the same position and one -1 is inferred; keep
// the batch symbolic with a leading 0 (or -1).
type Reshape struct{ Dims []int }

// Kind returns "reshape".
func (Reshape) Kind() string { return "reshape" }

// Lower reshapes.
func (r Reshape) Lower(_ *Ctx, x []*graph.Node) []*graph.Node {
	d := slices.Clone(r.Dims)
	known, infer := 1, -1
	for i := range d {
		if d[i] == 0 {
			if i >= x[0].Rank() {
				panic(fmt.Errorf("shape %v keeps axis %d, input is %s", r.Dims, i, x[0].Shape()))
			}
			d[i] = x[0].Shape().Dimensions[i]
		}
		if d[i] < 0 {
			if infer >= 0 {
				panic(fmt.Errorf("shape %v leaves more than one axis open", r.Dims))
			}
			infer = i
			continue
		}
		known *= d[i]
	}
	size := x[0].Shape().Size()
	if infer >= 0 && known > 0 {
		d[infer] = size / known
		known *= d[infer]
	}
	if known != size {
		panic(fmt.Errorf("%s does not reshape to %v", x[0].Shape(), r.Dims))
	}
	return []*graph.Node{graph.Reshape(x[0], d...)}
}

// Transpose permutes the axes: axis i of the output is axis Perm[i] of the input.
type Transpose struct{ Perm []int }

// Kind returns "transpose".
func (Transpose) Kind() string { return "transpose" }

// Lower permutes.
func (t Transpose) Lower(_ *Ctx, x []*graph.Node) []*graph.Node {
	if len(t.Perm) != x[0].Rank() {
		panic(fmt.Errorf("permutation %v does not fit %s", t.Perm, x[0].Shape()))
	}
	return []*graph.Node{graph.TransposeAllAxes(x[0], t.Perm...)}
}

// Concat joins values along an axis (negative: from the end).
type Concat struct{ Axis int }

// Kind returns "concat".
func (Concat) Kind() string { return "concat" }

// Lower joins.
func (k Concat) Lower(_ *Ctx, x []*graph.Node) []*graph.Node {
	if len(x) == 1 {
		return x
	}
	return []*graph.Node{graph.Concatenate(x, k.Axis)}
}

// Slice takes elements From, From+Step, ... below To of an axis. Negative From and To count from the end, To = Open
// means the end.
type Slice struct{ Axis, From, To, Step int }

// Open as a Slice's To takes everything to the end of the axis.
const Open = int(^uint(0) >> 1)

// Kind returns "slice".
func (Slice) Kind() string { return "slice" }

// Lower slices.
func (s Slice) Lower(_ *Ctx, x []*graph.Node) []*graph.Node {
	axis := normAxes(x[0].Shape(), []int{s.Axis})[0]
	n := x[0].Shape().Dimensions[axis]
	at := func(i int) int {
		if i < 0 {
			i += n
		}
		return min(max(i, 0), n)
	}
	from, to := at(s.From), at(s.To)
	if to < from {
		panic(fmt.Errorf("slice %d:%d of axis %d of %s is empty", s.From, s.To, axis, x[0].Shape()))
	}
	spec := graph.AxisRange(from, to)
	if s.Step > 1 {
		spec = spec.Stride(s.Step)
	} else if s.Step < 0 {
		panic(fmt.Errorf("slice step %d: want a positive one", s.Step))
	}
	return []*graph.Node{graph.SliceAxis(x[0], axis, spec)}
}

// Split cuts an axis into consecutive parts of the given sizes: one output each.
type Split struct {
	Axis  int
	Sizes []int
}

// Kind returns "split".
func (Split) Kind() string { return "split" }

// NumOut is the number of parts.
func (s Split) NumOut() int { return len(s.Sizes) }

// Lower cuts.
func (s Split) Lower(_ *Ctx, x []*graph.Node) []*graph.Node {
	axis := normAxes(x[0].Shape(), []int{s.Axis})[0]
	out, at := make([]*graph.Node, len(s.Sizes)), 0
	for i, n := range s.Sizes {
		if at+n > x[0].Shape().Dimensions[axis] || n < 0 {
			panic(fmt.Errorf("parts %v do not fit axis %d of %s", s.Sizes, axis, x[0].Shape()))
		}
		out[i] = graph.SliceAxis(x[0], axis, graph.AxisRange(at, at+n))
		at += n
	}
	if at != x[0].Shape().Dimensions[axis] {
		panic(fmt.Errorf("parts %v leave a rest of axis %d of %s", s.Sizes, axis, x[0].Shape()))
	}
	return out
}

// Pad surrounds axes with a constant, or with the edge or mirrored values.
type Pad struct {
	Pads  [][2]int // before and after, for every axis
	Value float64
	Mode  PadMode
}

// PadMode says what a Pad is filled with.
type PadMode string

// The modes, by their ONNX names; the zero value is a constant.
const (
	PadConstant PadMode = ""
	PadEdge     PadMode = "edge"
	PadReflect  PadMode = "reflect"
	PadWrap     PadMode = "wrap"
)

// Kind returns "pad".
func (Pad) Kind() string { return "pad" }

// Lower pads.
func (p Pad) Lower(_ *Ctx, x []*graph.Node) []*graph.Node {
	v := x[0]
	if len(p.Pads) != v.Rank() {
		panic(fmt.Errorf("pads for %d axes do not fit %s", len(p.Pads), v.Shape()))
	}
	if p.Mode == PadConstant {
		axes := make([]compute.PadAxis, v.Rank())
		for i, q := range p.Pads {
			axes[i] = compute.PadAxis{Start: q[0], End: q[1]}
		}
		return []*graph.Node{graph.Pad(v, graph.Scalar(v.Graph(), v.DType(), p.Value), axes...)}
	}
	for axis, q := range p.Pads {
		if q == [2]int{} {
			continue
		}
		n := v.Shape().Dimensions[axis]
		idx := make([]int32, 0, n+q[0]+q[1])
		for i := -q[0]; i < n+q[1]; i++ {
			j := i
			switch p.Mode {
			case PadEdge:
				j = min(max(i, 0), n-1)
			case PadWrap:
				j = ((i % n) + n) % n
			case PadReflect:
				if n == 1 {
					j = 0
				} else {
					period := 2 * (n - 1)
					if j = ((i % period) + period) % period; j >= n {
						j = period - j
					}
				}
			default:
				panic(fmt.Errorf("there is no padding mode %q; use edge, reflect, wrap or constant", p.Mode))
			}
			idx = append(idx, int32(j))
		}
		v = takeAxis(v, axis, idx)
	}
	return []*graph.Node{v}
}

// takeAxis gathers constant positions along one axis.
func takeAxis(v *graph.Node, axis int, idx []int32) *graph.Node {
	perm := make([]int, v.Rank()) // the axis to the front and back
	back := make([]int, v.Rank())
	perm[0] = axis
	for i, j := 0, 1; i < v.Rank(); i++ {
		if i != axis {
			perm[j] = i
			j++
		}
	}
	for i, p := range perm {
		back[p] = i
	}
	t := graph.TransposeAllAxes(v, perm...)
	t = graph.Gather(t, graph.InsertAxes(graph.Const(v.Graph(), idx), -1))
	return graph.TransposeAllAxes(t, back...)
}

// Value yields parameter "w" as a value: class token, position table, a file's constant. With Batch, its axis 0 must
// be 1 and is repeated to the batch of input 0.
type Value struct {
	Shape shapes.Shape
	Role  Role // Bias unless said otherwise: trained without decay
	Init  Init
	Batch bool
}

// Constant is a Value that is never trained.
func ConstantValue(shape shapes.Shape) Value { return Value{Shape: shape, Role: Constant} }

// Kind returns "value".
func (Value) Kind() string { return "value" }

// Params is "w".
func (p Value) Params([]shapes.Shape) []Spec {
	role := p.Role
	if role == Weight {
		role = Bias
	}
	return []Spec{{"w", p.Shape, role, p.Init}}
}

// Lower returns the parameter.
func (p Value) Lower(c *Ctx, x []*graph.Node) []*graph.Node {
	w := c.P("w")
	if p.Batch {
		d := slices.Clone(w.Shape().Dimensions)
		if len(d) == 0 || d[0] != 1 || len(x) == 0 {
			panic(fmt.Errorf("a batch value needs an input and a leading axis of 1, has %s", w.Shape()))
		}
		d[0] = x[0].Shape().Dimensions[0]
		w = graph.BroadcastToDims(w, d...)
	}
	return []*graph.Node{w}
}

// Gather takes elements of an axis of x[0] at integer positions x[1]; negative positions count from the end. The
// indexed axis is replaced by the axes of x[1].
type Gather struct{ Axis int }

// Kind returns "gather".
func (Gather) Kind() string { return "gather" }

// Lower gathers.
func (d Gather) Lower(_ *Ctx, x []*graph.Node) []*graph.Node {
	axis := normAxes(x[0].Shape(), []int{d.Axis})[0]
	idx := x[1]
	if !idx.DType().IsInt() {
		panic(fmt.Errorf("gather needs integer positions, got %s", idx.Shape()))
	}
	n := x[0].Shape().Dimensions[axis]
	idx = graph.Where(graph.LessThan(idx, graph.ZerosLike(idx)), graph.AddScalar(idx, n), idx)
	v := x[0]
	if axis == 0 {
		return []*graph.Node{graph.Gather(v, graph.InsertAxes(idx, -1))}
	}
	perm := []int{axis}
	for i := range v.Rank() {
		if i != axis {
			perm = append(perm, i)
		}
	}
	y := graph.Gather(graph.TransposeAllAxes(v, perm...), graph.InsertAxes(idx, -1)) // [idx..., rest...]
	k := idx.Rank()
	order := make([]int, 0, y.Rank())
	for i := range axis {
		order = append(order, k+i)
	}
	for i := range k {
		order = append(order, i)
	}
	for i := axis; i < v.Rank()-1; i++ {
		order = append(order, k+i)
	}
	return []*graph.Node{graph.TransposeAllAxes(y, order...)}
}

// Expand broadcasts to a shape; as in ONNX an axis of 1 in Dims keeps the input's. An axis of 0 keeps it too, which
// leaves the batch symbolic.
type Expand struct{ Dims []int }

// Kind returns "expand".
func (Expand) Kind() string { return "expand" }

// Lower broadcasts.
func (d Expand) Lower(_ *Ctx, x []*graph.Node) []*graph.Node {
	r := max(x[0].Rank(), len(d.Dims))
	v := x[0]
	if v.Rank() > 0 {
		v = graph.ExpandLeftToRank(v, r)
	}
	dims := make([]int, r)
	for i := range dims {
		have, want := 1, 1
		if v.Rank() > 0 {
			have = v.Shape().Dimensions[i]
		}
		if j := i - (r - len(d.Dims)); j >= 0 {
			want = d.Dims[j]
		}
		if dims[i] = have; want > 1 && have == 1 {
			dims[i] = want
		}
	}
	return []*graph.Node{graph.BroadcastToDims(v, dims...)}
}

// Cast converts to another type.
type Cast struct{ To dtypes.DType }

// Kind returns "cast".
func (Cast) Kind() string { return "cast" }

// Lower converts; floating targets become the type of the lowering.
func (d Cast) Lower(c *Ctx, x []*graph.Node) []*graph.Node {
	to := d.To
	if to.IsFloat() {
		to = c.Type()
	}
	if x[0].DType() == to {
		return x
	}
	return []*graph.Node{graph.ConvertDType(x[0], to)}
}

// OneHot turns integer x [...] into [..., Depth] with On at the index and Off elsewhere.
type OneHot struct {
	Depth   int
	On, Off float64
}

// Kind returns "onehot".
func (OneHot) Kind() string { return "onehot" }

// Lower encodes.
func (d OneHot) Lower(c *Ctx, x []*graph.Node) []*graph.Node {
	y := graph.OneHot(x[0], d.Depth, c.Type())
	return []*graph.Node{graph.AddScalar(graph.MulScalar(y, d.On-d.Off), d.Off)}
}

package quant

import (
	"fmt"
	"math"
	"slices"

	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/onnx"
)

var (
	_ onnx.Exporter       = FakeQuantize{}
	_ onnx.Exporter       = LogQuantize{}
	_ onnx.WeightExporter = Uniform{}
)

// ExportONNX writes QuantizeLinear and DequantizeLinear. Fewer than eight bits limit the input to the grid's range
// first, since the codes saturate only at the range of uint8. A zero point that no uint8 holds (fractional, or a range
// without 0) is written with elementary operators, which compute the same.
func (d FakeQuantize) ExportONNX(e *onnx.Emitter, n *nn.Node) error {
	scale, zero := e.Network().Param(n, "scale"), e.Network().Param(n, "zero")
	if scale == nil || zero == nil {
		return fmt.Errorf("its scale or zero point is missing")
	}
	s, z := scale.Data(), zero.Data()
	x, layout := e.Any(n, 0)
	rank := e.Shape(n.In[0]).Rank()
	at := rank - 1 // where the channels are
	if layout != nil {
		at = slices.Index(layout, rank-1)
	}
	top := float64(int(1)<<d.Bits - 1)
	// constant gives one number, or one per channel in the shape that broadcasts over x.
	constant := func(base string, v []float32) string {
		if len(v) == 1 {
			return e.Floats(n.Name+"/"+base, v)
		}
		dims := slices.Repeat([]int{1}, rank)
		dims[at] = len(v)
		return e.Floats(n.Name+"/"+base, v, dims...)
	}
	native := true
	for _, v := range z {
		native = native && v == float32(math.Trunc(float64(v))) && v >= 0 && v <= 255
	}
	if !native {
		sc, zp := constant("scale", s), constant("zero", z)
		y := e.Node("Round", n.Name+"/round", []string{e.Node("Div", n.Name+"/div", []string{x, sc})})
		y = e.Node("Clip", n.Name+"/codes", []string{e.Node("Add", n.Name+"/shift", []string{y, zp}), e.Scalar(0), e.Scalar(top)})
		e.Out(n, layout, "Mul", []string{e.Node("Sub", n.Name+"/centred", []string{y, zp}), sc})
		return nil
	}
	if d.Bits < 8 {
		lo, hi := make([]float32, len(s)), make([]float32, len(s))
		for i := range s {
			lo[i], hi[i] = -z[i]*s[i], (float32(top)-z[i])*s[i]
		}
		if len(s) == 1 {
			x = e.Node("Clip", n.Name+"/grid", []string{x, e.Floats(n.Name+"/lo", lo), e.Floats(n.Name+"/hi", hi)})
		} else {
			x = e.Node("Max", n.Name+"/grid", []string{e.Node("Min", n.Name+"/below", []string{x, constant("hi", hi)}), constant("lo", lo)})
		}
	}
	var dims []int
	var attrs []onnx.Attr
	if len(s) > 1 {
		dims, attrs = []int{len(s)}, []onnx.Attr{onnx.Int("axis", at)}
	}
	codes := make([]int32, len(z))
	for i, v := range z {
		codes[i] = int32(v)
	}
	in := []string{e.Floats(n.Name+"/scale", s, dims...), e.Codes(n.Name+"/zero", onnx.Uint8, codes, dims...)}
	q := e.Node("QuantizeLinear", n.Name+"/codes", append([]string{x}, in...), attrs...)
	e.Out(n, layout, "DequantizeLinear", append([]string{q}, in...), attrs...)
	return nil
}

// ExportONNX writes the grid with elementary operators: ONNX has no logarithmic quantiser.
func (d LogQuantize) ExportONNX(e *onnx.Emitter, n *nn.Node) error {
	scale := e.Network().Param(n, "scale")
	if scale == nil {
		return fmt.Errorf("its scale is missing")
	}
	x, layout := e.Any(n, 0)
	s := e.Floats(n.Name+"/scale", scale.Data())
	k := float64(d.PerOctave) / math.Ln2
	levels := float64(int(1) << d.Bits)
	c := e.Node("Log", n.Name+"/log", []string{e.Node("Div", n.Name+"/div", []string{x, s})})
	c = e.Node("Round", n.Name+"/codes", []string{e.Node("Mul", n.Name+"/octaves", []string{c, e.Scalar(-k)})})
	small := e.Node("GreaterOrEqual", n.Name+"/small", []string{c, e.Scalar(levels)})
	y := e.Node("Mul", n.Name+"/exponent", []string{e.Node("Clip", n.Name+"/grid", []string{c, e.Scalar(0), e.Scalar(levels - 1)}), e.Scalar(-1 / k)})
	y = e.Node("Mul", n.Name+"/value", []string{e.Node("Exp", n.Name+"/exp", []string{y}), s})
	e.Out(n, layout, "Where", []string{small, e.Scalar(0), y})
	return nil
}

// ExportWeight writes integer codes and DequantizeLinear: 4-bit containers for up to four bits from operator set 21 on,
// bytes otherwise. Symmetric grids become signed codes without a zero point; so do grids whose zero point is no code.
func (u Uniform) ExportWeight(e *onnx.Emitter, n *nn.Node, perm []int) (string, error) {
	q := e.Network().Param(n, "q")
	grid, err := u.Grid(e.Network(), n)
	if err != nil || q == nil {
		return "", fmt.Errorf("its codes, scales or zero points are missing: %w", err)
	}
	shape := q.Value.Shape().Dimensions
	codes := make([]int32, q.Value.Shape().Size())
	for i, v := range q.Data() {
		codes[i] = int32(v)
	}
	t, codes, zero, err := u.container(codes, shape, grid, e.Opset())
	if err != nil {
		return "", err
	}
	base := q.Name
	scale := narrow(grid.Scale)
	if u.Axis == 0 && u.Group > 0 { // rows of one group each, dequantised and put back in shape
		groups := len(scale)
		in := []string{e.Codes(base, t, codes, groups, u.Group), e.Floats(base+"/scale", scale, groups)}
		if zero != nil {
			in = append(in, e.Codes(base+"/zero", t, zero, groups))
		}
		w := e.Node("DequantizeLinear", n.Name+"/groups", in, onnx.Int("axis", 0))
		w = e.Node("Reshape", n.Name+"/rows", []string{w, e.List(shape...)})
		if len(perm) > 0 {
			w = e.Node("Transpose", n.Name+"/weight", []string{w}, onnx.Ints("perm", perm...))
		}
		return w, nil
	}
	codes, dims := permute(codes, shape, perm)
	var gdims []int
	var attrs []onnx.Attr
	if u.Axis == 0 {
		gdims = []int{len(scale)}
		axis := 0
		if len(perm) > 0 {
			axis = slices.Index(perm, 0)
		}
		attrs = append(attrs, onnx.Int("axis", axis))
	}
	in := []string{e.Codes(base, t, codes, dims...), e.Floats(base+"/scale", scale, gdims...)}
	if zero != nil {
		in = append(in, e.Codes(base+"/zero", t, zero, gdims...))
	}
	return e.Node("DequantizeLinear", n.Name+"/weight", in, attrs...), nil
}

// container chooses the ONNX type of the codes, and the zero points (nil: none).
func (u Uniform) container(codes []int32, shape []int, grid Affine, opset int) (t onnx.DataType, out, zero []int32, err error) {
	l, err := grid.layout(len(codes), shape)
	if err != nil {
		return 0, nil, nil, err
	}
	mid, symmetric, inside := float64(int(1)<<(u.Bits-1)), true, true
	zero = make([]int32, len(grid.Zero))
	for i, z := range grid.Zero {
		if z != math.Trunc(z) {
			return 0, nil, nil, fmt.Errorf("zero point %g is not a whole number", z)
		}
		symmetric = symmetric && z == mid
		inside = inside && z >= 0 && z <= float64(grid.Max())
		zero[i] = int32(z)
	}
	small := u.Bits <= 4 && opset >= 21
	if inside && !symmetric {
		if small {
			return onnx.Uint4, codes, zero, nil
		}
		return onnx.Uint8, codes, zero, nil
	}
	out = make([]int32, len(codes))
	for i, c := range codes {
		out[i] = c - zero[l.group(i)]
	}
	lo, hi := slices.Min(out), slices.Max(out)
	switch {
	case small && lo >= -8 && hi <= 7:
		return onnx.Int4, out, nil, nil
	case lo >= -128 && hi <= 127:
		return onnx.Int8, out, nil, nil
	}
	return onnx.Int32, out, nil, nil
}

// permute reorders a row-major array: axis i of the result is axis perm[i].
func permute(x []int32, shape, perm []int) ([]int32, []int) {
	if len(perm) == 0 {
		return x, shape
	}
	stride, dims := make([]int, len(shape)), make([]int, len(shape))
	for i, s := len(shape)-1, 1; i >= 0; i-- {
		stride[i] = s
		s *= shape[i]
	}
	for i, p := range perm {
		dims[i] = shape[p]
	}
	out := make([]int32, len(x))
	at := make([]int, len(shape))
	for o := range out {
		k := 0
		for i, p := range perm {
			k += at[i] * stride[p]
		}
		out[o] = x[k]
		for i := len(at) - 1; i >= 0; i-- {
			if at[i]++; at[i] < dims[i] {
				break
			}
			at[i] = 0
		}
	}
	return out, dims
}

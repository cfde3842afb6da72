package quant

import (
	"fmt"
	"math"
	"slices"

	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/onnx"
)

var (
	_ onnx.Exporter       = LogQuantize{}
	_ onnx.WeightExporter = Uniform{}
)

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
	if grid.betweenCodes() || grid.farFromCodes() {
		return u.exportShifted(e, n, q.Name, codes, shape, grid, perm)
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

// betweenCodes says whether every zero point lies halfway between two codes, as on the grids of StatsQ.
func (a Affine) betweenCodes() bool {
	for _, z := range a.Zero {
		if z-math.Floor(z) != .5 {
			return false
		}
	}
	return len(a.Zero) > 0 && a.Group == 0
}

// farFromCodes says whether some zero point is no code and the differences to it do not all fit signed bytes, as on the
// grid of a channel whose weights are nearly alike (FullRange).
func (a Affine) farFromCodes() bool {
	outside, far := false, false
	for _, z := range a.Zero {
		if z != math.Trunc(z) {
			return false
		}
		outside = outside || z < 0 || z > float64(a.Max())
		far = far || z < float64(a.Max())-127 || z > 128
	}
	return outside && far && a.Group == 0
}

// exportShifted writes a grid whose zero points are no codes, between them or far from them: ONNX's zero points are
// codes, so the rest is added afterwards.
func (u Uniform) exportShifted(e *onnx.Emitter, n *nn.Node, base string, codes []int32, shape []int, grid Affine, perm []int) (string, error) {
	whole := grid
	whole.Zero = make([]float64, len(grid.Zero))
	shift := make([]float32, len(grid.Scale))
	for i, z := range grid.Zero {
		whole.Zero[i] = min(max(math.Ceil(z), 0), float64(grid.Max()))
		shift[i] = float32(grid.Scale[i] * (whole.Zero[i] - z))
	}
	t, codes, zero, err := u.container(codes, shape, whole, e.Opset())
	if err != nil {
		return "", err
	}
	codes, dims := permute(codes, shape, perm)
	scale := narrow(grid.Scale)
	var per []int
	var attrs []onnx.Attr
	wide := slices.Repeat([]int{1}, len(dims))
	if u.Axis == 0 {
		axis := 0
		if len(perm) > 0 {
			axis = slices.Index(perm, 0)
		}
		per, attrs = []int{len(scale)}, append(attrs, onnx.Int("axis", axis))
		wide[axis] = len(scale)
	}
	in := []string{e.Codes(base, t, codes, dims...), e.Floats(base+"/scale", scale, per...)}
	if zero != nil {
		in = append(in, e.Codes(base+"/zero", t, zero, per...))
	}
	w := e.Node("DequantizeLinear", n.Name+"/steps", in, attrs...)
	return e.Node("Add", n.Name+"/weight", []string{w, e.Floats(base+"/shift", shift, wide...)}), nil
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

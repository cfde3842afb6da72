package quant

import (
	"fmt"
	"math"
)

// Affine is a uniform grid of 2^Bits points for each group of values:
//
//	code = clip(round(x/scale) + zero, 0, 2^Bits-1),   x_hat = (code - zero) * scale
//
// with round half to even. This is ONNX's QuantizeLinear for an unsigned type: the clip acts after zero is added.
// All arithmetic is float32, so that a host computation, a Lathe graph and ONNX Runtime give the same codes.
type Affine struct {
	Bits int // 2 to 8

	// Axis is the axis of the tensor whose index chooses the group, counted from 0; -1: one group for all.
	Axis int
	// Group, if positive, splits each row along axis 0 into blocks of that many consecutive values, each with a
	// scale of its own (row-major: row*blocks + block). Axis must be 0. If 0, a row is one group.
	Group int

	Scale []float64 // one per group, > 0, a float32 number
	Zero  []float64 // one per group; whole numbers, except in RepQ-ViT's fractional form and halfway between codes in StatsQ's
}

// Max is the highest code, 2^Bits-1.
func (a Affine) Max() int { return 1<<a.Bits - 1 }

// Fractional says whether some zero point is not a whole number; such a grid has no integer codes.
func (a Affine) Fractional() bool {
	for _, z := range a.Zero {
		if z != math.Trunc(z) {
			return true
		}
	}
	return false
}

// layout maps positions of a tensor to groups: position i belongs to group i/inner mod groups.
type layout struct{ size, groups, inner int }

func (l layout) group(i int) int { return i / l.inner % l.groups }

func newLayout(n int, shape []int, axis, group int) (layout, error) {
	size := 1
	for _, d := range shape {
		if d < 0 {
			return layout{}, fmt.Errorf("quant: shape %v has a negative dimension", shape)
		}
		size *= d
	}
	if size != n {
		return layout{}, fmt.Errorf("quant: shape %v holds %d values, got %d", shape, size, n)
	}
	if group > 0 {
		if axis != 0 || len(shape) < 2 {
			return layout{}, fmt.Errorf("quant: groups of %d run along the rows of a matrix (axis 0), got axis %d of shape %v", group, axis, shape)
		}
		cols := 1
		for _, d := range shape[1:] {
			cols *= d
		}
		if cols%group != 0 {
			return layout{}, fmt.Errorf("quant: group size %d does not divide %d columns", group, cols)
		}
		return layout{size: n, groups: max(1, n/group), inner: group}, nil
	}
	if axis == -1 {
		return layout{size: n, groups: 1, inner: max(1, n)}, nil
	}
	if axis < 0 || axis >= len(shape) {
		return layout{}, fmt.Errorf("quant: axis %d of shape %v; accepted: -1 (one group) to %d", axis, shape, len(shape)-1)
	}
	inner := 1
	for _, d := range shape[axis+1:] {
		inner *= d
	}
	return layout{size: n, groups: shape[axis], inner: max(1, inner)}, nil
}

func (a Affine) layout(n int, shape []int) (layout, error) {
	l, err := newLayout(n, shape, a.Axis, a.Group)
	if err != nil {
		return l, err
	}
	if len(a.Scale) != l.groups || len(a.Zero) != l.groups {
		return l, fmt.Errorf("quant: %d scales and %d zero points for %d groups of shape %v", len(a.Scale), len(a.Zero), l.groups, shape)
	}
	return l, nil
}

// Validate reports whether the grid is usable: bits in 2..8 and finite positive scales.
func (a Affine) Validate() error {
	if err := checkBits(a.Bits); err != nil {
		return err
	}
	if len(a.Scale) == 0 || len(a.Scale) != len(a.Zero) {
		return fmt.Errorf("quant: %d scales for %d zero points", len(a.Scale), len(a.Zero))
	}
	for i, s := range a.Scale {
		if !(s > 0) || math.IsInf(s, 0) {
			return fmt.Errorf("quant: scale %g of group %d is not positive", s, i)
		}
		if math.IsNaN(a.Zero[i]) || math.IsInf(a.Zero[i], 0) {
			return fmt.Errorf("quant: zero point %g of group %d is not finite", a.Zero[i], i)
		}
	}
	return nil
}

// Codes returns the code of every value, in [0, 2^Bits-1].
func (a Affine) Codes(x []float32, shape []int) ([]int32, error) {
	if a.Fractional() {
		return nil, fmt.Errorf("quant: a grid with a fractional zero point has no integer codes; round the zero point")
	}
	l, err := a.layout(len(x), shape)
	if err != nil {
		return nil, err
	}
	out := make([]int32, len(x))
	for i, v := range x {
		g := l.group(i)
		out[i] = int32(code(v, float32(a.Scale[g]), float32(a.Zero[g]), float32(a.Max())))
	}
	return out, nil
}

// Decode returns (code-zero)*scale.
func (a Affine) Decode(codes []int32, shape []int) ([]float32, error) {
	l, err := a.layout(len(codes), shape)
	if err != nil {
		return nil, err
	}
	out := make([]float32, len(codes))
	for i, c := range codes {
		g := l.group(i)
		out[i] = (float32(c) - float32(a.Zero[g])) * float32(a.Scale[g])
	}
	return out, nil
}

// FakeQuant returns each value moved to its grid point.
func (a Affine) FakeQuant(x []float32, shape []int) ([]float32, error) {
	l, err := a.layout(len(x), shape)
	if err != nil {
		return nil, err
	}
	out := make([]float32, len(x))
	top := float32(a.Max())
	for i, v := range x {
		g := l.group(i)
		s, z := float32(a.Scale[g]), float32(a.Zero[g])
		out[i] = (code(v, s, z, top) - z) * s
	}
	return out, nil
}

// code is the float32 value clip(round(x/s)+z, 0, top).
func code(x, s, z, top float32) float32 {
	return min(max(float32(math.RoundToEven(float64(x/s)))+z, 0), top)
}

// Column returns the one-group grid of group g.
func (a Affine) Column(g int) Affine {
	return Affine{Bits: a.Bits, Axis: -1, Scale: a.Scale[g : g+1], Zero: a.Zero[g : g+1]}
}

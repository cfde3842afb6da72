package quant

import (
	"errors"
	"fmt"
	"math"

	"github.com/lathe-ml/lathe/internal/half"
	"github.com/lathe-ml/lathe/nn"
)

// ShiftWeights are the frozen weights ±2^(s+Offset) of a site as codes sign·(T+1)+s, sign 1 for negative, T = 2^(Bits−1)−1,
// and inference with them without a multiplication.
type ShiftWeights struct {
	Bits   int     // 2 to 5
	Shape  []int   // output channel first
	Codes  []uint8 // row-major, each below 2^Bits; the kernels ignore higher bits
	Offset int     // common exponent
}

// PackShift freezes latents, all of one length, into codes: t holds T = 2^(bits−1)−1 of them. The result's shape is one row.
func PackShift(sign []float32, t [][]float32, bits int) (*ShiftWeights, error) {
	if err := checkShiftBits(bits); err != nil {
		return nil, err
	}
	if len(t) != shifts(bits) {
		return nil, fmt.Errorf("quant: %d shift latents for weights of %d bits; want %d", len(t), bits, shifts(bits))
	}
	if err := checkFinite(sign); err != nil {
		return nil, err
	}
	w := &ShiftWeights{Bits: bits, Shape: []int{1, len(sign)}, Codes: make([]uint8, len(sign))}
	for i, l := range t {
		if len(l) != len(sign) {
			return nil, fmt.Errorf("quant: shift latent t%d has %d values, the sign %d", i+1, len(l), len(sign))
		}
		if err := checkFinite(l); err != nil {
			return nil, err
		}
		for j, v := range l {
			if v > 0 {
				w.Codes[j]++
			} else {
				w.Codes[j] = 0
			}
		}
	}
	for j, v := range sign {
		if v < 0 {
			w.Codes[j] += uint8(shifts(bits) + 1)
		}
	}
	return w, nil
}

// Check reports what does not fit.
func (w *ShiftWeights) Check() error {
	if err := checkShiftBits(w.Bits); err != nil {
		return err
	}
	size := 1
	for _, d := range w.Shape {
		size *= d
	}
	if len(w.Shape) == 0 || size != len(w.Codes) {
		return fmt.Errorf("quant: %d shift weights for a shape of %v", len(w.Codes), w.Shape)
	}
	for i, c := range w.Codes {
		if c >= 1<<w.Bits {
			return fmt.Errorf("quant: shift code %d at %d; the codes of %d bits are below %d", c, i, w.Bits, 1<<w.Bits)
		}
	}
	return nil
}

// ShiftsOf returns the weights of a site of ShiftLatents that Settle has frozen.
func ShiftsOf(net *nn.Network, site *nn.Node) (*ShiftWeights, error) {
	l, ok := site.Op.(nn.Linear)
	if !ok {
		return nil, fmt.Errorf("quant: node %q (%s) has no weight", site.Name, site.Op.Kind())
	}
	r, ok := l.Repr().(Table)
	q, table := net.Param(site, "q"), net.Param(site, "table")
	if !ok || q == nil || table == nil || r.Scaled || r.Groups > 1 || checkShiftBits(r.Bits) != nil || r.levels() != 1<<r.Bits {
		return nil, fmt.Errorf("quant: site %q stores its weight as %s, not as frozen shifts", site.Name, l.Repr().Kind())
	}
	levels := table.Data()
	_, exponent := math.Frexp(float64(levels[0]))
	w := &ShiftWeights{Bits: r.Bits, Shape: q.Value.Shape().Dimensions, Offset: exponent - 1}
	for i, v := range shiftLevels(w.Bits, w.Offset) {
		if levels[i] != v {
			return nil, fmt.Errorf("quant: site %q: level %d is %g, not the shift %g", site.Name, i, levels[i], v)
		}
	}
	for _, c := range q.Data() {
		w.Codes = append(w.Codes, uint8(c))
	}
	return w, w.Check()
}

func (w *ShiftWeights) table() *TableWeights {
	return &TableWeights{Bits: w.Bits, Shape: w.Shape, Codes: w.Codes, Tables: [][]float32{shiftLevels(w.Bits, w.Offset)}}
}

// Decode returns the weights as floats.
func (w *ShiftWeights) Decode() []float32 { return w.table().Decode() }

// Packed returns the codes side by side, Bits each, the first in the lowest bits.
func (w *ShiftWeights) Packed() []byte {
	out := make([]byte, (len(w.Codes)*w.Bits+7)/8)
	for i, c := range w.Codes {
		at := i * w.Bits
		v := uint16(c) << (at % 8)
		out[at/8] |= byte(v)
		if v>>8 != 0 {
			out[at/8+1] |= byte(v >> 8)
		}
	}
	return out
}

// UnpackShift is the inverse of Packed for weights of a shape.
func UnpackShift(packed []byte, bits int, shape ...int) (*ShiftWeights, error) {
	if err := checkShiftBits(bits); err != nil {
		return nil, err
	}
	size := 1
	for _, d := range shape {
		if d < 0 || d > 0 && size > math.MaxInt32/d {
			return nil, fmt.Errorf("quant: shift weights of shape %v", shape)
		}
		size *= d
	}
	if len(packed) != (size*bits+7)/8 {
		return nil, fmt.Errorf("quant: %d bytes for %d shift weights of %d bits; want %d", len(packed), size, bits, (size*bits+7)/8)
	}
	w := &ShiftWeights{Bits: bits, Shape: shape, Codes: make([]uint8, size)}
	for i := range w.Codes {
		at := i * bits
		v := uint16(packed[at/8])
		if at/8+1 < len(packed) {
			v |= uint16(packed[at/8+1]) << 8
		}
		w.Codes[i] = uint8(v >> (at % 8) & (1<<bits - 1))
	}
	return w, nil
}

// ShiftF32 returns ±x·2^s by adding to the exponent: zero and subnormal x give zero, what overflows infinity, what falls
// below the smallest normal number zero; infinities and NaN stay. The sign is flipped when negative.
func ShiftF32(x float32, s int, negative bool) float32 {
	const mantissa = 23
	b := math.Float32bits(x)
	e := int(b >> mantissa & 0xff)
	switch {
	case e == 0xff:
	case e == 0 || e+s <= 0:
		b &= 1 << 31
	case e+s >= 0xff:
		b = b&(1<<31) | 0xff<<mantissa
	default:
		b += uint32(s) << mantissa
	}
	if negative {
		b ^= 1 << 31
	}
	return math.Float32frombits(b)
}

// ShiftF16 is ShiftF32 for the bits of an IEEE half precision number.
func ShiftF16(x uint16, s int, negative bool) uint16 {
	const mantissa = 10
	e := int(x >> mantissa & 0x1f)
	switch {
	case e == 0x1f:
	case e == 0 || e+s <= 0:
		x &= 1 << 15
	case e+s >= 0x1f:
		x = x&(1<<15) | 0x1f<<mantissa
	default:
		x += uint16(s) << mantissa
	}
	if negative {
		x ^= 1 << 15
	}
	return x
}

// exponents are what the fast kernel adds to a float32's bits for each code: the shift in the exponent, and for negative
// weights 1 to the sign, which flips it.
func (w *ShiftWeights) exponents() (add [32]uint32) {
	for c := range add {
		s, negative := w.at(uint8(c))
		if add[c] = uint32(s) << 23; negative {
			add[c] += 1 << 31
		}
	}
	return add
}

// at returns a code's shift and whether the weight is negative.
func (w *ShiftWeights) at(code uint8) (s int, negative bool) {
	t := uint8(shifts(w.Bits) + 1) // a power of two
	return int(code&(t-1)) + w.Offset, code&t != 0
}

// DotF32 computes y = Wx for W [rows, len(x)] by integer additions to exponents and float additions, in the order of a
// plain loop: bit for bit what multiplication gives where x is zero or normal and nothing overflows.
func (w *ShiftWeights) DotF32(x, y []float32) error {
	if err := w.fits(len(x), len(y)); err != nil {
		return err
	}
	var d dotF32
	d.load(w, x)
	d.rows(w.Codes, y)
	return nil
}

func (w *ShiftWeights) fits(in, rows int) error {
	if err := checkShiftBits(w.Bits); err != nil {
		return err
	}
	if in*rows != len(w.Codes) || in == 0 || len(w.Codes)/in != rows {
		return fmt.Errorf("quant: shift weights of shape %v do not take %d values to %d", w.Shape, in, rows)
	}
	return nil
}

// dotF32 multiplies one vector with many rows.
type dotF32 struct {
	w    *ShiftWeights
	add  [32]uint32
	x    []float32
	bits []uint32 // of x
	live []int32  // where x is not zero
	kind int
}

// Kinds of vectors: all values normal; zeros among them; values that need a guard.
const (
	plainVector = iota
	sparseVector
	guardedVector
)

func (d *dotF32) load(w *ShiftWeights, x []float32) {
	if d.w != w {
		d.w, d.add = w, w.exponents()
	}
	d.x, d.bits, d.live, d.kind = x, d.bits[:0], d.live[:0], plainVector
	below, above := min(w.Offset, 0), max(shifts(w.Bits)+w.Offset, 0)
	for i, v := range x {
		b := math.Float32bits(v)
		d.bits = append(d.bits, b)
		if b<<1 == 0 {
			d.kind = max(d.kind, sparseVector)
			continue
		}
		d.live = append(d.live, int32(i))
		if e := int(b >> 23 & 0xff); e == 0 || e+below <= 0 || e+above >= 0xff {
			d.kind = guardedVector
		}
	}
}

func (d *dotF32) rows(codes []uint8, y []float32) {
	n := len(d.x)
	for r := range y {
		row := codes[r*n : (r+1)*n]
		var sum float32
		switch d.kind {
		case plainVector:
			bits := d.bits[:len(row)]
			for i, c := range row {
				sum += math.Float32frombits(bits[i] + d.add[c&31])
			}
		case sparseVector: // adding zero changes no sum that began at zero
			for _, i := range d.live {
				sum += math.Float32frombits(d.bits[i] + d.add[row[i]&31])
			}
		default:
			for i, c := range row {
				s, negative := d.w.at(c)
				sum += ShiftF32(d.x[i], s, negative)
			}
		}
		y[r] = sum
	}
}

// DotF16 is DotF32 for the bits of half precision values; products are rounded to nothing, sums are kept in float32.
func (w *ShiftWeights) DotF16(x []uint16, y []float32) error {
	if err := w.fits(len(x), len(y)); err != nil {
		return err
	}
	for r := range y {
		y[r] = 0
		for i, v := range x {
			s, negative := w.at(w.Codes[r*len(x)+i])
			y[r] += half.FromF16(ShiftF16(v, s, negative))
		}
	}
	return nil
}

// DotInt computes y = Wx on integers by shifts, additions and subtractions, exactly for up to 2³¹ of them: the reference
// of a multiplier-free device. With an offset the true values are y·2^Offset.
func (w *ShiftWeights) DotInt(x []int32, y []int64) error {
	if err := w.fits(len(x), len(y)); err != nil {
		return err
	}
	w.dotInt(x, w.Codes, y)
	return nil
}

func (w *ShiftWeights) dotInt(x []int32, codes []uint8, y []int64) {
	t := uint8(shifts(w.Bits) + 1)
	for r := range y {
		var sum int64
		for i, c := range codes[r*len(x) : (r+1)*len(x)] {
			v := int64(x[i]) << (c & (t - 1))
			if c&t != 0 {
				v = -v
			}
			sum += v
		}
		y[r] = sum
	}
}

// ConvF32 runs a convolution whose kernel the weights are over x [h, w, in] and returns y [oh, ow, out] without bias; op
// gives the geometry (two spatial axes, groups and depthwise kernels included).
func (w *ShiftWeights) ConvF32(op nn.Conv, x []float32, height, width int) (y []float32, oh, ow int, err error) {
	var d dotF32
	return shiftConv(w, op, x, height, width, func(patch []float32, codes []uint8, y []float32) {
		d.load(w, patch)
		d.rows(codes, y)
	})
}

// ConvInt is ConvF32 on integers, as DotInt is DotF32.
func (w *ShiftWeights) ConvInt(op nn.Conv, x []int32, height, width int) (y []int64, oh, ow int, err error) {
	return shiftConv(w, op, x, height, width, w.dotInt)
}

func shiftConv[X float32 | int32, Y float32 | int64](w *ShiftWeights, op nn.Conv, x []X, height, width int, dot func(patch []X, codes []uint8, y []Y)) (y []Y, oh, ow int, err error) {
	if err := w.Check(); err != nil {
		return nil, 0, 0, err
	}
	if len(op.Kernel) != 2 || len(w.Shape) != 4 || w.Shape[1] != op.Kernel[0] || w.Shape[2] != op.Kernel[1] || w.Shape[0] != op.Out {
		return nil, 0, 0, fmt.Errorf("quant: shift weights of shape %v for a kernel of %v and %d channels; want two spatial axes", w.Shape, op.Kernel, op.Out)
	}
	groups := max(op.Groups, 1)
	per := w.Shape[3]
	in := per * groups
	if op.Out%groups != 0 || height < 1 || width < 1 || len(x) != height*width*in {
		return nil, 0, 0, fmt.Errorf("quant: %d values for an input of %d×%d×%d in %d groups", len(x), height, width, in, groups)
	}
	one := func(v []int, i int) int {
		if i < len(v) {
			return max(v[i], 1)
		}
		return 1
	}
	var pad [2][2]int
	copy(pad[:], op.Pad)
	size := func(axis, n int) int {
		span := (op.Kernel[axis]-1)*one(op.Dilation, axis) + 1
		if n += pad[axis][0] + pad[axis][1]; n < span {
			return 0
		}
		return (n-span)/one(op.Stride, axis) + 1
	}
	if oh, ow = size(0, height), size(1, width); oh < 1 || ow < 1 {
		return nil, 0, 0, errors.New("quant: the kernel is larger than the padded input")
	}
	y = make([]Y, oh*ow*op.Out)
	patch := make([]X, op.Kernel[0]*op.Kernel[1]*per)
	rows := op.Out / groups
	for oy := range oh {
		for ox := range ow {
			for g := range groups {
				clear(patch)
				for ky := range op.Kernel[0] {
					iy := oy*one(op.Stride, 0) - pad[0][0] + ky*one(op.Dilation, 0)
					for kx := range op.Kernel[1] {
						ix := ox*one(op.Stride, 1) - pad[1][0] + kx*one(op.Dilation, 1)
						if iy >= 0 && iy < height && ix >= 0 && ix < width {
							from := (iy*width+ix)*in + g*per
							copy(patch[(ky*op.Kernel[1]+kx)*per:], x[from:from+per])
						}
					}
				}
				at := (oy*ow+ox)*op.Out + g*rows
				dot(patch, w.Codes[g*rows*len(patch):(g+1)*rows*len(patch)], y[at:at+rows])
			}
		}
	}
	return y, oh, ow, nil
}

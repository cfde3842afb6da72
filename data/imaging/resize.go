package imaging

import (
	"fmt"
	"math"
)

// taps holds the sparse rows of a resampling matrix: output i is the sum of weight[i*n+j] times input index[i*n+j].
type taps struct {
	out, n int
	index  []int
	weight []float64
}

// cubic is Keys' kernel with a = -0.5.
func cubic(x float64) float64 {
	x = math.Abs(x)
	switch {
	case x <= 1:
		return (1.5*x-2.5)*x*x + 1
	case x < 2:
		return ((-0.5*x+2.5)*x-4)*x + 2
	}
	return 0
}

// scaledSize is ⌈n·s⌉, where a product that is an integer but for rounding counts as that integer.
func scaledSize(n int, s float64) float64 {
	v := float64(n) * s
	if r := math.Round(v); math.Abs(v-r) < 1e-9*math.Max(1, r) {
		return r
	}
	return math.Ceil(v)
}

// bicubicTaps follows MATLAB's imresize: output i (from 1) lies at i/s + (1-1/s)/2 in the input; where s < 1 and
// antialias is set the kernel is stretched by 1/s; the weights of an output sum to 1; indices outside are mirrored
// with the border sample repeated (half-sample symmetric).
func bicubicTaps(in int, s float64, antialias bool) (*taps, error) {
	if in < 1 {
		return nil, fmt.Errorf("imaging: cannot resize %d samples; at least 1 is needed", in)
	}
	if !(s > 0) || math.IsInf(s, 0) {
		return nil, fmt.Errorf("imaging: scale %v is not a positive number", s)
	}
	size := scaledSize(in, s)
	if size < 1 || size > MaxPixels {
		return nil, fmt.Errorf("imaging: scale %v makes %d samples %g; 1 to %d are possible", s, in, size, MaxPixels)
	}
	width, k := 4.0, 1.0
	if s < 1 && antialias {
		width, k = 4/s, s
	}
	t := &taps{out: int(size), n: int(math.Ceil(width)) + 2}
	if float64(t.out)*float64(t.n) > 1<<28 {
		return nil, fmt.Errorf("imaging: scale %v of %d samples needs %d weights for each of %d samples", s, in, t.n, t.out)
	}
	t.index = make([]int, t.out*t.n)
	t.weight = make([]float64, t.out*t.n)
	for i := range t.out {
		u := float64(i+1)/s + 0.5*(1-1/s)
		left := math.Floor(u - width/2)
		sum := 0.
		w := t.weight[i*t.n : (i+1)*t.n]
		for j := range w {
			at := left + float64(j)
			w[j] = cubic(k * (u - at))
			sum += w[j]
			t.index[i*t.n+j] = mirror(int(at)-1, in)
		}
		for j := range w {
			w[j] /= sum
		}
	}
	return t.trim(), nil
}

// trim drops the taps at either end that are zero in every row.
func (t *taps) trim() *taps {
	zero := func(j int) bool {
		for i := range t.out {
			if t.weight[i*t.n+j] != 0 {
				return false
			}
		}
		return true
	}
	lo, hi := 0, t.n
	for hi > lo+1 && zero(hi-1) {
		hi--
	}
	for lo < hi-1 && zero(lo) {
		lo++
	}
	if lo == 0 && hi == t.n {
		return t
	}
	u := &taps{out: t.out, n: hi - lo}
	for i := range t.out {
		u.index = append(u.index, t.index[i*t.n+lo:i*t.n+hi]...)
		u.weight = append(u.weight, t.weight[i*t.n+lo:i*t.n+hi]...)
	}
	return u
}

// mirror reflects an index into [0, n) with the border samples repeated: … 1 0 | 0 1 … n-1 | n-1 n-2 …
func mirror(i, n int) int {
	i %= 2 * n
	if i < 0 {
		i += 2 * n
	}
	if i >= n {
		i = 2*n - 1 - i
	}
	return i
}

// BicubicMatrix returns the [out, in] matrix, row-major, that resizes a row of in samples by scale; out = ⌈in·scale⌉.
// It is the same linear map that Bicubic applies along each axis, for use inside a network.
func BicubicMatrix(in int, scale float64, antialias bool) (matrix []float64, out int, err error) {
	t, err := bicubicTaps(in, scale, antialias)
	if err != nil {
		return nil, 0, err
	}
	if float64(t.out)*float64(in) > 1<<28 {
		return nil, 0, fmt.Errorf("imaging: a resize matrix of %d×%d is larger than %d values", t.out, in, 1<<28)
	}
	matrix = make([]float64, t.out*in)
	for i := range t.out {
		for j := range t.n {
			matrix[i*in+t.index[i*t.n+j]] += t.weight[i*t.n+j]
		}
	}
	return matrix, t.out, nil
}

// Bicubic resizes as MATLAB's imresize(..., 'bicubic') does on floating-point images: Keys' kernel with a = -0.5,
// stretched by 1/scale when it shrinks and antialias is set, half-sample symmetric borders, ⌈n·scale⌉ samples a side.
// Results are not clamped: the kernel over- and undershoots at edges.
func Bicubic(m *Image, scaleH, scaleW float64, antialias bool) (*Image, error) {
	if err := m.Check(); err != nil {
		return nil, err
	}
	th, err := bicubicTaps(m.H, scaleH, antialias)
	if err != nil {
		return nil, err
	}
	tw, err := bicubicTaps(m.W, scaleW, antialias)
	if err != nil {
		return nil, err
	}
	if int64(th.out)*int64(tw.out) > MaxPixels {
		return nil, fmt.Errorf("imaging: resizing %d×%d pixels to %d×%d exceeds %d pixels; work on parts of the image",
			m.W, m.H, tw.out, th.out, MaxPixels)
	}
	// The axis that shrinks more goes first; the order does not change the result, only the work.
	if scaleH <= scaleW {
		return tw.columns(th.rows(m)), nil
	}
	return th.rows(tw.columns(m)), nil
}

// rows applies t along the vertical axis.
func (t *taps) rows(m *Image) *Image {
	n := m.W * m.C
	out := &Image{H: t.out, W: m.W, C: m.C, Pix: make([]float32, t.out*n)}
	acc := make([]float64, n)
	for i := range t.out {
		clear(acc)
		for j := range t.n {
			w := t.weight[i*t.n+j]
			if w == 0 {
				continue
			}
			at := t.index[i*t.n+j] * n
			src := m.Pix[at : at+n][:len(acc)]
			for k := range acc {
				acc[k] += w * float64(src[k])
			}
		}
		dst := out.Pix[i*n : (i+1)*n]
		for k, v := range acc {
			dst[k] = float32(v)
		}
	}
	return out
}

// columns applies t along the horizontal axis.
func (t *taps) columns(m *Image) *Image {
	out := &Image{H: m.H, W: t.out, C: m.C, Pix: make([]float32, m.H*t.out*m.C)}
	for y := range m.H {
		src := m.Pix[y*m.W*m.C : (y+1)*m.W*m.C]
		dst := out.Pix[y*t.out*m.C : (y+1)*t.out*m.C]
		for i := range t.out {
			index, weight := t.index[i*t.n:(i+1)*t.n], t.weight[i*t.n:(i+1)*t.n]
			for c := range m.C {
				s := 0.
				for j, w := range weight {
					s += w * float64(src[index[j]*m.C+c])
				}
				dst[i*m.C+c] = float32(s)
			}
		}
	}
	return out
}

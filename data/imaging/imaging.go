// Package imaging holds the image arithmetic that restoration networks are trained and judged with: bicubic resizing
// as MATLAB's imresize does it, Gaussian blur with decimation, the BT.601 studio-swing colour transform, tiles with
// overlap, and the way between image.Image and arrays of float32.
//
// The package resamples itself because golang.org/x/image/draw renormalises kernels that reach over the border where
// the literature mirrors them, which costs tenths of a decibel in every comparison with published numbers.
package imaging

import (
	"fmt"
	"math"
)

// MaxPixels is the largest number of pixels of an image that this package makes: 2^28, a square of 16384.
const MaxPixels = 1 << 28

// Image is an array of samples, row by row with the channels of a pixel together: sample c of pixel (y, x) is
// Pix[(y*W+x)*C+c]. Values are nominally in [0, 1]. One channel is grey or a single plane, three are RGB or YCbCr.
type Image struct {
	H, W, C int
	Pix     []float32
}

// New returns a black image. It fails when a side is not positive or the image exceeds MaxPixels.
func New(h, w, c int) (*Image, error) {
	if h < 1 || w < 1 || c < 1 {
		return nil, fmt.Errorf("imaging: an image of %d×%d pixels and %d channels; each must be at least 1", w, h, c)
	}
	if c > 1024 || h > MaxPixels || w > MaxPixels || int64(h)*int64(w) > MaxPixels {
		return nil, fmt.Errorf("imaging: an image of %d×%d pixels and %d channels is larger than %d pixels; work on parts of it",
			w, h, c, MaxPixels)
	}
	return &Image{H: h, W: w, C: c, Pix: make([]float32, h*w*c)}, nil
}

// Check says what is wrong with an image: a nil image, sides that do not match the samples, NaN or infinite samples.
func (m *Image) Check() error {
	if m == nil {
		return fmt.Errorf("imaging: no image")
	}
	if m.H < 1 || m.W < 1 || m.C < 1 || len(m.Pix) != m.H*m.W*m.C {
		return fmt.Errorf("imaging: an image of %d×%d pixels and %d channels with %d samples", m.W, m.H, m.C, len(m.Pix))
	}
	for i, v := range m.Pix {
		if v-v != 0 { // NaN or ±Inf
			p := i / m.C
			return fmt.Errorf("imaging: sample %d of pixel (%d, %d) is %v; samples must be finite", i%m.C, p%m.W, p/m.W, v)
		}
	}
	return nil
}

// At returns sample c of pixel (x, y).
func (m *Image) At(x, y, c int) float32 { return m.Pix[(y*m.W+x)*m.C+c] }

// Clone returns a copy that shares nothing.
func (m *Image) Clone() *Image {
	return &Image{H: m.H, W: m.W, C: m.C, Pix: append([]float32(nil), m.Pix...)}
}

// Channel returns channel c as an image of one channel.
func (m *Image) Channel(c int) *Image {
	out := &Image{H: m.H, W: m.W, C: 1, Pix: make([]float32, m.H*m.W)}
	for i := range out.Pix {
		out.Pix[i] = m.Pix[i*m.C+c]
	}
	return out
}

// Merge interleaves images of one channel and one size.
func Merge(planes ...*Image) (*Image, error) {
	if len(planes) == 0 {
		return nil, fmt.Errorf("imaging: no planes to merge")
	}
	for i, p := range planes {
		if err := p.Check(); err != nil {
			return nil, fmt.Errorf("plane %d: %w", i, err)
		}
	}
	h, w := planes[0].H, planes[0].W
	for i, p := range planes {
		if p.C != 1 || p.H != h || p.W != w {
			return nil, fmt.Errorf("imaging: plane %d is %d×%d×%d; all planes must be %d×%d×1", i, p.W, p.H, p.C, w, h)
		}
	}
	out, err := New(h, w, len(planes))
	if err != nil {
		return nil, err
	}
	for c, p := range planes {
		for i, v := range p.Pix {
			out.Pix[i*out.C+c] = v
		}
	}
	return out, nil
}

// Crop copies the rectangle of w×h pixels whose top left pixel is (x, y).
func (m *Image) Crop(x, y, w, h int) (*Image, error) {
	if x < 0 || y < 0 || w < 1 || h < 1 || w > m.W-x || h > m.H-y {
		return nil, fmt.Errorf("imaging: crop %d×%d at (%d, %d) leaves the image of %d×%d pixels", w, h, x, y, m.W, m.H)
	}
	out := &Image{H: h, W: w, C: m.C, Pix: make([]float32, h*w*m.C)}
	for i := range h {
		from := ((y+i)*m.W + x) * m.C
		copy(out.Pix[i*w*m.C:(i+1)*w*m.C], m.Pix[from:from+w*m.C])
	}
	return out, nil
}

// CropToMultiple drops rows at the bottom and columns at the right until both sides are multiples of r.
func (m *Image) CropToMultiple(r int) (*Image, error) {
	if r < 1 {
		return nil, fmt.Errorf("imaging: cannot crop to a multiple of %d; the factor is at least 1", r)
	}
	if m.W < r || m.H < r {
		return nil, fmt.Errorf("imaging: an image of %d×%d pixels has no multiple of %d; it needs at least %d×%d", m.W, m.H, r, r, r)
	}
	return m.Crop(0, 0, m.W-m.W%r, m.H-m.H%r)
}

// Shave drops border pixels on every side, as super-resolution papers do before they measure.
func (m *Image) Shave(border int) (*Image, error) {
	if border < 0 || m.W <= 2*border || m.H <= 2*border {
		return nil, fmt.Errorf("imaging: nothing is left of %d×%d pixels without a border of %d", m.W, m.H, border)
	}
	return m.Crop(border, border, m.W-2*border, m.H-2*border)
}

// Orient returns one of the eight images that a square's symmetries make of m: k turns of 90° clockwise, k = o%4, of
// the image or, for o >= 4, of its left-right mirror image.
func (m *Image) Orient(o int) *Image {
	o = ((o % 8) + 8) % 8
	h, w := m.H, m.W
	if o%2 == 1 {
		h, w = w, h
	}
	out := &Image{H: h, W: w, C: m.C, Pix: make([]float32, len(m.Pix))}
	for y := range h {
		for x := range w {
			var sx, sy int
			switch o % 4 {
			case 0:
				sx, sy = x, y
			case 1:
				sx, sy = y, m.H-1-x
			case 2:
				sx, sy = m.W-1-x, m.H-1-y
			case 3:
				sx, sy = m.W-1-y, x
			}
			if o >= 4 {
				sx = m.W - 1 - sx
			}
			copy(out.Pix[(y*w+x)*m.C:(y*w+x+1)*m.C], m.Pix[(sy*m.W+sx)*m.C:(sy*m.W+sx+1)*m.C])
		}
	}
	return out
}

// Clamp limits every sample to [0, 1] in place and returns m.
func (m *Image) Clamp() *Image {
	for i, v := range m.Pix {
		m.Pix[i] = min(max(v, 0), 1)
	}
	return m
}

// Quantize rounds every sample in place to one of levels equally spaced values in [0, 1] (255 levels: 8 bits; halves
// away from zero, as image writers round) and returns m.
func (m *Image) Quantize(levels int) *Image {
	n := float64(levels)
	for i, v := range m.Pix {
		m.Pix[i] = float32(math.Floor(float64(min(max(v, 0), 1))*n+0.5) / n)
	}
	return m
}

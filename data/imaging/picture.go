package imaging

import (
	"fmt"
	"image"
	"image/color"
)

// Picture is an image.Image taken apart: what a network treats (colour), what it does not (transparency), and how the
// file stored it.
type Picture struct {
	Color *Image // 1 channel for grey, else 3 (RGB); in [0, 1]; not premultiplied by alpha
	Alpha *Image // 1 channel; nil when every pixel is opaque
	Depth int    // bits per sample to write: 8 or 16
}

// FromImage reads any image.Image: grey images keep one channel, 16-bit images their precision, and premultiplied
// alpha is divided out. It fails on an empty image and on one larger than MaxPixels.
func FromImage(img image.Image) (*Picture, error) {
	if img == nil {
		return nil, fmt.Errorf("imaging: no image")
	}
	b := img.Bounds()
	channels := 3
	p := &Picture{Depth: 8}
	switch img.(type) {
	case *image.Gray:
		channels = 1
	case *image.Gray16:
		channels, p.Depth = 1, 16
	case *image.NRGBA64, *image.RGBA64:
		p.Depth = 16
	}
	var err error
	if p.Color, err = New(b.Dy(), b.Dx(), channels); err != nil {
		return nil, err
	}
	opaque := true
	if o, ok := img.(interface{ Opaque() bool }); ok {
		opaque = o.Opaque()
	} else if channels == 3 {
		opaque = false
	}
	if !opaque {
		if p.Alpha, err = New(b.Dy(), b.Dx(), 1); err != nil {
			return nil, err
		}
	}
	pix, i := p.Color.Pix, 0
	for y := b.Min.Y; y < b.Max.Y; y++ {
		for x := b.Min.X; x < b.Max.X; x++ {
			switch m := img.(type) {
			case *image.Gray:
				pix[i] = float32(m.GrayAt(x, y).Y) / 255
			case *image.Gray16:
				pix[i] = float32(m.Gray16At(x, y).Y) / 65535
			case *image.NRGBA:
				c := m.NRGBAAt(x, y)
				pix[3*i], pix[3*i+1], pix[3*i+2] = float32(c.R)/255, float32(c.G)/255, float32(c.B)/255
				if !opaque {
					p.Alpha.Pix[i] = float32(c.A) / 255
				}
			case *image.YCbCr:
				c := m.YCbCrAt(x, y)
				r, g, b := color.YCbCrToRGB(c.Y, c.Cb, c.Cr)
				pix[3*i], pix[3*i+1], pix[3*i+2] = float32(r)/255, float32(g)/255, float32(b)/255
			default:
				c := color.NRGBA64Model.Convert(img.At(x, y)).(color.NRGBA64)
				pix[3*i], pix[3*i+1], pix[3*i+2] = float32(c.R)/65535, float32(c.G)/65535, float32(c.B)/65535
				if !opaque {
					p.Alpha.Pix[i] = float32(c.A) / 65535
				}
			}
			i++
		}
	}
	return p, nil
}

// Image puts the picture together again: Gray, Gray16, NRGBA or NRGBA64. Samples are clamped and rounded; a grey
// picture with alpha becomes RGB. It fails when colour has other than 1 or 3 channels, alpha another size, or a
// sample is not finite.
func (p *Picture) Image() (image.Image, error) {
	if err := p.Color.Check(); err != nil {
		return nil, err
	}
	m := p.Color
	if m.C != 1 && m.C != 3 {
		return nil, fmt.Errorf("imaging: a picture of %d channels; 1 (grey) or 3 (RGB) are possible", m.C)
	}
	if p.Alpha != nil {
		if err := p.Alpha.Check(); err != nil {
			return nil, err
		}
		if a := p.Alpha; a.C != 1 || a.H != m.H || a.W != m.W {
			return nil, fmt.Errorf("imaging: alpha is %d×%d×%d, the colour %d×%d", a.W, a.H, a.C, m.W, m.H)
		}
	}
	r := image.Rect(0, 0, m.W, m.H)
	s8 := func(v float32) uint8 { return uint8(min(max(v, 0), 1)*255 + 0.5) }
	s16 := func(v float32) uint16 { return uint16(float64(min(max(v, 0), 1))*65535 + 0.5) }
	put16 := func(b []byte, v uint16) { b[0], b[1] = byte(v>>8), byte(v) }
	deep := p.Depth > 8
	switch {
	case m.C == 1 && p.Alpha == nil && !deep:
		out := image.NewGray(r)
		for i, v := range m.Pix {
			out.Pix[i] = s8(v)
		}
		return out, nil
	case m.C == 1 && p.Alpha == nil:
		out := image.NewGray16(r)
		for i, v := range m.Pix {
			put16(out.Pix[2*i:], s16(v))
		}
		return out, nil
	}
	sample := func(i, c int) float32 {
		if c == 3 {
			if p.Alpha == nil {
				return 1
			}
			return p.Alpha.Pix[i]
		}
		if m.C == 1 {
			return m.Pix[i]
		}
		return m.Pix[3*i+c]
	}
	if !deep {
		out := image.NewNRGBA(r)
		for i := range m.H * m.W {
			for c := range 4 {
				out.Pix[4*i+c] = s8(sample(i, c))
			}
		}
		return out, nil
	}
	out := image.NewNRGBA64(r)
	for i := range m.H * m.W {
		for c := range 4 {
			put16(out.Pix[8*i+2*c:], s16(sample(i, c)))
		}
	}
	return out, nil
}

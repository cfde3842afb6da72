// Package render draws pages of text, so that document models can be judged on as many labelled pictures as needed.
package render

import (
	"fmt"
	"image"
	"image/color"
	"image/draw"
	"math"
	"strings"

	xdraw "golang.org/x/image/draw"
	"golang.org/x/image/font"
	"golang.org/x/image/font/gofont/goitalic"
	"golang.org/x/image/font/gofont/gomono"
	"golang.org/x/image/font/gofont/goregular"
	"golang.org/x/image/font/gofont/gosmallcaps"
	"golang.org/x/image/font/opentype"
	"golang.org/x/image/math/f64"
	"golang.org/x/image/math/fixed"

	"github.com/lathe-ml/lathe/internal/rng"
)

// fonts are the faces that pages are set in, embedded in golang.org/x/image.
var fonts = [][]byte{goregular.TTF, goitalic.TTF, gomono.TTF, gosmallcaps.TTF}

// PageOptions say how a page looks. The zero value is a sheet of 620 by 877 pixels (A4 at 75 dots per inch).
type PageOptions struct {
	Width, Height int // pixels; 0: 620 and 877
	// Scan makes it a copy from a scanner or a telephone: up to 6 degrees askew, with faded ink, uneven light, some blur and
	// noise.
	Scan bool
	Seed uint64
}

// Page sets a text from some place of it as one page: face, size, line spacing, margins, indents, a heading and the
// shade of ink and paper are drawn by the seed. It is an error when the text has no words.
func Page(text string, o PageOptions) (*image.RGBA, error) {
	if o.Width == 0 {
		o.Width = 620
	}
	if o.Height == 0 {
		o.Height = 877
	}
	if o.Width < 64 || o.Height < 64 || o.Width > 8192 || o.Height > 8192 {
		return nil, fmt.Errorf("render: a page of %d by %d pixels; use 64 to 8192", o.Width, o.Height)
	}
	r := rng.New(o.Seed, "page")
	words := strings.Fields(text)
	if len(words) == 0 {
		return nil, fmt.Errorf("render: the text has no words")
	}
	if n := len(words) - 600; n > 0 {
		at := r.IntN(n)
		words = words[at:]
	}
	f, err := opentype.Parse(fonts[r.IntN(len(fonts))])
	if err != nil {
		return nil, fmt.Errorf("render: %w", err)
	}
	size := 9 + 8*r.Float64()
	face, err := opentype.NewFace(f, &opentype.FaceOptions{Size: size, DPI: 72, Hinting: font.HintingNone})
	if err != nil {
		return nil, fmt.Errorf("render: %w", err)
	}
	defer face.Close()
	paper := uint8(255 - r.IntN(25))
	ink := uint8(r.IntN(70))
	page := image.NewRGBA(image.Rect(0, 0, o.Width, o.Height))
	draw.Draw(page, page.Bounds(), image.NewUniform(color.RGBA{paper, paper, uint8(int(paper) - r.IntN(12)), 255}), image.Point{}, draw.Src)
	d := font.Drawer{Dst: page, Src: image.NewUniform(color.RGBA{ink, ink, ink, 255}), Face: face}
	left := .06 + .08*r.Float64()
	margin := int(left * float64(o.Width))
	top := int((.05 + .1*r.Float64()) * float64(o.Height))
	leading := int(size * (1.2 + .5*r.Float64()))
	y := top + leading
	width := fixed.I(o.Width - 2*margin)
	bottom := o.Height - int((.05+.1*r.Float64())*float64(o.Height))
	if r.IntN(2) == 0 { // a heading
		title := strings.ToUpper(strings.Join(words[:min(3, len(words))], " "))
		d.Dot = fixed.Point26_6{X: (fixed.I(o.Width) - d.MeasureString(title)) / 2, Y: fixed.I(y)}
		d.DrawString(title)
		y += 2 * leading
	}
	for i := 0; i < len(words) && y < bottom; y += leading {
		line, last := words[i], false
		indent := fixed.Int26_6(0)
		if r.IntN(7) == 0 {
			indent = fixed.I(2 * int(size))
		}
		for i++; i < len(words); i++ {
			next := line + " " + words[i]
			if d.MeasureString(next) > width-indent {
				break
			}
			line = next
			if last = strings.HasSuffix(line, ".") && r.IntN(12) == 0; last {
				i++
				break
			}
		}
		d.Dot = fixed.Point26_6{X: fixed.I(margin) + indent, Y: fixed.I(y)}
		d.DrawString(line)
		if last && r.IntN(2) == 0 {
			y += leading / 2
		}
	}
	if o.Scan {
		page = scanned(page, rng.New(o.Seed, "scan"), 6)
	}
	return page, nil
}

// scanned degrades a page, which lies up to so many degrees askew.
func scanned(page *image.RGBA, r *rng.Rand, askew float64) *image.RGBA {
	b := page.Bounds()
	w, h := float64(b.Dx()), float64(b.Dy())
	angle := (2*r.Float64() - 1) * askew * math.Pi / 180
	cos, sin := math.Cos(angle), math.Sin(angle)
	out := image.NewRGBA(b)
	draw.Draw(out, b, image.NewUniform(page.At(0, 0)), image.Point{}, draw.Src)
	about := f64.Aff3{cos, -sin, w/2 - cos*w/2 + sin*h/2, sin, cos, h/2 - sin*w/2 - cos*h/2}
	xdraw.BiLinear.Transform(out, about, page, b, draw.Src, nil)
	for range r.IntN(4) { // binomial blur of deviation 0.7 pixels each
		out = blur(out)
	}
	contrast, light, noise := .3+.7*r.Float64(), 200+55*r.Float64(), 12*r.Float64()
	slopeX, slopeY := .3*(2*r.Float64()-1), .3*(2*r.Float64()-1)
	for y := range b.Dy() {
		for x := range b.Dx() {
			lamp := light * (1 + slopeX*(float64(x)/w-.5)) * (1 + slopeY*(float64(y)/h-.5))
			at := out.PixOffset(x, y)
			n := noise * r.NormFloat64()
			for c := range 3 {
				v := lamp*(1-contrast*(1-float64(out.Pix[at+c])/255)) + n
				out.Pix[at+c] = uint8(min(max(v, 0), 255))
			}
		}
	}
	return out
}

// blur convolves with (1,2,1)/4 in both directions.
func blur(src *image.RGBA) *image.RGBA {
	b := src.Bounds()
	pass := func(src *image.RGBA, dx, dy int) *image.RGBA {
		dst := image.NewRGBA(b)
		for y := range b.Dy() {
			for x := range b.Dx() {
				l := src.PixOffset(max(x-dx, 0), max(y-dy, 0))
				m := src.PixOffset(x, y)
				r := src.PixOffset(min(x+dx, b.Dx()-1), min(y+dy, b.Dy()-1))
				for c := range 4 {
					dst.Pix[m+c] = uint8((int(src.Pix[l+c]) + 2*int(src.Pix[m+c]) + int(src.Pix[r+c]) + 2) / 4)
				}
			}
		}
		return dst
	}
	return pass(pass(src, 1, 0), 0, 1)
}

// Rotate turns a picture clockwise by so many quarter turns.
func Rotate(src *image.RGBA, quarters int) *image.RGBA {
	quarters = ((quarters % 4) + 4) % 4
	b := src.Bounds()
	w, h := b.Dx(), b.Dy()
	size := image.Rect(0, 0, w, h)
	if quarters%2 == 1 {
		size = image.Rect(0, 0, h, w)
	}
	dst := image.NewRGBA(size)
	for y := range h {
		for x := range w {
			p := [4][2]int{{x, y}, {h - 1 - y, x}, {w - 1 - x, h - 1 - y}, {y, w - 1 - x}}[quarters]
			dst.SetRGBA(p[0], p[1], src.RGBAAt(b.Min.X+x, b.Min.Y+y))
		}
	}
	return dst
}

package render

import (
	"errors"
	"fmt"
	"image"
	"image/color"
	"image/draw"
	"strings"

	"golang.org/x/image/font"
	"golang.org/x/image/font/opentype"
	"golang.org/x/image/math/fixed"

	"github.com/lathe-ml/lathe/internal/rng"
)

// LineOptions say how a line of text looks. The zero value is 320 by 48 pixels, as text recognisers take it.
type LineOptions struct {
	Width, Height int // pixels; 0: 320 and 48
	Scan          bool
	Seed          uint64
}

// Line sets words from some place of a text as one line, as many as fit, and returns what it says. Face, size and the
// shade of ink and paper are drawn by the seed. The picture is as wide as the line needs, Width at most; Scan degrades it
// as in PageOptions, but hardly askew. It is an error when the text has no words, or none that fits.
func Line(text string, o LineOptions) (img *image.RGBA, says string, err error) {
	if o.Width == 0 {
		o.Width = 320
	}
	if o.Height == 0 {
		o.Height = 48
	}
	if o.Width < 32 || o.Height < 16 || o.Width > 8192 || o.Height > 512 {
		return nil, "", fmt.Errorf("render: a line of %d by %d pixels; use 32 to 8192 by 16 to 512", o.Width, o.Height)
	}
	r := rng.New(o.Seed, "line")
	words := wordsAt(text, r.IntN(len(text)+1))
	if len(words) == 0 {
		words = wordsAt(text, 0)
	}
	if len(words) == 0 {
		return nil, "", errors.New("render: the text has no words")
	}
	f, err := opentype.Parse(fonts[r.IntN(len(fonts))])
	if err != nil {
		return nil, "", fmt.Errorf("render: %w", err)
	}
	size := float64(o.Height) * (.5 + .15*r.Float64())
	face, err := opentype.NewFace(f, &opentype.FaceOptions{Size: size, DPI: 72, Hinting: font.HintingNone})
	if err != nil {
		return nil, "", fmt.Errorf("render: %w", err)
	}
	defer face.Close()
	margin := o.Height / 6
	d := font.Drawer{Face: face}
	room := fixed.I(o.Width - 2*margin)
	for _, w := range words {
		next := strings.TrimSpace(says + " " + w)
		if d.MeasureString(next) > room {
			if says != "" {
				break
			}
			continue // a word that is longer than the line
		}
		says = next
	}
	if says == "" {
		return nil, "", errors.New("render: no word fits the line")
	}
	paper, ink := uint8(255-r.IntN(40)), uint8(r.IntN(90))
	width := min(o.Width, d.MeasureString(says).Ceil()+2*margin)
	img = image.NewRGBA(image.Rect(0, 0, width, o.Height))
	draw.Draw(img, img.Bounds(), image.NewUniform(color.RGBA{paper, paper, paper, 255}), image.Point{}, draw.Src)
	m := face.Metrics()
	d.Dst, d.Src = img, image.NewUniform(color.RGBA{ink, ink, ink, 255})
	d.Dot = fixed.Point26_6{X: fixed.I(margin), Y: (fixed.I(o.Height) + m.Ascent - m.Descent) / 2}
	d.DrawString(says)
	if o.Scan {
		img = scanned(img, rng.New(o.Seed, "scan line"), .5)
	}
	return img, says, nil
}

// wordsAt are the whole words of a passage of a text that begins near a byte: enough for a line.
func wordsAt(text string, at int) []string {
	const passage = 2048
	if at > 0 {
		next := strings.IndexAny(text[at:], " \t\n")
		if next < 0 {
			return nil
		}
		at += next
	}
	end := min(len(text), at+passage)
	words := strings.Fields(text[at:end])
	if end < len(text) && len(words) > 1 {
		words = words[:len(words)-1]
	}
	return words
}

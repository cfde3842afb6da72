package render_test

import (
	"bytes"
	"strings"
	"testing"

	"github.com/lathe-ml/lathe/data/render"
)

var text = strings.Repeat("It is a truth universally acknowledged, that a single man in possession of a good fortune must be in want of a wife. ", 60)

func TestPageDependsOnItsSeedAlone(t *testing.T) {
	a, err := render.Page(text, render.PageOptions{Seed: 1})
	if err != nil {
		t.Fatal(err)
	}
	b, _ := render.Page(text, render.PageOptions{Seed: 1})
	c, _ := render.Page(text, render.PageOptions{Seed: 2})
	if !bytes.Equal(a.Pix, b.Pix) || bytes.Equal(a.Pix, c.Pix) {
		t.Error("pages of one seed differ, or of two seeds coincide")
	}
	dark := 0
	for i := 0; i < len(a.Pix); i += 4 {
		if a.Pix[i] < 128 {
			dark++
		}
	}
	if share := float64(dark) / float64(len(a.Pix)/4); share < .01 || share > .3 {
		t.Errorf("%.3f of the page is dark: there is no text on it, or nothing else", share)
	}
}

func TestFourQuarterTurnsAreNone(t *testing.T) {
	p, err := render.Page(text, render.PageOptions{Width: 100, Height: 140, Seed: 3})
	if err != nil {
		t.Fatal(err)
	}
	q := p
	for range 4 {
		q = render.Rotate(q, 1)
	}
	if !bytes.Equal(p.Pix, q.Pix) {
		t.Error("four quarter turns change the picture")
	}
	if !bytes.Equal(render.Rotate(render.Rotate(p, 1), 1).Pix, render.Rotate(p, 2).Pix) || !bytes.Equal(render.Rotate(p, -1).Pix, render.Rotate(p, 3).Pix) {
		t.Error("turns do not add up")
	}
	if one := render.Rotate(p, 1); one.RGBAAt(139-5, 7) != p.RGBAAt(7, 5) {
		t.Error("a quarter turn is not clockwise")
	}
}

func TestScanKeepsThePageReadable(t *testing.T) {
	plain, err := render.Page(text, render.PageOptions{Seed: 4})
	if err != nil {
		t.Fatal(err)
	}
	scan, err := render.Page(text, render.PageOptions{Seed: 4, Scan: true})
	if err != nil {
		t.Fatal(err)
	}
	if scan.Bounds() != plain.Bounds() || bytes.Equal(scan.Pix, plain.Pix) {
		t.Error("a scan has another size, or is the page itself")
	}
	lo, hi := uint8(255), uint8(0)
	for i := 0; i < len(scan.Pix); i += 4 {
		lo, hi = min(lo, scan.Pix[i]), max(hi, scan.Pix[i])
	}
	if hi-lo < 40 {
		t.Errorf("brightness from %d to %d: the text is gone", lo, hi)
	}
}

func TestPageRefusals(t *testing.T) {
	if _, err := render.Page("  ", render.PageOptions{}); err == nil {
		t.Error("an empty text was accepted")
	}
	if _, err := render.Page("word", render.PageOptions{Width: 1 << 20}); err == nil {
		t.Error("a huge page was accepted")
	}
}

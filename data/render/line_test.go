package render

import (
	"bytes"
	"strings"
	"testing"
)

func TestLineSaysWhatItShows(t *testing.T) {
	const text = "It is a truth universally acknowledged that a single man"
	for seed := range uint64(30) {
		for _, scan := range []bool{false, true} {
			img, says, err := Line(text, LineOptions{Seed: seed, Scan: scan})
			if err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(text, says) || says == "" {
				t.Errorf("seed %d says %q", seed, says)
			}
			b := img.Bounds()
			if b.Dx() > 320 || b.Dy() != 48 {
				t.Errorf("seed %d is %v", seed, b)
			}
			dark := 0
			for i := 0; i < len(img.Pix); i += 4 {
				if img.Pix[i] < 128 {
					dark++
				}
			}
			if !scan && dark < 20*len(strings.ReplaceAll(says, " ", "")) {
				t.Errorf("seed %d: %d dark pixels for %q", seed, dark, says)
			}
			again, _, _ := Line(text, LineOptions{Seed: seed, Scan: scan})
			if !bytes.Equal(img.Pix, again.Pix) {
				t.Errorf("seed %d is not the same twice", seed)
			}
		}
	}
}

func TestLineRefusals(t *testing.T) {
	for _, c := range []struct {
		text string
		o    LineOptions
		want string
	}{
		{" \n", LineOptions{}, "no words"},
		{strings.Repeat("w", 400), LineOptions{}, "no word fits"},
		{"a", LineOptions{Width: 10}, "32 to 8192"},
	} {
		if _, _, err := Line(c.text, c.o); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%+v: error %v", c.o, err)
		}
	}
}

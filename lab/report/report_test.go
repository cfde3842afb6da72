package report

import (
	"encoding/xml"
	"image"
	"image/color"
	"io"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"
)

// sample has every kind of section, with hostile text in every place that takes text.
func sample() *Document {
	const evil = `<script a="x">'&' </script>`
	img := image.NewRGBA(image.Rect(0, 0, 8, 8))
	for i := range 8 {
		img.Set(i, i, color.RGBA{200, uint8(30 * i), 40, 255})
	}
	nan := math.NaN()
	d := &Document{Title: "RepQ-ViT " + evil, Subtitle: "4 hold, 1 fails", Facts: []Fact{{"Command", "lathe try repq-vit"}, {evil, evil}}}
	d.Add(
		Claims{Items: []Claim{
			{ID: "C1", Text: "accuracy rises", Paper: evil, Verdict: Holds, Measured: 46.7, Low: 44, High: 49, Bound: "≥ 10", Margin: 36.7, Unit: "points", Seeds: []float64{45, 47, 48.1}},
			{ID: "C2", Text: evil, Verdict: Fails, Measured: 1.5, Low: 1.4, High: 1.6, Bound: "≤ 1.3", Margin: -0.2, Unit: "×"},
			{ID: "C3", Text: "not measured", Verdict: Undecided, Reason: "not measured at seed 1", Measured: nan, Low: nan, High: nan, Bound: "≥ 0", Margin: nan, Seeds: []float64{1, nan}},
			{ID: "C4", Text: "one seed", Verdict: Undecided, Measured: 0, Low: nan, High: nan, Bound: "≥ 0", Margin: 0},
		}},
		Heading{Title: evil, Lead: evil},
		Text{Title: evil, Paragraphs: []string{evil}},
		Table{Title: evil, Columns: []string{"arm", evil, "bytes"}, Rows: [][]string{{evil, "87.2 ± 0.3", "70.1 kB"}, {"float", "87.9"}}, Strong: []int{1}, Note: evil},
		Curve{Title: evil, XLabel: evil, YLabel: "loss", LogY: true, Lines: []Line{
			{Name: evil, X: []float64{1, 2, 3}, Y: []float64{2, 1, 0.5}, Low: []float64{1.9, .9, .4}, High: []float64{2.1, 1.1, .6}},
			{Name: "point", X: []float64{2}, Y: []float64{1}, Dashed: true},
			{Name: "empty"},
			{Name: "negative", X: []float64{1, 2}, Y: []float64{-1, 0}},
		}},
		Curve{Title: "nothing to draw", Lines: []Line{{Name: "a", X: []float64{nan}, Y: []float64{1}}}},
		Scatter{Title: "accuracy over size", XLabel: "bytes", YLabel: evil, LogX: true, Frontier: true, Points: []Mark{
			{Label: evil, Group: evil, X: 564e3, Y: 87.2}, {Label: "w4", Group: "b", X: 70e3, Y: 86.7, YLow: 86, YHigh: 87.1}, {Label: "w4 layerwise", X: 70e3, Y: 40},
		}},
		Scatter{Title: "empty"},
		Bars{Title: evil, Unit: "dB", Log: true, Items: []Bar{{Label: evil, Group: evil, Value: 1e-4, Low: 5e-5, High: 2e-4}, {Label: "b", Value: 3}, {Label: "zero", Value: 0}, {Label: "nan", Value: nan}}},
		Bars{Items: []Bar{{Label: "minus", Value: -2, Low: -3, High: -1}, {Label: "plus", Value: 3}}},
		Bars{},
		Images{Title: evil, Pixelated: true, Pictures: []Picture{{Caption: evil, Image: img}, {Caption: "nothing"}}},
		Images{},
	)
	return d
}

func render(t *testing.T, d *Document) string {
	t.Helper()
	var b strings.Builder
	if err := d.WriteHTML(&b); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestHTMLIsWellFormed(t *testing.T) {
	s := render(t, sample())
	s = strings.TrimPrefix(s, "<!DOCTYPE html>\n")
	s = regexp.MustCompile(`<(meta|img)([^>]*)>`).ReplaceAllString(s, "<$1$2/>") // void elements, for the XML parser
	d := xml.NewDecoder(strings.NewReader(s))
	for {
		_, err := d.Token()
		if err == io.EOF {
			break
		}
		if err != nil {
			line, _ := d.InputPos()
			t.Fatalf("line %d: %v: %s", line, err, strings.Split(s, "\n")[line-1])
		}
	}
	if strings.Contains(s, "NaN") || strings.Contains(s, "Inf") {
		t.Error("a number that is not finite stands in the page")
	}
}

func TestHTMLIsSelfContained(t *testing.T) {
	s := render(t, sample())
	for _, bad := range []string{"<script", "<link", "<iframe", "src=\"http", "href=\"http", "@import", "url(", "onload"} {
		if strings.Contains(s, bad) {
			t.Errorf("the page contains %q", bad)
		}
	}
	for _, want := range []string{"width=device-width", "prefers-color-scheme: dark", "@media print", "data:image/png;base64,"} {
		if !strings.Contains(s, want) {
			t.Errorf("the page lacks %q", want)
		}
	}
}

func TestHTMLIsTheSameEveryTime(t *testing.T) {
	first, second := render(t, sample()), render(t, sample())
	if first != second {
		t.Error("two renderings differ")
	}
}

func TestTextFitsTheTerminal(t *testing.T) {
	d := sample()
	for _, width := range []int{72, 100, 160} {
		var b strings.Builder
		if err := d.WriteText(&b, width); err != nil {
			t.Fatal(err)
		}
		for _, line := range strings.Split(b.String(), "\n") {
			if n := utf8.RuneCountInString(line); n > width {
				t.Errorf("width %d: a line has %d columns: %q", width, n, line)
			}
			if strings.ContainsRune(line, '\x1b') {
				t.Fatalf("escape sequences in plain output: %q", line)
			}
		}
		for _, want := range []string{"HOLDS", "FAILS", "UNDECIDED", "46.7", "86.7", "70.1 kB", "not measured at seed 1"} {
			if !strings.Contains(b.String(), want) {
				t.Errorf("width %d: the text lacks %q", width, want)
			}
		}
	}
}

func TestNumber(t *testing.T) {
	for v, want := range map[float64]string{
		0: "0", 1: "1", -3: "−3", 87.234: "87.23", 0.12083: "0.1208", 1.2e-5: "1.2e-05", 123456: "123456", 1234.5: "1234", 2.5e8: "2.5e+08", -0.5: "−0.5",
		math.Inf(1): "∞", 12345678: "1.23e+07",
	} {
		if got := Number(v); got != want {
			t.Errorf("Number(%v) = %q, want %q", v, got, want)
		}
	}
	if Number(math.NaN()) != "–" {
		t.Errorf("NaN is %q", Number(math.NaN()))
	}
	for n, want := range map[int64]string{12: "12 B", 17_300: "17.3 kB", 1_234_567: "1.23 MB", 5e9: "5.00 GB"} {
		if got := Bytes(n); got != want {
			t.Errorf("Bytes(%d) = %q, want %q", n, got, want)
		}
	}
}

func TestAxes(t *testing.T) {
	for _, c := range []struct {
		values []float64
		log    bool
	}{{[]float64{0, 1}, false}, {[]float64{-5, 1e6}, false}, {[]float64{3, 3, 3}, false}, {[]float64{0}, false}, {[]float64{1e-9, 1e9}, true}, {[]float64{70e3, 564e3}, true}, {[]float64{5, 5.1}, true}, {[]float64{1e-300, 2e-300}, false}, {[]float64{-1, 0, 7}, true}} {
		a, ok := newAxis(c.values, c.log, 50, 350, 6)
		if !ok {
			t.Errorf("%v: no axis", c.values)
			continue
		}
		if len(a.ticks) < 2 || len(a.ticks) > 12 {
			t.Errorf("%v (log %v): ticks %v", c.values, c.log, a.ticks)
		}
		for _, v := range append(a.ticks, c.values...) {
			if p, ok := a.at(v); ok && (p < 50 || p > 350) {
				t.Errorf("%v: %v lies at %v, outside the axis", c.values, v, p)
			}
		}
	}
	if _, ok := newAxis([]float64{math.NaN(), -1}, true, 0, 1, 5); ok {
		t.Error("an axis of nothing")
	}
}

func TestFrontierJoinsWhatNothingBeats(t *testing.T) {
	marks := []Mark{{Label: "big", X: 10, Y: 9}, {Label: "beaten", X: 5, Y: 3}, {Label: "small", X: 1, Y: 4}, {Label: "mid", X: 5, Y: 7}, {Label: "worse big", X: 20, Y: 9}}
	var got []string
	for _, m := range frontier(marks) {
		got = append(got, m.Label)
	}
	if strings.Join(got, " ") != "small mid big" {
		t.Errorf("frontier %v", got)
	}
}

func TestNumericColumns(t *testing.T) {
	for cell, want := range map[string]bool{
		"87.2": true, "−0.5 ± 0.1": true, "1.2 (0.8 … 1.6)": true, "≥ 0.5 dB": true, "17.3 kB": true, "12 %": true, "+36.7": true, "1.2e-05": true,
		"1,797 grey digits 8×8": false, "w4a4": false, "2026-11-24 19:53": false, "4 hold, 1 fails": false,
	} {
		if got := numericColumns([]string{"x"}, [][]string{{cell}, {""}})[0]; got != want {
			t.Errorf("%q: numeric %v, want %v", cell, got, want)
		}
	}
}

func TestMarkdown(t *testing.T) {
	got := Markdown(io.Discard, "# Title\n\nSome **bold** text with a [link](https://x.y) and `code`\nthat goes on.\n\n- first item that is long enough to break\n- second\n\n```\nlathe try x\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n", 40)
	want := "Title\n\nSome bold text with a link (https://x.y)\nand `code` that goes on.\n\n- first item that is long enough to\n  break\n- second\n\n    lathe try x\n\na  b\n────\n1  2\n"
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestSave(t *testing.T) {
	path := filepath.Join(t.TempDir(), "report.html")
	if err := sample().Save(path); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(path); err != nil || !strings.HasSuffix(string(b), "</html>\n") {
		t.Errorf("%v", err)
	}
	if err := sample().Save(filepath.Join(t.TempDir(), "no", "report.html")); err == nil {
		t.Error("saved into a folder that does not exist")
	}
}

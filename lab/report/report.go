// Package report turns results into one self-contained HTML file (inline style, inline SVG, pictures as data URIs, no
// script, nothing fetched) that reads well on a phone, in the dark and in print, and prints the same as tables on a
// terminal.
package report

import (
	"bytes"
	"fmt"
	"image"
	"image/png"
	"io"
	"math"

	"github.com/lathe-ml/lathe/internal/atomicfile"
)

// Document is a report: a title, facts about how it came to be, and sections in order.
type Document struct {
	Title    string
	Subtitle string // one or two sentences under the title: the result in words
	Facts    []Fact // command, seeds, machine; printed at the end
	Sections []Section
}

// Fact is a named piece of text.
type Fact struct{ Name, Value string }

// Section is one part of a document: Heading, Text, Table, Curve, Scatter, Bars, Images or Claims.
type Section interface {
	html(h *htmlWriter)
	text(t *textWriter)
}

var _ = []Section{Heading{}, Text{}, Table{}, Curve{}, Scatter{}, Bars{}, Images{}, Claims{}}

// Add appends sections.
func (d *Document) Add(s ...Section) { d.Sections = append(d.Sections, s...) }

// Heading begins a part of a document that holds several results.
type Heading struct {
	Title, Lead string
}

// Text is a paragraph or several.
type Text struct {
	Title      string
	Paragraphs []string
}

// Table is a table of short cells. A column whose cells are all numbers is set to the right.
type Table struct {
	Title   string
	Note    string // under the table
	Columns []string
	Rows    [][]string // each as long as Columns; missing cells are empty
	Strong  []int      // indices of rows to emphasise
}

// Curve draws lines over a common x axis.
type Curve struct {
	Title, Note    string
	XLabel, YLabel string
	LogX, LogY     bool // needs positive values; points that are not are left out
	Lines          []Line
}

// Line is one line of a Curve. Low and High, when given, are the edges of a band around Y.
type Line struct {
	Name      string
	X, Y      []float64
	Low, High []float64
	Dashed    bool // a baseline
}

// Scatter places named points, such as accuracy over size.
type Scatter struct {
	Title, Note    string
	XLabel, YLabel string
	LogX           bool
	Frontier       bool // join the points that no other beats: higher y at smaller x
	Points         []Mark
}

// Mark is one point of a Scatter; YLow and YHigh, when they differ, are its error bar. Marks of one group share a colour.
type Mark struct {
	Label, Group string
	X, Y         float64
	YLow, YHigh  float64
}

// Bars compares labelled values, such as the error of each site, as horizontal bars.
type Bars struct {
	Title, Note string
	Unit        string
	Log         bool // lengths on a logarithmic scale; needs positive values
	Items       []Bar
}

// Bar is one value of Bars; Low and High, when they differ, are its error bar. Bars of one group share a colour.
type Bar struct {
	Label, Group string
	Value        float64
	Low, High    float64
}

// Images shows pictures side by side, before and after.
type Images struct {
	Title, Note string
	Pictures    []Picture
	Pixelated   bool // small pictures are enlarged without smoothing
}

// Picture is a captioned picture, given as Image or as encoded PNG.
type Picture struct {
	Caption string
	Image   image.Image
	PNG     []byte
}

// Claims lists claims with their verdicts.
type Claims struct {
	Title, Note string
	Items       []Claim
}

// Verdicts of a claim.
const (
	Holds     = "holds"
	Fails     = "fails"
	Undecided = "undecided"
)

// Claim is one claim as measured.
type Claim struct {
	ID, Text, Paper string
	Verdict         string  // Holds, Fails or Undecided
	Reason          string  // why it is undecided, in words; empty otherwise
	Measured        float64 // mean over the seeds; NaN when not measured
	Low, High       float64 // 95 % interval; NaN when there are too few seeds
	Bound           string  // "≥ 1"
	Margin          float64 // of the mean, on the satisfying side
	Unit            string
	Seeds           []float64 // the value at each seed
}

// WriteHTML writes the whole document as one HTML file.
func (d *Document) WriteHTML(w io.Writer) error {
	h := &htmlWriter{}
	h.document(d)
	if h.err != nil {
		return h.err
	}
	_, err := w.Write(h.buf.Bytes())
	return err
}

// WriteText prints the document for a terminal that is width columns wide (0: 100).
func (d *Document) WriteText(w io.Writer, width int) error {
	t := newTextWriter(w, width)
	t.document(d)
	_, err := w.Write(t.buf.Bytes())
	return err
}

// Save writes the document as HTML, atomically.
func (d *Document) Save(path string) error {
	if err := atomicfile.Write(path, d.WriteHTML); err != nil {
		return fmt.Errorf("write report: %w", err)
	}
	return nil
}

func (p Picture) encode() ([]byte, error) {
	if p.PNG != nil || p.Image == nil {
		return p.PNG, nil
	}
	var b bytes.Buffer
	err := png.Encode(&b, p.Image)
	return b.Bytes(), err
}

// Number prints a value with four significant digits, without an exponent where that is short: "87.2", "0.1208",
// "1.2e-05"; "–" for NaN.
func Number(v float64) string {
	switch a := math.Abs(v); {
	case math.IsNaN(v):
		return "–"
	case math.IsInf(v, 1):
		return "∞"
	case math.IsInf(v, -1):
		return "−∞"
	case v == math.Trunc(v) && a < 1e7:
		return minus(fmt.Sprintf("%.0f", v))
	case a >= 1e5 || a < 1e-3:
		return minus(fmt.Sprintf("%.3g", v))
	case a >= 1000:
		return minus(fmt.Sprintf("%.0f", v))
	}
	return minus(fmt.Sprintf("%.4g", v))
}

// brief prints an edge of an interval with three significant digits.
func brief(v float64) string {
	if v == 0 || math.IsNaN(v) || math.IsInf(v, 0) || math.Abs(v) >= 1000 {
		return Number(v)
	}
	scale := math.Pow(10, 2-math.Floor(math.Log10(math.Abs(v))))
	return Number(math.Round(v*scale) / scale)
}

// Bytes prints a size: "17.3 kB", "1.2 MB" (decimal).
func Bytes(n int64) string {
	switch {
	case n < 1000:
		return fmt.Sprintf("%d B", n)
	case n < 1_000_000:
		return fmt.Sprintf("%.1f kB", float64(n)/1e3)
	case n < 1_000_000_000:
		return fmt.Sprintf("%.2f MB", float64(n)/1e6)
	}
	return fmt.Sprintf("%.2f GB", float64(n)/1e9)
}

func minus(s string) string {
	if len(s) > 0 && s[0] == '-' {
		return "−" + s[1:]
	}
	return s
}

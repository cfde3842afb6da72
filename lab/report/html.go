package report

import (
	"bytes"
	_ "embed"
	"encoding/base64"
	"fmt"
	"html"
	"math"
	"slices"
	"strings"
)

//go:embed style.css
var styleSheet string

// htmlWriter collects the file; err is the first thing that went wrong.
type htmlWriter struct {
	buf bytes.Buffer
	err error
}

func (h *htmlWriter) printf(format string, args ...any) { fmt.Fprintf(&h.buf, format, args...) }

// esc makes text safe between tags and in quoted attributes.
func esc(s string) string { return html.EscapeString(s) }

func (h *htmlWriter) document(d *Document) {
	h.printf("<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<meta name=\"color-scheme\" content=\"light dark\">\n<title>%s</title>\n<style>\n%s</style>\n</head>\n<body>\n<main>\n", esc(d.Title), styleSheet)
	h.printf("<header>\n<h1>%s</h1>\n", esc(d.Title))
	if d.Subtitle != "" {
		h.printf("<p class=\"lead\">%s</p>\n", esc(d.Subtitle))
	}
	h.printf("</header>\n")
	// Neighbouring charts stand side by side where there is room.
	inGrid := false
	for _, s := range d.Sections {
		if chart := isChart(s); chart != inGrid {
			inGrid = chart
			if chart {
				h.printf("<div class=\"grid\">\n")
			} else {
				h.printf("</div>\n")
			}
		}
		s.html(h)
	}
	if inGrid {
		h.printf("</div>\n")
	}
	if len(d.Facts) > 0 {
		h.printf("<section class=\"facts\">\n<h2>How this was measured</h2>\n<dl>\n")
		for _, f := range d.Facts {
			h.printf("<div><dt>%s</dt><dd>%s</dd></div>\n", esc(f.Name), esc(f.Value))
		}
		h.printf("</dl>\n</section>\n")
	}
	h.printf("</main>\n</body>\n</html>\n")
}

func isChart(s Section) bool {
	switch s.(type) {
	case Curve, Scatter:
		return true
	}
	return false
}

func (h *htmlWriter) title(s string) {
	if s != "" {
		h.printf("<h2>%s</h2>\n", esc(s))
	}
}

func (h *htmlWriter) note(s string) {
	if s != "" {
		h.printf("<p class=\"note\">%s</p>\n", esc(s))
	}
}

func (s Heading) html(h *htmlWriter) {
	h.printf("<section class=\"part\">\n<h1>%s</h1>\n", esc(s.Title))
	if s.Lead != "" {
		h.printf("<p class=\"lead\">%s</p>\n", esc(s.Lead))
	}
	h.printf("</section>\n")
}

func (s Text) html(h *htmlWriter) {
	h.printf("<section>\n")
	h.title(s.Title)
	for _, p := range s.Paragraphs {
		h.printf("<p>%s</p>\n", esc(p))
	}
	h.printf("</section>\n")
}

func (s Table) html(h *htmlWriter) {
	rows := padRows(s.Columns, s.Rows)
	right := numericColumns(s.Columns, rows)
	class := func(c int) string {
		if right[c] {
			return ` class="n"`
		}
		return ""
	}
	h.printf("<section>\n")
	h.title(s.Title)
	h.printf("<div class=\"scroll\"><table>\n<thead><tr>")
	for c, name := range s.Columns {
		h.printf("<th scope=\"col\"%s>%s</th>", class(c), strings.ReplaceAll(esc(name), "_", "_<wbr/>"))
	}
	h.printf("</tr></thead>\n<tbody>\n")
	for i, r := range rows {
		if slices.Contains(s.Strong, i) {
			h.printf("<tr class=\"strong\">")
		} else {
			h.printf("<tr>")
		}
		for c, v := range r {
			h.printf("<td%s>%s</td>", class(c), esc(v))
		}
		h.printf("</tr>\n")
	}
	h.printf("</tbody>\n</table></div>\n")
	h.note(s.Note)
	h.printf("</section>\n")
}

// span is the range that the bars' lengths stand for: from 0, or from a decade below the smallest on a logarithmic scale.
func (s Bars) span() (lo, hi float64) {
	hi = math.Inf(-1)
	lo = math.Inf(1)
	for _, b := range s.Items {
		for _, v := range []float64{b.Value, b.Low, b.High} {
			if math.IsNaN(v) || math.IsInf(v, 0) || s.Log && v <= 0 {
				continue
			}
			lo, hi = math.Min(lo, v), math.Max(hi, v)
		}
	}
	if math.IsInf(hi, -1) {
		return 0, 1
	}
	if s.Log {
		return math.Log10(lo) - 0.3, math.Max(math.Log10(hi), math.Log10(lo)+0.1)
	}
	lo, hi = math.Min(lo, 0), math.Max(hi, 0)
	if lo == hi {
		hi = lo + 1
	}
	return lo, hi
}

// fraction is where v lies in the span, from 0 to 1.
func (s Bars) fraction(v, lo, hi float64) float64 {
	if s.Log {
		if !(v > 0) {
			return 0
		}
		v = math.Log10(v)
	}
	if math.IsNaN(v) {
		return 0
	}
	return math.Min(1, math.Max(0, (v-lo)/(hi-lo)))
}

func (s Bars) html(h *htmlWriter) {
	lo, hi := s.span()
	groups := groupNames(len(s.Items), func(i int) string { return s.Items[i].Group })
	h.printf("<section>\n")
	h.title(s.Title)
	legend(h, groups, nil)
	h.printf("<div class=\"bars\" role=\"table\">\n")
	zero := s.fraction(0, lo, hi)
	if s.Log {
		zero = 0
	}
	for _, b := range s.Items {
		v := s.fraction(b.Value, lo, hi)
		left, right := math.Min(zero, v), math.Max(zero, v)
		value := Number(b.Value)
		if s.Unit != "" {
			value += " " + s.Unit
		}
		h.printf("<div class=\"bar\" role=\"row\"><span class=\"label\" role=\"rowheader\">%s</span><span class=\"track\" aria-hidden=\"true\"><span class=\"fill s%d\" style=\"left:%.2f%%;width:%.2f%%\"></span>",
			esc(b.Label), seriesIndex(groups, b.Group), 100*left, 100*(right-left))
		if hasInterval(b.Low, b.High) {
			l, r := s.fraction(b.Low, lo, hi), s.fraction(b.High, lo, hi)
			h.printf("<span class=\"err\" style=\"left:%.2f%%;width:%.2f%%\"></span>", 100*l, 100*(r-l))
			value = fmt.Sprintf("%s <small>%s … %s</small>", esc(value), esc(brief(b.Low)), esc(brief(b.High)))
		} else {
			value = esc(value)
		}
		h.printf("</span><span class=\"value\" role=\"cell\">%s</span></div>\n", value)
	}
	h.printf("</div>\n")
	if s.Log {
		h.note(strings.TrimSpace("Lengths are on a logarithmic scale. " + s.Note))
	} else {
		h.note(s.Note)
	}
	h.printf("</section>\n")
}

func (s Images) html(h *htmlWriter) {
	if len(s.Pictures) == 0 {
		return
	}
	class := "pictures"
	if s.Pixelated {
		class += " pixelated"
	}
	h.printf("<section>\n")
	h.title(s.Title)
	h.printf("<div class=\"%s\">\n", class)
	for _, p := range s.Pictures {
		b, err := p.encode()
		if err != nil {
			if h.err == nil {
				h.err = fmt.Errorf("report: picture %q: %w", p.Caption, err)
			}
			continue
		}
		if b == nil {
			continue
		}
		h.printf("<figure><img alt=\"%s\" src=\"data:image/png;base64,%s\"><figcaption>%s</figcaption></figure>\n", esc(p.Caption), base64.StdEncoding.EncodeToString(b), esc(p.Caption))
	}
	h.printf("</div>\n")
	h.note(s.Note)
	h.printf("</section>\n")
}

func (s Claims) html(h *htmlWriter) {
	if len(s.Items) == 0 {
		return
	}
	title := s.Title
	if title == "" {
		title = "Claims"
	}
	h.printf("<section>\n")
	h.title(title)
	h.printf("<div class=\"claims\">\n")
	for _, c := range s.Items {
		unit := ""
		if c.Unit != "" {
			unit = " " + c.Unit
		}
		h.printf("<article class=\"claim %s\">\n<p class=\"head\"><span class=\"verdict\">%s</span><span class=\"id\">%s</span></p>\n<p>%s</p>\n", esc(c.Verdict), esc(strings.ToUpper(c.Verdict)), esc(c.ID), esc(c.Text))
		intervalPlot(h, c)
		measured := "not measured"
		if !math.IsNaN(c.Measured) {
			measured = Number(c.Measured) + unit
			if hasInterval(c.Low, c.High) {
				measured += fmt.Sprintf(" (95 %%: %s … %s)", brief(c.Low), brief(c.High))
			}
		}
		h.printf("<dl>\n<div><dt>Measured</dt><dd>%s</dd></div>\n<div><dt>Bound</dt><dd>%s</dd></div>\n", esc(measured), esc(c.Bound+unit))
		if !math.IsNaN(c.Margin) {
			h.printf("<div><dt>Margin</dt><dd>%s</dd></div>\n", esc(signed(c.Margin)+unit))
		}
		if c.Paper != "" {
			h.printf("<div><dt>Paper</dt><dd>%s</dd></div>\n", esc(c.Paper))
		}
		if len(c.Seeds) > 1 {
			v := make([]string, len(c.Seeds))
			for i, x := range c.Seeds {
				v[i] = Number(x)
			}
			h.printf("<div><dt>Per seed</dt><dd>%s</dd></div>\n", esc(strings.Join(v, ", ")))
		}
		h.printf("</dl>\n")
		h.note(c.Reason)
		h.printf("</article>\n")
	}
	h.printf("</div>\n")
	h.note(s.Note)
	h.printf("</section>\n")
}

// groupNames lists the groups in order of appearance.
func groupNames(n int, group func(i int) string) (names []string) {
	for i := range n {
		if g := group(i); !slices.Contains(names, g) {
			names = append(names, g)
		}
	}
	return names
}

// palette is how many series colours the style sheet has.
const palette = 8

func seriesIndex(groups []string, g string) int { return max(slices.Index(groups, g), 0) % palette }

// legend names the series, when there is more than one.
func legend(h *htmlWriter, names []string, dashed func(i int) bool) {
	if len(names) < 2 {
		return
	}
	h.printf("<ul class=\"legend\">")
	for i, n := range names {
		class := fmt.Sprintf("s%d", i%palette)
		if dashed != nil && dashed(i) {
			class += " dashed"
		}
		h.printf("<li><span class=\"key %s\"></span>%s</li>", class, esc(n))
	}
	h.printf("</ul>\n")
}

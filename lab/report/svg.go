package report

import (
	"fmt"
	"math"
	"slices"
	"strings"
)

// Charts are drawn into a view box narrow enough that their text stays legible on a phone.
const (
	chartWidth  = 400.0
	chartHeight = 260.0
	padLeft     = 52.0
	padRight    = 14.0
	padTop      = 10.0
	padBottom   = 40.0
	textHeight  = 11.0
	charWidth   = 5.9 // of the chart font, on average
)

// axis maps values to positions.
type axis struct {
	lo, hi float64 // of the value, or of its logarithm
	log    bool
	from   float64 // position of lo
	to     float64 // position of hi
	ticks  []float64
}

// newAxis spans the values, with room at both ends, and chooses round ticks.
func newAxis(values []float64, log bool, from, to float64, want int) (axis, bool) {
	a := axis{lo: math.Inf(1), hi: math.Inf(-1), log: log, from: from, to: to}
	for _, v := range values {
		if log {
			v = math.Log10(v) // NaN or -Inf for what has no logarithm
		}
		if math.IsNaN(v) || math.IsInf(v, 0) {
			continue
		}
		a.lo, a.hi = math.Min(a.lo, v), math.Max(a.hi, v)
	}
	if a.lo > a.hi {
		return a, false
	}
	if a.hi-a.lo < 1e-12*math.Max(math.Abs(a.lo), 1e-300) || a.hi == a.lo {
		d := math.Max(math.Abs(a.lo)*0.1, 1e-9)
		if log {
			d = 0.3
		}
		a.lo, a.hi = a.lo-d, a.hi+d
	}
	room := 0.04 * (a.hi - a.lo)
	a.lo, a.hi = a.lo-room, a.hi+room
	if log {
		a.ticks = logTicks(a.lo, a.hi, want)
	} else {
		a.ticks = linearTicks(a.lo, a.hi, want)
	}
	return a, true
}

// at is the position of a value; ok is false when it has none on this axis.
func (a axis) at(v float64) (pos float64, ok bool) {
	if a.log {
		if !(v > 0) {
			return 0, false
		}
		v = math.Log10(v)
	}
	if math.IsNaN(v) || math.IsInf(v, 0) {
		return 0, false
	}
	return a.from + (v-a.lo)/(a.hi-a.lo)*(a.to-a.from), true
}

// linearTicks returns multiples of 1, 2 or 5 times a power of ten in [lo, hi].
func linearTicks(lo, hi float64, want int) (ticks []float64) {
	step := math.Pow(10, math.Floor(math.Log10((hi-lo)/float64(want))))
	for _, m := range []float64{1, 2, 5, 10} {
		if (hi-lo)/(step*m) <= float64(want) {
			step *= m
			break
		}
	}
	for i := math.Ceil(lo / step); i*step <= hi; i++ {
		ticks = append(ticks, i*step)
		if len(ticks) > 50 {
			break
		}
	}
	return ticks
}

// logTicks returns powers of ten, or 1-2-5 steps when the range is short; lo and hi are logarithms.
func logTicks(lo, hi float64, want int) (ticks []float64) {
	mults := []float64{1}
	if hi-lo < 2 {
		mults = []float64{1, 2, 5}
	}
	if hi-lo < 0.5 {
		return linearTicks(math.Pow(10, lo), math.Pow(10, hi), want)
	}
	every := math.Max(1, math.Ceil((hi-lo)/float64(want)))
	for e := math.Floor(lo); e <= hi; e++ {
		if math.Mod(e, every) != 0 {
			continue
		}
		for _, m := range mults {
			if v := e + math.Log10(m); v >= lo && v <= hi {
				ticks = append(ticks, m*math.Pow(10, e))
			}
		}
	}
	return ticks
}

// tickLabel prints a tick briefly: 20000 as "20k".
func tickLabel(v float64) string {
	a := math.Abs(v)
	switch {
	case a < 1e-12:
		return "0"
	case a >= 1e9:
		return minus(fmt.Sprintf("%.3gG", v/1e9))
	case a >= 1e6:
		return minus(fmt.Sprintf("%.3gM", v/1e6))
	case a >= 1e4:
		return minus(fmt.Sprintf("%.3gk", v/1e3))
	case a < 1e-3:
		return minus(fmt.Sprintf("%.1e", v))
	}
	return minus(fmt.Sprintf("%.4g", v))
}

// frame opens the drawing with grid lines, ticks and axis names.
func frame(h *htmlWriter, title string, x, y axis, xLabel, yLabel string) {
	h.printf("<svg viewBox=\"0 0 %g %g\" role=\"img\" aria-label=\"%s\">\n", chartWidth, chartHeight, esc(title))
	for _, v := range y.ticks {
		p, _ := y.at(v)
		h.printf("<line class=\"gridline\" x1=\"%g\" x2=\"%g\" y1=\"%.1f\" y2=\"%.1f\"/><text class=\"tick\" x=\"%g\" y=\"%.1f\" text-anchor=\"end\">%s</text>\n", padLeft, chartWidth-padRight, p, p, padLeft-6, p+4, esc(tickLabel(v)))
	}
	lastEnd := math.Inf(-1)
	for _, v := range x.ticks {
		p, _ := x.at(v)
		label := tickLabel(v)
		half := charWidth * float64(len([]rune(label))) / 2
		if p-half < lastEnd+6 {
			continue
		}
		lastEnd = p + half
		h.printf("<line class=\"axis\" x1=\"%.1f\" x2=\"%.1f\" y1=\"%g\" y2=\"%g\"/><text class=\"tick\" x=\"%.1f\" y=\"%g\" text-anchor=\"middle\">%s</text>\n", p, p, chartHeight-padBottom, chartHeight-padBottom+4, p, chartHeight-padBottom+16, esc(label))
	}
	h.printf("<line class=\"axis\" x1=\"%g\" x2=\"%g\" y1=\"%g\" y2=\"%g\"/>\n", padLeft, chartWidth-padRight, chartHeight-padBottom, chartHeight-padBottom)
	if xLabel != "" {
		h.printf("<text class=\"name\" x=\"%g\" y=\"%g\" text-anchor=\"middle\">%s</text>\n", (padLeft+chartWidth-padRight)/2, chartHeight-6, esc(xLabel))
	}
	if yLabel != "" {
		mid := (padTop + chartHeight - padBottom) / 2
		h.printf("<text class=\"name\" x=\"11\" y=\"%g\" text-anchor=\"middle\" transform=\"rotate(-90 11 %g)\">%s</text>\n", mid, mid, esc(yLabel))
	}
}

func (s Curve) html(h *htmlWriter) {
	var xs, ys []float64
	for _, l := range s.Lines {
		n := min(len(l.X), len(l.Y))
		xs = append(xs, l.X[:n]...)
		ys = append(ys, l.Y[:n]...)
		if len(l.Low) == n && len(l.High) == n {
			ys = append(append(ys, l.Low...), l.High...)
		}
	}
	x, okX := newAxis(xs, s.LogX, padLeft, chartWidth-padRight, 6)
	y, okY := newAxis(ys, s.LogY, chartHeight-padBottom, padTop, 5)
	if !okX || !okY {
		return
	}
	h.printf("<section class=\"chart\">\n")
	h.title(s.Title)
	names := make([]string, len(s.Lines))
	for i, l := range s.Lines {
		names[i] = l.Name
	}
	legend(h, names, func(i int) bool { return dashed(s.Lines, i) })
	frame(h, s.Title, x, y, s.XLabel, s.YLabel)
	for i, l := range s.Lines {
		n := min(len(l.X), len(l.Y))
		if len(l.Low) == n && len(l.High) == n && n > 1 {
			upper, lower := path(x, y, l.X[:n], l.High, 400), path(x, y, l.X[:n], l.Low, 400)
			slices.Reverse(lower)
			h.printf("<path class=\"band s%d\" d=\"M%sZ\"/>\n", i%palette, strings.Join(append(upper, lower...), "L"))
		}
	}
	for i, l := range s.Lines {
		n := min(len(l.X), len(l.Y))
		points := path(x, y, l.X[:n], l.Y[:n], 400)
		class := fmt.Sprintf("line s%d", i%palette)
		if dashed(s.Lines, i) {
			class += " dashed"
		}
		switch len(points) {
		case 0:
		case 1:
			cx, cy, _ := strings.Cut(points[0], " ")
			h.printf("<circle class=\"mark s%d\" cx=\"%s\" cy=\"%s\" r=\"3.5\"><title>%s: %s</title></circle>\n", i%palette, cx, cy, esc(l.Name), esc(Number(l.Y[0])))
		default:
			h.printf("<path class=\"%s\" d=\"M%s\"><title>%s: %s at %s</title></path>\n", class, strings.Join(points, "L"), esc(l.Name), esc(Number(l.Y[n-1])), esc(Number(l.X[n-1])))
		}
	}
	h.printf("</svg>\n")
	h.note(s.Note)
	h.printf("</section>\n")
}

// dashed lines are baselines, and those for which the colours begin again.
func dashed(lines []Line, i int) bool { return lines[i].Dashed || i >= palette }

// path returns the points of a line as "x y", thinned to at most limit by averaging neighbours.
func path(x, y axis, xs, ys []float64, limit int) (points []string) {
	n := len(xs)
	bins := min(n, limit)
	for b := range bins {
		from, to := b*n/bins, (b+1)*n/bins
		var sx, sy, count float64
		for i := from; i < to; i++ {
			px, okX := x.at(xs[i])
			py, okY := y.at(ys[i])
			if okX && okY {
				sx, sy, count = sx+px, sy+py, count+1
			}
		}
		if count > 0 {
			points = append(points, fmt.Sprintf("%.1f %.1f", sx/count, sy/count))
		}
	}
	return points
}

func (s Scatter) html(h *htmlWriter) {
	var xs, ys []float64
	for _, p := range s.Points {
		xs, ys = append(xs, p.X), append(ys, p.Y)
		if hasInterval(p.YLow, p.YHigh) {
			ys = append(ys, p.YLow, p.YHigh)
		}
	}
	x, okX := newAxis(xs, s.LogX, padLeft, chartWidth-padRight, 6)
	y, okY := newAxis(ys, false, chartHeight-padBottom, padTop, 5)
	if !okX || !okY {
		return
	}
	groups := groupNames(len(s.Points), func(i int) string { return s.Points[i].Group })
	h.printf("<section class=\"chart\">\n")
	h.title(s.Title)
	legend(h, groups, nil)
	frame(h, s.Title, x, y, s.XLabel, s.YLabel)
	if s.Frontier {
		if f := frontier(s.Points); len(f) > 1 {
			var d []string
			for _, p := range f {
				px, _ := x.at(p.X)
				py, _ := y.at(p.Y)
				d = append(d, fmt.Sprintf("%.1f %.1f", px, py))
			}
			h.printf("<path class=\"frontier\" d=\"M%s\"/>\n", strings.Join(d, "L"))
		}
	}
	var taken []box
	for _, p := range s.Points {
		px, okX := x.at(p.X)
		py, okY := y.at(p.Y)
		if okX && okY {
			taken = append(taken, box{px - 5, py - 5, px + 5, py + 5})
		}
	}
	for _, p := range s.Points {
		px, okX := x.at(p.X)
		py, okY := y.at(p.Y)
		if !okX || !okY {
			continue
		}
		c := seriesIndex(groups, p.Group)
		if hasInterval(p.YLow, p.YHigh) {
			a, _ := y.at(p.YLow)
			b, _ := y.at(p.YHigh)
			h.printf("<line class=\"whisker s%d\" x1=\"%.1f\" x2=\"%.1f\" y1=\"%.1f\" y2=\"%.1f\"/>\n", c, px, px, a, b)
		}
		h.printf("<circle class=\"mark s%d\" cx=\"%.1f\" cy=\"%.1f\" r=\"4.5\"><title>%s: %s, %s</title></circle>\n", c, px, py, esc(p.Label), esc(Number(p.X)), esc(withInterval(p.Y, p.YLow, p.YHigh)))
		if lx, ly, anchor, ok := place(&taken, px, py, p.Label); ok {
			h.printf("<text class=\"pointlabel\" x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\">%s</text>\n", lx, ly, anchor, esc(p.Label))
		}
	}
	h.printf("</svg>\n")
	note := s.Note
	if s.Frontier {
		note = strings.TrimSpace(note + " The line joins the points that no other beats.")
	}
	h.note(note)
	h.printf("</section>\n")
}

// frontier lists the marks that no other beats in both (a higher y at an x that is not larger), by x.
func frontier(marks []Mark) (front []Mark) {
	sorted := slices.Clone(marks)
	slices.SortStableFunc(sorted, func(a, b Mark) int {
		if a.X != b.X {
			if a.X < b.X {
				return -1
			}
			return 1
		}
		return int(math.Copysign(1, b.Y-a.Y))
	})
	best := math.Inf(-1)
	for _, m := range sorted {
		if m.Y > best {
			best = m.Y
			front = append(front, m)
		}
	}
	return front
}

type box struct{ x0, y0, x1, y1 float64 }

func (b box) overlaps(c box) bool { return b.x0 < c.x1 && c.x0 < b.x1 && b.y0 < c.y1 && c.y0 < b.y1 }

// place finds room for a label beside a point: right, left, above, below. Without room the label is left out; the point
// has it as its tooltip, and the tables name it.
func place(taken *[]box, x, y float64, label string) (lx, ly float64, anchor string, ok bool) {
	w := charWidth * float64(len([]rune(label)))
	for _, c := range []struct {
		x, y   float64
		anchor string
		b      box
	}{
		{x + 8, y + 4, "start", box{x + 7, y - 6, x + 8 + w, y + 6}},
		{x - 8, y + 4, "end", box{x - 8 - w, y - 6, x - 7, y + 6}},
		{x, y - 9, "middle", box{x - w/2, y - 9 - textHeight, x + w/2, y - 6}},
		{x, y + 17, "middle", box{x - w/2, y + 6, x + w/2, y + 19}},
	} {
		if c.b.x0 < padLeft-2 || c.b.x1 > chartWidth-2 || c.b.y0 < 0 || c.b.y1 > chartHeight-padBottom {
			continue
		}
		free := true
		for _, t := range *taken {
			if c.b.overlaps(t) && !(t.x0 < x && x < t.x1 && t.y0 < y && y < t.y1 && t.x1-t.x0 == 10) {
				free = false
				break
			}
		}
		if free {
			*taken = append(*taken, c.b)
			return c.x, c.y, c.anchor, true
		}
	}
	return 0, 0, "", false
}

// intervalPlot draws the interval of a claim against its bound: the satisfying side is shaded.
func intervalPlot(h *htmlWriter, c Claim) {
	if math.IsNaN(c.Measured) {
		return
	}
	limit := c.Measured - c.Margin
	upper := strings.HasPrefix(c.Bound, "≤")
	if upper {
		limit = c.Measured + c.Margin
	}
	values := append([]float64{c.Measured, limit}, c.Seeds...)
	if hasInterval(c.Low, c.High) {
		values = append(values, c.Low, c.High)
	}
	x, ok := newAxis(values, false, 6, 314, 5)
	if !ok {
		return
	}
	room := 0.06 * (x.hi - x.lo)
	x.lo, x.hi = x.lo-room, x.hi+room
	b, _ := x.at(limit)
	m, _ := x.at(c.Measured)
	h.printf("<svg class=\"interval\" viewBox=\"0 0 320 34\" role=\"img\" aria-label=\"measured interval against the bound\">\n")
	if upper {
		h.printf("<rect class=\"good\" x=\"0\" y=\"2\" width=\"%.1f\" height=\"20\"/>", b)
	} else {
		h.printf("<rect class=\"good\" x=\"%.1f\" y=\"2\" width=\"%.1f\" height=\"20\"/>", b, 320-b)
	}
	h.printf("<line class=\"axis\" x1=\"0\" x2=\"320\" y1=\"12\" y2=\"12\"/><line class=\"bound\" x1=\"%.1f\" x2=\"%.1f\" y1=\"0\" y2=\"24\"/>", b, b)
	anchor := "middle"
	if b < 40 {
		anchor = "start"
	} else if b > 280 {
		anchor = "end"
	}
	h.printf("<text class=\"tick\" x=\"%.1f\" y=\"33\" text-anchor=\"%s\">%s</text>", b, anchor, esc(c.Bound))
	if hasInterval(c.Low, c.High) {
		l, _ := x.at(c.Low)
		r, _ := x.at(c.High)
		h.printf("<line class=\"ci\" x1=\"%.1f\" x2=\"%.1f\" y1=\"12\" y2=\"12\"/>", l, r)
	}
	for _, s := range c.Seeds {
		if p, ok := x.at(s); ok {
			h.printf("<line class=\"seed\" x1=\"%.1f\" x2=\"%.1f\" y1=\"6\" y2=\"18\"/>", p, p)
		}
	}
	h.printf("<circle class=\"mean\" cx=\"%.1f\" cy=\"12\" r=\"4.5\"/>\n</svg>\n", m)
}

package norm

import (
	"fmt"
	"image"
	"image/color"
	"image/draw"
	"math"
	"strings"

	"golang.org/x/image/font"
	"golang.org/x/image/font/gofont/goregular"
	"golang.org/x/image/font/opentype"
	"golang.org/x/image/math/fixed"

	method "github.com/lathe-ml/lathe/design/norm"
	"github.com/lathe-ml/lathe/internal/search"
)

// picture is a white canvas with a plot area and text.
type picture struct {
	*image.RGBA
	face font.Face
	area image.Rectangle
	x, y [2]float64 // what the area's sides stand for
}

var (
	black  = color.RGBA{30, 30, 30, 255}
	grey   = color.RGBA{150, 150, 150, 255}
	pale   = color.RGBA{225, 225, 225, 255}
	blue   = color.RGBA{31, 119, 180, 255}
	orange = color.RGBA{230, 120, 20, 255}
	red    = color.RGBA{200, 40, 50, 255}
	green  = color.RGBA{40, 140, 60, 255}
	purple = color.RGBA{130, 80, 170, 255}
)

func newPicture(w, h int, area image.Rectangle, x, y [2]float64) *picture {
	p := &picture{RGBA: image.NewRGBA(image.Rect(0, 0, w, h)), area: area, x: x, y: y}
	draw.Draw(p, p.Bounds(), image.White, image.Point{}, draw.Src)
	if f, err := opentype.Parse(goregular.TTF); err == nil {
		p.face, _ = opentype.NewFace(f, &opentype.FaceOptions{Size: 13, DPI: 72})
	}
	return p
}

// text writes s with its baseline at y, ending right of x when right is set.
func (p *picture) text(x, y int, s string, c color.Color, right bool) {
	if p.face == nil {
		return
	}
	d := font.Drawer{Dst: p, Src: image.NewUniform(c), Face: p.face, Dot: fixed.P(x, y)}
	if right {
		d.Dot.X -= d.MeasureString(s)
	}
	d.DrawString(s)
}

// at is where a point of the plot lies.
func (p *picture) at(x, y float64) (int, int) {
	u, v := (x-p.x[0])/(p.x[1]-p.x[0]), (y-p.y[0])/(p.y[1]-p.y[0])
	return p.area.Min.X + int(math.Round(u*float64(p.area.Dx()))), p.area.Max.Y - int(math.Round(v*float64(p.area.Dy())))
}

// dot draws a disc of a radius in half pixels.
func (p *picture) dot(x, y, radius int, c color.Color) {
	for dy := -radius; dy <= radius; dy++ {
		for dx := -radius; dx <= radius; dx++ {
			if dx*dx+dy*dy <= radius*radius {
				p.Set(x+dx, y+dy, c)
			}
		}
	}
}

func (p *picture) line(x0, y0, x1, y1 int, c color.Color) {
	n := max(1, max(abs(x1-x0), abs(y1-y0)))
	for i := range n + 1 {
		p.Set(x0+(x1-x0)*i/n, y0+(y1-y0)*i/n, c)
	}
}

func abs(x int) int { return max(x, -x) }

// axes draws the frame and ticks every step along each side.
func (p *picture) axes(xStep, yStep float64, xLabel, yLabel string) {
	for v := math.Ceil(p.y[0]/yStep) * yStep; v <= p.y[1]+1e-9; v += yStep {
		_, y := p.at(0, v)
		p.line(p.area.Min.X, y, p.area.Max.X, y, pale)
		p.text(p.area.Min.X-6, y+4, fmt.Sprintf("%g", v), black, true)
	}
	for v := math.Ceil(p.x[0]/xStep) * xStep; v <= p.x[1]+1e-9; v += xStep {
		x, _ := p.at(v, 0)
		p.line(x, p.area.Min.Y, x, p.area.Max.Y, pale)
		p.text(x+8, p.area.Max.Y+16, fmt.Sprintf("%g", v), black, true)
	}
	p.line(p.area.Min.X, p.area.Min.Y, p.area.Min.X, p.area.Max.Y, black)
	p.line(p.area.Min.X, p.area.Max.Y, p.area.Max.X, p.area.Max.Y, black)
	p.text(p.area.Max.X, p.area.Max.Y+32, xLabel, black, true)
	p.text(p.area.Min.X-30, p.area.Min.Y-8, yLabel, black, false)
}

// SearchLogPicture shows every proposal of a search: the accuracy of the accepted ones over their number, the rejected ones
// in rows by what rejected them, and the best layers' equations.
func SearchLogPicture(r *method.SearchResult) image.Image {
	const w, h = 760, 420
	best := r.Best(4)
	top := 10.
	for _, p := range best {
		top = max(top, math.Ceil(10*p.Mean())*10)
	}
	n := float64(max(len(r.Proposals), 1))
	p := newPicture(w, h+20*len(best), image.Rect(50, 26, w-130, 250), [2]float64{0, n}, [2]float64{0, top})
	p.axes(math.Max(10, math.Round(n/4/10)*10), 20, "proposal", "mean validation accuracy, %")
	rows := []struct {
		verdict, text string
		c             color.Color
	}{
		{method.ByStatic, "ignores x", grey},
		{method.ByQuality, "quality", orange},
		{method.ByNaN, "not finite", red},
		{method.ByStability, "unstable", purple},
		{method.ByError, "error", black},
		{method.ByTimeout, "timeout", black},
	}
	for i, row := range rows {
		y := 300 + 18*i
		p.text(w-124, y+4, fmt.Sprintf("%s: %d", row.text, r.Count(row.verdict)), row.c, false)
		for _, q := range r.Proposals {
			if q.Verdict == row.verdict {
				x, _ := p.at(float64(q.Number), 0)
				p.line(x, y-4, x, y+4, row.c)
			}
		}
	}
	high, px, py := 0., 0, 0
	for _, q := range r.Proposals {
		if q.Verdict != method.Accepted {
			continue
		}
		x, y := p.at(float64(q.Number), 100*q.Mean())
		c := blue
		if q.Parent < 0 {
			c = green
		}
		p.dot(x, y, 2, c)
		if m := 100 * q.Mean(); m > high {
			nx, ny := p.at(float64(q.Number), m)
			if high > 0 {
				p.line(px, py, nx, py, black)
				p.line(nx, py, nx, ny, black)
			}
			high, px, py = m, nx, ny
		}
	}
	if high > 0 {
		p.line(px, py, p.area.Max.X, py, black)
	}
	p.text(w-124, 60, fmt.Sprintf("accepted: %d", r.Count(method.Accepted)), black, false)
	p.text(w-124, 78, "child of a layer", blue, false)
	p.text(w-124, 96, "random layer", green, false)
	for i, q := range best {
		p.text(12, h+14+20*i, clipped(fmt.Sprintf("%d. %.1f %%  y = %s", i+1, 100*q.Mean(), q.Formula), 110), black, false)
	}
	return p.RGBA
}

func clipped(s string, n int) string {
	if r := []rune(s); len(r) > n {
		return string(r[:n-1]) + "…"
	}
	return s
}

// SearchFrontPicture shows the accepted layers by their accuracy on the first network and the mean of the others, with the
// layers of the Pareto front of all networks filled and the front of the two coordinates as a line.
func SearchFrontPicture(r *method.SearchResult) image.Image {
	const w, h = 560, 470
	all := r.Best(0)
	other := func(p method.Proposal) float64 {
		s := 0.
		for _, v := range p.Scores[1:] {
			s += 100 * v / float64(len(p.Scores)-1)
		}
		return s
	}
	top := 10.
	for _, q := range all {
		top = max(top, math.Ceil(10*q.Scores[0])*10, math.Ceil(other(q)/10)*10)
	}
	front := r.Front()
	shown := min(len(front), 5)
	p := newPicture(w, h+20*shown, image.Rect(56, 26, w-30, h-60), [2]float64{0, top}, [2]float64{0, top})
	p.axes(10, 10, r.Archs[0]+", %", "mean of "+strings.Join(r.Archs[1:], " and ")+", %")
	var points [][]float64
	for _, q := range all {
		x, y := p.at(100*q.Scores[0], other(q))
		p.dot(x, y, 2, grey)
		points = append(points, []float64{100 * q.Scores[0], other(q)})
	}
	for _, q := range front {
		x, y := p.at(100*q.Scores[0], other(q))
		p.dot(x, y, 4, orange)
	}
	var last []float64
	flat := search.ParetoFront(points)
	for range flat { // from left to right
		var next []float64
		for _, i := range flat {
			if q := points[i]; (last == nil || q[0] > last[0]) && (next == nil || q[0] < next[0]) {
				next = q
			}
		}
		if next == nil {
			break
		}
		if last != nil {
			x0, y0 := p.at(last[0], last[1])
			x1, y1 := p.at(next[0], next[1])
			p.line(x0, y0, x1, y0, orange)
			p.line(x1, y0, x1, y1, orange)
		}
		last = next
	}
	for i, q := range front[:shown] {
		p.text(12, h+14+20*i, clipped(fmt.Sprintf("%.1f / %.1f  y = %s", 100*q.Scores[0], other(q), q.Formula), 80), black, false)
	}
	return p.RGBA
}

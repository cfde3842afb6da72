package report

import (
	"bytes"
	"fmt"
	"io"
	"math"
	"regexp"
	"slices"
	"strings"

	"github.com/charmbracelet/lipgloss"
)

// textWriter prints sections for a terminal. Colours appear when the writer is a terminal that has them.
type textWriter struct {
	buf   bytes.Buffer
	r     *lipgloss.Renderer
	width int
}

func newTextWriter(w io.Writer, width int) *textWriter {
	if width <= 0 {
		width = 100
	}
	return &textWriter{r: lipgloss.NewRenderer(w), width: width}
}

func (t *textWriter) document(d *Document) {
	t.println(t.r.NewStyle().Bold(true).Render(d.Title))
	if d.Subtitle != "" {
		t.println(t.wrap(d.Subtitle))
	}
	for _, s := range d.Sections {
		s.text(t)
	}
	if len(d.Facts) > 0 {
		t.println()
		n := 0
		for _, f := range d.Facts {
			n = max(n, lipgloss.Width(f.Name))
		}
		for _, f := range d.Facts {
			label := t.faint(f.Name + strings.Repeat(" ", n-lipgloss.Width(f.Name)+2))
			lines := strings.Split(t.wrapTo(f.Value, t.width-n-2), "\n")
			t.println(label + strings.Join(lines, "\n"+strings.Repeat(" ", n+2)))
		}
	}
}

func (t *textWriter) println(s ...string) {
	for _, x := range s {
		t.buf.WriteString(strings.TrimRight(x, " \n"))
	}
	t.buf.WriteByte('\n')
}

func (t *textWriter) title(s string) {
	t.println()
	if s != "" {
		t.println(t.r.NewStyle().Bold(true).Render(s))
	}
}

func (t *textWriter) note(s string) {
	if s != "" {
		t.println(t.faint(t.wrap(s)))
	}
}

func (t *textWriter) faint(s string) string { return t.r.NewStyle().Faint(true).Render(s) }

func (t *textWriter) wrap(s string) string { return t.wrapTo(s, t.width) }

// wrapTo breaks text at spaces; a word longer than the width stays whole, so that what is copied is right.
func (t *textWriter) wrapTo(s string, width int) string {
	var out []string
	for _, para := range strings.Split(s, "\n") {
		line := ""
		for _, word := range strings.Fields(para) {
			switch {
			case line == "":
				line = word
			case lipgloss.Width(line)+1+lipgloss.Width(word) <= width:
				line += " " + word
			default:
				out = append(out, line)
				line = word
			}
		}
		out = append(out, line)
	}
	return strings.Join(out, "\n")
}

// verdictStyle colours a verdict.
func (t *textWriter) verdictStyle(v string) lipgloss.Style {
	s := t.r.NewStyle()
	switch v {
	case Holds:
		return s.Foreground(lipgloss.Color("2"))
	case Fails:
		return s.Foreground(lipgloss.Color("1"))
	}
	return s.Foreground(lipgloss.Color("3"))
}

// table prints rows under columns; numeric columns to the right. style, when not nil, styles a cell. Columns without any
// name have no line for the names. Where the table is too wide, the cells of its widest columns are broken at spaces.
func (t *textWriter) table(columns []string, rows [][]string, style func(row, col int) lipgloss.Style) {
	if len(columns) == 0 || len(rows) == 0 {
		return
	}
	rows = padRows(columns, rows)
	right := numericColumns(columns, rows)
	const gap = 2
	width, least := make([]int, len(columns)), make([]int, len(columns)) // natural, and of the longest word
	total := -gap
	for c := range columns {
		width[c] = lipgloss.Width(columns[c])
		for _, part := range nameParts(columns[c]) {
			least[c] = max(least[c], lipgloss.Width(strings.TrimSpace(part)))
		}
		for _, cell := range column(rows, c) {
			width[c] = max(width[c], lipgloss.Width(cell))
			for _, word := range strings.Fields(cell) {
				least[c] = max(least[c], lipgloss.Width(word))
			}
			if right[c] {
				least[c] = max(least[c], lipgloss.Width(cell)) // numbers stay in one piece
			}
		}
		total += width[c] + gap
	}
	for total > t.width {
		widest := -1
		for c := range columns {
			if width[c] > least[c] && (widest < 0 || width[c] > width[widest]) {
				widest = c
			}
		}
		if widest < 0 {
			break
		}
		width[widest]--
		total--
	}
	line := func(cells []string, wrap func(s string, width int) string, style func(c int) lipgloss.Style) {
		parts := make([][]string, len(cells))
		height := 1
		for c, cell := range cells {
			parts[c] = strings.Split(wrap(cell, width[c]), "\n")
			height = max(height, len(parts[c]))
		}
		for i := range height {
			var b strings.Builder
			for c := range cells {
				text := ""
				if i < len(parts[c]) {
					text = parts[c][i]
				}
				space := strings.Repeat(" ", max(0, width[c]-lipgloss.Width(text)))
				if text != "" {
					text = style(c).Render(text)
				}
				if c > 0 {
					b.WriteString(strings.Repeat(" ", gap))
				}
				if right[c] {
					b.WriteString(space + text)
				} else {
					b.WriteString(text + space)
				}
			}
			t.println(b.String())
		}
	}
	if strings.Join(columns, "") != "" {
		line(columns, wrapName, func(int) lipgloss.Style { return t.r.NewStyle().Bold(true) })
		t.println(t.faint(strings.Repeat("─", min(total, t.width))))
	}
	for i, r := range rows {
		line(r, t.wrapTo, func(c int) lipgloss.Style {
			if style == nil {
				return t.r.NewStyle()
			}
			return style(i, c)
		})
	}
}

// nameParts cuts the name of a column where it may be broken: after spaces and underscores.
func nameParts(s string) []string {
	return strings.FieldsFunc(strings.NewReplacer("_", "_\x00", " ", " \x00").Replace(s), func(r rune) bool { return r == 0 })
}

// wrapName breaks the name of a column.
func wrapName(s string, width int) string {
	var lines []string
	line := ""
	for _, part := range nameParts(s) {
		if line != "" && lipgloss.Width(line+strings.TrimSpace(part)) > width {
			lines = append(lines, strings.TrimSpace(line))
			line = ""
		}
		line += part
	}
	return strings.Join(append(lines, strings.TrimSpace(line)), "\n")
}

func column(rows [][]string, c int) []string {
	cells := make([]string, len(rows))
	for i, r := range rows {
		cells[i] = r[c]
	}
	return cells
}

func padRows(columns []string, rows [][]string) [][]string {
	out := make([][]string, len(rows))
	for i, r := range rows {
		out[i] = make([]string, len(columns))
		copy(out[i], r)
	}
	return out
}

// number matches a cell that is one: "87.2", "−0.5 ± 0.1", "1.2 (0.8 … 1.6)", "≥ 0.5 dB", "17.3 kB", "12 %".
var number = regexp.MustCompile(`^[<>≤≥≈~]?\s*[−+-]?[0-9][0-9.,e−+-]*( ± [0-9.e−-]+)?( \([^()a-zA-Z]*\))?\s*([%×/a-zA-Z]{1,5})?$`)

// numericColumns says which columns hold only numbers (with units and intervals) and blanks.
func numericColumns(columns []string, rows [][]string) []bool {
	right := make([]bool, len(columns))
	for c := range columns {
		digits := false
		right[c] = true
		for _, r := range rows {
			s := strings.TrimSpace(r[c])
			if s == "" || s == "–" {
				continue
			}
			if !number.MatchString(s) {
				right[c] = false
				break
			}
			digits = true
		}
		right[c] = right[c] && digits
	}
	return right
}

func (s Heading) text(t *textWriter) {
	t.println()
	t.title(s.Title)
	if s.Lead != "" {
		t.println(t.wrap(s.Lead))
	}
}

func (s Text) text(t *textWriter) {
	t.title(s.Title)
	for _, p := range s.Paragraphs {
		t.println(t.wrap(p))
	}
}

func (s Table) text(t *textWriter) {
	t.title(s.Title)
	t.table(s.Columns, s.Rows, func(row, _ int) lipgloss.Style {
		return t.r.NewStyle().Bold(slices.Contains(s.Strong, row))
	})
	t.note(s.Note)
}

func (s Curve) text(t *textWriter) {
	if len(s.Lines) == 0 {
		return
	}
	t.title(s.Title)
	y := s.YLabel
	if y == "" {
		y = "y"
	}
	var rows [][]string
	for _, l := range s.Lines {
		n := min(len(l.X), len(l.Y))
		if n == 0 {
			continue
		}
		best, worst := math.Inf(1), math.Inf(-1)
		for _, v := range l.Y[:n] {
			best, worst = math.Min(best, v), math.Max(worst, v)
		}
		rows = append(rows, []string{l.Name, sparkline(l.Y[:n], 24), Number(l.Y[0]), Number(best), Number(worst), Number(l.Y[n-1])})
	}
	t.table([]string{y, "over " + s.XLabel, "first", "lowest", "highest", "last"}, rows, nil)
	t.note(s.Note)
}

// sparkline draws values as a line of blocks.
func sparkline(y []float64, width int) string {
	if len(y) == 0 {
		return ""
	}
	width = min(width, len(y))
	lo, hi := math.Inf(1), math.Inf(-1)
	means := make([]float64, width)
	for i := range means {
		a, b := i*len(y)/width, (i+1)*len(y)/width
		for _, v := range y[a:b] {
			means[i] += v / float64(b-a)
		}
		lo, hi = math.Min(lo, means[i]), math.Max(hi, means[i])
	}
	blocks := []rune("▁▂▃▄▅▆▇█")
	out := make([]rune, width)
	for i, v := range means {
		k := 0
		if hi > lo {
			k = int((v - lo) / (hi - lo) * float64(len(blocks)-1))
		}
		out[i] = blocks[min(max(k, 0), len(blocks)-1)]
	}
	return string(out)
}

func (s Scatter) text(t *textWriter) {
	if len(s.Points) > 12 { // a list of many points says less than the picture, and tables name them
		t.println()
		t.println(t.faint(fmt.Sprintf("%s: %d points, in the HTML report", s.Title, len(s.Points))))
		return
	}
	t.title(s.Title)
	var rows [][]string
	for _, p := range s.Points {
		rows = append(rows, []string{p.Label, Number(p.X), withInterval(p.Y, p.YLow, p.YHigh)})
	}
	t.table([]string{"", s.XLabel, s.YLabel}, rows, nil)
	t.note(s.Note)
}

// withInterval prints a value with its interval, if it has one.
func withInterval(v, low, high float64) string {
	if !hasInterval(low, high) {
		return Number(v)
	}
	return fmt.Sprintf("%s (%s … %s)", Number(v), brief(low), brief(high))
}

func hasInterval(low, high float64) bool {
	return low != high && !math.IsNaN(low) && !math.IsNaN(high)
}

func (s Bars) text(t *textWriter) {
	t.title(s.Title)
	lo, hi := s.span()
	var rows [][]string
	for _, b := range s.Items {
		n := int(math.Round(24 * s.fraction(b.Value, lo, hi)))
		rows = append(rows, []string{b.Label, strings.Repeat("█", max(n, 0)), withInterval(b.Value, b.Low, b.High)})
	}
	t.table([]string{"", "", s.Unit}, rows, nil)
	t.note(s.Note)
}

func (s Images) text(t *textWriter) {
	if len(s.Pictures) == 0 {
		return
	}
	title := s.Title
	if title == "" {
		title = "Pictures"
	}
	t.println()
	t.println(t.faint(fmt.Sprintf("%s: %d, in the HTML report", title, len(s.Pictures))))
}

func (s Claims) text(t *textWriter) {
	if len(s.Items) == 0 {
		return
	}
	title := s.Title
	if title == "" {
		title = "Claims"
	}
	t.title(title)
	var rows [][]string
	for _, c := range s.Items {
		measured := Number(c.Measured)
		if hasInterval(c.Low, c.High) {
			measured = fmt.Sprintf("%s (%s … %s)", measured, brief(c.Low), brief(c.High))
		}
		bound := c.Bound
		if c.Unit != "" {
			bound += " " + c.Unit
		}
		rows = append(rows, []string{c.ID, strings.ToUpper(c.Verdict), measured, bound, signed(c.Margin), c.Text})
	}
	t.table([]string{"", "verdict", "measured (95 %)", "bound", "margin", "claim"}, rows, func(row, col int) lipgloss.Style {
		if col == 1 {
			return t.verdictStyle(s.Items[row].Verdict).Bold(true)
		}
		return t.r.NewStyle()
	})
	for _, c := range s.Items {
		if c.Reason != "" {
			t.note(c.ID + ": " + c.Reason)
		}
	}
	t.note(s.Note)
}

func signed(v float64) string {
	if s := Number(v); v > 0 {
		return "+" + s
	} else {
		return s
	}
}

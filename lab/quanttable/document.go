package quanttable

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/lathe-ml/lathe/lab/report"
)

// widths are the columns of the tables, in bits of a weight.
var widths = []int{8, 6, 4, 3, 2}

// Read reads a table that "lathe bench compress -o" wrote.
func Read(path string) (*Table, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var t Table
	if err := json.Unmarshal(raw, &t); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if len(t.Rows) == 0 {
		return nil, fmt.Errorf("%s: the table has no networks", path)
	}
	return &t, nil
}

// Merge puts the networks of another table in place of this one's, and adds those that it lacks.
func (t *Table) Merge(o *Table) {
	for _, r := range o.Rows {
		if i := slices.IndexFunc(t.Rows, func(x Row) bool { return x.Network == r.Network }); i >= 0 {
			t.Rows[i] = r
		} else {
			t.Rows = append(t.Rows, r)
		}
	}
	for k, v := range o.Versions {
		if t.Versions == nil {
			t.Versions = map[string]string{}
		}
		t.Versions[k] = v
	}
	place := func(r Row) int {
		return slices.IndexFunc(Networks, func(n Network) bool { return n.Name == r.Network })
	}
	slices.SortStableFunc(t.Rows, func(a, b Row) int { return cmp.Compare(place(a), place(b)) })
	t.CPU, t.Backend, t.Date = o.CPU, o.Backend, o.Date
}

// line is one quantiser over all widths.
type line struct {
	tool, method string
	act          int
	flags        []string
	cells        map[int]*Cell
}

// lines groups a network's cells by quantiser and bits of activations, in their order.
func (r *Row) lines() (out []*line) {
	for i := range r.Cells {
		c := &r.Cells[i]
		k := slices.IndexFunc(out, func(l *line) bool {
			return l.tool == c.Tool && l.method == c.Method && l.act == c.ActBits && slices.Equal(l.flags, c.Flags)
		})
		if k < 0 {
			k = len(out)
			out = append(out, &line{c.Tool, c.Method, c.ActBits, c.Flags, map[int]*Cell{}})
		}
		out[k].cells[c.Bits] = c
	}
	return out
}

func (l *line) name() string {
	name := l.method
	if l.tool != "lathe" {
		name = l.tool + ": " + name
	}
	if slices.Equal(l.flags, DenseOnly) {
		name += ", dense layers"
	}
	switch l.act {
	case 32:
		return name + ", weights only"
	case 8:
		return name
	}
	return fmt.Sprintf("%s, activations %d", name, l.act)
}

// quality is the table of qualities.
func (r *Row) quality() report.Table {
	t := report.Table{
		Title:   r.Title,
		Columns: []string{"quantiser"},
		Note: fmt.Sprintf("%s, on %d cases, with the 95 %% interval; float: %.2f (%.1f … %.1f), %s. Activations have 8 bits where nothing else is said.",
			r.Measure, r.Cases, r.Float.Value, r.Float.Low, r.Float.High, report.Bytes(r.Bytes)),
	}
	for _, w := range widths {
		t.Columns = append(t.Columns, fmt.Sprintf("%d bits", w))
	}
	for _, l := range r.lines() {
		row := []string{l.name()}
		any := false
		for _, w := range widths {
			c := l.cells[w]
			switch {
			case c == nil:
				row = append(row, "")
			case c.Refused != "":
				row = append(row, "–")
			default:
				any = true
				text := fmt.Sprintf("%.2f (%.1f … %.1f)", c.Value, c.Low, c.High)
				if best := r.Best(c.Tool == "lathe", w); best == c {
					text = "**" + text + "**"
				}
				row = append(row, text)
			}
		}
		if any {
			t.Rows = append(t.Rows, row)
		}
	}
	return t
}

// costs is the table of what each cell takes.
func (r *Row) costs() report.Table {
	t := report.Table{Columns: []string{"quantiser", "bits", "parameters", "file", "cosine", "KL, nats", "seconds", "peak MB", "cosine with ONNX Runtime"}}
	for _, l := range r.lines() {
		for _, w := range widths {
			c := l.cells[w]
			if c == nil || c.Refused != "" {
				continue
			}
			runtime := "–"
			if c.RuntimeCosine > 0 {
				runtime = fmt.Sprintf("%.7f", c.RuntimeCosine)
			}
			parameters := report.Bytes(c.Parameters)
			if c.Tool != "lathe" {
				parameters = "–"
			}
			kl := fmt.Sprintf("%.3g", c.KL)
			if c.KL == 0 && c.Cosine < 1 { // of another definition, and not measured again
				kl = "–"
			}
			t.Rows = append(t.Rows, []string{l.name(), fmt.Sprintf("W%dA%d", c.Bits, c.ActBits), parameters, report.Bytes(c.File), fmt.Sprintf("%.5f", c.Cosine), kl, fmt.Sprintf("%.1f", c.Seconds), fmt.Sprintf("%.0f", c.PeakMB), runtime})
		}
	}
	return t
}

// refusals says in words why cells are empty, one line per quantiser and reason.
func (r *Row) refusals() (out []string) {
	for _, l := range r.lines() {
		reasons := map[string][]string{}
		var order []string
		for _, w := range widths {
			if c := l.cells[w]; c != nil && c.Refused != "" {
				if reasons[c.Refused] == nil {
					order = append(order, c.Refused)
				}
				reasons[c.Refused] = append(reasons[c.Refused], fmt.Sprint(w))
			}
		}
		for _, why := range order {
			out = append(out, fmt.Sprintf("%s at %s bits: %s", l.name(), strings.Join(reasons[why], ", "), why))
		}
	}
	return out
}

// Verdicts hold the best of Lathe's quantisers against the best of each peer's, at 8 and at 4 bits.
func (r *Row) Verdicts() (out []string) {
	for _, bits := range []int{8, 4} {
		ours, theirs := r.Best(true, bits), r.Best(false, bits)
		if ours == nil || theirs == nil {
			continue
		}
		word := "better than"
		switch {
		case ours.Value == theirs.Value:
			word = "as good as"
		case ours.Value < theirs.Value:
			word = "worse than"
		}
		out = append(out, fmt.Sprintf("At %d bits the best of Lathe (%s, %.2f) is %s the best of %s (%s, %.2f).", bits, ours.Method, ours.Value, word, theirs.Tool, theirs.Method, theirs.Value))
	}
	return out
}

// Markdown is the guide's measured part.
func (t *Table) Markdown() []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "Measured on %s, backend %s, %s", t.CPU, t.Backend, t.Date)
	for _, k := range sortedKeys(t.Versions) {
		fmt.Fprintf(&b, "; %s", t.Versions[k])
	}
	b.WriteString(". Bold: the best of Lathe, and the best of the other tool, in a column.\n")
	for i := range t.Rows {
		r := &t.Rows[i]
		q := r.quality()
		fmt.Fprintf(&b, "\n### %s\n\n%s\n\n", q.Title, q.Note)
		markdown(&b, q)
		for _, v := range r.Verdicts() {
			fmt.Fprintf(&b, "\n%s\n", v)
		}
		if list := r.refusals(); len(list) > 0 {
			b.WriteString("\n<details><summary>Not served</summary>\n\n")
			for _, s := range list {
				fmt.Fprintf(&b, "- %s\n", strings.ReplaceAll(s, "|", "\\|"))
			}
			b.WriteString("\n</details>\n")
		}
		b.WriteString("\n<details><summary>Bytes, seconds, memory</summary>\n\n")
		markdown(&b, r.costs())
		b.WriteString("\n</details>\n")
	}
	return b.Bytes()
}

func sortedKeys(m map[string]string) []string {
	var keys []string
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

func markdown(b *bytes.Buffer, t report.Table) {
	row := func(cells []string) { fmt.Fprintf(b, "| %s |\n", strings.Join(cells, " | ")) }
	row(t.Columns)
	row(slices.Repeat([]string{"---"}, len(t.Columns)))
	for _, r := range t.Rows {
		row(r)
	}
}

// Document lays the table out for a report.
func (t *Table) Document() *report.Document {
	d := &report.Document{Title: "Which quantiser, and at how many bits", Facts: []report.Fact{
		{Name: "processor", Value: t.CPU}, {Name: "backend", Value: t.Backend}, {Name: "date", Value: t.Date},
	}}
	for _, k := range sortedKeys(t.Versions) {
		d.Facts = append(d.Facts, report.Fact{Name: k, Value: t.Versions[k]})
	}
	for i := range t.Rows {
		r := &t.Rows[i]
		q := r.quality()
		for _, row := range q.Rows {
			for k := range row {
				row[k] = strings.Trim(row[k], "*")
			}
		}
		d.Add(q)
		s := report.Scatter{Title: r.Title + ": size and quality", XLabel: "file, bytes", YLabel: r.Measure}
		for _, l := range r.lines() {
			for _, w := range widths {
				if c := l.cells[w]; c != nil && c.Refused == "" {
					s.Points = append(s.Points, report.Mark{Label: fmt.Sprintf("%s %d", l.name(), w), Group: l.name(), X: float64(c.File), Y: c.Value, YLow: c.Low, YHigh: c.High})
				}
			}
		}
		if len(s.Points) > 0 {
			d.Add(s)
		}
		costs := r.costs()
		costs.Title = r.Title + ": bytes, seconds, memory"
		d.Add(costs)
		if text := append(r.Verdicts(), r.refusals()...); len(text) > 0 {
			d.Add(report.Text{Title: "Notes on " + r.Network, Paragraphs: text})
		}
	}
	return d
}

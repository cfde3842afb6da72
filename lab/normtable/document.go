package normtable

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/lathe-ml/lathe/lab/report"
)

// Read reads a table that "lathe norms -o" wrote.
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
		return nil, fmt.Errorf("%s: the table has no rows", path)
	}
	return &t, nil
}

// Markdown is the table with what it was measured on.
func (t *Table) Markdown() []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "**%s**: %d steps, %d seeds, backend %s, %s.\n\n", t.Title, t.Steps, len(t.Seeds), t.Backend, t.CPU)
	table := t.table()
	row := func(cells []string) { fmt.Fprintf(&b, "| %s |\n", strings.Join(cells, " | ")) }
	row(table.Columns)
	row(slices.Repeat([]string{"---"}, len(table.Columns)))
	for _, r := range table.Rows {
		row(r)
	}
	if s := t.refused(); s != "" {
		fmt.Fprintf(&b, "\nWithout a figure: %s\n", strings.TrimSpace(s))
	}
	return b.Bytes()
}

// Document lays the table out: what was measured, the table, and the gradients by depth.
func (t *Table) Document() *report.Document {
	d := &report.Document{
		Title: "Which norm: " + t.Title,
		Facts: []report.Fact{
			{Name: "steps", Value: fmt.Sprint(t.Steps)}, {Name: "seeds", Value: fmt.Sprint(len(t.Seeds))}, {Name: "backend", Value: t.Backend}, {Name: "processor", Value: t.CPU},
		},
	}
	table := t.table()
	d.Add(table)
	if s := t.refused(); s != "" {
		d.Add(report.Text{Title: "Without a figure", Paragraphs: []string{s}})
	}
	var curve report.Curve
	curve.Title, curve.XLabel, curve.YLabel = "gradient norm by layer, end of training", "layer", "L2 norm"
	curve.LogY = true
	for _, r := range t.Rows {
		if r.Error != "" || len(r.Gradients) < 2 {
			continue
		}
		l := report.Line{Name: r.Candidate.String()}
		for i, g := range r.Gradients {
			l.X, l.Y = append(l.X, float64(i+1)), append(l.Y, g)
		}
		curve.Lines = append(curve.Lines, l)
	}
	if len(curve.Lines) > 0 {
		d.Add(curve)
	}
	return d
}

// table is sorted by loss, the best first.
func (t *Table) table() report.Table {
	out := report.Table{Columns: []string{"norm", "loss"}}
	accuracy := slices.ContainsFunc(t.Rows, func(r Row) bool { return r.Accuracy != 0 })
	if accuracy {
		out.Columns = append(out.Columns, "accuracy %")
	}
	out.Columns = append(out.Columns, "gradients max/min", "step ms", "inference ms", "folded ms", "speed-up")
	rows := slices.Clone(t.Rows)
	slices.SortStableFunc(rows, func(a, b Row) int {
		switch {
		case a.Loss < b.Loss:
			return -1
		case a.Loss > b.Loss:
			return 1
		}
		return 0
	})
	for _, r := range rows {
		if r.Error != "" {
			continue
		}
		row := []string{r.Candidate.String(), span(r.Loss, r.LossLow, r.LossHigh, "%.3f")}
		if accuracy {
			row = append(row, span(r.Accuracy, r.AccLow, r.AccHigh, "%.1f"))
		}
		even, fused, gain := "–", "–", "–"
		if r.Evenness > 0 {
			even = fmt.Sprintf("%.1f", r.Evenness)
		}
		if r.Folded > 0 {
			fused, gain = fmt.Sprintf("%.2f", r.Fused), fmt.Sprintf("%.2f×", r.Inference/r.Fused)
		}
		out.Rows = append(out.Rows, append(row, even, fmt.Sprintf("%.2f", r.Step), fmt.Sprintf("%.2f", r.Inference), fused, gain))
	}
	return out
}

func span(v, lo, hi float64, format string) string {
	if lo == hi {
		return fmt.Sprintf(format, v)
	}
	return fmt.Sprintf(format+" ("+format+" … "+format+")", v, lo, hi)
}

// refused says which candidates did not make it, and why.
func (t *Table) refused() (s string) {
	for _, r := range t.Rows {
		if r.Error != "" {
			s += fmt.Sprintf("%s: %s. ", r.Candidate, r.Error)
		}
	}
	return s
}

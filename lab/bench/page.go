package bench

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strings"

	"github.com/lathe-ml/lathe/internal/atomicfile"
	"github.com/lathe-ml/lathe/lab/report"
)

// WriteFile keeps a result as JSON.
func (r *Result) WriteFile(path string) error {
	b, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return fmt.Errorf("bench: %s: %w", path, err)
	}
	return atomicfile.WriteFile(path, append(b, '\n'))
}

// ReadResult reads what WriteFile wrote.
func ReadResult(path string) (*Result, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	r := &Result{}
	if err := json.Unmarshal(b, r); err != nil {
		return nil, fmt.Errorf("bench: %s: %w", path, err)
	}
	for _, row := range r.Rows {
		if row.Error == "" && !(row.CPU > 0 && row.Wall > 0 && row.Ratio > 0) || r.work(row.Network).FLOPs <= 0 || r.machine(row.Threads).FMA <= 0 {
			return nil, fmt.Errorf("bench: %s: the row of %s on %s with %d threads is incomplete", path, row.Network, row.Contestant, row.Threads)
		}
	}
	return r, nil
}

// row finds a row with figures, or nil.
func (r *Result) row(network, contestant string, threads int) *Row {
	for i := range r.Rows {
		if row := &r.Rows[i]; row.Network == network && row.Contestant == contestant && row.Threads == threads && row.Error == "" {
			return row
		}
	}
	return nil
}

// networks are those that have rows.
func (r *Result) networks() (names []string) {
	for _, row := range r.Rows {
		if !slices.Contains(names, row.Network) {
			names = append(names, row.Network)
		}
	}
	return names
}

// Headline says in sentences how the first contestant stands: the machine, on how many networks it is how much faster
// than the others, and whether compiling a step takes less than half a second.
func (r *Result) Headline() (lines []string) {
	if len(r.Contestants) == 0 {
		return nil
	}
	own := r.Contestants[0]
	for _, m := range r.Machines {
		if m.FMA > 0 {
			lines = append(lines, fmt.Sprintf("%s: %.0f GFLOP/s of multiply-adds on registers, %.1f GB/s read from memory.", threadsName(m.Threads), m.FMA/1e9, m.Bandwidth/1e9))
		}
	}
	for _, m := range r.Machines {
		for _, c := range r.Contestants[1:] {
			var ratios []float64
			for _, n := range r.networks() {
				if row := r.row(n, c, m.Threads); row != nil {
					ratios = append(ratios, row.Ratio)
				}
			}
			if len(ratios) == 0 {
				continue
			}
			atLeast := func(x float64) (n int) {
				for _, v := range ratios {
					if v >= x {
						n++
					}
				}
				return n
			}
			lines = append(lines, fmt.Sprintf("%s, processor time of %s over %s: at least 1.0 on %d of %d networks, 1.3 on %d, 2.0 on %d; %.2f to %.2f.",
				threadsName(m.Threads), c, own, atLeast(1), len(ratios), atLeast(1.3), atLeast(2), slices.Min(ratios), slices.Max(ratios)))
		}
	}
	worst := (*Row)(nil)
	for i := range r.Rows {
		if row := &r.Rows[i]; row.Contestant == own && row.Error == "" && (worst == nil || row.Compile() > worst.Compile()) {
			worst = row
		}
	}
	if worst != nil {
		verdict := "Compiling a step takes " + own + " less than 0.5 s on every network"
		if worst.Compile() >= 500 {
			verdict = "Compiling a step takes " + own + " 0.5 s or more on some network"
		}
		lines = append(lines, fmt.Sprintf("%s; the longest is %.0f ms, what its first step takes more than the others (%s, %s).",
			verdict, worst.Compile(), worst.Network, threadsName(worst.Threads)))
	}
	for _, row := range r.Rows {
		if row.Error != "" {
			lines = append(lines, "No figures: "+strings.Join(strings.Fields(row.Error), " "))
		}
	}
	return lines
}

func threadsName(n int) string {
	if n == 1 {
		return "1 thread"
	}
	return fmt.Sprintf("%d threads", n)
}

// WriteText prints the result for a terminal of that many columns.
func (r *Result) WriteText(w io.Writer, width int) error {
	doc := report.Document{}
	for _, m := range r.Machines {
		t := report.Table{Title: threadsName(m.Threads), Columns: []string{"network", "on", "CPU ms", "wall ms", "first ms", "MB", "roofline", "CPU over the first's"}}
		for _, row := range r.Rows {
			if row.Threads != m.Threads || row.Error != "" {
				continue
			}
			t.Rows = append(t.Rows, []string{
				row.Network, row.Contestant, fmt.Sprintf("%.1f", row.CPU), fmt.Sprintf("%.1f", row.Wall), fmt.Sprintf("%.0f", row.First),
				fmt.Sprintf("%.0f", row.RSS), fmt.Sprintf("%.0f %%", 100*row.Share), ratio(&row),
			})
		}
		doc.Add(t)
	}
	note := fmt.Sprintf("%s, %s kernels. Medians of %d rounds; ratios are paired by round, with their range. Roofline: the least time that products, convolutions and traffic need here, as a part of the wall time.", r.CPU.Model, r.Level, r.Rounds)
	doc.Add(report.Text{Paragraphs: append([]string{note}, r.Headline()...)})
	return doc.WriteText(w, width)
}

// Page is the result in Markdown, for the part of a page between marks.
func (r *Result) Page() []byte {
	var b strings.Builder
	p := func(format string, args ...any) { fmt.Fprintf(&b, format, args...) }
	own := r.Contestants[0]
	p("Measured on %s: %s, %d cores, %s kernels. One step is forward, backward and AdamW; every contestant ran in a process of its own, one after another in each of %d rounds, with at most %d timed steps after two of warm-up. Times are medians; ratios are of processor time, paired by round.\n\n",
		r.Date, r.CPU.Model, r.CPU.Cores, r.Level, r.Rounds, r.Steps)
	versions := []string{}
	for _, c := range r.Contestants {
		for _, row := range r.Rows {
			if row.Contestant == c && row.Version != "" {
				versions = append(versions, c+" is "+row.Version)
				break
			}
		}
	}
	if len(versions) > 0 {
		p("Here %s.\n\n", strings.Join(versions, ", "))
	}
	for _, l := range r.Headline() {
		p("- %s\n", l)
	}
	p("\n| network | what | parameters | GFLOP a step | least MB a step |\n|---|---|---|---|---|\n")
	for _, w := range r.Work {
		p("| %s | %s | %d | %.2f | %.0f |\n", w.Network, w.What, w.Parameters, w.FLOPs/1e9, w.Bytes/1e6)
	}
	p("\nGFLOP counts the products and convolutions, forward and for the gradients. The least traffic is the batch, parameters and moments read and written, and what goes into a product, written once and read once. The roofline is the longer of the two at the peaks above.\n")
	for _, m := range r.Machines {
		p("\n## %s\n\n### CPU ms of a step (wall ms)\n", upper(threadsName(m.Threads)))
		r.table(p, m.Threads, r.Contestants, func(row *Row) string { return fmt.Sprintf("%s (%s)", ms(row.CPU), ms(row.Wall)) })
		if len(r.Contestants) > 1 {
			p("\n### Processor time over that of %s (range)\n", own)
			r.table(p, m.Threads, r.Contestants[1:], ratio)
		}
		p("\n### Share of the roofline\n")
		r.table(p, m.Threads, r.Contestants, func(row *Row) string { return fmt.Sprintf("%.0f %%", 100*row.Share) })
		p("\n### First step, ms, compilation included (the longest of all rounds, when nothing is cached on disk)\n")
		r.table(p, m.Threads, r.Contestants, func(row *Row) string { return fmt.Sprintf("%.0f (%.0f)", row.First, row.FirstWorst) })
		p("\n### Peak memory of the process, MB\n")
		r.table(p, m.Threads, r.Contestants, func(row *Row) string { return fmt.Sprintf("%.0f", row.RSS) })
	}
	return []byte(b.String())
}

// table writes one row per network and one column per contestant.
func (r *Result) table(p func(string, ...any), threads int, contestants []string, cell func(*Row) string) {
	p("\n| network | %s |\n|---|%s\n", strings.Join(contestants, " | "), strings.Repeat("---|", len(contestants)))
	for _, n := range r.networks() {
		cells := make([]string, len(contestants))
		for i, c := range contestants {
			cells[i] = "–"
			if row := r.row(n, c, threads); row != nil {
				cells[i] = cell(row)
			}
		}
		p("| %s | %s |\n", n, strings.Join(cells, " | "))
	}
}

func ratio(row *Row) string { return fmt.Sprintf("%.2f (%.2f … %.2f)", row.Ratio, row.Low, row.High) }

func ms(v float64) string {
	if v >= 100 {
		return fmt.Sprint(math.Round(v))
	}
	return fmt.Sprintf("%.1f", v)
}

func upper(s string) string { return strings.ToUpper(s[:1]) + s[1:] }

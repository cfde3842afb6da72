package lab

import (
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/lathe-ml/lathe/catalog"
	"github.com/lathe-ml/lathe/lab/report"
)

// Document lays the result out as a report: claims, a table of all arms, the accuracy-size picture where both were
// measured, curves, pictures, and how it was measured.
func (r *Result) Document() *report.Document {
	d := &report.Document{Title: r.Method, Subtitle: r.headline()}
	if c, err := catalog.Find(r.Method); err == nil {
		d.Title = c.Name
	}
	if r.Title != "" {
		d.Title += ": " + r.Title
	}
	d.Add(r.claims())
	for _, t := range r.tables() {
		d.Add(t)
	}
	if s, ok := r.trade(); ok {
		d.Add(s)
	}
	for _, c := range r.curves() {
		d.Add(c)
	}
	for _, p := range r.pictures() {
		d.Add(p)
	}
	d.Facts = r.facts()
	return d
}

// Documents lays several results out in one report.
func Documents(results []*Result) *report.Document {
	if len(results) == 1 {
		return results[0].Document()
	}
	d := &report.Document{Title: fmt.Sprintf("%d methods beside their baselines", len(results))}
	t := report.Table{Columns: []string{"method", "claims", "seeds", "seconds"}}
	for _, r := range results {
		t.Rows = append(t.Rows, []string{r.Method, r.Summary(), fmt.Sprint(len(r.Seeds)), report.Number(roundTo(r.Seconds, 3))})
	}
	d.Add(t)
	for i, r := range results {
		one := r.Document()
		d.Add(report.Heading{Title: one.Title, Lead: one.Subtitle})
		d.Add(one.Sections...)
		if i == 0 {
			d.Facts = one.Facts
			d.Facts = slices.DeleteFunc(slices.Clone(d.Facts), func(f report.Fact) bool { return f.Name == "Recipe" || f.Name == "Time" })
		}
	}
	return d
}

func (r *Result) headline() string {
	seeds := fmt.Sprintf("%d seeds", len(r.Seeds))
	if len(r.Seeds) == 1 {
		seeds = "1 seed"
	}
	s := fmt.Sprintf("%s scale, %s: %s.", strings.ToUpper(r.Scale.String()[:1])+r.Scale.String()[1:], seeds, r.Summary())
	switch {
	case r.Scale == Smoke:
		s += " A smoke run shows that it runs; claims are judged at full scale."
	case len(r.Seeds) < MinSeeds:
		s += fmt.Sprintf(" Fewer than %d seeds: take the verdicts with care.", MinSeeds)
	}
	return s
}

func (r *Result) claims() report.Claims { return ClaimsSection(r.Verdicts) }

// ClaimsSection lays verdicts out as a section of a report.
func ClaimsSection(verdicts []Verdict) report.Claims {
	c := report.Claims{Note: "A claim holds when the whole 95 % interval over the seeds satisfies its bound, fails when none of it does, and is undecided otherwise."}
	for _, v := range verdicts {
		item := report.Claim{
			ID: v.ID, Text: v.Text, Paper: v.Paper, Verdict: string(v.Outcome), Reason: v.Reason, Measured: float64(v.Mean),
			Low: float64(v.Low), High: float64(v.High), Bound: v.Bound.String(), Margin: float64(v.Margin), Unit: v.Unit,
		}
		for _, x := range v.Values {
			item.Seeds = append(item.Seeds, float64(x))
		}
		c.Items = append(c.Items, item)
	}
	return c
}

// tables sets the arms against their metrics. Metrics that the same arms have stand in one table, of at most five metrics,
// and a table leaves out the arms that have none of its metrics.
func (r *Result) tables() (tables []report.Table) {
	type group struct{ metrics, arms []string }
	var groups []*group
	has := map[string][]string{} // metric -> arms
	var names []string
	for _, a := range r.Arms {
		for _, m := range a.Metrics {
			if has[m.Name] == nil {
				names = append(names, m.Name)
			}
			has[m.Name] = append(has[m.Name], a.Name)
		}
	}
	const columns = 5
	for _, name := range names {
		fits := func(g *group) bool {
			for _, a := range has[name] {
				if !slices.Contains(g.arms, a) {
					return false
				}
			}
			return len(g.metrics) < columns
		}
		if i := slices.IndexFunc(groups, fits); i >= 0 {
			groups[i].metrics = append(groups[i].metrics, name)
		} else {
			groups = append(groups, &group{[]string{name}, has[name]})
		}
	}
	baselines := false
	for i, g := range groups {
		t := report.Table{Columns: append([]string{"arm"}, g.metrics...)}
		if i == 0 {
			t.Title = "What the arms measured"
		}
		for _, a := range r.Arms {
			if !slices.Contains(g.arms, a.Name) {
				continue
			}
			row := []string{a.Name}
			if a.Baseline {
				row[0] += "°"
				baselines = true
			}
			for _, name := range g.metrics {
				cell := ""
				if m := a.metric(name); m != nil {
					if cell = report.Number(float64(m.Mean)); finite(float64(m.SD)) && m.SD != 0 {
						cell += " ± " + report.Number(roundTo(float64(m.SD), 2))
					}
				}
				row = append(row, cell)
			}
			t.Rows = append(t.Rows, row)
		}
		tables = append(tables, t)
	}
	if n := len(tables); n > 0 {
		var notes []string
		if baselines {
			notes = append(notes, "° baseline.")
		}
		if len(r.Seeds) > 1 {
			notes = append(notes, "Mean ± standard deviation over the seeds; without ±, the same at every seed.")
		}
		tables[n-1].Note = strings.Join(notes, " ")
	}
	return tables
}

// roundTo keeps n significant digits.
func roundTo(v float64, n int) float64 {
	if v == 0 || !finite(v) {
		return v
	}
	scale := math.Pow(10, float64(n-1)-math.Floor(math.Log10(math.Abs(v))))
	return math.Round(v*scale) / scale
}

func (a *ArmResult) metric(name string) *MetricResult {
	for i := range a.Metrics {
		if a.Metrics[i].Name == name {
			return &a.Metrics[i]
		}
	}
	return nil
}

// trade is the accuracy-size picture: the first of a few quality metrics over bytes, for the arms that have both.
func (r *Result) trade() (s report.Scatter, ok bool) {
	for _, quality := range []string{"accuracy", "psnr", "agreement", "ap"} {
		s = report.Scatter{Title: quality + " over size", XLabel: "bytes", YLabel: quality, LogX: true, Frontier: true}
		for _, a := range r.Arms {
			q, b := a.metric(quality), a.metric("bytes")
			if q == nil || b == nil || !finite(float64(q.Mean)) || !(float64(b.Mean) > 0) {
				continue
			}
			mark := report.Mark{Label: a.Name, Group: "method", X: float64(b.Mean)}
			if a.Baseline {
				mark.Group = "baseline"
			}
			mark.Y, mark.YLow, mark.YHigh = spread(q.Values)
			s.Points = append(s.Points, mark)
		}
		if len(s.Points) > 1 {
			return s, true
		}
	}
	return report.Scatter{}, false
}

// curves draws each series with one line per arm: the mean over the seeds, with the range of the seeds as its band.
func (r *Result) curves() (curves []report.Curve) {
	var names []string
	for _, u := range r.units {
		for _, p := range u.series {
			if !slices.Contains(names, p.Name) {
				names = append(names, p.Name)
			}
		}
	}
	for _, name := range names {
		c := report.Curve{Title: name, XLabel: "step", YLabel: name}
		// "accuracy/kept": the part after the slash names the x axis.
		if y, x, found := strings.Cut(name, "/"); found {
			c.Title, c.YLabel, c.XLabel = y+" over "+x, y, x
		}
		for j, arm := range r.Arms {
			var xs []float64
			at := map[float64][]float64{}
			for _, u := range r.units {
				if u.arm != j {
					continue
				}
				for _, p := range u.series {
					if p.Name == name {
						if _, seen := at[p.X]; !seen {
							xs = append(xs, p.X)
						}
						at[p.X] = append(at[p.X], p.Y)
					}
				}
			}
			if len(xs) == 0 {
				continue
			}
			slices.Sort(xs)
			line := report.Line{Name: arm.Name, X: xs, Dashed: arm.Baseline}
			several := false
			for _, x := range xs {
				sum := 0.
				for _, y := range at[x] {
					sum += y
				}
				line.Y = append(line.Y, sum/float64(len(at[x])))
				line.Low = append(line.Low, slices.Min(at[x]))
				line.High = append(line.High, slices.Max(at[x]))
				several = several || len(at[x]) > 1
			}
			if !several {
				line.Low, line.High = nil, nil
			}
			c.Lines = append(c.Lines, line)
		}
		if len(r.Seeds) > 1 {
			c.Note = "Mean of the seeds; the band is their range."
		}
		curves = append(curves, c)
	}
	return curves
}

// pictures shows those of the first seed: all arms' pictures of one name side by side.
func (r *Result) pictures() (sections []report.Images) {
	var names []string
	for _, u := range r.units {
		for _, b := range u.images {
			if u.seed == r.Seeds[0] && !slices.Contains(names, b.Name) {
				names = append(names, b.Name)
			}
		}
	}
	for _, name := range names {
		s := report.Images{Title: name}
		for j, arm := range r.Arms {
			for _, u := range r.units {
				if u.arm != j || u.seed != r.Seeds[0] {
					continue
				}
				for _, b := range u.images {
					if b.Name == name {
						s.Pictures = append(s.Pictures, report.Picture{Caption: arm.Name, PNG: b.Content})
					}
				}
			}
		}
		sections = append(sections, s)
	}
	return sections
}

func (r *Result) facts() []report.Fact {
	e := r.Environment
	seeds := make([]string, len(r.Seeds))
	for i, s := range r.Seeds {
		seeds[i] = fmt.Sprint(s)
	}
	facts := []report.Fact{
		{Name: "Command", Value: quoteCommand(r.Command)},
		{Name: "Seeds", Value: strings.Join(seeds, ", ")},
		{Name: "Time", Value: fmt.Sprintf("%s s for all arms and seeds, started on %s", report.Number(roundTo(r.Seconds, 3)), r.Date)},
		{Name: "Processor", Value: fmt.Sprintf("%s, %d cores, %d threads (%s)", e.CPU, e.Cores, e.Threads, strings.Join(e.Features, " "))},
		{Name: "System", Value: fmt.Sprintf("%s/%s, %s", e.OS, e.Arch, e.GoVersion)},
		{Name: "Backend", Value: e.Backend},
		{Name: "Lathe", Value: strings.TrimSpace(e.Version + " " + e.Commit)},
	}
	if r.Recipe != nil {
		facts = append(facts, report.Fact{Name: "Recipe", Value: string(r.Recipe)})
	}
	return slices.DeleteFunc(facts, func(f report.Fact) bool { return f.Value == "" })
}

package main

import (
	"context"
	"fmt"
	"io"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/lab/report"
	"github.com/lathe-ml/lathe/nn"
)

// compressPlan is what --dry-run prints: estimates, but for the sizes.
type compressPlan struct {
	Model            string             `json:"model"`
	Estimate         bool               `json:"estimate"` // always: nothing has been compressed
	Recipe           *compress.Recipe   `json:"recipe,omitempty"`
	Runs             int                `json:"runs"` // of methods; more than one in a search
	Forecast         *compress.Forecast `json:"forecast"`
	Batch            int                `json:"batch"`
	CalibrationCases int                `json:"calibration_cases"`
	JudgedCases      int                `json:"judged_cases"`
	CaseSeconds      float64            `json:"measured_seconds_per_case"` // of the float network, timed
	Seconds          float64            `json:"seconds"`                   // 0: not known for a method
	Unknown          []string           `json:"methods_without_estimate,omitempty"`
	MaxMemory        int64              `json:"max_memory,omitempty"`
	Notes            []string           `json:"notes,omitempty"`
}

// plan forecasts the recipes' runs, of which a search has several, and makes the batch fit --max-memory.
func (c *compression) plan(ctx context.Context, m *material, recipes []*compress.Recipe) (*compressPlan, error) {
	p := &compressPlan{Model: c.model, Estimate: true, Runs: len(recipes), CalibrationCases: m.examples.Len(), JudgedCases: m.judged.n, MaxMemory: c.memory}
	if len(recipes) == 1 {
		p.Recipe = recipes[0]
	}
	for i, r := range recipes {
		sites, err := r.Assign(m.net)
		if err != nil {
			return nil, err
		}
		bits := map[string]compress.Bits{}
		for k, s := range r.Steps {
			for name := range sites[k] {
				bits[name] = compress.Options{Bits: s.Sites}.BitsOf(name, compress.Bits{Weight: s.Bits, Act: s.ActBits})
			}
		}
		f, err := compress.ForecastBits(m.net, bits)
		if err != nil {
			return nil, err
		}
		if i == 0 || f.Bytes < p.Forecast.Bytes {
			p.Forecast = f
		}
	}
	if err := c.fit(m, recipes, p); err != nil {
		return nil, err
	}
	p.Batch = m.batch
	if err := c.forecastTime(ctx, m, recipes, p); err != nil {
		return nil, err
	}
	return p, nil
}

// needs forecasts the memory of the heaviest step: three networks (as given, folded, compressed), and the packed weights of
// the two that are run side by side; the examples; and what the step's method holds.
func (m *material) needs(recipes []*compress.Recipe, batch, calibration int) (compress.MemoryForecast, *compressor, error) {
	row := int64(0) // bytes of a case
	for _, in := range m.net.Inputs {
		row += in.Shape.ByteSize() / int64(max(in.Shape.Dimensions[0], 1))
	}
	load := compress.Load{Networks: 6, Cases: max(batch, 1), Judged: m.judged.n, Examples: m.calib.held + row*int64(calibration+min(m.part(), m.judged.n))}
	if m.judged.source != m.calib.source {
		load.Examples += m.judged.held
	}
	var worst compress.MemoryForecast
	var heaviest *compressor
	for _, r := range recipes {
		sites, err := r.Assign(m.net)
		if err != nil {
			return worst, nil, err
		}
		for i, s := range r.Steps {
			c, err := findCompressor(s.Method)
			if err != nil {
				return worst, nil, err
			}
			load.Method = 0
			method := c.method(s, compress.Options{Select: func(n *nn.Node) bool { return sites[i][n.Name] }}, batch, nil)
			if h, ok := method.(compress.Holder); ok {
				load.Method, err = h.Holds(m.net, max(calibration, 1))
			} else if c.atOnce {
				load.Method, err = compress.WalkPairsBytes(m.net, max(calibration, 1))
			}
			if err != nil {
				return worst, nil, err
			}
			f, err := compress.Memory(m.net, load)
			if err != nil {
				return worst, nil, err
			}
			if heaviest == nil || f.Live > worst.Live {
				worst, heaviest = f, c
			}
		}
	}
	return worst, heaviest, nil
}

// uncounted is what a process takes beside what Go's limit counts: the program's own pages, and what is allocated until a
// collection that the limit has begun is through.
const uncounted = 64_000_000

// limitMemory makes Go collect garbage more often than be killed: under --max-memory, or else when the heap comes near to
// what is available.
func (c *compression) limitMemory() {
	limit := c.memory - min(c.memory/4, uncounted)
	if limit == 0 {
		limit = engine.AvailableMemory() / 10 * 8
	}
	if limit > 0 {
		debug.SetMemoryLimit(limit)
	}
}

// fit forecasts the memory and, under --max-memory, takes the largest batch that fits, or refuses.
func (c *compression) fit(m *material, recipes []*compress.Recipe, p *compressPlan) error {
	calibration := m.examples.Len()
	first, row, err := m.needs(recipes, m.batch, calibration)
	if err != nil {
		return err
	}
	p.Forecast.Memory = first
	if c.memory == 0 || first.Least <= c.memory {
		return nil
	}
	for batch := m.batch / 2; batch >= 1; batch /= 2 {
		f, _, err := m.needs(recipes, batch, calibration)
		if err != nil {
			return err
		}
		if f.Least <= c.memory {
			note := fmt.Sprintf("the batch is %d instead of %d, to stay within --max-memory %s", batch, m.batch, c.maxMemory)
			c.note("%s", note)
			p.Notes = append(p.Notes, note)
			m.batch, p.Forecast.Memory = batch, f
			return nil
		}
	}
	remedy := ""
	for n := calibration / 2; n >= 1; n /= 2 {
		if f, _, err := m.needs(recipes, 1, n); err == nil && f.Least <= c.memory {
			remedy = fmt.Sprintf("; --calib-cases %d would fit", n)
			break
		}
	}
	return fmt.Errorf("%s: %s would need about %s (%s of parameters, %s of activations, %s of examples), and --max-memory is %s%s; nothing was done",
		c.model, row.name, report.Bytes(first.Least), report.Bytes(first.Parameters), report.Bytes(first.Activations), report.Bytes(first.Examples), c.maxMemory, remedy)
}

// forecastTime times the float network on a few cases and scales.
func (c *compression) forecastTime(ctx context.Context, m *material, recipes []*compress.Recipe, p *compressPlan) error {
	if !c.dryRun {
		return nil
	}
	e, err := compress.NewEvaluator(m.backend, m.net, m.batch)
	if err != nil {
		return err
	}
	defer e.Close()
	x, err := m.judged.load(data.Range(min(m.judged.n, m.batch)))
	if err != nil {
		return err
	}
	start := time.Now()
	var compile, pass time.Duration
	for i := range 3 {
		begun := time.Now()
		if _, _, err := e.Outputs(ctx, x); err != nil {
			return err
		}
		switch took := time.Since(begun); {
		case i == 0:
			compile = took
		case i == 1 || took < pass:
			pass = took
		}
		if time.Since(start) > 20*time.Second && i > 0 {
			break
		}
	}
	p.CaseSeconds = pass.Seconds() / float64(m.batch) // a pass is always of a whole batch
	compiling := max(0, (compile - pass).Seconds())
	for _, r := range recipes {
		for _, s := range r.Steps {
			row, err := findCompressor(s.Method)
			if err != nil {
				return err
			}
			if row.passes == 0 {
				p.Unknown = append(p.Unknown, s.Method)
			}
			p.Seconds += row.passes*p.CaseSeconds*float64(max(p.CalibrationCases, 1)) + compiling
			if row.atOnce { // it runs node by node, each compiled on its own
				p.Seconds += 3 * compiling
			}
		}
		p.Seconds += 2 * (p.CaseSeconds*float64(p.JudgedCases) + compiling)
	}
	if len(p.Unknown) > 0 {
		p.Seconds = 0
	}
	return nil
}

func (p *compressPlan) write(w io.Writer) error {
	t := report.Table{Title: "Dry run of " + p.Model + ": nothing was written", Columns: []string{"site", "kind", "weight", "weight bits", "input bits", "float", "bytes", "of float", "multiply-adds"}}
	for _, s := range p.Forecast.Sites {
		t.Rows = append(t.Rows, []string{
			s.Name, s.Kind, dimensions(s.Shape), strconv.Itoa(s.WeightBits), strconv.Itoa(s.ActBits), report.Bytes(s.FloatBytes), report.Bytes(s.Bytes),
			pct(float64(s.Bytes) / float64(max(s.FloatBytes, 1))), strconv.FormatInt(s.MACs, 10),
		})
	}
	f := p.Forecast
	t.Note = "Sizes of codes with a scale and a zero point for each output channel. Memory and time are estimates: memory counts what is alive at once in the heaviest phase, and what Go leaves to collect; time scales a pass of the float network that was timed."
	if err := report.WriteTable(w, t, 0); err != nil {
		return err
	}
	fmt.Fprintf(w, "\nparameters    %s, now %s (%s)\n", report.Bytes(f.Bytes), report.Bytes(f.FloatBytes), pct(float64(f.Bytes)/float64(max(f.FloatBytes, 1))))
	fmt.Fprintf(w, "memory        about %s alive at once: %s of parameters, %s of activations at a batch of %d, %s of examples\n",
		report.Bytes(f.Memory.Live), report.Bytes(f.Memory.Parameters), report.Bytes(f.Memory.Activations), p.Batch, report.Bytes(f.Memory.Examples))
	fmt.Fprintf(w, "              the process grows to about %s, or %s with --max-memory, and no further than four fifths of what is available\n", report.Bytes(f.Memory.Total), report.Bytes(f.Memory.Least))
	switch {
	case len(p.Unknown) > 0:
		fmt.Fprintf(w, "time          not known for %s; a case takes %s ms in the float network\n", strings.Join(p.Unknown, ", "), report.Number(1e3*p.CaseSeconds))
	default:
		fmt.Fprintf(w, "time          about %s s for %d runs: %d calibration and %d judged cases at %s ms each\n", report.Number(p.Seconds), p.Runs, p.CalibrationCases, p.JudgedCases, report.Number(1e3*p.CaseSeconds))
	}
	for _, n := range p.Notes {
		fmt.Fprintln(w, n)
	}
	return nil
}

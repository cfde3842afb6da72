package main

import (
	"context"
	"fmt"
	"math"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/lab/report"
	"github.com/lathe-ml/lathe/nn"
)

// blameCases is the number of judged cases that blame is measured on, and blameSeconds what it may take without being asked
// for.
const (
	blameCases   = 32
	blameSeconds = 20.
)

// outputsOf runs a network over the judged cases, a part at a time. It returns the first output of all cases, the width of
// the rows in which it is compared, and the seconds of a case.
func (c *compression) outputsOf(ctx context.Context, m *material, net *nn.Network, bar *progressBar) (values []float32, width int, perCase float64, err error) {
	e, err := compress.NewEvaluator(m.backend, net, m.batch)
	if err != nil {
		return nil, 0, 0, err
	}
	defer e.Close()
	part := m.part()
	cs := m.judged
	var seconds []float64
	for from := 0; from < cs.n; from += part {
		x, err := cs.load(data.Range(cs.n)[from:min(from+part, cs.n)])
		if err != nil {
			return nil, 0, 0, err
		}
		start := time.Now()
		v, _, err := e.Outputs(ctx, x)
		if err != nil {
			return nil, 0, 0, err
		}
		seconds = append(seconds, time.Since(start).Seconds()/float64(x.Len()))
		if values == nil {
			values = make([]float32, 0, len(v)/x.Len()*cs.n)
		}
		values = append(values, v...)
		bar.Set(min(from+part, cs.n), cs.n)
	}
	sh, err := net.Shapes(1)
	if err != nil {
		return nil, 0, 0, err
	}
	return values, compress.RowWidth(sh[net.Outputs[0]].Dimensions), slices.Min(seconds), nil // the first part compiles
}

// part is how many judged cases are loaded at once.
func (m *material) part() int { return max(m.batch, 256/m.batch*m.batch) }

// judge runs both networks over the judged cases and compares them. It returns the seconds of a case in the float network.
func (c *compression) judge(ctx context.Context, m *material, compressed *nn.Network, r *compressResult) (perCase float64, err error) {
	bar := c.progress("comparing")
	defer bar.Close()
	want, width, perCase, err := c.outputsOf(ctx, m, m.net, bar)
	if err != nil {
		return 0, err
	}
	got, _, _, err := c.outputsOf(ctx, m, compressed, bar)
	if err != nil {
		return 0, err
	}
	q, err := compress.Judge(want, got, m.judged.n, width, m.labels)
	if err != nil {
		if c.labels != "" {
			err = fmt.Errorf("%s: %w", c.labels, err)
		}
		return 0, err
	}
	r.Agreement, r.Bars, r.Accuracy = q.Agreement, q.Bars, q.Accuracy
	r.Embedding = compress.Directions(m.net, want, width)
	if c.saveInputs != "" {
		if err := saveInputs(c.saveInputs, m); err != nil {
			return 0, err
		}
	}
	if c.saveOuts != "" {
		return perCase, data.WriteNPYFile(c.saveOuts, []int{m.judged.n, len(got) / m.judged.n}, got)
	}
	return perCase, nil
}

// saveInputs writes the judged inputs, the further ones of a network of several as PATH.1.npy and so on.
func saveInputs(path string, m *material) error {
	x, err := m.judged.load(data.Range(m.judged.n))
	if err != nil {
		return err
	}
	for i, t := range x {
		to := path
		if i > 0 {
			to = fmt.Sprintf("%s.%d%s", strings.TrimSuffix(path, filepath.Ext(path)), i, filepath.Ext(path))
		}
		var values any
		switch t.DType() {
		case dtypes.Int32:
			values = tensors.MustCopyFlatData[int32](t)
		case dtypes.Int64:
			values = tensors.MustCopyFlatData[int64](t)
		case dtypes.Uint8:
			values = tensors.MustCopyFlatData[uint8](t)
		default:
			values = nn.Floats(t)
		}
		if err := data.WriteNPYFile(to, t.Shape().Dimensions, values); err != nil {
			return err
		}
	}
	return nil
}

// blameSites measures what each site alone costs the output, when that is asked for or takes seconds.
func (c *compression) blameSites(ctx context.Context, m *material, res *compress.Result, perCase float64, journal *compress.Journal, r *compressResult) error {
	n := min(blameCases, m.judged.n)
	// Half a pass for each site, and a compilation, of which most of the time goes into small networks.
	if predicted := float64(len(res.Sites)) * (.1 + .6*float64(n)*perCase); c.blame == "off" || c.blame == "auto" && predicted > blameSeconds {
		if c.blame == "auto" {
			r.Notes = append(r.Notes, fmt.Sprintf("blame per site was left out, since it would take about %.0f s; --blame on measures it", predicted))
		}
		return nil
	}
	seed := c.seed
	if r.Recipe != nil {
		seed = r.Recipe.Seed
	}
	x, err := m.judged.load(drawCases(m.judged.n, n, seed))
	if err != nil {
		return err
	}
	sub, err := journal.Sub("blame")
	if err != nil {
		return err
	}
	bar := c.progress("blaming")
	defer bar.Close()
	r.Blame, err = compress.Blamer{Batch: min(m.batch, n), Journal: sub, Progress: func(s compress.Step) { bar.Set(s.Done, s.Total) }}.Measure(ctx, m.backend, res.Reference, res.Network, x)
	if err != nil {
		return fmt.Errorf("%s: blame: %w", c.model, err)
	}
	r.BlameCases = n
	return nil
}

func pct(v float64) string { return report.Number(100*v) + " %" }

// document lays the result out as a report.
func (r *compressResult) document(args []string) *report.Document {
	within := func(b compress.Interval, scale float64) string {
		return fmt.Sprintf("%s to %s", report.Number(scale*b.Low), report.Number(scale*b.High))
	}
	mixed := ""
	if len(r.Recipe.Steps) > 1 || len(r.Recipe.Steps[0].Sites) > 0 {
		mixed = " (mixed)"
	}
	d := &report.Document{Title: fmt.Sprintf("%s in %d-bit weights and %d-bit activations%s", filepath.Base(r.Model), r.WeightBits, r.ActBits, mixed)}
	if r.ActBits == 32 {
		d.Title = fmt.Sprintf("%s in %d-bit weights%s", filepath.Base(r.Model), r.WeightBits, mixed)
	}
	ratio := float64(r.Size.FloatParameters) / float64(max(r.Size.Parameters, 1))
	d.Subtitle = fmt.Sprintf("%s makes the parameters %.1f times smaller (%s to %s)", r.Method, ratio, report.Bytes(r.Size.FloatParameters), report.Bytes(r.Size.Parameters))
	if r.Embedding {
		d.Subtitle += fmt.Sprintf("; outputs have a cosine of %s with the original's.", report.Number(r.Agreement.Cosine))
	} else {
		d.Subtitle += fmt.Sprintf(" and answers as before in %s of %d cases.", pct(r.Agreement.Top1), r.Agreement.Cases)
	}
	t := report.Table{Title: "Result", Columns: []string{"", "original", "compressed", "95 % interval"}, Rows: [][]string{
		{"parameters", report.Bytes(r.Size.FloatParameters), report.Bytes(r.Size.Parameters), ""},
		{"file", report.Bytes(r.Size.InputFile), report.Bytes(r.Size.OutputFile), ""},
	}}
	if a := r.Accuracy; a != nil {
		t.Rows = append(t.Rows,
			[]string{"accuracy", fmt.Sprintf("%s (%s)", pct(a.Float), within(a.FloatBar, 100)), pct(a.Compressed), within(a.CompressedBar, 100)},
			[]string{"accuracy lost, points", "", report.Number(100 * a.Drop), within(a.DropBar, 100)})
		d.Subtitle += fmt.Sprintf(" Accuracy: %s before, %s after.", pct(a.Float), pct(a.Compressed))
	}
	if !r.Embedding {
		t.Rows = append(t.Rows, []string{"same class as the original", "", pct(r.Agreement.Top1), within(r.Bars.Top1, 100)})
	}
	t.Rows = append(t.Rows,
		[]string{"cosine of outputs", "", report.Number(r.Agreement.Cosine), within(r.Bars.Cosine, 1)})
	if !r.Embedding {
		t.Rows = append(t.Rows, []string{"KL divergence, nats", "", report.Number(r.Agreement.KL), within(r.Bars.KL, 1)})
	}
	t.Rows = append(t.Rows,
		[]string{"mean squared difference of outputs", "", report.Number(r.Agreement.MSE), ""})
	t.Note = fmt.Sprintf("Judged on %d cases of %s. Parameters are counted as packed codes with their scales; the original in float32. Intervals of shares are Wilson's, the others come from resampling the cases.", r.Agreement.Cases, r.Evaluation)
	if r.Evaluation == r.Calibration && r.CalibrationCases > 0 {
		t.Note += " The calibration cases are among them; --eval takes others."
	}
	if r.Embedding {
		t.Note += " The outputs are directions, not classes: the cosine is the figure to read."
	}
	d.Add(t)
	if r.Search != nil {
		d.Add(r.Search.sections()...)
	} else {
		quality, bar, high, label := r.quality()
		d.Add(report.Scatter{
			Title: "Size and quality", XLabel: "parameters, bytes", YLabel: label,
			Points: []report.Mark{
				{Label: "original", Group: "original", X: float64(r.Size.FloatParameters), Y: 100 * high, YLow: 100 * high, YHigh: 100 * high},
				{Label: fmt.Sprintf("%s W%dA%d", r.Method, r.WeightBits, r.ActBits), Group: "compressed", X: float64(r.Size.Parameters), Y: 100 * quality, YLow: 100 * bar.Low, YHigh: 100 * bar.High},
			},
		})
	}
	r.addBlame(d)
	bars := report.Bars{Title: "Error of each layer's output", Note: "‖y_q − y‖²/‖y‖² on the calibration cases, with everything before it compressed too", Log: true}
	sites := report.Table{Title: "Layers", Columns: []string{"layer", "kind", "weight", "weight bits", "input bits", "bytes", "of float", "weight error", "output error", "input"}}
	for _, s := range r.Sites {
		if s.OutputErr > 0 && s.OutputErr < math.MaxFloat64 {
			bars.Items = append(bars.Items, report.Bar{Label: s.Name, Group: s.Kind, Value: s.OutputErr})
		}
		sites.Rows = append(sites.Rows, []string{
			s.Name, s.Kind, dimensions(s.Shape), strconv.Itoa(s.WeightBits), strconv.Itoa(s.InputBits), strconv.FormatInt(s.Bytes, 10),
			pct(float64(s.Bytes) / float64(max(s.FloatBytes, 1))), report.Number(s.WeightErr), report.Number(s.OutputErr), s.Note,
		})
	}
	if len(bars.Items) > 0 {
		d.Add(bars)
	}
	d.Add(sites)
	if len(r.Notes) > 0 {
		d.Add(report.Text{Title: "Notes", Paragraphs: r.Notes})
	}
	d.Facts = []report.Fact{
		{Name: "Command", Value: "lathe " + strings.Join(args, " ")},
		{Name: "Calibration", Value: fmt.Sprintf("%d cases of %s", r.CalibrationCases, r.Calibration)},
		{Name: "Recipe", Value: r.RecipeFile},
		{Name: "Backend", Value: r.Backend},
		{Name: "Seconds", Value: report.Number(r.Seconds)},
	}
	return d
}

// quality is the figure that counts, in [0, 1], its interval, that of the original, and its name.
func (r *compressResult) quality() (v float64, bar compress.Interval, original float64, label string) {
	switch {
	case r.Accuracy != nil:
		return r.Accuracy.Compressed, r.Accuracy.CompressedBar, r.Accuracy.Float, "accuracy, %"
	case r.Embedding:
		return r.Agreement.Cosine, r.Bars.Cosine, 1, "cosine with the original, %"
	}
	return r.Agreement.Top1, r.Bars.Top1, 1, "agreement with the original, %"
}

// addBlame adds the sites that hurt most.
func (r *compressResult) addBlame(d *report.Document) {
	if len(r.Blame) == 0 {
		return
	}
	bars := report.Bars{Title: "What each site alone costs", Unit: "nats", Log: true, Note: fmt.Sprintf("KL divergence of the output on %d cases when this site alone is quantised and all else is in float", r.BlameCases)}
	t := report.Table{Title: "Sites that hurt most", Columns: []string{"site", "KL, nats", "same class", "cosine", "left out, it would cost"}}
	if r.Embedding {
		t.Columns[2] = ""
	}
	for i, b := range r.Blame {
		if i < 24 && b.KL > 0 {
			bars.Items = append(bars.Items, report.Bar{Label: b.Site, Value: b.KL})
		}
		if i < 12 {
			row := []string{b.Site, report.Number(b.KL), pct(b.Top1), report.Number(b.Cosine), report.Bytes(b.Bytes)}
			if r.Embedding {
				row[2] = ""
			}
			if b.Note != "" {
				row[1], row[2], row[3] = "–", "", ""
			}
			t.Rows = append(t.Rows, row)
		}
	}
	worst := r.Blame[0]
	t.Note = fmt.Sprintf("Leave one out with --exclude '%s'; all sites are in the JSON of --json.", worst.Site)
	d.Add(t)
	if len(bars.Items) > 0 {
		d.Add(bars)
	}
}

// dimensions writes a shape, 3×3×16.
func dimensions(shape []int) string {
	var dims []string
	for _, v := range shape {
		dims = append(dims, strconv.Itoa(v))
	}
	return strings.Join(dims, "×")
}

package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/lathe-ml/lathe/adapt/calibrate"
	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/internal/atomicfile"
	"github.com/lathe-ml/lathe/internal/metric"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/internal/stat"
	"github.com/lathe-ml/lathe/lab/report"
)

type calibrateFlags struct {
	test, apply, input, output, report string
	bins, bootstrap                    int
	split, temperature                 float64
	seed                               uint64
}

// inputKinds are what a file of scores may hold.
var inputKinds = []string{"auto", "logits", "probabilities"}

func newCalibrateCommand(a *app) *cobra.Command {
	var f calibrateFlags
	cmd := &cobra.Command{
		Use:   "calibrate LOGITS LABELS",
		Short: "Make a classifier's probabilities mean what they say, and see whether they do",
		Long: `Fit a temperature to the logits of held-out cases (arXiv:1706.04599): all logits are divided by one number, which
changes how sure the predictions are and not what they are. Printed are the figures of calibration before and after,
with 95 % intervals from resampling the cases, and the reliability diagram.

Where classes overlap (ambiguous cases, wrong labels) one temperature cannot be enough, the less so the more classes
there are (arXiv:2306.00740). The command looks for that case and says so.

LOGITS is [cases, classes] as .npy, or .csv with a case on each line and, if it has one, a first line that names the
classes; - reads standard input. Probabilities do as well as logits. LABELS holds the class of each case: integers as
.npy, or .csv with one label a line, or lines of row,label. Labels are numbers from 0, or names if LOGITS names its
classes.

A temperature measured on the cases that it was fitted to looks slightly too good. --split 0.5 fits on a random half
and measures on the other; --test TESTLOGITS TESTLABELS measures on other files.

-o writes the calibrated probabilities: of the --apply file if given, else of the --test file, else of LOGITS.`,
		Example: `  lathe calibrate logits.npy labels.npy
  lathe calibrate logits.npy labels.npy --split 0.5 --report calibration.html
  lathe calibrate val.npy val-labels.npy --test test.npy test-labels.npy
  lathe calibrate val.npy val-labels.npy --apply new.npy -o probabilities.npy
  lathe calibrate scores.csv labels.csv --json | jq .temperature`,
		Args: cobra.ArbitraryArgs,
		RunE: func(_ *cobra.Command, args []string) error { return runCalibrate(a, args, f) },
	}
	fl := cmd.Flags()
	fl.StringVar(&f.test, "test", "", "measure on these logits instead, followed by their labels: --test LOGITS LABELS")
	fl.Float64Var(&f.split, "split", 0, "share of the cases to fit on, between 0 and 1; the others are measured on (0: fit and measure on all)")
	fl.StringVar(&f.apply, "apply", "", "logits of further cases, without labels, whose probabilities -o writes")
	fl.StringVarP(&f.output, "output", "o", "", "write calibrated probabilities here, .npy or .csv; - writes CSV to standard output")
	fl.StringVar(&f.report, "report", "", "write a page with the reliability diagrams to this HTML file")
	fl.StringVar(&f.input, "input", "auto", "what LOGITS holds: "+strings.Join(inputKinds, ", ")+" (auto: probabilities if all rows are)")
	fl.Float64Var(&f.temperature, "temperature", 0, "use this temperature instead of fitting one")
	fl.IntVar(&f.bins, "bins", 15, "bins of confidence, 1 to 1000")
	fl.IntVar(&f.bootstrap, "bootstrap", -1, "resamples for the intervals, 0 for none (default: 1000, down to 100 for many cases)")
	fl.Uint64Var(&f.seed, "seed", 0, "of the split and the resamples")
	_ = cmd.RegisterFlagCompletionFunc("input", cobra.FixedCompletions(inputKinds, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// testLabels takes the file that follows --test LOGITS out of the arguments, wherever --test stands.
func (f calibrateFlags) testLabels(given, args []string) (labels string, rest []string, err error) {
	if f.test == "" {
		return "", args, nil
	}
	for i, g := range given {
		at := -1
		switch {
		case g == "--test" && i+1 < len(given):
			at = i + 2
		case strings.HasPrefix(g, "--test="):
			at = i + 1
		case g == "--":
			return "", nil, usageErrorf("--test needs two files, LOGITS and LABELS")
		default:
			continue
		}
		if at < len(given) {
			if k := slices.Index(args, given[at]); k >= 0 {
				return given[at], slices.Delete(slices.Clone(args), k, k+1), nil
			}
		}
		break
	}
	return "", nil, usageErrorf("--test needs two files, LOGITS and LABELS")
}

func (f calibrateFlags) check() error {
	switch {
	case !slices.Contains(inputKinds, f.input):
		return usageErrorf("--input %q; accepted: %s", f.input, strings.Join(inputKinds, ", "))
	case !(f.split >= 0 && f.split < 1):
		return usageErrorf("--split %g; it lies between 0 and 1", f.split)
	case f.split > 0 && f.test != "":
		return usageErrorf("--split and --test exclude each other: both say what is measured on")
	case f.temperature < 0 || math.IsNaN(f.temperature) || math.IsInf(f.temperature, 0):
		return usageErrorf("--temperature %g; it must be above 0", f.temperature)
	case f.split > 0 && f.temperature > 0:
		return usageErrorf("--split has nothing to fit when --temperature is given")
	case f.bins < 1 || f.bins > 1000:
		return usageErrorf("--bins %d; it must be 1 to 1000", f.bins)
	case f.bootstrap < -1 || f.bootstrap > 100_000:
		return usageErrorf("--bootstrap %d; it must be 0 to 100000", f.bootstrap)
	case f.apply != "" && f.output == "":
		return usageErrorf("--apply needs -o, where its probabilities are written to")
	}
	switch ext := strings.ToLower(filepath.Ext(f.output)); {
	case f.output == "" || f.output == "-" || ext == ".npy" || ext == ".csv":
	default:
		return usageErrorf("-o %s: probabilities are written as .npy or .csv", f.output)
	}
	return nil
}

// scores are logits [n, classes] as read from a file.
type scores struct {
	path    string
	z       []float32
	n       int
	classes int
	names   []string // of the classes, if the file names them
	// Of a file of probabilities, logits are their logarithms.
	probabilities bool
	clipped       int // probabilities too small for a logarithm
}

// calibrateFigure is one figure before and after, with the 95 % intervals of both and of the change.
type calibrateFigure struct {
	Name     string      `json:"name"`
	Before   float64     `json:"before"`
	After    float64     `json:"after"`
	Interval *calibrateI `json:"interval,omitempty"`
}

type calibrateI struct {
	Before [2]float64 `json:"before"`
	After  [2]float64 `json:"after"`
	Change [2]float64 `json:"change"` // after − before
}

// calibrateReport is what calibrate prints as JSON.
type calibrateReport struct {
	Input       string  `json:"input"`
	Labels      string  `json:"labels"`
	Kind        string  `json:"kind"` // logits or probabilities
	Test        string  `json:"test,omitempty"`
	Classes     int     `json:"classes"`
	FittedOn    int     `json:"fitted_on"`   // cases
	MeasuredOn  int     `json:"measured_on"` // cases
	Held        bool    `json:"held_out"`    // none of the cases measured on was fitted on
	Temperature float64 `json:"temperature"`
	Separable   bool    `json:"separable"`
	Flat        bool    `json:"uninformative"`

	Figures []calibrateFigure `json:"figures"`
	// ECEIfCalibrated is the ECE that perfectly calibrated probabilities would show on as many cases, after scaling: the mean,
	// and what 95 % stay below.
	ECEIfCalibrated *[2]float64         `json:"ece_if_calibrated,omitempty"`
	Before          calibrate.Report    `json:"before"`
	After           calibrate.Report    `json:"after"`
	Diagnosis       calibrate.Diagnosis `json:"diagnosis"`
	Names           []string            `json:"class_names,omitempty"`
	Warnings        []string            `json:"warnings,omitempty"`
	Advice          string              `json:"advice,omitempty"`
	Output          string              `json:"output,omitempty"`
	Report          string              `json:"report,omitempty"`

	bands [2][][2]float64 // of the bins' accuracies, before and after
}

func runCalibrate(a *app, args []string, f calibrateFlags) error {
	testLabels, args, err := f.testLabels(a.args, args)
	if err != nil {
		return err
	}
	if len(args) != 2 {
		return usageErrorf("calibrate needs a file of logits and a file of labels, and got %d arguments", len(args))
	}
	if err := f.check(); err != nil {
		return err
	}
	if a.json && f.output == "-" {
		return usageErrorf("--json and -o - both write to standard output; name a file")
	}
	streams := 0
	for _, path := range []string{args[0], args[1], f.test, testLabels, f.apply} {
		if path == "-" {
			streams++
		}
		if path != "" && path == f.output && path != "-" {
			return usageErrorf("-o %s is one of the files that are read; write to another", path)
		}
	}
	if streams > 1 {
		return usageErrorf("standard input, -, can be one of the files only")
	}

	fit, err := readScores(a, args[0], f.input)
	if err != nil {
		return err
	}
	labels, err := readClasses(a, args[1], fit)
	if err != nil {
		return err
	}
	kind := "logits"
	if fit.probabilities {
		kind = "probabilities"
	}
	more := func(path string) (*scores, error) {
		s, err := readScores(a, path, kind)
		if err == nil && s.classes != fit.classes {
			err = fmt.Errorf("%s: has %d classes, and %s has %d", path, s.classes, args[0], fit.classes)
		}
		return s, err
	}
	r := &calibrateReport{Input: args[0], Labels: args[1], Kind: kind, Classes: fit.classes, Names: fit.names, Test: f.test, Output: f.output, Report: f.report}
	measured, measuredLabels, out := fit, labels, fit
	fitted, fittedLabels := fit, labels
	switch {
	case f.test != "":
		if measured, err = more(f.test); err != nil {
			return err
		}
		if measuredLabels, err = readClasses(a, testLabels, measured); err != nil {
			return err
		}
		out, r.Held = measured, true
	case f.split > 0:
		if fitted, fittedLabels, measured, measuredLabels, err = fit.split(labels, f.split, f.seed); err != nil {
			return err
		}
		r.Held = true
	}
	if f.apply != "" {
		if out, err = more(f.apply); err != nil {
			return err
		}
	}
	r.FittedOn, r.MeasuredOn = fitted.n, measured.n
	if f.temperature > 0 {
		r.Temperature, r.FittedOn, r.Held = f.temperature, 0, true
	} else {
		t, err := calibrate.FitTemperature(fitted.z, fitted.classes, fittedLabels)
		if err != nil {
			return fmt.Errorf("%s: %w", args[0], err)
		}
		r.Temperature, r.Separable, r.Flat = t.T, t.Separable, t.Uninformative
	}
	if err := r.measure(measured, measuredLabels, f); err != nil {
		return fmt.Errorf("%s: %w", measured.path, err)
	}
	r.warn(fit, out)
	if f.report != "" {
		if err := r.document(a.args).Save(f.report); err != nil {
			return err
		}
	}
	if f.output != "" {
		p, err := calibrate.Probabilities(out.z, out.classes, r.Temperature)
		if err != nil {
			return fmt.Errorf("%s: %w", out.path, err)
		}
		if err := writeProbabilities(a, f.output, p, out); err != nil {
			return err
		}
		if f.output == "-" {
			return r.print(a.stderr, a.width())
		}
	}
	return a.emit(r, func(w io.Writer) error { return r.print(w, a.width()) })
}

// measure computes all figures before and after scaling.
func (r *calibrateReport) measure(s *scores, labels []int, f calibrateFlags) error {
	bins := metric.Bins{Count: f.bins}
	resamples := f.bootstrap
	if resamples < 0 {
		resamples = min(1000, max(100, 50_000_000/s.n))
	}
	var c [2]metric.Calibration
	var boot [2][]metric.Calibration
	for i, t := range []float64{1, r.Temperature} {
		scored, err := metric.ScoreLogits(s.z, s.classes, labels, t)
		if err != nil {
			return err
		}
		if c[i], err = scored.Calibration(bins); err != nil {
			return err
		}
		// One seed: the same resamples before and after, so that their differences are paired.
		if boot[i], err = scored.Bootstrap(bins, resamples, rng.New(f.seed, "bootstrap")); err != nil {
			return err
		}
		if i == 1 && resamples > 0 {
			e, err := scored.ECEIfCalibrated(bins, resamples, rng.New(f.seed, "calibrated"))
			if err != nil {
				return err
			}
			r.ECEIfCalibrated = &[2]float64{stat.Mean(e), stat.Quantile(e, .95)}
		}
	}
	r.Before, r.After = c[0], c[1]
	for _, m := range []struct {
		name string
		of   func(metric.Calibration) float64
	}{
		{"accuracy", func(c metric.Calibration) float64 { return c.Accuracy }},
		{"nll", func(c metric.Calibration) float64 { return c.NLL }},
		{"brier", func(c metric.Calibration) float64 { return c.Brier }},
		{"ece", func(c metric.Calibration) float64 { return c.ECE }},
		{"adaptive_ece", func(c metric.Calibration) float64 { return c.AdaptiveECE }},
		{"ace", func(c metric.Calibration) float64 { return c.ACE }},
		{"mce", func(c metric.Calibration) float64 { return c.MCE }},
	} {
		figure := calibrateFigure{Name: m.name, Before: m.of(c[0]), After: m.of(c[1])}
		if resamples > 0 {
			values := [3][]float64{}
			for k := range boot[0] {
				x, y := m.of(boot[0][k]), m.of(boot[1][k])
				for i, v := range []float64{x, y, y - x} {
					values[i] = append(values[i], v)
				}
			}
			figure.Interval = &calibrateI{around(figure.Before, values[0]), around(figure.After, values[1]), around(figure.After-figure.Before, values[2])}
			for _, i := range []*[2]float64{&figure.Interval.Before, &figure.Interval.After} {
				i[0], i[1] = max(i[0], 0), max(i[1], 0)
			}
		}
		r.Figures = append(r.Figures, figure)
	}
	for i := range boot {
		for k := range c[i].Bins {
			var v []float64
			for _, b := range boot[i] {
				if b.Bins[k].Count > 0 {
					v = append(v, b.Bins[k].Accuracy)
				}
			}
			r.bands[i] = append(r.bands[i], middle95(v))
		}
	}
	var err error
	r.Diagnosis, err = calibrate.Diagnose(s.z, s.classes, labels, r.Temperature)
	if err == nil && !r.Separable && !r.Flat { // of a temperature that means something
		r.Advice = r.Diagnosis.Advice()
	}
	return err
}

// around is the interval that holds 95 % of the resamples, moved by their bias: resampling makes gaps larger than they are.
func around(estimate float64, resamples []float64) [2]float64 {
	i, bias := middle95(resamples), stat.Mean(resamples)-estimate
	return [2]float64{i[0] - bias, i[1] - bias}
}

func middle95(v []float64) [2]float64 {
	if len(v) == 0 {
		return [2]float64{}
	}
	return [2]float64{stat.Quantile(v, .025), stat.Quantile(v, .975)}
}

// warn collects what a reader of the figures should know.
func (r *calibrateReport) warn(fit, out *scores) {
	say := func(format string, args ...any) { r.Warnings = append(r.Warnings, fmt.Sprintf(format, args...)) }
	if r.Separable {
		say("All %d cases fitted on are predicted right, so they do not say how sure the network may be: the temperature ran to its lower bound and means nothing. Fit on held-out cases, and on more of them.", r.FittedOn)
	}
	if r.Flat {
		say("The logits say nothing about the labels, or the contrary: the temperature ran to its upper bound, where all classes are alike. Are the labels in the order of the logits, and numbered like their columns?")
	}
	if !r.Held {
		say("The figures after scaling are of the cases that the temperature was fitted to; --split or --test measures on others.")
	}
	if fit.clipped > 0 || out.clipped > 0 {
		say("%d probabilities are 0 or too small for a logarithm and were taken as 1e-37; give logits if you can.", max(fit.clipped, out.clipped))
	}
	if e := r.ECEIfCalibrated; e != nil && e[0] > .02 && e[0] > r.After.ECE/2 {
		say("With %d cases even perfectly calibrated probabilities would show an ECE of about %.3f: do not read more into it.", r.MeasuredOn, e[0])
	}
}

var calibrateNames = map[string]string{
	"accuracy": "accuracy", "nll": "NLL, nats", "brier": "Brier score", "ece": "ECE", "adaptive_ece": "adaptive ECE", "ace": "ACE", "mce": "MCE",
}

func (r *calibrateReport) figures() report.Table {
	t := report.Table{
		Columns: []string{"", "before", "after", "change"},
		Note: "Lower is better, but for accuracy. ECE: gap between confidence and accuracy, averaged over bins by their cases; ACE: over bins alike; " +
			"MCE: the largest; adaptive: over bins of equally many cases. In brackets: 95 % of the resamples.",
	}
	n := func(v float64) string { return report.Number(math.Round(v*1e5) / 1e5) }
	with := func(v float64, i [2]float64) string { return fmt.Sprintf("%s (%s … %s)", n(v), n(i[0]), n(i[1])) }
	for _, f := range r.Figures {
		row := []string{calibrateNames[f.Name], n(f.Before), n(f.After), n(f.After - f.Before)}
		if i := f.Interval; i != nil {
			row = []string{row[0], with(f.Before, i.Before), with(f.After, i.After), with(f.After-f.Before, i.Change)}
		}
		t.Rows = append(t.Rows, row)
	}
	return t
}

func (r *calibrateReport) headline() string {
	how := fmt.Sprintf("fitted on %d cases", r.FittedOn)
	if r.FittedOn == 0 {
		how = "as given"
	}
	on := "the same cases"
	if r.Held {
		on = fmt.Sprintf("%d cases", r.MeasuredOn)
		if r.FittedOn > 0 {
			on = fmt.Sprintf("%d others", r.MeasuredOn)
		}
	}
	which := "the network was too sure of itself"
	switch {
	case r.Separable || r.Flat:
		which = "not a usable one, see below"
	case r.Temperature < 1/1.02:
		which = "the network was not sure enough of itself"
	case r.Temperature <= 1.02:
		which = "the network's confidence is right on the whole"
	}
	return fmt.Sprintf("Temperature %s (%s): %s. Measured on %s, %d classes.", report.Number(r.Temperature), how, which, on, r.Classes)
}

// diagram is the reliability diagram as rows of blocks.
func (r *calibrateReport) diagram() report.Table {
	t := report.Table{
		Title: "Accuracy by confidence", Columns: []string{"confidence", "cases", "accuracy", "before", "cases after", "accuracy after", "after"},
		Note: "█ is accuracy. ▒ is how much confidence exceeds it, ░ how much it lies below: there should be none.",
	}
	const width = 20
	bar := func(b metric.Bin) string {
		if b.Count == 0 {
			return ""
		}
		acc, conf := int(math.Round(width*b.Accuracy)), int(math.Round(width*b.Confidence))
		if conf >= acc {
			return strings.Repeat("█", acc) + strings.Repeat("▒", conf-acc)
		}
		return strings.Repeat("█", conf) + strings.Repeat("░", acc-conf)
	}
	percent := func(b metric.Bin) string {
		if b.Count == 0 {
			return ""
		}
		return fmt.Sprintf("%.1f %%", 100*b.Accuracy)
	}
	for k, b := range r.Before.Bins {
		c := r.After.Bins[k]
		if b.Count+c.Count == 0 {
			continue
		}
		t.Rows = append(t.Rows, []string{fmt.Sprintf("%.2f–%.2f", b.Low, b.High), strconv.Itoa(b.Count), percent(b), bar(b), strconv.Itoa(c.Count), percent(c), bar(c)})
	}
	return t
}

func (r *calibrateReport) print(w io.Writer, width int) error {
	head := &report.Document{Title: r.headline()}
	head.Add(r.figures(), r.diagram())
	r.meaning(head)
	if r.Diagnosis.Overlap && r.Advice != "" {
		head.Add(r.confusions())
	}
	if r.Output != "" && r.Output != "-" {
		head.Add(report.Text{Paragraphs: []string{"Calibrated probabilities are in " + r.Output + "."}})
	}
	return head.WriteText(w, width)
}

func (r *calibrateReport) meaning(d *report.Document) {
	all := slices.Clone(r.Warnings)
	if r.Advice != "" {
		all = append(all, r.Advice)
	}
	if len(all) > 0 {
		d.Add(report.Text{Title: "What it means", Paragraphs: all})
	}
}

func (r *calibrateReport) confusions() report.Table {
	t := report.Table{Title: "Classes most often taken for another", Columns: []string{"predicted", "is really", "cases"}}
	name := func(c int) string {
		if c < len(r.Names) {
			return r.Names[c]
		}
		return strconv.Itoa(c)
	}
	for _, c := range r.Diagnosis.Confusions {
		t.Rows = append(t.Rows, []string{name(c.Predicted), name(c.Label), strconv.Itoa(c.Count)})
	}
	return t
}

// document is the page.
func (r *calibrateReport) document(command []string) *report.Document {
	d := &report.Document{Title: "Calibration of " + filepath.Base(r.Input), Subtitle: r.headline()}
	r.meaning(d)
	figures := r.figures()
	figures.Title = "Figures"
	d.Add(figures)
	for i, c := range []metric.Calibration{r.Before, r.After} {
		title := []string{"Reliability before", "Reliability after"}[i]
		line := report.Line{Name: "accuracy"}
		even := report.Line{Name: "as promised", X: []float64{0, 1}, Y: []float64{0, 1}, Dashed: true}
		for k, b := range c.Bins {
			if b.Count == 0 {
				continue
			}
			line.X, line.Y = append(line.X, b.Confidence), append(line.Y, b.Accuracy)
			if band := r.bands[i][k]; band != ([2]float64{}) {
				line.Low, line.High = append(line.Low, band[0]), append(line.High, band[1])
			} else {
				line.Low, line.High = append(line.Low, b.Accuracy), append(line.High, b.Accuracy)
			}
		}
		d.Add(report.Curve{
			Title: title, XLabel: "confidence", YLabel: "accuracy", Lines: []report.Line{line, even},
			Note: fmt.Sprintf("ECE %s. Below the dashed line the network is too sure. The band is 95 %% of the resamples.", report.Number(math.Round(c.ECE*1e4)/1e4)),
		})
	}
	bars := report.Bars{Title: "Cases by confidence", Unit: "cases"}
	for k := range r.Before.Bins {
		before, after := r.Before.Bins[k], r.After.Bins[k]
		for i, b := range []metric.Bin{before, after} {
			if before.Count+after.Count > 0 {
				bars.Items = append(bars.Items, report.Bar{Label: fmt.Sprintf("%.2f–%.2f", b.Low, b.High), Group: []string{"before", "after"}[i], Value: float64(b.Count)})
			}
		}
	}
	d.Add(bars)
	if t := r.confusions(); len(t.Rows) > 0 {
		d.Add(t)
	}
	d.Facts = []report.Fact{
		{Name: "Command", Value: "lathe " + strings.Join(command, " ")}, {Name: "Input", Value: r.Input + " (" + r.Kind + "), " + r.Labels},
	}
	return d
}

// readScores reads [..., classes]; kind is auto, logits or probabilities.
func readScores(a *app, path, kind string) (*scores, error) {
	s := &scores{path: path}
	fill := func(rows, cols int, at func(i int) float64) error {
		if cols == 1 {
			return errors.New("has one column; want one for each class (a single score s of two classes is the columns 0, s)")
		}
		s.n, s.classes, s.z = rows, cols, make([]float32, rows*cols)
		s.probabilities = kind != "logits"
		for i := range rows {
			sum := 0.
			for c := range cols {
				v := at(i*cols + c)
				if !(math.Abs(v) <= math.MaxFloat32) {
					return fmt.Errorf("row %d, class %d is %g; want finite numbers", i, c, v)
				}
				s.z[i*cols+c] = float32(v)
				sum += v
				if s.probabilities && !(v >= 0 && v <= 1+1e-3) {
					if kind == "probabilities" {
						return fmt.Errorf("row %d, class %d is %g, which is no probability; are these logits?", i, c, v)
					}
					s.probabilities = false
				}
			}
			if s.probabilities && !(math.Abs(sum-1) <= 1e-3) {
				if kind == "probabilities" {
					return fmt.Errorf("the probabilities of row %d sum to %g; want 1", i, sum)
				}
				s.probabilities = false
			}
		}
		if s.probabilities {
			for i := range s.z {
				p := at(i)
				if p < 1e-37 {
					p = 1e-37
					s.clipped++
				}
				s.z[i] = float32(math.Log(p))
			}
		}
		return nil
	}
	err := readArray(a, path, func(v *data.NPY) error {
		if len(v.Shape) < 2 || v.Len() == 0 {
			return fmt.Errorf("its shape is %v; want [cases, classes] with at least one case", v.Shape)
		}
		k := v.Shape[len(v.Shape)-1]
		if d, ok := v.Data.([]float32); ok {
			return fill(v.Len()/k, k, func(i int) float64 { return float64(d[i]) })
		}
		f := v.Float64s()
		return fill(v.Len()/k, k, func(i int) float64 { return f[i] })
	}, func(r io.Reader) error {
		t, err := data.ReadCSV(r)
		if err != nil {
			return err
		}
		s.names = t.Header
		return fill(t.Rows, t.Cols, func(i int) float64 { return t.Data[i] })
	})
	return s, err
}

// readArray opens a file or standard input and hands it over as an NPY array or as text, by how it begins. Errors name the
// file.
func readArray(a *app, path string, array func(*data.NPY) error, text func(io.Reader) error) error {
	in, name := a.stdin, "standard input"
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		in, name = f, path
	}
	err := func() error {
		b := bufio.NewReaderSize(in, 1<<16)
		magic, err := b.Peek(6)
		switch {
		case err != nil && err != io.EOF:
			return err
		case string(magic) == "\x93NUMPY":
			var v *data.NPY
			if f, ok := in.(*os.File); ok && path != "-" && isRegular(f) { // whose size is known, and bounds what is asked for
				if _, err := f.Seek(0, io.SeekStart); err != nil {
					return err
				}
				v, err = data.ReadNPY(f)
			} else {
				v, err = data.ReadNPY(b)
			}
			if err != nil {
				return err
			}
			return array(v)
		case bytes.ContainsRune(magic, 0) || bytes.HasPrefix(magic, []byte("PK")):
			return errors.New("is neither an .npy array nor text; numpy.save writes the one, and .csv is the other")
		}
		return text(b)
	}()
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

func isRegular(f *os.File) bool {
	info, err := f.Stat()
	return err == nil && info.Mode().IsRegular()
}

// readClasses reads the class of each of the cases of s.
func readClasses(a *app, path string, s *scores) ([]int, error) {
	y := make([]int, s.n)
	byName := map[string]int{}
	for i, n := range s.names {
		if _, twice := byName[n]; twice {
			byName = map[string]int{}
			break
		}
		byName[n] = i
	}
	number := func(text string) (int, error) {
		if i, ok := byName[text]; ok {
			return i, nil
		}
		v, err := strconv.ParseFloat(text, 64)
		if err != nil || v != math.Trunc(v) || v < 0 || v >= float64(s.classes) {
			if len(byName) > 0 && err != nil {
				return 0, fmt.Errorf("label %.40q is none of the classes that %s names, nor a number from 0 to %d", text, s.path, s.classes-1)
			}
			return 0, fmt.Errorf("label %.40q; want a whole number from 0 to %d", text, s.classes-1)
		}
		return int(v), nil
	}
	err := readArray(a, path, func(v *data.NPY) error {
		if v.Len() != s.n || len(v.Shape) == 0 {
			return fmt.Errorf("%d labels for %d cases", v.Len(), s.n)
		}
		for i, x := range v.Float64s() {
			if x != math.Trunc(x) || x < 0 || x >= float64(s.classes) {
				return fmt.Errorf("label %g of case %d; want a whole number from 0 to %d", x, i, s.classes-1)
			}
			y[i] = int(x)
		}
		return nil
	}, func(r io.Reader) error {
		in := bufio.NewScanner(r)
		in.Buffer(make([]byte, 0, 1<<12), 1<<16)
		seen := make([]bool, s.n)
		line, at := 0, 0
		for in.Scan() {
			line++
			text := strings.TrimSpace(strings.TrimPrefix(in.Text(), "\ufeff"))
			if text == "" {
				continue
			}
			row, label := at, text
			fields := strings.FieldsFunc(text, func(r rune) bool { return r == ',' || r == ';' || r == '\t' })
			if len(fields) > 2 {
				return fmt.Errorf("line %d has %d fields; want a label, or row,label", line, len(fields))
			}
			var err error
			if len(fields) == 2 {
				label = strings.TrimSpace(fields[1])
				row, err = strconv.Atoi(strings.TrimSpace(fields[0]))
			}
			label = strings.Trim(label, `"`)
			class, e := number(label)
			if (err != nil || e != nil) && line == 1 && isHeader(label) {
				continue
			}
			if err != nil {
				return fmt.Errorf("line %d: %.40q is not the number of a row", line, fields[0])
			}
			if e != nil {
				return fmt.Errorf("line %d: %w", line, e)
			}
			if row < 0 || row >= s.n || at >= s.n {
				return fmt.Errorf("line %d: a label for row %d, and there are %d cases", line, row, s.n)
			}
			if seen[row] {
				return fmt.Errorf("line %d: row %d has a label already", line, row)
			}
			seen[row] = true
			y[row] = class
			at++
		}
		if err := in.Err(); err != nil {
			return fmt.Errorf("line %d: %w", line+1, err)
		}
		if at != s.n {
			return fmt.Errorf("%d labels for %d cases", at, s.n)
		}
		return nil
	})
	return y, err
}

// isHeader says whether the first line of labels names its column.
func isHeader(s string) bool {
	return slices.Contains([]string{"label", "labels", "class", "target", "y"}, strings.ToLower(s))
}

// split deals the cases out at random: the share to fit on, the others to measure on.
func (s *scores) split(labels []int, share float64, seed uint64) (fit *scores, fitLabels []int, rest *scores, restLabels []int, err error) {
	n := int(math.Round(share * float64(s.n)))
	if n < 1 || n >= s.n {
		return nil, nil, nil, nil, usageErrorf("--split %g of %d cases leaves %d to fit on and %d to measure on; want at least one of each", share, s.n, n, s.n-n)
	}
	order := rng.New(seed, "split").Perm(s.n)
	pick := func(idx []int) (*scores, []int) {
		p := *s
		p.n, p.z = len(idx), make([]float32, 0, len(idx)*s.classes)
		y := make([]int, 0, len(idx))
		for _, i := range idx {
			p.z = append(p.z, s.z[i*s.classes:(i+1)*s.classes]...)
			y = append(y, labels[i])
		}
		return &p, y
	}
	fit, fitLabels = pick(order[:n])
	rest, restLabels = pick(order[n:])
	return fit, fitLabels, rest, restLabels, nil
}

// writeProbabilities writes [cases, classes] as .npy or CSV.
func writeProbabilities(a *app, path string, p []float32, s *scores) error {
	if strings.EqualFold(filepath.Ext(path), ".npy") {
		return data.WriteNPYFile(path, []int{s.n, s.classes}, p)
	}
	write := func(w io.Writer) error {
		b := bufio.NewWriter(w)
		if s.names != nil {
			for c, n := range s.names {
				if c > 0 {
					b.WriteByte(',')
				}
				b.WriteString(csvField(n))
			}
			b.WriteByte('\n')
		}
		var buf []byte
		for i, v := range p {
			buf = strconv.AppendFloat(buf[:0], float64(v), 'g', -1, 32)
			if (i+1)%s.classes == 0 {
				buf = append(buf, '\n')
			} else {
				buf = append(buf, ',')
			}
			b.Write(buf)
		}
		return b.Flush()
	}
	if path == "-" {
		return write(a.stdout)
	}
	return atomicfile.Write(path, write)
}

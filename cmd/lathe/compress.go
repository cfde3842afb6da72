package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/gomlx/compute"
	"github.com/spf13/cobra"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/compress/quant"
	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/lab/report"
	"github.com/lathe-ml/lathe/nn"
)

type compressFlags struct {
	method, granularity, softmax string
	bits, abits                  int
	calib, eval, labels          string
	calibCases                   int
	preprocess                   string
	shapes                       []string
	report, output               string
	opset, batch                 int
	seed                         uint64
	saveInputs, saveOutputs      string
}

// compressors is the table of the methods that compress offers.
var compressors = []struct {
	name  string
	about string
	cases int // calibration cases when --calib-cases does not say
	make  func(f compressFlags, progress func(done, total int)) (compress.Method, error)
}{
	{
		"repq-vit", "RepQ-ViT (arXiv:2212.08254), for pre-norm transformers, also at 4 bits", 32,
		func(f compressFlags, progress func(done, total int)) (compress.Method, error) {
			if f.granularity != "" && f.granularity != "channel" {
				return nil, usageErrorf("--granularity %s: repq-vit stores weights per channel; --method minmax offers tensor", f.granularity)
			}
			q := quant.RepQViT{WeightBits: f.bits, ActBits: f.abits, Softmax: quant.SoftmaxGrid(f.softmax), Progress: progress}
			if !slices.Contains(softmaxGrids, f.softmax) {
				return nil, usageErrorf("--softmax %s; accepted: %s", f.softmax, strings.Join(softmaxGrids, ", "))
			}
			return q, nil
		},
	},
	{
		"minmax", "plain min-max rounding, for any feed-forward network; usually enough at 8 bits", 256,
		func(f compressFlags, _ func(done, total int)) (compress.Method, error) {
			switch f.granularity {
			case "", "channel", "tensor":
			default:
				return nil, usageErrorf("--granularity %s; accepted: channel, tensor", f.granularity)
			}
			return quant.MinMaxPTQ{WeightBits: f.bits, ActBits: f.abits, PerTensor: f.granularity == "tensor", Batch: f.batch}, nil
		},
	},
}

var softmaxGrids = []string{string(quant.SoftmaxLogSqrt2), string(quant.SoftmaxLog2), string(quant.SoftmaxUniform)}

func newCompressCommand(a *app) *cobra.Command {
	var f compressFlags
	var names []string
	about := ""
	for _, c := range compressors {
		names = append(names, c.name)
		about += fmt.Sprintf("  %-10s%s\n", c.name, c.about)
	}
	cmd := &cobra.Command{
		Use:   "compress MODEL --method NAME --bits N --calib DIR|FILE.npy -o OUT.onnx|OUT.safetensors",
		Short: "Make a trained network smaller: weights and activations of few bits",
		Long: `Quantise a trained network (ONNX, or safetensors that lathe wrote) from some unlabelled examples. Write it as ONNX
with QuantizeLinear and DequantizeLinear, which ONNX Runtime and others load, or as safetensors, which "lathe eval"
and Go programs read back; with it comes a report: size, bits and error of every layer, agreement with the
original, accuracy when labels are given.

Methods:
` + about + `
The examples are a folder of pictures, or an .npy file of inputs as the network takes them (for several inputs one
file each, separated by commas). Pictures are read as ImageNet classifiers read them, unless --preprocess or the
model's own metadata ("preprocess") say otherwise. With --eval the networks are compared on other examples than
those of the calibration; --labels is a CSV of file,label (for .npy: number of the case,label) or an .npy of classes.

` + preprocessHelp + `

ONNX Runtime by default fuses the quantised operators into integer kernels of its own, which on processors without
VNNI saturate; what lathe reports is what ORT_ENABLE_BASIC computes.`,
		Example: `  lathe compress vit.onnx --method repq-vit --bits 4 --calib images/ -o vit4.onnx
  lathe compress vit.onnx --method repq-vit --bits 6 --calib calib.npy --eval test.npy --labels labels.npy -o vit6.onnx
  lathe compress vit.safetensors --method minmax --bits 8 --calib images/ -o vit8.safetensors
  lathe compress pages.onnx --method minmax --bits 8 --calib scans/ --preprocess "resize=256" --labels labels.csv -o pages8.onnx`,
		Args: exactArgs("a model"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := newCompression(a, args[0], f)
			if err != nil {
				return err
			}
			return c.run(cmd.Context())
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.method, "method", "", "how: "+strings.Join(names, " or "))
	fl.IntVar(&f.bits, "bits", 8, "bits of a weight, 2 to 8")
	fl.IntVar(&f.abits, "abits", 0, "bits of an activation, 2 to 8 (default: as --bits)")
	fl.StringVar(&f.granularity, "granularity", "", "weight scales of minmax: one per channel or one per tensor (default: channel)")
	fl.StringVar(&f.softmax, "softmax", softmaxGrids[0], "grid of repq-vit for attention probabilities: "+strings.Join(softmaxGrids, ", "))
	fl.StringVar(&f.calib, "calib", "", "examples to calibrate on: a folder of pictures, or .npy")
	fl.IntVar(&f.calibCases, "calib-cases", 0, "how many of them, drawn by --seed; -1: all (default: 32 for repq-vit, 256 for minmax)")
	fl.StringVar(&f.eval, "eval", "", "examples to judge on (default: those of --calib)")
	fl.StringVar(&f.labels, "labels", "", "classes of the examples that are judged: CSV of file,label, or .npy")
	fl.StringVar(&f.preprocess, "preprocess", "", "how pictures become inputs, see above")
	fl.StringArrayVar(&f.shapes, "shape", nil, "shape of an input that the model leaves open, name=1,3,48,320; may be repeated")
	fl.IntVar(&f.batch, "batch", 0, "cases per pass (default: 64, or less where inputs are large)")
	fl.Uint64Var(&f.seed, "seed", 0, "seed of the draw of calibration cases")
	fl.IntVar(&f.opset, "opset", 0, "operator set of the file, 17 to 21 (default: 21 up to 4 bits, for 4-bit containers; else 17)")
	fl.StringVar(&f.report, "report", "", `HTML report to write (default: beside the output, ending in .report.html; "none": no report)`)
	fl.StringVarP(&f.output, "output", "o", "", "file to write: .onnx, or .safetensors, which lathe reads back (a byte per weight)")
	fl.StringVar(&f.saveInputs, "save-inputs", "", "write the judged inputs to this .npy file, to check the output elsewhere")
	fl.StringVar(&f.saveOutputs, "save-outputs", "", "write the compressed network's outputs on them to this .npy file")
	_ = cmd.RegisterFlagCompletionFunc("method", oneOf(names...))
	_ = cmd.RegisterFlagCompletionFunc("granularity", oneOf("channel", "tensor"))
	_ = cmd.RegisterFlagCompletionFunc("softmax", oneOf(softmaxGrids...))
	return cmd
}

// compression is one call of lathe compress.
type compression struct {
	*app
	compressFlags
	model      string
	newMethod  func(f compressFlags, progress func(done, total int)) (compress.Method, error)
	preprocess preprocessing
}

// newCompression checks the flags before anything is read.
func newCompression(a *app, model string, f compressFlags) (*compression, error) {
	c := &compression{app: a, compressFlags: f, model: model}
	var names []string
	for _, m := range compressors {
		if names = append(names, m.name); m.name == f.method {
			c.newMethod = m.make
			if c.calibCases == 0 {
				c.calibCases = m.cases
			}
		}
	}
	if c.abits == 0 {
		c.abits = c.bits
	}
	switch {
	case f.method == "":
		return nil, usageErrorf("name a method with --method: %s", strings.Join(names, " or "))
	case c.newMethod == nil:
		return nil, usageErrorf("there is no method %q to compress with; accepted: %s", f.method, strings.Join(names, ", "))
	case f.bits < 2 || f.bits > 8 || c.abits < 2 || c.abits > 8:
		return nil, usageErrorf("--bits %d --abits %d; accepted: 2 to 8", f.bits, c.abits)
	case f.calib == "":
		return nil, usageErrorf("name examples with --calib: a folder of pictures or an .npy file")
	case c.calibCases < -1:
		return nil, usageErrorf("--calib-cases %d; give a positive number, or -1 for all", f.calibCases)
	case f.batch < 0:
		return nil, usageErrorf("--batch %d; it must be positive", f.batch)
	case f.output == "":
		return nil, usageErrorf("name the file to write with -o")
	case !isNetworkFile(f.output):
		return nil, usageErrorf("-o %s; quantised networks are written as .onnx or .safetensors", f.output)
	case f.opset != 0 && (f.opset < 17 || f.opset > 21):
		return nil, usageErrorf("--opset %d; accepted: 17 to 21", f.opset)
	case sameFile(f.output, model):
		return nil, usageErrorf("-o %s would overwrite the model; name another file", f.output)
	}
	if c.report == "" {
		c.report = strings.TrimSuffix(f.output, filepath.Ext(f.output)) + ".report.html"
	}
	if c.opset == 0 {
		if c.opset = 17; f.bits <= 4 {
			c.opset = 21
		}
	}
	var err error
	if c.preprocess, err = parsePreprocessing(f.preprocess); err != nil {
		return nil, err
	}
	_, err = c.newMethod(c.compressFlags, nil)
	return c, err
}

func sameFile(a, b string) bool {
	x, err := os.Stat(a)
	if err != nil {
		return false
	}
	y, err := os.Stat(b)
	return err == nil && os.SameFile(x, y)
}

// compressResult is what lathe compress --json prints.
type compressResult struct {
	Model            string             `json:"model"`
	Method           string             `json:"method"`
	WeightBits       int                `json:"weight_bits"`
	ActBits          int                `json:"activation_bits"`
	Granularity      string             `json:"granularity"`
	Output           string             `json:"output"`
	Report           string             `json:"report,omitempty"`
	Backend          string             `json:"backend"`
	Calibration      string             `json:"calibration"`
	CalibrationCases int                `json:"calibration_cases"`
	Evaluation       string             `json:"evaluation"`
	Size             compressSize       `json:"size"`
	Agreement        compress.Agreement `json:"agreement"`
	Accuracy         *compressAccuracy  `json:"accuracy,omitempty"`
	Sites            []compress.Site    `json:"sites"`
	Notes            []string           `json:"notes,omitempty"`
	Seconds          float64            `json:"seconds"` // of the compression itself
}

// compressSize is in bytes.
type compressSize struct {
	FloatParameters int64 `json:"float_parameters"`
	Parameters      int64 `json:"parameters"` // packed codes, scales and zero points included
	InputFile       int64 `json:"input_file"`
	OutputFile      int64 `json:"output_file"`
}

// compressAccuracy is in [0, 1].
type compressAccuracy struct {
	Float      float64 `json:"float"`
	Compressed float64 `json:"compressed"`
	Cases      int     `json:"cases"`
}

func (c *compression) run(ctx context.Context) error {
	net, err := c.readModel()
	if err != nil {
		return err
	}
	if spec := net.Meta[preprocessKey]; spec != "" && c.compressFlags.preprocess == "" {
		if c.preprocess, err = parsePreprocessing(spec); err != nil {
			return fmt.Errorf("%s: metadata %q: %w", c.model, preprocessKey, errors.New(err.Error()))
		}
	}
	calib, err := openCases(c.calib, net, c.preprocess)
	if err != nil {
		return err
	}
	judged := calib
	if c.eval != "" {
		if judged, err = openCases(c.eval, net, c.preprocess); err != nil {
			return err
		}
	}
	var labels []int
	if c.labels != "" {
		if labels, err = judged.labels(c.labels); err != nil {
			return err
		}
	}
	b, err := c.backend()
	if err != nil {
		return err
	}
	c.batch = c.chooseBatch(net)

	idx := drawCases(calib.n, c.calibCases, c.seed)
	examples, err := calib.load(idx)
	if err != nil {
		return err
	}
	start := time.Now()
	bar := c.progress("quantising")
	method, err := c.newMethod(c.compressFlags, bar.Set)
	if err != nil {
		bar.Close()
		return err
	}
	res, err := method.Compress(ctx, b, net, examples)
	bar.Close()
	if err != nil {
		return fmt.Errorf("%s: %w", c.model, err)
	}
	r := &compressResult{
		Model: c.model, Method: c.method, WeightBits: c.bits, ActBits: c.abits, Granularity: c.granularity, Output: c.output,
		Backend: b.Name(), Calibration: c.calib, CalibrationCases: len(idx), Evaluation: judged.source,
		Sites: res.Sites, Notes: res.Notes, Seconds: time.Since(start).Seconds(),
	}
	if r.Granularity == "" {
		r.Granularity = "channel"
	}
	r.Size.FloatParameters, r.Size.Parameters = compress.Size(net), compress.Size(res.Network)
	if err := c.judge(ctx, b, net, res.Network, judged, labels, r); err != nil {
		return err
	}
	if res.Network.Meta == nil {
		res.Network.Meta = map[string]string{}
	}
	res.Network.Meta[compressKey] = fmt.Sprintf("%s W%dA%d", c.method, c.bits, c.abits)
	if err := writeNetwork(c.output, res.Network, c.opset); err != nil {
		return err
	}
	for path, size := range map[string]*int64{c.model: &r.Size.InputFile, c.output: &r.Size.OutputFile} {
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		*size = info.Size()
	}
	d := r.document(c.app.args)
	if c.report != "none" {
		r.Report = c.report
		if err := d.Save(c.report); err != nil {
			return err
		}
	}
	return c.emit(r, func(w io.Writer) error {
		if err := d.WriteText(w, c.width()); err != nil {
			return err
		}
		where := ""
		if r.Report != "" {
			where = ", report in " + r.Report
		}
		_, err := fmt.Fprintf(w, "\nwrote %s (%s)%s\n", c.output, report.Bytes(r.Size.OutputFile), where)
		return err
	})
}

// readModel reads the network by the ending of the file's name.
func (c *compression) readModel() (*nn.Network, error) {
	if _, err := os.Stat(c.model); err != nil {
		return nil, err
	}
	dims, err := parseShapes(c.shapes)
	if err != nil {
		return nil, err
	}
	return readNetwork(c.model, dims)
}

// chooseBatch keeps the inputs of one pass below 64 MB.
func (c *compression) chooseBatch(net *nn.Network) int {
	if c.batch > 0 {
		return c.batch
	}
	row := int64(1)
	for _, in := range net.Inputs {
		row += in.Shape.ByteSize() / int64(max(in.Shape.Dimensions[0], 1))
	}
	return int(max(1, min(compress.DefaultBatch, 64_000_000/8/row)))
}

// drawCases draws k of n cases without repetition, in ascending order; k < 0 or k >= n takes all.
func drawCases(n, k int, seed uint64) []int {
	idx := data.Range(n)
	if k >= 0 && k < n {
		idx = rng.New(seed, "calibration").Perm(n)[:k]
		slices.Sort(idx)
	}
	return idx
}

// judge runs both networks over the judged cases, a part at a time.
func (c *compression) judge(ctx context.Context, b compute.Backend, float, compressed *nn.Network, cs *cases, labels []int, r *compressResult) error {
	fe, err := compress.NewEvaluator(b, float, c.batch)
	if err != nil {
		return err
	}
	defer fe.Close()
	ce, err := compress.NewEvaluator(b, compressed, c.batch)
	if err != nil {
		return err
	}
	defer ce.Close()
	part := max(c.batch, 256/c.batch*c.batch)
	bar := c.progress("comparing")
	defer bar.Close()
	var want, got, inputs []float32
	width := 0
	for from := 0; from < cs.n; from += part {
		x, err := cs.load(data.Range(cs.n)[from:min(from+part, cs.n)])
		if err != nil {
			return err
		}
		w, k, err := fe.Outputs(ctx, x)
		if err != nil {
			return err
		}
		g, _, err := ce.Outputs(ctx, x)
		if err != nil {
			return err
		}
		want, got, width = append(want, w...), append(got, g...), k
		if c.saveInputs != "" {
			inputs = append(inputs, nn.Floats(x[0])...)
		}
		bar.Set(min(from+part, cs.n), cs.n)
	}
	if r.Agreement, err = compress.Compare(want, got, width); err != nil {
		return err
	}
	if labels != nil {
		acc := compressAccuracy{Cases: len(labels)}
		if acc.Float, err = compress.Accuracy(want, width, labels); err != nil {
			return fmt.Errorf("%s: %w", c.labels, err)
		}
		if acc.Compressed, err = compress.Accuracy(got, width, labels); err != nil {
			return fmt.Errorf("%s: %w", c.labels, err)
		}
		r.Accuracy = &acc
	}
	if c.saveInputs != "" {
		d := slices.Clone(float.Inputs[0].Shape.Dimensions)
		d[0] = cs.n
		if err := data.WriteNPYFile(c.saveInputs, d, inputs); err != nil {
			return err
		}
	}
	if c.saveOutputs != "" {
		return data.WriteNPYFile(c.saveOutputs, []int{cs.n, width}, got)
	}
	return nil
}

// document lays the result out as a report.
func (r *compressResult) document(args []string) *report.Document {
	pct := func(v float64) string { return report.Number(100*v) + " %" }
	d := &report.Document{Title: fmt.Sprintf("%s in %d-bit weights and %d-bit activations", filepath.Base(r.Model), r.WeightBits, r.ActBits)}
	ratio := float64(r.Size.FloatParameters) / float64(max(r.Size.Parameters, 1))
	d.Subtitle = fmt.Sprintf("%s makes the parameters %.1f times smaller (%s to %s) and answers as before in %s of %d cases.",
		r.Method, ratio, report.Bytes(r.Size.FloatParameters), report.Bytes(r.Size.Parameters), pct(r.Agreement.Top1), r.Agreement.Cases)
	t := report.Table{Title: "Result", Columns: []string{"", "original", "compressed"}, Rows: [][]string{
		{"parameters", report.Bytes(r.Size.FloatParameters), report.Bytes(r.Size.Parameters)},
		{"file", report.Bytes(r.Size.InputFile), report.Bytes(r.Size.OutputFile)},
	}}
	quality, label := r.Agreement.Top1, "agreement with the original, %"
	high := 1.
	if a := r.Accuracy; a != nil {
		t.Rows = append(t.Rows, []string{"accuracy", pct(a.Float), pct(a.Compressed)})
		quality, high, label = a.Compressed, a.Float, "accuracy, %"
		d.Subtitle += fmt.Sprintf(" Accuracy: %s before, %s after.", pct(a.Float), pct(a.Compressed))
	}
	t.Rows = append(t.Rows,
		[]string{"same class as the original", "", pct(r.Agreement.Top1)},
		[]string{"cosine of outputs", "", report.Number(r.Agreement.Cosine)},
		[]string{"KL divergence, nats", "", report.Number(r.Agreement.KL)},
		[]string{"mean squared difference of outputs", "", report.Number(r.Agreement.MSE)})
	t.Note = fmt.Sprintf("Judged on %d cases of %s. Parameters are counted as packed codes with their scales; the original in float32.", r.Agreement.Cases, r.Evaluation)
	if r.Evaluation == r.Calibration {
		t.Note += " The calibration cases are among them; --eval takes others."
	}
	d.Add(t)
	d.Add(report.Scatter{
		Title: "Size and quality", XLabel: "parameters, bytes", YLabel: label,
		Points: []report.Mark{
			{Label: "original", Group: "original", X: float64(r.Size.FloatParameters), Y: 100 * high, YLow: 100 * high, YHigh: 100 * high},
			{Label: fmt.Sprintf("%s W%dA%d", r.Method, r.WeightBits, r.ActBits), Group: "compressed", X: float64(r.Size.Parameters), Y: 100 * quality, YLow: 100 * quality, YHigh: 100 * quality},
		},
	})
	bars := report.Bars{Title: "Error of each layer's output", Note: "‖y_q − y‖²/‖y‖² on the calibration cases, with everything before it compressed too", Log: true}
	sites := report.Table{Title: "Layers", Columns: []string{"layer", "kind", "weight", "weight bits", "input bits", "bytes", "of float", "weight error", "output error", "input"}}
	for _, s := range r.Sites {
		if s.OutputErr > 0 {
			bars.Items = append(bars.Items, report.Bar{Label: s.Name, Group: s.Kind, Value: s.OutputErr})
		}
		var dims []string
		for _, v := range s.Shape {
			dims = append(dims, strconv.Itoa(v))
		}
		sites.Rows = append(sites.Rows, []string{
			s.Name, s.Kind, strings.Join(dims, "×"), strconv.Itoa(s.WeightBits), strconv.Itoa(s.InputBits), strconv.FormatInt(s.Bytes, 10),
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
		{Name: "Backend", Value: r.Backend},
		{Name: "Seconds", Value: report.Number(r.Seconds)},
	}
	return d
}

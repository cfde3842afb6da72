package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/gomlx/compute"
	"github.com/spf13/cobra"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/compress/quant"
	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/internal/stat"
	"github.com/lathe-ml/lathe/lab"
	expquant "github.com/lathe-ml/lathe/lab/exp/quant"
	"github.com/lathe-ml/lathe/lab/report"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/onnx"
)

const (
	demoBits  = 4
	demoCalib = 32 // images, of the 64 that are embedded
	demoBatch = 250
)

// demoArm is one way to compress the embedded network.
type demoArm struct {
	Name     string    `json:"name"`
	Accuracy []float64 `json:"accuracy"`  // per cent, per seed
	LogitMSE []float64 `json:"logit_mse"` // mean squared difference to the float network's logits
	Bytes    int64     `json:"bytes"`     // of the parameters as stored
	method   compress.Method
	result   *compress.Result
}

// demoResult is what lathe demo --json prints.
type demoResult struct {
	Images  int           `json:"images"`
	Float   demoArm       `json:"float"`
	Arms    []*demoArm    `json:"arms"`
	Claims  []lab.Verdict `json:"claims"`
	Seeds   []uint64      `json:"seeds"`
	Seconds float64       `json:"seconds"`
	Backend string        `json:"backend"`
	CPU     engine.CPU    `json:"cpu"`
}

func newDemoCommand(a *app) *cobra.Command {
	var path, export string
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Compress a vision transformer to 4 bits in two ways and judge both on real images, offline",
		Long: `Take the vision transformer and the 2,000 real test images that are part of this program, compress the network to
4-bit weights and activations with RepQ-ViT and, as the baseline, by plain min-max rounding, and print what is left
of its accuracy. Three calibration sets give each claim an interval. Nothing is downloaded.

With --export the network (vit-a.onnx), the images (calib.npy, test.npy, labels.npy) and the compressed network
(vit-a-w4a4.onnx) are written to a folder, to go on from with lathe compress.`,
		Example: `  lathe demo
  lathe demo --report report.html --export demo
  lathe compress demo/vit-a.onnx --method repq-vit --bits 6 --calib demo/calib.npy --eval demo/test.npy --labels demo/labels.npy -o vit6.onnx`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.demo(cmd.Context(), path, export)
		},
	}
	cmd.Flags().StringVar(&path, "report", "report.html", `HTML report to write ("none": no report)`)
	cmd.Flags().StringVar(&export, "export", "", "also write the networks and the images to this folder")
	return cmd
}

func (a *app) demo(ctx context.Context, path, export string) error {
	start := time.Now()
	b, err := a.backend()
	if err != nil {
		return err
	}
	net, err := expquant.PretrainedSpread()
	if err != nil {
		return err
	}
	test, calib, err := data.EmbeddedFashionMNIST()
	if err != nil {
		return err
	}
	x, err := test.Float32(nil)
	if err != nil {
		return err
	}
	cases := compress.Examples{x}
	labels := make([]int, test.N)
	for i, l := range test.Labels {
		labels[i] = int(l)
	}
	r := &demoResult{
		Images: test.N, Seeds: []uint64{0, 1, 2}, Backend: engine.Name(b), CPU: engine.ThisCPU(),
		Float: demoArm{Name: "float32 original", Bytes: compress.Size(net)},
		Arms: []*demoArm{
			{Name: "min-max W4A4 (baseline)", method: quant.MinMaxPTQ{WeightBits: demoBits, ActBits: demoBits}},
			{Name: "RepQ-ViT, layer-wise (ablation)", method: quant.RepQViT{Norms: quant.LayerWise, SkipSiteErrors: true}},
			{Name: "RepQ-ViT W4A4", method: quant.RepQViT{}},
		},
	}
	want, width, err := compress.Evaluate(ctx, b, net, cases, demoBatch)
	if err != nil {
		return err
	}
	acc, err := compress.Accuracy(want, width, labels)
	if err != nil {
		return err
	}
	r.Float.Accuracy = []float64{100 * acc}
	bar := a.progress("compressing and judging")
	defer bar.Close()
	for i, seed := range r.Seeds {
		part, err := calib.Float32(rng.New(seed, "calibration").Perm(calib.N)[:demoCalib])
		if err != nil {
			return err
		}
		for j, arm := range r.Arms {
			bar.Set(i*len(r.Arms)+j, len(r.Seeds)*len(r.Arms))
			if arm.result, err = arm.method.Compress(ctx, b, net, compress.Examples{part}); err != nil {
				return fmt.Errorf("%s: %w", arm.Name, err)
			}
			if err := arm.judge(ctx, b, cases, want, width, labels); err != nil {
				return fmt.Errorf("%s: %w", arm.Name, err)
			}
		}
	}
	bar.Close()
	r.Claims = r.judge()
	r.Seconds = time.Since(start).Seconds()
	d := r.document()
	if path != "none" {
		if err := d.Save(path); err != nil {
			return err
		}
	}
	if export != "" {
		if err := exportDemo(export, net, r.Arms[2].result.Network, calib, test); err != nil {
			return err
		}
	}
	return a.emit(r, func(w io.Writer) error {
		if err := d.WriteText(w, a.width()); err != nil {
			return err
		}
		if path == "none" {
			return nil
		}
		_, err := fmt.Fprintf(w, "\nreport in %s\n", path)
		return err
	})
}

// exportDemo writes what the demonstration works on.
func exportDemo(dir string, float, compressed *nn.Network, calib, test *data.Images) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	file := func(name string) string { return filepath.Join(dir, name) }
	for _, net := range []*nn.Network{float, compressed} {
		if net.Meta == nil {
			net.Meta = map[string]string{}
		}
		net.Meta[preprocessKey] = plainPictures(test)
	}
	if err := onnx.WriteFile(file("vit-a.onnx"), float, onnx.WriteOptions{}); err != nil {
		return err
	}
	if err := onnx.WriteFile(file("vit-a-w4a4.onnx"), compressed, onnx.WriteOptions{Opset: 21}); err != nil {
		return err
	}
	for name, m := range map[string]*data.Images{"calib.npy": calib, "test.npy": test} {
		if err := data.WriteNPYFile(file(name), []int{m.N, m.H, m.W, m.C}, m.Floats(data.Range(m.N), nil)); err != nil {
			return err
		}
	}
	return data.WriteNPYFile(file("labels.npy"), []int{test.N}, test.Labels)
}

func (d *demoArm) judge(ctx context.Context, b compute.Backend, x compress.Examples, want []float32, width int, labels []int) error {
	got, _, err := compress.Evaluate(ctx, b, d.result.Network, x, demoBatch)
	if err != nil {
		return err
	}
	acc, err := compress.Accuracy(got, width, labels)
	if err != nil {
		return err
	}
	agreement, err := compress.Compare(want, got, len(labels), width)
	if err != nil {
		return err
	}
	d.Accuracy, d.LogitMSE = append(d.Accuracy, 100*acc), append(d.LogitMSE, agreement.MSE)
	d.Bytes = compress.Size(d.result.Network)
	return nil
}

// judge compares the arms claim by claim, paired by seed.
func (r *demoResult) judge() (verdicts []lab.Verdict) {
	minmax, layerwise, repq := r.Arms[0], r.Arms[1], r.Arms[2]
	for _, c := range []struct {
		claim lab.Claim
		value func(i int) float64
	}{
		{
			lab.Claim{ID: "C1", Text: "RepQ-ViT keeps at least 10 points more accuracy than layer-wise grids", Paper: "DeiT-S: +35.9 points", Unit: "points", Bound: lab.AtLeast(10)},
			func(i int) float64 { return repq.Accuracy[i] - layerwise.Accuracy[i] },
		},
		{
			lab.Claim{ID: "D1", Text: "RepQ-ViT keeps at least 10 points more accuracy than plain min-max rounding", Unit: "points", Bound: lab.AtLeast(10)},
			func(i int) float64 { return repq.Accuracy[i] - minmax.Accuracy[i] },
		},
		{
			lab.Claim{ID: "D2", Text: "RepQ-ViT at 4 bits loses at most 3 points of the original's accuracy", Unit: "points", Bound: lab.AtMost(3)},
			func(i int) float64 { return r.Float.Accuracy[0] - repq.Accuracy[i] },
		},
	} {
		values := make([]float64, len(r.Seeds))
		for i := range values {
			values[i] = c.value(i)
		}
		verdicts = append(verdicts, lab.Judge(c.claim, lab.Full, r.Seeds, values))
	}
	return verdicts
}

func (r *demoResult) document() *report.Document {
	repq := r.Arms[2]
	d := &report.Document{
		Title: "A vision transformer in 4 bits",
		Subtitle: fmt.Sprintf("ViT-A on %d test images of Fashion-MNIST: %.1f %% in float32 (%s), %.1f %% with RepQ-ViT in 4-bit weights and activations (%s), %.1f %% with plain min-max rounding.",
			r.Images, r.Float.Accuracy[0], report.Bytes(r.Float.Bytes), stat.Mean(repq.Accuracy), report.Bytes(repq.Bytes), stat.Mean(r.Arms[0].Accuracy)),
	}
	d.Add(lab.ClaimsSection(r.Claims))
	t := report.Table{
		Title: "What is left", Columns: []string{"network", "accuracy, %", "logit MSE", "bytes", "of float32"},
		Rows:   [][]string{{r.Float.Name, fmt.Sprintf("%.2f", r.Float.Accuracy[0]), "0", fmt.Sprint(r.Float.Bytes), "100 %"}},
		Note:   fmt.Sprintf("Means over %d calibration sets of %d images. Bytes count the parameters as stored: packed codes, scales and zero points, norms in float32.", len(r.Seeds), demoCalib),
		Strong: []int{3},
	}
	s := report.Scatter{
		Title: "Size and accuracy", XLabel: "parameters, bytes", YLabel: "accuracy, %",
		Points: []report.Mark{{Label: "float32", Group: "original", X: float64(r.Float.Bytes), Y: r.Float.Accuracy[0], YLow: r.Float.Accuracy[0], YHigh: r.Float.Accuracy[0]}},
	}
	for _, arm := range r.Arms {
		acc := stat.Mean(arm.Accuracy)
		t.Rows = append(t.Rows, []string{
			arm.Name, fmt.Sprintf("%.2f", acc), report.Number(stat.Mean(arm.LogitMSE)), fmt.Sprint(arm.Bytes),
			fmt.Sprintf("%.0f %%", 100*float64(arm.Bytes)/float64(r.Float.Bytes)),
		})
		lo, hi := acc, acc
		for _, v := range arm.Accuracy {
			lo, hi = min(lo, v), max(hi, v)
		}
		s.Points = append(s.Points, report.Mark{Label: arm.Name, Group: "4 bits", X: float64(arm.Bytes), Y: acc, YLow: lo, YHigh: hi})
	}
	d.Add(t)
	d.Add(s)
	bars := report.Bars{Title: "Error of each layer's output with RepQ-ViT", Note: "‖y_q − y‖²/‖y‖² on the last calibration set, with everything before it compressed too", Log: true}
	for _, site := range repq.result.Sites {
		if site.OutputErr > 0 {
			bars.Items = append(bars.Items, report.Bar{Label: site.Name, Group: site.Kind, Value: site.OutputErr})
		}
	}
	if len(bars.Items) > 0 {
		d.Add(bars)
	}
	d.Facts = []report.Fact{
		{Name: "Backend", Value: r.Backend},
		{Name: "Processor", Value: fmt.Sprintf("%s, %d cores", r.CPU.Model, r.CPU.Cores)},
		{Name: "Seconds", Value: report.Number(r.Seconds)},
	}
	return d
}

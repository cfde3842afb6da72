package main

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/gomlx/compute"
	"github.com/spf13/cobra"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/compress/prune"
	"github.com/lathe-ml/lathe/lab/report"
	"github.com/lathe-ml/lathe/nn"
)

type sparsityFlags struct {
	inputs, data, preprocess string
	keep                     []int
	shapes                   []string
	cases, batch, tokens     int
	opset                    int
	mask                     string
	report, output           string
}

// sparsityLayer is one layer of the report.
type sparsityLayer struct {
	Layer       string     `json:"layer"`
	Function    string     `json:"function"`
	Exact       bool       `json:"exact_zeros"`
	Gated       bool       `json:"gated"`
	Sites       []string   `json:"sites"`
	Tokens      int64      `json:"tokens"`
	Width       int        `json:"neurons"`
	NonZero     float64    `json:"nonzero"`           // share of active entries, mean over the tokens
	Spread      [5]float64 `json:"nonzero_quartiles"` // of that share: least, quartiles, greatest
	Dead        int        `json:"dead"`
	EnergyTop10 float64    `json:"energy_top10"`  // share of Σa² in the largest tenth
	MACs        int64      `json:"macs"`          // multiply-adds of the sites for one case
	Skipped     int64      `json:"macs_of_zeros"` // of those, what meets a zero; 0 without exact zeros
	Rates       []float64  `json:"rates"`         // share of the tokens that activate each neuron

	seen prune.LayerSparsity
}

// sparsityKeep is what becomes of the network when no token keeps more than so many entries of a layer.
type sparsityKeep struct {
	K         int                `json:"k"`
	Saved     int64              `json:"macs_saved"` // of one case, against all
	Agreement compress.Agreement `json:"agreement"`
	Accuracy  *float64           `json:"accuracy,omitempty"` // in [0, 1]
}

// sparsityReport is what sparsity prints as JSON.
type sparsityReport struct {
	Model    string          `json:"model"`
	Inputs   string          `json:"inputs"`
	Cases    int             `json:"cases"`
	NonZero  float64         `json:"nonzero"` // mean over the layers
	Dead     float64         `json:"dead"`    // share of all neurons
	MACs     int64           `json:"macs"`    // multiply-adds of one case, whole network
	Readers  int64           `json:"macs_behind_activations"`
	Skipped  int64           `json:"macs_of_zeros"`
	Accuracy *float64        `json:"accuracy,omitempty"` // in [0, 1]
	Layers   []sparsityLayer `json:"layers"`
	Keep     []sparsityKeep  `json:"keep"`
	Notes    []string        `json:"notes,omitempty"`
	Output   string          `json:"output,omitempty"`
	Report   string          `json:"report,omitempty"`
}

func newSparsityCommand(a *app) *cobra.Command {
	var f sparsityFlags
	cmd := &cobra.Command{
		Use:   "sparsity MODEL --data NAME | --inputs FILE.npy|DIR",
		Short: "See how few neurons are active, and what that would save",
		Long: `Measure the hidden activations of a network (ONNX, or safetensors that lathe wrote) that feed a dense layer: behind ReLU
most of them are zero in large trained transformers (arXiv:2210.06313), and what meets a zero need not be multiplied.
The activations are found by themselves. For each layer it prints the share of active neurons per token and its spread,
neurons that are never active, and how much of the energy the largest tenth holds.

Then it keeps only the k largest activations of each token, for several k (--keep), and says what that saves and how
much the outputs change. The network is not retrained for it; networks trained with top-k activations lose less.

GELU, SiLU and their like have no exact zeros: an entry counts as active there if its magnitude is above a hundredth of
its token's largest, and nothing can be left out without changing the outputs.

The cases are an .npy file (one for each input, separated by commas), a folder of pictures, or the test part of a data
set (then with accuracy). -o writes the network with the one k of --keep.`,
		Example: `  lathe sparsity vit.onnx --inputs images/
  lathe sparsity vit.safetensors --data fashion-mnist --keep 64,32,16 --report sparsity.html
  lathe sparsity vit.safetensors --data fashion-mnist --keep 32 -o vit-top32.onnx`,
		Args: exactArgs("a model"),
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := sparsity(cmd.Context(), a, args[0], f)
			if err != nil {
				return err
			}
			d := r.document(a.args)
			if f.report != "" {
				if err := d.Save(f.report); err != nil {
					return err
				}
			}
			return a.emit(r, func(w io.Writer) error { return d.WriteText(w, a.width()) })
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.inputs, "inputs", "", "inputs to measure on: .npy, or a folder of pictures")
	fl.StringVar(&f.data, "data", "", "data set to measure on: "+strings.Join(labelledSets(), ", "))
	fl.IntVar(&f.cases, "cases", 1000, "so many cases of them; -1: all")
	fl.IntSliceVar(&f.keep, "keep", nil, "numbers of activations that a token keeps (default: a half to a 32nd of the widest layer)")
	fl.StringVar(&f.preprocess, "preprocess", "", "how pictures become inputs; see lathe compress --help")
	fl.IntVar(&f.batch, "batch", 64, "cases per pass")
	fl.StringArrayVar(&f.shapes, "shape", nil, "shape of an input that the model leaves open, name=1,3,48,320; may be repeated")
	fl.StringVar(&f.mask, "mask", "attention_mask", "input that is 1 for tokens that count and 0 for padding, if the network has one")
	fl.IntVar(&f.tokens, "tokens", 0, "length of a BERT encoder's inputs (default: 128)")
	fl.StringVar(&f.report, "report", "", "write a page with the distributions to this HTML file")
	fl.StringVarP(&f.output, "output", "o", "", "write the network that keeps --keep activations (.onnx or .safetensors)")
	fl.IntVar(&f.opset, "opset", 0, "operator set of an ONNX file, 17 to 21 (default: 17)")
	_ = cmd.RegisterFlagCompletionFunc("data", oneOf(labelledSets()...))
	return cmd
}

func (f sparsityFlags) check(model string) error {
	switch {
	case f.inputs == "" && f.data == "":
		return usageErrorf("say what to measure on: --inputs (an .npy file or a folder of pictures) or --data (%s)", strings.Join(labelledSets(), ", "))
	case f.inputs != "" && f.data != "":
		return usageErrorf("give --inputs or --data, not both")
	case f.data != "" && !slices.Contains(labelledSets(), f.data):
		return chooseOne("data", f.data, labelledSets())
	case f.batch < 1 || f.batch > 1<<16:
		return usageErrorf("--batch %d; it must be 1 to 65536", f.batch)
	case f.cases < -1 || f.cases == 0:
		return usageErrorf("--cases %d; give a positive number, or -1 for all", f.cases)
	case len(f.keep) > 32:
		return usageErrorf("--keep lists %d numbers; give at most 32", len(f.keep))
	case f.output != "" && len(f.keep) != 1:
		return usageErrorf("-o writes the network for one --keep, and %d are given", len(f.keep))
	case f.output != "" && !isNetworkFile(f.output):
		return usageErrorf("-o %s; networks are written as .onnx or .safetensors", f.output)
	case f.output != "" && sameFile(f.output, model):
		return usageErrorf("-o %s would overwrite the model; name another file", f.output)
	}
	for _, k := range f.keep {
		if k < 1 {
			return usageErrorf("--keep %d; a token keeps at least 1 activation", k)
		}
	}
	return nil
}

func sparsity(ctx context.Context, a *app, model string, f sparsityFlags) (*sparsityReport, error) {
	if err := f.check(model); err != nil {
		return nil, err
	}
	dims, err := parseShapes(f.shapes)
	if err != nil {
		return nil, err
	}
	net, err := readAnyNetwork(model, dims, f.tokens)
	if err != nil {
		return nil, err
	}
	layers, err := prune.ActivationLayers(net)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", model, err)
	}
	b, err := a.backend()
	if err != nil {
		return nil, err
	}
	x, labels, what, err := exampleSource{model: model, inputs: f.inputs, data: f.data, preprocess: f.preprocess}.load(ctx, net, f.cases)
	if err != nil {
		return nil, err
	}
	r := &sparsityReport{Model: model, Inputs: what, Cases: x.Len(), Output: f.output, Report: f.report}
	if err := r.measure(ctx, a, b, net, layers, x, f); err != nil {
		return nil, fmt.Errorf("%s: %w", model, err)
	}
	if err := r.limit(ctx, a, b, net, layers, x, labels, f); err != nil {
		return nil, fmt.Errorf("%s: %w", model, err)
	}
	r.remark(layers)
	if f.output != "" {
		limited, err := prune.LimitActivations(net, layers, f.keep[0])
		if err != nil {
			return nil, err
		}
		return r, writeNetwork(f.output, limited, f.opset)
	}
	return r, nil
}

// valid marks the tokens that are no padding, [cases, tokens]; nil without a mask among the inputs.
func (f sparsityFlags) valid(net *nn.Network, x compress.Examples) (valid []bool) {
	for i, in := range net.Inputs {
		if in.Name == f.mask && in.Shape.Rank() == 2 {
			for _, v := range nn.Floats(x[i]) {
				valid = append(valid, v != 0)
			}
		}
	}
	return valid
}

// measure fills in the layers.
func (r *sparsityReport) measure(ctx context.Context, a *app, b compute.Backend, net *nn.Network, layers []prune.ActivationLayer, x compress.Examples, f sparsityFlags) error {
	cost, err := net.Cost(1)
	if err != nil {
		return err
	}
	r.MACs = cost.MACs
	bar := a.progress("measuring")
	defer bar.Close()
	var p prune.SparsityProbe
	if err := prune.MeasureActivations(ctx, b, net, x, layers, &p, prune.MeasureOptions{Batch: f.batch, Valid: f.valid(net, x), Progress: bar.Set}); err != nil {
		return err
	}
	seen, err := p.Report()
	if err != nil {
		return err
	}
	r.NonZero, r.Dead = prune.MeanNonZero(seen), prune.DeadShare(seen)
	for i, l := range layers {
		v := seen[i]
		s := sparsityLayer{
			Layer: l.Name, Function: l.Function, Exact: l.Exact, Gated: l.Gated, Sites: l.Sites, Tokens: v.Tokens, Width: l.Width,
			NonZero: v.NonZero, Spread: v.Spread, Dead: v.Dead, EnergyTop10: v.EnergyTop10, MACs: l.MACs, Rates: v.Rates, seen: v,
		}
		if l.Exact {
			s.Skipped = int64((1 - v.NonZero) * float64(l.MACs))
		}
		r.Readers += l.MACs
		r.Skipped += s.Skipped
		r.Layers = append(r.Layers, s)
	}
	return nil
}

// limit keeps the k largest, for every k.
func (r *sparsityReport) limit(ctx context.Context, a *app, b compute.Backend, net *nn.Network, layers []prune.ActivationLayer, x compress.Examples, labels []int, f sparsityFlags) error {
	want, _, err := compress.Evaluate(ctx, b, net, x, f.batch)
	if err != nil {
		return err
	}
	shapes, err := net.Shapes(0)
	if err != nil {
		return err
	}
	out := shapes[net.Outputs[0]].Dimensions
	if len(out) < 2 {
		return fmt.Errorf("its output %q is %v; want rows of scores, [cases, ..., scores]", net.Outputs[0], out)
	}
	classes := out[len(out)-1]
	accuracy := func(scores []float32) (*float64, error) {
		if labels == nil || len(scores) != len(labels)*classes {
			return nil, nil
		}
		v, err := compress.Accuracy(scores, classes, labels)
		return &v, err
	}
	if r.Accuracy, err = accuracy(want); err != nil {
		return err
	}
	widest := 0
	for _, l := range layers {
		widest = max(widest, l.Width)
	}
	keep := slices.Clone(f.keep)
	if len(keep) == 0 {
		for k, n := widest/2, 0; k >= 1 && n < 5; k, n = k/2, n+1 {
			keep = append(keep, k)
		}
	}
	slices.Sort(keep)
	slices.Reverse(keep)
	keep = slices.Compact(keep)
	bar := a.progress("keeping the largest")
	defer bar.Close()
	for i, k := range keep {
		limited, err := prune.LimitActivations(net, layers, k)
		if err != nil {
			return err
		}
		got, _, err := compress.Evaluate(ctx, b, limited, x, f.batch)
		if err != nil {
			return err
		}
		s := sparsityKeep{K: k}
		if s.Agreement, err = compress.Compare(want, got, x.Len(), classes); err != nil {
			return err
		}
		if s.Accuracy, err = accuracy(got); err != nil {
			return err
		}
		for _, l := range r.Layers {
			left := float64(min(k, l.Width)) / float64(l.Width)
			if l.Exact {
				left = l.seen.Kept(k)
			}
			s.Saved += int64((1 - left) * float64(l.MACs))
		}
		r.Keep = append(r.Keep, s)
		bar.Set(i+1, len(keep))
	}
	return nil
}

// remark says what a reader should know.
func (r *sparsityReport) remark(layers []prune.ActivationLayer) {
	var names []string
	for _, l := range layers {
		if !l.Exact && !slices.Contains(names, l.Function) {
			names = append(names, l.Function)
		}
	}
	if len(names) > 0 {
		r.Notes = append(r.Notes, fmt.Sprintf("%s has no exact zeros: active is what exceeds a hundredth of the largest magnitude of its token, which is not to be compared with the share behind ReLU. Leaving entries out is an approximation; train with ReLU where activation sparsity is to be used.", strings.Join(names, ", ")))
	}
	if r.Dead > .2 {
		r.Notes = append(r.Notes, fmt.Sprintf("%s of the neurons were active for none of these cases. If they are for no others either they can be removed for good.", share(r.Dead)))
	}
	r.Notes = append(r.Notes, "Multiply-adds are saved by kernels that gather the active columns, as prune.SparseFFN does for one token at a time; a dense matrix product of a large batch saves nothing.")
}

// share is a part of 1 in percent.
func share(v float64) string { return report.Number(100*v) + " %" }

// document lays the result out.
func (r *sparsityReport) document(args []string) *report.Document {
	d := &report.Document{Title: "Activation sparsity of " + filepath.Base(r.Model)}
	d.Subtitle = fmt.Sprintf("%s of the hidden neurons are active for a token, averaged over %d layers; %s never are.", share(r.NonZero), len(r.Layers), share(r.Dead))
	if r.Skipped > 0 {
		d.Subtitle += fmt.Sprintf(" %s of the network's multiply-adds meet a zero.", share(float64(r.Skipped)/float64(max(r.MACs, 1))))
	}
	t := report.Table{
		Title:   "Layers",
		Columns: []string{"layer", "activation", "neurons", "active", "quartiles", "dead", "top tenth's energy", "multiply-adds of zeros"},
		Note:    "Active: mean share of a token's entries; quartiles of that share over the tokens. Dead: neurons that no token activates. Multiply-adds are those of the dense layers that read the activation, for one case.",
	}
	bars := report.Bars{Title: "Active neurons by depth", Unit: "%"}
	profile := report.Curve{Title: "Neurons by how often they are active", XLabel: "neurons, most active first, %", YLabel: "tokens that activate it, %"}
	for _, l := range r.Layers {
		function := l.Function
		if l.Gated {
			function += ", gated"
		}
		skipped := "–"
		if l.Exact {
			skipped = fmt.Sprintf("%s of %s", report.Number(float64(l.Skipped)), report.Number(float64(l.MACs)))
		}
		t.Rows = append(t.Rows, []string{
			l.Layer, function, strconv.Itoa(l.Width), share(l.NonZero),
			fmt.Sprintf("%s – %s – %s", report.Number(100*l.Spread[1]), report.Number(100*l.Spread[2]), report.Number(100*l.Spread[3])),
			strconv.Itoa(l.Dead), share(l.EnergyTop10), skipped,
		})
		bars.Items = append(bars.Items, report.Bar{Label: l.Layer, Group: l.Function, Value: 100 * l.NonZero, Low: 100 * l.Spread[1], High: 100 * l.Spread[3]})
		rates := slices.Clone(l.Rates)
		slices.Sort(rates)
		slices.Reverse(rates)
		line := report.Line{Name: l.Layer}
		for i := 0; i < len(rates); i += max(1, len(rates)/100) {
			line.X = append(line.X, 100*float64(i)/float64(len(rates)))
			line.Y = append(line.Y, 100*rates[i])
		}
		if len(r.Layers) <= 12 {
			profile.Lines = append(profile.Lines, line)
		}
	}
	d.Add(t, bars)
	if len(profile.Lines) > 0 {
		d.Add(profile)
	}
	k := report.Table{
		Title:   "Keeping the largest",
		Columns: []string{"kept per token", "multiply-adds saved", "of the network", "same class", "KL, nats", "cosine"},
		Note:    fmt.Sprintf("Every token keeps so many activations of each layer, without retraining. Judged on %s.", r.Inputs),
	}
	curve := report.Curve{Title: "What dropping activations does", XLabel: "kept per token", YLabel: "same class as before, %", LogX: true, Lines: []report.Line{{Name: "agreement"}}}
	if r.Accuracy != nil {
		k.Columns = append(k.Columns, "accuracy")
		k.Note += fmt.Sprintf(" Accuracy with all activations: %s.", share(*r.Accuracy))
	}
	for _, s := range r.Keep {
		row := []string{
			strconv.Itoa(s.K), report.Number(float64(s.Saved)), share(float64(s.Saved) / float64(max(r.MACs, 1))),
			share(s.Agreement.Top1), report.Number(s.Agreement.KL), report.Number(s.Agreement.Cosine),
		}
		if s.Accuracy != nil {
			row = append(row, share(*s.Accuracy))
		}
		k.Rows = append(k.Rows, row)
		curve.Lines[0].X = append(curve.Lines[0].X, float64(s.K))
		curve.Lines[0].Y = append(curve.Lines[0].Y, 100*s.Agreement.Top1)
	}
	d.Add(k)
	if len(r.Keep) > 1 {
		d.Add(curve)
	}
	d.Add(report.Text{Title: "Notes", Paragraphs: r.Notes})
	d.Facts = []report.Fact{{Name: "Command", Value: "lathe " + strings.Join(args, " ")}, {Name: "Cases", Value: r.Inputs}}
	if r.Output != "" {
		d.Facts = append(d.Facts, report.Fact{Name: "Written", Value: r.Output})
	}
	return d
}

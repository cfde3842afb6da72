package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"

	"github.com/gomlx/compute"
	"github.com/gomlx/gomlx/core/tensors"
	"github.com/spf13/cobra"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/internal/timing"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/fold"
)

// convertKey is the metadata entry in which a network says how it was converted.
const convertKey = "lathe.convert"

// conversions is the table of what convert can do.
var conversions = []struct {
	name, about string
	convert     func(net *nn.Network, r *convertReport) error
}{
	{"rms", "layer norms become RMS norms without gain and bias", func(net *nn.Network, r *convertReport) (err error) {
		r.Recentred, err = recentred(fold.ToPreRMS(net))
		return err
	}},
	{"crms", "the same, and the stream loses a coordinate", func(net *nn.Network, r *convertReport) (err error) {
		r.Recentred, err = recentred(fold.ToPreCRMS(net))
		return err
	}},
	{"fused", "norms with running statistics (batch, unified, power-plain, repbn, prepbn) go into the weights around them", func(net *nn.Network, r *convertReport) error {
		done, err := fold.Norms(net)
		if err != nil {
			return err
		}
		if len(done.Folded)+len(done.Explicit) == 0 {
			return errors.New("there is no norm with running statistics to merge; layer norms are converted by --norm rms")
		}
		r.Folded, r.Explicit = done.Folded, done.Explicit
		for _, k := range done.Kept {
			r.Kept = append(r.Kept, keptNorm(k))
		}
		return nil
	}},
}

func recentred(r fold.Recentered, err error) (*fold.Recentered, error) { return &r, err }

type convertFlags struct {
	norm, output         string
	inputs, data         string
	preprocess           string
	shapes               []string
	cases, batch, rounds int
	tokens, opset        int
	time                 bool
	tolerance            float64
	seed                 uint64
}

// convertReport is what convert prints.
type convertReport struct {
	Model     string           `json:"model"`
	Norm      string           `json:"norm"`
	Output    string           `json:"output"`
	Recentred *fold.Recentered `json:"recentred,omitempty"`
	Folded    []string         `json:"folded,omitempty"`   // norms that went into neighbouring weights
	Explicit  []string         `json:"explicit,omitempty"` // norms that became a scale and a shift
	Kept      []keptNorm       `json:"kept,omitempty"`

	Inputs     string           `json:"inputs"` // what the equality was checked on
	Equality   fold.Equivalence `json:"equality"`
	Accuracy   *[2]float64      `json:"accuracy,omitempty"` // before and after, in [0, 1], when there are labels
	Nodes      [2]int           `json:"nodes"`              // before and after
	Parameters [2]int           `json:"parameters"`         // constants not counted
	MACs       [2]int64         `json:"multiply_adds"`      // of one case
	Time       *convertTime     `json:"time,omitempty"`
}

// keptNorm is a norm that stays, and why.
type keptNorm struct {
	Node   string `json:"node"`
	Reason string `json:"reason"`
}

// convertTime is the time of one batch in seconds: medians over the rounds, and the ratio after/before of the paired rounds
// with its quartiles.
type convertTime struct {
	Batch  int     `json:"batch"`
	Rounds int     `json:"rounds"`
	Before float64 `json:"before_seconds"`
	After  float64 `json:"after_seconds"`
	Ratio  float64 `json:"ratio"`
	Low    float64 `json:"ratio_low"`
	High   float64 `json:"ratio_high"`
}

func newConvertCommand(a *app) *cobra.Command {
	var f convertFlags
	var names []string
	about := ""
	for _, c := range conversions {
		names = append(names, c.name)
		about += fmt.Sprintf("  %-7s%s\n", c.name, c.about)
	}
	cmd := &cobra.Command{
		Use:   "convert MODEL --norm " + strings.Join(names, "|") + " -o OUT.onnx|OUT.safetensors",
		Short: "Give a trained network cheaper norms that compute the same",
		Long: `Convert a trained network (ONNX, safetensors that lathe wrote, or a BERT encoder in Hugging Face's layout) so that its
norms are cheaper and its outputs stay. --norm says how:

` + about + `
rms and crms are for pre-norm transformers (arXiv:2305.14858), such as ViT and GPT: every reader of the residual stream
begins with a layer norm, which takes the mean away, so the mean may be taken away where it is written. The stream is
found by itself. Post-norm networks, such as BERT, and others whose stream is read or changed without a norm are refused
with the node that stands in the way.

The converted network is run beside the original: on --inputs (an .npy file, one for each input separated by commas, or
a folder of pictures), on the test part of a data set (--data, with the accuracy before and after), or else on random
inputs. It is written if the outputs differ by no more than --tolerance, relative to 1 plus the largest output. --time
compares the speed of both.`,
		Example: `  lathe convert vit.safetensors --norm rms --data fashion-mnist --time -o vit-rms.safetensors
  lathe convert vit.onnx --norm crms --inputs test.npy -o vit-crms.onnx
  lathe convert resnet.onnx --norm fused --inputs images/ -o resnet-fused.onnx`,
		Args: exactArgs("a model"),
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := convert(cmd.Context(), a, args[0], f)
			if err != nil {
				return err
			}
			return a.emit(r, r.write)
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.norm, "norm", "", "how: "+strings.Join(names, ", "))
	fl.StringVarP(&f.output, "output", "o", "", "file to write (.onnx or .safetensors)")
	fl.StringVar(&f.inputs, "inputs", "", "inputs to check on: .npy, or a folder of pictures")
	fl.StringVar(&f.data, "data", "", "data set to check on: "+strings.Join(labelledSets(), ", "))
	fl.IntVar(&f.cases, "cases", 0, "so many cases of them; -1: all (default: 1000, or 64 random ones)")
	fl.StringVar(&f.preprocess, "preprocess", "", "how pictures become inputs; see lathe compress --help")
	fl.Float64Var(&f.tolerance, "tolerance", 1e-3, "largest difference of an output, relative to 1 plus the largest output")
	fl.BoolVar(&f.time, "time", false, "compare the speed of both networks")
	fl.IntVar(&f.batch, "batch", 64, "cases per pass")
	fl.IntVar(&f.rounds, "rounds", 15, "rounds of --time, in each of which both have a turn")
	fl.StringArrayVar(&f.shapes, "shape", nil, "shape of an input that the model leaves open, name=1,3,48,320; may be repeated")
	fl.IntVar(&f.tokens, "tokens", 0, "length of a BERT encoder's inputs (default: 128)")
	fl.Uint64Var(&f.seed, "seed", 0, "seed of random inputs")
	fl.IntVar(&f.opset, "opset", 0, "operator set of an ONNX file, 17 to 21 (default: 17)")
	_ = cmd.RegisterFlagCompletionFunc("norm", oneOf(names...))
	_ = cmd.RegisterFlagCompletionFunc("data", oneOf(labelledSets()...))
	return cmd
}

// check looks at the flags before anything is read.
func (f convertFlags) check(model string) error {
	names := make([]string, len(conversions))
	for i, c := range conversions {
		names[i] = c.name
	}
	switch {
	case f.norm == "":
		return usageErrorf("say how with --norm: %s", strings.Join(names, ", "))
	case !slices.Contains(names, f.norm):
		return chooseOne("norm", f.norm, names)
	case f.output == "":
		return usageErrorf("name the file to write with -o")
	case !isNetworkFile(f.output):
		return usageErrorf("-o %s; networks are written as .onnx or .safetensors", f.output)
	case sameFile(f.output, model):
		return usageErrorf("-o %s would overwrite the model; name another file", f.output)
	case f.inputs != "" && f.data != "":
		return usageErrorf("give --inputs or --data, not both")
	case f.data != "" && !slices.Contains(labelledSets(), f.data):
		return chooseOne("data", f.data, labelledSets())
	case f.batch < 1 || f.batch > 1<<16 || f.rounds < 1 || f.cases < -1:
		return usageErrorf("--batch %d, --rounds %d, --cases %d: must be positive (--cases -1: all)", f.batch, f.rounds, f.cases)
	case !(f.tolerance > 0) || math.IsInf(f.tolerance, 0):
		return usageErrorf("--tolerance %g; it must be positive", f.tolerance)
	}
	return nil
}

func convert(ctx context.Context, a *app, model string, f convertFlags) (*convertReport, error) {
	if err := f.check(model); err != nil {
		return nil, err
	}
	dims, err := parseShapes(f.shapes)
	if err != nil {
		return nil, err
	}
	before, err := readAnyNetwork(model, dims, f.tokens)
	if err != nil {
		return nil, err
	}
	r := &convertReport{Model: model, Norm: f.norm, Output: f.output}
	after := before.Clone()
	for _, c := range conversions {
		if c.name == f.norm {
			if err := c.convert(after, r); err != nil {
				return nil, fmt.Errorf("%s cannot be converted: %w", model, err)
			}
		}
	}
	if r.Recentred != nil {
		for _, k := range r.Recentred.Kept {
			r.Kept = append(r.Kept, keptNorm(k))
		}
	}
	r.Nodes, r.Parameters = [2]int{len(before.Nodes), len(after.Nodes)}, [2]int{before.Params.Count(), after.Params.Count()}
	for i, n := range []*nn.Network{before, after} {
		cost, err := n.Cost(1)
		if err != nil {
			return nil, err
		}
		r.MACs[i] = cost.MACs
	}
	backend, err := a.backend()
	if err != nil {
		return nil, err
	}
	x, labels, what, err := f.examples(ctx, model, before)
	if err != nil {
		return nil, err
	}
	r.Inputs = what
	if err := r.compare(ctx, a, backend, before, after, x, labels, f); err != nil {
		return nil, err
	}
	if !(r.Equality.Relative <= f.tolerance) {
		return nil, fmt.Errorf("%s: outputs of the converted network differ by %.3g (%.2g of 1 plus the largest) on %s, and --tolerance is %g; nothing was written", model, r.Equality.MaxDiff, r.Equality.Relative, r.Inputs, f.tolerance)
	}
	if f.time {
		if r.Time, err = timeConversion(ctx, a, backend, before, after, x, f); err != nil {
			return nil, err
		}
	}
	if after.Meta == nil {
		after.Meta = map[string]string{}
	}
	after.Meta[convertKey] = f.norm
	return r, writeNetwork(f.output, after, f.opset)
}

// examples are what the networks are compared on, and their labels if there are any.
func (f convertFlags) examples(ctx context.Context, model string, net *nn.Network) (compress.Examples, []int, string, error) {
	if f.inputs != "" || f.data != "" {
		return exampleSource{model: model, inputs: f.inputs, data: f.data, preprocess: f.preprocess}.load(ctx, net, cmp.Or(f.cases, 1000))
	}
	n := f.cases
	if n <= 0 {
		n = 64
	}
	x, err := randomExamples(net, n, f.seed)
	return x, nil, fmt.Sprintf("%d random inputs", n), err
}

// compare runs both networks over the examples.
func (r *convertReport) compare(ctx context.Context, a *app, b compute.Backend, before, after *nn.Network, x compress.Examples, labels []int, f convertFlags) error {
	bar := a.progress("comparing")
	defer bar.Close()
	var runners [2]*nn.Runner
	for i, n := range []*nn.Network{before, after} {
		var err error
		if runners[i], err = nn.NewRunner(b, n, nn.RunOptions{}); err != nil {
			return err
		}
		defer runners[i].Finalize()
	}
	if err := x.Check(before); err != nil {
		return err
	}
	var right [2]int
	for from := 0; from < x.Len(); from += f.batch {
		if err := ctx.Err(); err != nil {
			return err
		}
		to := min(from+f.batch, x.Len())
		in, err := x.Slice(from, to, 0)
		if err != nil {
			return err
		}
		var out [2][]*tensors.Tensor
		for i := range runners {
			if out[i], err = runners[i].Run(in...); err != nil {
				return err
			}
			if labels != nil {
				right[i] += countRight(nn.Floats(out[i][0]), labels[from:to])
			}
		}
		if err := r.Equality.Add(out[0], out[1]); err != nil {
			return err
		}
		bar.Set(to, x.Len())
	}
	if labels != nil {
		r.Accuracy = &[2]float64{float64(right[0]) / float64(len(labels)), float64(right[1]) / float64(len(labels))}
	}
	return nil
}

func countRight(out []float32, labels []int) (n int) {
	width := len(out) / len(labels)
	for i, l := range labels {
		row := out[i*width : (i+1)*width]
		if l < width && slices.Index(row, slices.Max(row)) == l {
			n++
		}
	}
	return n
}

// timeConversion times a batch on both networks, turn by turn.
func timeConversion(ctx context.Context, a *app, b compute.Backend, before, after *nn.Network, x compress.Examples, f convertFlags) (*convertTime, error) {
	in, err := x.Slice(0, min(f.batch, x.Len()), f.batch)
	if err != nil {
		return nil, err
	}
	var passes []func() error
	for _, n := range []*nn.Network{before, after} {
		r, err := nn.NewRunner(b, n, nn.RunOptions{})
		if err != nil {
			return nil, err
		}
		defer r.Finalize()
		passes = append(passes, func() error { _, err := r.Run(in...); return err })
	}
	bar := a.progress("timing")
	defer bar.Close()
	times, err := timing.Interleaved(ctx, f.rounds, bar.Set, passes...)
	if err != nil {
		return nil, err
	}
	t := &convertTime{Batch: f.batch, Rounds: f.rounds, Before: times[0].Median(), After: times[1].Median()}
	t.Ratio, t.Low, t.High = times[1].Ratio(times[0])
	return t, nil
}

func (r *convertReport) write(w io.Writer) error {
	list := func(what string, names []string) {
		if len(names) > 0 {
			fmt.Fprintf(w, "%s: %s\n", what, strings.Join(names, ", "))
		}
	}
	if c := r.Recentred; c != nil {
		for _, s := range c.Streams {
			width := fmt.Sprint(s.Dim)
			if r.Norm == "crms" {
				width = fmt.Sprintf("%d, now %d", s.Dim, s.Dim-1)
			}
			fmt.Fprintf(w, "stream of width %s: %d writers re-centred, %d norms, %d readers\n", width, len(s.Writers), len(s.Norms), len(s.Readers))
		}
		list("shared parameters that were copied first", c.Untied)
		list("taken into the weights, or idle at inference", c.Removed)
		list("norms that keep gain and bias, because something else than linear layers reads them", c.Affine)
		list("norms behind which a dense layer gives the whole vector back", c.Wide)
	}
	list("merged into neighbouring layers", r.Folded)
	list("a scale and a shift in their place", r.Explicit)
	for _, k := range r.Kept {
		fmt.Fprintf(w, "kept: %s: %s\n", k.Node, k.Reason)
	}
	e := r.Equality
	fmt.Fprintf(w, "on %s: outputs differ by %.2g at most (%.1g of 1 plus the largest, %.3g), the same is greatest in %.2f %% of %d\n",
		r.Inputs, e.MaxDiff, e.Relative, e.Largest, 100*e.Top1, e.Rows)
	if a := r.Accuracy; a != nil {
		fmt.Fprintf(w, "accuracy %.2f %%, was %.2f %%\n", 100*a[1], 100*a[0])
	}
	fmt.Fprintf(w, "%d parameters, were %d; %d operations, were %d; %d multiply-adds for one case, were %d\n",
		r.Parameters[1], r.Parameters[0], r.Nodes[1], r.Nodes[0], r.MACs[1], r.MACs[0])
	if t := r.Time; t != nil {
		fmt.Fprintf(w, "a batch of %d takes %.3g ms, was %.3g ms: %.3f of the time (quartiles of %d rounds %.3f to %.3f)\n",
			t.Batch, 1e3*t.After, 1e3*t.Before, t.Ratio, t.Rounds, t.Low, t.High)
	}
	_, err := fmt.Fprintln(w, r.Output)
	return err
}

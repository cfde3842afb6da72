package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
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
	tinytrain "github.com/lathe-ml/lathe/compress/tiny"
	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/internal/atomicfile"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/internal/stat"
	"github.com/lathe-ml/lathe/lab/report"
	"github.com/lathe-ml/lathe/nn"
)

type deployTrainFlags struct {
	data, inputs, labels, preprocess string
	shapes                           []string
	memory, scheme, classifier       string
	cases, calibCases, epochs        int
	held, lr, decay                  float64
	accumulate                       int
	inPlace, noScaling, dryRun       bool
	seed                             uint64
	output, planFile                 string
	opset                            int
}

// deployKey is the metadata of how a network was adapted.
const deployKey = "lathe.deploy-train"

func newDeployTrainCommand(a *app) *cobra.Command {
	var f deployTrainFlags
	cmd := &cobra.Command{
		Use:   "deploy-train MODEL --data NAME | --inputs FILE.npy|DIR --labels FILE --memory SIZE -o OUT.onnx|OUT.safetensors",
		Short: "Adapt an int8 network to new data within a memory budget, as on the device it is deployed on",
		Long: `Fine-tune a convolutional classifier as a microcontroller does (arXiv:2206.15472): all in int8, with gradients scaled to
the codes, biases of the last layers and chosen channels of some weights, and every byte planned beforehand. A network in
float is quantised first; one with QuantizeLinear and DequantizeLinear keeps its grids. It may hold convolutions (over all
channels or depthwise), ReLU, ReLU6, residual sums, a global average and a dense classifier; a network with something
else is refused, naming it.

--memory is what the arena of the training step may take: activations, masks, gradients and the trained copies of
weights, for one case at a time. Weights in flash are not counted. The plan says which layers and channels are trained, where each
buffer lies, and how long it takes here; --dry-run stops there.

Which weights to train, --scheme:
  auto        those with the largest gradients on the data for their bytes (one pass)
  measured    those whose short training gains most for their bytes (one training per choice: minutes)
  last:K      weights and biases of the last K layers
  bias:K      biases of the last K layers
  classifier  the classifier alone
  full        everything
  FILE.json   a scheme as --plan wrote it, or {"biases": 6, "weights": {"17": 0.25}}

The data are a data set, or a folder of pictures or an .npy file with --labels (CSV of file,label, for .npy of the number of
the case,label; or an .npy of classes). Classes other than the network's get a new classifier.

A run that is stopped goes on where it was: after Ctrl-C, a crash or a kill the same command finds what was trained in the
cache, of a kill up to the last 20 seconds, and ends with the file of a run that was never stopped.`,
		Example: `  lathe deploy-train model.onnx --data digits --memory 256KB --dry-run
  lathe deploy-train model.onnx --data digits --memory 64KB -o adapted.onnx
  lathe deploy-train model.onnx --inputs photos/ --labels labels.csv --memory 256KB --scheme last:6 -o adapted.onnx
  lathe deploy-train model.safetensors --data fashion-mnist --memory 100KB --in-place --json -o adapted.safetensors`,
		Args: exactArgs("a model"),
		RunE: func(cmd *cobra.Command, args []string) error {
			memory, err := f.check(args[0])
			if err != nil {
				return err
			}
			r, err := deployTrain(cmd.Context(), a, args[0], f, int(memory))
			if err != nil {
				return err
			}
			d := r.document()
			return a.emit(r, func(w io.Writer) error { return d.WriteText(w, a.width()) })
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.data, "data", "", "data set: "+strings.Join(labelledSets(), ", "))
	fl.StringVar(&f.inputs, "inputs", "", "examples: a folder of pictures, or .npy")
	fl.StringVar(&f.labels, "labels", "", "classes of --inputs: CSV of file,label, or .npy")
	fl.StringVar(&f.preprocess, "preprocess", "", `how pictures become inputs; "lathe compress --help" says how to write it (default: as the model's metadata say)`)
	fl.StringArrayVar(&f.shapes, "shape", nil, "shape of an input that the model leaves open, name=1,3,224,224; may be repeated")
	fl.StringVar(&f.memory, "memory", "256KB", "what the training step's arena may take, such as 256KB or 64KiB")
	fl.StringVar(&f.scheme, "scheme", "auto", "what is trained: auto, measured, last:K, bias:K, classifier, full, or FILE.json")
	fl.StringVar(&f.classifier, "classifier", "", "keep or new (default: new when the classes are others in number)")
	fl.IntVar(&f.cases, "cases", 2000, "use so many cases at most, drawn by --seed; -1: all")
	fl.IntVar(&f.calibCases, "calib-cases", 256, "cases on which activations are calibrated")
	fl.Float64Var(&f.held, "held", .2, "share of the cases that is held out to judge the result")
	fl.IntVar(&f.epochs, "epochs", 5, "passes over the training cases")
	fl.Float64Var(&f.lr, "lr", .03, "peak learning rate, which falls along a cosine")
	fl.Float64Var(&f.decay, "decay", 0, "weight decay")
	fl.IntVar(&f.accumulate, "accumulate", 1, "cases whose gradients are summed for an update; above 1 the gradients stay in memory")
	fl.BoolVar(&f.inPlace, "in-place", false, "trained weights stay int8, updates are rounded at random: a byte per trained weight instead of four")
	fl.BoolVar(&f.noScaling, "no-scaling", false, "gradients of the codes as they are, without quantisation-aware scaling (to see what it does)")
	fl.BoolVar(&f.dryRun, "dry-run", false, "print the plan and stop")
	fl.Uint64Var(&f.seed, "seed", 0, "of draws, order and rounding")
	fl.IntVar(&f.opset, "opset", 0, "operator set of an ONNX file (default: the writer's own)")
	fl.StringVar(&f.planFile, "plan", "", "write the plan to this JSON file")
	fl.StringVarP(&f.output, "output", "o", "", "file to write: .onnx (QDQ, integers in ONNX Runtime) or .safetensors")
	_ = cmd.RegisterFlagCompletionFunc("data", oneOf(labelledSets()...))
	_ = cmd.RegisterFlagCompletionFunc("classifier", oneOf("keep", "new"))
	_ = cmd.RegisterFlagCompletionFunc("scheme", oneOf("auto", "measured", "last:6", "bias:6", "classifier", "full"))
	return cmd
}

func (f deployTrainFlags) check(model string) (memory int64, err error) {
	if memory, err = parseBytes(f.memory); err != nil {
		return 0, usageErrorf("--memory %q: %v", f.memory, err)
	}
	switch {
	case (f.data == "") == (f.inputs == ""):
		return 0, usageErrorf("say what to train on: --data (%s), or --inputs with --labels", strings.Join(labelledSets(), ", "))
	case f.data != "" && !slices.Contains(labelledSets(), f.data):
		return 0, chooseOne("data", f.data, labelledSets())
	case f.inputs != "" && f.labels == "":
		return 0, usageErrorf("--inputs needs the classes of the cases: --labels, a CSV of file,label or an .npy of classes")
	case f.data != "" && f.labels != "":
		return 0, usageErrorf("--labels is for --inputs; --data %s brings its own", f.data)
	case memory > 1<<31:
		return 0, usageErrorf("--memory %s: at most 2 GiB; with more, ordinary fine-tuning is simpler and at least as accurate", f.memory)
	case f.cases == 0 || f.cases < -1:
		return 0, usageErrorf("--cases %d; give a positive number, or -1 for all", f.cases)
	case f.calibCases < 1:
		return 0, usageErrorf("--calib-cases %d; give a positive number", f.calibCases)
	case !(f.held > 0 && f.held < 1):
		return 0, usageErrorf("--held %g; give a share between 0 and 1", f.held)
	case f.epochs < 1 || f.epochs > 10_000:
		return 0, usageErrorf("--epochs %d; must be 1 to 10000", f.epochs)
	case !(f.lr > 0 && f.lr < 1e6):
		return 0, usageErrorf("--lr %g; must be positive", f.lr)
	case !(f.decay >= 0 && f.decay < 1e6):
		return 0, usageErrorf("--decay %g; must be 0 or more", f.decay)
	case f.accumulate < 1 || f.accumulate > 1<<16:
		return 0, usageErrorf("--accumulate %d; must be 1 to 65536", f.accumulate)
	case !slices.Contains([]string{"", "keep", "new"}, f.classifier):
		return 0, usageErrorf("--classifier %s; accepted: keep, new", f.classifier)
	case f.output == "" && !f.dryRun:
		return 0, usageErrorf("name the file to write with -o, or look at the plan with --dry-run")
	case f.output != "" && !isNetworkFile(f.output):
		return 0, usageErrorf("-o %s; networks are written as .onnx or .safetensors", f.output)
	case f.output != "" && sameFile(f.output, model):
		return 0, usageErrorf("-o %s would overwrite the model; name another file", f.output)
	}
	if !strings.HasSuffix(f.scheme, ".json") {
		_, err = f.named(1 << 20)
	}
	return memory, err
}

// named is the scheme that --scheme names, for a network of so many convolutions; nil for one that is to be found.
func (f deployTrainFlags) named(convs int) (*tinytrain.Scheme, error) {
	kind, count, has := strings.Cut(f.scheme, ":")
	k, err := strconv.Atoi(count)
	if has && (err != nil || k < 1) || !has && (kind == "last" || kind == "bias") {
		return nil, usageErrorf("--scheme %s; write last:6 or bias:6", f.scheme)
	}
	if k > convs {
		return nil, usageErrorf("--scheme %s: the network has %d layers with weights", f.scheme, convs)
	}
	s := &tinytrain.Scheme{Weights: map[int]float64{}, Seed: f.seed}
	switch {
	case kind == "auto" && !has, kind == "measured" && !has:
		return nil, nil
	case kind == "classifier" && !has:
	case kind == "full" && !has:
		k = convs
		fallthrough
	case kind == "last":
		for i := convs - k; i < convs && convs < 1<<20; i++ {
			s.Weights[i] = 1
		}
		s.Biases = k
	case kind == "bias":
		s.Biases = k
	default:
		return nil, usageErrorf("--scheme %s; accepted: auto, measured, last:K, bias:K, classifier, full, or a .json file", f.scheme)
	}
	return s, nil
}

// schemeOf is the scheme to use, nil when it is to be found.
func (f deployTrainFlags) schemeOf(net *tinytrain.Net) (*tinytrain.Scheme, error) {
	if !strings.HasSuffix(f.scheme, ".json") {
		return f.named(len(net.Convs()))
	}
	b, err := os.ReadFile(f.scheme)
	if err != nil {
		return nil, err
	}
	var file struct {
		tinytrain.Scheme
		Plan *struct{ Scheme tinytrain.Scheme } `json:"plan"`
	}
	if err := json.Unmarshal(b, &file); err != nil {
		return nil, fmt.Errorf("%s: is no scheme: %w", f.scheme, err)
	}
	s := file.Scheme
	if file.Plan != nil {
		s = file.Plan.Scheme
	}
	if err := s.Check(net); err != nil {
		return nil, fmt.Errorf("%s: %w", f.scheme, err)
	}
	return &s, nil
}

// deployTrainResult is what deploy-train prints as JSON.
type deployTrainResult struct {
	Model     string          `json:"model"`
	Data      string          `json:"data"`
	Cases     int             `json:"training_cases"`
	Held      int             `json:"held_cases"`
	Classes   int             `json:"classes"`
	Quantised bool            `json:"quantised_here"` // the model was in float
	Memory    int             `json:"memory"`         // the budget, bytes
	Weights   int64           `json:"weight_bytes"`   // of the int8 network, in flash
	Plan      *tinytrain.Plan `json:"plan"`
	Steps     int             `json:"steps"`
	StepTime  float64         `json:"seconds_per_step"` // here
	Estimate  float64         `json:"estimated_seconds"`
	DryRun    bool            `json:"dry_run,omitempty"`

	Before  *float64  `json:"accuracy_before,omitempty"` // share of held cases, with the classifier that the model came with
	After   *float64  `json:"accuracy,omitempty"`
	Low     float64   `json:"accuracy_low,omitempty"`
	High    float64   `json:"accuracy_high,omitempty"`
	Loss    float64   `json:"loss,omitempty"`
	Losses  []float64 `json:"epoch_losses,omitempty"`
	Seconds float64   `json:"seconds,omitempty"`
	Output  string    `json:"output,omitempty"`
	Notes   []string  `json:"notes,omitempty"`
}

func deployTrain(ctx context.Context, a *app, model string, f deployTrainFlags, memory int) (*deployTrainResult, error) {
	dims, err := parseShapes(f.shapes)
	if err != nil {
		return nil, err
	}
	net, err := readAnyNetwork(model, dims, 0)
	if err != nil {
		return nil, err
	}
	r := &deployTrainResult{Model: model, Memory: memory, DryRun: f.dryRun, Output: f.output, Quantised: !slices.ContainsFunc(net.Nodes, func(n *nn.Node) bool { _, ok := n.Op.(nn.QuantizeDequantize); return ok })}
	x, labels, err := f.examples(ctx, model, net, r)
	if err != nil {
		return nil, err
	}
	backend, err := a.backend()
	if err != nil {
		return nil, err
	}
	key, err := f.key(model, backend, x, labels)
	if err != nil {
		return nil, err
	}
	journal, err := a.openJournal("deploy-train", key)
	if err != nil {
		return nil, err
	}
	err = f.adapt(ctx, a, net, x, labels, backend, journal, r)
	if errors.Is(err, tinytrain.ErrBudget) || errors.Is(err, tinytrain.ErrScheme) { // it will be refused the next time too
		return nil, errors.Join(err, journal.Remove())
	}
	return r, closeJournal(journal, err)
}

// deployVersion changes when what an earlier program kept of a stopped run must not be taken over.
const deployVersion = "lathe deploy-train 1"

// key hashes what the results depend on: the model's bytes, the examples with their classes, the backend, the settings and,
// where --scheme names a file, what it says.
func (f deployTrainFlags) key(model string, b compute.Backend, x compress.Examples, labels []int) (string, error) {
	h := sha256.New()
	scheme := f.scheme
	if strings.HasSuffix(scheme, ".json") {
		content, err := os.ReadFile(scheme)
		if err != nil {
			return "", err
		}
		scheme = string(content)
	}
	f.data, f.inputs, f.labels, f.preprocess, f.scheme = "", "", "", "", "" // the examples are hashed themselves
	f.output, f.planFile, f.opset = "", "", 0
	fmt.Fprintf(h, "%s\n%+v\n%q\n%s\n%v\n", deployVersion, f, scheme, b.Name(), labels)
	if err := hashModel(h, model); err != nil {
		return "", err
	}
	if err := hashExamples(h, x); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// adapt quantises, plans, trains and writes. With a journal, what was finished or is under way is taken from there.
func (f deployTrainFlags) adapt(ctx context.Context, a *app, net *nn.Network, x compress.Examples, labels []int, backend compute.Backend, journal *compress.Journal, r *deployTrainResult) error {
	order := rng.New(f.seed, "deploy-train").Perm(x.Len())
	if f.cases > 0 {
		order = order[:min(f.cases, len(order))]
	}
	held := max(1, int(f.held*float64(len(order))))
	if len(order)-held < 1 {
		return fmt.Errorf("%s: %d cases are too few to train on some and judge on others", r.Data, len(order))
	}
	calib, err := x.Pick(order[held:min(held+f.calibCases, len(order))])
	if err != nil {
		return err
	}
	var q *tinytrain.Net // kept, because not every backend computes the same ranges twice
	if _, err := journal.Do("network", &q, func() (err error) {
		q, err = tinytrain.Quantize(ctx, backend, net, calib, tinytrain.QuantizeOptions{})
		return err
	}); err != nil {
		return fmt.Errorf("%s: %w", r.Model, err)
	}
	all := examplesFrom(x, labels)
	train, judge := all.Pick(order[held:]), all.Pick(order[:held])
	r.Cases, r.Held, r.Weights = train.Len(), judge.Len(), q.WeightBytes()
	for _, l := range labels {
		r.Classes = max(r.Classes, l+1)
	}
	switch fits := r.Classes == q.Head.Classes; {
	case f.classifier == "keep" && r.Classes > q.Head.Classes:
		return fmt.Errorf("the data have %d classes, the network's classifier %d; use --classifier new", r.Classes, q.Head.Classes)
	case f.classifier == "new" || !fits && f.classifier == "":
		if q, err = q.WithClasses(max(r.Classes, 2)); err != nil {
			return err
		}
		r.Notes = append(r.Notes, "the classifier is new")
	default:
		before, err := tinytrain.Evaluate(ctx, q, judge)
		if err != nil {
			return err
		}
		r.Before = &before.Accuracy
	}
	o := tinytrain.CompileOptions{Accumulate: f.accumulate, InPlace: f.inPlace, NoQAS: f.noScaling, Decay: f.decay, Seed: f.seed}
	if err := f.plan(ctx, a, q, train, judge, o, journal, r); err != nil {
		return err
	}
	if f.planFile != "" {
		err := atomicfile.Write(f.planFile, func(w io.Writer) error {
			e := json.NewEncoder(w)
			e.SetIndent("", "  ")
			return e.Encode(map[string]any{"model": r.Model, "memory": r.Memory, "plan": r.Plan})
		})
		if err != nil {
			return err
		}
	}
	if f.dryRun {
		return nil
	}
	if _, err := os.Stat(filepath.Dir(f.output)); err != nil {
		return fmt.Errorf("-o %q: there is no folder %q", f.output, filepath.Dir(f.output))
	}
	bar := a.progress("training")
	start := time.Now()
	res, err := tinytrain.Train(ctx, q, r.Plan.Scheme, train, judge, tinytrain.TrainOptions{CompileOptions: o, Epochs: f.epochs, LR: f.lr, Order: f.seed, Journal: journal, Progress: func(done, total int, _ float64) { bar.Set(done, total) }})
	bar.Close()
	if err != nil {
		return err
	}
	r.Seconds = time.Since(start).Seconds()
	r.After, r.Loss, r.Losses = &res.Validation.Accuracy, res.Validation.Loss, res.Losses
	r.Low, r.High = stat.Wilson(int(res.Validation.Accuracy*float64(judge.Len())+.5), judge.Len(), .95)
	out, err := res.Net.Network()
	if err != nil {
		return err
	}
	note, err := json.Marshal(map[string]any{"data": r.Data, "memory": r.Memory, "scheme": r.Plan.Scheme, "epochs": f.epochs, "lr": f.lr, "seed": f.seed})
	if err != nil {
		return err
	}
	if out.Meta == nil {
		out.Meta = map[string]string{}
	}
	out.Meta[deployKey] = string(note)
	if spec := net.Meta[preprocessKey]; spec == "" && f.preprocess != "" {
		out.Meta[preprocessKey] = f.preprocess
	}
	return writeNetwork(f.output, out, f.opset)
}

// plan finds what is trained, and measures a step.
func (f deployTrainFlags) plan(ctx context.Context, a *app, q *tinytrain.Net, train, judge *tinytrain.Examples, o tinytrain.CompileOptions, journal *compress.Journal, r *deployTrainResult) error {
	fit := tinytrain.FitOptions{Compile: o}
	var err error
	if fit.Scheme, err = f.schemeOf(q); err != nil {
		return err
	}
	if fit.Scheme == nil && f.scheme == "measured" {
		bar := a.progress("contributions")
		some := train.Pick(data.Range(min(train.Len(), 500)))
		fit.Contrib, err = tinytrain.Contribution(ctx, q, some, judge, tinytrain.ContribOptions{Ratios: []float64{.25, 1}, Train: tinytrain.TrainOptions{Epochs: 1, LR: f.lr, Journal: journal}, Progress: bar.Set})
		bar.Close()
		if err != nil {
			return err
		}
	}
	all, err := tinytrain.MakePlan(q, tinytrain.Everything(q), tinytrain.CompileOptions{})
	if err != nil {
		return err
	}
	const work = 2e10 // multiply-adds that the pass over the data may take: seconds
	looked := min(train.Len(), max(8, min(128, int(work/float64(all.MACs)))))
	if r.Plan, err = tinytrain.Fit(ctx, q, train.Pick(data.Range(looked)), r.Memory, fit); err != nil {
		return err
	}
	r.Steps = f.epochs * train.Len()
	p, err := tinytrain.Compile(q, &r.Plan.Scheme, o)
	if err != nil {
		return err
	}
	defer p.Close()
	var times []float64
	for i := range min(train.Len(), 12) {
		start := time.Now()
		if _, err := p.Step(train.X[i], train.Labels[i], 0); err != nil {
			return err
		}
		times = append(times, time.Since(start).Seconds())
	}
	r.StepTime = stat.Median(times)
	r.Estimate = r.StepTime * float64(r.Steps)
	return nil
}

// examples reads the cases and their classes.
func (f deployTrainFlags) examples(ctx context.Context, model string, net *nn.Network, r *deployTrainResult) (x compress.Examples, labels []int, err error) {
	if f.inputs != "" {
		c, err := exampleSource{model: model, inputs: f.inputs, preprocess: f.preprocess}.open(ctx, net)
		if err != nil {
			return nil, nil, err
		}
		if labels, err = c.labels(f.labels); err != nil {
			return nil, nil, err
		}
		r.Data = f.inputs
		x, err = c.load(data.Range(c.n))
		return x, labels, err
	}
	set, err := loadLabelled(ctx, f.data, true)
	if err != nil {
		return nil, nil, err
	}
	r.Data = f.data
	if f.cases > 0 && f.cases < set.N { // a large set is not made floats as a whole
		if set.Images, err = set.Subset(rng.New(f.seed, "deploy-train:cases").Perm(set.N)[:f.cases]); err != nil {
			return nil, nil, err
		}
	}
	for _, l := range set.Labels {
		labels = append(labels, int(l))
	}
	x, err = picturesOf(set.Images, net, f.preprocess)
	return x, labels, err
}

// picturesOf makes a data set's pictures inputs of a network: as they are where the sizes agree, else scaled as the
// preprocessing says.
func picturesOf(m *data.Images, net *nn.Network, spec string) (compress.Examples, error) {
	if len(net.Inputs) != 1 {
		return nil, fmt.Errorf("the network has %d inputs; pictures are for one", len(net.Inputs))
	}
	in := net.Inputs[0]
	d := slices.Clone(in.Shape.Dimensions)
	if len(d) == 4 && spec == "" && fmt.Sprint(d[1:]) == fmt.Sprint([]int{m.H, m.W, m.C}) {
		t, err := m.Float32(nil)
		return compress.Examples{t}, err
	}
	if spec == "" {
		if spec = net.Meta[preprocessKey]; spec == "" && len(d) == 4 { // in [0, 1], stretched to the input
			h, w := d[1], d[2]
			if d[1] == 1 || d[1] == 3 {
				h, w = d[2], d[3]
			}
			spec = fmt.Sprintf("resize=%dx%d,mean=0,std=1", w, h)
		}
	}
	p, err := parsePreprocessing(spec)
	if err != nil {
		return nil, err
	}
	if p, err = p.fit(in); err != nil {
		return nil, err
	}
	d[0] = m.N
	row := in.Shape.Size() / max(in.Shape.Dimensions[0], 1)
	x := make([]float32, m.N*row)
	for i := range m.N {
		if err := p.apply(m.Image(i), x[i*row:(i+1)*row]); err != nil {
			return nil, fmt.Errorf("picture %d: %w", i, err)
		}
	}
	return compress.FloatExamples(x, d...)
}

func examplesFrom(x compress.Examples, labels []int) *tinytrain.Examples {
	e := &tinytrain.Examples{Labels: labels}
	v := nn.Floats(x[0])
	row := len(v) / x.Len()
	for i := range x.Len() {
		e.X = append(e.X, v[i*row:(i+1)*row])
	}
	return e
}

// document prints the plan and what came of it.
func (r *deployTrainResult) document() *report.Document {
	p := r.Plan
	d := &report.Document{Title: "Training " + filepath.Base(r.Model) + " in " + report.Bytes(int64(r.Memory))}
	d.Subtitle = fmt.Sprintf("The training step takes %s; inference alone %s, training everything %s.", report.Bytes(int64(p.Peak)), report.Bytes(int64(p.Inference)), report.Bytes(int64(p.Full)))
	if r.After != nil {
		d.Subtitle = fmt.Sprintf("Accuracy %.2f %% (%.2f to %.2f) on %d held cases. ", 100**r.After, 100*r.Low, 100*r.High, r.Held) + d.Subtitle
	}
	facts := report.Table{Columns: []string{"", ""}}
	row := func(name, format string, v ...any) {
		facts.Rows = append(facts.Rows, []string{name, fmt.Sprintf(format, v...)})
	}
	source := "int8 with grids of its own"
	if r.Quantised {
		source = "float, quantised here"
	}
	row("model", "%s (%s), %s of weights in flash", r.Model, source, report.Bytes(r.Weights))
	row("data", "%s: %d cases to train on, %d held, %d classes", r.Data, r.Cases, r.Held, r.Classes)
	row("arena", "%s of %s (no placement is below %s)", report.Bytes(int64(p.Peak)), report.Bytes(int64(r.Memory)), report.Bytes(int64(p.Bound)))
	row("with updates at the end", "%s", report.Bytes(int64(p.Late)))
	row("over inference, by formula", "%s", report.Bytes(int64(p.Extra)))
	row("multiply-adds of a step", "%s (inference %s)", report.Number(float64(p.MACs)), report.Number(float64(p.InferenceMACs)))
	row("time here", "%d steps of %s ms: about %s s", r.Steps, report.Number(1000*r.StepTime), report.Number(r.Estimate))
	if r.Before != nil {
		row("accuracy before", "%.2f %%", 100**r.Before)
	}
	if r.After != nil {
		row("accuracy after", "%.2f %%", 100**r.After)
		row("trained in", "%s s", report.Number(r.Seconds))
		row("written", "%s", r.Output)
	}
	for _, n := range r.Notes {
		row("note", "%s", n)
	}
	d.Add(facts)
	t := report.Table{Title: "What is trained", Columns: []string{"layer", "name", "biases", "channels", "weights"}, Note: "Beside these, the classifier. Channels: input channels whose weights are trained."}
	for _, l := range p.Layers {
		channels, weights := "–", "–"
		if l.Weights > 0 {
			channels, weights = fmt.Sprintf("%d of %d", l.Channels, l.Of), strconv.Itoa(l.Weights)
		}
		t.Rows = append(t.Rows, []string{strconv.Itoa(l.Number), l.Name, strconv.Itoa(l.Biases), channels, weights})
	}
	if len(t.Rows) == 0 {
		t.Rows = [][]string{{"–", "the classifier alone", "–", "–", "–"}}
	}
	d.Add(t)
	arena := report.Table{Title: "Arena", Columns: []string{"offset", "bytes", "from", "to", "buffer"}, Note: "From the operation that writes it first to the one that reads it last; the largest buffers. --json and --plan list all."}
	largest := slices.Clone(p.Buffers)
	slices.SortStableFunc(largest, func(x, y tinytrain.Buffer) int { return y.Bytes - x.Bytes })
	for _, b := range largest[:min(len(largest), 20)] {
		last := b.Last
		if b.First == 0 && b.Last == len(p.Operations)-1 {
			arena.Rows = append(arena.Rows, []string{strconv.Itoa(b.Offset), strconv.Itoa(b.Bytes), "always", "", b.Name})
			continue
		}
		arena.Rows = append(arena.Rows, []string{strconv.Itoa(b.Offset), strconv.Itoa(b.Bytes), p.Operations[b.First], p.Operations[last], b.Name})
	}
	d.Add(arena)
	return d
}

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/gomlx/gomlx/core/tensors"
	"github.com/spf13/cobra"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/compress/quant"
	"github.com/lathe-ml/lathe/design/norm"
	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/internal/nearest"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/lab"
	"github.com/lathe-ml/lathe/lab/report"
	"github.com/lathe-ml/lathe/lab/store"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/learn/batchsize"
	"github.com/lathe-ml/lathe/learn/optim"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// trainConfig is what a training run depends on; it travels in the written file's metadata and names its checkpoint.
type trainConfig struct {
	Arch      string  `json:"arch"`
	Data      string  `json:"data"`
	Norm      string  `json:"norm"`
	Scheme    string  `json:"scheme,omitempty"`
	Epochs    float64 `json:"epochs,omitempty"`
	Steps     int     `json:"steps"`
	Batch     int     `json:"batch"`
	LR        float64 `json:"lr"`
	Optimizer string  `json:"optimizer"`
	Decay     float64 `json:"decay"`
	Schedule  string  `json:"schedule"`
	Clip      float64 `json:"clip,omitempty"`
	Limit     int     `json:"limit,omitempty"`
	Shift     int     `json:"shift,omitempty"` // bits of weights ±2^s; 0: float
	Seed      uint64  `json:"seed"`
	Backend   string  `json:"backend"`

	// of adaptive batches; Batch is the first size then
	Eta       float64 `json:"eta,omitempty"`
	BatchTest string  `json:"batch_test,omitempty"`
	MaxBatch  int     `json:"max_batch,omitempty"`
	Groups    int     `json:"groups,omitempty"`

	Shape   [3]int   `json:"shape"` // height, width, channels of the images
	Classes []string `json:"classes"`

	misplaced string // a flag that does not go with the optimiser
}

// architecture builds networks for images of a shape.
type architecture struct {
	name string
	norm string // default
	new  func(h, w, c, classes int, norm nn.Norm, scheme zoo.Scheme, seed uint64) (*nn.Network, error)
}

// architectures is what --arch knows.
var architectures = []architecture{
	{
		"vit", "layer",
		func(h, w, c, classes int, norm nn.Norm, scheme zoo.Scheme, seed uint64) (*nn.Network, error) {
			if h != w {
				return nil, usageErrorf("--arch vit wants square images, got %d×%d", h, w)
			}
			return zoo.ViT(zoo.ViTOptions{Size: h, Channels: c, Patch: patchOf(h), Classes: classes, Norm: orNone(norm), Scheme: scheme, Seed: seed})
		},
	},
	{"resnet8", "batch", resnet(1)},
	{"resnet14", "batch", resnet(2)},
	{"resnet20", "batch", resnet(3)},
	{
		"mlp", "none",
		func(h, w, c, classes int, norm nn.Norm, _ zoo.Scheme, seed uint64) (*nn.Network, error) {
			return zoo.MLP(zoo.MLPOptions{Inputs: h * w * c, Classes: classes, Norm: norm, Seed: seed})
		},
	},
}

// patchOf is the side of a ViT's patches: the largest up to 7 that divides the image's.
func patchOf(size int) int {
	p := 7
	for size%p != 0 {
		p--
	}
	return p
}

func resnet(blocks int) func(h, w, c, classes int, norm nn.Norm, scheme zoo.Scheme, seed uint64) (*nn.Network, error) {
	return func(h, w, c, classes int, norm nn.Norm, _ zoo.Scheme, seed uint64) (*nn.Network, error) {
		if h != w {
			return nil, usageErrorf("--arch resnet wants square images, got %d×%d", h, w)
		}
		return zoo.ResNet(zoo.ResNetOptions{Size: h, Channels: c, Blocks: blocks, Classes: classes, Norm: orNone(norm), Seed: seed})
	}
}

// orNone fills a norm slot that is to stay empty; build takes it out again.
func orNone(n nn.Norm) nn.Norm {
	if n == nil {
		return norm.None{}
	}
	return n
}

// adaptiveOptimizers update as the optimisers they name, on batches that grow by a test of the gradient's noise.
var adaptiveOptimizers = map[string]string{"adadagrad": "adagrad", "adadagradnorm": "adagradnorm"}

func optimizerNames() []string {
	names := append(optim.Names(), slices.Collect(maps.Keys(adaptiveOptimizers))...)
	slices.Sort(names)
	return names
}

// maxMicro is how many examples are in memory at once; larger batches are accumulated.
const maxMicro = 1024

func newTrainCommand(a *app) *cobra.Command {
	var c trainConfig
	var out string
	var fresh bool
	var archs []string
	for _, x := range architectures {
		archs = append(archs, x.name)
	}
	cmd := &cobra.Command{
		Use:   "train",
		Short: "Train a network from scratch on a data set",
		Long: `Train a classifier and write it as safetensors, whose metadata holds the network's graph, or as ONNX; "lathe eval" and
"lathe compress" take both. Either file says on what and how it was trained (metadata "lathe.train").

A checkpoint is kept beside the output while the training goes on. After Ctrl-C, a crash or a kill the same command
goes on from the last checkpoint, bit for bit as if nothing had happened (on backend go); --fresh starts over.

The optimisers adadagrad and adadagradnorm begin with a small batch (--batch, default 16) and let it grow when the
gradient's noise, against its size, exceeds --eta: few examples per step early, few and parallel steps late, no schedule.
The learning-rate schedule then follows the examples seen. For networks whose single examples have no gradient of
their own (batch norm), estimate the noise from micro-batches: --groups 8.`,
		Example: `  lathe train --arch vit --data fashion-mnist -o vit.safetensors
  lathe train --arch mlp --norm layer --data digits --epochs 20 --lr 1e-3 -o digits.safetensors
  lathe train --arch resnet8 --steps 100 --batch 64 --optimizer sgd --lr 0.05 -o r8.safetensors
  lathe train --arch resnet8 --shift 3 --optimizer sgd --lr 0.1 --decay 1e-4 --epochs 2 -o shift3.onnx
  lathe train --arch mlp --optimizer adadagrad --eta 0.5 --max-batch 4096 --epochs 2 -o adaptive.safetensors`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c.defaults(cmd.Flags().Changed)
			return a.train(cmd.Context(), c, out, fresh)
		},
	}
	f := cmd.Flags()
	f.StringVar(&c.Arch, "arch", "vit", "architecture: "+strings.Join(archs, ", "))
	f.StringVar(&c.Data, "data", "fashion-mnist", "data set: "+strings.Join(labelledSets(), ", "))
	f.StringVar(&c.Norm, "norm", "", "norm at every norm slot: "+strings.Join(norm.Names(), ", ")+" (default: the architecture's own)")
	f.StringVar(&c.Scheme, "scheme", "", "of --arch vit: where the norms stand: "+strings.Join(norm.SchemeNames(), ", ")+" (default: pre)")
	f.Float64Var(&c.Epochs, "epochs", 4, "passes over the training data; --steps wins")
	f.IntVar(&c.Steps, "steps", 0, "training steps (default: from --epochs)")
	f.IntVar(&c.Batch, "batch", 128, "examples per step; of the first step with adadagrad and adadagradnorm, where the default is 16")
	f.Float64Var(&c.LR, "lr", 2e-3, "peak learning rate (default with adagrad: 0.05, with adagradnorm: 1)")
	f.StringVar(&c.Optimizer, "optimizer", "adamw", "optimiser: "+strings.Join(optimizerNames(), ", "))
	f.Float64Var(&c.Decay, "decay", 0.05, "weight decay (default with adagrad and adagradnorm: 0)")
	f.StringVar(&c.Schedule, "schedule", "cosine", "learning-rate schedule: "+strings.Join(optim.ScheduleNames(), ", ")+" (default with adagrad and adagradnorm: constant)")
	f.Float64Var(&c.Eta, "eta", 0.5, "adaptive batches: largest noise of the gradient, as a share of it; smaller means larger batches")
	f.StringVar(&c.BatchTest, "batch-test", "norm", "adaptive batches: test of the gradient: "+strings.Join(batchsize.TestNames(), ", "))
	f.IntVar(&c.MaxBatch, "max-batch", 0, "adaptive batches: largest size (default: 8192, or all examples)")
	f.IntVar(&c.Groups, "groups", 0, "adaptive batches: estimate the noise from so many micro-batches (0: from single examples)")
	f.Float64Var(&c.Clip, "clip", 0, "largest joint norm of the gradients (0: no limit)")
	f.IntVar(&c.Shift, "shift", 0, "train weights ±2^s of so many bits, 2 to 5, in layers that a norm follows (DenseShift; with --optimizer sgd --lr 0.1 --decay 1e-4)")
	f.IntVar(&c.Limit, "limit", 0, "use only the first so many training examples (0: all)")
	f.Uint64Var(&c.Seed, "seed", 0, "of initial values and order")
	f.StringVarP(&out, "output", "o", "", "file to write (.safetensors or .onnx)")
	f.BoolVar(&fresh, "fresh", false, "forget the checkpoint and start over")
	_ = cmd.MarkFlagRequired("output")
	_ = cmd.RegisterFlagCompletionFunc("arch", oneOf(archs...))
	_ = cmd.RegisterFlagCompletionFunc("data", oneOf(labelledSets()...))
	_ = cmd.RegisterFlagCompletionFunc("norm", oneOf(norm.Names()...))
	_ = cmd.RegisterFlagCompletionFunc("optimizer", oneOf(optimizerNames()...))
	_ = cmd.RegisterFlagCompletionFunc("batch-test", oneOf(batchsize.TestNames()...))
	_ = cmd.RegisterFlagCompletionFunc("schedule", oneOf(optim.ScheduleNames()...))
	return cmd
}

// chooseOne is the error for a flag with a value that is not among the known ones.
func chooseOne(flag, value string, known []string) error {
	if near, ok := nearest.Match(value, known); ok {
		return usageErrorf("--%s %q: there is no such; did you mean %q?", flag, value, near)
	}
	return usageErrorf("--%s %q: there is no such; use one of %s", flag, value, strings.Join(known, ", "))
}

// adaptive says whether the size of the batches changes.
func (c *trainConfig) adaptive() bool { return adaptiveOptimizers[c.Optimizer] != "" }

// defaults fills in what depends on the optimiser, where nothing was asked for, and forgets what does not concern it.
func (c *trainConfig) defaults(changed func(flag string) bool) {
	rule := cmp.Or(adaptiveOptimizers[c.Optimizer], c.Optimizer)
	if rate := map[string]float64{"adagrad": .05, "adagradnorm": 1}[rule]; rate != 0 {
		if !changed("lr") {
			c.LR = rate
		}
		if !changed("decay") {
			c.Decay = 0
		}
		if !changed("schedule") {
			c.Schedule = "constant"
		}
	}
	if c.adaptive() {
		if !changed("batch") {
			c.Batch = 16
		}
		return
	}
	for _, flag := range []string{"eta", "batch-test", "max-batch", "groups"} {
		if changed(flag) {
			c.misplaced = flag
		}
	}
	c.Eta, c.BatchTest, c.MaxBatch, c.Groups = 0, "", 0, 0
}

// check refuses what cannot be trained and fills defaults in.
func (c *trainConfig) check() error {
	var archs []string
	for _, x := range architectures {
		archs = append(archs, x.name)
		if x.name == c.Arch && c.Norm == "" {
			c.Norm = x.norm
		}
	}
	switch {
	case !slices.Contains(archs, c.Arch):
		return chooseOne("arch", c.Arch, archs)
	case !slices.Contains(norm.Names(), c.Norm) && !strings.EqualFold(filepath.Ext(c.Norm), ".json"):
		return chooseOne("norm", c.Norm, norm.Names())
	case c.Scheme != "" && c.Arch != "vit":
		return usageErrorf("--scheme %s: only --arch vit has a choice", c.Scheme)
	case !slices.Contains(labelledSets(), c.Data):
		return chooseOne("data", c.Data, labelledSets())
	case !slices.Contains(optimizerNames(), c.Optimizer):
		return chooseOne("optimizer", c.Optimizer, optimizerNames())
	case !slices.Contains(optim.ScheduleNames(), c.Schedule):
		return chooseOne("schedule", c.Schedule, optim.ScheduleNames())
	case c.Batch < 1 || c.Batch > 1<<16:
		return usageErrorf("--batch %d: must be 1 to 65536", c.Batch)
	case c.Steps < 0 || c.Steps == 0 && !(c.Epochs > 0 && c.Epochs < 1e6):
		return usageErrorf("--steps %d, --epochs %g: must be positive", c.Steps, c.Epochs)
	case !(c.LR > 0) || math.IsInf(c.LR, 0):
		return usageErrorf("--lr %g: must be positive", c.LR)
	case !(c.Decay >= 0) || math.IsInf(c.Decay, 0):
		return usageErrorf("--decay %g: must be 0 or more", c.Decay)
	case !(c.Clip >= 0):
		return usageErrorf("--clip %g: must be 0 or more", c.Clip)
	case c.misplaced != "":
		return usageErrorf("--%s goes with --optimizer adadagrad or adadagradnorm, not %s", c.misplaced, c.Optimizer)
	case c.adaptive() && (!(c.Eta > 0) || math.IsInf(c.Eta, 0)):
		return usageErrorf("--eta %g: must be positive; 0.1 to 0.9 is usual", c.Eta)
	case c.adaptive() && !slices.Contains(batchsize.TestNames(), c.BatchTest):
		return chooseOne("batch-test", c.BatchTest, batchsize.TestNames())
	case c.adaptive() && c.Batch < 2:
		return usageErrorf("--batch %d: a batch needs 2 examples for its gradient to have a noise", c.Batch)
	case c.MaxBatch < 0 || c.MaxBatch > 0 && c.MaxBatch < c.Batch:
		return usageErrorf("--max-batch %d: must be at least the first batch (%d)", c.MaxBatch, c.Batch)
	case c.Groups < 0 || c.Groups == 1 || c.Groups > 1024:
		return usageErrorf("--groups %d: must be 2 to 1024 (8 or more are advised), or 0", c.Groups)
	case c.Limit < 0:
		return usageErrorf("--limit %d: must be 0 or more", c.Limit)
	case c.Shift != 0 && (c.Shift < 2 || c.Shift > 5):
		return usageErrorf("--shift %d: must be 2 to 5 bits, or 0 for float weights", c.Shift)
	}
	return nil
}

// trainResult is what lathe train prints.
type trainResult struct {
	Output     string      `json:"output"`
	Config     trainConfig `json:"config"`
	Parameters int         `json:"parameters"`
	Bytes      int64       `json:"bytes"`
	Loss       float64     `json:"loss"`     // of the last step
	Accuracy   float64     `json:"accuracy"` // on the test part
	Examples   int         `json:"test_examples"`
	Seconds    float64     `json:"seconds"` // of this process

	Adaptive *adaptiveResult `json:"adaptive,omitempty"` // of batches whose size changes
}

// adaptiveResult says what became of the batches.
type adaptiveResult struct {
	Steps      int     `json:"steps"`
	Samples    int     `json:"samples"`
	FirstBatch int     `json:"first_batch"`
	MeanBatch  float64 `json:"mean_batch"`
	FinalBatch int     `json:"final_batch"`
	Tests      int     `json:"tests"`
	Passed     int     `json:"passed"`
	Stationary int     `json:"stationary"` // tests that a zero gradient left undefined
}

func (a *app) train(ctx context.Context, c trainConfig, out string, fresh bool) error {
	if err := c.check(); err != nil {
		return err
	}
	if !isNetworkFile(out) {
		return usageErrorf("-o %q: the name must end in .safetensors or .onnx", out)
	}
	if st, err := os.Stat(filepath.Dir(out)); err != nil || !st.IsDir() {
		return fmt.Errorf("-o %q: there is no folder %q", out, filepath.Dir(out))
	}
	backend, err := a.backend()
	if err != nil {
		return err
	}
	c.Backend = engine.Name(backend)
	train, err := loadLabelled(ctx, c.Data, true)
	if err != nil {
		return err
	}
	if c.Limit > 0 && c.Limit < train.N {
		train = labelled{train.First(c.Limit)}
	}
	if c.Batch > train.N {
		return usageErrorf("--batch %d: there are only %d training examples", c.Batch, train.N)
	}
	perEpoch := train.N / c.Batch
	switch {
	case c.Steps > 0:
		c.Epochs = 0
	case !c.adaptive(): // adaptive steps are not known beforehand
		c.Steps = max(1, int(math.Round(c.Epochs*float64(perEpoch))))
	}
	if c.adaptive() {
		switch {
		case c.MaxBatch == 0:
			c.MaxBatch = max(c.Batch, min(8192, train.N))
		case c.MaxBatch > train.N:
			return usageErrorf("--max-batch %d: there are only %d training examples, and a batch has each of them once", c.MaxBatch, train.N)
		}
	}
	c.Shape, c.Classes = [3]int{train.H, train.W, train.C}, train.ClassNames
	net, err := c.build()
	if err != nil {
		return err
	}
	optimizer, err := optim.ByName(cmp.Or(adaptiveOptimizers[c.Optimizer], c.Optimizer), c.Decay)
	if err != nil {
		return usageErrorf("%v", err)
	}
	schedule, err := c.schedule(train.N)
	if err != nil {
		return usageErrorf("%v", err)
	}
	batches, probe, err := c.batches(net, train.N)
	if err != nil {
		return usageErrorf("--optimizer %s --arch %s --norm %s: %v; here: --norm layer, or --groups 8", c.Optimizer, c.Arch, c.Norm, err)
	}
	config, err := json.Marshal(c)
	if err != nil {
		return err
	}

	s, err := a.openStore()
	if err != nil {
		return err
	}
	defer s.Close()
	active, err := s.Start(ctx, store.Run{Kind: "train", Method: c.Arch, Command: append([]string{"lathe"}, a.args...), Config: config, Seeds: []uint64{c.Seed}, Env: lab.ThisEnvironment(c.Backend)})
	if err != nil {
		return err
	}
	finished := false
	finish := func(status string, result any, cause error) error {
		finished = true
		return active.Finish(context.WithoutCancel(ctx), status, result, cause)
	}
	defer func() {
		if !finished { // a panic
			_ = finish(store.Failed, nil, fmt.Errorf("internal error"))
		}
	}()
	result, err := a.fit(ctx, c, net, train, learn.Options{Optimizer: optimizer, LR: c.LR, Schedule: schedule, ClipNorm: c.Clip, Seed: c.Seed, Probe: probe}, batches, string(config), out, fresh)
	switch {
	case err != nil && ctx.Err() != nil:
		_ = finish(store.Interrupted, nil, errors.New("stopped"))
		return err
	case err != nil:
		_ = finish(store.Failed, nil, err)
		return err
	}
	if err := finish(store.Done, result, nil); err != nil {
		return err
	}
	return a.emit(result, func(w io.Writer) error {
		if b := result.Adaptive; b != nil {
			if _, err := fmt.Fprintf(w, "batches: %d to %d, mean %s, in %s steps on %s examples; %d of %d tests passed\n", b.FirstBatch, b.FinalBatch, report.Number(b.MeanBatch), report.Number(float64(b.Steps)), report.Number(float64(b.Samples)), b.Passed, b.Tests); err != nil {
				return err
			}
			if b.Stationary > 0 {
				a.note("stationary batch gradient at %d tests: the size was kept", b.Stationary)
			}
		}
		_, err := fmt.Fprintf(w, "%s: %s parameters, loss %s, accuracy %.2f %% on %d test examples, %.1f s\n", out, report.Number(float64(result.Parameters)), report.Number(result.Loss), 100*result.Accuracy, result.Examples, result.Seconds)
		return err
	})
}

// schedule follows the steps, or, with batches that change and no number of steps, the examples seen.
func (c *trainConfig) schedule(examples int) (optim.Schedule, error) {
	if c.adaptive() && c.Steps == 0 {
		return optim.SampleScheduleByName(c.Schedule, c.budget(examples))
	}
	return optim.ScheduleByName(c.Schedule, c.Steps)
}

// budget is the number of examples that --epochs asks for.
func (c *trainConfig) budget(examples int) int {
	return max(1, int(math.Round(c.Epochs*float64(examples))))
}

// batches prepares batches whose size adapts; both results are nil when it does not.
func (c *trainConfig) batches(net *nn.Network, examples int) (*batchsize.AdaptiveBatcher, learn.Probe, error) {
	if !c.adaptive() {
		return nil, nil, nil
	}
	test, err := batchsize.NewTest(c.BatchTest, c.Eta)
	if err != nil {
		return nil, nil, err
	}
	a := &batchsize.AdaptiveBatcher{Test: test, N: examples, Initial: c.Batch, Max: c.MaxBatch, MaxMicro: maxMicro, Groups: c.Groups, Seed: c.Seed}
	probe, err := a.Probe(net)
	return a, probe, err
}

// fit trains, writes the file and evaluates. batches are adaptive ones, or nil.
func (a *app) fit(ctx context.Context, c trainConfig, net *nn.Network, train labelled, o learn.Options, batches *batchsize.AdaptiveBatcher, config, out string, fresh bool) (r trainResult, err error) {
	started := time.Now()
	backend, err := a.backend()
	if err != nil {
		return r, err
	}
	t, err := learn.NewTrainer(backend, &net.Params, learn.Classifier(net), o)
	if err != nil {
		return r, err
	}
	defer t.Finalize()
	// Another configuration has another checkpoint, so nothing resumes what it was not.
	checkpoint := out + "." + shortHash(config) + ".ckpt"
	if fresh {
		if err := os.Remove(checkpoint); err != nil && !os.IsNotExist(err) {
			return r, err
		}
	}
	if _, err := os.Stat(checkpoint); err == nil {
		a.note("going on from %s", checkpoint)
	}
	bar := a.progress("training " + c.Arch)
	defer bar.Close()
	flat := net.Inputs[0].Shape.Rank() == 2
	perEpoch := train.N / c.Batch
	epoch, order := -1, []int(nil)
	fit := learn.FitOptions{
		Steps: c.Steps, Checkpoint: checkpoint,
		Batch: func(step int) ([]*tensors.Tensor, error) {
			if e := step / perEpoch; e != epoch {
				epoch, order = e, rng.New(c.Seed, fmt.Sprintf("train:order:%d", e)).Perm(train.N)
			}
			idx := order[step%perEpoch*c.Batch : (step%perEpoch+1)*c.Batch]
			return train.batch(idx, flat)
		},
		Progress: func(done, total int, info learn.Info) {
			bar.Label(fmt.Sprintf("training %s, loss %.3f", c.Arch, info.Loss))
			bar.Set(done, total)
		},
	}
	if batches != nil {
		r.Adaptive = &adaptiveResult{FirstBatch: batches.Size()}
		bySamples := c.Steps == 0
		budget, last := c.budget(train.N), 0
		fit.Batch, fit.Extra = nil, batches
		fit.Step = func(t *learn.Trainer) (learn.Info, error) {
			lr := t.LR()
			if bySamples {
				lr = o.LR * o.Schedule(batches.Samples())
			}
			before := batches.Samples()
			info, err := batches.Step(t, lr, func(idx []int) ([]*tensors.Tensor, error) { return train.batch(idx, flat) })
			last = batches.Samples() - before
			r.Adaptive.FinalBatch = last
			return info, err
		}
		fit.Progress = func(done, total int, info learn.Info) {
			bar.Label(fmt.Sprintf("training %s, batch %d, loss %.3f", c.Arch, last, info.Loss))
			if bySamples {
				done, total = min(batches.Samples(), budget), budget
			}
			bar.Set(done, total)
		}
		if bySamples {
			fit.Steps, fit.Done = math.MaxInt, func() bool { return batches.Samples() >= budget }
		}
	}
	info, err := t.Fit(ctx, fit)
	bar.Close()
	if err != nil {
		return r, err
	}
	if err := c.note(net); err != nil {
		return r, err
	}
	if err := quant.Settle(net); err != nil {
		return r, err
	}
	if err := writeNetwork(out, net, 0); err != nil {
		return r, err
	}
	st, err := os.Stat(out)
	if err != nil {
		return r, err
	}
	test, err := loadLabelled(ctx, c.Data, false)
	if err != nil {
		return r, err
	}
	q, err := evaluate(ctx, backend, net, test, 256, func(int, int) {})
	if err != nil {
		return r, err
	}
	if b := r.Adaptive; b != nil {
		b.Steps, b.Samples = t.Steps(), batches.Samples()
		b.MeanBatch = float64(b.Samples) / float64(max(1, b.Steps))
		b.Tests, b.Passed, b.Stationary = batches.Tests()
		if b.FinalBatch == 0 { // nothing was left to do after a resumed checkpoint
			b.FinalBatch = batches.Size()
		}
	}
	return trainResult{Output: out, Config: c, Parameters: net.Params.Count(), Bytes: st.Size(), Loss: info.Loss, Accuracy: q.Accuracy, Examples: q.Examples, Seconds: time.Since(started).Seconds(), Adaptive: r.Adaptive}, nil
}

// build makes the untrained network.
func (c *trainConfig) build() (*nn.Network, error) {
	var slot nn.Norm // nil: none
	if layer, isFile, err := normFromFile(c.Norm); isFile {
		if err != nil {
			return nil, err
		}
		slot = layer
	} else if c.Norm != "none" {
		if slot, err = norm.New(c.Norm, norm.Config{Steps: c.Steps}); err != nil {
			return nil, err
		}
	}
	var scheme zoo.Scheme // nil: the architecture's own
	if c.Scheme != "" {
		var err error
		if scheme, err = norm.NewScheme(c.Scheme); err != nil {
			return nil, usageErrorf("--scheme: %v", err)
		}
	}
	for _, x := range architectures {
		if x.name == c.Arch {
			net, err := x.new(c.Shape[0], c.Shape[1], c.Shape[2], len(c.Classes), slot, scheme, c.Seed)
			if err != nil {
				return nil, err
			}
			for _, node := range slices.Clone(net.Nodes) {
				if _, empty := node.Op.(norm.None); empty {
					if err := net.Bypass(node.Name); err != nil {
						return nil, err
					}
				}
			}
			if c.Shift > 0 {
				if _, err := (quant.DenseShift{WeightBits: c.Shift, Options: compress.Options{Seed: c.Seed}}).Convert(net); err != nil {
					return nil, fmt.Errorf("--shift %d --arch %s --norm %s: %w", c.Shift, c.Arch, c.Norm, err)
				}
			}
			return net, nil
		}
	}
	return nil, fmt.Errorf("there is no architecture %q", c.Arch)
}

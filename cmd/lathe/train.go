package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/tensors"
	"github.com/spf13/cobra"

	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/internal/nearest"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/lab"
	"github.com/lathe-ml/lathe/lab/report"
	"github.com/lathe-ml/lathe/lab/store"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/learn/optim"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// trainConfig is what a training run depends on; it travels in the written file's metadata and names its checkpoint.
type trainConfig struct {
	Arch      string  `json:"arch"`
	Data      string  `json:"data"`
	Norm      string  `json:"norm"`
	Epochs    float64 `json:"epochs,omitempty"`
	Steps     int     `json:"steps"`
	Batch     int     `json:"batch"`
	LR        float64 `json:"lr"`
	Optimizer string  `json:"optimizer"`
	Decay     float64 `json:"decay"`
	Schedule  string  `json:"schedule"`
	Clip      float64 `json:"clip,omitempty"`
	Limit     int     `json:"limit,omitempty"`
	Seed      uint64  `json:"seed"`
	Backend   string  `json:"backend"`

	Shape   [3]int   `json:"shape"` // height, width, channels of the images
	Classes []string `json:"classes"`
}

// architecture builds networks for images of a shape.
type architecture struct {
	name string
	norm string // default
	new  func(h, w, c, classes int, norm nn.Norm, seed uint64) (*nn.Network, error)
}

// architectures is what --arch knows.
var architectures = []architecture{
	{
		"vit", "layer",
		func(h, w, c, classes int, norm nn.Norm, seed uint64) (*nn.Network, error) {
			if h != w {
				return nil, usageErrorf("--arch vit wants square images, got %d×%d", h, w)
			}
			return zoo.ViT(zoo.ViTOptions{Size: h, Channels: c, Patch: patchOf(h), Classes: classes, Norm: orNone(norm), Seed: seed})
		},
	},
	{"resnet8", "batch", resnet(1)},
	{"resnet14", "batch", resnet(2)},
	{"resnet20", "batch", resnet(3)},
	{
		"mlp", "none",
		func(h, w, c, classes int, norm nn.Norm, seed uint64) (*nn.Network, error) {
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

func resnet(blocks int) func(h, w, c, classes int, norm nn.Norm, seed uint64) (*nn.Network, error) {
	return func(h, w, c, classes int, norm nn.Norm, seed uint64) (*nn.Network, error) {
		if h != w {
			return nil, usageErrorf("--arch resnet wants square images, got %d×%d", h, w)
		}
		return zoo.ResNet(zoo.ResNetOptions{Size: h, Channels: c, Blocks: blocks, Classes: classes, Norm: orNone(norm), Seed: seed})
	}
}

// noNorm stands at a norm slot that is to stay empty; build takes it out again.
type noNorm struct{ nn.Unary }

func (noNorm) Params([]shapes.Shape) []nn.Spec { return nil }

func orNone(n nn.Norm) nn.Norm {
	if n == nil {
		return noNorm{nn.Unary{Fn: "Identity"}}
	}
	return n
}

// norms is what --norm knows.
var norms = []struct {
	name string
	norm nn.Norm // nil: none
}{{"layer", nn.LayerNorm{}}, {"batch", nn.BatchNorm{}}, {"rms", nn.RMSNorm{}}, {"none", nil}}

func newTrainCommand(a *app) *cobra.Command {
	var c trainConfig
	var out string
	var fresh bool
	var archs, normNames []string
	for _, x := range architectures {
		archs = append(archs, x.name)
	}
	for _, x := range norms {
		normNames = append(normNames, x.name)
	}
	cmd := &cobra.Command{
		Use:   "train",
		Short: "Train a network from scratch on a data set",
		Long: `Train a classifier and write it as safetensors, whose metadata holds the network's graph, or as ONNX; "lathe eval" and
"lathe compress" take both. Either file says on what and how it was trained (metadata "lathe.train").

A checkpoint is kept beside the output while the training goes on. After Ctrl-C, a crash or a kill the same command
goes on from the last checkpoint, bit for bit as if nothing had happened (on backend go); --fresh starts over.`,
		Example: `  lathe train --arch vit --data fashion-mnist -o vit.safetensors
  lathe train --arch mlp --norm layer --data digits --epochs 20 --lr 1e-3 -o digits.safetensors
  lathe train --arch resnet8 --steps 100 --batch 64 --optimizer sgd --lr 0.05 -o r8.safetensors`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.train(cmd.Context(), c, out, fresh)
		},
	}
	f := cmd.Flags()
	f.StringVar(&c.Arch, "arch", "vit", "architecture: "+strings.Join(archs, ", "))
	f.StringVar(&c.Data, "data", "fashion-mnist", "data set: "+strings.Join(labelledSets(), ", "))
	f.StringVar(&c.Norm, "norm", "", "norm at every norm slot: "+strings.Join(normNames, ", ")+" (default: the architecture's own)")
	f.Float64Var(&c.Epochs, "epochs", 4, "passes over the training data; --steps wins")
	f.IntVar(&c.Steps, "steps", 0, "training steps (default: from --epochs)")
	f.IntVar(&c.Batch, "batch", 128, "examples per step")
	f.Float64Var(&c.LR, "lr", 2e-3, "peak learning rate")
	f.StringVar(&c.Optimizer, "optimizer", "adamw", "optimiser: "+strings.Join(optim.Names(), ", "))
	f.Float64Var(&c.Decay, "decay", 0.05, "weight decay")
	f.StringVar(&c.Schedule, "schedule", "cosine", "learning-rate schedule: "+strings.Join(optim.ScheduleNames(), ", "))
	f.Float64Var(&c.Clip, "clip", 0, "largest joint norm of the gradients (0: no limit)")
	f.IntVar(&c.Limit, "limit", 0, "use only the first so many training examples (0: all)")
	f.Uint64Var(&c.Seed, "seed", 0, "of initial values and order")
	f.StringVarP(&out, "output", "o", "", "file to write (.safetensors or .onnx)")
	f.BoolVar(&fresh, "fresh", false, "forget the checkpoint and start over")
	_ = cmd.MarkFlagRequired("output")
	_ = cmd.RegisterFlagCompletionFunc("arch", oneOf(archs...))
	_ = cmd.RegisterFlagCompletionFunc("data", oneOf(labelledSets()...))
	_ = cmd.RegisterFlagCompletionFunc("norm", oneOf(normNames...))
	_ = cmd.RegisterFlagCompletionFunc("optimizer", oneOf(optim.Names()...))
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

// check refuses what cannot be trained and fills defaults in.
func (c *trainConfig) check() error {
	var archs, normNames []string
	for _, x := range architectures {
		archs = append(archs, x.name)
		if x.name == c.Arch && c.Norm == "" {
			c.Norm = x.norm
		}
	}
	for _, x := range norms {
		normNames = append(normNames, x.name)
	}
	switch {
	case !slices.Contains(archs, c.Arch):
		return chooseOne("arch", c.Arch, archs)
	case !slices.Contains(normNames, c.Norm):
		return chooseOne("norm", c.Norm, normNames)
	case !slices.Contains(labelledSets(), c.Data):
		return chooseOne("data", c.Data, labelledSets())
	case !slices.Contains(optim.Names(), c.Optimizer):
		return chooseOne("optimizer", c.Optimizer, optim.Names())
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
	case c.Limit < 0:
		return usageErrorf("--limit %d: must be 0 or more", c.Limit)
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
	if c.Steps == 0 {
		c.Steps = max(1, int(math.Round(c.Epochs*float64(perEpoch))))
	} else {
		c.Epochs = 0
	}
	c.Shape, c.Classes = [3]int{train.H, train.W, train.C}, train.ClassNames
	net, err := c.build()
	if err != nil {
		return err
	}
	optimizer, err := optim.ByName(c.Optimizer, c.Decay)
	if err != nil {
		return usageErrorf("%v", err)
	}
	schedule, err := optim.ScheduleByName(c.Schedule, c.Steps)
	if err != nil {
		return usageErrorf("%v", err)
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
	result, err := a.fit(ctx, c, net, train, optimizer, schedule, string(config), out, fresh)
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
		_, err := fmt.Fprintf(w, "%s: %s parameters, loss %s, accuracy %.2f %% on %d test examples, %.1f s\n", out, report.Number(float64(result.Parameters)), report.Number(result.Loss), 100*result.Accuracy, result.Examples, result.Seconds)
		return err
	})
}

// fit trains, writes the file and evaluates.
func (a *app) fit(ctx context.Context, c trainConfig, net *nn.Network, train labelled, optimizer optim.Optimizer, schedule optim.Schedule, config, out string, fresh bool) (r trainResult, err error) {
	started := time.Now()
	backend, err := a.backend()
	if err != nil {
		return r, err
	}
	t, err := learn.NewTrainer(backend, &net.Params, learn.Classifier(net), learn.Options{Optimizer: optimizer, LR: c.LR, Schedule: schedule, ClipNorm: c.Clip, Seed: c.Seed})
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
	info, err := t.Fit(ctx, learn.FitOptions{
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
	})
	bar.Close()
	if err != nil {
		return r, err
	}
	if err := c.note(net); err != nil {
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
	return trainResult{Output: out, Config: c, Parameters: net.Params.Count(), Bytes: st.Size(), Loss: info.Loss, Accuracy: q.Accuracy, Examples: q.Examples, Seconds: time.Since(started).Seconds()}, nil
}

// build makes the untrained network.
func (c *trainConfig) build() (*nn.Network, error) {
	var norm nn.Norm
	for _, x := range norms {
		if x.name == c.Norm {
			norm = x.norm
		}
	}
	for _, x := range architectures {
		if x.name == c.Arch {
			net, err := x.new(c.Shape[0], c.Shape[1], c.Shape[2], len(c.Classes), norm, c.Seed)
			if err != nil {
				return nil, err
			}
			for _, node := range slices.Clone(net.Nodes) {
				if _, empty := node.Op.(noNorm); empty {
					if err := net.Bypass(node.Name); err != nil {
						return nil, err
					}
				}
			}
			return net, nil
		}
	}
	return nil, fmt.Errorf("there is no architecture %q", c.Arch)
}

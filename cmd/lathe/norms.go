package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"math"
	"os"
	"slices"
	"strings"

	"github.com/gomlx/gomlx/core/tensors"
	"github.com/spf13/cobra"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/design/norm"
	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/internal/atomicfile"
	"github.com/lathe-ml/lathe/lab/exp/recipe"
	"github.com/lathe-ml/lathe/lab/normtable"
	"github.com/lathe-ml/lathe/lab/report"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// normsFlags say what lathe norms compares, and on what.
type normsFlags struct {
	arch, data, norms   string
	steps, batch, seeds int
	lr, decay, clip     float64
	depth, width        int
	context             int
	report, output      string
	fresh               bool
}

// textArch is the architecture of lathe norms that takes text.
const textArch = "decoder"

func newNormsCommand(a *app) *cobra.Command {
	var f normsFlags
	archs := []string{textArch}
	for _, x := range architectures {
		archs = append(archs, x.name)
	}
	about := ""
	for _, n := range norm.Names() {
		about += fmt.Sprintf("  %-12s %s\n", n, norm.Describe(n))
	}
	cmd := &cobra.Command{
		Use:   "norms",
		Short: "Which norm for your network: train the candidates side by side",
		Long: `Train the same network under one norm after the other, on the same data, batches and initial values, and print what
each does: loss and accuracy on the test part, gradient norms by depth, the time of a training step and of inference,
and of inference with the norm folded into the weights, where it can be.

Norms (a transformer also takes a place behind "@": ` + strings.Join(norm.SchemeNames(), ", ") + `):
` + about + `
Images come from a labelled data set; --arch decoder is a language model and takes "austen" or a text file. Steps that
are finished are kept: after Ctrl-C the same command goes on with the candidate that was under way.`,
		Example: `  lathe norms --arch vit --data fashion-mnist --steps 400
  lathe norms --arch decoder --data austen --norms rms,layer@post,power,unified@post --seeds 3
  lathe norms --arch decoder --data novel.txt --norms rms,rms@mix,rms@lns --depth 12 --report norms.html
  lathe norms --arch resnet8 --data digits --norms batch,group,none --json`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return a.norms(cmd.Context(), f) },
	}
	fl := cmd.Flags()
	fl.StringVar(&f.arch, "arch", "vit", "architecture: "+strings.Join(archs, ", "))
	fl.StringVar(&f.data, "data", "", "data set ("+strings.Join(labelledSets(), ", ")+"); for decoder austen or a text file (default: fashion-mnist, austen)")
	fl.StringVar(&f.norms, "norms", "", "candidates, separated by commas (default: all that there are)")
	fl.IntVar(&f.steps, "steps", 400, "training steps of each")
	fl.IntVar(&f.batch, "batch", 0, "examples or windows per step (default: 128 images, 16 windows)")
	fl.IntVar(&f.seeds, "seeds", 1, "trainings of each, with seeds 0, 1, ...; three give intervals")
	fl.Float64Var(&f.lr, "lr", 2e-3, "peak learning rate")
	fl.Float64Var(&f.decay, "decay", 0.05, "weight decay")
	fl.Float64Var(&f.clip, "clip", 1, "largest joint norm of the gradients (0: no limit)")
	fl.IntVar(&f.depth, "depth", 4, "blocks of a vit or decoder")
	fl.IntVar(&f.width, "width", 64, "width of a vit or decoder")
	fl.IntVar(&f.context, "context", 32, "characters of a decoder's window")
	fl.StringVar(&f.report, "report", "", "draw the comparison in an HTML file")
	fl.StringVarP(&f.output, "output", "o", "", "write the table as JSON, too")
	fl.BoolVar(&f.fresh, "fresh", false, "forget finished trainings and start over")
	_ = cmd.RegisterFlagCompletionFunc("arch", oneOf(archs...))
	cmd.AddCommand(newNormsSearchCommand(a))
	return cmd
}

func (f *normsFlags) check() ([]normtable.Candidate, error) {
	var archs []string
	for _, x := range architectures {
		archs = append(archs, x.name)
	}
	archs = append(archs, textArch)
	positive := func(v int, most int) bool { return v >= 1 && v <= most }
	switch {
	case !slices.Contains(archs, f.arch):
		return nil, chooseOne("arch", f.arch, archs)
	case !positive(f.steps, 1e7) || !positive(f.seeds, 1000):
		return nil, usageErrorf("--steps %d, --seeds %d: must be positive", f.steps, f.seeds)
	case f.batch < 0 || f.batch > 1<<16:
		return nil, usageErrorf("--batch %d: must be 1 to 65536", f.batch)
	case !(f.lr > 0) || math.IsInf(f.lr, 0) || !(f.decay >= 0) || math.IsInf(f.decay, 0) || !(f.clip >= 0):
		return nil, usageErrorf("--lr %g, --decay %g, --clip %g: must be positive", f.lr, f.decay, f.clip)
	case !positive(f.depth, 200) || !positive(f.width, 1<<14) || !positive(f.context, 1<<14):
		return nil, usageErrorf("--depth %d, --width %d, --context %d: must be positive", f.depth, f.width, f.context)
	}
	transformer := f.arch == "vit" || f.arch == textArch
	if transformer && f.width%8 != 0 {
		return nil, usageErrorf("--width %d: must be a multiple of 8, for four heads of even width", f.width)
	}
	if f.norms == "" {
		f.norms = strings.Join(norm.Names(), ",")
	}
	c, err := normtable.ParseCandidates(f.norms, transformer)
	if err != nil {
		return nil, usageErrorf("--norms: %v", err)
	}
	return c, nil
}

func (a *app) norms(ctx context.Context, f normsFlags) error {
	candidates, err := f.check()
	if err != nil {
		return err
	}
	backend, err := a.backend()
	if err != nil {
		return err
	}
	s := normtable.Setup{Steps: f.steps, LR: f.lr, Decay: f.decay, ClipNorm: f.clip}
	for seed := range f.seeds {
		s.Seeds = append(s.Seeds, uint64(seed))
	}
	if f.arch == textArch {
		err = f.text(ctx, &s)
	} else {
		err = f.pictures(ctx, &s)
	}
	if err != nil {
		return err
	}
	recipe, err := json.Marshal(struct {
		Arch, Data                                 string
		Steps, Batch, Depth, Width, Context, Start int
		LR, Decay, Clip                            float64
		Backend                                    string
	}{f.arch, f.data, f.steps, f.batch, f.depth, f.width, f.context, 1, f.lr, f.decay, f.clip, engine.Name(backend)})
	if err != nil {
		return err
	}
	store, err := a.openStore()
	if err != nil {
		return err
	}
	dir := store.Dir()
	if err := store.Close(); err != nil {
		return err
	}
	state := dir + "/norms-" + shortHash(string(recipe)) + ".json"
	if f.fresh {
		if err := os.Remove(state); err != nil && !os.IsNotExist(err) {
			return err
		}
	}
	bar := a.progress("norms")
	defer bar.Close()
	t, err := normtable.Run(ctx, backend, s, candidates, normtable.Options{
		State: state, Recipe: string(recipe),
		Progress: func(label string, done, total int) { bar.Label(label); bar.Set(done, total) },
	})
	bar.Close()
	if err != nil {
		return err
	}
	t.Backend, t.CPU = engine.Name(backend), engine.ThisCPU().Model
	if f.output != "" {
		err := atomicfile.Write(f.output, func(w io.Writer) error {
			e := json.NewEncoder(w)
			e.SetIndent("", "  ")
			return e.Encode(t)
		})
		if err != nil {
			return err
		}
	}
	doc := t.Document()
	if f.report != "" {
		if err := doc.Save(f.report); err != nil {
			return err
		}
	}
	return a.emit(t, func(w io.Writer) error { return doc.WriteText(w, a.width()) })
}

// pictures fills in the set-up of a classifier.
func (f *normsFlags) pictures(ctx context.Context, s *normtable.Setup) error {
	if f.data == "" {
		f.data = "fashion-mnist"
	}
	if f.batch == 0 {
		f.batch = 128
	}
	train, err := loadLabelled(ctx, f.data, true)
	if err != nil {
		return err
	}
	test, err := loadLabelled(ctx, f.data, false)
	if err != nil {
		return err
	}
	if f.batch > train.N {
		return usageErrorf("--batch %d: there are only %d training examples", f.batch, train.N)
	}
	flat := f.arch == "mlp"
	s.Title, s.Accuracy, s.Loss = f.arch+" on "+f.data, true, learn.Classifier
	s.Build = func(n nn.Norm, scheme zoo.Scheme, seed uint64) (*nn.Network, error) {
		if f.arch == "vit" {
			return zoo.ViT(zoo.ViTOptions{
				Size: train.H, Channels: train.C, Patch: patchOf(train.H), Classes: train.Classes(), Dim: f.width, Depth: f.depth, MeanPool: true,
				Norm: n, Scheme: scheme, Seed: seed,
			})
		}
		i := slices.IndexFunc(architectures, func(x architecture) bool { return x.name == f.arch })
		return architectures[i].new(train.H, train.W, train.C, train.Classes(), n, nil, seed)
	}
	orders := map[uint64]*data.Batcher{}
	s.Batch = func(seed uint64, step int) ([]*tensors.Tensor, error) {
		if orders[seed] == nil {
			o, err := data.NewBatcher(train.N, f.batch, seed)
			if err != nil {
				return nil, err
			}
			orders[seed] = o
		}
		return train.batch(orders[seed].At(step), flat)
	}
	s.Test = func() iter.Seq2[float64, []*tensors.Tensor] {
		return recipe.Images{Flat: flat}.TestBatches(&recipe.Sets{Test: test.Images}, 500)
	}
	return nil
}

// maxText is the most text that is read, in bytes.
const maxText = 64 << 20

// text fills in the set-up of a language model.
func (f *normsFlags) text(ctx context.Context, s *normtable.Setup) error {
	var raw string
	var err error
	if f.batch == 0 {
		f.batch = 16
	}
	if f.data == "" || f.data == "austen" {
		f.data = "austen"
		raw, err = data.Austen(ctx)
		raw = raw[:min(len(raw), 300_000)]
	} else {
		raw, err = readText(f.data)
	}
	if err != nil {
		return err
	}
	c, err := recipe.NewCorpus(raw, .1)
	if err != nil {
		return fmt.Errorf("%s: %w", f.data, err)
	}
	if len(c.Validation) <= f.context || len(c.Train) <= f.context {
		return fmt.Errorf("%s: %d characters are too few for windows of %d", f.data, len(c.Train)+len(c.Validation), f.context)
	}
	text := recipe.Text{Context: f.context, Loop: recipe.Loop{Batch: f.batch}}
	s.Title = "decoder on " + f.data
	s.Build = func(n nn.Norm, scheme zoo.Scheme, seed uint64) (*nn.Network, error) {
		if _, ok := n.(nn.GroupNorm); ok {
			return nil, errors.New("its statistics are over all tokens of a case, so a language model would see the text that it is to predict")
		}
		return zoo.Decoder(zoo.DecoderOptions{Symbols: c.Symbols, Context: f.context, Dim: f.width, Depth: f.depth, MLP: 2 * f.width, Norm: n, Scheme: scheme, Seed: seed})
	}
	s.Loss = learn.LanguageModel
	s.Batch = func(seed uint64, step int) ([]*tensors.Tensor, error) { return text.Batch(c, seed, step) }
	s.Test = func() iter.Seq2[float64, []*tensors.Tensor] { return text.Validation(c, 64, 0) }
	return nil
}

func readText(path string) (string, error) {
	st, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	if !st.Mode().IsRegular() || st.Size() > maxText {
		return "", fmt.Errorf("%s: want a text file of at most %s", path, report.Bytes(maxText))
	}
	raw, err := os.ReadFile(path)
	return string(raw), err
}

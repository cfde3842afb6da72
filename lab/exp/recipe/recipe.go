// Package recipe holds the data and training loops that experiments share: a classifier of Fashion-MNIST and a character
// language model on English prose.
package recipe

import (
	"cmp"
	"context"
	"fmt"
	"iter"

	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/lab"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/learn/optim"
	"github.com/lathe-ml/lathe/nn"
)

// Loop says how a network is trained.
type Loop struct {
	Batch    int // examples (windows) per step
	Steps    int
	Warmup   int     // steps on which the rate rises linearly
	LR       float64 // peak rate; it falls along a cosine
	Floor    float64 // of the rate at the end, as a share of the peak
	Decay    float64 // decoupled weight decay
	ClipNorm float64 // 0: no limit

	Optimizer optim.Optimizer `json:"-"` // nil: AdamW with Decay
	Probe     learn.Probe     `json:"-"` // looks into every step; the hooks find what it saw in Info.Probed
}

// Fit trains net on batches by step, for recipes whose data are of the caller's making. The hooks run after every step.
func (l Loop) Fit(ctx context.Context, t *lab.Trial, net *nn.Network, loss learn.LossFunc, batch func(step int) ([]*tensors.Tensor, error), hooks []learn.Hook) error {
	optimizer := l.Optimizer
	if optimizer == nil {
		optimizer = optim.AdamW{Decay: l.Decay}
	}
	tr, err := learn.NewTrainer(t.Backend, &net.Params, loss, learn.Options{
		Optimizer: optimizer, LR: l.LR, Schedule: optim.Cosine(l.Steps, l.Warmup, l.Floor), ClipNorm: l.ClipNorm, Seed: t.Seed, Probe: l.Probe,
	})
	if err != nil {
		return err
	}
	defer tr.Finalize()
	every, window := max(1, l.Steps/40), 0.
	curve := func(_ *learn.Trainer, i learn.Info) error {
		if window += i.Loss / float64(every); i.Step%every == 0 {
			t.Series("loss", float64(i.Step), window)
			t.Progress(i.Step, l.Steps)
			window = 0
		}
		return nil
	}
	_, err = tr.Fit(ctx, learn.FitOptions{Steps: l.Steps, Batch: batch, After: append([]learn.Hook{curve}, hooks...)})
	return err
}

// Text is a recipe of a character language model: Austen's novels, the last share held out.
type Text struct {
	Characters int     // of the text; 0: all of it
	Held       float64 // share held out at the end; 0: 0.1
	Context    int     // characters of a window
	Loop
}

// Corpus is text as symbols.
type Corpus struct {
	Symbols           int // size of the vocabulary
	Train, Validation []int32
}

// NewCorpus makes a text symbols and holds the last share of it out.
func NewCorpus(text string, held float64) (*Corpus, error) {
	v := data.NewVocabulary(text)
	ids, err := v.Encode(text)
	if err != nil {
		return nil, err
	}
	train, validation, err := data.SplitAt(ids, held)
	return &Corpus{v.Size(), train, validation}, err
}

// Corpus reads the text; all arms of a seed share it.
func (r Text) Corpus(ctx context.Context, t *lab.Trial) (*Corpus, error) {
	v, err := t.Shared(fmt.Sprintf("text:%d:%g", r.Characters, r.Held), func() (any, error) {
		text, err := data.Austen(ctx)
		if err != nil {
			return nil, err
		}
		if r.Characters > 0 {
			text = text[:min(r.Characters, len(text))]
		}
		return NewCorpus(text, cmp.Or(r.Held, .1))
	})
	if err != nil {
		return nil, err
	}
	return v.(*Corpus), nil
}

// windows returns inputs and targets [len(starts), Context].
func (r Text) windows(ids []int32, starts []int) []*tensors.Tensor {
	in, out := data.Windows(ids, starts, r.Context)
	return []*tensors.Tensor{tensors.FromFlatDataAndDimensions(in, len(starts), r.Context), tensors.FromFlatDataAndDimensions(out, len(starts), r.Context)}
}

// Batch is the batch of a step: windows drawn anew at every step, the same for all arms of a seed.
func (r Text) Batch(c *Corpus, seed uint64, step int) ([]*tensors.Tensor, error) {
	starts, err := data.TrainWindows(rng.New(seed, fmt.Sprintf("text:%d", step)), len(c.Train), r.Context, r.Loop.Batch)
	if err != nil {
		return nil, err
	}
	return r.windows(c.Train, starts), nil
}

// Train trains net on the corpus.
func (r Text) Train(ctx context.Context, t *lab.Trial, net *nn.Network, c *Corpus, hooks ...learn.Hook) error {
	return r.Fit(ctx, t, net, learn.LanguageModel(net), func(step int) ([]*tensors.Tensor, error) { return r.Batch(c, t.Seed, step) }, hooks)
}

// Validation are the held-out windows, disjoint, in parts of up to so many; limit is the most windows (0: all).
func (r Text) Validation(c *Corpus, size, limit int) iter.Seq2[float64, []*tensors.Tensor] {
	return func(yield func(float64, []*tensors.Tensor) bool) {
		starts := data.EvalWindows(len(c.Validation), r.Context)
		if limit > 0 {
			starts = starts[:min(limit, len(starts))]
		}
		for at := 0; at < len(starts); at += size {
			part := starts[at:min(at+size, len(starts))]
			if !yield(float64(len(part)), r.windows(c.Validation, part)) {
				return
			}
		}
	}
}

// Evaluate returns the validation loss in nats per character.
func (r Text) Evaluate(t *lab.Trial, net *nn.Network, c *Corpus) (float64, error) {
	nll, _, err := learn.Evaluate(t.Backend, &net.Params, learn.LanguageModel(net), r.Validation(c, 128, 0))
	return nll, err
}

// Images is a recipe of a classifier of Fashion-MNIST.
type Images struct {
	TrainN, TestN int  // images, balanced over the classes
	Pool          bool // average 2×2 pixels: 14×14
	Standardize   bool // subtract the training images' mean and divide by their standard deviation
	Flat          bool // the network takes [batch, pixels]
	Loop
}

// Sets are the images of a recipe.
type Sets struct {
	Train, Test *data.Images
	Mean, Std   float32 // of the training pixels; 0 and 1 without Standardize
}

// Sets reads the images; all arms of a seed share them.
func (r Images) Sets(ctx context.Context, t *lab.Trial) (*Sets, error) {
	v, err := t.Shared(fmt.Sprintf("images:%d:%d:%t:%t", r.TrainN, r.TestN, r.Pool, r.Standardize), func() (any, error) {
		s := &Sets{Std: 1}
		train, err := data.FashionMNIST(ctx, true)
		if err != nil {
			return nil, err
		}
		idx, _, err := train.Stratified(r.TrainN, t.Seed)
		if err != nil {
			return nil, err
		}
		if s.Train, err = train.Subset(idx); err != nil {
			return nil, err
		}
		test, err := data.FashionMNIST(ctx, false)
		if err != nil {
			return nil, err
		}
		s.Test = test.First(r.TestN)
		if r.Pool {
			s.Train, s.Test = s.Train.Pool2(), s.Test.Pool2()
		}
		if r.Standardize {
			s.Mean, s.Std = s.Train.Moments()
		}
		return s, nil
	})
	if err != nil {
		return nil, err
	}
	return v.(*Sets), nil
}

// Tensors returns pictures and labels of m at idx.
func (r Images) Tensors(s *Sets, m *data.Images, idx []int) ([]*tensors.Tensor, error) {
	x := m.Floats(idx, nil)
	if r.Standardize {
		for i := range x {
			x[i] = (x[i] - s.Mean) / s.Std
		}
	}
	dims := []int{len(idx), m.H, m.W, m.C}
	if r.Flat {
		dims = []int{len(idx), m.H * m.W * m.C}
	}
	labels, err := m.LabelsTensor(idx)
	return []*tensors.Tensor{tensors.FromFlatDataAndDimensions(x, dims...), labels}, err
}

// Train trains net; every epoch has an order of its own, the same for all arms of a seed.
func (r Images) Train(ctx context.Context, t *lab.Trial, net *nn.Network, s *Sets, hooks ...learn.Hook) error {
	return r.TrainOn(ctx, t, net, s, s.Train, hooks...)
}

// TrainOn is Train on other pictures or labels than the set's own.
func (r Images) TrainOn(ctx context.Context, t *lab.Trial, net *nn.Network, s *Sets, train *data.Images, hooks ...learn.Hook) error {
	order, err := data.NewBatcher(train.N, r.Loop.Batch, t.Seed)
	if err != nil {
		return err
	}
	return r.Fit(ctx, t, net, learn.Classifier(net), func(step int) ([]*tensors.Tensor, error) {
		return r.Tensors(s, train, order.At(step))
	}, hooks)
}

// TestBatches are the test pictures in parts of up to so many.
func (r Images) TestBatches(s *Sets, size int) iter.Seq2[float64, []*tensors.Tensor] {
	return func(yield func(float64, []*tensors.Tensor) bool) {
		for idx := range data.Batches(s.Test.N, size) {
			batch, err := r.Tensors(s, s.Test, idx)
			if err != nil || !yield(float64(len(idx)), batch) {
				return
			}
		}
	}
}

// Evaluate returns the mean loss in nats and the accuracy in percent on the test pictures.
func (r Images) Evaluate(t *lab.Trial, net *nn.Network, s *Sets) (nll, accuracy float64, err error) {
	nll, metrics, err := learn.Evaluate(t.Backend, &net.Params, learn.Classifier(net), r.TestBatches(s, 500))
	return nll, 100 * metrics["accuracy"], err
}

// Package quant holds the experiments of compress/quant and the reference network that they share.
package quant

import (
	"context"
	"fmt"

	"github.com/gomlx/compute"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	method "github.com/lathe-ml/lathe/compress/quant"
	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/lab"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/learn/optim"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// ViTARecipe says how the reference vision transformer is trained: Fashion-MNIST at 28×28, patches of 7, AdamW with a
// peak rate of 2e-3 and decay 0.05, 100 steps of warm-up and a cosine, batches of 128, random horizontal flips.
type ViTARecipe struct {
	Network string
	Options zoo.ViTOptions
	Images  int // training images, the first of the set
	Epochs  int
	Batch   int
	LR      float64
	Decay   float64
	Warmup  int
	Seed    uint64
}

// ViTA is the recipe at a scale: four epochs over all images reach 87 to 89 %; the smoke scale trains a narrower network
// on few images, to see that everything runs.
func ViTA(scale lab.Scale) ViTARecipe {
	r := ViTARecipe{Network: "vit-a", Images: 60_000, Epochs: 4, Batch: 128, LR: 2e-3, Decay: .05, Warmup: 100}
	if scale == lab.Smoke {
		r.Options = zoo.ViTOptions{Dim: 32, Depth: 2}
		r.Images, r.Epochs, r.Warmup = 1024, 3, 4
	}
	r.Options.Seed = r.Seed
	return r
}

// Build makes the untrained network.
func (r ViTARecipe) Build() (*nn.Network, error) { return zoo.ViT(r.Options) }

// Steps is the number of training steps; the last incomplete batch of an epoch is dropped.
func (r ViTARecipe) Steps() int { return r.Epochs * (r.Images / r.Batch) }

// Train trains the network on Fashion-MNIST. Checkpoint names a file to resume from ("": none).
func (r ViTARecipe) Train(ctx context.Context, b compute.Backend, net *nn.Network, checkpoint string, progress func(done, total int, info learn.Info)) error {
	train, err := data.FashionMNIST(ctx, true)
	if err != nil {
		return err
	}
	return r.TrainOn(ctx, b, net, train.First(r.Images), checkpoint, progress)
}

// TrainOn trains the network on given images.
func (r ViTARecipe) TrainOn(ctx context.Context, b compute.Backend, net *nn.Network, train *data.Images, checkpoint string, progress func(done, total int, info learn.Info)) error {
	t, err := learn.NewTrainer(b, &net.Params, learn.Classifier(net), learn.Options{
		Optimizer: optim.AdamW{Decay: r.Decay}, LR: r.LR, Schedule: optim.Cosine(r.Steps(), r.Warmup, 0), Seed: r.Seed,
	})
	if err != nil {
		return err
	}
	defer t.Finalize()
	perEpoch := train.N / r.Batch
	if perEpoch == 0 {
		return fmt.Errorf("vit-a: %d images are fewer than a batch of %d", train.N, r.Batch)
	}
	epoch, order := -1, []int(nil)
	_, err = t.Fit(ctx, learn.FitOptions{
		Steps: r.Steps(), Checkpoint: checkpoint, Progress: progress,
		Batch: func(step int) ([]*tensors.Tensor, error) {
			if e := step / perEpoch; e != epoch {
				epoch, order = e, rng.New(r.Seed, fmt.Sprintf("vit-a:order:%d", e)).Perm(train.N)
			}
			idx := order[step%perEpoch*r.Batch : (step%perEpoch+1)*r.Batch]
			x := train.Floats(idx, nil)
			flip := rng.New(r.Seed, fmt.Sprintf("vit-a:flip:%d", step))
			for i := range idx {
				if flip.IntN(2) == 1 {
					mirror(x[i*train.H*train.W*train.C:(i+1)*train.H*train.W*train.C], train.W, train.C)
				}
			}
			labels, err := train.LabelsTensor(idx)
			return []*tensors.Tensor{tensors.FromFlatDataAndDimensions(x, len(idx), train.H, train.W, train.C), labels}, err
		},
	})
	return err
}

// mirror reverses the columns of an image [height, width, channels].
func mirror(x []float32, width, channels int) {
	for row := 0; row < len(x); row += width * channels {
		for i, j := 0, width-1; i < j; i, j = i+1, j-1 {
			for c := range channels {
				a, b := row+i*channels+c, row+j*channels+c
				x[a], x[b] = x[b], x[a]
			}
		}
	}
}

// SpreadFactor makes channel ranges differ by up to its square, 36 times, as in DeiT-S.
const SpreadFactor = 6

// shared prepares the bench of ViT-A, "plain", "spread" and "outliers", once per seed; the network is trained once for all seeds.
func shared(ctx context.Context, t *lab.Trial) (*bench, error) {
	v, err := t.Shared("vit-a", func() (any, error) {
		r := ViTA(t.Scale)
		net, err := t.Network(r, r.Build, func(net *nn.Network) error {
			return r.Train(ctx, t.Backend, net, "", func(done, total int, _ learn.Info) { t.Progress(done, total) })
		})
		if err != nil {
			return nil, err
		}
		spread := net.Clone()
		if _, err := method.SpreadChannels(spread, SpreadFactor, 0); err != nil {
			return nil, err
		}
		outliers := net.Clone()
		if _, err := method.OutlierChannels(outliers, outlierChannels, outlierFactor, 0); err != nil {
			return nil, err
		}
		return newBench(ctx, t, map[string]*nn.Network{"plain": net, "spread": spread, "outliers": outliers})
	})
	if err != nil {
		return nil, err
	}
	return v.(*bench), nil
}

// compressed runs a method on a version of ViT-A with the seed's calibration images, and judges what comes out.
func compressed(m compress.Method, version string, images int) func(ctx context.Context, t *lab.Trial) error {
	return func(ctx context.Context, t *lab.Trial) error {
		b, err := shared(ctx, t)
		if err != nil {
			return err
		}
		calib, err := b.calibration(t.Seed, images)
		if err != nil {
			return err
		}
		res, err := m.Compress(ctx, t.Backend, b.nets[version], calib)
		if err != nil {
			return err
		}
		logits, _, err := compress.Evaluate(ctx, t.Backend, res.Network, b.test, evalBatch)
		if err != nil {
			return err
		}
		return record(t, b, res.Network, logits)
	}
}

package quant

import (
	"context"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/lab"
	"github.com/lathe-ml/lathe/lab/exp/recipe"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// ResNet8Recipe says how the reference convolutional network is trained: ResNet-8 with batch norm on Fashion-MNIST at
// 28×28, pixels in [0,1], AdamW with a peak rate of 2e-3, a short warm-up and a cosine, batches of 128.
type ResNet8Recipe struct {
	Network string
	Options zoo.ResNetOptions
	Images  int // training images, the first of the set
	Epochs  int
	Batch   int
	LR      float64
	Decay   float64
	Warmup  int
	Seed    uint64
}

// ResNet8 is the recipe at a scale and seed: four epochs over all images reach about 91 %; the smoke scale trains a
// narrower network on few images.
func ResNet8(scale lab.Scale, seed uint64) ResNet8Recipe {
	r := ResNet8Recipe{Network: "resnet-8", Images: 60_000, Epochs: 4, Batch: 128, LR: 2e-3, Decay: .01, Warmup: 50, Seed: seed}
	if scale == lab.Smoke {
		r.Options = zoo.ResNetOptions{Width: 8}
		r.Images, r.Epochs, r.Batch, r.Warmup = 2048, 1, 64, 4
	}
	r.Options.Seed = seed
	return r
}

// Build makes the untrained network.
func (r ResNet8Recipe) Build() (*nn.Network, error) { return zoo.ResNet(r.Options) }

// Train trains the network on Fashion-MNIST.
func (r ResNet8Recipe) Train(ctx context.Context, t *lab.Trial, net *nn.Network) error {
	train, err := data.FashionMNIST(ctx, true)
	if err != nil {
		return err
	}
	steps := r.Epochs * (r.Images / r.Batch)
	l := recipe.Images{Loop: recipe.Loop{Batch: r.Batch, Steps: steps, Warmup: r.Warmup, LR: r.LR, Decay: r.Decay}}
	return l.TrainOn(ctx, t, net, nil, train.First(r.Images))
}

// resNet8 prepares the bench of ResNet-8 ("plain": batch norms not folded) once per seed. Each seed has a network of its
// own.
func resNet8(ctx context.Context, t *lab.Trial) (*bench, error) {
	v, err := t.Shared("resnet-8", func() (any, error) {
		r := ResNet8(t.Scale, t.Seed)
		net, err := t.Network(r, r.Build, func(net *nn.Network) error { return r.Train(ctx, t, net) })
		if err != nil {
			return nil, err
		}
		return newBench(ctx, t, map[string]*nn.Network{"plain": net})
	})
	if err != nil {
		return nil, err
	}
	return v.(*bench), nil
}

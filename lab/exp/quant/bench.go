package quant

import (
	"context"

	"github.com/gomlx/compute"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/lab"
	"github.com/lathe-ml/lathe/nn"
)

// bench is a trained classifier of Fashion-MNIST with what it is calibrated and judged on: what all arms of one seed
// share.
type bench struct {
	nets   map[string]*nn.Network // versions of one function: "plain" as trained, and what the experiment adds
	train  *data.Images
	test   compress.Examples
	labels []int
	logits []float32 // of the float network on the test images
	width  int
}

// testImages is how many images an arm is judged on.
func testImages(s lab.Scale) int {
	if s == lab.Smoke {
		return 256
	}
	return 10_000
}

const evalBatch = 250

// newBench reads the images and runs the "plain" network on those of the test set.
func newBench(ctx context.Context, t *lab.Trial, nets map[string]*nn.Network) (*bench, error) {
	b := &bench{nets: nets}
	var err error
	if b.train, err = data.FashionMNIST(ctx, true); err != nil {
		return nil, err
	}
	test, err := data.FashionMNIST(ctx, false)
	if err != nil {
		return nil, err
	}
	test = test.First(testImages(t.Scale))
	x, err := test.Float32(nil)
	if err != nil {
		return nil, err
	}
	b.test = compress.Examples{x}
	for _, l := range test.Labels {
		b.labels = append(b.labels, int(l))
	}
	b.logits, b.width, err = compress.Evaluate(ctx, t.Backend, nets["plain"], b.test, evalBatch)
	return b, err
}

// calibration draws the calibration images of a seed from the training set, by index.
func (b *bench) calibration(seed uint64, n int) (compress.Examples, error) {
	x, err := b.train.Float32(b.calibrationIndex(seed, n))
	return compress.Examples{x}, err
}

// calibrationIndex are the numbers of the calibration images in the training set; a smaller set is the start of a
// larger one.
func (b *bench) calibrationIndex(seed uint64, n int) []int {
	return rng.New(seed, "calibration").Perm(b.train.N)[:n]
}

// accuracy is the share of test images that a network classifies correctly, in [0,1].
func (b *bench) accuracy(ctx context.Context, be compute.Backend, net *nn.Network) (float64, error) {
	logits, width, err := compress.Evaluate(ctx, be, net, b.test, evalBatch)
	if err != nil {
		return 0, err
	}
	return compress.Accuracy(logits, width, b.labels)
}

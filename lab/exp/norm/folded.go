package norm

import (
	"context"
	"fmt"
	"math"

	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/internal/metric"
	"github.com/lathe-ml/lathe/internal/timing"
	"github.com/lathe-ml/lathe/lab"
	"github.com/lathe-ml/lathe/lab/exp/recipe"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/fold"
)

// compareFolded folds the norms of a trained network and records what that does: the largest difference of its outputs on
// the first 1,000 test pictures, relative to the largest output ("folded_error"); the share of test pictures with the same
// prediction, in percent ("folded_agreement"); and the time of a forward pass of the folded network, of the network itself
// (NAME_seconds_b64, NAME_seconds_b1) and of one with layer norms ("ln_seconds_…").
func compareFolded(ctx context.Context, t *lab.Trial, images recipe.Images, sets *recipe.Sets, rounds int, ln *nn.Network, name string, net *nn.Network) error {
	folded := net.Clone()
	report, err := fold.Norms(folded)
	if err != nil {
		return err
	}
	t.Record("folded_norms", float64(len(report.Folded)))
	t.Record("norms", float64(len(report.Folded)+len(report.Explicit)+len(report.Kept)))

	names := []string{"ln", name, "folded"}
	runners := make([]*nn.Runner, len(names))
	for i, n := range []*nn.Network{ln, net, folded} {
		if runners[i], err = nn.NewRunner(t.Backend, n, nn.RunOptions{}); err != nil {
			return err
		}
		defer runners[i].Finalize()
	}
	var out [2][]float32
	classes := 0
	for _, batch := range images.TestBatches(sets, 500) {
		for i, r := range runners[1:] {
			y, err := r.Run(batch[0])
			if err != nil {
				return err
			}
			classes = y[0].Shape().Dimensions[1]
			out[i] = append(out[i], nn.Floats(y[0])...)
		}
	}
	agreement, err := metric.Agreement(out[0], out[1], classes)
	if err != nil {
		return err
	}
	t.Record("folded_agreement", 100*agreement)
	largest, worst := 0., 0.
	for i, v := range out[0][:min(1000*classes, len(out[0]))] {
		largest = max(largest, math.Abs(float64(v)))
		worst = max(worst, math.Abs(float64(v)-float64(out[1][i])))
	}
	t.Record("folded_error", worst/largest)

	for _, size := range []int{64, 1} {
		var x *tensors.Tensor
		for _, batch := range images.TestBatches(sets, size) {
			x = batch[0]
			break
		}
		var passes []func() error
		for _, r := range runners {
			passes = append(passes, pass(r, x))
		}
		times, err := timing.Interleaved(ctx, rounds, nil, passes...)
		if err != nil {
			return err
		}
		for i, s := range times {
			t.Record(fmt.Sprintf("%s_seconds_b%d", names[i], size), s.Median())
		}
	}
	return nil
}

// pass is one forward pass, for timing.
func pass(r *nn.Runner, x *tensors.Tensor) func() error {
	return func() error {
		_, err := r.Run(x)
		return err
	}
}

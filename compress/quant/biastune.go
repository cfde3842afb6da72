package quant

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/gomlx/compute"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/learn/optim"
	"github.com/lathe-ml/lathe/nn"
)

// BiasTuning trains the biases of a quantised network, and nothing else, until its outputs are distributed as those of
// the float network: KL(softmax of the float outputs ‖ softmax of the quantised ones) on unlabelled examples, by plain
// SGD (Hubara et al., arXiv:2006.10518, section 3.3). It is for networks without batch norm whose first output is logits, or
// probabilities, which are compared as they are; at every position of an output of several.
type BiasTuning struct {
	LR     float64 // of the first epoch; 0: 0.1. It falls by equal factors to a tenth in the last
	Epochs int     // 0: 10
	Passes int     // over the examples in an epoch; 0: 20
	Batch  int     // cases of a step; 0: a third of the examples
	Seed   uint64
	// Selected says which sites' biases move; nil: those of all dense layers and convolutions but the last ones before an
	// output.
	Selected func(site *nn.Node) bool
}

// TuneBias tunes the biases of net, a quantised copy of ref, in place, and returns the divergence in nats before and
// after. The parameters of the best epoch are kept, so it never rises. Layers without a bias stay without one.
func TuneBias(ctx context.Context, b compute.Backend, ref, net *nn.Network, calib compress.Examples, o BiasTuning) (before, after float64, err error) {
	n := calib.Len()
	switch {
	case n == 0:
		return 0, 0, fmt.Errorf("quant: bias tuning: %w", ErrEmpty)
	case o.LR < 0 || o.Epochs < 0 || o.Passes < 0 || o.Batch < 0:
		return 0, 0, fmt.Errorf("quant: bias tuning: rate %g, %d epochs of %d passes, batches of %d; want at least 0", o.LR, o.Epochs, o.Passes, o.Batch)
	}
	o.LR, o.Epochs, o.Passes = cmp.Or(o.LR, .1), cmp.Or(o.Epochs, 10), cmp.Or(o.Passes, 20)
	o.Batch = min(cmp.Or(o.Batch, (n+2)/3), n)
	for _, x := range net.Nodes {
		if _, ok := x.Op.(nn.BatchNorm); ok {
			return 0, 0, fmt.Errorf("quant: bias tuning: batch norm %q is not folded and would take the statistics of the batch; use bias correction", x.Name)
		}
	}
	want, size, err := compress.Evaluate(ctx, b, ref, calib, min(n, compress.DefaultBatch))
	if err != nil {
		return 0, 0, fmt.Errorf("quant: bias tuning: %w", err)
	}
	shapes, err := ref.Shapes(1)
	if err != nil {
		return 0, 0, fmt.Errorf("quant: bias tuning: %w", err)
	}
	width := compress.RowWidth(shapes[ref.Outputs[0]].Dimensions)
	distribution := logitsDistribution
	if compress.Probabilities(want, width) {
		distribution = ownDistribution
	}
	moves := map[string]bool{}
	last := lastSites(net)
	for _, s := range net.Sites() {
		if !isQuantisable(s) || s.P["b"] == "" {
			continue
		}
		if o.Selected != nil && o.Selected(s) || o.Selected == nil && !last[s.Name] {
			moves[s.P["b"]] = true
		}
	}
	if len(moves) == 0 {
		return 0, 0, errors.New("quant: bias tuning: no selected layer has a bias; use bias correction, which makes one")
	}
	work := net.Clone() // its own roles: forward state and codes are never touched
	loss := func(env *nn.Env, batch []*graph.Node) *graph.Node {
		quiet := *env
		quiet.RNG, quiet.Update = nil, nil // dropout is off
		in := map[string]*graph.Node{}
		for i, x := range work.Inputs {
			in[x.Name] = batch[i]
		}
		got := work.Lower(&quiet, in)[0]
		target := batch[len(work.Inputs)]
		got = graph.Reshape(got, target.Shape().Dimensions...)
		p, logP := distribution(target)
		_, logQ := distribution(got)
		return graph.ReduceAllMean(graph.ReduceSum(graph.Mul(graph.StopGradient(p), graph.Sub(logP, logQ)), -1))
	}
	tr, err := learn.NewTrainer(b, &work.Params, loss, learn.Options{
		Optimizer: optim.SGD{}, LR: o.LR, Seed: o.Seed,
		Factors: func(p *nn.Param) learn.Factors {
			if moves[p.Name] {
				return learn.Factors{LR: 1}
			}
			return learn.Factors{}
		},
	})
	if err != nil {
		return 0, 0, fmt.Errorf("quant: bias tuning: %w", err)
	}
	defer tr.Finalize()
	divergence := func() (float64, error) {
		got, _, err := compress.Evaluate(ctx, b, work, calib, min(n, compress.DefaultBatch))
		if err != nil {
			return 0, err
		}
		a, err := compress.Compare(want, got, n, width)
		return a.KL, err
	}
	if before, err = divergence(); err != nil {
		return 0, 0, fmt.Errorf("quant: bias tuning: %w", err)
	}
	after = before
	targets := tensors.FromFlatDataAndDimensions(want, n, size/width, width)
	all := append(slices.Clone(calib), targets)
	for epoch := range o.Epochs {
		lr := o.LR * math.Pow(.1, float64(epoch)/float64(max(o.Epochs-1, 1)))
		for range o.Passes {
			for from := 0; from < n; from += o.Batch {
				if err := ctx.Err(); err != nil {
					return before, after, err
				}
				part := all
				if o.Batch < n {
					if part, err = all.Slice(from, min(from+o.Batch, n), o.Batch); err != nil {
						return before, after, err
					}
				}
				info, err := tr.StepLR(lr, part...)
				if err != nil {
					return before, after, fmt.Errorf("quant: bias tuning: %w", err)
				}
				if !finite(info.Loss) {
					return before, after, fmt.Errorf("quant: bias tuning: epoch %d: %w; lower the rate %g", epoch+1, learn.ErrDiverged, o.LR)
				}
			}
		}
		kl, err := divergence()
		if err != nil {
			return before, after, fmt.Errorf("quant: bias tuning: %w", err)
		}
		if kl < after {
			after = kl
			for name := range moves {
				if err := net.Params.Get(name).SetData(work.Params.Get(name).Data()); err != nil {
					return before, after, err
				}
			}
		}
	}
	return before, after, nil
}

// logitsDistribution is the distribution of logits over the last axis, and its logarithm.
func logitsDistribution(x *graph.Node) (p, logP *graph.Node) {
	return graph.Softmax(x, -1), nn.LogSoftmaxOf(x, -1)
}

// ownDistribution is that of probabilities: themselves. What is below 1e-12 counts as 1e-12, as in metric.KL.
func ownDistribution(x *graph.Node) (p, logP *graph.Node) {
	return x, graph.Log(graph.MaxScalar(x, 1e-12))
}

package batchsize

import (
	"errors"
	"fmt"
	"math"

	"github.com/gomlx/compute"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/nn"
)

// SampleStats computes everything from the gradients of single cases: g[t][i] is that of tensor t and case i, flattened.
// Coordinates of all tensors follow one another in Var and Mean. It refuses fewer than two cases, rows of different
// lengths and values that are not finite.
func SampleStats(g [][][]float64) (GradStats, error) {
	if len(g) == 0 || len(g[0]) < 2 {
		return GradStats{}, errors.New("batchsize: the variance of a gradient needs at least one tensor and two cases")
	}
	s := GradStats{B: len(g[0]), Inner: &InnerStats{}}
	b := float64(s.B)
	for t, cases := range g {
		if len(cases) != s.B {
			return GradStats{}, fmt.Errorf("batchsize: tensor %d has gradients of %d cases, tensor 0 of %d", t, len(cases), s.B)
		}
		mean, variance, err := moments(cases)
		if err != nil {
			return GradStats{}, fmt.Errorf("batchsize: tensor %d: %w", t, err)
		}
		sq, sumSq, along := 0., 0., 0.
		for j, m := range mean {
			sq += m * m
			s.VarL1 += variance[j]
			sumSq += variance[j]*(b-1) + b*m*m
		}
		for _, c := range cases {
			dot := 0.
			for j, x := range c {
				dot += x * mean[j]
			}
			along += dot * dot
		}
		s.MeanSq += sq
		s.Inner.add(b, sumSq, along, sq)
		s.Mean, s.Var = append(s.Mean, mean...), append(s.Var, variance...)
	}
	return s, nil
}

// add takes one tensor into account: the sums over cases of ‖g_i‖² and ⟨g_i,ḡ⟩², and ‖ḡ‖². Without a mean gradient there
// is nothing along it.
func (s *InnerStats) add(b, sumSq, along, meanSq float64) {
	s.Along += max(0, (along-b*meanSq*meanSq)/(b-1))
	if meanSq > 0 {
		sumSq -= along / meanSq
	}
	s.Across += max(0, sumSq/(b-1))
}

// moments returns mean and unbiased variance by coordinate.
func moments(rows [][]float64) (mean, variance []float64, err error) {
	mean, variance = make([]float64, len(rows[0])), make([]float64, len(rows[0]))
	for i, r := range rows {
		if len(r) != len(mean) {
			return nil, nil, fmt.Errorf("gradient %d has %d coordinates, gradient 0 has %d", i, len(r), len(mean))
		}
		for j, x := range r {
			if !finite(x) {
				return nil, nil, fmt.Errorf("gradient %d is %g at coordinate %d; lower the learning rate", i, x, j)
			}
			mean[j] += x / float64(len(rows))
		}
	}
	for _, r := range rows {
		for j, x := range r {
			d := x - mean[j]
			variance[j] += d * d / float64(len(rows)-1)
		}
	}
	return mean, variance, nil
}

// GroupStats estimates the statistics of single cases from the mean gradients of micro-batches of equal size: a mean of
// micro cases has a micro-th of the variance, so ‖Var‖₁ ≈ micro·Σ_j Var_j(h), unbiased for independent cases. It works for
// any model; 8 micro-batches or more are advised, for the estimate's relative error is about √(2/(m·d)) in d directions of
// like variance, and far more when one direction dominates. Inner is computed with all coordinates as one tensor.
func GroupStats(microMeans [][]float64, micro int) (GradStats, error) {
	return groupStats(microMeans, micro, []int{0})
}

// groupStats is GroupStats with the offsets at which the tensors begin.
func groupStats(h [][]float64, micro int, offsets []int) (GradStats, error) {
	if len(h) < 2 || micro < 1 {
		return GradStats{}, fmt.Errorf("batchsize: %d micro-batches of %d cases; the estimate needs at least 2 of at least 1", len(h), micro)
	}
	mean, variance, err := moments(h)
	if err != nil {
		return GradStats{}, fmt.Errorf("batchsize: micro-batches: %w", err)
	}
	c, m := float64(micro), float64(len(h))
	s := GradStats{B: micro * len(h), Mean: mean, Var: variance, Inner: &InnerStats{}}
	for j := range variance {
		variance[j] *= c
		s.VarL1 += variance[j]
		s.MeanSq += mean[j] * mean[j]
	}
	for t, from := range offsets {
		to := len(mean)
		if t+1 < len(offsets) {
			to = offsets[t+1]
		}
		sumSq, along, sq := 0., 0., 0.
		for j := from; j < to; j++ {
			sq += mean[j] * mean[j]
			sumSq += variance[j]/c*(m-1) + m*mean[j]*mean[j]
		}
		for _, r := range h {
			dot := 0.
			for j := from; j < to; j++ {
				dot += r[j] * mean[j]
			}
			along += dot * dot
		}
		var one InnerStats
		one.add(m, sumSq, along, sq)
		s.Inner.Along += c * one.Along
		s.Inner.Across += c * one.Across
	}
	return s, nil
}

// TotalStats is the law of total variance over micro-batches of equal size, as the reference implementation has it for
// accumulated gradients and several workers: the mean variance within them (within[m], unbiased) and the biased variance
// between their means (means[m]), by coordinate. It is a little low between the groups, so prefer exact sums where they are
// to be had.
func TotalStats(means, within [][]float64, micro int) (GradStats, error) {
	if len(means) == 0 || len(means) != len(within) || micro < 2 {
		return GradStats{}, fmt.Errorf("batchsize: %d means and %d variances of micro-batches of %d cases; want as many of both, of at least 2 cases", len(means), len(within), micro)
	}
	m, dim := float64(len(means)), len(means[0])
	s := GradStats{B: micro * len(means), Mean: make([]float64, dim), Var: make([]float64, dim)}
	square := make([]float64, dim)
	for i := range means {
		if len(means[i]) != dim || len(within[i]) != dim {
			return GradStats{}, fmt.Errorf("batchsize: micro-batch %d has %d means and %d variances, micro-batch 0 has %d means", i, len(means[i]), len(within[i]), dim)
		}
		for j, x := range means[i] {
			if !finite(x) || !finite(within[i][j]) {
				return GradStats{}, fmt.Errorf("batchsize: micro-batch %d: mean %g and variance %g at coordinate %d; lower the learning rate", i, x, within[i][j], j)
			}
			s.Mean[j] += x / m
			square[j] += x * x / m
			s.Var[j] += within[i][j] / m
		}
	}
	for j := range dim {
		s.Var[j] = math.Abs(s.Var[j] + square[j] - s.Mean[j]*s.Mean[j])
		s.VarL1 += s.Var[j]
		s.MeanSq += s.Mean[j] * s.Mean[j]
	}
	return s, nil
}

// Exact differentiates the loss on single cases, one after another, and returns the statistics of the first maxTest of
// them (0: all). It works for every model whose loss is defined on one case, costs as many backward passes, and is what the
// faster ways are checked against. Each case is a batch of one; dropout and the like are off.
func Exact(b compute.Backend, params *nn.Params, loss learn.LossFunc, cases [][]*tensors.Tensor, maxTest int) (GradStats, error) {
	if maxTest > 0 && len(cases) > maxTest {
		cases = cases[:maxTest]
	}
	if len(cases) < 2 {
		return GradStats{}, fmt.Errorf("batchsize: %d cases have no variance; give at least 2", len(cases))
	}
	grads, names, err := Gradients(b, params, loss, cases)
	if err != nil {
		return GradStats{}, err
	}
	byTensor := make([][][]float64, len(names))
	for t := range names {
		for i := range cases {
			byTensor[t] = append(byTensor[t], grads[i][t])
		}
	}
	return SampleStats(byTensor)
}

// Gradients returns the gradient of the loss on each batch by trainable parameter, flattened in the order of names. State
// is frozen, and dropout and the like are off.
func Gradients(b compute.Backend, params *nn.Params, loss learn.LossFunc, batches [][]*tensors.Tensor) (grads [][][]float64, names []string, err error) {
	var all []string
	trained := map[string]bool{}
	for p := range params.All() {
		all = append(all, p.Name)
		if p.Trainable() {
			names = append(names, p.Name)
			trained[p.Name] = true
		}
	}
	if len(names) == 0 {
		return nil, nil, errors.New("batchsize: no parameter is trainable")
	}
	ex, err := engine.NewExec(b, func(in []*graph.Node) []*graph.Node {
		cur := map[string]*graph.Node{}
		var w []*graph.Node
		for i, n := range all {
			if cur[n] = in[i]; trained[n] {
				w = append(w, in[i])
			}
		}
		env := &nn.Env{G: in[0].Graph(), Training: true, Param: func(n string) *graph.Node { return cur[n] }, Tap: map[string]*graph.Node{}}
		return graph.Gradient(loss(env, in[len(all):]), w...)
	})
	if err != nil {
		return nil, nil, err
	}
	defer ex.Finalize()
	ex.NoLimit()
	for i, batch := range batches {
		var args []any
		for _, n := range all {
			args = append(args, params.Get(n).Value)
		}
		for _, v := range batch {
			args = append(args, v)
		}
		out, err := ex.Call(args...)
		if err != nil {
			return nil, nil, fmt.Errorf("batchsize: gradient of batch %d: %w", i, err)
		}
		var g [][]float64
		for _, v := range out {
			g = append(g, nn.Float64s(v))
		}
		grads = append(grads, g)
	}
	return grads, names, nil
}

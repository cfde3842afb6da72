package compress

import (
	"context"
	"fmt"
	"slices"

	"github.com/gomlx/compute"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/nn"
)

// DefaultBatch is the number of cases that one pass takes when the caller does not say.
const DefaultBatch = 64

// Evaluator runs a network over any number of examples in batches of one size: one executable, whatever the number of
// cases.
type Evaluator struct {
	net    *nn.Network
	batch  int
	taps   []string
	runner *nn.Runner
}

// NewEvaluator prepares a network. Batch 0 means DefaultBatch; taps are further values to return after the outputs.
func NewEvaluator(b compute.Backend, net *nn.Network, batch int, taps ...string) (*Evaluator, error) {
	if batch <= 0 {
		batch = DefaultBatch
	}
	r, err := nn.NewRunner(b, net, nn.RunOptions{Taps: taps})
	if err != nil {
		return nil, err
	}
	return &Evaluator{net: net, batch: batch, taps: taps, runner: r}, nil
}

// Close frees the compiled graph.
func (e *Evaluator) Close() { e.runner.Finalize() }

// Each runs the examples batch by batch; f gets the outputs and taps of each, whose first n cases count (the last batch
// is filled up).
func (e *Evaluator) Each(ctx context.Context, x Examples, f func(n int, out []*tensors.Tensor) error) error {
	if err := x.Check(e.net); err != nil {
		return err
	}
	for from := 0; from < x.Len(); from += e.batch {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(e.batch, x.Len()-from)
		in, err := x.Slice(from, from+n, e.batch)
		if err != nil {
			return err
		}
		out, err := e.runner.Run(in...)
		if err != nil {
			return err
		}
		if err := f(n, out); err != nil {
			return err
		}
	}
	return nil
}

// Outputs returns the network's first output for all cases, row-major, and the length of one case.
func (e *Evaluator) Outputs(ctx context.Context, x Examples) (values []float32, width int, err error) {
	err = e.Each(ctx, x, func(n int, out []*tensors.Tensor) error {
		v, w, err := rows(out[0], n)
		if values == nil {
			values = make([]float32, 0, x.Len()*w)
		}
		values, width = append(values, v...), w
		return err
	})
	return values, width, err
}

// rows returns the values of the first n cases and the length of one.
func rows(t *tensors.Tensor, n int) ([]float32, int, error) {
	s := t.Shape()
	if s.Rank() == 0 || s.Dimensions[0] < n || s.Dimensions[0] == 0 {
		return nil, 0, fmt.Errorf("compress: an output of shape %s has no axis for the cases", s)
	}
	v := nn.Floats(t)
	w := len(v) / s.Dimensions[0]
	return v[:n*w], w, nil
}

// Evaluate returns the network's first output for all cases, row-major, and the length of one case.
func Evaluate(ctx context.Context, b compute.Backend, net *nn.Network, x Examples, batch int) (values []float32, width int, err error) {
	e, err := NewEvaluator(b, net, batch)
	if err != nil {
		return nil, 0, err
	}
	defer e.Close()
	return e.Outputs(ctx, x)
}

// Capture returns the named values for all cases, each row-major, and the shape of each with the number of cases as
// axis 0. Everything is held in memory.
func Capture(ctx context.Context, b compute.Backend, net *nn.Network, x Examples, batch int, values ...string) (data [][]float32, dims [][]int, err error) {
	e, err := NewEvaluator(b, net, batch, values...)
	if err != nil {
		return nil, nil, err
	}
	defer e.Close()
	data, dims = make([][]float32, len(values)), make([][]int, len(values))
	err = e.Each(ctx, x, func(n int, out []*tensors.Tensor) error {
		for i, t := range out[len(e.net.Outputs):] {
			v, _, err := rows(t, n)
			if err != nil {
				return fmt.Errorf("%q: %w", values[i], err)
			}
			data[i] = append(data[i], v...)
			dims[i] = append([]int{x.Len()}, t.Shape().Dimensions[1:]...)
		}
		return nil
	})
	return data, dims, err
}

// Range is the least and the greatest value seen.
type Range struct{ Lo, Hi float32 }

// Ranges returns the range of the named values over all cases. It is reduced inside the graph, batch by batch, right behind
// what makes a value, so that large activations never leave it and live no longer than they must.
func Ranges(ctx context.Context, b compute.Backend, net *nn.Network, x Examples, batch int, values ...string) ([]Range, error) {
	probe := net.Clone()
	probe.Outputs = nil
	for i, v := range values {
		for _, fn := range []string{"ReduceMin", "ReduceMax"} {
			name := fmt.Sprintf("range.%d.%s", i, fn)
			at := 1 + slices.IndexFunc(probe.Nodes, func(n *nn.Node) bool { return slices.Contains(n.Out, v) })
			probe.Nodes = slices.Insert(probe.Nodes, at, &nn.Node{Name: name, Op: nn.Reduce{Fn: fn}, In: []string{v}, Out: []string{name}, P: map[string]string{}})
			probe.Outputs = append(probe.Outputs, name)
		}
	}
	if err := probe.Check(); err != nil {
		return nil, err
	}
	probe.Prune()
	e, err := NewEvaluator(b, probe, batch)
	if err != nil {
		return nil, err
	}
	defer e.Close()
	out := make([]Range, len(values))
	first := true
	err = e.Each(ctx, x, func(_ int, t []*tensors.Tensor) error {
		for i := range out {
			lo, hi := nn.Floats(t[2*i])[0], nn.Floats(t[2*i+1])[0]
			if first {
				out[i] = Range{lo, hi}
				continue
			}
			out[i].Lo, out[i].Hi = min(out[i].Lo, lo), max(out[i].Hi, hi) // NaN stays
		}
		first = false
		return nil
	})
	return out, err
}

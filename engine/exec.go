package engine

import (
	"fmt"
	"runtime"

	"github.com/gomlx/compute"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"
)

// Exec compiles a graph function once per set of input shapes and calls it. Panics of graph building come back as
// errors. It is safe for concurrent use.
type Exec struct {
	e       *graph.Exec
	backend compute.Backend
}

// NewExec wraps a graph function. At most 32 different sets of input shapes are compiled unless NoLimit is called.
func NewExec(b compute.Backend, f func(in []*graph.Node) []*graph.Node) (*Exec, error) {
	// GoMLX turns a panic with an error into an error. One with anything else it lets through, and then waits for ever
	// at the next call with these shapes.
	guarded := func(in []*graph.Node) []*graph.Node {
		defer func() {
			if r := recover(); r != nil {
				panic(AsError(r))
			}
		}()
		return f(in)
	}
	e, err := graph.NewExec(b, guarded)
	if err != nil {
		return nil, fmt.Errorf("engine: %w", err)
	}
	return &Exec{e, b}, nil
}

// NoLimit lifts the limit on compiled shapes.
func (e *Exec) NoLimit() *Exec { e.e.SetMaxCache(-1); return e }

// Call runs the function. Arguments are tensors, scalars or slices.
func (e *Exec) Call(args ...any) (out []*tensors.Tensor, err error) {
	defer func() {
		if r := recover(); r != nil {
			out, err = nil, fmt.Errorf("engine: %w", AsError(r))
		}
	}()
	return e.e.Call(args...)
}

// CallDonating runs the function on tensors and lets it reuse the buffers of those that are marked: they are dead
// afterwards. The graph is compiled first, so an error in building it costs nobody a tensor.
func (e *Exec) CallDonating(in []*tensors.Tensor, donate []bool) (out []*tensors.Tensor, err error) {
	defer func() {
		if r := recover(); r != nil {
			out, err = nil, fmt.Errorf("engine: %w", AsError(r))
		}
	}()
	sh := make([]shapes.Shape, len(in))
	for i, t := range in {
		sh[i] = t.Shape()
	}
	if _, err := e.e.Compile(sh...); err != nil {
		return nil, err
	}
	args := make([]any, len(in))
	for i, t := range in {
		args[i] = t
		if donate[i] {
			if args[i], err = graph.DonateTensorBuffer(t, e.backend, 0); err != nil {
				return nil, err
			}
		}
	}
	return e.e.Call(args...)
}

// Finalize frees the compiled graphs.
func (e *Exec) Finalize() { e.e.Finalize() }

// AsError turns what recover returned into an error. A Go runtime error is marked as internal, so that a caller can tell a
// defect from a refused shape.
func AsError(r any) error {
	if e, ok := r.(runtime.Error); ok {
		return fmt.Errorf("internal error: %w", e)
	}
	if e, ok := r.(error); ok {
		return e
	}
	return fmt.Errorf("%v", r)
}

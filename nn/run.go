package nn

import (
	"fmt"

	"github.com/gomlx/compute"
	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine"
)

// Runner evaluates a network on a backend. It compiles once per set of input shapes and reads the parameters at every
// call, so changed values are seen; a changed structure needs a new Runner. It is safe for concurrent use as long as
// nobody changes the network.
type Runner struct {
	net    *Network
	params []string
	exec   *engine.Exec
}

// RunOptions say how a Runner evaluates. The zero value is plain inference in float32.
type RunOptions struct {
	Training bool // training behaviour of norms (batch statistics); state is not updated
	DType    dtypes.DType
	Taps     []string // values to return after the outputs
	Override []string // values that the caller supplies, in order after the inputs
}

// NewRunner prepares a network for evaluation.
func NewRunner(b compute.Backend, n *Network, o RunOptions) (*Runner, error) {
	r := &Runner{net: n}
	for p := range n.Params.All() {
		r.params = append(r.params, p.Name)
	}
	var err error
	r.exec, err = engine.NewExec(b, func(a []*graph.Node) []*graph.Node {
		np := len(r.params)
		cur := make(map[string]*graph.Node, np)
		for i, p := range r.params {
			cur[p] = a[i]
		}
		in := map[string]*graph.Node{}
		for i, x := range n.Inputs {
			in[x.Name] = a[np+i]
		}
		env := &Env{G: a[0].Graph(), Training: o.Training, DType: o.DType, Param: func(s string) *graph.Node {
			if cur[s] == nil {
				panic(fmt.Errorf("parameter %q is missing", s))
			}
			return cur[s]
		}, Tap: map[string]*graph.Node{}, Override: map[string]*graph.Node{}}
		for i, v := range o.Override {
			env.Override[v] = a[np+len(n.Inputs)+i]
		}
		out := n.Lower(env, in)
		for _, t := range o.Taps {
			if env.Tap[t] == nil {
				panic(fmt.Errorf("nn: there is no value %q to capture", t))
			}
			out = append(out, env.Tap[t])
		}
		return out
	})
	if err != nil {
		return nil, err
	}
	r.exec.NoLimit()
	return r, nil
}

// Run evaluates on the inputs in the order of Network.Inputs, then the overrides: the outputs, then the taps.
func (r *Runner) Run(in ...*tensors.Tensor) ([]*tensors.Tensor, error) {
	args := make([]any, 0, len(r.params)+len(in))
	for _, p := range r.params {
		q := r.net.Params.Get(p)
		if q == nil {
			return nil, fmt.Errorf("nn: parameter %q has gone since the Runner was made", p)
		}
		args = append(args, q.Value)
	}
	for _, x := range in {
		args = append(args, x)
	}
	if len(args) == 0 {
		return nil, fmt.Errorf("nn: the network has neither inputs nor parameters")
	}
	return r.exec.Call(args...)
}

// Finalize frees the compiled graphs.
func (r *Runner) Finalize() { r.exec.Finalize() }

// Run evaluates a network once: outputs, then taps. Use a Runner for more than one call.
func (n *Network) Run(b compute.Backend, in []*tensors.Tensor, taps ...string) ([]*tensors.Tensor, error) {
	r, err := NewRunner(b, n, RunOptions{Taps: taps})
	if err != nil {
		return nil, err
	}
	defer r.Finalize()
	return r.Run(in...)
}

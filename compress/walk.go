package compress

import (
	"context"
	"fmt"
	"slices"

	"github.com/gomlx/compute"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/nn"
)

// Walk runs the network node by node on the examples, all cases at once, and calls visit before each node. There value
// gives what the values computed so far hold, and visit may change the network from this node on: substitute its
// weight, change its parameters, put nodes in front of it (which are then run, but not visited). So each site sees what
// the already compressed network feeds it: the sequential calibration of post-training quantisers. A value is dropped
// when nothing that is still to run reads it.
func Walk(ctx context.Context, b compute.Backend, net *nn.Network, x Examples, visit func(node *nn.Node, value func(name string) *tensors.Tensor) error) error {
	if err := x.Check(net); err != nil {
		return err
	}
	w := newWalker(b, net, x)
	visited := map[*nn.Node]bool{}
	value := func(name string) *tensors.Tensor { return w.values[name] }
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := w.next()
		if n == nil {
			return nil
		}
		if visited[n] {
			if err := w.step(n); err != nil {
				return err
			}
			continue
		}
		known := map[*nn.Node]bool{}
		for _, m := range net.Nodes {
			known[m] = true
		}
		if err := visit(n, value); err != nil {
			return fmt.Errorf("node %q (%s): %w", n.Name, n.Op.Kind(), err)
		}
		visited[n] = true
		for _, m := range net.Nodes {
			if !known[m] {
				visited[m] = true
			}
		}
	}
}

// walker runs a network node by node and keeps what is still to be read.
type walker struct {
	b      compute.Backend
	net    *nn.Network
	values map[string]*tensors.Tensor
	done   map[*nn.Node]bool
	last   *tensors.Tensor // first output of the node that ran last
}

func newWalker(b compute.Backend, net *nn.Network, x Examples) *walker {
	w := &walker{b: b, net: net, values: map[string]*tensors.Tensor{}, done: map[*nn.Node]bool{}}
	for i, in := range net.Inputs {
		w.values[in.Name] = x[i]
	}
	return w
}

// next is the first node that has not run, nil at the end.
func (w *walker) next() *nn.Node {
	for _, n := range w.net.Nodes {
		if !w.done[n] {
			return n
		}
	}
	return nil
}

// step runs a node and drops what nothing reads any more.
func (w *walker) step(n *nn.Node) error {
	if err := runNode(w.b, w.net, n, w.values); err != nil {
		return err
	}
	w.done[n], w.last = true, w.values[n.Out[0]]
	for v := range w.values {
		if !slices.ContainsFunc(w.net.Nodes, func(m *nn.Node) bool { return !w.done[m] && slices.Contains(m.In, v) }) {
			delete(w.values, v)
		}
	}
	return nil
}

// RunNode evaluates one node of a network on given values and returns its first output: what visit, in Walk, may want to
// know before the walk comes to it.
func RunNode(b compute.Backend, net *nn.Network, n *nn.Node, value func(name string) *tensors.Tensor) (*tensors.Tensor, error) {
	values := map[string]*tensors.Tensor{}
	for _, v := range n.In {
		if t := value(v); t != nil {
			values[v] = t
		}
	}
	if err := runNode(b, net, n, values); err != nil {
		return nil, err
	}
	return values[n.Out[0]], nil
}

// runNode evaluates one node as a network of its own.
func runNode(b compute.Backend, net *nn.Network, n *nn.Node, values map[string]*tensors.Tensor) error {
	one := &nn.Network{Nodes: []*nn.Node{n}, Outputs: n.Out}
	var in []*tensors.Tensor
	for _, v := range slices.Compact(slices.Sorted(slices.Values(n.In))) {
		if v == "" {
			continue
		}
		if values[v] == nil {
			return fmt.Errorf("node %q (%s): input %q has not been computed", n.Name, n.Op.Kind(), v)
		}
		one.Inputs = append(one.Inputs, nn.Input{Name: v, Shape: values[v].Shape()})
		in = append(in, values[v])
	}
	for _, p := range n.P {
		if q := net.Params.Get(p); q != nil {
			one.Params.Put(q)
		}
	}
	out, err := one.Run(b, in)
	if err != nil {
		return err
	}
	for i, v := range n.Out {
		values[v] = out[i]
	}
	return nil
}

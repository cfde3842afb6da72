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
	values := map[string]*tensors.Tensor{}
	for i, in := range net.Inputs {
		values[in.Name] = x[i]
	}
	value := func(name string) *tensors.Tensor { return values[name] }
	done, visited := map[*nn.Node]bool{}, map[*nn.Node]bool{}
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		i := slices.IndexFunc(net.Nodes, func(n *nn.Node) bool { return !done[n] })
		if i < 0 {
			return nil
		}
		n := net.Nodes[i]
		if !visited[n] {
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
			continue
		}
		if err := runNode(b, net, n, values); err != nil {
			return err
		}
		done[n] = true
		for v := range values {
			if !slices.ContainsFunc(net.Nodes, func(m *nn.Node) bool { return !done[m] && slices.Contains(m.In, v) }) {
				delete(values, v)
			}
		}
	}
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

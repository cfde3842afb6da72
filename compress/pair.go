package compress

import (
	"context"
	"fmt"

	"github.com/gomlx/compute"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/nn"
)

// Pair is a site of a network that is being compressed, beside the same site of the float network it came from.
type Pair struct {
	Site   *nn.Node        // in the network that is being compressed
	Float  *nn.Node        // in the reference
	Xq     *tensors.Tensor // what the site reads, all earlier sites being compressed
	X, Y   *tensors.Tensor // what the float site reads and gives
	Number int             // of the site, from 0, in execution order
}

// WalkPairs walks net, which is a copy of ref, and visits its sites in execution order with what flows into and out of
// them in both: the sequential calibration of methods that fit a site's output (targets from the float network, inputs
// from the compressed one). visit may change net from the site on, as in Walk; ref is left alone. Nodes in front of a
// site that visit has inserted are not visited.
func WalkPairs(ctx context.Context, b compute.Backend, ref, net *nn.Network, x Examples, visit func(p Pair) error) error {
	return WalkBeside(ctx, b, ref, net, x, func(n *nn.Node, _ func(string) *tensors.Tensor, pair func() (Pair, error)) error {
		if _, ok := n.Op.(nn.Linear); !ok {
			return nil
		}
		p, err := pair()
		if err != nil {
			return err
		}
		return visit(p)
	})
}

// WalkBeside is Walk on net, a copy of ref, for methods that treat other nodes than sites too: at a site, pair gives what
// flows into and out of it in both networks. The float network runs no further than the last site for which it was asked.
func WalkBeside(ctx context.Context, b compute.Backend, ref, net *nn.Network, x Examples, visit func(n *nn.Node, value func(string) *tensors.Tensor, pair func() (Pair, error)) error) error {
	if err := x.Check(ref); err != nil {
		return err
	}
	float := newWalker(b, ref, x)
	number := 0
	return Walk(ctx, b, net, x, func(n *nn.Node, value func(string) *tensors.Tensor) error {
		return visit(n, value, func() (Pair, error) {
			target := ref.Node(n.Name)
			if target == nil {
				return Pair{}, fmt.Errorf("the float network has no such node; compress a copy of it")
			}
			p := Pair{Site: n, Float: target, Xq: value(n.In[0]), Number: number}
			for !float.done[target] {
				if err := ctx.Err(); err != nil {
					return p, err
				}
				next := float.next()
				if next == target {
					p.X = float.values[target.In[0]]
				}
				if err := float.step(next); err != nil {
					return p, err
				}
			}
			if p.Y = float.last; p.X == nil || p.Y == nil {
				return p, fmt.Errorf("it runs in another order than in the float network")
			}
			number++
			return p, nil
		})
	})
}

package learn

import (
	"maps"
	"slices"

	"github.com/gomlx/compute"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/nn"
)

// GradientNorms is a Probe that takes out the joint L2 norm of the gradients of each group of parameters, before
// clipping. Info.Probed[0] has a scalar for every group.
type GradientNorms struct {
	// Group names the group of a parameter; "" leaves it out.
	Group func(param string) string
}

var _ Probe = GradientNorms{}

// Begin does nothing.
func (GradientNorms) Begin(*nn.Env, []*graph.Node) {}

// Wants nothing beside the parameters' gradients.
func (GradientNorms) Wants() []*graph.Node { return nil }

// Observe adds up the squares of each group.
func (g GradientNorms) Observe(grads map[string]*graph.Node, _ []*graph.Node) map[string]*graph.Node {
	sums := map[string]*graph.Node{}
	for _, name := range slices.Sorted(maps.Keys(grads)) {
		group := g.Group(name)
		if group == "" {
			continue
		}
		s := graph.ReduceAllSum(graph.Mul(grads[name], grads[name]))
		if sums[group] != nil {
			s = graph.Add(sums[group], s)
		}
		sums[group] = s
	}
	for group, s := range sums {
		sums[group] = graph.Sqrt(s)
	}
	return sums
}

// GradientNormsOf are the joint L2 norms of the gradients of a loss on one batch, by group, without a training step.
// training says how norms and dropout behave; state is left alone.
func GradientNormsOf(b compute.Backend, params *nn.Params, loss LossFunc, training bool, group func(param string) string, batch ...*tensors.Tensor) (map[string]float64, error) {
	var names, groups []string
	var trained []int
	args := []any{}
	for p := range params.All() {
		if p.Trainable() {
			trained = append(trained, len(names))
		}
		names, args = append(names, p.Name), append(args, p.Value)
	}
	for _, x := range batch {
		args = append(args, x)
	}
	ex, err := engine.NewExec(b, func(in []*graph.Node) []*graph.Node {
		l := loss(environment(names, in, training), in[len(names):])
		var of []*graph.Node
		for _, i := range trained {
			of = append(of, in[i])
		}
		grads := map[string]*graph.Node{}
		for k, g := range graph.Gradient(l, of...) {
			grads[names[trained[k]]] = g
		}
		sums := GradientNorms{group}.Observe(grads, nil)
		groups = slices.Sorted(maps.Keys(sums))
		var out []*graph.Node
		for _, g := range groups {
			out = append(out, sums[g])
		}
		return out
	})
	if err != nil {
		return nil, err
	}
	defer ex.Finalize()
	out, err := ex.Call(args...)
	if err != nil {
		return nil, err
	}
	norms := map[string]float64{}
	for i, g := range groups {
		norms[g] = scalar(out[i])
	}
	return norms, nil
}

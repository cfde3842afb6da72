package norm

import (
	"fmt"
	"math"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"

	"github.com/lathe-ml/lathe/nn"
)

// What norms with running statistics have in common: means over tokens with a mask, a factor with a gradient of its own,
// state that moves once per training step. An accumulated gradient would move it once per part: a trainer that
// accumulates must refuse networks whose norms do so.

// tokens returns x and the mask of a norm's inputs. The mask is the optional second input, [batch, tokens] or whatever
// x has in front of its channels, 1 (or true) where a token is valid; nil means that all are.
func tokens(xs []*graph.Node) (x, mask *graph.Node) {
	x = xs[0]
	wantTokens(x.Shape())
	return x, nn.TokenMask(xs)
}

// oncePerStep refuses a training whose steps see several batches: the running statistics would move once for each.
func oncePerStep(c *nn.Ctx) {
	if c.Training && c.Partial {
		panic(fmt.Errorf("its running statistics move once per step, so it cannot be trained on accumulated gradients; use a batch that fits at once, or layernorm"))
	}
}

// wantTokens refuses what has no channels, or no floating type.
func wantTokens(s shapes.Shape) {
	if s.Rank() < 2 || !s.DType.IsFloat() || s.Dimensions[s.Rank()-1] == 0 {
		panic(fmt.Errorf("cannot normalise %s: want floating values [..., channels]", s))
	}
}

// channelMean is the mean of v [..., C] over all axes but the last, of the valid tokens: [C]. With no valid token it is
// zero. some is a scalar boolean, whether there is one, or nil without a mask.
func channelMean(v, mask *graph.Node) (mean, some *graph.Node) {
	mean, count := nn.ChannelMean(v, mask)
	if count == nil {
		return mean, nil
	}
	return mean, graph.GreaterThan(count, graph.ZerosLike(count))
}

// perChannel broadcasts [C] over x's other axes.
func perChannel(v, x *graph.Node) *graph.Node { return graph.ExpandLeftToRank(v, x.Rank()) }

// scaled is x·s with s [C] constant, whose gradient with respect to x is what dx makes of that of the result. dx is called
// once for a backward pass, and may move state.
func scaled(x, s *graph.Node, dx func(g *graph.Node) *graph.Node) *graph.Node {
	s = perChannel(graph.StopGradient(s), x)
	in := graph.IdentityWithCustomGradient(x, func(_, v *graph.Node) *graph.Node { return dx(graph.Div(v, s)) })
	return graph.Mul(in, s)
}

// mix is decay·old + (1−decay)·v.
func mix(old, v *graph.Node, decay float64) *graph.Node {
	return graph.Add(graph.MulScalar(old, decay), graph.MulScalar(v, 1-decay))
}

// allFinite says whether no element of v is infinite or not a number.
func allFinite(v *graph.Node) *graph.Node { return graph.LogicalAll(graph.IsFinite(v)) }

// when is v where the scalar condition holds and old elsewhere; a nil condition always holds.
func when(cond, v, old *graph.Node) *graph.Node {
	if cond == nil {
		return v
	}
	return graph.Where(graph.BroadcastToShape(cond, shapes.Make(cond.DType(), v.Shape().Dimensions...)), v, old)
}

// both is the conjunction of two scalar conditions of which either may be nil.
func both(a, b *graph.Node) *graph.Node {
	switch {
	case a == nil:
		return b
	case b == nil:
		return a
	}
	return graph.LogicalAnd(a, b)
}

// channelSpecs are gain "w" (1) and bias "b" (0) per channel and further state by name, each filled with a value.
func channelSpecs(s shapes.Shape, state ...stateSpec) []nn.Spec {
	wantTokens(s)
	n := s.Dimensions[s.Rank()-1]
	specs := []nn.Spec{
		{Name: "w", Shape: shapes.Make(dtypes.Float32, n), Role: nn.Gain, Init: nn.Fill(1)},
		{Name: "b", Shape: shapes.Make(dtypes.Float32, n), Role: nn.Bias},
	}
	for _, st := range state {
		specs = append(specs, nn.Spec{Name: st.name, Shape: shapes.Make(dtypes.Float32, st.dims...), Role: nn.State, Init: nn.Fill(st.fill)})
	}
	return specs
}

// stateSpec declares running state.
type stateSpec struct {
	name string
	fill float32
	dims []int
}

// affine is gain·z + bias per channel.
func affine(c *nn.Ctx, z *graph.Node) *graph.Node {
	return graph.Add(graph.Mul(z, perChannel(c.P("w"), z)), perChannel(c.P("b"), z))
}

// decayOK says whether d can weigh an old value.
func decayOK(d float64) bool { return d >= 0 && d < 1 && !math.IsNaN(d) }

package quant

import "github.com/gomlx/gomlx/core/graph"

// Straight-through estimators: steps forward, something smooth backward (Bengio, Léonard, Courville, arXiv:1308.3432).
// Quantisers that learn are made of these.

// RoundSTE rounds half to even; its gradient is 1 everywhere.
func RoundSTE(x *graph.Node) *graph.Node { return StraightThrough(x, graph.Round(x)) }

// StraightThrough has the value of y, exactly, and the gradient of x, which are of one shape; x is finite.
func StraightThrough(x, y *graph.Node) *graph.Node {
	return graph.Add(graph.Sub(x, graph.StopGradient(x)), graph.StopGradient(y))
}

// ClipSTE limits x to [lo, hi], scalars or nodes that broadcast to x. Its gradient with respect to x is 1 where
// lo ≤ x ≤ hi, both ends included (saturated codes that are exact keep theirs), and 0 outside; the bounds get none.
func ClipSTE(x, lo, hi *graph.Node) *graph.Node {
	lo, hi = graph.StopGradient(lo), graph.StopGradient(hi)
	inside := graph.LogicalAnd(graph.GreaterOrEqual(x, lo), graph.LessOrEqual(x, hi))
	return graph.Where(inside, x, graph.StopGradient(graph.Min(graph.Max(x, lo), hi)))
}

// ScaleGradient leaves values alone and multiplies their gradient.
func ScaleGradient(x *graph.Node, factor float64) *graph.Node {
	return graph.IdentityWithCustomGradient(x, func(_, v *graph.Node) *graph.Node { return graph.MulScalar(v, factor) })
}

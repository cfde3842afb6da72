package nn

import (
	"fmt"
	"maps"
	"math"
	"slices"

	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
)

// unary is the table of elementwise functions of one value, by their ONNX names.
var unary = map[string]func(x *graph.Node) *graph.Node{
	"Relu":       func(x *graph.Node) *graph.Node { return graph.Max(x, graph.ZerosLike(x)) },
	"Sigmoid":    graph.Sigmoid,
	"Tanh":       graph.Tanh,
	"Exp":        graph.Exp,
	"Log":        graph.Log,
	"Sqrt":       func(x *graph.Node) *graph.Node { return graph.Sqrt(x) },
	"Reciprocal": func(x *graph.Node) *graph.Node { return graph.Reciprocal(x) },
	"Erf":        graph.Erf,
	"Abs":        graph.Abs,
	"Neg":        graph.Neg,
	"Sin":        graph.Sin,
	"Cos":        graph.Cos,
	"Floor":      graph.Floor,
	"Ceil":       graph.Ceil,
	"Round":      graph.Round, // half to even
	"Sign":       graph.Sign,
	"Identity":   graph.Identity,
	"Softplus": func(x *graph.Node) *graph.Node { // max(x,0) + log(1+exp(-|x|))
		return graph.Add(graph.Max(x, graph.ZerosLike(x)), graph.Log1P(graph.Exp(graph.Neg(graph.Abs(x)))))
	},
	"HardSwish": func(x *graph.Node) *graph.Node { // x·clip(x/6 + 1/2, 0, 1)
		return graph.Mul(x, graph.ClipScalar(graph.AddScalar(graph.MulScalar(x, 1./6), .5), 0, 1))
	},
	"Silu": func(x *graph.Node) *graph.Node { return graph.Mul(x, graph.Sigmoid(x)) },
	"Not":  func(x *graph.Node) *graph.Node { return graph.LogicalNot(x) },
}

// Unary is an elementwise function by its ONNX name: Relu, Sigmoid, Tanh, Exp, Log, Sqrt, Reciprocal, Erf, Abs, Neg,
// Sin, Cos, Floor, Ceil, Round, Sign, Softplus, HardSwish, Silu, Identity, Not.
type Unary struct{ Fn string }

// ReLU, Tanh, Sigmoid and SiLU are the usual activations.
var (
	ReLU    = Unary{"Relu"}
	Tanh    = Unary{"Tanh"}
	Sigmoid = Unary{"Sigmoid"}
	SiLU    = Unary{"Silu"}
)

// Kind returns the function's name.
func (u Unary) Kind() string { return u.Fn }

// Lower applies the function.
func (u Unary) Lower(_ *Ctx, x []*graph.Node) []*graph.Node {
	f := unary[u.Fn]
	if f == nil {
		panic(fmt.Errorf("there is no elementwise function %q", u.Fn))
	}
	return []*graph.Node{f(x[0])}
}

// UnaryFunctions lists the names that Unary knows.
func UnaryFunctions() []string { return sortedKeys(unary) }

// GELU is x·Φ(x): with the error function, or the tanh approximation when Tanh is set.
type GELU struct{ Tanh bool }

// Kind returns "gelu".
func (GELU) Kind() string { return "gelu" }

// Lower applies the function.
func (d GELU) Lower(_ *Ctx, x []*graph.Node) []*graph.Node {
	if d.Tanh { // x/2·(1 + tanh(√(2/π)(x + 0.044715x³)))
		cube := graph.Mul(graph.Mul(x[0], x[0]), x[0])
		t := graph.Tanh(graph.MulScalar(graph.Add(x[0], graph.MulScalar(cube, .044715)), math.Sqrt(2/math.Pi)))
		return []*graph.Node{graph.Mul(graph.MulScalar(x[0], .5), graph.AddScalar(t, 1))}
	}
	return []*graph.Node{graph.Mul(x[0], graph.MulScalar(graph.AddScalar(graph.Erf(graph.MulScalar(x[0], math.Sqrt2/2)), 1), .5))}
}

// LeakyReLU is x for x >= 0 and Alpha·x below.
type LeakyReLU struct{ Alpha float64 }

// Kind returns "leakyrelu".
func (LeakyReLU) Kind() string { return "leakyrelu" }

// Lower applies the function.
func (d LeakyReLU) Lower(_ *Ctx, x []*graph.Node) []*graph.Node {
	return []*graph.Node{graph.Where(graph.GreaterOrEqual(x[0], graph.ZerosLike(x[0])), x[0], graph.MulScalar(x[0], d.Alpha))}
}

// HardSigmoid is clip(Alpha·x + Beta, 0, 1).
type HardSigmoid struct{ Alpha, Beta float64 }

// Kind returns "hardsigmoid".
func (HardSigmoid) Kind() string { return "hardsigmoid" }

// Lower applies the function.
func (d HardSigmoid) Lower(_ *Ctx, x []*graph.Node) []*graph.Node {
	return []*graph.Node{graph.ClipScalar(graph.AddScalar(graph.MulScalar(x[0], d.Alpha), d.Beta), 0, 1)}
}

// Clip limits values to [Lo, Hi]; infinite bounds are none.
type Clip struct{ Lo, Hi float64 }

// Kind returns "clip".
func (Clip) Kind() string { return "clip" }

// Lower clips.
func (d Clip) Lower(_ *Ctx, x []*graph.Node) []*graph.Node {
	y := x[0]
	if !math.IsInf(d.Lo, -1) {
		y = graph.MaxScalar(y, d.Lo)
	}
	if !math.IsInf(d.Hi, 1) {
		y = graph.MinScalar(y, d.Hi)
	}
	return []*graph.Node{y}
}

// Affine is Scale·x + Shift with constants.
type Affine struct{ Scale, Shift float64 }

// Kind returns "affine".
func (Affine) Kind() string { return "affine" }

// Lower scales and shifts.
func (d Affine) Lower(_ *Ctx, x []*graph.Node) []*graph.Node {
	y := x[0]
	if d.Scale != 1 {
		y = graph.MulScalar(y, d.Scale)
	}
	if d.Shift != 0 {
		y = graph.AddScalar(y, d.Shift)
	}
	return []*graph.Node{y}
}

// binary is the table of elementwise functions of two values, by their ONNX names.
var binary = map[string]func(a, b *graph.Node) *graph.Node{
	"Add": graph.Add, "Sub": graph.Sub, "Mul": graph.Mul, "Div": graph.Div, "Pow": graph.Pow,
	"Max": graph.Max, "Min": graph.Min,
	"Equal": graph.Equal, "Less": graph.LessThan, "Greater": graph.GreaterThan,
	"LessOrEqual": graph.LessOrEqual, "GreaterOrEqual": graph.GreaterOrEqual,
	"And": graph.LogicalAnd, "Or": graph.LogicalOr,
}

// Binary is an elementwise function of two values that broadcast as in NumPy, by its ONNX name: Add, Sub, Mul, Div,
// Pow, Max, Min, Equal, Less, Greater, LessOrEqual, GreaterOrEqual, And, Or.
type Binary struct{ Fn string }

// Add and Mul are the two that networks use most.
var (
	Add = Binary{"Add"}
	Mul = Binary{"Mul"}
)

// Kind returns the function's name.
func (d Binary) Kind() string { return d.Fn }

// Lower applies the function.
func (d Binary) Lower(_ *Ctx, x []*graph.Node) []*graph.Node {
	f := binary[d.Fn]
	if f == nil {
		panic(fmt.Errorf("there is no elementwise function %q of two values", d.Fn))
	}
	a, b := Broadcast(x[0], x[1])
	return []*graph.Node{f(a, b)}
}

// BinaryFunctions lists the names that Binary knows.
func BinaryFunctions() []string { return sortedKeys(binary) }

// Broadcast gives two values a common rank, and a common shape where GoMLX's elementwise operations would refuse one
// (both sides have an axis of size one).
func Broadcast(a, b *graph.Node) (*graph.Node, *graph.Node) {
	r := max(a.Rank(), b.Rank())
	if a.Rank() > 0 {
		a = graph.ExpandLeftToRank(a, r)
	}
	if b.Rank() > 0 {
		b = graph.ExpandLeftToRank(b, r)
	}
	if a.Rank() != b.Rank() || slices.Equal(a.Shape().Dimensions, b.Shape().Dimensions) {
		return a, b
	}
	dims := make([]int, r)
	for i := range dims {
		x, y := a.Shape().Dimensions[i], b.Shape().Dimensions[i]
		if x != y && x != 1 && y != 1 {
			panic(fmt.Errorf("shapes %s and %s do not broadcast", a.Shape(), b.Shape()))
		}
		if dims[i] = x; x == 1 {
			dims[i] = y
		}
	}
	wide := func(v *graph.Node) *graph.Node {
		if slices.Equal(v.Shape().Dimensions, dims) {
			return v
		}
		return graph.BroadcastToDims(v, dims...)
	}
	if !slices.Equal(a.Shape().Dimensions, dims) && !slices.Equal(b.Shape().Dimensions, dims) {
		return wide(a), wide(b)
	}
	return a, b
}

// Where picks x[1] where the condition x[0] is true, else x[2]; all broadcast.
type Where struct{}

// Kind returns "where".
func (Where) Kind() string { return "where" }

// Lower selects.
func (Where) Lower(_ *Ctx, x []*graph.Node) []*graph.Node {
	a, b := Broadcast(x[1], x[2])
	c, a := Broadcast(x[0], a)
	c, b = Broadcast(c, b)
	dims := c.Shape().Dimensions
	for _, v := range []*graph.Node{a, b} {
		for i, d := range v.Shape().Dimensions {
			if i < len(dims) && dims[i] == 1 {
				dims = slices.Clone(dims)
				dims[i] = d
			}
		}
	}
	full := func(v *graph.Node) *graph.Node { return graph.BroadcastToDims(v, dims...) }
	return []*graph.Node{graph.Where(full(c), full(a), full(b))}
}

// PReLU is x for x >= 0 and slope·x below, with parameter "w", one slope per channel (last axis).
type PReLU struct{}

// Kind returns "prelu".
func (PReLU) Kind() string { return "prelu" }

// Params is the slope "w", initially 1/4.
func (PReLU) Params(in []shapes.Shape) []Spec {
	wantRank(in[0], 1, -1)
	return []Spec{{"w", f32(in[0].Dimensions[in[0].Rank()-1]), Gain, Fill(.25)}}
}

// Lower applies the function.
func (PReLU) Lower(c *Ctx, x []*graph.Node) []*graph.Node {
	w := graph.ExpandLeftToRank(c.P("w"), x[0].Rank())
	return []*graph.Node{graph.Where(graph.GreaterOrEqual(x[0], graph.ZerosLike(x[0])), x[0], graph.Mul(x[0], w))}
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

package nn

import (
	"cmp"
	"fmt"
	"math"
	"slices"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"
)

// RoPE turns the features of every head by an angle that grows with the position, so that products of queries and keys
// depend on the distance of their positions alone (Su et al., arXiv:2104.09864, eq. 34). For x [..., tokens, heads,
// width], position t from 0 and half h = width/2, feature j turns together with feature j+h, as in LLaMA:
//
//	y_j   = x_j·cos(t·θ_j) − x_{j+h}·sin(t·θ_j)
//	y_j+h = x_{j+h}·cos(t·θ_j) + x_j·sin(t·θ_j),   θ_j = Base^(−2j/width)
//
// The paper pairs feature 2j with 2j+1 instead, which is the same up to an order of the rows of the weights in front.
type RoPE struct {
	Base float64 // 0: 10000
}

// Kind returns "rope".
func (RoPE) Kind() string { return "rope" }

// Tables gives cos and sin of tokens × width angles in row-major order; the halves of a row are equal.
func (d RoPE) Tables(tokens, width int) (cos, sin []float64) {
	base, half := cmp.Or(d.Base, 10000), width/2
	cos, sin = make([]float64, tokens*width), make([]float64, tokens*width)
	for j := range half {
		theta := math.Pow(base, -2*float64(j)/float64(width))
		for t := range tokens {
			s, c := math.Sincos(float64(t) * theta)
			at := t*width + j
			cos[at], cos[at+half], sin[at], sin[at+half] = c, c, s, s
		}
	}
	return cos, sin
}

// Lower turns.
func (d RoPE) Lower(c *Ctx, xs []*graph.Node) []*graph.Node {
	x := xs[0]
	wantRank(x.Shape(), 3, -1)
	r, dims := x.Rank(), x.Shape().Dimensions
	tokens, width := dims[r-3], dims[r-1]
	if width%2 != 0 || !x.DType().IsFloat() {
		panic(fmt.Errorf("rope wants floats of an even width per head, got %s", x.Shape()))
	}
	if c.scratch {
		return []*graph.Node{x}
	}
	cs, sn := d.Tables(tokens, width)
	shape := make([]int, r)
	for i := range shape {
		shape[i] = 1
	}
	shape[r-3], shape[r-1] = tokens, width
	cos, sin := floats(x, cs, shape), floats(x, sn, shape)
	half := width / 2
	turned := graph.Concatenate([]*graph.Node{
		graph.Neg(graph.SliceAxis(x, -1, graph.AxisRange(half, width))), graph.SliceAxis(x, -1, graph.AxisRange(0, half)),
	}, -1)
	return []*graph.Node{graph.Add(graph.Mul(x, cos), graph.Mul(turned, sin))}
}

// RepeatHeads gives every head of keys or values to several queries: x [..., heads, width] becomes
// [..., heads·Times, width], each head Times times in a row (grouped queries: Ainslie et al., arXiv:2305.13245).
type RepeatHeads struct{ Times int }

// Kind returns "repeatheads".
func (RepeatHeads) Kind() string { return "repeatheads" }

// Lower repeats.
func (d RepeatHeads) Lower(_ *Ctx, xs []*graph.Node) []*graph.Node {
	x := xs[0]
	wantRank(x.Shape(), 2, -1)
	if d.Times < 1 || d.Times > 1<<10 {
		panic(fmt.Errorf("repeatheads: %d times; want 1 to 1024", d.Times))
	}
	dims := slices.Clone(x.Shape().Dimensions)
	r := len(dims)
	wide := append(slices.Clone(dims[:r-1]), d.Times, dims[r-1])
	x = graph.BroadcastToDims(graph.InsertAxes(x, -2), wide...)
	dims[r-2] *= d.Times
	return []*graph.Node{graph.Reshape(x, dims...)}
}

// CausalMask hides the future from attention: x [..., queries, keys] is kept where the key is not later than the query,
// and pushed below everything else where it is, so that a softmax gives exactly 0 there. With fewer queries than keys
// the queries are the last ones.
type CausalMask struct{}

// Kind returns "causalmask".
func (CausalMask) Kind() string { return "causalmask" }

// hidden is what stands for a hidden logit: far below every real one, and finite, because −Inf is not safe in every
// backend's arithmetic.
const hidden = -1e9

// Table is the mask as numbers to add to the logits of queries × keys, in row-major order: 0 or a large negative one.
func (CausalMask) Table(queries, keys int) []float64 {
	m := make([]float64, queries*keys)
	for q := range queries {
		for k := keys - queries + q + 1; k < keys; k++ {
			m[q*keys+k] = hidden
		}
	}
	return m
}

// Lower masks.
func (d CausalMask) Lower(_ *Ctx, xs []*graph.Node) []*graph.Node {
	x := xs[0]
	wantRank(x.Shape(), 2, -1)
	r, dims := x.Rank(), x.Shape().Dimensions
	queries, keys := dims[r-2], dims[r-1]
	if queries > keys || !x.DType().IsFloat() {
		panic(fmt.Errorf("a causal mask wants float logits [..., queries, keys] with at most as many queries as keys, got %s", x.Shape()))
	}
	// The mask is computed, not stored: at 2,048 tokens a stored one would be 16 MB for every layer.
	pairs := shapes.Make(dtypes.Int32, queries, keys)
	past := graph.GreaterOrEqual(graph.AddScalar(graph.Iota(x.Graph(), pairs, 0), keys-queries), graph.Iota(x.Graph(), pairs, 1))
	visible := graph.BroadcastToShape(graph.ExpandLeftToRank(past, r), shapes.Make(dtypes.Bool, dims...))
	return []*graph.Node{graph.Where(visible, x, graph.AddScalar(graph.ZerosLike(x), hidden))}
}

// floats is a constant of x's type, converted on the host.
func floats(x *graph.Node, v []float64, dims []int) *graph.Node {
	if x.DType() == dtypes.Float64 {
		return graph.ConstTensor(x.Graph(), tensors.FromFlatDataAndDimensions(v, dims...))
	}
	f := graph.ConstTensor(x.Graph(), tensors.FromFlatDataAndDimensions(convert[float32](v), dims...))
	if f.DType() != x.DType() {
		f = graph.ConvertDType(f, x.DType())
	}
	return f
}

package prune

import (
	"fmt"
	"math"
	"slices"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/gomlx/core/graph"

	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/onnx"
)

// ReLUTopK is the activation of the Top-k Transformer (Li, You, Bhojanapalli et al., arXiv:2210.06313, section 5): of
// each token, the row of the last axis, it keeps the K largest entries of max(x, 0) and sets the others to 0.
//
//	a = Top_K(max(x, 0))
//
// Of equal entries those of the lowest index are kept; a token with fewer than K positive entries keeps them all. The
// gradient goes through the kept entries only. K is the same in training and at inference: put it where the network
// has its ReLU (ViTOptions.Act) and train as before. Entries below the smallest normal number count as 0. NaN stays.
//
// The selection is exact and costs some forty passes over the entries in a graph (O(width) per token), and one TopK in
// an ONNX file. With Buckets it is the approximation that suits accelerators: only the largest entry of each of Buckets
// equal stretches of the row is a candidate, and of those K are kept. What it misses is measured by Recall.
type ReLUTopK struct {
	K       int // entries kept per token; 0: all (plain ReLU), or Buckets where there are any
	Buckets int // stretches of one candidate each, at least K, a divisor of the width; 0: exact selection
}

var (
	_ nn.Op         = ReLUTopK{}
	_ onnx.Exporter = ReLUTopK{}
)

// Kind returns "relutopk".
func (ReLUTopK) Kind() string { return "relutopk" }

// kept is K with its default.
func (d ReLUTopK) kept() int {
	if d.K == 0 {
		return d.Buckets
	}
	return d.K
}

// Check reports what keeps the op from running on rows of that width.
func (d ReLUTopK) Check(width int) error {
	switch {
	case d.K < 0:
		return fmt.Errorf("prune: top-k with k = %d; want at least 1, or 0 for plain ReLU", d.K)
	case d.Buckets < 0:
		return fmt.Errorf("prune: top-k with %d buckets; want at least 1, or 0 for the exact selection", d.Buckets)
	case width < 1:
		return fmt.Errorf("prune: top-k of rows without entries")
	case d.Buckets > 0 && d.Buckets < d.K:
		return fmt.Errorf("prune: %d buckets hold %d candidates, fewer than k = %d; take at least as many buckets, or none for the exact selection", d.Buckets, d.Buckets, d.K)
	case d.Buckets > 0 && width%d.Buckets != 0:
		return fmt.Errorf("prune: %d buckets do not divide %d entries; use one of %v", d.Buckets, width, divisors(width, max(d.K, 1)))
	}
	return nil
}

// divisors of n that are at least from.
func divisors(n, from int) (out []int) {
	for d := from; d <= n && len(out) < 12; d++ {
		if n%d == 0 {
			out = append(out, d)
		}
	}
	return out
}

// Lower selects.
func (d ReLUTopK) Lower(_ *nn.Ctx, x []*graph.Node) []*graph.Node {
	if x[0].Rank() < 1 {
		panic(fmt.Errorf("prune: top-k of a scalar"))
	}
	if err := d.Check(lastAxis(x[0])); err != nil {
		panic(err)
	}
	return []*graph.Node{keepLargest(x[0], x[0], d.kept(), d.Buckets)}
}

// TopK is ReLUTopK{K: k} as a function of a graph node: the k largest non-negative activations of the last axis; k = 0
// is plain ReLU.
func TopK(x *graph.Node, k int) *graph.Node {
	return ReLUTopK{K: k}.Lower(nil, []*graph.Node{x})[0]
}

// MagnitudeTopK keeps the K entries of the largest magnitude of each row of the last axis, of both signs. It belongs
// behind activations without exact zeros (GELU, SiLU), where it approximates: a network with ReLU takes ReLUTopK, whose
// choice is another one.
type MagnitudeTopK struct {
	K int // entries kept per token, at least 1
}

var (
	_ nn.Op         = MagnitudeTopK{}
	_ onnx.Exporter = MagnitudeTopK{}
)

// Kind returns "magnitudetopk".
func (MagnitudeTopK) Kind() string { return "magnitudetopk" }

// Lower selects.
func (d MagnitudeTopK) Lower(_ *nn.Ctx, x []*graph.Node) []*graph.Node {
	if d.K < 1 {
		panic(fmt.Errorf("prune: top-k by magnitude with k = %d; want at least 1", d.K))
	}
	if x[0].Rank() < 1 {
		panic(fmt.Errorf("prune: top-k of a scalar"))
	}
	return []*graph.Node{keepLargest(x[0], graph.Abs(x[0]), d.K, 0)}
}

func lastAxis(x *graph.Node) int { return x.Shape().Dimensions[x.Rank()-1] }

// keepLargest gives x where its key is among the k largest positive ones of its row, else 0. k = 0 keeps all positive.
func keepLargest(x, key *graph.Node, k, buckets int) *graph.Node {
	key = graph.StopGradient(key)
	width := lastAxis(x)
	drop := graph.LessThan(key, graph.Scalar(x.Graph(), key.DType(), smallest(key.DType())))
	switch {
	case buckets > 0 && buckets < width:
		drop = graph.LogicalOr(drop, losers(key, k, buckets))
	case k > 0 && k < width:
		drop = graph.LogicalOr(drop, beyond(key, k))
	}
	return graph.Where(drop, graph.ZerosLike(x), x)
}

// smallest is the smallest positive normal number of a type.
func smallest(t dtypes.DType) float64 {
	switch t {
	case dtypes.Float64:
		return 0x1p-1022
	case dtypes.Float16:
		return 0x1p-14
	}
	return 0x1p-126
}

// beyond marks the entries of each row that are not among its k largest: those below the k-th largest value, and of
// those equal to it all behind the last that has a place.
func beyond(key *graph.Node, k int) *graph.Node {
	t := kthLargest(key, k)
	ties := graph.Equal(key, t)
	places := graph.Sub(scalarLike(key, float64(k)), countIn(graph.GreaterThan(key, t), key.DType()))
	index := graph.Iota(key.Graph(), key.Shape(), key.Rank()-1)
	behind := graph.GreaterOrEqual(index, firstIndex(ties, index, places))
	return graph.LogicalOr(graph.LessThan(key, t), graph.LogicalAnd(ties, behind))
}

// kthLargest is the k-th largest positive value of each row, [..., 1], or the smallest normal number where there are
// fewer. The value is built bit by bit, exponent first: a bit is set if k entries are still as large.
func kthLargest(key *graph.Node, k int) *graph.Node {
	t := graph.MulScalar(graph.OnesLike(graph.ReduceAndKeep(key, graph.ReduceMax, -1)), smallest(key.DType()))
	raise := func(candidate *graph.Node) {
		enough := graph.GreaterOrEqual(countIn(graph.GreaterOrEqual(key, candidate), key.DType()), scalarLike(key, float64(k)))
		t = graph.Where(enough, candidate, t)
	}
	exponent, mantissa := 7, 23
	switch key.DType() {
	case dtypes.Float64:
		exponent, mantissa = 10, 52
	case dtypes.Float16:
		exponent, mantissa = 4, 10
	case dtypes.BFloat16:
		mantissa = 7
	}
	for bit := exponent; bit >= 0; bit-- {
		if bit == exponent { // 2^(2^bit) itself is no number of the type
			half := math.Ldexp(1, 1<<(bit-1))
			raise(graph.MulScalar(graph.MulScalar(t, half), half))
			continue
		}
		raise(graph.MulScalar(t, math.Ldexp(1, 1<<bit)))
	}
	power := t
	for bit := 1; bit <= mantissa; bit++ {
		raise(graph.Add(t, graph.MulScalar(power, math.Ldexp(1, -bit))))
	}
	return t
}

// firstIndex is the largest index, [..., 1], in front of which no more ties stand than there are places.
func firstIndex(ties, index, places *graph.Node) *graph.Node {
	at := graph.ZerosLike(places)
	bits := 0
	for 1<<bits <= lastAxis(ties) {
		bits++
	}
	for bit := bits - 1; bit >= 0; bit-- {
		candidate := graph.AddScalar(at, float64(int(1)<<bit))
		in := graph.LessOrEqual(countIn(graph.LogicalAnd(ties, graph.LessThan(index, candidate)), places.DType()), places)
		at = graph.Where(in, candidate, at)
	}
	return at
}

// losers marks the entries that are not the first largest of their bucket, and those whose bucket's largest is not among
// the k largest candidates.
func losers(key *graph.Node, k, buckets int) *graph.Node {
	dims := key.Shape().Dimensions
	r := key.Rank()
	split := graph.Reshape(key, append(slices.Clone(dims[:r-1]), buckets, dims[r-1]/buckets)...)
	top := graph.ReduceAndKeep(split, graph.ReduceMax, -1)
	index := graph.Iota(key.Graph(), split.Shape(), r)
	first := graph.ReduceAndKeep(graph.Where(graph.Equal(split, top), index, scalarLike(split, float64(dims[r-1]))), graph.ReduceMin, -1)
	lost := graph.NotEqual(index, first)
	if k < buckets {
		out := beyond(graph.Squeeze(top, -1), k)
		lost = graph.LogicalOr(lost, graph.InsertAxes(out, -1))
	}
	lost = graph.LogicalAnd(lost, graph.Equal(split, split)) // NaN stays
	return graph.Reshape(lost, dims...)
}

func scalarLike(x *graph.Node, v float64) *graph.Node { return graph.Scalar(x.Graph(), x.DType(), v) }

// countIn is the number of true entries of each row, [..., 1].
func countIn(mask *graph.Node, t dtypes.DType) *graph.Node {
	return graph.ReduceAndKeep(graph.ConvertDType(mask, t), graph.ReduceSum, -1)
}

// ExportONNX writes TopK, which takes equal entries in the order of their index as the op does, and compares every entry
// with the last that it chose.
func (d ReLUTopK) ExportONNX(e *onnx.Emitter, n *nn.Node) error {
	width := e.Shape(n.In[0]).Dimensions[e.Shape(n.In[0]).Rank()-1]
	if err := d.Check(width); err != nil {
		return err
	}
	x, k := e.In(n, 0), d.kept()
	if k == 0 || k >= width {
		e.Out(n, nil, "Relu", []string{x})
		return nil
	}
	key := e.Node("Relu", n.Name+"/relu", []string{x})
	if d.Buckets > 0 && d.Buckets < width {
		key = exportCandidates(e, n, key, width, d.Buckets)
	}
	return exportLargest(e, n, key, key, width, k)
}

// ExportONNX writes TopK of the magnitudes.
func (d MagnitudeTopK) ExportONNX(e *onnx.Emitter, n *nn.Node) error {
	width := e.Shape(n.In[0]).Dimensions[e.Shape(n.In[0]).Rank()-1]
	if d.K < 1 {
		return fmt.Errorf("prune: top-k by magnitude with k = %d; want at least 1", d.K)
	}
	x := e.In(n, 0)
	if d.K >= width {
		e.Out(n, nil, "Identity", []string{x})
		return nil
	}
	return exportLargest(e, n, x, e.Node("Abs", n.Name+"/abs", []string{x}), width, d.K)
}

// exportLargest gives x where its key is among the k largest of the last axis, else 0.
func exportLargest(e *onnx.Emitter, n *nn.Node, x, key string, width, k int) error {
	top := e.Nodes("TopK", []string{n.Name + "/values", n.Name + "/indices"}, []string{key, e.List(k)})
	last := func(what, from string) string {
		return e.Node("Slice", n.Name+"/"+what, []string{from, e.List(k - 1), e.List(k), e.List(-1)})
	}
	t, at := last("least", top[0]), last("last", top[1])
	index := make([]int32, width)
	for i := range index {
		index[i] = int32(i)
	}
	positions := e.Codes(n.Name+"/positions", onnx.Int64, index, width)
	above := e.Node("Greater", n.Name+"/above", []string{key, t})
	tie := e.Node("And", n.Name+"/ties", []string{
		e.Node("Equal", n.Name+"/equal", []string{key, t}),
		e.Node("LessOrEqual", n.Name+"/in_front", []string{positions, at}),
	})
	e.Out(n, nil, "Where", []string{e.Node("Or", n.Name+"/kept", []string{above, tie}), x, e.Scalar(0)})
	return nil
}

// exportCandidates leaves the first largest entry of each bucket and zeroes the others.
func exportCandidates(e *onnx.Emitter, n *nn.Node, key string, width, buckets int) string {
	rank := e.Shape(n.In[0]).Rank()
	keep := make([]int, rank-1) // 0: the input's axis
	w := width / buckets
	split := e.Node("Reshape", n.Name+"/buckets", []string{key, e.List(append(slices.Clone(keep), buckets, w)...)})
	first := e.Node("ArgMax", n.Name+"/first", []string{split}, onnx.Int("axis", rank), onnx.Int("keepdims", 1))
	index := make([]int32, w)
	for i := range index {
		index[i] = int32(i)
	}
	candidate := e.Node("Equal", n.Name+"/candidate", []string{first, e.Codes(n.Name+"/within", onnx.Int64, index, w)})
	split = e.Node("Where", n.Name+"/candidates", []string{candidate, split, e.Scalar(0)})
	return e.Node("Reshape", n.Name+"/row", []string{split, e.List(append(keep, width)...)})
}

// Recall is the share of the K largest positive entries that the buckets keep, averaged over the rows of a, [rows,
// width], that have any; 1 for the exact selection. Values that are NaN are refused.
func (d ReLUTopK) Recall(a []float32, width int) (float64, error) {
	if err := d.Check(width); err != nil {
		return 0, err
	}
	if len(a) == 0 || len(a)%width != 0 {
		return 0, fmt.Errorf("prune: %d activations are not rows of %d", len(a), width)
	}
	k := d.kept()
	if d.Buckets == 0 || k == 0 {
		return 1, nil
	}
	w, rows, sum := width/d.Buckets, 0, 0.
	for at := 0; at < len(a); at += width {
		row := a[at : at+width]
		if err := finite(row, at); err != nil {
			return 0, err
		}
		want := largest(row, k)
		if len(want) == 0 {
			continue
		}
		candidates := make([]float32, width)
		for b := 0; b < width; b += w {
			best := b
			for i := b; i < b+w; i++ {
				if row[i] > row[best] {
					best = i
				}
			}
			candidates[best] = row[best]
		}
		hit := 0
		got := largest(candidates, k)
		for _, i := range want {
			if _, ok := slices.BinarySearch(got, i); ok {
				hit++
			}
		}
		rows++
		sum += float64(hit) / float64(len(want))
	}
	if rows == 0 {
		return 1, nil
	}
	return sum / float64(rows), nil
}

// largest are the indices, ascending, of the k largest positive entries; of equal ones the first.
func largest(row []float32, k int) []int32 {
	idx := make([]int32, 0, len(row))
	for i, v := range row {
		if v > 0 {
			idx = append(idx, int32(i))
		}
	}
	return selectLargest(row, idx, k)
}

// selectLargest leaves the k of idx, ascending indices into row, with the largest values; of equal ones the first. It
// works in place in O(len(idx)) on average.
func selectLargest(row []float32, idx []int32, k int) []int32 {
	if k <= 0 || len(idx) <= k {
		return idx
	}
	values := make([]float32, len(idx))
	for j, i := range idx {
		values[j] = row[i]
	}
	t := kth(values, k)
	places := k
	for _, i := range idx {
		if row[i] > t {
			places--
		}
	}
	out := idx[:0]
	for _, i := range idx {
		switch {
		case row[i] > t:
			out = append(out, i)
		case row[i] == t && places > 0:
			out = append(out, i)
			places--
		}
	}
	return out
}

// kth returns the k-th largest of v (k from 1) and reorders v: Hoare's selection with the median of three as pivot.
func kth[F float32 | float64](v []F, k int) F {
	lo, hi := 0, len(v)-1
	for lo < hi {
		a, b, c := v[lo], v[lo+(hi-lo)/2], v[hi]
		pivot := max(min(a, b), min(max(a, b), c))
		i, j := lo, hi
		for i <= j {
			for v[i] > pivot {
				i++
			}
			for v[j] < pivot {
				j--
			}
			if i <= j {
				v[i], v[j] = v[j], v[i]
				i++
				j--
			}
		}
		switch {
		case k-1 <= j:
			hi = j
		case k-1 >= i:
			lo = i
		default:
			return v[k-1]
		}
	}
	return v[lo]
}

func finite(row []float32, from int) error {
	for i, v := range row {
		if v != v {
			return fmt.Errorf("prune: activation %d is NaN; the network or its inputs are broken", from+i)
		}
	}
	return nil
}

// StoredTypes are the ops of this package that safetensors files may name.
func StoredTypes() []any { return []any{ReLUTopK{}, MagnitudeTopK{}} }

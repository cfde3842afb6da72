package zoo

import (
	"cmp"
	"fmt"

	"github.com/lathe-ml/lathe/nn"
)

// LinearAttentionOptions describe one simplified linear attention. The zero value of a field but Heads and Grid is the
// paper's.
type LinearAttentionOptions struct {
	Heads  int     // must divide the width
	Grid   [2]int  // height and width of the map of tokens, row by row; there is no class token
	Kernel int     // side of the depth-wise kernel, odd; 0: 5
	NoConv bool    // without the depth-wise convolution
	Window int     // attention inside windows of that side, which must divide the map; 0, or the map's size and more: the whole map
	Reduce int     // keys and values are those of the map shrunk by a convolution of that size and stride (PVT); 0: 1
	Norm   nn.Norm // behind that convolution; nil: nn.LayerNorm{}
	Init   nn.Init // of the sites' weights; nil: nn.Plain's
}

// linearEps is added to the sum of a query's weights.
const linearEps = 1e-6

// LinearAttention adds simplified linear attention (SLA; Guo et al., arXiv:2405.11582, section 3.3) over x [batch, tokens,
// dim], whose cost is linear in the number of tokens N. With q, k and v the outputs of the sites name.q, name.k and name.v,
// and in every head of width d:
//
//	q = relu(q),  k = relu(k + pos)
//	o_i = q_i·(Σ_j k_jᵀ v_j) / (q_i·Σ_j k_j + 1e-6) + DWC(v)_i
//
// and the site name.o over the heads side by side. There is no softmax and no 1/√d; pos [1, N, dim] is learned and starts
// at 0; DWC is a depth-wise convolution over the map of tokens that all heads share, zero outside the map. A query that is
// orthogonal to all keys gets attention 0 and keeps DWC(v). For N > d the product of keys and values comes first, which
// is cheaper; otherwise that of queries and keys, with the same result.
//
// With Window it stays inside windows, as Swin's does. With Reduce = r, keys and values are N/r² tokens, and DWC reads v
// stretched to N tokens by linear interpolation along the sequence of tokens. In a half precision the sums are of that
// precision: keep such networks in float32.
//
// It is no drop-in for a trained softmax attention: the network has to be trained with it. The causal case is not covered.
func LinearAttention(b *nn.Builder, name, x string, o LinearAttentionOptions) string {
	s := b.Shape(x).Dimensions
	fail := func(format string, args ...any) string {
		b.Fail(fmt.Errorf("zoo: linear attention %q: "+format, append([]any{name}, args...)...))
		return name
	}
	switch {
	case len(s) != 3:
		return fail("want [batch, tokens, dim], got %v", s)
	case o.Heads < 1 || s[2]%o.Heads != 0:
		return fail("%d heads do not divide width %d", o.Heads, s[2])
	case o.Grid[0] < 1 || o.Grid[1] < 1 || o.Grid[0] > s[1] || o.Grid[0]*o.Grid[1] != s[1]:
		return fail("a map of %d×%d is not %d tokens; there must be no class token: average the tokens instead", o.Grid[0], o.Grid[1], s[1])
	case o.Kernel < 0 || o.Kernel > 0 && o.Kernel%2 == 0 || o.Kernel > 1<<10:
		return fail("kernel of side %d; want an odd number (0: 5)", o.Kernel)
	case o.Reduce < 0:
		return fail("keys and values reduced by %d; want at least 1 (0: 1)", o.Reduce)
	}
	b.In(name, func() {
		x = Windows(b, "win", x, o.Grid, o.Window, func(x string, grid [2]int) string { return o.attend(b, x, s[2], grid) })
	})
	return x
}

// Mixer is for ViTOptions: linear attention in place of softmax attention. Heads and Grid are the network's.
func (o LinearAttentionOptions) Mixer() func(b *nn.Builder, name, x string, heads int, grid [2]int) string {
	return func(b *nn.Builder, name, x string, heads int, grid [2]int) string {
		o.Heads, o.Grid = heads, grid
		return LinearAttention(b, name, x, o)
	}
}

// attend projects, attends and projects back.
func (o LinearAttentionOptions) attend(b *nn.Builder, x string, dim int, grid [2]int) string {
	site := func(p, x string) string { return b.Add(p, nn.Dense{Out: dim, W: nn.Plain{Init: o.Init}}, x) }
	kv := x
	if r := o.Reduce; r > 1 {
		if grid[0]%r != 0 || grid[1]%r != 0 {
			b.Fail(fmt.Errorf("zoo: linear attention: a reduction by %d does not divide the map of %d×%d", r, grid[0], grid[1]))
			return x
		}
		kv = b.Add("reduce.map", nn.Reshape{Dims: []int{0, grid[0], grid[1], dim}}, x)
		kv = b.Add("reduce", nn.Conv{Out: dim, Kernel: []int{r, r}, Stride: []int{r, r}}, kv)
		norm := o.Norm
		if norm == nil {
			norm = nn.LayerNorm{}
		}
		kv = b.Add("reduce.norm", norm, kv)
		kv = b.Add("reduce.flat", nn.Reshape{Dims: []int{0, grid[0] / r * (grid[1] / r), dim}}, kv)
	}
	return site("o", o.mix(b, site("q", x), site("k", kv), site("v", kv), grid))
}

// mix is what stands between the projections: q [batch, N, dim], k and v [batch, M, dim] to [batch, N, dim].
func (o LinearAttentionOptions) mix(b *nn.Builder, q, k, v string, grid [2]int) string {
	qs, ks := b.Shape(q).Dimensions, b.Shape(k).Dimensions
	if len(qs) != 3 || len(ks) != 3 {
		return q // there is an error already
	}
	tokens, keys, dim := qs[1], ks[1], qs[2]
	width := dim / o.Heads
	heads := func(name, x string, perm ...int) string {
		return b.Add(name+".t", nn.Transpose{Perm: perm}, b.Add(name+".split", nn.Reshape{Dims: []int{0, 0, o.Heads, width}}, x))
	}
	k = b.Add("k.pos", nn.Add, k, b.Add("pos", nn.Value{Shape: f32(1, keys, dim)}))
	qt := heads("q", b.Add("q.relu", nn.ReLU, q), 0, 2, 1, 3) // [batch, heads, N, d]
	kt := heads("k", b.Add("k.relu", nn.ReLU, k), 0, 2, 3, 1) // [batch, heads, d, M]
	vt := heads("v", v, 0, 2, 1, 3)                           // [batch, heads, M, d]

	sum := b.Add("weight", nn.MatMul{}, qt, b.Add("k.sum", nn.Reduce{Fn: "ReduceSum", Axes: []int{-1}, Keep: true}, kt))
	sum = b.Add("weight.eps", nn.Affine{Scale: 1, Shift: linearEps}, sum) // [batch, heads, N, 1]
	var y string
	if width*(tokens+keys) < 2*tokens*keys { // for N = M: d < N
		y = b.Add("ctx", nn.MatMul{}, qt, b.Add("state", nn.MatMul{}, kt, vt))
	} else {
		y = b.Add("ctx", nn.MatMul{}, b.Add("probs", nn.MatMul{}, qt, kt), vt)
	}
	y = b.Add("mean", nn.Binary{Fn: "Div"}, y, sum)
	if !o.NoConv {
		y = b.Add("mixed", nn.Add, y, o.local(b, v, vt, tokens, keys, width, grid))
	}
	return b.Add("merge", nn.Reshape{Dims: []int{0, 0, dim}}, b.Add("ctx.t", nn.Transpose{Perm: []int{0, 2, 1, 3}}, y))
}

// local is DWC(v), [batch, heads, N, d]: every head is a picture of d channels, and all have the same filters.
func (o LinearAttentionOptions) local(b *nn.Builder, v, vt string, tokens, keys, width int, grid [2]int) string {
	if keys != tokens {
		v = b.Add("v.stretch", nn.Resize{Size: []int{tokens}, Linear: true}, v)
		vt = b.Add("v.image.t", nn.Transpose{Perm: []int{0, 2, 1, 3}}, b.Add("v.image.split", nn.Reshape{Dims: []int{0, 0, o.Heads, width}}, v))
	}
	side := cmp.Or(o.Kernel, 5)
	conv := nn.Conv{Out: width, Kernel: []int{side, side}, Pad: [][2]int{{side / 2, side / 2}, {side / 2, side / 2}}, Groups: width}
	y := b.Add("dwc", conv, b.Add("v.image", nn.Reshape{Dims: []int{-1, grid[0], grid[1], width}}, vt))
	return b.Add("dwc.split", nn.Reshape{Dims: []int{-1, o.Heads, tokens, width}}, y)
}

// Windows cuts a map of tokens x [batch, height·width, dim] into square windows, hands f each of them as a case of its own,
// [batch·windows, side², dim], and puts the results together again. A side of 0, or one that is not smaller than the map,
// leaves the map whole. The nodes are named name+".…".
func Windows(b *nn.Builder, name, x string, grid [2]int, side int, f func(x string, grid [2]int) string) string {
	if side == 0 || side >= grid[0] && side >= grid[1] {
		return f(x, grid)
	}
	s := b.Shape(x).Dimensions
	if side < 0 || grid[0]%side != 0 || grid[1]%side != 0 || len(s) != 3 || grid[0]*grid[1] != s[1] {
		b.Fail(fmt.Errorf("zoo: windows of side %d do not divide the map of %d×%d of %v", side, grid[0], grid[1], s))
		return x
	}
	rows, cols, dim := grid[0]/side, grid[1]/side, s[2]
	x = b.Add(name+".map", nn.Reshape{Dims: []int{0, rows, side, cols, side, dim}}, x)
	x = b.Add(name+".cut", nn.Transpose{Perm: []int{0, 1, 3, 2, 4, 5}}, x)
	x = f(b.Add(name, nn.Reshape{Dims: []int{-1, side * side, dim}}, x), [2]int{side, side})
	x = b.Add(name+".back", nn.Reshape{Dims: []int{-1, rows, cols, side, side, dim}}, x)
	x = b.Add(name+".join", nn.Transpose{Perm: []int{0, 1, 3, 2, 4, 5}}, x)
	return b.Add(name+".tokens", nn.Reshape{Dims: []int{0, grid[0] * grid[1], dim}}, x)
}

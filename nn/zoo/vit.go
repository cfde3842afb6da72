// Package zoo holds the reference networks that experiments and examples share. Each is a plain function of its
// options; the zero value of an option is the default that its comment names.
package zoo

import (
	"fmt"
	"math"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"

	"github.com/lathe-ml/lathe/nn"
)

// ViTOptions describe a vision transformer over [batch, Size, Size, Channels].
type ViTOptions struct {
	Size     int     // side of the square input in pixels; 0: 28
	Channels int     // 0: 1
	Patch    int     // side of a patch, must divide Size; 0: 7
	Dim      int     // width of the residual stream; 0: 64
	Depth    int     // blocks; 0: 4
	Heads    int     // must divide Dim; 0: 4
	MLP      int     // hidden width of the feed-forward part; 0: twice Dim
	Classes  int     // 0: 10
	Norm     nn.Norm // at every norm slot; nil: nn.LayerNorm{}
	MeanPool bool    // average the tokens instead of reading a class token (there is none then)
	Dropout  float64 // after attention and feed-forward, in [0, 1)
	Seed     uint64
}

func (o ViTOptions) withDefaults() ViTOptions {
	def := func(v *int, d int) {
		if *v == 0 {
			*v = d
		}
	}
	def(&o.Size, 28)
	def(&o.Channels, 1)
	def(&o.Patch, 7)
	def(&o.Dim, 64)
	def(&o.Depth, 4)
	def(&o.Heads, 4)
	def(&o.MLP, 2*o.Dim)
	def(&o.Classes, 10)
	if o.Norm == nil {
		o.Norm = nn.LayerNorm{}
	}
	return o
}

// ViT builds a pre-norm vision transformer (arXiv:2010.11929): patches, class token, learned positions, Depth blocks of
// attention and a GELU feed-forward part, a final norm and a linear head. Input "image", output "head" (logits). The
// options' zero value is ViT-A, the reference that the quantisation experiments share: 17 tokens of width 64, 141,000
// parameters.
func ViT(o ViTOptions) (*nn.Network, error) {
	o = o.withDefaults()
	if o.Size%o.Patch != 0 || o.Dim%o.Heads != 0 {
		return nil, fmt.Errorf("zoo: vit: patch %d must divide size %d and %d heads must divide width %d", o.Patch, o.Size, o.Heads, o.Dim)
	}
	b := nn.NewBuilder(o.Seed)
	x := b.Image("image", o.Size, o.Size, o.Channels)
	x = b.Add("patch", nn.Conv{Out: o.Dim, Kernel: []int{o.Patch, o.Patch}, Stride: []int{o.Patch, o.Patch}}, x)
	n := (o.Size / o.Patch) * (o.Size / o.Patch)
	x = b.Add("patch.flat", nn.Reshape{Dims: []int{0, n, o.Dim}}, x)
	if !o.MeanPool {
		cls := b.Add("cls", nn.Value{Shape: f32(1, 1, o.Dim), Init: nn.Normal(.02), Batch: true}, x)
		x = b.Add("tokens", nn.Concat{Axis: 1}, cls, x)
		n++
	}
	x = b.Add("tokens.pos", nn.Add, x, b.Add("pos", nn.Value{Shape: f32(1, n, o.Dim), Init: nn.Normal(.02)}))
	for i := range o.Depth {
		b.In(fmt.Sprintf("blk.%d", i), func() {
			h := Attention(b, "attn", b.Add("norm1", o.Norm, x), o.Heads)
			if o.Dropout > 0 {
				h = b.Add("drop1", nn.Dropout{Rate: o.Dropout}, h)
			}
			x = b.Add("res1", nn.Add, x, h)
			h = b.Add("fc1", nn.Dense{Out: o.MLP}, b.Add("norm2", o.Norm, x))
			h = b.Add("fc2", nn.Dense{Out: o.Dim}, b.Add("act", nn.GELU{}, h))
			if o.Dropout > 0 {
				h = b.Add("drop2", nn.Dropout{Rate: o.Dropout}, h)
			}
			x = b.Add("res2", nn.Add, x, h)
		})
	}
	x = b.Add("norm", o.Norm, x)
	if o.MeanPool {
		x = b.Add("pool", nn.Reduce{Fn: "ReduceMean", Axes: []int{1}}, x)
	} else {
		x = b.Add("cls.out", nn.Slice{Axis: 1, From: 0, To: 1}, x)
		x = b.Add("cls.flat", nn.Reshape{Dims: []int{0, o.Dim}}, x)
	}
	return b.Finish(b.Add("head", nn.Dense{Out: o.Classes}, x))
}

// Attention adds multi-head self-attention over x [batch, tokens, dim] from primitive ops: name.q, name.k and name.v are
// sites, name.logits (scaled by 1/√(dim/heads)) and name.probs are values like any other, name.o is the output site.
func Attention(b *nn.Builder, name, x string, heads int) string {
	s := b.Shape(x).Dimensions
	if len(s) != 3 || heads < 1 || s[2]%heads != 0 {
		b.Fail(fmt.Errorf("zoo: attention %q: want [batch, tokens, dim] with dim divisible by %d heads, got %v", name, heads, s))
		return name
	}
	t, d := s[1], s[2]
	b.In(name, func() {
		split := func(p string) string {
			return b.Add(p+".split", nn.Reshape{Dims: []int{0, t, heads, d / heads}}, b.Add(p, nn.Dense{Out: d}, x))
		}
		q := b.Add("q.t", nn.Transpose{Perm: []int{0, 2, 1, 3}}, split("q"))
		k := b.Add("k.t", nn.Transpose{Perm: []int{0, 2, 3, 1}}, split("k"))
		v := b.Add("v.t", nn.Transpose{Perm: []int{0, 2, 1, 3}}, split("v"))
		p := b.Add("probs", nn.Softmax{}, b.Add("logits", nn.MatMul{Scale: 1 / math.Sqrt(float64(d/heads))}, q, k))
		o := b.Add("ctx.t", nn.Transpose{Perm: []int{0, 2, 1, 3}}, b.Add("ctx", nn.MatMul{}, p, v))
		x = b.Add("o", nn.Dense{Out: d}, b.Add("ctx.merge", nn.Reshape{Dims: []int{0, t, d}}, o))
	})
	return x
}

func f32(dims ...int) shapes.Shape { return shapes.Make(dtypes.Float32, dims...) }

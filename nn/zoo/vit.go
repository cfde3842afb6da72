// Package zoo holds the reference networks that experiments and examples share. Each is a plain function of its
// options; the zero value of an option is the default that its comment names.
package zoo

import (
	"fmt"

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
	Scheme   Scheme  `json:",omitempty"` // where the norm stands; nil: PreNorm{}
	Act      nn.Op   `json:",omitempty"` // of the feed-forward part; nil: nn.GELU{}
	MeanPool bool    // average the tokens instead of reading a class token (there is none then)
	Dropout  float64 // after attention and feed-forward, in [0, 1)
	// Mixer replaces attention: it adds nodes named name+".…" over x [batch, tokens, dim] and returns the new value. grid
	// is the number of patches along each side. nil: Attention.
	Mixer func(b *nn.Builder, name, x string, heads int, grid [2]int) string `json:"-"`
	Seed  uint64
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
	if o.Scheme == nil {
		o.Scheme = PreNorm{}
	}
	if o.Act == nil {
		o.Act = nn.GELU{}
	}
	if o.Mixer == nil {
		o.Mixer = func(b *nn.Builder, name, x string, heads int, _ [2]int) string {
			return Attention(b, name, x, AttentionOptions{Heads: heads})
		}
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
	side := o.Size / o.Patch
	drop := func(name, h string) string {
		if o.Dropout == 0 {
			return h
		}
		return b.Add(name, nn.Dropout{Rate: o.Dropout}, h)
	}
	for i := range o.Depth {
		plan := o.Scheme.Plan(i+1, o.Depth)
		b.In(fmt.Sprintf("blk.%d", i), func() {
			x = Residual(b, plan, o.Norm, 1, x, func(h string) string {
				return drop("drop1", o.Mixer(b, "attn", h, o.Heads, [2]int{side, side}))
			})
			x = Residual(b, plan, o.Norm, 2, x, func(h string) string {
				h = b.Add("fc2", nn.Dense{Out: o.Dim}, b.Add("act", o.Act, b.Add("fc1", nn.Dense{Out: o.MLP}, h)))
				return drop("drop2", h)
			})
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

func f32(dims ...int) shapes.Shape { return shapes.Make(dtypes.Float32, dims...) }

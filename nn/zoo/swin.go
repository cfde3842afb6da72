package zoo

import (
	"cmp"
	"fmt"

	"github.com/gomlx/compute/dtypes"

	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/nn"
)

// SwinOptions describe a Swin transformer over [batch, Size, Size, Channels], and SLAB-Swin.
type SwinOptions struct {
	Size     int   // side of the square input in pixels; 0: 224
	Channels int   // 0: 3
	Patch    int   // side of a patch; 0: 4
	Dim      int   // width of the first stage, doubled at each; 0: 96
	Depths   []int // blocks of each stage; nil: 2, 2, 6, 2 (Swin-T)
	Heads    []int // of each stage; nil: 3, 6, 12, 24
	Window   int   // side of the windows of softmax attention, in tokens; 0: 7
	// LinearStages have linear attention, from the first on, with LinearWindow as the side of its windows (0: 56, the whole
	// map at 224 pixels) and Linear's kernel. SLAB-Swin has 2.
	LinearStages int
	LinearWindow int
	Linear       LinearAttentionOptions
	MLP          int     // hidden width of the feed-forward part, in widths; 0: 4
	Classes      int     // 0: 1000
	Norm         nn.Norm // at every norm slot; nil: nn.LayerNorm{}
	DropPath     float64 // of the last block, growing linearly from 0, in [0, 1)
	Seed         uint64
}

// hiddenLogit is what Swin adds to the logits of tokens that are no neighbours.
const hiddenLogit = -100

// Swin builds the hierarchical transformer of Liu et al. (arXiv:2103.14030): patches, stages of pre-norm blocks whose
// attention stays inside windows, which every second block shifts by half a window, patch merging between the stages, mean
// pooling and a linear head. Softmax attention has a learned bias per relative position. Input "image", output "head"
// (logits). The options' zero value is Swin-T; with LinearStages: 2 and a norm that folds it is SLAB-Swin-T (Guo et al.,
// arXiv:2405.11582): blocks of linear attention are never shifted. Every map must divide into whole windows.
func Swin(o SwinOptions) (*nn.Network, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	b := nn.NewBuilder(o.Seed)
	x := b.Image("image", o.Size, o.Size, o.Channels)
	x = b.Add("patch", nn.Conv{Out: o.Dim, Kernel: []int{o.Patch, o.Patch}, Stride: []int{o.Patch, o.Patch}}, x)
	side, dim := o.Size/o.Patch, o.Dim
	x = b.Add("patch.norm", o.Norm, x) // in front of the flattening, so that it folds into the convolution
	x = b.Add("patch.flat", nn.Reshape{Dims: []int{0, side * side, dim}}, x)
	blocks, done := 0, 0
	for _, d := range o.Depths {
		blocks += d
	}
	for stage, depth := range o.Depths {
		b.In(fmt.Sprintf("stage.%d", stage), func() {
			if stage > 0 {
				x, side, dim = o.merge(b, x, side, dim)
			}
			for i := range depth {
				rate := o.DropPath * float64(done) / float64(max(blocks-1, 1))
				drop := func(name, h string) string {
					if rate == 0 {
						return h
					}
					return b.Add(name, nn.DropPath{Rate: rate}, h)
				}
				b.In(fmt.Sprint(i), func() {
					x = Residual(b, Plan{Pre: true}, o.Norm, 1, x, func(h string) string {
						return drop("drop1", o.attention(b, h, side, o.Heads[stage], stage < o.LinearStages, i%2 == 1))
					})
					x = Residual(b, Plan{Pre: true}, o.Norm, 2, x, func(h string) string {
						h = b.Add("act", nn.GELU{}, b.Add("fc1", nn.Dense{Out: o.MLP * dim}, h))
						return drop("drop2", b.Add("fc2", nn.Dense{Out: dim}, h))
					})
				})
				done++
			}
		})
	}
	x = b.Add("norm", o.Norm, x)
	x = b.Add("pool", nn.Reduce{Fn: "ReduceMean", Axes: []int{1}}, x)
	return b.Finish(b.Add("head", nn.Dense{Out: o.Classes}, x))
}

func (o SwinOptions) withDefaults() (SwinOptions, error) {
	for _, d := range []struct {
		v   *int
		def int
	}{{&o.Size, 224}, {&o.Channels, 3}, {&o.Patch, 4}, {&o.Dim, 96}, {&o.Window, 7}, {&o.LinearWindow, 56}, {&o.MLP, 4}, {&o.Classes, 1000}} {
		*d.v = cmp.Or(*d.v, d.def)
		if *d.v < 1 {
			return o, fmt.Errorf("zoo: swin: a size or width of %d; want at least 1", *d.v)
		}
	}
	if o.Depths == nil {
		o.Depths = []int{2, 2, 6, 2}
	}
	if o.Heads == nil {
		o.Heads = []int{3, 6, 12, 24}
	}
	if o.Norm == nil {
		o.Norm = nn.LayerNorm{}
	}
	switch {
	case len(o.Depths) == 0 || len(o.Depths) > 16 || len(o.Heads) != len(o.Depths):
		return o, fmt.Errorf("zoo: swin: %d stages with heads for %d; want 1 to 16, and as many", len(o.Depths), len(o.Heads))
	case o.Size%o.Patch != 0:
		return o, fmt.Errorf("zoo: swin: patch %d must divide size %d", o.Patch, o.Size)
	case o.LinearStages < 0 || o.LinearStages > len(o.Depths):
		return o, fmt.Errorf("zoo: swin: linear attention in %d of %d stages", o.LinearStages, len(o.Depths))
	case !(o.DropPath >= 0 && o.DropPath < 1):
		return o, fmt.Errorf("zoo: swin: drop path %g is not in [0, 1)", o.DropPath)
	}
	return o, nil
}

// merge puts every four neighbouring tokens side by side and halves what results: twice the width, a quarter of the tokens.
func (o SwinOptions) merge(b *nn.Builder, x string, side, dim int) (merged string, newSide, newDim int) {
	if side%2 != 0 {
		b.Fail(fmt.Errorf("zoo: swin: patches of a map of %d×%d cannot be merged; want an even side", side, side))
		return x, side, dim
	}
	half := side / 2
	x = b.Add("merge.map", nn.Reshape{Dims: []int{0, half, 2, half, 2, dim}}, x)
	x = b.Add("merge.t", nn.Transpose{Perm: []int{0, 1, 3, 4, 2, 5}}, x)
	x = b.Add("merge.flat", nn.Reshape{Dims: []int{0, half * half, 4 * dim}}, x)
	return b.Add("merge", nn.Dense{Out: 2 * dim, NoBias: true}, b.Add("merge.norm", o.Norm, x)), half, 2 * dim
}

// attention is that of one block: linear, or softmax in windows that may be shifted.
func (o SwinOptions) attention(b *nn.Builder, x string, side, heads int, linear, shifted bool) string {
	grid := [2]int{side, side}
	if linear {
		l := o.Linear
		l.Heads, l.Grid, l.Window = heads, grid, o.LinearWindow
		return LinearAttention(b, "attn", x, l)
	}
	window, shift := min(o.Window, side), 0
	if shifted && window < side {
		shift = window / 2
	}
	whole := x
	b.In("attn", func() {
		x = roll(b, "shift", x, side, shift)
		x = Windows(b, "win", x, grid, window, func(x string, _ [2]int) string {
			bias := positionBias(b, window, heads)
			if shift > 0 {
				bias = b.Add("bias.masked", nn.Add, bias, shiftMask(b, whole, side, window, shift))
			}
			return Attention(b, "softmax", x, AttentionOptions{Heads: heads, Mask: bias})
		})
		x = roll(b, "unshift", x, side, (side-shift)%side)
	})
	return x
}

// roll moves a map of tokens up and to the left by so many, cyclically.
func roll(b *nn.Builder, name, x string, side, by int) string {
	s := b.Shape(x).Dimensions
	if by == 0 || len(s) != 3 {
		return x
	}
	x = b.Add(name+".map", nn.Reshape{Dims: []int{0, side, side, s[2]}}, x)
	for i, axis := range []string{"rows", "cols"} {
		from := b.Add(name+"."+axis+".from", nn.Slice{Axis: i + 1, From: by, To: nn.Open}, x)
		x = b.Add(name+"."+axis, nn.Concat{Axis: i + 1}, from, b.Add(name+"."+axis+".to", nn.Slice{Axis: i + 1, From: 0, To: by}, x))
	}
	return b.Add(name, nn.Reshape{Dims: []int{0, side * side, s[2]}}, x)
}

// positionBias is a learned number for each head and each distance of two tokens of a window: [1, heads, n, n].
func positionBias(b *nn.Builder, window, heads int) string {
	n, span := window*window, 2*window-1
	table := b.Add("bias.table", nn.Value{Shape: f32(span*span, heads), Init: nn.Normal(.02)})
	at := b.Add("bias.index", nn.Value{Shape: f32(n * n), Role: nn.Constant, Init: func(_ *rng.Rand, v []float32) {
		for i := range v {
			q, k := i/n, i%n
			v[i] = float32((q/window-k/window+window-1)*span + q%window - k%window + window - 1)
		}
	}})
	x := b.Add("bias.all", nn.Gather{}, table, b.Add("bias.at", nn.Cast{To: dtypes.Int32}, at))
	x = b.Add("bias.t", nn.Transpose{Perm: []int{1, 0}}, x)
	return b.Add("bias", nn.Reshape{Dims: []int{1, heads, n, n}}, x)
}

// shiftMask hides from each other the tokens of a shifted window that are no neighbours on the map: [batch·windows, 1, n, n].
func shiftMask(b *nn.Builder, x string, side, window, shift int) string {
	n, rows := window*window, side/window
	part := func(at int) int { // of the three that a side falls into
		switch {
		case at < side-window:
			return 0
		case at < side-shift:
			return 1
		}
		return 2
	}
	mask := b.Add("mask.all", nn.Value{Shape: f32(1, rows*rows*n*n), Role: nn.Constant, Batch: true, Init: func(_ *rng.Rand, v []float32) {
		for i := range v {
			w, q, k := i/(n*n), i/n%n, i%n
			region := func(token int) int {
				return 3*part(w/rows*window+token/window) + part(w%rows*window+token%window)
			}
			if region(q) != region(k) {
				v[i] = hiddenLogit
			}
		}
	}}, x)
	return b.Add("mask", nn.Reshape{Dims: []int{-1, 1, n, n}}, mask)
}

package zoo

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/safetensors"
)

// EfficientNetLite0Options describe the network over [batch, Size, Size, 3].
type EfficientNetLite0Options struct {
	Size     int     // side of the square input in pixels; 0: 224
	Classes  int     // 0: 1000
	Dropout  float64 // in front of the head's linear layer, in [0, 1); the original trained with 0.2
	DropPath float64 // of the last block, growing linearly with the block, in [0, 1); the original trained with 0.2
	Seed     uint64
}

// bottlenecks are the seven stages: repeats, kernel, stride of the first, channels; all but the first expand six times.
var bottlenecks = []struct{ repeats, kernel, stride, out int }{
	{1, 3, 1, 16}, {2, 3, 2, 24}, {2, 5, 2, 40}, {3, 3, 2, 80}, {3, 5, 1, 112}, {4, 5, 2, 192}, {1, 3, 1, 320},
}

// EfficientNetLite0 builds the smallest EfficientNet-Lite (Tan, Le, arXiv:1905.11946, without squeeze-and-excitation and
// with ReLU6, as TensorFlow's authors published it for integer arithmetic): a 3×3 stem of 32 channels and stride 2, 16
// inverted bottlenecks
//
//	h = relu6(norm(depthwise k×k(relu6(norm(conv 1×1(x))))));  x = x + norm(conv 1×1(h))
//
// (the sum where the shape stays, no first convolution in block 0), a 1×1 convolution to 1280 channels, global average
// pooling and a linear head; 4.65 million parameters, 385 million multiply-adds at 224×224. Padding is TensorFlow's
// "same": where it is odd, the far side has one more. Batch norms have eps 1e-3 and decay 0.99. Input "image", values
// (x − 127)/128 for x of 0 to 255 in the published weights; output "fc" (logits).
func EfficientNetLite0(o EfficientNetLite0Options) (*nn.Network, error) {
	o.Size, o.Classes = cmp.Or(o.Size, 224), cmp.Or(o.Classes, 1000)
	if o.Size < 1 || o.Classes < 1 || !(o.Dropout >= 0 && o.Dropout < 1) || !(o.DropPath >= 0 && o.DropPath < 1) {
		return nil, fmt.Errorf("zoo: efficientnet-lite0 of %d pixels and %d classes, dropout %g, drop path %g: want at least 1, and rates in [0, 1)", o.Size, o.Classes, o.Dropout, o.DropPath)
	}
	b := nn.NewBuilder(o.Seed)
	slot := NormAct{Norm: nn.BatchNorm{Eps: 1e-3, Decay: .99}, Act: nn.Clip{Lo: 0, Hi: 6}}
	conv := func(name, x string, out, k, stride, groups int, act bool) string {
		s := b.Shape(x).Dimensions
		if b.Err() != nil {
			return x
		}
		// Drawn as by the original: by the kernel's fan out, which is k² of a depthwise one.
		c := nn.Conv{
			Out: out, Kernel: []int{k, k}, Stride: []int{stride, stride}, Groups: groups, NoBias: true,
			Pad: [][2]int{samePad(s[1], k, stride), samePad(s[2], k, stride)},
			W:   nn.Plain{Init: nn.Normal(math.Sqrt(2 / float64(k*k*out/groups)))},
		}
		return slot.Add(b, name, b.Add(name, c, x), act)
	}
	in := 32
	x := conv("stem", b.Image("image", o.Size, o.Size, 3), in, 3, 2, 1, true)
	block, blocks := 0, 0
	for _, s := range bottlenecks {
		blocks += s.repeats
	}
	for _, s := range bottlenecks {
		for i := range s.repeats {
			stride := s.stride
			if i > 0 {
				stride = 1
			}
			b.In(fmt.Sprintf("blk.%d", block), func() {
				h, mid := x, in
				if block > 0 {
					mid = 6 * in
					h = conv("expand", h, mid, 1, 1, 1, true)
				}
				h = conv("depthwise", h, mid, s.kernel, stride, mid, true)
				h = conv("project", h, s.out, 1, 1, 1, false)
				if stride == 1 && in == s.out {
					if rate := o.DropPath * float64(block) / float64(blocks); rate > 0 {
						h = b.Add("drop", nn.DropPath{Rate: rate}, h)
					}
					h = b.Add("res", nn.Add, x, h)
				}
				x = h
			})
			in = s.out
			block++
		}
	}
	x = b.Add("pool", nn.GlobalAveragePool, conv("head", x, 1280, 1, 1, 1, true))
	if o.Dropout > 0 {
		x = b.Add("drop", nn.Dropout{Rate: o.Dropout}, x)
	}
	return b.Finish(b.Add("fc", nn.Dense{Out: o.Classes, W: nn.Plain{Init: nn.Uniform(1 / math.Sqrt(1280))}}, x))
}

// samePad is TensorFlow's "same": as many outputs as strides fit into n inputs, the far side padded more.
func samePad(n, k, stride int) [2]int {
	out := (n + stride - 1) / stride
	p := max((out-1)*stride+k-n, 0)
	return [2]int{p / 2, p - p/2}
}

// ReadEfficientNetLite0 builds the network and fills it with published weights: a safetensors file with the names of
// EfficientNet-PyTorch ("_blocks.3._depthwise_conv.weight", kernels OIHW), from which the number of classes is taken. It
// refuses a file that lacks a tensor or has one of another shape, by its name.
func ReadEfficientNetLite0(path string, o EfficientNetLite0Options) (*nn.Network, error) {
	f, err := safetensors.ReadFile(path)
	if err != nil {
		return nil, err
	}
	net, err := efficientNetLite0From(f, o)
	if err != nil {
		return nil, fmt.Errorf("zoo: efficientnet-lite0: %s: %w", path, err)
	}
	return net, nil
}

func efficientNetLite0From(f *safetensors.File, o EfficientNetLite0Options) (*nn.Network, error) {
	head := f.Tensor("_fc.weight")
	if head == nil || len(head.Shape) != 2 || head.Shape[0] < 1 || head.Shape[0] > 1<<20 {
		return nil, fmt.Errorf("there is no tensor \"_fc.weight\" of [classes, 1280]")
	}
	if o.Classes != 0 && o.Classes != head.Shape[0] {
		return nil, fmt.Errorf("it has %d classes, %d are asked for; leave Classes at 0 to take the file's", head.Shape[0], o.Classes)
	}
	o.Classes = head.Shape[0]
	net, err := EfficientNetLite0(o)
	if err != nil {
		return nil, err
	}
	for p := range net.Params.All() {
		name := efficientNetName(p.Name)
		t := f.Tensor(name)
		if t == nil {
			return nil, fmt.Errorf("tensor %q is missing", name)
		}
		d := p.Value.Shape().Dimensions
		want := d
		if len(d) == 4 { // OHWI here
			want = []int{d[0], d[3], d[1], d[2]}
		}
		if !slices.Equal(t.Shape, want) {
			return nil, fmt.Errorf("tensor %q is %v, want %v", name, t.Shape, want)
		}
		v, err := t.Floats()
		if err != nil {
			return nil, err
		}
		if i := slices.IndexFunc(v, func(x float32) bool { return math.IsNaN(float64(x)) || math.IsInf(float64(x), 0) }); i >= 0 {
			return nil, fmt.Errorf("tensor %q: element %d is %v", name, i, v[i])
		}
		if len(d) == 4 {
			v = toOHWI(v, d)
		}
		p.Value = tensors.FromFlatDataAndDimensions(v, d...)
	}
	return net, nil
}

// efficientNetName is what EfficientNet-PyTorch calls a parameter: "blk.3.depthwise.norm.w" is
// "_blocks.3._bn1.weight".
func efficientNetName(param string) string {
	prefix, rest := "", param
	if r, ok := strings.CutPrefix(param, "blk."); ok {
		block, site, _ := strings.Cut(r, ".")
		prefix, rest = "_blocks."+block+".", site
	}
	site, rest, _ := strings.Cut(rest, ".")
	norm, isNorm := strings.CutPrefix(rest, "norm.")
	if isNorm {
		bn := map[string]string{"stem": "_bn0", "head": "_bn1", "expand": "_bn0", "depthwise": "_bn1", "project": "_bn2"}[site]
		return prefix + bn + "." + map[string]string{"w": "weight", "b": "bias", "mean": "running_mean", "var": "running_var"}[norm]
	}
	module := map[string]string{
		"stem": "_conv_stem", "head": "_conv_head", "fc": "_fc",
		"expand": "_expand_conv", "depthwise": "_depthwise_conv", "project": "_project_conv",
	}[site]
	return prefix + module + "." + map[string]string{"w": "weight", "b": "bias"}[rest]
}

// toOHWI reorders a kernel from OIHW to the dims [out, height, width, in].
func toOHWI(v []float32, dims []int) []float32 {
	out := make([]float32, len(v))
	o, spots, in := dims[0], dims[1]*dims[2], dims[3]
	for i := range o {
		for c := range in {
			for s := range spots {
				out[(i*spots+s)*in+c] = v[(i*in+c)*spots+s]
			}
		}
	}
	return out
}

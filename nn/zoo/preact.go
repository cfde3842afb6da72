package zoo

import (
	"fmt"
	"math"

	"github.com/lathe-ml/lathe/nn"
)

// NormAct is what a convolutional network puts at its norm-activation slots: a norm and an activation behind it, or one
// layer that is both.
type NormAct struct {
	Norm nn.Norm // nil: none
	Act  nn.Op   // behind the norm; nil: nn.ReLU. A norm that is its own activation (AsLinear) takes none
}

// SelfActivated norms contain their activation. Where a network wants none - in front of a residual sum, behind a linear
// bottleneck - it takes what AsLinear gives.
type SelfActivated interface {
	nn.Norm
	AsLinear() nn.Norm
}

// Add puts the slot behind value x: nodes name+".norm" and name+".act". Without nonlinearity there is no activation.
func (n NormAct) Add(b *nn.Builder, name, x string, nonlinearity bool) string {
	norm, act := n.Norm, n.Act
	if act == nil {
		act = nn.ReLU
	}
	if self, ok := norm.(SelfActivated); ok {
		act = nil
		if !nonlinearity {
			norm = self.AsLinear()
		}
	}
	if norm != nil {
		x = b.Add(name+".norm", norm, x)
	}
	if nonlinearity && act != nil {
		x = b.Add(name+".act", act, x)
	}
	return x
}

// PreActResNetOptions describe a pre-activation residual network over [batch, Size, Size, Channels].
type PreActResNetOptions struct {
	Size     int // side of the square input in pixels; 0: 28
	Channels int // 0: 1
	Blocks   int // basic blocks per stage; 0: 1
	Stages   int // 0: 3
	Width    int // channels of the first stage, doubled at each; 0: 16
	Classes  int // 0: 10
	NormAct  NormAct
	Seed     uint64
}

// PreActResNet builds the network of He et al. (arXiv:1603.05027, fig. 4e): a 3×3 stem of stride 1, stages of blocks
//
//	h = normact(x);  x = shortcut + conv3×3(normact(conv3×3(h)))
//
// whose first block has stride 2 from the second stage on, a last norm-activation, global average pooling and a linear
// head. The shortcut is x, or a 1×1 convolution of h where the shape changes. Input "image", output "head" (logits).
func PreActResNet(o PreActResNetOptions) (*nn.Network, error) {
	for _, d := range []struct {
		v   *int
		def int
	}{{&o.Size, 28}, {&o.Channels, 1}, {&o.Blocks, 1}, {&o.Stages, 3}, {&o.Width, 16}, {&o.Classes, 10}} {
		if *d.v == 0 {
			*d.v = d.def
		}
	}
	if o.Stages < 1 || o.Stages > 8 || o.Blocks < 1 || o.Width < 1 {
		return nil, fmt.Errorf("zoo: %d stages of %d blocks of width %d: want 1 to 8 stages, at least one block and channel", o.Stages, o.Blocks, o.Width)
	}
	b := nn.NewBuilder(o.Seed)
	x := b.Add("stem", kernel(o.Width, 3, 1, o.Channels), b.Image("image", o.Size, o.Size, o.Channels))
	for stage := range o.Stages {
		out := o.Width << stage
		for block := range o.Blocks {
			b.In(fmt.Sprintf("stage.%d.%d", stage, block), func() {
				in, stride := b.Shape(x).Dimensions, 1
				if b.Err() != nil {
					return
				}
				if stage > 0 && block == 0 {
					stride = 2
				}
				h, short := o.NormAct.Add(b, "slot1", x, true), x
				if stride > 1 || in[3] != out {
					short = b.Add("short", kernel(out, 1, stride, in[3]), h)
				}
				h = b.Add("conv1", kernel(out, 3, stride, in[3]), h)
				h = b.Add("conv2", kernel(out, 3, 1, out), o.NormAct.Add(b, "slot2", h, true))
				x = b.Add("res", nn.Add, short, h)
			})
		}
	}
	x = b.Add("pool", nn.GlobalAveragePool, o.NormAct.Add(b, "last", x, true))
	return b.Finish(b.Add("head", nn.Dense{Out: o.Classes}, x))
}

// MobileNetOptions describe a network of inverted bottlenecks over [batch, Size, Size, Channels].
type MobileNetOptions struct {
	Size          int  // side of the square input in pixels; 0: 28
	Channels      int  // 0: 1
	Blocks        int  // bottlenecks per stage; 0: 1
	Stages        int  // 0: 3
	Width         int  // channels of the first stage, doubled at each; 0: 16
	Expansion     int  // of a bottleneck's hidden channels; 0: 6
	SqueezeExcite bool // re-weights the hidden channels by their means, as EfficientNet does
	Classes       int  // 0: 10
	NormAct       NormAct
	Seed          uint64
}

// MobileNet builds a network like MobileNetV2 (arXiv:1801.04381): a 3×3 stem, stages of inverted bottlenecks
//
//	h = normact(depthwise3×3(normact(conv1×1(x))));  x = x + norm(conv1×1(h))
//
// (the sum where the shape stays) whose first one has stride 2 from the second stage on, a 1×1 convolution to twice the
// last stage's channels, global average pooling and a linear head. The projection's norm has no activation. With
// SqueezeExcite, h is multiplied by σ(W₂·relu(W₁·mean(h))) with a quarter of the hidden channels between the two
// (arXiv:1709.01507). Input "image", output "head" (logits).
func MobileNet(o MobileNetOptions) (*nn.Network, error) {
	for _, d := range []struct {
		v   *int
		def int
	}{{&o.Size, 28}, {&o.Channels, 1}, {&o.Blocks, 1}, {&o.Stages, 3}, {&o.Width, 16}, {&o.Expansion, 6}, {&o.Classes, 10}} {
		if *d.v == 0 {
			*d.v = d.def
		}
	}
	if o.Stages < 1 || o.Stages > 8 || o.Blocks < 1 || o.Width < 1 || o.Expansion < 1 {
		return nil, fmt.Errorf("zoo: %d stages of %d bottlenecks of width %d, expanded %d times: want 1 to 8 stages, the others at least 1", o.Stages, o.Blocks, o.Width, o.Expansion)
	}
	b := nn.NewBuilder(o.Seed)
	x := b.Add("stem", kernel(o.Width, 3, 1, o.Channels), b.Image("image", o.Size, o.Size, o.Channels))
	x = o.NormAct.Add(b, "first", x, true)
	for stage := range o.Stages {
		out := o.Width << stage
		for block := range o.Blocks {
			b.In(fmt.Sprintf("stage.%d.%d", stage, block), func() {
				if b.Err() != nil {
					return
				}
				in, stride := b.Shape(x).Dimensions[3], 1
				if stage > 0 && block == 0 {
					stride = 2
				}
				mid := in * o.Expansion
				h := o.NormAct.Add(b, "slot1", b.Add("expand", kernel(mid, 1, 1, in), x), true)
				depthwise := kernel(mid, 3, stride, 1)
				depthwise.Groups = mid
				h = o.NormAct.Add(b, "slot2", b.Add("depthwise", depthwise, h), true)
				if o.SqueezeExcite {
					h = SqueezeExcite(b, "se", h, max(1, mid/4))
				}
				h = o.NormAct.Add(b, "slot3", b.Add("project", kernel(out, 1, 1, mid), h), false)
				if stride == 1 && in == out {
					h = b.Add("res", nn.Add, x, h)
				}
				x = h
			})
		}
	}
	last := o.Width << (o.Stages - 1)
	x = o.NormAct.Add(b, "last", b.Add("widen", kernel(2*last, 1, 1, last), x), true)
	x = b.Add("pool", nn.GlobalAveragePool, x)
	return b.Finish(b.Add("head", nn.Dense{Out: o.Classes}, x))
}

// SqueezeExcite multiplies the channels of x [batch, height, width, C] by σ(W₂·relu(W₁·mean(x))), with so many hidden
// units (arXiv:1709.01507, eqs. 2-4): nodes name+".…".
func SqueezeExcite(b *nn.Builder, name, x string, hidden int) string {
	if b.Err() != nil {
		return x
	}
	c := b.Shape(x).Dimensions[3]
	s := b.Add(name+".mean", nn.GlobalAveragePool, x)
	s = b.Add(name+".relu", nn.ReLU, b.Add(name+".squeeze", nn.Dense{Out: hidden}, s))
	s = b.Add(name+".gate", nn.Sigmoid, b.Add(name+".excite", nn.Dense{Out: c}, s))
	return b.Add(name+".scale", nn.Mul, x, b.Add(name+".wide", nn.Reshape{Dims: []int{0, 1, 1, c}}, s))
}

// kernel is a convolution in front of a norm: without bias, drawn for rectified inputs from in channels (of a group).
func kernel(out, k, stride, in int) nn.Conv {
	c := nn.Conv2D(out, k, stride)
	c.NoBias = true
	c.W = nn.Plain{Init: nn.FanIn(k*k*in, math.Sqrt2)}
	return c
}

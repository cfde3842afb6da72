package zoo

import (
	"fmt"
	"math"

	"github.com/lathe-ml/lathe/nn"
)

// ResNetOptions describe a CIFAR-style residual network over [batch, Size, Size, Channels].
type ResNetOptions struct {
	Size       int // side of the square input in pixels; 0: 28
	Channels   int // 0: 1
	Blocks     int // basic blocks per stage: 1, 2, 3 give ResNet-8, -14, -20; 0: 1
	Width      int // channels of the first of three stages, doubled at each; 0: 16
	StemStride int // 0: 2
	Classes    int // 0: 10
	// Norm stands after every convolution; nil: nn.BatchNorm{}. One that is SelfActivated takes no ReLU behind it, is
	// linear in front of the sum, and leaves the plain ReLU after the sum.
	Norm nn.Norm
	Seed uint64
}

// ResNet builds the network of He et al. (arXiv:1512.03385, section 4.2): a 3×3 stem, three stages of basic blocks with
// projection shortcuts, global average pooling and a linear head. Input "image", output "head" (logits). The options'
// zero value is ResNet-8 with 78,000 parameters.
func ResNet(o ResNetOptions) (*nn.Network, error) {
	for _, d := range []struct {
		v   *int
		def int
	}{{&o.Size, 28}, {&o.Channels, 1}, {&o.Blocks, 1}, {&o.Width, 16}, {&o.StemStride, 2}, {&o.Classes, 10}} {
		if *d.v == 0 {
			*d.v = d.def
		}
	}
	if o.Norm == nil {
		o.Norm = nn.BatchNorm{}
	}
	b := nn.NewBuilder(o.Seed)
	self, activated := o.Norm.(SelfActivated)
	conv := func(name, x string, out, k, stride int, linear bool) string {
		if b.Err() != nil {
			return x
		}
		norm := o.Norm
		if activated && linear {
			norm = self.AsLinear()
		}
		return b.Add(name+".norm", norm, b.Add(name, kernel(out, k, stride, b.Shape(x).Dimensions[3]), x))
	}
	relu := func(name, x string) string {
		if activated {
			return x
		}
		return b.Add(name, nn.ReLU, x)
	}
	x := b.Image("image", o.Size, o.Size, o.Channels)
	x = relu("stem.act", conv("stem", x, o.Width, 3, o.StemStride, false))
	for stage := range 3 {
		out := o.Width << stage
		for block := range o.Blocks {
			b.In(fmt.Sprintf("stage.%d.%d", stage, block), func() {
				stride := 1
				if stage > 0 && block == 0 {
					stride = 2
				}
				h := conv("conv2", relu("act1", conv("conv1", x, out, 3, stride, false)), out, 3, 1, true)
				if b.Err() == nil && (stride > 1 || b.Shape(x).Dimensions[3] != out) {
					x = conv("short", x, out, 1, stride, true)
				}
				x = b.Add("act2", nn.ReLU, b.Add("res", nn.Add, x, h))
			})
		}
	}
	x = b.Add("pool", nn.GlobalAveragePool, x)
	return b.Finish(b.Add("head", nn.Dense{Out: o.Classes}, x))
}

// MLPOptions describe a multi-layer perceptron over flattened [batch, Inputs].
type MLPOptions struct {
	Inputs  int     // 0: 784
	Hidden  []int   // nil: 256, 256
	Classes int     // 0: 10
	Norm    nn.Norm // in front of every hidden activation; nil: none
	Act     nn.Op   // nil: nn.ReLU
	Seed    uint64
}

// MLP builds h = act(norm(W h)) layers and a linear head that is not normalised. Input "x", output "head" (logits). A
// layer in front of a norm has no bias of its own.
func MLP(o MLPOptions) (*nn.Network, error) {
	if o.Inputs == 0 {
		o.Inputs = 784
	}
	if o.Hidden == nil {
		o.Hidden = []int{256, 256}
	}
	if o.Classes == 0 {
		o.Classes = 10
	}
	if o.Act == nil {
		o.Act = nn.ReLU
	}
	b := nn.NewBuilder(o.Seed)
	x := b.Input("x", f32(1, o.Inputs))
	in := o.Inputs
	for i, h := range o.Hidden {
		x = b.Add(fmt.Sprintf("fc%d", i), nn.Dense{Out: h, NoBias: o.Norm != nil, W: nn.Plain{Init: nn.FanIn(in, math.Sqrt2)}}, x)
		if o.Norm != nil {
			x = b.Add(fmt.Sprintf("norm%d", i), o.Norm, x)
		}
		x = b.Add(fmt.Sprintf("act%d", i), o.Act, x)
		in = h
	}
	return b.Finish(b.Add("head", nn.Dense{Out: o.Classes}, x))
}

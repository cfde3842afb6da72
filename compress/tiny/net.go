package tiny

import (
	"fmt"
	"math"
	"slices"
)

// Tensor is an activation of an integer network: [H, W, C] codes of −128 to 127 that stand for (code − Zero)·Scale.
type Tensor struct {
	H, W, C int
	Scale   float64
	Zero    int
}

// Size is the number of its elements.
func (t Tensor) Size() int { return t.H * t.W * t.C }

// Kind is what a layer computes.
type Kind int

// The kinds of layers.
const (
	Conv Kind = iota // a convolution, depthwise or over all channels; a dense layer is one of 1×1
	Add              // of two activations
	Pool             // the global average
)

// String returns conv, add or pool.
func (k Kind) String() string { return [...]string{"conv", "add", "pool"}[k] }

// Layer is an operation on activations, which are numbered as in Net.Tensors; activation 0 is the network's input.
type Layer struct {
	Name string
	Kind Kind
	In   []int
	Out  int
	// What a ReLU or ReLU6 leaves of real values; ±Inf: all. The range of the codes nearly always does it by itself.
	Lo, Hi float64

	// of convolutions
	Kernel, Stride [2]int
	Pad            [2][2]int // zeros before and after each axis
	Depthwise      bool
	Scale          []float64 // of each output channel's weights
	// Weight and Bias are the codes as real numbers, w/s_w and b/(s_w·s_x), of shapes [out, kh, kw, in] ([out, kh, kw, 1] when
	// depthwise) and [out]. What a device stores is these rounded to int8 and int32; the rest is kept so that small steps
	// add up, and so that the float reference is the float network.
	Weight, Bias []float32
}

// clamp is the range of the codes that the layer gives.
func (l *Layer) clamp(out Tensor, float bool) (lo, hi float64) {
	z := float64(out.Zero)
	if float {
		return z + l.Lo/out.Scale, z + l.Hi/out.Scale
	}
	return max(-128, z+math.RoundToEven(l.Lo/out.Scale)), min(127, z+math.RoundToEven(l.Hi/out.Scale))
}

func (l *Layer) taps() int { return l.Kernel[0] * l.Kernel[1] }

// Head is the classifier: float logits of the last activation's real values.
type Head struct {
	Classes int
	W       []float32 // [classes, channels]
	B       []float32
}

// Net is an int8 network: layers in execution order, then the classifier on what the last one gives, which has one
// pixel. Layers that compute the trained part are counted from 0 among the convolutions (Convs).
type Net struct {
	Tensors []Tensor
	Layers  []*Layer
	Head    Head
	// NCHW says that inputs come with their channels first and are turned before the first layer.
	NCHW bool
	// Float leaves out all rounding: the network of real numbers in the same parametrisation, as the reference.
	Float bool

	From Origin
}

// Origin is what a network keeps of the nn.Network that it was made of: names of its input and output, its metadata.
type Origin struct {
	Input, Output string
	Meta          map[string]string
}

// Convs are the layers with weights, in execution order.
func (n *Net) Convs() (convs []*Layer) {
	for _, l := range n.Layers {
		if l.Kind == Conv {
			convs = append(convs, l)
		}
	}
	return convs
}

// Features is the activation that the classifier reads.
func (n *Net) Features() Tensor { return n.Tensors[n.Layers[len(n.Layers)-1].Out] }

// Clone copies the weights too.
func (n *Net) Clone() *Net {
	c := *n
	c.Tensors, c.Layers = slices.Clone(n.Tensors), nil
	for _, l := range n.Layers {
		d := *l
		d.In, d.Scale, d.Weight, d.Bias = slices.Clone(l.In), slices.Clone(l.Scale), slices.Clone(l.Weight), slices.Clone(l.Bias)
		c.Layers = append(c.Layers, &d)
	}
	c.Head.W, c.Head.B = slices.Clone(n.Head.W), slices.Clone(n.Head.B)
	return &c
}

// WithClasses returns a copy whose classifier is new: zero weights and biases for other classes.
func (n *Net) WithClasses(classes int) (*Net, error) {
	if classes < 2 {
		return nil, fmt.Errorf("tiny: %d classes; want at least 2", classes)
	}
	c := n.Clone()
	c.Head = Head{classes, make([]float32, classes*n.Features().C), make([]float32, classes)}
	return c, nil
}

// Check reports what is wrong with the structure.
func (n *Net) Check() error {
	if len(n.Layers) == 0 || len(n.Tensors) == 0 {
		return fmt.Errorf("tiny: a network without layers")
	}
	for i, t := range n.Tensors {
		if t.H < 1 || t.W < 1 || t.C < 1 || !(t.Scale > 0) || math.IsInf(t.Scale, 0) || t.Zero < -128 || t.Zero > 127 {
			return fmt.Errorf("tiny: activation %d is %d×%d×%d with scale %g and zero point %d", i, t.H, t.W, t.C, t.Scale, t.Zero)
		}
	}
	known := map[int]bool{0: true}
	for _, l := range n.Layers {
		for _, i := range l.In {
			if !known[i] {
				return fmt.Errorf("tiny: layer %q reads activation %d before it is there", l.Name, i)
			}
		}
		if l.Out < 1 || l.Out >= len(n.Tensors) || known[l.Out] {
			return fmt.Errorf("tiny: layer %q writes activation %d of %d", l.Name, l.Out, len(n.Tensors))
		}
		known[l.Out] = true
		in, out := n.Tensors[l.In[0]], n.Tensors[l.Out]
		switch l.Kind {
		case Conv:
			ci := in.C
			if l.Depthwise {
				if ci = 1; in.C != out.C {
					return fmt.Errorf("tiny: depthwise layer %q takes %d channels to %d", l.Name, in.C, out.C)
				}
			}
			if len(l.Weight) != out.C*l.taps()*ci || len(l.Bias) != out.C || len(l.Scale) != out.C || l.Stride[0] < 1 || l.Stride[1] < 1 ||
				outSize(in.H, l.Kernel[0], l.Stride[0], l.Pad[0]) != out.H || outSize(in.W, l.Kernel[1], l.Stride[1], l.Pad[1]) != out.W {
				return fmt.Errorf("tiny: layer %q: %d weights, %d biases and %d scales do not take %d×%d×%d to %d×%d×%d", l.Name, len(l.Weight), len(l.Bias), len(l.Scale), in.H, in.W, in.C, out.H, out.W, out.C)
			}
			if err := finite("weights of "+l.Name, l.Weight); err != nil {
				return err
			}
		case Add:
			if len(l.In) != 2 || n.Tensors[l.In[1]].Size() != in.Size() || in.Size() != out.Size() {
				return fmt.Errorf("tiny: layer %q adds activations of different sizes", l.Name)
			}
		case Pool:
			if in.C != out.Size() || in.Scale != out.Scale || in.Zero != out.Zero {
				return fmt.Errorf("tiny: layer %q: a global average has one pixel on the grid of its input", l.Name)
			}
		}
	}
	f := n.Features()
	if f.H != 1 || f.W != 1 || n.Head.Classes < 2 || len(n.Head.W) != n.Head.Classes*f.C || len(n.Head.B) != n.Head.Classes {
		return fmt.Errorf("tiny: a classifier of %d classes with %d weights on %d×%d×%d", n.Head.Classes, len(n.Head.W), f.H, f.W, f.C)
	}
	return nil
}

// WeightBytes is what a device stores of the layers: int8 weights, int32 biases, a float32 scale per channel; the
// classifier in float32.
func (n *Net) WeightBytes() (b int64) {
	for _, l := range n.Convs() {
		b += int64(len(l.Weight)) + 8*int64(len(l.Bias))
	}
	return b + 4*int64(len(n.Head.W)+len(n.Head.B))
}

// quantizeInput writes an input's codes (or, in float, its real numbers in the same unit).
func (n *Net) quantizeInput(dst, x []float32) error {
	t := n.Tensors[0]
	if len(x) != t.Size() {
		return fmt.Errorf("tiny: an input of %d values for %d×%d×%d", len(x), t.H, t.W, t.C)
	}
	if err := finite("input", x); err != nil {
		return err
	}
	pixels := t.H * t.W
	for i := range dst {
		v := x[i]
		if n.NCHW {
			v = x[i%t.C*pixels+i/t.C]
		}
		c := float64(v)/t.Scale + float64(t.Zero)
		if !n.Float {
			c = min(max(math.RoundToEven(c), -128), 127)
		}
		dst[i] = float32(c)
	}
	return nil
}

package norm

import (
	"cmp"
	"fmt"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"

	"github.com/lathe-ml/lathe/nn"
)

// EvoLayer names one of the six layers of the paper.
type EvoLayer string

// The layers. The B layers use the variance of the batch while training and its running average afterwards; the S layers
// use statistics of each case only, in both modes.
const (
	B0 EvoLayer = "b0" // x / max(√(s²_bwh+ε), v·x + √(s²_wh+ε)); the one to take in place of batch norm and ReLU
	B1 EvoLayer = "b1" // x / max(√(s²_bwh+ε), (x+1)·√(m_wh(x²)+ε))
	B2 EvoLayer = "b2" // x / max(√(s²_bwh+ε), √(m_wh(x²)+ε) − x)
	S0 EvoLayer = "s0" // x·σ(v·x) / √(s²_whc/g+ε); the one to take for small batches
	S1 EvoLayer = "s1" // x·σ(x) / √(s²_whc/g+ε)
	S2 EvoLayer = "s2" // x·σ(x) / √(m_whc/g(x²)+ε)
)

// EvoLayers lists the six layers.
func EvoLayers() []EvoLayer { return []EvoLayer{B0, B1, B2, S0, S1, S2} }

// EvoNorm is a normalisation and an activation in one layer, found by evolution (Liu, Brock, Simonyan, Le,
// arXiv:2004.02967, table 3), over maps x [batch, height, width, channels]:
//
//	y = gain·(layer(x)) + bias
//
// with the layers of EvoLayer. s²_bwh is the variance of a channel over the batch and space, s²_wh over the space of one
// case, s²_whc/g over the space and the channels of a group; m is the mean of squares. All are biased, and ε stands inside
// every root. Nothing is centred, and no activation may follow. Parameters: "w" (1), "b" (0); v as "v" (1) in B0 and S0,
// which is not decayed; the running variance "var" (1) of the B layers: var = Decay·var + (1−Decay)·batch. At inference it
// stands for s²_bwh only; the statistics of the case are computed as ever. Gradients flow through all statistics.
//
// The zero value is B0. timm's B0 differs: ε 1e-3 and an unbiased running variance.
type EvoNorm struct {
	Layer  EvoLayer // "": B0
	Groups int      // g of the S layers, lowered by 1 until it divides the channels; 0: 32
	Eps    float64  // inside every root; 0: 1e-5
	Decay  float64  // weight of the old running variance, in [0, 1); 0: 0.9
	// Linear leaves only gain·x + bias: in front of a residual sum and behind a linear bottleneck (the reference code's
	// nonlinearity=False).
	Linear bool
	// ZeroGain starts a linear layer's gain at 0, so that its residual branch begins as nothing.
	ZeroGain bool
}

var _ nn.Norm = EvoNorm{}

// Kind returns "evonorm".
func (EvoNorm) Kind() string { return "evonorm" }

// AsLinear is the same layer with only its gain and bias: what a network puts where no activation belongs.
func (d EvoNorm) AsLinear() nn.Norm { d.Linear = true; return d }

func (d EvoNorm) layer() EvoLayer { return cmp.Or(d.Layer, B0) }

func (d EvoNorm) options() EvoOptions {
	return EvoOptions{Groups: d.Groups, Eps: d.Eps, Decay: d.Decay, Linear: d.Linear, ZeroGain: d.ZeroGain}
}

// Params are gain, bias and what the layer needs of v and running variance.
func (d EvoNorm) Params(in []shapes.Shape) []nn.Spec {
	specs := d.options().affineSpecs(in[0])
	n := shapes.Make(dtypes.Float32, in[0].Dimensions[3])
	if d.Linear {
		return specs
	}
	switch l := d.layer(); l {
	case B0, S0:
		specs = append(specs, nn.Spec{Name: "v", Shape: n, Role: nn.Gain, Init: nn.Fill(1)})
	case B1, B2, S1, S2:
	default:
		panic(fmt.Errorf("there is no layer %q; use one of %v", l, EvoLayers()))
	}
	if d.layer()[0] == 'b' {
		specs = append(specs, nn.Spec{Name: "var", Shape: n, Role: nn.State, Init: nn.Fill(1)})
	}
	return specs
}

// Lower computes the layer.
func (d EvoNorm) Lower(c *nn.Ctx, xs []*graph.Node) []*graph.Node {
	o := d.options()
	if d.Linear {
		return []*graph.Node{affine(c, xs[0])}
	}
	x, back := wide(xs[0])
	eps := o.epsilon()
	p := func(local string) *graph.Node { return perChannel(graph.ConvertDType(c.P(local), x.DType()), x) }
	root := func(v *graph.Node) *graph.Node { return graph.Sqrt(graph.AddScalar(v, eps)) }
	gated := func(v *graph.Node) *graph.Node { return graph.Mul(x, graph.Sigmoid(v)) }
	g := groupsOf(o.groups(), x.Shape().Dimensions[3])
	var y *graph.Node
	switch l := d.layer(); l {
	case B0, B1, B2:
		var variance *graph.Node // [1, 1, 1, C]
		if c.Training {
			variance = moment("std", "bwh", x, g)
			old := graph.ConvertDType(c.P("var"), x.DType())
			c.Set("var", graph.StopGradient(mix(old, graph.Reshape(variance, old.Shape().Dimensions...), o.decay())))
		} else {
			variance = p("var")
		}
		var other *graph.Node
		switch l {
		case B0:
			other = graph.Add(graph.Mul(x, p("v")), root(moment("std", "wh", x, g)))
		case B1:
			other = graph.Mul(graph.AddScalar(x, 1), root(moment("rms", "wh", x, g)))
		case B2:
			other = graph.Sub(root(moment("rms", "wh", x, g)), x)
		}
		y = graph.Div(x, graph.Max(other, root(variance)))
	case S0:
		y = graph.Div(gated(graph.Mul(x, p("v"))), root(moment("std", "whc/g", x, g)))
	case S1:
		y = graph.Div(gated(x), root(moment("std", "whc/g", x, g)))
	case S2:
		y = graph.Div(gated(x), root(moment("rms", "whc/g", x, g)))
	default:
		panic(fmt.Errorf("there is no layer %q; use one of %v", l, EvoLayers()))
	}
	return []*graph.Node{affine(c, back(y))}
}

// EvoOptions are what all normalisation-activation layers have in common. The zero value is the paper's.
type EvoOptions struct {
	Groups   int     // of the moments over w, h, c/g; lowered by 1 until it divides the channels; 0: 32
	Eps      float64 // 0: 1e-5
	Decay    float64 // weight of the old running value, in [0, 1); 0: 0.9
	Linear   bool    // only gain·x + bias
	ZeroGain bool    // the gain of a linear layer starts at 0
}

func (o EvoOptions) groups() int      { return cmp.Or(o.Groups, 32) }
func (o EvoOptions) epsilon() float64 { return cmp.Or(o.Eps, 1e-5) }
func (o EvoOptions) decay() float64   { return cmp.Or(o.Decay, .9) }

// check refuses options outside their ranges.
func (o EvoOptions) check() error {
	switch {
	case o.Groups < 0:
		return fmt.Errorf("%d groups: want at least 1", o.Groups)
	case !(o.epsilon() > 0) || o.epsilon() > 1e6:
		return fmt.Errorf("eps %g: want a positive number", o.Eps)
	case !decayOK(o.decay()):
		return fmt.Errorf("decay %g: want a weight of the old value in [0, 1)", o.Decay)
	}
	return nil
}

// affineSpecs are gain and bias of a layer over maps of that shape, which it checks.
func (o EvoOptions) affineSpecs(s shapes.Shape) []nn.Spec {
	if err := o.check(); err != nil {
		panic(err)
	}
	if s.Rank() != 4 || !s.DType.IsFloat() || s.Size() == 0 {
		panic(fmt.Errorf("cannot normalise %s: want floating maps [batch, height, width, channels]", s))
	}
	specs := channelSpecs(s)
	if o.Linear && o.ZeroGain {
		specs[0].Init = nn.Fill(0)
	}
	return specs
}

// groupsOf is the largest number of groups up to g that divides the channels.
func groupsOf(g, channels int) int {
	g = min(g, channels)
	for channels%g != 0 {
		g--
	}
	return g
}

// wide gives x in at least float32, in which statistics are computed, and how to return.
func wide(x *graph.Node) (v *graph.Node, back func(*graph.Node) *graph.Node) {
	if !x.DType().IsFloat() || x.Rank() != 4 {
		panic(fmt.Errorf("cannot normalise %s: want floating maps [batch, height, width, channels]", x.Shape()))
	}
	if x.DType().Bits() >= 32 {
		return x, func(y *graph.Node) *graph.Node { return y }
	}
	return graph.ConvertDType(x, dtypes.Float32), func(y *graph.Node) *graph.Node { return graph.ConvertDType(y, x.DType()) }
}

// moment is the mean, the mean of squares ("rms", before the root) or the biased variance ("std", before the root) of x
// [B, H, W, C] over an index set, with axes of size 1 where it was reduced. x may itself have axes of size 1 along which
// it is constant: the moment of such a value is that of the whole map.
func moment(kind, over string, x *graph.Node, groups int) *graph.Node {
	s := x.Shape().Dimensions
	axes := map[string][]int{"bwh": {0, 1, 2}, "wh": {1, 2}, "whc": {1, 2, 3}, "whc/g": {1, 2, 3}}[over]
	if axes == nil {
		panic(fmt.Errorf("there is no index set %q", over))
	}
	v := x
	grouped := over == "whc/g" && s[3] > 1 && groups > 1
	if grouped {
		v, axes = graph.Reshape(x, s[0], s[1], s[2], groups, s[3]/groups), []int{1, 2, 4}
	}
	mean := func(v *graph.Node) *graph.Node { return graph.ReduceAndKeep(v, graph.ReduceMean, axes...) }
	switch kind {
	case "mean":
		v = mean(v)
	case "rms":
		v = mean(graph.Mul(v, v))
	case "std":
		centred := graph.Sub(v, mean(v))
		v = mean(graph.Mul(centred, centred))
	default:
		panic(fmt.Errorf("there is no moment %q", kind))
	}
	if grouped { // [B, 1, 1, g, 1] -> [B, 1, 1, C]
		v = graph.Reshape(graph.BroadcastToDims(v, s[0], 1, 1, groups, s[3]/groups), s[0], 1, 1, s[3])
	}
	return v
}

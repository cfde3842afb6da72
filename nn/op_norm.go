package nn

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
)

// LayerNorm standardises every case over its normalised axes and applies a gain "w" and a bias "b":
//
//	y = gain·(x − mean)/√(var + eps) + bias,  var = mean((x − mean)²)
//
// (Ba, Kiros, Hinton, arXiv:1607.06450, eq. 4). No statistics are kept: training and inference are the same function.
type LayerNorm struct {
	Eps    float64 // inside the root; 0: 1e-5
	Axes   []int   // normalised axes, negative ones count from the end; nil: the last
	NoGain bool
	NoBias bool
}

var _ Norm = LayerNorm{}

// Kind returns "layernorm".
func (LayerNorm) Kind() string { return "layernorm" }

// Epsilon is Eps with its default.
func (d LayerNorm) Epsilon() float64 { return cmp.Or(d.Eps, 1e-5) }

// Params are the gain and the bias, over the normalised axes.
func (d LayerNorm) Params(in []shapes.Shape) []Spec {
	s := affineSpecs(in[0], normAxes(in[0], d.Axes), d.NoGain, d.NoBias)
	if size := normSize(in[0], normAxes(in[0], d.Axes)); size < 2 {
		panic(fmt.Errorf("layer norm over %d element would give the bias whatever the input; normalise more, or use rmsnorm", size))
	}
	return s
}

// Lower normalises in two passes.
func (d LayerNorm) Lower(c *Ctx, xs []*graph.Node) []*graph.Node {
	axes := normAxes(xs[0].Shape(), d.Axes)
	return []*graph.Node{Standardize(xs[0], c.P("w"), c.P("b"), d.Epsilon(), true, axes...)}
}

// RMSNorm divides by the root mean square and applies a gain "w": y = gain·x/√(mean(x²) + eps) (arXiv:1910.07467).
type RMSNorm struct {
	Eps    float64 // inside the root; 0: 1e-6
	Axes   []int   // normalised axes; nil: the last
	NoGain bool
	Bias   bool // adds a bias "b", which the paper's form lacks; folding a shift into the norm needs one
}

var _ Norm = RMSNorm{}

// Kind returns "rmsnorm".
func (RMSNorm) Kind() string { return "rmsnorm" }

// Epsilon is Eps with its default.
func (d RMSNorm) Epsilon() float64 { return cmp.Or(d.Eps, 1e-6) }

// Params is the gain (and the bias).
func (d RMSNorm) Params(in []shapes.Shape) []Spec {
	return affineSpecs(in[0], normAxes(in[0], d.Axes), d.NoGain, !d.Bias)
}

// Lower normalises.
func (d RMSNorm) Lower(c *Ctx, xs []*graph.Node) []*graph.Node {
	axes := normAxes(xs[0].Shape(), d.Axes)
	return []*graph.Node{Standardize(xs[0], c.P("w"), c.P("b"), d.Epsilon(), false, axes...)}
}

// Standardize is the kernel of LayerNorm (center) and RMSNorm on plain values: over the given axes it subtracts the
// mean (if center), divides by √(mean square + eps), multiplies by the gain and adds the bias. Gain and bias have the
// shape of the normalised axes; nil means none. Statistics of half precision values are computed in float32.
func Standardize(x, gain, bias *graph.Node, eps float64, center bool, axes ...int) *graph.Node {
	dtype := x.DType()
	if !dtype.IsFloat() {
		panic(fmt.Errorf("cannot normalise %s: want a floating type", x.Shape()))
	}
	v := x
	if dtype.Bits() < 32 {
		v = graph.ConvertDType(x, dtypes.Float32)
	}
	if center {
		v = graph.Sub(v, graph.ReduceAndKeep(v, graph.ReduceMean, axes...))
	}
	ms := graph.ReduceAndKeep(graph.Mul(v, v), graph.ReduceMean, axes...)
	y := graph.Mul(v, rsqrt(graph.AddScalar(ms, eps)))
	if y.DType() != dtype {
		y = graph.ConvertDType(y, dtype)
	}
	return affine(y, gain, bias, axes)
}

// affine multiplies by the gain and adds the bias, both shaped as the given axes of y.
func affine(y, gain, bias *graph.Node, axes []int) *graph.Node {
	dims := make([]int, y.Rank())
	for i := range dims {
		dims[i] = 1
	}
	for _, a := range axes {
		dims[(a+y.Rank())%y.Rank()] = y.Shape().Dimensions[(a+y.Rank())%y.Rank()]
	}
	if gain != nil {
		y = graph.Mul(y, graph.Reshape(gain, dims...))
	}
	if bias != nil {
		y = graph.Add(y, graph.Reshape(bias, dims...))
	}
	return y
}

// rsqrt is 1/√x from functions that have gradients.
func rsqrt(x *graph.Node) *graph.Node { return graph.Reciprocal(graph.Sqrt(x)) }

// normAxes resolves axes to sorted non-negative ones and refuses repeated or missing ones.
func normAxes(s shapes.Shape, axes []int) []int {
	if len(axes) == 0 {
		axes = []int{-1}
	}
	out := make([]int, len(axes))
	for i, a := range axes {
		if a < -s.Rank() || a >= s.Rank() {
			panic(fmt.Errorf("axis %d is not one of %s", a, s))
		}
		out[i] = (a + s.Rank()) % s.Rank()
	}
	slices.Sort(out)
	if len(slices.Compact(slices.Clone(out))) != len(out) {
		panic(fmt.Errorf("axes %v name one axis of %s twice", axes, s))
	}
	return out
}

func normSize(s shapes.Shape, axes []int) int {
	n := 1
	for _, a := range axes {
		n *= s.Dimensions[a]
	}
	return n
}

func affineSpecs(s shapes.Shape, axes []int, noGain, noBias bool) (specs []Spec) {
	if !s.DType.IsFloat() {
		panic(fmt.Errorf("cannot normalise %s: want a floating type", s))
	}
	var dims []int
	for _, a := range axes {
		dims = append(dims, s.Dimensions[a])
	}
	if normSize(s, axes) == 0 {
		panic(fmt.Errorf("cannot normalise over no elements (%s)", s))
	}
	if !noGain {
		specs = append(specs, Spec{"w", f32(dims...), Gain, Fill(1)})
	}
	if !noBias {
		specs = append(specs, Spec{"b", f32(dims...), Bias, nil})
	}
	return specs
}

// BatchNorm standardises every channel (last axis) over the batch and all other axes while training, and by its
// running statistics otherwise (Ioffe, Szegedy, arXiv:1502.03167):
//
//	y = gain·(x − mean)/√(var + eps) + bias
//	running = Decay·running + (1 − Decay)·batch
//
// Parameters: gain "w", bias "b", state "mean" and "var". Gradients flow through the batch statistics. An optional second
// input is a mask shaped as x without its channels, 1 (or true) where a token is valid: the others are left out of the
// statistics and normalised all the same. Without a valid token the running statistics are used and kept.
type BatchNorm struct {
	Eps      float64 // inside the root; 0: 1e-5
	Decay    float64 // weight of the old running value; 0: 0.9
	Biased   bool    // running variance from the biased estimate (default: unbiased, as PyTorch has it)
	Always   bool    // batch statistics in evaluation too; the running ones are left alone then
	NoAffine bool
	ZeroGain bool // gain starts at 0: the last norm of a residual branch
}

var _ Norm = BatchNorm{}

// Kind returns "batchnorm".
func (BatchNorm) Kind() string { return "batchnorm" }

// Epsilon is Eps with its default.
func (d BatchNorm) Epsilon() float64 { return cmp.Or(d.Eps, 1e-5) }

// Params are gain, bias and the running statistics.
func (d BatchNorm) Params(in []shapes.Shape) []Spec {
	wantRank(in[0], 2, -1)
	n := in[0].Dimensions[in[0].Rank()-1]
	gain := float32(1)
	if d.ZeroGain {
		gain = 0
	}
	s := []Spec{{"mean", f32(n), State, nil}, {"var", f32(n), State, Fill(1)}}
	if !d.NoAffine {
		s = append([]Spec{{"w", f32(n), Gain, Fill(gain)}, {"b", f32(n), Bias, nil}}, s...)
	}
	return s
}

// Lower normalises with the statistics of the mode.
func (d BatchNorm) Lower(c *Ctx, xs []*graph.Node) []*graph.Node {
	x, mask := xs[0], TokenMask(xs)
	last := x.Rank() - 1
	up := func(v *graph.Node) *graph.Node { return graph.ExpandLeftToRank(v, x.Rank()) }
	mean, variance := c.P("mean"), c.P("var")
	centred := (*graph.Node)(nil)
	if c.Training || d.Always {
		bm, count := ChannelMean(x, mask)
		known := func(v, running *graph.Node) *graph.Node { // the running value without a valid token
			if count == nil {
				return v
			}
			return graph.Where(graph.GreaterThan(graph.BroadcastToDims(count, v.Shape().Dimensions...), graph.ZerosLike(v)), v, running)
		}
		bm = known(bm, mean)
		centred = graph.Sub(x, up(bm))
		bv, _ := ChannelMean(graph.Mul(centred, centred), mask)
		if c.Training && !d.Always {
			n := float64(x.Shape().Size()) / float64(max(x.Shape().Dimensions[last], 1))
			run := bv
			switch {
			case d.Biased:
			case count != nil:
				run = graph.Mul(bv, graph.Div(count, graph.MaxScalar(graph.AddScalar(count, -1), 1)))
			case n > 1:
				run = graph.MulScalar(bv, n/(n-1))
			}
			run, bv = known(run, variance), known(bv, variance)
			decay := cmp.Or(d.Decay, .9)
			c.Set("mean", mix(mean, bm, decay))
			c.Set("var", mix(variance, run, decay))
		}
		variance = bv
	} else {
		centred = graph.Sub(x, up(mean))
	}
	s := rsqrt(graph.AddScalar(variance, d.Epsilon()))
	if w := c.P("w"); w != nil {
		s = graph.Mul(s, w)
	}
	y := graph.Mul(centred, up(s))
	if b := c.P("b"); b != nil {
		y = graph.Add(y, up(b))
	}
	return []*graph.Node{y}
}

// TokenMask returns the mask among the inputs of a norm, converted to the type of x, or nil: the optional second input,
// shaped as x without its channels, 1 (or true) where a token is valid. It panics on another shape.
func TokenMask(xs []*graph.Node) *graph.Node {
	if len(xs) < 2 || xs[1] == nil {
		return nil
	}
	x, mask := xs[0], xs[1]
	want := x.Shape().Dimensions[:max(x.Rank()-1, 0)]
	if !slices.Equal(mask.Shape().Dimensions, want) {
		panic(fmt.Errorf("the mask is %s, want %v for %s", mask.Shape(), want, x.Shape()))
	}
	return graph.ConvertDType(mask, x.DType())
}

// ChannelMean is the mean of v [..., channels] over all axes but the last, of the tokens whose mask is 1: [channels]. A
// nil mask means all of them, and count is nil then; otherwise it is how many are valid, and without any the mean is 0.
func ChannelMean(v, mask *graph.Node) (mean, count *graph.Node) {
	axes := make([]int, v.Rank()-1)
	for i := range axes {
		axes[i] = i
	}
	if mask == nil {
		return graph.ReduceMean(v, axes...), nil
	}
	count = graph.ReduceAllSum(mask)
	return graph.Div(graph.ReduceSum(graph.Mul(v, graph.InsertAxes(mask, -1)), axes...), graph.MaxScalar(count, 1)), count
}

// mix is decay·old + (1−decay)·new without a gradient.
func mix(old, v *graph.Node, decay float64) *graph.Node {
	return graph.StopGradient(graph.Add(graph.MulScalar(old, decay), graph.MulScalar(v, 1-decay)))
}

// GroupNorm standardises groups of channels of every case over all but the batch axis (arXiv:1803.08494); as many
// groups as channels is instance norm, one group is layer norm over all axes with a gain per channel.
type GroupNorm struct {
	Groups   int     // must divide the channels
	Eps      float64 // inside the root; 0: 1e-5
	NoAffine bool
}

var _ Norm = GroupNorm{}

// Kind returns "groupnorm".
func (GroupNorm) Kind() string { return "groupnorm" }

// Params are gain "w" and bias "b" per channel.
func (d GroupNorm) Params(in []shapes.Shape) []Spec {
	wantRank(in[0], 2, -1)
	n := in[0].Dimensions[in[0].Rank()-1]
	if d.Groups < 1 || n%d.Groups != 0 {
		panic(fmt.Errorf("%d groups do not divide %d channels", d.Groups, n))
	}
	if d.NoAffine {
		return nil
	}
	return affineSpecs(in[0], []int{in[0].Rank() - 1}, false, false)
}

// Lower normalises.
func (d GroupNorm) Lower(c *Ctx, xs []*graph.Node) []*graph.Node {
	s := xs[0].Shape().Dimensions
	n := s[len(s)-1]
	spatial := xs[0].Shape().Size() / max(s[0]*n, 1)
	x := graph.Reshape(xs[0], s[0], spatial, d.Groups, n/d.Groups)
	y := graph.Reshape(Standardize(x, nil, nil, cmp.Or(d.Eps, 1e-5), true, 1, 3), s...)
	return []*graph.Node{affine(y, c.P("w"), c.P("b"), []int{len(s) - 1})}
}

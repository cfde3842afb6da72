package nn

import (
	"slices"

	"github.com/gomlx/compute"
	"github.com/gomlx/gomlx/core/graph"
)

// A grouped convolution has a gradient of its own here: GoMLX differentiates one group after another, which makes a
// graph of some 60,000 operations of a network such as EfficientNet-Lite0. Each gradient is one convolution, too: that of
// the input has the same groups, that of the kernel has them in the batch.

// grouped is Conv.native for more than one group: x [batch, spatial..., in], w [out, k..., in/groups].
func (d Conv) grouped(x, w *graph.Node) *graph.Node {
	y := d.groupedForward(graph.StopGradient(x), graph.StopGradient(w))
	// The gradients of x and w are functions of that of y, which is known when theirs are asked for. A zero that could have
	// been one of their elements ties them to y.
	var dy *graph.Node
	tied := func(in *graph.Node, gradient func() *graph.Node) *graph.Node {
		in = graph.IdentityWithCustomGradient(in, func(_, _ *graph.Node) *graph.Node { return gradient() })
		element := graph.Reshape(graph.SliceAxis(graph.Reshape(in, in.Shape().Size()), 0, graph.AxisRange(0, 1)))
		return graph.Where(graph.Const(in.Graph(), false), element, graph.ScalarZero(in.Graph(), in.DType()))
	}
	zero := graph.Add(
		tied(x, func() *graph.Node { return d.groupedInputGradient(dy, x, w) }),
		tied(w, func() *graph.Node { return d.groupedKernelGradient(dy, x, w) }))
	return graph.IdentityWithCustomGradient(graph.Add(y, zero), func(_, v *graph.Node) *graph.Node {
		dy = v
		return v
	})
}

// spatial are the numbers 1 to n: the spatial axes of [batch, spatial..., channels] and of [out, k..., in].
func (d Conv) spatial() []int {
	axes := make([]int, len(d.Kernel))
	for i := range axes {
		axes[i] = i + 1
	}
	return axes
}

// groupedAxes say that images are [batch, spatial..., channels] and kernels [out, k..., in].
func (d Conv) groupedAxes() compute.ConvolveAxesConfig {
	n, sp := len(d.Kernel), d.spatial()
	return compute.ConvolveAxesConfig{
		InputBatch: 0, InputSpatial: sp, InputChannels: n + 1,
		KernelOutputChannels: 0, KernelSpatial: sp, KernelInputChannels: n + 1,
		OutputBatch: 0, OutputSpatial: sp, OutputChannels: n + 1,
	}
}

// perAxis are stride, dilation and padding of every spatial axis.
func (d Conv) perAxis() (stride, dilation []int, pad [][2]int) {
	for i := range d.Kernel {
		stride, dilation, pad = append(stride, d.stride(i)), append(dilation, d.dilation(i)), append(pad, d.pad(i))
	}
	return stride, dilation, pad
}

func (d Conv) groupedForward(x, w *graph.Node) *graph.Node {
	stride, dilation, pad := d.perAxis()
	return graph.ConvGeneral(x, w, d.groupedAxes(), stride, pad, nil, dilation, d.groups(), 1)
}

// groupedInputGradient convolves dy, spread by the stride, with the mirrored kernel, whose inputs and outputs have changed
// places within each group.
func (d Conv) groupedInputGradient(dy, x, w *graph.Node) *graph.Node {
	n, g := len(d.Kernel), d.groups()
	in, out := x.Shape().Dimensions, dy.Shape().Dimensions
	perGroup := in[n+1] / g
	order := append([]int{0, n + 2}, 2) // [g, out/g, k..., in/g] -> [g, in/g, k..., out/g]
	for i := 1; i < n; i++ {
		order = append(order, i+2)
	}
	order = append(order, 1)
	back := graph.Reverse(w, d.spatial()...)
	back = graph.Reshape(back, slices.Concat([]int{g, d.Out / g}, d.Kernel, []int{perGroup})...)
	back = graph.Reshape(graph.TransposeAllAxes(back, order...), slices.Concat([]int{in[n+1]}, d.Kernel, []int{d.Out / g})...)
	stride, dilation, pad := d.perAxis()
	ones := slices.Repeat([]int{1}, n)
	for i, k := range d.Kernel {
		span, spread := (k-1)*dilation[i], (out[i+1]-1)*stride[i]+1
		low := span - pad[i][0]
		pad[i] = [2]int{low, in[i+1] + span - low - spread}
	}
	return graph.ConvGeneral(dy, back, d.groupedAxes(), ones, pad, stride, dilation, g, 1)
}

// groupedKernelGradient convolves x with dy in place of the kernel: the batch is what is summed over, the input channels
// are what is not.
func (d Conv) groupedKernelGradient(dy, x, w *graph.Node) *graph.Node {
	n, sp := len(d.Kernel), d.spatial()
	in, out := x.Shape().Dimensions, dy.Shape().Dimensions
	axes := compute.ConvolveAxesConfig{
		InputBatch: n + 1, InputSpatial: sp, InputChannels: 0,
		KernelInputChannels: 0, KernelSpatial: sp, KernelOutputChannels: n + 1,
		OutputBatch: n + 1, OutputSpatial: sp, OutputChannels: 0,
	}
	stride, dilation, pad := d.perAxis()
	for i, k := range d.Kernel {
		pad[i][1] = (k-1)*dilation[i] + (out[i+1]-1)*stride[i] + 1 - in[i+1] - pad[i][0]
	}
	return graph.ConvGeneral(x, dy, axes, dilation, pad, nil, stride, 1, d.groups())
}

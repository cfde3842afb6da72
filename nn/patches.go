package nn

import (
	"github.com/gomlx/gomlx/core/graph"
)

// Patches are what a kernel meets at every output position of x [batch, spatial..., in]: [batch, positions, k…·in], in the
// order of the kernel's axes, so that an ungrouped convolution is the product with its weight as a matrix [out, k…·in].
func (d Conv) Patches(x *graph.Node) *graph.Node {
	n := len(d.Kernel)
	wantRank(x.Shape(), n+2, n+2)
	out := make([]int, n)
	for i := range n {
		out[i] = d.outSize(i, x.Shape().Dimensions[i+1])
	}
	x = d.padded(x)
	batch, channels := x.Shape().Dimensions[0], x.Shape().Dimensions[n+1]
	var parts []*graph.Node
	d.taps(func(_ int, off []int) {
		axes := []graph.SliceAxisSpec{graph.AxisRange()}
		for i := range n {
			axes = append(axes, graph.AxisRange(off[i], off[i]+(out[i]-1)*d.stride(i)+1).Stride(d.stride(i)))
		}
		parts = append(parts, graph.Reshape(graph.Slice(x, append(axes, graph.AxisRange())...), batch, -1, channels))
	})
	return graph.Concatenate(parts, -1)
}

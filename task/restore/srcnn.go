package restore

import (
	"fmt"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/data/imaging"
	"github.com/lathe-ml/lathe/nn"
)

// SRCNN is the baseline of Dong et al. (arXiv:1501.00092): the image is enlarged bicubically first, and three
// convolutions with ReLU then work at the high resolution. 9-1-5 costs 8,032 multiply-adds per high-resolution pixel and
// 9-5-5 57,184, where ESPCN for r = 3 costs 2,514.
type SRCNN struct {
	Channels int   // 0: 1
	Middle   int   // odd size of the second kernel; 0: 1 (9-1-5), 5 makes 9-5-5
	Widths   []int // of the first two layers; nil: 64, 32
}

// Network builds the network: input "hr" [N, H, W, C], an image that is enlarged already, and output "sr" of the same
// shape.
func (m SRCNN) Network(seed uint64) (*nn.Network, error) {
	if m.Channels == 0 {
		m.Channels = 1
	}
	if m.Middle == 0 {
		m.Middle = 1
	}
	if m.Widths == nil {
		m.Widths = []int{64, 32}
	}
	e := ESPCN{Factor: 1, Channels: m.Channels, Widths: m.Widths, Kernels: []int{9, m.Middle, 5}, Activation: "relu"}
	if err := e.check(); err != nil {
		return nil, err
	}
	b := nn.NewBuilder(seed)
	x := trunk(b, b.Image("hr", 33, 33, m.Channels), m.Channels, e.Widths, e.Kernels, e.Activation)
	return b.Finish(b.Add(highOutput, nn.Conv2D(m.Channels, 5, 1), x))
}

// FixedUpscaler is the ablation of ESPCN's sub-pixel layer: the same convolutions in low-resolution space end in C
// channels, which one given filter, the bicubic one, enlarges by r.
type FixedUpscaler struct {
	ESPCN // Order and ICNR have no meaning here
}

// Network builds the network: input "lr" [N, h, w, C], output "sr" [N, r·h, r·w, C].
func (m FixedUpscaler) Network(seed uint64) (*nn.Network, error) {
	e := m.withDefaults()
	if err := e.check(); err != nil {
		return nil, err
	}
	b := nn.NewBuilder(seed)
	x := trunk(b, b.Image(lowInput, 17, 17, e.Channels), e.Channels, e.Widths, e.Kernels, e.Activation)
	x = b.Add("last", nn.Conv2D(e.Channels, e.Kernels[len(e.Widths)], 1), x)
	return b.Finish(b.Add(highOutput, BicubicUpscale{R: e.Factor}, x))
}

// BicubicUpscale enlarges [N, h, w, C] to [N, R·h, R·w, C] inside a network, differentiably: one product with the
// resize matrix of imaging.BicubicMatrix along each axis.
type BicubicUpscale struct{ R int }

// Kind returns "bicubic_upscale".
func (BicubicUpscale) Kind() string { return "bicubic_upscale" }

// Lower multiplies by the matrices of the height and of the width.
func (u BicubicUpscale) Lower(_ *nn.Ctx, x []*graph.Node) []*graph.Node {
	if x[0].Rank() != 4 {
		panic(fmt.Errorf("bicubic upscaling of %s; want [N, h, w, C]", x[0].Shape()))
	}
	d := x[0].Shape().Dimensions
	along := func(y *graph.Node, axis int) *graph.Node { // the axis moves to the end
		m, out, err := imaging.BicubicMatrix(d[axis], float64(u.R), true)
		if err != nil {
			panic(err)
		}
		var t *tensors.Tensor
		if y.DType() == dtypes.Float64 {
			t = tensors.FromFlatDataAndDimensions(m, out, d[axis])
		} else {
			f := make([]float32, len(m))
			for i, v := range m {
				f[i] = float32(v)
			}
			t = tensors.FromFlatDataAndDimensions(f, out, d[axis])
		}
		return graph.Dot(y, graph.ConstTensor(y.Graph(), t)).General([]int{axis}, nil, []int{1}, nil)
	}
	y := along(x[0], 1)                       // [N, w, C, H]
	y = graph.TransposeAllAxes(y, 0, 3, 1, 2) // [N, H, w, C]
	y = along(y, 2)                           // [N, H, C, W]
	return []*graph.Node{graph.TransposeAllAxes(y, 0, 1, 3, 2)}
}

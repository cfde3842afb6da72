package nn_test

import (
	"math"
	"testing"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/nn"
)

// TestConvTransposeIsTheAdjointOfConv: ⟨conv(x), y⟩ = ⟨x, convᵀ(y)⟩ with the kernel's channels exchanged.
func TestConvTransposeIsTheAdjointOfConv(t *testing.T) {
	for _, c := range []struct {
		name           string
		kernel, stride []int
		dilation       []int
		pad            [][2]int
		outPad         []int
		height, width  int
		rows, cols     int // of conv's output
	}{
		{"tiles", []int{2, 2}, []int{2, 2}, nil, nil, nil, 6, 4, 3, 2},
		{"overlap", []int{3, 2}, []int{2, 1}, nil, [][2]int{{1, 1}, {0, 1}}, nil, 5, 4, 3, 4},
		{"remainder", []int{3, 3}, []int{2, 2}, nil, [][2]int{{1, 1}, {1, 1}}, []int{1, 1}, 6, 8, 3, 4},
		{"dilated", []int{2, 3}, []int{1, 1}, []int{2, 1}, nil, nil, 6, 6, 4, 4},
	} {
		const in, out = 3, 5
		conv := nn.Conv{Out: out, Kernel: c.kernel, Stride: c.stride, Dilation: c.dilation, Pad: c.pad, NoBias: true}
		back := nn.ConvTranspose{Out: in, Kernel: c.kernel, Stride: c.stride, Dilation: c.dilation, Pad: c.pad, OutPad: c.outPad, NoBias: true}
		b := nn.NewBuilder(1)
		x := b.Input("x", shapes.Make(dtypes.Float32, 1, c.height, c.width, in))
		y := b.Input("y", shapes.Make(dtypes.Float32, 1, c.rows, c.cols, out))
		net, err := b.Finish(b.Add("conv", conv, x), b.Add("back", back, y))
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		kk := c.kernel[0] * c.kernel[1]
		w := net.Params.Get("conv.w").Data() // [out, k, in] -> [in, k, out]
		v := make([]float32, len(w))
		for o := range out {
			for k := range kk {
				for i := range in {
					v[(i*kk+k)*out+o] = w[(o*kk+k)*in+i]
				}
			}
		}
		if err := net.Params.Get("back.w").SetData(v); err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		draw := func(name string, dims ...int) *tensors.Tensor {
			s := shapes.Make(dtypes.Float32, dims...)
			d := make([]float32, s.Size())
			rng.Normal(rng.New(2, name), d, 1)
			return tensors.FromFlatDataAndDimensions(d, dims...)
		}
		tx, ty := draw("x", 2, c.height, c.width, in), draw("y", 2, c.rows, c.cols, out)
		got, err := net.Run(enginetest.Backend(), []*tensors.Tensor{tx, ty})
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		if !got[0].Shape().Equal(ty.Shape()) || !got[1].Shape().Equal(tx.Shape()) {
			t.Fatalf("%s: conv gives %s, its transpose %s; want %s and %s", c.name, got[0].Shape(), got[1].Shape(), ty.Shape(), tx.Shape())
		}
		dot := func(a, b *tensors.Tensor) (s float64) {
			p, q := nn.Floats(a), nn.Floats(b)
			for i := range p {
				s += float64(p[i]) * float64(q[i])
			}
			return s
		}
		if l, r := dot(got[0], ty), dot(tx, got[1]); math.Abs(l-r) > 1e-4*math.Max(1, math.Abs(l)) {
			t.Errorf("%s: ⟨conv(x), y⟩ = %g, ⟨x, convᵀ(y)⟩ = %g", c.name, l, r)
		}
	}
}

// TestResizeKeepsConstantsAndRefusesNonsense: interpolation weights sum to one.
func TestResizeKeepsConstantsAndRefusesNonsense(t *testing.T) {
	for _, d := range []nn.Resize{
		{Scale: []float64{2, 3}},
		{Scale: []float64{1.5, .5}, Linear: true},
		{Size: []int{7, 2}, Linear: true, Coord: nn.AlignCorners},
		{Size: []int{1, 9}, Coord: nn.Asymmetric, Round: nn.RoundFloor},
		{Scale: []float64{2.5, 1}, Coord: nn.PyTorchHalfPixel, Round: nn.RoundCeil},
	} {
		b := nn.NewBuilder(1)
		net, err := b.Finish(b.Add("r", d, b.Image("x", 4, 5, 2)))
		if err != nil {
			t.Fatal(err)
		}
		x := make([]float32, 40)
		for i := range x {
			x[i] = .75
		}
		got, err := net.Run(enginetest.Backend(), []*tensors.Tensor{tensors.FromFlatDataAndDimensions(x, 1, 4, 5, 2)})
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range nn.Floats(got[0]) {
			if v != .75 {
				t.Errorf("%+v turns .75 into %g", d, v)
			}
		}
	}
	for _, d := range []nn.Resize{{}, {Scale: []float64{2}}, {Scale: []float64{0, 1}}, {Size: []int{1, 1}, Scale: []float64{1, 1}}, {Size: []int{3, 3}, Coord: "nowhere"}, {Size: []int{3, 3}, Round: "up"}} {
		b := nn.NewBuilder(1)
		if _, err := b.Finish(b.Add("r", d, b.Image("x", 4, 5, 2))); err == nil {
			t.Errorf("%+v is accepted", d)
		}
	}
}

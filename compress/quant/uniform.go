package quant

import (
	"context"
	"fmt"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/nn"
)

// Uniform stores a site's weight as integer codes with scales and zero points: W = (code - zero) * scale. Parameters:
// "q", the codes (uint8, of the weight's shape), "scale" and "zero" (float32, one per group).
type Uniform struct {
	Bits  int // 2 to 8, or 1 with zero points between the codes
	Axis  int // 0: a scale per output channel; -1: one for the whole weight
	Group int // with axis 0: a scale per block of that many consecutive weights of a row; 0: per row
}

var (
	_ nn.Repr         = Uniform{}
	_ compress.Stored = Uniform{}
)

// Kind returns "uniform".
func (Uniform) Kind() string { return "uniform" }

// WeightBits are the bits of a code.
func (u Uniform) WeightBits() int { return u.Bits }

func (u Uniform) groups(w shapes.Shape) int {
	switch {
	case u.Axis != 0:
		return 1
	case u.Group > 0:
		return w.Size() / u.Group
	}
	return w.Dimensions[0]
}

// Specs are the codes, scales and zero points.
func (u Uniform) Specs(w shapes.Shape) []nn.Spec {
	if u.Group > 0 && w.Dimensions[0] > 0 && w.Size()/w.Dimensions[0]%u.Group != 0 {
		panic(fmt.Errorf("group size %d does not divide the %d weights of a row", u.Group, w.Size()/w.Dimensions[0]))
	}
	g := shapes.Make(dtypes.Float32, u.groups(w))
	return []nn.Spec{
		{Name: "q", Shape: w, Role: nn.Constant},
		{Name: "scale", Shape: g, Role: nn.Constant, Init: nn.Fill(1)},
		{Name: "zero", Shape: g, Role: nn.Constant},
	}
}

// Value decodes the weight.
func (u Uniform) Value(c *nn.Ctx) *graph.Node {
	q := c.P("q")
	dims := q.Shape().Dimensions
	w := graph.ConvertDType(q, c.Type())
	s, z := c.P("scale"), c.P("zero")
	rows := s.Shape().Size()
	w = graph.Reshape(w, rows, w.Shape().Size()/rows)
	w = graph.Mul(graph.Sub(w, graph.Reshape(z, rows, 1)), graph.Reshape(s, rows, 1))
	return graph.Reshape(w, dims...)
}

// StoredBytes counts Bits per weight, four bytes per scale and Bits (rounded up to bytes in total) per zero point.
func (u Uniform) StoredBytes(param func(local string) *nn.Param) int64 {
	bits := func(local string) int64 {
		if p := param(local); p != nil {
			return (int64(p.Value.Shape().Size())*int64(u.Bits) + 7) / 8
		}
		return 0
	}
	var scales int64
	if p := param("scale"); p != nil {
		scales = 4 * int64(p.Value.Shape().Size())
	}
	return bits("q") + scales + bits("zero")
}

// Grid returns the grid of a site stored this way.
func (u Uniform) Grid(net *nn.Network, site *nn.Node) (Affine, error) {
	s, z := net.Param(site, "scale"), net.Param(site, "zero")
	if s == nil || z == nil {
		return Affine{}, fmt.Errorf("quant: node %q has no scales or zero points", site.Name)
	}
	return Affine{Bits: u.Bits, Axis: u.Axis, Group: u.Group, Scale: widen(s.Data()), Zero: widen(z.Data())}, nil
}

// Store returns the form and the parameters in which a weight is stored on a grid.
func (a Affine) Store(w []float32, shape []int) (Uniform, map[string]*tensors.Tensor, error) {
	codes, err := a.Codes(w, shape)
	if err != nil {
		return Uniform{}, nil, err
	}
	return a.StoreCodes(codes, shape)
}

// StoreCodes is Store of a weight whose codes are chosen already.
func (a Affine) StoreCodes(codes []int32, shape []int) (Uniform, map[string]*tensors.Tensor, error) {
	if _, err := a.layout(len(codes), shape); err != nil {
		return Uniform{}, nil, err
	}
	q := make([]uint8, len(codes))
	for i, c := range codes {
		q[i] = uint8(c)
	}
	return Uniform{Bits: a.Bits, Axis: a.Axis, Group: a.Group}, map[string]*tensors.Tensor{
		"q":     tensors.FromFlatDataAndDimensions(q, shape...),
		"scale": tensors.FromFlatDataAndDimensions(narrow(a.Scale), len(a.Scale)),
		"zero":  tensors.FromFlatDataAndDimensions(narrow(a.Zero), len(a.Zero)),
	}, nil
}

// Site is a weight-bearing node as a Quantizer sees it.
type Site struct {
	Name   string
	Weight []float32 // row-major, output channel first
	Shape  []int
}

// Quantizer turns one site's weight into a stored form and its parameters.
type Quantizer interface {
	Quantize(ctx context.Context, s *Site) (nn.Repr, map[string]*tensors.Tensor, error)
}

// WeightGrid is the plain Quantizer: round to nearest on a uniform grid.
type WeightGrid struct {
	Bits      int  // 2 to 8
	PerTensor bool // one scale for the whole weight; false: one per output channel
	Group     int  // with per-channel scales: one per block of that many weights of a row; 0: per row
	Symmetric bool // scale max|w|/(2^(b-1)-1), codes ±(2^(b-1)-1); false: the percentile search of CalibrateUniform
}

var _ Quantizer = WeightGrid{}

// Fit chooses the grid.
func (g WeightGrid) Fit(s *Site) (Affine, error) {
	axis := 0
	var opt []CalibOption
	if g.PerTensor {
		axis = -1
	} else if g.Group > 0 {
		opt = append(opt, Groups(g.Group))
	}
	if g.Symmetric {
		opt = append(opt, Symmetric())
	}
	a, err := CalibrateUniform(s.Weight, s.Shape, axis, g.Bits, opt...)
	if err != nil {
		return a, fmt.Errorf("weight of %q: %w", s.Name, err)
	}
	return a, nil
}

// Quantize rounds the weight to the grid.
func (g WeightGrid) Quantize(_ context.Context, s *Site) (nn.Repr, map[string]*tensors.Tensor, error) {
	a, err := g.Fit(s)
	if err != nil {
		return nil, nil, err
	}
	return a.Store(s.Weight, s.Shape)
}

// siteOf reads the plain weight of a node.
func siteOf(net *nn.Network, n *nn.Node) (*Site, error) {
	p := net.Param(n, "w")
	if p == nil || !nn.IsPlain(n.Op) {
		return nil, fmt.Errorf("node %q (%s) stores its weight as %s; only plain weights can be quantised", n.Name, n.Op.Kind(), n.Op.(nn.Linear).Repr().Kind())
	}
	return &Site{Name: n.Name, Weight: p.Data(), Shape: p.Value.Shape().Dimensions}, nil
}

// install substitutes a site's weight for good: the plain one is dropped unless another node shares it.
func install(net *nn.Network, n *nn.Node, r nn.Repr, params map[string]*tensors.Tensor) error {
	if _, err := net.Substitute(n.Name, r, params); err != nil {
		return err
	}
	if w, ok := n.P["w"]; ok {
		if !net.SharedParam(n, "w") {
			net.Params.Delete(w)
		}
		delete(n.P, "w")
	}
	return nil
}

// storeOnGrid stores a site's weight on a grid and returns ‖W_q − W‖²/‖W‖².
func storeOnGrid(net *nn.Network, n *nn.Node, s *Site, grid Affine) (float64, error) {
	r, params, err := grid.Store(s.Weight, s.Shape)
	if err != nil {
		return 0, err
	}
	fq, err := grid.FakeQuant(s.Weight, s.Shape)
	if err != nil {
		return 0, err
	}
	return compress.RelativeError(s.Weight, fq), install(net, n, r, params)
}

func widen[F float32 | float64](x []F) []float64 {
	out := make([]float64, len(x))
	for i, v := range x {
		out[i] = float64(v)
	}
	return out
}

func narrow(x []float64) []float32 {
	out := make([]float32, len(x))
	for i, v := range x {
		out[i] = float32(v)
	}
	return out
}

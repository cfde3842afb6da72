package quant

import (
	"fmt"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"

	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/onnx"
)

// TanQuantize moves an activation of [0, ∞), such as softmax outputs, to the tangent grid of TanQ. Parameters: "scale",
// one element; "curve", the numbers α, ακ, tan(ακ) and (2^Bits-1)/(A+B) of TanQ; "levels", its table.
//
//	c = round((tan(α·clip(x/scale, 0, 1) - ακ) + A)·L/(A+B)),  y = levels[c]
//
// The gradient is that of the identity where x lies in [0, scale], and zero elsewhere.
type TanQuantize struct {
	Bits int // 2 to 8
}

var (
	_ nn.Op         = TanQuantize{}
	_ nn.Parametric = TanQuantize{}
	_ onnx.Exporter = TanQuantize{}
)

// Kind returns "tanquantize".
func (TanQuantize) Kind() string { return "tanquantize" }

// Params are "scale", "curve" and "levels".
func (d TanQuantize) Params([]shapes.Shape) []nn.Spec {
	if err := checkBits(d.Bits); err != nil {
		panic(err)
	}
	f32 := func(n int) shapes.Shape { return shapes.Make(dtypes.Float32, n) }
	return []nn.Spec{
		{Name: "scale", Shape: f32(1), Role: nn.Constant, Init: nn.Fill(1)},
		{Name: "curve", Shape: f32(4), Role: nn.Constant, Init: nn.Fill(.5)},
		{Name: "levels", Shape: f32(1 << d.Bits), Role: nn.Constant},
	}
}

// SetGrid writes a grid of the op's bits to the parameters of a node.
func (d TanQuantize) SetGrid(net *nn.Network, n *nn.Node, q TanQ) error {
	if err := q.Check(); err != nil {
		return err
	}
	if q.Bits != d.Bits {
		return fmt.Errorf("quant: node %q quantises to %d bits; the grid has %d", n.Name, d.Bits, q.Bits)
	}
	k := q.curve()
	curve := []float64{q.Alpha, q.Alpha * q.Kappa, k.a, k.top / k.sum}
	net.SetParam(n, "scale", nn.Constant, []float32{float32(q.Scale)}, 1)
	net.SetParam(n, "curve", nn.Constant, narrow(curve), len(curve))
	net.SetParam(n, "levels", nn.Constant, narrow(q.Levels()), 1<<d.Bits)
	return nil
}

// Lower quantises.
func (d TanQuantize) Lower(c *nn.Ctx, xs []*graph.Node) []*graph.Node {
	if err := checkBits(d.Bits); err != nil {
		panic(err)
	}
	x, top := xs[0], int(1)<<d.Bits-1
	scale, curve := graph.Reshape(c.P("scale")), c.P("curve")
	number := func(i int) *graph.Node { return graph.Reshape(graph.Slice(curve, graph.AxisElem(i))) }
	alpha, phase, offset, gain := number(0), number(1), number(2), number(3)

	u := graph.ClipScalar(graph.Div(graph.StopGradient(x), scale), 0, 1)
	angle := graph.Sub(graph.Mul(u, alpha), phase)
	tan := graph.Div(graph.Sin(angle), graph.Cos(angle))
	code := graph.ClipScalar(graph.Round(graph.Mul(graph.Add(tan, offset), gain)), 0, float64(top))
	index := graph.ConvertDType(code, dtypes.Int32)
	y := graph.ConvertDType(graph.Gather(c.P("levels"), graph.InsertAxes(index, -1)), x.DType())
	if c.Training { // straight through, where x lies within the grid
		inside := graph.ConvertDType(graph.Equal(u, graph.Div(graph.StopGradient(x), scale)), x.DType())
		y = StraightThrough(graph.Mul(x, inside), graph.StopGradient(y))
	}
	return []*graph.Node{y}
}

// ExportONNX writes the codes with elementary operators, since ONNX has no tangent quantiser, and looks the levels up
// with Gather.
func (d TanQuantize) ExportONNX(e *onnx.Emitter, n *nn.Node) error {
	scale, curve, levels := e.Network().Param(n, "scale"), e.Network().Param(n, "curve"), e.Network().Param(n, "levels")
	if scale == nil || curve == nil || levels == nil {
		return fmt.Errorf("its scale, curve or levels are missing")
	}
	k := curve.Data()
	if len(k) != 4 {
		return fmt.Errorf("its curve has %d numbers; it needs 4", len(k))
	}
	x, layout := e.Any(n, 0)
	u := e.Node("Clip", n.Name+"/share", []string{e.Node("Div", n.Name+"/div", []string{x, e.Floats(n.Name+"/scale", scale.Data())}), e.Scalar(0), e.Scalar(1)})
	angle := e.Node("Sub", n.Name+"/angle", []string{e.Node("Mul", n.Name+"/bend", []string{u, e.Floats(n.Name+"/alpha", k[:1])}), e.Floats(n.Name+"/phase", k[1:2])})
	tan := e.Node("Div", n.Name+"/tan", []string{e.Node("Sin", n.Name+"/sin", []string{angle}), e.Node("Cos", n.Name+"/cos", []string{angle})})
	c := e.Node("Mul", n.Name+"/steps", []string{e.Node("Add", n.Name+"/shift", []string{tan, e.Floats(n.Name+"/offset", k[2:3])}), e.Floats(n.Name+"/gain", k[3:])})
	c = e.Node("Clip", n.Name+"/grid", []string{e.Node("Round", n.Name+"/round", []string{c}), e.Scalar(0), e.Scalar(float64(len(levels.Data()) - 1))})
	index := e.Node("Cast", n.Name+"/codes", []string{c}, onnx.Int("to", int(onnx.Int32)))
	e.Out(n, layout, "Gather", []string{e.Floats(n.Name+"/levels", levels.Data(), len(levels.Data())), index})
	return nil
}

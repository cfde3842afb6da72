package nn

import (
	"fmt"

	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
)

// QuantizeDequantize moves values to a uniform grid and back, as ONNX's QuantizeLinear and DequantizeLinear do:
//
//	y = (clip(round(x/scale) + zero, lo, hi) − zero)·scale,  round half to even
//
// with [lo, hi] = [0, 2^Bits−1], or [−2^(Bits−1), 2^(Bits−1)−1] when Signed. Parameters "scale" and "zero" are constants of
// one element, or one per channel (last axis); zero may be any number, also a fraction or one outside [lo, hi]. The
// gradient is that of the identity within the grid and zero outside.
type QuantizeDequantize struct {
	Bits       int // 2 to 8
	Signed     bool
	PerChannel bool
}

// Kind returns "qdq".
func (QuantizeDequantize) Kind() string { return "qdq" }

// Range is the least and the greatest code.
func (d QuantizeDequantize) Range() (lo, hi float64) {
	levels := float64(int(1) << max(d.Bits, 0))
	if d.Signed {
		return -levels / 2, levels/2 - 1
	}
	return 0, levels - 1
}

// Params are "scale", initially 1, and "zero".
func (d QuantizeDequantize) Params(in []shapes.Shape) []Spec {
	n := 1
	if d.PerChannel {
		wantRank(in[0], 1, -1)
		n = in[0].Dimensions[in[0].Rank()-1]
	}
	return []Spec{{"scale", f32(n), Constant, Fill(1)}, {"zero", f32(n), Constant, nil}}
}

// Lower quantises.
func (d QuantizeDequantize) Lower(c *Ctx, x []*graph.Node) []*graph.Node {
	if d.Bits < 2 || d.Bits > 8 {
		panic(fmt.Errorf("%d bits, want 2 to 8", d.Bits))
	}
	r := max(x[0].Rank(), 1)
	scale, zero := graph.ExpandLeftToRank(c.P("scale"), r), graph.ExpandLeftToRank(c.P("zero"), r)
	lo, hi := d.Range()
	code := graph.Add(graph.Round(graph.StopGradient(graph.Div(x[0], scale))), zero)
	clipped := graph.ClipScalar(code, lo, hi)
	y := graph.StopGradient(graph.Mul(graph.Sub(clipped, zero), scale))
	if c.Training { // straight through, where x lies within the grid
		inside := graph.ConvertDType(graph.Equal(code, clipped), x[0].DType())
		pass := graph.Mul(x[0], graph.StopGradient(inside))
		y = graph.Add(pass, graph.StopGradient(graph.Sub(y, pass)))
	}
	return []*graph.Node{y}
}

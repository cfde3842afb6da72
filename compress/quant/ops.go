package quant

import (
	"fmt"
	"math"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"

	"github.com/lathe-ml/lathe/nn"
)

// LogQuantize moves a non-negative activation, such as softmax outputs, to a logarithmic grid with an exact zero: with
// PerOctave 2 the grid of LogSqrt2, with 1 that of Log2. Its parameter "scale" has one element.
//
//	c = round(-PerOctave * log2(x/scale)),  y = scale * 2^(-c/PerOctave), or 0 when c >= 2^Bits
type LogQuantize struct {
	Bits      int // 2 to 8
	PerOctave int // 1 or 2
}

var (
	_ nn.Op         = LogQuantize{}
	_ nn.Parametric = LogQuantize{}
)

// Kind returns "logquantize".
func (LogQuantize) Kind() string { return "logquantize" }

// Params is "scale".
func (d LogQuantize) Params([]shapes.Shape) []nn.Spec {
	return []nn.Spec{{Name: "scale", Shape: shapes.Make(dtypes.Float32, 1), Role: nn.Constant, Init: nn.Fill(1)}}
}

// Lower quantises.
func (d LogQuantize) Lower(c *nn.Ctx, xs []*graph.Node) []*graph.Node {
	if err := checkBits(d.Bits); err != nil {
		panic(err)
	}
	if d.PerOctave != 1 && d.PerOctave != 2 {
		panic(fmt.Errorf("%d levels per octave; accepted: 1 (log2) or 2 (log√2)", d.PerOctave))
	}
	x := xs[0]
	s := graph.ExpandLeftToRank(c.P("scale"), x.Rank())
	k := float64(d.PerOctave) / math.Ln2
	code := graph.Round(graph.MulScalar(graph.Log(graph.Div(x, s)), -k)) // x = 0: +Inf
	levels := float64(int(1) << d.Bits)
	y := graph.Mul(graph.Exp(graph.MulScalar(graph.ClipScalar(code, 0, levels-1), -1/k)), s)
	small := graph.GreaterOrEqual(code, graph.Scalar(c.G, code.DType(), levels))
	return []*graph.Node{graph.Where(small, graph.ZerosLike(y), y)}
}

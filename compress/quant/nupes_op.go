package quant

import (
	"fmt"
	"math"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"

	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/onnx"
)

// PowerQuantize moves an activation to a power grid and back, one maximum for the tensor: y = D(E(x)) of PowerGrid. Its
// parameter "scale", the maximum m, has one element and is positive. The gradient is that of the identity for |x| ≤ m and 0
// beyond.
type PowerQuantize struct {
	Bits     int     // 2 to 8
	Exponent float64 // > 0
	Unsigned bool    // the values are never negative
}

var (
	_ nn.Op         = PowerQuantize{}
	_ nn.Parametric = PowerQuantize{}
	_ onnx.Exporter = PowerQuantize{}
)

// Kind returns "powerquantize".
func (PowerQuantize) Kind() string { return "powerquantize" }

// Grid is the grid of the values.
func (d PowerQuantize) Grid() PowerGrid { return PowerGrid(d) }

// Params is "scale", initially 1.
func (d PowerQuantize) Params([]shapes.Shape) []nn.Spec {
	return []nn.Spec{{Name: "scale", Shape: shapes.Make(dtypes.Float32, 1), Role: nn.Constant, Init: nn.Fill(1)}}
}

// Lower quantises.
func (d PowerQuantize) Lower(c *nn.Ctx, xs []*graph.Node) []*graph.Node {
	if err := d.Grid().Check(); err != nil {
		panic(err)
	}
	x := xs[0]
	m := graph.ExpandLeftToRank(c.P("scale"), x.Rank())
	top := float64(d.Grid().Top())
	t := graph.Div(graph.StopGradient(x), m)
	if d.Unsigned {
		t = graph.MaxScalar(t, 0)
	} else {
		t = graph.Abs(t)
	}
	table := func(v []float32, code *graph.Node) *graph.Node {
		return graph.Gather(graph.ConvertDType(graph.Const(c.G, v), x.DType()), graph.InsertAxes(code, -1))
	}
	share := t
	if d.Exponent != 1 {
		t = graph.Pow(t, graph.Scalar(c.G, x.DType(), d.Exponent))
	}
	code := graph.ConvertDType(graph.MinScalar(graph.Round(graph.MulScalar(t, top)), top), dtypes.Int32)
	levels, bounds := d.tables()
	if d.Exponent != 1 {
		up := graph.GreaterOrEqual(share, table(bounds[1:], code))
		down := graph.LessThan(share, table(bounds[:len(bounds)-1], code))
		code = graph.Sub(graph.Add(code, graph.ConvertDType(up, dtypes.Int32)), graph.ConvertDType(down, dtypes.Int32))
	}
	y := graph.Mul(table(levels, code), m)
	if !d.Unsigned {
		y = graph.Mul(y, graph.Sign(graph.StopGradient(x)))
	}
	y = graph.StopGradient(y)
	if c.Training {
		inside := graph.LessOrEqual(graph.Abs(x), m)
		pass := graph.Where(inside, x, graph.StopGradient(x))
		y = StraightThrough(pass, y)
	}
	return []*graph.Node{y}
}

// tables are the levels of the codes 0 to L for a maximum of 1, and the shares |x|/m at which the codes 0 to L begin and
// the last one ends. A code that a power has put on the wrong side of its bounds is moved by one, so that the result does
// not depend on how exact a runtime's power is.
func (d PowerQuantize) tables() (levels, bounds []float32) {
	g := d.Grid()
	bounds = append(bounds, -1)
	for c := range g.Top() + 1 {
		levels = append(levels, float32(g.Level(float64(c))))
		bounds = append(bounds, float32(g.Level(float64(c)+.5)))
	}
	bounds[len(bounds)-1] = math.MaxFloat32
	return levels, bounds
}

// ExportONNX writes the codes by elementary operators and looks their values up: ONNX has no power-law quantiser.
func (d PowerQuantize) ExportONNX(e *onnx.Emitter, n *nn.Node) error {
	scale := e.Network().Param(n, "scale")
	if scale == nil {
		return fmt.Errorf("its scale is missing")
	}
	x, layout := e.Any(n, 0)
	top := float64(d.Grid().Top())
	m := e.Floats(n.Name+"/max", scale.Data())
	t := e.Node("Div", n.Name+"/share", []string{x, m})
	if d.Unsigned {
		t = e.Node("Relu", n.Name+"/positive", []string{t})
	} else {
		t = e.Node("Abs", n.Name+"/magnitude", []string{t})
	}
	share := t
	if d.Exponent != 1 {
		t = e.Node("Pow", n.Name+"/power", []string{t, e.Scalar(d.Exponent)})
	}
	integer := func(name, v string) string {
		return e.Node("Cast", n.Name+"/"+name, []string{v}, onnx.Int("to", int(onnx.Int32)))
	}
	t = e.Node("Round", n.Name+"/rounded", []string{e.Node("Mul", n.Name+"/scaled", []string{t, e.Scalar(top)})})
	code := integer("code", e.Node("Min", n.Name+"/limited", []string{t, e.Scalar(top)}))
	levels, bounds := d.tables()
	table := func(name string, v []float32) string {
		return e.Node("Gather", n.Name+"/"+name, []string{e.Floats(n.Name+"/"+name+"s", v, len(v)), code})
	}
	if d.Exponent != 1 {
		up := integer("up", e.Node("GreaterOrEqual", n.Name+"/above", []string{share, table("end", bounds[1:])}))
		down := integer("down", e.Node("Less", n.Name+"/below", []string{share, table("begin", bounds[:len(bounds)-1])}))
		code = e.Node("Sub", n.Name+"/exact", []string{e.Node("Add", n.Name+"/raised", []string{code, up}), down})
	}
	y := []string{table("level", levels), m}
	if d.Unsigned {
		e.Out(n, layout, "Mul", y)
		return nil
	}
	e.Out(n, layout, "Mul", []string{e.Node("Mul", n.Name+"/value", y), e.Node("Sign", n.Name+"/sign", []string{x})})
	return nil
}

// MatMulLUT multiplies x [n, in] with w [out, in] in integers: magnitudes are looked up in tables of 2^bits−1 at full
// scale, and signed products are summed (after decoding: powers do not keep sums), arXiv:2308.05600, section 3.1:
//
//	T[k] = round((k/L)^(1/a)·(2^bits − 1)),  k = 0..L
//	acc = Σ_d sgn·T_w[|c_w|]·T_x[|c_x|],   y = acc·m_w·m_x/(2^bits − 1)²
//
// w has a maximum per row or one, x has one. bits of 15 fit the tables into int16. Exact while in·2^(2·bits) < 2⁶³; more is
// refused. Errors: shapes and bits that do not fit.
func MatMulLUT(w, x *PowerCodes, bits int) (y []float64, acc []int64, err error) {
	if bits < 2 || bits > 24 {
		return nil, nil, fmt.Errorf("quant: lookup tables of %d bits; accepted: 2 to 24", bits)
	}
	tw, tx := w.LookupTable(bits), x.LookupTable(bits)
	return matMulTables(w, x, tw, tx, bits)
}

// MatMulSquares is MatMulLUT for grids of exponent ½ on both sides, which needs no tables: D(c) = ±m·c²/L², so the sums
// of products of squares are exact integers.
func MatMulSquares(w, x *PowerCodes) (y []float64, acc []int64, err error) {
	if w.Exponent != .5 || x.Exponent != .5 {
		return nil, nil, fmt.Errorf("quant: products of squares need exponents of 1/2; these are %g and %g, use MatMulLUT", w.Exponent, x.Exponent)
	}
	squares := func(p *PowerCodes) []int64 {
		t := make([]int64, p.Top()+1)
		for k := range t {
			t[k] = int64(k) * int64(k)
		}
		return t
	}
	return matMulTables(w, x, squares(w), squares(x), 16)
}

// LookupTable is T of MatMulLUT: the values of the codes 0 to L as integers, 2^bits−1 for L.
func (p *PowerCodes) LookupTable(bits int) []int64 {
	t := make([]int64, p.Top()+1)
	for k := range t {
		t[k] = int64(math.RoundToEven(p.Level(float64(k)) * float64(int64(1)<<bits-1)))
	}
	return t
}

// matMulTables sums products of table entries of at most so many bits.
func matMulTables(w, x *PowerCodes, tw, tx []int64, bits int) (y []float64, acc []int64, err error) {
	for _, p := range []*PowerCodes{w, x} {
		if err := p.Check(); err != nil {
			return nil, nil, err
		}
		if len(p.Shape) != 2 || p.Shape[0]*p.Shape[1] != len(p.Codes) {
			return nil, nil, fmt.Errorf("quant: %d codes of shape %v; a product takes matrices", len(p.Codes), p.Shape)
		}
		for i, c := range p.Codes {
			if int(c) > p.Top() || int(c) < p.least() {
				return nil, nil, fmt.Errorf("quant: code %d is %d; accepted: %d to %d", i, c, p.least(), p.Top())
			}
		}
	}
	out, d, n := w.Shape[0], w.Shape[1], x.Shape[0]
	switch {
	case x.Shape[1] != d:
		return nil, nil, fmt.Errorf("quant: a product of %v and the transpose of %v", x.Shape, w.Shape)
	case len(x.Max) != 1 || len(w.Max) != 1 && len(w.Max) != out:
		return nil, nil, fmt.Errorf("quant: %d maxima of activations and %d of %d weight rows; want one, and one or one per row", len(x.Max), len(w.Max), out)
	case float64(d)*math.Ldexp(1, 2*bits) >= math.Ldexp(1, 63):
		return nil, nil, fmt.Errorf("quant: sums of %d products of tables of %d bits do not fit 64 bits; use fewer bits", d, bits)
	}
	signed := func(p *PowerCodes, t []int64) []int64 {
		v := make([]int64, len(p.Codes))
		for i, c := range p.Codes {
			if v[i] = t[max(c, -c)]; c < 0 {
				v[i] = -v[i]
			}
		}
		return v
	}
	wv, xv := signed(w, tw), signed(x, tx)
	full := float64(tw[len(tw)-1]) * float64(tx[len(tx)-1])
	y, acc = make([]float64, n*out), make([]int64, n*out)
	for i := range n {
		for o := range out {
			var sum int64
			for j, v := range xv[i*d : (i+1)*d] {
				sum += v * wv[o*d+j]
			}
			acc[i*out+o] = sum
			y[i*out+o] = float64(sum) * w.Max[o%len(w.Max)] * x.Max[0] / full
		}
	}
	return y, acc, nil
}

package quant

import (
	"fmt"
	"math"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/nn"
)

// FakeQuantRange moves values to a uniform grid of 2^bits points whose range r and minimum m can be learned, as CalibTIP
// has it (Hubara et al., arXiv:2006.10518, section 3):
//
//	s = clip(r, 1e-6, 1e5)/(2^b−1),  zp = clip(round(qmin − m/s), qmin, qmax),  qmin = −2^(b−1), qmax = qmin + 2^b − 1
//	y = (round(clip(x/s + zp, qmin, qmax)) − zp)·s
//
// Rounding is straight through; the clips let the gradient pass inside their bounds, both ends included. r and m
// broadcast to x; they have no unit but x's.
func FakeQuantRange(x, r, m *graph.Node, bits int) *graph.Node {
	top := float64(int(1)<<bits - 1)
	lo := graph.Scalar(x.Graph(), x.DType(), -float64(int(1)<<(bits-1)))
	hi := graph.AddScalar(lo, top)
	s := graph.DivScalar(ClipSTE(r, graph.Scalar(x.Graph(), x.DType(), leastRange), graph.Scalar(x.Graph(), x.DType(), greatestRange)), top)
	zp := ClipSTE(RoundSTE(graph.Sub(lo, graph.Div(m, s))), lo, hi)
	code := RoundSTE(ClipSTE(graph.Add(graph.Div(x, s), zp), lo, hi))
	return graph.Mul(graph.Sub(code, zp), s)
}

const leastRange, greatestRange = 1e-6, 1e5

// RangeGrid is the grid of ranges and minima, one group or one per output channel (axis 0), with codes from 0: what a
// learned range is stored as. It equals FakeQuantRange but for values halfway between two points.
func RangeGrid(r, m []float64, bits, axis int) (Affine, error) {
	a := Affine{Bits: bits, Axis: axis}
	if err := checkBits(bits); err != nil {
		return a, err
	}
	if len(r) == 0 || len(r) != len(m) {
		return a, fmt.Errorf("quant: %d ranges and %d minima do not belong together", len(r), len(m))
	}
	top := float64(int(1)<<bits - 1)
	for i := range r {
		if v := r[i] + m[i]; math.IsNaN(v) || math.IsInf(v, 0) {
			return a, fmt.Errorf("quant: group %d has range %g and minimum %g: %w", i, r[i], m[i], ErrNotFinite)
		}
		s := min(max(r[i], leastRange), greatestRange) / top
		a.Scale = append(a.Scale, float64(float32(s)))
		a.Zero = append(a.Zero, min(max(math.RoundToEven(-m[i]/s), 0), top))
	}
	return a, nil
}

// RowRanges returns range and minimum of each of the rows of x, widened to hold 0; a row of zeros gets the range 1.
func RowRanges[F float32 | float64](x []F, rows int) (r, m []float64, err error) {
	lo, hi, err := rowExtremes(x, rows)
	if err != nil {
		return nil, nil, err
	}
	r = make([]float64, rows)
	for i := range r {
		r[i], lo[i] = span(lo[i], hi[i])
	}
	return r, lo, nil
}

// MeanRange returns one range and minimum for x, samples along the first axis: the minima and the maxima of the samples are
// averaged, then widened to hold 0. An outlier in one sample moves it little.
func MeanRange[F float32 | float64](x []F, samples int) (r, m float64, err error) {
	lo, hi, err := rowExtremes(x, samples)
	if err != nil {
		return 0, 0, err
	}
	var l, h float64
	for i := range lo {
		l += lo[i] / float64(samples)
		h += hi[i] / float64(samples)
	}
	r, m = span(l, h)
	return r, m, nil
}

// span widens an interval to hold 0 and returns its length, 1 where that is 0, and its lower end.
func span(lo, hi float64) (r, m float64) {
	lo, hi = min(lo, 0), max(hi, 0)
	if r = hi - lo; r == 0 {
		r = 1
	}
	return r, lo
}

func rowExtremes[F float32 | float64](x []F, rows int) (lo, hi []float64, err error) {
	if rows <= 0 || len(x) == 0 {
		return nil, nil, fmt.Errorf("quant: ranges: %w", ErrEmpty)
	}
	if len(x)%rows != 0 {
		return nil, nil, fmt.Errorf("quant: %d values do not fill %d rows", len(x), rows)
	}
	per := len(x) / rows
	lo, hi = make([]float64, rows), make([]float64, rows)
	for i := range rows {
		l, h := x[i*per], x[i*per]
		for _, v := range x[i*per : (i+1)*per] {
			if v-v != 0 {
				return nil, nil, fmt.Errorf("quant: row %d holds %g: %w", i, v, ErrNotFinite)
			}
			l, h = min(l, v), max(h, v)
		}
		lo[i], hi[i] = float64(l), float64(h)
	}
	return lo, hi, nil
}

// RangeWeight is a weight in training that is used on a grid of learned ranges, one per output channel. Parameters: "w",
// "range" and "min". It is stored as Uniform once it is trained.
type RangeWeight struct {
	Bits int // 2 to 8
}

var _ nn.Repr = RangeWeight{}

// Kind returns "rangeweight".
func (RangeWeight) Kind() string { return "rangeweight" }

// WeightBits are the grid's.
func (d RangeWeight) WeightBits() int { return d.Bits }

// Specs are the weight, ranges and minima.
func (d RangeWeight) Specs(w shapes.Shape) []nn.Spec {
	rows := shapes.Make(dtypes.Float32, w.Dimensions[0])
	return append(nn.Plain{}.Specs(w),
		nn.Spec{Name: "range", Shape: rows, Role: nn.Gain, Init: nn.Fill(1)},
		nn.Spec{Name: "min", Shape: rows, Role: nn.Gain})
}

// Value is the weight on its grid.
func (d RangeWeight) Value(c *nn.Ctx) *graph.Node {
	if err := checkBits(d.Bits); err != nil {
		panic(err)
	}
	w, rows := c.P("w"), []int{c.P("range").Shape().Size()}
	for range w.Rank() - 1 {
		rows = append(rows, 1)
	}
	return FakeQuantRange(w, graph.Reshape(c.P("range"), rows...), graph.Reshape(c.P("min"), rows...), d.Bits)
}

// RangeQuantize moves an activation in training to a grid of one learned range. Parameters: "range" and "min", of one
// element. It is stored as nn.QuantizeDequantize once it is trained.
type RangeQuantize struct {
	Bits int // 2 to 8
}

var (
	_ nn.Op         = RangeQuantize{}
	_ nn.Parametric = RangeQuantize{}
)

// Kind returns "rangequantize".
func (RangeQuantize) Kind() string { return "rangequantize" }

// Params are the range and the minimum.
func (RangeQuantize) Params([]shapes.Shape) []nn.Spec {
	one := shapes.Make(dtypes.Float32, 1)
	return []nn.Spec{{Name: "range", Shape: one, Role: nn.Gain, Init: nn.Fill(1)}, {Name: "min", Shape: one, Role: nn.Gain}}
}

// Lower quantises.
func (d RangeQuantize) Lower(c *nn.Ctx, x []*graph.Node) []*graph.Node {
	if err := checkBits(d.Bits); err != nil {
		panic(err)
	}
	rank := x[0].Rank()
	return []*graph.Node{FakeQuantRange(x[0], graph.ExpandLeftToRank(c.P("range"), rank), graph.ExpandLeftToRank(c.P("min"), rank), d.Bits)}
}

// putRanges puts a site's weight, and its input x, on grids of ranges that begin at the extremes: of each row, and of each
// case averaged. 32 bits leave either as it is. It returns the parameters that it made, by name: of the weight, and of the
// input.
func putRanges(net *nn.Network, n *nn.Node, x *tensors.Tensor, bits compress.Bits) (weight, input []string, err error) {
	w := net.Param(n, "w")
	if w == nil || !nn.IsPlain(n.Op) {
		return nil, nil, fmt.Errorf("its weight is stored as %s; only plain weights can be quantised", n.Op.(nn.Linear).Repr().Kind())
	}
	if bits.Act != 32 {
		r, m, err := MeanRange(nn.Floats(x), x.Shape().Dimensions[0])
		if err != nil {
			return nil, nil, fmt.Errorf("input: %w", err)
		}
		q, err := net.InsertBefore(n.Name, 0, freshName(net, n.In[0]+".ranged"), RangeQuantize{bits.Act})
		if err != nil {
			return nil, nil, err
		}
		net.SetParam(q, "range", nn.Gain, []float32{float32(r)}, 1)
		net.SetParam(q, "min", nn.Gain, []float32{float32(m)}, 1)
		input = []string{q.P["range"], q.P["min"]}
	}
	if bits.Weight != 32 {
		rows := w.Value.Shape().Dimensions[0]
		r, m, err := RowRanges(w.Data(), rows)
		if err != nil {
			return nil, nil, fmt.Errorf("weight: %w", err)
		}
		n.Op = n.Op.(nn.Linear).WithRepr(RangeWeight{bits.Weight})
		net.SetParam(n, "range", nn.Gain, narrow(r), rows)
		net.SetParam(n, "min", nn.Gain, narrow(m), rows)
		weight = []string{n.P["range"], n.P["min"]}
	}
	return weight, input, nil
}

// FreezeRanges stores, in place, what was trained on learned ranges: weights as Uniform, activations as
// nn.QuantizeDequantize. The network then computes the same, but for values halfway between two grid points.
func FreezeRanges(net *nn.Network) error {
	ranges := func(n *nn.Node, bits, axis int) (Affine, error) {
		r, m := net.Param(n, "range"), net.Param(n, "min")
		if r == nil || m == nil {
			return Affine{}, fmt.Errorf("quant: node %q has no range or no minimum", n.Name)
		}
		g, err := RangeGrid(widen(r.Data()), widen(m.Data()), bits, axis)
		if err != nil {
			return g, fmt.Errorf("node %q: %w", n.Name, err)
		}
		for _, local := range []string{"range", "min"} {
			if !net.SharedParam(n, local) {
				net.Params.Delete(n.P[local])
			}
			delete(n.P, local)
		}
		return g, nil
	}
	for _, n := range net.Nodes {
		if op, ok := n.Op.(RangeQuantize); ok {
			g, err := ranges(n, op.Bits, -1)
			if err != nil {
				return err
			}
			n.Op = nn.QuantizeDequantize{Bits: op.Bits}
			net.SetParam(n, "scale", nn.Constant, narrow(g.Scale), 1)
			net.SetParam(n, "zero", nn.Constant, narrow(g.Zero), 1)
		}
		l, ok := n.Op.(nn.Linear)
		if !ok {
			continue
		}
		if r, ok := l.Repr().(RangeWeight); ok {
			g, err := ranges(n, r.Bits, 0)
			if err != nil {
				return err
			}
			w := net.Param(n, "w")
			if w == nil {
				return fmt.Errorf("quant: node %q has no weight", n.Name)
			}
			form, params, err := g.Store(w.Data(), w.Value.Shape().Dimensions)
			if err != nil {
				return fmt.Errorf("node %q: %w", n.Name, err)
			}
			if err := install(net, n, form, params); err != nil {
				return err
			}
		}
	}
	return net.Check()
}

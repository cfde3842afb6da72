package nn

import (
	"cmp"
	"fmt"

	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
)

// RecurrentNorm says where a recurrent layer applies layer normalisation (Ba, Kiros, Hinton, arXiv:1607.06450,
// supplementary eqs. 20-28). The zero value is the plain network.
type RecurrentNorm struct {
	Input     bool    // to the summed inputs W x
	Recurrent bool    // to the summed inputs U h
	Cell      bool    // to the cell state on its way to the output (LSTM)
	Gain      float32 // initial gain; 0: 1 (the paper takes 0.1 for one generative model)
	Eps       float64 // inside the root; 0: 1e-5
}

// FullNorm normalises everywhere: the paper's LN-LSTM and LN-GRU.
var FullNorm = RecurrentNorm{Input: true, Recurrent: true, Cell: true}

func (r RecurrentNorm) specs(on bool, suffix string, size int) []Spec {
	if !on {
		return nil
	}
	gain := r.Gain
	if gain == 0 {
		gain = 1
	}
	return []Spec{{"g" + suffix, f32(size), Gain, Fill(gain)}, {"b" + suffix, f32(size), Bias, nil}}
}

func (r RecurrentNorm) apply(c *Ctx, v *graph.Node, on bool, suffix string) *graph.Node {
	if !on {
		return v
	}
	return Standardize(v, c.P("g"+suffix), c.P("b"+suffix), cmp.Or(r.Eps, 1e-5), true, -1)
}

// LSTM runs a long short-term memory over x [batch, time, in], gates in the order i, f, o, g:
//
//	p   = LN(W x_t; gx,bx) + LN(U h_{t-1}; gh,bh) + b     one LN over the four gates as one vector
//	c_t = σ(f)·c_{t-1} + σ(i)·tanh(g)
//	h_t = σ(o)·tanh(LN(c_t; gc,bc))                       c_t itself stays un-normalised
//
// Inputs: x, and optionally a mask [batch, time] (1 = valid; a masked step repeats h and c), h0 and c0 [batch, hidden]
// (zero if absent; pass "" for an absent one in front of a present one). Outputs: all h and all c, [batch, time,
// hidden]. Parameters: w [4·hidden, in], u [4·hidden, hidden], b [4·hidden] and the norms' gains and biases.
//
// A row of zeros with h0 = 0 has no variance, so every norm multiplies its gradient by 1/√eps; many such steps in
// front of a sequence overflow. Standardise inputs, or mask such steps.
type LSTM struct {
	Hidden int
	Norm   RecurrentNorm
}

// Kind returns "lstm".
func (LSTM) Kind() string { return "lstm" }

// NumOut is 2: h and c.
func (LSTM) NumOut() int { return 2 }

// Params are the weights; recurrent blocks start orthogonal, one per gate.
func (d LSTM) Params(in []shapes.Shape) []Spec {
	i, h := recurrentSizes(in, d.Hidden)
	s := []Spec{
		{"w", f32(4*h, i), Weight, FanIn(i, 1)}, {"u", f32(4*h, h), Weight, OrthogonalBlocks(4*h, h)}, {"b", f32(4 * h), Bias, nil},
	}
	s = append(s, d.Norm.specs(d.Norm.Input, "x", 4*h)...)
	s = append(s, d.Norm.specs(d.Norm.Recurrent, "h", 4*h)...)
	return append(s, d.Norm.specs(d.Norm.Cell, "c", h)...)
}

// Lower unrolls the steps.
func (d LSTM) Lower(c *Ctx, in []*graph.Node) []*graph.Node {
	x, mask, h, cell := recurrentInputs(in, d.Hidden, true)
	n := d.Hidden
	u, b := c.P("u"), c.P("b")
	px := d.Norm.apply(c, project(x, c.P("w")), d.Norm.Input, "x") // every step's input part at once
	var hs, cs []*graph.Node
	for t := range x.Shape().Dimensions[1] {
		p := graph.Add(step(px, t), d.Norm.apply(c, project(h, u), d.Norm.Recurrent, "h"))
		p = graph.Add(p, graph.ExpandLeftToRank(b, 2))
		gate := func(k int) *graph.Node { return graph.SliceAxis(p, -1, graph.AxisRange(k*n, (k+1)*n)) }
		next := graph.Add(graph.Mul(graph.Sigmoid(gate(1)), cell), graph.Mul(graph.Sigmoid(gate(0)), graph.Tanh(gate(3))))
		cell = masked(mask, t, next, cell)
		h = masked(mask, t, graph.Mul(graph.Sigmoid(gate(2)), graph.Tanh(d.Norm.apply(c, cell, d.Norm.Cell, "c"))), h)
		hs, cs = append(hs, h), append(cs, cell)
	}
	return []*graph.Node{graph.Stack(hs, 1), graph.Stack(cs, 1)}
}

// MACs counts the two products of every step.
func (d LSTM) MACs(in, _ []shapes.Shape) int64 {
	s := in[0].Dimensions
	return int64(s[0]) * int64(s[1]) * int64(4*d.Hidden) * int64(s[2]+d.Hidden)
}

// GRU runs a gated recurrent unit over x [batch, time, in], gates in the order r, u:
//
//	p    = LN(W x_t + b; gx,bx) + LN(U h; gh,bh);  r,u = σ(split(p))
//	cand = tanh( LN(Wc x_t + bc; gxc,bxc) + r·LN(Uc h; ghc,bhc) )
//	h_t  = u·h_{t-1} + (1−u)·cand
//
// Inputs: x, and optionally a mask [batch, time] and h0 [batch, hidden], as for LSTM. Output: all h [batch, time,
// hidden]. Parameters: w [2·hidden, in], u [2·hidden, hidden], b, wc [hidden, in], uc [hidden, hidden], bc and the
// norms' gains and biases.
type GRU struct {
	Hidden int
	Norm   RecurrentNorm // Cell has no meaning here
}

// Kind returns "gru".
func (GRU) Kind() string { return "gru" }

// Params are the weights; recurrent blocks start orthogonal, one per gate.
func (d GRU) Params(in []shapes.Shape) []Spec {
	i, h := recurrentSizes(in, d.Hidden)
	s := []Spec{
		{"w", f32(2*h, i), Weight, FanIn(i, 1)},
		{"u", f32(2*h, h), Weight, OrthogonalBlocks(2*h, h)},
		{"b", f32(2 * h), Bias, nil},
		{"wc", f32(h, i), Weight, FanIn(i, 1)},
		{"uc", f32(h, h), Weight, OrthogonalBlocks(h, h)},
		{"bc", f32(h), Bias, nil},
	}
	s = append(s, d.Norm.specs(d.Norm.Input, "x", 2*h)...)
	s = append(s, d.Norm.specs(d.Norm.Input, "xc", h)...)
	s = append(s, d.Norm.specs(d.Norm.Recurrent, "h", 2*h)...)
	return append(s, d.Norm.specs(d.Norm.Recurrent, "hc", h)...)
}

// Lower unrolls the steps.
func (d GRU) Lower(c *Ctx, in []*graph.Node) []*graph.Node {
	x, mask, h, _ := recurrentInputs(in, d.Hidden, false)
	n := d.Hidden
	bias := func(v *graph.Node, b string) *graph.Node {
		return graph.Add(v, graph.ExpandLeftToRank(c.P(b), v.Rank()))
	}
	px := d.Norm.apply(c, bias(project(x, c.P("w")), "b"), d.Norm.Input, "x")
	pc := d.Norm.apply(c, bias(project(x, c.P("wc")), "bc"), d.Norm.Input, "xc")
	u, uc := c.P("u"), c.P("uc")
	var hs []*graph.Node
	for t := range x.Shape().Dimensions[1] {
		p := graph.Sigmoid(graph.Add(step(px, t), d.Norm.apply(c, project(h, u), d.Norm.Recurrent, "h")))
		reset, update := graph.SliceAxis(p, -1, graph.AxisRange(0, n)), graph.SliceAxis(p, -1, graph.AxisRange(n, 2*n))
		rec := d.Norm.apply(c, project(h, uc), d.Norm.Recurrent, "hc")
		cand := graph.Tanh(graph.Add(step(pc, t), graph.Mul(reset, rec)))
		next := graph.Add(graph.Mul(update, h), graph.Mul(graph.OneMinus(update), cand))
		h = masked(mask, t, next, h)
		hs = append(hs, h)
	}
	return []*graph.Node{graph.Stack(hs, 1)}
}

// MACs counts the products of every step.
func (d GRU) MACs(in, _ []shapes.Shape) int64 {
	s := in[0].Dimensions
	return int64(s[0]) * int64(s[1]) * int64(3*d.Hidden) * int64(s[2]+d.Hidden)
}

func recurrentSizes(in []shapes.Shape, hidden int) (i, h int) {
	if hidden < 1 {
		panic(fmt.Errorf("hidden size is %d, want at least 1", hidden))
	}
	if len(in) < 1 {
		panic(fmt.Errorf("there is no input"))
	}
	wantRank(in[0], 3, 3)
	return in[0].Dimensions[2], hidden
}

// recurrentInputs checks x, mask, h0 (and c0) and fills in zero states.
func recurrentInputs(in []*graph.Node, hidden int, cell bool) (x, mask, h, c *graph.Node) {
	at := func(i int) *graph.Node {
		if i < len(in) {
			return in[i]
		}
		return nil
	}
	x, mask, h = in[0], at(1), at(2)
	if cell {
		c = at(3)
	}
	s := x.Shape().Dimensions
	if x.Rank() != 3 {
		panic(fmt.Errorf("x is %s, want [batch, time, in]", x.Shape()))
	}
	if mask != nil && (mask.Rank() != 2 || mask.Shape().Dimensions[0] != s[0] || mask.Shape().Dimensions[1] != s[1]) {
		panic(fmt.Errorf("mask is %s, want [batch %d, time %d]", mask.Shape(), s[0], s[1]))
	}
	state := func(v *graph.Node, name string) *graph.Node {
		if v == nil {
			return graph.Zeros(x.Graph(), shapes.Make(x.DType(), s[0], hidden))
		}
		if v.Rank() != 2 || v.Shape().Dimensions[0] != s[0] || v.Shape().Dimensions[1] != hidden {
			panic(fmt.Errorf("%s is %s, want [batch %d, hidden %d]", name, v.Shape(), s[0], hidden))
		}
		return v
	}
	h = state(h, "h0")
	if cell {
		c = state(c, "c0")
	}
	return x, mask, h, c
}

// project multiplies the last axis of v by w [out, in].
func project(v, w *graph.Node) *graph.Node {
	d := v.Shape().Dimensions
	k := d[len(d)-1]
	y := graph.Dot(graph.Reshape(v, v.Shape().Size()/max(k, 1), k), w).General([]int{1}, nil, []int{1}, nil)
	if len(d) == 2 {
		return y
	}
	return graph.Reshape(y, d[0], d[1], w.Shape().Dimensions[0])
}

// step is v [batch, time, n] at one time.
func step(v *graph.Node, t int) *graph.Node {
	d := v.Shape().Dimensions
	return graph.Reshape(graph.SliceAxis(v, 1, graph.AxisElem(t)), d[0], d[2])
}

// masked is m·next + (1−m)·old with the mask of one time.
func masked(mask *graph.Node, t int, next, old *graph.Node) *graph.Node {
	if mask == nil {
		return next
	}
	m := graph.Reshape(graph.SliceAxis(mask, 1, graph.AxisElem(t)), next.Shape().Dimensions[0], 1)
	if m.DType() != next.DType() {
		m = graph.ConvertDType(m, next.DType())
	}
	return graph.Add(graph.Mul(m, next), graph.Mul(graph.OneMinus(m), old))
}

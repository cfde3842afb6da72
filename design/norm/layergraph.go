package norm

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"slices"
	"strings"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"

	"github.com/lathe-ml/lathe/nn"
)

// LayerGraph is a normalisation-activation layer as a graph of basic functions: the genotype of the evolution of
// arXiv:2004.02967, section 3.1. Values 0 to 3 are x, zeros, v0 (one per channel, trained, from 0) and v1 (from 1); every
// node makes the next value from earlier ones, and the last is the layer's output, to which gain and bias are applied.
// Its JSON form is {"nodes": [{"op": "std", "in": [0], "I": "bwh"}, …]}; reading refuses what Check refuses.
type LayerGraph struct {
	Nodes []GNode `json:"nodes"`
}

// GNode is one primitive of a LayerGraph:
//
//	two inputs   add, mul, div, max
//	one input    neg, sigmoid, tanh, exp, log (sgn(x)·ln|x|), abs, square, sqrt (sgn(x)·√|x|)
//	one, over I  mean, rms (√ of the mean of squares), std (√ of the biased variance); I is bwh, wh, whc or whc/g
//
// Roots and logarithms add ε to their argument, a quotient adds ε·sgn to its divisor.
type GNode struct {
	Op string `json:"op"`
	In []int  `json:"in"`
	I  string `json:"I,omitempty"` // index set of a moment
	// Key is the number under which a bwh moment keeps its running value, that of the node before pruning; 0: its own.
	Key int `json:"key,omitempty"`
}

// The initial values of a graph.
const (
	valueX = iota
	valueZero
	valueV0
	valueV1
	initialValues
)

// MaxLayerNodes is the number of nodes that a LayerGraph may have; the paper's have ten.
const MaxLayerNodes = 64

var (
	binaryPrimitives = []string{"add", "mul", "div", "max"}
	unaryPrimitives  = []string{"neg", "sigmoid", "tanh", "exp", "log", "abs", "square", "sqrt"}
	momentPrimitives = []string{"mean", "rms", "std"}
	indexSets        = []string{"bwh", "wh", "whc", "whc/g"}
	primitives       = slices.Concat(binaryPrimitives, unaryPrimitives, momentPrimitives)
)

// arity is the number of inputs of a primitive, 0 when there is none of that name.
func arity(op string) int {
	switch {
	case slices.Contains(binaryPrimitives, op):
		return 2
	case slices.Contains(primitives, op):
		return 1
	}
	return 0
}

func isMoment(op string) bool { return slices.Contains(momentPrimitives, op) }

// Check refuses a graph without nodes or with more than MaxLayerNodes, unknown primitives and index sets, a wrong number
// of inputs, an input that is not an earlier value, running values that clash, and an output that does not depend on x.
func (l LayerGraph) Check() error {
	if n := len(l.Nodes); n == 0 || n > MaxLayerNodes {
		return fmt.Errorf("layer graph: %d nodes; want 1 to %d", n, MaxLayerNodes)
	}
	keys := map[int]bool{}
	for i, n := range l.Nodes {
		at := i + initialValues
		switch want := arity(n.Op); {
		case want == 0:
			return fmt.Errorf("layer graph: node %d: there is no primitive %.40q; use one of %s", at, n.Op, strings.Join(primitives, ", "))
		case len(n.In) != want:
			return fmt.Errorf("layer graph: node %d: %s takes %d inputs, got %d", at, n.Op, want, len(n.In))
		case isMoment(n.Op) && !slices.Contains(indexSets, n.I):
			return fmt.Errorf("layer graph: node %d: there is no index set %.40q; use one of %s", at, n.I, strings.Join(indexSets, ", "))
		case !isMoment(n.Op) && n.I != "":
			return fmt.Errorf("layer graph: node %d: %s has no index set", at, n.Op)
		}
		for _, in := range n.In {
			if in < 0 || in >= at {
				return fmt.Errorf("layer graph: node %d: input %d is not an earlier value (0 to %d)", at, in, at-1)
			}
		}
		if n.Key != 0 && (n.Key < initialValues || n.Key > 1<<20) {
			return fmt.Errorf("layer graph: node %d: key %d is no node's number", at, n.Key)
		}
		if keys[l.key(i)] {
			return fmt.Errorf("layer graph: node %d: key %d is another node's", at, l.key(i))
		}
		keys[l.key(i)] = true
	}
	if !l.live()[valueX] {
		return errIndependent
	}
	return nil
}

var errIndependent = errors.New("layer graph: the output does not depend on x")

// UsesBatch says whether the output depends on a moment over the batch: such a layer keeps running values.
func (l LayerGraph) UsesBatch() bool {
	live := l.live()
	for i, n := range l.Nodes {
		if live[i+initialValues] && n.I == "bwh" {
			return true
		}
	}
	return false
}

// uses says whether a node reads the value.
func (l LayerGraph) uses(value int) bool {
	return slices.ContainsFunc(l.Nodes, func(n GNode) bool { return slices.Contains(n.In, value) })
}

func (l LayerGraph) key(node int) int { return cmp.Or(l.Nodes[node].Key, node+initialValues) }

// live says of every value whether the output depends on it.
func (l LayerGraph) live() []bool {
	live := make([]bool, len(l.Nodes)+initialValues)
	live[len(live)-1] = true
	for i, n := range slices.Backward(l.Nodes) {
		if live[i+initialValues] {
			for _, in := range n.In {
				live[in] = true
			}
		}
	}
	return live
}

// Prune drops the nodes on which the output does not depend. The others keep their keys, and with them the running
// values of a network that was trained with the whole graph.
func (l LayerGraph) Prune() LayerGraph {
	live := l.live()
	place := []int{valueX, valueZero, valueV0, valueV1}
	var out LayerGraph
	for i, n := range l.Nodes {
		place = append(place, len(out.Nodes)+initialValues)
		if !live[i+initialValues] {
			continue
		}
		m := GNode{Op: n.Op, I: n.I, Key: l.key(i)}
		if m.Key == len(out.Nodes)+initialValues {
			m.Key = 0
		}
		for _, in := range n.In {
			m.In = append(m.In, place[in])
		}
		out.Nodes = append(out.Nodes, m)
	}
	return out
}

// Canonical is a short text that graphs of one meaning share: it disregards dead nodes, the order of independent nodes
// and of the inputs of add, mul and max, and repeated nodes.
func (l LayerGraph) Canonical() string {
	sums := []string{"x", "0", "v0", "v1"}
	for _, n := range l.Nodes {
		var in []string
		for _, i := range n.In {
			in = append(in, sums[i])
		}
		if n.Op != "div" {
			slices.Sort(in)
		}
		h := fnv.New128a()
		fmt.Fprint(h, n.Op, "|", n.I, "|", in)
		sums = append(sums, fmt.Sprintf("%x", h.Sum(nil)))
	}
	return sums[len(sums)-1]
}

// Clone copies the graph.
func (l LayerGraph) Clone() LayerGraph {
	c := LayerGraph{slices.Clone(l.Nodes)}
	for i := range c.Nodes {
		c.Nodes[i].In = slices.Clone(c.Nodes[i].In)
	}
	return c
}

// UnmarshalJSON reads a graph from outside and refuses what Check refuses, and unknown fields.
func (l *LayerGraph) UnmarshalJSON(b []byte) error {
	type plain LayerGraph
	var p plain
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&p); err != nil {
		return fmt.Errorf("layer graph: %w", err)
	}
	if err := LayerGraph(p).Check(); err != nil {
		return err
	}
	*l = LayerGraph(p)
	return nil
}

// Formula writes the layer as an equation: "x / max(std[bwh](x), v1·x + std[wh](x))". A part that occurs more than once
// is named, and the names are explained behind "where".
func (l LayerGraph) Formula() string {
	l = l.Prune()
	if len(l.Nodes) == 0 {
		return "x"
	}
	uses := make([]int, len(l.Nodes)+initialValues)
	for _, n := range l.Nodes {
		for _, in := range n.In {
			uses[in]++
		}
	}
	// The strength of a text: 0 sums, 1 products and quotients, 2 what needs no brackets.
	text, strength := []string{"x", "0", "v0", "v1"}, []int{2, 2, 2, 2}
	var where []string
	at := func(v, least int) string {
		if strength[v] < least {
			return "(" + text[v] + ")"
		}
		return text[v]
	}
	for i, n := range l.Nodes {
		s, p := "", 2
		a := n.In[0]
		switch n.Op {
		case "add":
			if b, ok := strings.CutPrefix(text[n.In[1]], "−"); ok && strength[n.In[1]] == 1 {
				s, p = at(a, 0)+" − "+b, 0
			} else {
				s, p = at(a, 0)+" + "+at(n.In[1], 0), 0
			}
		case "mul":
			s, p = at(a, 1)+"·"+at(n.In[1], 2), 1
		case "div":
			s, p = at(a, 1)+" / "+at(n.In[1], 2), 1
		case "max":
			s = "max(" + text[a] + ", " + text[n.In[1]] + ")"
		case "neg":
			s, p = "−"+at(a, 2), 1
		case "sigmoid":
			s = "σ(" + text[a] + ")"
		case "abs":
			s = "|" + text[a] + "|"
		case "square":
			s = at(a, 2) + "²"
			if strings.HasSuffix(text[a], "²") {
				s = "(" + text[a] + ")²"
			}
		case "sqrt":
			s = "√(" + text[a] + ")"
		case "mean", "rms", "std":
			s = n.Op + "[" + n.I + "](" + text[a] + ")"
		default:
			s = n.Op + "(" + text[a] + ")"
		}
		if uses[i+initialValues] > 1 && i < len(l.Nodes)-1 {
			name := string(rune('a' + len(where)%20))
			if len(where) >= 20 {
				name += fmt.Sprint(len(where) / 20)
			}
			where = append(where, name+" = "+s)
			s, p = name, 2
		}
		text, strength = append(text, s), append(strength, p)
	}
	f := text[len(text)-1]
	if len(where) > 0 {
		f += "  where " + strings.Join(where, ", ")
	}
	return f
}

// Build gives the layer as an op for a norm slot that contains its activation. It refuses a graph that Check refuses and
// options outside their ranges.
func (l LayerGraph) Build(o EvoOptions) (nn.Norm, error) {
	if err := l.Check(); err != nil {
		return nil, err
	}
	if err := o.check(); err != nil {
		return nil, fmt.Errorf("layer graph: %w", err)
	}
	return GraphNorm{Layer: l.Clone(), Groups: o.Groups, Eps: o.Eps, Decay: o.Decay, Linear: o.Linear, ZeroGain: o.ZeroGain}, nil
}

// GraphNorm is a LayerGraph at a norm slot, over maps [batch, height, width, channels]: y = gain·layer(x) + bias.
// Parameters: "w" (1), "b" (0), "v0" (0) and "v1" (1) where the graph has them, and for every moment over the batch its
// running value "m" + key: of the mean, the mean square or the variance before the root, from 0, 1 and 1. While training
// the moments of the batch count and move the running values; at inference the running values stand for them. The other
// fields are those of EvoOptions.
type GraphNorm struct {
	Layer    LayerGraph
	Groups   int
	Eps      float64
	Decay    float64
	Linear   bool
	ZeroGain bool
}

var _ nn.Norm = GraphNorm{}

// Kind returns "layergraph".
func (GraphNorm) Kind() string { return "layergraph" }

// AsLinear is the same layer with only its gain and bias.
func (d GraphNorm) AsLinear() nn.Norm { d.Linear = true; return d }

func (d GraphNorm) options() EvoOptions {
	return EvoOptions{Groups: d.Groups, Eps: d.Eps, Decay: d.Decay, Linear: d.Linear, ZeroGain: d.ZeroGain}
}

// Params are gain, bias, the graph's per-channel values and its running moments.
func (d GraphNorm) Params(in []shapes.Shape) []nn.Spec {
	specs := d.options().affineSpecs(in[0])
	if err := d.Layer.Check(); err != nil {
		panic(err)
	}
	if d.Linear {
		return specs
	}
	n := shapes.Make(dtypes.Float32, in[0].Dimensions[3])
	for i, name := range []string{"v0", "v1"} {
		if d.Layer.uses(valueV0 + i) {
			specs = append(specs, nn.Spec{Name: name, Shape: n, Role: nn.Gain, Init: nn.Fill(float32(i))})
		}
	}
	for i, g := range d.Layer.Nodes {
		if g.I == "bwh" {
			fill := float32(1)
			if g.Op == "mean" {
				fill = 0
			}
			specs = append(specs, nn.Spec{Name: d.running(i), Shape: n, Role: nn.State, Init: nn.Fill(fill)})
		}
	}
	return specs
}

func (d GraphNorm) running(node int) string { return fmt.Sprintf("m%d", d.Layer.key(node)) }

// Lower computes the graph. Values keep axes of size 1 along which they are constant and meet x's shape at the end.
func (d GraphNorm) Lower(c *nn.Ctx, xs []*graph.Node) []*graph.Node {
	if d.Linear {
		return []*graph.Node{affine(c, xs[0])}
	}
	o := d.options()
	x, back := wide(xs[0])
	g, dtype, eps := x.Graph(), x.DType(), o.epsilon()
	groups := groupsOf(o.groups(), x.Shape().Dimensions[3])
	p := func(local string) *graph.Node {
		v := c.P(local)
		if v == nil {
			return nil
		}
		return perChannel(graph.ConvertDType(v, dtype), x)
	}
	values := []*graph.Node{x, graph.Zeros(g, shapes.Make(dtype, 1, 1, 1, 1)), p("v0"), p("v1")}
	sign := func(v *graph.Node) *graph.Node { // ±ε, +ε at 0
		e := graph.Scalar(g, dtype, eps)
		return graph.Where(graph.GreaterOrEqual(v, graph.ZerosLike(v)), graph.BroadcastToShape(e, v.Shape()), graph.BroadcastToShape(graph.Neg(e), v.Shape()))
	}
	shifted := func(v *graph.Node) *graph.Node { return graph.AddScalar(v, eps) }
	for i, n := range d.Layer.Nodes {
		a := values[n.In[0]]
		var y *graph.Node
		switch n.Op {
		case "add", "mul", "div", "max":
			l, r := nn.Broadcast(a, values[n.In[1]])
			switch n.Op {
			case "add":
				y = graph.Add(l, r)
			case "mul":
				y = graph.Mul(l, r)
			case "div":
				y = graph.Div(l, graph.Add(r, sign(r)))
			case "max":
				y = graph.Max(l, r)
			}
		case "neg":
			y = graph.Neg(a)
		case "sigmoid":
			y = graph.Sigmoid(a)
		case "tanh":
			y = graph.Tanh(a)
		case "exp":
			y = graph.Exp(a)
		case "log":
			y = graph.Mul(graph.Sign(a), graph.Log(shifted(graph.Abs(a))))
		case "abs":
			y = graph.Abs(a)
		case "square":
			y = graph.Mul(a, a)
		case "sqrt":
			y = graph.Mul(graph.Sign(a), graph.Sqrt(shifted(graph.Abs(a))))
		case "mean", "rms", "std":
			y = d.moment(c, i, a, groups)
			if n.Op != "mean" {
				y = graph.Sqrt(shifted(y))
			}
		default:
			panic(fmt.Errorf("there is no primitive %q", n.Op))
		}
		values = append(values, y)
	}
	y := values[len(values)-1]
	if !slices.Equal(y.Shape().Dimensions, x.Shape().Dimensions) {
		y = graph.BroadcastToDims(y, x.Shape().Dimensions...)
	}
	return []*graph.Node{affine(c, back(y))}
}

// moment is that of a node, before the root: of the batch or, over the batch and at inference, the running value.
func (d GraphNorm) moment(c *nn.Ctx, node int, a *graph.Node, groups int) *graph.Node {
	n := d.Layer.Nodes[node]
	if n.I != "bwh" {
		return moment(n.Op, n.I, a, groups)
	}
	old := graph.ConvertDType(c.P(d.running(node)), a.DType())
	channels := old.Shape().Dimensions[0]
	if !c.Training {
		return graph.Reshape(old, 1, 1, 1, channels)
	}
	m := moment(n.Op, n.I, a, groups)
	now := graph.Reshape(graph.BroadcastToDims(m, 1, 1, 1, channels), channels)
	c.Set(d.running(node), graph.StopGradient(mix(old, now, d.options().decay())))
	return m
}

// GraphOf gives layers as graphs: the paper's b0, b2, s0, s1, s2 (b1 adds a constant that no graph has), and bn-relu,
// gn-relu, bn-silu, relu and square, which is what a stability test must refuse.
func GraphOf(name string) (LayerGraph, error) {
	type n = GNode
	in := func(v ...int) []int { return v }
	std := func(over string) GNode { return n{Op: "std", In: in(valueX), I: over} }
	centred := func(over string, tail ...GNode) []GNode { // value 7 is (x − mean)/std
		return append([]GNode{{Op: "mean", In: in(valueX), I: over}, {Op: "neg", In: in(4)}, {Op: "add", In: in(valueX, 5)}, std(over), {Op: "div", In: in(6, 7)}}, tail...)
	}
	graphs := map[string][]GNode{
		"b0":      {std("bwh"), std("wh"), {Op: "mul", In: in(valueX, valueV1)}, {Op: "add", In: in(5, 6)}, {Op: "max", In: in(4, 7)}, {Op: "div", In: in(valueX, 8)}},
		"b2":      {std("bwh"), {Op: "rms", In: in(valueX), I: "wh"}, {Op: "neg", In: in(valueX)}, {Op: "add", In: in(5, 6)}, {Op: "max", In: in(4, 7)}, {Op: "div", In: in(valueX, 8)}},
		"s0":      {{Op: "mul", In: in(valueX, valueV1)}, {Op: "sigmoid", In: in(4)}, {Op: "mul", In: in(valueX, 5)}, std("whc/g"), {Op: "div", In: in(6, 7)}},
		"s1":      {{Op: "sigmoid", In: in(valueX)}, {Op: "mul", In: in(valueX, 4)}, std("whc/g"), {Op: "div", In: in(5, 6)}},
		"s2":      {{Op: "sigmoid", In: in(valueX)}, {Op: "mul", In: in(valueX, 4)}, {Op: "rms", In: in(valueX), I: "whc/g"}, {Op: "div", In: in(5, 6)}},
		"bn-relu": centred("bwh", n{Op: "max", In: in(8, valueZero)}),
		"gn-relu": centred("whc/g", n{Op: "max", In: in(8, valueZero)}),
		"bn-silu": centred("bwh", n{Op: "sigmoid", In: in(8)}, n{Op: "mul", In: in(8, 9)}),
		"relu":    {{Op: "max", In: in(valueX, valueZero)}},
		"square":  {{Op: "square", In: in(valueX)}},
	}
	if g, ok := graphs[name]; ok {
		return LayerGraph{g}, nil
	}
	return LayerGraph{}, fmt.Errorf("norm: there is no layer graph %q; use b0, b2, s0, s1, s2, bn-relu, gn-relu, bn-silu, relu or square", name)
}

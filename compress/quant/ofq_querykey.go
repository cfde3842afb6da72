package quant

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"github.com/gomlx/compute"
	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/nn"
)

// Query-key reparameterisation (OFQ, arXiv:2302.02210, section 4.2): attention's logits need the query and key weights
// only in their product, so the product is what is quantised, and a weight of one that flips no longer disturbs the
// gradient of the other.

// QueryKey stacks the products of the query and key weights of all heads: Wq, Wk [heads·width, D] give P [heads·D, D],
//
//	P_h = Wq_hᵀ Wk_h,  row h·D + d of P: query-side channel d of head h
func QueryKey(wq, wk *graph.Node, heads int) *graph.Node {
	s := wq.Shape().Dimensions
	if wq.Rank() != 2 || !wq.Shape().Equal(wk.Shape()) || heads < 1 || s[0]%heads != 0 {
		panic(fmt.Errorf("query and key weights %s and %s do not divide into %d heads", wq.Shape(), wk.Shape(), heads))
	}
	split := func(w *graph.Node) *graph.Node { return graph.Reshape(w, heads, s[0]/heads, s[1]) }
	p := graph.Dot(split(wq), split(wk)).General([]int{1}, []int{0}, []int{1}, []int{0}) // [heads, D, D]
	return graph.Reshape(p, heads*s[1], s[1])
}

// QKRLogits are attention logits [batch, heads, queries, keys] by the product of query and key weights, from x [batch,
// tokens, D] without biases: x P_h xᵀ/√width, P quantised by StatsQ, or as it is when bits is 0. It also returns P and
// what is used of it.
func QKRLogits(x, wq, wk *graph.Node, heads, bits int) (logits, p, pq *graph.Node) {
	p = QueryKey(wq, wk, heads)
	if pq = p; bits != 0 {
		pq, _ = StatsQ(p, bits)
	}
	d := x.Shape().Dimensions
	if x.Rank() != 3 || d[2] != p.Shape().Dimensions[1] {
		panic(fmt.Errorf("tokens %s do not fit weights %s", x.Shape(), wq.Shape()))
	}
	u := graph.Dot(graph.Reshape(x, d[0]*d[1], d[2]), pq).General([]int{1}, nil, []int{1}, nil)
	u = graph.Reshape(u, d[0], d[1], heads, d[2])                            // [batch, keys, heads, D]
	logits = graph.Dot(x, u).General([]int{2}, []int{0}, []int{3}, []int{0}) // [batch, queries, keys, heads]
	width := float64(wq.Shape().Dimensions[0] / heads)
	return graph.Mul(graph.TransposeAllAxes(logits, 0, 3, 1, 2), graph.Sqrt(graph.Scalar(x.Graph(), x.DType(), 1/width))), p, pq
}

// QueryKeyWeight is a Latent whose weight, of heads·D outputs and D inputs, is the product of latent query and key
// weights, quantised by StatsQ. Parameters: "wq" and "wk" [Heads·Width, D]. It is stored as Uniform: the product alone.
type QueryKeyWeight struct {
	Heads, Width int
	Bits         int     // 1 to 8
	Boundary     float64 // confidence-guided annealing: products further from a threshold get no gradient; 0: off
}

var (
	_ Latent     = QueryKeyWeight{}
	_ storedBits = QueryKeyWeight{}
	_ coded      = QueryKeyWeight{}
)

// Kind returns "querykeyweight".
func (QueryKeyWeight) Kind() string { return "querykeyweight" }

// WeightBits are the grid's.
func (d QueryKeyWeight) WeightBits() int { return d.Bits }

// Specs are the latent query and key weights.
func (d QueryKeyWeight) Specs(w shapes.Shape) []nn.Spec {
	in := w.Dimensions[len(w.Dimensions)-1]
	if w.Rank() != 2 || d.Heads < 1 || w.Dimensions[0] != d.Heads*in {
		panic(fmt.Errorf("a query-key product of %d heads over %d channels has %d rows, not %d", d.Heads, in, d.Heads*in, w.Dimensions[0]))
	}
	s := shapes.Make(dtypes.Float32, d.Heads*d.Width, in)
	init := nn.FanIn(in, 1)
	return []nn.Spec{{Name: "wq", Shape: s, Role: nn.Weight, Init: init}, {Name: "wk", Shape: s, Role: nn.Weight, Init: init}}
}

// Value is the product on its grid.
func (d QueryKeyWeight) Value(c *nn.Ctx) *graph.Node {
	p := QueryKey(c.P("wq"), c.P("wk"), d.Heads)
	if d.Boundary > 0 {
		near := cgaMask(p, d.Bits, d.Boundary)
		p = graph.IdentityWithCustomGradient(p, func(_, v *graph.Node) *graph.Node { return graph.Mul(v, near) })
	}
	q, _ := StatsQ(p, d.Bits)
	return q
}

// Start fails: a product does not say what it was made of.
func (d QueryKeyWeight) Start(*Site) (map[string][]float32, error) {
	return nil, errors.New("a query-key product starts from two weights")
}

func (d QueryKeyWeight) product(l *Latents) []float32 {
	return queryKey(l.Values["wq"], l.Values["wk"], d.Heads, d.Width)
}

// Stored multiplies and rounds for good.
func (d QueryKeyWeight) Stored(l *Latents) (nn.Repr, map[string]*tensors.Tensor, error) {
	u, params, err := storeStats(d.product(l), l.Shape, d.Bits)
	return u, params, err
}

func (d QueryKeyWeight) codes(l *Latents) ([]int32, error) {
	_, k, err := StatsCodes(d.product(l), l.Shape[0], d.Bits, true)
	return k, err
}

// queryKey is QueryKey on the host.
func queryKey(wq, wk []float32, heads, width int) []float32 {
	in := len(wq) / (heads * width)
	out := make([]float32, heads*in*in)
	row := make([]float64, in)
	for h := range heads {
		for d := range in {
			clear(row)
			for r := range width {
				q := float64(wq[(h*width+r)*in+d])
				for e, k := range wk[(h*width+r)*in : (h*width+r+1)*in] {
					row[e] += q * float64(k)
				}
			}
			for e, v := range row {
				out[(h*in+d)*in+e] = float32(v)
			}
		}
	}
	return out
}

// queryKeySite is a product that has taken the place of a query and a key layer.
type queryKeySite struct {
	name, query, key string
	value            string // layer that took up the value rows of a layer that made all three; "": there was none
	heads, width     int
	wq, wk           []float32
}

// errNoProduct: the attention is not of the form that can be reparameterised.
var errNoProduct = errors.New("cannot multiply query and key weights")

// reparamQueryKey returns the network with an attention's logits, a product of two dense layers' outputs that are split
// into heads, written as x·(P x): a dense layer of plain weight P stands in front of the product. A key bias does not
// change the softmax behind and is dropped; a query bias becomes a term per key, b_qᵀWk x. One layer that makes
// queries, keys and values at once is taken apart. The result computes the same probabilities, to rounding. The error
// is errNoProduct where the attention is of another form.
func reparamQueryKey(b compute.Backend, float *nn.Network, name string) (*nn.Network, *queryKeySite, error) {
	no := func(format string, args ...any) (*nn.Network, *queryKeySite, error) {
		return nil, nil, fmt.Errorf("%w of %q: %s", errNoProduct, name, fmt.Sprintf(format, args...))
	}
	net := float.Clone()
	logits := net.Node(name)
	sh, err := net.Shapes(0)
	if err != nil {
		return nil, nil, err
	}
	op, ok := logits.Op.(nn.MatMul)
	out := sh[logits.Out[0]]
	if !ok || out.Rank() != 4 {
		return no("it is no product of heads")
	}
	probs := softmaxBehind(net, logits.Out[0], sh)
	if probs == nil {
		return no("no softmax reads it")
	}
	heads := out.Dimensions[1]
	q, err := operandRows(b, net, logits.In[0], sh, heads, false)
	if err != nil {
		return no("queries: %v", err)
	}
	k, err := operandRows(b, net, logits.In[1], sh, heads, true)
	if err != nil {
		return no("keys: %v", err)
	}
	x := q.layer.In[0]
	xs := sh[x]
	if k.layer.In[0] != x || xs.Rank() != 3 || k.width != q.width {
		return no("layers %q and %q do not read the same [batch, tokens, channels]", q.layer.Name, k.layer.Name)
	}
	d := xs.Dimensions[2]
	s := &queryKeySite{name: freshName(net, name+".qk"), query: q.layer.Name, key: k.layer.Name, heads: heads, width: q.width}
	var bq []float32
	s.wq, bq = q.rowsOf(net)
	s.wk, _ = k.rowsOf(net)
	insert := func(before *nn.Node, name string, op nn.Op, in ...string) *nn.Node {
		n := &nn.Node{Name: name, Op: op, In: in, Out: []string{name}, P: map[string]string{}}
		net.Nodes = slices.Insert(net.Nodes, slices.Index(net.Nodes, before), n)
		return n
	}
	if q.layer == k.layer { // values may come from it, too
		readers, isOutput := net.Readers(probs.Out[0])
		if len(readers) == 1 && !isOutput && len(readers[0].In) == 2 && readers[0].In[0] == probs.Out[0] {
			if v, err := operandRows(b, net, readers[0].In[1], sh, heads, false); err == nil && v.layer == q.layer && v.factor == 1 {
				s.value = freshName(net, q.layer.Name+".v")
				w, bias := v.rowsOf(net)
				n := insert(readers[0], s.value, nn.Dense{Out: heads * v.width, NoBias: bias == nil}, x)
				net.SetParam(n, "w", nn.Weight, w, heads*v.width, d)
				if bias != nil {
					net.SetParam(n, "b", nn.Bias, bias, len(bias))
				}
				split := insert(readers[0], freshName(net, s.value+".split"), nn.Reshape{Dims: []int{0, 0, heads, v.width}}, n.Name)
				readers[0].In[1] = insert(readers[0], freshName(net, s.value+".t"), nn.Transpose{Perm: []int{0, 2, 1, 3}}, split.Name).Name
			}
		}
	}
	scale := cmp.Or(op.Scale, 1) * q.factor * k.factor
	u := insert(logits, s.name, nn.Dense{Out: heads * d, NoBias: true}, x)
	net.SetParam(u, "w", nn.Weight, queryKey(s.wq, s.wk, heads, s.width), heads*d, d)
	split := insert(logits, freshName(net, s.name+".split"), nn.Reshape{Dims: []int{0, 0, heads, d}}, u.Name)
	turned := insert(logits, freshName(net, s.name+".t"), nn.Transpose{Perm: []int{0, 2, 3, 1}}, split.Name)
	wide := insert(logits, freshName(net, s.name+".x"), nn.Reshape{Dims: []int{0, 1, -1, d}}, x)
	logits.In = []string{wide.Name, turned.Name}
	logits.Op = nn.MatMul{Scale: scale}
	if slices.ContainsFunc(bq, func(v float32) bool { return v != 0 }) {
		term := make([]float32, heads*d)
		for r, v := range bq {
			for e := range d {
				term[r/s.width*d+e] += float32(scale) * v * s.wk[r*d+e]
			}
		}
		kb := insert(logits, freshName(net, s.name+".bias"), nn.Dense{Out: heads, NoBias: true}, x)
		net.SetParam(kb, "w", nn.Weight, term, heads, d)
		t := insert(logits, freshName(net, s.name+".bias.t"), nn.Transpose{Perm: []int{0, 2, 1}}, kb.Name)
		r := insert(logits, freshName(net, s.name+".bias.wide"), nn.Reshape{Dims: []int{0, heads, 1, -1}}, t.Name)
		sum := &nn.Node{Name: freshName(net, name+".biased"), Op: nn.Add, P: map[string]string{}}
		sum.Out = []string{sum.Name}
		net.ReplaceUses(logits.Out[0], sum.Name)
		sum.In = []string{logits.Out[0], r.Name}
		net.Nodes = slices.Insert(net.Nodes, slices.Index(net.Nodes, logits)+1, sum)
	}
	net.Prune()
	for _, layer := range []string{s.query, s.key} {
		if net.Node(layer) != nil {
			return no("what layer %q makes is used elsewhere, too", layer)
		}
	}
	return net, s, net.Check()
}

// operand is what a product reads of a dense layer: head h's element r is output rows[h·width+r] of the layer, times
// factor.
type operand struct {
	layer  *nn.Node
	rows   []int
	width  int
	factor float64
}

// rowsOf are the layer's weight and bias (nil: none) in the operand's order.
func (o *operand) rowsOf(net *nn.Network) (w, b []float32) {
	all := net.Param(o.layer, "w").Data()
	in := len(all) / o.layer.Op.(nn.Dense).Out
	for _, r := range o.rows {
		w = append(w, all[r*in:(r+1)*in]...)
	}
	if p := net.Param(o.layer, "b"); p != nil {
		d := p.Data()
		for _, r := range o.rows {
			b = append(b, d[r])
		}
	}
	return w, b
}

// operandRows goes back from an operand [batch, head, token, width], or [batch, head, width, token] when it is
// transposed, to the dense layer that makes it. What stands between may only move and choose elements, or multiply all
// of them by one factor; which goes where is found out by sending their numbers through.
func operandRows(b compute.Backend, net *nn.Network, value string, sh map[string]shapes.Shape, heads int, transposed bool) (*operand, error) {
	o := &operand{factor: 1}
	probe := &nn.Network{Outputs: []string{value}}
	for v := value; o.layer == nil; {
		p := net.Producer(v)
		if p == nil {
			return nil, errors.New("no dense layer makes them")
		}
		between := p
		switch op := p.Op.(type) {
		case nn.Dense:
			if !nn.IsPlain(p.Op) {
				return nil, fmt.Errorf("layer %q has no plain weight", p.Name)
			}
			o.layer = p
			continue
		case nn.Reshape, nn.Transpose, nn.Slice, nn.Split, nn.Gather, nn.Dropout, nn.DropPath:
		case nn.Affine:
			if op.Shift != 0 {
				return nil, fmt.Errorf("%q adds to them", p.Name)
			}
			o.factor *= op.Scale
			between = &nn.Node{Name: p.Name, Op: nn.Unary{Fn: "Identity"}, In: p.In, Out: p.Out, P: map[string]string{}}
		default:
			return nil, fmt.Errorf("a %s (%q) stands between", p.Op.Kind(), p.Name)
		}
		probe.Nodes = slices.Insert(probe.Nodes, 0, between)
		for _, extra := range p.In[1:] {
			c := net.Producer(extra)
			if c == nil {
				return nil, fmt.Errorf("%q depends on %q", p.Name, extra)
			}
			if k, ok := c.Op.(nn.Value); !ok || k.Batch {
				return nil, fmt.Errorf("%q depends on %q", p.Name, extra)
			}
			if !slices.Contains(probe.Nodes, c) {
				probe.Nodes = slices.Insert(probe.Nodes, 0, c)
				for _, full := range c.P {
					probe.Params.Put(net.Params.Get(full))
				}
			}
		}
		v = p.In[0]
	}
	made := sh[o.layer.Out[0]]
	if made.Rank() != 3 || made.Size() >= 1<<24 {
		return nil, fmt.Errorf("layer %q makes %s, not [batch, tokens, channels]", o.layer.Name, made)
	}
	tokens, outputs := made.Dimensions[1], made.Dimensions[2]
	probe.Inputs = []nn.Input{{Name: o.layer.Out[0], Shape: shapes.Make(dtypes.Float32, 1, tokens, outputs)}}
	ids := make([]float32, tokens*outputs)
	for i := range ids {
		ids[i] = float32(i)
	}
	run, err := probe.Run(b, []*tensors.Tensor{tensors.FromFlatDataAndDimensions(ids, 1, tokens, outputs)})
	if err != nil {
		return nil, err
	}
	s := run[0].Shape()
	if s.Rank() != 4 || s.Dimensions[0] != 1 || s.Dimensions[1] != heads {
		return nil, fmt.Errorf("they are %s, not split into %d heads", s, heads)
	}
	o.width = s.Dimensions[3]
	at := func(h, n, r int) int { return (h*tokens+n)*o.width + r }
	if transposed {
		o.width = s.Dimensions[2]
		at = func(h, n, r int) int { return (h*o.width+r)*tokens + n }
	}
	moved := nn.Floats(run[0])
	if len(moved) != heads*tokens*o.width {
		return nil, fmt.Errorf("they are %s for %d tokens", s, tokens)
	}
	for h := range heads {
		for r := range o.width {
			row := int(moved[at(h, 0, r)])
			for n := range tokens {
				if row >= outputs || int(moved[at(h, n, r)]) != n*outputs+row {
					return nil, errors.New("tokens and channels are mixed")
				}
			}
			o.rows = append(o.rows, row)
		}
	}
	return o, nil
}

// softmaxBehind follows a value through terms that are added and factors to a softmax over its last axis, which a term
// that is equal for all keys does not change; nil: there is none.
func softmaxBehind(net *nn.Network, value string, sh map[string]shapes.Shape) *nn.Node {
	for {
		readers, isOutput := net.Readers(value)
		if len(readers) != 1 || isOutput {
			return nil
		}
		switch op := readers[0].Op.(type) {
		case nn.Softmax:
			r := sh[value].Rank()
			if op.Log || op.Axis != 0 && op.Axis != -1 && op.Axis != r-1 {
				return nil
			}
			return readers[0]
		case nn.Affine, nn.CausalMask:
		case nn.Binary:
			if op != nn.Add || !slices.Equal(sh[readers[0].Out[0]].Dimensions, sh[value].Dimensions) {
				return nil
			}
		default:
			return nil
		}
		value = readers[0].Out[0]
	}
}

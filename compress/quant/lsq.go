package quant

import (
	"context"
	"fmt"
	"math"
	"slices"

	"github.com/gomlx/compute"
	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/onnx"
)

// LSQ moves values to a uniform grid whose step is learnt (Esser et al., arXiv:1902.08153):
//
//	y = s·round(clip(x/s, Q_N, Q_P)),  [Q_N, Q_P] = [−2^(b−1), 2^(b−1)−1], or [0, 2^b−1] when positive
//
// Step broadcasts to x, which has its rank; below 1e-5 it counts as 1e-5. The gradient of x is that of the identity
// where Q_N ≤ x/s ≤ Q_P and 0 elsewhere. That of s, per element, is round(x/s) − x/s inside, Q_N below and Q_P above,
// and the sum is scaled by 1/√(Q_P·count), count being how many elements share a step.
func LSQ(x, step *graph.Node, bits int, positive bool) *graph.Node {
	lo, hi := lsqRange(bits, positive)
	shared := float64(x.Shape().Size() / max(step.Shape().Size(), 1))
	s := StraightThrough(step, graph.MaxScalar(step, leastStep))
	s = ScaleGradient(s, 1/math.Sqrt(hi*shared))
	at := func(v float64) *graph.Node { return graph.Scalar(x.Graph(), x.DType(), v) }
	return graph.Mul(RoundSTE(ClipSTE(graph.Div(x, s), at(lo), at(hi))), s)
}

const leastStep = 1e-5

func lsqRange(bits int, positive bool) (lo, hi float64) {
	if bits < 1 || bits > 8 || bits == 1 && !positive {
		panic(fmt.Errorf("a learnt step for %d bits; accepted: 2 to 8, and 1 for values that are never negative", bits))
	}
	levels := float64(int(1) << bits)
	if positive {
		return 0, levels - 1
	}
	return -levels / 2, levels/2 - 1
}

// LSQStep is the step to begin with for values of mean magnitude m: 2·m/√Q_P, twice that for values that are never
// negative, and at least 1e-5.
func LSQStep(m float64, bits int, positive bool) float64 {
	_, hi := lsqRange(bits, positive)
	f := 2.
	if positive {
		f = 4
	}
	return max(f*m/math.Sqrt(hi), leastStep)
}

// LSQWeight is a Latent on a signed grid with a learnt step per output channel. Parameters: "w", and "step", one per
// output channel. It is stored as Uniform.
type LSQWeight struct {
	Bits  int  // 2 to 8
	Fixed bool // the step stays what it is at the start
}

var (
	_ Latent     = LSQWeight{}
	_ storedBits = LSQWeight{}
	_ coded      = LSQWeight{}
)

// Kind returns "lsqweight".
func (LSQWeight) Kind() string { return "lsqweight" }

// WeightBits are the grid's.
func (d LSQWeight) WeightBits() int { return d.Bits }

// Specs are the latent weight and the steps.
func (d LSQWeight) Specs(w shapes.Shape) []nn.Spec {
	role := nn.Gain
	if d.Fixed {
		role = nn.Constant
	}
	return append(nn.Plain{}.Specs(w), nn.Spec{Name: "step", Shape: shapes.Make(dtypes.Float32, w.Dimensions[0]), Role: role, Init: nn.Fill(1)})
}

// Value is the weight on its grid.
func (d LSQWeight) Value(c *nn.Ctx) *graph.Node {
	w := c.P("w")
	return LSQ(w, rowsOf(c.P("step"), w), d.Bits, false)
}

// rowsOf reshapes one number per row of w so that it broadcasts over the row.
func rowsOf(v, w *graph.Node) *graph.Node {
	dims := slices.Repeat([]int{1}, w.Rank())
	dims[0] = v.Shape().Size()
	return graph.Reshape(v, dims...)
}

// Start keeps the weight and takes LSQStep of each row.
func (d LSQWeight) Start(s *Site) (map[string][]float32, error) {
	if err := checkBits(d.Bits); err != nil {
		return nil, err
	}
	var steps []float32
	for _, m := range rowMeans(s.Weight, s.Shape[0]) {
		steps = append(steps, float32(LSQStep(m, d.Bits, false)))
	}
	return map[string][]float32{"w": s.Weight, "step": steps}, nil
}

// rowMeans are the mean magnitudes of the rows.
func rowMeans(w []float32, rows int) []float64 {
	out := make([]float64, rows)
	for o := range out {
		row := w[o*len(w)/rows : (o+1)*len(w)/rows]
		for _, v := range row {
			out[o] += math.Abs(float64(v)) / float64(len(row))
		}
	}
	return out
}

// Stored rounds for good.
func (d LSQWeight) Stored(l *Latents) (nn.Repr, map[string]*tensors.Tensor, error) {
	a := Affine{Bits: d.Bits, Axis: 0}
	for _, s := range l.Values["step"] {
		a.Scale = append(a.Scale, max(float64(s), leastStep))
		a.Zero = append(a.Zero, float64(int(1)<<(d.Bits-1)))
	}
	u, params, err := a.Store(l.Values["w"], l.Shape)
	return u, params, err
}

// codes are round(clip(w/s)).
func (d LSQWeight) codes(l *Latents) ([]int32, error) {
	lo, hi := lsqRange(d.Bits, false)
	w, steps := l.Values["w"], l.Values["step"]
	out := make([]int32, len(w))
	for i, v := range w {
		s := max(steps[i/(len(w)/len(steps))], leastStep)
		out[i] = int32(math.RoundToEven(min(max(float64(v/s), lo), hi)))
	}
	return out, nil
}

// LearnedStep quantises an activation by LSQ, with steps and, if Shifted, shifts that are learnt:
//
//	y = LSQ(x + before, step) + after
//
// Parameters: "step", one per index of Axis or a single one; "before" and "after", one per channel (last axis),
// initially 0. A step per token position, as in transformers, fixes the number of tokens.
type LearnedStep struct {
	Bits     int  // 2 to 8
	Positive bool // the codes are 0 to 2^Bits−1
	Axis     int  // whose index chooses the step, counted from the end: -1 channels, -2 tokens; 0: one step for all
	Shifted  bool
	NoAfter  bool // Shifted, but what is behind the quantiser has taken "after" up
}

var (
	_ nn.Op         = LearnedStep{}
	_ nn.Parametric = LearnedStep{}
	_ Settler       = LearnedStep{}
	_ onnx.Exporter = LearnedStep{}
)

// Kind returns "learnedstep".
func (LearnedStep) Kind() string { return "learnedstep" }

// InputBits are the grid's.
func (d LearnedStep) InputBits() int { return d.Bits }

func (d LearnedStep) after() bool { return d.Shifted && !d.NoAfter }

// Params are steps and shifts.
func (d LearnedStep) Params(in []shapes.Shape) []nn.Spec {
	r := in[0].Rank()
	if r == 0 || d.Axis > 0 || -d.Axis >= r && d.Axis != 0 {
		panic(fmt.Errorf("a step per index of axis %d of %s; accepted: 0 (one step), or -1 to %d", d.Axis, in[0], 1-r))
	}
	n := 1
	if d.Axis != 0 {
		n = in[0].Dimensions[r+d.Axis]
	}
	channels := shapes.Make(dtypes.Float32, in[0].Dimensions[r-1])
	specs := []nn.Spec{{Name: "step", Shape: shapes.Make(dtypes.Float32, n), Role: nn.Gain, Init: nn.Fill(1)}}
	if d.Shifted {
		specs = append(specs, nn.Spec{Name: "before", Shape: channels, Role: nn.Bias})
	}
	if d.after() {
		specs = append(specs, nn.Spec{Name: "after", Shape: channels, Role: nn.Bias})
	}
	return specs
}

// Lower quantises.
func (d LearnedStep) Lower(c *nn.Ctx, xs []*graph.Node) []*graph.Node {
	x, step := xs[0], c.P("step")
	r := x.Rank()
	dims := slices.Repeat([]int{1}, r)
	if d.Axis != 0 {
		if n := x.Shape().Dimensions[r+d.Axis]; n != step.Shape().Size() {
			panic(fmt.Errorf("%d steps were learnt, one per index of axis %d, and the input %s has %d; run it at the size that it was trained at", step.Shape().Size(), d.Axis, x.Shape(), n))
		}
		dims[r+d.Axis] = step.Shape().Size()
	}
	if d.Shifted {
		x = graph.Add(x, graph.ExpandLeftToRank(c.P("before"), r))
	}
	y := LSQ(x, graph.Reshape(step, dims...), d.Bits, d.Positive)
	if d.after() {
		y = graph.Add(y, graph.ExpandLeftToRank(c.P("after"), r))
	}
	return []*graph.Node{y}
}

// Settle hands "after" on to the biases of the dense layers behind, when nothing else reads the quantiser.
func (d LearnedStep) Settle(net *nn.Network, n *nn.Node) error {
	for _, p := range n.P {
		if q := net.Params.Get(p); q != nil {
			q.Role = nn.Constant
			if err := checkFinite(q.Data()); err != nil {
				return fmt.Errorf("parameter %q after training: %w", p, err)
			}
		}
	}
	if !d.after() {
		return nil
	}
	shift := net.Param(n, "after").Data()
	readers, isOutput := net.Readers(n.Out[0])
	weights := make([][]float32, len(readers))
	for i, r := range readers {
		if _, ok := r.Op.(nn.Dense); !ok {
			return nil
		}
		if weights[i] = decoded(net, r); weights[i] == nil {
			return nil
		}
	}
	if isOutput || len(readers) == 0 {
		return nil
	}
	for i, r := range readers {
		op := r.Op.(nn.Dense)
		bias := make([]float32, op.Out)
		if b := net.Param(r, "b"); b != nil {
			bias = b.Data()
		}
		for o := range bias {
			sum := float64(bias[o])
			for j, v := range shift {
				sum += float64(weights[i][o*len(shift)+j]) * float64(v)
			}
			bias[o] = float32(sum)
		}
		net.SetParam(r, "b", nn.Bias, bias, len(bias))
		op.NoBias = false
		r.Op = op
	}
	if p := n.P["after"]; p != "" {
		delete(n.P, "after")
		if !paramInUse(net, p) {
			net.Params.Delete(p)
		}
	}
	d.NoAfter = true
	n.Op = d
	return nil
}

// decoded is a site's weight, plain or on a uniform grid; nil for other forms.
func decoded(net *nn.Network, n *nn.Node) []float32 {
	if nn.IsPlain(n.Op) {
		return net.Param(n, "w").Data()
	}
	u, ok := n.Op.(nn.Linear).Repr().(Uniform)
	q := net.Param(n, "q")
	if !ok || q == nil {
		return nil
	}
	grid, err := u.Grid(net, n)
	if err != nil {
		return nil
	}
	codes := make([]int32, q.Value.Shape().Size())
	for i, c := range q.Data() {
		codes[i] = int32(c)
	}
	w, err := grid.Decode(codes, q.Value.Shape().Dimensions)
	if err != nil {
		return nil
	}
	return w
}

// ExportONNX writes QuantizeLinear and DequantizeLinear between the shifts; fewer than eight bits limit the input
// first.
func (d LearnedStep) ExportONNX(e *onnx.Emitter, n *nn.Node) error {
	net := e.Network()
	step := net.Param(n, "step")
	if step == nil {
		return fmt.Errorf("its steps are missing")
	}
	r := e.Shape(n.In[0]).Rank()
	s := step.Data()
	for i := range s {
		s[i] = max(s[i], leastStep)
	}
	x := e.In(n, 0)
	shift := func(local string) (string, error) {
		p := net.Param(n, local)
		if p == nil {
			return "", fmt.Errorf("its shifts are missing")
		}
		return e.Floats(p.Name, p.Data(), p.Value.Shape().Size()), nil
	}
	if d.Shifted {
		b, err := shift("before")
		if err != nil {
			return err
		}
		x = e.Node("Add", n.Name+"/before", []string{x, b})
	}
	lo, hi := lsqRange(d.Bits, d.Positive)
	dims := slices.Repeat([]int{1}, r)
	var per []int
	var attrs []onnx.Attr
	if d.Axis != 0 {
		dims[r+d.Axis], per, attrs = len(s), []int{len(s)}, []onnx.Attr{onnx.Int("axis", r+d.Axis)}
	}
	if d.Bits < 8 {
		below, above := make([]float32, len(s)), make([]float32, len(s))
		for i, v := range s {
			below[i], above[i] = float32(lo)*v, float32(hi)*v
		}
		x = e.Node("Min", n.Name+"/most", []string{x, e.Floats(n.Name+"/hi", above, dims...)})
		x = e.Node("Max", n.Name+"/grid", []string{x, e.Floats(n.Name+"/lo", below, dims...)})
	}
	kind := onnx.Int8
	if d.Positive {
		kind = onnx.Uint8
	}
	in := []string{e.Floats(step.Name, s, per...), e.Codes(n.Name+"/zero", kind, make([]int32, len(s)), per...)}
	q := e.Node("QuantizeLinear", n.Name+"/codes", append([]string{x}, in...), attrs...)
	if !d.after() {
		e.Out(n, nil, "DequantizeLinear", append([]string{q}, in...), attrs...)
		return nil
	}
	y := e.Node("DequantizeLinear", n.Name+"/value", append([]string{q}, in...), attrs...)
	b, err := shift("after")
	if err != nil {
		return err
	}
	e.Out(n, nil, "Add", []string{y, b})
	return nil
}

// learnedInput is an activation that is to be quantised with a learnt step for some of its readers.
type learnedInput struct {
	value    string
	bits     int
	axis     int
	positive bool
	readers  []learnedRead
}

type learnedRead struct {
	node  *nn.Node
	input int
}

// learnedInputs plans a quantiser for the input of every node for which bits gives fewer than 32, one for all readers
// of a value that want the same: sites, and attention products, whose inputs are quantised before heads are split.
// tokens asks for a step per token position (axis -2) where a value has such an axis, and for one per channel where a
// product reads the attention's values; otherwise each value has one step.
func learnedInputs(net *nn.Network, bits func(n *nn.Node, input int) int, tokens bool) ([]*learnedInput, error) {
	sh, err := net.Shapes(0)
	if err != nil {
		return nil, err
	}
	var plan []*learnedInput
	for _, n := range net.Nodes {
		_, product := n.Op.(nn.MatMul)
		if !product && !isQuantisable(n) {
			continue
		}
		inputs := n.In[:1]
		if product {
			inputs = n.In
		}
		for i := range inputs {
			at := bits(n, i)
			if at >= 32 {
				continue
			}
			read, value := learnedRead{n, i}, n.In[i]
			_, conv := n.Op.(nn.Conv)
			rank := sh[value].Rank()
			if product { // back to where the value is made
				for {
					p := net.Producer(value)
					if p == nil || len(p.In) == 0 {
						break
					}
					if ok, _ := carries(p, sh); !ok {
						break
					}
					read, value = learnedRead{p, 0}, p.In[0]
				}
				if r := sh[value].Rank(); read.node != n && r > 3 {
					rank = 0 // heads are apart already: which axis counts tokens is not known
				} else {
					rank = r
				}
			}
			d := learnedInput{value: value, bits: at}
			d.positive = neverNegative(net, value, sh)
			if tokens && !conv && (rank == 3 || product && rank > 3) {
				d.axis = -2
				if product && i == 1 {
					if p := net.Producer(source(net, n.In[0], sh)); p != nil {
						if _, ok := p.Op.(nn.Softmax); ok {
							d.axis = -1
						}
					}
				}
			}
			k := slices.IndexFunc(plan, func(o *learnedInput) bool { return o.value == d.value && o.bits == d.bits && o.axis == d.axis })
			if k < 0 {
				k = len(plan)
				plan = append(plan, &d)
			}
			if !slices.Contains(plan[k].readers, read) {
				plan[k].readers = append(plan[k].readers, read)
			}
		}
	}
	return plan, nil
}

// neverNegative says whether a value cannot be below 0, or hardly: softmax, ReLU and the like; GELU and SiLU, whose
// negative part is small, count too.
func neverNegative(net *nn.Network, value string, sh map[string]shapes.Shape) bool {
	p := net.Producer(source(net, value, sh))
	if p == nil {
		return false
	}
	switch op := p.Op.(type) {
	case nn.Softmax:
		return !op.Log
	case nn.GELU, nn.HardSigmoid:
		return true
	case nn.Clip:
		return op.Lo >= 0
	case nn.Unary:
		return slices.Contains([]string{"Relu", "Sigmoid", "Softplus", "Abs", "Exp", "Sqrt", "Silu", "HardSwish"}, op.Fn)
	}
	return false
}

// insertLearned measures the planned activations on the examples, all of them in one batch, and puts the quantisers in.
func insertLearned(ctx context.Context, b compute.Backend, net *nn.Network, x compress.Examples, plan []*learnedInput, shifted bool) error {
	if len(plan) == 0 {
		return nil
	}
	sh, err := net.Shapes(0)
	if err != nil {
		return err
	}
	probe := net.Clone()
	probe.Outputs = nil
	for i, d := range plan {
		op := nn.Reduce{Fn: "ReduceMean"}
		if r := sh[d.value].Rank(); d.axis != 0 {
			for a := range r {
				if a != r+d.axis {
					op.Axes = append(op.Axes, a)
				}
			}
		}
		size, mean := fmt.Sprintf("size.%d", i), fmt.Sprintf("mean.%d", i)
		probe.Nodes = append(probe.Nodes,
			&nn.Node{Name: size, Op: nn.Unary{Fn: "Abs"}, In: []string{d.value}, Out: []string{size}, P: map[string]string{}},
			&nn.Node{Name: mean, Op: op, In: []string{size}, Out: []string{mean}, P: map[string]string{}})
		probe.Outputs = append(probe.Outputs, mean)
	}
	if err := probe.Check(); err != nil {
		return err
	}
	probe.Prune()
	e, err := compress.NewEvaluator(b, probe, x.Len())
	if err != nil {
		return err
	}
	defer e.Close()
	var means [][]float32
	if err := e.Each(ctx, x, func(_ int, out []*tensors.Tensor) error {
		for _, t := range out {
			means = append(means, nn.Floats(t))
		}
		return nil
	}); err != nil {
		return err
	}
	for i, d := range plan {
		var steps []float32
		for _, m := range means[i] {
			if m-m != 0 {
				return fmt.Errorf("value %q, which node %q reads: %w", d.value, d.readers[0].node.Name, ErrNotFinite)
			}
			steps = append(steps, float32(LSQStep(float64(m), d.bits, d.positive)))
		}
		first := slices.MinFunc(d.readers, func(a, b learnedRead) int {
			return slices.Index(net.Nodes, a.node) - slices.Index(net.Nodes, b.node)
		})
		q, err := net.InsertBefore(first.node.Name, first.input, freshName(net, d.value+".step"), LearnedStep{Bits: d.bits, Positive: d.positive, Axis: d.axis, Shifted: shifted})
		if err != nil {
			return err
		}
		for _, r := range d.readers {
			r.node.In[r.input] = q.Out[0]
		}
		net.SetParam(q, "step", nn.Gain, steps, len(steps))
		if shifted {
			channels := sh[d.value].Dimensions[sh[d.value].Rank()-1]
			net.SetParam(q, "before", nn.Bias, make([]float32, channels), channels)
			net.SetParam(q, "after", nn.Bias, make([]float32, channels), channels)
		}
	}
	return nil
}

package batchsize

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/gomlx/core/graph"

	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/nn"
)

// LayerTap says how the gradients of single cases arise for one parameter tensor. Either G holds them, [batch, ...], or
// they are sums of outer products over positions t, g_i = Σ_t δ_it a_itᵀ, and A [batch, T, in] and Delta [batch, T, out]
// hold the factors. Gradients are those of the SUM of the cases' losses; with a mean loss every one of them would be a
// batch times too small.
type LayerTap struct {
	Param    string
	A, Delta *graph.Node
	G        *graph.Node
}

// PerSampleSquaredNorms returns Σ ‖g_i‖² over all taps, [batch], without building any g_i: for one position it is
// ‖a_i‖²‖δ_i‖², for several the sum of the products of the Gram matrices of a_i and δ_i, or the outer products' sum where
// that is cheaper.
func PerSampleSquaredNorms(taps []LayerTap) *graph.Node {
	var sum *graph.Node
	for _, t := range taps {
		if s := t.squared(); sum == nil {
			sum = s
		} else {
			sum = graph.Add(sum, s)
		}
	}
	return sum
}

// perCase sums everything but axis 0.
func perCase(x *graph.Node) *graph.Node {
	if x.Rank() == 1 {
		return x
	}
	return graph.ReduceSum(graph.Reshape(x, x.Shape().Dimensions[0], -1), 1)
}

func square(x *graph.Node) *graph.Node { return graph.Mul(x, x) }

// outer is Σ_t δ_it a_itᵀ, [batch, out, in].
func (t LayerTap) outer() *graph.Node { return graph.Einsum("bto,bti->boi", t.Delta, t.A) }

// squared is ‖g_i‖² by case.
func (t LayerTap) squared() *graph.Node {
	if t.G != nil {
		return perCase(square(t.G))
	}
	a, d := t.A.Shape().Dimensions, t.Delta.Shape().Dimensions
	switch steps, in, out := a[1], a[2], d[2]; {
	case steps == 1:
		return graph.Mul(perCase(square(t.A)), perCase(square(t.Delta)))
	case steps*(in+out) <= in*out: // multiply-adds of either way over T
		return perCase(graph.Mul(graph.Einsum("bti,bsi->bts", t.A, t.A), graph.Einsum("bto,bso->bts", t.Delta, t.Delta)))
	}
	return perCase(square(t.outer()))
}

// along is ⟨g_i, ḡ⟩ by case, for the mean gradient in the parameter's shape.
func (t LayerTap) along(mean *graph.Node) *graph.Node {
	if t.G != nil {
		b := t.G.Shape().Dimensions[0]
		return perCase(graph.Mul(graph.Reshape(t.G, b, -1), graph.Reshape(mean, 1, -1)))
	}
	out, in := t.Delta.Shape().Dimensions[2], t.A.Shape().Dimensions[2]
	return perCase(graph.Mul(graph.Einsum("bti,oi->bto", t.A, graph.Reshape(mean, out, in)), t.Delta))
}

// second is Σ_i g_ij² by coordinate, flattened: for one position (δ²)ᵀ(a²).
func (t LayerTap) second() *graph.Node {
	switch {
	case t.G != nil:
		return graph.ReduceSum(graph.Reshape(square(t.G), t.G.Shape().Dimensions[0], -1), 0)
	case t.A.Shape().Dimensions[1] == 1:
		return graph.Reshape(graph.Einsum("bto,bti->oi", square(t.Delta), square(t.A)), -1)
	}
	return graph.Reshape(graph.ReduceSum(square(t.outer()), 0), -1)
}

// tapper makes the taps of a network's parameters from the values and gradients of one lowering.
type tapper struct {
	net   *nn.Network
	env   *nn.Env
	batch int
}

// uncovered is why a node's parameters have no tap, and what to do about it.
func uncovered(n *nn.Node, reason string) error {
	return fmt.Errorf("batchsize: node %q (%s): %s, so the gradients of single cases cannot be had in one pass; estimate the variance from micro-batches instead (Groups: 8)", n.Name, n.Op.Kind(), reason)
}

// Check reports whether the gradients of single cases of this network can be had in one pass: every trained parameter
// belongs to a dense, convolution (without groups), embedding, layer norm, RMS norm or group norm op with plain weights, or
// is a value that is added to all cases, and no op couples the cases of a batch. For anything else use micro-batches.
func Check(net *nn.Network) error {
	if err := coupled(net); err != nil {
		return err
	}
	seen := map[string]string{}
	for _, n := range net.Nodes {
		for _, local := range slices.Sorted(maps.Keys(n.P)) {
			p := net.Param(n, local)
			if p == nil || !p.Trainable() {
				continue
			}
			if other := seen[p.Name]; other != "" {
				return uncovered(n, fmt.Sprintf("it shares parameter %q with %q", p.Name, other))
			}
			seen[p.Name] = n.Name
		}
		if err := covers(net, n); err != nil {
			return err
		}
	}
	return nil
}

// coupled refuses networks whose norms see the whole batch.
func coupled(net *nn.Network) error {
	for _, n := range net.Nodes {
		_, batch := n.Op.(nn.BatchNorm)
		for _, local := range slices.Sorted(maps.Keys(n.P)) {
			if p := net.Param(n, local); p != nil && p.Role == nn.State && !p.Frozen {
				batch = true
			}
		}
		if batch {
			return fmt.Errorf("batchsize: node %q (%s) keeps statistics of the batch: the cases of a batch depend on one another, and a single case's gradient is undefined; use a norm of single cases (layer, group, rms), or micro-batches with statistics of their own (Groups: 8)", n.Name, n.Op.Kind())
		}
	}
	return nil
}

func trains(net *nn.Network, n *nn.Node) bool {
	for local := range n.P {
		if p := net.Param(n, local); p != nil && p.Trainable() {
			return true
		}
	}
	return false
}

// covers says why a node's parameters cannot be tapped, from its op alone.
func covers(net *nn.Network, n *nn.Node) error {
	if !trains(net, n) {
		return nil
	}
	if _, ok := n.Op.(nn.Linear); ok && !nn.IsPlain(n.Op) {
		return uncovered(n, "its weight is not stored as it is")
	}
	lastAxis := func(axes []int) error {
		if len(axes) > 1 || len(axes) == 1 && axes[0] != -1 {
			return uncovered(n, "it normalises other axes than the last")
		}
		return nil
	}
	switch op := n.Op.(type) {
	case nn.Dense, nn.Embedding, nn.GroupNorm:
		return nil
	case nn.Conv:
		if op.Groups > 1 {
			return uncovered(n, "it is a convolution in groups")
		}
		return nil
	case nn.LayerNorm:
		return lastAxis(op.Axes)
	case nn.RMSNorm:
		return lastAxis(op.Axes)
	case nn.Value:
		if !op.Batch && addedTo(net, n) == nil {
			return uncovered(n, "its value is not added to that of every case")
		}
		return nil
	}
	return uncovered(n, "ops of its kind are not covered")
}

// addedTo is the node that adds a value of leading axis 1 to one of every case, if that is all that reads it.
func addedTo(net *nn.Network, n *nn.Node) *nn.Node {
	readers, out := net.Readers(n.Out[0])
	if len(readers) != 1 || out || readers[0].Op != nn.Op(nn.Add) {
		return nil
	}
	if v, ok := n.Op.(nn.Value); !ok || v.Shape.Rank() == 0 || v.Shape.Dimensions[0] != 1 {
		return nil
	}
	return readers[0]
}

// wanted is the value whose gradient a node's taps need.
func (t *tapper) wanted(n *nn.Node) string {
	if v, ok := n.Op.(nn.Value); ok && !v.Batch {
		return addedTo(t.net, n).Out[0]
	}
	return n.Out[0]
}

// taps returns those of a node from the gradient of its wanted value.
func (t *tapper) taps(n *nn.Node, delta *graph.Node) []LayerTap {
	delta = graph.MulScalar(single(delta), float64(t.batch)) // of the sum of losses
	x := t.env.Tap[n.Out[0]]
	if len(n.In) > 0 && n.In[0] != "" {
		x = t.env.Tap[n.In[0]]
	}
	if delta.Rank() == 0 || delta.Shape().Dimensions[0] != t.batch {
		panic(uncovered(n, fmt.Sprintf("its output %s has no axis of the %d cases in front", delta.Shape(), t.batch)))
	}
	var out []LayerTap
	add := func(local string, tap LayerTap) {
		if p := t.net.Param(n, local); p != nil && p.Trainable() {
			tap.Param = p.Name
			out = append(out, tap)
		}
	}
	if _, ok := n.Op.(nn.Value); ok {
		add("w", LayerTap{G: delta})
		return out
	}
	last := delta.Shape().Dimensions[delta.Rank()-1]
	rows := graph.Reshape(delta, t.batch, -1, last) // [batch, T, out]
	bias := func(local string) { add(local, LayerTap{G: graph.ReduceSum(rows, 1)}) }
	switch op := n.Op.(type) {
	case nn.Dense:
		in := x.Shape().Dimensions[x.Rank()-1]
		add("w", LayerTap{A: graph.Reshape(single(x), t.batch, -1, in), Delta: rows})
		bias("b")
	case nn.Conv:
		add("w", LayerTap{A: op.Patches(single(x)), Delta: rows})
		bias("b")
	case nn.Embedding: // a row per symbol: one-hot vectors stand where a layer's output gradients do
		hot := graph.OneHot(x, op.N, dtypes.Float32)
		add("w", LayerTap{A: rows, Delta: graph.Reshape(hot, t.batch, -1, op.N)})
	case nn.LayerNorm, nn.RMSNorm, nn.GroupNorm:
		bare := &nn.Node{Name: n.Name, Op: n.Op, P: map[string]string{}} // no gain, no bias: the normalised value
		unit := n.Op.Lower(&nn.Ctx{Env: t.env, Node: bare}, []*graph.Node{x})[0]
		add("w", LayerTap{G: graph.ReduceSum(graph.Reshape(graph.Mul(single(unit), delta), t.batch, -1, last), 1)})
		bias("b")
	}
	return out
}

// single converts to float32.
func single(x *graph.Node) *graph.Node {
	if x.DType() == dtypes.Float32 || x.DType() == dtypes.Float64 {
		return x
	}
	return graph.ConvertDType(x, dtypes.Float32)
}

// What probes observe, by name: one value per tensor in the order of their names, or all coordinates one after another.
const (
	seenSquares = "batchsize.squares" // Σ_i ‖g_i‖²
	seenAlong   = "batchsize.along"   // Σ_i ⟨g_i,ḡ⟩²
	seenMeanSq  = "batchsize.meansq"  // ‖ḡ‖²
	seenSecond  = "batchsize.second"  // Σ_i g_ij²
	seenMean    = "batchsize.mean"    // ḡ_j
)

// probe gathers a step's statistics. With exact it gets single cases' gradients from the network's taps; otherwise it only
// reports on the mean gradient of each micro-batch.
type probe struct {
	net            *nn.Network
	exact          bool
	vectors, inner bool

	t       tapper
	uses    map[string]int
	lowered bool       // the loss is; what is used from then on does not count
	nodes   []*nn.Node // that the wanted values belong to
	offsets []int      // of the tensors among all coordinates
}

var _ learn.Probe = (*probe)(nil)

// Begin counts how often every parameter is used: a second use, by a second lowering or an unrolled loop, adds gradients
// that the taps do not see.
func (p *probe) Begin(env *nn.Env, batch []*graph.Node) {
	p.uses, p.nodes, p.lowered = map[string]int{}, nil, false
	if !p.exact {
		return
	}
	if len(batch) == 0 || batch[0].Rank() == 0 {
		panic(fmt.Errorf("batchsize: the batch has no axis of cases"))
	}
	p.t = tapper{net: p.net, env: env, batch: batch[0].Shape().Dimensions[0]}
	get := env.Param
	env.Param = func(name string) *graph.Node {
		if !p.lowered {
			p.uses[name]++
		}
		return get(name)
	}
}

// Wants returns the outputs of the tapped nodes.
func (p *probe) Wants() (want []*graph.Node) {
	if !p.exact {
		return nil
	}
	p.lowered = true
	for _, n := range p.net.Nodes {
		if !trains(p.net, n) {
			continue
		}
		if err := covers(p.net, n); err != nil {
			panic(err)
		}
		v := p.t.env.Tap[p.t.wanted(n)]
		if v == nil {
			panic(uncovered(n, "the loss does not lower it"))
		}
		want, p.nodes = append(want, v), append(p.nodes, n)
	}
	return want
}

// Observe computes the sums.
func (p *probe) Observe(grads map[string]*graph.Node, wanted []*graph.Node) map[string]*graph.Node {
	names := slices.Sorted(maps.Keys(grads))
	p.offsets = nil
	at := 0
	for _, n := range names {
		p.offsets = append(p.offsets, at)
		at += grads[n].Shape().Size()
	}
	each := func(f func(name string, g *graph.Node) *graph.Node) *graph.Node {
		var parts []*graph.Node
		for _, n := range names {
			parts = append(parts, graph.Reshape(f(n, single(grads[n])), -1))
		}
		if len(parts) == 1 {
			return parts[0]
		}
		return graph.Concatenate(parts, 0)
	}
	seen := map[string]*graph.Node{
		seenMeanSq: each(func(_ string, g *graph.Node) *graph.Node { return graph.ReduceAllSum(square(g)) }),
	}
	if p.vectors || p.inner {
		seen[seenMean] = each(func(_ string, g *graph.Node) *graph.Node { return g })
	}
	if !p.exact {
		return seen
	}
	taps := map[string]LayerTap{}
	for i, n := range p.nodes {
		for _, t := range p.t.taps(n, wanted[i]) {
			if p.uses[t.Param] > 1 {
				panic(uncovered(n, fmt.Sprintf("its parameter %q is used %d times in a step", t.Param, p.uses[t.Param])))
			}
			taps[t.Param] = t
		}
	}
	var missing []string
	for _, n := range names {
		if t, ok := taps[n]; !ok || t.A == nil && t.G == nil {
			missing = append(missing, n)
		}
	}
	if len(missing) > 0 {
		panic(fmt.Errorf("batchsize: parameters %s have no gradients of single cases in this network; estimate the variance from micro-batches instead (Groups: 8)", strings.Join(missing, ", ")))
	}
	seen[seenSquares] = each(func(n string, _ *graph.Node) *graph.Node { return graph.ReduceAllSum(taps[n].squared()) })
	if p.inner {
		seen[seenAlong] = each(func(n string, g *graph.Node) *graph.Node { return graph.ReduceAllSum(square(taps[n].along(g))) })
	}
	if p.vectors {
		seen[seenSecond] = each(func(n string, _ *graph.Node) *graph.Node { return taps[n].second() })
	}
	return seen
}

package onnx

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/onnx/internal/pb"
)

// builder turns the folded and fused graph into a network. Every ONNX value is held in some layout: axis i of the
// network's value is axis layout[i] of the ONNX value; nil is ONNX's own order.
type builder struct {
	*nn.Builder
	g     *graph
	held  map[string]held
	forms map[string]string // ONNX value and layout -> network value
	ties  map[string]string // constant and permutation -> parameter
	count map[string]int
	taken map[string]bool
}

type held struct {
	value  string
	layout []int
}

// construction adds the network's form of one ONNX node.
type construction func(r *builder, n *node) error

func constructions() map[string]construction {
	m := map[string]construction{
		"Identity": buildIdentity, "Dropout": buildIdentity, "Cast": buildCast, "CastLike": buildCast,
		"Reshape": buildReshape, "Flatten": buildReshape, "Squeeze": buildReshape, "Unsqueeze": buildReshape,
		"Transpose": buildTranspose, "Concat": buildConcat, "Slice": buildSlice, "Split": buildSplit, "Gather": buildGather,
		"Expand": buildExpand, "Tile": buildExpand, "ConstantOfShape": buildConstantOfShape, "Pad": buildPad,
		"DepthToSpace": buildDepthToSpace, "SpaceToDepth": buildSpaceToDepth, "Where": buildWhere,
		"Conv": buildConv, "ConvTranspose": buildConvTranspose, "MatMul": buildMatMul, "~MatMul": buildMatMul, "~Dense": buildMatMul, "Gemm": buildGemm,
		"AveragePool": buildPool, "MaxPool": buildPool, "GlobalAveragePool": buildGlobalPool, "GlobalMaxPool": buildGlobalPool,
		"ArgMax": buildArgMax, "Resize": buildResize, "OneHot": buildOneHot,
		"BatchNormalization": buildBatchNorm, "LayerNormalization": buildLayerNorm, "InstanceNormalization": buildInstanceNorm,
		"GroupNormalization": buildGroupNorm, "~LayerNorm": buildFusedNorm, "~RMSNorm": buildFusedNorm, "~CRMSNorm": buildCRMSNorm,
		"Softmax": buildSoftmax, "LogSoftmax": buildSoftmax, "~Softmax": buildSoftmax,
		"Clip": buildClip, "PRelu": buildPRelu, "LeakyRelu": buildActivation, "HardSigmoid": buildActivation, "Gelu": buildActivation,
		"~Gelu": buildActivation, "~Silu": buildActivation, "HardSwish": buildActivation,
		"Elu": buildPieces, "Selu": buildPieces, "Mish": buildPieces, "Softsign": buildPieces,
		"QuantizeLinear": buildQuantize, "DequantizeLinear": buildDequantize, "~QDQ": buildQDQ,
	}
	for op := range foldUnary {
		if m[op] == nil {
			m[op] = buildActivation
		}
	}
	for op := range foldBinary {
		if op != "Mod" {
			m[op] = buildBinary
		}
	}
	for _, op := range []string{"Max", "Min", "Sum", "Mean"} {
		m[op] = buildVariadic
	}
	for _, op := range []string{"ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceSumSquare"} {
		m[op] = buildReduce
	}
	return m
}

func build(g *graph) (*nn.Network, error) {
	r := &builder{
		Builder: nn.NewBuilder(0), g: g, held: map[string]held{}, forms: map[string]string{},
		ties: map[string]string{}, count: map[string]int{}, taken: map[string]bool{},
	}
	for _, in := range g.inputs {
		t, ok := map[pb.TensorProto_DataType]dtypes.DType{
			tFloat: dtypes.Float32, tFloat16: dtypes.Float32, tBfloat16: dtypes.Float32, tDouble: dtypes.Float32,
			tInt32: dtypes.Int32, tInt64: dtypes.Int64, tUint8: dtypes.Uint8, tInt8: dtypes.Int8, tBool: dtypes.Bool,
		}[in.dtype]
		if !ok {
			return nil, fmt.Errorf("input %q: type %s is not supported", in.name, in.dtype)
		}
		d := make([]int, len(in.shape))
		for i, x := range in.shape {
			d[i] = x.at(1)
		}
		r.taken[in.name] = true
		r.held[in.name] = held{value: r.Input(in.name, shapes.Make(t, d...))}
	}
	table := constructions()
	for _, o := range g.outputs {
		r.taken[o] = true
	}
	for _, n := range g.nodes {
		if slices.ContainsFunc(n.out, func(o string) bool { return o == "" || g.values[o].c == nil }) {
			f := table[n.op]
			if f == nil {
				return nil, fmt.Errorf("%s: the operator is only supported on constants", n)
			}
			var err error
			if e := nn.Catch(func() { err = f(r, n) }); e != nil {
				err = e
			}
			if err == nil {
				err = r.Err()
			}
			if err != nil {
				return nil, fmt.Errorf("%s: %w", n, err)
			}
		}
	}
	return r.finish()
}

// finish gives the outputs their names in the file and their own layout.
func (r *builder) finish() (*nn.Network, error) {
	net := r.Net
	outs := make([]string, len(r.g.outputs))
	for i, o := range r.g.outputs {
		outs[i] = r.natural(o)
		if err := r.Err(); err != nil {
			return nil, fmt.Errorf("output %q: %w", o, err)
		}
	}
	for i, o := range r.g.outputs {
		if outs[i] == o {
			continue
		}
		p := net.Producer(outs[i])
		if net.Producer(o) != nil || p == nil || len(p.Out) > 1 || slices.Contains(outs[:i], outs[i]) || slices.Contains(r.g.outputs, outs[i]) {
			continue // an input, or the same value twice: it keeps the name that it has
		}
		net.ReplaceUses(outs[i], o)
		p.Name, p.Out[0] = o, o
		outs[i] = o
	}
	n, err := r.Finish(outs...)
	if err != nil {
		return nil, err
	}
	n.Prune()
	if len(r.g.meta) > 0 {
		n.Meta = maps.Clone(r.g.meta)
	}
	return n, nil
}

// fresh is an unused name for a node.
func (r *builder) fresh(base string) string {
	name := base
	for r.taken[name] || r.Net.Node(name) != nil {
		r.count[base]++
		name = fmt.Sprintf("%s/%d", base, r.count[base])
	}
	r.taken[name] = true
	return name
}

// add appends a helper node.
func (r *builder) add(base string, op nn.Op, in ...string) string {
	return r.Add(r.fresh(base), op, in...)
}

// put adds the node that makes an ONNX value, in a layout. The node has the value's name, unless an output of the
// graph must be given in its own layout.
func (r *builder) put(out string, layout []int, op nn.Op, in ...string) {
	name := out
	if !identity(layout) && slices.Contains(r.g.outputs, out) {
		name = r.fresh(out + "/permuted")
	} else {
		r.taken[out] = true
	}
	r.hold(out, layout, r.Add(name, op, in...))
}

func (r *builder) hold(out string, layout []int, value string) {
	if identity(layout) {
		layout = nil
	}
	r.held[out] = held{value, slices.Clone(layout)}
}

func (r *builder) shape(name string) []dim { return r.g.values[name].shape }
func (r *builder) rank(name string) int    { return len(r.g.values[name].shape) }

// natural gives a value in ONNX's own order of axes.
func (r *builder) natural(name string) string { return r.in(name, nil) }

// in gives a value, or a constant, in a layout.
func (r *builder) in(name string, layout []int) string {
	if identity(layout) {
		layout = nil
	}
	v := r.g.values[name]
	key := fmt.Sprint(name, layout)
	if f, ok := r.forms[key]; ok {
		return f
	}
	h, ok := r.held[name]
	if !ok {
		if v == nil || v.c == nil {
			r.Fail(fmt.Errorf("value %q is not there", name))
			return name
		}
		f := r.constant(name, v.c, layout)
		r.forms[key] = f
		return f
	}
	if slices.Equal(h.layout, layout) {
		return h.value
	}
	at := make([]int, len(v.shape))
	for i, d := range v.shape {
		if at[i] = d.c; !d.static() {
			at[i] = 2 // not 1: the batch may not move in a reshape
		}
	}
	perm, dims := relayout(h.layout, layout, at)
	var f string
	base := r.g.values[name].name + "/" + layoutName(layout)
	if dims != nil {
		to := layout
		if to == nil {
			to = natural(len(v.shape))
		}
		f = r.add(base, nn.Reshape{Dims: r.dims(arrange(to, v.shape), arrange(h.layout, v.shape))}, h.value)
	} else {
		f = r.add(base, nn.Transpose{Perm: perm}, h.value)
	}
	r.forms[key] = f
	return f
}

func layoutName(layout []int) string {
	switch {
	case layout == nil:
		return "natural"
	case slices.Equal(layout, channelsLast(len(layout))):
		return "channels_last"
	}
	return "permuted"
}

// channelsLast is the layout in which convolutions work.
func channelsLast(rank int) []int {
	l := []int{0}
	for i := 2; i < rank; i++ {
		l = append(l, i)
	}
	return append(l, 1)
}

// constant gives a constant as a value.
func (r *builder) constant(name string, c *tensor, layout []int) string {
	if c.i != nil && slices.ContainsFunc(c.i, func(d dim) bool { return !d.static() }) {
		r.Fail(fmt.Errorf("the network's data cannot depend on the size of the batch (%q)", name))
		return name
	}
	node := r.fresh(name)
	full := r.param(name, c, layout, r.role(name), node+".w")
	q := r.Net.Params.Get(full)
	v := r.Share("w", full).Add(node, nn.ConstantValue(q.Value.Shape()))
	if c.dtype == tBool {
		return r.add(name+"/bool", nn.Cast{To: dtypes.Bool}, v)
	}
	return v
}

// role is what a constant operand is for: several floats in an initializer are parameters that training may change
// (a position table), what stands in Constant nodes or was computed is a constant.
func (r *builder) role(name string) nn.Role {
	if v := r.g.values[name]; v != nil && v.c != nil && v.prod == nil && isFloat(v.dtype) && v.c.size() > 1 {
		return nn.Bias
	}
	return nn.Constant
}

// param stores a constant of the file as a parameter with its axes permuted, once for all nodes that use it so.
func (r *builder) param(source string, c *tensor, perm []int, role nn.Role, name string) string {
	if base := r.g.values[c.from]; source != "" && c.from != "" && base != nil && base.c != nil {
		if perm != nil {
			perm = arrange(perm, c.perm)
		} else {
			perm = c.perm
		}
		source, c = c.from, base.c
	}
	key := fmt.Sprint(source, perm, c.dims)
	if identity(perm) {
		perm, key = nil, fmt.Sprint(source, nil, c.dims)
	}
	if source != "" {
		if have, ok := r.ties[key]; ok {
			return have
		}
	}
	for i, base := 1, name; r.Net.Params.Get(name) != nil; i++ {
		name = fmt.Sprintf("%s~%d", base, i)
	}
	var t *tensors.Tensor
	switch {
	case isFloat(c.dtype):
		f := c.floats()
		dims := c.dims
		if perm != nil {
			f, dims = permuted(f, dims, perm)
		} else if c.f != nil {
			f = slices.Clone(f)
		}
		t = tensors.FromFlatDataAndDimensions(f, dims...)
	case c.dtype == tInt64 || c.dtype == tUint64 || c.dtype == tUint32:
		t = intTensor[int64](c, perm)
	case c.dtype == tUint8:
		t = intTensor[uint8](c, perm)
	case c.dtype == tInt8:
		t = intTensor[int8](c, perm)
	default:
		t = intTensor[int32](c, perm)
	}
	r.Net.Params.Put(&nn.Param{Name: name, Role: role, Value: t})
	if source != "" {
		r.ties[key] = name
	}
	return name
}

func intTensor[T int8 | uint8 | int32 | int64](c *tensor, perm []int) *tensors.Tensor {
	in, dims := c.ints(), c.dims
	if perm != nil {
		in, dims = permuted(in, dims, perm)
	}
	out := make([]T, len(in))
	for i, d := range in {
		out[i] = T(d.c)
	}
	return tensors.FromFlatDataAndDimensions(out, dims...)
}

// floatParam stores plain values as a parameter.
func (r *builder) floatParam(name string, role nn.Role, data []float32, dims ...int) string {
	return r.param("", &tensor{dtype: tFloat, dims: dims, raw: nil, f: data}, nil, role, name)
}

// constOf is a required constant floating input.
func (r *builder) constOf(n *node, i int) (*tensor, string, error) {
	v := r.g.arg(n, i)
	if v == nil || v.c == nil || !isFloat(v.dtype) {
		return nil, "", fmt.Errorf("input %d must be a floating constant", i)
	}
	return v.c, v.name, nil
}

// dims are the entries of an nn.Reshape that make shape to from shape from, with the batch open.
func (r *builder) dims(to, from []dim) []int {
	out := make([]int, len(to))
	open := 0
	for i, d := range to {
		switch {
		case d.static():
			out[i] = d.c
		case i < len(from) && from[i] == d:
			out[i] = 0
		default:
			out[i] = -1
			open++
		}
	}
	if open > 1 {
		r.Fail(fmt.Errorf("%s cannot be reshaped to %s at every batch", shapeString(from), shapeString(to)))
	}
	return out
}

// layoutOf is the layout in which a value is held; constants have none of their own.
func (r *builder) layoutOf(name string) []int { return r.held[name].layout }

func (r *builder) isConst(name string) bool { return r.g.values[name].c != nil }

// align gives the inputs of an elementwise node in one layout: that of its first input of full rank that is not in its
// own order.
func (r *builder) align(n *node, names []string) (in []string, layout []int) {
	rank := r.rank(n.out[0])
	for _, s := range names {
		if r.rank(s) == rank && layout == nil && !r.isConst(s) {
			layout = r.layoutOf(s)
		}
	}
	for _, s := range names {
		in = append(in, r.extended(s, layout, rank))
	}
	return in, layout
}

// extended gives a value with leading axes of 1 up to a rank, in a layout of that rank.
func (r *builder) extended(name string, layout []int, rank int) string {
	have := r.rank(name)
	if have == rank || have == 0 || layout == nil {
		if have == rank {
			return r.in(name, layout)
		}
		return r.natural(name)
	}
	shape := append(slices.Repeat([]dim{fixed(1)}, rank-have), r.shape(name)...)
	if v := r.g.values[name]; v.c != nil {
		c := *v.c
		c.dims, c.from = append(slices.Repeat([]int{1}, rank-have), c.dims...), ""
		return r.constant(name, &c, layout)
	}
	x := r.add(name+"/extended", nn.Reshape{Dims: r.dims(shape, r.shape(name))}, r.natural(name))
	perm, _ := relayout(nil, layout, make([]int, rank))
	return r.add(name+"/extended", nn.Transpose{Perm: perm}, x)
}

func buildIdentity(r *builder, n *node) error {
	x := n.in[0]
	if r.isConst(x) || slices.Contains(r.g.outputs, n.out[0]) {
		r.put(n.out[0], nil, nn.Unary{Fn: "Identity"}, r.natural(x))
		return nil
	}
	r.held[n.out[0]] = r.held[x]
	return nil
}

func buildCast(r *builder, n *node) error {
	x := n.in[0]
	to := map[pb.TensorProto_DataType]dtypes.DType{
		tInt32: dtypes.Int32, tInt64: dtypes.Int64, tUint8: dtypes.Uint8, tInt8: dtypes.Int8, tBool: dtypes.Bool,
		tInt16: dtypes.Int32, tUint16: dtypes.Int32, tUint32: dtypes.Int64, tUint64: dtypes.Int64,
	}[r.g.values[n.out[0]].dtype]
	if isFloat(r.g.values[n.out[0]].dtype) {
		to = dtypes.Float32
	}
	layout := r.layoutOf(x)
	v := r.in(x, layout)
	if to == dtypes.Bool { // x ≠ 0
		zero := r.constant(n.out[0]+"/zero", &tensor{dtype: r.g.values[x].dtype, i: []dim{fixed(0)}, f: []float32{0}}, nil)
		v = r.add(n.out[0]+"/equal", nn.Binary{Fn: "Equal"}, v, zero)
		r.put(n.out[0], layout, nn.Unary{Fn: "Not"}, v)
		return nil
	}
	r.put(n.out[0], layout, nn.Cast{To: to}, v)
	return nil
}

// buildReshape serves all operators that keep the order of the elements.
func buildReshape(r *builder, n *node) error {
	x := n.in[0]
	from, to := r.shape(x), r.shape(n.out[0])
	h := r.held[x]
	// A value whose axes of more than one element are in their own order can be reshaped as it is.
	if h.layout != nil {
		at := make([]int, len(from))
		for i, d := range from {
			if at[i] = d.c; !d.static() {
				at[i] = 2
			}
		}
		if _, dims := relayout(h.layout, nil, at); dims != nil {
			r.put(n.out[0], nil, nn.Reshape{Dims: r.dims(to, arrange(h.layout, from))}, h.value)
			return nil
		}
		if layout, ok := squeezedLayout(h.layout, from, to); ok {
			r.put(n.out[0], layout, nn.Reshape{Dims: r.dims(arrange(layout, to), arrange(h.layout, from))}, h.value)
			return nil
		}
	}
	r.put(n.out[0], nil, nn.Reshape{Dims: r.dims(to, from)}, r.natural(x))
	return nil
}

// squeezedLayout carries a layout over a reshape that only drops or inserts axes of 1.
func squeezedLayout(layout []int, from, to []dim) ([]int, bool) {
	newAxis := make([]int, len(from)) // of an axis that stays
	j := 0
	used := make([]bool, len(to))
	for i, d := range from {
		newAxis[i] = -1
		if d == fixed(1) {
			continue
		}
		for j < len(to) && to[j] == fixed(1) {
			j++
		}
		if j >= len(to) || to[j] != d {
			return nil, false
		}
		newAxis[i], used[j] = j, true
		j++
	}
	for ; j < len(to); j++ {
		if to[j] != fixed(1) {
			return nil, false
		}
	}
	var out []int
	for _, a := range layout {
		if newAxis[a] >= 0 {
			out = append(out, newAxis[a])
		}
	}
	for i, u := range used { // axes of 1 stand before the last
		if !u {
			out = slices.Insert(out, max(len(out)-1, 0), i)
		}
	}
	return out, true
}

// buildTranspose adds no node: the same value is held in another layout.
func buildTranspose(r *builder, n *node) error {
	x := n.in[0]
	perm, err := permOf(n, r.rank(x))
	if err != nil {
		return err
	}
	if r.isConst(x) {
		return errors.New("a constant was not folded")
	}
	inverse := make([]int, len(perm))
	for i, p := range perm {
		inverse[p] = i
	}
	h := r.held[x]
	if h.layout == nil {
		h.layout = natural(len(perm))
	}
	layout := make([]int, len(perm))
	for i, a := range h.layout {
		layout[i] = inverse[a]
	}
	r.hold(n.out[0], layout, h.value)
	return nil
}

func buildConcat(r *builder, n *node) error {
	out := r.shape(n.out[0])
	axis, err := axisOf(n.int("axis", 0), len(out))
	if err != nil {
		return err
	}
	ref := ""
	for _, s := range n.in {
		if !r.isConst(s) && ref == "" {
			ref = s
		}
	}
	in, layout := r.align(n, n.in)
	for i, s := range n.in {
		if v := r.g.values[s]; v.c != nil && axis != 0 && out[0] == batch && len(v.c.dims) == len(out) && v.c.dims[0] == 1 {
			if layout != nil && layout[0] != 0 {
				return errors.New("a constant is joined along an axis order that is not supported")
			}
			// a constant for every case, such as a class token
			full := r.param(s, v.c, layout, nn.Bias, s+".w")
			src := r.batchSource(ref)
			in[i] = r.Share("w", full).Add(r.fresh(s+"/batch"), nn.Value{Shape: r.Net.Params.Get(full).Value.Shape(), Batch: true}, src)
		}
	}
	r.put(n.out[0], layout, nn.Concat{Axis: position(layout, axis, len(out))}, in...)
	return nil
}

// batchSource is a value whose axis 0 is the batch.
func (r *builder) batchSource(name string) string {
	if name != "" {
		if h := r.held[name]; h.value != "" && (h.layout == nil || h.layout[0] == 0) && r.shape(name)[0] == batch {
			return h.value
		}
	}
	for _, in := range r.g.inputs {
		if len(in.shape) > 0 && in.shape[0] == batch {
			return in.name
		}
	}
	r.Fail(errors.New("no input has an open batch"))
	return ""
}

func buildSlice(r *builder, n *node) error {
	x := n.in[0]
	specs, err := r.g.sliceSpecs(n, r.g.values[x])
	if err != nil {
		return err
	}
	layout := r.layoutOf(x)
	v := r.in(x, layout)
	for i, s := range specs {
		axis := position(layout, s.axis, r.rank(x))
		var op nn.Op = nn.Slice{Axis: axis, From: s.from, To: s.from + (s.count-1)*s.step + 1, Step: s.step}
		in := []string{v}
		if s.step < 0 {
			idx := make([]dim, s.count)
			for j := range idx {
				idx[j] = fixed(s.from + j*s.step)
			}
			op = nn.Gather{Axis: axis}
			in = append(in, r.constant(n.out[0]+"/positions", &tensor{dtype: tInt32, dims: []int{s.count}, i: idx}, nil))
		}
		if i == len(specs)-1 {
			r.put(n.out[0], layout, op, in...)
			return nil
		}
		v = r.add(n.out[0]+"/slice", op, in...)
	}
	r.put(n.out[0], layout, nn.Unary{Fn: "Identity"}, v)
	return nil
}

func buildSplit(r *builder, n *node) error {
	x := n.in[0]
	axis, err := axisOf(n.int("axis", 0), r.rank(x))
	if err != nil {
		return err
	}
	parts, err := r.g.splitSizes(n, r.shape(x)[axis])
	if err != nil {
		return err
	}
	layout := r.layoutOf(x)
	v := r.in(x, layout)
	at := 0
	for i, p := range parts { // slices, so that every part has its own name
		if n.out[i] != "" {
			r.put(n.out[i], layout, nn.Slice{Axis: position(layout, axis, r.rank(x)), From: at, To: at + p}, v)
		}
		at += p
	}
	return nil
}

func buildGather(r *builder, n *node) error {
	x, idx := r.g.values[n.in[0]], r.g.values[n.in[1]]
	axis, err := axisOf(n.int("axis", 0), len(x.shape))
	if err != nil {
		return err
	}
	switch {
	case x.c != nil && axis == 0 && len(x.c.dims) == 2 && isFloat(x.dtype):
		full := r.param(x.name, x.c, nil, nn.Weight, n.out[0]+".w")
		v := r.natural(n.in[1])
		r.Share("w", full)
		r.put(n.out[0], nil, nn.Embedding{N: x.c.dims[0], Dim: x.c.dims[1]}, v)
	case x.c == nil && idx.c != nil && len(idx.c.dims) == 0:
		at := idx.c.ints()[0].c
		size := x.shape[axis]
		if !size.static() || at < -size.c || at >= size.c {
			return fmt.Errorf("position %d of an axis of %s", at, size)
		}
		at = (at + size.c) % size.c
		layout := r.layoutOf(x.name)
		v := r.add(n.out[0]+"/slice", nn.Slice{Axis: position(layout, axis, len(x.shape)), From: at, To: at + 1}, r.in(x.name, layout))
		cut := slices.Clone(x.shape)
		cut[axis] = fixed(1)
		var rest []int
		for _, a := range layout {
			if a != axis {
				if a > axis {
					a--
				}
				rest = append(rest, a)
			}
		}
		r.put(n.out[0], rest, nn.Reshape{Dims: r.dims(arrange(rest, r.shape(n.out[0])), arrange(layout, cut))}, v)
	default:
		r.put(n.out[0], nil, nn.Gather{Axis: axis}, r.natural(n.in[0]), r.natural(n.in[1]))
	}
	return nil
}

// buildExpand broadcasts; a constant that is repeated over the batch becomes a value of every case.
func buildExpand(r *builder, n *node) error {
	x, to := r.g.values[n.in[0]], r.shape(n.out[0])
	d := make([]int, len(to))
	grows := false // along the batch
	for i, t := range to {
		var have dim = fixed(1)
		if j := i - (len(to) - len(x.shape)); j >= 0 {
			have = x.shape[j]
		}
		switch {
		case t.static():
			d[i] = t.c
		case have == t:
			d[i] = 0
		case i == 0 && t == batch:
			d[i], grows = 0, true
		default:
			return fmt.Errorf("%s cannot be expanded to %s", shapeString(x.shape), shapeString(to))
		}
	}
	if !grows {
		r.put(n.out[0], nil, nn.Expand{Dims: d}, r.natural(n.in[0]))
		return nil
	}
	return r.overBatch(n.out[0], n.in[0], x, d)
}

// overBatch repeats a value of one case over the batch and broadcasts its other axes to dims.
func (r *builder) overBatch(out, name string, x *value, dims []int) error {
	if x.c != nil && isFloat(x.dtype) {
		c := *x.c
		c.dims, c.from = append(slices.Repeat([]int{1}, len(dims)-len(c.dims)), c.dims...), ""
		full := r.param(name, &c, nil, r.role(name), out+".w")
		shape := r.Net.Params.Get(full).Value.Shape()
		if slices.Equal(shape.Dimensions[1:], dims[1:]) {
			r.Share("w", full)
			r.put(out, nil, nn.Value{Shape: shape, Batch: true}, r.batchSource(""))
			return nil
		}
		v := r.Share("w", full).Add(r.fresh(out+"/batch"), nn.Value{Shape: shape, Batch: true}, r.batchSource(""))
		r.put(out, nil, nn.Expand{Dims: dims}, v)
		return nil
	}
	// 0·(one number per case) + x has the batch's axis.
	shape := append(slices.Repeat([]dim{fixed(1)}, len(dims)-len(x.shape)), x.shape...)
	v := r.add(out+"/extended", nn.Reshape{Dims: r.dims(shape, x.shape)}, r.natural(name))
	one := &tensor{dtype: tFloat, dims: slices.Repeat([]int{1}, len(dims)), f: []float32{0}}
	full := r.param("", one, nil, nn.Constant, out+"/zero.w")
	z := r.Share("w", full).Add(r.fresh(out+"/zero"), nn.Value{Shape: r.Net.Params.Get(full).Value.Shape(), Batch: true}, r.batchSource(""))
	if !isFloat(x.dtype) {
		z = r.add(out+"/zero", nn.Cast{To: map[pb.TensorProto_DataType]dtypes.DType{tInt64: dtypes.Int64}[x.dtype]}, z)
		if x.dtype != tInt64 {
			return fmt.Errorf("expanding %s over the batch is not supported", x.dtype)
		}
	}
	v = r.add(out+"/batch", nn.Add, v, z)
	r.put(out, nil, nn.Expand{Dims: dims}, v)
	return nil
}

func buildConstantOfShape(r *builder, n *node) error {
	c, ok := n.fused.(*tensor)
	if !ok {
		return errors.New("its shape is not known")
	}
	to := r.shape(n.out[0])
	d := make([]int, len(to))
	for i, t := range to {
		if !t.static() && (i > 0 || t != batch) {
			return fmt.Errorf("shape %s: only the first axis may be the batch", shapeString(to))
		}
		d[i] = t.c
	}
	f := *c
	if !isFloat(f.dtype) {
		return fmt.Errorf("a constant of type %s over the batch is not supported", f.dtype)
	}
	return r.overBatch(n.out[0], "", &value{name: "", c: &f, dtype: f.dtype, shape: fixedShape(f.dims)}, d)
}

func buildPad(r *builder, n *node) error {
	x := n.in[0]
	pads, err := r.g.padsOf(n, r.rank(x))
	if err != nil {
		return err
	}
	op := nn.Pad{Pads: pads, Mode: nn.PadMode(n.string("mode", "constant"))}
	if op.Mode == "constant" {
		op.Mode = nn.PadConstant
	}
	if v := r.g.arg(n, 2); v != nil {
		if v.c == nil || v.c.size() != 1 {
			return errors.New("the value must be one constant")
		}
		op.Value = float64(v.c.floats()[0])
	}
	layout := r.layoutOf(x)
	op.Pads = arrange(layout, pads)
	r.put(n.out[0], layout, op, r.in(x, layout))
	return nil
}

func buildDepthToSpace(r *builder, n *node) error {
	order := nn.ChannelMinor
	switch m := n.string("mode", "DCR"); m {
	case "DCR":
	case "CRD":
		order = nn.ChannelMajor
	default:
		return fmt.Errorf("mode %q", m)
	}
	l := channelsLast(4)
	r.put(n.out[0], l, nn.PixelShuffle{R: n.int("blocksize", 1), Order: order}, r.in(n.in[0], l))
	return nil
}

func buildSpaceToDepth(r *builder, n *node) error {
	l := channelsLast(4)
	r.put(n.out[0], l, nn.PixelUnshuffle{R: n.int("blocksize", 1)}, r.in(n.in[0], l))
	return nil
}

func buildWhere(r *builder, n *node) error {
	in, layout := r.align(n, n.in)
	r.put(n.out[0], layout, nn.Where{}, in...)
	return nil
}

func buildBinary(r *builder, n *node) error {
	// A scalar constant needs no parameter.
	if r.g.values[n.out[0]].dtype != tBool && isFloat(r.g.values[n.out[0]].dtype) {
		for i := range 2 {
			c := r.g.values[n.in[i]].c
			x := n.in[1-i]
			if c == nil || c.size() != 1 || r.isConst(x) || r.rank(x) != r.rank(n.out[0]) {
				continue
			}
			v := float64(c.floats()[0])
			op, ok := nn.Affine{}, true
			switch {
			case n.op == "Add":
				op = nn.Affine{Scale: 1, Shift: v}
			case n.op == "Mul":
				op = nn.Affine{Scale: v}
			case n.op == "Sub" && i == 1:
				op = nn.Affine{Scale: 1, Shift: -v}
			case n.op == "Sub":
				op = nn.Affine{Scale: -1, Shift: v}
			case n.op == "Div" && i == 1 && v != 0:
				op = nn.Affine{Scale: 1 / v}
			default:
				ok = false
			}
			if ok && !math.IsNaN(v) && !math.IsInf(v, 0) {
				l := r.layoutOf(x)
				r.put(n.out[0], l, op, r.in(x, l))
				return nil
			}
		}
	}
	in, layout := r.align(n, n.in)
	r.put(n.out[0], layout, nn.Binary{Fn: n.op}, in...)
	return nil
}

func buildVariadic(r *builder, n *node) error {
	in, layout := r.align(n, n.in)
	op := nn.Binary{Fn: map[string]string{"Max": "Max", "Min": "Min", "Sum": "Add", "Mean": "Add"}[n.op]}
	v := in[0]
	for _, x := range in[1:] {
		v = r.add(n.out[0]+"/part", op, v, x)
	}
	var last nn.Op = nn.Unary{Fn: "Identity"}
	if n.op == "Mean" {
		last = nn.Affine{Scale: 1 / float64(len(in))}
	}
	r.put(n.out[0], layout, last, v)
	return nil
}

func buildActivation(r *builder, n *node) error {
	x := n.in[0]
	var op nn.Op
	switch n.op {
	case "LeakyRelu":
		op = nn.LeakyReLU{Alpha: n.float("alpha", .01)}
	case "HardSigmoid":
		op = nn.HardSigmoid{Alpha: n.float("alpha", .2), Beta: n.float("beta", .5)}
	case "Gelu":
		op = nn.GELU{Tanh: n.string("approximate", "none") == "tanh"}
	case "~Gelu":
		op = nn.GELU{Tanh: n.fused.(bool)}
	case "~Silu":
		op = nn.SiLU
	default:
		op = nn.Unary{Fn: n.op}
	}
	l := r.layoutOf(x)
	r.put(n.out[0], l, op, r.in(x, l))
	return nil
}

// buildPieces writes rarer activations with what there is.
func buildPieces(r *builder, n *node) error {
	x, out := n.in[0], n.out[0]
	l := r.layoutOf(x)
	v := r.in(x, l)
	un := func(fn string, x string) string { return r.add(out+"/"+fn, nn.Unary{Fn: fn}, x) }
	switch n.op {
	case "Mish": // x·tanh(softplus(x))
		r.put(out, l, nn.Mul, v, un("Tanh", un("Softplus", v)))
	case "Softsign": // x/(1 + |x|)
		r.put(out, l, nn.Binary{Fn: "Div"}, v, r.add(out+"/shifted", nn.Affine{Scale: 1, Shift: 1}, un("Abs", v)))
	default: // γ·(max(x, 0) + α·(exp(min(x, 0)) − 1))
		alpha, gamma := n.float("alpha", 1), 1.
		if n.op == "Selu" {
			alpha, gamma = n.float("alpha", 1.67326319217681884765625), n.float("gamma", 1.05070102214813232421875)
		}
		neg := un("Exp", r.add(out+"/negative", nn.Clip{Lo: math.Inf(-1), Hi: 0}, v))
		neg = r.add(out+"/below", nn.Affine{Scale: gamma * alpha, Shift: -gamma * alpha}, neg)
		pos := r.add(out+"/above", nn.Affine{Scale: gamma}, un("Relu", v))
		r.put(out, l, nn.Add, pos, neg)
	}
	return nil
}

func buildClip(r *builder, n *node) error {
	x := n.in[0]
	lo, hi, ok := r.g.clipRange(n)
	if !ok {
		return errors.New("the bounds must be constant")
	}
	l := r.layoutOf(x)
	r.put(n.out[0], l, nn.Clip{Lo: lo, Hi: hi}, r.in(x, l))
	return nil
}

func buildPRelu(r *builder, n *node) error {
	x := n.in[0]
	c, name, err := r.constOf(n, 1)
	if err != nil {
		return err
	}
	rank := r.rank(x)
	shape := r.shape(x)
	if rank == 0 || len(c.dims) > rank {
		return fmt.Errorf("a slope of shape %v does not fit %s", c.dims, shapeString(shape))
	}
	// One slope per channel of the channels-last form, or one for all.
	at := -1
	for i, d := range c.dims {
		if d != 1 {
			if at >= 0 {
				return fmt.Errorf("a slope of shape %v is not supported, only one per channel", c.dims)
			}
			at = i + rank - len(c.dims)
		}
	}
	layout := r.layoutOf(x)
	if at >= 0 && (layout == nil && at != rank-1 || layout != nil && layout[rank-1] != at) {
		layout = append(slices.DeleteFunc(natural(rank), func(a int) bool { return a == at }), at)
	}
	last := rank - 1
	if layout != nil {
		last = layout[rank-1]
	}
	size := shape[last]
	if !size.static() || (at >= 0 && c.size() != size.c) {
		return fmt.Errorf("a slope of shape %v does not fit %s", c.dims, shapeString(shape))
	}
	if err := r.g.afford([]dim{size}); err != nil {
		return err
	}
	flat := *c
	flat.dims = []int{c.size()}
	wide := spread(&flat, []int{size.c})
	full := r.param(name, wide, nil, nn.Gain, n.out[0]+".w")
	v := r.in(x, layout)
	r.Share("w", full)
	r.put(n.out[0], layout, nn.PReLU{}, v)
	return nil
}

func buildReduce(r *builder, n *node) error {
	x := n.in[0]
	rank := r.rank(x)
	axes, keep, err := r.g.reduceAxes(n, rank)
	if err != nil {
		return err
	}
	layout := r.layoutOf(x)
	v := r.in(x, layout)
	fn := n.op
	if fn == "ReduceSumSquare" {
		v, fn = r.add(n.out[0]+"/square", nn.Mul, v, v), "ReduceSum"
	}
	if len(axes) == 0 {
		r.put(n.out[0], layout, nn.Unary{Fn: "Identity"}, v)
		return nil
	}
	var at, out []int
	for _, a := range axes {
		at = append(at, position(layout, a, rank))
	}
	slices.Sort(at)
	for _, a := range layout {
		switch {
		case keep:
			out = append(out, a)
		case !slices.Contains(axes, a):
			k := a
			for _, b := range axes {
				if b < a {
					k--
				}
			}
			out = append(out, k)
		}
	}
	r.put(n.out[0], out, nn.Reduce{Fn: fn, Axes: at, Keep: keep}, v)
	return nil
}

func buildArgMax(r *builder, n *node) error {
	axis, err := axisOf(n.int("axis", 0), r.rank(n.in[0]))
	if err != nil {
		return err
	}
	v := r.add(n.out[0]+"/int32", nn.ArgMax{Axis: axis, Keep: n.int("keepdims", 1) == 1}, r.natural(n.in[0]))
	r.put(n.out[0], nil, nn.Cast{To: dtypes.Int64}, v)
	return nil
}

func buildSoftmax(r *builder, n *node) error {
	x := n.in[0]
	rank := r.rank(x)
	def := -1
	if r.g.opset < 13 {
		def = 1
	}
	axis := 0
	if s, ok := n.fused.(fusedSoftmax); ok {
		axis = s.axis
	} else {
		var err error
		if axis, err = axisOf(n.int("axis", def), rank); err != nil {
			return err
		}
		// Before operator set 13 all axes from this one on are one.
		if r.g.opset < 13 && axis != rank-1 {
			v, err := volumeOf(r.shape(x)[axis+1:])
			if err != nil {
				return err
			}
			if v.coef != 1 || v.pow != 0 {
				if axis == 0 {
					return errors.New("softmax over the batch is not supported")
				}
				flat := append(slices.Clone(r.shape(x)[:axis]), fixed(-1))
				s, err := reshape(r.shape(x), flat, true)
				if err != nil {
					return err
				}
				y := r.add(n.out[0]+"/flat", nn.Reshape{Dims: r.dims(s, r.shape(x))}, r.natural(x))
				y = r.add(n.out[0]+"/softmax", nn.Softmax{Log: n.op == "LogSoftmax"}, y)
				r.put(n.out[0], nil, nn.Reshape{Dims: r.dims(r.shape(x), s)}, y)
				return nil
			}
		}
	}
	layout := r.layoutOf(x)
	p := position(layout, axis, rank)
	if p == 0 {
		return errors.New("softmax over the batch is not supported")
	}
	if p == rank-1 {
		p = 0
	}
	r.put(n.out[0], layout, nn.Softmax{Axis: p, Log: n.op == "LogSoftmax"}, r.in(x, layout))
	return nil
}

func buildOneHot(r *builder, n *node) error {
	depth, values := r.g.arg(n, 1).c, r.g.arg(n, 2).c.floats()
	if !isFloat(r.g.arg(n, 2).dtype) {
		return errors.New("values must be floating")
	}
	r.put(n.out[0], nil, nn.OneHot{Depth: depth.ints()[0].c, On: float64(values[1]), Off: float64(values[0])}, r.natural(n.in[0]))
	return nil
}

func buildQuantize(r *builder, n *node) error {
	s, z, ok := (&fuser{g: r.g}).grid(n)
	if !ok || n.int("block_size", 0) != 0 {
		return errors.New("scale and zero point must be constants without blocks")
	}
	t := r.g.values[n.out[0]].dtype
	lo, hi := 0., math.Exp2(float64(elemBits[t]))-1
	if t == tInt8 || t == tInt4 || t == tInt16 || t == tInt32 {
		lo, hi = -math.Exp2(float64(elemBits[t]-1)), math.Exp2(float64(elemBits[t]-1))-1
	}
	x := n.in[0]
	sv, zv, err := r.gridValues(n, s, z, r.shape(x))
	if err != nil {
		return err
	}
	v := r.add(n.out[0]+"/scaled", nn.Binary{Fn: "Div"}, r.natural(x), sv)
	v = r.add(n.out[0]+"/rounded", nn.Unary{Fn: "Round"}, v)
	v = r.add(n.out[0]+"/shifted", nn.Add, v, zv)
	r.put(n.out[0], nil, nn.Clip{Lo: lo, Hi: hi}, v) // codes stay float32 in the network: they are exact there
	return nil
}

func buildDequantize(r *builder, n *node) error {
	s, z, ok := (&fuser{g: r.g}).grid(n)
	if !ok || n.int("block_size", 0) != 0 {
		return errors.New("scale and zero point must be constants without blocks")
	}
	x := n.in[0]
	sv, zv, err := r.gridValues(n, s, z, r.shape(x))
	if err != nil {
		return err
	}
	v := r.natural(x)
	if p := r.g.values[x].prod; p == nil || p.op != "QuantizeLinear" {
		v = r.add(n.out[0]+"/float", nn.Cast{To: dtypes.Float32}, v)
	}
	v = r.add(n.out[0]+"/centred", nn.Binary{Fn: "Sub"}, v, zv)
	r.put(n.out[0], nil, nn.Mul, v, sv)
	return nil
}

// gridValues gives scales and zero points as values that broadcast against x.
func (r *builder) gridValues(n *node, s, z []float32, x []dim) (scale, zero string, err error) {
	dims := []int{}
	if len(s) != 1 {
		a, err := axisOf(n.int("axis", 1), len(x))
		if err != nil {
			return "", "", err
		}
		if x[a] != fixed(len(s)) {
			return "", "", fmt.Errorf("%d scales for axis %d of %s", len(s), a, shapeString(x))
		}
		dims = slices.Repeat([]int{1}, len(x))
		dims[a] = len(s)
	}
	val := func(what string, f []float32) string {
		return r.constant(n.out[0]+"/"+what, &tensor{dtype: tFloat, dims: dims, f: f}, nil)
	}
	return val("scale", s), val("zero", z), nil
}

func buildQDQ(r *builder, n *node) error {
	p := n.fused.(fusedQDQ)
	x := n.in[0]
	rank := r.rank(x)
	layout := r.layoutOf(x)
	if p.axis >= 0 && position(layout, p.axis, rank) != rank-1 {
		layout = append(slices.DeleteFunc(natural(rank), func(a int) bool { return a == p.axis }), p.axis)
	}
	d := nn.QuantizeDequantize{Bits: elemBits[p.dtype], Signed: p.dtype == tInt8 || p.dtype == tInt4, PerChannel: p.axis >= 0}
	v := r.in(x, layout)
	r.Share("scale", r.floatParam(n.out[0]+".scale", nn.Constant, p.scale, len(p.scale)))
	r.Share("zero", r.floatParam(n.out[0]+".zero", nn.Constant, p.zero, len(p.zero)))
	r.put(n.out[0], layout, d, v)
	return nil
}

package onnx

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"maps"
	"math"
	"slices"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"google.golang.org/protobuf/proto"

	"github.com/lathe-ml/lathe/internal/atomicfile"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/onnx/internal/pb"
)

// WriteOptions say how a network is written.
type WriteOptions struct {
	// Opset is the operator set: 17 to 21. If 0, it is 17, which every current runtime loads. Blocks of 4-bit weights
	// need 21.
	Opset int
}

// irVersion is the file format version that goes with an operator set.
func irVersion(opset int) int64 {
	if opset >= 21 {
		return 10
	}
	return 8
}

// WriteFile writes a network in evaluation mode as a standard ONNX model, atomically.
//
// Inputs and outputs keep the network's names, types and layout, with the batch (axis 0) open: a network that was read
// from channels-first ONNX has channels-first inputs again; one built in Lathe takes images as [N, H, W, C], and a
// Transpose follows. Network.Meta becomes the model's metadata. Ops without an ONNX form (nn.Func, recurrent cells) are
// refused with the node's name.
func WriteFile(path string, net *nn.Network, o WriteOptions) error {
	b, err := Marshal(net, o)
	if err != nil {
		return err
	}
	err = atomicfile.Write(path, func(w io.Writer) error {
		_, err := w.Write(b)
		return err
	})
	if err != nil {
		return fmt.Errorf("onnx: writing %s: %w", path, err)
	}
	return nil
}

// Marshal is WriteFile into memory.
func Marshal(net *nn.Network, o WriteOptions) ([]byte, error) {
	if o.Opset == 0 {
		o.Opset = 17
	}
	if o.Opset < 17 || o.Opset > 21 {
		return nil, fmt.Errorf("onnx: operator set %d is not written; use 17 to 21", o.Opset)
	}
	b, err := marshal(net, o)
	if err != nil {
		return nil, fmt.Errorf("onnx: %w", err)
	}
	return b, nil
}

func marshal(net *nn.Network, o WriteOptions) ([]byte, error) {
	if err := net.Check(); err != nil {
		return nil, err
	}
	nominal, err := net.Shapes(0)
	if err != nil {
		return nil, err
	}
	// The output axes that follow the batch are those that differ between two batches.
	other := nominal
	if len(net.Inputs) > 0 && net.Inputs[0].Shape.Rank() > 0 {
		if s, err := net.Shapes(net.Inputs[0].Shape.Dimensions[0] + 1); err == nil {
			other = s
		}
	}
	e := &Emitter{
		net: net, opset: o.Opset, shapes: nominal, taken: map[string]bool{}, params: map[string]string{},
		wanted: map[string]bool{}, held: map[string][]heldLayout{}, small: map[string]string{}, count: map[string]int{},
	}
	g := &pb.GraphProto{Name: proto.String("lathe")}
	for _, in := range net.Inputs {
		v, err := valueInfo(in.Name, nominal[in.Name], other[in.Name])
		if err != nil {
			return nil, fmt.Errorf("input %q: %w", in.Name, err)
		}
		g.Input = append(g.Input, v)
		e.Put(in.Name, nil, e.Fresh(in.Name))
	}
	final := map[string]bool{}
	for _, out := range net.Outputs {
		if final[out] {
			return nil, fmt.Errorf("value %q is an output twice", out)
		}
		final[out] = true
		e.wanted[out] = true
	}
	table := exporters()
	for _, n := range net.Nodes {
		if err := e.export(table, n); err != nil {
			return nil, fmt.Errorf("node %q (%s): %w", n.Name, n.Op.Kind(), err)
		}
	}
	for _, out := range net.Outputs {
		name := e.value(out, nil)
		if name != out {
			if e.taken[out] {
				return nil, fmt.Errorf("output %q has the name of an input; add a node between them", out)
			}
			e.taken[out] = true
			e.nodes = append(e.nodes, &pb.NodeProto{OpType: proto.String("Identity"), Name: proto.String(out), Input: []string{name}, Output: []string{out}})
		}
		v, err := valueInfo(out, nominal[out], other[out])
		if err != nil {
			return nil, fmt.Errorf("output %q: %w", out, err)
		}
		g.Output = append(g.Output, v)
	}
	if e.err != nil {
		return nil, e.err
	}
	g.Node, g.Initializer = e.nodes, e.inits
	m := &pb.ModelProto{
		IrVersion: proto.Int64(irVersion(o.Opset)), ProducerName: proto.String("lathe"), Graph: g,
		OpsetImport: []*pb.OperatorSetIdProto{{Domain: proto.String(""), Version: proto.Int64(int64(o.Opset))}},
	}
	for _, k := range slices.Sorted(maps.Keys(net.Meta)) {
		m.MetadataProps = append(m.MetadataProps, &pb.StringStringEntryProto{Key: proto.String(k), Value: proto.String(net.Meta[k])})
	}
	return proto.MarshalOptions{Deterministic: true}.Marshal(m)
}

func (e *Emitter) export(table map[string]exporter, n *nn.Node) (err error) {
	if x, ok := n.Op.(Exporter); ok {
		err = x.ExportONNX(e, n)
	} else if f := table[opName(n.Op)]; f != nil {
		err = nn.Catch(func() { err = f(e, n) })
	} else {
		err = fmt.Errorf("this op has no ONNX form; write the network as safetensors, or replace the node")
	}
	if err == nil {
		err = e.err
	}
	return err
}

func valueInfo(name string, s, other shapes.Shape) (*pb.ValueInfoProto, error) {
	t, ok := map[dtypes.DType]DataType{
		dtypes.Float32: Float32, dtypes.Float64: Float64, dtypes.Int32: Int32, dtypes.Int64: Int64,
		dtypes.Uint8: Uint8, dtypes.Int8: Int8, dtypes.Bool: Bool,
	}[s.DType]
	if !ok {
		return nil, fmt.Errorf("type %s has no ONNX form", s.DType)
	}
	ts := &pb.TensorShapeProto{}
	for i, d := range s.Dimensions {
		x := &pb.TensorShapeProto_Dimension{Value: &pb.TensorShapeProto_Dimension_DimValue{DimValue: int64(d)}}
		if i < other.Rank() && other.Dimensions[i] != d {
			x.Value = &pb.TensorShapeProto_Dimension_DimParam{DimParam: "batch"}
			if i > 0 {
				x.Value = &pb.TensorShapeProto_Dimension_DimParam{DimParam: fmt.Sprintf("%s_%d", name, i)}
			}
		}
		ts.Dim = append(ts.Dim, x)
	}
	return &pb.ValueInfoProto{Name: &name, Type: &pb.TypeProto{Value: &pb.TypeProto_TensorType{
		TensorType: &pb.TypeProto_Tensor{ElemType: proto.Int32(int32(t)), Shape: ts},
	}}}, nil
}

// exporter writes one node.
type exporter func(e *Emitter, n *nn.Node) error

// opName is the key of an op in the table of exporters: its Go type.
func opName(op nn.Op) string { return fmt.Sprintf("%T", op) }

// exporters is the table of nn's ops.
func exporters() map[string]exporter {
	m := map[string]exporter{}
	for _, x := range []struct {
		op nn.Op
		f  exporter
	}{
		{nn.Dense{}, exportDense},
		{nn.Conv{}, exportConv},
		{nn.ConvTranspose{}, exportConvTranspose},
		{nn.Embedding{}, exportEmbedding},
		{nn.MatMul{}, exportMatMul},
		{nn.RoPE{}, exportRoPE},
		{nn.CausalMask{}, exportCausalMask},
		{nn.RepeatHeads{}, exportRepeatHeads},
		{nn.LayerNorm{}, exportLayerNorm},
		{nn.RMSNorm{}, exportRMSNorm},
		{nn.CRMSNorm{}, exportCRMSNorm},
		{nn.BatchNorm{}, exportBatchNorm},
		{nn.GroupNorm{}, exportGroupNorm},
		{nn.Unary{}, exportUnary},
		{nn.Binary{}, exportBinary},
		{nn.GELU{}, exportGELU},
		{nn.LeakyReLU{}, exportLeakyReLU},
		{nn.HardSigmoid{}, exportHardSigmoid},
		{nn.Clip{}, exportClip},
		{nn.Affine{}, exportAffine},
		{nn.Where{}, exportWhere},
		{nn.PReLU{}, exportPReLU},
		{nn.Reduce{}, exportReduce},
		{nn.Softmax{}, exportSoftmax},
		{nn.Pool{}, exportPool},
		{nn.ArgMax{}, exportArgMax},
		{nn.Dropout{}, exportAlias},
		{nn.DropPath{}, exportAlias},
		{nn.Reshape{}, exportReshape},
		{nn.Transpose{}, exportTranspose},
		{nn.Concat{}, exportConcat},
		{nn.Slice{}, exportSlice},
		{nn.Split{}, exportSplit},
		{nn.Pad{}, exportPad},
		{nn.Value{}, exportValue},
		{nn.Gather{}, exportGather},
		{nn.Expand{}, exportExpand},
		{nn.Cast{}, exportCast},
		{nn.OneHot{}, exportOneHot},
		{nn.PixelShuffle{}, exportPixelShuffle},
		{nn.PixelUnshuffle{}, exportPixelUnshuffle},
		{nn.Resize{}, exportResize},
		{nn.QuantizeDequantize{}, exportQuantizeDequantize},
	} {
		m[opName(x.op)] = x.f
	}
	return m
}

func exportDense(e *Emitter, n *nn.Node) error {
	d := n.Op.(nn.Dense)
	w, err := e.Weight(n, []int{1, 0})
	if err != nil {
		return err
	}
	x := e.In(n, 0)
	if d.NoBias {
		e.Out(n, nil, "MatMul", []string{x, w})
		return nil
	}
	e.Out(n, nil, "Add", []string{e.Node("MatMul", n.Name+"/product", []string{x, w}), e.Param(n, "b", nil)})
	return nil
}

func exportConv(e *Emitter, n *nn.Node) error {
	d := n.Op.(nn.Conv)
	r := len(d.Kernel)
	x, layout := e.ChannelsFirst(n, 0)
	w, err := e.Weight(n, channelsFirst(r+2))
	if err != nil {
		return err
	}
	in := []string{x, w}
	if !d.NoBias {
		in = append(in, e.Param(n, "b", nil))
	}
	attrs := windowAttrs(d.Kernel, d.Stride, d.Pad)
	if len(d.Dilation) > 0 {
		attrs = append(attrs, Ints("dilations", ones(d.Dilation, r)...))
	}
	if d.Groups > 1 {
		attrs = append(attrs, Int("group", d.Groups))
	}
	e.Out(n, layout, "Conv", in, attrs...)
	return nil
}

// ones fills absent entries of a per-axis list with 1.
func ones(v []int, r int) []int {
	out := make([]int, r)
	for i := range out {
		if out[i] = 1; i < len(v) && v[i] > 0 {
			out[i] = v[i]
		}
	}
	return out
}

func windowAttrs(kernel, stride []int, pad [][2]int) []Attr {
	r := len(kernel)
	pads := make([]int, 2*r)
	for i, p := range pad {
		if i < r {
			pads[i], pads[i+r] = p[0], p[1]
		}
	}
	return []Attr{Ints("kernel_shape", kernel...), Ints("strides", ones(stride, r)...), Ints("pads", pads...)}
}

func exportConvTranspose(e *Emitter, n *nn.Node) error {
	d := n.Op.(nn.ConvTranspose)
	r := len(d.Kernel)
	x, layout := e.ChannelsFirst(n, 0)
	perm := []int{r + 1, 0} // [out, k..., in] -> [in, out, k...]
	for i := range r {
		perm = append(perm, i+1)
	}
	groups := max(d.Groups, 1)
	var w string
	if groups == 1 {
		var err error
		if w, err = e.Weight(n, perm); err != nil {
			return err
		}
	} else {
		if !nn.IsPlain(d) {
			return fmt.Errorf("a grouped transposed convolution is only written with plain weights")
		}
		p := e.net.Param(n, "w")
		dims := p.Value.Shape().Dimensions // [out, k..., in/groups]
		data := p.Data()
		per := len(data) / groups
		var flat []float32
		var gd []int
		for i := range groups {
			part, pd := permuted(data[i*per:(i+1)*per], append([]int{dims[0] / groups}, dims[1:]...), perm)
			flat, gd = append(flat, part...), pd
		}
		gd = slices.Clone(gd)
		gd[0] *= groups
		w = e.Floats(p.Name, flat, gd...)
	}
	in := []string{x, w}
	if !d.NoBias {
		in = append(in, e.Param(n, "b", nil))
	}
	attrs := windowAttrs(d.Kernel, d.Stride, d.Pad)
	if len(d.Dilation) > 0 {
		attrs = append(attrs, Ints("dilations", ones(d.Dilation, r)...))
	}
	if len(d.OutPad) > 0 {
		attrs = append(attrs, Ints("output_padding", d.OutPad...))
	}
	if groups > 1 {
		attrs = append(attrs, Int("group", groups))
	}
	e.Out(n, layout, "ConvTranspose", in, attrs...)
	return nil
}

func exportEmbedding(e *Emitter, n *nn.Node) error {
	w, err := e.Weight(n, nil)
	if err != nil {
		return err
	}
	e.Out(n, nil, "Gather", []string{w, e.In(n, 0)}, Int("axis", 0))
	return nil
}

func exportMatMul(e *Emitter, n *nn.Node) error {
	d := n.Op.(nn.MatMul)
	in := []string{e.In(n, 0), e.In(n, 1)}
	if d.Scale == 0 || d.Scale == 1 {
		e.Out(n, nil, "MatMul", in)
		return nil
	}
	e.Out(n, nil, "Mul", []string{e.Node("MatMul", n.Name+"/product", in), e.Scalar(d.Scale)})
	return nil
}

// exportRoPE writes x·cos + turned(x)·sin with the tables of the nominal length.
func exportRoPE(e *Emitter, n *nn.Node) error {
	s := e.Shape(n.In[0]).Dimensions
	tokens, width := s[len(s)-3], s[len(s)-1]
	cos, sin := n.Op.(nn.RoPE).Tables(tokens, width)
	x := e.In(n, 0)
	part := func(name string, from, to int) string {
		return e.Node("Slice", n.Name+"/"+name, []string{x, e.List(from), e.List(to), e.List(-1)})
	}
	turned := e.Node("Concat", n.Name+"/turned", []string{
		e.Node("Neg", n.Name+"/negated", []string{part("second", width/2, width)}), part("first", 0, width/2),
	}, Int("axis", -1))
	e.Out(n, nil, "Add", []string{
		e.Node("Mul", n.Name+"/straight", []string{x, e.table(n.Name+"/cos", cos, tokens, 1, width)}),
		e.Node("Mul", n.Name+"/across", []string{turned, e.table(n.Name+"/sin", sin, tokens, 1, width)}),
	})
	return nil
}

// exportCausalMask adds the mask of the nominal length.
func exportCausalMask(e *Emitter, n *nn.Node) error {
	s := e.Shape(n.In[0]).Dimensions
	queries, keys := s[len(s)-2], s[len(s)-1]
	mask := n.Op.(nn.CausalMask).Table(queries, keys)
	e.Out(n, nil, "Add", []string{e.In(n, 0), e.table(n.Name+"/mask", mask, queries, keys)})
	return nil
}

// exportRepeatHeads puts copies beside each other on a new axis and merges it with that of the heads.
func exportRepeatHeads(e *Emitter, n *nn.Node) error {
	s := e.Shape(n.In[0]).Dimensions
	if len(s) != 4 {
		return fmt.Errorf("heads are repeated in %v; want [batch, tokens, heads, width]", s)
	}
	times := n.Op.(nn.RepeatHeads).Times
	one := e.Node("Unsqueeze", n.Name+"/one", []string{e.In(n, 0), e.List(3)})
	all := e.Node("Concat", n.Name+"/all", slices.Repeat([]string{one}, times), Int("axis", 3))
	e.Out(n, nil, "Reshape", []string{all, e.List(0, 0, s[2]*times, s[3])})
	return nil
}

// table gives a float32 constant; equal ones are stored once.
func (e *Emitter) table(base string, v []float64, dims ...int) string {
	f := make([]float32, len(v))
	h := fnv.New64a()
	for i, x := range v {
		f[i] = float32(x)
		h.Write(binary.LittleEndian.AppendUint32(nil, math.Float32bits(f[i])))
	}
	key := fmt.Sprint("table", dims, h.Sum64())
	if e.small[key] == "" {
		e.small[key] = e.Floats(base, f, dims...)
	}
	return e.small[key]
}

// normLayout brings the normalised axes to the end.
func normLayout(axes []int, rank int) (layout, sorted []int) {
	if len(axes) == 0 {
		axes = []int{-1}
	}
	for _, a := range axes {
		sorted = append(sorted, (a+rank)%rank)
	}
	slices.Sort(sorted)
	for i := range rank {
		if !slices.Contains(sorted, i) {
			layout = append(layout, i)
		}
	}
	return append(layout, sorted...), sorted
}

func exportLayerNorm(e *Emitter, n *nn.Node) error {
	d := n.Op.(nn.LayerNorm)
	s := e.Shape(n.In[0])
	layout, axes := normLayout(d.Axes, s.Rank())
	dims := make([]int, len(axes))
	for i, a := range axes {
		dims[i] = s.Dimensions[a]
	}
	in := []string{e.InLayout(n, 0, layout)}
	if d.NoGain && product(dims) > 1<<26 {
		return fmt.Errorf("ONNX wants a gain, and one of %d elements is too large", product(dims))
	}
	if d.NoGain {
		in = append(in, e.Floats(n.Name+"/ones", slices.Repeat([]float32{1}, product(dims)), dims...))
	} else {
		in = append(in, e.Param(n, "w", nil))
	}
	if !d.NoBias {
		in = append(in, e.Param(n, "b", nil))
	}
	e.Out(n, layout, "LayerNormalization", in, Int("axis", -len(axes)), Float("epsilon", d.Epsilon()))
	return nil
}

// reduceNode writes a reduction of the given tensor axes.
func (e *Emitter) reduceNode(fn, base, x string, axes []int, keep bool) string {
	k := Int("keepdims", int(fixedBool(keep)))
	if fn == "ReduceSum" || e.opset >= 18 {
		return e.Node(fn, base, []string{x, e.List(axes...)}, k)
	}
	return e.Node(fn, base, []string{x}, Ints("axes", axes...), k)
}

// step is one node of a chain; its input "" is the step before.
type step struct {
	op string
	in []string
}

// chain adds nodes one behind the other; the last has the output's name.
func (e *Emitter) chain(n *nn.Node, layout []int, steps []step) {
	y := ""
	for i, s := range steps {
		in := slices.Clone(s.in)
		for j := range in {
			if in[j] == "" {
				in[j] = y
			}
		}
		if i == len(steps)-1 {
			e.Out(n, layout, s.op, in)
			return
		}
		y = e.Node(s.op, fmt.Sprintf("%s/%s", n.Name, s.op), in)
	}
}

func fixedBool(b bool) int { return truth(b).c }

func exportRMSNorm(e *Emitter, n *nn.Node) error {
	d := n.Op.(nn.RMSNorm)
	s := e.Shape(n.In[0])
	layout, axes := normLayout(d.Axes, s.Rank())
	x := e.InLayout(n, 0, layout)
	tail := make([]int, len(axes))
	for i := range tail {
		tail[i] = s.Rank() - len(axes) + i
	}
	ms := e.reduceNode("ReduceMean", n.Name+"/mean_square", e.Node("Mul", n.Name+"/square", []string{x, x}), tail, true)
	root := e.Node("Sqrt", n.Name+"/root", []string{e.Node("Add", n.Name+"/shifted", []string{ms, e.Scalar(d.Epsilon())})})
	steps := []step{{"Div", []string{x, root}}}
	if !d.NoGain {
		steps = append(steps, step{"Mul", []string{"", e.Param(n, "w", nil)}})
	}
	if d.Bias {
		steps = append(steps, step{"Add", []string{"", e.Param(n, "b", nil)}})
	}
	e.chain(n, layout, steps)
	return nil
}

func exportBatchNorm(e *Emitter, n *nn.Node) error {
	d := n.Op.(nn.BatchNorm)
	if d.Always {
		return fmt.Errorf("normalising by batch statistics in evaluation has no ONNX form; set Always to false")
	}
	x, layout := e.ChannelsFirst(n, 0)
	s := e.Shape(n.In[0]).Dimensions
	c := s[len(s)-1]
	in := []string{x}
	if d.NoAffine {
		in = append(in, e.Floats(n.Name+"/ones", slices.Repeat([]float32{1}, c), c), e.Floats(n.Name+"/zeros", make([]float32, c), c))
	} else {
		in = append(in, e.Param(n, "w", nil), e.Param(n, "b", nil))
	}
	e.Out(n, layout, "BatchNormalization", append(in, e.Param(n, "mean", nil), e.Param(n, "var", nil)), Float("epsilon", d.Epsilon()))
	return nil
}

func exportGroupNorm(e *Emitter, n *nn.Node) error {
	d := n.Op.(nn.GroupNorm)
	s := e.Shape(n.In[0]).Dimensions
	r, c := len(s), s[len(s)-1]
	eps := d.Eps
	if eps == 0 {
		eps = 1e-5
	}
	x, layout := e.ChannelsFirst(n, 0)
	gain := func() (string, string) { return e.Param(n, "w", nil), e.Param(n, "b", nil) }
	if d.NoAffine {
		gain = func() (string, string) {
			return e.Floats(n.Name+"/ones", slices.Repeat([]float32{1}, c), c), e.Floats(n.Name+"/zeros", make([]float32, c), c)
		}
	}
	if d.Groups == c {
		w, b := gain()
		e.Out(n, layout, "InstanceNormalization", []string{x, w, b}, Float("epsilon", eps))
		return nil
	}
	if e.opset >= 21 {
		w, b := gain()
		e.Out(n, layout, "GroupNormalization", []string{x, w, b}, Float("epsilon", eps), Int("num_groups", d.Groups))
		return nil
	}
	flat := e.Node("Reshape", n.Name+"/groups", []string{x, e.List(0, d.Groups, -1)})
	y := e.Node("InstanceNormalization", n.Name+"/standard", []string{
		flat,
		e.Floats(n.Name+"/ones", slices.Repeat([]float32{1}, d.Groups), d.Groups), e.Floats(n.Name+"/zeros", make([]float32, d.Groups), d.Groups),
	}, Float("epsilon", eps))
	back := arrange(layout, s)
	back = append([]int{0}, back[1:]...)
	steps := []step{{"Reshape", []string{y, e.List(back...)}}}
	if !d.NoAffine {
		dims := append([]int{c}, slices.Repeat([]int{1}, r-2)...)
		steps = append(steps, step{"Mul", []string{"", e.reshapedParam(n, "w", dims)}}, step{"Add", []string{"", e.reshapedParam(n, "b", dims)}})
	}
	e.chain(n, layout, steps)
	return nil
}

// reshapedParam writes a parameter's values in another shape.
func (e *Emitter) reshapedParam(n *nn.Node, local string, dims []int) string {
	p := e.net.Param(n, local)
	if p == nil {
		e.Fail(fmt.Errorf("parameter %q is missing", local))
		return ""
	}
	key := fmt.Sprint(p.Name, "as", dims)
	if e.params[key] == "" {
		e.params[key] = e.Floats(p.Name, p.Data(), dims...)
	}
	return e.params[key]
}

func exportUnary(e *Emitter, n *nn.Node) error {
	fn := n.Op.(nn.Unary).Fn
	x, layout := e.Any(n, 0)
	switch fn {
	case "Identity":
		return exportAlias(e, n)
	case "Silu":
		e.Out(n, layout, "Mul", []string{x, e.Node("Sigmoid", n.Name+"/gate", []string{x})})
		return nil
	}
	e.Out(n, layout, fn, []string{x})
	return nil
}

// exportAlias makes the output another name of the input.
func exportAlias(e *Emitter, n *nn.Node) error {
	e.held[n.Out[0]] = slices.Clone(e.held[n.In[0]])
	return nil
}

func exportBinary(e *Emitter, n *nn.Node) error {
	in, layout := e.aligned(n)
	e.Out(n, layout, n.Op.(nn.Binary).Fn, in)
	return nil
}

func exportWhere(e *Emitter, n *nn.Node) error {
	in, layout := e.aligned(n)
	e.Out(n, layout, "Where", in)
	return nil
}

func exportGELU(e *Emitter, n *nn.Node) error {
	d := n.Op.(nn.GELU)
	x, layout := e.Any(n, 0)
	if e.opset >= 20 {
		kind := "none"
		if d.Tanh {
			kind = "tanh"
		}
		e.Out(n, layout, "Gelu", []string{x}, String("approximate", kind))
		return nil
	}
	var gate string
	if d.Tanh {
		cube := e.Node("Mul", n.Name+"/cube", []string{e.Node("Mul", n.Name+"/square", []string{x, x}), x})
		sum := e.Node("Add", n.Name+"/sum", []string{x, e.Node("Mul", n.Name+"/term", []string{cube, e.Scalar(.044715)})})
		gate = e.Node("Tanh", n.Name+"/tanh", []string{e.Node("Mul", n.Name+"/scaled", []string{sum, e.Scalar(math.Sqrt(2 / math.Pi))})})
	} else {
		gate = e.Node("Erf", n.Name+"/erf", []string{e.Node("Div", n.Name+"/scaled", []string{x, e.Scalar(math.Sqrt2)})})
	}
	y := e.Node("Mul", n.Name+"/gated", []string{x, e.Node("Add", n.Name+"/gate", []string{gate, e.Scalar(1)})})
	e.Out(n, layout, "Mul", []string{y, e.Scalar(.5)})
	return nil
}

func exportLeakyReLU(e *Emitter, n *nn.Node) error {
	x, layout := e.Any(n, 0)
	e.Out(n, layout, "LeakyRelu", []string{x}, Float("alpha", n.Op.(nn.LeakyReLU).Alpha))
	return nil
}

func exportHardSigmoid(e *Emitter, n *nn.Node) error {
	d := n.Op.(nn.HardSigmoid)
	x, layout := e.Any(n, 0)
	e.Out(n, layout, "HardSigmoid", []string{x}, Float("alpha", d.Alpha), Float("beta", d.Beta))
	return nil
}

func exportClip(e *Emitter, n *nn.Node) error {
	d := n.Op.(nn.Clip)
	x, layout := e.Any(n, 0)
	in := []string{x, "", ""}
	if !math.IsInf(d.Lo, -1) {
		in[1] = e.Scalar(d.Lo)
	}
	if !math.IsInf(d.Hi, 1) {
		in[2] = e.Scalar(d.Hi)
	}
	for len(in) > 1 && in[len(in)-1] == "" {
		in = in[:len(in)-1]
	}
	e.Out(n, layout, "Clip", in)
	return nil
}

func exportAffine(e *Emitter, n *nn.Node) error {
	d := n.Op.(nn.Affine)
	x, layout := e.Any(n, 0)
	switch {
	case d.Shift == 0 && d.Scale == 1:
		return exportAlias(e, n)
	case d.Shift == 0:
		e.Out(n, layout, "Mul", []string{x, e.Scalar(d.Scale)})
	case d.Scale == 1:
		e.Out(n, layout, "Add", []string{x, e.Scalar(d.Shift)})
	default:
		e.Out(n, layout, "Add", []string{e.Node("Mul", n.Name+"/scaled", []string{x, e.Scalar(d.Scale)}), e.Scalar(d.Shift)})
	}
	return nil
}

func exportPReLU(e *Emitter, n *nn.Node) error {
	x, layout := e.Any(n, 0)
	r := e.Shape(n.In[0]).Rank()
	dims := slices.Repeat([]int{1}, r)
	dims[position(layout, -1, r)] = e.Shape(n.In[0]).Dimensions[r-1]
	e.Out(n, layout, "PRelu", []string{x, e.reshapedParam(n, "w", dims)})
	return nil
}

func exportReduce(e *Emitter, n *nn.Node) error {
	d := n.Op.(nn.Reduce)
	r := e.Shape(n.In[0]).Rank()
	x, layout := e.Any(n, 0)
	if layout == nil {
		layout = natural(r)
	}
	axes := d.Axes
	if len(axes) == 0 {
		axes = natural(r)
	}
	gone := map[int]bool{}
	var at []int
	for _, a := range axes {
		a = (a + r) % r
		gone[a] = true
		at = append(at, position(layout, a, r))
	}
	slices.Sort(at)
	var out []int
	for _, a := range layout {
		if d.Keep {
			out = append(out, a)
		} else if !gone[a] {
			k := a
			for b := range gone {
				if b < a {
					k--
				}
			}
			out = append(out, k)
		}
	}
	e.Put(n.Out[0], out, e.reduceNode(d.Fn, e.base(n.Out[0], out), x, at, d.Keep))
	return nil
}

func exportSoftmax(e *Emitter, n *nn.Node) error {
	d := n.Op.(nn.Softmax)
	r := e.Shape(n.In[0]).Rank()
	x, layout := e.Any(n, 0)
	axis, op := d.Axis, "Softmax"
	if axis == 0 {
		axis = -1
	}
	if d.Log {
		op = "LogSoftmax"
	}
	p := position(layout, axis, r)
	if p == r-1 {
		p = -1
	}
	e.Out(n, layout, op, []string{x}, Int("axis", p))
	return nil
}

func exportPool(e *Emitter, n *nn.Node) error {
	d := n.Op.(nn.Pool)
	x, layout := e.ChannelsFirst(n, 0)
	stride := d.Stride
	if stride == nil {
		stride = d.Kernel
	}
	attrs := windowAttrs(d.Kernel, stride, d.Pad)
	if d.Max {
		e.Out(n, layout, "MaxPool", []string{x}, attrs...)
		return nil
	}
	e.Out(n, layout, "AveragePool", []string{x}, append(attrs, Int("count_include_pad", fixedBool(d.CountPad)))...)
	return nil
}

func exportArgMax(e *Emitter, n *nn.Node) error {
	d := n.Op.(nn.ArgMax)
	y := e.Node("ArgMax", n.Name+"/int64", []string{e.In(n, 0)}, Int("axis", d.Axis), Int("keepdims", fixedBool(d.Keep)))
	e.Out(n, nil, "Cast", []string{y}, Int("to", int(Int32)))
	return nil
}

func exportReshape(e *Emitter, n *nn.Node) error {
	d := n.Op.(nn.Reshape)
	e.Out(n, nil, "Reshape", []string{e.In(n, 0), e.List(d.Dims...)})
	return nil
}

// exportTranspose adds no node: the output is there in another layout.
func exportTranspose(e *Emitter, n *nn.Node) error {
	perm := n.Op.(nn.Transpose).Perm
	inverse := make([]int, len(perm))
	for i, p := range perm {
		inverse[p] = i
	}
	for _, h := range e.held[n.In[0]] {
		from := h.layout
		if from == nil {
			from = natural(len(perm))
		}
		layout := make([]int, len(perm))
		for i, a := range from {
			layout[i] = inverse[a]
		}
		e.Put(n.Out[0], layout, h.name)
	}
	return nil
}

func exportConcat(e *Emitter, n *nn.Node) error {
	r := e.Shape(n.Out[0]).Rank()
	in, layout := e.aligned(n)
	e.Out(n, layout, "Concat", in, Int("axis", position(layout, n.Op.(nn.Concat).Axis, r)))
	return nil
}

func exportSlice(e *Emitter, n *nn.Node) error {
	d := n.Op.(nn.Slice)
	x, layout := e.Any(n, 0)
	a := position(layout, d.Axis, e.Shape(n.In[0]).Rank())
	to := d.To
	if to == nn.Open {
		to = math.MaxInt64
	}
	e.Out(n, layout, "Slice", []string{x, e.List(d.From), e.List(to), e.List(a), e.List(max(d.Step, 1))})
	return nil
}

func exportSplit(e *Emitter, n *nn.Node) error {
	d := n.Op.(nn.Split)
	x, layout := e.Any(n, 0)
	a := position(layout, d.Axis, e.Shape(n.In[0]).Rank())
	var bases []string
	for _, o := range n.Out {
		bases = append(bases, e.base(o, layout))
	}
	attrs := []Attr{Int("axis", a)}
	for i, name := range e.Nodes("Split", bases, []string{x, e.List(d.Sizes...)}, attrs...) {
		e.Put(n.Out[i], layout, name)
	}
	return nil
}

func exportPad(e *Emitter, n *nn.Node) error {
	d := n.Op.(nn.Pad)
	x, layout := e.Any(n, 0)
	p := arrange(layout, d.Pads)
	var list []int
	for side := range 2 {
		for _, q := range p {
			list = append(list, q[side])
		}
	}
	in := []string{x, e.List(list...)}
	mode := string(d.Mode)
	switch d.Mode {
	case nn.PadConstant:
		mode = "constant"
		in = append(in, e.Scalar(d.Value))
	case nn.PadWrap:
		if err := e.NeedOpset(19, "padding in mode wrap"); err != nil {
			return err
		}
	}
	e.Out(n, layout, "Pad", in, String("mode", mode))
	return nil
}

func exportValue(e *Emitter, n *nn.Node) error {
	d := n.Op.(nn.Value)
	w := e.Param(n, "w", nil)
	if !d.Batch {
		e.Put(n.Out[0], nil, w)
		return nil
	}
	size := e.Node("Shape", n.Name+"/batch", []string{e.In(n, 0)}, Int("start", 0), Int("end", 1))
	dims := e.Shape(n.Out[0]).Dimensions[1:]
	e.Out(n, nil, "Expand", []string{w, e.Node("Concat", n.Name+"/shape", []string{size, e.List(dims...)}, Int("axis", 0))})
	return nil
}

func exportGather(e *Emitter, n *nn.Node) error {
	e.Out(n, nil, "Gather", []string{e.In(n, 0), e.In(n, 1)}, Int("axis", n.Op.(nn.Gather).Axis))
	return nil
}

func exportExpand(e *Emitter, n *nn.Node) error {
	d := slices.Clone(n.Op.(nn.Expand).Dims)
	for i := range d {
		d[i] = max(d[i], 1)
	}
	e.Out(n, nil, "Expand", []string{e.In(n, 0), e.List(d...)})
	return nil
}

func exportCast(e *Emitter, n *nn.Node) error {
	to := n.Op.(nn.Cast).To
	t, ok := map[dtypes.DType]DataType{
		dtypes.Float32: Float32, dtypes.Int32: Int32, dtypes.Int64: Int64, dtypes.Uint8: Uint8, dtypes.Int8: Int8, dtypes.Bool: Bool,
	}[to]
	if to.IsFloat() {
		t, ok = Float32, true
	}
	if !ok {
		return fmt.Errorf("type %s has no ONNX form", to)
	}
	x, layout := e.Any(n, 0)
	e.Out(n, layout, "Cast", []string{x}, Int("to", int(t)))
	return nil
}

func exportOneHot(e *Emitter, n *nn.Node) error {
	d := n.Op.(nn.OneHot)
	v := e.Floats(n.Name+"/values", []float32{float32(d.Off), float32(d.On)}, 2)
	e.Out(n, nil, "OneHot", []string{e.In(n, 0), e.List(d.Depth), v}, Int("axis", -1))
	return nil
}

func exportPixelShuffle(e *Emitter, n *nn.Node) error {
	d := n.Op.(nn.PixelShuffle)
	x, layout := e.ChannelsFirst(n, 0)
	mode := "DCR"
	if d.Order == nn.ChannelMajor {
		mode = "CRD"
	}
	e.Out(n, layout, "DepthToSpace", []string{x}, Int("blocksize", d.R), String("mode", mode))
	return nil
}

func exportPixelUnshuffle(e *Emitter, n *nn.Node) error {
	d := n.Op.(nn.PixelUnshuffle)
	if d.Order == nn.ChannelMinor {
		x, layout := e.ChannelsFirst(n, 0)
		e.Out(n, layout, "SpaceToDepth", []string{x}, Int("blocksize", d.R))
		return nil
	}
	s := e.Shape(n.In[0]).Dimensions
	r := d.R
	y := e.Node("Reshape", n.Name+"/blocks", []string{e.In(n, 0), e.List(0, s[1]/r, r, s[2]/r, r, s[3])})
	y = e.Node("Transpose", n.Name+"/turned", []string{y}, Ints("perm", 0, 1, 3, 5, 2, 4))
	e.Out(n, nil, "Reshape", []string{y, e.List(0, s[1]/r, s[2]/r, s[3]*r*r)})
	return nil
}

func exportResize(e *Emitter, n *nn.Node) error {
	d := n.Op.(nn.Resize)
	in, out := e.Shape(n.In[0]).Dimensions, e.Shape(n.Out[0]).Dimensions
	x, layout := e.ChannelsFirst(n, 0)
	mode := "nearest"
	if d.Linear {
		mode = "linear"
	}
	attrs := []Attr{String("mode", mode), String("coordinate_transformation_mode", string(d.Coordinates()))}
	if !d.Linear {
		attrs = append(attrs, String("nearest_mode", string(d.Rounding())))
	}
	if len(d.Size) > 0 { // sizes name every axis, the open batch too
		keep := e.Node("Shape", n.Name+"/kept", []string{x}, Int("start", 0), Int("end", 2))
		e.Out(n, layout, "Resize", []string{x, "", "", e.Node("Concat", n.Name+"/sizes", []string{keep, e.List(d.Size...)}, Int("axis", 0))}, attrs...)
		return nil
	}
	scales := make([]float32, len(in))
	for i := range scales {
		if scales[i] = 1; i > 0 && i < len(in)-1 {
			scales[i] = float32(d.Factor(i-1, in[i], out[i]))
		}
	}
	e.Out(n, layout, "Resize", []string{x, "", e.Floats(n.Name+"/scales", arrange(layout, scales), len(in))}, attrs...)
	return nil
}

// exportQuantizeDequantize writes QuantizeLinear and DequantizeLinear. Fewer than eight bits limit the input to the
// grid's range first, since the codes saturate only at the range of their type. A zero point that is no code of the type
// (fractional, or a range without 0) is written with elementary operators, which compute the same.
func exportQuantizeDequantize(e *Emitter, n *nn.Node) error {
	d := n.Op.(nn.QuantizeDequantize)
	scale, zero := e.net.Param(n, "scale"), e.net.Param(n, "zero")
	if scale == nil || zero == nil {
		return errors.New("its scale or zero point is missing")
	}
	if d.Bits < 2 || d.Bits > 8 {
		return fmt.Errorf("%d bits, want 2 to 8", d.Bits)
	}
	s, z := scale.Data(), zero.Data()
	if len(s) != len(z) {
		return fmt.Errorf("it has %d scales and %d zero points", len(s), len(z))
	}
	x, layout := e.Any(n, 0)
	rank := e.Shape(n.In[0]).Rank()
	at := position(layout, -1, rank) // where the channels are
	// constant gives one number, or one per channel in the shape that broadcasts over x.
	constant := func(base string, v []float32) string {
		if len(v) == 1 {
			return e.Floats(base, v)
		}
		dims := slices.Repeat([]int{1}, rank)
		dims[at] = len(v)
		return e.Floats(base, v, dims...)
	}
	lo, hi := d.Range()
	t, least, most := Uint8, float32(0), float32(255)
	if d.Signed {
		t, least, most = Int8, -128, 127
	}
	codes := make([]int32, len(z))
	for i, v := range z {
		if v != float32(math.Trunc(float64(v))) || v < least || v > most {
			sc, zp := constant(scale.Name, s), constant(zero.Name, z)
			y := e.Node("Round", n.Name+"/round", []string{e.Node("Div", n.Name+"/div", []string{x, sc})})
			y = e.Node("Clip", n.Name+"/codes", []string{e.Node("Add", n.Name+"/shift", []string{y, zp}), e.Scalar(lo), e.Scalar(hi)})
			e.Out(n, layout, "Mul", []string{e.Node("Sub", n.Name+"/centred", []string{y, zp}), sc})
			return nil
		}
		codes[i] = int32(v)
	}
	if d.Bits < 8 {
		below, above := make([]float32, len(s)), make([]float32, len(s))
		for i := range s {
			below[i], above[i] = (float32(lo)-z[i])*s[i], (float32(hi)-z[i])*s[i]
		}
		if len(s) == 1 {
			x = e.Node("Clip", n.Name+"/grid", []string{x, e.Scalar(float64(below[0])), e.Scalar(float64(above[0]))})
		} else {
			x = e.Node("Max", n.Name+"/grid", []string{e.Node("Min", n.Name+"/below", []string{x, constant(n.Name+"/hi", above)}), constant(n.Name+"/lo", below)})
		}
	}
	var dims []int
	var attrs []Attr
	if len(s) > 1 {
		dims, attrs = []int{len(s)}, []Attr{Int("axis", at)}
	}
	in := []string{e.Floats(scale.Name, s, dims...), e.Codes(zero.Name, t, codes, dims...)}
	q := e.Node("QuantizeLinear", n.Name+"/codes", append([]string{x}, in...), attrs...)
	e.Out(n, layout, "DequantizeLinear", append([]string{q}, in...), attrs...)
	return nil
}

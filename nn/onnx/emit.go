package onnx

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/tensors"
	"google.golang.org/protobuf/proto"

	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/onnx/internal/pb"
)

// Exporter is an op that writes itself as ONNX nodes. Packages to the right of nn implement it for their ops; the ops
// of nn itself are in this package's table.
type Exporter interface {
	ExportONNX(e *Emitter, n *nn.Node) error
}

// WeightExporter is a stored form of a site's weight (nn.Repr) that writes itself as ONNX nodes. It returns the name of
// the whole weight with its axes permuted: axis i of the result is axis perm[i] of [out, ...]. A nil perm keeps them.
type WeightExporter interface {
	ExportWeight(e *Emitter, n *nn.Node, perm []int) (name string, err error)
}

// Emitter collects ONNX nodes while a network is written.
//
// A network's values are channels-last, while ONNX's convolutions and pools want channels first. The emitter keeps
// every value in whatever layout it was produced and adds a Transpose only where a reader wants another one. A layout
// says which axis of the value each axis of the ONNX tensor is: nil for the value's own order, [0 3 1 2] for the NCHW
// form of an NHWC value.
//
// The first mistake is kept and returned by WriteFile; calls after it do nothing.
type Emitter struct {
	net    *nn.Network
	opset  int
	shapes map[string]shapes.Shape
	nodes  []*pb.NodeProto
	inits  []*pb.TensorProto
	taken  map[string]bool         // ONNX names in use
	wanted map[string]bool         // names that outputs of the network must have
	params map[string]string       // parameter and permutation -> initializer
	held   map[string][]heldLayout // value -> the forms in which it is there
	small  map[string]string       // small constants by content
	count  map[string]int          // for fresh names
	err    error
}

type heldLayout struct {
	name   string
	layout []int
}

// Attr is a node's attribute; make it with Int, Ints, Float, Floats or String.
type Attr = *pb.AttributeProto

// Int is an integer attribute.
func Int(name string, v int) Attr {
	return &pb.AttributeProto{Name: &name, Type: pb.AttributeProto_INT.Enum(), I: proto.Int64(int64(v))}
}

// Ints is a list of integers as attribute.
func Ints(name string, v ...int) Attr {
	return &pb.AttributeProto{Name: &name, Type: pb.AttributeProto_INTS.Enum(), Ints: int64s(v)}
}

// Float is a floating attribute.
func Float(name string, v float64) Attr {
	return &pb.AttributeProto{Name: &name, Type: pb.AttributeProto_FLOAT.Enum(), F: proto.Float32(float32(v))}
}

// String is a text attribute.
func String(name, v string) Attr {
	return &pb.AttributeProto{Name: &name, Type: pb.AttributeProto_STRING.Enum(), S: []byte(v)}
}

func int64s(v []int) []int64 {
	out := make([]int64, len(v))
	for i, x := range v {
		out[i] = int64(x)
	}
	return out
}

// Network is the network that is being written.
func (e *Emitter) Network() *nn.Network { return e.net }

// Opset is the operator set that the file will declare.
func (e *Emitter) Opset() int { return e.opset }

// NeedOpset fails, naming what for and the remedy, when the file's operator set is older.
func (e *Emitter) NeedOpset(version int, what string) error {
	if e.opset < version {
		return fmt.Errorf("%s needs operator set %d; write with WriteOptions.Opset %d", what, version, version)
	}
	return nil
}

// Shape is the shape of a value at its nominal batch.
func (e *Emitter) Shape(value string) shapes.Shape { return e.shapes[value] }

// Fail keeps an error unless an earlier one stands.
func (e *Emitter) Fail(err error) {
	if e.err == nil && err != nil {
		e.err = err
	}
}

// Fresh makes an unused ONNX name from a base.
func (e *Emitter) Fresh(base string) string {
	name := base
	for e.taken[name] || e.wanted[name] {
		e.count[base]++
		name = fmt.Sprintf("%s/%d", base, e.count[base])
	}
	e.taken[name] = true
	return name
}

// Node adds an ONNX node with one output, named after base, and returns the output's name. Absent optional inputs are "".
func (e *Emitter) Node(op, base string, in []string, attrs ...Attr) string {
	return e.Nodes(op, []string{base}, in, attrs...)[0]
}

// Nodes adds an ONNX node with several outputs.
func (e *Emitter) Nodes(op string, bases, in []string, attrs ...Attr) []string {
	out := make([]string, len(bases))
	for i, b := range bases {
		out[i] = e.Fresh(b)
	}
	name := out[0]
	e.nodes = append(e.nodes, &pb.NodeProto{OpType: &op, Name: &name, Input: slices.Clone(in), Output: out, Attribute: attrs})
	return out
}

// Initializer adds a constant: little-endian elements of an ONNX type. It returns its name.
func (e *Emitter) Initializer(base string, t DataType, dims []int, raw []byte) string {
	name := e.Fresh(base)
	e.inits = append(e.inits, &pb.TensorProto{Name: &name, DataType: proto.Int32(int32(t)), Dims: int64s(dims), RawData: raw})
	return name
}

// DataType is an ONNX element type.
type DataType int32

// The element types that are written.
const (
	Float32 = DataType(pb.TensorProto_FLOAT)
	Float16 = DataType(pb.TensorProto_FLOAT16)
	Float64 = DataType(pb.TensorProto_DOUBLE)
	Uint8   = DataType(pb.TensorProto_UINT8)
	Int8    = DataType(pb.TensorProto_INT8)
	Int32   = DataType(pb.TensorProto_INT32)
	Int64   = DataType(pb.TensorProto_INT64)
	Bool    = DataType(pb.TensorProto_BOOL)
	Uint4   = DataType(pb.TensorProto_UINT4) // from operator set 21
	Int4    = DataType(pb.TensorProto_INT4)  // from operator set 21
)

// Floats adds a float32 constant. Nil dims make a scalar of data's one element.
func (e *Emitter) Floats(base string, data []float32, dims ...int) string {
	raw := make([]byte, 0, 4*len(data))
	for _, v := range data {
		raw = binary.LittleEndian.AppendUint32(raw, math.Float32bits(v))
	}
	return e.Initializer(base, Float32, dims, raw)
}

// Codes adds a constant of small integers: Uint8, Int8, Uint4, Int4 (two to a byte, the first in the low half), Int32 or
// Int64.
func (e *Emitter) Codes(base string, t DataType, codes []int32, dims ...int) string {
	var raw []byte
	switch t {
	case Uint4, Int4:
		raw = make([]byte, (len(codes)+1)/2)
		for i, c := range codes {
			raw[i/2] |= byte(c&15) << (4 * (i % 2))
		}
	case Int32:
		for _, c := range codes {
			raw = binary.LittleEndian.AppendUint32(raw, uint32(c))
		}
	case Int64:
		for _, c := range codes {
			raw = binary.LittleEndian.AppendUint64(raw, uint64(int64(c)))
		}
	default:
		raw = make([]byte, len(codes))
		for i, c := range codes {
			raw[i] = byte(c)
		}
	}
	return e.Initializer(base, t, dims, raw)
}

// Scalar gives a float32 constant without axes; equal ones are stored once.
func (e *Emitter) Scalar(v float64) string {
	key := fmt.Sprintf("const/%g", float32(v))
	if e.small[key] == "" {
		e.small[key] = e.Floats(key, []float32{float32(v)})
	}
	return e.small[key]
}

// List gives an int64 list as constant input; equal ones are stored once.
func (e *Emitter) List(v ...int) string {
	key := fmt.Sprintf("list/%v", v)
	if e.small[key] == "" {
		raw := []byte{}
		for _, x := range v {
			raw = binary.LittleEndian.AppendUint64(raw, uint64(int64(x)))
		}
		e.small[key] = e.Initializer(key, Int64, []int{len(v)}, raw)
	}
	return e.small[key]
}

// Param gives a node's parameter as a constant with its axes permuted (nil: as they are). A parameter that several
// nodes share is written once.
func (e *Emitter) Param(n *nn.Node, local string, perm []int) string {
	p := e.net.Param(n, local)
	if p == nil {
		e.Fail(fmt.Errorf("parameter %q is missing", local))
		return ""
	}
	key := fmt.Sprint(p.Name, perm)
	if identity(perm) {
		key = p.Name
	}
	if name := e.params[key]; name != "" {
		return name
	}
	if len(perm) > 0 && len(perm) != p.Value.Rank() {
		e.Fail(fmt.Errorf("parameter %q is %s, which permutation %v does not fit", p.Name, p.Value.Shape(), perm))
		return ""
	}
	if !identity(perm) && e.net.SharedParam(n, local) { // one copy in the file, turned where it is used
		name := e.Node("Transpose", p.Name+"/turned", []string{e.Param(n, local, nil)}, Ints("perm", perm...))
		e.params[key] = name
		return name
	}
	name := e.tensor(p.Name, p.Value, perm)
	e.params[key] = name
	return name
}

// tensor adds a tensor as constant.
func (e *Emitter) tensor(base string, v *tensors.Tensor, perm []int) string {
	dims := v.Shape().Dimensions
	le := binary.LittleEndian
	raw := []byte{}
	var t DataType
	switch v.DType() {
	case dtypes.Float32:
		d, s := permuted(tensors.MustCopyFlatData[float32](v), dims, perm)
		return e.Floats(base, d, s...)
	case dtypes.Float64:
		d, s := permuted(nn.Floats(v), dims, perm)
		return e.Floats(base, d, s...)
	case dtypes.Int32:
		t = Int32
		d, s := permuted(tensors.MustCopyFlatData[int32](v), dims, perm)
		dims = s
		for _, x := range d {
			raw = le.AppendUint32(raw, uint32(x))
		}
	case dtypes.Int64:
		t = Int64
		d, s := permuted(tensors.MustCopyFlatData[int64](v), dims, perm)
		dims = s
		for _, x := range d {
			raw = le.AppendUint64(raw, uint64(x))
		}
	case dtypes.Uint8:
		t = Uint8
		raw, dims = permuted(tensors.MustCopyFlatData[uint8](v), dims, perm)
	case dtypes.Int8:
		t = Int8
		d, s := permuted(tensors.MustCopyFlatData[int8](v), dims, perm)
		dims = s
		for _, x := range d {
			raw = append(raw, byte(x))
		}
	case dtypes.Bool:
		t = Bool
		d, s := permuted(tensors.MustCopyFlatData[bool](v), dims, perm)
		dims = s
		for _, x := range d {
			b := byte(0)
			if x {
				b = 1
			}
			raw = append(raw, b)
		}
	default:
		e.Fail(fmt.Errorf("parameter %q of type %s cannot be written", base, v.DType()))
		return ""
	}
	return e.Initializer(base, t, dims, raw)
}

// Weight gives a site's whole weight with its axes permuted, in whatever form it is stored.
func (e *Emitter) Weight(n *nn.Node, perm []int) (string, error) {
	lin, ok := n.Op.(nn.Linear)
	if !ok {
		return "", errors.New("it is not a site")
	}
	switch r := lin.Repr().(type) {
	case nn.Plain:
		return e.Param(n, "w", perm), e.err
	case WeightExporter:
		return r.ExportWeight(e, n, perm)
	default:
		return "", fmt.Errorf("a weight stored as %q has no ONNX form; store it plainly first", r.Kind())
	}
}

// In gives input i of a node in the value's own layout (channels last), "" for an absent one.
func (e *Emitter) In(n *nn.Node, i int) string { return e.InLayout(n, i, nil) }

// InLayout gives input i with its axes permuted: axis k of the tensor is axis layout[k] of the value.
func (e *Emitter) InLayout(n *nn.Node, i int, layout []int) string {
	if i >= len(n.In) || n.In[i] == "" {
		return ""
	}
	return e.value(n.In[i], layout)
}

// ChannelsFirst gives input i as [batch, channels, spatial...].
func (e *Emitter) ChannelsFirst(n *nn.Node, i int) (name string, layout []int) {
	layout = channelsFirst(e.Shape(n.In[i]).Rank())
	return e.InLayout(n, i, layout), layout
}

// channelsFirst is the layout of the channels-first form of a channels-last value.
func channelsFirst(rank int) []int {
	l := []int{0, rank - 1}
	for i := 1; i < rank-1; i++ {
		l = append(l, i)
	}
	return l[:rank]
}

// Any gives input i in the layout in which it is there already: for ops to which the order of axes does not matter.
func (e *Emitter) Any(n *nn.Node, i int) (name string, layout []int) {
	h := e.held[n.In[i]]
	if len(h) == 0 {
		e.Fail(fmt.Errorf("value %q is not there", n.In[i]))
		return "", nil
	}
	return h[0].name, h[0].layout
}

// Put says that a value is the ONNX tensor of that name, in that layout.
func (e *Emitter) Put(value string, layout []int, name string) {
	if identity(layout) {
		layout = nil
	}
	e.held[value] = append(e.held[value], heldLayout{name, slices.Clone(layout)})
}

// Out adds the node that produces output 0 of n in a layout.
func (e *Emitter) Out(n *nn.Node, layout []int, op string, in []string, attrs ...Attr) {
	e.Put(n.Out[0], layout, e.Node(op, e.base(n.Out[0], layout), in, attrs...))
}

// base is the ONNX name for a value in a layout.
func (e *Emitter) base(value string, layout []int) string {
	if identity(layout) {
		delete(e.wanted, value) // it is claimed now
		return value
	}
	if slices.Equal(layout, channelsFirst(len(layout))) {
		return value + "/channels_first"
	}
	return value + "/permuted"
}

func (e *Emitter) value(v string, layout []int) string {
	if identity(layout) {
		layout = nil
	}
	h := e.held[v]
	if len(h) == 0 {
		e.Fail(fmt.Errorf("value %q is not there", v))
		return ""
	}
	for _, x := range h {
		if slices.Equal(x.layout, layout) {
			return x.name
		}
	}
	perm, dims := relayout(h[0].layout, layout, e.Shape(v).Dimensions)
	base := e.base(v, layout)
	var name string
	if dims != nil {
		name = e.Node("Reshape", base, []string{h[0].name, e.List(dims...)})
	} else {
		name = e.Node("Transpose", base, []string{h[0].name}, Ints("perm", perm...))
	}
	e.Put(v, layout, name)
	return name
}

// relayout gives the permutation that takes a tensor from one layout of a value to another: axis i of the result is
// axis perm[i]. Where only axes of size 1 move, dims is the equivalent reshape instead (0 keeps the batch).
func relayout(from, to, shape []int) (perm, dims []int) {
	r := len(shape)
	if from == nil {
		from = natural(r)
	}
	if to == nil {
		to = natural(r)
	}
	perm = make([]int, r)
	for i, axis := range to {
		perm[i] = slices.Index(from, axis)
	}
	wide := func(l []int) (out []int) {
		for _, a := range l {
			if a == 0 || shape[a] != 1 {
				out = append(out, a)
			}
		}
		return out
	}
	if r > 0 && from[0] == 0 && to[0] == 0 && slices.Equal(wide(from), wide(to)) {
		dims = make([]int, r)
		for i, a := range to {
			if i > 0 {
				dims[i] = shape[a]
			}
		}
	}
	return perm, dims
}

func natural(r int) []int {
	l := make([]int, r)
	for i := range l {
		l[i] = i
	}
	return l
}

func identity(layout []int) bool {
	for i, a := range layout {
		if a != i {
			return false
		}
	}
	return true
}

// position is where a value's axis is in a tensor of that layout; negative axes count from the end.
func position(layout []int, axis, rank int) int {
	if axis < 0 {
		axis += rank
	}
	if layout == nil {
		return axis
	}
	return slices.Index(layout, axis)
}

// arrange permutes per-axis numbers of a value to a layout.
func arrange[T any](layout []int, v []T) []T {
	if layout == nil {
		return v
	}
	out := make([]T, len(v))
	for i, a := range layout {
		out[i] = v[a]
	}
	return out
}

// aligned gives all inputs of an elementwise node in one layout, that of its first input of the output's rank which is
// not in its own order. Inputs of lower rank are extended with leading axes of 1.
func (e *Emitter) aligned(n *nn.Node) (in []string, layout []int) {
	rank := e.Shape(n.Out[0]).Rank()
	for i, v := range n.In {
		if _, l := e.Any(n, i); e.Shape(v).Rank() == rank && layout == nil {
			layout = l
		}
	}
	for _, v := range n.In {
		r := e.Shape(v).Rank()
		switch {
		case r == rank:
			in = append(in, e.value(v, layout))
		case r == 0 || layout == nil:
			in = append(in, e.value(v, nil))
		default:
			dims := append(slices.Repeat([]int{1}, rank-r), e.Shape(v).Dimensions...)
			name := e.value(v, nil)
			wide := e.Node("Reshape", e.Fresh(n.Name+"/wide"), []string{name, e.List(dims...)})
			if perm, _ := relayout(nil, layout, dims); !identity(perm) {
				wide = e.Node("Transpose", e.Fresh(n.Name+"/wide"), []string{wide}, Ints("perm", perm...))
			}
			in = append(in, wide)
		}
	}
	return in, layout
}

package onnx

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/lathe-ml/lathe/internal/half"
	"github.com/lathe-ml/lathe/nn/onnx/internal/pb"
)

// Limits on what is read. They bound the memory that a small file can ask for.
const (
	maxFile     = 2 << 30 // the format's own limit on one protobuf message
	maxDepth    = 24      // nested messages; a plain model needs 9
	slackBytes  = 16 << 20
	maxElements = 1 << 31 // elements of one value at batch 1
	maxConvTaps = 1 << 30 // output positions × kernel size of one convolution at batch 1
)

// graph is a model's main graph: nodes in topological order, constants decoded on demand.
type graph struct {
	opset   int
	nodes   []*node
	inputs  []*value
	outputs []string
	values  map[string]*value
	meta    map[string]string
	budget  int64 // elements that folding may still make
}

// node is one operator call. Optional inputs that are absent are "".
type node struct {
	op, name string
	in, out  []string
	attrs    map[string]*pb.AttributeProto
	fused    any // parameters of a recognised pattern, for ops whose name begins with ~
}

// value is a named tensor: a constant, or something computed.
type value struct {
	name  string
	dtype pb.TensorProto_DataType
	shape []dim
	known bool    // dtype and shape are inferred
	c     *tensor // its value, when it is constant
	prod  *node
}

// String names the node as errors do.
func (n *node) String() string {
	name := n.name
	if name == "" && len(n.out) > 0 {
		name = n.out[0]
	}
	return fmt.Sprintf("node %q (%s)", name, n.op)
}

func (n *node) int(name string, def int) int {
	if a := n.attrs[name]; a != nil {
		return int(a.GetI())
	}
	return def
}

func (n *node) float(name string, def float64) float64 {
	if a := n.attrs[name]; a != nil {
		return float64(a.GetF())
	}
	return def
}

func (n *node) string(name, def string) string {
	if a := n.attrs[name]; a != nil {
		return string(a.GetS())
	}
	return def
}

// ints is an integer list attribute, nil when absent.
func (n *node) ints(name string) []int {
	a := n.attrs[name]
	if a == nil {
		return nil
	}
	out := make([]int, len(a.GetInts()))
	for i, v := range a.GetInts() {
		out[i] = int(v)
	}
	return out
}

// input is the name of input i, "" when absent.
func (n *node) input(i int) string {
	if i < len(n.in) {
		return n.in[i]
	}
	return ""
}

// decode parses the messages and checks structure: operator set, names, order, sizes of tensors.
func decode(b []byte) (*graph, error) {
	m, err := decodeModel(b)
	if err != nil {
		return nil, err
	}
	g := &graph{values: map[string]*value{}, meta: map[string]string{}, budget: int64(len(b)/2) + slackBytes/4 + 3*storedCodes(m.Graph)}
	for _, o := range m.OpsetImport {
		if o.GetDomain() == "" || o.GetDomain() == "ai.onnx" {
			g.opset = int(o.GetVersion())
		}
	}
	if g.opset < 11 || g.opset > 21 {
		return nil, fmt.Errorf("operator set %d is not read, only 11 to 21; convert the model with onnx.version_converter.convert_version(model, 17)", g.opset)
	}
	for _, p := range m.MetadataProps {
		g.meta[p.GetKey()] = p.GetValue()
	}
	return g, g.load(m.Graph)
}

// storedCodes counts the small integers whose data are in the file. A quantised weight is widened to floats, put in shape
// and transposed, each once: a file of n codes may ask for that many values more than its size lets others.
func storedCodes(p *pb.GraphProto) (n int64) {
	count := func(t *pb.TensorProto) {
		switch pb.TensorProto_DataType(t.GetDataType()) {
		case pb.TensorProto_INT8, pb.TensorProto_UINT8:
			n += int64(len(t.RawData))
		case pb.TensorProto_INT4, pb.TensorProto_UINT4:
			n += 2 * int64(len(t.RawData))
		}
	}
	for _, t := range p.Initializer {
		count(t)
	}
	for _, x := range p.Node {
		for _, a := range x.Attribute {
			if t := a.GetT(); t != nil {
				count(t)
			}
		}
	}
	return n
}

func (g *graph) load(p *pb.GraphProto) error {
	if len(p.SparseInitializer) > 0 {
		return errors.New("sparse initializers are not read; store them dense")
	}
	for i, t := range p.Initializer {
		c, err := decodeTensor(t)
		if err != nil {
			return fmt.Errorf("initializer %d %q: %w", i, t.GetName(), err)
		}
		if err := g.define(t.GetName(), &value{c: c}); err != nil {
			return err
		}
	}
	for i, in := range p.Input {
		if v := g.values[in.GetName()]; v != nil && v.c != nil {
			continue // an initializer that is listed as input, as old files do
		}
		t := in.GetType().GetTensorType()
		if t == nil {
			return fmt.Errorf("input %d %q is not a tensor", i, in.GetName())
		}
		v := &value{dtype: pb.TensorProto_DataType(t.GetElemType())}
		if err := g.define(in.GetName(), v); err != nil {
			return err
		}
		if t.Shape == nil {
			return fmt.Errorf("input %q has no shape", in.GetName())
		}
		for _, d := range t.Shape.Dim {
			n := -1
			if x, ok := d.Value.(*pb.TensorShapeProto_Dimension_DimValue); ok && x.DimValue > 0 {
				n = int(x.DimValue)
			}
			v.shape = append(v.shape, fixed(n))
		}
		g.inputs = append(g.inputs, v)
	}
	for i, x := range p.Node {
		n := &node{op: x.GetOpType(), name: x.GetName(), in: x.Input, out: x.Output, attrs: map[string]*pb.AttributeProto{}}
		if d := x.GetDomain(); d != "" && d != "ai.onnx" {
			n.op = d + "." + n.op
		}
		for _, a := range x.Attribute {
			n.attrs[a.GetName()] = a
		}
		for len(n.out) > 0 && n.out[len(n.out)-1] == "" {
			n.out = n.out[:len(n.out)-1]
		}
		if len(n.out) == 0 {
			return fmt.Errorf("node %d (%s) has no output", i, n.op)
		}
		for _, in := range n.in {
			if in != "" && g.values[in] == nil {
				return fmt.Errorf("%s: input %q is not defined before it", n, in)
			}
		}
		for _, o := range n.out {
			if o == "" {
				continue
			}
			if err := g.define(o, &value{prod: n}); err != nil {
				return fmt.Errorf("%s: %w", n, err)
			}
		}
		g.nodes = append(g.nodes, n)
	}
	for i, o := range p.Output {
		if g.values[o.GetName()] == nil {
			return fmt.Errorf("output %d %q is not defined", i, o.GetName())
		}
		g.outputs = append(g.outputs, o.GetName())
	}
	if len(g.outputs) == 0 {
		return errors.New("the graph has no outputs")
	}
	return nil
}

func (g *graph) define(name string, v *value) error {
	if name == "" {
		return errors.New("a value has no name")
	}
	if g.values[name] != nil {
		return fmt.Errorf("value %q is defined twice", name)
	}
	v.name = name
	g.values[name] = v
	if v.c != nil {
		v.dtype, v.known = v.c.dtype, true
		v.shape = fixedShape(v.c.dims)
	}
	return nil
}

// prune drops nodes that no output needs.
func (g *graph) prune() {
	live := map[string]bool{}
	for _, o := range g.outputs {
		live[o] = true
	}
	keep := g.nodes[:0:0]
	for _, n := range slices.Backward(g.nodes) {
		if slices.ContainsFunc(n.out, func(o string) bool { return live[o] }) {
			keep = append(keep, n)
			for _, in := range n.in {
				live[in] = true
			}
		}
	}
	slices.Reverse(keep)
	g.nodes = keep
}

// uses counts the readers of every value, an output of the graph counting as one.
func (g *graph) uses() map[string]int {
	u := map[string]int{}
	for _, n := range g.nodes {
		for _, in := range n.in {
			u[in]++
		}
	}
	for _, o := range g.outputs {
		u[o]++
	}
	return u
}

// weigh walks a message on the wire and estimates the memory of its decoded form, without decoding it.
func weigh(d protoreflect.MessageDescriptor, b []byte, depth int) (int64, error) {
	if depth > maxDepth {
		return 0, fmt.Errorf("messages are nested more than %d deep", maxDepth)
	}
	sum := int64(160)
	for len(b) > 0 {
		num, typ, k := protowire.ConsumeTag(b)
		if k < 0 {
			return 0, protowire.ParseError(k)
		}
		b = b[k:]
		if typ != protowire.BytesType {
			if k = protowire.ConsumeFieldValue(num, typ, b); k < 0 {
				return 0, protowire.ParseError(k)
			}
			b = b[k:]
			sum += 8
			continue
		}
		s, k := protowire.ConsumeBytes(b)
		if k < 0 {
			return 0, protowire.ParseError(k)
		}
		b = b[k:]
		f := d.Fields().ByNumber(num)
		switch {
		case f == nil:
		case f.Message() != nil:
			w, err := weigh(f.Message(), s, depth+1)
			if err != nil {
				return 0, err
			}
			sum += 8 + w
		case f.Kind() == protoreflect.BytesKind || f.Kind() == protoreflect.StringKind:
			sum += 24 + int64(len(s))
		default: // packed numbers: at most one per byte
			width := int64(8)
			switch f.Kind() {
			case protoreflect.FloatKind, protoreflect.Int32Kind, protoreflect.EnumKind:
				width = 4
			}
			n := int64(0)
			switch f.Kind() {
			case protoreflect.FloatKind:
				n = int64(len(s)) / 4
			case protoreflect.DoubleKind:
				n = int64(len(s)) / 8
			default:
				for _, c := range s {
					if c < 0x80 {
						n++
					}
				}
			}
			sum += 2 * width * n // growing a slice copies it
		}
	}
	return sum, nil
}

// tensor is a constant. A file's data stay as they are until they are asked for; a folded constant holds its values.
type tensor struct {
	dtype pb.TensorProto_DataType
	dims  []int
	raw   []byte    // little-endian elements
	f     []float32 // floating values
	i     []dim     // integers and booleans, which may depend on the batch

	// from names the constant of which this is a permutation, so that shared weights stay shared.
	from string
	perm []int
}

func (t *tensor) size() int { return product(t.dims) }

func product(d []int) int {
	n := 1
	for _, x := range d {
		n *= x
	}
	return n
}

const (
	tFloat    = pb.TensorProto_FLOAT
	tUint8    = pb.TensorProto_UINT8
	tInt8     = pb.TensorProto_INT8
	tUint16   = pb.TensorProto_UINT16
	tInt16    = pb.TensorProto_INT16
	tInt32    = pb.TensorProto_INT32
	tInt64    = pb.TensorProto_INT64
	tBool     = pb.TensorProto_BOOL
	tFloat16  = pb.TensorProto_FLOAT16
	tDouble   = pb.TensorProto_DOUBLE
	tUint32   = pb.TensorProto_UINT32
	tUint64   = pb.TensorProto_UINT64
	tBfloat16 = pb.TensorProto_BFLOAT16
	tUint4    = pb.TensorProto_UINT4
	tInt4     = pb.TensorProto_INT4
)

// elemBits is the width of the element types that are read.
var elemBits = map[pb.TensorProto_DataType]int{
	tFloat: 32, tUint8: 8, tInt8: 8, tUint16: 16, tInt16: 16, tInt32: 32, tInt64: 64, tBool: 8,
	tFloat16: 16, tDouble: 64, tUint32: 32, tUint64: 64, tBfloat16: 16, tUint4: 4, tInt4: 4,
}

func isFloat(t pb.TensorProto_DataType) bool {
	return t == tFloat || t == tFloat16 || t == tDouble || t == tBfloat16
}

func decodeTensor(t *pb.TensorProto) (*tensor, error) {
	if t.GetDataLocation() == pb.TensorProto_EXTERNAL {
		where := ""
		for _, e := range t.ExternalData {
			if e.GetKey() == "location" {
				where = e.GetValue()
			}
		}
		return nil, fmt.Errorf("its data are in a file of their own, %q, which is not read; put all into one file: python -c 'import onnx; onnx.save(onnx.load(\"in.onnx\"), \"out.onnx\")'", where)
	}
	c := &tensor{dtype: pb.TensorProto_DataType(t.GetDataType())}
	bits := elemBits[c.dtype]
	if bits == 0 {
		return nil, fmt.Errorf("element type %s is not read", c.dtype)
	}
	size := int64(1)
	for _, d := range t.Dims {
		if d < 0 || (d > 0 && size > math.MaxInt32*8/d) {
			return nil, fmt.Errorf("dimensions %v", t.Dims)
		}
		size *= d
		c.dims = append(c.dims, int(d))
	}
	if len(t.Dims) > 16 {
		return nil, fmt.Errorf("%d axes, at most 16 are read", len(t.Dims))
	}
	if t.RawData != nil {
		if want := (size*int64(bits) + 7) / 8; int64(len(t.RawData)) != want {
			return nil, fmt.Errorf("%d bytes of data for %s%v, want %d", len(t.RawData), c.dtype, t.Dims, want)
		}
		c.raw = t.RawData
		return c, nil
	}
	return c, c.fromFields(t, size)
}

// fromFields takes the typed fields that hold values when raw_data does not.
func (c *tensor) fromFields(t *pb.TensorProto, size int64) error {
	check := func(n int, field string) error {
		if int64(n) != size {
			return fmt.Errorf("%d values in %s for %s%v", n, field, c.dtype, t.Dims)
		}
		return nil
	}
	le := binary.LittleEndian
	switch c.dtype {
	case tFloat:
		c.f = t.FloatData
		if c.f == nil {
			c.f = []float32{}
		}
		return check(len(c.f), "float_data")
	case tDouble:
		if err := check(len(t.DoubleData), "double_data"); err != nil {
			return err
		}
		c.f = make([]float32, size)
		for i, v := range t.DoubleData {
			c.f[i] = float32(v)
		}
	case tInt64:
		if err := check(len(t.Int64Data), "int64_data"); err != nil {
			return err
		}
		for _, v := range t.Int64Data {
			c.raw = le.AppendUint64(c.raw, uint64(v))
		}
	case tUint32, tUint64:
		if err := check(len(t.Uint64Data), "uint64_data"); err != nil {
			return err
		}
		for _, v := range t.Uint64Data {
			if c.dtype == tUint32 {
				c.raw = le.AppendUint32(c.raw, uint32(v))
			} else {
				c.raw = le.AppendUint64(c.raw, v)
			}
		}
	case tUint4, tInt4:
		if err := func() error {
			if int64(len(t.Int32Data)) != (size+1)/2 {
				return check(2*len(t.Int32Data), "int32_data")
			}
			return nil
		}(); err != nil {
			return err
		}
		for _, v := range t.Int32Data {
			c.raw = append(c.raw, byte(v))
		}
	default:
		if err := check(len(t.Int32Data), "int32_data"); err != nil {
			return err
		}
		for _, v := range t.Int32Data {
			switch elemBits[c.dtype] {
			case 8:
				c.raw = append(c.raw, byte(v))
			case 16:
				c.raw = le.AppendUint16(c.raw, uint16(v))
			default:
				c.raw = le.AppendUint32(c.raw, uint32(v))
			}
		}
	}
	if c.raw == nil && c.f == nil {
		c.raw = []byte{}
	}
	return nil
}

// floats gives the values as float32. The caller must not change them.
func (t *tensor) floats() []float32 {
	if t.f != nil {
		return t.f
	}
	out := make([]float32, t.size())
	if t.i != nil {
		for i, v := range t.i {
			out[i] = float32(v.c)
		}
		return out
	}
	le := binary.LittleEndian
	for i := range out {
		switch t.dtype {
		case tFloat:
			out[i] = math.Float32frombits(le.Uint32(t.raw[4*i:]))
		case tFloat16:
			out[i] = half.FromF16(le.Uint16(t.raw[2*i:]))
		case tBfloat16:
			out[i] = half.FromBF16(le.Uint16(t.raw[2*i:]))
		case tDouble:
			out[i] = float32(math.Float64frombits(le.Uint64(t.raw[8*i:])))
		default:
			out[i] = float32(t.intAt(i))
		}
	}
	return out
}

func (t *tensor) intAt(i int) int64 {
	le := binary.LittleEndian
	switch t.dtype {
	case tInt8:
		return int64(int8(t.raw[i]))
	case tUint8, tBool:
		return int64(t.raw[i])
	case tInt16:
		return int64(int16(le.Uint16(t.raw[2*i:])))
	case tUint16:
		return int64(le.Uint16(t.raw[2*i:]))
	case tInt32:
		return int64(int32(le.Uint32(t.raw[4*i:])))
	case tUint32:
		return int64(le.Uint32(t.raw[4*i:]))
	case tInt64, tUint64:
		return int64(le.Uint64(t.raw[8*i:]))
	case tUint4, tInt4:
		v := t.raw[i/2] >> (4 * (i % 2)) & 15
		if t.dtype == tInt4 && v > 7 {
			return int64(v) - 16
		}
		return int64(v)
	}
	return 0
}

// ints gives the values as integers that may depend on the batch. Floating values are truncated.
func (t *tensor) ints() []dim {
	if t.i != nil {
		return t.i
	}
	out := make([]dim, t.size())
	for i := range out {
		if isFloat(t.dtype) || t.f != nil {
			break
		}
		out[i] = fixed(int(t.intAt(i)))
	}
	if isFloat(t.dtype) || t.f != nil {
		for i, v := range t.floats() {
			out[i] = fixed(int(v))
		}
	}
	return out
}

package safetensors

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strings"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/nn"
)

// graphKey is the metadata entry that holds a network's graph as JSON; the other entries are Network.Meta.
const graphKey = "lathe.network"

// graphVersion is that of the JSON; readers refuse newer ones.
const graphVersion = 1

// coreOps are the ops and stored forms of package nn that a file may name. Packages to its right pass theirs to
// ReadNetwork.
var coreOps = []any{
	nn.Dense{},
	nn.Conv{},
	nn.ConvTranspose{},
	nn.Embedding{},
	nn.MatMul{},
	nn.RoPE{},
	nn.CausalMask{},
	nn.RepeatHeads{},
	nn.LayerNorm{},
	nn.RMSNorm{},
	nn.CRMSNorm{},
	nn.ZeroMeanOut{},
	nn.CompressedIn{},
	nn.BatchNorm{},
	nn.GroupNorm{},
	nn.Unary{},
	nn.Binary{},
	nn.GELU{},
	nn.LeakyReLU{},
	nn.HardSigmoid{},
	nn.Clip{},
	nn.Affine{},
	nn.Where{},
	nn.PReLU{},
	nn.Reduce{},
	nn.Softmax{},
	nn.Pool{},
	nn.ArgMax{},
	nn.Dropout{},
	nn.DropPath{},
	nn.Reshape{},
	nn.Transpose{},
	nn.Concat{},
	nn.Slice{},
	nn.Split{},
	nn.Pad{},
	nn.Value{},
	nn.Gather{},
	nn.Expand{},
	nn.Cast{},
	nn.OneHot{},
	nn.PixelShuffle{},
	nn.PixelUnshuffle{},
	nn.Resize{},
	nn.QuantizeDequantize{},
	nn.LSTM{},
	nn.GRU{},
	nn.Plain{},
}

type fileGraph struct {
	Version int         `json:"version"`
	Inputs  []fileInput `json:"inputs"`
	Outputs []string    `json:"outputs"`
	Nodes   []fileNode  `json:"nodes"`
	Params  []fileParam `json:"params"` // in order
}

type fileInput struct {
	Name  string `json:"name"`
	DType string `json:"dtype"`
	Shape []int  `json:"shape"` // axis 0 is a nominal batch
}

type fileNode struct {
	Name string            `json:"name"`
	Op   json.RawMessage   `json:"op"`
	In   []string          `json:"in,omitempty"`
	Out  []string          `json:"out,omitempty"` // when it is not the name alone
	P    map[string]string `json:"params,omitempty"`
}

type fileParam struct {
	Name   string `json:"name"`
	Role   string `json:"role"`
	Frozen bool   `json:"frozen,omitempty"`
}

// WriteNetwork writes a network, graph and parameters, so that ReadNetwork gives it back; other tools see a
// safetensors file of its parameters. It refuses nn.Func and other ops that hold functions, by the node's name.
func WriteNetwork(path string, net *nn.Network) error {
	f, err := EncodeNetwork(net)
	if err != nil {
		return err
	}
	return WriteFile(path, f)
}

// EncodeNetwork is the file that WriteNetwork writes.
func EncodeNetwork(net *nn.Network) (*File, error) {
	if err := net.Check(); err != nil {
		return nil, fmt.Errorf("safetensors: %w", err)
	}
	g := fileGraph{Version: graphVersion, Outputs: net.Outputs}
	for _, in := range net.Inputs {
		g.Inputs = append(g.Inputs, fileInput{in.Name, in.Shape.DType.String(), append([]int{}, in.Shape.Dimensions...)})
	}
	for _, n := range net.Nodes {
		op, err := encodeValue(reflect.ValueOf(n.Op))
		if err != nil {
			return nil, fmt.Errorf("safetensors: node %q (%s): %w", n.Name, n.Op.Kind(), err)
		}
		x := fileNode{Name: n.Name, Op: op, In: n.In, P: n.P}
		if len(n.Out) != 1 || n.Out[0] != n.Name {
			x.Out = n.Out
		}
		g.Nodes = append(g.Nodes, x)
	}
	f := &File{Meta: map[string]string{"format": "pt"}}
	for k, v := range net.Meta {
		if k == graphKey {
			return nil, fmt.Errorf("safetensors: the metadata entry %q is the format's own", k)
		}
		f.Meta[k] = v
	}
	for p := range net.Params.All() {
		t, err := fromTensor(p.Name, p.Value)
		if err != nil {
			return nil, fmt.Errorf("safetensors: parameter %q: %w", p.Name, err)
		}
		f.Tensors = append(f.Tensors, t)
		g.Params = append(g.Params, fileParam{p.Name, p.Role.String(), p.Frozen})
	}
	b, err := json.Marshal(g)
	if err != nil {
		return nil, fmt.Errorf("safetensors: %w", err)
	}
	f.Meta[graphKey] = string(b)
	return f, nil
}

// ReadNetwork reads what WriteNetwork wrote. Types names the ops and stored forms of other packages that may occur, as
// zero values: quant.Uniform{}. The file is taken for hostile: an unknown op, a graph that does not check, parameters
// that do not fit the ops or sizes that do not work together are refused, with the node's name.
func ReadNetwork(path string, types ...any) (*nn.Network, error) {
	f, err := ReadFile(path)
	if err != nil {
		return nil, err
	}
	net, err := DecodeNetwork(f, types...)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return net, nil
}

// ErrNoGraph says that a file has tensors only.
var ErrNoGraph = errors.New("safetensors: the file holds tensors but no network; build the network and load its parameters with Params, or export the model as ONNX")

// DecodeNetwork is ReadNetwork from a file in memory. The error is ErrNoGraph when the file has tensors only.
func DecodeNetwork(f *File, types ...any) (*nn.Network, error) {
	text, ok := f.Meta[graphKey]
	if !ok {
		return nil, ErrNoGraph
	}
	net, err := decodeNetwork(f, text, types)
	if err != nil {
		return nil, fmt.Errorf("safetensors: %w", err)
	}
	return net, nil
}

func decodeNetwork(f *File, text string, types []any) (*nn.Network, error) {
	var g fileGraph
	d := json.NewDecoder(strings.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&g); err != nil {
		return nil, fmt.Errorf("%s: %w", graphKey, err)
	}
	if g.Version != graphVersion {
		return nil, fmt.Errorf("%s: version %d is not read, only %d", graphKey, g.Version, graphVersion)
	}
	known := map[string]reflect.Type{}
	for _, x := range slices.Concat(coreOps, types) {
		known[typeName(reflect.TypeOf(x))] = reflect.TypeOf(x)
	}
	net := &nn.Network{Outputs: g.Outputs}
	for _, in := range g.Inputs {
		t, err := dtypes.DTypeString(in.DType)
		if err != nil || t == dtypes.InvalidDType {
			return nil, fmt.Errorf("input %q: there is no type %q", in.Name, in.DType)
		}
		size := 1
		for _, n := range in.Shape {
			if n < 1 || size > math.MaxInt32/n {
				return nil, fmt.Errorf("input %q: shape %v", in.Name, in.Shape)
			}
			size *= n
		}
		net.Inputs = append(net.Inputs, nn.Input{Name: in.Name, Shape: shapes.Make(t, in.Shape...)})
	}
	params, err := paramsOf(f, g.Params)
	if err != nil {
		return nil, err
	}
	net.Params = *params
	for _, x := range g.Nodes {
		v, err := decodeValue(x.Op, known)
		if err != nil {
			return nil, fmt.Errorf("node %q: %w", x.Name, err)
		}
		op, ok := v.Interface().(nn.Op)
		if !ok {
			return nil, fmt.Errorf("node %q: %s is not an op", x.Name, v.Type())
		}
		n := &nn.Node{Name: x.Name, Op: op, In: x.In, Out: x.Out, P: x.P}
		if n.Out == nil {
			n.Out = []string{x.Name}
		}
		if n.P == nil {
			n.P = map[string]string{}
		}
		net.Nodes = append(net.Nodes, n)
	}
	for k, v := range f.Meta {
		if k != graphKey && k != "format" {
			if net.Meta == nil {
				net.Meta = map[string]string{}
			}
			net.Meta[k] = v
		}
	}
	if err := net.Check(); err != nil {
		return nil, err
	}
	if _, err := net.Shapes(0); err != nil { // sizes must work together
		return nil, err
	}
	return net, nil
}

func paramsOf(f *File, list []fileParam) (*nn.Params, error) {
	params := &nn.Params{}
	place := map[string]*Tensor{}
	for i := range f.Tensors {
		place[f.Tensors[i].Name] = &f.Tensors[i]
	}
	for _, p := range list {
		t := place[p.Name]
		if t == nil || params.Get(p.Name) != nil {
			return nil, fmt.Errorf("parameter %q has no tensor of its own", p.Name)
		}
		role, err := nn.ParseRole(p.Role)
		if err != nil {
			return nil, fmt.Errorf("parameter %q: %w", p.Name, err)
		}
		v, err := t.value()
		if err != nil {
			return nil, err
		}
		params.Put(&nn.Param{Name: p.Name, Role: role, Frozen: p.Frozen, Value: v})
	}
	return params, nil
}

// Params gives a file's tensors as parameters, in the file's order, with role nn.Weight: for nn.Params.CopyFrom.
// Floating types of other widths become float32 (F64 stays).
func (f *File) Params() (*nn.Params, error) {
	params := &nn.Params{}
	for i := range f.Tensors {
		v, err := f.Tensors[i].value()
		if err != nil {
			return nil, err
		}
		params.Put(&nn.Param{Name: f.Tensors[i].Name, Value: v})
	}
	return params, nil
}

// FromParams makes tensors of parameters, in their order.
func FromParams(params *nn.Params) ([]Tensor, error) {
	var out []Tensor
	for p := range params.All() {
		t, err := fromTensor(p.Name, p.Value)
		if err != nil {
			return nil, fmt.Errorf("safetensors: parameter %q: %w", p.Name, err)
		}
		out = append(out, t)
	}
	return out, nil
}

// value is the tensor as a network stores it.
func (t *Tensor) value() (*tensors.Tensor, error) {
	if slices.Contains(t.Shape, 0) {
		return nil, fmt.Errorf("safetensors: tensor %q: shape %v has no elements", t.Name, t.Shape)
	}
	le, d := binary.LittleEndian, t.Data
	n := t.Elements()
	switch t.DType {
	case F64:
		v := make([]float64, n)
		for i := range v {
			v[i] = math.Float64frombits(le.Uint64(d[8*i:]))
		}
		return tensors.FromFlatDataAndDimensions(v, t.Shape...), nil
	case I64:
		v := make([]int64, n)
		for i := range v {
			v[i] = int64(le.Uint64(d[8*i:]))
		}
		return tensors.FromFlatDataAndDimensions(v, t.Shape...), nil
	case I32:
		v := make([]int32, n)
		for i := range v {
			v[i] = int32(le.Uint32(d[4*i:]))
		}
		return tensors.FromFlatDataAndDimensions(v, t.Shape...), nil
	case I8:
		v := make([]int8, n)
		for i := range v {
			v[i] = int8(d[i])
		}
		return tensors.FromFlatDataAndDimensions(v, t.Shape...), nil
	case U8:
		return tensors.FromFlatDataAndDimensions(slices.Clone(d), t.Shape...), nil
	case Bool:
		v := make([]bool, n)
		for i := range v {
			v[i] = d[i] != 0
		}
		return tensors.FromFlatDataAndDimensions(v, t.Shape...), nil
	case F32, F16, BF16:
		v, err := t.Floats()
		if err != nil {
			return nil, err
		}
		return tensors.FromFlatDataAndDimensions(v, t.Shape...), nil
	}
	return nil, fmt.Errorf("safetensors: tensor %q: %s cannot be a parameter", t.Name, t.DType)
}

func fromTensor(name string, v *tensors.Tensor) (Tensor, error) {
	t := Tensor{Name: name, Shape: slices.Clone(v.Shape().Dimensions)}
	var b bytes.Buffer
	var flat any
	switch v.DType() {
	case dtypes.Float32:
		t.DType, flat = F32, tensors.MustCopyFlatData[float32](v)
	case dtypes.Float64:
		t.DType, flat = F64, tensors.MustCopyFlatData[float64](v)
	case dtypes.Int64:
		t.DType, flat = I64, tensors.MustCopyFlatData[int64](v)
	case dtypes.Int32:
		t.DType, flat = I32, tensors.MustCopyFlatData[int32](v)
	case dtypes.Int8:
		t.DType, flat = I8, tensors.MustCopyFlatData[int8](v)
	case dtypes.Uint8:
		t.DType, flat = U8, tensors.MustCopyFlatData[uint8](v)
	case dtypes.Bool:
		t.DType, flat = Bool, tensors.MustCopyFlatData[bool](v)
	default:
		return t, fmt.Errorf("type %s is not written", v.DType())
	}
	if err := binary.Write(&b, binary.LittleEndian, flat); err != nil {
		return t, err
	}
	t.Data = b.Bytes()
	return t, nil
}

func typeName(t reflect.Type) string { return t.String() }

// encodeValue writes an op or stored form as {"type": "nn.Dense", "Out": 10, ...}; fields at their zero value are left
// out. Fields of type nn.Init only matter when a network is built and are left out too.
func encodeValue(v reflect.Value) (json.RawMessage, error) {
	t := v.Type()
	if t.Kind() != reflect.Struct {
		return nil, fmt.Errorf("%s is not a struct and cannot be written", t)
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, `{"type":%q`, typeName(t))
	for i := range t.NumField() {
		field, x := t.Field(i), v.Field(i)
		if field.Type == reflect.TypeFor[nn.Init]() || x.IsZero() {
			continue
		}
		var raw json.RawMessage
		var err error
		switch {
		case !field.IsExported():
			return nil, fmt.Errorf("%s has an unexported field %s and cannot be written", t, field.Name)
		case x.Kind() == reflect.Interface:
			raw, err = encodeValue(x.Elem())
		case x.Kind() == reflect.Struct && field.Type.PkgPath() != "" && field.Type == reflect.TypeFor[shapes.Shape]():
			s := x.Interface().(shapes.Shape)
			raw, err = json.Marshal(fileInput{DType: s.DType.String(), Shape: append([]int{}, s.Dimensions...)})
		case x.Kind() == reflect.Func || x.Kind() == reflect.Chan || x.Kind() == reflect.Pointer:
			return nil, fmt.Errorf("%s holds a %s in field %s and cannot be written", t, x.Kind(), field.Name)
		case x.Kind() == reflect.Float64 && (math.IsInf(x.Float(), 0) || math.IsNaN(x.Float())):
			raw, err = json.Marshal(fmt.Sprint(x.Float()))
		case field.Type == reflect.TypeFor[dtypes.DType]():
			raw, err = json.Marshal(x.Interface().(dtypes.DType).String())
		default:
			raw, err = json.Marshal(x.Interface())
		}
		if err != nil {
			return nil, fmt.Errorf("field %s: %w", field.Name, err)
		}
		fmt.Fprintf(&b, `,%q:%s`, field.Name, raw)
	}
	b.WriteByte('}')
	return b.Bytes(), nil
}

// decodeValue is the inverse of encodeValue.
func decodeValue(raw json.RawMessage, known map[string]reflect.Type) (reflect.Value, error) {
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(raw, &fields); err != nil {
		return reflect.Value{}, fmt.Errorf("op: %w", err)
	}
	var name string
	if err := json.Unmarshal(fields["type"], &name); err != nil {
		return reflect.Value{}, fmt.Errorf("op without type")
	}
	t, ok := known[name]
	if !ok {
		return reflect.Value{}, fmt.Errorf("there is no op or stored form %q here; its package must be given to ReadNetwork", name)
	}
	delete(fields, "type")
	v := reflect.New(t).Elem()
	for key, data := range fields {
		field, ok := t.FieldByName(key)
		if !ok || !field.IsExported() || len(field.Index) != 1 || field.Type == reflect.TypeFor[nn.Init]() {
			return v, fmt.Errorf("%s has no field %q", name, key)
		}
		x := v.FieldByIndex(field.Index)
		var err error
		switch {
		case x.Kind() == reflect.Interface:
			var in reflect.Value
			if in, err = decodeValue(data, known); err == nil {
				if !in.Type().Implements(field.Type) {
					return v, fmt.Errorf("%s cannot stand in field %s of %s", in.Type(), key, name)
				}
				x.Set(in)
			}
		case field.Type == reflect.TypeFor[shapes.Shape]():
			err = decodeShape(data, x)
		case field.Type == reflect.TypeFor[dtypes.DType]():
			var s string
			if err = json.Unmarshal(data, &s); err == nil {
				var d dtypes.DType
				if d, err = dtypes.DTypeString(s); err == nil {
					x.Set(reflect.ValueOf(d))
				}
			}
		case x.Kind() == reflect.Float64 && len(data) > 0 && data[0] == '"':
			var s string
			if err = json.Unmarshal(data, &s); err == nil {
				special := map[string]float64{"+Inf": math.Inf(1), "-Inf": math.Inf(-1), "NaN": math.NaN()}
				f, ok := special[s]
				if !ok {
					return v, fmt.Errorf("%s.%s: %q is not a number", name, key, s)
				}
				x.SetFloat(f)
			}
		default:
			err = json.Unmarshal(data, x.Addr().Interface())
		}
		if err != nil {
			return v, fmt.Errorf("%s.%s: %w", name, key, err)
		}
	}
	return v, nil
}

func decodeShape(data json.RawMessage, x reflect.Value) error {
	var s fileInput
	if err := json.Unmarshal(data, &s); err != nil {
		return err
	}
	t, err := dtypes.DTypeString(s.DType)
	if err != nil {
		return err
	}
	size := 1
	for _, d := range s.Shape {
		if d < 1 || size > math.MaxInt32/d {
			return fmt.Errorf("shape %v", s.Shape)
		}
		size *= d
	}
	x.Set(reflect.ValueOf(shapes.Make(t, s.Shape...)))
	return nil
}

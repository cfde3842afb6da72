package onnx_test

import (
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/gomlx/gomlx/core/tensors"
	"google.golang.org/protobuf/proto"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/nn/onnx"
	"github.com/lathe-ml/lathe/nn/onnx/internal/pb"
)

// TestSileroIsRefusedByOperator names the recurrent and the control-flow operators.
func TestSileroIsRefusedByOperator(t *testing.T) {
	data.RequireTest(t, "silero-vad")
	for file, op := range map[string]string{"silero_vad_16k_sequence.onnx": "(LSTM): operator is not supported", "silero_vad_16k_op15.onnx": "(If): operator is not supported"} {
		_, err := onnx.ReadFile(filepath.Join(data.Dir(), "models", "silero-vad", file), onnx.Options{})
		if err == nil || !strings.Contains(err.Error(), op) {
			t.Errorf("%s: error is %v, want one with %q", file, err, op)
		}
	}
}

// small is a valid model: y = Relu(x·w), x [N, 3].
func small() *pb.ModelProto {
	dim := func(d ...any) *pb.TypeProto {
		s := &pb.TensorShapeProto{}
		for _, x := range d {
			switch x := x.(type) {
			case int:
				s.Dim = append(s.Dim, &pb.TensorShapeProto_Dimension{Value: &pb.TensorShapeProto_Dimension_DimValue{DimValue: int64(x)}})
			case string:
				s.Dim = append(s.Dim, &pb.TensorShapeProto_Dimension{Value: &pb.TensorShapeProto_Dimension_DimParam{DimParam: x}})
			}
		}
		return &pb.TypeProto{Value: &pb.TypeProto_TensorType{TensorType: &pb.TypeProto_Tensor{ElemType: proto.Int32(1), Shape: s}}}
	}
	return &pb.ModelProto{
		IrVersion:   proto.Int64(8),
		OpsetImport: []*pb.OperatorSetIdProto{{Version: proto.Int64(17)}},
		Graph: &pb.GraphProto{
			Node: []*pb.NodeProto{
				{Name: proto.String("mm"), OpType: proto.String("MatMul"), Input: []string{"x", "w"}, Output: []string{"h"}},
				{Name: proto.String("act"), OpType: proto.String("Relu"), Input: []string{"h"}, Output: []string{"y"}},
			},
			Initializer: []*pb.TensorProto{{Name: proto.String("w"), DataType: proto.Int32(1), Dims: []int64{3, 2}, RawData: make([]byte, 24)}},
			Input:       []*pb.ValueInfoProto{{Name: proto.String("x"), Type: dim("N", 3)}},
			Output:      []*pb.ValueInfoProto{{Name: proto.String("y"), Type: dim("N", 2)}},
		},
	}
}

func marshal(t *testing.T, m *pb.ModelProto) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestHostileModelsAreRefused changes one thing of a valid model; the error must name the place and the reason.
func TestHostileModelsAreRefused(t *testing.T) {
	if _, err := onnx.Read(marshal(t, small()), onnx.Options{}); err != nil {
		t.Fatal(err)
	}
	add := func(m *pb.ModelProto, op string, attrs []*pb.AttributeProto, in ...string) {
		m.Graph.Node[1].Input = []string{"z"}
		m.Graph.Node = append([]*pb.NodeProto{m.Graph.Node[0], {Name: proto.String("new"), OpType: &op, Input: in, Output: []string{"z"}, Attribute: attrs}}, m.Graph.Node[1:]...)
	}
	ints := func(m *pb.ModelProto, name string, v ...int64) string {
		m.Graph.Initializer = append(m.Graph.Initializer, &pb.TensorProto{Name: &name, DataType: proto.Int32(7), Dims: []int64{int64(len(v))}, Int64Data: v})
		return name
	}
	w := func(m *pb.ModelProto) *pb.TensorProto { return m.Graph.Initializer[0] }
	for _, c := range []struct {
		name, want string
		change     func(m *pb.ModelProto)
	}{
		{"old operator set", "operator set 9 is not read", func(m *pb.ModelProto) { m.OpsetImport[0].Version = proto.Int64(9) }},
		{"no graph", "it has no graph", func(m *pb.ModelProto) { m.Graph = nil }},
		{"no outputs", "has no outputs", func(m *pb.ModelProto) { m.Graph.Output = nil }},
		{"unknown operator", `node "act" (Frobnicate): operator is not supported`, func(m *pb.ModelProto) { m.Graph.Node[1].OpType = proto.String("Frobnicate") }},
		{"foreign domain", "(com.microsoft.Relu): operator is not supported", func(m *pb.ModelProto) { m.Graph.Node[1].Domain = proto.String("com.microsoft") }},
		{"several unknown operators", "neither are NonZero", func(m *pb.ModelProto) {
			m.Graph.Node[0].OpType, m.Graph.Node[1].OpType = proto.String("LSTM"), proto.String("NonZero")
		}},
		{"undefined input", `input "nowhere" is not defined before it`, func(m *pb.ModelProto) { m.Graph.Node[1].Input[0] = "nowhere" }},
		{"a cycle", `input "y" is not defined before it`, func(m *pb.ModelProto) { m.Graph.Node[0].Input[0] = "y" }},
		{"a value twice", `value "h" is defined twice`, func(m *pb.ModelProto) { m.Graph.Node[1].Output[0] = "h" }},
		{"an undefined output", `output 0 "q" is not defined`, func(m *pb.ModelProto) { m.Graph.Output[0].Name = proto.String("q") }},
		{"a node without output", "has no output", func(m *pb.ModelProto) { m.Graph.Node[1].Output = nil }},
		{"too little data", "20 bytes of data for FLOAT[3 2], want 24", func(m *pb.ModelProto) { w(m).RawData = make([]byte, 20) }},
		{"a claim of 2 GB", `initializer 0 "w"`, func(m *pb.ModelProto) { w(m).Dims = []int64{1 << 29, 1} }},
		{"an overflowing claim", "dimensions", func(m *pb.ModelProto) { w(m).Dims = []int64{1 << 62, 1 << 62} }},
		{"a negative dimension", "dimensions", func(m *pb.ModelProto) { w(m).Dims = []int64{-3, 2} }},
		{"an unknown type", "element type", func(m *pb.ModelProto) { w(m).DataType = proto.Int32(99) }},
		{"strings", "element type STRING is not read", func(m *pb.ModelProto) { w(m).DataType = proto.Int32(8) }},
		{"no data", "0 values in float_data", func(m *pb.ModelProto) { w(m).RawData = nil }},
		{"external data", `in a file of their own, "../../etc/passwd", which is not read`, func(m *pb.ModelProto) {
			w(m).DataLocation = pb.TensorProto_EXTERNAL.Enum()
			w(m).ExternalData = []*pb.StringStringEntryProto{{Key: proto.String("location"), Value: proto.String("../../etc/passwd")}}
		}},
		{"sizes that do not fit", "[N 3] times [2 3] does not fit", func(m *pb.ModelProto) { w(m).Dims = []int64{2, 3} }},
		{"an open axis", `axis 1 of input "x" has no fixed size`, func(m *pb.ModelProto) {
			m.Graph.Input[0].Type.GetTensorType().Shape.Dim[1].Value = &pb.TensorShapeProto_Dimension_DimParam{DimParam: "width"}
		}},
		{"a huge input", "dimensions", func(m *pb.ModelProto) {
			m.Graph.Input[0].Type.GetTensorType().Shape.Dim[1].Value = &pb.TensorShapeProto_Dimension_DimValue{DimValue: 1 << 40}
			w(m).Dims = []int64{1 << 40, 0}
			w(m).RawData = []byte{}
		}},
		{"a huge fill", "far more memory than the file has", func(m *pb.ModelProto) { add(m, "ConstantOfShape", nil, ints(m, "s", 1<<15, 1<<15)) }},
		{"a huge range", "too many elements", func(m *pb.ModelProto) {
			for i, v := range []int64{0, 1 << 40, 1} {
				m.Graph.Initializer = append(m.Graph.Initializer, &pb.TensorProto{Name: proto.String(string(rune('a' + i))), DataType: proto.Int32(7), Int64Data: []int64{v}})
			}
			add(m, "Range", nil, "a", "b", "c")
		}},
		{"many fills", "far more memory than the file has", func(m *pb.ModelProto) {
			ints(m, "s", 1<<19)
			for i := range 40 {
				out := string(rune('A' + i))
				m.Graph.Node = append([]*pb.NodeProto{{OpType: proto.String("ConstantOfShape"), Input: []string{"s"}, Output: []string{"s" + out}}}, m.Graph.Node...)
			}
			var all []string
			for i := range 40 {
				all = append(all, "s"+string(rune('A'+i)))
			}
			m.Graph.Node = append(m.Graph.Node, &pb.NodeProto{OpType: proto.String("Concat"), Input: all, Output: []string{"cat"}, Attribute: []*pb.AttributeProto{onnx.Int("axis", 0)}})
			m.Graph.Output = append(m.Graph.Output, &pb.ValueInfoProto{Name: proto.String("cat")})
		}},
		{"a shape from the data", "must be constant", func(m *pb.ModelProto) { add(m, "Reshape", nil, "h", "h") }},
		{"a bad axis", "axis 7 is not one of 2 axes", func(m *pb.ModelProto) { add(m, "Softmax", []*pb.AttributeProto{onnx.Int("axis", 7)}, "h") }},
		{"a bad permutation", "perm", func(m *pb.ModelProto) { add(m, "Transpose", []*pb.AttributeProto{onnx.Ints("perm", 0, 1, 2)}, "h") }},
		{"a permutation of one axis", "named twice", func(m *pb.ModelProto) { add(m, "Transpose", []*pb.AttributeProto{onnx.Ints("perm", 1, 1)}, "h") }},
		{"a missing input", "input 1 is missing", func(m *pb.ModelProto) { add(m, "Add", nil, "h") }},
		{"an empty result", "without elements", func(m *pb.ModelProto) {
			add(m, "Slice", nil, "h", ints(m, "from", 2), ints(m, "to", 1), ints(m, "axis", 1))
		}},
		{"a huge pad", "pads", func(m *pb.ModelProto) { add(m, "Pad", nil, "h", ints(m, "p", 0, 1<<40, 0, 0)) }},
		{"a tensor without type", "is not a tensor", func(m *pb.ModelProto) { m.Graph.Input[0].Type = nil }},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := small()
			c.change(m)
			b := marshal(t, m)
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			_, err := onnx.Read(b, onnx.Options{})
			runtime.ReadMemStats(&after)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error is %v, want one with %q", err, c.want)
			}
			if grown := after.TotalAlloc - before.TotalAlloc; grown > 128<<20 {
				t.Errorf("%d bytes were allocated for a file of %d", grown, len(b))
			}
		})
	}
}

// TestAmplifyingMessagesAreRefused: a message of two bytes becomes a struct of hundreds, a packed varint of one byte eight.
func TestAmplifyingMessagesAreRefused(t *testing.T) {
	node := []byte{0x0a, 0x00} // GraphProto.node, empty
	graph := []byte(strings.Repeat(string(node), 2<<20))
	var b []byte
	b = append(b, 0x3a) // ModelProto.graph
	for n := len(graph); ; n >>= 7 {
		if n < 128 {
			b = append(b, byte(n))
			break
		}
		b = append(b, byte(n)|128)
	}
	_, err := onnx.Read(append(b, graph...), onnx.Options{})
	if err == nil || !strings.Contains(err.Error(), "more than twice as much") {
		t.Errorf("error is %v", err)
	}
	deep := []byte{}
	for range 200 { // NodeProto.attribute.g.node.attribute.g...
		deep = append([]byte{}, deep...)
		deep = wrap(0x0a, wrap(0x2a, wrap(0x32, deep)))
	}
	if _, err = onnx.Read(wrap(0x3a, deep), onnx.Options{}); err == nil || !strings.Contains(err.Error(), "nested more than") {
		t.Errorf("error is %v", err)
	}
}

func wrap(tag byte, b []byte) []byte {
	out := []byte{tag}
	n := len(b)
	for ; n >= 128; n >>= 7 {
		out = append(out, byte(n)|128)
	}
	return append(append(out, byte(n)), b...)
}

// TestTruncatedModelsAreRefused cuts a model at every byte.
func TestTruncatedModelsAreRefused(t *testing.T) {
	b := marshal(t, small())
	for n := range b {
		if net, err := onnx.Read(b[:n], onnx.Options{}); err == nil && len(net.Nodes) == 2 {
			t.Errorf("%d of %d bytes were read as the whole model", n, len(b))
		}
	}
	path := filepath.Join(t.TempDir(), "text.onnx")
	if err := os.WriteFile(path, []byte("this is no model, but some text"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := onnx.ReadFile(path, onnx.Options{}); err == nil || !strings.Contains(err.Error(), "not an ONNX model") {
		t.Errorf("error is %v", err)
	}
	if _, err := onnx.ReadFile(t.TempDir(), onnx.Options{}); err == nil {
		t.Error("a folder was read")
	}
}

// TestDimsBindOpenAxes checks what Options.Dims accepts.
func TestDimsBindOpenAxes(t *testing.T) {
	m := small()
	m.Graph.Input[0].Type.GetTensorType().Shape.Dim[1].Value = &pb.TensorShapeProto_Dimension_DimParam{DimParam: "width"}
	b := marshal(t, m)
	for _, c := range []struct {
		dims map[string][]int
		want string
	}{
		{map[string][]int{"x": {0, 3}}, ""},
		{map[string][]int{"x": {4, 3}}, ""},
		{map[string][]int{"x": {0, 4}}, "[N 4] times [3 2] does not fit"},
		{map[string][]int{"x": {0}}, `input "x" has 2 axes, Options.Dims gives 1`},
		{map[string][]int{"x": {0, -1}}, "sizes are 1 to 2^24"},
		{map[string][]int{"q": {0, 3}}, `names the input "q"; the model has ["x"]`},
	} {
		net, err := onnx.Read(b, onnx.Options{Dims: c.dims})
		if (err == nil) != (c.want == "") || (err != nil && !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%v: error is %v, want %q", c.dims, err, c.want)
		}
		if err == nil && net.Inputs[0].Shape.Dimensions[1] != 3 {
			t.Errorf("%v: input is %s", c.dims, net.Inputs[0].Shape)
		}
	}
}

// TestOpenBatchOpensAModelOfOneCase reads a model whose shapes say 1 where the batch is.
func TestOpenBatchOpensAModelOfOneCase(t *testing.T) {
	m := small()
	m.Graph.Input[0].Type.GetTensorType().Shape.Dim[0].Value = &pb.TensorShapeProto_Dimension_DimValue{DimValue: 1}
	m.Graph.Initializer = append(m.Graph.Initializer, &pb.TensorProto{Name: proto.String("s"), DataType: proto.Int32(7), Dims: []int64{3}, Int64Data: []int64{1, 1, 2}})
	m.Graph.Node[1].OpType, m.Graph.Node[1].Input = proto.String("Reshape"), []string{"h", "s"}
	for open, want := range map[bool]string{false: "does not reshape", true: ""} {
		net, err := onnx.Read(marshal(t, m), onnx.Options{OpenBatch: open})
		if err != nil {
			t.Fatal(err)
		}
		out, err := net.Run(backend(t), []*tensors.Tensor{tensors.FromFlatDataAndDimensions(make([]float32, 12), 4, 3)})
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("OpenBatch %v: error is %v, want %q", open, err, want)
		}
		if err == nil && !slices.Equal(out[0].Shape().Dimensions, []int{4, 1, 2}) {
			t.Errorf("output is %s", out[0].Shape())
		}
	}
}

// TestReadingTakesLittleMemory: a model costs its file, its decoded messages and its parameters.
func TestReadingTakesLittleMemory(t *testing.T) {
	data.RequireTest(t, "pp-ocrv4")
	b, err := os.ReadFile(filepath.Join(data.Dir(), "models/pp-ocrv4/rec.onnx"))
	if err != nil {
		t.Fatal(err)
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if _, err := onnx.Read(b, onnx.Options{Dims: map[string][]int{"x": {0, 3, 48, 320}}}); err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	if grown := after.TotalAlloc - before.TotalAlloc; grown > uint64(6*len(b)) {
		t.Errorf("%d bytes were allocated in all for a file of %d", grown, len(b))
	}
}

// FuzzRead wants an error or a network that checks, whatever the bytes.
func FuzzRead(f *testing.F) {
	b, err := proto.Marshal(small())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(b[:len(b)/2])
	seeds, err := opSeeds()
	if err != nil {
		f.Fatal(err)
	}
	for _, s := range seeds {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		net, err := onnx.Read(b, onnx.Options{})
		if err != nil {
			if strings.Contains(err.Error(), "internal error") {
				t.Errorf("a defect of the reader: %v", err)
			}
			return
		}
		if err := net.Check(); err != nil {
			t.Errorf("the network is broken: %v", err)
		}
		if _, err := onnx.Marshal(net, onnx.WriteOptions{}); err != nil && strings.Contains(err.Error(), "internal error") {
			t.Errorf("a defect of the writer: %v", err)
		}
	})
}

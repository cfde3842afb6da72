package onnx

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	"github.com/lathe-ml/lathe/nn/onnx/internal/pb"
)

// Summary is what a model file holds, also when it cannot be read as a network.
type Summary struct {
	Opsets    map[string]int    `json:"opsets"` // by domain, "" for the standard one
	Producer  string            `json:"producer,omitempty"`
	Meta      map[string]string `json:"metadata,omitempty"`
	Inputs    []SummaryValue    `json:"inputs"`
	Outputs   []SummaryValue    `json:"outputs"`
	Operators map[string]int    `json:"operators"` // calls by operator, with its domain when that is not the standard one
	Tensors   []SummaryTensor   `json:"tensors"`   // initializers and constants, in order

	// Weights names the stored tensor behind the weight of a product, convolution or table, by the names of its node and
	// output, and of the bias addition after it.
	Weights map[string]string `json:"-"`
}

// SummaryValue is an input or output. A size that the file leaves open is its name there, or "?".
type SummaryValue struct {
	Name  string   `json:"name"`
	Type  string   `json:"type"`
	Shape []string `json:"shape"`
}

// SummaryTensor is a stored tensor.
type SummaryTensor struct {
	Name     string  `json:"name"`
	Type     string  `json:"type"` // ONNX's: FLOAT, INT8, UINT4, ...
	Shape    []int64 `json:"shape"`
	Bytes    int64   `json:"bytes"`              // stored in the file
	External string  `json:"external,omitempty"` // file in which the data lie instead, as the model names it; it is not opened
}

// Summarize reads what a model holds. Only what cannot be a model at all is refused; sizes are taken from the file, not
// from what it claims.
func Summarize(b []byte) (*Summary, error) {
	m, err := decodeModel(b)
	if err != nil {
		return nil, fmt.Errorf("onnx: %w", err)
	}
	s := &Summary{Opsets: map[string]int{}, Producer: strings.TrimSpace(m.GetProducerName() + " " + m.GetProducerVersion()), Meta: map[string]string{}, Operators: map[string]int{}}
	for _, o := range m.OpsetImport {
		s.Opsets[strings.TrimPrefix(o.GetDomain(), "ai.onnx")] = int(o.GetVersion())
	}
	for _, p := range m.MetadataProps {
		s.Meta[p.GetKey()] = p.GetValue()
	}
	stored := map[string]bool{}
	for _, t := range m.Graph.Initializer {
		stored[t.GetName()] = true
		s.Tensors = append(s.Tensors, summarizeTensor(t.GetName(), t))
	}
	for _, n := range m.Graph.Node {
		op := n.GetOpType()
		if d := n.GetDomain(); d != "" && d != "ai.onnx" {
			op = d + "." + op
		}
		s.Operators[op]++
		for _, a := range n.Attribute {
			if t := a.GetT(); t != nil && op == "Constant" && len(n.Output) > 0 {
				s.Tensors = append(s.Tensors, summarizeTensor(n.Output[0], t))
			}
		}
	}
	values := func(list []*pb.ValueInfoProto) (out []SummaryValue) {
		for _, v := range list {
			if stored[v.GetName()] {
				continue
			}
			x := SummaryValue{Name: v.GetName(), Shape: []string{}}
			if t := v.GetType().GetTensorType(); t != nil {
				x.Type = pb.TensorProto_DataType(t.GetElemType()).String()
				for _, d := range t.GetShape().GetDim() {
					size := d.GetDimParam()
					if d.GetDimValue() > 0 {
						size = fmt.Sprint(d.GetDimValue())
					}
					if size == "" {
						size = "?"
					}
					x.Shape = append(x.Shape, size)
				}
			}
			out = append(out, x)
		}
		return out
	}
	s.Weights = weightsOf(m.Graph, s.Tensors)
	s.Inputs, s.Outputs = values(m.Graph.Input), values(m.Graph.Output)
	return s, nil
}

// weightsOf follows the weights of linear nodes back through what only decodes or moves them.
func weightsOf(g *pb.GraphProto, stored []SummaryTensor) map[string]string {
	tensor := map[string]string{}
	for _, t := range stored {
		tensor[t.Name] = t.Name
	}
	out := map[string]string{}
	for _, n := range g.Node {
		if len(n.Output) == 0 || len(n.Input) == 0 {
			continue
		}
		name := func(t string) { out[n.GetName()], out[n.Output[0]] = t, t }
		switch op := n.GetOpType(); op {
		case "DequantizeLinear", "Transpose", "Reshape", "Cast", "Identity":
			if t := tensor[n.Input[0]]; t != "" {
				tensor[n.Output[0]] = t
			}
		case "Gather":
			if t := tensor[n.Input[0]]; t != "" {
				name(t)
				if len(n.Input) > 1 && tensor[n.Input[1]] != "" { // codes that choose from a table of levels
					tensor[n.Output[0]] = tensor[n.Input[1]]
				}
			}
		case "Mul":
			for _, in := range n.Input {
				if t := tensor[in]; t != "" && tensor[n.Output[0]] == "" {
					tensor[n.Output[0]] = t
				}
			}
		case "MatMul", "Gemm", "Conv", "ConvTranspose", "MatMulNBits":
			if len(n.Input) > 1 && tensor[n.Input[1]] != "" {
				name(tensor[n.Input[1]])
			}
		case "Add":
			for _, in := range n.Input {
				if t := out[in]; t != "" {
					name(t)
				}
			}
		}
	}
	return out
}

// SummarizeFile is Summarize of a file.
func SummarizeFile(path string) (*Summary, error) {
	b, err := readModelFile(path)
	if err != nil {
		return nil, err
	}
	s, err := Summarize(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return s, nil
}

func summarizeTensor(name string, t *pb.TensorProto) SummaryTensor {
	x := SummaryTensor{Name: name, Type: pb.TensorProto_DataType(t.GetDataType()).String(), Shape: slices.Clone(t.Dims)}
	if t.GetDataLocation() == pb.TensorProto_EXTERNAL {
		x.External = "?"
		for _, e := range t.ExternalData {
			if e.GetKey() == "location" {
				x.External = e.GetValue()
			}
		}
		return x
	}
	x.Bytes = int64(len(t.RawData)) + 4*int64(len(t.FloatData)+len(t.Int32Data)) + 8*int64(len(t.Int64Data)+len(t.DoubleData)+len(t.Uint64Data))
	for _, v := range t.StringData {
		x.Bytes += int64(len(v))
	}
	return x
}

// readModelFile reads a file of at most the size that a model can have.
func readModelFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("onnx: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("onnx: %w", err)
	}
	if !st.Mode().IsRegular() || st.Size() > maxFile {
		return nil, fmt.Errorf("onnx: %s is no regular file of at most 2 GiB", path)
	}
	b := make([]byte, st.Size())
	if _, err := io.ReadFull(f, b); err != nil {
		return nil, fmt.Errorf("onnx: reading %s: %w", path, err)
	}
	return b, nil
}

// decodeModel parses the message, when its decoded form cannot take far more memory than the file.
func decodeModel(b []byte) (*pb.ModelProto, error) {
	if len(b) > maxFile {
		return nil, fmt.Errorf("%d bytes are more than an ONNX file can have (2 GiB)", len(b))
	}
	need, err := weigh((&pb.ModelProto{}).ProtoReflect().Descriptor(), b, 0)
	if err != nil {
		return nil, fmt.Errorf("this is not an ONNX model: %w", err)
	}
	if limit := 2*int64(len(b)) + slackBytes; need > limit {
		return nil, fmt.Errorf("decoding its %d bytes would take %d bytes of memory, more than twice as much; if the file is sound, save it again with tensors in raw_data", len(b), need)
	}
	m := &pb.ModelProto{}
	if err := (proto.UnmarshalOptions{DiscardUnknown: true, RecursionLimit: maxDepth + 8}).Unmarshal(b, m); err != nil {
		return nil, fmt.Errorf("this is not an ONNX model: %w", err)
	}
	if m.Graph == nil {
		return nil, errors.New("this is not an ONNX model: it has no graph")
	}
	return m, nil
}

package onnx_test

import (
	"encoding/base64"
	"encoding/json"
	"math"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/onnx"
)

// packed is a tensor as test/peers/onnx_ops.py writes it.
type packed struct {
	Shape []int
	DType string
	Data  []float64
}

func (p packed) tensor(t *testing.T) *tensors.Tensor {
	t.Helper()
	switch p.DType {
	case "float32":
		v := make([]float32, len(p.Data))
		for i, x := range p.Data {
			v[i] = float32(x)
		}
		return tensors.FromFlatDataAndDimensions(v, p.Shape...)
	case "int64":
		v := make([]int64, len(p.Data))
		for i, x := range p.Data {
			v[i] = int64(x)
		}
		return tensors.FromFlatDataAndDimensions(v, p.Shape...)
	}
	t.Fatalf("type %s", p.DType)
	return nil
}

type opCase struct {
	Name, Model, Kind string
	Inputs            map[string]packed
	Outputs           []packed
}

func opCases() ([]opCase, error) {
	b, err := os.ReadFile("testdata/ops.json")
	if err != nil {
		return nil, err
	}
	var f struct{ Cases []opCase }
	err = json.Unmarshal(b, &f)
	return f.Cases, err
}

// opSeeds are the models as a fuzzer's corpus.
func opSeeds() ([][]byte, error) {
	cases, err := opCases()
	var seeds [][]byte
	for _, c := range cases {
		b, err := base64.StdEncoding.DecodeString(c.Model)
		if err != nil {
			return nil, err
		}
		seeds = append(seeds, b)
	}
	return seeds, err
}

func (c opCase) bytes(t *testing.T) []byte {
	t.Helper()
	b, err := base64.StdEncoding.DecodeString(c.Model)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (c opCase) run(t *testing.T, net *nn.Network) []*tensors.Tensor {
	t.Helper()
	var in []*tensors.Tensor
	for _, i := range net.Inputs {
		in = append(in, c.Inputs[i.Name].tensor(t))
	}
	out, err := net.Run(backend(t), in)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// TestOperatorsAgreeWithONNXRuntime reads models of one operator or pattern each, and what is written back of them.
func TestOperatorsAgreeWithONNXRuntime(t *testing.T) {
	cases, err := opCases()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range cases {
		t.Run(c.Name, func(t *testing.T) {
			net, err := onnx.Read(c.bytes(t), onnx.Options{})
			if err != nil {
				t.Fatal(err)
			}
			c.compare(t, c.run(t, net))
			c.checkKind(t, net)
			b, err := onnx.Marshal(net, onnx.WriteOptions{Opset: 17 + 4*(len(c.Name)%2)})
			if err != nil {
				t.Fatal(err)
			}
			again, err := onnx.Read(b, onnx.Options{})
			if err != nil {
				t.Fatalf("written and read again: %v", err)
			}
			c.compare(t, c.run(t, again))
			if len(again.Nodes) > len(net.Nodes)+3 && !strings.HasPrefix(c.Name, "GroupNorm") { // in pieces before operator set 21
				t.Errorf("written and read again it has %d nodes, before %d", len(again.Nodes), len(net.Nodes))
			}
		})
	}
}

func (c opCase) compare(t *testing.T, got []*tensors.Tensor) {
	t.Helper()
	for i, want := range c.Outputs {
		if !slices.Equal(got[i].Shape().Dimensions, want.Shape) {
			t.Fatalf("output %d is %s, want %v", i, got[i].Shape(), want.Shape)
		}
		y := nn.Floats(got[i])
		for j, w := range want.Data {
			if d := math.Abs(float64(y[j]) - w); !(d <= 3e-5*math.Max(1, math.Abs(w))) {
				t.Fatalf("output %d, element %d is %g, want %g", i, j, y[j], w)
			}
		}
	}
}

// checkKind says whether a pattern was recognised as one node, or not.
func (c opCase) checkKind(t *testing.T, net *nn.Network) {
	t.Helper()
	kinds := map[string]int{}
	for _, n := range net.Nodes {
		kinds[n.Op.Kind()]++
	}
	switch {
	case c.Kind == "":
	case c.Kind == "attention":
		if kinds["matmul"] != 2 || kinds["dense"] != 3 || kinds["softmax"] != 1 || kinds["affine"] != 0 {
			t.Errorf("attention was read as %v", kinds)
		}
	case strings.HasPrefix(c.Kind, "no "):
		if kinds[c.Kind[3:]] != 0 {
			t.Errorf("read as %v, but it is no %s", kinds, c.Kind[3:])
		}
	default:
		delete(kinds, "transpose")
		delete(kinds, "reshape")
		if kinds[c.Kind] != 1 || len(kinds) != 1 {
			t.Errorf("read as %v, want one %s", kinds, c.Kind)
		}
	}
}

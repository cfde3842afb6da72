package onnx_test

import (
	"testing"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"

	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/onnx"
)

// A compressed norm is written in plain operators, and found again.
func TestCRMSNormComesBack(t *testing.T) {
	b := nn.NewBuilder(1)
	x := b.Input("x", shapes.Make(dtypes.Float32, 2, 3, 5))
	net, err := b.Finish(b.Add("head", nn.Dense{Out: 2}, b.Add("norm", nn.CRMSNorm{Eps: 1e-3}, x)))
	if err != nil {
		t.Fatal(err)
	}
	for _, opset := range []int{17, 21} {
		file, err := onnx.Marshal(net, onnx.WriteOptions{Opset: opset})
		if err != nil {
			t.Fatal(err)
		}
		back, err := onnx.Read(file, onnx.Options{})
		if err != nil {
			t.Fatal(err)
		}
		if op, ok := back.Nodes[0].Op.(nn.CRMSNorm); !ok || len(back.Nodes) != 2 || op.Eps < .99e-3 || op.Eps > 1.01e-3 {
			t.Errorf("opset %d: %d nodes, the first is %#v", opset, len(back.Nodes), back.Nodes[0].Op)
		}
	}
}

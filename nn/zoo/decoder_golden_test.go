package zoo_test

import (
	"encoding/json"
	"math"
	"os"
	"testing"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/internal/fixture"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// TestDecoderBlockMatchesReference holds one block in float64 against an independent computation of LLaMA's: causal
// attention of rotated queries and keys, the gated feed-forward part, RMS norms in front of both.
func TestDecoderBlockMatchesReference(t *testing.T) {
	b, err := os.ReadFile("testdata/llama-block.json")
	if err != nil {
		t.Fatal(err)
	}
	var file struct{ Cases []fixture.Case }
	if err := json.Unmarshal(b, &file); err != nil || len(file.Cases) == 0 {
		t.Fatalf("%d cases, %v", len(file.Cases), err)
	}
	for _, c := range file.Cases {
		x := c.Inputs["x"]
		tokens, dim := x.Shape[1], x.Shape[2]
		net, err := zoo.Decoder(zoo.DecoderOptions{
			Context: tokens, Dim: dim, Depth: 1, Heads: c.Params["heads"].Int(), MLP: c.Inputs["Wg"].Shape[0],
			Base: c.Params["rope_base"].Float(), Norm: nn.RMSNorm{Eps: c.Params["eps"].Float()},
		})
		if err != nil {
			t.Fatal(err)
		}
		for from, to := range map[string]string{
			"Wq": "attn.q.w", "Wk": "attn.k.w", "Wv": "attn.v.w", "Wo": "attn.o.w", "Wg": "gate.w", "Wu": "up.w", "Wd": "down.w", "n1": "norm1.w", "n2": "norm2.w",
		} {
			p := net.Params.Get("blk.0." + to)
			p.Value = c.Inputs[from].Tensor(dtypes.Float64)
		}
		r, err := nn.NewRunner(enginetest.Backend(), net, nn.RunOptions{DType: dtypes.Float64, Override: []string{"embed"}, Taps: []string{"blk.0.res2"}})
		if err != nil {
			t.Fatal(err)
		}
		out, err := r.Run(tensors.FromFlatDataAndDimensions(make([]int32, x.Shape[0]*tokens), x.Shape[0], tokens), x.Tensor(dtypes.Float64))
		r.Finalize()
		if err != nil {
			t.Fatal(err)
		}
		got, want := nn.Float64s(out[1]), c.Outputs["y"].Floats()
		if len(got) != len(want) {
			t.Fatalf("%s: %d values, want %d", c.Name, len(got), len(want))
		}
		for i := range want {
			if math.Abs(got[i]-want[i]) > c.Tol*max(1, math.Abs(want[i])) {
				t.Errorf("%s: element %d is %v, want %v", c.Name, i, got[i], want[i])
				break
			}
		}
	}
}

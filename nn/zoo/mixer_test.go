package zoo

import (
	"math"
	"testing"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/nn"
)

func TestTokenMixingIsAPerceptronOfEachChannel(t *testing.T) {
	const tokens, dim, hidden = 4, 3, 5
	b := nn.NewBuilder(1)
	x := b.Input("x", shapes.Make(dtypes.Float32, 1, tokens, dim))
	net, err := b.Finish(TokenMixing(hidden, nn.ReLU)(b, "mix", x, 0, [2]int{}))
	if err != nil {
		t.Fatal(err)
	}
	in := make([]float32, 2*tokens*dim)
	for i := range in {
		in[i] = float32(math.Sin(float64(i)))
	}
	out, err := net.Run(engine.Go(), []*tensors.Tensor{tensors.FromFlatDataAndDimensions(in, 2, tokens, dim)})
	if err != nil {
		t.Fatal(err)
	}
	got := nn.Floats(out[0])
	param := func(node, local string) []float32 { return net.Param(net.Node(node), local).Data() }
	w1, w2 := param("mix.fc1", "w"), param("mix.fc2", "w")
	for n := range 2 {
		for c := range dim {
			h := make([]float64, hidden)
			for j := range h {
				for i := range tokens {
					h[j] += float64(w1[j*tokens+i]) * float64(in[(n*tokens+i)*dim+c])
				}
				h[j] = max(h[j], 0)
			}
			for i := range tokens {
				want := 0.
				for j, v := range h {
					want += float64(w2[i*hidden+j]) * v
				}
				if d := math.Abs(want - float64(got[(n*tokens+i)*dim+c])); d > 1e-5 {
					t.Fatalf("case %d, token %d, channel %d: off by %g", n, i, c, d)
				}
			}
		}
	}
}

func TestMixerNetwork(t *testing.T) {
	net, err := ViT(ViTOptions{Size: 8, Patch: 4, Dim: 16, Depth: 2, Heads: 1, MeanPool: true, Mixer: TokenMixing(8, nil)})
	if err != nil {
		t.Fatal(err)
	}
	if net.Node("blk.1.attn.fc2") == nil {
		t.Error("no token mixing in the second block")
	}
	if _, err := ViT(ViTOptions{MeanPool: true, Mixer: TokenMixing(0, nil)}); err == nil {
		t.Error("no hidden units: no error")
	}
}

package zoo_test

import (
	"slices"
	"testing"

	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// logits runs a decoder on one sequence.
func logits(t *testing.T, o zoo.DecoderOptions, tokens ...int32) []float32 {
	t.Helper()
	net, err := zoo.Decoder(o)
	if err != nil {
		t.Fatal(err)
	}
	out, err := net.Run(enginetest.Backend(), []*tensors.Tensor{tensors.FromFlatDataAndDimensions(tokens, 1, len(tokens))})
	if err != nil {
		t.Fatal(err)
	}
	return nn.Floats(out[0])
}

func TestDecoderSeesThePastOnly(t *testing.T) {
	for name, o := range map[string]zoo.DecoderOptions{
		"default": {Depth: 2}, "grouped": {Depth: 2, KVHeads: 2}, "post-norm": {Depth: 2, Scheme: zoo.PostNorm{}}, "ungated": {Depth: 2, Ungated: true, Act: nn.ReLU}, "tied": {Depth: 1, Tied: true},
	} {
		a, b := logits(t, o, 1, 2, 3, 4, 5), logits(t, o, 1, 2, 3, 9, 9)
		n := len(a) / 5
		if !slices.Equal(a[:3*n], b[:3*n]) {
			t.Errorf("%s: a later token changed earlier logits", name)
		}
		if slices.Equal(a[3*n:4*n], b[3*n:4*n]) {
			t.Errorf("%s: a token does not change its own logits", name)
		}
		if swapped := logits(t, o, 2, 1, 3, 4, 5); slices.Equal(a[2*n:3*n], swapped[2*n:3*n]) {
			t.Errorf("%s: the order of the past does not matter", name)
		}
	}
}

func TestGroupedHeadsAreRepeatedHeads(t *testing.T) {
	grouped, err := zoo.Decoder(zoo.DecoderOptions{Depth: 1, Heads: 4, KVHeads: 2})
	if err != nil {
		t.Fatal(err)
	}
	full, err := zoo.Decoder(zoo.DecoderOptions{Depth: 1, Heads: 4})
	if err != nil {
		t.Fatal(err)
	}
	for p := range full.Params.All() {
		q := grouped.Params.Get(p.Name)
		d := q.Data()
		if len(d) != p.Value.Shape().Size() { // k and v: rows of head h are those of group h/2
			rows := len(d) / 128 / 2
			var wide []float32
			for h := range 4 {
				wide = append(wide, d[h/2*rows*128:(h/2+1)*rows*128]...)
			}
			d = wide
		}
		if err := p.SetData(d); err != nil {
			t.Fatal(err)
		}
	}
	var outs [][]float32
	for _, net := range []*nn.Network{grouped, full} {
		out, err := net.Run(enginetest.Backend(), []*tensors.Tensor{tensors.FromFlatDataAndDimensions([]int32{5, 6, 7}, 1, 3)})
		if err != nil {
			t.Fatal(err)
		}
		outs = append(outs, nn.Floats(out[0]))
	}
	for i := range outs[0] {
		if d := outs[0][i] - outs[1][i]; d > 1e-5 || d < -1e-5 {
			t.Fatalf("logit %d is %v with groups and %v with repeated heads", i, outs[0][i], outs[1][i])
		}
	}
}

func TestDecoderRefuses(t *testing.T) {
	for name, o := range map[string]zoo.DecoderOptions{"odd width": {Dim: 12, Heads: 4}, "heads": {Heads: 5}, "groups": {KVHeads: 3}} {
		if _, err := zoo.Decoder(o); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

package fold_test

import (
	"slices"
	"testing"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/fold"
)

// The stream is [batch, width, tokens]; the norm's readers are dense layers behind two turns and the stream itself.
func TestLastAxisTurnsNormsForTheirReaders(t *testing.T) {
	for name, op := range map[string]nn.Norm{"layer norm": nn.LayerNorm{Axes: []int{1}}, "RMS norm": nn.RMSNorm{Axes: []int{-2}}} {
		t.Run(name, func(t *testing.T) {
			b := nn.NewBuilder(1)
			x := b.Input("x", shapes.Make(dtypes.Float32, 2, 6, 4))
			y := b.Add("norm", op, x)
			q := b.Add("q", nn.Dense{Out: 5}, b.Add("turned", nn.Transpose{Perm: []int{0, 2, 1}}, y))
			k := b.Add("k", nn.Dense{Out: 5}, b.Add("tokens first", nn.Transpose{Perm: []int{2, 0, 1}}, y))
			net, err := b.Finish(q, k, b.Add("sum", nn.Add, y, x), y)
			if err != nil {
				t.Fatal(err)
			}
			if err := net.Param(net.Node("norm"), "w").SetData(normal("gain", 6)); err != nil {
				t.Fatal(err)
			}
			want, err := net.Run(enginetest.Backend(), []*tensors.Tensor{tensors.FromFlatDataAndDimensions(normal("x", 48), 2, 6, 4)})
			if err != nil {
				t.Fatal(err)
			}
			changed, err := fold.LastAxis(net)
			if err != nil || !slices.Equal(changed, []string{"norm"}) {
				t.Fatal(changed, err)
			}
			got, err := net.Run(enginetest.Backend(), []*tensors.Tensor{tensors.FromFlatDataAndDimensions(normal("x", 48), 2, 6, 4)})
			if err != nil {
				t.Fatal(err)
			}
			for i := range want {
				if !slices.Equal(want[i].Shape().Dimensions, got[i].Shape().Dimensions) {
					t.Fatalf("output %d is %s, was %s", i, got[i].Shape(), want[i].Shape())
				}
				w, g := nn.Floats(want[i]), nn.Floats(got[i])
				for j := range w {
					if d := w[j] - g[j]; d > 1e-5 || d < -1e-5 {
						t.Fatalf("output %d[%d] is %g, was %g", i, j, g[j], w[j])
					}
				}
			}
			if net.Node("turned") != nil || !slices.Equal(net.Node("q").In, []string{"norm"}) {
				t.Errorf("a turn is left in front of the dense layer: %v", net.Node("q").In)
			}
			if folded, err := fold.NormAffine(net); err != nil || len(folded) != 0 {
				t.Errorf("folded %v, %v, though the stream reads the norm", folded, err)
			}
			if again, err := fold.LastAxis(net); err != nil || again != nil {
				t.Errorf("changed %v again: %v", again, err)
			}
		})
	}
}

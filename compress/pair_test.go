package compress_test

import (
	"testing"

	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// TestPairsSeeBothNetworks halves the weights of each site when it is visited: the inputs of the compressed network then
// carry all earlier halvings, those of the float network none.
func TestPairsSeeBothNetworks(t *testing.T) {
	ref, err := zoo.MLP(zoo.MLPOptions{Inputs: 3, Hidden: []int{4, 5}, Classes: 2, Seed: 3})
	if err != nil {
		t.Fatal(err)
	}
	x := compress.Examples{tensors.FromFlatDataAndDimensions([]float32{1, 2, 3, -1, .5, 2}, 2, 3)}
	net := ref.Clone()
	var names []string
	err = compress.WalkPairs(t.Context(), enginetest.Backend(), ref, net, x, func(p compress.Pair) error {
		names = append(names, p.Site.Name)
		if p.Number != len(names)-1 || p.Float != ref.Node(p.Site.Name) {
			t.Errorf("site %d is %q beside %q", p.Number, p.Site.Name, p.Float.Name)
		}
		factor := float32(1)
		for range p.Number {
			factor /= 2
		}
		xq, xf := nn.Floats(p.Xq), nn.Floats(p.X)
		for i := range xq {
			if d := xq[i] - factor*xf[i]; d > 1e-6 || d < -1e-6 {
				t.Errorf("%s: input %d is %v, want %v times %v", p.Site.Name, i, xq[i], factor, xf[i])
			}
		}
		out, err := ref.Run(enginetest.Backend(), x, p.Site.Name)
		if err != nil {
			return err
		}
		for i, v := range nn.Floats(out[1]) {
			if d := v - nn.Floats(p.Y)[i]; d > 1e-6 || d < -1e-6 {
				t.Errorf("%s: target %d is %v, want %v", p.Site.Name, i, nn.Floats(p.Y)[i], v)
			}
		}
		w := net.Param(p.Site, "w").Data()
		for i := range w {
			w[i] /= 2
		}
		return net.Param(p.Site, "w").SetData(w)
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(names) != 3 || names[0] != "fc0" || names[2] != "head" {
		t.Errorf("visited %v", names)
	}
}

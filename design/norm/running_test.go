package norm_test

import (
	"strings"
	"testing"

	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/design/norm"
	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// TestAccumulatedGradientsAreRefused: norms whose statistics move once per step would move them once per part.
func TestAccumulatedGradientsAreRefused(t *testing.T) {
	part := func(label int32) []*tensors.Tensor {
		return []*tensors.Tensor{tensors.FromFlatDataAndDimensions([]float32{1, 2, 3, 4, 5, 6}, 2, 3), tensors.FromFlatDataAndDimensions([]int32{label, 0}, 2)}
	}
	for name, c := range map[string]struct {
		norm    nn.Norm
		refused bool
	}{"power": {norm.PowerNorm{}, true}, "unified": {norm.Unified{}, true}, "batch": {nn.BatchNorm{}, false}, "layer": {nn.LayerNorm{}, false}} {
		net, err := zoo.MLP(zoo.MLPOptions{Inputs: 3, Hidden: []int{4}, Classes: 2, Norm: c.norm})
		if err != nil {
			t.Fatal(err)
		}
		tr, err := learn.NewTrainer(engine.Go(), &net.Params, learn.Classifier(net), learn.Options{})
		if err != nil {
			t.Fatal(err)
		}
		_, err = tr.StepMicro(1e-3, [][]*tensors.Tensor{part(1), part(0)})
		if refused := err != nil && strings.Contains(err.Error(), "once per step"); refused != c.refused || !c.refused && err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := tr.Step(part(1)...); err != nil {
			t.Errorf("%s: a whole batch: %v", name, err)
		}
		tr.Finalize()
	}
}

package quant

import (
	_ "embed"
	"fmt"

	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/lab"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/safetensors"
)

//go:embed weights/vit-a-spread.safetensors
var spreadWeights []byte

// PretrainedSpread returns ViT-A as its recipe trains it on the 60,000 training images of Fashion-MNIST, with the channel
// ranges of its norms spread by up to 36 times: the same function as the trained network, and as hard to quantise as a
// large vision transformer. The weights are part of the program; internal/pretrain made them.
func PretrainedSpread() (*nn.Network, error) {
	f, err := safetensors.Decode(spreadWeights)
	if err != nil {
		return nil, fmt.Errorf("embedded vit-a: %w", err)
	}
	net, err := ViTA(lab.Full).Build()
	if err != nil {
		return nil, err
	}
	var stored nn.Params
	for i := range f.Tensors {
		t := &f.Tensors[i]
		values, err := t.Floats()
		if err != nil {
			return nil, fmt.Errorf("embedded vit-a: %w", err)
		}
		stored.Put(&nn.Param{Name: t.Name, Value: tensors.FromFlatDataAndDimensions(values, t.Shape...)})
	}
	for p := range net.Params.All() {
		if stored.Get(p.Name) == nil {
			return nil, fmt.Errorf("embedded vit-a: parameter %q is missing", p.Name)
		}
	}
	return net, net.Params.CopyFrom(&stored)
}

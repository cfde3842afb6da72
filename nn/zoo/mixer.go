package zoo

import (
	"fmt"

	"github.com/lathe-ml/lathe/nn"
)

// TokenMixing is for ViTOptions.Mixer and makes the network an MLP-Mixer (arXiv:2105.01601, eq. 1): in place of attention a
// two-layer perceptron mixes the tokens of each channel,
//
//	y = (W₂·act(W₁·xᵀ + b₁) + b₂)ᵀ   x [batch, tokens, dim], W₁ [hidden, tokens]
//
// with one set of weights for all channels. hidden is at least 1; a nil act is nn.GELU{}. There is no class token in a
// Mixer: take ViTOptions.MeanPool with it.
func TokenMixing(hidden int, act nn.Op) func(b *nn.Builder, name, x string, heads int, grid [2]int) string {
	if act == nil {
		act = nn.GELU{}
	}
	return func(b *nn.Builder, name, x string, _ int, _ [2]int) string {
		s := b.Shape(x).Dimensions
		if hidden < 1 || len(s) != 3 {
			b.Fail(fmt.Errorf("zoo: token mixing %q with %d hidden units over %v; want at least 1 and [batch, tokens, dim]", name, hidden, s))
			return x
		}
		b.In(name, func() {
			h := b.Add("t", nn.Transpose{Perm: []int{0, 2, 1}}, x)
			h = b.Add("act", act, b.Add("fc1", nn.Dense{Out: hidden}, h))
			x = b.Add("out", nn.Transpose{Perm: []int{0, 2, 1}}, b.Add("fc2", nn.Dense{Out: s[1]}, h))
		})
		return x
	}
}

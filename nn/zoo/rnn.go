package zoo

import (
	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"

	"github.com/lathe-ml/lathe/nn"
)

// CharLSTMOptions describe a recurrent language model over symbols.
type CharLSTMOptions struct {
	Symbols   int // size of the vocabulary; 0: 128
	Embedding int // 0: 32
	Hidden    int // 0: 64
	Length    int // nominal sequence length; the network runs at any; 0: 32
	Norm      nn.RecurrentNorm
	GRU       bool // a GRU instead of an LSTM
	Seed      uint64
}

// CharLSTM builds embedding, one recurrent layer and a linear head. Input "tokens" [batch, time] int32, output "head"
// [batch, time, symbols]: the logits of the next symbol.
func CharLSTM(o CharLSTMOptions) (*nn.Network, error) {
	def := func(v *int, d int) {
		if *v == 0 {
			*v = d
		}
	}
	def(&o.Symbols, 128)
	def(&o.Embedding, 32)
	def(&o.Hidden, 64)
	def(&o.Length, 32)
	b := nn.NewBuilder(o.Seed)
	x := b.Input("tokens", shapes.Make(dtypes.Int32, 1, o.Length))
	x = b.Add("embed", nn.Embedding{N: o.Symbols, Dim: o.Embedding, W: nn.Plain{Init: nn.Normal(1)}}, x)
	if o.GRU {
		x = b.Add("gru", nn.GRU{Hidden: o.Hidden, Norm: o.Norm}, x)
	} else {
		x = b.Add("lstm", nn.LSTM{Hidden: o.Hidden, Norm: o.Norm}, x)
	}
	return b.Finish(b.Add("head", nn.Dense{Out: o.Symbols}, x))
}

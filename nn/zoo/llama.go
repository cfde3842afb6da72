package zoo

import (
	"cmp"
	"fmt"
	"math"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"

	"github.com/lathe-ml/lathe/nn"
)

// DecoderOptions describe a decoder-only language model in the form of LLaMA.
type DecoderOptions struct {
	Symbols int     // size of the vocabulary; 0: 96, printable ASCII and newline
	Context int     // nominal sequence length in tokens; the network runs at any; 0: 128
	Dim     int     // width of the residual stream; 0: 128
	Depth   int     // blocks; 0: 4
	Heads   int     // must divide Dim, into an even width per head; 0: 4
	KVHeads int     // heads of keys and values, each shared by Heads/KVHeads queries; 0: Heads
	MLP     int     // hidden width of the feed-forward part; 0: 3·Dim (384 for 128, for which a Hadamard matrix exists)
	Act     nn.Op   `json:",omitempty"` // of the feed-forward part; nil: nn.SiLU
	Ungated bool    // the feed-forward part is Wdown·act(Wup·m) instead of the gated one
	Base    float64 // of the rotary positions; 0: 10000
	Norm    nn.Norm // at every norm slot; nil: nn.RMSNorm{} (eps 1e-6)
	Scheme  Scheme  `json:",omitempty"` // where the norm stands; nil: PreNorm{}
	Std     float64 // of the initial weights and embeddings; 0: 0.02·√(768/Dim); below 0: all are 0, to be read from a file
	Tied    bool    // the head's weight is the embedding's
	Seed    uint64
}

// Decoder builds a causal pre-norm transformer over tokens as LLaMA has it (Touvron et al., arXiv:2302.13971):
//
//	x ← x + Wo·attention(rope(Wq·n), rope(Wk·n), Wv·n)   n = norm1(x), causal
//	x ← x + Wdown·(silu(Wgate·m) ⊙ Wup·m)                m = norm2(x)
//
// for every block, then a final norm and the head; nothing has a bias. Input "tokens" [batch, time] int32, output "head"
// [batch, time, symbols]: the logits of the next symbol. Linear weights and the embedding start as N(0, 0.02²·768/Dim),
// which keeps the gain of the 768 wide model. The options' zero value is CharLLaMA-4, the language model that the
// experiments share: 4 blocks of width 128, 4 heads, SwiGLU of 384, an untied head, 880,000 parameters.
func Decoder(o DecoderOptions) (*nn.Network, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	b := nn.NewBuilder(o.Seed)
	x := b.Input("tokens", shapes.Make(dtypes.Int32, 1, o.Context))
	x = b.Add("embed", nn.Embedding{N: o.Symbols, Dim: o.Dim, W: nn.Plain{Init: normal(o.Std)}}, x)
	x = DecoderLayers(b, x, o)
	x = b.Add("norm", o.Norm, x)
	if o.Tied {
		b.Share("w", "embed.w")
	}
	return b.Finish(b.Add("head", nn.Dense{Out: o.Symbols, NoBias: true, W: nn.Plain{Init: normal(o.Std)}}, x))
}

// DecoderLayers adds the Depth layers of a Decoder to a stream x [batch, tokens, Dim] and returns the new stream. Layer l
// (from 1) is in the scope "blk.<l-1>".
func DecoderLayers(b *nn.Builder, x string, o DecoderOptions) string {
	o, err := o.withDefaults()
	if err != nil {
		b.Fail(err)
		return x
	}
	kv := o.Dim / o.Heads * cmp.Or(o.KVHeads, o.Heads)
	for i := range o.Depth {
		p := o.Scheme.Plan(i+1, o.Depth)
		dense := func(in, out int, gain float64) nn.Dense {
			return nn.Dense{Out: out, NoBias: true, W: nn.Plain{Init: normal(p.std(o.Std, in, out, gain))}}
		}
		b.In(fmt.Sprintf("blk.%d", i), func() {
			x = Residual(b, p, o.Norm, 1, x, func(h string) string {
				return Attention(b, "attn", h, AttentionOptions{
					Heads: o.Heads, KVHeads: o.KVHeads, Causal: true, RoPE: &nn.RoPE{Base: o.Base}, NoBias: true,
					Init:      normal(p.std(o.Std, o.Dim, o.Dim, 1)),
					ValueInit: normal(p.std(o.Std, o.Dim, kv, p.Inner)),
					OutInit:   normal(p.std(o.Std, o.Dim, o.Dim, p.Gain)),
				})
			})
			x = Residual(b, p, o.Norm, 2, x, func(h string) string {
				up := b.Add("up", dense(o.Dim, o.MLP, p.Inner), h)
				if o.Ungated {
					return b.Add("down", dense(o.MLP, o.Dim, p.Gain), b.Add("act", o.Act, up))
				}
				gate := b.Add("act", o.Act, b.Add("gate", dense(o.Dim, o.MLP, p.Inner), h))
				return b.Add("down", dense(o.MLP, o.Dim, p.Gain), b.Add("gated", nn.Mul, gate, up))
			})
		})
	}
	return x
}

// withDefaults fills the zero values in and refuses heads that do not fit.
func (o DecoderOptions) withDefaults() (DecoderOptions, error) {
	def := func(v *int, d int) {
		if *v == 0 {
			*v = d
		}
	}
	def(&o.Symbols, 96)
	def(&o.Context, 128)
	def(&o.Dim, 128)
	def(&o.Depth, 4)
	def(&o.Heads, 4)
	def(&o.MLP, 3*o.Dim)
	if o.Norm == nil {
		o.Norm = nn.RMSNorm{}
	}
	if o.Scheme == nil {
		o.Scheme = PreNorm{}
	}
	if o.Act == nil {
		o.Act = nn.SiLU
	}
	if o.Dim < 1 || o.Heads < 1 || o.Dim%(2*o.Heads) != 0 {
		return o, fmt.Errorf("zoo: decoder: %d heads must divide width %d into an even width per head", o.Heads, o.Dim)
	}
	o.Std = cmp.Or(o.Std, .02*math.Sqrt(768/float64(o.Dim)))
	return o, nil
}

// normal draws with a standard deviation; a negative one gives zeros.
func normal(std float64) nn.Init {
	if std < 0 {
		return nn.Fill(0)
	}
	return nn.Normal(std)
}

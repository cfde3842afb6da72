package zoo

import (
	"cmp"
	"fmt"
	"math"

	"github.com/lathe-ml/lathe/nn"
)

// AttentionOptions describe one multi-head self-attention.
type AttentionOptions struct {
	Heads int // must divide the width
	// KVHeads are the heads of keys and values, each of which serves Heads/KVHeads queries (arXiv:2305.13245); 0: Heads.
	KVHeads int
	Causal  bool     // a token sees itself and what is in front of it
	RoPE    *nn.RoPE // positions by turning queries and keys; nil: none
	NoBias  bool     // of the four sites
	Init    nn.Init  // of their weights; nil: nn.Plain's
	Mask    string   // a value that is added to the logits: [batch, 1, 1 or queries, keys]; "": none
	// ValueInit and OutInit are those of the value's and the output's weights; nil: Init.
	ValueInit, OutInit nn.Init
}

// Attention adds multi-head self-attention over x [batch, tokens, dim] from primitive ops: name.q, name.k and name.v are
// sites, name.logits (scaled by 1/√(dim/heads), before the mask) and name.probs are values like any other, name.o is the
// output site. It runs at any number of tokens.
func Attention(b *nn.Builder, name, x string, o AttentionOptions) string {
	s := b.Shape(x).Dimensions
	if len(s) != 3 || o.Heads < 1 || s[2]%o.Heads != 0 {
		b.Fail(fmt.Errorf("zoo: attention %q: want [batch, tokens, dim] with dim divisible by %d heads, got %v", name, o.Heads, s))
		return name
	}
	d := s[2]
	width := d / o.Heads
	kv := cmp.Or(o.KVHeads, o.Heads)
	if kv < 1 || o.Heads%kv != 0 {
		b.Fail(fmt.Errorf("zoo: attention %q: %d heads of keys and values do not divide %d heads", name, kv, o.Heads))
		return name
	}
	site := func(out int, inits ...nn.Init) nn.Dense {
		for _, init := range append(inits, o.Init) {
			if init != nil {
				return nn.Dense{Out: out, NoBias: o.NoBias, W: nn.Plain{Init: init}}
			}
		}
		return nn.Dense{Out: out, NoBias: o.NoBias}
	}
	b.In(name, func() {
		split := func(p string, heads int, inits ...nn.Init) string {
			return b.Add(p+".split", nn.Reshape{Dims: []int{0, 0, heads, width}}, b.Add(p, site(heads*width, inits...), x))
		}
		repeat := func(p, v string) string {
			if kv == o.Heads {
				return v
			}
			return b.Add(p+".repeat", nn.RepeatHeads{Times: o.Heads / kv}, v)
		}
		q, k, v := split("q", o.Heads), split("k", kv), split("v", kv, o.ValueInit)
		if o.RoPE != nil {
			q, k = b.Add("q.rope", *o.RoPE, q), b.Add("k.rope", *o.RoPE, k)
		}
		k, v = repeat("k", k), repeat("v", v)
		q = b.Add("q.t", nn.Transpose{Perm: []int{0, 2, 1, 3}}, q)
		k = b.Add("k.t", nn.Transpose{Perm: []int{0, 2, 3, 1}}, k)
		v = b.Add("v.t", nn.Transpose{Perm: []int{0, 2, 1, 3}}, v)
		p := b.Add("logits", nn.MatMul{Scale: 1 / math.Sqrt(float64(width))}, q, k)
		if o.Causal {
			p = b.Add("masked", nn.CausalMask{}, p)
		}
		if o.Mask != "" {
			p = b.Add("valid", nn.Add, p, o.Mask)
		}
		p = b.Add("probs", nn.Softmax{}, p)
		c := b.Add("ctx.t", nn.Transpose{Perm: []int{0, 2, 1, 3}}, b.Add("ctx", nn.MatMul{}, p, v))
		x = b.Add("o", site(d, o.OutInit), b.Add("ctx.merge", nn.Reshape{Dims: []int{0, 0, d}}, c))
	})
	return x
}

package gguf

import (
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// DecoderOptions reads the shape of a language model of the "llama" family from the metadata.
func (f *File) DecoderOptions() (zoo.DecoderOptions, error) {
	var o zoo.DecoderOptions
	if arch, _ := f.Meta["general.architecture"].(string); arch != "llama" {
		return o, fmt.Errorf("gguf: the architecture is %q; \"llama\" can become a network (llama, mistral, smollm)", arch)
	}
	var err error
	number := func(key string, least, most, def int) int {
		v, ok := f.Meta["llama."+key]
		if !ok && def > 0 {
			return def
		}
		n, isInt := Int(v)
		if err == nil && (!isInt || n < least || n > most) {
			err = fmt.Errorf("gguf: llama.%s is %v; want %d to %d", key, v, least, most)
		}
		return n
	}
	o.Dim = number("embedding_length", 2, 1<<16, 0)
	o.Depth = number("block_count", 1, 1<<10, 0)
	o.Heads = number("attention.head_count", 1, 1<<10, 0)
	o.KVHeads = number("attention.head_count_kv", 1, 1<<10, max(o.Heads, 1))
	o.MLP = number("feed_forward_length", 1, 1<<20, 0)
	o.Context = number("context_length", 1, 1<<24, 0)
	if err != nil {
		return o, err
	}
	if turned := number("rope.dimension_count", 1, 1<<16, o.Dim/o.Heads); err == nil && turned != o.Dim/o.Heads {
		return o, fmt.Errorf("gguf: llama.rope.dimension_count is %d of %d; a part of a head that is not turned is not supported", turned, o.Dim/o.Heads)
	}
	for key := range f.Meta {
		if strings.HasPrefix(key, "llama.rope.scaling") && f.Meta[key] != "none" {
			return o, fmt.Errorf("gguf: %s is %v; scaled positions are not supported", key, f.Meta[key])
		}
	}
	real := func(key string, def float64) float64 {
		v, ok := f.Meta["llama."+key]
		if !ok {
			return def
		}
		x, isFloat := v.(float64)
		if err == nil && (!isFloat || !(x > 0) || math.IsInf(x, 0)) {
			err = fmt.Errorf("gguf: llama.%s is %v; want a positive number", key, v)
		}
		return x
	}
	o.Norm = nn.RMSNorm{Eps: real("attention.layer_norm_rms_epsilon", 1e-5)}
	o.Base = real("rope.freq_base", 10000)
	e := f.Tensor("token_embd.weight")
	if err == nil && (e == nil || len(e.Shape) != 2) {
		err = fmt.Errorf("gguf: there is no table token_embd.weight [symbols, %d]", o.Dim)
	}
	if err != nil {
		return o, err
	}
	o.Symbols, o.Tied = e.Shape[0], f.Tensor("output.weight") == nil
	return o, nil
}

// Decoder makes a language model of the "llama" family a network: zoo.Decoder in float32, with the file's weights. The
// file must hold as many bytes of weights as its metadata needs, so that a small file cannot ask for a large network.
func (f *File) Decoder() (*nn.Network, error) {
	o, err := f.DecoderOptions()
	if err != nil {
		return nil, err
	}
	for i := range o.Depth {
		for _, part := range []string{"attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"} {
			if name := fmt.Sprintf("blk.%d.%s.weight", i, part); f.Tensor(name) == nil {
				return nil, fmt.Errorf("gguf: there is no tensor %q", name)
			}
		}
	}
	if err := f.sizes(o); err != nil {
		return nil, err
	}
	o.Std = -1
	net, err := zoo.Decoder(o)
	if err != nil {
		return nil, fmt.Errorf("gguf: %w", err)
	}
	for p := range net.Params.All() {
		name := fileName(p.Name)
		t := f.Tensor(name)
		if t == nil {
			return nil, fmt.Errorf("gguf: there is no tensor %q", name)
		}
		if !slices.Equal(t.Shape, p.Value.Shape().Dimensions) {
			return nil, fmt.Errorf("gguf: tensor %q is %v; want %v", name, t.Shape, p.Value.Shape().Dimensions)
		}
		v, err := t.Floats()
		if err != nil {
			return nil, err
		}
		switch {
		case strings.HasSuffix(name, "attn_q.weight"):
			v = unpair(v, o.Heads, o.Dim)
		case strings.HasSuffix(name, "attn_k.weight"):
			v = unpair(v, o.KVHeads, o.Dim)
		}
		if err := p.SetData(v); err != nil {
			return nil, err
		}
	}
	net.Meta = map[string]string{}
	if name, ok := f.Meta["general.name"].(string); ok {
		net.Meta["name"] = name
	}
	return net, nil
}

// sizes compares what the network will need with what the file holds.
func (f *File) sizes(o zoo.DecoderOptions) error {
	var have int
	for _, t := range f.Tensors {
		have += t.Elements()
	}
	kv := o.Dim / o.Heads * o.KVHeads
	want := o.Depth*(o.Dim*(2*o.Dim+2*kv)+3*o.Dim*o.MLP+2*o.Dim) + o.Dim + o.Symbols*o.Dim
	if want > have {
		return fmt.Errorf("gguf: the metadata describe a model of %d weights, and the file holds %d", want, have)
	}
	return nil
}

// fileName is the name that a parameter of zoo.Decoder has in a file.
func fileName(param string) string {
	switch param {
	case "embed.w":
		return "token_embd.weight"
	case "norm.w":
		return "output_norm.weight"
	case "head.w":
		return "output.weight"
	}
	return parts.Replace(strings.TrimSuffix(param, ".w")) + ".weight"
}

var parts = strings.NewReplacer(
	".attn.q", ".attn_q", ".attn.k", ".attn_k", ".attn.v", ".attn_v", ".attn.o", ".attn_output",
	".norm1", ".attn_norm", ".norm2", ".ffn_norm", ".gate", ".ffn_gate", ".up", ".ffn_up", ".down", ".ffn_down",
)

// unpair reorders the rows of a matrix of queries or keys. Files of this family turn feature 2j together with 2j+1 of a
// head; nn.RoPE turns j with j + width/2.
func unpair(w []float32, heads, columns int) []float32 {
	out := make([]float32, len(w))
	width := len(w) / columns / heads
	for h := range heads {
		for r := range width {
			from := h*width + r
			to := h*width + r%2*(width/2) + r/2
			copy(out[to*columns:(to+1)*columns], w[from*columns:])
		}
	}
	return out
}

package recipe

import (
	"context"
	"fmt"

	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/gguf"
)

// SmolLM2 is the pretrained language model SmolLM2-135M-Instruct in float32: 30 blocks of width 576.
type SmolLM2 struct {
	Net       *nn.Network // from tokens to logits
	tokenizer *gguf.Tokenizer
}

// NewSmolLM2 reads the model and keeps its first blocks (0: all 30).
func NewSmolLM2(ctx context.Context, blocks int) (*SmolLM2, error) {
	path, err := data.Path(ctx, "smollm2-135m-instruct", "SmolLM2-135M-Instruct.Q4_1.gguf")
	if err != nil {
		return nil, err
	}
	f, err := gguf.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	m := &SmolLM2{}
	if m.Net, err = f.Decoder(); err != nil {
		return nil, err
	}
	if m.tokenizer, err = f.Tokenizer(); err != nil || blocks == 0 {
		return m, err
	}
	m.Net.ReplaceUses("blk.29.res2", fmt.Sprintf("blk.%d.res2", blocks-1))
	m.Net.Prune()
	return m, m.Net.Check()
}

// Passages are disjoint passages of English prose (Austen's novels) in the model's tokens, spread over the text: inputs and
// next tokens [count, length].
func (m *SmolLM2) Passages(ctx context.Context, count, length int) ([]*tensors.Tensor, error) {
	text, err := data.Austen(ctx)
	if err != nil {
		return nil, err
	}
	every := len(text) / count
	if every < 16*length {
		return nil, fmt.Errorf("smollm2: %d passages of %d tokens do not fit into %d characters", count, length, len(text))
	}
	var in, next []int32
	for i := range count {
		at := i * every
		ids, err := m.tokenizer.Encode(text[at : at+8*length])
		if err != nil {
			return nil, err
		}
		if len(ids) < length+2 {
			return nil, fmt.Errorf("a passage has %d tokens, want %d", len(ids), length+2)
		}
		ids = ids[1:] // the first word may be cut
		in, next = append(in, ids[:length]...), append(next, ids[1:length+1]...)
	}
	return []*tensors.Tensor{tensors.FromFlatDataAndDimensions(in, count, length), tensors.FromFlatDataAndDimensions(next, count, length)}, nil
}

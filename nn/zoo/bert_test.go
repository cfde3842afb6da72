package zoo_test

import (
	"encoding/json"
	"errors"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/onnx"
	"github.com/lathe-ml/lathe/nn/safetensors"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// bertGolden is a tiny encoder of PyTorch's.
type bertGolden struct {
	IDs       [][]int32     `json:"ids"`
	Mask      [][]int32     `json:"mask"`
	Hidden    [][][]float64 `json:"hidden"`
	Embedding [][]float64   `json:"embedding"`
}

func TestBERTMatchesPyTorch(t *testing.T) {
	text, err := os.ReadFile("testdata/bert/golden.json")
	if err != nil {
		t.Fatal(err)
	}
	var want bertGolden
	if err := json.Unmarshal(text, &want); err != nil {
		t.Fatal(err)
	}
	run := func(net *nn.Network, taps ...string) []*tensors.Tensor {
		t.Helper()
		var ids, mask []int32
		for i := range want.IDs {
			ids, mask = append(ids, want.IDs[i]...), append(mask, want.Mask[i]...)
		}
		n, tokens := len(want.IDs), len(want.IDs[0])
		out, err := net.Run(enginetest.Backend(), []*tensors.Tensor{tensors.FromFlatDataAndDimensions(ids, n, tokens), tensors.FromFlatDataAndDimensions(mask, n, tokens)}, taps...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	net, err := zoo.ReadBERT("testdata/bert", 6)
	if err != nil {
		t.Fatal(err)
	}
	out := run(net, "blk.1.norm2")
	for i, v := range nn.Float64s(out[0]) {
		if w := want.Embedding[i/8][i%8]; math.Abs(v-w) > 1e-5 {
			t.Fatalf("embedding %d of text %d is %g, want %g", i%8, i/8, v, w)
		}
	}
	for i, v := range nn.Float64s(out[1]) {
		if at := i / 8 % 6; want.Mask[i/48][at] == 1 {
			if w := want.Hidden[i/48][at][i%8]; math.Abs(v-w) > 1e-5*max(1, math.Abs(w)) {
				t.Fatalf("text %d, token %d: hidden[%d] is %g, want %g", i/48, at, i%8, v, w)
			}
		}
	}
	file, err := onnx.Marshal(net, onnx.WriteOptions{})
	if err != nil {
		t.Fatal(err)
	}
	back, err := onnx.Read(file, onnx.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for i, v := range nn.Float64s(run(back)[0]) {
		if w := want.Embedding[i/8][i%8]; math.Abs(v-w) > 1e-5 {
			t.Fatalf("through ONNX: embedding %d of text %d is %g, want %g", i%8, i/8, v, w)
		}
	}
	if net.Meta["name"] != "tiny" {
		t.Errorf("metadata %v", net.Meta)
	}
}

func TestBERTIgnoresPadding(t *testing.T) {
	net, err := zoo.ReadBERT("testdata/bert", 5)
	if err != nil {
		t.Fatal(err)
	}
	run := func(ids ...int32) []float32 {
		out, err := net.Run(enginetest.Backend(), []*tensors.Tensor{tensors.FromFlatDataAndDimensions(ids, 1, 5), tensors.FromFlatDataAndDimensions([]int32{1, 1, 1, 0, 0}, 1, 5)})
		if err != nil {
			t.Fatal(err)
		}
		return nn.Floats(out[0])
	}
	a, b := run(1, 2, 3, 4, 5), run(1, 2, 3, 0, 0)
	length := 0.
	for i := range a {
		length += float64(a[i]) * float64(a[i])
		if math.Abs(float64(a[i]-b[i])) > 1e-6 {
			t.Fatalf("padding changed the embedding: %v, %v", a, b)
		}
	}
	if math.Abs(length-1) > 1e-5 {
		t.Errorf("the embedding's length is %g", length)
	}
}

func TestReadBERTRefuses(t *testing.T) {
	whole, err := safetensors.ReadFile("testdata/bert/model.safetensors")
	if err != nil {
		t.Fatal(err)
	}
	config, err := os.ReadFile("testdata/bert/config.json")
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		config string
		change func(f *safetensors.File)
		want   string
	}{
		"other tensors":  {string(config), func(f *safetensors.File) { f.Tensors = f.Tensors[:0] }, "not those of a BERT"},
		"other model":    {strings.Replace(string(config), `"bert"`, `"gpt2"`, 1), nil, "model_type"},
		"odd heads":      {strings.Replace(string(config), `heads": 2`, `heads": 3`, 1), nil, "num_attention_heads"},
		"no heads":       {strings.Replace(string(config), `heads": 2`, `heads": 0`, 1), nil, "num_attention_heads"},
		"an activation":  {strings.Replace(string(config), `"gelu"`, `"snake"`, 1), nil, "hidden_act"},
		"relative":       {strings.Replace(string(config), `"absolute"`, `"relative_key"`, 1), nil, "position_embedding_type"},
		"eps":            {strings.Replace(string(config), `1e-12`, `-1`, 1), nil, "layer_norm_eps"},
		"broken config":  {"{", nil, "config.json"},
		"missing tensor": {string(config), func(f *safetensors.File) { f.Tensor("encoder.layer.1.attention.self.key.bias").Name = "x" }, "encoder.layer.1.attention.self.key.bias"},
		"small tensor": {string(config), func(f *safetensors.File) {
			*f.Tensor("encoder.layer.1.output.dense.weight") = safetensors.FromFloats("encoder.layer.1.output.dense.weight", []float32{1}, 1, 1)
		}, "want [8 12]"},
	} {
		f := &safetensors.File{}
		f.Tensors = append(f.Tensors, whole.Tensors...)
		if c.change != nil {
			c.change(f)
		}
		dir := t.TempDir()
		if err := safetensors.WriteFile(filepath.Join(dir, "model.safetensors"), f); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(c.config), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := zoo.ReadBERT(dir, 0); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %q", name, err, c.want)
		}
	}
	if _, err := zoo.ReadBERT("testdata/bert", 8); err == nil || !strings.Contains(err.Error(), "7 positions") {
		t.Errorf("too many tokens: %v", err)
	}
	if _, err := zoo.ReadBERT("testdata", 0); err == nil || errors.Is(err, zoo.ErrNotBERT) {
		t.Errorf("no file: %v", err)
	}
	if _, err := zoo.BERT(zoo.BERTOptions{Heads: 5}); err == nil {
		t.Error("5 heads were accepted for width 384")
	}
}

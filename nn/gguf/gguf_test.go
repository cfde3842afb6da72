package gguf_test

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"math"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/gguf"
)

// builder writes a file as the format describes it.
type builder struct{ bytes.Buffer }

func (b *builder) put(v any) *builder { _ = binary.Write(b, binary.LittleEndian, v); return b }
func (b *builder) text(s string) *builder {
	b.put(uint64(len(s))).WriteString(s)
	return b
}

func header(tensors, pairs uint64) *builder {
	b := &builder{}
	b.WriteString("GGUF")
	return b.put(uint32(3)).put(tensors).put(pairs)
}

func one(t gguf.Type, raw []byte, dims ...uint64) []byte {
	b := header(1, 0).text("w").put(uint32(len(dims)))
	for _, d := range dims {
		b.put(d)
	}
	b.put(uint32(t)).put(uint64(0))
	for b.Len()%32 != 0 {
		b.WriteByte(0)
	}
	b.Write(raw)
	return b.Bytes()
}

func read(b []byte) (*gguf.File, error) { return gguf.Read(bytes.NewReader(b), int64(len(b))) }

var types = map[string]gguf.Type{
	"F16": gguf.F16, "BF16": gguf.BF16, "Q4_0": gguf.Q4_0, "Q4_1": gguf.Q4_1, "Q5_0": gguf.Q5_0, "Q5_1": gguf.Q5_1, "Q8_0": gguf.Q8_0,
	"Q2_K": gguf.Q2_K, "Q3_K": gguf.Q3_K, "Q4_K": gguf.Q4_K, "Q5_K": gguf.Q5_K, "Q6_K": gguf.Q6_K,
}

// TestBlocksAreThoseOfTheReference compares with values that the format's own Python package gives for random blocks.
func TestBlocksAreThoseOfTheReference(t *testing.T) {
	raw, err := os.ReadFile("testdata/blocks.json")
	if err != nil {
		t.Fatal(err)
	}
	var cases map[string]struct {
		Raw    string
		Values []float64
	}
	if err := json.Unmarshal(raw, &cases); err != nil {
		t.Fatal(err)
	}
	if len(cases) != len(types) {
		t.Fatalf("%d cases, want %d", len(cases), len(types))
	}
	for name, c := range cases {
		block, err := base64.StdEncoding.DecodeString(c.Raw)
		if err != nil {
			t.Fatal(err)
		}
		f, err := read(one(types[name], block, uint64(len(c.Values))))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		got, err := f.Tensor("w").Floats()
		if err != nil {
			t.Fatal(err)
		}
		for i, v := range got {
			if math.Abs(float64(v)-c.Values[i]) > 1e-6*math.Max(1, math.Abs(c.Values[i])) {
				t.Fatalf("%s: value %d is %v, want %v", name, i, v, c.Values[i])
			}
		}
	}
}

func TestMetadataOfEveryKind(t *testing.T) {
	b := header(0, 6)
	b.text("u8").put(uint32(0)).put(uint8(200))
	b.text("i32").put(uint32(5)).put(int32(-7))
	b.text("f32").put(uint32(6)).put(float32(.5))
	b.text("yes").put(uint32(7)).put(uint8(1))
	b.text("texts").put(uint32(9)).put(uint32(8)).put(uint64(2)).text("a").text("")
	b.text("nested").put(uint32(9)).put(uint32(9)).put(uint64(1)).put(uint32(4)).put(uint64(2)).put(uint32(3)).put(uint32(4))
	f, err := read(b.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	got, err := json.Marshal(f.Meta)
	if err != nil {
		t.Fatal(err)
	}
	if want := `{"f32":0.5,"i32":-7,"nested":[[3,4]],"texts":["a",""],"u8":200,"yes":true}`; string(got) != want {
		t.Errorf("metadata %s, want %s", got, want)
	}
	if strings.Join(f.Keys, " ") != "u8 i32 f32 yes texts nested" {
		t.Errorf("keys in order %v", f.Keys)
	}
}

func TestHostileFilesAreRefused(t *testing.T) {
	good := one(gguf.F32, make([]byte, 24), 3, 2)
	if f, err := read(good); err != nil || len(f.Tensor("w").Shape) != 2 || f.Tensor("w").Shape[0] != 2 {
		t.Fatalf("the good file: %v %v", f, err)
	}
	deep := header(0, 1).text("k").put(uint32(9))
	for range 50 {
		deep.put(uint32(9)).put(uint64(1))
	}
	for name, c := range map[string]struct {
		file []byte
		want string
	}{
		"other magic":        {append([]byte("GGML"), good[4:]...), "not with GGUF"},
		"empty":              {nil, "cut short"},
		"version 1":          {(&builder{}).put([]byte("GGUF")).put(uint32(1)).Bytes(), "version 1"},
		"many tensors":       {header(1<<40, 0).Bytes(), "tensor count"},
		"long key":           {header(0, 1).put(uint64(1 << 40)).Bytes(), "key is a text"},
		"long text":          {header(0, 1).text("k").put(uint32(8)).put(uint64(1 << 25)).Bytes(), "cut short"},
		"long list":          {header(0, 1).text("k").put(uint32(9)).put(uint32(10)).put(uint64(1 << 60)).Bytes(), "list of"},
		"unknown kind":       {header(0, 1).text("k").put(uint32(13)).Bytes(), "kind 13"},
		"deep list":          {deep.Bytes(), "nested"},
		"twice":              {header(0, 2).text("k").put(uint32(0)).put(uint8(1)).text("k").put(uint32(0)).put(uint8(1)).Bytes(), "twice"},
		"alignment":          {header(0, 1).text("general.alignment").put(uint32(4)).put(uint32(0)).Bytes(), "power of two"},
		"huge axis":          {one(gguf.F32, nil, 1<<40), "axis of"},
		"huge product":       {one(gguf.F32, nil, 1<<30, 1<<30, 1<<30), "axis of"},
		"empty axis":         {one(gguf.F32, nil, 0), "axis of 0"},
		"unknown type":       {one(4, nil, 32), "type 4"},
		"broken blocks":      {one(gguf.Q8_0, nil, 33), "whole blocks"},
		"cut tensor":         {good[:len(good)-1], "cut short"},
		"too many axes":      {one(gguf.F32, nil, 1, 1, 1, 1, 1), "5 axes"},
		"claims a gigabyte":  {one(gguf.F32, make([]byte, 4), 1<<28), "cut short"},
		"claims a big block": {one(gguf.Q6_K, make([]byte, 4), 256), "cut short"},
	} {
		if _, err := read(c.file); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, want one with %q", name, err, c.want)
		}
	}
}

func TestReadsALanguageModel(t *testing.T) {
	data.RequireTest(t, "smollm2-135m-instruct")
	path, err := data.Path(t.Context(), "smollm2-135m-instruct", "SmolLM2-135M-Instruct.Q4_1.gguf")
	if err != nil {
		t.Fatal(err)
	}
	f, err := gguf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if len(f.Tensors) != 272 || f.Meta["general.architecture"] != "llama" {
		t.Fatalf("%d tensors of %v", len(f.Tensors), f.Meta["general.architecture"])
	}
	q := f.Tensor("blk.0.attn_q.weight")
	v, err := q.Floats()
	if err != nil || len(v) != 576*576 {
		t.Fatalf("%v: %d values, %v", q, len(v), err)
	}
	var sum float64
	for _, x := range v {
		sum += float64(x) * float64(x)
	}
	if std := math.Sqrt(sum / float64(len(v))); std < .01 || std > 1 {
		t.Errorf("standard deviation %g of a matrix of weights", std)
	}
	if _, err := f.Tensor("token_embd.weight").Floats(); err != nil {
		t.Error(err)
	}
}

func FuzzRead(f *testing.F) {
	f.Add(one(gguf.F32, make([]byte, 24), 3, 2))
	f.Add(one(gguf.Q4_K, make([]byte, 144), 256))
	f.Add(header(0, 1).text("k").put(uint32(9)).put(uint32(8)).put(uint64(1)).text("a").Bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		g, err := read(b)
		if err != nil {
			return
		}
		for _, x := range g.Tensors {
			if v, err := x.Floats(); err == nil && len(v) != x.Elements() {
				t.Errorf("%d values of %d", len(v), x.Elements())
			}
		}
	})
}

// TestDecoderPredictsEnglish: the model must find real text far more likely than the same tokens in another order.
func TestDecoderPredictsEnglish(t *testing.T) {
	if testing.Short() {
		t.Skip("widens 135 million weights")
	}
	data.RequireTest(t, "smollm2-135m-instruct")
	path, err := data.Path(t.Context(), "smollm2-135m-instruct", "SmolLM2-135M-Instruct.Q4_1.gguf")
	if err != nil {
		t.Fatal(err)
	}
	f, err := gguf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	net, err := f.Decoder()
	if err != nil {
		t.Fatal(err)
	}
	if n := net.Params.Count(); n < 134_000_000 || n > 135_000_000 {
		t.Errorf("%d parameters", n)
	}
	// "The capital of France is Paris." in the model's own vocabulary.
	ids := encode(t, f, "The", "Ġcapital", "Ġof", "ĠFrance", "Ġis", "ĠParis", ".")
	n := len(ids)
	for i := range n {
		ids = append(ids, ids[n-1-i])
	}
	out, err := net.Run(enginetest.Backend(), []*tensors.Tensor{tensors.FromFlatDataAndDimensions(ids, 2, n)})
	if err != nil {
		t.Fatal(err)
	}
	nll := func(ids []int32, logits []float32) (sum float64) {
		symbols := len(logits) / n
		for i := 1; i < n; i++ {
			row := logits[(i-1)*symbols : i*symbols]
			top := float64(slices.Max(row))
			z := 0.
			for _, v := range row {
				z += math.Exp(float64(v) - top)
			}
			sum += top + math.Log(z) - float64(row[ids[i]])
		}
		return sum / float64(n-1)
	}
	logits := nn.Floats(out[0])
	straight, reversed := nll(ids[:n], logits[:len(logits)/2]), nll(ids[n:], logits[len(logits)/2:])
	if straight > 3 || reversed < straight+3 {
		t.Errorf("%.2f nats per token straight, %.2f reversed", straight, reversed)
	}
}

// encode looks tokens up in the file's vocabulary.
func encode(t *testing.T, f *gguf.File, tokens ...string) (ids []int32) {
	t.Helper()
	vocabulary, _ := f.Meta["tokenizer.ggml.tokens"].([]string)
	for _, s := range tokens {
		i := slices.Index(vocabulary, s)
		if i < 0 {
			t.Fatalf("no token %q", s)
		}
		ids = append(ids, int32(i))
	}
	return ids
}

// TestTokensAreThoseOfTheReference compares with the tokenizers library on the same vocabulary.
func TestTokensAreThoseOfTheReference(t *testing.T) {
	data.RequireTest(t, "smollm2-135m-instruct")
	raw, err := os.ReadFile("testdata/tokens.json")
	if err != nil {
		t.Fatal(err)
	}
	var cases []struct {
		Text string
		IDs  []int32
	}
	if err := json.Unmarshal(raw, &cases); err != nil {
		t.Fatal(err)
	}
	path, err := data.Path(t.Context(), "smollm2-135m-instruct", "SmolLM2-135M-Instruct.Q4_1.gguf")
	if err != nil {
		t.Fatal(err)
	}
	f, err := gguf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	k, err := f.Tokenizer()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range cases {
		ids, err := k.Encode(c.Text)
		if err != nil {
			t.Errorf("%q: %v", c.Text, err)
			continue
		}
		if !slices.Equal(ids, c.IDs) {
			t.Errorf("%q: %v, want %v", c.Text, ids, c.IDs)
		}
		if back := k.Decode(ids); back != c.Text {
			t.Errorf("%q comes back as %q", c.Text, back)
		}
	}
}

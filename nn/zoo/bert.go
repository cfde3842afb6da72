package zoo

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"

	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/safetensors"
)

// BERTOptions describe an encoder in the form of BERT.
type BERTOptions struct {
	Symbols   int     // size of the vocabulary; 0: 30522
	Positions int     // rows of the table of positions, the longest input; 0: 512
	Types     int     // rows of the table of segments, of which the first is used; 0: 2
	Tokens    int     // length of the inputs, at most Positions: shorter ones are padded; 0: 128
	Dim       int     // width of the stream; 0: 384
	Depth     int     // blocks; 0: 6
	Heads     int     // must divide Dim; 0: 12
	MLP       int     // hidden width of the feed-forward part; 0: 4·Dim
	Eps       float64 // of the layer norms; 0: 1e-12
	Act       nn.Op   `json:",omitempty"` // of the feed-forward part; nil: nn.GELU{}
	Scheme    Scheme  `json:",omitempty"` // where the norm stands; nil: PostNorm{}, as BERT has it
	// Pool gives one vector for a text, the mean over its valid tokens, in place of one for every token; Normalize divides
	// it by its length then, so that products are cosines.
	Pool, Normalize bool
	Std             float64 // of the initial weights; 0: 0.02; below 0: all are 0, to be read from a file
	Seed            uint64
}

func (o BERTOptions) withDefaults() (BERTOptions, error) {
	for _, d := range []struct {
		v   *int
		def int
	}{{&o.Symbols, 30522}, {&o.Positions, 512}, {&o.Types, 2}, {&o.Tokens, 128}, {&o.Dim, 384}, {&o.Depth, 6}, {&o.Heads, 12}, {&o.MLP, 4 * cmp.Or(o.Dim, 384)}} {
		if *d.v == 0 {
			*d.v = d.def
		}
		if *d.v < 1 {
			return o, fmt.Errorf("zoo: bert: a size is %d; want at least 1", *d.v)
		}
	}
	if o.Dim%o.Heads != 0 || o.Tokens > o.Positions {
		return o, fmt.Errorf("zoo: bert: %d heads must divide width %d, and %d tokens need as many of the %d positions", o.Heads, o.Dim, o.Tokens, o.Positions)
	}
	o.Eps, o.Std = cmp.Or(o.Eps, 1e-12), cmp.Or(o.Std, .02)
	if o.Act == nil {
		o.Act = nn.GELU{}
	}
	if o.Scheme == nil {
		o.Scheme = PostNorm{}
	}
	return o, nil
}

// BERT builds a transformer encoder as BERT has it (Devlin et al., arXiv:1810.04805): the sum of token, position and
// segment embeddings, a layer norm, and blocks whose norms stand after the sums:
//
//	x ← LN(x + attention(x)),  x ← LN(x + W₂·gelu(W₁·x))
//
// Inputs are "input_ids" and "attention_mask" [batch, Tokens] int32, the mask 1 where a token is valid: others are seen by
// nobody. The output is "hidden" [batch, Tokens, Dim], or with Pool "embedding" [batch, Dim], as sentence encoders have it
// (Reimers, Gurevych, arXiv:1908.10084). The options' zero value is the architecture of all-MiniLM-L6-v2, 22.6 million
// parameters.
func BERT(o BERTOptions) (*nn.Network, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	init := nn.Normal(o.Std)
	if o.Std < 0 {
		init = nn.Fill(0)
	}
	norm := nn.LayerNorm{Eps: o.Eps}
	dense := func(out int) nn.Dense { return nn.Dense{Out: out, W: nn.Plain{Init: init}} }
	b := nn.NewBuilder(o.Seed)
	ids := b.Input("input_ids", shapes.Make(dtypes.Int32, 1, o.Tokens))
	mask := b.Input("attention_mask", shapes.Make(dtypes.Int32, 1, o.Tokens))
	valid := b.Add("valid", nn.Cast{To: dtypes.Float32}, mask)
	hide := b.Add("hide", nn.Affine{Scale: 1e9, Shift: -1e9}, b.Add("valid.keys", nn.Reshape{Dims: []int{0, 1, 1, o.Tokens}}, valid))

	table := func(name string, rows, to int) string {
		v := b.Add(name, nn.Value{Shape: f32(rows, o.Dim), Init: init}) // the first rows of a table
		return b.Add(name+".used", nn.Slice{Axis: 0, From: 0, To: to}, v)
	}
	x := b.Add("embed", nn.Embedding{N: o.Symbols, Dim: o.Dim, W: nn.Plain{Init: init}}, ids)
	x = b.Add("embed.placed", nn.Add, x, table("pos", o.Positions, o.Tokens))
	x = b.Add("embed.sum", nn.Add, x, table("segment", o.Types, 1))
	x = b.Add("embed.norm", norm, x)
	for i := range o.Depth {
		plan := o.Scheme.Plan(i+1, o.Depth)
		b.In(fmt.Sprintf("blk.%d", i), func() {
			x = Residual(b, plan, norm, 1, x, func(h string) string {
				return Attention(b, "attn", h, AttentionOptions{Heads: o.Heads, Init: init, Mask: hide})
			})
			x = Residual(b, plan, norm, 2, x, func(h string) string {
				return b.Add("fc2", dense(o.Dim), b.Add("act", o.Act, b.Add("fc1", dense(o.MLP), h)))
			})
		})
	}
	if !o.Pool {
		return b.Finish(b.Add("hidden", nn.Unary{Fn: "Identity"}, x))
	}
	weight := b.Add("valid.tokens", nn.Reshape{Dims: []int{0, o.Tokens, 1}}, valid)
	sum := b.Add("pool.sum", nn.Reduce{Fn: "ReduceSum", Axes: []int{1}}, b.Add("pool.valid", nn.Mul, x, weight))
	count := b.Add("pool.count", nn.Clip{Lo: 1e-9, Hi: float64(o.Tokens)}, b.Add("pool.valid.count", nn.Reduce{Fn: "ReduceSum", Axes: []int{1}}, weight))
	if !o.Normalize {
		return b.Finish(b.Add("embedding", nn.Binary{Fn: "Div"}, sum, count))
	}
	mean := b.Add("pool.mean", nn.Binary{Fn: "Div"}, sum, count)
	length := b.Add("pool.length", nn.Reduce{Fn: "ReduceL2", Axes: []int{1}, Keep: true}, mean)
	length = b.Add("pool.length.floor", nn.Affine{Scale: 1, Shift: 1e-12}, length)
	return b.Finish(b.Add("embedding", nn.Binary{Fn: "Div"}, mean, length))
}

// ErrNotBERT says that a safetensors file holds no BERT encoder.
var ErrNotBERT = errors.New("the tensors are not those of a BERT encoder")

// ReadBERT reads an encoder in the layout of Hugging Face's BertModel: path is the safetensors file, or the folder in which
// it is model.safetensors. The file config.json beside it must be there; of modules.json, in which sentence encoders say
// what follows, mean pooling and normalisation are read. Tokens is the length of the inputs; 0: 128, or all positions if
// there are fewer.
//
// All sizes come from tensors that are in the file, so that a small file cannot ask for a large network. The error is
// ErrNotBERT when the file holds something else.
func ReadBERT(path string, tokens int) (*nn.Network, error) {
	if info, err := os.Stat(path); err == nil && info.IsDir() {
		path = filepath.Join(path, "model.safetensors")
	}
	f, err := safetensors.ReadFile(path)
	if err != nil {
		return nil, err
	}
	net, err := readBERT(f, filepath.Dir(path), tokens)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return net, nil
}

// bertConfig is what matters of config.json.
type bertConfig struct {
	Type      string   `json:"model_type"`
	Heads     int      `json:"num_attention_heads"`
	Eps       *float64 `json:"layer_norm_eps"`
	Act       string   `json:"hidden_act"`
	Positions string   `json:"position_embedding_type"`
	Name      string   `json:"_name_or_path"`
}

func readBERT(f *safetensors.File, dir string, tokens int) (*nn.Network, error) {
	prefix := ""
	if f.Tensor("bert.embeddings.word_embeddings.weight") != nil {
		prefix = "bert."
	}
	rows := func(name string) (n, dim int, err error) {
		t := f.Tensor(prefix + name)
		if t == nil || len(t.Shape) != 2 || t.Shape[0] < 1 || t.Shape[1] < 1 {
			return 0, 0, fmt.Errorf("zoo: %w: there is no matrix %q", ErrNotBERT, prefix+name)
		}
		return t.Shape[0], t.Shape[1], nil
	}
	o := BERTOptions{Std: -1}
	var err error
	for _, part := range []struct {
		name string
		n    *int
	}{{"embeddings.word_embeddings.weight", &o.Symbols}, {"embeddings.position_embeddings.weight", &o.Positions}, {"embeddings.token_type_embeddings.weight", &o.Types}, {"encoder.layer.0.intermediate.dense.weight", &o.MLP}} {
		if *part.n, o.Dim, err = rows(part.name); err != nil {
			return nil, err
		}
	}
	for f.Tensor(fmt.Sprintf("%sencoder.layer.%d.output.dense.weight", prefix, o.Depth)) != nil {
		o.Depth++
	}
	var config bertConfig
	if err := readJSON(filepath.Join(dir, "config.json"), &config); err != nil {
		return nil, fmt.Errorf("zoo: bert: the number of heads is in no tensor: %w", err)
	}
	o.Heads = config.Heads
	switch {
	case config.Type != "bert":
		return nil, fmt.Errorf("zoo: config.json: model_type is %q; want \"bert\"", config.Type)
	case o.Heads < 1 || o.Dim%o.Heads != 0:
		return nil, fmt.Errorf("zoo: config.json: num_attention_heads is %d, which does not divide the width %d", o.Heads, o.Dim)
	case config.Positions != "" && config.Positions != "absolute":
		return nil, fmt.Errorf("zoo: config.json: position_embedding_type is %q; only \"absolute\" is supported", config.Positions)
	case o.Depth < 1:
		return nil, fmt.Errorf("zoo: %w: there is no layer", ErrNotBERT)
	}
	if config.Eps != nil {
		if o.Eps = *config.Eps; !(o.Eps > 0 && o.Eps < 1) {
			return nil, fmt.Errorf("zoo: config.json: layer_norm_eps is %g; want more than 0 and less than 1", o.Eps)
		}
	}
	acts := map[string]nn.Op{"": nn.GELU{}, "gelu": nn.GELU{}, "gelu_new": nn.GELU{Tanh: true}, "gelu_pytorch_tanh": nn.GELU{Tanh: true}, "relu": nn.ReLU, "silu": nn.SiLU}
	var ok bool
	if o.Act, ok = acts[config.Act]; !ok {
		return nil, fmt.Errorf("zoo: config.json: hidden_act is %q; want gelu, gelu_new, relu or silu", config.Act)
	}
	var modules []struct{ Type string }
	switch err := readJSON(filepath.Join(dir, "modules.json"), &modules); {
	case err == nil:
		for _, m := range modules {
			o.Pool = o.Pool || strings.HasSuffix(m.Type, ".Pooling")
			o.Normalize = o.Normalize || strings.HasSuffix(m.Type, ".Normalize")
		}
	case !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("zoo: bert: %w", err)
	}
	o.Normalize = o.Normalize && o.Pool
	if tokens < 0 || tokens > o.Positions {
		return nil, fmt.Errorf("zoo: bert: %d tokens; the model has %d positions", tokens, o.Positions)
	}
	o.Tokens = cmp.Or(tokens, min(128, o.Positions))

	// Every weight is looked for, with its shape, before a network of that size is made.
	names := map[string]string{}
	var missing error
	expect := func(ours, theirs string, dims ...int) {
		names[ours] = prefix + theirs
		t := f.Tensor(prefix + theirs)
		switch {
		case missing != nil:
		case t == nil:
			missing = fmt.Errorf("zoo: bert: there is no tensor %q", prefix+theirs)
		case !slices.Equal(t.Shape, dims):
			missing = fmt.Errorf("zoo: bert: tensor %q is %v; want %v", prefix+theirs, t.Shape, dims)
		}
	}
	layer := func(ours, theirs string, dims ...int) {
		expect(ours+".w", theirs+".weight", dims...)
		expect(ours+".b", theirs+".bias", dims[0])
	}
	expect("embed.w", "embeddings.word_embeddings.weight", o.Symbols, o.Dim)
	expect("pos.w", "embeddings.position_embeddings.weight", o.Positions, o.Dim)
	expect("segment.w", "embeddings.token_type_embeddings.weight", o.Types, o.Dim)
	layer("embed.norm", "embeddings.LayerNorm", o.Dim)
	for i := range o.Depth {
		ours, theirs := fmt.Sprintf("blk.%d.", i), fmt.Sprintf("encoder.layer.%d.", i)
		layer(ours+"attn.q", theirs+"attention.self.query", o.Dim, o.Dim)
		layer(ours+"attn.k", theirs+"attention.self.key", o.Dim, o.Dim)
		layer(ours+"attn.v", theirs+"attention.self.value", o.Dim, o.Dim)
		layer(ours+"attn.o", theirs+"attention.output.dense", o.Dim, o.Dim)
		layer(ours+"norm1", theirs+"attention.output.LayerNorm", o.Dim)
		layer(ours+"fc1", theirs+"intermediate.dense", o.MLP, o.Dim)
		layer(ours+"fc2", theirs+"output.dense", o.Dim, o.MLP)
		layer(ours+"norm2", theirs+"output.LayerNorm", o.Dim)
	}
	if missing != nil {
		return nil, missing
	}
	net, err := BERT(o)
	if err != nil {
		return nil, err
	}
	for p := range net.Params.All() {
		v, err := f.Tensor(names[p.Name]).Floats()
		if err != nil {
			return nil, err
		}
		if err := p.SetData(v); err != nil {
			return nil, err
		}
	}
	net.Meta = map[string]string{"name": config.Name}
	return net, nil
}

// readJSON reads a small file.
func readJSON(path string, into any) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() || info.Size() > 1<<20 {
		return fmt.Errorf("%s is no regular file of at most 1 MiB", path)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, into); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

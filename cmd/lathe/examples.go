package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/data/wordpiece"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/safetensors"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// readAnyNetwork is readNetwork that also knows published networks whose files hold tensors alone, given as the
// safetensors file or its folder: BERT encoders (with their config.json) and EfficientNet-Lite0.
func readAnyNetwork(path string, dims map[string][]int, tokens int) (*nn.Network, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	file, dir := path, filepath.Dir(path)
	if info.IsDir() {
		file, dir = filepath.Join(path, "model.safetensors"), path
		if _, err := os.Stat(file); err != nil {
			return nil, fmt.Errorf("%s: the folder holds no model.safetensors; name the model's file", path)
		}
	}
	net, err := readNetwork(file, dims)
	if !errors.Is(err, safetensors.ErrNoGraph) {
		return net, err
	}
	if _, missing := os.Stat(filepath.Join(dir, "config.json")); missing == nil {
		return zoo.ReadBERT(file, tokens)
	}
	lite, wrong := zoo.ReadEfficientNetLite0(file, zoo.EfficientNetLite0Options{})
	if wrong != nil {
		return nil, fmt.Errorf("%w; nor is it a BERT encoder (there is no config.json) or an EfficientNet-Lite0", err)
	}
	lite.Meta = map[string]string{preprocessKey: "mean=0.49803922,std=0.50196078"} // (v - 127)/128
	return lite, nil
}

// exampleSource names cases to run a network on: files, or a data set.
type exampleSource struct {
	model      string // its file or folder, where the tokenizer.json of texts is looked for
	inputs     string // .npy files, a folder of pictures, or a .txt file of one text a line
	data       string // or a data set
	train      bool   // its training part
	preprocess string // how pictures become inputs; "": as the network's metadata say
}

// open finds the cases.
func (f exampleSource) open(ctx context.Context, net *nn.Network) (*cases, error) {
	if f.inputs == "" {
		return openSet(ctx, f.data, f.train, net)
	}
	if strings.EqualFold(filepath.Ext(f.inputs), ".txt") {
		return openTexts(f.inputs, f.model, net)
	}
	spec := f.preprocess
	if spec == "" {
		spec = net.Meta[preprocessKey]
	}
	p, err := parsePreprocessing(spec)
	if err != nil {
		if f.preprocess == "" { // not the user's mistake
			err = fmt.Errorf("%s: metadata %q: %w", f.model, preprocessKey, errors.New(err.Error()))
		}
		return nil, err
	}
	return openCases(f.inputs, net, p)
}

// load reads the first cases (limit below 0: all), their classes if they come with any, and says what they are.
func (f exampleSource) load(ctx context.Context, net *nn.Network, limit int) (x compress.Examples, labels []int, what string, err error) {
	c, err := f.open(ctx, net)
	if err != nil {
		return nil, nil, "", err
	}
	n := c.n
	if limit >= 0 {
		n = min(n, limit)
	}
	if c.classes != nil {
		labels = c.classes[:n]
	}
	if x, err = c.load(data.Range(n)); err != nil {
		return nil, nil, "", err
	}
	kind := ""
	if f.inputs == "" {
		kind = "test "
	}
	return x, labels, fmt.Sprintf("%d %scases of %s", n, kind, c.source), nil
}

// openSet opens a part of a data set with its classes.
func openSet(ctx context.Context, name string, train bool, net *nn.Network) (*cases, error) {
	set, err := loadLabelled(ctx, name, train)
	if err != nil {
		return nil, err
	}
	if len(net.Inputs) != 1 {
		return nil, fmt.Errorf("--data %s is for networks of one input; this one has %d", name, len(net.Inputs))
	}
	in := net.Inputs[0]
	if in.Shape.Rank() == 0 || in.Shape.Size()/max(in.Shape.Dimensions[0], 1) != set.H*set.W*set.C || set.C > 1 {
		return nil, fmt.Errorf("--data %s has pictures of %d×%d×%d; input %q takes %s", name, set.H, set.W, set.C, in.Name, in.Shape)
	}
	c := &cases{source: name, n: set.N, classes: make([]int, set.N)}
	for i := range c.classes {
		c.classes[i] = int(set.Labels[i])
	}
	c.load = func(idx []int) (compress.Examples, error) {
		d := slices.Clone(in.Shape.Dimensions)
		d[0] = len(idx)
		return compress.FloatExamples(set.Floats(idx, nil), d...)
	}
	return c, nil
}

// maxTexts is the greatest size of a file of texts in bytes.
const maxTexts = 256 << 20

// openTexts opens a file of one text a line, for an encoder whose folder has the tokenizer.json of its vocabulary.
func openTexts(path, model string, net *nn.Network) (*cases, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Size() > maxTexts {
		return nil, fmt.Errorf("%s: %d bytes of text; at most %d are read", path, info.Size(), maxTexts)
	}
	dir := model
	if at, err := os.Stat(model); err == nil && !at.IsDir() {
		dir = filepath.Dir(model)
	}
	tok, err := wordpiece.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("%s: texts need the model's tokenizer.json: %w; or give token numbers as .npy, one file for each input", path, err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var lines []string
	for line := range strings.Lines(string(text)) {
		if line = strings.TrimSpace(line); line != "" {
			lines = append(lines, line)
		}
	}
	if len(lines) == 0 {
		return nil, fmt.Errorf("%s: there is no text in it; write one a line", path)
	}
	for _, in := range net.Inputs {
		if s := in.Shape; s.Rank() != 2 || s.Dimensions[1] < 2 || s.DType != dtypes.Int32 && s.DType != dtypes.Int64 {
			return nil, fmt.Errorf("%s: input %q is %s; texts are for inputs of token numbers, [cases, tokens]", path, in.Name, s)
		}
	}
	return &cases{source: path, n: len(lines), load: func(idx []int) (x compress.Examples, err error) {
		for _, in := range net.Inputs {
			length := in.Shape.Dimensions[1]
			var all []int32
			for _, i := range idx {
				row, mask := tok.Encode(lines[i], length)
				switch name := strings.ToLower(in.Name); {
				case strings.Contains(name, "mask"):
					row = mask
				case strings.Contains(name, "type"), strings.Contains(name, "segment"):
					row = make([]int32, length)
				}
				all = append(all, row...)
			}
			if in.Shape.DType == dtypes.Int64 {
				wide := make([]int64, len(all))
				for i, v := range all {
					wide[i] = int64(v)
				}
				x = append(x, tensors.FromFlatDataAndDimensions(wide, len(idx), length))
				continue
			}
			x = append(x, tensors.FromFlatDataAndDimensions(all, len(idx), length))
		}
		return x, nil
	}}, nil
}

// openRandom makes cases of drawn inputs.
func openRandom(net *nn.Network, n int, seed uint64) (*cases, error) {
	x, err := randomExamples(net, n, seed)
	if err != nil {
		return nil, err
	}
	return &cases{source: "random inputs", n: n, held: x.Bytes(), load: x.Pick}, nil
}

// randomExamples draws inputs: normal ones, rows of the table that reads them for integers, and ones elsewhere.
func randomExamples(net *nn.Network, n int, seed uint64) (x compress.Examples, err error) {
	for _, in := range net.Inputs {
		s := in.Shape.Clone()
		if s.Rank() == 0 {
			return nil, fmt.Errorf("input %q has no batch", in.Name)
		}
		s.Dimensions[0] = n
		draw := rng.New(seed, "convert:"+in.Name)
		if s.DType.IsFloat() {
			v := make([]float32, s.Size())
			rng.Normal(draw, v, 1)
			x = append(x, tensors.FromFlatDataAndDimensions(v, s.Dimensions...))
			continue
		}
		t := tensors.FromShape(s)
		if err := fillIntegers(t, tableRows(net, in.Name), draw); err != nil {
			return nil, err
		}
		x = append(x, t)
	}
	return x, nil
}

// tableRows is the number of rows of the table that an input chooses from, 0 when there is none.
func tableRows(net *nn.Network, input string) (rows int) {
	readers, _ := net.Readers(input)
	for _, r := range readers {
		if e, ok := r.Op.(nn.Embedding); ok {
			rows = e.N
		}
	}
	return rows
}

// fillIntegers fills a tensor with numbers below rows, or with ones.
func fillIntegers(t *tensors.Tensor, rows int, draw *rand.Rand) error {
	next := func() int64 {
		if rows > 0 {
			return int64(draw.IntN(rows))
		}
		return 1
	}
	return t.MutableFlatData(func(flat any) {
		switch v := flat.(type) {
		case []int32:
			for i := range v {
				v[i] = int32(next())
			}
		case []int64:
			for i := range v {
				v[i] = next()
			}
		}
	})
}

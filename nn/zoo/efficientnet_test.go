package zoo_test

import (
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/onnx"
	"github.com/lathe-ml/lathe/nn/safetensors"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// efficientNetNames are the tensors that the published file has beside its counters, in the file's names.
func efficientNetNames() (names []string, shape map[string][]int) {
	shape = map[string][]int{}
	add := func(name string, dims ...int) {
		names = append(names, name)
		shape[name] = dims
	}
	norm := func(name string, n int) {
		for _, s := range []string{"weight", "bias", "running_mean", "running_var"} {
			add(name+"."+s, n)
		}
	}
	add("_conv_stem.weight", 32, 3, 3, 3)
	norm("_bn0", 32)
	in, block := 32, 0
	for _, s := range [][3]int{{1, 3, 16}, {2, 3, 24}, {2, 5, 40}, {3, 3, 80}, {3, 5, 112}, {4, 5, 192}, {1, 3, 320}} {
		for range s[0] {
			p, mid := "_blocks."+itoa(block)+".", in
			if block > 0 {
				mid = 6 * in
				add(p+"_expand_conv.weight", mid, in, 1, 1)
				norm(p+"_bn0", mid)
			}
			add(p+"_depthwise_conv.weight", mid, 1, s[1], s[1])
			norm(p+"_bn1", mid)
			add(p+"_project_conv.weight", s[2], mid, 1, 1)
			norm(p+"_bn2", s[2])
			in = s[2]
			block++
		}
	}
	add("_conv_head.weight", 1280, 320, 1, 1)
	norm("_bn1", 1280)
	add("_fc.weight", 1000, 1280)
	add("_fc.bias", 1000)
	return names, shape
}

func itoa(i int) string { b, _ := json.Marshal(i); return string(b) }

// formulaWeights are weights that need no download: smooth functions of the position in the file's tensor. Of prefixes
// given, only the tensors that have one of them.
func formulaWeights(prefixes ...string) *safetensors.File {
	f := &safetensors.File{}
	names, shape := efficientNetNames()
	for _, name := range names {
		if len(prefixes) > 0 && !slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(name, p) }) {
			continue
		}
		n := 1
		for _, d := range shape[name] {
			n *= d
		}
		v := make([]float32, n)
		fan := float64(n / shape[name][0])
		for i := range v {
			x := float64(i)
			switch {
			case strings.HasSuffix(name, "running_var"):
				x = 1 + .5*math.Sin(x)
			case strings.HasSuffix(name, "running_mean"):
				x = .1 * math.Cos(x)
			case strings.Contains(name, "_bn") && strings.HasSuffix(name, "weight"):
				x = 1 + .2*math.Cos(x)
			case strings.HasSuffix(name, "bias"):
				x = .1 * math.Sin(x+1)
			default:
				x = math.Sin(float64(i*i%1013)+x) * math.Sqrt(4/fan)
			}
			v[i] = float32(x)
		}
		f.Tensors = append(f.Tensors, safetensors.FromFloats(name, v, shape[name]...))
	}
	return f
}

func wave(size int) *tensors.Tensor {
	v := make([]float32, size*size*3)
	for i := range v {
		v[i] = float32(math.Sin(float64(i)*.37) * math.Cos(float64(i)*.0011))
	}
	return tensors.FromFlatDataAndDimensions(v, 1, size, size, 3)
}

// TestEfficientNetLite0MatchesReference holds the logits against those of the weights' own implementation (PyPI
// efficientnet-lite-pytorch): with the published weights where they are here, and with weights by formula. 97 pixels
// pad unevenly at every stride.
func TestEfficientNetLite0MatchesReference(t *testing.T) {
	b, err := os.ReadFile("testdata/efficientnet-lite0.json")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Cases []struct {
			Weights             string
			Size                int
			First, Values, Norm json.RawMessage
			Top                 []int
		}
	}
	if err := json.Unmarshal(b, &file); err != nil || len(file.Cases) == 0 {
		t.Fatalf("%d cases, %v", len(file.Cases), err)
	}
	for _, c := range file.Cases {
		t.Run(c.Weights+" "+itoa(c.Size), func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "formula.safetensors")
			if c.Weights == "published" {
				data.RequireTest(t, "efficientnet-lite0")
				path = filepath.Join(data.Dir(), "models", "efficientnet-lite0", "model.safetensors")
				if _, err := os.Stat(path); err != nil {
					t.Skip(err)
				}
			} else if err := safetensors.WriteFile(path, formulaWeights()); err != nil {
				t.Fatal(err)
			}
			net, err := zoo.ReadEfficientNetLite0(path, zoo.EfficientNetLite0Options{Size: c.Size})
			if err != nil {
				t.Fatal(err)
			}
			name := "go"
			if _, err := engine.Choose("native"); err == nil {
				name = "native" // 385 million multiply-adds take seconds on go
			}
			backend, err := engine.Open(name)
			if err != nil {
				t.Fatal(err)
			}
			out, err := net.Run(backend, []*tensors.Tensor{wave(c.Size)})
			if err != nil {
				t.Fatal(err)
			}
			y := nn.Floats(out[0])
			var first, values []float64
			var norm float64
			for raw, into := range map[*json.RawMessage]any{&c.First: &first, &c.Values: &values, &c.Norm: &norm} {
				if err := json.Unmarshal(*raw, into); err != nil {
					t.Fatal(err)
				}
			}
			near := func(what string, got, want float64) {
				if math.Abs(got-want) > 2e-4*math.Max(1, math.Abs(want)) { // 50 layers of float32 sums in another order
					t.Errorf("%s is %v, want %v", what, got, want)
				}
			}
			for i, want := range first {
				near("logit "+itoa(i), float64(y[i]), want)
			}
			for i, k := range c.Top {
				near("logit "+itoa(k), float64(y[k]), values[i])
			}
			sum := 0.
			for _, v := range y {
				sum += float64(v) * float64(v)
			}
			near("norm", math.Sqrt(sum), norm)
		})
	}
}

func TestEfficientNetLite0Counts(t *testing.T) {
	net, err := zoo.EfficientNetLite0(zoo.EfficientNetLite0Options{})
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.Cost(1)
	if err != nil {
		t.Fatal(err)
	}
	norms, state := 0, 0
	for _, x := range net.Nodes {
		if _, ok := x.Op.(nn.BatchNorm); ok {
			norms++
			state += net.Param(x, "mean").Value.Shape().Size() * 2
		}
	}
	if norms != 49 || c.Params-state != 4652008 || c.MACs < 380e6 || c.MACs > 400e6 {
		t.Errorf("%d batch norms, %d trained parameters, %d multiply-adds; want 49, 4652008 and 385 million", norms, c.Params-state, c.MACs)
	}
	if _, err := onnx.Marshal(net, onnx.WriteOptions{}); err != nil {
		t.Error(err)
	}
}

func TestEfficientNetLite0Refuses(t *testing.T) {
	dir := t.TempDir()
	for name, c := range map[string]struct {
		change func(f *safetensors.File)
		o      zoo.EfficientNetLite0Options
		want   string
	}{
		"missing":  {func(f *safetensors.File) { f.Tensors[0].Name = "other" }, zoo.EfficientNetLite0Options{}, `"_conv_stem.weight" is missing`},
		"shape":    {func(f *safetensors.File) { f.Tensor("_bn0.bias").Shape = []int{4, 8} }, zoo.EfficientNetLite0Options{}, `"_bn0.bias" is [4 8], want [32]`},
		"nan":      {func(f *safetensors.File) { copy(f.Tensor("_bn0.bias").Data, "\x00\x00\xc0\x7f") }, zoo.EfficientNetLite0Options{}, "element 0 is NaN"},
		"classes":  {func(*safetensors.File) {}, zoo.EfficientNetLite0Options{Classes: 10}, "it has 1000 classes"},
		"no head":  {func(f *safetensors.File) { f.Tensor("_fc.weight").Name = "x" }, zoo.EfficientNetLite0Options{}, "_fc.weight"},
		"dropout":  {func(*safetensors.File) {}, zoo.EfficientNetLite0Options{Dropout: 1}, "rates in [0, 1)"},
		"drop nan": {func(*safetensors.File) {}, zoo.EfficientNetLite0Options{DropPath: math.NaN()}, "rates in [0, 1)"},
	} {
		f := formulaWeights("_conv_stem.", "_bn0.", "_fc.") // nothing behind these is looked at
		c.change(f)
		path := filepath.Join(dir, name+".safetensors")
		if err := safetensors.WriteFile(path, f); err != nil {
			t.Fatal(err)
		}
		_, err := zoo.ReadEfficientNetLite0(path, c.o)
		if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: error is %v, want one with %q and the file", name, err, c.want)
		}
	}
}

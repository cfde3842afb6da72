package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/safetensors"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// spreadParams moves every parameter away from its initial value.
func spreadParams(t *testing.T, net *nn.Network, err error) *nn.Network {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	for p := range net.Params.All() {
		d, noise := p.Data(), make([]float32, p.Value.Shape().Size())
		rng.Normal(rng.New(1, p.Name), noise, .2)
		for i := range d {
			if d[i] += noise[i]; p.Role == nn.State {
				d[i] = max(d[i], .1)
			}
		}
		if err := p.SetData(d); err != nil {
			t.Fatal(err)
		}
	}
	return net
}

func TestConvert(t *testing.T) {
	dir := t.TempDir()
	save := func(name string, net *nn.Network) string {
		path := filepath.Join(dir, name)
		if err := writeNetwork(path, net, 0); err != nil {
			t.Fatal(err)
		}
		return path
	}
	vit, err := zoo.ViT(zoo.ViTOptions{Size: 14, Dim: 16, Depth: 1, Heads: 2})
	vit = spreadParams(t, vit, err)
	batch, err := zoo.ViT(zoo.ViTOptions{Size: 14, Dim: 16, Depth: 1, Heads: 2, Norm: nn.BatchNorm{}})
	batch = spreadParams(t, batch, err)
	inputs := filepath.Join(dir, "x.npy")
	x := make([]float32, 5*14*14)
	rng.Normal(rng.New(2, "x"), x, 1)
	if err := data.WriteNPYFile(inputs, []int{5, 14, 14, 1}, x); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		norm  string
		model string
		args  []string
		kinds []string // of the norms in the result
	}{
		{"rms", save("vit.safetensors", vit), []string{"--inputs", inputs}, []string{"rmsnorm"}},
		{"crms", save("vit.onnx", vit), []string{"--time", "--rounds", "1", "--batch", "2", "--cases", "3"}, []string{"crmsnorm"}},
		{"fused", save("batch.onnx", batch), nil, nil},
	} {
		for _, ext := range []string{".onnx", ".safetensors"} {
			out := filepath.Join(dir, c.norm+"-out"+ext)
			var stdout, stderr bytes.Buffer
			args := append([]string{"convert", c.model, "--norm", c.norm, "-o", out, "--json", "--backend", "go"}, c.args...)
			if code := run(args, strings.NewReader(""), &stdout, &stderr); code != exitDone {
				t.Fatalf("%v: exit code %d: %s", args, code, stderr.String())
			}
			var r convertReport
			if err := json.Unmarshal(stdout.Bytes(), &r); err != nil {
				t.Fatalf("%v in %s", err, stdout.String())
			}
			if !(r.Equality.Relative < 1e-5) || r.Equality.Top1 != 1 || r.Equality.Cases == 0 || r.Nodes[1] > r.Nodes[0] || (r.Time != nil) != (c.norm == "crms") {
				t.Errorf("%s: %s", c.norm, stdout.String())
			}
			back, err := readNetwork(out, nil)
			if err != nil {
				t.Fatal(err)
			}
			found := map[string]bool{}
			for _, n := range back.Nodes {
				if strings.HasSuffix(n.Op.Kind(), "norm") {
					found[n.Op.Kind()] = true
				}
			}
			for _, k := range c.kinds {
				if !found[k] || len(found) != 1 {
					t.Errorf("%s holds the norms %v, want %v", out, found, c.kinds)
				}
			}
			if len(c.kinds) == 0 && len(found) > 0 {
				t.Errorf("%s holds the norms %v", out, found)
			}
			if back.Meta[convertKey] != c.norm {
				t.Errorf("%s: metadata %v", out, back.Meta)
			}
			stdout.Reset()
			if code := run(append([]string{"convert", c.model, "--norm", c.norm, "-o", out, "--backend", "go"}, c.args...), strings.NewReader(""), &stdout, &stderr); code != exitDone || !strings.Contains(stdout.String(), "outputs differ by") {
				t.Errorf("exit code %d, %s%s", code, stdout.String(), stderr.String())
			}
		}
	}
}

func TestConvertRefusals(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, b []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	post, err := zoo.ViT(zoo.ViTOptions{Size: 14, Dim: 16, Depth: 1, Heads: 2, Scheme: zoo.PostNorm{}})
	post = spreadParams(t, post, err)
	model := filepath.Join(dir, "post.safetensors")
	if err := writeNetwork(model, post, 0); err != nil {
		t.Fatal(err)
	}
	vit, err := zoo.ViT(zoo.ViTOptions{Size: 14, Dim: 16, Depth: 1, Heads: 2})
	vit = spreadParams(t, vit, err)
	pre := filepath.Join(dir, "pre.safetensors")
	if err := writeNetwork(pre, vit, 0); err != nil {
		t.Fatal(err)
	}
	bert := filepath.Join("..", "..", "nn", "zoo", "testdata", "bert")
	tensorsOnly := filepath.Join(dir, "tensors.safetensors")
	if err := safetensors.WriteFile(tensorsOnly, &safetensors.File{Tensors: []safetensors.Tensor{safetensors.FromFloats("w", []float32{1}, 1)}}); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(dir, "out.onnx")
	for _, c := range []struct {
		want string
		code int
		args []string
	}{
		{"needs a model", exitUsage, []string{"--norm", "rms"}},
		{"--norm", exitUsage, []string{pre, "-o", out}},
		{"did you mean", exitUsage, []string{pre, "--norm", "cmrs", "-o", out}},
		{"with -o", exitUsage, []string{pre, "--norm", "rms"}},
		{"-o x.txt", exitUsage, []string{pre, "--norm", "rms", "-o", "x.txt"}},
		{"overwrite", exitUsage, []string{pre, "--norm", "rms", "-o", pre}},
		{"not both", exitUsage, []string{pre, "--norm", "rms", "-o", out, "--data", "digits", "--inputs", "x.npy"}},
		{"--data", exitUsage, []string{pre, "--norm", "rms", "-o", out, "--data", "fashion"}},
		{"--tolerance", exitUsage, []string{pre, "--norm", "rms", "-o", out, "--tolerance", "0"}},
		{"positive", exitUsage, []string{pre, "--norm", "rms", "-o", out, "--batch", "0"}},
		{"no such file", exitFailed, []string{filepath.Join(dir, "missing.onnx"), "--norm", "rms", "-o", out}},
		{"post-norm", exitFailed, []string{model, "--norm", "rms", "-o", out}},
		{`"blk.0.norm1"`, exitFailed, []string{model, "--norm", "crms", "-o", out}},
		{"post-norm", exitFailed, []string{bert, "--norm", "rms", "-o", out, "--tokens", "5"}},
		{`"embed.norm"`, exitFailed, []string{filepath.Join(bert, "model.safetensors"), "--norm", "crms", "-o", out, "--tokens", "5"}},
		{"no norm with running statistics", exitFailed, []string{pre, "--norm", "fused", "-o", out}},
		{"no network", exitFailed, []string{tensorsOnly, "--norm", "rms", "-o", out}},
		{"safetensors", exitFailed, []string{write("bad.safetensors", []byte("\xff\xff\xff\xff\xff\xff\xff\x7f{}")), "--norm", "rms", "-o", out}},
		{"onnx", exitFailed, []string{write("bad.onnx", []byte("\x08\x08\x3a\xff\xff\xff\xff\x0f")), "--norm", "rms", "-o", out}},
		{"--tolerance is 1e-12", exitFailed, []string{pre, "--norm", "rms", "-o", out, "--tolerance", "1e-12"}},
	} {
		var stdout, stderr bytes.Buffer
		args := append([]string{"convert", "--backend", "go"}, c.args...)
		if code := run(args, strings.NewReader(""), &stdout, &stderr); code != c.code || !strings.Contains(stderr.String(), c.want) {
			t.Errorf("%v: exit code %d, %s", c.args, code, stderr.String())
		}
		if _, err := os.Stat(out); err == nil {
			t.Fatalf("%v: %s was written", c.args, out)
		}
	}
}

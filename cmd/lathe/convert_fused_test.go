package main

import (
	"bytes"
	"encoding/json"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/zoo"
)

func TestConvertFusedMergesBatchNorm(t *testing.T) {
	net, err := zoo.ViT(zoo.ViTOptions{Size: 14, Dim: 16, Depth: 1, Heads: 2, Norm: nn.BatchNorm{}, MeanPool: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range net.Nodes {
		if _, ok := x.Op.(nn.BatchNorm); ok {
			if err := net.Param(x, "mean").SetData(slices.Repeat([]float32{.25}, 16)); err != nil {
				t.Fatal(err)
			}
		}
	}
	dir := t.TempDir()
	model := filepath.Join(dir, "vit.safetensors")
	if err := writeNetwork(model, net, 0); err != nil {
		t.Fatal(err)
	}
	for _, out := range []string{"folded.onnx", "folded.safetensors"} {
		out = filepath.Join(dir, out)
		var stdout, stderr bytes.Buffer
		if code := run([]string{"convert", model, "--norm", "fused", "-o", out, "--json", "--backend", "go"}, strings.NewReader(""), &stdout, &stderr); code != exitDone {
			t.Fatalf("exit code %d: %s", code, stderr.String())
		}
		var r convertReport
		if err := json.Unmarshal(stdout.Bytes(), &r); err != nil {
			t.Fatalf("%v in %s", err, stdout.String())
		}
		if !slices.Equal(r.Folded, []string{"blk.0.norm1", "blk.0.norm2", "norm"}) || len(r.Explicit)+len(r.Kept) > 0 || !(r.Equality.Relative < 1e-5) || r.Nodes[1] != r.Nodes[0]-3 {
			t.Errorf("%+v", r)
		}
		back, err := readNetwork(out, nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, x := range back.Nodes {
			if _, ok := x.Op.(nn.BatchNorm); ok {
				t.Errorf("%s still has a norm, %q", out, x.Name)
			}
		}
	}
}

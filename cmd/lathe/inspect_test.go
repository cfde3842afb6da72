package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/nn/onnx"
	"github.com/lathe-ml/lathe/nn/safetensors"
	"github.com/lathe-ml/lathe/nn/zoo"
)

func TestInspectListsWhatAFileHolds(t *testing.T) {
	ownStore(t)
	dir := t.TempDir()
	model, cases := writeViT(t, dir)
	small, ours := filepath.Join(dir, "small.onnx"), filepath.Join(dir, "small.safetensors")
	for _, out := range []string{small, ours} {
		compressJSON(t, model, "--method", "minmax", "--bits", "4", "--exclude", "head", "--calib", cases, "-o", out, "--blame", "off")
	}
	for _, c := range []struct {
		file, quantised, stored string
		bits                    float64 // stored per weight, about
	}{
		{model, "", "FLOAT", 32},
		{small, "QuantizeLinear", "INT4", 4},
		{ours, "uniform, 4 bits", "uniform, 4 bits", 6.3},
	} {
		code, stdout, stderr := lathe(t, "inspect", c.file, "--json")
		if code != 0 {
			t.Fatal(stderr)
		}
		var r inspection
		if err := json.Unmarshal([]byte(stdout), &r); err != nil {
			t.Fatal(err)
		}
		if len(r.Sites) != 14 || r.Problem != "" || r.MACs == 0 || r.Bytes == 0 || len(r.Tensors) < 14 || len(r.Types) == 0 || len(r.Inputs) != 1 {
			t.Errorf("%s: %+v", c.file, r)
		}
		if got := strings.Join(r.Quantised, "; "); c.quantised == "" != (got == "") || !strings.Contains(got, c.quantised) {
			t.Errorf("%s: quantised is %q", c.file, got)
		}
		share, macs := 0., int64(0)
		for _, s := range r.Sites {
			share += s.ByteShare
			macs += s.MACs
			if s.Kind == "dense" && s.Name != "head" && (!strings.HasPrefix(s.Stored, c.stored[:4]) || s.Bits < .7*c.bits || s.Bits > 1.3*c.bits) {
				t.Errorf("%s: %+v, want about %g bits", c.file, s, c.bits)
			}
			if s.Name == "head" && s.Bits != 32 {
				t.Errorf("%s: %+v", c.file, s)
			}
		}
		if share > 1 || share < .3 || macs > r.MACs {
			t.Errorf("%s: sites have %g of the bytes and %d of %d multiply-adds", c.file, share, macs, r.MACs)
		}
	}
	code, stdout, _ := lathe(t, "inspect", small)
	if code != 0 || !strings.Contains(stdout, "blk.1.fc2") || !strings.Contains(stdout, "12 largest of") || !strings.Contains(stdout, "lathe.compress = minmax W4A4") {
		t.Error(code, stdout)
	}
	for _, c := range []struct{ want, file string }{
		{"no such file", filepath.Join(dir, "none.onnx")},
		{".onnx, .safetensors and .gguf", cases},
		{"model.safetensors", dir},
	} {
		if code, _, stderr := lathe(t, "inspect", c.file); code == 0 || !strings.Contains(stderr, c.want) {
			t.Error(c.file, code, stderr)
		}
	}
}

func TestInspectReadsLanguageModels(t *testing.T) {
	data.RequireTest(t, "smollm2-135m-instruct")
	r, err := inspect(filepath.Join(data.Dir(), "models", "smollm2-135m-instruct", "SmolLM2-135M-Instruct.Q4_1.gguf"), nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Tensors) != 272 || len(r.Sites) != 211 || strings.Join(r.Quantised, " ") != "Q4_1 (5 bits a value) Q8_0 (8.5 bits a value)" || r.MACs != 134479872 {
		t.Errorf("%d tensors, %d sites, %q, %d multiply-adds", len(r.Tensors), len(r.Sites), r.Quantised, r.MACs)
	}
}

func TestDiffFindsWhereNetworksPart(t *testing.T) {
	ownStore(t)
	dir := t.TempDir()
	model, cases := writeViT(t, dir)
	small := filepath.Join(dir, "small.onnx")
	compressJSON(t, model, "--method", "minmax", "--bits", "3", "--include", "blk.1.fc1", "--calib", cases, "-o", small, "--blame", "off")
	run := func(args ...string) *difference {
		t.Helper()
		code, stdout, stderr := lathe(t, append([]string{"diff", "--json", "--backend", "go"}, args...)...)
		if code != 0 {
			t.Fatal(code, stderr)
		}
		r := &difference{}
		if err := json.Unmarshal([]byte(stdout), r); err != nil {
			t.Fatal(err)
		}
		return r
	}
	r := run(model, small, "--calib", cases)
	if r.Parts != "blk.1.fc1" || r.Matched != "by name, 1 by order and shape" || len(r.Sites) != 14 || r.Cases != 20 || len(r.OnlyA)+len(r.OnlyB) > 0 || r.Inputs != "20 cases of "+cases {
		t.Errorf("%+v", r)
	}
	for _, s := range r.Sites {
		before := strings.HasPrefix(s.A, "blk.0") || strings.HasPrefix(s.A, "blk.1.attn") || strings.HasPrefix(s.A, "patch")
		if before != (s.Error < 1e-9) || (s.Weight > 0) != (s.A == "blk.1.fc1") {
			t.Errorf("%+v", s)
		}
	}
	if !slices.ContainsFunc(r.Ops, func(o opDifference) bool { return o.Kind == "qdq" && o.A == 0 && o.B == 1 }) {
		t.Errorf("%+v", r.Ops)
	}
	if r := run(model, model); r.Parts != "" || r.MaxDiff != 0 || r.Inputs != "64 random inputs" || r.Quality.Top1 != 1 {
		t.Errorf("%+v", r)
	}

	// The same network under other names, and one of another depth.
	write := func(name string, o zoo.ViTOptions, rename bool) string {
		net, err := zoo.ViT(o)
		if err != nil {
			t.Fatal(err)
		}
		if rename {
			for i, n := range net.Nodes {
				n.Name = fmt.Sprintf("n%d", i)
			}
		}
		path := filepath.Join(dir, name)
		if err := safetensors.WriteNetwork(path, net); err != nil {
			t.Fatal(err)
		}
		return path
	}
	o := zoo.ViTOptions{Size: 8, Patch: 4, Dim: 16, Depth: 2, Heads: 2, Classes: 5, Seed: 1}
	first, renamed := write("first.safetensors", o, false), write("renamed.safetensors", o, true)
	o.Depth = 1
	shallow := write("shallow.safetensors", o, false)
	if r := run(first, renamed); r.Matched != "by order and shape" || len(r.Sites) != 14 || r.Parts != "" || r.MaxDiff > 1e-5 {
		t.Errorf("%+v", r)
	}
	if r := run(first, shallow); len(r.OnlyA) != 6 || r.OnlyA[0] != "blk.1.attn.q" || len(r.OnlyB) != 0 || len(r.Ops) == 0 {
		t.Errorf("%+v", r)
	}
	code, stdout, _ := lathe(t, "diff", first, shallow, "--backend", "go")
	if code != 0 || !strings.Contains(stdout, "only in "+first+": blk.1.attn.q") {
		t.Error(code, stdout)
	}
	o.Size = 12
	larger := write("larger.safetensors", o, false)
	for _, c := range [][]string{
		{"nothing to run both on", first, larger},
		{"diff needs two networks", first},
		{"no such file", first, filepath.Join(dir, "none.onnx")},
		{"must be positive", first, first, "--cases", "0"},
		{"--threshold 0", first, first, "--threshold", "0"},
		{"not both", first, first, "--calib", cases, "--data", "digits"},
	} {
		if code, _, stderr := lathe(t, append([]string{"diff", "--backend", "go"}, c[1:]...)...); code == 0 || !strings.Contains(stderr, c[0]) {
			t.Errorf("%v: %d %s", c[1:], code, stderr)
		}
	}
}

// message is a protobuf message: pairs of field number and value.
func message(pairs ...any) (b []byte) {
	for i := 0; i < len(pairs); i += 2 {
		n := protowire.Number(pairs[i].(int))
		switch v := pairs[i+1].(type) {
		case int:
			b = protowire.AppendVarint(protowire.AppendTag(b, n, protowire.VarintType), uint64(v))
		case string:
			b = protowire.AppendString(protowire.AppendTag(b, n, protowire.BytesType), v)
		case []byte:
			b = protowire.AppendBytes(protowire.AppendTag(b, n, protowire.BytesType), v)
		}
	}
	return b
}

// smallONNX is y = op(x·w), x [N, 3], with the fields of onnx.proto; tensor are w's.
func smallONNX(op string, width any, tensor ...any) []byte {
	input := func(name string, dims ...any) []byte {
		var shape []byte
		for _, d := range dims {
			field := 1
			if _, named := d.(string); named {
				field = 2
			}
			shape = append(shape, message(1, message(field, d))...)
		}
		return message(1, name, 2, message(1, message(1, 1, 2, shape)))
	}
	graph := message(
		1, message(1, "x", 1, "w", 2, "h", 3, "mm", 4, "MatMul"),
		1, message(1, "h", 2, "y", 3, "act", 4, op),
		5, message(append([]any{8, "w"}, tensor...)...),
		11, input("x", "N", width), 12, input("y", "N", 2))
	return message(1, 8, 7, graph, 8, message(1, "", 2, 17))
}

// Files that cannot be read are refused by every verb, with the operator or tensor and a remedy, and nothing is written.
func TestHostileModelsAreRefusedByTheVerbs(t *testing.T) {
	ownStore(t)
	dir := t.TempDir()
	plain := []any{1, 3, 1, 2, 2, 1, 9, make([]byte, 24)}
	cases := filepath.Join(dir, "x.npy")
	if err := data.WriteNPYFile(cases, []int{4, 3}, make([]float32, 12)); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		model     []byte
		want      []string
		inspected bool // inspect lists it all the same, with the reason
	}{
		"sound":            {smallONNX("Relu", 3, plain...), nil, true},
		"unknown operator": {smallONNX("Frobnicate", 3, plain...), []string{`node "act" (Frobnicate)`, "not supported", "export the model"}, true},
		"recurrent":        {smallONNX("LSTM", 3, plain...), []string{"(LSTM)", "unrolled"}, true},
		"control flow":     {smallONNX("Loop", 3, plain...), []string{"(Loop)", "without control flow"}, true},
		"dynamic shape":    {smallONNX("Relu", "width", plain...), []string{`input "x"`, "no fixed size"}, true},
		"external data":    {smallONNX("Relu", 3, 1, 3, 1, 2, 2, 1, 13, message(1, "location", 2, "../secret"), 14, 1), []string{`"w"`, "../secret"}, true},
		"2 GB claim":       {smallONNX("Relu", 3, 1, 1<<29, 1, 1, 2, 1, 9, make([]byte, 24)), []string{`"w"`}, true},
		"no model":         {[]byte("no model at all"), []string{"not an ONNX model"}, false},
		"empty":            {nil, []string{"not an ONNX model"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(dir, strings.ReplaceAll(name, " ", "-")+".onnx")
			if err := os.WriteFile(file, c.model, 0o644); err != nil {
				t.Fatal(err)
			}
			before, err := os.ReadDir(dir)
			if err != nil {
				t.Fatal(err)
			}
			for _, args := range [][]string{
				{"compress", file, "--method", "minmax", "--calib", cases, "-o", filepath.Join(dir, "out.onnx"), "--backend", "go"},
				{"compress", file, "--size", "25%", "--calib", cases, "-o", filepath.Join(dir, "out.onnx"), "--backend", "go"},
				{"compress", file, "--method", "minmax", "--calib", cases, "--dry-run", "--backend", "go"},
				{"diff", file, file, "--backend", "go"},
			} {
				if c.want == nil {
					continue
				}
				code, _, stderr := lathe(t, args...)
				for _, w := range c.want {
					if code != 1 || !strings.Contains(stderr, w) {
						t.Errorf("%v: exit code %d; %q does not say %q", args[0], code, stderr, w)
					}
				}
			}
			code, stdout, stderr := lathe(t, "inspect", file, "--json")
			var r inspection
			switch {
			case !c.inspected:
				if code != 1 || !strings.Contains(stderr, c.want[0]) {
					t.Error(code, stderr)
				}
			case code != 0 || json.Unmarshal([]byte(stdout), &r) != nil || len(r.Tensors) != 1 || r.Operators["MatMul"] != 1:
				t.Error(code, stdout, stderr)
			default:
				for _, w := range c.want {
					if !strings.Contains(r.Problem, w) {
						t.Errorf("inspect: %q does not say %q", r.Problem, w)
					}
				}
				if c.want == nil && (r.Problem != "" || len(r.Sites) != 1) {
					t.Errorf("%+v", r)
				}
			}
			after, err := os.ReadDir(dir)
			if err != nil || len(after) != len(before) {
				t.Errorf("%d files, were %d: %v", len(after), len(before), err)
			}
		})
	}
	if _, err := onnx.Summarize(smallONNX("Relu", 3, 1, 3, 1, 2, 2, 1, 13, message(1, "location", 2, "w.bin"), 14, 1)); err != nil {
		t.Error(err)
	}
}

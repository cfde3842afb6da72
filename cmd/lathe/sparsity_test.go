package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// runSparsity runs the verb alone.
func runSparsity(t *testing.T, asJSON bool, args ...string) (stdout string, err error) {
	t.Helper()
	var out, errs bytes.Buffer
	a := &app{stdin: strings.NewReader(""), stdout: &out, stderr: &errs, args: append([]string{"sparsity"}, args...), json: asJSON, backendName: "go"}
	cmd := newSparsityCommand(a)
	cmd.SetArgs(args)
	cmd.SetOut(&out)
	cmd.SetErr(&errs)
	cmd.SilenceUsage, cmd.SilenceErrors = true, true
	err = cmd.Execute()
	return out.String(), err
}

func TestSparsityMeasuresAndLimits(t *testing.T) {
	dir := t.TempDir()
	_, cases := writeViT(t, dir)
	for _, act := range []nn.Op{nn.ReLU, nn.GELU{}} {
		net, err := zoo.ViT(zoo.ViTOptions{Size: 8, Patch: 4, Dim: 16, Depth: 2, Heads: 2, MLP: 40, Classes: 5, Act: act, Seed: 1})
		if err != nil {
			t.Fatal(err)
		}
		for _, model := range []string{"net.onnx", "net.safetensors"} {
			model = filepath.Join(dir, model)
			if err := writeNetwork(model, net, 0); err != nil {
				t.Fatal(err)
			}
			page := filepath.Join(dir, "page.html")
			out, err := runSparsity(t, true, model, "--inputs", cases, "--keep", "4,40", "--batch", "8", "--report", page)
			if err != nil {
				t.Fatal(err)
			}
			var r sparsityReport
			if err := json.Unmarshal([]byte(out), &r); err != nil {
				t.Fatalf("%v in %s", err, out)
			}
			if r.Cases != 20 || len(r.Layers) != 2 || len(r.Keep) != 2 || r.Keep[0].K != 40 {
				t.Fatalf("%+v", r)
			}
			l := r.Layers[0]
			// 5 tokens (4 patches and the class token) of 40·16 multiply-adds
			if l.Width != 40 || l.Tokens != 100 || l.MACs != 5*40*16 || l.NonZero <= .2 || l.NonZero > 1 || len(l.Rates) != 40 {
				t.Errorf("%s: %+v", model, l)
			}
			if all := r.Keep[0]; all.Agreement.Top1 != 1 || all.Agreement.MSE > 1e-12 {
				t.Errorf("%s: keeping all changes the outputs: %+v", model, all)
			}
			if few := r.Keep[1]; few.Saved < r.Skipped || few.Agreement.MSE == 0 {
				t.Errorf("%s: keeping 4 of 40: %+v", model, few)
			}
			exact := act == nn.Op(nn.ReLU)
			if l.Exact != exact || (r.Skipped > 0) != exact || (len(r.Notes) > 1) == exact {
				t.Errorf("%s: %+v, notes %q", model, l, r.Notes)
			}
			if b, err := os.ReadFile(page); err != nil || !bytes.Contains(b, []byte("blk.0.act")) && !bytes.Contains(b, []byte("Layers")) {
				t.Errorf("report: %v", err)
			}
		}
		text, err := runSparsity(t, false, filepath.Join(dir, "net.safetensors"), "--inputs", cases)
		if err != nil || !strings.Contains(text, "blk.1.act") || !strings.Contains(text, "Keeping the largest") {
			t.Errorf("%v: %s", err, text)
		}
	}
}

func TestSparsityLeavesPaddingOut(t *testing.T) {
	const tokens, cases = 6, 4
	net, err := zoo.BERT(zoo.BERTOptions{Symbols: 20, Positions: 8, Tokens: tokens, Dim: 8, Depth: 1, Heads: 2, MLP: 12})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	model := filepath.Join(dir, "bert.safetensors")
	if err := writeNetwork(model, net, 0); err != nil {
		t.Fatal(err)
	}
	var files []string
	for _, in := range net.Inputs {
		v := make([]int32, cases*tokens)
		for i := range v {
			v[i] = int32(i % 2) // every second token is padding
		}
		files = append(files, filepath.Join(dir, in.Name+".npy"))
		if err := data.WriteNPYFile(files[len(files)-1], []int{cases, tokens}, v); err != nil {
			t.Fatal(err)
		}
	}
	for mask, want := range map[string]int64{"attention_mask": cases * tokens / 2, "none": cases * tokens} {
		out, err := runSparsity(t, true, model, "--inputs", strings.Join(files, ","), "--keep", "3", "--mask", mask)
		if err != nil {
			t.Fatal(err)
		}
		var r sparsityReport
		if err := json.Unmarshal([]byte(out), &r); err != nil || r.Layers[0].Tokens != want {
			t.Errorf("--mask %s: %v, %+v", mask, err, r.Layers)
		}
	}
}

func TestSparsityWritesTheLimitedNetwork(t *testing.T) {
	dir := t.TempDir()
	model, cases := writeViT(t, dir)
	out := filepath.Join(dir, "limited.onnx")
	if _, err := runSparsity(t, true, model, "--inputs", cases, "--keep", "3", "-o", out); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(out); err != nil || !bytes.Contains(b, []byte("TopK")) {
		t.Errorf("no TopK in what was written (%v)", err)
	}
}

func TestSparsityRefusals(t *testing.T) {
	dir := t.TempDir()
	model, cases := writeViT(t, dir)
	net, err := zoo.MLP(zoo.MLPOptions{Inputs: 4, Hidden: []int{}})
	if err != nil {
		t.Fatal(err)
	}
	linear := filepath.Join(dir, "linear.safetensors")
	if err := writeNetwork(linear, net, 0); err != nil {
		t.Fatal(err)
	}
	for want, args := range map[string][]string{
		"needs a model":      {"--inputs", cases},
		"say what to":        {model},
		"not both":           {model, "--inputs", cases, "--data", "mnist"},
		"mnist":              {model, "--data", "mnis"},
		"keeps at least 1":   {model, "--inputs", cases, "--keep", "0"},
		"one --keep":         {model, "--inputs", cases, "-o", "x.onnx"},
		"overwrite":          {model, "--inputs", cases, "--keep", "2", "-o", model},
		"written as":         {model, "--inputs", cases, "--keep", "2", "-o", "x.txt"},
		"--batch 0":          {model, "--inputs", cases, "--batch", "0"},
		"--cases 0":          {model, "--inputs", cases, "--cases", "0"},
		"no such file":       {filepath.Join(dir, "missing.onnx"), "--inputs", cases},
		"no dense layer":     {linear, "--inputs", cases},
		"want a folder of p": {model, "--inputs", model},
	} {
		if _, err := runSparsity(t, false, args...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v, want it to say %q", args, err, want)
		}
	}
}

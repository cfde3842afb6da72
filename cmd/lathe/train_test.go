package main

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/design/norm"
	"github.com/lathe-ml/lathe/nn"
)

func TestTrainWithAdaptiveBatches(t *testing.T) {
	data.RequireTest(t, "digits")
	ownStore(t)
	dir := t.TempDir()
	for _, args := range []string{
		"--arch mlp --optimizer adadagradnorm --epochs 2",
		"--arch mlp --optimizer adadagrad --batch-test coordinate --epochs 1 --schedule cosine --max-batch 64",
		"--arch mlp --optimizer adadagrad --eta 0.25 --steps 6 --batch 8",
		"--arch resnet8 --optimizer adadagrad --groups 8 --epochs 1", // batch norm, per micro-batch
	} {
		out := filepath.Join(dir, "a.safetensors")
		code, stdout, stderr := lathe(t, append([]string{"train", "--backend", "go", "--data", "digits", "--json", "-o", out}, strings.Fields(args)...)...)
		var r trainResult
		if err := json.Unmarshal([]byte(stdout), &r); code != 0 || err != nil {
			t.Fatalf("%s: exit code %d, %v: %s", args, code, err, stderr)
		}
		a := r.Adaptive
		if a == nil || a.Tests == 0 || a.FinalBatch <= a.FirstBatch || a.FinalBatch > r.Config.MaxBatch || a.MeanBatch < float64(a.FirstBatch) || a.MeanBatch > float64(a.FinalBatch) {
			t.Fatalf("%s: %+v", args, a)
		}
		if r.Config.Steps > 0 && a.Steps != r.Config.Steps || r.Config.Epochs > 0 && float64(a.Samples) < r.Config.Epochs*1198 {
			t.Errorf("%s: %d steps, %d examples", args, a.Steps, a.Samples)
		}
		if r.Config.Decay != 0 || r.Config.LR < .05 {
			t.Errorf("%s: rate %g and decay %g are not the optimiser's", args, r.Config.LR, r.Config.Decay)
		}
	}
	for args, want := range map[string]string{
		"--arch resnet8 --optimizer adadagrad":                 "--groups 8",
		"--optimizer adadagrad --eta 0":                        "--eta 0",
		"--optimizer adadagrad --eta nan":                      "--eta NaN",
		"--optimizer adadagrad --batch-test norn":              `did you mean "norm"?`,
		"--optimizer adadagrad --batch 1":                      "--batch 1",
		"--optimizer adadagrad --batch 64 --max-batch 32":      "--max-batch 32",
		"--optimizer adadagrad --max-batch 5000":               "1198 training examples",
		"--optimizer adadagrad --groups 1":                     "--groups 1",
		"--optimizer sgd --eta 0.3":                            "--eta goes with",
		"--optimizer adadagrda":                                `did you mean "adadagrad"?`,
		"--arch mlp --norm batch --optimizer adadagradnorm":    "statistics of the batch",
		"--arch mlp --norm warp --optimizer adadagradnorm":     "--norm",
		"--optimizer adadagrad --max-batch 100 --schedule cos": "--schedule",
		"--arch vit --scheme prae":                             "there is no scheme",
		"--arch mlp --scheme pre":                              "only --arch vit",
	} {
		code, stdout, stderr := lathe(t, append([]string{"train", "--backend", "go", "--data", "digits", "-o", filepath.Join(dir, "b.onnx")}, strings.Fields(args)...)...)
		if code != 2 || stdout != "" || !strings.Contains(stderr, want) {
			t.Errorf("%s: exit code %d, %q, want %q", args, code, stderr, want)
		}
	}
}

func TestEveryNormOfTheFamilyFitsTheNetworks(t *testing.T) {
	for _, arch := range []string{"mlp", "vit", "resnet8"} {
		for _, name := range norm.Names() {
			c := trainConfig{Arch: arch, Norm: name, Shape: [3]int{28, 28, 1}, Classes: make([]string, 10)}
			net, err := c.build()
			if err != nil {
				t.Logf("--arch %s --norm %s: %v", arch, name, err) // a norm may want an axis that an architecture lacks
				continue
			}
			if _, err := net.Shapes(4); err != nil {
				t.Errorf("--arch %s --norm %s: %v", arch, name, err)
			}
			for _, n := range net.Nodes {
				if _, empty := n.Op.(norm.None); empty {
					t.Errorf("--arch %s --norm %s leaves an empty norm at %q", arch, name, n.Name)
				}
			}
			if name == "none" {
				for _, n := range net.Nodes {
					if _, ok := n.Op.(nn.LayerNorm); ok {
						t.Errorf("--arch %s --norm none has a norm at %q", arch, n.Name)
					}
				}
			}
		}
	}
}

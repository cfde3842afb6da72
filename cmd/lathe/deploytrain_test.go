package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	tinytrain "github.com/lathe-ml/lathe/compress/tiny"
	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/nn/onnx"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// writeResNet writes a small residual network as ONNX, and 60 labelled inputs of three classes that it can tell apart.
func writeResNet(t *testing.T, dir string) (model, cases, labels string) {
	t.Helper()
	net, err := zoo.ResNet(zoo.ResNetOptions{Size: 8, Width: 4, Classes: 5, Seed: 1})
	if err != nil {
		t.Fatal(err)
	}
	model, cases, labels = filepath.Join(dir, "resnet.onnx"), filepath.Join(dir, "cases.npy"), filepath.Join(dir, "labels.csv")
	if err := onnx.WriteFile(model, net, onnx.WriteOptions{}); err != nil {
		t.Fatal(err)
	}
	r := rng.New(1, "cases")
	x := make([]float32, 60*64)
	var csv strings.Builder
	for i := range 60 {
		class := i % 3
		fmt.Fprintf(&csv, "%d,%d\n", i, class)
		for k := range 64 {
			x[i*64+k] = float32(.3 * r.NormFloat64())
			if k/8%3 == class {
				x[i*64+k] += 1
			}
		}
	}
	if err := data.WriteNPYFile(cases, []int{60, 8, 8, 1}, x); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(labels, []byte(csv.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	return model, cases, labels
}

func TestDeployTrainAdaptsWithinItsBudget(t *testing.T) {
	dir := t.TempDir()
	model, cases, labels := writeResNet(t, dir)
	out, plan := filepath.Join(dir, "adapted.onnx"), filepath.Join(dir, "plan.json")
	args := []string{"deploy-train", model, "--inputs", cases, "--labels", labels, "--memory", "12KB", "--epochs", "8", "--lr", "0.05", "--json"}
	var dry, r deployTrainResult
	code, stdout, _ := lathe(t, append(args, "--dry-run", "--plan", plan)...)
	if code != 0 {
		t.Fatalf("exit code %d: %s", code, stdout)
	}
	if err := json.Unmarshal([]byte(stdout), &dry); err != nil {
		t.Fatal(err)
	}
	if dry.Plan.Peak > 12_000 || dry.Plan.Peak < dry.Plan.Inference || dry.Steps != 8*48 || !(dry.Estimate > 0) || dry.After != nil || !dry.Quantised {
		t.Errorf("plan %+v of %+v", dry.Plan, dry)
	}
	code, stdout, stderr := lathe(t, append(args, "-o", out)...)
	if code != 0 {
		t.Fatalf("exit code %d: %s", code, stderr)
	}
	if err := json.Unmarshal([]byte(stdout), &r); err != nil {
		t.Fatal(err)
	}
	if r.After == nil || *r.After < .6 || r.Losses[7] >= r.Losses[0] {
		t.Errorf("accuracy %v, losses %v", r.After, r.Losses)
	}
	// what was written is a QDQ network of three classes, which can be trained on, with the scheme of the plan
	net, err := onnx.ReadFile(out, onnx.Options{})
	if err != nil {
		t.Fatal(err)
	}
	sh, err := net.Shapes(1)
	if err != nil {
		t.Fatal(err)
	}
	if d := sh[net.Outputs[0]].Dimensions; d[1] != 3 {
		t.Errorf("the written network gives %v", d)
	}
	code, stdout, stderr = lathe(t, "deploy-train", out, "--inputs", cases, "--labels", labels, "--memory", "12KB", "--scheme", plan, "--dry-run", "--json")
	if code != 0 {
		t.Fatalf("exit code %d: %s", code, stderr)
	}
	var again deployTrainResult
	if err := json.Unmarshal([]byte(stdout), &again); err != nil {
		t.Fatal(err)
	}
	if again.Quantised || fmt.Sprint(again.Plan.Scheme) != fmt.Sprint(dry.Plan.Scheme) || again.Before == nil || *again.Before < *r.After-.1 {
		t.Errorf("the written network: %+v, plan %+v", again, again.Plan.Scheme)
	}
	for _, more := range [][]string{{"--scheme", "last:2"}, {"--scheme", "classifier", "--classifier", "new"}, {"--scheme", "measured", "--memory", "20KB", "--in-place"}} {
		if code, _, stderr := lathe(t, append([]string{"deploy-train", model, "--inputs", cases, "--labels", labels, "--memory", "40KB", "--dry-run"}, more...)...); code != 0 {
			t.Errorf("%v: exit code %d: %s", more, code, stderr)
		}
	}
}

func TestDeployTrainRefuses(t *testing.T) {
	dir := t.TempDir()
	model, cases, labels := writeResNet(t, dir)
	vit, _ := writeViT(t, dir)
	bad := filepath.Join(dir, "bad.json")
	if err := os.WriteFile(bad, []byte(`{"biases": 2, "weights": {"0": 1}}`), 0o644); err != nil {
		t.Fatal(err)
	}
	from := []string{"--inputs", cases, "--labels", labels}
	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{model, "--dry-run"}, exitUsage, "--data"},
		{[]string{model, "--inputs", cases, "--dry-run"}, exitUsage, "--labels"},
		{[]string{model, "--data", "fashion", "--dry-run"}, exitUsage, "fashion-mnist"},
		{append([]string{model}, from...), exitUsage, "-o"},
		{append([]string{model, "--dry-run", "--memory", "lots"}, from...), exitUsage, "--memory"},
		{append([]string{model, "--dry-run", "--scheme", "last"}, from...), exitUsage, "last:6"},
		{append([]string{model, "--dry-run", "--scheme", "some"}, from...), exitUsage, "accepted"},
		{append([]string{model, "--dry-run", "--scheme", "last:99"}, from...), exitUsage, "layers"},
		{append([]string{model, "--dry-run", "--scheme", bad}, from...), exitFailed, "not among the last 2"},
		{append([]string{model, "--dry-run", "--held", "1"}, from...), exitUsage, "--held"},
		{append([]string{model, "-o", model}, from...), exitUsage, "overwrite"},
		{append([]string{model, "--dry-run", "--memory", "100B"}, from...), exitFailed, "the classifier alone takes"},
		{append([]string{model, "--dry-run", "--memory", "10KB", "--scheme", "full"}, from...), exitFailed, "the scheme takes"},
		{append([]string{vit, "--dry-run"}, from...), exitFailed, tinytrain.ErrUnsupported.Error()},
	} {
		code, stdout, stderr := lathe(t, append([]string{"deploy-train"}, c.args...)...)
		if code != c.code || !strings.Contains(stderr, c.want) {
			t.Errorf("%v: exit code %d, %q; want %d and %q (%s)", c.args, code, stderr, c.code, c.want, stdout)
		}
	}
}

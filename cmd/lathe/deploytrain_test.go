package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/lathe-ml/lathe/compress"
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

// patience ends after so many looks at Err.
type patience struct {
	context.Context
	left int
}

func (p *patience) Err() error {
	if p.left--; p.left < 0 {
		return context.Canceled
	}
	return p.Context.Err()
}

// A training that is stopped again and again ends with the file of an undisturbed one, and leaves no journal.
func TestAStoppedTinyTrainingGoesOn(t *testing.T) {
	ownStore(t)
	dir := t.TempDir()
	model, cases, labels := writeResNet(t, dir)
	kept := func() int {
		found, err := filepath.Glob(filepath.Join(os.Getenv("LATHE_HOME"), "deploy-train", "*"))
		if err != nil {
			t.Fatal(err)
		}
		return len(found)
	}
	looks := map[string]int{"auto": 340, "measured": 900} // what comes before the training takes most of them
	for name, f := range map[string]deployTrainFlags{
		"auto":     {scheme: "auto", inPlace: true},
		"measured": {scheme: "measured"},
	} {
		f.inputs, f.labels, f.cases, f.calibCases, f.held, f.epochs, f.lr, f.accumulate, f.memory = cases, labels, -1, 64, .2, 4, .05, 1, "20KB"
		start := func(ctx context.Context, output string, change func(f *deployTrainFlags)) (*deployTrainResult, string, error) {
			f, stderr := f, &bytes.Buffer{}
			f.output = output
			if change != nil {
				change(&f)
			}
			r, err := deployTrain(ctx, &app{stdout: &bytes.Buffer{}, stderr: stderr, backendName: "go"}, model, f, 20_000)
			return r, stderr.String(), err
		}
		plain, out := filepath.Join(dir, name+"-plain.onnx"), filepath.Join(dir, name+".onnx")
		want, _, err := start(t.Context(), plain, nil)
		if err != nil {
			t.Fatal(name, err)
		}
		if kept() != 0 {
			t.Errorf("%s: a journal is left", name)
		}
		stops := 0
		for {
			r, stderr, err := start(&patience{t.Context(), looks[name]}, out, nil)
			if going := strings.Contains(stderr, "going on where an earlier run stopped"); going != (stops > 0) {
				t.Errorf("%s: after %d stops it says %q", name, stops, stderr)
			}
			if err == nil {
				if fmt.Sprint(r.Losses) != fmt.Sprint(want.Losses) || *r.After != *want.After || r.Loss != want.Loss || fmt.Sprint(r.Plan) != fmt.Sprint(want.Plan) {
					t.Errorf("%s: scheme %v, losses %v, accuracy %g; undisturbed %v, %v, %g", name, r.Plan.Scheme, r.Losses, *r.After, want.Plan.Scheme, want.Losses, *want.After)
				}
				break
			}
			if _, missing := os.Stat(out); !errors.Is(err, context.Canceled) || missing == nil || kept() != 1 {
				t.Fatalf("%s: stopped: %v, %d journals", name, err, kept())
			}
			if stops++; stops > 50 {
				t.Fatal(name, "it never ends")
			}
			if stops == 1 { // a run with other settings, examples or another model does not take it over
				for what, change := range map[string]func(f *deployTrainFlags){
					"rate":   func(f *deployTrainFlags) { f.lr = .04 },
					"seed":   func(f *deployTrainFlags) { f.seed = 1 },
					"memory": func(f *deployTrainFlags) { f.memory = "20000B" },
				} {
					if _, stderr, err := start(t.Context(), filepath.Join(dir, "other.onnx"), change); err != nil || strings.Contains(stderr, "going on") || kept() != 1 {
						t.Errorf("%s: another %s: %v, %q, %d journals", name, what, err, stderr, kept())
					}
				}
			}
		}
		if stops < 3 || kept() != 0 {
			t.Errorf("%s: stopped %d times; %d journals are left", name, stops, kept())
		}
		a, errA := os.ReadFile(plain)
		b, errB := os.ReadFile(out)
		if errA != nil || errB != nil || !bytes.Equal(a, b) {
			t.Errorf("%s: the file differs from that of an undisturbed run", name)
		}
	}
	if code, _, stderr := lathe(t, "deploy-train", model, "--inputs", cases, "--labels", labels, "--memory", "10KB", "--scheme", "full", "--dry-run"); code != exitFailed || kept() != 0 {
		t.Errorf("a scheme that does not fit: exit code %d, %d journals, %s", code, kept(), stderr)
	}
}

// The keys of examples that differ differ.
func TestDeployTrainKeysItsInputs(t *testing.T) {
	dir := t.TempDir()
	model, _, _ := writeResNet(t, dir)
	scheme := filepath.Join(dir, "scheme.json")
	write := func(text string) {
		if err := os.WriteFile(scheme, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write(`{"biases": 1}`)
	x, err := compress.FloatExamples(make([]float32, 64), 1, 8, 8, 1)
	if err != nil {
		t.Fatal(err)
	}
	y := make([]float32, 64)
	y[63] = 1
	z, err := compress.FloatExamples(y, 1, 8, 8, 1)
	if err != nil {
		t.Fatal(err)
	}
	b, err := (&app{backendName: "go"}).backend()
	if err != nil {
		t.Fatal(err)
	}
	keys := map[string]string{}
	add := func(what string, f deployTrainFlags, x compress.Examples, labels ...int) {
		key, err := f.key(model, b, x, labels)
		if err != nil {
			t.Fatal(err)
		}
		if was, ok := keys[key]; ok {
			t.Errorf("%s has the key of %s", what, was)
		}
		keys[key] = what
	}
	f := deployTrainFlags{scheme: scheme, epochs: 2}
	add("the run", f, x, 1)
	add("another example", f, z, 1)
	add("another class", f, x, 2)
	write(`{"biases": 2}`)
	add("another scheme in the file", f, x, 1)
	f.epochs = 3
	add("more epochs", f, x, 1)
	f.dryRun = true
	add("a dry run", f, x, 1)
	other := f
	other.output, other.planFile, other.opset = "elsewhere.onnx", "plan.json", 17
	a, errA := f.key(model, b, x, []int{1})
	c, errB := other.key(model, b, x, []int{1})
	if errA != nil || errB != nil || a != c {
		t.Errorf("where the result goes changes the key: %v %v", errA, errB)
	}
}

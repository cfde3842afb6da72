package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"image"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/lab"
	"github.com/lathe-ml/lathe/lab/exp"
)

// lathe runs the command line in a store of its own and returns what it prints.
func lathe(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = run(args, strings.NewReader(""), &out, &errs)
	return code, out.String(), errs.String()
}

func ownStore(t *testing.T) {
	t.Helper()
	t.Setenv("LATHE_HOME", t.TempDir())
}

func TestExitCodesAndSuggestions(t *testing.T) {
	ownStore(t)
	for _, c := range []struct {
		args string
		code int
		want string // in stdout for code 0, in stderr otherwise
	}{
		{"", 0, "lathe [command]"},
		{"--help", 0, "Exit codes: 0 done, 1 failed, 2 wrong use"},
		{"try --help", 0, "lathe try repq-vit --scale smoke"},
		{"version", 0, "lathe devel"},
		{"methods", 0, "layernorm"},
		{"methods --family norm", 0, "Layer Normalization"},
		{"show layernorm", 0, "What was measured"},
		{"show 42", 0, "1607.06450"},
		{"doctor", 0, "Backends, best first"},
		{"doctor --backend go", 0, "Chosen: go"},
		{"runs", 0, "no runs in"},
		{"runs check", 0, "is whole"},
		{"data list", 0, "fashion-mnist"},
		{"completion bash", 0, "__start_lathe"},
		{"help try", 0, "Usage:"},

		{"metods", 2, `did you mean "lathe methods"?`},
		{"tyr layernorm", 2, `did you mean "lathe try"?`},
		{"xyzzy", 2, `"lathe --help" lists`},
		{"xyzzy --flag", 2, `no command "lathe xyzzy"`},
		{"--jsn", 2, "did you mean --json?"},
		{"try layernorm --scael smoke", 2, "did you mean --scale?"},
		{"try layernrom", 2, `did you mean "layernorm"?`},
		{"try layernorm sfot-nms --scale smoke", 2, `no method "sfot-nms"`},
		{"try", 2, "needs at least one method"},
		{"try layernorm --scale medium", 2, "accepted: smoke"},
		{"try layernorm --seeds -1", 2, "--seeds -1"},
		{"try layernorm --seeds x", 2, "invalid argument"},
		{"try layernorm --fresh --reuse", 2, "exclude each other"},
		{"try layernorm --scale smoke --results x", 2, "keeps only full runs"},
		{"try layernorm --backend cuda", 1, `no backend "cuda"`},
		{"show", 2, "needs a method"},
		{"show a b", 2, "takes only a method"},
		{"show layernrm", 2, `did you mean "layernorm"?`},
		{"methods extra", 2, "takes no arguments"},
		{"methods --family nrom", 2, `did you mean "norm"?`},
		{"runs 99", 1, "there is no run 99"},
		{"runs rmm", 2, `did you mean "lathe runs rm"?`},
		{"runs rm", 2, "needs at least one run ID"},
		{"runs rm x", 2, "no run ID"},
		{"runs rm 99", 1, "there is no run 99"},
		{"runs 1 2", 2, "one run at a time"},
		{"runs --report x.html", 2, "needs the ID"},
		{"data", 2, "list, fetch or check"},
		{"data lst", 2, `did you mean "lathe data list"?`},
		{"data fetch", 2, "needs names or --all"},
		{"data fetch fashon-mnist", 2, `did you mean "fashion-mnist"?`},
		{"data check nothing-like-it", 2, "there are"},
		{"train", 2, `required flag(s) "output" not set`},
		{"train -o x.txt", 2, "must end in .safetensors or .onnx"},
		{"train -o x.onnx --arch vitt", 2, `did you mean "vit"?`},
		{"train -o x.onnx --norm layr", 2, `did you mean "layer"?`},
		{"train -o x.onnx --optimizer adam0", 2, "did you mean"},
		{"train -o x.onnx --lr 0", 2, "--lr 0"},
		{"train -o x.onnx --batch 0", 2, "--batch 0"},
		{"train -o x.onnx --epochs nan", 2, "must be positive"},
		{"train -o /no/such/folder/x.onnx", 1, "no folder"},
		{"eval", 2, "needs a model"},
		{"eval none.safetensors", 1, "no such file"},
		{"eval model.bin", 2, "a network is read from"},
		{"eval x.onnx --data fashon-mnist", 2, `did you mean "fashion-mnist"?`},
	} {
		code, out, errs := lathe(t, strings.Fields(c.args)...)
		got := errs
		if c.code == 0 {
			got = out
		}
		if code != c.code || !strings.Contains(got, c.want) {
			t.Errorf("lathe %s: exit code %d, want %d; printed\n%s%swant %q", c.args, code, c.code, out, errs, c.want)
		}
		if c.code != 0 && out != "" {
			t.Errorf("lathe %s: an error left something on stdout: %s", c.args, out)
		}
	}
}

func TestJSONIsValid(t *testing.T) {
	ownStore(t)
	for args, code := range map[string]int{
		"version": 0, "methods": 0, "show layernorm": 0, "doctor": 0, "runs": 0, "runs check": 0, "data list": 0, "data list digits": 0,
		"metods": 2, "runs 99": 1, "try layernorm --scael x": 2, "show nothing": 2, "data check digts": 2,
	} {
		got, out, _ := lathe(t, append(strings.Fields(args), "--json")...)
		if got != code {
			t.Errorf("lathe %s --json: exit code %d, want %d", args, got, code)
		}
		d := json.NewDecoder(strings.NewReader(out))
		var v any
		if err := d.Decode(&v); err != nil {
			t.Errorf("lathe %s --json: %v: %s", args, err, out)
			continue
		}
		if d.More() {
			t.Errorf("lathe %s --json: more than one value: %s", args, out)
		}
		if m, ok := v.(map[string]any); code != 0 && (!ok || m["error"] == "" || m["exit_code"] != float64(code)) {
			t.Errorf("lathe %s --json: the error is not in %s", args, out)
		}
	}
}

func TestEveryVerbHasHelpWithAnExample(t *testing.T) {
	root := newRootCommand(&app{})
	root.InitDefaultCompletionCmd()
	var walk func(c *cobra.Command)
	walk = func(c *cobra.Command) {
		if c.Name() == "help" || c.Name() == "completion" {
			return
		}
		if c.Short == "" || strings.HasSuffix(c.Short, ".") {
			t.Errorf("%s: its short help is %q", c.CommandPath(), c.Short)
		}
		if c.Example == "" && c.Parent() != nil && c.Parent().Example == "" {
			t.Errorf("%s: its help has no example", c.CommandPath())
		}
		if c.Runnable() && c.Args == nil && !strings.Contains(c.Use, "...") {
			t.Errorf("%s: says nothing about its arguments", c.CommandPath())
		}
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk(root)
}

func TestEveryExampleNamesFlagsThatExist(t *testing.T) {
	root := newRootCommand(&app{})
	var walk func(c *cobra.Command)
	walk = func(c *cobra.Command) {
		for _, line := range strings.Split(c.Example, "\n") {
			_, line, found := strings.Cut(line, "lathe ")
			if !found {
				continue
			}
			words := strings.Fields(line)
			target, rest, err := root.Find(words)
			if err != nil || target == root {
				t.Errorf("%s: example %q names no command", c.CommandPath(), line)
				continue
			}
			for _, w := range rest {
				name, ok := strings.CutPrefix(w, "--")
				name, _, _ = strings.Cut(name, "=")
				if ok && target.Flags().Lookup(name) == nil && root.PersistentFlags().Lookup(name) == nil {
					t.Errorf("%s: example %q has the flag --%s, which %s has not", c.CommandPath(), line, name, target.CommandPath())
				}
			}
		}
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk(root)
}

func TestEveryMethodHasAnExperimentAndTheOtherWayRound(t *testing.T) {
	for _, e := range exp.All() {
		if err := e.Validate(); err != nil {
			t.Error(err)
		}
		c, err := findCard(e.Method)
		if err != nil {
			t.Errorf("experiment %s has no card: %v", e.Method, err)
			continue
		}
		if got, err := findExperiment(c.Name); err != nil || got.Method != e.Method {
			t.Errorf("%q finds the experiment %q: %v", c.Name, got.Method, err)
		}
	}
}

func TestTrainThenEval(t *testing.T) {
	data.RequireTest(t, "digits")
	ownStore(t)
	dir := t.TempDir()
	safetensors, onnx := filepath.Join(dir, "d.safetensors"), filepath.Join(dir, "d.onnx")
	train := []string{"train", "--backend", "go", "--arch", "mlp", "--norm", "layer", "--data", "digits", "--steps", "40", "--batch", "32", "--json", "-o"}
	var trained trainResult
	code, out, errs := lathe(t, append(train, safetensors)...)
	if err := json.Unmarshal([]byte(out), &trained); code != 0 || err != nil {
		t.Fatalf("exit code %d, %v: %s%s", code, err, out, errs)
	}
	if trained.Accuracy < 0.8 || trained.Config.Steps != 40 || trained.Examples != 599 {
		t.Errorf("trained %+v", trained)
	}
	if code, _, errs := lathe(t, append(train, onnx)...); code != 0 {
		t.Fatal(errs)
	}
	for _, args := range [][]string{{safetensors}, {onnx}, {onnx, "--data", "digits"}} { // both files say on what they were trained
		code, out, errs := lathe(t, append([]string{"eval", "--backend", "go", "--json"}, args...)...)
		var q quality
		if err := json.Unmarshal([]byte(out), &q); code != 0 || err != nil {
			t.Fatalf("exit code %d, %v: %s%s", code, err, out, errs)
		}
		if q.Accuracy != trained.Accuracy {
			t.Errorf("eval %v: accuracy %v, train printed %v", args, q.Accuracy, trained.Accuracy)
		}
	}
	compressTrained(t, safetensors, trained.Accuracy)
	if left, _ := filepath.Glob(filepath.Join(dir, "*.ckpt")); len(left) != 0 {
		t.Errorf("checkpoints are left: %v", left)
	}
	if code, out, _ := lathe(t, "runs", "--json"); code != 0 || strings.Count(out, `"kind": "train"`) != 2 || strings.Count(out, `"status": "done"`) != 2 {
		t.Errorf("the runs are not recorded: %s", out)
	}
	if code, _, errs := lathe(t, "eval", safetensors, "--data", "fashion-mnist"); data.Have("fashion-mnist") && (code != 1 || !strings.Contains(errs, "takes inputs of shape")) {
		t.Errorf("eval on images of another size: exit code %d, %s", code, errs)
	}
	hostileModels(t, safetensors)
}

// compressTrained quantises what train wrote, from safetensors and to safetensors.
func compressTrained(t *testing.T, model string, accuracy float64) {
	t.Helper()
	set, err := loadLabelled(t.Context(), "digits", true)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	calib, out := filepath.Join(dir, "calib.npy"), filepath.Join(dir, "small.safetensors")
	if err := data.WriteNPYFile(calib, []int{64, 64}, set.Floats(data.Range(64), nil)); err != nil {
		t.Fatal(err)
	}
	if code, _, errs := lathe(t, "compress", model, "--method", "minmax", "--calib", calib, "--report", "none", "-o", out, "--backend", "go"); code != 0 {
		t.Fatal(code, errs)
	}
	before, err := os.Stat(model)
	if err != nil {
		t.Fatal(err)
	}
	after, err := os.Stat(out)
	if err != nil || after.Size()*3 > before.Size() {
		t.Errorf("%d bytes of %d, %v", after.Size(), before.Size(), err)
	}
	code, stdout, errs := lathe(t, "eval", out, "--json", "--backend", "go") // it still knows its data
	var q quality
	if err := json.Unmarshal([]byte(stdout), &q); code != 0 || err != nil {
		t.Fatalf("exit code %d, %v: %s%s", code, err, stdout, errs)
	}
	if q.Accuracy < accuracy-.02 {
		t.Errorf("accuracy %g at 8 bits, %g before", q.Accuracy, accuracy)
	}
	net, err := readNetwork(out, nil)
	if err != nil {
		t.Fatal(err)
	}
	var c trainConfig
	if err := json.Unmarshal([]byte(net.Meta[trainKey]), &c); err != nil || c.Norm != "layer" || len(c.Classes) != 10 || net.Meta[compressKey] != "minmax W8A8" {
		t.Errorf("%v %+v", err, net.Meta)
	}
	if code, _, errs := lathe(t, "compress", model, "--method", "minmax", "--calib", calib, "--shape", "x=1,64", "-o", out+".onnx"); code != 2 || !strings.Contains(errs, "leaves none") {
		t.Error(code, errs)
	}
}

// hostileModels changes a good file in ways that must be refused.
func hostileModels(t *testing.T, good string) {
	t.Helper()
	b, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	swap := func(old, new string) []byte { return bytes.Replace(b, []byte(old), []byte(new), 1) }
	for name, content := range map[string][]byte{
		"cut":             b[:len(b)/2],
		"empty":           nil,
		"no graph":        swap("lathe.network", "other.network"),
		"broken graph":    swap(`{\"version\"`, `[\"version\"`),
		"newer graph":     swap(`\"version\":1`, `\"version\":2`),
		"unknown op":      swap("nn.LayerNorm", "nn.LayerNurm"),
		"another input":   swap(`[1,64]`, `[1,65]`),
		"negative input":  swap(`[1,64]`, `[1,-4]`),
		"lost parameter":  swap(`\"name\":\"fc1.w\"`, `\"name\":\"fc9.w\"`),
		"turned weight":   swap(`[256,64]`, `[64,256]`),
		"tensors missing": swap(`"head.b":`, `"head.c":`),
	} {
		path := filepath.Join(t.TempDir(), "m.safetensors")
		if err := os.WriteFile(path, content, 0o644); err != nil {
			t.Fatal(err)
		}
		if code, out, errs := lathe(t, "eval", path, "--data", "digits"); code != 1 && code != 2 || strings.Contains(errs, "internal error") || bytes.Equal(content, b) {
			t.Errorf("%s: exit code %d: %s%s", name, code, out, errs)
		}
	}
}

// tiny is an experiment that takes no time.
func tiny(method string) lab.Experiment {
	arm := func(name string, v float64) lab.Arm {
		return lab.Arm{Name: name, Baseline: name == "base", Run: func(_ context.Context, t *lab.Trial) error {
			t.Record("accuracy", v+float64(t.Seed))
			t.Series("loss", 1, v)
			t.Image("after", image.NewGray(image.Rect(0, 0, 2, 2)))
			return nil
		}}
	}
	return lab.Experiment{
		Method: method, Title: "a tiny experiment", Arms: []lab.Arm{arm("base", 1), arm("method", 3)},
		Claims: []lab.Claim{{ID: "C1", Text: "better", Bound: lab.AtLeast(1), Measure: func(m lab.Metrics) float64 { return m.Get("method", "accuracy") - m.Get("base", "accuracy") }}},
	}
}

func TestTry(t *testing.T) {
	ownStore(t)
	dir := t.TempDir()
	try := func(args ...string) (int, string, string) {
		t.Helper()
		var out, errs bytes.Buffer
		a := &app{args: append([]string{"try", "--backend", "go"}, args...), stdout: &out, stderr: &errs, find: func(m string) (lab.Experiment, error) {
			if m == "broken" {
				e := tiny(m)
				e.Arms[1].Run = func(context.Context, *lab.Trial) error { return errors.New("no luck") }
				return e, nil
			}
			return tiny(m), nil
		}}
		return a.execute(), out.String(), errs.String()
	}
	page := filepath.Join(dir, "report.html")
	code, out, errs := try("layernorm", "--report", page, "--results", dir)
	if code != 0 || !strings.Contains(out, "HOLDS") || !strings.Contains(errs, "report: "+page) {
		t.Fatalf("exit code %d: %s%s", code, out, errs)
	}
	if b, err := os.ReadFile(page); err != nil || !strings.Contains(string(b), "data:image/png") {
		t.Errorf("report: %v", err)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "layernorm.json")); err != nil {
		t.Error(err)
	} else if r, err := lab.ParseResult(b); err != nil || r.Count(lab.Holds) != 1 || r.Environment.Backend != "go" {
		t.Errorf("result %+v, %v", r, err)
	}

	code, out, _ = try("layernorm", "espcn", "--json", "--scale", "smoke")
	var results []lab.Result
	if err := json.Unmarshal([]byte(out), &results); err != nil || code != 0 || len(results) != 2 || results[1].Method != "espcn" || results[0].Scale != lab.Smoke {
		t.Errorf("exit code %d, %v: %s", code, err, out)
	}

	code, out, errs = try("broken", "--results", dir)
	if code != 1 || !strings.Contains(errs, `arm "method", seed 0: no luck`) || !strings.Contains(out, "UNDECIDED") {
		t.Errorf("exit code %d: %s%s", code, out, errs)
	}
	if _, err := os.Stat(filepath.Join(dir, "broken.json")); err == nil {
		t.Error("the verdicts of a broken run were kept")
	}

	for args, want := range map[string]string{
		"runs": "1 holds", "runs 1": "HOLDS", "runs --method broken": "no luck", "runs 1 --json": `"accuracy": 3`, "runs 4": "failed",
		"runs 2 --report " + filepath.Join(dir, "again.html"): "Artefacts", "runs check": "is whole",
	} {
		if code, out, errs := lathe(t, strings.Fields(args)...); code != 0 || !strings.Contains(out, want) {
			t.Errorf("lathe %s: exit code %d, %s%s want %q", args, code, out, errs, want)
		}
	}
	if code, out, _ := lathe(t, "runs", "rm", "1", "2"); code != 0 || !strings.Contains(out, "removed 2 of 2") {
		t.Errorf("rm: exit code %d, %s", code, out)
	}
	if code, _, _ := lathe(t, "runs", "1"); code != 1 {
		t.Errorf("a removed run: exit code %d", code)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "again.html")); err != nil || !strings.Contains(string(b), "data:image/png") {
		t.Errorf("the report written again: %v", err)
	}
}

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/onnx"
)

// writeClasses writes the classes of so many cases.
func writeClasses(t *testing.T, path string, n int, class func(i int) int) string {
	t.Helper()
	var csv strings.Builder
	for i := range n {
		fmt.Fprintf(&csv, "%d,%d\n", i, class(i))
	}
	if err := os.WriteFile(path, []byte(csv.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// Classes reach the method that trains, and what it has learnt from is not judged.
func TestLabelsReachTheTraining(t *testing.T) {
	ownStore(t)
	dir := t.TempDir()
	model, cases := writeViT(t, dir)
	labels := writeClasses(t, filepath.Join(dir, "labels.csv"), 20, func(i int) int { return i % 5 })
	wrong := writeClasses(t, filepath.Join(dir, "wrong.csv"), 20, func(int) int { return 3 })
	test := filepath.Join(dir, "test.npy")
	x := make([]float32, 6*64)
	rng.Normal(rng.New(2, "cases"), x, 1)
	if err := data.WriteNPYFile(test, []int{6, 8, 8, 1}, x); err != nil {
		t.Fatal(err)
	}
	testLabels := writeClasses(t, filepath.Join(dir, "test.csv"), 6, func(i int) int { return i % 5 })
	files := map[string][]byte{}
	compressed := func(name string, args ...string) (r compressResult, recipe string) {
		t.Helper()
		out := filepath.Join(dir, name+".onnx")
		args = append([]string{"compress", model, "--calib", cases, "-o", out, "--json", "--backend", "go", "--blame", "off"}, args...)
		if !strings.Contains(strings.Join(args, " "), "--recipe") {
			args = append(args, "--method", "ofq", "--bits", "4", "--set", "steps=30", "--set", "lr=0.01")
		}
		code, stdout, stderr := lathe(t, args...)
		if code != 0 {
			t.Fatal(name, code, stderr)
		}
		if err := json.Unmarshal([]byte(stdout), &r); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(out)
		if err != nil {
			t.Fatal(err)
		}
		files[name] = b
		if b, err = os.ReadFile(r.RecipeFile); err != nil {
			t.Fatal(err)
		}
		return r, string(b)
	}
	for _, c := range []struct {
		name           string
		args           []string
		learnt         bool
		trained, judge int
		evaluation     string
	}{
		{"split", []string{"--labels", labels}, true, 16, 4, ", held out of the training"},
		{"other classes", []string{"--labels", wrong}, true, 16, 4, ", held out of the training"},
		{"few", []string{"--labels", labels, "--calib-cases", "8"}, true, 8, 4, ", held out of the training"},
		{"alone", []string{"--labels", labels, "--set", "labels=false"}, false, 20, 20, cases},
		{"no classes", nil, false, 20, 20, cases},
		{"classes of the test", []string{"--eval", test, "--labels", testLabels}, false, 20, 6, test},
		{"both", []string{"--eval", test, "--labels", testLabels, "--calib-labels", labels}, true, 20, 6, test},
		{"of the training", []string{"--eval", test, "--calib-labels", labels}, true, 20, 6, test},
	} {
		r, recipe := compressed(c.name, c.args...)
		notes := strings.Join(r.Notes, "; ")
		if r.CalibrationCases != c.trained || r.Agreement.Cases != c.judge || !strings.HasSuffix(r.Evaluation, c.evaluation) {
			t.Errorf("%s: trained on %d, judged on %d of %s", c.name, r.CalibrationCases, r.Agreement.Cases, r.Evaluation)
		}
		if strings.Contains(notes, fmt.Sprintf("trained on %d cases with their classes", c.trained)) != c.learnt {
			t.Errorf("%s: notes %s", c.name, notes)
		}
		if strings.Contains(recipe, "labels ") != c.learnt {
			t.Errorf("%s: the recipe says\n%s", c.name, recipe)
		}
	}
	for a, b := range map[string]string{"split": "other classes", "both": "no classes", "few": "split"} {
		if bytes.Equal(files[a], files[b]) {
			t.Errorf("%q and %q give the same file", a, b)
		}
	}
	for a, b := range map[string]string{"alone": "no classes", "classes of the test": "no classes", "both": "of the training"} {
		if !bytes.Equal(files[a], files[b]) {
			t.Errorf("%q and %q give other files", a, b)
		}
	}
	// the recipe with the same examples and classes gives the same file
	if compressed("again", "--recipe", filepath.Join(dir, "split.recipe.yaml"), "--labels", labels); !bytes.Equal(files["again"], files["split"]) {
		t.Error("the recipe gives another file")
	}
	// other methods are judged on all that has classes, as before
	if r, _ := compressed("rounded", "--recipe", writeText(t, dir, "minmax.yaml", "steps:\n  - method: minmax\n    bits: 8\n"), "--labels", labels); r.Agreement.Cases != 20 || r.CalibrationCases != 20 {
		t.Errorf("min-max is judged on %d cases", r.Agreement.Cases)
	}
}

func writeText(t *testing.T, dir, name, text string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestHeldOutCasesAreNotTrainedOn(t *testing.T) {
	for n := 2; n < 40; n++ {
		m := &material{calib: &cases{source: "x", n: n}}
		for i := range n {
			m.labels = append(m.labels, 1000+i)
		}
		m.judged = m.calib
		taught, err := m.holdOut(uint64(n))
		if err != nil {
			t.Fatal(err)
		}
		seen := map[int]int{}
		for _, l := range append(append([]int{}, taught...), m.labels...) {
			seen[l]++
		}
		if len(taught) != m.calib.n || len(m.labels) != m.judged.n || m.judged.n != max(1, n/heldOut) || m.calib.n+m.judged.n != n || len(seen) != n {
			t.Errorf("%d cases: %d learnt from, %d judged, %d different", n, m.calib.n, m.judged.n, len(seen))
		}
	}
	one := &material{calib: &cases{source: "x", n: 1}, labels: []int{0}}
	if _, err := one.holdOut(0); err == nil || !strings.Contains(err.Error(), "labels=false") {
		t.Errorf("one case: %v", err)
	}
}

func TestCompressRefusesClassesThatNothingLearns(t *testing.T) {
	dir := t.TempDir()
	model, cases := writeViT(t, dir)
	labels := writeClasses(t, filepath.Join(dir, "labels.csv"), 20, func(i int) int { return i % 5 })
	high := writeClasses(t, filepath.Join(dir, "high.csv"), 20, func(i int) int { return i % 6 })
	b := nn.NewBuilder(1)
	net, err := b.Finish(b.Add("last", nn.ReLU, b.Add("a", nn.Dense{Out: 5}, b.Add("flat", nn.Reshape{Dims: []int{0, 64}}, b.Image("x", 8, 8, 1)))))
	if err != nil {
		t.Fatal(err)
	}
	sums := filepath.Join(dir, "sums.onnx")
	if err := onnx.WriteFile(sums, net, onnx.WriteOptions{}); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(dir, "o.onnx")
	for _, c := range []struct {
		code int
		want string
		args []string
	}{
		{exitUsage, "an --eval of its own", []string{model, "--method", "ofq", "--calib", cases, "--calib-labels", labels}},
		{exitUsage, "an --eval of its own", []string{model, "--method", "ofq", "--data", "digits", "--calib-labels", labels}},
		{exitUsage, "nothing here learns", []string{model, "--method", "minmax", "--calib", cases, "--eval", cases, "--calib-labels", labels}},
		{exitUsage, "nothing here learns", []string{model, "--method", "ofq", "--set", "labels=false", "--calib", cases, "--eval", cases, "--calib-labels", labels}},
		{exitUsage, "nothing here learns", []string{model, "--size", "50%", "--calib", cases, "--eval", cases, "--calib-labels", labels}},
		{exitFailed, "the network has 5 classes", []string{model, "--method", "ofq", "--calib", cases, "--labels", high}},
		{exitFailed, "--set labels=false", []string{sums, "--method", "ofq", "--calib", cases, "--labels", labels}},
	} {
		code, _, stderr := lathe(t, append(append([]string{"compress"}, c.args...), "-o", out, "--backend", "go")...)
		if code != c.code || !strings.Contains(stderr, c.want) {
			t.Errorf("%v: exit code %d, %s; want %d and %q", c.args, code, stderr, c.code, c.want)
		}
	}
}

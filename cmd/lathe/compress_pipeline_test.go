package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"testing"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/onnx"
	"github.com/lathe-ml/lathe/nn/safetensors"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// compressJSON runs lathe compress and reads what it prints.
func compressJSON(t *testing.T, args ...string) *compressResult {
	t.Helper()
	code, stdout, stderr := lathe(t, append([]string{"compress", "--json", "--backend", "go", "--report", "none"}, args...)...)
	if code != 0 {
		t.Fatal(code, stderr)
	}
	r := &compressResult{}
	if err := json.Unmarshal([]byte(stdout), r); err != nil {
		t.Fatal(err, stdout)
	}
	return r
}

func TestCompressorRowsWork(t *testing.T) {
	for i := range compressors {
		c := &compressors[i]
		s := compress.Part{Method: c.name}
		if err := c.settle(&s); err != nil {
			t.Error(c.name, err)
			continue
		}
		if c.method(s, compress.Options{}, 0, nil) == nil || c.about == "" || c.cases < -1 {
			t.Errorf("%+v", c)
		}
		for _, k := range c.knobs {
			if !k.check(k.def) || k.about == "" {
				t.Errorf("%s: the default %q of %s is not accepted", c.name, k.def, k.key)
			}
			bad := compress.Part{Method: c.name, Set: map[string]string{k.key: "no such value"}}
			if err := c.settle(&bad); err == nil || !strings.Contains(err.Error(), "set."+k.key) {
				t.Errorf("%s: %v", c.name, err)
			}
		}
		bad := compress.Part{Method: c.name, Set: map[string]string{"no-such-key": "1"}}
		if err := c.settle(&bad); err == nil {
			t.Errorf("%s accepts any key", c.name)
		}
	}
}

func TestCompressChoosesSites(t *testing.T) {
	ownStore(t)
	dir := t.TempDir()
	model, cases := writeViT(t, dir)
	out := filepath.Join(dir, "o.onnx")
	r := compressJSON(t, model, "--method", "minmax", "--bits", "6", "--exclude", "head", "--exclude", `blk\.1`, "--calib", cases, "-o", out, "--set", "granularity=tensor")
	for _, s := range r.Sites {
		left := s.Name == "head" || strings.HasPrefix(s.Name, "blk.1")
		if left != (s.WeightBits == 32) || left != (s.InputBits == 32) {
			t.Errorf("%+v", s)
		}
	}
	if len(r.Blame) != 7 || r.Blame[0].KL < r.Blame[len(r.Blame)-1].KL || r.Blame[0].Bytes <= 0 || r.BlameCases != 20 {
		t.Errorf("%+v", r.Blame)
	}
	if b := r.Bars.Top1; !(b.Low <= r.Agreement.Top1 && r.Agreement.Top1 <= b.High && b.Low < b.High) {
		t.Errorf("agreement %g in %+v", r.Agreement.Top1, b)
	}
	r = compressJSON(t, model, "--method", "repq-vit", "--bits", "4", "--include", `fc\d`, "--calib", cases, "-o", out, "--blame", "off")
	if i := slices.IndexFunc(r.Sites, func(s compress.Site) bool { return (s.WeightBits == 4) != strings.Contains(s.Name, "fc") }); i >= 0 || r.Blame != nil {
		t.Errorf("%+v", r.Sites)
	}
	for _, c := range [][]string{
		{"no site is named", "--method", "minmax", "--include", "no.such"},
		{"did you mean \"head\"", "--method", "minmax", "--exclude", "heat"},
		{"has no site", "--method", "minmax", "--include", "head", "--exclude", "head"},
		{"no regular expression", "--method", "minmax", "--include", "("},
		{"write key=value", "--method", "minmax", "--set", "granularity"},
		{"--set granularity: \"row\"; accepted: channel, tensor", "--method", "minmax", "--set", "granularity=row"},
		{"did you mean \"granularity\"", "--method", "minmax", "--set", "granulrity=tensor"},
		{"accepted: auto, on, off", "--method", "minmax", "--blame", "yes"},
		{"exclude each other", "--recipe", "x.yaml", "--bits", "4"},
		{"size such as", "--method", "minmax", "--max-memory", "much"},
		{"leave it out", "--size", "25%", "--bits", "4"},
		{"--size 250%", "--size", "250%"},
		{"--latency 25", "--latency", "25"},
		{"--max-drop -1", "--max-drop", "-1"},
		{"name it with --method", "--size", "25%", "--set", "granularity=tensor"},
		{"there is no method \"gptq\"", "--size", "25%", "--method", "gptq"},
	} {
		code, _, stderr := lathe(t, append([]string{"compress", model, "--backend", "go", "--calib", cases, "-o", filepath.Join(dir, "none.onnx")}, c[1:]...)...)
		if code == 0 || !strings.Contains(stderr, c[0]) {
			t.Errorf("%v: exit code %d: %q does not say %q", c[1:], code, stderr, c[0])
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "none.onnx")); err == nil {
		t.Error("a refused run left an output")
	}
}

// The recipe that a run writes gives the same bytes again.
func TestRecipesRepeatARun(t *testing.T) {
	ownStore(t)
	dir := t.TempDir()
	model, cases := writeViT(t, dir)
	recipe := filepath.Join(dir, "two.yaml")
	text := `
seed: 5
calibration_cases: 12
steps:
- method: minmax
  bits: 8
  include: [patch, head]
  set: {granularity: tensor}
- method: repq-vit
  bits: 4
  exclude: ['blk\.1\.fc2']
  sites:
    blk.0.fc1: {weight: 6}
`
	if err := os.WriteFile(recipe, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, args := range map[string][]string{
		"flags":  {"--method", "repq-vit", "--bits", "3", "--abits", "6", "--exclude", "head", "--softmax", "log2", "--calib-cases", "9", "--seed", "4"},
		"recipe": {"--recipe", recipe},
	} {
		first, second := filepath.Join(dir, name+"1.onnx"), filepath.Join(dir, name+"2.onnx")
		r := compressJSON(t, slices.Concat([]string{model, "--calib", cases, "-o", first}, args)...)
		again := compressJSON(t, model, "--calib", cases, "-o", second, "--recipe", r.RecipeFile)
		a, err := os.ReadFile(first)
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(second)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(a, b) || again.Size.Parameters != r.Size.Parameters {
			t.Errorf("%s: the recipe gives another file", name)
		}
		if name != "recipe" {
			continue
		}
		want := map[string]int{"patch/channels_first": 8, "head": 8, "blk.0.fc1": 6, "blk.1.fc2": 32}
		for _, s := range r.Sites {
			bits, ok := want[s.Name]
			if !ok {
				bits = 4
			}
			if s.WeightBits != bits || bits < 32 && !(s.WeightErr > 0 && s.OutputErr > 0) {
				t.Errorf("%+v, want %d bits", s, bits)
			}
		}
		if r.CalibrationCases != 12 || len(r.Blame) != 13 {
			t.Errorf("%d cases, %d blamed", r.CalibrationCases, len(r.Blame))
		}
	}
	for text, want := range map[string]string{
		"steps: [{method: minmix, bits: 4}]":                        `two.yaml: line 1: method: there is no method "minmix" to compress with; did you mean "minmax"?`,
		"steps:\n- method: minmax\n  bits: 9":                       "two.yaml: line 3: bits: 9; accepted: 2 to 8",
		"steps:\n- method: minmax\n  set:\n    granularity: row":    "two.yaml: line 4: set.granularity",
		"steps:\n- method: minmax\n  sites:\n    head: {weight: 1}": "two.yaml: line 4: sites.head",
		"steps:\n- method: minmax\n- method: repq-vit":              "both take",
		"opset: 3\nsteps:\n- method: minmax":                        "opset: 3",
		"preprocess: size=3\nsteps:\n- method: minmax":              "there is no \"size\"",
	} {
		if err := os.WriteFile(recipe, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		code, _, stderr := lathe(t, "compress", model, "--recipe", recipe, "--calib", cases, "-o", filepath.Join(dir, "no.onnx"), "--backend", "go")
		if code == 0 || !strings.Contains(stderr, want) {
			t.Errorf("%q: %d %s", text, code, stderr)
		}
	}
}

func TestDryRunWritesNothing(t *testing.T) {
	ownStore(t)
	dir := t.TempDir()
	model, cases := writeViT(t, dir)
	before, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(dir, "o.onnx")
	code, stdout, stderr := lathe(t, "compress", model, "--method", "minmax", "--bits", "4", "--exclude", "head", "--calib", cases, "-o", out, "--dry-run", "--json", "--backend", "go")
	if code != 0 {
		t.Fatal(stderr)
	}
	var p compressPlan
	if err := json.Unmarshal([]byte(stdout), &p); err != nil {
		t.Fatal(err)
	}
	if !p.Estimate || p.Forecast.Bytes >= p.Forecast.FloatBytes || p.Forecast.Memory.Total <= 0 || !(p.CaseSeconds > 0 && p.Seconds > 0) || p.CalibrationCases != 20 {
		t.Errorf("%s", stdout)
	}
	code, stdout, _ = lathe(t, "compress", model, "--size", "30%", "--points", "3", "--calib", cases, "--dry-run", "--backend", "go")
	if code != 0 || !strings.Contains(stdout, "estimates") || !strings.Contains(stdout, "blk.1.fc2") {
		t.Error(code, stdout)
	}
	after, err := os.ReadDir(dir)
	if err != nil || len(after) != len(before) {
		t.Errorf("%d files, were %d: %v", len(after), len(before), err)
	}
	r := compressJSON(t, model, "--method", "minmax", "--bits", "4", "--exclude", "head", "--calib", cases, "-o", out)
	if d := r.Size.Parameters - p.Forecast.Bytes; d < 0 || d > 8*24 { // two numbers for each activation quantiser
		t.Errorf("forecast %d bytes, it was %d", p.Forecast.Bytes, r.Size.Parameters)
	}
	for _, s := range p.Forecast.Sites {
		i := slices.IndexFunc(r.Sites, func(x compress.Site) bool { return x.Name == s.Name })
		if i < 0 || r.Sites[i].Bytes != s.Bytes || r.Sites[i].WeightBits != s.WeightBits {
			t.Errorf("%+v, and it was %+v", s, r.Sites)
		}
	}
}

func TestMaxMemory(t *testing.T) {
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(-1))
	ownStore(t)
	dir := t.TempDir()
	model, cases := writeViT(t, dir)
	out := filepath.Join(dir, "o.onnx")
	code, _, stderr := lathe(t, "compress", model, "--method", "minmax", "--calib", cases, "-o", out, "--max-memory", "1kB", "--backend", "go")
	if code != 1 || !strings.Contains(stderr, "--max-memory is 1kB") || !strings.Contains(stderr, "nothing was done") {
		t.Error(code, stderr)
	}
	if _, err := os.Stat(out); err == nil {
		t.Error("a refused run left an output")
	}
	_, stdout, _ := lathe(t, "compress", model, "--method", "minmax", "--calib", cases, "--dry-run", "--json", "--backend", "go")
	var p compressPlan
	if err := json.Unmarshal([]byte(stdout), &p); err != nil {
		t.Fatal(err)
	}
	limit := fmt.Sprint(p.Forecast.Memory.Least - 1000)
	code, _, stderr = lathe(t, "compress", model, "--method", "minmax", "--calib", cases, "-o", out, "--max-memory", limit, "--backend", "go", "--report", "none")
	if code != 0 || !strings.Contains(stderr, "instead of 64") {
		t.Error(code, stderr)
	}
	for s, want := range map[string]int64{"1": 1, "2kB": 2000, "1.5 MiB": 3 << 19, "3G": 3e9, "-1": 0, "x": 0, "1XB": 0, "": 0, "9999999TB": 0} {
		if got, err := parseBytes(s); got != want || (err != nil) != (want == 0) {
			t.Errorf("%q: %d %v, want %d", s, got, err, want)
		}
	}
}

// stopping cancels a context when a line has been written.
type stopping struct {
	bytes.Buffer
	stop  func()
	after int
}

func (s *stopping) Write(p []byte) (int, error) {
	if s.after--; s.after == 0 {
		s.stop()
	}
	return s.Buffer.Write(p)
}

// A run that is stopped goes on where it was, gives the file of an undisturbed one, and leaves no journal.
func TestAStoppedCompressionGoesOn(t *testing.T) {
	ownStore(t)
	dir := t.TempDir()
	model, cases := writeViT(t, dir)
	journals := filepath.Join(os.Getenv("LATHE_HOME"), "compress")
	kept := func() int {
		found, err := filepath.Glob(filepath.Join(journals, "*"))
		if err != nil {
			t.Fatal(err)
		}
		return len(found)
	}
	for name, flags := range map[string]compressFlags{
		"method":  {method: "repq-vit", bits: 4},
		"search":  {size: "28%", points: 2, method: "minmax"},
		"trained": {method: "ofq", bits: 4, set: []string{"steps=20"}}, // stopped first when it has nothing but a checkpoint
	} {
		flags.calib, flags.evalCases, flags.blame, flags.report, flags.output = cases, -1, "auto", "none", filepath.Join(dir, name+".onnx")
		start := func(ctx context.Context, stderr *stopping, output string) error {
			f := flags
			f.output = output
			c, err := newCompression(&app{args: []string{"compress"}, stdout: &bytes.Buffer{}, stderr: stderr, backendName: "go"}, model, f, func(s string) bool { return s == "size" && f.size != "" })
			if err != nil {
				t.Fatal(err)
			}
			return c.run(ctx)
		}
		plain := filepath.Join(dir, name+"-plain.onnx")
		if err := start(t.Context(), &stopping{}, plain); err != nil {
			t.Fatal(name, err)
		}
		if kept() != 0 {
			t.Errorf("%s: a journal is left", name)
		}
		for _, after := range []int{3, 9} {
			ctx, cancel := context.WithCancel(t.Context())
			err := start(ctx, &stopping{stop: cancel, after: after}, flags.output)
			cancel()
			if !errors.Is(err, context.Canceled) {
				t.Fatalf("%s: %v", name, err)
			}
			if _, err := os.Stat(flags.output); err == nil || kept() != 1 {
				t.Errorf("%s: a stopped run left an output, or %d journals", name, kept())
			}
		}
		errs := &stopping{}
		if err := start(t.Context(), errs, flags.output); err != nil {
			t.Fatal(name, err)
		}
		if !strings.Contains(errs.String(), "going on where an earlier run stopped") || kept() != 0 {
			t.Errorf("%s: %d journals; %s", name, kept(), errs)
		}
		a, errA := os.ReadFile(plain)
		b, errB := os.ReadFile(flags.output)
		if errA != nil || errB != nil || !bytes.Equal(a, b) {
			t.Errorf("%s: the file differs from that of an undisturbed run", name)
		}
	}
}

func TestCompressSearchesABudget(t *testing.T) {
	ownStore(t)
	dir := t.TempDir()
	model, cases := writeViT(t, dir)
	out := filepath.Join(dir, "o.onnx")
	r := compressJSON(t, model, "--size", "28%", "--points", "3", "--calib", cases, "-o", out)
	if r.Search == nil || r.Search.Chosen == "" || len(r.Search.Points) < 4 || len(r.Search.Sensitivity) != 14 {
		t.Fatalf("%+v", r.Search)
	}
	if limit := int64(.28 * float64(r.Size.FloatParameters)); r.Size.Parameters > limit {
		t.Errorf("%d bytes of %d", r.Size.Parameters, limit)
	}
	i := slices.IndexFunc(r.Search.Points, func(p compress.SearchPoint) bool { return p.Name == r.Search.Chosen })
	if p := r.Search.Points[i]; p.Bytes != r.Size.Parameters || p.Quality != 100*r.Agreement.Top1 {
		t.Errorf("the chosen point is %+v, the file has %d bytes and agrees in %g", p, r.Size.Parameters, r.Agreement.Top1)
	}
	if _, err := onnx.ReadFile(out, onnx.Options{}); err != nil {
		t.Error(err)
	}

	r = compressJSON(t, model, "--latency", "30%", "--points", "2", "--method", "minmax", "--calib", cases, "-o", out)
	i = slices.IndexFunc(r.Search.Points, func(p compress.SearchPoint) bool { return p.Name == r.Search.Chosen })
	if p := r.Search.Points[i]; p.Latency > .3 || p.Method != "minmax" {
		t.Errorf("%+v", p)
	}

	none := filepath.Join(dir, "none.onnx")
	code, stdout, stderr := lathe(t, "compress", model, "--size", "1%", "--points", "2", "--method", "minmax", "--calib", cases, "-o", none, "--json", "--report", "none", "--backend", "go")
	if code != 1 || !strings.Contains(stderr, "no point meets the target; nearest is minmax") || !strings.Contains(stderr, "nothing was written") {
		t.Error(code, stderr)
	}
	var s searchResult
	if err := json.Unmarshal([]byte(stdout), &s); err != nil || len(s.Points) == 0 {
		t.Error(err, stdout)
	}
	if _, err := os.Stat(none); err == nil {
		t.Error("a search that found nothing left an output")
	}
	mlp := filepath.Join(dir, "mlp.safetensors")
	net, err := zoo.MLP(zoo.MLPOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := safetensors.WriteNetwork(mlp, net); err != nil {
		t.Fatal(err)
	}
	x := make([]float32, 8*net.Inputs[0].Shape.Size())
	rng.Normal(rng.New(1, "cases"), x, 1)
	d := slices.Clone(net.Inputs[0].Shape.Dimensions)
	d[0] = 8
	inputs := filepath.Join(dir, "mlp.npy")
	if err := data.WriteNPYFile(inputs, d, x); err != nil {
		t.Fatal(err)
	}
	code, stdout, stderr = lathe(t, "compress", mlp, "--max-drop", "100", "--points", "1", "--calib", inputs, "-o", out, "--backend", "go", "--report", "none")
	if code != 0 || !strings.Contains(stdout, "repq-vit does not serve the network") {
		t.Error(code, stdout, stderr)
	}
}

// Published networks are read from their folders, with examples as text.
func TestCompressReadsEncodersAndTexts(t *testing.T) {
	data.RequireTest(t, "all-minilm-l6-v2")
	ownStore(t)
	dir := t.TempDir()
	texts := filepath.Join(dir, "texts.txt")
	if err := os.WriteFile(texts, []byte("A truth universally acknowledged.\n\nThe cat sat on the mat.\nIt rained all day.\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	folder := filepath.Join(data.Dir(), "models", "all-minilm-l6-v2")
	net, err := readAnyNetwork(folder, nil, 8)
	if err != nil {
		t.Fatal(err)
	}
	c, err := exampleSource{model: folder, inputs: texts}.open(t.Context(), net)
	if err != nil || c.n != 3 {
		t.Fatal(c, err)
	}
	x, err := c.load([]int{1, 2})
	if err != nil || x.Check(net) != nil {
		t.Fatal(err)
	}
	if mask := nn.Floats(x[1]); !slices.Equal(mask, []float32{1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0}) {
		t.Error(mask)
	}
	if _, err := (exampleSource{model: dir, inputs: texts}).open(t.Context(), net); err == nil || !strings.Contains(err.Error(), "tokenizer.json") {
		t.Error(err)
	}
	empty := filepath.Join(dir, "empty.txt")
	if err := os.WriteFile(empty, []byte("\n \n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := (exampleSource{model: folder, inputs: empty}).open(t.Context(), net); err == nil || !strings.Contains(err.Error(), "no text") {
		t.Error(err)
	}
	if _, err := readAnyNetwork(dir, nil, 0); err == nil || !strings.Contains(err.Error(), "model.safetensors") {
		t.Error(err)
	}
}

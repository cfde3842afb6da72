package main

import (
	"bufio"
	"bytes"
	"fmt"
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"image"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/lathe-ml/lathe/data"
)

// repository is the work tree, from the folder of this package.
const repository = "../.."

// blocks returns the fenced code blocks of a language ("" for fences without one), and the text around all blocks.
func blocks(markdown, language string) (found []string, rest string) {
	inside, keep := false, false
	var block, outside strings.Builder
	for _, line := range strings.SplitAfter(markdown, "\n") {
		lang, fence := strings.CutPrefix(strings.TrimSpace(line), "```")
		switch {
		case fence && inside:
			if inside = false; keep {
				found = append(found, block.String())
			}
			block.Reset()
		case fence:
			inside, keep = true, lang == language
		case inside:
			block.WriteString(line)
		default:
			outside.WriteString(line)
		}
	}
	return found, outside.String()
}

var (
	inlineCommand = regexp.MustCompile("`((?:bin/)?lathe [^`]+)`")
	usedPackage   = regexp.MustCompile(`\b([a-z]+)\.[A-Z]`)
)

// words splits a command of the documents; they hold no quotes that the shell would take away.
func words(command string) []string {
	command, _, _ = strings.Cut(command, " #")
	return strings.Fields(command)
}

// The README's commands run as they are written, one after another, on small files of the names that it uses; what
// would take minutes gets flags that shorten it. Nothing is fetched.
func TestReadmeCommandsRun(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some 15 seconds")
	}
	text := readDocument(t, "README.md")
	makefile := readDocument(t, "Makefile")
	shell, rest := blocks(text, "sh")
	var commands [][]string
	for line := range strings.Lines(strings.Join(shell, "")) {
		if w := words(line); len(w) > 0 {
			commands = append(commands, w)
		}
	}
	for _, m := range inlineCommand.FindAllStringSubmatch(rest, -1) {
		commands = append(commands, words(m[1]))
	}
	if len(commands) < 10 {
		t.Fatalf("only %d commands found: %q", len(commands), commands)
	}

	ownStore(t)
	t.Setenv("LATHE_CACHE", absolute(t, data.Dir()))
	t.Setenv("LATHE_OFFLINE", "1")
	t.Chdir(t.TempDir())
	readmeFiles(t)
	// The demonstration exports the network that the other commands work on.
	demo := runDocumented(t, []string{"demo", "--report", "report.html", "--export", "."})
	demoAsPrinted(t, text, demo)
	if err := os.Rename("vit-a.onnx", "MODEL.onnx"); err != nil {
		t.Fatal(err)
	}

	placeholders := map[string]string{"METHOD": "soft-nms"}
	for _, w := range commands {
		t.Run(strings.Join(w, " "), func(t *testing.T) {
			args := w[1:]
			switch w[0] {
			case "lathe", "bin/lathe":
			case "make":
				recipe := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(w[1]) + `:.*\n((?:\t.*\n)*)`).FindStringSubmatch(makefile)
				if recipe == nil {
					t.Errorf("the Makefile has no target %q", w[1])
				} else if w[1] == "demo" && !strings.Contains(recipe[1], "lathe demo --report report.html\n") {
					t.Errorf("make demo is not what this test ran before: %q", recipe[1])
				}
				return
			default:
				t.Fatalf("this test does not know how to run %q", w[0])
			}
			for i, a := range args {
				if p, ok := placeholders[a]; ok {
					args[i] = p
				}
			}
			if slices.Contains(args, "fashion-mnist") || slices.ContainsFunc(args, func(a string) bool { return strings.HasPrefix(a, "VIT.") }) {
				data.RequireTest(t, "fashion-mnist")
			}
			switch shorter := map[string][]string{"train": {"--steps", "4", "--batch", "16"}, "eval": {"--limit", "200"}, "norms": {"--steps", "4", "--batch", "16", "--depth", "1", "--width", "16"}, "sparsity": {"--cases", "100"}}[args[0]]; {
			case shorter != nil:
				args = append(args, shorter...)
			case args[0] == "try" && !slices.Contains(args, "--scale"):
				args = append(args, "--scale", "smoke")
			}
			runDocumented(t, args)
			for i, a := range args {
				if a == "-o" || a == "--report" {
					if st, err := os.Stat(args[i+1]); err != nil || st.Size() == 0 {
						t.Errorf("%s is not there: %v", args[i+1], err)
					}
				}
			}
		})
	}
}

// The guide's commands run one after another, as they are written, on the network and the images that are part of the
// program.
func TestGuideToCompressionRuns(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some 20 seconds")
	}
	shell, _ := blocks(readDocument(t, "docs/guides/compress.md"), "sh")
	ownStore(t)
	t.Setenv("LATHE_CACHE", absolute(t, data.Dir()))
	t.Setenv("LATHE_OFFLINE", "1")
	t.Chdir(t.TempDir())
	ran := 0
	for line := range strings.Lines(strings.Join(shell, "")) {
		w := words(line)
		if len(w) == 0 {
			continue
		}
		if w[0] != "lathe" {
			t.Fatalf("this test does not know how to run %q", line)
		}
		runDocumented(t, w[1:])
		ran++
		for i, a := range w {
			if a == "-o" {
				if st, err := os.Stat(w[i+1]); err != nil || st.Size() == 0 {
					t.Errorf("%s is not there: %v", w[i+1], err)
				}
			}
		}
	}
	if ran < 8 {
		t.Errorf("only %d commands found", ran)
	}
	first, err := os.ReadFile("vit4-head.onnx")
	if err != nil {
		t.Fatal(err)
	}
	again, err := os.ReadFile("again.onnx")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(first, again) {
		t.Error("the recipe did not give the same file again")
	}
}

func readDocument(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(repository, filepath.FromSlash(name)))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func absolute(t *testing.T, path string) string {
	t.Helper()
	p, err := filepath.Abs(path)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func runDocumented(t *testing.T, args []string) (stdout string) {
	t.Helper()
	var out, errs bytes.Buffer
	if code := run(args, strings.NewReader(""), &out, &errs); code != exitDone {
		t.Fatalf("lathe %s: exit code %d\n%s%s", strings.Join(args, " "), code, out.String(), errs.String())
	}
	return out.String()
}

// readmeFiles makes the files that the README's commands name, in the current folder.
func readmeFiles(t *testing.T) {
	t.Helper()
	_, calib, err := data.EmbeddedFashionMNIST()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir("IMAGES", 0o755); err != nil {
		t.Fatal(err)
	}
	for i := range 40 {
		m := &image.Gray{Pix: calib.At(i), Stride: calib.W, Rect: image.Rect(0, 0, calib.W, calib.H)}
		savePicture(t, filepath.Join("IMAGES", fmt.Sprintf("%02d.png", i)), m)
		if i == 0 {
			savePicture(t, "IN.png", m)
		}
	}
	logits, labels := make([]float32, 3*60), make([]int32, 60)
	for i := range labels {
		labels[i] = int32(i % 3)
		logits[3*i+(i+i/20)%3] = 4 // a third is wrong
	}
	for name, write := range map[string]func(name string) error{
		"LOGITS.npy": func(name string) error { return data.WriteNPYFile(name, []int{60, 3}, logits) },
		"LABELS.npy": func(name string) error { return data.WriteNPYFile(name, []int{60}, labels) },
	} {
		if err := write(name); err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range map[string]string{"DETECTIONS.json": nmsRaw, "TRUTH.json": nmsTruth} {
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// demoAsPrinted compares the table that the README says make demo prints with what it printed: names and sizes are the
// same; accuracies may differ by a point, since processors add in other orders.
func demoAsPrinted(t *testing.T, readme, printed string) {
	t.Helper()
	_, part, _ := strings.Cut(readme, "<!-- demo:begin -->")
	part, _, found := strings.Cut(part, "<!-- demo:end -->")
	tables, _ := blocks(part, "text")
	if !found || len(tables) != 1 {
		t.Fatal("the README has no table of the demonstration")
	}
	cells := func(line string) []string { return regexp.MustCompile(`\s{2,}`).Split(strings.TrimSpace(line), -1) }
	got := map[string][]string{}
	for line := range strings.Lines(printed) {
		if c := cells(line); len(c) == 5 {
			got[c[0]] = c
		}
	}
	rows := 0
	for line := range strings.Lines(tables[0]) {
		want := cells(line)
		if len(want) != 5 {
			continue
		}
		rows++
		is := got[want[0]]
		if is == nil {
			t.Errorf("the demonstration does not print the row %q", want[0])
			continue
		}
		if is[3] != want[3] || is[4] != want[4] {
			t.Errorf("%s: %v printed, %v in the README", want[0], is, want)
		}
		a, errA := strconv.ParseFloat(is[1], 64)
		b, errB := strconv.ParseFloat(want[1], 64)
		if errA == nil && errB == nil && math.Abs(a-b) > 1 || (errA == nil) != (errB == nil) {
			t.Errorf("%s: accuracy %s printed, %s in the README", want[0], is[1], want[1])
		}
	}
	if rows < 4 {
		t.Errorf("the README's table of the demonstration has %d rows", rows)
	}
}

// The commands of the cards name files of the reader's own; here they are only parsed: an unknown verb, flag or value
// fails.
func TestCardCommandsParse(t *testing.T) {
	cards, err := filepath.Glob(filepath.Join(repository, "catalog", "cards", "*.md"))
	if err != nil || len(cards) == 0 {
		t.Fatal(cards, err)
	}
	for _, card := range cards {
		name := filepath.Base(card)
		text := readDocument(t, "catalog/cards/"+name)
		shell, rest := blocks(text, "sh")
		plain, _ := blocks(text, "")
		seen := 0
		for line := range strings.Lines(strings.Join(append(shell, plain...), "\n")) {
			w := words(line)
			if len(w) == 0 {
				continue
			}
			if seen++; w[0] != "lathe" {
				t.Errorf("%s: %q is no command of lathe", name, line)
			} else if err := parseCommand(w[1:]); err != nil {
				t.Errorf("%s: %q: %v", name, strings.TrimSpace(line), err)
			}
		}
		if seen == 0 {
			t.Errorf("%s: has no example command", name)
		}
		for _, m := range inlineCommand.FindAllStringSubmatch(rest, -1) {
			if err := parseCommand(words(m[1])[1:]); err != nil {
				t.Errorf("%s: %q: %v", name, m[1], err)
			}
		}
		for line := range strings.Lines(rest) {
			if use, ok := strings.CutPrefix(line, "use: lathe "); ok {
				use, _, _ = strings.Cut(use, ": ")
				if err := parseCommand(words(use)); err != nil {
					t.Errorf("%s: %q: %v", name, use, err)
				}
			}
		}
	}
}

// parseCommand finds the verb, parses its flags and checks its arguments, without running it.
func parseCommand(args []string) error {
	root := newRootCommand(&app{args: args, stdin: strings.NewReader(""), stdout: io.Discard, stderr: io.Discard})
	cmd, rest, err := root.Find(args)
	switch {
	case err != nil:
		return err
	case cmd == root:
		return unknownVerb(root, args[0])
	}
	if err := cmd.ParseFlags(rest); err != nil {
		return flagError(cmd, err)
	}
	positional := cmd.Flags().Args()
	if err := cmd.ValidateArgs(positional); err != nil {
		return err
	}
	if err := cmd.ValidateRequiredFlags(); err != nil {
		return err
	}
	if err := cmd.ValidateFlagGroups(); err != nil {
		return err
	}
	accepted := func(f cobra.CompletionFunc) (names []string) {
		list, _ := f(cmd, nil, "")
		for _, v := range list {
			v, _, _ = strings.Cut(v, "\t")
			names = append(names, v)
		}
		return names
	}
	cmd.Flags().Visit(func(f *pflag.Flag) {
		if complete, ok := cmd.GetFlagCompletionFunc(f.Name); ok && err == nil {
			if values := accepted(complete); len(values) > 0 && !slices.Contains(values, f.Value.String()) {
				err = fmt.Errorf("--%s %s: accepted are %s", f.Name, f.Value, strings.Join(values, ", "))
			}
		}
	})
	if cmd.Name() == "try" || cmd.Name() == "show" {
		for _, a := range positional {
			if _, e := findCard(a); e != nil && err == nil && a != "METHOD" {
				err = e
			}
		}
	}
	return err
}

func TestParseCommandRefuses(t *testing.T) {
	for _, c := range []struct{ command, want string }{
		{"compres x --method minmax", "did you mean"},
		{"compress x --methd minmax", "did you mean --method"},
		{"compress x --method minmx", "accepted are"},
		{"compress x --bits four", "invalid"},
		{"compress", "needs a model"},
		{"train --arch vit", "required"},
		{"try sfot-nms", "did you mean"},
		{"upscale export --scale 2 --model m.safetensors -o x.onnx", "scale"},
	} {
		if err := parseCommand(strings.Fields(c.command)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("lathe %s: %v, want an error with %q", c.command, err, c.want)
		}
	}
}

// snippetPackages are the packages that snippets of Go in the documents may use, by their names there.
var snippetPackages = map[string]string{
	"context": "context",
	"compute": "github.com/gomlx/compute", "dtypes": "github.com/gomlx/compute/dtypes", "shapes": "github.com/gomlx/compute/shapes",
	"graph": "github.com/gomlx/gomlx/core/graph", "tensors": "github.com/gomlx/gomlx/core/tensors",
	"batchsize": "github.com/lathe-ml/lathe/learn/batchsize", "compress": "github.com/lathe-ml/lathe/compress", "quant": "github.com/lathe-ml/lathe/compress/quant",
	"curate": "github.com/lathe-ml/lathe/data/curate", "data": "github.com/lathe-ml/lathe/data", "detect": "github.com/lathe-ml/lathe/task/detect",
	"engine": "github.com/lathe-ml/lathe/engine", "learn": "github.com/lathe-ml/lathe/learn", "nn": "github.com/lathe-ml/lathe/nn",
	"fold": "github.com/lathe-ml/lathe/nn/fold", "norm": "github.com/lathe-ml/lathe/design/norm",
	"onnx": "github.com/lathe-ml/lathe/nn/onnx", "optim": "github.com/lathe-ml/lathe/learn/optim", "restore": "github.com/lathe-ml/lathe/task/restore",
	"safetensors": "github.com/lathe-ml/lathe/nn/safetensors", "zoo": "github.com/lathe-ml/lathe/nn/zoo",
}

// The README's Go compiles as it is, given the values that it takes for granted. A card's snippet is a selection of
// calls on the reader's own values, so names that it does not define are let pass; packages, functions, fields and
// numbers of arguments must exist.
func TestGoSnippetsCompile(t *testing.T) {
	imports := exportData(t)
	readme, _ := blocks(readDocument(t, "README.md"), "go")
	if len(readme) == 0 {
		t.Error("the README has no Go")
	}
	for i, code := range readme {
		for _, err := range typeCheck(imports, code, "ctx context.Context, backend compute.Backend, calibration compress.Examples") {
			t.Errorf("README.md, block %d: %v", i+1, err)
		}
	}
	cards, err := filepath.Glob(filepath.Join(repository, "catalog", "cards", "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	own := regexp.MustCompile(`^undefined: \w+$`)
	for _, card := range cards {
		snippets, _ := blocks(readDocument(t, "catalog/cards/"+filepath.Base(card)), "go")
		for _, code := range snippets {
			for _, err := range typeCheck(imports, code, "") {
				if e, ok := err.(types.Error); !ok || !e.Soft && !own.MatchString(e.Msg) {
					t.Errorf("%s: %v", filepath.Base(card), err)
				}
			}
		}
	}
	for code, want := range map[string]string{
		"err := quant.RepQVit{}.Compress()":         "undefined: quant.RepQVit",
		"x := quant.RepQViT{WeightBit: 4}":          "unknown field WeightBit",
		"r, err := quant.RepQViT{}.Compress(ctx)":   "not enough arguments",
		"net, err := onnx.ReadFile(\"vit.onnx\" 3)": "missing ','",
	} {
		if errs := typeCheck(imports, code, "ctx context.Context"); !strings.Contains(fmt.Sprint(errs), want) {
			t.Errorf("%s: %v, want %q", code, errs, want)
		}
	}
}

// exportData lists the compiled packages that snippets may need; the go command has them from building this test.
func exportData(t *testing.T) map[string]string {
	t.Helper()
	tool, err := exec.LookPath("go")
	if err != nil {
		t.Skip("needs the go command")
	}
	args := []string{"list", "-export", "-deps", "-f", "{{.ImportPath}} {{.Export}}"}
	for _, p := range snippetPackages {
		args = append(args, p)
	}
	cmd := exec.Command(tool, args...)
	cmd.Dir = repository
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, errs.String())
	}
	files := map[string]string{}
	for s := bufio.NewScanner(bytes.NewReader(out)); s.Scan(); {
		if path, file, ok := strings.Cut(s.Text(), " "); ok && file != "" {
			files[path] = file
		}
	}
	return files
}

// typeCheck checks statements in a function of those parameters that returns err, if they define it.
func typeCheck(exports map[string]string, code, params string) (errs []error) {
	var src strings.Builder
	src.WriteString("package p\n")
	seen := map[string]bool{}
	for _, m := range usedPackage.FindAllStringSubmatch(params+"\n"+code, -1) {
		if path := snippetPackages[m[1]]; path != "" && !seen[path] {
			seen[path] = true
			fmt.Fprintf(&src, "import %q\n", path)
		}
	}
	fmt.Fprintf(&src, "func _(%s) error {\n%s\nreturn err\n}\n", params, code)
	fset := token.NewFileSet()
	file, err := parser.ParseFile(fset, "snippet.go", src.String(), 0)
	if err != nil {
		return []error{err}
	}
	c := types.Config{
		Error: func(err error) { errs = append(errs, err) },
		Importer: importer.ForCompiler(fset, "gc", func(path string) (io.ReadCloser, error) {
			if exports[path] == "" {
				return nil, fmt.Errorf("no export data of %q", path)
			}
			return os.Open(exports[path])
		}),
	}
	_, _ = c.Check("p", fset, []*ast.File{file}, nil)
	return errs
}

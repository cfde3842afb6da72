package pages

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/lathe-ml/lathe/catalog"
	"github.com/lathe-ml/lathe/lab"
)

// measured returns a result of the method with one claim that holds and one that fails.
func measured(t *testing.T, method string) *lab.Result {
	t.Helper()
	arm := func(name string, base float64) lab.Arm {
		return lab.Arm{Name: name, Baseline: name == "base", Run: func(_ context.Context, t *lab.Trial) error {
			t.Record("accuracy", base+float64(t.Seed)/10)
			return nil
		}}
	}
	diff := func(m lab.Metrics) float64 { return m.Get("method", "accuracy") - m.Get("base", "accuracy") }
	r, err := lab.Run(context.Background(), lab.Experiment{
		Method: method, Title: "a | title", Arms: []lab.Arm{arm("base", 80), arm("method", 87)},
		Claims: []lab.Claim{{ID: "C1", Text: "x < y | z", Paper: "+35.9", Unit: "points", Measure: diff, Bound: lab.AtLeast(5)}, {ID: "C2", Text: "more", Measure: diff, Bound: lab.AtLeast(10)}},
	}, lab.Options{Scale: lab.Full})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestWrite(t *testing.T) {
	cards, err := catalog.All()
	if err != nil {
		t.Fatal(err)
	}
	id := cards[0].ID
	root := t.TempDir()
	readme := filepath.Join(root, "README.md")
	os.WriteFile(readme, []byte("# Lathe\n\n"+Begin+"\nstale\n"+End+"\n\nend\n"), 0o644)
	if _, err := measured(t, id).Save(filepath.Join(root, "docs", "results")); err != nil {
		t.Fatal(err)
	}
	would, err := Write(root, true)
	if err != nil || len(would) != len(cards)+2 {
		t.Fatalf("check: %v, %v", would, err)
	}
	if _, err := os.Stat(filepath.Join(root, "docs", "methods")); err == nil {
		t.Error("a check wrote files")
	}
	changed, err := Write(root, false)
	if err != nil || !slices.Equal(changed, would) {
		t.Fatalf("%v, %v", changed, err)
	}
	if again, err := Write(root, false); err != nil || len(again) != 0 {
		t.Errorf("a second time changes %v, %v", again, err)
	}
	page, _ := os.ReadFile(filepath.Join(root, "docs", "methods", id+".md"))
	for _, want := range []string{"1 holds, 1 fails", "| **C1** x &lt; y \\| z | **holds** | 7 points (7 … 7) | ≥ 5 points | 2 | +35.9 |", "| **C2** more | **fails** |", "| method | accuracy | 87.1 ± 0.1 |"} {
		if !strings.Contains(string(page), want) {
			t.Errorf("the page lacks %q:\n%s", want, page)
		}
	}
	text, _ := os.ReadFile(readme)
	if s := string(text); strings.Contains(s, "stale") || !strings.Contains(s, "| 1 holds, 1 fails | C2 |") || !strings.HasPrefix(s, "# Lathe\n\n"+Begin) || !strings.HasSuffix(s, End+"\n\nend\n") {
		t.Errorf("README: %s", text)
	}
	index, _ := os.ReadFile(filepath.Join(root, "docs", "methods", "README.md"))
	if !strings.Contains(string(index), "["+cards[0].Name+"]("+id+".md)") {
		t.Errorf("index: %s", index)
	}
}

func TestWriteRefuses(t *testing.T) {
	root := t.TempDir()
	if _, err := measured(t, "no-such-method").Save(filepath.Join(root, "docs", "results")); err != nil {
		t.Fatal(err)
	}
	if _, err := Write(root, false); err == nil || !strings.Contains(err.Error(), "no-such-method") {
		t.Errorf("a result without a card: %v", err)
	}
	os.RemoveAll(filepath.Join(root, "docs"))
	os.WriteFile(filepath.Join(root, "README.md"), []byte(End+Begin), 0o644)
	if _, err := Write(root, false); err == nil || !strings.Contains(err.Error(), "must stand before") {
		t.Errorf("marks in the wrong order: %v", err)
	}
}

package pages

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/lathe-ml/lathe/lab/bench"
)

// TestWritePerformance: the measured part of docs/performance.md comes from its file, and what people wrote around it
// stays.
func TestWritePerformance(t *testing.T) {
	root := t.TempDir()
	docs := filepath.Join(root, "docs")
	page := filepath.Join(docs, "performance.md")
	if err := os.Mkdir(docs, 0o755); err != nil {
		t.Fatal(err)
	}
	r := &bench.Result{
		Date: "2000-01-01", Rounds: 2, Steps: 3, Contestants: []string{"native", "pytorch"},
		Machines: []bench.Machine{{Threads: 1, FMA: 1e11, Bandwidth: 1e10}},
		Work:     []bench.Work{{Network: "vit", What: "a ViT", FLOPs: 1e9, Bytes: 1e6}},
		Rows: []bench.Row{
			{Network: "vit", Threads: 1, Contestant: "native", CPU: 20, Wall: 20, Ratio: 1, Low: 1, High: 1, Share: .5},
			{Network: "vit", Threads: 1, Contestant: "pytorch", CPU: 30, Wall: 31, Ratio: 1.5, Low: 1.4, High: 1.6, Share: .3},
		},
	}
	if err := r.WriteFile(filepath.Join(docs, "performance.json")); err != nil {
		t.Fatal(err)
	}
	os.WriteFile(page, []byte("no marks"), 0o644)
	if _, err := Write(root, false); err == nil || !strings.Contains(err.Error(), "docs/performance.md") {
		t.Errorf("a page without marks: %v", err)
	}
	os.WriteFile(page, []byte("before\n"+Begin+"stale"+End+"after\n"), 0o644)
	changed, err := Write(root, false)
	if err != nil || !slices.Contains(changed, "docs/performance.md") {
		t.Fatalf("%v, %v", changed, err)
	}
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	if s := string(text); !strings.HasPrefix(s, "before\n") || !strings.HasSuffix(s, "after\n") || strings.Contains(s, "stale") || !strings.Contains(s, "| vit | 1.50 (1.40 … 1.60) |") {
		t.Errorf("%s", s)
	}
	os.WriteFile(filepath.Join(docs, "performance.json"), []byte("{"), 0o644)
	if _, err := Write(root, true); err == nil || !strings.Contains(err.Error(), "performance.json") {
		t.Errorf("a broken file: %v", err)
	}
}

package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/lab/normtable"
)

func TestNormsComparesOnTheUsersText(t *testing.T) {
	ownStore(t)
	dir := t.TempDir()
	text := filepath.Join(dir, "text.txt")
	if err := os.WriteFile(text, []byte(strings.Repeat("the quick brown fox jumps over the lazy dog. ", 60)), 0o644); err != nil {
		t.Fatal(err)
	}
	table, page := filepath.Join(dir, "table.json"), filepath.Join(dir, "table.html")
	args := []string{"norms", "--arch", "decoder", "--data", text, "--norms", "rms,power-plain@post,group", "--steps", "12", "--depth", "2", "--width", "16", "--context", "8", "--report", page, "-o", table, "--json"}
	code, out, errs := lathe(t, args...)
	if code != 0 {
		t.Fatalf("exit %d: %s", code, errs)
	}
	var got normtable.Table
	if err := json.Unmarshal([]byte(out), &got); err != nil {
		t.Fatal(err)
	}
	if len(got.Rows) != 3 || !strings.Contains(got.Rows[2].Error, "would see the text") || got.Rows[1].Scheme != "post" || got.Rows[1].Folded == 0 || !(got.Rows[0].Loss > 0) || len(got.Rows[0].Gradients) != 2 {
		t.Errorf("%+v", got.Rows)
	}
	for _, f := range []string{table, page} {
		if st, err := os.Stat(f); err != nil || st.Size() == 0 {
			t.Errorf("%s: %v", f, err)
		}
	}
	again, out2, errs := lathe(t, args...) // nothing is trained again
	if again != 0 {
		t.Fatalf("exit %d: %s", again, errs)
	}
	var same normtable.Table
	if err := json.Unmarshal([]byte(out2), &same); err != nil || same.Rows[0].Loss != got.Rows[0].Loss {
		t.Errorf("a second run: loss %g, first %g (%v)", same.Rows[0].Loss, got.Rows[0].Loss, err)
	}
}

func TestNormsComparesOnDigits(t *testing.T) {
	data.RequireTest(t, "digits")
	ownStore(t)
	code, out, errs := lathe(t, "norms", "--arch", "mlp", "--data", "digits", "--norms", "none,batch", "--steps", "10", "--batch", "32")
	if code != 0 || !strings.Contains(out, "accuracy") || !strings.Contains(out, "batch") {
		t.Errorf("exit %d: %s%s", code, out, errs)
	}
}

func TestNormsRefuses(t *testing.T) {
	for _, c := range []struct{ args, want string }{
		{"--arch rnn", "--arch"},
		{"--norms layers", "layers"},
		{"--arch mlp --norms layer@post", "fixed places"},
		{"--width 10", "multiple of 8"},
		{"--steps 0", "--steps"},
		{"--lr -1", "--lr"},
		{"--norms layer@sideways", "sideways"},
		{"--arch decoder --data /no/such/file", "no such file"},
	} {
		code, _, errs := lathe(t, append([]string{"norms"}, strings.Fields(c.args)...)...)
		if code == 0 || !strings.Contains(errs, c.want) {
			t.Errorf("%s: exit %d: %s", c.args, code, errs)
		}
	}
}

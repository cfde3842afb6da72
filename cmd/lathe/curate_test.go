package main

import (
	"bytes"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"image"
	"image/color"
	"image/png"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/lathe-ml/lathe/data"
)

// curateCommand runs lathe and returns its exit code and what it wrote.
func curateCommand(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, err bytes.Buffer
	code = run(append([]string{"curate"}, args...), strings.NewReader(""), &out, &err)
	return code, out.String(), err.String()
}

// writeFeatures writes 60 rows around three directions and their labels.
func writeFeatures(t *testing.T) (dir string) {
	t.Helper()
	dir = t.TempDir()
	x := make([]float32, 60*4)
	labels := "row,label\n"
	numbers := make([]int64, 60)
	for i := range 60 {
		for j := range 4 {
			x[4*i+j] = float32(0.2 * math.Sin(float64(7*i+3*j)))
		}
		x[4*i+i%3] += 2
		labels += fmt.Sprintf("%d,%s\n", i, []string{"cat", "dog", "emu"}[i%3])
		numbers[i] = int64(i % 3)
	}
	for name, write := range map[string]func(path string) error{
		"x.npy": func(p string) error { return data.WriteNPYFile(p, []int{60, 4}, x) },
		"y.npy": func(p string) error { return data.WriteNPYFile(p, []int{60}, numbers) },
		"y.csv": func(p string) error { return os.WriteFile(p, []byte(labels[len("row,label\n"):]), 0o644) },
		"one.csv": func(p string) error {
			return os.WriteFile(p, []byte("label\n"+strings.Repeat("cat\ndog\nemu\n", 20)), 0o644)
		},
		"short.csv": func(p string) error { return os.WriteFile(p, []byte("cat\ndog\n"), 0o644) },
	} {
		if err := write(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func readRanking(t *testing.T, path string) (rows [][]string, kept int) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	rows, err = csv.NewReader(bytes.NewReader(b)).ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	if h := strings.Join(rows[0], ","); h != "index,file,score,cluster,kept" {
		t.Errorf("header is %s", h)
	}
	seen := map[string]bool{}
	for i, r := range rows[1:] {
		if seen[r[0]] {
			t.Errorf("index %s appears twice", r[0])
		}
		seen[r[0]] = true
		if r[4] == "1" {
			kept++
		}
		if i > 0 {
			a, _ := strconv.ParseFloat(rows[i][2], 64)
			b, _ := strconv.ParseFloat(r[2], 64)
			if b > a {
				t.Errorf("line %d has a higher score than the one before", i+2)
			}
		}
	}
	return rows[1:], kept
}

func TestCurateRanksFeatures(t *testing.T) {
	dir := writeFeatures(t)
	out := filepath.Join(dir, "ranked.csv")
	x := filepath.Join(dir, "x.npy")
	for _, c := range [][]string{
		{"--keep", "0.7", "--clusters", "3"},
		{"--method", "random"},
		{"--method", "el2n", "--labels", filepath.Join(dir, "y.csv")},
		{"--method", "supervised-prototypes", "--labels", filepath.Join(dir, "y.npy")},
		{"--method", "forgetting", "--labels", filepath.Join(dir, "one.csv")},
		{"--method", "influence-max", "--labels", filepath.Join(dir, "y.csv"), "--test", x, "--test-labels", filepath.Join(dir, "y.csv"), "--models", "4"},
	} {
		code, stdout, stderr := curateCommand(t, append([]string{x, "-o", out}, c...)...)
		if code != exitDone {
			t.Fatalf("%v: exit %d: %s", c, code, stderr)
		}
		rows, kept := readRanking(t, out)
		if len(rows) != 60 || kept != 42 {
			t.Errorf("%v: %d rows, %d kept, want 60 and 42", c, len(rows), kept)
		}
		if !strings.Contains(stdout, "70 %") {
			t.Errorf("%v: the summary does not say what was kept:\n%s", c, stdout)
		}
	}

	code, stdout, stderr := curateCommand(t, x, "--labels", filepath.Join(dir, "y.csv"), "--keep", "0.5", "--balance", "1", "--mode", "auto", "--json")
	if code != exitDone {
		t.Fatal(stderr)
	}
	var r curateReport
	if err := json.Unmarshal([]byte(stdout), &r); err != nil {
		t.Fatal(err)
	}
	if r.Kept != 30 || r.Mode.String() != "easy" || len(r.Groups) != 3 || r.Groups[1].Name != "dog" || r.Groups[1].Kept != 10 {
		t.Errorf("report: %+v", r)
	}
}

func TestCurateRanksAFolderOfPictures(t *testing.T) {
	dir := t.TempDir()
	for i := range 12 {
		m := image.NewGray(image.Rect(0, 0, 20+i, 30))
		for p := range m.Pix {
			m.SetGray(p%m.Stride, p/m.Stride, color.Gray{Y: uint8(p * (i + 1) / 20)})
		}
		var b bytes.Buffer
		if err := png.Encode(&b, m); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("%c,%d.png", 'a'+i, i)), b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	out := filepath.Join(t.TempDir(), "r.csv")
	if code, _, stderr := curateCommand(t, dir, "--keep", "0.5", "--clusters", "3", "-o", out); code != exitDone {
		t.Fatal(stderr)
	}
	rows, kept := readRanking(t, out)
	if len(rows) != 12 || kept != 6 || !strings.HasSuffix(rows[0][1], ".png") || rows[0][3] == "" {
		t.Errorf("%d rows, %d kept, first %v", len(rows), kept, rows[0])
	}
	if err := os.WriteFile(filepath.Join(dir, "z.png"), []byte("\x89PNG\r\n\x1a\n broken"), 0o644); err != nil {
		t.Fatal(err)
	}
	if code, _, stderr := curateCommand(t, dir); code != exitFailed || !strings.Contains(stderr, "z.png") {
		t.Errorf("a broken picture: exit %d, %s", code, stderr)
	}
}

func TestCurateRefuses(t *testing.T) {
	dir := writeFeatures(t)
	x := filepath.Join(dir, "x.npy")
	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{nil, exitUsage, "one feature file"},
		{[]string{x, "--keep", "0"}, exitUsage, "--keep 0"},
		{[]string{x, "--balance", "3"}, exitUsage, "--balance 3"},
		{[]string{x, "--mode", "soft"}, exitUsage, "hard, easy, auto"},
		{[]string{x, "--method", "protoypes"}, exitUsage, "did you mean prototypes"},
		{[]string{x, "--method", "el2n"}, exitUsage, "needs --labels"},
		{[]string{x, "--clusters", "-1"}, exitUsage, "--clusters -1"},
		{[]string{x, "--test", x}, exitUsage, "go together"},
		{[]string{x, "--json", "-o", "-"}, exitUsage, "standard output"},
		{[]string{x, "--clusters", "61"}, exitFailed, "61 clusters of 60"},
		{[]string{x, "--labels", filepath.Join(dir, "short.csv")}, exitFailed, "2 labels for 60"},
		{[]string{filepath.Join(dir, "y.npy")}, exitFailed, "[examples, features]"},
		{[]string{filepath.Join(dir, "none.npy")}, exitFailed, "none.npy"},
		{[]string{filepath.Join(dir)}, exitFailed, "no picture"},
		{[]string{"theory", "--keep", "2"}, exitUsage, "keep 2"},
		{[]string{"theory", "--angle", "95"}, exitUsage, "angle"},
	} {
		code, _, stderr := curateCommand(t, c.args...)
		if code != c.code || !strings.Contains(stderr, c.want) {
			t.Errorf("%v: exit %d, %q; want exit %d with %q", c.args, code, stderr, c.code, c.want)
		}
	}
}

func TestCurateTheory(t *testing.T) {
	code, stdout, stderr := curateCommand(t, "theory", "--alpha", "20", "--keep", "0.2")
	if code != exitDone || !strings.Contains(stdout, "2.502 %") || !strings.Contains(stdout, "11.37 %") {
		t.Errorf("exit %d: %s%s", code, stdout, stderr)
	}
}

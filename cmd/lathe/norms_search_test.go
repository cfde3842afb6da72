package main

import (
	"bytes"
	"context"
	"encoding/json"
	"image"
	"image/color"
	"image/png"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/lathe-ml/lathe/internal/rng"
)

// runNormsSearch runs the command by itself.
func runNormsSearch(ctx context.Context, args ...string) (stdout, stderr string, err error) {
	var out, errs bytes.Buffer
	a := &app{args: args, stdout: &out, stderr: &errs, backendName: "go"}
	cmd := newNormsSearchCommand(a)
	cmd.Flags().BoolVar(&a.json, "json", false, "")
	cmd.SetArgs(args)
	cmd.SilenceUsage, cmd.SilenceErrors = true, true
	err = cmd.ExecuteContext(ctx)
	return out.String(), errs.String(), err
}

// writePictures makes two classes of small pictures: dark and bright ones.
func writePictures(t *testing.T, dir string, each int) {
	t.Helper()
	r := rng.New(1, "pictures")
	for c, class := range []string{"bright", "dark"} {
		if err := os.MkdirAll(filepath.Join(dir, class), 0o755); err != nil {
			t.Fatal(err)
		}
		for i := range each {
			img := image.NewGray(image.Rect(0, 0, 6, 6))
			for k := range img.Pix {
				img.Pix[k] = uint8(180 - 130*c + r.IntN(60))
			}
			img.Set(i%6, 0, color.Gray{Y: 90})
			var b bytes.Buffer
			if err := png.Encode(&b, img); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, class, string(rune('a'+i%26))+string(rune('a'+i/26))+".png"), b.Bytes(), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestNormsSearchFindsWritesAndProlongs(t *testing.T) {
	dir := t.TempDir()
	writePictures(t, filepath.Join(dir, "pictures"), 40)
	layer := filepath.Join(dir, "layer.json")
	args := []string{
		"--images", filepath.Join(dir, "pictures"), "--size", "4", "--width", "2", "--batch", "8", "--steps", "20", "--final", "1",
		"--proposals", "40", "--seed", "4", "-o", layer, "--report", filepath.Join(dir, "search.html"), "--json",
	}
	out, _, err := runNormsSearch(context.Background(), args...)
	if err != nil {
		t.Fatal(err)
	}
	var r normsSearchResult
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatal(err)
	}
	if r.Proposals != 40 || len(r.Ranked) == 0 || len(r.Front) == 0 || len(r.Best.Final) != 3 || len(r.Baseline.Final) != 3 || r.Verdicts["accepted"] == 0 {
		t.Errorf("got %+v", r)
	}
	n, isFile, err := normFromFile(layer)
	if err != nil || !isFile || n.Kind() != "layergraph" {
		t.Errorf("%v %v %v", n, isFile, err)
	}
	html, err := os.ReadFile(filepath.Join(dir, "search.html"))
	if err != nil || strings.Count(string(html), "data:image/png") < 2 {
		t.Errorf("the report has no pictures: %v", err)
	}

	// The same command with more proposals goes on, and judges nothing again.
	args[13] = "44"
	if out, _, err = runNormsSearch(context.Background(), args...); err != nil {
		t.Fatal(err)
	}
	var longer normsSearchResult
	if err := json.Unmarshal([]byte(out), &longer); err != nil || longer.Proposals != 44 {
		t.Errorf("prolonged: %v, %v", longer.Proposals, err)
	}
	// Another search does not take its archive.
	args[15] = "5"
	if _, _, err := runNormsSearch(context.Background(), args...); err == nil || !strings.Contains(err.Error(), "other options") {
		t.Errorf("got %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, _, err := runNormsSearch(ctx, append(args, "--fresh")...); err == nil {
		t.Error("a stopped search succeeded")
	}
}

func TestNormsSearchRefusals(t *testing.T) {
	dir := t.TempDir()
	writePictures(t, dir, 2)
	layer := filepath.Join(dir, "x.json")
	for name, c := range map[string]struct {
		args []string
		want string
	}{
		"output":      {[]string{"-o", "x.txt"}, ".json"},
		"folder":      {[]string{"-o", filepath.Join(dir, "none", "x.json")}, "folder"},
		"space":       {[]string{"-o", layer, "--space", "c"}, "space"},
		"both":        {[]string{"-o", layer, "--data", "digits", "--images", dir}, "one of them"},
		"labels":      {[]string{"-o", layer, "--labels", "x.csv"}, "--images"},
		"no end":      {[]string{"-o", layer, "--minutes", "0"}, "end the search"},
		"size":        {[]string{"-o", layer, "--size", "2"}, "--size"},
		"rate":        {[]string{"-o", layer, "--lr", "-1"}, "--lr"},
		"few images":  {[]string{"-o", layer, "--images", dir}, "--batch"},
		"no folder":   {[]string{"-o", layer, "--images", filepath.Join(dir, "none")}, "none"},
		"one class":   {[]string{"-o", layer, "--images", filepath.Join(dir, "dark")}, "subfolder"},
		"share":       {[]string{"-o", layer, "--random", "2"}, "--random"},
		"no data set": {[]string{"-o", layer, "--data", "digit"}, "digits"},
	} {
		if _, _, err := runNormsSearch(context.Background(), c.args...); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if _, isFile, err := normFromFile("layer"); isFile || err != nil {
		t.Errorf("a kind is a file: %v", err)
	}
	if _, isFile, err := normFromFile(filepath.Join(dir, "absent.json")); !isFile || err == nil {
		t.Error("an absent file was read")
	}
}

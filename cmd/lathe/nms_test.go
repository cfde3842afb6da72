package main

import (
	"bytes"
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/lathe-ml/lathe/task/detect"
)

const nmsTruth = `{"images":[{"id":42,"width":100,"height":100},{"id":7}],
"annotations":[
 {"id":1,"image_id":42,"category_id":3,"bbox":[0,0,20,20],"area":400,"iscrowd":0},
 {"id":2,"image_id":42,"category_id":3,"bbox":[10,0,20,20],"area":400,"iscrowd":0},
 {"id":3,"image_id":7,"category_id":9,"bbox":[50,50,40,40],"area":1600,"iscrowd":0}],
"categories":[{"id":3,"name":"cup"},{"id":9,"name":"dog"}]}`

// Two cups that overlap by a third, each with a double, and a dog.
const nmsRaw = `[{"image_id":42,"category_id":3,"bbox":[0,0,20,20],"score":0.9,"track":"a"},
 {"image_id":42,"category_id":3,"bbox":[1,0,20,20],"score":0.5},
 {"image_id":42,"category_id":3,"bbox":[10,0,20,20],"score":0.8},
 {"image_id":7,"category_id":9,"bbox":[50,50,40,40],"score":0.7}]`

func nms(t *testing.T, stdin string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = run(append([]string{"nms"}, args...), strings.NewReader(stdin), &out, &errs)
	return code, out.String(), errs.String()
}

func nmsFiles(t *testing.T) (raw, truth, out string) {
	t.Helper()
	dir := t.TempDir()
	raw, truth, out = filepath.Join(dir, "raw.json"), filepath.Join(dir, "gt.json"), filepath.Join(dir, "out.json")
	for path, s := range map[string]string{raw: nmsRaw, truth: nmsTruth} {
		if err := os.WriteFile(path, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return raw, truth, out
}

func TestNMSKeepsTheNeighbourThatGreedyLoses(t *testing.T) {
	raw, truth, out := nmsFiles(t)
	code, stdout, stderr := nms(t, "", raw, "--gt", truth, "-o", out, "--json")
	if code != exitDone {
		t.Fatalf("exit code %d: %s", code, stderr)
	}
	var r nmsReport
	if err := json.Unmarshal([]byte(stdout), &r); err != nil {
		t.Fatalf("%v in %s", err, stdout)
	}
	if r.Detections != 4 || r.Kept != 4 || r.Images != 2 || r.Categories != 2 {
		t.Errorf("got %+v", r)
	}
	// Greedy NMS at 0.3 removes the second cup (IoU 1/3), so that half of the cups' recall is lost.
	if math.Abs(r.After.AP-1) > 1e-9 || r.Greedy.AP > 0.8 || r.After.AR[2] != 1 || len(r.PerCategory) != 2 || r.PerCategory[0].Name != "cup" {
		t.Errorf("AP before %g, greedy %g, after %g", r.Before.AP, r.Greedy.AP, r.After.AP)
	}
	dets, err := detect.ReadCOCODetectionsFile(out)
	if err != nil {
		t.Fatal(err)
	}
	if dets[0].ImageID != 42 || dets[0].Score != 0.9 || string(dets[0].Extra["track"]) != `"a"` || math.Abs(dets[1].Score-0.8*math.Exp(-1./9/0.5)) > 1e-9 {
		t.Errorf("wrote %v", dets)
	}

	code, stdout, _ = nms(t, "", raw, "--gt", truth, "--per-category", "--method", "linear")
	for _, want := range []string{"linear, beyond an overlap of 0.3: 4 kept", "NMS 0.3", "AR100", "cup", "dog"} {
		if code != exitDone || !strings.Contains(stdout, want) {
			t.Errorf("exit code %d, %q is not in\n%s", code, want, stdout)
		}
	}
}

func TestNMSReadsAndWritesStreams(t *testing.T) {
	code, stdout, stderr := nms(t, nmsRaw, "-", "--method", "hard", "-o", "-")
	if code != exitDone {
		t.Fatalf("exit code %d: %s", code, stderr)
	}
	dets, err := detect.ReadCOCODetections(strings.NewReader(stdout))
	if err != nil || len(dets) != 2 {
		t.Errorf("wrote %v (%v), want the first cup and the dog", dets, err)
	}
}

func TestNMSRefuses(t *testing.T) {
	raw, truth, out := nmsFiles(t)
	other := filepath.Join(t.TempDir(), "other.json")
	if err := os.WriteFile(other, []byte(strings.ReplaceAll(nmsRaw, `"image_id":7`, `"image_id":8`)), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{}, exitUsage, "one file of detections"},
		{[]string{raw, "--method", "softest"}, exitUsage, "gaussian, linear, hard"},
		{[]string{raw, "--sigma", "0"}, exitUsage, "--sigma 0"},
		{[]string{raw, "--sigma", "NaN"}, exitUsage, "--sigma"},
		{[]string{raw, "--iou-threshold", "1.5"}, exitUsage, "--iou-threshold 1.5"},
		{[]string{raw, "--score-threshold", "-1"}, exitUsage, "--score-threshold"},
		{[]string{raw, "--top-k", "0"}, exitUsage, "--top-k 0"},
		{[]string{raw, "--sigm", "1"}, exitUsage, "did you mean --sigma"},
		{[]string{raw, "--per-category"}, exitUsage, "needs --gt"},
		{[]string{raw, "--json", "-o", "-"}, exitUsage, "standard output"},
		{[]string{truth, "-o", out}, exitFailed, "not a list of detections"},
		{[]string{raw, "--gt", raw, "-o", out}, exitFailed, raw},
		{[]string{raw + "x", "-o", out}, exitFailed, "no such file"},
		{[]string{other, "--gt", truth, "-o", out}, exitFailed, "no image with the id 8"},
		{[]string{raw, "-o", filepath.Join(out, "no", "folder.json")}, exitFailed, "folder"},
	} {
		code, _, stderr := nms(t, "", c.args...)
		if code != c.code || !strings.Contains(stderr, c.want) {
			t.Errorf("%v: exit code %d with %q, want %d with %q", c.args, code, stderr, c.code, c.want)
		}
	}
	if _, err := os.Stat(out); err == nil {
		t.Error("a refused input left an output file")
	}
}

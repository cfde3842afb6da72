package detect

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

const truth = `{"info":{"year":2024},
"images":[{"id":139,"file_name":"a.jpg","width":640,"height":480,"coco_url":"http://x"},{"id":7,"file_name":"b.jpg"}],
"annotations":[
 {"id":1,"image_id":139,"category_id":3,"bbox":[10,20,30.5,40],"area":900.25,"iscrowd":0,"segmentation":[[1,2,3]]},
 {"id":2,"image_id":7,"category_id":90,"bbox":[0,0,5,5],"iscrowd":1}],
"categories":[{"id":3,"name":"car","supercategory":"vehicle"},{"id":90,"name":"toothbrush"}]}`

const results = `[{"image_id":139,"category_id":3,"bbox":[10,20,30.1,40.7],"score":0.987654321,"id":5},
 {"image_id":7,"category_id":90,"bbox":[0.1,0.2,5,5],"score":0.3}]`

func TestCOCODetectionsRoundTrip(t *testing.T) {
	dets, err := ReadCOCODetections(strings.NewReader(results))
	if err != nil {
		t.Fatal(err)
	}
	want := COCODetection{139, 3, Rect{10, 20, 30.1, 40.7}, 0.987654321, map[string]json.RawMessage{"id": json.RawMessage("5")}}
	if !reflect.DeepEqual(dets[0], want) {
		t.Errorf("read %v, want %v", dets[0], want)
	}
	var b bytes.Buffer
	if err := WriteCOCODetections(&b, dets); err != nil {
		t.Fatal(err)
	}
	again, err := ReadCOCODetections(&b)
	if err != nil || !reflect.DeepEqual(dets, again) {
		t.Errorf("reading what was written gives %v (%v), want %v", again, err, dets)
	}
}

func TestCOCODatasetRoundTrip(t *testing.T) {
	set, err := ReadCOCO(strings.NewReader(truth))
	if err != nil {
		t.Fatal(err)
	}
	if a := set.Annotations; a[0].Area != 900.25 || a[0].Crowd || a[1].Area != 25 || !a[1].Crowd {
		t.Errorf("annotations are %v", a)
	}
	var b bytes.Buffer
	if err := WriteCOCO(&b, set); err != nil {
		t.Fatal(err)
	}
	if !json.Valid(b.Bytes()) {
		t.Fatalf("wrote invalid JSON: %s", b.Bytes())
	}
	again, err := ReadCOCO(&b)
	if err != nil || !reflect.DeepEqual(set, again) {
		t.Errorf("reading what was written gives %+v (%v), want %+v", again, err, set)
	}
}

func TestSuppressCOCOKeepsIdsAndFields(t *testing.T) {
	dets, err := ReadCOCODetections(strings.NewReader(
		`[{"image_id":-5,"category_id":1000000007,"bbox":[0,0,10,10],"score":0.9,"track":"a"},
		  {"image_id":8,"category_id":2,"bbox":[0,0,10,10],"score":0.95},
		  {"image_id":-5,"category_id":1000000007,"bbox":[0,0,10,5],"score":0.8}]`))
	if err != nil {
		t.Fatal(err)
	}
	out, err := SuppressCOCO(dets, SoftNMSConfig{Method: Linear})
	if err != nil {
		t.Fatal(err)
	}
	if len(out) != 3 || out[0].ImageID != -5 || out[1].ImageID != -5 || out[2].ImageID != 8 {
		t.Fatalf("got %v; want all three, the image -5 first", out)
	}
	if string(out[0].Extra["track"]) != `"a"` || out[1].Score != 0.4 || out[1].Box != dets[2].Box {
		t.Errorf("got %v", out)
	}
}

func TestMatchMakesIdsDense(t *testing.T) {
	set, err := ReadCOCO(strings.NewReader(truth))
	if err != nil {
		t.Fatal(err)
	}
	dets, err := ReadCOCODetections(strings.NewReader(results))
	if err != nil {
		t.Fatal(err)
	}
	gt, dt, cfg, err := set.Match(dets)
	if err != nil {
		t.Fatal(err)
	}
	if cfg.Images != 2 || cfg.Classes != 2 || gt[1].Image != 1 || gt[1].Class != 1 || !gt[1].Crowd || dt[0].Image != 0 || dt[1].Class != 1 {
		t.Errorf("got %v, %v, %v", gt, dt, cfg)
	}
	if _, err := EvaluateCOCO(gt, dt, cfg); err != nil {
		t.Error(err)
	}
	dets[1].ImageID = 8
	if _, _, _, err := set.Match(dets); err == nil || !strings.Contains(err.Error(), "detections[1]: the ground truth has no image with the id 8") {
		t.Errorf("an unknown image gives %v", err)
	}
	dets[1].ImageID, dets[1].CategoryID = 7, 4
	if _, _, _, err := set.Match(dets); err == nil || !strings.Contains(err.Error(), "no category with the id 4") {
		t.Errorf("an unknown category gives %v", err)
	}
}

func TestBadDetectionFiles(t *testing.T) {
	for name, c := range map[string]struct{ file, want string }{
		"empty":       {``, "ends too early"},
		"truncated":   {results[:len(results)-20], "ends too early"},
		"cut list":    {`[{"image_id":1,"category_id":1,"bbox":[0,0,1,1],"score":1}`, "ends too early"},
		"object":      {truth, "not a list of detections"},
		"no JSON":     {`[{"image_id":1,]`, "not JSON"},
		"number":      {`[17]`, "detections[0] (ends at byte 3) is 17; want an object"},
		"list":        {`[[],[]]`, "want an object"},
		"null":        {`[null]`, "want an object"},
		"no image":    {`[{"category_id":1,"bbox":[0,0,1,1],"score":1}]`, `has no field "image_id"`},
		"no class":    {`[{"image_id":1,"bbox":[0,0,1,1],"score":1}]`, `has no field "category_id"`},
		"no box":      {`[{"image_id":1,"category_id":1,"score":1}]`, `has no field "bbox"`},
		"no score":    {`[{"image_id":1,"category_id":1,"bbox":[0,0,1,1]}]`, `has no field "score"`},
		"null score":  {`[{"image_id":1,"category_id":1,"bbox":[0,0,1,1],"score":null}]`, `has no field "score"`},
		"text id":     {`[{"image_id":"1","category_id":1,"bbox":[0,0,1,1],"score":1}]`, `field "image_id" is a string; want a whole number`},
		"half id":     {`[{"image_id":1.5,"category_id":1,"bbox":[0,0,1,1],"score":1}]`, "image_id"},
		"text score":  {`[{"image_id":1,"category_id":1,"bbox":[0,0,1,1],"score":"x"}]`, `field "score" is a string; want a number`},
		"huge score":  {`[{"image_id":1,"category_id":1,"bbox":[0,0,1,1],"score":1e999}]`, "score"},
		"three":       {`[{"image_id":1,"category_id":1,"bbox":[0,0,1],"score":1}]`, "want [x, y, width, height]"},
		"five":        {`[{"image_id":1,"category_id":1,"bbox":[0,0,1,1,1],"score":1}]`, "want [x, y, width, height]"},
		"text box":    {`[{"image_id":1,"category_id":1,"bbox":["0",0,1,1],"score":1}]`, "want [x, y, width, height]"},
		"null in box": {`[{"image_id":1,"category_id":1,"bbox":[null,0,1,1],"score":1}]`, "want [x, y, width, height]"},
		"nested box":  {`[{"image_id":1,"category_id":1,"bbox":[[0],0,1,1],"score":1}]`, "want [x, y, width, height]"},
		"huge box":    {`[{"image_id":1,"category_id":1,"bbox":[0,0,1e999,1],"score":1}]`, "want [x, y, width, height]"},
		"area":        {`[{"image_id":1,"category_id":1,"bbox":[0,0,1e200,1e200],"score":1}]`, "not finite"},
		"negative":    {`[{"image_id":1,"category_id":1,"bbox":[0,0,-1,1],"score":1}]`, "negative size"},
		"more":        {results + "[]", "more follows"},
		"deep":        {strings.Repeat("[", 20000), "detections[0]"},
	} {
		if _, err := ReadCOCODetections(strings.NewReader(c.file)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want an error with %q", name, err, c.want)
		}
	}
	if _, err := ReadCOCODetections(strings.NewReader("")); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("an empty file gives %v", err)
	}
	if d, err := ReadCOCODetections(strings.NewReader(" [ ] \n")); err != nil || len(d) != 0 {
		t.Errorf("an empty list gives %v, %v", d, err)
	}
}

func TestBadDatasetFiles(t *testing.T) {
	replace := func(old, s string) string {
		if !strings.Contains(truth, old) {
			t.Fatalf("%q is not in the example", old)
		}
		return strings.Replace(truth, old, s, 1)
	}
	for name, c := range map[string]struct{ file, want string }{
		"a list":             {results, "want {"},
		"no categories":      {`{"images":[],"annotations":[]}`, `no list "categories"`},
		"images twice":       {`{"images":[],"images":[]}`, `"images" is there twice`},
		"images object":      {`{"images":{}}`, `"images" begins with {`},
		"same image":         {replace(`"id":7,`, `"id":139,`), "images[0] and images[1] have the same id 139"},
		"same annotation":    {replace(`"id":2,`, `"id":1,`), "annotations[0] and annotations[1] have the same id 1"},
		"same category":      {replace(`{"id":90,`, `{"id":3,`), "categories[0] and categories[1] have the same id 3"},
		"unknown image":      {replace(`"image_id":7`, `"image_id":8`), "annotations[1]: there is no image with the id 8"},
		"unknown category":   {replace(`"category_id":90`, `"category_id":91`), "annotations[1]: there is no category with the id 91"},
		"negative area":      {replace(`900.25`, `-1`), "area is -1"},
		"crowd":              {replace(`"iscrowd":0`, `"iscrowd":2`), "iscrowd is 2; want 0 or 1"},
		"negative size":      {replace(`"width":640`, `"width":-640`), "width -640"},
		"no annotation id":   {replace(`"id":1,`, ``), `annotations[0]`},
		"no category id":     {replace(`"id":90,`, ``), `categories[1]`},
		"no image id":        {replace(`"id":7,`, ``), `images[1]`},
		"truncated":          {truth[:len(truth)/2], "ends too early"},
		"truncated at end":   {truth[:len(truth)-1], "ends too early"},
		"another value more": {truth + "{}", "more follows"},
	} {
		if _, err := ReadCOCO(strings.NewReader(c.file)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want an error with %q", name, err, c.want)
		}
	}
	path := filepath.Join(t.TempDir(), "gt.json")
	if err := os.WriteFile(path, []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadCOCOFile(path); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("the error %v does not name the file", err)
	}
	if _, err := ReadCOCODetectionsFile(path + "x"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a missing file gives %v", err)
	}
}

func FuzzReadCOCODetections(f *testing.F) {
	for _, s := range []string{results, "", "[", "[{}]", "[null]", results[:50], truth, `[{"image_id":1,"category_id":1,"bbox":[0,0,1,1e300],"score":1e-300}]`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		dets, err := ReadCOCODetections(bytes.NewReader(b))
		if err != nil {
			return
		}
		var w bytes.Buffer
		if err := WriteCOCODetections(&w, dets); err != nil {
			t.Fatal(err)
		}
		again, err := ReadCOCODetections(&w)
		if err != nil || len(again) != len(dets) {
			t.Fatalf("cannot read what was written: %v", err)
		}
		for i := range dets {
			a, b := dets[i], again[i]
			a.Extra, b.Extra = nil, nil
			if !reflect.DeepEqual(a, b) {
				t.Fatalf("entry %d changed from %v to %v", i, a, b)
			}
		}
		for _, m := range []Method{Gaussian, Linear, Hard} {
			if out, err := SuppressCOCO(dets, SoftNMSConfig{Method: m}); err == nil && len(out) > len(dets) {
				t.Fatal("more detections than there were")
			}
		}
	})
}

func FuzzReadCOCO(f *testing.F) {
	for _, s := range []string{truth, "", "{", "{}", truth[:100], results, `{"images":[],"annotations":[],"categories":[]}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		set, err := ReadCOCO(bytes.NewReader(b))
		if err != nil {
			return
		}
		var w bytes.Buffer
		if err := WriteCOCO(&w, set); err != nil {
			t.Fatal(err)
		}
		again, err := ReadCOCO(&w)
		if err != nil || len(again.Annotations) != len(set.Annotations) {
			t.Fatalf("cannot read what was written: %v", err)
		}
		if gt, dt, cfg, err := set.Match(nil); err != nil {
			t.Fatal(err)
		} else if _, err := EvaluateCOCO(gt, dt, cfg); err != nil {
			t.Fatal(err)
		}
	})
}

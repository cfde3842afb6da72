package catalog

import (
	"errors"
	"strings"
	"testing"
	"testing/fstest"
)

const card = `---
id: soft-nms
number: 5
name: Soft-NMS
paper: Soft-NMS: Improving Object Detection With One Line of Code
authors: N. Bodla, B. Singh
venue: ICCV 2017
arxiv: 1704.04503
family: detection
go: task/detect.SoftNMS
use: "keep neighbours that greedy suppression deletes"
---
It lowers the scores.
`

func TestParse(t *testing.T) {
	c, err := Parse(card)
	if err != nil {
		t.Fatal(err)
	}
	want := Card{"soft-nms", 5, "Soft-NMS", "Soft-NMS: Improving Object Detection With One Line of Code", "N. Bodla, B. Singh", "ICCV 2017", "1704.04503", "detection", "task/detect.SoftNMS", "keep neighbours that greedy suppression deletes", "It lowers the scores."}
	if c != want {
		t.Errorf("got %+v", c)
	}
	if c.URL() != "https://arxiv.org/abs/1704.04503" {
		t.Errorf("URL %q", c.URL())
	}
	if crlf, err := Parse(strings.ReplaceAll(card, "\n", "\r\n")); err != nil || crlf != want {
		t.Errorf("with CRLF: %+v, %v", crlf, err)
	}
}

func TestParseRefuses(t *testing.T) {
	for name, c := range map[string]struct{ old, new, want string }{
		"no head":       {"---\nid", "id", "must begin"},
		"open head":     {"\n---\nIt", "\nIt", "no closing line"},
		"missing key":   {"venue: ICCV 2017\n", "", `"venue" is missing`},
		"empty key":     {"ICCV 2017", "", `"venue" is missing`},
		"unknown key":   {"venue", "venu", `unknown key "venu"`},
		"key twice":     {"venue: ", "name: ", "given twice"},
		"no colon":      {"venue: ICCV 2017", "venue ICCV 2017", "no \"key: value\""},
		"number":        {"number: 5", "number: five", "no whole number"},
		"number below":  {"number: 5", "number: -1", "no whole number"},
		"id upper-case": {"id: soft-nms", "id: Soft NMS", "only lower-case"},
		"no text":       {"It lowers the scores.", "", "no text"},
	} {
		if _, err := Parse(strings.Replace(card, c.old, c.new, 1)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %q", name, err, c.want)
		}
	}
}

func TestFolderOfCards(t *testing.T) {
	other := strings.NewReplacer("soft-nms", "espcn", "number: 5", "number: 3").Replace(card)
	cards, err := parseDir(fstest.MapFS{"c/soft-nms.md": {Data: []byte(card)}, "c/espcn.md": {Data: []byte(other)}, "c/notes.txt": {}}, "c")
	if err != nil || len(cards) != 2 || cards[0].ID != "espcn" {
		t.Errorf("%v, %v", cards, err)
	}
	if _, err := parseDir(fstest.MapFS{"c/nms.md": {Data: []byte(card)}}, "c"); err == nil {
		t.Error("an id that is not the file's name was accepted")
	}
	if _, err := parseDir(fstest.MapFS{"c/soft-nms.md": {Data: []byte(card)}, "c/x.md": {Data: []byte(strings.Replace(card, "id: soft-nms", "id: x", 1))}}, "c"); err == nil {
		t.Error("two cards of one number were accepted")
	}
}

func TestEmbeddedCards(t *testing.T) {
	cards, err := All()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range cards {
		if !strings.Contains(c.Body, "lathe ") {
			t.Errorf("card %s shows no command", c.ID)
		}
		if !strings.Contains(c.Body, "```go") {
			t.Errorf("card %s shows no Go", c.ID)
		}
		for _, name := range []string{c.ID, strings.ToUpper(c.Name)} {
			if got, err := Find(name); err != nil || got.ID != c.ID {
				t.Errorf("Find(%q): %q, %v", name, got.ID, err)
			}
		}
	}
}

func TestFindSuggests(t *testing.T) {
	for in, want := range map[string]string{"layernrm": "layernorm", "layer-norm": "layernorm", "Layer Norm": "layernorm", "zzzzzz": ""} {
		_, err := Find(in)
		var unknown *UnknownError
		if !errors.As(err, &unknown) || unknown.Near != want {
			t.Errorf("Find(%q): %v, want near %q", in, err, want)
		}
	}
	if c, err := Find("42"); err != nil || c.ID != "layernorm" {
		t.Errorf("by number: %q, %v", c.ID, err)
	}
}

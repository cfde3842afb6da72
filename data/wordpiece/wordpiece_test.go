package wordpiece_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/data/wordpiece"
)

// testdata/all-minilm-l6-v2.json holds texts and what the library tokenizers 0.23 makes of them.
func TestAgreesWithTheTokenizersLibrary(t *testing.T) {
	data.RequireTest(t, "all-minilm-l6-v2")
	tok, err := wordpiece.Open(filepath.Join(data.Dir(), "models", "all-minilm-l6-v2"))
	if err != nil {
		t.Fatal(err)
	}
	if tok.Symbols() != 30522 {
		t.Errorf("%d symbols", tok.Symbols())
	}
	b, err := os.ReadFile("testdata/all-minilm-l6-v2.json")
	if err != nil {
		t.Fatal(err)
	}
	var cases []struct {
		Text string
		IDs  []int32
	}
	if err := json.Unmarshal(b, &cases); err != nil {
		t.Fatal(err)
	}
	if len(cases) < 30 {
		t.Fatalf("%d cases", len(cases))
	}
	for _, c := range cases {
		if got := tok.Tokens(c.Text); !slices.Equal(got, c.IDs) {
			t.Errorf("%q: %v, want %v", c.Text, got, c.IDs)
		}
	}
}

const small = `{"normalizer":{"type":"BertNormalizer","clean_text":true,"handle_chinese_chars":true,"strip_accents":null,"lowercase":true},
"added_tokens":[{"id":0,"content":"[PAD]"},{"id":1,"content":"[UNK]"},{"id":2,"content":"[CLS]"},{"id":3,"content":"[SEP]"}],
"model":{"type":"WordPiece","unk_token":"[UNK]","continuing_subword_prefix":"##","max_input_chars_per_word":5,
"vocab":{"[PAD]":0,"[UNK]":1,"[CLS]":2,"[SEP]":3,"un":4,"##a":5,"##ab":6,"!":7,"una":8}}}`

func TestLongestPiecesFirst(t *testing.T) {
	tok, err := wordpiece.Parse([]byte(small))
	if err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string][]int32{
		"":        nil,
		"una":     {8},
		"UNÁB":    {1}, // "una", then "##b" is missing
		"unaab!":  {8, 6, 7},
		"unaabab": {1}, // seven characters
		"x un":    {1, 4},
	} {
		if got := tok.Tokens(text); !slices.Equal(got, want) {
			t.Errorf("%q: %v, want %v", text, got, want)
		}
	}
	ids, mask := tok.Encode("un un", 6)
	if !slices.Equal(ids, []int32{2, 4, 4, 3, 0, 0}) || !slices.Equal(mask, []int32{1, 1, 1, 1, 0, 0}) {
		t.Errorf("%v %v", ids, mask)
	}
	if ids, _ := tok.Encode("un un un un", 4); !slices.Equal(ids, []int32{2, 4, 4, 3}) {
		t.Errorf("a long text is cut before its last token: %v", ids)
	}
}

func TestRefusals(t *testing.T) {
	for _, c := range []struct{ from, to, want string }{
		{`"WordPiece"`, `"BPE"`, "only WordPiece"},
		{`"BertNormalizer"`, `"NFC"`, "BertNormalizer"},
		{`"[SEP]"`, `"[sep]"`, `no "[SEP]"`},
		{`{"normalizer"`, `{"normalizer`, "not a tokenizer.json"},
	} {
		_, err := wordpiece.Parse([]byte(strings.ReplaceAll(small, c.from, c.to)))
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s for %s: error %v", c.to, c.from, err)
		}
	}
}

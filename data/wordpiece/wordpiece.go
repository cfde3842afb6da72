// Package wordpiece turns text into the tokens of BERT-like encoders (Devlin et al., arXiv:1810.04805; Wu et al.,
// arXiv:1609.08144), as the tokenizer.json beside such a model describes them.
package wordpiece

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"unicode"

	"golang.org/x/text/unicode/norm"
)

// maxFile is the largest tokenizer.json that is read, in bytes.
const maxFile = 64 << 20

// Tokenizer splits text into words, and words into the longest pieces that the vocabulary has.
type Tokenizer struct {
	ids            map[string]int32
	unknown        int32
	begin, end     int32 // around a text
	pad            int32
	prefix         string // of a piece that goes on
	longest        int    // characters of a word, above which it is unknown
	lower, accents bool   // to lower case; accents are stripped
	chinese, clean bool   // ideographs are words of their own; control characters are dropped
}

// file is what is read of tokenizer.json.
type file struct {
	AddedTokens []struct {
		ID      int32  `json:"id"`
		Content string `json:"content"`
	} `json:"added_tokens"`
	Normalizer *struct {
		Type         string `json:"type"`
		CleanText    bool   `json:"clean_text"`
		Chinese      bool   `json:"handle_chinese_chars"`
		StripAccents *bool  `json:"strip_accents"`
		Lowercase    bool   `json:"lowercase"`
	} `json:"normalizer"`
	Model struct {
		Type    string           `json:"type"`
		Unknown string           `json:"unk_token"`
		Prefix  string           `json:"continuing_subword_prefix"`
		Longest int              `json:"max_input_chars_per_word"`
		Vocab   map[string]int32 `json:"vocab"`
	} `json:"model"`
}

// Open reads the tokenizer.json of a model's folder, or a file of that form. Errors: another kind of tokenizer than
// WordPiece with BERT's normaliser; a vocabulary without [UNK], [CLS], [SEP] or [PAD].
func Open(path string) (*Tokenizer, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.IsDir() {
		path = filepath.Join(path, "tokenizer.json")
		if info, err = os.Stat(path); err != nil {
			return nil, err
		}
	}
	if info.Size() > maxFile {
		return nil, fmt.Errorf("%s: %d bytes; a tokenizer has at most %d", path, info.Size(), maxFile)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	t, err := Parse(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return t, nil
}

// Parse reads the contents of a tokenizer.json.
func Parse(data []byte) (*Tokenizer, error) {
	var f file
	if err := json.Unmarshal(data, &f); err != nil {
		return nil, fmt.Errorf("not a tokenizer.json: %w", err)
	}
	if f.Model.Type != "WordPiece" {
		return nil, fmt.Errorf("the tokenizer's model is %q; only WordPiece is read", f.Model.Type)
	}
	if f.Normalizer == nil || f.Normalizer.Type != "BertNormalizer" {
		return nil, errors.New("the tokenizer's normalizer is not BertNormalizer")
	}
	n := f.Normalizer
	t := &Tokenizer{ids: f.Model.Vocab, prefix: f.Model.Prefix, longest: f.Model.Longest, lower: n.Lowercase, accents: n.Lowercase, chinese: n.Chinese, clean: n.CleanText}
	if n.StripAccents != nil {
		t.accents = *n.StripAccents
	}
	if t.longest <= 0 {
		t.longest = 100
	}
	for _, a := range f.AddedTokens {
		if _, ok := t.ids[a.Content]; !ok && t.ids != nil {
			t.ids[a.Content] = a.ID
		}
	}
	for _, s := range []struct {
		id   *int32
		name string
	}{{&t.unknown, f.Model.Unknown}, {&t.begin, "[CLS]"}, {&t.end, "[SEP]"}, {&t.pad, "[PAD]"}} {
		id, ok := t.ids[s.name]
		if !ok {
			return nil, fmt.Errorf("the vocabulary has no %q", s.name)
		}
		*s.id = id
	}
	return t, nil
}

// Symbols is the size of the vocabulary.
func (t *Tokenizer) Symbols() int { return len(t.ids) }

// Tokens are the numbers of a text's pieces, without the tokens around it.
func (t *Tokenizer) Tokens(text string) []int32 {
	var out []int32
	for _, w := range t.words(text) {
		out = t.pieces(out, w)
	}
	return out
}

// Encode gives the length tokens of a text and their mask, as an encoder takes them: [CLS], the pieces as far as there is
// room, [SEP], and padding, whose mask is 0. It panics if length is less than 2.
func (t *Tokenizer) Encode(text string, length int) (ids, mask []int32) {
	if length < 2 {
		panic(fmt.Sprintf("wordpiece: a length of %d has no room for the tokens around a text", length))
	}
	pieces := t.Tokens(text)
	pieces = pieces[:min(len(pieces), length-2)]
	ids, mask = make([]int32, length), make([]int32, length)
	for i := range ids {
		switch {
		case i == 0:
			ids[i] = t.begin
		case i <= len(pieces):
			ids[i] = pieces[i-1]
		case i == len(pieces)+1:
			ids[i] = t.end
		default:
			ids[i] = t.pad
			continue
		}
		mask[i] = 1
	}
	return ids, mask
}

// words normalises a text and splits it at spaces and around punctuation.
func (t *Tokenizer) words(text string) []string {
	if t.accents {
		text = norm.NFD.String(text)
	}
	var b strings.Builder
	for _, r := range text {
		switch {
		case t.clean && (r == 0 || r == unicode.ReplacementChar || isControl(r)):
		case isSpace(r):
			b.WriteByte(' ')
		case t.accents && unicode.Is(unicode.Mn, r):
		case isPunctuation(r), t.chinese && isIdeograph(r):
			b.WriteByte(' ')
			b.WriteRune(r)
			b.WriteByte(' ')
		default:
			b.WriteRune(r)
		}
	}
	text = b.String()
	if t.lower {
		text = strings.ToLower(text)
	}
	return strings.Fields(text)
}

// pieces appends a word's pieces: from its beginning the longest that there is, and so on; [UNK] for the whole word if
// some part has none.
func (t *Tokenizer) pieces(out []int32, word string) []int32 {
	runes := []rune(word)
	if len(runes) > t.longest {
		return append(out, t.unknown)
	}
	first := len(out)
	for from := 0; from < len(runes); {
		to := len(runes)
		for ; to > from; to-- {
			p := string(runes[from:to])
			if from > 0 {
				p = t.prefix + p
			}
			if id, ok := t.ids[p]; ok {
				out = append(out, id)
				break
			}
		}
		if to == from {
			return append(out[:first], t.unknown)
		}
		from = to
	}
	return out
}

func isSpace(r rune) bool { return r == '\t' || r == '\n' || r == '\r' || unicode.IsSpace(r) }

func isControl(r rune) bool {
	return r != '\t' && r != '\n' && r != '\r' && unicode.In(r, unicode.Cc, unicode.Cf, unicode.Co, unicode.Cs)
}

func isPunctuation(r rune) bool {
	return r >= '!' && r <= '/' || r >= ':' && r <= '@' || r >= '[' && r <= '`' || r >= '{' && r <= '~' || unicode.IsPunct(r)
}

// isIdeograph names the blocks that BERT treats as Chinese.
func isIdeograph(r rune) bool {
	for _, b := range [][2]rune{{0x4E00, 0x9FFF}, {0x3400, 0x4DBF}, {0x20000, 0x2A6DF}, {0x2A700, 0x2B73F}, {0x2B740, 0x2B81F}, {0x2B820, 0x2CEAF}, {0xF900, 0xFAFF}, {0x2F800, 0x2FA1F}} {
		if b[0] <= r && r <= b[1] {
			return true
		}
	}
	return false
}

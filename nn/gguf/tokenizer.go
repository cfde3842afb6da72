package gguf

import (
	"container/heap"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Tokenizer turns text into a language model's symbols and back: byte-level byte-pair encoding (Radford et al., 2019)
// with the vocabulary and merges of a file.
type Tokenizer struct {
	tokens []string
	id     map[string]int32
	rank   map[[2]string]int
	digits bool // every digit is a piece of its own
}

// Tokenizer reads the vocabulary from the metadata. It knows the pre-tokenisers "gpt-2" and "smollm".
func (f *File) Tokenizer() (*Tokenizer, error) {
	if m, _ := f.Meta["tokenizer.ggml.model"].(string); m != "gpt2" {
		return nil, fmt.Errorf("gguf: tokenizer.ggml.model is %q; \"gpt2\" (byte-pair encoding) is supported", m)
	}
	t := &Tokenizer{id: map[string]int32{}, rank: map[[2]string]int{}}
	switch pre, _ := f.Meta["tokenizer.ggml.pre"].(string); pre {
	case "smollm":
		t.digits = true
	case "gpt-2", "default", "":
	default:
		return nil, fmt.Errorf("gguf: tokenizer.ggml.pre is %q; gpt-2 and smollm are supported", pre)
	}
	t.tokens, _ = f.Meta["tokenizer.ggml.tokens"].([]string)
	merges, _ := f.Meta["tokenizer.ggml.merges"].([]string)
	if len(t.tokens) == 0 || len(merges) == 0 {
		return nil, fmt.Errorf("gguf: the file has %d tokens and %d merges", len(t.tokens), len(merges))
	}
	for i, s := range t.tokens {
		t.id[s] = int32(i)
	}
	for i, m := range merges {
		a, b, ok := strings.Cut(m, " ")
		if !ok {
			return nil, fmt.Errorf("gguf: merge %d is %q; want two symbols", i, m)
		}
		if _, twice := t.rank[[2]string{a, b}]; !twice {
			t.rank[[2]string{a, b}] = i
		}
	}
	return t, nil
}

// byteRunes are the printable characters that stand for bytes in the vocabulary.
var byteRunes, runeBytes = func() (to [256]rune, from map[rune]byte) {
	from = map[rune]byte{}
	next := rune(256)
	for b := range 256 {
		r := rune(b)
		if !(b >= '!' && b <= '~' || b >= 0xa1 && b <= 0xac || b >= 0xae) {
			r = next
			next++
		}
		to[b], from[r] = r, byte(b)
	}
	return to, from
}()

// Encode returns the symbols of a text. It fails on a byte that the vocabulary lacks.
func (t *Tokenizer) Encode(text string) ([]int32, error) {
	var out []int32
	for text != "" {
		n := t.piece(text)
		var b strings.Builder
		for i := range n {
			b.WriteRune(byteRunes[text[i]])
		}
		for _, s := range t.merge(b.String()) {
			id, ok := t.id[s]
			if !ok {
				return nil, fmt.Errorf("gguf: the vocabulary has no symbol for %q", s)
			}
			out = append(out, id)
		}
		text = text[n:]
	}
	return out, nil
}

// Decode returns the text of symbols; it need not be valid UTF-8 when they cut a character. Unknown symbols are left out.
func (t *Tokenizer) Decode(ids []int32) string {
	var b []byte
	for _, id := range ids {
		if id < 0 || int(id) >= len(t.tokens) {
			continue
		}
		for _, r := range t.tokens[id] {
			if x, ok := runeBytes[r]; ok {
				b = append(b, x)
			} else {
				b = utf8.AppendRune(b, r)
			}
		}
	}
	return string(b)
}

var contractions = []string{"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"}

// piece is the length of the first piece of a text, by the rules of GPT-2: a contraction; letters, digits or other
// characters, each with a space in front if there is one; or spaces, of which the last is left to what follows.
func (t *Tokenizer) piece(s string) int {
	for _, c := range contractions {
		if strings.HasPrefix(s, c) {
			return len(c)
		}
	}
	first, size := utf8.DecodeRuneInString(s)
	if t.digits && unicode.IsNumber(first) {
		return size
	}
	start := 0
	if first == ' ' && len(s) > size {
		if r, _ := utf8.DecodeRuneInString(s[size:]); !unicode.IsSpace(r) && !(t.digits && unicode.IsNumber(r)) {
			start = size
		}
	}
	r, _ := utf8.DecodeRuneInString(s[start:])
	if start == 0 && unicode.IsSpace(r) {
		end, last := 0, 0
		for i, r := range s {
			if !unicode.IsSpace(r) {
				break
			}
			last, end = i, i+utf8.RuneLen(r)
		}
		// Without what follows, the last space belongs to the next piece. A digit of its own takes none.
		if end < len(s) && last > 0 {
			if next, _ := utf8.DecodeRuneInString(s[end:]); !(t.digits && unicode.IsNumber(next)) {
				return last
			}
		}
		return end
	}
	class := kindOf(r)
	end := start
	for i, r := range s[start:] {
		if kindOf(r) != class || t.digits && class == 'n' && i > 0 {
			break
		}
		end = start + i + runeLen(s[start+i:], r)
	}
	return end
}

func runeLen(s string, r rune) int {
	if r == utf8.RuneError {
		_, n := utf8.DecodeRuneInString(s)
		return n
	}
	return utf8.RuneLen(r)
}

func kindOf(r rune) byte {
	switch {
	case unicode.IsSpace(r):
		return 's'
	case unicode.IsLetter(r):
		return 'l'
	case unicode.IsNumber(r):
		return 'n'
	}
	return 'o'
}

// merge joins neighbouring symbols of a piece, always the pair of the lowest rank, the leftmost of equals.
func (t *Tokenizer) merge(piece string) []string {
	if _, ok := t.id[piece]; ok && len(t.rank) == 0 {
		return []string{piece}
	}
	var at []symbol
	for _, r := range piece {
		at = append(at, symbol{string(r), len(at) - 1, len(at) + 1})
	}
	var q pairs
	push := func(i int) {
		if i < 0 || at[i].next >= len(at) {
			return
		}
		a, b := at[i].text, at[at[i].next].text
		if r, ok := t.rank[[2]string{a, b}]; ok {
			heap.Push(&q, pair{r, i, a, b})
		}
	}
	for i := range at {
		push(i)
	}
	for q.Len() > 0 {
		p := heap.Pop(&q).(pair)
		j := 0
		if j = at[p.at].next; at[p.at].text != p.a || j >= len(at) || at[j].text != p.b {
			continue // merged meanwhile
		}
		at[p.at].text += p.b
		at[p.at].next = at[j].next
		if at[j].next < len(at) {
			at[at[j].next].prev = p.at
		}
		at[j].text = ""
		push(at[p.at].prev)
		push(p.at)
	}
	var out []string
	for i := 0; i < len(at); i = at[i].next {
		out = append(out, at[i].text)
	}
	return out
}

type symbol struct {
	text       string
	prev, next int
}

type pair struct {
	rank, at int
	a, b     string
}

type pairs []pair

func (p pairs) Len() int { return len(p) }
func (p pairs) Less(i, j int) bool {
	return p[i].rank < p[j].rank || p[i].rank == p[j].rank && p[i].at < p[j].at
}
func (p pairs) Swap(i, j int) { p[i], p[j] = p[j], p[i] }
func (p *pairs) Push(x any)   { *p = append(*p, x.(pair)) }
func (p *pairs) Pop() any {
	old := *p
	x := old[len(old)-1]
	*p = old[:len(old)-1]
	return x
}

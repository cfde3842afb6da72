package data

import (
	"fmt"
	"slices"
	"strings"

	"github.com/lathe-ml/lathe/internal/rng"
)

// Vocabulary maps characters to ids 0..Size()-1, in order of their code points.
type Vocabulary struct {
	runes []rune
	ids   map[rune]int32
}

// NewVocabulary collects the characters of a text. Bytes that are not UTF-8 count as U+FFFD.
func NewVocabulary(text string) *Vocabulary {
	v := &Vocabulary{ids: map[rune]int32{}}
	for _, r := range text {
		if _, ok := v.ids[r]; !ok {
			v.ids[r] = 0
			v.runes = append(v.runes, r)
		}
	}
	slices.Sort(v.runes)
	for i, r := range v.runes {
		v.ids[r] = int32(i)
	}
	return v
}

// Size is the number of characters.
func (v *Vocabulary) Size() int { return len(v.runes) }

// String returns the characters in the order of their ids; NewVocabulary of it is the same vocabulary.
func (v *Vocabulary) String() string { return string(v.runes) }

// Encode returns the ids of a text. A character that is not in the vocabulary is an error.
func (v *Vocabulary) Encode(text string) ([]int32, error) {
	out := make([]int32, 0, len(text))
	for at, r := range text {
		id, ok := v.ids[r]
		if !ok {
			return nil, fmt.Errorf("data: character %q at byte %d is not among the %d of the vocabulary", r, at, v.Size())
		}
		out = append(out, id)
	}
	return out, nil
}

// Decode returns the text of ids; one outside the vocabulary becomes U+FFFD.
func (v *Vocabulary) Decode(ids []int32) string {
	var b strings.Builder
	for _, id := range ids {
		if id < 0 || int(id) >= len(v.runes) {
			b.WriteRune('\uFFFD')
			continue
		}
		b.WriteRune(v.runes[id])
	}
	return b.String()
}

// SplitAt cuts a token sequence by position: the first part for training, the fraction val of its end for validation,
// so that no window spans both. val must be in [0, 1].
func SplitAt(tokens []int32, val float64) (train, validation []int32, err error) {
	if !(val >= 0 && val <= 1) {
		return nil, nil, fmt.Errorf("data: validation fraction %v; use 0 to 1", val)
	}
	n := len(tokens) - int(val*float64(len(tokens)))
	return tokens[:n:n], tokens[n:], nil
}

// EvalWindows returns the starts of the windows of length+1 tokens whose targets cover a sequence of n tokens without
// overlap: 0, length, 2·length, ... Inputs are tokens[s:s+length], targets tokens[s+1:s+length+1].
func EvalWindows(n, length int) []int {
	var out []int
	if length < 1 {
		return nil
	}
	for s := 0; s+length+1 <= n; s += length {
		out = append(out, s)
	}
	return out
}

// TrainWindows draws count starts of windows of length+1 tokens uniformly, with replacement. A sequence shorter than
// one window is an error.
func TrainWindows(r *rng.Rand, n, length, count int) ([]int, error) {
	if length < 1 || n < length+1 {
		return nil, fmt.Errorf("data: %d tokens hold no window of %d and its targets", n, length)
	}
	out := make([]int, count)
	for i := range out {
		out[i] = r.IntN(n - length)
	}
	return out, nil
}

// Windows copies the inputs and targets of the windows that begin at starts, each [len(starts), length], row-major. It
// panics, as slicing does, on a start that leaves no room for length+1 tokens.
func Windows(tokens []int32, starts []int, length int) (inputs, targets []int32) {
	inputs = make([]int32, 0, len(starts)*length)
	targets = make([]int32, 0, len(starts)*length)
	for _, s := range starts {
		inputs = append(inputs, tokens[s:s+length]...)
		targets = append(targets, tokens[s+1:s+length+1]...)
	}
	return inputs, targets
}

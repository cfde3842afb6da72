package data

import (
	"slices"
	"testing"

	"github.com/lathe-ml/lathe/internal/rng"
)

func TestVocabularyRoundTrips(t *testing.T) {
	v := NewVocabulary("banana £!")
	if v.String() != " !abn£" || v.Size() != 6 {
		t.Errorf("%q", v.String())
	}
	ids, err := v.Encode("nab£")
	if err != nil || !slices.Equal(ids, []int32{4, 2, 3, 5}) {
		t.Errorf("%v %v", ids, err)
	}
	if got := v.Decode(append(ids, 6, -1)); got != "nab£\uFFFD\uFFFD" {
		t.Errorf("%q", got)
	}
	if _, err := v.Encode("x"); err == nil {
		t.Error("an unknown character was encoded")
	}
	if w := NewVocabulary(v.String()); w.String() != v.String() {
		t.Error("not the same vocabulary from its own text")
	}
}

func TestWindowsOfText(t *testing.T) {
	tokens := make([]int32, 100)
	for i := range tokens {
		tokens[i] = int32(i)
	}
	train, val, err := SplitAt(tokens, 0.1)
	if err != nil || len(train) != 90 || len(val) != 10 || val[0] != 90 {
		t.Errorf("%d %d %v", len(train), len(val), err)
	}
	if s := EvalWindows(len(val), 3); !slices.Equal(s, []int{0, 3, 6}) {
		t.Errorf("starts %v", s)
	}
	in, out := Windows(val, []int{0, 6}, 3)
	if !slices.Equal(in, []int32{90, 91, 92, 96, 97, 98}) || !slices.Equal(out, []int32{91, 92, 93, 97, 98, 99}) {
		t.Errorf("%v %v", in, out)
	}
	starts, err := TrainWindows(rng.New(1, "x"), 5, 4, 20)
	if err != nil || slices.Max(starts) != 0 {
		t.Errorf("%v %v", starts, err)
	}
	starts, _ = TrainWindows(rng.New(1, "x"), 6, 4, 100)
	if slices.Min(starts) != 0 || slices.Max(starts) != 1 {
		t.Errorf("%v: want 0 and 1", starts)
	}
	if _, err := TrainWindows(rng.New(1, "x"), 4, 4, 1); err == nil {
		t.Error("a window without a last target was drawn")
	}
	for _, f := range []float64{-0.1, 1.1} {
		if _, _, err := SplitAt(tokens, f); err == nil {
			t.Errorf("fraction %v accepted", f)
		}
	}
}

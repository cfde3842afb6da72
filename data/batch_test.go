package data

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
)

func take(b *Batcher, n int) [][]int {
	var out [][]int
	for range n {
		out = append(out, slices.Clone(b.Next()))
	}
	return out
}

func same(a, b [][]int) bool { return slices.EqualFunc(a, b, slices.Equal[[]int]) }

func TestBatcherResumesFromAnyPosition(t *testing.T) {
	for _, c := range []Batcher{
		{N: 10, Size: 3, Seed: 1, DropLast: true},
		{N: 10, Size: 3, Seed: 1},
		{N: 10, Size: 10, Seed: 1 << 63, DropLast: true},
		{N: 1, Size: 1},
		{N: 5, Size: 8},
		{N: 10, Size: 4, Sequential: true},
	} {
		const total = 25
		ref := c
		all := take(&ref, total)
		for cut := range total {
			first := c
			take(&first, cut)
			b, err := json.Marshal(&first)
			if err != nil {
				t.Fatal(err)
			}
			var s BatcherState
			if err := json.Unmarshal(b, &s); err != nil {
				t.Fatal(err)
			}
			second := c
			take(&second, 7) // a used batcher may be restored too
			if err := second.Restore(s); err != nil {
				t.Fatal(err)
			}
			if second.Seen() != first.Seen() {
				t.Errorf("%+v cut at %d: seen %d, want %d", c, cut, second.Seen(), first.Seen())
			}
			if got := take(&second, total-cut); !same(got, all[cut:]) {
				t.Errorf("%+v cut at %d: %v, want %v", c, cut, got, all[cut:])
			}
		}
	}
}

func TestBatcherVisitsEveryExampleOncePerEpoch(t *testing.T) {
	b := &Batcher{N: 11, Size: 4, Seed: 3}
	var orders [][]int
	for epoch := range 3 {
		var seen []int
		for range b.StepsPerEpoch() {
			seen = append(seen, b.Next()...)
		}
		if b.Epoch() != epoch {
			t.Errorf("epoch %d, want %d", b.Epoch(), epoch)
		}
		orders = append(orders, slices.Clone(seen))
		slices.Sort(seen)
		if !slices.Equal(seen, Range(11)) {
			t.Errorf("epoch %d visits %v", epoch, seen)
		}
	}
	if slices.Equal(orders[0], orders[1]) || slices.Equal(orders[1], orders[2]) {
		t.Error("epochs have the same order")
	}
	other := &Batcher{N: 11, Size: 11, Seed: 4}
	if slices.Equal(other.Next(), orders[0]) {
		t.Error("another seed gives the same order")
	}
}

func TestBatchesHaveOneOrderWhateverTheirSize(t *testing.T) {
	a, b := &Batcher{N: 12, Size: 3, Seed: 5}, &Batcher{N: 12, Size: 4, Seed: 5}
	if x, y := slices.Concat(take(a, 8)...), slices.Concat(take(b, 6)...); !slices.Equal(x, y) {
		t.Errorf("%v and %v", x, y)
	}
	c := &Batcher{N: 12, Size: 2, Seed: 5}
	first := slices.Clone(c.Next())
	c.Size = 10
	if got := slices.Concat(first, c.Next()); !slices.Equal(got, slices.Concat(take(&Batcher{N: 12, Size: 12, Seed: 5}, 1)...)) {
		t.Errorf("after a change of size: %v", got)
	}
}

func TestDropLastGivesFullBatchesOnly(t *testing.T) {
	b, err := NewBatcher(10, 4, 1)
	if err != nil {
		t.Fatal(err)
	}
	for i, idx := range take(b, 20) {
		if len(idx) != 4 {
			t.Errorf("batch %d has %d", i, len(idx))
		}
	}
	if b.StepsPerEpoch() != 2 || b.Epoch() != 9 {
		t.Errorf("%d steps per epoch, epoch %d", b.StepsPerEpoch(), b.Epoch())
	}
}

func TestBatcherRefuses(t *testing.T) {
	for _, c := range [][2]int{{0, 1}, {5, 0}, {5, 6}, {-1, 1}} {
		if _, err := NewBatcher(c[0], c[1], 0); err == nil {
			t.Errorf("%v accepted", c)
		}
	}
	if got := (&Batcher{}).Next(); got != nil {
		t.Errorf("empty batcher gives %v", got)
	}
	b := &Batcher{N: 10, Size: 2, Seed: 1}
	for name, s := range map[string]BatcherState{
		"number":   {N: 9, Seed: 1, Shuffled: true},
		"seed":     {N: 10, Seed: 2, Shuffled: true},
		"order":    {N: 10, Seed: 1},
		"position": {N: 10, Seed: 1, Shuffled: true, Position: 11},
		"epoch":    {N: 10, Seed: 1, Shuffled: true, Epoch: -1},
	} {
		if err := b.Restore(s); err == nil || !strings.Contains(err.Error(), "saved order") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSequentialBatchesCoverOnce(t *testing.T) {
	var got [][]int
	for b := range Batches(7, 3) {
		got = append(got, b)
	}
	if !same(got, [][]int{{0, 1, 2}, {3, 4, 5}, {6}}) {
		t.Errorf("%v", got)
	}
	for range Batches(0, 3) {
		t.Error("a batch of nothing")
	}
}

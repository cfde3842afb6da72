package data

import (
	"encoding/json"
	"fmt"
	"iter"
	"strconv"

	"github.com/lathe-ml/lathe/internal/rng"
)

// Batcher yields the indices of one batch after another, for ever: every epoch is a new permutation of 0..N-1 that
// depends on the seed and the number of the epoch alone, so all arms with one seed see the same order, and a state of
// four numbers continues it exactly. Set the fields, then call Next; do not change N, Seed or Sequential afterwards.
type Batcher struct {
	N          int    // number of examples
	Size       int    // examples per batch; may be changed between batches
	Seed       uint64 // of the order
	Sequential bool   // 0, 1, 2, ... in every epoch instead of a permutation
	// DropLast leaves out the examples at the end of an epoch that do not fill a batch, so that all batches have one
	// shape. Without it the last batch of an epoch is shorter. Either way a batch never spans two epochs.
	DropLast bool

	epoch, at int   // at counts examples of the epoch that have been handed out
	order     []int // of orderOf, nil if not made yet
	orderOf   int
}

// BatcherState is where a Batcher stands, to be kept in a checkpoint.
type BatcherState struct {
	N        int    `json:"n"`
	Seed     uint64 `json:"seed,string"` // as text: JSON numbers lose digits above 2^53 in other readers
	Epoch    int    `json:"epoch"`
	Position int    `json:"position"` // examples of the epoch that have been handed out
	Shuffled bool   `json:"shuffled"`
}

// NewBatcher returns a shuffling batcher that drops incomplete batches: the one for training. It fails if there is no
// full batch.
func NewBatcher(n, size int, seed uint64) (*Batcher, error) {
	b := &Batcher{N: n, Size: size, Seed: seed, DropLast: true}
	return b, b.validate()
}

func (b *Batcher) validate() error {
	switch {
	case b.N < 1:
		return fmt.Errorf("data: cannot make batches of %d examples; give at least one", b.N)
	case b.Size < 1:
		return fmt.Errorf("data: batch size %d; use 1 or more", b.Size)
	case b.DropLast && b.Size > b.N:
		return fmt.Errorf("data: batch size %d exceeds the %d examples; use a smaller one, or keep incomplete batches", b.Size, b.N)
	}
	return nil
}

// Next returns the next batch of at most Size indices and goes on to the next epoch by itself. The slice is
// shared and stays valid; do not write to it. Fields that allow no batch at all give nil.
func (b *Batcher) Next() []int {
	if b.validate() != nil {
		return nil
	}
	if left := b.N - b.at; left <= 0 || (b.DropLast && left < b.Size) {
		b.epoch, b.at = b.epoch+1, 0
	}
	if b.order == nil || b.orderOf != b.epoch {
		b.order, b.orderOf = Range(b.N), b.epoch
		if !b.Sequential {
			r := rng.New(b.Seed, "data/epoch/"+strconv.Itoa(b.epoch))
			r.Shuffle(b.N, func(i, j int) { b.order[i], b.order[j] = b.order[j], b.order[i] })
		}
	}
	k := min(b.Size, b.N-b.at)
	out := b.order[b.at : b.at+k : b.at+k]
	b.at += k
	return out
}

// At returns the batch of a step, counted from 0, and goes on from there: what a training loop that may be resumed asks
// for. All batches must have one Size.
func (b *Batcher) At(step int) []int {
	per := b.StepsPerEpoch()
	if per == 0 || step < 0 {
		return nil
	}
	b.epoch, b.at = step/per, step%per*b.Size
	return b.Next()
}

// Epoch is the number of the epoch that the last batch came from, from 0.
func (b *Batcher) Epoch() int { return b.epoch }

// Seen is the number of examples handed out so far, those dropped at the end of an epoch included.
func (b *Batcher) Seen() int { return b.epoch*b.N + b.at }

// StepsPerEpoch is the number of batches of an epoch at the present Size.
func (b *Batcher) StepsPerEpoch() int {
	if b.validate() != nil {
		return 0
	}
	if b.DropLast {
		return b.N / b.Size
	}
	return (b.N + b.Size - 1) / b.Size
}

// State returns where the batcher stands.
func (b *Batcher) State() BatcherState {
	return BatcherState{N: b.N, Seed: b.Seed, Epoch: b.epoch, Position: b.at, Shuffled: !b.Sequential}
}

// Restore continues from a state: the next batch is the one that would have followed it. A state of another number of
// examples, seed or order is refused, because the sequence would not be the same.
func (b *Batcher) Restore(s BatcherState) error {
	if s.N != b.N || s.Seed != b.Seed || s.Shuffled == b.Sequential {
		return fmt.Errorf("data: the saved order is of %d examples, seed %d, shuffled %t; this one is of %d, seed %d, shuffled %t",
			s.N, s.Seed, s.Shuffled, b.N, b.Seed, !b.Sequential)
	}
	if s.Epoch < 0 || s.Position < 0 || s.Position > s.N {
		return fmt.Errorf("data: the saved order stands at epoch %d, example %d of %d", s.Epoch, s.Position, s.N)
	}
	b.epoch, b.at, b.order = s.Epoch, s.Position, nil
	return nil
}

// MarshalJSON writes the state.
func (b *Batcher) MarshalJSON() ([]byte, error) { return json.Marshal(b.State()) }

// Batches yields 0..n-1 once, in order, in batches of at most size (1 if less): for evaluation.
func Batches(n, size int) iter.Seq[[]int] {
	size = max(1, size)
	return func(yield func([]int) bool) {
		for at := 0; at < n; at += size {
			batch := make([]int, 0, min(size, n-at))
			for i := at; i < min(n, at+size); i++ {
				batch = append(batch, i)
			}
			if !yield(batch) {
				return
			}
		}
	}
}

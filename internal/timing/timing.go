// Package timing compares how long functions take on a machine that does other things too.
package timing

import (
	"context"
	"fmt"
	"time"

	"github.com/lathe-ml/lathe/internal/stat"
)

// turn is how long a function runs in a round, at least.
const turn = 10 * time.Millisecond

// Times are the seconds that one function took, by round: in each the median of its passes.
type Times []float64

// Median is the median over the rounds.
func (t Times) Median() float64 { return stat.Median(t) }

// Ratio is the median of t over the times of another function in the same rounds, with the quartiles.
func (t Times) Ratio(other Times) (median, low, high float64) {
	r := make([]float64, len(t))
	for i := range t {
		r[i] = t[i] / other[i]
	}
	return stat.Median(r), stat.Quantile(r, .25), stat.Quantile(r, .75)
}

// Interleaved times functions against each other: in every round each has a turn of several passes, and the order changes
// from round to round, so that a slow spell of the machine hits all of them alike. Every pass is timed on its own. Two
// passes before the first round, in which things are compiled, do not count. After a round, progress is told; it may be nil.
func Interleaved(ctx context.Context, rounds int, progress func(done, total int), f ...func() error) ([]Times, error) {
	if rounds < 1 {
		return nil, fmt.Errorf("timing: %d rounds; want at least 1", rounds)
	}
	pass := func(i int) (time.Duration, error) {
		start := time.Now()
		err := f[i]()
		return time.Since(start), err
	}
	passes := 1
	for i := range f {
		var d time.Duration
		var err error
		for range 2 {
			if d, err = pass(i); err != nil {
				return nil, err
			}
		}
		passes = max(passes, int(turn/max(d, time.Microsecond)))
	}
	times := make([]Times, len(f))
	for round := range rounds {
		for k := range f {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			i := (k + round) % len(f)
			var all []float64
			for range passes {
				d, err := pass(i)
				if err != nil {
					return nil, err
				}
				all = append(all, d.Seconds())
			}
			times[i] = append(times[i], stat.Median(all))
		}
		if progress != nil {
			progress(round+1, rounds)
		}
	}
	return times, nil
}

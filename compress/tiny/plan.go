package tiny

import (
	"cmp"
	"slices"
)

// Buffer is a piece of the arena.
type Buffer struct {
	Name   string `json:"name"`
	Bytes  int    `json:"bytes"`
	Offset int    `json:"offset"`
	First  int    `json:"first"` // operation that writes it first
	Last   int    `json:"last"`  // operation that reads it last
}

// align is what offsets and sizes are multiples of: a float32 must not straddle a word.
const align = 4

// Place gives buffers their offsets: in order of falling size (of equals the one that is written first), each into the
// smallest gap that is free for as long as it lives, or else behind all that live with it. It returns the size of the
// arena. Buffers whose lives [First, Last] share an operation do not overlap.
func Place(buffers []*Buffer) (peak int) {
	order := slices.Clone(buffers)
	slices.SortStableFunc(order, func(a, b *Buffer) int {
		return cmp.Or(cmp.Compare(b.Bytes, a.Bytes), cmp.Compare(a.First, b.First))
	})
	var placed []*Buffer
	for _, b := range order {
		size := (b.Bytes + align - 1) / align * align
		var live []*Buffer
		for _, p := range placed {
			if p.First <= b.Last && b.First <= p.Last {
				live = append(live, p)
			}
		}
		slices.SortFunc(live, func(x, y *Buffer) int { return cmp.Compare(x.Offset, y.Offset) })
		end, best, gap := 0, -1, 0
		for _, p := range live {
			if free := p.Offset - end; free >= size && (best < 0 || free < gap) {
				best, gap = end, free
			}
			end = max(end, p.Offset+(p.Bytes+align-1)/align*align)
		}
		if best < 0 {
			best = end
		}
		b.Offset = best
		peak = max(peak, best+size)
		placed = append(placed, b)
	}
	return peak
}

// LowerBound is the largest sum of what lives at once: no placement has a smaller arena.
func LowerBound(buffers []*Buffer) (bound int) {
	for _, at := range buffers {
		sum := 0
		for _, b := range buffers {
			if b.First <= at.First && at.First <= b.Last {
				sum += (b.Bytes + align - 1) / align * align
			}
		}
		bound = max(bound, sum)
	}
	return bound
}

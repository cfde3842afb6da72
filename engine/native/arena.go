package native

import (
	"slices"
)

// allocate gives every stored value its place in one arena: the smallest gap that is free for as long as the value is
// needed. Outputs are not in it.
func (p *plan) allocate() {
	out := map[*value]bool{}
	for _, v := range p.outs {
		out[v] = true
	}
	begin, end := make([][]*value, len(p.groups)), make([][]*value, len(p.groups)+1)
	for _, v := range p.order {
		if v.group >= 0 && v.store && !v.isForeign() && !out[v] {
			begin[v.group] = append(begin[v.group], v)
			end[v.last] = append(end[v.last], v)
		}
	}
	type span struct{ at, n int }
	var free []span
	top := 0
	for g := range p.groups {
		for _, v := range begin[g] {
			n, best := room(v), -1
			for i, f := range free {
				if f.n >= n && (best < 0 || f.n < free[best].n) {
					best = i
				}
			}
			switch {
			case best >= 0:
				v.place = free[best].at
				free[best].at += n
				free[best].n -= n
			case len(free) > 0 && free[len(free)-1].at+free[len(free)-1].n == top: // grow the last gap
				f := &free[len(free)-1]
				v.place = f.at
				top = f.at + n
				free = free[:len(free)-1]
			default:
				v.place = top
				top += n
			}
		}
		for _, v := range end[g] {
			free = append(free, span{v.place, room(v)})
		}
		slices.SortFunc(free, func(a, b span) int { return a.at - b.at })
		joined := free[:0]
		for _, f := range free {
			if k := len(joined) - 1; k >= 0 && joined[k].at+joined[k].n == f.at {
				joined[k].n += f.n
			} else if f.n > 0 {
				joined = append(joined, f)
			}
		}
		free = joined
	}
	p.arena = top
}

// room returns the memory of a value, in multiples of a cache line.
func room(v *value) int { return (max(1, size(v.dims)) + 15) &^ 15 }

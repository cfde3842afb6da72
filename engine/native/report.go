package native

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// Report says what a compiled computation consists of.
type Report struct {
	Name string
	// Loops, Steps and Regions count the groups of work: fused loops, operations with a kernel of their own, and parts that
	// run on the portable backend.
	Loops, Steps, Regions int
	// Foreign counts the operations that run on the portable backend at every call.
	Foreign map[string]int
	// Arena is the memory of intermediate values, in bytes.
	Arena int
	// Compile is how long planning took.
	Compile time.Duration
	// Cached is set if the plan was made earlier, for an equal computation.
	Cached bool
	// OnHost is set if the whole computation runs on the portable backend.
	OnHost bool
}

// String gives the report in one line.
func (r Report) String() string {
	if r.OnHost {
		return fmt.Sprintf("%s: on the portable backend as a whole", r.Name)
	}
	var ops []string
	for op, n := range r.Foreign {
		ops = append(ops, fmt.Sprintf("%s x%d", op, n))
	}
	slices.Sort(ops)
	s := fmt.Sprintf("%s: %d loops, %d steps, arena %.1f MB, planned in %v", r.Name, r.Loops, r.Steps, float64(r.Arena)/1e6, r.Compile.Round(time.Millisecond))
	if len(ops) > 0 {
		s += fmt.Sprintf("; %d regions on the portable backend: %s", r.Regions, strings.Join(ops, ", "))
	}
	return s
}

// report counts what a plan consists of.
func (x *executable) report() Report {
	r := Report{Foreign: map[string]int{}, Arena: 4 * len(x.arena)}
	for _, g := range x.p.groups {
		switch g.kind {
		case loopGroup:
			r.Loops++
		case stepGroup:
			r.Steps++
		default:
			r.Regions++
			seen := map[*call]bool{}
			for _, v := range g.members {
				if !seen[v.src.call] {
					seen[v.src.call] = true
					r.Foreign[v.src.call.op.String()]++
				}
			}
		}
	}
	return r
}

// Observe calls f with a report of each computation that is compiled from now on; nil ends that.
func (b *Backend) Observe(f func(Report)) { b.observe.Store(&f) }

func (b *Builder) reported(r Report) {
	f := b.backend.observe.Load()
	if f == nil || *f == nil {
		return
	}
	r.Name, r.Foreign = b.name, maps.Clone(r.Foreign)
	(*f)(r)
}

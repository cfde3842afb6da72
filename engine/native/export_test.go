package native

import "testing"

// Open returns a strict backend to the tests outside the package.
func Open(t testing.TB, config string) *Backend { return open(t, config) }

// OpenFrom is Open of a backend that computes values of so many elements or more again where that is cheap; 0 is never.
func OpenFrom(t testing.TB, config string, elements int) *Backend {
	b := open(t, config)
	b.recomputeFrom = elements
	return b
}

// OpenWatched returns a strict backend that puts guards around all memory, looks at them after each group of work, and
// fills memory that is dead or not yet written with NaN.
func OpenWatched(t testing.TB, config string) *Backend {
	b := open(t, config)
	b.mem.watched = &watchedMemory{used: map[*float32][]float32{}}
	b.recomputeFrom = 2
	return b
}

// Size counts elements.
var Size = size

// MaxPlans is how many plans a backend keeps.
const MaxPlans = maxPlans

// Plans counts the plans that a backend keeps.
func Plans(b *Backend) int { return len(b.plans.plans) }

// ArenaBytes counts the memory of all idle plans.
func ArenaBytes(b *Backend) (n int) {
	for _, c := range b.plans.plans {
		for _, x := range c.idle {
			n += 4 * len(x.arena)
		}
	}
	return n
}

// DropFree lets go of the memory that a backend keeps for reuse.
func DropFree(b *Backend) { b.mem.drop() }

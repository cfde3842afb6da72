package kernel

import (
	"math"
	"time"
)

// PeakFMA measures what one worker can do at most, in floating-point operations per second: independent multiplications
// and additions of registers, without any memory; the best of several short runs of about 0.1 s in all. The twins of the
// generic level, which have no such loop, are measured by their product tiles.
func PeakFMA(set *Set) float64 {
	if set.peak == nil {
		return PeakTile(set)
	}
	const n = 1 << 12
	return n * float64(set.peakFlops) / shortest(func() { set.peak(n) })
}

// PeakTile measures what one worker's product tiles reach with operands in the first cache, as PeakFMA does.
func PeakTile(set *Set) float64 {
	flops, f := tileRun(set)
	return flops / shortest(f)
}

// tileRun returns a function that computes whole tiles with operands in the first cache, and how many operations it does.
func tileRun(set *Set) (flops float64, f func()) {
	t := &set.tile
	const k, repeat = kBlock, 64
	nr := t.nv * t.lanes
	a, b, c := make([]float32, t.mr*k), make([]float32, nr*k), make([]float32, t.mr*nr)
	runs, rows, cRows := []run{{0, k}}, multiples(t.mr, 1), multiples(t.mr, nr)
	args := new(tileArgs)
	return 2 * float64(t.mr*nr*k*repeat), func() {
		for range repeat {
			*args = tileArgs{
				a: &a[0], rows: &rows[0], c: &c[0], cRows: &cRows[0],
				runs: &runs[0], n: 1, aks: t.mr, b: &b[0], bks: nr * 4, cols: nr,
			}
			t.packed[t.nv][t.mr](args)
		}
	}
}

// shortest runs f for about 0.1 s and returns the seconds of its shortest run.
func shortest(f func()) float64 {
	best := math.Inf(1)
	for begin := time.Now(); time.Since(begin) < 100*time.Millisecond; {
		s := time.Now()
		f()
		best = min(best, time.Since(s).Seconds())
	}
	return best
}

// ReadBandwidth measures how fast one worker reads memory beyond the caches, in bytes per second: the best of a few
// passes over size bytes.
func ReadBandwidth(set *Set, size int) float64 {
	const cols = 4096
	x := make([]float32, max(1, size/4/cols)*cols)
	for i := range x {
		x[i] = 1
	}
	sums := make([]float32, len(x)/cols)
	best := math.Inf(1)
	for range 5 {
		s := time.Now()
		set.SumRows(sums, x, cols)
		best = min(best, time.Since(s).Seconds())
	}
	return float64(4*len(x)) / best
}

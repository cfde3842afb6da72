package kernel

import (
	"math"
	"time"
)

// PeakFMA measures what one worker's tile kernels reach with operands in the first cache, in floating-point operations
// per second: the best of several short runs of about 0.1 s in all.
func PeakFMA(set *Set) float64 {
	t := &set.tile
	const k, repeat = 256, 64
	a, b, c := make([]float32, t.mr*k), make([]float32, t.nr*k), make([]float32, t.mr*t.nr)
	runs, rows, cRows := []run{{0, k}}, multiples(t.mr, 1), multiples(t.mr, t.nr)
	best := math.Inf(1)
	for begin := time.Now(); time.Since(begin) < 100*time.Millisecond; {
		s := time.Now()
		for range repeat {
			args := tileArgs{
				a: &a[0], rows: &rows[0], c: &c[0], cRows: &cRows[0],
				runs: &runs[0], n: 1, aks: t.mr, b: &b[0], bks: t.nr * 4, cols: t.nr,
			}
			t.packed[1][t.mr](&args)
		}
		best = min(best, time.Since(s).Seconds())
	}
	return 2 * float64(t.mr*t.nr*k*repeat) / best
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

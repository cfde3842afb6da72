package bench

import (
	"sync"

	"github.com/lathe-ml/lathe/engine/kernel"
)

// Machine is what a number of threads reach together on this machine.
type Machine struct {
	Threads   int     `json:"threads"`
	FMA       float64 `json:"peak_fma_flops"`       // floating-point operations per second of independent multiply-adds
	Bandwidth float64 `json:"read_bandwidth_bytes"` // bytes per second read from memory beyond the caches
}

// MeasureMachine runs the best kernels on so many threads at once, for some tenths of a second and with 128 MB each.
func MeasureMachine(threads int) Machine {
	set := kernel.Best()
	together := func(f func() float64) (sum float64) {
		rates := make([]float64, threads)
		var w sync.WaitGroup
		for i := range rates {
			w.Go(func() { rates[i] = f() })
		}
		w.Wait()
		for _, r := range rates {
			sum += r
		}
		return sum
	}
	return Machine{
		Threads:   threads,
		FMA:       together(func() float64 { return kernel.PeakFMA(set) }),
		Bandwidth: together(func() float64 { return kernel.ReadBandwidth(set, 128<<20) }),
	}
}

// best keeps the higher of two measurements.
func (m Machine) best(o Machine) Machine {
	m.FMA, m.Bandwidth = max(m.FMA, o.FMA), max(m.Bandwidth, o.Bandwidth)
	return m
}

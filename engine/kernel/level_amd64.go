//go:build !race

package kernel

import "golang.org/x/sys/cpu"

// hardware returns the highest level of the processor.
func hardware() (Level, string) {
	x := &cpu.X86
	switch {
	case !x.HasAVX2 || !x.HasFMA:
		return Generic, "the processor has no AVX2 with FMA"
	case x.HasAVX512F && x.HasAVX512BW && x.HasAVX512DQ && x.HasAVX512VL:
		return AVX512, "the processor has AVX-512 F, BW, DQ and VL"
	}
	return AVX2, "the processor has AVX2 and FMA, not AVX-512 F, BW, DQ and VL"
}

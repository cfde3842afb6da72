package kernel

import (
	"math/rand/v2"
	"slices"
	"testing"
	"unsafe"
)

func TestPackEightMatchesTwin(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 1))
	for _, s := range levels() {
		for _, n := range lengths[1:] {
			for _, stride := range []int{8, 16, 32, 40} {
				rows := make([]int32, 8)
				src := vector(r, 9*n+3) // the last row ends with the slice
				for i := range rows {
					rows[i] = int32(r.IntN(len(src) - n + 1))
				}
				rows[7] = int32(len(src) - n)
				size := (n-1)*stride + 8
				want, _ := guarded(size)
				got, ok := guarded(size)
				packEightTwin(&want[0], stride, unsafe.SliceData(src), &rows[0], n)
				s.packEight(&got[0], stride, unsafe.SliceData(src), &rows[0], n)
				for i := range got {
					if !near(got[i], want[i], 0) {
						t.Fatalf("%s n=%d stride=%d: element %d is %g, want %g", s.Level, n, stride, i, got[i], want[i])
					}
				}
				if !ok() {
					t.Fatalf("%s n=%d stride=%d writes outside its slice", s.Level, n, stride)
				}
			}
		}
	}
}

func TestCopyPanelsMatchesTwin(t *testing.T) {
	r := rand.New(rand.NewPCG(8, 1))
	for _, s := range levels() {
		for _, n := range []int{0, 1, 2, 3, 16, 33} {
			for _, eights := range []int{1, 2, 4} {
				for _, step := range []int{5, 8, 8 * eights} {
					panel := 8*eights + r.IntN(20)
					src := vector(r, max(0, n-1)*step+8*eights)
					size := max(0, n-1)*panel + 8*eights
					want, _ := guarded(size)
					got, ok := guarded(size)
					copyPanelsTwin(&want[0], panel, &src[0], step, n, eights)
					s.copyPanels(&got[0], panel, &src[0], step, n, eights)
					if !slices.EqualFunc(got, want, func(a, b float32) bool { return near(a, b, 0) }) {
						t.Fatalf("%s n=%d eights=%d step=%d panel=%d: not the twin's result", s.Level, n, eights, step, panel)
					}
					if !ok() {
						t.Fatalf("%s n=%d eights=%d writes outside its slice", s.Level, n, eights)
					}
				}
			}
		}
	}
}

package detect

import (
	"fmt"
	"math"
)

// Float is the precision of boxes and scores handed in; everything is computed in float64.
type Float interface{ float32 | float64 }

// Rect is a box as COCO writes it: the left upper corner and the size, in pixels.
type Rect struct {
	X, Y float64 // left, top
	W, H float64 // >= 0
}

// RectOf returns the box between two corners (x1, y1, x2, y2).
func RectOf[T Float](corners [4]T) Rect {
	x1, y1, x2, y2 := float64(corners[0]), float64(corners[1]), float64(corners[2]), float64(corners[3])
	return Rect{X: x1, Y: y1, W: x2 - x1, H: y2 - y1}
}

// Corners returns (x1, y1, x2, y2).
func (r Rect) Corners() [4]float64 { return [4]float64{r.X, r.Y, r.X + r.W, r.Y + r.H} }

// Area returns W·H in square pixels.
func (r Rect) Area() float64 { return r.W * r.H }

func (r Rect) check() error {
	for _, v := range [...]float64{r.X, r.Y, r.W, r.H, r.W * r.H} {
		if math.IsNaN(v) || math.IsInf(v, 0) {
			return fmt.Errorf("box %v (x, y, width, height) is not finite", r)
		}
	}
	if r.W < 0 || r.H < 0 {
		return fmt.Errorf("box %v (x, y, width, height) has a negative size", r)
	}
	return nil
}

// checkCorners refuses boxes that are not finite, have their corners swapped, or whose area is not finite.
func checkCorners[T Float](i int, b [4]T) error {
	x1, y1, x2, y2 := float64(b[0]), float64(b[1]), float64(b[2]), float64(b[3])
	area := (x2 - x1 + 1) * (y2 - y1 + 1)
	switch {
	case math.IsNaN(area) || math.IsInf(area, 0) || math.IsNaN(x1+y1) || math.IsInf(x1+y1, 0):
		return fmt.Errorf("detect: box %d is %v: coordinates and area must be finite", i, b)
	case x2 < x1 || y2 < y1:
		return fmt.Errorf("detect: box %d is %v: want x1 <= x2 and y1 <= y2 (corners, not x, y, width, height)", i, b)
	}
	return nil
}

// IoU returns intersection over union of two boxes given by their corners (x1, y1, x2, y2), 0 when they do not
// intersect or have no area. With plusOne the corners are inclusive pixel indices, so that a side is x2-x1+1 long.
func IoU[T Float](a, b [4]T, plusOne bool) float64 {
	one := 0.
	if plusOne {
		one = 1
	}
	ax1, ay1, ax2, ay2 := float64(a[0]), float64(a[1]), float64(a[2]), float64(a[3])
	bx1, by1, bx2, by2 := float64(b[0]), float64(b[1]), float64(b[2]), float64(b[3])
	w := min(ax2, bx2) - max(ax1, bx1) + one
	h := min(ay2, by2) - max(ay1, by1) + one
	if !(w > 0 && h > 0) {
		return 0
	}
	inter := w * h
	return inter / ((ax2-ax1+one)*(ay2-ay1+one) + (bx2-bx1+one)*(by2-by1+one) - inter)
}

// IoUMatrix returns the IoU of every box of a with every box of b: len(a) rows of len(b) values in [0, 1].
// It refuses boxes that are not finite or whose corners are swapped.
func IoUMatrix[T Float](a, b [][4]T, plusOne bool) ([][]float64, error) {
	for _, boxes := range [][][4]T{a, b} {
		for i, x := range boxes {
			if err := checkCorners(i, x); err != nil {
				return nil, err
			}
		}
	}
	flat := make([]float64, len(a)*len(b))
	out := make([][]float64, len(a))
	for i, x := range a {
		out[i] = flat[i*len(b) : (i+1)*len(b) : (i+1)*len(b)]
		for j, y := range b {
			out[i][j] = IoU(x, y, plusOne)
		}
	}
	return out, nil
}

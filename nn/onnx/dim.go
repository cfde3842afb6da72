package onnx

import (
	"fmt"
	"strings"
)

// dim is the size of an axis, or an integer computed from sizes: k·N + c, where N is the batch. Comparisons take N
// for large.
type dim struct{ k, c int }

func fixed(c int) dim { return dim{0, c} }

// batch is the symbolic size of axis 0.
var batch = dim{1, 0}

func (d dim) static() bool { return d.k == 0 }

// at is the size at a given batch.
func (d dim) at(n int) int { return d.k*n + d.c }

func (d dim) plus(e dim) dim  { return dim{d.k + e.k, d.c + e.c} }
func (d dim) minus(e dim) dim { return dim{d.k - e.k, d.c - e.c} }

// times multiplies; ok is false when the result is not linear in N.
func (d dim) times(e dim) (dim, bool) {
	if d.k != 0 && e.k != 0 {
		return dim{}, false
	}
	return dim{d.k*e.c + e.k*d.c, d.c * e.c}, true
}

// over divides, rounding toward zero; ok is false when the result is not linear in N.
func (d dim) over(e dim) (dim, bool) {
	switch {
	case e.k == 0 && e.c == 0:
		return dim{}, false
	case d.k == 0 && e.k == 0:
		return fixed(d.c / e.c), true
	case e.k == 0 && d.k%e.c == 0 && d.c%e.c == 0:
		return dim{d.k / e.c, d.c / e.c}, true
	case d.c == 0 && e.c == 0 && e.k != 0 && d.k%e.k == 0:
		return fixed(d.k / e.k), true
	}
	return dim{}, false
}

// compare orders as for a large N.
func (d dim) compare(e dim) int {
	switch x := d.minus(e); {
	case x.k != 0:
		return x.k
	default:
		return x.c
	}
}

func (d dim) String() string {
	switch {
	case d.k == 0:
		return fmt.Sprint(d.c)
	case d.k == 1 && d.c == 0:
		return "N"
	case d.c == 0:
		return fmt.Sprintf("%dN", d.k)
	}
	return fmt.Sprintf("%dN%+d", d.k, d.c)
}

func fixedShape(d []int) []dim {
	s := make([]dim, len(d))
	for i, x := range d {
		s[i] = fixed(x)
	}
	return s
}

func shapeString(s []dim) string {
	p := make([]string, len(s))
	for i, d := range s {
		p[i] = d.String()
	}
	return "[" + strings.Join(p, " ") + "]"
}

// volume is a number of elements: coef·N^pow.
type volume struct{ coef, pow int }

func volumeOf(s []dim) (volume, error) {
	v := volume{1, 0}
	for _, d := range s {
		switch {
		case d.k == 0:
			v.coef *= d.c
		case d.c == 0:
			v.coef, v.pow = v.coef*d.k, v.pow+1
		default:
			return v, fmt.Errorf("a size of %s is not a multiple of the batch", d)
		}
		if v.coef > maxElements || v.coef < 0 {
			return v, fmt.Errorf("shape %s has too many elements", shapeString(s))
		}
	}
	return v, nil
}

// staticShape is the shape as integers; an error when an axis depends on the batch.
func staticShape(s []dim) ([]int, error) {
	out := make([]int, len(s))
	for i, d := range s {
		if !d.static() {
			return nil, fmt.Errorf("axis %d of %s depends on the batch", i, shapeString(s))
		}
		out[i] = d.c
	}
	return out, nil
}

// joinShapes broadcasts as NumPy does.
func joinShapes(a, b []dim) ([]dim, error) {
	r := max(len(a), len(b))
	out := make([]dim, r)
	at := func(s []dim, i int) dim {
		if j := i - (r - len(s)); j >= 0 {
			return s[j]
		}
		return fixed(1)
	}
	for i := range out {
		x, y := at(a, i), at(b, i)
		switch {
		case x == y || y == fixed(1):
			out[i] = x
		case x == fixed(1):
			out[i] = y
		default:
			return nil, fmt.Errorf("shapes %s and %s do not broadcast", shapeString(a), shapeString(b))
		}
	}
	return out, nil
}

package native

import (
	"fmt"
	"slices"

	"github.com/gomlx/compute/dtypes"

	"github.com/lathe-ml/lathe/engine/kernel"
)

// copyView copies a view to places dst[off + sum of i*str].
func copyView(dst []float32, off int, str []int, v view) {
	var d, to, from []int
	for i := range v.dims { // axes of more than one element, joined where both sides allow
		n := v.dims[i]
		if n == 0 {
			return
		}
		if n == 1 {
			continue
		}
		if k := len(d) - 1; k >= 0 && to[k] == n*str[i] && from[k] == n*v.str[i] {
			d[k] *= n
			to[k], from[k] = str[i], v.str[i]
			continue
		}
		d, to, from = append(d, n), append(to, str[i]), append(from, v.str[i])
	}
	copyAxes(dst, v.base.buf, off, v.off, d, to, from)
}

func copyAxes(dst, src []float32, at, from int, d, to, by []int) {
	switch len(d) {
	case 0:
		dst[at] = src[from]
	case 1:
		n, t, b := d[0], to[0], by[0]
		if t == 1 && b == 1 {
			copy(dst[at:at+n], src[from:from+n])
			return
		}
		for range n {
			dst[at] = src[from]
			at += t
			from += b
		}
	default:
		for range d[0] {
			copyAxes(dst, src, at, from, d[1:], to[1:], by[1:])
			at += to[0]
			from += by[0]
		}
	}
}

// concatStep writes several views one after the other along an axis.
type concatStep struct {
	axis  int
	dims  []int
	parts []view
}

func (s *concatStep) reads() []view       { return s.parts }
func (s *concatStep) prepare(*executable) {}
func (s *concatStep) run(x *executable, out []float32) {
	x.parallel(len(s.parts), size(s.dims), func(_, i int) {
		str := rowMajor(s.dims)
		off := 0
		for _, v := range s.parts[:i] {
			off += v.dims[s.axis] * str[s.axis]
		}
		copyView(out, off, str, s.parts[i])
	})
}

// padStep writes a view into memory that is filled with one value otherwise.
type padStep struct {
	src, fill view
	dims, str []int
	off       int
}

func (s *padStep) reads() []view {
	if s.fill.base == nil {
		return []view{s.src}
	}
	return []view{s.src, s.fill}
}
func (s *padStep) prepare(*executable) {}
func (s *padStep) run(x *executable, out []float32) {
	fill := float32(0)
	if s.fill.base != nil {
		fill = s.fill.base.buf[s.fill.off]
	}
	if fill == 0 {
		clear(out)
	} else {
		for i := range out {
			out[i] = fill
		}
	}
	if len(s.src.dims) == 0 || s.src.size() == 0 {
		copyView(out, s.off, s.str, s.src)
		return
	}
	x.parallel(s.src.dims[0], size(s.dims), func(_, i int) {
		part := view{s.src.base, s.src.off + i*s.src.str[0], s.src.dims[1:], s.src.str[1:]}
		copyView(out, s.off+i*s.str[0], s.str[1:], part)
	})
}

// dotStep is a product of two views.
type dotStep struct {
	a, b view
	gemm *kernel.Gemm
}

func (s *dotStep) reads() []view         { return []view{s.a, s.b} }
func (s *dotStep) prepare(x *executable) { x.space.Grow(s.gemm) }
func (s *dotStep) run(x *executable, out []float32) {
	s.gemm.Run(x.b.pool, x.space, s.a.base.buf[s.a.low():], s.b.base.buf[s.b.low():], out)
}

// rest returns the axes that no list names.
func rest(n int, used ...[]int) (out []int) {
	for i := range n {
		if !slices.ContainsFunc(used, func(u []int) bool { return slices.Contains(u, i) }) {
			out = append(out, i)
		}
	}
	return out
}

// dot plans a general product: C[batch, a's other axes, b's other axes].
func (p *plan) dot(a, b view, q dotAttr, dims []int) *value {
	ax, bx := rest(len(a.dims), q.lc, q.lb), rest(len(b.dims), q.rc, q.rb)
	oa := kernel.Operand{Batch: a.offsets(q.lb), Rows: a.offsets(ax), K: a.offsets(q.lc)}
	ob := kernel.Operand{Batch: b.offsets(q.rb), Rows: b.offsets(bx), K: b.offsets(q.rc)}
	m, n := len(oa.Rows), len(ob.Rows)
	s := &dotStep{a: a, b: b, gemm: kernel.NewGemm(p.b.set, oa, ob, multiples(len(oa.Batch), m*n), multiples(m, n))}
	return p.add(&value{kind: kindStep, dims: dims, step: s})
}

// multiples returns 0, s, 2s, ..., n of them.
func multiples(n, s int) []int32 {
	t := make([]int32, n)
	for i := range t {
		t[i] = int32(i * s)
	}
	return t
}

// importStep makes a foreign value native.
type importStep struct {
	from  *value
	dtype dtypes.DType
}

// canImport says whether values of a type can be converted to float32.
func canImport(d dtypes.DType) bool {
	switch d {
	case dtypes.Float32, dtypes.Bool, dtypes.Int8, dtypes.Int16, dtypes.Int32, dtypes.Int64,
		dtypes.Uint8, dtypes.Uint16, dtypes.Uint32, dtypes.Uint64, dtypes.Float64:
		return true
	}
	return false
}

func (s *importStep) reads() []view       { return []view{{base: s.from}} }
func (s *importStep) prepare(*executable) {}
func (s *importStep) run(_ *executable, out []float32) {
	flat, err := s.from.foreign.Data()
	if err != nil {
		panic(fmt.Errorf("reading a value of the portable backend: %w", err))
	}
	switch f := flat.(type) {
	case []float32:
		copy(out, f)
	case []bool:
		for i, v := range f {
			out[i] = 0
			if v {
				out[i] = 1
			}
		}
	case []int8:
		convert(out, f)
	case []int16:
		convert(out, f)
	case []int32:
		convert(out, f)
	case []int64:
		convert(out, f)
	case []uint8:
		convert(out, f)
	case []uint16:
		convert(out, f)
	case []uint32:
		convert(out, f)
	case []uint64:
		convert(out, f)
	case []float64:
		convert(out, f)
	default:
		panic(fmt.Errorf("a value of type %T is not float32", flat))
	}
}

func convert[T int8 | int16 | int32 | int64 | uint8 | uint16 | uint32 | uint64 | float64](dst []float32, src []T) {
	for i, v := range src {
		dst[i] = float32(v)
	}
}

package native

import (
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"unsafe"

	"github.com/gomlx/compute/dtypes"
)

// typedBlock is how many elements the steps of this file compute at a time.
const typedBlock = 1024

// stridedView reads a view's elements in their order.
type stridedView struct {
	view
	d, s []int // axes joined where their strides allow
}

func newStrided(v view) stridedView {
	o := stridedView{view: v}
	o.d, _, o.s = joinAxes(v.dims, rowMajor(v.dims), v.str)
	return o
}

// walk calls f for runs of even stride that make up n elements from number at on: k counts them.
func (o *stridedView) walk(at, n int, f func(k, from, str, n int)) {
	last := len(o.d) - 1
	if last < 0 {
		if n > 0 {
			f(0, o.off, 0, n)
		}
		return
	}
	for k := 0; k < n; {
		row, col := at/o.d[last], at%o.d[last]
		from := o.off + col*o.s[last]
		for a := last - 1; a >= 0; a-- {
			from += row % o.d[a] * o.s[a]
			row /= o.d[a]
		}
		m := min(n-k, o.d[last]-col)
		f(k, from, o.s[last], m)
		k += m
		at += m
	}
}

// typedOperand is an operand of type T.
type typedOperand[T any] struct {
	stridedView
	temp []T
}

func newOperand[T any](v view) typedOperand[T] {
	o := typedOperand[T]{stridedView: newStrided(v)}
	if !v.contiguous() {
		o.temp = make([]T, typedBlock)
	}
	return o
}

// read returns n elements from number at on.
func (o *typedOperand[T]) read(at, n int) []T {
	src := flat[T](o.base)
	if o.temp == nil {
		return src[o.off+at:][:n]
	}
	d := o.temp[:n]
	o.walk(at, n, func(k, from, str, n int) {
		q := d[k : k+n]
		switch str {
		case 0:
			v := src[from]
			for i := range q {
				q[i] = v
			}
		case 1:
			copy(q, src[from:])
		default:
			for i := range q {
				q[i] = src[from+i*str]
			}
		}
	})
	return d
}

// mapStep computes a function of each element.
type mapStep[T, D any] struct {
	dst *value
	in  []typedOperand[T]
	f1  func(d []D, x []T)
	f2  func(d []D, a, b []T)
}

func newMap[T, D any](dst *value, f func(d []D, x []T), x view) step {
	if f == nil {
		return nil
	}
	return &mapStep[T, D]{dst: dst, f1: f, in: []typedOperand[T]{newOperand[T](x)}}
}

func newMap2[T, D any](dst *value, f func(d []D, a, b []T), a, b view) step {
	if f == nil {
		return nil
	}
	return &mapStep[T, D]{dst: dst, f2: f, in: []typedOperand[T]{newOperand[T](a), newOperand[T](b)}}
}

func (s *mapStep[T, D]) reads() (v []view) {
	for _, o := range s.in {
		v = append(v, o.view)
	}
	return v
}
func (s *mapStep[T, D]) prepare(*executable) {}
func (s *mapStep[T, D]) run(*executable, []float32) {
	d := flat[D](s.dst)
	for at := 0; at < len(d); at += typedBlock {
		n := min(typedBlock, len(d)-at)
		if s.f1 != nil {
			s.f1(d[at:at+n], s.in[0].read(at, n))
		} else {
			s.f2(d[at:at+n], s.in[0].read(at, n), s.in[1].read(at, n))
		}
	}
}

// whereStep chooses between two values by a mask.
type whereStep[T any] struct {
	dst  *value
	cond typedOperand[float32]
	a, b typedOperand[T]
}

func (s *whereStep[T]) reads() []view       { return []view{s.cond.view, s.a.view, s.b.view} }
func (s *whereStep[T]) prepare(*executable) {}
func (s *whereStep[T]) run(*executable, []float32) {
	d := flat[T](s.dst)
	for at := 0; at < len(d); at += typedBlock {
		n := min(typedBlock, len(d)-at)
		a, b := s.a.read(at, n), s.b.read(at, n)
		for i, c := range s.cond.read(at, n) {
			if c != 0 {
				d[at+i] = a[i]
			} else {
				d[at+i] = b[i]
			}
		}
	}
}

// convertStep converts between types by way of V, which holds all values of the first.
type convertStep[V number] struct {
	dst   *value
	src   stridedView
	load  func(o *stridedView, d []V, at int)
	store func(v *value, at int, s []V)
	temp  []V
}

func newConvert(dst *value, x view, from, to *typeOps) step {
	switch from.via {
	case 0:
		return convertBy[int64](dst, x, from.load[0], to.store[0])
	case 1:
		return convertBy[uint64](dst, x, from.load[1], to.store[1])
	}
	return convertBy[float64](dst, x, from.load[2], to.store[2])
}

func convertBy[V number](dst *value, x view, load, store any) step {
	return &convertStep[V]{dst, newStrided(x), load.(func(o *stridedView, d []V, at int)), store.(func(v *value, at int, s []V)), make([]V, typedBlock)}
}

func (s *convertStep[V]) reads() []view       { return []view{s.src.view} }
func (s *convertStep[V]) prepare(*executable) {}
func (s *convertStep[V]) run(*executable, []float32) {
	total := size(s.dst.dims)
	for at := 0; at < total; at += typedBlock {
		t := s.temp[:min(typedBlock, total-at)]
		s.load(&s.src, t, at)
		s.store(s.dst, at, t)
	}
}

// placeStep writes views at places of a result that is filled with one value before.
type placeStep[T any] struct {
	dst     *value
	fill    view // without a base: nothing
	parts   []padPart
	copiers []copier
}

func newPlace[T any](dst *value, parts []padPart, fill view) step {
	s := &placeStep[T]{dst: dst, fill: fill, parts: parts}
	for _, q := range parts {
		s.copiers = append(s.copiers, newCopier(q.src, q.off, q.str))
	}
	return s
}

func (s *placeStep[T]) reads() (v []view) {
	for _, q := range s.parts {
		v = append(v, q.src)
	}
	if s.fill.base != nil {
		v = append(v, s.fill)
	}
	return v
}
func (s *placeStep[T]) prepare(*executable) {}
func (s *placeStep[T]) run(*executable, []float32) {
	d := flat[T](s.dst)
	if s.fill.base != nil {
		v := flat[T](s.fill.base)[s.fill.off]
		for i := range d {
			d[i] = v
		}
	}
	for _, c := range s.copiers {
		if c.from.size() > 0 {
			copyAxes(d, flat[T](c.from.base), c.off, c.from.off, c.dims, c.to, c.stride)
		}
	}
}

// typedFold reduces some axes.
type typedFold[T number] struct {
	dst   *value
	x     stridedView // the axes that stay, then those that go
	kept  int         // elements of the result
	count int         // elements of each
	f     func(a, b T) T
}

func newTypedFold[T number](dst *value, x view, axes []int, f func(a, b T) T) step {
	if f == nil {
		return nil
	}
	order := append(rest(len(x.dims), axes), axes...)
	s := &typedFold[T]{dst: dst, x: newStrided(x.transpose(order)), kept: size(dst.dims), f: f}
	s.count = x.size() / max(1, s.kept)
	return s
}

func (s *typedFold[T]) reads() []view       { return []view{s.x.view} }
func (s *typedFold[T]) prepare(*executable) {}
func (s *typedFold[T]) run(*executable, []float32) {
	d, src := flat[T](s.dst), flat[T](s.x.base)
	for k := range d {
		var acc T
		s.x.walk(k*s.count, s.count, func(done, from, str, n int) {
			if done == 0 {
				acc = src[from]
				from += str
				n--
			}
			for range n {
				acc = s.f(acc, src[from])
				from += str
			}
		})
		d[k] = acc
	}
}

// cumSumStep sums along an axis, keeping all sums on the way.
type cumSumStep[T number] struct {
	dst *value
	x   typedOperand[T]
	a   cumSumAttr
}

func newCumSum[T number](dst *value, x view, a cumSumAttr) step {
	return &cumSumStep[T]{dst, typedOperand[T]{stridedView: newStrided(x)}, a}
}

func (s *cumSumStep[T]) reads() []view       { return []view{s.x.view} }
func (s *cumSumStep[T]) prepare(*executable) {}
func (s *cumSumStep[T]) run(*executable, []float32) {
	d, src := flat[T](s.dst), flat[T](s.x.base)
	s.x.walk(0, len(d), func(k, from, str, n int) {
		for i := range n {
			d[k+i] = src[from+i*str]
		}
	})
	dims := s.dst.dims
	n, inner := dims[s.a.axis], size(dims[s.a.axis+1:])
	for at := range len(d) / max(1, n) {
		from, by := at/inner*n*inner+at%inner, inner
		if s.a.options.Reverse {
			from, by = from+(n-1)*inner, -inner
		}
		var sum T
		for range n {
			v := d[from]
			if s.a.options.Exclusive {
				d[from] = sum
			}
			if sum += v; !s.a.options.Exclusive {
				d[from] = sum
			}
			from += by
		}
	}
}

// iotaStep counts along an axis.
type iotaStep[T number] struct {
	dst  *value
	axis int
}

func (s *iotaStep[T]) reads() []view       { return nil }
func (s *iotaStep[T]) prepare(*executable) {}
func (s *iotaStep[T]) run(*executable, []float32) {
	d, dims := flat[T](s.dst), s.dst.dims
	inner := size(dims[s.axis+1:])
	for i := range d {
		d[i] = T(i / inner % dims[s.axis])
	}
}

// argStep finds the place of the largest or smallest element along an axis.
type argStep struct {
	dst   *value
	x     view
	best  func(i int) int
	make  func(x view, a argAttr) func(i int) int
	a     argAttr
	store func(v *value, at int, s []int64)
	temp  []int64
}

func (s *argStep) reads() []view       { return []view{s.x} }
func (s *argStep) prepare(*executable) { s.best, s.temp = s.make(s.x, s.a), make([]int64, 1) }
func (s *argStep) run(*executable, []float32) {
	for i := range size(s.dst.dims) {
		s.temp[0] = int64(s.best(i))
		s.store(s.dst, i, s.temp)
	}
}

// argBest returns a function that finds the best element of row i. The first NaN wins over numbers, a later one over it,
// as on the portable backend.
func argBest[T number](x view, a argAttr) func(i int) int {
	n, str := x.dims[a.axis], x.str[a.axis]
	rows := newStrided(view{x.base, x.off, slices.Delete(slices.Clone(x.dims), a.axis, a.axis+1), slices.Delete(slices.Clone(x.str), a.axis, a.axis+1)})
	at := 0
	place := func(_, from, _, _ int) { at = from }
	return func(i int) int {
		src := flat[T](x.base)
		rows.walk(i, 1, place)
		from, best := at, 0
		top := src[from]
		for k := 1; k < n; k++ {
			from += str
			if v := src[from]; v != v || a.isMin && v < top || !a.isMin && v > top {
				top, best = v, k
			}
		}
		return best
	}
}

// randomStep draws random bits and moves the state on, as the portable backend does.
type randomStep struct {
	state, next, bits *value
	source            rand.PCG
	kept              []byte
}

func (s *randomStep) reads() []view       { return []view{s.state.view} }
func (s *randomStep) prepare(*executable) {}
func (s *randomStep) run(*executable, []float32) {
	old, next := flat[uint64](s.state), flat[uint64](s.next)
	s.source.Seed(old[0], old[1])
	words := bytesOf(s.bits.flat)
	for ; len(words) >= 8; words = words[8:] {
		binary.LittleEndian.PutUint64(words, s.source.Uint64())
	}
	if len(words) > 0 {
		r := s.source.Uint64()
		for i := range words {
			words[i] = byte(r >> (8 * i))
		}
	}
	s.kept, _ = s.source.AppendBinary(s.kept[:0]) // "pcg:", then the state, high word first
	copy(next, old)
	next[0], next[1] = binary.LittleEndian.Uint64(s.kept[4:]), binary.LittleEndian.Uint64(s.kept[12:])
}

// updateStep writes a value into a copy of another, at a computed place where it fits.
type updateStep[T any] struct {
	dst       *value
	x, update view
	starts    []view
	all       copier
	str       []int
}

func newUpdate[T any](dst *value, x, update view, starts []view) step {
	row := rowMajor(dst.dims)
	return &updateStep[T]{dst, x, update, starts, newCopier(x, 0, row), row}
}

func (s *updateStep[T]) reads() []view       { return append([]view{s.x, s.update}, s.starts...) }
func (s *updateStep[T]) prepare(*executable) {}
func (s *updateStep[T]) run(*executable, []float32) {
	d := flat[T](s.dst)
	copyAxes(d, flat[T](s.x.base), 0, s.x.off, s.all.dims, s.all.to, s.all.stride)
	if s.update.size() > 0 {
		to := 0
		for a, n := range s.dst.dims {
			to += min(max(s.start(a), 0), n-s.update.dims[a]) * s.str[a]
		}
		copyAxes(d, flat[T](s.update.base), to, s.update.off, s.update.dims, s.str, s.update.str)
	}
}

// start returns where the update begins along an axis: a scalar for each, or one vector for all.
func (s *updateStep[T]) start(axis int) int {
	if v := s.starts[0]; len(v.dims) == 1 {
		return intAt(v.base, v.off+axis*v.str[0])
	}
	return intAt(s.starts[axis].base, s.starts[axis].off)
}

// intAt returns an element of an integer value.
func intAt(v *value, i int) int {
	switch f := v.flat.(type) {
	case []int32:
		return int(f[i])
	case []int64:
		return int(f[i])
	case []int8:
		return int(f[i])
	case []int16:
		return int(f[i])
	case []uint8:
		return int(f[i])
	case []uint16:
		return int(f[i])
	case []uint32:
		return int(f[i])
	case []uint64:
		return int(f[i])
	}
	panic("indices that are not integers")
}

// bitcastStep reinterprets the bytes of a value.
type bitcastStep struct {
	dst *value
	x   view
}

func (s *bitcastStep) reads() []view       { return []view{s.x} }
func (s *bitcastStep) prepare(*executable) {}
func (s *bitcastStep) run(*executable, []float32) {
	copy(s.dst.bytes(), s.x.base.bytes()[s.x.off*s.x.base.elementSize():])
}

func (v *value) elementSize() int {
	if v.isForeign() {
		return typed(v.dtype).size
	}
	return 4
}

// bytes returns the memory of a value.
func (v *value) bytes() []byte {
	if v.flat != nil {
		return bytesOf(v.flat)
	}
	return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(v.buf))), 4*len(v.buf))
}

// isInteger says whether indices may have the type.
func isInteger(d dtypes.DType) bool { t := typed(d); return t != nil && t.via < 2 && t.load[0] != nil }

package native

import (
	"slices"

	"github.com/lathe-ml/lathe/engine/kernel"
)

// copier copies a view to places dst[off + sum of i*str].
type copier struct {
	from             view
	off              int
	dims, to, stride []int // axes of more than one element, joined where both sides allow
}

func newCopier(from view, off int, str []int) copier {
	c := copier{from: from, off: off}
	c.dims, c.to, c.stride = joinAxes(from.dims, str, from.str)
	return c
}

// copy copies, with both sides moved on by some elements.
func (c *copier) copy(dst []float32, to, from int) {
	if c.from.size() > 0 {
		copyAxes(dst, c.from.base.buf, c.off+to, c.from.off+from, c.dims, c.to, c.stride)
	}
}

// add adds to what is there.
func (c *copier) add(dst []float32) {
	if c.from.size() > 0 {
		addAxes(dst, c.from.base.buf, c.off, c.from.off, c.dims, c.to, c.stride)
	}
}

func copyAxes[T any](dst, src []T, at, from int, d, to, by []int) {
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

	copiers []copier
	out     []float32 // of the run
}

func (s *concatStep) reads() []view { return s.parts }
func (s *concatStep) prepare(*executable) {
	str, off := rowMajor(s.dims), 0
	for _, v := range s.parts {
		s.copiers = append(s.copiers, newCopier(v, off, str))
		off += v.dims[s.axis] * str[s.axis]
	}
}

func (s *concatStep) run(x *executable, out []float32) {
	s.out = out
	x.parallel(len(s.parts), size(s.dims), s)
	s.out = nil
}

// Do writes one view.
func (s *concatStep) Do(_, i int) { s.copiers[i].copy(s.out, 0, 0) }

// padStep writes a view into memory that is filled with one value otherwise; or the sum of several such, with zeros.
type padStep struct {
	fill  view
	dims  []int
	parts []padPart

	copiers []copier
	// A single part that fills the first axis is written slab by slab: slab are the elements of one in the result, step
	// those between two in the source.
	slabs, slab, step int
	apart             bool // no two parts overlap
	covers            bool // and nothing lies beside them
	out               []float32
	value             float32
}

type padPart struct {
	src view
	str []int // in the result
	off int
}

func (s *padStep) reads() (v []view) {
	for _, q := range s.parts {
		v = append(v, q.src)
	}
	if s.fill.base != nil {
		v = append(v, s.fill)
	}
	return v
}

func (s *padStep) prepare(*executable) {
	row := rowMajor(s.dims)
	if a := slices.IndexFunc(s.dims, func(d int) bool { return d != 1 }); a >= 0 && len(s.parts) == 1 {
		q := s.parts[0]
		if q.src.size() > 0 && q.src.dims[a] == s.dims[a] && q.str[a] == row[a] && q.off < row[a] {
			s.slabs, s.slab, s.step = s.dims[a], row[a], q.src.str[a]
			s.copiers = []copier{newCopier(view{q.src.base, q.src.off, q.src.dims[a+1:], q.src.str[a+1:]}, q.off, q.str[a+1:])}
			return
		}
	}
	total := 0
	for _, q := range s.parts {
		s.copiers = append(s.copiers, newCopier(q.src, q.off, q.str))
		total += q.src.size()
	}
	s.apart = partsApart(s.parts, s.dims)
	s.covers = s.apart && total == size(s.dims)
}

// partsApart says whether no two parts reach into each other's bounds.
func partsApart(parts []padPart, dims []int) bool {
	row := rowMajor(dims)
	bounds := func(q padPart, a int) (first, last int) {
		first = q.off / row[a] % dims[a]
		return first, first + (q.src.dims[a]-1)*(q.str[a]/row[a])
	}
	for i, p := range parts {
		for _, q := range parts[:i] {
			overlap := p.src.size() > 0 && q.src.size() > 0
			for a := 0; overlap && a < len(dims); a++ {
				p0, p1 := bounds(p, a)
				q0, q1 := bounds(q, a)
				overlap = p0 <= q1 && q0 <= p1
			}
			if overlap {
				return false
			}
		}
	}
	return true
}

func (s *padStep) run(x *executable, out []float32) {
	s.out, s.value = out, 0
	defer func() { s.out = nil }()
	if s.fill.base != nil {
		s.value = s.fill.base.buf[s.fill.off]
	}
	if s.slabs > 0 {
		x.parallel(s.slabs, size(s.dims), s)
		return
	}
	if !s.covers {
		s.clear(out)
	}
	if s.apart {
		x.parallel(len(s.parts), size(s.dims), s)
		return
	}
	for i := range s.copiers {
		s.copiers[i].add(out)
	}
}

func (s *padStep) clear(out []float32) {
	if s.value == 0 {
		clear(out)
	} else {
		fill(out, s.value)
	}
}

// Do writes a slab, or a part.
func (s *padStep) Do(_, i int) {
	if s.slabs > 0 {
		s.clear(s.out[i*s.slab : (i+1)*s.slab])
		s.copiers[0].copy(s.out, i*s.slab, i*s.step)
		return
	}
	s.copiers[i].copy(s.out, 0, 0)
}

// zero says whether nothing but zeros lies around the parts.
func (s *padStep) zero() bool {
	if s.fill.base == nil {
		return true
	}
	b := s.fill.base
	return b.kind == kindConst && b.buf != nil && b.buf[s.fill.off] == 0
}

func addAxes(dst, src []float32, at, from int, d, to, by []int) {
	if len(d) == 0 {
		dst[at] += src[from]
		return
	}
	if len(d) == 1 && to[0] == 1 && by[0] == 1 {
		t := dst[at : at+d[0]]
		for i, v := range src[from : from+d[0]] {
			t[i] += v
		}
		return
	}
	for range d[0] {
		addAxes(dst, src, at, from, d[1:], to[1:], by[1:])
		at += to[0]
		from += by[0]
	}
}

// sumPads makes one step of padded values that are only added to each other, as the gradients of slices of one value
// are: the whole of it is then written once.
func (p *plan) sumPads() {
	uses := p.countUses()
	for _, v := range p.order {
		if v.kind != kindElem || v.apply.args != 2 || v.apply.binary != kernel.Add {
			continue
		}
		var parts []padPart
		for _, in := range v.in {
			b := in.view.base
			if s, ok := b.step.(*padStep); ok && b.kind == kindStep && uses[b] == 1 && in.view.whole() && slices.Equal(in.view.dims, v.dims) &&
				slices.Equal(b.dims, v.dims) && s.zero() {
				parts = append(parts, s.parts...)
			} else {
				parts = nil
				break
			}
		}
		if len(parts) >= 2 {
			v.kind, v.step, v.in = kindStep, &padStep{dims: v.dims, parts: parts}, nil
		}
	}
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

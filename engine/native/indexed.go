package native

import (
	"slices"

	"github.com/gomlx/compute"

	"github.com/lathe-ml/lathe/engine/kernel"
)

// indexTable holds the index vectors of a gather or scatter.
type indexTable struct {
	from   view
	dims   []int // of the batch axes
	str    []int // of the batch axes, in the indices
	vector int   // stride of the vector's axis
}

func newIndexTable(from view, axis int) indexTable {
	t := indexTable{from: from}
	for a, d := range from.dims {
		if a == axis {
			t.vector = from.str[a]
			continue
		}
		t.dims, t.str = append(t.dims, d), append(t.str, from.str[a])
	}
	return t
}

// at returns the index at a place that the strides give.
func (t *indexTable) at(i int) int { return intAt(t.from.base, t.from.off+i) }

// odometer counts through dimensions, keeping offsets by several strides.
type odometer struct {
	dims []int
	str  [2][]int
	at   []int
	off  [2]int
}

func newOdometer(dims, a, b []int) odometer {
	return odometer{dims: dims, str: [2][]int{a, b}, at: make([]int, len(dims))}
}

func (o *odometer) next() {
	for k := len(o.dims) - 1; k >= 0; k-- {
		o.at[k]++
		o.off[0] += o.str[0][k]
		o.off[1] += o.str[1][k]
		if o.at[k] < o.dims[k] {
			return
		}
		o.off[0] -= o.at[k] * o.str[0][k]
		o.off[1] -= o.at[k] * o.str[1][k]
		o.at[k] = 0
	}
}

// gatherPlan says which windows of x to copy where: they begin where the index vectors say.
type gatherPlan struct {
	dst   *value
	x     view
	index indexTable
	axes  []int // of x, that the vectors' elements are along
	limit []int // the last place along each where a window fits
	out   []int // strides of the batch axes in the result
	// the window: sizes, strides in x and in the result
	dims, from, to []int
}

// gather plans a gather.
func gather(dst *value, x, indices view, a gatherAttr) gatherPlan {
	s := gatherPlan{dst: dst, x: x, index: newIndexTable(indices, a.indexAxis), axes: a.start}
	row := rowMajor(dst.dims)
	for i := range dst.dims {
		if !slices.Contains(a.offsetAxes, i) {
			s.out = append(s.out, row[i])
		}
	}
	k := 0
	for i, n := range a.sizes {
		if slices.Contains(a.collapsed, i) {
			continue
		}
		s.dims, s.from, s.to = append(s.dims, n), append(s.from, x.str[i]), append(s.to, row[a.offsetAxes[k]])
		k++
	}
	for _, i := range a.start {
		s.limit = append(s.limit, x.dims[i]-a.sizes[i])
	}
	s.dims, s.to, s.from = joinAxes(s.dims, s.to, s.from)
	return s
}

// gatherStep copies windows.
type gatherStep[T any] struct {
	gatherPlan
	o odometer
}

func newGather[T any](p gatherPlan) step {
	return &gatherStep[T]{p, newOdometer(p.index.dims, p.index.str, p.out)}
}

func (s *gatherStep[T]) reads() []view       { return []view{s.x, s.index.from} }
func (s *gatherStep[T]) prepare(*executable) {}
func (s *gatherStep[T]) run(*executable, []float32) {
	out, src, o := flat[T](s.dst), flat[T](s.x.base), &s.o
	for range size(s.index.dims) {
		from := s.x.off
		for j, a := range s.axes {
			from += min(max(s.index.at(o.off[0]+j*s.index.vector), 0), s.limit[j]) * s.x.str[a]
		}
		copyAxes(out, src, o.off[1], from, s.dims, s.to, s.from)
		o.next()
	}
}

// joinAxes drops axes of length 1 and joins those that both strides run through evenly.
func joinAxes(dims, a, b []int) (d, s, t []int) {
	for i, n := range dims {
		if n == 1 {
			continue
		}
		if k := len(d) - 1; k >= 0 && s[k] == n*a[i] && t[k] == n*b[i] {
			d[k] *= n
			s[k], t[k] = a[i], b[i]
			continue
		}
		d, s, t = append(d, n), append(s, a[i]), append(t, b[i])
	}
	return d, s, t
}

// scatterStep adds windows of updates to a copy of x, where the index vectors say. A window that does not fit is left out.
type scatterStep struct {
	x, updates view
	index      indexTable
	axes       []int
	limit      []int
	out        []int // strides of the result
	batch      []int // strides of the batch axes in the updates
	dims       []int // of the window
	from, to   []int
	set        *kernel.Set
	copier     copier
	o          odometer
}

// scatterSum plans a scatter of float32 that adds.
func (p *plan) scatterSum(x, indices, updates view, a scatterAttr) *value {
	s := &scatterStep{x: x, updates: updates, index: newIndexTable(indices, a.indexAxis), axes: a.toOps, out: rowMajor(x.dims), set: p.b.set}
	window := make([]int, len(x.dims)) // sizes along x
	k := 0
	for i := range x.dims {
		window[i] = 1
		if slices.Contains(a.inserted, i) {
			continue
		}
		u := a.window[k]
		window[i] = updates.dims[u]
		s.dims, s.from, s.to = append(s.dims, window[i]), append(s.from, updates.str[u]), append(s.to, s.out[i])
		k++
	}
	for i := range updates.dims {
		if !slices.Contains(a.window, i) {
			s.batch = append(s.batch, updates.str[i])
		}
	}
	for _, i := range a.toOps {
		s.limit = append(s.limit, x.dims[i]-window[i])
	}
	s.dims, s.to, s.from = joinAxes(s.dims, s.to, s.from)
	return p.add(&value{kind: kindStep, dims: x.dims, step: s})
}

func (s *scatterStep) reads() []view { return []view{s.x, s.updates, s.index.from} }
func (s *scatterStep) prepare(*executable) {
	s.copier = newCopier(s.x, 0, s.out)
	s.o = newOdometer(s.index.dims, s.index.str, s.batch)
}

func (s *scatterStep) run(_ *executable, out []float32) {
	s.copier.copy(out, 0, 0)
	o := &s.o
next:
	for range size(s.index.dims) {
		to, from := 0, s.updates.off+o.off[1]
		for j, a := range s.axes {
			i := s.index.at(o.off[0] + j*s.index.vector)
			if i < 0 || i > s.limit[j] {
				o.next()
				continue next
			}
			to += i * s.out[a]
		}
		s.add(out, s.updates.base.buf, to, from, 0)
		o.next()
	}
}

// add adds the window's axes from k on.
func (s *scatterStep) add(out, src []float32, to, from, k int) {
	if k == len(s.dims) {
		out[to] += src[from]
		return
	}
	n, t, f := s.dims[k], s.to[k], s.from[k]
	if k == len(s.dims)-1 && t == 1 && f == 1 {
		d := out[to : to+n]
		s.set.Binary[kernel.Add](d, d, src[from:from+n])
		return
	}
	for range n {
		s.add(out, src, to, from, k+1)
		to += t
		from += f
	}
}

// windowStep reduces windows of x, whole rows of the last axis at a time, which is not windowed.
type windowStep struct {
	x         view
	op        foldOp
	size, str []int // of the axes but the last
	dil       []int
	pads      [][2]int
	dims      []int // of the result
	combine   func(dst, a, b []float32)
	// source is what a selection adds to the element that it selects of each window, instead of reducing it.
	source view
	pick   bool

	grid    []int // of windows
	row     []int // strides of contiguous memory of x's dimensions
	apart   bool
	batches int
	space   []windowSpace // by worker
	out     []float32
}

type windowSpace struct {
	position []int
	best     []float32
	at       []int
}

// window plans a reduction of windows, or a selection and scatter, of float32. It returns nil for what it has no plan for.
func (p *plan) window(x view, source view, a windowAttr, pick bool, dims []int) *value {
	n := len(x.dims)
	at := func(list []int, i, otherwise int) int {
		if len(list) == 0 {
			return otherwise
		}
		return list[i]
	}
	s := &windowStep{pick: pick, dims: dims}
	switch a.reduce {
	case compute.ReduceOpSum:
		s.op, s.combine = foldSum, p.b.set.Binary[kernel.Add]
	case compute.ReduceOpMax:
		s.op, s.combine = foldMax, p.b.set.Binary[kernel.Max]
	case compute.ReduceOpMin:
		s.op, s.combine = foldMin, p.b.set.Binary[kernel.Min]
	default:
		return nil
	}
	if n == 0 {
		return nil
	}
	for i := range n {
		pad := [2]int{}
		if len(a.pads) > 0 {
			pad = a.pads[i]
		}
		w := at(a.size, i, 1)
		st := at(a.strides, i, w)
		if at(a.inDil, i, 1) != 1 || i == n-1 && (w != 1 || st != 1 || pad != [2]int{}) {
			return nil
		}
		s.size, s.str, s.dil, s.pads = append(s.size, w), append(s.str, st), append(s.dil, at(a.windowDil, i, 1)), append(s.pads, pad)
	}
	if x.str[n-1] != 1 && x.dims[n-1] > 1 {
		x = p.copyOnce(x)
	}
	s.x = x
	if pick {
		if source.str[n-1] != 1 && source.dims[n-1] > 1 {
			source = p.copyOnce(source)
		}
		s.source = source
	}
	return p.add(&value{kind: kindStep, dims: dims, step: s})
}

func (s *windowStep) reads() []view {
	if s.pick {
		return []view{s.x, s.source}
	}
	return []view{s.x}
}

// taps calls f with the place in x, and the offset in contiguous memory of x's dimensions, of each element of the window
// at a position, the last axis left out.
func (s *windowStep) taps(position []int, row []int, axis, from, at int, f func(from, at int)) {
	if axis == len(position) {
		f(from, at)
		return
	}
	for t := range s.size[axis] {
		i := position[axis]*s.str[axis] - s.pads[axis][0] + t*s.dil[axis]
		if i >= 0 && i < s.x.dims[axis] {
			s.taps(position, row, axis+1, from+i*s.x.str[axis], at+i*row[axis], f)
		}
	}
}

func (s *windowStep) prepare(x *executable) {
	n := len(s.x.dims)
	s.grid = s.dims[:n-1]
	if s.pick {
		s.grid = s.source.dims[:n-1]
	}
	s.row = rowMajor(s.x.dims)
	s.batches = 1
	// windows of different batches are apart
	s.apart = len(s.grid) > 0 && s.size[0] == 1 && s.str[0] == 1 && s.pads[0] == [2]int{}
	if s.apart {
		s.batches = s.grid[0]
	}
	for range x.b.pool.Threads() {
		s.space = append(s.space, windowSpace{make([]int, n-1), make([]float32, s.x.dims[n-1]), make([]int, s.x.dims[n-1])})
	}
}

func (s *windowStep) run(x *executable, out []float32) {
	if s.pick {
		clear(out)
	}
	s.out = out
	x.parallel(s.batches, size(s.x.dims)*4, s)
	s.out = nil
}

// Do computes the windows of one batch.
func (s *windowStep) Do(worker, b int) {
	w := &s.space[worker]
	cols := len(w.best)
	inner := s.grid
	if s.apart {
		inner = s.grid[1:]
		w.position[0] = b
	}
	position := w.position[len(s.grid)-len(inner):]
	count := size(inner)
	for i := range count {
		k := i
		for a := len(inner) - 1; a >= 0; a-- {
			position[a] = k % inner[a]
			k /= inner[a]
		}
		if s.pick {
			s.pickWindow(s.out, w.position, s.row, w.best, w.at)
			continue
		}
		d := s.out[(b*count+i)*cols:][:cols]
		fill(d, foldStart[s.op])
		s.taps(w.position, s.row, 0, s.x.off, 0, func(from, _ int) { s.combine(d, d, s.x.base.buf[from:from+cols]) })
	}
}

// pickWindow adds the source to the first largest, or smallest, element of a window; NaN is larger, and smaller, than all.
func (s *windowStep) pickWindow(out []float32, position, row []int, best []float32, at []int) {
	for c := range at {
		at[c] = -1
	}
	s.taps(position, row, 0, s.x.off, 0, func(from, to int) {
		for c, v := range s.x.base.buf[from : from+len(best)] {
			if at[c] < 0 || v != v || s.op == foldMax && v > best[c] || s.op == foldMin && v < best[c] {
				best[c], at[c] = v, to+c
			}
		}
	})
	from := s.source.off
	for a, i := range position {
		from += i * s.source.str[a]
	}
	for c, v := range s.source.base.buf[from : from+len(at)] {
		if at[c] >= 0 {
			out[at[c]] += v
		}
	}
}

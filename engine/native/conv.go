package native

import (
	"cmp"
	"fmt"
	"math"
	"slices"

	"github.com/gomlx/compute"

	"github.com/lathe-ml/lathe/engine/kernel"
)

// Convolutions are products: each output position is a row, which reads a window of the padded input in place, and each
// output channel is a column. Groups are a batch axis of that product; if a group is a single channel, they are lanes.
// An input dilation (the gradient of a stride) leaves most taps on zeros; it is cut into one convolution for each phase
// of the output, which has only the taps that are not.

// convolution is one convolution of views whose axes are in order.
type convolution struct {
	x view // group, batch, spatial..., channel
	w view // group, spatial..., channel, output channel
	// of each spatial axis: output size, stride, padding, dilation of the input and of the kernel
	out, stride, inDil, kernDil []int
	pads                        [][2]int
}

// conv plans a convolution and returns its result, or nil for what it has no plan for.
func (p *plan) conv(x, w view, a convAttr, dims []int) *value {
	groups, batchGroups := max(1, a.groups), max(1, a.batchGrp)
	if groups > 1 && batchGroups > 1 {
		return nil
	}
	c := newConvolution(x, w, a, dims)
	n, last := len(c.x.dims), len(c.w.dims)-1
	if g := groups * batchGroups; g > 1 { // the grouped axis in two
		axis := n - 1
		if batchGroups > 1 {
			axis = 1
		}
		splitAxis(&c.x, axis, g)
		splitAxis(&c.w, last, g)
	}
	return p.viewOf(p.roles(p.convolve(c), a, len(a.axes.InputSpatial)+1, dims))
}

// newConvolution puts the axes of both operands in order, with one group.
func newConvolution(x, w view, a convAttr, dims []int) convolution {
	c := convolution{
		x: x.transpose(slices.Concat([]int{a.axes.InputBatch}, a.axes.InputSpatial, []int{a.axes.InputChannels})),
		w: w.transpose(slices.Concat(a.axes.KernelSpatial, []int{a.axes.KernelInputChannels, a.axes.KernelOutputChannels})),
	}
	c.x.dims, c.x.str = slices.Insert(c.x.dims, 0, 1), slices.Insert(c.x.str, 0, 0)
	c.w.dims, c.w.str = slices.Insert(c.w.dims, 0, 1), slices.Insert(c.w.str, 0, 0)
	or1 := func(list []int, i int) int {
		if len(list) == 0 {
			return 1
		}
		return list[i]
	}
	for i, o := range a.axes.OutputSpatial {
		c.out = append(c.out, dims[o])
		c.stride, c.inDil, c.kernDil = append(c.stride, or1(a.strides, i)), append(c.inDil, or1(a.inDil, i)), append(c.kernDil, or1(a.kernDil, i))
		pad := [2]int{}
		if len(a.pads) > 0 {
			pad = a.pads[i]
		}
		c.pads = append(c.pads, pad)
	}
	return c
}

// splitAxis makes the outer part of an axis the group axis.
func splitAxis(v *view, axis, groups int) {
	v.dims[axis] /= groups
	v.dims[0], v.str[0] = groups, v.dims[axis]*v.str[axis]
}

// roles returns the result of a convolution (group, batch, spatial..., channel) with the axes where a wants them. The
// group is the outer part of the axis of the given role: 0 batch, then spatial, then channel.
func (p *plan) roles(v view, a convAttr, grouped int, dims []int) view {
	axes := slices.Concat([]int{a.axes.OutputBatch}, a.axes.OutputSpatial, []int{a.axes.OutputChannels})
	role := make([]int, len(axes)) // by axis of the result
	for r, at := range axes {
		role[at] = r
	}
	var order []int
	for _, r := range role {
		if r == grouped {
			order = append(order, 0)
		}
		order = append(order, r+1)
	}
	t := v.transpose(order)
	r, ok := t.reshape(dims)
	if !ok {
		r, _ = p.copyOf(t).view.reshape(dims)
	}
	return r
}

// convolve plans the convolution. The result's axes are group, batch, spatial..., channel.
func (p *plan) convolve(c convolution) view {
	sp := len(c.out)
	groups, batch, channels := c.x.dims[0], c.x.dims[1], c.w.dims[sp+2]
	if c.narrow() { // make the groups lanes, of both operands
		for _, v := range []*view{&c.x, &c.w} {
			if v.str[0] != 1 {
				*v = p.groupsLast(*v)
			}
		}
	}
	shape := slices.Concat([]int{groups, batch}, c.out, []int{channels})
	if c.positions() < c.taps() && !c.lanes() {
		return p.weightGradient(c, shape)
	}
	// memory: batch, spatial..., group, channel; of lanes: ..., channel, group
	memory := slices.Concat([]int{batch}, c.out, []int{groups, channels})
	row := rowMajor(memory)
	str := slices.Concat([]int{row[sp+1], row[0]}, row[1:sp+1], []int{row[sp+2]})
	if c.lanes() {
		memory[sp+1], memory[sp+2] = channels, groups
		row = rowMajor(memory)
		str[0], str[sp+2] = row[sp+2], row[sp+1]
	}
	out := view{nil, 0, shape, str}
	s := &convStep{}
	if phases := c.phases(); phases != nil {
		xv, low := p.paddedFor(c, phases)
		xv = p.asLanes(c, xv)
		for _, f := range phases {
			p.part(s, c, f.window(c, xv, low), f.weights(c), f.output(c, out))
			s.clear = s.clear || slices.Contains(f.taps, 0)
		}
	} else {
		xv := p.asLanes(c, p.paddedInput(c))
		p.part(s, c, c.window(xv), c.w, out)
	}
	v := p.add(&value{kind: kindStep, dims: memory, step: s})
	out.base = v
	return out
}

func (c *convolution) positions() int { return c.x.dims[1] * size(c.out) }

func (c *convolution) taps() int { return size(c.w.dims[1 : len(c.w.dims)-1]) }

// narrow says whether there are many groups with little to do in each.
func (c *convolution) narrow() bool { return c.x.dims[0] >= 8 && c.w.dims[len(c.w.dims)-1] < 4 }

// lanes says whether the groups are lanes: narrow, and contiguous in both operands.
func (c *convolution) lanes() bool { return c.narrow() && c.x.str[0] == 1 && c.w.str[0] == 1 }

// groupsLast returns a copy of a view with its first axis contiguous.
func (p *plan) groupsLast(v view) view {
	var order []int
	for i := range v.dims {
		order = append(order, (i+1)%len(v.dims))
	}
	var back []int
	for i := range v.dims {
		back = append(back, (i+len(v.dims)-1)%len(v.dims))
	}
	return p.copyOnce(v.transpose(order)).transpose(back)
}

// asLanes returns the padded input with the groups contiguous if they are lanes.
func (p *plan) asLanes(c convolution, x view) view {
	if c.lanes() && x.str[0] != 1 {
		return p.groupsLast(x)
	}
	return x
}

// copyOnce writes a view out, once for all who ask.
func (p *plan) copyOnce(v view) view {
	key := fmt.Sprint("copy ", v.base.id, v.off, v.dims, v.str)
	if p.pads[key] == nil {
		p.pads[key] = p.copyOf(v)
	}
	return p.pads[key].view
}

// window returns the padded input with the axes group, batch, output spatial..., kernel spatial..., channel.
func (c *convolution) window(x view) view {
	sp := len(c.out)
	v := view{x.base, x.off, slices.Clone(x.dims[:2]), slices.Clone(x.str[:2])}
	for i := range sp {
		v.dims, v.str = append(v.dims, c.out[i]), append(v.str, x.str[i+2]*c.stride[i])
	}
	for i := range sp {
		v.dims, v.str = append(v.dims, c.w.dims[i+1]), append(v.str, x.str[i+2]*c.kernDil[i])
	}
	v.dims, v.str = append(v.dims, x.dims[sp+2]), append(v.str, x.str[sp+2])
	return v
}

// part plans one product of windows (group, batch, positions..., taps..., channel) with weights (group, taps..., channel,
// output channel) into places of the result (group, batch, positions..., channel).
func (p *plan) part(s *convStep, c convolution, win, w, out view) {
	sp := len(c.out)
	positions, taps, wTaps := []int{1}, []int{}, []int{}
	for i := range sp {
		positions, taps, wTaps = append(positions, i+2), append(taps, sp+2+i), append(wTaps, i+1)
	}
	taps, wTaps = append(taps, 2*sp+2), append(wTaps, sp+1)
	if win.size() == 0 || w.size() == 0 {
		return
	}
	q := convPart{a: win, b: w, out: out.off}
	a := kernel.Operand{Batch: win.offsets([]int{0}), Rows: win.offsets(positions), K: win.offsets(taps)}
	b := kernel.Operand{Batch: w.offsets([]int{0}), Rows: w.offsets([]int{sp + 2}), K: w.offsets(wTaps)}
	rows := out.offsets(positions)
	if c.lanes() {
		q.lanes = kernel.NewLanes(p.b.set, a, b, win.dims[0], rows, out.offsets([]int{sp + 2}))
	} else {
		q.gemm = kernel.NewGemm(p.b.set, a, b, out.offsets([]int{0}), rows)
	}
	s.parts = append(s.parts, q)
}

// weightGradient plans a convolution of few positions and long windows. Positions become columns, in the order in which
// they lie in memory, and the contraction follows the other operand.
func (p *plan) weightGradient(c convolution, shape []int) view {
	sp := len(c.out)
	win, w := c.window(p.paddedInput(c)), c.w
	positions, taps, wTaps := []int{1}, []int{}, []int{}
	for i := range sp {
		positions, taps, wTaps = append(positions, i+2), append(taps, sp+2+i), append(wTaps, i+1)
	}
	taps, wTaps = append(taps, 2*sp+2), append(wTaps, sp+1)
	byStride(w, wTaps, taps)
	byStride(win, positions, nil)
	groups, channels := shape[0], shape[len(shape)-1]
	memory := []int{groups, channels}
	for _, i := range positions {
		memory = append(memory, win.dims[i])
	}
	row := rowMajor(memory)
	str := make([]int, len(shape))
	str[0], str[sp+2] = row[0], row[1]
	for k, i := range positions {
		str[i] = row[k+2]
	}
	columns := size(memory[2:])
	a := kernel.Operand{Batch: w.offsets([]int{0}), Rows: w.offsets([]int{sp + 2}), K: w.offsets(wTaps)}
	b := kernel.Operand{Batch: win.offsets([]int{0}), Rows: win.offsets(positions), K: win.offsets(taps)}
	s := &convStep{parts: []convPart{{a: w, b: win, gemm: kernel.NewGemm(p.b.set, a, b, multiples(groups, channels*columns), multiples(channels, columns))}}}
	v := p.add(&value{kind: kindStep, dims: memory, step: s})
	return view{v, 0, shape, str}
}

// phase is the outputs o = first + s*j of a convolution of an input dilated by s, in each spatial axis: only the taps
// firstTap + s*i meet elements of the input, number j + base + i.
type phase struct{ first, count, firstTap, taps, base []int }

// phases cuts a convolution of a dilated input, or returns nil.
func (c *convolution) phases() []phase {
	dilated := false
	for i, d := range c.inDil {
		dilated = dilated || d > 1
		if c.stride[i] != 1 || d > 1 && c.kernDil[i] != 1 {
			return nil
		}
	}
	if !dilated {
		return nil
	}
	all := []phase{{}}
	for i, s := range c.inDil {
		var next []phase
		for _, f := range all {
			for first := range min(s, c.out[i]) {
				pad := c.pads[i][0]
				tap := ((pad-first)%s + s) % s
				taps := 0
				if k := c.w.dims[i+1]; tap < k {
					taps = (k - tap + s - 1) / s
				}
				if s == 1 {
					tap, taps = 0, c.w.dims[i+1]
				}
				next = append(next, phase{
					append(slices.Clone(f.first), first), append(slices.Clone(f.count), (c.out[i]-first+s-1)/s),
					append(slices.Clone(f.firstTap), tap), append(slices.Clone(f.taps), taps),
					append(slices.Clone(f.base), (first+tap-pad)/s),
				})
			}
		}
		all = next
	}
	return all
}

// paddedFor returns the input with zeros around it as far as any phase reads, and how many lie before it.
func (p *plan) paddedFor(c convolution, phases []phase) (view, []int) {
	sp := len(c.out)
	pads, low := make([]compute.PadAxis, sp+3), make([]int, sp)
	for i := range sp {
		n := c.x.dims[i+2]
		// Dilating n elements by s gives (n-1)*s+1, so a negative padding may cut elements off; what is read stays the same.
		before, after := 0, 0
		for _, f := range phases {
			if f.taps[i] == 0 {
				continue
			}
			kernDil := c.kernDil[i]
			before = max(before, -f.base[i])
			after = max(after, f.base[i]+f.count[i]-1+(f.taps[i]-1)*kernDil-(n-1))
		}
		low[i] = before
		pads[i+2] = compute.PadAxis{Start: before, End: after}
	}
	return p.padded(c.x, pads), low
}

func (f *phase) window(c convolution, x view, low []int) view {
	sp := len(c.out)
	v := view{x.base, x.off, slices.Clone(x.dims[:2]), slices.Clone(x.str[:2])}
	for i := range sp {
		if f.taps[i] > 0 {
			v.off += (f.base[i] + low[i]) * x.str[i+2]
		}
		v.dims, v.str = append(v.dims, f.count[i]), append(v.str, x.str[i+2])
	}
	for i := range sp {
		v.dims, v.str = append(v.dims, f.taps[i]), append(v.str, x.str[i+2]*c.kernDil[i])
	}
	v.dims, v.str = append(v.dims, x.dims[sp+2]), append(v.str, x.str[sp+2])
	return v
}

func (f *phase) weights(c convolution) view {
	v := view{c.w.base, c.w.off, slices.Clone(c.w.dims), slices.Clone(c.w.str)}
	for i := range c.out {
		if f.taps[i] > 0 {
			v.off += f.firstTap[i] * v.str[i+1]
		}
		v.dims[i+1] = f.taps[i]
		v.str[i+1] *= c.inDil[i]
	}
	return v
}

func (f *phase) output(c convolution, out view) view {
	v := view{out.base, out.off, slices.Clone(out.dims), slices.Clone(out.str)}
	for i := range c.out {
		v.off += f.first[i] * v.str[i+2]
		v.dims[i+2] = f.count[i]
		v.str[i+2] *= c.inDil[i]
	}
	return v
}

// paddedInput returns the input with its padding and dilation written out, if it has any.
func (p *plan) paddedInput(c convolution) view {
	pads, any := make([]compute.PadAxis, len(c.x.dims)), false
	for i, q := range c.pads {
		pads[i+2] = compute.PadAxis{Start: q[0], End: q[1], Interior: c.inDil[i] - 1}
		any = any || pads[i+2] != compute.PadAxis{}
	}
	if !any {
		return c.x
	}
	return p.padded(c.x, pads)
}

// convStep is a convolution, or the phases of one.
type convStep struct {
	parts []convPart
	clear bool // some outputs belong to no part
}

type convPart struct {
	a, b  view
	out   int
	gemm  *kernel.Gemm
	lanes *kernel.Lanes
}

func (s *convStep) reads() (v []view) {
	for _, q := range s.parts {
		v = append(v, q.a, q.b)
	}
	return v
}

func (s *convStep) prepare(x *executable) {
	for _, q := range s.parts {
		if q.gemm != nil {
			x.space.Grow(q.gemm)
		}
	}
}

func (s *convStep) run(x *executable, out []float32) {
	if s.clear || len(s.parts) == 0 {
		clear(out)
	}
	for _, q := range s.parts {
		a, b := q.a.base.buf[q.a.low():], q.b.base.buf[q.b.low():]
		if q.lanes != nil {
			q.lanes.Run(x.b.pool, a, b, out[q.out:])
		} else {
			q.gemm.Run(x.b.pool, x.space, a, b, out[q.out:], false)
		}
	}
}

// byStride sorts axes of a view, the widest stride first and repeated ones before those, and a list beside them alike.
func byStride(v view, axes, beside []int) {
	width := func(a int) int {
		switch s := v.str[a]; {
		case s == 0:
			return math.MaxInt
		case s < 0:
			return -s
		default:
			return s
		}
	}
	order := make([]int, len(axes))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(i, j int) int { return cmp.Compare(width(axes[j]), width(axes[i])) })
	sort := func(list []int) {
		old := slices.Clone(list)
		for i, o := range order {
			list[i] = old[o]
		}
	}
	sort(axes)
	if beside != nil {
		sort(beside)
	}
}

// padded returns a copy of a view with zeros around and between its elements. The copy lies in memory as the view does,
// so that a convolution and its weights' gradient share one.
func (p *plan) padded(v view, pads []compute.PadAxis) view {
	axes := make([]int, len(pads))
	for i := range axes {
		axes[i] = i
	}
	byStride(v, axes, nil)
	src := v.transpose(axes)
	var memory []int
	var memoryPads []compute.PadAxis
	for k, i := range axes {
		q := pads[i]
		memory = append(memory, src.dims[k]+q.Start+q.End+q.Interior*(src.dims[k]-1))
		memoryPads = append(memoryPads, q)
	}
	one := func(d int) bool { return d == 1 }
	keyDims, keyStr, keyPads := []int{}, []int{}, []compute.PadAxis{}
	for k, d := range src.dims { // axes of length 1 make no difference
		if !one(d) || memory[k] != 1 {
			keyDims, keyStr, keyPads = append(keyDims, d), append(keyStr, src.str[k]), append(keyPads, memoryPads[k])
		}
	}
	key := fmt.Sprint(src.base.id, src.off, keyDims, keyStr, keyPads)
	c := p.pads[key]
	if c == nil || size(c.dims) != size(memory) {
		c = p.pad(src, view{}, memoryPads, memory)
		p.pads[key] = c
	}
	back := make([]int, len(axes))
	for k, i := range axes {
		back[i] = k
	}
	return view{c, 0, memory, rowMajor(memory)}.transpose(back)
}

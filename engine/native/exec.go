package native

import (
	"fmt"
	"runtime/debug"
	"slices"

	"github.com/gomlx/compute"
	"github.com/gomlx/compute/shapes"

	"github.com/lathe-ml/lathe/engine/kernel"
)

// executable is a plan with the memory that it runs in. It runs once at a time.
type executable struct {
	b *Backend
	p *plan

	params   []*value // by parameter
	arena    []float32
	space    *kernel.Workspace
	loops    []loopSpace
	partials []float32
	job      loopJob
	drop     [][]*value // values of the portable backend that are dead after a group
	watch    *watch     // in tests
}

// planFunction plans a function, with the values that it uses of functions around it as further parameters. It returns
// nil where the kernels have nothing to do.
func planFunction(b *Backend, f *Function, outside ...*node) (x *executable, err error) {
	defer func() {
		if r := recover(); r != nil {
			x, err = nil, fmt.Errorf("%v\n%s", r, debug.Stack())
		}
	}()
	for _, n := range f.nodes {
		if slices.Contains(n.shape.Dimensions, shapes.DynamicDim) {
			return nil, nil
		}
	}
	p := newPlan(b, f, outside)
	if err := p.build(); err != nil {
		return nil, err
	}
	if p.native == 0 && f.parent == nil && slices.ContainsFunc(f.out, func(n *node) bool { return n.shape.Size() > 0 }) {
		return nil, nil // without elements there is nothing to do, which the portable backend does not know everywhere
	}
	return newExecutable(b, p)
}

func newExecutable(b *Backend, p *plan) (*executable, error) {
	threads := b.pool.Threads()
	x := &executable{b: b, p: p, space: kernel.NewWorkspace(threads), loops: make([]loopSpace, threads)}
	for _, n := range p.params {
		x.params = append(x.params, p.values[n])
	}
	if err := x.foldConstants(); err != nil {
		return nil, err
	}
	if b.mem.watched != nil {
		x.watch = newWatch(x)
	}
	x.bindMemory()
	x.drop = make([][]*value, len(p.groups))
	for _, v := range p.order {
		if v.kind == kindForeign && v.group >= 0 && v.last < len(p.groups) {
			x.drop[v.last] = append(x.drop[v.last], v)
		}
	}
	partials := 0
	for _, g := range p.groups {
		var err error
		switch g.kind {
		case loopGroup:
			if g.prog, err = x.compileLoop(g); err != nil {
				return nil, err
			}
			for i := range x.loops {
				x.loops[i].grow(g.prog)
			}
			partials = max(partials, (g.prog.chunks-1)*g.prog.partials)
		case stepGroup:
			g.members[0].step.prepare(x)
		case regionGroup:
			if g.region, err = x.compileRegion(g.members); err != nil {
				return nil, err
			}
		}
	}
	x.partials = aligned(partials)
	return x, nil
}

// bindMemory makes the arena, unless it is there, and tells all values in it where they are.
func (x *executable) bindMemory() {
	if x.arena != nil {
		return
	}
	x.arena = aligned(x.p.arena)
	for _, v := range x.p.order {
		if x.inArena(v) {
			v.lieIn(x.arena[v.place:])
		}
	}
}

// dropMemory lets the arena go until the next call.
func (x *executable) dropMemory() {
	x.arena = nil
	for _, v := range x.p.order {
		if x.inArena(v) {
			v.buf, v.flat = nil, nil
		}
	}
	for _, y := range x.p.inner {
		y.dropMemory()
	}
}

// lieIn gives a value its memory.
func (v *value) lieIn(words []float32) {
	if v.kind == kindTyped {
		v.flat = typed(v.dtype).cast(words, size(v.dims))
		return
	}
	n := size(v.dims)
	v.buf = words[:n:n]
}

// foldConstants computes what depends on constants alone.
func (x *executable) foldConstants() error {
	var host []*value
	for _, v := range x.p.order {
		if v.kind == kindForeign && v.src.call.op == compute.OpTypeConstant {
			buf, err := x.b.host.BufferFromFlatData(0, v.src.call.attr, v.src.shape)
			if err != nil {
				return err
			}
			if v.foreign, v.flat = buf, nil; err == nil {
				v.flat, err = buf.Data()
			}
			if err != nil {
				return err
			}
		}
	}
	for _, v := range x.p.constants {
		if v.kind == kindForeign {
			host = append(host, v)
		}
	}
	if len(host) > 0 {
		r, err := x.compileRegion(host)
		if err != nil {
			return err
		}
		if err := r.run(x); err != nil {
			return err
		}
	}
	for _, v := range x.p.constants {
		if v.kind != kindForeign {
			v.lieIn(aligned(v.words()))
			v.step.prepare(x)
			v.step.run(x, v.buf)
		}
	}
	return nil
}

// inArena says whether a value lies in the arena.
func (x *executable) inArena(v *value) bool {
	return v.group >= 0 && v.store && v.kind != kindForeign && !slices.Contains(x.p.outs, v)
}

// call binds inputs and outputs, runs, and returns the outputs.
func (x *executable) call(bufs []*Buffer, donate []bool, outputs []shapes.Shape) (out []compute.Buffer, err error) {
	defer func() {
		if r := recover(); r != nil {
			out, err = nil, fmt.Errorf("running the computation: %v\n%s", r, debug.Stack())
		}
	}()
	x.bindMemory()
	defer x.forget()
	for i, v := range x.params {
		if v.isForeign() {
			v.foreign, v.flat = bufs[i].inner, bufs[i].flat
		} else {
			v.buf = bufs[i].flat.([]float32)
		}
	}
	for i, v := range x.p.outs {
		switch {
		case v.group < 0: // known already
		case v.kind == kindTyped:
			if v.foreign, v.flat, err = x.b.host.NewSharedBuffer(0, outputs[i]); err != nil {
				return nil, err
			}
		case v.kind != kindForeign:
			if b := x.p.reuse[v]; b != nil && donate != nil && donate[b.param] && len(b.buf) > 0 && once(bufs, b.param) {
				v.buf = b.buf
				bufs[b.param].flat = nil
				continue
			}
			v.buf = x.b.mem.get(outputs[i].Size())
		}
	}
	if err := x.run(); err != nil {
		return nil, err
	}
	out = make([]compute.Buffer, len(x.p.outs))
	for i, v := range x.p.outs {
		switch {
		case !v.isForeign() && v.group < 0: // nothing
			out[i] = &Buffer{backend: x.b, shape: outputs[i].Clone(), flat: v.buf}
		case !v.isForeign():
			out[i] = &Buffer{backend: x.b, shape: outputs[i].Clone(), flat: v.buf}
			v.buf = nil
		case v.group < 0 || slices.Contains(x.p.outs[:i], v): // not ours to give away
			inner, err := x.b.host.BufferFromFlatData(0, v.flat, outputs[i])
			if err != nil {
				return nil, err
			}
			if out[i], err = x.b.wrap(inner, outputs[i]); err != nil {
				return nil, err
			}
		default:
			out[i] = &Buffer{backend: x.b, shape: outputs[i].Clone(), flat: v.flat, inner: v.foreign}
		}
	}
	for _, v := range x.p.outs {
		if v.isForeign() && v.group >= 0 {
			v.foreign, v.flat = nil, nil
		}
	}
	return out, nil
}

// forget lets go of the memory of a call: an executable may lie idle for long.
func (x *executable) forget() {
	for _, v := range x.params {
		v.buf, v.foreign, v.flat = nil, nil, nil
	}
	for i := range x.loops {
		s := &x.loops[i]
		clear(s.slots)
		clear(s.streams[:cap(s.streams)])
	}
}

// once says whether a buffer is only one of the inputs.
func once(bufs []*Buffer, i int) bool {
	for j, b := range bufs {
		if j != i && b == bufs[i] {
			return false
		}
	}
	return true
}

func (x *executable) run() error {
	if x.watch != nil {
		x.watch.begin()
	}
	for i, g := range x.p.groups {
		if x.watch != nil {
			x.watch.before(i)
		}
		switch g.kind {
		case loopGroup:
			x.runLoop(g.prog)
		case stepGroup:
			v := g.members[0]
			v.step.run(x, v.buf)
		case regionGroup:
			if err := g.region.run(x); err != nil {
				return err
			}
		}
		if x.watch != nil {
			if err := x.watch.after(i); err != nil {
				return err
			}
		}
		for _, v := range x.drop[i] {
			if v.foreign != nil {
				if err := v.foreign.Finalize(); err != nil {
					return err
				}
				v.foreign, v.flat = nil, nil
			}
		}
	}
	return nil
}

// parallel runs a job, on several workers if there is work for them: the number of elements touched.
func (x *executable) parallel(n, work int, job kernel.Job) {
	if work < 2*chunkSize {
		for i := range n {
			job.Do(0, i)
		}
		return
	}
	x.b.pool.Run(n, job)
}

package native

import (
	"fmt"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/gomlx/compute"
	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"

	"github.com/lathe-ml/lathe/engine/kernel"
)

// executable is a compiled plan. One call runs at a time; further ones wait.
type executable struct {
	b  *Backend
	p  *plan
	mu sync.Mutex

	names    []string
	inputs   []shapes.Shape
	outputs  []shapes.Shape
	params   []*value // by parameter
	arena    []float32
	space    *kernel.Workspace
	loops    []loopSpace
	partials []float32
	job      loopJob
	drop     [][]*value // foreign values that are dead after a group
}

// Compile plans the main function.
func (b *Builder) Compile() (compute.Executable, error) {
	if b.done {
		return nil, fmt.Errorf("native: computation %q was compiled already", b.Name())
	}
	if !b.main.closed {
		return nil, fmt.Errorf("native: the main function of %q has not returned", b.Name())
	}
	b.done = true
	begin := time.Now()
	x, err := b.plan()
	if err != nil && b.backend.strict {
		return nil, err
	}
	if x != nil && err == nil {
		b.release()
		b.reported(x, time.Since(begin))
		return x, nil
	}
	h, err := b.onHost()
	if err != nil {
		return nil, err
	}
	b.reported(h, time.Since(begin))
	return h, nil
}

// release drops what only recording needed.
func (b *Builder) release() {
	b.shadow = nil
	b.main.shadow, b.main.known = nil, nil
	for _, n := range b.main.nodes {
		n.shadow = nil
	}
}

// plan returns nil where the kernels have nothing to do.
func (b *Builder) plan() (x *executable, err error) {
	defer func() {
		if r := recover(); r != nil {
			x, err = nil, fmt.Errorf("native: planning %q: %v\n%s", b.Name(), r, debug.Stack())
		}
	}()
	for _, n := range b.main.nodes {
		if slices.Contains(n.shape.Dimensions, shapes.DynamicDim) {
			return nil, nil
		}
	}
	p := newPlan(b.backend, b.main)
	if err := p.build(); err != nil {
		return nil, fmt.Errorf("native: planning %q: %w", b.Name(), err)
	}
	if p.native == 0 {
		return nil, nil
	}
	return newExecutable(b.backend, p)
}

func newExecutable(b *Backend, p *plan) (*executable, error) {
	threads := b.pool.Threads()
	x := &executable{b: b, p: p, space: kernel.NewWorkspace(threads), loops: make([]loopSpace, threads)}
	for i, n := range p.f.params {
		x.names, x.inputs = append(x.names, p.f.names[i]), append(x.inputs, n.shape)
		x.params = append(x.params, p.values[n])
	}
	for _, n := range p.f.out {
		x.outputs = append(x.outputs, n.shape)
	}
	if err := x.foldConstants(); err != nil {
		return nil, err
	}
	x.arena = aligned(p.arena)
	outs := map[*value]bool{}
	for _, v := range p.outs {
		outs[v] = true
	}
	for _, v := range p.order {
		if v.group >= 0 && v.store && !v.isForeign() && !outs[v] {
			n := size(v.dims)
			v.buf = x.arena[v.place : v.place+n : v.place+n]
		}
	}
	x.drop = make([][]*value, len(p.groups))
	for _, v := range p.order {
		if v.isForeign() && v.group >= 0 && v.last < len(p.groups) && !outs[v] {
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
			if !g.members[0].export {
				if g.region, err = x.compileRegion(g.members); err != nil {
					return nil, err
				}
			}
		}
	}
	x.partials = aligned(partials)
	return x, nil
}

// foldConstants computes what depends on constants alone.
func (x *executable) foldConstants() error {
	for _, v := range x.p.order {
		if v.isForeign() && v.src.call.op == compute.OpTypeConstant {
			buf, err := x.b.host.BufferFromFlatData(0, v.src.call.attr, v.src.shape)
			if err != nil {
				return err
			}
			v.foreign = buf
		}
	}
	var members []*value
	for _, v := range x.p.constants {
		if v.isForeign() {
			members = append(members, v)
		}
	}
	if len(members) > 0 {
		r, err := x.compileRegion(members)
		if err != nil {
			return err
		}
		if err := r.run(); err != nil {
			return err
		}
	}
	for _, v := range x.p.constants {
		if s, ok := v.step.(*importStep); ok {
			v.buf = make([]float32, size(v.dims))
			s.run(x, v.buf)
		}
	}
	return nil
}

// inArena says whether a value lies in the arena.
func (x *executable) inArena(v *value) bool {
	return v.group >= 0 && v.store && !v.isForeign() && !slices.Contains(x.p.outs, v)
}

// Finalize drops the memory.
func (x *executable) Finalize() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.p, x.arena, x.partials, x.loops, x.space = nil, nil, nil, nil, nil
}

// Inputs returns the parameters' names and shapes.
func (x *executable) Inputs() ([]string, []shapes.Shape) { return x.names, x.inputs }

// Outputs returns the results' shapes.
func (x *executable) Outputs() []shapes.Shape { return x.outputs }

// checkInputs returns the buffers as this backend's.
func (b *Backend) checkInputs(inputs []compute.Buffer, donate []bool, want []shapes.Shape) ([]*Buffer, error) {
	if len(inputs) != len(want) {
		return nil, fmt.Errorf("native: the computation takes %d inputs, got %d", len(want), len(inputs))
	}
	if donate != nil && len(donate) != len(inputs) {
		return nil, fmt.Errorf("native: donate has %d entries for %d inputs", len(donate), len(inputs))
	}
	bufs := make([]*Buffer, len(inputs))
	for i, in := range inputs {
		v, ok := in.(*Buffer)
		if !ok || v == nil || v.backend != b {
			return nil, fmt.Errorf("native: input %d (%T) is not a buffer of this backend", i, in)
		}
		if err := v.check(); err != nil {
			return nil, fmt.Errorf("native: input %d: %w", i, err)
		}
		if want != nil && !slices.Contains(want[i].Dimensions, shapes.DynamicDim) && !v.shape.Equal(want[i]) {
			return nil, fmt.Errorf("native: input %d has shape %s, want %s", i, v.shape, want[i])
		}
		bufs[i] = v
	}
	return bufs, nil
}

// Execute runs the computation.
func (x *executable) Execute(inputs []compute.Buffer, donate []bool, _ compute.DeviceNum) (out []compute.Buffer, err error) {
	bufs, err := x.b.checkInputs(inputs, donate, x.inputs)
	if err != nil {
		return nil, err
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.p == nil {
		return nil, fmt.Errorf("native: the computation was finalized")
	}
	defer func() {
		if r := recover(); r != nil {
			out, err = nil, fmt.Errorf("native: running the computation: %v\n%s", r, debug.Stack())
		}
	}()
	for i, v := range x.params {
		if v.isForeign() {
			v.foreign = bufs[i].inner
		} else {
			v.buf = bufs[i].flat.([]float32)
			if v.buf == nil {
				v.buf = []float32{}
			}
		}
	}
	for i, v := range x.p.outs {
		if v.isForeign() {
			continue
		}
		if b := x.p.reuse[v]; b != nil && donate != nil && donate[b.param] && len(b.buf) > 0 && once(bufs, b.param) {
			v.buf = b.buf
			bufs[b.param].flat = nil
			continue
		}
		v.buf = x.b.mem.get(x.outputs[i].Size())
	}
	if err := x.run(); err != nil {
		return nil, fmt.Errorf("native: %w", err)
	}
	out = make([]compute.Buffer, len(x.p.outs))
	for i, v := range x.p.outs {
		if !v.isForeign() {
			out[i] = &Buffer{backend: x.b, shape: x.outputs[i].Clone(), flat: v.buf}
			v.buf = nil
			continue
		}
		inner := v.foreign
		if v.group < 0 || slices.Contains(x.p.outs[:i], v) { // not ours to give away
			flat, err := inner.Data()
			if err != nil {
				return nil, err
			}
			if inner, err = x.b.host.BufferFromFlatData(0, flat, x.outputs[i]); err != nil {
				return nil, err
			}
		}
		if out[i], err = x.b.wrap(inner, x.outputs[i]); err != nil {
			return nil, err
		}
	}
	for i, v := range x.params {
		v.buf, v.foreign = nil, nil
		if donate != nil && donate[i] {
			if err := bufs[i].Finalize(); err != nil {
				return nil, err
			}
		}
	}
	return out, nil
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
	for i, g := range x.p.groups {
		switch v := g.members[0]; g.kind {
		case loopGroup:
			x.runLoop(g.prog)
		case stepGroup:
			v.step.run(x, v.buf)
		case regionGroup:
			if v.export {
				if err := x.exportMask(v); err != nil {
					return err
				}
			} else if err := g.region.run(); err != nil {
				return err
			}
		}
		for _, v := range x.drop[i] {
			if v.foreign != nil {
				if err := v.foreign.Finalize(); err != nil {
					return err
				}
				v.foreign = nil
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

// hostExecutable runs a whole computation on the portable backend.
type hostExecutable struct {
	b     *Backend
	exec  compute.Executable
	extra int // results at the end that nobody asked for
}

// onHost compiles the computation on the portable backend. Operations with several results are asked for all of them:
// the portable backend fails where only the first ones are.
func (b *Builder) onHost() (compute.Executable, error) {
	f := *b.main
	for _, c := range f.calls {
		if len(c.out) > 1 {
			f.out = append(slices.Clip(f.out), c.out...)
		}
	}
	extra := len(f.out) - len(b.main.out)
	if extra == 0 {
		exec, err := b.shadow.Compile()
		return &hostExecutable{b.backend, exec, 0}, err
	}
	host := b.backend.host.Builder(b.name)
	var params []Value
	for i, n := range f.params {
		v, err := host.Main().Parameter(f.names[i], n.shape, nil)
		if err != nil {
			return nil, err
		}
		params = append(params, v)
	}
	out, err := f.write(host.Main(), params, nil)
	if err != nil {
		return nil, err
	}
	if err := host.Main().Return(out, nil); err != nil {
		return nil, err
	}
	exec, err := host.Compile()
	return &hostExecutable{b.backend, exec, extra}, err
}

func (h *hostExecutable) Finalize() { h.exec.Finalize() }

func (h *hostExecutable) Inputs() ([]string, []shapes.Shape) { return h.exec.Inputs() }

func (h *hostExecutable) Outputs() []shapes.Shape {
	all := h.exec.Outputs()
	return all[:len(all)-h.extra]
}

func (h *hostExecutable) Execute(inputs []compute.Buffer, donate []bool, d compute.DeviceNum) ([]compute.Buffer, error) {
	_, want := h.exec.Inputs()
	bufs, err := h.b.checkInputs(inputs, donate, want)
	if err != nil {
		return nil, err
	}
	in, give := make([]compute.Buffer, len(bufs)), make([]bool, len(bufs))
	for i, v := range bufs {
		if in[i], give[i] = v.inner, donate != nil && donate[i]; in[i] == nil {
			if in[i], err = h.b.host.BufferFromFlatData(d, v.flat, v.shape); err != nil {
				return nil, err
			}
			give[i] = true
		}
	}
	results, err := h.exec.Execute(in, give, d)
	if err != nil {
		return nil, err
	}
	wanted := len(results) - h.extra
	for _, r := range results[wanted:] {
		if err := r.Finalize(); err != nil {
			return nil, err
		}
	}
	out := make([]compute.Buffer, wanted)
	for i, r := range results[:wanted] {
		shape, err := r.Shape()
		if err != nil {
			return nil, err
		}
		if out[i], err = h.b.wrap(r, shape); err != nil {
			return nil, err
		}
		if shape.DType == dtypes.Float32 { // this backend's memory
			f := h.b.mem.get(shape.Size())
			if err := r.ToFlatData(f); err != nil {
				return nil, err
			}
			if err := r.Finalize(); err != nil {
				return nil, err
			}
			out[i] = &Buffer{backend: h.b, shape: shape.Clone(), flat: f}
		}
	}
	for i, v := range bufs {
		if donate != nil && donate[i] {
			if v.inner != nil { // given away
				v.inner, v.flat = nil, nil
			} else if err := v.Finalize(); err != nil {
				return nil, err
			}
		}
	}
	return out, nil
}

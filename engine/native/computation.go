package native

import (
	"fmt"
	"runtime"
	"slices"
	"sync"

	"github.com/gomlx/compute"
	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
)

// computation is what Compile returns: a plan, which other computations may share, under names of its own. One call runs
// at a time; further ones wait.
type computation struct {
	b       *Backend
	names   []string
	inputs  []shapes.Shape
	outputs []shapes.Shape

	mu   sync.Mutex
	plan *compiled
	bufs []*Buffer // of the call
	end  runtime.Cleanup
}

// Compile plans the main function.
func (b *Builder) Compile() (x compute.Executable, err error) {
	defer func() { // GoMLX waits for ever for a compilation that panicked with anything but an error
		if r := recover(); r != nil {
			x, err = nil, fmt.Errorf("native: compiling %q: internal error: %v", b.Name(), r)
		}
	}()
	return b.compile()
}

func (b *Builder) compile() (compute.Executable, error) {
	if b.done {
		return nil, fmt.Errorf("native: computation %q was compiled already", b.Name())
	}
	if !b.main.closed {
		return nil, fmt.Errorf("native: the main function of %q has not returned", b.Name())
	}
	b.done = true
	plan, report, err := b.backend.compile(b.main)
	if err != nil && b.backend.strict {
		return nil, fmt.Errorf("native: planning %q: %w", b.Name(), err)
	}
	if plan == nil {
		h, err := b.onHost()
		if err != nil {
			return nil, err
		}
		b.reported(Report{OnHost: true})
		return h, nil
	}
	x := &computation{b: b.backend, plan: plan, names: b.main.names}
	for _, n := range b.main.params {
		x.inputs = append(x.inputs, n.shape)
	}
	for _, n := range b.main.out {
		x.outputs = append(x.outputs, n.shape)
	}
	x.end = runtime.AddCleanup(x, (*compiled).leave, plan)
	b.release()
	b.reported(report)
	return x, nil
}

// release drops what only recording needed.
func (b *Builder) release() {
	for _, f := range b.functions {
		f.shadow, f.known = nil, nil
		for _, n := range f.nodes {
			n.shadow = nil
		}
	}
	b.shadow, b.functions = nil, nil
}

// Finalize ends the use of the plan.
func (x *computation) Finalize() {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.plan != nil {
		x.end.Stop()
		x.plan.leave()
		x.plan = nil
	}
}

// Inputs returns the parameters' names and shapes.
func (x *computation) Inputs() ([]string, []shapes.Shape) { return x.names, x.inputs }

// Outputs returns the results' shapes.
func (x *computation) Outputs() []shapes.Shape { return x.outputs }

// checkInputs appends the buffers as this backend's.
func (b *Backend) checkInputs(bufs []*Buffer, inputs []compute.Buffer, donate []bool, want []shapes.Shape) ([]*Buffer, error) {
	if len(inputs) != len(want) {
		return nil, fmt.Errorf("native: the computation takes %d inputs, got %d", len(want), len(inputs))
	}
	if donate != nil && len(donate) != len(inputs) {
		return nil, fmt.Errorf("native: donate has %d entries for %d inputs", len(donate), len(inputs))
	}
	for i, in := range inputs {
		v, ok := in.(*Buffer)
		if !ok || v == nil || v.backend != b {
			return nil, fmt.Errorf("native: input %d (%T) is not a buffer of this backend", i, in)
		}
		if err := v.check(); err != nil {
			return nil, fmt.Errorf("native: input %d: %w", i, err)
		}
		if !slices.Contains(want[i].Dimensions, shapes.DynamicDim) && !v.shape.Equal(want[i]) {
			return nil, fmt.Errorf("native: input %d has shape %s, want %s", i, v.shape, want[i])
		}
		bufs = append(bufs, v)
	}
	return bufs, nil
}

// Execute runs the computation.
func (x *computation) Execute(inputs []compute.Buffer, donate []bool, _ compute.DeviceNum) ([]compute.Buffer, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.plan == nil {
		return nil, fmt.Errorf("native: the computation was finalized")
	}
	bufs, err := x.b.checkInputs(x.bufs[:0], inputs, donate, x.inputs)
	if err != nil {
		return nil, err
	}
	defer clear(bufs)
	x.bufs = bufs
	run, err := x.plan.take(x.b)
	if err != nil {
		return nil, err
	}
	out, err := run.call(bufs, donate, x.outputs)
	if err != nil {
		return nil, fmt.Errorf("native: %w", err) // the executable may be in any state, so it is not used again
	}
	x.plan.put(run)
	for i, in := range bufs {
		if donate != nil && donate[i] {
			if err := in.Finalize(); err != nil {
				return nil, err
			}
		}
	}
	return out, nil
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
	bufs, err := h.b.checkInputs(nil, inputs, donate, want)
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

// Package native is a GoMLX backend for CPUs, made for training: it records the primitive operations, drops dead ones
// and merges equal ones, keeps transposes, broadcasts, slices and reshapes as strided views, fuses elementwise chains
// and reductions of rows into blocks that stay in the first cache, reads the operands of matrix products through their
// strides, and does convolution and both its gradients as products over windows that are never written out.
//
// float32 and masks are computed by the kernels of package kernel. Integers, booleans and float64 beside them (labels,
// indices, random bits, counters, sorted keys) are computed by plain Go loops, one operation at a time, in the same plan
// and memory. Loops, branches and sorts run plans of their closures on the memory that their values lie in.
//
// What is left runs on GoMLX's portable "go" backend, in regions as large as the graph allows, with its checks and its
// error messages. That is
//   - arithmetic of half-precision and complex values, and of types smaller than a byte: no network here computes in
//     them, and the portable loops convert each element, as ours would have to;
//   - products, convolutions, windows and scatters of integers and float64: float64 serves second derivatives and
//     solvers, where a graph is float64 as a whole and runs there as a whole, with the portable vector kernels;
//   - ScatterMax and ScatterMin, Atan2, Pow of integers, total orders, ReduceLogicalXor, products over windows, windows
//     over the last axis or dilated inputs, dot products with an accumulator's type: no training step has them, or
//     they are not worth a kernel in one.
//
// A graph that has nothing for the kernels to do runs there as a whole, too. Report says what a computation consists of.
//
// Equal computations share a plan: the second network of the same graph, shapes and constants is not planned again. The
// memory of a plan is in use by one call at a time; computations that run at once have one each.
//
// Results do not depend on the number of threads. They do depend on the processor level (kernel.Level), by rounding.
package native

import (
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/gomlx/compute"
	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/gobackend"
	"github.com/gomlx/compute/shapes"

	"github.com/lathe-ml/lathe/engine/kernel"
)

// Name is what compute.NewWithConfig knows the backend by.
const Name = "native"

func init() {
	compute.Register(Name, func(config string) (compute.Backend, error) { return New(config) })
}

// Backend implements compute.Backend.
type Backend struct {
	host      compute.Backend // GoMLX's portable backend
	set       *kernel.Set
	pool      *kernel.Pool
	mem       memory
	plans     planCache
	finalized atomic.Bool
	observe   atomic.Pointer[func(Report)]
	// strict makes an internal fault of the planner an error instead of running the graph on host.
	strict bool
	// recomputeFrom is the number of elements from which on a value is computed again where it is read, if that is cheap;
	// 0 is never.
	recomputeFrom int
}

// Available says whether the kernels run on this processor, and why or why not. The backend works without them too,
// but then the portable backend is the better choice.
func Available() (reason string, ok bool) {
	level, why := kernel.Detect()
	return fmt.Sprintf("%s kernels: %s", level, why), level > kernel.Generic
}

// New opens the backend. config is a comma-separated list of options, each of which may be missing:
//
//	threads=N  the number of workers, 1 to 256; the default is LATHE_THREADS or else GOMAXPROCS
//	isa=LEVEL  generic, avx2 or avx512, at most what the processor and LATHE_ISA allow
func New(config string) (compute.Backend, error) {
	level, _ := kernel.Detect()
	threads := kernel.DefaultThreads()
	for _, option := range strings.FieldsFunc(config, func(r rune) bool { return r == ',' }) {
		key, value, _ := strings.Cut(option, "=")
		switch key {
		case "threads":
			n, err := strconv.Atoi(value)
			if err != nil || n < 1 || n > 256 {
				return nil, fmt.Errorf("native: threads=%q is not a number from 1 to 256", value)
			}
			threads = n
		case "isa":
			found := false
			for l := kernel.Generic; l <= level; l++ {
				if l.String() == value {
					level, found = l, true
					break
				}
			}
			if !found {
				return nil, fmt.Errorf("native: isa=%q is not a level of this processor; the highest is %s", value, level)
			}
		default:
			return nil, fmt.Errorf("native: unknown option %q; use threads=N or isa=LEVEL", option)
		}
	}
	// One operation at a time: running several at once, the portable backend has data races.
	host, err := gobackend.New("ops_sequential")
	if err != nil {
		return nil, fmt.Errorf("native: opening the portable backend: %w", err)
	}
	return &Backend{host: host, set: kernel.For(level), pool: kernel.NewPool(threads), recomputeFrom: recomputeSize}, nil
}

// Name returns "native".
func (b *Backend) Name() string { return Name }

// String returns "native".
func (b *Backend) String() string { return Name }

// Description names the processor level and the number of threads.
func (b *Backend) Description() string {
	return fmt.Sprintf("Lathe's CPU backend (%s, %d threads)", b.set.Level, b.pool.Threads())
}

// NumDevices returns 1.
func (b *Backend) NumDevices() int { return 1 }

// DeviceDescription describes the processor.
func (b *Backend) DeviceDescription(compute.DeviceNum) string { return "CPU, " + b.set.Level.String() }

// Finalize ends the workers and drops the memory.
func (b *Backend) Finalize() {
	if !b.finalized.Swap(true) {
		b.pool.Close()
		b.plans.drop()
		b.mem.drop()
		b.host.Finalize()
	}
}

// IsFinalized says whether Finalize was called.
func (b *Backend) IsFinalized() bool { return b.finalized.Load() }

// Capabilities are those of the portable backend, without its fused operations, which the planner's own fusion
// replaces, and without shapes that are unknown at compile time.
func (b *Backend) Capabilities() compute.Capabilities {
	c := b.host.Capabilities().Clone()
	//lint:ignore SA1019 both fields are read by GoMLX
	c.DynamicAxes, c.DynamicShapes, c.PreferConstantsForVariables = false, compute.DynamicShapesNone, false
	for op := range c.Operations {
		if name := op.String(); strings.HasPrefix(name, "Fused") || strings.HasPrefix(name, "Quantized") || strings.HasPrefix(name, "Dynamic") {
			if op != compute.OpTypeDynamicSlice && op != compute.OpTypeDynamicUpdateSlice {
				delete(c.Operations, op)
			}
		}
	}
	return c
}

// Buffer is a tensor. float32 ones are slices of this backend's memory; all others belong to the portable backend, so
// that its operations can take them as they are.
type Buffer struct {
	backend *Backend
	shape   shapes.Shape
	flat    any
	inner   compute.Buffer // of the portable backend, or nil
}

// Backend returns the backend that made the buffer.
func (b *Buffer) Backend() compute.Backend { return b.backend }

// Shape returns the shape, or an error after Finalize.
func (b *Buffer) Shape() (shapes.Shape, error) { return b.shape, b.check() }

// DeviceNum returns 0.
func (b *Buffer) DeviceNum() (compute.DeviceNum, error) { return 0, b.check() }

func (b *Buffer) check() error {
	if b.flat == nil {
		return fmt.Errorf("native: buffer of shape %s was used after it was finalized or donated", b.shape)
	}
	return nil
}

// Finalize gives the memory back. It may be called again.
func (b *Buffer) Finalize() error {
	if b.flat == nil || b.backend.IsFinalized() {
		b.flat = nil
		return nil
	}
	flat, inner := b.flat, b.inner
	b.flat, b.inner = nil, nil
	if inner != nil {
		return inner.Finalize()
	}
	if f, ok := flat.([]float32); ok {
		b.backend.mem.put(f)
	}
	return nil
}

// ToFlatData copies the values into a slice of the shape's type and size.
func (b *Buffer) ToFlatData(flat any) error {
	if err := b.check(); err != nil {
		return err
	}
	return copyFlat(flat, b.flat)
}

// Data returns the values themselves, valid until the buffer is finalized or donated.
func (b *Buffer) Data() (any, error) { return b.flat, b.check() }

// CopyToDevice copies the buffer; there is one device.
func (b *Buffer) CopyToDevice(d compute.DeviceNum) (compute.Buffer, error) {
	if err := b.check(); err != nil {
		return nil, err
	}
	return b.backend.BufferFromFlatData(d, b.flat, b.shape)
}

// HasSharedBuffers returns true.
func (b *Backend) HasSharedBuffers() bool { return true }

// NewSharedBuffer returns a buffer of zeros and its values.
func (b *Backend) NewSharedBuffer(_ compute.DeviceNum, shape shapes.Shape) (compute.Buffer, any, error) {
	n := &Buffer{backend: b, shape: shape.Clone()}
	if shape.DType == dtypes.Float32 {
		f := b.mem.get(shape.Size())
		clear(f)
		n.flat = f
		return n, f, nil
	}
	inner, flat, err := b.host.NewSharedBuffer(0, shape)
	if err != nil {
		return nil, nil, err
	}
	n.inner, n.flat = inner, flat
	return n, flat, nil
}

// BufferFromFlatData copies values, given as a slice of the shape's type and size, into a new buffer.
func (b *Backend) BufferFromFlatData(_ compute.DeviceNum, flat any, shape shapes.Shape) (compute.Buffer, error) {
	v := reflect.ValueOf(flat)
	if v.Kind() != reflect.Slice {
		return nil, fmt.Errorf("native: values of a buffer must be a slice, got %T", flat)
	}
	if shape.DType == dtypes.Float32 {
		f, ok := flat.([]float32)
		if !ok || len(f) != shape.Size() {
			return nil, fmt.Errorf("native: shape %s needs a []float32 of %d values, got %T of %d", shape, shape.Size(), flat, v.Len())
		}
		d := b.mem.get(len(f))
		copy(d, f)
		return &Buffer{backend: b, shape: shape.Clone(), flat: d}, nil
	}
	inner, err := b.host.BufferFromFlatData(0, flat, shape)
	if err != nil {
		return nil, err
	}
	return b.wrap(inner, shape)
}

// wrap makes a buffer of one of the portable backend.
func (b *Backend) wrap(inner compute.Buffer, shape shapes.Shape) (*Buffer, error) {
	flat, err := inner.Data()
	if err != nil {
		return nil, err
	}
	return &Buffer{backend: b, shape: shape.Clone(), flat: flat, inner: inner}, nil
}

// copyFlat copies between slices of the same type and length.
func copyFlat(dst, src any) error {
	if d, ok := dst.([]float32); ok {
		if s, ok := src.([]float32); ok && len(s) == len(d) {
			copy(d, s)
			return nil
		}
	}
	d, s := reflect.ValueOf(dst), reflect.ValueOf(src)
	if d.Kind() != reflect.Slice || d.Type() != s.Type() || d.Len() != s.Len() {
		return fmt.Errorf("native: cannot copy %T of %d values to %T; give a slice of the same type and length", src, s.Len(), dst)
	}
	reflect.Copy(d, s)
	return nil
}

// memory keeps float32 slices for reuse, by exact length.
type memory struct {
	watched *watchedMemory // in tests, which takes the place of all the rest

	mu   sync.Mutex
	free map[int][][]float32
	held int
}

// Most of what is kept: slices of one length, and values in all.
const (
	maxFree = 256
	maxHeld = 1 << 28
)

// get returns a slice with any contents, aligned to 64 bytes.
func (m *memory) get(n int) []float32 {
	if m.watched != nil {
		return m.watched.get(n)
	}
	m.mu.Lock()
	if l := m.free[n]; len(l) > 0 {
		f := l[len(l)-1]
		m.free[n] = l[:len(l)-1]
		m.held -= n
		m.mu.Unlock()
		return f
	}
	m.mu.Unlock()
	return aligned(n)
}

func (m *memory) put(f []float32) {
	if m.watched != nil {
		m.watched.put(f)
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if n := len(f); n > 0 && len(m.free[n]) < maxFree && m.held+n <= maxHeld {
		if m.free == nil {
			m.free = map[int][][]float32{}
		}
		m.free[n] = append(m.free[n], f)
		m.held += n
	}
}

func (m *memory) drop() {
	m.mu.Lock()
	m.free, m.held = nil, 0
	m.mu.Unlock()
}

// aligned returns n zeros that begin at a multiple of 64 bytes.
func aligned(n int) []float32 {
	f := make([]float32, n+15)
	skip := int(-uintptr(unsafe.Pointer(unsafe.SliceData(f))) / 4 % 16)
	return f[skip : skip+n : skip+n]
}

package nn

import (
	"fmt"
	"iter"
	"math"
	"slices"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/internal/rng"
)

// Role tells optimisers, cost, quantisers and folding what a parameter is for.
type Role int

// The roles. Weight is decayed and quantised; Bias and Gain are trained without decay; State (running statistics) is
// not trained but written while training; Constant is neither.
const (
	Weight Role = iota
	Bias
	Gain
	State
	Constant
)

var roleNames = []string{"weight", "bias", "gain", "state", "constant"}

// String returns the role's name: weight, bias, gain, state or constant.
func (r Role) String() string {
	if r < 0 || int(r) >= len(roleNames) {
		return fmt.Sprintf("role(%d)", int(r))
	}
	return roleNames[r]
}

// ParseRole is the inverse of Role.String.
func ParseRole(s string) (Role, error) {
	if i := slices.Index(roleNames, s); i >= 0 {
		return Role(i), nil
	}
	return 0, fmt.Errorf("nn: %q is not a role; use one of %v", s, roleNames)
}

// Init fills a parameter with its initial values.
type Init func(r *rng.Rand, dst []float32)

// Normal draws from N(0, std²).
func Normal(std float64) Init {
	return func(r *rng.Rand, dst []float32) { rng.Normal(r, dst, std) }
}

// Uniform draws from [-bound, bound).
func Uniform(bound float64) Init {
	return func(r *rng.Rand, dst []float32) { rng.Uniform(r, dst, -bound, bound) }
}

// FanIn draws from N(0, gain²/fanIn): gain 1 keeps the variance of linear and tanh layers, √2 that of ReLU layers.
func FanIn(fanIn int, gain float64) Init { return Normal(gain / math.Sqrt(float64(max(fanIn, 1)))) }

// Fill sets every element to v.
func Fill(v float32) Init {
	return func(_ *rng.Rand, dst []float32) {
		for i := range dst {
			dst[i] = v
		}
	}
}

// OrthogonalBlocks fills a [rows, cols] matrix with square random orthogonal blocks side by side (or stacked): the
// usual initialisation of recurrent weights, one block per gate. The longer side must be a multiple of the shorter.
func OrthogonalBlocks(rows, cols int) Init {
	return func(r *rng.Rand, dst []float32) {
		n := min(rows, cols)
		if n == 0 {
			return
		}
		for b := range max(rows, cols) / n {
			q := rng.Orthogonal(r, n)
			for i := range n {
				for j := range n {
					if rows >= cols {
						dst[(b*n+i)*cols+j] = float32(q[i*n+j])
					} else {
						dst[i*cols+b*n+j] = float32(q[i*n+j])
					}
				}
			}
		}
	}
}

// Spec declares a parameter that an op needs. The shape's type is nominal: values are stored as float32 (or float64)
// and converted to the type of the Env in which they are used. A nil Init means zeros.
type Spec struct {
	Name  string // local to the op: "w", "b", "mean"
	Shape shapes.Shape
	Role  Role
	Init  Init
}

// Param is a stored tensor.
type Param struct {
	Name   string
	Role   Role
	Frozen bool // never trained, whatever its role
	Value  *tensors.Tensor
}

// Trainable says whether an optimiser may change the parameter.
func (p *Param) Trainable() bool { return !p.Frozen && p.Role != State && p.Role != Constant }

// Data returns a copy of the values in row-major order.
func (p *Param) Data() []float32 { return Floats(p.Value) }

// SetData replaces the values, keeping shape and role. The length must match.
func (p *Param) SetData(d []float32) error {
	if len(d) != p.Value.Shape().Size() {
		return fmt.Errorf("nn: parameter %q has %d elements (%s), got %d", p.Name, p.Value.Shape().Size(), p.Value.Shape(), len(d))
	}
	p.Value = tensors.FromFlatDataAndDimensions(slices.Clone(d), p.Value.Shape().Dimensions...)
	return nil
}

// Floats copies a tensor's values as float32 (floats of other widths and integers are converted).
func Floats(t *tensors.Tensor) []float32 {
	switch t.DType() {
	case dtypes.Float32:
		return tensors.MustCopyFlatData[float32](t)
	case dtypes.Float64:
		return convert[float32](tensors.MustCopyFlatData[float64](t))
	case dtypes.Int32:
		return convert[float32](tensors.MustCopyFlatData[int32](t))
	case dtypes.Int64:
		return convert[float32](tensors.MustCopyFlatData[int64](t))
	case dtypes.Uint8:
		return convert[float32](tensors.MustCopyFlatData[uint8](t))
	}
	panic(fmt.Errorf("nn: a tensor of %s has no float values", t.DType()))
}

// Float64s copies a tensor's values as float64.
func Float64s(t *tensors.Tensor) []float64 {
	if t.DType() == dtypes.Float64 {
		return tensors.MustCopyFlatData[float64](t)
	}
	return convert[float64](Floats(t))
}

func convert[To, From float32 | float64 | int32 | int64 | uint8](in []From) []To {
	out := make([]To, len(in))
	for i, v := range in {
		out[i] = To(v)
	}
	return out
}

// Params is an ordered set of named tensors. It owns them: Clone copies, and nothing else may hold on to a Value
// across a training step, which donates its buffer.
type Params struct {
	order []string
	m     map[string]*Param
}

// Get returns a parameter, or nil.
func (p *Params) Get(name string) *Param { return p.m[name] }

// Len is the number of parameters.
func (p *Params) Len() int { return len(p.order) }

// All iterates in order of creation.
func (p *Params) All() iter.Seq[*Param] {
	return func(yield func(*Param) bool) {
		for _, n := range slices.Clone(p.order) {
			if q := p.m[n]; q != nil && !yield(q) {
				return
			}
		}
	}
}

// Put adds a parameter or replaces the one of that name in place.
func (p *Params) Put(q *Param) {
	if p.m == nil {
		p.m = map[string]*Param{}
	}
	if _, ok := p.m[q.Name]; !ok {
		p.order = append(p.order, q.Name)
	}
	p.m[q.Name] = q
}

// Delete removes a parameter, if it is there.
func (p *Params) Delete(name string) {
	if _, ok := p.m[name]; ok {
		delete(p.m, name)
		p.order = slices.DeleteFunc(p.order, func(s string) bool { return s == name })
	}
}

// Clone copies the set and its tensors.
func (p *Params) Clone() Params {
	var c Params
	for q := range p.All() {
		d := *q
		d.Value = cloneTensor(q.Value)
		c.Put(&d)
	}
	return c
}

// CopyFrom takes over the values (not roles) of all parameters of src that have a namesake here. It refuses a
// namesake of another shape, and a set without any of ours, before it changes anything.
func (p *Params) CopyFrom(src *Params) error {
	n := 0
	for q := range p.All() {
		if s := src.Get(q.Name); s != nil {
			if !slices.Equal(s.Value.Shape().Dimensions, q.Value.Shape().Dimensions) {
				return fmt.Errorf("nn: parameter %q is %s here and %s in the source", q.Name, q.Value.Shape(), s.Value.Shape())
			}
			n++
		}
	}
	if n == 0 && p.Len() > 0 {
		return fmt.Errorf("nn: the source has none of the network's %d parameters", p.Len())
	}
	for q := range p.All() {
		if s := src.Get(q.Name); s != nil {
			q.Value = cloneTensor(s.Value)
		}
	}
	return nil
}

// Count is the number of scalars in all parameters but constants.
func (p *Params) Count() (n int) {
	for q := range p.All() {
		if q.Role != Constant {
			n += q.Value.Shape().Size()
		}
	}
	return n
}

// Bytes is the stored size of all parameters in bytes.
func (p *Params) Bytes() (n int64) {
	for q := range p.All() {
		n += q.Value.ByteSize()
	}
	return n
}

// Reinit draws every parameter named in specs anew, from streams that depend on seed and name only.
func (p *Params) reinit(name string, s Spec, seed uint64) {
	d := make([]float32, s.Shape.Size())
	if s.Init != nil {
		s.Init(rng.New(seed, "init:"+name), d)
	}
	p.Put(&Param{Name: name, Role: s.Role, Value: tensors.FromFlatDataAndDimensions(d, s.Shape.Dimensions...)})
}

func cloneTensor(t *tensors.Tensor) *tensors.Tensor {
	c, err := t.LocalClone()
	if err != nil {
		panic(fmt.Errorf("nn: cloning a tensor of %s: %w", t.Shape(), err))
	}
	return c
}

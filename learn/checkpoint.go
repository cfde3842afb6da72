package learn

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/nn/safetensors"
)

// checkpointFormat is raised when the layout of a checkpoint changes.
const checkpointFormat = "lathe-checkpoint-1"

// stored types of the tensors that a trainer keeps.
var storedTypes = map[dtypes.DType]safetensors.DType{
	dtypes.Float32: safetensors.F32, dtypes.Float64: safetensors.F64, dtypes.Uint64: safetensors.U64,
	dtypes.Int64: safetensors.I64, dtypes.Int32: safetensors.I32,
}

// Save writes everything that the next step depends on to a file, atomically: parameters, optimiser state, averages,
// random state, the number of steps, and extra, which is the caller's (the position in the data, for example).
func (t *Trainer) Save(path string, extra any) error {
	ex, err := json.Marshal(extra)
	if err != nil {
		return fmt.Errorf("learn: checkpoint: %w", err)
	}
	f := &safetensors.File{Meta: map[string]string{"format": checkpointFormat, "step": strconv.Itoa(t.step), "extra": string(ex), "optimizer": t.o.Optimizer.Name()}}
	for name, v := range t.stored() {
		st, ok := storedTypes[(*v).DType()]
		if !ok {
			return fmt.Errorf("learn: checkpoint: %q is %s, which is not stored", name, (*v).Shape())
		}
		var data []byte
		if err := (*v).ConstBytes(func(b []byte) { data = slices.Clone(b) }); err != nil {
			return fmt.Errorf("learn: checkpoint: %q: %w", name, err)
		}
		f.Tensors = append(f.Tensors, safetensors.Tensor{Name: name, DType: st, Shape: (*v).Shape().Dimensions, Data: data})
	}
	return safetensors.WriteFile(path, f)
}

// Load continues from a checkpoint of the same network and optimiser. It reports false, and changes nothing, when there
// is no file. A file that does not fit is an error and changes nothing either.
func (t *Trainer) Load(path string, extra any) (bool, error) {
	f, err := safetensors.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if f.Meta["format"] != checkpointFormat || f.Meta["optimizer"] != t.o.Optimizer.Name() {
		return false, fmt.Errorf("learn: %s is no checkpoint of this training (format %q, optimiser %q); remove it to start anew", path, f.Meta["format"], f.Meta["optimizer"])
	}
	step, err := strconv.Atoi(f.Meta["step"])
	if err != nil || step < 0 {
		return false, fmt.Errorf("learn: %s: step %q is not a number", path, f.Meta["step"])
	}
	fresh := map[string]*tensors.Tensor{}
	for name, v := range t.stored() {
		s := f.Tensor(name)
		if s == nil {
			return false, fmt.Errorf("learn: %s has no %q: it belongs to another network; remove it to start anew", path, name)
		}
		shape := (*v).Shape()
		if s.DType != storedTypes[shape.DType] || !slices.Equal(s.Shape, shape.Dimensions) {
			return false, fmt.Errorf("learn: %s: %q is %s%v there and %s here; remove it to start anew", path, name, s.DType, s.Shape, shape)
		}
		n := tensors.FromShape(shapes.Make(shape.DType, shape.Dimensions...))
		if err := n.MutableBytes(func(b []byte) { copy(b, s.Data) }); err != nil {
			return false, fmt.Errorf("learn: %s: %q: %w", path, name, err)
		}
		fresh[name] = n
	}
	if extra != nil {
		if err := json.Unmarshal([]byte(f.Meta["extra"]), extra); err != nil {
			return false, fmt.Errorf("learn: %s: extra: %w", path, err)
		}
	}
	for name, v := range t.stored() {
		*v = fresh[name]
	}
	t.step = step
	return true, nil
}

// stored iterates over the tensors of a checkpoint by name, as places that may be overwritten.
func (t *Trainer) stored() func(yield func(string, **tensors.Tensor) bool) {
	return func(yield func(string, **tensors.Tensor) bool) {
		for _, n := range t.averaged() {
			if !yield("param."+n, &t.params.Get(n).Value) {
				return
			}
		}
		for _, n := range t.train {
			for i := range t.slots[n] {
				if !yield(fmt.Sprintf("slot.%d.%s", i, n), &t.slots[n][i]) {
					return
				}
			}
		}
		if t.o.EMA > 0 {
			for _, n := range t.averaged() {
				v := t.ema[n]
				if !yield("ema."+n, &v) {
					return
				}
				t.ema[n] = v
			}
		}
		yield("rng", &t.rng)
	}
}

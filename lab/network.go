package lab

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/internal/filelock"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/safetensors"
)

// Network returns the reference network of a recipe: it is trained once and its parameters are kept in the on-disk cache,
// where every experiment, seed and process with an equal recipe finds them. The recipe must say all that the parameters
// depend on (architecture, data, steps, rates, seed); it is hashed by its JSON form, in which the order of fields does
// not count. build makes the untrained network, train trains it in place. Every call returns a network of its own.
//
// Two processes do not train the same network twice: the second waits for the first. A cache entry that is damaged, or
// that does not fit what build makes, is trained again, and a line in the log says so.
func (t *Trial) Network(recipe any, build func() (*nn.Network, error), train func(*nn.Network) error) (*nn.Network, error) {
	ctx := t.ctx
	if ctx == nil {
		ctx = context.Background()
	}
	canonical, err := canonicalJSON(recipe)
	if err != nil {
		return nil, fmt.Errorf("reference network: recipe: %w", err)
	}
	net, err := build()
	if err != nil {
		return nil, fmt.Errorf("reference network: build: %w", err)
	}
	if t.networks == "" {
		if err := train(net); err != nil {
			return nil, fmt.Errorf("reference network: train: %w", err)
		}
		return net, nil
	}
	if err := os.MkdirAll(t.networks, 0o755); err != nil {
		return nil, fmt.Errorf("reference network: %w", err)
	}
	path := filepath.Join(t.networks, hashHex(canonical)+".safetensors")
	lock, err := filelock.TryLock(path + ".lock")
	if errors.Is(err, filelock.ErrLocked) {
		t.Logf("waiting for another process that trains this reference network")
		lock, err = filelock.Wait(ctx, path+".lock")
	}
	if err != nil {
		return nil, fmt.Errorf("reference network: %w", err)
	}
	defer func() {
		os.Remove(path + ".lock")
		lock.Unlock()
	}()

	switch err := loadParams(path, &net.Params); {
	case err == nil:
		return net, nil
	case !errors.Is(err, fs.ErrNotExist):
		t.Logf("warning: the cached reference network cannot be used and is trained again: %v", err)
	}
	if err := train(net); err != nil {
		return nil, fmt.Errorf("reference network: train: %w", err)
	}
	if err := saveParams(path, &net.Params, canonical); err != nil {
		return nil, fmt.Errorf("reference network: %w", err)
	}
	return net, nil
}

// canonicalJSON marshals v with sorted keys and without insignificant space.
func canonicalJSON(v any) ([]byte, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	var tree any
	if err := d.Decode(&tree); err != nil {
		return nil, err
	}
	return json.Marshal(tree) // maps are written in the order of their keys
}

// saveParams writes parameters with the recipe and a checksum of their bytes.
func saveParams(path string, p *nn.Params, recipe []byte) error {
	f := &safetensors.File{}
	for q := range p.All() {
		switch q.Value.DType() {
		case dtypes.Float32:
			f.Tensors = append(f.Tensors, safetensors.FromFloats(q.Name, q.Data(), q.Value.Shape().Dimensions...))
		case dtypes.Float64:
			t := safetensors.Tensor{Name: q.Name, DType: safetensors.F64, Shape: q.Value.Shape().Dimensions}
			if err := q.Value.ConstBytes(func(b []byte) { t.Data = bytes.Clone(b) }); err != nil {
				return err
			}
			f.Tensors = append(f.Tensors, t)
		default:
			return fmt.Errorf("parameter %q is %s; the cache keeps float32 and float64", q.Name, q.Value.DType())
		}
	}
	f.Meta = map[string]string{"lathe.recipe": string(recipe), "lathe.sha256": checksum(f), "lathe.commit": ThisBuild().Commit}
	return safetensors.WriteFile(path, f)
}

// loadParams reads what saveParams wrote into parameters of the same names, shapes and types. It changes nothing when it
// fails.
func loadParams(path string, p *nn.Params) error {
	if _, err := os.Stat(path); err != nil {
		return err
	}
	f, err := safetensors.ReadFile(path)
	if err != nil {
		return err
	}
	if f.Meta["lathe.sha256"] != checksum(f) {
		return fmt.Errorf("%s: its content does not match its checksum", path)
	}
	if len(f.Tensors) != p.Len() {
		return fmt.Errorf("%s: has %d tensors, the network %d parameters", path, len(f.Tensors), p.Len())
	}
	loaded := map[string]*tensors.Tensor{}
	for q := range p.All() {
		s := f.Tensor(q.Name)
		want := q.Value.Shape()
		if s == nil {
			return fmt.Errorf("%s: has no tensor %q", path, q.Name)
		}
		if (s.DType == safetensors.F64) != (want.DType == dtypes.Float64) || fmt.Sprint(s.Shape) != fmt.Sprint(want.Dimensions) && want.Rank() > 0 {
			return fmt.Errorf("%s: tensor %q is %s%v, the network's is %s", path, q.Name, s.DType, s.Shape, want)
		}
		v := tensors.FromShape(want)
		size := 0
		if err := v.MutableBytes(func(b []byte) { size = copy(b, s.Data) }); err != nil {
			return err
		}
		if size != len(s.Data) || int64(size) != v.ByteSize() {
			return fmt.Errorf("%s: tensor %q has %d bytes, the network's %d", path, q.Name, len(s.Data), v.ByteSize())
		}
		loaded[q.Name] = v
	}
	for q := range p.All() {
		q.Value = loaded[q.Name]
	}
	return nil
}

func checksum(f *safetensors.File) string {
	h := sha256.New()
	for _, t := range f.Tensors {
		fmt.Fprintf(h, "%q %s %v\n", t.Name, t.DType, t.Shape)
		h.Write(t.Data)
	}
	return hex.EncodeToString(h.Sum(nil))
}

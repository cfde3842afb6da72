package restore

import (
	"bytes"
	"embed"
	"fmt"
	"maps"
	"path/filepath"
	"slices"

	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/safetensors"
)

//go:embed weights
var weights embed.FS

// Factors lists the factors for which trained networks come with the package.
func Factors() []int { return []int{2, 3, 4} }

// Pretrained returns the ESPCN of that factor (2, 3 or 4) that comes with the package, trained on the luminance of eight
// photographs that were shrunk bicubically. Meta tells how.
func Pretrained(factor int) (*nn.Network, error) {
	if !slices.Contains(Factors(), factor) {
		return nil, fmt.Errorf("restore: no network for factor %d comes with Lathe; use one of %v, or train one and name its file", factor, Factors())
	}
	name := fmt.Sprintf("weights/espcn-x%d.safetensors", factor)
	b, err := weights.ReadFile(name)
	if err != nil {
		return nil, fmt.Errorf("restore: %w", err)
	}
	f, err := safetensors.Read(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		return nil, fmt.Errorf("restore: %s: %w", name, err)
	}
	return fromFile(f)
}

// Load reads an ESPCN that Save wrote. What it does not know it refuses: files of other architectures, parameters that
// are missing, of another shape, or not finite.
func Load(path string) (*nn.Network, error) {
	f, err := safetensors.ReadFile(path)
	if err != nil {
		return nil, err
	}
	n, err := fromFile(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Base(path), err)
	}
	return n, nil
}

// Save writes an ESPCN network to a safetensors file, atomically. Metadata holds the architecture and what else is in
// net.Meta; kernels are stored [out, kh, kw, in].
func Save(path string, net *nn.Network) error {
	if _, err := espcnFromMeta(net.Meta); err != nil {
		return err
	}
	f := &safetensors.File{Meta: maps.Clone(net.Meta)}
	for p := range net.Params.All() {
		f.Tensors = append(f.Tensors, safetensors.FromFloats(p.Name, p.Data(), p.Value.Shape().Dimensions...))
	}
	return safetensors.WriteFile(path, f)
}

func fromFile(f *safetensors.File) (*nn.Network, error) {
	m, err := espcnFromMeta(f.Meta)
	if err != nil {
		return nil, err
	}
	// The sizes are compared with the file's before anything of that size is made.
	want, in := map[string][]int{}, m.Channels
	for i, k := range m.Kernels {
		name, out := lowFeatures, m.Channels*m.Factor*m.Factor
		if i < len(m.Widths) {
			name, out = fmt.Sprintf("conv%d", i+1), m.Widths[i]
		}
		want[name+".w"], want[name+".b"] = []int{out, k, k, in}, []int{out}
		in = out
	}
	for _, t := range f.Tensors {
		if _, ok := want[t.Name]; !ok {
			return nil, fmt.Errorf("restore: the model has an unknown tensor %q", t.Name)
		}
	}
	for name, shape := range want {
		t := f.Tensor(name)
		if t == nil {
			return nil, fmt.Errorf("restore: the model has no tensor %q", name)
		}
		if !slices.Equal(t.Shape, shape) {
			return nil, fmt.Errorf("restore: tensor %q is %v in the model, %v by its metadata", name, t.Shape, shape)
		}
	}
	net, err := m.Network(0)
	if err != nil {
		return nil, err
	}
	for p := range net.Params.All() {
		d, err := f.Tensor(p.Name).Floats()
		if err != nil {
			return nil, err
		}
		for i, v := range d {
			if v-v != 0 {
				return nil, fmt.Errorf("restore: element %d of tensor %q is %v", i, p.Name, v)
			}
		}
		p.Value = tensors.FromFlatDataAndDimensions(d, p.Value.Shape().Dimensions...)
	}
	net.Meta = maps.Clone(f.Meta)
	return net, nil
}

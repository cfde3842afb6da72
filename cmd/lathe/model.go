package main

import (
	"encoding/json"
	"fmt"
	"strings"

	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/onnx"
	"github.com/lathe-ml/lathe/nn/safetensors"
)

// networkKey is the metadata of a safetensors file under which train notes how the network is built.
const networkKey = "lathe.network"

// writeTrained writes a trained network by the ending of the file's name: ONNX, or safetensors with the configuration
// from which readTrained builds the network again.
func writeTrained(path string, net *nn.Network, c trainConfig) error {
	if strings.HasSuffix(path, ".onnx") {
		return onnx.WriteFile(path, net, onnx.WriteOptions{})
	}
	config, err := json.Marshal(c)
	if err != nil {
		return err
	}
	f := &safetensors.File{Meta: map[string]string{networkKey: string(config), "format": "pt"}}
	for p := range net.Params.All() {
		f.Tensors = append(f.Tensors, safetensors.FromFloats(p.Name, p.Data(), p.Value.Shape().Dimensions...))
	}
	return safetensors.WriteFile(path, f)
}

// readTrained reads a safetensors file that writeTrained wrote.
func readTrained(path string) (*nn.Network, error) {
	f, err := safetensors.ReadFile(path)
	if err != nil {
		return nil, err
	}
	c, ok, err := trainedConfig(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if !ok {
		return nil, fmt.Errorf("%s: holds tensors but not how the network is built (no metadata %q): only safetensors that \"lathe train\" wrote are networks; give an ONNX file instead", path, networkKey)
	}
	net, err := c.build()
	if err != nil {
		return nil, fmt.Errorf("%s: metadata %q: %w", path, networkKey, err)
	}
	if len(f.Tensors) != net.Params.Len() {
		return nil, fmt.Errorf("%s: has %d tensors, the network %d parameters", path, len(f.Tensors), net.Params.Len())
	}
	for p := range net.Params.All() {
		t := f.Tensor(p.Name)
		if t == nil {
			return nil, fmt.Errorf("%s: tensor %q is missing", path, p.Name)
		}
		values, err := t.Floats()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		if fmt.Sprint(t.Shape) != fmt.Sprint(p.Value.Shape().Dimensions) {
			return nil, fmt.Errorf("%s: tensor %q has the shape %v, the network's parameter %v", path, p.Name, t.Shape, p.Value.Shape().Dimensions)
		}
		if err := p.SetData(values); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
	}
	net.Meta = map[string]string{networkKey: f.Meta[networkKey]}
	return net, nil
}

// trainedConfig is the configuration in a file's metadata; ok is false when there is none. Sizes are checked, since the
// file may come from anywhere.
func trainedConfig(f *safetensors.File) (c trainConfig, ok bool, err error) {
	text, ok := f.Meta[networkKey]
	if !ok {
		return c, false, nil
	}
	if err := json.Unmarshal([]byte(text), &c); err != nil {
		return c, true, fmt.Errorf("metadata %q: %w", networkKey, err)
	}
	for _, n := range append(c.Shape[:], len(c.Classes)) {
		if n < 1 || n > 4096 {
			return c, true, fmt.Errorf("metadata %q: shape %v with %d classes; sizes must be 1 to 4096", networkKey, c.Shape, len(c.Classes))
		}
	}
	if c.Shape[0]*c.Shape[1]*c.Shape[2] > 1<<22 {
		return c, true, fmt.Errorf("metadata %q: images of shape %v are larger than 4 million values", networkKey, c.Shape)
	}
	elements := 0
	for _, t := range f.Tensors {
		elements += t.Elements()
	}
	for _, a := range architectures {
		if a.name == c.Arch && a.least(c.Shape[0], c.Shape[1], c.Shape[2], len(c.Classes)) > elements {
			return c, true, fmt.Errorf("metadata %q: a %s for images of shape %v has more parameters than the file (%d)", networkKey, c.Arch, c.Shape, elements)
		}
	}
	return c, true, nil
}

// trainedOn names the data set that a network was trained on; "" when it does not say.
func trainedOn(net *nn.Network) string {
	var c trainConfig
	if json.Unmarshal([]byte(net.Meta[networkKey]), &c) != nil {
		return ""
	}
	return c.Data
}

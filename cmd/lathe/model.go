package main

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/lathe-ml/lathe/compress/prune"
	"github.com/lathe-ml/lathe/compress/quant"
	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/design/norm"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/onnx"
	"github.com/lathe-ml/lathe/nn/safetensors"
)

// Metadata of the network files that lathe writes.
const (
	trainKey      = "lathe.train"    // how it was trained, a trainConfig
	compressKey   = "lathe.compress" // how it was compressed
	preprocessKey = "preprocess"     // how pictures become its input, see preprocessHelp
)

// isNetworkFile says whether a file of this name can hold a network.
func isNetworkFile(path string) bool {
	ext := strings.ToLower(filepath.Ext(path))
	return ext == ".onnx" || ext == ".safetensors"
}

// parseShapes reads values of --shape, name=1,3,224,224.
func parseShapes(list []string) (map[string][]int, error) {
	dims := map[string][]int{}
	for _, s := range list {
		name, sizes, ok := strings.Cut(s, "=")
		if !ok || name == "" {
			return nil, usageErrorf("--shape %q; write name=1,3,224,224", s)
		}
		for _, v := range strings.Split(sizes, ",") {
			n, err := strconv.Atoi(strings.TrimSpace(v))
			if err != nil || n < 0 {
				return nil, usageErrorf("--shape %q: %q is no size", s, v)
			}
			dims[name] = append(dims[name], n)
		}
	}
	return dims, nil
}

// readNetwork reads a network file by the ending of its name; dims gives the shapes of inputs that an ONNX model leaves
// open.
func readNetwork(path string, dims map[string][]int) (*nn.Network, error) {
	switch strings.ToLower(filepath.Ext(path)) {
	case ".onnx":
		return onnx.ReadFile(path, onnx.Options{Dims: dims})
	case ".safetensors":
		if len(dims) > 0 {
			return nil, usageErrorf("--shape is for ONNX models that leave a shape open; %s leaves none", path)
		}
		return safetensors.ReadNetwork(path, slices.Concat(quant.StoredTypes(), norm.StoredTypes(), prune.StoredTypes())...)
	}
	return nil, usageErrorf("%s: a network is read from .onnx or .safetensors", path)
}

// writeNetwork writes a network file by the ending of its name. opset is that of an ONNX file; 0 is the writer's own.
func writeNetwork(path string, net *nn.Network, opset int) error {
	switch strings.ToLower(filepath.Ext(path)) {
	case ".onnx":
		return onnx.WriteFile(path, net, onnx.WriteOptions{Opset: opset})
	case ".safetensors":
		return safetensors.WriteNetwork(path, net)
	}
	return usageErrorf("%s: a network is written as .onnx or .safetensors", path)
}

// note keeps in a network how it was trained and what its input is.
func (c *trainConfig) note(net *nn.Network) error {
	text, err := json.Marshal(c)
	if err != nil {
		return err
	}
	if net.Meta == nil {
		net.Meta = map[string]string{}
	}
	net.Meta[trainKey] = string(text)
	if net.Inputs[0].Shape.Rank() == 4 {
		net.Meta[preprocessKey] = plainPictures(&data.Images{H: c.Shape[0], W: c.Shape[1], C: c.Shape[2]})
	}
	return nil
}

// plainPictures is the preprocessing of networks that take pictures as m has them, in [0, 1].
func plainPictures(m *data.Images) string {
	channels := "grey"
	if m.C == 3 {
		channels = "rgb"
	}
	return fmt.Sprintf("resize=%dx%d,mean=0,std=1,channels=%s", m.W, m.H, channels)
}

// trainedOn names the data set that a network was trained on; "" when it does not say.
func trainedOn(net *nn.Network) string {
	var c trainConfig
	if json.Unmarshal([]byte(net.Meta[trainKey]), &c) != nil {
		return ""
	}
	return c.Data
}

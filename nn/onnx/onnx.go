// Package onnx reads ONNX models as networks and writes networks as ONNX models.
//
// Read takes operator sets 11 to 21 with weights in initializers or Constant nodes. It works out shape arithmetic,
// keeping the batch (axis 0 of the inputs) open, puts patterns together that exporters write in pieces (LayerNorm,
// RMSNorm, GELU, HardSwish, SiLU, softmax, attention's scale, dense and convolution with bias, quantise-dequantise
// pairs), and holds images channels-last, with a Transpose only where a layout is really asked for. Inputs and outputs
// keep the file's names, types and layout. The result is an ordinary nn.Network.
//
// Write emits standard operators only. The ops of package nn are in this package's table; ops and stored forms of
// packages to its right write themselves through Exporter and WeightExporter.
//
// Files are taken for hostile: see Read for what is checked.
package onnx

import (
	"fmt"
	"slices"

	"github.com/lathe-ml/lathe/nn"
)

// Options say how a model is read.
type Options struct {
	// Dims gives the shape of inputs, by name, where the model leaves axes other than the first open (or to change
	// the batch, which is axis 0, to a fixed one). 0 keeps what the model says: an open batch stays open. The number
	// of axes must be the model's, and fixed axes cannot change. Example: {"x": {0, 3, 48, 320}}.
	Dims map[string][]int

	// OpenBatch opens the batch of a model that was exported for a single case: a first axis of 1 of every input is
	// taken for the batch, and so is the leading 1 of shapes that reshape such values.
	OpenBatch bool
}

// ReadFile reads a model.
func ReadFile(path string, o Options) (*nn.Network, error) {
	b, err := readModelFile(path)
	if err != nil {
		return nil, err
	}
	n, err := Read(b, o)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return n, nil
}

// Read reads a model held in memory. It refuses, with the node's and operator's name: operators it does not know,
// control flow, recurrent operators, external data, shapes that depend on the data, tensors whose data do not fit
// their shape, and files whose decoded form would need far more memory than the file has.
//
// The network's metadata are the model's. Floating types of other widths are read as float32.
func Read(b []byte, o Options) (*nn.Network, error) {
	g, err := decode(b)
	if err != nil {
		return nil, fmt.Errorf("onnx: %w", err)
	}
	if err := g.bind(o); err != nil {
		return nil, fmt.Errorf("onnx: %w", err)
	}
	if err := g.infer(); err != nil {
		return nil, fmt.Errorf("onnx: %w", err)
	}
	g.fuse()
	n, err := build(g)
	if err != nil {
		return nil, fmt.Errorf("onnx: %w", err)
	}
	return n, nil
}

// bind applies the options to the inputs' shapes. An open first axis is the batch.
func (g *graph) bind(o Options) error {
	names := map[string]bool{}
	for _, in := range g.inputs {
		names[in.name] = true
		if len(in.shape) > 0 && (in.shape[0] == fixed(-1) || o.OpenBatch && in.shape[0] == fixed(1)) {
			in.shape[0] = batch
		}
		want, ok := o.Dims[in.name]
		if !ok {
			continue
		}
		if len(want) != len(in.shape) {
			return fmt.Errorf("input %q has %d axes, Options.Dims gives %d: %v", in.name, len(in.shape), len(want), want)
		}
		for i, d := range want {
			switch {
			case d == 0:
			case d < 0 || d > 1<<24:
				return fmt.Errorf("input %q: Options.Dims %v: sizes are 1 to 2^24, or 0 for what the model says", in.name, want)
			case in.shape[i] != fixed(-1) && in.shape[i] != batch && in.shape[i] != fixed(d):
				return fmt.Errorf("input %q: axis %d is %s in the model, Options.Dims gives %d", in.name, i, in.shape[i], d)
			default:
				in.shape[i] = fixed(d)
			}
		}
	}
	for name := range o.Dims {
		if !names[name] {
			var have []string
			for _, in := range g.inputs {
				have = append(have, in.name)
			}
			slices.Sort(have)
			return fmt.Errorf("Options.Dims names the input %q; the model has %q", name, have)
		}
	}
	return nil
}

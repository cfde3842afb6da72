// Package compress makes trained networks smaller. It holds what every compressor needs: running a network over
// examples (Evaluate, Capture), walking it in execution order so that later layers see what the earlier, already
// compressed ones give them (Walk), counting what is stored (Size), and saying what was lost (Compare, SiteErrors).
//
// The methods live beside it: compress/quant.
package compress

import (
	"context"
	"errors"
	"fmt"

	"github.com/gomlx/compute"
	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/nn"
)

// Method compresses a trained network by means of unlabelled examples. It leaves net as it is.
type Method interface {
	Compress(ctx context.Context, b compute.Backend, net *nn.Network, calib Examples) (*Result, error)
}

// Result is a compressed network and what is known about it.
type Result struct {
	Network *nn.Network
	// Reference is the float network with the same sites: the original one, after the exact rewrites (batch norm folded
	// into convolutions) that the method began with.
	Reference *nn.Network
	Sites     []Site
	Notes     []string // what a user should know: what was left in float, and why
}

// Site is what became of one weight-bearing node.
type Site struct {
	Name       string  `json:"name"`
	Kind       string  `json:"kind"`           // dense, conv
	Shape      []int   `json:"shape"`          // of the weight
	WeightBits int     `json:"weight_bits"`    // 32: left in float
	InputBits  int     `json:"input_bits"`     // of the activation it reads; 32: float
	Bytes      int64   `json:"bytes"`          // of the weight as stored, scales included
	FloatBytes int64   `json:"float_bytes"`    // of the weight in float32
	WeightErr  float64 `json:"weight_error"`   // ‖W_q − W‖²/‖W‖², W as it is before quantisation
	OutputErr  float64 `json:"output_error"`   // ‖y_q − y‖²/‖y‖² on the calibration set, all earlier sites compressed too
	Note       string  `json:"note,omitempty"` // how its input is quantised
}

// ErrEmpty: there are no examples.
var ErrEmpty = errors.New("there are no examples")

// Examples are inputs of a network: one tensor per network input, in order, all with the same number of cases along
// axis 0.
type Examples []*tensors.Tensor

// Len is the number of cases.
func (x Examples) Len() int {
	if len(x) == 0 || x[0] == nil || x[0].Shape().Rank() == 0 {
		return 0
	}
	return x[0].Shape().Dimensions[0]
}

// Bytes is the size of all tensors.
func (x Examples) Bytes() (n int64) {
	for _, t := range x {
		n += int64(t.Shape().ByteSize())
	}
	return n
}

// Check reports whether the examples fit the network's inputs in number, type and shape (axis 0 is free).
func (x Examples) Check(net *nn.Network) error {
	if len(x) != len(net.Inputs) {
		return fmt.Errorf("compress: %d tensors for the network's %d inputs", len(x), len(net.Inputs))
	}
	if x.Len() == 0 {
		return fmt.Errorf("compress: %w", ErrEmpty)
	}
	for i, in := range net.Inputs {
		s := x[i].Shape()
		if s.Rank() != in.Shape.Rank() || s.Rank() == 0 || s.Dimensions[0] != x.Len() || s.DType != in.Shape.DType {
			return fmt.Errorf("compress: input %q is %s, the examples are %s", in.Name, in.Shape, s)
		}
		for a := 1; a < s.Rank(); a++ {
			if s.Dimensions[a] != in.Shape.Dimensions[a] {
				return fmt.Errorf("compress: input %q is %s, the examples are %s", in.Name, in.Shape, s)
			}
		}
	}
	return nil
}

// Slice copies the cases from (inclusive) to (exclusive). When there are fewer than size cases in that range, the last
// one is repeated up to size, so that every batch has one shape and runs in one executable; size 0 repeats nothing.
func (x Examples) Slice(from, to, size int) (Examples, error) {
	n := x.Len()
	if from < 0 || from >= to || to > n {
		return nil, fmt.Errorf("compress: cases %d to %d of %d", from, to, n)
	}
	idx := make([]int, max(size, to-from))
	for k := range idx {
		idx[k] = min(from+k, to-1)
	}
	return x.Pick(idx)
}

// Pick copies the cases of the given indices, in their order.
func (x Examples) Pick(idx []int) (Examples, error) {
	n := x.Len()
	for _, i := range idx {
		if i < 0 || i >= n {
			return nil, fmt.Errorf("compress: case %d of %d", i, n)
		}
	}
	if len(idx) == 0 {
		return nil, fmt.Errorf("compress: %w", ErrEmpty)
	}
	out := make(Examples, len(x))
	for i, t := range x {
		s := t.Shape().Clone()
		s.Dimensions[0] = len(idx)
		c := tensors.FromShape(s)
		var err error
		e := t.ConstBytes(func(src []byte) {
			row := len(src) / n
			err = c.MutableBytes(func(dst []byte) {
				for k, i := range idx {
					copy(dst[k*row:(k+1)*row], src[i*row:(i+1)*row])
				}
			})
		})
		if err = errors.Join(e, err); err != nil {
			return nil, err
		}
		out[i] = c
	}
	return out, nil
}

// FloatExamples makes the examples of a network with one float32 input.
func FloatExamples(data []float32, dims ...int) (Examples, error) {
	if s := shapes.Make(dtypes.Float32, dims...); len(dims) == 0 || s.Size() != len(data) {
		return nil, fmt.Errorf("compress: %d values do not fill the shape %v", len(data), dims)
	}
	return Examples{tensors.FromFlatDataAndDimensions(data, dims...)}, nil
}

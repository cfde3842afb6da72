// Package quant makes the weights and activations of a trained network low-precision integers.
//
// It holds the number formats (Affine, LogSqrt2, Log2, TanQ), how their parameters are fitted to data (CalibrateUniform,
// CalibrateLogSqrt2), how a site stores such weights (Uniform), the operation that moves softmax outputs to a logarithmic
// grid (LogQuantize; uniform grids are nn.QuantizeDequantize), and the methods: RepQViT for pre-norm transformers,
// MinMaxPTQ for any feed-forward network.
package quant

import (
	"errors"
	"fmt"
	"math"
)

var (
	// ErrBits: the number of bits is outside 2..8.
	ErrBits = errors.New("bits must be 2 to 8")
	// ErrEmpty: there is nothing to calibrate on.
	ErrEmpty = errors.New("the calibration set is empty")
	// ErrNotFinite: a weight or an activation is NaN or infinite.
	ErrNotFinite = errors.New("NaN or infinite value")
	// ErrNegative: the quantisers of probabilities hold values of [0, ∞), such as softmax outputs.
	ErrNegative = errors.New("negative value in a quantiser of probabilities")
	// ErrSharedNorm: a norm's output feeds something beside its linear readers (in a post-norm network, the residual
	// stream), so rescaling it would change the function.
	ErrSharedNorm = errors.New("the norm also feeds something that cannot absorb its scale")
	// ErrNoClasses: labels are given for training a network whose output is not one of classes.
	ErrNoClasses = errors.New("labels are for networks with one output, the logits or probabilities of classes")
)

// StoredTypes are the ops and stored forms of this package that a network file may name, for safetensors.ReadNetwork.
func StoredTypes() []any {
	return []any{
		Uniform{},
		Table{},
		LogQuantize{},
		TanQuantize{},
		PowerQuantize{},
		LearnedStep{},
		StatsWeight{},
		LSQWeight{},
		QueryKeyWeight{},
		ShiftLatents{},
		PowerOfTwo{},
		S3{},
		Ternary{},
	}
}

func checkBits(bits int) error {
	if bits < 2 || bits > 8 {
		return fmt.Errorf("quant: %d bits: %w", bits, ErrBits)
	}
	return nil
}

// checkAct is checkBits for an activation, which 32 leaves in float.
func checkAct(bits int) error {
	if bits == 32 {
		return nil
	}
	if bits < 2 || bits > 8 {
		return fmt.Errorf("quant: %d bits of an activation: %w, or 32 for float", bits, ErrBits)
	}
	return nil
}

func checkFinite[F float32 | float64](x []F) error {
	for i, v := range x {
		if v-v != 0 {
			return fmt.Errorf("quant: value %d is %g: %w", i, v, ErrNotFinite)
		}
	}
	return nil
}

func checkFinite64(what string, x []float64) error {
	for i, v := range x {
		if math.IsNaN(v) || math.IsInf(v, 0) {
			return fmt.Errorf("quant: %s %d is %g: %w", what, i, v, ErrNotFinite)
		}
	}
	return nil
}

// Package tiny trains int8 networks within hundreds of kilobytes of memory, as a microcontroller does (Lin et al.,
// On-Device Training Under 256KB Memory, NeurIPS 2022, arXiv:2206.15472): to adapt a network to new data on the device
// where it runs. On a machine with gigabytes ordinary fine-tuning is simpler and at least as accurate.
//
//	q, err := tiny.Quantize(ctx, backend, net, calib, tiny.QuantizeOptions{}) // a float or a QDQ network becomes integers
//	plan, err := tiny.Fit(ctx, q, examples, 256<<10, tiny.FitOptions{})       // which weights to train within 256 KB
//	res, err := tiny.Train(ctx, q, plan.Scheme, train, validation, tiny.TrainOptions{})
//	out, err := res.Net.Network()                                             // an nn.Network again: QDQ, ONNX
//
// The pieces are the integer network with forward and backward (Net, QConv), quantisation-aware scaling of its gradients,
// the scheme that says what is trained (Scheme) with its memory by formula (SavedMemory), the analysis of what each choice
// contributes (Contribution) and the search for the best within a budget (Search), and the compiler of a static training
// program with a memory plan (Compile, Program).
//
// The Program runs on one arena and allocates nothing. Its plan counts the bytes of the device: int8 activations, 1-bit
// masks, float32 gradients, trained copies of weights. Here every byte of the plan is a float32 word, so that the fast
// kernels of engine/kernel can run it: the offsets are those of the device, the arena is four times as large.
package tiny

import (
	"cmp"
	"errors"
	"fmt"
	"math"
)

// Errors that callers may want to tell apart.
var (
	// ErrUnsupported: the network has an operation that the integer graph does not know. The error names it.
	ErrUnsupported = errors.New("tiny: the integer graph has no such operation")
	// ErrBudget: the memory does not even hold the smallest training.
	ErrBudget = errors.New("tiny: the memory budget is too small")
	// ErrEmpty: there are no examples.
	ErrEmpty = errors.New("tiny: there are no examples")
	// ErrScheme: a scheme that does not fit the network.
	ErrScheme = errors.New("tiny: the scheme does not fit the network")
)

// least is the range that a channel's weights are widened to, so that dead channels have a scale.
const least = 1e-6

// QConv is an int8 convolution with its backward pass in plain loops and float64: what the kernels of Program are held
// against. Layouts are those of nn: activations [h, w, channels], weights [out, kh, kw, in/groups].
//
//	x̂ = x̄ − ZeroX,  acc = conv(x̂, w̄) + b̄,  ȳ = clamp(round(acc·e) + ZeroY, −128, 127),  e = SX·SW/SY
//
// with rounding half to even, and zeros of x̂ as padding. ReLU and ReLU6 are in SY, ZeroY and the clamp.
type QConv struct {
	In, Out, Groups int
	Kernel, Stride  [2]int
	Pad             [2]int // zeros before and after each spatial axis
	Bits            int    // of an activation; 0: 8, the only width that programs have
	SX, SY          float64
	ZeroX, ZeroY    float64
	SW              []float64 // scale of each output channel's weights
	W               []float64 // codes, whole numbers of ±127
	B               []float64 // whole numbers, of scale SX·SW
}

// codes is the range of the activations' codes.
func (c *QConv) codes() (lo, hi float64) {
	half := math.Exp2(float64(cmp.Or(c.Bits, 8) - 1))
	return -half, half - 1
}

// QuantizeWeights rounds float weights (output channel first) and biases to codes of so many bits: s_w = max|w|/(2^(bits−1)−1)
// per output channel, w̄ = round(w/s_w), b̄ = round(b/(s_w·s_x)).
func QuantizeWeights(w, b []float64, out, bits int, sx float64) (sw, wq, bq []float64) {
	per, most := len(w)/max(out, 1), math.Exp2(float64(bits-1))-1
	sw, wq, bq = make([]float64, out), make([]float64, len(w)), make([]float64, out)
	for o := range out {
		top := least
		for _, v := range w[o*per : (o+1)*per] {
			top = math.Max(top, math.Abs(v))
		}
		sw[o] = top / most
		for i, v := range w[o*per : (o+1)*per] {
			wq[o*per+i] = math.RoundToEven(v / sw[o])
		}
		if o < len(b) {
			bq[o] = math.RoundToEven(b[o] / (sw[o] * sx))
		}
	}
	return sw, wq, bq
}

// outSize is the number of outputs along an axis.
func outSize(in, kernel, stride int, pad [2]int) int {
	if in += pad[0] + pad[1]; in < kernel {
		return 0
	}
	return (in-kernel)/stride + 1
}

// each calls f for every product of the convolution: input, weight and output positions.
func (c *QConv) each(h, w int, f func(x, k, y int)) (oh, ow int) {
	oh, ow = outSize(h, c.Kernel[0], c.Stride[0], [2]int{c.Pad[0], c.Pad[0]}), outSize(w, c.Kernel[1], c.Stride[1], [2]int{c.Pad[1], c.Pad[1]})
	ci, co := c.In/c.Groups, c.Out/c.Groups
	for oy := range oh {
		for ox := range ow {
			for o := range c.Out {
				g := o / co
				for ky := range c.Kernel[0] {
					for kx := range c.Kernel[1] {
						iy, ix := oy*c.Stride[0]+ky-c.Pad[0], ox*c.Stride[1]+kx-c.Pad[1]
						if iy < 0 || iy >= h || ix < 0 || ix >= w {
							continue
						}
						for i := range ci {
							f((iy*w+ix)*c.In+g*ci+i, ((o*c.Kernel[0]+ky)*c.Kernel[1]+kx)*ci+i, (oy*ow+ox)*c.Out+o)
						}
					}
				}
			}
		}
	}
	return oh, ow
}

// Forward computes ȳ of one case and, for the backward pass, whether each output was within the clamp's range (its ends
// included).
func (c *QConv) Forward(x []float64, h, w int) (y []float64, inside []bool) {
	oh, ow := outSize(h, c.Kernel[0], c.Stride[0], [2]int{c.Pad[0], c.Pad[0]}), outSize(w, c.Kernel[1], c.Stride[1], [2]int{c.Pad[1], c.Pad[1]})
	y, inside = make([]float64, oh*ow*c.Out), make([]bool, oh*ow*c.Out)
	c.each(h, w, func(xi, k, yi int) { y[yi] += (x[xi] - c.ZeroX) * c.W[k] })
	lo, hi := c.codes()
	for i := range y {
		o := i % c.Out
		v := math.RoundToEven((y[i]+c.B[o])*(c.SX*c.SW[o]/c.SY)) + c.ZeroY
		y[i], inside[i] = min(max(v, lo), hi), v >= lo && v <= hi
	}
	return y, inside
}

// QGrad are the gradients of a QConv with respect to x̄, w̄ and b̄.
type QGrad struct{ X, W, B []float64 }

// Backward passes dL/dȳ back, straight through the rounding and where the clamp let the value through.
func (c *QConv) Backward(x []float64, h, w int, grad []float64, inside []bool) QGrad {
	g := QGrad{make([]float64, len(x)), make([]float64, len(c.W)), make([]float64, c.Out)}
	acc := make([]float64, len(grad))
	for i := range grad {
		if o := i % c.Out; inside[i] {
			acc[i] = grad[i] * (c.SX * c.SW[o] / c.SY)
			g.B[o] += acc[i]
		}
	}
	c.each(h, w, func(xi, k, yi int) {
		g.X[xi] += c.W[k] * acc[yi]
		g.W[k] += (x[xi] - c.ZeroX) * acc[yi]
	})
	return g
}

// QAS is quantisation-aware scaling: gradients of w̄ times s_w⁻² and of b̄ times (s_w·s_x)⁻², per output channel. Plain SGD
// on codes with these takes the same step as SGD on float weights: the codes are 1/s_w larger than the weights and
// their gradients s_w times smaller, so that without it the ratio of both is off by s_w⁻².
func (c *QConv) QAS(g QGrad) (w, b []float64) {
	w, b = make([]float64, len(g.W)), make([]float64, len(g.B))
	per := len(g.W) / max(c.Out, 1)
	for o := range c.Out {
		s := c.SW[o] * c.SW[o]
		b[o] = g.B[o] / (s * c.SX * c.SX)
		for i := o * per; i < (o+1)*per; i++ {
			w[i] = g.W[i] / s
		}
	}
	return w, b
}

// QAdd is the sum of two int8 activations, ȳ = clamp(round(((x̄₁−Z₁)·S₁ + (x̄₂−Z₂)·S₂)/SY) + ZY).
type QAdd struct{ S1, Z1, S2, Z2, SY, ZY float64 }

// Forward adds.
func (a QAdd) Forward(x1, x2 []float64) (y []float64, inside []bool) {
	y, inside = make([]float64, len(x1)), make([]bool, len(x1))
	for i := range x1 {
		v := math.RoundToEven(((x1[i]-a.Z1)*a.S1+(x2[i]-a.Z2)*a.S2)/a.SY) + a.ZY
		y[i], inside[i] = min(max(v, -128), 127), v >= -128 && v <= 127
	}
	return y, inside
}

// Backward passes a gradient back to both inputs.
func (a QAdd) Backward(grad []float64, inside []bool) (g1, g2 []float64) {
	g1, g2 = make([]float64, len(grad)), make([]float64, len(grad))
	for i, g := range grad {
		if inside[i] {
			g1[i], g2[i] = g*a.S1/a.SY, g*a.S2/a.SY
		}
	}
	return g1, g2
}

// Mismatch is log10(‖W‖/‖G‖) of a tensor, the diagnostic that shows what scaling repairs: for float, int8 and scaled int8
// gradients it should be alike. NaN without a gradient.
func Mismatch(w, g []float64) float64 {
	norm := func(x []float64) (sum float64) {
		for _, v := range x {
			sum += v * v
		}
		return math.Sqrt(sum)
	}
	if n := norm(g); n > 0 {
		return math.Log10(norm(w) / n)
	}
	return math.NaN()
}

func finite(what string, x []float32) error {
	for i, v := range x {
		if v-v != 0 {
			return fmt.Errorf("tiny: %s: value %d is %g", what, i, v)
		}
	}
	return nil
}

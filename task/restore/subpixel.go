package restore

import (
	"fmt"

	"github.com/gomlx/gomlx/core/graph"

	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/nn"
)

// PixelShuffle rearranges x [N, h, w, C·r²] to [N, h·r, w·r, C] in a graph of the caller's. It panics as graph
// functions do; nn.PixelShuffle is the operation of a network.
func PixelShuffle(x *graph.Node, r int, order nn.ShuffleOrder) *graph.Node {
	return nn.PixelShuffle{R: r, Order: order}.Lower(nil, []*graph.Node{x})[0]
}

// PixelUnshuffle is the inverse of PixelShuffle.
func PixelUnshuffle(x *graph.Node, r int, order nn.ShuffleOrder) *graph.Node {
	return nn.PixelUnshuffle{R: r, Order: order}.Lower(nil, []*graph.Node{x})[0]
}

// SubPixelConv adds a k×k convolution to out·r² channels named name, and its shuffle named name+".shuffle", to a
// network under construction, and returns the shuffled value: [N, h, w, C] -> [N, h·r, w·r, out]. Padding is zero and
// keeps the size, so k must be odd. With icnr the r² sub-kernels of each output channel begin equal, which starts
// training without a checkerboard (arXiv:1707.02937).
func SubPixelConv(b *nn.Builder, name, x string, k, r, out int, order nn.ShuffleOrder, icnr bool) string {
	conv := nn.Conv2D(out*r*r, k, 1)
	if icnr {
		conv.W = nn.Plain{Init: ICNR(nil, out, r, order)}
	}
	return b.Add(name+".shuffle", nn.PixelShuffle{R: r, Order: order}, b.Add(name, conv, x))
}

// ICNR is the initialisation to convolution resize of a sub-pixel convolution's kernel [out·r², k, k, in]
// (arXiv:1707.02937, sec. 3): one kernel per output channel, drawn by init (nil: N(0, 1/fan-in)), is copied to all r²
// places of the block, so that every r×r block of the first outputs is constant.
func ICNR(init nn.Init, out, r int, order nn.ShuffleOrder) nn.Init {
	return func(rnd *rng.Rand, dst []float32) {
		rr := r * r
		per := len(dst) / (out * rr)
		base := make([]float32, out*per)
		draw := init
		if draw == nil {
			draw = nn.FanIn(per, 1)
		}
		draw(rnd, base)
		for c := range out {
			for ij := range rr {
				at := ij*out + c
				if order == nn.ChannelMajor {
					at = c*rr + ij
				}
				copy(dst[at*per:(at+1)*per], base[c*per:(c+1)*per])
			}
		}
	}
}

// SubPixelToDeconv converts a sub-pixel convolution, stride 1 with zero padding (k-1)/2 and then a shuffle by r, to the
// transposed convolution of stride r that gives the same output (arXiv:1609.07009).
//
// w is the kernel [out·r², in, k, k] (the layout of ONNX and PyTorch), out the channels after the shuffle; k is odd.
// The result is the transposed kernel [in, out, k·r, k·r] and the padding r·(k-1)/2 that goes with it. The transposed
// convolution has one bias per output channel, so biases convert only when they are equal over each r×r block.
func SubPixelToDeconv(w []float32, out, in, k, r int, order nn.ShuffleOrder) (kernel []float32, pad int, err error) {
	at, err := deconvIndex(len(w), out, in, k, r, order)
	if err != nil {
		return nil, 0, err
	}
	kernel = make([]float32, len(w))
	for from, to := range at {
		kernel[to] = w[from]
	}
	return kernel, r * (k - 1) / 2, nil
}

// DeconvToSubPixel is the inverse of SubPixelToDeconv: a transposed kernel [in, out, k·r, k·r] of stride r and padding
// r·(k-1)/2 becomes the kernel [out·r², in, k, k] of a convolution with padding (k-1)/2 and a shuffle by r.
func DeconvToSubPixel(kernel []float32, out, in, k, r int, order nn.ShuffleOrder) (w []float32, pad int, err error) {
	at, err := deconvIndex(len(kernel), out, in, k, r, order)
	if err != nil {
		return nil, 0, err
	}
	w = make([]float32, len(kernel))
	for from, to := range at {
		w[from] = kernel[to]
	}
	return w, (k - 1) / 2, nil
}

// deconvIndex gives for every element of the sub-pixel kernel its place in the transposed one:
// K[n, c, (k-1-a)·r+i, (k-1-b)·r+j] = W[channel(c, i, j), n, a, b]; transposition turns the kernel around, so tap a
// of the convolution is block k-1-a.
func deconvIndex(size, out, in, k, r int, order nn.ShuffleOrder) ([]int, error) {
	const limit = 1 << 15
	switch {
	case out < 1 || in < 1 || k < 1 || r < 1 || out > 1<<28 || in > 1<<28 || k > limit || r > limit:
		return nil, fmt.Errorf("restore: sub-pixel convolution with %d outputs, %d inputs, kernel %d, factor %d; all must be at least 1", out, in, k, r)
	case k%2 == 0:
		return nil, fmt.Errorf("restore: kernel size %d is even; a sub-pixel convolution that keeps its size, and so its transposed form, needs an odd one", k)
	case order != nn.ChannelMinor && order != nn.ChannelMajor:
		return nil, fmt.Errorf("restore: there is no %s; use ChannelMinor or ChannelMajor", order)
	}
	if float64(out)*float64(in)*float64(k*k)*float64(r*r) != float64(size) {
		return nil, fmt.Errorf("restore: a kernel of %d values is not %d·%d² × %d × %d × %d", size, out, r, in, k, k)
	}
	at := make([]int, 0, size)
	for o := range out * r * r {
		c, ij := o%out, o/out
		if order == nn.ChannelMajor {
			c, ij = o/(r*r), o%(r*r)
		}
		i, j := ij/r, ij%r
		for n := range in {
			for a := range k {
				for b := range k {
					at = append(at, ((n*out+c)*k*r+(k-1-a)*r+i)*k*r+(k-1-b)*r+j)
				}
			}
		}
	}
	return at, nil
}

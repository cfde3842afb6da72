package nn

import (
	"fmt"

	"github.com/gomlx/gomlx/core/graph"
)

// ShuffleOrder says which of a pixel's C·r² channels becomes which pixel of its r×r block.
type ShuffleOrder int

// The two orders. They are the same for C = 1 and must not be mixed otherwise.
const (
	// ChannelMinor: channel C·r·i + C·j + c goes to row i, column j, channel c. It is the order of
	// arXiv:1609.05158, of TensorFlow's depth_to_space and of ONNX's DepthToSpace in mode DCR.
	ChannelMinor ShuffleOrder = iota
	// ChannelMajor: channel c·r² + r·i + j goes to row i, column j, channel c. It is the order of PyTorch's
	// PixelShuffle and of ONNX's DepthToSpace in mode CRD.
	ChannelMajor
)

// String returns "channel_minor" or "channel_major".
func (o ShuffleOrder) String() string {
	switch o {
	case ChannelMinor:
		return "channel_minor"
	case ChannelMajor:
		return "channel_major"
	}
	return fmt.Sprintf("ShuffleOrder(%d)", int(o))
}

// ParseShuffleOrder is the inverse of ShuffleOrder.String.
func ParseShuffleOrder(s string) (ShuffleOrder, error) {
	for _, o := range []ShuffleOrder{ChannelMinor, ChannelMajor} {
		if s == o.String() {
			return o, nil
		}
	}
	return 0, fmt.Errorf("nn: there is no shuffle order %q; use channel_minor or channel_major", s)
}

// PixelShuffle rearranges [N, h, w, C·R²] to [N, h·R, w·R, C]: the last step of a sub-pixel convolution
// (arXiv:1609.05158, eq. 4). It refuses R < 1 and channels that R² does not divide.
type PixelShuffle struct {
	R     int
	Order ShuffleOrder
}

// Kind returns "pixel_shuffle".
func (PixelShuffle) Kind() string { return "pixel_shuffle" }

// Lower reshapes to [N, h, w, …], brings the block's axes beside the pixel's, and reshapes back.
func (p PixelShuffle) Lower(_ *Ctx, x []*graph.Node) []*graph.Node {
	n, h, w, c := imageDims(x[0], p.Order)
	r := p.R
	if r < 1 || r > c || c%(r*r) != 0 {
		panic(fmt.Errorf("pixel shuffle by %d of %s: the factor is at least 1 and its square divides the %d channels", r, x[0].Shape(), c))
	}
	c /= r * r
	var y *graph.Node
	if p.Order == ChannelMinor { // [N,h,w,i,j,C] -> [N,h,i,w,j,C]
		y = graph.TransposeAllAxes(graph.Reshape(x[0], n, h, w, r, r, c), 0, 1, 3, 2, 4, 5)
	} else { // [N,h,w,C,i,j] -> [N,h,i,w,j,C]
		y = graph.TransposeAllAxes(graph.Reshape(x[0], n, h, w, c, r, r), 0, 1, 4, 2, 5, 3)
	}
	return []*graph.Node{graph.Reshape(y, n, h*r, w*r, c)}
}

// PixelUnshuffle rearranges [N, h·R, w·R, C] to [N, h, w, C·R²]: the inverse of PixelShuffle, also known as
// space-to-depth. It refuses R < 1 and sides that R does not divide.
type PixelUnshuffle struct {
	R     int
	Order ShuffleOrder
}

// Kind returns "pixel_unshuffle".
func (PixelUnshuffle) Kind() string { return "pixel_unshuffle" }

// Lower is PixelShuffle's run backwards.
func (p PixelUnshuffle) Lower(_ *Ctx, x []*graph.Node) []*graph.Node {
	n, h, w, c := imageDims(x[0], p.Order)
	r := p.R
	if r < 1 || h%r != 0 || w%r != 0 {
		panic(fmt.Errorf("pixel unshuffle by %d of %s: the factor is at least 1 and divides height %d and width %d", r, x[0].Shape(), h, w))
	}
	h, w = h/r, w/r
	y := graph.Reshape(x[0], n, h, r, w, r, c) // [N,h,i,w,j,C]
	if p.Order == ChannelMinor {
		y = graph.TransposeAllAxes(y, 0, 1, 3, 2, 4, 5)
	} else {
		y = graph.TransposeAllAxes(y, 0, 1, 3, 5, 2, 4)
	}
	return []*graph.Node{graph.Reshape(y, n, h, w, c*r*r)}
}

func imageDims(x *graph.Node, o ShuffleOrder) (n, h, w, c int) {
	wantRank(x.Shape(), 4, 4)
	if o != ChannelMinor && o != ChannelMajor {
		panic(fmt.Errorf("there is no %s; use ChannelMinor or ChannelMajor", o))
	}
	d := x.Shape().Dimensions
	return d[0], d[1], d[2], d[3]
}

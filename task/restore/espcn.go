package restore

import (
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/lathe-ml/lathe/nn"
)

// ESPCN is the efficient sub-pixel convolutional network of Shi et al., CVPR 2016 (arXiv:1609.05158): convolutions in
// low-resolution space, and a last one whose C·r² channels a fixed permutation arranges into the image of r times the
// size:
//
//	f¹(x) = φ(W₁ * x + b₁)
//	fˡ(x) = φ(Wₗ * fˡ⁻¹(x) + bₗ),  l = 2 … L-1
//	f^L(x) = PS(W_L * f^{L-1}(x) + b_L)
//
// Compared with a network that works on a bicubically enlarged image (SRCNN) it costs about r² times less per pixel and
// learns r²·n upscaling filters instead of being given one. The zero value is the paper's network for r = 3: 22,624
// weights and 105 biases, as many multiply-adds per low-resolution pixel.
//
// Padding is zero and keeps the size, as all ports have it; the paper's patch stride hints at unpadded convolutions in
// training, which it does not say.
type ESPCN struct {
	Factor   int   // r, at least 1; 0: 3
	Channels int   // C: 1 for luminance alone, 3 for RGB; 0: 1
	Widths   []int // channels of the layers before the last; nil: 64, 32
	Kernels  []int // odd sizes, one more than Widths; nil: 5, 3, 3
	// Activation is "tanh" (the paper's final choice) or "relu"; "": tanh.
	Activation string
	Order      nn.ShuffleOrder // ChannelMinor unless said otherwise
	// ICNR begins with equal sub-kernels in the last layer (arXiv:1707.02937): no checkerboard at the start.
	ICNR bool
}

// The names of ESPCN's values in its network.
const (
	lowInput    = "lr"       // [N, h, w, C]
	lowFeatures = "features" // [N, h, w, C·r²], before the shuffle
	highOutput  = "sr"       // [N, r·h, r·w, C]
)

func (m ESPCN) withDefaults() ESPCN {
	if m.Factor == 0 {
		m.Factor = 3
	}
	if m.Channels == 0 {
		m.Channels = 1
	}
	if m.Widths == nil {
		m.Widths = []int{64, 32}
	}
	if m.Kernels == nil {
		m.Kernels = []int{5, 3, 3}
	}
	if m.Activation == "" {
		m.Activation = "tanh"
	}
	return m
}

// check refuses what cannot be built. It expects defaults to be filled in.
func (m ESPCN) check() error {
	if m.Factor < 1 || m.Factor > 64 {
		return fmt.Errorf("restore: factor %d; 1 to 64 are possible", m.Factor)
	}
	if m.Channels != 1 && m.Channels != 3 {
		return fmt.Errorf("restore: %d channels; 1 (luminance) or 3 (RGB) are possible", m.Channels)
	}
	if len(m.Kernels) != len(m.Widths)+1 || len(m.Kernels) > 64 {
		return fmt.Errorf("restore: %d kernel sizes for %d widths; there must be one more, for the last layer, and at most 64", len(m.Kernels), len(m.Widths))
	}
	for _, k := range m.Kernels {
		if k < 1 || k%2 == 0 || k > 63 {
			return fmt.Errorf("restore: kernel size %d; odd sizes from 1 to 63 are possible", k)
		}
	}
	for _, n := range m.Widths {
		if n < 1 || n > 1<<14 {
			return fmt.Errorf("restore: a layer of %d channels; 1 to %d are possible", n, 1<<14)
		}
	}
	if _, _, err := activation(m.Activation); err != nil {
		return err
	}
	if m.Order != nn.ChannelMinor && m.Order != nn.ChannelMajor {
		return fmt.Errorf("restore: there is no %s; use ChannelMinor or ChannelMajor", m.Order)
	}
	return nil
}

// activation returns the op and the gain that keeps the variance of a layer before it.
func activation(name string) (op nn.Op, gain float64, err error) {
	switch name {
	case "tanh":
		return nn.Tanh, 1, nil
	case "relu":
		return nn.ReLU, math.Sqrt2, nil
	}
	return nil, 0, fmt.Errorf("restore: there is no activation %q; use tanh or relu", name)
}

// Overlap is the number of low-resolution pixels on either side that an output depends on, Σ (k-1)/2: the overlap that
// tiles need. It is 4 for the default network.
func (m ESPCN) Overlap() int { return reach(m.withDefaults().Kernels) }

func reach(kernels []int) (n int) {
	for _, k := range kernels {
		n += (k - 1) / 2
	}
	return n
}

// Network builds the network: input "lr" [N, h, w, C] of any height and width, output "sr" [N, r·h, r·w, C], and the
// value "features" [N, h, w, C·r²] before the shuffle. Weights are drawn from N(0, 1/fan-in) for tanh and
// N(0, 2/fan-in) for ReLU, each from a stream of its own under seed; biases are 0. (The paper does not say how it
// initialises.)
func (m ESPCN) Network(seed uint64) (*nn.Network, error) {
	m = m.withDefaults()
	if err := m.check(); err != nil {
		return nil, err
	}
	b := nn.NewBuilder(seed)
	x := trunk(b, b.Image(lowInput, 17, 17, m.Channels), m.Channels, m.Widths, m.Kernels, m.Activation)
	last := nn.Conv2D(m.Channels*m.Factor*m.Factor, m.Kernels[len(m.Widths)], 1)
	if m.ICNR {
		last.W = nn.Plain{Init: ICNR(nil, m.Channels, m.Factor, m.Order)}
	}
	x = b.Add(lowFeatures, last, x)
	net, err := b.Finish(b.Add(highOutput, nn.PixelShuffle{R: m.Factor, Order: m.Order}, x))
	if err != nil {
		return nil, err
	}
	net.Meta = m.meta()
	return net, nil
}

// trunk adds all layers but the last: conv1, act1, conv2, …
func trunk(b *nn.Builder, x string, channels int, widths, kernels []int, act string) string {
	op, gain, err := activation(act)
	if err != nil {
		panic(err) // the caller has checked it
	}
	for i, n := range widths {
		conv := nn.Conv2D(n, kernels[i], 1)
		conv.W = nn.Plain{Init: nn.FanIn(channels*kernels[i]*kernels[i], gain)}
		channels = n
		x = b.Add(fmt.Sprintf("conv%d", i+1), conv, x)
		x = b.Add(fmt.Sprintf("act%d", i+1), op, x)
	}
	return x
}

// meta describes the network in a model file.
func (m ESPCN) meta() map[string]string {
	return map[string]string{
		"architecture": "espcn",
		"factor":       strconv.Itoa(m.Factor),
		"channels":     strconv.Itoa(m.Channels),
		"widths":       joinInts(m.Widths),
		"kernels":      joinInts(m.Kernels),
		"activation":   m.Activation,
		"order":        m.Order.String(),
	}
}

// espcnFromMeta is the inverse of meta.
func espcnFromMeta(meta map[string]string) (m ESPCN, err error) {
	if a := meta["architecture"]; a != "espcn" {
		return m, fmt.Errorf("restore: the model's architecture is %q, not espcn; use a file that `lathe upscale` ships or restore.Save wrote", a)
	}
	if m.Factor, err = strconv.Atoi(meta["factor"]); err != nil {
		return m, fmt.Errorf("restore: the model's factor is %q, not a number", meta["factor"])
	}
	if m.Channels, err = strconv.Atoi(meta["channels"]); err != nil {
		return m, fmt.Errorf("restore: the model's channels are %q, not a number", meta["channels"])
	}
	if m.Widths, err = splitInts(meta["widths"]); err != nil {
		return m, fmt.Errorf("restore: the model's widths: %w", err)
	}
	if m.Kernels, err = splitInts(meta["kernels"]); err != nil {
		return m, fmt.Errorf("restore: the model's kernels: %w", err)
	}
	if m.Order, err = nn.ParseShuffleOrder(meta["order"]); err != nil {
		return m, err
	}
	m.Activation = meta["activation"]
	return m, m.check()
}

func joinInts(v []int) string {
	s := make([]string, len(v))
	for i, n := range v {
		s[i] = strconv.Itoa(n)
	}
	return strings.Join(s, ",")
}

func splitInts(s string) ([]int, error) {
	if s == "" {
		return []int{}, nil
	}
	if len(s) > 1000 {
		return nil, fmt.Errorf("a list of %d characters; at most 1000 are read", len(s))
	}
	out := []int{}
	for p := range strings.SplitSeq(s, ",") {
		n, err := strconv.Atoi(p)
		if err != nil {
			return nil, fmt.Errorf("%q is not a list of numbers", s)
		}
		out = append(out, n)
	}
	return out, nil
}

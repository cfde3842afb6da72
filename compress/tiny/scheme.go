package tiny

import (
	"cmp"
	"fmt"
	"math"
	"slices"

	"github.com/lathe-ml/lathe/internal/rng"
)

// Scheme says what is trained, beside the classifier, which always is: the biases of the last convolutions, and weights of
// some of these, all or some of their input channels. The zero value trains the classifier alone.
type Scheme struct {
	Biases  int             `json:"biases"`            // k: so many last convolutions train their biases; back-propagation ends there
	Weights map[int]float64 `json:"weights,omitempty"` // share of input channels whose weights are trained, in (0, 1], by the convolution's number
	// Select says which input channels a share means: "magnitude+" (default), those of largest weight; "magnitude-", of
	// the smallest; "random".
	Select string `json:"select,omitempty"`
	Seed   uint64 `json:"seed,omitempty"` // of random
}

// LastLayers trains weights and biases of the last k convolutions.
func LastLayers(net *Net, k int) Scheme {
	s := Scheme{Biases: k, Weights: map[int]float64{}}
	for i, convs := len(net.Convs())-k, len(net.Convs()); i < convs; i++ {
		s.Weights[i] = 1
	}
	return s
}

// Everything trains the whole network.
func Everything(net *Net) Scheme { return LastLayers(net, len(net.Convs())) }

// Check reports what does not fit the network.
func (s Scheme) Check(net *Net) error {
	n := len(net.Convs())
	if s.Biases < 0 || s.Biases > n {
		return fmt.Errorf("%w: biases of the last %d convolutions of %d", ErrScheme, s.Biases, n)
	}
	if s.Select != "" && !slices.Contains(Selections, s.Select) {
		return fmt.Errorf("%w: channels by %q; accepted: %v", ErrScheme, s.Select, Selections)
	}
	for i, r := range s.Weights {
		if i < n-s.Biases || i >= n {
			return fmt.Errorf("%w: weights of convolution %d, which is not among the last %d (%d to %d)", ErrScheme, i, s.Biases, n-s.Biases, n-1)
		}
		if !(r > 0 && r <= 1) {
			return fmt.Errorf("%w: a share of %g of the channels of convolution %d; want one in (0, 1]", ErrScheme, r, i)
		}
	}
	return nil
}

// Selections are the ways to choose input channels.
var Selections = []string{"magnitude+", "magnitude-", "random"}

// SelectChannels chooses ⌊ratio·channels⌋ input channels of a weight [out, taps, channels] by the norm over all other
// axes; of equal ones the first. A depthwise weight [channels, taps, 1] has its output channels as inputs. The result is
// ascending, and empty when the share is less than a channel.
func SelectChannels[F float32 | float64](w []F, out, taps, channels int, depthwise bool, ratio float64, criterion string, seed uint64) []int {
	n := channels
	if depthwise {
		n = out
	}
	norms := make([]float64, n)
	for i, v := range w {
		c := i % max(channels, 1)
		if depthwise {
			c = i / taps
		}
		norms[c] += float64(v) * float64(v)
	}
	order := make([]int, n)
	for i := range order {
		order[i] = i
	}
	switch criterion {
	case "random":
		order = rng.New(seed, "tiny:channels").Perm(n)
	case "magnitude-":
		slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(norms[a], norms[b]) })
	default:
		slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(norms[b], norms[a]) })
	}
	kept := order[:min(int(math.Floor(ratio*float64(n))), n)]
	slices.Sort(kept)
	return kept
}

// channels are the input channels that are trained of a convolution, nil when none is.
func (s Scheme) channels(net *Net, number int) []int {
	r, ok := s.Weights[number]
	if !ok {
		return nil
	}
	l := net.Convs()[number]
	in, out := net.Tensors[l.In[0]], net.Tensors[l.Out]
	ci := in.C
	if l.Depthwise {
		ci = 1
	}
	// the norms of the real weights: channels of an input share all output scales
	w := make([]float64, len(l.Weight))
	for i, v := range l.Weight {
		w[i] = math.RoundToEven(float64(v)) * l.Scale[i/(l.taps()*ci)]
	}
	return SelectChannels(w, out.C, l.taps(), ci, l.Depthwise, r, s.Select, s.Seed)
}

// LayerMemory is what the formula of the memory needs to know of a convolution.
type LayerMemory struct {
	In, Out   [3]int // channels, height, width
	Taps      int    // k²
	Depthwise bool
}

// Memory are the bits that training adds for a convolution, for one case at a time: what is saved for the backward
// pass (masks and inputs), and what is trained (biases and weights).
type Memory struct{ Activation, Weight int64 }

// Bits are the widths that the formula counts with.
type Bits struct{ Activation, Weight, Bias, Mask int }

// DeviceBits are int8 activations and weights, 32-bit biases and masks of a bit.
var DeviceBits = Bits{8, 8, 32, 1}

// SavedMemory is the memory of a scheme by the paper's formula, by convolution: a mask of the output and the biases for the
// last biases ones; beside them the chosen channels of the input and their weights where weights are trained. Nothing is
// saved of an input for biases alone, nor anything for frozen layers. The classifier is not counted.
func SavedMemory(layers []LayerMemory, biases int, weights map[int]float64, b Bits) []Memory {
	out := make([]Memory, len(layers))
	for i := max(0, len(layers)-biases); i < len(layers); i++ {
		l := layers[i]
		size := func(d [3]int) int64 { return int64(d[0]) * int64(d[1]) * int64(d[2]) }
		out[i] = Memory{int64(b.Mask) * size(l.Out), int64(b.Bias) * int64(l.Out[0])}
		r, ok := weights[i]
		if !ok {
			continue
		}
		kept := int64(math.Floor(r * float64(l.In[0])))
		out[i].Activation += int64(b.Activation) * int64(l.In[1]) * int64(l.In[2]) * kept
		trained := kept * int64(l.Taps)
		if !l.Depthwise {
			trained *= int64(l.Out[0])
		}
		out[i].Weight += int64(b.Weight) * trained
	}
	return out
}

// memory describes the convolutions for the formula.
func (n *Net) memory() (out []LayerMemory) {
	for _, l := range n.Convs() {
		in, o := n.Tensors[l.In[0]], n.Tensors[l.Out]
		out = append(out, LayerMemory{[3]int{in.C, in.H, in.W}, [3]int{o.C, o.H, o.W}, l.taps(), l.Depthwise})
	}
	return out
}

// ExtraBytes is the memory that a scheme adds to inference by the formula, rounded up. The compiled program says what it
// really takes.
func (s Scheme) ExtraBytes(net *Net) int {
	bits := int64(0)
	for _, m := range SavedMemory(net.memory(), s.Biases, s.Weights, DeviceBits) {
		bits += m.Activation + m.Weight
	}
	return int((bits + 7) / 8)
}

package quant

import (
	"errors"
	"fmt"
	"math"

	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/nn"
)

// ErrZeroRow: a row of a weight is zero everywhere, so that its mean magnitude is no scale.
var ErrZeroRow = errors.New("a row of zeros has no statistical scale; leave the site out, or accept such rows (ZeroRows)")

// StatsQ quantises a weight [out, ...] to 2^bits levels that are symmetric and none of which is zero, with a scale per
// row that follows from the row instead of being learnt (OFQ, arXiv:2302.02210, section 4.1):
//
//	s = 2·mean|W|,  v = clip(W/s, −1, 1−1e-6)·n − ½,  k = clip(round(v), −n, n−1),  W_q = s·(k+½)/n,  n = 2^(bits−1)
//
// The gradient of W is that of W_q everywhere, outside the clip too, and none goes into s. codes are k; v is what is
// rounded. Bits are 1 to 8; a row of zeros has the scale 1e-8.
func StatsQ(w *graph.Node, bits int) (wq, codes *graph.Node) {
	s, v, n := statsPlace(w, bits)
	codes = graph.ClipScalar(graph.Round(v), -n, n-1)
	wq = graph.MulScalar(graph.Mul(s, graph.AddScalar(codes, .5)), 1/n)
	return StraightThrough(w, wq), codes
}

// leastScale is the scale of a row of zeros.
const leastScale = 1e-8

// statsPlace gives scales, shaped to broadcast, and where each weight lies between the codes; no gradient flows.
func statsPlace(w *graph.Node, bits int) (s, v *graph.Node, n float64) {
	if err := checkStatsBits(bits); err != nil {
		panic(err)
	}
	w = graph.StopGradient(w)
	axes := make([]int, 0, w.Rank()-1)
	for a := 1; a < w.Rank(); a++ {
		axes = append(axes, a)
	}
	s = graph.MulScalar(graph.ReduceAndKeep(graph.Abs(w), graph.ReduceMean, axes...), 2)
	s = graph.MaxScalar(s, leastScale)
	n = float64(int(1) << (bits - 1))
	v = graph.AddScalar(graph.MulScalar(graph.ClipScalar(graph.Div(w, s), -1, 1-1e-6), n), -.5)
	return s, v, n
}

func checkStatsBits(bits int) error {
	if bits < 1 || bits > 8 {
		return fmt.Errorf("quant: a statistical scale for %d bits; accepted: 1 to 8", bits)
	}
	return nil
}

// StatsCodes is StatsQ on the host: the scale of each row and the code of each weight. A row of zeros is ErrZeroRow
// unless zeroRows allows it.
func StatsCodes(w []float32, rows, bits int, zeroRows bool) (scale []float64, codes []int32, err error) {
	scale, v, err := statsPlaces(w, rows, bits, zeroRows)
	if err != nil {
		return nil, nil, err
	}
	n := int32(1) << (bits - 1)
	codes = make([]int32, len(v))
	for i, x := range v {
		codes[i] = min(max(int32(math.RoundToEven(float64(x))), -n), n-1)
	}
	return scale, codes, nil
}

func statsPlaces(w []float32, rows, bits int, zeroRows bool) (scale []float64, v []float32, err error) {
	if err := checkStatsBits(bits); err != nil {
		return nil, nil, err
	}
	if rows < 1 || len(w) == 0 || len(w)%rows != 0 {
		return nil, nil, fmt.Errorf("quant: %d weights do not fill %d rows", len(w), rows)
	}
	if err := checkFinite(w); err != nil {
		return nil, nil, err
	}
	scale, v = rowMeans(w, rows), make([]float32, len(w))
	per, n := len(w)/rows, float32(int(1)<<(bits-1))
	for o := range scale {
		if scale[o] *= 2; scale[o] == 0 && !zeroRows {
			return nil, nil, fmt.Errorf("quant: output channel %d: %w", o, ErrZeroRow)
		}
		s := max(float32(scale[o]), leastScale)
		scale[o] = float64(s)
		for i := o * per; i < (o+1)*per; i++ {
			v[i] = min(max(w[i]/s, -1), 1-1e-6)*n - .5
		}
	}
	return scale, v, nil
}

// CGAMask says which weights confidence-guided annealing still lets move: those whose place v (see StatsQ) is no
// further than boundary from a threshold between two codes that the tensor uses (OFQ, section 4.3),
//
//	∃ integer i ∈ [min k, max k − 1]: |v − i − ½| ≤ boundary
//
// W is rows × cols, row-major. Boundary is 0 to 0.5; with 0.5 every weight between the extreme codes may move.
func CGAMask(w []float32, rows, cols, bits int, boundary float64) ([]bool, error) {
	if err := checkBoundary(boundary); err != nil {
		return nil, err
	}
	if rows < 1 || cols < 1 || len(w) != rows*cols {
		return nil, fmt.Errorf("quant: %d weights are no %d×%d matrix", len(w), rows, cols)
	}
	_, v, err := statsPlaces(w, rows, bits, true)
	if err != nil {
		return nil, err
	}
	n := float64(int(1) << (bits - 1))
	lo, hi := math.Inf(1), math.Inf(-1)
	for _, x := range v {
		k := min(max(math.RoundToEven(float64(x)), -n), n-1)
		lo, hi = min(lo, k), max(hi, k)
	}
	near := make([]bool, len(v))
	for i, x := range v {
		at := min(max(math.Floor(float64(x)), lo), hi-1)
		near[i] = hi > lo && math.Abs(float64(x)-at-.5) <= boundary
	}
	return near, nil
}

func checkBoundary(boundary float64) error {
	if !(boundary >= 0 && boundary <= .5) {
		return fmt.Errorf("quant: boundary range %g; accepted: 0 to 0.5", boundary)
	}
	return nil
}

// cgaMask is CGAMask in a graph: 1 where a weight may move, else 0.
func cgaMask(w *graph.Node, bits int, boundary float64) *graph.Node {
	_, v, n := statsPlace(w, bits)
	k := graph.ClipScalar(graph.Round(v), -n, n-1)
	lo, hi := graph.ReduceAllMin(k), graph.ReduceAllMax(k)
	at := graph.Max(graph.Min(graph.Floor(v), graph.AddScalar(hi, -1)), lo)
	near := graph.LessOrEqual(graph.Abs(graph.AddScalar(graph.Sub(v, at), -.5)), graph.Scalar(w.Graph(), w.DType(), boundary))
	return graph.Mul(graph.ConvertDType(near, w.DType()), graph.ConvertDType(graph.GreaterThan(hi, lo), w.DType()))
}

// StatsWeight is a Latent that StatsQ quantises. Its one parameter is "w". It is stored as Uniform whose zero point
// lies halfway between two codes.
type StatsWeight struct {
	Bits     int  // 1 to 8
	ZeroRows bool // rows of zeros are accepted
}

var (
	_ Latent     = StatsWeight{}
	_ storedBits = StatsWeight{}
	_ coded      = StatsWeight{}
)

// Kind returns "statsweight".
func (StatsWeight) Kind() string { return "statsweight" }

// WeightBits are the grid's.
func (d StatsWeight) WeightBits() int { return d.Bits }

// Specs is the latent weight.
func (d StatsWeight) Specs(w shapes.Shape) []nn.Spec { return nn.Plain{}.Specs(w) }

// Value is the weight on its grid.
func (d StatsWeight) Value(c *nn.Ctx) *graph.Node {
	w, _ := StatsQ(c.P("w"), d.Bits)
	return w
}

// Start keeps the weight.
func (d StatsWeight) Start(s *Site) (map[string][]float32, error) {
	_, _, err := StatsCodes(s.Weight, s.Shape[0], d.Bits, d.ZeroRows)
	return map[string][]float32{"w": s.Weight}, err
}

// Stored rounds for good.
func (d StatsWeight) Stored(l *Latents) (nn.Repr, map[string]*tensors.Tensor, error) {
	u, params, err := storeStats(l.Values["w"], l.Shape, d.Bits)
	return u, params, err
}

// codes are those of the latent weight.
func (d StatsWeight) codes(l *Latents) ([]int32, error) {
	_, k, err := StatsCodes(l.Values["w"], l.Shape[0], d.Bits, true)
	return k, err
}

// storeStats is a weight as StatsQ has it, W_q = (k + n − (n−½))·s/n.
func storeStats(w []float32, shape []int, bits int) (Uniform, map[string]*tensors.Tensor, error) {
	scale, codes, err := StatsCodes(w, shape[0], bits, true)
	if err != nil {
		return Uniform{}, nil, err
	}
	n := int32(1) << (bits - 1)
	a := Affine{Bits: bits, Axis: 0}
	for i := range codes {
		codes[i] += n
	}
	for _, s := range scale {
		a.Scale, a.Zero = append(a.Scale, s/float64(n)), append(a.Zero, float64(n)-.5)
	}
	return a.StoreCodes(codes, shape)
}

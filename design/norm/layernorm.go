package norm

import (
	"fmt"

	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"

	"github.com/lathe-ml/lathe/nn"
)

// LayerNormOptions are the knobs of the bare function.
type LayerNormOptions struct {
	Eps  float64 // inside the root; 0: 1e-5
	Axes []int   // normalised axes, negative ones from the end; nil: the last. For a map [N,h,w,C] the paper's are 1, 2, 3
	// ZeroEps allows Eps to be 0. A constant case then divides by zero.
	ZeroEps bool
}

// LayerNorm standardises every case of x over the normalised axes and applies gain and bias, which have the shape of
// those axes; nil means none:
//
//	y = gain·(x − mean)/√(var + eps) + bias,  var = mean((x − mean)²)
//
// (Ba, Kiros, Hinton, arXiv:1607.06450, eqs. 3-4.) It is the function behind nn.LayerNorm, on values of the caller's.
// The backward pass is that of autodiff: with g = dy·gain and r = 1/√(var+eps),
//
//	dx = r·(g − mean(g) − x̂·mean(g·x̂)),  dgain = Σ dy·x̂,  dbias = Σ dy
//
// One element per case is allowed: y = bias. It panics, as graph functions do, on an integer x, negative eps, repeated
// or missing axes and a gain or bias of another size.
func LayerNorm(x, gain, bias *graph.Node, o LayerNormOptions) *graph.Node {
	return standardize("LayerNorm", x, gain, bias, o, 1e-5, true)
}

// RMSNorm is the same without centring: y = gain·x/√(mean(x²) + eps) (Zhang, Sennrich, arXiv:1910.07467). Eps defaults
// to 1e-6.
func RMSNorm(x, gain, bias *graph.Node, o LayerNormOptions) *graph.Node {
	return standardize("RMSNorm", x, gain, bias, o, 1e-6, false)
}

func standardize(name string, x, gain, bias *graph.Node, o LayerNormOptions, eps float64, center bool) *graph.Node {
	if o.Eps < 0 {
		panic(fmt.Errorf("norm: %s: %w (%g)", name, errNegativeEps, o.Eps))
	}
	if o.Eps != 0 || o.ZeroEps {
		eps = o.Eps
	}
	axes := o.Axes
	if len(axes) == 0 {
		axes = []int{-1}
	}
	seen, size := map[int]bool{}, 1
	for _, a := range axes {
		if a < -x.Rank() || a >= x.Rank() || seen[(a+x.Rank())%x.Rank()] {
			panic(fmt.Errorf("norm: %s: axes %v are not distinct axes of %s", name, axes, x.Shape()))
		}
		seen[(a+x.Rank())%x.Rank()] = true
		size *= x.Shape().Dimensions[(a+x.Rank())%x.Rank()]
	}
	if size == 0 {
		panic(fmt.Errorf("norm: %s: no elements to normalise in %s", name, x.Shape()))
	}
	for what, v := range map[string]*graph.Node{"gain": gain, "bias": bias} {
		if v != nil && v.Shape().Size() != size {
			panic(fmt.Errorf("norm: %s: %s is %s, want %d elements", name, what, v.Shape(), size))
		}
	}
	return nn.Standardize(x, gain, bias, eps, center, axes...)
}

// None keeps its input: the arm without normalisation.
type None struct{}

var _ nn.Norm = None{}

// Kind returns "Identity".
func (None) Kind() string { return "Identity" }

// Params are none.
func (None) Params([]shapes.Shape) []nn.Spec { return nil }

// Lower returns x.
func (None) Lower(_ *nn.Ctx, x []*graph.Node) []*graph.Node { return x }

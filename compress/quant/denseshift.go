package quant

import (
	"cmp"
	"errors"
	"fmt"
	"math"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/nn"
)

// DenseShift makes the weights of an untrained network powers of two with a sign, ±2^s, so that the trained network
// multiplies by shifting integers or by adding to exponents (Li et al., ICCV 2023, arXiv:2208.09708). With b bits a weight
// is one of ±1, ±2, ..., ±2^T, T = 2^(b−1)−1: no code is spent on zero, which layers that are followed by a norm do not
// need. It is a way to train: a trained float network is not converted, its weights are drawn anew. Use it for small
// convolutional networks on hardware without multipliers, at 2 to 4 bits; at 3 bits and more a grid with zero (PowerOfTwo)
// can be as accurate on small tasks.
//
//	quant.DenseShift{}.Convert(net)   // sites now hold latents: ShiftLatents
//	... train net as any other: SGD, momentum 0.9, rate 0.1 along a cosine, weight decay 1e-4 on latents too ...
//	quant.Settle(net)                 // sites now hold b bits per weight: Table, which ONNX runtimes read
//
// Training keeps T+1 floats for each weight: 4 times a float network's at 3 bits, 8 times at 4.
//
// The zero value is 3 bits as in the paper.
type DenseShift struct {
	// Options select the sites and override bits for single ones. Without Select all convolutions and dense layers are
	// converted but the first convolution and the layers that give an output of the network.
	compress.Options

	WeightBits int     // 2 to 5; 0: 3
	Std        float64 // of the latents' normal distribution; 0: 1e-3. Large ones freeze the weights: a latent must travel about Std to flip
	// PlainGradient takes the true derivative of 2^s, 2^s·ln 2, in place of the rescaled one: an ablation.
	PlainGradient bool
	// Scale lets sites without a norm behind them be converted, and multiplies their weights by the fixed power of two
	// that keeps the variance: 2^round(log2(1/√(fan-in·E[w²]))). An extension; the paper's layers are all normalised.
	Scale bool
}

// Convert replaces the weights of the selected sites by freshly drawn latents, in place, and returns the names of these
// sites. Errors: ErrShiftBits; a site that does not exist, shares its weight, is quantised, or has no norm behind it.
func (d DenseShift) Convert(net *nn.Network) ([]string, error) {
	bits := cmp.Or(d.WeightBits, 3)
	if err := checkShiftBits(bits); err != nil {
		return nil, err
	}
	std := cmp.Or(d.Std, 1e-3)
	if !(std > 0) || math.IsInf(std, 0) {
		return nil, fmt.Errorf("quant: dense shift: latents of standard deviation %g; want a positive one, such as 1e-3", d.Std)
	}
	if err := d.Check(net); err != nil {
		return nil, err
	}
	sites, err := trainableSites(net, d.Options)
	if err != nil {
		return nil, fmt.Errorf("quant: dense shift: %w", err)
	}
	forms := make([]Latent, len(sites))
	for i, n := range sites {
		r := ShiftLatents{Bits: d.BitsOf(n.Name, compress.Bits{Weight: bits}).Weight, Std: std, PlainGradient: d.PlainGradient}
		if err := checkShiftBits(r.Bits); err != nil {
			return nil, fmt.Errorf("site %q: %w", n.Name, err)
		}
		if !normalised(net, n) {
			if !d.Scale {
				return nil, fmt.Errorf("quant: dense shift: site %q (%s) has no norm behind it, and weights of up to %g would make its output explode; put a batch norm there, leave the site out, or set Scale", n.Name, n.Op.Kind(), math.Exp2(float64(shifts(r.Bits))))
			}
			w := net.Param(n, "w").Value.Shape()
			fanIn := max(w.Size()/max(w.Dimensions[0], 1), 1)
			r.Offset = int(math.RoundToEven(-math.Log2(float64(fanIn)*meanSquare(r.Bits)) / 2))
		}
		forms[i] = r
	}
	return nodeNames(sites), takeForms(net, sites, forms, d.Seed)
}

// trainableSites are the sites that a method which trains quantised weights from scratch takes when nothing else is
// selected: all dense layers and convolutions with a plain weight of their own, but the first convolution and those that
// give an output.
func trainableSites(net *nn.Network, o compress.Options) (sites []*nn.Node, err error) {
	stem := true
	for _, n := range net.Sites() {
		if !isQuantisable(n) {
			continue
		}
		_, conv := n.Op.(nn.Conv)
		first := stem && conv
		stem = stem && !conv
		_, output := net.Readers(n.Out[0])
		if o.Select == nil && (first || output) || !o.Selected(n) {
			continue
		}
		switch {
		case !nn.IsPlain(n.Op) || net.Param(n, "w") == nil:
			return nil, fmt.Errorf("site %q stores its weight as %s; only plain weights can be replaced", n.Name, n.Op.(nn.Linear).Repr().Kind())
		case net.SharedParam(n, "w"):
			return nil, fmt.Errorf("site %q shares its weight with another node; leave both out", n.Name)
		}
		sites = append(sites, n)
	}
	if len(sites) == 0 {
		return nil, errors.New("no site is selected; by default all convolutions and dense layers are, but the first convolution and the classifier")
	}
	return sites, nil
}

// normalised says whether all that reads a site's output is a norm.
func normalised(net *nn.Network, n *nn.Node) bool {
	readers, output := net.Readers(n.Out[0])
	for _, r := range readers {
		if _, linear := r.Op.(nn.Linear); linear {
			return false
		}
		if _, norm := r.Op.(nn.Norm); !norm || r.Op.Kind() == (nn.Affine{}).Kind() || r.Op.Kind() == (nn.PReLU{}).Kind() {
			return false
		}
	}
	return len(readers) > 0 && !output
}

func nodeNames(nodes []*nn.Node) []string {
	out := make([]string, len(nodes))
	for i, n := range nodes {
		out[i] = n.Name
	}
	return out
}

// takeForms gives sites other forms, whose latents are drawn as a fresh build under that seed would draw them, or start
// from the float weight where that is what they train.
func takeForms(net *nn.Network, sites []*nn.Node, forms []Latent, seed uint64) error {
	for i, n := range sites {
		s, err := siteOf(net, n)
		if err != nil {
			return err
		}
		values := map[string][]float32{"w": s.Weight}
		if specs := forms[i].Specs(shapes.Make(dtypes.Float32, s.Shape...)); specs[0].Name != "w" {
			values = drawLatents(s.Name, specs, seed)
		}
		if err := setLatents(net, n, forms[i], s.Shape, values); err != nil {
			return err
		}
	}
	return net.Check()
}

func drawLatents(site string, specs []nn.Spec, seed uint64) map[string][]float32 {
	values := map[string][]float32{}
	for _, s := range specs {
		values[s.Name] = make([]float32, s.Shape.Size())
		s.Init(rng.New(seed, "init:"+site+"."+s.Name), values[s.Name])
	}
	return values
}

// ErrShiftBits: the number of bits of a shift weight is outside 2..5.
var ErrShiftBits = errors.New("shift weights have 2 to 5 bits")

func checkShiftBits(bits int) error {
	if bits < 2 || bits > 5 {
		return fmt.Errorf("quant: %d bits: %w", bits, ErrShiftBits)
	}
	return nil
}

// shifts is T, the largest shift of b bits.
func shifts(bits int) int { return 1<<(bits-1) - 1 }

// meanSquare is E[w²] of a weight whose latents are symmetric about zero: P(S=k) = 2^−(k+1) for k < T, P(T) = 2^−T.
func meanSquare(bits int) float64 {
	t := float64(shifts(bits))
	return (math.Exp2(t)-1)/2 + math.Exp2(t)
}

// ShiftLatents stores a site's weight as what it is trained by: latents "sign" and "t1" to "tT", T = 2^(Bits−1)−1, each of
// the weight's shape, from which the weight is built in the forward pass (SignScale). All of them have the role of a
// weight, so that they decay: without decay latents drift away from zero, and flip no more.
type ShiftLatents struct {
	Bits          int     // 2 to 5
	Std           float64 // of the initial values; 0: 1e-3
	PlainGradient bool    // see DenseShift
	Offset        int     `json:",omitempty"` // the weight is multiplied by 2^Offset
}

var _ Latent = ShiftLatents{}

// Kind returns "shift".
func (ShiftLatents) Kind() string { return "shift" }

// WeightBits are the bits of a frozen weight.
func (s ShiftLatents) WeightBits() int { return s.Bits }

// Specs are the latents.
func (s ShiftLatents) Specs(w shapes.Shape) []nn.Spec {
	if err := checkShiftBits(s.Bits); err != nil {
		panic(err)
	}
	init := nn.Normal(cmp.Or(s.Std, 1e-3))
	specs := []nn.Spec{{Name: "sign", Shape: w, Role: nn.Weight, Init: init}}
	for i := range shifts(s.Bits) {
		specs = append(specs, nn.Spec{Name: fmt.Sprintf("t%d", i+1), Shape: w, Role: nn.Weight, Init: init})
	}
	return specs
}

// Value builds the weight.
func (s ShiftLatents) Value(c *nn.Ctx) *graph.Node {
	if err := checkShiftBits(s.Bits); err != nil {
		panic(err)
	}
	var t []*graph.Node
	for i := range shifts(s.Bits) {
		l := c.P(fmt.Sprintf("t%d", i+1))
		if l == nil {
			panic(fmt.Errorf("latent t%d of %d is missing", i+1, shifts(s.Bits)))
		}
		t = append(t, l)
	}
	w, _ := SignScale(c.P("sign"), t, !s.PlainGradient)
	if s.Offset != 0 {
		w = graph.MulScalar(w, math.Exp2(float64(s.Offset)))
	}
	return w
}

// SignScale is the sign-scale decomposition of DenseShift: from a sign latent and T shift latents of one shape,
//
//	S₁ = H(t₁),  Sᵢ = (Sᵢ₋₁ + 1)·H(tᵢ),  w = sgn(sign)·2^S_T
//
// with H(t) = 1 for t > 0, else 0, and sgn(0) = +1: S_T is the length of the run of positive latents at the end. H and sgn
// have derivative 1 everywhere. With rescale, √(S+1) stands in for 2^S in the backward pass only, so that large weights do
// not get large steps. The values are exact.
func SignScale(sign *graph.Node, t []*graph.Node, rescale bool) (w, shift *graph.Node) {
	if sign == nil || len(t) == 0 {
		panic(errors.New("sign-scale decomposition: want a sign and at least one shift latent"))
	}
	one := graph.OnesLike(sign)
	sgn := StraightThrough(sign, graph.Where(graph.GreaterOrEqual(sign, graph.ZerosLike(sign)), one, graph.Neg(one)))
	var s, power *graph.Node // S and 2^S, the latter without gradient
	for i, l := range t {
		if !l.Shape().Equal(sign.Shape()) {
			panic(fmt.Errorf("sign-scale decomposition: latent t%d is %s, the sign %s", i+1, l.Shape(), sign.Shape()))
		}
		hard := positive(l)
		h := StraightThrough(l, hard)
		if s == nil {
			s, power = h, graph.OnePlus(hard)
			continue
		}
		s = graph.Mul(graph.OnePlus(s), h)
		power = graph.OnePlus(graph.Mul(graph.StopGradient(hard), graph.AddScalar(graph.MulScalar(power, 2), -1)))
	}
	power = graph.StopGradient(power)
	if !rescale {
		return graph.Mul(sgn, powerOfTwo(s, power)), s
	}
	backward := graph.Mul(sgn, graph.Sqrt(graph.OnePlus(s)))
	return StraightThrough(backward, graph.Mul(sgn, power)), s
}

// positive is H: 1 where t > 0, else 0.
func positive(t *graph.Node) *graph.Node {
	return graph.ConvertDType(graph.GreaterThan(t, graph.ZerosLike(t)), t.DType())
}

// powerOfTwo has the value power, which is 2^s, exactly, and the derivative 2^s·ln 2 with respect to s.
func powerOfTwo(s, power *graph.Node) *graph.Node {
	return StraightThrough(graph.Mul(graph.MulScalar(power, math.Ln2), s), power)
}

// Start draws latents: the sign and the size of a float weight say nothing about them.
func (s ShiftLatents) Start(site *Site) (map[string][]float32, error) {
	specs, err := specsOf(s, site.Shape)
	return drawLatents(site.Name, specs, 0), err
}

// Stored is the weight's codes with the table of their values. See ShiftsOf.
func (s ShiftLatents) Stored(l *Latents) (nn.Repr, map[string]*tensors.Tensor, error) {
	var t [][]float32
	for i := range shifts(s.Bits) {
		t = append(t, l.Values[fmt.Sprintf("t%d", i+1)])
	}
	w, err := PackShift(l.Values["sign"], t, s.Bits)
	if err != nil {
		return nil, nil, err
	}
	w.Shape, w.Offset = l.Shape, s.Offset
	return w.table().Store()
}

// shiftLevels are the values of the codes sign·(T+1)+s, sign 1 for negative.
func shiftLevels(bits, offset int) []float32 {
	levels := make([]float32, 1<<bits)
	for c := range levels {
		levels[c] = float32(math.Ldexp(1, c%(shifts(bits)+1)+offset))
		if c > shifts(bits) {
			levels[c] = -levels[c]
		}
	}
	return levels
}

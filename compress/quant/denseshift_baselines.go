package quant

import (
	"fmt"
	"math"
	"slices"

	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/nn"
)

// What DenseShift is compared with: weights that are trained from scratch on few values, zero among them.

// TrainOn gives the selected sites (without a selection: those that DenseShift takes) a form that is trained, such as
// PowerOfTwo, S3 or Ternary, in place, and returns their names. Forms that train the float weight, "w", start from what it
// is; others draw their latents under o.Seed.
func TrainOn(net *nn.Network, o compress.Options, form Latent) ([]string, error) {
	sites, err := trainableSites(net, o)
	if err != nil {
		return nil, fmt.Errorf("quant: %s: %w", form.Kind(), err)
	}
	return nodeNames(sites), takeForms(net, sites, slices.Repeat([]Latent{form}, len(sites)), o.Seed)
}

var (
	_ Latent = PowerOfTwo{}
	_ Latent = S3{}
	_ Latent = Ternary{}
)

// PowerOfTwo trains a float weight through a grid of powers of two with zero (DeepShift-Q, arXiv:1905.13298), straight
// through:
//
//	w ↦ sgn(w)·a·2^clip(round(log2(|w|/a)), −(n−1), 0),  0 below a·2^−(n−½),  a = max|w|,  n = 2^(Bits−1)−1
//
// One of the 2^Bits codes is unused. Parameter: "w".
type PowerOfTwo struct {
	Bits int // 2 to 5
}

// Kind returns "poweroftwo".
func (PowerOfTwo) Kind() string { return "poweroftwo" }

// WeightBits are the bits of a frozen weight.
func (p PowerOfTwo) WeightBits() int { return p.Bits }

// Specs is the float weight.
func (p PowerOfTwo) Specs(w shapes.Shape) []nn.Spec {
	if err := checkShiftBits(p.Bits); err != nil {
		panic(err)
	}
	return nn.Plain{}.Specs(w)
}

// Value moves the weight to the grid.
func (p PowerOfTwo) Value(c *nn.Ctx) *graph.Node {
	w := c.P("w")
	abs := graph.StopGradient(graph.Abs(w))
	a := graph.ReduceAllMax(abs)
	zero := graph.ZerosLike(w)
	magnitude := zero
	for k := shifts(p.Bits) - 1; k >= 0; k-- { // from the smallest on: the last one reached stays
		reached := graph.GreaterOrEqual(abs, graph.BroadcastToDims(graph.MulScalar(a, math.Exp2(-float64(k)-.5)), w.Shape().Dimensions...))
		level := graph.BroadcastToDims(graph.MulScalar(a, math.Exp2(-float64(k))), w.Shape().Dimensions...)
		magnitude = graph.Where(reached, level, magnitude)
	}
	return StraightThrough(w, graph.Mul(graph.Sign(w), magnitude))
}

// Start is the weight.
func (PowerOfTwo) Start(s *Site) (map[string][]float32, error) {
	return map[string][]float32{"w": s.Weight}, nil
}

// Stored is the codes of the grid points with the table of their values.
func (p PowerOfTwo) Stored(l *Latents) (nn.Repr, map[string]*tensors.Tensor, error) {
	w := l.Values["w"]
	a, n := float32(0), shifts(p.Bits)
	for _, v := range w {
		a = max(a, v, -v)
	}
	levels := make([]float32, 2*n+1) // 0, a, a/2, ..., −a, −a/2, ...
	for k := range n {
		levels[1+k] = float32(math.Ldexp(float64(a), -k))
		levels[1+n+k] = -levels[1+k]
	}
	out := &TableWeights{Bits: p.Bits, Shape: l.Shape, Codes: make([]uint8, len(w)), Tables: [][]float32{levels}}
	for i, v := range w {
		for k := range n {
			if abs := max(v, -v); abs > 0 && abs >= float32(float64(a)*math.Exp2(-float64(k)-.5)) {
				out.Codes[i] = uint8(1 + k)
				if v < 0 {
					out.Codes[i] += uint8(n)
				}
				break
			}
		}
	}
	return out.Store()
}

// S3 trains 3-bit weights of the levels 0, ±1, ±2, ±4 by a sign-sparse-shift decomposition (arXiv:2107.03453), straight
// through:
//
//	w = sgn(sign)·H(v)·2^(H(t₁)(H(t₂)+1))
//
// Parameters: the latents "sign", "v", "t1" and "t2", drawn as float weights are.
type S3 struct{}

// Kind returns "s3".
func (S3) Kind() string { return "s3" }

// WeightBits are the bits of a frozen weight.
func (S3) WeightBits() int { return 3 }

// Specs are the latents.
func (S3) Specs(w shapes.Shape) (specs []nn.Spec) {
	init := nn.FanIn(w.Size()/max(w.Dimensions[0], 1), math.Sqrt2)
	for _, name := range []string{"sign", "v", "t1", "t2"} {
		specs = append(specs, nn.Spec{Name: name, Shape: w, Role: nn.Weight, Init: init})
	}
	return specs
}

// Value builds the weight.
func (S3) Value(c *nn.Ctx) *graph.Node {
	step := func(local string) *graph.Node {
		l := c.P(local)
		if l == nil {
			panic(fmt.Errorf("latent %s is missing", local))
		}
		return StraightThrough(l, positive(l))
	}
	sign := c.P("sign")
	one := graph.OnesLike(sign)
	sgn := StraightThrough(sign, graph.Where(graph.GreaterOrEqual(sign, graph.ZerosLike(sign)), one, graph.Neg(one)))
	h1, h2 := step("t1"), step("t2")
	power := graph.StopGradient(graph.OnePlus(graph.Mul(h1, graph.OnePlus(graph.MulScalar(h2, 2))))) // 1, 2 or 4
	return graph.Mul(graph.Mul(sgn, step("v")), powerOfTwo(graph.Mul(h1, graph.OnePlus(h2)), power))
}

// Start draws latents.
func (f S3) Start(site *Site) (map[string][]float32, error) {
	specs, err := specsOf(f, site.Shape)
	return drawLatents(site.Name, specs, 0), err
}

// Stored is the codes of the levels.
func (S3) Stored(l *Latents) (nn.Repr, map[string]*tensors.Tensor, error) {
	sign, v, t1, t2 := l.Values["sign"], l.Values["v"], l.Values["t1"], l.Values["t2"]
	out := &TableWeights{Bits: 3, Shape: l.Shape, Codes: make([]uint8, len(sign)), Tables: [][]float32{{0, 1, 2, 4, -1, -2, -4}}}
	for i := range out.Codes {
		if v[i] <= 0 {
			continue
		}
		switch out.Codes[i] = 1; {
		case t1[i] > 0 && t2[i] > 0:
			out.Codes[i] = 3
		case t1[i] > 0:
			out.Codes[i] = 2
		}
		if sign[i] < 0 {
			out.Codes[i] += 3
		}
	}
	return out.Store()
}

// S3Penalty adds factor·Σ max(−v, 0) over the sparsity latents of all S3 weights to a loss, which keeps weights from
// staying zero; the paper's factor is 1e-5.
func S3Penalty(net *nn.Network, loss learn.LossFunc, factor float64) learn.LossFunc {
	var latents []string
	for _, n := range net.Sites() {
		if _, ok := n.Op.(nn.Linear).Repr().(S3); ok {
			latents = append(latents, n.P["v"])
		}
	}
	return func(env *nn.Env, batch []*graph.Node) *graph.Node {
		l := loss(env, batch)
		for _, name := range latents {
			v := env.Param(name)
			l = graph.Add(l, graph.MulScalar(graph.ReduceAllSum(graph.Max(graph.Neg(v), graph.ZerosLike(v))), factor))
		}
		return l
	}
}

// Ternary trains a float weight through the levels 0 and ±α of each output channel (ternary weight networks,
// arXiv:1605.04711), straight through: 0 where |w| ≤ Δ = 0.7·mean|w|, and α the mean of |w| above Δ. Parameter: "w".
type Ternary struct{}

// Kind returns "ternary".
func (Ternary) Kind() string { return "ternary" }

// WeightBits are the bits of a frozen weight.
func (Ternary) WeightBits() int { return 2 }

// Specs is the float weight.
func (Ternary) Specs(w shapes.Shape) []nn.Spec { return nn.Plain{}.Specs(w) }

// ternaryThreshold is Δ as a share of mean|w|.
const ternaryThreshold = .7

// Value moves the weight to the levels.
func (Ternary) Value(c *nn.Ctx) *graph.Node {
	w := c.P("w")
	dims := w.Shape().Dimensions
	rows := graph.Reshape(w, dims[0], w.Shape().Size()/max(dims[0], 1))
	abs := graph.Abs(rows)
	limit := graph.MulScalar(graph.ReduceAndKeep(abs, graph.ReduceMean, 1), ternaryThreshold)
	kept := graph.ConvertDType(graph.GreaterThan(abs, limit), w.DType())
	count := graph.MaxScalar(graph.ReduceAndKeep(kept, graph.ReduceSum, 1), 1)
	alpha := graph.Div(graph.ReduceAndKeep(graph.Mul(abs, kept), graph.ReduceSum, 1), count)
	return StraightThrough(w, graph.Reshape(graph.Mul(graph.Mul(graph.Sign(rows), kept), alpha), dims...))
}

// Start is the weight.
func (Ternary) Start(s *Site) (map[string][]float32, error) {
	return map[string][]float32{"w": s.Weight}, nil
}

// Stored is the codes of the levels with a scale per output channel.
func (Ternary) Stored(l *Latents) (nn.Repr, map[string]*tensors.Tensor, error) {
	w, rows := l.Values["w"], l.Shape[0]
	per := len(w) / max(rows, 1)
	out := &TableWeights{Bits: 2, Shape: l.Shape, Codes: make([]uint8, len(w)), Tables: [][]float32{{0, 1, -1}}, Scale: make([]float32, rows)}
	for o := range rows {
		row := w[o*per : (o+1)*per]
		sum := 0.
		for _, v := range row {
			sum += math.Abs(float64(v))
		}
		limit, kept, count := ternaryThreshold*sum/float64(max(per, 1)), 0., 0
		for i, v := range row {
			if a := math.Abs(float64(v)); a > limit {
				kept += a
				count++
				if out.Codes[o*per+i] = 1; v < 0 {
					out.Codes[o*per+i] = 2
				}
			}
		}
		out.Scale[o] = float32(kept / float64(max(count, 1)))
	}
	return out.Store()
}

package quant

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"slices"

	"github.com/gomlx/compute"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/nn"
)

// DualClipOptions are the knobs of DualClip. The zero value is the default.
type DualClipOptions struct {
	Steps int     // of Adam; 0: 200
	Batch int     // tokens per step; 0: 256
	LR    float64 // of Adam; 0: 0.05
	Start float64 // initial a and c; 0: 4, at which σ keeps 0.982 of the range. Below 2 the start clips too much to recover
	// Symmetric gives all channels the zero point 2^(b-1) and the scale max(|u|,|l|)/(2^(b-1)-1): nothing is left to
	// absorb in a bias, so that a norm without one (RMSNorm) stays as it is.
	Symmetric bool
	Seed      uint64 // of the order of the tokens
}

// DualClipTrace says what clipping has won.
type DualClipTrace struct {
	MinMax        float64   // loss of the channels' whole ranges
	Before, After float64   // loss over all tokens at the start and as kept: After <= Before
	Losses        []float64 // over all tokens, at the start and after each tenth of the steps
	Upper, Lower  []float64 // what is left of the channels' ranges above and below 0 (or above and below the middle): σ(a), σ(c)
}

// Ratio is the mean share of the range that is left.
func (t DualClipTrace) Ratio() float64 {
	sum := 0.
	for i := range t.Upper {
		sum += (t.Upper[i] + t.Lower[i]) / 2
	}
	return sum / float64(max(1, len(t.Upper)))
}

// DualClip learns where to clip each channel of a norm's output x [n, d] from above and below, for the linear layers w
// [out, d] that read it (several layers are stacked by rows): RepQuant's channel-wise grid (arXiv:2402.05628). With the
// channels' extremes as constants and one logit for each end,
//
//	u = σ(a)·max, l = σ(c)·min    (from the middle of the range, where a channel has one sign)
//	s = (u-l)/(2^b-1),  z = round(-l/s),  x_hat = (clip(round(x/s)+z, 0, 2^b-1) - z)·s
//	L(a, c) = mean(((x - x_hat) wᵀ)²)
//
// is lowered by Adam, with straight-through rounding and a clip whose gradient passes at both end codes. What counts is
// the output error: a channel that w hardly reads may be clipped hard. The a and c of least loss over all tokens, looked
// at after each tenth of the steps, are kept. A constant channel is left alone.
//
// w enters through wᵀw only, so a step costs O(Batch·d²) whatever the number of readers: half a second in all for 4,096 tokens of 384.
//
// Errors: ErrBits, ErrEmpty, ErrNotFinite, values that are no rows of d.
func DualClip(ctx context.Context, b compute.Backend, x, w []float32, d, bits int, o DualClipOptions) (Affine, DualClipTrace, error) {
	grid, trace := Affine{Bits: bits, Axis: 1}, DualClipTrace{}
	o.Steps, o.Batch, o.LR, o.Start = cmp.Or(o.Steps, 200), cmp.Or(o.Batch, 256), cmp.Or(o.LR, .05), cmp.Or(o.Start, 4)
	if err := checkBits(bits); err != nil {
		return grid, trace, err
	}
	switch {
	case o.Steps < 1 || o.Batch < 1 || !(o.LR > 0) || math.IsNaN(o.Start) || math.IsInf(o.LR+o.Start, 0):
		return grid, trace, fmt.Errorf("quant: dual clip: %d steps of %d tokens at rate %g from %g; steps, tokens and rate must be positive", o.Steps, o.Batch, o.LR, o.Start)
	case d < 1 || len(x)%d != 0 || len(w)%d != 0:
		return grid, trace, fmt.Errorf("quant: dual clip: %d activations and %d weights are no rows of %d", len(x), len(w), d)
	case len(x) == 0 || len(w) == 0:
		return grid, trace, fmt.Errorf("quant: dual clip: %w", ErrEmpty)
	}
	if err := checkFinite(x); err != nil {
		return grid, trace, fmt.Errorf("dual clip: activations: %w", err)
	}
	if err := checkFinite(w); err != nil {
		return grid, trace, fmt.Errorf("dual clip: weights: %w", err)
	}
	n := len(x) / d
	lo, hi := slices.Clone(x[:d]), slices.Clone(x[:d])
	for i, v := range x {
		lo[i%d], hi[i%d] = min(lo[i%d], v), max(hi[i%d], v)
	}
	var p nn.Params
	put := func(name string, role nn.Role, v []float32, dims ...int) {
		p.Put(&nn.Param{Name: name, Role: role, Value: tensors.FromFlatDataAndDimensions(v, dims...)})
	}
	put("a", nn.Gain, slices.Repeat([]float32{float32(o.Start)}, d), d)
	put("c", nn.Gain, slices.Repeat([]float32{float32(o.Start)}, d), d)
	put("max", nn.Constant, hi, d)
	put("min", nn.Constant, lo, d)
	put("gram", nn.Constant, outputGram(w, d), d, d)
	loss := func(env *nn.Env, batch []*graph.Node) *graph.Node {
		c := clip(env.Param("a"), env.Param("c"), env.Param("max"), env.Param("min"), bits, o.Symmetric)
		return outputLoss(graph.Sub(batch[0], c.quantise(batch[0], bits).hat), env.Param("gram"))
	}
	// What the whole of x says of a and c: the loss, the grid, and the shares that are kept.
	look, err := engine.NewExec(b, func(in []*graph.Node) []*graph.Node {
		c := clip(in[1], in[2], in[3], in[4], bits, o.Symmetric)
		return []*graph.Node{outputLoss(graph.Sub(in[0], c.quantise(in[0], bits).hat), in[5]), c.scale, c.zero, c.alpha, c.beta}
	})
	if err != nil {
		return grid, trace, err
	}
	defer look.Finalize()
	all := func(a, c []float32) (loss float64, out []*tensors.Tensor, err error) {
		for rows := range slices.Chunk(x, tokensAtOnce*d) {
			out, err = look.Call(tensors.FromFlatDataAndDimensions(rows, len(rows)/d, d), a, c, hi, lo, p.Get("gram").Value)
			if err != nil {
				return 0, nil, fmt.Errorf("quant: dual clip: %w", err)
			}
			loss += nn.Float64s(out[0])[0] * float64(len(rows)) / float64(len(x))
		}
		return loss, out, nil
	}
	whole, start := slices.Repeat([]float32{30}, d), p.Get("a").Data()
	if trace.MinMax, _, err = all(whole, whole); err != nil {
		return grid, trace, err
	}
	var best []*tensors.Tensor
	if trace.Before, best, err = all(start, start); err != nil {
		return grid, trace, err
	}
	trace.After, trace.Losses = trace.Before, []float64{trace.Before}
	t, err := learn.NewTrainer(b, &p, loss, learn.Options{LR: o.LR, Seed: o.Seed})
	if err != nil {
		return grid, trace, err
	}
	defer t.Finalize()
	order, err := data.NewBatcher(n, min(o.Batch, n), o.Seed)
	if err != nil {
		return grid, trace, err
	}
	every := max(1, o.Steps/10)
	_, err = t.Fit(ctx, learn.FitOptions{
		Steps: o.Steps,
		Batch: func(step int) ([]*tensors.Tensor, error) {
			idx := order.At(step)
			rows := make([]float32, 0, len(idx)*d)
			for _, i := range idx {
				rows = append(rows, x[i*d:(i+1)*d]...)
			}
			return []*tensors.Tensor{tensors.FromFlatDataAndDimensions(rows, len(idx), d)}, nil
		},
		After: []learn.Hook{func(_ *learn.Trainer, info learn.Info) error {
			if info.Step%every != 0 && info.Step != o.Steps {
				return nil
			}
			l, out, err := all(p.Get("a").Data(), p.Get("c").Data())
			if err != nil {
				return err
			}
			if trace.Losses = append(trace.Losses, l); l < trace.After {
				trace.After, best = l, out
			}
			return nil
		}},
	})
	if err != nil {
		return grid, trace, err
	}
	grid.Scale, grid.Zero = nn.Float64s(best[1]), nn.Float64s(best[2])
	trace.Upper, trace.Lower = nn.Float64s(best[3]), nn.Float64s(best[4])
	for i := range d {
		if lo[i] == hi[i] && !o.Symmetric { // a scale of 1e-8 would put the zero point out of all proportion to the others'
			grid.Scale[i], grid.Zero[i] = constant(lo[i], bits)
		}
	}
	return grid, trace, nil
}

// clipped is the grid of each channel, nodes [d].
type clipped struct {
	alpha, beta  *graph.Node // the shares of the range that are kept
	upper, lower *graph.Node
	scale, zero  *graph.Node
}

// clip makes the grids from the logits a, c and the extremes of the channels.
func clip(a, c, hi, lo *graph.Node, bits int, symmetric bool) clipped {
	var r clipped
	r.alpha, r.beta = graph.Sigmoid(a), graph.Sigmoid(c)
	twoSigned := graph.LogicalAnd(graph.IsPositive(hi), graph.IsNegative(lo))
	mid := graph.Where(twoSigned, graph.ZerosLike(hi), graph.MulScalar(graph.Add(hi, lo), .5))
	r.upper = graph.Add(mid, graph.Mul(r.alpha, graph.Sub(hi, mid)))
	r.lower = graph.Sub(mid, graph.Mul(r.beta, graph.Sub(mid, lo)))
	if symmetric {
		half := int(1) << (bits - 1)
		r.scale = graph.MaxScalar(graph.DivScalar(graph.Max(graph.Abs(r.upper), graph.Abs(r.lower)), float64(half-1)), smallestStep)
		r.zero = graph.AddScalar(graph.ZerosLike(r.scale), float64(half))
		return r
	}
	r.scale = graph.MaxScalar(graph.DivScalar(graph.Sub(r.upper, r.lower), float64(int(1)<<bits-1)), smallestStep)
	r.zero = RoundSTE(graph.Neg(graph.Div(r.lower, r.scale)))
	return r
}

// tokensAtOnce bounds what is quantised in one piece.
const tokensAtOnce = 8192

// smallestStep is the least scale of a channel.
const smallestStep = 1e-8

// quantisedRows are rows on the channels' grids.
type quantisedRows struct{ codes, hat *graph.Node }

// quantise moves x [n, d] to the grids, straight through.
func (r clipped) quantise(x *graph.Node, bits int) quantisedRows {
	scale, zero := graph.ExpandLeftToRank(r.scale, 2), graph.ExpandLeftToRank(r.zero, 2)
	top := graph.Scalar(x.Graph(), x.DType(), float64(int(1)<<bits-1))
	codes := ClipSTE(graph.Add(RoundSTE(graph.Div(x, scale)), zero), graph.ScalarZero(x.Graph(), x.DType()), top)
	return quantisedRows{codes, graph.Mul(graph.Sub(codes, zero), scale)}
}

// outputLoss is mean((e wᵀ)²) over n and out, for e [n, d] and gram = wᵀw/out.
func outputLoss(e, gram *graph.Node) *graph.Node {
	return graph.DivScalar(graph.ReduceAllSum(graph.Mul(graph.MatMul(e, gram), e)), float64(e.Shape().Dimensions[0]))
}

// outputGram is wᵀw/out of w [out, d], by which an error of a layer's input weighs in its output.
func outputGram(w []float32, d int) []float32 {
	s := secondMoment(w, d)
	g := make([]float32, d*d)
	for i := range d {
		for j := range d {
			g[i*d+j] = float32(s.At(i, j))
		}
	}
	return g
}

// OutputMSE is mean(((x - x_hat) wᵀ)²) over tokens and outputs: what a grid of the activations x [n, d] costs the linear
// layers w [out, d] that read them.
func (a Affine) OutputMSE(x, w []float32, d int) (float64, error) {
	if d < 1 || len(x) == 0 || len(w) == 0 || len(x)%d != 0 || len(w)%d != 0 {
		return 0, fmt.Errorf("quant: %d activations and %d weights are no rows of %d", len(x), len(w), d)
	}
	hat, err := a.FakeQuant(x, []int{len(x) / d, d})
	if err != nil {
		return 0, err
	}
	for i, v := range x {
		hat[i] = v - hat[i]
	}
	e, g := secondMoment(hat, d), secondMoment(w, d)
	sum := 0.
	for i := range d {
		for j := range d {
			sum += e.At(i, j) * g.At(i, j)
		}
	}
	return sum, nil
}

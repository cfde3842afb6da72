package quant

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/gomlx/compute"
	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/learn/optim"
	"github.com/lathe-ml/lathe/nn"
)

// ErrNoBatchNorm: the network keeps no statistics of what it was trained on.
var ErrNoBatchNorm = errors.New("the network has no batch norm with running statistics")

// Distill makes inputs for a network out of what its batch norms remember of the training set (Cai et al.,
// arXiv:2001.00281, eq. 4; reference code distill_data.py). Every image is moved until its own statistics over space, at
// the input of every batch norm i with running mean μᵢ and variance σᵢ², are those of the training set:
//
//	mᵢ[n,c] = mean_hw fᵢ,   dᵢ[n,c] = √(var_hw fᵢ + 1e-6)          (unbiased variance)
//	L(x) = l₀ + Σᵢ lᵢ,      lᵢ = 1/N Σ_n Σ_c (mᵢ[n,c] − μᵢ[c])² + (dᵢ[n,c] − √(σᵢ²[c] + 1e-6))²
//
// where l₀ is the same on the image itself, with mean InputMean and deviation InputStd. Values without space, and maps of
// one pixel, match means only. Adam moves the image; the rate falls to a tenth when L has not fallen for Patience steps.
// The network runs as at inference and is left alone.
//
// It costs a forward and a backward pass per image and step. Images are independent of each other, except that they share
// the rate and the end. Networks without batch norm (transformers, and files whose norms were folded into convolutions
// when they were written) have nothing to match: give real examples there.
//
// The zero value is the reference's: Adam from nearly zero noise, rate 0.5, 500 steps, inputs of mean 0 and deviation 1.
type Distill struct {
	Steps    int     // at most; 0: 500
	LR       float64 // of Adam; 0: half the greatest InputStd
	Patience int     // steps without a new least L (by 1e-4 of it) before the rate falls; 0: 100
	MinLR    float64 // 0: 1e-4
	// StopAt ends the run when L is at most that many times (batch norms + 1), as the reference's later variant does with 5;
	// 0: all steps are done.
	StopAt float64
	// InputMean and InputStd are the channels' mean and deviation over the training set as the network is fed with it: one
	// number for all channels or one for each; nil: 0 and 1, for inputs that were normalised. 0 and 0.5 suit pixels from
	// -1 to 1.
	InputMean, InputStd []float64
	// InputRange is the least and the greatest value that an input can have, such as -1 and 1: images are kept within it,
	// and ZeroQ quantises the input over it (not in the paper). nil: not known.
	InputRange []float64
	Batch      int // images that are in work at a time, which bounds the memory; 0: 8
	Seed       uint64
	// Progress, if not nil, is called after every step with L in front of it.
	Progress func(done, total int, loss float64)

	dtype dtypes.DType // float32 when invalid
}

// Distilled are synthetic inputs.
type Distilled struct {
	X     compress.Examples
	Trace []float64 // L at the start, and after each step
	Norms int       // batch norms whose statistics are matched
}

// statEps stands inside the roots of all deviations.
const statEps = 1e-6

// Run synthesises n inputs of the network. Errors: ErrNoBatchNorm; a network that does not take one tensor of floats; a
// running variance that is negative or NaN, naming its norm; a loss that is not finite.
func (d Distill) Run(ctx context.Context, b compute.Backend, net *nn.Network, n int) (*Distilled, error) {
	m, err := d.matcher(b, net, n)
	if err != nil {
		return nil, err
	}
	defer m.exec.Finalize()
	r, _, err := m.run(ctx, m.start(n))
	return r, err
}

// From moves given inputs instead of noise.
func (d Distill) From(ctx context.Context, b compute.Backend, net *nn.Network, x compress.Examples) (*Distilled, error) {
	if err := d.check(net, x); err != nil {
		return nil, err
	}
	m, err := d.matcher(b, net, x.Len())
	if err != nil {
		return nil, err
	}
	defer m.exec.Finalize()
	r, _, err := m.run(ctx, nn.Float64s(x[0]))
	return r, err
}

// Mismatch is L of given inputs: how far their statistics are from the network's.
func (d Distill) Mismatch(ctx context.Context, b compute.Backend, net *nn.Network, x compress.Examples) (float64, error) {
	d.Steps = -1
	r, err := d.From(ctx, b, net, x)
	if err != nil {
		return 0, err
	}
	return r.Trace[0], nil
}

func (d Distill) check(net *nn.Network, x compress.Examples) error {
	if d.dtype == dtypes.Float64 { // of tests
		return nil
	}
	return x.Check(net)
}

// matched is a value whose statistics are to be met.
type matched struct {
	value     string
	mean, std []float64 // by channel
	spatial   int       // values per case and channel
}

// matcher is a compiled step of the distillation.
type matcher struct {
	Distill
	exec   *engine.Exec
	params []*tensors.Tensor
	shape  shapes.Shape // of one chunk of the input
	axis   int          // of the input's channels
	target [2][]float64 // mean and deviation of the input's channels
	norms  int
	n      int
}

// matcher prepares a network: one executable takes an image chunk, the state of Adam, rate and step, and returns L, summed
// over the chunk's images, its gradient, and what comes after the step.
func (d Distill) matcher(b compute.Backend, net *nn.Network, n int) (*matcher, error) {
	if err := d.validate(net, n); err != nil {
		return nil, err
	}
	if d.dtype == dtypes.InvalidDType {
		d.dtype = dtypes.Float32
	}
	d.Steps, d.LR, d.Patience = cmp.Or(d.Steps, 500), cmp.Or(d.LR, .5*d.inputScale()), cmp.Or(d.Patience, 100)
	d.MinLR, d.Batch = cmp.Or(d.MinLR, 1e-4), min(cmp.Or(d.Batch, 8), n)
	m := &matcher{Distill: d, n: n}
	sh, err := net.Shapes(d.Batch)
	if err != nil {
		return nil, err
	}
	input := net.Inputs[0].Name
	m.shape = sh[input].Clone()
	m.shape.DType = d.dtype
	m.axis = channelAxis(net, input)
	if m.target, err = d.inputTarget(m.shape.Dimensions[m.axis]); err != nil {
		return nil, err
	}
	points, err := matchedValues(net, sh)
	if err != nil {
		return nil, err
	}
	m.norms = len(points)
	probe := net.Clone()
	probe.Outputs = nil
	for _, p := range points {
		probe.Outputs = append(probe.Outputs, p.value)
	}
	probe.Prune()
	var names []string
	for p := range probe.Params.All() {
		names = append(names, p.Name)
		m.params = append(m.params, p.Value)
	}
	m.exec, err = engine.NewExec(b, func(a []*graph.Node) []*graph.Node {
		x := a[0]
		env := &nn.Env{G: x.Graph(), DType: d.dtype, Param: func(name string) *graph.Node {
			if i := slices.Index(names, name); i >= 0 {
				return a[5+i]
			}
			panic(fmt.Errorf("parameter %q is missing", name))
		}}
		out := probe.Lower(env, map[string]*graph.Node{input: x})
		loss := m.mismatch(x, m.axis, m.target[0], m.target[1])
		for i, p := range points {
			loss = graph.Add(loss, m.mismatch(out[i], out[i].Rank()-1, p.mean, p.std))
		}
		grad := graph.MulScalar(graph.Gradient(loss, x)[0], 1/float64(n))
		next, slots := optim.AdamW{}.Apply(optim.Update{W: x, Grad: grad, Slots: a[1:3], LR: a[3], Step: a[4]})
		if r := d.InputRange; r != nil {
			next = graph.ClipScalar(next, r[0], r[1])
		}
		return append([]*graph.Node{loss, grad, next}, slots...)
	})
	if err != nil {
		return nil, err
	}
	m.exec.NoLimit()
	return m, nil
}

func (d Distill) validate(net *nn.Network, n int) error {
	switch {
	case n < 1:
		return fmt.Errorf("quant: distill: %d images; want at least 1", n)
	case !(d.LR >= 0) || !(d.MinLR >= 0) || !(d.StopAt >= 0) || d.Patience < 0 || d.Batch < 0:
		return fmt.Errorf("quant: distill: rate %g, least rate %g, stop at %g, patience %d, batch %d; want numbers of at least 0 (0: the default)", d.LR, d.MinLR, d.StopAt, d.Patience, d.Batch)
	case len(net.Inputs) != 1:
		return fmt.Errorf("quant: distill: the network has %d inputs; only networks of one image input can be distilled: give examples", len(net.Inputs))
	case !net.Inputs[0].Shape.DType.IsFloat() || net.Inputs[0].Shape.Rank() < 2:
		return fmt.Errorf("quant: distill: input %q is %s, which cannot be moved by gradients; want floats of rank 2 or more: give examples", net.Inputs[0].Name, net.Inputs[0].Shape)
	}
	if r := d.InputRange; r != nil && (len(r) != 2 || !(r[0] < r[1]) || math.IsInf(r[1]-r[0], 0)) {
		return fmt.Errorf("quant: distill: input range %v; want two finite numbers, the lower first", r)
	}
	for i, s := range append(slices.Clone(d.InputMean), d.InputStd...) {
		if math.IsNaN(s) || math.IsInf(s, 0) || i >= len(d.InputMean) && s < 0 {
			return fmt.Errorf("quant: distill: statistics of the input hold %g; want finite numbers, and deviations of at least 0", s)
		}
	}
	return nil
}

// inputScale is the greatest deviation of the input's channels.
func (d Distill) inputScale() float64 {
	if len(d.InputStd) == 0 {
		return 1
	}
	return slices.Max(d.InputStd)
}

// inputTarget is the mean and the deviation of each channel of the input.
func (d Distill) inputTarget(channels int) (target [2][]float64, err error) {
	for i, t := range [][]float64{d.InputMean, d.InputStd} {
		switch len(t) {
		case 0:
			target[i] = slices.Repeat([]float64{float64(i)}, channels)
		case 1:
			target[i] = slices.Repeat(t, channels)
		case channels:
			target[i] = t
		default:
			return target, fmt.Errorf("quant: distill: %d statistics of the input are given; want 1, or one for each of its %d channels", len(t), channels)
		}
	}
	return target, nil
}

// matchedValues finds the batch norms and what they remember, by edges.
func matchedValues(net *nn.Network, sh map[string]shapes.Shape) ([]matched, error) {
	var points []matched
	for _, x := range net.Nodes {
		op, ok := x.Op.(nn.BatchNorm)
		if !ok || op.Always {
			continue
		}
		s, known := sh[x.In[0]]
		mean, variance := net.Param(x, "mean"), net.Param(x, "var")
		if !known || mean == nil || variance == nil || s.Rank() < 2 {
			return nil, fmt.Errorf("quant: distill: batch norm %q: its input %q or its running statistics are missing", x.Name, x.In[0])
		}
		p := matched{value: x.In[0], mean: nn.Float64s(mean.Value), std: nn.Float64s(variance.Value), spatial: 1}
		for _, dim := range s.Dimensions[1 : s.Rank()-1] {
			p.spatial *= dim
		}
		for c, v := range p.std {
			if !(v >= 0) || math.IsInf(v, 0) || math.IsNaN(p.mean[c]) || math.IsInf(p.mean[c], 0) {
				return nil, fmt.Errorf("quant: distill: batch norm %q: channel %d has running mean %g and variance %g; want finite numbers, and a variance of at least 0", x.Name, c, p.mean[c], v)
			}
			p.std[c] = math.Sqrt(v + statEps)
		}
		points = append(points, p)
	}
	if len(points) == 0 {
		return nil, fmt.Errorf("quant: distill: %w, so there is nothing to match; give examples, or export the network before its batch norms are folded", ErrNoBatchNorm)
	}
	return points, nil
}

// channelAxis is the axis of an input's channels: 1 when all that reads it is a transposition that moves axis 1 to the
// end, as in networks that were read from ONNX, else the last.
func channelAxis(net *nn.Network, input string) int {
	var rank int
	for _, in := range net.Inputs {
		if in.Name == input {
			rank = in.Shape.Rank()
		}
	}
	readers, isOutput := net.Readers(input)
	for _, r := range readers {
		if t, ok := r.Op.(nn.Transpose); !ok || isOutput || len(t.Perm) != rank || t.Perm[rank-1] != 1 {
			return rank - 1
		}
	}
	if len(readers) == 0 {
		return rank - 1
	}
	return 1
}

// mismatch is Σ_n Σ_c (mean − μ)² + (deviation − σ)² of a value with one case per index of axis 0.
func (m *matcher) mismatch(f *graph.Node, axis int, mean, std []float64) *graph.Node {
	if axis != f.Rank()-1 { // channels to the end
		var perm []int
		for i := range f.Rank() {
			if i != axis {
				perm = append(perm, i)
			}
		}
		f = graph.TransposeAllAxes(f, append(perm, axis)...)
	}
	d := f.Shape().Dimensions
	n, c := d[0], d[len(d)-1]
	space := f.Shape().Size() / max(n*c, 1)
	f = graph.Reshape(f, n, space, c)
	of := func(v []float64) *graph.Node { return graph.Reshape(constant64(f.Graph(), v, f.DType()), 1, 1, c) }
	mu := graph.ReduceAndKeep(f, graph.ReduceMean, 1) // [n, 1, c]
	loss := graph.ReduceAllSum(graph.Square(graph.Sub(mu, of(mean))))
	if space < 2 {
		return loss
	}
	centred := graph.Sub(f, mu)
	variance := graph.MulScalar(graph.ReduceAndKeep(graph.Square(centred), graph.ReduceSum, 1), 1/float64(space-1))
	dev := graph.Sqrt(graph.AddScalar(variance, statEps))
	return graph.Add(loss, graph.ReduceAllSum(graph.Square(graph.Sub(dev, of(std)))))
}

func constant64(g *graph.Graph, v []float64, dtype dtypes.DType) *graph.Node {
	if dtype == dtypes.Float64 {
		return graph.Const(g, v)
	}
	return graph.Const(g, narrow(v))
}

// start is the reference's noise, (u − 127.5)/5418.75 with u drawn from 0 to 254, in units of the input's deviation
// around its mean.
func (m *matcher) start(n int) []float64 {
	per := m.shape.Size() / m.shape.Dimensions[0]
	inner := 1
	for _, dim := range m.shape.Dimensions[m.axis+1:] {
		inner *= dim
	}
	x := make([]float64, n*per)
	r := rng.New(m.Seed, "zeroq:distil")
	for i := range x {
		c := i / inner % len(m.target[0])
		x[i] = m.target[0][c] + m.target[1][c]*(float64(r.IntN(255))-127.5)/5418.75
	}
	return x
}

// tensor makes a tensor of the run's type.
func (m *matcher) tensor(v []float64, dims ...int) *tensors.Tensor {
	if m.dtype == dtypes.Float64 {
		return tensors.FromFlatDataAndDimensions(slices.Clone(v), dims...)
	}
	return tensors.FromFlatDataAndDimensions(narrow(v), dims...)
}

// chunk is some images with the state of Adam.
type chunk struct{ x, m, v *tensors.Tensor }

// portions cuts images into chunks at rest.
func (m *matcher) portions(x []float64) (chunks []*chunk) {
	per := len(x) / m.n
	for from := 0; from < m.n; from += m.Batch {
		to := min(from+m.Batch, m.n)
		dims := slices.Clone(m.shape.Dimensions)
		dims[0] = to - from
		zeros := make([]float64, (to-from)*per)
		chunks = append(chunks, &chunk{m.tensor(x[from*per:to*per], dims...), m.tensor(zeros, dims...), m.tensor(zeros, dims...)})
	}
	return chunks
}

// gradient is L and its gradient, where the images are.
func (m *matcher) gradient(x []float64) (loss float64, grad []float64, err error) {
	for _, c := range m.portions(x) {
		l, g, err := m.step(c, 0, 1)
		if err != nil {
			return 0, nil, err
		}
		loss += l / float64(m.n)
		grad = append(grad, nn.Float64s(g)...)
	}
	return loss, grad, nil
}

// run moves the images; they also come back in float64.
func (m *matcher) run(ctx context.Context, x []float64) (*Distilled, []float64, error) {
	chunks := m.portions(x)
	out := &Distilled{Norms: m.norms}
	rate := plateau{rate: m.LR, patience: m.Patience, least: m.MinLR}
	for step := 0; ; step++ {
		last := step >= m.Steps
		lr := rate.rate
		if last {
			lr = 0 // L of the result
		}
		loss := 0.
		for _, c := range chunks {
			if err := ctx.Err(); err != nil {
				return nil, nil, err
			}
			l, _, err := m.step(c, lr, step+1)
			if err != nil {
				return nil, nil, err
			}
			loss += l
		}
		loss /= float64(m.n)
		out.Trace = append(out.Trace, loss)
		if math.IsNaN(loss) || math.IsInf(loss, 0) {
			return nil, nil, fmt.Errorf("quant: distill: the mismatch is %g after %d steps; use a lower rate than %g", loss, step, m.LR)
		}
		if last {
			break
		}
		if m.Progress != nil {
			m.Progress(step+1, m.Steps, loss)
		}
		if m.StopAt > 0 && loss <= m.StopAt*float64(m.norms+1) {
			m.Steps = step + 1 // the step that was just done is the last
		}
		rate.after(loss)
	}
	x = nil
	for _, c := range chunks {
		x = append(x, nn.Float64s(c.x)...)
	}
	dims := slices.Clone(m.shape.Dimensions)
	dims[0] = m.n
	out.X = compress.Examples{tensors.FromFlatDataAndDimensions(narrow(x), dims...)}
	return out, x, nil
}

// step does one step of a chunk and returns L in front of it, summed over its images, and the gradient of L over all.
func (m *matcher) step(c *chunk, lr float64, step int) (loss float64, grad *tensors.Tensor, err error) {
	in := append([]*tensors.Tensor{c.x, c.m, c.v, m.tensor([]float64{lr}), m.tensor([]float64{float64(step)})}, m.params...)
	out, err := m.exec.Call(anys(in)...)
	if err != nil {
		return 0, nil, fmt.Errorf("quant: distill: %w", err)
	}
	c.x, c.m, c.v = out[2], out[3], out[4]
	return nn.Float64s(out[0])[0], out[1], nil
}

func anys(in []*tensors.Tensor) []any {
	out := make([]any, len(in))
	for i, t := range in {
		out[i] = t
	}
	return out
}

// plateau divides the rate by ten when the loss has not fallen for patience steps.
type plateau struct {
	rate, least   float64
	patience, bad int
	best          float64
	begun         bool
}

func (p *plateau) after(loss float64) {
	if !p.begun || loss < p.best*(1-1e-4) {
		p.best, p.bad, p.begun = loss, 0, true
		return
	}
	if p.bad++; p.bad > p.patience {
		p.rate, p.bad = max(p.rate/10, p.least), 0
	}
}

package quant

import (
	"context"
	"fmt"
	"math"

	"github.com/gomlx/compute"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/nn"
)

// Moments are the second moments of what a site reads, and of what its weight W leaves of the outputs that it should
// give. The site's squared output error depends on nothing else, however many cases there are: over n output positions
// (cases, tokens, pixels), with x the patch that a row of the weight meets there,
//
//	H = Σ x xᵀ,   R = Σ (y − b − W x) xᵀ,   ε = Σ ‖y − b − W x‖²,   Δ = Ŵ − W
//	Σ ‖Ŵ x + b − y‖² = tr(Δ H Δᵀ) − 2 tr(Δ Rᵀ) + ε,   gradient 2 (Δ H − R)
//
// So quantisers that learn a weight, its input being what it is, get the exact loss and gradient over all cases for
// O(out·in²) at every step. Those that change the input while they learn use a SiteFitter.
type Moments struct {
	Out, In   int       // rows and columns of the weight as a matrix
	Groups    int       // of input channels; the rows are divided among them in order
	Positions int       // n
	Weight    []float32 // W [Out, In]
	H         []float32 // [Groups, In, In]
	R         []float32 // [Out, In]
	Residual  float64   // ε
	Energy    float64   // Σ ‖y‖²
}

// momentsChunk is the most values of patches that are in memory at once.
const momentsChunk = 1 << 22

// SiteMoments sums up a site: op is its dense layer or convolution, w and bias (nil: none) its parameters, xq what it
// will read, y what it should give, both with the cases along axis 0. Errors: ErrEmpty, ErrNotFinite, shapes that do
// not fit.
func SiteMoments(ctx context.Context, b compute.Backend, op nn.Op, w, bias []float32, xq, y *tensors.Tensor) (*Moments, error) {
	xs, ys := xq.Shape(), y.Shape()
	if xs.Rank() == 0 || ys.Rank() == 0 || xs.Size() == 0 || ys.Size() == 0 {
		return nil, fmt.Errorf("quant: moments of inputs %s and outputs %s: %w", xs, ys, ErrEmpty)
	}
	cases, out := xs.Dimensions[0], ys.Dimensions[ys.Rank()-1]
	m := &Moments{Out: out, Groups: 1, Weight: w}
	conv, isConv := op.(nn.Conv)
	if isConv {
		m.Groups = max(conv.Groups, 1)
	} else if _, ok := op.(nn.Dense); !ok {
		return nil, fmt.Errorf("quant: moments of a %s; accepted: dense layers and convolutions", op.Kind())
	}
	if out == 0 || len(w) == 0 || len(w)%out != 0 || out%m.Groups != 0 || ys.Dimensions[0] != cases || bias != nil && len(bias) != out {
		return nil, fmt.Errorf("quant: inputs %s, outputs %s, %d weights and %d biases do not fit together", xs, ys, len(w), len(bias))
	}
	m.In = len(w) / out
	m.Positions = ys.Size() / out
	x, want := nn.Floats(xq), nn.Floats(y)
	for what, v := range map[string][]float32{"input": x, "output": want, "weight": w, "bias": bias} {
		if err := checkFinite(v); err != nil {
			return nil, fmt.Errorf("%s: %w", what, err)
		}
	}
	for _, v := range want {
		m.Energy += float64(v) * float64(v)
	}
	patches := max(1, m.Positions/cases*m.In*m.Groups) // values of a case
	chunks := max(1, min(cases, (cases*patches+momentsChunk-1)/momentsChunk))
	chunk := (cases + chunks - 1) / chunks
	e, err := engine.NewExec(b, func(in []*graph.Node) []*graph.Node {
		x, y, w := in[0], in[1], in[2]
		if isConv {
			x = conv.Patches(x)
		}
		n := y.Shape().Size() / out
		if x.Shape().Size() != n*m.In*m.Groups {
			panic(fmt.Errorf("inputs %s and outputs %s do not fit a weight of %d rows and %d columns in %d groups", xs, ys, out, m.In, m.Groups))
		}
		// [taps, groups, channels of a group] -> [groups, n, taps·channels]
		taps := 1
		if isConv {
			for _, k := range conv.Kernel {
				taps *= k
			}
		}
		x = graph.Reshape(graph.TransposeAllAxes(graph.Reshape(x, n, taps, m.Groups, m.In/taps), 2, 0, 1, 3), m.Groups, n, m.In)
		y = graph.TransposeAllAxes(graph.Reshape(y, n, m.Groups, out/m.Groups), 1, 0, 2) // [groups, n, rows]
		left := graph.Sub(y, graph.Dot(x, w).General([]int{2}, []int{0}, []int{2}, []int{0}))
		return []*graph.Node{
			graph.Dot(x, x).General([]int{1}, []int{0}, []int{1}, []int{0}),
			graph.Dot(left, x).General([]int{1}, []int{0}, []int{1}, []int{0}),
			graph.ReduceSum(graph.Mul(left, left), 1),
		}
	})
	if err != nil {
		return nil, err
	}
	defer e.Finalize()
	wt := tensors.FromFlatDataAndDimensions(w, m.Groups, out/m.Groups, m.In)
	h, r := make([]float64, m.Groups*m.In*m.In), make([]float64, len(w))
	perX, perY := len(x)/cases, len(want)/cases
	for from := 0; from < cases; from += chunk {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		n := min(chunk, cases-from)
		cx, cy := make([]float32, chunk*perX), make([]float32, chunk*perY) // what is left is 0 and adds nothing
		copy(cx, x[from*perX:(from+n)*perX])
		copy(cy, want[from*perY:(from+n)*perY])
		for i := range bias {
			for j := i; j < n*perY; j += out {
				cy[j] -= bias[i]
			}
		}
		dims := func(s []int) []int { return append([]int{chunk}, s[1:]...) }
		sums, err := e.Call(tensors.FromFlatDataAndDimensions(cx, dims(xs.Dimensions)...), tensors.FromFlatDataAndDimensions(cy, dims(ys.Dimensions)...), wt)
		if err != nil {
			return nil, fmt.Errorf("quant: moments: %w", err)
		}
		add(h, sums[0])
		add(r, sums[1])
		for _, v := range nn.Floats(sums[2]) {
			m.Residual += float64(v)
		}
	}
	m.H, m.R = narrow(h), narrow(r)
	return m, nil
}

// siteMoments is SiteMoments of a node of a network.
func siteMoments(ctx context.Context, b compute.Backend, net *nn.Network, n *nn.Node, s *Site, xq, y *tensors.Tensor) (*Moments, error) {
	var bias []float32
	if p := net.Param(n, "b"); p != nil {
		bias = p.Data()
	}
	return SiteMoments(ctx, b, n.Op, s.Weight, bias, xq, y)
}

func add(sum []float64, t *tensors.Tensor) {
	for i, v := range nn.Floats(t) {
		sum[i] += float64(v)
	}
}

// Silent says whether nothing flows into the site, so that no weight is better than another.
func (m *Moments) Silent() bool {
	for i := range m.Groups * m.In {
		if m.H[i*m.In+i%m.In] != 0 {
			return false
		}
	}
	return true
}

// mean is the factor that makes a sum over positions and outputs a mean.
func (m *Moments) mean() float64 { return 1 / (float64(m.Positions) * float64(m.Out)) }

// Relative is a mean squared error as a share of the mean square of the wanted outputs; 0 when both are 0.
func (m *Moments) Relative(loss float64) float64 {
	if loss == 0 {
		return 0
	}
	return loss / (m.Energy * m.mean())
}

// Descent evaluates candidate weights of a site.
type Descent struct {
	m       *Moments
	exec    *engine.Exec
	h, w, r *tensors.Tensor
}

// Descend prepares the evaluation on a backend; Close frees it.
func (m *Moments) Descend(b compute.Backend) (*Descent, error) {
	e, err := engine.NewExec(b, func(in []*graph.Node) []*graph.Node {
		delta := graph.Sub(in[0], in[1])
		return []*graph.Node{graph.Sub(graph.Dot(delta, in[2]).General([]int{2}, []int{0}, []int{1}, []int{0}), in[3])}
	})
	if err != nil {
		return nil, err
	}
	rows := m.Out / m.Groups
	return &Descent{
		m: m, exec: e, h: tensors.FromFlatDataAndDimensions(m.H, m.Groups, m.In, m.In),
		w: tensors.FromFlatDataAndDimensions(m.Weight, m.Groups, rows, m.In), r: tensors.FromFlatDataAndDimensions(m.R, m.Groups, rows, m.In),
	}, nil
}

// Close frees what was compiled.
func (d *Descent) Close() { d.exec.Finalize() }

// At returns the mean squared error of the outputs with weight w [Out, In], and its gradient with respect to w.
func (d *Descent) At(w []float32) (loss float64, gradient []float32, err error) {
	m := d.m
	out, err := d.exec.Call(tensors.FromFlatDataAndDimensions(w, m.Groups, m.Out/m.Groups, m.In), d.w, d.h, d.r)
	if err != nil {
		return 0, nil, fmt.Errorf("quant: descent: %w", err)
	}
	gradient = nn.Floats(out[0]) // ΔH − R
	sum := m.Residual
	scale := float32(2 * m.mean())
	for i, g := range gradient {
		sum += (float64(w[i]) - float64(m.Weight[i])) * (float64(g) - float64(m.R[i]))
		gradient[i] = g * scale
	}
	if loss = max(0, sum) * m.mean(); !finite(loss) {
		return loss, nil, fmt.Errorf("quant: descent: the loss is %g: %w", loss, ErrNotFinite)
	}
	return loss, gradient, nil
}

// Loss is At without a backend and a gradient, in float64: O(Out·In²).
func (m *Moments) Loss(w []float32) float64 {
	sum, rows := m.Residual, m.Out/m.Groups
	delta := make([]float64, m.In)
	for o := range m.Out {
		row := o * m.In
		for j := range delta {
			delta[j] = float64(w[row+j]) - float64(m.Weight[row+j])
		}
		h := m.H[o/rows*m.In*m.In:]
		for j, d := range delta {
			if d == 0 {
				continue
			}
			dot := -2 * float64(m.R[row+j])
			for k, v := range h[j*m.In : (j+1)*m.In] {
				dot += float64(v) * delta[k]
			}
			sum += d * dot
		}
	}
	return max(0, sum) * m.mean()
}

// adam is one tensor under Adam (0.9, 0.999; Kingma, Ba, arXiv:1412.6980) on the host. Width is how many coordinates
// share a second moment, the sum of their squares: 1 is Adam.
type adam struct {
	width  int
	eps    float64
	steps  int
	m, v   []float64
	c1, c2 float64 // corrections of the current step
}

func newAdam(n, width int, eps float64) *adam {
	return &adam{width: width, eps: eps, m: make([]float64, n), v: make([]float64, n/width)}
}

// next begins a step.
func (a *adam) next() {
	a.steps++
	a.c1, a.c2 = 1-math.Pow(.9, float64(a.steps)), 1-math.Pow(.999, float64(a.steps))
}

// move changes x, the coordinates of group i (Width of them), against their gradients g.
func (a *adam) move(i int, x, g []float64, rate float64) {
	squares := 0.
	for _, v := range g {
		squares += v * v
	}
	a.v[i] = .999*a.v[i] + .001*squares
	if a.v[i] == 0 {
		return
	}
	step := rate / (a.c1 * (math.Sqrt(a.v[i]/a.c2) + a.eps))
	m := a.m[i*a.width : (i+1)*a.width]
	for k, v := range g {
		m[k] = .9*m[k] + .1*v
		x[k] -= step * m[k]
	}
}

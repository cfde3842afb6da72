package learn

import (
	"fmt"
	"math"
	"slices"

	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"
	"gonum.org/v1/gonum/stat/distuv"

	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/nn"
)

// Mixup trains on convex combinations of examples and of their labels: x̃ = Σ_j w_j x[π_j], ỹ = Σ_j w_j y[π_j], with
// weights from a symmetric Dirichlet law and random permutations π_j of the batch, π_0 the identity. With Size 2 it is
// Mixup (Zhang et al., arXiv:1710.09412), with more d-Mixup, d = Size−1 (Chidambaram and Ge, arXiv:2306.00740), with 1
// plain training. Inference is a plain forward pass.
//
//	tr, err := learn.NewTrainer(b, &net.Params, learn.MixupClassifier(net), learn.Options{})
//	mix, err := learn.Mixup{}.Draw(r, batch) // at every step
//	tr.Step(append([]*tensors.Tensor{x, labels}, mix.Tensors()...)...)
type Mixup struct {
	Size  int     // examples in a combination, m = d+1; 0: 2, 1: no mixing
	Alpha float64 // of the Dirichlet law, above 0: small values keep close to one example; 0: 1, uniform weights
	// PerSample draws weights for every row of the batch. By default one set of weights serves the whole batch, as in the
	// paper, which makes training noisy when batches are small.
	PerSample bool
}

// defaults fills zero fields in and refuses what is out of range.
func (m Mixup) defaults() (Mixup, error) {
	if m.Size == 0 {
		m.Size = 2
	}
	if m.Alpha == 0 {
		m.Alpha = 1
	}
	if m.Size < 1 || m.Size > 1<<10 {
		return m, fmt.Errorf("learn: mixup of %d examples; want 1 (plain training) to 1024, 2 is usual", m.Size)
	}
	if !(m.Alpha > 0) || math.IsInf(m.Alpha, 0) {
		return m, fmt.Errorf("learn: mixup with the Dirichlet parameter %g; want a number above 0, 1 is usual", m.Alpha)
	}
	return m, nil
}

// Mix is one draw of a Mixup for a batch of B examples.
type Mix struct {
	Size, Batch int
	PerSample   bool
	Weights     []float32 // [Size], or [B, Size] with PerSample; each set sums to 1
	Perms       []int32   // [Size, B]
}

// Draw samples weights and permutations for a batch.
func (m Mixup) Draw(r *rng.Rand, batch int) (Mix, error) {
	m, err := m.defaults()
	if err != nil {
		return Mix{}, err
	}
	if batch < 1 {
		return Mix{}, fmt.Errorf("learn: mixup of a batch of %d examples; want at least 1", batch)
	}
	x := Mix{Size: m.Size, Batch: batch, PerSample: m.PerSample, Perms: make([]int32, 0, m.Size*batch)}
	for j := range m.Size {
		p := make([]int32, batch)
		for i := range p {
			p[i] = int32(i)
		}
		if j > 0 {
			r.Shuffle(batch, func(a, b int) { p[a], p[b] = p[b], p[a] })
		}
		x.Perms = append(x.Perms, p...)
	}
	sets := 1
	if m.PerSample {
		sets = batch
	}
	for range sets {
		x.Weights = append(x.Weights, dirichlet(r, m.Size, m.Alpha)...)
	}
	return x, nil
}

// dirichlet draws from the symmetric Dirichlet law: Gamma(α) draws over their sum. They are kept as logarithms, with
// Gamma(α) = Gamma(α+1)·U^(1/α), so that a small α does not make all of them 0.
func dirichlet(r *rng.Rand, m int, alpha float64) []float32 {
	w := make([]float32, m)
	if m == 1 {
		w[0] = 1
		return w
	}
	logs := make([]float64, m)
	g := distuv.Gamma{Alpha: alpha + 1, Beta: 1, Src: r}
	top := math.Inf(-1)
	for j := range logs {
		logs[j] = math.Log(g.Rand()) + math.Log(1-r.Float64())/alpha
		top = max(top, logs[j])
	}
	sum := 0.
	for j := range logs {
		logs[j] = math.Exp(logs[j] - top)
		sum += logs[j]
	}
	for j := range w {
		w[j] = float32(logs[j] / sum)
	}
	return w
}

// Validate reports weights that are no convex combination, and rows of Perms that are no permutation.
func (x Mix) Validate() error {
	sets := 1
	if x.PerSample {
		sets = x.Batch
	}
	if x.Size < 1 || x.Batch < 1 || len(x.Weights) != sets*x.Size || len(x.Perms) != x.Size*x.Batch {
		return fmt.Errorf("learn: a mix of %d examples in a batch of %d with %d weights and %d indices; want %d and %d", x.Size, x.Batch, len(x.Weights), len(x.Perms), sets*x.Size, x.Size*x.Batch)
	}
	for s := range sets {
		sum := 0.
		for j, w := range x.Weights[s*x.Size : (s+1)*x.Size] {
			if !(w >= 0) {
				return fmt.Errorf("learn: weight %g of example %d in a mix; want at least 0", w, j)
			}
			sum += float64(w)
		}
		if !(math.Abs(sum-1) < 1e-4) {
			return fmt.Errorf("learn: the weights of a mix sum to %g; want 1", sum)
		}
	}
	seen := make([]int, x.Batch)
	for j := range x.Size {
		for _, i := range x.Perms[j*x.Batch : (j+1)*x.Batch] {
			if i < 0 || int(i) >= x.Batch || seen[i] != j {
				return fmt.Errorf("learn: row %d of a mix is no permutation of 0 to %d: %d is outside or there twice", j, x.Batch-1, i)
			}
			seen[i]++
		}
	}
	return nil
}

// Tensors are the weights, [Size] or [B, Size] float32, and the permutations, [Size, B] int32: what MixupClassifier wants
// after the inputs and labels.
func (x Mix) Tensors() []*tensors.Tensor {
	shape := []int{x.Size}
	if x.PerSample {
		shape = []int{x.Batch, x.Size}
	}
	return []*tensors.Tensor{
		tensors.FromFlatDataAndDimensions(x.Weights, shape...),
		tensors.FromFlatDataAndDimensions(x.Perms, x.Size, x.Batch),
	}
}

// DMixup mixes a batch: x [B, ...] and the distributions target [B, classes] (one-hot or smoothed labels), both of floating
// point, by weights [m] or [B, m] and integer perms [m, B] whose rows are permutations (Mix.Validate checks them on the
// host). It returns the mixed x and target in their own types; the soft-label cross-entropy of the two, SoftCrossEntropy,
// is the loss Σ_j w_j · mean_i CE(g(x̃_i), y[π_j(i)]).
func DMixup(x, target, weights, perms *graph.Node) (mixed, soft *graph.Node) {
	return combine(x, weights, perms), combine(target, weights, perms)
}

// combine is Σ_j w_j v[π_j] over the first axis of v.
func combine(v, weights, perms *graph.Node) (sum *graph.Node) {
	if v.Rank() == 0 || !v.DType().IsFloat() {
		panic(fmt.Errorf("learn: mixup of %s; want floating point [B, ...]", v.Shape()))
	}
	batch := v.Shape().Dim(0)
	if perms.Rank() != 2 || !perms.DType().IsInt() || perms.Shape().Dim(1) != batch {
		panic(fmt.Errorf("learn: mixup permutations are %s; want integers [m, %d]", perms.Shape(), batch))
	}
	m, rows := perms.Shape().Dim(0), 1
	switch dims := weights.Shape().Dimensions; {
	case slices.Equal(dims, []int{m}):
	case slices.Equal(dims, []int{batch, m}):
		rows = batch
	default:
		panic(fmt.Errorf("learn: mixup weights are %s; want [%d] or [%d, %d]", weights.Shape(), m, batch, m))
	}
	weights = graph.ConvertDType(graph.Reshape(weights, rows, m), v.DType())
	broad := make([]int, v.Rank()) // [rows, 1, ...]
	for a := range broad {
		broad[a] = 1
	}
	broad[0] = rows
	for j := range m {
		w := graph.Reshape(graph.Slice(weights, graph.AxisRange(), graph.AxisElem(j)), broad...)
		at := graph.Reshape(graph.Slice(perms, graph.AxisElem(j)), batch, 1)
		term := graph.Mul(graph.Gather(v, at), w)
		if sum == nil {
			sum = term
		} else {
			sum = graph.Add(sum, term)
		}
	}
	return sum
}

// MixupClassifier is the loss of a network of one input and one output of logits on batches (inputs, integer labels,
// weights, perms), the last two of Mix.Tensors: the soft-label cross-entropy on the mixed batch. On batches of inputs and
// labels alone, as in evaluation, it is Classifier.
func MixupClassifier(n *nn.Network) LossFunc {
	plain := Classifier(n)
	return func(env *nn.Env, batch []*graph.Node) *graph.Node {
		if len(batch) == 2 {
			return plain(env, batch)
		}
		if len(batch) != 4 {
			panic(fmt.Errorf("learn: a mixup batch has %d tensors; want inputs, labels, weights, perms", len(batch)))
		}
		x := combine(batch[0], batch[2], batch[3])
		logits := n.Lower(env, map[string]*graph.Node{n.Inputs[0].Name: x})[0]
		onehot := graph.OneHot(batch[1], logits.Shape().Dim(-1), logits.DType())
		return SoftCrossEntropy(logits, combine(onehot, batch[2], batch[3]))
	}
}

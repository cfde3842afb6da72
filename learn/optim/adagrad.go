package optim

import (
	"cmp"
	"errors"

	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
)

// AdaGrad divides every element's step by the root of its summed squared gradients (Duchi, Hazan, Singer, JMLR 2011):
//
//	v = v + g²,  w = w − lr·g/(√v + Eps)
//
// The rate of an element falls by itself, about as 1/√step, so a constant LR is usual; 0.05 is a good first try. It costs
// one tensor of state. Prefer AdamW where the gradients' scale changes along the training: AdaGrad never forgets.
type AdaGrad struct {
	Eps      float64 // outside the root; 0: 1e-10
	Init     float64 // v before the first step, at least 0; 0: none
	Momentum float64 // μ of m = μ·m + (1−μ)·g, which then takes the place of g above; 0: none
	Decay    float64 // weight decay per unit of learning rate, decoupled as in AdamW; 0: none
}

var _ Optimizer = AdaGrad{}

// Name returns "adagrad".
func (AdaGrad) Name() string { return "adagrad" }

// Slots are v, without Init, and the momentum, if there is any.
func (a AdaGrad) Slots() int { return adaptiveSlots(a.Momentum) }

// WeightDecay is Decay.
func (a AdaGrad) WeightDecay() float64 { return a.Decay }

// Apply does one step.
func (a AdaGrad) Apply(u Update) (*graph.Node, []*graph.Node) {
	v := graph.Add(u.Slots[0], graph.Mul(u.Grad, u.Grad))
	return adaptiveStep(u, v, v, a.Init, a.Eps, a.Momentum)
}

// AdaGradNorm is AdaGrad with one rate for all parameters together (Ward, Wu, Bottou, arXiv:1806.01811, alg. 1):
//
//	v = v + ‖g‖²,  w = w − lr·g/(√v + Eps)
//
// where ‖g‖ is the joint norm of all gradients. It keeps the direction of plain gradient descent and finds its rate by
// itself, so the learning rate hardly needs tuning; 1 is a good first try. Its state is one number, which every parameter
// keeps a copy of. RowWise is the variant that the reference implementation of arXiv:2402.11215 runs.
type AdaGradNorm struct {
	Eps      float64 // outside the root; 0: 1e-10
	Init     float64 // v before the first step, at least 0; 0: 1e-2
	Momentum float64 // μ of m = μ·m + (1−μ)·g, which then takes the place of g in the second equation; 0: none
	Decay    float64 // weight decay per unit of learning rate, decoupled as in AdamW; 0: none
	// RowWise keeps one v per output row of a matrix and per output channel of a 4-D kernel, v_r = v_r + ‖g_r‖², and one
	// per element of all other tensors.
	RowWise bool
}

var (
	_ SlotShaper = AdaGradNorm{}
	_ Joint      = AdaGradNorm{}
)

// Name returns "adagradnorm", or "adagradnorm-rows" for the row-wise variant.
func (a AdaGradNorm) Name() string {
	if a.RowWise {
		return "adagradnorm-rows"
	}
	return "adagradnorm"
}

// Slots are v, without Init, and the momentum, if there is any.
func (a AdaGradNorm) Slots() int { return adaptiveSlots(a.Momentum) }

// WeightDecay is Decay.
func (a AdaGradNorm) WeightDecay() float64 { return a.Decay }

// NeedsJointNorm is true unless RowWise is set.
func (a AdaGradNorm) NeedsJointNorm() bool { return !a.RowWise }

// SlotShape is a scalar for v; with RowWise [out] for matrices and 4-D kernels and the parameter's own shape otherwise,
// which the momentum has too.
func (a AdaGradNorm) SlotShape(slot int, w shapes.Shape) shapes.Shape {
	switch {
	case slot > 0 || a.RowWise && !hasRows(w):
		return w
	case a.RowWise:
		return shapes.Make(w.DType, w.Dimensions[0])
	}
	return shapes.Make(w.DType)
}

func hasRows(w shapes.Shape) bool { return w.Rank() == 2 || w.Rank() == 4 }

// Apply does one step.
func (a AdaGradNorm) Apply(u Update) (*graph.Node, []*graph.Node) {
	init := cmp.Or(a.Init, 1e-2)
	switch {
	case !a.RowWise && u.NormSq == nil:
		panic(errors.New("optim: adagradnorm: Update.NormSq is missing; fill it in, as for every Joint optimiser"))
	case !a.RowWise:
		v := graph.Add(u.Slots[0], u.NormSq)
		return adaptiveStep(u, v, v, init, a.Eps, a.Momentum)
	case !hasRows(u.W.Shape()):
		v := graph.Add(u.Slots[0], graph.Mul(u.Grad, u.Grad))
		return adaptiveStep(u, v, v, init, a.Eps, a.Momentum)
	}
	axes := []int{1, 2, 3}[:u.W.Rank()-1]
	v := graph.Add(u.Slots[0], graph.ReduceSum(graph.Mul(u.Grad, u.Grad), axes...)) // [out]
	rows := []int{u.W.Shape().Dimensions[0], 1, 1, 1}[:u.W.Rank()]
	return adaptiveStep(u, v, graph.Reshape(v, rows...), init, a.Eps, a.Momentum)
}

func adaptiveSlots(momentum float64) int {
	if momentum == 0 {
		return 1
	}
	return 2
}

// adaptiveStep is what the AdaGrad family has in common: v is the next state, of any shape, and wide the same with axes
// that broadcast against the parameter. The state is kept without init, so that it starts at zero as all state does.
func adaptiveStep(u Update, v, wide *graph.Node, init, eps, momentum float64) (*graph.Node, []*graph.Node) {
	slots, d := []*graph.Node{v}, u.Grad
	if momentum != 0 {
		d = graph.Add(graph.MulScalar(u.Slots[1], momentum), graph.MulScalar(u.Grad, 1-momentum))
		slots = append(slots, d)
	}
	if init != 0 {
		wide = graph.AddScalar(wide, init)
	}
	d = graph.Div(d, graph.AddScalar(graph.Sqrt(wide), cmp.Or(eps, 1e-10)))
	if u.Decay != 0 {
		d = graph.Add(d, graph.MulScalar(u.W, u.Decay))
	}
	return graph.Sub(u.W, graph.Mul(d, u.LR)), slots
}

// Package optim holds optimisers and learning-rate schedules. An optimiser is a plain struct whose zero value is the
// usual default; it adds one parameter's update to a graph, so that learn can feed rates, masks and factors.
package optim

import (
	"cmp"
	"fmt"
	"strings"

	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
)

// Update is what an optimiser sees of one parameter.
type Update struct {
	W, Grad *graph.Node
	Slots   []*graph.Node // the optimiser's state for this parameter, shaped like W or as SlotShaper says
	LR      *graph.Node   // scalar, with the parameter's own factor applied
	Step    *graph.Node   // scalar, 1 for the first step
	Decay   float64       // weight decay after the parameter's own factor; 0 for exempt parameters
	NormSq  *graph.Node   // scalar, the squared L2 norm of all parameters' gradients together; nil unless a Joint asks for it
}

// Optimizer updates parameters from gradients.
type Optimizer interface {
	Name() string
	Slots() int // tensors of state per parameter
	// Apply returns the next value of the parameter and of its slots.
	Apply(u Update) (w *graph.Node, slots []*graph.Node)
	// WeightDecay is the coefficient before per-parameter factors.
	WeightDecay() float64
}

// SlotShaper is an Optimizer whose state is not shaped like the parameter. All state starts at zero.
type SlotShaper interface {
	Optimizer
	SlotShape(slot int, w shapes.Shape) shapes.Shape
}

// Joint is an Optimizer that may need to know all gradients before it updates one parameter: it gets Update.NormSq.
type Joint interface {
	Optimizer
	NeedsJointNorm() bool
}

// AdamW is Adam with decoupled weight decay (Kingma, Ba, arXiv:1412.6980, alg. 1; Loshchilov, Hutter, arXiv:1711.05101,
// alg. 2). Eps stands outside the root.
type AdamW struct {
	Beta1 float64 // weight of the old first moment; 0: 0.9
	Beta2 float64 // weight of the old second moment; 0: 0.999
	Eps   float64 // 0: 1e-8
	Decay float64 // per unit of learning rate; 0: none
}

// Name returns "adamw".
func (AdamW) Name() string { return "adamw" }

// Slots are the two moments.
func (AdamW) Slots() int { return 2 }

// WeightDecay is Decay.
func (a AdamW) WeightDecay() float64 { return a.Decay }

// Apply does one step with bias correction.
func (a AdamW) Apply(u Update) (*graph.Node, []*graph.Node) {
	b1, b2, eps := cmp.Or(a.Beta1, .9), cmp.Or(a.Beta2, .999), cmp.Or(a.Eps, 1e-8)
	m := graph.Add(graph.MulScalar(u.Slots[0], b1), graph.MulScalar(u.Grad, 1-b1))
	v := graph.Add(graph.MulScalar(u.Slots[1], b2), graph.MulScalar(graph.Mul(u.Grad, u.Grad), 1-b2))
	g := u.W.Graph()
	c1 := graph.OneMinus(graph.Pow(graph.Scalar(g, u.W.DType(), b1), u.Step))
	c2 := graph.OneMinus(graph.Pow(graph.Scalar(g, u.W.DType(), b2), u.Step))
	d := graph.Div(graph.Div(m, c1), graph.AddScalar(graph.Sqrt(graph.Div(v, c2)), eps))
	if u.Decay != 0 {
		d = graph.Add(d, graph.MulScalar(u.W, u.Decay))
	}
	return graph.Sub(u.W, graph.Mul(d, u.LR)), []*graph.Node{m, v}
}

// SGD is stochastic gradient descent with momentum as PyTorch has it: v = Momentum·v + g, w = w − lr·v.
type SGD struct {
	Momentum  float64 // 0: none
	Nesterov  bool    // w = w − lr·(g + Momentum·v)
	Decay     float64 // 0: none
	Decoupled bool    // decay w by lr·Decay instead of adding Decay·w to the gradient
}

// Name returns "sgd".
func (SGD) Name() string { return "sgd" }

// Slots is the velocity, if there is momentum.
func (s SGD) Slots() int {
	if s.Momentum == 0 {
		return 0
	}
	return 1
}

// WeightDecay is Decay.
func (s SGD) WeightDecay() float64 { return s.Decay }

// Apply does one step.
func (s SGD) Apply(u Update) (*graph.Node, []*graph.Node) {
	d := u.Grad
	if u.Decay != 0 && !s.Decoupled {
		d = graph.Add(d, graph.MulScalar(u.W, u.Decay))
	}
	var slots []*graph.Node
	if s.Momentum != 0 {
		v := graph.Add(graph.MulScalar(u.Slots[0], s.Momentum), d)
		slots = []*graph.Node{v}
		if s.Nesterov {
			d = graph.Add(d, graph.MulScalar(v, s.Momentum))
		} else {
			d = v
		}
	}
	if u.Decay != 0 && s.Decoupled {
		d = graph.Add(d, graph.MulScalar(u.W, u.Decay))
	}
	return graph.Sub(u.W, graph.Mul(d, u.LR)), slots
}

// optimizers are the ones that ByName knows.
var optimizers = map[string]func(decay float64) Optimizer{
	"adamw":    func(d float64) Optimizer { return AdamW{Decay: d} },
	"adam":     func(d float64) Optimizer { return AdamW{Decay: d} },
	"sgd":      func(d float64) Optimizer { return SGD{Momentum: .9, Decay: d} },
	"nesterov": func(d float64) Optimizer { return SGD{Momentum: .9, Nesterov: true, Decay: d} },

	"adagrad":     func(d float64) Optimizer { return AdaGrad{Decay: d} },
	"adagradnorm": func(d float64) Optimizer { return AdaGradNorm{Decay: d} },
}

// ByName returns an optimiser with its usual settings: adamw (adam is the same without decay), sgd (momentum 0.9),
// nesterov, adagrad or adagradnorm.
func ByName(name string, decay float64) (Optimizer, error) {
	if f := optimizers[name]; f != nil {
		return f(decay), nil
	}
	return nil, fmt.Errorf("optim: there is no optimiser %q; use one of %s", name, strings.Join(Names(), ", "))
}

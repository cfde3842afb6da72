package onnx

import (
	"cmp"
	"math"

	"github.com/lathe-ml/lathe/nn"
)

// fusedCRMS is ~CRMSNorm: one input, normalised over one axis.
type fusedCRMS struct {
	eps  float64
	axis int
}

// exportCRMSNorm writes x/√((Σx² + (Σx)²)/(d'+1) + eps) in plain operators.
func exportCRMSNorm(e *Emitter, n *nn.Node) error {
	d := n.Op.(nn.CRMSNorm)
	s := e.Shape(n.In[0])
	x, last := e.In(n, 0), []int{(cmp.Or(d.Axis, -1) + s.Rank()) % s.Rank()}
	sum := e.reduceNode("ReduceSum", n.Name+"/sum", x, last, true)
	squares := e.reduceNode("ReduceSum", n.Name+"/squares", e.Node("Mul", n.Name+"/square", []string{x, x}), last, true)
	all := e.Node("Add", n.Name+"/all", []string{squares, e.Node("Mul", n.Name+"/left_out", []string{sum, sum})})
	mean := e.Node("Mul", n.Name+"/mean", []string{all, e.Scalar(1 / float64(s.Dimensions[last[0]]+1))})
	root := e.Node("Sqrt", n.Name+"/root", []string{e.Node("Add", n.Name+"/shifted", []string{mean, e.Scalar(d.Epsilon())})})
	e.Out(n, nil, "Div", []string{x, root})
	return nil
}

// crms recognises what exportCRMSNorm writes.
func (f *fuser) crms(n *node) bool {
	if n.op != "Div" {
		return false
	}
	root := f.prod(n.in[1], "Sqrt")
	if root == nil {
		return false
	}
	x := n.in[0]
	shape := f.g.values[x].shape
	mean, eps, ok := f.sumWith(root.in[0])
	if !ok || eps < 0 || len(shape) < 2 {
		return false
	}
	c, all := f.scaled(mean)
	sum := f.prod(all, "Add")
	if sum == nil {
		return false
	}
	over := func(name string) (x string, axis int) { // the value that is summed over an axis
		if s := f.prod(name, "ReduceSum"); s != nil {
			axes, _, err := f.g.reduceAxes(s, len(f.g.values[s.in[0]].shape))
			if err == nil && len(axes) == 1 {
				return s.in[0], axes[0]
			}
		}
		return "", 0
	}
	for i := range 2 {
		squares, axis := over(sum.in[i])
		left, other := over(f.squareOf(sum.in[1-i]))
		if squares == "" || f.squareOf(squares) != x || left != x || axis != other || axis == 0 || !f.keepsAxes(mean, x, []int{axis}) {
			continue
		}
		if d := shape[axis]; d.static() && math.Abs(c*float64(d.c+1)-1) < 1e-5 {
			return f.become(n, "~CRMSNorm", fusedCRMS{eps, axis}, x)
		}
	}
	return false
}

func buildCRMSNorm(r *builder, n *node) error {
	p, x := n.fused.(fusedCRMS), n.in[0]
	layout := r.layoutOf(x)
	op := nn.CRMSNorm{Eps: p.eps, Axis: position(layout, p.axis, r.rank(x))}
	if op.Eps == 0 {
		op.Eps = 1e-30 // 0 stands for the default
	}
	if op.Axis == r.rank(x)-1 {
		op.Axis = 0
	}
	r.put(n.out[0], layout, op, r.in(x, layout))
	return nil
}

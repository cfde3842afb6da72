package onnx

import (
	"math"

	"github.com/lathe-ml/lathe/nn"
)

// fusedCRMS is ~CRMSNorm: one input, normalised over its last axis.
type fusedCRMS struct{ eps float64 }

// exportCRMSNorm writes x/√((Σx² + (Σx)²)/(d'+1) + eps) in plain operators.
func exportCRMSNorm(e *Emitter, n *nn.Node) error {
	d := n.Op.(nn.CRMSNorm)
	s := e.Shape(n.In[0])
	x, last := e.In(n, 0), []int{s.Rank() - 1}
	sum := e.reduceNode("ReduceSum", n.Name+"/sum", x, last, true)
	squares := e.reduceNode("ReduceSum", n.Name+"/squares", e.Node("Mul", n.Name+"/square", []string{x, x}), last, true)
	all := e.Node("Add", n.Name+"/all", []string{squares, e.Node("Mul", n.Name+"/left_out", []string{sum, sum})})
	mean := e.Node("Mul", n.Name+"/mean", []string{all, e.Scalar(1 / float64(s.Dimensions[s.Rank()-1]+1))})
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
	if !ok || eps < 0 || len(shape) < 2 || !shape[len(shape)-1].static() || !f.keepsAxes(mean, x, []int{len(shape) - 1}) {
		return false
	}
	c, all := f.scaled(mean)
	sum := f.prod(all, "Add")
	if sum == nil || !(math.Abs(c*float64(shape[len(shape)-1].c+1)-1) < 1e-5) {
		return false
	}
	over := func(name string) string { // the value whose last axis is summed
		s := f.prod(name, "ReduceSum")
		if s == nil {
			return ""
		}
		axes, _, err := f.g.reduceAxes(s, len(f.g.values[s.in[0]].shape))
		if err != nil || len(axes) != 1 || axes[0] != len(shape)-1 {
			return ""
		}
		return s.in[0]
	}
	for i := range 2 {
		squares, left := over(sum.in[i]), f.squareOf(sum.in[1-i])
		if squares != "" && left != "" && f.squareOf(squares) == x && over(left) == x {
			return f.become(n, "~CRMSNorm", fusedCRMS{eps}, x)
		}
	}
	return false
}

func buildCRMSNorm(r *builder, n *node) error {
	eps := n.fused.(fusedCRMS).eps
	if eps == 0 {
		eps = 1e-30 // 0 stands for the default
	}
	r.put(n.out[0], nil, nn.CRMSNorm{Eps: eps}, r.natural(n.in[0]))
	return nil
}

package fold

import (
	"github.com/lathe-ml/lathe/nn"
)

// LastAxis turns the input of every layer norm and RMS norm over one axis in front of the last, so that the norm stands
// over the last one, as dense layers read it: networks read from ONNX hold the tokens of a convolution's patches as
// [batch, width, tokens]. Readers that turn the norm's output get the turned one, which for most of them is what they
// want; the others get it turned back. The function stays as it is. It returns the names of the norms that were
// changed; the values of these are laid out differently from then on.
func LastAxis(n *nn.Network) (changed []string, err error) {
	sh, err := n.Shapes(0)
	if err != nil {
		return nil, err
	}
	for _, x := range append([]*nn.Node{}, n.Nodes...) {
		var axes []int
		switch op := x.Op.(type) {
		case nn.LayerNorm:
			axes = op.Axes
		case nn.RMSNorm:
			axes = op.Axes
		}
		if len(axes) != 1 {
			continue
		}
		rank := sh[x.In[0]].Rank()
		axis := (axes[0] + rank) % rank
		if axis == rank-1 {
			continue
		}
		perm, back := make([]int, 0, rank), make([]int, rank)
		for a := range rank {
			if a != axis {
				perm = append(perm, a)
			}
		}
		perm = append(perm, axis)
		for i, a := range perm {
			back[a] = i
		}
		value := x.Out[0]
		readers, isOut := n.Readers(value)
		if _, err := n.InsertBefore(x.Name, 0, fresh(n, x.Name+".turned"), nn.Transpose{Perm: perm}); err != nil {
			return changed, err
		}
		switch op := x.Op.(type) {
		case nn.LayerNorm:
			op.Axes = nil
			x.Op = op
		case nn.RMSNorm:
			op.Axes = nil
			x.Op = op
		}
		changed = append(changed, x.Name)
		restored := ""
		restore := func() string { // value laid out as it was
			if restored == "" {
				restored = fresh(n, x.Name+".natural")
				y := &nn.Node{Name: restored, Op: nn.Transpose{Perm: back}, In: []string{value}, Out: []string{restored}, P: map[string]string{}}
				for i, z := range n.Nodes {
					if z == x {
						n.Nodes = append(n.Nodes[:i+1:i+1], append([]*nn.Node{y}, n.Nodes[i+1:]...)...)
						break
					}
				}
			}
			return restored
		}
		for _, r := range readers {
			if t, ok := r.Op.(nn.Transpose); ok && len(t.Perm) == rank {
				both, same := make([]int, rank), true
				for i, a := range t.Perm {
					both[i] = back[a]
					same = same && both[i] == i
				}
				r.Op = nn.Transpose{Perm: both}
				if _, isOut := n.Readers(r.Out[0]); same && !isOut {
					n.ReplaceUses(r.Out[0], value)
					n.Remove(r.Name)
				}
				continue
			}
			for i, v := range r.In {
				if v == value {
					r.In[i] = restore()
				}
			}
		}
		if isOut {
			for i, o := range n.Outputs {
				if o == value {
					n.Outputs[i] = restore()
				}
			}
		}
	}
	if len(changed) == 0 {
		return nil, nil
	}
	return changed, n.Check()
}

// fresh makes a node name that is not taken.
func fresh(n *nn.Network, base string) string {
	name := base
	for n.Node(name) != nil || n.Producer(name) != nil {
		name += "'"
	}
	return name
}

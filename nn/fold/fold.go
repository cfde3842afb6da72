// Package fold rewrites a network so that it computes the same function with fewer or plainer operations. It follows
// edges, never the order of creation, and works in float64.
package fold

import (
	"fmt"

	"github.com/lathe-ml/lathe/nn"
)

// BatchNorm merges every nn.BatchNorm into the convolution or dense layer in front of it:
//
//	W' = W·g/√(var+eps),  b' = (b − mean)·g/√(var+eps) + bias
//
// A norm is left alone when its producer is no such layer, stores its weight other than plainly, shares it, or has
// another reader. The layer keeps its node name, so that what was said of it by name still holds, and its value takes the
// name of the norm's, so that taps that mention it go on working. It returns the names of the norms that were folded.
func BatchNorm(n *nn.Network) (folded []string, err error) {
	for _, bn := range append([]*nn.Node{}, n.Nodes...) {
		op, ok := bn.Op.(nn.BatchNorm)
		if !ok || op.Always {
			continue
		}
		prod := soleProducer(n, bn)
		if prod == nil {
			continue
		}
		scale, shift, err := affineOf(n, bn, op)
		if err != nil {
			return folded, err
		}
		if err := intoProducer(n, bn, prod, scale, shift); err != nil {
			return folded, err
		}
		name, layer := bn.Name, prod.Name
		bn.In = bn.In[:1] // a mask matters while training only
		if err := n.Bypass(name); err != nil {
			return folded, err
		}
		prod.Name = layer
		folded = append(folded, name)
	}
	return folded, nil
}

func dataOr(p *nn.Param, size int, fill float32) []float32 {
	if p != nil {
		return p.Data()
	}
	d := make([]float32, size)
	for i := range d {
		d[i] = fill
	}
	return d
}

// NormAffine moves the gain and bias of every layer norm and RMS norm into all of its readers, where all are plain dense
// layers; what remains is a norm with gain 1 and bias 0. A norm that also feeds anything else, a residual for
// example, is left alone. It returns the names of the norms that were changed.
func NormAffine(n *nn.Network) (folded []string, err error) {
	for _, ln := range n.Nodes {
		switch op := ln.Op.(type) {
		case nn.LayerNorm:
			if len(op.Axes) > 0 {
				continue
			}
		case nn.RMSNorm:
			if len(op.Axes) > 0 {
				continue
			}
		default:
			continue
		}
		gp, bp := n.Param(ln, "w"), n.Param(ln, "b")
		readers, isOut := n.Readers(ln.Out[0])
		if isOut || len(readers) == 0 || (gp == nil && bp == nil) || !allPlainDense(n, readers) {
			continue
		}
		size := 0
		if gp != nil {
			size = gp.Value.Shape().Size()
		} else {
			size = bp.Value.Shape().Size()
		}
		if err := IntoReaders(n, readers, dataOr(gp, size, 1), dataOr(bp, size, 0)); err != nil {
			return folded, err
		}
		if gp != nil {
			n.SetParam(ln, "w", nn.Gain, dataOr(nil, size, 1), size)
		}
		if bp != nil {
			n.SetParam(ln, "b", nn.Bias, dataOr(nil, size, 0), size)
		}
		folded = append(folded, ln.Name)
	}
	return folded, nil
}

func allPlainDense(n *nn.Network, nodes []*nn.Node) bool {
	for _, r := range nodes {
		if _, ok := r.Op.(nn.Dense); !ok || !nn.IsPlain(r.Op) || n.SharedParam(r, "w") {
			return false
		}
	}
	return true
}

// IntoReaders folds a scale and a shift of the input channels into dense layers: reader(scale·x + shift) becomes
// reader'(x) with W' = W·diag(scale), b' = b + W·shift. A missing bias is created.
func IntoReaders[F float32 | float64](n *nn.Network, readers []*nn.Node, scale, shift []F) error {
	for _, r := range readers {
		d, ok := r.Op.(nn.Dense)
		if !ok || !nn.IsPlain(d) {
			return fmt.Errorf("fold: node %q (%s) is not a plain dense layer", r.Name, r.Op.Kind())
		}
		p := n.Param(r, "w")
		w := p.Data()
		if len(scale) == 0 || len(w)%len(scale) != 0 || len(w)/len(scale) != d.Out || len(shift) != len(scale) {
			return fmt.Errorf("fold: %d scales and %d shifts do not fit weight %s of %q", len(scale), len(shift), p.Value.Shape(), r.Name)
		}
		bias := dataOr(n.Param(r, "b"), d.Out, 0)
		for o := range bias {
			s := float64(bias[o])
			row := w[o*len(scale) : (o+1)*len(scale)]
			for i := range row {
				s += float64(row[i]) * float64(shift[i])
				row[i] = float32(float64(row[i]) * float64(scale[i]))
			}
			bias[o] = float32(s)
		}
		n.SetParam(r, "w", nn.Weight, w, p.Value.Shape().Dimensions...)
		n.SetParam(r, "b", nn.Bias, bias, len(bias))
		d.NoBias = false
		r.Op = d
	}
	return nil
}

// Package fold rewrites a network so that it computes the same function with fewer or plainer operations. It follows
// edges, never the order of creation, and works in float64.
package fold

import (
	"fmt"
	"math"

	"github.com/lathe-ml/lathe/nn"
)

// BatchNorm merges every nn.BatchNorm into the convolution or dense layer in front of it:
//
//	W' = W·g/√(var+eps),  b' = (b − mean)·g/√(var+eps) + bias
//
// A norm is left alone when its producer is no such layer, stores its weight other than plainly, shares it, or has
// another reader. The layer takes the norm's value name, so taps that mention it go on working. It returns the names
// of the norms that were folded.
func BatchNorm(n *nn.Network) (folded []string, err error) {
	for _, bn := range append([]*nn.Node{}, n.Nodes...) {
		op, ok := bn.Op.(nn.BatchNorm)
		if !ok || op.Always {
			continue
		}
		prod := n.Producer(bn.In[0])
		if prod == nil || !nn.IsPlain(prod.Op) || n.SharedParam(prod, "w") {
			continue
		}
		readers, isOut := n.Readers(bn.In[0])
		if len(readers) != 1 || isOut {
			continue
		}
		switch d := prod.Op.(type) {
		case nn.Conv:
			d.NoBias = false
			err = mergeScale(n, bn, op, prod)
			prod.Op = d
		case nn.Dense:
			d.NoBias = false
			err = mergeScale(n, bn, op, prod)
			prod.Op = d
		default:
			continue
		}
		if err != nil {
			return folded, err
		}
		name := bn.Name
		if err := n.Bypass(name); err != nil {
			return folded, err
		}
		folded = append(folded, name)
	}
	return folded, nil
}

func mergeScale(n *nn.Network, bn *nn.Node, op nn.BatchNorm, prod *nn.Node) error {
	mean, variance := n.Param(bn, "mean").Data(), n.Param(bn, "var").Data()
	gain, shift := dataOr(n.Param(bn, "w"), len(mean), 1), dataOr(n.Param(bn, "b"), len(mean), 0)
	p := n.Param(prod, "w")
	w, bias := p.Data(), dataOr(n.Param(prod, "b"), len(mean), 0)
	if len(w)%len(mean) != 0 {
		return fmt.Errorf("fold: norm %q has %d channels, weight of %q is %s", bn.Name, len(mean), prod.Name, p.Value.Shape())
	}
	per := len(w) / len(mean)
	for o := range mean {
		s := float64(gain[o]) / math.Sqrt(float64(variance[o])+op.Epsilon())
		for i := o * per; i < (o+1)*per; i++ {
			w[i] = float32(float64(w[i]) * s)
		}
		bias[o] = float32((float64(bias[o])-float64(mean[o]))*s + float64(shift[o]))
	}
	n.SetParam(prod, "w", nn.Weight, w, p.Value.Shape().Dimensions...)
	n.SetParam(prod, "b", nn.Bias, bias, len(bias))
	return nil
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
// reader'(x) with
// W' = W·diag(scale), b' = b + W·shift. A missing bias is created.
func IntoReaders(n *nn.Network, readers []*nn.Node, scale, shift []float32) error {
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

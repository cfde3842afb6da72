package quant

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/nn"
)

// What a variant of RepQ-ViT's walk that fits weights to outputs needs beside it: norms that are folded before they run,
// copies of norms that something else reads, and sites with what flows into them.

// sequential says whether norms are folded as the walk comes to them.
func (w *repqWalk) sequential() bool { return w.inOrder && w.Norms == Reparameterized }

// channelGrid fits the grids of a norm's channels to its output.
func (w *repqWalk) channelGrid(ctx context.Context, norm *nn.Node, x *tensors.Tensor, bits int) (Affine, error) {
	values, shape := w.padding.drop(x)
	d := shape[len(shape)-1]
	shape = []int{len(values) / d, d}
	if w.channels == nil {
		return CalibrateUniform(values, shape, 1, bits)
	}
	sh, err := w.net.Shapes(0)
	if err != nil {
		return Affine{}, err
	}
	dense, _ := absorbers(w.net, norm.Out[0], sh)
	readers, weightBits, err := w.linear(dense)
	if err != nil {
		return Affine{}, err
	}
	return w.channels(ctx, normChoice{norm: norm.Name, rows: values, readers: readers, bits: weightBits, folded: w.Norms == Reparameterized}, bits)
}

// foldFirst folds a norm's grid into it and its readers before it runs.
func (w *repqWalk) foldFirst(ctx context.Context, norm *nn.Node, value func(string) *tensors.Tensor) error {
	bits := 0
	for _, r := range w.t.norms[norm.Name] {
		if act := w.bitsOf(r).Act; w.isSite(r) && act != 32 {
			bits = max(bits, act)
		}
	}
	var grid Affine
	_, err := w.Journal.Do(w.name+"/norm/"+norm.Name, &grid, func() error {
		x, err := compress.RunNode(w.b, w.net, norm, value)
		if err != nil {
			return err
		}
		grid, err = w.channelGrid(ctx, norm, x, bits)
		return err
	})
	if err != nil {
		return err
	}
	w.channel[norm.Name] = normGrid{Affine: grid}
	if w.rows > 0 {
		x, err := compress.RunNode(w.b, w.net, norm, value)
		if err != nil {
			return err
		}
		w.channel[norm.Name] = normGrid{Affine: grid, rows: w.sample(x)}
	}
	return w.reparameterize(norm)
}

// fitSite lets the variant quantise a site's weight, and reports whether it did.
func (w *repqWalk) fitSite(ctx context.Context, n *nn.Node, s *Site, value func(string) *tensors.Tensor, pair func() (compress.Pair, error)) (bool, error) {
	var f fittedWeight
	done := true
	restored, err := w.Journal.Do(w.name+"/fit/"+n.Name, &f, func() error {
		xq := value(n.In[0])
		var err error
		if xq == nil { // its quantiser has not run yet
			if xq, err = compress.RunNode(w.b, w.net, w.net.Producer(n.In[0]), value); err != nil {
				return err
			}
		}
		p, err := pair()
		if err != nil {
			return err
		}
		fitted, err := w.fit(ctx, w, n, s, xq, p)
		if fitted != nil {
			f = *fitted
		}
		return err
	})
	if err != nil {
		return false, err
	}
	if done = f.Codes != nil; !done {
		return false, nil
	}
	w.weights[n.Name], w.grids[n.Name] = s, f.Grid
	r, params, err := f.Grid.StoreCodes(f.Codes, s.Shape)
	if err != nil {
		return false, err
	}
	hat, err := f.Grid.Decode(f.Codes, s.Shape)
	if err != nil {
		return false, err
	}
	w.werr[n.Name] = compress.RelativeError(s.Weight, hat)
	if err := install(w.net, n, r, params); err != nil {
		return false, err
	}
	if f.Bias != nil {
		bias := biasOf(w.net, n, len(f.Bias))
		for i, v := range f.Bias {
			bias[i] += v
		}
		setBias(w.net, n, bias)
	}
	w.Report(compress.Step{Site: n.Name, Done: len(w.grids), Total: w.total, Bytes: compress.WeightBytes(w.net, n), Err: f.Err, Restored: restored})
	return true, nil
}

// padding are the tokens of the calibration set that an encoder's mask hides: what stands there depends on nothing, comes
// in as many copies as there are short texts, and shall not count.
type padding struct {
	cases, tokens int
	valid         []bool // [cases, tokens]; nil: there is no mask
}

// findPadding looks for an input [batch, tokens] whose name ends in "mask", as that of BERT-like encoders does.
func findPadding(net *nn.Network, calib compress.Examples) padding {
	for i, in := range net.Inputs {
		s := calib[i].Shape()
		if !strings.HasSuffix(in.Name, "mask") || s.Rank() != 2 {
			continue
		}
		p := padding{cases: s.Dimensions[0], tokens: s.Dimensions[1], valid: make([]bool, s.Size())}
		hidden, seen := false, false
		for j, v := range nn.Floats(calib[i]) {
			p.valid[j] = v != 0
			hidden, seen = hidden || v == 0, seen || v != 0
		}
		if hidden && seen {
			return p
		}
	}
	return padding{}
}

// drop returns the values of a tensor [cases, tokens, width] without those of hidden tokens, as [valid tokens, width]; any
// other tensor as it is.
func (p padding) drop(t *tensors.Tensor) (x []float32, shape []int) {
	x, shape = nn.Floats(t), t.Shape().Dimensions
	if p.valid == nil || len(shape) != 3 || shape[0] != p.cases || shape[1] != p.tokens {
		return x, shape
	}
	width := len(x) / len(p.valid)
	kept := x[:0]
	for i, ok := range p.valid {
		if ok {
			kept = append(kept, x[i*width:(i+1)*width]...)
		}
	}
	return kept, []int{len(kept) / width, width}
}

// splitNorms gives the dense readers of every norm that something else reads, too (in a post-norm network, the residual
// stream), a copy of that norm. The copy feeds them alone and can take up their scale: the function stays the same, at the
// cost of one more norm.
func (w *repqWalk) splitNorms() error {
	t, err := findTransformer(w.net)
	if err != nil {
		return err
	}
	sh, err := w.net.Shapes(0)
	if err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(t.shared)) {
		norm := w.net.Node(name)
		alone := func(r *nn.Node) bool { // whether only selected dense layers are behind a reader
			behind := []*nn.Node{r}
			if !isQuantisable(r) {
				var others []string
				if behind, others = absorbers(w.net, r.Out[0], sh); len(others) > 0 {
					return false
				}
			}
			return len(behind) > 0 && !slices.ContainsFunc(behind, func(d *nn.Node) bool {
				_, dense := d.Op.(nn.Dense)
				return !dense || !nn.IsPlain(d.Op) || !w.Selected(d) || w.BitsOf(d.Name, compress.Bits{Weight: w.WeightBits, Act: w.ActBits}).Act == 32
			})
		}
		readers, _ := w.net.Readers(norm.Out[0])
		readers = slices.DeleteFunc(readers, func(r *nn.Node) bool { return !alone(r) })
		if len(readers) == 0 {
			continue
		}
		twin := freshName(w.net, name+".linear")
		y := &nn.Node{Name: twin, Op: norm.Op, In: slices.Clone(norm.In), Out: []string{twin}, P: map[string]string{}}
		at := slices.Index(w.net.Nodes, norm)
		w.net.Nodes = slices.Insert(w.net.Nodes, at+1, y)
		for local, role := range map[string]nn.Role{"w": nn.Gain, "b": nn.Bias} {
			if p := w.net.Param(norm, local); p != nil {
				w.net.SetParam(y, local, role, p.Data(), p.Value.Shape().Dimensions...)
			}
		}
		for _, r := range readers {
			for i, v := range r.In {
				if v == norm.Out[0] {
					r.In[i] = twin
				}
			}
		}
		w.splits = append(w.splits, name)
	}
	if len(w.splits) == 0 {
		return nil
	}
	return w.net.Check()
}

// splitNote says what splitNorms did.
func (w *repqWalk) splitNote() string {
	return fmt.Sprintf("%d norms feed something beside linear layers, as in post-norm networks; their linear layers read copies of them, which take the channels' scales up: %v", len(w.splits), w.splits)
}

package quant

import (
	"context"
	"errors"
	"fmt"

	"github.com/gomlx/compute"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/fold"
)

// MinMaxPTQ is plain post-training quantisation of any feed-forward network, the baseline of the cleverer methods.
// Batch norm is folded into the layers before it. Weights get symmetric grids, scale max|w|/(2^(b-1)-1), one per
// output channel or one per tensor; the inputs of dense layers, convolutions and products get one asymmetric grid each,
// whose range is that of the float network's values over all examples. Everything else stays in float.
//
// At 8 bits, one scale per channel nearly always keeps the accuracy; one per tensor can destroy networks whose channels
// differ in range, as folded depthwise convolutions do. Cost: one pass over the examples.
//
// The zero value is W8A8 per channel. Options.Select is asked for products, too.
type MinMaxPTQ struct {
	compress.Options

	WeightBits int  // 2 to 8; 0: 8
	ActBits    int  // 2 to 8, or 32: activations stay in float; 0: 8
	PerTensor  bool // one scale per weight tensor; false: per output channel
	Tables     bool // round embedding tables, too, with one scale per row; they have no activation
	Batch      int  // cases per pass; 0: compress.DefaultBatch
}

var _ compress.Method = MinMaxPTQ{}

// Compress returns a quantised copy of net. Errors: ErrBits; ErrEmpty; ErrNotFinite, naming the layer; a network
// without a dense layer or convolution.
func (q MinMaxPTQ) Compress(ctx context.Context, b compute.Backend, net *nn.Network, calib compress.Examples) (*compress.Result, error) {
	if q.WeightBits == 0 {
		q.WeightBits = 8
	}
	if q.ActBits == 0 {
		q.ActBits = 8
	}
	if err := errors.Join(checkBits(q.WeightBits), checkAct(q.ActBits), q.Check(net)); err != nil {
		return nil, err
	}
	if calib.Len() == 0 {
		return nil, fmt.Errorf("quant: min-max: %w", ErrEmpty)
	}
	if err := refuseQuantisedSites(net, q.Selected); err != nil {
		return nil, fmt.Errorf("quant: min-max: %w", err)
	}
	ref := net.Clone()
	folded, err := fold.BatchNorm(ref)
	if err != nil {
		return nil, err
	}
	out := ref.Clone()
	plan, err := q.plan(out)
	if err != nil {
		return nil, fmt.Errorf("quant: min-max: %w", err)
	}
	if err := q.quantiseInputs(ctx, b, ref, out, plan, calib); err != nil {
		return nil, fmt.Errorf("quant: min-max: %w", err)
	}
	werr := map[string]float64{}
	for i, n := range plan.sites {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if werr[n.Name], err = q.quantiseWeight(out, n); err != nil {
			return nil, fmt.Errorf("quant: min-max: %w", err)
		}
		q.Report(compress.Step{Site: n.Name, Done: i + 1, Total: len(plan.sites), Bytes: compress.WeightBytes(out, n), Err: werr[n.Name]})
	}
	if err := out.Check(); err != nil {
		return nil, err
	}
	batch := q.Batch
	if batch == 0 {
		batch = min(calib.Len(), compress.DefaultBatch)
	}
	report, err := describe(ctx, b, ref, out, calib, batch, werr, true)
	if err != nil {
		return nil, err
	}
	r := &compress.Result{Network: out, Reference: ref, Sites: report}
	if len(folded) > 0 {
		r.Notes = append(r.Notes, fmt.Sprintf("%d batch norms folded into the layers before them", len(folded)))
	}
	return r, nil
}

// minMaxPlan is what MinMaxPTQ quantises: weights, and values at some bits for the nodes that read them so.
type minMaxPlan struct {
	sites   []*nn.Node
	values  []minMaxValue
	readers map[minMaxValue][]minMaxRead
}

type minMaxValue struct {
	name string
	bits int
}

type minMaxRead struct {
	node  *nn.Node
	input int
}

// bitsOf checks the overrides of a site.
func (q MinMaxPTQ) bitsOf(name string) (compress.Bits, error) {
	b := q.BitsOf(name, compress.Bits{Weight: q.WeightBits, Act: q.ActBits})
	if err := errors.Join(checkBits(b.Weight), checkAct(b.Act)); err != nil {
		return b, fmt.Errorf("site %q: %w", name, err)
	}
	return b, nil
}

func (q MinMaxPTQ) plan(net *nn.Network) (*minMaxPlan, error) {
	p := &minMaxPlan{readers: map[minMaxValue][]minMaxRead{}}
	plain := 0
	add := func(n *nn.Node, input, bits int) {
		if bits == 32 {
			return
		}
		v := minMaxValue{n.In[input], bits}
		if p.readers[v] == nil {
			p.values = append(p.values, v)
		}
		p.readers[v] = append(p.readers[v], minMaxRead{n, input})
	}
	for _, n := range net.Nodes {
		site := isQuantisable(n) && nn.IsPlain(n.Op)
		if site {
			plain++
		}
		if !q.Selected(n) {
			continue
		}
		if _, table := n.Op.(nn.Embedding); table && q.Tables && nn.IsPlain(n.Op) && !net.SharedParam(n, "w") {
			if _, err := q.bitsOf(n.Name); err != nil {
				return nil, err
			}
			p.sites = append(p.sites, n)
		}
		if _, ok := n.Op.(nn.MatMul); ok {
			for i := range n.In {
				add(n, i, q.ActBits)
			}
		}
		if site {
			bits, err := q.bitsOf(n.Name)
			if err != nil {
				return nil, err
			}
			add(n, 0, bits.Act)
			p.sites = append(p.sites, n)
		}
	}
	switch {
	case plain == 0:
		return nil, errors.New("the network has no dense layer and no convolution with a plain weight")
	case len(p.sites)+len(p.values) == 0:
		return nil, fmt.Errorf("none of the network's %d dense layers and convolutions is selected", plain)
	}
	return p, nil
}

// quantiseInputs puts the activation quantisers in front of the planned nodes of net, with the ranges of the float network.
func (q MinMaxPTQ) quantiseInputs(ctx context.Context, b compute.Backend, ref, net *nn.Network, p *minMaxPlan, calib compress.Examples) error {
	var names []string
	index := map[string]int{}
	for _, v := range p.values {
		if _, ok := index[v.name]; !ok {
			index[v.name] = len(names)
			names = append(names, v.name)
		}
	}
	if len(names) == 0 {
		return nil
	}
	var ranges []compress.Range
	_, err := q.Journal.Do(fmt.Sprintf("min-max/ranges/%q", names), &ranges, func() (err error) {
		ranges, err = compress.Ranges(ctx, b, ref, calib, q.Batch, names...)
		return err
	})
	if err != nil {
		return err
	}
	for _, v := range p.values {
		r := ranges[index[v.name]]
		first := p.readers[v][0]
		if r.Lo-r.Lo != 0 || r.Hi-r.Hi != 0 {
			return fmt.Errorf("value %q, which node %q reads, ranges from %g to %g: %w", v.name, first.node.Name, r.Lo, r.Hi, ErrNotFinite)
		}
		s, z := RangeAffine(r.Lo, r.Hi, v.bits)
		node, err := insertQuantizer(net, first.node, first.input, nn.QuantizeDequantize{Bits: v.bits}, []float64{s}, []float64{z})
		if err != nil {
			return err
		}
		for _, r := range p.readers[v][1:] {
			r.node.In[r.input] = node.Out[0]
		}
	}
	return nil
}

// quantiseWeight stores a site's weight on its grid and returns the relative error.
func (q MinMaxPTQ) quantiseWeight(net *nn.Network, n *nn.Node) (float64, error) {
	bits, err := q.bitsOf(n.Name)
	if err != nil {
		return 0, err
	}
	s, err := siteOf(net, n)
	if err != nil {
		return 0, err
	}
	a, err := WeightGrid{Bits: bits.Weight, PerTensor: q.PerTensor, Symmetric: true}.Fit(s)
	if err != nil {
		return 0, err
	}
	return storeOnGrid(net, n, s, a)
}

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
// The zero value is W8A8 per channel.
type MinMaxPTQ struct {
	WeightBits int  // 2 to 8; 0: 8
	ActBits    int  // 2 to 8; 0: 8
	PerTensor  bool // one scale per weight tensor; false: per output channel
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
	for _, bits := range []int{q.WeightBits, q.ActBits} {
		if err := checkBits(bits); err != nil {
			return nil, err
		}
	}
	if calib.Len() == 0 {
		return nil, fmt.Errorf("quant: min-max: %w", ErrEmpty)
	}
	if err := refuseQuantised(net); err != nil {
		return nil, fmt.Errorf("quant: min-max: %w", err)
	}
	ref := net.Clone()
	folded, err := fold.BatchNorm(ref)
	if err != nil {
		return nil, err
	}
	out := ref.Clone()
	type read struct {
		node  *nn.Node
		input int
	}
	var values []string
	readers := map[string][]read{}
	add := func(n *nn.Node, input int) {
		v := n.In[input]
		if readers[v] == nil {
			values = append(values, v)
		}
		readers[v] = append(readers[v], read{n, input})
	}
	sites := 0
	for _, n := range out.Nodes {
		if _, ok := n.Op.(nn.MatMul); ok {
			for i := range n.In {
				add(n, i)
			}
		}
		if isQuantisable(n) && nn.IsPlain(n.Op) {
			add(n, 0)
			sites++
		}
	}
	if sites == 0 {
		return nil, errors.New("quant: min-max: the network has no dense layer and no convolution with a plain weight")
	}
	ranges, err := compress.Ranges(ctx, b, ref, calib, q.Batch, values...)
	if err != nil {
		return nil, fmt.Errorf("quant: min-max: %w", err)
	}
	for i, v := range values {
		lo, hi := ranges[i].Lo, ranges[i].Hi
		if lo-lo != 0 || hi-hi != 0 {
			return nil, fmt.Errorf("quant: min-max: value %q, which node %q reads, ranges from %g to %g: %w", v, readers[v][0].node.Name, lo, hi, ErrNotFinite)
		}
		s, z := RangeAffine(lo, hi, q.ActBits)
		first := readers[v][0]
		node, err := insertQuantizer(out, first.node, first.input, nn.QuantizeDequantize{Bits: q.ActBits}, []float64{s}, []float64{z})
		if err != nil {
			return nil, err
		}
		for _, r := range readers[v][1:] {
			r.node.In[r.input] = node.Out[0]
		}
	}
	werr := map[string]float64{}
	grid := WeightGrid{Bits: q.WeightBits, PerTensor: q.PerTensor, Symmetric: true}
	for _, n := range out.Sites() {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if !isQuantisable(n) || !nn.IsPlain(n.Op) {
			continue
		}
		s, err := siteOf(out, n)
		if err != nil {
			return nil, err
		}
		a, err := grid.Fit(s)
		if err != nil {
			return nil, fmt.Errorf("quant: min-max: %w", err)
		}
		r, params, err := a.Store(s.Weight, s.Shape)
		if err != nil {
			return nil, err
		}
		fq, err := a.FakeQuant(s.Weight, s.Shape)
		if err != nil {
			return nil, err
		}
		werr[n.Name] = compress.RelativeError(s.Weight, fq)
		if err := install(out, n, r, params); err != nil {
			return nil, err
		}
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

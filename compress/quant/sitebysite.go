package quant

import (
	"context"
	"errors"
	"fmt"

	"github.com/gomlx/compute"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/nn"
)

// walkSites visits the sites of net, a copy of ref, in execution order: with what each reads in the network compressed so
// far and what it should give, or, without examples, with neither.
func walkSites(ctx context.Context, b compute.Backend, ref, net *nn.Network, calib compress.Examples, examples bool, visit func(n *nn.Node, xq, y *tensors.Tensor) error) error {
	if examples {
		return compress.WalkPairs(ctx, b, ref, net, calib, func(p compress.Pair) error { return visit(p.Site, p.Xq, p.Y) })
	}
	for _, n := range net.Sites() {
		if err := errors.Join(ctx.Err(), visit(n, nil, nil)); err != nil {
			return err
		}
	}
	return nil
}

// resultOf checks and describes a compressed network; output errors are measured on the examples, if there are any.
func resultOf(ctx context.Context, b compute.Backend, ref, net *nn.Network, calib compress.Examples, weightErr map[string]float64, outputErr bool, folded, notes []string) (*compress.Result, error) {
	if err := net.Check(); err != nil {
		return nil, err
	}
	sites, err := describe(ctx, b, ref, net, calib, max(1, min(calib.Len(), compress.DefaultBatch)), weightErr, outputErr && calib.Len() > 0)
	if err != nil {
		return nil, err
	}
	if len(folded) > 0 {
		notes = append(notes, fmt.Sprintf("%d batch norms folded into the layers before them", len(folded)))
	}
	return &compress.Result{Network: net, Reference: ref, Sites: sites, Notes: notes}, nil
}

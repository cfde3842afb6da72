package quant

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/gomlx/compute"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/fold"
)

// JLCM stores weights as indices into codebooks of a few floats (Yvinec, Dapogny, Bailly, arXiv:2309.17361). Neurons of similar
// weight distributions share a codebook or a scale factor, so that several of them cost next to nothing; then codebooks
// and indices are learned together, site by site, against the float network's outputs, the inputs being those of the
// already compressed network. The gradient of an index prefers codewords nearby (MappingProximal).
//
// Use it to shrink weights to 2 or 3 bits where decoding through a table is fine and some examples exist: the arithmetic
// stays float, so it does not speed up integer hardware. With DataFree nothing is learned and no examples are needed.
// Neurons are reordered so that a group's are contiguous wherever their channels can be (fold.PermuteOutputs); where a
// residual sum, attention heads or an output of the network tie them, every row keeps its place and a number of its group.
//
// Batch norm is folded first. Dense layers and convolutions are compressed, activations never. Sites that are smaller than
// their codebook stay in float. Cost: as NUPES, and O(out·in·Near) per step for the mapping.
//
// The zero value learns 3-bit indices.
type JLCM struct {
	compress.Options

	WeightBits int          // of an index, 1 to 8; 0: 3
	Groups     int          // of neurons per site, at most 256 and as many as there are neurons; 0: GroupsFor
	Quantiles  int          // that describe a neuron; 0: 16
	Mode       CodebookMode // "": GroupCodebooks
	KeepOrder  bool         // leave the neurons where they are
	DataFree   bool         // codebooks by k-means only
	Learning   CodebookLearning

	// SkipSiteErrors leaves Result.Sites without output errors, which cost two more passes over the examples.
	SkipSiteErrors bool
	// Traces, if not nil, is told how each learned site went.
	Traces func(site string, m *Moments, tr CodebookTrace)
}

var _ compress.Method = JLCM{}

func (q JLCM) withDefaults() (JLCM, error) {
	q.WeightBits, q.Mode = cmp.Or(q.WeightBits, 3), cmp.Or(q.Mode, GroupCodebooks)
	switch {
	case q.Groups < 0 || q.Groups > 256:
		return q, fmt.Errorf("%d groups of neurons; accepted: 1 to 256, or 0 for what costs 1 %%", q.Groups)
	case q.Quantiles < 0:
		return q, fmt.Errorf("%d quantiles; accepted: a positive number, or 0 for 16", q.Quantiles)
	case q.Mode != GroupCodebooks && q.Mode != GroupScales:
		return q, fmt.Errorf("codebook mode %q; accepted: %s, %s", q.Mode, GroupCodebooks, GroupScales)
	}
	if err := q.checkSite(compress.Bits{Weight: q.WeightBits, Act: 32}); err != nil {
		return q, err
	}
	_, err := q.Learning.withDefaults(1, 2)
	return q, err
}

// checkSite reports bits that the method does not offer; 32 leaves a weight in float.
func (q JLCM) checkSite(b compress.Bits) error {
	switch {
	case b.Act != 32:
		return fmt.Errorf("%d bits of an activation: jlcm compresses weights only; give 32, or use nupes or minmax", b.Act)
	case b.Weight != 32 && (b.Weight < 1 || b.Weight > 8):
		return fmt.Errorf("%d bits: %w", b.Weight, ErrCodebookBits)
	}
	return nil
}

// codebookPiece is a finished site, as the journal keeps it.
type codebookPiece struct {
	Weights CodebookWeights
	Trace   CodebookTrace
	Silent  bool
}

// Compress returns a compressed copy of net. calib may be nil when nothing is learned. Result.Reference has its neurons in
// the same order as the compressed network. Errors: ErrCodebookBits; ErrEmpty; ErrNotFinite, naming the site; bits for an
// activation; a network without a dense layer or convolution that is selected, or whose selected sites are quantised
// already.
func (q JLCM) Compress(ctx context.Context, b compute.Backend, net *nn.Network, calib compress.Examples) (*compress.Result, error) {
	q, err := q.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("quant: jlcm: %w", err)
	}
	if err := errors.Join(q.Check(net), refuseQuantisedSites(net, q.Selected)); err != nil {
		return nil, fmt.Errorf("quant: jlcm: %w", err)
	}
	if !q.DataFree && calib.Len() == 0 {
		return nil, fmt.Errorf("quant: jlcm: %w; DataFree needs none", ErrEmpty)
	}
	ref := net.Clone()
	folded, err := fold.BatchNorm(ref)
	if err != nil {
		return nil, err
	}
	w := &codebookWalk{JLCM: q, b: b, plan: map[string]*codebookSite{}, werr: map[string]float64{}}
	if err := w.prepare(ref); err != nil {
		return nil, fmt.Errorf("quant: jlcm: %w", err)
	}
	w.net = ref.Clone()
	err = walkSites(ctx, b, ref, w.net, calib, !q.DataFree, func(n *nn.Node, xq, y *tensors.Tensor) error { return w.visit(ctx, n, xq, y) })
	if err != nil {
		return nil, fmt.Errorf("quant: jlcm: %w", err)
	}
	return resultOf(ctx, b, ref, w.net, calib, w.werr, !q.SkipSiteErrors, folded, w.notes)
}

// codebookSite is what is planned for a site.
type codebookSite struct {
	bits  int
	group []int // of each neuron, after reordering
}

// codebookWalk is the state of one compression.
type codebookWalk struct {
	JLCM
	b           compute.Backend
	net         *nn.Network
	plan        map[string]*codebookSite
	werr        map[string]float64
	notes       []string
	done, total int
}

// prepare groups the neurons of all sites, and reorders them in the float network where that can be done.
func (w *codebookWalk) prepare(ref *nn.Network) error {
	plain := 0
	var tied, small []string
	for _, n := range ref.Sites() {
		if !isQuantisable(n) || !nn.IsPlain(n.Op) {
			continue
		}
		if plain++; !w.Selected(n) {
			continue
		}
		bits := w.BitsOf(n.Name, compress.Bits{Weight: w.WeightBits, Act: 32})
		if err := w.checkSite(bits); err != nil {
			return fmt.Errorf("site %q: %w", n.Name, err)
		}
		if bits.Weight == 32 {
			continue
		}
		s, err := siteOf(ref, n)
		if err != nil {
			return err
		}
		rows, columns := s.Shape[0], len(s.Weight)/max(s.Shape[0], 1)
		if 16<<bits.Weight > rows*columns*bits.Weight {
			small = append(small, n.Name)
			continue
		}
		site := &codebookSite{bits: bits.Weight}
		w.plan[n.Name] = site
		w.total++
		groups := w.groups(n, rows, columns, bits.Weight)
		g, err := GroupNeurons(s.Weight, rows, groups, w.Quantiles)
		if err != nil {
			return fmt.Errorf("site %q: %w", n.Name, err)
		}
		g.DropEmpty()
		site.group = g.Group
		if w.KeepOrder || len(g.Counts) == 1 || slices.IsSorted(g.Group) {
			continue
		}
		switch err := fold.PermuteOutputs(ref, n.Name, g.Perm); {
		case errors.Is(err, fold.ErrTiedChannels):
			tied = append(tied, n.Name)
		case err != nil:
			return err
		default:
			slices.Sort(site.group)
		}
	}
	switch {
	case plain == 0:
		return errors.New("the network has no dense layer and no convolution with a plain weight")
	case w.total == 0 && len(small) == 0:
		return fmt.Errorf("none of the network's %d dense layers and convolutions is selected", plain)
	case w.total == 0:
		return fmt.Errorf("all selected layers are smaller than a codebook of 2^%d values (%s); use fewer bits", w.WeightBits, strings.Join(small, ", "))
	}
	if len(small) > 0 {
		w.notes = append(w.notes, fmt.Sprintf("left in float, being smaller than their codebooks: %v", small))
	}
	if len(tied) > 0 {
		w.notes = append(w.notes, fmt.Sprintf("neurons kept in their places, their channels being tied to others: %v", tied))
	}
	return nil
}

// groups is how many groups a site's neurons get: one where a neuron has too few weights to tell its distribution, as those
// of depthwise convolutions.
func (w *codebookWalk) groups(n *nn.Node, rows, columns, bits int) int {
	switch c, ok := n.Op.(nn.Conv); {
	case ok && c.Groups > 1 && columns < 32:
		return 1
	case w.Groups == 0:
		return GroupsFor(rows, columns, bits, w.Mode)
	}
	return min(w.Groups, rows)
}

// visit compresses a site's weight.
func (w *codebookWalk) visit(ctx context.Context, n *nn.Node, xq, y *tensors.Tensor) error {
	site := w.plan[n.Name]
	if site == nil {
		return nil
	}
	s, err := siteOf(w.net, n)
	if err != nil {
		return err
	}
	var piece codebookPiece
	restored, err := w.Journal.Do("jlcm/"+n.Name, &piece, func() error { return w.fit(ctx, &piece, site, n, s, xq, y) })
	if err != nil {
		return fmt.Errorf("site %q: %w", n.Name, err)
	}
	if piece.Silent {
		w.notes = append(w.notes, fmt.Sprintf("all inputs of %s are zero on the examples: its codebooks were not learned", n.Name))
	}
	t := piece.Weights.Table(s.Shape)
	r, params, err := t.Store()
	if err != nil {
		return fmt.Errorf("site %q: %w", n.Name, err)
	}
	w.werr[n.Name] = compress.RelativeError(s.Weight, t.Decode())
	if err := install(w.net, n, r, params); err != nil {
		return err
	}
	w.done++
	w.Report(compress.Step{Site: n.Name, Done: w.done, Total: w.total, Bytes: compress.WeightBytes(w.net, n), Err: w.werr[n.Name], Restored: restored})
	return nil
}

// fit chooses and learns a site's codebooks and indices.
func (w *codebookWalk) fit(ctx context.Context, piece *codebookPiece, site *codebookSite, n *nn.Node, s *Site, xq, y *tensors.Tensor) error {
	c, err := InitCodebooks(s.Weight, s.Shape[0], site.group, 1<<site.bits, w.Mode)
	if err != nil {
		return err
	}
	piece.Weights = *c
	if w.DataFree {
		return nil
	}
	m, err := siteMoments(ctx, w.b, w.net, n, s, xq, y)
	if err != nil {
		return err
	}
	learned, tr, err := LearnCodebooks(ctx, w.b, m, c, w.Learning)
	switch {
	case errors.Is(err, ErrNoSignal):
		piece.Silent = true
	case err != nil:
		return err
	default:
		piece.Weights, piece.Trace = *learned, tr
		if w.Traces != nil {
			w.Traces(n.Name, m, tr)
		}
	}
	return nil
}

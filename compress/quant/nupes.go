package quant

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/gomlx/compute"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/fold"
)

// ExponentRule is where NUPES takes a site's exponent from.
type ExponentRule string

// The rules: a search per site is the method's, one for all sites its predecessor's option.
const (
	ExponentPerLayer ExponentRule = "per-layer"
	ExponentGlobal   ExponentRule = "global"
	ExponentFixed    ExponentRule = "fixed" // NUPES.Exponent
)

// ActExponent is where NUPES takes an activation's exponent from.
type ActExponent string

// The exponents of activations.
const (
	ActSearched ActExponent = "searched" // of the least error on the examples; NUPES.Exponent under ExponentFixed
	ActShared   ActExponent = "shared"   // the one that the weight begins with
	ActUniform  ActExponent = "uniform"  // 1
)

// NUPES stores weights on power-law grids (Yvinec, Dapogny, Bailly, arXiv:2308.05600): codes are uniform in sign(w)|w|^a,
// which for a < 1 is finer near zero, as bell-shaped and heavy-tailed weights want. The exponent is searched per site, and
// then, with examples, codes and exponents are learned site by site against the float network's outputs, the inputs
// being those of the already quantised network. With DataFree it is its predecessor PowerQuant (arXiv:2301.09858):
// search and rounding, no examples needed unless activations are quantised, too.
//
// Use it at 3 to 6 bits where the runtime can decode through a small table. At 8 bits, or for strictly linear integer
// kernels, uniform grids are simpler. Batch norm is folded first. Dense layers and convolutions are quantised; embeddings,
// products of two activations, norms and activation functions stay in float. Cost: for a site of n positions, O(n·in²) once
// and O(out·in²) per step.
//
// The zero value learns 4-bit weights and leaves activations in float.
type NUPES struct {
	compress.Options

	WeightBits int // 2 to 8, or 32: weights stay in float; 0: 4
	ActBits    int // 2 to 8, or 32: activations stay in float; 0: 32
	// DataFree rounds to the searched grids and learns nothing.
	DataFree bool
	Rule     ExponentRule  // "": ExponentPerLayer
	Exponent float64       // of ExponentFixed, also for activations; 0: 1/2, whose decoding is exact in integers
	Acts     ActExponent   // "": ActSearched
	Learning PowerLearning // how codes and exponents are learned

	// SkipSiteErrors leaves Result.Sites without output errors, which cost two more passes over the examples.
	SkipSiteErrors bool
	// Traces, if not nil, is told how each learned site went.
	Traces func(site string, exponent float64, m *Moments, tr PowerTrace)
}

var _ compress.Method = NUPES{}

func (q NUPES) withDefaults() (NUPES, error) {
	q.WeightBits, q.ActBits, q.Exponent = cmp.Or(q.WeightBits, 4), cmp.Or(q.ActBits, 32), cmp.Or(q.Exponent, .5)
	if q.Rule == "" {
		q.Rule = ExponentPerLayer
	}
	if !slices.Contains([]ExponentRule{ExponentPerLayer, ExponentGlobal, ExponentFixed}, q.Rule) {
		return q, fmt.Errorf("exponent rule %q; accepted: %s, %s, %s", q.Rule, ExponentPerLayer, ExponentGlobal, ExponentFixed)
	}
	if q.Acts == "" {
		q.Acts = ActSearched
	}
	if !slices.Contains([]ActExponent{ActSearched, ActShared, ActUniform}, q.Acts) {
		return q, fmt.Errorf("exponents of activations %q; accepted: %s, %s, %s", q.Acts, ActSearched, ActShared, ActUniform)
	}
	if err := errors.Join(checkAct(q.WeightBits), checkAct(q.ActBits), (PowerGrid{Bits: 8, Exponent: q.Exponent}).Check()); err != nil {
		return q, err
	}
	_, err := q.Learning.withDefaults()
	return q, err
}

// powerPiece is a finished site, as the journal keeps it.
type powerPiece struct {
	Act      float64 // exponent of the activation; 0: it stays in float
	Unsigned bool
	Max      float64 // of the activation
	Exponent float64
	RowMax   []float64
	Codes    []int16 // nil: the weight stays in float
	Trace    PowerTrace
	Silent   bool
}

// Compress returns a quantised copy of net. calib may be nil when nothing is learned and activations stay in float.
// Errors: ErrBits, ErrExponent; ErrEmpty; ErrNotFinite, naming the site; a network without a dense layer or convolution
// that is selected, or whose selected sites are quantised already.
func (q NUPES) Compress(ctx context.Context, b compute.Backend, net *nn.Network, calib compress.Examples) (*compress.Result, error) {
	q, err := q.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("quant: nupes: %w", err)
	}
	if err := errors.Join(q.Check(net), refuseQuantisedSites(net, q.Selected)); err != nil {
		return nil, fmt.Errorf("quant: nupes: %w", err)
	}
	ref := net.Clone()
	folded, err := fold.BatchNorm(ref)
	if err != nil {
		return nil, err
	}
	w := &powerWalk{NUPES: q, b: b, net: ref.Clone(), bits: map[string]compress.Bits{}, quantised: map[string]bool{}, werr: map[string]float64{}}
	needs, err := w.plan()
	if err != nil {
		return nil, fmt.Errorf("quant: nupes: %w", err)
	}
	if needs && calib.Len() == 0 {
		return nil, fmt.Errorf("quant: nupes: %w; DataFree with ActBits 32 needs none", ErrEmpty)
	}
	err = walkSites(ctx, b, ref, w.net, calib, needs, func(n *nn.Node, xq, y *tensors.Tensor) error { return w.visit(ctx, n, xq, y) })
	if err != nil {
		return nil, fmt.Errorf("quant: nupes: %w", err)
	}
	return resultOf(ctx, b, ref, w.net, calib, w.werr, !q.SkipSiteErrors, folded, w.notes)
}

// powerWalk is the state of one compression.
type powerWalk struct {
	NUPES
	b           compute.Backend
	net         *nn.Network
	bits        map[string]compress.Bits // of the sites that are quantised
	global      map[int]float64          // bits -> the one exponent of all sites of those bits
	quantised   map[string]bool          // values of quantisers
	werr        map[string]float64
	notes       []string
	done, total int
}

// plan settles every site's bits, and says whether examples are needed.
func (w *powerWalk) plan() (needs bool, err error) {
	plain := 0
	layers, dims := map[int][][]float32{}, map[int][][]int{}
	for _, n := range w.net.Sites() {
		if !isQuantisable(n) || !nn.IsPlain(n.Op) {
			continue
		}
		if plain++; !w.Selected(n) {
			continue
		}
		bits := w.BitsOf(n.Name, compress.Bits{Weight: w.WeightBits, Act: w.ActBits})
		if err := errors.Join(checkAct(bits.Weight), checkAct(bits.Act)); err != nil {
			return false, fmt.Errorf("site %q: %w", n.Name, err)
		}
		if bits.Weight == 32 && bits.Act == 32 {
			continue
		}
		w.bits[n.Name] = bits
		needs = needs || bits.Act != 32 || bits.Weight != 32 && !w.DataFree
		if w.total++; bits.Weight == 32 || w.Rule != ExponentGlobal {
			continue
		}
		s, err := siteOf(w.net, n)
		if err != nil {
			return false, err
		}
		layers[bits.Weight], dims[bits.Weight] = append(layers[bits.Weight], s.Weight), append(dims[bits.Weight], s.Shape)
	}
	switch {
	case plain == 0:
		return false, errors.New("the network has no dense layer and no convolution with a plain weight")
	case w.total == 0:
		return false, fmt.Errorf("none of the network's %d dense layers and convolutions is selected", plain)
	}
	w.global = map[int]float64{}
	for bits := range layers {
		if w.global[bits], _, err = SearchExponent(layers[bits], dims[bits], bits, SearchOptions{}); err != nil {
			return false, err
		}
	}
	return needs, nil
}

// visit quantises what a site reads, and its weight.
func (w *powerWalk) visit(ctx context.Context, n *nn.Node, xq, y *tensors.Tensor) error {
	bits, ok := w.bits[n.Name]
	if !ok {
		return nil
	}
	var piece powerPiece
	restored, err := w.Journal.Do("nupes/"+n.Name, &piece, func() error { return w.fit(ctx, &piece, n, xq, y, bits) })
	if err == nil {
		err = w.install(n, bits, piece, restored)
	}
	if err != nil {
		return fmt.Errorf("site %q: %w", n.Name, err)
	}
	return nil
}

// fit chooses the grids and codes of a site.
func (w *powerWalk) fit(ctx context.Context, piece *powerPiece, n *nn.Node, xq, y *tensors.Tensor, bits compress.Bits) error {
	s, err := siteOf(w.net, n)
	if err != nil {
		return err
	}
	a := w.Exponent
	switch {
	case bits.Weight == 32:
		a = 1
	case w.Rule == ExponentGlobal:
		a = w.global[bits.Weight]
	case w.Rule == ExponentPerLayer:
		if a, _, err = SearchExponent([][]float32{s.Weight}, [][]int{s.Shape}, bits.Weight, SearchOptions{}); err != nil {
			return err
		}
	}
	if bits.Act != 32 && !w.quantised[n.In[0]] {
		if err := w.fitActivation(piece, nn.Floats(xq), a, bits.Act); err != nil {
			return fmt.Errorf("input %q: %w", n.In[0], err)
		}
		xq = w.fakeQuant(piece, xq, bits.Act)
	}
	if bits.Weight == 32 {
		return nil
	}
	codes, err := PowerQuant(s.Weight, s.Shape, PowerGrid{Bits: bits.Weight, Exponent: a}, PerRow)
	if err != nil {
		return err
	}
	if !w.DataFree {
		m, err := siteMoments(ctx, w.b, w.net, n, s, xq, y)
		if err != nil {
			return err
		}
		learned, tr, err := LearnPower(ctx, w.b, m, codes, w.Learning)
		switch {
		case errors.Is(err, ErrNoSignal):
			piece.Silent = true
		case err != nil:
			return err
		default:
			codes, piece.Trace = learned, tr
			if w.Traces != nil {
				w.Traces(n.Name, codes.Exponent, m, tr)
			}
		}
	}
	piece.Exponent, piece.RowMax, piece.Codes = codes.Exponent, codes.Max, codes.Codes
	return nil
}

// fitActivation chooses the grid of a site's input: its greatest magnitude, and the exponent of the least error. a is
// the weight's.
func (w *powerWalk) fitActivation(piece *powerPiece, x []float32, a float64, bits int) (err error) {
	lo, hi := slices.Min(x), slices.Max(x)
	if err := checkFinite([]float32{lo, hi}); err != nil {
		return err
	}
	piece.Unsigned, piece.Max, piece.Act = lo >= 0, float64(max(-lo, hi)), a
	switch {
	case w.Acts == ActUniform || piece.Max == 0:
		piece.Act = 1
	case w.Acts == ActSearched && w.Rule != ExponentFixed:
		piece.Act, _, err = SearchExponent([][]float32{x}, [][]int{{len(x)}}, bits, SearchOptions{Granularity: PerTensor, Unsigned: piece.Unsigned})
	}
	return err
}

func (p *powerPiece) actGrid(bits int) PowerGrid {
	return PowerGrid{Bits: bits, Exponent: p.Act, Unsigned: p.Unsigned}
}

// fakeQuant is what the site will read.
func (w *powerWalk) fakeQuant(piece *powerPiece, x *tensors.Tensor, bits int) *tensors.Tensor {
	g := piece.actGrid(bits)
	levels, least := g.Levels(), g.least()
	v := nn.Floats(x)
	for i, u := range v {
		v[i] = float32(piece.Max * levels[g.Code(float64(u), piece.Max)-least])
	}
	return tensors.FromFlatDataAndDimensions(v, x.Shape().Dimensions...)
}

// install puts a finished site into the network.
func (w *powerWalk) install(n *nn.Node, bits compress.Bits, piece powerPiece, restored bool) error {
	if bits.Act != 32 && !w.quantised[n.In[0]] {
		v := n.In[0]
		q, err := insertQuantizer(w.net, n, 0, PowerQuantize(piece.actGrid(bits.Act)), []float64{cmp.Or(piece.Max, 1)}, nil)
		if err != nil {
			return err
		}
		w.quantised[q.Out[0]] = true
		for _, m := range w.net.Nodes { // one quantiser serves every later reader, too
			if other, ok := w.bits[m.Name]; ok && other.Act == bits.Act && m.In[0] == v {
				m.In[0] = q.Out[0]
			}
		}
	}
	if piece.Silent {
		w.notes = append(w.notes, fmt.Sprintf("all inputs of %s are zero on the examples: its codes were rounded, not learned", n.Name))
	}
	if piece.Codes != nil {
		s, err := siteOf(w.net, n)
		if err != nil {
			return err
		}
		codes := &PowerCodes{PowerGrid{Bits: bits.Weight, Exponent: piece.Exponent}, s.Shape, piece.RowMax, piece.Codes}
		t := codes.Table()
		r, params, err := t.Store()
		if err != nil {
			return err
		}
		w.werr[n.Name] = compress.RelativeError(s.Weight, t.Decode())
		if err := install(w.net, n, r, params); err != nil {
			return err
		}
	}
	w.done++
	w.Report(compress.Step{Site: n.Name, Done: w.done, Total: w.total, Bytes: compress.WeightBytes(w.net, n), Err: w.werr[n.Name], Restored: restored})
	return nil
}

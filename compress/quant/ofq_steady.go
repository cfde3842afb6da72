package quant

import (
	"math"

	"github.com/gomlx/gomlx/core/graph"

	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/nn"
)

// The two remedies against oscillation of Nagel et al. (arXiv:2203.11086), beside confidence-guided annealing.

// dampening is λ·Σ(W_q − clip(W))² over the statistical weights, clip(W) being W limited to the outermost levels and
// W_q held fixed: it draws weights to the middle of their levels.
func (p *OFQNetwork) dampening(env *nn.Env) *graph.Node {
	var sum *graph.Node
	for _, n := range p.Student.Sites() {
		c := &nn.Ctx{Env: env, Node: n}
		var w *graph.Node
		var bits int
		switch f := n.Op.(nn.Linear).Repr().(type) {
		case StatsWeight:
			w, bits = c.P("w"), f.Bits
		case QueryKeyWeight:
			w, bits = QueryKey(c.P("wq"), c.P("wk"), f.Heads), f.Bits
		default:
			continue
		}
		q, _ := StatsQ(w, bits)
		s, _, levels := statsPlace(w, bits)
		most := graph.MulScalar(s, (levels-.5)/levels)
		d := graph.Sub(graph.StopGradient(q), ClipSTE(w, graph.Neg(most), most))
		term := graph.ReduceAllSum(graph.Mul(d, d))
		if sum != nil {
			term = graph.Add(sum, term)
		}
		sum = term
	}
	if sum == nil {
		return graph.Scalar(env.G, env.Type(), 0)
	}
	return graph.MulScalar(sum, p.Settings.Dampening)
}

// iterativeFreezing fixes weights whose oscillation frequency exceeds a threshold to the code that they have on average
// (algorithm 1). A fixed weight stands in the middle of its level, which moves with the scale.
type iterativeFreezing struct {
	threshold float64
	net       *nn.Network
	sites     []*freezingSite
}

type freezingSite struct {
	node   *nn.Node
	form   coded
	shape  []int
	seen   OscillationTracker
	mean   []float64 // running mean of the codes
	frozen []bool
	code   []float64
}

func newIterativeFreezing(net *nn.Network, threshold float64) (*iterativeFreezing, error) {
	sh, err := net.Shapes(0)
	if err != nil {
		return nil, err
	}
	f := &iterativeFreezing{threshold: threshold, net: net}
	for _, n := range net.Sites() {
		switch r := n.Op.(nn.Linear).Repr().(type) {
		case StatsWeight:
			f.sites = append(f.sites, &freezingSite{node: n, form: r, shape: weightShape(n, sh)})
		case LSQWeight:
			f.sites = append(f.sites, &freezingSite{node: n, form: r, shape: weightShape(n, sh)})
		}
	}
	return f, nil
}

// after is a hook. A training that is resumed has forgotten the frequencies; what is frozen starts moving until it
// oscillates again.
func (f *iterativeFreezing) after(*learn.Trainer, learn.Info) error {
	const momentum = .01
	for _, s := range f.sites {
		l, err := latentsOf(f.net, s.node, s.shape)
		if err != nil {
			return err
		}
		codes, err := s.form.codes(l)
		if err != nil {
			return err
		}
		if err := s.seen.Update(codes); err != nil {
			return err
		}
		if s.mean == nil {
			n := len(codes)
			s.mean, s.frozen, s.code = make([]float64, n), make([]bool, n), make([]float64, n)
			for i, k := range codes {
				s.mean[i] = float64(k)
			}
		}
		for i, k := range codes {
			s.mean[i] = momentum*float64(k) + (1-momentum)*s.mean[i]
			if !s.frozen[i] && s.seen.Frequency()[i] > f.threshold {
				s.frozen[i], s.code[i] = true, math.RoundToEven(s.mean[i])
			}
		}
		w := l.Values["w"]
		if err := s.hold(w, l); err != nil {
			return err
		}
		if err := f.net.Param(s.node, "w").SetData(w); err != nil {
			return err
		}
	}
	return nil
}

// hold puts the frozen weights into the middle of their levels.
func (s *freezingSite) hold(w []float32, l *Latents) error {
	rows := s.shape[0]
	per := len(w) / rows
	switch r := s.form.(type) {
	case StatsWeight:
		scale, _, err := StatsCodes(w, rows, r.Bits, true)
		if err != nil {
			return err
		}
		n := float64(int(1) << (r.Bits - 1))
		for i := range w {
			if s.frozen[i] {
				w[i] = float32(scale[i/per] * (s.code[i] + .5) / n)
			}
		}
	case LSQWeight:
		for i := range w {
			if s.frozen[i] {
				w[i] = float32(float64(max(l.Values["step"][i/per], leastStep)) * s.code[i])
			}
		}
	}
	return nil
}

package quant

import (
	"context"
	"fmt"
	"math"
	"slices"

	"github.com/gomlx/compute"

	"github.com/lathe-ml/lathe/learn/optim"
)

// MappingRule is how indices are learned along with the codebooks.
type MappingRule string

const (
	// MappingProximal decodes the most likely codeword, and lets the weight of a codeword in the gradient fall with its
	// distance: the method's rule.
	MappingProximal MappingRule = "proximal"
	// MappingSTE decodes the most likely codeword, with the gradient of the mixture.
	MappingSTE MappingRule = "ste"
	// MappingSoft decodes the mixture while it learns, and the most likely codeword at the end: the usual way.
	MappingSoft MappingRule = "soft"
	// MappingFixed learns the codebooks only.
	MappingFixed MappingRule = "fixed"
)

// Proximal is what stands for the distance δ of a codeword in the gradient of its logit: gap²/δ, 0 for δ = 0, with the mean
// gap of neighbouring codewords. A neighbour weighs about as much as in the gradient of the mixture, a distant codeword
// less instead of more.
func Proximal(delta, gap float64) float64 {
	if delta == 0 {
		return 0
	}
	return gap * gap / delta
}

// MeanGap is the mean distance of neighbouring values of a codebook.
func MeanGap(codebook []float64) float64 {
	if len(codebook) < 2 {
		return 0
	}
	return (slices.Max(codebook) - slices.Min(codebook)) / float64(len(codebook)-1)
}

// mapWeight is one weight of a mapping: from its logits and the codewords that they stand for it returns the most likely
// one, the lowest on ties, and the decoded value; p is filled with the probabilities and, when g is the gradient with
// respect to the decoded value, d with that of the logits (arXiv:2309.17361, section 3.2):
//
//	p = softmax θ,  δ_k = C_k − Ŵ,  dθ_k = g·p_k·φ(δ_k),  φ(δ) = δ or Proximal
func mapWeight(rule MappingRule, theta, codewords []float64, gap, g float64, p, d []float64) (best int, w float64) {
	top := theta[0]
	for k, v := range theta {
		if v > top {
			top, best = v, k
		}
	}
	sum := 0.
	for k, v := range theta {
		if p[k] = 1; v != top {
			p[k] = expNegative(v - top)
		}
		sum += p[k]
	}
	w = codewords[best]
	if rule == MappingSoft {
		w = 0
	}
	for k := range p {
		p[k] /= sum
		if rule == MappingSoft {
			w += p[k] * codewords[k]
		}
	}
	for k := range d {
		delta := codewords[k] - w
		if rule == MappingProximal {
			delta = Proximal(delta, gap)
		}
		d[k] = g * p[k] * delta
	}
	return best, w
}

// expNegative is exp(x) for x ≤ 0, to 1e-12 of its value: several times as fast as math.Exp, which is most of what learning
// a mapping costs. Below exp(−80) it is 0.
func expNegative(x float64) float64 {
	if x < -80 {
		return 0
	}
	k := math.Floor(x*math.Log2E + .5)
	r := x - k*0x1.62e42feep-1 - k*0x1.a39ef35793c76p-33 // ln 2 in two parts; |r| ≤ ln 2 / 2
	e := 1 + r*(1+r*(1./2+r*(1./6+r*(1./24+r*(1./120+r*(1./720+r*(1./5040+r*(1./40320+r*(1./362880+r/3628800)))))))))
	return e * math.Float64frombits(uint64(1023+int(k))<<52)
}

// MappingGradient is a whole weight's mapping: theta [rows, columns, K] are logits, one codebook of K values per group
// (their values need not ascend), gradW [rows, columns] is the gradient with respect to the decoded weight. It returns the
// indices, the decoded weight, and the gradients of logits and codewords:
//
//	dC[g]_k = Σ_{ij in g, I_ij = k} gradW_ij        MappingSoft: Σ_{ij in g} p_ijk·gradW_ij
func MappingGradient(theta []float64, codebooks [][]float64, group []int, gradW []float64, rule MappingRule) (index []uint8, w, dTheta []float64, dBooks [][]float64, err error) {
	if !slices.Contains([]MappingRule{MappingProximal, MappingSTE, MappingSoft}, rule) {
		return nil, nil, nil, nil, fmt.Errorf("quant: mapping rule %q; accepted: %s, %s, %s", rule, MappingProximal, MappingSTE, MappingSoft)
	}
	if len(codebooks) == 0 || len(codebooks[0]) == 0 || len(codebooks[0]) > 256 || len(group) == 0 || len(gradW)%len(group) != 0 || len(theta) != len(gradW)*len(codebooks[0]) {
		return nil, nil, nil, nil, fmt.Errorf("quant: %d logits, %d weights in %d rows and %d codebooks do not fit together", len(theta), len(gradW), len(group), len(codebooks))
	}
	k, per := len(codebooks[0]), len(gradW)/len(group)
	gaps := make([]float64, len(codebooks))
	for g, c := range codebooks {
		if len(c) != k {
			return nil, nil, nil, nil, fmt.Errorf("quant: codebooks of %d and %d values", k, len(c))
		}
		gaps[g] = MeanGap(c)
		dBooks = append(dBooks, make([]float64, k))
	}
	index, w, dTheta = make([]uint8, len(gradW)), make([]float64, len(gradW)), make([]float64, len(theta))
	p := make([]float64, k)
	for i, grad := range gradW {
		g := group[i/max(per, 1)]
		if g < 0 || g >= len(codebooks) {
			return nil, nil, nil, nil, fmt.Errorf("quant: codebook %d of %d", g, len(codebooks))
		}
		best, v := mapWeight(rule, theta[i*k:(i+1)*k], codebooks[g], gaps[g], grad, p, dTheta[i*k:(i+1)*k])
		index[i], w[i] = uint8(best), v
		if rule == MappingSoft {
			for j := range p {
				dBooks[g][j] += p[j] * grad
			}
		} else {
			dBooks[g][best] += grad
		}
	}
	return index, w, dTheta, dBooks, nil
}

// CodebookLearning is how LearnCodebooks learns. The zero value is the method's way.
type CodebookLearning struct {
	Steps    int         // of Adam on all cases at once; 0: 300, negative: none
	BookRate float64     // learning rate of codewords and scales over the standard deviation of what they stand for; 0: 0.01
	MapRate  float64     // learning rate of the logits, falling along a cosine; 0: 0.01
	Mapping  MappingRule // "": MappingProximal
	// Near is how many codewords around the current one have logits; they are centred anew every 50 steps. 0: all, or 4 where
	// that would be more than 2²³ logits.
	Near int
}

const recentreSteps = 50

func (o CodebookLearning) withDefaults(weights, k int) (CodebookLearning, error) {
	if o.Steps == 0 {
		o.Steps = 300
	}
	if o.BookRate == 0 {
		o.BookRate = .01
	}
	if o.MapRate == 0 {
		o.MapRate = .01
	}
	if o.Mapping == "" {
		o.Mapping = MappingProximal
	}
	if !(o.BookRate > 0) || !(o.MapRate > 0) || math.IsInf(o.BookRate+o.MapRate, 0) {
		return o, fmt.Errorf("quant: learning rates %g of codebooks and %g of mappings; both must be positive, or 0 for the default", o.BookRate, o.MapRate)
	}
	if !slices.Contains([]MappingRule{MappingProximal, MappingSTE, MappingSoft, MappingFixed}, o.Mapping) {
		return o, fmt.Errorf("quant: mapping rule %q; accepted: %s, %s, %s, %s", o.Mapping, MappingProximal, MappingSTE, MappingSoft, MappingFixed)
	}
	if o.Near < 0 || o.Near == 1 {
		return o, fmt.Errorf("quant: logits for %d codewords; accepted: 0, or at least 2", o.Near)
	}
	if o.Near == 0 {
		if o.Near = k; weights > 1<<23/k {
			o.Near = 4
		}
	}
	o.Near = min(o.Near, k)
	return o, nil
}

// CodebookTrace is how learning went.
type CodebookTrace struct {
	Start, End float64 // mean squared error of the site's outputs, before and with what is kept
	Kept       int     // steps after which what is kept stood
	Moved, Far float64 // share of the indices that changed, and of those that changed by more than one codeword
}

// LearnCodebooks learns codebooks, scales and indices of a site together, so that its outputs come close to those in m
// (arXiv:2309.17361, section 3.2). Every weight has a logit per codeword, which starts at −4|W − C_k|/gap; the gap of a group
// is that of its codebook at the start. Codebooks and scales move by Adam; logits by Adam with one second moment per weight,
// so that the rule's relation between near and far codewords is kept. Every step takes the gradient over all cases, which
// the moments give exactly (the paper draws minibatches); what had the least error is kept, the start included. With
// MappingSoft that is the error of the mixture, as its user would see it.
//
// Errors: ErrNoSignal, options out of range, codebooks that do not fit the moments.
func LearnCodebooks(ctx context.Context, b compute.Backend, m *Moments, start *CodebookWeights, o CodebookLearning) (*CodebookWeights, CodebookTrace, error) {
	var tr CodebookTrace
	if len(start.Index) != len(m.Weight) || start.Rows != m.Out || len(start.Group) != m.Out || len(start.Codebooks) == 0 {
		return nil, tr, fmt.Errorf("quant: jlcm: %d indices in %d rows for a weight of %d rows of %d", len(start.Index), start.Rows, m.Out, m.In)
	}
	o, err := o.withDefaults(len(m.Weight), len(start.Codebooks[0]))
	if err != nil {
		return nil, tr, err
	}
	if m.Silent() {
		return nil, tr, fmt.Errorf("quant: jlcm: %w", ErrNoSignal)
	}
	d, err := m.Descend(b)
	if err != nil {
		return nil, tr, err
	}
	defer d.Close()
	l := newCodebookLearner(m, start, o)
	best := l.c.clone()
	if tr.Start, _, err = d.At(narrow(best.Decode())); err != nil {
		return nil, tr, err
	}
	least := tr.Start
	if o.Mapping == MappingSoft {
		least = math.Inf(1)
	}
	falling := optim.Cosine(max(o.Steps, 1), 0, 0)
	for step := range max(o.Steps, 0) + 1 {
		if err := ctx.Err(); err != nil {
			return nil, tr, err
		}
		if step > 0 && step%recentreSteps == 0 {
			l.recentre()
		}
		loss, g, err := d.At(l.decode())
		if err != nil {
			return nil, tr, err
		}
		if loss < least {
			least, tr.Kept = loss, step
			best = l.c.clone()
		}
		if step < o.Steps {
			l.step(g, falling(step))
		}
	}
	if tr.End, _, err = d.At(narrow(best.Decode())); err != nil {
		return nil, tr, err
	}
	for i, k := range best.Index {
		if d := int(k) - int(start.Index[i]); d != 0 {
			tr.Moved += 1 / float64(len(best.Index))
			if d > 1 || d < -1 {
				tr.Far += 1 / float64(len(best.Index))
			}
		}
	}
	return best, tr, nil
}

func (c *CodebookWeights) clone() *CodebookWeights {
	d := *c
	d.Scales, d.Index, d.Codebooks = slices.Clone(c.Scales), slices.Clone(c.Index), nil
	for _, b := range c.Codebooks {
		d.Codebooks = append(d.Codebooks, slices.Clone(b))
	}
	return &d
}

// codebookLearner is the state of LearnCodebooks.
type codebookLearner struct {
	o      CodebookLearning
	c      *CodebookWeights // as learned so far
	per    int              // weights of a row
	gaps   []float64        // of each codebook, at the start
	order  [][]uint8        // codewords of each codebook by value
	base   []uint8          // place in that order of the first codeword that a weight has a logit for
	theta  []float64        // [weights, Near]
	words  []float64        // values of the codewords behind a weight's logits
	p, dp  []float64
	weight []float32 // decoded
	maps   *adam
	books  []*adam
	scales *adam
	rates  []float64 // of the codebooks
	scale  float64   // rate of the scales
}

func newCodebookLearner(m *Moments, start *CodebookWeights, o CodebookLearning) *codebookLearner {
	n, k := len(start.Index), len(start.Codebooks[0])
	l := &codebookLearner{
		o: o, c: start.clone(), per: n / start.Rows, weight: make([]float32, n),
		words: make([]float64, o.Near), p: make([]float64, o.Near), dp: make([]float64, o.Near),
		scales: newAdam(len(start.Scales), 1, 1e-8),
	}
	std := deviation(m.Weight)
	l.scale = o.BookRate * std
	for _, b := range start.Codebooks {
		l.gaps = append(l.gaps, MeanGap(b))
		l.books = append(l.books, newAdam(k, 1, 1e-8))
		rate := o.BookRate * std
		if start.Mode == GroupScales { // its codewords are for weights of size 1
			rate = o.BookRate
		}
		l.rates = append(l.rates, rate)
	}
	if o.Mapping == MappingFixed {
		return l
	}
	l.maps, l.theta, l.base = newAdam(n*o.Near, o.Near, 1e-12), make([]float64, n*o.Near), make([]uint8, n)
	l.sort()
	for i, w := range m.Weight {
		values, scale, gap := l.book(i)
		at := l.window(i)
		for j := range o.Near {
			l.theta[i*o.Near+j] = -4 * math.Abs(float64(w)/scale-values[at[j]]) / gap
		}
	}
	return l
}

// book is what a weight is decoded with, and the gap of its codewords.
func (l *codebookLearner) book(i int) (values []float64, scale, gap float64) {
	row := i / l.per
	values, scale = l.c.book(row)
	return values, scale, max(l.gaps[l.number(row)], 1e-8)
}

// number is that of a row's codebook.
func (l *codebookLearner) number(row int) int {
	if l.c.Mode == GroupScales {
		return 0
	}
	return l.c.Group[row]
}

func (l *codebookLearner) sort() {
	l.order = l.order[:0]
	for _, b := range l.c.Codebooks {
		var at []uint8
		for _, k := range ascending(b) {
			at = append(at, uint8(k))
		}
		l.order = append(l.order, at)
	}
	for i, k := range l.c.Index {
		order := l.order[l.number(i/l.per)]
		first := slices.Index(order, k) - (l.o.Near-1)/2
		l.base[i] = uint8(min(max(first, 0), len(order)-l.o.Near))
	}
}

// window are the codewords that a weight has logits for.
func (l *codebookLearner) window(i int) []uint8 {
	return l.order[l.number(i/l.per)][l.base[i]:][:l.o.Near]
}

// recentre gives every weight logits for the codewords around its current one.
func (l *codebookLearner) recentre() {
	n := l.o.Near
	if l.maps == nil || n == len(l.c.Codebooks[0]) {
		return
	}
	old := make([]uint8, len(l.c.Index)*n)
	for i := range l.c.Index {
		copy(old[i*n:], l.window(i))
	}
	l.sort()
	theta, moment := make([]float64, n), make([]float64, n)
	for i, k := range l.c.Index {
		before := old[i*n : (i+1)*n]
		values, _, gap := l.book(i)
		current := l.theta[i*n+slices.Index(before, k)]
		for j, word := range l.window(i) {
			if at := slices.Index(before, word); at >= 0 {
				theta[j], moment[j] = l.theta[i*n+at], l.maps.m[i*n+at]
			} else {
				theta[j], moment[j] = current-4*math.Abs(values[word]-values[k])/gap, 0
			}
		}
		copy(l.theta[i*n:], theta)
		copy(l.maps.m[i*n:], moment)
	}
}

// row is what the weights of a row have in common.
type row struct {
	number     int // of the codebook
	values     []float64
	scale, gap float64
	order      []uint8
	whole      bool // all codewords have logits, those of words
}

func (l *codebookLearner) row(o int) row {
	r := row{number: l.number(o), whole: l.o.Near == len(l.c.Codebooks[0])}
	r.values, r.scale = l.c.book(o)
	r.gap = max(l.gaps[r.number], 1e-8)
	if l.maps == nil {
		return r
	}
	if r.order = l.order[r.number]; r.whole {
		for j, k := range r.order {
			l.words[j] = r.values[k]
		}
	}
	return r
}

// logits are those of a weight, with the codewords that they are for; l.words holds their values.
func (l *codebookLearner) logits(r *row, i int) (theta []float64, at []uint8) {
	n := l.o.Near
	if theta = l.theta[i*n : (i+1)*n]; r.whole {
		return theta, r.order
	}
	at = r.order[l.base[i]:][:n]
	for j, k := range at {
		l.words[j] = r.values[k]
	}
	return theta, at
}

// decode settles the indices by the logits and returns the weight; with MappingSoft, the mixture.
func (l *codebookLearner) decode() []float32 {
	for o := range l.c.Rows {
		r := l.row(o)
		for i := o * l.per; i < (o+1)*l.per; i++ {
			if l.maps == nil {
				l.weight[i] = float32(r.scale * r.values[l.c.Index[i]])
				continue
			}
			theta, at := l.logits(&r, i)
			var best int
			var w float64
			if l.o.Mapping == MappingSoft {
				best, w = mapWeight(MappingSoft, theta, l.words, 0, 0, l.p, nil)
			} else {
				top := theta[0]
				for j, v := range theta {
					if v > top {
						best, top = j, v
					}
				}
				w = l.words[best]
			}
			l.c.Index[i], l.weight[i] = at[best], float32(r.scale*w)
		}
	}
	return l.weight
}

// step moves codebooks, scales and logits against the gradient with respect to the decoded weight.
func (l *codebookLearner) step(g []float32, rate float64) {
	dBooks, dScales := make([][]float64, len(l.c.Codebooks)), make([]float64, len(l.c.Scales))
	for i, b := range l.c.Codebooks {
		dBooks[i] = make([]float64, len(b))
	}
	if l.maps != nil {
		l.maps.next()
	}
	soft := l.o.Mapping == MappingSoft
	for o := range l.c.Rows {
		r := l.row(o)
		maps, dBook := l.maps != nil && l.gaps[r.number] > 0, dBooks[r.number]
		for i := o * l.per; i < (o+1)*l.per; i++ {
			scaled := r.scale * float64(g[i])
			dScales[l.c.Group[o]] += float64(l.weight[i]) / r.scale * float64(g[i])
			if !maps {
				dBook[l.c.Index[i]] += scaled
				continue
			}
			theta, at := l.logits(&r, i)
			mapWeight(l.o.Mapping, theta, l.words, r.gap, scaled, l.p, l.dp)
			if soft {
				for j, k := range at {
					dBook[k] += l.p[j] * scaled
				}
			} else {
				dBook[l.c.Index[i]] += scaled
			}
			l.maps.move(i, theta, l.dp, rate*l.o.MapRate)
		}
	}
	for b, d := range dBooks {
		l.books[b].next()
		for k := range d {
			l.books[b].move(k, l.c.Codebooks[b][k:k+1], d[k:k+1], rate*l.rates[b])
		}
	}
	if l.c.Mode != GroupScales {
		return
	}
	l.scales.next()
	for s := range dScales {
		l.scales.move(s, l.c.Scales[s:s+1], dScales[s:s+1], rate*l.scale)
		l.c.Scales[s] = max(l.c.Scales[s], 1e-12)
	}
}

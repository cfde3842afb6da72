package norm

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"math"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/gomlx/compute"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/internal/atomicfile"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/internal/search"
	"github.com/lathe-ml/lathe/internal/stat"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// SearchOptions say how layers evolve (arXiv:2004.02967, section 3.3). The zero value is the paper's.
type SearchOptions struct {
	Space Space
	Proxy ProxyOptions

	Window     int     // newest accepted layers that can become parents; 0: 2500
	Tournament int     // of them that compete to be one; larger than the window: clipped; 0: a twentieth of the window
	Fresh      float64 // probability that a child is replaced by a random layer, in [0, 1]; 0: 0.5; negative: none
	Average    bool    // the tournament's best mean wins, instead of any layer of its Pareto front
	RandomOnly bool    // random search: every proposal is a random layer
	// Novel draws a layer again while it begins as the same function as an earlier one (compared on a random map, with v0
	// and v1 at their initial values), is not finite there or says nothing about its case, at most 100 times. Most mutations of a layer with dead nodes change nothing, and copies of
	// one layer soon fill the window; with Novel nearly every proposal costs a training and may teach something. A
	// mutation without effect drifts: the next one starts from it.
	Novel bool

	Proposals int           // to judge in all, rejected ones included, rounded up to whole batches; 0: 5000
	Budget    time.Duration // of judging, of resumed runs too; 0: none. What is under way is finished
	Parallel  int           // proposals that are made from one population and judged at once; 0: 1
	Seed      uint64

	// Archive is a JSON file that holds every proposal with its judgement. A search whose archive is there goes on where
	// it stopped, and refuses the archive of another one. It is written, atomically, every few seconds and at the end;
	// "": none.
	Archive string
	Observe func(p Proposal, s *SearchResult) // after every proposal, in order; nil: none
}

func (o SearchOptions) withDefaults() SearchOptions {
	o.Window = cmp.Or(o.Window, 2500)
	o.Fresh = cmp.Or(o.Fresh, .5)
	o.Proposals = cmp.Or(o.Proposals, 5000)
	o.Parallel = cmp.Or(o.Parallel, 1)
	o.Proxy = o.Proxy.withDefaults()
	return o
}

// Proposal is one layer that a search judged.
type Proposal struct {
	Number int        `json:"number"`
	Parent int        `json:"parent"` // number of the proposal that was mutated; -1: a random layer
	Layer  LayerGraph `json:"-"`
	// Formula is the layer as an equation, of accepted layers.
	Formula string `json:"formula,omitempty"`
	// Twin is the number of an earlier proposal of the same meaning, whose judgement this one takes over; -1: none.
	Twin    int     `json:"twin"`
	Seconds float64 `json:"seconds"` // to judge it
	Judgement
}

// SearchResult is what a search has found.
type SearchResult struct {
	Archs     []string
	Proposals []Proposal
	Seconds   float64 // of judging, of resumed runs too
	Note      string  // what was clipped, "" if nothing
}

// Count is the number of proposals with a verdict.
func (r *SearchResult) Count(verdict string) (n int) {
	for _, p := range r.Proposals {
		if p.Verdict == verdict {
			n++
		}
	}
	return n
}

// Best are the accepted layers, best mean first, one of each meaning, at most n (0: all).
func (r *SearchResult) Best(n int) (best []Proposal) {
	for _, p := range r.Proposals {
		if p.Verdict == Accepted && p.Twin < 0 {
			best = append(best, p)
		}
	}
	slices.SortStableFunc(best, func(a, b Proposal) int { return cmp.Compare(b.Mean(), a.Mean()) })
	if n > 0 && len(best) > n {
		best = best[:n]
	}
	return best
}

// Front are the accepted layers that no other one beats on all architectures, best mean first.
func (r *SearchResult) Front() (front []Proposal) {
	all := r.Best(0)
	scores := make([][]float64, len(all))
	for i, p := range all {
		scores[i] = p.Scores
	}
	for _, i := range search.ParetoFront(scores) {
		front = append(front, all[i])
	}
	return front
}

// Search evolves layers from a cold start: random layers until one is accepted, then children of tournament winners and
// random layers. Everything random follows from the seed and the number of the proposal; a layer that means the same as
// an earlier one is not judged again. When ctx ends, the archive is written and ctx's error returned beside the result so
// far; the same call goes on from there. A budget of time that is over is no error.
func Search(ctx context.Context, b compute.Backend, archs []Arch, d ProxyData, o SearchOptions) (*SearchResult, error) {
	o = o.withDefaults()
	switch {
	case o.Window < 1 || o.Tournament < 0 || o.Proposals < 1 || o.Parallel < 1 || o.Parallel > 1024 || o.Budget < 0:
		return nil, fmt.Errorf("norm: search: window %d, tournament %d, %d proposals, %d at once, budget %v: want positive numbers", o.Window, o.Tournament, o.Proposals, o.Parallel, o.Budget)
	case math.IsNaN(o.Fresh) || o.Fresh > 1:
		return nil, fmt.Errorf("norm: search: probability %g of a random child; want one in [0, 1]", o.Fresh)
	case o.Space.nodes() < 1 || o.Space.nodes() > MaxLayerNodes:
		return nil, fmt.Errorf("norm: search: layers of %d nodes; want 1 to %d", o.Space.nodes(), MaxLayerNodes)
	}
	proxy, err := NewProxy(b, archs, d, o.Proxy)
	if err != nil {
		return nil, err
	}
	r := &SearchResult{Archs: proxy.Archs()}
	if o.Tournament > o.Window {
		r.Note = fmt.Sprintf("a tournament of %d is larger than the window; it is clipped to %d", o.Tournament, o.Window)
		o.Tournament = o.Window
	}
	evolution := &search.Ageing[LayerGraph]{
		Window: o.Window, Tournament: o.Tournament, Fresh: max(o.Fresh, 0),
	}
	if o.Average {
		evolution.Select = search.Average
	}
	if o.RandomOnly {
		evolution.Fresh = 1
	}
	s := &searcher{o: o, proxy: proxy, evolution: evolution, result: r, seen: map[string]int{}, done: map[string]bool{}}
	evolution.Random, evolution.Mutate = s.random, s.mutate
	if s.recipe, err = recipeOf(o, r.Archs, d); err != nil {
		return nil, err
	}
	if err := s.load(); err != nil {
		return nil, err
	}
	err = s.run(ctx)
	return r, errors.Join(err, s.save())
}

// searcher is a search under way.
type searcher struct {
	o         SearchOptions
	recipe    string
	proxy     *Proxy
	evolution *search.Ageing[LayerGraph]
	result    *SearchResult
	seen      map[string]int  // meaning -> number of the proposal that was judged
	done      map[string]bool // behaviours that were judged
	saved     time.Time
	dirty     bool
}

func (s *searcher) run(ctx context.Context) error {
	s.saved = time.Now()
	for {
		n := len(s.result.Proposals)
		if n >= s.o.Proposals || s.o.Budget > 0 && s.result.Seconds >= s.o.Budget.Seconds() {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		started := time.Now()
		batch := make([]Proposal, s.o.Parallel)
		first := map[string]int{} // meaning -> place in the batch
		errs := make([]error, len(batch))
		var group sync.WaitGroup
		for k := range batch {
			p := &batch[k]
			p.Number, p.Twin = n+k, -1
			p.Layer, p.Parent = s.evolution.Propose(s.o.Seed, p.Number)
			meaning := p.Layer.Canonical()
			if twin, ok := s.seen[meaning]; ok {
				p.Twin, p.Judgement = twin, s.result.Proposals[twin].Judgement
				continue
			}
			if twin, ok := first[meaning]; ok {
				p.Twin = twin + n
				continue
			}
			first[meaning] = k
			group.Add(1)
			go func() {
				defer group.Done()
				errs[k] = s.judge(ctx, p)
			}()
		}
		group.Wait()
		s.result.Seconds += time.Since(started).Seconds()
		if err := errors.Join(errs...); err != nil { // the whole batch is judged again
			return cmp.Or(ctx.Err(), err)
		}
		for _, p := range batch {
			if p.Twin >= n {
				p.Judgement = batch[p.Twin-n].Judgement
			}
			s.add(p)
			s.dirty = true
			if s.o.Observe != nil {
				s.o.Observe(p, s.result)
			}
		}
		if time.Since(s.saved) > 5*time.Second {
			if err := s.save(); err != nil {
				return err
			}
		}
	}
}

// novelTries is how often a layer is drawn again for the sake of novelty.
const novelTries = 100

// random draws a layer, a novel one if that is asked for.
func (s *searcher) random(r *rng.Rand) (l LayerGraph) {
	for range novelTries {
		if l = RandomLayer(r, s.o.Space); !s.o.Novel || s.novel(l) {
			break
		}
	}
	return l
}

// mutate makes a child, a novel one if that is asked for.
func (s *searcher) mutate(r *rng.Rand, parent LayerGraph) (child LayerGraph) {
	meaning := parent.Canonical()
	for range novelTries {
		if child = Mutate(r, parent, s.o.Space); !s.o.Novel || s.novel(child) {
			break
		}
		if child.Canonical() == meaning {
			parent = child
		}
	}
	return child
}

// novel says whether a layer behaves as none before it, and usefully.
func (s *searcher) novel(l LayerGraph) bool {
	if !l.live()[valueX] {
		return false
	}
	text, ok := s.behaviour(l)
	return ok && !s.done[text]
}

func (s *searcher) behaviour(l LayerGraph) (text string, ok bool) {
	o := s.o.Proxy.Layer
	return l.behaviour(o.groups(), o.epsilon())
}

// judge fills the judgement of a proposal in. A panic below is a rejection like every other.
func (s *searcher) judge(ctx context.Context, p *Proposal) error {
	started := time.Now()
	var err error
	caught := nn.Catch(func() {
		var layer zoo.NormAct
		if layer, err = s.proxy.build(p.Layer); err != nil {
			p.Judgement, err = Judgement{Verdict: ByStatic, Reason: err.Error()}, nil
			return
		}
		p.Judgement, err = s.proxy.Judge(ctx, layer)
	})
	if caught != nil {
		p.Judgement, err = rejection(ctx, p.Judgement, caught)
	}
	p.Seconds = time.Since(started).Seconds()
	if p.Verdict == Accepted {
		p.Formula = p.Layer.Formula()
	}
	return err
}

// add puts a judged proposal into the result and, if it was accepted, into the population.
func (s *searcher) add(p Proposal) {
	s.result.Proposals = append(s.result.Proposals, p)
	if p.Twin < 0 {
		s.seen[p.Layer.Canonical()] = p.Number
		if text, ok := s.behaviour(p.Layer); ok {
			s.done[text] = true
		}
	}
	if p.Verdict == Accepted {
		s.evolution.Accept(search.Individual[LayerGraph]{Genome: p.Layer, Scores: p.Scores, Born: p.Number})
	}
}

// archive is the JSON form of a search under way. Layers are not in it: they follow from the seed and the judgements.
type archive struct {
	Format    int        `json:"format"`
	Recipe    string     `json:"recipe"`
	Seconds   float64    `json:"seconds"`
	Proposals []Proposal `json:"proposals"`
}

const (
	archiveFormat = 1
	maxArchive    = 1 << 28 // bytes
)

// recipeOf is what the proposals of a search depend on. How many there are to be and how long it may take does not belong
// to it, so that a finished search can be prolonged.
func recipeOf(o SearchOptions, archs []string, d ProxyData) (string, error) {
	h := fnv.New128a()
	for _, m := range []*data.Images{d.Train, d.Validation} {
		fmt.Fprint(h, m.N, m.H, m.W, m.C, m.Max, m.ClassNames, m.Labels)
		h.Write(m.Pixels)
	}
	p := o.Proxy
	p.Timeout = 0
	b, err := json.Marshal(struct {
		Space                        Space
		Proxy                        ProxyOptions
		Window, Tournament, Parallel int
		Fresh                        float64
		Average, RandomOnly, Novel   bool
		Seed                         uint64
		Archs                        []string
		Data                         string
	}{o.Space, p, o.Window, o.Tournament, o.Parallel, o.Fresh, o.Average, o.RandomOnly, o.Novel, o.Seed, archs, fmt.Sprintf("%x", h.Sum(nil))})
	return string(b), err
}

func (s *searcher) save() error {
	if s.o.Archive == "" || !s.dirty {
		return nil
	}
	b, err := json.Marshal(archive{archiveFormat, s.recipe, s.result.Seconds, s.result.Proposals})
	if err != nil {
		return fmt.Errorf("norm: search archive: %w", err)
	}
	if err := atomicfile.WriteFile(s.o.Archive, append(b, '\n')); err != nil {
		return fmt.Errorf("norm: search archive: %w", err)
	}
	s.saved, s.dirty = time.Now(), false
	return nil
}

// load takes the archive up, if there is one: it makes the same proposals again and gives them the judgements of the file.
func (s *searcher) load() error {
	if s.o.Archive == "" {
		return nil
	}
	if _, err := os.Stat(s.o.Archive); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	f, err := os.Open(s.o.Archive)
	if err != nil {
		return fmt.Errorf("norm: search archive: %w", err)
	}
	defer f.Close()
	var a archive
	refuse := func(format string, args ...any) error {
		return fmt.Errorf("norm: search archive %s: %s; move it away to start over", s.o.Archive, fmt.Sprintf(format, args...))
	}
	if err := data.DecodeJSON(f, maxArchive, &a); err != nil {
		return refuse("%v", err)
	}
	switch {
	case a.Format != archiveFormat:
		return refuse("format %d is not read, only %d", a.Format, archiveFormat)
	case a.Recipe != s.recipe:
		return refuse("it belongs to a search with other options, data or architectures")
	case !(a.Seconds >= 0) || math.IsInf(a.Seconds, 0):
		return refuse("%g seconds", a.Seconds)
	}
	n := 0
	for i := range a.Proposals {
		p := &a.Proposals[i]
		if n == i { // a batch was proposed from the population as it was at its start
			n = min(i+s.o.Parallel, len(a.Proposals))
			for k := i; k < n; k++ {
				parent := 0
				a.Proposals[k].Layer, parent = s.evolution.Propose(s.o.Seed, k)
				if parent != a.Proposals[k].Parent {
					return refuse("proposal %d has parent %d, and must have %d", k, a.Proposals[k].Parent, parent)
				}
			}
		}
		twin := -1
		if t, ok := s.seen[p.Layer.Canonical()]; ok {
			twin = t
		}
		switch {
		case p.Number != i || p.Twin != twin:
			return refuse("proposal %d has number %d and twin %d, and must have twin %d", i, p.Number, p.Twin, twin)
		case !slices.Contains([]string{Accepted, ByStatic, ByQuality, ByStability, ByNaN, ByTimeout, ByError}, p.Verdict):
			return refuse("proposal %d: there is no verdict %.40q", i, p.Verdict)
		case p.Verdict == Accepted && len(p.Scores) != len(s.result.Archs):
			return refuse("proposal %d has %d scores for %d architectures", i, len(p.Scores), len(s.result.Archs))
		case slices.ContainsFunc(p.Scores, func(v float64) bool { return !(v >= 0 && v <= 1) }):
			return refuse("proposal %d: scores %v are not in [0, 1]", i, p.Scores)
		}
		s.add(*p)
	}
	s.result.Seconds = a.Seconds
	return nil
}

// Reranked is a layer with its scores on other, larger architectures.
type Reranked struct {
	Proposal
	Final []float64 // validation accuracy by architecture
}

// Mean is the mean of the final scores.
func (r Reranked) Mean() float64 { return stat.Mean(r.Final) }

// Rerank trains the best n layers of a search on the proxy's architectures, which should be larger and trained for longer
// than the search's, and returns them best mean first (arXiv:2004.02967, section 3.3: ten layers, the first three become
// B0-B2 and S0-S2).
func Rerank(ctx context.Context, proxy *Proxy, r *SearchResult, n int, observe func(done, total int)) ([]Reranked, error) {
	best := r.Best(n)
	out := make([]Reranked, len(best))
	scores := make([][]float64, len(best))
	for i, p := range best {
		layer, err := proxy.build(p.Layer)
		if err != nil {
			return nil, err
		}
		if scores[i], err = proxy.Train(ctx, layer); err != nil {
			return nil, err
		}
		out[i] = Reranked{p, scores[i]}
		if observe != nil {
			observe(i+1, len(best))
		}
	}
	sorted := make([]Reranked, 0, len(out))
	for _, i := range rank(scores) {
		sorted = append(sorted, out[i])
	}
	return sorted, nil
}

// LayerFile is a layer as a file: what a search writes and "lathe train --norm FILE.json" takes.
type LayerFile struct {
	Format  int        `json:"format"` // 1
	Formula string     `json:"formula"`
	Layer   LayerGraph `json:"layer"`
	Groups  int        `json:"groups,omitempty"` // of the options; 0: 32
	Eps     float64    `json:"eps,omitempty"`    // 0: 1e-5
	Decay   float64    `json:"decay,omitempty"`  // 0: 0.9
	// Scores is free information: on what the layer was judged, and how well it did.
	Scores map[string]float64 `json:"scores,omitempty"`
}

// WriteLayer writes a layer, pruned, to a file, atomically.
func WriteLayer(path string, l LayerGraph, o EvoOptions, scores map[string]float64) error {
	l = l.Prune()
	if err := l.Check(); err != nil {
		return fmt.Errorf("norm: %w", err)
	}
	b, err := json.MarshalIndent(LayerFile{Format: 1, Formula: l.Formula(), Layer: l, Groups: o.Groups, Eps: o.Eps, Decay: o.Decay, Scores: scores}, "", "  ")
	if err != nil {
		return fmt.Errorf("norm: layer file: %w", err)
	}
	return atomicfile.WriteFile(path, append(b, '\n'))
}

// ReadLayer reads what WriteLayer wrote, as a norm for slots that take norm and activation in one. The file is taken for
// hostile: it may have 1 MB, and its graph is refused when LayerGraph.Check refuses it.
func ReadLayer(path string) (nn.Norm, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("norm: layer file: %w", err)
	}
	defer f.Close()
	var l LayerFile
	if err := data.DecodeJSON(f, 1<<20, &l); err != nil {
		return nil, fmt.Errorf("norm: layer file %s: %w", path, err)
	}
	if l.Format != 1 {
		return nil, fmt.Errorf("norm: layer file %s: format %d is not read, only 1", path, l.Format)
	}
	n, err := l.Layer.Build(EvoOptions{Groups: l.Groups, Eps: l.Eps, Decay: l.Decay})
	if err != nil {
		return nil, fmt.Errorf("norm: layer file %s: %w", path, err)
	}
	return n, nil
}

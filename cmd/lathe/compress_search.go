package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/compress/quant"
	"github.com/lathe-ml/lathe/lab/report"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/fold"
)

// searchBits are the bits that a site may get in a search.
var searchBits = []int{8, 6, 5, 4, 3, 2}

// searchCases is the number of calibration cases on which each site's cost is measured.
const searchCases = 64

// searchTarget is the budget of a search, as the flags say it.
type searchTarget struct {
	compress.Target
	share   float64       // --size as a share of the parameters; 0: it is in bytes, or not given
	methods []*compressor // that are tried
	abits   int           // of an activation; 0: as the site's weight
	points  int
}

// searchResult is what a search found.
type searchResult struct {
	Target       compress.Target        `json:"target"`
	Points       []compress.SearchPoint `json:"points"` // by size
	Chosen       string                 `json:"chosen,omitempty"`
	Refused      map[string]string      `json:"refused,omitempty"` // methods that do not serve the network, and why
	Stopped      map[string]string      `json:"stopped,omitempty"` // methods whose smaller points were left out, and why
	Sensitivity  []compress.SiteEffects `json:"sensitivity"`
	QualityName  string                 `json:"quality_is"`
	FloatBytes   int64                  `json:"float_bytes"`
	FloatQuality float64                `json:"float_quality"`
	LatencyModel string                 `json:"latency_model"`
}

// newSearchTarget reads the flags of a search.
func newSearchTarget(f compressFlags, given func(string) bool) (*searchTarget, error) {
	t := &searchTarget{points: f.points, abits: cmp.Or(f.abits, 8)}
	for _, flag := range []string{"bits", "opset"} {
		if given(flag) && flag == "bits" {
			return nil, usageErrorf("--bits is what a search finds; leave it out, or give --method and --bits without a budget")
		}
	}
	var err error
	if f.size != "" {
		if s, ok := strings.CutSuffix(f.size, "%"); ok {
			if t.share, err = parseShare(s); err != nil {
				return nil, usageErrorf("--size %s: %v", f.size, err)
			}
		} else if t.Bytes, err = parseBytes(f.size); err != nil {
			return nil, usageErrorf("--size %s: %v, or a share such as 25%%", f.size, err)
		}
	}
	if f.latency != "" {
		s, ok := strings.CutSuffix(f.latency, "%")
		if t.Latency, err = parseShare(s); err != nil || !ok {
			return nil, usageErrorf("--latency %s: write a share of the original's time, such as 25%%", f.latency)
		}
		if f.abits == 0 {
			t.abits = 0 // the wider operand sets the time, so activations follow the weights
		}
	}
	t.Drop, t.HasDrop, t.Quality = f.maxDrop, given("max-drop"), f.accuracy
	switch {
	case f.maxDrop < 0 || f.maxDrop > 100 || math.IsNaN(f.maxDrop):
		return nil, usageErrorf("--max-drop %g; accepted: 0 to 100 percentage points", f.maxDrop)
	case f.accuracy < 0 || f.accuracy > 100 || math.IsNaN(f.accuracy):
		return nil, usageErrorf("--accuracy %g; accepted: 0 to 100 per cent", f.accuracy)
	case f.points < 1 || f.points > 64:
		return nil, usageErrorf("--points %d; accepted: 1 to 64", f.points)
	case t.abits != 0 && t.abits != 32 && (t.abits < 2 || t.abits > 8):
		return nil, usageErrorf("--abits %d; accepted: 2 to 8, or 32 for float", f.abits)
	}
	if f.method == "" {
		if len(f.set)+len(f.granularity)+len(f.softmax) > 0 {
			return nil, usageErrorf("--set is for one method; name it with --method")
		}
		for i := range compressors {
			if compressors[i].search {
				t.methods = append(t.methods, &compressors[i])
			}
		}
		return t, nil
	}
	for name := range strings.SplitSeq(f.method, ",") {
		row, err := findCompressor(strings.TrimSpace(name))
		if err != nil {
			return nil, usageErrorf("%v", err)
		}
		t.methods = append(t.methods, row)
	}
	if len(f.set) > 0 && len(t.methods) > 1 {
		return nil, usageErrorf("--set is for one method; --method names %d", len(t.methods))
	}
	return t, nil
}

func parseShare(s string) (float64, error) {
	v, err := strconv.ParseFloat(strings.TrimSpace(s), 64)
	if err != nil || !(v > 0) || v > 100 {
		return 0, errors.New("a share is above 0 and at most 100 per cent")
	}
	return v / 100, nil
}

// calibrationCases is how many cases are drawn: what the most demanding method wants.
func (t *searchTarget) calibrationCases() (n int) {
	for _, m := range t.methods {
		if m.cases < 0 {
			return -1
		}
		n = max(n, m.cases)
	}
	return cmp.Or(n, searchCases)
}

// needsExamples names the methods that calibrate.
func (t *searchTarget) needsExamples() (names []string) {
	for _, m := range t.methods {
		if m.cases != 0 {
			names = append(names, m.name)
		}
	}
	return names
}

// recipe makes the recipe of a method with the given bits of each site.
func (t *searchTarget) recipe(f compressFlags, m *compressor, bits map[string]int) (*compress.Recipe, error) {
	set, err := parseSet(f.set)
	if err != nil {
		return nil, err
	}
	count := map[int]int{}
	for _, b := range bits {
		count[b]++
	}
	most := slices.MaxFunc(slices.Sorted(maps.Keys(count)), func(a, b int) int { return cmp.Compare(count[a], count[b]) })
	s := compress.Part{Method: m.name, Bits: most, ActBits: cmp.Or(t.abits, most), Include: f.include, Exclude: f.exclude, Set: set}
	if m.weightOnly {
		s.ActBits = 32
	}
	for site, b := range bits {
		if b != most {
			if s.Sites == nil {
				s.Sites = map[string]compress.Bits{}
			}
			to := compress.Bits{Weight: b}
			if t.abits == 0 && !m.weightOnly {
				to.Act = b
			}
			s.Sites[site] = to
		}
	}
	r := &compress.Recipe{Seed: f.seed, Cases: cmp.Or(f.calibCases, t.calibrationCases()), Preprocess: f.preprocess, Opset: f.opset, Steps: []compress.Part{s}}
	return r, settleRecipe(r)
}

// recipes are stand-ins for the runs of a search, to forecast them: the bits of each are not known before.
func (t *searchTarget) recipes(f compressFlags, net *nn.Network) (out []*compress.Recipe, err error) {
	sites, err := t.sites(f, net)
	if err != nil {
		return nil, err
	}
	for _, m := range t.methods {
		lo, hi := m.weightBits()
		for i := range t.points {
			bits := map[string]int{}
			for _, n := range sites {
				bits[n.Name] = min(max(searchBits[i%len(searchBits)], lo), hi)
			}
			r, err := t.recipe(f, m, bits)
			if err != nil {
				return nil, usageErrorf("%v", err)
			}
			out = append(out, r)
		}
	}
	return out, nil
}

// sites are those that the search gives bits: the selected dense layers and convolutions whose weight is plain.
func (t *searchTarget) sites(f compressFlags, net *nn.Network) (out []*nn.Node, err error) {
	r := &compress.Recipe{Steps: []compress.Part{{Method: "search", Include: f.include, Exclude: f.exclude}}}
	chosen, err := r.Assign(net)
	if err != nil {
		return nil, usageErrorf("%v", err)
	}
	for _, n := range net.Sites() {
		switch n.Op.(type) {
		case nn.Dense, nn.Conv:
			if chosen[0][n.Name] && nn.IsPlain(n.Op) {
				out = append(out, n)
			}
		}
	}
	if len(out) == 0 {
		return nil, errors.New("the network has no dense layer and no convolution to search bits for")
	}
	return out, nil
}

// search tries methods and bits, prints the frontier, and writes the chosen point.
func (c *compression) search(ctx context.Context, m *material) error {
	t := c.target
	if t.share > 0 {
		t.Bytes = int64(t.share * float64(compress.Size(m.net)))
	}
	sites, err := t.sites(c.compressFlags, m.net)
	if err != nil {
		return fmt.Errorf("%s: %w", c.model, err)
	}
	if c.memory > 0 {
		recipes, err := t.recipes(c.compressFlags, m.net)
		if err != nil {
			return err
		}
		if _, err := c.plan(ctx, m, recipes); err != nil {
			return err
		}
	}
	var names []string
	for _, row := range t.methods {
		names = append(names, row.name)
	}
	journal, err := c.openJournal(m, fmt.Sprint("search ", *t, names, c.include, c.exclude, c.set, c.seed, c.eval, c.evalCases, c.labels))
	if err != nil {
		return err
	}
	r := &compressResult{}
	return closeJournal(journal, func() error {
		s, err := c.explore(ctx, m, sites, journal)
		if err != nil {
			return fmt.Errorf("%s: %w", c.model, err)
		}
		i, err := t.Choose(s.Points)
		if err != nil {
			d := s.document(c)
			if werr := c.emit(s, func(w io.Writer) error { return d.WriteText(w, c.width()) }); werr != nil {
				return werr
			}
			if c.report != "none" {
				if werr := d.Save(c.report); werr != nil {
					return werr
				}
			}
			return fmt.Errorf("%s: %w; nothing was written", c.model, err)
		}
		p := s.Points[i]
		s.Chosen, r.Search = p.Name, s
		run, err := journal.Sub("run " + p.Name)
		if err != nil {
			return err
		}
		if err := c.compress(ctx, m, p.Recipe, run, r); err != nil {
			return err
		}
		return c.print(r)
	}())
}

// explore measures the sites, chooses allocations, and runs the methods on them.
func (c *compression) explore(ctx context.Context, m *material, sites []*nn.Node, journal *compress.Journal) (*searchResult, error) {
	t := c.target
	s := &searchResult{Target: t.Target, Refused: map[string]string{}, Stopped: map[string]string{}, LatencyModel: compress.LatencyModel, FloatBytes: compress.Size(m.net)}
	base := &compressResult{}
	bar := c.progress("original")
	want, width, _, err := c.outputsOf(ctx, m, m.net, bar)
	bar.Close()
	if err != nil {
		return nil, err
	}
	q, err := compress.Judge(want, want, m.judged.n, width, m.labels)
	if err != nil {
		return nil, err
	}
	base.Agreement, base.Accuracy, base.Embedding = q.Agreement, q.Accuracy, compress.Directions(m.net, want, width)
	quality, _, _, name := base.quality()
	s.FloatQuality, s.QualityName = 100*quality, strings.TrimSuffix(name, ", %")

	rungs := map[string][]map[string]int{} // by the bits that a method accepts
	for _, row := range t.methods {
		lo, hi := row.weightBits()
		var bits []int
		for _, b := range searchBits {
			if b >= lo && b <= hi {
				bits = append(bits, b)
			}
		}
		if len(bits) == 0 {
			bits = []int{hi}
		}
		key := fmt.Sprint(bits, row.weightOnly)
		if rungs[key] == nil {
			if rungs[key], err = c.allocations(ctx, m, sites, bits, row.weightOnly, journal, s); err != nil {
				return nil, err
			}
		}
		if err := c.climb(ctx, m, row, rungs[key], want, width, journal, s); err != nil {
			return nil, err
		}
	}
	if len(s.Points) == 0 {
		var why []string
		for _, name := range slices.Sorted(maps.Keys(s.Refused)) {
			why = append(why, s.Refused[name])
		}
		return nil, fmt.Errorf("no method serves the network: %s", strings.Join(why, "; "))
	}
	compress.MarkFrontier(s.Points)
	return s, nil
}

// allocations measures what each site costs alone and finds bits of all sites for a ladder of budgets, the largest first.
func (c *compression) allocations(ctx context.Context, m *material, sites []*nn.Node, bits []int, weightOnly bool, journal *compress.Journal, s *searchResult) ([]map[string]int, error) {
	t := c.target
	ref := m.net.Clone()
	if _, err := fold.BatchNorm(ref); err != nil {
		return nil, err
	}
	x := m.examples
	if x == nil {
		var err error
		if x, err = m.calib.load(drawCases(m.calib.n, searchCases, c.seed)); err != nil {
			return nil, err
		}
	} else if x.Len() > searchCases {
		var err error
		if x, err = x.Slice(0, searchCases, 0); err != nil {
			return nil, err
		}
	}
	chosen := map[string]bool{}
	var values []string
	for _, n := range sites {
		chosen[n.Name] = true
		values = append(values, ref.Node(n.Name).In[0])
	}
	ranges := map[string]compress.Range{}
	if t.abits == 0 && !weightOnly {
		found, err := compress.Ranges(ctx, m.backend, ref, x, min(m.batch, x.Len()), values...)
		if err != nil {
			return nil, err
		}
		for i, n := range sites {
			ranges[n.Name] = found[i]
		}
	}
	var forms []compress.Form
	for _, b := range bits {
		act := 32
		if len(ranges) > 0 {
			act = b
		}
		forms = append(forms, quant.RoundForm(compress.Bits{Weight: b, Act: act}, ranges))
	}
	sub, err := journal.Sub("sensitivity")
	if err != nil {
		return nil, err
	}
	steps := c.reporter("measuring sites", 0, 1)
	effects, err := compress.Sensitivity{
		Forms: forms, Select: func(n *nn.Node) bool { return chosen[n.Name] }, Batch: min(m.batch, x.Len()), Journal: sub,
		Key: fmt.Sprint("search", bits, t.abits), Progress: steps.step,
	}.Measure(ctx, m.backend, ref, x)
	steps.close()
	if err != nil {
		return nil, err
	}
	if s.Sensitivity == nil {
		s.Sensitivity = effects
	}
	loss := func(e compress.Effect) float64 { return e.KL }
	if slices.ContainsFunc(effects, func(e compress.SiteEffects) bool {
		return slices.ContainsFunc(e.Effects, func(e compress.Effect) bool { return e.Cosine < 0 })
	}) || s.QualityName == "cosine with the original" {
		loss = func(e compress.Effect) float64 { return 1 - e.Cosine }
	}
	cost, err := ref.Cost(1)
	if err != nil {
		return nil, err
	}
	values = nil
	shape := map[string][2]int{}
	for _, n := range sites {
		w := ref.Param(ref.Node(n.Name), "w").Value.Shape()
		shape[n.Name] = [2]int{w.Size(), w.Dimensions[0]}
	}
	size := func(site string, bits int) float64 {
		if t.Latency > 0 {
			act := cmp.Or(t.abits, bits)
			if weightOnly {
				act = 32
			}
			return float64(cost.ByNode[site]) * float64(max(bits, act)) / 32
		}
		return float64(compress.UniformBytes(shape[site][0], shape[site][1], bits))
	}
	return compress.Ladder(effects, bits, t.budgets(ref, sites, bits, size, cost.MACs), loss, size)
}

// budgets are sizes from the least to the most that the sites can take, evenly in the logarithm, and the target's own.
func (t *searchTarget) budgets(ref *nn.Network, sites []*nn.Node, bits []int, size func(string, int) float64, macs int64) (out []float64) {
	least, most, float := 0., 0., 0.
	for _, n := range sites {
		lo, hi := math.Inf(1), 0.
		for _, b := range bits {
			lo, hi = min(lo, size(n.Name, b)), max(hi, size(n.Name, b))
		}
		least, most = least+lo, most+hi
		float += 4 * float64(ref.Param(ref.Node(n.Name), "w").Value.Shape().Size())
	}
	for i := range t.points {
		f := 1.
		if t.points > 1 {
			f = float64(i) / float64(t.points-1)
		}
		out = append(out, least*math.Pow(most/max(least, 1), f)*(1+1e-12))
	}
	switch {
	case t.Latency > 0:
		cost := 0.
		full, err := ref.Cost(1)
		if err == nil {
			for _, n := range sites {
				cost += float64(full.ByNode[n.Name])
			}
		}
		out = append(out, t.Latency*float64(macs)-(float64(macs)-cost)) // what is not searched keeps its time
	case t.Bytes > 0:
		out = append(out, float64(t.Bytes)-(float64(compress.Size(ref))-float)) // what is not searched keeps its size
	}
	return slices.DeleteFunc(out, func(b float64) bool { return b < least })
}

// climb runs one method on the allocations, from much to little, until the quality is beyond use.
func (c *compression) climb(ctx context.Context, m *material, row *compressor, rungs []map[string]int, want []float32, width int, journal *compress.Journal, s *searchResult) error {
	t := c.target
	allowed := 30.
	if t.HasDrop {
		allowed = max(10, 10*t.Drop)
	}
	for _, bits := range slices.Backward(rungs) {
		recipe, err := t.recipe(c.compressFlags, row, bits)
		if err != nil {
			return usageErrorf("%v", err)
		}
		p := compress.SearchPoint{Name: pointName(row, recipe, bits, m.net), Method: row.name, Recipe: recipe}
		refused := ""
		piece := struct {
			Point   compress.SearchPoint
			Refused string
		}{}
		_, err = journal.Do("point "+p.Name+fmt.Sprint(bits), &piece, func() error {
			run, err := journal.Sub("run " + p.Name)
			if err != nil {
				return err
			}
			start := time.Now()
			res, err := c.apply(ctx, m, recipe, run)
			switch {
			case ctx.Err() != nil:
				return errors.Join(err, ctx.Err())
			case err != nil:
				refused = err.Error()
			default:
				p.Seconds = time.Since(start).Seconds()
				if err := c.measurePoint(ctx, m, res.Network, res.Sites, want, width, s, &p); err != nil {
					return err
				}
			}
			piece.Point, piece.Refused = p, refused
			return nil
		})
		if err != nil {
			return err
		}
		if piece.Refused != "" {
			s.Refused[row.name] = piece.Refused
			c.note("%s does not serve the network: %s", row.name, piece.Refused)
			return nil
		}
		p = piece.Point
		p.Recipe = recipe
		s.Points = append(s.Points, p)
		c.note("%s: %s, %s %s", p.Name, report.Bytes(p.Bytes), s.QualityName, pct(p.Quality/100))
		if p.Drop > allowed {
			s.Stopped[row.name] = fmt.Sprintf("smaller points were left out after a drop of %s points at %s", report.Number(p.Drop), report.Bytes(p.Bytes))
			return nil
		}
	}
	return nil
}

// measurePoint judges a compressed network beside the original's outputs.
func (c *compression) measurePoint(ctx context.Context, m *material, net *nn.Network, sites []compress.Site, want []float32, width int, s *searchResult, p *compress.SearchPoint) error {
	got, _, _, err := c.outputsOf(ctx, m, net, nil)
	if err != nil {
		return err
	}
	q, err := compress.Judge(want, got, m.judged.n, width, m.labels)
	if err != nil {
		return err
	}
	r := &compressResult{Agreement: q.Agreement, Bars: q.Bars, Accuracy: q.Accuracy, Embedding: compress.Directions(m.net, want, width)}
	v, bar, _, _ := r.quality()
	p.Quality, p.Bar, p.KL = 100*v, compress.Interval{Low: 100 * bar.Low, High: 100 * bar.High}, q.KL
	p.Drop = s.FloatQuality - p.Quality
	p.Bytes = compress.Size(net)
	bits := map[string]compress.Bits{}
	weights, sum := 0., 0.
	for _, site := range sites {
		bits[site.Name] = compress.Bits{Weight: site.WeightBits, Act: site.InputBits}
		if site.WeightBits < 32 {
			n := float64(site.FloatBytes) / 4
			weights, sum = weights+n, sum+n*float64(site.WeightBits)
		}
	}
	p.MeanBits = sum / max(weights, 1)
	f, err := compress.ForecastBits(m.net, bits)
	if err != nil {
		return err
	}
	p.Latency, p.BitOps = f.Latency, f.BitOps
	return nil
}

// pointName names a point by method and bits: "minmax W4A8", or the mean of the weights' bits when they are mixed.
func pointName(row *compressor, r *compress.Recipe, bits map[string]int, net *nn.Network) string {
	s := r.Steps[0]
	act := fmt.Sprintf("A%d", s.ActBits)
	if s.ActBits == 32 {
		act = ""
	}
	if len(s.Sites) == 0 {
		return fmt.Sprintf("%s W%d%s", row.name, s.Bits, act)
	}
	sum, n := 0., 0.
	for site, b := range bits {
		size := float64(net.Param(net.Node(site), "w").Value.Shape().Size())
		sum, n = sum+size*float64(b), n+size
	}
	if slices.ContainsFunc(slices.Collect(maps.Values(s.Sites)), func(b compress.Bits) bool { return b.Act != 0 }) {
		act = "A="
	}
	return fmt.Sprintf("%s W%.2f%s", row.name, sum/n, act)
}

// sections lay the frontier out.
func (s *searchResult) sections() []report.Section {
	plot := report.Scatter{
		Title: "Frontier", XLabel: "parameters, bytes", YLabel: s.QualityName + ", %", LogX: true, Frontier: true,
		Points: []report.Mark{{Label: "original", Group: "original", X: float64(s.FloatBytes), Y: s.FloatQuality, YLow: s.FloatQuality, YHigh: s.FloatQuality}},
	}
	t := report.Table{
		Title:   "Points of the search",
		Columns: []string{"", "parameters", "of float", s.QualityName + ", %", "95 % interval", "drop, points", "KL, nats", "bits", "latency share (model)", "seconds"},
	}
	for i, p := range s.Points {
		plot.Points = append(plot.Points, report.Mark{Label: p.Name, Group: p.Method, X: float64(p.Bytes), Y: p.Quality, YLow: p.Bar.Low, YHigh: p.Bar.High})
		name := p.Name
		if p.Name == s.Chosen {
			name += " ← chosen"
			t.Strong = append(t.Strong, i)
		}
		if p.Frontier {
			name = "* " + name
		}
		t.Rows = append(t.Rows, []string{
			name, report.Bytes(p.Bytes), pct(float64(p.Bytes) / float64(s.FloatBytes)), report.Number(p.Quality),
			report.Number(p.Bar.Low) + " to " + report.Number(p.Bar.High), report.Number(p.Drop), report.Number(p.KL), fmt.Sprintf("%.2f", p.MeanBits),
			fmt.Sprintf("%.3f", p.Latency), report.Number(p.Seconds),
		})
	}
	t.Note = "* on the frontier: no other point is as small and as good. The points are chosen and judged on the same cases, which flatters the chosen one a little. " + strings.ToUpper(s.LatencyModel[:1]) + s.LatencyModel[1:] + "."
	out := []report.Section{plot, t}
	var notes []string
	for _, name := range slices.Sorted(maps.Keys(s.Refused)) {
		notes = append(notes, fmt.Sprintf("%s does not serve the network: %s", name, s.Refused[name]))
	}
	for _, name := range slices.Sorted(maps.Keys(s.Stopped)) {
		notes = append(notes, name+": "+s.Stopped[name])
	}
	if len(notes) > 0 {
		out = append(out, report.Text{Title: "Methods left out", Paragraphs: notes})
	}
	return out
}

// document is the report of a search that chose nothing.
func (s *searchResult) document(c *compression) *report.Document {
	d := &report.Document{Title: "Search for a smaller " + c.model, Subtitle: "No point meets the target; nothing was written.", Facts: []report.Fact{{Name: "Command", Value: "lathe " + strings.Join(c.args, " ")}}}
	d.Add(s.sections()...)
	return d
}

package norm

import (
	"context"
	"fmt"
	"math"
	"path/filepath"

	"github.com/lathe-ml/lathe/data"
	method "github.com/lathe-ml/lathe/design/norm"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/internal/stat"
	"github.com/lathe-ml/lathe/lab"
	"github.com/lathe-ml/lathe/lab/exp/recipe"
	"github.com/lathe-ml/lathe/learn/optim"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// evoNormRecipe is what the results depend on.
type evoNormRecipe struct {
	Width  int // of the network of the layers' comparison
	Groups int
	B64    recipe.Images // large batches
	B4     recipe.Images // small ones
	Search evoSearchRecipe
}

// evoSearchRecipe is the evolution on images of 7×7 pixels.
type evoSearchRecipe struct {
	Train, Validation, Test int // images
	Width, Groups           int
	Batch                   int
	LR                      float64
	Steps                   int // of a layer's training; the quality test looks at its end
	Window, Tournament      int
	Fresh                   float64
	Proposals               int
	LongProposals           int // of the search that has the time which a user would give it
	LongWindow              int
	LongTournament          int
	LongFresh               float64
	Retrained               int // best layers that are trained again, on networks of RetrainWidth for RetrainSteps
	RetrainWidth            int
	RetrainSteps            int
	Sampled                 int // random layers for the measure of the quality test
	StabilitySteps          int
	MinAccuracy             float64 // of the quality test; 0: twice that of guessing
	Networks                int
	References              []string // layers that are trained as the found ones are
}

func evoNormRecipeOf(s lab.Scale) evoNormRecipe {
	images := func(batch, steps int, lr float64) recipe.Images {
		return recipe.Images{
			TrainN: 12_000, TestN: 4_000, Pool: true, Standardize: true,
			Loop: recipe.Loop{Batch: batch, Steps: steps, LR: lr, Optimizer: optim.SGD{Momentum: .9, Nesterov: true, Decay: 1e-4}},
		}
	}
	r := evoNormRecipe{
		Width: 8, Groups: 4, B64: images(64, 300, .1), B4: images(4, 600, .02),
		Search: evoSearchRecipe{
			Train: 6_000, Validation: 1_000, Test: 4_000, Width: 6, Groups: 2, Batch: 32, LR: .1, Steps: 100, Window: 20, Tournament: 5, Fresh: .3,
			Proposals: 400, LongProposals: 3_000, LongWindow: 200, LongTournament: 50, LongFresh: .2, Retrained: 5, RetrainWidth: 12, RetrainSteps: 300, Sampled: 40, StabilitySteps: 100,
			Networks: 3, References: []string{"bn-relu", "bn-silu", "gn-relu", "relu", "b0", "s0"},
		},
	}
	if s == lab.Smoke {
		for _, i := range []*recipe.Images{&r.B64, &r.B4} {
			i.TrainN, i.TestN, i.Loop.Steps, i.Loop.Batch = 200, 50, 2, min(i.Loop.Batch, 8)
		}
		r.Width = 4
		z := &r.Search
		z.Train, z.Validation, z.Test, z.Width, z.Batch, z.Steps, z.Proposals, z.LongProposals, z.MinAccuracy, z.Networks = 200, 50, 50, 4, 4, 3, 30, 36, .02, 2
		z.Retrained, z.RetrainWidth, z.RetrainSteps, z.Sampled, z.StabilitySteps, z.References = 1, 4, 3, 2, 2, []string{"bn-relu", "relu"}
	}
	return r
}

// evoBaselines are what the layers are compared with; groups are those of the group norm.
func evoBaselines(groups int) map[string]zoo.NormAct {
	return map[string]zoo.NormAct{
		"bn-relu": {Norm: nn.BatchNorm{}},
		"bn-silu": {Norm: nn.BatchNorm{}, Act: nn.SiLU},
		"gn-relu": {Norm: nn.GroupNorm{Groups: groups}},
		"relu":    {},
	}
}

// EvoNorm compares the six layers with batch norm, group norm and none at batch sizes 64 and 4, and lets evolution find
// layers of its own on three small networks (arXiv:2004.02967, sections 3 and 4).
func EvoNorm() lab.Experiment {
	e := lab.Experiment{
		Method: "evonorm",
		Title:  "pre-activation ResNet-8 on Fashion-MNIST at batch 64 and 4; evolution of layers on three small networks",
		Recipe: []evoNormRecipe{evoNormRecipeOf(lab.Smoke), evoNormRecipeOf(lab.Full)},
	}
	accuracy := func(m lab.Metrics, layer string, batch int) float64 {
		return m.Get(fmt.Sprintf("%s-b%d", layer, batch), "accuracy")
	}
	gap := func(a, b string, batch int) func(lab.Metrics) float64 {
		return func(m lab.Metrics) float64 { return accuracy(m, a, batch) - accuracy(m, b, batch) }
	}
	e.Claims = []lab.Claim{
		{
			ID: "C1", Text: "batch 64: the better of B0 and B1 is at most 2 points below BN-ReLU", Paper: "on par with BN-ReLU or better", Unit: "points",
			Measure: func(m lab.Metrics) float64 {
				return math.Max(accuracy(m, "b0", 64), accuracy(m, "b1", 64)) - accuracy(m, "bn-relu", 64)
			}, Bound: lab.AtLeast(-2),
		},
		{ID: "C2a", Text: "batch 64: S0 is 1 point above GN-ReLU", Paper: "above group norm", Unit: "points", Measure: gap("s0", "gn-relu", 64), Bound: lab.AtLeast(1)},
		{ID: "C2b", Text: "batch 4: S0 is 4 points above GN-ReLU", Paper: "above group norm", Unit: "points", Measure: gap("s0", "gn-relu", 4), Bound: lab.AtLeast(4)},
		{
			ID: "C3", Text: "from batch 64 to batch 4, S0 gains 3 points on BN-ReLU", Paper: "BN-ReLU falls with the batch, S0 does not", Unit: "points",
			Measure: func(m lab.Metrics) float64 {
				return gap("s0", "bn-relu", 4)(m) - gap("s0", "bn-relu", 64)(m)
			}, Bound: lab.AtLeast(3),
		},
		{
			ID: "C4a", Text: "of random layers that use x, 80 % fail the quality test", Paper: "most candidates are rejected", Unit: "%",
			Measure: func(m lab.Metrics) float64 { return m.Get("protocols", "quality_rejects") }, Bound: lab.AtLeast(80),
		},
		{
			ID: "C4b", Text: "the stability test rejects ReLU alone and x², and passes BN-ReLU, B0 and S0: five right verdicts", Paper: "unstable layers are rejected", Unit: "of 5",
			Measure: func(m lab.Metrics) float64 { return m.Get("protocols", "stability_right") }, Bound: lab.AtLeast(5),
		},
		{
			ID: "C5a", Text: "the best layer of the Pareto evolution is at least as good as that of random search, both retrained", Paper: "random search is worse", Unit: "points",
			Measure: func(m lab.Metrics) float64 {
				return m.Get("evolution-pareto", "retrained") - m.Get("random-search", "retrained")
			}, Bound: lab.AtLeast(0),
		},
		{
			ID: "C5b", Text: "the best layer of the Pareto evolution is 5 points above ReLU alone, both retrained", Paper: "(ablation)", Unit: "points",
			Measure: func(m lab.Metrics) float64 {
				return m.Get("evolution-pareto", "retrained") - m.Get("references", "retrained_relu")
			}, Bound: lab.AtLeast(5),
		},
		{
			ID: "C6", Text: "the best layer of a longer evolution is at least as good as BN-ReLU on the search's own tasks", Paper: "found layers are on par with BN-ReLU or better", Unit: "points",
			Measure: func(m lab.Metrics) float64 {
				return m.Get("evolution-long", "best_found") - m.Get("references", "found_bn-relu")
			}, Bound: lab.AtLeast(0),
		},
	}
	layers := []string{"bn-relu", "bn-silu", "gn-relu", "relu"}
	for _, l := range method.EvoLayers() {
		layers = append(layers, string(l))
	}
	for _, batch := range []int{64, 4} {
		for i, l := range layers {
			e.Arms = append(e.Arms, lab.Arm{
				Name: fmt.Sprintf("%s-b%d", l, batch), Baseline: i < 4,
				Run: func(ctx context.Context, t *lab.Trial) error { return evoClassifier(ctx, t, l, batch) },
			})
		}
	}
	e.Arms = append(
		e.Arms,
		lab.Arm{Name: "protocols", Run: evoProtocols},
		lab.Arm{Name: "references", Baseline: true, Run: evoReferences},
		lab.Arm{Name: "random-search", Baseline: true, Run: evoSearch(func(o *method.SearchOptions) { o.RandomOnly = true }, 3)},
		lab.Arm{Name: "evolution-pareto", Run: evoSearch(func(*method.SearchOptions) {}, 3)},
		lab.Arm{Name: "evolution-average", Run: evoSearch(func(o *method.SearchOptions) { o.Average = true }, 3)},
		lab.Arm{Name: "evolution-one-network", Run: evoSearch(func(*method.SearchOptions) {}, 1)},
		lab.Arm{Name: "evolution-long", Run: evoSearch(nil, 3)},
	)
	return e
}

// evoClassifier trains the pre-activation ResNet-8 with one layer.
func evoClassifier(ctx context.Context, t *lab.Trial, layer string, batch int) error {
	r := evoNormRecipeOf(t.Scale)
	images := r.B64
	if batch == 4 {
		images = r.B4
	}
	sets, err := images.Sets(ctx, t)
	if err != nil {
		return err
	}
	normAct, ok := evoBaselines(r.Groups)[layer]
	if !ok {
		normAct.Norm = method.EvoNorm{Layer: method.EvoLayer(layer), Groups: r.Groups}
	}
	net, err := zoo.PreActResNet(zoo.PreActResNetOptions{Size: sets.Train.H, Width: r.Width, NormAct: normAct, Seed: t.Seed})
	if err != nil {
		return err
	}
	if err := images.Train(ctx, t, net, sets); err != nil {
		return err
	}
	nll, accuracy, err := images.Evaluate(t, net, sets)
	t.Record("accuracy", accuracy)
	t.Record("nll", nll)
	return err
}

// evoImages are the search's images: two disjoint parts of the training set, and test images.
type evoImages struct{ train, validation, test *data.Images }

func (z evoSearchRecipe) images(ctx context.Context, t *lab.Trial) (evoImages, error) {
	v, err := t.Shared("search-images", func() (any, error) {
		all, err := data.FashionMNIST(ctx, true)
		if err != nil {
			return nil, err
		}
		test, err := data.FashionMNIST(ctx, false)
		if err != nil {
			return nil, err
		}
		idx, rest, err := all.Stratified(z.Train, t.Seed)
		if err != nil {
			return nil, err
		}
		train, err := all.Subset(idx)
		if err != nil {
			return nil, err
		}
		left, err := all.Subset(rest)
		if err != nil {
			return nil, err
		}
		idx, _, err = left.Stratified(z.Validation, t.Seed)
		if err != nil {
			return nil, err
		}
		validation, err := left.Subset(idx)
		if err != nil {
			return nil, err
		}
		small := func(m *data.Images) *data.Images { return m.Pool2().Pool2() }
		return evoImages{small(train), small(validation), small(test.First(z.Test))}, nil
	})
	if err != nil {
		return evoImages{}, err
	}
	return v.(evoImages), nil
}

// archs are the networks of a width on which layers are judged.
func (z evoSearchRecipe) archs(m evoImages, width int) []method.Arch {
	return method.ProxyArchs(m.train.H, m.train.C, m.train.Classes(), width)[:z.Networks]
}

// searched is the proxy of the search: small networks, few steps.
func (z evoSearchRecipe) searched(seed uint64) method.ProxyOptions {
	return method.ProxyOptions{
		Layer: method.EvoOptions{Groups: z.Groups}, Batch: z.Batch, LR: z.LR, Steps: z.Steps, MinAccuracy: z.MinAccuracy, StabilitySteps: z.StabilitySteps, Seed: seed,
	}
}

// retrained are proxies of the wider networks, with a falling rate, which score by validation and by test images.
func (z evoSearchRecipe) retrained(t *lab.Trial, m evoImages) (validation, test *method.Proxy, err error) {
	o := z.searched(t.Seed)
	o.Steps, o.Cosine = z.RetrainSteps, true
	archs := z.archs(m, z.RetrainWidth)
	if validation, err = method.NewProxy(t.Backend, archs, method.ProxyData{Train: m.train, Validation: m.validation}, o); err != nil {
		return nil, nil, err
	}
	test, err = method.NewProxy(t.Backend, archs, method.ProxyData{Train: m.train, Validation: m.test}, o)
	return validation, test, err
}

// evoProtocols measures how the tests judge random layers and known ones.
func evoProtocols(ctx context.Context, t *lab.Trial) error {
	z := evoNormRecipeOf(t.Scale).Search
	m, err := z.images(ctx, t)
	if err != nil {
		return err
	}
	archs := z.archs(m, z.Width)
	proxy, err := method.NewProxy(t.Backend, archs, method.ProxyData{Train: m.train, Validation: m.validation}, z.searched(t.Seed))
	if err != nil {
		return err
	}
	space := method.Space{Batch: true}
	used, drawn, rejected := 0, 0, 0
	for ; used < z.Sampled; drawn++ {
		l := method.RandomLayer(rng.New(t.Seed, fmt.Sprintf("sample:%d", drawn)), space)
		n, err := l.Prune().Build(method.EvoOptions{Groups: z.Groups})
		if err != nil {
			continue // does not use x
		}
		used++
		j, err := proxy.Quality(ctx, zoo.NormAct{Norm: n})
		if err != nil {
			return err
		}
		if j.Verdict != method.Accepted {
			rejected++
		}
		t.Progress(used, z.Sampled)
	}
	t.Record("random_layers_using_x", 100*float64(used)/float64(drawn))
	t.Record("quality_rejects", 100*float64(rejected)/float64(used))

	right := 0
	for _, k := range []struct {
		layer string
		bad   bool
	}{{"relu", true}, {"square", true}, {"bn-relu", false}, {"b0", false}, {"s0", false}} {
		g, err := method.GraphOf(k.layer)
		if err != nil {
			return err
		}
		n, err := g.Build(method.EvoOptions{Groups: z.Groups})
		if err != nil {
			return err
		}
		bad, norms, err := proxy.Stability(ctx, zoo.NormAct{Norm: n})
		if err != nil {
			return err
		}
		if bad == k.bad {
			right++
		}
		peak := 0.
		for i, g := range norms {
			if math.IsNaN(g) || math.IsInf(g, 0) {
				g = math.MaxFloat32
			}
			peak = max(peak, g)
			t.Series("log10 of the gradient norm of "+k.layer+"/iteration", float64(i+1), math.Log10(max(g, 1e-12)))
		}
		t.Record("peak_"+k.layer, peak)
		t.Record("iterations_"+k.layer, float64(len(norms)))
	}
	t.Record("stability_right", float64(right))
	return nil
}

// evoReferences trains known layers as the searches train theirs, and retrains them.
func evoReferences(ctx context.Context, t *lab.Trial) error {
	z := evoNormRecipeOf(t.Scale).Search
	m, err := z.images(ctx, t)
	if err != nil {
		return err
	}
	search, err := method.NewProxy(t.Backend, z.archs(m, z.Width), method.ProxyData{Train: m.train, Validation: m.validation}, z.searched(t.Seed))
	if err != nil {
		return err
	}
	validation, test, err := z.retrained(t, m)
	if err != nil {
		return err
	}
	references := evoBaselines(z.Groups)
	for _, l := range []method.EvoLayer{method.B0, method.S0} {
		references[string(l)] = zoo.NormAct{Norm: method.EvoNorm{Layer: l, Groups: z.Groups}}
	}
	for i, name := range z.References {
		for _, p := range []struct {
			name  string
			proxy *method.Proxy
		}{{"found_", search}, {"retrained_", validation}, {"test_", test}} {
			scores, err := p.proxy.Train(ctx, references[name])
			if err != nil {
				return err
			}
			t.Record(p.name+name, 100*stat.Mean(scores))
		}
		t.Progress(i+1, len(z.References))
	}
	return nil
}

// evoSearch searches for layers and retrains the best ones; a nil set is the long search.
func evoSearch(set func(o *method.SearchOptions), networks int) func(ctx context.Context, t *lab.Trial) error {
	return func(ctx context.Context, t *lab.Trial) error {
		z := evoNormRecipeOf(t.Scale).Search
		m, err := z.images(ctx, t)
		if err != nil {
			return err
		}
		o := method.SearchOptions{
			Space: method.Space{Batch: true}, Proxy: z.searched(t.Seed), Window: z.Window, Tournament: z.Tournament, Fresh: z.Fresh,
			Proposals: z.Proposals, Seed: t.Seed, Archive: filepath.Join(t.CheckpointDir(), "search.json"),
		}
		if set != nil {
			set(&o)
		} else {
			o.Proposals, o.Window, o.Tournament, o.Fresh = z.LongProposals, z.LongWindow, z.LongTournament, z.LongFresh
			o.Parallel, o.Novel = 2, true
		}
		o.Observe = func(p method.Proposal, _ *method.SearchResult) { t.Progress(p.Number+1, o.Proposals) }
		archs := z.archs(m, z.Width)
		r, err := method.Search(ctx, t.Backend, archs[:min(networks, len(archs))], method.ProxyData{Train: m.train, Validation: m.validation}, o)
		if err != nil {
			return err
		}
		t.Record("accepted", float64(r.Count(method.Accepted)))
		for _, v := range []string{method.ByStatic, method.ByQuality, method.ByNaN, method.ByStability} {
			t.Record("rejected_"+v, float64(r.Count(v)))
		}
		t.Record("other_rejections", float64(r.Count(method.ByTimeout)+r.Count(method.ByError)))
		t.Record("front", float64(len(r.Front())))
		t.Record("seconds", r.Seconds)
		best := 0.
		for _, p := range r.Proposals {
			if p.Verdict == method.Accepted {
				best = max(best, 100*p.Mean())
			}
			if best > 0 && p.Number < z.Proposals && p.Number%5 == 4 {
				t.Series("best mean accuracy/proposal", float64(p.Number+1), best)
			}
		}
		t.Record("best_found", best)
		t.Image("search log: every proposal", SearchLogPicture(r))
		if networks > 1 {
			t.Image("Pareto front of the accepted layers", SearchFrontPicture(r))
		}
		validation, test, err := z.retrained(t, m)
		if err != nil {
			return err
		}
		ranked, err := method.Rerank(ctx, validation, r, z.Retrained, nil)
		if err != nil {
			return err
		}
		if len(ranked) == 0 {
			t.Logf("the search accepted no layer")
			t.Record("retrained", 0)
			t.Record("retrained_test", 0)
			return nil
		}
		t.Record("retrained", 100*ranked[0].Mean())
		for i, l := range ranked {
			t.Logf("%d. %.1f %% retrained, %.1f %% in the search: %s", i+1, 100*l.Mean(), 100*stat.Mean(l.Scores), l.Formula)
		}
		n, err := ranked[0].Layer.Prune().Build(method.EvoOptions{Groups: z.Groups})
		if err != nil {
			return err
		}
		scores, err := test.Train(ctx, zoo.NormAct{Norm: n})
		t.Record("retrained_test", 100*stat.Mean(scores))
		return err
	}
}

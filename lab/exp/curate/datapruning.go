// Package curate holds the experiments of data/curate.
package curate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/gomlx/gomlx/core/tensors"
	"gonum.org/v1/gonum/mat"

	"github.com/lathe-ml/lathe/data"
	method "github.com/lathe-ml/lathe/data/curate"
	"github.com/lathe-ml/lathe/internal/atomicfile"
	"github.com/lathe-ml/lathe/internal/metric"
	"github.com/lathe-ml/lathe/lab"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/learn/embed"
	"github.com/lathe-ml/lathe/learn/optim"
	"github.com/lathe-ml/lathe/nn"
)

// Experiments lists the experiments of the family.
func Experiments() []lab.Experiment { return []lab.Experiment{DataPruning()} }

// pruningSizes are the sizes of parts (b) and (c).
type pruningSizes struct {
	Pool, Test   int   // pictures
	Steps        int   // of every arm
	Keep         []int // percent
	Balance      float64
	Batch        int
	LR           float64
	Subsets      int // models on 70 % subsets
	SubsetSteps  int
	Influence    int // test pictures of the influence scores
	EarlyModels  int
	EarlySteps   int
	ForgetEpochs int
	Embedder     embed.RotationOptions
	Clusters     int
	ScarcePool   int
	ScarceEarly  int // steps before EL2N is taken in the scarce regime
}

func pruningSizesOf(s lab.Scale) pruningSizes {
	z := pruningSizes{
		Pool: 4000, Test: 5000, Steps: 800, Keep: []int{80, 60, 30}, Balance: .5, Batch: 50, LR: .05, Subsets: 20, SubsetSteps: 400,
		Influence: 1000, EarlyModels: 10, EarlySteps: 80, ForgetEpochs: 8, Embedder: embed.RotationOptions{Dim: 32, Epochs: 3},
		Clusters: 20, ScarcePool: 200, ScarceEarly: 40,
	}
	if s == lab.Smoke {
		z.Pool, z.Test, z.Steps, z.Subsets, z.SubsetSteps, z.Influence = 300, 300, 12, 3, 10, 100
		z.EarlyModels, z.EarlySteps, z.ForgetEpochs, z.ScarcePool, z.ScarceEarly = 2, 6, 2, 120, 4
		z.Embedder.Epochs = 1
	}
	return z
}

// metrics are the arms of part (b), random first; all but the last need labels or trained models.
var metrics = []string{
	"random", "el2n-1", "el2n-10", "forgetting", "memorization", "influence-max", "influence-sum-abs", "ddd", "active-learning",
	"supervised-prototypes", "prototypes",
}

var supervised = metrics[1 : len(metrics)-1]

// DataPruning compares ways to choose training examples (arXiv:2206.14486): perceptrons against their exact theory; ten
// difficulty metrics on Fashion-MNIST, hard examples kept; hard against easy where data are scarce.
func DataPruning() lab.Experiment {
	type recipe struct {
		Perceptrons perceptronSizes
		Pictures    pruningSizes
	}
	e := lab.Experiment{
		Method: "data-pruning",
		Title:  "perceptrons against their theory; ten difficulty metrics on 4,000 Fashion-MNIST pictures; hard against easy with 200",
		Recipe: []recipe{{perceptronSizesOf(lab.Smoke), pruningSizesOf(lab.Smoke)}, {perceptronSizesOf(lab.Full), pruningSizesOf(lab.Full)}},
		Claims: slices.Concat(perceptronClaims(), pictureClaims()),
	}
	for _, s := range selections {
		e.Arms = append(e.Arms, lab.Arm{Name: "perceptron-" + s, Baseline: s == "random", Run: func(ctx context.Context, t *lab.Trial) error {
			return perceptrons(ctx, t, s)
		}})
	}
	e.Arms = append(e.Arms, lab.Arm{Name: "full", Baseline: true, Run: fullPool})
	for _, m := range metrics {
		e.Arms = append(e.Arms, lab.Arm{Name: m, Baseline: m == "random", Run: func(ctx context.Context, t *lab.Trial) error {
			return pruned(ctx, t, m)
		}})
	}
	for _, s := range selections {
		e.Arms = append(e.Arms, lab.Arm{Name: "scarce-" + s, Baseline: s == "random", Run: func(ctx context.Context, t *lab.Trial) error {
			return scarce(ctx, t, s)
		}})
	}
	return e
}

func pictureClaims() []lab.Claim {
	at := func(m lab.Metrics, arm string, keep int) float64 {
		return m.Get(arm, fmt.Sprintf("accuracy_keep%d", keep))
	}
	best := func(m lab.Metrics, arms []string, keep int) float64 {
		b := math.Inf(-1)
		for _, a := range arms {
			v := at(m, a, keep)
			if math.IsNaN(v) {
				return v
			}
			b = max(b, v)
		}
		return b
	}
	worst := func(f func(keep int) float64) float64 { return min(f(80), f(60)) } // min keeps NaN
	return []lab.Claim{
		{
			ID: "C3a", Text: "60 % kept: the best metric's test accuracy exceeds random's by 0.3", Paper: "better than power law", Unit: "points",
			Measure: func(m lab.Metrics) float64 { return best(m, metrics[1:], 60) - at(m, "random", 60) }, Bound: lab.AtLeast(.3),
		},
		{
			ID: "C3b", Text: "60 % kept: at least 3 metrics beat random", Paper: "few of ten metrics beat random on ImageNet", Unit: "metrics",
			Measure: func(m lab.Metrics) float64 {
				n, random := 0., at(m, "random", 60)
				for _, a := range metrics[1:] {
					switch v := at(m, a, 60); {
					case math.IsNaN(v - random):
						return math.NaN()
					case v > random:
						n++
					}
				}
				return n
			}, Bound: lab.AtLeast(3),
		},
		{
			ID: "C4a", Text: "80 % and 60 % kept: self-supervised prototypes are at most 0.7 below the best supervised metric (the worse of both)", Paper: "about as good as the best supervised metrics", Unit: "points",
			Measure: func(m lab.Metrics) float64 {
				return worst(func(keep int) float64 { return at(m, "prototypes", keep) - best(m, supervised, keep) })
			}, Bound: lab.AtLeast(-.7),
		},
		{
			ID: "C4b", Text: "80 % and 60 % kept: self-supervised prototypes are at most 0.1 below random (the worse of both)", Paper: "above random", Unit: "points",
			Measure: func(m lab.Metrics) float64 {
				return worst(func(keep int) float64 { return at(m, "prototypes", keep) - at(m, "random", keep) })
			}, Bound: lab.AtLeast(-.1),
		},
		{
			ID: "C5a", Text: "200 pictures, 50 % kept: easy ones exceed hard ones by 0.5", Paper: "keep easy examples when data are scarce", Unit: "points",
			Measure: func(m lab.Metrics) float64 {
				return m.Get("scarce-easy", "accuracy") - m.Get("scarce-hard", "accuracy")
			}, Bound: lab.AtLeast(.5),
		},
		{
			ID: "C5b", Text: "4,000 pictures, the hardest 80 % kept (EL2N of ten models): at most 0.3 below all", Paper: "about 20 % can be dropped without loss", Unit: "points",
			Measure: func(m lab.Metrics) float64 { return m.Get("full", "accuracy") - at(m, "el2n-10", 80) }, Bound: lab.AtMost(.3),
		},
	}
}

// bench trains the one small network of parts (b) and (c) again and again: its parameters are drawn anew, its compiled
// step is not.
type bench struct {
	pruningSizes
	seed       uint64
	pool, test *data.Images
	rest       *data.Images // for the scarce regime, disjoint from pool

	mu      sync.Mutex
	net     *nn.Network
	trainer *learn.Trainer
	runner  *nn.Runner
	steps   int // of the schedule
}

const side = 14

// newNetwork is a convolutional network of 8, 16 and 32 channels and a linear head: 11,000 parameters, 0.15 million
// multiply-adds on 14×14 pictures.
func newNetwork(seed uint64) (*nn.Network, error) {
	b := nn.NewBuilder(seed)
	x := b.Image("image", side, side, 1)
	in := 1
	for i, out := range []int{8, 16, 32} {
		c := nn.Conv2D(out, 3, 1+min(i, 1))
		c.W = nn.Plain{Init: nn.FanIn(9*in, math.Sqrt2)}
		x = b.Add(fmt.Sprintf("act%d", i), nn.ReLU, b.Add(fmt.Sprintf("conv%d", i), c, x))
		in = out
	}
	return b.Finish(b.Add("head", nn.Dense{Out: 10}, b.Add("flat", nn.Reshape{Dims: []int{0, -1}}, x)))
}

func newBench(ctx context.Context, t *lab.Trial) (*bench, error) {
	v, err := t.Shared("bench", func() (any, error) {
		b := &bench{pruningSizes: pruningSizesOf(t.Scale), seed: t.Seed}
		train, err := data.FashionMNIST(ctx, true)
		if err != nil {
			return nil, err
		}
		test, err := data.FashionMNIST(ctx, false)
		if err != nil {
			return nil, err
		}
		idx, others, err := train.Stratified(b.Pool, t.Seed)
		if err != nil {
			return nil, err
		}
		if b.pool, err = train.Subset(idx); err != nil {
			return nil, err
		}
		if b.rest, err = train.Subset(others); err != nil {
			return nil, err
		}
		few, _, err := b.rest.Stratified(b.ScarcePool, t.Seed)
		if err != nil {
			return nil, err
		}
		if b.rest, err = b.rest.Subset(few); err != nil {
			return nil, err
		}
		b.pool, b.rest, b.test = b.pool.Pool2(), b.rest.Pool2(), test.First(b.Test).Pool2()
		if b.net, err = newNetwork(0); err != nil {
			return nil, err
		}
		b.trainer, err = learn.NewTrainer(t.Backend, &b.net.Params, learn.Classifier(b.net), learn.Options{
			Optimizer: optim.SGD{Momentum: .9}, LR: b.LR,
			Schedule: func(step int) float64 { return optim.Cosine(b.steps, 0, 0)(step) },
		})
		if err != nil {
			return nil, err
		}
		b.runner, err = nn.NewRunner(t.Backend, b.net, nn.RunOptions{})
		return b, err
	})
	if err != nil {
		return nil, err
	}
	return v.(*bench), nil
}

// run is one training from scratch.
type run struct {
	images     *data.Images
	steps      int // of the schedule
	stop       int // after so many of them; 0: all
	seed       uint64
	checkpoint string
	epoch      func() error // after every pass over the images, with the network as it is
	progress   func(done, total int)
}

// train leaves the trained network in b.net.
func (b *bench) train(ctx context.Context, r run) error {
	b.steps = r.steps
	if err := b.net.Reinit(r.seed); err != nil {
		return err
	}
	if err := b.trainer.Reset(r.seed); err != nil {
		return err
	}
	order, err := data.NewBatcher(r.images.N, min(b.Batch, r.images.N), r.seed)
	if err != nil {
		return err
	}
	o := learn.FitOptions{
		Steps: r.steps, Checkpoint: r.checkpoint, SaveSteps: 50,
		Batch: func(step int) ([]*tensors.Tensor, error) {
			idx := order.At(step)
			x, err := r.images.Float32(idx)
			if err != nil {
				return nil, err
			}
			y, err := r.images.LabelsTensor(idx)
			return []*tensors.Tensor{x, y}, err
		},
	}
	if r.stop > 0 {
		o.Steps = r.stop
	}
	if r.epoch != nil {
		o.After = append(o.After, func(_ *learn.Trainer, i learn.Info) error {
			if i.Step%order.StepsPerEpoch() != 0 {
				return nil
			}
			return r.epoch()
		})
	}
	if r.progress != nil {
		o.Progress = func(done, total int, _ learn.Info) { r.progress(done, total) }
	}
	_, err = b.trainer.Fit(ctx, o)
	return err
}

// logits evaluates b.net on pictures, [N, 10].
func (b *bench) logits(ctx context.Context, m *data.Images) ([]float32, error) {
	out := make([]float32, 0, 10*m.N)
	for idx := range data.Batches(m.N, 500) {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		x, err := m.Float32(idx)
		if err != nil {
			return nil, err
		}
		v, err := b.runner.Run(x)
		if err != nil {
			return nil, err
		}
		out = append(out, nn.Floats(v[0])...)
	}
	return out, nil
}

// accuracy trains on pictures and returns the test accuracy in percent.
func (b *bench) accuracy(ctx context.Context, r run) (float64, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.train(ctx, r); err != nil {
		return 0, err
	}
	l, err := b.logits(ctx, b.test)
	if err != nil {
		return 0, err
	}
	a, err := metric.Accuracy(l, 10, ints(b.test.Labels))
	return 100 * a, err
}

func ints(x []int32) []int {
	out := make([]int, len(x))
	for i, v := range x {
		out[i] = int(v)
	}
	return out
}

func right(logits []float32, labels []int32) ([]bool, error) {
	c, err := metric.Classes(logits, 10)
	if err != nil {
		return nil, err
	}
	out := make([]bool, len(c))
	for i := range c {
		out[i] = c[i] == int(labels[i])
	}
	return out, nil
}

// modelSeed numbers the networks of a trial apart from each other.
func (b *bench) modelSeed(kind, k int) uint64 {
	return b.seed*1_000_000 + uint64(kind)*1000 + uint64(k)
}

// Kinds of networks, for modelSeed.
const (
	evaluated = iota
	early
	forgetful
	subset
	scarceEarly
)

// earlyProbs are the predictions of models on their own training pictures after a few steps, [model][picture][class].
func (b *bench) earlyProbs(ctx context.Context, images *data.Images, kind, models, stop int) ([][][]float64, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	rec := method.NewTrainRecorder(images.N, 10)
	for k := range models {
		if err := b.train(ctx, run{images: images, steps: b.Steps, stop: stop, seed: b.modelSeed(kind, k)}); err != nil {
			return nil, err
		}
		l, err := b.logits(ctx, images)
		if err != nil {
			return nil, err
		}
		if err := rec.Snapshot(l); err != nil {
			return nil, err
		}
	}
	return rec.Early(), nil
}

// forgetting trains one model for some epochs and counts what it forgets.
func (b *bench) forgetting(ctx context.Context) ([]float64, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	rec := method.NewTrainRecorder(b.pool.N, 10)
	all, labels := data.Range(b.pool.N), ints(b.pool.Labels)
	err := b.train(ctx, run{
		images: b.pool, steps: b.ForgetEpochs * (b.pool.N / b.Batch), seed: b.modelSeed(forgetful, 0),
		epoch: func() error {
			l, err := b.logits(ctx, b.pool)
			if err != nil {
				return err
			}
			if err := rec.Observe(all, l, labels); err != nil {
				return err
			}
			rec.EndEpoch()
			return nil
		},
	})
	if err != nil {
		return nil, err
	}
	return rec.Forgetting()
}

// subsets trains models on random 70 % subsets. Each is kept among the reference networks, so that a run that was killed
// does not train them again.
func (b *bench) subsets(ctx context.Context, t *lab.Trial) (*method.SubsetScores, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var included, rightTrain, rightTest [][]bool
	var probs [][][]float64
	test := b.test.First(b.Influence)
	for k := range b.Subsets {
		in := method.Subset(b.pool.N, .7, t.Seed, k)
		var idx []int
		for i, v := range in {
			if v {
				idx = append(idx, i)
			}
		}
		images, err := b.pool.Subset(idx)
		if err != nil {
			return nil, err
		}
		seed := b.modelSeed(subset, k)
		recipe := map[string]any{
			"what": "data-pruning subset model", "pool": b.Pool, "seed": t.Seed, "model": k, "steps": b.SubsetSteps, "batch": b.Batch, "lr": b.LR,
			"backend": t.Backend.Name(),
		}
		net, err := t.Network(recipe, func() (*nn.Network, error) { return newNetwork(seed) }, func(n *nn.Network) error {
			if err := b.train(ctx, run{images: images, steps: b.SubsetSteps, seed: seed}); err != nil {
				return err
			}
			return copyParams(n, b.net)
		})
		if err != nil {
			return nil, err
		}
		if err := copyParams(b.net, net); err != nil {
			return nil, err
		}
		l, err := b.logits(ctx, b.pool)
		if err != nil {
			return nil, err
		}
		p, err := method.Softmax(l, 10)
		if err != nil {
			return nil, err
		}
		r, err := right(l, b.pool.Labels)
		if err != nil {
			return nil, err
		}
		if l, err = b.logits(ctx, test); err != nil {
			return nil, err
		}
		rt, err := right(l, test.Labels)
		if err != nil {
			return nil, err
		}
		included, rightTrain, rightTest, probs = append(included, in), append(rightTrain, r), append(rightTest, rt), append(probs, p)
		t.Progress(k+1, b.Subsets)
	}
	return method.SubsetStats(included, rightTrain, rightTest, probs)
}

func copyParams(dst, src *nn.Network) error {
	for p := range src.Params.All() {
		q := dst.Params.Get(p.Name)
		if q == nil {
			return fmt.Errorf("parameter %q is missing", p.Name)
		}
		if err := q.SetData(p.Data()); err != nil {
			return err
		}
	}
	return nil
}

// embedding embeds the pool by a network that learnt to tell rotations, without labels.
func (b *bench) embedding(ctx context.Context, t *lab.Trial) (*mat.Dense, error) {
	o := b.Embedder
	o.Seed = t.Seed
	recipe := map[string]any{"what": "rotation embedder", "data": "fashion-mnist 14x14 stratified", "pool": b.Pool, "options": o, "backend": t.Backend.Name()}
	net, err := t.Network(recipe, func() (*nn.Network, error) { return embed.RotationNetwork(side, 1, o) }, func(n *nn.Network) error {
		return embed.TrainRotation(ctx, t.Backend, n, b.pool, o)
	})
	if err != nil {
		return nil, err
	}
	e, err := embed.NewRotation(t.Backend, net)
	if err != nil {
		return nil, err
	}
	defer e.Close()
	return e.Embed(ctx, b.pool)
}

// shared is Trial.Shared with a type.
func shared[T any](t *lab.Trial, key string, f func() (T, error)) (T, error) {
	v, err := t.Shared(key, func() (any, error) { return f() })
	if err != nil {
		var zero T
		return zero, err
	}
	return v.(T), nil
}

// scores returns the difficulty of the pool's pictures by a metric.
func (b *bench) scores(ctx context.Context, t *lab.Trial, name string) ([]float64, error) {
	labels := ints(b.pool.Labels)
	switch name {
	case "random":
		r, err := method.Random{Seed: t.Seed}.Rank(ctx, &method.Examples{Features: mat.NewDense(b.pool.N, 1, nil)})
		if err != nil {
			return nil, err
		}
		return r.Score, nil
	case "el2n-1", "el2n-10":
		p, err := shared(t, "early", func() ([][][]float64, error) { return b.earlyProbs(ctx, b.pool, early, b.EarlyModels, b.EarlySteps) })
		if err != nil {
			return nil, err
		}
		if name == "el2n-1" {
			p = p[:1]
		}
		return method.EL2N(p, labels)
	case "forgetting":
		return b.forgetting(ctx)
	case "supervised-prototypes", "prototypes":
		z, err := shared(t, "embedding", func() (*mat.Dense, error) { return b.embedding(ctx, t) })
		if err != nil {
			return nil, err
		}
		if name == "supervised-prototypes" {
			return method.ClassPrototypeScores(z, labels)
		}
		s, _, err := method.PrototypeScores(z, b.Clusters, t.Seed)
		return s, err
	}
	s, err := shared(t, "subsets", func() (*method.SubsetScores, error) { return b.subsets(ctx, t) })
	if err != nil {
		return nil, err
	}
	switch name {
	case "memorization":
		return s.Memorization, nil
	case "influence-max":
		return s.InfluenceMax, nil
	case "influence-sum-abs":
		return s.InfluenceSumAbs, nil
	case "ddd":
		return s.DDD, nil
	case "active-learning":
		return s.ActiveLearning, nil
	}
	return nil, fmt.Errorf("no metric is called %q", name)
}

func fullPool(ctx context.Context, t *lab.Trial) error {
	b, err := newBench(ctx, t)
	if err != nil {
		return err
	}
	a, err := b.accuracy(ctx, run{images: b.pool, steps: b.Steps, seed: b.modelSeed(evaluated, 0), checkpoint: filepath.Join(t.CheckpointDir(), "full"), progress: t.Progress})
	if err != nil {
		return err
	}
	t.Record("accuracy", a)
	t.Series("accuracy", 100, a)
	return nil
}

// pruned keeps the hardest pictures by a metric at every share and trains on them. All arms train with the same seed,
// steps and rates.
func pruned(ctx context.Context, t *lab.Trial, name string) error {
	b, err := newBench(ctx, t)
	if err != nil {
		return err
	}
	done, err := readDone(t.CheckpointDir())
	if err != nil {
		return err
	}
	var score []float64
	for _, keep := range b.Keep {
		key := fmt.Sprintf("keep%d", keep)
		a, ok := done[key]
		if !ok {
			if score == nil {
				if score, err = b.scores(ctx, t, name); err != nil {
					return err
				}
			}
			kept, err := method.Select(score, ints(b.pool.Labels), float64(keep)/100, b.Balance, method.Hard)
			if err != nil {
				return err
			}
			images, err := b.pool.Subset(kept)
			if err != nil {
				return err
			}
			a, err = b.accuracy(ctx, run{images: images, steps: b.Steps, seed: b.modelSeed(evaluated, 0), checkpoint: filepath.Join(t.CheckpointDir(), key), progress: t.Progress})
			if err != nil {
				return err
			}
			done[key] = a
			if err := writeDone(t.CheckpointDir(), done); err != nil {
				return err
			}
		}
		t.Record("accuracy_"+key, a)
		t.Series("accuracy", float64(keep), a)
	}
	return nil
}

// readDone and writeDone keep the accuracies of the shares that an interrupted arm has finished.
func readDone(dir string) (map[string]float64, error) {
	done := map[string]float64{}
	b, err := os.ReadFile(filepath.Join(dir, "done.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return done, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &done)
	}
	return done, err
}

func writeDone(dir string, done map[string]float64) error {
	b, err := json.Marshal(done)
	if err != nil {
		return err
	}
	return atomicfile.WriteFile(filepath.Join(dir, "done.json"), b)
}

// scarce keeps half of a pool of few pictures, by EL2N of models of that pool.
func scarce(ctx context.Context, t *lab.Trial, selection string) error {
	b, err := newBench(ctx, t)
	if err != nil {
		return err
	}
	labels := ints(b.rest.Labels)
	var score []float64
	mode := method.Hard
	if selection == "random" {
		r, err := method.Random{Seed: t.Seed}.Rank(ctx, &method.Examples{Features: mat.NewDense(b.rest.N, 1, nil)})
		if err != nil {
			return err
		}
		score = r.Score
	} else {
		p, err := shared(t, "scarce", func() ([][][]float64, error) {
			return b.earlyProbs(ctx, b.rest, scarceEarly, b.EarlyModels, b.ScarceEarly)
		})
		if err != nil {
			return err
		}
		if score, err = method.EL2N(p, labels); err != nil {
			return err
		}
		if selection == "easy" {
			mode = method.Easy
		}
	}
	kept, err := method.Select(score, labels, .5, b.Balance, mode)
	if err != nil {
		return err
	}
	images, err := b.rest.Subset(kept)
	if err != nil {
		return err
	}
	a, err := b.accuracy(ctx, run{images: images, steps: b.Steps, seed: b.modelSeed(evaluated, 0), checkpoint: filepath.Join(t.CheckpointDir(), selection), progress: t.Progress})
	if err != nil {
		return err
	}
	t.Record("accuracy", a)
	return nil
}

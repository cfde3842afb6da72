package lab

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"image/png"
	"math"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/gomlx/compute"

	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/internal/filelock"
	"github.com/lathe-ml/lathe/lab/store"
)

// Options say how Run executes an experiment. The zero value is a smoke run of one seed that keeps nothing.
type Options struct {
	Scale Scale
	Seeds []uint64 // empty: 0, 1, 2 at full scale, 0 at smoke scale

	Backend     compute.Backend // nil: arms that need one fail
	BackendName string          // as recorded: "go", "xla"; empty: what Backend is called

	Store   *store.Store // where finished units are kept and looked up; nil: nowhere
	Fresh   bool         // measure again what is in the store already
	AnyCode bool         // take finished units that another build of the program measured

	Networks string   // folder of the cache of trained reference networks; empty: networks are trained and not kept
	Command  []string // as typed, for the record

	Observe func(Event) // called while the run goes on, from one goroutine at a time; may be nil
}

// DefaultSeeds returns the seeds 0 … n-1; n ≤ 0 means the scale's default, three at full scale and one at smoke scale.
func DefaultSeeds(scale Scale, n int) []uint64 {
	if n <= 0 {
		if n = 1; scale == Full {
			n = MinSeeds
		}
	}
	seeds := make([]uint64, n)
	for i := range seeds {
		seeds[i] = uint64(i)
	}
	return seeds
}

// unit is what one arm recorded at one seed.
type unit struct {
	arm     int // index in Experiment.Arms
	seed    uint64
	seconds float64
	metrics map[string]float64
	names   []string // of metrics, in the order of recording
	series  []store.Point
	images  []store.Blob
}

// Run executes every arm of an experiment at every seed and judges the claims. A unit of work is one arm at one seed; it
// is committed to the store when it is finished, and what the store has already (of the same recipe, backend and
// program) is not done again, so a run that was stopped or killed goes on where it was. An arm that fails does not stop
// the others: Run then returns both what could be measured and an error. When ctx is cancelled, Run returns its error
// once the arm that goes on has returned.
func Run(ctx context.Context, e Experiment, o Options) (*Result, error) {
	if err := e.Validate(); err != nil {
		return nil, err
	}
	if len(o.Seeds) == 0 {
		o.Seeds = DefaultSeeds(o.Scale, 0)
	}
	for i, s := range o.Seeds {
		if slices.Contains(o.Seeds[:i], s) {
			return nil, fmt.Errorf("experiment %s: seed %d is given twice", e.Method, s)
		}
	}
	recipe, err := json.Marshal(e.Recipe)
	if err != nil {
		return nil, fmt.Errorf("experiment %s: recipe: %w", e.Method, err)
	}
	if o.BackendName == "" && o.Backend != nil {
		o.BackendName = engine.Name(o.Backend)
	}
	r := &runner{Experiment: e, Options: o, recipe: recipe, config: hashHex(recipe), code: codeIdentity(), env: ThisEnvironment(o.BackendName), started: time.Now()}
	return r.run(ctx)
}

type runner struct {
	Experiment
	Options
	recipe  json.RawMessage
	config  string // hash of recipe
	code    string
	env     store.Environment
	started time.Time
	active  *store.Active
}

func (r *runner) run(ctx context.Context) (_ *Result, err error) {
	if r.Store != nil {
		lock, err := r.Store.Lock(fmt.Sprintf("try-%s-%s", r.Method, r.Scale))
		if errors.Is(err, filelock.ErrLocked) {
			return nil, fmt.Errorf("experiment %s: another process runs it at %s scale; wait for it or stop it (what it finished is kept)", r.Method, r.Scale)
		}
		if err != nil {
			return nil, err
		}
		defer lock.Unlock()
		if r.active, err = r.Store.Start(ctx, store.Run{Kind: "try", Method: r.Method, Command: r.Command, Config: r.recipe, Scale: r.Scale.String(), Seeds: r.Seeds, Env: r.env}); err != nil {
			return nil, err
		}
	}
	units, err := r.units(ctx)
	result := r.result(units)
	if r.active != nil {
		status, cause := store.Done, err
		switch {
		case ctx.Err() != nil:
			status, cause = store.Interrupted, errors.New("stopped")
		case err != nil:
			status = store.Failed
		}
		// The record is closed even though ctx may be cancelled.
		if ferr := r.active.Finish(context.WithoutCancel(ctx), status, result, cause); ferr != nil {
			err = errors.Join(err, ferr)
		}
		result.Run = r.active.ID
	}
	return result, err
}

// units brings all units together, from the store or by running them.
func (r *runner) units(ctx context.Context) ([]unit, error) {
	var todo []unit
	for i, seed := range r.Seeds {
		for j, arm := range r.Arms {
			if i == 0 || !arm.Once {
				todo = append(todo, unit{arm: j, seed: seed})
			}
		}
	}
	var done []unit
	var failed []error
	shared := &sharedValues{}
	for i, u := range todo {
		if i > 0 && todo[i-1].seed != u.seed {
			shared = &sharedValues{} // what the last seed needed may go
		}
		event := Event{Method: r.Method, Arm: r.Arms[u.arm].Name, Seed: u.seed, Index: i, Units: len(todo)}
		observe := func(e Event) {
			if r.Observe != nil {
				e.Method, e.Arm, e.Seed, e.Index, e.Units = event.Method, event.Arm, event.Seed, event.Index, event.Units
				r.Observe(e)
			}
		}
		if found, err := r.find(ctx, u); err == nil {
			observe(Event{Kind: UnitSkipped})
			done = append(done, found)
			continue
		} else if !errors.Is(err, store.ErrNotFound) {
			observe(Event{Kind: UnitLog, Message: fmt.Sprintf("measured again, for the stored result cannot be read: %v", err)})
		}
		if err := ctx.Err(); err != nil {
			return done, errors.Join(append(failed, err)...)
		}
		observe(Event{Kind: UnitStarted})
		u, err := r.execute(ctx, u, shared, observe)
		if err != nil {
			if ctx.Err() != nil {
				return done, errors.Join(append(failed, fmt.Errorf("experiment %s: %w", r.Method, ctx.Err()))...)
			}
			observe(Event{Kind: UnitFailed, Message: err.Error()})
			failed = append(failed, fmt.Errorf("experiment %s: arm %q, seed %d: %w", r.Method, event.Arm, u.seed, err))
			continue
		}
		observe(Event{Kind: UnitDone})
		done = append(done, u)
	}
	return done, errors.Join(failed...)
}

func (r *runner) key(u unit) store.UnitKey {
	return store.UnitKey{Method: r.Method, Scale: r.Scale.String(), Arm: r.Arms[u.arm].Name, Seed: u.seed, Config: r.config, Backend: r.BackendName, Version: r.code}
}

// find looks a finished unit up in the store.
func (r *runner) find(ctx context.Context, u unit) (unit, error) {
	if r.Store == nil || r.Fresh {
		return u, store.ErrNotFound
	}
	key := r.key(u)
	if r.AnyCode {
		key.Version = ""
	}
	ctx = context.WithoutCancel(ctx)
	stored, err := r.Store.FindUnit(ctx, key)
	if err != nil {
		return u, err
	}
	u = fromStore(stored, u.arm)
	list, err := r.Store.UnitArtefacts(ctx, stored.ID)
	if err != nil {
		return u, err
	}
	for _, a := range list {
		b, err := r.Store.Content(a)
		if err != nil {
			return u, err
		}
		u.images = append(u.images, store.Blob{Name: a.Name, Media: a.Media, Content: b})
	}
	return u, r.Store.Reuse(ctx, r.active.ID, stored.ID)
}

func fromStore(s store.Unit, arm int) unit {
	u := unit{arm: arm, seed: s.Key.Seed, seconds: s.Ended.Sub(s.Started).Seconds(), series: s.Series, metrics: map[string]float64{}}
	for _, m := range s.Metrics {
		u.metrics[m.Name] = m.Value
		u.names = append(u.names, m.Name)
	}
	return u
}

// execute runs one unit and stores it.
func (r *runner) execute(ctx context.Context, u unit, shared *sharedValues, observe func(Event)) (unit, error) {
	arm := r.Arms[u.arm]
	key := r.key(u)
	t := &Trial{Scale: r.Scale, Seed: u.seed, Backend: r.Backend, Arm: arm.Name, shared: shared, networks: r.Networks, observe: observe, ctx: ctx}
	if r.Store != nil {
		t.checkpoint = r.Store.CheckpointDir(key)
		if r.Fresh {
			if err := os.RemoveAll(t.checkpoint); err != nil {
				return u, err
			}
		}
	}
	started := time.Now()
	if err := call(ctx, arm, t); err != nil {
		if r.Store == nil && t.checkpoint != "" {
			os.RemoveAll(t.checkpoint)
		}
		return u, err
	}
	if err := ctx.Err(); err != nil {
		return u, err // an arm that returns nil because it was told to stop is not finished
	}
	if t.err != nil {
		return u, t.err
	}
	images, err := encode(t.images)
	if err != nil {
		return u, err
	}
	s := store.Unit{Key: key, Started: started, Ended: time.Now(), Images: images}
	for _, m := range t.metrics {
		s.Metrics = append(s.Metrics, store.Metric(m))
	}
	for _, p := range t.series {
		s.Series = append(s.Series, store.Point(p))
	}
	if r.Store != nil {
		if _, err := r.Store.SaveUnit(context.WithoutCancel(ctx), r.active.ID, s); err != nil {
			return u, err
		}
	}
	if t.checkpoint != "" {
		if err := os.RemoveAll(t.checkpoint); err != nil {
			return u, err
		}
	}
	u = fromStore(s, u.arm)
	u.images = images
	return u, nil
}

// call runs the arm and turns a panic into an error.
func call(ctx context.Context, arm Arm, t *Trial) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v", p)
			if os.Getenv("LATHE_DEBUG") != "" {
				err = fmt.Errorf("%w\n%s", err, debug.Stack())
			}
		}
	}()
	return arm.Run(ctx, t)
}

func encode(images []namedImage) (blobs []store.Blob, err error) {
	for _, m := range images {
		var b bytes.Buffer
		if err := png.Encode(&b, m.img); err != nil {
			return nil, fmt.Errorf("image %q: %w", m.name, err)
		}
		blobs = append(blobs, store.Blob{Name: m.name, Media: "image/png", Content: b.Bytes()})
	}
	return blobs, nil
}

// metrics gives the metrics of one seed, those of Once arms included.
type metrics map[string]map[string]float64

func (m metrics) Get(arm, metric string) float64 {
	if v, ok := m[arm][metric]; ok {
		return v
	}
	return math.NaN()
}

// result puts the units together and judges the claims.
func (r *runner) result(units []unit) *Result {
	res := &Result{
		Format: ResultFormat, Method: r.Method, Title: r.Title, Scale: r.Scale, Seeds: r.Seeds, Recipe: r.recipe,
		Command: r.Command, Environment: r.env, Code: r.code, Date: r.started.UTC().Format(time.DateOnly), units: units,
	}
	if string(r.recipe) == "null" {
		res.Recipe = nil
	}
	bySeed := make([]metrics, len(r.Seeds))
	for i := range bySeed {
		bySeed[i] = metrics{}
	}
	for j, arm := range r.Arms {
		a := ArmResult{Name: arm.Name, Baseline: arm.Baseline, Once: arm.Once}
		var names []string
		n := 0
		for _, u := range units {
			if u.arm != j {
				continue
			}
			n++
			a.Seconds += u.seconds
			for _, name := range u.names {
				if !slices.Contains(names, name) {
					names = append(names, name)
				}
			}
			for i, s := range r.Seeds {
				if s == u.seed || arm.Once {
					bySeed[i][arm.Name] = u.metrics
				}
			}
		}
		res.Seconds += a.Seconds
		for _, name := range names {
			m := MetricResult{Name: name}
			for i := range r.Seeds {
				if arm.Once && i > 0 {
					break
				}
				m.Values = append(m.Values, Value(bySeed[i].Get(arm.Name, name)))
			}
			m.summarise()
			a.Metrics = append(a.Metrics, m)
		}
		res.Arms = append(res.Arms, a)
	}
	for _, c := range r.Claims {
		values := make([]float64, len(r.Seeds))
		for i := range values {
			values[i] = measure(c, bySeed[i])
		}
		res.Verdicts = append(res.Verdicts, Judge(c, r.Scale, r.Seeds, values))
	}
	return res
}

// measure calls a claim's Measure; a panic counts as not measured.
func measure(c Claim, m Metrics) (v float64) {
	defer func() {
		if recover() != nil {
			v = math.NaN()
		}
	}()
	return c.Measure(m)
}

func hashHex(b []byte) string {
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:])
}

// quoteCommand joins arguments as one would type them.
func quoteCommand(args []string) string {
	q := make([]string, len(args))
	for i, a := range args {
		if a == "" || strings.ContainsAny(a, " \t\n'\"$`\\*?[]{}()<>|&;#~!") {
			a = "'" + strings.ReplaceAll(a, "'", `'\''`) + "'"
		}
		q[i] = a
	}
	return strings.Join(q, " ")
}

package lab

import (
	"context"
	"fmt"
	"image"
	"math"
	"os"
	"sync"

	"github.com/gomlx/compute"
)

// Trial is what one arm sees of one seed, and where it records what it measured. Its methods may be called from several
// goroutines. What it recorded is stored in one transaction when the arm returns without an error, and not at all otherwise.
type Trial struct {
	Scale   Scale
	Seed    uint64
	Backend compute.Backend // nil when the run was started without one (host algorithms only)
	Arm     string

	shared     *sharedValues
	networks   string // folder of the reference networks; empty: train, keep nothing
	checkpoint string
	observe    func(Event)
	ctx        context.Context // of the run, for waits inside the trial's methods

	mu      sync.Mutex
	metrics []Metric
	series  []Point
	images  []namedImage
	err     error
}

// Metric is a named final value of one arm and seed.
type Metric struct {
	Name  string
	Value float64
}

// Point is one point of a named curve.
type Point struct {
	Name string
	X, Y float64
}

type namedImage struct {
	name string
	img  image.Image
}

// Record keeps a final scalar: "accuracy", "bytes". A second value of the same name replaces the first. A value that is
// not finite is kept, and makes the claims that use it undecided.
func (t *Trial) Record(metric string, value float64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := range t.metrics {
		if t.metrics[i].Name == metric {
			t.metrics[i].Value = value
			return
		}
	}
	t.metrics = append(t.metrics, Metric{metric, value})
}

// Series adds a point to a curve: t.Series("loss", step, loss). Points that are not finite are dropped.
func (t *Trial) Series(metric string, x, y float64) {
	if !finite(x) || !finite(y) {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.series = append(t.series, Point{metric, x, y})
}

// Image keeps a picture for the report; it is stored as PNG. Pictures of one name from several arms stand side by side.
func (t *Trial) Image(name string, img image.Image) {
	if img == nil || img.Bounds().Empty() {
		t.Logf("image %q is empty and was not kept", name)
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.images = append(t.images, namedImage{name, img})
}

// Progress says that done of total steps of the arm are behind it.
func (t *Trial) Progress(done, total int) {
	t.emit(Event{Kind: UnitProgress, Done: done, Total: total})
}

// Logf says something worth reading while the arm runs.
func (t *Trial) Logf(format string, args ...any) {
	t.emit(Event{Kind: UnitLog, Message: fmt.Sprintf(format, args...)})
}

// Shared computes once per (experiment, seed, key) in this process what several arms need: data, a trained model. It must
// depend on nothing but the seed, the scale and the key, and nobody may change the value afterwards. An error is not
// kept: the next arm tries again.
func (t *Trial) Shared(key string, f func() (any, error)) (any, error) {
	return t.shared.get(key, f)
}

// CheckpointDir is a folder that survives a kill and is removed when the arm is done. It is created on first use; an arm
// that finds its checkpoint there continues from it.
func (t *Trial) CheckpointDir() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.checkpoint == "" {
		dir, err := os.MkdirTemp("", "lathe-checkpoint-")
		if err != nil {
			t.err = err
			return os.TempDir()
		}
		t.checkpoint = dir
		return dir
	}
	if err := os.MkdirAll(t.checkpoint, 0o755); err != nil {
		t.err = fmt.Errorf("checkpoint folder: %w", err)
	}
	return t.checkpoint
}

func (t *Trial) emit(e Event) {
	if t.observe != nil {
		e.Arm, e.Seed = t.Arm, t.Seed
		t.observe(e)
	}
}

// sharedValues holds what Trial.Shared computed for one seed of one experiment.
type sharedValues struct {
	mu     sync.Mutex
	values map[string]*sharedValue
}

type sharedValue struct {
	mu    sync.Mutex
	done  bool
	value any
}

func (s *sharedValues) get(key string, f func() (any, error)) (any, error) {
	s.mu.Lock()
	if s.values == nil {
		s.values = map[string]*sharedValue{}
	}
	v := s.values[key]
	if v == nil {
		v = &sharedValue{}
		s.values[key] = v
	}
	s.mu.Unlock()

	v.mu.Lock()
	defer v.mu.Unlock()
	if v.done {
		return v.value, nil
	}
	value, err := f()
	if err != nil {
		return nil, err
	}
	v.value, v.done = value, true
	return value, nil
}

func finite(x float64) bool { return !math.IsNaN(x) && !math.IsInf(x, 0) }

// NewTrial is a trial outside of an experiment, for the reference networks of experiments: seed 0, networks kept in a
// folder. What it records is lost.
func NewTrial(ctx context.Context, b compute.Backend, scale Scale, networks string) *Trial {
	return &Trial{Scale: scale, Backend: b, shared: &sharedValues{}, networks: networks, observe: func(Event) {}, ctx: ctx}
}

package learn

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"time"

	"github.com/gomlx/gomlx/core/tensors"
)

// ErrDiverged is returned when the loss is no longer a number.
var ErrDiverged = errors.New("the loss is no longer finite")

// Hook runs on the host between steps. It may read and change the parameters.
type Hook func(t *Trainer, info Info) error

// FitOptions say how long to train and what to do around the steps.
type FitOptions struct {
	Steps int // in all, steps of a resumed checkpoint included
	// Batch returns the batch of a step, counted from 0. It must depend on the step alone (data.Batcher does): that is
	// what makes a resumed run equal to one that was never stopped.
	Batch func(step int) ([]*tensors.Tensor, error)

	// Step does a step in place of Batch and Trainer.Step, for batches whose size changes or that are accumulated. What it
	// depends on beside the trainer must be in Extra.
	Step func(t *Trainer) (Info, error)
	// Extra, a pointer, is kept in the checkpoint as JSON and filled from it when a run is resumed.
	Extra any
	Done  func() bool // ends the training before Steps are done; nil: never

	Before []Hook // before every step; Info has the number of the step to come
	After  []Hook // after every step

	Checkpoint string        // file that is resumed if there, kept up to date, and removed at the end; "": none
	SaveEvery  time.Duration // time between checkpoints; 0: 20 s. One is always written when ctx ends
	SaveSteps  int           // steps between checkpoints, instead of the time
	Keep       bool          // keep the checkpoint at the end

	Progress func(done, total int, info Info) // after every step; nil: none
	// AllowDivergence goes on with a loss that is not finite; by default Fit stops with ErrDiverged.
	AllowDivergence bool
}

// Fit trains until Steps are done. When ctx ends it saves a checkpoint, if one is named, and returns ctx's error: at
// most the step under way is lost. Calling Fit again on an equal Trainer goes on bit for bit (on a deterministic
// backend).
func (t *Trainer) Fit(ctx context.Context, o FitOptions) (Info, error) {
	if (o.Batch == nil) == (o.Step == nil) || o.Steps < 0 {
		return Info{}, fmt.Errorf("learn: fit: want a batch function or one for steps, and at least 0 steps, got %d", o.Steps)
	}
	if o.Checkpoint != "" {
		if _, err := t.Load(o.Checkpoint, o.Extra); err != nil {
			return Info{}, err
		}
	}
	if o.SaveEvery == 0 {
		o.SaveEvery = 20 * time.Second
	}
	save := func() error {
		if o.Checkpoint == "" {
			return nil
		}
		return t.Save(o.Checkpoint, o.Extra)
	}
	info := Info{Step: t.step}
	saved := time.Now()
	for t.step < o.Steps && (o.Done == nil || !o.Done()) {
		if err := ctx.Err(); err != nil {
			if serr := save(); serr != nil {
				return info, fmt.Errorf("%w (and the checkpoint failed: %w)", err, serr)
			}
			return info, err
		}
		for _, h := range o.Before {
			if err := h(t, Info{Step: t.step + 1, LR: t.LR()}); err != nil {
				return info, err
			}
		}
		var err error
		if info, err = t.fitStep(o); err != nil {
			return info, err
		}
		if !o.AllowDivergence && (math.IsNaN(info.Loss) || math.IsInf(info.Loss, 0)) {
			return info, fmt.Errorf("learn: step %d: %w (%g); lower the learning rate or clip the gradient", info.Step, ErrDiverged, info.Loss)
		}
		for _, h := range o.After {
			if err := h(t, info); err != nil {
				return info, err
			}
		}
		if o.Progress != nil {
			o.Progress(t.step, o.Steps, info)
		}
		due := time.Since(saved) >= o.SaveEvery
		if o.SaveSteps > 0 {
			due = t.step%o.SaveSteps == 0
		}
		if due && t.step < o.Steps {
			if err := save(); err != nil {
				return info, err
			}
			saved = time.Now()
		}
	}
	if o.Checkpoint != "" {
		if o.Keep {
			return info, save()
		}
		if err := os.Remove(o.Checkpoint); err != nil && !errors.Is(err, os.ErrNotExist) {
			return info, err
		}
	}
	return info, nil
}

func (t *Trainer) fitStep(o FitOptions) (Info, error) {
	if o.Step != nil {
		return o.Step(t)
	}
	batch, err := o.Batch(t.step)
	if err != nil {
		return Info{}, fmt.Errorf("learn: batch of step %d: %w", t.step+1, err)
	}
	return t.Step(batch...)
}

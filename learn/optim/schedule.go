package optim

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
)

// Schedule gives the learning rate of a step, counted from 0, as a factor of the peak rate.
type Schedule func(step int) float64

// Constant is the peak rate throughout.
func Constant() Schedule { return func(int) float64 { return 1 } }

// Cosine rises linearly over the first warmup steps and falls along half a cosine from 1 to floor at the last step.
func Cosine(steps, warmup int, floor float64) Schedule {
	return func(step int) float64 {
		if step < warmup {
			return float64(step+1) / float64(warmup)
		}
		t := float64(step-warmup) / math.Max(1, float64(steps-warmup))
		return floor + (1-floor)*.5*(1+math.Cos(math.Pi*math.Min(t, 1)))
	}
}

// CosineSamples is a schedule by training cases instead of steps, for batches whose size changes: call it with the number
// of cases seen before the step. The factor is s/warmup below warmup, falls along half a cosine from 1 to floor between
// warmup and decay, and stays at floor (arXiv:2402.11215, experiments). The rate is not scaled with the batch.
func CosineSamples(decay, warmup int, floor float64) Schedule {
	return func(s int) float64 {
		switch {
		case s < warmup:
			return float64(s) / float64(warmup)
		case s > decay || decay <= warmup:
			return floor
		}
		return floor + (1-floor)*.5*(1+math.Cos(math.Pi*float64(s-warmup)/float64(decay-warmup)))
	}
}

// Linear rises over warmup steps and falls on a line from 1 to floor.
func Linear(steps, warmup int, floor float64) Schedule {
	return func(step int) float64 {
		if step < warmup {
			return float64(step+1) / float64(warmup)
		}
		t := math.Min(1, float64(step-warmup)/math.Max(1, float64(steps-warmup)))
		return 1 - (1-floor)*t
	}
}

// Step multiplies by gamma after every so many steps.
func Step(every int, gamma float64) Schedule {
	return func(step int) float64 { return math.Pow(gamma, float64(step/max(every, 1))) }
}

var schedules = map[string]func(steps int) Schedule{
	"constant": func(int) Schedule { return Constant() },
	"cosine":   func(n int) Schedule { return Cosine(n, min(100, n/10), 0) },
	"linear":   func(n int) Schedule { return Linear(n, min(100, n/10), 0) },
	"step":     func(n int) Schedule { return Step(max(n/3, 1), .1) },
}

// ScheduleByName returns a schedule over so many steps: constant; cosine or linear with a tenth of the steps, at most
// 100, of warm-up; step, a tenth after each third.
func ScheduleByName(name string, steps int) (Schedule, error) {
	if f := schedules[name]; f != nil {
		return f(steps), nil
	}
	return nil, fmt.Errorf("optim: there is no schedule %q; use one of %s", name, strings.Join(ScheduleNames(), ", "))
}

// SampleScheduleByName returns a schedule over so many training cases, to be called with the number of cases seen: cosine
// is CosineSamples with a tenth of them as warm-up, the others are ScheduleByName's on a thousand even parts.
func SampleScheduleByName(name string, samples int) (Schedule, error) {
	if name == "cosine" {
		return CosineSamples(samples, samples/10, 0), nil
	}
	const parts = 1000
	f, err := ScheduleByName(name, parts)
	if err != nil {
		return nil, err
	}
	return func(s int) float64 { return f(int(float64(s) / float64(max(samples, 1)) * parts)) }, nil
}

// ScheduleNames lists what ScheduleByName knows.
func ScheduleNames() []string { return slices.Sorted(maps.Keys(schedules)) }

// Names lists what ByName knows.
func Names() []string { return slices.Sorted(maps.Keys(optimizers)) }

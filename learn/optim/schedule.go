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

// ScheduleNames lists what ScheduleByName knows.
func ScheduleNames() []string { return slices.Sorted(maps.Keys(schedules)) }

// Names lists what ByName knows.
func Names() []string { return slices.Sorted(maps.Keys(optimizers)) }

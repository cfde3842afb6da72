// Package lab measures methods: it runs every arm of an experiment on the same seeds and data, pairs the results by
// seed, and gives each claim of the paper a verdict with its margin and its confidence interval. A claim that fails is
// reported as failing.
//
// The pieces are an [Experiment] (arms and claims, written under lab/exp), a [Trial] (what one arm of one seed sees and
// records), [Run] (which executes what is not in the store yet) and a [Result] (what came out, as written to
// docs/results and to the report).
package lab

import (
	"context"
	"fmt"
	"math"
	"regexp"
	"strings"
)

// Scale says how much work an experiment does.
type Scale int

const (
	// Smoke is about five seconds in all: every arm runs and every metric is recorded, but nothing is judged by it. The
	// tests of every change run it.
	Smoke Scale = iota
	// Full is what claims are judged on: at most about 15 minutes on two cores, all arms and seeds together.
	Full
)

// String returns "smoke" or "full".
func (s Scale) String() string {
	switch s {
	case Smoke:
		return "smoke"
	case Full:
		return "full"
	}
	return fmt.Sprintf("scale(%d)", int(s))
}

// ParseScale is the inverse of String.
func ParseScale(s string) (Scale, error) {
	switch s {
	case "smoke":
		return Smoke, nil
	case "full":
		return Full, nil
	}
	return 0, fmt.Errorf("unknown scale %q; accepted: smoke (seconds, to see that it runs), full (claims are judged)", s)
}

// MarshalText writes the scale's name.
func (s Scale) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText reads the scale's name.
func (s *Scale) UnmarshalText(b []byte) error {
	v, err := ParseScale(string(b))
	if err == nil {
		*s = v
	}
	return err
}

// An Experiment compares a method with its baselines and ablations on the same seeds and data.
type Experiment struct {
	Method string  // catalogue id, "soft-nms"
	Title  string  // one line: what is compared on which data
	Arms   []Arm   // baselines, the method, ablations; run in this order
	Claims []Claim // what the paper says, as bounds on measured quantities

	// Recipe is what the results depend on beside the code, the scale and the seed (data set, sizes, steps): any value that
	// marshals to JSON. A stored result of another recipe is not used. Nil is an empty recipe.
	Recipe any
}

// Arm is run once per seed. It is the unit that is stored, skipped when it is already done, and resumed.
type Arm struct {
	Name     string // unique within the experiment: "repq-w4a4", "nms-0.3"
	Baseline bool   // what the method is compared with
	Once     bool   // deterministic: run for the first seed only, its metrics count for every seed

	// Run does the work and records metrics in t. It returns early with ctx's error when ctx is cancelled, after saving what
	// it wants to continue from in t.CheckpointDir().
	Run func(ctx context.Context, t *Trial) error
}

// Claim compares a measured quantity with a bound.
type Claim struct {
	ID    string // "C1"; a claim of two halves is two claims, "C1a" and "C1b"
	Text  string // what should hold here, in words
	Paper string // what the paper reports: "+1.1 to +1.7 AP"
	Unit  string // of Measure: "AP", "points", "dB", "×"; empty for a plain number

	// Measure is called once per seed with all arms' metrics of that seed: m.Get("repq", "accuracy") - m.Get("layerwise", "accuracy").
	// NaN says that it was not measured.
	Measure func(m Metrics) float64
	Bound   Bound
}

// Metrics gives the metrics of one seed.
type Metrics interface {
	// Get returns the value that an arm recorded; NaN when it did not.
	Get(arm, metric string) float64
}

// Difference measures what a metric is in one arm less what it is in another.
func Difference(arm, other, metric string) func(Metrics) float64 {
	return func(m Metrics) float64 { return m.Get(arm, metric) - m.Get(other, metric) }
}

// Ratio measures what a metric is in one arm over what it is in another.
func Ratio(arm, other, metric string) func(Metrics) float64 {
	return func(m Metrics) float64 { return m.Get(arm, metric) / m.Get(other, metric) }
}

// Bound is what a measured quantity must reach: at least Limit, or at most Limit.
type Bound struct {
	Limit float64 `json:"limit"`
	Upper bool    `json:"upper,omitempty"` // the quantity must be at most Limit
}

// AtLeast is the bound that values ≥ x satisfy.
func AtLeast(x float64) Bound { return Bound{Limit: x} }

// AtMost is the bound that values ≤ x satisfy.
func AtMost(x float64) Bound { return Bound{Limit: x, Upper: true} }

// Holds reports whether v satisfies the bound; NaN does not.
func (b Bound) Holds(v float64) bool {
	if b.Upper {
		return v <= b.Limit
	}
	return v >= b.Limit
}

// Margin is how far v lies on the satisfying side of the bound; negative when it does not satisfy it.
func (b Bound) Margin(v float64) float64 {
	if b.Upper {
		return b.Limit - v
	}
	return v - b.Limit
}

// String returns "≥ 1" or "≤ 0.7".
func (b Bound) String() string {
	limit := strings.Replace(fmt.Sprintf("%.6g", b.Limit), "-", "−", 1)
	if b.Upper {
		return "≤ " + limit
	}
	return "≥ " + limit
}

var identifier = regexp.MustCompile(`^[a-z0-9]+(?:[-._a-z0-9]*[a-z0-9])?$`)

// Validate reports what is wrong with the experiment's definition: a method that is no catalogue id, no arms, an arm
// without a name or Run, two arms or claims of one name, a claim without Measure or with a limit that is not finite.
func (e Experiment) Validate() error {
	if !identifier.MatchString(e.Method) {
		return fmt.Errorf("experiment %q: Method must be a catalogue id (lower-case letters, digits, '-')", e.Method)
	}
	if len(e.Arms) == 0 {
		return fmt.Errorf("experiment %s: has no arms", e.Method)
	}
	arms := map[string]bool{}
	for i, a := range e.Arms {
		switch {
		case a.Name == "":
			return fmt.Errorf("experiment %s: arm %d has no name", e.Method, i)
		case arms[a.Name]:
			return fmt.Errorf("experiment %s: two arms are named %q", e.Method, a.Name)
		case a.Run == nil:
			return fmt.Errorf("experiment %s: arm %q has no Run", e.Method, a.Name)
		}
		arms[a.Name] = true
	}
	claims := map[string]bool{}
	for i, c := range e.Claims {
		switch {
		case c.ID == "":
			return fmt.Errorf("experiment %s: claim %d has no ID", e.Method, i)
		case claims[c.ID]:
			return fmt.Errorf("experiment %s: two claims have the ID %q", e.Method, c.ID)
		case c.Measure == nil:
			return fmt.Errorf("experiment %s: claim %s has no Measure", e.Method, c.ID)
		case math.IsNaN(c.Bound.Limit) || math.IsInf(c.Bound.Limit, 0):
			return fmt.Errorf("experiment %s: claim %s has the limit %v; it must be finite", e.Method, c.ID, c.Bound.Limit)
		}
		claims[c.ID] = true
	}
	return nil
}

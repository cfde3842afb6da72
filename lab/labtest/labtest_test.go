package labtest

import (
	"context"
	"math"
	"strings"
	"testing"

	"github.com/lathe-ml/lathe/lab"
)

// recorder collects what a test would have failed with.
type recorder struct {
	testing.TB
	failures []string
}

func (r *recorder) Errorf(format string, _ ...any) { r.failures = append(r.failures, format) }

func experiment(record func(t *lab.Trial), measure func(m lab.Metrics) float64) lab.Experiment {
	return lab.Experiment{
		Method: "x", Arms: []lab.Arm{{Name: "a", Run: func(_ context.Context, t *lab.Trial) error { record(t); return nil }}},
		Claims: []lab.Claim{{ID: "C1", Measure: measure, Bound: lab.AtLeast(0)}},
	}
}

func TestSmoke(t *testing.T) {
	value := func(m lab.Metrics) float64 { return m.Get("a", "v") }
	good := func(t *lab.Trial) { t.Record("v", -1) }
	if r := Smoke(t, experiment(good, value)); r.Verdicts[0].Outcome != lab.Undecided {
		t.Errorf("verdict %v", r.Verdicts[0])
	}
	for want, e := range map[string]lab.Experiment{
		"recorded no metric":    experiment(func(*lab.Trial) {}, func(lab.Metrics) float64 { return 1 }),
		"metric %q is":          experiment(func(t *lab.Trial) { t.Record("v", math.Inf(1)) }, func(lab.Metrics) float64 { return 1 }),
		"could not be measured": experiment(good, func(m lab.Metrics) float64 { return m.Get("a", "w") }),
		"makes no claim":        {Method: "x", Arms: experiment(good, value).Arms},
	} {
		r := &recorder{TB: t}
		Smoke(r, e)
		if !strings.Contains(strings.Join(r.failures, "\n"), want) {
			t.Errorf("failures %q, want %q", r.failures, want)
		}
	}
}

package curate

import (
	"fmt"

	"github.com/lathe-ml/lathe/internal/nearest"
)

// Options parametrise a metric chosen by name.
type Options struct {
	Clusters int // of prototypes; 0: 20
	Models   int // of the supervised metrics; 0: as Probe says
	Epochs   int // 0: as Probe says
	Seed     uint64
}

// namedMetric is a row of the table of metrics that can be named.
type namedMetric struct {
	name, about string
	labels      bool // needs labels
	make        func(o Options) Metric
}

var metrics = []namedMetric{
	{
		"prototypes", "distance to the nearest of k prototypes of the features; needs no labels", false,
		func(o Options) Metric { return Prototypes{K: o.Clusters, Seed: o.Seed} },
	},
	{
		"supervised-prototypes", "distance to the prototype of the example's own class", true,
		func(Options) Metric { return ClassPrototypes{} },
	},
	probeMetric(ScoreEL2N, "error of the predicted probabilities early in training"),
	probeMetric(ScoreForgetting, "how often the example is learnt and forgotten again"),
	probeMetric(ScoreMemorization, "how much its own prediction gains from training on it"),
	probeMetric(ScoreInfluenceMax, "its largest influence on a test example"),
	probeMetric(ScoreInfluenceSumAbs, "the sum of its influences on the test examples"),
	probeMetric(ScoreDDD, "how many models that did not see it get it wrong"),
	probeMetric(ScoreActiveLearning, "how unsure the models that did not see it are"),
	{"random", "uniform: the baseline", false, func(o Options) Metric { return Random{Seed: o.Seed} }},
}

func probeMetric(s ProbeScore, about string) namedMetric {
	return namedMetric{string(s), about, true, func(o Options) Metric {
		return Probe{Score: s, Models: o.Models, Epochs: o.Epochs, Seed: o.Seed}
	}}
}

// MetricNames lists the names that NewMetric accepts.
func MetricNames() []string {
	out := make([]string, len(metrics))
	for i, m := range metrics {
		out[i] = m.name
	}
	return out
}

// DescribeMetric says in a line what a metric measures, and whether it needs labels.
func DescribeMetric(name string) (about string, labels bool) {
	for _, m := range metrics {
		if m.name == name {
			return m.about, m.labels
		}
	}
	return "", false
}

// NewMetric returns the metric of that name.
func NewMetric(name string, o Options) (Metric, error) {
	for _, m := range metrics {
		if m.name == name {
			return m.make(o), nil
		}
	}
	hint := ""
	if m, ok := nearest.Match(name, MetricNames()); ok {
		hint = fmt.Sprintf("; did you mean %s?", m)
	}
	return nil, fmt.Errorf("curate: unknown method %q%s; accepted: %v", name, hint, MetricNames())
}

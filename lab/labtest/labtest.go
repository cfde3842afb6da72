// Package labtest checks in a test that an experiment runs.
package labtest

import (
	"context"
	"math"
	"os"
	"path/filepath"
	"testing"

	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/lab"
	"github.com/lathe-ml/lathe/lab/store"
)

// Smoke runs the experiment at smoke scale with one seed and asserts that every arm ran and measured something, and that
// every claim could be measured; never that one holds. The backend is that of enginetest. Reference networks are kept in the
// folder that LATHE_TEST_NETWORKS names, if it is set.
func Smoke(t testing.TB, e lab.Experiment) *lab.Result {
	t.Helper()
	backend := enginetest.Backend()
	dir := t.TempDir()
	s, err := store.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	networks := os.Getenv("LATHE_TEST_NETWORKS")
	if networks == "" {
		networks = filepath.Join(dir, "networks")
	}
	r, err := lab.Run(context.Background(), e, lab.Options{
		Scale: lab.Smoke, Seeds: []uint64{0}, Backend: backend, Store: s, Networks: networks,
		Observe: func(e lab.Event) {
			switch e.Kind {
			case lab.UnitLog:
				t.Logf("%s: %s", e.Arm, e.Message)
			case lab.UnitFailed:
				t.Errorf("%s: arm %q failed: %s", e.Method, e.Arm, e.Message)
			}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range r.Arms {
		if len(a.Metrics) == 0 {
			t.Errorf("%s: arm %q recorded no metric", e.Method, a.Name)
		}
		for _, m := range a.Metrics {
			for _, v := range m.Values {
				if math.IsNaN(float64(v)) || math.IsInf(float64(v), 0) {
					t.Errorf("%s: arm %q: metric %q is %v", e.Method, a.Name, m.Name, float64(v))
				}
			}
		}
	}
	if len(e.Claims) == 0 {
		t.Errorf("%s: makes no claim", e.Method)
	}
	for _, v := range r.Verdicts {
		for _, x := range v.Values {
			if math.IsNaN(float64(x)) || math.IsInf(float64(x), 0) {
				t.Errorf("%s: claim %s could not be measured (%s); do its arms record the metrics that it reads?", e.Method, v.ID, v.Reason)
			}
		}
	}
	return r
}

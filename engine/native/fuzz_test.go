package native_test

import (
	"testing"

	"github.com/gomlx/compute/gobackend"

	"github.com/lathe-ml/lathe/engine/native"
)

// FuzzPlanner looks for random graphs that the planner gets wrong.
func FuzzPlanner(f *testing.F) {
	for seed := range uint64(20) {
		f.Add(seed)
	}
	b := native.Open(f, "")
	f.Fuzz(func(t *testing.T, seed uint64) {
		host, err := gobackend.New("ops_sequential")
		if err != nil {
			t.Fatal(err)
		}
		want, log, err := runGraph(host, seed, false)
		if err != nil {
			t.Skip(err)
		}
		got, _, err := runGraph(b, seed, false)
		if err == nil {
			err = differ(got, want, false)
		}
		if err != nil {
			t.Errorf("seed %d: %v\n%v", seed, err, log)
		}
	})
}

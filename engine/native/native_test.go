package native

import (
	"testing"

	"github.com/gomlx/compute/support/backendtest"
)

// open returns a strict backend: a fault of the planner is an error, not a slower run.
func open(t testing.TB, config string) *Backend {
	t.Helper()
	b, err := New(config)
	if err != nil {
		t.Fatal(err)
	}
	b.(*Backend).strict = true
	t.Cleanup(b.Finalize)
	return b.(*Backend)
}

func TestConformance(t *testing.T) {
	for _, config := range []string{"", "isa=generic,threads=1"} {
		t.Run(config, func(t *testing.T) { backendtest.RunAll(t, open(t, config), nil) })
	}
}

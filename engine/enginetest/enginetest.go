// Package enginetest chooses the backend that this module's tests run on.
package enginetest

import (
	"fmt"

	"github.com/gomlx/compute"

	"github.com/lathe-ml/lathe/engine"
)

// Backend is the one that LATHE_BACKEND names, or else what users get by default: native where its kernels run, go
// elsewhere. It panics when the named one cannot be opened. A test that compares backends names them itself.
func Backend() compute.Backend {
	b, err := engine.Open("")
	if err != nil {
		panic(fmt.Errorf("enginetest: %w", err))
	}
	return b
}

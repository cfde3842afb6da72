package native

import "testing"

// Open returns a strict backend to the tests outside the package.
func Open(t testing.TB, config string) *Backend { return open(t, config) }

// Size counts elements.
var Size = size

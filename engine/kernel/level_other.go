//go:build !amd64 || race

package kernel

import "runtime"

// hardware returns the level of builds without assembly.
func hardware() (Level, string) {
	if runtime.GOARCH == "amd64" {
		return Generic, "built with the race detector, which cannot see into assembly"
	}
	return Generic, "there are no assembly kernels for " + runtime.GOARCH
}

func assemble(*Set) {}

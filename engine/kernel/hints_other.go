//go:build !amd64 || race

package kernel

// spinPause takes a moment, for loops that wait for another thread.
func spinPause() {}

// Prefetch asks for nothing here.
func Prefetch(*float32, int) {}

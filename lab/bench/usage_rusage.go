//go:build unix && !linux

package bench

import (
	"runtime"
	"syscall"
)

// peakMemory is the largest resident size of the process so far in bytes.
func peakMemory() int64 {
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) != nil {
		return 0
	}
	if runtime.GOOS == "darwin" {
		return u.Maxrss
	}
	return u.Maxrss << 10
}

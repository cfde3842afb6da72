//go:build unix

package quanttable

import (
	"os"
	"runtime"
	"syscall"
)

// peakMB is the greatest resident memory of a process that has ended.
func peakMB(s *os.ProcessState) float64 {
	if s == nil {
		return 0
	}
	u, ok := s.SysUsage().(*syscall.Rusage)
	if !ok {
		return 0
	}
	if runtime.GOOS == "darwin" { // bytes there, KiB elsewhere
		return float64(u.Maxrss) / (1 << 20)
	}
	return float64(u.Maxrss) / (1 << 10)
}

package bench

import "time"

// ProcessorTime is the time that the process has computed so far, on all cores together; 0 where the system does not tell.
// Unlike the clock it hardly depends on what else the machine does.
func ProcessorTime() time.Duration { return processorTime() }

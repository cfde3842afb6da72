//go:build !race

package native

// prefetch asks the processor for cache lines from x on, which need not exist.
//
//go:noescape
func prefetch(x *float32, lines int)

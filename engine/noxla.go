//go:build !cgo || noxla

package engine

// extraCandidates are the backends beside the portable one, best first: XLA needs cgo.
var extraCandidates = []candidate{}

// Package rng gives named, seeded random streams, so that two arms of an experiment that draw from the stream of the
// same name and seed see the same numbers, whatever else either of them draws.
package rng

import (
	"hash/fnv"
	"math"
	"math/rand/v2"
)

// Rand is a source of random numbers.
type Rand = rand.Rand

// New returns the stream of that name ("init", "data", "noise", "mask", ...) under a seed (PCG).
func New(seed uint64, name string) *Rand { return rand.New(Source(seed, name)) }

// Source is what New draws from. Its state can be kept and put back (encoding.BinaryMarshaler), which is all that there is
// to a Rand on it.
func Source(seed uint64, name string) *rand.PCG {
	h := fnv.New64a()
	h.Write([]byte(name))
	return rand.NewPCG(seed, h.Sum64())
}

// Normal fills dst with draws from N(0, std²).
func Normal(r *Rand, dst []float32, std float64) {
	for i := range dst {
		dst[i] = float32(r.NormFloat64() * std)
	}
}

// Uniform fills dst with draws from [lo, hi).
func Uniform(r *Rand, dst []float32, lo, hi float64) {
	for i := range dst {
		dst[i] = float32(lo + (hi-lo)*r.Float64())
	}
}

// Orthogonal returns an n×n random orthogonal matrix, row-major: Gram-Schmidt of a Gaussian matrix, which is the QR
// decomposition with a positive diagonal of R and so uniform over the orthogonal group.
func Orthogonal(r *Rand, n int) []float64 {
	q := make([]float64, n*n)
	for i := range n {
		row := q[i*n : (i+1)*n]
		for {
			for j := range row {
				row[j] = r.NormFloat64()
			}
			for range 2 { // the second pass restores orthogonality to rounding
				for k := range i {
					prev := q[k*n : (k+1)*n]
					dot := 0.
					for j := range row {
						dot += row[j] * prev[j]
					}
					for j := range row {
						row[j] -= dot * prev[j]
					}
				}
			}
			norm := 0.
			for _, v := range row {
				norm += v * v
			}
			if norm = math.Sqrt(norm); norm > 1e-6 {
				for j := range row {
					row[j] /= norm
				}
				break
			}
		}
	}
	return q
}

//go:build goexperiment.simd

package native_test

// vectorGo says that the portable backend runs its vector kernels.
const vectorGo = true

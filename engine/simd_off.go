//go:build !goexperiment.simd

package engine

// SIMD says whether the binary was built with GOEXPERIMENT=simd, which GoMLX's go backend needs for its AVX kernels.
const SIMD = false

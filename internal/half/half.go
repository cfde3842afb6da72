// Package half converts 16-bit floating-point numbers.
package half

import "math"

// FromF16 converts an IEEE 754 half-precision number: exactly, with subnormals, infinities and NaN.
func FromF16(h uint16) float32 {
	sign, exp, man := uint32(h>>15)<<31, uint32(h>>10)&31, uint32(h)&1023
	switch exp {
	case 0: // man · 2^-24
		return math.Float32frombits(math.Float32bits(float32(man)*(1.0/(1<<24))) | sign)
	case 31:
		return math.Float32frombits(sign | 0xff<<23 | man<<13)
	}
	return math.Float32frombits(sign | (exp+112)<<23 | man<<13)
}

// FromBF16 converts a bfloat16, the upper half of a float32.
func FromBF16(h uint16) float32 { return math.Float32frombits(uint32(h) << 16) }

// ToF16 rounds to the nearest half-precision number, half to even; beyond 65504 (and half a step) to infinity.
func ToF16(x float32) uint16 {
	bits := math.Float32bits(x)
	sign, size := uint16(bits>>16)&0x8000, bits&0x7fffffff
	switch {
	case size > 0x7f800000: // NaN
		return sign | 0x7e00
	case size >= 0x47800000: // 2^16
		return sign | 0x7c00
	case size < 0x38800000: // below 2^-14: a multiple of 2^-24
		return sign | uint16(math.RoundToEven(float64(math.Float32frombits(size))*(1<<24)))
	}
	return sign | uint16((size-112<<23+0xfff+size>>13&1)>>13)
}

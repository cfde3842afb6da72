package main

import (
	"fmt"
	"math"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// width is a vector width. Its methods hide where AVX2 and AVX-512 differ; those that return a register leave their
// arguments alone.
type width struct {
	lanes  int
	suffix string
}

var (
	y = width{8, "AVX2"}
	z = width{16, "AVX512"}
)

var (
	yRegs = []reg.VecPhysical{
		reg.Y0, reg.Y1, reg.Y2, reg.Y3, reg.Y4, reg.Y5, reg.Y6, reg.Y7,
		reg.Y8, reg.Y9, reg.Y10, reg.Y11, reg.Y12, reg.Y13, reg.Y14, reg.Y15,
	}
	zRegs = []reg.VecPhysical{
		reg.Z0, reg.Z1, reg.Z2, reg.Z3, reg.Z4, reg.Z5, reg.Z6, reg.Z7,
		reg.Z8, reg.Z9, reg.Z10, reg.Z11, reg.Z12, reg.Z13, reg.Z14, reg.Z15,
		reg.Z16, reg.Z17, reg.Z18, reg.Z19, reg.Z20, reg.Z21, reg.Z22, reg.Z23,
		reg.Z24, reg.Z25, reg.Z26, reg.Z27, reg.Z28, reg.Z29, reg.Z30, reg.Z31,
	}
)

func (w width) reg(i int) reg.VecPhysical {
	if w.lanes == 8 {
		return yRegs[i]
	}
	return zRegs[i]
}

func (w width) new() reg.VecVirtual {
	if w.lanes == 8 {
		return YMM()
	}
	return ZMM()
}

func (w width) zero(r reg.Register) {
	if w.lanes == 8 {
		VXORPS(r, r, r)
	} else {
		VPXORD(r, r, r)
	}
}

var constants = map[uint32]Mem{}

// bits returns memory that holds a value in every lane.
func bits(v uint32) Mem {
	m, ok := constants[v]
	if !ok {
		m = GLOBL(fmt.Sprintf("lane%08x", v), RODATA|NOPTR)
		for i := range 16 {
			DATA(4*i, U32(v))
		}
		constants[v] = m
	}
	return m
}

func f32(v float64) Mem { return bits(math.Float32bits(float32(v))) }

var laneMaskMem *Mem

// laneMask returns a table of 8 lanes that are set and 8 that are clear.
func laneMask() Mem {
	if laneMaskMem == nil {
		m := GLOBL("laneMask", RODATA|NOPTR)
		for i := range 16 {
			v := uint32(0)
			if i < 8 {
				v = math.MaxUint32
			}
			DATA(4*i, U32(v))
		}
		laneMaskMem = &m
	}
	return *laneMaskMem
}

// load returns a register that holds a constant or other memory.
func (w width) load(m Op) reg.VecVirtual { d := w.new(); VMOVUPS(m, d); return d }

func (w width) two(f func(ops ...Op), a, b Op) reg.VecVirtual { d := w.new(); f(b, a, d); return d }

func (w width) add(a, b Op) reg.VecVirtual { return w.two(VADDPS, a, b) }
func (w width) sub(a, b Op) reg.VecVirtual { return w.two(VSUBPS, a, b) }
func (w width) mul(a, b Op) reg.VecVirtual { return w.two(VMULPS, a, b) }
func (w width) div(a, b Op) reg.VecVirtual { return w.two(VDIVPS, a, b) }

// min and max give b where either is NaN.
func (w width) min(a, b Op) reg.VecVirtual { return w.two(VMINPS, a, b) }
func (w width) max(a, b Op) reg.VecVirtual { return w.two(VMAXPS, a, b) }

func (w width) and(a, b Op) reg.VecVirtual { return w.two(VANDPS, a, b) }
func (w width) or(a, b Op) reg.VecVirtual  { return w.two(VORPS, a, b) }
func (w width) xor(a, b Op) reg.VecVirtual { return w.two(VXORPS, a, b) }

func (w width) sqrt(a Op) reg.VecVirtual { d := w.new(); VSQRTPS(a, d); return d }

// round rounds; mode 0 to even, 1 down, 2 up.
func (w width) round(a Op, mode int) reg.VecVirtual {
	d := w.new()
	if w.lanes == 8 {
		VROUNDPS(U8(8|mode), a, d)
	} else {
		VRNDSCALEPS(U8(8|mode), a, d)
	}
	return d
}

// horner evaluates a polynomial, highest coefficient first.
func (w width) horner(x Op, c ...float64) reg.VecVirtual {
	p := w.load(f32(c[0]))
	for _, v := range c[1:] {
		VFMADD213PS(f32(v), x, p)
	}
	return p
}

// Predicates of comparisons.
const (
	eq    = 0
	unord = 3
	ne    = 4
	lt    = 0x11
	le    = 0x12
	ge    = 0x1d
	gt    = 0x1e
)

// cond is the result of a comparison: a vector of all ones and zeros, or an opmask.
type cond struct{ r reg.Register }

func (w width) cmp(pred int, a, b Op) cond {
	if w.lanes == 8 {
		d := w.new()
		VCMPPS(U8(pred), b, a, d)
		return cond{d}
	}
	k := K()
	VCMPPS(U8(pred), b, a, k)
	return cond{k}
}

// choose returns a where c holds, else b.
func (w width) choose(c cond, a, b reg.Register) reg.VecVirtual {
	d := w.new()
	if w.lanes == 8 {
		VBLENDVPS(c.r, a, b, d)
	} else {
		VBLENDMPS(a, b, c.r, d)
	}
	return d
}

// only returns a where c holds, else 0.
func (w width) only(c cond, a Mem) reg.VecVirtual {
	d := w.new()
	if w.lanes == 8 {
		VANDPS(a, c.r, d)
	} else {
		VMOVUPS_Z(a, c.r, d)
	}
	return d
}

func (w width) mask(pred int, a, b Op) reg.VecVirtual { return w.only(w.cmp(pred, a, b), f32(1)) }

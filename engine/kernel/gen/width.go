package main

import (
	"fmt"
	"math"
	"slices"

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

var constants = map[string]Mem{} // by name

// bits returns memory that holds a value eight times: a whole vector of AVX2. AVX-512 reads one of them for all lanes, because
// the linker aligns data to 32 bytes at most, and to read 64 that lie on two cache lines takes twice as long.
func bits(v uint32) Mem {
	name := fmt.Sprintf("lane%08x", v)
	m, ok := constants[name]
	if !ok {
		m = GLOBL(name, RODATA|NOPTR)
		for i := range 8 {
			DATA(4*i, U32(v))
		}
		constants[name] = m
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

// isConstant says whether an operand is memory of bits.
func isConstant(o Op) bool {
	m, ok := o.(Mem)
	return ok && constants[m.Symbol.Name] == m
}

// instruction is an instruction and its form that reads one element of memory for all lanes.
type instruction struct{ whole, one func(ops ...Op) }

var (
	addps       = instruction{VADDPS, VADDPS_BCST}
	subps       = instruction{VSUBPS, VSUBPS_BCST}
	mulps       = instruction{VMULPS, VMULPS_BCST}
	divps       = instruction{VDIVPS, VDIVPS_BCST}
	minps       = instruction{VMINPS, VMINPS_BCST}
	maxps       = instruction{VMAXPS, VMAXPS_BCST}
	andps       = instruction{VANDPS, VANDPS_BCST}
	orps        = instruction{VORPS, VORPS_BCST}
	xorps       = instruction{VXORPS, VXORPS_BCST}
	cmpps       = instruction{VCMPPS, VCMPPS_BCST}
	fmadd213ps  = instruction{VFMADD213PS, VFMADD213PS_BCST}
	fmadd231ps  = instruction{VFMADD231PS, VFMADD231PS_BCST}
	fnmadd231ps = instruction{VFNMADD231PS, VFNMADD231PS_BCST}
	paddd       = instruction{VPADDD, VPADDD_BCST}
	psubd       = instruction{VPSUBD, VPSUBD_BCST}
)

// do writes an instruction, in the form that its operands need.
func (w width) do(i instruction, ops ...Op) {
	if w.lanes == 16 && slices.ContainsFunc(ops, isConstant) {
		i.one(ops...)
		return
	}
	i.whole(ops...)
}

// load returns a register that holds a constant or other memory.
func (w width) load(m Op) reg.VecVirtual {
	d := w.new()
	if w.lanes == 16 && isConstant(m) {
		VBROADCASTSS(m, d)
	} else {
		VMOVUPS(m, d)
	}
	return d
}

func (w width) two(i instruction, a, b Op) reg.VecVirtual { d := w.new(); w.do(i, b, a, d); return d }

func (w width) add(a, b Op) reg.VecVirtual { return w.two(addps, a, b) }
func (w width) sub(a, b Op) reg.VecVirtual { return w.two(subps, a, b) }
func (w width) mul(a, b Op) reg.VecVirtual { return w.two(mulps, a, b) }
func (w width) div(a, b Op) reg.VecVirtual { return w.two(divps, a, b) }

// min and max give b where either is NaN.
func (w width) min(a, b Op) reg.VecVirtual { return w.two(minps, a, b) }
func (w width) max(a, b Op) reg.VecVirtual { return w.two(maxps, a, b) }

func (w width) and(a, b Op) reg.VecVirtual { return w.two(andps, a, b) }
func (w width) or(a, b Op) reg.VecVirtual  { return w.two(orps, a, b) }
func (w width) xor(a, b Op) reg.VecVirtual { return w.two(xorps, a, b) }

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
		w.do(fmadd213ps, f32(v), x, p)
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
		w.do(cmpps, U8(pred), b, a, d)
		return cond{d}
	}
	k := K()
	w.do(cmpps, U8(pred), b, a, k)
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
		VBROADCASTSS_Z(a, c.r, d)
	}
	return d
}

func (w width) mask(pred int, a, b Op) reg.VecVirtual { return w.only(w.cmp(pred, a, b), f32(1)) }

package main

import (
	"fmt"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// Offsets of the fields of tileArgs.
const (
	argRows = 0
	argRuns = 64
	argN    = 72
	argAKS  = 80
	argB    = 88
	argBKS  = 96
	argC    = 104
	argLDC  = 112
	argAcc  = 120
	argCols = 128
)

// rowRegs hold the rows of A. R14 and R15 are free in ABI0 code that is not linked dynamically.
var rowRegs = []reg.Register{reg.RAX, reg.RBX, reg.RCX, reg.RDX, reg.RSI, reg.RDI, reg.R8, reg.R9}

// tiles writes the micro-kernels of one level: all heights, half and full width.
func tiles(w width) {
	mr := 8
	if w.lanes == 8 {
		mr = 6
	}
	for v := 1; v <= 2; v++ {
		for r := 1; r <= mr; r++ {
			tile(w, r, v)
		}
	}
}

// tile writes the kernel of rows x v vectors. See tileTwin in package kernel for what it computes.
func tile(w width, rows, v int) {
	TEXT(fmt.Sprintf("tile%dx%d%s", rows, v*w.lanes, w.suffix), NOSPLIT, "func(args *int)")
	Pragma("noescape")
	var (
		args     = reg.R14
		runs     = reg.R15
		b        = reg.R10
		at       = reg.R11
		n        = reg.R12
		aks      = reg.R13
		acc      = func(r, i int) reg.VecPhysical { return w.reg(r*v + i) }
		bv       = func(i int) reg.VecPhysical { return w.reg(rows*v + i) }
		bcast    = func(r int) reg.VecPhysical { return w.reg(rows*v + v + r%2) }
		field    = func(off int) Mem { return Mem{Base: args, Disp: off} }
		half     = 4 * w.lanes
		maskRegs = []reg.Register{reg.K1, reg.K2}
	)
	Load(Param("args"), args)
	if w.lanes == 16 { // one bit for each column
		MOVQ(field(argCols), reg.RCX)
		MOVQ(U32(1), reg.RAX)
		SHLQ(reg.CL, reg.RAX)
		DECQ(reg.RAX)
		KMOVW(reg.EAX, reg.K1)
		SHRQ(U8(16), reg.RAX)
		KMOVW(reg.EAX, reg.K2)
	}
	for r := range rows {
		MOVQ(field(argRows+8*r), rowRegs[r])
	}
	MOVQ(field(argRuns), runs)
	MOVQ(field(argB), b)
	MOVQ(field(argAKS), aks)
	for r := range rows {
		for i := range v {
			w.zero(acc(r, i))
		}
	}
	Label("run")
	MOVQ(Mem{Base: runs}, at)
	MOVQ(Mem{Base: runs, Disp: 8}, n)
	ADDQ(Imm(16), runs)
	Label("loop")
	for i := range v {
		if w.lanes == 16 {
			VMOVUPS_Z(Mem{Base: b, Disp: half * i}, maskRegs[i], bv(i))
		} else {
			VMOVUPS(Mem{Base: b, Disp: half * i}, bv(i))
		}
	}
	for r := range rows {
		VBROADCASTSS(Mem{Base: rowRegs[r], Index: at, Scale: 4}, bcast(r))
		for i := range v {
			VFMADD231PS(bcast(r), bv(i), acc(r, i))
		}
	}
	ADDQ(aks, at)
	ADDQ(field(argBKS), b)
	DECQ(n)
	JNZ(LabelRef("loop"))
	DECQ(field(argN))
	JNZ(LabelRef("run"))

	c, ldc := reg.RAX, reg.RBX
	MOVQ(field(argC), c)
	MOVQ(field(argLDC), ldc)
	if w.lanes == 8 { // masks of the columns take the place of B
		MOVQ(field(argCols), reg.RCX)
		LEAQ(laneMask(), reg.RDX)
		XORQ(reg.RSI, reg.RSI)
		for i := range v {
			// the table has 8 lanes set, then 8 clear: begin 8 - min(8, max(0, cols-8i)) lanes in
			MOVQ(U32(8), reg.R8)
			SUBQ(reg.RCX, reg.R8)
			CMOVQLT(reg.RSI, reg.R8)
			MOVQ(U32(8), reg.R9)
			CMPQ(reg.R8, reg.R9)
			CMOVQGT(reg.R9, reg.R8)
			VMOVUPS(Mem{Base: reg.RDX, Index: reg.R8, Scale: 4}, bv(i))
			SUBQ(Imm(8), reg.RCX)
		}
	}
	store := func(add bool) {
		for r := range rows {
			for i := range v {
				m, a := Mem{Base: c, Disp: half * i}, acc(r, i)
				switch {
				case w.lanes == 16:
					if add {
						VADDPS_Z(m, a, maskRegs[i], a)
					}
					VMOVUPS(a, maskRegs[i], m)
				default:
					if add {
						VMASKMOVPS(m, bv(i), bcast(0))
						VADDPS(bcast(0), a, a)
					}
					VMASKMOVPS(a, bv(i), m)
				}
			}
			if r < rows-1 {
				ADDQ(ldc, c)
			}
		}
		VZEROUPPER()
		RET()
	}
	CMPQ(field(argAcc), Imm(0))
	JE(LabelRef("replace"))
	store(true)
	Label("replace")
	store(false)
}

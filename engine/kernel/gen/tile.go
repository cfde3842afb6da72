package main

import (
	"fmt"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// Offsets of the fields of tileArgs.
const (
	argA     = 0
	argRows  = 8
	argC     = 16
	argCRows = 24
	argRuns  = 32
	argN     = 40
	argAKS   = 48
	argB     = 56
	argBKS   = 64
	argTable = 72
	argNext  = 80
	argAcc   = 96
	argCols  = 104
	argDone  = 112
	argAhead = 120
	argPace  = 128
	argLong  = 136
)

// rowRegs hold the rows of A. R14 and R15 are free in ABI0 code that is not linked dynamically.
var rowRegs = []reg.Register{reg.RAX, reg.RBX, reg.RCX, reg.RDX, reg.RSI, reg.RDI, reg.R8, reg.R9}

// tiles writes the micro-kernels of one level: all heights and widths, packed B and B through a table.
//
// Eight rows by three vectors leave the ports that load with half of their time to spare; eight by two do not, and then
// fall short of the peak by a tenth.
func tiles(w width) {
	mr, nv := 8, 3
	if w.lanes == 8 {
		mr, nv = 6, 2
	}
	for _, table := range []bool{false, true} {
		for v := 1; v <= nv; v++ {
			for r := 1; r <= mr; r++ {
				tile(w, r, v, table)
			}
		}
	}
}

// soon is how many k before their use the rows of a long panel of B are fetched into the first cache.
const soon = 8

// tile writes the kernel of rows x v vectors. See tileTwin in package kernel for what it computes.
func tile(w width, rows, v int, table bool) {
	kind := "Packed"
	if table {
		kind = "Table"
	}
	TEXT(fmt.Sprintf("tile%s%dx%d%s", kind, rows, v*w.lanes, w.suffix), NOSPLIT, "func(args *int)")
	Pragma("noescape")
	var (
		b     = reg.R10 // packed: the panel; table: the table
		at    = reg.R11
		n     = reg.R12
		bk    = reg.R13 // table: the place of B's row
		args  = reg.R14
		base  = reg.R15 // table: the first column
		ahead = reg.R13 // packed: the place to fetch for later
		pace  = reg.R15 // packed: how far that moves
		acc   = func(r, i int) reg.VecPhysical { return w.reg(r*v + i) }
		bv    = func(i int) reg.VecPhysical { return w.reg(rows*v + i) }
		bcast = func(r int) reg.VecPhysical { return w.reg(rows*v + v + r%2) } // two in turn
		field = func(off int) Mem { return Mem{Base: args, Disp: off} }
		bytes = 4 * w.lanes
		masks = []reg.Register{reg.K1, reg.K2, reg.K3}[:v]
	)
	Load(Param("args"), args)
	if w.lanes == 16 { // one bit for each column
		MOVQ(field(argCols), reg.RCX)
		MOVQ(U32(1), reg.RAX)
		SHLQ(reg.CL, reg.RAX)
		DECQ(reg.RAX)
		for i, k := range masks {
			if i > 0 {
				SHRQ(U8(16), reg.RAX)
			}
			KMOVW(reg.EAX, k)
		}
	}
	// fetch what the end of the kernel reads and writes
	MOVQ(field(argC), at)
	MOVQ(field(argCRows), n)
	for r := range rows {
		MOVLQSX(Mem{Base: n, Disp: 4 * r}, bk)
		for line := 0; line < v*w.lanes; line += 16 {
			PREFETCHT0(Mem{Base: at, Index: bk, Scale: 4, Disp: 4 * line})
		}
	}
	MOVQ(field(argA), at)
	MOVQ(field(argRows), n)
	for r := range rows {
		MOVLQSX(Mem{Base: n, Disp: 4 * r}, rowRegs[r])
		LEAQ(Mem{Base: at, Index: rowRegs[r], Scale: 4}, rowRegs[r])
	}
	if table {
		MOVQ(field(argTable), b)
		MOVQ(field(argB), base)
	} else {
		MOVQ(field(argB), b)
		MOVQ(field(argAhead), ahead)
		MOVQ(field(argPace), pace)
	}
	for r := range rows {
		for i := range v {
			w.zero(acc(r, i))
		}
	}
	// A load through a mask takes a place that a multiplication could have, so whole tiles go without.
	multiply := func(variant string) {
		name := func(l string) string { return l + variant }
		Label(name("run"))
		MOVQ(field(argRuns), n)
		ADDQ(field(argDone), n)
		ADDQ(Imm(16), field(argDone))
		MOVQ(Mem{Base: n}, at)
		MOVQ(Mem{Base: n, Disp: 8}, n)
		Label(name("loop"))
		for i := range v {
			m := Mem{Base: b, Disp: bytes * i}
			if table {
				if i == 0 {
					MOVLQSX(Mem{Base: b}, bk)
				} else {
					ADDQ(field(argNext+8*(i-1)), bk)
				}
				m = Mem{Base: base, Index: bk, Scale: 4}
			}
			if variant == "Masked" {
				VMOVUPS_Z(m, masks[i], bv(i))
			} else {
				VMOVUPS(m, bv(i))
			}
		}
		for r := range rows {
			VBROADCASTSS(Mem{Base: rowRegs[r], Index: at, Scale: 4}, bcast(r))
			for i := range v {
				VFMADD231PS(bcast(r), bv(i), acc(r, i))
			}
		}
		ADDQ(field(argAKS), at)
		if table {
			ADDQ(Imm(4), b)
		} else {
			PREFETCHT1(Mem{Base: ahead})
			for line := 0; variant != "Short" && line < v*w.lanes; line += 16 {
				PREFETCHT0(Mem{Base: b, Disp: 4 * (line + soon*v*w.lanes)})
			}
			ADDQ(pace, ahead)
			ADDQ(field(argBKS), b)
		}
		DECQ(n)
		JNZ(LabelRef(name("loop")))
		DECQ(field(argN))
		JNZ(LabelRef(name("run")))
	}
	if table && w.lanes == 16 {
		CMPQ(field(argCols), Imm(uint64(v*w.lanes)))
		JGE(LabelRef("run"))
		multiply("Masked")
		JMP(LabelRef("write"))
	}
	if !table {
		CMPQ(field(argLong), Imm(0))
		JE(LabelRef("runShort"))
	}
	multiply("")
	if !table { // the first cache holds a short panel
		JMP(LabelRef("write"))
		multiply("Short")
	}
	Label("write")

	c, places, off := reg.RAX, reg.R10, reg.R11
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
	MOVQ(field(argC), c)
	MOVQ(field(argCRows), places)
	store := func(add bool) {
		for r := range rows {
			MOVLQSX(Mem{Base: places, Disp: 4 * r}, off)
			for i := range v {
				m, a := Mem{Base: c, Index: off, Scale: 4, Disp: bytes * i}, acc(r, i)
				if w.lanes == 16 {
					if add {
						VADDPS_Z(m, a, masks[i], a)
					}
					VMOVUPS(a, masks[i], m)
					continue
				}
				if add {
					VMASKMOVPS(m, bv(i), bcast(0))
					VADDPS(bcast(0), a, a)
				}
				VMASKMOVPS(a, bv(i), m)
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

// peak writes a loop of independent multiplications and additions: chains of accumulators that fill all registers but two.
func peak(w width) {
	chains := 14
	if w.lanes == 16 {
		chains = 30
	}
	TEXT("peak"+w.suffix, NOSPLIT, "func(n int)")
	n := Load(Param("n"), GP64())
	for i := range chains + 2 {
		w.zero(w.reg(i))
	}
	Label("loop")
	for i := range chains {
		VFMADD231PS(w.reg(chains), w.reg(chains+1), w.reg(i))
	}
	DECQ(n)
	JNZ(LabelRef("loop"))
	VZEROUPPER()
	RET()
}

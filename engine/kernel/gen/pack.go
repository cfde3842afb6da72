package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// packs writes the kernels that lay operands of products out. They take AVX2 at every level: the transpose is bound by
// shuffles, of which wider registers do no more at a time, and the copy by the second cache.
func packs() {
	packEight()
	copyPanels()
	spin()
	prefetch()
}

// packEight writes dst[k*stride + i] = src[rows[i] + k] for i < 8, k < n: a transpose, 8 by 8 in registers.
func packEight() {
	TEXT("packEightAVX2", NOSPLIT, "func(dst *float32, stride int, src *float32, rows *int32, n int)")
	Pragma("noescape")
	dst, stride := Load(Param("dst"), GP64()), Load(Param("stride"), GP64())
	src, table := Load(Param("src"), GP64()), Load(Param("rows"), GP64())
	n := Load(Param("n"), GP64())
	SHLQ(U8(2), stride)
	row := []reg.Register{GP64(), GP64(), GP64(), GP64(), GP64(), GP64(), GP64(), GP64()}
	for i, r := range row {
		MOVLQSX(Mem{Base: table, Disp: 4 * i}, r)
		LEAQ(Mem{Base: src, Index: r, Scale: 4}, r)
	}
	at := src // counts the bytes read
	XORQ(at, at)
	// The next eight rows most often begin as far behind these as eight rows take: ask for them meanwhile.
	next := table
	MOVQ(row[1], next)
	SUBQ(row[0], next)
	SHLQ(U8(3), next)
	SUBQ(Imm(8), n)
	JLT(LabelRef("tail"))
	Label("loop")
	for _, r := range row {
		PREFETCHT0(Mem{Base: r, Index: next, Scale: 1})
	}
	ADDQ(Imm(32), next)
	// Row i's first half beside row i+4's first half, then the second halves.
	var half [8]reg.VecVirtual
	for i := range 4 {
		for h := range 2 {
			x, v := XMM(), YMM()
			VMOVUPS(Mem{Base: row[i], Index: at, Scale: 1, Disp: 16 * h}, x)
			VINSERTF128(U8(1), Mem{Base: row[i+4], Index: at, Scale: 1, Disp: 16 * h}, x.AsY(), v)
			half[4*h+i] = v
		}
	}
	for h := range 2 {
		q := half[4*h:]
		var t [4]reg.VecVirtual
		for i := range t {
			t[i] = YMM()
		}
		VUNPCKLPS(q[1], q[0], t[0]) // 00 10 01 11
		VUNPCKHPS(q[1], q[0], t[1]) // 02 12 03 13
		VUNPCKLPS(q[3], q[2], t[2])
		VUNPCKHPS(q[3], q[2], t[3])
		for k := range 4 {
			v, sel := YMM(), uint8(0x44)
			if k%2 == 1 {
				sel = 0xee
			}
			VSHUFPS(U8(sel), t[2+k/2], t[k/2], v)
			VMOVUPS(v, Mem{Base: dst})
			ADDQ(stride, dst)
		}
	}
	ADDQ(Imm(32), at)
	SUBQ(Imm(8), n)
	JGE(LabelRef("loop"))
	Label("tail")
	ADDQ(Imm(8), n)
	JEQ(LabelRef("done"))
	Label("one")
	for i, r := range row {
		x := XMM()
		VMOVSS(Mem{Base: r, Index: at, Scale: 1}, x)
		VMOVSS(x, Mem{Base: dst, Disp: 4 * i})
	}
	ADDQ(stride, dst)
	ADDQ(Imm(4), at)
	DECQ(n)
	JNE(LabelRef("one"))
	Label("done")
	VZEROUPPER()
	RET()
}

// copyPanels writes dst[p*panel + i] = src[p*step + i] for p < n, i < 8*eights.
func copyPanels() {
	TEXT("copyPanelsAVX2", NOSPLIT, "func(dst *float32, panel int, src *float32, step, n, eights int)")
	Pragma("noescape")
	dst, panel := Load(Param("dst"), GP64()), Load(Param("panel"), GP64())
	src, step := Load(Param("src"), GP64()), Load(Param("step"), GP64())
	n, eights := Load(Param("n"), GP64()), Load(Param("eights"), GP64())
	SHLQ(U8(2), panel)
	SHLQ(U8(2), step)
	SHLQ(U8(5), eights)
	at := GP64()
	TESTQ(n, n)
	JEQ(LabelRef("done"))
	Label("panel")
	XORQ(at, at)
	Label("eight")
	v := YMM()
	VMOVUPS(Mem{Base: src, Index: at, Scale: 1}, v)
	VMOVUPS(v, Mem{Base: dst, Index: at, Scale: 1})
	ADDQ(Imm(32), at)
	CMPQ(at, eights)
	JLT(LabelRef("eight"))
	ADDQ(panel, dst)
	ADDQ(step, src)
	DECQ(n)
	JNE(LabelRef("panel"))
	Label("done")
	VZEROUPPER()
	RET()
}

// prefetch writes a loop that asks for cache lines.
func prefetch() {
	TEXT("Prefetch", NOSPLIT, "func(x *float32, lines int)")
	Pragma("noescape")
	Doc("Prefetch asks the processor for cache lines from x on, which need not exist.")
	x := Load(Param("x"), GP64())
	lines := Load(Param("lines"), GP64())
	Label("next")
	TESTQ(lines, lines)
	JLE(LabelRef("done"))
	PREFETCHT0(Mem{Base: x})
	ADDQ(Imm(64), x)
	DECQ(lines)
	JMP(LabelRef("next"))
	Label("done")
	RET()
}

// spin writes the pause of a waiting loop.
func spin() {
	TEXT("spinPause", NOSPLIT, "func()")
	PAUSE()
	RET()
}

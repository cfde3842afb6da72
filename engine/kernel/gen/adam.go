package main

import (
	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

// adam writes one step of AdamW; see adamTwin in package kernel. Everything is read and written once.
func adam(w width) {
	TEXT("adam"+w.suffix, NOSPLIT, "func(w2, m2, v2, w, m, v, grad, c *float32, n int, decay bool)")
	Pragma("noescape")
	p := map[string]reg.Register{}
	for _, name := range []string{"w2", "m2", "v2", "w", "m", "v", "grad", "c", "n"} {
		p[name] = Load(Param(name), GP64())
	}
	var s [9]vec
	for i := range s {
		s[i] = w.new()
		VBROADCASTSS(Mem{Base: p["c"], Disp: 4 * i}, s[i])
	}
	decayed := p["c"] // no longer needed
	Load(Param("decay"), decayed.(reg.GPVirtual).As8())
	at, n := GP64(), p["n"]
	XORQ(at, at)
	place := func(name string) Mem { return Mem{Base: p[name], Index: at, Scale: 1} }
	step := func(label string, load func(m Mem) vec, store func(v vec, m Mem)) {
		// read everything first: a result may be any of the operands
		g, old1, old2, x := load(place("grad")), load(place("m")), load(place("v")), load(place("w"))
		m := w.mul(g, s[1])
		VFMADD231PS(old1, s[0], m)
		store(m, place("m2"))
		v := w.mul(w.mul(g, g), s[3])
		VFMADD231PS(old2, s[2], v)
		store(v, place("v2"))
		d := w.div(w.div(m, s[4]), w.add(w.sqrt(w.div(v, s[5])), s[6]))
		TESTB(decayed.(reg.GPVirtual).As8(), decayed.(reg.GPVirtual).As8())
		JEQ(LabelRef(label))
		VFMADD231PS(x, s[8], d)
		Label(label)
		store(w.sub(x, w.mul(d, s[7])), place("w2"))
	}
	SUBQ(U32(uint32(w.lanes)), n)
	JLT(LabelRef("tail"))
	Label("loop")
	step("plain", func(m Mem) vec { return w.load(m) }, func(v vec, m Mem) { VMOVUPS(v, m) })
	ADDQ(U32(uint32(4*w.lanes)), at)
	SUBQ(U32(uint32(w.lanes)), n)
	JGE(LabelRef("loop"))
	Label("tail")
	ADDQ(U32(uint32(w.lanes)), n)
	JEQ(LabelRef("done"))
	t := w.tail(n)
	step("plainTail", t.load, t.store)
	Label("done")
	VZEROUPPER()
	RET()
}

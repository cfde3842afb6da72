package main

import (
	"fmt"
	"math"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
	"github.com/mmcloughlin/avo/reg"
)

const (
	signBit = 1 << 31
	inf     = 0x7f800000
	negInf  = 0xff800000
	nan     = 0x7fc00000
)

type vec = reg.VecVirtual

// vectors writes the elementwise functions and row reductions of one level.
func vectors(w width) {
	u := func(name string, unroll int, f func(x vec) vec) {
		elementwise(w, name, []string{"x"}, unroll, func(in []vec) vec { return f(in[0]) })
	}
	b := func(name string, f func(a, b vec) vec) {
		elementwise(w, name, []string{"a", "b"}, 4, func(in []vec) vec { return f(in[0], in[1]) })
	}
	u("neg", 4, func(x vec) vec { return w.xor(x, bits(signBit)) })
	u("abs", 4, func(x vec) vec { return w.and(x, bits(signBit-1)) })
	u("square", 4, func(x vec) vec { return w.mul(x, x) })
	u("sqrt", 4, func(x vec) vec { return w.sqrt(x) })
	u("rsqrt", 2, func(x vec) vec { return w.div(w.load(f32(1)), w.sqrt(x)) })
	u("exp", 2, w.exp)
	u("log", 1, w.log)
	u("tanh", 2, w.tanh)
	u("logistic", 2, func(x vec) vec {
		e := w.exp(w.xor(x, bits(signBit)))
		return w.div(w.load(f32(1)), w.add(e, f32(1)))
	})
	prepared(w, "erf", []string{"x"}, 2, func() func(in []vec) vec {
		f := w.erf
		if w.lanes == 16 {
			f = newErfTable().at
		}
		return func(in []vec) vec { return f(in[0]) }
	})
	u("sign", 4, func(x vec) vec { return w.sub(w.mask(gt, x, w.zeros()), w.mask(lt, x, w.zeros())) })
	u("floor", 4, func(x vec) vec { return w.round(x, 1) })
	u("ceil", 4, func(x vec) vec { return w.round(x, 2) })
	u("round", 4, func(x vec) vec { return w.round(x, 0) })
	u("not", 4, func(x vec) vec { return w.mask(eq, x, w.zeros()) })
	u("isNaN", 4, func(x vec) vec { return w.mask(unord, x, x) })
	u("isFinite", 4, func(x vec) vec { return w.mask(eq, w.sub(x, x), w.zeros()) })

	b("add", func(a, b vec) vec { return w.add(a, b) })
	b("sub", func(a, b vec) vec { return w.sub(a, b) })
	b("mul", func(a, b vec) vec { return w.mul(a, b) })
	b("div", func(a, b vec) vec { return w.div(a, b) })
	b("max", func(a, b vec) vec { return w.choose(w.cmp(unord, a, a), a, w.max(a, b)) })
	b("min", func(a, b vec) vec { return w.choose(w.cmp(unord, a, a), a, w.min(a, b)) })
	for _, c := range []struct {
		name string
		pred int
	}{{"eq", eq}, {"ne", ne}, {"lt", lt}, {"le", le}, {"gt", gt}, {"ge", ge}} {
		b(c.name, func(a, b vec) vec { return w.mask(c.pred, a, b) })
	}
	elementwise(w, "select", []string{"cond", "a", "b"}, 2, func(in []vec) vec {
		return w.choose(w.cmp(ne, in[0], w.zeros()), in[1], in[2])
	})
	elementwise(w, "mulAdd", []string{"a", "b", "c"}, 2, func(in []vec) vec {
		VFMADD231PS(in[0], in[1], in[2])
		return in[2]
	})

	rows(w, "sumRows", func() vec { return w.zeros() }, func(acc, x vec) { VADDPS(x, acc, acc) })
	rows(w, "maxRows", func() vec { return w.load(bits(negInf)) }, func(acc, x vec) {
		m := w.max(acc, x) // x where either is NaN
		VMOVAPS(w.choose(w.cmp(unord, acc, acc), acc, m), acc)
	})
	fillRows(w)
	sumCols(w)
	dotLanes(w)
}

func (w width) zeros() vec { d := w.new(); w.zero(d); return d }

// exp reduces to [-ln2/2, ln2/2] and uses the polynomial of the Cephes library; 2 units in the last place, with
// gradual underflow. What is zero, as the exponentials of a masked softmax, is not computed: a processor takes some
// hundred cycles over a result that underflows.
func (w width) exp(x vec) vec {
	zero := w.cmp(le, x, w.load(f32(-104)))
	c := w.choose(zero, w.zeros(), w.min(w.load(f32(88.8)), x)) // a NaN passes
	n := w.round(w.mul(c, f32(math.Log2E)), 0)
	w.do(fnmadd231ps, f32(0.693359375), n, c)
	w.do(fnmadd231ps, f32(-2.12194440e-4), n, c)
	p := w.horner(c, 1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
	p = w.mul(p, c)
	VFMADD213PS(c, c, p) // p*c*c + c
	p = w.add(p, f32(1))
	if w.lanes == 16 {
		d := w.new()
		VSCALEFPS(n, p, d)
		return w.choose(zero, w.zeros(), d)
	}
	// 2^n in two steps: it may be subnormal or infinite
	i, h, s := w.new(), w.new(), w.new()
	VCVTPS2DQ(n, i)
	VPSRAD(U8(1), i, h)
	VPSUBD(h, i, i)
	for _, e := range []vec{h, i} {
		w.do(paddd, bits(127), e, s)
		VPSLLD(U8(23), s, s)
		p = w.mul(p, s)
	}
	return w.choose(zero, w.zeros(), p)
}

// log is the Cephes library's, for all numbers.
func (w width) log(x vec) vec {
	tiny := w.cmp(lt, x, w.load(f32(0x1p-126)))
	s := w.choose(tiny, w.mul(x, f32(0x1p23)), x)
	e, m := w.new(), w.new()
	VPSRLD(U8(23), s, e)
	w.do(psubd, bits(126), e, e)
	VCVTDQ2PS(e, e)
	e2 := w.sub(e, w.only(tiny, f32(23)))
	m = w.or(w.and(s, bits(0x007fffff)), bits(0x3f000000)) // [0.5, 1)
	low := w.cmp(lt, m, w.load(f32(math.Sqrt2/2)))
	e2 = w.sub(e2, w.only(low, f32(1)))
	f := w.sub(w.choose(low, w.add(m, m), m), f32(1))
	sq := w.mul(f, f)
	p := w.horner(f, 7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
		-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)
	p = w.mul(w.mul(p, f), sq)
	w.do(fmadd231ps, f32(-2.12194440e-4), e2, p)
	w.do(fmadd231ps, f32(-0.5), sq, p)
	r := w.add(f, p)
	w.do(fmadd231ps, f32(0.693359375), e2, r)
	r = w.choose(w.cmp(ge, x, w.zeros()), r, w.load(bits(nan)))
	r = w.choose(w.cmp(eq, x, w.zeros()), w.load(bits(negInf)), r)
	return w.choose(w.cmp(eq, x, w.load(bits(inf))), x, r)
}

// tanh is the rational function of the Eigen library, within 5 units in the last place.
func (w width) tanh(x vec) vec {
	const limit = 7.90531110763549805
	c := w.max(w.load(f32(-limit)), w.min(w.load(f32(limit)), x))
	s := w.mul(c, c)
	p := w.horner(s, -2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08,
		1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03)
	q := w.horner(s, 1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)
	r := w.div(w.mul(p, c), q)
	a := w.and(x, bits(signBit-1))
	r = w.choose(w.cmp(lt, a, w.load(f32(0.0004))), x, r)
	return w.choose(w.cmp(gt, a, w.load(f32(9))), w.signed1(x), r)
}

// erf is the rational function of the Eigen library. AVX-512 has erfTable instead.
func (w width) erf(x vec) vec {
	c := w.max(w.load(f32(-4)), w.min(w.load(f32(4)), x))
	s := w.mul(c, c)
	p := w.horner(s, -2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05,
		-7.34990630306855e-04, -2.95459980854025e-03, -1.60960333262415e-02)
	q := w.horner(s, -1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03,
		-1.42647390514189e-02)
	r := w.div(w.mul(p, c), q)
	small := w.mul(x, f32(2/math.Sqrt(math.Pi))) // where p*c would lose bits
	a := w.and(x, bits(signBit-1))
	r = w.choose(w.cmp(lt, a, w.load(f32(1e-10))), small, r)
	return w.choose(w.cmp(gt, a, w.load(f32(4))), w.signed1(x), r)
}

// signed1 returns 1 with the sign of x.
func (w width) signed1(x vec) vec { return w.or(w.and(x, bits(signBit)), f32(1)) }

// elementwise writes dst[i] = f(in[0][i], ...).
func elementwise(w width, name string, in []string, unroll int, f func(in []vec) vec) {
	prepared(w, name, in, unroll, func() func(in []vec) vec { return f })
}

// prepared is elementwise with a function that needs registers filled before the loop.
func prepared(w width, name string, in []string, unroll int, prepare func() func(in []vec) vec) {
	sig := "func(dst"
	for _, s := range in {
		sig += ", " + s
	}
	TEXT(name+w.suffix, NOSPLIT, sig+" []float32)")
	Pragma("noescape")
	dst, n := Load(Param("dst").Base(), GP64()), Load(Param("dst").Len(), GP64())
	var src []reg.Register
	for _, s := range in {
		src = append(src, Load(Param(s).Base(), GP64()))
	}
	f := prepare()
	at := func(base reg.Register, i int) Mem { return Mem{Base: base, Disp: 4 * w.lanes * i} }
	step := func(count int) {
		for i := range count {
			var v []vec
			for _, s := range src {
				v = append(v, w.load(at(s, i)))
			}
			VMOVUPS(f(v), at(dst, i))
		}
		for _, p := range append([]reg.Register{dst}, src...) {
			ADDQ(U32(uint32(4*w.lanes*count)), p)
		}
	}
	for _, count := range []int{unroll, 1} {
		loop, end := fmt.Sprintf("loop%d", count), fmt.Sprintf("end%d", count)
		SUBQ(U32(uint32(w.lanes*count)), n)
		JLT(LabelRef(end))
		Label(loop)
		step(count)
		SUBQ(U32(uint32(w.lanes*count)), n)
		JGE(LabelRef(loop))
		Label(end)
		ADDQ(U32(uint32(w.lanes*count)), n)
		if unroll == 1 {
			break
		}
	}
	JEQ(LabelRef("done"))
	t := w.tail(n)
	var v []vec
	for _, s := range src {
		v = append(v, t.load(at(s, 0)))
	}
	t.store(f(v), at(dst, 0))
	Label("done")
	VZEROUPPER()
	RET()
}

// tail reads and writes the last, incomplete vector.
type tail struct {
	w width
	m reg.Register
}

// tail prepares for n lanes, 0 < n < lanes.
func (w width) tail(n reg.Register) tail {
	if w.lanes == 8 {
		p, m, k := GP64(), w.new(), GP64()
		LEAQ(laneMask(), p)
		MOVQ(U32(8), k)
		SUBQ(n, k)
		VMOVUPS(Mem{Base: p, Index: k, Scale: 4}, m)
		return tail{w, m}
	}
	MOVQ(n, reg.RCX)
	b, k := GP64(), K()
	MOVQ(U32(1), b)
	SHLQ(reg.CL, b)
	DECQ(b)
	KMOVW(b.As32(), k)
	return tail{w, k}
}

func (t tail) load(m Mem) vec {
	d := t.w.new()
	if t.w.lanes == 8 {
		VMASKMOVPS(m, t.m, d)
	} else {
		VMOVUPS_Z(m, t.m, d)
	}
	return d
}

// loadOver reads into a copy of d, whose other lanes stay.
func (t tail) loadOver(m Mem, d vec) vec {
	if t.w.lanes == 8 {
		return t.w.choose(cond{t.m}, t.load(m), d)
	}
	c := t.w.new()
	VMOVAPS(d, c)
	VMOVUPS(m, t.m, c)
	return c
}

func (t tail) store(v vec, m Mem) {
	if t.w.lanes == 8 {
		VMASKMOVPS(v, t.m, m)
	} else {
		VMOVUPS(v, t.m, m)
	}
}

// rows writes the reduction of each row: dst[r] = reduce(x[r*cols : r*cols+cols]).
func rows(w width, name string, start func() vec, f func(acc, x vec)) {
	TEXT(name+w.suffix, NOSPLIT, "func(dst, x []float32, cols int)")
	Pragma("noescape")
	dst, r := Load(Param("dst").Base(), GP64()), Load(Param("dst").Len(), GP64())
	x, cols := Load(Param("x").Base(), GP64()), Load(Param("cols"), GP64())
	rest, n := GP64(), GP64()
	MOVQ(cols, rest)
	ANDQ(U32(uint32(w.lanes-1)), rest)
	t := tail{w, nil}
	if w.lanes == 8 {
		t = w.tail(rest)
	} else {
		t = w.tail(rest)
	}
	TESTQ(r, r)
	JEQ(LabelRef("done"))
	Label("row")
	a, b := start(), start()
	MOVQ(cols, n)
	SUBQ(U32(uint32(2*w.lanes)), n)
	JLT(LabelRef("one"))
	Label("two")
	f(a, w.load(Mem{Base: x}))
	f(b, w.load(Mem{Base: x, Disp: 4 * w.lanes}))
	ADDQ(U32(uint32(8*w.lanes)), x)
	SUBQ(U32(uint32(2*w.lanes)), n)
	JGE(LabelRef("two"))
	Label("one")
	ADDQ(U32(uint32(w.lanes)), n)
	JLT(LabelRef("rest"))
	f(a, w.load(Mem{Base: x}))
	ADDQ(U32(uint32(4*w.lanes)), x)
	Label("rest")
	TESTQ(rest, rest)
	JEQ(LabelRef("fold"))
	f(b, t.loadOver(Mem{Base: x}, start()))
	LEAQ(Mem{Base: x, Index: rest, Scale: 4}, x)
	Label("fold")
	f(a, b)
	// halve until one lane is left
	if w.lanes == 16 {
		h := ZMM()
		VSHUFF32X4(U8(0x4e), a, a, h)
		f(a, h)
		g := ZMM()
		VSHUFF32X4(U8(0xb1), a, a, g)
		f(a, g)
	} else {
		h := YMM()
		VPERM2F128(U8(1), a, a, h)
		f(a, h)
	}
	for _, s := range []uint8{0x4e, 0xb1} {
		h := w.new()
		VSHUFPS(U8(s), a, a, h)
		f(a, h)
	}
	VMOVSS(a.AsX(), Mem{Base: dst})
	ADDQ(U32(4), dst)
	DECQ(r)
	JNE(LabelRef("row"))
	Label("done")
	VZEROUPPER()
	RET()
}

// fillRows writes x[r*cols+c] = v[r].
func fillRows(w width) {
	TEXT("fillRows"+w.suffix, NOSPLIT, "func(x, v []float32, cols int)")
	Pragma("noescape")
	v, r := Load(Param("v").Base(), GP64()), Load(Param("v").Len(), GP64())
	x, cols := Load(Param("x").Base(), GP64()), Load(Param("cols"), GP64())
	rest, n := GP64(), GP64()
	MOVQ(cols, rest)
	ANDQ(U32(uint32(w.lanes-1)), rest)
	t := w.tail(rest)
	TESTQ(r, r)
	JEQ(LabelRef("done"))
	Label("row")
	a := w.new()
	VBROADCASTSS(Mem{Base: v}, a)
	MOVQ(cols, n)
	SUBQ(U32(uint32(w.lanes)), n)
	JLT(LabelRef("rest"))
	Label("loop")
	VMOVUPS(a, Mem{Base: x})
	ADDQ(U32(uint32(4*w.lanes)), x)
	SUBQ(U32(uint32(w.lanes)), n)
	JGE(LabelRef("loop"))
	Label("rest")
	TESTQ(rest, rest)
	JEQ(LabelRef("next"))
	t.store(a, Mem{Base: x})
	LEAQ(Mem{Base: x, Index: rest, Scale: 4}, x)
	Label("next")
	ADDQ(U32(4), v)
	DECQ(r)
	JNE(LabelRef("row"))
	Label("done")
	VZEROUPPER()
	RET()
}

// sumCols adds all rows of x, of len(dst) elements each, to dst.
func sumCols(w width) {
	TEXT("sumCols"+w.suffix, NOSPLIT, "func(dst, x []float32)")
	Pragma("noescape")
	dst, cols := Load(Param("dst").Base(), GP64()), Load(Param("dst").Len(), GP64())
	x, count := Load(Param("x").Base(), GP64()), Load(Param("x").Len(), GP64())
	stride, p, n, end := GP64(), GP64(), GP64(), GP64()
	LEAQ(Mem{Base: x, Index: count, Scale: 4}, end)
	MOVQ(cols, stride)
	SHLQ(U8(2), stride)
	// column goes down one vector of columns
	column := func(name string, load func() vec, next func(p reg.Register) vec, store func(v vec)) {
		MOVQ(x, p)
		a := load()
		b, c, d := w.zeros(), w.zeros(), w.zeros()
		two, three := GP64(), GP64()
		LEAQ(Mem{Base: stride, Index: stride, Scale: 1}, two)
		LEAQ(Mem{Base: stride, Index: two, Scale: 1}, three)
		MOVQ(end, n)
		SUBQ(three, n) // four rows lie before it
		Label(name + "Four")
		CMPQ(p, n)
		JGE(LabelRef(name + "One"))
		for i, v := range []vec{a, b, c, d} {
			q := GP64()
			switch i {
			case 0:
				MOVQ(p, q)
			case 1:
				LEAQ(Mem{Base: p, Index: stride, Scale: 1}, q)
			case 2:
				LEAQ(Mem{Base: p, Index: two, Scale: 1}, q)
			case 3:
				LEAQ(Mem{Base: p, Index: three, Scale: 1}, q)
			}
			VADDPS(next(q), v, v)
		}
		LEAQ(Mem{Base: p, Index: stride, Scale: 4}, p)
		JMP(LabelRef(name + "Four"))
		Label(name + "One")
		CMPQ(p, end)
		JGE(LabelRef(name + "Sum"))
		VADDPS(next(p), a, a)
		ADDQ(stride, p)
		JMP(LabelRef(name + "One"))
		Label(name + "Sum")
		VADDPS(b, a, a)
		VADDPS(d, c, c)
		VADDPS(c, a, a)
		store(a)
	}
	Label("vector")
	SUBQ(U32(uint32(w.lanes)), cols)
	JLT(LabelRef("rest"))
	column("whole", func() vec { return w.load(Mem{Base: dst}) }, func(p reg.Register) vec { return w.load(Mem{Base: p}) },
		func(v vec) { VMOVUPS(v, Mem{Base: dst}) })
	ADDQ(U32(uint32(4*w.lanes)), dst)
	ADDQ(U32(uint32(4*w.lanes)), x)
	JMP(LabelRef("vector"))
	Label("rest")
	ADDQ(U32(uint32(w.lanes)), cols)
	JEQ(LabelRef("done"))
	t := w.tail(cols)
	column("part", func() vec { return t.load(Mem{Base: dst}) }, func(p reg.Register) vec { return t.load(Mem{Base: p}) },
		func(v vec) { t.store(v, Mem{Base: dst}) })
	Label("done")
	VZEROUPPER()
	RET()
}

// dotLanes computes dst[l] (+)= sum over k of a[aK[k]+l] * b[bK[k]+l].
func dotLanes(w width) {
	TEXT("dotLanes"+w.suffix, NOSPLIT, "func(dst, a, b []float32, aK, bK []int32, add int)")
	Pragma("noescape")
	dst, n := Load(Param("dst").Base(), GP64()), Load(Param("dst").Len(), GP64())
	a, b := Load(Param("a").Base(), GP64()), Load(Param("b").Base(), GP64())
	aK, bK := Load(Param("aK").Base(), GP64()), Load(Param("bK").Base(), GP64())
	count := Load(Param("aK").Len(), GP64())
	at, i, j := GP64(), GP64(), GP64()
	chunk := func(name string, vectors int, t *tail) {
		var acc []vec
		for range vectors {
			acc = append(acc, w.zeros())
		}
		XORQ(at, at)
		Label(name + "K")
		MOVLQSX(Mem{Base: aK, Index: at, Scale: 4}, i)
		MOVLQSX(Mem{Base: bK, Index: at, Scale: 4}, j)
		for v := range vectors {
			m, o := Mem{Base: a, Index: i, Scale: 4, Disp: 4 * w.lanes * v}, Mem{Base: b, Index: j, Scale: 4, Disp: 4 * w.lanes * v}
			if t != nil {
				VFMADD231PS(t.load(m), t.load(o), acc[v])
			} else {
				VFMADD231PS(o, w.load(m), acc[v])
			}
		}
		INCQ(at)
		CMPQ(at, count)
		JLT(LabelRef(name + "K"))
		add, err := Param("add").Resolve()
		if err != nil {
			panic(err)
		}
		CMPQ(add.Addr, Imm(0))
		JE(LabelRef(name + "Store"))
		for v := range vectors {
			m := Mem{Base: dst, Disp: 4 * w.lanes * v}
			if t != nil {
				VADDPS(t.load(m), acc[v], acc[v])
			} else {
				VADDPS(m, acc[v], acc[v])
			}
		}
		Label(name + "Store")
		for v := range vectors {
			m := Mem{Base: dst, Disp: 4 * w.lanes * v}
			if t != nil {
				t.store(acc[v], m)
			} else {
				VMOVUPS(acc[v], m)
			}
		}
		for _, p := range []reg.Register{dst, a, b} {
			ADDQ(U32(uint32(4*w.lanes*vectors)), p)
		}
	}
	for _, vectors := range []int{4, 1} {
		name := fmt.Sprint("chunk", vectors)
		Label(name)
		SUBQ(U32(uint32(w.lanes*vectors)), n)
		JLT(LabelRef(name + "End"))
		chunk(name, vectors, nil)
		JMP(LabelRef(name))
		Label(name + "End")
		ADDQ(U32(uint32(w.lanes*vectors)), n)
	}
	JEQ(LabelRef("done"))
	t := w.tail(n)
	chunk("part", 1, &t)
	Label("done")
	VZEROUPPER()
	RET()
}

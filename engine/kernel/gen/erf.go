package main

import (
	"fmt"
	"math"

	. "github.com/mmcloughlin/avo/build"
	. "github.com/mmcloughlin/avo/operand"
)

// erfTable is the error function as polynomials in vectors: one for each quarter of [0, 4), its coefficients in the
// lanes of six registers, lowest first. A lookup and a multiply-add are cheaper than a quotient.
type erfTable [6]vec

const erfDegree = 5

// newErfTable loads the table, before the loop that uses it.
func newErfTable() (t erfTable) {
	var c [16][erfDegree + 1]float64
	for i := range c {
		c[i] = erfPolynomial(i)
	}
	for k := range t {
		m := GLOBL(fmt.Sprintf("erf%d", k), RODATA|NOPTR)
		for i := range c {
			DATA(4*i, U32(math.Float32bits(float32(c[i][k]))))
		}
		t[k] = z.load(m)
	}
	return t
}

// at returns erf(x), within 2 units in the last place.
func (e erfTable) at(x vec) vec {
	a := z.min(z.load(f32(float64(math.Nextafter32(4, 0)))), z.and(x, bits(signBit-1))) // a NaN passes
	s := z.mul(a, f32(4))
	i, n := z.new(), z.new()
	VCVTTPS2DQ(s, i)
	VCVTDQ2PS(i, n)
	t := z.sub(s, n)
	p := z.new()
	VPERMPS(e[erfDegree], i, p)
	for k := erfDegree - 1; k >= 0; k-- {
		c := z.new()
		VPERMPS(e[k], i, c)
		VFMADD213PS(c, t, p)
	}
	VPTERNLOGD_BCST(U8(0xf8), bits(signBit), x, p) // p | x & sign
	return p
}

// erfPolynomial interpolates erf((i+t)/4) for t in [0, 1) at the zeros of a Chebyshev polynomial. The first one has no
// constant, so that its relative error is small, too.
func erfPolynomial(i int) (c [erfDegree + 1]float64) {
	f, n := func(t float64) float64 { return math.Erf((float64(i) + t) / 4) }, erfDegree+1
	if i == 0 {
		f, n = func(t float64) float64 { return math.Erf(t/4) / t }, erfDegree
	}
	rows := make([][]float64, n)
	for j := range rows {
		t := (1 + math.Cos(math.Pi*float64(2*j+1)/float64(2*n))) / 2
		for k := range n {
			rows[j] = append(rows[j], math.Pow(t, float64(k)))
		}
		rows[j] = append(rows[j], f(t))
	}
	x := solve(rows)
	copy(c[len(c)-n:], x)
	return c
}

// solve returns x with A·x = b, of the rows [A b], by elimination with pivots.
func solve(rows [][]float64) []float64 {
	n := len(rows)
	for k := range n {
		best := k
		for r := k; r < n; r++ {
			if math.Abs(rows[r][k]) > math.Abs(rows[best][k]) {
				best = r
			}
		}
		rows[k], rows[best] = rows[best], rows[k]
		for r := range n {
			if f := rows[r][k] / rows[k][k]; r != k {
				for c := k; c <= n; c++ {
					rows[r][c] -= f * rows[k][c]
				}
			}
		}
	}
	x := make([]float64, n)
	for k := range x {
		x[k] = rows[k][n] / rows[k][k]
	}
	return x
}

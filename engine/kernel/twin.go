package kernel

import (
	"math"
	"unsafe"
)

// twins returns the plain Go kernels, which define all others.
func twins() *Set {
	s := &Set{
		Select: selectTwin, MulAdd: mulAddTwin, Adam: adamTwin, SumRows: rows(sumTwin), MaxRows: rows(maxTwin), FillRows: fillRowsTwin, SumCols: sumColsTwin,
		tile: twinTiles(), dotLanes: dotLanesTwin, packEight: packEightTwin, copyPanels: copyPanelsTwin,
	}
	s.Unary = [numUnary]func(dst, x []float32){
		Copy:     func(dst, x []float32) { copy(dst, x) },
		Neg:      unary(func(x float32) float32 { return -x }),
		Abs:      unary(func(x float32) float32 { return math.Float32frombits(math.Float32bits(x) &^ (1 << 31)) }),
		Sqrt:     unary(func(x float32) float32 { return float32(math.Sqrt(float64(x))) }),
		Rsqrt:    unary(func(x float32) float32 { return float32(1 / math.Sqrt(float64(x))) }),
		Exp:      unary(func(x float32) float32 { return float32(math.Exp(float64(x))) }),
		Expm1:    unary(func(x float32) float32 { return float32(math.Expm1(float64(x))) }),
		Log:      unary(func(x float32) float32 { return float32(math.Log(float64(x))) }),
		Log1p:    unary(func(x float32) float32 { return float32(math.Log1p(float64(x))) }),
		Tanh:     unary(func(x float32) float32 { return float32(math.Tanh(float64(x))) }),
		Logistic: unary(func(x float32) float32 { return float32(1 / (1 + math.Exp(-float64(x)))) }),
		Erf:      unary(func(x float32) float32 { return float32(math.Erf(float64(x))) }),
		Sin:      unary(func(x float32) float32 { return float32(math.Sin(float64(x))) }),
		Cos:      unary(func(x float32) float32 { return float32(math.Cos(float64(x))) }),
		Sign:     unary(func(x float32) float32 { return mask(x > 0) - mask(x < 0) }),
		Floor:    unary(func(x float32) float32 { return float32(math.Floor(float64(x))) }),
		Ceil:     unary(func(x float32) float32 { return float32(math.Ceil(float64(x))) }),
		Round:    unary(func(x float32) float32 { return float32(math.RoundToEven(float64(x))) }),
		Not:      unary(func(x float32) float32 { return mask(x == 0) }),
		IsNaN:    unary(func(x float32) float32 { return mask(x != x) }),
		IsFinite: unary(func(x float32) float32 { return mask(x-x == 0) }),
		Square:   unary(func(x float32) float32 { return x * x }),
	}
	s.Binary = [numBinary]func(dst, a, b []float32){
		Add: binary(func(a, b float32) float32 { return a + b }),
		Sub: binary(func(a, b float32) float32 { return a - b }),
		Mul: binary(func(a, b float32) float32 { return a * b }),
		Div: binary(func(a, b float32) float32 { return a / b }),
		Max: binary(func(a, b float32) float32 { return max(a, b) }),
		Min: binary(func(a, b float32) float32 { return min(a, b) }),
		Pow: binary(func(a, b float32) float32 { return float32(math.Pow(float64(a), float64(b))) }),
		Rem: binary(func(a, b float32) float32 { return float32(math.Mod(float64(a), float64(b))) }),
		Eq:  binary(func(a, b float32) float32 { return mask(a == b) }),
		Ne:  binary(func(a, b float32) float32 { return mask(a != b) }),
		Lt:  binary(func(a, b float32) float32 { return mask(a < b) }),
		Le:  binary(func(a, b float32) float32 { return mask(a <= b) }),
		Gt:  binary(func(a, b float32) float32 { return mask(a > b) }),
		Ge:  binary(func(a, b float32) float32 { return mask(a >= b) }),
	}
	return s
}

func mask(b bool) float32 {
	if b {
		return 1
	}
	return 0
}

func unary(f func(float32) float32) func(dst, x []float32) {
	return func(dst, x []float32) {
		x = x[:len(dst)]
		for i, v := range x {
			dst[i] = f(v)
		}
	}
}

func binary(f func(a, b float32) float32) func(dst, a, b []float32) {
	return func(dst, a, b []float32) {
		a, b = a[:len(dst)], b[:len(dst)]
		for i, v := range a {
			dst[i] = f(v, b[i])
		}
	}
}

func selectTwin(dst, cond, a, b []float32) {
	cond, a, b = cond[:len(dst)], a[:len(dst)], b[:len(dst)]
	for i, c := range cond {
		if c != 0 {
			dst[i] = a[i]
		} else {
			dst[i] = b[i]
		}
	}
}

func mulAddTwin(dst, a, b, c []float32) {
	a, b, c = a[:len(dst)], b[:len(dst)], c[:len(dst)]
	for i := range dst {
		dst[i] = a[i]*b[i] + c[i]
	}
}

// rows lifts a reduction of a vector to rows.
func rows(f func(x []float32) float32) func(dst, x []float32, cols int) {
	return func(dst, x []float32, cols int) {
		for r := range dst {
			dst[r] = f(x[r*cols : r*cols+cols])
		}
	}
}

func sumColsTwin(dst, x []float32) {
	for n := len(dst); len(x) >= n && n > 0; x = x[n:] {
		for i, v := range x[:n] {
			dst[i] += v
		}
	}
}

func fillRowsTwin(x, v []float32, cols int) {
	for r, a := range v {
		row := x[r*cols : r*cols+cols]
		for i := range row {
			row[i] = a
		}
	}
}

func sumTwin(x []float32) float32 {
	var s [4]float32
	i := 0
	for ; i+4 <= len(x); i += 4 {
		s[0] += x[i]
		s[1] += x[i+1]
		s[2] += x[i+2]
		s[3] += x[i+3]
	}
	for ; i < len(x); i++ {
		s[0] += x[i]
	}
	return (s[0] + s[1]) + (s[2] + s[3])
}

func maxTwin(x []float32) float32 {
	m := float32(math.Inf(-1))
	for _, v := range x {
		m = max(m, v)
	}
	return m
}

// packEightTwin defines packEight: dst[k*stride+i] = src[rows[i]+k] for eight rows i and n elements k.
func packEightTwin(dst *float32, stride int, src *float32, rows *int32, n int) {
	d := unsafe.Slice(dst, max(0, (n-1)*stride+8))
	for i, o := range unsafe.Slice(rows, 8) {
		x := unsafe.Slice((*float32)(unsafe.Add(unsafe.Pointer(src), int(o)*4)), n)
		for k, v := range x {
			d[k*stride+i] = v
		}
	}
}

// copyPanelsTwin defines copyPanels: dst[p*panel+i] = src[p*step+i] for n panels p and 8*eights elements i.
func copyPanelsTwin(dst *float32, panel int, src *float32, step, n, eights int) {
	for p := range n {
		copy(unsafe.Slice((*float32)(unsafe.Add(unsafe.Pointer(dst), p*panel*4)), 8*eights),
			unsafe.Slice((*float32)(unsafe.Add(unsafe.Pointer(src), p*step*4)), 8*eights))
	}
}

package prune

import "fmt"

// SparseFFN runs a feed-forward layer
//
//	y = V·Top_k(max(K x + b_K, 0)) + b_V
//
// token by token for inference, and skips what is zero: the first product is dense, and the second adds up only the
// columns of V whose neuron is active (arXiv:2210.06313, section 4). Of the 4·d·d_ff floating-point operations per token
// 2·d·d_ff·(1+ρ) are left at a share ρ of active neurons. It is for one token or a few at a time, as in decoding: every
// token has its own list of neurons, and a large batch is faster as a dense matrix product. It is not safe for
// concurrent use.
type SparseFFN struct {
	d, dff, topk int
	k, bk        []float32 // [dff, d], [dff]
	vt, bv       []float32 // V transposed [dff, d], [d]
	a            []float32 // of the token at hand
	idx          []int32
}

// NewSparseFFN takes weights K [dff, d] and V [d, dff] as a Dense layer has them, and their biases, nil for none. A topk of
// 0 keeps all positive activations; one above dff does too. K and the biases are kept, not copied.
func NewSparseFFN(k, bk, v, bv []float32, d, dff, topk int) (*SparseFFN, error) {
	switch {
	case d < 1 || dff < 1:
		return nil, fmt.Errorf("prune: a feed-forward layer of width %d with %d hidden units; want at least 1 of each", d, dff)
	case topk < 0:
		return nil, fmt.Errorf("prune: top-k with k = %d; want at least 1, or 0 for all", topk)
	case len(k)/d != dff || len(k)%d != 0 || len(v) != len(k):
		return nil, fmt.Errorf("prune: weights of %d and %d values; want [%d, %d] and [%d, %d]", len(k), len(v), dff, d, d, dff)
	case bk != nil && len(bk) != dff:
		return nil, fmt.Errorf("prune: %d biases for %d hidden units", len(bk), dff)
	case bv != nil && len(bv) != d:
		return nil, fmt.Errorf("prune: %d biases for %d outputs", len(bv), d)
	}
	f := &SparseFFN{d: d, dff: dff, topk: topk, k: k, bk: bk, bv: bv, vt: make([]float32, len(v)), a: make([]float32, dff), idx: make([]int32, 0, dff)}
	if bk == nil {
		f.bk = make([]float32, dff)
	}
	if bv == nil {
		f.bv = make([]float32, d)
	}
	for o := range d {
		for i := range dff {
			f.vt[i*d+o] = v[o*dff+i]
		}
	}
	return f, nil
}

// Forward computes y [tokens, d] of x [tokens, d] and returns how many entries of V's columns it used, summed over the
// tokens. A NaN among the hidden activations is refused.
func (f *SparseFFN) Forward(y, x []float32) (active int, err error) {
	return f.forward(y, x, func(a []float32) []int32 {
		idx := f.idx[:0]
		for i, v := range a {
			if v > 0 {
				idx = append(idx, int32(i))
			}
		}
		return selectLargest(a, idx, f.topk)
	})
}

// Dense computes the same without skipping: what Forward's speed is to be compared with.
func (f *SparseFFN) Dense(y, x []float32) error {
	_, err := f.forward(y, x, func(a []float32) []int32 {
		idx := f.idx[:0]
		for i := range a {
			idx = append(idx, int32(i))
		}
		if f.topk == 0 || f.topk >= len(a) {
			for i, v := range a {
				a[i] = max(v, 0)
			}
			return idx
		}
		kept := largest(a, f.topk)
		values := make([]float32, len(kept))
		for j, i := range kept {
			values[j] = a[i]
		}
		clear(a)
		for j, i := range kept {
			a[i] = values[j]
		}
		return idx
	})
	return err
}

func (f *SparseFFN) forward(y, x []float32, choose func(a []float32) []int32) (active int, err error) {
	if len(x)%f.d != 0 || len(y) != len(x) {
		return 0, fmt.Errorf("prune: %d inputs and %d outputs of a feed-forward layer of width %d; want [tokens, %d] for both", len(x), len(y), f.d, f.d)
	}
	for t := 0; t < len(x); t += f.d {
		row := x[t : t+f.d]
		for i := range f.a {
			f.a[i] = f.bk[i] + dot(f.k[i*f.d:(i+1)*f.d], row)
		}
		if err := finite(f.a, 0); err != nil {
			return active, fmt.Errorf("token %d: %w", t/f.d, err)
		}
		idx := choose(f.a)
		active += len(idx)
		out := y[t : t+f.d]
		copy(out, f.bv)
		f.addColumns(out, idx)
	}
	return active, nil
}

// addColumns adds Σ a_i V_i over idx, four columns at a time.
func (f *SparseFFN) addColumns(y []float32, idx []int32) {
	column := func(i int32) []float32 { return f.vt[int(i)*f.d:][:len(y)] }
	for ; len(idx) >= 4; idx = idx[4:] {
		a, b, c, d := f.a[idx[0]], f.a[idx[1]], f.a[idx[2]], f.a[idx[3]]
		va, vb, vc, vd := column(idx[0]), column(idx[1]), column(idx[2]), column(idx[3])
		for o := range y {
			y[o] += a*va[o] + b*vb[o] + c*vc[o] + d*vd[o]
		}
	}
	for _, i := range idx {
		a, v := f.a[i], column(i)
		for o := range y {
			y[o] += a * v[o]
		}
	}
}

// dot sums in four lanes.
func dot(a, b []float32) float32 {
	var s0, s1, s2, s3 float32
	b = b[:len(a)]
	for len(a) >= 4 && len(b) >= 4 {
		s0 += a[0] * b[0]
		s1 += a[1] * b[1]
		s2 += a[2] * b[2]
		s3 += a[3] * b[3]
		a, b = a[4:], b[4:]
	}
	for i := range a {
		s0 += a[i] * b[i]
	}
	return s0 + s1 + s2 + s3
}

// FFNFLOPs are the floating-point operations, a multiply-add counting two, of a feed-forward layer of width d with dff
// hidden units for so many tokens: all of them, and those that are left when the second product skips inactive
// neurons, at a share nonzero of active ones (arXiv:2210.06313, section 4).
//
//	dense = 4·d·d_ff·tokens,  sparse = 2·d·d_ff·(1 + nonzero)·tokens
func FFNFLOPs(d, dff, tokens int, nonzero float64) (dense, sparse float64) {
	one := 2 * float64(d) * float64(dff) * float64(tokens)
	return 2 * one, one * (1 + nonzero)
}

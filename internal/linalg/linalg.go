// Package linalg solves the symmetric systems that several methods share: Cholesky factors of second-moment matrices,
// damped until they exist. All arithmetic is float64.
package linalg

import (
	"fmt"
	"math"
	"slices"

	"gonum.org/v1/gonum/mat"
)

// Damping says what is added to the diagonal of a symmetric matrix A before it is factored, and how often it is tried
// again with more. The zero value adds nothing and tries once.
type Damping struct {
	Relative float64 // times the mean of A's diagonal
	Absolute float64
	Retries  int     // further attempts when A is not positive definite
	Grow     float64 // each multiplies what is added by this; 0: the same amount is added once more
}

// SingularError: a matrix is not positive definite, however much of the allowed damping is added.
type SingularError struct {
	Size     int
	Smallest float64 // eigenvalue of the undamped matrix
	Added    float64 // to the diagonal at the last attempt
}

// Error names the size and the smallest eigenvalue.
func (e *SingularError) Error() string {
	return fmt.Sprintf("linalg: a matrix of order %d is not positive definite (smallest eigenvalue %g) even with %g added to its diagonal; give more examples or more damping", e.Size, e.Smallest, e.Added)
}

// Cholesky factors a + λI and returns λ, what was added. It fails with a *SingularError, or when a holds NaN.
func Cholesky(a mat.Symmetric, d Damping) (c *mat.Cholesky, added float64, err error) {
	n := a.SymmetricDim()
	if n == 0 {
		return nil, 0, fmt.Errorf("linalg: a matrix of order 0 has no factor")
	}
	mean := 0.
	for i := range n {
		mean += a.At(i, i) / float64(n)
	}
	if math.IsNaN(mean) || math.IsInf(mean, 0) {
		return nil, 0, fmt.Errorf("linalg: the diagonal of a matrix of order %d is not finite", n)
	}
	step := d.Relative*mean + d.Absolute
	added = step
	for try := 0; ; try++ {
		s := mat.NewSymDense(n, nil)
		s.CopySym(a)
		for i := range n {
			s.SetSym(i, i, s.At(i, i)+added)
		}
		c = new(mat.Cholesky)
		if c.Factorize(s) {
			return c, added, nil
		}
		if try == d.Retries {
			return nil, added, &SingularError{n, smallest(a), added}
		}
		if d.Grow > 0 {
			added *= d.Grow
		} else {
			added += step
		}
	}
}

// smallest is the smallest eigenvalue, NaN if it cannot be found.
func smallest(a mat.Symmetric) float64 {
	var e mat.EigenSym
	if !e.Factorize(a, false) {
		return math.NaN()
	}
	return e.Values(nil)[0]
}

// InverseUpper returns U, upper triangular, with A⁻¹ = UᵀU, from A's Cholesky factor: what column-by-column solvers of
// quantised least squares step along (Frantar et al., arXiv:2210.17323, section 3.3).
func InverseUpper(c *mat.Cholesky) (*mat.TriDense, error) {
	var inv mat.SymDense
	if err := c.InverseTo(&inv); err != nil {
		return nil, fmt.Errorf("linalg: %w", err)
	}
	var f mat.Cholesky
	if !f.Factorize(&inv) {
		return nil, &SingularError{inv.SymmetricDim(), smallest(&inv), 0}
	}
	u := new(mat.TriDense)
	f.UTo(u)
	return u, nil
}

// Gram accumulates XᵀX of rows x [n, d] into s: the raw second moment, not divided by anything.
func Gram[F float32 | float64](s *mat.SymDense, x []F, d int) error {
	if s.SymmetricDim() != d || d == 0 || len(x)%d != 0 {
		return fmt.Errorf("linalg: %d values are no rows of %d for a matrix of order %d", len(x), d, s.SymmetricDim())
	}
	for part := range slices.Chunk(x, block*d) {
		s.SymRankK(s, 1, dense(part, d).T())
	}
	return nil
}

// Cross accumulates YᵀX of rows y [n, r] and x [n, d] into s [r, d].
func Cross[F float32 | float64](s *mat.Dense, y, x []F, d int) error {
	r, c := s.Dims()
	if c != d || d == 0 || r == 0 || len(x)%d != 0 || len(y) != len(x)/d*r {
		return fmt.Errorf("linalg: %d and %d values are no rows of %d and %d", len(y), len(x), r, d)
	}
	var product mat.Dense
	for from := 0; from < len(x)/d; from += block {
		to := min(from+block, len(x)/d)
		product.Mul(dense(y[from*r:to*r], r).T(), dense(x[from*d:to*d], d))
		s.Add(s, &product)
	}
	return nil
}

const block = 256 // rows at a time: the copy in float64 stays small

// dense copies rows of d values.
func dense[F float32 | float64](x []F, d int) *mat.Dense {
	v := make([]float64, len(x))
	for i, f := range x {
		v[i] = float64(f)
	}
	return mat.NewDense(len(x)/d, d, v)
}

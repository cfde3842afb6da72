package quant

import (
	"errors"
	"fmt"
	"math"
	"slices"

	"gonum.org/v1/gonum/mat"

	"github.com/lathe-ml/lathe/internal/linalg"
)

// ErrSingular: the second moment of a layer's inputs has no inverse, whatever damping was allowed.
var ErrSingular = errors.New("the inputs' second moment is singular")

// ReconstructOptions are the knobs of Reconstruct. The zero value is the default.
type ReconstructOptions struct {
	Damp float64 // λ over the mean of H's diagonal; 0: 0.01; below 0: none
	// Ridge is how much the target keeps to the given weight, over the mean of H's diagonal, in the place of λ in W*; 0: λ,
	// as the equations have it. HeldOutRidge chooses it: the fewer tokens a layer sees for each of its columns, the more the
	// outputs' noise would be fitted, most of all by a head, which reads one token of each case.
	Ridge float64
	// NoRidge starts from the given weight instead of the target that fits the outputs best, so that the errors which
	// the layers before have put into the inputs are not compensated.
	NoRidge bool
	// NoBias leaves the mean error of the outputs where it is.
	NoBias bool
	// Descending quantises the columns in the order of falling input power instead of their own.
	Descending bool
	// Grid fixes the grid, one scale and zero point per row. nil: it is fitted to the target by CalibrateUniform.
	Grid *Affine
}

// HeldOutRidge chooses Ridge among 0.01, 0.1, 1, 10 and infinity (the target is the given weight), by fitting the first
// three quarters of the rows and judging on the last one.
const HeldOutRidge = -1

// Reconstruction is a linear layer's weight as Reconstruct leaves it.
type Reconstruction struct {
	Target []float64 // W*, what was quantised [out, d]
	Codes  []int32   // [out, d]
	Weight []float64 // what the codes stand for [out, d]
	Grid   Affine    // of the rows
	Bias   []float64 // to add to the layer's bias [out]; nil with NoBias

	MSE     float64 // mean((Y - X_q W_qᵀ)²), without Bias
	Rounded float64 // the same of the given weight rounded to Grid
	Damping float64 // λ, as it was needed
	Ridge   float64 // as it was chosen, over the mean of H's diagonal; +Inf: the target is the given weight
}

// Reconstruct quantises a linear layer's weight w [out, d] to bits, so that on the inputs which the quantised network
// feeds it, xq [n, d], it gives the outputs y [n, out] of the float network, bias not included
// (arXiv:2402.05628, section III-D; solved layer by layer as in arXiv:2210.17323):
//
//	H = XqᵀXq/n,  λ = Damp·mean(diag H)
//	W* = (YᵀXq/n + λW)(H + λI)⁻¹                     absorbs the error of the inputs (see Ridge)
//	(s, z) per row of W*
//	for each column j:  q = round to the grid, e = (W*[:,j] - q)/U[j,j],  W*[:,j+1:] -= e ⊗ U[j,j+1:]
//	bias += mean(Y - Xq W_qᵀ)
//
// where (H + λI)⁻¹ = UᵀU. With fewer tokens than columns the damping makes H invertible; when it does not, it is raised
// tenfold up to three times. A column that no token uses keeps its weight. All arithmetic is float64. Cost: O(n·d²) for H,
// O(d³) for U, both once for all layers that read the same input, and O(out·d²).
//
// Errors: ErrBits, ErrEmpty, ErrNotFinite, ErrSingular, sizes that do not fit.
func Reconstruct[F float32 | float64](w, xq, y []F, d, bits int, o ReconstructOptions) (*Reconstruction, error) {
	in, err := newLayerInput(xq, d, o)
	if err != nil {
		return nil, err
	}
	return reconstruct(in, w, xq, y, bits, o)
}

// layerInput is what the solution needs to know of a layer's inputs, shared by all layers that read them.
type layerInput struct {
	n, d   int
	h      *mat.SymDense // second moment
	mean   []float64
	order  []int // in which the columns are quantised; nil: their own
	chol   *mat.Cholesky
	upper  *mat.TriDense // U, rows and columns in that order
	lambda float64
	diag   float64 // mean of H's diagonal
	// With HeldOutRidge: rows [0, fitted) and their second moment, and that of the rest.
	fitted      int
	hFit, hHeld *mat.SymDense
	factors     map[*mat.SymDense]map[float64]*mat.Cholesky // of H + ridge
}

func newLayerInput[F float32 | float64](xq []F, d int, o ReconstructOptions) (*layerInput, error) {
	switch {
	case d < 1 || len(xq)%d != 0:
		return nil, fmt.Errorf("quant: reconstruct: %d activations are no rows of %d", len(xq), d)
	case len(xq) == 0:
		return nil, fmt.Errorf("quant: reconstruct: %w", ErrEmpty)
	case math.IsNaN(o.Damp) || math.IsInf(o.Damp, 0):
		return nil, fmt.Errorf("quant: reconstruct: damping %g; accepted: a positive number, or a negative one for none", o.Damp)
	case math.IsNaN(o.Ridge) || o.Ridge < 0 && o.Ridge != HeldOutRidge:
		return nil, fmt.Errorf("quant: reconstruct: ridge %g; accepted: a positive number, or HeldOutRidge", o.Ridge)
	}
	if err := checkFinite(xq); err != nil {
		return nil, fmt.Errorf("reconstruct: activations: %w", err)
	}
	in := &layerInput{n: len(xq) / d, d: d, mean: make([]float64, d), factors: map[*mat.SymDense]map[float64]*mat.Cholesky{}}
	if in.fitted = in.n - in.n/4; o.Ridge == HeldOutRidge && !o.NoRidge && in.fitted < in.n {
		in.hFit, in.hHeld, in.h = secondMoment(xq[:in.fitted*d], d), secondMoment(xq[in.fitted*d:], d), mat.NewSymDense(d, nil)
		a, b := float64(in.fitted)/float64(in.n), float64(in.n-in.fitted)/float64(in.n)
		for i := range d {
			for j := i; j < d; j++ {
				in.h.SetSym(i, j, a*in.hFit.At(i, j)+b*in.hHeld.At(i, j))
			}
		}
	} else {
		in.h = secondMoment(xq, d)
	}
	in.diag = mat.Trace(in.h) / float64(d)
	for i, v := range xq {
		in.mean[i%d] += float64(v) / float64(in.n)
	}
	damping := linalg.Damping{Relative: o.Damp, Retries: 3, Grow: 10}
	if o.Damp == 0 {
		damping.Relative = .01
	}
	if damping.Relative < 0 {
		damping = linalg.Damping{}
	} else if in.diag == 0 { // nothing flows: every weight is its own best
		damping.Absolute = 1
	}
	var err error
	if in.chol, in.lambda, err = linalg.Cholesky(in.h, damping); err != nil {
		return nil, fmt.Errorf("quant: reconstruct: %w: %w", ErrSingular, err)
	}
	factor := in.chol
	if o.Descending {
		in.order = make([]int, d)
		for i := range in.order {
			in.order[i] = i
		}
		slices.SortStableFunc(in.order, func(a, b int) int {
			switch x, y := in.h.At(a, a), in.h.At(b, b); {
			case x > y:
				return -1
			case x < y:
				return 1
			}
			return 0
		})
		turned := mat.NewSymDense(d, nil)
		for i := range d {
			for j := i; j < d; j++ {
				turned.SetSym(i, j, in.h.At(in.order[i], in.order[j]))
			}
		}
		if factor, _, err = linalg.Cholesky(turned, linalg.Damping{Absolute: in.lambda}); err != nil {
			return nil, fmt.Errorf("quant: reconstruct: %w: %w", ErrSingular, err)
		}
	}
	if in.upper, err = linalg.InverseUpper(factor); err != nil {
		return nil, fmt.Errorf("quant: reconstruct: %w: %w", ErrSingular, err)
	}
	return in, nil
}

// reconstruct is Reconstruct on an input that is known.
func reconstruct[F float32 | float64](in *layerInput, w, xq, y []F, bits int, o ReconstructOptions) (*Reconstruction, error) {
	d := in.d
	if err := checkBits(bits); err != nil {
		return nil, err
	}
	out := len(w) / d
	if out == 0 || len(w) != out*d || len(xq) != in.n*d || len(y) != in.n*out {
		return nil, fmt.Errorf("quant: reconstruct: %d weights and %d outputs do not fit %d inputs of %d columns", len(w), len(y), in.n, d)
	}
	if err := checkFinite(w); err != nil {
		return nil, fmt.Errorf("reconstruct: weights: %w", err)
	}
	if err := checkFinite(y); err != nil {
		return nil, fmt.Errorf("reconstruct: outputs: %w", err)
	}
	n := float64(in.n)
	given := mat.NewDense(out, d, widen(w))
	cut := in.n
	if in.hFit != nil {
		cut = in.fitted
	}
	cross, rest := mat.NewDense(out, d, nil), mat.NewDense(out, d, nil) // YᵀXq/n, of all rows and of those held out
	if err := errors.Join(linalg.Cross(cross, y[:cut*out], xq[:cut*d], d), linalg.Cross(rest, y[cut*out:], xq[cut*d:], d)); err != nil {
		return nil, err
	}
	ridge := o.Ridge
	switch {
	case o.NoRidge || in.diag == 0:
		ridge = math.Inf(1)
	case ridge == 0:
		ridge = in.lambda / in.diag
	case in.hFit != nil:
		var fit, held mat.Dense
		fit.Scale(1/float64(cut), cross)
		held.Scale(1/float64(in.n-cut), rest)
		var err error
		if ridge, err = in.chooseRidge(given, &fit, &held); err != nil {
			return nil, err
		}
	case ridge == HeldOutRidge: // too few rows to hold any out
		ridge = math.Inf(1)
	}
	cross.Add(cross, rest)
	cross.Scale(1/n, cross)
	power, mean := 0., make([]float64, out)
	for i, v := range y {
		power += float64(v) * float64(v) / n
		mean[i%out] += float64(v) / n
	}
	mse := func(w *mat.Dense) float64 { return max(0, (power+misfit(w, cross, in.h))/float64(out)) }

	target, err := in.target(in.h, given, cross, ridge)
	if err != nil {
		return nil, err
	}
	r := &Reconstruction{Target: target.RawMatrix().Data, Damping: in.lambda, Ridge: ridge}
	shape := []int{out, d}
	if o.Grid != nil {
		r.Grid = *o.Grid
		if r.Grid.Bits != bits || r.Grid.Axis != 0 || r.Grid.Group != 0 {
			return nil, fmt.Errorf("quant: reconstruct: the grid has %d bits along axis %d in groups of %d; want %d bits per row", r.Grid.Bits, r.Grid.Axis, r.Grid.Group, bits)
		}
		if _, err := r.Grid.layout(len(w), shape); err != nil {
			return nil, err
		}
		if err := r.Grid.Validate(); err != nil {
			return nil, err
		}
	} else {
		if r.Grid, err = CalibrateUniform(narrow(r.Target), shape, 0, bits); err != nil {
			return nil, err
		}
	}
	r.Codes = in.propagate(r.Target, r.Grid)
	r.Weight = decodeRows(r.Codes, r.Grid, d)
	rounded := make([]int32, len(w))
	for i, v := range given.RawMatrix().Data {
		rounded[i] = r.Grid.code64(v, i/d)
	}
	r.MSE, r.Rounded = mse(mat.NewDense(out, d, r.Weight)), mse(mat.NewDense(out, d, decodeRows(rounded, r.Grid, d)))
	if !o.NoBias {
		var fed mat.VecDense
		fed.MulVec(mat.NewDense(out, d, r.Weight), mat.NewVecDense(d, in.mean))
		r.Bias = make([]float64, out)
		for i := range r.Bias {
			r.Bias[i] = mean[i] - fed.AtVec(i)
		}
	}
	return r, nil
}

// target is (cross + ρW)(h + ρI)⁻¹ with ρ = ridge·mean(diag H); W itself when ridge is infinite.
func (in *layerInput) target(h *mat.SymDense, given, cross *mat.Dense, ridge float64) (*mat.Dense, error) {
	target := mat.DenseCopyOf(given)
	if math.IsInf(ridge, 1) {
		return target, nil
	}
	rho := ridge * in.diag
	chol := in.factors[h][rho]
	if h == in.h && rho == in.lambda {
		chol = in.chol
	}
	if chol == nil {
		var err error
		if chol, _, err = linalg.Cholesky(h, linalg.Damping{Absolute: rho, Retries: 3, Grow: 10}); err != nil {
			return nil, fmt.Errorf("quant: reconstruct: %w: %w", ErrSingular, err)
		}
		if in.factors[h] == nil {
			in.factors[h] = map[float64]*mat.Cholesky{}
		}
		in.factors[h][rho] = chol
	}
	target.Scale(rho, given)
	target.Add(target, cross)
	var solved mat.Dense
	if err := chol.SolveTo(&solved, target.T()); err != nil {
		return nil, fmt.Errorf("quant: reconstruct: %w: %w", ErrSingular, err)
	}
	target.Copy(solved.T())
	return target, nil
}

// chooseRidge fits part of the rows with several ridges and takes the one whose target is best on the others.
func (in *layerInput) chooseRidge(given, fit, held *mat.Dense) (float64, error) {
	ridge, best := math.Inf(1), misfit(given, held, in.hHeld)
	for _, r := range []float64{.01, .1, 1, 10} {
		target, err := in.target(in.hFit, given, fit, r)
		if err != nil {
			return 0, err
		}
		if m := misfit(target, held, in.hHeld); m < best {
			ridge, best = r, m
		}
	}
	return ridge, nil
}

// misfit is Σ over rows of mean((Y - X Wᵀ)²) less that of Y, from the moments.
func misfit(w, cross *mat.Dense, h *mat.SymDense) float64 {
	var wh mat.Dense
	wh.Mul(w, h)
	sum := 0.
	for i, v := range wh.RawMatrix().Data {
		sum += w.RawMatrix().Data[i] * (v - 2*cross.RawMatrix().Data[i])
	}
	return sum
}

// propagate rounds the columns of target [out, d] one after the other, spreading the error of each over those that are
// still to come.
func (in *layerInput) propagate(target []float64, grid Affine) []int32 {
	d := in.d
	codes, w := make([]int32, len(target)), make([]float64, len(target))
	column := func(j int) int { return j }
	if in.order != nil {
		column = func(j int) int { return in.order[j] }
	}
	for o := 0; o < len(target); o += d {
		for j := range d {
			w[o+j] = target[o+column(j)]
		}
	}
	u := in.upper.RawTriangular()
	const rows = 16 // at a time: a row of U serves all of them from the cache
	for first := 0; first < len(w)/d; first += rows {
		for j := range d {
			across := u.Data[j*u.Stride+j : j*u.Stride+d]
			for o := first; o < min(first+rows, len(w)/d); o++ {
				rest := w[o*d+j : (o+1)*d]
				c := grid.code64(rest[0], o)
				codes[o*d+column(j)] = c
				e := (rest[0] - (float64(c)-grid.Zero[o])*grid.Scale[o]) / across[0]
				for k, v := range across {
					rest[k] -= e * v
				}
			}
		}
	}
	return codes
}

// code64 is the code of a value of group g in float64.
func (a Affine) code64(x float64, g int) int32 {
	return int32(min(max(math.RoundToEven(x/a.Scale[g])+a.Zero[g], 0), float64(a.Max())))
}

func decodeRows(codes []int32, grid Affine, d int) []float64 {
	w := make([]float64, len(codes))
	for i, c := range codes {
		w[i] = (float64(c) - grid.Zero[i/d]) * grid.Scale[i/d]
	}
	return w
}

// secondMoment is xᵀx/n of x [n, d], which must be of that form.
func secondMoment[F float32 | float64](x []F, d int) *mat.SymDense {
	s := mat.NewSymDense(d, nil)
	if err := linalg.Gram(s, x, d); err != nil {
		panic(err)
	}
	s.ScaleSym(float64(d)/float64(len(x)), s)
	return s
}

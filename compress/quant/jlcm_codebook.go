package quant

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"math/bits"
	"slices"

	"gonum.org/v1/gonum/mat"

	"github.com/lathe-ml/lathe/internal/cluster"
	"github.com/lathe-ml/lathe/internal/half"
	"github.com/lathe-ml/lathe/internal/stat"
)

// ErrCodebookBits: an index of a codebook has 1 to 8 bits.
var ErrCodebookBits = errors.New("bits of a codebook index must be 1 to 8")

// lloydSteps is how often k-means updates its centroids.
const lloydSteps = 50

// Grouping puts the rows of a weight, its neurons, into groups of similar distributions.
type Grouping struct {
	Descriptor [][]float64 // quantiles of each row
	Group      []int       // group of each row; groups ascend with the norm of their centroid
	Perm       []int       // the rows in the order in which groups are contiguous: new row i is old row Perm[i]
	Counts     []int       // rows per group; a group may be empty
}

// GroupNeurons clusters the rows of w [rows, columns] by the quantiles of their weights at (q+½)/Q (Yvinec, Dapogny, Bailly,
// arXiv:2309.17361, section 3.1): k-means from the descriptors of rows at even ranks of the descriptors' norms, at most 50
// Lloyd steps. quantiles 0 means 16. The paper groups neurons of similar distribution; descriptor and start are this
// package's choice.
//
// Errors: no rows, groups outside 1..rows, ErrNotFinite.
func GroupNeurons[F float32 | float64](w []F, rows, groups, quantiles int) (*Grouping, error) {
	if quantiles == 0 {
		quantiles = 16
	}
	switch {
	case rows < 1 || len(w) == 0 || len(w)%rows != 0:
		return nil, fmt.Errorf("quant: %d weights are no %d rows", len(w), rows)
	case groups < 1 || groups > rows:
		return nil, fmt.Errorf("quant: %d groups of %d neurons; accepted: 1 to %d", groups, rows, rows)
	case quantiles < 1:
		return nil, fmt.Errorf("quant: %d quantiles per neuron; at least one is needed", quantiles)
	}
	per := len(w) / rows
	g := &Grouping{Descriptor: make([][]float64, rows)}
	norms := make([]float64, rows)
	points := mat.NewDense(rows, quantiles, nil)
	for i := range rows {
		row := make([]float64, per)
		for j, v := range w[i*per : (i+1)*per] {
			if v-v != 0 {
				return nil, fmt.Errorf("quant: weight %d of neuron %d is %g: %w", j, i, v, ErrNotFinite)
			}
			row[j] = float64(v)
		}
		slices.Sort(row)
		d := make([]float64, quantiles)
		for q := range d {
			at := (float64(q) + .5) / float64(quantiles) * float64(per-1)
			k := int(at)
			d[q] = row[k] + (at-float64(k))*(row[min(k+1, per-1)]-row[k])
		}
		g.Descriptor[i], norms[i] = d, norm(d)
		points.SetRow(i, d)
	}
	ranks := ascending(norms)
	init := mat.NewDense(groups, quantiles, nil)
	for j := range groups {
		init.SetRow(j, g.Descriptor[ranks[int((float64(j)+.5)*float64(rows)/float64(groups))]])
	}
	r, err := cluster.KMeans{Init: init, MaxIter: lloydSteps, Empty: cluster.EmptyKeep}.Fit(context.Background(), points)
	if err != nil {
		return nil, fmt.Errorf("quant: %w", err)
	}
	centroids := make([]float64, groups)
	for j := range centroids {
		centroids[j] = norm(r.Centroids.RawRowView(j))
	}
	label := make([]int, groups)
	for to, from := range ascending(centroids) {
		label[from] = to
	}
	g.Group = make([]int, rows)
	for i, a := range r.Assignment {
		g.Group[i] = label[a]
	}
	g.count(groups)
	return g, nil
}

// count fills Counts and Perm from Group.
func (g *Grouping) count(groups int) {
	g.Counts = make([]int, groups)
	for _, k := range g.Group {
		g.Counts[k]++
	}
	g.Perm = make([]int, len(g.Group))
	for i := range g.Perm {
		g.Perm[i] = i
	}
	slices.SortStableFunc(g.Perm, func(a, b int) int { return g.Group[a] - g.Group[b] })
}

// DropEmpty removes groups without rows and numbers the others anew.
func (g *Grouping) DropEmpty() {
	to, n := make([]int, len(g.Counts)), 0
	for k, c := range g.Counts {
		if to[k] = n; c > 0 {
			n++
		}
	}
	for i, k := range g.Group {
		g.Group[i] = to[k]
	}
	g.count(n)
}

func norm(x []float64) float64 {
	sum := 0.
	for _, v := range x {
		sum += v * v
	}
	return math.Sqrt(sum)
}

// ascending are the indices of x in ascending order of its values, stable.
func ascending(x []float64) []int {
	idx := make([]int, len(x))
	for i := range idx {
		idx[i] = i
	}
	slices.SortStableFunc(idx, func(a, b int) int { return cmp.Compare(x[a], x[b]) })
	return idx
}

// CodebookMode is how groups of neurons differ.
type CodebookMode string

const (
	// GroupCodebooks gives every group a codebook: Ŵ_ij = C[g(i)][I_ij].
	GroupCodebooks CodebookMode = "codebooks"
	// GroupScales gives every group a factor s_g, the root mean square of its weights, and all one codebook:
	// Ŵ_ij = s_g·C[I_ij].
	GroupScales CodebookMode = "scales"
)

// CodebookWeights are weights [Rows, columns] as indices into codebooks.
type CodebookWeights struct {
	Rows      int
	Bits      int // of an index
	Mode      CodebookMode
	Codebooks [][]float64 // of K values each: one per group, or one
	Scales    []float64   // per group; all 1 with GroupCodebooks
	Group     []int       // of each row
	Index     []uint8
}

// InitCodebooks fits codebooks of k values to the weights of each group, or one to all weights over their group's scale,
// by k-means on the line from their quantiles (cluster.Line), and gives every weight the index of the nearest value, the
// lowest on ties. group nil is one group: plain weight sharing. With k values at least as many as there are distinct
// weights, the weights are kept exactly; superfluous values repeat others.
//
// Errors: k outside 1..256 (ErrCodebookBits), ErrNotFinite, groups that do not fit.
func InitCodebooks[F float32 | float64](w []F, rows int, group []int, k int, mode CodebookMode) (*CodebookWeights, error) {
	if k < 1 || k > 256 {
		return nil, fmt.Errorf("quant: codebooks of %d values: %w", k, ErrCodebookBits)
	}
	if rows < 1 || len(w) == 0 || len(w)%rows != 0 || group != nil && len(group) != rows {
		return nil, fmt.Errorf("quant: %d weights in %d rows with %d group numbers do not fit together", len(w), rows, len(group))
	}
	if mode != GroupCodebooks && mode != GroupScales {
		return nil, fmt.Errorf("quant: codebook mode %q; accepted: %s, %s", mode, GroupCodebooks, GroupScales)
	}
	if group == nil {
		group = make([]int, rows)
	}
	if slices.Min(group) < 0 || slices.Max(group) >= rows {
		return nil, fmt.Errorf("quant: group numbers from %d to %d for %d rows; accepted: 0 to %d", slices.Min(group), slices.Max(group), rows, rows-1)
	}
	c := &CodebookWeights{
		Rows: rows, Bits: max(1, bits.Len(uint(k-1))), Mode: mode, Group: slices.Clone(group), Scales: slices.Repeat([]float64{1}, slices.Max(group)+1), Index: make([]uint8, len(w)),
	}
	per := len(w) / rows
	members := make([][]int, len(c.Scales)) // positions of each group's weights
	for i, v := range w {
		if v-v != 0 {
			return nil, fmt.Errorf("quant: weight %d is %g: %w", i, v, ErrNotFinite)
		}
		g := group[i/per]
		members[g] = append(members[g], i)
	}
	values := make([]float64, len(w))
	for i, v := range w {
		values[i] = float64(v)
	}
	if mode == GroupScales {
		for g, at := range members {
			square := 0.
			for _, i := range at {
				square += values[i] * values[i] / float64(len(at))
			}
			if square > 0 {
				c.Scales[g] = math.Sqrt(square)
			}
			for _, i := range at {
				values[i] /= c.Scales[g]
			}
		}
		members = [][]int{nil}
		for i := range values {
			members[0] = append(members[0], i)
		}
	}
	for _, at := range members {
		if len(at) == 0 {
			c.Codebooks = append(c.Codebooks, make([]float64, k))
			continue
		}
		x := make([]float64, len(at))
		for j, i := range at {
			x[j] = values[i]
		}
		r, err := cluster.Line{K: k, MaxIter: lloydSteps}.Fit(x)
		if err != nil {
			return nil, fmt.Errorf("quant: %w", err)
		}
		c.Codebooks = append(c.Codebooks, r.Centroids)
		for j, i := range at {
			c.Index[i] = uint8(r.Assignment[j])
		}
	}
	return c, nil
}

// book is the codebook of a row, and what multiplies it.
func (c *CodebookWeights) book(row int) (values []float64, scale float64) {
	g := c.Group[row]
	if c.Mode == GroupScales {
		return c.Codebooks[0], c.Scales[g]
	}
	return c.Codebooks[g], 1
}

// Decode returns the weights.
func (c *CodebookWeights) Decode() []float64 {
	out := make([]float64, len(c.Index))
	per := len(c.Index) / c.Rows
	for i, k := range c.Index {
		values, scale := c.book(i / per)
		out[i] = scale * values[k]
	}
	return out
}

// Table is the form in which the weight is stored, with codewords in half precision where that
// is exact to 0.1 %.
func (c *CodebookWeights) Table(shape []int) *TableWeights {
	t := &TableWeights{Bits: c.Bits, Shape: slices.Clone(shape), Codes: slices.Clone(c.Index)}
	for _, b := range c.Codebooks {
		t.Tables = append(t.Tables, narrow(b))
	}
	if c.Mode == GroupScales { // a table per scale is smaller than a scale per row, and the same numbers
		t.Tables = nil
		for _, s := range c.Scales {
			table := make([]float32, len(c.Codebooks[0]))
			for k, v := range c.Codebooks[0] {
				table[k] = float32(s * v)
			}
			t.Tables = append(t.Tables, table)
		}
	}
	t.Half = fitsHalf(t.Tables)
	if len(t.Tables) == 1 {
		return t
	}
	for _, g := range c.Group {
		t.Group = append(t.Group, uint8(g))
	}
	return t
}

// fitsHalf says whether half precision keeps every level to 0.1 % of its table's greatest.
func fitsHalf(tables [][]float32) bool {
	for _, t := range tables {
		top := 0.
		for _, v := range t {
			top = max(top, math.Abs(float64(v)))
		}
		for _, v := range t {
			if !(math.Abs(float64(v)-float64(half.FromF16(half.ToF16(v)))) <= top/1000) {
				return false
			}
		}
	}
	return true
}

// MatMul multiplies x [n, columns] with the transposed weight, decoding each row by its group's codebook on the way.
func (c *CodebookWeights) MatMul(x []float64) ([]float64, error) {
	per := len(c.Index) / c.Rows
	if per == 0 || len(x)%per != 0 {
		return nil, fmt.Errorf("quant: %d values are no rows of %d", len(x), per)
	}
	n := len(x) / per
	y, row := make([]float64, n*c.Rows), make([]float64, per)
	for o := range c.Rows {
		values, scale := c.book(o)
		for j, k := range c.Index[o*per : (o+1)*per] {
			row[j] = values[k]
		}
		for i := range n {
			sum := 0.
			for j, v := range x[i*per : (i+1)*per] {
				sum += v * row[j]
			}
			y[i*c.Rows+o] = scale * sum
		}
	}
	return y, nil
}

// CodebookMemory is the number of bits in which a weight [rows, columns] with contiguous groups is stored: its indices,
// codewords and scales of codewordBits each (16 in the paper), and the boundaries of the groups, 32 each:
//
//	rows·columns·bits + groups·2^bits·codewordBits + (groups−1)·32                    GroupCodebooks
//	rows·columns·bits + (2^bits + groups)·codewordBits + (groups−1)·32                GroupScales
//
// The indices dominate, which is why groups are nearly free and a codebook number per weight would not be.
func CodebookMemory(rows, columns, bits, groups, codewordBits int, mode CodebookMode) int64 {
	words := groups << bits
	if mode == GroupScales {
		words = 1<<bits + groups
	}
	return int64(rows)*int64(columns)*int64(bits) + int64(words)*int64(codewordBits) + int64(groups-1)*32
}

// GroupsFor is the largest number of groups, at most 16, whose codebooks and boundaries cost no more than 1 % of the
// indices' memory.
func GroupsFor(rows, columns, bits int, mode CodebookMode) int {
	index := CodebookMemory(rows, columns, bits, 1, 0, mode)
	best := 1
	for m := 2; m <= min(16, rows); m++ {
		if CodebookMemory(rows, columns, bits, m, 16, mode)-index <= index/100 {
			best = m
		}
	}
	return best
}

// PackIndices packs indices of so many bits, 1 to 8, the first in the lowest bits of the first byte, without gaps.
func PackIndices(index []uint8, bits int) ([]byte, error) {
	if bits < 1 || bits > 8 {
		return nil, fmt.Errorf("quant: indices of %d bits: %w", bits, ErrCodebookBits)
	}
	out := make([]byte, (len(index)*bits+7)/8)
	for i, v := range index {
		if bits < 8 && v >= 1<<bits {
			return nil, fmt.Errorf("quant: index %d is %d; accepted: 0 to %d", i, v, 1<<bits-1)
		}
		at := i * bits
		out[at/8] |= v << (at % 8)
		if at%8+bits > 8 {
			out[at/8+1] |= v >> (8 - at%8)
		}
	}
	return out, nil
}

// UnpackIndices is the inverse of PackIndices for n indices.
func UnpackIndices(packed []byte, n, bits int) ([]uint8, error) {
	if bits < 1 || bits > 8 {
		return nil, fmt.Errorf("quant: indices of %d bits: %w", bits, ErrCodebookBits)
	}
	if n < 0 || n > 8*len(packed)/bits {
		return nil, fmt.Errorf("quant: %d indices of %d bits in %d bytes", n, bits, len(packed))
	}
	out := make([]uint8, n)
	for i := range out {
		at := i * bits
		v := uint16(packed[at/8])
		if at/8+1 < len(packed) {
			v |= uint16(packed[at/8+1]) << 8
		}
		out[i] = uint8(v >> (at % 8) & (1<<bits - 1))
	}
	return out, nil
}

// deviation is the standard deviation of the weights.
func deviation[F float32 | float64](w []F) float64 {
	var m stat.Moments
	for _, v := range w {
		m.Add(float64(v))
	}
	return math.Sqrt(m.PopVariance())
}

package data

import (
	"fmt"
	"image"
	"math"
	"slices"

	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/internal/rng"
)

// Images is a set of labelled pictures of one size.
type Images struct {
	N, H, W, C int
	Max        uint8    // the value that stands for 1; 0 means 255
	Pixels     []uint8  // [N, H, W, C], row-major
	Labels     []int32  // one per picture, in [0, len(ClassNames))
	ClassNames []string // by label
}

// Classes is the number of classes.
func (m *Images) Classes() int { return len(m.ClassNames) }

// validate reports what keeps m from being a set of pictures.
func (m *Images) validate() error {
	n, err := product([]int{m.N, m.H, m.W, m.C}, math.MaxInt64)
	if err != nil {
		return err
	}
	if n != int64(len(m.Pixels)) {
		return fmt.Errorf("%d pictures of %d×%d×%d need %d values, and there are %d", m.N, m.H, m.W, m.C, n, len(m.Pixels))
	}
	if len(m.Labels) != m.N {
		return fmt.Errorf("%d labels for %d pictures", len(m.Labels), m.N)
	}
	for i, l := range m.Labels {
		if l < 0 || int(l) >= len(m.ClassNames) {
			return fmt.Errorf("label %d of picture %d is not in [0, %d)", l, i, len(m.ClassNames))
		}
	}
	return nil
}

// At returns the pixels of picture i, [H, W, C]; they are shared.
func (m *Images) At(i int) []uint8 {
	s := m.H * m.W * m.C
	return m.Pixels[i*s : (i+1)*s : (i+1)*s]
}

// Image returns picture i as grey (C = 1) or RGB (C = 3), with values stretched to 0..255.
func (m *Images) Image(i int) image.Image {
	px, top := m.At(i), m.max()
	at := func(k int) uint8 { return uint8(min(255, (int(px[k])*255+top/2)/top)) }
	if m.C == 3 {
		out := image.NewNRGBA(image.Rect(0, 0, m.W, m.H))
		for k := range m.H * m.W {
			out.Pix[4*k], out.Pix[4*k+1], out.Pix[4*k+2], out.Pix[4*k+3] = at(3*k), at(3*k+1), at(3*k+2), 255
		}
		return out
	}
	out := image.NewGray(image.Rect(0, 0, m.W, m.H))
	for k := range out.Pix {
		out.Pix[k] = at(k * m.C)
	}
	return out
}

func (m *Images) max() int {
	if m.Max == 0 {
		return 255
	}
	return int(m.Max)
}

// Subset returns the pictures of idx, in that order, as a set of their own. An index outside [0, N) is an error.
func (m *Images) Subset(idx []int) (*Images, error) {
	if err := m.inside(idx); err != nil {
		return nil, err
	}
	out := &Images{
		N: len(idx), H: m.H, W: m.W, C: m.C, Max: m.Max, ClassNames: m.ClassNames,
		Pixels: make([]uint8, 0, len(idx)*m.H*m.W*m.C), Labels: make([]int32, 0, len(idx)),
	}
	for _, i := range idx {
		out.Pixels = append(out.Pixels, m.At(i)...)
		out.Labels = append(out.Labels, m.Labels[i])
	}
	return out, nil
}

func (m *Images) inside(idx []int) error {
	for _, i := range idx {
		if i < 0 || i >= m.N {
			return fmt.Errorf("data: picture %d is not in [0, %d)", i, m.N)
		}
	}
	return nil
}

// First returns the first n pictures (all, if there are fewer), sharing their memory.
func (m *Images) First(n int) *Images {
	n = max(0, min(n, m.N))
	out := *m
	out.N, out.Pixels, out.Labels = n, m.Pixels[:n*m.H*m.W*m.C], m.Labels[:n]
	return &out
}

// Floats writes the pictures of idx to dst in [0, 1], [len(idx), H, W, C], and returns it; a dst that is too short is
// replaced. It panics, as indexing does, on an index outside [0, N).
func (m *Images) Floats(idx []int, dst []float32) []float32 {
	s := m.H * m.W * m.C
	if len(dst) < len(idx)*s {
		dst = make([]float32, len(idx)*s)
	}
	dst = dst[:len(idx)*s]
	var table [256]float32
	for v := range table {
		table[v] = float32(v) / float32(m.max())
	}
	for k, i := range idx {
		out := dst[k*s : (k+1)*s]
		for j, v := range m.At(i) {
			out[j] = table[v]
		}
	}
	return dst
}

// Moments returns the mean and the standard deviation of all pixels in [0, 1]; the deviation is 1 where it would be 0.
func (m *Images) Moments() (mean, std float32) {
	var sum, squares float64
	for _, v := range m.Pixels {
		x := float64(v) / float64(m.max())
		sum += x
		squares += x * x
	}
	n := float64(max(len(m.Pixels), 1))
	mu := sum / n
	sd := math.Sqrt(max(squares/n-mu*mu, 0))
	if sd == 0 {
		sd = 1
	}
	return float32(mu), float32(sd)
}

// Float32 returns the pictures of idx as a tensor [len(idx), H, W, C] in [0, 1]; a nil idx means all.
func (m *Images) Float32(idx []int) (*tensors.Tensor, error) {
	if idx == nil {
		idx = Range(m.N)
	}
	if err := m.inside(idx); err != nil {
		return nil, err
	}
	return tensors.FromFlatDataAndDimensions(m.Floats(idx, nil), len(idx), m.H, m.W, m.C), nil
}

// LabelsTensor returns the labels of idx as an int32 tensor [len(idx)]; a nil idx means all.
func (m *Images) LabelsTensor(idx []int) (*tensors.Tensor, error) {
	if idx == nil {
		idx = Range(m.N)
	}
	if err := m.inside(idx); err != nil {
		return nil, err
	}
	l := make([]int32, len(idx))
	for k, i := range idx {
		l[k] = m.Labels[i]
	}
	return tensors.FromFlatDataAndDimensions(l, len(idx)), nil
}

// Pool2 returns the set with every 2×2 block of pixels replaced by its mean, rounded half up: 28×28 becomes 14×14. An
// odd last row or column is dropped.
func (m *Images) Pool2() *Images {
	out := *m
	out.H, out.W = m.H/2, m.W/2
	out.Pixels = make([]uint8, m.N*out.H*out.W*m.C)
	k := 0
	for i := range m.N {
		px := m.At(i)
		for y := range out.H {
			for x := range out.W {
				at := (2*y*m.W + 2*x) * m.C
				for c := range m.C {
					sum := int(px[at+c]) + int(px[at+m.C+c]) + int(px[at+m.W*m.C+c]) + int(px[at+(m.W+1)*m.C+c])
					out.Pixels[k] = uint8((sum + 2) / 4)
					k++
				}
			}
		}
	}
	return &out
}

// Range returns 0, 1, ..., n-1.
func Range(n int) []int {
	out := make([]int, n)
	for i := range out {
		out[i] = i
	}
	return out
}

// byClass returns the indices of each class, shuffled by the seed.
func byClass(labels []int32, classes int, seed uint64) [][]int {
	out := make([][]int, classes)
	for i, l := range labels {
		out[l] = append(out[l], i)
	}
	r := rng.New(seed, "data/classes")
	for _, c := range out {
		r.Shuffle(len(c), func(i, j int) { c[i], c[j] = c[j], c[i] })
	}
	return out
}

// Balanced draws perClass pictures of every class and returns their indices, ascending. With the same seed the draw
// of a smaller perClass is contained in that of a larger one. A class with fewer pictures is an error.
func (m *Images) Balanced(perClass int, seed uint64) ([]int, error) {
	if perClass < 0 {
		return nil, fmt.Errorf("data: %d pictures per class; use 0 or more", perClass)
	}
	var out []int
	for c, idx := range byClass(m.Labels, m.Classes(), seed) {
		if len(idx) < perClass {
			return nil, fmt.Errorf("data: class %q has %d pictures, fewer than the %d asked for", m.ClassNames[c], len(idx), perClass)
		}
		out = append(out, idx[:perClass]...)
	}
	slices.Sort(out)
	return out, nil
}

// Stratified draws n pictures with the class proportions of the set, by largest remainders, and returns the indices
// drawn and those left over, each ascending: a subset, or a split into two parts. n must be in [0, N].
func (m *Images) Stratified(n int, seed uint64) (drawn, rest []int, err error) {
	if n < 0 || n > m.N {
		return nil, nil, fmt.Errorf("data: cannot draw %d of %d pictures", n, m.N)
	}
	classes := byClass(m.Labels, m.Classes(), seed)
	take := make([]int, len(classes))
	order := Range(len(classes))
	left := n
	for c, idx := range classes {
		take[c] = len(idx) * n / max(1, m.N)
		left -= take[c]
	}
	remainder := func(c int) int { return len(classes[c]) * n % max(1, m.N) }
	slices.SortStableFunc(order, func(a, b int) int { return remainder(b) - remainder(a) })
	for _, c := range order[:left] {
		take[c]++
	}
	for c, idx := range classes {
		drawn = append(drawn, idx[:take[c]]...)
		rest = append(rest, idx[take[c]:]...)
	}
	slices.Sort(drawn)
	slices.Sort(rest)
	return drawn, rest, nil
}

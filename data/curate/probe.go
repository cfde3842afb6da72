package curate

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"

	"gonum.org/v1/gonum/floats"
	"gonum.org/v1/gonum/mat"

	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/internal/stat"
)

// probe is a linear softmax classifier trained by mini-batch SGD with momentum on the host.
type probe struct {
	x       *mat.Dense // [n, d], standardised
	labels  []int
	index   []int // examples it trains on
	r       *rand.Rand
	w, v    *mat.Dense // [classes, d+1], the last column the bias; and its momentum
	classes int
}

// newProbe makes probe number k, which trains on the examples marked in, or on all for nil.
func newProbe(x *mat.Dense, labels []int, classes int, in []bool, seed uint64, k int) *probe {
	n, d := x.Dims()
	p := &probe{
		x: x, labels: labels, classes: classes, r: rng.New(seed, fmt.Sprintf("probe-%d", k)),
		w: mat.NewDense(classes, d+1, nil), v: mat.NewDense(classes, d+1, nil),
	}
	for i := range n {
		if in == nil || in[i] {
			p.index = append(p.index, i)
		}
	}
	// probes differ in their start as well as in their order, as networks do
	for c := range classes {
		row := p.w.RawRowView(c)
		for j := range row[:d] {
			row[j] = p.r.NormFloat64() * 0.1 / math.Sqrt(float64(d))
		}
	}
	return p
}

// epoch makes one pass over the examples in random order, in batches of 32. The rate shrinks with the number of
// features, since the curvature of the loss grows with the length of the rows.
func (p *probe) epoch(ctx context.Context) error {
	const batch, momentum, decay = 32, 0.9, 1e-4
	_, d := p.x.Dims()
	rate := 0.5 / (1 + float64(d))
	rate = max(rate, 1e-3)
	p.r.Shuffle(len(p.index), func(i, j int) { p.index[i], p.index[j] = p.index[j], p.index[i] })
	prob := make([]float64, p.classes)
	for at := 0; at < len(p.index); at += batch {
		if err := ctx.Err(); err != nil {
			return err
		}
		part := p.index[at:min(at+batch, len(p.index))]
		p.v.Scale(momentum, p.v)
		floats.AddScaled(p.v.RawMatrix().Data, -rate*decay, p.w.RawMatrix().Data)
		for _, i := range part {
			row := p.x.RawRowView(i)
			p.softmax(prob, row)
			prob[p.labels[i]]--
			for c, g := range prob {
				step := -rate * g / float64(len(part))
				v := p.v.RawRowView(c)
				floats.AddScaled(v[:d], step, row)
				v[d] += step
			}
		}
		p.w.Add(p.w, p.v)
	}
	return nil
}

func (p *probe) softmax(dst, row []float64) {
	for c := range dst {
		w := p.w.RawRowView(c)
		dst[c] = floats.Dot(w[:len(row)], row) + w[len(row)]
	}
	stat.Softmax(dst, dst)
}

// predict returns the class probabilities of the rows of x.
func (p *probe) predict(x *mat.Dense) [][]float64 {
	n, _ := x.Dims()
	flat, out := make([]float64, n*p.classes), make([][]float64, n)
	for i := range out {
		out[i] = flat[i*p.classes : (i+1)*p.classes]
		p.softmax(out[i], x.RawRowView(i))
	}
	return out
}

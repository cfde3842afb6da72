package compress

import (
	"context"
	"errors"
	"fmt"
	"math"

	"github.com/gomlx/compute"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/internal/metric"
	"github.com/lathe-ml/lathe/nn"
)

// Agreement says how alike the outputs of two networks are on the same cases.
type Agreement struct {
	Cases  int     `json:"cases"`
	MSE    float64 `json:"mse"`    // mean squared difference of the outputs
	Cosine float64 `json:"cosine"` // mean over cases of the cosine of the two outputs, each taken whole
	KL     float64 `json:"kl"`     // mean over rows of KL(float ‖ compressed) of the softmax of a row, in nats
	Top1   float64 `json:"top1"`   // share of rows in which the greatest output is the same, in [0,1]
}

// RowWidth is the length of the rows in which a network's output of these dimensions, [cases, ...], is compared: the last axis of
// [cases, classes] and of [cases, positions, classes], as a text recogniser gives them. Of maps of more axes, of which
// nobody says which one is the classes', and where the last axis has one value alone, it is all that a case has.
func RowWidth(dims []int) int {
	if n := len(dims); n == 2 || n == 3 && dims[2] > 1 {
		return dims[n-1]
	}
	width := 1
	for _, n := range dims[min(1, len(dims)):] {
		width *= n
	}
	return width
}

// Compare measures how far got is from want: outputs of so many cases, row-major, in rows of width values (RowWidth); a case
// has one or several rows. Rows are read as logits; when every row of want is a probability vector (as of a network that
// ends in softmax), KL compares those directly.
func Compare(want, got []float32, cases, width int) (Agreement, error) {
	if cases <= 0 || width <= 0 || len(want) != len(got) || len(want) == 0 || len(want)%(cases*width) != 0 {
		return Agreement{}, fmt.Errorf("compress: cannot compare outputs of %d and %d values as %d cases of rows of %d", len(want), len(got), cases, width)
	}
	a := Agreement{Cases: cases}
	var err [3]error
	a.MSE, err[0] = metric.MSE(want, got)
	if Probabilities(want, width) {
		a.KL, err[1] = metric.KL(want, got, width)
	} else {
		a.KL, err[1] = metric.SoftmaxKL(want, got, width)
	}
	a.Top1, err[2] = metric.Agreement(want, got, width)
	size := len(want) / cases
	for i := 0; i < len(want); i += size {
		c, err := metric.Cosine(want[i:i+size], got[i:i+size])
		if err != nil {
			return a, err
		}
		a.Cosine += c / float64(a.Cases)
	}
	return a, errors.Join(err[:]...)
}

// Probabilities says whether every row of so many values is non-negative and sums to one.
func Probabilities(x []float32, width int) bool {
	if width < 2 {
		return false
	}
	for i := 0; i < len(x); i += width {
		sum := 0.
		for _, v := range x[i : i+width] {
			if v < 0 {
				return false
			}
			sum += float64(v)
		}
		if math.Abs(sum-1) > 1e-3 {
			return false
		}
	}
	return true
}

// logs are the logits of probabilities, floored at 1e-12.
func logs(x []float32) []float32 {
	out := make([]float32, len(x))
	for i, v := range x {
		out[i] = float32(math.Log(max(float64(v), 1e-12)))
	}
	return out
}

// Accuracy is the share of cases whose greatest output is the label's, in [0,1].
func Accuracy(outputs []float32, width int, labels []int) (float64, error) {
	for i, l := range labels {
		if l < 0 || l >= width {
			return 0, fmt.Errorf("compress: label %d of case %d; the network has %d classes", l, i, width)
		}
	}
	return metric.Accuracy(outputs, width, labels)
}

// RelativeError is ‖got − want‖²/‖want‖²; 0 when both are 0, +Inf when only want is.
func RelativeError(want, got []float32) float64 {
	var d, w float64
	for i := range want {
		e := float64(got[i]) - float64(want[i])
		d += e * e
		w += float64(want[i]) * float64(want[i])
	}
	return ratio(d, w)
}

func ratio(d, w float64) float64 {
	if d == 0 {
		return 0
	}
	return d / w
}

// siteErrorBytes bounds what SiteErrors holds of one network's values at once.
const siteErrorBytes = 64 << 20

// SiteErrors returns ‖y_q − y‖²/‖y‖² of each named value, y in the float network and y_q in the compressed one, over all
// cases. It takes smaller batches where the values of one would need much memory.
func SiteErrors(ctx context.Context, b compute.Backend, float, compressed *nn.Network, x Examples, batch int, values []string) ([]float64, error) {
	sh, err := float.Shapes(1)
	if err != nil {
		return nil, err
	}
	var row int64
	for _, v := range values {
		row += max(sh[v].ByteSize(), 0)
	}
	if batch <= 0 {
		batch = DefaultBatch
	}
	batch = int(max(1, min(int64(batch), siteErrorBytes/max(row, 1))))
	f, err := NewEvaluator(b, float, batch, values...)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	c, err := NewEvaluator(b, compressed, batch, values...)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	diff, size := make([]float64, len(values)), make([]float64, len(values))
	from := 0
	err = f.Each(ctx, x, func(n int, want []*tensors.Tensor) error {
		part, err := x.Slice(from, from+n, f.batch)
		if err != nil {
			return err
		}
		from += n
		got, err := c.runner.Run(part...)
		if err != nil {
			return err
		}
		for i := range values {
			w, g := batchValues(want[len(float.Outputs)+i], n, f.batch), batchValues(got[len(compressed.Outputs)+i], n, f.batch)
			if len(w) != len(g) {
				return fmt.Errorf("compress: %q has %d values in one network and %d in the other", values[i], len(w), len(g))
			}
			for j := range w {
				e := float64(g[j]) - float64(w[j])
				diff[i] += e * e
				size[i] += float64(w[j]) * float64(w[j])
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for i := range diff {
		diff[i] = ratio(diff[i], size[i])
	}
	return diff, nil
}

// batchValues are the values of the first n cases of a batch. Where axis 0 does not count the cases, as in networks that
// put the tokens first, they are all values: cases that fill the batch up count there, too.
func batchValues(t *tensors.Tensor, n, batch int) []float32 {
	v := nn.Floats(t)
	if s := t.Shape(); s.Rank() > 0 && s.Dimensions[0] == batch {
		return v[:len(v)/batch*n]
	}
	return v
}

// Stored is a weight form that knows its size in bytes, scales and tables included.
type Stored interface {
	StoredBytes(param func(local string) *nn.Param) int64
}

// WeightBytes is the stored size of a site's weight; a form that does not say otherwise counts its parameters but the
// bias.
func WeightBytes(net *nn.Network, site *nn.Node) int64 {
	if lin, ok := site.Op.(nn.Linear); ok {
		if s, ok := lin.Repr().(Stored); ok {
			return s.StoredBytes(func(local string) *nn.Param { return net.Param(site, local) })
		}
	}
	var n int64
	for local, p := range site.P {
		if q := net.Params.Get(p); q != nil && local != "b" {
			n += q.Value.ByteSize()
		}
	}
	return n
}

// Size is the stored size of a network's parameters in bytes: packed codes for compressed sites, what their type takes
// for all others. A parameter that several nodes share counts once.
func Size(net *nn.Network) int64 {
	var n int64
	counted := map[string]bool{}
	for _, x := range net.Sites() {
		s, ok := x.Op.(nn.Linear).Repr().(Stored)
		if !ok {
			continue
		}
		fresh := false
		for local, p := range x.P {
			if local != "b" && !counted[p] {
				counted[p], fresh = true, true
			}
		}
		if fresh {
			n += s.StoredBytes(func(local string) *nn.Param { return net.Param(x, local) })
		}
	}
	for p := range net.Params.All() {
		if !counted[p.Name] {
			n += p.Value.ByteSize()
		}
	}
	return n
}

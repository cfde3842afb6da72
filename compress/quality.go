package compress

import (
	"fmt"
	"math"
	"slices"

	"github.com/lathe-ml/lathe/internal/metric"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/internal/stat"
	"github.com/lathe-ml/lathe/nn"
)

// Interval is a 95 % interval.
type Interval struct {
	Low  float64 `json:"low"`
	High float64 `json:"high"`
}

// Quality is an Agreement with its error bars, and the accuracy when there are labels. Classes are compared at every
// position of an output of several, as a text recogniser's.
type Quality struct {
	Agreement
	Positions int         `json:"positions"` // at which classes are compared, per case
	Bars      Bars        `json:"interval_95"`
	Accuracy  *Accuracies `json:"accuracy,omitempty"`
}

// Bars are the intervals of an Agreement's figures: of shares by Wilson's formula, of means by resampling the cases.
type Bars struct {
	Cosine Interval `json:"cosine"`
	KL     Interval `json:"kl"`
	Top1   Interval `json:"top1"`
}

// Accuracies are shares of right answers, in [0, 1]. Drop is float less compressed, with the interval of the paired
// difference: both networks answer the same cases.
type Accuracies struct {
	Cases         int      `json:"cases"`
	Float         float64  `json:"float"`
	Compressed    float64  `json:"compressed"`
	FloatBar      Interval `json:"float_95"`
	CompressedBar Interval `json:"compressed_95"`
	Drop          float64  `json:"drop"`
	DropBar       Interval `json:"drop_95"`
}

// bootstrapDraws is the number of resamples of an interval, less when there are many cases.
const bootstrapDraws = 1000

// Judge measures how far got is from want: outputs of so many cases, row-major, in rows of width classes or coordinates (a
// case may have several rows). Labels, one for each case of one row, give the accuracy; nil: none.
func Judge(want, got []float32, cases, width int, labels []int) (Quality, error) {
	if cases <= 0 || width <= 0 || len(want) == 0 || len(want) != len(got) || len(want)%(cases*width) != 0 {
		return Quality{}, fmt.Errorf("compress: cannot judge outputs of %d and %d values as %d cases of rows of %d", len(want), len(got), cases, width)
	}
	size := len(want) / cases
	for what, out := range map[string][]float32{"original": want, "compressed": got} {
		if i := slices.IndexFunc(out, func(v float32) bool { return v-v != 0 }); i >= 0 {
			return Quality{}, fmt.Errorf("compress: the %s network gives %g in case %d", what, out[i], i/size)
		}
	}
	q := Quality{Positions: size / width}
	var err error
	if q.Agreement, err = Compare(want, got, cases, width); err != nil {
		return q, err
	}
	divergence := metric.SoftmaxKL[float32]
	if Probabilities(want, width) {
		divergence = metric.KL
	}
	kl, cosine, same := make([]float64, cases), make([]float64, cases), make([]float64, cases)
	for i := range cases {
		from, to := i*size, (i+1)*size
		if kl[i], err = divergence(want[from:to], got[from:to], width); err != nil {
			return q, err
		}
		if cosine[i], err = metric.Cosine(want[from:to], got[from:to]); err != nil {
			return q, err
		}
		if same[i], err = metric.Agreement(want[from:to], got[from:to], width); err != nil {
			return q, err
		}
	}
	q.Bars = Bars{Cosine: resampled(cosine), KL: resampled(kl), Top1: resampled(same)}
	if q.Positions == 1 || q.Top1 == 1 { // resampling equal values would claim to be sure
		q.Bars.Top1 = share(same)
	}
	if labels == nil {
		return q, nil
	}
	if q.Positions != 1 || len(labels) != cases {
		return q, fmt.Errorf("compress: %d labels for %d cases of %d rows; accuracy needs one label and one row of classes for each case", len(labels), cases, q.Positions)
	}
	a := Accuracies{Cases: cases}
	if a.Float, err = Accuracy(want, width, labels); err != nil {
		return q, err
	}
	if a.Compressed, err = Accuracy(got, width, labels); err != nil {
		return q, err
	}
	right := [2][]float64{make([]float64, cases), make([]float64, cases)}
	drop := make([]float64, cases)
	for i, l := range labels {
		for k, out := range [][]float32{want, got} {
			if metric.ArgMax(out[i*width:(i+1)*width]) == l {
				right[k][i] = 1
			}
		}
		drop[i] = right[0][i] - right[1][i]
	}
	a.FloatBar, a.CompressedBar = share(right[0]), share(right[1])
	a.Drop, a.DropBar = stat.Mean(drop), resampled(drop)
	q.Accuracy = &a
	return q, nil
}

// Directions says whether a network's first output, rows of width values, holds directions rather than classes, so that the
// cosine counts and not the greatest value: hidden states that leave a norm, as of an encoder without a head, or vectors of
// length one with values of both signs, as of a sentence encoder.
func Directions(net *nn.Network, values []float32, width int) bool {
	return leavesNorm(net, net.Outputs[0]) || unitVectors(values, width)
}

// leavesNorm says whether a value comes out of a norm over features, moved about at most.
func leavesNorm(net *nn.Network, value string) bool {
	n := net.Producer(value)
	if n == nil {
		return false
	}
	switch n.Op.(type) {
	case nn.LayerNorm, nn.RMSNorm, nn.CRMSNorm:
		return true
	case nn.Reshape, nn.Transpose, nn.Cast, nn.QuantizeDequantize:
		return leavesNorm(net, n.In[0])
	}
	return false
}

func unitVectors(x []float32, width int) bool {
	negative := false
	for i := 0; i < len(x); i += width {
		sum := 0.
		for _, v := range x[i : i+width] {
			sum += float64(v) * float64(v)
			negative = negative || v < 0
		}
		if math.Abs(sum-1) > 1e-3 {
			return false
		}
	}
	return negative
}

// share is Wilson's interval of a share, from 1 for every case that counts and 0 for the others.
func share(hits []float64) Interval {
	k := 0
	for _, h := range hits {
		if h == 1 {
			k++
		}
	}
	lo, hi := stat.Wilson(k, len(hits), .95)
	return Interval{lo, hi}
}

// resampled is the bootstrap interval of a mean over cases. One case says nothing of the spread: the interval is then
// the value itself, as JSON knows no infinity.
func resampled(x []float64) Interval {
	if len(x) < 2 {
		return Interval{stat.Mean(x), stat.Mean(x)}
	}
	lo, hi := stat.BootstrapCI(x, .95, max(200, min(bootstrapDraws, 20_000_000/len(x))), rng.New(0, "judge"))
	return Interval{lo, hi}
}

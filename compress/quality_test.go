package compress

import (
	"math"
	"strings"
	"testing"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"

	"github.com/lathe-ml/lathe/nn"
)

func TestJudgeIsCompareWithErrorBars(t *testing.T) {
	const cases, width = 200, 4
	want, got, labels := make([]float32, cases*width), make([]float32, cases*width), make([]int, cases)
	for i := range cases {
		labels[i] = i % width
		for j := range width {
			want[i*width+j] = float32(i%7) * .1 * float32(j)
			if j == labels[i] {
				want[i*width+j] = 5
			}
		}
		copy(got[i*width:], want[i*width:(i+1)*width])
		if i%10 == 0 { // every tenth answer changes
			got[i*width+(i+1)%width] = 9
		}
	}
	q, err := Judge(want, got, cases, width, labels)
	if err != nil {
		t.Fatal(err)
	}
	plain, err := Compare(want, got, cases, width)
	if err != nil {
		t.Fatal(err)
	}
	if q.Agreement.Top1 != plain.Top1 || math.Abs(q.Top1-.9) > 1e-9 || math.Abs(q.KL-plain.KL) > 1e-9 || math.Abs(q.Cosine-plain.Cosine) > 1e-9 || q.Positions != 1 {
		t.Errorf("%+v, Compare gives %+v", q, plain)
	}
	for what, b := range map[string]struct {
		Interval
		v float64
	}{"top1": {q.Bars.Top1, q.Top1}, "kl": {q.Bars.KL, q.KL}, "cosine": {q.Bars.Cosine, q.Cosine}, "accuracy": {q.Accuracy.CompressedBar, .9}, "drop": {q.Accuracy.DropBar, .1}} {
		if !(b.Low < b.v && b.v < b.High) {
			t.Errorf("%s: %g is not inside %+v", what, b.v, b.Interval)
		}
	}
	if q.Accuracy.Float != 1 || q.Accuracy.FloatBar.High != 1 || math.Abs(q.Accuracy.Drop-.1) > 1e-9 {
		t.Errorf("%+v", q.Accuracy)
	}
}

// Outputs of several positions are compared position by position, and the bars come from whole cases.
func TestJudgeOfSeveralPositions(t *testing.T) {
	want := []float32{3, 1, 1, 3, 3, 1, 1, 3}
	got := []float32{3, 1, 3, 1, 3, 1, 1, 3}
	q, err := Judge(want, got, 2, 2, nil)
	if err != nil {
		t.Fatal(err)
	}
	if q.Cases != 2 || q.Positions != 2 || q.Top1 != .75 || q.Accuracy != nil || q.Bars.Top1 != (Interval{.5, 1}) {
		t.Errorf("%+v", q)
	}
	if _, err := Judge(want, got, 2, 2, []int{0, 1}); err == nil {
		t.Error("labels for outputs of several positions accepted")
	}
}

func TestJudgeRefuses(t *testing.T) {
	nan := float32(math.NaN())
	for _, c := range []struct {
		want, got    []float32
		cases, width int
		text         string
	}{
		{[]float32{1, 2}, []float32{1}, 1, 2, "cannot judge"},
		{[]float32{1, 2}, []float32{1, 2}, 0, 2, "cannot judge"},
		{[]float32{1, 2, 3}, []float32{1, 2, 3}, 1, 2, "cannot judge"},
		{[]float32{1, 2, 3, 4}, []float32{1, 2, 3, nan}, 2, 2, "compressed network gives NaN in case 1"},
	} {
		if _, err := Judge(c.want, c.got, c.cases, c.width, nil); err == nil || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%v: want %q", err, c.text)
		}
	}
}

func TestDirections(t *testing.T) {
	encoder := func(head bool) *nn.Network {
		b := nn.NewBuilder(1)
		h := b.Add("norm", nn.LayerNorm{}, b.Input("x", shapes.Make(dtypes.Float32, 1, 3, 4)))
		if head {
			h = b.Add("head", nn.Dense{Out: 2}, h)
		}
		net, err := b.Finish(b.Add("turned", nn.Transpose{Perm: []int{0, 2, 1}}, h))
		if err != nil {
			t.Fatal(err)
		}
		return net
	}
	for name, c := range map[string]struct {
		net    *nn.Network
		values []float32
		want   bool
	}{
		"hidden states":  {encoder(false), []float32{3, 1}, true},
		"unit vectors":   {encoder(true), []float32{.6, -.8, 1, 0}, true},
		"logits":         {encoder(true), []float32{.6, -.8, 1, 1}, false},
		"sure of itself": {encoder(true), []float32{1, 0, 0, 1}, false}, // probabilities have length one, too
	} {
		if got := Directions(c.net, c.values, 2); got != c.want {
			t.Errorf("%s: %t", name, got)
		}
	}
}

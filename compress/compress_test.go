package compress

import (
	"context"
	"errors"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/nn"
)

// mlp is x [n,3] -> fc1 -> relu -> fc2 -> [n,2].
func mlp(t *testing.T) *nn.Network {
	t.Helper()
	b := nn.NewBuilder(1)
	x := b.Input("x", shapes.Make(dtypes.Float32, 1, 3))
	h := b.Add("act", nn.ReLU, b.Add("fc1", nn.Dense{Out: 4}, x))
	net, err := b.Finish(b.Add("fc2", nn.Dense{Out: 2}, h))
	if err != nil {
		t.Fatal(err)
	}
	return net
}

func ramp(n int) Examples {
	x := make([]float32, 3*n)
	for i := range x {
		x[i] = float32(math.Sin(float64(i)))
	}
	return Examples{tensors.FromFlatDataAndDimensions(x, n, 3)}
}

func TestEvaluateDoesNotDependOnTheBatch(t *testing.T) {
	net, x := mlp(t), ramp(10)
	var want []float32
	for _, batch := range []int{10, 1, 3, 64} {
		y, w, err := Evaluate(context.Background(), enginetest.Backend(), net, x, batch)
		if err != nil || w != 2 || len(y) != 20 {
			t.Fatal(w, len(y), err)
		}
		if want == nil {
			want = y
		}
		if RelativeError(want, y) > 1e-12 {
			t.Errorf("batch %d gives other outputs", batch)
		}
	}
}

func TestCaptureAndRangesAgree(t *testing.T) {
	net, x := mlp(t), ramp(11)
	ctx := context.Background()
	data, dims, err := Capture(ctx, enginetest.Backend(), net, x, 4, "fc1", "act", "x")
	if err != nil || !slices.Equal(dims[0], []int{11, 4}) || !slices.Equal(dims[2], []int{11, 3}) || len(data[1]) != 44 {
		t.Fatal(dims, err)
	}
	r, err := Ranges(ctx, enginetest.Backend(), net, x, 4, "fc1", "act", "x")
	if err != nil {
		t.Fatal(err)
	}
	for i := range r {
		if r[i].Lo != slices.Min(data[i]) || r[i].Hi != slices.Max(data[i]) {
			t.Errorf("value %d: %v, want %g to %g", i, r[i], slices.Min(data[i]), slices.Max(data[i]))
		}
	}
	if _, err := Ranges(ctx, enginetest.Backend(), net, x, 4, "nothing"); err == nil {
		t.Error("an unknown value")
	}
}

func TestWalkShowsEverySiteWhatTheChangedNetworkFeedsIt(t *testing.T) {
	net, x := mlp(t), ramp(5)
	var order []string
	err := Walk(context.Background(), enginetest.Backend(), net, x, func(n *nn.Node, value func(string) *tensors.Tensor) error {
		order = append(order, n.Name)
		if n.Name == "act" {
			_, err := net.InsertBefore("act", 0, "double", nn.Affine{Scale: 2})
			return err
		}
		if n.Name == "fc2" {
			got := nn.Floats(value("act"))
			fc1, _, err := Capture(context.Background(), enginetest.Backend(), mlp(t), x, 0, "act")
			if err != nil {
				return err
			}
			for i := range got {
				if math.Abs(float64(got[i]-2*fc1[0][i])) > 1e-6 {
					t.Errorf("value %d: %g, want twice %g", i, got[i], fc1[0][i])
				}
			}
			if value("x") != nil {
				t.Error("a value that nobody will read is still held")
			}
		}
		return nil
	})
	if err != nil || !slices.Equal(order, []string{"fc1", "act", "fc2"}) {
		t.Fatal(order, err)
	}
	boom := errors.New("boom")
	err = Walk(context.Background(), enginetest.Backend(), mlp(t), x, func(n *nn.Node, _ func(string) *tensors.Tensor) error { return boom })
	if !errors.Is(err, boom) || !strings.Contains(err.Error(), "fc1") {
		t.Error(err)
	}
}

func TestExamples(t *testing.T) {
	x := ramp(5)
	s, err := x.Slice(3, 5, 4)
	if err != nil || s.Len() != 4 {
		t.Fatal(s.Len(), err)
	}
	v, w := nn.Floats(s[0]), nn.Floats(x[0])
	if !slices.Equal(v[:6], w[9:15]) || !slices.Equal(v[6:9], w[12:15]) || !slices.Equal(v[9:], w[12:15]) {
		t.Error("the last case must fill the batch up")
	}
	for _, r := range [][2]int{{-1, 2}, {2, 2}, {3, 6}} {
		if _, err := x.Slice(r[0], r[1], 0); err == nil {
			t.Error(r)
		}
	}
	net := mlp(t)
	for name, bad := range map[string]Examples{
		"none": nil, "two": {x[0], x[0]}, "narrow": {tensors.FromFlatDataAndDimensions(make([]float32, 4), 2, 2)},
		"rank": {tensors.FromFlatDataAndDimensions(make([]float32, 3), 3)}, "type": {tensors.FromFlatDataAndDimensions(make([]int32, 3), 1, 3)},
	} {
		if bad.Check(net) == nil {
			t.Error(name, "accepted")
		}
	}
	if _, err := FloatExamples(make([]float32, 5), 2, 3); err == nil {
		t.Error("five values for six")
	}
}

func TestCompare(t *testing.T) {
	a, err := Compare([]float32{1, 2, 3, 0}, []float32{1, 2, 3, 0}, 2, 2)
	if err != nil || a != (Agreement{Cases: 2, Cosine: 1, Top1: 1}) && math.Abs(a.Cosine-1) > 1e-12 {
		t.Error(a, err)
	}
	a, err = Compare([]float32{0, float32(math.Log(3))}, []float32{0, 0}, 1, 2)
	if want := .25*math.Log(.5) + .75*math.Log(1.5); err != nil || math.Abs(a.KL-want) > 1e-6 {
		t.Error(a.KL, want, err)
	}
	p, err := Compare([]float32{.25, .75}, []float32{.5, .5}, 1, 2) // already probabilities
	if err != nil || math.Abs(p.KL-a.KL) > 1e-6 || p.Top1 != 0 {
		t.Error(p, err)
	}
	for _, w := range [][2]int{{1, 0}, {0, 2}, {1, 3}, {2, 2}, {-1, 2}} {
		if _, err := Compare([]float32{1, 2}, []float32{1, 2}, w[0], w[1]); err == nil {
			t.Error("cases and width", w)
		}
	}
}

// A case of several positions is compared class by class at each, and as a whole by the cosine.
func TestCompareOfSequences(t *testing.T) {
	ln3 := float32(math.Log(3))
	for name, c := range map[string]struct {
		want, got []float32
		cases     int
		a         Agreement
	}{
		"logits": { // the second position goes from 1/2, 1/2 to 3/4, 1/4
			[]float32{0, ln3, 0, 0},
			[]float32{0, ln3, ln3, 0},
			1,
			Agreement{Cases: 1, MSE: float64(ln3*ln3) / 4, Cosine: 1 / math.Sqrt2, KL: .5 * math.Log(4./3) / 2, Top1: 1},
		},
		"probabilities are not put through a softmax again": {
			[]float32{.25, .75, .5, .5},
			[]float32{.5, .5, .5, .5},
			1,
			Agreement{Cases: 1, MSE: .125 / 4, Cosine: 1 / math.Sqrt(1.125), KL: (.25*math.Log(.5) + .75*math.Log(1.5)) / 2, Top1: .5},
		},
		"two cases of one position": {
			[]float32{.25, .75, .5, .5},
			[]float32{.5, .5, .5, .5},
			2,
			Agreement{Cases: 2, MSE: .125 / 4, Cosine: (.5/math.Sqrt(.3125) + 1) / 2, KL: (.25*math.Log(.5) + .75*math.Log(1.5)) / 2, Top1: .5},
		},
	} {
		a, err := Compare(c.want, c.got, c.cases, 2)
		if err != nil {
			t.Fatal(err)
		}
		near := func(x, y float64) bool { return math.Abs(x-y) < 1e-6 } // of float32 values
		if a.Cases != c.a.Cases || a.Top1 != c.a.Top1 || !near(a.MSE, c.a.MSE) || !near(a.Cosine, c.a.Cosine) || !near(a.KL, c.a.KL) {
			t.Errorf("%s: %+v, want %+v", name, a, c.a)
		}
	}
}

func TestRowWidth(t *testing.T) {
	for _, c := range []struct {
		dims []int
		want int
	}{
		{[]int{7, 10}, 10},
		{[]int{7, 40, 6625}, 6625},
		{[]int{7, 40, 1}, 40}, // one score a position: the positions are compared
		{[]int{7, 1, 4, 5}, 20},
		{[]int{7}, 1},
		{nil, 1},
	} {
		if got := RowWidth(c.dims); got != c.want {
			t.Errorf("%v: %d, want %d", c.dims, got, c.want)
		}
	}
}

func TestAccuracyTakesTheFirstMaximum(t *testing.T) {
	acc, err := Accuracy([]float32{1, 1, 0, 2}, 2, []int{0, 1})
	if err != nil || acc != 1 {
		t.Error(acc, err)
	}
	for _, l := range [][]int{nil, {0}, {0, 2}, {0, -1}} {
		if _, err := Accuracy([]float32{1, 1, 0, 2}, 2, l); err == nil {
			t.Error(l, "accepted")
		}
	}
}

func TestSizeCountsSharedParametersOnce(t *testing.T) {
	net := mlp(t)
	if n := Size(net); n != 4*(12+4+8+2) {
		t.Error(n)
	}
	if n := WeightBytes(net, net.Node("fc1")); n != 48 {
		t.Error(n)
	}
	b := nn.NewBuilder(1)
	x := b.Input("x", shapes.Make(dtypes.Float32, 1, 3))
	h := b.Add("fc1", nn.Dense{Out: 3, NoBias: true}, x)
	tied, err := b.Finish(b.Share("w", "fc1.w").Add("fc2", nn.Dense{Out: 3, NoBias: true}, h))
	if err != nil {
		t.Fatal(err)
	}
	if n := Size(tied); n != 36 {
		t.Error(n)
	}
}

func TestSiteErrors(t *testing.T) {
	net, x := mlp(t), ramp(7)
	other := net.Clone()
	d := other.Params.Get("fc1.b").Data()
	for i := range d {
		d[i] += .5
	}
	if err := other.Params.Get("fc1.b").SetData(d); err != nil {
		t.Fatal(err)
	}
	e, err := SiteErrors(context.Background(), enginetest.Backend(), net, other, x, 3, []string{"x", "fc1"})
	if err != nil || e[0] != 0 || !(e[1] > 0) {
		t.Fatal(e, err)
	}
	want, _, _ := Capture(context.Background(), enginetest.Backend(), net, x, 0, "fc1")
	got, _, _ := Capture(context.Background(), enginetest.Backend(), other, x, 0, "fc1")
	if r := RelativeError(want[0], got[0]); math.Abs(r-e[1]) > 1e-6*r {
		t.Errorf("%g, want %g", e[1], r)
	}
}

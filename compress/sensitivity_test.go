package compress

import (
	"context"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/nn"
)

// halved stores half of a weight, as a stand-in for forms that must be decoded.
type halved struct{}

func (halved) Kind() string { return "halved" }
func (halved) Specs(w shapes.Shape) []nn.Spec {
	return []nn.Spec{{Name: "h", Shape: w, Role: nn.Constant}}
}
func (halved) Value(c *nn.Ctx) *graph.Node { return graph.MulScalar(c.P("h"), 2) }

// branched is x [n,3] -> fc1 -> relu -> norm -> fc2 -> relu -> +(fc2's input) -> fc3, with a norm to push scales through.
func branched(t *testing.T) *nn.Network {
	t.Helper()
	b := nn.NewBuilder(3)
	x := b.Input("x", shapes.Make(dtypes.Float32, 1, 3))
	h := b.Add("norm", nn.LayerNorm{}, b.Add("act", nn.ReLU, b.Add("fc1", nn.Dense{Out: 4}, x)))
	r := b.Add("sum", nn.Add, b.Add("act2", nn.ReLU, b.Add("fc2", nn.Dense{Out: 4}, h)), h)
	net, err := b.Finish(b.Add("fc3", nn.Dense{Out: 5}, r))
	if err != nil {
		t.Fatal(err)
	}
	return net
}

// rounded rounds a weight to multiples of step.
func rounded(step float64) Form {
	return Form{Name: fmt.Sprint("round ", step), Put: func(_ context.Context, net *nn.Network, n *nn.Node) error {
		p := net.Param(n, "w")
		w := p.Data()
		for i, v := range w {
			w[i] = float32(math.Round(float64(v)/step) * step)
		}
		return p.SetData(w)
	}}
}

func forms() []Form {
	return []Form{
		rounded(.25),
		rounded(.5),
		{Name: "halved", Put: func(_ context.Context, net *nn.Network, n *nn.Node) error {
			p := net.Param(n, "w")
			w := p.Data()
			for i := range w {
				w[i] /= 2
			}
			_, err := net.Substitute(n.Name, halved{}, map[string]*tensors.Tensor{"h": tensors.FromFlatDataAndDimensions(w, p.Value.Shape().Dimensions...)})
			return err
		}},
		{Name: "a2", Put: func(_ context.Context, net *nn.Network, n *nn.Node) error {
			q, err := net.InsertBefore(n.Name, 0, n.Name+".quant", nn.QuantizeDequantize{Bits: 2})
			if err != nil {
				return err
			}
			net.SetParam(q, "scale", nn.Constant, []float32{.5}, 1)
			net.SetParam(q, "zero", nn.Constant, []float32{1}, 1)
			return nil
		}},
		{Name: "upstream", Put: func(_ context.Context, net *nn.Network, n *nn.Node) error {
			net.SetParam(net.Node("norm"), "w", nn.Gain, []float32{1, 2, 1, 1}, 4)
			return nil
		}},
		{Name: "dense only", Put: func(_ context.Context, net *nn.Network, n *nn.Node) error {
			if n.Name == "fc2" {
				return fmt.Errorf("no: %w", ErrForm)
			}
			return nil
		}},
	}
}

func TestSensitivityEqualsChangingOneSiteAtATime(t *testing.T) {
	ctx, b := context.Background(), enginetest.Backend()
	x, labels := ramp(11), []int{0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0}
	half := branched(t) // a base that is compressed itself
	if err := forms()[2].Put(ctx, half, half.Node("fc2")); err != nil {
		t.Fatal(err)
	}
	for _, net := range []*nn.Network{branched(t), half} {
		want, width, err := Evaluate(ctx, b, net, x, 4)
		if err != nil {
			t.Fatal(err)
		}
		before := net.Clone()
		for _, cuts := range []int{1, 2, 8} {
			for _, limit := range []int64{0, 1} {
				var steps []Step
				got, err := Sensitivity{
					Forms: forms(), Batch: 4, Cuts: cuts, MaxBytes: limit, Labels: labels,
					Select:   func(n *nn.Node) bool { return net != half || n.Name != "fc2" },
					Progress: func(s Step) { steps = append(steps, s) },
				}.Measure(ctx, b, net, x)
				if err != nil {
					t.Fatal(err)
				}
				if len(steps) != len(got) {
					t.Errorf("%d steps for %d sites", len(steps), len(got))
				}
				for _, site := range got {
					for i, f := range forms() {
						changed := net.Clone()
						e := site.Effects[i]
						if err := f.Put(ctx, changed, changed.Node(site.Site)); err != nil {
							if e.Refused == "" || e.Loss != 0 {
								t.Errorf("%s of %s is not refused", f.Name, site.Site)
							}
							continue
						}
						y, _, err := Evaluate(ctx, b, changed, x, 4)
						if err != nil {
							t.Fatal(err)
						}
						a, err := Compare(want, y, 11, width)
						if err != nil {
							t.Fatal(err)
						}
						acc, err := Accuracy(y, width, labels)
						if err != nil {
							t.Fatal(err)
						}
						if math.Abs(a.MSE-e.MSE) > 1e-9+1e-5*a.MSE || math.Abs(a.KL-e.KL) > 1e-9+1e-4*a.KL || a.Top1 != e.Top1 || acc != e.Accuracy || !(e.Loss > 0) {
							t.Errorf("cuts %d, %s of %s: %+v, want %+v", cuts, f.Name, site.Site, e, a)
						}
						if f.Name == "upstream" && e.MSE == 0 {
							t.Error("a change in front of the site is not seen")
						}
						if f.Name == "dense only" && (e.MSE != 0 || e.KL != 0) {
							t.Errorf("a form that changes nothing has effect %+v on %s", e, site.Site)
						}
					}
				}
			}
		}
		for p := range before.Params.All() {
			if q := net.Params.Get(p.Name); q == nil || !sameTensor(p.Value, q.Value) {
				t.Errorf("parameter %q is not what it was", p.Name)
			}
		}
		if before.Params.Len() != net.Params.Len() || structure(before) != structure(net) {
			t.Error("the network is not what it was")
		}
	}
}

// A text recogniser's output, [cases, positions, classes] after a softmax, is compared position by position.
func TestSensitivityOfSequences(t *testing.T) {
	ctx, be := context.Background(), enginetest.Backend()
	b := nn.NewBuilder(3)
	h := b.Add("fc1", nn.Dense{Out: 4}, b.Input("x", shapes.Make(dtypes.Float32, 1, 2, 3)))
	net, err := b.Finish(b.Add("out", nn.Softmax{Axis: -1}, b.Add("fc2", nn.Dense{Out: 5}, h)))
	if err != nil {
		t.Fatal(err)
	}
	values := make([]float32, 3*2*3)
	for i := range values {
		values[i] = float32(i%5) - 2
	}
	x, err := FloatExamples(values, 3, 2, 3)
	if err != nil {
		t.Fatal(err)
	}
	got, err := Sensitivity{Forms: []Form{rounded(.5)}}.Measure(ctx, be, net, x)
	if err != nil {
		t.Fatal(err)
	}
	changed := net.Clone()
	if err := rounded(.5).Put(ctx, changed, changed.Node("fc1")); err != nil {
		t.Fatal(err)
	}
	var p [2][]float32
	for i, n := range []*nn.Network{net, changed} {
		if p[i], _, err = Evaluate(ctx, be, n, x, 0); err != nil {
			t.Fatal(err)
		}
	}
	kl := 0.
	for i, v := range p[0] {
		kl += float64(v) * math.Log(float64(v)/float64(p[1][i])) / (3 * 2)
	}
	if e := got[0].Effects[0]; e.Cases != 3 || !(kl > 0) || math.Abs(e.KL-kl) > 1e-6 {
		t.Errorf("%+v, want a divergence of %g nats", e, kl)
	}
}

func TestSensitivityGoesOnWhereItWas(t *testing.T) {
	ctx, net, x := context.Background(), branched(t), ramp(6)
	j, err := OpenJournal(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	measured := map[string]int{}
	stop := ""
	f := Form{Name: "r", Put: func(ctx context.Context, net *nn.Network, n *nn.Node) error {
		if n.Name == stop {
			return context.Canceled
		}
		measured[n.Name]++
		return rounded(.5).Put(ctx, net, n)
	}}
	s := Sensitivity{Forms: []Form{f}, Journal: j}
	stop = "fc3"
	if _, err := s.Measure(ctx, enginetest.Backend(), net, x); err == nil || !strings.Contains(err.Error(), "fc3") {
		t.Fatalf("err = %v, want one that names fc3", err)
	}
	stop = ""
	got, err := s.Measure(ctx, enginetest.Backend(), net, x)
	if err != nil {
		t.Fatal(err)
	}
	s.Journal = nil
	again, err := s.Measure(ctx, enginetest.Backend(), net, x)
	if err != nil {
		t.Fatal(err)
	}
	for i := range got {
		if got[i].Effects[0] != again[i].Effects[0] || got[i].Weights != again[i].Weights {
			t.Errorf("restored %+v, measured %+v", got[i], again[i])
		}
	}
	if measured["fc1"] != 2 || measured["fc3"] != 2 {
		t.Errorf("measured %v; want fc1 once per complete run", measured)
	}
}

func TestSensitivityRefuses(t *testing.T) {
	ctx, net, x := context.Background(), branched(t), ramp(3)
	ok := rounded(.5)
	for name, s := range map[string]Sensitivity{
		"no forms":       {},
		"unnamed":        {Forms: []Form{{Put: ok.Put}}},
		"no function":    {Forms: []Form{{Name: "w4"}}},
		"twice":          {Forms: []Form{ok, ok}},
		"labels":         {Forms: []Form{ok}, Labels: []int{1}},
		"label range":    {Forms: []Form{ok}, Labels: []int{1, 9, 1}},
		"nothing":        {Forms: []Form{ok}, Select: func(*nn.Node) bool { return false }},
		"a short target": {Forms: []Form{ok}, Target: make([]float32, 4)},
	} {
		if _, err := s.Measure(ctx, enginetest.Backend(), net, x); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if _, err := (Sensitivity{Forms: []Form{ok}}).Measure(ctx, enginetest.Backend(), net, nil); err == nil {
		t.Error("no examples: no error")
	}
}

func TestEffectiveWeightDecodesWhatIsStored(t *testing.T) {
	net := branched(t)
	n := net.Node("fc2")
	want := net.Param(n, "w").Data()
	if err := forms()[2].Put(context.Background(), net, n); err != nil {
		t.Fatal(err)
	}
	w, err := EffectiveWeight(enginetest.Backend(), net, n)
	if err != nil || !slices.Equal(nn.Floats(w), want) {
		t.Error(nn.Floats(w), want, err)
	}
	if _, err := EffectiveWeight(enginetest.Backend(), net, net.Node("act")); err == nil {
		t.Error("a node without a weight")
	}
}

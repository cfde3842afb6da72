package quant

import (
	"context"
	"slices"
	"strings"
	"testing"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/nn"
)

// twoLayers is a network from 6 numbers whose end is added by end.
func twoLayers(t *testing.T, end func(b *nn.Builder, x string) []string) *nn.Network {
	t.Helper()
	b := nn.NewBuilder(2)
	x := b.Add("first", nn.Dense{Out: 8}, b.Input("x", shapes.Make(dtypes.Float32, 1, 6)))
	x = b.Add("second", nn.Dense{Out: 4}, b.Add("act", nn.Tanh, x))
	net, err := b.Finish(end(b, x)...)
	if err != nil {
		t.Fatal(err)
	}
	return net
}

func TestTrainingLearnsWhateverTheTeacherGives(t *testing.T) {
	for _, c := range []struct {
		name   string
		end    func(b *nn.Builder, x string) []string
		labels bool
		refuse string
	}{
		{"logits", func(_ *nn.Builder, x string) []string { return []string{x} }, false, ""},
		{"logits and labels", func(_ *nn.Builder, x string) []string { return []string{x} }, true, ""},
		{"probabilities", func(b *nn.Builder, x string) []string { return []string{b.Add("p", nn.Softmax{}, x)} }, false, ""},
		{"probabilities and labels", func(b *nn.Builder, x string) []string { return []string{b.Add("p", nn.Softmax{}, x)} }, true, ""},
		{"features", func(b *nn.Builder, x string) []string { return []string{b.Add("n", nn.LayerNorm{}, x)} }, false, ""},
		{"features and labels", func(b *nn.Builder, x string) []string { return []string{b.Add("n", nn.LayerNorm{}, x)} }, true, "labels"},
		{"two outputs", func(b *nn.Builder, x string) []string { return []string{x, b.Add("n", nn.LayerNorm{}, x)} }, false, ""},
		{"a decision", func(b *nn.Builder, x string) []string { return []string{b.Add("a", nn.ArgMax{Axis: 1}, x)} }, false, "nothing is learnt"},
	} {
		teacher := twoLayers(t, c.end)
		x := images(64, 6)
		q := QAT{Steps: 60, Batch: 16, LR: 1e-2}
		if c.labels {
			for i := range 64 {
				q.Labels = append(q.Labels, i%4)
			}
		}
		student := teacher.Clone()
		for _, n := range student.Sites() {
			if err := MakeLatent(student, n, StatsWeight{Bits: 2}); err != nil {
				t.Fatal(err)
			}
		}
		// Something to learn: the teacher is moved away from the student.
		for _, p := range []string{"first.b", "second.b"} {
			v := teacher.Params.Get(p)
			if err := v.SetData(normal(7, v.Value.Shape().Size(), 1)); err != nil {
				t.Fatal(err)
			}
		}
		before := teacher.Params.Clone()
		done, err := q.Train(context.Background(), enginetest.Backend(), student, teacher, x, compress.Options{}, Phase{Name: "test"})
		if c.refuse != "" {
			if err == nil || !strings.Contains(err.Error(), c.refuse) {
				t.Errorf("%s: %v, want an error with %q", c.name, err, c.refuse)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if done.Steps != 60 || done.Batch != 16 || !(done.Last < done.First) {
			t.Errorf("%s: the loss does not fall: %+v", c.name, done)
		}
		for p := range before.All() {
			if !slices.Equal(p.Data(), teacher.Params.Get(p.Name).Data()) {
				t.Errorf("%s: the teacher's %q has changed", c.name, p.Name)
			}
		}
		trained := outputs(t, student, x)
		if err := Settle(student); err != nil {
			t.Fatal(err)
		}
		if got := outputs(t, student, x); c.name != "a decision" && !near(got, trained, 1e-4) {
			t.Errorf("%s: stored %v, trained %v", c.name, got[:4], trained[:4])
		}
		for _, n := range student.Sites() {
			if _, ok := n.Op.(nn.Linear).Repr().(Uniform); !ok {
				t.Errorf("%s: site %q is stored as %s", c.name, n.Name, n.Op.(nn.Linear).Repr().Kind())
			}
			if n.P["w"] != "" || student.Params.Get(n.Name+".w") != nil {
				t.Errorf("%s: the latents of %q are still there", c.name, n.Name)
			}
		}
	}
}

func TestTeacherIsAskedOncePerCase(t *testing.T) {
	teacher := twoLayers(t, func(_ *nn.Builder, x string) []string { return []string{x} })
	x := images(6, 6)
	l, err := newLessons(enginetest.Backend(), teacher, 6)
	if err != nil {
		t.Fatal(err)
	}
	for _, idx := range [][]int{{0, 3}, {5, 1, 2, 4}} {
		in, err := x.Pick(idx)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := l.of(in, idx, false); err != nil {
			t.Fatal(err)
		}
	}
	l.runner.Finalize()
	l.runner = nil
	got, err := l.of(nil, []int{4, 0}, false)
	if err != nil {
		t.Fatal(err)
	}
	want := outputs(t, teacher, x)
	if v := nn.Floats(got[0]); !near(v, append(slices.Clone(want[16:20]), want[:4]...), 1e-6) {
		t.Errorf("kept %v, want cases 4 and 0 of %v", v, want)
	}
}

func TestTiedWeightsPartWhenTheyBecomeLatent(t *testing.T) {
	b := nn.NewBuilder(2)
	x := b.Add("one", nn.Dense{Out: 6, NoBias: true}, b.Input("x", shapes.Make(dtypes.Float32, 1, 6)))
	net, err := b.Finish(b.Share("w", "one.w").Add("two", nn.Dense{Out: 6, NoBias: true}, x))
	if err != nil {
		t.Fatal(err)
	}
	if err := MakeLatent(net, net.Node("one"), LSQWeight{Bits: 3}); err != nil {
		t.Fatal(err)
	}
	if err := MakeLatent(net, net.Node("two"), LSQWeight{Bits: 5}); err != nil {
		t.Fatal(err)
	}
	trained := outputs(t, net, images(3, 6))
	if err := Settle(net); err != nil {
		t.Fatal(err)
	}
	if got := outputs(t, net, images(3, 6)); !near(got, trained, 1e-5) {
		t.Errorf("stored %v, trained %v", got, trained)
	}
}

func TestTrainingRefuses(t *testing.T) {
	net := twoLayers(t, func(_ *nn.Builder, x string) []string { return []string{x} })
	x := images(4, 6)
	for name, q := range map[string]QAT{
		"negative steps": {Steps: -1}, "negative rate": {LR: -1}, "no target": {NoTeacher: true}, "label 4": {Labels: []int{0, 1, 2, 4}}, "1 label": {Labels: []int{1}},
	} {
		if _, err := q.Train(context.Background(), enginetest.Backend(), net.Clone(), net, x, compress.Options{}, Phase{}); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
	if _, err := (QAT{}).Train(context.Background(), enginetest.Backend(), net.Clone(), nil, x, compress.Options{}, Phase{}); err == nil {
		t.Error("training without a teacher and labels is accepted")
	}
}

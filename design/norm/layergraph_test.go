package norm_test

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/design/norm"
	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/internal/fixture"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/onnx"
	"github.com/lathe-ml/lathe/nn/safetensors"
	"github.com/lathe-ml/lathe/nn/zoo"
)

func graphOf(t *testing.T, name string) norm.LayerGraph {
	t.Helper()
	g, err := norm.GraphOf(name)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

func build(t *testing.T, g norm.LayerGraph, groups int) nn.Norm {
	t.Helper()
	n, err := g.Build(norm.EvoOptions{Groups: groups})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestGraphFormsAreTheLayers(t *testing.T) {
	x := evoMaps(11, 3, 4, 5, 6)
	v := []float64{1, .5, 2, -1, 1.5, .1}
	for _, l := range []norm.EvoLayer{norm.B0, norm.B2, norm.S0, norm.S1, norm.S2} {
		for _, training := range []bool{true, false} {
			got := nn.Float64s(runGraph(t, build(t, graphOf(t, string(l)), 3), training, x, nil, v))
			if d := furthest(got, evo(t, norm.EvoNorm{Layer: l, Groups: 3}, training, x, v, nil)); d > 1e-4 {
				t.Errorf("%s (training %v): the graph is off by %g", l, training, d)
			}
		}
	}
	bn := nn.Float64s(runGraph(t, build(t, graphOf(t, "bn-relu"), 1), true, x, nil, nil))
	want := nn.Float64s(lowered(t, nn.BatchNorm{NoAffine: true}, true, []*tensors.Tensor{x, fixture.Tensor(make([]float64, 6), dtypes.Float64, 6), fixture.Tensor(make([]float64, 6), dtypes.Float64, 6)}, []string{"mean", "var"},
		func(y *graph.Node, _ []*graph.Node, _ map[string]*graph.Node) []*graph.Node { return []*graph.Node{y} })[0])
	for i := range want {
		want[i] = max(want[i], 0)
	}
	if d := furthest(bn, want); d > 1e-4 {
		t.Errorf("bn-relu is off by %g", d)
	}
}

func TestPrunedGraphIsTheSame(t *testing.T) {
	x := fixture.Tensor(nn.Float64s(evoMaps(12, 2, 3, 3, 4)), dtypes.Float32, 2, 3, 3, 4)
	space := norm.Space{Batch: true}
	pruned, running := 0, 0
	for i := range 60 {
		l := norm.RandomLayer(rng.New(uint64(i), "prune"), space)
		if l.Check() != nil {
			continue
		}
		p := l.Prune()
		if err := p.Check(); err != nil {
			t.Fatalf("%v: %v", l, err)
		}
		if len(p.Nodes) < len(l.Nodes) {
			pruned++
		}
		if p.Canonical() != l.Canonical() || p.Formula() != l.Formula() || p.UsesBatch() != l.UsesBatch() {
			t.Errorf("pruning changes the meaning of %s", l.Formula())
		}
		for _, training := range []bool{true, false} {
			a, b := runGraph(t, build(t, l, 2), training, x, []float64{.1, 0, -.3, 2}, nil), runGraph(t, build(t, p, 2), training, x, []float64{.1, 0, -.3, 2}, nil)
			if fmt.Sprint(nn.Floats(a)) != fmt.Sprint(nn.Floats(b)) {
				t.Errorf("training %v: %s differs when pruned", training, l.Formula())
			}
		}
		// Running values keep their names.
		whole := map[string]bool{}
		in := []shapes.Shape{shapes.Make(dtypes.Float32, 2, 3, 3, 4)}
		for _, s := range build(t, l, 2).Params(in) {
			whole[s.Name] = true
		}
		for _, s := range build(t, p, 2).Params(in) {
			if s.Role == nn.State {
				running++
			}
			if !whole[s.Name] {
				t.Errorf("%s: %q is not a parameter of the whole graph", l.Formula(), s.Name)
			}
		}
	}
	if pruned < 20 || running < 3 {
		t.Errorf("only %d graphs had dead nodes, %d running values", pruned, running)
	}
}

func TestFormulas(t *testing.T) {
	for name, want := range map[string]string{
		"b0":      "x / max(std[bwh](x), std[wh](x) + x·v1)",
		"b2":      "x / max(std[bwh](x), rms[wh](x) − x)",
		"s0":      "x·σ(x·v1) / std[whc/g](x)",
		"bn-relu": "max((x − mean[bwh](x)) / std[bwh](x), 0)",
		"bn-silu": "a·σ(a)  where a = (x − mean[bwh](x)) / std[bwh](x)",
		"square":  "x²",
	} {
		if got := graphOf(t, name).Formula(); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	// A chain of squares of itself stays short: shared parts are named.
	l := norm.LayerGraph{}
	for i := range norm.MaxLayerNodes {
		v := max(i+3, 0)
		if i == 0 {
			v = 0
		}
		l.Nodes = append(l.Nodes, norm.GNode{Op: "mul", In: []int{v, v}})
	}
	if f := l.Formula(); len(f) > 64*16 {
		t.Errorf("%d characters", len(f))
	}
}

func TestCanonicalSeesTheMeaning(t *testing.T) {
	parse := func(s string) norm.LayerGraph {
		var l norm.LayerGraph
		if err := json.Unmarshal([]byte(s), &l); err != nil {
			t.Fatal(err)
		}
		return l
	}
	a := parse(`{"nodes":[{"op":"exp","in":[0]},{"op":"abs","in":[0]},{"op":"add","in":[4,5]}]}`)
	for _, s := range []string{
		`{"nodes":[{"op":"abs","in":[0]},{"op":"exp","in":[0]},{"op":"add","in":[4,5]}]}`,                       // order of nodes
		`{"nodes":[{"op":"exp","in":[0]},{"op":"abs","in":[0]},{"op":"add","in":[5,4]}]}`,                       // of inputs
		`{"nodes":[{"op":"exp","in":[0]},{"op":"neg","in":[3]},{"op":"abs","in":[0]},{"op":"add","in":[4,6]}]}`, // a dead node
		`{"nodes":[{"op":"exp","in":[0]},{"op":"abs","in":[0]},{"op":"exp","in":[0]},{"op":"add","in":[6,5]}]}`, // a repeated node
	} {
		if b := parse(s); a.Canonical() != b.Canonical() {
			t.Errorf("%s is another layer", s)
		}
	}
	for _, s := range []string{
		`{"nodes":[{"op":"exp","in":[0]},{"op":"abs","in":[0]},{"op":"mul","in":[4,5]}]}`,
		`{"nodes":[{"op":"exp","in":[0]},{"op":"abs","in":[2]},{"op":"add","in":[4,5]}]}`,
	} {
		if parse(s).Canonical() == a.Canonical() {
			t.Errorf("%s is the same layer", s)
		}
	}
	d := parse(`{"nodes":[{"op":"exp","in":[0]},{"op":"div","in":[0,4]}]}`)
	if d.Canonical() == parse(`{"nodes":[{"op":"exp","in":[0]},{"op":"div","in":[4,0]}]}`).Canonical() {
		t.Error("a quotient is its reciprocal")
	}
}

func TestLayerGraphRefusals(t *testing.T) {
	long := strings.Repeat(`{"op":"neg","in":[0]},`, norm.MaxLayerNodes) + `{"op":"neg","in":[0]}`
	for name, c := range map[string]struct{ text, want string }{
		"empty":             {`{"nodes":[]}`, "0 nodes"},
		"too long":          {`{"nodes":[` + long + `]}`, "65 nodes"},
		"unknown primitive": {`{"nodes":[{"op":"sin","in":[0]}]}`, "sin"},
		"long name":         {`{"nodes":[{"op":"` + strings.Repeat("a", 1<<16) + `","in":[0]}]}`, "primitive"},
		"one input of two":  {`{"nodes":[{"op":"add","in":[0]}]}`, "2 inputs"},
		"two inputs of one": {`{"nodes":[{"op":"exp","in":[0,0]}]}`, "1 input"},
		"no inputs":         {`{"nodes":[{"op":"exp"}]}`, "1 input"},
		"forward":           {`{"nodes":[{"op":"add","in":[0,5]},{"op":"exp","in":[0]}]}`, "earlier"},
		"itself":            {`{"nodes":[{"op":"exp","in":[4]}]}`, "earlier"},
		"negative":          {`{"nodes":[{"op":"exp","in":[-1]}]}`, "earlier"},
		"index set":         {`{"nodes":[{"op":"std","in":[0],"I":"hw"}]}`, "hw"},
		"no index set":      {`{"nodes":[{"op":"std","in":[0]}]}`, "index set"},
		"idle index set":    {`{"nodes":[{"op":"exp","in":[0],"I":"wh"}]}`, "no index set"},
		"independent":       {`{"nodes":[{"op":"exp","in":[0]},{"op":"neg","in":[3]}]}`, "does not depend"},
		"keys clash":        {`{"nodes":[{"op":"std","in":[0],"I":"bwh","key":5},{"op":"exp","in":[4]}]}`, "key"},
		"key":               {`{"nodes":[{"op":"exp","in":[0],"key":-7}]}`, "key"},
		"unknown field":     {`{"nodes":[{"op":"exp","in":[0],"weight":7}]}`, "unknown field"},
		"not a graph":       {`[1,2]`, "cannot"},
		"nodes of text":     {`{"nodes":"x"}`, "cannot"},
	} {
		var l norm.LayerGraph
		if err := json.Unmarshal([]byte(c.text), &l); err == nil || !strings.Contains(err.Error(), c.want) || len(err.Error()) > 400 {
			t.Errorf("%s: got %.500v", name, err)
		}
		if len(l.Nodes) != 0 {
			t.Errorf("%s: a refused graph was kept", name)
		}
	}
	for _, o := range []norm.EvoOptions{{Groups: -1}, {Eps: -1}, {Decay: 1.5}, {Decay: math.NaN()}} {
		if _, err := graphOf(t, "b0").Build(o); err == nil {
			t.Errorf("%+v was accepted", o)
		}
	}
	if _, err := (norm.LayerGraph{}).Build(norm.EvoOptions{}); err == nil {
		t.Error("an empty graph was built")
	}
	if _, err := norm.GraphOf("b1"); err == nil {
		t.Error("b1 has a graph")
	}
}

func TestLayerGraphGradientsAreRight(t *testing.T) {
	// log, sqrt, tanh, square, div and every kind of moment, away from ties.
	var l norm.LayerGraph
	if err := json.Unmarshal([]byte(`{"nodes":[
		{"op":"rms","in":[0],"I":"bwh"},{"op":"mean","in":[0],"I":"whc"},{"op":"std","in":[0],"I":"whc/g"},
		{"op":"add","in":[4,6]},{"op":"div","in":[0,7]},{"op":"tanh","in":[8]},{"op":"log","in":[0]},{"op":"sqrt","in":[10]},
		{"op":"mul","in":[9,11]},{"op":"add","in":[12,5]},{"op":"square","in":[13]},{"op":"add","in":[14,3]}]}`), &l); err != nil {
		t.Fatal(err)
	}
	op := build(t, l, 2)
	x := evoMaps(13, 2, 3, 2, 4)
	value := func(x *tensors.Tensor, grad bool) []float64 {
		in := []shapes.Shape{shapes.Make(dtypes.Float32, 2, 3, 2, 4)}
		args, locals := []*tensors.Tensor{x}, []string{}
		for _, s := range op.Params(in) {
			args, locals = append(args, fixture.Tensor([]float64{1, 1.2, .8, 1.1}, dtypes.Float64, 4)), append(locals, s.Name)
		}
		return nn.Float64s(lowered(t, op, true, args, locals, func(y *graph.Node, in []*graph.Node, _ map[string]*graph.Node) []*graph.Node {
			s := graph.ReduceAllSum(graph.Mul(y, graph.Sin(graph.Iota(y.Graph(), y.Shape(), 1))))
			if grad {
				return graph.Gradient(s, in[0])
			}
			return []*graph.Node{s}
		})[0])
	}
	got, data := value(x, true), nn.Float64s(x)
	for _, i := range []int{1, 7, 20, 33, 46} {
		at := func(h float64) float64 {
			e := slices.Clone(data)
			e[i] += h
			return value(fixture.Tensor(e, dtypes.Float64, 2, 3, 2, 4), false)[0]
		}
		if num := (at(1e-6) - at(-1e-6)) / 2e-6; math.Abs(got[i]-num) > 1e-3*max(1, math.Abs(num)) {
			t.Errorf("∂/∂x[%d] = %g, finite difference %g", i, got[i], num)
		}
	}
}

func TestRandomLayersAndMutants(t *testing.T) {
	for _, space := range []norm.Space{{Batch: true}, {}, {Nodes: 3}} {
		dead, changed := 0, 0
		ops := map[string]bool{}
		for i := range 300 {
			l := norm.RandomLayer(rng.New(uint64(i), "layer"), space)
			if fmt.Sprint(l) != fmt.Sprint(norm.RandomLayer(rng.New(uint64(i), "layer"), space)) {
				t.Fatal("one seed, two layers")
			}
			if err := space.Allows(l); err != nil {
				t.Fatal(err)
			}
			m := norm.Mutate(rng.New(uint64(i), "mutant"), l, space)
			if err := space.Allows(m); err != nil {
				t.Fatal(err)
			}
			differ := 0
			for k := range l.Nodes {
				ops[l.Nodes[k].Op+l.Nodes[k].I] = true
				if fmt.Sprint(l.Nodes[k]) != fmt.Sprint(m.Nodes[k]) {
					differ++
				}
			}
			if differ > 1 || len(m.Nodes) != len(l.Nodes) {
				t.Fatalf("a mutation changed %d nodes", differ)
			}
			changed += differ
			for _, g := range []norm.LayerGraph{l, m} { // valid but for the dependence on x
				if err := g.Check(); err != nil && !strings.Contains(err.Error(), "does not depend") {
					t.Fatal(err)
				} else if err != nil {
					dead++
				}
			}
		}
		if changed < 250 || dead == 0 {
			t.Errorf("%+v: %d of 300 mutations changed a node, %d layers ignored x", space, changed, dead)
		}
		if want := 12 + 3*3; !space.Batch && len(ops) != want || space.Batch && len(ops) != 12+3*4 {
			t.Errorf("%+v: %d primitives were drawn", space, len(ops))
		}
	}
	if err := (norm.Space{}).Allows(graphOf(t, "b0")); err == nil {
		t.Error("an S space allows a moment over the batch")
	}
	if err := (norm.Space{Batch: true, Nodes: 3}).Allows(graphOf(t, "b0")); err == nil {
		t.Error("a space of 3 nodes allows 6")
	}
}

// A network with layer graphs trains, is written, read back with its running moments, and infers the same.
func TestNetworkWithALayerGraphIsAFile(t *testing.T) {
	layer := build(t, graphOf(t, "b0"), 0)
	net, err := zoo.MobileNet(zoo.MobileNetOptions{Size: 8, Stages: 2, Width: 4, Expansion: 2, NormAct: zoo.NormAct{Norm: layer}})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "net.safetensors")
	if err := safetensors.WriteNetwork(path, net); err != nil {
		t.Fatal(err)
	}
	back, err := safetensors.ReadNetwork(path, norm.GraphNorm{})
	if err != nil {
		t.Fatal(err)
	}
	x := evoMaps(14, 3, 8, 8, 1)
	x = fixture.Tensor(nn.Float64s(x), dtypes.Float32, 3, 8, 8, 1)
	a, err := net.Run(enginetest.Backend(), []*tensors.Tensor{x})
	if err != nil {
		t.Fatal(err)
	}
	b, err := back.Run(enginetest.Backend(), []*tensors.Tensor{x})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(nn.Floats(a[0]), nn.Floats(b[0])) {
		t.Error("the network reads back differently")
	}
	linear, states := 0, 0
	for _, n := range net.Nodes {
		if g, ok := n.Op.(norm.GraphNorm); ok && g.Linear {
			linear++
		}
		if n.Op.Kind() == "Relu" {
			t.Errorf("node %q is an activation behind an activated norm", n.Name)
		}
	}
	for p := range net.Params.All() {
		if p.Role == nn.State {
			states++
		}
	}
	if linear != 2 || states != 6 {
		t.Errorf("%d linear slots, %d running moments; want 2 and 6", linear, states)
	}
}

func TestLayerFiles(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "layer.json")
	g := graphOf(t, "b0")
	g.Nodes = append([]norm.GNode{{Op: "exp", In: []int{0}}}, g.Nodes...) // a dead node in front
	for i := range g.Nodes[1:] {
		for k, v := range g.Nodes[i+1].In {
			if v >= 4 {
				g.Nodes[i+1].In[k] = v + 1
			}
		}
	}
	if err := norm.WriteLayer(path, g, norm.EvoOptions{Groups: 4, Eps: 1e-4}, map[string]float64{"preact": .7}); err != nil {
		t.Fatal(err)
	}
	n, err := norm.ReadLayer(path)
	if err != nil {
		t.Fatal(err)
	}
	if l := n.(norm.GraphNorm); l.Groups != 4 || l.Eps != 1e-4 || l.Layer.Canonical() != graphOf(t, "b0").Canonical() || len(l.Layer.Nodes) != 6 {
		t.Errorf("got %+v", l)
	}
	for name, text := range map[string]string{
		"format":      `{"format":2,"layer":{"nodes":[{"op":"exp","in":[0]}]}}`,
		"no layer":    `{"format":1}`,
		"independent": `{"format":1,"layer":{"nodes":[{"op":"exp","in":[1]}]}}`,
		"eps":         `{"format":1,"eps":-1,"layer":{"nodes":[{"op":"exp","in":[0]}]}}`,
		"decay":       `{"format":1,"decay":3,"layer":{"nodes":[{"op":"exp","in":[0]}]}}`,
		"text":        `x`,
		"nothing":     ``,
		"too large":   `{"format":1,"formula":"` + strings.Repeat("x", 1<<20) + `","layer":{"nodes":[{"op":"exp","in":[0]}]}}`,
	} {
		bad := filepath.Join(dir, "bad.json")
		if err := os.WriteFile(bad, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := norm.ReadLayer(bad); err == nil || !strings.Contains(err.Error(), "bad.json") {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if _, err := norm.ReadLayer(filepath.Join(dir, "absent.json")); err == nil {
		t.Error("an absent file was read")
	}
	if err := norm.WriteLayer(path, norm.LayerGraph{}, norm.EvoOptions{}, nil); err == nil {
		t.Error("an empty layer was written")
	}
}

func FuzzLayerGraph(f *testing.F) {
	for _, name := range []string{"b0", "s0", "bn-silu"} {
		g, _ := norm.GraphOf(name)
		b, _ := json.Marshal(g)
		f.Add(b)
	}
	f.Add([]byte(`{"nodes":[{"op":"add","in":[0,9]}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var l norm.LayerGraph
		if json.Unmarshal(b, &l) != nil || len(l.Nodes) == 0 {
			return
		}
		if err := l.Check(); err != nil {
			t.Fatalf("a refused graph was read: %v", err)
		}
		if l.Prune().Check() != nil || l.Formula() == "" || l.Prune().Canonical() != l.Canonical() {
			t.Fatalf("%s", b)
		}
	})
}

// What is written as ONNX reads back as a network of standard operators that infers the same.
func TestLayersAreONNX(t *testing.T) {
	var every norm.LayerGraph // every primitive and index set
	if err := json.Unmarshal([]byte(`{"nodes":[
		{"op":"rms","in":[0],"I":"bwh"},{"op":"mean","in":[0],"I":"whc"},{"op":"std","in":[0],"I":"whc/g"},{"op":"mean","in":[5],"I":"whc/g"},
		{"op":"add","in":[4,6]},{"op":"div","in":[0,8]},{"op":"tanh","in":[9]},{"op":"log","in":[0]},{"op":"sqrt","in":[11]},
		{"op":"mul","in":[10,12]},{"op":"add","in":[13,7]},{"op":"square","in":[14]},{"op":"add","in":[15,3]},{"op":"max","in":[16,2]},
		{"op":"neg","in":[17]},{"op":"sigmoid","in":[18]},{"op":"exp","in":[19]},{"op":"abs","in":[20]},{"op":"std","in":[4],"I":"bwh"},
		{"op":"mul","in":[21,22]},{"op":"mean","in":[23],"I":"wh"},{"op":"mul","in":[24,1]},{"op":"add","in":[25,24]}]}`), &every); err != nil {
		t.Fatal(err)
	}
	layers := []nn.Norm{build(t, every, 2), build(t, graphOf(t, "bn-silu"), 2)}
	for _, l := range norm.EvoLayers() {
		layers = append(layers, norm.EvoNorm{Layer: l, Groups: 2})
	}
	for i, layer := range layers {
		for _, opset := range []int{17, 21} {
			net, err := zoo.MobileNet(zoo.MobileNetOptions{Size: 6, Stages: 2, Width: 4, Expansion: 2, NormAct: zoo.NormAct{Norm: layer}, Seed: 3})
			if err != nil {
				t.Fatal(err)
			}
			for p := range net.Params.All() { // running values and gains that matter
				if d := p.Data(); p.Role != nn.Weight {
					for k := range d {
						d[k] += .1 * float32(k%3)
					}
					if err := p.SetData(d); err != nil {
						t.Fatal(err)
					}
				}
			}
			path := filepath.Join(t.TempDir(), "net.onnx")
			if err := onnx.WriteFile(path, net, onnx.WriteOptions{Opset: opset}); err != nil {
				t.Fatalf("layer %d: %v", i, err)
			}
			back, err := onnx.ReadFile(path, onnx.Options{})
			if err != nil {
				t.Fatalf("layer %d: %v", i, err)
			}
			x := fixture.Tensor(nn.Float64s(evoMaps(21, 3, 6, 6, 1)), dtypes.Float32, 3, 6, 6, 1)
			a, err := net.Run(enginetest.Backend(), []*tensors.Tensor{x})
			if err != nil {
				t.Fatal(err)
			}
			b, err := back.Run(enginetest.Backend(), []*tensors.Tensor{x})
			if err != nil {
				t.Fatal(err)
			}
			if d := furthest(nn.Float64s(b[0]), nn.Float64s(a[0])); d > 1e-4 {
				t.Errorf("layer %d, opset %d: the ONNX file is off by %g", i, opset, d)
			}
		}
	}
}

package nn_test

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/fold"
	"github.com/lathe-ml/lathe/nn/zoo"
)

func f32(dims ...int) shapes.Shape { return shapes.Make(dtypes.Float32, dims...) }

func random(seed uint64, dims ...int) *tensors.Tensor {
	d := make([]float32, f32(dims...).Size())
	rng.Normal(rng.New(seed, "test"), d, 1)
	return tensors.FromFlatDataAndDimensions(d, dims...)
}

func build(t *testing.T, op nn.Op, in ...int) *nn.Network {
	t.Helper()
	b := nn.NewBuilder(1)
	x := b.Input("x", f32(in...))
	n, err := b.Finish(b.Add("op", op, x))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func run(t *testing.T, n *nn.Network, in ...*tensors.Tensor) []float64 {
	t.Helper()
	out, err := n.Run(enginetest.Backend(), in)
	if err != nil {
		t.Fatal(err)
	}
	return nn.Float64s(out[0])
}

func maxDiff(t *testing.T, a, b []float64) (d float64) {
	t.Helper()
	if len(a) != len(b) {
		t.Fatalf("%d values against %d", len(a), len(b))
	}
	for i := range a {
		d = max(d, math.Abs(a[i]-b[i]))
	}
	return d
}

// plainConv is the definition: a loop over outputs and taps.
func plainConv(d nn.Conv, x []float64, in []int, w, b []float64) []float64 {
	g := max(d.Groups, 1)
	h, wd, ci := in[1], in[2], in[3]
	oh := (h+d.Pad[0][0]+d.Pad[0][1]-(d.Kernel[0]-1)*d.Dilation[0]-1)/d.Stride[0] + 1
	ow := (wd+d.Pad[1][0]+d.Pad[1][1]-(d.Kernel[1]-1)*d.Dilation[1]-1)/d.Stride[1] + 1
	cg, og := ci/g, d.Out/g
	out := []float64{}
	for n := range in[0] {
		for y := range oh {
			for z := range ow {
				for o := range d.Out {
					s := b[o]
					for i := range d.Kernel[0] {
						for j := range d.Kernel[1] {
							yy, zz := y*d.Stride[0]+i*d.Dilation[0]-d.Pad[0][0], z*d.Stride[1]+j*d.Dilation[1]-d.Pad[1][0]
							if yy < 0 || zz < 0 || yy >= h || zz >= wd {
								continue
							}
							for c := range cg {
								s += x[((n*h+yy)*wd+zz)*ci+(o/og)*cg+c] * w[((o*d.Kernel[0]+i)*d.Kernel[1]+j)*cg+c]
							}
						}
					}
					out = append(out, s)
				}
			}
		}
	}
	return out
}

func TestConvMatchesItsDefinition(t *testing.T) {
	for _, c := range []struct {
		in   []int
		conv nn.Conv
	}{
		{[]int{2, 7, 6, 3}, nn.Conv{Out: 4, Kernel: []int{3, 3}, Stride: []int{1, 1}, Dilation: []int{1, 1}, Pad: [][2]int{{1, 1}, {1, 1}}}},
		{[]int{2, 7, 6, 3}, nn.Conv{Out: 4, Kernel: []int{1, 1}, Stride: []int{1, 1}, Dilation: []int{1, 1}, Pad: [][2]int{{0, 0}, {0, 0}}}},
		{[]int{1, 9, 8, 4}, nn.Conv{Out: 6, Kernel: []int{3, 2}, Stride: []int{2, 1}, Dilation: []int{1, 2}, Pad: [][2]int{{0, 1}, {2, 0}}, Groups: 2}},
		{[]int{2, 6, 6, 5}, nn.Conv{Out: 5, Kernel: []int{3, 3}, Stride: []int{2, 2}, Dilation: []int{1, 1}, Pad: [][2]int{{1, 1}, {1, 1}}, Groups: 5}},
		{[]int{1, 3, 3, 2}, nn.Conv{Out: 2, Kernel: []int{7, 7}, Stride: []int{1, 1}, Dilation: []int{1, 1}, Pad: [][2]int{{3, 3}, {3, 3}}, Groups: 2}},
	} {
		n := build(t, c.conv, c.in...)
		x := random(2, c.in...)
		n.Params.Get("op.b").SetData(nn.Floats(random(3, c.conv.Out)))
		want := plainConv(c.conv, nn.Float64s(x), c.in, nn.Float64s(n.Params.Get("op.w").Value), nn.Float64s(n.Params.Get("op.b").Value))
		if d := maxDiff(t, run(t, n, x), want); d > 1e-5 {
			t.Errorf("%v on %v: off by %g", c.conv, c.in, d)
		}
	}
}

// gradient of Σ op(x)·weights with respect to x and every trainable parameter, against central differences in float64.
func checkGradient(t *testing.T, n *nn.Network, x *tensors.Tensor, training, second bool) {
	t.Helper()
	names := []string{}
	for p := range n.Params.All() {
		names = append(names, p.Name)
	}
	loss := func(a []*graph.Node) *graph.Node {
		cur := map[string]*graph.Node{}
		for i, p := range names {
			cur[p] = a[i+1]
		}
		env := &nn.Env{G: a[0].Graph(), Training: training, DType: dtypes.Float64, SecondOrder: second, Param: func(s string) *graph.Node { return cur[s] }}
		y := n.Lower(env, map[string]*graph.Node{"x": a[0]})[0]
		return graph.ReduceAllSum(graph.Mul(y, graph.Sin(graph.AddScalar(graph.MulScalar(graph.Iota(y.Graph(), y.Shape(), y.Rank()-1), 1.7), .3))))
	}
	args := []*tensors.Tensor{toF64(x)}
	trained := []int{0}
	for i, p := range names {
		args = append(args, toF64(n.Params.Get(p).Value))
		if n.Params.Get(p).Trainable() {
			trained = append(trained, i+1)
		}
	}
	value, err := engine.NewExec(enginetest.Backend(), func(a []*graph.Node) []*graph.Node { return []*graph.Node{loss(a)} })
	if err != nil {
		t.Fatal(err)
	}
	grads, err := engine.NewExec(enginetest.Backend(), func(a []*graph.Node) []*graph.Node {
		var w []*graph.Node
		for _, i := range trained {
			w = append(w, a[i])
		}
		return graph.Gradient(loss(a), w...)
	})
	if err != nil {
		t.Fatal(err)
	}
	call := func(e *engine.Exec) []*tensors.Tensor {
		in := make([]any, len(args))
		for i, a := range args {
			in[i] = a
		}
		out, err := e.Call(in...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	for k, g := range call(grads) {
		i := trained[k]
		d := nn.Float64s(args[i])
		dims := args[i].Shape().Dimensions
		for _, j := range []int{0, len(d) / 2, len(d) - 1} {
			const h = 1e-5
			at := func(v float64) float64 {
				e := slices.Clone(d)
				e[j] = v
				old := args[i]
				args[i] = tensors.FromFlatDataAndDimensions(e, dims...)
				f := nn.Float64s(call(value)[0])[0]
				args[i] = old
				return f
			}
			num := (at(d[j]+h) - at(d[j]-h)) / (2 * h)
			if got := nn.Float64s(g)[j]; math.Abs(got-num) > 1e-5*max(1, math.Abs(num)) {
				t.Errorf("argument %d[%d]: gradient %g, finite difference %g", i, j, got, num)
			}
		}
	}
}

func toF64(x *tensors.Tensor) *tensors.Tensor {
	return tensors.FromFlatDataAndDimensions(nn.Float64s(x), x.Shape().Dimensions...)
}

func TestGradientsMatchFiniteDifferences(t *testing.T) {
	img := []int{2, 6, 6, 4}
	for name, c := range map[string]struct {
		op       nn.Op
		in       []int
		training bool
	}{
		"layernorm":      {nn.LayerNorm{}, []int{3, 5}, true},
		"layernorm map":  {nn.LayerNorm{Axes: []int{1, 2, 3}}, img, true},
		"rmsnorm":        {nn.RMSNorm{}, []int{3, 5}, true},
		"groupnorm":      {nn.GroupNorm{Groups: 2}, img, true},
		"batchnorm":      {nn.BatchNorm{}, img, true},
		"batchnorm eval": {nn.BatchNorm{}, img, false},
		"dense":          {nn.Dense{Out: 3}, []int{2, 4, 5}, true},
		"conv":           {nn.Conv{Out: 4, Kernel: []int{3, 3}, Pad: [][2]int{{1, 1}, {1, 0}}, Stride: []int{2, 1}, Groups: 2}, img, true},
		"depthwise":      {nn.Conv{Out: 4, Kernel: []int{3, 3}, Groups: 4}, img, true},
		"maxpool":        {nn.Pool{Max: true, Kernel: []int{3, 3}, Stride: []int{2, 2}, Pad: [][2]int{{1, 1}, {1, 1}}}, img, true},
		"avgpool":        {nn.Pool{Kernel: []int{3, 3}, Stride: []int{1, 1}, Pad: [][2]int{{1, 1}, {1, 1}}}, img, true},
		"softmax":        {nn.Softmax{}, []int{3, 5}, true},
		"gelu":           {nn.GELU{}, []int{3, 5}, true},
		"gelu tanh":      {nn.GELU{Tanh: true}, []int{3, 5}, true},
		"silu":           {nn.SiLU, []int{3, 5}, true},
		"softplus":       {nn.Unary{Fn: "Softplus"}, []int{3, 5}, true},
		"prelu":          {nn.PReLU{}, []int{3, 5}, true},
		"reflect":        {nn.Pad{Pads: [][2]int{{0, 0}, {2, 3}}, Mode: nn.PadReflect}, []int{3, 5}, true},
	} {
		for _, second := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s second=%v", name, second), func(t *testing.T) {
				checkGradient(t, build(t, c.op, c.in...), random(4, c.in...), c.training, second)
			})
		}
	}
}

func TestBatchNormRunsAsPyTorchDoes(t *testing.T) {
	n := build(t, nn.BatchNorm{}, 4, 2)
	x := tensors.FromValue([][]float32{{1, 10}, {2, 20}, {3, 30}, {6, 40}})
	e, err := engine.NewExec(enginetest.Backend(), func(a []*graph.Node) []*graph.Node {
		cur := map[string]*graph.Node{"op.w": a[1], "op.b": a[2], "op.mean": a[3], "op.var": a[4]}
		env := &nn.Env{G: a[0].Graph(), Training: true, Param: func(s string) *graph.Node { return cur[s] }, Update: func(s string, v *graph.Node) { cur[s] = v }}
		y := n.Lower(env, map[string]*graph.Node{"x": a[0]})[0]
		return []*graph.Node{y, cur["op.mean"], cur["op.var"]}
	})
	if err != nil {
		t.Fatal(err)
	}
	out, err := e.Call(x, []float32{1, 1}, []float32{0, 0}, []float32{0, 0}, []float32{1, 1})
	if err != nil {
		t.Fatal(err)
	}
	// Means 3 and 25; unbiased variances 14/3 and 500/3; running = 0.9·old + 0.1·new.
	for i, want := range [][]float64{nil, {.3, 2.5}, {.9 + 1.4/3, .9 + 50./3}} {
		if want != nil && maxDiff(t, nn.Float64s(out[i]), want) > 1e-5 {
			t.Errorf("state %d: got %v, want %v", i, nn.Float64s(out[i]), want)
		}
	}
	if y := nn.Float64s(out[0])[0]; math.Abs(y-(-2/math.Sqrt(3.5+1e-5))) > 1e-6 {
		t.Errorf("y[0] = %g", y)
	}
}

func TestErrorsNameTheNode(t *testing.T) {
	for name, f := range map[string]func(b *nn.Builder, x string) string{
		"conv of a matrix":   func(b *nn.Builder, x string) string { return b.Add("q", nn.Conv2D(3, 3, 1), x) },
		"residual of shapes": func(b *nn.Builder, x string) string { return b.Add("q", nn.Add, x, b.Add("p", nn.Dense{Out: 5}, x)) },
		"unknown input":      func(b *nn.Builder, x string) string { return b.Add("q", nn.ReLU, "nowhere") },
		"dead reshape":       func(b *nn.Builder, x string) string { return b.Add("q", nn.Reshape{Dims: []int{0, 3, 3}}, x) },
		"norm axis":          func(b *nn.Builder, x string) string { return b.Add("q", nn.LayerNorm{Axes: []int{1, -1}}, x) },
		"far axis":           func(b *nn.Builder, x string) string { return b.Add("q", nn.LayerNorm{Axes: []int{7}}, x) },
		"transpose":          func(b *nn.Builder, x string) string { return b.Add("q", nn.Transpose{Perm: []int{0, 2, 1}}, x) },
		"no outputs":         func(b *nn.Builder, x string) string { return b.Add("q", nn.Dense{}, x) },
		"slice axis":         func(b *nn.Builder, x string) string { return b.Add("q", nn.Slice{Axis: 4, To: 1}, x) },
	} {
		b := nn.NewBuilder(1)
		y := ""
		b.In("blk.0", func() { y = f(b, b.Input("x", f32(2, 16))) })
		_, err := b.Finish(y)
		if err == nil || !strings.Contains(err.Error(), `"blk.0.q"`) || strings.Contains(err.Error(), "runtime error") {
			t.Errorf("%s: error does not name the node: %v", name, err)
		}
	}
}

func TestNormRefusesOneElementAndIntegers(t *testing.T) {
	b := nn.NewBuilder(1)
	b.Add("n", nn.LayerNorm{}, b.Input("x", f32(4, 1)))
	if b.Err() == nil {
		t.Error("layer norm over one element was accepted")
	}
	b = nn.NewBuilder(1)
	b.Add("n", nn.RMSNorm{}, b.Input("x", f32(4, 1)))
	if b.Err() != nil {
		t.Errorf("RMS norm over one element: %v", b.Err())
	}
	b = nn.NewBuilder(1)
	b.Add("n", nn.LayerNorm{}, b.Input("x", shapes.Make(dtypes.Int32, 4, 3)))
	if b.Err() == nil {
		t.Error("layer norm of integers was accepted")
	}
}

func vit(t *testing.T) *nn.Network {
	t.Helper()
	n, err := zoo.ViT(zoo.ViTOptions{Dim: 32, Depth: 2, Heads: 2, Seed: 3})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// halved stores a weight as half of it.
type halved struct{}

func (halved) Kind() string                   { return "halved" }
func (halved) Specs(w shapes.Shape) []nn.Spec { return []nn.Spec{{Name: "half", Shape: w}} }
func (halved) Value(c *nn.Ctx) *graph.Node    { return graph.MulScalar(c.P("half"), 2) }

func TestSubstituteAndRestore(t *testing.T) {
	n := vit(t)
	x := random(1, 3, 28, 28, 1)
	want := run(t, n, x)
	site := "blk.1.attn.q"
	w := n.Param(n.Node(site), "w")
	half := w.Data()
	for i := range half {
		half[i] /= 2
	}
	names := slices.Collect(paramNames(n))
	restore, err := n.Substitute(site, halved{}, map[string]*tensors.Tensor{"half": tensors.FromFlatDataAndDimensions(half, w.Value.Shape().Dimensions...)})
	if err != nil {
		t.Fatal(err)
	}
	if maxDiff(t, run(t, n, x), want) != 0 {
		t.Error("the halved weight computes something else")
	}
	for i := range half {
		half[i] = 0
	}
	n.SetParam(n.Node(site), "half", nn.Constant, half, w.Value.Shape().Dimensions...)
	if maxDiff(t, run(t, n, x), want) == 0 {
		t.Error("a zeroed weight changes nothing")
	}
	restore()
	if maxDiff(t, run(t, n, x), want) != 0 || !slices.Equal(names, slices.Collect(paramNames(n))) {
		t.Error("restore is not exact")
	}
	if _, err := n.Substitute("blk.1.act", halved{}, nil); err == nil {
		t.Error("an activation was taken for a site")
	}
}

func paramNames(n *nn.Network) func(func(string) bool) {
	return func(yield func(string) bool) {
		for p := range n.Params.All() {
			if !yield(p.Name) {
				return
			}
		}
	}
}

func TestOverrideAndTap(t *testing.T) {
	n := vit(t)
	x := random(1, 2, 28, 28, 1)
	out, err := n.Run(enginetest.Backend(), []*tensors.Tensor{x}, "blk.0.attn.probs", "norm")
	if err != nil {
		t.Fatal(err)
	}
	if got := out[1].Shape().Dimensions; !slices.Equal(got, []int{2, 2, 17, 17}) {
		t.Errorf("probabilities are %v", got)
	}
	r, err := nn.NewRunner(enginetest.Backend(), n, nn.RunOptions{Override: []string{"blk.1.res2"}, Taps: []string{"norm"}})
	if err != nil {
		t.Fatal(err)
	}
	o2, err := r.Run(x, random(7, 2, 17, 32))
	if err != nil {
		t.Fatal(err)
	}
	if maxDiff(t, nn.Float64s(o2[1]), nn.Float64s(out[2])) == 0 {
		t.Error("overriding the last residual changes nothing")
	}
	if _, err := n.Run(enginetest.Backend(), []*tensors.Tensor{x}, "nowhere"); err == nil {
		t.Error("a tap on an unknown value was accepted")
	}
}

func TestFoldBatchNormKeepsTheFunction(t *testing.T) {
	n, err := zoo.ResNet(zoo.ResNetOptions{Seed: 2})
	if err != nil {
		t.Fatal(err)
	}
	for p := range n.Params.All() { // statistics as after training
		if p.Role == nn.State || p.Role == nn.Gain || p.Role == nn.Bias {
			d := p.Data()
			r := rng.New(5, p.Name)
			for i := range d {
				d[i] = float32(.5 + r.Float64())
			}
			p.SetData(d)
		}
	}
	x := random(1, 2, 28, 28, 1)
	want, err := n.Run(enginetest.Backend(), []*tensors.Tensor{x}, "stage.1.0.conv1.norm")
	if err != nil {
		t.Fatal(err)
	}
	before := n.Params.Count()
	folded, err := fold.BatchNorm(n)
	if err != nil || len(folded) != 9 {
		t.Fatalf("folded %d norms (%v)", len(folded), err)
	}
	if err := n.Check(); err != nil {
		t.Fatal(err)
	}
	got, err := n.Run(enginetest.Backend(), []*tensors.Tensor{x}, "stage.1.0.conv1.norm")
	if err != nil {
		t.Fatal(err)
	}
	for i := range want {
		w := nn.Float64s(want[i])
		if d := maxDiff(t, nn.Float64s(got[i]), w); d > 1e-4*max(1, math.Abs(slices.Max(w))) {
			t.Errorf("output %d differs by %g", i, d)
		}
	}
	if n.Params.Count() >= before {
		t.Error("folding removed no parameters")
	}
}

func TestFoldNormAffineKeepsTheFunction(t *testing.T) {
	n := vit(t)
	for p := range n.Params.All() {
		if strings.Contains(p.Name, "norm") {
			p.SetData(nn.Floats(random(8, p.Value.Shape().Dimensions...)))
		}
	}
	x := random(1, 2, 28, 28, 1)
	want := run(t, n, x)
	folded, err := fold.NormAffine(n)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(folded, []string{"blk.0.norm1", "blk.0.norm2", "blk.1.norm1", "blk.1.norm2"}) {
		t.Errorf("folded %v; the final norm feeds a slice and must stay", folded)
	}
	if d := maxDiff(t, run(t, n, x), want); d > 1e-4 {
		t.Errorf("output differs by %g", d)
	}
}

// An op in front of another one must not shift the dropout of any.
func TestInsertedNodeShiftsNoRandomness(t *testing.T) {
	n, err := zoo.ViT(zoo.ViTOptions{Dim: 32, Depth: 1, Heads: 2, Dropout: .5, Seed: 3})
	if err != nil {
		t.Fatal(err)
	}
	x := random(1, 2, 28, 28, 1)
	eval := func() []float64 {
		names := slices.Collect(paramNames(n))
		e, err := engine.NewExec(enginetest.Backend(), func(a []*graph.Node) []*graph.Node {
			cur := map[string]*graph.Node{}
			for i, p := range names {
				cur[p] = a[i+1]
			}
			env := &nn.Env{G: a[0].Graph(), Training: true, RNG: graph.RNGStateFromSeedForGraph(a[0].Graph(), 7), Param: func(s string) *graph.Node { return cur[s] }}
			return n.Lower(env, map[string]*graph.Node{"image": a[0]})
		})
		if err != nil {
			t.Fatal(err)
		}
		args := []any{x}
		for _, p := range names {
			args = append(args, n.Params.Get(p).Value)
		}
		out, err := e.Call(args...)
		if err != nil {
			t.Fatal(err)
		}
		return nn.Float64s(out[0])
	}
	plain := run(t, n, x)
	want := eval()
	if maxDiff(t, plain, want) == 0 {
		t.Fatal("dropout does nothing")
	}
	if _, err := n.InsertBefore("blk.0.fc1", 0, "blk.0.fc1.drop", nn.Dropout{}); err != nil {
		t.Fatal(err)
	}
	if _, err := n.InsertBefore("blk.0.fc1", 0, "blk.0.fc1.pass", nn.Unary{Fn: "Identity"}); err != nil {
		t.Fatal(err)
	}
	if maxDiff(t, eval(), want) != 0 {
		t.Error("inserted nodes changed the draws of others")
	}
}

func TestNetworkRunsAtAnyBatch(t *testing.T) {
	n := vit(t)
	x := random(1, 5, 28, 28, 1)
	all := run(t, n, x)
	for i := range 5 {
		one := tensors.FromFlatDataAndDimensions(nn.Floats(x)[i*784:(i+1)*784], 1, 28, 28, 1)
		if d := maxDiff(t, run(t, n, one), all[i*10:(i+1)*10]); d > 1e-5 {
			t.Errorf("case %d alone differs by %g", i, d)
		}
	}
}

func TestReinitEqualsAFreshBuild(t *testing.T) {
	a, err := zoo.ResNet(zoo.ResNetOptions{Seed: 11})
	if err != nil {
		t.Fatal(err)
	}
	b, err := zoo.ResNet(zoo.ResNetOptions{Seed: 12})
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Reinit(12); err != nil {
		t.Fatal(err)
	}
	for p := range a.Params.All() {
		if !slices.Equal(p.Data(), b.Params.Get(p.Name).Data()) {
			t.Errorf("%s differs", p.Name)
		}
	}
}

func TestCost(t *testing.T) {
	n, err := zoo.ResNet(zoo.ResNetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	c, err := n.Cost(1)
	if err != nil {
		t.Fatal(err)
	}
	if want := int64(14 * 14 * 16 * 9); c.ByNode["stem"] != want {
		t.Errorf("stem: %d multiply-adds, want %d", c.ByNode["stem"], want)
	}
	sum := int64(0)
	for _, v := range maps.All(c.ByNode) {
		sum += v
	}
	if sum != c.MACs || c.Params < 77_000 || c.Params > 79_000 {
		t.Errorf("%d of %d multiply-adds, %d parameters", sum, c.MACs, c.Params)
	}
}

// vᵀHv by reverse over reverse against a central difference of the gradient, in float64.
func TestSecondDerivatives(t *testing.T) {
	smooth, err := zoo.ResNet(zoo.ResNetOptions{Size: 16, Width: 4, Seed: 1})
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range smooth.Nodes {
		if x.Op == nn.ReLU {
			x.Op = nn.GELU{} // the difference quotient needs a smooth function
		}
	}
	v, err := zoo.ViT(zoo.ViTOptions{Size: 16, Patch: 8, Dim: 16, Depth: 1, Heads: 2, Seed: 1})
	if err != nil {
		t.Fatal(err)
	}
	for name, n := range map[string]*nn.Network{"resnet": smooth, "vit": v} {
		t.Run(name, func(t *testing.T) {
			x := random(2, 4, 16, 16, 1)
			labels := tensors.FromValue([]int32{0, 3, 5, 9})
			params := slices.Collect(n.Params.All())
			directional := func(twice bool) func(shift float64) float64 {
				e, err := engine.NewExec(enginetest.Backend(), func(a []*graph.Node) []*graph.Node {
					cur := map[string]*graph.Node{}
					var w, dir []*graph.Node
					for i, p := range params {
						q := graph.ConvertDType(a[i+3], dtypes.Float64)
						if p.Trainable() {
							d := graph.Sin(graph.MulScalar(graph.Iota(q.Graph(), q.Shape(), q.Rank()-1), 1.3))
							q = graph.Add(q, graph.Mul(a[0], d))
							w, dir = append(w, q), append(dir, d)
						}
						cur[p.Name] = q
					}
					env := &nn.Env{G: a[0].Graph(), Training: true, DType: dtypes.Float64, SecondOrder: true, Param: func(s string) *graph.Node { return cur[s] }}
					logits := n.Lower(env, map[string]*graph.Node{"image": a[1]})[0]
					loss := graph.Neg(graph.ReduceAllMean(graph.ReduceSum(graph.Mul(nn.LogSoftmaxOf(logits, -1), graph.OneHot(a[2], 10, dtypes.Float64)), -1)))
					along := func(f *graph.Node) *graph.Node {
						sum := graph.ScalarZero(f.Graph(), dtypes.Float64)
						for i, g := range graph.Gradient(f, w...) {
							sum = graph.Add(sum, graph.ReduceAllSum(graph.Mul(g, dir[i])))
						}
						return sum
					}
					if g := along(loss); !twice {
						return []*graph.Node{g}
					} else {
						return []*graph.Node{along(g)}
					}
				})
				if err != nil {
					t.Fatal(err)
				}
				return func(shift float64) float64 {
					args := []any{shift, x, labels}
					for _, p := range params {
						args = append(args, p.Value)
					}
					out, err := e.Call(args...)
					if err != nil {
						t.Fatal(err)
					}
					return nn.Float64s(out[0])[0]
				}
			}
			g := directional(false)
			const h = 1e-5
			num, got := (g(h)-g(-h))/(2*h), directional(true)(0)
			if math.Abs(got-num) > 1e-4*max(1, math.Abs(num)) {
				t.Errorf("vHv %g, difference quotient %g", got, num)
			}
		})
	}
}

package norm_test

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/design/norm"
	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/internal/fixture"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// only is a scheme whose single layer has the number of another.
type only struct {
	scheme    zoo.Scheme
	l, layers int
}

func (o only) Plan(int, int) zoo.Plan { return o.scheme.Plan(o.l, o.layers) }

// stack builds decoder layers over a stream "x" with a fixture's weights, [L, out, in] or [out, in] for one layer.
func stack(t *testing.T, c *fixture.Case, scheme zoo.Scheme, layers int, final bool) *nn.Network {
	t.Helper()
	x := c.Inputs["x"].Shape
	o := zoo.DecoderOptions{
		Dim: x[2], Depth: layers, Heads: c.Params["heads"].Int(), MLP: c.Inputs["Wg"].Shape[len(c.Inputs["Wg"].Shape)-2],
		Norm: nn.RMSNorm{Eps: c.Params["eps"].Float()}, Scheme: scheme, Base: c.Params["rope_base"].Float(),
	}
	b := nn.NewBuilder(0)
	y := zoo.DecoderLayers(b, b.Input("x", shapes.Make(dtypes.Float32, x...)), o)
	if final {
		y = b.Add("norm", o.Norm, y)
	}
	net, err := b.Finish(y)
	if err != nil {
		t.Fatal(err)
	}
	set := func(param string, data []float64) {
		v := make([]float32, len(data))
		for i, x := range data {
			v[i] = float32(x)
		}
		if err := net.Params.Get(param).SetData(v); err != nil {
			t.Fatal(err)
		}
	}
	for input, param := range map[string]string{
		"Wq": "attn.q.w", "Wk": "attn.k.w", "Wv": "attn.v.w", "Wo": "attn.o.w", "Wg": "gate.w", "Wu": "up.w", "Wd": "down.w", "n1": "norm1.w", "n2": "norm2.w",
	} {
		v := c.Inputs[input].Floats()
		for l := range layers {
			set(fmt.Sprintf("blk.%d.%s", l, param), v[l*len(v)/layers:(l+1)*len(v)/layers])
		}
	}
	if final {
		set("norm.w", c.Inputs["final_gain"].Floats())
	}
	return net
}

// runTaps evaluates a network in float64 on a fixture's x: outputs, then taps.
func runTaps(t *testing.T, net *nn.Network, x *tensors.Tensor, taps ...string) []*tensors.Tensor {
	t.Helper()
	r, err := nn.NewRunner(enginetest.Backend(), net, nn.RunOptions{DType: dtypes.Float64, Taps: taps})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Finalize()
	out, err := r.Run(x)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func stackOf(t *testing.T, net *nn.Network) *norm.Stack {
	t.Helper()
	s, err := norm.StackOf(net)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// joined puts values of one shape under each other along a new first axis.
func joined(values []*tensors.Tensor) *tensors.Tensor {
	var all []float64
	for _, v := range values {
		all = append(all, nn.Float64s(v)...)
	}
	return tensors.FromFlatDataAndDimensions(all, append([]int{len(values)}, values[0].Shape().Dimensions...)...)
}

func TestFixturesMixLN(t *testing.T) {
	fixture.Run(t, 29, map[string]fixture.Func{
		"mix_stack": func(t *testing.T, c *fixture.Case) map[string]any {
			layers := c.Params["layers"].Int()
			net := stack(t, c, norm.MixLN{Alpha: c.Params["alpha"].Float()}, layers, true)
			s := stackOf(t, net)
			out := runTaps(t, net, c.Inputs["x"].Tensor(dtypes.Float64), s.Stream...)
			var names []string
			args := []any{c.Inputs["x"].Tensor(dtypes.Float64), c.Inputs["dy"].Tensor(dtypes.Float64)}
			for p := range net.Params.All() {
				names = append(names, p.Name)
				args = append(args, tensors.FromFlatDataAndDimensions(nn.Float64s(p.Value), p.Value.Shape().Dimensions...))
			}
			grads := call(t, func(in []*graph.Node) []*graph.Node {
				cur := map[string]*graph.Node{}
				for i, n := range names {
					cur[n] = in[2+i]
				}
				env := &nn.Env{G: in[0].Graph(), DType: dtypes.Float64, Training: true, Param: func(s string) *graph.Node { return cur[s] }}
				y := net.Lower(env, map[string]*graph.Node{"x": in[0]})[0]
				g := graph.Gradient(graph.ReduceAllSum(graph.Mul(y, in[1])), append([]*graph.Node{in[0]}, in[2:]...)...)
				by := map[string]*graph.Node{}
				for i, n := range names {
					by[n] = g[1+i]
				}
				all, matrices := learn.GradientNorms{Group: norm.LayerGroup}.Observe(by, nil), learn.GradientNorms{Group: norm.MatrixGroup}.Observe(by, nil)
				res := []*graph.Node{g[0]}
				for _, m := range []map[string]*graph.Node{all, matrices} {
					for l := range layers {
						res = append(res, m[fmt.Sprint(l+1)])
					}
				}
				return res
			}, args...)
			norms := func(from int) (v []float64) {
				for _, g := range grads[from : from+layers] {
					v = append(v, nn.Float64s(g)[0])
				}
				return v
			}
			return map[string]any{"hidden": joined(out[1:]), "y": out[0], "dx": grads[0], "grad_norm_all": norms(1), "grad_norm_matrices": norms(1 + layers)}
		},
		"mix_plan": func(_ *testing.T, c *fixture.Case) map[string]any {
			var post []int
			alpha := c.Inputs["alpha"].Floats()
			for i, l := range c.Inputs["layers"].Ints() {
				post = append(post, norm.MixLN{Alpha: alpha[i]}.PostLayers(l))
			}
			return map[string]any{"post_layers": post}
		},
	})
}

func TestFixturesLayerNormScaling(t *testing.T) {
	scheme := func(c *fixture.Case) zoo.Scheme {
		if c.Params["kind"].String() == "lns" {
			return norm.LayerNormScaling{}
		}
		return norm.Pre{}
	}
	fixture.Run(t, 3, map[string]fixture.Func{
		"block": func(t *testing.T, c *fixture.Case) map[string]any {
			l := c.Params["layer"].Int()
			net := stack(t, c, only{scheme(c), l, l}, 1, false)
			return map[string]any{"y": runTaps(t, net, c.Inputs["x"].Tensor(dtypes.Float64))[0]}
		},
		"stack_diagnostics": func(t *testing.T, c *fixture.Case) map[string]any {
			layers := c.Params["layers"].Int()
			x := c.Inputs["x"].Tensor(dtypes.Float64)
			net := stack(t, c, scheme(c), layers, false)
			s := stackOf(t, net)
			out := runTaps(t, net, x, s.Stream...)[1:]
			dims := out[0].Shape().Dimensions
			width, time := dims[2], dims[1]
			var variance, removal []float64
			last := func(l, i int) []float32 {
				at := (i*time + time - 1) * width
				return nn.Floats(out[l])[at : at+width]
			}
			for l := range out {
				v, err := norm.MeanVariance(nn.Floats(out[l]), width)
				if err != nil {
					t.Fatal(err)
				}
				variance = append(variance, v)
			}
			angular := func(n int) (d []float64) {
				for l := range layers + 1 - n {
					sum := 0.
					for i := range dims[0] {
						sum += norm.AngularDistance(last(l, i), last(l+n, i)) / float64(dims[0])
					}
					d = append(d, sum)
				}
				return d
			}
			want := nn.Float64s(out[layers])
			for l := 1; l <= layers; l++ {
				without, err := s.RemoveLayers(l)
				if err != nil {
					t.Fatal(err)
				}
				sum := 0.
				for i, v := range nn.Float64s(runTaps(t, without, x)[0]) {
					sum += (v - want[i]) * (v - want[i]) / float64(len(want))
				}
				removal = append(removal, sum)
			}
			return map[string]any{"hidden": joined(out), "variance": variance, "angular_n1": angular(1), "angular_n3": angular(3), "removal_mse": removal}
		},
		"lns_factor": func(_ *testing.T, c *fixture.Case) map[string]any {
			var f []float64
			for _, l := range c.Inputs["layer"].Ints() {
				f = append(f, norm.LayerNormScaling{}.Factor(l, 100))
			}
			return map[string]any{"factor": f}
		},
	})
}

func decoder(t *testing.T, scheme zoo.Scheme, layers int) *nn.Network {
	t.Helper()
	net, err := zoo.Decoder(zoo.DecoderOptions{Symbols: 11, Context: 6, Dim: 16, Depth: layers, Heads: 2, MLP: 24, Scheme: scheme, Seed: 4})
	if err != nil {
		t.Fatal(err)
	}
	return net
}

var someTokens = tensors.FromFlatDataAndDimensions([]int32{1, 2, 3, 4, 5, 6, 10, 9, 8, 7, 0, 1}, 2, 6)

func logitsOf(t *testing.T, net *nn.Network) []float64 {
	t.Helper()
	return nn.Float64s(runTaps(t, net, someTokens)[0])
}

func close64(a, b []float64, tol float64) bool {
	return len(a) == len(b) && !slices.ContainsFunc(a, math.IsNaN) && func() bool {
		for i := range a {
			if math.Abs(a[i]-b[i]) > tol*math.Max(1, math.Abs(b[i])) {
				return false
			}
		}
		return true
	}()
}

func TestSchemesMeetAtTheirEnds(t *testing.T) {
	for _, c := range []struct {
		name string
		a, b zoo.Scheme
		l    int
		same bool
	}{
		{"mix(0) is pre", norm.MixLN{}, norm.Pre{}, 4, true},
		{"mix(1) is post", norm.MixLN{Alpha: 1}, norm.Post{}, 4, true},
		{"mix(0.5) is neither", norm.MixLN{Alpha: .5}, norm.Post{}, 4, false},
		{"prepost(4) is pre", norm.PrePost{K: 4}, norm.Pre{}, 4, true},
		{"prepost(2) is not mix", norm.PrePost{K: 2}, norm.MixLN{Alpha: .5}, 4, false},
		{"one scaled layer is pre", norm.LayerNormScaling{}, norm.Pre{}, 1, true},
		{"two scaled layers are not", norm.LayerNormScaling{}, norm.Pre{}, 2, false},
		{"sandwich is not pre", norm.Sandwich{}, norm.Pre{}, 2, false},
	} {
		if got := slices.Equal(logitsOf(t, decoder(t, c.a, c.l)), logitsOf(t, decoder(t, c.b, c.l))); got != c.same {
			t.Errorf("%s: bit for bit %v", c.name, got)
		}
	}
}

func TestParameterCountDoesNotDependOnAlpha(t *testing.T) {
	want := decoder(t, norm.Pre{}, 8).Params.Count()
	for _, alpha := range []float64{0, .25, .5, 1} {
		if n := decoder(t, norm.MixLN{Alpha: alpha}, 8).Params.Count(); n != want {
			t.Errorf("alpha %g: %d parameters, want %d", alpha, n, want)
		}
	}
}

func TestPostLayersHaveUnitSquare(t *testing.T) {
	net := decoder(t, norm.MixLN{Alpha: .5}, 4)
	s := stackOf(t, net)
	out := runTaps(t, net, someTokens, s.Stream...)[1:]
	square := func(l int) (lo, hi float64) {
		lo, hi = math.Inf(1), 0
		v := nn.Float64s(out[l])
		for at := 0; at < len(v); at += 16 {
			sum := 0.
			for _, x := range v[at : at+16] {
				sum += x * x / 16
			}
			lo, hi = min(lo, sum), max(hi, sum)
		}
		return lo, hi
	}
	for l := 1; l <= 2; l++ {
		if lo, hi := square(l); lo < 1-1e-4 || hi > 1+1e-4 {
			t.Errorf("after post-norm layer %d the mean square of a token is %g to %g, want 1", l, lo, hi)
		}
	}
	if _, hi := square(4); hi < 1.01 {
		t.Errorf("after the pre-norm layers the mean square is at most %g; it should have grown", hi)
	}
}

func TestScaledNormHasMeanSquareOneOverLayer(t *testing.T) {
	net := decoder(t, norm.LayerNormScaling{}, 5)
	for l := 1; l <= 5; l++ {
		tap := fmt.Sprintf("blk.%d.scale2", l-1)
		if l == 1 {
			tap = "blk.0.norm2"
		}
		v := nn.Float64s(runTaps(t, net, someTokens, tap)[1])
		for at := 0; at < len(v); at += 16 {
			sum := 0.
			for _, x := range v[at : at+16] {
				sum += x * x / 16
			}
			if math.Abs(sum*float64(l)-1) > 1e-4 {
				t.Fatalf("layer %d: mean square %g, want 1/%d", l, sum, l)
			}
		}
	}
}

// TestVarianceOfOrthogonalBranches: with branches that are independent orthogonal maps of their normalised input, the
// stream's variance grows by 2 a layer in pre-norm, and by 2/l with scaled norms.
func TestVarianceOfOrthogonalBranches(t *testing.T) {
	const width, layers = 256, 12
	for name, c := range map[string]struct {
		scheme zoo.Scheme
		grow   func(l int) float64
	}{
		"pre": {norm.Pre{}, func(int) float64 { return 2 }},
		"lns": {norm.LayerNormScaling{}, func(l int) float64 { return 2 / float64(l) }},
	} {
		b := nn.NewBuilder(7)
		x := b.Input("x", shapes.Make(dtypes.Float32, 4, 8, width))
		want := 1.
		for l := 1; l <= layers; l++ {
			b.In(fmt.Sprintf("blk.%d", l-1), func() {
				for n := 1; n <= 2; n++ {
					x = zoo.Residual(b, c.scheme.Plan(l, layers), nn.RMSNorm{}, n, x, func(h string) string {
						return b.Add(fmt.Sprint("map", n), nn.Dense{Out: width, NoBias: true, W: nn.Plain{Init: nn.OrthogonalBlocks(width, width)}}, h)
					})
				}
			})
			want += c.grow(l)
		}
		net, err := b.Finish(x)
		if err != nil {
			t.Fatal(err)
		}
		in := make([]float32, 4*8*width)
		rng.Normal(rng.New(1, "x"), in, 1)
		got, err := norm.MeanVariance(nn.Floats(runTaps(t, net, tensors.FromFlatDataAndDimensions(in, 4, 8, width))[0]), width)
		if err != nil || math.Abs(got/want-1) > .1 {
			t.Errorf("%s: variance %g after %d layers, want about %g (%v)", name, got, layers, want, err)
		}
	}
}

func TestFoldScaleKeepsTheFunction(t *testing.T) {
	net := decoder(t, norm.LayerNormScaling{}, 4)
	want := logitsOf(t, net)
	folded := net.Clone()
	if err := norm.FoldScale(folded); err != nil {
		t.Fatal(err)
	}
	if got := logitsOf(t, folded); !close64(got, want, 1e-6) {
		t.Error("folding changed the logits")
	}
	if n := len(folded.Nodes) - len(decoder(t, norm.Pre{}, 4).Nodes); n != 0 {
		t.Errorf("%d more nodes than a plain pre-norm network", n)
	}
	if err := norm.FoldScale(folded); err == nil {
		t.Error("folded twice")
	}
	if err := norm.FoldScale(decoder(t, norm.Post{}, 2)); err == nil {
		t.Error("a post-norm network was folded")
	}
}

func TestLayersCanBeRemoved(t *testing.T) {
	s := stackOf(t, decoder(t, norm.LayerNormScaling{}, 4))
	two, err := s.RemoveLayers(2, 3)
	if err != nil {
		t.Fatal(err)
	}
	left := stackOf(t, two)
	if left.Layers() != 2 || left.Scopes[1] != "blk.3." {
		t.Errorf("left over: %v", left.Scopes)
	}
	if op := two.Node("blk.3.scale1").Op.(nn.Affine); op.Scale != .5 {
		t.Errorf("layer 4 is scaled by %g, want its original 1/2", op.Scale)
	}
	for p := range two.Params.All() {
		if g := norm.LayerGroup(p.Name); g == "2" || g == "3" {
			t.Errorf("parameter %s of a removed layer is still there", p.Name)
		}
	}
	for _, bad := range [][]int{{0}, {5}, {1, 2, 3, 4}} {
		if _, err := s.RemoveLayers(bad...); err == nil {
			t.Errorf("removed %v", bad)
		}
	}
	one := stackOf(t, decoder(t, norm.Pre{}, 1))
	if _, err := one.RemoveLayers(1); err == nil {
		t.Error("the only layer was removed")
	}
}

func TestAngularDistance(t *testing.T) {
	for _, c := range []struct {
		a, b []float32
		want float64
	}{
		{[]float32{1, 2}, []float32{2, 4}, 0},
		{[]float32{1, 0}, []float32{0, 3}, .5},
		{[]float32{1, -1}, []float32{-2, 2}, 1},
		{[]float32{0, 0}, []float32{1, 2}, .5},
	} {
		if got := norm.AngularDistance(c.a, c.b); math.Abs(got-c.want) > 1e-3 {
			t.Errorf("%v and %v: %g, want %g", c.a, c.b, got, c.want)
		}
	}
}

func TestDepthReportAgreesWithRemovedLayers(t *testing.T) {
	net := decoder(t, norm.MixLN{Alpha: .5}, 4)
	next := tensors.FromFlatDataAndDimensions([]int32{2, 3, 4, 5, 6, 7, 9, 8, 7, 0, 1, 2}, 2, 6)
	d, err := norm.DepthReport(t.Context(), enginetest.Backend(), net, [][]*tensors.Tensor{{someTokens, next}}, norm.DepthOptions{Distances: []int{1, 3}, Gradients: true, Jacobian: 2})
	if err != nil {
		t.Fatal(err)
	}
	loss := func(net *nn.Network) float64 {
		logits := logitsOf(t, net)
		sum := 0.
		for i, y := range nn.Floats(next) {
			row := logits[i*11 : (i+1)*11]
			z := 0.
			for _, v := range row {
				z += math.Exp(v)
			}
			sum += math.Log(z) - row[int(y)]
		}
		return sum / 12
	}
	if whole := loss(net); math.Abs(d.Loss-whole) > 1e-5 {
		t.Errorf("loss %g, want %g", d.Loss, whole)
	}
	s := stackOf(t, net)
	for l := 1; l <= 4; l++ {
		without, err := s.RemoveLayers(l)
		if err != nil {
			t.Fatal(err)
		}
		if want := loss(without) - loss(net); math.Abs(d.Removal[l-1]-want) > 1e-5 {
			t.Errorf("layer %d: removal costs %g, want %g", l, d.Removal[l-1], want)
		}
	}
	if len(d.Variance) != 5 || len(d.Angular[1]) != 4 || len(d.Angular[3]) != 2 || len(d.Gradient) != 4 || len(d.Jacobian) != 4 {
		t.Errorf("%+v", d)
	}
	for l := range 4 {
		if !(d.Gradient[l] > d.GradMatrices[l]) || !(d.GradMatrices[l] > 0) || !(d.Jacobian[l] > 0) {
			t.Errorf("layer %d: gradient %g, of matrices %g, Jacobian gap %g", l+1, d.Gradient[l], d.GradMatrices[l], d.Jacobian[l])
		}
	}
	bad := net.Clone()
	w := bad.Params.Get("blk.2.down.w").Data()
	w[0] = float32(math.NaN())
	if err := bad.Params.Get("blk.2.down.w").SetData(w); err != nil {
		t.Fatal(err)
	}
	if _, err := norm.DepthReport(t.Context(), enginetest.Backend(), bad, [][]*tensors.Tensor{{someTokens, next}}, norm.DepthOptions{}); err == nil || !strings.Contains(err.Error(), "layer 3") {
		t.Errorf("a NaN in layer 3: %v", err)
	}
}

// TestMixedGradients compares the gradients of a 4-layer mix(0.5) with finite differences.
func TestMixedGradients(t *testing.T) {
	net := decoder(t, norm.MixLN{Alpha: .5}, 4)
	next := []int32{2, 3, 4, 5, 6, 7, 9, 8, 7, 0, 1, 2}
	loss := func(in []*graph.Node, names []string) *graph.Node {
		cur := map[string]*graph.Node{}
		for i, n := range names {
			cur[n] = in[i]
		}
		env := &nn.Env{G: in[0].Graph(), DType: dtypes.Float64, Param: func(s string) *graph.Node { return cur[s] }}
		tokens := graph.ConstTensor(in[0].Graph(), someTokens)
		y := graph.ConstTensor(in[0].Graph(), tensors.FromFlatDataAndDimensions(next, 2, 6))
		return learn.CrossEntropy(net.Lower(env, map[string]*graph.Node{"tokens": tokens})[0], y)
	}
	var names []string
	var values [][]float64
	var dims [][]int
	for p := range net.Params.All() {
		names, values, dims = append(names, p.Name), append(values, nn.Float64s(p.Value)), append(dims, p.Value.Shape().Dimensions)
	}
	args := func() (a []any) {
		for i, v := range values {
			a = append(a, tensors.FromFlatDataAndDimensions(slices.Clone(v), dims[i]...))
		}
		return a
	}
	value, err := engine.NewExec(enginetest.Backend(), func(in []*graph.Node) []*graph.Node { return []*graph.Node{loss(in, names)} })
	if err != nil {
		t.Fatal(err)
	}
	defer value.Finalize()
	at := func() float64 {
		out, err := value.Call(args()...)
		if err != nil {
			t.Fatal(err)
		}
		return nn.Float64s(out[0])[0]
	}
	grads := call(t, func(in []*graph.Node) []*graph.Node { return graph.Gradient(loss(in, names), in...) }, args()...)
	for _, name := range []string{"blk.0.attn.q.w", "blk.0.norm1.w", "blk.1.down.w", "blk.2.norm2.w", "blk.3.gate.w"} {
		i := slices.Index(names, name)
		g := nn.Float64s(grads[i])
		for _, k := range []int{0, len(g) / 2, len(g) - 1} {
			const h = 1e-5
			old := values[i][k]
			values[i][k] = old + h
			up := at()
			values[i][k] = old - h
			down := at()
			values[i][k] = old
			if d := (up - down) / (2 * h); math.Abs(d-g[k]) > 1e-3*math.Max(math.Abs(d), 1e-4) {
				t.Errorf("%s[%d]: gradient %g, finite difference %g", name, k, g[k], d)
			}
		}
	}
}

func TestSchemesByName(t *testing.T) {
	for name, want := range map[string]zoo.Scheme{
		"pre": norm.Pre{}, "post": norm.Post{}, "mix": norm.MixLN{Alpha: .25}, "mix:0.5": norm.MixLN{Alpha: .5}, "prepost:2": norm.PrePost{K: 2},
		"sandwich": norm.Sandwich{}, "deepnorm": norm.DeepNorm{}, "lns": norm.LayerNormScaling{}, "lns-branch": norm.LayerNormScaling{AfterBranch: true},
	} {
		if got, err := norm.NewScheme(name); err != nil || got != want {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
	for _, bad := range []string{"", "mixed", "mix:1.5", "mix:-0.1", "mix:NaN", "mix:x", "pre:1", "prepost:-1"} {
		if s, err := norm.NewScheme(bad); err == nil {
			t.Errorf("%q gives %v", bad, s)
		}
	}
}

func TestStackRefusesOtherNetworks(t *testing.T) {
	mlp, err := zoo.MLP(zoo.MLPOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := norm.StackOf(mlp); err == nil {
		t.Error("a perceptron has no layers")
	}
	if s := stackOf(t, mustViT(t)); s.Layers() != 2 {
		t.Errorf("%d layers of a ViT of depth 2", s.Layers())
	}
}

func mustViT(t *testing.T) *nn.Network {
	t.Helper()
	net, err := zoo.ViT(zoo.ViTOptions{Depth: 2})
	if err != nil {
		t.Fatal(err)
	}
	return net
}

// TestPrefixesGiveTheSameLogits: evaluating token by token on growing prefixes equals one pass over the sequence.
func TestPrefixesGiveTheSameLogits(t *testing.T) {
	for name, s := range map[string]zoo.Scheme{"lns": norm.LayerNormScaling{}, "mix": norm.MixLN{Alpha: .5}} {
		net := decoder(t, s, 4)
		ids := []int32{1, 2, 3, 4, 5, 6}
		whole := nn.Float64s(runTaps(t, net, tensors.FromFlatDataAndDimensions(ids, 1, 6))[0])
		for n := 1; n <= 6; n++ {
			part := nn.Float64s(runTaps(t, net, tensors.FromFlatDataAndDimensions(slices.Clone(ids[:n]), 1, n))[0])
			if !close64(part[(n-1)*11:], whole[(n-1)*11:n*11], 1e-4) {
				t.Errorf("%s: the logits after %d tokens depend on what follows", name, n)
			}
		}
	}
}

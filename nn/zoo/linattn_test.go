package zoo

import (
	"math"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/internal/fixture"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/onnx"
)

// mixNetwork is the part of a linear attention between its projections, of three inputs.
func mixNetwork(t *testing.T, o LinearAttentionOptions, tokens, keys, dim int) *nn.Network {
	t.Helper()
	b := nn.NewBuilder(1)
	q, k, v := b.Input("q", f32(1, tokens, dim)), b.Input("k", f32(1, keys, dim)), b.Input("v", f32(1, keys, dim))
	net, err := b.Finish(o.mix(b, q, k, v, o.Grid))
	if err != nil {
		t.Fatal(err)
	}
	return net
}

// gradients runs a network in float64: its output, and the gradients of Σ y·dy by its inputs and by parameter.
func gradients(t *testing.T, net *nn.Network, dy *tensors.Tensor, in ...*tensors.Tensor) (y []float64, by map[string][]float64) {
	t.Helper()
	var names []string
	args := []any{}
	for p := range net.Params.All() {
		names = append(names, p.Name)
		args = append(args, fixture.Tensor(nn.Float64s(p.Value), dtypes.Float64, p.Value.Shape().Dimensions...))
	}
	for _, x := range in {
		args = append(args, x)
	}
	args = append(args, dy)
	e, err := engine.NewExec(enginetest.Backend(), func(a []*graph.Node) []*graph.Node {
		cur, values := map[string]*graph.Node{}, map[string]*graph.Node{}
		for i, n := range names {
			cur[n] = a[i]
		}
		for i, x := range net.Inputs {
			values[x.Name] = a[len(names)+i]
		}
		env := &nn.Env{G: a[0].Graph(), DType: dtypes.Float64, Training: true, Param: func(n string) *graph.Node { return cur[n] }}
		y := net.Lower(env, values)[0]
		return append([]*graph.Node{y}, graph.Gradient(graph.ReduceAllSum(graph.Mul(y, a[len(a)-1])), a[:len(a)-1]...)...)
	})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Finalize()
	out, err := e.Call(args...)
	if err != nil {
		t.Fatal(err)
	}
	by = map[string][]float64{}
	for i, n := range names {
		by[n] = nn.Float64s(out[1+i])
	}
	for i, x := range net.Inputs {
		by[x.Name] = nn.Float64s(out[1+len(names)+i])
	}
	return nn.Float64s(out[0]), by
}

func TestFixturesLinearAttention(t *testing.T) {
	elsewhere := func(t *testing.T, _ *fixture.Case) map[string]any { t.Skip("in design/norm"); return nil }
	fixture.Run(t, 2, map[string]fixture.Func{
		"prepbn": elsewhere, "fold_repbn": elsewhere,
		"sla": func(t *testing.T, c *fixture.Case) map[string]any {
			if eps := c.Params["den_eps"].Float(); eps != linearEps {
				t.Fatalf("eps is %g", eps)
			}
			grid := c.Params["grid"].Ints()
			o := LinearAttentionOptions{Heads: c.Params["heads"].Int(), Grid: [2]int{grid[0], grid[1]}, Kernel: c.Params["kernel"].Int(), NoConv: !c.Params["dwc"].Bool()}
			s := c.Inputs["q"].Shape
			net := mixNetwork(t, o, s[1], s[1], s[2])
			set := func(node, local string, v fixture.Value) {
				// float32 parameters; the fixture's tolerance is 1e-4
				if err := net.Param(net.Node(node), local).SetData(v.Float32s()); err != nil {
					t.Fatal(err)
				}
			}
			set("pos", "w", c.Inputs["pos"])
			if !o.NoConv {
				set("dwc", "w", c.Inputs["dwc_w"])
				set("dwc", "b", c.Inputs["dwc_b"])
			}
			y, by := gradients(t, net, c.Inputs["dy"].Tensor(dtypes.Float64), c.Inputs["q"].Tensor(dtypes.Float64), c.Inputs["k"].Tensor(dtypes.Float64), c.Inputs["v"].Tensor(dtypes.Float64))
			return map[string]any{"y": y, "dq": by["q"], "dk": by["k"], "dv": by["v"], "dpos": by["pos.w"]}
		},
	})
}

// normal draws a float64 tensor.
func drawn(seed uint64, dims ...int) *tensors.Tensor {
	n := 1
	for _, d := range dims {
		n *= d
	}
	v := make([]float64, n)
	r := rng.New(seed, "drawn")
	for i := range v {
		v[i] = r.NormFloat64()
	}
	return fixture.Tensor(v, dtypes.Float64, dims...)
}

func near(t *testing.T, what string, got, want []float64, tol float64) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("%s has %d values, want %d", what, len(got), len(want))
	}
	for i := range got {
		if !(math.Abs(got[i]-want[i]) <= tol*max(1, math.Abs(want[i]))) {
			t.Fatalf("%s[%d] = %.9g, want %.9g", what, i, got[i], want[i])
		}
	}
}

// By the definition, weights of a convex combination times s/(s + eps), whichever product comes first.
func TestLinearAttentionAveragesValues(t *testing.T) {
	for _, c := range []struct {
		name       string
		grid       [2]int
		stateFirst bool
	}{{"queries and keys first", [2]int{2, 2}, false}, {"keys and values first", [2]int{3, 4}, true}} {
		o := LinearAttentionOptions{Heads: 2, Grid: c.grid, NoConv: true}
		n, dim, d := c.grid[0]*c.grid[1], 10, 5
		net := mixNetwork(t, o, n, n, dim)
		if has := net.Node("state") != nil; has != c.stateFirst {
			t.Errorf("%s: wrong order", c.name)
		}
		q, k, v := drawn(1, 2, n, dim), drawn(2, 2, n, dim), drawn(3, 2, n, dim)
		y, _ := gradients(t, net, drawn(4, 2, n, dim), q, k, v)
		want := make([]float64, len(y))
		qf, kf, vf := nn.Float64s(q), nn.Float64s(k), nn.Float64s(v)
		relu := func(x float64) float64 { return max(x, 0) }
		for b := range 2 {
			for h := range 2 {
				for i := range n {
					w, s := make([]float64, n), 0.
					for j := range n {
						for f := range d {
							w[j] += relu(qf[(b*n+i)*dim+h*d+f]) * relu(kf[(b*n+j)*dim+h*d+f])
						}
						s += w[j]
					}
					total := 0.
					for j := range n {
						total += w[j] / (s + linearEps)
						for f := range d {
							want[(b*n+i)*dim+h*d+f] += w[j] / (s + linearEps) * vf[(b*n+j)*dim+h*d+f]
						}
					}
					if math.Abs(total-s/(s+linearEps)) > 1e-12 {
						t.Fatalf("weights sum to %g", total)
					}
				}
			}
		}
		near(t, c.name, y, want, 1e-5)
	}
}

func TestLinearAttentionWithoutConvolutionIgnoresOrder(t *testing.T) {
	o := LinearAttentionOptions{Heads: 2, Grid: [2]int{3, 3}}
	perm := []int{4, 0, 8, 2, 1, 7, 3, 5, 6}
	permuted := func(x *tensors.Tensor) *tensors.Tensor {
		v, out := nn.Float64s(x), []float64{}
		for _, p := range perm {
			out = append(out, v[p*4:(p+1)*4]...)
		}
		return fixture.Tensor(out, dtypes.Float64, 1, 9, 4)
	}
	q, k, v := drawn(1, 1, 9, 4), drawn(2, 1, 9, 4), drawn(3, 1, 9, 4)
	for _, conv := range []bool{false, true} {
		o.NoConv = !conv
		net := mixNetwork(t, o, 9, 9, 4)
		y, _ := gradients(t, net, q, q, k, v)
		z, _ := gradients(t, net, q, permuted(q), permuted(k), permuted(v))
		want := nn.Float64s(permuted(fixture.Tensor(y, dtypes.Float64, 1, 9, 4)))
		if !conv {
			near(t, "permuted tokens", z, want, 1e-5)
			continue
		}
		worst := 0.
		for i := range z {
			worst = max(worst, math.Abs(z[i]-want[i]))
		}
		if worst < 1e-3 {
			t.Error("the convolution does not see the order of the tokens")
		}
	}
}

// A query that meets no key keeps the convolution alone, with a finite gradient.
func TestLinearAttentionWithoutKeys(t *testing.T) {
	o := LinearAttentionOptions{Heads: 2, Grid: [2]int{3, 3}}
	k := nn.Float64s(drawn(2, 1, 9, 4))
	for i := range k {
		k[i] = -math.Abs(k[i])
	}
	q, v := drawn(1, 1, 9, 4), drawn(3, 1, 9, 4)
	keys := fixture.Tensor(k, dtypes.Float64, 1, 9, 4)
	o.NoConv = true
	y, by := gradients(t, mixNetwork(t, o, 9, 9, 4), q, q, keys, v)
	near(t, "attention", y, make([]float64, len(y)), 0)
	o.NoConv = false
	z, by2 := gradients(t, mixNetwork(t, o, 9, 9, 4), q, q, keys, v)
	if slices.Equal(z, y) {
		t.Error("the convolution is gone too")
	}
	for _, g := range []map[string][]float64{by, by2} {
		for name, v := range g {
			for _, x := range v {
				if math.IsNaN(x) || math.IsInf(x, 0) {
					t.Fatalf("d%s is %g", name, x)
				}
			}
		}
	}
}

func TestLinearAttentionGradientByFiniteDifferences(t *testing.T) {
	for name, c := range map[string]struct {
		o            LinearAttentionOptions
		tokens, keys int
	}{
		"keys and values first":  {LinearAttentionOptions{Heads: 2, Grid: [2]int{2, 3}, Kernel: 3}, 6, 6},
		"queries and keys first": {LinearAttentionOptions{Heads: 1, Grid: [2]int{1, 3}}, 3, 3},
		"stretched values":       {LinearAttentionOptions{Heads: 2, Grid: [2]int{2, 4}, Kernel: 3}, 8, 2},
	} {
		net := mixNetwork(t, c.o, c.tokens, c.keys, 4)
		in := []*tensors.Tensor{drawn(11, 1, c.tokens, 4), drawn(12, 1, c.keys, 4), drawn(13, 1, c.keys, 4)}
		dy := drawn(14, 1, c.tokens, 4)
		_, by := gradients(t, net, dy, in...)
		for i, x := range []string{"q", "k", "v"} {
			data := nn.Float64s(in[i])
			for j := 0; j < len(data); j += 3 {
				at := func(d float64) (sum float64) {
					v, all := slices.Clone(data), slices.Clone(in)
					v[j] += d
					all[i] = fixture.Tensor(v, dtypes.Float64, in[i].Shape().Dimensions...)
					y, _ := gradients(t, net, dy, all...)
					for n, w := range nn.Float64s(dy) {
						sum += w * y[n]
					}
					return sum
				}
				want := (at(1e-6) - at(-1e-6)) / 2e-6
				if math.Abs(by[x][j]-want) > 1e-3*max(1e-3, math.Abs(want)) {
					t.Errorf("%s: d%s[%d] = %g, finite difference %g", name, x, j, by[x][j], want)
				}
			}
		}
	}
}

// attentionNetwork is a whole linear attention of one input.
func attentionNetwork(o LinearAttentionOptions, tokens, dim int) (*nn.Network, error) {
	b := nn.NewBuilder(1)
	return b.Finish(LinearAttention(b, "attn", b.Input("x", f32(1, tokens, dim)), o))
}

func TestLinearAttentionInWindows(t *testing.T) {
	const dim = 8
	whole, err := attentionNetwork(LinearAttentionOptions{Heads: 2, Grid: [2]int{2, 2}}, 4, dim)
	if err != nil {
		t.Fatal(err)
	}
	cut, err := attentionNetwork(LinearAttentionOptions{Heads: 2, Grid: [2]int{4, 6}, Window: 2}, 24, dim)
	if err != nil {
		t.Fatal(err)
	}
	x := nn.Floats(drawn(5, 2, 24, dim))
	got, err := cut.Run(enginetest.Backend(), []*tensors.Tensor{tensors.FromFlatDataAndDimensions(x, 2, 24, dim)})
	if err != nil {
		t.Fatal(err)
	}
	y := nn.Floats(got[0])
	for b := range 2 {
		for r := range 2 {
			for c := range 3 {
				var in, out []float32
				for i := range 4 {
					at := (b*24 + (2*r+i/2)*6 + 2*c + i%2) * dim
					in, out = append(in, x[at:at+dim]...), append(out, y[at:at+dim]...)
				}
				want, err := whole.Run(enginetest.Backend(), []*tensors.Tensor{tensors.FromFlatDataAndDimensions(in, 1, 4, dim)})
				if err != nil {
					t.Fatal(err)
				}
				near(t, "window", toFloat64(out), nn.Float64s(want[0]), 1e-5)
			}
		}
	}
	big, err := attentionNetwork(LinearAttentionOptions{Heads: 2, Grid: [2]int{4, 6}, Window: 56}, 24, dim)
	if err != nil || big.Node("attn.win") != nil {
		t.Errorf("a window larger than the map: %v", err)
	}
}

func toFloat64(v []float32) []float64 {
	out := make([]float64, len(v))
	for i := range v {
		out[i] = float64(v[i])
	}
	return out
}

// PVT's form: a quarter of the keys, values stretched along the sequence with half-pixel centres.
func TestLinearAttentionReduces(t *testing.T) {
	net, err := attentionNetwork(LinearAttentionOptions{Heads: 2, Grid: [2]int{4, 4}, Reduce: 2}, 16, 8)
	if err != nil {
		t.Fatal(err)
	}
	if p := net.Params.Get("attn.pos.w"); p == nil || !slices.Equal(p.Value.Shape().Dimensions, []int{1, 4, 8}) {
		t.Errorf("positions are %+v", p)
	}
	x := tensors.FromFlatDataAndDimensions(nn.Floats(drawn(6, 2, 16, 8)), 2, 16, 8)
	out, err := net.Run(enginetest.Backend(), []*tensors.Tensor{x}, "attn.v", "attn.v.stretch")
	if err != nil {
		t.Fatal(err)
	}
	v, s := nn.Floats(out[1]), nn.Floats(out[2])
	for i := range 16 {
		p := min(max((float64(i)+.5)/4-.5, 0), 3)
		lo := int(p)
		hi, f := min(lo+1, 3), float32(p-float64(lo))
		for c := range 8 {
			if want := v[lo*8+c]*(1-f) + v[hi*8+c]*f; math.Abs(float64(s[i*8+c]-want)) > 1e-5 {
				t.Fatalf("stretched value %d of token %d is %g, want %g", c, i, s[i*8+c], want)
			}
		}
	}
}

func TestLinearAttentionRefusals(t *testing.T) {
	for want, c := range map[string]struct {
		o      LinearAttentionOptions
		tokens int
	}{
		"3 heads do not divide":    {LinearAttentionOptions{Heads: 3, Grid: [2]int{3, 3}}, 9},
		"0 heads do not divide":    {LinearAttentionOptions{Grid: [2]int{3, 3}}, 9},
		"no class token":           {LinearAttentionOptions{Heads: 2, Grid: [2]int{3, 3}}, 10},
		"map of 0×0":               {LinearAttentionOptions{Heads: 2}, 9},
		"kernel of side 4":         {LinearAttentionOptions{Heads: 2, Grid: [2]int{3, 3}, Kernel: 4}, 9},
		"kernel of side -1":        {LinearAttentionOptions{Heads: 2, Grid: [2]int{3, 3}, Kernel: -1}, 9},
		"reduced by -2":            {LinearAttentionOptions{Heads: 2, Grid: [2]int{3, 3}, Reduce: -2}, 9},
		"reduction by 2":           {LinearAttentionOptions{Heads: 2, Grid: [2]int{3, 3}, Reduce: 2}, 9},
		"windows of side 2 do not": {LinearAttentionOptions{Heads: 2, Grid: [2]int{3, 3}, Window: 2}, 9},
		"windows of side -2":       {LinearAttentionOptions{Heads: 2, Grid: [2]int{3, 3}, Window: -2}, 9},
	} {
		if _, err := attentionNetwork(c.o, c.tokens, 8); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q, got %v", want, err)
		}
	}
	b := nn.NewBuilder(1)
	if _, err := b.Finish(LinearAttention(b, "attn", b.Input("x", f32(1, 4)), LinearAttentionOptions{Heads: 1, Grid: [2]int{1, 1}})); err == nil {
		t.Error("two axes were accepted")
	}
	if _, err := ViT(ViTOptions{Mixer: LinearAttentionOptions{}.Mixer()}); err == nil || !strings.Contains(err.Error(), "no class token") {
		t.Errorf("a class token: %v", err)
	}
}

func TestLinearAttentionOfOneToken(t *testing.T) {
	net, err := attentionNetwork(LinearAttentionOptions{Heads: 2, Grid: [2]int{1, 1}}, 1, 4)
	if err != nil {
		t.Fatal(err)
	}
	out, err := net.Run(enginetest.Backend(), []*tensors.Tensor{tensors.FromFlatDataAndDimensions([]float32{1, -2, 3, 4}, 1, 1, 4)})
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range nn.Floats(out[0]) {
		if math.IsNaN(float64(v)) {
			t.Fatal("not a number")
		}
	}
}

func TestLinearAttentionInONNX(t *testing.T) {
	for name, o := range map[string]LinearAttentionOptions{
		"whole": {}, "windows": {Window: 2}, "reduced": {Reduce: 2}, "plain": {NoConv: true},
	} {
		net, err := ViT(ViTOptions{Size: 16, Patch: 4, Dim: 8, Depth: 1, Heads: 2, MeanPool: true, Mixer: o.Mixer()})
		if err != nil {
			t.Fatal(err)
		}
		x := tensors.FromFlatDataAndDimensions(nn.Floats(drawn(7, 3, 16, 16, 1)), 3, 16, 16, 1)
		want, err := net.Run(enginetest.Backend(), []*tensors.Tensor{x})
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(t.TempDir(), "net.onnx")
		if err := onnx.WriteFile(file, net, onnx.WriteOptions{}); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		back, err := onnx.ReadFile(file, onnx.Options{})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		got, err := back.Run(enginetest.Backend(), []*tensors.Tensor{x})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		near(t, name, nn.Float64s(got[0]), nn.Float64s(want[0]), 1e-5)
	}
}

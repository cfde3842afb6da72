package fold_test

import (
	"errors"
	"fmt"
	"iter"
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
	"github.com/lathe-ml/lathe/internal/fixture"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/fold"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// gpt builds the fixture's model: learned positions, stacked queries, keys and values, logits at every position.
func gpt(t *testing.T, c *fixture.Case) *nn.Network {
	t.Helper()
	in := func(s string) fixture.Value { return c.Inputs[s] }
	dim, batch, tokens := in("emb").Shape[1], in("tokens").Shape[0], in("tokens").Shape[1]
	heads, causal := c.Params["heads"].Int(), c.Params["causal"].Bool()
	norm := nn.LayerNorm{Eps: c.Params["eps"].Float()}
	b := nn.NewBuilder(1)
	x := b.Add("emb", nn.Embedding{N: in("emb").Shape[0], Dim: dim}, b.Input("tokens", shapes.Make(dtypes.Int32, batch, tokens)))
	pos := b.Add("pos", nn.Value{Shape: shapes.Make(dtypes.Float32, in("pos").Shape[0], dim)})
	x = b.Add("embedded", nn.Add, x, b.Add("pos.t", nn.Slice{Axis: 0, From: 0, To: tokens}, pos))
	for l := range c.Params["layers"].Int() {
		name := func(s string) string { return fmt.Sprintf("%s_%d", s, l) }
		h := b.Add(name("wqkv"), nn.Dense{Out: 3 * dim}, b.Add(name("ln1"), norm, x))
		h = b.Add(name("parts"), nn.Reshape{Dims: []int{0, 0, 3, heads, dim / heads}}, h)
		h = b.Add(name("heads"), nn.Transpose{Perm: []int{2, 0, 3, 1, 4}}, h)
		part := func(i int) string {
			s := b.Add(name(fmt.Sprintf("part%d", i)), nn.Slice{Axis: 0, From: i, To: i + 1}, h)
			return b.Add(name(fmt.Sprintf("qkv%d", i)), nn.Reshape{Dims: []int{batch, heads, tokens, dim / heads}}, s)
		}
		q, k, v := part(0), part(1), part(2)
		p := b.Add(name("logits"), nn.MatMul{Scale: 1 / math.Sqrt(float64(dim/heads))}, q, b.Add(name("k.t"), nn.Transpose{Perm: []int{0, 1, 3, 2}}, k))
		if causal {
			p = b.Add(name("masked"), nn.CausalMask{}, p)
		}
		h = b.Add(name("ctx"), nn.MatMul{}, b.Add(name("probs"), nn.Softmax{}, p), v)
		h = b.Add(name("merge"), nn.Reshape{Dims: []int{0, 0, dim}}, b.Add(name("ctx.t"), nn.Transpose{Perm: []int{0, 2, 1, 3}}, h))
		x = b.Add(name("res1"), nn.Add, x, b.Add(name("wo"), nn.Dense{Out: dim}, h))
		h = b.Add(name("w1"), nn.Dense{Out: in(name("w1")).Shape[0]}, b.Add(name("ln2"), norm, x))
		x = b.Add(name("res2"), nn.Add, x, b.Add(name("w2"), nn.Dense{Out: dim}, b.Add(name("gelu"), nn.GELU{}, h)))
	}
	net, err := b.Finish(b.Add("head", nn.Dense{Out: in("head").Shape[0]}, b.Add("lnf", norm, x)))
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range net.Nodes {
		for local, full := range n.P {
			key := n.Name
			kind, layer, _ := strings.Cut(n.Name, "_")
			if layer != "" {
				layer = "_" + layer
			}
			switch {
			case kind == "lnf":
				key = map[string]string{"w": "gf", "b": "bef"}[local]
			case strings.HasPrefix(kind, "ln"):
				key = map[string]string{"w": "g", "b": "be"}[local] + kind[2:] + layer
			case local == "b" && kind == "head":
				key = "bhead"
			case local == "b":
				key = "b" + strings.TrimPrefix(kind, "w") + layer
			}
			v := in(key)
			if !v.Present() {
				t.Fatalf("the case has no %q for %s of %q", key, local, n.Name)
			}
			p := net.Params.Get(full)
			p.Value = v.Tensor(dtypes.Float64)
		}
	}
	return net
}

func run64(t *testing.T, net *nn.Network, taps []string, in ...*tensors.Tensor) []*tensors.Tensor {
	t.Helper()
	r, err := nn.NewRunner(enginetest.Backend(), net, nn.RunOptions{DType: dtypes.Float64, Taps: taps})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Finalize()
	out, err := r.Run(in...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestFixtures(t *testing.T) {
	normWithGradient := func(f func(x *graph.Node, eps float64) *graph.Node) fixture.Func {
		return func(t *testing.T, c *fixture.Case) map[string]any {
			e, err := engine.NewExec(enginetest.Backend(), func(in []*graph.Node) []*graph.Node {
				y := f(in[0], c.Params["eps"].Float())
				return []*graph.Node{y, graph.Gradient(graph.ReduceAllSum(graph.Mul(y, in[1])), in[0])[0]}
			})
			if err != nil {
				t.Fatal(err)
			}
			out, err := e.Call(c.Inputs["x"].Tensor(dtypes.Float64), c.Inputs["dy"].Tensor(dtypes.Float64))
			if err != nil {
				t.Fatal(err)
			}
			return map[string]any{"y": out[0], "dx": out[1]}
		}
	}
	fixture.Run(t, 4, map[string]fixture.Func{
		"rms_norm": normWithGradient(func(x *graph.Node, eps float64) *graph.Node {
			return nn.Standardize(x, nil, nil, eps, false, -1)
		}),
		"crms_norm": normWithGradient(func(x *graph.Node, eps float64) *graph.Node { return nn.CompressedRMS(x, eps, -1) }),
		"convert_preln": func(t *testing.T, c *fixture.Case) map[string]any {
			tokens := c.Inputs["tokens"].Tensor(dtypes.Int32)
			out := map[string]any{}
			net := gpt(t, c)
			out["logits"] = run64(t, net, nil, tokens)[0]
			for form, convert := range map[string]func(*nn.Network) (fold.Recentered, error){"rms": fold.ToPreRMS, "crms": fold.ToPreCRMS} {
				n := net.Clone()
				if _, err := convert(n); err != nil {
					t.Fatal(err)
				}
				for i, v := range nn.Float64s(run64(t, n, nil, tokens)[0]) {
					if w := c.Outputs["logits"].Floats()[i]; math.Abs(v-w) > c.Tol*max(1, math.Abs(w)) {
						t.Errorf("%s: logit %d is %g, want %g", form, i, v, w)
					}
				}
				for _, x := range n.Nodes {
					for local, full := range x.P {
						key := x.Name
						switch {
						case local == "b" && x.Name == "head":
							key = "bhead"
						case local == "b":
							key = "b" + strings.TrimPrefix(x.Name, "w")
						}
						out[form+"."+key] = n.Params.Get(full).Value
					}
				}
			}
			return out
		},
	})
}

// spread gives every parameter a random value far from its initial one, so that no mistake hides behind a 0 or 1.
func spread(t *testing.T, net *nn.Network) *nn.Network {
	t.Helper()
	for p := range net.Params.All() {
		d := p.Data()
		rng.Normal(rng.New(7, p.Name), d, .3)
		if p.Role == nn.Gain {
			for i := range d {
				d[i] += 1
			}
		}
		if err := p.SetData(d); err != nil {
			t.Fatal(err)
		}
	}
	return net
}

func vit(t *testing.T, o zoo.ViTOptions) *nn.Network {
	t.Helper()
	o.Size, o.Dim, o.Heads = 14, 16, 2
	if o.Depth == 0 {
		o.Depth = 2
	}
	net, err := zoo.ViT(o)
	if err != nil {
		t.Fatal(err)
	}
	return spread(t, net)
}

func decoder(t *testing.T, o zoo.DecoderOptions) *nn.Network {
	t.Helper()
	o.Symbols, o.Context, o.Dim, o.Depth, o.Heads = 11, 6, 16, 2, 2
	net, err := zoo.Decoder(o)
	if err != nil {
		t.Fatal(err)
	}
	return spread(t, net)
}

// inputs is a random batch for a network.
func inputs(net *nn.Network, batch int) []*tensors.Tensor {
	var in []*tensors.Tensor
	for _, i := range net.Inputs {
		s := i.Shape.Clone()
		s.Dimensions[0] = batch
		if s.DType.IsFloat() {
			in = append(in, tensors.FromFlatDataAndDimensions(normal("in:"+i.Name, s.Size()), s.Dimensions...))
			continue
		}
		v := make([]int32, s.Size())
		for k := range v {
			v[k] = int32(k*7+3) % 11
		}
		in = append(in, tensors.FromFlatDataAndDimensions(v, s.Dimensions...))
	}
	return in
}

func once(in []*tensors.Tensor) iter.Seq2[[]*tensors.Tensor, error] {
	return func(yield func([]*tensors.Tensor, error) bool) { yield(in, nil) }
}

func equal(t *testing.T, name string, a, b *nn.Network, tol float64) {
	t.Helper()
	e, err := fold.VerifyEquivalence(enginetest.Backend(), a, b, once(inputs(a, 3)))
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	if !(e.Relative <= tol) || e.Cases != 3 || e.Top1 < .99 {
		t.Errorf("%s: %+v", name, e)
	}
}

var forms = map[string]func(*nn.Network) (fold.Recentered, error){"rms": fold.ToPreRMS, "crms": fold.ToPreCRMS}

// layerScaled is a pre-norm network with everything on the stream that a conversion goes through.
func layerScaled(t *testing.T) *nn.Network {
	t.Helper()
	f32 := func(d ...int) shapes.Shape { return shapes.Make(dtypes.Float32, d...) }
	b := nn.NewBuilder(3)
	x := b.Add("patch", nn.Conv{Out: 8, Kernel: []int{2, 2}, Stride: []int{2, 2}}, b.Image("image", 4, 4, 3))
	x = b.Add("flat", nn.Reshape{Dims: []int{0, -1, 8}}, x)
	x = b.Add("both", nn.Concat{Axis: 1}, b.Add("cls", nn.Value{Shape: f32(1, 1, 8), Batch: true}, x), x)
	x = b.Add("placed", nn.Add, x, b.Add("pos", nn.Value{Shape: f32(5, 8)}))
	x = b.Add("dropped", nn.Dropout{Rate: .1}, x)
	x = b.Add("biased", nn.Add, x, b.Add("shift", nn.Value{Shape: f32(8)}))
	h := b.Add("gelu", nn.GELU{}, b.Add("fc1", nn.Dense{Out: 12, NoBias: true}, b.Add("norm1", nn.LayerNorm{Eps: 1e-6}, x)))
	h = b.Add("path", nn.DropPath{Rate: .2}, b.Add("fc2", nn.Dense{Out: 8, NoBias: true}, h))
	h = b.Add("scaled", nn.Mul, h, b.Add("scale", nn.Value{Shape: f32(1, 1, 8), Role: nn.Gain}))
	x = b.Add("res1", nn.Add, b.Add("skip", nn.Affine{Scale: .7}, x), h)
	// two readers of one norm, gated; the branch ends in a scalar
	m := b.Add("norm2", nn.LayerNorm{NoBias: true, Eps: 1e-3}, x)
	h = b.Add("gated", nn.Mul, b.Add("up", nn.Dense{Out: 9}, m), b.Add("act", nn.SiLU, b.Add("gate", nn.Dense{Out: 9}, m)))
	h = b.Add("weak", nn.Mul, b.Add("half", nn.Value{Shape: f32(1), Role: nn.Gain}), b.Add("down", nn.Dense{Out: 8}, h))
	x = b.Add("res2", nn.Binary{Fn: "Sub"}, x, h)
	parts := b.Add("parts", nn.Split{Axis: 1, Sizes: []int{1, 4}}, x) // tokens apart and together again
	x = b.Add("again", nn.Concat{Axis: 1}, parts+".1", parts)
	x = b.Add("turned", nn.Transpose{Perm: []int{1, 0, 2}}, x)
	x = b.Add("back", nn.Transpose{Perm: []int{1, 0, 2}}, x)
	pooled := b.Add("pooled", nn.Reduce{Fn: "ReduceMean", Axes: []int{1}}, x)
	a := b.Add("tail", nn.LayerNorm{NoGain: true}, pooled)
	out := b.Add("head", nn.Dense{Out: 5}, b.Add("half.norm", nn.Affine{Scale: .5}, a))
	// a norm behind which tokens are chosen and rearranged, read by a convolution
	q := b.Add("rest", nn.Slice{Axis: 1, From: 0, To: 4}, b.Add("norm3", nn.LayerNorm{}, x))
	q = b.Add("conv", nn.Conv{Out: 3, Kernel: []int{2, 2}}, b.Add("grid", nn.Reshape{Dims: []int{0, 2, 2, 8}}, q))
	net, err := b.Finish(out, b.Add("conv.flat", nn.Reshape{Dims: []int{0, 3}}, q))
	if err != nil {
		t.Fatal(err)
	}
	return spread(t, net)
}

// tokensLast is a network as readers of files have it that keep the width of images in front: [batch, width, tokens].
func tokensLast(t *testing.T) *nn.Network {
	t.Helper()
	f32 := func(d ...int) shapes.Shape { return shapes.Make(dtypes.Float32, d...) }
	const d = 6
	norm := nn.LayerNorm{Axes: []int{1}}
	turn := nn.Transpose{Perm: []int{0, 2, 1}}
	b := nn.NewBuilder(3)
	x := b.Add("patch", nn.Conv{Out: d, Kernel: []int{2, 2}, Stride: []int{2, 2}}, b.Image("image", 4, 4, 1))
	x = b.Add("flat", nn.Reshape{Dims: []int{0, d, 4}}, b.Add("front", nn.Transpose{Perm: []int{0, 3, 1, 2}}, x))
	cls := b.Add("cls.turned", turn, b.Add("cls", nn.Value{Shape: f32(1, 1, d), Batch: true}, x))
	x = b.Add("both", nn.Concat{Axis: 2}, cls, x)
	x = b.Add("placed", nn.Add, x, b.Add("pos", nn.Value{Shape: f32(1, d, 5)}))
	for i := range 2 {
		b.In(fmt.Sprint(i), func() {
			h := b.Add("fc1", nn.Dense{Out: 9}, b.Add("natural", turn, b.Add("norm", norm, x)))
			h = b.Add("back", turn, b.Add("fc2", nn.Dense{Out: d}, b.Add("act", nn.GELU{}, h)))
			h = b.Add("scaled", nn.Mul, b.Add("scale", nn.Value{Shape: f32(d, 1), Role: nn.Gain}), h)
			x = b.Add("res", nn.Add, x, h)
		})
	}
	x = b.Add("last", norm, b.Add("chosen", nn.Reduce{Fn: "ReduceMean", Axes: []int{2}, Keep: true}, x))
	x = b.Add("row", nn.Reshape{Dims: []int{0, d}}, x)
	net, err := b.Finish(b.Add("head", nn.Dense{Out: 3}, x))
	if err != nil {
		t.Fatal(err)
	}
	return spread(t, net)
}

func TestConversionKeepsTheFunction(t *testing.T) {
	for name, net := range map[string]*nn.Network{
		"vit":               vit(t, zoo.ViTOptions{}),
		"vit, mean pool":    vit(t, zoo.ViTOptions{MeanPool: true}),
		"vit, dropout":      vit(t, zoo.ViTOptions{Dropout: .1}),
		"language model":    decoder(t, zoo.DecoderOptions{Norm: nn.LayerNorm{}}),
		"tied head":         decoder(t, zoo.DecoderOptions{Norm: nn.LayerNorm{}, Tied: true}),
		"ungated":           decoder(t, zoo.DecoderOptions{Norm: nn.LayerNorm{NoGain: true, NoBias: true}, Ungated: true}),
		"learned branches":  decoder(t, zoo.DecoderOptions{Norm: nn.LayerNorm{}, Scheme: planned{Pre: true, Learned: .5, Scale: .7, Branch: 1.3, Skip: .9}}),
		"everything":        layerScaled(t),
		"tokens last":       tokensLast(t),
		"no block":          vit(t, zoo.ViTOptions{Depth: -1}),
		"hidden layer norm": mlp(t),
	} {
		for form, convert := range forms {
			c := net.Clone()
			r, err := convert(c)
			if err != nil {
				t.Errorf("%s, %s: %v", name, form, err)
				continue
			}
			equal(t, name+", "+form, net, c, 2e-5)
			for _, x := range c.Nodes {
				if _, ok := x.Op.(nn.LayerNorm); ok {
					t.Errorf("%s, %s: %q is a layer norm still", name, form, x.Name)
				}
			}
			if len(r.Changed) == 0 || len(r.Streams) == 0 {
				t.Errorf("%s, %s: an empty report: %+v", name, form, r)
			}
			if name == "tied head" && !slices.Equal(r.Untied, []string{"embed.w"}) {
				t.Errorf("untied %v", r.Untied)
			}
		}
	}
}

// planned is a scheme of one plan.
type planned zoo.Plan

func (p planned) Plan(int, int) zoo.Plan { return zoo.Plan(p) }

func mlp(t *testing.T) *nn.Network {
	t.Helper()
	net, err := zoo.MLP(zoo.MLPOptions{Hidden: []int{8, 8}, Norm: nn.LayerNorm{}})
	if err != nil {
		t.Fatal(err)
	}
	return spread(t, net)
}

func TestConvertedWritersHaveMeanZeroAndConversionIsIdempotent(t *testing.T) {
	net := layerScaled(t)
	if _, err := fold.ToPreRMS(net); err != nil {
		t.Fatal(err)
	}
	streams, _, err := fold.FindStreams(net)
	if err != nil || len(streams) != 1 {
		t.Fatalf("%d streams, %v", len(streams), err)
	}
	for _, w := range streams[0].Writers {
		x := net.Node(w.Node)
		d := net.Param(x, "w").Data()
		sums := make([]float64, len(d)/8)
		for i, v := range d {
			if w.Kind == "value" || w.Kind == "embedding" {
				sums[i/8] += float64(v)
			} else {
				sums[i%(len(d)/8)] += float64(v)
			}
		}
		for _, s := range sums {
			if math.Abs(s) > 1e-5 {
				t.Errorf("writer %q: a column sums to %g", w.Node, s)
			}
		}
	}
	again := net.Clone()
	if _, err := fold.ToPreRMS(again); err != nil {
		t.Fatal(err)
	}
	for p := range net.Params.All() {
		q := again.Params.Get(p.Name)
		if q == nil {
			t.Errorf("%q is gone", p.Name)
			continue
		}
		for i, v := range q.Data() {
			if math.Abs(float64(v-p.Data()[i])) > 1e-6 {
				t.Fatalf("%q changed", p.Name)
			}
		}
	}
	if _, err := fold.ToPreCRMS(net); err != nil { // an RMS network whose writers are centred
		t.Fatal(err)
	}
	equal(t, "crms of rms", layerScaled(t), net, 2e-5)
	var e *fold.StreamError
	if _, err := fold.ToPreCRMS(net); !errors.As(err, &e) || !errors.Is(err, fold.ErrCompressed) {
		t.Errorf("twice compressed: %v", err)
	}
}

// Appending minus the sum to a compressed stream gives the stream of the RMS network, at every layer.
func TestCompressedStreamIsTheStreamWithoutItsLastCoordinate(t *testing.T) {
	net := vit(t, zoo.ViTOptions{})
	rms, crms := net.Clone(), net.Clone()
	if _, err := fold.ToPreRMS(rms); err != nil {
		t.Fatal(err)
	}
	r, err := fold.ToPreCRMS(crms)
	if err != nil {
		t.Fatal(err)
	}
	taps := []string{"tokens.pos", "blk.0.res1", "blk.0.res2", "blk.1.res1", "blk.1.res2"}
	for _, v := range taps {
		if !slices.Contains(r.Streams[0].Values, v) {
			t.Errorf("%q is not a value of the stream", v)
		}
	}
	a, b := run64(t, rms, taps, inputs(net, 2)...), run64(t, crms, taps, inputs(net, 2)...)
	for i, name := range taps {
		full, short := nn.Float64s(a[i+1]), nn.Float64s(b[i+1])
		for at := 0; at < len(full)/16; at++ {
			sum := 0.
			for j := range 15 {
				sum += short[at*15+j]
				if math.Abs(full[at*16+j]-short[at*15+j]) > 1e-5 {
					t.Fatalf("%s: token %d: %g and %g", name, at, full[at*16+j], short[at*15+j])
				}
			}
			if math.Abs(full[at*16+15]+sum) > 1e-5 {
				t.Fatalf("%s: token %d: the last coordinate is %g, the others sum to %g", name, at, full[at*16+15], sum)
			}
		}
	}
}

// Every d-wide parameter of a CRMS network has lost a coordinate, and nothing else has changed its size.
func TestCompressionCountsParameters(t *testing.T) {
	net := vit(t, zoo.ViTOptions{MeanPool: true})
	rms, crms := net.Clone(), net.Clone()
	if _, err := fold.ToPreRMS(rms); err != nil {
		t.Fatal(err)
	}
	if _, err := fold.ToPreCRMS(crms); err != nil {
		t.Fatal(err)
	}
	const d, tokens, patch, mlp, classes, depth = 16, 4, 49, 32, 10, 2
	norms := (2*depth + 1) * 2 * d
	if got := net.Params.Count() - rms.Params.Count(); got != norms {
		t.Errorf("%d parameters went with the affine parts, want %d", got, norms)
	}
	writers := patch + 1 + tokens + depth*(d+1+mlp+1)
	readers := depth*(3*d+mlp) + classes
	if got := rms.Params.Count() - crms.Params.Count(); got != writers+readers {
		t.Errorf("compression saved %d parameters, want %d", got, writers+readers)
	}
}

// What reads a norm beside linear maps keeps its gain and bias; compressed, it gets the whole vector.
func TestNormsThatFeedSomethingElse(t *testing.T) {
	b := nn.NewBuilder(1)
	x := b.Add("in", nn.Dense{Out: 6}, b.Input("x", shapes.Make(dtypes.Float32, 1, 3, 4)))
	x = b.Add("res", nn.Add, x, b.Add("branch", nn.Dense{Out: 6}, b.Add("norm", nn.LayerNorm{}, x)))
	y := b.Add("last", nn.LayerNorm{}, x)
	pooled := b.Add("pool", nn.Reduce{Fn: "ReduceMax", Axes: []int{1}}, y)
	padded := b.Add("conv", nn.Conv{Out: 2, Kernel: []int{3}, Pad: [][2]int{{1, 1}}}, b.Add("norm4", nn.LayerNorm{}, x))
	net, err := b.Finish(y, pooled, b.Add("head", nn.Dense{Out: 2}, y), padded)
	if err != nil {
		t.Fatal(err)
	}
	spread(t, net)
	for form, convert := range forms {
		c := net.Clone()
		r, err := convert(c)
		if err != nil {
			t.Fatal(err)
		}
		equal(t, form, net, c, 2e-5)
		if want := []string{"last", "norm4"}; form == "rms" && !slices.Equal(r.Affine, want) || form == "crms" && !slices.Equal(r.Wide, want) {
			t.Errorf("%s: affine %v, wide %v", form, r.Affine, r.Wide)
		}
	}
}

// Norms of queries and keys belong to no stream.
func TestNormsOffTheStreamAreKept(t *testing.T) {
	b := nn.NewBuilder(1)
	x := b.Add("in", nn.Dense{Out: 6}, b.Input("x", shapes.Make(dtypes.Float32, 1, 3, 4)))
	q := b.Add("q.split", nn.Reshape{Dims: []int{0, 0, 2, 3}}, b.Add("q", nn.Dense{Out: 6}, b.Add("norm", nn.LayerNorm{}, x)))
	q = b.Add("q.merge", nn.Reshape{Dims: []int{0, 0, 6}}, b.Add("q.norm", nn.LayerNorm{}, q))
	x = b.Add("res", nn.Add, x, b.Add("o", nn.Dense{Out: 6}, q))
	net, err := b.Finish(b.Add("head", nn.Dense{Out: 2}, b.Add("last", nn.LayerNorm{}, x)))
	if err != nil {
		t.Fatal(err)
	}
	spread(t, net)
	for form, convert := range forms {
		c := net.Clone()
		r, err := convert(c)
		if err != nil || len(r.Kept) != 1 || r.Kept[0].Node != "q.norm" {
			t.Fatalf("%s: kept %v, %v", form, r.Kept, err)
		}
		if _, ok := c.Node("q.norm").Op.(nn.LayerNorm); !ok {
			t.Errorf("%s: the norm of the queries is gone", form)
		}
		equal(t, form, net, c, 2e-5)
	}
}

func TestConversionRefuses(t *testing.T) {
	f32 := func(d ...int) shapes.Shape { return shapes.Make(dtypes.Float32, d...) }
	// block builds input -> write -> [between] -> norm -> head around what is wrong.
	block := func(width int, norm nn.Norm, between func(b *nn.Builder, x string) string) *nn.Network {
		b := nn.NewBuilder(1)
		x := b.Add("in", nn.Dense{Out: width}, b.Input("x", f32(1, 3, 4)))
		x = b.Add("res", nn.Add, x, b.Add("branch", nn.Dense{Out: width}, b.Add("norm1", nn.LayerNorm{}, x)))
		if between != nil {
			x = between(b, x)
		}
		net, err := b.Finish(b.Add("head", nn.Dense{Out: 2}, b.Add("norm2", norm, x)))
		if err != nil {
			t.Fatal(err)
		}
		return net
	}
	add := func(op nn.Op) func(*nn.Builder, string) string {
		return func(b *nn.Builder, x string) string { return b.Add("wrong", op, x) }
	}
	broken := block(6, nn.LayerNorm{}, nil)
	d := broken.Param(broken.Node("branch"), "w").Data()
	d[3] = float32(math.NaN())
	if err := broken.Param(broken.Node("branch"), "w").SetData(d); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		net  *nn.Network
		want error
		node string
	}{
		"post-norm":     {decoder(t, zoo.DecoderOptions{Norm: nn.LayerNorm{}, Scheme: zoo.PostNorm{}}), fold.ErrPostNorm, "blk.0.norm1"},
		"sandwich":      {decoder(t, zoo.DecoderOptions{Norm: nn.LayerNorm{}, Scheme: planned{Pre: true, Out: true}}), fold.ErrSandwich, "blk.0.out1"},
		"deepnorm":      {decoder(t, zoo.DecoderOptions{Norm: nn.LayerNorm{}, Scheme: planned{Post: true, Skip: 1.5}}), fold.ErrPostNorm, "blk.0.norm1"},
		"rms source":    {decoder(t, zoo.DecoderOptions{}), fold.ErrNotCentred, "embed"},
		"one rms norm":  {block(6, nn.RMSNorm{}, nil), fold.ErrNotCentred, "in"},
		"an activation": {block(6, nn.LayerNorm{}, add(nn.ReLU)), fold.ErrElementwise, "wrong"},
		"a shift":       {block(6, nn.LayerNorm{}, add(nn.Affine{Scale: 1, Shift: 2})), fold.ErrElementwise, "wrong"},
		"a scale per channel": {block(6, nn.LayerNorm{}, func(b *nn.Builder, x string) string {
			return b.Add("wrong", nn.Mul, x, b.Add("s", nn.Value{Shape: f32(6)}))
		}), fold.ErrElementwise, "wrong"},
		"an unnormed reader": {block(6, nn.LayerNorm{}, func(b *nn.Builder, x string) string {
			return b.Add("res3", nn.Add, x, b.Add("wrong", nn.Dense{Out: 6}, x))
		}), fold.ErrUnnormed, "wrong"},
		"the largest token": {block(6, nn.LayerNorm{}, add(nn.Reduce{Fn: "ReduceMax", Axes: []int{1}})), fold.ErrUnnormed, "wrong"},
		"some channels":     {block(6, nn.LayerNorm{}, add(nn.Slice{Axis: 2, From: 0, To: 3})), fold.ErrUnnormed, "wrong"},
		"batch norm":        {block(6, nn.LayerNorm{}, add(nn.BatchNorm{})), fold.ErrUnnormed, "wrong"},
		"tokens' axis":      {block(6, nn.LayerNorm{Axes: []int{1, 2}}, nil), fold.ErrNormAxis, "norm2"},
		"not finite":        {broken, fold.ErrNotFinite, "branch"},
	} {
		for form, convert := range forms {
			before := c.net.Clone()
			_, err := convert(c.net)
			var e *fold.StreamError
			if !errors.Is(err, c.want) || !errors.As(err, &e) {
				t.Errorf("%s, %s: got %v, want %v", name, form, err, c.want)
				continue
			}
			if !strings.Contains(err.Error(), fmt.Sprintf("%q", c.node)) {
				t.Errorf("%s, %s: %v does not name %q", name, form, err, c.node)
			}
			if len(before.Nodes) != len(c.net.Nodes) || before.Params.Count() != c.net.Params.Count() {
				t.Errorf("%s, %s: a refused network was changed", name, form)
			}
		}
	}
	t.Run("input on the stream", func(t *testing.T) {
		b := nn.NewBuilder(1)
		x := b.Input("x", f32(1, 6))
		x = b.Add("res", nn.Add, x, b.Add("branch", nn.Dense{Out: 6}, b.Add("norm", nn.LayerNorm{}, x)))
		net, err := b.Finish(b.Add("head", nn.Dense{Out: 2}, b.Add("last", nn.LayerNorm{}, x)))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := fold.ToPreRMS(net); !errors.Is(err, fold.ErrUnknownWriter) {
			t.Error(err)
		}
	})
	t.Run("stream is an output", func(t *testing.T) {
		net := block(6, nn.LayerNorm{}, nil)
		net.Outputs = append(net.Outputs, "res")
		if _, err := fold.ToPreRMS(net); !errors.Is(err, fold.ErrUnnormed) {
			t.Error(err)
		}
	})
	t.Run("no norm", func(t *testing.T) {
		b := nn.NewBuilder(1)
		net, err := b.Finish(b.Add("fc", nn.Dense{Out: 2}, b.Input("x", f32(1, 4))))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := fold.ToPreCRMS(net); !errors.Is(err, fold.ErrNoStream) {
			t.Error(err)
		}
	})
	t.Run("width one", func(t *testing.T) {
		b := nn.NewBuilder(1)
		x := b.Add("in", nn.Dense{Out: 1}, b.Input("x", f32(1, 4)))
		net, err := b.Finish(b.Add("head", nn.Dense{Out: 2}, b.Add("norm", nn.RMSNorm{}, x)))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := fold.ToPreCRMS(net); !errors.Is(err, fold.ErrTooNarrow) {
			t.Error(err)
		}
	})
	t.Run("parameters that only broadcast", func(t *testing.T) { // as a file may have them
		for node, local := range map[string]string{"branch": "b", "head": "b", "in": "b"} {
			net := block(6, nn.LayerNorm{}, nil)
			net.SetParam(net.Node(node), local, nn.Bias, []float32{1}, 1)
			for _, convert := range forms {
				if _, err := convert(net.Clone()); !errors.Is(err, fold.ErrShape) {
					t.Errorf("%s of %q: %v", local, node, err)
				}
			}
		}
		net := layerScaled(t)
		net.SetParam(net.Node("scale"), "w", nn.Gain, []float32{2}, 1, 1, 1)
		if _, err := fold.ToPreRMS(net); err != nil && !errors.Is(err, fold.ErrShape) {
			t.Error(err)
		}
	})
	t.Run("stored weight", func(t *testing.T) {
		net := block(6, nn.LayerNorm{}, nil)
		x := net.Node("branch")
		x.Op = nn.Dense{Out: 6, W: halves{}}
		if _, err := fold.ToPreRMS(net); !errors.Is(err, fold.ErrStoredWeight) {
			t.Error(err)
		}
		net = block(6, nn.LayerNorm{}, nil) // a reader may be stored in any way
		net.Node("head").Op = nn.Dense{Out: 2, W: halves{}}
		spread(t, net)
		for form, convert := range forms {
			c := net.Clone()
			if _, err := convert(c); err != nil {
				t.Fatal(err)
			}
			equal(t, form, net, c, 2e-5)
		}
	})
}

// halves is a stored form other than the plain one.
type halves struct{ nn.Plain }

func (halves) Kind() string                   { return "halves" }
func (halves) Value(c *nn.Ctx) *graph.Node    { return graph.MulScalar(c.P("w"), .5) }
func (halves) Specs(w shapes.Shape) []nn.Spec { return nn.Plain{}.Specs(w) }

// The training form keeps all parameters, and with them the gradients and the path of an optimiser.
func TestZeroMeanFormIsTheSameFunctionOfTheSameParameters(t *testing.T) {
	for name, net := range map[string]*nn.Network{
		"vit": vit(t, zoo.ViTOptions{}), "mean pool": vit(t, zoo.ViTOptions{MeanPool: true}),
		"language model": decoder(t, zoo.DecoderOptions{Norm: nn.LayerNorm{}, Scheme: planned{Pre: true, Scale: .7}}),
		"no gain":        decoder(t, zoo.DecoderOptions{Norm: nn.LayerNorm{NoGain: true}}),
	} {
		for _, compress := range []bool{false, true} {
			form := net.Clone()
			if _, err := fold.ZeroMeanForm(form, compress); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if form.Params.Count() != net.Params.Count() {
				t.Errorf("%s: %d parameters, were %d", name, form.Params.Count(), net.Params.Count())
			}
			equal(t, name, net, form, 2e-5)
			want, got := gradients(t, net), gradients(t, form)
			for p, g := range want {
				largest, worst := 1e-6, 0.
				for i := range g {
					largest, worst = max(largest, math.Abs(g[i])), max(worst, math.Abs(g[i]-got[p][i]))
				}
				if !(worst <= 1e-7*largest) {
					t.Errorf("%s, compressed %v: the gradient of %q differs by %g of %g", name, compress, p, worst, largest)
				}
			}
			plain := form.Clone()
			layers, err := fold.Resolve(plain)
			if err != nil || layers == 0 {
				t.Fatalf("%s, compressed %v: %d layers, %v", name, compress, layers, err)
			}
			equal(t, name+", resolved", net, plain, 2e-5)
			direct := net.Clone()
			if _, err := forms[map[bool]string{false: "rms", true: "crms"}[compress]](direct); err != nil {
				t.Fatal(err)
			}
			if len(plain.Nodes) != len(direct.Nodes) || plain.Params.Count() != direct.Params.Count() {
				t.Errorf("%s, compressed %v: resolved has %d nodes and %d parameters, converted %d and %d", name, compress,
					len(plain.Nodes), plain.Params.Count(), len(direct.Nodes), direct.Params.Count())
			}
		}
	}
	for want, net := range map[error]*nn.Network{
		fold.ErrTraining:    vit(t, zoo.ViTOptions{Dropout: .1}),
		fold.ErrElementwise: layerScaled(t),
		fold.ErrPostNorm:    decoder(t, zoo.DecoderOptions{Norm: nn.LayerNorm{}, Scheme: zoo.PostNorm{}}),
		fold.ErrNormAxis:    tokensLast(t),
	} {
		if x := net.Node("dropped"); x != nil {
			x.Op = nn.Dropout{}
		}
		if _, err := fold.ZeroMeanForm(net, false); !errors.Is(err, want) {
			t.Errorf("got %v, want %v", err, want)
		}
	}
}

// gradients of a fixed function of the outputs, in float64.
func gradients(t *testing.T, net *nn.Network) map[string][]float64 {
	t.Helper()
	var names []string
	var args []any
	for p := range net.Params.All() {
		names = append(names, p.Name)
		args = append(args, p.Value)
	}
	for _, x := range inputs(net, 2) {
		args = append(args, x)
	}
	e, err := engine.NewExec(enginetest.Backend(), func(a []*graph.Node) []*graph.Node {
		cur, in := map[string]*graph.Node{}, map[string]*graph.Node{}
		var wide []*graph.Node
		for i, p := range names {
			cur[p] = graph.ConvertDType(a[i], dtypes.Float64)
			wide = append(wide, cur[p])
		}
		for i, x := range net.Inputs {
			in[x.Name] = a[len(names)+i]
		}
		y := net.Lower(&nn.Env{G: a[0].Graph(), Training: true, DType: dtypes.Float64, Param: func(s string) *graph.Node { return cur[s] }}, in)[0]
		return graph.Gradient(graph.ReduceAllSum(graph.Mul(y, graph.Sin(graph.IotaFull(y.Graph(), y.Shape())))), wide...)
	})
	if err != nil {
		t.Fatal(err)
	}
	out, err := e.Call(args...)
	if err != nil {
		t.Fatal(err)
	}
	g := map[string][]float64{}
	for i, p := range names {
		g[p] = nn.Float64s(out[i])
	}
	return g
}

// The gradient of every writer of a pre-norm network has mean zero over its output already.
func TestGradientsOfWritersAreCentred(t *testing.T) {
	net := vit(t, zoo.ViTOptions{})
	streams, _, err := fold.FindStreams(net)
	if err != nil {
		t.Fatal(err)
	}
	g := gradients(t, net)
	for _, w := range streams[0].Writers {
		v := g[net.Node(w.Node).P["w"]]
		largest := 0.
		sums := make([]float64, len(v)/16)
		for i, x := range v {
			largest = max(largest, math.Abs(x))
			if w.Kind == "value" {
				sums[i/16] += x
			} else {
				sums[i%len(sums)] += x
			}
		}
		for _, s := range sums {
			if !(math.Abs(s) <= 1e-5*largest) || largest == 0 {
				t.Errorf("writer %q: a sum of %g, the largest gradient is %g", w.Node, s, largest)
			}
		}
	}
}

// A constant on the whole stream does not show behind layer norms, and does behind RMS norms.
func TestConstantOnTheStream(t *testing.T) {
	shifted := func(net *nn.Network) float64 {
		c := net.Clone()
		if _, err := c.InsertBefore("blk.0.norm1", 0, "shifted", nn.Affine{Scale: 1, Shift: 3}); err != nil {
			t.Fatal(err)
		}
		res := c.Node("blk.0.res1")
		res.In[slices.Index(res.In, "tokens.pos")] = "shifted"
		e, err := fold.VerifyEquivalence(enginetest.Backend(), net, c, once(inputs(net, 3)))
		if err != nil {
			t.Fatal(err)
		}
		return e.Relative
	}
	net := vit(t, zoo.ViTOptions{})
	naive := net.Clone()
	for _, x := range naive.Nodes {
		if op, ok := x.Op.(nn.LayerNorm); ok {
			x.Op = nn.RMSNorm{Eps: op.Epsilon(), Bias: true}
		}
	}
	if d := shifted(net); d > 1e-5 {
		t.Errorf("layer norm: outputs move by %g", d)
	}
	if d := shifted(naive); d < 1e-2 {
		t.Errorf("RMS norm without re-centring: outputs move by %g only", d)
	}
}

// LN(x) = RMS(x) and CRMS(x without its last) = RMS(x) without its last, for x of mean zero and any eps.
func TestNormsAgreeOnVectorsOfMeanZero(t *testing.T) {
	for _, eps := range []float64{1e-12, 1e-5, 1e-1} {
		for _, d := range []int{2, 3, 17, 64} {
			e, err := engine.NewExec(enginetest.Backend(), func(in []*graph.Node) []*graph.Node {
				x := graph.Sub(in[0], graph.ReduceAndKeep(in[0], graph.ReduceMean, -1))
				short := graph.SliceAxis(x, -1, graph.AxisRange(0, d-1))
				rms := nn.Standardize(x, nil, nil, eps, false, -1)
				return []*graph.Node{
					nn.Standardize(in[0], nil, nil, eps, true, -1), rms,
					nn.CompressedRMS(short, eps, -1), graph.SliceAxis(rms, -1, graph.AxisRange(0, d-1)),
					nn.FullStream(short), x,
				}
			})
			if err != nil {
				t.Fatal(err)
			}
			x := make([]float64, 4*d)
			for i, v := range normal(fmt.Sprint(d), len(x)) {
				x[i] = 3*float64(v) + 1
			}
			out, err := e.Call(fixture.Tensor(x, dtypes.Float64, 4, d))
			if err != nil {
				t.Fatal(err)
			}
			for k := 0; k < len(out); k += 2 {
				a, b := nn.Float64s(out[k]), nn.Float64s(out[k+1])
				for i := range a {
					if math.Abs(a[i]-b[i]) > 1e-6 {
						t.Fatalf("eps %g, width %d, pair %d: %g and %g", eps, d, k/2, a[i], b[i])
					}
				}
			}
		}
	}
	// On one number x, CRMS is x/√(x² + eps).
	e, err := engine.NewExec(enginetest.Backend(), func(in []*graph.Node) []*graph.Node {
		return []*graph.Node{nn.CompressedRMS(in[0], 1e-2, -1)}
	})
	if err != nil {
		t.Fatal(err)
	}
	out, err := e.Call(fixture.Tensor([]float64{-2, .1, 0, 5}, dtypes.Float64, 4, 1))
	if err != nil {
		t.Fatal(err)
	}
	for i, x := range []float64{-2, .1, 0, 5} {
		if y := nn.Float64s(out[0])[i]; math.Abs(y-x/math.Sqrt(x*x+1e-2)) > 1e-12 {
			t.Errorf("crms(%g) = %g", x, y)
		}
	}
}

package native_test

import (
	"math"
	"math/rand/v2"
	"runtime"
	"testing"

	"github.com/gomlx/compute"
	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/gobackend"
	"github.com/gomlx/compute/shapes"
	. "github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine/native"
)

// trainingStep is a whole step of a small network as one graph: forward with dropout, cross entropy of integer labels,
// gradients, AdamW, accuracy.
type trainingStep struct {
	name    string
	image   []int
	classes int
	// forward gives the logits; weight asks for a parameter, which is created at the first call.
	forward func(x *Node, weight func(dims ...int) *Node) *Node

	shapes [][]int // of the parameters
}

// steps are a vision transformer with one block and a residual network with one, both tiny.
func trainingSteps() []*trainingStep {
	norm := func(x *Node, axes ...int) *Node {
		c := Sub(x, ReduceAndKeep(x, ReduceMean, axes...))
		return Div(c, Sqrt(AddScalar(ReduceAndKeep(Square(c), ReduceMean, axes...), 1e-5)))
	}
	dense := func(x *Node, w *Node) *Node { return Dot(x, w).General([]int{x.Rank() - 1}, nil, []int{0}, nil) }
	vit := &trainingStep{name: "vit", image: []int{5, 8, 8, 1}, classes: 7, forward: func(x *Node, w func(...int) *Node) *Node {
		b, d, heads := x.Shape().Dimensions[0], 24, 2
		x = Reshape(TransposeAllDims(Reshape(x, b, 2, 4, 2, 4), 0, 1, 3, 2, 4), b, 4, 16)
		x = Add(dense(x, w(16, d)), InsertAxes(w(4, d), 0))
		split := func(v *Node) *Node { return TransposeAllDims(Reshape(v, b, 4, heads, d/heads), 0, 2, 1, 3) }
		h := norm(x, -1)
		q, k, v := split(dense(h, w(d, d))), split(dense(h, w(d, d))), split(dense(h, w(d, d)))
		p := Softmax(MulScalar(Dot(q, k).General([]int{3}, []int{0, 1}, []int{3}, []int{0, 1}), 1/math.Sqrt(float64(d/heads))), -1)
		a := Dot(p, v).General([]int{3}, []int{0, 1}, []int{2}, []int{0, 1})
		x = Add(x, dense(Reshape(TransposeAllDims(a, 0, 2, 1, 3), b, 4, d), w(d, d)))
		h = dense(norm(x, -1), w(d, 2*d))
		h = MulScalar(Mul(h, AddScalar(Erf(MulScalar(h, 1/math.Sqrt2)), 1)), 0.5)
		x = Add(x, dense(h, w(2*d, d)))
		return dense(ReduceMean(x, 1), w(d, 7))
	}}
	resnet := &trainingStep{name: "resnet", image: []int{4, 9, 9, 3}, classes: 5, forward: func(x *Node, w func(...int) *Node) *Node {
		conv := func(x, k *Node, stride int) *Node { return Convolve(x, k).PadSame().Strides(stride).Done() }
		relu := func(x *Node) *Node { return Max(x, ZerosLike(x)) }
		x = relu(norm(conv(x, w(3, 3, 3, 8), 1), 0, 1, 2))
		h := relu(norm(conv(x, w(3, 3, 8, 12), 2), 0, 1, 2))
		h = norm(conv(h, w(3, 3, 12, 12), 1), 0, 1, 2)
		x = relu(Add(h, conv(x, w(1, 1, 8, 12), 2)))
		return dense(ReduceMean(x, 1, 2), w(12, 5))
	}}
	return []*trainingStep{vit, resnet}
}

// build is the graph: parameters, both moments, random state, step number, images, labels to the first four, loss and
// accuracy.
func (s *trainingStep) build(in []*Node) []*Node {
	n := len(s.shapes)
	params, rest := in[:n], in[3*n:]
	rng, step, image, labels := rest[0], rest[1], rest[2], rest[3]
	i := 0
	logits := s.forward(image, func(...int) *Node { i++; return params[i-1] })
	rng, noise := RandomUniform(rng, logits.Shape())
	kept := Where(LessThan(noise, scalar(logits.Graph(), 0.9)), logits, ZerosLike(logits))
	top := StopGradient(ReduceAndKeep(kept, ReduceMax, -1))
	logSoftmax := Sub(kept, Add(top, Log(ReduceAndKeep(Exp(Sub(kept, top)), ReduceSum, -1))))
	hot := OneHot(labels, s.classes, dtypes.Float32)
	loss := Neg(ReduceAllMean(ReduceSum(Mul(hot, logSoftmax), -1)))
	right := ReduceAllMean(ConvertDType(Equal(ArgMax(logits, -1, dtypes.Int32), labels), dtypes.Float32))
	grads := Gradient(loss, params...)
	var nw, nm, nv []*Node
	for i, g := range grads {
		m := Add(MulScalar(in[n+i], 0.9), MulScalar(g, 0.1))
		v := Add(MulScalar(in[2*n+i], 0.999), MulScalar(Square(g), 0.001))
		c1 := OneMinus(Pow(scalar(g.Graph(), 0.9), step))
		c2 := OneMinus(Pow(scalar(g.Graph(), 0.999), step))
		d := Div(Div(m, c1), AddScalar(Sqrt(Div(v, c2)), 1e-8))
		nw, nm, nv = append(nw, Sub(params[i], MulScalar(d, 1e-2))), append(nm, m), append(nv, v)
	}
	out := append(append(nw, nm...), nv...)
	return append(out, rng, AddScalar(step, 1), loss, right)
}

// inputs returns the first inputs of a step: weights, moments, random state, step number and a batch.
func (s *trainingStep) inputs(t testing.TB) (in []*tensors.Tensor) {
	if s.shapes == nil { // ask the network for its parameters
		e, err := NewExec(goBackend(t), func(in []*Node) []*Node {
			s.shapes = nil
			return []*Node{s.forward(in[0], func(dims ...int) *Node {
				s.shapes = append(s.shapes, dims)
				return Ones(in[0].Graph(), shapes.Make(dtypes.Float32, dims...))
			})}
		})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := e.Call(tensors.FromShape(shapes.Make(dtypes.Float32, s.image...))); err != nil {
			t.Fatal(err)
		}
	}
	r := rand.New(rand.NewPCG(5, 6))
	normal := func(scale float64, dims ...int) *tensors.Tensor {
		v := make([]float32, native.Size(dims))
		for i := range v {
			v[i] = float32(scale * r.NormFloat64())
		}
		return tensors.FromFlatDataAndDimensions(v, dims...)
	}
	for _, d := range s.shapes {
		in = append(in, normal(0.2, d...))
	}
	for range 2 {
		for _, d := range s.shapes {
			in = append(in, tensors.FromShape(shapes.Make(dtypes.Float32, d...)))
		}
	}
	labels := make([]int32, s.image[0])
	for i := range labels {
		labels[i] = int32(r.IntN(s.classes))
	}
	return append(in, tensors.FromValue([]uint64{1, 2, 3}), tensors.FromValue(float32(1)), normal(1, s.image...), tensors.FromValue(labels))
}

func goBackend(t testing.TB) compute.Backend {
	t.Helper()
	b, err := gobackend.New("ops_sequential")
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// carried is how many inputs a step gives away and gets back: all but the batch.
func (s *trainingStep) carried() int { return 3*len(s.shapes) + 2 }

// train runs some steps, each on what the last one gave, and returns the last results.
func (s *trainingStep) train(t testing.TB, b compute.Backend, steps int) []*tensors.Tensor {
	t.Helper()
	in := s.inputs(t)
	e, err := NewExec(b, s.build)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Finalize()
	var out []*tensors.Tensor
	for range steps {
		args := make([]any, len(in))
		for i, v := range in {
			if args[i] = v; i < s.carried() {
				if args[i], err = DonateTensorBuffer(v, b, 0); err != nil {
					t.Fatal(err)
				}
			}
		}
		if out, err = e.Call(args...); err != nil {
			t.Fatal(err)
		}
		in = append(out[:s.carried():s.carried()], in[s.carried():]...)
	}
	return out
}

func TestTrainingStepsAgreeWithGo(t *testing.T) {
	for _, s := range trainingSteps() {
		want := s.train(t, goBackend(t), 3)
		for _, b := range []*native.Backend{native.Open(t, ""), native.OpenWatched(t, "threads=2"), native.OpenWatched(t, "isa=generic")} {
			got := s.train(t, b, 3)
			n := 3 * len(s.shapes)
			same := append(got[:n:n], got[n+1:]...) // go leaves a word of the random state undefined
			if err := differ(same, append(want[:n:n], want[n+1:]...), false); err != nil {
				t.Errorf("%s on %s: %v", s.name, b.Description(), err)
			}
		}
	}
}

// spy keeps what the builders of a backend compile.
type spy struct {
	*native.Backend
	compiled compute.Executable
}

type spyBuilder struct {
	compute.Builder
	spy *spy
}

func (s *spy) Builder(name string) compute.Builder { return &spyBuilder{s.Backend.Builder(name), s} }

func (b *spyBuilder) Compile() (compute.Executable, error) {
	x, err := b.Builder.Compile()
	b.spy.compiled = x
	return x, err
}

// compile returns the executable of a graph function.
func compile(t testing.TB, b *native.Backend, f func(in []*Node) []*Node, in []*tensors.Tensor) compute.Executable {
	t.Helper()
	s := &spy{Backend: b}
	e, err := NewExec(s, f)
	if err != nil {
		t.Fatal(err)
	}
	var sh []shapes.Shape
	for _, v := range in {
		sh = append(sh, v.Shape())
	}
	if _, err := e.Compile(sh...); err != nil {
		t.Fatal(err)
	}
	return s.compiled
}

// buffers copies tensors to a backend.
func buffers(t testing.TB, b *native.Backend, in []*tensors.Tensor) (out []compute.Buffer) {
	t.Helper()
	for _, v := range in {
		v.MustConstFlatData(func(flat any) {
			buf, err := b.BufferFromFlatData(0, flat, v.Shape())
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, buf)
		})
	}
	return out
}

// TestTrainingStepsAllocateTheirResultsOnly runs compiled steps on buffers that they give away and get back. After the
// first, a step allocates what it hands out: the list, and for each result the buffer, its dimensions and the slice; and
// for those that are not float32 a buffer of the portable backend too.
func TestTrainingStepsAllocateTheirResultsOnly(t *testing.T) {
	for _, s := range trainingSteps() {
		for _, config := range []string{"threads=1", "threads=2"} {
			b := native.Open(t, config)
			var report native.Report
			b.Observe(func(r native.Report) { report = r })
			in := s.inputs(t)
			x := compile(t, b, s.build, in)
			if report.Regions > 0 {
				t.Errorf("%s: %v", s.name, report)
			}
			bufs := buffers(t, b, in)
			donate := make([]bool, len(bufs))
			limit := 1
			for i, sh := range x.Outputs() {
				limit += 2 + min(1, sh.Rank())
				if sh.DType != dtypes.Float32 {
					limit += 4
				}
				if i < s.carried() {
					donate[i] = true
				}
			}
			step := func() {
				out, err := x.Execute(bufs, donate, 0)
				if err != nil {
					t.Fatal(err)
				}
				copy(bufs, out[:s.carried()])
				for _, o := range out[s.carried():] {
					if err := o.Finalize(); err != nil {
						t.Fatal(err)
					}
				}
			}
			n := testing.AllocsPerRun(20, step)
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			for range 20 {
				step()
			}
			runtime.ReadMemStats(&after)
			if bytes := (after.TotalAlloc - before.TotalAlloc) / 20; bytes > uint64(256*len(x.Outputs())) {
				t.Errorf("%s with %s: %d bytes allocated in a step of %d results", s.name, config, bytes, len(x.Outputs()))
			}
			if n > float64(limit) {
				t.Errorf("%s with %s: %g allocations in a step, %d for its %d results", s.name, config, n, limit, len(x.Outputs()))
			}
		}
	}
}

package native_test

import (
	"fmt"
	"runtime"
	"slices"
	"sync"
	"testing"

	"github.com/gomlx/compute/dtypes"
	. "github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine/native"
)

// observed returns a backend and the reports of what it compiles.
func observed(t *testing.T, config string) (*native.Backend, *[]native.Report) {
	b := native.Open(t, config)
	var mu sync.Mutex
	reports := &[]native.Report{}
	b.Observe(func(r native.Report) {
		mu.Lock()
		*reports = append(*reports, r)
		mu.Unlock()
	})
	return b, reports
}

// affine computes tanh(x w) c + |x w| in an executor of its own.
func affine(t *testing.T, b *native.Backend, c float32, axis int, x, w [][]float32) []float32 {
	t.Helper()
	out := call(t, b, func(in []*Node) []*Node {
		y := Dot(in[0], in[1]).MatMul()
		return []*Node{ReduceSum(Add(Mul(Tanh(y), scalar(y.Graph(), c)), Abs(y)), axis)}
	}, x, w)
	return tensors.MustCopyFlatData[float32](out[0])
}

func TestEqualGraphsShareOnePlan(t *testing.T) {
	b, reports := observed(t, "")
	x, w := [][]float32{{1, 2}, {3, -4}}, [][]float32{{0.5, 0}, {0, 0.25}}
	first := affine(t, b, 2, 0, x, w)
	again := affine(t, b, 2, 0, x, w)
	other := affine(t, b, 2, 0, w, x)
	if !slices.Equal(first, again) {
		t.Errorf("%v from the plan, %v before", again, first)
	}
	if want := affine(t, native.Open(t, ""), 2, 0, w, x); !slices.Equal(other, want) {
		t.Errorf("other values: %v from the plan, want %v", other, want)
	}
	if got, want := affine(t, b, 3, 0, x, w), affine(t, native.Open(t, ""), 3, 0, x, w); !slices.Equal(got, want) {
		t.Errorf("another constant: %v, want %v", got, want)
	}
	if got, want := affine(t, b, 2, 1, x, w), affine(t, native.Open(t, ""), 2, 1, x, w); !slices.Equal(got, want) {
		t.Errorf("another axis: %v, want %v", got, want)
	}
	if got, want := affine(t, b, 2, 0, x[:1], w), affine(t, native.Open(t, ""), 2, 0, x[:1], w); !slices.Equal(got, want) {
		t.Errorf("another shape: %v, want %v", got, want)
	}
	var cached []bool
	for _, r := range *reports {
		cached = append(cached, r.Cached)
	}
	if !slices.Equal(cached, []bool{false, true, true, false, false, false}) {
		t.Errorf("from the cache: %v", cached)
	}
}

func TestPlansWithClosuresAreTold(t *testing.T) {
	b, reports := observed(t, "")
	grow := func(limit int32, by float32) float32 {
		out := call(t, b, func(in []*Node) []*Node {
			g := in[0].Graph()
			r := While(NewClosure(g, func(g *Graph) []*Node {
				i := Parameter(g, "i", in[1].Shape())
				Parameter(g, "x", in[0].Shape())
				return []*Node{LessThan(i, Const(g, limit))}
			}), NewClosure(g, func(g *Graph) []*Node {
				i, x := Parameter(g, "i", in[1].Shape()), Parameter(g, "x", in[0].Shape())
				return []*Node{AddScalar(i, 1), MulScalar(x, by)}
			}), in[1], in[0])
			return []*Node{r[1]}
		}, float32(1), int32(0))
		return out[0].Value().(float32)
	}
	for i, c := range []struct {
		limit int32
		by    float32
		want  float32
		hit   bool
	}{{3, 2, 8, false}, {3, 2, 8, true}, {4, 2, 16, false}, {3, 3, 27, false}} {
		if got := grow(c.limit, c.by); got != c.want || (*reports)[i].Cached != c.hit {
			t.Errorf("%d times %g: %g, want %g; %v", c.limit, c.by, got, c.want, (*reports)[i])
		}
	}
}

// TestSharedPlansRunAtOnce has several executors of one plan, which run at the same time on values of their own.
func TestSharedPlansRunAtOnce(t *testing.T) {
	b, reports := observed(t, "threads=2")
	var wg sync.WaitGroup
	for k := range 4 {
		wg.Go(func() {
			e, err := NewExec(b, func(in []*Node) []*Node {
				y := Tanh(Dot(in[0], in[0]).MatMul())
				return []*Node{ReduceAllSum(MulScalar(y, 2)), ConvertDType(ArgMax(y, 0, dtypes.Int32), dtypes.Float32)}
			})
			if err != nil {
				t.Error(err)
				return
			}
			defer e.Finalize()
			x := make([]float32, 64*64)
			for i := range x {
				x[i] = float32((i*7+k*13)%11) / 50
			}
			var want string
			for range 30 {
				out, err := e.Call(tensors.FromFlatDataAndDimensions(slices.Clone(x), 64, 64))
				if err != nil {
					t.Error(err)
					return
				}
				if got := fmt.Sprint(out[0].Value(), out[1].Value()); want == "" {
					want = got
				} else if got != want {
					t.Errorf("executor %d gives %s, then %s", k, want, got)
					return
				}
			}
		})
	}
	wg.Wait()
	if len(*reports) != 4 {
		t.Errorf("%d reports", len(*reports))
	}
}

func TestTheCacheIsBounded(t *testing.T) {
	b, reports := observed(t, "")
	run := func(n int) {
		x := make([]float32, n)
		out := call(t, b, func(in []*Node) []*Node { return []*Node{AddScalar(in[0], 1)} }, x)
		if got := tensors.MustCopyFlatData[float32](out[0]); len(got) != n || got[n-1] != 1 {
			t.Errorf("size %d gives %v", n, got)
		}
	}
	for n := range native.MaxPlans + 5 {
		run(n + 1)
	}
	run(native.MaxPlans + 5) // the last one is there
	run(1)                   // the first one is not
	if k := len(*reports); !(*reports)[k-2].Cached || (*reports)[k-1].Cached {
		t.Errorf("last: %v, first: %v", (*reports)[k-2], (*reports)[k-1])
	}
	if n := native.Plans(b); n != native.MaxPlans {
		t.Errorf("%d plans are kept, want %d", n, native.MaxPlans)
	}
}

func TestUnusedPlansHoldNoMemory(t *testing.T) {
	b := native.Open(t, "")
	e, err := NewExec(b, func(in []*Node) []*Node {
		y := Dot(in[0], in[0]).MatMul()
		return []*Node{Dot(y, y).MatMul()}
	})
	if err != nil {
		t.Fatal(err)
	}
	x := tensors.FromFlatDataAndDimensions(make([]float32, 100), 10, 10)
	if _, err := e.Call(x); err != nil {
		t.Fatal(err)
	}
	if native.ArenaBytes(b) == 0 {
		t.Fatal("the plan has no arena, so the test sees nothing")
	}
	e.Finalize()
	if n := native.ArenaBytes(b); n != 0 {
		t.Errorf("%d bytes are held by a plan that nobody uses", n)
	}
	affine(t, b, 1, 0, [][]float32{{1}}, [][]float32{{1}})
}

// TestIdlePlansLetGoOfWhatTheyRanOn looks at the heap after computations whose operands, results and intermediate values
// all take megabytes.
func TestIdlePlansLetGoOfWhatTheyRanOn(t *testing.T) {
	b := native.Open(t, "threads=2")
	const n, megabytes = 1 << 20, 4
	heap := func() float64 {
		var m runtime.MemStats
		for range 3 { // finalizers need a cycle of their own
			runtime.GC()
		}
		runtime.ReadMemStats(&m)
		return float64(m.HeapAlloc) / (1 << 20)
	}
	run := func(shape ...int) {
		e, err := NewExec(b, func(in []*Node) []*Node {
			x := in[0]
			y := Sin(Add(x, Transpose(Transpose(x, 0, 1), 0, 1)))
			z := Concatenate([]*Node{Tanh(y), Exp(y)}, 0)
			p := Pad(z, scalar(z.Graph(), 0), PadAxis{Start: 1, End: 2})
			return []*Node{p, Add(y, ReduceAndKeep(y, ReduceSum, 1)), Dot(Transpose(x, 0, 1), y).MatMul()}
		})
		if err != nil {
			t.Fatal(err)
		}
		defer e.Finalize()
		x := tensors.FromFlatDataAndDimensions(make([]float32, n), shape...)
		out, err := e.Call(x)
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range append(out, x) {
			if err := o.FinalizeAll(); err != nil {
				t.Fatal(err)
			}
		}
	}
	run(n/64, 64)
	native.DropFree(b)
	before := heap()
	for rows := n / 32; rows >= n/256; rows /= 2 {
		run(rows, n/rows)
	}
	native.DropFree(b)
	if more := heap() - before; more > megabytes {
		t.Errorf("four idle plans hold %.1f MB", more)
	}
}

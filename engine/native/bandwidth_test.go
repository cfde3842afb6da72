//go:build unix

package native_test

import (
	"fmt"
	"math"
	"slices"
	"syscall"
	"testing"

	"github.com/gomlx/compute"
	. "github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine/kernel"
	"github.com/lathe-ml/lathe/engine/native"
)

// fusions are loops over arrays beyond the cache. moved counts the arrays that must be read or written at least. Writing
// to memory that is not in cache reads it first, so an array written elsewhere than where it was read counts twice on
// the bus; it is counted once here, which is what a program sees.
var fusions = []struct {
	name   string
	inputs int
	donate int // of the inputs, the first ones
	moved  int
	f      func(in []*Node) []*Node
}{
	{"sum of 1", 1, 0, 1, func(in []*Node) []*Node { return []*Node{ReduceAllSum(in[0])} }},
	{"chain of 4", 1, 0, 2, func(in []*Node) []*Node {
		x := in[0]
		return []*Node{MaxScalar(AddScalar(Mul(AddScalar(x, 1), x), 2), 0.5)}
	}},
	{"chain of 4, in place", 1, 1, 2, func(in []*Node) []*Node {
		x := in[0]
		return []*Node{MaxScalar(AddScalar(Mul(AddScalar(x, 1), x), 2), 0.5)}
	}},
	{"add of 2", 2, 0, 3, func(in []*Node) []*Node { return []*Node{Add(in[0], in[1])} }},
	{"add of 2, in place", 2, 1, 3, func(in []*Node) []*Node { return []*Node{Add(in[0], in[1])} }},
	{"AdamW", 4, 3, 7, adamW},
	{"GELU", 1, 0, 2, func(in []*Node) []*Node {
		x := in[0]
		return []*Node{MulScalar(Mul(x, AddScalar(Erf(MulScalar(x, 1/math.Sqrt2)), 1)), 0.5)}
	}},
	{"softmax of rows of 256", 1, 0, 2, func(in []*Node) []*Node { return []*Node{Softmax(rowsOf256(in[0]), -1)} }},
	{"layer norm of rows of 256", 1, 0, 2, func(in []*Node) []*Node {
		x := rowsOf256(in[0])
		c := Sub(x, ReduceAndKeep(x, ReduceMean, -1))
		return []*Node{Div(c, Sqrt(AddScalar(ReduceAndKeep(Square(c), ReduceMean, -1), 1e-5)))}
	}},
}

func rowsOf256(x *Node) *Node { return Reshape(x, x.Shape().Size()/256, 256) }

// adamW is the update of learn/optim: parameter, moments and gradient in, the first three out, in place.
func adamW(in []*Node) []*Node {
	w, m, v, grad := in[0], in[1], in[2], in[3]
	g := w.Graph()
	step, rate := Add(scalar(g, 3), ReduceAllMax(Slice(grad, AxisRange(0, 1)))), scalar(g, 1e-3)
	m = Add(MulScalar(m, 0.9), MulScalar(grad, 0.1))
	v = Add(MulScalar(v, 0.999), MulScalar(Mul(grad, grad), 0.001))
	c1, c2 := OneMinus(Pow(scalar(g, 0.9), step)), OneMinus(Pow(scalar(g, 0.999), step))
	d := Div(Div(m, c1), AddScalar(Sqrt(Div(v, c2)), 1e-8))
	d = Add(d, MulScalar(w, 0.01))
	return []*Node{Sub(w, Mul(d, rate)), m, v}
}

// BenchmarkFusions prints what fused loops move to and from memory, and the median share of what reading alone reached just
// before.
func BenchmarkFusions(b *testing.B) {
	const n = 1 << 25 // 128 MB
	level, _ := kernel.Detect()
	for _, threads := range []int{1} {
		set := kernel.For(level)
		back := native.Open(b, fmt.Sprint("threads=", threads))
		for _, f := range fusions {
			b.Run(fmt.Sprintf("%s/threads=%d", f.name, threads), func(b *testing.B) {
				var in []*tensors.Tensor
				for range f.inputs {
					x := make([]float32, n)
					for i := range x {
						x[i] = float32(i%100)/100 + 0.1
					}
					in = append(in, tensors.FromFlatDataAndDimensions(x, n))
				}
				exec := compile(b, back, f.f, in)
				bufs := buffers(b, back, in)
				in = nil
				donate := make([]bool, len(bufs))
				for i := range f.donate {
					donate[i] = true
				}
				var rates, shares []float64
				step := func() {
					read := readBandwidth(set, n)
					begin := processorTime()
					out, err := exec.Execute(bufs, donate, 0)
					if err != nil {
						b.Fatal(err)
					}
					rate := float64(4*n*f.moved) / (processorTime() - begin)
					rates, shares = append(rates, rate), append(shares, rate/read)
					copy(bufs, out[:f.donate])
					for _, o := range out[f.donate:] {
						if err := o.Finalize(); err != nil {
							b.Fatal(err)
						}
					}
				}
				step()
				for b.Loop() {
					step()
				}
				slices.Sort(rates)
				slices.Sort(shares)
				b.ReportMetric(rates[len(rates)/2]/1e9, "GB/s")
				b.ReportMetric(100*shares[len(shares)/2], "%read")
				exec.Finalize()
				free(b, bufs)
			})
		}
	}
}

func free(t testing.TB, bufs []compute.Buffer) {
	for _, x := range bufs {
		if err := x.Finalize(); err != nil {
			t.Fatal(err)
		}
	}
}

// readBandwidth is kernel.ReadBandwidth by processor time, which other load disturbs less, of one pass.
func readBandwidth(set *kernel.Set, n int) float64 {
	if len(read.x) != n {
		read.x, read.sums = make([]float32, n), make([]float32, n/4096)
		for i := range read.x {
			read.x[i] = 1
		}
	}
	begin := processorTime()
	set.SumRows(read.sums, read.x, 4096)
	return float64(4*n) / (processorTime() - begin)
}

var read struct{ x, sums []float32 }

func processorTime() float64 {
	var u syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e9
}

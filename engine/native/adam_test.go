package native

import (
	"fmt"
	"math"
	"math/rand/v2"
	"testing"

	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"
)

// fusedAdams counts the instructions of kept plans that are steps of AdamW.
func fusedAdams(b *Backend) (n int) {
	for _, c := range b.plans.plans {
		for _, x := range c.idle {
			for _, g := range x.p.groups {
				if g.prog == nil {
					continue
				}
				for _, in := range g.prog.code {
					if in.code == opAdam {
						n++
					}
				}
			}
		}
	}
	return n
}

// TestAdamIsOneInstruction holds the fused update of two weights, written as learn/optim does, against double precision.
func TestAdamIsOneInstruction(t *testing.T) {
	const beta1, beta2, eps, decay = 0.9, 0.999, 1e-8, 0.05
	r := rand.New(rand.NewPCG(11, 1))
	for _, decayed := range []bool{false, true} {
		for _, n := range []int{7, 1000, 50001} {
			t.Run(fmt.Sprint(n, decayed), func(t *testing.T) {
				b := open(t, "threads=2")
				update := func(w, m, v, g, rate, c1, c2 *graph.Node) []*graph.Node {
					m = graph.Add(graph.MulScalar(m, beta1), graph.MulScalar(g, 1-beta1))
					v = graph.Add(graph.MulScalar(v, beta2), graph.MulScalar(graph.Mul(g, g), 1-beta2))
					d := graph.Div(graph.Div(m, c1), graph.AddScalar(graph.Sqrt(graph.Div(v, c2)), eps))
					if decayed {
						d = graph.Add(d, graph.MulScalar(w, decay))
					}
					return []*graph.Node{graph.Sub(w, graph.Mul(d, rate)), m, v}
				}
				exec, err := graph.NewExec(b, func(in []*graph.Node) []*graph.Node {
					return append(update(in[0], in[1], in[2], in[3], in[8], in[9], in[10]),
						update(in[4], in[5], in[6], in[7], in[8], in[9], in[10])...)
				})
				if err != nil {
					t.Fatal(err)
				}
				values, args := make([][]float32, 8), []any{}
				for i := range values {
					values[i] = make([]float32, n)
					for k := range values[i] {
						values[i][k] = float32(r.NormFloat64())
						if i%4 == 2 {
							values[i][k] *= values[i][k]
						}
					}
					args = append(args, tensors.FromValue(values[i]))
				}
				const rate, c1, c2 = float32(0.01), float32(0.19), float32(0.002)
				out, err := exec.Call(append(args, rate, c1, c2)...)
				if err != nil {
					t.Fatal(err)
				}
				if got := fusedAdams(b); got != 2 {
					t.Errorf("%d steps of AdamW are one instruction, want 2", got)
				}
				for i, q := range out {
					got := q.Value().([]float32)
					in := values[i/3*4:]
					for k := range got {
						w, m, v, g := float64(in[0][k]), float64(in[1][k]), float64(in[2][k]), float64(in[3][k])
						m = m*beta1 + g*(1-beta1)
						v = v*beta2 + g*g*(1-beta2)
						d := m / float64(c1) / (math.Sqrt(v/float64(c2)) + eps)
						if decayed {
							d += w * decay
						}
						want := [...]float64{w - d*float64(rate), m, v}[i%3]
						if math.Abs(float64(got[k])-want) > 1e-5*max(1, math.Abs(want)) {
							t.Fatalf("result %d, element %d: %g, want %g", i, k, got[k], want)
						}
					}
				}
			})
		}
	}
}

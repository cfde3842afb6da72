package norm

import (
	"math"
	"strings"
	"testing"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"

	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/internal/fixture"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/nn"
)

// The host's evaluation and the lowering are the same function.
func TestHostEvaluationIsTheLowering(t *testing.T) {
	const b, h, w, c = 2, 3, 2, 6
	compared := 0
	for seed := range uint64(80) {
		l := RandomLayer(rng.New(seed, "eval"), Space{Batch: true})
		if l.Check() != nil {
			continue
		}
		r := rng.New(seed, "map")
		x, v0, v1 := make([]float64, b*h*w*c), make([]float64, c), make([]float64, c)
		for _, v := range [][]float64{x, v0, v1} {
			for i := range v {
				v[i] = r.NormFloat64()
			}
		}
		want := l.eval(x, [4]int{b, h, w, c}, v0, v1, 3, 1e-5)
		op := GraphNorm{Layer: l, Groups: 3}
		e, err := engine.NewExec(enginetest.Backend(), func(in []*graph.Node) []*graph.Node {
			cur, node := map[string]*graph.Node{"v0": in[1], "v1": in[2]}, &nn.Node{Op: op, P: map[string]string{}}
			for _, s := range op.Params([]shapes.Shape{shapes.Make(dtypes.Float32, b, h, w, c)}) {
				node.P[s.Name] = s.Name
				if cur[s.Name] == nil {
					one := 1.
					if s.Name == "b" {
						one = 0
					}
					cur[s.Name] = graph.BroadcastToDims(graph.Scalar(in[0].Graph(), dtypes.Float64, one), c)
				}
			}
			env := &nn.Env{G: in[0].Graph(), Training: true, DType: dtypes.Float64, Param: func(s string) *graph.Node { return cur[s] }}
			return op.Lower(&nn.Ctx{Env: env, Node: node}, in[:1])
		})
		if err != nil {
			t.Fatal(err)
		}
		out, err := e.Call(fixture.Tensor(x, dtypes.Float64, b, h, w, c), fixture.Tensor(v0, dtypes.Float64, c), fixture.Tensor(v1, dtypes.Float64, c))
		if err != nil {
			t.Fatal(err)
		}
		e.Finalize()
		for i, got := range nn.Float64s(out[0]) {
			if !(math.Abs(want[i]) < 1e6) { // the portable backend loses what is not finite, and large values amplify rounding
				break
			}
			compared++
			if math.Abs(got-want[i]) > 1e-6*max(1, math.Abs(want[i])) {
				t.Errorf("%s: [%d] is %g on the host and %g as a graph", l.Formula(), i, want[i], got)
				break
			}
		}
	}
	if compared < 1000 {
		t.Errorf("only %d values were compared", compared)
	}
}

func TestBehaviourSeesTheFunction(t *testing.T) {
	g := func(nodes ...GNode) LayerGraph { return LayerGraph{nodes} }
	n := func(op string, in ...int) GNode { return GNode{Op: op, In: in} }
	plain, ok := g(n("tanh", 0)).behaviour(2, 1e-5)
	if !ok {
		t.Fatal("tanh is useless")
	}
	for name, l := range map[string]LayerGraph{
		"tanh(x+0)": g(n("add", 0, 1), n("tanh", 4)), "tanh(max(x,x))": g(n("max", 0, 0), n("tanh", 4)),
		"−tanh(x)": g(n("tanh", 0), n("neg", 4)), "tanh(−x)": g(n("neg", 0), n("tanh", 4)),
		"tanh(x·v1)": g(n("mul", 0, 3), n("tanh", 4)), "tanh(x)+v0": g(n("tanh", 0), n("add", 4, 2)),
	} {
		if text, ok := l.behaviour(2, 1e-5); !ok || text != plain {
			t.Errorf("%s behaves like another layer", name)
		}
	}
	for name, l := range map[string]LayerGraph{"tanh(tanh(x))": g(n("tanh", 0), n("tanh", 4)), "tanh(x)+v1": g(n("tanh", 0), n("add", 4, 3))} {
		if text, ok := l.behaviour(2, 1e-5); !ok || text == plain {
			t.Errorf("%s behaves like tanh", name)
		}
	}
	mean := GNode{Op: "mean", In: []int{0}, I: "bwh"}
	for name, l := range map[string]LayerGraph{"0·x": g(n("mul", 0, 1)), "mean of the batch": g(mean), "e^e^e^…": g(n("square", 0), n("exp", 4), n("exp", 5), n("exp", 6))} {
		if _, ok := l.behaviour(2, 1e-5); ok {
			t.Errorf("%s is useful", name)
		}
	}
	for name := range strings.FieldsSeq("b0 b2 s0 s1 s2 bn-relu gn-relu bn-silu relu square") {
		l, err := GraphOf(name)
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := l.behaviour(2, 1e-5); !ok {
			t.Errorf("%s is useless", name)
		}
	}
}

package detect

import (
	"fmt"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
)

// SoftNMSGraph is Soft-NMS inside a graph, for models that are served as one: k rounds of the same selection and
// rescaling as SoftNMS with TopK k, for a batch of B images or classes at a time.
//
//	boxes   [B, N, 4] corners (x1, y1, x2, y2), floating
//	scores  [B, N] of the same type, at least 0; pad with -1
//	index   [B, k] int32: rows of boxes in output order, -1 where nothing is left
//	kept    [B, k] the rescored values, 0 where nothing is left
//
// The rounds run in a While loop, which has no gradient. Boxes are not checked here: those that are not finite or have
// swapped corners give meaningless results. A Weight function of cfg is refused, as it cannot run in a graph. Like
// other graph building functions it panics on wrong shapes and settings; engine.NewExec and nn.Catch turn that into an
// error.
func SoftNMSGraph(boxes, scores *graph.Node, k int, cfg SoftNMSConfig) (index, kept *graph.Node) {
	cfg, err := cfg.resolved()
	if err != nil {
		panic(err)
	}
	bd, sd := boxes.Shape().Dimensions, scores.Shape().Dimensions
	switch {
	case cfg.Weight != nil:
		panic(fmt.Errorf("detect: a weight function cannot run in a graph; use a method"))
	case len(bd) != 3 || len(sd) != 2 || bd[0] != sd[0] || bd[1] != sd[1] || bd[2] != 4 || bd[1] < 1:
		panic(fmt.Errorf("detect: boxes %v with scores %v; want boxes [B, N, 4] with scores [B, N]", bd, sd))
	case !boxes.DType().IsFloat() || boxes.DType() != scores.DType():
		panic(fmt.Errorf("detect: boxes are %s and scores %s; want one floating type", boxes.DType(), scores.DType()))
	case k < 1 || k > bd[1]:
		panic(fmt.Errorf("detect: %d rounds for %d boxes; want 1 to %d", k, bd[1], bd[1]))
	}
	g, dtype := boxes.Graph(), boxes.DType()
	batch, n := bd[0], bd[1]
	// Two things to know about closures. GoMLX keeps one node per scalar value and graph (Scalar, OneMinus, ZerosLike,
	// ...), and one that was made in another function of the graph cannot be read in a closure, so all constants here are
	// made anew. And the go backend removes broadcasts in front of elementwise operations after closures have been
	// scheduled, so operands here are given axes of size 1 and left to broadcast themselves.
	constant := func(g *graph.Graph, v float64) *graph.Node {
		if dtype == dtypes.Float32 {
			return graph.Const(g, float32(v))
		}
		return graph.ConvertDType(graph.Const(g, v), dtype)
	}
	whole := func(g *graph.Graph, v int32, dims ...int) *graph.Node {
		return graph.BroadcastToDims(graph.Const(g, v), dims...)
	}
	pixel := 0.
	if cfg.PlusOne {
		pixel = 1
	}
	// The state: round, scores still at work (-1 once taken or dropped), result so far, and the boxes, which stay.
	initial := []*graph.Node{
		graph.Const(g, int32(0)),
		graph.Where(graph.LessThan(scores, constant(g, cfg.ScoreThreshold)), constant(g, -1), scores),
		whole(g, -1, batch, k),
		graph.BroadcastToDims(constant(g, 0), batch, k),
		boxes,
	}
	declare := func(g *graph.Graph) []*graph.Node {
		state := make([]*graph.Node, len(initial))
		for i, v := range initial {
			state[i] = graph.Parameter(g, fmt.Sprintf("state%d", i), v.Shape())
		}
		return state
	}
	cond := graph.NewClosure(g, func(g *graph.Graph) []*graph.Node {
		return []*graph.Node{graph.LessThan(declare(g)[0], graph.Const(g, int32(k)))}
	})
	body := graph.NewClosure(g, func(g *graph.Graph) []*graph.Node {
		state := declare(g)
		round, live, index, kept, boxes := state[0], state[1], state[2], state[3], state[4]
		zero, one, minus := constant(g, 0), constant(g, 1), constant(g, -1)
		side := func(x *graph.Node, i int) *graph.Node { // [B, rows, 4] -> [B, rows]
			return graph.Squeeze(graph.Slice(x, graph.AxisRange(), graph.AxisRange(), graph.AxisElem(i)), -1)
		}
		column := func(x *graph.Node) *graph.Node { return graph.InsertAxes(x, -1) } // [B] -> [B, 1]

		m := graph.ArgMax(live, -1, dtypes.Int32) // [B]; the lowest index on ties
		score := graph.ReduceMax(live, -1)        // [B]
		found := graph.GreaterOrEqual(score, zero)
		taken := graph.Equal(graph.Iota(g, shapes.Make(dtypes.Int32, batch, n), 1), column(m)) // [B, N]

		// The overlap of every box with the one taken.
		pick := graph.InsertAxes(graph.ConvertDType(taken, dtype), -1)          // [B, N, 1]
		best := graph.InsertAxes(graph.ReduceSum(graph.Mul(boxes, pick), 1), 1) // [B, 1, 4]
		extent := func(hi, lo *graph.Node) *graph.Node {                        // [B, N]
			return graph.Max(graph.Add(graph.Sub(hi, lo), constant(g, pixel)), zero)
		}
		area := func(x *graph.Node) *graph.Node {
			return graph.Mul(extent(side(x, 2), side(x, 0)), extent(side(x, 3), side(x, 1)))
		}
		inter := graph.Mul(
			extent(graph.Min(side(boxes, 2), side(best, 2)), graph.Max(side(boxes, 0), side(best, 0))),
			extent(graph.Min(side(boxes, 3), side(best, 3)), graph.Max(side(boxes, 1), side(best, 1))))
		union := graph.Sub(graph.Add(area(boxes), area(best)), inter)
		meet := graph.GreaterThan(inter, zero)
		iou := graph.Where(meet, graph.Div(inter, graph.Where(meet, union, one)), zero)

		rest, gone := live, graph.LogicalOr(taken, graph.LessThan(live, zero))
		over := graph.GreaterThan(iou, constant(g, cfg.IoUThreshold))
		switch cfg.Method {
		case Gaussian:
			rest = graph.Mul(live, graph.Exp(graph.Div(graph.Neg(graph.Mul(iou, iou)), constant(g, cfg.Sigma))))
		case Linear:
			rest = graph.Where(over, graph.Mul(live, graph.Sub(one, iou)), live)
		case Hard:
			gone = graph.LogicalOr(gone, over)
		}
		gone = graph.LogicalOr(gone, graph.LessThan(rest, constant(g, cfg.ScoreThreshold)))
		rest = graph.Where(gone, minus, rest)

		here := graph.Equal(graph.Iota(g, shapes.Make(dtypes.Int32, batch, k), 1), round)
		here = graph.LogicalAnd(here, column(found))
		index = graph.Where(here, column(m), index)
		kept = graph.Where(here, column(score), kept)
		return []*graph.Node{graph.Add(round, graph.Const(g, int32(1))), rest, index, kept, boxes}
	})
	final := graph.While(cond, body, initial...)
	return final[2], final[3]
}

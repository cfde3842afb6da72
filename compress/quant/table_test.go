package quant_test

import (
	"slices"
	"testing"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress/quant"
	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/nn"
)

func TestTableDecodesAlikeOnHostAndInTheGraph(t *testing.T) {
	w := &quant.TableWeights{
		Bits: 2, Shape: []int{3, 4}, Codes: []uint8{0, 1, 2, 0, 2, 2, 1, 0, 1, 1, 0, 2},
		Tables: [][]float32{{-1, 0, 2}, {-.5, .25, .75}}, Group: []uint8{1, 0, 1}, Scale: []float32{1, 2, 10},
	}
	want := []float32{-.5, .25, .75, -.5, 4, 4, 0, -2, 2.5, 2.5, -5, 7.5}
	if got := w.Decode(); !slices.Equal(got, want) {
		t.Errorf("on the host %v, want %v", got, want)
	}
	r, params, err := w.Store()
	if err != nil {
		t.Fatal(err)
	}
	b := nn.NewBuilder(0)
	x := b.Input("x", shapes.Make(dtypes.Float32, 1, 4))
	net, err := b.Finish(b.Add("fc", nn.Dense{Out: 3, NoBias: true}, x))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := net.Substitute("fc", r, params); err != nil {
		t.Fatal(err)
	}
	eye := tensors.FromFlatDataAndDimensions([]float32{1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}, 4, 4)
	out, err := net.Run(enginetest.Backend(), []*tensors.Tensor{eye})
	if err != nil {
		t.Fatal(err)
	}
	got := nn.Floats(out[0]) // [in, out]
	for o := range 3 {
		for i := range 4 {
			if got[i*3+o] != want[o*4+i] {
				t.Errorf("weight (%d,%d) is %v in the graph, want %v", o, i, got[i*3+o], want[o*4+i])
			}
		}
	}
	bytes := r.StoredBytes(func(local string) *nn.Param { return net.Param(net.Node("fc"), local) })
	if bytes != 3+4*(6+3)+1 { // 12 indices of 2 bits, 6 levels and 3 scales, 3 groups of 1 bit
		t.Errorf("%d bytes", bytes)
	}
}

func TestTableRefusesWhatDoesNotFit(t *testing.T) {
	good := func() *quant.TableWeights {
		return &quant.TableWeights{Bits: 1, Shape: []int{1, 2}, Codes: []uint8{0, 1}, Tables: [][]float32{{0, 1}}}
	}
	if err := good().Check(); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(w *quant.TableWeights){
		"index":  func(w *quant.TableWeights) { w.Codes[0] = 2 },
		"bits":   func(w *quant.TableWeights) { w.Bits = 9 },
		"levels": func(w *quant.TableWeights) { w.Tables[0] = []float32{0, 1, 2} },
		"shape":  func(w *quant.TableWeights) { w.Shape = []int{2, 2} },
		"group":  func(w *quant.TableWeights) { w.Group = []uint8{1} },
		"groups": func(w *quant.TableWeights) { w.Tables = append(w.Tables, []float32{0, 1}) },
		"scales": func(w *quant.TableWeights) { w.Scale = []float32{1, 2} },
	} {
		w := good()
		spoil(w)
		if _, _, err := w.Store(); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestNearestLevelTakesTheLowerOfTwo(t *testing.T) {
	got := quant.NearestLevel([]float32{-1, 0, 2}, []float32{-9, -.5, -.4, 0, 1, 1.1, 7})
	if want := []uint8{0, 0, 1, 1, 1, 2, 2}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestStraightThroughGradients(t *testing.T) {
	e, err := engine.NewExec(enginetest.Backend(), func(in []*graph.Node) []*graph.Node {
		x := in[0]
		lo, hi := graph.Scalar(x.Graph(), x.DType(), -1), graph.Scalar(x.Graph(), x.DType(), 2)
		r, c, s := quant.RoundSTE(x), quant.ClipSTE(x, lo, hi), quant.ScaleGradient(x, 3)
		out := []*graph.Node{r, c, s}
		for _, y := range []*graph.Node{r, c, s} {
			out = append(out, graph.Gradient(graph.ReduceAllSum(y), x)[0])
		}
		return out
	})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Finalize()
	out, err := e.Call([]float32{-1.5, -1, -.5, .5, 1.5, 2, 2.5, 1e6 + .25})
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range [][]float32{
		{-2, -1, 0, 0, 2, 2, 2, 1e6},
		{-1, -1, -.5, .5, 1.5, 2, 2, 2},
		{-1.5, -1, -.5, .5, 1.5, 2, 2.5, 1e6 + .25},
		{1, 1, 1, 1, 1, 1, 1, 1},
		{0, 1, 1, 1, 1, 1, 0, 0},
		{3, 3, 3, 3, 3, 3, 3, 3},
	} {
		if got := nn.Floats(out[i]); !slices.Equal(got, want) {
			t.Errorf("%d: got %v, want %v", i, got, want)
		}
	}
}

package detect

import (
	"math"
	"strings"
	"testing"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/internal/rng"
)

func TestGraphFormEqualsHostForm(t *testing.T) {
	const batch, n, k = 3, 60, 25
	r := rng.New(11, "boxes")
	var flat, scores []float64
	var boxes [][][4]float64
	for range batch {
		b, s := clustered(r, n)
		s[0], s[2] = s[1], 1e-5 // a tie, and one below the threshold
		boxes = append(boxes, b)
		for _, x := range b {
			flat = append(flat, x[:]...)
		}
		scores = append(scores, s...)
	}
	for name, cfg := range map[string]SoftNMSConfig{
		"gaussian": {}, "linear": {Method: Linear}, "hard": {Method: Hard, IoUThreshold: 0.1}, "none": {Method: None},
		"narrow": {Sigma: 0.05, ScoreThreshold: 0.3}, "plus one": {PlusOne: true}, "all": {Method: Linear, ScoreThreshold: Zero},
	} {
		exec, err := engine.NewExec(enginetest.Backend(), func(in []*graph.Node) []*graph.Node {
			index, kept := SoftNMSGraph(in[0], in[1], k, cfg)
			return []*graph.Node{index, kept}
		})
		if err != nil {
			t.Fatal(err)
		}
		out, err := exec.Call(tensors.FromFlatDataAndDimensions(flat, batch, n, 4), tensors.FromFlatDataAndDimensions(scores, batch, n))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		index, kept := tensors.MustCopyFlatData[int32](out[0]), tensors.MustCopyFlatData[float64](out[1])
		cfg.TopK = k
		for b := range batch {
			keep, rescored, err := SoftNMS(boxes[b], scores[b*n:(b+1)*n], cfg)
			if err != nil {
				t.Fatal(err)
			}
			for i := range k {
				at, v := index[b*k+i], kept[b*k+i]
				if i >= len(keep) {
					if at != -1 || v != 0 {
						t.Errorf("%s: place %d has box %d with %g, want none", name, i, at, v)
					}
					continue
				}
				if int(at) != keep[i] || math.Abs(v-rescored[i]) > 1e-12 {
					t.Errorf("%s: place %d has box %d with %g, want %d with %g", name, i, at, v, keep[i], rescored[i])
				}
			}
		}
		exec.Finalize()
	}
}

func TestGraphFormRefuses(t *testing.T) {
	call := func(k int, cfg SoftNMSConfig, boxes, scores []int) error {
		zeros := func(dims []int) *tensors.Tensor {
			n := 1
			for _, d := range dims {
				n *= d
			}
			return tensors.FromFlatDataAndDimensions(make([]float32, n), dims...)
		}
		exec, err := engine.NewExec(enginetest.Backend(), func(in []*graph.Node) []*graph.Node {
			index, _ := SoftNMSGraph(in[0], in[1], k, cfg)
			return []*graph.Node{graph.ConvertDType(index, dtypes.Int32)}
		})
		if err != nil {
			t.Fatal(err)
		}
		defer exec.Finalize()
		_, err = exec.Call(zeros(boxes), zeros(scores))
		return err
	}
	for want, err := range map[string]error{
		"want boxes [B, N, 4]":        call(1, SoftNMSConfig{}, []int{2, 4}, []int{2}),
		"5 rounds for 3 boxes":        call(5, SoftNMSConfig{}, []int{1, 3, 4}, []int{1, 3}),
		"sigma is -1":                 call(1, SoftNMSConfig{Sigma: -1}, []int{1, 3, 4}, []int{1, 3}),
		"cannot run in a graph":       call(1, SoftNMSConfig{Weight: func(float64) float64 { return 1 }}, []int{1, 3, 4}, []int{1, 3}),
		"boxes [1 3 4] with scores [": call(1, SoftNMSConfig{}, []int{1, 3, 4}, []int{1, 4}),
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want an error with %q", err, want)
		}
	}
}

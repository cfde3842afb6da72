package zoo

import (
	"math"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/fold"
	"github.com/lathe-ml/lathe/nn/onnx"
)

// Swin-T has 28,288,354 parameters (Liu et al.'s released model; its buffers of indices and masks are constants here).
func TestSwinTinyHasTheParametersOfTheOriginal(t *testing.T) {
	if testing.Short() {
		t.Skip("28 million parameters")
	}
	net, err := Swin(SwinOptions{})
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for p := range net.Params.All() {
		if p.Role != nn.Constant {
			n += p.Value.Shape().Size()
		}
	}
	if n != 28_288_354 {
		t.Errorf("%d parameters", n)
	}
}

var smallSwin = SwinOptions{Size: 16, Channels: 1, Patch: 2, Dim: 8, Depths: []int{2, 2}, Heads: []int{2, 4}, Window: 4, MLP: 2, Classes: 10}

func TestSwinShiftsItsWindows(t *testing.T) {
	net, err := Swin(smallSwin)
	if err != nil {
		t.Fatal(err)
	}
	x := tensors.FromFlatDataAndDimensions(nn.Floats(drawn(1, 2, 16, 16, 1)), 2, 16, 16, 1)
	out, err := net.Run(enginetest.Backend(), []*tensors.Tensor{x}, "stage.0.1.attn.softmax.probs", "stage.0.0.attn.softmax.probs")
	if err != nil {
		t.Fatal(err)
	}
	if net.Node("stage.0.0.attn.shift") != nil || net.Node("stage.1.1.attn.shift") != nil {
		t.Error("a first block, or one whose window is the map, is shifted")
	}
	// Map of 8×8 tokens, windows of 4, shifted by 2: window w of 4, token i of 16 is the token of the map at (row, col).
	probs := nn.Floats(out[1]) // [2·4, 2, 16, 16]
	where := func(w, i int) (r, c int) { return (w/2*4 + i/4 + 2) % 8, (w%2*4 + i%4 + 2) % 8 }
	for w := range 4 {
		for q := range 16 {
			for k := range 16 {
				r1, c1 := where(w, q)
				r2, c2 := where(w, k)
				near := max(r1-r2, r2-r1) < 4 && max(c1-c2, c2-c1) < 4
				if p := probs[((w*2)*16+q)*16+k]; near != (p > 1e-20) {
					t.Fatalf("token (%d, %d) gives (%d, %d) weight %g", r1, c1, r2, c2, p)
				}
			}
		}
	}
	for _, p := range nn.Floats(out[2]) {
		if p < 1e-20 {
			t.Fatal("a window that is not shifted hides tokens")
		}
	}
}

func TestRollIsUndone(t *testing.T) {
	b := nn.NewBuilder(0)
	x := b.Input("x", f32(1, 9, 2))
	y := roll(b, "a", x, 3, 1)
	net, err := b.Finish(y, roll(b, "b", y, 3, 2))
	if err != nil {
		t.Fatal(err)
	}
	v := make([]float32, 18)
	for i := range v {
		v[i] = float32(i / 2)
	}
	out, err := net.Run(enginetest.Backend(), []*tensors.Tensor{tensors.FromFlatDataAndDimensions(v, 1, 9, 2)})
	if err != nil {
		t.Fatal(err)
	}
	if got := nn.Floats(out[0]); got[0] != 4 || got[2] != 5 || got[4] != 3 || got[16] != 0 {
		t.Errorf("%v", got)
	}
	if !slices.Equal(nn.Floats(out[1]), v) {
		t.Errorf("%v", nn.Floats(out[1]))
	}
}

// SLAB-Swin with a norm that folds: none is left, also that of the patches, which goes into their convolution.
func TestSLABSwinFoldsAndExports(t *testing.T) {
	o := smallSwin
	o.LinearStages, o.Norm, o.DropPath = 1, nn.BatchNorm{}, .1
	net, err := Swin(o)
	if err != nil {
		t.Fatal(err)
	}
	if net.Node("stage.0.1.attn.dwc") == nil || net.Node("stage.0.1.attn.shift") != nil || net.Node("stage.1.0.attn.softmax.probs") == nil {
		t.Error("linear attention is not where it should be")
	}
	for _, x := range net.Nodes { // statistics of their own
		if p := net.Param(x, "mean"); p != nil {
			v := nn.Floats(drawn(uint64(len(x.Name)), p.Value.Shape().Size()))
			if err := p.SetData(v); err != nil {
				t.Fatal(err)
			}
		}
	}
	x := tensors.FromFlatDataAndDimensions(nn.Floats(drawn(1, 2, 16, 16, 1)), 2, 16, 16, 1)
	want, err := net.Run(enginetest.Backend(), []*tensors.Tensor{x})
	if err != nil {
		t.Fatal(err)
	}
	r, err := fold.Norms(net)
	if err != nil || len(r.Folded) != 11 || len(r.Explicit)+len(r.Kept) > 0 {
		t.Fatalf("%+v, %v", r, err)
	}
	file := filepath.Join(t.TempDir(), "swin.onnx")
	if err := onnx.WriteFile(file, net, onnx.WriteOptions{}); err != nil {
		t.Fatal(err)
	}
	back, err := onnx.ReadFile(file, onnx.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []*nn.Network{net, back} {
		got, err := n.Run(enginetest.Backend(), []*tensors.Tensor{x})
		if err != nil {
			t.Fatal(err)
		}
		// Folding rounds differently, which this network of drawn statistics makes a thousand times larger: up to 3e-4 is seen.
		near(t, "logits", nn.Float64s(got[0]), nn.Float64s(want[0]), 1e-3)
	}
}

func TestSwinRefusals(t *testing.T) {
	for want, change := range map[string]func(*SwinOptions){
		"want at least 1":                 func(o *SwinOptions) { o.Dim = -8 },
		"2 stages with heads for 1":       func(o *SwinOptions) { o.Heads = []int{2} },
		"patch 3 must divide":             func(o *SwinOptions) { o.Patch = 3 },
		"linear attention in 3 of 2":      func(o *SwinOptions) { o.LinearStages = 3 },
		"drop path NaN":                   func(o *SwinOptions) { o.DropPath = math.NaN() },
		"windows of side 3 do not divide": func(o *SwinOptions) { o.Window = 3 },
		"map of 5×5 cannot be merged":     func(o *SwinOptions) { o.Size, o.Window = 10, 5 },
		"divisible by 3 heads":            func(o *SwinOptions) { o.Heads = []int{3, 3} },
	} {
		o := smallSwin
		change(&o)
		if _, err := Swin(o); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q, got %v", want, err)
		}
	}
}

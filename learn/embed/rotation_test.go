package embed

import (
	"context"
	"math"
	"slices"
	"strings"
	"testing"

	"gonum.org/v1/gonum/mat"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/internal/rng"
)

// pictures of two kinds with an upright: a bright bar at the top, or a bright corner at the top left.
func pictures(n int) *data.Images {
	m := &data.Images{N: n, H: 8, W: 8, C: 1, Pixels: make([]uint8, n*64), Labels: make([]int32, n), ClassNames: []string{"bar", "corner"}}
	r := rng.New(1, "pictures")
	for i := range n {
		m.Labels[i] = int32(i % 2)
		px := m.At(i)
		for y := range 8 {
			for x := range 8 {
				if y < 2 && (i%2 == 0 || x < 4) {
					px[y*8+x] = 200
				}
				px[y*8+x] += uint8(r.IntN(50))
			}
		}
	}
	return m
}

func TestRotationLearnsToEmbedWithoutLabels(t *testing.T) {
	b, err := engine.Open("go")
	if err != nil {
		t.Fatal(err)
	}
	ctx, m := context.Background(), pictures(80)
	o := RotationOptions{Dim: 8, Epochs: 6, Batch: 20, Seed: 3}
	train := func() *Rotation {
		net, err := RotationNetwork(8, 1, o)
		if err != nil {
			t.Fatal(err)
		}
		if err := TrainRotation(ctx, b, net, m, o); err != nil {
			t.Fatal(err)
		}
		r, err := NewRotation(b, net)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	r := train()
	defer r.Close()
	if a, err := r.Accuracy(ctx, m); err != nil || a < 0.9 {
		t.Errorf("rotation accuracy %g (%v), want above 0.9", a, err)
	}
	e, err := r.Embed(ctx, m)
	if err != nil {
		t.Fatal(err)
	}
	if n, d := e.Dims(); n != 80 || d != 8 || r.Dim() != 8 {
		t.Fatalf("embeddings are [%d %d]", n, d)
	}
	for i := range 80 {
		if n := mat.Norm(e.RowView(i), 2); math.Abs(n-1) > 1e-6 {
			t.Errorf("row %d has length %g", i, n)
		}
	}
	again := train()
	defer again.Close()
	if e2, err := again.Embed(ctx, m); err != nil || !mat.Equal(e, e2) {
		t.Errorf("a second training of the same seed embeds otherwise (%v)", err)
	}

	if _, err := r.Embed(ctx, &data.Images{N: 1, H: 9, W: 9, C: 1}); err == nil || !strings.Contains(err.Error(), "takes 8×8×1") {
		t.Errorf("another size: %v", err)
	}
	if err := TrainRotation(ctx, b, r.net, &data.Images{N: 1, H: 8, W: 9, C: 1}, o); err == nil || !strings.Contains(err.Error(), "square") {
		t.Errorf("not square: %v", err)
	}
	if _, err := RotationNetwork(2, 1, o); err == nil {
		t.Error("a side of 2 must be refused")
	}
}

func TestRotationsAreQuarterTurnsClockwise(t *testing.T) {
	m := &data.Images{N: 1, H: 2, W: 2, C: 1, Max: 4, Pixels: []uint8{1, 2, 3, 4}}
	out := rotations(m, []int{0})
	var got []float32
	var turns []int32
	out[0].MustConstFlatData(func(f any) { got = slices.Clone(f.([]float32)) })
	out[1].MustConstFlatData(func(f any) { turns = slices.Clone(f.([]int32)) })
	want := []float32{1, 2, 3, 4, 3, 1, 4, 2, 4, 3, 2, 1, 2, 4, 1, 3}
	for i := range want {
		want[i] /= 4
	}
	if !slices.Equal(got, want) || !slices.Equal(turns, []int32{0, 1, 2, 3}) {
		t.Errorf("got %v %v, want %v", got, turns, want)
	}
}

package detect

import (
	"context"
	"errors"
	"image"
	"image/color"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/nn"
)

// blobs are items of two classes: filled squares and crosses, with a black border.
func blobs() *data.Images {
	m := &data.Images{N: 8, H: 28, W: 28, C: 1, ClassNames: []string{"square", "cross"}, Pixels: make([]uint8, 8*28*28)}
	for i := range m.N {
		m.Labels = append(m.Labels, int32(i%2))
		for y := 4 + i/2; y < 24; y++ {
			for x := 3; x < 25-i/2; x++ {
				if i%2 == 0 || abs(x-14) < 4 || abs(y-14) < 4 {
					m.Pixels[i*28*28+y*28+x] = 200
				}
			}
		}
	}
	return m
}

func abs(x int) int { return max(x, -x) }

func TestScenesAreAsDescribed(t *testing.T) {
	crowded, err := Scenes(blobs(), 60, SceneConfig{}, 1)
	if err != nil {
		t.Fatal(err)
	}
	counts, overlaps := map[int]int{}, []float64{}
	for i, s := range crowded {
		n := len(s.Objects)
		counts[n]++
		pairs := 0
		for a := range s.Objects {
			b := s.Objects[a].Box
			if b.X < 0 || b.Y < 0 || b.X+b.W > 96 || b.Y+b.H > 96 || b.W > 36 || b.H > 36 {
				t.Errorf("scene %d: box %v leaves the scene or is too large", i, b)
			}
			for c := range a {
				switch o := IoU(b.Corners(), s.Objects[c].Box.Corners(), false); {
				case o >= 0.3 && o <= 0.65 && s.Objects[a].Class == s.Objects[c].Class:
					pairs++
					overlaps = append(overlaps, o)
				case o >= 0.1:
					t.Errorf("scene %d: two objects that are no pair overlap by %g", i, o)
				}
			}
		}
		if pairs != int(math.Round(float64(n)/4)) {
			t.Errorf("scene %d: %d pairs among %d objects", i, pairs, n)
		}
		if slices.Max(s.Pixels) > 1 || slices.Min(s.Pixels) < 0 || slices.Max(s.Pixels) == 0 {
			t.Errorf("scene %d: pixels from %g to %g", i, slices.Min(s.Pixels), slices.Max(s.Pixels))
		}
	}
	for n := range counts {
		if n < 6 || n > 12 {
			t.Errorf("a scene has %d objects", n)
		}
	}
	mean := 0.
	for _, o := range overlaps {
		mean += o / float64(len(overlaps))
	}
	if math.Abs(mean-0.475) > 0.05 { // uniform on [0.3, 0.65]; some 130 pairs, standard error 0.01
		t.Errorf("pairs overlap by %.3f on average, want about 0.475", mean)
	}

	sparse, err := Scenes(blobs(), 30, SceneConfig{Sparse: true}, 1)
	if err != nil {
		t.Fatal(err)
	}
	for i, s := range sparse {
		if n := len(s.Objects); n < 3 || n > 5 {
			t.Errorf("sparse scene %d has %d objects", i, n)
		}
		for a := range s.Objects {
			for c := range a {
				if o := IoU(s.Objects[a].Box.Corners(), s.Objects[c].Box.Corners(), false); o >= 0.05 {
					t.Errorf("sparse scene %d: overlap %g", i, o)
				}
			}
		}
	}

	again, err := Scenes(blobs(), 3, SceneConfig{}, 1)
	if err != nil {
		t.Fatal(err)
	}
	for i := range again {
		if !slices.Equal(again[i].Pixels, crowded[i].Pixels) || !slices.Equal(again[i].Objects, crowded[i].Objects) {
			t.Errorf("scene %d depends on the number of scenes", i)
		}
	}
}

func TestBoxesAreTight(t *testing.T) {
	scenes, err := Scenes(blobs(), 10, SceneConfig{MinObjects: 1, MaxObjects: 1, Sparse: true}, 3)
	if err != nil {
		t.Fatal(err)
	}
	for i, s := range scenes {
		x0, y0, x1, y1 := 96, 96, 0, 0
		for k, v := range s.Pixels {
			if v > 0 {
				x0, y0, x1, y1 = min(x0, k%96), min(y0, k/96), max(x1, k%96+1), max(y1, k/96+1)
			}
		}
		if want := (Rect{float64(x0), float64(y0), float64(x1 - x0), float64(y1 - y0)}); s.Objects[0].Box != want {
			t.Errorf("scene %d: box %v, the item fills %v", i, s.Objects[0].Box, want)
		}
	}
}

func TestScenesRefuse(t *testing.T) {
	for name, c := range map[string]struct {
		items *data.Images
		cfg   SceneConfig
		want  string
	}{
		"no items": {&data.Images{}, SceneConfig{}, "at least one grey item"},
		"nil":      {nil, SceneConfig{}, "at least one grey item"},
		"range":    {blobs(), SceneConfig{MinObjects: 5, MaxObjects: 2}, "rising range"},
		"size":     {blobs(), SceneConfig{Size: 16}, "4 <= smallest"},
		"no room":  {blobs(), SceneConfig{MinObjects: 60, MaxObjects: 60, Sparse: true}, "no room"},
	} {
		if _, err := Scenes(c.items, 1, c.cfg, 0); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want an error with %q", name, err, c.want)
		}
	}
}

func TestSceneFromScalesObjects(t *testing.T) {
	img := image.NewRGBA(image.Rect(10, 10, 110, 60))
	for y := 10; y < 60; y++ {
		for x := 10; x < 60; x++ {
			img.Set(x, y, color.RGBA{255, 0, 0, 255})
		}
	}
	s, err := SceneFrom(img, []Object{{Class: 1, Box: Rect{10, 5, 20, 30}}}, 20, 40, 3)
	if err != nil {
		t.Fatal(err)
	}
	if want := (Rect{4, 2, 8, 12}); s.Objects[0].Box != want {
		t.Errorf("box is %v, want %v", s.Objects[0].Box, want)
	}
	if len(s.Pixels) != 20*40*3 || s.Pixels[0] < 0.99 || s.Pixels[1] > 0.01 || s.Pixels[3*39] > 0.01 {
		t.Errorf("pixels start with %v", s.Pixels[:3])
	}
	for _, c := range []struct{ h, w, c int }{{0, 4, 1}, {4, 4, 2}} {
		if _, err := SceneFrom(img, nil, c.h, c.w, c.c); err == nil {
			t.Errorf("%v is not refused", c)
		}
	}
	if _, err := SceneFrom(image.NewGray(image.Rect(0, 0, 0, 0)), nil, 4, 4, 1); err == nil {
		t.Error("an empty picture is not refused")
	}
}

func TestCellsBelongToTheSmallestObjectAroundThem(t *testing.T) {
	d, err := NewDetector(DetectorConfig{Height: 32, Width: 32, Classes: 3}, 0)
	if err != nil {
		t.Fatal(err)
	}
	class, side := make([]int32, 64), make([]float32, 256)
	d.assign([]Object{{Class: 0, Box: Rect{0, 0, 32, 32}}, {Class: 2, Box: Rect{8, 8, 12, 12}}}, class, side)
	// Cell (3, 3) has its centre at 14, the middle of the small box; cell (2, 2), at 10, is outside its central half
	// (11 to 17) and inside the large one's (8 to 24).
	for _, c := range []struct {
		x, y int
		want int32
		side []float32
	}{{3, 3, 2, []float32{6, 6, 6, 6}}, {2, 2, 0, []float32{10, 10, 22, 22}}, {0, 0, -1, nil}, {6, 3, -1, nil}} {
		i := c.y*8 + c.x
		if class[i] != c.want || c.side != nil && !slices.Equal(side[4*i:4*i+4], c.side) {
			t.Errorf("cell (%d, %d) has class %d and sides %v, want %d and %v", c.x, c.y, class[i], side[4*i:4*i+4], c.want, c.side)
		}
	}
}

func TestGIoU(t *testing.T) {
	exec, err := engine.NewExec(enginetest.Backend(), func(in []*graph.Node) []*graph.Node { return []*graph.Node{GIoUSides(in[0], in[1])} })
	if err != nil {
		t.Fatal(err)
	}
	defer exec.Finalize()
	// Equal; half of it; a cross whose hull is four times as large as each arm.
	out, err := exec.Call([][]float64{{1, 1, 1, 1}, {2, 2, 2, 2}, {2, 0.5, 2, 0.5}}, [][]float64{{1, 1, 1, 1}, {2, 2, 0, 2}, {0.5, 2, 0.5, 2}})
	if err != nil {
		t.Fatal(err)
	}
	got := tensors.MustCopyFlatData[float64](out[0])
	for i, want := range []float64{1, 0.5, 1./7 - 9./16} {
		if math.Abs(got[i]-want) > 1e-6 {
			t.Errorf("GIoU %d is %g, want %g", i, got[i], want)
		}
	}
}

// tinyDetector is one that learns blobs in seconds.
func tinyDetector(t *testing.T) *Detector {
	t.Helper()
	d, err := NewDetector(DetectorConfig{Height: 48, Width: 48, Classes: 2, Widths: []int{8, 16, 16}}, 1)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestDetectorLearnsItsScenes(t *testing.T) {
	ctx := context.Background()
	scenes, err := Scenes(blobs(), 16, SceneConfig{Size: 48, MinObjects: 1, MaxObjects: 2, Sparse: true}, 5)
	if err != nil {
		t.Fatal(err)
	}
	d := tinyDetector(t)
	var first, last learn.Info
	_, err = d.Train(ctx, enginetest.Backend(), scenes, TrainOptions{Steps: 120, Batch: 8, LR: 1e-2, Progress: func(done, _ int, info learn.Info) {
		if done == 1 {
			first = info
		}
		last = info
	}})
	if err != nil {
		t.Fatal(err)
	}
	if last.Loss > 0.5*first.Loss {
		t.Errorf("loss fell from %g to %g only", first.Loss, last.Loss)
	}
	raw, err := d.Detect(ctx, enginetest.Backend(), scenes, DetectOptions{Batch: 5})
	if err != nil {
		t.Fatal(err)
	}
	kept, err := Suppress(raw, SoftNMSConfig{})
	if err != nil {
		t.Fatal(err)
	}
	r, err := EvaluateCOCO(Ground(scenes), kept, COCOConfig{Images: len(scenes), Classes: 2})
	if err != nil {
		t.Fatal(err)
	}
	if r.AP50 < 0.5 {
		t.Errorf("AP50 on the scenes it was trained on is %.2f", r.AP50)
	}
	few, err := d.Detect(ctx, enginetest.Backend(), scenes[:1], DetectOptions{Top: 3, Threshold: Zero})
	if err != nil || len(few) != 3*2 {
		t.Errorf("the best three cells give %d detections (%v), want both classes of each", len(few), err)
	}
}

func TestDetectorStartsAtItsPrior(t *testing.T) {
	d := tinyDetector(t)
	pixels := make([]float32, 48*48)
	r := rng.New(1, "pixels")
	for i := range pixels {
		pixels[i] = r.Float32()
	}
	out, err := d.Net.Run(enginetest.Backend(), []*tensors.Tensor{tensors.FromFlatDataAndDimensions(pixels, 1, 48, 48, 1)})
	if err != nil {
		t.Fatal(err)
	}
	for i, v := range nn.Floats(out[0]) {
		if p := 1 / (1 + math.Exp(-float64(v))); i%6 < 2 && (p < 0.001 || p > 0.1) {
			t.Fatalf("an untrained class score is %g, want about 0.01", p)
		}
	}
}

func TestInterruptedTrainingGoesOn(t *testing.T) {
	scenes, err := Scenes(blobs(), 8, SceneConfig{Size: 48, MinObjects: 1, MaxObjects: 2, Sparse: true}, 5)
	if err != nil {
		t.Fatal(err)
	}
	whole, parts := tinyDetector(t), tinyDetector(t)
	o := TrainOptions{Steps: 7, Batch: 4, Checkpoint: t.TempDir() + "/detector.ckpt"}
	if _, err := whole.Train(context.Background(), enginetest.Backend(), scenes, o); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	o.Progress = func(done, _ int, _ learn.Info) {
		if done == 3 {
			cancel()
		}
	}
	if _, err := parts.Train(ctx, enginetest.Backend(), scenes, o); !errors.Is(err, context.Canceled) {
		t.Fatalf("an interrupted training returns %v", err)
	}
	parts = tinyDetector(t)
	if _, err := parts.Train(context.Background(), enginetest.Backend(), scenes, o); err != nil {
		t.Fatal(err)
	}
	for p := range whole.Net.Params.All() {
		if !slices.Equal(p.Data(), parts.Net.Params.Get(p.Name).Data()) {
			t.Errorf("parameter %q differs after an interruption", p.Name)
		}
	}
}

func TestDetectorRefuses(t *testing.T) {
	ctx := context.Background()
	for _, cfg := range []DetectorConfig{{Height: 30}, {Width: -4}, {Classes: -1}, {Channels: -1}, {Widths: []int{8}}, {Widths: []int{8, 0}}} {
		if _, err := NewDetector(cfg, 0); err == nil {
			t.Errorf("%+v is not refused", cfg)
		}
	}
	d := tinyDetector(t)
	good := Scene{Pixels: make([]float32, 48*48)}
	for want, scenes := range map[string][]Scene{
		"scene 1: 5 pixel values": {good, {Pixels: make([]float32, 5)}},
		"class 2 is not in 0..1":  {{Pixels: good.Pixels, Objects: []Object{{Class: 2, Box: Rect{0, 0, 9, 9}}}}},
		"negative size":           {{Pixels: good.Pixels, Objects: []Object{{Box: Rect{0, 0, -9, 9}}}}},
		"batch":                   {good},
	} {
		if _, err := d.Train(ctx, enginetest.Backend(), scenes, TrainOptions{Steps: 1}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want an error with %q", err, want)
		}
	}
	if _, err := d.Detect(ctx, enginetest.Backend(), []Scene{{}}, DetectOptions{}); err == nil || !strings.Contains(err.Error(), "scene 0") {
		t.Errorf("an empty scene gives %v", err)
	}
	if _, err := d.Detect(ctx, enginetest.Backend(), nil, DetectOptions{Top: -1}); err == nil {
		t.Error("a negative number of cells is not refused")
	}
	if dets, err := d.Detect(ctx, enginetest.Backend(), nil, DetectOptions{}); err != nil || len(dets) != 0 {
		t.Errorf("no scenes give %v, %v", dets, err)
	}
}

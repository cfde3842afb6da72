package detect

import (
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/lathe-ml/lathe/internal/rng"
)

func TestPerfectDetectionsScoreOne(t *testing.T) {
	gt := []GroundTruth{
		{ID: 1, Image: 0, Class: 0, Box: Rect{0, 0, 10, 10}},
		{ID: 2, Image: 0, Class: 0, Box: Rect{3, 3, 10, 10}},
		{ID: 3, Image: 1, Class: 1, Box: Rect{5, 5, 200, 200}},
	}
	var dt []Detection
	for _, g := range gt {
		dt = append(dt, Detection{Image: g.Image, Class: g.Class, Box: g.Box, Score: 0.5})
	}
	r, err := EvaluateCOCO(gt, dt, COCOConfig{})
	if err != nil {
		t.Fatal(err)
	}
	if math.Abs(r.AP-1) > 1e-12 || r.AR[2] != 1 || math.Abs(r.APSmall-1) > 1e-12 || r.APMedium != -1 || math.Abs(r.APLarge-1) > 1e-12 {
		t.Errorf("got %+v, want 1 and no medium objects", r)
	}
}

func TestOneFalseBeforeOneTrue(t *testing.T) {
	gt := []GroundTruth{{Box: Rect{0, 0, 10, 10}}}
	dt := []Detection{{Box: Rect{50, 50, 10, 10}, Score: 0.9}, {Box: Rect{0, 0, 10, 10}, Score: 0.8}}
	r, err := EvaluateCOCO(gt, dt, COCOConfig{})
	if err != nil {
		t.Fatal(err)
	}
	if math.Abs(r.AP50-0.5) > 1e-12 || r.AR[0] != 0 || r.AR[1] != 1 {
		t.Errorf("AP50 %g, AR1 %g, AR10 %g; want 0.5, 0, 1", r.AP50, r.AR[0], r.AR[1])
	}
}

// scatter draws objects and detections that partly hit them.
func scatter(r *rand.Rand, images, classes int) (gt []GroundTruth, dt []Detection) {
	for i := range images {
		for range 12 {
			b := Rect{100 * r.Float64(), 100 * r.Float64(), 10 + 60*r.Float64(), 10 + 60*r.Float64()}
			c := r.IntN(classes)
			gt = append(gt, GroundTruth{ID: len(gt) + 1, Image: i, Class: c, Box: b, Crowd: r.IntN(8) == 0})
			for range r.IntN(4) {
				j := func(v float64) float64 { return v * (1 + 0.2*(r.Float64()-0.5)) }
				dt = append(dt, Detection{Image: i, Class: c, Box: Rect{j(b.X), j(b.Y), j(b.W), j(b.H)}, Score: r.Float64()})
			}
		}
	}
	return gt, dt
}

func TestAPDependsOnTheOrderOfScoresOnly(t *testing.T) {
	gt, dt := scatter(rng.New(1, "scatter"), 6, 3)
	want, err := EvaluateCOCO(gt, dt, COCOConfig{})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range []func(float64) float64{math.Exp, math.Sqrt, func(s float64) float64 { return -1 / (s + 1) }} {
		mapped := slices.Clone(dt)
		for i := range mapped {
			mapped[i].Score = f(mapped[i].Score)
		}
		got, err := EvaluateCOCO(gt, mapped, COCOConfig{})
		if err != nil {
			t.Fatal(err)
		}
		if got.AP != want.AP || !slices.Equal(got.PerClass, want.PerClass) || !slices.Equal(got.AR, want.AR) {
			t.Errorf("AP changed from %g to %g under a rising map of the scores", want.AP, got.AP)
		}
	}
	for _, workers := range []int{1, 2, 7} {
		if got, err := EvaluateCOCO(gt, dt, COCOConfig{Workers: workers}); err != nil || got.AP != want.AP {
			t.Errorf("%d workers: AP %g, want %g (%v)", workers, got.AP, want.AP, err)
		}
	}
}

func TestAbsentClassesAreLeftOut(t *testing.T) {
	gt := []GroundTruth{{Class: 2, Box: Rect{0, 0, 10, 10}}}
	dt := []Detection{{Class: 2, Box: Rect{0, 0, 10, 10}, Score: 0.9}, {Class: 0, Box: Rect{0, 0, 10, 10}, Score: 0.9}}
	r, err := EvaluateCOCO(gt, dt, COCOConfig{Images: 3, Classes: 4})
	if err != nil {
		t.Fatal(err)
	}
	if math.Abs(r.AP-1) > 1e-12 || r.PerClass[0] != -1 || r.PerClass[1] != -1 || math.Abs(r.PerClass[2]-1) > 1e-12 {
		t.Errorf("AP %g by class %v; want 1 for class 2 alone", r.AP, r.PerClass)
	}
	if r, err := EvaluateCOCO(nil, dt, COCOConfig{}); err != nil || r.AP != -1 || r.AR[0] != -1 {
		t.Errorf("no ground truth gives %v, %v; want -1", r, err)
	}
	if r, err := EvaluateCOCO(gt, nil, COCOConfig{}); err != nil || r.AP != 0 || r.AR[2] != 0 {
		t.Errorf("no detections give %v, %v; want 0", r, err)
	}
	if r, err := EvaluateCOCO(nil, nil, COCOConfig{}); err != nil || r.AP != -1 {
		t.Errorf("nothing at all gives %v, %v; want -1", r, err)
	}
}

func TestDetectionsInACrowdDoNotCount(t *testing.T) {
	gt := []GroundTruth{{Box: Rect{0, 0, 10, 10}}, {Box: Rect{20, 0, 50, 50}, Crowd: true}}
	dt := []Detection{
		{Box: Rect{25, 5, 10, 10}, Score: 0.9}, {Box: Rect{40, 5, 10, 10}, Score: 0.85}, // both inside the crowd region
		{Box: Rect{0, 0, 10, 10}, Score: 0.8},
	}
	r, err := EvaluateCOCO(gt, dt, COCOConfig{})
	if err != nil {
		t.Fatal(err)
	}
	if math.Abs(r.AP-1) > 1e-12 {
		t.Errorf("AP is %g, want 1", r.AP)
	}
}

func TestEvaluateCOCORefuses(t *testing.T) {
	b := Rect{0, 0, 1, 1}
	for name, c := range map[string]struct {
		gt   []GroundTruth
		dt   []Detection
		cfg  COCOConfig
		want string
	}{
		"same id":       {[]GroundTruth{{ID: 7, Box: b}, {ID: 7, Box: b}}, nil, COCOConfig{}, "same id 7"},
		"image":         {[]GroundTruth{{Image: 3, Box: b}}, nil, COCOConfig{Images: 3}, "image id 3 is not in 0..2"},
		"negative":      {[]GroundTruth{{Image: -1, Box: b}}, nil, COCOConfig{}, "image id -1"},
		"class":         {nil, []Detection{{Class: 5, Box: b}}, COCOConfig{Classes: 5}, "class id 5 is not in 0..4"},
		"sparse ids":    {nil, []Detection{{Class: 1 << 30, Box: b}}, COCOConfig{}, "dense"},
		"NaN score":     {nil, []Detection{{Box: b, Score: math.NaN()}}, COCOConfig{}, "score is NaN"},
		"box":           {[]GroundTruth{{Box: Rect{0, 0, math.Inf(1), 1}}}, nil, COCOConfig{}, "finite"},
		"size":          {nil, []Detection{{Box: Rect{0, 0, -1, 1}}}, COCOConfig{}, "negative size"},
		"area":          {[]GroundTruth{{Box: b, Area: -1}}, nil, COCOConfig{}, "area is -1"},
		"counts":        {nil, nil, COCOConfig{MaxDets: []int{0, 10}}, "rising"},
		"falling":       {nil, nil, COCOConfig{MaxDets: []int{10, 1}}, "rising"},
		"area range":    {nil, nil, COCOConfig{AreaRanges: [4][2]float64{{5, 1}}}, "area range"},
		"images":        {nil, nil, COCOConfig{Images: -1}, "-1 images"},
		"worker number": {nil, nil, COCOConfig{Workers: -1}, "workers"},
	} {
		if _, err := EvaluateCOCO(c.gt, c.dt, c.cfg); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want an error with %q", name, err, c.want)
		}
	}
}

func TestVOCAP(t *testing.T) {
	// Recall reaches 6/20, just below the float64 product 3·0.1: the fourth of eleven points gets nothing.
	scores, tp := make([]float64, 6), make([]bool, 6)
	for i := range tp {
		scores[i], tp[i] = float64(9-i), true
	}
	if got := VOCAP(scores, tp, 20, true); math.Abs(got-3./11) > 1e-12 {
		t.Errorf("eleven points: %g, want 3/11", got)
	}
	if got := VOCAP(scores, tp, 20, false); math.Abs(got-0.3) > 1e-12 {
		t.Errorf("area: %g, want 0.3", got)
	}
	if got := VOCAP(nil, nil, 5, false); got != 0 {
		t.Errorf("no detections: %g, want 0", got)
	}
	for name, got := range map[string]float64{
		"no objects": VOCAP(scores, tp, 0, false), "lengths": VOCAP(scores, tp[:2], 20, true), "NaN": VOCAP([]float64{math.NaN()}, []bool{true}, 1, true),
	} {
		if !math.IsNaN(got) {
			t.Errorf("%s: got %g, want NaN", name, got)
		}
	}
}

// Package detect holds the experiments of task/detect.
package detect

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"image"
	"image/color"
	"math"
	"path/filepath"
	"slices"
	"time"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/lab"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/task/detect"
)

// Experiments lists the experiments of the family.
var Experiments = []lab.Experiment{SoftNMS}

// softNMSSizes are the sizes of the experiment at a scale.
type softNMSSizes struct {
	Train, Crowded, Sparse int // scenes
	Steps, Batch           int
	TimedBoxes, Rounds     int
	Version                int // of the recipe of the detector
}

func softNMSSizesOf(s lab.Scale) softNMSSizes {
	if s == lab.Smoke {
		return softNMSSizes{Train: 20, Crowded: 20, Sparse: 10, Steps: 60, Batch: 4, TimedBoxes: 200, Rounds: 3, Version: 1}
	}
	return softNMSSizes{Train: 4000, Crowded: 400, Sparse: 200, Steps: 1500, Batch: 16, TimedBoxes: 1000, Rounds: 25, Version: 1}
}

// SoftNMS compares ways of suppression (arXiv:1704.04503) on one set of raw boxes. A one-stage detector is trained once
// per seed on scenes of 96x96 pixels composed of Fashion-MNIST items, half of which stand in overlapping pairs of one
// class. Its raw boxes in 400 such scenes of unseen items, and in 200 sparse scenes without overlaps, go through every
// method; COCO's average precision and recall are in points (0 to 100).
var SoftNMS = lab.Experiment{
	Method: "soft-nms",
	Title:  "suppression of one detector's raw boxes in crowded and in sparse scenes of Fashion-MNIST items",
	Recipe: []softNMSSizes{softNMSSizesOf(lab.Smoke), softNMSSizesOf(lab.Full)},
	Arms:   softNMSArms(),
	Claims: []lab.Claim{
		{
			ID: "C1a", Text: "in crowded scenes the Gaussian form (σ 0.5) gains 1 AP over NMS at 0.3", Paper: "+1.1 to +1.7 AP", Unit: "AP",
			Measure: lab.Difference("gaussian-0.5", "nms-0.3", "AP"), Bound: lab.AtLeast(1),
		},
		{
			ID: "C1b", Text: "in crowded scenes the linear form (0.3) gains 0.5 AP over NMS at 0.3", Paper: "+1.1 to +1.7 AP", Unit: "AP",
			Measure: lab.Difference("linear-0.3", "nms-0.3", "AP"), Bound: lab.AtLeast(0.5),
		},
		{
			ID: "C2", Text: "the best σ of 0.3, 0.5, 0.7 is at least as good as the best threshold of NMS", Paper: "better at every threshold", Unit: "AP",
			Measure: func(m lab.Metrics) float64 {
				best := func(arms ...string) float64 {
					v := math.Inf(-1)
					for _, a := range arms {
						v = max(v, m.Get(a, "AP"))
					}
					return v
				}
				return best("gaussian-0.3", "gaussian-0.5", "gaussian-0.7") - best("nms-0.3", "nms-0.4", "nms-0.5", "nms-0.6", "nms-0.7")
			},
			Bound: lab.AtLeast(0),
		},
		{
			ID: "C3", Text: "the Gaussian form finds lost neighbours: AR100 rises by 2 points over NMS at 0.3", Paper: "recall rises with the overlap asked for", Unit: "points",
			Measure: lab.Difference("gaussian-0.5", "nms-0.3", "AR100"), Bound: lab.AtLeast(2),
		},
		{
			ID: "C4a", Text: "in sparse scenes the Gaussian form and NMS at 0.3 differ by at most 0.7 AP", Paper: "no harm", Unit: "AP",
			Measure: func(m lab.Metrics) float64 {
				return math.Abs(lab.Difference("gaussian-0.5", "nms-0.3", "sparse_AP")(m))
			}, Bound: lab.AtMost(0.7),
		},
		{
			ID: "C4b", Text: "without suppression crowded scenes lose at least 5 AP", Paper: "(control)", Unit: "AP",
			Measure: lab.Difference("gaussian-0.5", "none", "AP"), Bound: lab.AtLeast(5),
		},
		{
			ID: "C5", Text: "for 1,000 boxes the Gaussian form takes at most ten times as long as NMS", Paper: "same complexity", Unit: "×",
			Measure: func(m lab.Metrics) float64 {
				return m.Get("time", "gaussian_seconds") / m.Get("time", "nms_seconds")
			},
			Bound: lab.AtMost(10),
		},
	},
}

func softNMSArms() []lab.Arm {
	arms := []lab.Arm{{Name: "none", Baseline: true, Run: suppressArm(detect.SoftNMSConfig{Method: detect.None})}}
	for _, t := range []float64{0.3, 0.4, 0.5, 0.6, 0.7} {
		arms = append(arms, lab.Arm{
			Name: fmt.Sprint("nms-", t), Baseline: true, Run: suppressArm(detect.SoftNMSConfig{Method: detect.Hard, IoUThreshold: t}),
		})
	}
	arms = append(arms, lab.Arm{Name: "linear-0.3", Run: suppressArm(detect.SoftNMSConfig{Method: detect.Linear})})
	for _, s := range []float64{0.1, 0.3, 0.5, 0.7, 1} {
		arms = append(arms, lab.Arm{Name: fmt.Sprint("gaussian-", s), Run: suppressArm(detect.SoftNMSConfig{Sigma: s})})
	}
	return append(arms, lab.Arm{Name: "time", Run: timeArm})
}

// rawBoxes are a detector's boxes before suppression, with the scenes that they were found in.
type rawBoxes struct {
	scenes []detect.Scene
	raw    []detect.Detection
}

// softNMSData is what all arms of one seed share.
type softNMSData struct{ crowded, sparse rawBoxes }

func softNMSDataOf(ctx context.Context, t *lab.Trial) (*softNMSData, error) {
	v, err := t.Shared("raw boxes", func() (any, error) {
		if t.Backend == nil {
			return nil, errors.New("the detector needs a backend to train on")
		}
		z := softNMSSizesOf(t.Scale)
		test, err := data.FashionMNIST(ctx, false)
		if err != nil {
			return nil, err
		}
		d, err := trainedDetector(ctx, t, z)
		if err != nil {
			return nil, err
		}
		out := &softNMSData{}
		for _, set := range []struct {
			to   *rawBoxes
			n    int
			cfg  detect.SceneConfig
			seed uint64
		}{{&out.crowded, z.Crowded, detect.SceneConfig{}, 1}, {&out.sparse, z.Sparse, detect.SceneConfig{Sparse: true}, 2}} {
			if set.to.scenes, err = detect.Scenes(test, set.n, set.cfg, 3*t.Seed+set.seed); err != nil {
				return nil, err
			}
			if set.to.raw, err = d.Detect(ctx, t.Backend, set.to.scenes, detect.DetectOptions{}); err != nil {
				return nil, err
			}
		}
		return out, nil
	})
	if err != nil {
		return nil, err
	}
	return v.(*softNMSData), nil
}

func trainedDetector(ctx context.Context, t *lab.Trial, z softNMSSizes) (*detect.Detector, error) {
	d, err := detect.NewDetector(detect.DetectorConfig{}, t.Seed)
	if err != nil {
		return nil, err
	}
	recipe := struct {
		Network             string
		Scenes, Steps, Size int
		Seed                uint64
		Version             int
	}{"one-stage detector on Fashion-MNIST scenes", z.Train, z.Steps, z.Batch, t.Seed, z.Version}
	d.Net, err = t.Network(recipe, func() (*nn.Network, error) { return d.Net, nil }, func(*nn.Network) error {
		train, err := data.FashionMNIST(ctx, true)
		if err != nil {
			return err
		}
		scenes, err := detect.Scenes(train, z.Train, detect.SceneConfig{}, 3*t.Seed)
		if err != nil {
			return err
		}
		_, err = d.Train(ctx, t.Backend, scenes, detect.TrainOptions{
			Steps: z.Steps, Batch: z.Batch, Seed: t.Seed, Checkpoint: filepath.Join(t.CheckpointDir(), "detector.ckpt"),
			Progress: func(done, total int, info learn.Info) {
				t.Progress(done, total)
				if done%10 == 0 {
					t.Series("loss", float64(done), info.Loss)
				}
			},
		})
		return err
	})
	return d, err
}

// suppressArm measures one way of suppression on both sets.
func suppressArm(cfg detect.SoftNMSConfig) func(ctx context.Context, t *lab.Trial) error {
	return func(ctx context.Context, t *lab.Trial) error {
		d, err := softNMSDataOf(ctx, t)
		if err != nil {
			return err
		}
		for _, prefix := range []string{"", "sparse_"} {
			set := d.crowded
			if prefix != "" {
				set = d.sparse
			}
			if err := ctx.Err(); err != nil {
				return err
			}
			kept, err := detect.Suppress(set.raw, cfg)
			if err != nil {
				return err
			}
			r, err := detect.EvaluateCOCO(detect.Ground(set.scenes), kept, detect.COCOConfig{Images: len(set.scenes), Classes: 10})
			if err != nil {
				return err
			}
			t.Record(prefix+"AP", 100*r.AP)
			t.Record(prefix+"AP50", 100*r.AP50)
			t.Record(prefix+"AP75", 100*r.AP75)
			t.Record(prefix+"AR100", 100*r.AR[len(r.AR)-1])
			t.Record(prefix+"boxes_per_scene", float64(len(kept))/float64(len(set.scenes)))
			if prefix == "" {
				for i, iou := range detect.IoUThresholds() {
					t.Series("AP by IoU", iou, 100*r.PerIoU[i])
				}
				t.Image("scene", picture(set.scenes[0], kept))
			}
		}
		return nil
	}
}

// picture draws the first scene, four times as large, with the boxes that are left with a score of at least 0.3.
func picture(s detect.Scene, dets []detect.Detection) image.Image {
	const zoom = 4
	side := int(math.Sqrt(float64(len(s.Pixels))))
	img := image.NewNRGBA(image.Rect(0, 0, side*zoom, side*zoom))
	for y := range side * zoom {
		for x := range side * zoom {
			v := uint8(160 * s.Pixels[y/zoom*side+x/zoom])
			img.SetNRGBA(x, y, color.NRGBA{v, v, v, 255})
		}
	}
	for _, d := range dets {
		if d.Image != 0 || d.Score < 0.3 {
			continue
		}
		hue := 2 * math.Pi * float64(d.Class) / 10
		tone := func(shift float64) uint8 { return uint8(155 + 100*math.Cos(hue+shift)) }
		c := color.NRGBA{tone(0), tone(2 * math.Pi / 3), tone(4 * math.Pi / 3), 255}
		b := d.Box.Corners()
		x0, y0, x1, y1 := int(b[0]*zoom), int(b[1]*zoom), int(b[2]*zoom)-1, int(b[3]*zoom)-1
		for x := x0; x <= x1; x++ {
			img.SetNRGBA(x, y0, c)
			img.SetNRGBA(x, y1, c)
		}
		for y := y0; y <= y1; y++ {
			img.SetNRGBA(x0, y, c)
			img.SetNRGBA(x1, y, c)
		}
	}
	return img
}

// timeArm times the methods, interleaved, on boxes as a detector gives them: ten jittered boxes around each object of a
// large picture. The figures are medians.
func timeArm(ctx context.Context, t *lab.Trial) error {
	z := softNMSSizesOf(t.Scale)
	r := rng.New(t.Seed, "timed boxes")
	boxes, scores := make([][4]float32, 0, z.TimedBoxes), make([]float32, 0, z.TimedBoxes)
	for len(boxes) < z.TimedBoxes {
		x, y, w, h := 600*r.Float64(), 600*r.Float64(), 20+80*r.Float64(), 20+80*r.Float64()
		for range 10 {
			jitter := func(v, size float64) float32 { return float32(v + 0.1*size*r.NormFloat64()) }
			x1, y1 := jitter(x, w), jitter(y, h)
			boxes = append(boxes, [4]float32{x1, y1, x1 + max(jitter(w, w), 1), y1 + max(jitter(h, h), 1)})
			scores = append(scores, 0.05+0.95*float32(r.Float64()))
		}
	}
	methods := map[string]detect.SoftNMSConfig{
		"nms": {Method: detect.Hard}, "linear": {Method: detect.Linear}, "gaussian": {},
	}
	names := []string{"nms", "linear", "gaussian"}
	times := map[string][]time.Duration{}
	for round := range z.Rounds + 2 {
		if err := ctx.Err(); err != nil {
			return err
		}
		for _, name := range names {
			const calls = 5
			start := time.Now()
			for range calls {
				if _, _, err := detect.SoftNMS(boxes, scores, methods[name]); err != nil {
					return err
				}
			}
			if round >= 2 { // the first rounds warm up
				times[name] = append(times[name], time.Since(start)/calls)
			}
		}
	}
	for _, name := range names {
		slices.SortFunc(times[name], cmp.Compare[time.Duration])
		t.Record(name+"_seconds", times[name][len(times[name])/2].Seconds())
	}
	t.Record("boxes", float64(z.TimedBoxes))
	return nil
}

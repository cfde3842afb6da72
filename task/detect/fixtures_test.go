package detect

import (
	"fmt"
	"testing"

	"github.com/gomlx/compute/dtypes"

	"github.com/lathe-ml/lathe/internal/fixture"
)

// quads turns a [n, 4] value into boxes.
func quads(v fixture.Value) [][4]float64 {
	f := v.Floats()
	out := make([][4]float64, len(f)/4)
	for i := range out {
		out[i] = [4]float64(f[4*i : 4*i+4])
	}
	return out
}

// explicit writes a threshold of 0 as the configuration wants it.
func explicit(v float64) float64 {
	if v == 0 {
		return Zero
	}
	return v
}

func configOf(t *testing.T, c *fixture.Case) SoftNMSConfig {
	t.Helper()
	m, err := ParseMethod(c.Params["method"].String())
	if err != nil {
		t.Fatal(err)
	}
	cfg := SoftNMSConfig{
		Method: m, Sigma: c.Params["sigma"].Float(), PlusOne: c.Params["plus_one"].Bool(),
		ScoreThreshold: explicit(c.Params["score_threshold"].Float()), TopK: c.Params["top_k"].Int(),
	}
	if v := c.Params["nt"]; v.Present() {
		cfg.IoUThreshold = explicit(v.Float())
	}
	if v := c.Params["pre_score_threshold"]; v.Present() {
		cfg.PreThreshold = explicit(v.Float())
	}
	return cfg
}

func TestFixtures(t *testing.T) {
	fixture.Run(t, 5, map[string]fixture.Func{
		"iou_matrix": func(t *testing.T, c *fixture.Case) map[string]any {
			m, err := IoUMatrix(quads(c.Inputs["a"]), quads(c.Inputs["b"]), c.Params["plus_one"].Bool())
			if err != nil {
				t.Fatal(err)
			}
			return map[string]any{"iou": m}
		},
		"soft_nms": func(t *testing.T, c *fixture.Case) map[string]any {
			keep, scores, err := SoftNMS(quads(c.Inputs["boxes"]), c.Inputs["scores"].Floats(), configOf(t, c))
			if err != nil {
				t.Fatal(err)
			}
			return map[string]any{"order": keep, "scores": scores}
		},
		"soft_nms_multiclass": func(t *testing.T, c *fixture.Case) map[string]any {
			r, err := MultiClassSoftNMS(c.Inputs["boxes"].Tensor(dtypes.Float64), c.Inputs["scores"].Tensor(dtypes.Float64), configOf(t, c))
			if err != nil {
				t.Fatal(err)
			}
			var index, class []int
			var scores []float64
			for _, d := range r[0] {
				index, class, scores = append(index, d.Index), append(class, d.Class), append(scores, d.Score)
			}
			return map[string]any{"box_index": index, "class": class, "scores": scores}
		},
		"coco_eval": func(t *testing.T, c *fixture.Case) map[string]any {
			cfg := COCOConfig{Images: c.Params["images"].Int(), Classes: c.Params["classes"].Int(), MaxDets: c.Params["max_dets"].Ints()}
			if v := c.Params["area_ranges"]; v.Present() {
				for i, r := range v.Rows() {
					cfg.AreaRanges[i] = [2]float64(r)
				}
			}
			var gt []GroundTruth
			var dt []Detection
			rects := func(v fixture.Value) (out []Rect) {
				for _, b := range quads(v) {
					out = append(out, Rect{b[0], b[1], b[2], b[3]})
				}
				return out
			}
			class, area, crowd := c.Inputs["gt_class"].Ints(), c.Inputs["gt_area"].Floats(), c.Inputs["gt_crowd"].Ints()
			box := rects(c.Inputs["gt_box"])
			for i, image := range c.Inputs["gt_image"].Ints() {
				g := GroundTruth{Image: image, Class: class[i], Box: box[i], Crowd: crowd[i] != 0}
				if len(area) > 0 {
					g.Area = explicit(area[i])
				}
				gt = append(gt, g)
			}
			class, score := c.Inputs["dt_class"].Ints(), c.Inputs["dt_score"].Floats()
			box = rects(c.Inputs["dt_box"])
			for i, image := range c.Inputs["dt_image"].Ints() {
				dt = append(dt, Detection{Image: image, Class: class[i], Box: box[i], Score: score[i]})
			}
			r, err := EvaluateCOCO(gt, dt, cfg)
			if err != nil {
				t.Fatal(err)
			}
			out := map[string]any{
				"AP": r.AP, "AP50": r.AP50, "AP75": r.AP75, "APs": r.APSmall, "APm": r.APMedium, "APl": r.APLarge,
				"ARs": r.ARSmall, "ARm": r.ARMedium, "ARl": r.ARLarge, "AP_per_class": r.PerClass, "AP_per_iou": r.PerIoU,
			}
			for i, k := range r.MaxDets {
				out[fmt.Sprint("AR", k)] = r.AR[i]
			}
			return out
		},
		"voc_ap": func(t *testing.T, c *fixture.Case) map[string]any {
			scores, tp := c.Inputs["scores"].Floats(), make([]bool, 0)
			for _, v := range c.Inputs["tp"].Ints() {
				tp = append(tp, v != 0)
			}
			n := c.Params["positives"].Int()
			return map[string]any{"ap_11point": VOCAP(scores, tp, n, true), "ap_all": VOCAP(scores, tp, n, false)}
		},
	})
}

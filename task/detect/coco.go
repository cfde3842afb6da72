package detect

import (
	"cmp"
	"fmt"
	"math"
	"slices"
)

// GroundTruth is one labelled object.
type GroundTruth struct {
	ID           int // unique; 0 means not given
	Image, Class int // from 0
	Box          Rect
	Area         float64 // of the object in square pixels, which decides whether it is small, medium or large; 0 takes the box's
	Crowd        bool    // a region of many objects: detections in it count neither for nor against
}

// COCOConfig configures EvaluateCOCO. Its zero value is the COCO challenge's protocol.
type COCOConfig struct {
	// Images and Classes are how many there are: ids run from 0 to one less. If 0, the largest id decides (up to a
	// million).
	Images, Classes int
	// MaxDets are the rising numbers of detections per image and class that AR is taken at; everything else uses the
	// last. If nil, it is defaulted to 1, 10, 100.
	MaxDets []int
	// AreaRanges are all, small, medium and large in square pixels, both ends included. If zero, they are defaulted
	// to COCO's: up to 1e10, up to 32², 32² to 96², 96² up.
	AreaRanges [4][2]float64
	// Workers is the number of classes evaluated at a time; the result does not depend on it. 0 means GOMAXPROCS.
	Workers int
}

// COCOResult holds COCO's numbers in [0, 1]; -1 says that there was nothing to measure.
type COCOResult struct {
	AP       float64 `json:"AP"` // mean over ten IoU thresholds, 0.5 to 0.95, and the present classes
	AP50     float64 `json:"AP50"`
	AP75     float64 `json:"AP75"`
	APSmall  float64 `json:"APs"`
	APMedium float64 `json:"APm"`
	APLarge  float64 `json:"APl"`
	// AR is the mean over thresholds and classes of the recall reached with MaxDets detections per image and class.
	AR       []float64 `json:"AR"`
	ARSmall  float64   `json:"ARs"`
	ARMedium float64   `json:"ARm"`
	ARLarge  float64   `json:"ARl"`
	PerClass []float64 `json:"AP_per_class"` // AP of each class, -1 for a class without ground truth
	PerIoU   []float64 `json:"AP_per_iou"`   // AP at each of IoUThresholds
	MaxDets  []int     `json:"max_dets"`
}

const (
	numIoU    = 10
	numRecall = 101
	eps64     = 0x1p-52 // numpy.spacing(1)
)

// IoUThresholds returns COCO's ten thresholds 0.5, 0.55, ..., 0.95 as NumPy's linspace makes them, since ties decide.
func IoUThresholds() []float64 {
	lo, hi := 0.5, 0.95
	step := (hi - lo) / (numIoU - 1)
	t := make([]float64, numIoU)
	for i := range t {
		t[i] = float64(float64(i)*step) + lo
	}
	t[numIoU-1] = hi
	return t
}

// recallThresholds are the float64 products i·0.01.
func recallThresholds() []float64 {
	r := make([]float64, numRecall)
	for i := range r {
		r[i] = float64(i) * 0.01
	}
	return r
}

func (c COCOConfig) resolved(gt []GroundTruth, dt []Detection) (COCOConfig, error) {
	const limit = 1 << 20
	count := func(what string, n, largest int) (int, error) {
		switch {
		case n < 0:
			return 0, fmt.Errorf("detect: %d %s; want 1 or more, or 0 to take the largest id", n, what)
		case n == 0 && largest >= limit:
			return 0, fmt.Errorf("detect: largest id of %s is %d; ids are dense, from 0 (set the number of %s if this is meant)", what, largest, what)
		case n == 0:
			n = largest + 1
		}
		return n, nil
	}
	image, class := -1, -1
	for _, g := range gt {
		image, class = max(image, g.Image), max(class, g.Class)
	}
	for _, d := range dt {
		image, class = max(image, d.Image), max(class, d.Class)
	}
	var err error
	if c.Images, err = count("images", c.Images, image); err != nil {
		return c, err
	}
	if c.Classes, err = count("classes", c.Classes, class); err != nil {
		return c, err
	}
	if c.MaxDets == nil {
		c.MaxDets = []int{1, 10, 100}
	}
	if len(c.MaxDets) == 0 || c.MaxDets[0] < 1 || !slices.IsSorted(c.MaxDets) {
		return c, fmt.Errorf("detect: numbers of detections %v; want rising numbers from 1 on, such as 1, 10, 100", c.MaxDets)
	}
	if c.AreaRanges == ([4][2]float64{}) {
		c.AreaRanges = [4][2]float64{{0, 1e10}, {0, 32 * 32}, {32 * 32, 96 * 96}, {96 * 96, 1e10}}
	}
	for _, r := range c.AreaRanges {
		if !(r[0] >= 0 && r[0] <= r[1]) {
			return c, fmt.Errorf("detect: area range %v; want 0 <= from <= to", r)
		}
	}
	if c.Workers < 0 {
		return c, fmt.Errorf("detect: %d workers; want at least 1 (0 for one per processor)", c.Workers)
	}
	ids := make(map[int]int, len(gt))
	for i, g := range gt {
		if j, ok := ids[g.ID]; ok && g.ID != 0 {
			return c, fmt.Errorf("detect: ground truths %d and %d have the same id %d", j, i, g.ID)
		}
		ids[g.ID] = i
		if err := checkPlace(g.Image, g.Class, c); err != nil {
			return c, fmt.Errorf("detect: ground truth %d: %w", i, err)
		}
		if err := g.Box.check(); err != nil {
			return c, fmt.Errorf("detect: ground truth %d: %w", i, err)
		}
		if !(g.Area >= 0) || math.IsInf(g.Area, 0) {
			return c, fmt.Errorf("detect: ground truth %d: area is %g; want a finite number, 0 or more", i, g.Area)
		}
	}
	for i, d := range dt {
		if err := checkPlace(d.Image, d.Class, c); err != nil {
			return c, fmt.Errorf("detect: detection %d: %w", i, err)
		}
		if err := d.Box.check(); err != nil {
			return c, fmt.Errorf("detect: detection %d: %w", i, err)
		}
		if math.IsNaN(d.Score) || math.IsInf(d.Score, 0) {
			return c, fmt.Errorf("detect: detection %d: score is %g; want a finite number", i, d.Score)
		}
	}
	return c, nil
}

func checkPlace(image, class int, c COCOConfig) error {
	if image < 0 || image >= c.Images {
		return fmt.Errorf("image id %d is not in 0..%d", image, c.Images-1)
	}
	if class < 0 || class >= c.Classes {
		return fmt.Errorf("class id %d is not in 0..%d", class, c.Classes-1)
	}
	return nil
}

// cell is one class within one image.
type cell struct {
	image int
	gt    []GroundTruth
	dt    []Detection
	iou   []float64 // len(dt) rows of len(gt)
}

// scored is a detection after matching, for one area range.
type scored struct {
	score   float64
	rank    int          // among the detections of its image
	matched [numIoU]bool // at each IoU threshold
	ignored [numIoU]bool
}

// curve is what one class, area range and number of detections gives at one IoU threshold; -1 when absent.
type curve struct{ ap, recall float64 }

// EvaluateCOCO measures detections against ground truth as the COCO challenge does (cocodataset/cocoapi, cocoeval.py,
// bounding boxes): the twelve numbers, and AP per class and per IoU threshold. Detections need not be in any order; of
// those with equal scores, the earlier one counts first.
//
// It refuses ids out of range, a ground-truth id given twice, and boxes, areas and scores that are not finite.
// A class without ground truth is left out of the means; zero-area boxes overlap nothing.
func EvaluateCOCO(gt []GroundTruth, dt []Detection, cfg COCOConfig) (*COCOResult, error) {
	cfg, err := cfg.resolved(gt, dt)
	if err != nil {
		return nil, err
	}
	classes := cfg.cells(gt, dt)
	numDets := len(cfg.MaxDets)
	last := numDets - 1
	// curves[class][area][maxDet][threshold]; only what the twelve numbers need is computed.
	curves := make([][4][][numIoU]curve, cfg.Classes)
	parallel(cfg.Classes, cfg.Workers, func(c int) {
		for a, area := range cfg.AreaRanges {
			curves[c][a] = make([][numIoU]curve, numDets)
			dets, positives := match(classes[c], area, cfg.MaxDets[last])
			for k, most := range cfg.MaxDets {
				if a == 0 || k == last {
					curves[c][a][k] = accumulate(dets, positives, most)
				}
			}
		}
	})

	mean := func(area, k int, of func(curve) float64, class, iou int) float64 {
		sum, n := 0., 0
		for c := range curves {
			for t, v := range curves[c][area][k] {
				if x := of(v); x > -1 && (class < 0 || c == class) && (iou < 0 || t == iou) {
					sum += x
					n++
				}
			}
		}
		if n == 0 {
			return -1
		}
		return sum / float64(n)
	}
	ap := func(v curve) float64 { return v.ap }
	ar := func(v curve) float64 { return v.recall }
	r := &COCOResult{
		AP: mean(0, last, ap, -1, -1), AP50: mean(0, last, ap, -1, 0), AP75: mean(0, last, ap, -1, 5),
		APSmall: mean(1, last, ap, -1, -1), APMedium: mean(2, last, ap, -1, -1), APLarge: mean(3, last, ap, -1, -1),
		ARSmall: mean(1, last, ar, -1, -1), ARMedium: mean(2, last, ar, -1, -1), ARLarge: mean(3, last, ar, -1, -1),
		MaxDets: slices.Clone(cfg.MaxDets),
	}
	for k := range cfg.MaxDets {
		r.AR = append(r.AR, mean(0, k, ar, -1, -1))
	}
	for c := range cfg.Classes {
		r.PerClass = append(r.PerClass, mean(0, last, ap, c, -1))
	}
	for t := range numIoU {
		r.PerIoU = append(r.PerIoU, mean(0, last, ap, -1, t))
	}
	return r, nil
}

// cells groups by class and image: detections sorted by score and cut, with their overlaps.
func (c COCOConfig) cells(gt []GroundTruth, dt []Detection) [][]*cell {
	type key struct{ class, image int }
	at := map[key]*cell{}
	out := make([][]*cell, c.Classes)
	get := func(class, image int) *cell {
		k := key{class, image}
		if at[k] == nil {
			at[k] = &cell{image: image}
			out[class] = append(out[class], at[k])
		}
		return at[k]
	}
	for _, g := range gt {
		if g.Area == 0 {
			g.Area = g.Box.Area()
		}
		x := get(g.Class, g.Image)
		x.gt = append(x.gt, g)
	}
	for _, d := range dt {
		x := get(d.Class, d.Image)
		x.dt = append(x.dt, d)
	}
	most := c.MaxDets[len(c.MaxDets)-1]
	parallel(len(out), c.Workers, func(i int) {
		slices.SortFunc(out[i], func(a, b *cell) int { return cmp.Compare(a.image, b.image) })
		for _, x := range out[i] {
			slices.SortStableFunc(x.dt, func(a, b Detection) int { return cmp.Compare(b.Score, a.Score) })
			x.dt = x.dt[:min(len(x.dt), most)]
			x.iou = make([]float64, 0, len(x.dt)*len(x.gt))
			for _, d := range x.dt {
				for _, g := range x.gt {
					x.iou = append(x.iou, overlap(d.Box, g.Box, g.Crowd))
				}
			}
		}
	})
	return out
}

// overlap is the IoU of a detection with an object; with a crowd, the share of the detection that lies in it.
func overlap(d, g Rect, crowd bool) float64 {
	w := min(d.X+d.W, g.X+g.W) - max(d.X, g.X)
	h := min(d.Y+d.H, g.Y+g.H) - max(d.Y, g.Y)
	if !(w > 0 && h > 0) {
		return 0
	}
	inter := float64(w * h)
	if crowd {
		return inter / d.Area()
	}
	return inter / (float64(d.Area()) + float64(g.Area()) - inter)
}

// match assigns the detections of every image to the objects of one area range, at each IoU threshold, and counts the
// objects that are to be found.
func match(cells []*cell, area [2]float64, most int) (out []scored, positives int) {
	thresholds := IoUThresholds()
	outside := func(a float64) bool { return a < area[0] || a > area[1] }
	for _, x := range cells {
		// Objects to be found come first, ignored ones last.
		order, real := make([]int, 0, len(x.gt)), 0
		for _, ignored := range []bool{false, true} {
			for i, g := range x.gt {
				if (g.Crowd || outside(g.Area)) == ignored {
					order = append(order, i)
				}
			}
			if !ignored {
				real = len(order)
			}
		}
		positives += real
		first := len(out)
		for i, d := range x.dt {
			out = append(out, scored{score: d.Score, rank: i})
		}
		for t, threshold := range thresholds {
			taken := make([]bool, len(order))
			for i, d := range x.dt {
				s := &out[first+i]
				best, m := min(threshold, 1-1e-10), -1
				for k, g := range order {
					if taken[k] && !x.gt[g].Crowd {
						continue
					}
					if m >= 0 && m < real && k >= real {
						break // a real match is not given up for an ignored one
					}
					if o := x.iou[i*len(x.gt)+g]; o >= best {
						best, m = o, k
					}
				}
				if m >= 0 {
					taken[m] = true
					s.matched[t], s.ignored[t] = true, m >= real
				} else {
					s.ignored[t] = outside(d.Box.Area())
				}
			}
		}
	}
	slices.SortStableFunc(out, func(a, b scored) int { return cmp.Compare(b.score, a.score) })
	return out, positives
}

// accumulate makes the precision-recall curve of detections in falling order of score, of which each image gives its
// first `most`, and samples it.
func accumulate(dets []scored, positives, most int) (out [numIoU]curve) {
	if positives == 0 {
		for t := range out {
			out[t] = curve{-1, -1}
		}
		return out
	}
	recalls := recallThresholds()
	recall, precision := make([]float64, 0, len(dets)), make([]float64, 0, len(dets))
	for t := range out {
		tp, fp := 0, 0
		recall, precision = recall[:0], precision[:0]
		for _, d := range dets {
			if d.rank >= most {
				continue
			}
			if !d.ignored[t] {
				if d.matched[t] {
					tp++
				} else {
					fp++
				}
			}
			recall = append(recall, float64(tp)/float64(positives))
			precision = append(precision, float64(tp)/(float64(fp+tp)+eps64))
		}
		if len(recall) == 0 {
			continue // nothing was found: zeros
		}
		out[t].recall = recall[len(recall)-1]
		out[t].ap = sampled(recall, precision, recalls)
	}
	return out
}

// sampled is the mean, over the recall thresholds, of the best precision at that recall or beyond. It makes precision
// non-increasing in place.
func sampled(recall, precision, at []float64) float64 {
	for i := len(precision) - 1; i > 0; i-- {
		precision[i-1] = max(precision[i-1], precision[i])
	}
	sum, i := 0., 0
	for _, r := range at {
		for i < len(recall) && recall[i] < r {
			i++
		}
		if i == len(recall) {
			break
		}
		sum += precision[i]
	}
	return sum / float64(len(at))
}

// VOCAP returns the average precision of the PASCAL VOC challenge for one class: scores of the detections, whether each
// is a true positive, and the number of objects there are. The eleven-point form (VOC 2007) is the mean of the best
// precision at recall i·0.1 or beyond, i = 0..10; the other (VOC 2010 on) is the area under the non-increasing envelope
// of precision over recall. It returns NaN when there are no objects, when the lengths differ, or when a score is NaN.
func VOCAP(scores []float64, tp []bool, positives int, elevenPoint bool) float64 {
	if positives <= 0 || len(scores) != len(tp) || slices.ContainsFunc(scores, math.IsNaN) {
		return math.NaN()
	}
	order := make([]int, len(scores))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(scores[b], scores[a]) })
	recall, precision := make([]float64, len(order)), make([]float64, len(order))
	found := 0
	for i, k := range order {
		if tp[k] {
			found++
		}
		recall[i], precision[i] = float64(found)/float64(positives), float64(found)/float64(i+1)
	}
	if elevenPoint {
		at := make([]float64, 11)
		for i := range at {
			at[i] = float64(i) * 0.1
		}
		return sampled(recall, precision, at)
	}
	area, before := 0., 0.
	for i := len(precision) - 1; i > 0; i-- {
		precision[i-1] = max(precision[i-1], precision[i])
	}
	for i, r := range recall {
		area += (r - before) * precision[i]
		before = r
	}
	return area
}

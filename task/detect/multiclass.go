package detect

import (
	"cmp"
	"fmt"
	"math"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/gomlx/core/tensors"
)

// Detection is one scored box of one class in one image.
type Detection struct {
	Image, Class int // any ids; EvaluateCOCO wants them dense, from 0
	Box          Rect
	Score        float64 // before suppression a probability; after it a rank only
	Index        int     // where the box came from: its place in the input
}

// Suppress runs Soft-NMS on each class of each image by itself and pools the classes of an image again: detections
// whose score exceeds the pre-threshold are rescored, sorted (the higher score, then the lower class, then the lower
// place in dets) and cut to the best TopK of their image. Images come out in the order in which they first appear in
// dets; Index of a result is its place in dets. Classes are worked on concurrently, and the result is the same for any
// number of workers.
func Suppress(dets []Detection, cfg SoftNMSConfig) ([]Detection, error) {
	cfg, err := cfg.resolved()
	if err != nil {
		return nil, err
	}
	return suppress(dets, cfg)
}

// suppress is Suppress with the defaults filled in.
func suppress(dets []Detection, cfg SoftNMSConfig) ([]Detection, error) {
	type key struct{ image, class int }
	type job struct {
		key
		members, kept []int
		scores        []float64
		err           error
	}
	topK := cfg.TopK
	if topK == 0 {
		topK = 100
	}
	cfg.TopK = topK // no class can contribute more
	var images []int
	rank := map[int]int{}
	jobs := []*job{}
	byKey := map[key]*job{}
	for i, d := range dets {
		if err := d.Box.check(); err != nil {
			return nil, fmt.Errorf("detect: detection %d (image %d, class %d): %w", i, d.Image, d.Class, err)
		}
		if !(d.Score >= 0) || math.IsInf(d.Score, 0) {
			return nil, fmt.Errorf("detect: detection %d (image %d, class %d): score is %g; scores must be finite and at least 0",
				i, d.Image, d.Class, d.Score)
		}
		if _, ok := rank[d.Image]; !ok {
			rank[d.Image] = len(images)
			images = append(images, d.Image)
		}
		if d.Score <= cfg.PreThreshold || d.Score < cfg.ScoreThreshold {
			continue
		}
		k := key{d.Image, d.Class}
		j := byKey[k]
		if j == nil {
			j = &job{key: k}
			byKey[k] = j
			jobs = append(jobs, j)
		}
		j.members = append(j.members, i)
	}
	parallel(len(jobs), cfg.Workers, func(i int) {
		j := jobs[i]
		l := newLive(len(j.members))
		for _, m := range j.members {
			l.add(m, dets[m].Box.Corners(), dets[m].Score, cfg.PlusOne)
		}
		n, err := l.run(cfg)
		if err != nil {
			j.err = fmt.Errorf("%w (image %d, class %d)", err, j.image, j.class)
			return
		}
		j.kept, j.scores = l.index[:n], make([]float64, n)
		for i := range n {
			j.scores[i] = l.box[i].score
		}
	})
	pools := make([][]Detection, len(images))
	for _, j := range jobs {
		if j.err != nil {
			return nil, j.err
		}
		r := rank[j.image]
		for i, k := range j.kept {
			d := dets[k]
			d.Score, d.Index = j.scores[i], k
			pools[r] = append(pools[r], d)
		}
	}
	out := []Detection{}
	for _, p := range pools {
		slices.SortFunc(p, func(a, b Detection) int {
			return cmp.Or(cmp.Compare(b.Score, a.Score), cmp.Compare(a.Class, b.Class), cmp.Compare(a.Index, b.Index))
		})
		out = append(out, p[:min(len(p), topK)]...)
	}
	return out, nil
}

// parallel calls f(0) to f(n-1) on that many workers, GOMAXPROCS if 0.
func parallel(n, workers int, f func(i int)) {
	if workers == 0 {
		workers = runtime.GOMAXPROCS(0)
	}
	if workers = min(workers, n); workers <= 1 {
		for i := range n {
			f(i)
		}
		return
	}
	var next atomic.Int64
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				f(i)
			}
		})
	}
	wg.Wait()
}

// MultiClassSoftNMS is Suppress on a detector's output as it comes: N boxes with C class scores each, for one image or
// a batch of B.
//
//	boxes   [N, 4] shared by the classes or [N, C, 4], or with a leading B: corners (x1, y1, x2, y2)
//	scores  [N, C] or [B, N, C]
//
// Both are float32 or both float64. The result has one list per image, best first, with Index the row in 0..N-1.
func MultiClassSoftNMS(boxes, scores *tensors.Tensor, cfg SoftNMSConfig) ([][]Detection, error) {
	cfg, err := cfg.resolved()
	if err != nil {
		return nil, err
	}
	if boxes == nil || scores == nil {
		return nil, fmt.Errorf("detect: boxes and scores must be given")
	}
	if boxes.DType() != scores.DType() {
		return nil, fmt.Errorf("detect: boxes are %s but scores are %s; want both float32 or both float64", boxes.DType(), scores.DType())
	}
	bd, sd := boxes.Shape().Dimensions, scores.Shape().Dimensions
	refuse := func() error {
		return fmt.Errorf("detect: boxes %v with scores %v; want boxes [N, 4] or [N, C, 4] with scores [N, C], or all with a leading batch axis", bd, sd)
	}
	batch := 1
	if len(sd) == 3 {
		if len(bd) < 3 || bd[0] != sd[0] {
			return nil, refuse()
		}
		batch, bd, sd = sd[0], bd[1:], sd[1:]
	}
	if len(sd) != 2 || len(bd) < 2 || len(bd) > 3 || bd[0] != sd[0] || bd[len(bd)-1] != 4 || len(bd) == 3 && bd[1] != sd[1] {
		bd, sd = boxes.Shape().Dimensions, scores.Shape().Dimensions
		return nil, refuse()
	}
	n, classes, perClass := sd[0], sd[1], len(bd) == 3
	switch boxes.DType() {
	case dtypes.Float32:
		return multiClass[float32](boxes, scores, batch, n, classes, perClass, cfg)
	case dtypes.Float64:
		return multiClass[float64](boxes, scores, batch, n, classes, perClass, cfg)
	}
	return nil, fmt.Errorf("detect: boxes are %s; want float32 or float64", boxes.DType())
}

func multiClass[T Float](boxes, scores *tensors.Tensor, batch, n, classes int, perClass bool, cfg SoftNMSConfig) ([][]Detection, error) {
	out := make([][]Detection, batch)
	if batch*n*classes == 0 {
		return out, nil
	}
	b, err := tensors.CopyFlatData[T](boxes)
	if err != nil {
		return nil, fmt.Errorf("detect: boxes: %w", err)
	}
	s, err := tensors.CopyFlatData[T](scores)
	if err != nil {
		return nil, fmt.Errorf("detect: scores: %w", err)
	}
	for i := range len(b) / 4 {
		if err := checkCorners(i, [4]T(b[4*i:4*i+4])); err != nil {
			return nil, err
		}
	}
	var dets []Detection
	for i, v := range s {
		v := float64(v)
		if !(v >= 0) || math.IsInf(v, 0) {
			return nil, fmt.Errorf("detect: score of box %d, class %d in image %d is %g; scores must be finite and at least 0",
				i/classes%n, i%classes, i/(classes*n), v)
		}
		if v <= cfg.PreThreshold {
			continue
		}
		at := i / classes
		if perClass {
			at = i
		}
		dets = append(dets, Detection{
			Image: i / (classes * n), Class: i % classes, Score: v, Index: i / classes % n,
			Box: RectOf([4]T(b[4*at : 4*at+4])),
		})
	}
	kept, err := suppress(dets, cfg)
	if err != nil {
		return nil, err
	}
	for _, d := range kept {
		d.Index = dets[d.Index].Index
		out[d.Image] = append(out[d.Image], d)
	}
	return out, nil
}

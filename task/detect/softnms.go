package detect

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"
)

// Method says how Soft-NMS treats a box that overlaps a better one.
type Method int

// The methods; the zero Method is the paper's recommendation.
const (
	Gaussian Method = iota // score times exp(-IoU²/Sigma)
	Linear                 // score times 1-IoU where IoU > IoUThreshold
	Hard                   // removed where IoU > IoUThreshold: greedy non-maximum suppression
	None                   // kept as it is: the boxes are only sorted
)

// Methods lists the methods by the names that ParseMethod takes.
var Methods = []string{"gaussian", "linear", "hard", "none"}

func (m Method) String() string {
	if m < 0 || int(m) >= len(Methods) {
		return fmt.Sprintf("Method(%d)", int(m))
	}
	return Methods[m]
}

// ParseMethod reads "gaussian", "linear", "hard" or "none".
func ParseMethod(s string) (Method, error) {
	if i := slices.Index(Methods, s); i >= 0 {
		return Method(i), nil
	}
	return 0, fmt.Errorf("detect: unknown method %q; use %s", s, strings.Join(Methods, ", "))
}

// Zero is how a threshold of exactly 0 is written in a SoftNMSConfig, where plain 0 means the default.
const Zero = math.SmallestNonzeroFloat64

// SoftNMSConfig configures Soft-NMS (Bodla et al., ICCV 2017, arXiv:1704.04503). Its zero value is the paper's
// Gaussian form with its defaults.
type SoftNMSConfig struct {
	// Method is Gaussian unless set.
	Method Method
	// Sigma is the width of the Gaussian weight exp(-IoU²/Sigma). Smaller suppresses more; 0.4 to 0.7 work alike.
	// If it is 0, it is defaulted to 0.5; negative values are refused.
	Sigma float64
	// IoUThreshold is N_t of Linear and Hard, in [0, 1]: boxes that overlap by more (not by as much) are weighted.
	// If it is 0, it is defaulted to 0.3; write Zero for a threshold of 0.
	IoUThreshold float64
	// ScoreThreshold drops boxes whose rescored value is below it. If it is 0, it is defaulted to 0.001; write Zero
	// to keep every box.
	ScoreThreshold float64
	// PreThreshold is the score that a class score must exceed to take part at all, in MultiClassSoftNMS and
	// Suppress. If it is 0, it is defaulted to 0.05; write Zero for a threshold of 0. SoftNMS does not use it.
	PreThreshold float64
	// PlusOne measures boxes as inclusive pixel indices (a side is x2-x1+1 long), as the authors' code does.
	PlusOne bool
	// Weight, if set, replaces the method's weight: a decreasing function of the IoU with values in [0, 1]. It is
	// asked only about boxes that overlap (IoU > 0) and must be safe for concurrent use.
	Weight func(iou float64) float64
	// TopK is the largest number of boxes returned, the best ones. If it is 0, SoftNMS returns all boxes and
	// MultiClassSoftNMS and Suppress the best 100 of each image, over all classes.
	TopK int
	// Workers is the number of images and classes that MultiClassSoftNMS and Suppress work on at a time. The result
	// does not depend on it. If it is 0, it is defaulted to GOMAXPROCS.
	Workers int
}

// resolved returns the configuration with its defaults filled in, or what is wrong with it.
func (c SoftNMSConfig) resolved() (SoftNMSConfig, error) {
	fill := func(v *float64, def float64) {
		switch *v {
		case 0:
			*v = def
		case Zero:
			*v = 0
		}
	}
	fill(&c.Sigma, 0.5)
	fill(&c.IoUThreshold, 0.3)
	fill(&c.ScoreThreshold, 0.001)
	fill(&c.PreThreshold, 0.05)
	switch {
	case c.Method < Gaussian || c.Method > None:
		return c, fmt.Errorf("detect: unknown %v; use Gaussian, Linear, Hard or None", c.Method)
	case !(c.Sigma > 0):
		return c, fmt.Errorf("detect: sigma is %g; it must be above 0 (the paper uses 0.5)", c.Sigma)
	case !(c.IoUThreshold >= 0 && c.IoUThreshold <= 1):
		return c, fmt.Errorf("detect: IoU threshold is %g; it must lie in [0, 1] (the paper uses 0.3)", c.IoUThreshold)
	case !(c.ScoreThreshold >= 0) || math.IsInf(c.ScoreThreshold, 0):
		return c, fmt.Errorf("detect: score threshold is %g; it must be 0 or more (the paper uses 0.001)", c.ScoreThreshold)
	case !(c.PreThreshold >= 0) || math.IsInf(c.PreThreshold, 0):
		return c, fmt.Errorf("detect: pre-threshold is %g; it must be 0 or more", c.PreThreshold)
	case c.TopK < 0:
		return c, fmt.Errorf("detect: top-k is %d; it must be at least 1 (0 for the default)", c.TopK)
	case c.Workers < 0:
		return c, fmt.Errorf("detect: %d workers; want at least 1 (0 for one per processor)", c.Workers)
	}
	return c, nil
}

// SoftNMS rescores the boxes of one image and class so that a box that overlaps a better one falls behind instead of
// being deleted (arXiv:1704.04503, algorithm of figure 2). Until no box is left, the box M with the highest current
// score (the lowest index on ties) moves to the result, and the score of every box b left is multiplied by
//
//	hard      0 if IoU(M,b) > N_t, else 1
//	linear    1 - IoU(M,b) if IoU(M,b) > N_t, else 1
//	gaussian  exp(-IoU(M,b)²/sigma)
//
// Boxes are corners (x1, y1, x2, y2), one per score; scores are finite and at least 0 (detectors' probabilities). It
// returns the indices of the kept boxes in output order, which is that of the falling rescored values, and these
// values, which are not probabilities any more. It takes O(N) memory and O(N²) comparisons of boxes at most, far fewer
// with a small TopK; Hard is a sweep over the sorted boxes. Boxes below the score threshold are dropped wherever they come from: they could only have lowered others
// that are lower still.
//
// It refuses lengths that differ, values that are not finite, swapped corners, negative scores, settings outside
// their range and a Weight outside [0, 1].
func SoftNMS[T Float](boxes [][4]T, scores []T, cfg SoftNMSConfig) (keep []int, rescored []T, err error) {
	if cfg, err = cfg.resolved(); err != nil {
		return nil, nil, err
	}
	if len(boxes) != len(scores) {
		return nil, nil, fmt.Errorf("detect: %d boxes but %d scores; want one score per box", len(boxes), len(scores))
	}
	l := newLive(len(boxes))
	for i, b := range boxes {
		if err := checkCorners(i, b); err != nil {
			return nil, nil, err
		}
		s := float64(scores[i])
		if !(s >= 0) || math.IsInf(s, 0) {
			return nil, nil, fmt.Errorf("detect: score %d is %g; scores must be finite and at least 0", i, s)
		}
		if s >= cfg.ScoreThreshold {
			l.add(i, [4]float64{float64(b[0]), float64(b[1]), float64(b[2]), float64(b[3])}, s, cfg.PlusOne)
		}
	}
	n, err := l.run(cfg)
	if err != nil {
		return nil, nil, err
	}
	keep, rescored = make([]int, n), make([]T, n)
	for i := range n {
		keep[i], rescored[i] = l.index[i], T(l.box[i].score)
	}
	return keep, rescored, nil
}

// live holds the boxes at work; run puts the result in front.
type live struct {
	index []int
	box   []liveBox
}

type liveBox struct{ x1, y1, x2, y2, area, score float64 }

func newLive(n int) *live { return &live{index: make([]int, 0, n), box: make([]liveBox, 0, n)} }

// add appends a box; with plusOne the far corner is moved out by a pixel, after which the sizes are plain differences.
func (l *live) add(index int, b [4]float64, score float64, plusOne bool) {
	if plusOne {
		b[2]++
		b[3]++
	}
	l.index = append(l.index, index)
	l.box = append(l.box, liveBox{b[0], b[1], b[2], b[3], (b[2] - b[0]) * (b[3] - b[1]), score})
}

func (l *live) sort() {
	order := make([]int, len(l.box))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int {
		return cmp.Or(cmp.Compare(l.box[b].score, l.box[a].score), cmp.Compare(l.index[a], l.index[b]))
	})
	sorted := newLive(len(order))
	for _, i := range order {
		sorted.index, sorted.box = append(sorted.index, l.index[i]), append(sorted.box, l.box[i])
	}
	*l = *sorted
}

// run orders the boxes; the first n that it returns are the result.
func (l *live) run(cfg SoftNMSConfig) (n int, err error) {
	limit := len(l.box)
	if cfg.TopK > 0 {
		limit = min(limit, cfg.TopK)
	}
	switch {
	case cfg.Weight != nil:
		defer func() {
			if r := recover(); r != nil {
				n, err = 0, fmt.Errorf("detect: the weight function panicked: %v", r)
			}
		}()
		n = l.soften(limit, cfg.ScoreThreshold, product(func(o float64) float64 {
			w := cfg.Weight(o)
			if !(w >= 0 && w <= 1) {
				err = fmt.Errorf("detect: the weight function returned %g at IoU %g; it must stay in [0, 1]", w, o)
				return 0
			}
			return w
		}))
		if err != nil {
			return 0, err
		}
		return n, nil
	case cfg.Method == None:
		l.sort()
		return limit, nil
	case cfg.Method == Hard:
		l.sort()
		return l.sweep(limit, cfg.IoUThreshold), nil
	case cfg.Method == Linear:
		return l.soften(limit, cfg.ScoreThreshold, product(func(o float64) float64 {
			if o > cfg.IoUThreshold {
				return 1 - o
			}
			return 1
		})), nil
	default:
		return l.soften(limit, cfg.ScoreThreshold, gaussian{cfg.Sigma}), nil
	}
}

// iou of two boxes whose sides are plain differences. Most pairs end at the first comparison or two.
func (a *liveBox) iou(b *liveBox) float64 {
	if a.x2 <= b.x1 || b.x2 <= a.x1 || a.y2 <= b.y1 || b.y2 <= a.y1 {
		return 0
	}
	x1, y1, x2, y2 := a.x1, a.y1, a.x2, a.y2
	if b.x1 > x1 {
		x1 = b.x1
	}
	if b.y1 > y1 {
		y1 = b.y1
	}
	if b.x2 < x2 {
		x2 = b.x2
	}
	if b.y2 < y2 {
		y2 = b.y2
	}
	inter := (x2 - x1) * (y2 - y1)
	if inter <= 0 { // boxes without area
		return 0
	}
	return inter / (a.area + b.area - inter)
}

// sweep is greedy suppression of sorted boxes: what survives is moved to the front.
func (l *live) sweep(limit int, threshold float64) int {
	kept := 0
	for n := len(l.box); kept < limit && kept < n; kept++ {
		m := l.box[kept]
		left := kept + 1
		for j := left; j < n; j++ {
			if m.iou(&l.box[j]) > threshold {
				continue
			}
			l.box[left], l.index[left] = l.box[j], l.index[j]
			left++
		}
		n = left
	}
	return kept
}

// candidate is a box that waits to be selected. Its rank is that after the first `seen` selected boxes, and since weights
// are at most 1, no less than its rank after all of them.
type candidate struct {
	rank float64 // the score, or its logarithm
	box  int32   // its place in live
	seen int32
}

// before says whether a is selected before b: the higher score, or the lower input index.
func (l *live) before(a, b *candidate) bool {
	if a.rank != b.rank {
		return a.rank > b.rank
	}
	return l.index[a.box] < l.index[b.box]
}

// soften selects and rescales. Candidates wait in a heap by ranks that may be out of date. The top one is brought up to
// date, which can only lower it; if it then still is the top, it is the maximum and is selected, since all others are at
// most what the heap believes of them. So each pair of boxes meets at most once, and a box that falls out of the best
// `limit` meets few.
func (l *live) soften(limit int, threshold float64, w weigher) int {
	heap := make([]candidate, len(l.box))
	for i := range heap {
		heap[i] = candidate{rank: w.rank(l.box[i].score), box: int32(i)}
	}
	for i := len(heap)/2 - 1; i >= 0; i-- {
		l.sink(heap, i)
	}
	lowest, least := w.rank(threshold), math.Inf(1)
	index, selected := make([]int, 0, limit), make([]liveBox, 0, limit)
	for len(heap) > 0 && len(selected) < limit {
		top := &heap[0]
		if int(top.seen) < len(selected) {
			top.rank = w.weigh(&l.box[top.box], top.rank, selected[top.seen:])
			top.seen = int32(len(selected))
			if top.rank >= lowest {
				l.sink(heap, 0)
				continue
			}
		} else {
			b := l.box[top.box]
			least = min(least, w.score(top.rank, b.score)) // rounding never makes the output rise
			b.score = least
			index, selected = append(index, l.index[top.box]), append(selected, b)
		}
		last := len(heap) - 1
		heap[0] = heap[last]
		heap = heap[:last]
		l.sink(heap, 0)
	}
	l.index, l.box = index, selected
	return len(selected)
}

// sink restores the order of the heap below place i.
func (l *live) sink(heap []candidate, i int) {
	for {
		first := i
		for child := 2*i + 1; child <= 2*i+2 && child < len(heap); child++ {
			if l.before(&heap[child], &heap[first]) {
				first = child
			}
		}
		if first == i {
			return
		}
		heap[i], heap[first] = heap[first], heap[i]
		i = first
	}
}

// weigher multiplies the score behind a rank by the weights of selected boxes.
type weigher interface {
	rank(score float64) float64
	weigh(b *liveBox, rank float64, selected []liveBox) float64
	score(rank, first float64) float64 // first is the score that the box came with
}

// gaussian ranks by the logarithm of the score, from which the exponents of the weights are taken away.
type gaussian struct{ sigma float64 }

func (g gaussian) rank(score float64) float64 { return math.Log(score) }

func (g gaussian) weigh(b *liveBox, rank float64, selected []liveBox) float64 {
	sum := 0.
	for i := range selected {
		o := selected[i].iou(b)
		sum += o * o
	}
	return rank - sum/g.sigma
}

func (g gaussian) score(rank, first float64) float64 {
	if rank == math.Log(first) {
		return first // nothing was taken away
	}
	return min(first, math.Exp(rank))
}

// product ranks by the score.
type product func(iou float64) float64

func (product) rank(score float64) float64 { return score }

func (p product) weigh(b *liveBox, rank float64, selected []liveBox) float64 {
	for i := range selected {
		if o := selected[i].iou(b); o > 0 {
			rank *= p(o)
		}
	}
	return rank
}

func (product) score(rank, _ float64) float64 { return rank }

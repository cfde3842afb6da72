package detect

import (
	"cmp"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/internal/rng"
)

// clustered draws boxes around a few places, so that many overlap, and distinct scores.
func clustered(r *rand.Rand, n int) (boxes [][4]float64, scores []float64) {
	for range n {
		x, y := float64(r.IntN(4))*40+20*r.Float64(), float64(r.IntN(4))*40+20*r.Float64()
		boxes = append(boxes, [4]float64{x, y, x + 5 + 40*r.Float64(), y + 5 + 40*r.Float64()})
		scores = append(scores, 0.01+0.98*r.Float64())
	}
	return boxes, scores
}

// greedy is the textbook algorithm on the whole matrix of overlaps.
func greedy(boxes [][4]float64, scores []float64, threshold float64, plusOne bool) (keep []int) {
	order := make([]int, len(boxes))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(scores[b], scores[a]) })
	for _, i := range order {
		if !slices.ContainsFunc(keep, func(k int) bool { return IoU(boxes[k], boxes[i], plusOne) > threshold }) {
			keep = append(keep, i)
		}
	}
	return keep
}

// plain is the paper's algorithm as it is written, with a full search for the maximum each time.
func plain(boxes [][4]float64, scores []float64, plusOne bool, threshold float64, weight func(o float64) float64) (keep []int, rescored []float64) {
	s, left := slices.Clone(scores), map[int]bool{}
	for i := range s {
		left[i] = true
	}
	for len(left) > 0 {
		m := -1
		for i := range s {
			if left[i] && (m < 0 || s[i] > s[m]) {
				m = i
			}
		}
		delete(left, m)
		if s[m] < threshold {
			continue
		}
		keep, rescored = append(keep, m), append(rescored, s[m])
		for i := range left {
			s[i] *= weight(IoU(boxes[m], boxes[i], plusOne))
		}
	}
	return keep, rescored
}

func TestHardEqualsTextbookNMS(t *testing.T) {
	for seed := range uint64(20) {
		boxes, scores := clustered(rng.New(seed, "boxes"), 120)
		for _, threshold := range []float64{Zero, 0.3, 0.5, 1} {
			for _, plusOne := range []bool{false, true} {
				keep, rescored, err := SoftNMS(boxes, scores, SoftNMSConfig{Method: Hard, IoUThreshold: threshold, PlusOne: plusOne})
				if err != nil {
					t.Fatal(err)
				}
				if want := greedy(boxes, scores, threshold, plusOne); !slices.Equal(keep, want) {
					t.Fatalf("seed %d, threshold %g: kept %v, want %v", seed, threshold, keep, want)
				}
				for i, k := range keep {
					if rescored[i] != scores[k] {
						t.Fatalf("score of box %d changed from %g to %g", k, scores[k], rescored[i])
					}
				}
			}
		}
	}
}

func TestSoftEqualsTheAlgorithmAsWritten(t *testing.T) {
	for seed := range uint64(20) {
		boxes, scores := clustered(rng.New(seed, "boxes"), 100)
		for name, c := range map[string]struct {
			cfg    SoftNMSConfig
			weight func(o float64) float64
		}{
			"gaussian": {SoftNMSConfig{}, func(o float64) float64 { return math.Exp(-o * o / 0.5) }},
			"linear": {SoftNMSConfig{Method: Linear}, func(o float64) float64 {
				if o > 0.3 {
					return 1 - o
				}
				return 1
			}},
			"own": {SoftNMSConfig{Weight: func(o float64) float64 { return 1 - o*o }}, func(o float64) float64 { return 1 - o*o }},
		} {
			keep, rescored, err := SoftNMS(boxes, scores, c.cfg)
			if err != nil {
				t.Fatal(err)
			}
			wantKeep, want := plain(boxes, scores, false, 0.001, c.weight)
			if !slices.Equal(keep, wantKeep) {
				t.Fatalf("seed %d, %s: kept %v, want %v", seed, name, keep, wantKeep)
			}
			for i := range want {
				if math.Abs(rescored[i]-want[i]) > 1e-13 { // the Gaussian multiplies in another order
					t.Fatalf("seed %d, %s: place %d has %g, want %g", seed, name, i, rescored[i], want[i])
				}
			}
			if !slices.IsSortedFunc(rescored, func(a, b float64) int { return cmp.Compare(b, a) }) {
				t.Errorf("%s: rescored values rise: %v", name, rescored)
			}
			for i, k := range keep {
				if rescored[i] > scores[k] {
					t.Errorf("%s: box %d rose from %g to %g", name, k, scores[k], rescored[i])
				}
			}
		}
	}
}

func TestEqualScoresTakeTheLowestIndex(t *testing.T) {
	boxes := [][4]float64{{0, 0, 1, 1}, {5, 5, 6, 6}, {9, 9, 10, 10}, {5, 5, 6, 6}}
	scores := []float64{0.5, 0.5, 0.5, 0.5}
	for _, m := range []Method{Gaussian, Linear, Hard, None} {
		keep, _, err := SoftNMS(boxes, scores, SoftNMSConfig{Method: m, ScoreThreshold: Zero})
		if err != nil {
			t.Fatal(err)
		}
		want := map[Method][]int{Gaussian: {0, 1, 2, 3}, Linear: {0, 1, 2, 3}, Hard: {0, 1, 2}, None: {0, 1, 2, 3}}[m]
		if !slices.Equal(keep, want) {
			t.Errorf("%v: kept %v, want %v", m, keep, want)
		}
	}
}

func TestDisjointBoxesKeepTheirScores(t *testing.T) {
	var boxes [][4]float64
	var scores []float64
	r := rng.New(1, "scores")
	for i := range 50 {
		x := float64(10 * i)
		boxes, scores = append(boxes, [4]float64{x, 0, x + 10, 10}), append(scores, 0.01+r.Float64())
	}
	for _, m := range []Method{Gaussian, Linear, Hard, None} {
		keep, rescored, err := SoftNMS(boxes, scores, SoftNMSConfig{Method: m})
		if err != nil {
			t.Fatal(err)
		}
		if len(keep) != len(boxes) {
			t.Errorf("%v: kept %d of %d boxes that only touch", m, len(keep), len(boxes))
		}
		for i, k := range keep {
			if rescored[i] != scores[k] || i > 0 && rescored[i] > rescored[i-1] {
				t.Errorf("%v: place %d has box %d with %g, want %g in falling order", m, i, k, rescored[i], scores[k])
			}
		}
	}
}

func TestLimitsOfSigma(t *testing.T) {
	boxes, scores := clustered(rng.New(3, "boxes"), 100)
	keep, rescored, err := SoftNMS(boxes, scores, SoftNMSConfig{Sigma: 1e9})
	if err != nil || len(keep) != len(boxes) {
		t.Fatalf("kept %d of %d, %v", len(keep), len(boxes), err)
	}
	for i, k := range keep {
		if math.Abs(rescored[i]-scores[k]) > 1e-6 {
			t.Errorf("sigma 1e9: box %d fell from %g to %g", k, scores[k], rescored[i])
		}
	}
	// Sigma 1e-6 removes every box that overlaps a better one by more than 0.01 (there, the weight is e^-100).
	keep, _, err = SoftNMS(boxes, scores, SoftNMSConfig{Sigma: 1e-6})
	if err != nil {
		t.Fatal(err)
	}
	for i, k := range keep {
		for _, m := range keep[:i] {
			if o := IoU(boxes[k], boxes[m], false); o > 0.01 {
				t.Errorf("sigma 1e-6 kept boxes %d and %d, which overlap by %g", m, k, o)
			}
		}
	}
	hard := greedy(boxes, scores, 0, false)
	for _, k := range hard {
		if !slices.Contains(keep, k) {
			t.Errorf("sigma 1e-6 dropped box %d, which hard suppression at 0 keeps", k)
		}
	}
}

func TestHandValues(t *testing.T) {
	twins := [][4]float64{{0, 0, 10, 10}, {0, 0, 10, 10}}
	nested := [][4]float64{{0, 0, 10, 10}, {0, 0, 10, 5}}
	for name, c := range map[string]struct {
		boxes [][4]float64
		cfg   SoftNMSConfig
		want  []float64
	}{
		"twins, linear":            {twins, SoftNMSConfig{Method: Linear}, []float64{0.9}},
		"twins, linear, keep all":  {twins, SoftNMSConfig{Method: Linear, ScoreThreshold: Zero}, []float64{0.9, 0}},
		"twins, gaussian":          {twins, SoftNMSConfig{}, []float64{0.9, 0.8 * math.Exp(-2)}},
		"nested, gaussian":         {nested, SoftNMSConfig{}, []float64{0.9, 0.8 * 0.6065306597}},
		"nested, linear":           {nested, SoftNMSConfig{Method: Linear}, []float64{0.9, 0.4}},
		"nested, linear, plus one": {nested, SoftNMSConfig{Method: Linear, PlusOne: true}, []float64{0.9, 0.8 * 55. / 121}},
		"nested, at the threshold": {nested, SoftNMSConfig{Method: Hard, IoUThreshold: 0.5}, []float64{0.9, 0.8}},
	} {
		_, got, err := SoftNMS(c.boxes, []float64{0.9, 0.8}, c.cfg)
		if err != nil {
			t.Fatal(err)
		}
		if len(got) != len(c.want) {
			t.Errorf("%s: got %v, want %v", name, got, c.want)
			continue
		}
		for i := range got {
			if math.Abs(got[i]-c.want[i]) > 1e-9 {
				t.Errorf("%s: got %v, want %v", name, got, c.want)
			}
		}
	}
	if o := IoU(nested[0], nested[1], false); o != 0.5 {
		t.Errorf("IoU of nested boxes is %g, want 0.5", o)
	}
	if o := IoU(nested[0], nested[1], true); math.Abs(o-66./121) > 1e-12 {
		t.Errorf("pixel-inclusive IoU of nested boxes is %g, want 66/121", o)
	}
}

func TestOrderAndScaleOfTheInputDoNotMatter(t *testing.T) {
	r := rng.New(5, "boxes")
	boxes, scores := clustered(r, 80)
	for _, m := range []Method{Gaussian, Linear, Hard} {
		keep, rescored, err := SoftNMS(boxes, scores, SoftNMSConfig{Method: m})
		if err != nil {
			t.Fatal(err)
		}
		perm := r.Perm(len(boxes))
		pb, ps, sb := make([][4]float64, len(boxes)), make([]float64, len(boxes)), make([][4]float64, len(boxes))
		for i, p := range perm {
			pb[i], ps[i] = boxes[p], scores[p]
			for k := range 4 {
				sb[i][k] = boxes[i][k] * 8 // exact in binary
			}
		}
		k2, r2, err := SoftNMS(pb, ps, SoftNMSConfig{Method: m})
		if err != nil {
			t.Fatal(err)
		}
		for i := range k2 {
			k2[i] = perm[k2[i]]
		}
		if !slices.Equal(keep, k2) || !slices.Equal(rescored, r2) {
			t.Errorf("%v: a permuted input gives %v, want %v", m, k2, keep)
		}
		k3, r3, err := SoftNMS(sb, scores, SoftNMSConfig{Method: m})
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(keep, k3) || !slices.Equal(rescored, r3) {
			t.Errorf("%v: boxes eight times as large give %v, want %v", m, k3, keep)
		}
	}
}

func TestTopKIsAPrefix(t *testing.T) {
	boxes, scores := clustered(rng.New(7, "boxes"), 80)
	for _, m := range []Method{Gaussian, Linear, Hard, None} {
		all, _, err := SoftNMS(boxes, scores, SoftNMSConfig{Method: m})
		if err != nil {
			t.Fatal(err)
		}
		few, _, err := SoftNMS(boxes, scores, SoftNMSConfig{Method: m, TopK: 7})
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(few, all[:7]) {
			t.Errorf("%v: the best 7 are %v, want %v", m, few, all[:7])
		}
	}
}

func TestSoftNMSRefuses(t *testing.T) {
	nan, inf := math.NaN(), math.Inf(1)
	box, score := [][4]float64{{0, 0, 1, 1}, {0, 0, 1, 1}}, []float64{0.5, 0.4}
	for name, c := range map[string]struct {
		boxes  [][4]float64
		scores []float64
		cfg    SoftNMSConfig
		want   string
	}{
		"lengths":          {box, score[:1], SoftNMSConfig{}, "2 boxes but 1 scores"},
		"NaN box":          {[][4]float64{{0, 0, nan, 1}}, score[:1], SoftNMSConfig{}, "finite"},
		"infinite box":     {[][4]float64{{-inf, 0, inf, 1}}, score[:1], SoftNMSConfig{}, "finite"},
		"overflowing area": {[][4]float64{{-1e200, -1e200, 1e200, 1e200}}, score[:1], SoftNMSConfig{}, "area"},
		"NaN score":        {box[:1], []float64{nan}, SoftNMSConfig{}, "score 0 is NaN"},
		"infinite score":   {box[:1], []float64{inf}, SoftNMSConfig{}, "score 0"},
		"negative score":   {box[:1], []float64{-1}, SoftNMSConfig{}, "at least 0"},
		"x2 < x1":          {[][4]float64{{2, 0, 1, 1}}, score[:1], SoftNMSConfig{}, "x1 <= x2"},
		"y2 < y1":          {[][4]float64{{0, 2, 1, 1}}, score[:1], SoftNMSConfig{}, "y1 <= y2"},
		"sigma":            {box, score, SoftNMSConfig{Sigma: -1}, "sigma is -1"},
		"NaN sigma":        {box, score, SoftNMSConfig{Sigma: nan}, "sigma"},
		"threshold":        {box, score, SoftNMSConfig{Method: Hard, IoUThreshold: 1.5}, "IoU threshold is 1.5"},
		"below":            {box, score, SoftNMSConfig{IoUThreshold: -0.1}, "IoU threshold is -0.1"},
		"score threshold":  {box, score, SoftNMSConfig{ScoreThreshold: -1}, "score threshold"},
		"pre-threshold":    {box, score, SoftNMSConfig{PreThreshold: nan}, "pre-threshold"},
		"top-k":            {box, score, SoftNMSConfig{TopK: -1}, "top-k is -1"},
		"workers":          {box, score, SoftNMSConfig{Workers: -1}, "workers"},
		"method":           {box, score, SoftNMSConfig{Method: 9}, "Method(9)"},
		"weight above 1":   {box, score, SoftNMSConfig{Weight: func(o float64) float64 { return 1 + o }}, "returned 2 at IoU 1"},
		"weight NaN":       {box, score, SoftNMSConfig{Weight: func(float64) float64 { return nan }}, "returned NaN"},
		"weight panics":    {box, score, SoftNMSConfig{Weight: func(float64) float64 { panic("no") }}, "panicked: no"},
	} {
		keep, _, err := SoftNMS(c.boxes, c.scores, c.cfg)
		if err == nil || !strings.Contains(err.Error(), c.want) || keep != nil {
			t.Errorf("%s: got %v and %v, want an error with %q", name, keep, err, c.want)
		}
	}
	if _, err := ParseMethod("softest"); err == nil || !strings.Contains(err.Error(), "gaussian, linear, hard") {
		t.Errorf("a wrong method gives %v", err)
	}
	if _, err := IoUMatrix([][4]float64{{0, 0, 1, 1}}, [][4]float64{{1, 0, 0, 1}}, false); err == nil {
		t.Error("IoUMatrix accepts swapped corners")
	}
}

func TestSmallInputs(t *testing.T) {
	for _, m := range []Method{Gaussian, Linear, Hard, None} {
		cfg := SoftNMSConfig{Method: m}
		if keep, rescored, err := SoftNMS([][4]float32{}, []float32{}, cfg); err != nil || len(keep) != 0 || len(rescored) != 0 {
			t.Errorf("%v: no boxes give %v, %v", m, keep, err)
		}
		if keep, rescored, err := SoftNMS([][4]float32{{1, 2, 3, 4}}, []float32{0.25}, cfg); err != nil || !slices.Equal(keep, []int{0}) || rescored[0] != 0.25 {
			t.Errorf("%v: one box gives %v, %v", m, keep, err)
		}
		points := [][4]float32{{1, 1, 1, 1}, {1, 1, 1, 1}, {0, 0, 3, 3}, {0, 1, 3, 1}}
		if keep, _, err := SoftNMS(points, []float32{0.9, 0.8, 0.7, 0.6}, cfg); err != nil || !slices.Equal(keep, []int{0, 1, 2, 3}) {
			t.Errorf("%v: boxes without area give %v, %v; want them all", m, keep, err)
		}
	}
}

func batchOf(r *rand.Rand, images, n, classes int) (dets []Detection, boxes, scores []float32) {
	for i := range images {
		bs, _ := clustered(r, n)
		for k, b := range bs {
			for _, v := range b {
				boxes = append(boxes, float32(v))
			}
			for c := range classes {
				s := float32(r.Float64())
				scores = append(scores, s)
				corners := [4]float32(boxes[len(boxes)-4:])
				dets = append(dets, Detection{Image: i, Class: c, Box: RectOf(corners), Score: float64(s), Index: k})
			}
		}
	}
	return dets, boxes, scores
}

func TestResultDoesNotDependOnTheNumberOfWorkers(t *testing.T) {
	dets, _, _ := batchOf(rng.New(1, "batch"), 5, 60, 4)
	var want []Detection
	for _, workers := range []int{1, 2, 3, 8, 64} {
		for _, m := range []Method{Gaussian, Linear, Hard} {
			got, err := Suppress(dets, SoftNMSConfig{Method: m, Workers: workers})
			if err != nil {
				t.Fatal(err)
			}
			if m != Gaussian {
				continue
			}
			if want == nil {
				want = got
			}
			if !slices.Equal(got, want) {
				t.Errorf("%d workers give another result than one", workers)
			}
		}
	}
}

func TestClassesAndImagesDoNotMeet(t *testing.T) {
	dets, boxes, scores := batchOf(rng.New(2, "batch"), 3, 40, 3)
	cfg := SoftNMSConfig{TopK: 1000}
	got, err := Suppress(dets, cfg)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for image := range 3 {
		for class := range 3 {
			var b [][4]float64
			var s []float64
			var at []int
			for i, d := range dets {
				if d.Image == image && d.Class == class && d.Score > 0.05 {
					b, s, at = append(b, d.Box.Corners()), append(s, d.Score), append(at, i)
				}
			}
			keep, rescored, err := SoftNMS(b, s, SoftNMSConfig{})
			if err != nil {
				t.Fatal(err)
			}
			for i, k := range keep {
				n++
				want := dets[at[k]]
				want.Index, want.Score = at[k], rescored[i]
				if !slices.Contains(got, want) {
					t.Fatalf("image %d, class %d: %v is missing", image, class, want)
				}
			}
		}
	}
	if n != len(got) {
		t.Errorf("got %d detections, class by class it is %d", len(got), n)
	}

	// Tensors of a batch, with boxes shared or per class, say the same.
	perClass := make([]float32, 0, len(boxes)*3)
	for i := 0; i < len(boxes); i += 4 {
		for range 3 {
			perClass = append(perClass, boxes[i:i+4]...)
		}
	}
	st := tensors.FromFlatDataAndDimensions(scores, 3, 40, 3)
	for _, bt := range []*tensors.Tensor{
		tensors.FromFlatDataAndDimensions(boxes, 3, 40, 4), tensors.FromFlatDataAndDimensions(perClass, 3, 40, 3, 4),
	} {
		batch, err := MultiClassSoftNMS(bt, st, cfg)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range slices.Concat(batch...) {
			d.Index = (d.Image*40+d.Index)*3 + d.Class
			if !slices.Contains(got, d) {
				t.Fatalf("MultiClassSoftNMS gives %v, which Suppress does not", d)
			}
		}
		if len(slices.Concat(batch...)) != len(got) {
			t.Errorf("MultiClassSoftNMS gives %d detections, Suppress %d", len(slices.Concat(batch...)), len(got))
		}
	}
}

func TestPooledDetectionsAreOrderedAndCut(t *testing.T) {
	r := Rect{0, 0, 10, 10}
	far := Rect{50, 50, 10, 10}
	dets := []Detection{
		{Image: 9, Class: 2, Box: r, Score: 0.5},
		{Image: 9, Class: 1, Box: r, Score: 0.5},
		{Image: 4, Class: 1, Box: r, Score: 0.9},
		{Image: 9, Class: 1, Box: far, Score: 0.5},
		{Image: 9, Class: 1, Box: far, Score: 0.04},
	}
	got, err := Suppress(dets, SoftNMSConfig{TopK: 2})
	if err != nil {
		t.Fatal(err)
	}
	var at []int
	for _, d := range got {
		at = append(at, d.Index)
	}
	if want := []int{1, 3, 2}; !slices.Equal(at, want) {
		t.Errorf("kept %v, want %v: images as they come, score, class, index, two per image", at, want)
	}
}

func TestMultiClassRefuses(t *testing.T) {
	f := func(dims ...int) *tensors.Tensor {
		n := 1
		for _, d := range dims {
			n *= d
		}
		return tensors.FromFlatDataAndDimensions(make([]float32, n), dims...)
	}
	for name, c := range map[string]struct {
		boxes, scores *tensors.Tensor
		want          string
	}{
		"rank":       {f(4), f(1, 1), "want boxes [N, 4]"},
		"four":       {f(2, 5), f(2, 3), "want boxes [N, 4]"},
		"rows":       {f(2, 4), f(3, 3), "want boxes [N, 4]"},
		"classes":    {f(2, 2, 4), f(2, 3), "want boxes [N, 4]"},
		"batch":      {f(2, 2, 4), f(3, 2, 3), "want boxes [N, 4]"},
		"types":      {tensors.FromFlatDataAndDimensions(make([]float64, 8), 2, 4), f(2, 3), "Float64"},
		"nil":        {nil, f(2, 3), "must be given"},
		"whole type": {tensors.FromFlatDataAndDimensions(make([]int32, 8), 2, 4), tensors.FromFlatDataAndDimensions(make([]int32, 6), 2, 3), "want float32 or float64"},
		"NaN":        {f(2, 4), tensors.FromFlatDataAndDimensions([]float32{0, float32(math.NaN())}, 2, 1), "box 1, class 0"},
	} {
		if _, err := MultiClassSoftNMS(c.boxes, c.scores, SoftNMSConfig{}); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want an error with %q", name, err, c.want)
		}
	}
	if r, err := MultiClassSoftNMS(f(0, 4), f(0, 3), SoftNMSConfig{}); err != nil || len(r) != 1 || len(r[0]) != 0 {
		t.Errorf("no boxes give %v, %v", r, err)
	}
	if _, err := Suppress([]Detection{{Box: Rect{0, 0, -1, 2}}}, SoftNMSConfig{}); err == nil {
		t.Error("Suppress accepts a negative width")
	}
	if _, err := Suppress([]Detection{{Box: Rect{0, 0, 1, 2}, Score: 1}, {Box: Rect{0, 0, 1, 2}, Score: 1}}, SoftNMSConfig{Weight: func(float64) float64 { panic("no") }}); err == nil {
		t.Error("a panic of the weight function is no error")
	}
}

// BenchmarkSoftNMS1000 suppresses a thousand clustered boxes.
func BenchmarkSoftNMS1000(b *testing.B) {
	boxes, scores := clustered(rng.New(1, "bench"), 1000)
	for _, m := range []Method{Hard, Linear, Gaussian} {
		b.Run(fmt.Sprint(m), func(b *testing.B) {
			for b.Loop() {
				if _, _, err := SoftNMS(boxes, scores, SoftNMSConfig{Method: m}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

package compress

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/lathe-ml/lathe/internal/alloc"
)

// Target is what a search for a compressed network may cost. Zero fields set no limit.
type Target struct {
	Bytes   int64   `json:"bytes,omitempty"`   // of the parameters
	Latency float64 `json:"latency,omitempty"` // share of the float network's, by LatencyModel
	Drop    float64 `json:"drop,omitempty"`    // of the quality, in points of 100
	Quality float64 `json:"quality,omitempty"` // at least, of 100

	HasDrop bool `json:"-"` // Drop is a limit even when it is 0
}

// SearchPoint is a network that a search has made and judged.
type SearchPoint struct {
	Name     string   `json:"name"` // of method and bits, for people
	Method   string   `json:"method"`
	Recipe   *Recipe  `json:"recipe"`
	Bytes    int64    `json:"bytes"`
	Latency  float64  `json:"latency_share"` // by LatencyModel
	BitOps   float64  `json:"bit_operations"`
	MeanBits float64  `json:"mean_weight_bits"`
	Quality  float64  `json:"quality"` // of 100: accuracy, agreement or cosine
	Bar      Interval `json:"quality_95"`
	Drop     float64  `json:"drop"` // of the quality, in points
	KL       float64  `json:"kl"`
	Seconds  float64  `json:"seconds"`  // of the method's run
	Frontier bool     `json:"frontier"` // no other point is as small and as good
}

// Meets says which limits a point breaks; empty: it meets the target.
func (t Target) Meets(p SearchPoint) (broken []string) {
	if t.Bytes > 0 && p.Bytes > t.Bytes {
		broken = append(broken, fmt.Sprintf("size %d bytes > %d", p.Bytes, t.Bytes))
	}
	if t.Latency > 0 && p.Latency > t.Latency+1e-9 {
		broken = append(broken, fmt.Sprintf("latency share %.3f > %.3f", p.Latency, t.Latency))
	}
	if (t.HasDrop || t.Drop > 0) && p.Drop > t.Drop+1e-9 {
		broken = append(broken, fmt.Sprintf("drop %.2f points > %.2f", p.Drop, t.Drop))
	}
	if t.Quality > 0 && p.Quality < t.Quality-1e-9 {
		broken = append(broken, fmt.Sprintf("quality %.2f < %.2f", p.Quality, t.Quality))
	}
	return broken
}

// ErrNoPoint: no point that was searched meets the target.
var ErrNoPoint = errors.New("no point meets the target")

// Choose returns the point that meets the target: without a limit of size or latency the smallest; else, of those whose
// quality is the best or whose interval reaches up to it, the one that diverges least from the original, since a difference
// inside the interval is chance. The error wraps ErrNoPoint and names the point that comes nearest, by the share by which
// it breaks the limits.
func (t Target) Choose(points []SearchPoint) (int, error) {
	best, top := -1, math.Inf(-1)
	smallest := t.Bytes == 0 && t.Latency == 0
	for _, p := range points {
		if len(t.Meets(p)) == 0 {
			top = max(top, p.Quality)
		}
	}
	better := func(p, q SearchPoint) bool {
		bySize, byQuality, byKL := cmp.Compare(p.Bytes, q.Bytes), cmp.Compare(q.Quality, p.Quality), cmp.Compare(p.KL, q.KL)
		if smallest {
			return cmp.Or(bySize, byQuality, byKL) < 0
		}
		return cmp.Or(byKL, byQuality, bySize) < 0
	}
	for i, p := range points {
		ok := len(t.Meets(p)) == 0 && (smallest || max(p.Quality, p.Bar.High) >= top)
		if ok && (best < 0 || better(p, points[best])) {
			best = i
		}
	}
	if best >= 0 {
		return best, nil
	}
	if len(points) == 0 {
		return -1, fmt.Errorf("compress: there are no points: %w", ErrNoPoint)
	}
	near := 0
	for i := range points {
		if t.excess(points[i]) < t.excess(points[near]) {
			near = i
		}
	}
	return -1, fmt.Errorf("compress: %w; nearest is %s: %s", ErrNoPoint, points[near].Name, strings.Join(t.Meets(points[near]), ", "))
}

// excess says by how much a point breaks the limits.
func (t Target) excess(p SearchPoint) (e float64) {
	if t.Bytes > 0 {
		e += max(0, float64(p.Bytes)/float64(t.Bytes)-1)
	}
	if t.Latency > 0 {
		e += max(0, p.Latency/t.Latency-1)
	}
	if t.HasDrop || t.Drop > 0 {
		e += max(0, p.Drop-t.Drop) / 10
	}
	if t.Quality > 0 {
		e += max(0, t.Quality-p.Quality) / 10
	}
	return e
}

// MarkFrontier sets Frontier of the points that no other equals or beats in both size and quality, and sorts all by size.
func MarkFrontier(points []SearchPoint) {
	slices.SortStableFunc(points, func(a, b SearchPoint) int {
		return cmp.Or(cmp.Compare(a.Bytes, b.Bytes), cmp.Compare(b.Quality, a.Quality), cmp.Compare(a.KL, b.KL))
	})
	top := math.Inf(-1)
	for i := range points {
		if points[i].Frontier = points[i].Quality > top; points[i].Frontier {
			top = points[i].Quality
		}
	}
}

// Ladder chooses bits for the sites at several budgets: exact minima of the summed losses, from little to much. effects
// are those of Sensitivity with one form for each of bits, in that order; loss says what an effect costs and size what a
// site takes at some bits, in the unit of the budgets. Budgets below the least size are left out, and so are allocations
// that come twice. Losses of fewer bits are taken to be no smaller than those of more: a smaller one is chance.
func Ladder(effects []SiteEffects, bits []int, budgets []float64, loss func(Effect) float64, size func(site string, bits int) float64) ([]map[string]int, error) {
	items := make([][]alloc.Option, len(effects))
	for i, e := range effects {
		if len(e.Effects) != len(bits) {
			return nil, fmt.Errorf("compress: ladder: site %q has %d effects for %d numbers of bits", e.Site, len(e.Effects), len(bits))
		}
		order := make([]int, len(bits))
		for k := range order {
			order[k] = k
		}
		slices.SortFunc(order, func(a, b int) int { return cmp.Compare(bits[b], bits[a]) })
		items[i] = make([]alloc.Option, len(bits))
		worst := 0.
		for _, k := range order {
			worst = max(worst, loss(e.Effects[k]))
			items[i][k] = alloc.Option{Size: size(e.Site, bits[k]), Cost: worst}
		}
	}
	if len(items) == 0 {
		return nil, errors.New("compress: ladder: there are no sites")
	}
	o := alloc.Options{}
	if len(items) > ExactSites {
		o.Buckets = 1 << 13
	}
	front, err := alloc.Frontier(items, o)
	if err != nil {
		return nil, fmt.Errorf("compress: ladder: %w", err)
	}
	var out []map[string]int
	seen := map[string]bool{}
	for _, budget := range slices.Sorted(slices.Values(budgets)) {
		p, err := alloc.BySize(front, budget)
		if err != nil {
			continue
		}
		key := fmt.Sprint(p.Choice)
		if seen[key] {
			continue
		}
		seen[key] = true
		chosen := map[string]int{}
		for i, k := range p.Choice {
			chosen[effects[i].Site] = bits[k]
		}
		out = append(out, chosen)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("compress: ladder: the smallest allocation takes %g, the largest budget is %g: %w", front[0].Size, slices.Max(budgets), ErrInfeasible)
	}
	return out, nil
}

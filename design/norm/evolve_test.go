package norm_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/design/norm"
	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// levels are pictures of 4×4 pixels whose class is how bright they are, beside noise.
func levels(seed uint64, n int) *data.Images {
	m := &data.Images{N: n, H: 4, W: 4, C: 1, ClassNames: []string{"a", "b", "c", "d"}}
	r := rng.New(seed, "levels")
	for i := range n {
		m.Labels = append(m.Labels, int32(i%4))
		for range 16 {
			m.Pixels = append(m.Pixels, uint8(20+50*(i%4)+r.IntN(60)))
		}
	}
	return m
}

func levelData() norm.ProxyData {
	return norm.ProxyData{Train: levels(1, 64), Validation: levels(2, 40)}
}

func levelArchs() []norm.Arch { return norm.ProxyArchs(4, 1, 4, 3)[:2] }

func levelOptions() norm.ProxyOptions {
	return norm.ProxyOptions{Layer: norm.EvoOptions{Groups: 2}, Batch: 8, Steps: 12, QualitySteps: 8, MinAccuracy: .3, StabilitySteps: 4, StabilityBatch: 4}
}

func normActOf(t *testing.T, name string) zoo.NormAct {
	t.Helper()
	return zoo.NormAct{Norm: build(t, graphOf(t, name), 2)}
}

func TestProtocolsJudgeKnownLayers(t *testing.T) {
	ctx := context.Background()
	o := levelOptions()
	o.StabilitySteps, o.Steps, o.QualitySteps = 100, 40, 40
	p, err := norm.NewProxy(enginetest.Backend(), levelArchs()[:1], levelData(), o)
	if err != nil {
		t.Fatal(err)
	}
	j, err := p.Judge(ctx, normActOf(t, "bn-relu"))
	if err != nil || j.Verdict != norm.Accepted || len(j.Scores) != 1 || j.Scores[0] < .5 || j.Iterations != 100 {
		t.Errorf("bn-relu: %+v, %v", j, err)
	}
	var blind norm.LayerGraph // 0·x: nothing of x is left
	if err := json.Unmarshal([]byte(`{"nodes":[{"op":"mul","in":[0,1]}]}`), &blind); err != nil {
		t.Fatal(err)
	}
	rejected, report, err := norm.RejectQuality(ctx, enginetest.Backend(), blind, levelArchs(), levelData(), o)
	if err != nil || !rejected || report.Verdict != norm.ByQuality || !strings.Contains(report.Reason, "preact") {
		t.Errorf("0·x: %+v, %v", report, err)
	}
	rejected, report, err = norm.RejectQuality(ctx, enginetest.Backend(), norm.LayerGraph{Nodes: []norm.GNode{{Op: "exp", In: []int{2}}}}, levelArchs(), levelData(), o)
	if err != nil || !rejected || report.Verdict != norm.ByStatic {
		t.Errorf("exp(v0): %+v, %v", report, err)
	}
	for name, bad := range map[string]bool{"relu": true, "square": true, "b0": false} {
		got, norms, err := norm.RejectStability(ctx, enginetest.Backend(), graphOf(t, name), levelArchs()[0], levelData(), o)
		if err != nil || got != bad || len(norms) == 0 {
			t.Errorf("%s: rejected %v after %d steps (%v), want %v", name, got, len(norms), err, bad)
		}
	}
}

// The Hessian-vector product of double differentiation is that of two gradients.
func TestAscentBySecondDerivativesIsThatByDifferences(t *testing.T) {
	for _, name := range []string{"s0", "bn-silu", "b0"} {
		var norms [2][]float64
		for i, fd := range []bool{false, true} {
			o := levelOptions()
			o.FiniteDifference, o.StabilitySteps = fd, 2
			p, err := norm.NewProxy(enginetest.Backend(), levelArchs(), levelData(), o)
			if err != nil {
				t.Fatal(err)
			}
			if _, norms[i], err = p.Stability(context.Background(), normActOf(t, name)); err != nil {
				t.Fatal(err)
			}
		}
		if a, b := norms[0], norms[1]; math.Abs(a[0]-b[0]) > 1e-5*b[0] || math.Abs(a[1]-b[1]) > .05*b[1] { // the difference has an error of its own
			t.Errorf("%s: ‖∇ℓ‖ is %v by second derivatives and %v by differences", name, a, b)
		}
		if norms[0][1] <= norms[0][0] {
			t.Errorf("%s: the ascent goes down: %v", name, norms[0])
		}
	}
}

func searchOptions() norm.SearchOptions {
	return norm.SearchOptions{Space: norm.Space{Batch: true, Nodes: 4}, Proxy: levelOptions(), Window: 8, Tournament: 3, Fresh: .4, Proposals: 24, Seed: 7}
}

// history is what must be the same in two searches of one seed.
func history(r *norm.SearchResult) string {
	s := ""
	for _, p := range r.Proposals {
		s += fmt.Sprintln(p.Number, p.Parent, p.Twin, p.Layer, p.Judgement)
	}
	return s
}

func TestSearchIsRepeatableAndResumes(t *testing.T) {
	o := searchOptions()
	for _, parallel := range []int{1, 3} {
		o.Parallel, o.Archive, o.Observe, o.Novel = parallel, "", nil, parallel == 3
		want, err := norm.Search(context.Background(), enginetest.Backend(), levelArchs(), levelData(), o)
		if err != nil {
			t.Fatal(err)
		}
		if len(want.Proposals) != 24 || want.Count(norm.Accepted) == 0 || want.Count(norm.Accepted) == 24 {
			t.Errorf("%d proposals, %d accepted", len(want.Proposals), want.Count(norm.Accepted))
		}
		children, twins := 0, 0
		for _, p := range want.Proposals {
			if p.Parent >= 0 {
				children++
			}
			if p.Twin >= 0 {
				twins++
			}
		}
		if children == 0 || (twins == 0) != o.Novel {
			t.Errorf("%d children, %d twins", children, twins)
		}

		o.Archive = filepath.Join(t.TempDir(), "search.json")
		for _, stop := range []int{5, 6, 14} {
			ctx, cancel := context.WithCancel(context.Background())
			o.Observe = func(p norm.Proposal, _ *norm.SearchResult) {
				if p.Number >= stop {
					cancel()
				}
			}
			r, err := norm.Search(ctx, enginetest.Backend(), levelArchs(), levelData(), o)
			cancel()
			if !errors.Is(err, context.Canceled) || r == nil || len(r.Proposals) < stop {
				t.Fatalf("stopped at %d: %v, %v", stop, r, err)
			}
		}
		o.Observe = func(p norm.Proposal, _ *norm.SearchResult) {
			if p.Number < 14 {
				t.Errorf("proposal %d was judged again", p.Number)
			}
		}
		got, err := norm.Search(context.Background(), enginetest.Backend(), levelArchs(), levelData(), o)
		if err != nil {
			t.Fatal(err)
		}
		if history(got) != history(want) {
			t.Errorf("%d at once: a search that was stopped went another way:\n%s\n%s", parallel, history(got), history(want))
		}
		o.Observe = nil
		again, err := norm.Search(context.Background(), enginetest.Backend(), levelArchs(), levelData(), o) // finished: nothing is done
		if err != nil || history(again) != history(want) {
			t.Errorf("a finished search: %v", err)
		}
		front, best := got.Front(), got.Best(0)
		if len(front) == 0 || len(best) == 0 || front[0].Number != best[0].Number {
			t.Errorf("the front lacks the best mean")
		}

		other := o
		other.Seed++
		if _, err := norm.Search(context.Background(), enginetest.Backend(), levelArchs(), levelData(), other); err == nil || !strings.Contains(err.Error(), "other options") {
			t.Errorf("another search's archive was taken: %v", err)
		}
		b, err := os.ReadFile(o.Archive)
		if err != nil {
			t.Fatal(err)
		}
		for what, bad := range map[string]string{
			"verdict":   strings.Replace(string(b), `"verdict":"accepted"`, `"verdict":"perfect"`, 1),
			"scores":    strings.Replace(string(b), `"scores":[`, `"scores":[7,`, 1),
			"number":    strings.Replace(string(b), `"number":1,`, `"number":9,`, 1),
			"parent":    strings.Replace(string(b), `"parent":-1,`, `"parent":3,`, 1),
			"cut short": string(b[:len(b)/2]),
			"format":    strings.Replace(string(b), `"format":1`, `"format":9`, 1),
		} {
			if bad == string(b) {
				t.Fatalf("%s: nothing was changed", what)
			}
			if err := os.WriteFile(o.Archive, []byte(bad), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := norm.Search(context.Background(), enginetest.Backend(), levelArchs(), levelData(), o); err == nil || !strings.Contains(err.Error(), "search.json") {
				t.Errorf("%s: got %v", what, err)
			}
		}
	}
}

func TestRandomSearchDrawsTheSameLayers(t *testing.T) {
	o := searchOptions()
	o.Proposals = 10
	a, err := norm.Search(context.Background(), enginetest.Backend(), levelArchs()[:1], levelData(), o)
	if err != nil {
		t.Fatal(err)
	}
	o.RandomOnly = true
	b, err := norm.Search(context.Background(), enginetest.Backend(), levelArchs()[:1], levelData(), o)
	if err != nil {
		t.Fatal(err)
	}
	for i, p := range a.Proposals {
		if b.Proposals[i].Parent != -1 {
			t.Errorf("random search has a child")
		}
		if p.Parent < 0 && fmt.Sprint(p.Layer) != fmt.Sprint(b.Proposals[i].Layer) {
			t.Errorf("proposal %d is another random layer", i)
		}
	}
}

// Whatever a candidate does is a rejection.
func TestBadCandidatesAreRejections(t *testing.T) {
	broken := func(what string) norm.Arch {
		return norm.Arch{Name: what, Build: func(layer zoo.NormAct, seed uint64) (*nn.Network, error) {
			switch what {
			case "fails":
				return nil, errors.New("no such network")
			case "panics":
				panic("no such network")
			}
			return zoo.PreActResNet(zoo.PreActResNetOptions{Size: 4, Channels: 2, Classes: 4, Stages: 1, Width: 2, NormAct: layer, Seed: seed}) // another input
		}}
	}
	for _, c := range []struct {
		arch    norm.Arch
		timeout time.Duration
		verdict string
	}{
		{broken("fails"), 0, norm.ByError},
		{broken("panics"), 0, norm.ByError},
		{broken("another input"), 0, norm.ByError},
		{levelArchs()[0], 1, norm.ByTimeout},
	} {
		o := searchOptions()
		o.Proposals, o.Proxy.Timeout = 6, c.timeout
		r, err := norm.Search(context.Background(), enginetest.Backend(), []norm.Arch{c.arch}, levelData(), o)
		if err != nil {
			t.Errorf("%s: %v", c.arch.Name, err)
			continue
		}
		if n := r.Count(c.verdict) + r.Count(norm.ByStatic); n != 6 || r.Count(c.verdict) == 0 {
			t.Errorf("%s: %d rejections by %s", c.arch.Name, n, c.verdict)
		}
	}
	p, err := norm.NewProxy(enginetest.Backend(), levelArchs(), levelData(), func() norm.ProxyOptions { o := levelOptions(); o.LR = 1e30; return o }())
	if err != nil {
		t.Fatal(err)
	}
	j, err := p.Judge(context.Background(), normActOf(t, "square"))
	if err != nil || j.Verdict != norm.ByNaN && j.Verdict != norm.ByQuality {
		t.Errorf("a diverging layer: %+v, %v", j, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := p.Judge(ctx, normActOf(t, "b0")); !errors.Is(err, context.Canceled) {
		t.Errorf("a stopped judgement: %v", err)
	}
}

func TestSearchRefusals(t *testing.T) {
	try := func(archs []norm.Arch, d norm.ProxyData, set func(o *norm.SearchOptions)) error {
		o := searchOptions()
		o.Proposals = 1
		set(&o)
		_, err := norm.Search(context.Background(), enginetest.Backend(), archs, d, o)
		return err
	}
	archs, d := levelArchs(), levelData()
	small := d
	small.Train = d.Train.First(4)
	odd := d
	odd.Validation = d.Validation.Pool2()
	none := func(*norm.SearchOptions) {}
	for name, err := range map[string]error{
		"no architecture":      try(nil, d, none),
		"no images":            try(archs, norm.ProxyData{}, none),
		"fewer than a batch":   try(archs, small, none),
		"another size":         try(archs, odd, none),
		"negative window":      try(archs, d, func(o *norm.SearchOptions) { o.Window = -1 }),
		"negative proposals":   try(archs, d, func(o *norm.SearchOptions) { o.Proposals = -1 }),
		"probability":          try(archs, d, func(o *norm.SearchOptions) { o.Fresh = 2 }),
		"nodes":                try(archs, d, func(o *norm.SearchOptions) { o.Space.Nodes = 65 }),
		"eps":                  try(archs, d, func(o *norm.SearchOptions) { o.Proxy.Layer.Eps = -1 }),
		"linear":               try(archs, d, func(o *norm.SearchOptions) { o.Proxy.Layer.Linear = true }),
		"accuracy":             try(archs, d, func(o *norm.SearchOptions) { o.Proxy.MinAccuracy = 1 }),
		"archive in no folder": try(archs, d, func(o *norm.SearchOptions) { o.Archive = filepath.Join(t.TempDir(), "none", "x.json") }),
	} {
		if err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
	o := searchOptions()
	o.Proposals, o.Tournament = 1, 99
	r, err := norm.Search(context.Background(), enginetest.Backend(), archs, d, o)
	if err != nil || !strings.Contains(r.Note, "clipped to 8") {
		t.Errorf("a large tournament: %v, %v", r, err)
	}
}

func TestRerankSortsByTheFinalScores(t *testing.T) {
	o := searchOptions()
	o.Proposals = 30
	r, err := norm.Search(context.Background(), enginetest.Backend(), levelArchs()[:1], levelData(), o)
	if err != nil {
		t.Fatal(err)
	}
	p, err := norm.NewProxy(enginetest.Backend(), norm.ProxyArchs(4, 1, 4, 4)[:1], levelData(), levelOptions())
	if err != nil {
		t.Fatal(err)
	}
	ranked, err := norm.Rerank(context.Background(), p, r, 3, nil)
	if err != nil || len(ranked) == 0 || len(ranked) > 3 {
		t.Fatalf("%d layers, %v", len(ranked), err)
	}
	for i := 1; i < len(ranked); i++ {
		if ranked[i].Mean() > ranked[i-1].Mean() {
			t.Errorf("place %d is better than place %d", i+1, i)
		}
	}
}

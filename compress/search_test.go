package compress

import (
	"errors"
	"strings"
	"testing"
)

func TestChooseTakesTheBestPointOfABudget(t *testing.T) {
	points := []SearchPoint{
		{Name: "a8", Bytes: 800, Latency: .25, Quality: 90, Drop: .1, KL: .01},
		{Name: "a6", Bytes: 600, Latency: .25, Quality: 89.8, Drop: .3, KL: .02},
		{Name: "b4", Bytes: 400, Latency: .2, Quality: 88, Drop: 2.1, KL: .1},
		{Name: "a4", Bytes: 400, Latency: .2, Quality: 80, Drop: 10.1, KL: .4},
		{Name: "b6", Bytes: 610, Latency: .25, Quality: 89.8, Drop: .3, KL: .015},
		{Name: "b2", Bytes: 200, Latency: .1, Quality: 10, Drop: 80, KL: 3},
	}
	for _, c := range []struct {
		t    Target
		want string
	}{
		{Target{Bytes: 800}, "a8"},
		{Target{Bytes: 500}, "b4"},
		{Target{Bytes: 650}, "b6"}, // as good as a6, with less divergence
		{Target{Bytes: 200}, "b2"},
		{Target{Drop: .5, HasDrop: true}, "a6"},
		{Target{Drop: 3}, "b4"},
		{Target{Quality: 89.9}, "a8"},
		{Target{Latency: .2}, "b4"},
		{Target{Bytes: 400, Drop: .5}, "drop 2.10 points > 0.50"},
		{Target{Bytes: 100}, "b2"},
		{Target{HasDrop: true}, "drop 0.10 points > 0.00"},
	} {
		i, err := c.t.Choose(points)
		switch {
		case err != nil && !errors.Is(err, ErrNoPoint):
			t.Error(err)
		case err != nil && !strings.Contains(err.Error(), c.want), err == nil && points[i].Name != c.want:
			t.Errorf("%+v: %d %v, want %s", c.t, i, err, c.want)
		}
	}
	noisy := []SearchPoint{{Name: "lucky", Bytes: 100, Quality: 90.5, Bar: Interval{88, 92}, KL: .2}, {Name: "close", Bytes: 100, Quality: 90, Bar: Interval{88, 92}, KL: .01}, {Name: "worse", Bytes: 100, Quality: 80, Bar: Interval{78, 82}, KL: .001}}
	if i, err := (Target{Bytes: 100}).Choose(noisy); err != nil || noisy[i].Name != "close" {
		t.Errorf("%d %v: a difference inside the interval decides", i, err)
	}
	MarkFrontier(points)
	got := ""
	for _, p := range points {
		if p.Frontier {
			got += p.Name + " "
		}
	}
	if got != "b2 b4 a6 a8 " {
		t.Errorf("the frontier is %s", got)
	}
	if _, err := (Target{}).Choose(nil); !errors.Is(err, ErrNoPoint) {
		t.Error(err)
	}
}

func TestLadderSpendsBitsWhereTheyCount(t *testing.T) {
	effect := func(losses ...float64) (out []Effect) {
		for _, l := range losses {
			out = append(out, Effect{Agreement: Agreement{KL: l}})
		}
		return out
	}
	effects := []SiteEffects{{Site: "tough", Effects: effect(0, .001, .002)}, {Site: "tender", Effects: effect(0, 1, 5)}, {Site: "odd", Effects: effect(.1, .05, .2)}}
	rungs, err := Ladder(effects, []int{8, 4, 2}, []float64{6, 12, 14, 24, 1, 12.5}, func(e Effect) float64 { return e.KL }, func(_ string, bits int) float64 { return float64(bits) })
	if err != nil {
		t.Fatal(err)
	}
	want := []map[string]int{
		{"tough": 2, "tender": 2, "odd": 2},
		{"tough": 2, "tender": 8, "odd": 2},
		{"tough": 2, "tender": 8, "odd": 4}, // its smaller loss at four bits is chance: as at eight
		{"tough": 8, "tender": 8, "odd": 4},
	}
	if len(rungs) != len(want) {
		t.Fatalf("%v", rungs)
	}
	for i, r := range rungs {
		for s, b := range want[i] {
			if r[s] != b {
				t.Errorf("rung %d gives %s %d bits, want %d", i, s, r[s], b)
			}
		}
	}
	if _, err := Ladder(effects, []int{8, 4, 2}, []float64{1}, func(e Effect) float64 { return e.KL }, func(_ string, bits int) float64 { return float64(bits) }); !errors.Is(err, ErrInfeasible) {
		t.Error(err)
	}
	if _, err := Ladder(effects, []int{8}, []float64{1}, nil, nil); err == nil {
		t.Error("effects that do not fit the bits accepted")
	}
}

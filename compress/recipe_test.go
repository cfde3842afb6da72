package compress

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/lathe-ml/lathe/nn"
)

func chain(names ...string) *nn.Network {
	n := &nn.Network{}
	for _, name := range names {
		var op nn.Op = nn.Dense{Out: 2}
		if strings.HasPrefix(name, "product") {
			op = nn.MatMul{}
		}
		if strings.HasPrefix(name, "relu") {
			op = nn.ReLU
		}
		n.Nodes = append(n.Nodes, &nn.Node{Name: name, Op: op})
	}
	return n
}

func TestRecipesGiveEveryStepItsSites(t *testing.T) {
	net := chain("patch", "blk.0.fc1", "relu0", "blk.0.fc2", "product", "blk.1.fc1", "blk.1.fc2", "head")
	for _, c := range []struct {
		recipe string
		want   string // the steps' sites, or part of an error
	}{
		{"steps: [{method: a, bits: 4}]", "[blk.0.fc1 blk.0.fc2 blk.1.fc1 blk.1.fc2 head patch product]"},
		{"steps: [{method: a, bits: 4, exclude: [patch, head]}]", "[blk.0.fc1 blk.0.fc2 blk.1.fc1 blk.1.fc2 product]"},
		{`steps: [{method: a, bits: 4, include: ['blk\.\d+\.fc1']}, {method: b, bits: 8}]`, "[blk.0.fc1 blk.1.fc1][blk.0.fc2 blk.1.fc2 head patch product]"},
		{`steps: [{method: a, bits: 4, include: ['blk\.1'], exclude: ['fc2$']}, {method: b, bits: 8, include: [head]}]`, "[blk.1.fc1][head]"},
		{"steps:\n- {method: a, bits: 4}\n- {method: b, bits: 8}", `line 3: step 1 (a) and step 2 (b) both take "patch"`},
		{`steps: [{method: a, bits: 4, include: ['kind:dense'], exclude: [head]}]`, "[blk.0.fc1 blk.0.fc2 blk.1.fc1 blk.1.fc2 patch]"},
		{"steps:\n- method: a\n  bits: 4\n  include: ['kind:lstm']", `line 4: include: no site is of kind "lstm"; here are dense, matmul`},
		{"steps:\n- method: a\n  bits: 4\n  include: [heat]", `line 4: include: no site is named or matches "heat"; did you mean "head"?`},
		{"steps:\n- method: a\n  bits: 4\n  exclude: [relu0]", `line 4: exclude: no site`},
		{"steps:\n- method: a\n  bits: 4\n  include: [head]\n  exclude: [head]", `line 2: step 1 (a) has no site`},
		{"steps:\n- method: a\n  bits: 4\n  include: [head]\n  sites:\n    patch: {weight: 8}", `line 6: sites.patch: step 1 (a) does not take`},
	} {
		r, err := ParseRecipe("r.yaml", []byte(c.recipe))
		if err != nil {
			t.Errorf("%s: %v", c.recipe, err)
			continue
		}
		sites, err := r.Assign(net)
		got := ""
		for _, s := range sites {
			got += fmt.Sprint(slices.Sorted(maps.Keys(s)))
		}
		if err != nil {
			got = err.Error()
		}
		if err == nil && got != c.want || err != nil && !strings.Contains(got, c.want) {
			t.Errorf("%s: %s, want %s", c.recipe, got, c.want)
		}
	}
}

func TestRecipesAreReadAsTheyAreWritten(t *testing.T) {
	r := &Recipe{Seed: 3, Cases: 64, Preprocess: "resize=256", Opset: 21, Steps: []Part{
		{Method: "a", Bits: 4, ActBits: 8, Include: []string{`blk\.0`, "head"}, Sites: map[string]Bits{"head": {Weight: 8}}, Set: map[string]string{"steps": "100", "grid": "log2", "on": "true"}},
		{Method: "b", Bits: 8, Exclude: []string{"x"}},
	}}
	b, err := r.Marshal("made by\ntwo lines")
	if err != nil {
		t.Fatal(err)
	}
	back, err := ParseRecipe("r.yaml", b)
	if err != nil {
		t.Fatal(err)
	}
	again, err := back.Marshal("made by\ntwo lines")
	if err != nil || string(again) != string(b) {
		t.Errorf("%v\n%s\n%s", err, b, again)
	}
	if back.Steps[0].Set["steps"] != "100" || back.Steps[0].Set["on"] != "true" || back.Seed != 3 || !strings.HasPrefix(string(b), "# made by\n# two lines\n") {
		t.Errorf("%+v", back)
	}
	plain, err := ParseRecipe("r.yaml", []byte("steps: [{method: a, bits: 4, set: {steps: 100, rate: 0.5, on: true}}]"))
	if err != nil || plain.Steps[0].Set["rate"] != "0.5" || plain.Steps[0].Set["on"] != "true" {
		t.Errorf("%+v %v", plain, err)
	}
}

func TestBadRecipesAreRefusedByLine(t *testing.T) {
	for _, c := range []struct{ recipe, want string }{
		{"", "empty"},
		{"seed: 1", "no steps"},
		{"steps: []", "no steps"},
		{"steps:\n- methd: a\n  bits: 4", `line 2: there is no key "methd"; did you mean "method"?`},
		{"stepz:\n- method: a", `line 1: there is no key "stepz"; did you mean "steps"?`},
		{"steps:\n- bits: 4", "line 2: method: a step names its method"},
		{"steps:\n- method: a\n  bits: four", "line 3"},
		{"steps:\n- method: a\n  bits: 4\n  bits: 5", "line 4"},
		{"steps:\n- method: a\n  bits: 4\n  include: ['(']", "line 4: include: \"(\" is no regular expression"},
		{"steps:\n- method: a\n  bits: 4\n  include: ['']", "line 4: include: an empty pattern"},
		{"steps:\n- method: a\n  sites: {x: {weight: -1}}", "line 3: sites.x"},
		{"steps:\n- method: a\n  sites: {x: {wight: 1}}", `line 3: there is no key "wight"; did you mean "weight"?`},
		{"a: &x 1\nsteps: *x", "aliases"},
		{"steps: [{method: a}]\n---\nsteps: [{method: b}]", "more than one document"},
		{"calibration_cases: -2\nsteps: [{method: a}]", "calibration_cases: -2"},
		{"- 1", "line 1"},
		{"\t{", "cannot start any token"},
		{"seed: -1\nsteps: [{method: a}]", "line 1"},
		{"#" + strings.Repeat("x", MaxRecipe), "at most"},
	} {
		if _, err := ParseRecipe("r.yaml", []byte(c.recipe)); err == nil || !strings.Contains(err.Error(), c.want) || !strings.HasPrefix(err.Error(), "r.yaml: ") {
			t.Errorf("%.60q: %v, want %q", c.recipe, err, c.want)
		}
	}
}

func FuzzParseRecipe(f *testing.F) {
	f.Add([]byte("seed: 1\nsteps:\n- method: a\n  bits: 4\n  include: [x]\n  sites: {x: {weight: 4}}\n  set: {k: v}\n"))
	f.Add([]byte("steps: &a [*a]"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := ParseRecipe("r", b)
		if err != nil {
			return
		}
		out, err := r.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ParseRecipe("r", out); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	})
}

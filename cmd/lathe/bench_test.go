package main

import (
	"bytes"
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/lathe-ml/lathe/lab/bench"
	"github.com/lathe-ml/lathe/lab/pages"
)

func TestBenchPeer(t *testing.T) {
	for _, c := range []struct{ spec, name, command string }{
		{"python3 bench.py", "peer2", "python3 bench.py"},
		{"pytorch=python3 bench.py --compile", "pytorch", "python3 bench.py --compile"},
		{"./run --x=y", "peer2", "./run --x=y"},
	} {
		p, err := benchPeer(c.spec, 1)
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(p.Command("vit", 2, 5), " "); p.Name != c.name || got != c.command+" --threads 2 --steps 5 vit" {
			t.Errorf("%q: %q, %q", c.spec, p.Name, got)
		}
	}
	if _, err := benchPeer("pytorch=", 0); err == nil {
		t.Error("a peer without a command was taken")
	}
}

func TestBenchRefuses(t *testing.T) {
	for args, want := range map[string]string{
		"bench train vgg":                              `there is no network "vgg"`,
		"bench train --rounds 0":                       "each must be at least 1",
		"bench train --threads 0":                      "each must be at least 1",
		"bench train --backends none":                  `there is no backend "none"`,
		"bench train --peer true --peer peer=true vit": `two contestants are called "peer"`,
		"bench machine --threads 0":                    "accepted: 1 to 1024",
		"bench step vgg":                               `there is no network "vgg"`,
	} {
		var out, errs bytes.Buffer
		if code := run(strings.Fields(args), nil, &out, &errs); code != exitUsage || !strings.Contains(errs.String(), want) {
			t.Errorf("%s: code %d, %q; want %d and %q", args, code, errs.String(), exitUsage, want)
		}
	}
}

func TestBenchStepAndMachinePrintJSONLines(t *testing.T) {
	var out, errs bytes.Buffer
	if code := run([]string{"bench", "step", "resnet", "--steps", "1"}, nil, &out, &errs); code != exitDone {
		t.Fatal(errs.String())
	}
	var s bench.Step
	if err := json.Unmarshal(out.Bytes(), &s); err != nil || s.Network != "resnet" || s.Backend == "" || !(s.Wall > 0) {
		t.Errorf("%s: %v", out.String(), err)
	}
	out.Reset()
	if code := run([]string{"bench", "machine"}, nil, &out, &errs); code != exitDone {
		t.Fatal(errs.String())
	}
	var m bench.Machine
	if err := json.Unmarshal(out.Bytes(), &m); err != nil || !(m.FMA > 0) {
		t.Errorf("%s: %v", out.String(), err)
	}
}

// TestPerformancePageIsOfItsFile: what stands between the marks of docs/performance.md is what docs/performance.json
// says.
func TestPerformancePageIsOfItsFile(t *testing.T) {
	changed, err := pages.Write("../..", true)
	if err != nil {
		t.Fatal(err)
	}
	if slices.Contains(changed, "docs/performance.md") {
		t.Error(`docs/performance.md is not up to date: run "lathe docs"`)
	}
}

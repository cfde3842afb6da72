package engine_test

import (
	"runtime"
	"strings"
	"testing"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine"
)

func TestOpenNamesTheChoicesForAnUnknownBackend(t *testing.T) {
	_, err := engine.Open("warp")
	if err == nil || !strings.Contains(err.Error(), "go") || !strings.Contains(err.Error(), "warp") {
		t.Errorf("got %v", err)
	}
	t.Setenv(engine.EnvBackend, "warp")
	if _, err := engine.Open(""); err == nil {
		t.Error("an unknown backend in the environment was ignored")
	}
	if b, err := engine.Open("go"); err != nil || engine.Name(b) != "go" {
		t.Errorf("the flag does not win over the environment: %v %v", b, err)
	}
}

func TestOpenSharesBackends(t *testing.T) {
	a, err := engine.Open("go")
	if err != nil {
		t.Fatal(err)
	}
	if b, _ := engine.Open("go"); a != b {
		t.Error("two backends for one name")
	}
}

func TestChoiceIsAvailable(t *testing.T) {
	t.Setenv(engine.EnvBackend, "")
	c, err := engine.Choose("")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range engine.Backends() {
		if s.Name == c.Name && !s.Available {
			t.Errorf("chose %q, which is not available: %s", s.Name, s.Reason)
		}
		if s.Reason == "" {
			t.Errorf("backend %q gives no reason", s.Name)
		}
	}
}

func TestExecReturnsPanicsAsErrors(t *testing.T) {
	e, err := engine.NewExec(engine.Go(), func(in []*graph.Node) []*graph.Node {
		if in[0].Rank() == 2 {
			panic("no matrices here")
		}
		return []*graph.Node{graph.Add(in[0], in[0])}
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.Call([][]float32{{1}}); err == nil || !strings.Contains(err.Error(), "no matrices") {
		t.Errorf("got %v", err)
	}
	x := tensors.FromValue([][]float32{{1}})
	if _, err := e.CallDonating([]*tensors.Tensor{x}, []bool{true}); err == nil {
		t.Error("a panic in building was lost")
	}
	if !x.Ok() {
		t.Error("a graph that could not be built cost its caller a tensor")
	}
	out, err := e.Call([]float32{1, 2})
	if err != nil || !out[0].Shape().Equal(shapes.Make(dtypes.Float32, 2)) {
		t.Errorf("got %v, %v", out, err)
	}
}

func TestThisCPUIsNamed(t *testing.T) {
	if c := engine.ThisCPU(); c.Model == "" || c.Cores < 1 || c.Arch == "" {
		t.Errorf("got %+v", c)
	}
}

func TestAvailableMemory(t *testing.T) {
	switch n := engine.AvailableMemory(); {
	case n < 0 || n > 1<<52:
		t.Errorf("%d bytes are available", n)
	case n == 0 && runtime.GOOS == "linux":
		t.Error("Linux says how much memory is available")
	}
}

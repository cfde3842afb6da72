package native

import (
	"strings"
	"testing"

	"github.com/gomlx/compute"
	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
)

// TestGuardsSeeWritesOutside breaks the memory of a computation on purpose, between two groups of its work.
func TestGuardsSeeWritesOutside(t *testing.T) {
	b := open(t, "")
	b.mem.watched = &watchedMemory{used: map[*float32][]float32{}}
	bd := b.Builder("guards")
	f := bd.Main()
	must := func(v Value, err error) Value {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	shape := shapes.Make(dtypes.Float32, 8, 8)
	x := must(f.Parameter("x", shape, nil))
	k := must(f.Constant(make([]float32, 64), 8, 8))
	product := func(x, y Value) Value {
		return must(f.DotGeneral(x, []int{1}, nil, y, []int{0}, nil, compute.DotGeneralConfig{}))
	}
	if err := f.Return([]Value{product(product(product(x, k), x), x)}, nil); err != nil {
		t.Fatal(err)
	}
	exec, err := bd.Compile()
	if err != nil {
		t.Fatal(err)
	}
	run := exec.(*computation).plan.idle[0]
	var between, constant *value
	for _, v := range run.p.order {
		if run.inArena(v) && v.last > v.group {
			between = v
		}
		if v.kind == kindConst {
			constant = v
		}
	}
	in, _, err := b.NewSharedBuffer(0, shape)
	if err != nil {
		t.Fatal(err)
	}
	for what, place := range map[string]*float32{
		"outside a value":  &run.arena[between.place+between.words()],
		"outside a value ": &run.arena[between.place-1],
		"a constant":       &constant.buf[3],
		"outside a buffer": &b.mem.watched.used[&in.(*Buffer).flat.([]float32)[0]][guardWords-1],
	} {
		if _, err := exec.Execute([]compute.Buffer{in}, nil, 0); err != nil {
			t.Fatalf("before: %v", err)
		}
		run.watch.begin()
		run.watch.before(between.group)
		old := *place
		*place = 7
		if err := run.watch.after(between.group); err == nil || !strings.Contains(err.Error(), strings.TrimSpace(what)) {
			t.Errorf("%s was written; the guards say %v", what, err)
		}
		*place = old
	}
	// dead and unwritten memory is NaN
	run.watch.begin()
	run.watch.before(between.group)
	if v := between.buf[0]; v == v {
		t.Errorf("memory that is not yet written is %g, not NaN", v)
	}
}

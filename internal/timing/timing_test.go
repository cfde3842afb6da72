package timing_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/lathe-ml/lathe/internal/timing"
)

func TestInterleavedGivesEveryFunctionATurnInEveryRound(t *testing.T) {
	var calls [3]int
	f := func(i int) func() error {
		return func() error { calls[i]++; time.Sleep(11 * time.Millisecond); return nil }
	}
	told := 0
	times, err := timing.Interleaved(context.Background(), 4, func(done, total int) { told = done * total }, f(0), f(1), f(2))
	if err != nil || len(times) != 3 || told != 16 {
		t.Fatalf("%v, %v, told %d", times, err, told)
	}
	for i, x := range times {
		if len(x) != 4 || calls[i] != 6 || !(x.Median() > 0) { // two more to warm up
			t.Errorf("function %d: %d rounds, %d calls", i, len(x), calls[i])
		}
	}
	if m, low, high := (timing.Times{1, 2, 9}).Ratio(timing.Times{2, 2, 3}); m != 1 || low != .75 || high != 2 {
		t.Errorf("ratio %g, %g to %g", m, low, high)
	}
}

func TestInterleavedStops(t *testing.T) {
	wrong := errors.New("wrong")
	if _, err := timing.Interleaved(context.Background(), 1, nil, func() error { return wrong }); !errors.Is(err, wrong) {
		t.Error(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	stop()
	if _, err := timing.Interleaved(ctx, 1, nil, func() error { return nil }); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if _, err := timing.Interleaved(context.Background(), 0, nil); err == nil {
		t.Error("no rounds were accepted")
	}
}

package compress

import (
	"math"
	"testing"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"

	"github.com/lathe-ml/lathe/nn"
)

func TestForecastsOfASmallNetwork(t *testing.T) {
	b := nn.NewBuilder(1)
	x := b.Input("x", shapes.Make(dtypes.Float32, 1, 10))
	h := b.Add("act", nn.ReLU, b.Add("fc1", nn.Dense{Out: 20}, x))
	net, err := b.Finish(b.Add("fc2", nn.Dense{Out: 5}, b.Add("sum", nn.Add, h, h)))
	if err != nil {
		t.Fatal(err)
	}
	f, err := ForecastBits(net, map[string]Bits{"fc1": {Weight: 4, Act: 8}})
	if err != nil {
		t.Fatal(err)
	}
	// fc1: 200 codes of 4 bits, 20 scales, 20 zero points of 4 bits.
	if len(f.Sites) != 2 || f.Sites[0].Bytes != 100+80+10 || f.Sites[1].Bytes != 400 || f.Quantisable != 1 {
		t.Errorf("%+v", f.Sites)
	}
	if f.FloatBytes != 4*(200+20+100+5) || f.Bytes != f.FloatBytes-800+190 || f.MACs != 300 {
		t.Errorf("%+v", f)
	}
	if want := (200*8/32. + 100) / 300; math.Abs(f.Latency-want) > 1e-12 || f.BitOps != 200*4*8+100*32*32 {
		t.Errorf("latency share %g, want %g; %g bit operations", f.Latency, want, f.BitOps)
	}
	for bits, want := range map[int]int64{32: 400, 8: 100 + 20 + 5, 3: 38 + 20 + 2} {
		if got := UniformBytes(100, 5, bits); got != want {
			t.Errorf("%d bits: %d bytes, want %d", bits, got, want)
		}
	}
	// The most is alive while act gives way to sum: the hidden values twice. The input is gone by then.
	for cases, want := range map[int]int64{1: 4 * 40, 3: 3 * 4 * 40} {
		if got, err := PeakActivations(net, cases); err != nil || got != want {
			t.Errorf("%d cases: %d bytes, want %d (%v)", cases, got, want, err)
		}
	}
	if _, err := PeakActivations(net, 0); err == nil {
		t.Error("no cases accepted")
	}
	m, err := Memory(net, 2, 4, 1000)
	if err != nil || m.Parameters != 2*f.FloatBytes || m.Activations != 2*(4*160+4*4*25) || m.Least >= m.Total || m.Total != 2*(m.Parameters+m.Activations+1000)+m.Program {
		t.Errorf("%+v %v", m, err)
	}
}

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
	m, err := Memory(net, Load{Networks: 2, Cases: 4, Examples: 1000})
	if err != nil || m.Parameters != 2*f.FloatBytes || m.Activations != 2*(4*160+4*4*25) || m.Least >= m.Total || m.Total != 2*(m.Parameters+m.Activations+1000)+m.Program {
		t.Errorf("%+v %v", m, err)
	}
}

// A walk over a convolution of kernel 3 with zeros around its input [2, 4, 4, 3] and an output of 5 channels.
func TestWalkBytes(t *testing.T) {
	b := nn.NewBuilder(1)
	x := b.Input("x", shapes.Make(dtypes.Float32, 1, 4, 4, 3))
	net, err := b.Finish(b.Add("act", nn.ReLU, b.Add("conv", nn.Conv2D(5, 3, 1), x)))
	if err != nil {
		t.Fatal(err)
	}
	const in, out, padded = 4 * 2 * 16 * 3, 4 * 2 * 16 * 5, 4 * 2 * 36 * 3
	// Beside input and output there are the output before the bias and the padded input; both values of act weigh less.
	if got, err := WalkBytes(net, 2); err != nil || got != in+out+out+padded+out {
		t.Errorf("%d bytes, want %d (%v)", got, in+3*out+padded, err)
	}
	if got, err := WalkPairsBytes(net, 2); err != nil || got != in+3*out+padded+2*out {
		t.Errorf("%d bytes of two, want %d (%v)", got, in+5*out+padded, err)
	}
	if got, err := TrainBytes(net, 2); err != nil || got != 2*out+in+2*out+padded {
		t.Errorf("%d bytes of a training step, want %d (%v)", got, in+4*out+padded, err)
	}
	if got := PaddedBytes(nn.Conv{Kernel: []int{1, 1}}, shapes.Make(dtypes.Float32, 2, 4, 4, 3)); got != 0 {
		t.Errorf("%d bytes of a padding that is none", got)
	}
	// The heaviest phase counts: what the method holds, or the outputs of 1,000 judged cases.
	for _, c := range []struct{ method, want int64 }{{1 << 20, 1 << 20}, {0, in + 2*out + padded + 2*1000*out/2}} {
		m, err := Memory(net, Load{Networks: 1, Cases: 2, Method: c.method, Judged: 1000})
		if err != nil || m.Activations != c.want || m.Live != m.Parameters+c.want {
			t.Errorf("%+v, want activations of %d bytes (%v)", m, c.want, err)
		}
	}
}

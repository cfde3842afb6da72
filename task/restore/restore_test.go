package restore

import (
	"bytes"
	"context"
	"errors"
	"image"
	"image/color"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/data/imaging"
	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/learn/optim"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/safetensors"
)

var orders = []nn.ShuffleOrder{nn.ChannelMinor, nn.ChannelMajor}

func noise(seed uint64, n int) []float32 {
	d := make([]float32, n)
	rng.Normal(rng.New(seed, "test"), d, 1)
	return d
}

func field(seed uint64, h, w, c int) *imaging.Image {
	m := &imaging.Image{H: h, W: w, C: c, Pix: make([]float32, h*w*c)}
	rng.Uniform(rng.New(seed, "test"), m.Pix, 0, 1)
	return m
}

func furthest(a, b []float32) float64 {
	if len(a) != len(b) {
		return math.Inf(1)
	}
	worst := 0.
	for i := range a {
		worst = math.Max(worst, math.Abs(float64(a[i])-float64(b[i])))
	}
	return worst
}

func network(t *testing.T, m ESPCN) *nn.Network {
	t.Helper()
	n, err := m.Network(7)
	if err != nil {
		t.Fatal(err)
	}
	for p := range n.Params.All() { // biases other than 0
		if p.Role == nn.Bias {
			if err := p.SetData(noise(3, p.Value.Shape().Size())); err != nil {
				t.Fatal(err)
			}
		}
	}
	return n
}

func upscaler(t *testing.T, n *nn.Network, r int, o UpscalerOptions) *Upscaler {
	t.Helper()
	u, err := NewUpscaler(enginetest.Backend(), n, r, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(u.Close)
	return u
}

func TestUnshuffleUndoesShuffleBitForBit(t *testing.T) {
	for _, o := range orders {
		for _, c := range [][]int{{2, 3, 4, 3 * 4, 2}, {1, 2, 2, 9, 3}, {1, 5, 1, 3, 1}, {2, 1, 1, 3 * 16, 4}} {
			x := noise(1, c[0]*c[1]*c[2]*c[3])
			r := c[4]
			out := eval(t, func(x []*graph.Node) []*graph.Node {
				return []*graph.Node{PixelUnshuffle(PixelShuffle(x[0], r, o), r, o)}
			}, tensors.FromFlatDataAndDimensions(x, c[:4]...))
			if furthest(nn.Floats(out[0]), x) != 0 {
				t.Errorf("%v: %v is not the same after both", o, c)
			}
		}
	}
}

func TestShuffleByOneIsTheIdentityAndOrdersAgreeForOneChannel(t *testing.T) {
	x := noise(2, 2*3*4*4)
	for _, o := range orders {
		out := eval(t, func(x []*graph.Node) []*graph.Node {
			return []*graph.Node{PixelShuffle(x[0], 1, o), PixelUnshuffle(x[0], 1, o)}
		}, tensors.FromFlatDataAndDimensions(x, 2, 3, 4, 4))
		if furthest(nn.Floats(out[0]), x) != 0 || furthest(nn.Floats(out[1]), x) != 0 {
			t.Errorf("%v: factor 1 changes the image", o)
		}
	}
	out := eval(t, func(x []*graph.Node) []*graph.Node {
		return []*graph.Node{PixelShuffle(x[0], 2, nn.ChannelMinor), PixelShuffle(x[0], 2, nn.ChannelMajor)}
	}, tensors.FromFlatDataAndDimensions(x, 2, 3, 4, 4))
	if furthest(nn.Floats(out[0]), nn.Floats(out[1])) != 0 {
		t.Error("the orders differ for one channel")
	}
}

func TestShuffleByHand(t *testing.T) {
	out := eval(t, func(x []*graph.Node) []*graph.Node {
		return []*graph.Node{PixelShuffle(x[0], 2, nn.ChannelMinor)}
	}, tensors.FromFlatDataAndDimensions([]float32{0, 1, 2, 3}, 1, 1, 1, 4))
	if furthest(nn.Floats(out[0]), []float32{0, 1, 2, 3}) != 0 || out[0].Shape().Dimensions[1] != 2 {
		t.Errorf("got %v %v, want [[0 1] [2 3]]", out[0].Shape(), nn.Floats(out[0]))
	}
	// Three colours of one pixel: the orders scramble each other's.
	x := make([]float32, 12)
	for i := range x {
		x[i] = float32(i)
	}
	out = eval(t, func(x []*graph.Node) []*graph.Node {
		return []*graph.Node{PixelShuffle(x[0], 2, nn.ChannelMinor), PixelShuffle(x[0], 2, nn.ChannelMajor)}
	}, tensors.FromFlatDataAndDimensions(x, 1, 1, 1, 12))
	if furthest(nn.Floats(out[0]), x) != 0 {
		t.Errorf("channel minor: %v", nn.Floats(out[0]))
	}
	if furthest(nn.Floats(out[1]), []float32{0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11}) != 0 {
		t.Errorf("channel major: %v", nn.Floats(out[1]))
	}
}

func TestSubPixelConvolutionEqualsItsTransposedForm(t *testing.T) {
	for _, o := range orders {
		for _, c := range []struct{ out, in, k, r, h, w int }{{1, 2, 3, 2, 4, 5}, {3, 2, 3, 3, 3, 4}, {2, 3, 5, 2, 5, 3}, {1, 1, 1, 4, 2, 2}} {
			rr := c.out * c.r * c.r
			w, x := noise(4, rr*c.in*c.k*c.k), noise(5, c.in*c.h*c.w)
			kernel, pad, err := SubPixelToDeconv(w, c.out, c.in, c.k, c.r, o)
			if err != nil {
				t.Fatal(err)
			}
			wide := make([]float64, len(x))
			for i, v := range x {
				wide[i] = float64(v)
			}
			want := transposedConv(wide, c.in, c.h, c.w, kernel, c.out, c.k*c.r, c.r, pad)
			got := eval(t, func(a []*graph.Node) []*graph.Node {
				// [out, in, k, k] -> [k, k, in, out]
				y := graph.Convolve(toNHWC(a[0]), graph.TransposeAllAxes(a[1], 2, 3, 1, 0)).PadSame().Done()
				return []*graph.Node{toNCHW(PixelShuffle(y, c.r, o))}
			}, tensors.FromFlatDataAndDimensions(x, 1, c.in, c.h, c.w), tensors.FromFlatDataAndDimensions(w, rr, c.in, c.k, c.k))
			for i, v := range nn.Floats(got[0]) {
				if math.Abs(float64(v)-want[i]) > 1e-5*math.Max(1, math.Abs(want[i])) {
					t.Fatalf("%v %+v: output %d is %v, by the transposed convolution %v", o, c, i, v, want[i])
				}
			}
			back, p, err := DeconvToSubPixel(kernel, c.out, c.in, c.k, c.r, o)
			if err != nil || p != (c.k-1)/2 || furthest(back, w) != 0 {
				t.Errorf("%v %+v: the way back gives padding %d, %v", o, c, p, err)
			}
		}
	}
}

func TestPreShuffledLossAndGradientEqualTheShuffledOnes(t *testing.T) {
	for _, o := range orders {
		out := eval(t, func(x []*graph.Node) []*graph.Node {
			d := graph.Sub(PixelShuffle(x[0], 3, o), x[1])
			after := graph.ReduceAllMean(graph.Mul(d, d))
			before := PreShuffledMSE(x[0], x[1], 3, o)
			return []*graph.Node{before, after, graph.Gradient(before, x[0])[0], graph.Gradient(after, x[0])[0]}
		}, tensors.FromFlatDataAndDimensions(noise(6, 2*4*5*27), 2, 4, 5, 27), tensors.FromFlatDataAndDimensions(noise(7, 2*12*15*3), 2, 12, 15, 3))
		if d := furthest(nn.Floats(out[0]), nn.Floats(out[1])); d > 1e-6 {
			t.Errorf("%v: losses differ by %v", o, d)
		}
		if d := furthest(nn.Floats(out[2]), nn.Floats(out[3])); d > 1e-6 {
			t.Errorf("%v: gradients differ by %v", o, d)
		}
	}
}

func TestTrainingBeforeAndAfterTheShuffleIsTheSame(t *testing.T) {
	pairs := testPairs(t, 2, 3)
	var got [2][]float32
	for i, after := range []bool{false, true} {
		m := ESPCN{Factor: 2, Channels: 3, Widths: []int{4, 3}, Order: nn.ChannelMajor}
		n, err := m.Network(1)
		if err != nil {
			t.Fatal(err)
		}
		if err := FitESPCN(t.Context(), enginetest.Backend(), n, m, pairs, Training{Steps: 3, Batch: 2, Patch: 8, AfterShuffle: after}); err != nil {
			t.Fatal(err)
		}
		got[i] = n.Params.Get("features.w").Data()
	}
	if d := furthest(got[0], got[1]); d > 1e-5 {
		t.Errorf("weights differ by %v", d)
	}
}

func TestEqualSubKernelsMakeConstantBlocks(t *testing.T) {
	for _, o := range orders {
		n, err := ESPCN{Factor: 3, Channels: 3, Widths: []int{5, 4}, Order: o, ICNR: true}.Network(2)
		if err != nil {
			t.Fatal(err)
		}
		m, err := upscaler(t, n, 3, UpscalerOptions{}).Planes(t.Context(), field(1, 5, 6, 3))
		if err != nil {
			t.Fatal(err)
		}
		varied := false
		for y := range m.H {
			for x := range m.W {
				for c := range 3 {
					// Products may be summed in another order in another column.
					if math.Abs(float64(m.At(x, y, c)-m.At(x/3*3, y/3*3, c))) > 1e-6 {
						t.Fatalf("%v: pixel (%d, %d) differs within its block", o, x, y)
					}
					varied = varied || math.Abs(float64(m.At(x, y, c)-m.At(0, 0, c))) > 1e-3
				}
			}
		}
		if !varied {
			t.Errorf("%v: the whole image is constant", o)
		}
	}
}

func TestTranslation(t *testing.T) {
	n := network(t, ESPCN{Widths: []int{8, 4}})
	u := upscaler(t, n, 3, UpscalerOptions{})
	big := field(3, 16, 17, 1)
	a, _ := big.Crop(0, 0, 16, 16)
	b, _ := big.Crop(1, 0, 16, 16)
	ya, err := u.Planes(t.Context(), a)
	if err != nil {
		t.Fatal(err)
	}
	yb, err := u.Planes(t.Context(), b)
	if err != nil {
		t.Fatal(err)
	}
	for y := 12; y < 36; y++ {
		for x := 12; x < 33; x++ {
			if d := math.Abs(float64(ya.At(x+3, y, 0) - yb.At(x, y, 0))); d > 1e-5 {
				t.Fatalf("pixel (%d, %d) differs by %v after a shift", x, y, d)
			}
		}
	}
}

func TestDefaultNetworkHasThePapersSize(t *testing.T) {
	n, err := ESPCN{}.Network(0)
	if err != nil {
		t.Fatal(err)
	}
	if got := n.Params.Count(); got != 22624+105 {
		t.Errorf("%d parameters, want 22,624 weights and 105 biases", got)
	}
	c, err := n.Cost(1)
	if err != nil || c.MACs != 22624*17*17 {
		t.Errorf("%d multiply-adds, %v; want 22,624 per low-resolution pixel", c.MACs, err)
	}
	if got := (ESPCN{}).Overlap(); got != 4 {
		t.Errorf("overlap %d, want 4 (receptive field 9)", got)
	}
	for mid, want := range map[int]int64{1: 8032, 5: 57184} {
		n, err := SRCNN{Middle: mid}.Network(0)
		if err != nil {
			t.Fatal(err)
		}
		if c, err := n.Cost(1); err != nil || c.MACs != want*33*33 {
			t.Errorf("SRCNN 9-%d-5: %d multiply-adds, %v; want %d per pixel", mid, c.MACs, err, want)
		}
	}
}

func TestTilesGiveTheSamePixelsAsTheWhole(t *testing.T) {
	srcnn, err := SRCNN{Widths: []int{6, 4}, Middle: 5}.Network(3)
	if err != nil {
		t.Fatal(err)
	}
	fixed, err := FixedUpscaler{ESPCN{Factor: 2, Widths: []int{6, 4}}}.Network(3)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		net *nn.Network
		r   int
		o   UpscalerOptions
	}{
		"espcn": {network(t, ESPCN{Widths: []int{6, 4}}), 3, UpscalerOptions{}},
		"srcnn": {srcnn, 2, UpscalerOptions{Enlarged: true}},
		"fixed": {fixed, 2, UpscalerOptions{}},
	} {
		m := field(5, 41, 33, 1)
		c.o.Tile = -1
		whole, err := upscaler(t, c.net, c.r, c.o).Planes(t.Context(), m)
		if err != nil {
			t.Fatal(err)
		}
		c.o.Tile = 20
		tiled, err := upscaler(t, c.net, c.r, c.o).Planes(t.Context(), m)
		if err != nil {
			t.Fatal(err)
		}
		if d := furthest(whole.Pix, tiled.Pix); d > 1e-5 {
			t.Errorf("%s: tiles differ by %v", name, d)
		}
	}
}

func TestEveryKindOfImageIsUpscaled(t *testing.T) {
	one := upscaler(t, network(t, ESPCN{Factor: 2, Widths: []int{4, 3}}), 2, UpscalerOptions{Tile: 16})
	three := upscaler(t, network(t, ESPCN{Factor: 2, Channels: 3, Widths: []int{4, 3}}), 2, UpscalerOptions{Tile: 16})
	cubic, err := NewBicubic(2)
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range [][2]int{{1, 1}, {7, 5}, {1, 9}, {35, 20}} {
		r := image.Rect(0, 0, size[0], size[1])
		for _, m := range []image.Image{image.NewGray(r), image.NewGray16(r), image.NewNRGBA(r), image.NewRGBA64(r), image.NewYCbCr(r, image.YCbCrSubsampleRatio420)} {
			for _, u := range []*Upscaler{one, three, cubic} {
				out, err := u.Restore(t.Context(), m)
				if err != nil {
					t.Fatalf("%T %v: %v", m, size, err)
				}
				if out.Bounds() != image.Rect(0, 0, 2*size[0], 2*size[1]) {
					t.Errorf("%T %v became %v", m, size, out.Bounds())
				}
			}
		}
	}
}

func TestAlphaIsEnlargedBicubically(t *testing.T) {
	m := image.NewNRGBA(image.Rect(0, 0, 8, 8))
	for i := range m.Pix {
		m.Pix[i] = uint8(i * 7)
	}
	u := upscaler(t, network(t, ESPCN{Factor: 2, Widths: []int{4, 3}}), 2, UpscalerOptions{})
	got, err := u.Upscale(m)
	if err != nil {
		t.Fatal(err)
	}
	p, _ := imaging.FromImage(m)
	alpha, _ := imaging.Bicubic(p.Alpha, 2, 2, true)
	for y := range 16 {
		for x := range 16 {
			want := uint8(min(max(alpha.At(x, y, 0), 0), 1)*255 + 0.5)
			if a := got.At(x, y).(color.NRGBA).A; a != want {
				t.Fatalf("alpha at (%d, %d) is %d, want %d", x, y, a, want)
			}
		}
	}
}

// testPairs are two small synthetic images.
func testPairs(t *testing.T, factor, channels int) []Pair {
	t.Helper()
	var out []Pair
	for i := range 2 {
		m := field(uint64(i), 48, 60, 3)
		m, err := imaging.Blur(m, 1.5, 0)
		if err != nil {
			t.Fatal(err)
		}
		p, err := NewPair("test", m, factor, channels, BicubicShrink{})
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, p)
	}
	return out
}

func TestTrainingLowersTheLossAndResumesBitForBit(t *testing.T) {
	pairs := testPairs(t, 2, 1)
	m := ESPCN{Factor: 2, Widths: []int{8, 4}}
	for _, c := range []Training{
		{Steps: 12, Batch: 4, Patch: 8},
		{Steps: 12, Batch: 4, Patch: 8, Tone: 0.5},
		{Steps: 12, Batch: 4, Patch: 8, Grid: true, LastLayer: 0.1, Plateau: 0.5},
		{Steps: 12, Batch: 4, Patch: 8, NoAugment: true, Degradation: BlurDecimate{}, Optimizer: optim.SGD{Momentum: 0.9}, LR: 0.01},
	} {
		var first, last float64
		train := func(ctx context.Context, c Training) ([]float32, error) {
			n, err := m.Network(1)
			if err != nil {
				t.Fatal(err)
			}
			err = FitESPCN(ctx, enginetest.Backend(), n, m, pairs, c)
			return append(n.Params.Get("features.w").Data(), n.Params.Get("conv1.w").Data()...), err
		}
		c.Progress = func(done, _ int, loss float64) {
			if done == 1 {
				first = loss
			}
			last = loss
		}
		want, err := train(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		if !(last < first) {
			t.Errorf("%+v: the loss went from %v to %v", c, first, last)
		}
		ctx, cancel := context.WithCancel(t.Context())
		c.Checkpoint = filepath.Join(t.TempDir(), "checkpoint")
		c.Progress = func(done, _ int, _ float64) {
			if done == 5 {
				cancel()
			}
		}
		if _, err := train(ctx, c); !errors.Is(err, context.Canceled) {
			t.Fatalf("a cancelled training returned %v", err)
		}
		c.Progress = nil
		got, err := train(t.Context(), c)
		if err != nil {
			t.Fatal(err)
		}
		if furthest(got, want) != 0 {
			t.Errorf("%+v: resumed training differs by %v", c, furthest(got, want))
		}
		if _, err := os.Stat(c.Checkpoint); !os.IsNotExist(err) {
			t.Errorf("the checkpoint is still there: %v", err)
		}
	}
}

func TestPlateauHalvesTheRateAndStops(t *testing.T) {
	p := &plateau{c: Training{Plateau: 0.01, FinalLR: 0.3}}
	p.State.LR = 1
	for i, c := range []struct {
		cost, lr float64
		idle     int
	}{{1, 1, 0}, {0.9, 1, 0}, {0.899, 0.5, 0}, {0.95, 0.3, 1}, {0.95, 0.3, 2}, {0.8, 0.3, 0}} {
		p.step(c.cost)
		if p.State.LR != c.lr || p.State.Idle != c.idle {
			t.Errorf("epoch %d, cost %v: rate %v after %d idle epochs, want %v and %d", i, c.cost, p.State.LR, p.State.Idle, c.lr, c.idle)
		}
	}
}

func TestLastLayerLearnsSlower(t *testing.T) {
	pairs := testPairs(t, 2, 1)
	m := ESPCN{Factor: 2, Widths: []int{4, 3}}
	moved := func(f float64) (first, last float64) {
		n, err := m.Network(1)
		if err != nil {
			t.Fatal(err)
		}
		a, b := n.Params.Get("conv1.w").Data(), n.Params.Get("features.w").Data()
		if err := FitESPCN(t.Context(), enginetest.Backend(), n, m, pairs, Training{Steps: 1, Batch: 2, Patch: 8, LastLayer: f}); err != nil {
			t.Fatal(err)
		}
		return furthest(a, n.Params.Get("conv1.w").Data()), furthest(b, n.Params.Get("features.w").Data())
	}
	first, last := moved(0.1) // Adam's first step moves every weight by the rate
	if math.Abs(first-1e-3) > 1e-5 || math.Abs(last-1e-4) > 1e-6 {
		t.Errorf("the first layer moved by %v and the last by %v, want 1e-3 and 1e-4", first, last)
	}
}

func TestToneKeepsPairsInRange(t *testing.T) {
	r := rng.New(1, "test")
	low := false
	for range 200 {
		hr := field(r.Uint64(), 12, 12, 1)
		lr, err := BicubicShrink{}.Degrade(hr, 2)
		if err != nil {
			t.Fatal(err)
		}
		retone(r, 0.9, lr, hr)
		again, err := BicubicShrink{}.Degrade(hr, 2)
		if err != nil || furthest(again.Pix, lr.Pix) > 1e-6 {
			t.Fatalf("the pair is none any more: %v, %v", furthest(again.Pix, lr.Pix), err)
		}
		for _, v := range hr.Pix {
			if v < 15.99/255 || v > 235.01/255 {
				t.Fatalf("sample %v lies outside the studio range", v)
			}
			low = low || v < 40./255
		}
	}
	if !low {
		t.Error("no patch became dark")
	}
}

func TestGridCoversEveryPatchOnceAnEpoch(t *testing.T) {
	pairs := testPairs(t, 2, 1) // low resolution 30×24
	c, err := Training{Batch: 2, Patch: 9, Grid: true, NoAugment: true}.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	s, err := newSampler(pairs, 2, c, []int{5, 3, 3})
	if err != nil {
		t.Fatal(err)
	}
	if s.stride != 6 || s.grid != 2*4*3 {
		t.Fatalf("stride %d and %d patches, want 9-3 and 2 images of 4×3", s.stride, s.grid)
	}
	seen := map[float32]bool{}
	for step := range s.grid / 2 {
		b, err := s.batch(step)
		if err != nil {
			t.Fatal(err)
		}
		d := nn.Floats(b[0])
		seen[d[0]], seen[d[81]] = true, true
	}
	if len(seen) != s.grid {
		t.Errorf("%d different patches in an epoch of %d", len(seen), s.grid)
	}
}

func TestSavedNetworksAreReadBack(t *testing.T) {
	n := network(t, ESPCN{Factor: 2, Channels: 3, Widths: []int{4, 3}, Order: nn.ChannelMajor, Activation: "relu"})
	path := filepath.Join(t.TempDir(), "m.safetensors")
	if err := Save(path, n); err != nil {
		t.Fatal(err)
	}
	back, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	m := field(1, 6, 7, 3)
	a, err := upscaler(t, n, 2, UpscalerOptions{}).Planes(t.Context(), m)
	if err != nil {
		t.Fatal(err)
	}
	b, err := upscaler(t, back, 2, UpscalerOptions{}).Planes(t.Context(), m)
	if err != nil || furthest(a.Pix, b.Pix) != 0 {
		t.Errorf("the network that was read back differs by %v, %v", furthest(a.Pix, b.Pix), err)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{
		"cut":          whole[:len(whole)/2],
		"empty":        {},
		"architecture": bytes.Replace(whole, []byte(`"espcn"`), []byte(`"other"`), 1),
		"widths":       bytes.Replace(whole, []byte(`"widths":"4,3"`), []byte(`"widths":"9,3"`), 1),
		"activation":   bytes.Replace(whole, []byte(`"relu"`), []byte(`"sine"`), 1),
		"kernels":      bytes.Replace(whole, []byte(`"5,3,3"`), []byte(`"5,3,4"`), 1),
		"name":         bytes.Replace(whole, []byte(`"conv2.w"`), []byte(`"conv9.w"`), 1),
		"NaN":          append(bytes.Clone(whole[:len(whole)-4]), 0, 0, 0xc0, 0x7f),
	} {
		p := filepath.Join(t.TempDir(), "bad.safetensors")
		if err := os.WriteFile(p, b, 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(p); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestVideoIsStreamed(t *testing.T) {
	for _, chroma := range []string{"420jpeg", "444", "mono", "422"} {
		h := data.Y4MHeader{Width: 13, Height: 9, Rate: [2]int{30000, 1001}, Chroma: chroma}
		if chroma == "444" {
			h.Extra = []string{"XCOLORRANGE=FULL"}
		}
		var in, out bytes.Buffer
		w, err := data.NewY4MWriter(&in, h)
		if err != nil {
			t.Fatal(err)
		}
		f := data.NewFrame(h)
		for range 3 {
			for i := range f.Y {
				f.Y[i] = 100
			}
			if err := w.Write(f); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
		src, err := data.NewY4MReader(&in)
		if err != nil {
			t.Fatal(err)
		}
		u, err := NewBicubic(3)
		if err != nil {
			t.Fatal(err)
		}
		calls := 0
		rate, err := u.Video(t.Context(), src, &out, func(FrameRate) { calls++ })
		if err != nil || rate.Frames != 3 || calls != 3 {
			t.Fatalf("%s: %+v after %d calls, %v", chroma, rate, calls, err)
		}
		back, err := data.NewY4MReader(&out)
		if err != nil {
			t.Fatal(err)
		}
		if g := back.Header; g.Width != 39 || g.Height != 27 || g.Rate != h.Rate || g.Chroma != chroma {
			t.Errorf("%s: header %+v", chroma, g)
		}
		n := 0
		for {
			g, err := back.Next(nil)
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			n++
			for _, v := range g.Y {
				if v != 100 {
					t.Fatalf("%s: luminance %d, want 100", chroma, v)
				}
			}
			for _, v := range append(g.Cb, g.Cr...) {
				if v != 128 {
					t.Fatalf("%s: chrominance %d, want 128", chroma, v)
				}
			}
		}
		if n != 3 {
			t.Errorf("%s: %d frames, want 3", chroma, n)
		}
	}
}

func TestFramesGoThroughTheNetwork(t *testing.T) {
	n := network(t, ESPCN{Factor: 2, Widths: []int{4, 3}})
	u := upscaler(t, n, 2, UpscalerOptions{})
	h := data.Y4MHeader{Width: 6, Height: 5}
	f := data.NewFrame(h)
	for i := range f.Y {
		f.Y[i] = uint8(20 + 7*i)
	}
	got, err := u.Frame(t.Context(), h, f)
	if err != nil {
		t.Fatal(err)
	}
	want, err := u.Planes(t.Context(), plane(f.Y, 6, 5))
	if err != nil {
		t.Fatal(err)
	}
	for i, v := range want.Pix {
		if g := uint8(min(max(v, 0), 1)*255 + 0.5); g != got.Y[i] {
			t.Fatalf("sample %d is %d, want %d", i, got.Y[i], g)
		}
	}
	f.Cb = f.Cb[1:]
	if _, err := u.Frame(t.Context(), h, f); err == nil {
		t.Error("a short plane: no error")
	}
}

func TestBicubicUpscaleIsTheImageOperation(t *testing.T) {
	m := field(4, 5, 7, 2)
	want, err := imaging.Bicubic(m, 3, 3, true)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []dtypes.DType{dtypes.Float32, dtypes.Float64} {
		got := eval(t, func(x []*graph.Node) []*graph.Node {
			return BicubicUpscale{R: 3}.Lower(nil, []*graph.Node{graph.ConvertDType(x[0], d)})
		}, tensors.FromFlatDataAndDimensions(m.Pix, 1, 5, 7, 2))
		if e := furthest(nn.Floats(got[0]), want.Pix); e > 1e-6 {
			t.Errorf("%v: differs by %v", d, e)
		}
	}
}

func TestPretrainedNetworksBeatBicubic(t *testing.T) {
	data.RequireTest(t, "photographs")
	photos, err := data.Photographs(t.Context(), data.Test)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range Factors() {
		n, err := Pretrained(r)
		if err != nil {
			t.Fatal(err)
		}
		cubic, err := NewBicubic(r)
		if err != nil {
			t.Fatal(err)
		}
		u := upscaler(t, n, r, UpscalerOptions{})
		for _, p := range photos {
			m, err := imaging.FromImage(p.Image)
			if err != nil {
				t.Fatal(err)
			}
			hr, err := m.Color.Crop(m.Color.W/2-60, m.Color.H/2-60, 120, 120)
			if err != nil {
				t.Fatal(err)
			}
			pair, err := NewPair(p.Name, hr, r, 1, BicubicShrink{})
			if err != nil {
				t.Fatal(err)
			}
			var psnr [2]float64
			for i, u := range []*Upscaler{cubic, u} {
				sr, err := u.Planes(t.Context(), pair.LR)
				if err != nil {
					t.Fatal(err)
				}
				f, err := Compare(sr, pair.HR, r)
				if err != nil {
					t.Fatal(err)
				}
				psnr[i] = f.PSNR
			}
			if psnr[1] <= psnr[0] {
				t.Errorf("×%d, %s: %.2f dB, bicubic %.2f dB", r, p.Name, psnr[1], psnr[0])
			}
		}
	}
}

func TestBadInputIsRefused(t *testing.T) {
	shuffle := func(op nn.Op, dims ...int) error {
		b := nn.NewBuilder(0)
		_, err := b.Finish(b.Add("x", op, b.Image("in", dims[0], dims[1], dims[2])))
		return err
	}
	small := ESPCN{Factor: 2, Widths: []int{4, 3}}
	net, err := small.Network(0)
	if err != nil {
		t.Fatal(err)
	}
	pairs := testPairs(t, 2, 1)
	fit := func(c Training) error { return FitESPCN(t.Context(), enginetest.Backend(), net, small, pairs, c) }
	u := upscaler(t, net, 2, UpscalerOptions{})
	nan := field(1, 4, 4, 1)
	nan.Pix[3] = float32(math.NaN())
	inf := field(1, 30, 30, 3)
	inf.Pix[5] = float32(math.Inf(1))
	deconv := func(w []float32, out, in, k, r int) error {
		_, _, err := SubPixelToDeconv(w, out, in, k, r, nn.ChannelMinor)
		return err
	}
	build := func(m ESPCN) error { _, err := m.Network(0); return err }
	drop := func(_ any, err error) error { return err }
	tiny := image.NewGray(image.Rect(0, 0, 20, 20))
	for name, c := range map[string]struct {
		err  error
		says string
	}{
		"channels not divisible":   {shuffle(nn.PixelShuffle{R: 2}, 3, 3, 6), "6 channels"},
		"factor 0":                 {shuffle(nn.PixelShuffle{}, 3, 3, 4), "factor"},
		"factor -1":                {shuffle(nn.PixelUnshuffle{R: -1}, 4, 4, 1), "factor"},
		"huge factor":              {shuffle(nn.PixelShuffle{R: 1 << 32}, 3, 3, 4), "factor"},
		"height not divisible":     {shuffle(nn.PixelUnshuffle{R: 2}, 3, 4, 1), "height 3"},
		"width not divisible":      {shuffle(nn.PixelUnshuffle{R: 2}, 4, 3, 1), "width 3"},
		"unknown order":            {shuffle(nn.PixelShuffle{R: 2, Order: 7}, 3, 3, 4), "ShuffleOrder(7)"},
		"even kernel":              {deconv(make([]float32, 4*2*16), 1, 2, 4, 2), "even"},
		"deconv size":              {deconv(make([]float32, 10), 1, 2, 3, 2), "10 values"},
		"deconv factor":            {deconv(nil, 1, 2, 3, 0), "at least 1"},
		"network factor":           {build(ESPCN{Factor: -2}), "factor -2"},
		"network channels":         {build(ESPCN{Channels: 2}), "2 channels"},
		"network kernel":           {build(ESPCN{Kernels: []int{5, 4, 3}}), "kernel size 4"},
		"network kernels":          {build(ESPCN{Kernels: []int{5}}), "one more"},
		"network activation":       {build(ESPCN{Activation: "gelu"}), "tanh or relu"},
		"network width":            {build(ESPCN{Widths: []int{0, 3}}), "0 channels"},
		"NaN pixel":                {drop(u.Planes(t.Context(), nan)), "finite"},
		"two channels":             {drop(u.Picture(t.Context(), &imaging.Picture{Color: field(1, 4, 4, 2)})), "1 (grey) or 3 (RGB)"},
		"wrong channels":           {drop(u.Planes(t.Context(), field(1, 4, 4, 3))), "3 channels"},
		"other factor":             {drop(NewUpscaler(enginetest.Backend(), net, 3, UpscalerOptions{})), "enlarges by 2"},
		"no network":               {drop(NewUpscaler(enginetest.Backend(), nil, 3, UpscalerOptions{})), "NewBicubic"},
		"bicubic factor":           {drop(NewBicubic(0)), "factor 0"},
		"tile too small":           {drop(NewUpscaler(enginetest.Backend(), net, 2, UpscalerOptions{Tile: 8})), "exceed 8"},
		"no pretrained":            {drop(Pretrained(5)), "[2 3 4]"},
		"no images":                {drop(TrainESPCN(t.Context(), enginetest.Backend(), nil, small, Training{})), "no images"},
		"no pairs":                 {FitESPCN(t.Context(), enginetest.Backend(), net, small, nil, Training{}), "empty"},
		"image below a patch":      {drop(TrainESPCN(t.Context(), enginetest.Backend(), []Photo{{"tiny", tiny}}, small, Training{})), `"tiny"`},
		"image below the factor":   {drop(Pairs([]Photo{{"dot", image.NewGray(image.Rect(0, 0, 1, 1))}}, 2, 1, nil)), `"dot"`},
		"infinite training sample": {drop(NewPair("bright", inf, 3, 1, BicubicShrink{})), `"bright"`},
		"negative steps":           {fit(Training{Steps: -1}), "-1 steps"},
		"negative rate":            {fit(Training{LR: -1}), "learning rates"},
		"NaN rate":                 {fit(Training{LR: math.NaN()}), "learning rates"},
		"tone":                     {fit(Training{Tone: 1}), "tone"},
		"sizes differ":             {drop(Compare(field(1, 20, 20, 1), field(1, 20, 21, 1), 0)), "20×20"},
		"border leaves nothing":    {drop(Compare(field(1, 20, 20, 1), field(1, 20, 20, 1), 10)), "border"},
		"no degradation factor":    {drop(BicubicShrink{}.Degrade(field(1, 4, 4, 1), 0)), "factor 0"},
	} {
		if c.err == nil || !strings.Contains(c.err.Error(), c.says) {
			t.Errorf("%s: the error is %v; it should mention %q", name, c.err, c.says)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := u.Planes(ctx, field(1, 4, 4, 1)); !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled context gave %v", err)
	}
}

func FuzzModelFile(f *testing.F) {
	m := ESPCN{Factor: 2, Widths: []int{2, 2}}
	n, err := m.Network(1)
	if err != nil {
		f.Fatal(err)
	}
	path := filepath.Join(f.TempDir(), "m.safetensors")
	if err := Save(path, n); err != nil {
		f.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(b[:len(b)-1])
	f.Add([]byte("\x02\x00\x00\x00\x00\x00\x00\x00{}"))
	f.Add(bytes.Replace(b, []byte(`"factor":"2"`), []byte(`"factor":"9"`), 1))
	f.Fuzz(func(t *testing.T, b []byte) {
		file, err := safetensors.Decode(b)
		if err != nil {
			return
		}
		n, err := fromFile(file)
		if err == nil && n.Params.Count() > len(b) {
			t.Errorf("%d bytes became %d parameters", len(b), n.Params.Count())
		}
	})
}

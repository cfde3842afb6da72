package quant_test

import (
	"context"
	"errors"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/compress/quant"
	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/internal/cluster"
	"github.com/lathe-ml/lathe/internal/fixture"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/nn"
)

func TestFixturesJLCM(t *testing.T) {
	mode := map[string]quant.CodebookMode{"codebooks": quant.GroupCodebooks, "scales": quant.GroupScales}
	fixture.Run(t, 80, map[string]fixture.Func{
		"group_neurons": func(t *testing.T, c *fixture.Case) map[string]any {
			w := c.Inputs["W"]
			g, err := quant.GroupNeurons(w.Floats(), w.Shape[0], c.Params["groups"].Int(), c.Params["quantiles"].Int())
			if err != nil {
				t.Fatal(err)
			}
			return map[string]any{"descriptor": g.Descriptor, "group": g.Group, "perm": g.Perm, "counts": g.Counts}
		},
		"kmeans_1d": func(t *testing.T, c *fixture.Case) map[string]any {
			r, err := cluster.Line{K: c.Params["K"].Int(), MaxIter: 50}.Fit(c.Inputs["v"].Floats())
			if err != nil {
				t.Fatal(err)
			}
			mse := 0.
			for i, v := range c.Inputs["v"].Floats() {
				d := v - r.Centroids[r.Assignment[i]]
				mse += d * d / float64(len(r.Assignment))
			}
			return map[string]any{"codebook": r.Centroids, "index": r.Assignment, "mse": []float64{mse}}
		},
		"init": func(t *testing.T, c *fixture.Case) map[string]any {
			w := c.Inputs["W"]
			b, err := quant.InitCodebooks(w.Floats(), w.Shape[0], c.Inputs["group"].Ints(), c.Params["K"].Int(), mode[c.Params["mode"].String()])
			if err != nil {
				t.Fatal(err)
			}
			return map[string]any{"codebooks": b.Codebooks, "scales": b.Scales, "index": b.Index, "W_hat": b.Decode()}
		},
		"mapping_grad": func(t *testing.T, c *fixture.Case) map[string]any {
			index, w, dTheta, dBooks, err := quant.MappingGradient(
				c.Inputs["theta"].Floats(), c.Inputs["codebooks"].Rows(), c.Inputs["group"].Ints(), c.Inputs["grad_out"].Floats(), quant.MappingRule(c.Params["mode"].String()))
			if err != nil {
				t.Fatal(err)
			}
			return map[string]any{"index": index, "W_hat": w, "grad_theta": dTheta, "grad_codebooks": dBooks}
		},
		"memory": func(t *testing.T, c *fixture.Case) map[string]any {
			rows, cols := c.Params["rows"].Int(), c.Params["cols"].Int()
			n := quant.CodebookMemory(rows, cols, c.Params["bits"].Int(), c.Params["groups"].Int(), c.Params["codeword_bits"].Int(), mode[c.Params["mode"].String()])
			return map[string]any{"total_bits": []int64{n}, "bits_per_weight": []float64{float64(n) / float64(rows*cols)}}
		},
	})
}

func TestEnoughCodewordsKeepTheWeights(t *testing.T) {
	r := rng.New(1, "codewords")
	w := make([]float64, 6*20)
	for i := range w {
		w[i] = []float64{-.31, -.05, 0, .02, .77}[r.IntN(5)]
	}
	for _, mode := range []quant.CodebookMode{quant.GroupCodebooks, quant.GroupScales} {
		c, err := quant.InitCodebooks(w, 6, nil, 64, mode)
		if err != nil {
			t.Fatal(err)
		}
		for i, v := range c.Decode() {
			if math.Abs(v-w[i]) > 1e-7 {
				t.Fatalf("%s: weight %d is %g, want %g", mode, i, v, w[i])
			}
		}
	}
}

func TestOneGroupIsWeightSharing(t *testing.T) {
	w := bell(1, 10*30)
	c, err := quant.InitCodebooks(w, 10, nil, 8, quant.GroupCodebooks)
	if err != nil {
		t.Fatal(err)
	}
	r, err := cluster.Line{K: 8, MaxIter: 50}.Fit(w)
	if err != nil {
		t.Fatal(err)
	}
	for i, v := range c.Decode() {
		if v != r.Centroids[r.Assignment[i]] {
			t.Fatalf("weight %d is %g, by k-means %g", i, v, r.Centroids[r.Assignment[i]])
		}
	}
}

func TestProximalPrefersNearCodewords(t *testing.T) {
	const gap = .3
	if quant.Proximal(0, gap) != 0 || quant.Proximal(gap, gap) != gap {
		t.Errorf("φ(0) = %g, φ(gap) = %g", quant.Proximal(0, gap), quant.Proximal(gap, gap))
	}
	last := math.Inf(1)
	for d := .01; d < 3; d += .07 {
		up, down := quant.Proximal(d, gap), quant.Proximal(-d, gap)
		if up <= 0 || down != -up || up >= last {
			t.Errorf("φ(%g) = %g after %g, φ(−δ) = %g", d, up, last, down)
		}
		last = up
	}
}

func TestGradientOfTheMixtureSumsToZero(t *testing.T) {
	const rows, cols, k = 3, 5, 6
	theta, books := bell(2, rows*cols*k), [][]float64{bell(3, k), bell(4, k)}
	_, _, d, _, err := quant.MappingGradient(theta, books, []int{1, 0, 1}, bell(5, rows*cols), quant.MappingSoft)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(d); i += k {
		sum := 0.
		for _, v := range d[i : i+k] {
			sum += v
		}
		if math.Abs(sum) > 1e-12 {
			t.Errorf("weight %d: %g", i/k, sum)
		}
	}
}

func TestCodewordGradientIsTheSlopeOfTheLoss(t *testing.T) {
	ctx, b := context.Background(), enginetest.Backend()
	const out, in = 4, 6
	w, bias, x, y := dense(1, out, in, 40)
	m, err := quant.SiteMoments(ctx, b, nn.Dense{Out: out}, w, bias, x, y)
	if err != nil {
		t.Fatal(err)
	}
	group := []int{0, 1, 1, 0}
	c, err := quant.InitCodebooks(w, out, group, 3, quant.GroupCodebooks)
	if err != nil {
		t.Fatal(err)
	}
	theta := make([]float64, len(w)*3)
	for i, k := range c.Index {
		theta[i*3+int(k)] = 1
	}
	loss := func() float64 { return m.Loss(float32s64(c.Decode())) }
	d, err := m.Descend(b)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	_, g, err := d.At(float32s64(c.Decode()))
	if err != nil {
		t.Fatal(err)
	}
	grad := make([]float64, len(g))
	for i, v := range g {
		grad[i] = float64(v)
	}
	_, _, _, dBooks, err := quant.MappingGradient(theta, c.Codebooks, group, grad, quant.MappingSTE)
	if err != nil {
		t.Fatal(err)
	}
	for i, book := range c.Codebooks {
		for k := range book {
			const e = 1e-2 // the loss is a parabola
			at := book[k]
			book[k] = at + e
			up := loss()
			book[k] = at - e
			down := loss()
			if book[k] = at; math.Abs((up-down)/(2*e)-dBooks[i][k]) > 1e-4*(1+math.Abs(dBooks[i][k])) {
				t.Errorf("codeword %d of %d: gradient %g, slope %g", k, i, dBooks[i][k], (up-down)/(2*e))
			}
		}
	}
}

func TestCodebookMemory(t *testing.T) {
	if got := quant.CodebookMemory(64, 128, 3, 4, 16, quant.GroupCodebooks); got != 25184 {
		t.Errorf("%d bits, want 25184", got)
	}
	for _, c := range []struct{ rows, cols, bits, want int }{{64, 128, 3, 1}, {1536, 576, 3, 16}, {64, 576, 2, 8}, {4, 4, 2, 1}} {
		if got := quant.GroupsFor(c.rows, c.cols, c.bits, quant.GroupCodebooks); got != c.want {
			t.Errorf("%d groups for %d×%d at %d bits, want %d", got, c.rows, c.cols, c.bits, c.want)
		}
	}
}

func TestPackedIndicesComeBack(t *testing.T) {
	r := rng.New(3, "pack")
	for bits := 1; bits <= 8; bits++ {
		for _, n := range []int{0, 1, 3, 8, 17, 129} {
			index := make([]uint8, n)
			for i := range index {
				index[i] = uint8(r.IntN(1 << bits))
			}
			packed, err := quant.PackIndices(index, bits)
			if err != nil || len(packed) != (n*bits+7)/8 {
				t.Fatalf("%d bits: %d bytes for %d indices, %v", bits, len(packed), n, err)
			}
			back, err := quant.UnpackIndices(packed, n, bits)
			if err != nil || !slices.Equal(back, index) {
				t.Errorf("%d bits: %v came back as %v (%v)", bits, index, back, err)
			}
		}
	}
	for _, bits := range []int{0, 9} {
		if _, err := quant.PackIndices([]uint8{0}, bits); !errors.Is(err, quant.ErrCodebookBits) {
			t.Errorf("%d bits: %v", bits, err)
		}
	}
	if _, err := quant.PackIndices([]uint8{4}, 2); err == nil {
		t.Error("4 was packed into 2 bits")
	}
	if _, err := quant.UnpackIndices([]byte{0}, 5, 2); err == nil {
		t.Error("5 indices of 2 bits came out of a byte")
	}
}

func TestGroupsOfSimilarNeurons(t *testing.T) {
	w := bell(6, 12*40)
	for i := range w { // three widths, in turn
		w[i] *= []float64{1, .1, 10}[i/40%3]
	}
	g, err := quant.GroupNeurons(w, 12, 3, 0)
	if err != nil {
		t.Fatal(err)
	}
	for i, k := range g.Group {
		if want := []int{1, 0, 2}[i%3]; k != want {
			t.Errorf("neuron %d is in group %d, want %d", i, k, want)
		}
	}
	if !slices.Equal(g.Perm, []int{1, 4, 7, 10, 0, 3, 6, 9, 2, 5, 8, 11}) || !slices.Equal(g.Counts, []int{4, 4, 4}) {
		t.Errorf("order %v, counts %v", g.Perm, g.Counts)
	}
	same, err := quant.GroupNeurons(slices.Repeat([]float64{1, 2}, 4), 4, 3, 0)
	if err != nil {
		t.Fatal(err)
	}
	if same.DropEmpty(); !slices.Equal(same.Counts, []int{4}) || slices.Max(same.Group) != 0 {
		t.Errorf("equal neurons: groups %v, counts %v", same.Group, same.Counts)
	}
}

func TestCodebooksTakeEdgeCases(t *testing.T) {
	ctx, b := context.Background(), enginetest.Backend()
	_, bias, x, y := dense(1, 4, 6, 40)
	for name, w := range map[string][]float32{
		"constant": slices.Repeat([]float32{.5}, 24), "zeros": make([]float32, 24), "a constant row": append(slices.Repeat([]float32{.5}, 6), float32s64(bell(1, 18))...),
	} {
		for _, bits := range []int{1, 5} {
			for _, mode := range []quant.CodebookMode{quant.GroupCodebooks, quant.GroupScales} {
				g, err := quant.GroupNeurons(w, 4, 2, 0)
				if err != nil {
					t.Fatalf("%s: %v", name, err)
				}
				g.DropEmpty()
				c, err := quant.InitCodebooks(w, 4, g.Group, 1<<bits, mode)
				if err != nil {
					t.Fatalf("%s: %v", name, err)
				}
				m, err := quant.SiteMoments(ctx, b, nn.Dense{Out: 4}, w, bias, x, y)
				if err != nil {
					t.Fatal(err)
				}
				learned, tr, err := quant.LearnCodebooks(ctx, b, m, c, quant.CodebookLearning{Steps: 20})
				if err != nil {
					t.Fatalf("%s, %d bits, %s: %v", name, bits, mode, err)
				}
				for _, v := range learned.Decode() {
					if math.IsNaN(v) || math.IsInf(v, 0) {
						t.Fatalf("%s, %d bits, %s: %g", name, bits, mode, v)
					}
				}
				if tr.End > tr.Start {
					t.Errorf("%s, %d bits, %s: the error rose from %g to %g", name, bits, mode, tr.Start, tr.End)
				}
				if _, _, err := c.Table([]int{4, 6}).Store(); err != nil {
					t.Errorf("%s: %v", name, err)
				}
			}
		}
	}
}

func TestCodebooksRefuse(t *testing.T) {
	ctx, b := context.Background(), enginetest.Backend()
	w := []float64{1, 2, 3, 4}
	for name, err := range map[string]error{
		"no groups":     second(quant.GroupNeurons(w, 2, 0, 0)),
		"3 of 2":        second(quant.GroupNeurons(w, 2, 3, 0)),
		"no rows":       second(quant.GroupNeurons(w, 0, 1, 0)),
		"ragged":        second(quant.GroupNeurons(w, 3, 1, 0)),
		"group NaN":     second(quant.GroupNeurons([]float64{1, math.NaN()}, 1, 1, 0)),
		"0 values":      second(quant.InitCodebooks(w, 2, nil, 0, quant.GroupCodebooks)),
		"257 values":    second(quant.InitCodebooks(w, 2, nil, 257, quant.GroupCodebooks)),
		"mode":          second(quant.InitCodebooks(w, 2, nil, 2, "tables")),
		"group numbers": second(quant.InitCodebooks(w, 2, []int{0, 2}, 2, quant.GroupCodebooks)),
		"Inf":           second(quant.InitCodebooks([]float64{1, math.Inf(1)}, 1, nil, 2, quant.GroupCodebooks)),
	} {
		if err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	weight, bias, x, y := dense(1, 4, 6, 20)
	c, err := quant.InitCodebooks(weight, 4, nil, 4, quant.GroupCodebooks)
	if err != nil {
		t.Fatal(err)
	}
	m, err := quant.SiteMoments(ctx, b, nn.Dense{Out: 4}, weight, bias, x, y)
	if err != nil {
		t.Fatal(err)
	}
	for name, o := range map[string]quant.CodebookLearning{"rate": {BookRate: -1}, "map rate": {MapRate: math.NaN()}, "rule": {Mapping: "hard"}, "near": {Near: 1}} {
		if _, _, err := quant.LearnCodebooks(ctx, b, m, c, o); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	short := *c
	short.Index = short.Index[1:]
	if _, _, err := quant.LearnCodebooks(ctx, b, m, &short, quant.CodebookLearning{}); err == nil {
		t.Error("indices that do not fit were learned")
	}
	silent, err := quant.SiteMoments(ctx, b, nn.Dense{Out: 4}, weight, bias, tensors.FromFlatDataAndDimensions(make([]float32, 20*6), 20, 6), y)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := quant.LearnCodebooks(ctx, b, silent, c, quant.CodebookLearning{}); !errors.Is(err, quant.ErrNoSignal) {
		t.Errorf("inputs of zeros: %v", err)
	}
}

func second[T any](_ T, err error) error { return err }

func TestLearningCodebooks(t *testing.T) {
	ctx, b := context.Background(), enginetest.Backend()
	const out, in = 12, 24
	w, bias, x, y := dense(2, out, in, 300)
	m, err := quant.SiteMoments(ctx, b, nn.Dense{Out: out}, w, bias, x, y)
	if err != nil {
		t.Fatal(err)
	}
	g, err := quant.GroupNeurons(w, out, 3, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, mode := range []quant.CodebookMode{quant.GroupCodebooks, quant.GroupScales} {
		start, err := quant.InitCodebooks(w, out, g.Group, 8, mode)
		if err != nil {
			t.Fatal(err)
		}
		end := map[string]float64{}
		for name, o := range map[string]quant.CodebookLearning{
			"proximal": {}, "ste": {Mapping: quant.MappingSTE}, "soft": {Mapping: quant.MappingSoft}, "fixed": {Mapping: quant.MappingFixed}, "near": {Near: 3}, "none": {Steps: -1},
		} {
			before := start.Decode()
			c, tr, err := quant.LearnCodebooks(ctx, b, m, start, o)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if !slices.Equal(before, start.Decode()) {
				t.Fatalf("%s changed what it started from", name)
			}
			if loss := m.Loss(float32s64(c.Decode())); math.Abs(loss-tr.End) > 1e-3*tr.Start {
				t.Errorf("%s: what was kept gives %g, the trace says %g", name, loss, tr.End)
			}
			end[name] = tr.End / tr.Start
			if moved := tr.Moved > 0; moved == (name == "fixed" || name == "none") {
				t.Errorf("%s, %s: %g of the indices moved", mode, name, tr.Moved)
			}
		}
		if end["none"] != 1 || end["fixed"] >= 1 || end["proximal"] > .8*end["fixed"] || end["near"] > .85*end["fixed"] {
			t.Errorf("%s: errors over that of the start %v", mode, end)
		}
		y, err := start.MatMul(bell(7, 2*in))
		if err != nil {
			t.Fatal(err)
		}
		decoded := start.Decode()
		for i, v := range bell(7, 2*in)[:in] {
			y[0] -= v * decoded[i]
		}
		if math.Abs(y[0]) > 1e-12 {
			t.Errorf("%s: a product is off by %g", mode, y[0])
		}
	}
}

func TestJLCMOnANetwork(t *testing.T) {
	ctx, b := context.Background(), enginetest.Backend()
	net, calib := tinyResNet(t), pictures(24, 8)
	want := nn.Floats(mustRun(t, net, calib))
	mean := map[string]float64{}
	for name, q := range map[string]quant.JLCM{
		"data-free": {WeightBits: 2, Groups: 2, DataFree: true}, "learned": {WeightBits: 2, Groups: 2, Learning: quant.CodebookLearning{Steps: 100}},
		"scales": {WeightBits: 2, Groups: 2, Mode: quant.GroupScales, DataFree: true}, "in place": {WeightBits: 2, Groups: 2, KeepOrder: true, DataFree: true}, "1 bit": {WeightBits: 1, DataFree: true},
	} {
		steps := 0
		q.Progress = func(compress.Step) { steps++ }
		res, err := q.Compress(ctx, b, net, calib)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for i, v := range nn.Floats(mustRun(t, res.Reference, calib)) {
			if math.Abs(float64(v-want[i])) > 1e-4*(1+math.Abs(float64(want[i]))) {
				t.Fatalf("%s: output %d of the reordered network is %g, want %g", name, i, v, want[i])
			}
		}
		compressed := 0
		for _, s := range res.Sites {
			if s.WeightBits == 32 {
				continue
			}
			if compressed++; s.WeightBits != q.WeightBits || !(s.WeightErr > 0) || s.Bytes >= s.FloatBytes/4 {
				t.Errorf("%s: site %+v", name, s)
			}
			mean[name] += s.OutputErr
		}
		if compressed != steps || compressed < 8 {
			t.Errorf("%s: %d sites compressed, %d reported", name, compressed, steps)
		}
		tied := slices.ContainsFunc(res.Notes, func(s string) bool { return strings.Contains(s, "tied") })
		if q.KeepOrder == tied && q.WeightBits == 2 {
			t.Errorf("%s: notes %q", name, res.Notes)
		}
		agreesAsONNX(t, name, res.Network, calib)
	}
	if mean["learned"] > .7*mean["data-free"] {
		t.Errorf("output errors %g when learned, %g without data", mean["learned"], mean["data-free"])
	}
}

func mustRun(t *testing.T, net *nn.Network, x compress.Examples) *tensors.Tensor {
	t.Helper()
	out, err := net.Run(enginetest.Backend(), x)
	if err != nil {
		t.Fatal(err)
	}
	return out[0]
}

func TestJLCMHonoursOptionsAndItsJournal(t *testing.T) {
	ctx, b := context.Background(), enginetest.Backend()
	net, calib := tinyResNet(t), pictures(8, 8)
	j, err := compress.OpenJournal(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	q := quant.JLCM{WeightBits: 2, Groups: 2, Learning: quant.CodebookLearning{Steps: 10}, SkipSiteErrors: true}
	q.Journal = j
	q.Select = func(n *nn.Node) bool { return n.Name != "stage.0.0.conv1" }
	q.Bits = map[string]compress.Bits{"stage.2.0.conv2": {Weight: 3}}
	first, err := q.Compress(ctx, b, net, calib)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range first.Sites {
		if s.Name == "stage.2.0.conv2" && s.WeightBits != 3 || s.Name == "stage.0.0.conv1" && s.WeightBits != 32 {
			t.Errorf("site %s has %d bits", s.Name, s.WeightBits)
		}
	}
	all := true
	q.Progress = func(s compress.Step) { all = all && s.Restored }
	again, err := q.Compress(ctx, b, net, calib)
	if err != nil || !all {
		t.Fatal("a site was computed again", err)
	}
	for p := range first.Network.Params.All() {
		if !slices.Equal(p.Data(), again.Network.Params.Get(p.Name).Data()) {
			t.Errorf("parameter %q differs", p.Name)
		}
	}
	if _, err := q.Compress(ctx, b, first.Network, calib); err == nil || !strings.Contains(err.Error(), "already") {
		t.Errorf("compressed twice: %v", err)
	}
}

func TestJLCMRefuses(t *testing.T) {
	ctx, b := context.Background(), enginetest.Backend()
	net, calib := tinyResNet(t), pictures(2, 8)
	acts := quant.JLCM{DataFree: true}
	acts.Bits = map[string]compress.Bits{"head": {Act: 8}}
	small := quant.JLCM{WeightBits: 8, DataFree: true}
	small.Select = func(n *nn.Node) bool { return n.Name == "head" }
	for name, c := range map[string]struct {
		q     quant.JLCM
		calib compress.Examples
		want  string
	}{
		"9 bits": {quant.JLCM{WeightBits: 9}, calib, "1 to 8"}, "groups": {quant.JLCM{Groups: -1}, calib, "groups"}, "mode": {quant.JLCM{Mode: "tables"}, calib, "mode"},
		"quantiles": {quant.JLCM{Quantiles: -1}, calib, "quantiles"}, "rule": {quant.JLCM{Learning: quant.CodebookLearning{Mapping: "hard"}}, calib, "rule"},
		"no examples": {quant.JLCM{}, nil, "empty"}, "activations": {acts, nil, "weights only"}, "pictures of 9": {quant.JLCM{}, pictures(2, 9), "input"},
		"codebooks larger than layers": {small, nil, "fewer bits"},
	} {
		if _, err := c.q.Compress(ctx, b, net, c.calib); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v, want one with %q", name, err, c.want)
		}
	}
}

package quant

import (
	"context"
	"fmt"
	"iter"
	"math"

	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	method "github.com/lathe-ml/lathe/compress/quant"
	"github.com/lathe-ml/lathe/lab"
	"github.com/lathe-ml/lathe/lab/exp/recipe"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/nn"
)

// weightOnlySizes are the sizes of the experiments that learn weights for ResNet-8 and round those of SmolLM2, at a scale.
type weightOnlySizes struct {
	Calibration int // images
	Steps       int // of learning, per layer
	Held        int // test images on which the layers' output errors are measured
	Blocks      int // of SmolLM2
	Passages    int // of so many tokens each
	Tokens      int
}

func weightOnlySizesOf(s lab.Scale) weightOnlySizes {
	if s == lab.Smoke {
		return weightOnlySizes{Calibration: 32, Steps: 20, Held: 32, Blocks: 1, Passages: 1, Tokens: 8}
	}
	return weightOnlySizes{Calibration: 128, Steps: 500, Held: 256, Blocks: 30, Passages: 8, Tokens: 256}
}

// nupesArms are the ways to quantise ResNet-8's weights that are compared, at 3 and 4 bits.
func nupesArms(z weightOnlySizes) []struct {
	name     string
	baseline bool
	method   method.NUPES
} {
	learned := func(o method.PowerLearning) method.PowerLearning { o.Steps = z.Steps; return o }
	return []struct {
		name     string
		baseline bool
		method   method.NUPES
	}{
		{"uniform", true, method.NUPES{DataFree: true, Rule: method.ExponentFixed, Exponent: 1}},
		{"power-global", true, method.NUPES{DataFree: true, Rule: method.ExponentGlobal}},
		{"power", true, method.NUPES{DataFree: true}},
		{"power-half", true, method.NUPES{DataFree: true, Rule: method.ExponentFixed}},
		{"uniform-learned", true, method.NUPES{Rule: method.ExponentFixed, Exponent: 1, Learning: learned(method.PowerLearning{FixedExponent: true})}},
		{"nupes-codes", false, method.NUPES{Learning: learned(method.PowerLearning{FixedExponent: true})}},
		{"nupes", false, method.NUPES{Learning: learned(method.PowerLearning{})}},
		{"nupes-updown", false, method.NUPES{Learning: learned(method.PowerLearning{Space: method.UpDownSpace})}},
		{"nupes-polished", false, method.NUPES{Learning: learned(method.PowerLearning{Polish: 10})}},
	}
}

// NUPES compares uniform with power-law weights, rounded and learned, on ResNet-8 and, without data, on SmolLM2.
func NUPES() lab.Experiment {
	e := lab.Experiment{
		Method: "nupes",
		Title:  "weights of ResNet-8 (Fashion-MNIST) at 3 and 4 bits, and of SmolLM2-135M at 4: uniform against power-law grids, rounded and learned",
		Recipe: struct {
			Network ResNet8Recipe
			Sizes   []weightOnlySizes
		}{ResNet8(lab.Full, 0), []weightOnlySizes{weightOnlySizesOf(lab.Smoke), weightOnlySizesOf(lab.Full)}},
		Arms: []lab.Arm{resNet8Float()},
	}
	for _, bits := range []int{3, 4} {
		for i, a := range nupesArms(weightOnlySizesOf(lab.Full)) {
			e.Arms = append(e.Arms, lab.Arm{Name: fmt.Sprintf("%s-w%d", a.name, bits), Baseline: a.baseline, Run: func(ctx context.Context, t *lab.Trial) error {
				q := nupesArms(weightOnlySizesOf(t.Scale))[i].method
				q.WeightBits = bits
				if t.Scale == lab.Smoke { // one layer, and nothing to learn at 4 bits
					q.DataFree = q.DataFree || bits == 4
					q.Select = func(n *nn.Node) bool { return n.Name == "stage.1.0.conv1" }
				}
				return nupesArm(ctx, t, q)
			}})
		}
	}
	e.Arms = append(e.Arms,
		lab.Arm{Name: "smollm2-float", Baseline: true, Once: true, Run: smolLM2Arm(nil, nil)},
		lab.Arm{Name: "smollm2-uniform-w4", Baseline: true, Once: true, Run: smolLM2Arm(linears, func(o compress.Options) compress.Method {
			return method.NUPES{Options: o, DataFree: true, Rule: method.ExponentFixed, Exponent: 1}
		})},
		lab.Arm{Name: "smollm2-power-w4", Once: true, Run: smolLM2Arm(linears, func(o compress.Options) compress.Method {
			return method.NUPES{Options: o, DataFree: true}
		})},
	)
	for _, bits := range []int{3, 4} {
		e.Claims = append(e.Claims, lab.Claim{
			ID: fmt.Sprintf("C1-w%d", bits), Text: fmt.Sprintf("%d bits: squared weight error of the searched exponents over uniform", bits), Paper: "bell-shaped weights want exponents below 1", Unit: "×",
			Measure: lab.Ratio(fmt.Sprintf("power-w%d", bits), fmt.Sprintf("uniform-w%d", bits), "weight error"), Bound: lab.AtMost(.92),
		})
	}
	e.Claims = append(e.Claims,
		lab.Claim{
			ID: "C2", Text: "3 bits: accuracy of NUPES minus rounding to searched exponents", Paper: "better than PowerQuant", Unit: "points",
			Measure: lab.Difference("nupes-w3", "power-w3", "accuracy"), Bound: lab.AtLeast(1),
		},
		lab.Claim{
			ID: "C3a", Text: "3 bits: output error of the layers on held-out images, NUPES over learned uniform codes", Paper: "better than uniform quantisation", Unit: "×",
			Measure: lab.Ratio("nupes-w3", "uniform-learned-w3", "output error"), Bound: lab.AtMost(.97),
		},
		lab.Claim{
			ID: "C3b", Text: "3 bits: accuracy of NUPES minus learned uniform codes", Paper: "better than uniform quantisation", Unit: "points",
			Measure: lab.Difference("nupes-w3", "uniform-learned-w3", "accuracy"), Bound: lab.AtLeast(-.3),
		},
		lab.Claim{
			ID: "C4", Text: "3 bits: share of the layers whose error on the calibration set is not larger with a learned exponent than with a frozen one", Paper: "the exponent is learned, too", Unit: "%",
			Measure: func(m lab.Metrics) float64 {
				better, n := 0., 0.
				for ; ; n++ {
					learned, frozen := m.Get("nupes-w3", siteLoss(int(n))), m.Get("nupes-codes-w3", siteLoss(int(n)))
					if math.IsNaN(learned) || math.IsNaN(frozen) {
						return 100 * better / n
					}
					if learned <= frozen {
						better++
					}
				}
			}, Bound: lab.AtLeast(70),
		},
		lab.Claim{
			ID: "C5", Text: "SmolLM2, 4 bits, no data: perplexity with searched exponents over uniform", Paper: "better on language models' weights", Unit: "×",
			Measure: lab.Ratio("smollm2-power-w4", "smollm2-uniform-w4", "perplexity"), Bound: lab.AtMost(1),
		},
	)
	return e
}

// siteLoss names the metric of a site's relative output error on the calibration set, by its number.
func siteLoss(i int) string { return fmt.Sprintf("calibration error of site %d", i) }

// resNet8Float is the arm of the float network.
func resNet8Float() lab.Arm {
	return lab.Arm{Name: "float", Baseline: true, Run: func(ctx context.Context, t *lab.Trial) error {
		b, err := resNet8(ctx, t)
		if err != nil {
			return err
		}
		acc, err := b.accuracy(ctx, t.Backend, b.nets["plain"])
		if err != nil {
			return err
		}
		t.Record("accuracy", 100*acc)
		t.Record("bytes", float64(compress.Size(b.nets["plain"])))
		return nil
	}}
}

func nupesArm(ctx context.Context, t *lab.Trial, q method.NUPES) error {
	number := 0
	q.Traces = func(_ string, exponent float64, m *method.Moments, tr method.PowerTrace) {
		t.Record(siteLoss(number), m.Relative(tr.End))
		t.Series("exponent by layer", float64(number), exponent)
		t.Series("share of codes that moved, by layer", float64(number), tr.Moved)
		number++
	}
	q.SkipSiteErrors = true
	return resNet8Arm(ctx, t, q)
}

// resNet8Arm compresses ResNet-8 with the seed's calibration images and records accuracy in percent, the layers' mean
// relative output error on held-out images, the squared weight error, and bytes.
func resNet8Arm(ctx context.Context, t *lab.Trial, m compress.Method) error {
	z := weightOnlySizesOf(t.Scale)
	b, err := resNet8(ctx, t)
	if err != nil {
		return err
	}
	calib, err := b.calibration(t.Seed, z.Calibration)
	if err != nil {
		return err
	}
	res, err := m.Compress(ctx, t.Backend, b.nets["plain"], calib)
	if err != nil {
		return err
	}
	acc, err := b.accuracy(ctx, t.Backend, res.Network)
	if err != nil {
		return err
	}
	t.Record("accuracy", 100*acc)
	t.Record("bytes", float64(compress.Size(res.Network)))
	held, err := b.test.Slice(0, min(z.Held, b.test.Len()), 0)
	if err != nil {
		return err
	}
	var values []string
	weight := 0.
	for i, n := range res.Reference.Sites() {
		values = append(values, n.Out[0])
		square := 0.
		for _, v := range res.Reference.Param(n, "w").Data() {
			square += float64(v) * float64(v)
		}
		weight += res.Sites[i].WeightErr * square
	}
	t.Record("weight error", weight)
	errs, err := compress.SiteErrors(ctx, t.Backend, res.Reference, res.Network, held, 0, values)
	if err != nil {
		return err
	}
	mean := 0.
	for i, e := range errs {
		mean += e / float64(len(errs))
		t.Series("output error by layer", float64(i), e)
	}
	t.Record("output error", mean)
	return nil
}

// linears are the dense layers of a block of SmolLM2; the last three are those of its feed-forward part.
var linears = []string{"attn.q", "attn.k", "attn.v", "attn.o", "gate", "up", "down"}

// smolLM2Arm compresses parts of SmolLM2's blocks without data (make nil: none) and records the perplexity on
// passages of prose, and bytes. Nothing in it is drawn.
func smolLM2Arm(parts []string, make func(o compress.Options) compress.Method) func(ctx context.Context, t *lab.Trial) error {
	return func(ctx context.Context, t *lab.Trial) error {
		z := weightOnlySizesOf(t.Scale)
		v, err := t.Shared("smollm2", func() (any, error) { return recipe.NewSmolLM2(ctx, z.Blocks) })
		if err != nil {
			return err
		}
		model := v.(*recipe.SmolLM2)
		net := model.Net
		if make != nil {
			blocks := map[string]bool{}
			for i := range z.Blocks {
				for _, part := range parts {
					blocks[fmt.Sprintf("blk.%d.%s", i, part)] = true
				}
			}
			done := 0
			o := compress.Options{Select: func(n *nn.Node) bool { return blocks[n.Name] }, Progress: func(s compress.Step) { done++; t.Progress(s.Done, s.Total) }}
			res, err := make(o).Compress(ctx, t.Backend, net, nil)
			if err != nil {
				return err
			}
			if net = res.Network; done == 0 {
				return fmt.Errorf("no site of the model was compressed")
			}
			sum, bytes, float := 0., 0., 0.
			for _, s := range res.Sites {
				if s.WeightBits != 32 {
					sum += s.WeightErr / float64(done)
					bytes += float64(s.Bytes)
					float += float64(s.FloatBytes)
				}
			}
			t.Record("relative weight error", sum)
			t.Record("weight bytes", bytes)
			t.Record("weight bytes over float32", bytes/float)
		}
		passages, err := model.Passages(ctx, z.Passages, z.Tokens)
		if err != nil {
			return err
		}
		loss, _, err := learn.Evaluate(t.Backend, &net.Params, learn.LanguageModel(net), oneByOne(passages))
		if err != nil {
			return err
		}
		t.Record("perplexity", math.Exp(loss))
		t.Record("bytes", float64(compress.Size(net)))
		return nil
	}
}

// oneByOne are the cases of a batch of tokens, each as a batch of its own.
func oneByOne(batch []*tensors.Tensor) iter.Seq2[float64, []*tensors.Tensor] {
	return func(yield func(float64, []*tensors.Tensor) bool) {
		for i := range batch[0].Shape().Dimensions[0] {
			one, err := compress.Examples(batch).Pick([]int{i})
			if err != nil || !yield(1, one) {
				return
			}
		}
	}
}

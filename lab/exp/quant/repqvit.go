package quant

import (
	"context"
	"fmt"
	"math"

	"github.com/lathe-ml/lathe/compress"
	method "github.com/lathe-ml/lathe/compress/quant"
	"github.com/lathe-ml/lathe/lab"
	"github.com/lathe-ml/lathe/nn"
)

// Experiments lists the experiments of this package.
var Experiments = []lab.Experiment{RepQViT, RepQuant, DopQViT, MinMax, AdaQuant, OFQ, ZeroQ, NUPES(), JLCM(), DenseShift(), TinyTraining()}

const calibrationImages = 32

// RepQViT compares the reparameterised quantiser with layer-wise and channel-wise quantisation of norm outputs, each
// with three grids for the attention probabilities, on two versions of one float function: the network as trained
// (plain), and with channel ranges spread as in larger transformers (spread).
var RepQViT = lab.Experiment{
	Method: "repq-vit",
	Title:  "Post-training quantisation of a vision transformer on Fashion-MNIST, 32 calibration images",
	Arms:   repqArms(),
	Recipe: struct {
		Network     ViTARecipe
		Calibration int
		Spread      float64
	}{ViTA(lab.Full), calibrationImages, SpreadFactor},
	Claims: []lab.Claim{
		{
			ID: "C1", Text: "spread, W4A4: accuracy of RepQ minus layer-wise", Paper: "+35.9 points on DeiT-S", Unit: "points",
			Measure: func(m lab.Metrics) float64 {
				return 100 * (m.Get(arm(method.Reparameterized, method.SoftmaxLogSqrt2, 4, "spread"), "accuracy") - m.Get(arm(method.LayerWise, method.SoftmaxLogSqrt2, 4, "spread"), "accuracy"))
			},
			Bound: lab.AtLeast(10),
		},
		{
			ID: "C2", Text: "plain, W4A4: logit MSE of RepQ over channel-wise", Paper: "1.25 points lost by reparameterisation on DeiT-S", Unit: "×",
			Measure: func(m lab.Metrics) float64 {
				return m.Get(arm(method.Reparameterized, method.SoftmaxLogSqrt2, 4, "plain"), "logit MSE") / m.Get(arm(method.ChannelWise, method.SoftmaxLogSqrt2, 4, "plain"), "logit MSE")
			},
			Bound: lab.AtMost(1.3),
		},
		{
			ID: "C3", Text: "plain, W6A6: accuracy lost to float", Paper: "0.4 to 1.5 points", Unit: "points",
			Measure: func(m lab.Metrics) float64 {
				return 100 * (m.Get("float", "accuracy") - m.Get(arm(method.Reparameterized, method.SoftmaxLogSqrt2, 6, "plain"), "accuracy"))
			},
			Bound: lab.AtMost(1),
		},
		{
			ID: "C4", Text: "attention probabilities at 4 bits: MSE of log√2 over log2, the worst block", Paper: "log√2 better by 1.58 points on Swin-S", Unit: "×",
			Measure: func(m lab.Metrics) float64 {
				return m.Get("attention", "worst block: log√2 over log2")
			},
			Bound: lab.AtMost(1),
		},
		{
			ID: "C5", Text: "spread, W4A4: logit MSE without refitted weight grids over with", Paper: "weights are calibrated again after reparameterisation", Unit: "×",
			Measure: func(m lab.Metrics) float64 {
				return m.Get("repq-norefit-w4a4-spread", "logit MSE") / m.Get(arm(method.Reparameterized, method.SoftmaxLogSqrt2, 4, "spread"), "logit MSE")
			},
			Bound: lab.AtLeast(1),
		},
	},
}

var (
	normNames    = map[method.NormGranularity]string{method.LayerWise: "layerwise", method.ChannelWise: "channelwise", method.Reparameterized: "repq"}
	softmaxNames = map[method.SoftmaxGrid]string{method.SoftmaxUniform: "-uniform", method.SoftmaxLog2: "-log2", method.SoftmaxLogSqrt2: ""}
)

// arm names a configuration: "repq-w4a4-spread", "layerwise-log2-w6a6-plain"; log√2 goes unnamed.
func arm(norms method.NormGranularity, softmax method.SoftmaxGrid, bits int, version string) string {
	return fmt.Sprintf("%s%s-w%da%d-%s", normNames[norms], softmaxNames[softmax], bits, bits, version)
}

func repqArms() []lab.Arm {
	arms := []lab.Arm{
		{Name: "float", Baseline: true, Once: true, Run: func(ctx context.Context, t *lab.Trial) error {
			b, err := shared(ctx, t)
			if err != nil {
				return err
			}
			return record(t, b, b.nets["plain"], b.logits)
		}},
		{Name: "attention", Run: attentionMaps},
	}
	for _, version := range []string{"spread", "plain"} {
		for _, bits := range []int{4, 6} {
			for _, norms := range []method.NormGranularity{method.LayerWise, method.ChannelWise, method.Reparameterized} {
				for _, softmax := range []method.SoftmaxGrid{method.SoftmaxUniform, method.SoftmaxLog2, method.SoftmaxLogSqrt2} {
					q := method.RepQViT{WeightBits: bits, ActBits: bits, Norms: norms, Softmax: softmax}
					arms = append(arms, lab.Arm{
						Name: arm(norms, softmax, bits, version), Baseline: norms != method.Reparameterized,
						Run: quantise(q, version),
					})
				}
			}
		}
	}
	return append(arms, lab.Arm{Name: "repq-norefit-w4a4-spread", Baseline: true, Run: quantise(method.RepQViT{NoRefit: true}, "spread")})
}

// quantise runs one configuration on the seed's calibration images.
func quantise(q method.RepQViT, version string) func(ctx context.Context, t *lab.Trial) error {
	q.SkipSiteErrors = true
	return compressed(q, version, calibrationImages)
}

// record keeps accuracy, distance of the logits to the float network's, agreement and size.
func record(t *lab.Trial, b *bench, net *nn.Network, logits []float32) error {
	acc, err := compress.Accuracy(logits, b.width, b.labels)
	if err != nil {
		return err
	}
	a, err := compress.Compare(b.logits, logits, len(b.labels), b.width)
	if err != nil {
		return err
	}
	t.Record("accuracy", acc)
	t.Record("logit MSE", a.MSE)
	t.Record("agreement", a.Top1)
	t.Record("bytes", float64(compress.Size(net)))
	return nil
}

// attentionMaps fits both log grids at 4 bits to each block's attention probabilities of the float network and measures
// them on test images.
func attentionMaps(ctx context.Context, t *lab.Trial) error {
	b, err := shared(ctx, t)
	if err != nil {
		return err
	}
	maps, err := b.attention(ctx, t)
	if err != nil {
		return err
	}
	worst := 0.
	for i := range maps.nodes {
		half, err := method.CalibrateLogSqrt2(maps.fit[i], 4)
		if err != nil {
			return err
		}
		whole, err := method.CalibrateLog2(maps.fit[i], 4)
		if err != nil {
			return err
		}
		h, err := half.FakeQuant(maps.held[i])
		if err != nil {
			return err
		}
		w, err := whole.FakeQuant(maps.held[i])
		if err != nil {
			return err
		}
		mh, mw := meanSquare(maps.held[i], h), meanSquare(maps.held[i], w)
		t.Record(fmt.Sprintf("block %d: MSE log√2", i), mh)
		t.Record(fmt.Sprintf("block %d: MSE log2", i), mw)
		worst = math.Max(worst, mh/mw)
	}
	t.Record("worst block: log√2 over log2", worst)
	return nil
}

// attentionImages is on how many test images attention probabilities are judged.
const attentionImages = 256

// attentionProbabilities are the attention probabilities of the plain network's blocks.
type attentionProbabilities struct {
	nodes     []string
	fit, held [][]float32 // of each block, on the calibration images and on test images
}

// attention captures the attention probabilities of the seed's calibration images and of test images.
func (b *bench) attention(ctx context.Context, t *lab.Trial) (*attentionProbabilities, error) {
	v, err := t.Shared("attention", func() (any, error) {
		net := b.nets["plain"]
		a := &attentionProbabilities{}
		var values []string
		for _, n := range net.Nodes {
			if _, ok := n.Op.(nn.Softmax); ok {
				a.nodes, values = append(a.nodes, n.Name), append(values, n.Out[0])
			}
		}
		calib, err := b.calibration(t.Seed, calibrationImages)
		if err != nil {
			return nil, err
		}
		if a.fit, _, err = compress.Capture(ctx, t.Backend, net, calib, calibrationImages, values...); err != nil {
			return nil, err
		}
		held, err := b.test.Slice(0, min(attentionImages, b.test.Len()), 0)
		if err != nil {
			return nil, err
		}
		a.held, _, err = compress.Capture(ctx, t.Backend, net, held, calibrationImages, values...)
		return a, err
	})
	if err != nil {
		return nil, err
	}
	return v.(*attentionProbabilities), nil
}

func meanSquare(a, b []float32) float64 {
	var sum float64
	for i := range a {
		d := float64(a[i] - b[i])
		sum += d * d
	}
	return sum / float64(len(a))
}

package quant

import (
	"context"
	"fmt"

	"github.com/lathe-ml/lathe/compress"
	method "github.com/lathe-ml/lathe/compress/quant"
	"github.com/lathe-ml/lathe/lab"
	"github.com/lathe-ml/lathe/nn"
)

// jlcmArms are the ways to share ResNet-8's weights that are compared, at 2 and 3 bits.
func jlcmArms(z weightOnlySizes) []struct {
	name     string
	baseline bool
	method   method.JLCM
} {
	learned := func(rule method.MappingRule) method.CodebookLearning {
		return method.CodebookLearning{Steps: z.Steps, Mapping: rule}
	}
	return []struct {
		name     string
		baseline bool
		method   method.JLCM
	}{
		{"k-means", true, method.JLCM{Groups: 1, DataFree: true}},
		{"grouped", true, method.JLCM{Groups: 4, DataFree: true}},
		{"grouped-scales", true, method.JLCM{Groups: 4, DataFree: true, Mode: method.GroupScales}},
		{"codebooks-only", true, method.JLCM{Groups: 4, Learning: learned(method.MappingFixed)}},
		{"soft", true, method.JLCM{Groups: 4, Learning: learned(method.MappingSoft)}},
		{"ste", true, method.JLCM{Groups: 4, Learning: learned(method.MappingSTE)}},
		{"jlcm", false, method.JLCM{Groups: 4, Learning: learned(method.MappingProximal)}},
		{"jlcm-one-group", false, method.JLCM{Groups: 1, Learning: learned(method.MappingProximal)}},
	}
}

// JLCM compares codebooks by k-means with learned ones, and ways to learn indices, on ResNet-8; and, without data, one group
// of neurons with eight on SmolLM2.
func JLCM() lab.Experiment {
	e := lab.Experiment{
		Method: "jlcm",
		Title:  "codebooks of 4 and 8 values for ResNet-8's weights (Fashion-MNIST), and of 8 for SmolLM2-135M's feed-forward layers",
		Recipe: struct {
			Network ResNet8Recipe
			Sizes   []weightOnlySizes
		}{ResNet8(lab.Full, 0), []weightOnlySizes{weightOnlySizesOf(lab.Smoke), weightOnlySizesOf(lab.Full)}},
		Arms: []lab.Arm{resNet8Float()},
	}
	for _, bits := range []int{2, 3} {
		for i, a := range jlcmArms(weightOnlySizesOf(lab.Full)) {
			e.Arms = append(e.Arms, lab.Arm{Name: fmt.Sprintf("%s-w%d", a.name, bits), Baseline: a.baseline, Run: func(ctx context.Context, t *lab.Trial) error {
				q := jlcmArms(weightOnlySizesOf(t.Scale))[i].method
				q.WeightBits = bits
				if t.Scale == lab.Smoke { // two layers
					q.Select = func(n *nn.Node) bool { return n.Name == "stage.1.0.conv1" || n.Name == "stage.2.0.short" }
				}
				moved, far, sites := 0., 0., 0.
				q.Traces = func(_ string, _ *method.Moments, tr method.CodebookTrace) {
					moved, far, sites = moved+tr.Moved, far+tr.Far, sites+1
				}
				q.SkipSiteErrors = true
				if err := resNet8Arm(ctx, t, q); err != nil || sites == 0 {
					return err
				}
				t.Record("indices that moved", 100*moved/sites)
				t.Record("indices that moved by more than one codeword", 100*far/sites)
				return nil
			}})
		}
	}
	smol := func(groups int) func(ctx context.Context, t *lab.Trial) error {
		return smolLM2Arm(linears[4:], func(o compress.Options) compress.Method {
			return method.JLCM{Options: o, DataFree: true, Groups: groups}
		})
	}
	e.Arms = append(e.Arms,
		lab.Arm{Name: "smollm2-float", Baseline: true, Once: true, Run: smolLM2Arm(nil, nil)},
		lab.Arm{Name: "smollm2-one-group-w3", Baseline: true, Once: true, Run: smol(1)},
		lab.Arm{Name: "smollm2-eight-groups-w3", Once: true, Run: smol(8)},
	)
	e.Claims = []lab.Claim{
		{
			ID: "C1", Text: "2 bits: accuracy of JLCM minus grouped k-means", Paper: "learning, not clustering, makes low bits work", Unit: "points",
			Measure: lab.Difference("jlcm-w2", "grouped-w2", "accuracy"), Bound: lab.AtLeast(15),
		},
		{
			ID: "C2", Text: "2 bits: accuracy of JLCM minus learned codebooks with fixed indices", Paper: "codebooks and mappings are learned jointly", Unit: "points",
			Measure: lab.Difference("jlcm-w2", "codebooks-only-w2", "accuracy"), Bound: lab.AtLeast(5),
		},
		{
			ID: "C3a", Text: "2 bits: output error of the layers on held-out images, JLCM over the soft mapping", Paper: "the gradient rule contributes most", Unit: "×",
			Measure: lab.Ratio("jlcm-w2", "soft-w2", "output error"), Bound: lab.AtMost(.9),
		},
		{
			ID: "C3b", Text: "3 bits: output error of the layers on held-out images, JLCM over the soft mapping", Paper: "the gradient rule contributes most", Unit: "×",
			Measure: lab.Ratio("jlcm-w3", "soft-w3", "output error"), Bound: lab.AtMost(.9),
		},
		{
			ID: "C4a", Text: "2 bits: output error of the layers on held-out images, four groups over one", Paper: "several codebooks after reordering the neurons", Unit: "×",
			Measure: lab.Ratio("jlcm-w2", "jlcm-one-group-w2", "output error"), Bound: lab.AtMost(.95),
		},
		{
			ID: "C4b", Text: "2 bits: bytes of the network, four groups over one", Paper: "groups cost boundaries only", Unit: "×",
			Measure: lab.Ratio("jlcm-w2", "jlcm-one-group-w2", "bytes"), Bound: lab.AtMost(1.03),
		},
		{
			ID: "C5a", Text: "SmolLM2, 3 bits, no data: perplexity with eight groups over one", Paper: "better on language models' weights", Unit: "×",
			Measure: lab.Ratio("smollm2-eight-groups-w3", "smollm2-one-group-w3", "perplexity"), Bound: lab.AtMost(1),
		},
		{
			ID: "C5b", Text: "SmolLM2: bytes of the compressed layers, eight groups over one", Paper: "a model of 7 B weights in 2 GB: 0.07 of float32", Unit: "×",
			Measure: lab.Ratio("smollm2-eight-groups-w3", "smollm2-one-group-w3", "weight bytes"), Bound: lab.AtMost(1.005),
		},
	}
	return e
}

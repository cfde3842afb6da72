package main

import (
	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/compress/quant"
)

// compressors is the table of the methods that compress offers. A method is one literal here.
var compressors = []compressor{
	{
		name: "repq-vit", about: "RepQ-ViT (arXiv:2212.08254), for pre-norm transformers, also at 4 bits", cases: 32,
		passes: 8, atOnce: true, search: true,
		knobs: []knob{
			choice("softmax", "grid of attention probabilities", string(quant.SoftmaxLogSqrt2), string(quant.SoftmaxLog2), string(quant.SoftmaxUniform)),
			choice("norms", "how outputs of norms are quantised", string(quant.Reparameterized), string(quant.LayerWise), string(quant.ChannelWise)),
			whole("input-bits", "bits of the network's input; 0: 8, or 32 with activations in float", 0, 0, 32),
		},
		make: func(s *methodSettings) compress.Method {
			return quant.RepQViT{
				Options: s.Options, WeightBits: s.bits.Weight, ActBits: s.bits.Act, InputBits: s.whole("input-bits"),
				Softmax: quant.SoftmaxGrid(s.text("softmax")), Norms: quant.NormGranularity(s.text("norms")),
			}
		},
	},
	{
		name: "minmax", about: "plain min-max rounding, for any feed-forward network; usually enough at 8 bits", cases: 256,
		passes: 3, search: true,
		knobs: []knob{
			choice("granularity", "weight scales: one per output channel or one per tensor", "channel", "tensor"),
			toggle("tables", "round embedding tables, too, with one scale per row", true),
		},
		make: func(s *methodSettings) compress.Method {
			return quant.MinMaxPTQ{
				Options: s.Options, WeightBits: s.bits.Weight, ActBits: s.bits.Act, Batch: s.batch,
				PerTensor: s.text("granularity") == "tensor", Tables: s.on("tables"),
			}
		},
	},
	{
		name: "repquant", about: "RepQuant (arXiv:2402.05628): RepQ-ViT with learned clipping and fitted weights, also for post-norm encoders", cases: 128,
		passes: 12, atOnce: true, search: true,
		knobs: []knob{
			choice("softmax", "grid of attention probabilities", string(quant.SoftmaxLogSqrt2), string(quant.SoftmaxLog2), string(quant.SoftmaxUniform)),
			choice("norms", "how outputs of norms are quantised", string(quant.Reparameterized), string(quant.LayerWise), string(quant.ChannelWise)),
			choice("shared", "norms that the residual reads, too", string(quant.SplitShared), string(quant.RefuseShared)),
			toggle("clip", "learn where channels are clipped", true),
			toggle("fit", "fit the weights to the float outputs", true),
			whole("input-bits", "bits of the network's input; 0: 8, or 32 with activations in float", 0, 0, 32),
		},
		make: func(s *methodSettings) compress.Method {
			return quant.RepQuant{
				Options: s.Options, WeightBits: s.bits.Weight, ActBits: s.bits.Act, InputBits: s.whole("input-bits"), Softmax: quant.SoftmaxGrid(s.text("softmax")),
				Norms: quant.NormGranularity(s.text("norms")), Shared: quant.SharedNorms(s.text("shared")), NoClip: !s.on("clip"), NoFit: !s.on("fit"),
			}
		},
	},
	{
		name: "dopq-vit", about: "DopQ-ViT (arXiv:2408.03291): RepQ-ViT with a tangent grid for attention, also for post-norm transformers", cases: 32,
		passes: 8, atOnce: true, search: true,
		knobs: []knob{
			choice("scale", "common scale of a norm's channels", string(quant.ScaleMedian), string(quant.ScaleMean), string(quant.ScaleMax), string(quant.ScaleSearch), string(quant.ScaleMinMax)),
			choice("folding", "what becomes of the channels' scales", string(quant.FoldRefit), string(quant.FoldFrozen), string(quant.FoldFractional), string(quant.FoldNone)),
			choice("shared", "norms that the residual reads, too", string(quant.SplitShared), string(quant.UnfoldShared), string(quant.RefuseShared)),
			choice("metric", "what the attention's grid is fitted to", string(quant.TanQAttention), string(quant.TanQOutput)),
			toggle("fit", "fit the weights to the float outputs; use 128 cases", false),
			whole("input-bits", "bits of the network's input; 0: 8, or 32 with activations in float", 0, 0, 32),
		},
		make: func(s *methodSettings) compress.Method {
			q := quant.DopQViT{
				Options: s.Options, WeightBits: s.bits.Weight, ActBits: s.bits.Act, InputBits: s.whole("input-bits"), Scale: quant.NormScale(s.text("scale")),
				Folding: quant.Folding(s.text("folding")), Shared: quant.SharedNorms(s.text("shared")),
			}
			q.TanQ.Metric = quant.TanQMetric(s.text("metric"))
			if s.on("fit") {
				q.Fit = &quant.ReconstructOptions{}
			}
			return q
		},
	},
	{
		name: "adaquant", about: "AdaQuant (arXiv:2006.10518): fits each site's weights and ranges to its float outputs; for any network, from 2 bits", cases: 128,
		passes: 60, atOnce: true, search: true,
		knobs: []knob{
			whole("iterations", "updates of each site; 0: rounding alone", 100, 0, 100_000),
			choice("tune", "what is corrected afterwards; auto: batch norms where there are some", "auto", string(quant.TuneNone), string(quant.TuneBatchNorm), string(quant.TuneCorrection), string(quant.TuneBiases)),
			whole("edge-bits", "bits of the first and the last sites", 8, 2, 8),
			number("mean-bits", "budget of bits per weight, spent by an integer programme over 8, 4 and 2; 0: none", 0, 0, 8),
			number("weight-rate", "learning rate of weights; 1e-4 suits transformers", 1e-3, 1e-9, 1),
			toggle("parallel", "fit every site to float inputs", false),
		},
		make: func(s *methodSettings) compress.Method {
			q := quant.AdaQuant{
				Options: s.Options, WeightBits: s.bits.Weight, ActBits: s.bits.Act, EdgeBits: s.whole("edge-bits"), Iterations: s.whole("iterations"),
				MeanBits: s.number("mean-bits"), Parallel: s.on("parallel"), Rates: quant.AdaRates{Weight: s.number("weight-rate")},
			}
			if q.Iterations == 0 {
				q.Iterations = -1
			}
			if t := s.text("tune"); t != "auto" {
				q.Tune = quant.Tuning(t)
			}
			return q
		},
	},
	{
		name: "zeroq", about: "ZeroQ (arXiv:2001.00281): needs no examples where there are batch norms; mixed precision under a budget", cases: 0,
		passes: 200, search: true,
		knobs: []knob{
			number("budget", "mean bits per weight, allocated by sensitivity; 0: --bits everywhere", 0, 0, 8),
			choice("data", "what it calibrates on; auto: --calib if given, else distilled", "auto", string(quant.DistilledData), string(quant.GivenData), string(quant.SyntheticData), string(quant.GaussianNoise), string(quant.UniformNoise)),
			whole("images", "how many are distilled; 0: as many as the network's cost allows, 32 at most", 0, 0, 4096),
			whole("steps", "updates of the distilled images; 0: as many as the network's cost allows, 500 at most", 0, 0, 100_000),
			toggle("fold", "merge batch norms into the layers before them", true),
			number("input-mean", "of the input over the training set, for distilled images", 0, -1e6, 1e6),
			number("input-std", "of the input over the training set", 1, 0, 1e6),
			number("input-lo", "least value an input can have; the same as input-hi: not known", 0, -1e6, 1e6),
			number("input-hi", "greatest value an input can have", 0, -1e6, 1e6),
		},
		make: func(s *methodSettings) compress.Method {
			q := quant.ZeroQ{
				Options: s.Options, WeightBits: s.bits.Weight, ActBits: s.bits.Act, Budget: s.number("budget"), Images: s.whole("images"), Fold: s.on("fold"), Batch: s.batch,
			}
			q.Distill = quant.Distill{Steps: s.whole("steps"), InputMean: []float64{s.number("input-mean")}, InputStd: []float64{s.number("input-std")}}
			if lo, hi := s.number("input-lo"), s.number("input-hi"); lo < hi {
				q.Distill.InputRange = []float64{lo, hi}
			}
			if d := s.text("data"); d != "auto" {
				q.Data = quant.DataSource(d)
			}
			return q
		},
	},
	{
		name: "nupes", about: "NUPES (arXiv:2308.05600): levels on a power law whose exponent is searched and learned, 3 to 6 bits", cases: 128,
		passes: 20, atOnce: true, search: true,
		knobs: []knob{
			toggle("data-free", "round to the searched levels and learn nothing", false),
			choice("rule", "exponents: one for each site, one for all, or the given one", string(quant.ExponentPerLayer), string(quant.ExponentGlobal), string(quant.ExponentFixed)),
			number("exponent", "of rule fixed; 0.5 decodes in integers", .5, .1, 2),
			choice("acts", "exponents of activations", string(quant.ActSearched), string(quant.ActShared), string(quant.ActUniform)),
			whole("steps", "updates of each site's codes", 500, 1, 100_000),
			whole("polish", "sweeps of coordinate descent over the codes afterwards", 0, 0, 100),
			choice("space", "where codes may go", string(quant.EntireSpace), string(quant.UpDownSpace)),
		},
		make: func(s *methodSettings) compress.Method {
			return quant.NUPES{
				Options: s.Options, WeightBits: s.bits.Weight, ActBits: s.bits.Act, DataFree: s.on("data-free"), Rule: quant.ExponentRule(s.text("rule")),
				Exponent: s.number("exponent"), Acts: quant.ActExponent(s.text("acts")),
				Learning: quant.PowerLearning{Steps: s.whole("steps"), Polish: s.whole("polish"), Space: quant.CodeSpace(s.text("space"))},
			}
		},
	},
	{
		name: "jlcm", about: "JLCM (arXiv:2309.17361): learned codebooks for groups of neurons, weights of 1 to 4 bits", cases: 128,
		bits: [2]int{1, 8}, weightOnly: true, passes: 20, atOnce: true, search: true,
		knobs: []knob{
			toggle("data-free", "codebooks by k-means only", false),
			whole("groups", "groups of neurons with a codebook each; 0: as many as cost a hundredth of the weights", 0, 0, 256),
			choice("mode", "what groups have: codebooks, or scales of one", string(quant.GroupCodebooks), string(quant.GroupScales)),
			choice("mapping", "how indices learn", string(quant.MappingProximal), string(quant.MappingSTE), string(quant.MappingSoft), string(quant.MappingFixed)),
			whole("steps", "updates of each site's codebooks and map", 300, 1, 100_000),
		},
		make: func(s *methodSettings) compress.Method {
			return quant.JLCM{
				Options: s.Options, WeightBits: s.bits.Weight, Groups: s.whole("groups"), Mode: quant.CodebookMode(s.text("mode")), DataFree: s.on("data-free"),
				Learning: quant.CodebookLearning{Steps: s.whole("steps"), Mapping: quant.MappingRule(s.text("mapping"))},
			}
		},
	},
	{
		name: "ofq", about: "OFQ (arXiv:2302.02210): trains 2- to 4-bit weights and activations with the float network as teacher; takes minutes", cases: -1,
		passes: 0, atOnce: false,
		knobs: []knob{
			whole("steps", "of training", 600, 1, 1_000_000),
			number("lr", "peak rate", 5e-4, 1e-8, 1),
			choice("weights", "scale of a weight: of its statistics, learned, or fixed", string(quant.Statistical), string(quant.LearnedScale), string(quant.FixedScale)),
			toggle("query-key", "train the products of queries and keys as one weight; false for many heads", true),
			toggle("per-token", "one step for each position; false for inputs of any length", true),
			whole("anneal-steps", "of confidence-guided annealing; 0: a tenth of the steps", 0, 0, 1_000_000),
			toggle(classesKnob, "learn from the classes of the examples too, where they are known", true),
		},
		make: func(s *methodSettings) compress.Method {
			return quant.OFQ{
				Options: s.Options, WeightBits: s.bits.Weight, ActBits: s.bits.Act, ZeroRows: true,
				QAT:     quant.QAT{Steps: s.whole("steps"), LR: s.number("lr"), Batch: s.batch, Labels: s.classes},
				Weights: quant.WeightTraining(s.text("weights")), NoQueryKey: !s.on("query-key"), PerTensor: !s.on("per-token"), AnnealSteps: s.whole("anneal-steps"),
			}
		},
	},
}

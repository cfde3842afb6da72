package quant

import (
	"context"
	"errors"
	"fmt"
	"math"

	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	method "github.com/lathe-ml/lathe/compress/quant"
	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/internal/stat"
	"github.com/lathe-ml/lathe/internal/timing"
	"github.com/lathe-ml/lathe/lab"
	"github.com/lathe-ml/lathe/lab/exp/recipe"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/learn/optim"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// shiftSizes are the sizes of the experiment at a scale.
type shiftSizes struct {
	Images   recipe.Images // training from scratch: SGD with momentum 0.9 and weight decay 1e-4 on all weights and latents
	Tuning   recipe.Loop   // of the transfer
	Network  zoo.ResNetOptions
	Digits   int // to fine-tune on
	Every    int // steps between records of the weights
	Compared int // pictures on which kernels are compared with the graph
	Rounds   int // of the timing
}

func shiftSizesOf(s lab.Scale) shiftSizes {
	z := shiftSizes{
		Images: recipe.Images{TrainN: 30_000, TestN: 10_000, Loop: recipe.Loop{Batch: 128, Steps: 2 * 30_000 / 128, LR: .1}},
		Tuning: recipe.Loop{Batch: 64, Steps: 300, LR: .02},
		Digits: 1000, Every: 50, Compared: 8, Rounds: 15,
	}
	if s == lab.Smoke {
		z.Images = recipe.Images{TrainN: 400, TestN: 100, Loop: recipe.Loop{Batch: 16, Steps: 8, LR: .1}}
		z.Tuning = recipe.Loop{Batch: 16, Steps: 4, LR: .02}
		z.Network.Width = 4
		z.Digits, z.Every, z.Compared, z.Rounds = 64, 1, 1, 1
	}
	z.Images.Optimizer, z.Tuning.Optimizer = shiftOptimizer, shiftOptimizer
	return z
}

var shiftOptimizer = optim.SGD{Momentum: .9, Decay: 1e-4}

// shiftArm is one way to store the weights of the network that is trained.
type shiftArm struct {
	name     string
	baseline bool
	prepare  func(net *nn.Network, seed uint64) error
	penalty  float64 // on zero weights of S3
}

// shiftArms are all the ways; the first is the float network.
func shiftArms() []shiftArm {
	dense := func(d method.DenseShift) func(*nn.Network, uint64) error {
		return func(net *nn.Network, seed uint64) error {
			d.Seed = seed
			_, err := d.Convert(net)
			return err
		}
	}
	on := func(form method.Latent) func(*nn.Network, uint64) error {
		return func(net *nn.Network, seed uint64) error {
			_, err := method.TrainOn(net, compress.Options{Seed: seed}, form)
			return err
		}
	}
	return []shiftArm{
		{name: "float", baseline: true, prepare: func(*nn.Network, uint64) error { return nil }},
		{name: "ds2", prepare: dense(method.DenseShift{WeightBits: 2})},
		{name: "ds3", prepare: dense(method.DenseShift{})},
		{name: "ds4", prepare: dense(method.DenseShift{WeightBits: 4})},
		{name: "ds3-plain", prepare: dense(method.DenseShift{PlainGradient: true})},
		{name: "ds3-std0.1", prepare: dense(method.DenseShift{Std: .1})},
		{name: "ds3-std1", prepare: dense(method.DenseShift{Std: 1})},
		{name: "s3", baseline: true, prepare: on(method.S3{}), penalty: 1e-5},
		{name: "pot2", baseline: true, prepare: on(method.PowerOfTwo{Bits: 2})},
		{name: "pot3", baseline: true, prepare: on(method.PowerOfTwo{Bits: 3})},
		{name: "twn", baseline: true, prepare: on(method.Ternary{})},
	}
}

// DenseShift trains ResNet-8 on Fashion-MNIST with shift weights of 2 to 4 bits, with the ablations of the method, beside
// float weights and the forms with a zero, and moves networks on to handwritten digits (arXiv:2208.09708).
func DenseShift() lab.Experiment {
	e := lab.Experiment{
		Method: "denseshift",
		Title:  "ResNet-8 trained on Fashion-MNIST with weights ±2^s, without zero, beside float, shift and ternary weights; transfer to digits",
		Recipe: []shiftSizes{shiftSizesOf(lab.Smoke), shiftSizesOf(lab.Full)},
		Claims: []lab.Claim{
			{
				ID: "C1", Text: "3 bits: accuracy less float's", Paper: "70.62 against 69.76 % on ImageNet with ResNet-18: competitive with full precision", Unit: "points",
				Measure: lab.Difference("ds3", "float", "accuracy"), Bound: lab.AtLeast(-1),
			},
			{
				ID: "C2", Text: "3 bits: accuracy less that of S3, which spends a code on zero", Paper: "+1.1 points on ImageNet", Unit: "points",
				Measure: lab.Difference("ds3", "s3", "accuracy"), Bound: lab.AtLeast(1),
			},
			{
				ID: "C3a", Text: "latents of standard deviation 1e-3 less those of 1: accuracy", Paper: "large latents freeze the weights", Unit: "points",
				Measure: lab.Difference("ds3", "ds3-std1", "accuracy"), Bound: lab.AtLeast(3),
			},
			{
				ID: "C3b", Text: "latents of standard deviation 1e-3 over those of 1: share of weights that flip, in the first quarter of training", Paper: "low-variance initialisation prevents freezing", Unit: "×",
				Measure: func(m lab.Metrics) float64 {
					return m.Get("ds3", "early flip rate") / max(m.Get("ds3-std1", "early flip rate"), 1e-5) // about one weight of the network
				},
				Bound: lab.AtLeast(5),
			},
			{
				ID: "C4a", Text: "2 bits: accuracy less that of ternary weights", Paper: "well above ternary networks at the same storage", Unit: "points",
				Measure: lab.Difference("ds2", "twn", "accuracy"), Bound: lab.AtLeast(-.3),
			},
			{
				ID: "C4b", Text: "2 bits: accuracy less that of powers of two with zero, 3 values of the same 2 bits", Paper: "4 values beat 3", Unit: "points",
				Measure: lab.Difference("ds2", "pot2", "accuracy"), Bound: lab.AtLeast(1),
			},
			{
				ID: "C5", Text: "fine-tuned on digits, the 3-bit network less the float one: accuracy", Paper: "no drop in transfer", Unit: "points",
				Measure: lab.Difference("transfer-ds3", "transfer-float", "accuracy"), Bound: lab.AtLeast(-1.5),
			},
		},
	}
	arms := shiftArms()
	for _, a := range arms {
		e.Arms = append(e.Arms, lab.Arm{Name: a.name, Baseline: a.baseline, Run: func(ctx context.Context, t *lab.Trial) error {
			r, err := a.shared(ctx, t)
			if err != nil {
				return err
			}
			r.record(t)
			if a.name == "ds3" {
				return compareKernels(ctx, t, r.net)
			}
			return nil
		}})
	}
	wide := shiftArm{name: "ds3-kaiming", prepare: func(net *nn.Network, seed uint64) error {
		names, err := method.DenseShift{Options: compress.Options{Seed: seed}}.Convert(net)
		return errors.Join(err, widenLatents(net, names))
	}}
	for _, a := range []shiftArm{arms[0], arms[2], wide} {
		e.Arms = append(e.Arms, lab.Arm{Name: "transfer-" + a.name, Baseline: a.baseline, Run: func(ctx context.Context, t *lab.Trial) error {
			r, err := a.shared(ctx, t)
			if err != nil {
				return err
			}
			t.Record("pretrained accuracy", r.accuracy)
			return transfer(ctx, t, r.net)
		}})
	}
	e.Arms = append(e.Arms, lab.Arm{Name: "kernel", Once: true, Run: timeShifts})
	return e
}

// widenLatents gives latents the standard deviation that float weights would have: √(2/fan-in).
func widenLatents(net *nn.Network, sites []string) error {
	for _, name := range sites {
		n := net.Node(name)
		for local := range n.P {
			if local == "b" {
				continue
			}
			p := net.Param(n, local)
			d, s := p.Data(), p.Value.Shape()
			f := float32(math.Sqrt(2/float64(s.Size()/s.Dimensions[0])) / 1e-3)
			for i := range d {
				d[i] *= f
			}
			if err := p.SetData(d); err != nil {
				return err
			}
		}
	}
	return nil
}

// shiftRun is a trained network; nobody changes it.
type shiftRun struct {
	net       *nn.Network
	accuracy  float64 // percent, on the test pictures
	loss      float64
	flips     method.FreezingMeter
	flipsAt   []int // steps of the records but the first
	early     float64
	bytes     int64 // of the weights as stored for inference
	trainable int64 // bytes of all that is trained
}

func (r *shiftRun) record(t *lab.Trial) {
	t.Record("accuracy", r.accuracy)
	t.Record("test loss", r.loss)
	t.Record("bytes", float64(r.bytes))
	t.Record("trained bytes", float64(r.trainable))
	if len(r.flipsAt) == 0 {
		return
	}
	for i, v := range r.flips.FlipRate() {
		t.Series("flip rate", float64(r.flipsAt[i]), v)
		t.Series("sign flip rate", float64(r.flipsAt[i]), r.flips.SignFlipRate()[i])
	}
	t.Record("first flip rate", r.flips.FlipRate()[0])
	t.Record("early flip rate", r.early)
	t.Record("frozen", r.flips.FrozenFraction())
}

// shared trains the arm's network once per seed.
func (a shiftArm) shared(ctx context.Context, t *lab.Trial) (*shiftRun, error) {
	v, err := t.Shared("trained:"+a.name, func() (any, error) { return a.train(ctx, t) })
	if err != nil {
		return nil, err
	}
	return v.(*shiftRun), nil
}

func (a shiftArm) train(ctx context.Context, t *lab.Trial) (*shiftRun, error) {
	z := shiftSizesOf(t.Scale)
	z.Network.Seed = t.Seed
	net, err := zoo.ResNet(z.Network)
	if err != nil {
		return nil, err
	}
	if err := a.prepare(net, t.Seed); err != nil {
		return nil, err
	}
	sets, err := z.Images.Sets(ctx, t)
	if err != nil {
		return nil, err
	}
	r := &shiftRun{net: net}
	for p := range net.Params.All() {
		if p.Trainable() {
			r.trainable += p.Value.ByteSize()
		}
	}
	discrete, err := discreteWeights(net)
	if err != nil {
		return nil, err
	}
	var watch []learn.Hook
	if len(discrete) > 0 {
		if err := r.flips.Record(discrete); err != nil {
			return nil, err
		}
		watch = append(watch, func(_ *learn.Trainer, info learn.Info) error {
			if info.Step%z.Every != 0 {
				return nil
			}
			w, err := discreteWeights(net)
			if err != nil {
				return err
			}
			r.flipsAt = append(r.flipsAt, info.Step)
			return r.flips.Record(w)
		})
	}
	loss := method.S3Penalty(net, learn.Classifier(net), a.penalty)
	order, err := data.NewBatcher(sets.Train.N, z.Images.Loop.Batch, t.Seed)
	if err != nil {
		return nil, err
	}
	if err := z.Images.Fit(ctx, t, net, loss, func(step int) ([]*tensors.Tensor, error) {
		return z.Images.Tensors(sets, sets.Train, order.At(step))
	}, watch); err != nil {
		return nil, err
	}
	var early []float64
	for i, step := range r.flipsAt {
		if i == 0 || step <= z.Images.Steps/4 {
			early = append(early, r.flips.FlipRate()[i])
		}
	}
	r.early = stat.Mean(early)
	if r.loss, r.accuracy, err = z.Images.Evaluate(t, net, sets); err != nil {
		return nil, err
	}
	frozen := net.Clone()
	if err := method.Settle(frozen); err != nil {
		return nil, err
	}
	for _, n := range frozen.Sites() {
		r.bytes += compress.WeightBytes(frozen, n)
	}
	return r, nil
}

// discreteWeights are the values of all weights that are trained on few of them, as they are now, without the factors per
// channel; nil for a float network.
func discreteWeights(net *nn.Network) (all []float32, err error) {
	for _, n := range net.Sites() {
		l, ok := n.Op.(nn.Linear).Repr().(method.Latent)
		if !ok {
			continue
		}
		values := &method.Latents{Site: n.Name, Values: map[string][]float32{}}
		for local := range n.P {
			if local == "b" {
				continue
			}
			p := net.Param(n, local)
			values.Values[local], values.Shape = p.Data(), p.Value.Shape().Dimensions
		}
		_, stored, err := l.Stored(values)
		if err != nil {
			return nil, err
		}
		table := nn.Floats(stored["table"])
		for _, c := range nn.Floats(stored["q"]) {
			v := table[int(c)]
			if _, scaled := l.(method.PowerOfTwo); scaled && v != 0 {
				_, e := math.Frexp(float64(v / table[1])) // the largest magnitude moves with every step
				v = float32(math.Copysign(math.Ldexp(1, e-1), float64(v)))
			}
			all = append(all, v)
		}
	}
	return all, nil
}

// transfer replaces the classifier and fine-tunes on digits: float weights and latents go on from where they are.
func transfer(ctx context.Context, t *lab.Trial, pretrained *nn.Network) error {
	z := shiftSizesOf(t.Scale)
	net := pretrained.Clone()
	train, test, err := largeDigits(ctx, z.Digits, t.Seed)
	if err != nil {
		return err
	}
	head := net.Node("head")
	for local, init := range map[string]nn.Init{"w": nn.FanIn(net.Param(head, "w").Value.Shape().Dimensions[1], 1), "b": nn.Fill(0)} {
		p := net.Param(head, local)
		d := p.Data()
		init(rng.New(t.Seed, "head:"+local), d)
		if err := p.SetData(d); err != nil {
			return err
		}
	}
	sets := &recipe.Sets{Train: train, Test: test, Std: 1}
	images := recipe.Images{Loop: z.Tuning}
	if err := images.TrainOn(ctx, t, net, sets, train); err != nil {
		return err
	}
	loss, accuracy, err := images.Evaluate(t, net, sets)
	if err != nil {
		return err
	}
	t.Record("accuracy", accuracy)
	t.Record("test loss", loss)
	return nil
}

// compareKernels runs every shift layer of the trained network by exponent additions, and by shifts of 16-bit integers,
// on what the graph feeds it, and records the largest differences relative to the layer's largest output.
func compareKernels(ctx context.Context, t *lab.Trial, trained *nn.Network) error {
	z := shiftSizesOf(t.Scale)
	sets, err := z.Images.Sets(ctx, t)
	if err != nil {
		return err
	}
	net := trained.Clone()
	if err := method.Settle(net); err != nil {
		return err
	}
	x, err := sets.Test.First(z.Compared).Float32(nil)
	if err != nil {
		return err
	}
	var nodes []*nn.Node
	var values []string
	for _, n := range net.Sites() {
		if _, err := method.ShiftsOf(net, n); err == nil {
			nodes, values = append(nodes, n), append(values, n.In[0], n.Out[0])
		}
	}
	got, dims, err := compress.Capture(ctx, t.Backend, net, compress.Examples{x}, z.Compared, values...)
	if err != nil {
		return err
	}
	exponents, shifts := 0., 0.
	for i, n := range nodes {
		w, err := method.ShiftsOf(net, n)
		if err != nil {
			return err
		}
		op, h, wd := n.Op.(nn.Conv), dims[2*i][1], dims[2*i][2]
		in, out := len(got[2*i])/z.Compared, len(got[2*i+1])/z.Compared
		top, largest := float32(0), float32(0)
		for _, v := range got[2*i] {
			top = max(top, v, -v)
		}
		for _, v := range got[2*i+1] {
			largest = max(largest, v, -v)
		}
		step := float64(max(top, 1e-20)) / math.MaxInt16
		for c := range z.Compared {
			x, want := got[2*i][c*in:(c+1)*in], got[2*i+1][c*out:(c+1)*out]
			y, _, _, err := w.ConvF32(op, x, h, wd)
			if err != nil {
				return fmt.Errorf("%s: %w", n.Name, err)
			}
			codes := make([]int32, len(x))
			for k, v := range x {
				codes[k] = int32(math.RoundToEven(float64(v) / step))
			}
			ints, _, _, err := w.ConvInt(op, codes, h, wd)
			if err != nil {
				return fmt.Errorf("%s: %w", n.Name, err)
			}
			for k := range want {
				scale := float64(max(largest, 1e-20))
				exponents = max(exponents, math.Abs(float64(y[k]-want[k]))/scale)
				shifts = max(shifts, math.Abs(float64(ints[k])*step-float64(want[k]))/scale)
			}
		}
	}
	t.Record("exponent addition: largest error", exponents)
	t.Record("16-bit shifts: largest error", shifts)
	return nil
}

// timeShifts compares exponent additions with multiplications in plain loops.
func timeShifts(ctx context.Context, t *lab.Trial) error {
	const rows, in = 64, 576
	r := rng.New(t.Seed, "kernel")
	w := &method.ShiftWeights{Bits: 3, Shape: []int{rows, in}, Codes: make([]uint8, rows*in)}
	for i := range w.Codes {
		w.Codes[i] = uint8(r.IntN(8))
	}
	x, y, z := make([]float32, in), make([]float32, rows), make([]float32, rows)
	rng.Normal(r, x, 1)
	ints, sums := make([]int32, in), make([]int64, rows)
	for i := range ints {
		ints[i] = int32(r.IntN(256)) - 128
	}
	m := w.Decode()
	times, err := timing.Interleaved(ctx, shiftSizesOf(t.Scale).Rounds, t.Progress,
		func() error { return w.DotF32(x, y) },
		func() error {
			for o := range z {
				var sum float32
				for i, v := range m[o*in : (o+1)*in] {
					sum += v * x[i]
				}
				z[o] = sum
			}
			return nil
		},
		func() error { return w.DotInt(ints, sums) },
	)
	if err != nil {
		return err
	}
	for o := range y {
		if y[o] != z[o] {
			return fmt.Errorf("row %d: exponent additions give %g, multiplications %g", o, y[o], z[o])
		}
	}
	ratio, _, _ := times[0].Ratio(times[1])
	t.Record("exponent additions over multiplications: time", ratio)
	ratio, _, _ = times[2].Ratio(times[1])
	t.Record("shifts over multiplications: time", ratio)
	return nil
}

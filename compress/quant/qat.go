package quant

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/gomlx/compute"
	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/learn/optim"
	"github.com/lathe-ml/lathe/nn"
)

// Quantisation-aware training: a network whose weights and activations have few bits in the forward pass is trained, by
// gradients that look through the rounding, to do what the float network does. Every such method is made of the parts
// of this file:
//
//  1. MakeLatent gives a site's weight a Latent form; activation quantisers with learnt parameters are ordinary nodes.
//  2. QAT.Train trains all that is trainable (latents, steps, biases, norms) against the float network, which needs no
//     labels, and against labels when there are some. A method may train in several phases.
//  3. Settle turns latents and learnt quantisers into the forms in which they are stored and exported.

// Latent is a weight form that is trained at the precision in which it will be stored. Its Specs are the latents: real
// numbers that the optimiser moves according to their roles (Weight with decay, Gain and Bias without, Constant not at
// all). Its Value is the low-bit weight that they stand for, with the gradient that the method defines.
type Latent interface {
	nn.Repr
	// Start gives the latents for a float weight, by local name.
	Start(s *Site) (map[string][]float32, error)
	// Stored gives the form and the parameters in which the weight is stored after training.
	Stored(l *Latents) (nn.Repr, map[string]*tensors.Tensor, error)
}

// Latents are the trained latents of a site.
type Latents struct {
	Site   string
	Shape  []int                // of the weight
	Values map[string][]float32 // by local name
}

// Settler is an op whose parameters are learnt and which has something to do when that is over, such as handing a shift
// on to a bias.
type Settler interface {
	nn.Op
	Settle(net *nn.Network, n *nn.Node) error
}

// MakeLatent gives a site with a plain weight a latent form that starts from that weight.
func MakeLatent(net *nn.Network, n *nn.Node, l Latent) error {
	s, err := siteOf(net, n)
	if err != nil {
		return err
	}
	if err := checkFinite(s.Weight); err != nil {
		return fmt.Errorf("weight of %q: %w", s.Name, err)
	}
	values, err := l.Start(s)
	if err != nil {
		return fmt.Errorf("weight of %q: %w", s.Name, err)
	}
	return setLatents(net, n, l, s.Shape, values)
}

// setLatents replaces a site's weight by latents of the given values.
func setLatents(net *nn.Network, n *nn.Node, l Latent, shape []int, values map[string][]float32) error {
	specs, err := specsOf(l, shape)
	if err != nil {
		return fmt.Errorf("weight of %q: %w", n.Name, err)
	}
	keep := false
	for _, s := range specs {
		v := values[s.Name]
		if len(v) != s.Shape.Size() {
			return fmt.Errorf("weight of %q: latent %q has %d values, want %s", n.Name, s.Name, len(v), s.Shape)
		}
		net.SetParam(n, s.Name, s.Role, v, s.Shape.Dimensions...)
		keep = keep || s.Name == "w"
	}
	if w, ok := n.P["w"]; ok && !keep {
		if !net.SharedParam(n, "w") {
			net.Params.Delete(w)
		}
		delete(n.P, "w")
	}
	n.Op = n.Op.(nn.Linear).WithRepr(l)
	return nil
}

func specsOf(r nn.Repr, shape []int) (specs []nn.Spec, err error) {
	err = nn.Catch(func() { specs = r.Specs(shapes.Make(dtypes.Float32, shape...)) })
	return specs, err
}

// Settle ends training: every latent weight takes its stored form and every Settler settles. The network computes what
// it computed before, up to rounding.
func Settle(net *nn.Network) error {
	sh, err := net.Shapes(0)
	if err != nil {
		return err
	}
	for _, n := range net.Sites() {
		l, ok := n.Op.(nn.Linear).Repr().(Latent)
		if !ok {
			continue
		}
		t, err := latentsOf(net, n, weightShape(n, sh))
		if err != nil {
			return err
		}
		for name, v := range t.Values {
			if err := checkFinite(v); err != nil {
				return fmt.Errorf("quant: node %q: latent %q after training: %w", n.Name, name, err)
			}
		}
		r, params, err := l.Stored(t)
		if err != nil {
			return fmt.Errorf("quant: node %q: %w", n.Name, err)
		}
		old := maps.Clone(n.P)
		for name := range t.Values {
			delete(n.P, name)
		}
		if _, err := net.Substitute(n.Name, r, params); err != nil {
			return err
		}
		for name := range t.Values {
			if p := old[name]; !paramInUse(net, p) {
				net.Params.Delete(p)
			}
		}
	}
	for _, n := range slices.Clone(net.Nodes) {
		if s, ok := n.Op.(Settler); ok {
			if err := s.Settle(net, n); err != nil {
				return fmt.Errorf("quant: node %q: %w", n.Name, err)
			}
		}
	}
	return net.Check()
}

// weightShape is the shape of a site's whole weight; sh gives those of the network's values.
func weightShape(n *nn.Node, sh map[string]shapes.Shape) []int {
	in := make([]shapes.Shape, len(n.In))
	for i, v := range n.In {
		in[i] = sh[v]
	}
	return n.Op.(nn.Linear).WeightShape(in).Dimensions
}

// latentsOf reads the latents of a site whose weight has the given shape.
func latentsOf(net *nn.Network, n *nn.Node, shape []int) (*Latents, error) {
	specs, err := specsOf(n.Op.(nn.Linear).Repr(), shape)
	if err != nil {
		return nil, err
	}
	t := &Latents{Site: n.Name, Shape: shape, Values: map[string][]float32{}}
	for _, s := range specs {
		p := net.Param(n, s.Name)
		if p == nil {
			return nil, fmt.Errorf("quant: node %q: latent %q is missing", n.Name, s.Name)
		}
		t.Values[s.Name] = p.Data()
	}
	return t, nil
}

func paramInUse(net *nn.Network, param string) bool {
	return slices.ContainsFunc(net.Nodes, func(n *nn.Node) bool {
		return slices.Contains(slices.Collect(maps.Values(n.P)), param)
	})
}

// QAT says how a network of latent weights is trained on the calibration examples. Without labels it learns the float
// network's outputs alone: the cross-entropy against its softmax where they are logits or probabilities (the value
// behind a dense layer or a softmax), the squared error relative to their mean square where they are something else.
// With labels, the labels' cross-entropy is added with equal weight (DeiT's two targets, on one head). Methods embed
// it.
type QAT struct {
	Labels    []int   // class of each calibration case; nil: the float network is the only target
	NoTeacher bool    // learn from the labels alone
	Steps     int     // of training; 0: 600
	Batch     int     // cases per step; 0: 64; never more than there are
	LR        float64 // peak rate; 0: 5e-4
	Warmup    int     // steps over which the rate rises; 0: a twelfth of Steps; -1: none
	FloorLR   float64 // rate at the end of the cosine; 0: 1e-5
	Decay     float64 // decoupled weight decay of the latents; 0: 0.05; -1: none
	// Optimizer replaces AdamW with Decay.
	Optimizer optim.Optimizer
	// After are called after every step.
	After []learn.Hook
}

// Phase is a stretch of a method's training.
type Phase struct {
	Name     string         // what progress and journal call it
	Steps    int            // 0: the QAT's
	LR       float64        // 0: the QAT's
	Schedule optim.Schedule // nil: the QAT's warm-up and cosine
	Seed     uint64         // of the order of the cases
	First    int            // number of the phase's first batch in that order

	Factors func(p *nn.Param) learn.Factors               // nil: learn.DefaultFactors
	Moves   func(param string, w *graph.Node) *graph.Node // see learn.Options
	Penalty func(env *nn.Env) *graph.Node                 // added to the loss; nil: none
	// Batches draws other inputs for the cases of a step, such as augmented ones; nil: the examples as they are.
	Batches func(step int, cases []int) ([]*tensors.Tensor, error)
}

// Trained says what a phase did to the loss.
type Trained struct {
	Steps       int
	Batch       int
	First, Last float64 // mean loss over the first and the last tenth of the steps
}

func (q QAT) withDefaults(cases int) QAT {
	q.Steps = cmp.Or(q.Steps, 600)
	q.Batch = min(cmp.Or(q.Batch, 64), cases)
	q.LR = cmp.Or(q.LR, 5e-4)
	q.Warmup = cmp.Or(q.Warmup, q.Steps/12)
	q.FloorLR = cmp.Or(q.FloorLR, 1e-5)
	q.Decay = cmp.Or(q.Decay, .05)
	q.Warmup, q.Decay = max(q.Warmup, 0), max(q.Decay, 0)
	if q.Optimizer == nil {
		q.Optimizer = optim.AdamW{Decay: q.Decay}
	}
	return q
}

// CheckTraining reports settings that do not fit the network or the examples.
func (q QAT) CheckTraining(net *nn.Network, x compress.Examples) error {
	if err := x.Check(net); err != nil {
		return err
	}
	switch {
	case q.Steps < 0 || q.Batch < 0 || q.LR < 0 || q.FloorLR < 0 || q.LR-q.LR != 0:
		return fmt.Errorf("quant: training: %d steps of %d cases at rate %g down to %g; none may be negative", q.Steps, q.Batch, q.LR, q.FloorLR)
	case q.NoTeacher && q.Labels == nil:
		return errors.New("quant: training without the float network as teacher needs labels")
	case q.Labels != nil && len(q.Labels) != x.Len():
		return fmt.Errorf("quant: training: %d labels for %d cases", len(q.Labels), x.Len())
	}
	targets, err := targetsOf(net)
	if err != nil {
		return err
	}
	if q.Labels == nil {
		return nil
	}
	if len(targets) != 1 || !targets[0].classes || targets[0].shape.Rank() != 2 {
		return fmt.Errorf("quant: training: %w; leave them out to learn from the float network alone", ErrNoClasses)
	}
	classes := targets[0].shape.Dimensions[1]
	for i, l := range q.Labels {
		if l < 0 || l >= classes {
			return fmt.Errorf("quant: training: label %d of case %d; the network has %d classes", l, i, classes)
		}
	}
	return nil
}

// target is an output as training sees it.
type target struct {
	value   string // logits in front of a softmax, else the output itself
	classes bool   // the last axis is one of logits
	shape   shapes.Shape
}

// targetsOf finds what the outputs of a network are: logits where a dense layer or a softmax over the last axis makes
// them, numbers otherwise.
func targetsOf(net *nn.Network) ([]target, error) {
	sh, err := net.Shapes(0)
	if err != nil {
		return nil, err
	}
	var out []target
	for _, o := range net.Outputs {
		t := target{value: o}
		if p := net.Producer(source(net, o, sh)); p != nil {
			switch op := p.Op.(type) {
			case nn.Dense:
				t.classes = true
			case nn.Softmax:
				if r := sh[p.Out[0]].Rank(); op.Axis == 0 || op.Axis == -1 || op.Axis == r-1 {
					t.value, t.classes = p.In[0], true
				}
			}
		}
		t.shape = sh[t.value]
		if !t.shape.DType.IsFloat() {
			return nil, fmt.Errorf("quant: output %q is %s, through which nothing is learnt; cut the network in front of it", o, t.shape)
		}
		if r := t.shape.Rank(); t.classes && (r == 0 || t.shape.Dimensions[r-1] < 2) {
			t.classes = false
		}
		out = append(out, t)
	}
	return out, nil
}

// outputsAs returns the network with the targets as outputs; it shares nodes and parameters.
func outputsAs(net *nn.Network, targets []target) *nn.Network {
	v := &nn.Network{Inputs: net.Inputs, Nodes: net.Nodes, Params: net.Params}
	for _, t := range targets {
		v.Outputs = append(v.Outputs, t.value)
	}
	return v
}

// loss compares the student with what a batch holds: inputs, then the teacher's targets, then the labels.
func (q QAT) loss(student *nn.Network, targets []target, penalty func(env *nn.Env) *graph.Node) learn.LossFunc {
	view := outputsAs(student, targets)
	return func(env *nn.Env, batch []*graph.Node) *graph.Node {
		in := map[string]*graph.Node{}
		for i, x := range view.Inputs {
			in[x.Name] = batch[i]
		}
		batch = batch[len(view.Inputs):]
		out := view.Lower(env, in)
		var sum *graph.Node
		add := func(l *graph.Node) {
			if sum != nil {
				l = graph.Add(sum, l)
			}
			sum = l
		}
		if !q.NoTeacher {
			for i, t := range targets {
				want := graph.ConvertDType(batch[i], out[i].DType())
				if t.classes {
					add(learn.SoftCrossEntropy(out[i], nn.SoftmaxOf(want, -1)))
				} else {
					size := graph.AddScalar(graph.ReduceAllMean(graph.Mul(want, want)), 1e-12)
					add(graph.Div(learn.MSE(out[i], graph.StopGradient(want)), graph.StopGradient(size)))
				}
			}
			batch = batch[len(targets):]
		}
		if q.Labels != nil {
			add(learn.CrossEntropy(out[0], batch[0]))
			learn.Report(env, "accuracy", learn.Accuracy(out[0], batch[0]))
		}
		if penalty != nil {
			p := penalty(env)
			learn.Report(env, "penalty", p)
			add(p)
		}
		return sum
	}
}

// Train trains the student in place; the teacher, a network with the same inputs and outputs, is left alone and may be
// nil with NoTeacher. The order of the cases depends on the phase's seed alone, so that methods can be compared on
// equal batches. With a journal a finished phase is not trained again, and one that was stopped goes on where it was.
//
// Errors: what CheckTraining reports; learn.ErrDiverged.
func (q QAT) Train(ctx context.Context, b compute.Backend, student, teacher *nn.Network, x compress.Examples, o compress.Options, p Phase) (Trained, error) {
	if err := q.CheckTraining(student, x); err != nil {
		return Trained{}, err
	}
	if teacher == nil && !q.NoTeacher {
		return Trained{}, errors.New("quant: training needs the float network as teacher")
	}
	q.Steps, q.LR = cmp.Or(p.Steps, q.Steps), cmp.Or(p.LR, q.LR)
	q = q.withDefaults(x.Len())
	var piece struct {
		Params map[string][]float32
		Done   Trained
	}
	var sites []string
	for _, n := range student.Sites() {
		if _, ok := n.Op.(nn.Linear).Repr().(Latent); ok {
			sites = append(sites, n.Name)
		}
	}
	key := fmt.Sprintf("training/%s/%d/%q", p.Name, q.Steps, sites)
	restored, err := o.Journal.Do(key, &piece, func() (err error) {
		if piece.Done, err = q.train(ctx, b, student, teacher, x, o, p, o.Journal.File(key)); err != nil {
			return err
		}
		piece.Params = map[string][]float32{}
		for v := range student.Params.All() {
			if v.Trainable() || v.Role == nn.State {
				piece.Params[v.Name] = v.Data()
			}
		}
		return nil
	})
	if err != nil {
		return Trained{}, fmt.Errorf("quant: %s: %w", p.Name, err)
	}
	if restored {
		for name, v := range piece.Params {
			t := student.Params.Get(name)
			if t == nil {
				return Trained{}, fmt.Errorf("quant: %s: the journal has a parameter %q that the network lacks; remove the journal", p.Name, name)
			}
			if err := t.SetData(v); err != nil {
				return Trained{}, err
			}
		}
		o.Report(compress.Step{Site: p.Name, Done: q.Steps, Total: q.Steps, Err: piece.Done.Last, Restored: true})
	}
	return piece.Done, nil
}

func (q QAT) train(ctx context.Context, b compute.Backend, student, teacher *nn.Network, x compress.Examples, o compress.Options, p Phase, checkpoint string) (Trained, error) {
	targets, err := targetsOf(student)
	if err != nil {
		return Trained{}, err
	}
	schedule := p.Schedule
	if schedule == nil {
		schedule = optim.Cosine(q.Steps, q.Warmup, min(q.FloorLR/q.LR, 1))
	}
	order, err := data.NewBatcher(x.Len(), q.Batch, p.Seed)
	if err != nil {
		return Trained{}, err
	}
	t, err := learn.NewTrainer(b, &student.Params, q.loss(student, targets, p.Penalty), learn.Options{
		Optimizer: q.Optimizer, LR: q.LR, Schedule: schedule, Seed: p.Seed, Factors: p.Factors, Moves: p.Moves,
	})
	if err != nil {
		return Trained{}, err
	}
	defer t.Finalize()
	var master *lessons
	if !q.NoTeacher {
		if master, err = newLessons(b, teacher, x.Len()); err != nil {
			return Trained{}, err
		}
		defer master.runner.Finalize()
	}
	batch := func(step int) ([]*tensors.Tensor, error) {
		idx := order.At(p.First + step)
		var in compress.Examples
		var err error
		if p.Batches != nil {
			in, err = p.Batches(step, idx)
		} else {
			in, err = x.Pick(idx)
		}
		if err != nil {
			return nil, err
		}
		out := slices.Clone(in)
		if master != nil {
			want, err := master.of(in, idx, p.Batches != nil)
			if err != nil {
				return nil, err
			}
			out = append(out, want...)
		}
		if q.Labels != nil {
			labels := make([]int32, len(idx))
			for i, k := range idx {
				labels[i] = int32(q.Labels[k])
			}
			out = append(out, tensors.FromFlatDataAndDimensions(labels, len(labels)))
		}
		return out, nil
	}
	done := Trained{Steps: q.Steps, Batch: q.Batch}
	tenth := max(1, q.Steps/10)
	record := func(_ *learn.Trainer, i learn.Info) error {
		if i.Step <= tenth {
			done.First += i.Loss / float64(tenth)
		}
		if i.Step > q.Steps-tenth {
			done.Last += i.Loss / float64(tenth)
		}
		if i.Step%tenth == 0 || i.Step == q.Steps {
			o.Report(compress.Step{Site: p.Name, Done: i.Step, Total: q.Steps, Err: i.Loss})
		}
		return nil
	}
	_, err = t.Fit(ctx, learn.FitOptions{Steps: q.Steps, Batch: batch, Checkpoint: checkpoint, Extra: &done, After: append([]learn.Hook{record}, q.After...)})
	return done, err
}

// lessons are the teacher's targets. Those of a case are computed once, unless all of them together are too large.
type lessons struct {
	runner *nn.Runner
	cases  int
	known  []bool
	kept   [][]float32 // by target
	widths []int
	dims   [][]int
}

// lessonsLimit is the size up to which the teacher's targets are kept, in numbers.
const lessonsLimit = 16 << 20

func newLessons(b compute.Backend, teacher *nn.Network, cases int) (*lessons, error) {
	targets, err := targetsOf(teacher)
	if err != nil {
		return nil, err
	}
	l := &lessons{cases: cases}
	total := 0
	for _, t := range targets {
		if t.shape.Rank() == 0 || t.shape.Dimensions[0] == 0 {
			return nil, fmt.Errorf("output %q is %s, without an axis for the cases", t.value, t.shape)
		}
		w := t.shape.Size() / t.shape.Dimensions[0]
		l.widths, l.dims = append(l.widths, w), append(l.dims, t.shape.Dimensions[1:])
		total += w
	}
	if total > 0 && cases <= lessonsLimit/total {
		l.known = make([]bool, cases)
		for _, w := range l.widths {
			l.kept = append(l.kept, make([]float32, cases*w))
		}
	}
	l.runner, err = nn.NewRunner(b, outputsAs(teacher, targets), nn.RunOptions{})
	return l, err
}

// of returns the targets of some cases; fresh says that the inputs are not those of the examples.
func (l *lessons) of(in compress.Examples, idx []int, fresh bool) ([]*tensors.Tensor, error) {
	keep := l.known != nil && !fresh
	if keep && !slices.ContainsFunc(idx, func(i int) bool { return !l.known[i] }) {
		var out []*tensors.Tensor
		for t, w := range l.widths {
			v := make([]float32, 0, len(idx)*w)
			for _, i := range idx {
				v = append(v, l.kept[t][i*w:(i+1)*w]...)
			}
			out = append(out, tensors.FromFlatDataAndDimensions(v, append([]int{len(idx)}, l.dims[t]...)...))
		}
		return out, nil
	}
	out, err := l.runner.Run(in...)
	if err != nil || !keep {
		return out, err
	}
	for t, w := range l.widths {
		v := nn.Floats(out[t])
		for k, i := range idx {
			copy(l.kept[t][i*w:(i+1)*w], v[k*w:(k+1)*w])
			l.known[i] = true
		}
	}
	return out, nil
}

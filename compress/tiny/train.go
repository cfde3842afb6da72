package tiny

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/learn/optim"
)

// Examples are labelled inputs of a network, each a case's values in the order of the network's input. It keeps what
// frozen layers make of them, so that training and judging the trained part alone does not compute them again; a device
// has no room for that. Not for concurrent use.
type Examples struct {
	X      [][]float32
	Labels []int

	kept map[keptKey][][]float32
}

type keptKey struct {
	base *Net
	cut  string // the operation behind it and what is live there; the same buffer holds other values in front of another one
}

// Len is the number of cases.
func (e *Examples) Len() int { return len(e.X) }

// Pick returns the cases of the given indices; they share their values.
func (e *Examples) Pick(idx []int) *Examples {
	out := &Examples{}
	for _, i := range idx {
		out.X, out.Labels = append(out.X, e.X[i]), append(out.Labels, e.Labels[i])
	}
	return out
}

// Forget drops what is kept of frozen layers.
func (e *Examples) Forget() { e.kept = nil }

func (e *Examples) check(classes int) error {
	if len(e.X) == 0 {
		return ErrEmpty
	}
	if len(e.Labels) != len(e.X) {
		return fmt.Errorf("tiny: %d labels for %d cases", len(e.Labels), len(e.X))
	}
	for i, l := range e.Labels {
		if l < 0 || l >= classes {
			return fmt.Errorf("tiny: label %d of case %d; the classifier has %d classes", l, i, classes)
		}
	}
	return nil
}

// frozen computes what the operations in front of the program's cut give for every case, once for a network and a cut.
func (p *Program) frozen(ctx context.Context, base *Net, e *Examples) ([][]float32, error) {
	key := keptKey{base, p.ops[p.cut].name}
	size := 0
	for _, b := range p.live {
		key.cut += "\x00" + b.Name
		size += p.words[b]
	}
	if k, ok := e.kept[key]; ok {
		return k, nil
	}
	out := make([][]float32, len(e.X))
	for i, x := range e.X {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if err := p.net.quantizeInput(p.at(p.in), x); err != nil {
			return nil, fmt.Errorf("case %d: %w", i, err)
		}
		for _, o := range p.ops[:p.cut] {
			o.run()
		}
		row := make([]float32, 0, size)
		for _, b := range p.live {
			row = append(row, p.at(b)...)
		}
		out[i] = row
	}
	if e.kept == nil {
		e.kept = map[keptKey][][]float32{}
	}
	e.kept[key] = out
	return out, nil
}

// restore puts a case's kept values in place.
func (p *Program) restore(row []float32) {
	for _, b := range p.live {
		n := copy(p.at(b), row)
		row = row[n:]
	}
}

// Quality is how well a network does on examples.
type Quality struct {
	Accuracy float64 `json:"accuracy"` // share of cases whose largest logit is the label's
	Loss     float64 `json:"loss"`     // mean cross-entropy in nats
}

// evaluate judges the network as it has been trained so far. base is the network that the program was compiled from.
func (p *Program) evaluate(ctx context.Context, base *Net, e *Examples) (q Quality, err error) {
	if err := e.check(p.net.Head.Classes); err != nil {
		return q, err
	}
	rows, err := p.frozen(ctx, base, e)
	if err != nil {
		return q, err
	}
	for i, row := range rows {
		p.restore(row)
		p.infer(p.cut)
		best, top := 0, p.logits[0]
		for k, v := range p.logits {
			if v > top {
				best, top = k, v
			}
		}
		if best == e.Labels[i] {
			q.Accuracy++
		}
		sum := 0.
		for _, v := range p.logits {
			sum += math.Exp(float64(v - top))
		}
		q.Loss += math.Log(sum) + float64(top-p.logits[e.Labels[i]])
	}
	n := float64(len(rows))
	return Quality{q.Accuracy / n, q.Loss / n}, nil
}

// Evaluate judges a network on examples.
func Evaluate(ctx context.Context, net *Net, e *Examples) (Quality, error) {
	p, err := Compile(net, &Scheme{}, CompileOptions{Inference: true})
	if err != nil {
		return Quality{}, err
	}
	defer p.Close()
	return p.evaluate(ctx, net, e)
}

// TrainOptions say how a network is trained. The zero value is five epochs of SGD with gradients of eight cases, on a
// float32 copy of what is trained, with scaled gradients.
type TrainOptions struct {
	CompileOptions         // Accumulate 0: 8
	Epochs         int     // 0: 5
	LR             float64 // peak rate, which falls along a cosine; 0: 0.05
	Warmup         int     // updates over which the rate rises; 0: none
	Order          uint64  // seed of the order of the cases
	Progress       func(done, total int, loss float64)

	// Journal keeps where the training is: every SaveEvery, when ctx ends, and at the end. A training that was stopped goes on
	// from there and ends bit for bit as if nothing had happened. nil: nothing is kept.
	Journal   *compress.Journal
	SaveEvery time.Duration // 0: 20 s
}

// Trained is what training gives.
type Trained struct {
	Net        *Net
	Validation Quality   // of the trained network; zero without validation examples
	Losses     []float64 // mean loss of every epoch
	PeakBytes  int       // of the program
}

// ErrDiverged: the loss is no longer a number.
var ErrDiverged = errors.New("tiny: the loss is no longer finite; lower the learning rate")

// Train trains a network by a scheme. net is left alone. Validation examples may be nil. When ctx ends it returns ctx's
// error; with a journal at most the step under way is lost then, and what SaveEvery says when the process is killed.
func Train(ctx context.Context, net *Net, s Scheme, train, validation *Examples, o TrainOptions) (*Trained, error) {
	if o.Accumulate == 0 {
		o.Accumulate = 8
	}
	if o.Epochs == 0 {
		o.Epochs = 5
	}
	if o.LR == 0 {
		o.LR = .05
	}
	if o.SaveEvery == 0 {
		o.SaveEvery = 20 * time.Second
	}
	if o.Epochs < 0 || !(o.LR > 0) || math.IsInf(o.LR, 0) {
		return nil, fmt.Errorf("tiny: %d epochs at rate %g; want positive numbers", o.Epochs, o.LR)
	}
	if err := train.check(net.Head.Classes); err != nil {
		return nil, err
	}
	p, err := Compile(net, &s, o.CompileOptions)
	if err != nil {
		return nil, err
	}
	defer p.Close()
	t := &training{Program: p, o: o, base: net, train: train}
	t.key = fmt.Sprintf("tiny/%+v/%+v/%d/%g/%d/%d/%d", s, o.CompileOptions, o.Epochs, o.LR, o.Warmup, o.Order, train.Len())
	if t.n = train.Len() / o.Accumulate * o.Accumulate; t.n == 0 {
		t.n = train.Len()
	}
	if err := t.resume(); err != nil {
		return nil, err
	}
	if err := t.run(ctx); err != nil {
		return nil, err
	}
	if validation != nil && t.Validation == nil {
		v, err := p.evaluate(ctx, net, validation)
		if err != nil {
			return nil, err
		}
		t.Validation = &v
		if err := t.save(); err != nil {
			return nil, err
		}
	}
	r := &Trained{Net: p.Trained(), Losses: t.Losses, PeakBytes: p.PeakBytes()}
	if validation != nil {
		r.Validation = *t.Validation
	}
	return r, nil
}

// training is a Train under way.
type training struct {
	*Program
	o     TrainOptions
	base  *Net
	train *Examples
	n     int    // cases of an epoch
	key   string // in the journal
	checkpoint
}

// checkpoint is what the next step of a training depends on, and what came of the ones before.
type checkpoint struct {
	Seen       int         // cases
	Loss       float64     // sum over the epoch under way
	Losses     []float64   // of the epochs before
	Kept       [][]float32 // what the buffers hold that live through all steps
	Random     []byte      // state of the random rounding
	Validation *Quality    // of the trained network
}

// run does the steps that are left.
func (t *training) run(ctx context.Context) error {
	total := t.o.Epochs * t.n
	if t.Seen == total {
		return nil
	}
	rows, err := t.frozen(ctx, t.base, t.train)
	if err != nil {
		return err
	}
	schedule := optim.Cosine(max(1, total/t.o.Accumulate), t.o.Warmup, 0)
	saved := time.Now()
	for t.Seen < total {
		epoch := t.Seen / t.n
		for _, i := range rng.New(t.o.Order, fmt.Sprintf("tiny:order:%d", epoch)).Perm(len(rows))[t.Seen%t.n : t.n] {
			if err := ctx.Err(); err != nil {
				if serr := t.save(); serr != nil {
					return fmt.Errorf("%w (and the checkpoint failed: %w)", err, serr)
				}
				return err
			}
			t.restore(rows[i])
			loss := t.step(t.cut, t.train.Labels[i], t.o.LR*schedule(t.Seen/t.o.Accumulate))
			if math.IsNaN(loss) || math.IsInf(loss, 0) {
				return fmt.Errorf("epoch %d: %w", epoch+1, ErrDiverged)
			}
			t.Loss += loss
			if t.Seen++; t.Seen%t.n == 0 {
				t.Losses, t.Loss = append(t.Losses, t.Loss/float64(t.n)), 0
			}
			if t.o.Progress != nil && t.Seen%64 == 0 {
				t.o.Progress(t.Seen, total, loss)
			}
			if time.Since(saved) >= t.o.SaveEvery {
				if err := t.save(); err != nil {
					return err
				}
				saved = time.Now()
			}
		}
	}
	return t.save()
}

// save keeps where the training is.
func (t *training) save() (err error) {
	if t.o.Journal == nil {
		return nil
	}
	t.Kept = nil
	for _, b := range t.lasting() {
		t.Kept = append(t.Kept, t.at(b)) // encoded before the next step
	}
	if t.Random, err = t.source.MarshalBinary(); err != nil {
		return fmt.Errorf("tiny: checkpoint: %w", err)
	}
	return t.o.Journal.Store(t.key, &t.checkpoint)
}

// resume goes on from what the journal keeps of this training, if it does.
func (t *training) resume() error {
	var c checkpoint
	found, err := t.o.Journal.Load(t.key, &c)
	if err != nil || !found {
		return err
	}
	buffers := t.lasting()
	fits := len(c.Kept) == len(buffers) && c.Seen >= 0 && c.Seen <= t.o.Epochs*t.n && len(c.Losses) == c.Seen/t.n
	for i := 0; fits && i < len(buffers); i++ {
		fits = len(c.Kept[i]) == t.words[buffers[i]]
	}
	if !fits {
		return errors.New("tiny: the journal keeps a checkpoint of another network; remove the journal")
	}
	if err := t.source.UnmarshalBinary(c.Random); err != nil {
		return fmt.Errorf("tiny: checkpoint: %w", err)
	}
	for i, b := range buffers {
		copy(t.at(b), c.Kept[i])
	}
	for _, c := range t.convs {
		c.recode()
	}
	t.checkpoint, t.count = c, c.Seen
	return nil
}

// Package normtable answers "which norm for my network": it trains the same network under one norm and placement after the
// other, on the same data, batches and seeds, and measures what each does to the loss, the gradients and the speed.
package normtable

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"math"
	"os"
	"slices"
	"strings"

	"github.com/gomlx/compute"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/design/norm"
	"github.com/lathe-ml/lathe/internal/atomicfile"
	"github.com/lathe-ml/lathe/internal/stat"
	"github.com/lathe-ml/lathe/internal/timing"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/learn/optim"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/fold"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// Candidate is a norm, and where it stands.
type Candidate struct {
	Norm   string `json:"norm"`   // of norm.Names
	Scheme string `json:"scheme"` // of norm.NewScheme; "" where the network has no choice
}

// String is the norm, and "@scheme" if that is not pre.
func (c Candidate) String() string {
	if c.Scheme == "" || c.Scheme == "pre" {
		return c.Norm
	}
	return c.Norm + "@" + c.Scheme
}

// ParseCandidates reads "layer,batch@post": norms by name, each with a scheme behind @ where the network takes one.
func ParseCandidates(s string, schemes bool) ([]Candidate, error) {
	var out []Candidate
	for part := range strings.SplitSeq(s, ",") {
		name, scheme, at := strings.Cut(strings.TrimSpace(part), "@")
		c := Candidate{Norm: name}
		if !slices.Contains(norm.Names(), name) {
			return nil, fmt.Errorf("there is no norm %q; use some of %s", name, strings.Join(norm.Names(), ", "))
		}
		if at && !schemes {
			return nil, fmt.Errorf("%q: the norms of this architecture have fixed places", part)
		}
		if schemes {
			c.Scheme = "pre"
			if at {
				c.Scheme = scheme
			}
			if _, err := norm.NewScheme(c.Scheme); err != nil {
				return nil, err
			}
		}
		if slices.Contains(out, c) {
			return nil, fmt.Errorf("%s stands twice", c)
		}
		out = append(out, c)
	}
	return out, nil
}

// Setup is a network and its data.
type Setup struct {
	Title    string // "vit on fashion-mnist"
	Build    func(n nn.Norm, s zoo.Scheme, seed uint64) (*nn.Network, error)
	Loss     func(net *nn.Network) learn.LossFunc
	Batch    func(seed uint64, step int) ([]*tensors.Tensor, error) // of a step, the same for all candidates
	Test     func() iter.Seq2[float64, []*tensors.Tensor]           // weight and batch
	Accuracy bool                                                   // the loss reports "accuracy"

	Steps    int
	LR       float64 // peak; a tenth of the steps warm up, then it falls along a cosine to a tenth
	Decay    float64
	ClipNorm float64
	Seeds    []uint64
	Rounds   int // of the timing; 0: 15
}

// Row is what one candidate did. Figures over seeds are means; Low and High bound the mean's 95 % interval (equal to it
// with one seed).
type Row struct {
	Candidate
	Error    string  `json:"error,omitempty"` // why it does not fit the network, or that its training diverged
	Loss     float64 `json:"loss"`            // on the test part, at the end
	LossLow  float64 `json:"loss_low"`
	LossHigh float64 `json:"loss_high"`
	Accuracy float64 `json:"accuracy,omitempty"` // percent
	AccLow   float64 `json:"accuracy_low,omitempty"`
	AccHigh  float64 `json:"accuracy_high,omitempty"`
	// Gradients are the L2 norms over each layer's parameters, averaged over the last tenth of the steps; Evenness is the
	// largest over the smallest.
	Gradients []float64 `json:"gradient_norm_by_layer,omitempty"`
	Evenness  float64   `json:"gradient_ratio,omitempty"`
	// Times in milliseconds, medians of interleaved runs: a training step, inference of one test batch as it is, and with
	// the norms folded into the weights where they can be.
	Step      float64 `json:"step_ms"`
	Inference float64 `json:"inference_ms"`
	Fused     float64 `json:"fused_ms"`
	Folded    int     `json:"norms_folded"` // norms that the folding removed
	FoldError float64 `json:"fold_error"`   // largest difference of the folded network's outputs, of the largest output
}

// Table is the result.
type Table struct {
	Title   string   `json:"title"`
	Steps   int      `json:"steps"`
	Seeds   []uint64 `json:"seeds"`
	Backend string   `json:"backend"`
	CPU     string   `json:"cpu"`
	Rows    []Row    `json:"rows"`
}

// unit is one training that is done, kept between runs.
type unit struct {
	Loss      float64   `json:"loss"`
	Accuracy  float64   `json:"accuracy"`
	Gradients []float64 `json:"gradients"`
	Folded    int       `json:"folded"`
	FoldError float64   `json:"fold_error"`
	Diverged  bool      `json:"diverged,omitempty"`
}

// Options of a run.
type Options struct {
	State    string // file that keeps finished trainings, so that a stopped run goes on; "": none
	Recipe   string // what a kept training depends on beside candidate and seed
	Progress func(label string, done, total int)
}

// Run trains and measures every candidate.
func Run(ctx context.Context, b compute.Backend, s Setup, candidates []Candidate, o Options) (*Table, error) {
	if len(candidates) == 0 || len(s.Seeds) == 0 || s.Steps < 1 {
		return nil, fmt.Errorf("normtable: %d candidates, %d seeds, %d steps; want at least one of each", len(candidates), len(s.Seeds), s.Steps)
	}
	kept, err := load(o)
	if err != nil {
		return nil, err
	}
	total := len(candidates) * len(s.Seeds)
	t := &Table{Title: s.Title, Steps: s.Steps, Seeds: s.Seeds}
	for i, c := range candidates {
		row := Row{Candidate: c}
		var loss, accuracy []float64
		for j, seed := range s.Seeds {
			net, err := s.network(c, seed) // also where a training was kept: what does not fit has no figure
			if err != nil {
				row.Error = err.Error()
				break
			}
			key := fmt.Sprintf("%s seed %d", c, seed)
			u, ok := kept[key]
			if !ok {
				report := func(step int) {
					if o.Progress != nil {
						o.Progress(key, (i*len(s.Seeds)+j)*s.Steps+step, total*s.Steps)
					}
				}
				if u, err = s.train(ctx, b, net, seed, report); err != nil {
					if ctx.Err() != nil {
						return nil, err
					}
					row.Error = err.Error()
					break
				}
				kept[key] = u
				if err := save(o, kept); err != nil {
					return nil, err
				}
			}
			if u.Diverged {
				row.Error = "the training diverged"
				break
			}
			loss, accuracy = append(loss, u.Loss), append(accuracy, u.Accuracy)
			row.Folded, row.FoldError = u.Folded, max(row.FoldError, u.FoldError)
			if row.Gradients == nil {
				row.Gradients = make([]float64, len(u.Gradients))
			}
			for l, g := range u.Gradients {
				row.Gradients[l] += g / float64(len(s.Seeds))
			}
		}
		if row.Error == "" {
			row.Loss, row.LossLow, row.LossHigh = interval(loss)
			if s.Accuracy {
				row.Accuracy, row.AccLow, row.AccHigh = interval(accuracy)
			}
			if len(row.Gradients) > 0 {
				row.Evenness = slices.Max(row.Gradients) / slices.Min(row.Gradients)
			}
		}
		t.Rows = append(t.Rows, row)
	}
	if err := s.time(ctx, b, t.Rows); err != nil {
		return nil, err
	}
	return t, nil
}

func interval(v []float64) (mean, lo, hi float64) {
	if len(v) < 2 {
		return v[0], v[0], v[0]
	}
	return stat.MeanCI(v, .95)
}

func (s Setup) network(c Candidate, seed uint64) (*nn.Network, error) {
	n, err := norm.New(c.Norm, norm.Config{Steps: s.Steps})
	if err != nil {
		return nil, err
	}
	var scheme zoo.Scheme
	if c.Scheme != "" {
		if scheme, err = norm.NewScheme(c.Scheme); err != nil {
			return nil, err
		}
	}
	return s.Build(n, scheme, seed)
}

func (s Setup) trainer(b compute.Backend, net *nn.Network, seed uint64, probe learn.Probe) (*learn.Trainer, error) {
	return learn.NewTrainer(b, &net.Params, s.Loss(net), learn.Options{
		Optimizer: optim.AdamW{Decay: s.Decay}, LR: s.LR, Schedule: optim.Cosine(s.Steps, s.Steps/10, .1), ClipNorm: s.ClipNorm, Seed: seed, Probe: probe,
	})
}

// train trains and evaluates one network.
func (s Setup) train(ctx context.Context, b compute.Backend, net *nn.Network, seed uint64, report func(step int)) (u unit, err error) {
	var probe learn.Probe
	layers := 0
	if st, err := norm.StackOf(net); err == nil {
		layers = st.Layers()
		probe = learn.GradientNorms{Group: norm.LayerGroup}
	}
	t, err := s.trainer(b, net, seed, probe)
	if err != nil {
		return u, err
	}
	defer t.Finalize()
	u.Gradients = make([]float64, layers)
	last := max(1, s.Steps/10)
	_, err = t.Fit(ctx, learn.FitOptions{
		Steps: s.Steps,
		Batch: func(step int) ([]*tensors.Tensor, error) { return s.Batch(seed, step) },
		After: []learn.Hook{func(_ *learn.Trainer, i learn.Info) error {
			if report(i.Step); i.Step <= s.Steps-last || layers == 0 {
				return nil
			}
			for l := range u.Gradients {
				u.Gradients[l] += nn.Float64s(i.Probed[0][fmt.Sprint(l+1)])[0] / float64(last)
			}
			return nil
		}},
	})
	if errors.Is(err, learn.ErrDiverged) {
		u.Diverged = true
		return u, nil
	}
	if err != nil {
		return u, err
	}
	loss, metrics, err := learn.Evaluate(b, &net.Params, s.Loss(net), s.Test())
	if err != nil {
		return u, err
	}
	if math.IsNaN(loss) || math.IsInf(loss, 0) {
		u.Diverged = true
		return u, nil
	}
	u.Loss, u.Accuracy = loss, 100*metrics["accuracy"]
	folded, n, err := folded(net)
	if err != nil {
		return u, err
	}
	u.Folded = n
	if n > 0 {
		u.FoldError, err = s.difference(b, net, folded)
	}
	return u, err
}

// folded returns a copy of the network without the norms that can be merged, and how many those are.
func folded(net *nn.Network) (*nn.Network, int, error) {
	c := net.Clone()
	r, err := fold.Norms(c)
	if errors.Is(err, nn.ErrNotAffine) {
		return net, 0, nil
	}
	return c, len(r.Folded) + len(r.Explicit), err
}

// difference is the largest difference of two networks' outputs on the first test batch, of the largest output.
func (s Setup) difference(b compute.Backend, a, c *nn.Network) (float64, error) {
	e, err := fold.VerifyEquivalence(b, a, c, func(yield func([]*tensors.Tensor, error) bool) {
		for _, batch := range s.Test() {
			yield(batch[:1], nil)
			return
		}
	})
	return e.MaxDiff / max(e.Largest, math.SmallestNonzeroFloat32), err
}

// time measures all rows together, one round after the other, so that what disturbs the machine disturbs all alike.
func (s Setup) time(ctx context.Context, b compute.Backend, rows []Row) error {
	batch, err := s.Batch(s.Seeds[0], 0)
	if err != nil {
		return err
	}
	var to []*float64 // where the median of each pass goes
	var passes []func() error
	for i := range rows {
		row := &rows[i]
		if row.Error != "" {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		net, err := s.network(row.Candidate, s.Seeds[0])
		if err != nil {
			return err
		}
		trainer, err := s.trainer(b, net, 0, nil)
		if err != nil {
			return err
		}
		defer trainer.Finalize()
		step := func() error { _, err := trainer.Step(batch...); return err }
		if err := step(); err != nil { // a norm that was never trained does not fold
			return err
		}
		// After one step a norm that fades from one into another is still at its beginning; what is timed is its end.
		done := net.Clone()
		if _, err := norm.Reparameterize(done, true); err != nil {
			return err
		}
		flat, _, err := folded(done)
		if err != nil {
			return err
		}
		to, passes = append(to, &row.Step), append(passes, step)
		for _, f := range []struct {
			to  *float64
			net *nn.Network
		}{{&row.Inference, net.Clone()}, {&row.Fused, flat}} {
			r, err := nn.NewRunner(b, f.net, nn.RunOptions{})
			if err != nil {
				return err
			}
			defer r.Finalize()
			to, passes = append(to, f.to), append(passes, func() error { _, err := r.Run(batch[0]); return err })
		}
	}
	times, err := timing.Interleaved(ctx, cmp.Or(s.Rounds, 15), nil, passes...)
	for i, t := range times {
		*to[i] = 1e3 * t.Median()
	}
	return err
}

// state is the file of finished trainings.
type state struct {
	Recipe string          `json:"recipe"`
	Units  map[string]unit `json:"units"`
}

func load(o Options) (map[string]unit, error) {
	units := map[string]unit{}
	if o.State == "" {
		return units, nil
	}
	raw, err := os.ReadFile(o.State)
	if errors.Is(err, fs.ErrNotExist) {
		return units, nil
	}
	if err != nil {
		return nil, err
	}
	var s state
	if err := json.Unmarshal(raw, &s); err != nil {
		return nil, fmt.Errorf("%s: %w; delete it to start over", o.State, err)
	}
	if s.Recipe != o.Recipe || s.Units == nil {
		return units, nil // of another question
	}
	return s.Units, nil
}

func save(o Options, units map[string]unit) error {
	if o.State == "" {
		return nil
	}
	return atomicfile.Write(o.State, func(w io.Writer) error {
		return json.NewEncoder(w).Encode(state{o.Recipe, units})
	})
}

package compress

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/gomlx/compute"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/internal/metric"
	"github.com/lathe-ml/lathe/nn"
)

// Form is one way in which a site may be stored, such as 4-bit weights, or 4-bit weights that read an 8-bit activation.
type Form struct {
	Name string // "w4", "w4a8": names the effect in reports and in the journal
	// Put brings one site of net into the form: it substitutes the weight, changes parameters, inserts quantisers. What it
	// replaces it replaces by new tensors, as SetParam, SetData and Substitute do; net is thrown away afterwards.
	Put func(ctx context.Context, net *nn.Network, site *nn.Node) error
}

// WeightForms are the forms that differ in the bits of the weight alone, one for each choice, named "w4" and so on: put
// brings a site of net to so many bits, as Form.Put does.
func WeightForms(choices []int, put func(net *nn.Network, site *nn.Node, bits int) error) []Form {
	forms := make([]Form, len(choices))
	for i, bits := range choices {
		forms[i] = Form{Name: fmt.Sprintf("w%d", bits), Put: func(_ context.Context, net *nn.Network, site *nn.Node) error {
			return put(net, site, bits)
		}}
	}
	return forms
}

// ErrForm: a site cannot take a form. An error of Form.Put that wraps it leaves that effect out instead of ending the
// measurement.
var ErrForm = errors.New("the site cannot take this form")

// Effect is what the network's output loses when one site alone takes a form.
type Effect struct {
	Form      string  `json:"form"`
	Bytes     int64   `json:"bytes"` // of the site's weight as stored in that form
	Agreement         // with the target outputs
	Loss      float64 `json:"loss,omitempty"`     // mean cross entropy in nats, when labels are given
	Accuracy  float64 `json:"accuracy,omitempty"` // in [0,1], when labels are given
	Refused   string  `json:"refused,omitempty"`  // why the site cannot take the form; the figures are 0 then
}

// SiteEffects are the effects of all forms on one site, in the order of the forms.
type SiteEffects struct {
	Site    string   `json:"site"`
	Weights int      `json:"weights"` // how many the site has
	Bytes   int64    `json:"bytes"`   // of the weight as it is stored in the given network
	Effects []Effect `json:"effects"`
}

// Sensitivity measures, for each site and each form, what the output loses when this site alone takes the form and
// all others stay as they are in the given network, the base: the float network, or one that is quantised already.
// Mixed-precision allocation, budget searches and blame reports stand on it.
//
// The network is never changed: forms are put into copies that share its tensors. Costs: the network is divided at Cuts
// sites into parts of about equal work; the values at a cut are kept, and a site is judged from the cut before it on.
// One executable per cut serves all sites behind it and all forms that differ in weights or other parameters only
// (stored forms are decoded first); a form that inserts nodes costs one more compilation per site and structure. So L
// sites and F forms take about L·F·(1/2 + 1/(2·Cuts)) passes. Where a form changes something in front of the cut, as
// moving scales between a norm and its readers does, the pass begins at the input.
type Sensitivity struct {
	Forms  []Form
	Select func(site *nn.Node) bool // which sites are measured; nil: all
	Batch  int                      // cases per pass; 0: DefaultBatch, or all when there are fewer
	Cuts   int                      // 0: 8
	// MaxBytes limits what is kept at a cut; 0: 1 GiB. A cut that would take more is left out.
	MaxBytes int64
	// Target are the outputs to compare with, row-major; nil: those of the given network, so that a form that changes
	// nothing has exactly no effect.
	Target []float32
	Labels []int // of the cases; nil: no loss and accuracy
	// Journal keeps finished sites under Key, which names what the forms depend on beside their names. nil: nothing is kept.
	Journal  *Journal
	Key      string
	Progress func(Step)
}

// DefaultCuts is the number of places from which Sensitivity runs the network when the caller does not say.
const DefaultCuts = 8

// Measure returns the effects by site, in execution order. Its errors name the site and the form.
func (s Sensitivity) Measure(ctx context.Context, b compute.Backend, net *nn.Network, x Examples) ([]SiteEffects, error) {
	if err := x.Check(net); err != nil {
		return nil, err
	}
	names := map[string]bool{}
	for i, f := range s.Forms {
		if f.Put == nil || f.Name == "" || names[f.Name] {
			return nil, fmt.Errorf("compress: sensitivity: form %d, %q, needs a function and a name of its own", i, f.Name)
		}
		names[f.Name] = true
	}
	switch {
	case len(s.Forms) == 0:
		return nil, errors.New("compress: sensitivity: there are no forms to measure")
	case s.Labels != nil && len(s.Labels) != x.Len():
		return nil, fmt.Errorf("compress: sensitivity: %d labels for %d cases", len(s.Labels), x.Len())
	}
	if s.Batch <= 0 {
		s.Batch = min(x.Len(), DefaultBatch)
	}
	if s.Cuts <= 0 {
		s.Cuts = DefaultCuts
	}
	if s.MaxBytes <= 0 {
		s.MaxBytes = 1 << 30
	}
	var sites []*nn.Node
	for _, n := range net.Sites() {
		if s.Select == nil || s.Select(n) {
			sites = append(sites, n)
		}
	}
	if len(sites) == 0 {
		return nil, errors.New("compress: sensitivity: no site is selected")
	}
	p := &probe{Sensitivity: s, b: b, net: net, x: x}
	var err error
	if p.base, err = p.decoded(shallow(net)); err != nil {
		return nil, err
	}
	if p.cuts, err = p.placeCuts(sites); err != nil {
		return nil, err
	}
	defer p.forget()
	out := make([]SiteEffects, len(sites))
	for i, site := range sites {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		restored, err := s.Journal.Do(p.key(site), &out[i], func() (err error) {
			out[i], err = p.measure(ctx, site)
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("compress: sensitivity of %q: %w", site.Name, err)
		}
		if s.Progress != nil {
			s.Progress(Step{Site: site.Name, Done: i + 1, Total: len(sites), Bytes: out[i].Bytes, Err: out[i].worst(), Restored: restored})
		}
	}
	return out, nil
}

// worst is the greatest mean squared change of the output among the forms.
func (s SiteEffects) worst() (w float64) {
	for _, e := range s.Effects {
		w = max(w, e.MSE)
	}
	return w
}

// probe is a running measurement.
type probe struct {
	Sensitivity
	b    compute.Backend
	net  *nn.Network // as given
	base *nn.Network // the same with all weights decoded to plain ones
	x    Examples

	cuts     []int               // positions in base.Nodes from which the network is run, rising, the first 0
	at       int                 // the cut whose values are kept
	live     []string            // the values at that cut
	kept     [][]*tensors.Tensor // by batch, in the order of live; nil: not computed
	programs map[string]*program // by structure, of the current cut
	want     []float32           // outputs from the current cut on
	width    int                 // of a row of the output
}

// program is a compiled rest of the network, whose parameters are replaced at every run.
type program struct {
	net    *nn.Network
	runner *nn.Runner
}

func (p *probe) key(site *nn.Node) string {
	var forms []string
	for _, f := range p.Forms {
		forms = append(forms, f.Name)
	}
	return fmt.Sprintf("sensitivity:%s:%s:%s", p.Key, strings.Join(forms, ","), site.Name)
}

// placeCuts chooses sites so that about the same work lies between two of them. It finds the width, too.
func (p *probe) placeCuts(sites []*nn.Node) ([]int, error) {
	cost, err := p.net.Cost(p.Batch)
	if err != nil {
		return nil, err
	}
	sh, err := p.net.Shapes(p.Batch)
	if err != nil {
		return nil, err
	}
	p.width = RowWidth(sh[p.net.Outputs[0]].Dimensions)
	batches := int64((p.x.Len() + p.Batch - 1) / p.Batch)
	wanted := map[string]bool{}
	for _, n := range sites {
		wanted[n.Name] = true
	}
	cuts, since := []int{0}, int64(0)
	for i, n := range p.base.Nodes {
		if i > 0 && wanted[n.Name] && since*int64(p.Cuts) >= cost.MACs && len(cuts) < p.Cuts {
			var bytes int64
			for _, v := range liveAt(p.base, i) {
				bytes += sh[v].ByteSize() * batches
			}
			if bytes <= p.MaxBytes {
				cuts, since = append(cuts, i), 0
			}
		}
		since += cost.ByNode[n.Name]
	}
	return cuts, nil
}

// measure judges one site. Sites come in execution order.
func (p *probe) measure(ctx context.Context, site *nn.Node) (SiteEffects, error) {
	out := SiteEffects{Site: site.Name, Bytes: WeightBytes(p.net, site)}
	here := p.base.Node(site.Name)
	if w := p.base.Param(here, "w"); w != nil {
		out.Weights = w.Value.Shape().Size()
	}
	if err := p.advance(ctx, slices.Index(p.base.Nodes, here)); err != nil {
		return out, err
	}
	for _, f := range p.Forms {
		e, err := p.effect(ctx, site.Name, f)
		if err != nil {
			return out, fmt.Errorf("form %s: %w", f.Name, err)
		}
		out.Effects = append(out.Effects, e)
	}
	return out, nil
}

// effect puts the site into the form and compares the outputs.
func (p *probe) effect(ctx context.Context, site string, f Form) (Effect, error) {
	e := Effect{Form: f.Name}
	changed := shallow(p.net)
	if err := f.Put(ctx, changed, changed.Node(site)); errors.Is(err, ErrForm) {
		e.Refused = err.Error()
		return e, nil
	} else if err != nil {
		return e, err
	}
	node := changed.Node(site)
	if node == nil {
		return e, errors.New("the site is gone")
	}
	e.Bytes = WeightBytes(changed, node)
	changed, err := p.decoded(changed)
	if err != nil {
		return e, err
	}
	got, err := p.outputs(ctx, changed)
	if err != nil {
		return e, err
	}
	width := p.width
	want := p.Target
	if want == nil {
		want = p.want
	}
	if e.Agreement, err = Compare(want, got, p.x.Len(), width); err != nil || p.Labels == nil {
		return e, err
	}
	if e.Accuracy, err = Accuracy(got, width, p.Labels); err != nil {
		return e, err
	}
	if Probabilities(want, width) {
		got = logs(got)
	}
	scored, err := metric.ScoreLogits(got, width, p.Labels, 1)
	if err != nil {
		return e, err
	}
	for _, l := range scored.LogLoss {
		e.Loss += l / float64(scored.Len())
	}
	return e, nil
}

// advance moves to the last cut at or before position node and computes the outputs of the base from there.
func (p *probe) advance(ctx context.Context, node int) error {
	to := p.at
	for to+1 < len(p.cuts) && p.cuts[to+1] <= node {
		to++
	}
	if p.kept != nil && to == p.at {
		return nil
	}
	if p.kept == nil {
		p.live = liveAt(p.base, 0)
		for from := 0; from < p.x.Len(); from += p.Batch {
			in, err := p.x.Slice(from, min(from+p.Batch, p.x.Len()), p.Batch)
			if err != nil {
				return err
			}
			p.kept = append(p.kept, p.inputs(in))
		}
	}
	p.forget()
	if to > p.at {
		next := liveAt(p.base, p.cuts[to])
		part := rest(p.base, p.cuts[p.at], p.cuts[to], p.live, p.kept[0], next)
		r, err := nn.NewRunner(p.b, part, nn.RunOptions{})
		if err != nil {
			return err
		}
		defer r.Finalize()
		for i := range p.kept {
			if err := ctx.Err(); err != nil {
				return err
			}
			if p.kept[i], err = r.Run(p.kept[i]...); err != nil {
				return err
			}
		}
		p.at, p.live = to, next
	}
	var err error
	p.want, err = p.outputs(ctx, p.base)
	return err
}

// inputs picks the tensors of the inputs that something reads.
func (p *probe) inputs(x Examples) []*tensors.Tensor {
	var out []*tensors.Tensor
	for i, in := range p.net.Inputs {
		if slices.Contains(p.live, in.Name) {
			out = append(out, x[i])
		}
	}
	return out
}

// outputs runs a changed copy of the base: from the current cut on if all before it is as in the base, else from the
// inputs on.
func (p *probe) outputs(ctx context.Context, changed *nn.Network) (values []float32, err error) {
	cut := p.cuts[p.at]
	if !sameUpTo(p.base, changed, cut) {
		values, _, err = Evaluate(ctx, p.b, changed, p.x, p.Batch)
		return values, err
	}
	tail := rest(changed, cut, len(changed.Nodes), p.live, p.kept[0], changed.Outputs[:1])
	prog, err := p.program(tail)
	if err != nil {
		return nil, err
	}
	for i, in := range p.kept {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		out, err := prog.runner.Run(in...)
		if err != nil {
			return nil, err
		}
		v, _, err := rows(out[0], min(p.Batch, p.x.Len()-i*p.Batch))
		if err != nil {
			return nil, err
		}
		values = append(values, v...)
	}
	return values, nil
}

// maxPrograms is how many compiled structures a cut keeps.
const maxPrograms = 8

// program returns the executable of a network's structure, with the network's parameters in it.
func (p *probe) program(net *nn.Network) (*program, error) {
	key := structure(net)
	if prog := p.programs[key]; prog != nil {
		for i, n := range net.Nodes {
			for local := range n.P {
				prog.net.Params.Put(&nn.Param{Name: prog.net.Nodes[i].P[local], Value: net.Param(n, local).Value})
			}
		}
		return prog, nil
	}
	if len(p.programs) >= maxPrograms {
		p.forget()
	}
	r, err := nn.NewRunner(p.b, net, nn.RunOptions{})
	if err != nil {
		return nil, err
	}
	if p.programs == nil {
		p.programs = map[string]*program{}
	}
	p.programs[key] = &program{net, r}
	return p.programs[key], nil
}

// forget frees the compiled structures.
func (p *probe) forget() {
	for _, prog := range p.programs {
		prog.runner.Finalize()
	}
	p.programs = nil
}

// decoded gives every site whose stored form can be written out a plain weight of the same value. It changes net.
func (p *probe) decoded(net *nn.Network) (*nn.Network, error) {
	for _, n := range net.Sites() {
		lin := n.Op.(nn.Linear)
		if _, ok := lin.Repr().(nn.Applier); ok || nn.IsPlain(n.Op) {
			continue
		}
		w, err := EffectiveWeight(p.b, net, n)
		if err != nil {
			return nil, err
		}
		for _, spec := range lin.Repr().Specs(w.Shape()) {
			delete(n.P, spec.Name)
		}
		n.Op = lin.WithRepr(nn.Plain{})
		n.P["w"] = n.Name + ":decoded"
		net.Params.Put(&nn.Param{Name: n.P["w"], Role: nn.Weight, Value: w})
	}
	return net, nil
}

// EffectiveWeight is the weight that a site multiplies by, whatever form it is stored in: [out, in] or [out, k...,
// in/groups]. A plain weight is returned itself, not a copy.
func EffectiveWeight(b compute.Backend, net *nn.Network, site *nn.Node) (*tensors.Tensor, error) {
	lin, ok := site.Op.(nn.Linear)
	if !ok {
		return nil, fmt.Errorf("compress: node %q (%s) has no weight", site.Name, site.Op.Kind())
	}
	if p := net.Param(site, "w"); p != nil && nn.IsPlain(site.Op) {
		return p.Value, nil
	}
	locals := slices.Sorted(maps.Keys(site.P))
	var args []any
	for _, l := range locals {
		p := net.Param(site, l)
		if p == nil {
			return nil, fmt.Errorf("compress: node %q (%s): its parameter %s = %q is missing", site.Name, site.Op.Kind(), l, site.P[l])
		}
		args = append(args, p.Value)
	}
	if len(args) == 0 {
		return nil, fmt.Errorf("compress: node %q (%s) has no parameters", site.Name, site.Op.Kind())
	}
	exec, err := engine.NewExec(b, func(in []*graph.Node) []*graph.Node {
		env := &nn.Env{G: in[0].Graph(), Param: func(name string) *graph.Node {
			for i, l := range locals {
				if site.P[l] == name {
					return in[i]
				}
			}
			panic(fmt.Errorf("parameter %q is missing", name))
		}}
		return []*graph.Node{lin.Repr().Value(&nn.Ctx{Env: env, Node: site})}
	})
	if err != nil {
		return nil, err
	}
	defer exec.Finalize()
	out, err := exec.Call(args...)
	if err != nil {
		return nil, fmt.Errorf("compress: weight of %q (%s): %w", site.Name, lin.Repr().Kind(), err)
	}
	return out[0], nil
}

// shallow copies a network's structure and shares its tensors.
func shallow(net *nn.Network) *nn.Network {
	c := &nn.Network{Inputs: slices.Clone(net.Inputs), Outputs: slices.Clone(net.Outputs), Meta: net.Meta}
	for _, n := range net.Nodes {
		m := *n
		m.In, m.Out, m.P = slices.Clone(n.In), slices.Clone(n.Out), maps.Clone(n.P)
		if m.P == nil {
			m.P = map[string]string{}
		}
		c.Nodes = append(c.Nodes, &m)
	}
	for p := range net.Params.All() {
		q := *p
		c.Params.Put(&q)
	}
	return c
}

// liveAt lists the values that are there before node i runs and that it, a later node or the caller still reads.
func liveAt(net *nn.Network, i int) []string {
	read := map[string]bool{net.Outputs[0]: true}
	for _, n := range net.Nodes[i:] {
		for _, v := range n.In {
			read[v] = true
		}
	}
	var out []string
	for _, in := range net.Inputs {
		if read[in.Name] {
			out = append(out, in.Name)
		}
	}
	for _, n := range net.Nodes[:i] {
		for _, v := range n.Out {
			if read[v] {
				out = append(out, v)
			}
		}
	}
	return out
}

// rest is the network of nodes from (inclusive) to (exclusive), which reads the live values, less what its outputs do
// not need. A live value may itself be an output.
func rest(net *nn.Network, from, to int, live []string, like []*tensors.Tensor, outputs []string) *nn.Network {
	part := &nn.Network{Outputs: slices.Clone(outputs)}
	for i, v := range live {
		part.Inputs = append(part.Inputs, nn.Input{Name: v, Shape: like[i].Shape()})
	}
	for _, n := range net.Nodes[from:to] {
		part.Nodes = append(part.Nodes, n)
		for _, local := range slices.Sorted(maps.Keys(n.P)) {
			if q := net.Params.Get(n.P[local]); q != nil {
				part.Params.Put(q)
			}
		}
	}
	part.Prune()
	return part
}

// sameUpTo says whether the first count nodes of both networks are the same, parameters included.
func sameUpTo(a, b *nn.Network, count int) bool {
	if len(b.Nodes) < count {
		return false
	}
	for i := range count {
		m, n := a.Nodes[i], b.Nodes[i]
		if nodeKey(m) != nodeKey(n) || len(m.P) != len(n.P) {
			return false
		}
		for local := range m.P {
			p, q := a.Param(m, local), b.Param(n, local)
			if p == nil || q == nil || p.Value != q.Value && !sameTensor(p.Value, q.Value) {
				return false
			}
		}
	}
	return true
}

func sameTensor(a, b *tensors.Tensor) bool {
	if !a.Shape().Equal(b.Shape()) {
		return false
	}
	same := false
	if err := a.ConstBytes(func(x []byte) {
		if err := b.ConstBytes(func(y []byte) { same = slices.Equal(x, y) }); err != nil {
			same = false
		}
	}); err != nil {
		return false
	}
	return same
}

// nodeKey is what a node computes, its parameters' values aside.
func nodeKey(n *nn.Node) string {
	op := n.Op
	if nn.IsPlain(op) {
		op = op.(nn.Linear).WithRepr(nn.Plain{}) // how it was initialised does not matter
	}
	return fmt.Sprintf("%s %T%+v %q %q", n.Name, op, op, n.In, n.Out)
}

// structure is the same for two networks that one executable serves.
func structure(net *nn.Network) string {
	var s strings.Builder
	fmt.Fprintf(&s, "%q\n", net.Outputs)
	number := map[string]int{} // parameters by first use: names do not matter, sharing does
	for _, n := range net.Nodes {
		s.WriteString(nodeKey(n))
		for _, local := range slices.Sorted(maps.Keys(n.P)) {
			full := n.P[local]
			if _, ok := number[full]; !ok {
				number[full] = len(number)
			}
			fmt.Fprintf(&s, " %s=%d", local, number[full])
			if q := net.Params.Get(full); q != nil {
				fmt.Fprint(&s, q.Value.Shape())
			}
		}
		s.WriteByte('\n')
	}
	return s.String()
}

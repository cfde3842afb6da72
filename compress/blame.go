package compress

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"reflect"
	"slices"

	"github.com/gomlx/compute"

	"github.com/lathe-ml/lathe/nn"
)

// Blame is what the output of a float network loses when one site alone is as in the compressed network, and what
// leaving that site out would cost.
type Blame struct {
	Site   string  `json:"site"`
	KL     float64 `json:"kl"`     // mean over cases, nats
	Top1   float64 `json:"top1"`   // agreement of the greatest output, in [0,1]
	Cosine float64 `json:"cosine"` // of the outputs
	MSE    float64 `json:"mse"`
	Bytes  int64   `json:"bytes_if_excluded"` // that the file would grow by, were the site left in float32
	Note   string  `json:"note,omitempty"`    // why it could not be measured
}

// Blamer measures Blame. Each site costs a compilation and a part of a pass over the examples: a few dozen are enough.
type Blamer struct {
	Batch    int // cases per pass; 0: all, up to DefaultBatch
	Journal  *Journal
	Key      string // of the journal
	Progress func(Step)
}

// Measure blames every site that is stored otherwise in the compressed network than in the float one, the worst first:
// by KL, then by mean squared error. A site is put into the float network together with what stands in front of it in
// the compressed one, up to the values that both have in common: its activation quantiser, and a norm that gave part of
// its scale to the site.
func (o Blamer) Measure(ctx context.Context, b compute.Backend, float, compressed *nn.Network, x Examples) ([]Blame, error) {
	changed := map[string]bool{}
	for _, n := range float.Sites() {
		if c := compressed.Node(n.Name); c != nil && !(slices.Equal(n.In, c.In) && sameOp(float, n, compressed, c)) {
			changed[n.Name] = true
		}
	}
	if len(changed) == 0 {
		return nil, nil
	}
	s := Sensitivity{
		Forms: []Form{{Name: "as compressed", Put: func(_ context.Context, net *nn.Network, site *nn.Node) error {
			return Graft(net, compressed, site.Name)
		}}},
		Select: func(n *nn.Node) bool { return changed[n.Name] },
		Batch:  o.Batch, Journal: o.Journal, Key: "blame:" + o.Key, Progress: o.Progress,
	}
	effects, err := s.Measure(ctx, b, float, x)
	if err != nil {
		return nil, err
	}
	var out []Blame
	for _, e := range effects {
		f := e.Effects[0]
		out = append(out, Blame{Site: e.Site, KL: f.KL, Top1: f.Top1, Cosine: f.Cosine, MSE: f.MSE, Bytes: e.Bytes - f.Bytes, Note: f.Refused})
	}
	slices.SortStableFunc(out, func(a, b Blame) int { return cmp.Or(cmp.Compare(b.KL, a.KL), cmp.Compare(b.MSE, a.MSE)) })
	return out, nil
}

// Graft puts one site of another network with the same sites into net, in place of net's: with the nodes in front of it
// that net lacks or has otherwise, back to values that are the same in both, or to the next site. The other network is
// left alone; tensors are shared. The error wraps ErrForm when the site cannot be put in.
func Graft(net, other *nn.Network, site string) error {
	at := slices.IndexFunc(net.Nodes, func(n *nn.Node) bool { return n.Name == site })
	from := other.Node(site)
	if at < 0 || from == nil || len(net.Nodes[at].Out) != len(from.Out) {
		return fmt.Errorf("compress: %q is no node of both networks: %w", site, ErrForm)
	}
	known := map[string]bool{}
	for _, in := range net.Inputs {
		known[in.Name] = true
	}
	for _, n := range net.Nodes[:at] {
		for _, v := range n.Out {
			known[v] = true
		}
	}
	g := &graft{net: net, other: other, known: known, values: map[string]string{}}
	target, err := g.node(from, true)
	if err != nil {
		return fmt.Errorf("%w: %w", err, ErrForm)
	}
	old := net.Nodes[at]
	target.Name, target.Out = old.Name, old.Out
	net.Nodes[at] = target
	net.Nodes = slices.Insert(net.Nodes, at, g.added...)
	return nil
}

// graft is a copy of nodes from another network.
type graft struct {
	net, other *nn.Network
	known      map[string]bool   // values that are there before the site
	values     map[string]string // other's value -> net's
	added      []*nn.Node
}

// value returns the name that a value of the other network has here, and copies what makes it where it is not here.
func (g *graft) value(v string) (string, error) {
	if v == "" {
		return "", nil
	}
	if w, ok := g.values[v]; ok {
		return w, nil
	}
	p := g.other.Producer(v)
	if p == nil {
		if !g.known[v] {
			return "", fmt.Errorf("the networks have different inputs; %q is in one alone", v)
		}
		return v, nil
	}
	i := slices.Index(p.Out, v)
	same := g.net.Node(p.Name)
	_, site := p.Op.(nn.Linear)
	if same != nil && (site || sameOp(g.net, same, g.other, p)) {
		if i >= len(same.Out) || !g.known[same.Out[i]] {
			return "", fmt.Errorf("node %q runs in another order in the two networks", p.Name)
		}
		g.values[v] = same.Out[i]
		return same.Out[i], nil
	}
	if site {
		return "", fmt.Errorf("the float network has no site %q", p.Name)
	}
	if _, err := g.node(p, false); err != nil {
		return "", err
	}
	return g.values[v], nil
}

// node copies a node and its parameters under new names.
func (g *graft) node(p *nn.Node, site bool) (*nn.Node, error) {
	c := &nn.Node{Name: "grafted:" + p.Name, Op: p.Op, P: map[string]string{}}
	for _, v := range p.In {
		w, err := g.value(v)
		if err != nil {
			return nil, err
		}
		c.In = append(c.In, w)
	}
	for _, local := range slices.Sorted(maps.Keys(p.P)) {
		q := g.other.Param(p, local)
		if q == nil {
			return nil, fmt.Errorf("parameter %q of node %q is missing", p.P[local], p.Name)
		}
		copied := *q
		copied.Name = "grafted:" + p.Name + "." + local
		c.P[local] = copied.Name
		g.net.Params.Put(&copied)
	}
	if site {
		return c, nil
	}
	for _, v := range p.Out {
		w := "grafted:" + v
		c.Out = append(c.Out, w)
		g.values[v] = w
	}
	g.added = append(g.added, c)
	return c, nil
}

// sameOp says whether two nodes compute the same of what they read.
func sameOp(a *nn.Network, m *nn.Node, b *nn.Network, n *nn.Node) bool {
	if !reflect.DeepEqual(plainly(m.Op), plainly(n.Op)) {
		return false
	}
	locals := map[string]bool{}
	for l := range m.P {
		locals[l] = true
	}
	for l := range n.P {
		locals[l] = true
	}
	for l := range locals {
		p, q := a.Param(m, l), b.Param(n, l)
		if p == nil || q == nil || p.Value != q.Value && !sameTensor(p.Value, q.Value) {
			return false
		}
	}
	return true
}

// plainly is an op without the way in which its weight was initialised.
func plainly(op nn.Op) nn.Op {
	if nn.IsPlain(op) {
		return op.(nn.Linear).WithRepr(nn.Plain{})
	}
	return op
}

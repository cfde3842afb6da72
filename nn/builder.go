package nn

import (
	"fmt"

	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"
)

// Builder builds a network by functional calls and checks shapes as it goes. The first mistake is kept and returned
// by Finish; calls after it do nothing.
type Builder struct {
	Net    *Network
	seed   uint64
	env    *Env
	vals   map[string]*graph.Node
	scope  string
	shared map[string]string
	err    error
}

// NewBuilder starts an empty network whose parameters are drawn under seed, each from a stream of its own name.
func NewBuilder(seed uint64) *Builder {
	net := &Network{}
	g := graph.NewGraph(scratchBackend(), "build")
	return &Builder{Net: net, seed: seed, vals: map[string]*graph.Node{}, env: &Env{G: g, Param: scratchParams(g, &net.Params), scratch: true}}
}

// Input declares a network input; axis 0 is the nominal batch.
func (b *Builder) Input(name string, s shapes.Shape) string {
	if b.err != nil {
		return name
	}
	b.Net.Inputs = append(b.Net.Inputs, Input{name, s})
	b.err = Catch(func() { b.vals[name] = graph.Parameter(b.env.G, "in:"+name, s) })
	return name
}

// Image declares a float32 input [batch, height, width, channels].
func (b *Builder) Image(name string, height, width, channels int) string {
	return b.Input(name, f32(1, height, width, channels))
}

// Shape returns the shape of a value built so far.
func (b *Builder) Shape(value string) shapes.Shape {
	if v := b.vals[value]; v != nil {
		return v.Shape()
	}
	return shapes.Shape{}
}

// In runs f with all names prefixed by "scope.".
func (b *Builder) In(scope string, f func()) {
	old := b.scope
	b.scope = old + scope + "."
	f()
	b.scope = old
}

// Share makes a local parameter of the next added node name an existing parameter: tied weights.
func (b *Builder) Share(local, param string) *Builder {
	if b.shared == nil {
		b.shared = map[string]string{}
	}
	b.shared[local] = param
	return b
}

// Add appends an op and returns its first output; further ones are "<name>.1", "<name>.2", ...
func (b *Builder) Add(name string, op Op, in ...string) string {
	name = b.scope + name
	if b.err != nil {
		return name
	}
	b.err = b.add(name, op, in)
	b.shared = nil
	return name
}

func (b *Builder) add(name string, op Op, in []string) error {
	if b.Net.Node(name) != nil || b.vals[name] != nil {
		return fmt.Errorf("nn: two nodes are named %q", name)
	}
	x := &Node{Name: name, Op: op, In: in, P: map[string]string{}}
	x.Out = outNames(name, op)
	err := Catch(func() {
		for _, v := range in {
			if v != "" && b.vals[v] == nil {
				panic(fmt.Errorf("nn: node %q (%s): input %q is not defined before it", name, op.Kind(), v))
			}
		}
		if p, ok := op.(Parametric); ok {
			ish := make([]shapes.Shape, len(in))
			for i, v := range in {
				ish[i] = b.Shape(v)
			}
			if err := Catch(func() { b.declare(x, p.Params(ish)) }); err != nil {
				panic(fmt.Errorf("node %q (%s): %w", name, op.Kind(), err))
			}
		}
		lowerNode(b.env, x, b.vals, func(n string, v *graph.Node) { b.vals[n] = v })
	})
	if err != nil {
		return err
	}
	b.Net.Nodes = append(b.Net.Nodes, x)
	return nil
}

func outNames(name string, op Op) []string {
	out := []string{name}
	if m, ok := op.(MultiOutput); ok {
		for i := 1; i < m.NumOut(); i++ {
			out = append(out, fmt.Sprintf("%s.%d", name, i))
		}
	}
	return out
}

func (b *Builder) declare(x *Node, specs []Spec) {
	for _, s := range specs {
		full := x.Name + "." + s.Name
		if t, ok := b.shared[s.Name]; ok {
			q := b.Net.Params.Get(t)
			if q == nil {
				panic(fmt.Errorf("cannot share %q: there is no parameter %q", s.Name, t))
			}
			if !q.Value.Shape().EqualDimensions(s.Shape) {
				panic(fmt.Errorf("cannot share %q: it is %s, parameter %q is %s", s.Name, s.Shape, t, q.Value.Shape()))
			}
			x.P[s.Name] = t
			continue
		}
		x.P[s.Name] = full
		b.Net.Params.reinit(full, s, b.seed)
	}
}

// Set overwrites a parameter of a node built so far: what a file reader does after Add.
func (b *Builder) Set(node, local string, t *tensors.Tensor) {
	if b.err != nil {
		return
	}
	x := b.Net.Node(node)
	if x == nil || b.Net.Param(x, local) == nil {
		b.err = fmt.Errorf("nn: node %q has no parameter %q", node, local)
		return
	}
	p := b.Net.Param(x, local)
	if !p.Value.Shape().EqualDimensions(t.Shape()) {
		b.err = fmt.Errorf("nn: node %q (%s): parameter %q is %s, got %s", node, x.Op.Kind(), local, p.Value.Shape(), t.Shape())
		return
	}
	p.Value = t
}

// Fail records an error of the caller's own, unless an earlier one stands.
func (b *Builder) Fail(err error) {
	if b.err == nil {
		b.err = err
	}
}

// Err is the first mistake so far.
func (b *Builder) Err() error { return b.err }

// Finish names the outputs and returns the network, or the first mistake.
func (b *Builder) Finish(outputs ...string) (*Network, error) {
	if b.err != nil {
		return nil, b.err
	}
	b.Net.Outputs = outputs
	if err := b.Net.Check(); err != nil {
		return nil, err
	}
	b.env.G.Finalize()
	return b.Net, nil
}

// Reinit draws the network's trainable parameters and state anew under another seed, as a fresh build would. It
// needs the shapes of the inputs, which the network knows.
func (n *Network) Reinit(seed uint64) error {
	sh, err := n.Shapes(0)
	if err != nil {
		return err
	}
	done := map[string]bool{}
	return Catch(func() {
		for _, x := range n.Nodes {
			p, ok := x.Op.(Parametric)
			if !ok {
				continue
			}
			in := make([]shapes.Shape, len(x.In))
			for i, v := range x.In {
				in[i] = sh[v]
			}
			for _, s := range p.Params(in) {
				full := x.P[s.Name]
				q := n.Params.Get(full)
				if done[full] || q == nil || q.Role == Constant || q.Frozen {
					continue
				}
				done[full] = true
				n.Params.reinit(full, s, seed)
			}
		}
	})
}

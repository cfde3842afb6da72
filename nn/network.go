// Package nn is the network: one directed graph of named operations over named parameters.
//
// A network that was built here, read from ONNX or read from a file of our own is the same thing, so a method that
// is written once serves them all. It lowers to a GoMLX graph for training, differentiation and capture; its
// weight-bearing nodes, the sites, have a stored form (Repr) that can be substituted; it is rewritten along its
// edges; it counts its own cost.
//
// Activations are [batch, ..., channels]; weights [out, in]; convolution kernels [out, kh, kw, in/groups].
package nn

import (
	"fmt"
	"maps"
	"slices"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"
)

// Op is what a node computes. It is a plain value: copying a network copies its ops, and an op's fields are never
// changed in place.
type Op interface {
	Kind() string
	// Lower adds the op to the graph of c. It panics on wrong shapes, as GoMLX does; Network.Lower names the node.
	Lower(c *Ctx, x []*graph.Node) []*graph.Node
}

// Parametric ops own parameters; in holds the input shapes.
type Parametric interface {
	Params(in []shapes.Shape) []Spec
}

// Coster counts multiply-adds for given shapes.
type Coster interface {
	MACs(in, out []shapes.Shape) int64
}

// MultiOutput ops have more than one output.
type MultiOutput interface{ NumOut() int }

// Norm is what may stand at a norm slot: an op of one input that keeps the shape.
type Norm interface {
	Op
	Parametric
}

// Linear ops are sites: x meets a weight, and how that weight is stored is a separate thing.
type Linear interface {
	Op
	Parametric
	Repr() Repr // never nil
	WithRepr(r Repr) Op
	// WeightShape is the shape of the whole weight, output axis first, for given input shapes.
	WeightShape(in []shapes.Shape) shapes.Shape
}

// Repr is how a site's weight is stored: plain, quantised, low-rank, masked, ...
type Repr interface {
	Kind() string
	// Specs lists the parameters in which a weight of that shape is stored.
	Specs(w shapes.Shape) []Spec
	// Value is the effective weight, differentiable where that makes sense.
	Value(c *Ctx) *graph.Node
}

// Node is one named operation. Values are named too: the first output carries the node's name, further ones
// "name.1", "name.2", ...
type Node struct {
	Name string
	Op   Op
	In   []string          // value names
	Out  []string          // value names
	P    map[string]string // op's local parameter name -> name in Network.Params; tied weights name the same one
}

// Input is a named network input. Axis 0 of the shape is the batch and nominal: a network runs at any batch.
type Input struct {
	Name  string
	Shape shapes.Shape
}

// Network is a graph in topological order. The zero value is an empty network.
type Network struct {
	Inputs  []Input
	Nodes   []*Node
	Outputs []string
	Params  Params
	Meta    map[string]string // free-form facts that travel with the file: architecture, preprocessing, source
}

// Node returns the node of that name, or nil.
func (n *Network) Node(name string) *Node {
	for _, x := range n.Nodes {
		if x.Name == name {
			return x
		}
	}
	return nil
}

// Producer returns the node that makes a value, nil for inputs and unknown names.
func (n *Network) Producer(value string) *Node {
	for _, x := range n.Nodes {
		if slices.Contains(x.Out, value) {
			return x
		}
	}
	return nil
}

// Readers lists the nodes that read a value, and whether it is also an output of the network.
func (n *Network) Readers(value string) (nodes []*Node, isOutput bool) {
	for _, x := range n.Nodes {
		if slices.Contains(x.In, value) {
			nodes = append(nodes, x)
		}
	}
	return nodes, slices.Contains(n.Outputs, value)
}

// Sites lists the weight-bearing nodes in execution order.
func (n *Network) Sites() (sites []*Node) {
	for _, x := range n.Nodes {
		if _, ok := x.Op.(Linear); ok {
			sites = append(sites, x)
		}
	}
	return sites
}

// Param returns the parameter behind a node's local name, or nil.
func (n *Network) Param(node *Node, local string) *Param {
	full, ok := node.P[local]
	if !ok {
		return nil
	}
	return n.Params.Get(full)
}

// SetParam replaces the values of a node's parameter, of any shape, or creates it. A parameter that another node
// shares is split off first, so that only this node sees the change.
func (n *Network) SetParam(node *Node, local string, role Role, data []float32, dims ...int) {
	full := node.P[local]
	if full == "" || n.shared(full, node) {
		full = n.freshParam(node.Name + "." + local)
	}
	frozen := false
	if old := n.Params.Get(full); old != nil {
		frozen = old.Frozen
	}
	node.P[local] = full
	n.Params.Put(&Param{Name: full, Role: role, Frozen: frozen, Value: tensors.FromFlatDataAndDimensions(slices.Clone(data), dims...)})
}

func (n *Network) freshParam(name string) string {
	for i, base := 1, name; n.Params.Get(name) != nil; i++ {
		name = fmt.Sprintf("%s~%d", base, i)
	}
	return name
}

func (n *Network) shared(param string, but *Node) bool {
	for _, x := range n.Nodes {
		if x == but {
			continue
		}
		for _, p := range x.P {
			if p == param {
				return true
			}
		}
	}
	return false
}

// SharedParam says whether another node than this one uses the same parameter (tied weights).
func (n *Network) SharedParam(node *Node, local string) bool { return n.shared(node.P[local], node) }

// Clone copies structure and parameters: neither network sees a change to the other, nor its training.
func (n *Network) Clone() *Network {
	c := &Network{Inputs: slices.Clone(n.Inputs), Outputs: slices.Clone(n.Outputs), Params: n.Params.Clone(), Meta: maps.Clone(n.Meta)}
	for _, x := range n.Nodes {
		c.Nodes = append(c.Nodes, x.clone())
	}
	return c
}

func (x *Node) clone() *Node {
	return &Node{x.Name, x.Op, slices.Clone(x.In), slices.Clone(x.Out), maps.Clone(x.P)}
}

// ReplaceUses redirects every reader of a value, and the outputs, to another value.
func (n *Network) ReplaceUses(old, value string) {
	for _, x := range n.Nodes {
		for i := range x.In {
			if x.In[i] == old {
				x.In[i] = value
			}
		}
	}
	for i := range n.Outputs {
		if n.Outputs[i] == old {
			n.Outputs[i] = value
		}
	}
}

// Remove drops a node and the parameters that nobody else uses.
func (n *Network) Remove(name string) {
	x := n.Node(name)
	if x == nil {
		return
	}
	n.Nodes = slices.DeleteFunc(n.Nodes, func(y *Node) bool { return y == x })
	for _, p := range x.P {
		if !n.shared(p, x) {
			n.Params.Delete(p)
		}
	}
}

// Bypass removes a node of one input whose readers read its input instead. When the input's producer has no other
// reader, it takes over the removed value's name, so that taps, outputs and metadata that mention it go on working.
func (n *Network) Bypass(name string) error {
	x := n.Node(name)
	if x == nil || len(x.In) != 1 || len(x.Out) != 1 {
		return fmt.Errorf("nn: cannot bypass %q: want a node of one input and one output", name)
	}
	in, out := x.In[0], x.Out[0]
	readers, isOut := n.Readers(in)
	prod := n.Producer(in)
	n.Remove(name)
	if prod == nil || len(readers) > 1 || isOut || len(prod.Out) > 1 {
		n.ReplaceUses(out, in)
		return nil
	}
	n.rename(prod, out)
	return nil
}

// rename gives a node of one output another name; its parameters keep theirs.
func (n *Network) rename(x *Node, name string) {
	n.ReplaceUses(x.Out[0], name)
	x.Name, x.Out[0] = name, name
}

// InsertBefore puts an op without parameters of its own in front of input i of a node, for example an activation
// quantiser in front of a site. It shifts nobody's random stream: those go by node name.
func (n *Network) InsertBefore(node string, i int, name string, op Op) (*Node, error) {
	at := slices.IndexFunc(n.Nodes, func(y *Node) bool { return y.Name == node })
	switch {
	case at < 0:
		return nil, fmt.Errorf("nn: insert %q: there is no node %q", name, node)
	case i < 0 || i >= len(n.Nodes[at].In):
		return nil, fmt.Errorf("nn: insert %q: node %q has %d inputs, no input %d", name, node, len(n.Nodes[at].In), i)
	case n.Node(name) != nil:
		return nil, fmt.Errorf("nn: two nodes would be named %q", name)
	}
	y := &Node{Name: name, Op: op, In: []string{n.Nodes[at].In[i]}, Out: []string{name}, P: map[string]string{}}
	n.Nodes[at].In[i] = name
	n.Nodes = slices.Insert(n.Nodes, at, y)
	return y, nil
}

// Substitute changes how a site's weight is stored. Params gives the new form's parameters by local name; parameters
// of the old form that the new one does not name stay in the network untouched. Restore undoes it bit for bit.
func (n *Network) Substitute(site string, r Repr, params map[string]*tensors.Tensor) (restore func(), err error) {
	x := n.Node(site)
	if x == nil {
		return nil, fmt.Errorf("nn: substitute: there is no node %q", site)
	}
	lin, ok := x.Op.(Linear)
	if !ok {
		return nil, fmt.Errorf("nn: substitute: node %q (%s) is not a site", site, x.Op.Kind())
	}
	old := x.clone()
	saved := map[string]*Param{}
	var added []string
	x.Op = lin.WithRepr(r)
	for _, k := range slices.Sorted(maps.Keys(params)) {
		full := x.P[k]
		if full == "" || n.shared(full, x) {
			full = n.freshParam(site + "." + k)
			added = append(added, full)
		} else {
			saved[full] = n.Params.Get(full)
		}
		x.P[k] = full
		n.Params.Put(&Param{Name: full, Role: Constant, Value: params[k], Frozen: true})
	}
	return func() {
		x.Op, x.P = old.Op, old.P
		for _, p := range added {
			n.Params.Delete(p)
		}
		for _, p := range saved {
			n.Params.Put(p)
		}
	}, nil
}

// Prune drops nodes that no output needs.
func (n *Network) Prune() {
	live := map[string]bool{}
	for _, o := range n.Outputs {
		live[o] = true
	}
	for _, x := range slices.Backward(slices.Clone(n.Nodes)) {
		if !slices.ContainsFunc(x.Out, func(o string) bool { return live[o] }) {
			n.Remove(x.Name)
			continue
		}
		for _, v := range x.In {
			live[v] = true
		}
	}
}

// Check verifies the structure: unique names, inputs defined before use, parameters present, outputs defined.
func (n *Network) Check() error {
	defined, names := map[string]bool{"": true}, map[string]bool{}
	for _, i := range n.Inputs {
		if defined[i.Name] {
			return fmt.Errorf("nn: input %q is defined twice", i.Name)
		}
		defined[i.Name] = true
	}
	for _, x := range n.Nodes {
		if x.Op == nil {
			return fmt.Errorf("nn: node %q has no op", x.Name)
		}
		if names[x.Name] {
			return fmt.Errorf("nn: two nodes are named %q", x.Name)
		}
		names[x.Name] = true
		for _, v := range x.In {
			if !defined[v] {
				return fmt.Errorf("nn: node %q (%s): input %q is not defined before it", x.Name, x.Op.Kind(), v)
			}
		}
		for l, p := range x.P {
			if n.Params.Get(p) == nil {
				return fmt.Errorf("nn: node %q (%s): its parameter %s = %q is missing", x.Name, x.Op.Kind(), l, p)
			}
		}
		for _, o := range x.Out {
			if defined[o] {
				return fmt.Errorf("nn: node %q (%s): value %q is defined twice", x.Name, x.Op.Kind(), o)
			}
			defined[o] = true
		}
	}
	for _, o := range n.Outputs {
		if !defined[o] || o == "" {
			return fmt.Errorf("nn: output %q is not defined", o)
		}
	}
	return nil
}

func f32(dims ...int) shapes.Shape { return shapes.Make(dtypes.Float32, dims...) }

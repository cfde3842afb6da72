package nn

import (
	"fmt"
	"hash/fnv"

	"github.com/gomlx/compute"
	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"

	"github.com/lathe-ml/lathe/engine"
)

// Env says where a lowering gets its parameters, randomness and replaced values from, and where it leaves state and
// captured values. One Env may serve several Lower calls in one graph, of one network or of several.
type Env struct {
	G        *graph.Graph
	Training bool
	DType    dtypes.DType // of activations and parameters; the zero value means float32

	// Param gives the current value of a parameter, Update takes the next one; a nil Update freezes all state. State
	// may also be updated inside a custom gradient: collect it after graph.Gradient.
	Param  func(name string) *graph.Node
	Update func(name string, v *graph.Node)

	RNG *graph.Node // state for dropout and the like; nil makes them the identity
	// Step is how many optimiser steps were done before this one, a scalar, while a trainer trains; nil otherwise. What
	// changes along the training (a blend of two norms, a rate) follows it, not a counter of its own.
	Step *graph.Node
	// Partial says that the batch is one of several whose gradients are added up for one step. What must move once per
	// step refuses it.
	Partial bool

	Override map[string]*graph.Node // value name -> what readers see instead
	Tap      map[string]*graph.Node // if not nil, every value (and every Record) is put here

	// SecondOrder asks for lowerings that can be differentiated twice (convolution by gather, pooling by reduction).
	SecondOrder bool

	scratch bool // only shapes are wanted: lowerings need not be those of the backend
}

// Ctx is what an op sees while lowering: the Env and its own node.
type Ctx struct {
	*Env
	Node *Node
}

// Type is the floating type of this lowering.
func (e *Env) Type() dtypes.DType {
	if e.DType == dtypes.InvalidDType {
		return dtypes.Float32
	}
	return e.DType
}

// P returns the node's parameter of that local name in the Env's type, or nil when the node has none.
func (c *Ctx) P(local string) *graph.Node {
	full, ok := c.Node.P[local]
	if !ok {
		return nil
	}
	v := c.Param(full)
	if v.DType().IsFloat() && v.DType() != c.Type() {
		v = graph.ConvertDType(v, c.Type())
	}
	return v
}

// Set makes v the next value of a State parameter.
func (c *Ctx) Set(local string, v *graph.Node) {
	if c.Update != nil {
		c.Update(c.Node.P[local], v)
	}
}

// Record names an intermediate of a composite op, "node:name", so that it can be tapped and overridden.
func (c *Ctx) Record(name string, v *graph.Node) *graph.Node {
	full := c.Node.Name + ":" + name
	if r, ok := c.Override[full]; ok {
		v = r
	}
	if c.Tap != nil {
		c.Tap[full] = v
	}
	return v
}

// Random returns RNG state for this node, or nil without randomness. It depends on the step's state and on the
// node's name only, so that an inserted node changes nobody's draws.
func (c *Ctx) Random() *graph.Node {
	if c.RNG == nil {
		return nil
	}
	h := fnv.New64a()
	h.Write([]byte(c.Node.Name))
	sum := h.Sum64()
	salt := graph.Const(c.G, []uint64{sum, sum*0x9e3779b97f4a7c15 + 1, sum ^ 0xd1b54a32d192ed03}[:c.RNG.Shape().Size()])
	_, mine := graph.RNGStateSplit(graph.BitwiseXor(c.RNG, salt))
	return mine
}

// Lower builds the network in env's graph from the inputs by name, and returns its outputs. It panics like GoMLX,
// with the node named in the error; Catch turns that into an error.
func (n *Network) Lower(env *Env, in map[string]*graph.Node) []*graph.Node {
	vals := make(map[string]*graph.Node, len(n.Nodes))
	set := func(name string, v *graph.Node) {
		if r, ok := env.Override[name]; ok {
			v = r
		}
		vals[name] = v
		if env.Tap != nil {
			env.Tap[name] = v
		}
	}
	for _, i := range n.Inputs {
		x := in[i.Name]
		if x == nil {
			panic(fmt.Errorf("nn: input %q is missing", i.Name))
		}
		if x.DType().IsFloat() && x.DType() != env.Type() {
			x = graph.ConvertDType(x, env.Type())
		}
		set(i.Name, x)
	}
	for _, x := range n.Nodes {
		lowerNode(env, x, vals, set)
	}
	out := make([]*graph.Node, len(n.Outputs))
	for i, o := range n.Outputs {
		if out[i] = vals[o]; out[i] == nil {
			panic(fmt.Errorf("nn: output %q is not defined", o))
		}
	}
	return out
}

func lowerNode(env *Env, x *Node, vals map[string]*graph.Node, set func(string, *graph.Node)) {
	defer func() {
		if r := recover(); r != nil {
			panic(fmt.Errorf("node %q (%s): %w", x.Name, x.Op.Kind(), engine.AsError(r)))
		}
	}()
	args := make([]*graph.Node, len(x.In))
	for i, v := range x.In {
		if args[i] = vals[v]; args[i] == nil && v != "" {
			panic(fmt.Errorf("input %q is not defined before it", v))
		}
	}
	out := x.Op.Lower(&Ctx{Env: env, Node: x}, args)
	if len(out) != len(x.Out) {
		panic(fmt.Errorf("op returned %d values for %d outputs", len(out), len(x.Out)))
	}
	for i, y := range out {
		set(x.Out[i], y)
	}
}

// Catch turns a panic below f into an error. A Go runtime error keeps its type, so that a caller can tell a defect
// from a refused shape.
func Catch(f func()) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = engine.AsError(r)
		}
	}()
	f()
	return nil
}

// Shapes returns the shape of every value, with the batch of every input replaced when batch > 0. It lowers into a
// scratch graph that is never compiled, so no op needs shape code of its own.
func (n *Network) Shapes(batch int) (map[string]shapes.Shape, error) {
	out := map[string]shapes.Shape{}
	err := Catch(func() {
		g := graph.NewGraph(scratchBackend(), "shapes")
		defer g.Finalize()
		env := &Env{G: g, Tap: map[string]*graph.Node{}, Param: scratchParams(g, &n.Params), scratch: true}
		in := map[string]*graph.Node{}
		for _, i := range n.Inputs {
			in[i.Name] = graph.Parameter(g, "in:"+i.Name, atBatch(i.Shape, batch))
		}
		n.Lower(env, in)
		for k, v := range env.Tap {
			out[k] = v.Shape()
		}
	})
	return out, err
}

func atBatch(s shapes.Shape, batch int) shapes.Shape {
	s = s.Clone()
	if batch > 0 && s.Rank() > 0 {
		s.Dimensions[0] = batch
	}
	return s
}

// scratchBackend infers shapes; nothing is ever compiled on it.
func scratchBackend() compute.Backend { return engine.Go() }

func scratchParams(g *graph.Graph, p *Params) func(string) *graph.Node {
	cache := map[string]*graph.Node{}
	return func(name string) *graph.Node {
		if cache[name] == nil {
			q := p.Get(name)
			if q == nil {
				panic(fmt.Errorf("parameter %q is missing", name))
			}
			cache[name] = graph.Parameter(g, name, q.Value.Shape())
		}
		return cache[name]
	}
}

// Cost is what one forward pass costs.
type Cost struct {
	MACs   int64            // multiply-adds, biases and elementwise work not counted
	Params int              // stored scalars
	Bytes  int64            // of the parameters as stored
	ByNode map[string]int64 // multiply-adds by node
}

// Cost counts multiply-adds at the given batch (0: as declared).
func (n *Network) Cost(batch int) (*Cost, error) {
	sh, err := n.Shapes(batch)
	if err != nil {
		return nil, err
	}
	c := &Cost{Params: n.Params.Count(), Bytes: n.Params.Bytes(), ByNode: map[string]int64{}}
	for _, x := range n.Nodes {
		if op, ok := x.Op.(Coster); ok {
			in, out := make([]shapes.Shape, len(x.In)), make([]shapes.Shape, len(x.Out))
			for i, v := range x.In {
				in[i] = sh[v]
			}
			for i, v := range x.Out {
				out[i] = sh[v]
			}
			m := op.MACs(in, out)
			c.ByNode[x.Name] = m
			c.MACs += m
		}
	}
	return c, nil
}

package fold

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/gomlx/compute/shapes"

	"github.com/lathe-ml/lathe/nn"
)

// Why a residual stream cannot be re-centred. A StreamError wraps one of them.
var (
	ErrPostNorm      = errors.New("post-norm: a norm's output is the residual stream")
	ErrSandwich      = errors.New("sandwich: a norm stands between a branch and the sum")
	ErrUnnormed      = errors.New("something reads the stream without a norm")
	ErrElementwise   = errors.New("an element-wise operation on the stream")
	ErrNormAxis      = errors.New("the norm is over other axes than the stream's width")
	ErrUnknownWriter = errors.New("what writes to the stream is not a linear map that can be re-centred")
	ErrStoredWeight  = errors.New("the weight is not stored plainly")
	ErrNotCentred    = errors.New("the network normalises without centring, and its stream has no mean of zero")
	ErrNotFinite     = errors.New("a weight is not finite")
	ErrShape         = errors.New("a parameter does not fit the stream")
	ErrTooNarrow     = errors.New("the stream is too narrow")
	ErrNoStream      = errors.New("there is no layer norm or RMS norm that reads a stream")
	ErrCompressed    = errors.New("the stream is compressed already")
	ErrTraining      = errors.New("the network drops elements of the stream while training")
)

// StreamError says which node keeps a stream from being re-centred.
type StreamError struct {
	Node   string // "" for the network as a whole
	Op     string // the node's kind
	Detail string // what is wrong there, and what is accepted
	Err    error  // one of the reasons above
}

// Error names the node.
func (e *StreamError) Error() string {
	if e.Node == "" {
		return fmt.Sprintf("fold: %v: %s", e.Err, e.Detail)
	}
	return fmt.Sprintf("fold: node %q (%s): %v: %s", e.Node, e.Op, e.Err, e.Detail)
}

// Unwrap is the reason.
func (e *StreamError) Unwrap() error { return e.Err }

// Writer is a node whose output is added to a stream, or begins it.
type Writer struct {
	Node string `json:"node"`
	Kind string `json:"kind"` // dense, conv, embedding or value
}

// NormRef is a norm that reads a stream.
type NormRef struct {
	Node    string  `json:"node"`
	Eps     float64 `json:"eps"`
	Centres bool    `json:"centres"` // a layer norm; otherwise an RMS norm
	// Others are what reads the norm beside linear maps, "output" for an output of the network. Gain and bias then stay.
	Others []string `json:"others,omitempty"`
}

// Reader is a linear map that reads a norm of a stream.
type Reader struct {
	Node   string  `json:"node"`
	Norm   string  `json:"norm"`
	Factor float64 `json:"factor"` // of a constant multiplication in between; 1 without
}

// LayerScale is a learned factor per channel behind a writer, diag(s)·(W·x + b).
type LayerScale struct {
	Node   string `json:"node"` // the multiplication
	Gain   string `json:"gain"` // the value s
	Writer string `json:"writer"`
}

// StreamSpec is one residual stream: all values that are connected by sums, and by what keeps every token's vector or
// averages it with others. It has one width; a network of several widths, or an encoder beside a decoder, has several.
type StreamSpec struct {
	Dim      int            `json:"dim"`
	Writers  []Writer       `json:"writers"`
	Norms    []NormRef      `json:"norms"`
	Readers  []Reader       `json:"readers"`
	Scales   []LayerScale   `json:"scales,omitempty"`
	Dropouts []string       `json:"dropouts,omitempty"` // element-wise dropout on the stream: nothing at inference
	Residual bool           `json:"residual"`           // there is a sum
	Values   []string       `json:"-"`                  // the stream's values
	axis     map[string]int // where the width is, of the stream's values and of what leads from norms to readers
	between  []string       // nodes between norms and readers
	fixed    []string       // nodes on the stream whose op names the width
}

// FindStreams follows the edges of a network from every layer norm and RMS norm over one axis: which values are a residual
// stream, what writes to it, and what reads it through which norm. It understands sums and differences, scalar
// factors, drop-path, choice, repetition, mean and rearrangement of tokens, class tokens, positions, layer scale, and
// everything that nn/zoo, nn/onnx and nn/gguf build of them. The width may be any axis, as in a network that was read from
// a file with tokens last.
//
// A stream that cannot be re-centred is an error that wraps the reasons, each with its node (StreamError). Norms that
// belong to no stream that can be converted and to no sum, such as those of queries and keys, are kept.
func FindStreams(n *nn.Network) (streams []StreamSpec, kept []Kept, err error) {
	if err := n.Check(); err != nil {
		return nil, nil, err
	}
	sh, err := n.Shapes(0)
	if err != nil {
		return nil, nil, err
	}
	g := newFlow(n, sh)
	seen := map[string]bool{}
	var first error
	var problems []*StreamError
	for _, x := range n.Nodes {
		if !readsStream(x.Op) || seen[x.In[0]] {
			continue
		}
		t := &tracer{flow: g, seen: map[string]bool{}}
		t.run(x)
		for v := range t.seen {
			seen[v] = true
		}
		switch {
		case len(t.problems) == 0:
			streams = append(streams, t.spec)
		case t.spec.Residual:
			problems = append(problems, t.problems...)
		default:
			first = cmp.Or(first, join(t.problems))
			for _, m := range t.spec.Norms {
				kept = append(kept, Kept{m.Node, t.problems[0].Error()})
			}
		}
	}
	if len(problems) > 0 {
		return nil, nil, join(problems)
	}
	if i := slices.IndexFunc(n.Nodes, func(x *nn.Node) bool { _, ok := x.Op.(nn.CRMSNorm); return ok }); i >= 0 && len(streams) == 0 && first == nil {
		first = &StreamError{Node: n.Nodes[i].Name, Op: "crmsnorm", Err: ErrCompressed, Detail: "there is nothing left to convert"}
	}
	if len(streams) == 0 && first == nil {
		first = &StreamError{Err: ErrNoStream, Detail: "only networks with layer norm or RMS norm can be re-centred"}
	}
	if len(streams) == 0 {
		return nil, nil, first
	}
	return streams, kept, nil
}

func readsStream(op nn.Op) bool {
	switch op.(type) {
	case nn.LayerNorm, nn.RMSNorm:
		return true
	}
	return false
}

// flow knows the edges of a network.
type flow struct {
	n       *nn.Network
	sh      map[string]shapes.Shape
	prod    map[string]*nn.Node
	readers map[string][]*nn.Node
	output  map[string]bool
}

func newFlow(n *nn.Network, sh map[string]shapes.Shape) *flow {
	g := &flow{n: n, sh: sh, prod: map[string]*nn.Node{}, readers: map[string][]*nn.Node{}, output: map[string]bool{}}
	for _, x := range n.Nodes {
		for _, v := range x.Out {
			g.prod[v] = x
		}
		for i, v := range x.In {
			if v != "" && !slices.Contains(x.In[:i], v) {
				g.readers[v] = append(g.readers[v], x)
			}
		}
	}
	for _, v := range n.Outputs {
		g.output[v] = true
	}
	return g
}

// port is a value with the axis along which its vectors lie.
type port struct {
	value string
	axis  int
}

// size is that of an axis of a value; an axis in front of the first has size 1.
func (g *flow) size(p port) int {
	if p.axis < 0 || p.axis >= g.sh[p.value].Rank() {
		return 1
	}
	return g.sh[p.value].Dimensions[p.axis]
}

// carries gives the inputs of a node whose vectors go into those along an axis of its outputs, coordinate by coordinate:
// adding a constant to all coordinates of such an input adds one to those of the output, and a coordinate can be left out.
// nil: the node does something else.
func (g *flow) carries(x *nn.Node, axis, d int) []port {
	if len(x.In) == 0 || x.In[0] == "" || g.size(port{x.Out[0], axis}) != d {
		return nil
	}
	in, out := g.sh[x.In[0]], g.sh[x.Out[0]]
	aligned := func(i int) port { // the axis by its place from the end, as values broadcast
		return port{x.In[i], g.sh[x.In[i]].Rank() - out.Rank() + axis}
	}
	wide := func(i int) bool { return g.size(aligned(i)) == d }
	narrow := func(i int) bool { return g.size(aligned(i)) == 1 }
	one := func(ok bool, a int) []port {
		if p := (port{x.In[0], a}); ok && a >= 0 && g.size(p) == d {
			return []port{p}
		}
		return nil
	}
	is := func(a int) bool { return (a+in.Rank())%in.Rank() == axis }
	if in.Rank() == 0 {
		return nil
	}
	switch op := x.Op.(type) {
	case nn.Binary:
		switch {
		case isAdd(op) && wide(0) && wide(1):
			return []port{aligned(0), aligned(1)}
		case (op.Fn == "Mul" || op.Fn == "Div") && wide(0) && narrow(1):
			return []port{aligned(0)}
		case op.Fn == "Mul" && wide(1) && narrow(0):
			return []port{aligned(1)}
		}
	case nn.Affine:
		return one(op.Shift == 0, axis)
	case nn.Unary:
		return one(op.Fn == "Identity" || op.Fn == "Neg", axis)
	case nn.Cast:
		return one(in.DType.IsFloat() && out.DType.IsFloat(), axis)
	case nn.Dropout, nn.DropPath:
		return one(true, axis)
	case nn.Slice:
		return one(!is(op.Axis), axis)
	case nn.Split:
		return one(!is(op.Axis), axis)
	case nn.Gather:
		at, k := (op.Axis+in.Rank())%in.Rank(), g.sh[x.In[1]].Rank() // axis at becomes k axes
		switch {
		case axis < at:
			return one(true, axis)
		case axis >= at+k:
			return one(true, axis-k+1)
		}
	case nn.Transpose:
		return one(len(op.Perm) == out.Rank(), op.Perm[axis])
	case nn.Expand:
		return one(true, in.Rank()-out.Rank()+axis)
	case nn.Reshape: // the axis stays whole, with as many elements in front of it
		before := product(out.Dimensions[:axis])
		for a := range in.Dimensions {
			if in.Dimensions[a] == d && product(in.Dimensions[:a]) == before {
				return one(true, a)
			}
		}
	case nn.Pad:
		return one(len(op.Pads) == in.Rank() && op.Pads[axis] == [2]int{} && (op.Mode != nn.PadConstant || op.Value == 0), axis)
	case nn.Pool:
		return one(!op.Max && axis == in.Rank()-1, axis)
	case nn.Reduce:
		if len(op.Axes) == 0 || op.Fn != "ReduceMean" && op.Fn != "ReduceSum" {
			return nil
		}
		for a, left := 0, axis; a < in.Rank(); a++ {
			reduced := slices.ContainsFunc(op.Axes, func(b int) bool { return (b+in.Rank())%in.Rank() == a })
			switch {
			case left == 0 && !reduced:
				return one(true, a)
			case op.Keep && left == 0:
				return nil
			case op.Keep || !reduced:
				left--
			}
		}
	case nn.Where:
		if wide(1) && wide(2) && narrow(0) {
			return []port{aligned(1), aligned(2)}
		}
	case nn.Concat:
		if is(op.Axis) {
			return nil
		}
		var all []port
		for i := range x.In {
			if !wide(i) {
				return nil
			}
			all = append(all, aligned(i))
		}
		return all
	}
	return nil
}

func product(dims []int) int {
	n := 1
	for _, d := range dims {
		n *= d
	}
	return n
}

// onward is carries in the other direction: the axis of a node's outputs into which the vectors of an input go.
func (g *flow) onward(x *nn.Node, from port, d int) (axis int, ok bool) {
	for a := range g.sh[x.Out[0]].Rank() {
		if slices.Contains(g.carries(x, a, d), from) {
			return a, true
		}
	}
	return 0, false
}

// unwrapped is the layer inside its training form.
func unwrapped(op nn.Op) nn.Op {
	switch d := op.(type) {
	case nn.ZeroMeanOut:
		return d.Of
	case nn.CompressedIn:
		return d.Of
	}
	return op
}

// tracer collects one stream.
type tracer struct {
	*flow
	spec     StreamSpec
	seen     map[string]bool // values of the stream
	todo     []port
	nodes    map[string]bool
	problems []*StreamError
}

func (t *tracer) fail(x *nn.Node, why error, format string, args ...any) {
	e := &StreamError{Err: why, Detail: fmt.Sprintf(format, args...)}
	if x != nil {
		e.Node, e.Op = x.Name, x.Op.Kind()
	}
	t.problems = append(t.problems, e)
}

// join makes one error of problems, the plainest first.
func join(problems []*StreamError) error {
	order := []error{ErrPostNorm, ErrSandwich}
	slices.SortStableFunc(problems, func(a, b *StreamError) int {
		rank := func(e *StreamError) int {
			if i := slices.Index(order, e.Err); i >= 0 {
				return i
			}
			return len(order)
		}
		return cmp.Compare(rank(a), rank(b))
	})
	if len(problems) == 1 {
		return problems[0]
	}
	var all []error
	for _, p := range problems {
		all = append(all, p)
	}
	return &streamErrors{all}
}

// streamErrors are many reasons; it prints one of each kind, and post-norm alone where it is among them, since nothing else
// can be said of such a stream.
type streamErrors struct{ all []error }

func (e *streamErrors) Error() string {
	var kinds []error
	first, count := map[error]error{}, map[error]int{}
	for _, p := range e.all {
		why := errors.Unwrap(p)
		if first[why] == nil {
			first[why] = p
			kinds = append(kinds, why)
		}
		count[why]++
	}
	if count[ErrPostNorm] > 0 {
		kinds = []error{ErrPostNorm}
	}
	var s []string
	for _, why := range kinds {
		line := first[why].Error()
		if n := count[why] - 1; n > 0 {
			line += fmt.Sprintf(" (and %d more nodes like it)", n)
		}
		s = append(s, line)
	}
	return strings.Join(s, "\n")
}

func (e *streamErrors) Unwrap() []error { return e.all }

// push takes a value into the stream.
func (t *tracer) push(p port) {
	if !t.seen[p.value] {
		t.seen[p.value] = true
		t.spec.axis[p.value] = p.axis
		t.todo = append(t.todo, p)
		return
	}
	if t.spec.axis[p.value] != p.axis {
		t.fail(t.prod[p.value], ErrNormAxis, "axes %d and %d of its output would both be the stream's width", p.axis, t.spec.axis[p.value])
	}
}

// run follows the stream that a norm reads, in both directions.
func (t *tracer) run(norm *nn.Node) {
	t.nodes = map[string]bool{}
	t.spec.axis = map[string]int{}
	axis, ok := t.normAxis(norm)
	if !ok {
		t.seen[norm.In[0]] = true
		t.spec.Norms = append(t.spec.Norms, NormRef{Node: norm.Name})
		t.spec.Residual = true
		t.fail(norm, ErrNormAxis, "of %s; only norms over one axis can be converted", t.sh[norm.In[0]])
		return
	}
	t.spec.Dim = t.size(port{norm.In[0], axis})
	t.push(port{norm.In[0], axis})
	for len(t.todo) > 0 {
		p := t.todo[0]
		t.todo = t.todo[1:]
		t.spec.Values = append(t.spec.Values, p.value)
		t.origin(p)
		for _, r := range t.readers[p.value] {
			t.use(p, r)
		}
		if t.output[p.value] {
			t.fail(nil, ErrUnnormed, "value %q of the stream is an output of the network; put a norm in front of it", p.value)
		}
	}
	if t.spec.Dim < 2 {
		t.fail(nil, ErrTooNarrow, "width %d; at least 2 are needed", t.spec.Dim)
	}
	order := map[string]int{}
	for i, x := range t.n.Nodes {
		order[x.Name] = i
	}
	slices.SortFunc(t.spec.Writers, func(a, b Writer) int { return order[a.Node] - order[b.Node] })
	slices.SortFunc(t.spec.Norms, func(a, b NormRef) int { return order[a.Node] - order[b.Node] })
	slices.SortStableFunc(t.spec.Readers, func(a, b Reader) int { return order[a.Node] - order[b.Node] })
	slices.SortFunc(t.spec.Scales, func(a, b LayerScale) int { return order[a.Node] - order[b.Node] })
}

// node notes a node on the stream, once.
func (t *tracer) node(x *nn.Node) bool {
	if t.nodes[x.Name] {
		return false
	}
	t.nodes[x.Name] = true
	switch op := x.Op.(type) {
	case nn.Dropout:
		t.spec.Dropouts = append(t.spec.Dropouts, x.Name)
	case nn.Reshape, nn.Expand:
		t.spec.fixed = append(t.spec.fixed, x.Name)
	case nn.Binary:
		if op.Fn == "Add" || op.Fn == "Sub" {
			t.spec.Residual = t.spec.Residual || t.isSum(x)
		}
	}
	return true
}

// isSum tells a residual sum from the addition of a table such as positions.
func (t *tracer) isSum(x *nn.Node) bool {
	for _, v := range x.In {
		if p := t.prod[v]; p != nil {
			if _, ok := p.Op.(nn.Value); ok {
				return false
			}
		}
	}
	return true
}

// normAxis is the one axis that a norm is over.
func (t *tracer) normAxis(x *nn.Node) (axis int, ok bool) {
	var axes []int
	switch op := x.Op.(type) {
	case nn.LayerNorm:
		axes = op.Axes
	case nn.RMSNorm:
		axes = op.Axes
	}
	r := t.sh[x.In[0]].Rank()
	switch len(axes) {
	case 0:
		return r - 1, true
	case 1:
		return (axes[0] + r) % r, true
	}
	return 0, false
}

// origin looks at what makes a value of the stream.
func (t *tracer) origin(p port) {
	x := t.prod[p.value]
	if x == nil {
		t.fail(nil, ErrUnknownWriter, "the network's input %q is on the stream itself; put a dense layer behind it", p.value)
		return
	}
	if in := t.carries(x, p.axis, t.spec.Dim); in != nil {
		t.node(x)
		for _, q := range in {
			t.push(q)
		}
		for _, o := range x.Out {
			t.push(port{o, p.axis})
		}
		return
	}
	if !t.node(x) {
		return
	}
	if inner := unwrapped(x.Op); t.writes(x, inner, p.axis) {
		t.spec.Writers = append(t.spec.Writers, Writer{x.Name, inner.Kind()})
		return
	}
	switch op := x.Op.(type) {
	case nn.LayerNorm, nn.RMSNorm, nn.CRMSNorm, nn.BatchNorm, nn.GroupNorm:
		if before := t.prod[x.In[0]]; before != nil && isAdd(before.Op) {
			t.fail(x, ErrPostNorm, "its output is added to again, so that layer norm's own output is the stream; only pre-norm networks can be converted")
		} else {
			t.fail(x, ErrSandwich, "its output is added to the stream; only networks whose norms stand in front of the branches alone can be converted")
		}
	case nn.Binary:
		if s, from, ok := t.layerScale(x, p.axis); ok {
			t.spec.Scales = append(t.spec.Scales, s)
			t.push(from)
			return
		}
		t.fail(x, ErrElementwise, "%s of every coordinate by its own factor, behind something else than one linear layer of its own", strings.ToLower(op.Fn))
	case nn.Dense, nn.Conv, nn.Embedding:
		if c, ok := op.(nn.Conv); ok && nn.IsPlain(c) && c.Groups > 1 {
			t.fail(x, ErrUnknownWriter, "a convolution of %d groups cannot be re-centred over its outputs", c.Groups)
			return
		}
		if nn.IsPlain(op) {
			t.fail(x, ErrUnknownWriter, "the stream's width is not the axis of its outputs")
			return
		}
		t.fail(x, ErrStoredWeight, "it is stored as %q; convert first, then compress", op.(nn.Linear).Repr().Kind())
	default:
		if elementwise(op) {
			t.fail(x, ErrElementwise, "its output is the stream; a linear layer must stand behind it")
			return
		}
		t.fail(x, ErrUnknownWriter, "want a dense layer, a convolution of one group, an embedding or a table")
	}
}

// writes says whether a node is a writer that can be re-centred along an axis of its output.
func (t *tracer) writes(x *nn.Node, op nn.Op, axis int) bool {
	if _, ok := nn.OutputAxis(op); !ok || t.n.Param(x, "w") == nil {
		return false
	}
	if v, ok := op.(nn.Value); ok {
		return v.Shape.DType.IsFloat() && (!v.Batch || axis > 0)
	}
	return axis == t.sh[x.Out[0]].Rank()-1
}

func isAdd(op nn.Op) bool {
	b, ok := op.(nn.Binary)
	return ok && (b.Fn == "Add" || b.Fn == "Sub")
}

func elementwise(op nn.Op) bool {
	switch op.(type) {
	case nn.Unary, nn.Binary, nn.GELU, nn.LeakyReLU, nn.HardSigmoid, nn.Clip, nn.Affine, nn.PReLU, nn.Dropout, nn.QuantizeDequantize, nn.Where:
		return true
	}
	return false
}

// use looks at a node that reads a value of the stream.
func (t *tracer) use(p port, x *nn.Node) {
	if b, ok := x.Op.(nn.Value); ok && b.Batch {
		return // it asks for the size of the batch only
	}
	if readsStream(x.Op) && x.In[0] == p.value {
		t.norm(x, p)
		return
	}
	if axis, ok := t.onward(x, p, t.spec.Dim); ok {
		t.node(x)
		for _, o := range x.Out {
			t.push(port{o, axis})
		}
		return
	}
	for axis := range t.sh[x.Out[0]].Rank() {
		if _, from, ok := t.layerScale(x, axis); ok && from == p {
			t.push(port{x.Out[0], axis})
			return
		}
	}
	if !t.node(x) {
		return
	}
	switch x.Op.(type) {
	case nn.CRMSNorm:
		t.fail(x, ErrCompressed, "convert the network that it was made of")
	case nn.BatchNorm, nn.GroupNorm:
		t.fail(x, ErrUnnormed, "%s does not take a token's mean away; only layer norm and RMS norm can be converted", x.Op.Kind())
	default:
		if elementwise(x.Op) {
			t.fail(x, ErrElementwise, "it reads value %q; sums, scalar factors and choices or means of tokens are accepted", p.value)
			return
		}
		t.fail(x, ErrUnnormed, "it reads value %q; a layer norm must stand in front of every reader", p.value)
	}
}

// norm notes a norm and follows what it feeds.
func (t *tracer) norm(x *nn.Node, p port) {
	if !t.node(x) {
		return
	}
	m := NormRef{Node: x.Name}
	switch op := x.Op.(type) {
	case nn.LayerNorm:
		m.Eps, m.Centres = op.Epsilon(), true
	case nn.RMSNorm:
		m.Eps = op.Epsilon()
	}
	if axis, ok := t.normAxis(x); !ok || axis != p.axis {
		t.fail(x, ErrNormAxis, "of %s; the stream's width is axis %d there", t.sh[x.In[0]], p.axis)
	}
	for _, local := range []string{"w", "b"} {
		if q := t.n.Param(x, local); q != nil && q.Value.Shape().Size() != t.spec.Dim {
			t.fail(x, ErrNormAxis, "its parameter %q has %d elements for a stream of width %d", local, q.Value.Shape().Size(), t.spec.Dim)
		}
	}
	t.follow(port{x.Out[0], p.axis}, &m, 1)
	t.spec.Norms = append(t.spec.Norms, m)
}

// follow collects the linear maps that read a norm, through what averages, chooses or rearranges its tokens.
func (t *tracer) follow(p port, m *NormRef, factor float64) {
	t.spec.axis[p.value] = p.axis
	if t.output[p.value] {
		m.Others = append(m.Others, "output")
	}
	for _, r := range t.readers[p.value] {
		if b, ok := r.Op.(nn.Value); ok && b.Batch {
			continue
		}
		if t.reads(r, p) {
			t.spec.Readers = append(t.spec.Readers, Reader{r.Name, m.Node, factor})
			continue
		}
		axis, ok := t.onward(r, p, t.spec.Dim)
		f := factor
		switch op := r.Op.(type) {
		case nn.Affine:
			f *= op.Scale
		case nn.Reduce:
			ok = ok && op.Fn == "ReduceMean"
		case nn.Slice, nn.Gather, nn.Transpose, nn.Reshape, nn.Dropout, nn.Unary:
			u, isUnary := r.Op.(nn.Unary)
			ok = ok && (!isUnary || u.Fn == "Identity")
		default:
			ok = false
		}
		if !ok || len(r.Out) != 1 {
			m.Others = append(m.Others, r.Name)
			continue
		}
		t.spec.between = append(t.spec.between, r.Name)
		t.follow(port{r.Out[0], axis}, m, f)
	}
}

// reads says whether a node is a plain linear map of a value whose width is the last axis.
func (t *tracer) reads(r *nn.Node, p port) bool {
	if len(r.In) == 0 || r.In[0] != p.value || p.axis != t.sh[p.value].Rank()-1 {
		return false
	}
	switch op := r.Op.(type) {
	case nn.ZeroMeanOut:
		d, ok := op.Of.(nn.Dense)
		return ok && nn.IsPlain(d)
	case nn.Dense:
		return nn.IsPlain(op)
	case nn.Conv: // zeros around the input are zeros of the normalised stream, but not of its bias
		return nn.IsPlain(op) && op.Groups <= 1 && !slices.ContainsFunc(op.Pad, func(p [2]int) bool { return p != [2]int{} })
	}
	return false
}

// layerScale recognises a factor per channel behind a linear layer that nothing else reads, and gives the value that is
// scaled.
func (t *tracer) layerScale(x *nn.Node, axis int) (s LayerScale, from port, ok bool) {
	b, isBinary := x.Op.(nn.Binary)
	if !isBinary || b.Fn != "Mul" || len(x.In) != 2 {
		return s, from, false
	}
	aligned := func(i int) port { return port{x.In[i], t.sh[x.In[i]].Rank() - t.sh[x.Out[0]].Rank() + axis} }
	for i := range 2 {
		g := t.prod[x.In[i]]
		if g == nil || t.size(aligned(i)) != t.spec.Dim || t.size(aligned(1-i)) != t.spec.Dim {
			continue
		}
		v, isValue := g.Op.(nn.Value)
		if !isValue || v.Batch || !v.Shape.DType.IsFloat() || v.Shape.Size() != t.spec.Dim {
			continue
		}
		s, from = LayerScale{Node: x.Name, Gain: g.Name}, aligned(1-i)
		for p := from; ; {
			y := t.prod[p.value]
			if y == nil || t.output[p.value] || len(t.readers[p.value]) != 1 {
				break
			}
			switch y.Op.(type) {
			case nn.Dense, nn.Conv:
				s.Writer = y.Name
				return s, from, t.writes(y, y.Op, p.axis)
			}
			in := t.carries(y, p.axis, t.spec.Dim)
			if len(in) != 1 {
				break
			}
			p = in[0]
		}
	}
	return s, from, false
}

package fold

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/gomlx/compute/dtypes"
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
	Dim      int          `json:"dim"`
	Writers  []Writer     `json:"writers"`
	Norms    []NormRef    `json:"norms"`
	Readers  []Reader     `json:"readers"`
	Scales   []LayerScale `json:"scales,omitempty"`
	Dropouts []string     `json:"dropouts,omitempty"` // element-wise dropout on the stream: nothing at inference
	Residual bool         `json:"residual"`           // there is a sum
	Values   []string     `json:"-"`                  // the stream's values
	between  []string     // nodes between norms and readers
	fixed    []string     // nodes on the stream whose op names the width
}

// FindStreams follows the edges of a network from every layer norm and RMS norm over the last axis: which values are a
// residual stream, what writes to it, and what reads it through which norm. It understands sums and differences, scalar
// factors, drop-path, choice, repetition, mean and rearrangement of tokens, class tokens, positions, layer scale, and
// everything that nn/zoo, nn/onnx and nn/gguf build of them.
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
		t.run(x.In[0])
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

// last is the size of a value's last axis, 1 for a scalar.
func (g *flow) last(v string) int {
	s := g.sh[v]
	if s.Rank() == 0 {
		return 1
	}
	return s.Dimensions[s.Rank()-1]
}

// carries gives the inputs of a node whose vectors along the last axis go into those of its outputs, coordinate by
// coordinate: adding a constant to all coordinates of such an input adds one to those of the output, and a coordinate can
// be left out. nil: the node does something else.
func (g *flow) carries(x *nn.Node, d int) []int {
	if len(x.In) == 0 || x.In[0] == "" {
		return nil
	}
	in, out := g.sh[x.In[0]], g.sh[x.Out[0]]
	wide := func(i int) bool { return i < len(x.In) && g.sh[x.In[i]].Rank() > 0 && g.last(x.In[i]) == d }
	narrow := func(i int) bool { return i < len(x.In) && g.last(x.In[i]) == 1 }
	if g.last(x.Out[0]) != d {
		return nil
	}
	one := func(ok bool) []int {
		if ok && wide(0) {
			return []int{0}
		}
		return nil
	}
	isLast := func(axis int) bool { return axis == -1 || axis == in.Rank()-1 }
	switch op := x.Op.(type) {
	case nn.Binary:
		switch {
		case (op.Fn == "Add" || op.Fn == "Sub") && wide(0) && wide(1):
			return []int{0, 1}
		case op.Fn == "Mul" && wide(0) && narrow(1), op.Fn == "Div" && wide(0) && narrow(1):
			return []int{0}
		case op.Fn == "Mul" && wide(1) && narrow(0):
			return []int{1}
		}
	case nn.Affine:
		return one(op.Shift == 0)
	case nn.Unary:
		return one(op.Fn == "Identity" || op.Fn == "Neg")
	case nn.Cast:
		return one(in.DType.IsFloat() && out.DType.IsFloat())
	case nn.Dropout, nn.DropPath:
		return one(true)
	case nn.Slice:
		return one(!isLast(op.Axis))
	case nn.Gather:
		return one(!isLast(op.Axis))
	case nn.Split:
		return one(!isLast(op.Axis))
	case nn.Transpose:
		return one(len(op.Perm) == in.Rank() && op.Perm[len(op.Perm)-1] == in.Rank()-1)
	case nn.Reshape, nn.Expand:
		return one(true)
	case nn.Pad:
		return one(len(op.Pads) == in.Rank() && op.Pads[in.Rank()-1] == [2]int{} && (op.Mode != nn.PadConstant || op.Value == 0))
	case nn.Reduce:
		ok := len(op.Axes) > 0 && (op.Fn == "ReduceMean" || op.Fn == "ReduceSum")
		for _, a := range op.Axes {
			ok = ok && !isLast(a)
		}
		return one(ok)
	case nn.Pool:
		return one(!op.Max)
	case nn.Where:
		if wide(1) && wide(2) && narrow(0) {
			return []int{1, 2}
		}
	case nn.Concat:
		if isLast(op.Axis) {
			return nil
		}
		var all []int
		for i := range x.In {
			if !wide(i) {
				return nil
			}
			all = append(all, i)
		}
		return all
	}
	return nil
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
	todo     []string
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

// streamErrors prints the first few of many reasons.
type streamErrors struct{ all []error }

func (e *streamErrors) Error() string {
	var s []string
	for i, p := range e.all {
		if i == 3 && len(e.all) > 4 {
			s = append(s, fmt.Sprintf("and %d more like these", len(e.all)-i))
			break
		}
		s = append(s, p.Error())
	}
	return strings.Join(s, "\n")
}

func (e *streamErrors) Unwrap() []error { return e.all }

// push takes a value into the stream.
func (t *tracer) push(v string) {
	if !t.seen[v] {
		t.seen[v] = true
		t.todo = append(t.todo, v)
	}
}

// run follows the stream from one of its values, in both directions.
func (t *tracer) run(v string) {
	t.spec.Dim = t.last(v)
	t.nodes = map[string]bool{}
	t.push(v)
	for len(t.todo) > 0 {
		v := t.todo[0]
		t.todo = t.todo[1:]
		t.spec.Values = append(t.spec.Values, v)
		t.origin(v)
		for _, r := range t.readers[v] {
			t.use(v, r)
		}
		if t.output[v] {
			t.fail(nil, ErrUnnormed, "value %q of the stream is an output of the network; put a norm in front of it", v)
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

// origin looks at what makes a value of the stream.
func (t *tracer) origin(v string) {
	x := t.prod[v]
	if x == nil {
		t.fail(nil, ErrUnknownWriter, "the network's input %q is on the stream itself; put a dense layer behind it", v)
		return
	}
	if in := t.carries(x, t.spec.Dim); in != nil {
		t.node(x)
		for _, i := range in {
			t.push(x.In[i])
		}
		for _, o := range x.Out {
			t.push(o)
		}
		return
	}
	if !t.node(x) {
		return
	}
	if inner := unwrapped(x.Op); t.writes(x, inner) {
		t.spec.Writers = append(t.spec.Writers, Writer{x.Name, inner.Kind()})
		return
	}
	switch op := x.Op.(type) {
	case nn.LayerNorm, nn.RMSNorm, nn.CRMSNorm, nn.BatchNorm, nn.GroupNorm:
		if p := t.prod[x.In[0]]; p != nil && isAdd(p.Op) {
			t.fail(x, ErrPostNorm, "its output is added to again, so that layer norm's own output is the stream; only pre-norm networks can be converted")
		} else {
			t.fail(x, ErrSandwich, "its output is added to the stream; only networks whose norms stand in front of the branches alone can be converted")
		}
	case nn.Binary:
		if s, ok := t.layerScale(x); ok {
			t.spec.Scales = append(t.spec.Scales, s)
			t.push(t.scaled(x))
			return
		}
		t.fail(x, ErrElementwise, "%s of every coordinate by its own factor, behind something else than one linear layer of its own", strings.ToLower(op.Fn))
	case nn.Dense, nn.Conv, nn.Embedding:
		if c, ok := op.(nn.Conv); ok && nn.IsPlain(c) {
			t.fail(x, ErrUnknownWriter, "a convolution of %d groups cannot be re-centred over its outputs", c.Groups)
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

// writes says whether a node is a writer that can be re-centred.
func (t *tracer) writes(x *nn.Node, op nn.Op) bool {
	if _, ok := nn.OutputAxis(op); !ok || t.n.Param(x, "w") == nil {
		return false
	}
	v, ok := op.(nn.Value)
	return !ok || v.Shape.DType.IsFloat()
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
func (t *tracer) use(v string, x *nn.Node) {
	if b, ok := x.Op.(nn.Value); ok && b.Batch {
		return // it asks for the size of the batch only
	}
	if readsStream(x.Op) && x.In[0] == v {
		t.norm(x)
		return
	}
	if in := t.carries(x, t.spec.Dim); in != nil {
		if slices.ContainsFunc(in, func(i int) bool { return x.In[i] == v }) {
			t.node(x)
			for _, o := range x.Out {
				t.push(o)
			}
			return
		}
	}
	if b, ok := x.Op.(nn.Binary); ok && b.Fn == "Mul" {
		if s, ok := t.layerScale(x); ok && t.scaled(x) == v && s.Writer != "" {
			t.push(x.Out[0])
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
			t.fail(x, ErrElementwise, "it reads value %q; sums, scalar factors and choices or means of tokens are accepted", v)
			return
		}
		t.fail(x, ErrUnnormed, "it reads value %q; a layer norm must stand in front of every reader", v)
	}
}

// norm notes a norm and follows what it feeds.
func (t *tracer) norm(x *nn.Node) {
	if !t.node(x) {
		return
	}
	m := NormRef{Node: x.Name}
	var axes []int
	switch op := x.Op.(type) {
	case nn.LayerNorm:
		axes, m.Eps, m.Centres = op.Axes, op.Epsilon(), true
	case nn.RMSNorm:
		axes, m.Eps = op.Axes, op.Epsilon()
	}
	r := t.sh[x.In[0]].Rank()
	if len(axes) > 1 || len(axes) == 1 && axes[0] != -1 && axes[0] != r-1 {
		t.fail(x, ErrNormAxis, "axes %v of %s; only norms over the last axis can be converted", axes, t.sh[x.In[0]])
	}
	for _, local := range []string{"w", "b"} {
		if p := t.n.Param(x, local); p != nil && p.Value.Shape().Size() != t.spec.Dim {
			t.fail(x, ErrNormAxis, "its parameter %q has %d elements for a stream of width %d", local, p.Value.Shape().Size(), t.spec.Dim)
		}
	}
	t.follow(x.Out[0], &m, 1)
	t.spec.Norms = append(t.spec.Norms, m)
}

// follow collects the linear maps that read a norm, through what keeps its channels.
func (t *tracer) follow(v string, m *NormRef, factor float64) {
	if t.output[v] {
		m.Others = append(m.Others, "output")
	}
	for _, r := range t.readers[v] {
		b, isValue := r.Op.(nn.Value)
		a, isAffine := r.Op.(nn.Affine)
		switch {
		case isValue && b.Batch:
		case t.reads(r, v):
			t.spec.Readers = append(t.spec.Readers, Reader{r.Name, m.Node, factor})
		case isAffine && a.Shift == 0:
			t.spec.between = append(t.spec.between, r.Name)
			t.follow(r.Out[0], m, factor*a.Scale)
		case len(r.Out) == 1 && r.In[0] == v && t.between(r, v):
			t.spec.between = append(t.spec.between, r.Name)
			t.follow(r.Out[0], m, factor)
		default:
			m.Others = append(m.Others, r.Name)
		}
	}
}

// between says whether a node behind a norm averages, chooses or rearranges tokens.
func (t *tracer) between(r *nn.Node, v string) bool {
	switch op := r.Op.(type) {
	case nn.Gather:
		return op.Axis != -1 && op.Axis != t.sh[v].Rank()-1
	case nn.Unary:
		return op.Fn == "Identity"
	}
	return len(r.In) == 1 && keepsChannels(r.Op, t.sh[v], t.sh[r.Out[0]])
}

// reads says whether a node is a plain linear map of the value.
func (t *tracer) reads(r *nn.Node, v string) bool {
	if len(r.In) == 0 || r.In[0] != v {
		return false
	}
	switch op := r.Op.(type) {
	case nn.CompressedIn:
		return true
	case nn.ZeroMeanOut:
		_, ok := op.Of.(nn.Dense)
		return ok
	case nn.Dense:
		return nn.IsPlain(op)
	case nn.Conv: // zeros around the input are zeros of the normalised stream, but not of its bias
		return nn.IsPlain(op) && op.Groups <= 1 && !slices.ContainsFunc(op.Pad, func(p [2]int) bool { return p != [2]int{} })
	}
	return false
}

// scaled is the input of a layer scale that carries the stream.
func (t *tracer) scaled(x *nn.Node) string {
	for i := range x.In {
		if p := t.prod[x.In[i]]; p != nil && t.isVector(p) {
			return x.In[1-i]
		}
	}
	return ""
}

// isVector says whether a node is a value of one factor per channel.
func (t *tracer) isVector(p *nn.Node) bool {
	v, ok := p.Op.(nn.Value)
	return ok && !v.Batch && v.Shape.DType == dtypes.Float32 && v.Shape.Size() == t.spec.Dim && t.last(p.Out[0]) == t.spec.Dim
}

// layerScale recognises a factor per channel behind a linear layer that nothing else reads.
func (t *tracer) layerScale(x *nn.Node) (s LayerScale, ok bool) {
	b, isBinary := x.Op.(nn.Binary)
	v := t.scaled(x)
	if !isBinary || b.Fn != "Mul" || len(x.In) != 2 || v == "" {
		return s, false
	}
	gain := x.In[0]
	if gain == v {
		gain = x.In[1]
	}
	s = LayerScale{Node: x.Name, Gain: t.prod[gain].Name}
	for {
		p := t.prod[v]
		if p == nil || t.output[v] || len(t.readers[v]) != 1 {
			return s, false
		}
		switch p.Op.(type) {
		case nn.Dense, nn.Conv:
			s.Writer = p.Name
			return s, t.writes(p, p.Op)
		}
		in := t.carries(p, t.spec.Dim)
		if len(in) != 1 {
			return s, false
		}
		v = p.In[in[0]]
	}
}

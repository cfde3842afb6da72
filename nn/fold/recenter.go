package fold

import (
	"errors"
	"fmt"
	"iter"
	"math"
	"slices"

	"github.com/gomlx/compute"
	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/nn"
)

// Change is a parameter that a conversion rewrote.
type Change struct {
	Param  string `json:"param"`
	What   string `json:"what"` // "gain and bias of its norm", "re-centred", ...
	Before []int  `json:"before,omitempty"`
	After  []int  `json:"after"`
}

// Recentered says what a conversion did to a network. Nodes go by the names that they had.
type Recentered struct {
	Streams []StreamSpec `json:"streams"`
	Changed []Change     `json:"changed"`
	Untied  []string     `json:"untied"`  // parameters that several nodes shared; a node of these has its own copy now
	Removed []string     `json:"removed"` // layer scale, which its writer took in, and dropout, which inference does not need
	Affine  []string     `json:"affine"`  // norms whose gain and bias stay, because something else than linear maps reads them
	Wide    []string     `json:"wide"`    // compressed norms with a dense layer behind them that gives the whole vector back
	Kept    []Kept       `json:"-"`       // norms that belong to no stream
}

// zeroMean is how far, relative to the largest weight, the mean of a writer may lie from 0 under an RMS norm.
const zeroMean = 1e-5

// ToPreRMS turns a pre-norm network with layer norms into one with RMS norms that computes the same (Jiang et al.,
// arXiv:2305.14858, section 3.1). Since every reader of the residual stream begins with a layer norm, which takes the mean
// away, the mean may be taken away where it is written:
//
//	readers of a norm   W' = W·diag(gain),  b' = b + W·bias
//	writers             W' = W − mean_out W,  b' = b − mean b;  table rows e' = e − mean e
//	norms               x/√(mean(x²) + eps), without gain and bias
//
// Each norm keeps its own eps. A layer scale is merged into its writer, dropout on the stream goes, a weight that a writer
// or reader shares with another node (a tied head) is copied first. Gain and bias stay in a norm that something else than
// linear maps reads, an output of the network for one. Norms that are RMS norms already are accepted if the stream's mean
// is 0 by their writers, to 1e-5 of the largest weight: so the result is accepted again, and stays as it is.
//
// The arithmetic is done in float64 and rounded once. The network changes in place, and not at all when an error is
// returned: a StreamError, or several joined, for post-norm and sandwich networks and the like (FindStreams).
func ToPreRMS(n *nn.Network) (Recentered, error) { return recenter(n, false) }

// ToPreCRMS is ToPreRMS with a stream of one coordinate fewer: a vector of mean zero is known by all coordinates but the
// last (section 3.2). Writers lose their last output, readers become W'[:,j] = W[:,j] − W[:,d], and the norms are
// nn.CRMSNorm. Where something else than linear maps reads a norm, a dense layer of d × (d−1) gives it the whole vector.
//
// A width of d−1 may be slower than d, since processors like even sizes: measure.
func ToPreCRMS(n *nn.Network) (Recentered, error) { return recenter(n, true) }

func recenter(n *nn.Network, compress bool) (r Recentered, err error) {
	streams, kept, err := FindStreams(n)
	if err != nil {
		return r, err
	}
	c := &converter{n: n.Clone(), wide: map[string][]float64{}, report: Recentered{Streams: streams, Kept: kept}}
	if c.sh, err = n.Shapes(0); err != nil {
		return r, err
	}
	for _, s := range streams {
		if err := c.open(s); err != nil {
			return r, err
		}
	}
	for _, s := range c.streams {
		c.fold(s)
		if compress {
			c.narrowReaders(s)
		}
	}
	for _, s := range c.streams { // a layer may read one stream and write another
		c.recenterWriters(s, compress)
		if !compress {
			c.rmsNorms(s)
		}
	}
	for _, s := range c.streams {
		if err := c.tidy(s, compress); err != nil {
			return r, err
		}
	}
	c.store()
	c.n.Prune()
	if err := c.n.Check(); err != nil {
		return r, err
	}
	if _, err := c.n.Shapes(0); err != nil {
		return r, fmt.Errorf("fold: the converted network does not fit together: %w", err)
	}
	*n = *c.n
	return c.report, nil
}

// converter rewrites a copy of a network. Parameters are held in float64 until all is done.
type converter struct {
	n       *nn.Network
	sh      map[string]shapes.Shape
	wide    map[string][]float64 // parameters by full name
	dims    map[string][]int
	streams []*stream
	report  Recentered
}

// stream is a StreamSpec with its nodes.
type stream struct {
	StreamSpec
	writers, norms []*nn.Node
	along          []int               // the axis of a writer's output that is the width, from the front of its weight
	readers        []*nn.Node          // in the order of StreamSpec.Readers
	of             map[*nn.Node]string // a reader's norm
}

// node finds a node of the specification, which is there.
func (c *converter) node(name string) *nn.Node { return c.n.Node(name) }

// own gives a node its own copy of a parameter that another node uses too.
func (c *converter) own(x *nn.Node, local string) {
	p := c.n.Param(x, local)
	if p == nil || !c.n.SharedParam(x, local) {
		return
	}
	old := p.Name
	c.n.SetParam(x, local, p.Role, []float32{0}, 1) // splits it off
	q := *p
	q.Name = x.P[local]
	v, err := p.Value.LocalClone()
	if err != nil {
		panic(fmt.Errorf("fold: copying %q: %w", old, err))
	}
	q.Value = v
	c.n.Params.Put(&q)
	if !slices.Contains(c.report.Untied, old) {
		c.report.Untied = append(c.report.Untied, old)
	}
}

// get is a node's parameter in float64, nil where it has none. Changes of the slice are stored at the end.
func (c *converter) get(x *nn.Node, local string) []float64 {
	p := c.n.Param(x, local)
	if p == nil {
		return nil
	}
	if v, ok := c.wide[p.Name]; ok {
		return v
	}
	v := nn.Float64s(p.Value)
	c.wide[p.Name] = v
	return v
}

func (c *converter) shape(x *nn.Node, local string) []int {
	p := c.n.Param(x, local)
	if d, ok := c.dims[p.Name]; ok {
		return d
	}
	return p.Value.Shape().Dimensions
}

// put replaces a node's parameter, which may be new.
func (c *converter) put(x *nn.Node, local string, role nn.Role, v []float64, dims ...int) {
	if c.n.Param(x, local) == nil {
		c.n.SetParam(x, local, role, make([]float32, len(v)), dims...)
		if w := c.n.Param(x, "w"); w != nil && w.Value.DType() == dtypes.Float64 {
			c.n.Param(x, local).Value = tensors.FromFlatDataAndDimensions(make([]float64, len(v)), dims...)
		}
	}
	name := x.P[local]
	c.wide[name] = v
	if c.dims == nil {
		c.dims = map[string][]int{}
	}
	c.dims[name] = slices.Clone(dims)
}

// store rounds the parameters to the types that they had.
func (c *converter) store() {
	for name, v := range c.wide {
		p := c.n.Params.Get(name)
		if p == nil {
			continue // it went with its norm
		}
		dims := p.Value.Shape().Dimensions
		if d, ok := c.dims[name]; ok {
			dims = d
		}
		q := *p
		if p.Value.DType() == dtypes.Float64 {
			q.Value = tensors.FromFlatDataAndDimensions(slices.Clone(v), dims...)
		} else {
			f := make([]float32, len(v))
			for i := range v {
				f[i] = float32(v[i])
			}
			q.Value = tensors.FromFlatDataAndDimensions(f, dims...)
		}
		c.n.Params.Put(&q)
	}
}

// note keeps what changed in the report.
func (c *converter) note(x *nn.Node, local, what string, before []int) {
	name := x.P[local]
	for i := range c.report.Changed {
		if k := &c.report.Changed[i]; k.Param == name {
			k.What += ", " + what
			k.After = slices.Clone(c.shape(x, local))
			return
		}
	}
	c.report.Changed = append(c.report.Changed, Change{name, what, before, slices.Clone(c.shape(x, local))})
}

// open resolves a stream's nodes, unwraps training forms, copies shared parameters and checks all values.
func (c *converter) open(spec StreamSpec) error {
	s := &stream{StreamSpec: spec, of: map[*nn.Node]string{}}
	for _, w := range spec.Writers {
		x := c.node(w.Node)
		axis, _ := nn.OutputAxis(unwrapped(x.Op))
		if _, ok := unwrapped(x.Op).(nn.Value); ok {
			axis = spec.axis[x.Out[0]]
		}
		s.writers, s.along = append(s.writers, x), append(s.along, axis)
	}
	for _, m := range spec.Norms {
		s.norms = append(s.norms, c.node(m.Node))
	}
	for _, r := range spec.Readers {
		x := c.node(r.Node)
		s.readers = append(s.readers, x)
		s.of[x] = r.Norm
	}
	var touched, formed []*nn.Node
	for _, x := range slices.Concat(s.writers, s.readers) {
		if z, ok := x.Op.(nn.ZeroMeanOut); ok {
			if z.Drop {
				return &StreamError{Node: x.Name, Op: z.Kind(), Err: ErrCompressed, Detail: "resolve the training form first (Resolve)"}
			}
			x.Op = z.Of
			formed = append(formed, x)
		}
		for _, local := range []string{"w", "b"} {
			c.own(x, local)
		}
		touched = append(touched, x)
	}
	touched = append(touched, s.norms...)
	for _, k := range spec.Scales {
		touched = append(touched, c.node(k.Gain))
	}
	for _, x := range touched {
		for _, local := range []string{"w", "b"} {
			for i, v := range c.get(x, local) {
				if math.IsNaN(v) || math.IsInf(v, 0) {
					return &StreamError{Node: x.Name, Op: x.Op.Kind(), Err: ErrNotFinite, Detail: fmt.Sprintf("element %d of %q is %g", i, x.P[local], v)}
				}
			}
		}
	}
	if err := c.fits(s); err != nil {
		return err
	}
	for _, k := range spec.Scales {
		c.layerScale(c.node(k.Writer), c.get(c.node(k.Gain), "w"))
	}
	for _, x := range formed {
		axis, _ := nn.OutputAxis(x.Op)
		c.recenterWriters(&stream{writers: []*nn.Node{x}, along: []int{axis}}, false)
	}
	centred := slices.IndexFunc(spec.Norms, func(m NormRef) bool { return !m.Centres }) < 0
	for i, x := range s.writers {
		if m := c.meanOf(x, s.along[i]); !centred && m > zeroMean {
			return &StreamError{Node: x.Name, Op: x.Op.Kind(), Err: ErrNotCentred, Detail: fmt.Sprintf(
				"its weights have a mean of %.1g of the largest over the stream, and %.0g is the most under an RMS norm; only what a layer norm reads may be re-centred", m, zeroMean)}
		}
	}
	c.streams = append(c.streams, s)
	return nil
}

// fits checks that the parameters have the stream's width, which broadcasting does not ask of a file.
func (c *converter) fits(s *stream) error {
	check := func(x *nn.Node, local string, axis, want int) error {
		p := c.n.Param(x, local)
		if p == nil {
			return nil
		}
		d := p.Value.Shape().Dimensions
		if a := axis + len(d); axis < 0 && a >= 0 && d[a] == want || axis >= 0 && axis < len(d) && d[axis] == want {
			return nil
		}
		return &StreamError{Node: x.Name, Op: x.Op.Kind(), Err: ErrShape, Detail: fmt.Sprintf("%q is %s; want %d along axis %d", p.Name, p.Value.Shape(), want, axis)}
	}
	var all []error
	for i, x := range s.writers {
		all = append(all, check(x, "w", s.along[i], s.Dim), check(x, "b", 0, s.Dim))
	}
	for _, x := range s.readers {
		all = append(all, check(x, "w", -1, s.Dim))
		if w := c.n.Param(x, "w").Value.Shape(); w.Rank() > 0 {
			all = append(all, check(x, "b", 0, w.Dimensions[0]))
		}
	}
	for _, k := range s.Scales {
		p := c.n.Param(c.node(k.Gain), "w")
		if p == nil || p.Value.Shape().Size() != s.Dim {
			all = append(all, &StreamError{Node: k.Gain, Op: "value", Err: ErrShape, Detail: fmt.Sprintf("want %d factors", s.Dim)})
		}
	}
	return errors.Join(all...)
}

// layerScale merges a factor per channel into a writer: diag(s)·(W·x + b).
func (c *converter) layerScale(x *nn.Node, scale []float64) {
	before := c.shape(x, "w")
	w := c.get(x, "w")
	per := len(w) / len(scale)
	for o, s := range scale {
		for i := o * per; i < (o+1)*per; i++ {
			w[i] *= s
		}
	}
	if b := c.get(x, "b"); b != nil {
		for o, s := range scale {
			b[o] *= s
		}
		c.note(x, "b", "its layer scale", []int{len(b)})
	}
	c.note(x, "w", "its layer scale", before)
}

// columns calls f with all vectors along an axis of a parameter: at(i) is the place of coordinate i.
func columns(dims []int, axis int, f func(at func(i int) int, d int)) {
	d, stride := dims[axis], product(dims[axis+1:])
	for o := range product(dims[:axis]) {
		for k := range stride {
			f(func(i int) int { return (o*d+i)*stride + k }, d)
		}
	}
}

// each calls f with a writer's weight and its bias, if it has one.
func (c *converter) each(x *nn.Node, axis int, f func(local string, v []float64, dims []int, axis int)) {
	for _, local := range []string{"w", "b"} {
		if v := c.get(x, local); v != nil {
			dims, a := c.shape(x, local), 0
			if local == "w" {
				a = (axis + len(dims)) % len(dims)
			}
			f(local, v, dims, a)
		}
	}
}

// meanOf is the largest mean over the stream of a writer's columns and bias, relative to its largest weight.
func (c *converter) meanOf(x *nn.Node, axis int) (worst float64) {
	c.each(x, axis, func(_ string, v []float64, dims []int, axis int) {
		largest, mean := 0., 0.
		for _, e := range v {
			largest = max(largest, math.Abs(e))
		}
		columns(dims, axis, func(at func(int) int, d int) {
			s := 0.
			for i := range d {
				s += v[at(i)]
			}
			mean = max(mean, math.Abs(s)/float64(d))
		})
		if largest > 0 {
			worst = max(worst, mean/largest)
		}
	})
	return worst
}

// fold takes gains and biases of a stream's norms into their readers, where all are linear maps.
func (c *converter) fold(s *stream) {
	for i, x := range s.norms {
		gain, bias := c.get(x, "w"), c.get(x, "b")
		if len(s.Norms[i].Others) > 0 || gain == nil && bias == nil {
			continue
		}
		for k, r := range s.readers {
			if s.of[r] != x.Name {
				continue
			}
			c.intoReader(r, gain, bias, s.Readers[k].Factor)
		}
	}
}

// intoReader makes reader(gain·x + bias) a function of x. Factor multiplies what comes out of the norm on its way.
func (c *converter) intoReader(r *nn.Node, gain, bias []float64, factor float64) {
	before := c.shape(r, "w")
	w := c.get(r, "w")
	out := before[0]
	per, d := len(w)/out, before[len(before)-1]
	if bias != nil {
		b := c.get(r, "b")
		if b == nil {
			b = make([]float64, out)
		}
		for o := range out {
			for i := range per {
				b[o] += factor * w[o*per+i] * bias[i%d]
			}
		}
		c.put(r, "b", nn.Bias, b, out)
		c.note(r, "b", "the bias of its norm", nil)
		hasBias(r)
	}
	if gain != nil {
		for i := range w {
			w[i] *= gain[i%d]
		}
	}
	c.note(r, "w", "gain and bias of its norm", before)
}

// narrowReaders lets the readers of a stream do without its last coordinate, which is minus the sum of the others.
func (c *converter) narrowReaders(s *stream) {
	for k, r := range s.readers {
		i := slices.IndexFunc(s.Norms, func(m NormRef) bool { return m.Node == s.Readers[k].Norm })
		if len(s.Norms[i].Others) > 0 {
			continue // the norm gives the whole vector
		}
		before := c.shape(r, "w")
		w, d := c.get(r, "w"), before[len(before)-1]
		v := make([]float64, 0, len(w)/d*(d-1))
		for at := 0; at < len(w); at += d {
			for j := range d - 1 {
				v = append(v, w[at+j]-w[at+d-1])
			}
		}
		after := slices.Clone(before)
		after[len(after)-1]--
		c.put(r, "w", nn.Weight, v, after...)
		c.note(r, "w", "last input taken into the others", before)
	}
}

// recenterWriters takes the mean over the output away, and the last output where the stream is compressed.
func (c *converter) recenterWriters(s *stream, compress bool) {
	for k, x := range s.writers {
		role := map[string]nn.Role{}
		c.each(x, s.along[k], func(local string, v []float64, dims []int, axis int) {
			role[local] = c.n.Param(x, local).Role
			columns(dims, axis, func(at func(int) int, d int) {
				m := 0.
				for i := range d {
					m += v[at(i)] / float64(d)
				}
				for i := range d {
					v[at(i)] -= m
				}
			})
			what := "re-centred"
			if compress {
				what = "re-centred, last output left out"
				after := slices.Clone(dims)
				after[axis]--
				block := product(dims[axis:])
				var kept []float64
				for at := 0; at < len(v); at += block { // the last coordinate ends each block
					kept = append(kept, v[at:at+block/dims[axis]*after[axis]]...)
				}
				c.put(x, local, role[local], kept, after...)
			}
			c.note(x, local, what, dims)
		})
		if v, ok := x.Op.(nn.Value); ok && compress {
			v.Shape = v.Shape.Clone()
			v.Shape.Dimensions[(s.along[k]+v.Shape.Rank())%v.Shape.Rank()]--
			x.Op = v
		} else if compress {
			x.Op = nn.Narrower(x.Op)
		}
	}
}

// rmsNorms puts RMS norms in place. Gain and bias are gone, or stay where they could not be folded.
func (c *converter) rmsNorms(s *stream) {
	for i, x := range s.norms {
		m := s.Norms[i]
		op := nn.RMSNorm{Eps: m.Eps, Axes: axesOf(x.Op), NoGain: true}
		if len(m.Others) > 0 {
			op.NoGain, op.Bias = x.P["w"] == "", x.P["b"] != ""
			if !op.NoGain || op.Bias {
				c.report.Affine = append(c.report.Affine, x.Name)
			}
		}
		x.Op = op
		if op.NoGain {
			c.drop(x, "w")
		}
		if !op.Bias {
			c.drop(x, "b")
		}
	}
}

// axesOf are the axes that a norm names.
func axesOf(op nn.Op) []int {
	switch d := op.(type) {
	case nn.LayerNorm:
		return d.Axes
	case nn.RMSNorm:
		return d.Axes
	}
	return nil
}

// compressed is the norm that takes a norm's place on a compressed stream.
func (s *stream) compressed(i int) nn.CRMSNorm {
	op := nn.CRMSNorm{Eps: s.Norms[i].Eps}
	if axes := axesOf(s.norms[i].Op); len(axes) > 0 {
		op.Axis = axes[0]
	}
	return op
}

// drop takes a parameter from a node, and from the network when it was the last that used it.
func (c *converter) drop(x *nn.Node, local string) {
	name, ok := x.P[local]
	if !ok {
		return
	}
	shared := c.n.SharedParam(x, local)
	delete(x.P, local)
	if !shared {
		c.n.Params.Delete(name)
	}
}

// tidy removes what the conversion made idle, and fits the ops that name the stream's width to a compressed one.
func (c *converter) tidy(s *stream, compress bool) error {
	if compress {
		narrow := slices.Clone(s.fixed)
		for i, x := range s.norms {
			if len(s.Norms[i].Others) > 0 {
				if s.axis[x.Out[0]] != len(c.sh[x.Out[0]].Dimensions)-1 {
					return &StreamError{Node: x.Name, Op: x.Op.Kind(), Err: ErrUnnormed, Detail: fmt.Sprintf("%q reads the norm, which is not over the last axis; only linear maps may read such a norm of a compressed stream", s.Norms[i].Others[0])}
				}
				c.widen(s, i)
				continue
			}
			x.Op = s.compressed(i)
			c.drop(x, "w")
			c.drop(x, "b")
		}
		for _, b := range s.between {
			if !c.behindWide(s, b) {
				narrow = append(narrow, b)
			}
		}
		for _, name := range narrow {
			x := c.node(name)
			switch op := x.Op.(type) {
			case nn.Reshape:
				x.Op = nn.Reshape{Dims: narrower(op.Dims, s.axis[x.Out[0]], s.Dim)}
			case nn.Expand:
				x.Op = nn.Expand{Dims: narrower(op.Dims, s.axis[x.Out[0]]-c.sh[x.Out[0]].Rank()+len(op.Dims), s.Dim)}
			}
		}
	}
	idle := slices.Clone(s.Dropouts)
	for _, k := range s.Scales {
		x := c.node(k.Node)
		gain := c.node(k.Gain)
		x.In = slices.DeleteFunc(slices.Clone(x.In), func(v string) bool { return v == gain.Out[0] })
		idle = append(idle, k.Node)
	}
	for _, name := range idle {
		if err := c.n.Bypass(name); err != nil {
			return err
		}
		c.report.Removed = append(c.report.Removed, name)
	}
	return nil
}

// narrower is a list of axes one of which is the stream's width.
func narrower(dims []int, axis, d int) []int {
	out := slices.Clone(dims)
	if axis >= 0 && axis < len(out) && out[axis] == d {
		out[axis] = d - 1
	}
	return out
}

// behindWide says whether a node reads, through others, a norm that gives the whole vector.
func (c *converter) behindWide(s *stream, name string) bool {
	for x := c.node(name); x != nil; x = c.n.Producer(x.In[0]) {
		if slices.Contains(c.report.Wide, x.Name) {
			return true
		}
		if _, ok := x.Op.(nn.CRMSNorm); ok {
			return false
		}
	}
	return false
}

// widen puts a dense layer behind a compressed norm that gives the whole vector back, with the norm's gain and bias:
// y = diag(gain)·[I; −1ᵀ]·x + bias. It takes the norm's name. The width is the last axis.
func (c *converter) widen(s *stream, i int) {
	x, d := s.norms[i], s.Dim
	gain, bias := c.get(x, "w"), c.get(x, "b")
	v := make([]float64, d*(d-1))
	for o := range d {
		g := 1.
		if gain != nil {
			g = gain[o]
		}
		for j := range d - 1 {
			switch {
			case o == j:
				v[o*(d-1)+j] = g
			case o == d-1:
				v[o*(d-1)+j] = -g
			}
		}
	}
	name := x.Name + ".compressed"
	for k := 1; c.n.Node(name) != nil || c.n.Producer(name) != nil; k++ {
		name = fmt.Sprintf("%s.compressed~%d", x.Name, k)
	}
	wide := &nn.Node{Name: x.Name, Op: nn.Dense{Out: d, NoBias: bias == nil}, In: []string{name}, Out: x.Out, P: map[string]string{}}
	b := slices.Clone(bias)
	x.Op = s.compressed(i)
	c.drop(x, "w")
	c.drop(x, "b")
	x.Name, x.Out = name, []string{name}
	c.n.Nodes = slices.Insert(c.n.Nodes, slices.Index(c.n.Nodes, x)+1, wide)
	c.put(wide, "w", nn.Weight, v, d, d-1)
	c.note(wide, "w", "gives the whole vector back", nil)
	if b != nil {
		c.put(wide, "b", nn.Bias, b, d)
	}
	c.report.Wide = append(c.report.Wide, wide.Name)
}

// ZeroMeanForm gives a pre-norm network the form in which it is trained as an RMS network (arXiv:2305.14858, section 3.1):
// writers are re-centred in every lowering (nn.ZeroMeanOut), layer norms are RMS norms with gain and bias. All parameters
// stay as they are, with their names and roles. The function is the same and so are its gradients, so every optimiser,
// with weight decay or without, takes the path that it takes on the layer norms, to rounding.
//
// With compress the stream also loses its last coordinate, and the readers, which must be dense layers, take gain and bias
// of their norm in (nn.CompressedIn). Dropout on the stream is refused: its mask would bring a mean back. Resolve ends it.
func ZeroMeanForm(n *nn.Network, compress bool) (Recentered, error) {
	streams, kept, err := FindStreams(n)
	if err != nil {
		return Recentered{}, err
	}
	c := n.Clone()
	cut := &converter{n: c, report: Recentered{Streams: streams, Kept: kept}}
	fail := func(x *nn.Node, why error, detail string) error {
		return &StreamError{Node: x.Name, Op: x.Op.Kind(), Err: why, Detail: detail}
	}
	sh, err := n.Shapes(0)
	if err != nil {
		return Recentered{}, err
	}
	for _, s := range streams {
		for v, axis := range s.axis {
			if axis != sh[v].Rank()-1 {
				return Recentered{}, fail(n.Producer(v), ErrNormAxis, "the stream's width is not the last axis; only such networks have a training form")
			}
		}
		for _, name := range s.Dropouts {
			if d := c.Node(name).Op.(nn.Dropout); d.Rate > 0 {
				return Recentered{}, fail(c.Node(name), ErrTraining, "take it out, or use drop-path")
			}
		}
		for _, k := range s.Scales {
			return Recentered{}, fail(c.Node(k.Node), ErrElementwise, "layer scale cannot be trained in this form; merge it into its writer first")
		}
		for _, m := range s.Norms {
			x := c.Node(m.Node)
			switch {
			case !m.Centres:
				return Recentered{}, fail(x, ErrNotCentred, "only networks with layer norms have this form")
			case compress && len(m.Others) > 0:
				return Recentered{}, fail(x, ErrUnnormed, fmt.Sprintf("something else than dense layers reads the norm (%s)", m.Others[0]))
			case !compress:
				x.Op = nn.RMSNorm{Eps: m.Eps, NoGain: x.P["w"] == "", Bias: x.P["b"] != ""}
			}
		}
		if compress {
			for _, r := range s.Readers {
				x, m := c.Node(r.Node), c.Node(r.Norm)
				op, ok := x.Op.(nn.Dense)
				if !ok {
					return Recentered{}, fail(x, ErrUnknownWriter, "only dense layers may read a compressed stream while training")
				}
				in := nn.CompressedIn{Of: op, Factor: r.Factor}
				if p := m.P["w"]; p != "" {
					in.Gain, x.P["gain"] = true, p
				}
				if p := m.P["b"]; p != "" {
					in.Shift, x.P["shift"] = true, p
				}
				x.Op = in
			}
			for _, m := range s.Norms {
				x := c.Node(m.Node)
				x.Op, x.P = nn.CRMSNorm{Eps: m.Eps}, map[string]string{}
			}
			for _, name := range slices.Concat(s.fixed, s.between) {
				x := c.Node(name)
				switch op := x.Op.(type) {
				case nn.Reshape:
					x.Op = nn.Reshape{Dims: narrower(op.Dims, len(op.Dims)-1, s.Dim)}
				case nn.Expand:
					x.Op = nn.Expand{Dims: narrower(op.Dims, len(op.Dims)-1, s.Dim)}
				}
			}
		}
		for _, w := range s.Writers {
			x := c.Node(w.Node)
			if _, ok := x.Op.(nn.CompressedIn); ok {
				return Recentered{}, fail(x, ErrUnknownWriter, "it reads one compressed stream and writes another; put a layer in between")
			}
			x.Op = nn.ZeroMeanOut{Of: x.Op, Drop: compress}
		}
	}
	if _, err := c.Shapes(0); err != nil {
		return Recentered{}, fmt.Errorf("fold: %w", err)
	}
	*n = *c
	return cut.report, nil
}

// Resolve turns a network in the form of ZeroMeanForm into one of plain layers that computes the same: what ToPreRMS
// gives, or ToPreCRMS for the compressed form. Others it leaves alone. It returns how many layers were resolved.
func Resolve(n *nn.Network) (layers int, err error) {
	c := &converter{n: n.Clone(), wide: map[string][]float64{}}
	var compressed, norms bool
	var tied []func()
	for _, x := range c.n.Nodes {
		switch op := x.Op.(type) {
		case nn.CompressedIn:
			c.own(x, "w")
			c.own(x, "b")
			gain, shift := c.get(x, "gain"), c.get(x, "shift")
			x.Op = op.Of
			factor := op.Factor
			if factor == 0 {
				factor = 1
			}
			if gain != nil || shift != nil {
				c.intoReader(x, gain, shift, factor)
			}
			tied = append(tied, func() { c.drop(x, "gain"); c.drop(x, "shift") })
			s := &stream{StreamSpec: StreamSpec{Norms: []NormRef{{}}, Readers: []Reader{{}}}, readers: []*nn.Node{x}}
			c.narrowReaders(s)
			layers++
		case nn.ZeroMeanOut:
			c.own(x, "w")
			c.own(x, "b")
			x.Op = op.Of
			axis, _ := nn.OutputAxis(x.Op)
			c.recenterWriters(&stream{writers: []*nn.Node{x}, along: []int{axis}}, op.Drop)
			compressed = compressed || op.Drop
			layers++
		case nn.RMSNorm:
			norms = true
		}
	}
	if layers == 0 {
		return 0, nil
	}
	for _, f := range tied {
		f()
	}
	c.store()
	if err := c.n.Check(); err != nil {
		return 0, err
	}
	if _, err := c.n.Shapes(0); err != nil {
		return 0, fmt.Errorf("fold: the resolved network does not fit together: %w", err)
	}
	if !compressed && norms { // gain and bias into the readers
		if _, err := ToPreRMS(c.n); err != nil {
			return 0, err
		}
	}
	*n = *c.n
	return layers, nil
}

// Equivalence says how far two networks' outputs are apart on the same inputs.
type Equivalence struct {
	Cases    int     `json:"cases"`
	MaxDiff  float64 `json:"max_difference"`      // largest |difference| of an output
	Largest  float64 `json:"largest_output"`      // largest |output| of the first network
	Relative float64 `json:"relative_difference"` // MaxDiff/(1 + Largest)
	Rows     int     `json:"rows"`                // vectors along the last axis of floating outputs: tokens or cases
	Top1     float64 `json:"top1"`                // share of the rows whose greatest element is the same
	same     int
}

// Add compares outputs of one batch.
func (e *Equivalence) Add(want, got []*tensors.Tensor) error {
	if len(want) != len(got) {
		return fmt.Errorf("fold: %d and %d outputs cannot be compared", len(want), len(got))
	}
	for i := range want {
		if !want[i].Shape().Equal(got[i].Shape()) {
			return fmt.Errorf("fold: output %d is %s in one network and %s in the other", i, want[i].Shape(), got[i].Shape())
		}
		if !want[i].DType().IsFloat() {
			continue
		}
		w, g := nn.Float64s(want[i]), nn.Float64s(got[i])
		width := 1
		if d := want[i].Shape().Dimensions; len(d) > 0 {
			width = max(1, d[len(d)-1])
		}
		for at := 0; at+width <= len(w); at += width {
			a, b := 0, 0
			for j := range width {
				x, y := w[at+j], g[at+j]
				diff := math.Abs(x - y)
				switch {
				case math.IsNaN(x) && math.IsNaN(y), x == y:
					diff = 0
				case math.IsNaN(diff):
					diff = math.Inf(1)
				}
				e.MaxDiff, e.Largest = max(e.MaxDiff, diff), max(e.Largest, math.Abs(x))
				if x > w[at+a] {
					a = j
				}
				if y > g[at+b] {
					b = j
				}
			}
			e.Rows++
			if a == b {
				e.same++
			}
		}
	}
	if len(want) > 0 && want[0].Rank() > 0 {
		e.Cases += want[0].Shape().Dimensions[0]
	}
	e.Relative = e.MaxDiff / (1 + e.Largest)
	if e.Rows > 0 {
		e.Top1 = float64(e.same) / float64(e.Rows)
	}
	return nil
}

// VerifyEquivalence runs two networks of the same inputs on the same batches and compares their outputs.
func VerifyEquivalence(b compute.Backend, before, after *nn.Network, batches iter.Seq2[[]*tensors.Tensor, error]) (Equivalence, error) {
	var e Equivalence
	var r [2]*nn.Runner
	for i, n := range []*nn.Network{before, after} {
		var err error
		if r[i], err = nn.NewRunner(b, n, nn.RunOptions{}); err != nil {
			return e, err
		}
		defer r[i].Finalize()
	}
	for in, err := range batches {
		if err != nil {
			return e, err
		}
		want, err := r[0].Run(in...)
		if err != nil {
			return e, err
		}
		got, err := r[1].Run(in...)
		if err != nil {
			return e, fmt.Errorf("the converted network: %w", err)
		}
		if err := e.Add(want, got); err != nil {
			return e, err
		}
	}
	return e, nil
}

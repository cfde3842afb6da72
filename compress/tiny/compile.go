package tiny

import (
	"fmt"
	"math/rand/v2"
	"slices"

	"github.com/lathe-ml/lathe/engine/kernel"
	"github.com/lathe-ml/lathe/internal/rng"
)

// CompileOptions say how a training program is built.
type CompileOptions struct {
	Inference bool // only the forward pass
	NoPrune   bool // keep the gradients that nothing needs: for tests
	NoReorder bool // all updates at the end, instead of each right behind its gradient
	// Accumulate sums the gradients of so many cases before an update; 0: 1. More than one keep the gradients in memory.
	Accumulate int
	// InPlace keeps trained weights as int8 alone and rounds every update to them at random (a tenth of a code is a code in
	// one of ten updates): a byte per trained weight. Otherwise a float32 copy is kept and rounded in the forward pass.
	// (How a device should update is not in the paper.)
	InPlace  bool
	NoQAS    bool // plain gradients of the codes
	GradBits int  // 8 rounds the gradients of every layer's output to 8 bits per channel; 0: float32
	Decay    float64
	Seed     uint64 // of the random rounding
}

// Program is a compiled training step: operations in order, and their memory.
type Program struct {
	net      *Net
	scheme   Scheme
	o        CompileOptions
	planOnly bool
	ops      []*op
	forward  int // number of operations of the forward pass
	buffers  []*Buffer
	peak     int
	arena    []float32 // a word for every byte of the plan
	scratch  [3][]float32
	pool     *kernel.Pool
	ws       *kernel.Workspace
	set      *kernel.Set
	convs    []*convRun
	source   *rand.PCG // of the random rounding
	random   *rng.Rand // on source
	in       *Buffer
	features *Buffer
	logits   []float32
	shift    []float64
	master   struct{ w, b *Buffer } // of the classifier
	label    int
	rate     float64
	count    int // cases since the last update
	loss     float64
	cut      int       // first operation that depends on what is trained
	live     []*Buffer // what it needs of those before it
	words    map[*Buffer]int
	shared   map[*Buffer]*Buffer
}

// op is an operation of a program.
type op struct {
	name          string
	reads, writes []*Buffer
	macs          int64
	update        bool // changes what is trained
	inPlace       bool // the write may take the place of a read that dies here
	sums          bool // adds to what it writes over several cases
	run           func()
}

// Compile builds the static program that trains a network by a scheme (nil: everything): it emits the forward pass and
// all backward operations, deletes those that no update needs, keeps of gradients and saved inputs the chosen channels
// only, moves each update behind its gradient, and plans the memory.
func Compile(net *Net, s *Scheme, o CompileOptions) (*Program, error) {
	return compile(net, s, o, false)
}

// compile can stop at the plan: operations and memory without what runs them.
func compile(net *Net, s *Scheme, o CompileOptions, planOnly bool) (*Program, error) {
	if err := net.Check(); err != nil {
		return nil, err
	}
	scheme := Everything(net)
	if s != nil {
		scheme = *s
	}
	if err := scheme.Check(net); err != nil {
		return nil, err
	}
	if o.Accumulate < 0 || o.GradBits != 0 && o.GradBits != 8 || !(o.Decay >= 0) {
		return nil, fmt.Errorf("tiny: accumulation %d, gradients of %d bits, decay %g; want at least 1, 0 or 8, at least 0", o.Accumulate, o.GradBits, o.Decay)
	}
	o.Accumulate = max(o.Accumulate, 1)
	p := &Program{net: net, planOnly: planOnly, scheme: scheme, o: o, words: map[*Buffer]int{}}
	if !planOnly {
		p.net, p.pool, p.ws, p.set, p.source = net.Clone(), kernel.NewPool(1), kernel.NewWorkspace(1), kernel.Best(), rng.Source(o.Seed, "tiny:rounding")
		p.random = rand.New(p.source)
	}
	e := &emitter{p: p, act: map[int]*Buffer{}, mask: map[int]*Buffer{}, grad: map[int]*Buffer{}}
	e.emit()
	if !o.NoPrune {
		p.prune()
	}
	p.lifetimes()
	p.share()
	p.lifetimes()
	p.buffers = slices.DeleteFunc(p.buffers, func(b *Buffer) bool { return b.Last < 0 })
	p.peak = Place(p.buffers)
	if planOnly {
		return p, nil
	}
	p.arena = make([]float32, p.peak)
	p.findCut()
	p.load()
	return p, nil
}

// PeakBytes is the size of the arena.
func (p *Program) PeakBytes() int { return p.peak }

// Buffers are the pieces of the arena, by offset.
func (p *Program) Buffers() []Buffer {
	var out []Buffer
	for _, b := range p.buffers {
		out = append(out, *b)
	}
	slices.SortFunc(out, func(a, b Buffer) int { return cmpBuffers(a, b) })
	return out
}

func cmpBuffers(a, b Buffer) int {
	if a.Offset != b.Offset {
		return a.Offset - b.Offset
	}
	return a.First - b.First
}

// Operations are the names of the operations, in order.
func (p *Program) Operations() []string {
	var out []string
	for _, o := range p.ops {
		out = append(out, o.name)
	}
	return out
}

// MACs are the multiply-adds of a step.
func (p *Program) MACs() (n int64) {
	for _, o := range p.ops {
		n += o.macs
	}
	return n
}

// LowerBound is the largest sum of buffers that live at once.
func (p *Program) LowerBound() int { return LowerBound(p.buffers) }

// emitter writes the operations.
type emitter struct {
	p       *Program
	act     map[int]*Buffer // by activation
	mask    map[int]*Buffer
	grad    map[int]*Buffer // gradients so far
	updates []*op           // that come at the end
}

// buffer adds a piece of so many bytes that holds so many words here.
func (e *emitter) buffer(name string, bytes, words int) *Buffer {
	b := &Buffer{Name: name, Bytes: bytes, First: -1, Last: -1}
	e.p.buffers = append(e.p.buffers, b)
	e.p.words[b] = words
	return b
}

func (e *emitter) add(o *op) { e.p.ops = append(e.p.ops, o) }

func (e *emitter) update(o *op) {
	o.update = true
	if e.p.o.NoReorder {
		e.updates = append(e.updates, o)
		return
	}
	e.add(o)
}

func (e *emitter) activation(t int, name string) *Buffer {
	n := e.p.net.Tensors[t].Size()
	bytes := n
	if e.p.net.Float {
		bytes = 4 * n
	}
	e.act[t] = e.buffer(name, bytes, n)
	return e.act[t]
}

func (e *emitter) emit() {
	p := e.p
	net := p.net
	p.in = e.activation(0, "input")
	e.add(&op{name: "input", writes: []*Buffer{p.in}, run: func() {}})
	number := 0
	for _, l := range net.Layers {
		in, out := net.Tensors[l.In[0]], net.Tensors[l.Out]
		x := e.act[l.In[0]]
		switch l.Kind {
		case Conv:
			c := newConvRun(p, l, number, p.scheme)
			p.convs = append(p.convs, c)
			number++
			if !p.o.Inference {
				c.masterB = e.buffer(l.Name+" biases", 4*out.C, out.C)
				c.masterW = e.buffer(l.Name+" weights", c.weightBytes(p.o.InPlace), len(c.index))
				if c.partial {
					c.saved = e.buffer(l.Name+" saved input", e.bytesOf(in.H*in.W*len(c.channels)), in.H*in.W*len(c.channels))
					e.add(&op{name: "save " + l.Name, reads: []*Buffer{x}, writes: []*Buffer{c.saved}, run: func() { c.save(p.at(x), p.at(c.saved)) }})
				} else {
					c.saved = x
				}
			}
			y := e.activation(l.Out, l.Name)
			m := e.masked(l.Out, l.Name)
			c.x, c.y, c.mask = x, y, m
			reads := []*Buffer{x}
			if !p.o.Inference { // what is trained
				reads = append(reads, c.masterB, c.masterW)
			}
			e.add(&op{name: "forward " + l.Name, reads: reads, writes: writes(y, m), macs: c.macs(), run: func() { c.forward(p.at(x), p.at(y), p.bits(m)) }})
		case Add:
			x2 := e.act[l.In[1]]
			y := e.activation(l.Out, l.Name)
			m := e.masked(l.Out, l.Name)
			a := newAddRun(net, l)
			e.add(&op{name: "forward " + l.Name, reads: []*Buffer{x, x2}, writes: writes(y, m), inPlace: true, run: func() { a.forward(p.at(x), p.at(x2), p.at(y), p.bits(m)) }})
		case Pool:
			y := e.activation(l.Out, l.Name)
			e.add(&op{name: "forward " + l.Name, reads: []*Buffer{x}, writes: []*Buffer{y}, run: func() { pool(p.at(x), p.at(y), in.H*in.W, net.Float) }})
		}
	}
	last := net.Layers[len(net.Layers)-1].Out
	f := net.Features()
	p.features = e.act[last]
	classes := net.Head.Classes
	p.logits = make([]float32, classes)
	d := e.buffer("gradient of the logits", 4*classes, classes)
	var reads []*Buffer
	if !p.o.Inference {
		p.master.w, p.master.b = e.buffer("classifier weights", 4*classes*f.C, classes*f.C), e.buffer("classifier biases", 4*classes, classes)
		reads = []*Buffer{p.master.w, p.master.b}
	}
	e.add(&op{name: "classifier", reads: append([]*Buffer{p.features}, reads...), writes: []*Buffer{d}, macs: int64(classes * f.C), run: func() { p.classify(p.at(d)) }})
	p.forward = len(p.ops)
	if p.o.Inference {
		return
	}
	e.backward(last, d)
	p.ops = append(p.ops, e.updates...)
}

// writes drops the mask of a program without a backward pass.
func writes(y, m *Buffer) []*Buffer {
	if m == nil {
		return []*Buffer{y}
	}
	return []*Buffer{y, m}
}

func (e *emitter) bytesOf(n int) int {
	if e.p.net.Float {
		return 4 * n
	}
	return n
}

func (e *emitter) masked(t int, name string) *Buffer {
	if e.p.o.Inference {
		return nil
	}
	n := e.p.net.Tensors[t].Size()
	e.mask[t] = e.buffer(name+" mask", (n+7)/8, (n+7)/8)
	return e.mask[t]
}

// gradient returns the buffer of an activation's gradient, and whether something is in it already.
func (e *emitter) gradient(t int, name string) (g *Buffer, add bool) {
	if g := e.grad[t]; g != nil {
		return g, true
	}
	n := e.p.net.Tensors[t].Size()
	e.grad[t] = e.buffer("gradient of "+name, 4*n, n)
	return e.grad[t], false
}

// reading lists what an operation reads to add to a gradient.
func reading(add bool, g *Buffer, more ...*Buffer) []*Buffer {
	if add {
		return append([]*Buffer{g}, more...)
	}
	return more
}

func (e *emitter) backward(last int, d *Buffer) {
	p, net := e.p, e.p.net
	f := net.Features()
	classes := net.Head.Classes
	g, _ := e.gradient(last, "features")
	e.add(&op{name: "backward classifier", reads: []*Buffer{d, p.master.w}, writes: []*Buffer{g}, macs: int64(classes * f.C), run: func() { p.classifierInput(p.at(d), p.at(g)) }})
	dw := e.buffer("gradient of the classifier", 4*classes*(f.C+1), classes*(f.C+1))
	keep := p.o.Accumulate > 1
	var before []*Buffer
	if keep {
		before = []*Buffer{dw}
	}
	e.add(&op{name: "gradient classifier", sums: keep, reads: append([]*Buffer{d, p.features}, before...), writes: []*Buffer{dw}, macs: int64(classes * f.C), run: func() { p.classifierGradient(p.at(d), p.at(dw), keep) }})
	e.update(&op{name: "update classifier", reads: []*Buffer{dw, p.master.w, p.master.b}, writes: []*Buffer{p.master.w, p.master.b}, run: func() { p.classifierUpdate(p.at(dw)) }})

	number := len(p.convs)
	for _, l := range slices.Backward(net.Layers) {
		g := e.grad[l.Out]
		if l.Kind == Conv {
			number--
		}
		if g == nil {
			continue
		}
		in, out := net.Tensors[l.In[0]], net.Tensors[l.Out]
		switch l.Kind {
		case Conv:
			c := p.convs[number]
			m := e.mask[l.Out]
			e.add(&op{name: "mask " + l.Name, reads: []*Buffer{g, m}, writes: []*Buffer{g}, run: func() { c.maskGradient(p.at(g), p.bits(m), p.o.GradBits) }})
			db := e.buffer("gradient of "+l.Name+" biases", 4*out.C, out.C)
			dw := e.buffer("gradient of "+l.Name+" weights", 4*len(c.index), len(c.index))
			c.gradB, c.gradW = db, dw
			again := func(b *Buffer) []*Buffer { return reading(keep, b) }
			e.add(&op{name: "gradient " + l.Name + " biases", sums: keep, reads: append([]*Buffer{g}, again(db)...), writes: []*Buffer{db}, run: func() { c.biasGradient(p.at(g), p.at(db), keep) }})
			dx, add := e.gradient(l.In[0], l.Name+" input")
			if l.In[0] != 0 || p.o.NoPrune {
				e.add(&op{name: "backward " + l.Name, reads: reading(add, dx, g), writes: []*Buffer{dx}, macs: c.macs(), run: func() { c.inputGradient(p.at(g), p.at(dx), add) }})
			}
			e.add(&op{name: "gradient " + l.Name + " weights", sums: keep, reads: append([]*Buffer{g, c.saved}, again(dw)...), writes: []*Buffer{dw}, macs: c.macs() * int64(len(c.channels)) / int64(max(in.C, 1)), run: func() {
				c.weightGradient(p.at(g), p.at(c.saved), p.at(dw), keep)
			}})
			_, trained := p.scheme.Weights[number]
			if trained && len(c.index) > 0 {
				e.update(&op{name: "update " + l.Name + " weights", reads: []*Buffer{dw, c.masterW}, writes: []*Buffer{c.masterW}, run: func() { c.updateWeights(p.at(dw)) }})
			}
			if number >= len(p.convs)-p.scheme.Biases {
				e.update(&op{name: "update " + l.Name + " biases", reads: []*Buffer{db, c.masterB}, writes: []*Buffer{c.masterB}, run: func() { c.updateBiases(p.at(db)) }})
			}
		case Add:
			m := e.mask[l.Out]
			e.add(&op{name: "mask " + l.Name, reads: []*Buffer{g, m}, writes: []*Buffer{g}, run: func() { maskOnly(p.at(g), p.bits(m)) }})
			a := newAddRun(net, l)
			for i, t := range l.In {
				dx, add := e.gradient(t, l.Name+" input")
				f := a.factor(i)
				e.add(&op{name: fmt.Sprintf("backward %s.%d", l.Name, i), reads: append([]*Buffer{g}, reading(add, dx)...), writes: []*Buffer{dx}, inPlace: !add && i == 1, run: func() { scaled(p.at(g), p.at(dx), f, add) }})
			}
		case Pool:
			dx, add := e.gradient(l.In[0], l.Name+" input")
			e.add(&op{name: "backward " + l.Name, reads: append([]*Buffer{g}, reading(add, dx)...), writes: []*Buffer{dx}, run: func() { unpool(p.at(g), p.at(dx), in.H*in.W, add) }})
		}
	}
}

// prune deletes operations that no update and no output needs, and what is written for them alone.
func (p *Program) prune() {
	needed := map[*Buffer]bool{}
	var kept []*op
	forward := 0
	for i, o := range slices.Backward(p.ops) {
		fwd := i < p.forward
		use := o.update || i == p.forward-1 || slices.ContainsFunc(o.writes, func(b *Buffer) bool { return needed[b] })
		if !use {
			continue
		}
		o.writes = slices.DeleteFunc(o.writes, func(b *Buffer) bool { return !needed[b] && !o.update })
		for _, b := range o.reads {
			needed[b] = true
		}
		kept = append(kept, o)
		if fwd {
			forward++
		}
	}
	slices.Reverse(kept)
	p.ops, p.forward = kept, forward
	// trained copies of what is not trained are not kept
	trained := map[*Buffer]bool{}
	for _, o := range p.ops {
		if o.update {
			for _, b := range o.writes {
				trained[b] = true
			}
		}
	}
	for _, c := range p.convs {
		for _, b := range []**Buffer{&c.masterB, &c.masterW} {
			if *b != nil && !trained[*b] {
				for _, o := range p.ops {
					o.reads = slices.DeleteFunc(o.reads, func(r *Buffer) bool { return r == *b })
				}
				*b = nil
			}
		}
	}
}

// persistent buffers live through all steps.
func (p *Program) persistent() map[*Buffer]bool {
	keep := map[*Buffer]bool{}
	mark := func(b ...*Buffer) {
		for _, x := range b {
			if x != nil {
				keep[x] = true
			}
		}
	}
	mark(p.master.w, p.master.b)
	for _, c := range p.convs {
		mark(c.masterB, c.masterW)
	}
	for _, o := range p.ops {
		if o.sums {
			mark(o.writes...)
		}
	}
	return keep
}

func (p *Program) lifetimes() {
	for _, b := range p.buffers {
		b.First, b.Last = -1, -1
	}
	for i, o := range p.ops {
		for _, b := range slices.Concat(o.reads, o.writes) {
			if b.First < 0 {
				b.First = i
			}
			b.Last = i
		}
	}
	for b := range p.persistent() {
		if b.Last >= 0 {
			b.First, b.Last = 0, len(p.ops)-1
		}
	}
}

// lasting are the buffers that live through all steps, in the order in which they were made: with the random rounding and the
// number of cases, all that a step leaves to the next.
func (p *Program) lasting() []*Buffer {
	keep := p.persistent()
	return slices.DeleteFunc(slices.Clone(p.buffers), func(b *Buffer) bool { return !keep[b] })
}

// share lets elementwise results take the place of an operand that dies with them.
func (p *Program) share() {
	instead := map[*Buffer]*Buffer{}
	for i, o := range p.ops {
		if !o.inPlace || len(o.writes) == 0 {
			continue
		}
		y := o.writes[0]
		for _, x := range o.reads {
			x = resolve(instead, x)
			if x.Last != i || y.First != i || x.Bytes != y.Bytes || p.words[x] != p.words[y] || x == y {
				continue
			}
			instead[y], x.Last = x, y.Last
			break
		}
	}
	for _, o := range p.ops {
		for k, b := range o.reads {
			o.reads[k] = resolve(instead, b)
		}
		for k, b := range o.writes {
			o.writes[k] = resolve(instead, b)
		}
	}
	p.shared = instead
}

func resolve(instead map[*Buffer]*Buffer, b *Buffer) *Buffer {
	for instead[b] != nil {
		b = instead[b]
	}
	return b
}

// at returns the words of a buffer.
func (p *Program) at(b *Buffer) []float32 {
	r := resolve(p.shared, b)
	return p.arena[r.Offset : r.Offset+p.words[b]]
}

// bits returns the words of a mask, nil when it is not kept.
func (p *Program) bits(b *Buffer) []float32 {
	if b == nil || b.Last < 0 {
		return nil
	}
	return p.at(b)
}

// findCut finds the first operation that depends on what is trained, and what it and those behind it read of the ones
// before.
func (p *Program) findCut() {
	p.cut = p.forward - 1
	for i, o := range p.ops[:p.forward] {
		if slices.ContainsFunc(o.reads, func(b *Buffer) bool { return p.trained(b) }) {
			p.cut = i
			break
		}
	}
	keep := p.persistent()
	for _, b := range p.buffers {
		if b.First < p.cut && b.Last >= p.cut && !keep[b] {
			p.live = append(p.live, b)
		}
	}
}

func (p *Program) trained(b *Buffer) bool {
	if b == p.master.w || b == p.master.b {
		return b != nil
	}
	return slices.ContainsFunc(p.convs, func(c *convRun) bool { return b != nil && (b == c.masterB || b == c.masterW) })
}

// load fills the trained copies.
func (p *Program) load() {
	if p.o.Inference {
		return
	}
	copy(p.at(p.master.w), p.net.Head.W)
	copy(p.at(p.master.b), p.net.Head.B)
	for _, c := range p.convs {
		if c.masterB != nil && c.masterB.Last >= 0 {
			copy(p.at(c.masterB), c.layer.Bias)
		}
		if c.masterW != nil && c.masterW.Last >= 0 {
			c.loadWeights(p.at(c.masterW))
		}
	}
}

// Close frees the program.
func (p *Program) Close() {
	if p.pool != nil {
		p.pool.Close()
		p.pool, p.arena = nil, nil
	}
}

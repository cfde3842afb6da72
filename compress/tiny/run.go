package tiny

import (
	"fmt"
	"math"

	"github.com/lathe-ml/lathe/engine/kernel"
)

// convRun computes one convolution of a program.
type convRun struct {
	p        *Program
	layer    *Layer
	in, out  Tensor
	channels []int   // input channels whose weights have a gradient
	partial  bool    // they are not all
	index    []int32 // position in layer.Weight of each element of the weights' gradient

	x, y, mask, saved, masterB, masterW, gradB, gradW *Buffer

	// w are the codes that the forward pass uses: as in layer.Weight, or [taps, channels] when depthwise.
	w       []float32
	rowSum  []float64 // of w, by output channel
	scale   []float64 // e of each output channel
	lo, hi  float64
	padded  [2]int // of the input with its zeros
	direct  bool   // 1×1, stride 1, no padding: the input is the matrix
	product *kernel.Gemm
	back    *kernel.Gemm
	weights *kernel.Gemm
}

// Scratch memory of the host, which a device's direct loops do not need.
const (
	scratchInput  = iota // an input without its zero point, padded
	scratchOutput        // sums, and gradients of patches
	scratchChosen        // a gradient's chosen channels
)

func (p *Program) need(which, n int) []float32 {
	if len(p.scratch[which]) < n {
		p.scratch[which] = make([]float32, n)
	}
	return p.scratch[which][:n]
}

func span(n, step int) []int32 {
	out := make([]int32, n)
	for i := range out {
		out[i] = int32(i * step)
	}
	return out
}

func newConvRun(p *Program, l *Layer, number int, s Scheme) *convRun {
	c := &convRun{p: p, layer: l, in: p.net.Tensors[l.In[0]], out: p.net.Tensors[l.Out]}
	ci := c.in.C
	if _, ok := s.Weights[number]; ok {
		c.channels = s.channels(p.net, number)
	} else {
		for i := range ci {
			c.channels = append(c.channels, i)
		}
	}
	c.partial = len(c.channels) < ci
	taps, pixels := l.taps(), c.out.H*c.out.W
	if l.Depthwise {
		for tap := range taps {
			for _, ch := range c.channels {
				c.index = append(c.index, int32(ch*taps+tap))
			}
		}
	} else {
		for o := range c.out.C {
			for tap := range taps {
				for _, ch := range c.channels {
					c.index = append(c.index, int32((o*taps+tap)*ci+ch))
				}
			}
		}
	}
	if p.planOnly {
		return c
	}
	c.scale = make([]float64, c.out.C)
	for o := range c.scale {
		c.scale[o] = c.in.Scale * l.Scale[o] / c.out.Scale
	}
	c.lo, c.hi = l.clamp(c.out, p.net.Float)
	c.padded = [2]int{c.in.H + l.Pad[0][0] + l.Pad[0][1], c.in.W + l.Pad[1][0] + l.Pad[1][1]}
	c.direct = taps == 1 && l.Stride == [2]int{1, 1} && l.Pad == [2][2]int{}
	c.w = make([]float32, len(l.Weight))
	c.rowSum = make([]float64, c.out.C)
	for i := range l.Weight {
		c.set(i, l.Weight[i])
	}
	c.sums()
	p.need(scratchInput, c.padded[0]*c.padded[1]*ci)
	p.need(scratchOutput, max(c.out.Size(), pixels*taps*ci))
	p.need(scratchChosen, max(c.out.Size(), c.padded[0]*c.padded[1]*ci))
	if l.Depthwise {
		return c
	}
	k := taps * ci
	base, off := c.windows(ci)
	if c.direct {
		base = span(pixels, ci)
	}
	c.product = kernel.NewGemm(p.set, kernel.Operand{Batch: []int32{0}, Rows: base, K: off}, kernel.Operand{Batch: []int32{0}, Rows: span(c.out.C, k), K: span(k, 1)}, []int32{0}, span(pixels, c.out.C))
	p.ws.Grow(c.product)
	if p.o.Inference {
		return c
	}
	c.back = kernel.NewGemm(p.set, kernel.Operand{Batch: []int32{0}, Rows: span(pixels, c.out.C), K: span(c.out.C, 1)}, kernel.Operand{Batch: []int32{0}, Rows: span(k, 1), K: span(c.out.C, k)}, []int32{0}, span(pixels, k))
	p.ws.Grow(c.back)
	if n := len(c.channels); n > 0 {
		base, off := c.windows(n)
		if c.direct {
			base = span(pixels, n)
		}
		c.weights = kernel.NewGemm(p.set, kernel.Operand{Batch: []int32{0}, Rows: span(c.out.C, 1), K: span(pixels, c.out.C)}, kernel.Operand{Batch: []int32{0}, Rows: off, K: base}, []int32{0}, span(c.out.C, taps*n))
		p.ws.Grow(c.weights)
	}
	return c
}

// windows are the places of each output's window in a padded input of so many channels, and of its elements in it.
func (c *convRun) windows(channels int) (base, off []int32) {
	l := c.layer
	for oy := range c.out.H {
		for ox := range c.out.W {
			base = append(base, int32((oy*l.Stride[0]*c.padded[1]+ox*l.Stride[1])*channels))
		}
	}
	for ky := range l.Kernel[0] {
		for kx := range l.Kernel[1] {
			for i := range channels {
				off = append(off, int32((ky*c.padded[1]+kx)*channels+i))
			}
		}
	}
	return base, off
}

func (c *convRun) weightBytes(inPlace bool) int {
	if inPlace {
		return len(c.index)
	}
	return 4 * len(c.index)
}

func (c *convRun) macs() int64 {
	k := int64(c.layer.taps())
	if !c.layer.Depthwise {
		k *= int64(c.in.C)
	}
	return k * int64(c.out.Size())
}

// set gives a weight, by its position in layer.Weight, the code of a real number.
func (c *convRun) set(i int, v float32) {
	if !c.p.net.Float {
		v = float32(min(max(math.RoundToEven(float64(v)), -127), 127))
	}
	if c.layer.Depthwise {
		taps := c.layer.taps()
		i = i%taps*c.out.C + i/taps
	}
	c.w[i] = v
}

// sums brings rowSum up to date.
func (c *convRun) sums() {
	clear(c.rowSum)
	if !c.direct {
		return // the zero point is taken off the input
	}
	per := len(c.w) / c.out.C
	for o := range c.rowSum {
		s := 0.
		for _, v := range c.w[o*per : (o+1)*per] {
			s += float64(v)
		}
		c.rowSum[o] = s
	}
}

// centred writes x − zero with the padding's zeros around; x has so many channels.
func (c *convRun) centred(dst, x []float32, channels int) {
	l, z := c.layer, float32(c.in.Zero)
	if l.Pad != [2][2]int{} {
		clear(dst)
	}
	row := c.in.W * channels
	for y := range c.in.H {
		to := dst[((y+l.Pad[0][0])*c.padded[1]+l.Pad[1][0])*channels:][:row]
		for i, v := range x[y*row : (y+1)*row] {
			to[i] = v - z
		}
	}
}

// forward computes y and its mask (nil: none).
func (c *convRun) forward(x, y, mask []float32) {
	p, l := c.p, c.layer
	n := c.out.C
	acc := p.scratch[scratchOutput][:c.out.Size()]
	if c.direct && !l.Depthwise {
		c.product.Run(p.pool, p.ws, x, c.w, acc, false)
	} else {
		xh := p.scratch[scratchInput][:c.padded[0]*c.padded[1]*c.in.C]
		c.centred(xh, x, c.in.C)
		if l.Depthwise {
			clear(acc)
			c.taps(n, func(q, tap, pixel int) {
				a := acc[pixel*n : (pixel+1)*n]
				p.set.MulAdd(a, xh[q:q+n], c.w[tap*n:(tap+1)*n], a)
			})
		} else {
			c.product.Run(p.pool, p.ws, xh, c.w, acc, false)
		}
	}
	bias := c.layer.Bias
	if c.masterB != nil && c.masterB.Last >= 0 {
		bias = p.at(c.masterB)
	}
	zx, zy := float64(c.in.Zero), float64(c.out.Zero)
	if !c.direct || l.Depthwise {
		zx = 0
	}
	shift := p.shifts(n)
	for o := range shift {
		b := float64(bias[o])
		if !p.net.Float {
			b = math.RoundToEven(b)
		}
		shift[o] = b - zx*c.rowSum[o]
	}
	c.requantise(acc, y, mask, shift, zy)
}

// halfEven, added and taken away again, rounds a float64 below 2⁵¹ half to even. (A conversion in front of the sum keeps
// the compiler from fusing it with a product.)
const halfEven = 3 << 51

// requantise turns sums into codes. Its loops have no branches that depend on the values: whether a ReLU cuts one off
// cannot be predicted.
func (c *convRun) requantise(acc, y, mask []float32, shift []float64, zy float64) {
	n := c.out.C
	lo, hi := c.lo, c.hi
	m := newMasker(mask)
	round := float64(halfEven)
	if c.p.net.Float {
		round = 0
	}
	for at := 0; at < len(acc); at += n {
		a, to := acc[at:at+n], y[at:at+n]
		shift, scale := shift[:len(a)], c.scale[:len(a)]
		to = to[:len(a)]
		if mask == nil {
			for o, v := range a {
				to[o] = float32(min(max(float64((float64(v)+shift[o])*scale[o])+round-round+zy, lo), hi))
			}
			continue
		}
		for o, v := range a {
			r := float64((float64(v)+shift[o])*scale[o]) + round - round + zy
			code := min(max(r, lo), hi)
			to[o] = float32(code)
			m.put(at+o, code == r)
		}
	}
	m.flush(len(acc))
}

func (p *Program) shifts(n int) []float64 {
	if len(p.shift) < n {
		p.shift = make([]float64, n)
	}
	return p.shift[:n]
}

// masker writes a bit per element, eight to a word.
type masker struct {
	words []float32
	byte  uint8
}

func newMasker(words []float32) masker { return masker{words: words} }

func (m *masker) put(i int, inside bool) {
	var bit uint8
	if inside {
		bit = 1
	}
	if m.byte |= bit << (i & 7); i&7 == 7 {
		m.store(i >> 3)
	}
}

func (m *masker) store(word int) {
	if m.words != nil {
		m.words[word] = float32(m.byte)
	}
	m.byte = 0
}

func (m *masker) flush(n int) {
	if n&7 != 0 {
		m.store(n >> 3)
	}
}

// maskBits reads a mask in order.
type maskBits struct {
	words []float32
	byte  uint8
}

// next is 1 where the element, the next one in order, was inside, else 0.
func (m *maskBits) next(i int) float32 {
	if i&7 == 0 {
		m.byte = uint8(m.words[i>>3])
	}
	bit := m.byte & 1
	m.byte >>= 1
	return float32(bit)
}

// taps calls f for every product of a depthwise convolution: the place in the padded input, the tap and the output pixel.
func (c *convRun) taps(channels int, f func(q, tap, pixel int)) {
	l := c.layer
	for oy := range c.out.H {
		for ox := range c.out.W {
			tap := 0
			for ky := range l.Kernel[0] {
				for kx := range l.Kernel[1] {
					f(((oy*l.Stride[0]+ky)*c.padded[1]+ox*l.Stride[1]+kx)*channels, tap, oy*c.out.W+ox)
					tap++
				}
			}
		}
	}
}

// save copies the chosen channels of the input.
func (c *convRun) save(x, dst []float32) {
	n := 0
	for at := 0; at < len(x); at += c.in.C {
		for _, ch := range c.channels {
			dst[n] = x[at+ch]
			n++
		}
	}
}

// maskGradient turns the gradient of ȳ into that of the sum, in place.
func (c *convRun) maskGradient(g, mask []float32, bits int) {
	n := c.out.C
	m := maskBits{words: mask}
	for at := 0; at < len(g); at += n {
		row := g[at : at+n]
		scale := c.scale[:len(row)]
		for o := range row {
			row[o] *= float32(scale[o]) * m.next(at+o)
		}
	}
	if bits != 8 {
		return
	}
	for o := range n {
		top := float32(0)
		for i := o; i < len(g); i += n {
			top = max(top, g[i], -g[i])
		}
		if top == 0 {
			continue
		}
		s := float64(top) / 127
		for i := o; i < len(g); i += n {
			g[i] = float32(math.RoundToEven(float64(g[i])/s) * s)
		}
	}
}

func (c *convRun) biasGradient(g, db []float32, add bool) {
	if !add {
		clear(db)
	}
	c.p.set.SumCols(db, g)
}

// inputGradient computes dL/dx̄.
func (c *convRun) inputGradient(g, dx []float32, add bool) {
	p, l := c.p, c.layer
	if c.direct && !l.Depthwise {
		c.back.Run(p.pool, p.ws, g, c.w, dx, add)
		return
	}
	ci := c.in.C
	padded := p.scratch[scratchInput][:c.padded[0]*c.padded[1]*ci]
	clear(padded)
	if l.Depthwise {
		c.taps(ci, func(q, tap, pixel int) {
			d := padded[q : q+ci]
			p.set.MulAdd(d, g[pixel*ci:(pixel+1)*ci], c.w[tap*ci:(tap+1)*ci], d)
		})
	} else {
		cols := p.scratch[scratchOutput][:c.out.H*c.out.W*l.taps()*ci]
		c.back.Run(p.pool, p.ws, g, c.w, cols, false)
		c.taps(ci, func(q, tap, pixel int) {
			d := padded[q : q+ci]
			p.set.Binary[kernel.Add](d, d, cols[(pixel*l.taps()+tap)*ci:][:ci])
		})
	}
	row := c.in.W * ci
	for y := range c.in.H {
		from := padded[((y+l.Pad[0][0])*c.padded[1]+l.Pad[1][0])*ci:][:row]
		if to := dx[y*row : (y+1)*row]; add {
			p.set.Binary[kernel.Add](to, to, from)
		} else {
			copy(to, from)
		}
	}
}

// weightGradient computes dL/dw̄ of the chosen channels from what was saved of the input.
func (c *convRun) weightGradient(g, saved, dw []float32, add bool) {
	p, l := c.p, c.layer
	n := len(c.channels)
	if n == 0 {
		return
	}
	if l.Depthwise {
		xh := p.scratch[scratchInput][:c.padded[0]*c.padded[1]*n]
		c.centred(xh, saved, n)
		if c.partial {
			chosen := p.scratch[scratchChosen][:c.out.H*c.out.W*n]
			for pixel := range c.out.H * c.out.W {
				for k, ch := range c.channels {
					chosen[pixel*n+k] = g[pixel*c.out.C+ch]
				}
			}
			g = chosen
		}
		if !add {
			clear(dw)
		}
		c.taps(n, func(q, tap, pixel int) {
			d := dw[tap*n : (tap+1)*n]
			p.set.MulAdd(d, xh[q:q+n], g[pixel*n:(pixel+1)*n], d)
		})
		return
	}
	xh := p.scratch[scratchInput][:c.padded[0]*c.padded[1]*n]
	c.centred(xh, saved, n)
	c.weights.Run(p.pool, p.ws, g, xh, dw, add)
}

// loadWeights fills the trained copy.
func (c *convRun) loadWeights(master []float32) {
	for j, i := range c.index {
		if master[j] = c.layer.Weight[i]; c.p.o.InPlace && !c.p.net.Float {
			master[j] = float32(math.RoundToEven(float64(master[j])))
		}
	}
}

// recode brings the codes that the forward pass uses up to date with the trained copy.
func (c *convRun) recode() {
	if c.masterW == nil || c.masterW.Last < 0 {
		return
	}
	master := c.p.at(c.masterW)
	for j, i := range c.index {
		c.set(int(i), master[j])
	}
	c.sums()
}

// updateWeights takes a step of SGD on the codes; with QAS the gradient is scaled by s_w⁻².
func (c *convRun) updateWeights(dw []float32) {
	p := c.p
	if !p.due() {
		return
	}
	master := p.at(c.masterW)
	per := len(c.layer.Weight) / c.out.C
	for j, i := range c.index {
		g := float64(dw[j])
		if s := c.layer.Scale[int(i)/per]; !p.o.NoQAS || p.net.Float {
			g /= s * s
		}
		v := float64(master[j]) - p.rate*(g+p.o.Decay*float64(master[j]))
		if p.o.InPlace && !p.net.Float {
			v = math.Floor(v + p.random.Float64())
		}
		if !p.net.Float {
			v = min(max(v, -127), 127)
		}
		master[j] = float32(v)
		c.set(int(i), master[j])
	}
	c.sums()
	if p.o.Accumulate > 1 {
		clear(dw)
	}
}

// updateBiases takes a step on the biases; with QAS the gradient is scaled by (s_w·s_x)⁻².
func (c *convRun) updateBiases(db []float32) {
	p := c.p
	if !p.due() {
		return
	}
	master := p.at(c.masterB)
	for o := range master {
		g := float64(db[o])
		if s := c.layer.Scale[o] * c.in.Scale; !p.o.NoQAS || p.net.Float {
			g /= s * s
		}
		master[o] -= float32(p.rate * g)
	}
	if p.o.Accumulate > 1 {
		clear(db)
	}
}

// addRun computes a sum of two activations.
type addRun struct {
	s1, s2, z1, z2, sy, zy, lo, hi float64
	float                          bool
}

func newAddRun(net *Net, l *Layer) addRun {
	a, b, y := net.Tensors[l.In[0]], net.Tensors[l.In[1]], net.Tensors[l.Out]
	r := addRun{s1: a.Scale, s2: b.Scale, z1: float64(a.Zero), z2: float64(b.Zero), sy: y.Scale, zy: float64(y.Zero), float: net.Float}
	r.lo, r.hi = l.clamp(y, net.Float)
	return r
}

func (a addRun) forward(x1, x2, y, mask []float32) {
	m := newMasker(mask)
	round := float64(halfEven)
	if a.float {
		round = 0
	}
	for i := range y {
		v := ((float64(x1[i])-a.z1)*a.s1+(float64(x2[i])-a.z2)*a.s2)/a.sy + round - round + a.zy
		code := min(max(v, a.lo), a.hi)
		y[i] = float32(code)
		m.put(i, code == v)
	}
	m.flush(len(y))
}

func (a addRun) factor(i int) float32 {
	if i == 0 {
		return float32(a.s1 / a.sy)
	}
	return float32(a.s2 / a.sy)
}

func maskOnly(g, mask []float32) {
	m := maskBits{words: mask}
	for i := range g {
		g[i] *= m.next(i)
	}
}

func scaled(g, dx []float32, f float32, add bool) {
	for i, v := range g {
		if add {
			dx[i] += v * f
		} else {
			dx[i] = v * f
		}
	}
}

// pool averages over the pixels, rounded.
func pool(x, y []float32, pixels int, float bool) {
	n := len(y)
	for c := range y {
		s := 0.
		for i := c; i < len(x); i += n {
			s += float64(x[i])
		}
		if s /= float64(pixels); !float {
			s = math.RoundToEven(s)
		}
		y[c] = float32(s)
	}
}

func unpool(g, dx []float32, pixels int, add bool) {
	for at := 0; at < len(dx); at += len(g) {
		for c, v := range g {
			if v /= float32(pixels); add {
				dx[at+c] += v
			} else {
				dx[at+c] = v
			}
		}
	}
}

func (p *Program) head() (w, b []float32) {
	if p.o.Inference {
		return p.net.Head.W, p.net.Head.B
	}
	return p.at(p.master.w), p.at(p.master.b)
}

// feature is a real value that the classifier reads.
func (p *Program) feature(x []float32, c int, t Tensor) float64 {
	return (float64(x[c]) - float64(t.Zero)) * t.Scale
}

// classify computes logits, loss and the gradient of the logits.
func (p *Program) classify(d []float32) {
	w, b := p.head()
	x, t := p.at(p.features), p.net.Features()
	top := math.Inf(-1)
	for k := range p.logits {
		s := float64(b[k])
		for c := range x {
			s += p.feature(x, c, t) * float64(w[k*len(x)+c])
		}
		p.logits[k] = float32(s)
		top = max(top, s)
	}
	sum := 0.
	for _, v := range p.logits {
		sum += math.Exp(float64(v) - top)
	}
	if p.label < 0 {
		return
	}
	p.loss = math.Log(sum) + top - float64(p.logits[p.label])
	for k, v := range p.logits {
		q := math.Exp(float64(v)-top) / sum
		if k == p.label {
			q--
		}
		d[k] = float32(q / float64(p.o.Accumulate))
	}
}

func (p *Program) classifierInput(d, g []float32) {
	w, _ := p.head()
	s := p.net.Features().Scale
	for c := range g {
		v := 0.
		for k := range d {
			v += float64(d[k]) * float64(w[k*len(g)+c])
		}
		g[c] = float32(v * s)
	}
}

func (p *Program) classifierGradient(d, dw []float32, add bool) {
	x, t := p.at(p.features), p.net.Features()
	if !add {
		clear(dw)
	}
	for k, v := range d {
		for c := range x {
			dw[k*len(x)+c] += float32(float64(v) * p.feature(x, c, t))
		}
		dw[len(d)*len(x)+k] += v
	}
}

func (p *Program) classifierUpdate(dw []float32) {
	if !p.due() {
		return
	}
	w, b := p.head()
	for i := range w {
		w[i] -= float32(p.rate * (float64(dw[i]) + p.o.Decay*float64(w[i])))
	}
	for k := range b {
		b[k] -= float32(p.rate * float64(dw[len(w)+k]))
	}
	if p.o.Accumulate > 1 {
		clear(dw)
	}
}

// due says whether this case completes the ones that an update is made of.
func (p *Program) due() bool { return p.count%p.o.Accumulate == 0 }

// Step trains on one case and returns its loss: forward, backward and, once Accumulate cases are seen, the update.
func (p *Program) Step(x []float32, label int, rate float64) (loss float64, err error) {
	if err := p.check(label, rate); err != nil {
		return 0, err
	}
	if err := p.net.quantizeInput(p.at(p.in), x); err != nil {
		return 0, err
	}
	return p.step(0, label, rate), nil
}

func (p *Program) check(label int, rate float64) error {
	switch {
	case p.arena == nil:
		return fmt.Errorf("tiny: the program is closed")
	case p.o.Inference:
		return fmt.Errorf("tiny: a program for inference does not train")
	case label < 0 || label >= p.net.Head.Classes:
		return fmt.Errorf("tiny: label %d; the classifier has %d classes", label, p.net.Head.Classes)
	case !(rate >= 0) || math.IsInf(rate, 0):
		return fmt.Errorf("tiny: learning rate %g; want a number of at least 0", rate)
	}
	return nil
}

func (p *Program) step(from, label int, rate float64) float64 {
	p.label, p.rate = label, rate
	p.count++
	for _, o := range p.ops[from:] {
		o.run()
	}
	return p.loss
}

// Classify returns the logits of one case; they are overwritten by the next.
func (p *Program) Classify(x []float32) ([]float32, error) {
	if p.arena == nil {
		return nil, fmt.Errorf("tiny: the program is closed")
	}
	if err := p.net.quantizeInput(p.at(p.in), x); err != nil {
		return nil, err
	}
	p.infer(0)
	return p.logits, nil
}

func (p *Program) infer(from int) {
	p.label = -1
	for _, o := range p.ops[from:p.forward] {
		o.run()
	}
}

// Trained returns the network as it has been trained so far.
func (p *Program) Trained() *Net {
	n := p.net.Clone()
	if p.o.Inference {
		return n
	}
	copy(n.Head.W, p.at(p.master.w))
	copy(n.Head.B, p.at(p.master.b))
	for i, l := range n.Convs() {
		c := p.convs[i]
		if c.masterB != nil && c.masterB.Last >= 0 {
			copy(l.Bias, p.at(c.masterB))
		}
		if c.masterW != nil && c.masterW.Last >= 0 {
			for j, v := range p.at(c.masterW) {
				l.Weight[c.index[j]] = v
			}
		}
	}
	return n
}

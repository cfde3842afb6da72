package onnx

import (
	"math"
	"slices"

	"github.com/lathe-ml/lathe/nn/onnx/internal/pb"
)

// Patterns that exporters write out in pieces are put together again, so that folding, norm replacement and quantisers
// find them. A recognised node keeps its output's name; its op begins with ~ and fused holds its parameters.
type (
	fusedNorm struct { // ~LayerNorm, ~RMSNorm: one input
		axes       []int
		eps        float64
		gain, bias []float32 // in row-major order of the axes; nil: none
	}
	fusedSoftmax struct{ axis int }       // ~Softmax
	fusedMatMul  struct{ scale float64 }  // ~MatMul: two inputs
	fusedDense   struct{ bias []float32 } // ~Dense: x, W [in, out]
	fusedQDQ     struct {
		scale, zero []float32
		axis        int
		dtype       pb.TensorProto_DataType
	} // ~QDQ
)

type fuser struct {
	g    *graph
	uses map[string]int
}

// fuse rewrites the graph until it has seen every node once; a node's inputs are in their final form by then.
func (g *graph) fuse() {
	f := &fuser{g: g}
	f.dropIdentities()
	g.prune()
	f.uses = g.uses()
	for _, n := range g.nodes {
		f.dropExpand(n)
		for _, match := range []func(*node) bool{
			f.gelu, f.hardSwish, f.silu, f.norm, f.crms, f.normGain, f.normBias, f.softmax, f.denseBias, f.convBias, f.scaledMatMul, f.qdq,
		} {
			if match(n) {
				break
			}
		}
	}
	g.prune()
}

func (f *fuser) prod(name string, op string) *node {
	if v := f.g.values[name]; v != nil && v.prod != nil && v.c == nil && v.prod.op == op && v.prod.out[0] == name {
		return v.prod
	}
	return nil
}

// scalar is the one element of a floating constant.
func (f *fuser) scalar(name string) (float64, bool) {
	if v := f.g.values[name]; v != nil && v.c != nil && isFloat(v.dtype) && v.c.i == nil && v.c.size() == 1 {
		return float64(v.c.floats()[0]), true
	}
	return 0, false
}

func (f *fuser) become(n *node, op string, fused any, in ...string) bool {
	n.op, n.fused, n.in, n.attrs = op, fused, in, nil
	return true
}

func near(a, b float64) bool { return math.Abs(a-b) <= 1e-3*math.Abs(b)+1e-12 }

// dropIdentities lets the readers of values that are only another name for their input read the input.
func (f *fuser) dropIdentities() {
	g := f.g
	alias := map[string]string{}
	for _, n := range g.nodes {
		for i, in := range n.in {
			if a, ok := alias[in]; ok {
				n.in[i] = a
			}
		}
		out := g.values[n.out[0]]
		if out.c != nil || len(n.in) == 0 || n.in[0] == "" {
			continue
		}
		src, same := n.in[0], false
		switch n.op {
		case "Identity", "Dropout":
			same = true
		case "Cast":
			x := g.values[src].dtype
			same = x == out.dtype || isFloat(x) && isFloat(out.dtype)
		case "Reshape", "Expand", "Slice", "Squeeze", "Unsqueeze", "Flatten", "Tile":
			same = slices.Equal(g.values[src].shape, out.shape) && g.values[src].c == nil
			if n.op == "Slice" && same {
				s, err := g.sliceSpecs(n, g.values[src])
				same = err == nil && len(s) == 0
			}
		case "Add", "Sub", "Mul", "Div":
			unit := 0.
			if n.op == "Mul" || n.op == "Div" {
				unit = 1
			}
			if c, ok := f.scalar(n.in[1]); ok && c == unit {
				same = true
			} else if c, ok := f.scalar(n.in[0]); ok && c == unit && (n.op == "Add" || n.op == "Mul") {
				src, same = n.in[1], true
			}
			same = same && slices.Equal(g.values[src].shape, out.shape) && g.values[src].c == nil
		}
		if same && !slices.Contains(g.outputs, n.out[0]) {
			alias[n.out[0]] = src
		} else if same {
			n.op, n.in, n.attrs = "Identity", []string{src}, nil
		}
	}
}

// dropExpand reads a value before its Expand where the elementwise op broadcasts anyway.
func (f *fuser) dropExpand(n *node) {
	if foldBinary[n.op] == nil || len(n.in) != 2 {
		return
	}
	g := f.g
	for i := range 2 {
		x := f.prod(n.in[i], "Expand")
		if x == nil {
			continue
		}
		s, err := joinShapes(g.values[x.in[0]].shape, g.values[n.in[1-i]].shape)
		if err == nil && slices.Equal(s, g.values[n.out[0]].shape) {
			f.uses[n.in[i]]--
			n.in[i] = x.in[0]
			f.uses[n.in[i]]++
		}
	}
}

// factors flattens a product: coefficient, factors, divisors. Values named in stop are not taken apart.
func (f *fuser) factors(name string, stop ...string) (c float64, num, den []string) {
	c = 1
	var walk func(s string, inverse bool, depth int)
	walk = func(s string, inverse bool, depth int) {
		if v, ok := f.scalar(s); ok {
			if inverse {
				v = 1 / v
			}
			c *= v
			return
		}
		if depth < 8 && !slices.Contains(stop, s) {
			if m := f.prod(s, "Mul"); m != nil {
				walk(m.in[0], inverse, depth+1)
				walk(m.in[1], inverse, depth+1)
				return
			}
			if m := f.prod(s, "Div"); m != nil {
				walk(m.in[0], inverse, depth+1)
				walk(m.in[1], !inverse, depth+1)
				return
			}
			if m := f.prod(s, "Reciprocal"); m != nil {
				walk(m.in[0], !inverse, depth+1)
				return
			}
		}
		if inverse {
			den = append(den, s)
		} else {
			num = append(num, s)
		}
	}
	walk(name, false, 0)
	return c, num, den
}

// sumWith takes a sum of a value and a scalar constant apart.
func (f *fuser) sumWith(name string) (x string, c float64, ok bool) {
	if n := f.prod(name, "Add"); n != nil {
		for i := range 2 {
			if c, ok := f.scalar(n.in[i]); ok {
				return n.in[1-i], c, true
			}
		}
	}
	return "", 0, false
}

// gelu recognises x/2·(1 + erf(x/√2)) and x/2·(1 + tanh(√(2/π)(x + 0.044715x³))) in any order of the factors.
func (f *fuser) gelu(n *node) bool {
	if n.op != "Mul" && n.op != "Div" {
		return false
	}
	out := n.out[0]
	_, num, _ := f.factors(out)
	for _, gate := range num {
		inner, one, ok := f.sumWith(gate)
		if !ok || !near(one, 1) {
			continue
		}
		if e := f.prod(inner, "Erf"); e != nil {
			c, x := f.scaled(e.in[0])
			if near(c, math.Sqrt2/2) && f.isProduct(out, .5, x, gate) {
				return f.become(n, "~Gelu", false, x)
			}
		}
		if t := f.prod(inner, "Tanh"); t != nil {
			if x := f.cubic(t.in[0]); x != "" && f.isProduct(out, .5, x, gate) {
				return f.become(n, "~Gelu", true, x)
			}
		}
	}
	return false
}

// scaled takes a value times scalar constants apart.
func (f *fuser) scaled(name string) (float64, string) {
	c := 1.
	for range 4 {
		m, div := f.prod(name, "Mul"), f.prod(name, "Div")
		if m != nil {
			if v, ok := f.scalar(m.in[1]); ok {
				c, name = c*v, m.in[0]
				continue
			}
			if v, ok := f.scalar(m.in[0]); ok {
				c, name = c*v, m.in[1]
				continue
			}
		}
		if div != nil {
			if v, ok := f.scalar(div.in[1]); ok {
				c, name = c/v, div.in[0]
				continue
			}
		}
		break
	}
	return c, name
}

// isProduct says whether a value is c times exactly these factors.
func (f *fuser) isProduct(name string, c float64, want ...string) bool {
	got, num, den := f.factors(name, want...)
	slices.Sort(num)
	w := slices.Sorted(slices.Values(want))
	return near(got, c) && len(den) == 0 && slices.Equal(num, w)
}

// cubic recognises √(2/π)(x + 0.044715x³) and gives x.
func (f *fuser) cubic(name string) string {
	c, s := f.scaled(name)
	if near(c, math.Sqrt(2/math.Pi)) {
		if a := f.prod(s, "Add"); a != nil {
			for i := range 2 {
				x, t := a.in[i], a.in[1-i]
				if f.isProduct(t, .044715, x, x, x) {
					return x
				}
				if k, p := f.scaled(t); near(k, .044715) {
					if q := f.prod(p, "Pow"); q != nil && q.in[0] == x {
						if e, ok := f.scalar(q.in[1]); ok && e == 3 {
							return x
						}
					}
				}
			}
		}
	}
	// √(2/π)·x·(1 + 0.044715x²)
	_, num, _ := f.factors(name)
	for _, gate := range num {
		if t, one, ok := f.sumWith(gate); ok && near(one, 1) {
			for _, x := range num {
				if x != gate && f.isProduct(t, .044715, x, x) && f.isProduct(name, math.Sqrt(2/math.Pi), x, gate) {
					return x
				}
			}
		}
	}
	return ""
}

// clipRange are the bounds of a Clip.
func (g *graph) clipRange(n *node) (lo, hi float64, ok bool) {
	lo, hi = n.float("min", math.Inf(-1)), n.float("max", math.Inf(1))
	for i, p := range []*float64{&lo, &hi} {
		v := g.arg(n, i+1)
		if v == nil {
			continue
		}
		if v.c == nil || v.c.size() != 1 {
			return 0, 0, false
		}
		*p = float64(v.c.floats()[0])
	}
	if lo <= -math.MaxFloat32 {
		lo = math.Inf(-1)
	}
	if hi >= math.MaxFloat32 {
		hi = math.Inf(1)
	}
	return lo, hi, true
}

// hardSwish recognises x·clip(x + 3, 0, 6)/6 and x·hardsigmoid(x; 1/6, 1/2).
func (f *fuser) hardSwish(n *node) bool {
	if n.op != "Mul" && n.op != "Div" {
		return false
	}
	out := n.out[0]
	_, num, _ := f.factors(out)
	for _, gate := range num {
		if c := f.prod(gate, "Clip"); c != nil {
			lo, hi, ok := f.g.clipRange(c)
			x, three, isSum := f.sumWith(c.in[0])
			if ok && isSum && lo == 0 && near(hi, 6) && near(three, 3) && f.isProduct(out, 1./6, x, gate) {
				return f.become(n, "HardSwish", nil, x)
			}
		}
		if h := f.prod(gate, "HardSigmoid"); h != nil && near(h.float("alpha", .2), 1./6) && near(h.float("beta", .5), .5) && f.isProduct(out, 1, h.in[0], gate) {
			return f.become(n, "HardSwish", nil, h.in[0])
		}
	}
	return false
}

// silu recognises x·sigmoid(x).
func (f *fuser) silu(n *node) bool {
	if n.op != "Mul" {
		return false
	}
	for i := range 2 {
		if s := f.prod(n.in[i], "Sigmoid"); s != nil && s.in[0] == n.in[1-i] {
			return f.become(n, "~Silu", nil, s.in[0])
		}
	}
	return false
}

// broadcastOf goes back through reshapes and expansions that only insert axes of one and repeat, and through Max with
// a constant that cannot matter.
func (f *fuser) broadcastOf(name string, idle float64) string {
	for range 8 {
		v := f.g.values[name]
		if v == nil || v.prod == nil || v.c != nil {
			return name
		}
		switch n := v.prod; n.op {
		case "Expand", "Reshape", "Unsqueeze", "Squeeze":
			name = n.in[0]
			continue
		case "Max":
			if len(n.in) == 2 {
				if c, ok := f.scalar(n.in[0]); ok && c <= idle {
					name = n.in[1]
					continue
				}
				if c, ok := f.scalar(n.in[1]); ok && c <= idle {
					name = n.in[0]
					continue
				}
			}
		}
		return name
	}
	return name
}

// keepsAxes says whether a statistic of x over axes lies along x when it is broadcast.
func (f *fuser) keepsAxes(stat, x string, axes []int) bool {
	for range 3 { // the shape in front of an Expand is the telling one
		if e := f.prod(stat, "Expand"); e != nil {
			stat = e.in[0]
		}
	}
	s, xs := f.g.values[stat].shape, f.g.values[x].shape
	if len(s) != len(xs) {
		return false
	}
	for i, d := range s {
		want := xs[i]
		if slices.Contains(axes, i) {
			want = fixed(1)
		}
		if d != want {
			return false
		}
	}
	return true
}

// meanOf recognises the mean of a value over axes, as ReduceMean or as a sum times 1/n.
func (f *fuser) meanOf(name string) (x string, axes []int, ok bool) {
	reduced := func(op, s string) (string, []int, bool) {
		n := f.prod(s, op)
		if n == nil {
			return "", nil, false
		}
		axes, _, err := f.g.reduceAxes(n, len(f.g.values[n.in[0]].shape))
		return n.in[0], axes, err == nil
	}
	if x, axes, ok = reduced("ReduceMean", name); ok {
		return x, axes, true
	}
	c, s := f.scaled(name)
	if x, axes, ok = reduced("ReduceSum", s); !ok {
		return "", nil, false
	}
	n := 1
	for _, a := range axes {
		d := f.g.values[x].shape[a]
		if !d.static() {
			return "", nil, false
		}
		n *= d.c
	}
	return x, axes, near(c*float64(n), 1)
}

// squareOf recognises z² and gives z.
func (f *fuser) squareOf(name string) string {
	if m := f.prod(name, "Mul"); m != nil && m.in[0] == m.in[1] {
		return m.in[0]
	}
	if p := f.prod(name, "Pow"); p != nil {
		if e, ok := f.scalar(p.in[1]); ok && e == 2 {
			return p.in[0]
		}
	}
	return ""
}

// centred recognises x − mean(x) over axes.
func (f *fuser) centred(name string) (x string, axes []int, ok bool) {
	s := f.prod(name, "Sub")
	if s == nil {
		return "", nil, false
	}
	x, axes, ok = f.meanOf(f.broadcastOf(s.in[1], math.Inf(-1)))
	return x, axes, ok && x == s.in[0] && f.keepsAxes(s.in[1], x, axes)
}

// norm recognises (x − mean)/√(var + eps) and x/√(mean(x²) + eps), with a gain among the factors or not.
func (f *fuser) norm(n *node) bool {
	if n.op != "Div" && n.op != "Mul" {
		return false
	}
	c, num, den := f.factors(n.out[0])
	if c != 1 || len(den) != 1 || len(num) < 1 || len(num) > 2 {
		return false
	}
	root := f.prod(den[0], "Sqrt")
	if root == nil {
		return false
	}
	v, eps, ok := f.sumWith(root.in[0])
	if !ok || eps < 0 {
		return false
	}
	stat := f.broadcastOf(v, 0)
	gain := ""
	if len(num) == 2 {
		for i := range 2 {
			if f.g.values[num[i]].c != nil {
				gain = num[i]
				num = []string{num[1-i]}
				break
			}
		}
		if gain == "" {
			return false
		}
	}
	z := num[0]
	var axes []int
	op, x := "~LayerNorm", ""
	if cx, cAxes, ok := f.centred(z); ok { // variance of the same value over the same axes
		x, axes = cx, cAxes
		if !f.isVariance(stat, x, axes) {
			return false
		}
	} else {
		sq, a, ok := f.meanOf(stat)
		if !ok || f.squareOf(sq) != z {
			return false
		}
		op, x, axes = "~RMSNorm", z, a
	}
	if !f.keepsAxes(v, x, axes) || !slices.Equal(f.g.values[n.out[0]].shape, f.g.values[x].shape) {
		return false
	}
	p := &fusedNorm{axes: axes, eps: eps}
	if gain != "" {
		if p.gain, ok = f.along(gain, x, axes); !ok {
			return false
		}
	}
	return f.become(n, op, p, x)
}

// isVariance recognises mean((x−mean)²) and mean(x²) − mean².
func (f *fuser) isVariance(name, x string, axes []int) bool {
	if sq, a, ok := f.meanOf(name); ok && slices.Equal(a, axes) {
		if z := f.squareOf(sq); z != "" {
			cx, ca, ok := f.centred(z)
			return ok && cx == x && slices.Equal(ca, axes)
		}
	}
	if s := f.prod(name, "Sub"); s != nil {
		sq, a, ok := f.meanOf(s.in[0])
		m, b, ok2 := f.meanOf(f.squareOf(s.in[1]))
		return ok && ok2 && f.squareOf(sq) == x && m == x && slices.Equal(a, axes) && slices.Equal(b, axes)
	}
	return false
}

// along gives a constant's values as a parameter over axes of x: it must have their sizes there and 1 elsewhere.
func (f *fuser) along(name, x string, axes []int) ([]float32, bool) {
	v := f.g.values[name]
	if v == nil || v.c == nil || !isFloat(v.dtype) || v.c.i != nil {
		return nil, false
	}
	xs := f.g.values[x].shape
	off := len(xs) - len(v.c.dims)
	if off < 0 {
		return nil, false
	}
	dims := make([]int, 0, len(axes))
	for i, d := range xs {
		have := 1
		if i >= off {
			have = v.c.dims[i-off]
		}
		if slices.Contains(axes, i) {
			if !d.static() || (have != d.c && have != 1) {
				return nil, false
			}
			dims = append(dims, d.c)
		} else if have != 1 {
			return nil, false
		}
	}
	squeezed := make([]int, 0, len(axes))
	for _, a := range axes {
		if a >= off {
			squeezed = append(squeezed, v.c.dims[a-off])
		} else {
			squeezed = append(squeezed, 1)
		}
	}
	if f.g.afford(fixedShape(dims)) != nil {
		return nil, false
	}
	flat := *v.c
	flat.dims = squeezed
	return spread(&flat, dims).f, true
}

// normGain takes a following constant factor into the norm, normBias a following constant summand.
func (f *fuser) normGain(n *node) bool {
	return n.op == "Mul" && f.absorb(n, func(p *fusedNorm, c []float32) bool {
		if p.gain != nil || p.bias != nil {
			return false
		}
		p.gain = c
		return true
	})
}

func (f *fuser) normBias(n *node) bool {
	return n.op == "Add" && f.absorb(n, func(p *fusedNorm, c []float32) bool {
		if p.bias != nil {
			return false
		}
		p.bias = c
		return true
	})
}

func (f *fuser) absorb(n *node, put func(p *fusedNorm, c []float32) bool) bool {
	for i := range 2 {
		v := f.g.values[n.in[i]]
		if v.prod == nil || f.uses[n.in[i]] != 1 {
			continue
		}
		p, ok := v.prod.fused.(*fusedNorm)
		if !ok || v.prod.op == "~RMSNorm" && n.op == "Add" {
			continue
		}
		if c, ok := f.along(n.in[1-i], v.prod.in[0], p.axes); ok {
			q := *p
			if put(&q, c) {
				return f.become(n, v.prod.op, &q, v.prod.in[0])
			}
		}
	}
	return false
}

// softmax recognises exp(x − max x)/Σexp(x − max x), and without the maximum.
func (f *fuser) softmax(n *node) bool {
	if n.op != "Div" {
		return false
	}
	e := f.prod(n.in[0], "Exp")
	if e == nil {
		return false
	}
	sum := f.prod(f.broadcastOf(n.in[1], math.Inf(-1)), "ReduceSum")
	if sum == nil || sum.in[0] != n.in[0] {
		return false
	}
	x := e.in[0]
	axes, _, err := f.g.reduceAxes(sum, len(f.g.values[x].shape))
	if err != nil || len(axes) != 1 || axes[0] == 0 || !f.keepsAxes(n.in[1], x, axes) {
		return false
	}
	if s := f.prod(x, "Sub"); s != nil {
		m := f.prod(f.broadcastOf(s.in[1], math.Inf(-1)), "ReduceMax")
		if m != nil && m.in[0] == s.in[0] {
			if a, _, err := f.g.reduceAxes(m, len(f.g.values[x].shape)); err == nil && slices.Equal(a, axes) && f.keepsAxes(s.in[1], s.in[0], axes) {
				x = s.in[0]
			}
		}
	}
	return f.become(n, "~Softmax", fusedSoftmax{axes[0]}, x)
}

// denseBias recognises x·W + b with constant W [in, out] and b over the outputs.
func (f *fuser) denseBias(n *node) bool {
	if n.op != "Add" {
		return false
	}
	for i := range 2 {
		m := f.prod(n.in[i], "MatMul")
		if m == nil || f.uses[n.in[i]] != 1 || !f.isWeight(m.in[1]) {
			continue
		}
		s := f.g.values[n.in[i]].shape
		if !slices.Equal(s, f.g.values[n.out[0]].shape) {
			continue
		}
		if b, ok := f.along(n.in[1-i], n.in[i], []int{len(s) - 1}); ok {
			return f.become(n, "~Dense", fusedDense{b}, m.in...)
		}
	}
	return false
}

// isWeight says whether a value is a constant matrix.
func (f *fuser) isWeight(name string) bool {
	v := f.g.values[name]
	return v != nil && v.c != nil && len(v.c.dims) == 2 && isFloat(v.dtype)
}

// convBias takes a constant per channel behind a convolution without bias into it.
func (f *fuser) convBias(n *node) bool {
	if n.op != "Add" {
		return false
	}
	for i := range 2 {
		for _, op := range []string{"Conv", "ConvTranspose"} {
			m := f.prod(n.in[i], op)
			if m == nil || f.uses[n.in[i]] != 1 || m.input(2) != "" || !slices.Equal(f.g.values[n.in[i]].shape, f.g.values[n.out[0]].shape) {
				continue
			}
			b, ok := f.along(n.in[1-i], n.in[i], []int{1})
			if !ok {
				continue
			}
			name := n.out[0] + "/bias"
			if f.g.define(name, &value{c: &tensor{dtype: tFloat, dims: []int{len(b)}, f: b}}) != nil {
				continue
			}
			attrs, fused := m.attrs, m.fused
			f.become(n, op, fused, m.in[0], m.in[1], name)
			n.attrs = attrs
			return true
		}
	}
	return false
}

// scaledMatMul takes a scalar factor behind a product of two computed values into it: attention's 1/√d.
func (f *fuser) scaledMatMul(n *node) bool {
	if n.op != "Mul" && n.op != "Div" {
		return false
	}
	c, x := f.scaled(n.out[0])
	m := f.prod(x, "MatMul")
	if m == nil || f.uses[x] != 1 || c == 1 || c == 0 || f.g.values[m.in[0]].c != nil || f.g.values[m.in[1]].c != nil || !slices.Equal(f.g.values[x].shape, f.g.values[n.out[0]].shape) {
		return false
	}
	return f.become(n, "~MatMul", fusedMatMul{c}, m.in...)
}

// qdq recognises an activation that is quantised and dequantised on the same grid.
func (f *fuser) qdq(n *node) bool {
	if n.op != "DequantizeLinear" {
		return false
	}
	q := f.prod(n.in[0], "QuantizeLinear")
	if q == nil || len(n.in) < 2 || len(q.in) < 2 || q.int("axis", 1) != n.int("axis", 1) || n.int("block_size", 0) != 0 || q.int("block_size", 0) != 0 {
		return false
	}
	s, z, ok := f.grid(n)
	s2, z2, ok2 := f.grid(q)
	if !ok || !ok2 || !slices.Equal(s, s2) || !slices.Equal(z, z2) {
		return false
	}
	p := fusedQDQ{scale: s, zero: z, axis: -1, dtype: f.g.values[n.in[0]].dtype}
	if len(s) > 1 {
		a, err := axisOf(n.int("axis", 1), len(f.g.values[q.in[0]].shape))
		if err != nil || f.g.values[q.in[0]].shape[a] != fixed(len(s)) {
			return false
		}
		p.axis = a
	}
	switch p.dtype {
	case tUint8, tInt8, tUint4, tInt4:
	default:
		return false
	}
	return f.become(n, "~QDQ", p, q.in[0])
}

func (f *fuser) grid(n *node) (scale, zero []float32, ok bool) {
	s := f.g.arg(n, 1)
	if s == nil || s.c == nil || len(s.c.dims) > 1 {
		return nil, nil, false
	}
	scale = s.c.floats()
	zero = make([]float32, len(scale))
	if z := f.g.arg(n, 2); z != nil {
		if z.c == nil || z.c.size() != len(scale) {
			return nil, nil, false
		}
		zero = z.c.floats()
	}
	return scale, zero, true
}

package onnx

import (
	"errors"
	"fmt"
	"math"
	"slices"

	"github.com/lathe-ml/lathe/nn/onnx/internal/pb"
)

// inference gives the outputs of a node their type and shape, and their value where the inputs are constants.
type inference func(g *graph, n *node) error

// inferences is the table of operators that are understood; builders has the same keys for those that can remain
// after folding.
func inferences() map[string]inference {
	m := map[string]inference{
		"Constant": inferConstant, "Shape": inferShape, "Size": inferSize, "Identity": inferIdentity, "Dropout": inferIdentity,
		"Cast": inferCast, "CastLike": inferCast, "Reshape": inferReshape, "Flatten": inferFlatten, "Transpose": inferTranspose,
		"Squeeze": inferSqueeze, "Unsqueeze": inferUnsqueeze, "Concat": inferConcat, "Slice": inferSlice, "Split": inferSplit,
		"Gather": inferGather, "Expand": inferExpand, "Tile": inferTile, "Pad": inferPad, "ConstantOfShape": inferConstantOfShape,
		"Range": inferRange, "DepthToSpace": inferDepthToSpace, "SpaceToDepth": inferSpaceToDepth, "Where": inferWhere,
		"Conv": inferConv, "ConvTranspose": inferConvTranspose, "MatMul": inferMatMul, "Gemm": inferGemm,
		"AveragePool": inferPool, "MaxPool": inferPool, "GlobalAveragePool": inferGlobalPool, "GlobalMaxPool": inferGlobalPool,
		"ArgMax": inferArgMax, "Resize": inferResize, "OneHot": inferOneHot, "Trilu": inferTrilu,
		"QuantizeLinear": inferQuantize, "DequantizeLinear": inferDequantize,
		"BatchNormalization": inferSame, "LayerNormalization": inferSame, "InstanceNormalization": inferSame, "GroupNormalization": inferSame,
		"Softmax": inferSame, "LogSoftmax": inferSame, "Clip": inferSame, "PRelu": inferSame, "LeakyRelu": inferSame, "HardSigmoid": inferSame,
		"Gelu": inferSame, "Elu": inferSame, "Selu": inferSame, "Mish": inferSame, "Softsign": inferSame,
	}
	for op := range foldUnary {
		m[op] = inferUnary
	}
	for op := range foldBinary {
		m[op] = inferBinary
	}
	for _, op := range []string{"Max", "Min", "Sum", "Mean"} {
		m[op] = inferVariadic
	}
	for _, op := range []string{"ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceProd", "ReduceSumSquare"} {
		m[op] = inferReduce
	}
	return m
}

// infer goes through the nodes in order. Unsupported operators are reported first, all of them by name.
func (g *graph) infer() error {
	table := inferences()
	g.prune()
	var bad []*node
	for _, n := range g.nodes {
		if table[n.op] == nil {
			bad = append(bad, n)
		}
	}
	if len(bad) > 0 {
		return unsupported(bad)
	}
	for _, in := range g.inputs {
		for i, d := range in.shape {
			if d.c < 0 && d.k == 0 {
				return fmt.Errorf("axis %d of input %q has no fixed size; give its shape with Options.Dims, for example %q: %s", i, in.name, in.name, exampleDims(in.shape))
			}
		}
		in.known = true
	}
	for _, n := range g.nodes {
		for _, in := range n.in {
			if v := g.values[in]; in != "" && !v.known {
				return fmt.Errorf("%s: input %q is not known", n, in)
			}
		}
		if err := table[n.op](g, n); err != nil {
			return fmt.Errorf("%s: %w", n, err)
		}
		for _, o := range n.out {
			v := g.values[o]
			if o == "" {
				continue
			}
			if !v.known {
				return fmt.Errorf("%s: output %q is not supported", n, o)
			}
			for _, d := range v.shape {
				if v.c == nil && (d.k < 0 || d.compare(fixed(1)) < 0) {
					return fmt.Errorf("%s: its output would be %s, without elements", n, shapeString(v.shape))
				}
			}
			if _, err := volumeOf(v.shape); err != nil {
				return fmt.Errorf("%s: %w", n, err)
			}
		}
	}
	g.prune()
	return nil
}

func exampleDims(s []dim) string {
	out := make([]int, len(s))
	for i, d := range s {
		switch {
		case i == 0:
			out[i] = 0
		case d.c < 0:
			out[i] = 224
		default:
			out[i] = d.c
		}
	}
	return fmt.Sprint(out) + " (0 leaves the batch open)"
}

// unsupported names the first node and every further operator that is not read.
func unsupported(bad []*node) error {
	seen := map[string]bool{bad[0].op: true}
	more := ""
	for _, n := range bad[1:] {
		if !seen[n.op] {
			seen[n.op] = true
			more += ", " + n.op
		}
	}
	if more != "" {
		more = " (neither are" + more[1:] + ")"
	}
	remedy := "export the model with standard feed-forward operators"
	switch bad[0].op {
	case "LSTM", "GRU", "RNN":
		remedy = "Lathe reads feed-forward networks; a recurrent one must be unrolled before it is exported"
	case "If", "Loop", "Scan":
		remedy = "Lathe reads graphs without control flow; export one branch, or simplify the model with fixed inputs (onnxsim)"
	case "NonMaxSuppression", "TopK", "NonZero":
		remedy = "cut the model in front of its post-processing (onnx.utils.extract_model); lathe nms does that part"
	}
	return fmt.Errorf("%s: operator is not supported%s; %s", bad[0], more, remedy)
}

func (g *graph) arg(n *node, i int) *value {
	if s := n.input(i); s != "" {
		return g.values[s]
	}
	return nil
}

// need is a required input.
func (g *graph) need(n *node, i int) (*value, error) {
	v := g.arg(n, i)
	if v == nil {
		return nil, fmt.Errorf("input %d is missing", i)
	}
	return v, nil
}

// constInts gives an input that must be a constant list of integers, or the attribute of that name; nil if neither.
func (g *graph) constInts(n *node, i int, attr string) ([]dim, error) {
	if v := g.arg(n, i); v != nil {
		if v.c == nil {
			return nil, fmt.Errorf("input %d (%s) must be constant, but is computed from the data", i, attr)
		}
		if len(v.c.dims) > 1 {
			return nil, fmt.Errorf("input %d (%s) has shape %v, want a list", i, attr, v.c.dims)
		}
		return v.c.ints(), nil
	}
	if a := n.ints(attr); a != nil {
		return fixedShape(a), nil
	}
	return nil, nil
}

func (g *graph) constStatic(n *node, i int, attr string) ([]int, error) {
	d, err := g.constInts(n, i, attr)
	if err != nil || d == nil {
		return nil, err
	}
	s, err := staticShape(d)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", attr, err)
	}
	return s, nil
}

func (g *graph) set(n *node, i int, t pb.TensorProto_DataType, shape []dim) error {
	if i < len(n.out) && n.out[i] != "" {
		v := g.values[n.out[i]]
		v.dtype, v.shape, v.known = t, shape, true
	}
	return nil
}

// fold makes output 0 a constant.
func (g *graph) fold(n *node, c *tensor) error {
	if c.f != nil || c.i != nil {
		if g.budget -= int64(c.size()); g.budget < 0 {
			return errors.New("folding constants would need far more memory than the file has")
		}
	}
	v := g.values[n.out[0]]
	v.dtype, v.shape, v.known, v.c = c.dtype, fixedShape(c.dims), true, c
	return nil
}

// afford checks that a folded result of that many elements may be made.
func (g *graph) afford(shape []dim) error {
	v, err := volumeOf(shape)
	if err != nil {
		return err
	}
	if v.pow == 0 && int64(v.coef) > g.budget {
		return fmt.Errorf("folding a constant of shape %s would need far more memory than the file has", shapeString(shape))
	}
	return nil
}

func axisOf(a, rank int) (int, error) {
	if a < -rank || a >= rank {
		return 0, fmt.Errorf("axis %d is not one of %d axes", a, rank)
	}
	return (a + rank) % rank, nil
}

func axesOf(a []int, rank int) ([]int, error) {
	out := make([]int, len(a))
	for i, x := range a {
		var err error
		if out[i], err = axisOf(x, rank); err != nil {
			return nil, err
		}
		if slices.Contains(out[:i], out[i]) {
			return nil, fmt.Errorf("axis %d is named twice", x)
		}
	}
	return out, nil
}

func inferConstant(g *graph, n *node) error {
	for name, a := range n.attrs {
		var c *tensor
		switch name {
		case "value":
			if a.T == nil {
				return errors.New("attribute value has no tensor")
			}
			var err error
			if c, err = decodeTensor(a.T); err != nil {
				return err
			}
		case "value_float":
			c = &tensor{dtype: tFloat, f: []float32{a.GetF()}}
		case "value_floats":
			c = &tensor{dtype: tFloat, dims: []int{len(a.Floats)}, f: a.Floats}
		case "value_int":
			c = &tensor{dtype: tInt64, i: []dim{fixed(int(a.GetI()))}}
		case "value_ints":
			c = &tensor{dtype: tInt64, dims: []int{len(a.Ints)}, i: fixedShape(n.ints(name))}
		default:
			continue
		}
		return g.fold(n, c)
	}
	return errors.New("constant without a tensor value")
}

func inferShape(g *graph, n *node) error {
	x, err := g.need(n, 0)
	if err != nil {
		return err
	}
	r := len(x.shape)
	at := func(a int) int {
		if a < 0 {
			a += r
		}
		return min(max(a, 0), r)
	}
	from, to := at(n.int("start", 0)), at(n.int("end", r))
	s := slices.Clone(x.shape[from:max(from, to)])
	return g.fold(n, &tensor{dtype: tInt64, dims: []int{len(s)}, i: s})
}

func inferSize(g *graph, n *node) error {
	x, err := g.need(n, 0)
	if err != nil {
		return err
	}
	v, err := volumeOf(x.shape)
	if err != nil {
		return err
	}
	d := fixed(v.coef)
	if v.pow == 1 {
		d = dim{v.coef, 0}
	} else if v.pow > 1 {
		return errors.New("the size grows with the square of the batch")
	}
	return g.fold(n, &tensor{dtype: tInt64, i: []dim{d}})
}

func inferIdentity(g *graph, n *node) error {
	x, err := g.need(n, 0)
	if err != nil {
		return err
	}
	if x.c != nil {
		c := *x.c
		if c.from == "" {
			c.from, c.perm = x.name, natural(len(c.dims))
		}
		v := g.values[n.out[0]]
		v.dtype, v.shape, v.known, v.c = x.dtype, x.shape, true, &c
		return nil
	}
	return g.set(n, 0, x.dtype, x.shape)
}

func inferSame(g *graph, n *node) error {
	x, err := g.need(n, 0)
	if err != nil {
		return err
	}
	return g.set(n, 0, x.dtype, x.shape)
}

func inferCast(g *graph, n *node) error {
	x, err := g.need(n, 0)
	if err != nil {
		return err
	}
	to := pb.TensorProto_DataType(n.int("to", int(tFloat)))
	if n.op == "CastLike" {
		y, err := g.need(n, 1)
		if err != nil {
			return err
		}
		to = y.dtype
	}
	if elemBits[to] == 0 {
		return fmt.Errorf("cast to %s is not supported", to)
	}
	if x.c == nil {
		return g.set(n, 0, to, x.shape)
	}
	if err := g.afford(x.shape); err != nil {
		return err
	}
	c := &tensor{dtype: to, dims: x.c.dims}
	switch {
	case isFloat(to) && x.c.i != nil && slices.ContainsFunc(x.c.i, func(d dim) bool { return d.k != 0 }):
		c.i = x.c.i // a size in floating point, on its way back to integers
	case isFloat(to):
		c.f = slices.Clone(x.c.floats())
	case to == tBool && isFloat(x.dtype):
		c.i = make([]dim, x.c.size())
		for i, v := range x.c.floats() {
			c.i[i] = truth(v != 0)
		}
	case to == tBool:
		c.i = slices.Clone(x.c.ints())
		for i, v := range c.i {
			c.i[i] = truth(v != fixed(0))
		}
	default:
		c.i = slices.Clone(x.c.ints())
	}
	return g.fold(n, c)
}

func truth(b bool) dim {
	if b {
		return fixed(1)
	}
	return fixed(0)
}

func inferUnary(g *graph, n *node) error {
	x, err := g.need(n, 0)
	if err != nil {
		return err
	}
	if x.c == nil {
		return g.set(n, 0, x.dtype, x.shape)
	}
	if err := g.afford(x.shape); err != nil {
		return err
	}
	c := &tensor{dtype: x.dtype, dims: x.c.dims}
	if !isFloat(x.dtype) || x.c.i != nil {
		in := x.c.ints()
		c.i = make([]dim, len(in))
		for i, v := range in {
			switch n.op {
			case "Not":
				c.i[i] = truth(v == fixed(0))
			case "Neg":
				c.i[i] = fixed(0).minus(v)
			case "Abs":
				if c.i[i] = v; v.compare(fixed(0)) < 0 {
					c.i[i] = fixed(0).minus(v)
				}
			case "Floor", "Ceil", "Round":
				c.i[i] = v
			default:
				if v.k != 0 {
					return fmt.Errorf("%s of a size that depends on the batch", n.op)
				}
				c.i[i] = fixed(int(foldUnary[n.op](float64(v.c))))
			}
		}
		return g.fold(n, c)
	}
	in := x.c.floats()
	c.f = make([]float32, len(in))
	for i, v := range in {
		c.f[i] = float32(foldUnary[n.op](float64(v)))
	}
	return g.fold(n, c)
}

// foldUnary holds the functions of one value.
var foldUnary = map[string]func(float64) float64{
	"Relu": func(x float64) float64 { return max(x, 0) }, "Sigmoid": func(x float64) float64 { return 1 / (1 + math.Exp(-x)) },
	"Tanh": math.Tanh, "Exp": math.Exp, "Log": math.Log, "Sqrt": math.Sqrt, "Reciprocal": func(x float64) float64 { return 1 / x },
	"Erf": math.Erf, "Abs": math.Abs, "Neg": func(x float64) float64 { return -x }, "Sin": math.Sin, "Cos": math.Cos,
	"Floor": math.Floor, "Ceil": math.Ceil, "Round": math.RoundToEven, "Sign": func(x float64) float64 {
		switch {
		case x > 0:
			return 1
		case x < 0:
			return -1
		}
		return 0
	},
	"Softplus":  func(x float64) float64 { return max(x, 0) + math.Log1p(math.Exp(-math.Abs(x))) },
	"HardSwish": func(x float64) float64 { return x * min(max(x/6+.5, 0), 1) },
	"Not":       func(x float64) float64 { return float64(truth(x == 0).c) },
}

// foldBinary holds the functions of two values.
var foldBinary = map[string]func(a, b float64) float64{
	"Add": func(a, b float64) float64 { return a + b }, "Sub": func(a, b float64) float64 { return a - b },
	"Mul": func(a, b float64) float64 { return a * b }, "Div": func(a, b float64) float64 { return a / b },
	"Pow": math.Pow, "Equal": func(a, b float64) float64 { return float64(truth(a == b).c) },
	"Less":           func(a, b float64) float64 { return float64(truth(a < b).c) },
	"Greater":        func(a, b float64) float64 { return float64(truth(a > b).c) },
	"LessOrEqual":    func(a, b float64) float64 { return float64(truth(a <= b).c) },
	"GreaterOrEqual": func(a, b float64) float64 { return float64(truth(a >= b).c) },
	"And":            func(a, b float64) float64 { return float64(truth(a != 0 && b != 0).c) },
	"Or":             func(a, b float64) float64 { return float64(truth(a != 0 || b != 0).c) },
	"Mod":            math.Mod,
}

func isTest(op string) bool {
	switch op {
	case "Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "And", "Or":
		return true
	}
	return false
}

func inferBinary(g *graph, n *node) error {
	a, err := g.need(n, 0)
	if err != nil {
		return err
	}
	b, err := g.need(n, 1)
	if err != nil {
		return err
	}
	shape, err := joinShapes(a.shape, b.shape)
	if err != nil {
		return err
	}
	t := a.dtype
	if isTest(n.op) {
		t = tBool
	}
	if a.c == nil || b.c == nil {
		if n.op == "Mod" {
			return errors.New("only constants are supported")
		}
		return g.set(n, 0, t, shape)
	}
	c, err := g.elementwise(n.op, a.c, b.c, shape)
	if err != nil {
		return err
	}
	c.dtype = t
	return g.fold(n, c)
}

func inferVariadic(g *graph, n *node) error {
	a, err := g.need(n, 0)
	if err != nil {
		return err
	}
	shape, c := a.shape, a.c
	op := map[string]string{"Max": "Max", "Min": "Min", "Sum": "Add", "Mean": "Add"}[n.op]
	for i := 1; i < len(n.in); i++ {
		b, err := g.need(n, i)
		if err != nil {
			return err
		}
		if shape, err = joinShapes(shape, b.shape); err != nil {
			return err
		}
		if c != nil && b.c != nil {
			if c, err = g.elementwise(op, c, b.c, shape); err != nil {
				return err
			}
		} else {
			c = nil
		}
	}
	if c == nil || n.op == "Mean" {
		return g.set(n, 0, a.dtype, shape)
	}
	d := *c
	d.dtype = a.dtype
	return g.fold(n, &d)
}

// elementwise folds a function of two constants.
func (g *graph) elementwise(op string, a, b *tensor, shape []dim) (*tensor, error) {
	if err := g.afford(shape); err != nil {
		return nil, err
	}
	dims, err := staticShape(shape)
	if err != nil {
		return nil, err
	}
	c := &tensor{dtype: a.dtype, dims: dims}
	ia, ib := indexer(a.dims, dims), indexer(b.dims, dims)
	if (isFloat(a.dtype) && a.i == nil) || (isFloat(b.dtype) && b.i == nil) {
		f := foldBinary[op]
		if op == "Max" {
			f = math.Max
		} else if op == "Min" {
			f = math.Min
		}
		x, y := a.floats(), b.floats()
		if isTest(op) {
			c.i = make([]dim, product(dims))
		} else {
			c.f = make([]float32, product(dims))
		}
		for i := range product(dims) {
			v := f(float64(x[ia(i)]), float64(y[ib(i)]))
			if c.i != nil {
				c.i[i] = fixed(int(v))
			} else {
				c.f[i] = float32(v)
			}
		}
		return c, nil
	}
	x, y := a.ints(), b.ints()
	c.i = make([]dim, product(dims))
	for i := range c.i {
		v, ok := foldInts(op, x[ia(i)], y[ib(i)])
		if !ok {
			return nil, fmt.Errorf("%s of the sizes %s and %s (N is the batch) cannot be worked out", op, x[ia(i)], y[ib(i)])
		}
		c.i[i] = v
	}
	return c, nil
}

func foldInts(op string, a, b dim) (dim, bool) {
	cmp := a.compare(b)
	switch op {
	case "Add":
		return a.plus(b), true
	case "Sub":
		return a.minus(b), true
	case "Mul":
		return a.times(b)
	case "Div":
		return a.over(b)
	case "Max":
		if cmp >= 0 {
			return a, true
		}
		return b, true
	case "Min":
		if cmp <= 0 {
			return a, true
		}
		return b, true
	case "Equal":
		return truth(cmp == 0), true
	case "Less":
		return truth(cmp < 0), true
	case "Greater":
		return truth(cmp > 0), true
	case "LessOrEqual":
		return truth(cmp <= 0), true
	case "GreaterOrEqual":
		return truth(cmp >= 0), true
	case "And":
		return truth(a != fixed(0) && b != fixed(0)), true
	case "Or":
		return truth(a != fixed(0) || b != fixed(0)), true
	case "Mod":
		if a.k != 0 || b.k != 0 || b.c == 0 {
			return dim{}, false
		}
		m := a.c % b.c
		if m != 0 && (m < 0) != (b.c < 0) {
			m += b.c
		}
		return fixed(m), true
	case "Pow":
		if a.k != 0 || b.k != 0 {
			return dim{}, false
		}
		return fixed(int(math.Pow(float64(a.c), float64(b.c)))), true
	}
	return dim{}, false
}

// indexer maps a row-major position in a broadcast shape to the position in a tensor of shape d.
func indexer(d, to []int) func(int) int {
	if slices.Equal(d, to) {
		return func(i int) int { return i }
	}
	if product(d) == 1 {
		return func(int) int { return 0 }
	}
	stride := make([]int, len(to))
	s := 1
	for i := len(d) - 1; i >= 0; i-- {
		if d[i] != 1 {
			stride[i+len(to)-len(d)] = s
		}
		s *= d[i]
	}
	return func(i int) int {
		at := 0
		for j := len(to) - 1; j >= 0; j-- {
			at += i % to[j] * stride[j]
			i /= to[j]
		}
		return at
	}
}

func inferWhere(g *graph, n *node) error {
	var v [3]*value
	for i := range v {
		var err error
		if v[i], err = g.need(n, i); err != nil {
			return err
		}
	}
	shape, err := joinShapes(v[1].shape, v[2].shape)
	if err != nil {
		return err
	}
	if shape, err = joinShapes(v[0].shape, shape); err != nil {
		return err
	}
	if v[0].c == nil || v[1].c == nil || v[2].c == nil {
		return g.set(n, 0, v[1].dtype, shape)
	}
	if err := g.afford(shape); err != nil {
		return err
	}
	dims, err := staticShape(shape)
	if err != nil {
		return err
	}
	c := &tensor{dtype: v[1].dtype, dims: dims}
	cond, at0, at1, at2 := v[0].c.ints(), indexer(v[0].c.dims, dims), indexer(v[1].c.dims, dims), indexer(v[2].c.dims, dims)
	if isFloat(c.dtype) && v[1].c.i == nil && v[2].c.i == nil {
		x, y := v[1].c.floats(), v[2].c.floats()
		c.f = make([]float32, product(dims))
		for i := range c.f {
			if c.f[i] = y[at2(i)]; cond[at0(i)] != fixed(0) {
				c.f[i] = x[at1(i)]
			}
		}
		return g.fold(n, c)
	}
	x, y := v[1].c.ints(), v[2].c.ints()
	c.i = make([]dim, product(dims))
	for i := range c.i {
		if c.i[i] = y[at2(i)]; cond[at0(i)] != fixed(0) {
			c.i[i] = x[at1(i)]
		}
	}
	return g.fold(n, c)
}

func inferReduce(g *graph, n *node) error {
	x, err := g.need(n, 0)
	if err != nil {
		return err
	}
	axes, keep, err := g.reduceAxes(n, len(x.shape))
	if err != nil {
		return err
	}
	var shape []dim
	for i, d := range x.shape {
		switch {
		case !slices.Contains(axes, i):
			shape = append(shape, d)
		case keep:
			shape = append(shape, fixed(1))
		}
	}
	if x.c != nil && n.op == "ReduceProd" && len(axes) == len(x.shape) {
		p := fixed(1)
		for _, d := range x.c.ints() {
			var ok bool
			if p, ok = p.times(d); !ok {
				return errors.New("the product grows with the square of the batch")
			}
		}
		dims, _ := staticShape(shape)
		return g.fold(n, &tensor{dtype: x.dtype, dims: dims, i: []dim{p}})
	}
	if n.op == "ReduceProd" {
		return errors.New("only constants are supported")
	}
	return g.set(n, 0, x.dtype, shape)
}

// reduceAxes are the axes of a reduction and whether they stay.
func (g *graph) reduceAxes(n *node, rank int) (axes []int, keep bool, err error) {
	a, err := g.constStatic(n, 1, "axes")
	if err != nil {
		return nil, false, err
	}
	if axes, err = axesOf(a, rank); err != nil {
		return nil, false, err
	}
	if len(axes) == 0 && n.int("noop_with_empty_axes", 0) == 0 {
		for i := range rank {
			axes = append(axes, i)
		}
	}
	slices.Sort(axes)
	return axes, n.int("keepdims", 1) == 1, nil
}

func inferArgMax(g *graph, n *node) error {
	x, err := g.need(n, 0)
	if err != nil {
		return err
	}
	if n.int("select_last_index", 0) != 0 {
		return errors.New("select_last_index is not supported")
	}
	axis, err := axisOf(n.int("axis", 0), len(x.shape))
	if err != nil {
		return err
	}
	shape := slices.Clone(x.shape)
	if n.int("keepdims", 1) == 1 {
		shape[axis] = fixed(1)
	} else {
		shape = slices.Delete(shape, axis, axis+1)
	}
	return g.set(n, 0, tInt64, shape)
}

func inferQuantize(g *graph, n *node) error {
	x, err := g.need(n, 0)
	if err != nil {
		return err
	}
	t := tUint8
	if z := g.arg(n, 2); z != nil {
		t = z.dtype
	} else if d := n.int("output_dtype", 0); d != 0 {
		t = pb.TensorProto_DataType(d)
	}
	if elemBits[t] == 0 || isFloat(t) {
		return fmt.Errorf("quantising to %s is not supported", t)
	}
	return g.set(n, 0, t, x.shape)
}

func inferDequantize(g *graph, n *node) error {
	x, err := g.need(n, 0)
	if err != nil {
		return err
	}
	s, err := g.need(n, 1)
	if err != nil {
		return err
	}
	z := g.arg(n, 2)
	if x.c == nil || s.c == nil || (z != nil && z.c == nil) {
		return g.set(n, 0, tFloat, x.shape)
	}
	at, err := scaleIndex(x.c.dims, s.c.dims, n.int("axis", 1), n.int("block_size", 0))
	if err != nil {
		return err
	}
	if err := g.afford(x.shape); err != nil {
		return err
	}
	c := &tensor{dtype: tFloat, dims: x.c.dims, f: slices.Clone(x.c.floats())}
	scale, zero := s.c.floats(), []float32(nil)
	if z != nil {
		if zero = z.c.floats(); len(zero) != len(scale) {
			return fmt.Errorf("%d scales but %d zero points", len(scale), len(zero))
		}
	}
	for i := range c.f {
		j := at(i)
		if zero != nil {
			c.f[i] -= zero[j]
		}
		c.f[i] *= scale[j]
	}
	return g.fold(n, c)
}

// scaleIndex maps an element of a quantised tensor to its scale: one for all, one per position of an axis, or one per
// block of that axis.
func scaleIndex(dims, scale []int, axis, block int) (func(int) int, error) {
	if product(scale) == 1 && block == 0 {
		return func(int) int { return 0 }, nil
	}
	axis, err := axisOf(axis, len(dims))
	if err != nil {
		return nil, err
	}
	inner := product(dims[axis+1:])
	if block == 0 {
		if len(scale) != 1 || scale[0] != dims[axis] {
			return nil, fmt.Errorf("scales of shape %v do not fit axis %d of %v", scale, axis, dims)
		}
		return func(i int) int { return i / inner % dims[axis] }, nil
	}
	want := slices.Clone(dims)
	if block < 0 {
		return nil, fmt.Errorf("block_size %d", block)
	}
	want[axis] = (dims[axis] + block - 1) / block
	if !slices.Equal(scale, want) {
		return nil, fmt.Errorf("scales of shape %v do not fit blocks of %d along axis %d of %v", scale, block, axis, dims)
	}
	n, m := dims[axis], want[axis]
	return func(i int) int {
		outer, a, in := i/(inner*n), i/inner%n, i%inner
		return (outer*m+a/block)*inner + in
	}, nil
}

package onnx

import (
	"errors"
	"fmt"
	"slices"
)

// inferReshape follows ONNX: 0 keeps an axis, one -1 is inferred. A model that was exported at batch 1 and reshapes to
// a literal leading 1 is read as if that were the batch.
func inferReshape(g *graph, n *node) error {
	x, err := g.need(n, 0)
	if err != nil {
		return err
	}
	want, err := g.constInts(n, 1, "shape")
	if err != nil {
		return err
	}
	if want == nil {
		return errors.New("the target shape is missing")
	}
	shape, err := reshape(x.shape, want, n.int("allowzero", 0) != 0)
	if err != nil {
		return err
	}
	if x.c != nil {
		return g.reshaped(n, x, shape)
	}
	return g.set(n, 0, x.dtype, shape)
}

func reshape(from, want []dim, allowZero bool) ([]dim, error) {
	shape := slices.Clone(want)
	infer := -1
	for i, d := range shape {
		switch {
		case d == fixed(0) && !allowZero:
			if i >= len(from) {
				return nil, fmt.Errorf("shape %s keeps axis %d of %s", shapeString(want), i, shapeString(from))
			}
			shape[i] = from[i]
		case d == fixed(-1):
			if infer >= 0 {
				return nil, fmt.Errorf("shape %s leaves two axes open", shapeString(want))
			}
			infer = i
			shape[i] = fixed(1)
		}
	}
	have, err := volumeOf(from)
	if err != nil {
		return nil, err
	}
	got, err := volumeOf(shape)
	if err != nil {
		return nil, err
	}
	fail := fmt.Errorf("%s does not reshape to %s", shapeString(from), shapeString(want))
	if infer >= 0 {
		if got.coef == 0 || have.coef%got.coef != 0 {
			return nil, fail
		}
		switch q := have.coef / got.coef; have.pow - got.pow {
		case 0:
			shape[infer] = fixed(q)
		case 1:
			shape[infer] = dim{q, 0}
		default:
			return nil, fail
		}
		return shape, nil
	}
	if have == got {
		return shape, nil
	}
	if have.coef == got.coef && have.pow == 1 && got.pow == 0 && len(shape) > 0 && shape[0] == fixed(1) {
		shape[0] = batch
		return shape, nil
	}
	return nil, fail
}

func inferFlatten(g *graph, n *node) error {
	x, err := g.need(n, 0)
	if err != nil {
		return err
	}
	axis := n.int("axis", 1)
	if axis < 0 {
		axis += len(x.shape)
	}
	if axis < 0 || axis > len(x.shape) {
		return fmt.Errorf("axis %d of %s", axis, shapeString(x.shape))
	}
	a, err := volumeOf(x.shape[:axis])
	if err != nil {
		return err
	}
	b, err := volumeOf(x.shape[axis:])
	if err != nil {
		return err
	}
	if a.pow+b.pow > 1 {
		return errors.New("the size grows with the square of the batch")
	}
	dimOf := func(v volume) dim {
		if v.pow == 1 {
			return dim{v.coef, 0}
		}
		return fixed(v.coef)
	}
	return g.reshaped(n, x, []dim{dimOf(a), dimOf(b)})
}

// reshaped sets the output to the same elements in another shape.
func (g *graph) reshaped(n *node, x *value, shape []dim) error {
	if x.c == nil {
		return g.set(n, 0, x.dtype, shape)
	}
	dims, err := staticShape(shape)
	if err != nil {
		return err
	}
	c := *x.c
	c.dims, c.from, c.perm = dims, "", nil
	v := g.values[n.out[0]]
	v.dtype, v.shape, v.known, v.c = x.dtype, shape, true, &c
	return nil
}

func inferSqueeze(g *graph, n *node) error {
	x, err := g.need(n, 0)
	if err != nil {
		return err
	}
	axes, err := g.constStatic(n, 1, "axes")
	if err != nil {
		return err
	}
	all := axes == nil
	if axes, err = axesOf(axes, len(x.shape)); err != nil {
		return err
	}
	shape := []dim{}
	for i, d := range x.shape {
		switch {
		case all && d == fixed(1):
		case slices.Contains(axes, i):
			if d != fixed(1) {
				return fmt.Errorf("axis %d of %s is not 1", i, shapeString(x.shape))
			}
		default:
			shape = append(shape, d)
		}
	}
	return g.reshaped(n, x, shape)
}

func inferUnsqueeze(g *graph, n *node) error {
	x, err := g.need(n, 0)
	if err != nil {
		return err
	}
	axes, err := g.constStatic(n, 1, "axes")
	if err != nil {
		return err
	}
	if len(axes)+len(x.shape) > 16 {
		return fmt.Errorf("%d axes, at most 16 are read", len(axes)+len(x.shape))
	}
	if axes, err = axesOf(axes, len(x.shape)+len(axes)); err != nil {
		return err
	}
	shape := make([]dim, 0, len(x.shape)+len(axes))
	for i, j := 0, 0; i < len(x.shape)+len(axes); i++ {
		if slices.Contains(axes, i) {
			shape = append(shape, fixed(1))
		} else {
			shape = append(shape, x.shape[j])
			j++
		}
	}
	return g.reshaped(n, x, shape)
}

// permOf is the permutation of a Transpose, reversed when absent.
func permOf(n *node, rank int) ([]int, error) {
	perm := n.ints("perm")
	if perm == nil {
		for i := range rank {
			perm = append(perm, rank-1-i)
		}
	}
	if len(perm) != rank {
		return nil, fmt.Errorf("perm %v does not fit %d axes", perm, rank)
	}
	return axesOf(perm, rank)
}

func inferTranspose(g *graph, n *node) error {
	x, err := g.need(n, 0)
	if err != nil {
		return err
	}
	perm, err := permOf(n, len(x.shape))
	if err != nil {
		return err
	}
	shape := make([]dim, len(perm))
	for i, p := range perm {
		shape[i] = x.shape[p]
	}
	if x.c == nil {
		return g.set(n, 0, x.dtype, shape)
	}
	if err := g.afford(x.shape); err != nil {
		return err
	}
	c := &tensor{dtype: x.dtype, from: x.name, perm: perm}
	if x.c.from != "" {
		c.from, c.perm = x.c.from, arrange(perm, x.c.perm)
	}
	if isFloat(x.dtype) && x.c.i == nil {
		c.f, c.dims = permuted(x.c.floats(), x.c.dims, perm)
	} else {
		c.i, c.dims = permuted(x.c.ints(), x.c.dims, perm)
	}
	return g.fold(n, c)
}

// permuted copies row-major values with their axes permuted: axis i of the result is axis perm[i] of the input.
func permuted[T any](d []T, dims, perm []int) ([]T, []int) {
	if len(perm) == 0 {
		return slices.Clone(d), slices.Clone(dims)
	}
	nd, stride := make([]int, len(dims)), make([]int, len(dims))
	for i, s := len(dims)-1, 1; i >= 0; i-- {
		stride[i] = s
		s *= dims[i]
	}
	st := make([]int, len(dims))
	for i, p := range perm {
		nd[i], st[i] = dims[p], stride[p]
	}
	out := make([]T, len(d))
	idx := make([]int, len(dims))
	at := 0
	for o := range out {
		out[o] = d[at]
		for i := len(idx) - 1; i >= 0; i-- {
			at += st[i]
			if idx[i]++; idx[i] < nd[i] {
				break
			}
			at -= nd[i] * st[i]
			idx[i] = 0
		}
	}
	return out, nd
}

func inferConcat(g *graph, n *node) error {
	x, err := g.need(n, 0)
	if err != nil {
		return err
	}
	axis, err := axisOf(n.int("axis", 0), len(x.shape))
	if err != nil {
		return err
	}
	shape := slices.Clone(x.shape)
	shape[axis] = fixed(0)
	isConst := true
	for i := range n.in {
		v, err := g.need(n, i)
		if err != nil {
			return err
		}
		isConst = isConst && v.c != nil
		if len(v.shape) != len(shape) {
			return fmt.Errorf("shapes %s and %s do not join", shapeString(x.shape), shapeString(v.shape))
		}
		for j, d := range v.shape {
			switch {
			case j == axis:
				shape[j] = shape[j].plus(d)
			case j == 0 && shape[0] == fixed(1) && d == batch:
				shape[0] = batch // a constant exported at batch 1
			case j == 0 && shape[0] == batch && d == fixed(1) && v.c != nil:
			case d != shape[j]:
				return fmt.Errorf("shapes %s and %s do not join along axis %d", shapeString(x.shape), shapeString(v.shape), axis)
			}
		}
	}
	if !isConst {
		return g.set(n, 0, x.dtype, shape)
	}
	if err := g.afford(shape); err != nil {
		return err
	}
	dims, err := staticShape(shape)
	if err != nil {
		return err
	}
	c := &tensor{dtype: x.dtype, dims: dims}
	if isFloat(x.dtype) && x.c.i == nil {
		c.f, err = joined(g, n, axis, dims, (*tensor).floats)
	} else {
		c.i, err = joined(g, n, axis, dims, (*tensor).ints)
	}
	if err != nil {
		return err
	}
	return g.fold(n, c)
}

func joined[T any](g *graph, n *node, axis int, dims []int, values func(*tensor) []T) ([]T, error) {
	out := make([]T, 0, product(dims))
	var parts [][]T
	var widths []int
	for i := range n.in {
		c := g.arg(n, i).c
		parts = append(parts, values(c))
		widths = append(widths, product(c.dims[axis:]))
	}
	for o := range product(dims[:axis]) {
		for i, p := range parts {
			if (o+1)*widths[i] > len(p) {
				return nil, errors.New("shapes do not join")
			}
			out = append(out, p[o*widths[i]:(o+1)*widths[i]]...)
		}
	}
	return out, nil
}

// sliceSpec is one axis of a Slice, resolved: elements from, from+step, ... count of them.
type sliceSpec struct{ axis, from, step, count int }

// slices resolves a Slice's inputs. Axes that depend on the batch can only be taken whole.
func (g *graph) sliceSpecs(n *node, x *value) ([]sliceSpec, error) {
	starts, err := g.constInts(n, 1, "starts")
	if err != nil {
		return nil, err
	}
	ends, err := g.constInts(n, 2, "ends")
	if err != nil {
		return nil, err
	}
	axes, err := g.constStatic(n, 3, "axes")
	if err != nil {
		return nil, err
	}
	steps, err := g.constStatic(n, 4, "steps")
	if err != nil {
		return nil, err
	}
	if len(starts) != len(ends) || (axes != nil && len(axes) != len(starts)) || (steps != nil && len(steps) != len(starts)) {
		return nil, errors.New("starts, ends, axes and steps differ in length")
	}
	if axes == nil {
		for i := range starts {
			axes = append(axes, i)
		}
	}
	if axes, err = axesOf(axes, len(x.shape)); err != nil {
		return nil, err
	}
	var out []sliceSpec
	for i, a := range axes {
		step, size := 1, x.shape[a]
		if steps != nil {
			step = steps[i]
		}
		from, to := starts[i], ends[i]
		if !size.static() || !from.static() || !to.static() {
			if step == 1 && from == fixed(0) && (to == size || (to.static() && to.c >= 1<<24)) {
				continue
			}
			if size.static() && step == 1 && from == fixed(0) && to.compare(size) >= 0 {
				continue
			}
			return nil, fmt.Errorf("slice %s:%s of axis %d of %s depends on the batch", from, to, a, shapeString(x.shape))
		}
		d := size.c
		clamp := func(v, lo, hi int) int {
			if v < 0 {
				v += d
			}
			return min(max(v, lo), hi)
		}
		s := sliceSpec{axis: a, step: step}
		switch {
		case step > 0:
			s.from = clamp(from.c, 0, d)
			s.count = (clamp(to.c, 0, d) - s.from + step - 1) / step
		case step < 0:
			s.from = clamp(from.c, 0, d-1)
			e := -1
			if to.c >= -d {
				e = clamp(to.c, -1, d-1)
			}
			s.count = (s.from - e - step - 1) / -step
		default:
			return nil, errors.New("a step of 0")
		}
		s.count = max(s.count, 0)
		if s.step == 1 && s.from == 0 && s.count == d {
			continue
		}
		out = append(out, s)
	}
	return out, nil
}

func inferSlice(g *graph, n *node) error {
	x, err := g.need(n, 0)
	if err != nil {
		return err
	}
	specs, err := g.sliceSpecs(n, x)
	if err != nil {
		return err
	}
	shape := slices.Clone(x.shape)
	for _, s := range specs {
		shape[s.axis] = fixed(s.count)
	}
	if x.c == nil {
		return g.set(n, 0, x.dtype, shape)
	}
	if err := g.afford(shape); err != nil {
		return err
	}
	c := &tensor{dtype: x.dtype, dims: x.c.dims}
	if isFloat(x.dtype) && x.c.i == nil {
		c.f = slices.Clone(x.c.floats())
	} else {
		c.i = slices.Clone(x.c.ints())
	}
	for _, s := range specs {
		idx := make([]int, s.count)
		for i := range idx {
			idx[i] = s.from + i*s.step
		}
		if c.f != nil {
			c.f = taken(c.f, c.dims, s.axis, idx)
		} else {
			c.i = taken(c.i, c.dims, s.axis, idx)
		}
		c.dims = slices.Clone(c.dims)
		c.dims[s.axis] = s.count
	}
	return g.fold(n, c)
}

// taken picks positions of an axis.
func taken[T any](d []T, dims []int, axis int, idx []int) []T {
	inner, outer := product(dims[axis+1:]), product(dims[:axis])
	out := make([]T, 0, outer*len(idx)*inner)
	for o := range outer {
		for _, i := range idx {
			at := (o*dims[axis] + i) * inner
			out = append(out, d[at:at+inner]...)
		}
	}
	return out
}

// splitSizes are the parts of a Split.
func (g *graph) splitSizes(n *node, size dim) ([]int, error) {
	parts, err := g.constStatic(n, 1, "split")
	if err != nil {
		return nil, err
	}
	if !size.static() {
		return nil, errors.New("the batch cannot be split")
	}
	if parts == nil {
		k := len(n.out)
		each := (size.c + k - 1) / k
		for left := size.c; left > 0 && len(parts) < k; left -= each {
			parts = append(parts, min(each, left))
		}
	}
	sum := 0
	for _, p := range parts {
		if p < 0 {
			return nil, fmt.Errorf("split %v", parts)
		}
		sum += p
	}
	if len(parts) != len(n.out) || sum != size.c {
		return nil, fmt.Errorf("parts %v do not make up %s for %d outputs", parts, size, len(n.out))
	}
	return parts, nil
}

func inferSplit(g *graph, n *node) error {
	x, err := g.need(n, 0)
	if err != nil {
		return err
	}
	axis, err := axisOf(n.int("axis", 0), len(x.shape))
	if err != nil {
		return err
	}
	parts, err := g.splitSizes(n, x.shape[axis])
	if err != nil {
		return err
	}
	at := 0
	for i, p := range parts {
		shape := slices.Clone(x.shape)
		shape[axis] = fixed(p)
		if err := g.set(n, i, x.dtype, shape); err != nil {
			return err
		}
		if x.c != nil && n.out[i] != "" {
			if err := g.afford(shape); err != nil {
				return err
			}
			idx := make([]int, p)
			for j := range idx {
				idx[j] = at + j
			}
			c := &tensor{dtype: x.dtype, dims: slices.Clone(x.c.dims)}
			c.dims[axis] = p
			if isFloat(x.dtype) && x.c.i == nil {
				c.f = taken(x.c.floats(), x.c.dims, axis, idx)
			} else {
				c.i = taken(x.c.ints(), x.c.dims, axis, idx)
			}
			g.values[n.out[i]].c = c
		}
		at += p
	}
	return nil
}

func inferGather(g *graph, n *node) error {
	x, err := g.need(n, 0)
	if err != nil {
		return err
	}
	idx, err := g.need(n, 1)
	if err != nil {
		return err
	}
	if isFloat(idx.dtype) {
		return errors.New("positions must be integers")
	}
	axis, err := axisOf(n.int("axis", 0), len(x.shape))
	if err != nil {
		return err
	}
	shape := slices.Concat(x.shape[:axis], idx.shape, x.shape[axis+1:])
	if x.c == nil || idx.c == nil {
		return g.set(n, 0, x.dtype, shape)
	}
	if err := g.afford(shape); err != nil {
		return err
	}
	dims, err := staticShape(shape)
	if err != nil {
		return err
	}
	at, err := staticShape(idx.c.ints())
	if err != nil {
		return err
	}
	size := x.c.dims[axis]
	for i, v := range at {
		if v < -size || v >= size {
			return fmt.Errorf("position %d of an axis of %d", v, size)
		}
		at[i] = (v + size) % size
	}
	c := &tensor{dtype: x.dtype, dims: dims}
	if isFloat(x.dtype) && x.c.i == nil {
		c.f = taken(x.c.floats(), x.c.dims, axis, at)
	} else {
		c.i = taken(x.c.ints(), x.c.dims, axis, at)
	}
	return g.fold(n, c)
}

func inferExpand(g *graph, n *node) error {
	x, err := g.need(n, 0)
	if err != nil {
		return err
	}
	want, err := g.constInts(n, 1, "shape")
	if err != nil {
		return err
	}
	if want == nil {
		return errors.New("the target shape is missing")
	}
	shape, err := joinShapes(x.shape, want)
	if err != nil {
		return err
	}
	dims, err := staticShape(shape)
	if x.c == nil || err != nil { // the batch is not known: the constant stays one that broadcasts
		return g.set(n, 0, x.dtype, shape)
	}
	if err := g.afford(shape); err != nil {
		return err
	}
	return g.fold(n, spread(x.c, dims))
}

// spread broadcasts a constant.
func spread(x *tensor, dims []int) *tensor {
	c := &tensor{dtype: x.dtype, dims: dims}
	at := indexer(x.dims, dims)
	if isFloat(x.dtype) && x.i == nil {
		in := x.floats()
		c.f = make([]float32, product(dims))
		for i := range c.f {
			c.f[i] = in[at(i)]
		}
		return c
	}
	in := x.ints()
	c.i = make([]dim, product(dims))
	for i := range c.i {
		c.i[i] = in[at(i)]
	}
	return c
}

func inferTile(g *graph, n *node) error {
	x, err := g.need(n, 0)
	if err != nil {
		return err
	}
	reps, err := g.constInts(n, 1, "repeats")
	if err != nil {
		return err
	}
	if len(reps) != len(x.shape) {
		return fmt.Errorf("%d repeats for %s", len(reps), shapeString(x.shape))
	}
	shape := slices.Clone(x.shape)
	for i, r := range reps {
		var ok bool
		if shape[i], ok = x.shape[i].times(r); !ok {
			return errors.New("the size grows with the square of the batch")
		}
		if r != fixed(1) && x.shape[i] != fixed(1) {
			return fmt.Errorf("repeating axis %d of size %s is not supported, only axes of 1", i, x.shape[i])
		}
	}
	dims, err := staticShape(shape)
	if x.c == nil || err != nil {
		return g.set(n, 0, x.dtype, shape)
	}
	if err := g.afford(shape); err != nil {
		return err
	}
	return g.fold(n, spread(x.c, dims))
}

// padsOf are the zeros before and after each axis.
func (g *graph) padsOf(n *node, rank int) ([][2]int, error) {
	p, err := g.constStatic(n, 1, "pads")
	if err != nil {
		return nil, err
	}
	axes, err := g.constStatic(n, 3, "axes")
	if err != nil {
		return nil, err
	}
	if g.arg(n, 3) == nil {
		axes = nil
		for i := range rank {
			axes = append(axes, i)
		}
	}
	if axes, err = axesOf(axes, rank); err != nil {
		return nil, err
	}
	if len(p) != 2*len(axes) {
		return nil, fmt.Errorf("%d pads for %d axes", len(p), len(axes))
	}
	out := make([][2]int, rank)
	for i, a := range axes {
		out[a] = [2]int{p[i], p[i+len(axes)]}
		if p[i] < 0 || p[i+len(axes)] < 0 || p[i] > 1<<20 || p[i+len(axes)] > 1<<20 {
			return nil, fmt.Errorf("pads %v are not supported; want 0 to 2^20", p)
		}
	}
	return out, nil
}

func inferPad(g *graph, n *node) error {
	x, err := g.need(n, 0)
	if err != nil {
		return err
	}
	pads, err := g.padsOf(n, len(x.shape))
	if err != nil {
		return err
	}
	shape := slices.Clone(x.shape)
	for i, p := range pads {
		if p != [2]int{} && !shape[i].static() {
			return errors.New("the batch cannot be padded")
		}
		if p != [2]int{} && shape[i].c > 1<<22 {
			return fmt.Errorf("padding an axis of %d is not supported, at most 2^22", shape[i].c)
		}
		shape[i].c += p[0] + p[1]
	}
	return g.set(n, 0, x.dtype, shape)
}

func inferConstantOfShape(g *graph, n *node) error {
	want, err := g.constInts(n, 0, "shape")
	if err != nil {
		return err
	}
	c := &tensor{dtype: tFloat, f: []float32{0}}
	if a := n.attrs["value"]; a != nil && a.T != nil {
		if c, err = decodeTensor(a.T); err != nil {
			return err
		}
		if c.size() != 1 {
			return fmt.Errorf("value has %d elements, want one", c.size())
		}
	}
	one := *c
	one.dims = slices.Repeat([]int{1}, len(want))
	dims, err := staticShape(want)
	if err != nil { // of the batch: a single element that broadcasts
		v := g.values[n.out[0]]
		v.dtype, v.shape, v.known = c.dtype, want, true
		n.fused = &one
		return nil
	}
	if err := g.afford(want); err != nil {
		return err
	}
	return g.fold(n, spread(&one, dims))
}

func inferRange(g *graph, n *node) error {
	var v [3]*tensor
	for i := range v {
		x, err := g.need(n, i)
		if err != nil {
			return err
		}
		if x.c == nil || x.c.size() != 1 {
			return errors.New("only constant ranges are supported")
		}
		v[i] = x.c
	}
	if isFloat(v[0].dtype) && v[0].i == nil {
		from, to, step := v[0].floats()[0], v[1].floats()[0], v[2].floats()[0]
		if !(step != 0) || !((to-from)/step < maxElements) {
			return fmt.Errorf("range %g:%g:%g", from, to, step)
		}
		if err := g.afford([]dim{fixed(max(int((to-from)/step), 0))}); err != nil {
			return err
		}
		c := &tensor{dtype: v[0].dtype, f: []float32{}}
		for i := 0; (step > 0 && from+float32(i)*step < to) || (step < 0 && from+float32(i)*step > to); i++ {
			c.f = append(c.f, from+float32(i)*step)
			if int64(i) > g.budget {
				return errors.New("the range is too long")
			}
		}
		c.dims = []int{len(c.f)}
		return g.fold(n, c)
	}
	s, err := staticShape([]dim{v[0].ints()[0], v[1].ints()[0], v[2].ints()[0]})
	if err != nil {
		return err
	}
	if s[2] == 0 {
		return errors.New("a step of 0")
	}
	count := (s[1]-s[0])/s[2] + min(1, max(0, (s[1]-s[0])%s[2]*sign(s[2])))
	count = max(count, 0)
	if err := g.afford([]dim{fixed(count)}); err != nil {
		return err
	}
	c := &tensor{dtype: v[0].dtype, dims: []int{count}, i: make([]dim, count)}
	for i := range c.i {
		c.i[i] = fixed(s[0] + i*s[2])
	}
	return g.fold(n, c)
}

func sign(x int) int {
	if x < 0 {
		return -1
	}
	return 1
}

func inferTrilu(g *graph, n *node) error {
	x, err := g.need(n, 0)
	if err != nil {
		return err
	}
	if x.c == nil || len(x.c.dims) < 2 {
		return errors.New("only constants are supported")
	}
	k := 0
	if a := g.arg(n, 1); a != nil {
		if a.c == nil || a.c.size() != 1 {
			return errors.New("k must be a constant number")
		}
		k = a.c.ints()[0].c
	}
	if err := g.afford(x.shape); err != nil {
		return err
	}
	r := len(x.c.dims)
	rows, cols := x.c.dims[r-2], x.c.dims[r-1]
	upper := n.int("upper", 1) == 1
	c := &tensor{dtype: x.dtype, dims: x.c.dims}
	zero := func(i int) bool {
		row, col := i/cols%rows, i%cols
		return upper && col-row < k || !upper && col-row > k
	}
	if isFloat(x.dtype) && x.c.i == nil {
		c.f = slices.Clone(x.c.floats())
		for i := range c.f {
			if zero(i) {
				c.f[i] = 0
			}
		}
	} else {
		c.i = slices.Clone(x.c.ints())
		for i := range c.i {
			if zero(i) {
				c.i[i] = fixed(0)
			}
		}
	}
	return g.fold(n, c)
}

func inferOneHot(g *graph, n *node) error {
	x, err := g.need(n, 0)
	if err != nil {
		return err
	}
	d, v := g.arg(n, 1), g.arg(n, 2)
	if d == nil || v == nil || d.c == nil || v.c == nil || d.c.size() != 1 || v.c.size() != 2 {
		return errors.New("depth and values must be constant")
	}
	if a := n.int("axis", -1); a != -1 && a != len(x.shape) {
		return fmt.Errorf("axis %d is not supported, only the last", a)
	}
	return g.set(n, 0, v.dtype, append(slices.Clone(x.shape), d.c.ints()[0]))
}

func inferDepthToSpace(g *graph, n *node) error {
	x, err := g.need(n, 0)
	if err != nil {
		return err
	}
	b := n.int("blocksize", 0)
	s := slices.Clone(x.shape)
	if len(s) != 4 || b < 1 || b > 1<<15 || s[1].c%(b*b) != 0 {
		return fmt.Errorf("blocks of %d do not fit %s", b, shapeString(s))
	}
	s[1].c, s[2].c, s[3].c = s[1].c/(b*b), s[2].c*b, s[3].c*b
	return g.set(n, 0, x.dtype, s)
}

func inferSpaceToDepth(g *graph, n *node) error {
	x, err := g.need(n, 0)
	if err != nil {
		return err
	}
	b := n.int("blocksize", 0)
	s := slices.Clone(x.shape)
	if len(s) != 4 || b < 1 || b > 1<<15 || s[2].c%b != 0 || s[3].c%b != 0 {
		return fmt.Errorf("blocks of %d do not fit %s", b, shapeString(s))
	}
	s[1].c, s[2].c, s[3].c = s[1].c*b*b, s[2].c/b, s[3].c/b
	return g.set(n, 0, x.dtype, s)
}

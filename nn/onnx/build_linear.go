package onnx

import (
	"errors"
	"fmt"
	"slices"

	"github.com/lathe-ml/lathe/nn"
)

// site adds a weight-bearing node: its weight comes from constant w with permuted axes, its bias (if any) from b.
func (r *builder) site(out string, layout []int, op nn.Op, w *tensor, wName string, perm []int, b *tensor, bName string, in ...string) {
	full := r.param(wName, w, perm, nn.Weight, out+".w")
	r.Share("w", full)
	if b != nil {
		r.Share("b", r.param(bName, b, nil, nn.Bias, out+".b"))
	}
	r.put(out, layout, op, in...)
}

func (r *builder) optional(n *node, i int) (*tensor, string) {
	if v := r.g.arg(n, i); v != nil {
		return v.c, v.name
	}
	return nil, ""
}

func buildConv(r *builder, n *node) error {
	w, wName, err := r.constOf(n, 1)
	if err != nil {
		return err
	}
	b, bName := r.optional(n, 2)
	win := n.fused.(*window)
	rank := len(w.dims)
	l := channelsLast(rank)
	op := nn.Conv{Out: w.dims[0], Kernel: win.kernel, Stride: win.stride, NoBias: b == nil}
	if slices.Max(win.dilation) > 1 {
		op.Dilation = win.dilation
	}
	if slices.ContainsFunc(win.pad, func(p [2]int) bool { return p != [2]int{} }) {
		op.Pad = win.pad
	}
	if g := n.int("group", 1); g > 1 {
		op.Groups = g
	}
	r.site(n.out[0], l, op, w, wName, l, b, bName, r.in(n.in[0], l))
	return nil
}

func buildConvTranspose(r *builder, n *node) error {
	w, wName, err := r.constOf(n, 1)
	if err != nil {
		return err
	}
	b, bName := r.optional(n, 2)
	t := n.fused.(*transposed)
	rank := len(w.dims)
	group := n.int("group", 1)
	op := nn.ConvTranspose{Out: w.dims[1] * group, Kernel: t.kernel, Stride: t.stride, Groups: group, NoBias: b == nil}
	if slices.Max(t.dilation) > 1 {
		op.Dilation = t.dilation
	}
	if slices.ContainsFunc(t.pad, func(p [2]int) bool { return p != [2]int{} }) {
		op.Pad = t.pad
	}
	// output_shape is said by padding alone here
	for i := range t.kernel {
		span := (t.kernel[i]-1)*t.dilation[i] + 1
		full := (r.shape(n.in[0])[i+2].c-1)*t.stride[i] + t.outPad[i] + span - t.pad[i][0] - t.pad[i][1]
		if extra := t.out[i] - full; extra != 0 || t.outPad[i] != 0 {
			if op.OutPad == nil {
				op.OutPad = make([]int, len(t.kernel))
			}
			if op.OutPad[i] = t.outPad[i] + extra; op.OutPad[i] < 0 {
				return fmt.Errorf("an output of %d along spatial axis %d", t.out[i], i)
			}
		}
	}
	// [in, out/g, k...] -> [out, k..., in/g], group by group
	perm := []int{1}
	for i := 2; i < rank; i++ {
		perm = append(perm, i)
	}
	perm = append(perm, 0)
	l := channelsLast(rank)
	if group > 1 {
		f := w.floats()
		per := len(f) / group
		var flat []float32
		var dims []int
		for i := range group {
			p, d := permuted(f[i*per:(i+1)*per], append([]int{w.dims[0] / group}, w.dims[1:]...), perm)
			flat, dims = append(flat, p...), d
		}
		dims = slices.Clone(dims)
		dims[0] *= group
		w, perm = &tensor{dtype: tFloat, dims: dims, f: flat}, nil
		wName += "/grouped"
	}
	r.site(n.out[0], l, op, w, wName, perm, b, bName, r.in(n.in[0], l))
	return nil
}

// buildMatMul makes a dense layer of a product with a constant matrix.
func buildMatMul(r *builder, n *node) error {
	w := r.g.values[n.in[1]]
	if w.c != nil && len(w.c.dims) == 2 && isFloat(w.dtype) && !r.isConst(n.in[0]) {
		op := nn.Dense{Out: w.c.dims[1], NoBias: true}
		var b *tensor
		if d, ok := n.fused.(fusedDense); ok {
			op.NoBias = false
			b = &tensor{dtype: tFloat, dims: []int{len(d.bias)}, f: d.bias}
		}
		// Any layout that ends in the contracted axis will do.
		x := n.in[0]
		layout := r.layoutOf(x)
		if rank := r.rank(x); layout != nil && layout[rank-1] != rank-1 {
			layout = nil
		}
		r.site(n.out[0], layout, op, w.c, w.name, []int{1, 0}, b, "", r.in(x, layout))
		return nil
	}
	op := nn.MatMul{}
	if f, ok := n.fused.(fusedMatMul); ok {
		op.Scale = f.scale
	}
	r.put(n.out[0], nil, op, r.natural(n.in[0]), r.natural(n.in[1]))
	return nil
}

func buildGemm(r *builder, n *node) error {
	alpha, beta := n.float("alpha", 1), n.float("beta", 1)
	w := r.g.values[n.in[1]]
	c := r.g.arg(n, 2)
	out := n.out[0]
	o := r.shape(out)[1]
	perm := []int{1, 0}
	if n.int("transB", 0) != 0 {
		perm = nil
	}
	if w.c != nil && isFloat(w.dtype) && alpha == 1 && n.int("transA", 0) == 0 && !r.isConst(n.in[0]) {
		var b *tensor
		name := ""
		if c != nil {
			if c.c == nil || !(c.c.size() == 1 || c.c.size() == o.c && slices.Contains([]int{1, 2}, len(c.c.dims)) && c.c.dims[len(c.c.dims)-1] == o.c) {
				return errors.New("the summand must be a constant of one row")
			}
			flat := *c.c
			flat.dims, flat.from = []int{c.c.size()}, ""
			b, name = &flat, c.name
			if c.c.size() != o.c || beta != 1 {
				b = spread(&flat, []int{o.c})
				for i := range b.f {
					b.f[i] *= float32(beta)
				}
				name = ""
			}
		}
		r.site(out, nil, nn.Dense{Out: o.c, NoBias: b == nil}, w.c, w.name, perm, b, name, r.natural(n.in[0]))
		return nil
	}
	turned := func(i int, attr string) string {
		v := r.natural(n.in[i])
		if n.int(attr, 0) != 0 {
			v = r.add(out+"/turned", nn.Transpose{Perm: []int{1, 0}}, v)
		}
		return v
	}
	a, b := turned(0, "transA"), turned(1, "transB")
	if c == nil {
		r.put(out, nil, nn.MatMul{Scale: alpha}, a, b)
		return nil
	}
	y := r.add(out+"/product", nn.MatMul{Scale: alpha}, a, b)
	s := r.natural(c.name)
	if beta != 1 {
		s = r.add(out+"/summand", nn.Affine{Scale: beta}, s)
	}
	r.put(out, nil, nn.Add, y, s)
	return nil
}

func buildPool(r *builder, n *node) error {
	w := n.fused.(*window)
	l := channelsLast(r.rank(n.in[0]))
	op := nn.Pool{Max: n.op == "MaxPool", Kernel: w.kernel, Stride: w.stride, CountPad: n.int("count_include_pad", 0) == 1}
	if slices.ContainsFunc(w.pad, func(p [2]int) bool { return p != [2]int{} }) {
		op.Pad = w.pad
	}
	r.put(n.out[0], l, op, r.in(n.in[0], l))
	return nil
}

func buildGlobalPool(r *builder, n *node) error {
	x := n.in[0]
	rank := r.rank(x)
	layout := r.layoutOf(x)
	var axes []int
	for a := 2; a < rank; a++ {
		axes = append(axes, position(layout, a, rank))
	}
	slices.Sort(axes)
	fn := "ReduceMean"
	if n.op == "GlobalMaxPool" {
		fn = "ReduceMax"
	}
	r.put(n.out[0], layout, nn.Reduce{Fn: fn, Axes: axes, Keep: true}, r.in(x, layout))
	return nil
}

func buildResize(r *builder, n *node) error {
	p := n.fused.(*resize)
	rank := r.rank(n.in[0])
	if rank < 3 || p.scale[1] != 1 {
		return fmt.Errorf("only spatial axes can be resized, not channels (scales %v)", p.scale)
	}
	op := nn.Resize{
		Linear: n.string("mode", "nearest") == "linear",
		Coord:  nn.Coordinates(n.string("coordinate_transformation_mode", "half_pixel")),
		Round:  nn.Rounding(n.string("nearest_mode", "round_prefer_floor")),
	}
	if p.bySizes {
		op.Size = slices.Clone(p.size[2:])
	} else {
		op.Scale = slices.Clone(p.scale[2:])
	}
	l := channelsLast(rank)
	r.put(n.out[0], l, op, r.in(n.in[0], l))
	return nil
}

func buildBatchNorm(r *builder, n *node) error {
	if n.int("training_mode", 0) != 0 {
		return errors.New("training mode is not supported; export the model for inference")
	}
	if r.rank(n.in[0]) < 2 {
		return fmt.Errorf("input %s has no channels", shapeString(r.shape(n.in[0])))
	}
	l := channelsLast(r.rank(n.in[0]))
	x := r.in(n.in[0], l)
	size := r.shape(n.in[0])[1]
	for i, p := range []struct {
		local string
		role  nn.Role
	}{{"w", nn.Gain}, {"b", nn.Bias}, {"mean", nn.State}, {"var", nn.State}} {
		c, name, err := r.constOf(n, i+1)
		if err != nil {
			return err
		}
		if !slices.Equal(c.dims, []int{size.c}) {
			return fmt.Errorf("parameter %d has shape %v for %s channels", i, c.dims, size)
		}
		r.Share(p.local, r.param(name, c, nil, p.role, n.out[0]+"."+p.local))
	}
	r.put(n.out[0], l, nn.BatchNorm{Eps: n.float("epsilon", 1e-5), Decay: n.float("momentum", .9)}, x)
	return nil
}

func buildLayerNorm(r *builder, n *node) error {
	if len(n.out) > 1 {
		return errors.New("mean and deviation as outputs are not supported")
	}
	rank := r.rank(n.in[0])
	axis, err := axisOf(n.int("axis", -1), rank)
	if err != nil {
		return err
	}
	p := &fusedNorm{eps: n.float("epsilon", 1e-5)}
	for a := axis; a < rank; a++ {
		p.axes = append(p.axes, a)
	}
	f := &fuser{g: r.g}
	for i, dst := range []*[]float32{&p.gain, &p.bias} {
		if n.input(i+1) == "" {
			continue
		}
		v, ok := f.along(n.in[i+1], n.in[0], p.axes)
		if !ok {
			return fmt.Errorf("input %d must be a constant over the normalised axes", i+1)
		}
		*dst = v
	}
	return r.layerNorm(n, p, false)
}

func buildFusedNorm(r *builder, n *node) error {
	return r.layerNorm(n, n.fused.(*fusedNorm), n.op == "~RMSNorm")
}

func (r *builder) layerNorm(n *node, p *fusedNorm, rms bool) error {
	x := n.in[0]
	rank := r.rank(x)
	layout := r.layoutOf(x)
	if len(p.axes) > 1 {
		layout = nil // the order of several axes must be the parameters'
	}
	v := r.in(x, layout)
	var axes, dims []int
	count := 1
	for _, a := range p.axes {
		d := r.shape(x)[a]
		if !d.static() || a == 0 && r.shape(x)[0] == batch {
			return errors.New("normalising over the batch is not supported")
		}
		axes = append(axes, position(layout, a, rank))
		dims = append(dims, d.c)
		count *= d.c
	}
	if p.gain != nil {
		r.Share("w", r.floatParam(n.out[0]+".w", nn.Gain, p.gain, dims...))
	}
	if p.bias != nil {
		r.Share("b", r.floatParam(n.out[0]+".b", nn.Bias, p.bias, dims...))
	}
	if len(axes) == 1 && axes[0] == rank-1 {
		axes = nil
	}
	eps := p.eps
	if eps == 0 {
		eps = 1e-30 // 0 stands for the default
	}
	var op nn.Op = nn.LayerNorm{Eps: eps, Axes: axes, NoGain: p.gain == nil, NoBias: p.bias == nil}
	if rms {
		op = nn.RMSNorm{Eps: eps, Axes: axes, NoGain: p.gain == nil, Bias: p.bias != nil}
	}
	r.put(n.out[0], layout, op, v)
	return nil
}

func buildInstanceNorm(r *builder, n *node) error {
	if r.rank(n.in[0]) < 2 || !r.shape(n.in[0])[1].static() {
		return fmt.Errorf("input %s has no fixed number of channels", shapeString(r.shape(n.in[0])))
	}
	return r.groupNorm(n, r.shape(n.in[0])[1].c)
}

func buildGroupNorm(r *builder, n *node) error {
	if r.g.opset < 21 {
		return errors.New("before operator set 21 its gain is per group, which is not supported; convert the model to 21")
	}
	return r.groupNorm(n, n.int("num_groups", 0))
}

func (r *builder) groupNorm(n *node, groups int) error {
	if r.rank(n.in[0]) < 3 {
		return fmt.Errorf("input %s has no spatial axes", shapeString(r.shape(n.in[0])))
	}
	l := channelsLast(r.rank(n.in[0]))
	x := r.in(n.in[0], l)
	c := r.shape(n.in[0])[1]
	for i, local := range []string{"w", "b"} {
		t, name, err := r.constOf(n, i+1)
		if err != nil {
			return err
		}
		if !slices.Equal(t.dims, []int{c.c}) {
			return fmt.Errorf("parameter %d has shape %v for %s channels", i, t.dims, c)
		}
		r.Share(local, r.param(name, t, nil, []nn.Role{nn.Gain, nn.Bias}[i], n.out[0]+"."+local))
	}
	r.put(n.out[0], l, nn.GroupNorm{Groups: groups, Eps: n.float("epsilon", 1e-5)}, x)
	return nil
}

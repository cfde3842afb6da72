package onnx

import (
	"errors"
	"fmt"
	"math"
	"slices"
)

// window is the geometry of a convolution or pooling, per spatial axis.
type window struct {
	kernel, stride, dilation []int
	pad                      [][2]int
	out                      []int
}

// windowOf resolves kernel, stride, dilation and padding against the spatial sizes.
func windowOf(n *node, spatial []dim, kernel []int) (*window, error) {
	w := &window{kernel: kernel}
	r := len(spatial)
	if len(kernel) != r {
		return nil, fmt.Errorf("kernel %v for %d spatial axes", kernel, r)
	}
	def := func(name string) ([]int, error) {
		v := n.ints(name)
		if v == nil {
			v = slices.Repeat([]int{1}, r)
		}
		if len(v) != r || slices.Min(v) < 1 || slices.Max(v) > 1<<16 {
			return nil, fmt.Errorf("%s %v for %d spatial axes", name, v, r)
		}
		return v, nil
	}
	var err error
	if w.stride, err = def("strides"); err != nil {
		return nil, err
	}
	if w.dilation, err = def("dilations"); err != nil {
		return nil, err
	}
	if slices.Min(kernel) < 1 || slices.Max(kernel) > 1<<16 {
		return nil, fmt.Errorf("kernel %v", kernel)
	}
	pads := n.ints("pads")
	if pads == nil {
		pads = make([]int, 2*r)
	}
	if len(pads) != 2*r || slices.Min(pads) < 0 || slices.Max(pads) > 1<<16 {
		return nil, fmt.Errorf("pads %v for %d spatial axes", pads, r)
	}
	ceil := n.int("ceil_mode", 0) == 1
	auto := n.string("auto_pad", "NOTSET")
	for i, s := range spatial {
		if !s.static() {
			return nil, fmt.Errorf("spatial axis %d depends on the batch", i)
		}
		span := (kernel[i]-1)*w.dilation[i] + 1
		p := [2]int{pads[i], pads[i+r]}
		switch auto {
		case "NOTSET", "":
		case "VALID":
			p = [2]int{}
		case "SAME_UPPER", "SAME_LOWER":
			out := (s.c + w.stride[i] - 1) / w.stride[i]
			all := max((out-1)*w.stride[i]+span-s.c, 0)
			if p = [2]int{all / 2, all - all/2}; auto == "SAME_LOWER" {
				p[0], p[1] = p[1], p[0]
			}
		default:
			return nil, fmt.Errorf("auto_pad %q", auto)
		}
		over := s.c + p[0] + p[1] - span
		if over < 0 {
			return nil, fmt.Errorf("kernel %v is larger than the padded input %d", kernel, s.c+p[0]+p[1])
		}
		out := over/w.stride[i] + 1
		if ceil && over%w.stride[i] != 0 && out*w.stride[i] < s.c+p[0] {
			p[1] += w.stride[i] - over%w.stride[i] // a last, partial window that begins within the input
			out++
		}
		w.pad = append(w.pad, p)
		w.out = append(w.out, out)
	}
	return w, nil
}

func inferConv(g *graph, n *node) error {
	x, err := g.need(n, 0)
	if err != nil {
		return err
	}
	k, err := g.need(n, 1)
	if err != nil {
		return err
	}
	if k.c == nil {
		return errors.New("a kernel that is computed from the data is not supported")
	}
	if len(x.shape) < 3 || len(x.shape) > 5 || len(k.shape) != len(x.shape) {
		return fmt.Errorf("input %s, kernel %s: 1 to 3 spatial axes are supported", shapeString(x.shape), shapeString(k.shape))
	}
	group := n.int("group", 1)
	if group < 1 || x.shape[1] != fixed(k.c.dims[1]*group) || k.c.dims[0]%group != 0 || k.c.size() == 0 {
		return fmt.Errorf("input %s does not fit kernel %s in %d groups", shapeString(x.shape), shapeString(k.shape), group)
	}
	if b := g.arg(n, 2); b != nil && (b.c == nil || !slices.Equal(b.c.dims, k.c.dims[:1])) {
		return fmt.Errorf("the bias must be a constant of %d elements", k.c.dims[0])
	}
	w, err := windowOf(n, x.shape[2:], k.c.dims[2:])
	if err != nil {
		return err
	}
	if v, err := volumeOf(append(fixedShape(w.out), fixedShape(w.kernel)...)); err != nil || v.coef > maxConvTaps {
		return fmt.Errorf("a convolution of %v positions with kernel %v is too large", w.out, w.kernel)
	}
	n.fused = w
	return g.set(n, 0, x.dtype, append([]dim{x.shape[0], fixed(k.c.dims[0])}, fixedShape(w.out)...))
}

// transposed is the geometry of a transposed convolution.
type transposed struct {
	window
	outPad []int
}

func inferConvTranspose(g *graph, n *node) error {
	x, err := g.need(n, 0)
	if err != nil {
		return err
	}
	k, err := g.need(n, 1)
	if err != nil {
		return err
	}
	r := len(x.shape) - 2
	if k.c == nil || r < 1 || r > 3 || len(k.shape) != len(x.shape) {
		return fmt.Errorf("input %s, kernel %s: want a constant kernel and 1 to 3 spatial axes", shapeString(x.shape), shapeString(k.shape))
	}
	group := n.int("group", 1)
	if group < 1 || x.shape[1] != fixed(k.c.dims[0]) || k.c.dims[0]%group != 0 || k.c.size() == 0 {
		return fmt.Errorf("input %s does not fit kernel %s in %d groups", shapeString(x.shape), shapeString(k.shape), group)
	}
	t := &transposed{window: window{kernel: k.c.dims[2:]}}
	def := func(name string, fill int) ([]int, error) {
		v := n.ints(name)
		if v == nil {
			v = slices.Repeat([]int{fill}, r)
		}
		if len(v) != r || slices.Min(v) < fill || slices.Max(v) > 1<<16 {
			return nil, fmt.Errorf("%s %v for %d spatial axes", name, v, r)
		}
		return v, nil
	}
	if t.stride, err = def("strides", 1); err != nil {
		return err
	}
	if t.dilation, err = def("dilations", 1); err != nil {
		return err
	}
	if t.outPad, err = def("output_padding", 0); err != nil {
		return err
	}
	pads := n.ints("pads")
	if pads == nil {
		pads = make([]int, 2*r)
	}
	if len(pads) != 2*r || slices.Min(pads) < 0 || slices.Max(pads) > 1<<16 {
		return fmt.Errorf("pads %v for %d spatial axes", pads, r)
	}
	want := n.ints("output_shape")
	auto := n.string("auto_pad", "NOTSET")
	for i := range r {
		s := x.shape[2+i]
		if !s.static() {
			return fmt.Errorf("spatial axis %d depends on the batch", i)
		}
		span := (t.kernel[i]-1)*t.dilation[i] + 1
		full := (s.c-1)*t.stride[i] + t.outPad[i] + span
		p := [2]int{pads[i], pads[i+r]}
		if len(want) == r || auto == "SAME_UPPER" || auto == "SAME_LOWER" {
			o := s.c * t.stride[i]
			if len(want) == r {
				o = want[i]
			}
			all := max(full-o, 0)
			if p = [2]int{all - all/2, all / 2}; auto == "SAME_UPPER" {
				p = [2]int{all / 2, all - all/2}
			}
			full = max(full, o+all)
		} else if auto == "VALID" {
			p = [2]int{}
		}
		o := full - p[0] - p[1]
		if o < 1 || o > 1<<20 {
			return fmt.Errorf("an output of %d along spatial axis %d", o, i)
		}
		t.pad, t.out = append(t.pad, p), append(t.out, o)
	}
	if v, err := volumeOf(append(fixedShape(t.out), fixedShape(t.kernel)...)); err != nil || v.coef > maxConvTaps {
		return fmt.Errorf("a convolution of %v positions with kernel %v is too large", t.out, t.kernel)
	}
	out := k.c.dims[1] * group
	if b := g.arg(n, 2); b != nil && (b.c == nil || !slices.Equal(b.c.dims, []int{out})) {
		return fmt.Errorf("the bias must be a constant of %d elements", out)
	}
	n.fused = t
	return g.set(n, 0, x.dtype, append([]dim{x.shape[0], fixed(out)}, fixedShape(t.out)...))
}

func inferPool(g *graph, n *node) error {
	x, err := g.need(n, 0)
	if err != nil {
		return err
	}
	if len(n.out) > 1 {
		return errors.New("the positions of the maxima (second output) are not supported")
	}
	if len(x.shape) < 3 || len(x.shape) > 5 {
		return fmt.Errorf("input %s: 1 to 3 spatial axes are supported", shapeString(x.shape))
	}
	w, err := windowOf(n, x.shape[2:], n.ints("kernel_shape"))
	if err != nil {
		return err
	}
	if slices.Max(w.dilation) > 1 {
		return errors.New("dilated pooling is not supported")
	}
	if n.int("ceil_mode", 0) == 1 && n.int("count_include_pad", 0) == 1 {
		return errors.New("ceil_mode together with count_include_pad is not supported")
	}
	n.fused = w
	return g.set(n, 0, x.dtype, append(slices.Clone(x.shape[:2]), fixedShape(w.out)...))
}

func inferGlobalPool(g *graph, n *node) error {
	x, err := g.need(n, 0)
	if err != nil {
		return err
	}
	if len(x.shape) < 3 {
		return fmt.Errorf("input %s has no spatial axes", shapeString(x.shape))
	}
	s := slices.Clone(x.shape)
	for i := 2; i < len(s); i++ {
		s[i] = fixed(1)
	}
	return g.set(n, 0, x.dtype, s)
}

func inferMatMul(g *graph, n *node) error {
	a, err := g.need(n, 0)
	if err != nil {
		return err
	}
	b, err := g.need(n, 1)
	if err != nil {
		return err
	}
	ra, rb := len(a.shape), len(b.shape)
	if ra < 2 || rb < 2 {
		return fmt.Errorf("%s times %s: vectors are not supported, reshape them to matrices", shapeString(a.shape), shapeString(b.shape))
	}
	if a.shape[ra-1] != b.shape[rb-2] {
		return fmt.Errorf("%s times %s does not fit", shapeString(a.shape), shapeString(b.shape))
	}
	lead, err := joinShapes(a.shape[:ra-2], b.shape[:rb-2])
	if err != nil {
		return err
	}
	return g.set(n, 0, a.dtype, append(lead, a.shape[ra-2], b.shape[rb-1]))
}

func inferGemm(g *graph, n *node) error {
	a, err := g.need(n, 0)
	if err != nil {
		return err
	}
	b, err := g.need(n, 1)
	if err != nil {
		return err
	}
	if len(a.shape) != 2 || len(b.shape) != 2 {
		return fmt.Errorf("%s times %s: want matrices", shapeString(a.shape), shapeString(b.shape))
	}
	m, k := a.shape[0], a.shape[1]
	if n.int("transA", 0) != 0 {
		m, k = k, m
	}
	k2, o := b.shape[0], b.shape[1]
	if n.int("transB", 0) != 0 {
		k2, o = o, k2
	}
	if k != k2 {
		return fmt.Errorf("%s times %s does not fit", shapeString(a.shape), shapeString(b.shape))
	}
	return g.set(n, 0, a.dtype, []dim{m, o})
}

// resize is the geometry of a Resize over all axes.
type resize struct {
	scale   []float64
	size    []int // 0: the batch, kept
	bySizes bool
}

func inferResize(g *graph, n *node) error {
	x, err := g.need(n, 0)
	if err != nil {
		return err
	}
	mode, coord := n.string("mode", "nearest"), n.string("coordinate_transformation_mode", "half_pixel")
	if mode != "nearest" && mode != "linear" {
		return fmt.Errorf("mode %q is not supported; use nearest or linear", mode)
	}
	if coord == "tf_crop_and_resize" || n.int("antialias", 0) != 0 || n.ints("axes") != nil || n.string("keep_aspect_ratio_policy", "stretch") != "stretch" {
		return errors.New("cropping, antialiasing, axes and aspect policies are not supported")
	}
	r := &resize{}
	shape := slices.Clone(x.shape)
	if sizes := g.arg(n, 3); sizes != nil && sizes.c != nil && sizes.c.size() > 0 {
		want := sizes.c.ints()
		r.bySizes = true
		if len(want) != len(shape) {
			return fmt.Errorf("%d sizes for %s", len(want), shapeString(shape))
		}
		for i, d := range want {
			if !d.static() || !x.shape[i].static() {
				if d != x.shape[i] && d != fixed(1) {
					return errors.New("the batch cannot be resized")
				}
				r.scale, r.size = append(r.scale, 1), append(r.size, 0)
				continue
			}
			r.scale, r.size = append(r.scale, float64(d.c)/float64(x.shape[i].c)), append(r.size, d.c)
			shape[i] = d
		}
	} else {
		s := g.arg(n, 2)
		if s == nil || s.c == nil || s.c.size() != len(shape) {
			return errors.New("scales or sizes must be constant, one per axis")
		}
		for i, f := range s.c.floats() {
			if !x.shape[i].static() {
				if f != 1 {
					return errors.New("the batch cannot be resized")
				}
				r.scale, r.size = append(r.scale, 1), append(r.size, 0)
				continue
			}
			if !(f > 0 && f < 1<<16) {
				return fmt.Errorf("scale %g", f)
			}
			shape[i] = fixed(int(math.Floor(float64(x.shape[i].c) * float64(f))))
			r.scale, r.size = append(r.scale, float64(f)), append(r.size, shape[i].c)
		}
	}
	n.fused = r
	return g.set(n, 0, x.dtype, shape)
}

package tiny

import (
	"context"
	"fmt"
	"maps"
	"math"
	"slices"

	"github.com/gomlx/compute"
	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/compress/quant"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/fold"
)

// QuantizeOptions say how a network becomes integers.
type QuantizeOptions struct {
	Batch int // cases per pass of the calibration; 0: compress.DefaultBatch
}

// Quantize makes a feed-forward convolutional classifier an integer network: convolutions (over all channels or
// depthwise), ReLU and ReLU6, sums of two, a global average and a dense classifier. Batch norm is folded; activations get
// the min-max range of the calibration cases, or, where the network has one, the 8-bit grid of its quantiser, so that a
// QDQ network keeps its grids. Weights get symmetric grids per output channel. The classifier stays in float.
//
// Errors: ErrEmpty; ErrUnsupported, naming the node; a batch norm that cannot be folded; values that are not finite.
func Quantize(ctx context.Context, b compute.Backend, net *nn.Network, calib compress.Examples, o QuantizeOptions) (*Net, error) {
	if calib.Len() == 0 {
		return nil, ErrEmpty
	}
	if err := calib.Check(net); err != nil {
		return nil, err
	}
	ref := net.Clone()
	if _, err := fold.BatchNorm(ref); err != nil {
		return nil, err
	}
	sh, err := ref.Shapes(1)
	if err != nil {
		return nil, err
	}
	t := &tracer{net: ref, sh: sh, out: &Net{From: Origin{Output: ref.Outputs[0], Meta: maps.Clone(ref.Meta)}}, at: map[string]int{}, grid: map[int]*nn.Node{}}
	if err := t.trace(); err != nil {
		return nil, err
	}
	if err := t.calibrate(ctx, b, calib, o.Batch); err != nil {
		return nil, err
	}
	if err := t.weights(); err != nil {
		return nil, err
	}
	return t.out, t.out.Check()
}

// tracer turns nodes into layers.
type tracer struct {
	net   *nn.Network
	sh    map[string]shapes.Shape
	out   *Net
	at    map[string]int   // value -> activation
	value []string         // activation -> the float value that it stands for, behind its ReLU
	grid  map[int]*nn.Node // activation -> quantiser with its grid
	sites []*nn.Node       // of the convolutions
	head  *nn.Node
}

func (t *tracer) unsupported(n *nn.Node, why string) error {
	return fmt.Errorf("node %q (%s): %w%s; it knows convolutions, ReLU and ReLU6, sums of two, a global average and a dense classifier", n.Name, n.Op.Kind(), ErrUnsupported, why)
}

// tensor adds an activation for a value.
func (t *tracer) tensor(value string) (int, error) {
	d := t.sh[value].Dimensions
	x := Tensor{H: 1, W: 1}
	switch len(d) {
	case 2:
		x.C = d[1]
	case 4:
		x.H, x.W, x.C = d[1], d[2], d[3]
	default:
		return 0, fmt.Errorf("tiny: value %q is %s; want images or features", value, t.sh[value])
	}
	t.out.Tensors = append(t.out.Tensors, x)
	t.value = append(t.value, value)
	t.at[value] = len(t.value) - 1
	return len(t.value) - 1, nil
}

func (t *tracer) trace() error {
	net := t.net
	if len(net.Inputs) != 1 || len(net.Outputs) != 1 {
		return fmt.Errorf("tiny: %d inputs and %d outputs; want a classifier with one of each", len(net.Inputs), len(net.Outputs))
	}
	t.out.From.Input = net.Inputs[0].Name
	if _, err := t.tensor(net.Inputs[0].Name); err != nil {
		return err
	}
	pending := map[string]*Layer{} // value -> the layer that ends there and can still take a ReLU
	for _, n := range net.Nodes {
		if len(n.Out) != 1 || t.head != nil && !t.afterHead(n) {
			return t.unsupported(n, "")
		}
		if t.head != nil {
			continue
		}
		in, known := 0, false
		if len(n.In) > 0 {
			in, known = t.at[n.In[0]]
		}
		if _, constant := n.Op.(nn.Value); constant || !known {
			return t.unsupported(n, "")
		}
		moved := func() { // the value is the same activation
			t.at[n.Out[0]] = in
			if l := pending[n.In[0]]; l != nil {
				pending[n.Out[0]] = l
			}
		}
		s := t.sh[n.In[0]]
		pixel := s.Rank() == 2 || s.Rank() == 4 && t.out.Tensors[in].H == 1 && t.out.Tensors[in].W == 1
		switch op := n.Op.(type) {
		case nn.Conv:
			l, err := t.conv(n, op, in)
			if err != nil {
				return err
			}
			pending[n.Out[0]] = l
		case nn.Dense:
			if !pixel || s.Rank() != 2 {
				return t.unsupported(n, " over several pixels")
			}
			if readers, _ := net.Readers(n.Out[0]); t.last(readers) {
				t.head = n
				continue
			}
			l, err := t.conv(n, nn.Conv{Out: op.Out, Kernel: []int{1, 1}, NoBias: op.NoBias}, in)
			if err != nil {
				return err
			}
			pending[n.Out[0]] = l
		case nn.Binary:
			second, ok := t.at[n.In[1]]
			if op.Fn != "Add" || !ok || t.out.Tensors[in].Size() != t.out.Tensors[second].Size() || !slices.Equal(t.sh[n.In[1]].Dimensions, s.Dimensions) {
				return t.unsupported(n, " of these")
			}
			o, err := t.tensor(n.Out[0])
			if err != nil {
				return err
			}
			l := &Layer{Name: n.Name, Kind: Add, In: []int{in, second}, Out: o, Lo: math.Inf(-1), Hi: math.Inf(1)}
			t.out.Layers = append(t.out.Layers, l)
			pending[n.Out[0]] = l
		case nn.Unary, nn.Clip:
			lo, hi, ok := activation(op)
			if _, identity := op.(nn.Unary); identity && op.Kind() == "Identity" {
				moved()
				continue
			}
			l := pending[n.In[0]]
			if readers, output := net.Readers(n.In[0]); !ok || l == nil || len(readers) != 1 || output {
				return t.unsupported(n, " here")
			}
			l.Lo, l.Hi = max(l.Lo, lo), min(l.Hi, hi)
			t.at[n.Out[0]], t.value[in] = in, n.Out[0]
		case nn.Reduce:
			if op.Fn != "ReduceMean" || s.Rank() != 4 || !spatial(op.Axes) {
				return t.unsupported(n, " over these axes")
			}
			if pixel {
				moved()
				continue
			}
			o, err := t.tensor(n.Out[0])
			if err != nil {
				return err
			}
			t.out.Tensors[o] = Tensor{H: 1, W: 1, C: t.out.Tensors[in].C}
			t.out.Layers = append(t.out.Layers, &Layer{Name: n.Name, Kind: Pool, In: []int{in}, Out: o, Lo: math.Inf(-1), Hi: math.Inf(1)})
		case nn.Reshape: // of one pixel, or of a grey input, whose layouts are the same
			grey := in == 0 && len(t.out.Layers) == 0 && s.Rank() == 4 && oneChannel(s.Dimensions) && t.sh[n.Out[0]].Rank() == 4 && oneChannel(t.sh[n.Out[0]].Dimensions)
			if !pixel && !grey {
				return t.unsupported(n, " of several pixels")
			}
			moved()
		case nn.Transpose:
			switch {
			case pixel:
				moved()
			case in == 0 && len(t.out.Layers) == 0 && slices.Equal(op.Perm, []int{0, 2, 3, 1}):
				d := t.sh[n.Out[0]].Dimensions
				t.out.NCHW = !slices.Equal(d[1:], t.sh[net.Inputs[0].Name].Dimensions[1:])
				t.out.Tensors[0] = Tensor{H: d[1], W: d[2], C: d[3]}
				t.at[n.Out[0]], t.value[0] = 0, n.Out[0]
			default:
				return t.unsupported(n, " of several pixels")
			}
		case nn.Dropout, nn.DropPath:
			moved()
		case nn.QuantizeDequantize:
			if op.Bits == 8 && !op.PerChannel {
				t.grid[in] = n
			}
			moved()
			delete(pending, n.Out[0])
		case nn.BatchNorm:
			if p := net.Producer(n.In[0]); p != nil && p.Op.Kind() == (nn.QuantizeDequantize{}).Kind() {
				return fmt.Errorf("tiny: batch norm %q stands behind quantiser %q; fold batch norms into the convolutions before the network is quantised, or give the float network", n.Name, p.Name)
			}
			return fmt.Errorf("tiny: batch norm %q does not follow a convolution that it could be folded into", n.Name)
		default:
			return t.unsupported(n, "")
		}
	}
	if t.head == nil {
		return fmt.Errorf("tiny: the network does not end in a dense classifier")
	}
	if len(t.out.Layers) == 0 {
		return fmt.Errorf("tiny: the network has no layer in front of its classifier; there is nothing to quantise")
	}
	return nil
}

// last says whether nothing but a softmax and the like comes behind a value.
func (t *tracer) last(readers []*nn.Node) bool {
	for _, r := range readers {
		if !t.afterHead(r) {
			return false
		}
		more, _ := t.net.Readers(r.Out[0])
		if !t.last(more) {
			return false
		}
	}
	return true
}

// afterHead says whether a node may come behind the classifier: it is left out, and the network ends in logits.
func (t *tracer) afterHead(n *nn.Node) bool {
	switch op := n.Op.(type) {
	case nn.Softmax, nn.QuantizeDequantize:
		return true
	case nn.Unary:
		return op.Fn == "Identity"
	}
	return false
}

func activation(op nn.Op) (lo, hi float64, ok bool) {
	switch op := op.(type) {
	case nn.Unary:
		return 0, math.Inf(1), op.Fn == "Relu"
	case nn.Clip:
		return op.Lo, op.Hi, op.Lo <= 0 && op.Hi > 0
	}
	return 0, 0, false
}

// oneChannel says whether images have a single channel, first or last.
func oneChannel(d []int) bool { return d[1] == 1 || d[3] == 1 }

func spatial(axes []int) bool {
	a := slices.Clone(axes)
	for i := range a {
		if a[i] < 0 {
			a[i] += 4
		}
	}
	slices.Sort(a)
	return slices.Equal(a, []int{1, 2})
}

func (t *tracer) conv(n *nn.Node, op nn.Conv, in int) (*Layer, error) {
	if len(op.Kernel) != 2 || slices.ContainsFunc(op.Dilation, func(d int) bool { return d > 1 }) {
		return nil, t.unsupported(n, " with other than two axes, or dilation")
	}
	x := t.out.Tensors[in]
	groups := max(op.Groups, 1)
	depthwise := groups > 1
	if depthwise && (groups != x.C || op.Out != x.C) {
		return nil, t.unsupported(n, fmt.Sprintf(" in %d groups of several channels", groups))
	}
	o, err := t.tensor(n.Out[0])
	if err != nil {
		return nil, err
	}
	l := &Layer{Name: n.Name, Kind: Conv, In: []int{in}, Out: o, Lo: math.Inf(-1), Hi: math.Inf(1), Kernel: [2]int(op.Kernel), Stride: [2]int{1, 1}, Depthwise: depthwise}
	copy(l.Stride[:], op.Stride)
	copy(l.Pad[:], op.Pad)
	t.out.Layers, t.sites = append(t.out.Layers, l), append(t.sites, n)
	return l, nil
}

// calibrate gives every activation its grid.
func (t *tracer) calibrate(ctx context.Context, b compute.Backend, calib compress.Examples, batch int) error {
	var values []string
	for i, v := range t.value {
		if t.grid[i] == nil {
			values = append(values, v)
		}
	}
	ranges := map[string]compress.Range{}
	if len(values) > 0 {
		r, err := compress.Ranges(ctx, b, t.net, calib, batch, values...)
		if err != nil {
			return fmt.Errorf("tiny: calibration: %w", err)
		}
		for i, v := range values {
			ranges[v] = r[i]
		}
	}
	for i, v := range t.value {
		x := &t.out.Tensors[i]
		if q := t.grid[i]; q != nil {
			s, z := t.net.Param(q, "scale"), t.net.Param(q, "zero")
			if s == nil || z == nil {
				return fmt.Errorf("tiny: quantiser %q has no scale or zero point", q.Name)
			}
			x.Scale, x.Zero = float64(s.Data()[0]), int(z.Data()[0])
			if !q.Op.(nn.QuantizeDequantize).Signed {
				x.Zero -= 128
			}
			continue
		}
		r := ranges[v]
		if r.Lo-r.Lo != 0 || r.Hi-r.Hi != 0 {
			return fmt.Errorf("tiny: value %q ranges from %g to %g on the calibration cases: %w", v, r.Lo, r.Hi, quant.ErrNotFinite)
		}
		s, z := quant.RangeAffine(r.Lo, r.Hi, 8)
		x.Scale, x.Zero = s, int(z)-128
	}
	for _, l := range t.out.Layers { // an average lies on the grid of what it averages
		if l.Kind == Pool {
			in := t.out.Tensors[l.In[0]]
			t.out.Tensors[l.Out].Scale, t.out.Tensors[l.Out].Zero = in.Scale, in.Zero
		}
	}
	return nil
}

// weights fills in the codes.
func (t *tracer) weights() error {
	for i, l := range t.out.Convs() {
		w, scale, err := t.weight(t.sites[i])
		if err != nil {
			return err
		}
		in, out := t.out.Tensors[l.In[0]], t.out.Tensors[l.Out]
		sw, _, _ := QuantizeWeights(w, nil, out.C, 8, in.Scale)
		if scale != nil {
			sw = scale
		}
		bias := make([]float64, out.C)
		if p := t.net.Param(t.sites[i], "b"); p != nil {
			for o, v := range p.Data() {
				bias[o] = float64(v)
			}
		}
		l.Scale, l.Weight, l.Bias = sw, make([]float32, len(w)), make([]float32, out.C)
		per := len(w) / out.C
		for k, v := range w {
			l.Weight[k] = float32(min(max(v/sw[k/per], -127), 127))
		}
		for o, v := range bias {
			l.Bias[o] = float32(v / (sw[o] * in.Scale))
		}
	}
	w, _, err := t.weight(t.head)
	if err != nil {
		return err
	}
	op := t.head.Op.(nn.Dense)
	h := Head{Classes: op.Out, B: make([]float32, op.Out)}
	for _, v := range w {
		h.W = append(h.W, float32(v))
	}
	if p := t.net.Param(t.head, "b"); p != nil {
		copy(h.B, p.Data())
	}
	t.out.Head = h
	return nil
}

// weight reads a site's weight, and the scale of each output channel where it is stored in symmetric bytes.
func (t *tracer) weight(n *nn.Node) (w, scale []float64, err error) {
	switch r := n.Op.(nn.Linear).Repr().(type) {
	case nn.Plain:
		if p := t.net.Param(n, "w"); p != nil {
			return nn.Float64s(p.Value), nil, checkFinite(n, p.Data())
		}
	case quant.Uniform:
		grid, err := r.Grid(t.net, n)
		q := t.net.Param(n, "q")
		if err != nil || q == nil {
			return nil, nil, fmt.Errorf("tiny: node %q: its codes or scales are missing", n.Name)
		}
		shape := q.Value.Shape().Dimensions
		codes := make([]int32, q.Value.Shape().Size())
		for i, v := range q.Data() {
			codes[i] = int32(v)
		}
		f, err := grid.Decode(codes, shape)
		if err != nil {
			return nil, nil, err
		}
		for _, v := range f {
			w = append(w, float64(v))
		}
		if symmetric := !slices.ContainsFunc(grid.Zero, func(z float64) bool { return z != float64(int(1)<<(r.Bits-1)) }); symmetric && r.Axis == 0 && r.Group == 0 {
			scale = slices.Clone(grid.Scale)
		}
		return w, scale, checkFinite(n, f)
	}
	return nil, nil, fmt.Errorf("tiny: node %q stores its weight as %s; want float weights or uniform codes", n.Name, n.Op.(nn.Linear).Repr().Kind())
}

func checkFinite(n *nn.Node, w []float32) error {
	return finite(fmt.Sprintf("weight of %q", n.Name), w)
}

// Network writes the integer network as one of nn: weights as signed bytes with a scale per channel, quantisers of int8
// behind every layer, the classifier in float. It computes what the integers do up to one step where a float sum falls on
// the other side of a half; ONNX runtimes run it as integers. The metadata of the original network go with it.
func (n *Net) Network() (*nn.Network, error) {
	if err := n.Check(); err != nil {
		return nil, err
	}
	b := nn.NewBuilder(0)
	name := n.From.Input
	if name == "" {
		name = "image"
	}
	in := n.Tensors[0]
	var x string
	if n.NCHW {
		x = b.Input(name, shapes.Make(dtypes.Float32, 1, in.C, in.H, in.W))
		x = b.Add(name+".nhwc", nn.Transpose{Perm: []int{0, 2, 3, 1}}, x)
	} else {
		x = b.Image(name, in.H, in.W, in.C)
	}
	quantise := func(node, x string, t Tensor) string {
		q := b.Add(node, nn.QuantizeDequantize{Bits: 8, Signed: true}, x)
		b.Set(q, "scale", tensors.FromFlatDataAndDimensions([]float32{float32(t.Scale)}, 1))
		b.Set(q, "zero", tensors.FromFlatDataAndDimensions([]float32{float32(t.Zero)}, 1))
		return q
	}
	value := map[int]string{0: quantise(name+".quant", x, in)}
	stored := map[string]*Layer{}
	for _, l := range n.Layers {
		out := n.Tensors[l.Out]
		switch l.Kind {
		case Conv:
			c := nn.Conv{Out: out.C, Kernel: l.Kernel[:], Stride: l.Stride[:], Pad: l.Pad[:]}
			if l.Depthwise {
				c.Groups = out.C
			}
			x = value[l.In[0]]
			if b.Shape(x).Rank() == 2 {
				x = b.Add(l.Name+".pixel", nn.Reshape{Dims: []int{0, 1, 1, n.Tensors[l.In[0]].C}}, x)
			}
			x = b.Add(l.Name, c, x)
			stored[l.Name] = l
		case Add:
			x = b.Add(l.Name, nn.Add, value[l.In[0]], value[l.In[1]])
		case Pool:
			x = b.Add(l.Name, nn.GlobalAveragePool, value[l.In[0]])
		}
		if lo, hi := l.clamp(out, false); lo > -128 || hi < 127 { // the grid reaches beyond what the ReLU lets through
			x = b.Add(l.Name+".act", nn.Clip{Lo: l.Lo, Hi: l.Hi}, x)
		}
		value[l.Out] = quantise(l.Name+".quant", x, out)
	}
	x = value[n.Layers[len(n.Layers)-1].Out]
	if b.Shape(x).Rank() == 4 {
		x = b.Add("features", nn.Reshape{Dims: []int{0, n.Features().C}}, x)
	}
	head := n.From.Output
	if head == "" || stored[head] != nil {
		head = "head"
	}
	b.Add(head, nn.Dense{Out: n.Head.Classes}, x)
	b.Set(head, "w", tensors.FromFlatDataAndDimensions(slices.Clone(n.Head.W), n.Head.Classes, n.Features().C))
	b.Set(head, "b", tensors.FromFlatDataAndDimensions(slices.Clone(n.Head.B), n.Head.Classes))
	net, err := b.Finish(head)
	if err != nil {
		return nil, err
	}
	for _, node := range net.Nodes {
		l := stored[node.Name]
		if l == nil {
			continue
		}
		out, sx := n.Tensors[l.Out].C, n.Tensors[l.In[0]].Scale
		shape := net.Param(node, "w").Value.Shape().Dimensions
		codes, zero, scale, bias := make([]uint8, len(l.Weight)), make([]float32, out), make([]float32, out), make([]float32, out)
		for i, v := range l.Weight {
			codes[i] = uint8(math.RoundToEven(float64(v)) + 128)
		}
		for o := range out {
			zero[o], scale[o] = 128, float32(l.Scale[o])
			bias[o] = float32(math.RoundToEven(float64(l.Bias[o])) * l.Scale[o] * sx)
		}
		b := net.Param(node, "b")
		if err := b.SetData(bias); err != nil {
			return nil, err
		}
		if _, err := net.Substitute(node.Name, quant.Uniform{Bits: 8, Axis: 0}, map[string]*tensors.Tensor{
			"q":     tensors.FromFlatDataAndDimensions(codes, shape...),
			"scale": tensors.FromFlatDataAndDimensions(scale, out),
			"zero":  tensors.FromFlatDataAndDimensions(zero, out),
		}); err != nil {
			return nil, err
		}
		net.Params.Delete(node.P["w"])
		delete(node.P, "w")
	}
	net.Meta = maps.Clone(n.From.Meta)
	return net, net.Check()
}

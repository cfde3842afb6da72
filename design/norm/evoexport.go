package norm

import (
	"fmt"

	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/onnx"
)

var (
	_ onnx.Exporter = EvoNorm{}
	_ onnx.Exporter = GraphNorm{}
)

// ExportONNX writes the layer at inference as standard ONNX operators on channels-last values.
func (d EvoNorm) ExportONNX(e *onnx.Emitter, n *nn.Node) error {
	if d.Linear {
		exportGainBias(e, n, e.In(n, 0))
		return nil
	}
	o := d.options()
	w := onnxWriter{e, n, o.epsilon()}
	channels := e.Shape(n.In[0]).Dimensions[3]
	groups := groupsOf(o.groups(), channels)
	x := e.In(n, 0)
	m := func(kind, over string) string { return w.root(w.moment(kind, over, x, true, groups, channels)) }
	gated := func(v string) string { return w.op("Mul", x, w.op("Sigmoid", v)) }
	var y string
	switch l := d.layer(); l {
	case B0, B1, B2:
		var other string
		switch l {
		case B0:
			other = w.op("Add", w.op("Mul", x, e.Param(n, "v", nil)), m("std", "wh"))
		case B1:
			other = w.op("Mul", w.op("Add", x, e.Scalar(1)), m("rms", "wh"))
		case B2:
			other = w.op("Sub", m("rms", "wh"), x)
		}
		y = w.op("Div", x, w.op("Max", other, w.root(e.Param(n, "var", nil))))
	case S0:
		y = w.op("Div", gated(w.op("Mul", x, e.Param(n, "v", nil))), m("std", "whc/g"))
	case S1:
		y = w.op("Div", gated(x), m("std", "whc/g"))
	case S2:
		y = w.op("Div", gated(x), m("rms", "whc/g"))
	default:
		return fmt.Errorf("there is no layer %q; use one of %v", l, EvoLayers())
	}
	exportGainBias(e, n, y)
	return nil
}

// ExportONNX writes the graph at inference as standard ONNX operators on channels-last values.
func (d GraphNorm) ExportONNX(e *onnx.Emitter, n *nn.Node) error {
	if d.Linear {
		exportGainBias(e, n, e.In(n, 0))
		return nil
	}
	if err := d.Layer.Check(); err != nil {
		return err
	}
	o := d.options()
	w := onnxWriter{e, n, o.epsilon()}
	channels := e.Shape(n.In[0]).Dimensions[3]
	groups := groupsOf(o.groups(), channels)
	type value struct {
		name string
		full bool // has x's shape, no axis of size 1 instead
		wide bool // has all channels
	}
	perChannel := func(local string) value {
		if n.P[local] == "" {
			return value{}
		}
		return value{w.op("Reshape", e.Param(n, local, nil), e.List(1, 1, 1, channels)), false, true}
	}
	values := []value{{e.In(n, 0), true, true}, {}, perChannel("v0"), perChannel("v1")}
	if d.Layer.uses(valueZero) {
		values[valueZero] = value{e.Floats(n.Name+"/zero", []float32{0}, 1, 1, 1, 1), false, channels == 1}
	}
	for i, g := range d.Layer.Nodes {
		a := values[g.In[0]]
		y := a
		switch g.Op {
		case "add", "mul", "div", "max":
			b := values[g.In[1]]
			y.full, y.wide = a.full || b.full, a.wide || b.wide
			switch g.Op {
			case "add":
				y.name = w.op("Add", a.name, b.name)
			case "mul":
				y.name = w.op("Mul", a.name, b.name)
			case "max":
				y.name = w.op("Max", a.name, b.name)
			case "div":
				sign := w.op("Where", w.op("GreaterOrEqual", b.name, e.Scalar(0)), e.Scalar(w.eps), e.Scalar(-w.eps))
				y.name = w.op("Div", a.name, w.op("Add", b.name, sign))
			}
		case "neg", "sigmoid", "tanh", "exp", "abs":
			y.name = w.op(map[string]string{"neg": "Neg", "sigmoid": "Sigmoid", "tanh": "Tanh", "exp": "Exp", "abs": "Abs"}[g.Op], a.name)
		case "square":
			y.name = w.op("Mul", a.name, a.name)
		case "log":
			y.name = w.op("Mul", w.op("Sign", a.name), w.op("Log", w.op("Add", w.op("Abs", a.name), e.Scalar(w.eps))))
		case "sqrt":
			y.name = w.op("Mul", w.op("Sign", a.name), w.root(w.op("Abs", a.name)))
		default: // moments
			if g.I == "bwh" {
				y = perChannel(d.running(i))
			} else {
				y = value{w.moment(g.Op, g.I, a.name, a.wide, groups, channels), false, a.wide && (g.I == "wh" || g.I == "whc/g" && groups > 1)}
			}
			if g.Op != "mean" {
				y.name = w.root(y.name)
			}
		}
		values = append(values, y)
	}
	y := values[len(values)-1]
	if !y.full {
		y.name = w.op("Expand", y.name, w.op("Shape", values[valueX].name))
	}
	exportGainBias(e, n, y.name)
	return nil
}

// exportGainBias writes gain·y + bias as the node's output.
func exportGainBias(e *onnx.Emitter, n *nn.Node, y string) {
	y = e.Node("Mul", n.Name+"/scaled", []string{y, e.Param(n, "w", nil)})
	e.Out(n, nil, "Add", []string{y, e.Param(n, "b", nil)})
}

// onnxWriter adds nodes named after one node of the network.
type onnxWriter struct {
	e   *onnx.Emitter
	n   *nn.Node
	eps float64
}

func (w onnxWriter) op(kind string, in ...string) string {
	return w.e.Node(kind, w.n.Name+"/"+kind, in)
}

// root is √(v+ε).
func (w onnxWriter) root(v string) string {
	return w.op("Sqrt", w.op("Add", v, w.e.Scalar(w.eps)))
}

func (w onnxWriter) mean(v string, axes []int) string {
	if w.e.Opset() < 18 {
		return w.e.Node("ReduceMean", w.n.Name+"/mean", []string{v}, onnx.Ints("axes", axes...), onnx.Int("keepdims", 1))
	}
	return w.e.Node("ReduceMean", w.n.Name+"/mean", []string{v, w.e.List(axes...)}, onnx.Int("keepdims", 1))
}

// moment is the function of that name, as nodes. wide says whether x has all channels.
func (w onnxWriter) moment(kind, over, x string, wide bool, groups, channels int) string {
	axes := map[string][]int{"wh": {1, 2}, "whc": {1, 2, 3}, "whc/g": {1, 2, 3}}[over]
	grouped := over == "whc/g" && wide && groups > 1
	if grouped {
		x, axes = w.op("Reshape", x, w.e.List(0, 0, 0, groups, channels/groups)), []int{1, 2, 4}
	}
	var v string
	switch kind {
	case "mean":
		v = w.mean(x, axes)
	case "rms":
		v = w.mean(w.op("Mul", x, x), axes)
	default:
		centred := w.op("Sub", x, w.mean(x, axes))
		v = w.mean(w.op("Mul", centred, centred), axes)
	}
	if grouped {
		v = w.op("Reshape", w.op("Expand", v, w.e.List(1, 1, 1, groups, channels/groups)), w.e.List(0, 1, 1, channels))
	}
	return v
}

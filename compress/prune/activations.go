package prune

import (
	"context"
	"fmt"
	"slices"

	"github.com/gomlx/compute"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/nn"
)

// ActivationLayer is a place in a network where an activation meets a dense layer.
type ActivationLayer struct {
	Name     string `json:"layer"` // of the node that computes the activation
	Value    string `json:"value"` // what is measured: the activation, or of a gated layer without exact zeros the product
	Function string `json:"function"`
	// Exact says that inactive entries are exactly 0, as behind ReLU. Otherwise Relative is the threshold.
	Exact bool     `json:"exact_zeros"`
	Gated bool     `json:"gated"` // the dense layer reads the activation times another value
	Sites []string `json:"sites"` // dense layers, and convolutions of size 1, that read it
	Width int      `json:"width"` // hidden units
	MACs  int64    `json:"macs"`  // multiply-adds of the sites for one case

	places []place
}

// place is an input of a node.
type place struct {
	node  string
	input int
}

// NearZero is the magnitude, relative to the largest of the token, from which on an entry counts as active where the
// activation has no exact zeros (arXiv:2210.06313 compares GELU networks so).
const NearZero = 1e-2

// activationOf names an activation function, "" for other ops. Exact: it is 0 for half of its inputs and positive else.
func activationOf(op nn.Op) (name string, exact bool) {
	switch o := op.(type) {
	case nn.Unary:
		switch o.Fn {
		case "Relu":
			return "ReLU", true
		case "Silu", "HardSwish", "Softplus", "Tanh":
			return o.Fn, false
		}
	case ReLUTopK:
		return "ReLU top-k", true
	case MagnitudeTopK:
		return "top-k", false
	case nn.Clip:
		if o.Lo == 0 {
			return "clipped ReLU", true
		}
	case nn.GELU:
		return "GELU", false
	case nn.LeakyReLU:
		return "leaky ReLU", false
	case nn.PReLU:
		return "PReLU", false
	}
	return "", false
}

// keepsRows says whether an op of one input leaves the rows of the last axis as they are, up to a factor.
func keepsRows(op nn.Op, in, out []int) bool {
	switch o := op.(type) {
	case nn.Unary:
		return o.Fn == "Identity"
	case nn.Dropout, nn.DropPath, nn.QuantizeDequantize, nn.Cast:
		return true
	case nn.Reshape:
		return len(in) > 0 && len(out) > 0 && in[len(in)-1] == out[len(out)-1]
	}
	return false
}

// ActivationLayers finds the activations of a network that feed a dense layer (or a convolution of size 1), in execution
// order: directly, through dropout, a quantiser or a reshape that keeps the rows, or multiplied with another value as in
// gated layers. A network without any is refused.
func ActivationLayers(net *nn.Network) ([]ActivationLayer, error) {
	shape, err := net.Shapes(0)
	if err != nil {
		return nil, err
	}
	cost, err := net.Cost(1)
	if err != nil {
		return nil, err
	}
	var out []ActivationLayer
	for _, site := range net.Sites() {
		if !dense(site.Op) {
			continue
		}
		l, ok := findActivation(net, site, func(v string) []int { return shape[v].Dimensions })
		if !ok {
			continue
		}
		if at := slices.IndexFunc(out, func(o ActivationLayer) bool { return o.Value == l.Value }); at >= 0 {
			out[at].Sites = append(out[at].Sites, site.Name)
			out[at].MACs += cost.ByNode[site.Name]
			if !slices.Contains(out[at].places, l.places[0]) {
				out[at].places = append(out[at].places, l.places...)
			}
			continue
		}
		d := shape[l.Value].Dimensions
		l.Width, l.Sites, l.MACs = d[len(d)-1], []string{site.Name}, cost.ByNode[site.Name]
		out = append(out, l)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("prune: no dense layer of the network reads an activation function; there is no activation sparsity to measure")
	}
	return out, nil
}

// dense says whether a site multiplies the last axis alone.
func dense(op nn.Op) bool {
	switch o := op.(type) {
	case nn.Dense:
		return true
	case nn.Conv:
		return o.Groups <= 1 && !slices.ContainsFunc(o.Kernel, func(k int) bool { return k != 1 })
	}
	return false
}

// findActivation walks back from a site to the activation that it reads.
func findActivation(net *nn.Network, site *nn.Node, dims func(string) []int) (l ActivationLayer, ok bool) {
	at := place{site.Name, 0}
	value := site.In[0]
	var product *ActivationLayer // where a gate's product was met on the way
	for {
		x := net.Producer(value)
		if x == nil || len(dims(value)) == 0 {
			return l, false
		}
		if name, exact := activationOf(x.Op); name != "" {
			l = ActivationLayer{Name: x.Name, Value: value, Function: name, Exact: exact, places: []place{at}}
			if product != nil {
				l.Gated = true
				if !exact {
					l.Value, l.places = product.Value, product.places
				}
			}
			return l, true
		}
		if op, isBinary := x.Op.(nn.Binary); isBinary && op.Fn == "Mul" && product == nil {
			product = &ActivationLayer{Value: value, places: []place{at}}
			if x.In[0] == x.In[1] { // a square
				at, value, product = place{x.Name, 0}, x.In[0], nil
				continue
			}
			// The factor that is an activation: one with exact zeros first.
			best := -1
			for i, v := range x.In {
				p := net.Producer(v)
				if p == nil || !slices.Equal(dims(v), dims(x.Out[0])) {
					continue
				}
				if name, exact := activationOf(p.Op); name != "" && (best < 0 || exact) {
					best = i
				}
			}
			if best < 0 {
				return l, false
			}
			at, value = place{x.Name, best}, x.In[best]
			continue
		}
		if len(x.In) == 0 || !keepsRows(x.Op, dims(x.In[0]), dims(value)) {
			return l, false
		}
		at, value = place{x.Name, 0}, x.In[0]
	}
}

// MeasureOptions say how MeasureActivations runs. The zero value is ready.
type MeasureOptions struct {
	Batch    int    // cases per pass; 0: compress.DefaultBatch
	Valid    []bool // [cases, tokens]: tokens that count; nil: all
	Progress func(done, total int)
}

// MeasureActivations runs the network on the examples and adds the activations of the layers to the probe, under the
// layers' names.
func MeasureActivations(ctx context.Context, b compute.Backend, net *nn.Network, x compress.Examples, layers []ActivationLayer, p *SparsityProbe, o MeasureOptions) error {
	var taps []string
	for _, l := range layers {
		taps = append(taps, l.Value)
	}
	e, err := compress.NewEvaluator(b, net, o.Batch, taps...)
	if err != nil {
		return err
	}
	defer e.Close()
	if n := x.Len(); o.Valid != nil && (n == 0 || len(o.Valid)%n != 0) {
		return fmt.Errorf("prune: %d marks of valid tokens are not rows of %d cases", len(o.Valid), n)
	}
	from := 0
	return e.Each(ctx, x, func(n int, out []*tensors.Tensor) error {
		for i, l := range layers {
			t := out[len(net.Outputs)+i]
			d := t.Shape().Dimensions
			a := nn.Floats(t)
			a = a[:len(a)/d[0]*n]
			tokens := Tokens{}
			if o.Valid != nil {
				per := len(o.Valid) / x.Len()
				if len(a)/l.Width != n*per {
					return fmt.Errorf("prune: layer %q has %d tokens for each case, and %d are marked", l.Name, len(a)/l.Width/n, per)
				}
				tokens.Valid = o.Valid[from*per : (from+n)*per]
			}
			if !l.Exact {
				tokens.Relative = NearZero
			}
			if err := p.ObserveTokens(l.Name, a, l.Width, tokens); err != nil {
				return err
			}
		}
		if from += n; o.Progress != nil {
			o.Progress(from, x.Len())
		}
		return nil
	})
}

// LimitActivations gives a copy of the network in which no token keeps more than k entries of each layer: ReLUTopK
// behind activations with exact zeros, MagnitudeTopK in front of the dense layer otherwise. A k of a layer's width or
// more leaves it alone. It is not retrained: networks that were trained with ReLUTopK lose less.
func LimitActivations(net *nn.Network, layers []ActivationLayer, k int) (*nn.Network, error) {
	if k < 1 {
		return nil, fmt.Errorf("prune: top-k with k = %d; want at least 1", k)
	}
	c := net.Clone()
	for _, l := range layers {
		if k >= l.Width {
			continue
		}
		for i, at := range l.places {
			name := l.Name + ".topk"
			if i > 0 {
				name = fmt.Sprintf("%s.%d", name, i)
			}
			var op nn.Op = ReLUTopK{K: k}
			if !l.Exact {
				op = MagnitudeTopK{K: k}
			}
			if _, err := c.InsertBefore(at.node, at.input, name, op); err != nil {
				return nil, err
			}
		}
	}
	return c, nil
}

package norm

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/gomlx/compute"
	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/nn"
)

// Stack is a network of residual layers, with the values of its stream: Stream[0] enters layer 1, Stream[l] leaves it.
type Stack struct {
	Net    *nn.Network
	Stream []string
	Scopes []string // prefix of the nodes and parameters of layer l at l-1, with its dot
}

// Layers is the number of layers.
func (s *Stack) Layers() int { return len(s.Scopes) }

// StackOf finds the layers of a network whose nodes are named "blk.<i>.…", as those of zoo.Decoder and zoo.ViT are. A layer's
// value is the one that leaves its scope; layers that were removed leave a gap in the numbers.
func StackOf(net *nn.Network) (*Stack, error) {
	s := &Stack{Net: net}
	var numbers []int
	for _, x := range net.Nodes {
		if i, ok := layerOf(x.Name); ok && !slices.Contains(numbers, i) {
			numbers = append(numbers, i)
		}
	}
	if len(numbers) == 0 {
		return nil, errors.New("norm: the network has no layers named blk.0, blk.1 and so on")
	}
	if !slices.IsSorted(numbers) {
		return nil, fmt.Errorf("norm: the network's layers run in the order %v", numbers)
	}
	for _, i := range numbers {
		scope := fmt.Sprintf("blk.%d.", i)
		var enters, leaves []string
		for _, x := range net.Nodes {
			inside := strings.HasPrefix(x.Name, scope)
			for _, v := range x.In {
				if v == "" {
					continue
				}
				switch p := net.Producer(v); {
				case inside && (p == nil || !strings.HasPrefix(p.Name, scope)):
					enters = append(enters, v)
				case !inside && p != nil && strings.HasPrefix(p.Name, scope):
					leaves = append(leaves, v)
				}
			}
		}
		for _, v := range net.Outputs {
			if p := net.Producer(v); p != nil && strings.HasPrefix(p.Name, scope) {
				leaves = append(leaves, v)
			}
		}
		slices.Sort(enters)
		slices.Sort(leaves)
		enters, leaves = slices.Compact(enters), slices.Compact(leaves)
		if len(enters) != 1 || len(leaves) != 1 {
			return nil, fmt.Errorf("norm: layer %s takes %v and gives %v; want one stream in and one out", scope, enters, leaves)
		}
		if len(s.Stream) == 0 {
			s.Stream = enters
		} else if s.Stream[len(s.Stream)-1] != enters[0] {
			return nil, fmt.Errorf("norm: layer %s reads %q, and the layer in front of it gives %q", scope, enters[0], s.Stream[len(s.Stream)-1])
		}
		s.Stream, s.Scopes = append(s.Stream, leaves[0]), append(s.Scopes, scope)
	}
	return s, nil
}

func layerOf(name string) (int, bool) {
	rest, ok := strings.CutPrefix(name, "blk.")
	if !ok {
		return 0, false
	}
	number, _, ok := strings.Cut(rest, ".")
	i, err := strconv.Atoi(number)
	return i, ok && err == nil
}

// LayerGroup names the layer of a parameter, "1" for the first, and "" for one outside of the layers: a group for
// learn.GradientNorms.
func LayerGroup(param string) string {
	if i, ok := layerOf(param); ok {
		return strconv.Itoa(i + 1)
	}
	return ""
}

// MatrixGroup is LayerGroup for matrices alone, in the names of package zoo: without the gains of the norms and without
// biases.
func MatrixGroup(param string) string {
	if strings.HasSuffix(param, ".w") && !strings.Contains(param, ".norm") && !strings.Contains(param, ".out") && !strings.Contains(param, ".gain") {
		return LayerGroup(param)
	}
	return ""
}

// RemoveLayers returns a copy of the network without the given layers (numbered from 1 within the stack). The others keep
// their names, and with them the factors that depend on their original number.
func (s *Stack) RemoveLayers(layers ...int) (*nn.Network, error) {
	drop := map[int]bool{}
	for _, l := range layers {
		if l < 1 || l > s.Layers() {
			return nil, fmt.Errorf("norm: layer %d of %d cannot be removed", l, s.Layers())
		}
		drop[l] = true
	}
	if len(drop) == s.Layers() {
		return nil, fmt.Errorf("norm: all %d layers would be removed; keep one", s.Layers())
	}
	net := s.Net.Clone()
	stream := s.Stream[0]
	for l := 1; l <= s.Layers(); l++ {
		if drop[l] {
			net.ReplaceUses(s.Stream[l], stream)
		} else {
			stream = s.Stream[l]
		}
	}
	for l := range drop {
		for _, x := range slices.Clone(net.Nodes) {
			if strings.HasPrefix(x.Name, s.Scopes[l-1]) {
				net.Remove(x.Name)
			}
		}
	}
	return net, net.Check()
}

// gated returns a copy of the network with a further input "gates" [layers] float32: where 0, a layer hands its input
// on. One compiled network then serves the removal of every layer.
func (s *Stack) gated() *nn.Network {
	net := s.Net.Clone()
	net.Inputs = append(net.Inputs, nn.Input{Name: "gates", Shape: shapes.Make(dtypes.Float32, s.Layers())})
	for l := s.Layers(); l >= 1; l-- {
		name := s.Scopes[l-1] + "onoff"
		out := s.Stream[l]
		net.ReplaceUses(out, name)
		gate := nn.Func{Name: "gate", F: func(_ *nn.Ctx, x []*graph.Node) []*graph.Node {
			open := graph.Reshape(graph.Slice(x[2], graph.AxisElem(l-1)))
			on := graph.BroadcastToShape(graph.GreaterThan(open, graph.ZerosLike(open)), shapes.Make(dtypes.Bool, x[0].Shape().Dimensions...))
			return []*graph.Node{graph.Where(on, x[0], x[1])}
		}}
		at := slices.IndexFunc(net.Nodes, func(x *nn.Node) bool { return slices.Contains(x.Out, out) })
		net.Nodes = slices.Insert(net.Nodes, at+1, &nn.Node{Name: name, Op: gate, In: []string{out, s.Stream[l-1], "gates"}, Out: []string{name}, P: map[string]string{}})
	}
	return net
}

// DepthOptions say what DepthReport measures.
type DepthOptions struct {
	Distances []int // angular distances over so many layers; nil: 1
	NoRemoval bool  // leave the removal of single layers out: it costs as many evaluations as there are layers
	Remove    []int // remove these layers only, one after the other; nil: all. The others' Removal is 0
	Gradients bool  // gradient norms by layer, on the first batch
	Jacobian  int   // random directions for the Jacobian gap of each layer, on the first case; 0: none
	Seed      uint64
	Progress  func(done, total int)
}

// DepthStats is what the layers of a network do, one entry per layer (or per value of the stream).
type DepthStats struct {
	Loss         float64           `json:"loss"`         // nats per predicted token
	Variance     []float64         `json:"variance"`     // [L+1]: mean over tokens of the biased variance over channels of the stream
	Removal      []float64         `json:"removal_loss"` // [L]: by how much the loss rises when the layer is skipped
	Angular      map[int][]float64 `json:"angular"`      // n -> [L+1-n]: angle/π of the last token's state between l and l+n
	Gradient     []float64         `json:"gradient"`     // [L]: L2 norm of the loss's gradient over all parameters of the layer
	GradMatrices []float64         `json:"gradient_matrices"`
	Jacobian     []float64         `json:"jacobian_gap"` // [L]: mean of ‖J·v − v‖ over random unit v
}

// DepthReport measures how much the layers of a causal language model contribute (Sun et al., arXiv:2502.05795, sections 2
// and 3; Li et al., arXiv:2412.13795, section 3.2): the variance of the stream, what the loss becomes without a layer, how
// far a layer turns the last token's state, gradient norms, and how far its Jacobian is from the identity. Each batch is
// tokens and the next tokens, [batch, time] int32. It needs no training. A value that is not finite is an error that
// names the layer.
func DepthReport(ctx context.Context, b compute.Backend, net *nn.Network, batches [][]*tensors.Tensor, o DepthOptions) (*DepthStats, error) {
	s, err := StackOf(net)
	if err != nil {
		return nil, err
	}
	if len(batches) == 0 || len(net.Inputs) != 1 {
		return nil, fmt.Errorf("norm: %d batches for a network of %d inputs; want at least one batch, and one input", len(batches), len(net.Inputs))
	}
	if o.Distances == nil {
		o.Distances = []int{1}
	}
	for _, n := range o.Distances {
		if n < 1 || n > s.Layers() {
			return nil, fmt.Errorf("norm: an angular distance over %d layers of %d", n, s.Layers())
		}
	}
	d := &DepthStats{}
	if err := s.streams(b, batches, o, d); err != nil {
		return nil, err
	}
	if err := s.removal(ctx, b, batches, o, d); err != nil {
		return nil, err
	}
	if o.Gradients {
		loss := learn.LanguageModel(net)
		for _, g := range []struct {
			group func(string) string
			to    *[]float64
		}{{LayerGroup, &d.Gradient}, {MatrixGroup, &d.GradMatrices}} {
			norms, err := learn.GradientNormsOf(b, &net.Params, loss, true, g.group, batches[0]...)
			if err != nil {
				return nil, err
			}
			for _, scope := range s.Scopes {
				*g.to = append(*g.to, norms[LayerGroup(scope)])
			}
		}
	}
	if o.Jacobian > 0 {
		d.Jacobian, err = s.jacobian(b, batches[0][0], o)
	}
	return d, err
}

// streams measures variances and angles.
func (s *Stack) streams(b compute.Backend, batches [][]*tensors.Tensor, o DepthOptions, d *DepthStats) error {
	r, err := nn.NewRunner(b, s.Net, nn.RunOptions{Taps: s.Stream})
	if err != nil {
		return err
	}
	defer r.Finalize()
	d.Variance = make([]float64, s.Layers()+1)
	d.Angular = map[int][]float64{}
	for _, n := range o.Distances {
		d.Angular[n] = make([]float64, s.Layers()+1-n)
	}
	cases := 0
	for _, batch := range batches {
		cases += batch[0].Shape().Dimensions[0]
	}
	for _, batch := range batches {
		out, err := r.Run(batch[0])
		if err != nil {
			return err
		}
		out = out[len(s.Net.Outputs):]
		n := batch[0].Shape().Dimensions[0]
		var last [][]float32 // last token's states by value of the stream
		for l, t := range out {
			if t.Shape().Rank() != 3 {
				return fmt.Errorf("norm: the stream %q is %s; want [batch, tokens, channels]", s.Stream[l], t.Shape())
			}
			v := nn.Floats(t)
			dims := t.Shape().Dimensions
			x, err := MeanVariance(v, dims[2])
			if err != nil {
				return fmt.Errorf("norm: the stream after layer %d (%q): %w", l, s.Stream[l], err)
			}
			d.Variance[l] += x * float64(n) / float64(cases)
			var tokens []float32
			for i := range n {
				end := (i + 1) * dims[1] * dims[2]
				tokens = append(tokens, v[end-dims[2]:end]...)
			}
			last = append(last, tokens)
		}
		for _, by := range o.Distances {
			for l := range d.Angular[by] {
				c := len(last[l]) / n
				for i := range n {
					d.Angular[by][l] += AngularDistance(last[l][i*c:(i+1)*c], last[l+by][i*c:(i+1)*c]) / float64(cases)
				}
			}
		}
	}
	return nil
}

// MeanVariance is the mean over rows of the given width of the biased variance of a row. A value that is not finite is an
// error.
func MeanVariance(v []float32, width int) (float64, error) {
	total := 0.
	for at := 0; at < len(v); at += width {
		mean, sq := 0., 0.
		for _, x := range v[at : at+width] {
			mean += float64(x) / float64(width)
		}
		for _, x := range v[at : at+width] {
			sq += (float64(x) - mean) * (float64(x) - mean)
		}
		total += sq / float64(width)
	}
	total /= float64(len(v) / width)
	if math.IsNaN(total) || math.IsInf(total, 0) {
		return 0, errors.New("a value is not finite")
	}
	return total, nil
}

// AngularDistance is the angle between two vectors as a share of a half turn, from 0 (equal directions) to 1 (opposite).
// A zero vector is at ½ to everything.
func AngularDistance(a, b []float32) float64 {
	var ab, aa, bb float64
	for i := range a {
		x, y := float64(a[i]), float64(b[i])
		ab += x * y
		aa += x * x
		bb += y * y
	}
	c := ab / math.Sqrt(aa*bb)
	if math.IsNaN(c) {
		return .5
	}
	return math.Acos(max(-1, min(1, c))) / math.Pi
}

// removal evaluates the loss without each layer in turn, in one compiled network.
func (s *Stack) removal(ctx context.Context, b compute.Backend, batches [][]*tensors.Tensor, o DepthOptions, d *DepthStats) error {
	net := s.gated()
	r, err := nn.NewRunner(b, lossOf(net), nn.RunOptions{})
	if err != nil {
		return err
	}
	defer r.Finalize()
	evaluate := func(skip int) (float64, error) {
		gates := make([]float32, s.Layers())
		for l := range gates {
			if l+1 != skip {
				gates[l] = 1
			}
		}
		sum, n := 0., 0
		for _, batch := range batches {
			if err := ctx.Err(); err != nil {
				return 0, err
			}
			out, err := r.Run(batch[0], tensors.FromFlatDataAndDimensions(gates, len(gates)), batch[1])
			if err != nil {
				return 0, err
			}
			k := batch[1].Shape().Size()
			sum += nn.Float64s(out[0])[0] * float64(k)
			n += k
		}
		return sum / float64(n), nil
	}
	if d.Loss, err = evaluate(0); err != nil || o.NoRemoval {
		return err
	}
	layers := o.Remove
	if layers == nil {
		for l := range s.Layers() {
			layers = append(layers, l+1)
		}
	}
	d.Removal = make([]float64, s.Layers())
	for i, l := range layers {
		if l < 1 || l > s.Layers() {
			return fmt.Errorf("norm: layer %d of %d cannot be removed", l, s.Layers())
		}
		if o.Progress != nil {
			o.Progress(i, len(layers))
		}
		v, err := evaluate(l)
		if err != nil {
			return err
		}
		d.Removal[l-1] = v - d.Loss
	}
	return nil
}

// lossOf puts the loss at the end of a network, as its only output; its last input is the next tokens.
func lossOf(net *nn.Network) *nn.Network {
	net.Inputs = append(net.Inputs, nn.Input{Name: "next", Shape: net.Inputs[0].Shape})
	f := nn.Func{Name: "loss", F: func(_ *nn.Ctx, x []*graph.Node) []*graph.Node {
		return []*graph.Node{learn.CrossEntropy(x[0], x[1])}
	}}
	net.Nodes = append(net.Nodes, &nn.Node{Name: "loss", Op: f, In: []string{net.Outputs[0], "next"}, Out: []string{"loss"}, P: map[string]string{}})
	net.Outputs = []string{"loss"}
	return net
}

// layer is layer l (from 1) as a network from stream to stream. It shares the stack's parameters.
func (s *Stack) layer(l int, stream shapes.Shape) *nn.Network {
	one := &nn.Network{Inputs: []nn.Input{{Name: s.Stream[l-1], Shape: stream}}, Outputs: []string{s.Stream[l]}}
	for _, x := range s.Net.Nodes {
		if strings.HasPrefix(x.Name, s.Scopes[l-1]) {
			one.Nodes = append(one.Nodes, x)
			for _, p := range x.P {
				if q := s.Net.Params.Get(p); q != nil {
					one.Params.Put(q)
				}
			}
		}
	}
	return one
}

// jacobian is the mean over random unit v of ‖(f(x+h·v) − f(x))/h − v‖ for each layer f, in float64, h = 1e-3.
func (s *Stack) jacobian(b compute.Backend, tokens *tensors.Tensor, o DepthOptions) ([]float64, error) {
	const h = 1e-3
	ids := nn.Floats(tokens)
	time := tokens.Shape().Dimensions[1]
	first := make([]int32, time)
	for i := range first {
		first[i] = int32(ids[i])
	}
	r, err := nn.NewRunner(b, s.Net, nn.RunOptions{DType: dtypes.Float64, Taps: s.Stream})
	if err != nil {
		return nil, err
	}
	defer r.Finalize()
	out, err := r.Run(tensors.FromFlatDataAndDimensions(first, 1, time))
	if err != nil {
		return nil, err
	}
	out = out[len(s.Net.Outputs):]
	gaps := make([]float64, s.Layers())
	for l := 1; l <= s.Layers(); l++ {
		x, fx := nn.Float64s(out[l-1]), nn.Float64s(out[l])
		dims := out[l-1].Shape().Dimensions
		one, err := nn.NewRunner(b, s.layer(l, out[l-1].Shape()), nn.RunOptions{DType: dtypes.Float64})
		if err != nil {
			return nil, err
		}
		draw := rng.New(o.Seed, "jacobian:"+s.Scopes[l-1])
		for range o.Jacobian {
			v, norm := make([]float64, len(x)), 0.
			for i := range v {
				v[i] = draw.NormFloat64()
				norm += v[i] * v[i]
			}
			moved := slices.Clone(x)
			for i := range v {
				v[i] /= math.Sqrt(norm)
				moved[i] += h * v[i]
			}
			y, err := one.Run(tensors.FromFlatDataAndDimensions(moved, dims...))
			if err != nil {
				one.Finalize()
				return nil, err
			}
			sum := 0.
			for i, f := range nn.Float64s(y[0]) {
				e := (f-fx[i])/h - v[i]
				sum += e * e
			}
			gaps[l-1] += math.Sqrt(sum) / float64(o.Jacobian)
		}
		one.Finalize()
	}
	return gaps, nil
}

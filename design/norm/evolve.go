package norm

import (
	"cmp"
	"fmt"

	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// Space is what the search may build.
type Space struct {
	Batch bool // moments over the batch are allowed: the B layers; otherwise the S layers
	Nodes int  // nodes of a layer, dead ones included; 0: 10, at most MaxLayerNodes
}

func (s Space) nodes() int { return cmp.Or(s.Nodes, 10) }

func (s Space) indexSets() []string {
	if s.Batch {
		return indexSets
	}
	return indexSets[1:]
}

// Allows says whether a layer lies within the space: its size, and no moment over the batch in an S space.
func (s Space) Allows(l LayerGraph) error {
	if len(l.Nodes) > s.nodes() {
		return fmt.Errorf("norm: the layer has %d nodes, the space %d", len(l.Nodes), s.nodes())
	}
	for i, n := range l.Nodes {
		if n.I == "bwh" && !s.Batch {
			return fmt.Errorf("norm: node %d of the layer takes a moment over the batch, which an S space forbids", i+initialValues)
		}
	}
	return nil
}

// RandomLayer draws a layer of the space node by node: its primitive, its index set and its inputs among the earlier
// values, all with the same chance (arXiv:2004.02967, section 3.1). The output need not depend on x.
func RandomLayer(r *rng.Rand, s Space) LayerGraph {
	var l LayerGraph
	for i := range s.nodes() {
		l.Nodes = append(l.Nodes, randomNode(r, s, i+initialValues))
	}
	return l
}

func randomNode(r *rng.Rand, s Space, earlier int) GNode {
	n := GNode{Op: primitives[r.IntN(len(primitives))]}
	if isMoment(n.Op) {
		sets := s.indexSets()
		n.I = sets[r.IntN(len(sets))]
	}
	for range arity(n.Op) {
		n.In = append(n.In, r.IntN(earlier))
	}
	return n
}

// Mutate gives one node, all with the same chance, a new random primitive, index set and inputs. The others stay, dead
// ones included.
func Mutate(r *rng.Rand, l LayerGraph, s Space) LayerGraph {
	c := l.Clone()
	if len(c.Nodes) == 0 {
		return RandomLayer(r, s)
	}
	i := r.IntN(len(c.Nodes))
	key := c.Nodes[i].Key
	c.Nodes[i] = randomNode(r, s, i+initialValues)
	c.Nodes[i].Key = key
	return c
}

// Arch is a network on which layers are judged.
type Arch struct {
	Name string
	// Build makes the network with a layer at its norm-activation slots: one image input, one output of logits.
	Build func(layer zoo.NormAct, seed uint64) (*nn.Network, error)
}

// ProxyArchs are three small networks for images of a size and number of channels: a pre-activation residual network, one
// of inverted bottlenecks (expansion 3), and the same with squeeze-excite, each of two stages of which the first has width
// channels. They stand for the paper's reduced ResNet-50, MobileNetV2 and EfficientNet-B0.
func ProxyArchs(size, channels, classes, width int) []Arch {
	mobile := func(squeeze bool) func(zoo.NormAct, uint64) (*nn.Network, error) {
		return func(layer zoo.NormAct, seed uint64) (*nn.Network, error) {
			return zoo.MobileNet(zoo.MobileNetOptions{Size: size, Channels: channels, Classes: classes, Stages: 2, Width: width, Expansion: 3, SqueezeExcite: squeeze, NormAct: layer, Seed: seed})
		}
	}
	return []Arch{
		{"preact", func(layer zoo.NormAct, seed uint64) (*nn.Network, error) {
			return zoo.PreActResNet(zoo.PreActResNetOptions{Size: size, Channels: channels, Classes: classes, Stages: 2, Width: width, NormAct: layer, Seed: seed})
		}},
		{"mobile", mobile(false)},
		{"mobile-se", mobile(true)},
	}
}

// Package bench times training steps of a fixed set of networks, so that backends and processors can be compared.
package bench

import (
	"fmt"
	"runtime"
	"slices"
	"time"

	"github.com/gomlx/compute"
	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// Network is one network that is timed; test/peers/bench_torch.py has the same in PyTorch.
type Network struct {
	Name string // on the command line and in the peer's script
	What string
	make func() (net *nn.Network, loss learn.LossFunc, batch []*tensors.Tensor, err error)
}

// Networks are all of them, in the order of the table.
var Networks = []Network{
	{"vit", "ViT-A: 28×28, patch 7, width 64, batch 128", func() (*nn.Network, learn.LossFunc, []*tensors.Tensor, error) {
		n, err := zoo.ViT(zoo.ViTOptions{})
		return classifier(n, err, normal(128, 28, 28, 1), labels(10, 128))
	}},
	{"vit384", "ViT of width 384, 6 heads, batch 32", func() (*nn.Network, learn.LossFunc, []*tensors.Tensor, error) {
		n, err := zoo.ViT(zoo.ViTOptions{Dim: 384, Heads: 6})
		return classifier(n, err, normal(32, 28, 28, 1), labels(10, 32))
	}},
	{"resnet", "ResNet-8, 32×32×3, batch 128", func() (*nn.Network, learn.LossFunc, []*tensors.Tensor, error) {
		n, err := zoo.ResNet(zoo.ResNetOptions{Size: 32, Channels: 3})
		return classifier(n, err, normal(128, 32, 32, 3), labels(10, 128))
	}},
	{"dw", "depthwise-separable blocks, 64×64×3, batch 8", func() (*nn.Network, learn.LossFunc, []*tensors.Tensor, error) {
		n, err := depthwise()
		return classifier(n, err, normal(8, 64, 64, 3), labels(10, 8))
	}},
	{"gpt", "character language model: 4 layers of width 128, context 128, batch 16", func() (*nn.Network, learn.LossFunc, []*tensors.Tensor, error) {
		n, err := languageModel(4, 128, 128, 4, 96)
		return tokens(n, err, labels(96, 16, 128), labels(96, 16, 128))
	}},
	{"unet", "U-Net of three levels, 32×32×3, batch 16", func() (*nn.Network, learn.LossFunc, []*tensors.Tensor, error) {
		n, err := unet()
		loss := func(env *nn.Env, batch []*graph.Node) *graph.Node {
			return learn.MSE(n.Lower(env, map[string]*graph.Node{"image": batch[0]})[0], batch[1])
		}
		return n, loss, []*tensors.Tensor{normal(16, 32, 32, 3), normal(16, 32, 32, 3)}, err
	}},
	{"lstm", "LSTM of width 256, unrolled 64, batch 16", func() (*nn.Network, learn.LossFunc, []*tensors.Tensor, error) {
		n, err := zoo.CharLSTM(zoo.CharLSTMOptions{Hidden: 256, Length: 64})
		return tokens(n, err, labels(128, 16, 64), labels(128, 16, 64))
	}},
	{"mlp", "MLP 1024×4, batch 128", func() (*nn.Network, learn.LossFunc, []*tensors.Tensor, error) {
		n, err := zoo.MLP(zoo.MLPOptions{Hidden: []int{1024, 1024, 1024, 1024}})
		return classifier(n, err, normal(128, 784), labels(10, 128))
	}},
}

// Find returns the network of that name.
func Find(name string) (Network, error) {
	var names []string
	for _, n := range Networks {
		if n.Name == name {
			return n, nil
		}
		names = append(names, n.Name)
	}
	return Network{}, fmt.Errorf("bench: there is no network %q; use one of %v", name, names)
}

// Step is what training steps of one network cost, in the form of the peer's script.
type Step struct {
	Network string  `json:"network"`
	Backend string  `json:"backend,omitempty"`
	Threads int     `json:"threads"`
	CPU     float64 `json:"cpu_ms"`   // processor milliseconds of a step, median
	Wall    float64 `json:"wall_ms"`  // milliseconds of a step, median
	First   float64 `json:"first_ms"` // milliseconds of the first step, compilation included
	RSS     int64   `json:"rss_mb"`   // peak resident memory of the process in MB; 0 where it is not known
	Loss    float64 `json:"loss"`     // after the last step: that something was learned
}

// Run times steps after two steps of warm-up, of which the first compiles.
func (n Network) Run(b compute.Backend, steps int) (Step, error) {
	net, loss, batch, err := n.make()
	if err != nil {
		return Step{}, err
	}
	t, err := learn.NewTrainer(b, &net.Params, loss, learn.Options{})
	if err != nil {
		return Step{}, err
	}
	defer t.Finalize()
	s := Step{Network: n.Name, Threads: runtime.GOMAXPROCS(0)}
	var cpu, wall []float64
	for i := range steps + 2 {
		c, w := processorTime(), time.Now()
		info, err := t.Step(batch...)
		if err != nil {
			return s, err
		}
		ms := time.Since(w).Seconds() * 1e3
		if i == 0 {
			s.First = ms
		}
		if i >= 2 {
			cpu, wall = append(cpu, (processorTime()-c).Seconds()*1e3), append(wall, ms)
		}
		s.Loss = info.Loss
	}
	slices.Sort(cpu)
	slices.Sort(wall)
	if len(cpu) > 0 {
		s.CPU, s.Wall = cpu[len(cpu)/2], wall[len(wall)/2]
	}
	s.RSS = peakMemory() >> 20
	return s, nil
}

func classifier(n *nn.Network, err error, batch ...*tensors.Tensor) (*nn.Network, learn.LossFunc, []*tensors.Tensor, error) {
	if err != nil {
		return nil, nil, nil, err
	}
	return n, learn.Classifier(n), batch, nil
}

func tokens(n *nn.Network, err error, batch ...*tensors.Tensor) (*nn.Network, learn.LossFunc, []*tensors.Tensor, error) {
	loss := func(env *nn.Env, batch []*graph.Node) *graph.Node {
		return learn.CrossEntropy(n.Lower(env, map[string]*graph.Node{"tokens": batch[0]})[0], batch[1])
	}
	return n, loss, batch, err
}

func normal(dims ...int) *tensors.Tensor {
	size := 1
	for _, d := range dims {
		size *= d
	}
	v := make([]float32, size)
	rng.Normal(rng.New(1, "bench"), v, 1)
	return tensors.FromFlatDataAndDimensions(v, dims...)
}

func labels(classes int, dims ...int) *tensors.Tensor {
	size := 1
	for _, d := range dims {
		size *= d
	}
	r, v := rng.New(2, "bench"), make([]int32, size)
	for i := range v {
		v[i] = int32(r.IntN(classes))
	}
	return tensors.FromFlatDataAndDimensions(v, dims...)
}

// depthwise is EfficientNet-Lite0's first blocks at half its resolution.
func depthwise() (*nn.Network, error) {
	b := nn.NewBuilder(1)
	x := b.Add("stem", nn.Conv2D(32, 3, 2), b.Image("image", 64, 64, 3))
	in := 32
	for i, o := range []struct{ out, stride, kernel int }{{16, 1, 3}, {24, 2, 3}, {40, 2, 5}, {80, 2, 3}, {112, 1, 5}} {
		b.In(fmt.Sprintf("blk.%d", i), func() {
			x = b.Add("act1", nn.ReLU, b.Add("norm1", nn.BatchNorm{}, b.Add("expand", nn.Conv2D(6*in, 1, 1), x)))
			d := nn.Conv2D(6*in, o.kernel, o.stride)
			d.Groups = 6 * in
			x = b.Add("act2", nn.ReLU, b.Add("norm2", nn.BatchNorm{}, b.Add("depthwise", d, x)))
			x = b.Add("norm3", nn.BatchNorm{}, b.Add("project", nn.Conv2D(o.out, 1, 1), x))
		})
		in = o.out
	}
	return b.Finish(b.Add("head", nn.Dense{Out: 10}, b.Add("pool", nn.GlobalAveragePool, x)))
}

func unet() (*nn.Network, error) {
	b := nn.NewBuilder(1)
	conv := func(name, x string, out, stride int) string {
		return b.Add(name+".act", nn.ReLU, b.Add(name, nn.Conv2D(out, 3, stride), x))
	}
	up := func(name, x, skip string, out int) string {
		x = b.Add(name, nn.ConvTranspose{Out: out, Kernel: []int{2, 2}, Stride: []int{2, 2}}, x)
		return b.Add(name+".skip", nn.Concat{Axis: -1}, x, skip)
	}
	x := conv("enc1", b.Image("image", 32, 32, 3), 16, 1)
	y := conv("enc2", x, 32, 2)
	z := conv("mid", conv("enc3", y, 64, 2), 64, 1)
	z = conv("dec2", up("up2", z, y, 32), 32, 1)
	z = conv("dec1", up("up1", z, x, 16), 16, 1)
	return b.Finish(b.Add("head", nn.Conv2D(3, 1, 1), z))
}

// languageModel has the parts of LLaMA (RMS norm, gated feed-forward) without a causal mask, which costs nothing here.
func languageModel(layers, context, dim, heads, symbols int) (*nn.Network, error) {
	b := nn.NewBuilder(1)
	x := b.Add("embed", nn.Embedding{N: symbols, Dim: dim}, b.Input("tokens", shapes.Make(dtypes.Int32, 1, context)))
	for i := range layers {
		b.In(fmt.Sprintf("blk.%d", i), func() {
			x = b.Add("res1", nn.Add, x, zoo.Attention(b, "attn", b.Add("norm1", nn.RMSNorm{}, x), zoo.AttentionOptions{Heads: heads}))
			h := b.Add("norm2", nn.RMSNorm{}, x)
			gate := b.Add("act", nn.SiLU, b.Add("gate", nn.Dense{Out: 4 * dim, NoBias: true}, h))
			h = b.Add("gated", nn.Mul, gate, b.Add("up", nn.Dense{Out: 4 * dim, NoBias: true}, h))
			x = b.Add("res2", nn.Add, x, b.Add("down", nn.Dense{Out: dim, NoBias: true}, h))
		})
	}
	return b.Finish(b.Add("head", nn.Dense{Out: symbols}, x))
}

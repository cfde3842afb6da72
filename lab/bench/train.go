// Package bench times training steps of a fixed set of networks, so that backends, processors and other frameworks can be
// compared, and sets them against what the machine could do at best.
package bench

import (
	"fmt"
	"runtime"
	"time"

	"github.com/gomlx/compute"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/internal/stat"
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
	{"dw", "EfficientNet-Lite0 (depthwise), 224×224×3, batch 8", func() (*nn.Network, learn.LossFunc, []*tensors.Tensor, error) {
		return efficientNet(224, 8)
	}},
	{"gpt", "CharLLaMA-4: 4 layers of width 128, context 128, batch 16", func() (*nn.Network, learn.LossFunc, []*tensors.Tensor, error) {
		n, err := zoo.Decoder(zoo.DecoderOptions{})
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
	Version string  `json:"version,omitempty"` // of what computed
	Threads int     `json:"threads"`
	CPU     float64 `json:"cpu_ms"`   // processor milliseconds of a step, median
	Wall    float64 `json:"wall_ms"`  // milliseconds of a step, median
	First   float64 `json:"first_ms"` // milliseconds of the first step, compilation included
	RSS     int64   `json:"rss_mb"`   // peak resident memory of the process in MB; 0 where it is not known
	Loss    float64 `json:"loss"`     // after the last step: that something was learned
}

// patience ends the timing of steps that take long, once two of them are timed.
const patience = 4 * time.Second

// Run times steps after two steps of warm-up, of which the first compiles. Fewer are timed when they take long.
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
	var begin time.Time
	for i := range steps + 2 {
		if i == 2 {
			begin = time.Now()
		} else if i >= 4 && time.Since(begin) > patience {
			break
		}
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
	if len(cpu) > 0 {
		s.CPU, s.Wall = stat.Median(cpu), stat.Median(wall)
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
	return n, learn.LanguageModel(n), batch, err
}

func efficientNet(size, batch int) (*nn.Network, learn.LossFunc, []*tensors.Tensor, error) {
	n, err := zoo.EfficientNetLite0(zoo.EfficientNetLite0Options{Size: size})
	return classifier(n, err, normal(batch, size, size, 3), labels(1000, batch))
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

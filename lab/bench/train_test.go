package bench

import (
	"math"
	"testing"

	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine"
	"github.com/lathe-ml/lathe/learn"
	"github.com/lathe-ml/lathe/nn"
)

func TestEveryNetworkTrains(t *testing.T) {
	name := "go"
	if _, err := engine.Open("native"); err == nil {
		name = "native"
	}
	b, err := engine.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range Networks {
		if n.Name == "dw" { // the whole needs 2 GB
			n.make = func() (*nn.Network, learn.LossFunc, []*tensors.Tensor, error) { return efficientNet(48, 2) }
		}
		s, err := n.Run(b, 1)
		if err != nil {
			t.Errorf("%s: %v", n.Name, err)
			continue
		}
		if math.IsNaN(s.Loss) || s.Loss <= 0 || s.Wall <= 0 || s.First <= 0 {
			t.Errorf("%s: %+v", n.Name, s)
		}
	}
	if _, err := Find("vgg"); err == nil {
		t.Error("an unknown network was found")
	}
}

// TestWorkIsCountedByHand: the MLP has products of 784·1024, three of 1024² and 1024·10 on 128 rows, each three times
// but for the gradient of the images.
func TestWorkIsCountedByHand(t *testing.T) {
	mlp, err := Find("mlp")
	if err != nil {
		t.Fatal(err)
	}
	w, err := mlp.Work()
	if err != nil {
		t.Fatal(err)
	}
	parameters := 785*1024 + 3*1025*1024 + 1025*10
	flops := 2 * 128 * float64(2*784*1024+3*(3*1024*1024+1024*10))
	bytes := float64(4*128*784+4*128) + 24*float64(parameters) + 2*4*128*4*1024
	if w.Parameters != parameters || w.FLOPs != flops || w.Bytes != bytes {
		t.Errorf("%d parameters, %g operations, %g bytes; want %d, %g, %g", w.Parameters, w.FLOPs, w.Bytes, parameters, flops, bytes)
	}
	if ms := w.Roofline(Machine{FMA: flops, Bandwidth: bytes / 2}); ms != 2000 {
		t.Errorf("a machine that needs 1 s for the operations and 2 s for the traffic needs %g ms", ms)
	}
	for name, want := range map[string]int{"dw": 4652008, "gpt": 877696, "vit": 139018, "resnet": 78042, "unet": 93939} {
		n, err := Find(name)
		if err != nil {
			t.Fatal(err)
		}
		if w, err := n.Work(); err != nil || w.Parameters != want || !(w.Bytes > 0) {
			t.Errorf("%s: %+v, %v; want the %d parameters of test/peers/bench_torch.py", name, w, err, want)
		}
	}
}

func TestMachineIsMeasured(t *testing.T) {
	if m := MeasureMachine(2); !(m.FMA > 1e8 && m.Bandwidth > 1e7) || m.Threads != 2 {
		t.Errorf("%+v", m)
	}
}

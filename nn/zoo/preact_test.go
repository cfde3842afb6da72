package zoo_test

import (
	"slices"
	"testing"

	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// marked is a norm that is its own activation.
type marked struct{ nn.BatchNorm }

func (marked) AsLinear() nn.Norm { return nn.BatchNorm{NoAffine: true} }

func kinds(n *nn.Network) map[string]int {
	m := map[string]int{}
	for _, x := range n.Nodes {
		m[x.Op.Kind()]++
	}
	return m
}

func TestPreActResNet8(t *testing.T) {
	n, err := zoo.PreActResNet(zoo.PreActResNetOptions{Size: 14, Width: 8, NormAct: zoo.NormAct{Norm: nn.BatchNorm{}}})
	if err != nil {
		t.Fatal(err)
	}
	k := kinds(n)
	if k["conv"] != 9 || k["batchnorm"] != 7 || k["Relu"] != 7 || k["Add"] != 3 || k["dense"] != 1 {
		t.Errorf("ops %v", k)
	}
	shapes, err := n.Shapes(5)
	if err != nil {
		t.Fatal(err)
	}
	if d := shapes["stage.2.0.res"].Dimensions; !slices.Equal(d, []int{5, 4, 4, 32}) {
		t.Errorf("the last stage is %v", d)
	}
	if d := shapes["head"].Dimensions; !slices.Equal(d, []int{5, 10}) {
		t.Errorf("logits %v", d)
	}
	// 3·3·1·8 + 2·3·3·8·8 + (8·16·(9+1) + 9·16·16) + (16·32·(9+1) + 9·32·32) + 7 norms + 330
	if c := n.Params.Count(); c != 72+1152+1280+2304+5120+9216+4*(8+8+8+16+16+32+32)+330 {
		t.Errorf("%d parameters", c)
	}
}

func TestMobileNet(t *testing.T) {
	for _, se := range []bool{false, true} {
		n, err := zoo.MobileNet(zoo.MobileNetOptions{Size: 7, Stages: 2, Width: 6, Expansion: 3, SqueezeExcite: se, NormAct: zoo.NormAct{Norm: nn.GroupNorm{Groups: 2}, Act: nn.SiLU}})
		if err != nil {
			t.Fatal(err)
		}
		k := kinds(n)
		gates := 0
		if se {
			gates = 2
		}
		// The two projections have a norm and no activation.
		if k["groupnorm"] != 8 || k["Silu"] != 6 || k["Sigmoid"] != gates || k["Relu"] != gates || k["Add"] != 1 {
			t.Errorf("se %v: ops %v", se, k)
		}
		x := make([]float32, 3*49)
		for i := range x {
			x[i] = float32(i%5) - 2
		}
		out, err := n.Run(enginetest.Backend(), []*tensors.Tensor{tensors.FromFlatDataAndDimensions(x, 3, 7, 7, 1)})
		if err != nil || out[0].Shape().Size() != 30 {
			t.Errorf("se %v: %v, %v", se, out, err)
		}
	}
}

func TestSelfActivatedNormsTakeNoActivation(t *testing.T) {
	n, err := zoo.MobileNet(zoo.MobileNetOptions{Size: 8, Stages: 2, Width: 2, NormAct: zoo.NormAct{Norm: marked{}}})
	if err != nil {
		t.Fatal(err)
	}
	own, linear := 0, 0
	for _, x := range n.Nodes {
		switch op := x.Op.(type) {
		case marked:
			own++
		case nn.BatchNorm:
			if op.NoAffine {
				linear++
			}
		case nn.Unary:
			t.Errorf("node %q is an activation", x.Name)
		}
	}
	if own != 6 || linear != 2 {
		t.Errorf("%d slots with and %d without activation, want 6 and 2", own, linear)
	}
	if n, err = zoo.PreActResNet(zoo.PreActResNetOptions{Stages: 1}); err != nil || kinds(n)["Relu"] != 3 {
		t.Errorf("no norm: %v", err)
	}
}

func TestPreActRefusals(t *testing.T) {
	for name, err := range map[string]error{
		"stages":     second(zoo.PreActResNet(zoo.PreActResNetOptions{Stages: 9})),
		"blocks":     second(zoo.PreActResNet(zoo.PreActResNetOptions{Blocks: -1})),
		"width":      second(zoo.MobileNet(zoo.MobileNetOptions{Width: -1})),
		"expansion":  second(zoo.MobileNet(zoo.MobileNetOptions{Expansion: -1})),
		"norm":       second(zoo.PreActResNet(zoo.PreActResNetOptions{NormAct: zoo.NormAct{Norm: nn.GroupNorm{Groups: 5}}})),
		"norm of se": second(zoo.MobileNet(zoo.MobileNetOptions{SqueezeExcite: true, NormAct: zoo.NormAct{Norm: nn.GroupNorm{Groups: 5}}})),
	} {
		if err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
}

func second(_ *nn.Network, err error) error { return err }

func TestResNetTakesSelfActivatedNorms(t *testing.T) {
	n, err := zoo.ResNet(zoo.ResNetOptions{Width: 4, Norm: marked{}})
	if err != nil {
		t.Fatal(err)
	}
	// Stem and three first convolutions are activated by their norm; three second ones and two shortcuts are linear; a
	// ReLU stands after each of three sums.
	own := 0
	for _, x := range n.Nodes {
		if _, ok := x.Op.(marked); ok {
			own++
		}
	}
	if k := kinds(n); own != 4 || k["batchnorm"] != 9 || k["Relu"] != 3 {
		t.Errorf("%d activated norms, ops %v", own, k)
	}
	if _, err := zoo.ResNet(zoo.ResNetOptions{Norm: nn.GroupNorm{Groups: 5}}); err == nil {
		t.Error("5 groups of 16 channels were accepted")
	}
}

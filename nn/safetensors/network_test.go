package safetensors_test

import (
	"bytes"
	"errors"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/safetensors"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// halved is a stored form that another package might have.
type halved struct{ Factor float64 }

func (halved) Kind() string { return "halved" }
func (halved) Specs(s shapes.Shape) []nn.Spec {
	return []nn.Spec{{Name: "half", Shape: s, Role: nn.Constant}}
}
func (h halved) Value(c *nn.Ctx) *graph.Node { return graph.MulScalar(c.P("half"), h.Factor) }

func networks(t testing.TB) map[string]*nn.Network {
	t.Helper()
	nets := map[string]*nn.Network{}
	put := func(name string, n *nn.Network, err error) {
		if err != nil {
			t.Fatal(err)
		}
		nets[name] = n
	}
	n, err := zoo.ViT(zoo.ViTOptions{Seed: 1, Depth: 1, Dropout: .1})
	put("vit", n, err)
	n, err = zoo.ResNet(zoo.ResNetOptions{Seed: 1})
	put("resnet", n, err)
	b := nn.NewBuilder(1)
	x := b.Image("image", 6, 6, 4)
	x = b.Add("up", nn.Resize{Scale: []float64{2, 1.5}, Coord: nn.AlignCorners, Linear: true}, x)
	x = b.Add("clip", nn.Clip{Lo: math.Inf(-1), Hi: .75}, x)
	x = b.Add("t", nn.ConvTranspose{Out: 3, Kernel: []int{2, 2}, Stride: []int{2, 2}}, x)
	parts := b.Add("parts", nn.Split{Axis: -1, Sizes: []int{1, 2}}, x)
	x = b.Add("joined", nn.Concat{Axis: 3}, "parts.1", parts)
	x = b.Add("padded", nn.Pad{Pads: [][2]int{{0, 0}, {1, 0}, {0, 2}, {0, 0}}, Mode: nn.PadEdge}, x)
	v := b.Add("v", nn.ConstantValue(shapes.Make(dtypes.Float32, 3)))
	put("images", func() *nn.Network {
		n, e := b.Finish(b.Add("sum", nn.Add, x, v), b.Add("ints", nn.Cast{To: dtypes.Int32}, x))
		err = e
		return n
	}(), err)
	nets["images"].Meta = map[string]string{"preprocess": "imagenet"}
	nets["images"].Params.Get("v.w").Frozen = true
	return nets
}

func networkSeeds(t testing.TB) (seeds [][]byte) {
	for _, name := range []string{"images", "vit"} {
		f, err := safetensors.EncodeNetwork(networks(t)[name])
		if err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		if err := safetensors.Write(&b, f); err != nil {
			t.Fatal(err)
		}
		if b.Len() < 1<<16 {
			seeds = append(seeds, b.Bytes())
		}
	}
	return seeds
}

func TestNetworksReadBackEqual(t *testing.T) {
	for name, net := range networks(t) {
		dir := t.TempDir()
		if peers := os.Getenv("LATHE_PEERS"); peers != "" { // for test/peers/safetensors_written.py
			dir = peers
		}
		path := filepath.Join(dir, name+".safetensors")
		if err := safetensors.WriteNetwork(path, net); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		got, err := safetensors.ReadNetwork(path)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if !reflect.DeepEqual(got.Meta, net.Meta) || !slices.Equal(got.Outputs, net.Outputs) || len(got.Nodes) != len(net.Nodes) {
			t.Errorf("%s: %v %v, %d nodes", name, got.Meta, got.Outputs, len(got.Nodes))
		}
		var a, b []string
		for p := range net.Params.All() {
			a = append(a, p.Name)
			q := got.Params.Get(p.Name)
			if q == nil || q.Role != p.Role || q.Frozen != p.Frozen || !q.Value.Equal(p.Value) {
				t.Errorf("%s: parameter %q came back as %+v", name, p.Name, q)
			}
		}
		for p := range got.Params.All() {
			b = append(b, p.Name)
		}
		if !slices.Equal(a, b) {
			t.Errorf("%s: order of parameters %v, was %v", name, b, a)
		}
		s := net.Inputs[0].Shape.Dimensions
		x := make([]float32, 2*s[1]*s[2]*s[3])
		for i := range x {
			x[i] = float32(i%17)/8 - 1
		}
		in := []*tensors.Tensor{tensors.FromFlatDataAndDimensions(x, 2, s[1], s[2], s[3])}
		want, err := net.Run(enginetest.Backend(), in)
		if err != nil {
			t.Fatal(err)
		}
		have, err := got.Run(enginetest.Backend(), in)
		if err != nil {
			t.Fatal(err)
		}
		for i := range want {
			if !have[i].Equal(want[i]) {
				t.Errorf("%s: output %q differs", name, net.Outputs[i])
			}
		}
	}
}

// TestForeignFormsNeedTheirType reads a network with a stored form of another package.
func TestForeignFormsNeedTheirType(t *testing.T) {
	b := nn.NewBuilder(1)
	x := b.Input("x", shapes.Make(dtypes.Float32, 1, 4))
	net, err := b.Finish(b.Add("d", nn.Dense{Out: 2, W: halved{Factor: .5}}, x))
	if err != nil {
		t.Fatal(err)
	}
	f, err := safetensors.EncodeNetwork(net)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := safetensors.DecodeNetwork(f); err == nil || !strings.Contains(err.Error(), `node "d"`) || !strings.Contains(err.Error(), "safetensors_test.halved") {
		t.Errorf("error is %v", err)
	}
	got, err := safetensors.DecodeNetwork(f, halved{})
	if err != nil {
		t.Fatal(err)
	}
	if r := got.Nodes[0].Op.(nn.Dense).W; r != (halved{Factor: .5}) {
		t.Errorf("the stored form is %#v", r)
	}
}

func TestFunctionsCannotBeWritten(t *testing.T) {
	b := nn.NewBuilder(1)
	x := b.Input("x", shapes.Make(dtypes.Float32, 1, 4))
	net, err := b.Finish(b.Add("mine", nn.Func{Name: "f", F: func(_ *nn.Ctx, x []*graph.Node) []*graph.Node { return x }}, x))
	if err != nil {
		t.Fatal(err)
	}
	if err := safetensors.WriteNetwork(filepath.Join(t.TempDir(), "x"), net); err == nil || !strings.Contains(err.Error(), `node "mine" (func:f)`) {
		t.Errorf("error is %v", err)
	}
}

func TestBrokenGraphsAreRefused(t *testing.T) {
	good, err := safetensors.EncodeNetwork(networks(t)["images"])
	if err != nil {
		t.Fatal(err)
	}
	text := good.Meta["lathe.network"]
	for _, c := range []struct{ name, old, new, want string }{
		{"newer version", `"version":1`, `"version":2`, "version 2 is not read"},
		{"unknown op", "nn.Resize", "nn.Frobnicate", `no op or stored form "nn.Frobnicate"`},
		{"not an op", `{"type":"nn.Clip","Lo":"-Inf","Hi":0.75}`, `{"type":"nn.Plain"}`, "is not an op"},
		{"unknown field", `"Hi":`, `"High":`, `no field "High"`},
		{"wrong kind of field", `"Hi":0.75`, `"Hi":[1]`, "nn.Clip.Hi"},
		{"undefined value", `"in":["up"]`, `"in":["nowhere"]`, "is not defined before it"},
		{"missing parameter", `"name":"t.b","role"`, `"name":"t.q","role"`, `"t.q" has no tensor`},
		{"unknown role", `"role":"bias"`, `"role":"boss"`, `"boss" is not a role`},
		{"sizes that do not fit", `"shape":[1,6,6,4]`, `"shape":[1,6,6,5]`, `node "t" (convtranspose)`},
		{"a huge input", `"shape":[1,6,6,4]`, `"shape":[1,1000000,1000000,4]`, `input "image": shape`},
		{"a negative input", `"shape":[1,6,6,4]`, `"shape":[1,-6,6,4]`, `input "image": shape`},
		{"not JSON", `{"version"`, `{version`, "lathe.network"},
	} {
		if !strings.Contains(text, c.old) {
			t.Errorf("%s: %q is not in the graph %s", c.name, c.old, text)
			continue
		}
		f := *good
		f.Meta = map[string]string{"lathe.network": strings.Replace(text, c.old, c.new, 1)}
		if _, err := safetensors.DecodeNetwork(&f); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error is %v, want one with %q", c.name, err, c.want)
		}
	}
	if _, err := safetensors.DecodeNetwork(&safetensors.File{}); !errors.Is(err, safetensors.ErrNoGraph) {
		t.Errorf("error is %v, want ErrNoGraph", err)
	}
}

package onnx_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/graph"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/onnx"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// randomized gives every parameter of a network values that show a mistake: state and gains too.
func randomized(t *testing.T, net *nn.Network, err error) *nn.Network {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	r := rng.New(3, "onnx")
	for p := range net.Params.All() {
		if p.Value.DType() != dtypes.Float32 {
			continue
		}
		d := p.Data()
		for i := range d {
			switch {
			case p.Role == nn.State && strings.HasSuffix(p.Name, "var"), p.Role == nn.Gain:
				d[i] = .5 + r.Float32()
			case p.Role == nn.State || p.Role == nn.Bias:
				d[i] = r.Float32() - .5
			}
		}
		if err := p.SetData(d); err != nil {
			t.Fatal(err)
		}
	}
	return net
}

// written are networks that between them hold every op of package nn that has an ONNX form.
func written(t *testing.T) map[string]*nn.Network {
	t.Helper()
	nets := map[string]*nn.Network{}
	vit, err := zoo.ViT(zoo.ViTOptions{Seed: 1})
	nets["vit"] = randomized(t, vit, err)
	pooled, err := zoo.ViT(zoo.ViTOptions{Seed: 2, MeanPool: true, Depth: 1, Dropout: .1, Norm: nn.RMSNorm{Bias: true}})
	nets["vit-rms"] = randomized(t, pooled, err)
	res, err := zoo.ResNet(zoo.ResNetOptions{Seed: 1})
	nets["resnet"] = randomized(t, res, err)
	group, err := zoo.ResNet(zoo.ResNetOptions{Seed: 1, Norm: nn.GroupNorm{Groups: 4}})
	nets["resnet-group"] = randomized(t, group, err)
	decoder, err := zoo.Decoder(zoo.DecoderOptions{Symbols: 11, Context: 9, Dim: 24, Depth: 2, KVHeads: 2, Seed: 1})
	nets["decoder"] = randomized(t, decoder, err)

	b := nn.NewBuilder(5)
	x := b.Image("image", 8, 6, 4)
	x = b.Add("transposed", nn.ConvTranspose{Out: 6, Kernel: []int{3, 2}, Stride: []int{2, 2}, Pad: [][2]int{{1, 0}, {0, 0}}, OutPad: []int{1, 0}}, x)
	x = b.Add("grouped", nn.ConvTranspose{Out: 8, Kernel: []int{3, 3}, Groups: 2, Dilation: []int{1, 2}}, x)
	x = b.Add("shuffle", nn.PixelShuffle{R: 2, Order: nn.ChannelMajor}, x)
	x = b.Add("unshuffle", nn.PixelUnshuffle{R: 2, Order: nn.ChannelMajor}, x)
	x = b.Add("shuffle2", nn.PixelShuffle{R: 2}, x)
	x = b.Add("unshuffle2", nn.PixelUnshuffle{R: 2}, x)
	x = b.Add("up", nn.Resize{Scale: []float64{2, 1.5}, Linear: true}, x)
	x = b.Add("down", nn.Resize{Size: []int{9, 7}}, x)
	x = b.Add("pad", nn.Pad{Pads: [][2]int{{0, 0}, {1, 2}, {0, 1}, {0, 0}}, Mode: nn.PadReflect}, x)
	x = b.Add("pad0", nn.Pad{Pads: [][2]int{{0, 0}, {1, 0}, {0, 0}, {0, 0}}, Value: .25}, x)
	x = b.Add("dilated", nn.Conv{Out: 8, Kernel: []int{3, 3}, Dilation: []int{2, 1}, Groups: 4, Pad: [][2]int{{2, 2}, {1, 1}}}, x)
	x = b.Add("prelu", nn.PReLU{}, x)
	x = b.Add("max", nn.Pool{Max: true, Kernel: []int{3, 3}, Stride: []int{2, 2}, Pad: [][2]int{{1, 1}, {1, 1}}}, x)
	x = b.Add("avg", nn.Pool{Kernel: []int{2, 2}, Stride: []int{1, 1}, Pad: [][2]int{{0, 1}, {1, 0}}}, x)
	x = b.Add("avg0", nn.Pool{Kernel: []int{2, 2}, Stride: []int{1, 1}, Pad: [][2]int{{0, 1}, {1, 0}}, CountPad: true}, x)
	parts := b.Add("split", nn.Split{Axis: -1, Sizes: []int{3, 5}}, x)
	x = b.Add("joined", nn.Concat{Axis: 3}, "split.1", parts)
	x = b.Add("instance", nn.GroupNorm{Groups: 8, NoAffine: true}, x)
	x = b.Add("qdq", nn.QuantizeDequantize{Bits: 8}, x)
	x = b.Add("qdq4", nn.QuantizeDequantize{Bits: 4, Signed: true}, x)
	x = b.Add("qdqc", nn.QuantizeDequantize{Bits: 5, PerChannel: true}, x)
	x = b.Add("qdqs", nn.QuantizeDequantize{Bits: 6, Signed: true, PerChannel: true}, x)
	x = b.Add("qdqf", nn.QuantizeDequantize{Bits: 6}, x) // a zero point that is a fraction
	x = b.Add("qdqo", nn.QuantizeDequantize{Bits: 8}, x) // one that is no code
	x = b.Add("norm2", nn.LayerNorm{Axes: []int{1, 2}, NoBias: true}, x)
	x = b.Add("rms1", nn.RMSNorm{Axes: []int{1}, NoGain: true}, x)
	x = b.Add("sm", nn.Softmax{Axis: 2}, x)
	y := b.Add("pooled", nn.Reduce{Fn: "ReduceMax", Axes: []int{2}}, x)
	net, err := b.Finish(x, y, b.Add("arg", nn.ArgMax{Axis: -1}, y))
	net = randomized(t, net, err)
	for name, v := range map[string][]float32{
		"qdq.scale": {.02}, "qdq.zero": {120}, "qdq4.scale": {.3}, "qdq4.zero": {1},
		"qdqc.scale": {.1, .11, .12, .13, .14, .15, .16, .17}, "qdqc.zero": {16, 15, 14, 13, 12, 17, 18, 19},
		"qdqs.scale": {.07, .08, .09, .1, .11, .12, .13, .14}, "qdqs.zero": {0, 1, -1, 2, -2, 3, -3, 0},
		"qdqf.scale": {.053}, "qdqf.zero": {30.25}, "qdqo.scale": {.021}, "qdqo.zero": {-7},
	} {
		if err := net.Params.Get(name).SetData(v); err != nil {
			t.Fatal(err)
		}
	}
	nets["images"] = net

	b = nn.NewBuilder(6)
	x = b.Input("x", shapes.Make(dtypes.Float32, 1, 5, 6))
	x = b.Add("bn", nn.BatchNorm{NoAffine: true}, x)
	// Every function of the same value; their sum shows a mistake in any of them.
	sum, seen := x, 0
	mix := func(v string) {
		seen++
		sum = b.Add(fmt.Sprintf("sum.%d", seen), nn.Add, sum, b.Add(fmt.Sprintf("part.%d", seen), nn.Affine{Scale: .3, Shift: .01}, v))
	}
	for _, fn := range nn.UnaryFunctions() {
		switch fn {
		case "Not":
		case "Log", "Sqrt", "Reciprocal":
			mix(b.Add("fn."+fn, nn.Unary{Fn: fn}, b.Add(fn+".clip", nn.Clip{Lo: .1, Hi: 5}, b.Add(fn+".abs", nn.Unary{Fn: "Abs"}, x))))
		default:
			mix(b.Add("fn."+fn, nn.Unary{Fn: fn}, x))
		}
	}
	mix(b.Add("leaky", nn.LeakyReLU{Alpha: .2}, x))
	mix(b.Add("hs", nn.HardSigmoid{Alpha: .3, Beta: .4}, x))
	mix(b.Add("g1", nn.GELU{}, x))
	mix(b.Add("g2", nn.GELU{Tanh: true}, x))
	mix(b.Add("clip.hi", nn.Clip{Lo: math.Inf(-1), Hi: 1}, x))
	x = sum
	cond := b.Add("cond", nn.Binary{Fn: "Less"}, x, "bn")
	x = b.Add("where", nn.Where{}, b.Add("not", nn.Unary{Fn: "Not"}, cond), x, "bn")
	row := b.Add("row", nn.Value{Shape: shapes.Make(dtypes.Float32, 6), Init: nn.Normal(1)})
	for _, fn := range []string{"Sub", "Mul", "Max", "Min", "Div"} {
		mix(b.Add("b."+fn, nn.Binary{Fn: fn}, x, row))
	}
	mix(b.Add("pow", nn.Binary{Fn: "Pow"}, b.Add("pow.base", nn.Clip{Lo: .1, Hi: 2}, x), row))
	x = b.Add("all", nn.Add, x, sum)
	x = b.Add("log", nn.Softmax{Log: true}, x)
	x = b.Add("gather", nn.Gather{Axis: 1}, x, b.Add("ids", nn.Cast{To: dtypes.Int32}, b.Add("ids.f", nn.Value{Shape: shapes.Make(dtypes.Float32, 3)})))
	x = b.Add("exp1", nn.Expand{Dims: []int{0, 2, 1, 1}}, b.Add("r", nn.Reshape{Dims: []int{0, 1, 3, 6}}, x))
	x = b.Add("sliced", nn.Slice{Axis: 3, From: 1, To: nn.Open, Step: 2}, x)
	x = b.Add("turned", nn.Transpose{Perm: []int{0, 3, 2, 1}}, x)
	z := b.Add("mean", nn.Reduce{Fn: "ReduceMean", Axes: []int{1, 3}, Keep: true}, x)
	w := b.Add("l2", nn.Reduce{Fn: "ReduceL2", Axes: []int{3}}, x)
	net, err = b.Finish(z, w, b.Add("cond.f", nn.Cast{To: dtypes.Float32}, cond))
	nets["functions"] = randomized(t, net, err)

	b = nn.NewBuilder(7)
	ids := b.Input("ids", shapes.Make(dtypes.Int64, 1, 7))
	e := b.Add("embed", nn.Embedding{N: 11, Dim: 6}, ids)
	o := b.Add("hot", nn.OneHot{Depth: 11, On: 2, Off: -1}, ids)
	e = b.Add("sum", nn.Add, e, b.Add("hot.w", nn.Dense{Out: 6, NoBias: true}, o))
	e = b.Add("tied", nn.MatMul{Scale: .5}, e, b.Add("e.t", nn.Transpose{Perm: []int{0, 2, 1}}, e))
	e = b.Add("bn", nn.BatchNorm{}, e)
	h := b.Add("h", nn.Dense{Out: 6}, e)
	net, err = b.Finish(b.Share("w", "embed.w").Add("logits", nn.Dense{Out: 11, NoBias: true}, h))
	nets["tokens"] = randomized(t, net, err)
	return nets
}

func inputs(net *nn.Network, batch int) []*tensors.Tensor {
	r := rng.New(9, "inputs")
	var in []*tensors.Tensor
	for _, i := range net.Inputs {
		d := append([]int{batch}, i.Shape.Dimensions[1:]...)
		n := 1
		for _, x := range d {
			n *= x
		}
		switch i.Shape.DType {
		case dtypes.Int64:
			in = append(in, tensors.FromFlatDataAndDimensions(indices[int64](r, n), d...))
			continue
		case dtypes.Int32:
			in = append(in, tensors.FromFlatDataAndDimensions(indices[int32](r, n), d...))
			continue
		}
		v := make([]float32, n)
		rng.Normal(r, v, 1)
		in = append(in, tensors.FromFlatDataAndDimensions(v, d...))
	}
	return in
}

func indices[T int32 | int64](r *rng.Rand, n int) []T {
	v := make([]T, n)
	for i := range v {
		v[i] = T(r.IntN(11))
	}
	return v
}

// TestWrittenNetworksReadBackEqual writes every op and reads it back; sizes, sharing and outputs stay.
func TestWrittenNetworksReadBackEqual(t *testing.T) {
	for name, net := range written(t) {
		for _, opset := range []int{17, 21} {
			t.Run(fmt.Sprintf("%s/%d", name, opset), func(t *testing.T) {
				file, err := onnx.Marshal(net, onnx.WriteOptions{Opset: opset})
				if err != nil {
					t.Fatal(err)
				}
				again, err := onnx.Read(file, onnx.Options{})
				if err != nil {
					t.Fatal(err)
				}
				if a, b := len(net.Sites()), len(again.Sites()); a != b {
					t.Errorf("%d sites before, %d after", a, b)
				}
				tables := 0 // of positions, and the mask
				if name == "decoder" {
					tables = 2*9*6 + 9*9
				}
				if a, b := net.Params.Count()+tables, again.Params.Count(); a != b && name != "images" && name != "functions" && !(name == "resnet-group" && opset == 17) {
					t.Errorf("%d parameters before, %d after", a, b)
				}
				in := inputs(net, 3)
				want, err := net.Run(backend(t), in)
				if err != nil {
					t.Fatal(err)
				}
				got, err := again.Run(backend(t), in)
				if err != nil {
					t.Fatal(err)
				}
				for i := range want {
					if again.Outputs[i] != net.Outputs[i] {
						t.Errorf("output %q is called %q", net.Outputs[i], again.Outputs[i])
					}
					if !got[i].Shape().Equal(want[i].Shape()) {
						t.Fatalf("output %q is %s, was %s", net.Outputs[i], got[i].Shape(), want[i].Shape())
					}
					a, b := nn.Floats(want[i]), nn.Floats(got[i])
					for j := range a {
						if d := math.Abs(float64(a[j] - b[j])); !(d <= 1e-5*math.Max(1, math.Abs(float64(a[j])))) {
							t.Fatalf("output %q, element %d is %g, was %g", net.Outputs[i], j, b[j], a[j])
						}
					}
				}
				second, err := onnx.Marshal(net, onnx.WriteOptions{Opset: opset})
				if err != nil || !bytes.Equal(file, second) {
					t.Errorf("writing twice gives different files (%v)", err)
				}
				if dir := os.Getenv("LATHE_PEERS"); dir != "" {
					forPeers(t, filepath.Join(dir, fmt.Sprintf("%s-%d", name, opset)), net, file, in, want)
				}
			})
		}
	}
}

// forPeers leaves a model with inputs and outputs for test/peers/onnx_written.py.
func forPeers(t *testing.T, base string, net *nn.Network, file []byte, in, out []*tensors.Tensor) {
	t.Helper()
	if err := os.WriteFile(base+".onnx", file, 0o644); err != nil {
		t.Fatal(err)
	}
	for i, x := range in {
		writeNPY(t, fmt.Sprintf("%s.in.%s.npy", base, net.Inputs[i].Name), x)
	}
	for i, y := range out {
		writeNPY(t, fmt.Sprintf("%s.out.%s.npy", base, net.Outputs[i]), y)
	}
}

func writeNPY(t *testing.T, path string, x *tensors.Tensor) {
	t.Helper()
	var b bytes.Buffer
	descr := "<f4"
	switch x.DType() {
	case dtypes.Int64:
		descr = "<i8"
		err := binary.Write(&b, binary.LittleEndian, tensors.MustCopyFlatData[int64](x))
		if err != nil {
			t.Fatal(err)
		}
	case dtypes.Int32:
		descr = "<i4"
		err := binary.Write(&b, binary.LittleEndian, tensors.MustCopyFlatData[int32](x))
		if err != nil {
			t.Fatal(err)
		}
	default:
		if err := binary.Write(&b, binary.LittleEndian, nn.Floats(x)); err != nil {
			t.Fatal(err)
		}
	}
	dims := strings.Trim(strings.ReplaceAll(fmt.Sprint(x.Shape().Dimensions), " ", ", "), "[]") + ","
	head := fmt.Sprintf("{'descr': '%s', 'fortran_order': False, 'shape': (%s), }", descr, dims)
	head += strings.Repeat(" ", 63-(10+len(head))%64) + "\n"
	file := append([]byte("\x93NUMPY\x01\x00"), byte(len(head)), byte(len(head)>>8))
	if err := os.WriteFile(path, append(append(file, head...), b.Bytes()...), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestUnwritableOpsAreNamed refuses what has no ONNX form.
func TestUnwritableOpsAreNamed(t *testing.T) {
	b := nn.NewBuilder(1)
	x := b.Input("x", shapes.Make(dtypes.Float32, 1, 4))
	y := b.Add("mine", nn.Func{Name: "double", F: func(_ *nn.Ctx, x []*graph.Node) []*graph.Node { return x }}, x)
	net, err := b.Finish(y)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "x.onnx")
	err = onnx.WriteFile(path, net, onnx.WriteOptions{})
	if err == nil || !strings.Contains(err.Error(), `node "mine" (func:double)`) {
		t.Errorf("error is %v", err)
	}
	if _, err := os.Stat(path); err == nil {
		t.Error("a file was left")
	}
}

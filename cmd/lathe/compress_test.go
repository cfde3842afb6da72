package main

import (
	"encoding/json"
	"fmt"
	"image"
	"image/color"
	"image/png"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/onnx"
	"github.com/lathe-ml/lathe/nn/zoo"
)

// writeViT writes a small transformer with random weights as ONNX and 20 inputs for it as .npy.
func writeViT(t *testing.T, dir string) (model, cases string) {
	t.Helper()
	net, err := zoo.ViT(zoo.ViTOptions{Size: 8, Patch: 4, Dim: 16, Depth: 2, Heads: 2, Classes: 5, Seed: 1})
	if err != nil {
		t.Fatal(err)
	}
	model, cases = filepath.Join(dir, "vit.onnx"), filepath.Join(dir, "cases.npy")
	if err := onnx.WriteFile(model, net, onnx.WriteOptions{}); err != nil {
		t.Fatal(err)
	}
	x := make([]float32, 20*64)
	rng.Normal(rng.New(1, "cases"), x, 1)
	if err := data.WriteNPYFile(cases, []int{20, 8, 8, 1}, x); err != nil {
		t.Fatal(err)
	}
	return model, cases
}

func TestCompressWritesWhatItReports(t *testing.T) {
	ownStore(t)
	dir := t.TempDir()
	model, cases := writeViT(t, dir)
	labels := filepath.Join(dir, "labels.csv")
	var csv strings.Builder
	for i := range 20 {
		fmt.Fprintf(&csv, "%d,%d\n", i, i%5)
	}
	if err := os.WriteFile(labels, []byte(csv.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ method, bits string }{{"repq-vit", "8"}, {"repq-vit", "4"}, {"minmax", "8"}, {"minmax", "3"}} {
		t.Run(c.method+c.bits, func(t *testing.T) {
			out, saved := filepath.Join(dir, c.method+c.bits+".onnx"), filepath.Join(dir, "saved.npy")
			code, stdout, stderr := lathe(t, "compress", model, "--method", c.method, "--bits", c.bits, "--calib", cases, "--labels", labels,
				"--save-outputs", saved, "-o", out, "--json", "--backend", "go")
			if code != 0 {
				t.Fatal(code, stderr)
			}
			var r compressResult
			if err := json.Unmarshal([]byte(stdout), &r); err != nil {
				t.Fatal(err)
			}
			if len(r.Sites) != 14 || r.Accuracy == nil || r.Accuracy.Cases != 20 || r.Agreement.Cases != 20 || r.CalibrationCases != 20 {
				t.Errorf("%+v", r)
			}
			if r.Size.Parameters*2 > r.Size.FloatParameters || r.Size.OutputFile <= r.Size.Parameters/2 {
				t.Errorf("%+v", r.Size)
			}
			if c.bits == "8" && r.Agreement.Cosine < .99 {
				t.Errorf("cosine %g at 8 bits", r.Agreement.Cosine)
			}
			html, err := os.ReadFile(r.Report)
			if err != nil || !strings.Contains(string(html), "blk.1.fc2") {
				t.Error("the report does not list the layers:", err)
			}
			back, err := onnx.ReadFile(out, onnx.Options{})
			if err != nil {
				t.Fatal(err)
			}
			x, err := data.ReadNPYFile(cases)
			if err != nil {
				t.Fatal(err)
			}
			y, _, err := compress.Evaluate(t.Context(), enginetest.Backend(), back, compress.Examples{x.Tensor()}, 0)
			if err != nil {
				t.Fatal(err)
			}
			want, err := data.ReadNPYFile(saved)
			if err != nil {
				t.Fatal(err)
			}
			if e := compress.RelativeError(want.Float32s(), y); e > 1e-4 { // ties may round the other way
				t.Errorf("the file gives other outputs than lathe compared: relative error %g", e)
			}
		})
	}
	code, stdout, stderr := lathe(t, "compress", model, "--method", "minmax", "--calib", cases, "-o", filepath.Join(dir, "h.onnx"), "--report", "none", "--backend", "go")
	if code != 0 || !strings.Contains(stdout, "blk.0.attn.q") || !strings.Contains(stdout, "wrote ") {
		t.Error(code, stdout, stderr)
	}
	ours, again := filepath.Join(dir, "ours.safetensors"), filepath.Join(dir, "again.onnx")
	if code, _, stderr := lathe(t, "compress", model, "--method", "repq-vit", "--bits", "4", "--calib", cases, "-o", ours, "-q", "--backend", "go"); code != 0 {
		t.Fatal(code, stderr)
	}
	if net, err := readNetwork(ours, nil); err != nil || net.Node("blk.0.norm1.quant") == nil {
		t.Error(err)
	}
	if code, _, stderr := lathe(t, "compress", ours, "--method", "minmax", "--calib", cases, "-o", again, "--backend", "go"); code != 1 || !strings.Contains(stderr, "quantised already") {
		t.Error(code, stderr)
	}
	if _, err := os.Stat(filepath.Join(dir, "h.report.html")); err == nil {
		t.Error("--report none wrote a report")
	}
}

func TestCompressReadsPictures(t *testing.T) {
	ownStore(t)
	dir := t.TempDir()
	b := nn.NewBuilder(3)
	x := b.Input("x", shapes.Make(dtypes.Float32, 1, 3, 14, 14)) // channels first, as most files have it
	x = b.Add("last", nn.Transpose{Perm: []int{0, 2, 3, 1}}, x)
	x = b.Add("pool", nn.GlobalAveragePool, b.Add("act", nn.ReLU, b.Add("conv", nn.Conv2D(6, 3, 2), x)))
	net, err := b.Finish(b.Add("fc", nn.Dense{Out: 2}, x))
	if err != nil {
		t.Fatal(err)
	}
	model := filepath.Join(dir, "conv.onnx")
	if err := onnx.WriteFile(model, net, onnx.WriteOptions{}); err != nil {
		t.Fatal(err)
	}
	pics := filepath.Join(dir, "pics")
	if err := os.Mkdir(pics, 0o755); err != nil {
		t.Fatal(err)
	}
	labels := "file,label\n"
	for i := range 6 {
		name := fmt.Sprintf("p%d.png", i)
		img := image.NewNRGBA(image.Rect(0, 0, 20+i, 30))
		for k := range img.Pix {
			img.Pix[k] = uint8(k * (i + 1))
		}
		savePicture(t, filepath.Join(pics, name), img)
		labels += fmt.Sprintf("%s,%s\n", name, []string{"cat", "dog"}[i%2])
	}
	csv := filepath.Join(dir, "labels.csv")
	if err := os.WriteFile(csv, []byte(labels), 0o644); err != nil {
		t.Fatal(err)
	}
	code, stdout, stderr := lathe(t, "compress", model, "--method", "minmax", "--calib", pics, "--labels", csv, "-o", filepath.Join(dir, "o.onnx"), "--json", "--backend", "go")
	if code != 0 {
		t.Fatal(code, stderr)
	}
	var r compressResult
	if err := json.Unmarshal([]byte(stdout), &r); err != nil || r.Accuracy == nil || r.Agreement.Cases != 6 {
		t.Fatalf("%+v %v", r, err)
	}
	if err := os.WriteFile(filepath.Join(pics, "bad.png"), []byte("not a picture"), 0o644); err != nil {
		t.Fatal(err)
	}
	code, _, stderr = lathe(t, "compress", model, "--method", "minmax", "--calib", pics, "-o", filepath.Join(dir, "o2.onnx"), "--backend", "go")
	if code != 1 || !strings.Contains(stderr, "bad.png") {
		t.Error(code, stderr)
	}
	if _, err := os.Stat(filepath.Join(dir, "o2.onnx")); err == nil {
		t.Error("a failed run left an output")
	}
}

func savePicture(t *testing.T, path string, img image.Image) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := png.Encode(f, img); err != nil {
		t.Fatal(err)
	}
}

func TestPreprocessing(t *testing.T) {
	img := image.NewRGBA(image.Rect(0, 0, 4, 2))
	for x := range 4 {
		for y := range 2 {
			img.Set(x, y, color.RGBA{uint8(60 * x), uint8(100 * y), 255, 255})
		}
	}
	in := nn.Input{Name: "x", Shape: shapes.Make(dtypes.Float32, 1, 2, 2, 3)}
	for _, c := range []struct {
		spec string
		want []float64 // first two values of the crop, which begins at (1, 0)
	}{
		{"resize=4x2,mean=0,std=1", []float64{60. / 255, 0}},
		{"resize=2,mean=0,std=1,channels=bgr", []float64{1, 0}},
		{"resize=2,mean=0,std=1,scale=255", []float64{60, 0}},
		{"resize=2,mean=0.5,0.25,0,std=0.5", []float64{(60./255 - .5) / .5, -.5}},
		{"resize=2", []float64{(60./255 - .485) / .229, -.456 / .224}},
	} {
		p, err := parsePreprocessing(c.spec)
		if err != nil {
			t.Fatal(c.spec, err)
		}
		if p, err = p.fit(in); err != nil {
			t.Fatal(c.spec, err)
		}
		dst := make([]float32, 12)
		if err := p.apply(img, dst); err != nil {
			t.Fatal(c.spec, err)
		}
		for i, w := range c.want {
			if math.Abs(float64(dst[i])-w) > 1e-4 {
				t.Errorf("%s: value %d is %g, want %g", c.spec, i, dst[i], w)
			}
		}
	}
	// Channels first, and the default of 8/7 of the input.
	p, err := preprocessing{scale: 1}.fit(nn.Input{Name: "x", Shape: shapes.Make(dtypes.Float32, 1, 3, 7, 7)})
	if err != nil || p.layout != "nchw" {
		t.Fatal(p, err)
	}
	big := image.NewGray(image.Rect(0, 0, 80, 160))
	for i := range big.Pix {
		big.Pix[i] = 255
	}
	dst := make([]float32, 3*49)
	if err := p.apply(big, dst); err != nil {
		t.Fatal(err)
	}
	if want := (1 - .406) / .225; math.Abs(float64(dst[2*49+3])-want) > 1e-5 || math.Abs(float64(dst[0])-(1-.485)/.229) > 1e-5 {
		t.Errorf("%g, want %g in the third plane", dst[2*49+3], want)
	}
	for _, spec := range []string{"resize", "size=3", "resize=0", "resize=axb", "std=0,1,1", "mean=x", "channels=cmyk", "layout=chw", "filter=box", "resize=4,resize=5"} {
		if _, err := parsePreprocessing(spec); err == nil {
			t.Errorf("%q accepted", spec)
		}
	}
	for _, spec := range []string{"crop=3", "channels=grey", "mean=1,2"} {
		p, err := parsePreprocessing(spec)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.fit(in); err == nil {
			t.Errorf("%q accepted for %s", spec, in.Shape)
		}
	}
}

func TestCompressRefusesWrongUse(t *testing.T) {
	ownStore(t)
	dir := t.TempDir()
	model, cases := writeViT(t, dir)
	out := filepath.Join(dir, "o.onnx")
	ints, narrow := filepath.Join(dir, "ints.npy"), filepath.Join(dir, "narrow.npy")
	if err := data.WriteNPYFile(ints, []int{2, 8, 8, 1}, make([]uint8, 128)); err != nil {
		t.Fatal(err)
	}
	if err := data.WriteNPYFile(narrow, []int{2, 8, 7, 1}, make([]float32, 112)); err != nil {
		t.Fatal(err)
	}
	nan := filepath.Join(dir, "nan.npy")
	if err := data.WriteNPYFile(nan, []int{1, 8, 8, 1}, append(make([]float32, 63), float32(math.NaN()))); err != nil {
		t.Fatal(err)
	}
	text := filepath.Join(dir, "text.onnx")
	if err := os.WriteFile(text, []byte("no model"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		code int
		want string
		args []string
	}{
		{2, "needs a model", nil},
		{2, "name a method", []string{model, "--calib", cases, "-o", out}},
		{2, "accepted: repq-vit, minmax", []string{model, "--method", "gptq", "--calib", cases, "-o", out}},
		{2, "accepted: 2 to 8", []string{model, "--method", "minmax", "--bits", "1", "--calib", cases, "-o", out}},
		{2, "accepted: 2 to 8", []string{model, "--method", "minmax", "--abits", "9", "--calib", cases, "-o", out}},
		{2, "--calib", []string{model, "--method", "minmax", "-o", out}},
		{2, "-o", []string{model, "--method", "minmax", "--calib", cases}},
		{2, "written as .onnx or", []string{model, "--method", "minmax", "--calib", cases, "-o", filepath.Join(dir, "o.bin")}},
		{2, "would overwrite", []string{model, "--method", "minmax", "--calib", cases, "-o", model}},
		{2, "accepted: channel, tensor", []string{model, "--method", "minmax", "--granularity", "row", "--calib", cases, "-o", out}},
		{2, "repq-vit has no such setting", []string{model, "--method", "repq-vit", "--granularity", "tensor", "--calib", cases, "-o", out}},
		{2, "accepted: log-sqrt2", []string{model, "--method", "repq-vit", "--softmax", "x", "--calib", cases, "-o", out}},
		{2, "17 to 21", []string{model, "--method", "minmax", "--opset", "12", "--calib", cases, "-o", out}},
		{2, "no key=value", []string{model, "--method", "minmax", "--calib", cases, "--preprocess", "256", "-o", out}},
		{1, "no such file", []string{filepath.Join(dir, "none.onnx"), "--method", "minmax", "--calib", cases, "-o", out}},
		{1, "no such file", []string{model, "--method", "minmax", "--calib", filepath.Join(dir, "none.npy"), "-o", out}},
		{1, "text.onnx", []string{text, "--method", "minmax", "--calib", cases, "-o", out}},
		{1, "takes float32", []string{model, "--method", "minmax", "--calib", ints, "-o", out}},
		{1, "takes [cases, 8, 8, 1]", []string{model, "--method", "minmax", "--calib", narrow, "-o", out}},
		{1, "NaN", []string{model, "--method", "repq-vit", "--calib", nan, "-o", out}},
		{1, "NaN", []string{model, "--method", "minmax", "--calib", nan, "-o", out}},
		{1, "one for each case", []string{model, "--method", "minmax", "--calib", cases, "--labels", ints, "-o", out}},
	} {
		code, _, stderr := lathe(t, append([]string{"compress", "--backend", "go"}, c.args...)...)
		if code != c.code || !strings.Contains(stderr, c.want) {
			t.Errorf("%v: exit code %d, want %d; %q does not say %q", c.args, code, c.code, stderr, c.want)
		}
		if _, err := os.Stat(out); err == nil {
			t.Fatalf("%v left an output", c.args)
		}
	}
}

func TestAsInputConvertsIntegers(t *testing.T) {
	a := &data.NPY{DType: "i8", Shape: []int{1, 2}, Data: []int64{3, 300}}
	got, err := asInput(a, nn.Input{Name: "ids", Shape: shapes.Make(dtypes.Int32, 1, 2)})
	if err != nil || tensors.MustCopyFlatData[int32](got)[1] != 300 {
		t.Error(got, err)
	}
	if _, err := asInput(a, nn.Input{Name: "bytes", Shape: shapes.Make(dtypes.Uint8, 1, 2)}); err == nil {
		t.Error("300 is no byte")
	}
}

package main

import (
	"bytes"
	"encoding/json"
	"image"
	"image/color"
	"image/png"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/engine/enginetest"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/onnx"
	"github.com/lathe-ml/lathe/task/restore"
)

// upscale runs "lathe upscale" on the portable backend.
func upscale(t *testing.T, stdin []byte, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = run(append([]string{"--backend", "go", "upscale"}, args...), bytes.NewReader(stdin), &out, &errs)
	return code, out.String(), errs.String()
}

// drawing is a smooth picture with an edge, at any size.
func drawing(w, h int) *image.NRGBA {
	m := image.NewNRGBA(image.Rect(0, 0, w, h))
	for y := range h {
		for x := range w {
			u, v := (float64(x)+.5)/float64(w), (float64(y)+.5)/float64(h)
			c := color.NRGBA{uint8(255 * u), uint8(255 * v), uint8(127 + 120*math.Sin(9*u*v)), 255}
			if math.Hypot(u-.5, v-.5) < .3 {
				c.R, c.B = 255-c.R, 30
			}
			m.SetNRGBA(x, y, c)
		}
	}
	return m
}

func writePNG(t *testing.T, name string, m image.Image) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := png.Encode(f, m); err != nil {
		t.Fatal(err)
	}
	return path
}

func clip(t *testing.T, frames int) []byte {
	t.Helper()
	var b bytes.Buffer
	h := data.Y4MHeader{Width: 16, Height: 12, Rate: [2]int{25, 1}, Chroma: "420jpeg"}
	w, err := data.NewY4MWriter(&b, h)
	if err != nil {
		t.Fatal(err)
	}
	for range frames {
		if err := w.Write(data.NewFrame(h)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestUpscalePicture(t *testing.T) {
	in, original := writePNG(t, "in.png", drawing(30, 20)), writePNG(t, "hr.png", drawing(90, 60))
	for _, ext := range []string{".png", ".jpg", ".tif", ".bmp"} {
		out := filepath.Join(t.TempDir(), "out"+ext)
		code, stdout, stderr := upscale(t, nil, in, "--scale", "3", "--compare", original, "-o", out, "--json")
		if code != 0 {
			t.Fatalf("%s: exit code %d: %s", ext, code, stderr)
		}
		var r upscaleResult
		if err := json.Unmarshal([]byte(stdout), &r); err != nil {
			t.Fatal(err)
		}
		if r.Width != 90 || r.Height != 60 || r.Compared == nil || !(r.Compared.Result.PSNR > 20) {
			t.Errorf("%s: %s", ext, stdout)
		}
		m, _, err := data.ReadImage(out)
		if err != nil || m.Bounds() != image.Rect(0, 0, 90, 60) {
			t.Errorf("%s: %v", ext, err)
		}
	}
	code, stdout, _ := upscale(t, nil, in, "--method", "bicubic", "--scale", "5", "-o", filepath.Join(t.TempDir(), "x.png"))
	if code != 0 || !strings.Contains(stdout, "150×100") {
		t.Errorf("bicubic: exit code %d: %s", code, stdout)
	}
}

func TestUpscaleKeepsGreyAndTransparency(t *testing.T) {
	grey := image.NewGray(image.Rect(0, 0, 9, 7))
	clear := drawing(9, 7)
	clear.Pix[3] = 10
	for name, m := range map[string]image.Image{"grey": grey, "clear": clear} {
		out := filepath.Join(t.TempDir(), "out.png")
		if code, _, stderr := upscale(t, nil, writePNG(t, "in.png", m), "--tile", "-1", "-o", out); code != 0 {
			t.Fatalf("%s: %s", name, stderr)
		}
		got, _, err := data.ReadImage(out)
		if err != nil {
			t.Fatal(err)
		}
		_, isGrey := got.(*image.Gray)
		if want := name == "grey"; isGrey != want {
			t.Errorf("%s became %T", name, got)
		}
		if c, ok := got.(*image.NRGBA); name == "clear" && (!ok || c.Opaque()) {
			t.Errorf("the transparency is gone: %T", got)
		}
	}
}

func TestUpscaleVideoFromFileAndPipe(t *testing.T) {
	dir := t.TempDir()
	in, out := filepath.Join(dir, "in.y4m"), filepath.Join(dir, "out.y4m")
	if err := os.WriteFile(in, clip(t, 3), 0o644); err != nil {
		t.Fatal(err)
	}
	code, stdout, stderr := upscale(t, nil, in, "-o", out)
	if code != 0 || !strings.Contains(stdout, "3 frames") || !strings.Contains(stdout, "frames/s") {
		t.Fatalf("exit code %d: %s%s", code, stdout, stderr)
	}
	file, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	code, piped, stderr := upscale(t, clip(t, 3), "-", "-o", "-")
	if code != 0 || piped != string(file) {
		t.Errorf("the pipe gives other bytes than the file: exit code %d, %s", code, stderr)
	}
	if !strings.HasPrefix(piped, "YUV4MPEG2 W32 H24 F25:1") {
		t.Errorf("header %.40q", piped)
	}
}

func TestUpscaleTrain(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"a.png", "b.png"} {
		if err := os.Rename(writePNG(t, name, drawing(60, 50)), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	model := filepath.Join(t.TempDir(), "m.safetensors")
	code, stdout, stderr := upscale(t, nil, "train", dir, "--test", dir, "--scale", "2", "--steps", "3", "--batch", "2", "-o", model)
	if code != 0 || !strings.Contains(stdout, "2 pictures") || !strings.Contains(stdout, "a.png") {
		t.Fatalf("exit code %d: %s%s", code, stdout, stderr)
	}
	out := filepath.Join(t.TempDir(), "out.png")
	if code, _, stderr := upscale(t, nil, filepath.Join(dir, "a.png"), "--model", model, "-o", out); code != 0 {
		t.Error(stderr)
	}
	if code, _, stderr := upscale(t, nil, filepath.Join(dir, "a.png"), "--model", model, "--scale", "3", "-o", out); code != 2 || !strings.Contains(stderr, "enlarges by 2") {
		t.Errorf("another factor than the model's: exit code %d, %s", code, stderr)
	}
}

func TestUpscaleExportRunsAsTheNetworkDoes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "m.onnx")
	if code, _, stderr := upscale(t, nil, "export", "--scale", "3", "--size", "14x9", "-o", path); code != 0 {
		t.Fatal(stderr)
	}
	read, err := onnx.ReadFile(path, onnx.Options{})
	if err != nil {
		t.Fatal(err)
	}
	net, err := restore.Pretrained(3)
	if err != nil {
		t.Fatal(err)
	}
	x := make([]float32, 9*14)
	for i := range x {
		x[i] = float32(i) / 140
	}
	var y [2][]float32
	for i, n := range []*nn.Network{net, read} {
		out, err := n.Run(enginetest.Backend(), []*tensors.Tensor{tensors.FromFlatDataAndDimensions(x, 1, 9, 14, 1)})
		if err != nil {
			t.Fatal(err)
		}
		y[i] = nn.Floats(out[0])
	}
	if len(y[0]) != 27*42 || len(y[0]) != len(y[1]) {
		t.Fatalf("%d and %d samples", len(y[0]), len(y[1]))
	}
	for i, v := range y[0] {
		if math.Abs(float64(v-y[1][i])) > 1e-5 {
			t.Fatalf("sample %d is %v, in ONNX %v", i, v, y[1][i])
		}
	}
}

func TestUpscaleWrongUse(t *testing.T) {
	in := writePNG(t, "in.png", drawing(8, 8))
	video := filepath.Join(t.TempDir(), "in.y4m")
	if err := os.WriteFile(video, clip(t, 1), 0o644); err != nil {
		t.Fatal(err)
	}
	cut := filepath.Join(t.TempDir(), "cut.y4m")
	if err := os.WriteFile(cut, clip(t, 2)[:400], 0o644); err != nil {
		t.Fatal(err)
	}
	clear := drawing(8, 8)
	clear.Pix[3] = 0
	dir := t.TempDir()
	out := filepath.Join(dir, "out.png")
	for _, c := range []struct {
		code int
		says string
		args []string
	}{
		{2, "-o", []string{in}},
		{2, "arg", []string{"-o", out}},
		{2, "2, 3 and 4", []string{in, "--scale", "7", "-o", out}},
		{2, "at least 1", []string{in, "--scale", "-1", "-o", out}},
		{2, "espcn or bicubic", []string{in, "--method", "lanczos", "-o", out}},
		{2, "--scale", []string{in, "--scal", "2", "-o", out}},
		{2, ".png", []string{in, "-o", filepath.Join(dir, "out.webp")}},
		{2, ".y4m", []string{video, "-o", out}},
		{2, "--compare", []string{video, "--compare", in, "-o", filepath.Join(dir, "o.y4m")}},
		{1, "no such file", []string{filepath.Join(dir, "none.png"), "-o", out}},
		{1, "no such file", []string{in, "-o", filepath.Join(dir, "none", "out.png")}},
		{1, "same size", []string{in, "--compare", in, "-o", out}},
		{1, "transparency", []string{writePNG(t, "clear.png", clear), "-o", filepath.Join(dir, "out.jpg")}},
		{1, "frame", []string{cut, "-o", filepath.Join(dir, "o.y4m")}},
		{1, "safetensors", []string{in, "--model", in, "-o", out}},
		{2, "bicubic or blur", []string{"train", in, "--degradation", "x", "-o", out}},
		{2, "WIDTHxHEIGHT", []string{"export", "--size", "9", "-o", filepath.Join(dir, "m.onnx")}},
		{2, ".onnx", []string{"export", "-o", out}},
		{1, "in.png", []string{"train", in, "-o", out}},
	} {
		code, _, stderr := upscale(t, nil, c.args...)
		if code != c.code || !strings.Contains(stderr, c.says) {
			t.Errorf("%v: exit code %d, want %d, and %q: %s", c.args, code, c.code, c.says, stderr)
		}
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 0 {
		t.Errorf("failed commands left %v, %v", left, err)
	}
}

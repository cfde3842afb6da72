package main

import (
	"fmt"
	"image"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/gomlx/compute/dtypes"
	"github.com/gomlx/compute/shapes"
	"github.com/gomlx/gomlx/core/tensors"
	"golang.org/x/image/draw"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/nn"
)

// preprocessing turns a picture into a network's input. Values are scaled to [0, 1], then (v-mean)/std per channel.
type preprocessing struct {
	resize      int    // short side in pixels; 0: 8/7 of the crop
	resizeExact [2]int // width and height, whatever the picture's shape; instead of resize
	crop        [2]int // height and width of the centre crop; 0: the network's input
	mean, std   []float64
	channels    string // rgb, bgr or grey; "": by the network's input
	layout      string // nchw or nhwc; "": by the network's input
	scale       float64
	filter      string // bilinear (as torchvision and Pillow) or bicubic
}

const preprocessHelp = `--preprocess says how a picture becomes the input, as a list of key=value; what is not named keeps its default:

  resize=N      short side in pixels (default: 8/7 of the input); resize=WxH ignores the picture's shape
  crop=N        centre crop; crop=WxH (default: the input's size)
  mean=R,G,B    subtracted from values in [0,1] (default for three channels: 0.485,0.456,0.406, else 0)
  std=R,G,B     divides them then (default for three channels: 0.229,0.224,0.225, else 1)
  scale=X       multiplies last, for networks that want 0..255 (default: 1)
  channels=     rgb, bgr or grey (default: by the input)
  layout=       nchw or nhwc (default: by the input)
  filter=       bilinear or bicubic, both antialiased (default: bilinear)`

var imageNet = [2][]float64{{.485, .456, .406}, {.229, .224, .225}}

// parsePreprocessing reads "resize=256,crop=224,mean=0.5,0.5,0.5".
func parsePreprocessing(spec string) (p preprocessing, err error) {
	values := map[string][]string{}
	key := ""
	for _, part := range strings.Split(spec, ",") {
		part = strings.TrimSpace(part)
		if part == "" {
			continue
		}
		if k, v, ok := strings.Cut(part, "="); ok {
			key, part = strings.ToLower(strings.TrimSpace(k)), strings.TrimSpace(v)
			if _, twice := values[key]; twice {
				return p, usageErrorf("--preprocess names %s twice", key)
			}
		} else if key != "mean" && key != "std" {
			return p, usageErrorf("--preprocess: %q is no key=value", part)
		}
		values[key] = append(values[key], part)
	}
	floats := func(key string) (out []float64) {
		for _, s := range values[key] {
			v, e := strconv.ParseFloat(s, 64)
			if e != nil || math.IsNaN(v) || math.IsInf(v, 0) {
				err = usageErrorf("--preprocess: %s=%s is not a number", key, s)
			}
			out = append(out, v)
		}
		return out
	}
	size := func(s string) (w, h int, exact bool) {
		a, b, exact := strings.Cut(s, "x")
		w, e := strconv.Atoi(a)
		h = w
		if exact && e == nil {
			h, e = strconv.Atoi(b)
		}
		if e != nil || w < 1 || h < 1 || w > 1<<14 || h > 1<<14 {
			err = usageErrorf("--preprocess: %q is no size; write 256 or 320x48", s)
		}
		return w, h, exact
	}
	p.scale = 1
	for key, v := range values {
		switch key {
		case "resize":
			if w, h, exact := size(v[0]); exact {
				p.resizeExact = [2]int{w, h}
			} else {
				p.resize = w
			}
		case "crop":
			w, h, _ := size(v[0])
			p.crop = [2]int{h, w}
		case "mean":
			p.mean = floats(key)
		case "std":
			p.std = floats(key)
			if slices.ContainsFunc(p.std, func(s float64) bool { return s <= 0 }) {
				err = usageErrorf("--preprocess: std=%s must be positive", strings.Join(v, ","))
			}
		case "scale":
			p.scale = floats(key)[0]
		case "channels", "layout", "filter":
			accepted := map[string][]string{"channels": {"rgb", "bgr", "grey", "gray"}, "layout": {"nchw", "nhwc"}, "filter": {"bilinear", "bicubic"}}[key]
			s := strings.ToLower(v[0])
			if !slices.Contains(accepted, s) {
				return p, usageErrorf("--preprocess: %s=%s; accepted: %s", key, v[0], strings.Join(accepted, ", "))
			}
			switch key {
			case "channels":
				p.channels = strings.ReplaceAll(s, "gray", "grey")
			case "layout":
				p.layout = s
			case "filter":
				p.filter = s
			}
		default:
			return p, usageErrorf("--preprocess: there is no %q; accepted: resize, crop, mean, std, scale, channels, layout, filter", key)
		}
	}
	return p, err
}

// fit fills in what the network's input says, and refuses what contradicts it.
func (p preprocessing) fit(in nn.Input) (preprocessing, error) {
	s := in.Shape
	if s.Rank() != 4 || s.DType != dtypes.Float32 {
		return p, fmt.Errorf("input %q is %s, and pictures need a float32 input of four axes; give the cases as .npy", in.Name, s)
	}
	d := s.Dimensions
	if p.layout == "" {
		p.layout = "nhwc"
		if c := d[3]; (d[1] == 1 || d[1] == 3) && c != 1 && c != 3 {
			p.layout = "nchw"
		}
	}
	h, w, c := d[1], d[2], d[3]
	if p.layout == "nchw" {
		c, h, w = d[1], d[2], d[3]
	}
	if p.crop == [2]int{} {
		p.crop = [2]int{h, w}
	}
	if p.crop != [2]int{h, w} {
		return p, fmt.Errorf("--preprocess crops to %dx%d, but input %q takes %dx%d", p.crop[1], p.crop[0], in.Name, w, h)
	}
	switch {
	case c != 1 && c != 3:
		return p, fmt.Errorf("input %q has %d channels (%s, layout %s); pictures have 1 or 3", in.Name, c, s, p.layout)
	case p.channels == "" && c == 3:
		p.channels = "rgb"
	case p.channels == "":
		p.channels = "grey"
	case (p.channels == "grey") != (c == 1):
		return p, fmt.Errorf("--preprocess: channels=%s, but input %q has %d channels", p.channels, in.Name, c)
	}
	fill := func(v []float64, three []float64, one float64) []float64 {
		switch {
		case len(v) == 0 && c == 3:
			return three
		case len(v) == 0:
			return []float64{one}
		case len(v) == 1:
			return slices.Repeat(v, c)
		}
		return v
	}
	p.mean, p.std = fill(p.mean, imageNet[0], 0), fill(p.std, imageNet[1], 1)
	if len(p.mean) != c || len(p.std) != c {
		return p, fmt.Errorf("--preprocess: %d means and %d deviations for %d channels", len(p.mean), len(p.std), c)
	}
	return p, nil
}

// apply writes one picture to dst, in the network's layout.
func (p preprocessing) apply(img image.Image, dst []float32) error {
	b := img.Bounds()
	ch, cw := p.crop[0], p.crop[1]
	w, h := p.resizeExact[0], p.resizeExact[1]
	if w == 0 {
		// The short side becomes resize, or the picture covers 8/7 of the crop in both directions.
		f := max(8*float64(ch)/7/float64(b.Dy()), 8*float64(cw)/7/float64(b.Dx()))
		if p.resize > 0 {
			f = float64(p.resize) / float64(min(b.Dx(), b.Dy()))
		}
		w, h = max(1, int(math.Round(f*float64(b.Dx())))), max(1, int(math.Round(f*float64(b.Dy()))))
	}
	if w < cw || h < ch {
		return fmt.Errorf("is %dx%d after resizing, smaller than the crop of %dx%d", w, h, cw, ch)
	}
	if w > data.MaxPixels/h {
		return fmt.Errorf("would be %dx%d after resizing, more than %d pixels", w, h, data.MaxPixels)
	}
	scaled := img
	if w != b.Dx() || h != b.Dy() {
		filter := draw.BiLinear
		if p.filter == "bicubic" {
			filter = draw.CatmullRom
		}
		to := image.NewNRGBA(image.Rect(0, 0, w, h))
		filter.Scale(to, to.Bounds(), img, b, draw.Src, nil)
		scaled = to
	}
	sb := scaled.Bounds()
	x0, y0 := sb.Min.X+(w-cw)/2, sb.Min.Y+(h-ch)/2
	c := len(p.mean)
	for y := range ch {
		for x := range cw {
			r, g, bl, alpha := scaled.At(x0+x, y0+y).RGBA()
			v := [3]float64{float64(r), float64(g), float64(bl)}
			if alpha < 0xffff { // on white
				for k := range v {
					v[k] += 0xffff - float64(alpha)
				}
			}
			switch p.channels {
			case "bgr":
				v[0], v[2] = v[2], v[0]
			case "grey":
				v[0] = .299*v[0] + .587*v[1] + .114*v[2]
			}
			for k := range c {
				at := (y*cw+x)*c + k
				if p.layout == "nchw" {
					at = (k*ch+y)*cw + x
				}
				dst[at] = float32((v[k]/0xffff - p.mean[k]) / p.std[k] * p.scale)
			}
		}
	}
	return nil
}

// cases are inputs of a network, read when they are needed.
type cases struct {
	source string
	n      int
	files  []string // of pictures, relative to source; nil for others
	load   func(idx []int) (compress.Examples, error)
	held   int64 // bytes that stay in memory, as of arrays that are read whole

	classes []int // of a data set that comes with them; nil: --labels may give some
}

// openCases opens a folder of pictures, an .npy file, or several separated by commas for a network of several inputs.
func openCases(path string, net *nn.Network, p preprocessing) (*cases, error) {
	if info, err := os.Stat(path); err == nil && info.IsDir() {
		return openPictures(path, net, p)
	}
	paths := strings.Split(path, ",")
	if len(paths) != len(net.Inputs) {
		var names []string
		for _, in := range net.Inputs {
			names = append(names, in.Name)
		}
		return nil, fmt.Errorf("%s: %d files for the network's %d inputs (%s); give one .npy file for each, separated by commas", path, len(paths), len(net.Inputs), strings.Join(names, ", "))
	}
	var all compress.Examples
	for i, f := range paths {
		if ext := strings.ToLower(filepath.Ext(f)); ext != ".npy" {
			if _, err := os.Stat(f); err != nil {
				return nil, err
			}
			return nil, fmt.Errorf("%s: want a folder of pictures, an .npy file, or texts as .txt", f)
		}
		a, err := data.ReadNPYFile(f)
		if err != nil {
			return nil, err
		}
		t, err := asInput(a, net.Inputs[i])
		if err != nil {
			return nil, fmt.Errorf("%s: %w", f, err)
		}
		all = append(all, t)
	}
	if err := all.Check(net); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return &cases{source: path, n: all.Len(), held: all.Bytes(), load: func(idx []int) (compress.Examples, error) { return all.Pick(idx) }}, nil
}

// asInput converts an array to an input's type and checks its shape.
func asInput(a *data.NPY, in nn.Input) (*tensors.Tensor, error) {
	want := in.Shape
	if len(a.Shape) != want.Rank() || len(a.Shape) == 0 || !slices.Equal(a.Shape[1:], want.Dimensions[1:]) {
		return nil, fmt.Errorf("is %v, and input %q takes [cases%s]", a.Shape, in.Name, strings.ReplaceAll(fmt.Sprint(append([]int{0}, want.Dimensions[1:]...))[2:], " ", ", "))
	}
	floating := a.DType[0] == 'f'
	switch {
	case want.DType == dtypes.Float32 && floating:
		return tensors.FromFlatDataAndDimensions(a.Float32s(), a.Shape...), nil
	case want.DType == dtypes.Float32:
		return nil, fmt.Errorf("has elements of type %s, and input %q takes float32; convert it the way the network was trained", a.DType, in.Name)
	case floating:
		return nil, fmt.Errorf("has elements of type %s, and input %q takes %s", a.DType, in.Name, want.DType)
	}
	t := a.Tensor()
	if t.DType() == want.DType {
		return t, nil
	}
	v := a.Float64s()
	switch want.DType {
	case dtypes.Int32:
		return integers[int32](v, a.Shape, in.Name)
	case dtypes.Int64:
		return integers[int64](v, a.Shape, in.Name)
	case dtypes.Uint8:
		return integers[uint8](v, a.Shape, in.Name)
	}
	return nil, fmt.Errorf("has elements of type %s, and input %q takes %s", a.DType, in.Name, want.DType)
}

func integers[T int32 | int64 | uint8](v []float64, shape []int, input string) (*tensors.Tensor, error) {
	out := make([]T, len(v))
	for i, x := range v {
		if out[i] = T(x); float64(out[i]) != x {
			return nil, fmt.Errorf("value %d is %g, which input %q cannot hold", i, x, input)
		}
	}
	return tensors.FromFlatDataAndDimensions(out, shape...), nil
}

func openPictures(dir string, net *nn.Network, p preprocessing) (*cases, error) {
	if len(net.Inputs) != 1 {
		return nil, fmt.Errorf("%s: pictures are for networks of one input; this one has %d", dir, len(net.Inputs))
	}
	p, err := p.fit(net.Inputs[0])
	if err != nil {
		return nil, err
	}
	files, err := data.ReadImageDir(dir)
	if err != nil {
		return nil, err
	}
	return &cases{source: dir, n: len(files), files: files, load: func(idx []int) (compress.Examples, error) {
		d := slices.Clone(net.Inputs[0].Shape.Dimensions)
		d[0] = len(idx)
		x := make([]float32, shapes.Make(dtypes.Float32, d...).Size())
		row := len(x) / max(len(idx), 1)
		for k, i := range idx {
			path := filepath.Join(dir, filepath.FromSlash(files[i]))
			img, _, err := data.ReadImage(path)
			if err != nil {
				return nil, err
			}
			if err := p.apply(img, x[k*row:(k+1)*row]); err != nil {
				return nil, fmt.Errorf("%s: %w", path, err)
			}
		}
		return compress.FloatExamples(x, d...)
	}}, nil
}

// labels reads the class of every case: a CSV of `file,label` for pictures, of `case number,label` for arrays, or an
// .npy of integers in the order of the cases. Classes are the numbers, or the sorted names' positions.
func (c *cases) labels(path string) ([]int, error) {
	if strings.EqualFold(filepath.Ext(path), ".npy") {
		a, err := data.ReadNPYFile(path)
		if err != nil {
			return nil, err
		}
		if len(a.Shape) != 1 || a.Shape[0] != c.n || a.DType[0] == 'f' {
			return nil, fmt.Errorf("%s: is %s%v; want %d integers, one for each case", path, a.DType, a.Shape, c.n)
		}
		out := make([]int, c.n)
		for i, v := range a.Float64s() {
			out[i] = int(v)
		}
		return out, nil
	}
	l, err := data.ReadLabelsFile(path)
	if err != nil {
		return nil, err
	}
	files := c.files
	if files == nil {
		for i := range c.n {
			files = append(files, strconv.Itoa(i))
		}
	}
	y, _, err := data.JoinLabels(files, l)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	out := make([]int, len(y))
	for i, v := range y {
		out[i] = int(v)
	}
	return out, nil
}

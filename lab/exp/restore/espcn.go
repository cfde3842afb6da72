// Package restore holds the experiments of task/restore.
package restore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"time"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/data/imaging"
	"github.com/lathe-ml/lathe/lab"
	"github.com/lathe-ml/lathe/nn"
	"github.com/lathe-ml/lathe/task/restore"
)

// Experiments lists the experiments of the family.
var Experiments = []lab.Experiment{ESPCN}

// espcnSizes are the sizes of the experiment at a scale.
type espcnSizes struct {
	Factor       int
	Steps        int
	Batch        int // of 17×17 low-resolution patches
	SRCNNBatch   int // of 33×33 high-resolution patches
	TestImages   int
	Crop         int // side of the test images' centre; 0: whole
	Frames       int // of carphone
	TimedSide    int // of the low-resolution image that is timed
	TimedRuns    int
	PictureCrop  int // side of the pictures in the report
	Degradations []string
}

func espcnSizesOf(s lab.Scale) espcnSizes {
	z := espcnSizes{
		Factor: 3, Steps: 2000, Batch: 16, SRCNNBatch: 8, TestImages: 4, Frames: 30, TimedSide: 240, TimedRuns: 10, PictureCrop: 150,
		Degradations: []string{restore.BlurDecimate{}.String(), restore.BicubicShrink{}.String()},
	}
	if s == lab.Smoke {
		z.Steps, z.Batch, z.SRCNNBatch, z.TestImages, z.Crop, z.Frames, z.TimedSide, z.TimedRuns, z.PictureCrop = 60, 2, 1, 1, 96, 2, 24, 3, 60
	}
	return z
}

var degradations = map[string]restore.Degradation{"blur": restore.BlurDecimate{}, "bicubic": restore.BicubicShrink{}}

// ESPCN compares sub-pixel convolution with bicubic upscaling, with SRCNN, which works at high resolution, and with the
// same network that ends in a fixed bicubic filter (arXiv:1609.05158, sections 3.3 to 3.5). Pairs are made in two ways:
// by blur and decimation as in the paper, and by bicubic reduction, which leaves sharper images. Images: the photographs
// (8 to train, the last four to test); video: 30 frames of carphone, each reduced like the images. All figures are PSNR
// and SSIM of the floating-point luminance without a border of 3 pixels, means over images or frames.
var ESPCN = lab.Experiment{
	Method: "espcn",
	Title:  "×3 super-resolution of photographs and video frames from blurred and from bicubically reduced pairs",
	Recipe: []espcnSizes{espcnSizesOf(lab.Smoke), espcnSizesOf(lab.Full)},
	Arms: []lab.Arm{
		{Name: "bicubic-blur", Baseline: true, Once: true, Run: bicubicArm("blur")},
		{Name: "srcnn-blur", Baseline: true, Run: srcnnArm("blur")},
		{Name: "espcn-relu-blur", Run: espcnArm("blur", "relu")},
		{Name: "espcn-tanh-blur", Run: espcnArm("blur", "tanh")},
		{Name: "bicubic-bicubic", Baseline: true, Once: true, Run: bicubicArm("bicubic")},
		{Name: "fixed-bicubic", Baseline: true, Run: fixedArm("bicubic")},
		{Name: "espcn-relu-bicubic", Run: espcnArm("bicubic", "relu")},
		{Name: "espcn-tanh-bicubic", Run: espcnArm("bicubic", "tanh")},
		{Name: "time", Once: true, Run: timeArm},
	},
	Claims: []lab.Claim{
		{
			ID: "C1a", Text: "ESPCN beats bicubic upscaling by 1 dB on blurred pairs", Paper: "+2.7 dB on Set5, trained on ImageNet", Unit: "dB",
			Measure: lab.Difference("espcn-tanh-blur", "bicubic-blur", "psnr"), Bound: lab.AtLeast(1),
		},
		{
			ID: "C1b", Text: "ESPCN beats bicubic upscaling by 0.4 dB on bicubic pairs", Paper: "+2.7 dB on Set5, trained on ImageNet", Unit: "dB",
			Measure: lab.Difference("espcn-tanh-bicubic", "bicubic-bicubic", "psnr"), Bound: lab.AtLeast(.4),
		},
		{
			ID: "C2", Text: "ESPCN is at least as good as SRCNN 9-1-5 at equal steps, on blurred pairs", Paper: "+0.15 dB", Unit: "dB",
			Measure: lab.Difference("espcn-tanh-blur", "srcnn-blur", "psnr"), Bound: lab.AtLeast(0),
		},
		{
			ID: "C3", Text: "SRCNN 9-5-5 takes at least five times as long as ESPCN", Paper: "about 11 times", Unit: "×",
			Measure: func(m lab.Metrics) float64 { return m.Get("time", "srcnn955_seconds") / m.Get("time", "espcn_seconds") }, Bound: lab.AtLeast(5),
		},
		{
			ID: "C4", Text: "learned sub-pixel filters are at least as good as a fixed bicubic one after the same layers, on bicubic pairs", Paper: "(ablation)", Unit: "dB",
			Measure: lab.Difference("espcn-tanh-bicubic", "fixed-bicubic", "psnr"), Bound: lab.AtLeast(0),
		},
		{
			ID: "C5", Text: "on video frames ESPCN beats bicubic upscaling by 0.3 dB, on blurred pairs", Paper: "+0.39 dB over SRCNN", Unit: "dB",
			Measure: lab.Difference("espcn-tanh-blur", "bicubic-blur", "video_psnr"), Bound: lab.AtLeast(.3),
		},
	},
}

// pairs are the training images, test images and video frames of one degradation.
type pairs struct{ train, test, video []restore.Pair }

func pairsOf(ctx context.Context, t *lab.Trial, degradation string) (*pairs, error) {
	v, err := t.Shared("pairs:"+degradation, func() (any, error) {
		z := espcnSizesOf(t.Scale)
		d := degradations[degradation]
		p := &pairs{}
		photos, err := data.Photographs(ctx)
		if err != nil {
			return nil, err
		}
		tests := 0
		for i, ph := range slices.Backward(photos) { // the last four are the test set
			m, err := imaging.FromImage(ph.Image)
			if err != nil {
				return nil, fmt.Errorf("photograph %s: %w", ph.Name, err)
			}
			hr, to := m.Color, &p.train
			if i >= len(photos)-4 {
				if tests++; tests > z.TestImages {
					continue
				}
				to = &p.test
			}
			if z.Crop > 0 {
				if hr, err = centre(hr, z.Crop); err != nil {
					return nil, err
				}
			}
			pair, err := restore.NewPair(ph.Name, hr, z.Factor, 1, d)
			if err != nil {
				return nil, err
			}
			*to = append(*to, pair)
		}
		p.video, err = framePairs(ctx, z, d)
		return p, err
	})
	if err != nil {
		return nil, err
	}
	return v.(*pairs), nil
}

// framePairs reduces the luminance of the first frames of carphone.
func framePairs(ctx context.Context, z espcnSizes, d restore.Degradation) ([]restore.Pair, error) {
	clip, err := data.Video(ctx, "carphone")
	if err != nil {
		return nil, err
	}
	defer clip.Close()
	var out []restore.Pair
	for i := range z.Frames {
		f, err := clip.Next(nil)
		if errors.Is(err, io.EOF) && i > 0 {
			break
		}
		if err != nil {
			return nil, err
		}
		hr := &imaging.Image{H: clip.Header.Height, W: clip.Header.Width, C: 1, Pix: make([]float32, len(f.Y))}
		for j, v := range f.Y { // studio swing already: the luminance that the network knows
			hr.Pix[j] = float32(v) / 255
		}
		if hr, err = hr.CropToMultiple(z.Factor); err != nil {
			return nil, err
		}
		lr, err := d.Degrade(hr, z.Factor)
		if err != nil {
			return nil, err
		}
		out = append(out, restore.Pair{Name: fmt.Sprintf("frame %d", i), LR: lr, HR: hr})
	}
	return out, nil
}

func centre(m *imaging.Image, side int) (*imaging.Image, error) {
	w, h := min(side, m.W), min(side, m.H)
	return m.Crop((m.W-w)/2, (m.H-h)/2, w, h)
}

// measure records how well u restores the test images and the video, and shows a part of the first test image.
func measure(ctx context.Context, t *lab.Trial, u *restore.Upscaler, p *pairs) error {
	z := espcnSizesOf(t.Scale)
	mean := func(set []restore.Pair, f func(p restore.Pair, q restore.Fidelity)) (q restore.Fidelity, err error) {
		for _, pair := range set {
			sr, err := u.Planes(ctx, pair.LR)
			if err != nil {
				return q, err
			}
			one, err := restore.Compare(sr, pair.HR, z.Factor)
			if err != nil {
				return q, fmt.Errorf("%s: %w", pair.Name, err)
			}
			if f != nil {
				f(pair, one)
			}
			q.PSNR += one.PSNR / float64(len(set))
			q.SSIM += one.SSIM / float64(len(set))
		}
		return q, nil
	}
	q, err := mean(p.test, func(p restore.Pair, q restore.Fidelity) { t.Record("psnr_"+p.Name, q.PSNR) })
	if err != nil {
		return err
	}
	t.Record("psnr", q.PSNR)
	t.Record("ssim", q.SSIM)
	if q, err = mean(p.video, nil); err != nil {
		return err
	}
	t.Record("video_psnr", q.PSNR)
	t.Record("video_ssim", q.SSIM)
	if t.Seed != 0 {
		return nil
	}
	for _, pair := range p.test[len(p.test)-1:] {
		sr, err := u.Planes(ctx, pair.LR)
		if err != nil {
			return err
		}
		if err := show(t, pair.Name, sr, z.PictureCrop); err != nil {
			return err
		}
	}
	return nil
}

func show(t *lab.Trial, name string, y *imaging.Image, side int) error {
	y, err := centre(y, side)
	if err != nil {
		return err
	}
	if y, err = imaging.GreyFromLuma(y); err != nil {
		return err
	}
	img, err := (&imaging.Picture{Color: y}).Image()
	if err != nil {
		return err
	}
	t.Image(name, img)
	return nil
}

type arm = func(ctx context.Context, t *lab.Trial) error

func bicubicArm(degradation string) arm {
	return func(ctx context.Context, t *lab.Trial) error {
		p, err := pairsOf(ctx, t, degradation)
		if err != nil {
			return err
		}
		u, err := restore.NewBicubic(espcnSizesOf(t.Scale).Factor)
		if err != nil {
			return err
		}
		if t.Seed == 0 {
			last := p.test[len(p.test)-1]
			if err := show(t, last.Name+" (original)", last.HR, espcnSizesOf(t.Scale).PictureCrop); err != nil {
				return err
			}
		}
		return measure(ctx, t, u, p)
	}
}

// training is what all trained arms share.
func training(t *lab.Trial) restore.Training {
	z := espcnSizesOf(t.Scale)
	window, sum := max(z.Steps/50, 1), 0.
	return restore.Training{
		Steps: z.Steps, Batch: z.Batch, Seed: t.Seed, Checkpoint: filepath.Join(t.CheckpointDir(), "train.safetensors"),
		Progress: func(done, total int, loss float64) {
			t.Progress(done, total)
			if sum += loss; done%window == 0 {
				t.Series("loss", float64(done), sum/float64(window))
				sum = 0
			}
		},
	}
}

func espcnArm(degradation, activation string) arm {
	return func(ctx context.Context, t *lab.Trial) error {
		p, err := pairsOf(ctx, t, degradation)
		if err != nil {
			return err
		}
		m := restore.ESPCN{Factor: espcnSizesOf(t.Scale).Factor, Activation: activation}
		net, err := m.Network(t.Seed)
		if err != nil {
			return err
		}
		if err := restore.FitESPCN(ctx, t.Backend, net, m, p.train, training(t)); err != nil {
			return err
		}
		return evaluate(ctx, t, net, p, restore.UpscalerOptions{})
	}
}

func fixedArm(degradation string) arm {
	return func(ctx context.Context, t *lab.Trial) error {
		p, err := pairsOf(ctx, t, degradation)
		if err != nil {
			return err
		}
		z := espcnSizesOf(t.Scale)
		net, err := restore.FixedUpscaler{ESPCN: restore.ESPCN{Factor: z.Factor}}.Network(t.Seed)
		if err != nil {
			return err
		}
		if err := restore.FitDirect(ctx, t.Backend, net, z.Factor, p.train, training(t)); err != nil {
			return err
		}
		return evaluate(ctx, t, net, p, restore.UpscalerOptions{})
	}
}

func srcnnArm(degradation string) arm {
	return func(ctx context.Context, t *lab.Trial) error {
		p, err := pairsOf(ctx, t, degradation)
		if err != nil {
			return err
		}
		z := espcnSizesOf(t.Scale)
		net, err := restore.SRCNN{}.Network(t.Seed)
		if err != nil {
			return err
		}
		large, err := restore.EnlargePairs(p.train, z.Factor)
		if err != nil {
			return err
		}
		c := training(t)
		c.Batch, c.Patch = z.SRCNNBatch, 33
		if err := restore.FitDirect(ctx, t.Backend, net, 1, large, c); err != nil {
			return err
		}
		return evaluate(ctx, t, net, p, restore.UpscalerOptions{Enlarged: true})
	}
}

func evaluate(ctx context.Context, t *lab.Trial, net *nn.Network, p *pairs, o restore.UpscalerOptions) error {
	z := espcnSizesOf(t.Scale)
	c, err := net.Cost(1)
	if err != nil {
		return err
	}
	in := net.Inputs[0].Shape.Dimensions
	pixels := in[1] * in[2] * z.Factor * z.Factor
	if o.Enlarged {
		pixels = in[1] * in[2]
	}
	t.Record("macs_per_pixel", float64(c.MACs)/float64(pixels))
	t.Record("parameters", float64(c.Params))
	u, err := restore.NewUpscaler(t.Backend, net, z.Factor, o)
	if err != nil {
		return err
	}
	defer u.Close()
	return measure(ctx, t, u, p)
}

// timeArm takes the median time of each network on one low-resolution image, all networks in turn in every round, after
// one round that is not counted. Time does not depend on the weights, so that they are not trained.
func timeArm(ctx context.Context, t *lab.Trial) error {
	z := espcnSizesOf(t.Scale)
	espcn, err := restore.ESPCN{Factor: z.Factor}.Network(t.Seed)
	if err != nil {
		return err
	}
	srcnn915, err := restore.SRCNN{}.Network(t.Seed)
	if err != nil {
		return err
	}
	srcnn955, err := restore.SRCNN{Middle: 5}.Network(t.Seed)
	if err != nil {
		return err
	}
	arms := []struct {
		name string
		net  *nn.Network
		o    restore.UpscalerOptions
		up   *restore.Upscaler
		took []float64
	}{
		{name: "espcn", net: espcn},
		{name: "srcnn915", net: srcnn915, o: restore.UpscalerOptions{Enlarged: true}},
		{name: "srcnn955", net: srcnn955, o: restore.UpscalerOptions{Enlarged: true}},
	}
	for i := range arms {
		if arms[i].up, err = restore.NewUpscaler(t.Backend, arms[i].net, z.Factor, arms[i].o); err != nil {
			return err
		}
		defer arms[i].up.Close()
	}
	m, err := imaging.New(z.TimedSide, z.TimedSide, 1)
	if err != nil {
		return err
	}
	for i := range m.Pix {
		m.Pix[i] = float32(i%97) / 97
	}
	for round := range z.TimedRuns + 1 {
		for i := range arms {
			start := time.Now()
			if _, err := arms[i].up.Planes(ctx, m); err != nil {
				return err
			}
			if round > 0 {
				arms[i].took = append(arms[i].took, time.Since(start).Seconds())
			}
		}
		t.Progress(round+1, z.TimedRuns+1)
	}
	for _, a := range arms {
		slices.Sort(a.took)
		n := len(a.took)
		t.Record(a.name+"_seconds", (a.took[n/2]+a.took[(n-1)/2])/2)
	}
	return nil
}

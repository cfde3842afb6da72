package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"image"
	"image/jpeg"
	"image/png"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/image/bmp"
	"golang.org/x/image/tiff"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/data/imaging"
	"github.com/lathe-ml/lathe/internal/atomicfile"
	"github.com/lathe-ml/lathe/nn/onnx"
	"github.com/lathe-ml/lathe/task/restore"
)

// upscaleResult is what lathe upscale --json prints.
type upscaleResult struct {
	Input   string  `json:"input"`
	Output  string  `json:"output"`
	Method  string  `json:"method"`
	Model   string  `json:"model,omitempty"`
	Scale   int     `json:"scale"`
	Width   int     `json:"width"`  // of the output
	Height  int     `json:"height"` // of the output
	Seconds float64 `json:"seconds"`

	Frames int     `json:"frames,omitempty"` // of a video
	FPS    float64 `json:"fps,omitempty"`

	Compared *upscaleQuality `json:"compared,omitempty"`
}

// upscaleQuality compares the picture as written with a reference.
type upscaleQuality struct {
	Reference string           `json:"reference"`
	Border    int              `json:"border"` // pixels left out on every side
	Result    restore.Fidelity `json:"result"`
	Bicubic   restore.Fidelity `json:"bicubic"`
}

func newUpscaleCommand(a *app) *cobra.Command {
	var (
		scale                            int
		method, model, compareTo, output string
		tile                             int
	)
	cmd := &cobra.Command{
		Use:   "upscale INPUT -o OUTPUT",
		Short: "Enlarge a picture or a video by super-resolution (ESPCN)",
		Long: `Enlarge a picture (PNG, JPEG, TIFF, BMP or GIF in; PNG, JPEG, TIFF or BMP out) or a video (Y4M in and out) by an
integer factor. The efficient sub-pixel convolutional network (Shi et al., arXiv:1609.05158) treats the
luminance; colour and transparency are enlarged bicubically. Networks for the factors 2, 3 and 4 come with
lathe; they are trained on the luminance of eight photographs, shrunk bicubically. "lathe upscale train" makes one from
your own pictures.

Large pictures are run in overlapping tiles, which give the same pixels as the whole. A video is streamed: it
needs memory for one frame, and "-" reads it from the standard input or writes it to the standard output.
The rotation that a camera noted in a picture is not applied, and colour profiles are not carried over.`,
		Example: `  lathe upscale photo.jpg --scale 2 -o photo2x.png
  lathe upscale small.png --scale 3 --compare original.png -o large.png
  lathe upscale clip.y4m --scale 2 -o clip2x.y4m
  ffmpeg -i in.mp4 -pix_fmt yuv420p -f yuv4mpegpipe - | lathe upscale - --scale 2 -o - | ffmpeg -i - out.mp4`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			u := upscaleJob{app: a, input: args[0], output: output, scale: scale, method: method, model: model, compareTo: compareTo, tile: tile}
			if !cmd.Flags().Changed("scale") {
				u.scale = 0
			}
			return u.run(cmd.Context())
		},
	}
	f := cmd.Flags()
	f.IntVar(&scale, "scale", 2, "factor: 2, 3 or 4, or with --method bicubic any up to 64 (default: the model's, or 2)")
	f.StringVar(&method, "method", "espcn", "espcn, or bicubic to enlarge without a network")
	f.StringVar(&model, "model", "", "network that \"lathe upscale train\" wrote, instead of the one that comes with lathe")
	f.IntVar(&tile, "tile", 0, "side of the tiles in pixels of the input; 0 chooses, -1 runs the whole picture at once")
	f.StringVar(&compareTo, "compare", "", "picture of the output's size that the result is compared with (PSNR and SSIM)")
	f.StringVarP(&output, "output", "o", "", "file to write; its ending says the format")
	cmd.MarkFlagsMutuallyExclusive("model", "method")
	_ = cmd.RegisterFlagCompletionFunc("method", cobra.FixedCompletions([]string{"espcn", "bicubic"}, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("scale", cobra.FixedCompletions([]string{"2", "3", "4"}, cobra.ShellCompDirectiveNoFileComp))
	cmd.AddCommand(newUpscaleTrainCommand(a), newUpscaleExportCommand(a))
	return cmd
}

// upscaleJob is one call of lathe upscale.
type upscaleJob struct {
	*app
	input, output, method, model, compareTo string
	scale, tile                             int
}

// encoders writes pictures by the ending of their name.
var encoders = map[string]func(w io.Writer, m image.Image) error{
	".png":  png.Encode,
	".jpg":  encodeJPEG,
	".jpeg": encodeJPEG,
	".tif":  encodeTIFF,
	".tiff": encodeTIFF,
	".bmp":  bmp.Encode,
}

func encodeJPEG(w io.Writer, m image.Image) error {
	if o, ok := m.(interface{ Opaque() bool }); ok && !o.Opaque() {
		return errors.New("JPEG has no transparency; write a .png")
	}
	return jpeg.Encode(w, m, &jpeg.Options{Quality: 95})
}

func encodeTIFF(w io.Writer, m image.Image) error {
	return tiff.Encode(w, m, &tiff.Options{Compression: tiff.Deflate, Predictor: true})
}

func (u *upscaleJob) run(ctx context.Context) error {
	if u.output == "" {
		return usageErrorf("name the file to write with -o")
	}
	if u.method != "espcn" && u.method != "bicubic" {
		return usageErrorf("--method %s is not known; use espcn or bicubic", u.method)
	}
	if u.output == "-" && u.json {
		return usageErrorf("--json and a video on the standard output would mix; write the video to a file")
	}
	if u.scale < 0 {
		return usageErrorf("--scale %d: the factor is at least 1", u.scale)
	}
	in, video, err := u.open()
	if err != nil {
		return err
	}
	defer in.Close()
	ext := strings.ToLower(filepath.Ext(u.output))
	if video {
		if ext != ".y4m" && u.output != "-" {
			return usageErrorf("%s is a video and is written as .y4m, not as %q; ffmpeg converts Y4M to other formats", u.input, filepath.Base(u.output))
		}
		if u.compareTo != "" {
			return usageErrorf("--compare is for pictures; %s is a video", u.input)
		}
	} else if encoders[ext] == nil {
		return usageErrorf("pictures are written as .png, .jpg, .tif or .bmp; %q is none of them", u.output)
	}
	if u.output != "-" { // found out before the work, not after it
		if st, err := os.Stat(filepath.Dir(u.output)); err != nil {
			return fmt.Errorf("cannot write %s: %w", u.output, err)
		} else if !st.IsDir() {
			return fmt.Errorf("cannot write %s: %s is not a folder", u.output, filepath.Dir(u.output))
		}
	}
	bar := u.progress("upscaling " + filepath.Base(u.input))
	defer bar.Close()
	up, err := u.upscaler(func(done, total int) {
		if !video {
			bar.Set(done, total)
		}
	})
	if err != nil {
		return err
	}
	defer up.Close()
	r := &upscaleResult{Input: u.input, Output: u.output, Method: u.method, Model: u.model, Scale: up.Factor()}
	if video {
		err = u.video(ctx, up, in, bar, r)
	} else {
		err = u.picture(ctx, up, r)
	}
	bar.Close()
	if err != nil {
		return err
	}
	if u.output == "-" {
		u.note("%s", r)
		return nil
	}
	return u.emit(r, func(w io.Writer) error {
		_, err := fmt.Fprintln(w, r)
		return err
	})
}

// open opens the input and says whether it is a video: by its first bytes, not by its name.
func (u *upscaleJob) open() (io.ReadCloser, bool, error) {
	if u.input == "-" {
		return io.NopCloser(u.stdin), true, nil
	}
	f, err := os.Open(u.input)
	if err != nil {
		return nil, false, err
	}
	magic := make([]byte, 9)
	n, err := io.ReadFull(f, magic)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		f.Close()
		return nil, false, fmt.Errorf("reading %s: %w", u.input, err)
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		f.Close()
		return nil, false, fmt.Errorf("reading %s: %w", u.input, err)
	}
	return f, bytes.Equal(magic[:n], []byte("YUV4MPEG2")), nil
}

func (u *upscaleJob) upscaler(progress func(done, total int)) (*restore.Upscaler, error) {
	o := restore.UpscalerOptions{Tile: u.tile, Progress: progress}
	if u.method == "bicubic" {
		if u.scale == 0 {
			u.scale = 2
		}
		return restore.NewBicubic(u.scale)
	}
	if u.model == "" {
		if u.scale == 0 {
			u.scale = 2
		}
		if u.scale < 2 || u.scale > 4 {
			return nil, usageErrorf("--scale %d: networks for 2, 3 and 4 come with lathe; give --model FILE for another, or --method bicubic", u.scale)
		}
	}
	b, err := u.backend()
	if err != nil {
		return nil, err
	}
	net, err := restore.Pretrained(max(u.scale, 2))
	if u.model != "" {
		net, err = restore.Load(u.model)
	}
	if err != nil {
		return nil, err
	}
	factor, err := strconv.Atoi(net.Meta["factor"])
	if err != nil {
		return nil, fmt.Errorf("the model's factor is %q, not a number", net.Meta["factor"])
	}
	if u.scale != 0 && u.scale != factor {
		return nil, usageErrorf("--scale %d, but %s enlarges by %d", u.scale, u.model, factor)
	}
	return restore.NewUpscaler(b, net, factor, o)
}

// video streams frames from in to the output.
func (u *upscaleJob) video(ctx context.Context, up *restore.Upscaler, in io.Reader, bar *progressBar, r *upscaleResult) error {
	total := 0
	src, err := data.NewY4MReader(in)
	if err != nil {
		return fmt.Errorf("%s: %w", u.input, err)
	}
	if f, ok := in.(*os.File); ok {
		if st, err := f.Stat(); err == nil && st.Mode().IsRegular() {
			total = int(st.Size() / int64(src.Header.FrameBytes()+len("FRAME\n")))
		}
	}
	big, err := up.VideoHeader(src.Header)
	if err != nil {
		return err
	}
	write := func(w io.Writer) error {
		rate, err := up.Video(ctx, src, w, func(f restore.FrameRate) {
			bar.Label(fmt.Sprintf("upscaling %s, %.1f frames/s", filepath.Base(u.input), f.FPS()))
			bar.Set(f.Frames, total)
		})
		r.Frames, r.Seconds, r.FPS = rate.Frames, rate.Seconds, rate.FPS()
		if err == nil && rate.Frames == 0 {
			err = errors.New("it has no frames")
		}
		return err
	}
	r.Width, r.Height = big.Width, big.Height
	if u.output == "-" {
		w := bufio.NewWriterSize(u.stdout, 1<<16)
		if err := write(w); err != nil {
			return fmt.Errorf("%s: %w", u.input, err)
		}
		return w.Flush()
	}
	if err := atomicfile.Write(u.output, write); err != nil {
		return fmt.Errorf("%s: %w", u.input, err)
	}
	return nil
}

func (u *upscaleJob) picture(ctx context.Context, up *restore.Upscaler, r *upscaleResult) error {
	img, _, err := data.ReadImage(u.input)
	if err != nil {
		return err
	}
	var reference image.Image
	if u.compareTo != "" {
		if reference, _, err = data.ReadImage(u.compareTo); err != nil {
			return err
		}
		want, got := img.Bounds().Size().Mul(up.Factor()), reference.Bounds().Size()
		if want != got {
			return fmt.Errorf("%s has %d×%d pixels and the result %d×%d; only pictures of the same size can be compared", u.compareTo, got.X, got.Y, want.X, want.Y)
		}
	}
	start := time.Now()
	out, err := up.Restore(ctx, img)
	if err != nil {
		return fmt.Errorf("%s: %w", u.input, err)
	}
	r.Seconds = time.Since(start).Seconds()
	r.Width, r.Height = out.Bounds().Dx(), out.Bounds().Dy()
	if reference != nil {
		if r.Compared, err = u.compare(ctx, img, out, reference, up.Factor()); err != nil {
			return err
		}
	}
	encode := encoders[strings.ToLower(filepath.Ext(u.output))]
	if err := atomicfile.Write(u.output, func(w io.Writer) error { return encode(w, out) }); err != nil {
		return fmt.Errorf("writing %s: %w", u.output, err)
	}
	return nil
}

func (u *upscaleJob) compare(ctx context.Context, in, out, reference image.Image, r int) (*upscaleQuality, error) {
	cubic, err := restore.NewBicubic(r)
	if err != nil {
		return nil, err
	}
	base, err := cubic.Restore(ctx, in)
	if err != nil {
		return nil, err
	}
	var m [3]*imaging.Image
	for i, img := range []image.Image{out, base, reference} {
		p, err := imaging.FromImage(img)
		if err != nil {
			return nil, err
		}
		// Grey pictures are compared on the same luminance as coloured ones.
		if m[i], err = imaging.Luma(p.Color); err != nil {
			return nil, err
		}
	}
	q := &upscaleQuality{Reference: u.compareTo, Border: r}
	if q.Result, err = restore.Compare(m[0], m[2], r); err != nil {
		return nil, fmt.Errorf("comparing with %s: %w", u.compareTo, err)
	}
	q.Bicubic, err = restore.Compare(m[1], m[2], r)
	return q, err
}

// String is what a person reads.
func (r *upscaleResult) String() string {
	how := r.Method
	if r.Model != "" {
		how = "espcn " + filepath.Base(r.Model)
	}
	s := fmt.Sprintf("%s  %d×%d, ×%d by %s, ", r.Output, r.Width, r.Height, r.Scale, how)
	if r.Frames > 0 {
		s += fmt.Sprintf("%d frames, %.1f frames/s", r.Frames, r.FPS)
	} else {
		s += fmt.Sprintf("%.2f s", r.Seconds)
	}
	if c := r.Compared; c != nil {
		s += fmt.Sprintf("\nagainst %s (luminance as written, without a border of %d pixels):\n", c.Reference, c.Border)
		s += fmt.Sprintf("  %-8s PSNR %6.2f dB   SSIM %.4f", r.Method, c.Result.PSNR, c.Result.SSIM)
		if r.Method != "bicubic" {
			s += fmt.Sprintf("\n  %-8s PSNR %6.2f dB   SSIM %.4f", "bicubic", c.Bicubic.PSNR, c.Bicubic.SSIM)
		}
	}
	return s
}

// upscaleTrained is what lathe upscale train --json prints.
type upscaleTrained struct {
	Output  string        `json:"output"`
	Scale   int           `json:"scale"`
	Images  int           `json:"images"`
	Steps   int           `json:"steps"`
	Loss    float64       `json:"loss"` // mean squared error of the last step's batch
	Seconds float64       `json:"seconds"`
	Tests   []upscaleTest `json:"tests,omitempty"`
}

type upscaleTest struct {
	Image   string           `json:"image"`
	Result  restore.Fidelity `json:"result"`
	Bicubic restore.Fidelity `json:"bicubic"`
}

func newUpscaleTrainCommand(a *app) *cobra.Command {
	var (
		m           = restore.ESPCN{}
		c           = restore.Training{}
		degradation string
		sigma       float64
		tests       []string
		output      string
	)
	cmd := &cobra.Command{
		Use:   "train IMAGES... -o MODEL.safetensors",
		Short: "Train a network for lathe upscale on your own pictures",
		Long: `Train an ESPCN on pictures or folders of pictures; "photographs" is the training part of the data set of that
name. Every picture is shrunk by the factor to make pairs: bicubically, as cameras and web sites do, or by blur and
decimation, as the paper did. Interrupted training goes on where it was when the same command is run again.`,
		Example: `  lathe upscale train holiday/ --scale 2 -o holiday.safetensors
  lathe upscale train photographs --test photographs --scale 3 --steps 8000 -o espcn-x3.safetensors
  lathe upscale small.png --model holiday.safetensors -o large.png`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if output == "" {
				return usageErrorf("name the file to write with -o")
			}
			switch degradation {
			case "bicubic":
				c.Degradation = restore.BicubicShrink{}
			case "blur":
				c.Degradation = restore.BlurDecimate{Sigma: sigma}
			default:
				return usageErrorf("--degradation %s is not known; use bicubic or blur", degradation)
			}
			return a.trainUpscaler(cmd.Context(), args, tests, output, m, c)
		},
	}
	f := cmd.Flags()
	f.IntVar(&m.Factor, "scale", 2, "factor")
	f.StringVar(&m.Activation, "activation", "tanh", "tanh or relu")
	f.BoolVar(&m.ICNR, "icnr", false, "begin with equal sub-kernels (no checkerboard at the start)")
	f.IntVar(&c.Steps, "steps", 2000, "training steps")
	f.IntVar(&c.Batch, "batch", 16, "patches a step")
	f.IntVar(&c.Patch, "patch", 17, "side of a patch in pixels of the small image")
	f.Float64Var(&c.Tone, "tone", 0, "vary contrast by this share and brightness at random, so that all tones are learnt equally well")
	f.Float64Var(&c.LR, "lr", 1e-3, "first learning rate")
	f.Float64Var(&c.FinalLR, "final-lr", 0, "last learning rate (default: a tenth of the first)")
	f.Float64Var(&c.LastLayer, "last-layer", 1, "factor on the last layer's learning rate (the paper: 0.1)")
	f.StringVar(&degradation, "degradation", "bicubic", "how small images are made: bicubic, or blur (Gaussian, then one pixel in --scale)")
	f.Float64Var(&sigma, "sigma", 0, "of the blur in pixels (default: half the factor)")
	f.Uint64Var(&c.Seed, "seed", 0, "of the weights and the patches")
	f.StringSliceVar(&tests, "test", nil, "pictures, folders or \"photographs\" (its other part) to measure the result on")
	f.StringVarP(&output, "output", "o", "", "file to write")
	return cmd
}

func newUpscaleExportCommand(a *app) *cobra.Command {
	var (
		scale               int
		model, size, output string
	)
	cmd := &cobra.Command{
		Use:   "export -o MODEL.onnx",
		Short: "Write an upscaling network as ONNX, for other runtimes",
		Long: `Write a network as a standard ONNX model for images of one size: input "lr" [batch, height, width, 1] with
luminance (BT.601, studio swing, divided by 255), output "sr" of --scale times the height and width. Colour is the
caller's to enlarge.`,
		Example: `  lathe upscale export --scale 2 --size 640x360 -o espcn-x2.onnx`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var w, h int
			if n, err := fmt.Sscanf(size, "%dx%d", &w, &h); n != 2 || err != nil || fmt.Sprintf("%dx%d", w, h) != size || w < 1 || h < 1 || w > 1<<15 || h > 1<<15 {
				return usageErrorf("--size %q is not WIDTHxHEIGHT in pixels of the small image, each from 1 to %d", size, 1<<15)
			}
			if strings.ToLower(filepath.Ext(output)) != ".onnx" {
				return usageErrorf("name the file to write with -o; its name ends in .onnx")
			}
			net, err := restore.Pretrained(scale)
			if model != "" {
				net, err = restore.Load(model)
			}
			if err != nil {
				return err
			}
			d := net.Inputs[0].Shape.Dimensions
			d[1], d[2] = h, w
			if err := onnx.WriteFile(output, net, onnx.WriteOptions{}); err != nil {
				return err
			}
			return a.emit(map[string]any{"output": output, "scale": net.Meta["factor"], "width": w, "height": h}, func(out io.Writer) error {
				_, err := fmt.Fprintf(out, "%s  ×%s, %d×%d pixels in\n", output, net.Meta["factor"], w, h)
				return err
			})
		},
	}
	f := cmd.Flags()
	f.IntVar(&scale, "scale", 2, "factor of the network that comes with lathe: 2, 3 or 4")
	f.StringVar(&model, "model", "", "network that \"lathe upscale train\" wrote, instead of the one that comes with lathe")
	f.StringVar(&size, "size", "320x240", "width and height of the small image")
	f.StringVarP(&output, "output", "o", "", "file to write")
	cmd.MarkFlagsMutuallyExclusive("scale", "model")
	return cmd
}

func (a *app) trainUpscaler(ctx context.Context, images, tests []string, output string, m restore.ESPCN, c restore.Training) error {
	photos, err := loadPhotos(ctx, images, data.Train)
	if err != nil {
		return err
	}
	testPhotos, err := loadPhotos(ctx, tests, data.Validation, data.Test)
	if err != nil {
		return err
	}
	b, err := a.backend()
	if err != nil {
		return err
	}
	// A checkpoint belongs to one recipe: another one must not go on from it.
	h := fnv.New32a()
	fmt.Fprint(h, m, c.Steps, c.Batch, c.Patch, c.LR, c.FinalLR, c.LastLayer, c.Tone, c.Degradation, c.Seed, b.Name())
	for _, p := range photos {
		fmt.Fprint(h, p.Name, p.Image.Bounds())
	}
	c.Checkpoint = fmt.Sprintf("%s.%08x.checkpoint", output, h.Sum32())
	bar := a.progress(fmt.Sprintf("training on %d pictures", len(photos)))
	defer bar.Close()
	r := &upscaleTrained{Output: output, Scale: m.Factor, Images: len(photos), Steps: c.Steps}
	c.Progress = func(done, total int, loss float64) {
		r.Loss = loss
		bar.Set(done, total)
	}
	start := time.Now()
	net, err := restore.TrainESPCN(ctx, b, photos, m, c)
	bar.Close()
	if err != nil {
		return err
	}
	r.Seconds = time.Since(start).Seconds()
	net.Meta["trained_on"] = strings.Join(photoNames(photos), ",")
	command := "lathe"
	for _, arg := range a.args { // a path says nothing to others
		command += " " + filepath.Base(arg)
	}
	net.Meta["command"] = command
	if err := restore.Save(output, net); err != nil {
		return err
	}
	if len(testPhotos) > 0 {
		up, err := restore.NewUpscaler(b, net, m.Factor, restore.UpscalerOptions{})
		if err != nil {
			return err
		}
		defer up.Close()
		if r.Tests, err = testUpscaler(ctx, up, testPhotos, c.Degradation); err != nil {
			return err
		}
	}
	return a.emit(r, func(w io.Writer) error {
		fmt.Fprintf(w, "%s  ×%d, %d steps on %d pictures in %.0f s, loss %.3g\n", r.Output, r.Scale, r.Steps, r.Images, r.Seconds, r.Loss)
		for _, t := range r.Tests {
			fmt.Fprintf(w, "  %-24s %6.2f dB   SSIM %.4f   (bicubic %6.2f dB   %.4f)\n", t.Image, t.Result.PSNR, t.Result.SSIM, t.Bicubic.PSNR, t.Bicubic.SSIM)
		}
		return nil
	})
}

func testUpscaler(ctx context.Context, up *restore.Upscaler, photos []restore.Photo, d restore.Degradation) ([]upscaleTest, error) {
	pairs, err := restore.Pairs(photos, up.Factor(), 1, d)
	if err != nil {
		return nil, err
	}
	cubic, err := restore.NewBicubic(up.Factor())
	if err != nil {
		return nil, err
	}
	var out []upscaleTest
	for _, p := range pairs {
		t := upscaleTest{Image: p.Name}
		for _, x := range []struct {
			up *restore.Upscaler
			to *restore.Fidelity
		}{{up, &t.Result}, {cubic, &t.Bicubic}} {
			sr, err := x.up.Planes(ctx, p.LR)
			if err != nil {
				return nil, err
			}
			if *x.to, err = restore.Compare(sr, p.HR, up.Factor()); err != nil {
				return nil, fmt.Errorf("%s: %w", p.Name, err)
			}
		}
		out = append(out, t)
	}
	return out, nil
}

// loadPhotos reads pictures, folders of pictures, and parts of the photographs.
func loadPhotos(ctx context.Context, names []string, splits ...data.Split) ([]restore.Photo, error) {
	var out []restore.Photo
	for _, name := range names {
		st, err := os.Stat(name)
		switch {
		case err != nil && name == "photographs":
			photos, err := data.Photographs(ctx, splits...)
			if err != nil {
				return nil, err
			}
			for _, p := range photos {
				out = append(out, restore.Photo{Name: p.Name, Image: p.Image})
			}
			continue
		case err != nil:
			return nil, err
		}
		files := []string{name}
		if st.IsDir() {
			if files, err = data.ReadImageDir(name); err != nil {
				return nil, err
			}
			for i, f := range files {
				files[i] = filepath.Join(name, filepath.FromSlash(f))
			}
		}
		for _, f := range files {
			img, _, err := data.ReadImage(f)
			if err != nil {
				return nil, err
			}
			out = append(out, restore.Photo{Name: filepath.Base(f), Image: img})
		}
	}
	return out, nil
}

func photoNames(photos []restore.Photo) []string {
	out := make([]string, len(photos))
	for i, p := range photos {
		out[i] = p.Name
	}
	return out
}

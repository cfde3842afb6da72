package restore

import (
	"context"
	"fmt"
	"image"
	"slices"
	"strconv"
	"sync"

	"github.com/gomlx/compute"
	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/data/imaging"
	"github.com/lathe-ml/lathe/nn"
)

// Upscaler enlarges images by an integer factor with a trained network, or bicubically without one.
//
// A network of one channel sees the luminance; chrominance is enlarged bicubically, as is transparency. Large images are
// run in overlapping tiles, which give the same pixels as the whole would and bound the memory to that of one tile.
// An Upscaler may be used from several goroutines.
type Upscaler struct {
	o      UpscalerOptions
	net    *nn.Network // nil: bicubic
	factor int
	reach  int

	mu     sync.Mutex
	runner *nn.Runner
	shapes map[[2]int]bool
}

var _ Restorer = (*Upscaler)(nil)

// UpscalerOptions say how a network is run. The zero value is right for ESPCN.
type UpscalerOptions struct {
	// Enlarged says that the network expects an image that has been enlarged bicubically (SRCNN), not the
	// low-resolution one.
	Enlarged bool
	// Tile is the side in low-resolution pixels of the parts that an image is run in; 0: what makes the network work on
	// about 128×128 pixels at a time. Negative: never in parts.
	Tile int
	// Overlap is the number of low-resolution pixels that a tile reaches beyond the part that is kept of it. 0: what the
	// network's convolutions need.
	Overlap int
	// Progress is called after every tile of an image. Optional.
	Progress func(done, total int)
}

// maxShapes is the number of image sizes for which compiled graphs are kept.
const maxShapes = 16

// NewUpscaler enlarges by the factor with net on backend b. The factor is checked against the network's metadata, if
// that names one. The network must not be changed while the Upscaler is used.
func NewUpscaler(b compute.Backend, net *nn.Network, factor int, o UpscalerOptions) (*Upscaler, error) {
	u := &Upscaler{o: o, net: net, factor: factor, shapes: map[[2]int]bool{}}
	if factor < 1 || factor > 64 {
		return nil, fmt.Errorf("restore: factor %d; 1 to 64 are possible", factor)
	}
	if net == nil {
		return nil, fmt.Errorf("restore: no network; use NewBicubic to enlarge without one")
	}
	if f := net.Meta["factor"]; f != "" && f != strconv.Itoa(factor) {
		return nil, fmt.Errorf("restore: the network enlarges by %s, not by %d", f, factor)
	}
	if len(net.Inputs) != 1 || net.Inputs[0].Shape.Rank() != 4 || len(net.Outputs) != 1 {
		return nil, fmt.Errorf("restore: the network has %d inputs and %d outputs; one image [N, h, w, C] each is needed", len(net.Inputs), len(net.Outputs))
	}
	if c := u.channels(); c != 1 && c != 3 {
		return nil, fmt.Errorf("restore: the network takes %d channels; 1 (luminance) or 3 (RGB) are possible", c)
	}
	u.reach = o.Overlap
	if u.reach == 0 {
		for _, x := range net.Sites() {
			if c, ok := x.Op.(nn.Conv); ok {
				u.reach += slices.Max(c.Kernel) / 2
			}
		}
		if _, fixed := net.Producer(net.Outputs[0]).Op.(BicubicUpscale); fixed {
			u.reach += 2
		}
		if o.Enlarged { // the convolutions reach high-resolution pixels, the bicubic filter in front two more low ones
			u.reach = (u.reach+factor-1)/factor + 2
		}
	}
	if u.o.Tile == 0 {
		u.o.Tile = 128
		if o.Enlarged { // the network works at the high resolution: the same number of pixels there
			u.o.Tile /= factor
		}
		u.o.Tile = max(u.o.Tile, 4*u.reach)
	}
	if u.o.Tile > 0 {
		if _, err := imaging.Tiles(u.o.Tile+1, 1, u.o.Tile, u.reach); err != nil {
			return nil, err
		}
	}
	var err error
	if u.runner, err = nn.NewRunner(b, net, nn.RunOptions{}); err != nil {
		return nil, err
	}
	return u, nil
}

// NewBicubic enlarges without a network: the baseline.
func NewBicubic(factor int) (*Upscaler, error) {
	if factor < 1 || factor > 64 {
		return nil, fmt.Errorf("restore: factor %d; 1 to 64 are possible", factor)
	}
	return &Upscaler{factor: factor}, nil
}

// Factor is r.
func (u *Upscaler) Factor() int { return u.factor }

// Overlap is the number of low-resolution pixels that tiles overlap on either side.
func (u *Upscaler) Overlap() int { return u.reach }

// Close frees the compiled graphs.
func (u *Upscaler) Close() {
	if u.runner != nil {
		u.runner.Finalize()
	}
}

func (u *Upscaler) channels() int {
	if u.net == nil {
		return 1
	}
	return u.net.Inputs[0].Shape.Dimensions[3]
}

// Restore enlarges an image; see Upscale.
func (u *Upscaler) Restore(ctx context.Context, img image.Image) (image.Image, error) {
	p, err := imaging.FromImage(img)
	if err != nil {
		return nil, err
	}
	out, err := u.Picture(ctx, p)
	if err != nil {
		return nil, err
	}
	return out.Image()
}

// Upscale returns an image of r times the width and height: Gray, Gray16, NRGBA or NRGBA64 by what img is. Every size
// from 1×1 on works. It fails on an empty image and on results of more than imaging.MaxPixels.
func (u *Upscaler) Upscale(img image.Image) (image.Image, error) {
	return u.Restore(context.Background(), img)
}

// Picture enlarges a picture in floating point; the result is not clamped.
func (u *Upscaler) Picture(ctx context.Context, p *imaging.Picture) (*imaging.Picture, error) {
	if p == nil {
		return nil, fmt.Errorf("restore: no picture")
	}
	if err := p.Color.Check(); err != nil {
		return nil, err
	}
	if c := p.Color.C; c != 1 && c != 3 {
		return nil, fmt.Errorf("restore: an image of %d channels; 1 (grey) or 3 (RGB) are possible", c)
	}
	out := &imaging.Picture{Depth: p.Depth}
	var err error
	if p.Alpha != nil {
		if out.Alpha, err = u.bicubic(p.Alpha); err != nil {
			return nil, err
		}
	}
	out.Color, err = u.color(ctx, p.Color)
	return out, err
}

func (u *Upscaler) color(ctx context.Context, m *imaging.Image) (*imaging.Image, error) {
	switch {
	case u.net == nil:
		return u.bicubic(m)
	case u.channels() == 3 && m.C == 3:
		return u.Planes(ctx, m)
	case u.channels() == 3: // grey through a colour network
		rgb, err := imaging.Merge(m, m, m)
		if err != nil {
			return nil, err
		}
		if rgb, err = u.Planes(ctx, rgb); err != nil {
			return nil, err
		}
		y, err := imaging.Luma(rgb)
		if err != nil {
			return nil, err
		}
		return imaging.GreyFromLuma(y)
	case m.C == 1:
		y, err := imaging.Luma(m)
		if err != nil {
			return nil, err
		}
		if y, err = u.Planes(ctx, y); err != nil {
			return nil, err
		}
		return imaging.GreyFromLuma(y)
	}
	ycc, err := imaging.RGBToYCbCr(m)
	if err != nil {
		return nil, err
	}
	y, err := u.Planes(ctx, ycc.Channel(0))
	if err != nil {
		return nil, err
	}
	if ycc, err = u.bicubic(ycc); err != nil {
		return nil, err
	}
	for i, v := range y.Pix {
		ycc.Pix[3*i] = v
	}
	return imaging.YCbCrToRGB(ycc)
}

func (u *Upscaler) bicubic(m *imaging.Image) (*imaging.Image, error) {
	return imaging.Bicubic(m, float64(u.factor), float64(u.factor), true)
}

// Planes enlarges samples as the network knows them: luminance (BT.601, studio swing) for one channel, RGB for three. The
// result is not clamped.
func (u *Upscaler) Planes(ctx context.Context, m *imaging.Image) (*imaging.Image, error) {
	if u.net == nil {
		return u.bicubic(m)
	}
	if err := m.Check(); err != nil {
		return nil, err
	}
	if m.C != u.channels() {
		return nil, fmt.Errorf("restore: an image of %d channels for a network of %d", m.C, u.channels())
	}
	r := u.factor
	if int64(m.H)*int64(m.W)*int64(r*r) > imaging.MaxPixels {
		return nil, fmt.Errorf("restore: %d×%d pixels enlarged by %d exceed %d pixels; cut the image first", m.W, m.H, r, imaging.MaxPixels)
	}
	size := u.o.Tile
	if size < 0 {
		size = max(m.H, m.W)
	}
	tiles, err := imaging.Tiles(m.W, m.H, size, u.reach)
	if err != nil {
		return nil, err
	}
	out, err := imaging.New(m.H*r, m.W*r, m.C)
	if err != nil {
		return nil, err
	}
	for i, t := range tiles {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		part, err := m.Crop(t.X, t.Y, t.W, t.H)
		if err != nil {
			return nil, err
		}
		if u.o.Enlarged {
			if part, err = u.bicubic(part); err != nil {
				return nil, err
			}
		}
		hr, err := u.run(part)
		if err != nil {
			return nil, err
		}
		if len(hr) != t.W*t.H*r*r*m.C {
			return nil, fmt.Errorf("restore: the network made %d samples of %d×%d pixels, not the %d of a factor of %d", len(hr), t.W, t.H, t.W*t.H*r*r*m.C, r)
		}
		for y := range t.KeepH * r {
			from := (((t.KeepY-t.Y)*r+y)*t.W*r + (t.KeepX-t.X)*r) * m.C
			to := ((t.KeepY*r+y)*out.W + t.KeepX*r) * m.C
			copy(out.Pix[to:to+t.KeepW*r*m.C], hr[from:])
		}
		if u.o.Progress != nil {
			u.o.Progress(i+1, len(tiles))
		}
	}
	return out, nil
}

func (u *Upscaler) run(m *imaging.Image) ([]float32, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if key := [2]int{m.H, m.W}; !u.shapes[key] {
		if len(u.shapes) >= maxShapes { // a service sees many sizes; do not keep a graph of each
			u.runner.Finalize()
			clear(u.shapes)
		}
		u.shapes[key] = true
	}
	got, err := u.runner.Run(tensors.FromFlatDataAndDimensions(m.Pix, 1, m.H, m.W, m.C))
	if err != nil {
		return nil, fmt.Errorf("restore: %d×%d pixels: %w", m.W, m.H, err)
	}
	return tensors.MustCopyFlatData[float32](got[0]), nil
}

package restore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/data/imaging"
)

// FrameRate counts frames and the time spent on them.
type FrameRate struct {
	Frames  int     `json:"frames"`
	Seconds float64 `json:"seconds"` // in the upscaler, reading and writing not counted
}

// FPS is frames per second, 0 before the first frame.
func (f FrameRate) FPS() float64 {
	if f.Seconds <= 0 {
		return 0
	}
	return float64(f.Frames) / f.Seconds
}

// VideoHeader is the header of the enlarged video: r times the size, the rest as it was.
func (u *Upscaler) VideoHeader(h data.Y4MHeader) (data.Y4MHeader, error) {
	r := u.factor
	if h.Width < 1 || h.Height < 1 || int64(h.Width)*int64(h.Height)*int64(r*r) > data.MaxPixels {
		return h, fmt.Errorf("restore: frames of %d×%d pixels enlarged by %d; at most %d pixels a frame are possible", h.Width, h.Height, r, data.MaxPixels)
	}
	h.Width, h.Height = h.Width*r, h.Height*r
	h.Extra = slices.Clone(h.Extra)
	return h, nil
}

// Frame enlarges one frame of a video with header h: luminance by the network, the colour planes bicubically, each at
// its own resolution, cropped to the size that the enlarged video's header asks for. There is no temporal input. Full
// range (XCOLORRANGE=FULL) is understood. The network must be one of luminance.
func (u *Upscaler) Frame(ctx context.Context, h data.Y4MHeader, f *data.Frame) (*data.Frame, error) {
	if u.channels() != 1 {
		return nil, fmt.Errorf("restore: video needs a network of luminance (1 channel), this one has %d", u.channels())
	}
	big, err := u.VideoHeader(h)
	if err != nil {
		return nil, err
	}
	cw, ch := h.ChromaSize()
	bw, bh := big.ChromaSize()
	if len(f.Y) != h.Width*h.Height || len(f.Cb) != cw*ch || len(f.Cr) != cw*ch {
		return nil, fmt.Errorf("restore: a frame with planes of %d, %d and %d samples; its header asks for %d, %d and %d",
			len(f.Y), len(f.Cb), len(f.Cr), h.Width*h.Height, cw*ch, cw*ch)
	}
	// Full-range luminance is brought to the studio swing that networks know, and back.
	low, span := float32(0), float32(255)
	if slices.ContainsFunc(h.Extra, func(s string) bool { return strings.EqualFold(s, "XCOLORRANGE=FULL") }) {
		low, span = 16, 219
	}
	y := plane(f.Y, h.Width, h.Height)
	for i, v := range y.Pix {
		y.Pix[i] = (low + v*span) / 255
	}
	if y, err = u.Planes(ctx, y); err != nil {
		return nil, err
	}
	for i, v := range y.Pix {
		y.Pix[i] = (v*255 - low) / span
	}
	out := &data.Frame{}
	if out.Y, err = samples(y, big.Width, big.Height); err != nil {
		return nil, err
	}
	if cw*ch == 0 {
		return out, nil
	}
	for _, c := range []struct {
		from []uint8
		to   *[]uint8
	}{{f.Cb, &out.Cb}, {f.Cr, &out.Cr}} {
		m, err := u.bicubic(plane(c.from, cw, ch))
		if err != nil {
			return nil, err
		}
		if *c.to, err = samples(m, bw, bh); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// plane reads samples as values in [0, 1].
func plane(b []uint8, w, h int) *imaging.Image {
	m := &imaging.Image{H: h, W: w, C: 1, Pix: make([]float32, len(b))}
	for i, v := range b {
		m.Pix[i] = float32(v) / 255
	}
	return m
}

func samples(m *imaging.Image, w, h int) ([]uint8, error) {
	m, err := m.Crop(0, 0, w, h)
	if err != nil {
		return nil, err
	}
	out := make([]uint8, len(m.Pix))
	for i, v := range m.Pix {
		out[i] = uint8(min(max(v, 0), 1)*255 + 0.5)
	}
	return out, nil
}

// Video enlarges a stream of frames: it reads from src until its end and writes to w, one frame in memory at a time.
// Progress, if not nil, is called after every frame. It returns the frames done and the time that they took, also beside an
// error.
func (u *Upscaler) Video(ctx context.Context, src *data.Y4MReader, w io.Writer, progress func(FrameRate)) (FrameRate, error) {
	var rate FrameRate
	big, err := u.VideoHeader(src.Header)
	if err != nil {
		return rate, err
	}
	dst, err := data.NewY4MWriter(w, big)
	if err != nil {
		return rate, err
	}
	var in *data.Frame
	for {
		if err := ctx.Err(); err != nil {
			return rate, err
		}
		if in, err = src.Next(in); errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			return rate, dst.Flush()
		}
		if err != nil {
			return rate, err
		}
		start := time.Now()
		out, err := u.Frame(ctx, src.Header, in)
		if err != nil {
			return rate, fmt.Errorf("frame %d: %w", rate.Frames, err)
		}
		rate.Frames++
		rate.Seconds += time.Since(start).Seconds()
		if err := dst.Write(out); err != nil {
			return rate, err
		}
		if progress != nil {
			progress(rate)
		}
	}
}

package data

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// Y4MHeader describes an uncompressed video in the YUV4MPEG2 format of mjpegtools, 8 bits per sample.
type Y4MHeader struct {
	Width, Height int
	Rate          [2]int // frames per second as a fraction; 0:0 is unknown
	Aspect        [2]int // of a pixel; 0:0 is unknown
	Interlace     string // "p" (progressive), "t", "b", "m", or "" (unknown)
	Chroma        string // "420jpeg", "420mpeg2", "420paldv", "420", "422", "444", "mono"; "" means "420jpeg"
	Extra         []string
	headerBytes   int
}

// ChromaSize is the width and height of the two colour planes; 0, 0 for mono.
func (h Y4MHeader) ChromaSize() (w, hh int) {
	switch h.Chroma {
	case "mono":
		return 0, 0
	case "444":
		return h.Width, h.Height
	case "422":
		return (h.Width + 1) / 2, h.Height
	default:
		return (h.Width + 1) / 2, (h.Height + 1) / 2
	}
}

// FrameBytes is the size of the samples of one frame.
func (h Y4MHeader) FrameBytes() int {
	w, hh := h.ChromaSize()
	return h.Width*h.Height + 2*w*hh
}

// FPS is the frames per second, or 0 if unknown.
func (h Y4MHeader) FPS() float64 {
	if h.Rate[1] == 0 {
		return 0
	}
	return float64(h.Rate[0]) / float64(h.Rate[1])
}

// MaxPixels bounds a picture or frame that is read: 100 megapixels.
const MaxPixels = 100_000_000

func (h Y4MHeader) validate() error {
	switch {
	case h.Width < 1 || h.Height < 1:
		return badf("y4m", "size", "is %d×%d; both must be positive", h.Width, h.Height)
	case h.Width > MaxPixels/h.Height:
		return badf("y4m", "size", "%d×%d is %w: more than %d pixels", h.Width, h.Height, ErrTooLarge, MaxPixels)
	}
	switch h.Chroma {
	case "", "420jpeg", "420mpeg2", "420paldv", "420", "422", "444", "mono":
	default:
		return badf("y4m", "chroma", "%s is not read; convert to 420, 422, 444 or mono with 8 bits", quote(h.Chroma))
	}
	switch h.Interlace {
	case "", "p", "t", "b", "m":
	default:
		return badf("y4m", "interlacing", "%s; want p, t, b or m", quote(h.Interlace))
	}
	for _, f := range []struct {
		name string
		v    [2]int
	}{{"frame rate", h.Rate}, {"aspect", h.Aspect}} {
		if f.v[0] < 0 || f.v[1] < 0 {
			return badf("y4m", f.name, "%d:%d is negative", f.v[0], f.v[1])
		}
	}
	return nil
}

// Frame is one picture of a video in studio-range YCbCr planes, row-major. Cb and Cr are empty for mono.
type Frame struct{ Y, Cb, Cr []uint8 }

// NewFrame returns a black frame of the header's size (Y 16, Cb and Cr 128).
func NewFrame(h Y4MHeader) *Frame {
	w, hh := h.ChromaSize()
	f := &Frame{make([]uint8, h.Width*h.Height), make([]uint8, w*hh), make([]uint8, w*hh)}
	for i := range f.Y {
		f.Y[i] = 16
	}
	for i := range f.Cb {
		f.Cb[i], f.Cr[i] = 128, 128
	}
	return f
}

// Y4MReader reads frames one by one, so that a video of any length needs memory for one.
type Y4MReader struct {
	Header Y4MHeader
	r      *bufio.Reader
	src    io.Reader
	n      int
}

// maxY4MLine bounds the header and each frame's line.
const maxY4MLine = 4096

// NewY4MReader reads the header. 8-bit 4:2:0, 4:2:2, 4:4:4 and mono are read; more bits and alpha are refused by name.
func NewY4MReader(r io.Reader) (*Y4MReader, error) {
	y := &Y4MReader{r: bufio.NewReaderSize(r, 1<<16), src: r}
	line, err := y.line("header")
	if err != nil {
		return nil, err
	}
	rest, ok := strings.CutPrefix(line, "YUV4MPEG2")
	if !ok || (rest != "" && rest[0] != ' ') {
		return nil, badf("y4m", "header", "starts with %s, not with YUV4MPEG2", quote(line))
	}
	h := &y.Header
	h.headerBytes = len(line) + 1
	for f := range strings.FieldsSeq(rest) {
		v := f[1:]
		switch f[0] {
		case 'W':
			h.Width, err = y4mInt("width", v)
		case 'H':
			h.Height, err = y4mInt("height", v)
		case 'F':
			h.Rate, err = y4mRatio("frame rate", v)
		case 'A':
			h.Aspect, err = y4mRatio("aspect", v)
		case 'I':
			if h.Interlace = v; v == "?" {
				h.Interlace = ""
			}
		case 'C':
			h.Chroma = v
		default:
			h.Extra = append(h.Extra, f)
		}
		if err != nil {
			return nil, err
		}
	}
	if err := h.validate(); err != nil {
		return nil, err
	}
	return y, nil
}

func y4mInt(field, s string) (int, error) {
	v, err := strconv.Atoi(s)
	if err != nil {
		return 0, badf("y4m", field, "%s is not a whole number", quote(s))
	}
	return v, nil
}

func y4mRatio(field, s string) (out [2]int, err error) {
	a, b, ok := strings.Cut(s, ":")
	if !ok {
		return out, badf("y4m", field, "%s is not of the form a:b", quote(s))
	}
	if out[0], err = y4mInt(field, a); err != nil {
		return out, err
	}
	out[1], err = y4mInt(field, b)
	return out, err
}

// line reads up to a newline, at most maxY4MLine bytes; io.EOF only if nothing is left.
func (y *Y4MReader) line(field string) (string, error) {
	var b []byte
	for {
		c, err := y.r.ReadByte()
		if err == io.EOF && len(b) == 0 && field != "header" {
			return "", io.EOF
		}
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return "", badf("y4m", field, "%w", err)
		}
		if c == '\n' {
			return string(b), nil
		}
		if b = append(b, c); len(b) > maxY4MLine {
			return "", badf("y4m", field, "%w: no end within %d bytes", ErrTooLarge, maxY4MLine)
		}
	}
}

// Next returns the next frame, in dst if it is not nil (its planes are reused if they have the right size), and io.EOF
// after the last. A frame that is cut off is an error.
func (y *Y4MReader) Next(dst *Frame) (*Frame, error) {
	name := fmt.Sprintf("frame %d", y.n)
	line, err := y.line(name)
	if err != nil {
		return nil, err
	}
	if rest, ok := strings.CutPrefix(line, "FRAME"); !ok || (rest != "" && rest[0] != ' ') {
		return nil, badf("y4m", name, "starts with %s, not with FRAME", quote(line))
	}
	if dst == nil {
		dst = &Frame{}
	}
	w, h := y.Header.ChromaSize()
	if left := remaining(y.src); left >= 0 && left+int64(y.r.Buffered()) < int64(y.Header.FrameBytes()) {
		return nil, badf("y4m", name, "%d bytes are there, %d are needed: %w", left+int64(y.r.Buffered()), y.Header.FrameBytes(), io.ErrUnexpectedEOF)
	}
	for _, p := range []struct {
		plane *[]uint8
		n     int
	}{{&dst.Y, y.Header.Width * y.Header.Height}, {&dst.Cb, w * h}, {&dst.Cr, w * h}} {
		if len(*p.plane) == p.n {
			_, err = io.ReadFull(y.r, *p.plane)
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
		} else {
			*p.plane, err = readBytes(y.r, int64(p.n))
		}
		if err != nil {
			return nil, badf("y4m", name, "%w", err)
		}
	}
	y.n++
	return dst, nil
}

// Y4MWriter writes a video; Flush at the end.
type Y4MWriter struct {
	h Y4MHeader
	w *bufio.Writer
	n int
}

// NewY4MWriter writes the header.
func NewY4MWriter(w io.Writer, h Y4MHeader) (*Y4MWriter, error) {
	if err := h.validate(); err != nil {
		return nil, err
	}
	y := &Y4MWriter{h: h, w: bufio.NewWriterSize(w, 1<<16)}
	interlace := h.Interlace
	if interlace == "" {
		interlace = "?"
	}
	fmt.Fprintf(y.w, "YUV4MPEG2 W%d H%d F%d:%d I%s A%d:%d", h.Width, h.Height, h.Rate[0], h.Rate[1], interlace, h.Aspect[0], h.Aspect[1])
	if h.Chroma != "" {
		fmt.Fprintf(y.w, " C%s", h.Chroma)
	}
	for _, x := range h.Extra {
		if x == "" || strings.ContainsAny(x, " \t\r\n\v\f") || strings.ContainsAny(x[:1], "WHFAIC") {
			return nil, badf("y4m", "extra", "%s cannot be a parameter; want a word that begins with X", quote(x))
		}
		fmt.Fprintf(y.w, " %s", x)
	}
	return y, y.w.WriteByte('\n')
}

// Write appends a frame, whose planes must have the sizes of the header.
func (y *Y4MWriter) Write(f *Frame) error {
	w, h := y.h.ChromaSize()
	if len(f.Y) != y.h.Width*y.h.Height || len(f.Cb) != w*h || len(f.Cr) != w*h {
		return badf("y4m", fmt.Sprintf("frame %d", y.n), "planes of %d, %d and %d samples; want %d, %d and %d",
			len(f.Y), len(f.Cb), len(f.Cr), y.h.Width*y.h.Height, w*h, w*h)
	}
	y.n++
	_, err := y.w.WriteString("FRAME\n")
	for _, p := range [][]uint8{f.Y, f.Cb, f.Cr} {
		_, e := y.w.Write(p)
		err = errors.Join(err, e)
	}
	return err
}

// Flush writes what is buffered.
func (y *Y4MWriter) Flush() error { return y.w.Flush() }

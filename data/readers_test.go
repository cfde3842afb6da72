package data

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"image"
	"image/color"
	"image/gif"
	"image/jpeg"
	"image/png"
	"io"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/image/bmp"
	"golang.org/x/image/tiff"
)

// allocated returns the bytes that f allocates in all, freed ones included.
func allocated(f func()) int64 {
	var a, b runtime.MemStats
	runtime.ReadMemStats(&a)
	f()
	runtime.ReadMemStats(&b)
	return int64(b.TotalAlloc - a.TotalAlloc)
}

// allowance is what a reader may allocate for its buffers beside twice the input.
const allowance = 1 << 19

// stream hides the length of what it reads.
type stream struct{ io.Reader }

func idxOf(shape []int, data []byte) []byte {
	b := []byte{0, 0, 8, byte(len(shape))}
	for _, d := range shape {
		b = binary.BigEndian.AppendUint32(b, uint32(d))
	}
	return append(b, data...)
}

func npyOf(t testing.TB, shape []int, values any) []byte {
	var b bytes.Buffer
	if err := WriteNPY(&b, shape, values); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func npyRaw(version byte, header string, data ...byte) []byte {
	b := append([]byte(npyMagic), version, 0)
	if version == 1 {
		b = binary.LittleEndian.AppendUint16(b, uint16(len(header)))
	} else {
		b = binary.LittleEndian.AppendUint32(b, uint32(len(header)))
	}
	return append(append(b, header...), data...)
}

func y4mOf(t testing.TB, h Y4MHeader, frames int) []byte {
	var b bytes.Buffer
	w, err := NewY4MWriter(&b, h)
	if err != nil {
		t.Fatal(err)
	}
	for i := range frames {
		f := NewFrame(h)
		for j := range f.Y {
			f.Y[j] = uint8(i + j)
		}
		if err := w.Write(f); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func picture(w, h int) image.Image {
	m := image.NewNRGBA(image.Rect(0, 0, w, h))
	for y := range h {
		for x := range w {
			m.Set(x, y, color.NRGBA{uint8(9 * x), uint8(5 * y), uint8(x * y), 255})
		}
	}
	return m
}

func pictures(t testing.TB) map[string][]byte {
	m := picture(17, 11)
	out := map[string][]byte{}
	for name, encode := range map[string]func(io.Writer) error{
		"png":  func(w io.Writer) error { return png.Encode(w, m) },
		"jpeg": func(w io.Writer) error { return jpeg.Encode(w, m, nil) },
		"gif":  func(w io.Writer) error { return gif.Encode(w, m, nil) },
		"tiff": func(w io.Writer) error { return tiff.Encode(w, m, &tiff.Options{Compression: tiff.Deflate}) },
		"bmp":  func(w io.Writer) error { return bmp.Encode(w, m) },
	} {
		var b bytes.Buffer
		if err := encode(&b); err != nil {
			t.Fatal(err)
		}
		out[name] = b.Bytes()
	}
	return out
}

func readAllY4M(r io.Reader) error {
	y, err := NewY4MReader(r)
	if err != nil {
		return err
	}
	var f *Frame
	for {
		if f, err = y.Next(f); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// readers by name, for the tests that concern them all.
var readers = map[string]func(io.Reader) error{
	"idx":    func(r io.Reader) error { _, err := ReadIDX(r); return err },
	"npy":    func(r io.Reader) error { _, err := ReadNPY(r); return err },
	"csv":    func(r io.Reader) error { _, err := ReadCSV(r); return err },
	"labels": func(r io.Reader) error { _, err := ReadLabels(r); return err },
	"y4m":    readAllY4M,
	"image":  func(r io.Reader) error { _, _, err := DecodeImage(r); return err },
	"json":   func(r io.Reader) error { var v struct{ A []int }; return DecodeJSON(r, 0, &v) },
}

func TestTruncatedFilesAreErrors(t *testing.T) {
	inputs := map[string][][]byte{
		"idx":  {idxOf([]int{3, 4}, make([]byte, 12)), zip(t, idxOf([]int{3, 4}, make([]byte, 12)), 9)},
		"npy":  {npyOf(t, []int{2, 3}, make([]float32, 6))},
		"y4m":  {y4mOf(t, Y4MHeader{Width: 5, Height: 3, Chroma: "420"}, 1)},
		"json": {[]byte(`{"A": [1, 2, 3]}`)},
	}
	for _, b := range pictures(t) {
		inputs["image"] = append(inputs["image"], b)
	}
	for name, list := range inputs {
		for i, full := range list {
			if err := readers[name](bytes.NewReader(full)); err != nil {
				t.Errorf("%s %d: %v", name, i, err)
			}
			for n := range full {
				for _, r := range []io.Reader{bytes.NewReader(full[:n]), stream{bytes.NewReader(full[:n])}} {
					err := readers[name](r)
					var f *FormatError
					if err == nil {
						// The pixels are complete before these formats end; a video may end after its header.
						if name == "image" && n >= len(full)/2 || name == "y4m" && full[n-1] == '\n' && n < 60 {
							continue
						}
						t.Errorf("%s %d cut to %d of %d bytes was accepted", name, i, n, len(full))
					} else if !errors.As(err, &f) {
						t.Errorf("%s %d cut to %d: %v is no FormatError", name, i, n, err)
					}
				}
			}
		}
	}
}

func TestHostileFilesAreRefusedWithoutAllocating(t *testing.T) {
	pngHead := func(w, h uint32) []byte { // a header that claims w×h, and a little data
		var b bytes.Buffer
		png.Encode(&b, image.NewGray(image.Rect(0, 0, 1, 1)))
		out := b.Bytes()
		binary.BigEndian.PutUint32(out[16:], w)
		binary.BigEndian.PutUint32(out[20:], h)
		return fixCRC(out)
	}
	gifHead := func(w, h uint16) []byte {
		b := []byte("GIF89a\x00\x00\x00\x00\x80\x00\x00\x00\x00\x00\xff\xff\xff,\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x02D\x01\x00;")
		binary.LittleEndian.PutUint16(b[6:], w)
		binary.LittleEndian.PutUint16(b[8:], h)
		binary.LittleEndian.PutUint16(b[24:], w)
		binary.LittleEndian.PutUint16(b[26:], h)
		return b
	}
	jpegHead := slices.Clone(pictures(t)["jpeg"])
	sof := bytes.Index(jpegHead, []byte{0xff, 0xc0})
	binary.BigEndian.PutUint32(jpegHead[sof+5:], 9000<<16|9000)
	bmpHead := slices.Clone(pictures(t)["bmp"])
	binary.LittleEndian.PutUint32(bmpHead[18:], 9000)
	binary.LittleEndian.PutUint32(bmpHead[22:], 9000)
	tiffHead := slices.Clone(pictures(t)["tiff"])
	tiffSize(tiffHead, 9000, 9000)

	big := make([]byte, 1<<24)
	for _, c := range []struct {
		reader, name string
		input        []byte
		text         string
	}{
		{"idx", "4 GB of nothing", idxOf([]int{1 << 16, 1 << 16}, nil), "can be there"},
		{"idx", "overflow", idxOf([]int{1 << 31, 1 << 31, 1 << 31}, nil), "too large"},
		{"idx", "floats", append([]byte{0, 0, 0x0d, 1, 0, 0, 0, 1}, 1, 2, 3, 4), "unsigned bytes"},
		{"idx", "no axes", []byte{0, 0, 8, 0}, "dimensions"},
		{"idx", "255 axes", append([]byte{0, 0, 8, 255}, make([]byte, 1020)...), "dimensions"},
		{"idx", "other magic", []byte("PK\x03\x04----"), "magic"},
		{"idx", "trailing", idxOf([]int{2}, []byte{1, 2, 3}), "more follows"},
		{"idx", "gzip bomb with a small header", zip(t, idxOf([]int{2, 2}, big), 9), "more follows"},
		{"idx", "gzip with a header beyond it", zip(t, idxOf([]int{1 << 28}, nil), 9), "can be there"},
		{"idx", "gzip that ends early", zip(t, idxOf([]int{20000}, make([]byte, 100)), 9), "data"},
		{"npy", "8 EB", npyRaw(1, "{'descr': '<f8', 'fortran_order': False, 'shape': (1152921504606846976,), }"), "too large"},
		{"npy", "1 GB of nothing", npyRaw(1, "{'descr': '<f4', 'fortran_order': False, 'shape': (268435456,), }"), "needs"},
		{"npy", "overflow", npyRaw(1, "{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296), }"), "too large"},
		{"npy", "size beyond int", npyRaw(1, "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999,), }"), "size"},
		{"npy", "negative", npyRaw(1, "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }"), "size"},
		{"npy", "long header", append([]byte(npyMagic+"\x02\x00"), 0xff, 0xff, 0xff, 0x7f), "header length"},
		{"npy", "objects", npyRaw(1, "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", 1), "descr"},
		{"npy", "structure", npyRaw(1, "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,), }", 1), "quoted"},
		{"npy", "code", npyRaw(1, "__import__('os')"), "want {"},
		{"npy", "key twice", npyRaw(1, "{'descr': '<f4', 'descr': '<f8', 'fortran_order': False, 'shape': (), }"), "twice"},
		{"npy", "key missing", npyRaw(1, "{'descr': '<f4', 'shape': (), }"), "missing"},
		{"npy", "other key", npyRaw(1, "{'descr': '<f4', 'colour': 'red'}"), "unknown key"},
		{"npy", "version 9", npyRaw(9, "{}"), "version"},
		{"npy", "33 axes", npyRaw(1, "{'descr': '<f4', 'fortran_order': False, 'shape': ("+strings.Repeat("1,", 33)+"), }", 0, 0, 0, 0), "axes"},
		{"npy", "trailing", append(npyOf(t, []int{2}, []float32{1, 2}), 0), "needs 8 bytes, and 9"},
		{"y4m", "huge frame", []byte("YUV4MPEG2 W10000 H10000 F25:1 C444\nFRAME\n"), "needed"},
		{"y4m", "beyond the limit", []byte("YUV4MPEG2 W1000000000 H1000000000 F25:1\nFRAME\n"), "too large"},
		{"y4m", "overflow", []byte("YUV4MPEG2 W9223372036854775807 H9223372036854775807\nFRAME\n"), "too large"},
		{"y4m", "no size", []byte("YUV4MPEG2 F25:1\nFRAME\n"), "positive"},
		{"y4m", "negative", []byte("YUV4MPEG2 W-5 H-5\n"), "positive"},
		{"y4m", "ten bits", []byte("YUV4MPEG2 W2 H2 C420p10\n"), "420p10"},
		{"y4m", "no ratio", []byte("YUV4MPEG2 W2 H2 F25\n"), "frame rate"},
		{"y4m", "endless line", append([]byte("YUV4MPEG2 "), bytes.Repeat([]byte("X"), 100_000)...), "no end"},
		{"y4m", "no frame", []byte("YUV4MPEG2 W2 H2 Cmono\nabcd"), "frame 0"},
		{"y4m", "other word", []byte("YUV4MPEG2 W2 H2 Cmono\nFRAMES\nabcd"), "FRAME"},
		{"image", "png of 81 megapixels", pngHead(9000, 9000), "cannot hold"},
		{"image", "png beyond the limit", pngHead(1<<20, 1<<20), "too large"},
		{"image", "png of no pixels", pngHead(0, 5), "png"},
		{"image", "gif", gifHead(60000, 1500), "cannot hold"},
		{"image", "jpeg", jpegHead, "cannot hold"},
		{"image", "bmp", bmpHead, "cannot hold"},
		{"image", "tiff", tiffHead, "cannot hold"},
		{"image", "text", []byte("hello, world"), "not a PNG"},
		{"image", "empty", nil, "not a PNG"},
		{"csv", "ragged", []byte("1,2\n3\n"), "line 2"},
		{"csv", "word", []byte("1,2\n3,x\n"), "line 2, field 2"},
		{"csv", "header only", []byte("a,b\n"), "no numbers"},
		{"csv", "empty", nil, "no numbers"},
		{"csv", "binary", bytes.Repeat([]byte{0}, 1000), "no numbers"},
		{"labels", "one column", []byte("a.png\n"), "file,label"},
		{"labels", "contradiction", []byte("a.png,1\na.png,2\n"), "before"},
		{"labels", "empty label", []byte("a.png,\n"), "empty"},
		{"labels", "open quote", []byte("\"a.png,1\n"), "labels"},
		{"json", "two values", []byte(`{} {}`), "more follows"},
		{"json", "other type", []byte(`{"A": ["x"]}`), "A"},
		{"json", "not json", []byte(`{A: 1}`), "byte 2"},
		{"json", "nothing", nil, "nothing"},
		{"json", "deep", bytes.Repeat([]byte("["), 1<<20), "json"},
	} {
		for _, kind := range []string{"sized", "stream"} {
			t.Run(fmt.Sprintf("%s %s %s", c.reader, c.name, kind), func(t *testing.T) {
				var r io.Reader = bytes.NewReader(c.input)
				if kind == "stream" {
					r = stream{r}
				}
				var err error
				n := allocated(func() { err = readers[c.reader](r) })
				var f *FormatError
				if !errors.As(err, &f) {
					t.Fatalf("error %v, want a FormatError", err)
				}
				if kind == "sized" && !strings.Contains(err.Error(), c.text) {
					t.Errorf("error %q does not say %q", err, c.text)
				}
				if limit := 2*int64(len(c.input)) + allowance; n > limit {
					t.Errorf("%d bytes allocated for an input of %d", n, len(c.input))
				}
			})
		}
	}
}

// fixCRC sets the checksum of a PNG's header chunk.
func fixCRC(b []byte) []byte {
	crc := ^uint32(0)
	for _, v := range b[12:29] {
		crc ^= uint32(v)
		for range 8 {
			crc = crc>>1 ^ 0xedb88320&-(crc&1)
		}
	}
	binary.BigEndian.PutUint32(b[29:], ^crc)
	return b
}

// tiffSize overwrites the width and height in the first directory.
func tiffSize(b []byte, w, h uint32) {
	at := binary.LittleEndian.Uint32(b[4:])
	for i := range int(binary.LittleEndian.Uint16(b[at:])) {
		e := b[int(at)+2+12*i:]
		if tag := binary.LittleEndian.Uint16(e); tag == 256 || tag == 257 {
			binary.LittleEndian.PutUint16(e[2:], 4)
			v := w
			if tag == 257 {
				v = h
			}
			binary.LittleEndian.PutUint32(e[8:], v)
		}
	}
}

func TestReadersAllocateAtMostTwiceTheFile(t *testing.T) {
	n := 1 << 20
	half := npyRaw(1, fmt.Sprintf("{'descr': '<f2', 'fortran_order': False, 'shape': (%d,), }", n), make([]byte, 2*n)...)
	fortran := npyRaw(1, fmt.Sprintf("{'descr': '<f4', 'fortran_order': True, 'shape': (2, %d), }", n/2), make([]byte, 4*n)...)
	dir := t.TempDir()
	for name, c := range map[string]struct {
		reader string
		input  []byte
	}{
		"idx":      {"idx", idxOf([]int{n}, make([]byte, n))},
		"npy f4":   {"npy", npyOf(t, []int{n}, make([]float32, n))},
		"npy f8":   {"npy", npyOf(t, []int{n}, make([]float64, n))},
		"npy u1":   {"npy", npyOf(t, []int{n}, make([]uint8, n))},
		"npy f2":   {"npy", half},
		"npy fort": {"npy", fortran},
		"y4m":      {"y4m", y4mOf(t, Y4MHeader{Width: 320, Height: 240}, 20)},
	} {
		path := filepath.Join(dir, "x")
		if err := os.WriteFile(path, c.input, 0o666); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		for kind, r := range map[string]io.Reader{"file": f, "memory": bytes.NewReader(c.input)} {
			used := allocated(func() { err = readers[c.reader](r) })
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			if limit := 2*int64(len(c.input)) + allowance; used > limit {
				t.Errorf("%s from %s: %d bytes allocated for %d", name, kind, used, len(c.input))
			}
		}
		f.Close()
	}
}

func TestIDXRoundTrip(t *testing.T) {
	want := payload(60)
	for name, b := range map[string][]byte{"plain": idxOf([]int{3, 4, 5}, want), "gzip": zip(t, idxOf([]int{3, 4, 5}, want), 9)} {
		for _, r := range []io.Reader{bytes.NewReader(b), stream{bytes.NewReader(b)}} {
			x, err := ReadIDX(r)
			if err != nil || !slices.Equal(x.Shape, []int{3, 4, 5}) || !bytes.Equal(x.Data, want) {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	x, err := ReadIDX(bytes.NewReader(idxOf([]int{0, 28, 28}, nil)))
	if err != nil || len(x.Data) != 0 {
		t.Errorf("no pictures: %v", err)
	}
}

func TestNPYRoundTripsEveryType(t *testing.T) {
	for name, c := range map[string]struct {
		shape  []int
		values any
	}{
		"f4":     {[]int{2, 3}, []float32{1, -2, 3.5, float32(math.Inf(1)), 0, 1e-40}},
		"f8":     {[]int{3}, []float64{1, math.Pi, -1e300}},
		"u1":     {[]int{1, 4, 1}, []uint8{0, 1, 128, 255}},
		"i1":     {[]int{2}, []int8{-128, 127}},
		"i4":     {[]int{2}, []int32{math.MinInt32, math.MaxInt32}},
		"i8":     {[]int{2, 1}, []int64{math.MinInt64, math.MaxInt64}},
		"scalar": {nil, []float64{7}},
		"empty":  {[]int{0, 5}, []float32{}},
	} {
		b := npyOf(t, c.shape, c.values)
		if i := bytes.IndexByte(b, '\n'); (i+1)%64 != 0 {
			t.Errorf("%s: data begin at %d, not at a multiple of 64", name, i+1)
		}
		for _, r := range []io.Reader{bytes.NewReader(b), stream{bytes.NewReader(b)}} {
			a, err := ReadNPY(r)
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			if fmt.Sprint(a.Data) != fmt.Sprint(c.values) || fmt.Sprintf("%T", a.Data) != fmt.Sprintf("%T", c.values) || !slices.Equal(a.Shape, c.shape) {
				t.Errorf("%s: %v of %v, want %v of %v", name, a.Data, a.Shape, c.values, c.shape)
			}
			if got := a.Tensor().Shape().Dimensions; !slices.Equal(got, c.shape) {
				t.Errorf("%s: tensor of shape %v", name, got)
			}
		}
	}
	for name, c := range map[string]struct {
		shape  []int
		values any
	}{"count": {[]int{3}, []float32{1}}, "type": {[]int{1}, []string{"a"}}, "negative": {[]int{-1}, []float32{}}} {
		if err := WriteNPY(io.Discard, c.shape, c.values); err == nil {
			t.Errorf("%s was written", name)
		}
	}
}

func TestNPYReadsWhatNumPyWrites(t *testing.T) {
	// np.arange(6, dtype='>i4').reshape(2, 3), with version 3 and no padding
	b := npyRaw(3, "{'descr': '>i4', 'fortran_order': False, 'shape': (2, 3)}", 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0, 5)
	a, err := ReadNPY(bytes.NewReader(b))
	if err != nil || !slices.Equal(a.Data.([]int32), []int32{0, 1, 2, 3, 4, 5}) {
		t.Errorf("big-endian: %v %v", a, err)
	}
	// The same matrix in Fortran order, and a 2×3×2 one.
	b = npyRaw(2, "{'descr': '|u1', 'fortran_order': True, 'shape': (2, 3), }\n", 0, 3, 1, 4, 2, 5)
	a, err = ReadNPY(bytes.NewReader(b))
	if err != nil || !slices.Equal(a.Data.([]uint8), []uint8{0, 1, 2, 3, 4, 5}) {
		t.Errorf("Fortran order: %v %v", a, err)
	}
	b = npyRaw(1, "{'descr': '|u1', 'fortran_order': True, 'shape': (2L, 3L, 2L)}", 0, 6, 2, 8, 4, 10, 1, 7, 3, 9, 5, 11)
	a, err = ReadNPY(bytes.NewReader(b))
	if err != nil || !slices.Equal(a.Data.([]uint8), []uint8{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}) {
		t.Errorf("Fortran order of three axes: %v %v", a, err)
	}
	b = npyRaw(1, `{"descr":"<f2","fortran_order":False,"shape":(7,)}`,
		0x00, 0x3c, 0x00, 0xc0, 0xff, 0x7b, 0x01, 0x00, 0x00, 0x80, 0x00, 0x7c, 0xff, 0x03)
	a, err = ReadNPY(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	want := []float32{1, -2, 65504, 1. / (1 << 24), float32(math.Copysign(0, -1)), float32(math.Inf(1)), 1023. / (1 << 24)}
	if got := a.Float32s(); !slices.Equal(got, want) || !math.Signbit(float64(got[4])) {
		t.Errorf("half: %v, want %v", got, want)
	}
	b = npyRaw(1, "{'descr': '|b1', 'fortran_order': False, 'shape': (2,), }", 0, 1)
	if a, err = ReadNPY(bytes.NewReader(b)); err != nil || !slices.Equal(a.Float64s(), []float64{0, 1}) {
		t.Errorf("booleans: %v", err)
	}
}

func TestCSVOfNumbers(t *testing.T) {
	for text, want := range map[string]struct {
		header []string
		data   []float64
	}{
		"1,2\n3,4\n":                    {nil, []float64{1, 2, 3, 4}},
		"\ufeffx;\"y\"\r\n1;2\r\n\r\n":  {[]string{"x", "y"}, []float64{1, 2}},
		"1\t-2e3\n16\tInf":              {nil, []float64{1, -2000, 16, math.Inf(1)}},
		"5\n6\n":                        {nil, []float64{5, 6}},
		" 1 , 2 \n":                     {nil, []float64{1, 2}},
		"1e999,1\n":                     {nil, []float64{math.Inf(1), 1}},
		"id,feature 1\n 7 , 8.25 \n\n ": {[]string{"id", "feature 1"}, []float64{7, 8.25}},
	} {
		got, err := ReadCSV(strings.NewReader(text))
		if err != nil || !slices.Equal(got.Header, want.header) || !slices.Equal(got.Data, want.data) {
			t.Errorf("%q: %+v %v", text, got, err)
		}
	}
}

func TestLabelsJoinFiles(t *testing.T) {
	l, err := ReadLabels(strings.NewReader("file,label\r\na/x.png,cat\nb/x.png, dog\n\"odd,name.png\",cat\nz.png,emu,extra\n"))
	if err != nil || len(l) != 4 || l[2] != (Label{"odd,name.png", "cat"}) {
		t.Fatalf("%v %v", l, err)
	}
	y, classes, err := JoinLabels([]string{"b/x.png", "in/odd,name.png", "z.png", "a/x.png"}, l)
	if err != nil || !slices.Equal(classes, []string{"cat", "dog", "emu"}) || !slices.Equal(y, []int32{1, 0, 2, 0}) {
		t.Errorf("%v %v %v", y, classes, err)
	}
	if _, _, err := JoinLabels([]string{"c/x.png"}, l); err == nil || !strings.Contains(err.Error(), "several") {
		t.Errorf("ambiguous name: %v", err)
	}
	if _, _, err := JoinLabels([]string{"q.png"}, l); err == nil || !strings.Contains(err.Error(), "q.png") {
		t.Errorf("no label: %v", err)
	}
	y, classes, err = JoinLabels([]string{"a", "b"}, []Label{{"a", "11"}, {"b", "2"}})
	if err != nil || len(classes) != 12 || classes[11] != "11" || !slices.Equal(y, []int32{11, 2}) {
		t.Errorf("numbers: %v %v %v", y, classes, err)
	}
	if l, err := ReadLabels(strings.NewReader("a.png,3\n")); err != nil || len(l) != 1 {
		t.Errorf("without header: %v %v", l, err)
	}
}

func TestImageDirIsSortedAndRelative(t *testing.T) {
	dir := t.TempDir()
	for _, p := range []string{"b/2.PNG", "b/10.jpg", "a.tif", "notes.txt", ".hidden/x.png", "c/.x.png"} {
		os.MkdirAll(filepath.Dir(filepath.Join(dir, p)), 0o777)
		os.WriteFile(filepath.Join(dir, p), nil, 0o666)
	}
	got, err := ReadImageDir(dir)
	if err != nil || !slices.Equal(got, []string{"a.tif", "b/10.jpg", "b/2.PNG"}) {
		t.Errorf("%v %v", got, err)
	}
	if _, err := ReadImageDir(filepath.Join(dir, "c")); err == nil {
		t.Error("a folder without pictures was accepted")
	}
	if _, err := ReadImageDir(filepath.Join(dir, "none")); err == nil {
		t.Error("a missing folder was accepted")
	}
}

func TestImagesDecode(t *testing.T) {
	for name, b := range pictures(t) {
		img, format, err := DecodeImage(stream{bytes.NewReader(b)})
		if err != nil || format != name || img.Bounds().Dx() != 17 || img.Bounds().Dy() != 11 {
			t.Errorf("%s: %s %v", name, format, err)
		}
	}
	// A large blank picture compresses close to the limit of its format and must still be read.
	for name, encode := range map[string]func(io.Writer, image.Image) error{
		"png": func(w io.Writer, m image.Image) error {
			return (&png.Encoder{CompressionLevel: png.BestCompression}).Encode(w, m)
		},
		"jpeg": func(w io.Writer, m image.Image) error { return jpeg.Encode(w, m, &jpeg.Options{Quality: 1}) },
		"gif":  func(w io.Writer, m image.Image) error { return gif.Encode(w, m, nil) },
		"tiff": func(w io.Writer, m image.Image) error {
			return tiff.Encode(w, m, &tiff.Options{Compression: tiff.Deflate})
		},
	} {
		for kind, m := range map[string]image.Image{
			"grey":      image.NewGray(image.Rect(0, 0, 1500, 1000)),
			"two tones": image.NewPaletted(image.Rect(0, 0, 1500, 1000), color.Palette{color.Black, color.White}),
		} {
			var b bytes.Buffer
			if err := encode(&b, m); err != nil {
				t.Fatal(err)
			}
			if _, _, err := DecodeImage(&b); err != nil {
				t.Errorf("%s %s: %v", name, kind, err)
			}
		}
	}
	path := filepath.Join(t.TempDir(), "x.png")
	os.WriteFile(path, []byte("no"), 0o666)
	if _, _, err := ReadImage(path); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("error %v does not name the file", err)
	}
}

func TestY4MRoundTrip(t *testing.T) {
	for _, h := range []Y4MHeader{
		{Width: 5, Height: 3, Rate: [2]int{30000, 1001}, Aspect: [2]int{1, 1}, Interlace: "p", Chroma: "420mpeg2"},
		{Width: 4, Height: 2, Chroma: "444", Extra: []string{"XCOLORRANGE=LIMITED"}},
		{Width: 3, Height: 1, Chroma: "422"},
		{Width: 1, Height: 1, Chroma: "mono"},
		{Width: 2, Height: 2},
	} {
		b := y4mOf(t, h, 3)
		y, err := NewY4MReader(stream{bytes.NewReader(b)})
		if err != nil {
			t.Errorf("%+v: %v", h, err)
			continue
		}
		h.headerBytes = y.Header.headerBytes
		if fmt.Sprint(y.Header) != fmt.Sprint(h) {
			t.Errorf("header %+v, want %+v", y.Header, h)
		}
		if want := y.Header.headerBytes + 3*(6+h.FrameBytes()); len(b) != want {
			t.Errorf("%d bytes, want %d", len(b), want)
		}
		for i := range 3 {
			f, err := y.Next(nil)
			if err != nil || f.Y[0] != uint8(i) || (len(f.Cb) > 0 && f.Cb[0] != 128) {
				t.Errorf("frame %d: %v", i, err)
			}
		}
		if _, err := y.Next(nil); err != io.EOF {
			t.Errorf("at the end: %v", err)
		}
	}
	w, err := NewY4MWriter(io.Discard, Y4MHeader{Width: 4, Height: 4})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Write(&Frame{Y: make([]byte, 16), Cb: make([]byte, 4), Cr: make([]byte, 3)}); err == nil {
		t.Error("a frame with a short plane was written")
	}
	for _, h := range []Y4MHeader{{}, {Width: 2, Height: 2, Chroma: "420p10"}, {Width: 2, Height: 2, Extra: []string{"W5"}}, {Width: 2, Height: 2, Extra: []string{"Xa\nFRAME"}}} {
		if _, err := NewY4MWriter(io.Discard, h); err == nil {
			t.Errorf("%+v was written", h)
		}
	}
}

func TestJSONLimit(t *testing.T) {
	var v []int
	text := "[" + strings.Repeat("1,", 1000) + "1]"
	for _, r := range []io.Reader{strings.NewReader(text), stream{strings.NewReader(text)}} {
		if err := DecodeJSON(r, 100, &v); !errors.Is(err, ErrTooLarge) {
			t.Errorf("error %v", err)
		}
	}
	if err := DecodeJSON(strings.NewReader(text+" \n"), int64(len(text)+2), &v); err != nil || len(v) != 1001 {
		t.Errorf("%d values, %v", len(v), err)
	}
}

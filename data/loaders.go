package data

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"image"
	"io"
	"os"
	"strings"
)

// FashionClasses are the classes of Fashion-MNIST, by label.
var FashionClasses = []string{
	"T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
}

// DigitClasses are the classes of MNIST and Digits, by label.
var DigitClasses = []string{"0", "1", "2", "3", "4", "5", "6", "7", "8", "9"}

// FashionMNIST returns the 60,000 training or 10,000 test pictures of Fashion-MNIST, 28×28 grey (arXiv:1708.07747).
// Like every loader it takes the files from the cache, else from the official address, and checks their contents.
func FashionMNIST(ctx context.Context, train bool) (*Images, error) {
	return mnistLike(ctx, "fashion-mnist", train, FashionClasses)
}

// MNIST returns the 60,000 training or 10,000 test digits of MNIST, 28×28 grey.
func MNIST(ctx context.Context, train bool) (*Images, error) {
	return mnistLike(ctx, "mnist", train, DigitClasses)
}

func mnistLike(ctx context.Context, name string, train bool, classes []string) (*Images, error) {
	part := "t10k"
	if train {
		part = "train"
	}
	var x [2]*IDX
	for i, file := range []string{part + "-images-idx3-ubyte.gz", part + "-labels-idx1-ubyte.gz"} {
		err := content(ctx, name, file, func(r io.Reader, size int64) (err error) {
			x[i], err = readIDX(r, size, size)
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	m, err := fromIDX(x[0], x[1], classes)
	if err != nil {
		return nil, fmt.Errorf("data: %s: %w", name, err)
	}
	return m, nil
}

// fromIDX joins pictures [n, h, w] and labels [n].
func fromIDX(images, labels *IDX, classes []string) (*Images, error) {
	if len(images.Shape) != 3 || len(labels.Shape) != 1 {
		return nil, fmt.Errorf("pictures of shape %v with labels of shape %v; want [n h w] and [n]", images.Shape, labels.Shape)
	}
	m := &Images{N: images.Shape[0], H: images.Shape[1], W: images.Shape[2], C: 1, Pixels: images.Data, ClassNames: classes}
	m.Labels = make([]int32, len(labels.Data))
	for i, l := range labels.Data {
		m.Labels[i] = int32(l)
	}
	return m, m.validate()
}

// content hands the content of a cached file (decompressed) and its size to read, and fails if its checksum differs.
func content(ctx context.Context, name, file string, read func(r io.Reader, size int64) error) error {
	e, err := Find(name)
	if err != nil {
		return err
	}
	f, ok := e.file(file)
	if !ok {
		return fmt.Errorf("data: %s has no file %q; it has %s", name, file, strings.Join(e.paths(), ", "))
	}
	path, err := e.local(ctx, f)
	if err != nil {
		return err
	}
	in, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("data: %s: %w", name, err)
	}
	defer in.Close()
	body, err := f.open(bufio.NewReaderSize(in, 1<<16))
	if err == nil {
		var rest int64
		err = read(body, f.Bytes)
		if rest, _ = io.Copy(io.Discard, body); err == nil && rest > 0 {
			err = fmt.Errorf("%d bytes were left unread", rest)
		}
		if sum, ok := body.(*sumReader); ok && sum.err != io.EOF { // a wrong content explains any other error
			err = sum.err
		}
	}
	if err != nil {
		return fmt.Errorf("data: %s: %s: %w; %s", name, path, err, e.remedy())
	}
	return nil
}

// Digits returns the 1,797 pictures of scikit-learn's digits, 8×8 grey with values from 0 to 16 (Images.Max).
func Digits(ctx context.Context) (*Images, error) {
	m := &Images{H: 8, W: 8, C: 1, Max: 16, ClassNames: DigitClasses}
	err := content(ctx, "digits", "digits.csv.gz", func(r io.Reader, _ int64) error {
		t, err := ReadCSV(r)
		if err != nil {
			return err
		}
		if t.Cols != 65 {
			return fmt.Errorf("%d columns; want 64 pixels and a label", t.Cols)
		}
		m.N = t.Rows
		for i := range t.Rows {
			row := t.Row(i)
			for _, v := range row[:64] {
				if v < 0 || v > 16 || v != float64(int(v)) {
					return fmt.Errorf("row %d: pixel %v is not one of 0 to 16", i+1, v)
				}
				m.Pixels = append(m.Pixels, uint8(v))
			}
			m.Labels = append(m.Labels, int32(row[64]))
		}
		return m.validate()
	})
	if err != nil {
		return nil, err
	}
	return m, nil
}

// Split is a part of a data set.
type Split int

const (
	Train Split = iota
	Validation
	Test
)

func (s Split) String() string { return [...]string{"train", "validation", "test"}[s] }

// Photograph is one picture of the fixed set of twelve.
type Photograph struct {
	Name  string // "astronaut", "coffee", ...
	File  string // "01-astronaut.png"
	Split Split
	image.Image
}

// photographs in their order: 01 to 08 train, 09 and 10 validation, 11 and 12 test.
var photographs = []string{
	"01-astronaut.png", "02-coffee.png", "03-motorcycle_left.png", "04-rocket.jpg", "05-dune.jpg", "06-garden.jpg",
	"07-greenmeadow.jpg", "08-raindrops.jpg", "09-chelsea.png", "10-ladybird.jpg", "11-china.jpg", "12-flower.jpg",
}

func splitOf(i int) Split {
	switch {
	case i < 8:
		return Train
	case i < 10:
		return Validation
	default:
		return Test
	}
}

// Photographs returns the twelve photographs in their fixed order, or only those of the named splits.
func Photographs(ctx context.Context, splits ...Split) ([]Photograph, error) {
	var out []Photograph
	for i, file := range photographs {
		wanted := len(splits) == 0
		for _, s := range splits {
			wanted = wanted || s == splitOf(i)
		}
		if !wanted {
			continue
		}
		path, err := Path(ctx, "photographs", file)
		if err != nil {
			return nil, err
		}
		img, _, err := ReadImage(path)
		if err != nil {
			return nil, fmt.Errorf("data: photographs: %w", err)
		}
		name, _, _ := strings.Cut(file[3:], ".")
		out = append(out, Photograph{Name: name, File: file, Split: splitOf(i), Image: img})
	}
	return out, nil
}

// Clip is an open video of the data set; Close it.
type Clip struct {
	*Y4MReader
	Name   string
	Frames int // how many there are
	file   *os.File
}

// Close closes the file.
func (c *Clip) Close() error { return c.file.Close() }

// Videos are the clips: carphone 176×144, 120 frames at 29.97/s; bikes 640×272 and bigbuckbunny 640×360, each 96
// frames at 25/s. All are 8-bit 4:2:0.
var Videos = []string{"carphone", "bikes", "bigbuckbunny"}

// Video opens one of Videos.
func Video(ctx context.Context, name string) (*Clip, error) {
	known := false
	for _, v := range Videos {
		known = known || v == name
	}
	if !known {
		return nil, fmt.Errorf("data: no clip is called %q; there is %s", name, strings.Join(Videos, ", "))
	}
	path, err := Path(ctx, "video", name+".y4m")
	if err != nil {
		return nil, err
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("data: video: %w", err)
	}
	size := remaining(f)
	r, err := NewY4MReader(f)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("data: video: %w", inFile(path, err))
	}
	frames := int((size - int64(r.Header.headerBytes)) / int64(len("FRAME\n")+r.Header.FrameBytes()))
	return &Clip{Y4MReader: r, Name: name, Frames: frames, file: f}, nil
}

// Austen returns the six novels of Jane Austen in order of publication, 4,025,044 bytes of UTF-8 with 81 different
// characters.
func Austen(ctx context.Context) (string, error) { return text(ctx, "austen", "austen.txt") }

// KingJames returns the King James Bible, 4,138,639 bytes of ASCII, a verse a line.
func KingJames(ctx context.Context) (string, error) { return text(ctx, "kjv", "kjv.txt") }

func text(ctx context.Context, name, file string) (string, error) {
	var b bytes.Buffer
	err := content(ctx, name, file, func(r io.Reader, size int64) error {
		b.Grow(int(size) + bytes.MinRead) // ReadFrom wants that much room to see the end
		_, err := b.ReadFrom(r)
		return err
	})
	if err != nil {
		return "", err
	}
	return b.String(), nil
}

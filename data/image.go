package data

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"image"
	_ "image/gif" // decoders
	_ "image/jpeg"
	_ "image/png"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	_ "golang.org/x/image/bmp"
	_ "golang.org/x/image/tiff"
)

// MaxImageBytes bounds an encoded picture: 1 GiB.
const MaxImageBytes = 1 << 30

// perByte is how many pixels a byte of a file can stand for at most: deflate packs 1032 bytes of eight one-bit pixels
// into one, a progressive JPEG needs a bit for each 8×8 block, LZW with 12-bit codes packs about 1400 pixels, and BMP is
// not compressed. Blank fax pages (CCITT in TIFF) can be smaller and are refused. PNG is bounded more tightly by checkPNG.
var perByte = map[string]int64{"png": 8 * deflateRatio, "tiff": 8 * deflateRatio, "jpeg": 600, "gif": 1 << 11, "bmp": 8}

// DecodeImage reads a PNG, JPEG, GIF (the first frame), TIFF or BMP picture. Before it is decoded its size is read:
// more than MaxPixels, or more pixels than its bytes can hold, is refused. format is "png", "jpeg", and so on. The
// orientation that a camera noted in EXIF is not applied.
func DecodeImage(r io.Reader) (img image.Image, format string, err error) {
	b, err := readImageBytes(r)
	if err != nil {
		return nil, "", err
	}
	defer func() { // a decoder outside our hands must not bring a caller down
		if p := recover(); p != nil {
			img, err = nil, badf("image", "", "decoder failed: %v", p)
		}
	}()
	if err := checkTIFF(b); err != nil {
		return nil, "tiff", err
	}
	c, format, err := image.DecodeConfig(bytes.NewReader(b))
	if err != nil {
		if errors.Is(err, image.ErrFormat) {
			return nil, "", badf("image", "", "not a PNG, JPEG, GIF, TIFF or BMP picture (it starts with % x)", b[:min(8, len(b))])
		}
		return nil, format, badf(imageFormat(format), "header", "%w", err)
	}
	if c.Width < 1 || c.Height < 1 {
		return nil, format, badf(format, "size", "is %d×%d; both must be positive", c.Width, c.Height)
	}
	if c.Width > MaxPixels/c.Height {
		return nil, format, badf(format, "size", "%d×%d is %w: more than %d pixels", c.Width, c.Height, ErrTooLarge, MaxPixels)
	}
	if n := int64(c.Width) * int64(c.Height); n > perByte[format]*int64(len(b)) {
		return nil, format, badf(format, "size", "%d×%d is %w: %d bytes cannot hold it", c.Width, c.Height, ErrTooLarge, len(b))
	}
	if format == "png" {
		if err := checkPNG(b, c.Width, c.Height); err != nil {
			return nil, format, err
		}
	}
	img, _, err = image.Decode(bytes.NewReader(b))
	if err != nil {
		return nil, format, badf(format, "pixels", "%w", err)
	}
	return img, format, nil
}

// tiffTypes are the bytes of a value of each TIFF field type, 1 to 12.
var tiffTypes = []int64{1, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8}

// placeFields give the offsets and sizes of the parts of the picture: StripOffsets, StripByteCounts, TileOffsets and
// TileByteCounts.
var placeFields = []uint16{273, 279, 324, 325}

// checkTIFF verifies that the values of every field of the first directory, and the parts of the picture, lie within the
// file: the decoder allocates what a field says before it reads it. Other formats pass.
func checkTIFF(b []byte) error {
	var order binary.ByteOrder
	switch {
	case len(b) < 8:
		return nil
	case bytes.HasPrefix(b, []byte("II*\x00")):
		order = binary.LittleEndian
	case bytes.HasPrefix(b, []byte("MM\x00*")):
		order = binary.BigEndian
	default:
		return nil
	}
	at, size := int64(order.Uint32(b[4:])), int64(len(b))
	if at+2 > size {
		return badf("tiff", "directory", "lies at byte %d of %d: %w", at, size, io.ErrUnexpectedEOF)
	}
	fields := int64(order.Uint16(b[at:]))
	if at+2+12*fields > size {
		return badf("tiff", "directory", "has %d fields at byte %d of %d: %w", fields, at, size, io.ErrUnexpectedEOF)
	}
	for i := range fields {
		f := b[at+2+12*i:]
		kind, n := order.Uint16(f[2:]), int64(order.Uint32(f[4:]))
		width := int64(8)
		if int(kind) < len(tiffTypes) {
			width = tiffTypes[kind]
		}
		tag, values := order.Uint16(f), f[8:12]
		if n*width > 4 {
			from := int64(order.Uint32(values))
			if from+n*width > size {
				return badf("tiff", fmt.Sprintf("field %d", tag), "%d values of %d bytes do not lie within the %d bytes: %w", n, width, size, io.ErrUnexpectedEOF)
			}
			values = b[from : from+n*width]
		}
		if !slices.Contains(placeFields, tag) {
			continue
		}
		for ; n > 0 && width >= 2 && len(values) >= int(width); n-- {
			place := int64(order.Uint16(values))
			if width >= 4 {
				place = int64(order.Uint32(values))
			}
			if place > size {
				return badf("tiff", fmt.Sprintf("field %d", tag), "a part of the picture lies, or ends, at byte %d of %d: %w", place, size, io.ErrUnexpectedEOF)
			}
			values = values[width:]
		}
	}
	return nil
}

// checkPNG compares the bytes of the rows with what the data chunks can hold: the decoder allocates all pixels before
// it has seen any.
func checkPNG(b []byte, width, height int) error {
	const signature, overhead = 8, 12 // of a chunk: length, type, checksum
	if len(b) < signature+overhead+13 {
		return badf("png", "header", "%w", io.ErrUnexpectedEOF)
	}
	depth, kind := int64(b[signature+8+8]), b[signature+8+9]
	channels := map[byte]int64{0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
	rows := int64(height) * (1 + (int64(width)*depth*channels+7)/8)
	packed := int64(0)
	for at := int64(signature); at+overhead <= int64(len(b)); {
		n := int64(binary.BigEndian.Uint32(b[at:]))
		name := string(b[at+4 : at+8])
		if n > int64(len(b))-at-overhead {
			return badf("png", "chunk "+quote(name), "is %d bytes long, and %d are left: %w", n, int64(len(b))-at-overhead, io.ErrUnexpectedEOF)
		}
		if name == "IDAT" {
			packed += n
		}
		if name == "IEND" {
			break
		}
		at += overhead + n
	}
	if rows > packed*deflateRatio {
		return badf("png", "size", "%d×%d is %w: %d bytes of data cannot hold it", width, height, ErrTooLarge, packed)
	}
	return nil
}

func imageFormat(f string) string {
	if f == "" {
		return "image"
	}
	return f
}

func readImageBytes(r io.Reader) ([]byte, error) {
	if n := remaining(r); n >= 0 {
		if n > MaxImageBytes {
			return nil, badf("image", "", "%d bytes are %w: more than %d", n, ErrTooLarge, MaxImageBytes)
		}
		b, err := readBytes(r, n)
		if err != nil {
			return nil, badf("image", "", "%w", err)
		}
		return b, nil
	}
	b, err := io.ReadAll(io.LimitReader(r, MaxImageBytes+1))
	if err != nil {
		return nil, badf("image", "", "%w", err)
	}
	if len(b) > MaxImageBytes {
		return nil, badf("image", "", "%w: more than %d bytes", ErrTooLarge, MaxImageBytes)
	}
	return b, nil
}

// ReadImage reads a picture file as DecodeImage does.
func ReadImage(path string) (image.Image, string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, "", err
	}
	defer f.Close()
	img, format, err := DecodeImage(f)
	return img, format, inFile(path, err)
}

// imageExtensions are the endings by which ReadImageDir knows a picture.
var imageExtensions = []string{".png", ".jpg", ".jpeg", ".gif", ".tif", ".tiff", ".bmp"}

// ReadImageDir lists the pictures in a folder and its subfolders by their endings, as paths relative to it with forward
// slashes, sorted. Names that begin with a dot are skipped and links to folders not followed. None at all is an error.
func ReadImageDir(dir string) ([]string, error) {
	var out []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if path != dir && strings.HasPrefix(d.Name(), ".") {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		if d.IsDir() || !slices.Contains(imageExtensions, strings.ToLower(filepath.Ext(path))) {
			return nil
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		out = append(out, filepath.ToSlash(rel))
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("data: reading pictures: %w", err)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("data: no picture (%s) in %s", strings.Join(imageExtensions, " "), dir)
	}
	slices.Sort(out)
	return out, nil
}

// JoinLabels gives every file its label: by its path, or else by its name without folders if that is unambiguous.
// If all classes are whole numbers from 0 they are the labels; otherwise the class names are numbered in alphabetical
// order. A file without a label is an error; labels without a file are ignored.
func JoinLabels(files []string, labels []Label) (y []int32, classes []string, err error) {
	byPath := map[string]string{}
	byName := map[string]string{}
	ambiguous := map[string]bool{}
	numbers, most := true, 0
	seen := map[string]bool{}
	for _, l := range labels {
		path := strings.TrimPrefix(filepath.ToSlash(l.File), "./")
		byPath[path] = l.Class
		name := path[strings.LastIndexByte(path, '/')+1:]
		if old, ok := byName[name]; ok && old != l.Class {
			ambiguous[name] = true
		}
		byName[name] = l.Class
		if !seen[l.Class] {
			seen[l.Class] = true
			classes = append(classes, l.Class)
		}
		if v, err := strconv.Atoi(l.Class); err != nil || v < 0 || v >= 1<<20 || strconv.Itoa(v) != l.Class {
			numbers = false
		} else {
			most = max(most, v)
		}
	}
	number := map[string]int32{}
	if numbers {
		classes = make([]string, most+1)
		for i := range classes {
			classes[i] = strconv.Itoa(i)
		}
	} else {
		slices.Sort(classes)
	}
	for i, c := range classes {
		number[c] = int32(i)
	}
	y = make([]int32, len(files))
	for i, f := range files {
		class, ok := byPath[f]
		if !ok {
			name := f[strings.LastIndexByte(f, '/')+1:]
			if ambiguous[name] {
				return nil, nil, fmt.Errorf("data: picture %s: several labels are for files called %q; name them by path", f, name)
			}
			class, ok = byName[name]
		}
		if !ok {
			return nil, nil, fmt.Errorf("data: picture %s has no label", f)
		}
		y[i] = number[class]
	}
	return y, classes, nil
}

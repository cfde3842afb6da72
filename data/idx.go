package data

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"io"
	"os"
)

// IDX is an array of bytes in the format of the MNIST files: a magic number, big-endian dimensions, row-major data.
type IDX struct {
	Shape []int
	Data  []uint8
}

// MaxArrayBytes bounds what ReadIDX and ReadNPY accept: 4 GiB.
const MaxArrayBytes = 4 << 30

// ReadIDX reads an IDX array of unsigned bytes, plain or compressed by gzip (told by its first bytes). Nothing may
// follow the data. A gzip stream may not hold more than its header declares, and the header may not declare more than
// gzip can compress into the bytes that are there.
func ReadIDX(r io.Reader) (*IDX, error) {
	size := remaining(r)
	br := bufio.NewReaderSize(r, 1<<15)
	magic, err := br.Peek(2)
	if err != nil {
		return nil, badf("idx", "magic number", "%d bytes are there: %w", len(magic), io.ErrUnexpectedEOF)
	}
	if !bytes.Equal(magic, []byte{0x1f, 0x8b}) {
		return readIDX(br, size, size)
	}
	z, err := gzip.NewReader(br)
	if err != nil {
		return nil, badf("idx", "gzip header", "%w", err)
	}
	most := int64(-1)
	if size >= 0 {
		most = size * deflateRatio
	}
	return readIDX(z, -1, most)
}

// deflateRatio is how much deflate can compress at most: 258 bytes in two bits.
const deflateRatio = 1032

// readIDX reads from r, of which left bytes are known to be there, and at most most can be (-1: unknown).
func readIDX(r io.Reader, left, most int64) (*IDX, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, badf("idx", "magic number", "%w", err)
	}
	if head[0] != 0 || head[1] != 0 {
		return nil, badf("idx", "magic number", "starts with % x, not with two zeros", head[:2])
	}
	if head[2] != 0x08 {
		return nil, badf("idx", "type", "is 0x%02x; only 0x08 (unsigned bytes) is read", head[2])
	}
	dims := int(head[3])
	if dims < 1 || dims > 8 {
		return nil, badf("idx", "dimensions", "number %d; 1 to 8 are read", dims)
	}
	raw := make([]byte, 4*dims)
	if _, err := io.ReadFull(r, raw); err != nil {
		return nil, badf("idx", "dimensions", "%w", err)
	}
	x := &IDX{Shape: make([]int, dims)}
	for i := range x.Shape {
		x.Shape[i] = int(binary.BigEndian.Uint32(raw[4*i:]))
	}
	n, err := product(x.Shape, MaxArrayBytes)
	if err != nil {
		return nil, badf("idx", "dimensions", "%w", err)
	}
	if header := int64(4 + 4*dims); most >= 0 && n > most-header {
		return nil, badf("idx", "dimensions", "%v need %d bytes, and no more than %d can be there: %w", x.Shape, n, max(0, most-header), io.ErrUnexpectedEOF)
	}
	body := r
	if left >= 0 {
		body = sized{r, left - int64(4+4*dims)}
	}
	if x.Data, err = readBytes(body, n); err != nil {
		return nil, badf("idx", "data", "%w", err)
	}
	// One more read also makes gzip check its sum.
	if k, err := io.ReadFull(r, head[:1]); k != 0 {
		return nil, badf("idx", "data", "more follows after the %d bytes that %v declare", n, x.Shape)
	} else if err != io.EOF {
		return nil, badf("idx", "data", "%w", err)
	}
	return x, nil
}

// sized is a reader of known length.
type sized struct {
	io.Reader
	n int64
}

func (s sized) remaining() int64 { return s.n }

// ReadIDXFile reads an .idx or .idx.gz file.
func ReadIDXFile(path string) (*IDX, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	x, err := ReadIDX(f)
	return x, inFile(path, err)
}

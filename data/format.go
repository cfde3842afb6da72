package data

import (
	"errors"
	"fmt"
	"io"
	"os"
)

// FormatError is what every reader of this package returns for input that is not what it claims to be.
type FormatError struct {
	Format string // "idx", "npy", "csv", "y4m", "png", "json", ...
	File   string // where it was read from, if known
	Field  string // the part of the format that is wrong, e.g. "shape"
	Err    error  // why
}

func (e *FormatError) Error() string {
	s := e.Format
	if e.File != "" {
		s += " " + e.File
	}
	if e.Field != "" {
		s += ": " + e.Field
	}
	return s + ": " + e.Err.Error()
}

func (e *FormatError) Unwrap() error { return e.Err }

// ErrTooLarge is wrapped by the errors about input that asks for more memory than its reader allows.
var ErrTooLarge = errors.New("too large")

func badf(format, field, text string, args ...any) error {
	return &FormatError{Format: format, Field: field, Err: fmt.Errorf(text, args...)}
}

// inFile adds the path to a FormatError.
func inFile(path string, err error) error {
	var f *FormatError
	if errors.As(err, &f) && f.File == "" {
		f.File = path
		return err
	}
	if err == nil || f != nil {
		return err
	}
	return fmt.Errorf("%s: %w", path, err)
}

// remaining returns how many bytes r still holds if that is known without reading, else -1.
func remaining(r io.Reader) int64 {
	switch r := r.(type) {
	case interface{ Len() int }: // bytes.Reader, bytes.Buffer, strings.Reader
		return int64(r.Len())
	case *os.File:
		st, err := r.Stat()
		if err != nil || !st.Mode().IsRegular() {
			return -1
		}
		at, err := r.Seek(0, io.SeekCurrent)
		if err != nil {
			return -1
		}
		return max(0, st.Size()-at)
	case interface{ remaining() int64 }:
		return r.remaining()
	}
	return -1
}

// readBytes reads exactly n bytes. If the stream is known to hold fewer it fails before anything is allocated; if its
// length is unknown, memory grows with what has arrived, so that a false n costs nothing.
func readBytes(r io.Reader, n int64) ([]byte, error) {
	return readElems(r, n, 1, func(dst, src []byte) { copy(dst, src) })
}

// readElems reads n elements of width bytes and decodes them block by block.
func readElems[T any](r io.Reader, n int64, width int, decode func(dst []T, src []byte)) ([]T, error) {
	left := remaining(r)
	if left >= 0 && left/int64(width) < n {
		return nil, fmt.Errorf("%d bytes are there, %d are needed: %w", left, n*int64(width), io.ErrUnexpectedEOF)
	}
	const block = 1 << 15 // elements
	first := min(n, block)
	if left >= 0 {
		first = n
	}
	out := make([]T, 0, first)
	buf := make([]byte, min(n, block)*int64(width))
	for int64(len(out)) < n {
		k := int(min(n-int64(len(out)), block))
		b := buf[:k*width]
		if m, err := io.ReadFull(r, b); err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return nil, fmt.Errorf("%d of %d bytes: %w", len(out)*width+m, n*int64(width), err)
		}
		at := len(out)
		if at+k > cap(out) { // by half, but never beyond n
			grown := make([]T, at, min(n, int64(at+k+(at+k)/2)))
			copy(grown, out)
			out = grown
		}
		out = out[:at+k]
		decode(out[at:], b)
	}
	return out, nil
}

// product multiplies the dimensions, refusing negative ones and results beyond limit.
func product(dims []int, limit int64) (int64, error) {
	n := int64(1)
	for _, d := range dims {
		if d < 0 {
			return 0, fmt.Errorf("dimension %d is negative", d)
		}
		if d > 0 && n > limit/int64(d) {
			return 0, fmt.Errorf("%v is %w: more than %d elements", dims, ErrTooLarge, limit)
		}
		n *= int64(d)
	}
	return n, nil
}

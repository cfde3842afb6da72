// Package gguf reads GGUF files (versions 2 and 3), the format of llama.cpp's language models: metadata, and tensors in
// floating point or in blocks of a few bits, which it widens to float32.
//
// A file is hostile: sizes are checked against the file before memory is asked for, nothing panics, and errors name the
// field.
package gguf

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
)

// File is an open GGUF file. Tensors are read from it when they are asked for, so it must stay open until then.
type File struct {
	Version int
	// Meta are the key-value pairs: bool, string, float64, int64, uint64, or a slice of one of them.
	Meta    map[string]any
	Keys    []string // of Meta, in the order of the file
	Tensors []*Tensor

	r     io.ReaderAt
	close func() error
	name  map[string]*Tensor
}

// Tensor is one entry of a file.
type Tensor struct {
	Name  string
	Type  Type
	Shape []int // row-major: the slowest axis first, the reverse of the file's order
	Bytes int64 // stored

	f  *File
	at int64
}

// Elements is the number of values.
func (t *Tensor) Elements() int {
	n := 1
	for _, d := range t.Shape {
		n *= d
	}
	return n
}

// Limits of what a header may claim; llama.cpp's are of the same order.
const (
	maxAxes   = 4
	maxName   = 1 << 16
	maxString = 1 << 26
	maxCount  = 1 << 24 // tensors, pairs
)

// Open reads a file's header. Close it after the last tensor was read.
func Open(path string) (*File, error) {
	h, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	st, err := h.Stat()
	if err != nil {
		h.Close()
		return nil, err
	}
	f, err := Read(h, st.Size())
	if err != nil {
		h.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	f.close = h.Close
	return f, nil
}

// Close closes what Open opened.
func (f *File) Close() error {
	if f.close == nil {
		return nil
	}
	return f.close()
}

// Read reads the header of a file of that many bytes. Tensors are read from r later.
func Read(r io.ReaderAt, size int64) (*File, error) {
	d := &decoder{r: bufio.NewReaderSize(io.NewSectionReader(r, 0, size), 1<<16), left: size}
	f := &File{Meta: map[string]any{}, r: r, name: map[string]*Tensor{}}
	f.header(d, size)
	if d.err != nil {
		return nil, fmt.Errorf("gguf: %w", d.err)
	}
	return f, nil
}

func (f *File) header(d *decoder, size int64) {
	if magic := string(d.bytes(4, "magic")); d.err == nil && magic != "GGUF" {
		d.fail("the file begins with %q, not with GGUF", magic)
	}
	f.Version = int(d.u32("version"))
	if d.err == nil && f.Version != 2 && f.Version != 3 {
		d.fail("version %d; 2 and 3 are read (a big-endian file is not)", f.Version)
	}
	tensors, pairs := d.count("tensor count"), d.count("pair count")
	for i := uint64(0); i < pairs && d.err == nil; i++ {
		key := d.string(maxName, "key")
		where := fmt.Sprintf("value of %q", key)
		v := d.value(d.u32(where), 0, where)
		if _, twice := f.Meta[key]; twice {
			d.fail("key %q stands twice", key)
		}
		f.Meta[key], f.Keys = v, append(f.Keys, key)
	}
	for i := uint64(0); i < tensors && d.err == nil; i++ {
		f.entry(d)
	}
	if d.err != nil {
		return
	}
	align := int64(32)
	if v, ok := f.Meta["general.alignment"]; ok {
		a, ok := Int(v)
		if !ok || a < 1 || a > 1<<20 || a&(a-1) != 0 {
			d.fail("general.alignment is %v; want a power of two", v)
			return
		}
		align = int64(a)
	}
	start := (size - d.left + align - 1) / align * align
	for _, t := range f.Tensors {
		if t.at%align != 0 {
			d.fail("tensor %q begins at %d, which is no multiple of %d", t.Name, t.at, align)
			return
		}
		if t.at > size-start || t.Bytes > size-start-t.at {
			d.fail("tensor %q wants %d bytes at %d, and the file ends at %d; it is cut short", t.Name, t.Bytes, start+t.at, size)
			return
		}
		t.at += start
	}
}

func (f *File) entry(d *decoder) {
	t := &Tensor{f: f, Name: d.string(maxName, "tensor name")}
	where := fmt.Sprintf("tensor %q", t.Name)
	axes := d.u32(where)
	if d.err == nil && axes > maxAxes {
		d.fail("%s has %d axes; at most %d are allowed", where, axes, maxAxes)
	}
	n := uint64(1)
	for i := uint32(0); i < axes && d.err == nil; i++ {
		v := d.u64(where)
		if v == 0 || v > math.MaxInt32 || n > math.MaxInt64/64/v {
			d.fail("%s: axis of %d elements", where, v)
			return
		}
		n *= v
		t.Shape = append(t.Shape, int(v))
	}
	slices.Reverse(t.Shape)
	t.Type = Type(d.u32(where))
	offset := d.u64(where)
	if d.err != nil {
		return
	}
	form, ok := forms[t.Type]
	if !ok {
		d.fail("%s is stored as type %d, which is not known; known are %s", where, uint32(t.Type), knownTypes())
		return
	}
	row := 1
	if len(t.Shape) > 0 {
		row = t.Shape[len(t.Shape)-1]
	}
	if row%form.values != 0 {
		d.fail("%s: rows of %d values are no whole blocks of %d (%s)", where, row, form.values, t.Type)
		return
	}
	if offset > math.MaxInt64/2 {
		d.fail("%s begins at %d", where, offset)
		return
	}
	t.Bytes, t.at = int64(n)/int64(form.values)*int64(form.bytes), int64(offset)
	if f.name[t.Name] != nil {
		d.fail("%s stands twice", where)
		return
	}
	f.name[t.Name] = t
	f.Tensors = append(f.Tensors, t)
}

// Tensor returns the entry of that name, or nil.
func (f *File) Tensor(name string) *Tensor { return f.name[name] }

// Raw reads the stored bytes.
func (t *Tensor) Raw() ([]byte, error) {
	b := make([]byte, t.Bytes)
	if _, err := t.f.r.ReadAt(b, t.at); err != nil && !(errors.Is(err, io.EOF) && len(b) == 0) {
		return nil, fmt.Errorf("gguf: tensor %q: %w", t.Name, err)
	}
	return b, nil
}

// Floats reads the values as float32, in row-major order.
func (t *Tensor) Floats() ([]float32, error) {
	form := forms[t.Type]
	if form.widen == nil {
		return nil, fmt.Errorf("gguf: tensor %q holds %s, which are no numbers of a network", t.Name, t.Type)
	}
	raw, err := t.Raw()
	if err != nil {
		return nil, err
	}
	out := make([]float32, t.Elements())
	for i := 0; i < len(out); i += form.values {
		form.widen(out[i:i+form.values], raw[:form.bytes])
		raw = raw[form.bytes:]
	}
	return out, nil
}

// Int returns a whole number of the metadata.
func Int(v any) (int, bool) {
	switch v := v.(type) {
	case int64:
		return int(v), true
	case uint64:
		return int(v), v <= math.MaxInt64
	}
	return 0, false
}

// decoder reads little-endian values and keeps the first error.
type decoder struct {
	r    io.Reader
	left int64
	err  error
}

func (d *decoder) fail(format string, args ...any) {
	if d.err == nil {
		d.err = fmt.Errorf(format, args...)
	}
}

func (d *decoder) bytes(n int64, where string) []byte {
	if d.err != nil {
		return nil
	}
	if n > d.left {
		d.fail("%s wants %d bytes and %d are left; the file is cut short or damaged", where, n, d.left)
		return nil
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(d.r, b); err != nil {
		d.fail("%s: %v", where, err)
		return nil
	}
	d.left -= n
	return b
}

func (d *decoder) u32(where string) uint32 {
	if b := d.bytes(4, where); b != nil {
		return binary.LittleEndian.Uint32(b)
	}
	return 0
}

func (d *decoder) u64(where string) uint64 {
	if b := d.bytes(8, where); b != nil {
		return binary.LittleEndian.Uint64(b)
	}
	return 0
}

func (d *decoder) count(where string) uint64 {
	n := d.u64(where)
	if n > maxCount {
		d.fail("%s is %d; at most %d are allowed", where, n, maxCount)
	}
	return n
}

func (d *decoder) string(limit uint64, where string) string {
	n := d.u64(where)
	if n > limit {
		d.fail("%s is a text of %d bytes; at most %d are allowed", where, n, limit)
		return ""
	}
	return string(d.bytes(int64(n), where))
}

// Kinds of metadata values.
const (
	kindU8 = iota
	kindI8
	kindU16
	kindI16
	kindU32
	kindI32
	kindF32
	kindBool
	kindString
	kindArray
	kindU64
	kindI64
	kindF64
)

var kindBytes = [...]int64{kindU8: 1, kindI8: 1, kindU16: 2, kindI16: 2, kindU32: 4, kindI32: 4, kindF32: 4, kindBool: 1, kindString: 8, kindArray: 12, kindU64: 8, kindI64: 8, kindF64: 8}

func (d *decoder) value(kind uint32, depth int, where string) any {
	if int(kind) >= len(kindBytes) {
		d.fail("%s has kind %d; 0 to 12 are known", where, kind)
	}
	if d.err != nil {
		return nil
	}
	switch kind {
	case kindString:
		return d.string(maxString, where)
	case kindArray:
		return d.array(depth, where)
	}
	b := d.bytes(kindBytes[kind], where)
	if b == nil {
		return nil
	}
	return scalar(kind, b)
}

// scalar widens a number.
func scalar(kind uint32, b []byte) any {
	le := binary.LittleEndian
	switch kind {
	case kindU8:
		return uint64(b[0])
	case kindI8:
		return int64(int8(b[0]))
	case kindU16:
		return uint64(le.Uint16(b))
	case kindI16:
		return int64(int16(le.Uint16(b)))
	case kindU32:
		return uint64(le.Uint32(b))
	case kindI32:
		return int64(int32(le.Uint32(b)))
	case kindF32:
		return float64(math.Float32frombits(le.Uint32(b)))
	case kindBool:
		return b[0] != 0
	case kindU64:
		return le.Uint64(b)
	case kindI64:
		return int64(le.Uint64(b))
	}
	return math.Float64frombits(le.Uint64(b))
}

func (d *decoder) array(depth int, where string) any {
	kind, n := d.u32(where), d.u64(where)
	switch {
	case d.err != nil:
		return nil
	case depth > 3:
		d.fail("%s: lists are nested too deeply", where)
		return nil
	case int(kind) >= len(kindBytes):
		d.fail("%s is a list of kind %d; 0 to 12 are known", where, kind)
		return nil
	case n > uint64(d.left/kindBytes[kind]):
		d.fail("%s is a list of %d elements and %d bytes are left; the file is cut short or damaged", where, n, d.left)
		return nil
	}
	switch kind {
	case kindString:
		out := []string{}
		for range n {
			if out = append(out, d.string(maxString, where)); d.err != nil {
				return nil
			}
		}
		return out
	case kindArray:
		out := []any{}
		for range n {
			if out = append(out, d.array(depth+1, where)); d.err != nil {
				return nil
			}
		}
		return out
	}
	size := kindBytes[kind]
	b := d.bytes(int64(n)*size, where)
	if b == nil {
		return nil
	}
	switch kind {
	case kindBool:
		return list[bool](kind, size, b)
	case kindF32, kindF64:
		return list[float64](kind, size, b)
	case kindI8, kindI16, kindI32, kindI64:
		return list[int64](kind, size, b)
	}
	return list[uint64](kind, size, b)
}

func list[T any](kind uint32, size int64, b []byte) []T {
	out := make([]T, 0, int64(len(b))/size)
	for ; len(b) > 0; b = b[size:] {
		out = append(out, scalar(kind, b).(T))
	}
	return out
}

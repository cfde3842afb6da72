// Package safetensors reads and writes tensors and whole networks in the safetensors format
// (https://github.com/huggingface/safetensors): eight bytes of header length, a JSON header that gives type, shape
// and place of every tensor, and the tensors' bytes one behind the other.
//
// Anything read is taken for hostile: sizes are checked before memory is asked for, places must tile the data without
// hole or overlap, and names must be unique. Errors name the file, the tensor and the field.
package safetensors

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"slices"
	"strconv"

	"github.com/lathe-ml/lathe/internal/atomicfile"
	"github.com/lathe-ml/lathe/internal/half"
)

// MaxHeader is the longest header that is read, in bytes; it is the limit of the reference implementation.
const MaxHeader = 100_000_000

// DType is the element type of a stored tensor.
type DType string

// The element types of the format that Lathe reads. It writes F32, F64, I64, I32, I16, I8, U8 and BOOL.
const (
	Bool DType = "BOOL"
	U8   DType = "U8"
	I8   DType = "I8"
	I16  DType = "I16"
	U16  DType = "U16"
	F16  DType = "F16"
	BF16 DType = "BF16"
	I32  DType = "I32"
	U32  DType = "U32"
	F32  DType = "F32"
	F64  DType = "F64"
	I64  DType = "I64"
	U64  DType = "U64"
)

var dtypeBytes = map[DType]int{Bool: 1, U8: 1, I8: 1, I16: 2, U16: 2, F16: 2, BF16: 2, I32: 4, U32: 4, F32: 4, F64: 8, I64: 8, U64: 8}

// Size is the bytes of one element, 0 for a type that is not read.
func (d DType) Size() int { return dtypeBytes[d] }

// Tensor is one stored tensor: little-endian elements in row-major order.
type Tensor struct {
	Name  string
	DType DType
	Shape []int
	Data  []byte
}

// Elements is the number of elements.
func (t *Tensor) Elements() int {
	n := 1
	for _, d := range t.Shape {
		n *= d
	}
	return n
}

// Floats returns the elements as float32: BF16 and F16 are widened exactly, F64 and integers are rounded to nearest.
func (t *Tensor) Floats() ([]float32, error) {
	n := t.Elements()
	if t.DType.Size() == 0 || len(t.Data) != n*t.DType.Size() {
		return nil, fmt.Errorf("safetensors: tensor %q: %d bytes for %s%v", t.Name, len(t.Data), t.DType, t.Shape)
	}
	out := make([]float32, n)
	d, le := t.Data, binary.LittleEndian
	for i := range out {
		switch t.DType {
		case F32:
			out[i] = math.Float32frombits(le.Uint32(d[4*i:]))
		case F64:
			out[i] = float32(math.Float64frombits(le.Uint64(d[8*i:])))
		case BF16:
			out[i] = half.FromBF16(le.Uint16(d[2*i:]))
		case F16:
			out[i] = half.FromF16(le.Uint16(d[2*i:]))
		case I64:
			out[i] = float32(int64(le.Uint64(d[8*i:])))
		case U64:
			out[i] = float32(le.Uint64(d[8*i:]))
		case I32:
			out[i] = float32(int32(le.Uint32(d[4*i:])))
		case U32:
			out[i] = float32(le.Uint32(d[4*i:]))
		case I16:
			out[i] = float32(int16(le.Uint16(d[2*i:])))
		case U16:
			out[i] = float32(le.Uint16(d[2*i:]))
		case I8:
			out[i] = float32(int8(d[i]))
		case U8, Bool:
			out[i] = float32(d[i])
		}
	}
	return out, nil
}

// FromFloats makes an F32 tensor. Shape must hold len(data) elements.
func FromFloats(name string, data []float32, shape ...int) Tensor {
	b := make([]byte, 0, 4*len(data))
	for _, v := range data {
		b = binary.LittleEndian.AppendUint32(b, math.Float32bits(v))
	}
	return Tensor{Name: name, DType: F32, Shape: slices.Clone(shape), Data: b}
}

// File is the content of a safetensors file.
type File struct {
	Meta    map[string]string // free-form; "format": "pt" is what other tools expect of weights
	Tensors []Tensor          // in order of their place in the file
}

// Tensor returns the tensor of that name, or nil.
func (f *File) Tensor(name string) *Tensor {
	for i := range f.Tensors {
		if f.Tensors[i].Name == name {
			return &f.Tensors[i]
		}
	}
	return nil
}

// ReadFile reads a whole file.
func ReadFile(path string) (*File, error) {
	r, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("safetensors: %w", err)
	}
	defer r.Close()
	st, err := r.Stat()
	if err != nil {
		return nil, fmt.Errorf("safetensors: %w", err)
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("safetensors: %s is not a regular file", path)
	}
	f, err := Read(r, st.Size())
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return f, nil
}

// Read reads size bytes. The tensors share one allocation of the size of the data.
func Read(r io.Reader, size int64) (*File, error) {
	if size < 8 {
		return nil, fmt.Errorf("safetensors: %d bytes are too few for a header", size)
	}
	var lenBytes [8]byte
	if _, err := io.ReadFull(r, lenBytes[:]); err != nil {
		return nil, fmt.Errorf("safetensors: reading the header length: %w", err)
	}
	n := binary.LittleEndian.Uint64(lenBytes[:])
	if n > MaxHeader || n > uint64(size-8) {
		return nil, fmt.Errorf("safetensors: header of %d bytes, but at most %d are possible here; is this a safetensors file?", n, min(MaxHeader, size-8))
	}
	head := make([]byte, n)
	if _, err := io.ReadFull(r, head); err != nil {
		return nil, fmt.Errorf("safetensors: reading the header: %w", err)
	}
	total := size - 8 - int64(n)
	f, places, err := parseHeader(head, total)
	if err != nil {
		return nil, fmt.Errorf("safetensors: header: %w", err)
	}
	data := make([]byte, total)
	if _, err := io.ReadFull(r, data); err != nil {
		return nil, fmt.Errorf("safetensors: reading %d bytes of tensors: %w", total, err)
	}
	for i, p := range places {
		f.Tensors[i].Data = data[p[0]:p[1]:p[1]]
	}
	return f, nil
}

// Decode reads a file held in memory.
func Decode(b []byte) (*File, error) { return Read(bytes.NewReader(b), int64(len(b))) }

// parseHeader reads the JSON and checks it against the number of data bytes. Tensors come back ordered by place.
func parseHeader(head []byte, total int64) (*File, [][2]int64, error) {
	if len(head) == 0 || head[0] != '{' {
		return nil, nil, errors.New("it does not begin with {")
	}
	d := json.NewDecoder(bytes.NewReader(head))
	d.UseNumber()
	f := &File{}
	type entry struct {
		t Tensor
		p [2]int64
	}
	var entries []entry
	seen := map[string]bool{}
	err := object(d, func(key string) error {
		if seen[key] {
			return fmt.Errorf("%q is there twice", key)
		}
		seen[key] = true
		if key == "__metadata__" {
			f.Meta = map[string]string{}
			return object(d, func(k string) error {
				if _, ok := f.Meta[k]; ok {
					return fmt.Errorf("__metadata__: %q is there twice", k)
				}
				t, err := d.Token()
				if err != nil {
					return fmt.Errorf("__metadata__: %q: %w", k, err)
				}
				s, ok := t.(string)
				if !ok {
					return fmt.Errorf("__metadata__: %q is %v, not a string", k, t)
				}
				f.Meta[k] = s
				return nil
			})
		}
		t, p, err := parseTensor(d, total)
		if err != nil {
			return fmt.Errorf("tensor %q: %w", key, err)
		}
		t.Name = key
		entries = append(entries, entry{t, p})
		return nil
	})
	if err != nil {
		return nil, nil, err
	}
	if rest := bytes.TrimRight(head[d.InputOffset():], " "); len(rest) > 0 {
		return nil, nil, fmt.Errorf("%d bytes after the closing brace", len(rest))
	}
	slices.SortStableFunc(entries, func(a, b entry) int {
		if a.p[0] != b.p[0] {
			return int(min(1, max(-1, a.p[0]-b.p[0])))
		}
		return int(min(1, max(-1, a.p[1]-b.p[1])))
	})
	var end int64
	places := make([][2]int64, len(entries))
	for i, e := range entries {
		if e.p[0] != end {
			return nil, nil, fmt.Errorf("tensor %q begins at byte %d of the data, the one before it ends at %d: the tensors must lie one behind the other", e.t.Name, e.p[0], end)
		}
		end, places[i] = e.p[1], e.p
		f.Tensors = append(f.Tensors, e.t)
	}
	if end != total {
		return nil, nil, fmt.Errorf("the tensors take %d bytes, the file has %d: it is cut short or has something behind them", end, total)
	}
	return f, places, nil
}

func parseTensor(d *json.Decoder, total int64) (t Tensor, p [2]int64, err error) {
	got := map[string]bool{}
	err = object(d, func(key string) error {
		if got[key] {
			return fmt.Errorf("%s is there twice", key)
		}
		got[key] = true
		switch key {
		case "dtype":
			v, err := d.Token()
			if err != nil {
				return err
			}
			s, _ := v.(string)
			if t.DType = DType(s); t.DType.Size() == 0 {
				return fmt.Errorf("dtype is %q; want one of %v", s, slices.Sorted(maps.Keys(dtypeBytes)))
			}
		case "shape":
			dims, err := integers(d, 64)
			if err != nil {
				return fmt.Errorf("shape: %w", err)
			}
			t.Shape = make([]int, len(dims))
			for i, v := range dims {
				t.Shape[i] = int(v)
			}
		case "data_offsets":
			o, err := integers(d, 2)
			if err != nil {
				return fmt.Errorf("data_offsets: %w", err)
			}
			if len(o) != 2 || o[0] > o[1] || o[1] > total {
				return fmt.Errorf("data_offsets are %v; want [begin, end] within the %d bytes of data", o, total)
			}
			p = [2]int64{o[0], o[1]}
		default:
			return fmt.Errorf("unknown field %q", key)
		}
		return nil
	})
	if err != nil {
		return t, p, err
	}
	for _, k := range []string{"dtype", "shape", "data_offsets"} {
		if !got[k] {
			return t, p, fmt.Errorf("%s is missing", k)
		}
	}
	want, ok := int64(t.DType.Size()), true
	for _, v := range t.Shape {
		if v == 0 {
			want = 0
		}
		if want > 0 && int64(v) > math.MaxInt64/want {
			ok = false
			break
		}
		want *= int64(v)
	}
	if slices.Contains(t.Shape, 0) {
		want, ok = 0, true
	}
	if !ok || want != p[1]-p[0] {
		return t, p, fmt.Errorf("%s%v does not fit its %d bytes", t.DType, t.Shape, p[1]-p[0])
	}
	return t, p, nil
}

// object reads a JSON object key by key; f reads the value.
func object(d *json.Decoder, f func(key string) error) error {
	t, err := d.Token()
	if err != nil {
		return err
	}
	if t != json.Delim('{') {
		return fmt.Errorf("want an object, got %v", t)
	}
	for d.More() {
		k, err := d.Token()
		if err != nil {
			return err
		}
		key, ok := k.(string)
		if !ok {
			return fmt.Errorf("want a name, got %v", k)
		}
		if err := f(key); err != nil {
			return err
		}
	}
	_, err = d.Token()
	return err
}

// integers reads an array of at most limit non-negative integers.
func integers(d *json.Decoder, limit int) ([]int64, error) {
	t, err := d.Token()
	if err != nil {
		return nil, err
	}
	if t != json.Delim('[') {
		return nil, fmt.Errorf("want an array, got %v", t)
	}
	out := []int64{}
	for d.More() {
		t, err := d.Token()
		if err != nil {
			return nil, err
		}
		n, ok := t.(json.Number)
		if !ok {
			return nil, fmt.Errorf("want an integer, got %v", t)
		}
		v, err := strconv.ParseInt(n.String(), 10, 64)
		if err != nil || v < 0 {
			return nil, fmt.Errorf("%s is not an integer from 0 to 2^63-1", n)
		}
		if out = append(out, v); len(out) > limit {
			return nil, fmt.Errorf("more than %d entries", limit)
		}
	}
	_, err = d.Token()
	return out, err
}

// WriteFile writes a file atomically: it is there whole, or as it was before.
func WriteFile(path string, f *File) error {
	err := atomicfile.Write(path, func(w io.Writer) error { return Write(w, f) })
	if err != nil {
		return fmt.Errorf("safetensors: writing %s: %w", path, err)
	}
	return nil
}

// Write writes a file. Tensors are placed by falling element size, so that each is aligned, and otherwise in the
// given order; the header is padded to eight bytes.
func Write(w io.Writer, f *File) error {
	order := make([]*Tensor, len(f.Tensors))
	seen := map[string]bool{"__metadata__": true}
	for i := range f.Tensors {
		t := &f.Tensors[i]
		if seen[t.Name] {
			return fmt.Errorf("safetensors: the tensor name %q is taken", t.Name)
		}
		seen[t.Name] = true
		if t.DType.Size() == 0 || len(t.Data) != t.Elements()*t.DType.Size() {
			return fmt.Errorf("safetensors: tensor %q: %d bytes for %s%v", t.Name, len(t.Data), t.DType, t.Shape)
		}
		order[i] = t
	}
	slices.SortStableFunc(order, func(a, b *Tensor) int { return b.DType.Size() - a.DType.Size() })
	var head bytes.Buffer
	head.WriteByte('{')
	if len(f.Meta) > 0 {
		m, err := json.Marshal(f.Meta)
		if err != nil {
			return fmt.Errorf("safetensors: metadata: %w", err)
		}
		head.WriteString(`"__metadata__":`)
		head.Write(m)
	}
	at := 0
	for _, t := range order {
		if head.Len() > 1 {
			head.WriteByte(',')
		}
		name, err := json.Marshal(t.Name)
		if err != nil {
			return fmt.Errorf("safetensors: tensor %q: %w", t.Name, err)
		}
		shape, err := json.Marshal(append([]int{}, t.Shape...))
		if err != nil {
			return fmt.Errorf("safetensors: tensor %q: %w", t.Name, err)
		}
		fmt.Fprintf(&head, `%s:{"dtype":"%s","shape":%s,"data_offsets":[%d,%d]}`, name, t.DType, shape, at, at+len(t.Data))
		at += len(t.Data)
	}
	head.WriteByte('}')
	for head.Len()%8 != 0 {
		head.WriteByte(' ')
	}
	if head.Len() > MaxHeader {
		return fmt.Errorf("safetensors: a header of %d bytes is more than the format's %d", head.Len(), MaxHeader)
	}
	b := bufio.NewWriter(w)
	var lenBytes [8]byte
	binary.LittleEndian.PutUint64(lenBytes[:], uint64(head.Len()))
	b.Write(lenBytes[:])
	b.Write(head.Bytes())
	for _, t := range order {
		b.Write(t.Data)
	}
	return b.Flush()
}

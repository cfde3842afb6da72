package data

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/gomlx/gomlx/core/tensors"

	"github.com/lathe-ml/lathe/internal/atomicfile"
)

// NPY is an array in NumPy's file format.
type NPY struct {
	DType string // of the file: "f2", "f4", "f8", "u1", "i1", "i4", "i8" or "b1"
	Shape []int  // empty for a scalar
	// Data holds the elements in row-major order: []float32 (f2, f4), []float64 (f8), []uint8 (u1, b1), []int8 (i1),
	// []int32 (i4) or []int64 (i8).
	Data any
}

// maxNPYHeader bounds the text of the header; NumPy itself refuses more than 10,000 characters.
const maxNPYHeader = 1 << 16

const npyMagic = "\x93NUMPY"

// ReadNPY reads an array of format version 1, 2 or 3 with elements f2, f4, f8, u1, i1, i4, i8 or b1 of either byte
// order. Arrays in Fortran order are transposed to row-major. Objects, strings and structures are refused, pickles
// never looked at. Nothing may follow the data.
func ReadNPY(r io.Reader) (*NPY, error) {
	left := remaining(r)
	br := bufio.NewReaderSize(r, 1<<15)
	var head [12]byte
	if _, err := io.ReadFull(br, head[:8]); err != nil {
		return nil, badf("npy", "magic string", "%w", err)
	}
	if string(head[:6]) != npyMagic {
		return nil, badf("npy", "magic string", "is % x, not that of an NPY file", head[:6])
	}
	width := 2
	switch head[6] {
	case 1:
	case 2, 3:
		width = 4
	default:
		return nil, badf("npy", "version", "%d.%d; 1.0, 2.0 and 3.0 are read", head[6], head[7])
	}
	if _, err := io.ReadFull(br, head[8:8+width]); err != nil {
		return nil, badf("npy", "header length", "%w", err)
	}
	n := int64(binary.LittleEndian.Uint32(head[8:]))
	if n > maxNPYHeader {
		return nil, badf("npy", "header length", "%d is %w: more than %d", n, ErrTooLarge, maxNPYHeader)
	}
	if left >= 0 {
		left -= int64(8 + width)
	}
	text, err := readBytes(known(br, left), n)
	if err != nil {
		return nil, badf("npy", "header", "%w", err)
	}
	if left >= 0 {
		left -= n
	}
	h, err := parseNPYHeader(string(text))
	if err != nil {
		return nil, badf("npy", "header", "%w", err)
	}
	a, err := h.read(known(br, left), left)
	if err != nil {
		return nil, err
	}
	if k, err := io.ReadFull(br, head[:1]); k != 0 {
		return nil, badf("npy", "data", "more follows after the elements that shape %v declares", a.Shape)
	} else if err != io.EOF {
		return nil, badf("npy", "data", "%w", err)
	}
	return a, nil
}

// known attaches a length to a reader, unless it is -1.
func known(r io.Reader, left int64) io.Reader {
	if left < 0 {
		return r
	}
	return sized{r, left}
}

type npyHeader struct {
	descr   string
	fortran bool
	shape   []int
}

func (h npyHeader) read(r io.Reader, left int64) (*NPY, error) {
	a := &NPY{Shape: h.shape}
	if len(h.descr) < 3 || !strings.Contains("<>|=", h.descr[:1]) {
		return nil, badf("npy", "descr", "%s; want one of <f4, <f8, <f2, |u1, |i1, <i4, <i8, |b1", quote(h.descr))
	}
	a.DType = h.descr[1:]
	var order binary.ByteOrder = binary.LittleEndian
	if h.descr[0] == '>' {
		order = binary.BigEndian
	}
	width := map[string]int{"f2": 2, "f4": 4, "f8": 8, "u1": 1, "i1": 1, "i4": 4, "i8": 8, "b1": 1}[a.DType]
	if width == 0 || (h.descr[0] == '|' && width > 1) {
		return nil, badf("npy", "descr", "%s; want one of <f4, <f8, <f2, |u1, |i1, <i4, <i8, |b1", quote(h.descr))
	}
	n, err := product(a.Shape, MaxArrayBytes/int64(width))
	if err != nil {
		return nil, badf("npy", "shape", "%w", err)
	}
	if left >= 0 && n*int64(width) != left {
		return nil, badf("npy", "data", "shape %v of %s needs %d bytes, and %d follow", a.Shape, a.DType, n*int64(width), left)
	}
	switch a.DType {
	case "f2":
		a.Data, err = npyElems(r, h, n, 2, func(b []byte) float32 { return halfToFloat(order.Uint16(b)) })
	case "f4":
		a.Data, err = npyElems(r, h, n, 4, func(b []byte) float32 { return math.Float32frombits(order.Uint32(b)) })
	case "f8":
		a.Data, err = npyElems(r, h, n, 8, func(b []byte) float64 { return math.Float64frombits(order.Uint64(b)) })
	case "u1", "b1":
		a.Data, err = npyElems(r, h, n, 1, func(b []byte) uint8 { return b[0] })
	case "i1":
		a.Data, err = npyElems(r, h, n, 1, func(b []byte) int8 { return int8(b[0]) })
	case "i4":
		a.Data, err = npyElems(r, h, n, 4, func(b []byte) int32 { return int32(order.Uint32(b)) })
	case "i8":
		a.Data, err = npyElems(r, h, n, 8, func(b []byte) int64 { return int64(order.Uint64(b)) })
	}
	if err != nil {
		return nil, badf("npy", "data", "%w", err)
	}
	return a, nil
}

func npyElems[T any](r io.Reader, h npyHeader, n int64, width int, one func([]byte) T) ([]T, error) {
	flat, err := readElems(r, n, width, func(dst []T, src []byte) {
		for i := range dst {
			dst[i] = one(src[i*width:])
		}
	})
	if err != nil || !h.fortran || len(h.shape) < 2 {
		return flat, err
	}
	out := make([]T, len(flat)) // column-major to row-major: walk the source, carrying the target's offset
	strides := make([]int, len(h.shape))
	s := 1
	for d := len(h.shape) - 1; d >= 0; d-- {
		strides[d] = s
		s *= h.shape[d]
	}
	at := make([]int, len(h.shape))
	to := 0
	for _, v := range flat {
		out[to] = v
		for d := range at {
			at[d]++
			to += strides[d]
			if at[d] < h.shape[d] {
				break
			}
			to -= at[d] * strides[d]
			at[d] = 0
		}
	}
	return out, nil
}

// halfToFloat converts an IEEE 754 binary16.
func halfToFloat(h uint16) float32 {
	sign := uint32(h>>15) << 31
	exp, frac := uint32(h>>10&31), uint32(h&1023)
	switch {
	case exp == 31:
		return math.Float32frombits(sign | 0xff<<23 | frac<<13)
	case exp > 0:
		return math.Float32frombits(sign | (exp+112)<<23 | frac<<13)
	default: // zero and subnormal: frac · 2^-24
		v := float32(frac) / (1 << 24)
		return math.Float32frombits(sign | math.Float32bits(v))
	}
}

// parseNPYHeader reads the dictionary {'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }, a Python literal
// with exactly these keys.
func parseNPYHeader(s string) (h npyHeader, err error) {
	p := &literal{s: s}
	seen := map[string]bool{}
	p.want("{")
	for p.err == nil && !p.take("}") {
		key := p.str()
		p.want(":")
		if seen[key] {
			return h, fmt.Errorf("key %s appears twice", quote(key))
		}
		seen[key] = true
		switch key {
		case "descr":
			h.descr = p.str()
		case "fortran_order":
			if h.fortran = p.take("True"); !h.fortran {
				p.want("False")
			}
		case "shape":
			h.shape = p.tuple()
		default:
			if p.err == nil {
				return h, fmt.Errorf("unknown key %s", quote(key))
			}
		}
		if !p.take(",") {
			p.want("}")
			break
		}
	}
	if p.err != nil {
		return h, p.err
	}
	if strings.TrimSpace(p.s) != "" {
		return h, fmt.Errorf("%s follows the dictionary", quote(strings.TrimSpace(p.s)))
	}
	for _, k := range []string{"descr", "fortran_order", "shape"} {
		if !seen[k] {
			return h, fmt.Errorf("key %q is missing", k)
		}
	}
	return h, nil
}

// literal scans a Python literal; after an error every step does nothing.
type literal struct {
	s   string
	err error
}

func (p *literal) take(token string) bool {
	p.s = strings.TrimLeft(p.s, " \t\r\n")
	rest, ok := strings.CutPrefix(p.s, token)
	if ok && p.err == nil {
		p.s = rest
		return true
	}
	return false
}

func (p *literal) want(token string) {
	if !p.take(token) && p.err == nil {
		p.err = fmt.Errorf("want %s at %s", token, quote(p.s))
	}
}

func (p *literal) str() string {
	q := "'"
	if !p.take(q) {
		if q = `"`; !p.take(q) && p.err == nil {
			p.err = fmt.Errorf("want a quoted word at %s", quote(p.s))
		}
	}
	v, rest, ok := strings.Cut(p.s, q)
	if p.err == nil && (!ok || strings.Contains(v, `\`)) {
		p.err = fmt.Errorf("want a quoted word at %s", quote(p.s))
	}
	if p.err != nil {
		return ""
	}
	p.s = rest
	return v
}

// tuple reads (), (3,), (3, 4) and the 3L of Python 2.
func (p *literal) tuple() []int {
	out := []int{}
	p.want("(")
	for p.err == nil && !p.take(")") {
		p.s = strings.TrimLeft(p.s, " \t\r\n")
		k := 0
		for k < len(p.s) && p.s[k] >= '0' && p.s[k] <= '9' {
			k++
		}
		v, err := strconv.ParseInt(p.s[:k], 10, 0)
		if err != nil {
			p.err = fmt.Errorf("want a size at %s", quote(p.s))
			break
		}
		if len(out) == 32 {
			p.err = fmt.Errorf("shape has more than 32 axes")
			break
		}
		out = append(out, int(v))
		p.s = strings.TrimPrefix(p.s[k:], "L")
		if !p.take(",") {
			p.want(")")
			break
		}
	}
	return out
}

// Len is the number of elements.
func (a *NPY) Len() int {
	n := 1
	for _, d := range a.Shape {
		n *= d
	}
	return n
}

// Float64s returns the elements as float64, shared if they are.
func (a *NPY) Float64s() []float64 { return convert[float64](a.Data) }

// Float32s returns the elements as float32, shared if they are.
func (a *NPY) Float32s() []float32 { return convert[float32](a.Data) }

type number interface {
	~float32 | ~float64 | ~uint8 | ~int8 | ~int32 | ~int64
}

func convert[T number](data any) []T {
	switch d := data.(type) {
	case []T:
		return d
	case []float32:
		return convertFrom[T](d)
	case []float64:
		return convertFrom[T](d)
	case []uint8:
		return convertFrom[T](d)
	case []int8:
		return convertFrom[T](d)
	case []int32:
		return convertFrom[T](d)
	case []int64:
		return convertFrom[T](d)
	}
	return nil
}

func convertFrom[T, S number](d []S) []T {
	out := make([]T, len(d))
	for i, v := range d {
		out[i] = T(v)
	}
	return out
}

// Tensor returns the array as a tensor of the type of Data.
func (a *NPY) Tensor() *tensors.Tensor {
	switch d := a.Data.(type) {
	case []float64:
		return tensors.FromFlatDataAndDimensions(d, a.Shape...)
	case []uint8:
		return tensors.FromFlatDataAndDimensions(d, a.Shape...)
	case []int8:
		return tensors.FromFlatDataAndDimensions(d, a.Shape...)
	case []int32:
		return tensors.FromFlatDataAndDimensions(d, a.Shape...)
	case []int64:
		return tensors.FromFlatDataAndDimensions(d, a.Shape...)
	}
	return tensors.FromFlatDataAndDimensions(a.Float32s(), a.Shape...)
}

// ReadNPYFile reads an .npy file.
func ReadNPYFile(path string) (*NPY, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	a, err := ReadNPY(f)
	return a, inFile(path, err)
}

// WriteNPY writes values in row-major order as version 1.0 of the format, little-endian: []float32, []float64, []uint8,
// []int8, []int32 or []int64, as many as the product of shape.
func WriteNPY(w io.Writer, shape []int, values any) error {
	var descr string
	var n int
	switch v := values.(type) {
	case []float32:
		descr, n = "<f4", len(v)
	case []float64:
		descr, n = "<f8", len(v)
	case []uint8:
		descr, n = "|u1", len(v)
	case []int8:
		descr, n = "|i1", len(v)
	case []int32:
		descr, n = "<i4", len(v)
	case []int64:
		descr, n = "<i8", len(v)
	default:
		return badf("npy", "values", "are %T; want a slice of float32, float64, uint8, int8, int32 or int64", values)
	}
	if want, err := product(shape, math.MaxInt64); err != nil {
		return badf("npy", "shape", "%w", err)
	} else if want != int64(n) {
		return badf("npy", "shape", "%v has %d elements, and there are %d values", shape, want, n)
	}
	dims := make([]string, len(shape))
	for i, d := range shape {
		dims[i] = strconv.Itoa(d)
	}
	tuple := strings.Join(dims, ", ")
	if len(dims) == 1 {
		tuple += ","
	}
	h := fmt.Sprintf("{'descr': '%s', 'fortran_order': False, 'shape': (%s), }", descr, tuple)
	h += strings.Repeat(" ", 63-(10+len(h))%64) + "\n" // data begin at a multiple of 64
	if len(h) > math.MaxUint16 {
		return badf("npy", "shape", "has %d axes: %w", len(shape), ErrTooLarge)
	}
	head := append([]byte(npyMagic), 1, 0, byte(len(h)), byte(len(h)>>8))
	if _, err := w.Write(append(head, h...)); err != nil {
		return err
	}
	if b, ok := values.([]uint8); ok {
		_, err := w.Write(b)
		return err
	}
	return binary.Write(w, binary.LittleEndian, values)
}

// WriteNPYFile writes an .npy file atomically.
func WriteNPYFile(path string, shape []int, values any) error {
	return atomicfile.Write(path, func(w io.Writer) error { return WriteNPY(w, slices.Clone(shape), values) })
}

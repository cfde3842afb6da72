package gguf

import (
	"encoding/binary"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"

	"github.com/lathe-ml/lathe/internal/half"
)

// Type is how a tensor is stored (ggml_type).
type Type uint32

// The types that are read: floating point, integers, and blocks of 32 (Qn_0: scale; Qn_1: scale and minimum) or 256
// values (Qn_K: scales of sub-blocks, themselves quantised).
const (
	F32  Type = 0
	F16  Type = 1
	Q4_0 Type = 2
	Q4_1 Type = 3
	Q5_0 Type = 6
	Q5_1 Type = 7
	Q8_0 Type = 8
	Q2_K Type = 10
	Q3_K Type = 11
	Q4_K Type = 12
	Q5_K Type = 13
	Q6_K Type = 14
	I8   Type = 24
	I16  Type = 25
	I32  Type = 26
	I64  Type = 27
	F64  Type = 28
	BF16 Type = 30
)

// form is how blocks of a type look.
type form struct {
	name   string
	values int // of a block
	bytes  int
	widen  func(out []float32, b []byte) // nil: no numbers of a network
}

var forms = map[Type]form{
	F32:  {"F32", 1, 4, func(out []float32, b []byte) { out[0] = math.Float32frombits(le.Uint32(b)) }},
	F16:  {"F16", 1, 2, func(out []float32, b []byte) { out[0] = f16(b) }},
	BF16: {"BF16", 1, 2, func(out []float32, b []byte) { out[0] = half.FromBF16(le.Uint16(b)) }},
	F64:  {"F64", 1, 8, func(out []float32, b []byte) { out[0] = float32(math.Float64frombits(le.Uint64(b))) }},
	I8:   {"I8", 1, 1, nil},
	I16:  {"I16", 1, 2, nil},
	I32:  {"I32", 1, 4, nil},
	I64:  {"I64", 1, 8, nil},
	Q4_0: {"Q4_0", 32, 18, q4_0},
	Q4_1: {"Q4_1", 32, 20, q4_1},
	Q5_0: {"Q5_0", 32, 22, q5_0},
	Q5_1: {"Q5_1", 32, 24, q5_1},
	Q8_0: {"Q8_0", 32, 34, q8_0},
	Q2_K: {"Q2_K", 256, 84, q2K},
	Q3_K: {"Q3_K", 256, 110, q3K},
	Q4_K: {"Q4_K", 256, 144, q4K},
	Q5_K: {"Q5_K", 256, 176, q5K},
	Q6_K: {"Q6_K", 256, 210, q6K},
}

// String returns the type's usual name.
func (t Type) String() string {
	if f, ok := forms[t]; ok {
		return f.name
	}
	return fmt.Sprintf("type(%d)", uint32(t))
}

// BitsPerValue is the storage of a value, scales included; 0 for an unknown type.
func (t Type) BitsPerValue() float64 {
	f, ok := forms[t]
	if !ok {
		return 0
	}
	return 8 * float64(f.bytes) / float64(f.values)
}

func knownTypes() string {
	var names []string
	for _, t := range slices.Sorted(maps.Keys(forms)) {
		names = append(names, t.String())
	}
	return strings.Join(names, ", ")
}

var le = binary.LittleEndian

func f16(b []byte) float32 { return half.FromF16(le.Uint16(b)) }

func q4_0(out []float32, b []byte) {
	d := f16(b)
	for i, q := range b[2:18] {
		out[i], out[i+16] = float32(int(q&15)-8)*d, float32(int(q>>4)-8)*d
	}
}

func q4_1(out []float32, b []byte) {
	d, m := f16(b), f16(b[2:])
	for i, q := range b[4:20] {
		out[i], out[i+16] = float32(q&15)*d+m, float32(q>>4)*d+m
	}
}

// fifth are the fifth bits of the values i and i+16 of a block.
func fifth(high uint32, i int) (lo, hi int) {
	return int(high>>i&1) << 4, int(high>>(i+16)&1) << 4
}

func q5_0(out []float32, b []byte) {
	d, high := f16(b), le.Uint32(b[2:])
	for i, q := range b[6:22] {
		lo, hi := fifth(high, i)
		out[i], out[i+16] = float32((int(q&15)|lo)-16)*d, float32((int(q>>4)|hi)-16)*d
	}
}

func q5_1(out []float32, b []byte) {
	d, m, high := f16(b), f16(b[2:]), le.Uint32(b[4:])
	for i, q := range b[8:24] {
		lo, hi := fifth(high, i)
		out[i], out[i+16] = float32(int(q&15)|lo)*d+m, float32(int(q>>4)|hi)*d+m
	}
}

func q8_0(out []float32, b []byte) {
	d := f16(b)
	for i, q := range b[2:34] {
		out[i] = float32(int8(q)) * d
	}
}

func q2K(out []float32, b []byte) {
	scales, qs, d, dmin := b[:16], b[16:80], f16(b[80:]), f16(b[82:])
	for i := range out {
		// 128 values share 32 bytes, 2 bits each; 16 values share a scale.
		part, within := i/128, i%128
		q := qs[part*32+within%32] >> (2 * (within / 32)) & 3
		s := scales[i/16]
		out[i] = d*float32(s&15)*float32(q) - dmin*float32(s>>4)
	}
}

func q3K(out []float32, b []byte) {
	mask, qs, packed, d := b[:32], b[32:96], b[96:108], f16(b[108:])
	for i := range out {
		part, within := i/128, i%128
		q := int(qs[part*32+within%32] >> (2 * (within / 32)) & 3)
		if mask[within%32]>>(i/32)&1 == 0 {
			q -= 4
		}
		j := i / 16 // scales are 6 bits: the low four in the first eight bytes, the high two in the last four
		low := packed[j%8]
		if j >= 8 {
			low >>= 4
		}
		s := int(low&15|packed[8+j%4]>>(2*(j/4))&3<<4) - 32
		out[i] = d * float32(s) * float32(q)
	}
}

// scaleMin unpacks the 6-bit scale and minimum of sub-block j of Q4_K and Q5_K.
func scaleMin(j int, s []byte) (scale, minimum float32) {
	if j < 4 {
		return float32(s[j] & 63), float32(s[j+4] & 63)
	}
	return float32(s[j+4]&15 | s[j-4]>>6<<4), float32(s[j+4]>>4 | s[j]>>6<<4)
}

func q4K(out []float32, b []byte) {
	d, dmin, scales, qs := f16(b), f16(b[2:]), b[4:16], b[16:144]
	for j := range 8 {
		s, m := scaleMin(j, scales)
		s, m = d*s, dmin*m
		for i := range 32 {
			q := qs[j/2*32+i] >> (4 * (j % 2)) & 15
			out[32*j+i] = s*float32(q) - m
		}
	}
}

func q5K(out []float32, b []byte) {
	d, dmin, scales, high, qs := f16(b), f16(b[2:]), b[4:16], b[16:48], b[48:176]
	for j := range 8 {
		s, m := scaleMin(j, scales)
		s, m = d*s, dmin*m
		for i := range 32 {
			q := qs[j/2*32+i]>>(4*(j%2))&15 | high[i]>>j&1<<4
			out[32*j+i] = s*float32(q) - m
		}
	}
}

func q6K(out []float32, b []byte) {
	low, high, scales, d := b[:128], b[128:192], b[192:208], f16(b[208:])
	for i := range out {
		part, within := i/128, i%128
		l := low[part*64+within%64] >> (4 * (within / 64)) & 15
		h := high[part*32+within%32] >> (2 * (within / 32)) & 3
		out[i] = d * float32(int8(scales[i/16])) * float32(int(l|h<<4)-32)
	}
}

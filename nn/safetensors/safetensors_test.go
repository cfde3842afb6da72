package safetensors_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/nn/safetensors"
)

// raw builds a file from a header and data bytes.
func raw(header string, data int) []byte {
	b := binary.LittleEndian.AppendUint64(nil, uint64(len(header)))
	return append(append(b, header...), make([]byte, data)...)
}

func TestWrittenFilesReadBackEqual(t *testing.T) {
	f := &safetensors.File{
		Meta: map[string]string{"format": "pt", "note": "ünï\"code\n"},
		Tensors: []safetensors.Tensor{
			safetensors.FromFloats("b", []float32{1, -2, float32(math.Inf(1))}, 3),
			{Name: "flags", DType: safetensors.Bool, Shape: []int{3}, Data: []byte{1, 0, 1}},
			safetensors.FromFloats("scalar", []float32{7}),
			{Name: "empty", DType: safetensors.F32, Shape: []int{0, 4}, Data: []byte{}},
			{Name: "wide", DType: safetensors.I64, Shape: []int{1, 2}, Data: make([]byte, 16)},
		},
	}
	path := filepath.Join(t.TempDir(), "x.safetensors")
	if err := safetensors.WriteFile(path, f); err != nil {
		t.Fatal(err)
	}
	got, err := safetensors.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got.Meta, f.Meta) || len(got.Tensors) != len(f.Tensors) {
		t.Errorf("read %v, %d tensors", got.Meta, len(got.Tensors))
	}
	for _, want := range f.Tensors {
		g := got.Tensor(want.Name)
		if g == nil || g.DType != want.DType || !slices.Equal(g.Shape, want.Shape) || !bytes.Equal(g.Data, want.Data) {
			t.Errorf("%q came back as %+v", want.Name, g)
		}
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if n := binary.LittleEndian.Uint64(b); n%8 != 0 {
		t.Errorf("the header has %d bytes, which leaves the data unaligned", n)
	}
	if got.Tensors[0].Name != "wide" {
		t.Errorf("the first tensor is %q; wide elements come first", got.Tensors[0].Name)
	}
}

func TestFloatsAreWidenedExactly(t *testing.T) {
	for _, c := range []struct {
		dtype safetensors.DType
		bits  []uint16
		want  []float32
	}{
		{safetensors.F16, []uint16{0x3c00, 0xc000, 0x7bff, 0x0001, 0x8000, 0x0400, 0x7c00}, []float32{1, -2, 65504, 1.0 / (1 << 24), 0, 1.0 / (1 << 14), float32(math.Inf(1))}},
		{safetensors.BF16, []uint16{0x3f80, 0xc000, 0x7f7f, 0x0001}, []float32{1, -2, 3.3895314e38, 9.1835496e-41}},
	} {
		d := []byte{}
		for _, b := range c.bits {
			d = binary.LittleEndian.AppendUint16(d, b)
		}
		x := safetensors.Tensor{Name: "x", DType: c.dtype, Shape: []int{len(c.bits)}, Data: d}
		got, err := x.Floats()
		if err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%s: %v, want %v (%v)", c.dtype, got, c.want, err)
		}
	}
}

func TestHostileFilesAreRefused(t *testing.T) {
	const x = `"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}`
	for _, c := range []struct {
		name string
		file []byte
		want string
	}{
		{"empty", nil, "too few for a header"},
		{"short", []byte{1, 2, 3}, "too few for a header"},
		{"header beyond the file", binary.LittleEndian.AppendUint64(nil, 1<<20), "header of 1048576 bytes"},
		{"header of 2^63", binary.LittleEndian.AppendUint64(nil, 1<<63), "header of 9223372036854775808 bytes"},
		{"not JSON", raw("hello", 0), "does not begin with {"},
		{"cut JSON", raw(`{"x":{"dtype":`, 0), "header"},
		{"trailing text", raw("{"+x+"}junk", 8), "after the closing brace"},
		{"array", raw("[1]", 0), "does not begin with {"},
		{"a name twice", raw("{"+x+","+x+"}", 8), `"x" is there twice`},
		{"a field twice", raw(`{"x":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}`, 8), "dtype is there twice"},
		{"metadata twice", raw(`{"__metadata__":{"a":"b","a":"c"}}`, 0), `"a" is there twice`},
		{"metadata of numbers", raw(`{"__metadata__":{"a":1}}`, 0), "not a string"},
		{"unknown type", raw(`{"x":{"dtype":"F7","shape":[2],"data_offsets":[0,8]}}`, 8), `dtype is "F7"`},
		{"unknown field", raw(`{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"z":1}}`, 8), `unknown field "z"`},
		{"missing field", raw(`{"x":{"dtype":"F32","shape":[2]}}`, 8), "data_offsets is missing"},
		{"negative size", raw(`{"x":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}`, 8), "shape: -2 is not"},
		{"fraction", raw(`{"x":{"dtype":"F32","shape":[2.5],"data_offsets":[0,8]}}`, 8), "shape: 2.5 is not"},
		{"overflowing size", raw(`{"x":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}`, 0), "does not fit its 0 bytes"},
		{"size and bytes differ", raw(`{"x":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}`, 8), "does not fit its 8 bytes"},
		{"offsets beyond the data", raw("{"+x+"}", 4), "within the 4 bytes"},
		{"offsets backwards", raw(`{"x":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}`, 8), "data_offsets are [8 0]"},
		{"negative offset", raw(`{"x":{"dtype":"F32","shape":[2],"data_offsets":[-8,0]}}`, 8), "-8 is not"},
		{"three offsets", raw(`{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,4,8]}}`, 8), "more than 2 entries"},
		{"a hole", raw(`{"x":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}`, 8), "begins at byte 4"},
		{"an overlap", raw(`{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"y":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}`, 8), `"y" begins at byte 4`},
		{"bytes behind", raw("{"+x+"}", 12), "cut short or has something behind"},
		{"a hundred axes", raw(`{"x":{"dtype":"F32","shape":[1`+strings.Repeat(",1", 99)+`],"data_offsets":[0,4]}}`, 4), "more than 64 entries"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			_, err := safetensors.Decode(c.file)
			runtime.ReadMemStats(&after)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error is %v, want one with %q", err, c.want)
			}
			if grown := after.TotalAlloc - before.TotalAlloc; grown > 1<<20 {
				t.Errorf("%d bytes were allocated for a file of %d", grown, len(c.file))
			}
		})
	}
	good := raw("{"+x+"}   ", 8)
	if _, err := safetensors.Decode(good); err != nil {
		t.Errorf("a padded header is refused: %v", err)
	}
	for n := range good {
		if _, err := safetensors.Decode(good[:n]); err == nil {
			t.Errorf("%d of %d bytes were read", n, len(good))
		}
	}
}

func TestWriteRefusesWhatItCouldNotRead(t *testing.T) {
	one := safetensors.FromFloats("x", []float32{1}, 1)
	for name, f := range map[string]*safetensors.File{
		"a name twice":      {Tensors: []safetensors.Tensor{one, one}},
		"the reserved name": {Tensors: []safetensors.Tensor{safetensors.FromFloats("__metadata__", []float32{1}, 1)}},
		"too little data":   {Tensors: []safetensors.Tensor{safetensors.FromFloats("x", []float32{1}, 2)}},
		"unknown type":      {Tensors: []safetensors.Tensor{{Name: "x", DType: "F7"}}},
	} {
		path := filepath.Join(t.TempDir(), "x.safetensors")
		if err := safetensors.WriteFile(path, f); err == nil {
			t.Errorf("%s: written", name)
		}
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: a file was left", name)
		}
	}
}

// TestRealFiles reads the two published checkpoints that are at hand.
func TestRealFiles(t *testing.T) {
	data.RequireTest(t, "silero-vad", "efficientnet-lite0")
	for file, count := range map[string]int{"silero-vad/silero_vad_16k.safetensors": 0, "efficientnet-lite0/model.safetensors": 296} {
		f, err := safetensors.ReadFile(filepath.Join(data.Dir(), "models", filepath.FromSlash(file)))
		if err != nil {
			t.Fatal(err)
		}
		if count > 0 && len(f.Tensors) != count {
			t.Errorf("%s: %d tensors, want %d", file, len(f.Tensors), count)
		}
		for i := range f.Tensors {
			v, err := f.Tensors[i].Floats()
			if err != nil || slices.ContainsFunc(v, func(x float32) bool { return x != x }) {
				t.Errorf("%s: %q: %v, or NaN", file, f.Tensors[i].Name, err)
			}
		}
		var b bytes.Buffer
		if err := safetensors.Write(&b, f); err != nil {
			t.Fatal(err)
		}
		again, err := safetensors.Decode(b.Bytes())
		if err != nil || len(again.Tensors) != len(f.Tensors) || !maps.Equal(again.Meta, f.Meta) {
			t.Errorf("%s: written and read again: %v", file, err)
		}
	}
}

// FuzzDecode wants an error, or a file that is written and read back the same, whatever the bytes.
func FuzzDecode(f *testing.F) {
	f.Add(raw(`{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}`, 8))
	f.Add(raw(`{"__metadata__":{"a":"b"},"x":{"dtype":"BF16","shape":[2,1],"data_offsets":[0,4]},"y":{"dtype":"U8","shape":[],"data_offsets":[4,5]}} `, 5))
	f.Add(raw(`{}`, 0))
	for _, s := range networkSeeds(f) {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		file, err := safetensors.Decode(b)
		if err != nil {
			return
		}
		var w bytes.Buffer
		if err := safetensors.Write(&w, file); err != nil {
			t.Fatalf("read but not written: %v", err)
		}
		again, err := safetensors.Decode(w.Bytes())
		if err != nil {
			t.Fatalf("written but not read: %v", err)
		}
		for i := range file.Tensors {
			if _, err := file.Tensors[i].Floats(); err != nil {
				t.Error(err)
			}
			if g := again.Tensor(file.Tensors[i].Name); g == nil || !bytes.Equal(g.Data, file.Tensors[i].Data) {
				t.Errorf("tensor %q changed", file.Tensors[i].Name)
			}
		}
		net, err := safetensors.DecodeNetwork(file)
		if err != nil {
			if strings.Contains(err.Error(), "internal error") {
				t.Errorf("a defect: %v", err)
			}
			return
		}
		if err := net.Check(); err != nil {
			t.Error(fmt.Errorf("a broken network: %w", err))
		}
	})
}

package data

import (
	"bytes"
	"encoding/json"
	"io"
	"testing"
)

// fuzzReader checks that a reader neither panics nor allocates beyond its bound, with and without a known length.
// factor is how many times the input a valid file may need.
func fuzzReader(f *testing.F, factor int64, read func(io.Reader) error) {
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, r := range []io.Reader{bytes.NewReader(b), stream{bytes.NewReader(b)}} {
			if n := allocated(func() { read(r) }); n > factor*int64(len(b))+4*allowance {
				t.Fatalf("%d bytes allocated for an input of %d", n, len(b))
			}
		}
	})
}

func FuzzReadIDX(f *testing.F) {
	plain := idxOf([]int{3, 4}, payload(12))
	f.Add(plain)
	f.Add(plain[:9])
	f.Add(idxOf([]int{1 << 31, 1 << 31, 4}, nil))
	f.Add([]byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0xff})
	f.Add([]byte{})
	fuzzReader(f, 4*deflateRatio, readers["idx"])
}

func FuzzReadNPY(f *testing.F) {
	f.Add(npyOf(f, []int{2, 2}, []float32{1, 2, 3, 4}))
	f.Add(npyOf(f, nil, []int64{1}))
	f.Add(npyRaw(2, "{'descr': '>f2', 'fortran_order': True, 'shape': (2, 3), }", make([]byte, 12)...))
	f.Add(npyRaw(1, "{'descr': '<f8', 'fortran_order': False, 'shape': (1152921504606846976,), }"))
	f.Add(npyRaw(3, "{"))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, r := range []io.Reader{bytes.NewReader(b), stream{bytes.NewReader(b)}} {
			var a *NPY
			var err error
			if n := allocated(func() { a, err = ReadNPY(r) }); n > 8*int64(len(b))+4*allowance {
				t.Fatalf("%d bytes allocated for an input of %d", n, len(b))
			}
			if err != nil {
				continue
			}
			var out bytes.Buffer // what was read can be written, and is read as the same
			if err := WriteNPY(&out, a.Shape, a.Data); err != nil {
				t.Fatal(err)
			}
			c, err := ReadNPY(&out)
			if err != nil || len(c.Shape) != len(a.Shape) || c.Len() != a.Len() {
				t.Fatalf("%v became %v, %v", a.Shape, c, err)
			}
		}
	})
}

func FuzzReadCSV(f *testing.F) {
	for _, s := range []string{"1,2\n3,4\n", "a;b\n1;2\n", "\ufeff1\t2\n", "1,2\n3", ",,\n", "nan,inf\r\n\r\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		table, err := ReadCSV(bytes.NewReader(b))
		if err == nil && (table.Rows < 1 || table.Rows*table.Cols != len(table.Data)) {
			t.Fatalf("%d rows of %d, %d values", table.Rows, table.Cols, len(table.Data))
		}
	})
}

func FuzzReadLabels(f *testing.F) {
	for _, s := range []string{"file,label\na.png,1\n", "\"a,b\",c\n", "a", "a,b\na,c\n", "\"", "a,b\r\n\r\n"} {
		f.Add([]byte(s))
	}
	fuzzReader(f, 64, readers["labels"])
}

func FuzzReadY4M(f *testing.F) {
	f.Add(y4mOf(f, Y4MHeader{Width: 3, Height: 3, Chroma: "420jpeg", Interlace: "p"}, 2))
	f.Add(y4mOf(f, Y4MHeader{Width: 2, Height: 2, Chroma: "mono"}, 1))
	f.Add([]byte("YUV4MPEG2 W10000 H10000 F25:1 C444\nFRAME\n"))
	f.Add([]byte("YUV4MPEG2 W1 H1 F:\n"))
	f.Add([]byte("YUV4MPEG2\n"))
	fuzzReader(f, 4, readers["y4m"])
}

func FuzzDecodeImage(f *testing.F) {
	for _, b := range pictures(f) {
		f.Add(b)
		f.Add(b[:len(b)/2])
	}
	f.Add([]byte("II*\x00\x08\x00\x00\x00"))
	// A pixel takes up to eight bytes, and twelve more of a progressive JPEG's coefficients.
	fuzzReader(f, 32*8*deflateRatio, readers["image"])
}

func FuzzDecodeJSON(f *testing.F) {
	for _, s := range []string{`{"A":[1]}`, `[]`, `{"A":`, `[[[[`, `{} {}`, `"\ud800"`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var v, w any
		err, want := DecodeJSON(bytes.NewReader(b), 0, &v), json.Unmarshal(b, &w)
		if (err == nil) != (want == nil) {
			t.Fatalf("%q: %v, and encoding/json says %v", b, err, want)
		}
	})
}

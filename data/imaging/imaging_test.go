package imaging

import (
	"bytes"
	"image"
	"image/color"
	"image/jpeg"
	"image/png"
	"math"
	"math/rand/v2"
	"testing"
)

func random(t *testing.T, h, w, c int) *Image {
	t.Helper()
	m, err := New(h, w, c)
	if err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(uint64(h), uint64(w)))
	for i := range m.Pix {
		m.Pix[i] = r.Float32()
	}
	return m
}

func furthest(a, b *Image) float64 {
	if a.H != b.H || a.W != b.W || a.C != b.C {
		return math.Inf(1)
	}
	worst := 0.
	for i := range a.Pix {
		worst = max(worst, math.Abs(float64(a.Pix[i])-float64(b.Pix[i])))
	}
	return worst
}

func TestBicubicOfAConstantIsConstant(t *testing.T) {
	for _, s := range [][2]float64{{2, 3}, {1. / 3, 0.5}, {2.5, 0.7}, {1, 1}, {0.01, 8}} {
		m, _ := New(7, 9, 2)
		for i := range m.Pix {
			m.Pix[i] = 0.37
		}
		out, err := Bicubic(m, s[0], s[1], true)
		if err != nil {
			t.Fatal(err)
		}
		for i, v := range out.Pix {
			if math.Abs(float64(v)-0.37) > 1e-6 {
				t.Fatalf("scale %v: sample %d is %v, want 0.37", s, i, v)
			}
		}
	}
}

func TestBicubicHalvesARampLinearly(t *testing.T) {
	m, _ := New(1, 40, 1)
	for i := range m.Pix {
		m.Pix[i] = float32(i) / 40
	}
	out, err := Bicubic(m, 1, 0.5, true)
	if err != nil {
		t.Fatal(err)
	}
	for i := 3; i < 17; i++ { // output i lies between inputs 2i and 2i+1
		if want := (2*float64(i) + 0.5) / 40; math.Abs(float64(out.Pix[i])-want) > 1e-6 {
			t.Errorf("sample %d is %v, want %v", i, out.Pix[i], want)
		}
	}
}

func TestBicubicMatrixIsTheSameMap(t *testing.T) {
	for _, s := range []float64{3, 1. / 3, 0.5, 1.7, 1} {
		for _, n := range []int{1, 2, 5, 12} {
			m := random(t, 1, n, 1)
			want, err := Bicubic(m, 1, s, true)
			if err != nil {
				t.Fatal(err)
			}
			a, out, err := BicubicMatrix(n, s, true)
			if err != nil || out != want.W {
				t.Fatalf("matrix of %d rows, %v; the image has %d", out, err, want.W)
			}
			for i := range out {
				got := 0.
				for j := range n {
					got += a[i*n+j] * float64(m.Pix[j])
				}
				if math.Abs(got-float64(want.Pix[i])) > 1e-6 {
					t.Errorf("scale %v of %d: output %d is %v by the matrix, %v by the image", s, n, i, got, want.Pix[i])
				}
			}
		}
	}
}

func TestScaleOneIsTheIdentity(t *testing.T) {
	m := random(t, 5, 6, 3)
	out, err := Bicubic(m, 1, 1, true)
	if err != nil || furthest(m, out) > 0 {
		t.Errorf("differs by %v, %v", furthest(m, out), err)
	}
}

func TestColourRoundTrip(t *testing.T) {
	m := random(t, 8, 9, 3)
	ycc, err := RGBToYCbCr(m)
	if err != nil {
		t.Fatal(err)
	}
	back, err := YCbCrToRGB(ycc)
	if err != nil || furthest(m, back) > 1e-6 {
		t.Errorf("RGB differs by %v after YCbCr, %v", furthest(m, back), err)
	}
	y, err := Luma(m)
	if err != nil || furthest(y, ycc.Channel(0)) > 0 {
		t.Errorf("luma is not Y: %v, %v", furthest(y, ycc.Channel(0)), err)
	}
	white := &Image{H: 1, W: 2, C: 1, Pix: []float32{0, 1}}
	y, _ = Luma(white)
	if math.Abs(float64(y.Pix[0])-16./255) > 1e-7 || math.Abs(float64(y.Pix[1])-235./255) > 1e-7 {
		t.Errorf("black and white have luma %v, want 16/255 and 235/255", y.Pix)
	}
	grey, err := GreyFromLuma(y)
	if err != nil || furthest(grey, white) > 1e-6 {
		t.Errorf("grey differs after luma: %v, %v", grey, err)
	}
}

func TestDecimationKeepsCentresForOddFactors(t *testing.T) {
	// A horizontal ramp blurred and decimated by 3 takes the middle of every three pixels.
	m, _ := New(30, 30, 1)
	for i := range m.Pix {
		m.Pix[i] = float32(i % 30)
	}
	out, err := Decimation{Factor: 3}.Apply(m)
	if err != nil || out.W != 10 || out.H != 10 {
		t.Fatalf("%+v, %v", out, err)
	}
	for x := 2; x < 8; x++ {
		if got := out.At(x, 5, 0); math.Abs(float64(got)-float64(3*x+1)) > 1e-4 {
			t.Errorf("column %d is %v, want %d", x, got, 3*x+1)
		}
	}
}

func TestTilesPartitionTheImage(t *testing.T) {
	for _, c := range [][4]int{{10, 10, 16, 4}, {100, 37, 16, 4}, {17, 16, 16, 4}, {16, 16, 16, 7}, {1, 1, 9, 4}, {33, 200, 24, 0}} {
		w, h, size, overlap := c[0], c[1], c[2], c[3]
		tiles, err := Tiles(w, h, size, overlap)
		if err != nil {
			t.Fatal(err)
		}
		seen := make([]int, w*h)
		for _, l := range tiles {
			if l.W != tiles[0].W || l.H != tiles[0].H || l.X < 0 || l.Y < 0 || l.X+l.W > w || l.Y+l.H > h {
				t.Fatalf("%v: tile %+v", c, l)
			}
			check := func(lo, keep, n, keepN, side int) {
				if (lo > 0 && keep-lo < overlap) || (lo+n < side && lo+n-keep-keepN < overlap) {
					t.Fatalf("%v: tile %+v keeps pixels nearer than %d to its border", c, l, overlap)
				}
			}
			check(l.X, l.KeepX, l.W, l.KeepW, w)
			check(l.Y, l.KeepY, l.H, l.KeepH, h)
			for y := range l.KeepH {
				for x := range l.KeepW {
					seen[(l.KeepY+y)*w+l.KeepX+x]++
				}
			}
		}
		for i, n := range seen {
			if n != 1 {
				t.Fatalf("%v: pixel %d is covered %d times", c, i, n)
			}
		}
	}
}

func TestOrientations(t *testing.T) {
	m := &Image{H: 2, W: 3, C: 1, Pix: []float32{1, 2, 3, 4, 5, 6}}
	for o, want := range [][]float32{
		{1, 2, 3, 4, 5, 6},
		{4, 1, 5, 2, 6, 3},
		{6, 5, 4, 3, 2, 1},
		{3, 6, 2, 5, 1, 4},
		{3, 2, 1, 6, 5, 4},
		{6, 3, 5, 2, 4, 1},
		{4, 5, 6, 1, 2, 3},
		{1, 4, 2, 5, 3, 6},
	} {
		got := m.Orient(o)
		for i := range want {
			if got.Pix[i] != want[i] {
				t.Errorf("orientation %d is %v, want %v", o, got.Pix, want)
				break
			}
		}
	}
}

func TestPicturesOfEveryKindSurviveTheRoundTrip(t *testing.T) {
	r := image.Rect(3, 5, 9, 9) // bounds need not begin at 0
	images := map[string]interface {
		image.Image
		Set(x, y int, c color.Color)
	}{
		"gray": image.NewGray(r), "gray16": image.NewGray16(r), "nrgba": image.NewNRGBA(r), "nrgba64": image.NewNRGBA64(r),
		"rgba": image.NewRGBA(r), "rgba64": image.NewRGBA64(r), "cmyk": image.NewCMYK(r),
		"paletted": image.NewPaletted(r, color.Palette{color.White, color.Black, color.NRGBA{10, 200, 30, 255}}),
	}
	rnd := rand.New(rand.NewPCG(3, 4))
	for name, m := range images {
		for y := r.Min.Y; y < r.Max.Y; y++ {
			for x := r.Min.X; x < r.Max.X; x++ {
				m.Set(x, y, color.NRGBA64{uint16(rnd.Uint32()), uint16(rnd.Uint32()), uint16(rnd.Uint32()), uint16(rnd.Uint32() | 0x8000)})
			}
		}
		p, err := FromImage(m)
		if err != nil {
			t.Fatal(err)
		}
		back, err := p.Image()
		if err != nil {
			t.Fatal(err)
		}
		limit := 1 // 8-bit premultiplied colours lose a little
		if p.Depth == 16 || name == "gray" || name == "nrgba" || name == "paletted" {
			limit = 0
		}
		for y := range r.Dy() {
			for x := range r.Dx() {
				a := color.NRGBA64Model.Convert(m.At(x+r.Min.X, y+r.Min.Y)).(color.NRGBA64)
				b := color.NRGBA64Model.Convert(back.At(x, y)).(color.NRGBA64)
				for _, v := range [][2]uint16{{a.R, b.R}, {a.G, b.G}, {a.B, b.B}, {a.A, b.A}} {
					if d := int(v[0]) - int(v[1]); d > limit*257 || -d > limit*257 {
						t.Fatalf("%s: pixel (%d, %d) is %v, was %v", name, x, y, b, a)
					}
				}
			}
		}
		var buf bytes.Buffer
		if err := png.Encode(&buf, back); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestJPEGIsRGBWithoutAlpha(t *testing.T) {
	m := image.NewRGBA(image.Rect(0, 0, 16, 16))
	for i := range m.Pix {
		m.Pix[i] = 200
		if i%4 == 3 {
			m.Pix[i] = 255
		}
	}
	var buf bytes.Buffer
	if err := jpeg.Encode(&buf, m, nil); err != nil {
		t.Fatal(err)
	}
	img, _, err := image.Decode(&buf)
	if err != nil {
		t.Fatal(err)
	}
	p, err := FromImage(img)
	if err != nil || p.Color.C != 3 || p.Alpha != nil || math.Abs(float64(p.Color.Pix[0])*255-200) > 2 {
		t.Errorf("%+v, %v", p, err)
	}
}

func TestBadImagesAreRefused(t *testing.T) {
	ok := random(t, 4, 4, 1)
	nan := random(t, 4, 4, 1)
	nan.Pix[5] = float32(math.NaN())
	inf := random(t, 4, 4, 3)
	inf.Pix[7] = float32(math.Inf(-1))
	two := random(t, 4, 4, 2)
	drop := func(_ *Image, err error) error { return err }
	for name, err := range map[string]error{
		"nan":             drop(Bicubic(nan, 2, 2, true)),
		"inf":             drop(Decimation{Factor: 2}.Apply(inf)),
		"scale 0":         drop(Bicubic(ok, 0, 1, true)),
		"scale nan":       drop(Bicubic(ok, math.NaN(), 1, true)),
		"scale -2":        drop(Bicubic(ok, -2, 1, true)),
		"scale huge":      drop(Bicubic(ok, 1e12, 1, true)),
		"scale tiny":      drop(Bicubic(ok, 1e-300, 1, true)),
		"both large":      drop(Bicubic(ok, 1e5, 1e5, true)),
		"factor 0":        drop(Decimation{}.Apply(ok)),
		"phase":           drop(Decimation{Factor: 3, Offset: 2}.Apply(ok)),
		"sigma":           drop(Blur(ok, -1, 0)),
		"luma of 2":       drop(Luma(two)),
		"ycbcr of 1":      drop(RGBToYCbCr(ok)),
		"rgb of 1":        drop(YCbCrToRGB(ok)),
		"empty":           drop(New(0, 4, 1)),
		"too large":       drop(New(1<<20, 1<<20, 1)),
		"crop":            drop(ok.Crop(2, 2, 3, 3)),
		"crop overflow":   drop(ok.Crop(1, 0, math.MaxInt, 1)),
		"multiple":        drop(ok.CropToMultiple(5)),
		"shave":           drop(ok.Shave(2)),
		"samples missing": drop(Bicubic(&Image{H: 2, W: 2, C: 1}, 1, 1, true)),
		"nil":             drop(Bicubic(nil, 1, 1, true)),
		"merge":           drop(Merge(ok, inf)),
	} {
		if err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if _, err := FromImage(image.NewGray(image.Rect(0, 0, 0, 3))); err == nil {
		t.Error("empty image.Image: no error")
	}
	if _, err := FromImage(nil); err == nil {
		t.Error("nil image.Image: no error")
	}
	if _, err := Tiles(100, 100, 8, 4); err == nil {
		t.Error("tile no larger than its overlaps: no error")
	}
	if _, err := (&Picture{Color: two}).Image(); err == nil {
		t.Error("picture of two channels: no error")
	}
	if _, err := (&Picture{Color: ok, Alpha: inf}).Image(); err == nil {
		t.Error("alpha of three channels: no error")
	}
}

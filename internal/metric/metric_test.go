package metric

import (
	"math"
	"math/rand/v2"
	"testing"
)

func TestFirstMaximumWins(t *testing.T) {
	nan := float32(math.NaN())
	for _, c := range []struct {
		row  []float32
		want int
	}{{[]float32{1, 3, 3}, 1}, {[]float32{2}, 0}, {[]float32{nan, 1, 0}, 1}, {[]float32{nan}, -1}, {nil, -1}, {[]float32{-5, -4}, 1}} {
		if got := ArgMax(c.row); got != c.want {
			t.Errorf("ArgMax(%v) = %d, want %d", c.row, got, c.want)
		}
	}
	got, err := Accuracy([]float32{1, 1, 0, 2, 5, 4}, 2, []int{0, 1, 1})
	if err != nil || math.Abs(got-2./3) > 1e-15 {
		t.Errorf("accuracy %v, %v; want 2/3", got, err)
	}
	got, err = Agreement([]float32{1, 0, 0, 1}, []float32{3, 0, 2, 1}, 2)
	if err != nil || got != 0.5 {
		t.Errorf("agreement %v, %v; want 0.5", got, err)
	}
}

func TestPSNR(t *testing.T) {
	a, b := []float32{0, 0.5, 1, 0.25}, []float32{0.1, 0.5, 0.9, 0.25}
	got, err := PSNR(a, b, 1)
	if want := 10 * math.Log10(1/0.005); err != nil || math.Abs(got-want) > 1e-5 {
		t.Errorf("PSNR %v, %v; want %v", got, err, want)
	}
	if got, _ := PSNR(a, a, 1); !math.IsInf(got, 1) {
		t.Errorf("PSNR of equal signals is %v, want +Inf", got)
	}
}

// ssimByDefinition sums every window directly.
func ssimByDefinition(a, b []float32, h, w int) float64 {
	var k [11][11]float64
	sum := 0.
	for i := range k {
		for j := range k[i] {
			k[i][j] = math.Exp(-float64((i-5)*(i-5)+(j-5)*(j-5)) / (2 * 1.5 * 1.5))
			sum += k[i][j]
		}
	}
	total, n := 0., 0
	for y := 0; y+11 <= h; y++ {
		for x := 0; x+11 <= w; x++ {
			var ma, mb, va, vb, cov float64
			for pass := range 2 {
				for i := range k {
					for j := range k[i] {
						p, q, g := float64(a[(y+i)*w+x+j]), float64(b[(y+i)*w+x+j]), k[i][j]/sum
						if pass == 0 {
							ma += g * p
							mb += g * q
						} else {
							va += g * (p - ma) * (p - ma)
							vb += g * (q - mb) * (q - mb)
							cov += g * (p - ma) * (q - mb)
						}
					}
				}
			}
			const c1, c2 = 0.0001, 0.0009
			total += (2*ma*mb + c1) * (2*cov + c2) / ((ma*ma + mb*mb + c1) * (va + vb + c2))
			n++
		}
	}
	return total / float64(n)
}

func TestSSIMMatchesItsDefinition(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for _, s := range [][2]int{{11, 11}, {12, 17}, {20, 11}} {
		a, b := make([]float32, s[0]*s[1]), make([]float32, s[0]*s[1])
		for i := range a {
			a[i] = r.Float32()
			b[i] = a[i] + 0.2*r.Float32()
		}
		got, err := SSIM(a, b, s[0], s[1], 1)
		if want := ssimByDefinition(a, b, s[0], s[1]); err != nil || math.Abs(got-want) > 1e-9 {
			t.Errorf("%v: SSIM %v, %v; want %v", s, got, err, want)
		}
		if got, _ := SSIM(a, a, s[0], s[1], 1); math.Abs(got-1) > 1e-12 {
			t.Errorf("%v: SSIM of equal planes is %v, want 1", s, got)
		}
	}
}

func TestSoftmaxKL(t *testing.T) {
	p, q := []float32{0, 0, float32(math.Log(3)), 0}, []float32{0, 0, 0, 0}
	got, err := SoftmaxKL(p, q, 2)
	if want := (0.75*math.Log(1.5) + 0.25*math.Log(0.5)) / 2; err != nil || math.Abs(got-want) > 1e-7 {
		t.Errorf("KL %v, %v; want %v", got, err, want)
	}
	shifted := []float32{1000, 1000, 1000 + float32(math.Log(3)), 1000}
	if got, _ := SoftmaxKL(p, shifted, 2); math.Abs(got) > 1e-8 {
		t.Errorf("KL of logits that differ by a constant is %v, want 0", got)
	}
}

func TestKLIsSoftmaxKLOfTheLogarithms(t *testing.T) {
	p := []float64{.7, .2, .1, 0, .25, .25, .25, .25, 1, 0, 0, 0}
	q := []float64{.1, .2, .3, .4, .25, .25, .25, .25, .5, .5, 1e-9, 0}
	logs := func(x []float64) []float64 {
		out := make([]float64, len(x))
		for i, v := range x {
			out[i] = math.Log(max(v, 1e-12))
		}
		return out
	}
	want, err := SoftmaxKL(logs(p), logs(q), 4)
	if err != nil {
		t.Fatal(err)
	}
	got, err := KL(p, q, 4)
	if err != nil || math.Abs(got-want) > 1e-12 {
		t.Errorf("%g, want %g (%v)", got, want, err)
	}
	if same, err := KL(p, p, 4); err != nil || same != 0 {
		t.Errorf("a divergence of %g from itself (%v)", same, err)
	}
	if _, err := KL(p, q[:4], 4); err == nil {
		t.Error("distributions of different lengths: no error")
	}
}

func TestCosine(t *testing.T) {
	for _, c := range []struct {
		a, b []float32
		want float64
	}{
		{[]float32{1, 0}, []float32{0, 2}, 0},
		{[]float32{1, 2}, []float32{2, 4}, 1},
		{[]float32{1, 1}, []float32{-3, -3}, -1},
		{[]float32{0, 0}, []float32{0, 0}, 1},
		{[]float32{0, 0}, []float32{1, 0}, 0},
	} {
		if got, err := Cosine(c.a, c.b); err != nil || math.Abs(got-c.want) > 1e-12 {
			t.Errorf("cosine of %v and %v is %v, %v; want %v", c.a, c.b, got, err, c.want)
		}
	}
}

func TestBadInputIsRefused(t *testing.T) {
	x := make([]float32, 12)
	for name, f := range map[string]func() (float64, error){
		"lengths":      func() (float64, error) { return PSNR(x, x[:3], 1) },
		"empty":        func() (float64, error) { return MSE(nil, nil) },
		"peak":         func() (float64, error) { return PSNR(x, x, 0) },
		"small":        func() (float64, error) { return SSIM(x, x, 3, 4, 1) },
		"classes":      func() (float64, error) { return SoftmaxKL(x, x, 5) },
		"zero classes": func() (float64, error) { return Agreement(x, x, 0) },
		"labels":       func() (float64, error) { return Accuracy(x, 4, []int{1}) },
		"cosine":       func() (float64, error) { return Cosine(x, nil) },
	} {
		if _, err := f(); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

package imaging

import (
	"fmt"
	"math"
)

// Decimation makes a low-resolution image as Shi et al. do for their training pairs (arXiv:1609.05158, sec. 3.2): a
// Gaussian blur, then one pixel in Factor is kept. The blur takes 2·Radius+1 taps along each axis, normalised to sum
// 1, with half-sample symmetric borders.
type Decimation struct {
	Factor int     // r >= 1
	Sigma  float64 // of the Gaussian in pixels; 0: Factor/2 (the paper does not give its value)
	Radius int     // of the kernel in pixels; 0: ⌈3·Sigma⌉
	// Offset moves the kept pixel from Factor/2 (integer division); the phase Factor/2+Offset must lie in
	// [0, Factor). For odd factors offset 0 keeps the centres of both images aligned; for even factors every phase is
	// half a pixel off, and Bicubic is the degradation to take when images must stay aligned.
	Offset int
}

// Apply returns the image of ⌈(n-phase)/Factor⌉ pixels a side.
func (d Decimation) Apply(m *Image) (*Image, error) {
	if err := m.Check(); err != nil {
		return nil, err
	}
	phase := d.Factor/2 + d.Offset
	if d.Factor < 1 || phase < 0 || phase >= d.Factor {
		return nil, fmt.Errorf("imaging: decimation by %d with phase %d; the factor is at least 1 and the phase lies in [0, factor)", d.Factor, phase)
	}
	if m.H <= phase || m.W <= phase {
		return nil, fmt.Errorf("imaging: decimation by %d with phase %d leaves nothing of %d×%d pixels", d.Factor, phase, m.W, m.H)
	}
	sigma := d.Sigma
	if sigma == 0 {
		sigma = float64(d.Factor) / 2
	}
	kernel, err := gaussian(sigma, d.Radius)
	if err != nil {
		return nil, err
	}
	return decimationTaps(m.W, d.Factor, phase, kernel).columns(decimationTaps(m.H, d.Factor, phase, kernel).rows(m)), nil
}

// Blur convolves with a Gaussian of sigma pixels whose kernel reaches radius pixels (0: ⌈3·sigma⌉), with half-sample
// symmetric borders.
func Blur(m *Image, sigma float64, radius int) (*Image, error) {
	if err := m.Check(); err != nil {
		return nil, err
	}
	kernel, err := gaussian(sigma, radius)
	if err != nil {
		return nil, err
	}
	return decimationTaps(m.W, 1, 0, kernel).columns(decimationTaps(m.H, 1, 0, kernel).rows(m)), nil
}

func gaussian(sigma float64, radius int) ([]float64, error) {
	if !(sigma > 0) || sigma > 1000 {
		return nil, fmt.Errorf("imaging: sigma %v of a Gaussian is not in (0, 1000]", sigma)
	}
	if radius == 0 {
		radius = int(math.Ceil(3 * sigma))
	}
	if radius < 1 || radius > 10000 {
		return nil, fmt.Errorf("imaging: radius %d of a Gaussian is not in [1, 10000]", radius)
	}
	kernel := make([]float64, 2*radius+1)
	sum := 0.
	for i := range kernel {
		x := float64(i-radius) / sigma
		kernel[i] = math.Exp(-x * x / 2)
		sum += kernel[i]
	}
	for i := range kernel {
		kernel[i] /= sum
	}
	return kernel, nil
}

// decimationTaps centres the kernel on samples phase, phase+r, …
func decimationTaps(in, r, phase int, kernel []float64) *taps {
	t := &taps{out: (in - phase + r - 1) / r, n: len(kernel)}
	for i := range t.out {
		for j := range kernel {
			t.index = append(t.index, mirror(phase+i*r+j-len(kernel)/2, in))
		}
		t.weight = append(t.weight, kernel...)
	}
	return t
}

package imaging

import "fmt"

// studio is BT.601 with studio swing for samples in [0, 1] (black 16/255, white 235/255), as MATLAB's rgb2ycbcr.
var studio = [3][3]float64{
	{65.481 / 255, 128.553 / 255, 24.966 / 255},
	{-37.797 / 255, -74.203 / 255, 112. / 255},
	{112. / 255, -93.786 / 255, -18.214 / 255},
}

var studioOffset = [3]float64{16. / 255, 128. / 255, 128. / 255}

var studioInverse = invert3(studio)

func invert3(a [3][3]float64) (inv [3][3]float64) {
	det := 0.
	for i := range 3 {
		for j := range 3 {
			// The cyclic minors carry their sign with them.
			c := a[(j+1)%3][(i+1)%3]*a[(j+2)%3][(i+2)%3] - a[(j+1)%3][(i+2)%3]*a[(j+2)%3][(i+1)%3]
			inv[i][j] = c
			if i == 0 {
				det += a[j][0] * c
			}
		}
	}
	for i := range 3 {
		for j := range 3 {
			inv[i][j] /= det
		}
	}
	return inv
}

// Luma returns the luminance Y = (16 + 65.481 R + 128.553 G + 24.966 B)/255 of an RGB image, or of a grey one, where
// R = G = B. Its range is [16/255, 235/255].
func Luma(m *Image) (*Image, error) {
	if err := m.Check(); err != nil {
		return nil, err
	}
	if m.C != 1 && m.C != 3 {
		return nil, fmt.Errorf("imaging: luminance of an image with %d channels; 1 (grey) or 3 (RGB) are possible", m.C)
	}
	out := &Image{H: m.H, W: m.W, C: 1, Pix: make([]float32, m.H*m.W)}
	k := studio[0]
	for i := range out.Pix {
		r, g, b := float64(m.Pix[i*m.C]), float64(m.Pix[i*m.C]), float64(m.Pix[i*m.C])
		if m.C == 3 {
			g, b = float64(m.Pix[i*3+1]), float64(m.Pix[i*3+2])
		}
		out.Pix[i] = float32(studioOffset[0] + k[0]*r + k[1]*g + k[2]*b)
	}
	return out, nil
}

// GreyFromLuma undoes Luma on a grey image.
func GreyFromLuma(y *Image) (*Image, error) {
	if err := y.Check(); err != nil {
		return nil, err
	}
	if y.C != 1 {
		return nil, fmt.Errorf("imaging: a luminance plane has 1 channel, not %d", y.C)
	}
	out := y.Clone()
	for i, v := range out.Pix {
		out.Pix[i] = float32((float64(v)*255 - 16) / 219)
	}
	return out, nil
}

// RGBToYCbCr converts RGB in [0, 1] to BT.601 studio-swing Y, Cb, Cr (divided by 255).
func RGBToYCbCr(m *Image) (*Image, error) {
	if err := m.Check(); err != nil {
		return nil, err
	}
	if m.C != 3 {
		return nil, fmt.Errorf("imaging: YCbCr of an image with %d channels; RGB has 3", m.C)
	}
	out := &Image{H: m.H, W: m.W, C: 3, Pix: make([]float32, len(m.Pix))}
	for i := 0; i < len(m.Pix); i += 3 {
		r, g, b := float64(m.Pix[i]), float64(m.Pix[i+1]), float64(m.Pix[i+2])
		for c := range 3 {
			k := &studio[c]
			out.Pix[i+c] = float32(studioOffset[c] + k[0]*r + k[1]*g + k[2]*b)
		}
	}
	return out, nil
}

// YCbCrToRGB is the inverse of RGBToYCbCr. It does not clamp.
func YCbCrToRGB(m *Image) (*Image, error) {
	if err := m.Check(); err != nil {
		return nil, err
	}
	if m.C != 3 {
		return nil, fmt.Errorf("imaging: RGB of an image with %d channels; YCbCr has 3", m.C)
	}
	out := &Image{H: m.H, W: m.W, C: 3, Pix: make([]float32, len(m.Pix))}
	for i := 0; i < len(m.Pix); i += 3 {
		y := float64(m.Pix[i]) - studioOffset[0]
		cb := float64(m.Pix[i+1]) - studioOffset[1]
		cr := float64(m.Pix[i+2]) - studioOffset[2]
		for c := range 3 {
			k := &studioInverse[c]
			out.Pix[i+c] = float32(k[0]*y + k[1]*cb + k[2]*cr)
		}
	}
	return out, nil
}

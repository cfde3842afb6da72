// Package restore makes degraded images whole: super-resolution with ESPCN and its baselines so far.
//
// A restoration system is more than its network: colour has to be taken apart, transparency carried along, large images
// cut into tiles, training pairs made from photographs, and results measured the way papers do. The networks are
// ordinary nn.Networks; everything around them is here.
package restore

import (
	"context"
	"fmt"
	"image"

	"github.com/lathe-ml/lathe/data/imaging"
	"github.com/lathe-ml/lathe/internal/metric"
)

// Restorer turns an image into a better one: images in, images out.
type Restorer interface {
	// Restore returns a new image; img stays as it is. It stops early with ctx's error when ctx ends.
	Restore(ctx context.Context, img image.Image) (image.Image, error)
}

// Degradation makes the low-resolution image that a high-resolution one is to be recovered from. Training and
// evaluation must use the same one.
type Degradation interface {
	// Degrade shrinks both sides by an integer factor r >= 1.
	Degrade(hr *imaging.Image, r int) (*imaging.Image, error)
	// String names the degradation and its parameters, for recipes and model files.
	String() string
}

// BlurDecimate is the degradation of Shi et al. (arXiv:1609.05158, sec. 3.2): a Gaussian blur, then one pixel in r is
// kept. The paper does not give its deviation.
type BlurDecimate struct {
	Sigma float64 // in high-resolution pixels; 0: r/2
}

// Degrade blurs and decimates with phase r/2. For odd r the centres of both images coincide; for even r the result is
// half a high-resolution pixel off, so that bicubic upscaling cannot match it: prefer BicubicShrink there.
func (d BlurDecimate) Degrade(hr *imaging.Image, r int) (*imaging.Image, error) {
	return imaging.Decimation{Factor: r, Sigma: d.Sigma}.Apply(hr)
}

// String returns "blur" or "blur(σ)".
func (d BlurDecimate) String() string {
	if d.Sigma == 0 {
		return "blur"
	}
	return fmt.Sprintf("blur(%g)", d.Sigma)
}

// BicubicShrink is MATLAB's antialiased bicubic reduction, the usual degradation of the super-resolution literature and
// close to what cameras and web sites do when they shrink a picture.
type BicubicShrink struct{}

// Degrade shrinks by 1/r.
func (BicubicShrink) Degrade(hr *imaging.Image, r int) (*imaging.Image, error) {
	if r < 1 {
		return nil, fmt.Errorf("restore: factor %d; at least 1 is needed", r)
	}
	return imaging.Bicubic(hr, 1/float64(r), 1/float64(r), true)
}

// String returns "bicubic".
func (BicubicShrink) String() string { return "bicubic" }

// Fidelity says how close an image is to its reference.
type Fidelity struct {
	PSNR float64 `json:"psnr"` // decibels, peak 1, on luminance in floating point (not rounded to 8 bits); +Inf when equal
	SSIM float64 `json:"ssim"` // 11×11 window, σ 1.5, on luminance; 1 when equal
}

// Compare measures got against the reference on the BT.601 luminance of both, without the outermost border pixels.
// Images of one channel are compared as they are: luminance planes and grey images alike. It refuses images of
// different sizes, and images that leave less than the 11×11 pixels of the SSIM window.
func Compare(got, reference *imaging.Image, border int) (Fidelity, error) {
	if err := got.Check(); err != nil {
		return Fidelity{}, err
	}
	if err := reference.Check(); err != nil {
		return Fidelity{}, fmt.Errorf("reference: %w", err)
	}
	if got.H != reference.H || got.W != reference.W {
		return Fidelity{}, fmt.Errorf("restore: an image of %d×%d pixels cannot be compared with a reference of %d×%d", got.W, got.H, reference.W, reference.H)
	}
	planes := make([]*imaging.Image, 2)
	for i, m := range []*imaging.Image{got, reference} {
		var err error
		if got.C != 1 || reference.C != 1 {
			if m, err = imaging.Luma(m); err != nil {
				return Fidelity{}, err
			}
		}
		if planes[i], err = m.Shave(border); err != nil {
			return Fidelity{}, err
		}
	}
	a, b := planes[0], planes[1]
	psnr, err := metric.PSNR(a.Pix, b.Pix, 1)
	if err != nil {
		return Fidelity{}, err
	}
	ssim, err := metric.SSIM(a.Pix, b.Pix, a.H, a.W, 1)
	if err != nil {
		return Fidelity{}, err
	}
	return Fidelity{psnr, ssim}, nil
}

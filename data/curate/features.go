package curate

import (
	"context"
	"fmt"
	"image"
	"math"
	"runtime"
	"sync"

	"golang.org/x/image/draw"
	"gonum.org/v1/gonum/floats"
	"gonum.org/v1/gonum/mat"
)

// featureSide is the side in pixels to which ImageFeatures shrinks a picture.
const featureSide = 12

// ImageFeatures embeds n pictures without labels and without a network: every picture is shrunk to 12×12 RGB pixels,
// the mean picture is subtracted, and the first dims principal components are kept (0: 64; fewer when there are fewer
// pictures). Such features know layout and colour, not content: enough to find duplicates, oddities and dense groups of
// look-alikes. The embeddings of a network that was trained without labels rank better.
//
// at returns picture i; it is called from several goroutines. Rows of the result [n, dims] are not normalised.
func ImageFeatures(ctx context.Context, n, dims int, at func(i int) (image.Image, error)) (*mat.Dense, error) {
	if n < 1 {
		return nil, fmt.Errorf("curate: no pictures; at least one is needed")
	}
	const d = featureSide * featureSide * 3
	x := mat.NewDense(n, d, nil)
	next := make(chan int)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), n) {
		wg.Go(func() {
			small := image.NewRGBA(image.Rect(0, 0, featureSide, featureSide))
			for i := range next {
				img, err := at(i)
				if err == nil && (img == nil || img.Bounds().Empty()) {
					err = fmt.Errorf("curate: picture %d is empty", i)
				}
				if err != nil {
					cancel(err)
					continue
				}
				// the kernel widens when it shrinks, so that every pixel counts; Src over black ignores transparency
				draw.BiLinear.Scale(small, small.Bounds(), img, img.Bounds(), draw.Src, nil)
				row := x.RawRowView(i)
				for p := range featureSide * featureSide {
					for c := range 3 {
						row[3*p+c] = float64(small.Pix[4*p+c]) / 255
					}
				}
			}
		})
	}
feed:
	for i := range n {
		select {
		case next <- i:
		case <-ctx.Done():
			break feed
		}
	}
	close(next)
	wg.Wait()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if dims <= 0 {
		dims = 64
	}
	return principal(x, dims)
}

// principal projects the rows of x, less their mean, on the first dims principal axes. The sign of an axis is that of
// its largest entry.
func principal(x *mat.Dense, dims int) (*mat.Dense, error) {
	n, d := x.Dims()
	mean := make([]float64, d)
	for i := range n {
		floats.Add(mean, x.RawRowView(i))
	}
	floats.Scale(1/float64(n), mean)
	c := mat.DenseCopyOf(x)
	for i := range n {
		floats.Sub(c.RawRowView(i), mean)
	}
	var cov mat.SymDense
	cov.SymOuterK(1/float64(n), c.T())
	var eig mat.EigenSym
	if !eig.Factorize(&cov, true) {
		return nil, fmt.Errorf("curate: the principal axes of %d pictures did not converge", n)
	}
	var axes mat.Dense
	eig.VectorsTo(&axes) // ascending eigenvalues
	dims = min(dims, d, max(1, n-1))
	basis := mat.NewDense(d, dims, nil)
	for j := range dims {
		v := mat.Col(nil, d-1-j, &axes)
		largest := 0
		for i := range v {
			if math.Abs(v[i]) > math.Abs(v[largest])+1e-12 {
				largest = i
			}
		}
		if v[largest] < 0 {
			floats.Scale(-1, v)
		}
		basis.SetCol(j, v)
	}
	var out mat.Dense
	out.Mul(c, basis)
	return &out, nil
}

package quant

import (
	"context"
	"math"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/internal/rng"
)

// largeDigits are the handwritten digits, 8×8, drawn at 28×28 by bilinear interpolation, so that they fit networks of
// Fashion-MNIST: n to train on, drawn by the seed, and all others to test on.
func largeDigits(ctx context.Context, n int, seed uint64) (train, test *data.Images, err error) {
	small, err := data.Digits(ctx)
	if err != nil {
		return nil, nil, err
	}
	const side = 28
	m := &data.Images{N: small.N, H: side, W: side, C: 1, Labels: small.Labels, ClassNames: small.ClassNames, Pixels: make([]uint8, small.N*side*side)}
	// the pixel of a side and the share of the one after it at every place
	var at [side]int
	var share [side]float64
	for i := range side {
		p := min(max((float64(i)+.5)*float64(small.H)/side-.5, 0), float64(small.H-1))
		at[i] = min(int(p), small.H-2)
		share[i] = p - float64(at[i])
	}
	for k := range small.N {
		x, y := small.At(k), m.Pixels[k*side*side:]
		for r := range side {
			for c := range side {
				row := func(r int) float64 {
					v := x[r*small.W+at[c]:]
					return float64(v[0]) + share[c]*(float64(v[1])-float64(v[0]))
				}
				v := row(at[r]) + share[r]*(row(at[r]+1)-row(at[r]))
				y[r*side+c] = uint8(math.Round(v * 255 / 16))
			}
		}
	}
	order := rng.New(seed, "digits").Perm(m.N)
	if train, err = m.Subset(order[:n]); err != nil {
		return nil, nil, err
	}
	test, err = m.Subset(order[n:])
	return train, test, err
}

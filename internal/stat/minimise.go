package stat

// GoldenSection narrows the place of the minimum of a unimodal function on [a, b] by 0.618 per step, and returns the middle of
// what is left.
func GoldenSection(f func(float64) float64, a, b float64, steps int) float64 {
	const g = 0.6180339887498949
	x, y := b-g*(b-a), a+g*(b-a)
	fx, fy := f(x), f(y)
	for range steps {
		if fx <= fy {
			b, y, fy = y, x, fx
			x = b - g*(b-a)
			fx = f(x)
		} else {
			a, x, fx = x, y, fy
			y = a + g*(b-a)
			fy = f(y)
		}
	}
	return (a + b) / 2
}

package imaging

import "fmt"

// Tile is one part of an image. A filter is run on the Size rectangle at (X, Y); of its result the inner rectangle,
// KeepW×KeepH pixels at (KeepX, KeepY) in the whole image, is kept.
type Tile struct {
	X, Y, W, H                 int
	KeepX, KeepY, KeepW, KeepH int
}

// Tiles covers w×h pixels with tiles of size×size (less where the image itself is smaller), all of one shape, whose
// kept parts partition the image. A kept pixel is at least overlap pixels away from those borders of its tile that
// are not borders of the image: a filter whose receptive field reaches overlap pixels gives the same result on tiles
// as on the whole.
func Tiles(w, h, size, overlap int) ([]Tile, error) {
	if w < 1 || h < 1 {
		return nil, fmt.Errorf("imaging: no tiles of an image of %d×%d pixels", w, h)
	}
	if overlap < 0 || size < 1 || (size <= 2*overlap && (w > size || h > size)) {
		return nil, fmt.Errorf("imaging: tiles of %d pixels with an overlap of %d on either side; the size must exceed %d", size, overlap, 2*overlap)
	}
	xs, ys := spans(w, size, overlap), spans(h, size, overlap)
	if len(xs)*len(ys) > 1<<22 {
		return nil, fmt.Errorf("imaging: %d tiles of %d pixels for %d×%d; take larger tiles", len(xs)*len(ys), size, w, h)
	}
	out := make([]Tile, 0, len(xs)*len(ys))
	for _, y := range ys {
		for _, x := range xs {
			out = append(out, Tile{X: x.at, Y: y.at, W: x.n, H: y.n, KeepX: x.keep, KeepY: y.keep, KeepW: x.keepN, KeepH: y.keepN})
		}
	}
	return out, nil
}

type span struct{ at, n, keep, keepN int }

func spans(n, size, overlap int) (out []span) {
	if n <= size {
		return []span{{0, n, 0, n}}
	}
	for from := 0; from < n; {
		at := min(max(from-overlap, 0), n-size)
		to := at + size - overlap
		if at == n-size {
			to = n
		}
		out = append(out, span{at, size, from, to - from})
		from = to
	}
	return out
}

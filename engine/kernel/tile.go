package kernel

import "unsafe"

// maxTileRows is the largest number of rows of C that a tile kernel computes at once.
const maxTileRows = 8

// tiles are the micro-kernels of one level: f[h][r] computes r rows (1 to mr) of nr/2 (h = 0) or nr (h = 1) columns.
type tiles struct {
	mr, nr int
	// masked kernels read B only where there are columns, so B need not be packed to be padded.
	masked bool
	f      [2][maxTileRows + 1]func(*tileArgs)
}

// run is a stretch of the contraction along which A's elements lie at a constant stride.
type run struct{ off, n int }

// tileArgs says to a tile kernel: for all rows r and columns j < cols,
//
//	C[r][j] (+)= sum over runs and over i < run.n of rows[r][run.off + i*aks] * B[k][j]
//
// where k counts on through all runs and B[k] lies k*bks bytes after b. The assembly knows the offsets of the fields.
type tileArgs struct {
	rows [maxTileRows]*float32
	runs *run
	n    int // runs; destroyed
	aks  int // elements
	b    *float32
	bks  int // bytes
	c    *float32
	ldc  int // bytes
	acc  int // 1 adds to C, 0 replaces it
	cols int
}

func twinTiles() tiles {
	t := tiles{mr: 4, nr: 8, masked: true}
	for r := 1; r <= t.mr; r++ {
		t.f[0][r] = func(a *tileArgs) { tileTwin(a, r) }
		t.f[1][r] = t.f[0][r]
	}
	return t
}

// tileTwin defines the tile kernels.
func tileTwin(a *tileArgs, rows int) {
	var sum [4][8]float32
	b := unsafe.Pointer(a.b)
	for _, q := range unsafe.Slice(a.runs, a.n) {
		at := q.off
		for range q.n {
			bk := unsafe.Slice((*float32)(b), a.cols)
			for r := range rows {
				x := *(*float32)(unsafe.Add(unsafe.Pointer(a.rows[r]), at*4))
				for j, y := range bk {
					sum[r][j] += x * y
				}
			}
			at += a.aks
			b = unsafe.Add(b, a.bks)
		}
	}
	for r := range rows {
		c := unsafe.Slice((*float32)(unsafe.Add(unsafe.Pointer(a.c), r*a.ldc)), a.cols)
		for j := range c {
			if a.acc != 0 {
				c[j] += sum[r][j]
			} else {
				c[j] = sum[r][j]
			}
		}
	}
}

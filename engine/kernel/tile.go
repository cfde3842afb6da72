package kernel

import "unsafe"

// maxTileRows and maxTileVectors are the largest tile of C, in rows and vectors, that a tile kernel computes at once.
const (
	maxTileRows    = 8
	maxTileVectors = 3
)

// tiles are the micro-kernels of one level.
type tiles struct {
	mr    int // rows
	lanes int // elements of a vector
	nv    int // vectors of a panel
	ar    int // elements from one k to the next in a packed tile of A
	// masked kernels read B only where there are columns, so a table may name columns that are not all there.
	masked bool
	packed tileTable
	table  tileTable
}

// tileTable has in [v][r] the kernel of r rows (1 to mr) and v vectors (1 to nv).
type tileTable [maxTileVectors + 1][maxTileRows + 1]func(*tileArgs)

// run is a stretch of the contraction along which A's elements lie at a constant stride.
type run struct{ off, n int }

// tileArgs says to a tile kernel: for all rows r and columns j < cols,
//
//	c[cRows[r] + j] (+)= sum over runs and over i < run.n of a[rows[r] + run.off + i*aks] * B[k][j]
//
// where k counts on through all runs. With packed B, B[k] lies k*bks bytes after b, whole vectors of it. With a table,
// the first vector of B[k] lies table[k] elements after b, and each other one next elements after the one before. The
// assembly knows the offsets of the fields.
type tileArgs struct {
	a     *float32
	rows  *int32
	c     *float32
	cRows *int32
	runs  *run
	n     int // runs; counted down
	aks   int // elements
	b     *float32
	bks   int // bytes
	table *int32
	next  [maxTileVectors - 1]int // elements
	acc   int                     // 1 adds to C, 0 replaces it
	cols  int
	done  int     // 0; the kernel's progress through runs, in bytes
	ahead uintptr // packed B: memory to fetch for later products, one line for each k, ...
	pace  int     // ... so many bytes apart
	long  int     // packed B: 1 if the panel may lie in the second cache, so that its rows are fetched before their use
}

func twinTiles() tiles {
	t := tiles{mr: 4, lanes: 4, nv: 2, ar: 4, masked: true}
	for v := 1; v <= t.nv; v++ {
		for r := 1; r <= t.mr; r++ {
			t.packed[v][r] = func(a *tileArgs) { tileTwin(a, r, false) }
			t.table[v][r] = func(a *tileArgs) { tileTwin(a, r, true) }
		}
	}
	return t
}

// tileTwin defines the tile kernels.
func tileTwin(a *tileArgs, rows int, table bool) {
	const lanes = 4
	var sum [4][2 * lanes]float32
	aRows, cRows := unsafe.Slice(a.rows, rows), unsafe.Slice(a.cRows, rows)
	k := 0
	for _, q := range unsafe.Slice(a.runs, a.n) {
		at := q.off
		for range q.n {
			var b [2]unsafe.Pointer // the vectors of B's row
			if table {
				t := *(*int32)(unsafe.Add(unsafe.Pointer(a.table), k*4))
				b[0] = unsafe.Add(unsafe.Pointer(a.b), int(t)*4)
			} else {
				b[0] = unsafe.Add(unsafe.Pointer(a.b), k*a.bks)
			}
			switch { // a narrow panel has one vector
			case a.cols <= lanes:
			case table:
				b[1] = unsafe.Add(b[0], a.next[0]*4)
			default:
				b[1] = unsafe.Add(b[0], lanes*4)
			}
			for r := range rows {
				x := *(*float32)(unsafe.Add(unsafe.Pointer(a.a), (int(aRows[r])+at)*4))
				for j := range a.cols {
					sum[r][j] += x * *(*float32)(unsafe.Add(b[j/lanes], j%lanes*4))
				}
			}
			at += a.aks
			k++
		}
	}
	for r := range rows {
		c := unsafe.Slice((*float32)(unsafe.Add(unsafe.Pointer(a.c), int(cRows[r])*4)), a.cols)
		for j := range c {
			if a.acc != 0 {
				c[j] += sum[r][j]
			} else {
				c[j] = sum[r][j]
			}
		}
	}
}

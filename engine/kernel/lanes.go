package kernel

// Lanes is a planned batch of products whose batch axis, the lanes, is contiguous in both operands and in the result:
// C[m,n,l] = sum over k of A[m,k,l] * B[n,k,l]. Depthwise convolutions and their gradients are such products: the lanes
// are their channels. It computes whole lanes at once, where a Gemm would compute products of very few elements. A Lanes
// holds the state of its run, so it must not run twice at once.
type Lanes struct {
	set          *Set
	a, b         Operand
	lanes        int
	cRows, cCols []int32
	perPiece     int

	av, bv, cv []float32
}

// NewLanes plans the product. Batch tables of the operands are not used; C[m,n] begins at cRows[m] + cCols[n].
func NewLanes(set *Set, a, b Operand, lanes int, cRows, cCols []int32) *Lanes {
	work := len(b.Rows) * len(a.K) * lanes
	return &Lanes{set: set, a: a, b: b, lanes: lanes, cRows: cRows, cCols: cCols, perPiece: max(1, (1<<15)/max(1, work))}
}

// Run computes c from a and b, which begin where the tables' offset 0 points.
func (g *Lanes) Run(pool *Pool, a, b, c []float32) {
	g.av, g.bv, g.cv = a, b, c
	pool.Run((len(g.a.Rows)+g.perPiece-1)/g.perPiece, (*lanesJob)(g))
	g.av, g.bv, g.cv = nil, nil, nil
}

type lanesJob Lanes

// Do computes some rows.
func (g *lanesJob) Do(_, i int) {
	k := len(g.a.K)
	for m := i * g.perPiece; m < min(len(g.a.Rows), (i+1)*g.perPiece); m++ {
		for n := range g.b.Rows {
			dst := g.cv[int(g.cRows[m])+int(g.cCols[n]):][:g.lanes]
			if k == 0 {
				clear(dst)
			}
			for k0 := 0; k0 < k; k0 += kBlock {
				k1 := min(k, k0+kBlock)
				g.set.dotLanes(dst, g.av[g.a.Rows[m]:], g.bv[g.b.Rows[n]:], g.a.K[k0:k1], g.b.K[k0:k1], min(k0, 1))
			}
		}
	}
}

// dotLanesTwin defines dotLanes: dst[l] (+)= sum over k of a[aK[k]+l] * b[bK[k]+l].
func dotLanesTwin(dst, a, b []float32, aK, bK []int32, add int) {
	for l := range dst {
		s := float32(0)
		for k := range aK {
			s += a[int(aK[k])+l] * b[int(bK[k])+l]
		}
		if add != 0 {
			s += dst[l]
		}
		dst[l] = s
	}
}

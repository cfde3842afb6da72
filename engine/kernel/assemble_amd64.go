//go:build !race

package kernel

// assemble puts the assembly kernels of the set's level over the twins.
func assemble(s *Set) {
	switch s.Level {
	case AVX2:
		s.Unary[Neg] = negAVX2
		s.Unary[Abs] = absAVX2
		s.Unary[Sqrt] = sqrtAVX2
		s.Unary[Rsqrt] = rsqrtAVX2
		s.Unary[Exp] = expAVX2
		s.Unary[Log] = logAVX2
		s.Unary[Tanh] = tanhAVX2
		s.Unary[Logistic] = logisticAVX2
		s.Unary[Erf] = erfAVX2
		s.Unary[Sign] = signAVX2
		s.Unary[Floor] = floorAVX2
		s.Unary[Ceil] = ceilAVX2
		s.Unary[Round] = roundAVX2
		s.Unary[Not] = notAVX2
		s.Unary[IsNaN] = isNaNAVX2
		s.Unary[IsFinite] = isFiniteAVX2
		s.Unary[Square] = squareAVX2
		s.Binary[Add] = addAVX2
		s.Binary[Sub] = subAVX2
		s.Binary[Mul] = mulAVX2
		s.Binary[Div] = divAVX2
		s.Binary[Max] = maxAVX2
		s.Binary[Min] = minAVX2
		s.Binary[Eq] = eqAVX2
		s.Binary[Ne] = neAVX2
		s.Binary[Lt] = ltAVX2
		s.Binary[Le] = leAVX2
		s.Binary[Gt] = gtAVX2
		s.Binary[Ge] = geAVX2
		s.Select, s.MulAdd = selectAVX2, mulAddAVX2
		s.Adam = assembledAdam(adamAVX2)
		s.SumRows, s.MaxRows, s.FillRows = sumRowsAVX2, maxRowsAVX2, fillRowsAVX2
		s.SumCols, s.dotLanes = sumColsAVX2, dotLanesAVX2
		s.packEight, s.copyPanels = packEightAVX2, copyPanelsAVX2
		s.peak, s.peakFlops = peakAVX2, 14*8*2
		s.tile = tiles{mr: 6, lanes: 8, nv: 2, ar: 8, masked: false, packed: tileTable{
			{},
			{nil, tilePacked1x8AVX2, tilePacked2x8AVX2, tilePacked3x8AVX2, tilePacked4x8AVX2, tilePacked5x8AVX2, tilePacked6x8AVX2},
			{nil, tilePacked1x16AVX2, tilePacked2x16AVX2, tilePacked3x16AVX2, tilePacked4x16AVX2, tilePacked5x16AVX2, tilePacked6x16AVX2},
		}, table: tileTable{
			{},
			{nil, tileTable1x8AVX2, tileTable2x8AVX2, tileTable3x8AVX2, tileTable4x8AVX2, tileTable5x8AVX2, tileTable6x8AVX2},
			{nil, tileTable1x16AVX2, tileTable2x16AVX2, tileTable3x16AVX2, tileTable4x16AVX2, tileTable5x16AVX2, tileTable6x16AVX2},
		}}
	case AVX512:
		s.Unary[Neg] = negAVX512
		s.Unary[Abs] = absAVX512
		s.Unary[Sqrt] = sqrtAVX512
		s.Unary[Rsqrt] = rsqrtAVX512
		s.Unary[Exp] = expAVX512
		s.Unary[Log] = logAVX512
		s.Unary[Tanh] = tanhAVX512
		s.Unary[Logistic] = logisticAVX512
		s.Unary[Erf] = erfAVX512
		s.Unary[Sign] = signAVX512
		s.Unary[Floor] = floorAVX512
		s.Unary[Ceil] = ceilAVX512
		s.Unary[Round] = roundAVX512
		s.Unary[Not] = notAVX512
		s.Unary[IsNaN] = isNaNAVX512
		s.Unary[IsFinite] = isFiniteAVX512
		s.Unary[Square] = squareAVX512
		s.Binary[Add] = addAVX512
		s.Binary[Sub] = subAVX512
		s.Binary[Mul] = mulAVX512
		s.Binary[Div] = divAVX512
		s.Binary[Max] = maxAVX512
		s.Binary[Min] = minAVX512
		s.Binary[Eq] = eqAVX512
		s.Binary[Ne] = neAVX512
		s.Binary[Lt] = ltAVX512
		s.Binary[Le] = leAVX512
		s.Binary[Gt] = gtAVX512
		s.Binary[Ge] = geAVX512
		s.Select, s.MulAdd = selectAVX512, mulAddAVX512
		s.Adam = assembledAdam(adamAVX512)
		s.SumRows, s.MaxRows, s.FillRows = sumRowsAVX512, maxRowsAVX512, fillRowsAVX512
		s.SumCols, s.dotLanes = sumColsAVX512, dotLanesAVX512
		s.packEight, s.copyPanels = packEightAVX2, copyPanelsAVX2
		s.peak, s.peakFlops = peakAVX512, 30*16*2
		s.tile = tiles{mr: 8, lanes: 16, nv: 3, ar: 8, masked: true, packed: tileTable{
			{},
			{nil, tilePacked1x16AVX512, tilePacked2x16AVX512, tilePacked3x16AVX512, tilePacked4x16AVX512, tilePacked5x16AVX512, tilePacked6x16AVX512, tilePacked7x16AVX512, tilePacked8x16AVX512},
			{nil, tilePacked1x32AVX512, tilePacked2x32AVX512, tilePacked3x32AVX512, tilePacked4x32AVX512, tilePacked5x32AVX512, tilePacked6x32AVX512, tilePacked7x32AVX512, tilePacked8x32AVX512},
			{nil, tilePacked1x48AVX512, tilePacked2x48AVX512, tilePacked3x48AVX512, tilePacked4x48AVX512, tilePacked5x48AVX512, tilePacked6x48AVX512, tilePacked7x48AVX512, tilePacked8x48AVX512},
		}, table: tileTable{
			{},
			{nil, tileTable1x16AVX512, tileTable2x16AVX512, tileTable3x16AVX512, tileTable4x16AVX512, tileTable5x16AVX512, tileTable6x16AVX512, tileTable7x16AVX512, tileTable8x16AVX512},
			{nil, tileTable1x32AVX512, tileTable2x32AVX512, tileTable3x32AVX512, tileTable4x32AVX512, tileTable5x32AVX512, tileTable6x32AVX512, tileTable7x32AVX512, tileTable8x32AVX512},
			{nil, tileTable1x48AVX512, tileTable2x48AVX512, tileTable3x48AVX512, tileTable4x48AVX512, tileTable5x48AVX512, tileTable6x48AVX512, tileTable7x48AVX512, tileTable8x48AVX512},
		}}
	}
}

// assembledAdam makes an Adam of an assembly kernel.
func assembledAdam(f func(w2, m2, v2, w, m, v, g, c *float32, n int, decay bool)) func(w2, m2, v2, w, m, v, g []float32, c *Adam) {
	return func(w2, m2, v2, w, m, v, g []float32, c *Adam) {
		n := len(w2)
		if n == 0 {
			return
		}
		_, _, _, _, _, _ = m2[n-1], v2[n-1], w[n-1], m[n-1], v[n-1], g[n-1]
		f(&w2[0], &m2[0], &v2[0], &w[0], &m[0], &v[0], &g[0], &c.Beta1, n, c.Decayed)
	}
}

package kernel

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// levels returns the kernels of all levels of this processor above the twins.
func levels() (all []*Set) {
	top, _ := hardware()
	for l := AVX2; l <= top; l++ {
		all = append(all, For(l))
	}
	return all
}

var (
	nan32 = float32(math.NaN())
	inf32 = float32(math.Inf(1))
)

// special are numbers at the edges of float32 and of the functions' ranges.
var special = []float32{
	0, float32(math.Copysign(0, -1)), 1, -1, 0.5, -0.5, 1.5, 2.5, -2.5, inf32, -inf32, nan32, math.MaxFloat32, -math.MaxFloat32,
	math.SmallestNonzeroFloat32, -math.SmallestNonzeroFloat32, 0x1p-126, 0x1p-130, 88, 88.7, 88.8, 89, -87, -88, -95, -103, -104, -110,
	1e-4, 4e-4, -3e-4, 9, -9, 8, 3.9, 4, 4.1, -4.1, 1e-8, 1e-20, 1e20, 8388609, -8388609.5, 1 << 24, 0.70710678, 0.7071067,
}

// vector returns n numbers, some of them special, inside a longer slice whose ends the caller can check.
func vector(r *rand.Rand, n int) []float32 {
	v := make([]float32, n)
	for i := range v {
		switch r.IntN(4) {
		case 0:
			v[i] = special[r.IntN(len(special))]
		case 1:
			v[i] = float32(r.NormFloat64() * math.Exp(r.NormFloat64()*8))
		default:
			v[i] = float32(r.NormFloat64() * 3)
		}
	}
	return v
}

// near says whether two results agree within a relative error, or an absolute one as small.
func near(got, want float32, rel float64) bool {
	if got == want || got != got && want != want {
		return true
	}
	g, w := float64(got), float64(want)
	return math.Abs(g-w) <= rel*math.Max(math.Abs(w), 0x1p-126)
}

var unaryNames = map[UnaryOp]string{
	Neg: "neg", Abs: "abs", Sqrt: "sqrt", Rsqrt: "rsqrt", Exp: "exp", Log: "log", Tanh: "tanh", Logistic: "logistic", Erf: "erf",
	Sign: "sign", Floor: "floor", Ceil: "ceil", Round: "round", Not: "not", IsNaN: "isnan", IsFinite: "isfinite", Square: "square",
}

// unaryError is the relative error allowed; the others are exact.
var unaryError = map[UnaryOp]float64{Rsqrt: 3e-7, Exp: 3e-7, Log: 3e-7, Tanh: 1e-6, Logistic: 4e-7, Erf: 1e-6}

const canary = 12345

// guarded returns a slice of length n between canaries, and a check of them.
func guarded(n int) ([]float32, func() bool) {
	b := make([]float32, n+64)
	for i := range b {
		b[i] = canary
	}
	return b[32 : 32+n : 32+n], func() bool {
		return !slices.ContainsFunc(slices.Concat(b[:32], b[32+n:]), func(x float32) bool { return x != canary })
	}
}

var lengths = []int{0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 1000, 1024}

func TestUnaryMatchesTwin(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	twin := For(Generic)
	for _, s := range levels() {
		for op, name := range unaryNames {
			for _, n := range lengths {
				x := vector(r, n)
				want := make([]float32, n)
				twin.Unary[op](want, x)
				got, ok := guarded(n)
				s.Unary[op](got, x)
				for i := range got {
					// subnormal results of division and exp are not required
					if !near(got[i], want[i], unaryError[op]) && !(math.Abs(float64(want[i])) < 0x1p-126 && math.Abs(float64(got[i]-want[i])) < 0x1p-126) {
						t.Fatalf("%s %s n=%d: f(%g) = %g, want %g", s.Level, name, n, x[i], got[i], want[i])
					}
				}
				if !ok() {
					t.Fatalf("%s %s n=%d writes outside its slice", s.Level, name, n)
				}
			}
		}
	}
}

func TestBinaryMatchesTwin(t *testing.T) {
	r := rand.New(rand.NewPCG(2, 1))
	twin := For(Generic)
	for _, s := range levels() {
		for op := range numBinary {
			for _, n := range lengths {
				a, b := vector(r, n), vector(r, n)
				for i := range a {
					if r.IntN(4) == 0 {
						b[i] = a[i]
					}
				}
				want := make([]float32, n)
				twin.Binary[op](want, a, b)
				got, ok := guarded(n)
				s.Binary[op](got, a, b)
				for i := range got {
					if !near(got[i], want[i], 0) {
						t.Fatalf("%s binary %d n=%d: f(%g, %g) = %g, want %g", s.Level, op, n, a[i], b[i], got[i], want[i])
					}
				}
				if !ok() {
					t.Fatalf("%s binary %d n=%d writes outside its slice", s.Level, op, n)
				}
				s.Binary[op](a, a, b) // in place
				for i := range a {
					if !near(a[i], want[i], 0) {
						t.Fatalf("%s binary %d n=%d in place: %g, want %g", s.Level, op, n, a[i], want[i])
					}
				}
			}
		}
	}
}

func TestSelectAndMulAddMatchTwin(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 1))
	twin := For(Generic)
	for _, s := range levels() {
		for _, n := range lengths {
			a, b, c := vector(r, n), vector(r, n), vector(r, n)
			want, got := make([]float32, n), make([]float32, n)
			twin.Select(want, a, b, c)
			s.Select(got, a, b, c)
			for i := range got {
				if !near(got[i], want[i], 0) {
					t.Fatalf("%s select n=%d: %g, want %g", s.Level, n, got[i], want[i])
				}
			}
			for i := range a {
				a[i], b[i], c[i] = float32(r.NormFloat64()), float32(r.NormFloat64()), float32(r.NormFloat64())
			}
			s.MulAdd(got, a, b, c)
			for i := range got {
				if w := float64(a[i])*float64(b[i]) + float64(c[i]); math.Abs(float64(got[i])-w) > 1e-6 {
					t.Fatalf("%s muladd n=%d: %g, want %g", s.Level, n, got[i], w)
				}
			}
		}
	}
}

func TestAdamMatchesTwin(t *testing.T) {
	r := rand.New(rand.NewPCG(9, 1))
	for _, s := range levels() {
		for _, n := range lengths {
			for _, decayed := range []bool{false, true} {
				c := Adam{0.9, 0.1, 0.999, 0.001, 0.19, 0.002, 1e-8, 0.01, 0.05, decayed}
				in := make([][]float32, 4)
				for k := range in {
					in[k] = make([]float32, n)
					for i := range in[k] {
						in[k][i] = float32(r.NormFloat64())
					}
				}
				for i := range n {
					in[2][i] *= in[2][i] // the second moment
					if r.IntN(20) == 0 {
						in[r.IntN(4)][i] = []float32{nan32, inf32, -inf32, 0, 1e30}[r.IntN(5)]
					}
				}
				var want, got [3][]float32
				var ok [3]func() bool
				for k := range got {
					want[k] = make([]float32, n)
					got[k], ok[k] = guarded(n)
				}
				adamTwin(want[0], want[1], want[2], in[0], in[1], in[2], in[3], &c)
				s.Adam(got[0], got[1], got[2], in[0], in[1], in[2], in[3], &c)
				s.Adam(in[0], in[1], in[2], in[0], in[1], in[2], in[3], &c) // in place
				for k := range got {
					for i := range got[k] {
						if !near(got[k][i], want[k][i], 1e-5) && math.Abs(float64(got[k][i]-want[k][i])) > 1e-6 {
							t.Fatalf("%s adam n=%d decay=%v: result %d is %g, want %g", s.Level, n, decayed, k, got[k][i], want[k][i])
						}
						if !near(in[k][i], got[k][i], 0) {
							t.Fatalf("%s adam n=%d decay=%v: in place, result %d is %g, want %g", s.Level, n, decayed, k, in[k][i], got[k][i])
						}
					}
					if !ok[k]() {
						t.Fatalf("%s adam n=%d writes outside its slice", s.Level, n)
					}
				}
			}
		}
	}
}

func TestRowsMatchTwin(t *testing.T) {
	r := rand.New(rand.NewPCG(4, 1))
	twin := For(Generic)
	for _, s := range levels() {
		for _, cols := range lengths[1:] {
			for _, n := range []int{0, 1, 3, 4, 5, 11} {
				x := make([]float32, n*cols)
				for i := range x {
					x[i] = float32(r.NormFloat64())
				}
				want := make([]float32, n)
				check := func(what string, got []float32, ok func() bool) {
					t.Helper()
					for i := range got {
						if !near(got[i], want[i], 0) && math.Abs(float64(got[i]-want[i])) > 1e-5*float64(cols) {
							t.Fatalf("%s %s cols=%d: %g, want %g", s.Level, what, cols, got[i], want[i])
						}
					}
					if !ok() {
						t.Fatalf("%s %s cols=%d writes outside its slice", s.Level, what, cols)
					}
				}
				got, ok := guarded(n)
				twin.SumRows(want, x, cols)
				s.SumRows(got, x, cols)
				check("sum", got, ok)
				if n > 0 {
					x[r.IntN(len(x))] = []float32{nan32, inf32, -inf32}[r.IntN(3)]
				}
				twin.MaxRows(want, x, cols)
				s.MaxRows(got, x, cols)
				check("max", got, ok)
				for i := range x {
					x[i] = float32(r.NormFloat64())
				}
				{
					want := make([]float32, cols)
					got, ok := guarded(cols)
					for i := range got {
						got[i], want[i] = float32(i), float32(i)
					}
					twin.SumCols(want, x)
					s.SumCols(got, x)
					for i := range got {
						if math.Abs(float64(got[i]-want[i])) > 1e-5*float64(n+cols) {
							t.Fatalf("%s sum of columns, cols=%d rows=%d: %g, want %g", s.Level, cols, n, got[i], want[i])
						}
					}
					if !ok() {
						t.Fatalf("%s sum of columns writes outside its slice", s.Level)
					}
				}
				full, ok := guarded(n * cols)
				s.FillRows(full, want, cols)
				for i, v := range full {
					if !near(v, want[i/cols], 0) {
						t.Fatalf("%s fill cols=%d: element %d is %g, want %g", s.Level, cols, i, v, want[i/cols])
					}
				}
				if !ok() {
					t.Fatalf("%s fill cols=%d writes outside its slice", s.Level, cols)
				}
			}
		}
	}
}

// table returns n offsets: regular ones, or in runs, or scattered.
func table(r *rand.Rand, n, stride int) []int32 {
	t := make([]int32, n)
	for i := range t {
		t[i] = int32(i * stride)
	}
	return t
}

func TestGemmMatchesDoubleLoop(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 1))
	pools := []*Pool{NewPool(1), NewPool(3)}
	defer pools[0].Close()
	defer pools[1].Close()
	dims := []int{1, 2, 5, 6, 7, 8, 9, 13, 16, 17, 24, 31, 32, 33, 48, 64, 70, 100}
	ks := []int{1, 2, 3, 9, 16, 27, 64, 144, 255, 256, 257, 300, 600}
	for _, s := range append(levels(), For(Generic)) {
		for trial := range 600 {
			m, n, k := dims[r.IntN(len(dims))], dims[r.IntN(len(dims))], ks[r.IntN(len(ks))]
			batches := 1
			if trial%3 == 0 {
				batches = 1 + r.IntN(5)
			}
			if trial%10 == 9 {
				m, n = 200+r.IntN(100), dims[r.IntN(len(dims))]
			}
			// A and B with their axes in any order, perhaps padded, k perhaps in runs
			operand := func(rows int) (Operand, int) {
				o := Operand{}
				switch r.IntN(5) {
				case 0: // rows outside
					ld := k + r.IntN(3)
					o.Rows, o.K, o.Batch = table(r, rows, ld), table(r, k, 1), table(r, batches, rows*ld)
				case 1: // k outside
					ld := rows + r.IntN(3)
					o.Rows, o.K, o.Batch = table(r, rows, 1), table(r, k, ld), table(r, batches, k*ld)
				case 2: // batch inside
					o.Rows, o.K, o.Batch = table(r, rows, k*batches), table(r, k, batches), table(r, batches, 1)
				case 3: // k outside, rows in stretches
					w := 1 + r.IntN(40)
					o.Rows = make([]int32, rows)
					for i := range o.Rows {
						o.Rows[i] = int32(i/w*100 + i%w)
					}
					ld := (rows/w + 1) * 100
					o.K, o.Batch = table(r, k, ld), table(r, batches, k*ld)
				default: // windows: overlapping rows, k in runs
					w := 1 + r.IntN(12)
					o.K = make([]int32, k)
					for i := range o.K {
						o.K[i] = int32(i/w*50 + i%w)
					}
					o.Rows, o.Batch = table(r, rows, 3), table(r, batches, 7)
				}
				return o, int(o.Rows[rows-1]+o.K[k-1]+o.Batch[batches-1]) + 1
			}
			a, la := operand(m)
			b, lb := operand(n)
			av, bv := make([]float32, la), make([]float32, lb)
			for i := range av {
				av[i] = float32(r.NormFloat64())
			}
			for i := range bv {
				bv[i] = float32(r.NormFloat64())
			}
			ldc := n + r.IntN(2)*3
			cb := table(r, batches, m*ldc+5)
			var first []float32
			for _, p := range pools {
				c, ok := guarded(int(cb[batches-1]) + (m-1)*ldc + n)
				g := NewGemm(s, a, b, cb, table(r, m, ldc))
				ws := NewWorkspace(p.Threads())
				ws.Grow(g)
				switch {
				case trial%5 == 4 && g.Packable():
					g.UsePacked()
					packed, ok := guarded(g.PackedSize())
					g.Pack(p, bv, packed)
					if !ok() {
						t.Fatalf("%s %dx%dx%d packs outside its slice", s.Level, m, n, k)
					}
					ws.Grow(g)
					g.RunPacked(p, ws, av, packed, c, false)
				case trial%5 == 3: // adding to zeros
					for _, o := range cb {
						for i := range m {
							clear(c[int(o)+i*ldc:][:n])
						}
					}
					g.Run(p, ws, av, bv, c, true)
				default:
					g.Run(p, ws, av, bv, c, false)
				}
				if !ok() {
					t.Fatalf("%s %dx%dx%d batches %d writes outside C", s.Level, m, n, k, batches)
				}
				if first == nil {
					first = slices.Clone(c)
				} else if !slices.Equal(first, c) {
					t.Fatalf("%s %dx%dx%d batches %d: the result depends on the number of workers", s.Level, m, n, k, batches)
				}
			}
			set := make([]bool, len(first))
			for bi := range batches {
				for i := range m {
					for j := range n {
						var want float64
						for x := range k {
							want += float64(av[a.Batch[bi]+a.Rows[i]+a.K[x]]) * float64(bv[b.Batch[bi]+b.Rows[j]+b.K[x]])
						}
						at := int(cb[bi]) + i*ldc + j
						set[at] = true
						if got := float64(first[at]); !(math.Abs(got-want) <= 1e-5*math.Sqrt(float64(k))*8) {
							t.Fatalf("%s %dx%dx%d batches %d: c[%d,%d,%d] = %g, want %g", s.Level, m, n, k, batches, bi, i, j, got, want)
						}
					}
				}
			}
			for i, x := range first {
				if !set[i] && x != canary {
					t.Fatalf("%s %dx%dx%d: element %d between the rows of C was written", s.Level, m, n, k, i)
				}
			}
		}
	}
}

func TestLanesMatchTwin(t *testing.T) {
	r := rand.New(rand.NewPCG(6, 1))
	p := NewPool(2)
	defer p.Close()
	for _, s := range levels() {
		for _, lanes := range lengths[1:] {
			m, n, k := 1+r.IntN(20), 1+r.IntN(3), []int{1, 9, 25, 256, 300}[r.IntN(5)]
			a := Operand{Rows: table(r, m, 2*lanes), K: table(r, k, lanes)}
			b := Operand{Rows: table(r, n, lanes), K: table(r, k, n*lanes)}
			av, bv := make([]float32, (2*m+k)*lanes), make([]float32, n*k*lanes)
			for i := range av {
				av[i] = float32(r.NormFloat64())
			}
			for i := range bv {
				bv[i] = float32(r.NormFloat64())
			}
			want, ok := guarded(m * n * lanes)
			got, ok2 := guarded(m * n * lanes)
			rows, cols := table(r, m, n*lanes), table(r, n, lanes)
			NewLanes(For(Generic), a, b, lanes, rows, cols).Run(p, av, bv, want)
			NewLanes(s, a, b, lanes, rows, cols).Run(p, av, bv, got)
			for i := range got {
				if math.Abs(float64(got[i]-want[i])) > 1e-5*math.Sqrt(float64(k)) {
					t.Fatalf("%s lanes=%d %dx%dx%d: element %d is %g, want %g", s.Level, lanes, m, n, k, i, got[i], want[i])
				}
			}
			if !ok() || !ok2() {
				t.Fatalf("%s lanes=%d writes outside C", s.Level, lanes)
			}
		}
	}
}

type countJob struct{ did []int32 }

func (c *countJob) Do(_, i int) { c.did[i]++ }

func TestPoolDoesEveryPieceOnce(t *testing.T) {
	for _, threads := range []int{1, 2, 5} {
		p := NewPool(threads)
		for n := range 200 {
			j := &countJob{make([]int32, n)}
			p.Run(n, j)
			for i, d := range j.did {
				if d != 1 {
					t.Fatalf("%d threads: piece %d of %d was done %d times", threads, i, n, d)
				}
			}
		}
		p.Close()
	}
}

type panicJob struct{}

func (panicJob) Do(_, i int) {
	if i == 7 {
		panic("seven")
	}
}

func TestPoolPassesPanicsOn(t *testing.T) {
	for _, threads := range []int{1, 4} {
		p := NewPool(threads)
		for range 20 {
			func() {
				defer func() {
					if r := recover(); r != "seven" {
						t.Fatalf("%d threads: recovered %v, want the piece's panic", threads, r)
					}
				}()
				p.Run(100, panicJob{})
			}()
		}
		p.Close()
	}
}

// TestErf goes through a 251st of all numbers: the error is small against the value, and the table's values are not beyond 1.
func TestErf(t *testing.T) {
	const n = 1 << 12
	x, y := make([]float32, n), make([]float32, n)
	for _, s := range levels() {
		for b := uint64(0); b < 1<<32; b += 251 * n {
			for i := range x {
				x[i] = math.Float32frombits(uint32(b) + uint32(251*i))
			}
			s.Unary[Erf](y, x)
			for i, got := range y {
				want := math.Erf(float64(x[i]))
				if math.Abs(want) < 0x1p-120 || want != want {
					if want != want && got == got {
						t.Fatalf("%v: erf(%g) = %g", s.Level, x[i], got)
					}
					continue
				}
				if e := math.Abs(float64(got)/want - 1); !(e <= 4e-7) || s.Level == AVX512 && (e > 2e-7 || got > 1 || got < -1) {
					t.Fatalf("%v: erf(%g) = %.9g, want %.9g, error %.2g", s.Level, x[i], got, want, e)
				}
			}
		}
	}
}

func TestDetectNamesALevel(t *testing.T) {
	l, why := Detect()
	if why == "" || For(l).Level != l {
		t.Fatalf("level %v, reason %q", l, why)
	}
}

func BenchmarkUnary(b *testing.B) {
	x, d := make([]float32, 1024), make([]float32, 1024)
	for i := range x {
		x[i] = float32(i%17) * 0.3
	}
	for _, s := range levels() {
		for op, name := range unaryNames {
			b.Run(fmt.Sprint(name, "/", s.Level), func(b *testing.B) {
				b.SetBytes(8 * 1024)
				for b.Loop() {
					s.Unary[op](d, x)
				}
			})
		}
	}
}

func BenchmarkGemm(b *testing.B) {
	p := NewPool(1)
	defer p.Close()
	for _, s := range levels() {
		for _, q := range []struct{ m, n, k, batches, at, bt int }{
			{2176, 64, 64, 1, 0, 0},
			{64, 64, 2176, 1, 1, 0},
			{2176, 128, 64, 1, 0, 0},
			{2176, 64, 128, 1, 0, 1},
			{17, 17, 16, 512, 0, 1},
			{256, 256, 256, 1, 0, 0},
			{1024, 1024, 1024, 1, 0, 0},
			{128, 1024, 1024, 1, 0, 0},
			{2048, 384, 384, 1, 0, 0},
		} {
			b.Run(fmt.Sprintf("%dx%dx%dx%d,%d%d/%s", q.batches, q.m, q.n, q.k, q.at, q.bt, s.Level), func(b *testing.B) {
				op := func(rows, t int) Operand {
					if t == 1 {
						return Operand{table(nil, q.batches, rows*q.k), table(nil, rows, 1), table(nil, q.k, rows)}
					}
					return Operand{table(nil, q.batches, rows*q.k), table(nil, rows, q.k), table(nil, q.k, 1)}
				}
				g := NewGemm(s, op(q.m, q.at), op(q.n, 1-q.bt), table(nil, q.batches, q.m*q.n), table(nil, q.m, q.n))
				ws := NewWorkspace(1)
				ws.Grow(g)
				av, bv, cv := make([]float32, q.batches*q.m*q.k), make([]float32, q.batches*q.n*q.k), make([]float32, q.batches*q.m*q.n)
				shareOfPeak(b, s, g.Flops(), func() { g.Run(p, ws, av, bv, cv, false) })
			})
		}
	}
}

// shareOfPeak reports what a run of so many operations reaches, and the median share of what multiply-adds of registers reach
// just before and after it: the processor's clock changes from moment to moment.
func shareOfPeak(b *testing.B, s *Set, flops float64, run func()) {
	repeat := max(1, int(2e8/flops))
	peak := func() float64 {
		const n = 1 << 16
		begin := time.Now()
		s.peak(n)
		return n * float64(s.peakFlops) / time.Since(begin).Seconds()
	}
	var speeds, shares []float64
	run()
	for b.Loop() {
		before := peak()
		begin := time.Now()
		for range repeat {
			run()
		}
		speed := float64(repeat) * flops / time.Since(begin).Seconds()
		speeds, shares = append(speeds, speed), append(shares, 2*speed/(before+peak()))
	}
	slices.Sort(speeds)
	slices.Sort(shares)
	b.ReportMetric(speeds[len(speeds)/2]/1e9, "GF/s")
	b.ReportMetric(100*shares[len(shares)/2], "%peak")
}

// BenchmarkTile measures the micro-kernels with operands in the first cache.
func BenchmarkTile(b *testing.B) {
	for _, s := range levels() {
		b.Run(s.Level.String(), func(b *testing.B) {
			flops, run := tileRun(s)
			shareOfPeak(b, s, flops, run)
		})
	}
}

func TestMeasurementsArePositive(t *testing.T) {
	if f := PeakFMA(Best()); !(f > 0) {
		t.Errorf("peak %g", f)
	}
	if f := PeakTile(Best()); !(f > 0) {
		t.Errorf("peak of tiles %g", f)
	}
	if b := ReadBandwidth(Best(), 1<<20); !(b > 0) {
		t.Errorf("bandwidth %g", b)
	}
}

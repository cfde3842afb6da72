package zoo

import (
	"cmp"
	"fmt"
	"math"

	"github.com/lathe-ml/lathe/nn"
)

// Plan says how the residual branches of one layer of a transformer are normalised. The zero value normalises nothing.
//
//	Pre:   x + F(N(x))            Post: N(x + F(x))
//	Pre and Out (sandwich): x + N'(F(N(x)))
type Plan struct {
	Pre  bool // a norm in front of the branch
	Post bool // a norm after the sum
	Out  bool // a norm of the branch's output, in front of the sum
	// Scale multiplies the output of the norm in front of the branch, Branch that of the branch itself, Skip the stream
	// in the sum; 0: 1.
	Scale, Branch, Skip float64
	// Learned, if not 0, multiplies the branch by a learned scalar that starts there.
	Learned float64
	// Gain multiplies the initial standard deviation of the branch's last matrix (attention output, feed-forward
	// output), Inner that of the value and of the other feed-forward matrices; 0: 1.
	Gain, Inner float64
	// Xavier draws the branch's matrices with the standard deviation √(2/(in+out)), times the gains, whatever the
	// network's own is (Glorot, Bengio, 2010).
	Xavier bool
}

// std is the initial standard deviation of a branch's matrix.
func (p Plan) std(own float64, in, out int, gain float64) float64 {
	if own < 0 { // weights from a file
		return own
	}
	if p.Xavier {
		own = math.Sqrt(2 / float64(in+out))
	}
	return own * cmp.Or(gain, 1)
}

// Scheme says how layer l (from 1) of L is normalised.
type Scheme interface {
	Plan(l, L int) Plan
}

// PreNorm and PostNorm are the two classical schemes: the norm in front of every branch (arXiv:2002.04745), and after
// every sum (arXiv:1706.03762).
type (
	PreNorm  struct{}
	PostNorm struct{}
)

// Plan is the same for all layers.
func (PreNorm) Plan(int, int) Plan { return Plan{Pre: true} }

// Plan is the same for all layers.
func (PostNorm) Plan(int, int) Plan { return Plan{Post: true} }

// Residual adds one residual sub-layer around a branch: the only place where a norm meets a residual. n is the number of
// the sub-layer within its layer and names the nodes: "norm1" (the norm of the plan: in front of the branch, or after the
// sum), "out1" (a sandwich's second norm), "res1" (the sum), and "scale1", "branch1", "skip1" and "gain1" for factors. It returns
// the new stream.
func Residual(b *nn.Builder, p Plan, norm nn.Norm, n int, x string, branch func(x string) string) string {
	name := func(s string) string { return fmt.Sprintf("%s%d", s, n) }
	times := func(s, x string, f float64) string {
		if f == 0 || f == 1 {
			return x
		}
		return b.Add(name(s), nn.Affine{Scale: f}, x)
	}
	switch {
	case p.Pre && p.Post:
		b.Fail(fmt.Errorf("zoo: residual %d: a plan has its norm in front of the branch or after the sum, not both", n))
		return x
	case math.IsNaN(p.Scale + p.Branch + p.Skip + p.Learned + p.Gain + p.Inner):
		b.Fail(fmt.Errorf("zoo: residual %d: a factor of the plan is not a number", n))
		return x
	}
	h := x
	if p.Pre {
		h = times("scale", b.Add(name("norm"), norm, h), p.Scale)
	}
	h = times("branch", branch(h), p.Branch)
	if p.Learned != 0 {
		gain := b.Add(name("gain"), nn.Value{Shape: f32(1), Init: nn.Fill(float32(p.Learned)), Role: nn.Gain})
		h = b.Add(name("gained"), nn.Mul, h, gain)
	}
	if p.Out {
		h = b.Add(name("out"), norm, h)
	}
	x = b.Add(name("res"), nn.Add, times("skip", x, p.Skip), h)
	if p.Post {
		x = b.Add(name("norm"), norm, x)
	}
	return x
}

package norm

import (
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/lathe-ml/lathe/nn/zoo"
)

// Where the norms of a transformer stand, by layer. Each scheme is a zoo.Scheme for zoo.Decoder and zoo.ViT.
type (
	// Pre is the norm in front of every branch: x + F(N(x)).
	Pre = zoo.PreNorm
	// Post is the norm after every sum: N(x + F(x)).
	Post = zoo.PostNorm

	// MixLN is Post in the first ⌊Alpha·L⌋ layers and Pre in the others (Li, Yin, Liu, arXiv:2412.13795, eq. 8), so that
	// gradients are about equally large in all layers. Alpha 0 is Pre, 1 is Post; DefaultAlpha is the paper's.
	MixLN struct{ Alpha float64 }

	// PrePost is the reverse order: Pre in the first K layers, Post in the others. The paper's ablation; it does worse.
	PrePost struct{ K int }

	// Sandwich is a norm in front of the branch and another on its output: x + N'(F(N(x))) (arXiv:2105.13290).
	Sandwich struct{}

	// DeepNorm is Post with the stream multiplied by (2L)^¼ in every sum, and the matrices of the values, the outputs and
	// the feed-forward parts drawn Xavier-normal with gain (8L)^−¼ (arXiv:2203.00555, encoder or decoder only).
	DeepNorm struct{}

	// LayerNormScaling is Pre with the output of both norms of layer l multiplied by 1/√l (Sun et al., arXiv:2502.05795,
	// eq. 6), which bounds the growth of the stream's variance with depth. It has no parameter and needs no tuning. Do not
	// combine it with ScaledInit: both shrink the same branches.
	LayerNormScaling struct {
		AfterBranch bool // the factor stands after the branch instead of after the norm (reported to suit ViT better)
		Const       bool // 1/√L in every layer: the ablation
		ScaledInit  bool // with ScaledInit's initial values, against the advice
	}

	// ScaledInit is Pre with the last matrix of every branch drawn with 1/√(2L) of the standard deviation (GPT-2).
	ScaledInit struct{}

	// ScaledResidual is Pre with a learned scalar on every branch that starts at Start.
	ScaledResidual struct{ Start float64 }
)

// DefaultAlpha is the share of Post layers that the paper of MixLN found best.
const DefaultAlpha = .25

// PostLayers is how many of L layers are normalised after the sum: ⌊Alpha·L⌋.
func (m MixLN) PostLayers(layers int) int { return int(math.Floor(m.Alpha*float64(layers) + 1e-9)) }

// Plan is Post up to layer PostLayers, then Pre.
func (m MixLN) Plan(l, layers int) zoo.Plan {
	if l <= m.PostLayers(layers) {
		return zoo.Plan{Post: true}
	}
	return zoo.Plan{Pre: true}
}

// Plan is Pre up to layer K, then Post.
func (p PrePost) Plan(l, _ int) zoo.Plan {
	if l <= p.K {
		return zoo.Plan{Pre: true}
	}
	return zoo.Plan{Post: true}
}

// Plan is the same for all layers.
func (Sandwich) Plan(int, int) zoo.Plan { return zoo.Plan{Pre: true, Out: true} }

// Plan depends on the depth alone.
func (DeepNorm) Plan(_, layers int) zoo.Plan {
	gain := math.Pow(8*float64(layers), -.25)
	return zoo.Plan{Post: true, Skip: math.Pow(2*float64(layers), .25), Gain: gain, Inner: gain, Xavier: true}
}

// Factor is what layer l of so many multiplies by.
func (s LayerNormScaling) Factor(l, layers int) float64 {
	if s.Const {
		l = layers
	}
	return 1 / math.Sqrt(float64(l))
}

// Plan multiplies by Factor.
func (s LayerNormScaling) Plan(l, layers int) zoo.Plan {
	p := zoo.Plan{Pre: true}
	if s.ScaledInit {
		p = ScaledInit{}.Plan(l, layers)
	}
	if s.AfterBranch {
		p.Branch = s.Factor(l, layers)
	} else {
		p.Scale = s.Factor(l, layers)
	}
	return p
}

// Plan depends on the depth alone.
func (ScaledInit) Plan(_, layers int) zoo.Plan {
	return zoo.Plan{Pre: true, Gain: 1 / math.Sqrt(2*float64(layers))}
}

// Plan is the same for all layers.
func (s ScaledResidual) Plan(int, int) zoo.Plan { return zoo.Plan{Pre: true, Learned: s.Start} }

// schemes are what NewScheme knows: the name, its argument ("" none), and what it is.
var schemes = []struct {
	name, arg, what string
	make            func(arg string) (zoo.Scheme, error)
}{
	{"pre", "", "the norm in front of every branch", plainScheme(Pre{})},
	{"post", "", "the norm after every sum", plainScheme(Post{})},
	{"mix", "ALPHA", "post in the first ALPHA (0.25) of the layers, pre in the others", func(arg string) (zoo.Scheme, error) {
		a, err := strconv.ParseFloat(orDefault(arg, "0.25"), 64)
		if err != nil || !(a >= 0 && a <= 1) {
			return nil, fmt.Errorf("norm: mix:%s: want a share from 0 to 1", arg)
		}
		return MixLN{a}, nil
	}},
	{"prepost", "K", "pre in the first K (3) layers, post in the others", func(arg string) (zoo.Scheme, error) {
		k, err := strconv.Atoi(orDefault(arg, "3"))
		if err != nil || k < 0 {
			return nil, fmt.Errorf("norm: prepost:%s: want a number of layers", arg)
		}
		return PrePost{k}, nil
	}},
	{"sandwich", "", "norms in front of and behind every branch", plainScheme(Sandwich{})},
	{"deepnorm", "", "post with a scaled stream and smaller initial weights", plainScheme(DeepNorm{})},
	{"lns", "", "pre, the norms of layer l scaled by 1/√l", plainScheme(LayerNormScaling{})},
	{"lns-branch", "", "pre, the branches of layer l scaled by 1/√l", plainScheme(LayerNormScaling{AfterBranch: true})},
	{"scaled-init", "", "pre with output matrices that start smaller by 1/√(2L)", plainScheme(ScaledInit{})},
	{"scaled-residual", "", "pre with a learned scalar on every branch, from 0.001", plainScheme(ScaledResidual{1e-3})},
}

func plainScheme(s zoo.Scheme) func(string) (zoo.Scheme, error) {
	return func(arg string) (zoo.Scheme, error) {
		if arg != "" {
			return nil, fmt.Errorf("norm: this scheme takes no argument, got %q", arg)
		}
		return s, nil
	}
}

func orDefault(s, def string) string {
	if s == "" {
		return def
	}
	return s
}

// SchemeNames lists what NewScheme knows, with arguments: "mix[:ALPHA]".
func SchemeNames() (names []string) {
	for _, s := range schemes {
		if s.arg != "" {
			names = append(names, s.name+"[:"+s.arg+"]")
		} else {
			names = append(names, s.name)
		}
	}
	return names
}

// NewScheme returns a scheme by name, with an argument behind a colon where it takes one: "pre", "mix:0.5".
func NewScheme(name string) (zoo.Scheme, error) {
	head, arg, _ := strings.Cut(name, ":")
	for _, s := range schemes {
		if s.name == head {
			return s.make(arg)
		}
	}
	return nil, fmt.Errorf("norm: there is no scheme %q; use one of %s", name, strings.Join(SchemeNames(), ", "))
}

package norm

import (
	"fmt"
	"math"

	"github.com/lathe-ml/lathe/internal/rng"
)

// eval computes the graph on the host, in float64, with the moments of a training step: x [b, h, w, c], v0 and v1 [c]. It
// is the plain form of GraphNorm's lowering, for what needs an answer in microseconds.
func (l LayerGraph) eval(x []float64, dims [4]int, v0, v1 []float64, groups int, eps float64) []float64 {
	b, h, w, c := dims[0], dims[1], dims[2], dims[3]
	fill := func(f func(i int) float64) []float64 {
		out := make([]float64, len(x))
		for i := range out {
			out[i] = f(i)
		}
		return out
	}
	sign := func(v float64) float64 {
		switch {
		case v > 0:
			return 1
		case v < 0:
			return -1
		}
		return v
	}
	values := [][]float64{x, make([]float64, len(x)), fill(func(i int) float64 { return v0[i%c] }), fill(func(i int) float64 { return v1[i%c] })}
	size := c / groupsOf(groups, c)
	for _, n := range l.Nodes {
		a := values[n.In[0]]
		second := a
		if len(n.In) > 1 {
			second = values[n.In[1]]
		}
		var y []float64
		switch n.Op {
		case "mean", "rms", "std":
			// cell is the number of the set over which the moment of element i is taken.
			var cells int
			var cell func(i int) int
			switch n.I {
			case "bwh":
				cells, cell = c, func(i int) int { return i % c }
			case "wh":
				cells, cell = b*c, func(i int) int { return i/(h*w*c)*c + i%c }
			case "whc":
				cells, cell = b, func(i int) int { return i / (h * w * c) }
			default:
				cells, cell = b*c, func(i int) int { return i/(h*w*c)*c + i%c/size }
			}
			count, mean, m := make([]float64, cells), make([]float64, cells), make([]float64, cells)
			for i, v := range a {
				count[cell(i)]++
				mean[cell(i)] += v
			}
			for k := range mean {
				mean[k] /= count[k]
			}
			for i, v := range a {
				if n.Op == "std" {
					v -= mean[cell(i)]
				}
				m[cell(i)] += v * v
			}
			y = fill(func(i int) float64 {
				if n.Op == "mean" {
					return mean[cell(i)]
				}
				return math.Sqrt(m[cell(i)]/count[cell(i)] + eps)
			})
		default:
			y = fill(func(i int) float64 {
				v, u := a[i], second[i]
				switch n.Op {
				case "add":
					return v + u
				case "mul":
					return v * u
				case "div":
					if u >= 0 {
						return v / (u + eps)
					}
					return v / (u - eps)
				case "max":
					return math.Max(v, u)
				case "neg":
					return -v
				case "sigmoid":
					return 1 / (1 + math.Exp(-v))
				case "tanh":
					return math.Tanh(v)
				case "exp":
					return math.Exp(v)
				case "log":
					return sign(v) * math.Log(math.Abs(v)+eps)
				case "abs":
					return math.Abs(v)
				case "square":
					return v * v
				case "sqrt":
					return sign(v) * math.Sqrt(math.Abs(v)+eps)
				}
				return math.NaN()
			})
		}
		values = append(values, y)
	}
	return values[len(values)-1]
}

// behaviour tells layers apart by what they do to a fixed random map with v0 and v1 at their initial values, up to the
// sign, which the gain takes: layers that begin as the same function have one text, however they are written. ok is false
// when the output is not finite, or is one number per channel, which says nothing about a case.
func (l LayerGraph) behaviour(groups int, eps float64) (text string, ok bool) {
	const b, h, w, c = 3, 3, 3, 4
	r := rng.New(0, "layer behaviour")
	x := make([]float64, b*h*w*c)
	for i := range x {
		x[i] = .2 + 1.3*r.NormFloat64()
	}
	y := l.eval(x, [4]int{b, h, w, c}, make([]float64, c), []float64{1, 1, 1, 1}, groups, eps)
	varies := false
	for i, v := range y {
		if math.IsNaN(v) || math.Abs(v) > 1e8 {
			return "", false
		}
		varies = varies || math.Abs(v-y[i%c]) > 1e-9
	}
	if !varies {
		return "", false
	}
	sign := 1.
	if y[0] < 0 {
		sign = -1
	}
	for i := 0; i < len(y); i += 5 {
		text += fmt.Sprintf("%.3g ", sign*y[i]+0)
	}
	return text, true
}

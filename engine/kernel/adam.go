package kernel

import "math"

// Adam is the constants of one step of AdamW (arXiv:1711.05101, alg. 2).
type Adam struct {
	Beta1, Grad1 float32 // weights of the old first moment and of the gradient
	Beta2, Grad2 float32 // weights of the old second moment and of the gradient's square
	Bias1, Bias2 float32 // divide the moments
	Eps, Rate    float32
	Decay        float32
	Decayed      bool // whether Decay is used
}

// adamTwin defines Set.Adam.
func adamTwin(w2, m2, v2, w, m, v, g []float32, c *Adam) {
	w, m, v, g = w[:len(w2)], m[:len(w2)], v[:len(w2)], g[:len(w2)]
	m2, v2 = m2[:len(w2)], v2[:len(w2)]
	for i, x := range w {
		a := m[i]*c.Beta1 + g[i]*c.Grad1
		b := v[i]*c.Beta2 + g[i]*g[i]*c.Grad2
		d := (a / c.Bias1) / (float32(math.Sqrt(float64(b/c.Bias2))) + c.Eps)
		if c.Decayed {
			d += x * c.Decay
		}
		w2[i], m2[i], v2[i] = x-d*c.Rate, a, b
	}
}

package data

import (
	"fmt"
	"math"
	"slices"

	"gonum.org/v1/gonum/stat/distuv"

	"github.com/lathe-ml/lathe/internal/rng"
)

// Noise spoils values in [0, 1] in place, each on its own. Results are clipped to [0, 1] unless a field says otherwise.
type Noise interface {
	Name() string // "gaussian"
	// Add draws from r. Settings out of range are refused, and nothing is changed.
	Add(r *rng.Rand, x []float32) error
}

// GaussianNoise adds N(0, Sigma²).
type GaussianNoise struct {
	Sigma     float64 // at least 0
	Unclipped bool    // values may leave [0, 1], as the laws of denoisers want it
}

// ShotNoise is that of a sensor counting photons: Poisson(Photons·x)/Photons, of mean x and variance x/Photons.
type ShotNoise struct {
	Photons   float64 // at a value of 1, above 0
	Unclipped bool    // values may exceed 1
}

// ImpulseNoise sets values to 0 or 1, with equal chance ("salt and pepper").
type ImpulseNoise struct {
	Share float64 // of the values, in [0, 1]
}

var _ = []Noise{GaussianNoise{}, ShotNoise{}, ImpulseNoise{}}

// Name is "gaussian".
func (GaussianNoise) Name() string { return "gaussian" }

// Name is "shot".
func (ShotNoise) Name() string { return "shot" }

// Name is "impulse".
func (ImpulseNoise) Name() string { return "impulse" }

// Add adds the noise.
func (n GaussianNoise) Add(r *rng.Rand, x []float32) error {
	if !(n.Sigma >= 0) || math.IsInf(n.Sigma, 0) {
		return fmt.Errorf("data: gaussian noise of deviation %g; want 0 or more", n.Sigma)
	}
	for i, v := range x {
		x[i] = clipped(float64(v)+n.Sigma*r.NormFloat64(), n.Unclipped)
	}
	return nil
}

// Add draws the counts. Values below 0 count as 0.
func (n ShotNoise) Add(r *rng.Rand, x []float32) error {
	if !(n.Photons > 0) || n.Photons > 1e9 {
		return fmt.Errorf("data: shot noise of %g photons; want above 0 and at most 1e9", n.Photons)
	}
	law := distuv.Poisson{Src: r}
	for i, v := range x {
		if law.Lambda = n.Photons * float64(v); law.Lambda > 0 {
			x[i] = clipped(law.Rand()/n.Photons, n.Unclipped)
		} else {
			x[i] = 0
		}
	}
	return nil
}

// Add sets values to 0 or 1.
func (n ImpulseNoise) Add(r *rng.Rand, x []float32) error {
	if !(n.Share >= 0 && n.Share <= 1) {
		return fmt.Errorf("data: impulse noise on a share of %g of the values; want 0 to 1", n.Share)
	}
	for i := range x {
		if r.Float64() < n.Share {
			x[i] = float32(r.IntN(2))
		}
	}
	return nil
}

func clipped(v float64, not bool) float32 {
	if !not {
		v = min(max(v, 0), 1)
	}
	return float32(v)
}

// severities are five levels of each kind of noise, in the manner of the corrupted test sets of Hendrycks and Dietterich
// (arXiv:1903.12261), for grey pictures of 28×28.
var severities = []struct {
	kind   string
	levels [5]Noise
}{
	{"gaussian", [5]Noise{GaussianNoise{Sigma: .08}, GaussianNoise{Sigma: .12}, GaussianNoise{Sigma: .16}, GaussianNoise{Sigma: .18}, GaussianNoise{Sigma: .2}}},
	{"shot", [5]Noise{ShotNoise{Photons: 125}, ShotNoise{Photons: 62}, ShotNoise{Photons: 25}, ShotNoise{Photons: 19}, ShotNoise{Photons: 12}}},
	{"impulse", [5]Noise{ImpulseNoise{.02}, ImpulseNoise{.04}, ImpulseNoise{.06}, ImpulseNoise{.1}, ImpulseNoise{.14}}},
}

// Severities is the number of levels of each kind of noise.
const Severities = 5

// NoiseKinds lists the kinds that have levels: gaussian, shot, impulse.
func NoiseKinds() (kinds []string) {
	for _, s := range severities {
		kinds = append(kinds, s.kind)
	}
	return kinds
}

// NoiseOf is the noise of a kind at a severity from 1, hardly seen, to Severities.
func NoiseOf(kind string, severity int) (Noise, error) {
	for _, s := range severities {
		if s.kind != kind {
			continue
		}
		if severity < 1 || severity > Severities {
			return nil, fmt.Errorf("data: %s noise of severity %d; want 1 to %d", kind, severity, Severities)
		}
		return s.levels[severity-1], nil
	}
	return nil, fmt.Errorf("data: there is no noise %q; accepted: %v", kind, NoiseKinds())
}

// Corrupted returns the pictures with noise added to their values in [0, 1], rounded to the set's steps (1/255, if Max is
// 255). Picture i gets the same noise whatever else is in the set: it depends on seed and i only. Labels are shared.
func (m *Images) Corrupted(n Noise, seed uint64) (*Images, error) {
	if err := m.validate(); err != nil {
		return nil, fmt.Errorf("data: %w", err)
	}
	out := *m
	out.Pixels = slices.Clone(m.Pixels)
	size, top := m.H*m.W*m.C, float32(m.max())
	x := make([]float32, size)
	for i := range m.N {
		x = m.Floats([]int{i}, x)
		if err := n.Add(rng.New(seed, fmt.Sprintf("noise/%s/%d", n.Name(), i)), x); err != nil {
			return nil, err
		}
		for k, v := range x {
			out.Pixels[i*size+k] = uint8(min(max(v, 0), 1)*top + .5)
		}
	}
	return &out, nil
}

package quant

import (
	"context"
	"errors"
	"fmt"
	"math"

	"github.com/gomlx/compute"

	"github.com/lathe-ml/lathe/learn/optim"
)

// ErrNoSignal: all inputs of a site are zero, so its outputs say nothing about its weight.
var ErrNoSignal = errors.New("all inputs of the site are zero")

// CodeSpace is where learned codes may go.
type CodeSpace string

const (
	// EntireSpace lets a code become any other.
	EntireSpace CodeSpace = "entire"
	// UpDownSpace lets a weight choose between the two codes beside it: what AdaRound searches (arXiv:2004.10568).
	UpDownSpace CodeSpace = "up-down"
)

// PowerLearning is how LearnPower learns. The zero value is the paper's way: codes anywhere, and the exponent.
type PowerLearning struct {
	Steps         int       // of Adam on all cases at once; 0: 500, negative: none
	CodeRate      float64   // learning rate of the codes, in codes, falling along a cosine; 0: 1e-3. From 1e-2 on they oscillate
	ExponentRate  float64   // of the exponent; 0: 1e-3
	FixedExponent bool      // the exponent stays what it is
	Space         CodeSpace // "": EntireSpace
	// Polish, if positive, follows with so many sweeps of exact coordinate descent over the codes, column by column, each
	// to the level nearest to the minimum of its parabola. It never makes the error larger. Not in the paper. 10 are enough.
	Polish int
}

func (o PowerLearning) withDefaults() (PowerLearning, error) {
	if o.Steps == 0 {
		o.Steps = 500
	}
	if o.CodeRate == 0 {
		o.CodeRate = 1e-3
	}
	if o.ExponentRate == 0 {
		o.ExponentRate = 1e-3
	}
	if !(o.CodeRate > 0) || !(o.ExponentRate > 0) || math.IsInf(o.CodeRate+o.ExponentRate, 0) {
		return o, fmt.Errorf("quant: learning rates %g of codes and %g of exponents; both must be positive, or 0 for the default", o.CodeRate, o.ExponentRate)
	}
	switch o.Space {
	case "":
		o.Space = EntireSpace
	case EntireSpace, UpDownSpace:
	default:
		return o, fmt.Errorf("quant: code space %q; accepted: %s, %s", o.Space, EntireSpace, UpDownSpace)
	}
	return o, nil
}

// PowerTrace is how learning went.
type PowerTrace struct {
	Start, End float64 // mean squared error of the site's outputs, before and with what is kept
	Kept       int     // steps after which the kept codes stood
	Moved, Far float64 // share of the codes that changed, and of those that changed by more than one
}

// Exponents are kept within these bounds, where the gradient is bounded.
const leastExponent, greatestExponent = .1, 2

// LearnPower learns the codes of a site's weight, and their exponent, so that its outputs come close to those in m
// (arXiv:2308.05600, section 3.3). Latents begin at L·sign(W)(|W|/m)^a, for the weight in m and the exponent of start; the
// maxima stay. Every step is one of Adam on the gradient over all cases, which the moments give exactly (the paper draws
// minibatches), with PowerGradient's surrogates; the codes and the exponent of the least error seen are kept, those of
// start included.
//
// Errors: ErrNoSignal, ErrExponent, ErrBits, options out of range, codes that do not fit the moments.
func LearnPower(ctx context.Context, b compute.Backend, m *Moments, start *PowerCodes, o PowerLearning) (*PowerCodes, PowerTrace, error) {
	var tr PowerTrace
	o, err := o.withDefaults()
	if err != nil {
		return nil, tr, err
	}
	if err := start.Check(); err != nil {
		return nil, tr, err
	}
	rows := len(start.Max)
	if len(start.Codes) != len(m.Weight) || rows == 0 || len(m.Weight)%rows != 0 {
		return nil, tr, fmt.Errorf("quant: nupes: %d codes and %d maxima for a weight of %d rows of %d", len(start.Codes), rows, m.Out, m.In)
	}
	if m.Silent() {
		return nil, tr, fmt.Errorf("quant: nupes: %w", ErrNoSignal)
	}
	d, err := m.Descend(b)
	if err != nil {
		return nil, tr, err
	}
	defer d.Close()
	per := len(m.Weight) / rows
	best := *start
	best.Codes = append([]int16(nil), start.Codes...)
	weight := decodePower(best, nil)
	if tr.Start, _, err = d.At(weight); err != nil {
		return nil, tr, err
	}
	tr.End = tr.Start

	grid := start.PowerGrid
	theta, lo, hi := make([]float64, len(m.Weight)), []float64(nil), []float64(nil)
	for i, w := range m.Weight {
		theta[i] = grid.Latent(float64(w), start.Max[i/per])
		if o.Space == UpDownSpace {
			f := math.Floor(theta[i])
			lo, hi = append(lo, f), append(hi, f+1)
		}
	}
	codes, exponent := newAdam(len(theta), 1, 1e-8), newAdam(1, 1, 1e-8)
	falling := optim.Cosine(max(o.Steps, 1), 0, 0)
	current := best
	current.Codes = append([]int16(nil), best.Codes...)
	a := []float64{grid.Exponent}
	for step := range max(o.Steps, 0) + 1 {
		if err := ctx.Err(); err != nil {
			return nil, tr, err
		}
		t := current.tables()
		for i, v := range theta {
			current.Codes[i] = t.code(v)
		}
		weight = decodePower(current, weight)
		loss, g, err := d.At(weight)
		if err != nil {
			return nil, tr, err
		}
		if loss < tr.End {
			tr.End, tr.Kept, best.PowerGrid = loss, step, current.PowerGrid
			copy(best.Codes, current.Codes)
		}
		if step >= o.Steps {
			break
		}
		rate := falling(step)
		codes.next()
		var da [1]float64
		for i := range theta {
			k := int(current.Codes[i]) - t.least
			gw := float64(g[i]) * start.Max[i/per]
			da[0] += gw * t.exponent[k]
			if theta[i] < float64(t.least)-.5 || theta[i] > float64(t.top)+.5 {
				gw = 0
			}
			codes.move(i, theta[i:i+1], []float64{gw * t.slope[k]}, rate*o.CodeRate)
			if lo != nil {
				theta[i] = min(max(theta[i], lo[i]), hi[i])
			}
		}
		if !o.FixedExponent {
			exponent.next()
			exponent.move(0, a, da[:], rate*o.ExponentRate)
			a[0] = min(max(a[0], leastExponent), greatestExponent)
			current.Exponent = a[0]
		}
	}
	if o.Polish > 0 {
		loss := polishPower(m, &best, o.Polish, lo, hi)
		if loss < tr.End {
			tr.End = loss
		}
	}
	for i, c := range best.Codes {
		if d := c - start.Codes[i]; d != 0 {
			tr.Moved += 1 / float64(len(best.Codes))
			if d > 1 || d < -1 {
				tr.Far += 1 / float64(len(best.Codes))
			}
		}
	}
	return &best, tr, nil
}

// decodePower is Decode in float32, into dst if it has room.
func decodePower(p PowerCodes, dst []float32) []float32 {
	if dst == nil {
		dst = make([]float32, len(p.Codes))
	}
	levels, per := p.Levels(), len(p.Codes)/len(p.Max)
	least := int16(p.least())
	for i, c := range p.Codes {
		dst[i] = float32(p.Max[i/per] * levels[c-least])
	}
	return dst
}

// polishPower sets one column after the other to the levels nearest to the minimum of the error along each weight, all
// other weights being what they are, until nothing changes. It returns the mean squared error.
func polishPower(m *Moments, p *PowerCodes, sweeps int, lo, hi []float64) float64 {
	levels := narrow(p.Levels())
	rows, per := m.Out/m.Groups, len(p.Codes)/len(p.Max)
	w := decodePower(*p, nil)
	pull := make([]float64, m.In) // ΔH − R of a row
	for o := range m.Out {
		h, at, row := m.H[o/rows*m.In*m.In:], o*m.In, w[o*m.In:(o+1)*m.In]
		for j := range pull {
			pull[j] = -float64(m.R[at+j])
			for k, v := range h[j*m.In : (j+1)*m.In] {
				pull[j] += float64(v) * (float64(row[k]) - float64(m.Weight[at+k]))
			}
		}
		top := p.Max[at/per]
		for range sweeps {
			changed := false
			for j := range row {
				power := float64(h[j*m.In+j])
				if power <= 0 || top == 0 {
					continue
				}
				c := int16(int(NearestLevel(levels, []float32{float32((float64(row[j]) - pull[j]/power) / top)})[0]) + p.least())
				if lo != nil {
					c = int16(min(max(float64(c), lo[at+j]), hi[at+j]))
				}
				next := float32(top * p.Level(float64(c)))
				step := float64(next) - float64(row[j])
				if c == p.Codes[at+j] || step*(2*pull[j]+step*power) >= 0 {
					continue
				}
				p.Codes[at+j], row[j], changed = c, next, true
				for k, v := range h[j*m.In : (j+1)*m.In] {
					pull[k] += step * float64(v)
				}
			}
			if !changed {
				break
			}
		}
	}
	return m.Loss(w)
}

package quant

import "fmt"

// FreezingMeter watches discrete weights while they are trained. A network whose weights hardly flip early on is frozen:
// its latents are too far from their thresholds for the steps that are taken. (The paper of DenseShift names such a
// measure without defining it; this is the plain share of weights that changed.)
type FreezingMeter struct {
	last    []float32
	changed []bool
	flips   []float64
	signs   []float64
}

// Record takes a snapshot of the weights, which it copies; all of them have one length.
func (m *FreezingMeter) Record(weights []float32) error {
	if err := checkFinite(weights); err != nil {
		return err
	}
	if m.last == nil {
		m.last, m.changed = append([]float32{}, weights...), make([]bool, len(weights))
		return nil
	}
	if len(weights) != len(m.last) {
		return fmt.Errorf("quant: a record of %d weights after one of %d", len(weights), len(m.last))
	}
	flips, signs := 0, 0
	for i, v := range weights {
		if v != m.last[i] {
			flips++
			m.changed[i] = true
		}
		if sign(v) != sign(m.last[i]) {
			signs++
		}
	}
	n := float64(max(len(weights), 1))
	m.flips, m.signs = append(m.flips, float64(flips)/n), append(m.signs, float64(signs)/n)
	copy(m.last, weights)
	return nil
}

func sign(v float32) int {
	switch {
	case v > 0:
		return 1
	case v < 0:
		return -1
	}
	return 0
}

// FlipRate is the share of weights that changed from each record to the next.
func (m *FreezingMeter) FlipRate() []float64 { return m.flips }

// SignFlipRate is the share of weights whose sign changed, zero being a sign of its own.
func (m *FreezingMeter) SignFlipRate() []float64 { return m.signs }

// FrozenFraction is the share of weights that never changed.
func (m *FreezingMeter) FrozenFraction() float64 {
	frozen := 0
	for _, c := range m.changed {
		if !c {
			frozen++
		}
	}
	return float64(frozen) / float64(max(len(m.changed), 1))
}

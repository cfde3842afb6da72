package lab

import (
	"encoding/json"
	"fmt"
	"math"
	"strings"

	"github.com/lathe-ml/lathe/internal/stat"
)

// MinSeeds is how many seeds a full run needs for its verdicts to count.
const MinSeeds = 3

// Outcome is the verdict on a claim.
type Outcome string

// The verdicts.
const (
	Holds     Outcome = "holds"     // the whole interval satisfies the bound
	Fails     Outcome = "fails"     // none of the interval satisfies it
	Undecided Outcome = "undecided" // part of it does, or it was not measured
)

// Verdict is a claim as measured.
type Verdict struct {
	ID      string  `json:"id"`
	Text    string  `json:"text"`
	Paper   string  `json:"paper,omitempty"`
	Unit    string  `json:"unit,omitempty"`
	Bound   Bound   `json:"bound"`
	Outcome Outcome `json:"verdict"`
	Reason  string  `json:"reason,omitempty"` // why it is undecided or to be taken with care
	Mean    Value   `json:"mean"`             // over the seeds
	Low     Value   `json:"low"`              // 95 % t-interval of the seeds
	High    Value   `json:"high"`             //
	Margin  Value   `json:"margin"`           // of the mean, positive on the satisfying side
	Values  []Value `json:"values"`           // per seed
}

// Judge gives the verdict on a claim whose quantity took these values, one per seed. The bound is compared with the 95 %
// t-interval of the values: the claim holds when the whole interval satisfies the bound, fails when none of it does, and
// is undecided otherwise. Values that are not finite leave it undecided, and so do a smoke run and a single seed.
func Judge(c Claim, scale Scale, seeds []uint64, values []float64) Verdict {
	v := Verdict{ID: c.ID, Text: c.Text, Paper: c.Paper, Unit: c.Unit, Bound: c.Bound, Outcome: Undecided, Mean: NotMeasured, Low: NotMeasured, High: NotMeasured, Margin: NotMeasured}
	var missing []string
	for i, x := range values {
		v.Values = append(v.Values, Value(x))
		if !finite(x) {
			missing = append(missing, fmt.Sprint(seeds[i]))
		}
	}
	if len(values) == 0 {
		v.Reason = "not measured"
		return v
	}
	if len(missing) > 0 {
		v.Reason = "not measured"
		if len(missing) < len(values) {
			v.Reason = "not measured at seed " + strings.Join(missing, ", ")
		}
		return v
	}
	mean, low, high := meanInterval(values)
	v.Mean, v.Low, v.High, v.Margin = Value(mean), Value(low), Value(high), Value(c.Bound.Margin(mean))
	side := "the mean does not satisfy the bound"
	if c.Bound.Holds(mean) {
		side = "the mean satisfies the bound"
	}
	switch {
	case scale == Smoke:
		v.Reason = "smoke scale is not judged; " + side
		return v
	case len(values) == 1:
		v.Reason = "one seed gives no interval; " + side
		return v
	case c.Bound.Holds(low) && c.Bound.Holds(high):
		v.Outcome = Holds
	case !c.Bound.Holds(low) && !c.Bound.Holds(high):
		v.Outcome = Fails
	default:
		v.Reason = side + ", part of the interval is on the other side"
	}
	if len(values) < MinSeeds {
		note := fmt.Sprintf("only %d seeds, %d are needed for a verdict that counts", len(values), MinSeeds)
		if v.Reason != "" {
			note = v.Reason + "; " + note
		}
		v.Reason = note
	}
	return v
}

// meanInterval returns the mean and its two-sided 95 % t-interval; NaN edges for a single value.
func meanInterval(x []float64) (mean, low, high float64) {
	if len(x) == 1 {
		return x[0], math.NaN(), math.NaN()
	}
	return stat.MeanCI(x, 0.95)
}

// Value is a number that may be missing: NaN, written as null in JSON.
type Value float64

// NotMeasured is the missing value.
var NotMeasured = Value(math.NaN())

// MarshalJSON writes null for what is not finite.
func (v Value) MarshalJSON() ([]byte, error) {
	if !finite(float64(v)) {
		return []byte("null"), nil
	}
	return json.Marshal(float64(v))
}

// UnmarshalJSON reads null as NaN.
func (v *Value) UnmarshalJSON(b []byte) error {
	if string(b) == "null" {
		*v = NotMeasured
		return nil
	}
	return json.Unmarshal(b, (*float64)(v))
}

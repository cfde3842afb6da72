package lab

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"

	"github.com/lathe-ml/lathe/internal/atomicfile"
	"github.com/lathe-ml/lathe/internal/stat"
	"github.com/lathe-ml/lathe/lab/store"
)

// ResultFormat is the version of the JSON form of Result.
const ResultFormat = 1

// Result is what a run of an experiment measured and how its claims were judged. Its JSON form is what docs/results keeps.
type Result struct {
	Format      int               `json:"format"`
	Method      string            `json:"method"`
	Title       string            `json:"title"`
	Scale       Scale             `json:"scale"`
	Seeds       []uint64          `json:"seeds"`
	Recipe      json.RawMessage   `json:"recipe,omitempty"`
	Command     []string          `json:"command,omitempty"`
	Date        string            `json:"date"`    // on which the run was started, UTC
	Seconds     float64           `json:"seconds"` // that all arms and seeds took, those found finished included
	Environment store.Environment `json:"environment"`
	Code        string            `json:"code,omitempty"` // identity of the code that measured
	Arms        []ArmResult       `json:"arms"`
	Verdicts    []Verdict         `json:"claims"`
	Run         int64             `json:"-"` // ID in the store; 0: not stored

	units []unit // with curves and pictures
}

// ArmResult is what one arm measured.
type ArmResult struct {
	Name     string         `json:"name"`
	Baseline bool           `json:"baseline,omitempty"`
	Once     bool           `json:"once,omitempty"` // deterministic: one value serves all seeds
	Seconds  float64        `json:"seconds"`        // all seeds together
	Metrics  []MetricResult `json:"metrics"`
}

// MetricResult is one metric of an arm over the seeds.
type MetricResult struct {
	Name   string  `json:"name"`
	Mean   Value   `json:"mean"`
	SD     Value   `json:"sd"` // sample standard deviation; null for one value
	Values []Value `json:"values"`
}

func (m *MetricResult) summarise() {
	x := make([]float64, len(m.Values))
	for i, v := range m.Values {
		x[i] = float64(v)
	}
	m.Mean, m.SD = Value(stat.Mean(x)), Value(stat.StdDev(x))
}

// Count returns how many claims have that verdict.
func (r *Result) Count(o Outcome) (n int) {
	for _, v := range r.Verdicts {
		if v.Outcome == o {
			n++
		}
	}
	return n
}

// Summary says in a line how the claims fared: "4 hold, 1 fails".
func (r *Result) Summary() string {
	return Tally(r.Count(Holds), r.Count(Fails), r.Count(Undecided))
}

// Tally writes counts of verdicts: "4 hold, 1 fails, 2 undecided".
func Tally(holds, fails, undecided int) string {
	s := ""
	add := func(n int, one, many string) {
		if n == 0 {
			return
		}
		if s != "" {
			s += ", "
		}
		if n == 1 {
			many = one
		}
		s += fmt.Sprintf("%d %s", n, many)
	}
	add(holds, "holds", "hold")
	add(fails, "fails", "fail")
	add(undecided, "undecided", "undecided")
	if s == "" {
		return "no claims"
	}
	return s
}

// Save writes the result as JSON to DIR/METHOD.json, atomically. Only full runs of at least MinSeeds seeds in which every
// arm ran are kept as results.
func (r *Result) Save(dir string) (path string, err error) {
	switch {
	case r.Scale != Full:
		return "", fmt.Errorf("results of %s: a %s run is not kept as a result; run it at full scale", r.Method, r.Scale)
	case len(r.Seeds) < MinSeeds:
		return "", fmt.Errorf("results of %s: %d seeds are too few to be kept as a result; run at least %d", r.Method, len(r.Seeds), MinSeeds)
	}
	for _, a := range r.Arms {
		if len(a.Metrics) == 0 {
			return "", fmt.Errorf("results of %s: arm %q measured nothing", r.Method, a.Name)
		}
	}
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return "", fmt.Errorf("results of %s: %w", r.Method, err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("results of %s: %w", r.Method, err)
	}
	path = filepath.Join(dir, r.Method+".json")
	return path, atomicfile.Write(path, func(w io.Writer) error {
		_, err := w.Write(append(compactArrays(b), '\n'))
		return err
	})
}

// ParseResult reads the JSON form of a result.
func ParseResult(b []byte) (*Result, error) {
	var r Result
	if err := json.Unmarshal(b, &r); err != nil {
		return nil, fmt.Errorf("result: %w", err)
	}
	if r.Format != ResultFormat {
		return nil, fmt.Errorf("result: format %d; this lathe reads format %d", r.Format, ResultFormat)
	}
	if !identifier.MatchString(r.Method) {
		return nil, fmt.Errorf("result: method %q is no catalogue id", r.Method)
	}
	for _, v := range r.Verdicts {
		if !slices.Contains([]Outcome{Holds, Fails, Undecided}, v.Outcome) {
			return nil, fmt.Errorf("result: claim %s: unknown verdict %q", v.ID, v.Outcome)
		}
	}
	return &r, nil
}

// compactArrays puts arrays of numbers on one line each, so that a result reads and diffs well.
func compactArrays(b []byte) []byte {
	out := make([]byte, 0, len(b))
	inString := false
	for i := 0; i < len(b); i++ {
		switch c := b[i]; {
		case inString:
			out = append(out, c)
			if c == '\\' {
				i++
				out = append(out, b[i])
			} else if c == '"' {
				inString = false
			}
		case c == '"':
			inString = true
			out = append(out, c)
		case c == '[':
			if end, flat := flatArray(b, i); flat {
				for _, c := range b[i:end] {
					switch c {
					case '\n', ' ':
					case ',':
						out = append(out, ',', ' ')
					default:
						out = append(out, c)
					}
				}
				i = end - 1
				continue
			}
			out = append(out, c)
		default:
			out = append(out, c)
		}
	}
	return out
}

// flatArray reports whether the array that begins at b[i] holds only numbers and nulls, and where it ends.
func flatArray(b []byte, i int) (end int, flat bool) {
	for j := i + 1; j < len(b); j++ {
		switch b[j] {
		case ']':
			return j + 1, true
		case '[', '{', '"':
			return 0, false
		}
	}
	return 0, false
}

// spread returns the mean and the 95 % interval of values, without those that were not measured.
func spread(values []Value) (mean, low, high float64) {
	var x []float64
	for _, v := range values {
		if finite(float64(v)) {
			x = append(x, float64(v))
		}
	}
	if len(x) == 0 {
		return math.NaN(), math.NaN(), math.NaN()
	}
	return meanInterval(x)
}

package quanttable

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"

	"github.com/lathe-ml/lathe/compress"
	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/internal/metric"
	"github.com/lathe-ml/lathe/internal/nearest"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/internal/stat"
)

// Quality is how good a network's outputs are, in per cent, with the bounds of a 95 % interval over the cases.
type Quality struct {
	Value  float64 `json:"value"`
	Low    float64 `json:"low"`
	High   float64 `json:"high"`
	Cosine float64 `json:"cosine"` // mean over cases, with the float network's outputs
	KL     float64 `json:"kl"`     // mean over rows of the outputs (compress.RowWidth), in nats
}

// judge is what the outputs of one network are held against.
type judge struct {
	truth truth
	float []float32
	dims  []int
}

// newJudge reads the truth of a prepared network; floats are the float network's outputs.
func newJudge(dir, floats string) (*judge, error) {
	b, err := os.ReadFile(filepath.Join(dir, truthFile))
	if err != nil {
		return nil, err
	}
	j := &judge{}
	if err := json.Unmarshal(b, &j.truth); err != nil {
		return nil, fmt.Errorf("%s: %w", truthFile, err)
	}
	j.float, j.dims, err = readOutputs(floats)
	return j, err
}

// readOutputs reads [cases, ...] float outputs.
func readOutputs(path string) ([]float32, []int, error) {
	a, err := data.ReadNPYFile(path)
	if err != nil {
		return nil, nil, err
	}
	if len(a.Shape) < 2 || a.Shape[0] < 1 {
		return nil, nil, fmt.Errorf("%s: outputs of shape %v; want [cases, ...]", path, a.Shape)
	}
	return a.Float32s(), a.Shape, nil
}

// quality judges outputs.
func (j *judge) quality(out []float32) (q Quality, err error) {
	if len(out) != len(j.float) {
		return q, fmt.Errorf("%d outputs; the float network has %d", len(out), len(j.float))
	}
	cases := j.dims[0]
	width := len(out) / cases
	a, err := compress.Compare(j.float, out, cases, compress.RowWidth(j.dims))
	if err != nil {
		return q, err
	}
	q.Cosine, q.KL = a.Cosine, a.KL
	switch {
	case j.truth.Pairs:
		q.Value, q.Low, q.High, err = similarities(j.float, out, cases, width)
	case j.truth.Lines != nil:
		err = j.lines(&q, out)
	default:
		labels := j.truth.Labels
		if labels == nil {
			if labels, err = metric.Classes(j.float, width); err != nil {
				return q, err
			}
		}
		acc, e := compress.Accuracy(out, width, labels)
		lo, hi := stat.Wilson(int(math.Round(acc*float64(cases))), cases, .95)
		q.Value, q.Low, q.High, err = 100*acc, 100*lo, 100*hi, e
	}
	return q, err
}

// lines reads outputs [cases, positions, classes] as connectionist temporal classification has them (the best class of
// each position, repetitions and blanks dropped) and counts right characters: 1 − edits over characters.
func (j *judge) lines(q *Quality, out []float32) error {
	if len(j.dims) < 3 || len(j.truth.Lines) != j.dims[0] {
		return fmt.Errorf("outputs of shape %v for %d lines; want [lines, positions, classes]", j.dims, len(j.truth.Lines))
	}
	positions, classes := j.dims[1], j.dims[2]
	right := make([]float64, len(j.truth.Lines))
	characters := 0.
	for i, want := range j.truth.Lines {
		var b strings.Builder
		last := 0
		for p := range positions {
			c := metric.ArgMax(out[(i*positions+p)*classes:][:classes])
			switch {
			case c == last || c == 0:
			case c-1 < len(j.truth.Alphabet):
				b.WriteString(j.truth.Alphabet[c-1])
			default: // the class behind the alphabet
				b.WriteByte(' ')
			}
			last = c
		}
		// words count, not the spaces between them, which recognisers of Chinese drop
		tight := func(s string) string { return strings.ReplaceAll(s, " ", "") }
		n := float64(len([]rune(tight(want))))
		right[i] = n - float64(nearest.Distance(tight(b.String()), tight(want)))
		characters += n
	}
	scale := 100 * float64(len(right)) / characters
	for i := range right {
		right[i] *= scale
	}
	q.Value = stat.Mean(right)
	q.Low, q.High = stat.BootstrapCI(right, .95, 400, rng.New(0, "quanttable:lines"))
	return nil
}

// similarities is the rank correlation of the cosines of all pairs of embeddings in both networks, with a bootstrap over
// the cases.
func similarities(a, b []float32, cases, width int) (value, low, high float64, err error) {
	cosines := func(x []float32) ([][]float64, error) {
		m := make([][]float64, cases)
		for i := range m {
			m[i] = make([]float64, cases)
			for k := range i {
				c, err := metric.Cosine(x[i*width:(i+1)*width], x[k*width:(k+1)*width])
				if err != nil {
					return nil, err
				}
				m[i][k], m[k][i] = c, c
			}
		}
		return m, nil
	}
	p, err := cosines(a)
	if err != nil {
		return 0, 0, 0, err
	}
	q, err := cosines(b)
	if err != nil {
		return 0, 0, 0, err
	}
	correlation := func(of []int) float64 {
		var x, y []float64
		for i, u := range of {
			for _, v := range of[:i] {
				if u != v {
					x, y = append(x, p[u][v]), append(y, q[u][v])
				}
			}
		}
		return 100 * metric.Spearman(x, y)
	}
	draws := make([]float64, 40)
	r := rng.New(0, "quanttable:pairs")
	for d := range draws {
		of := make([]int, cases)
		for i := range of {
			of[i] = r.IntN(cases)
		}
		draws[d] = correlation(of)
	}
	return correlation(data.Range(cases)), stat.Quantile(draws, .025), stat.Quantile(draws, .975), nil
}

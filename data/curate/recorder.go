package curate

import (
	"fmt"
	"math"
)

// TrainRecorder collects from any training loop what EL2N and Forgetting need: which examples were right in each epoch, and
// the class probabilities at early points of the training. Call Observe with the scores of every batch (those of the
// training step itself cost nothing extra), EndEpoch after each epoch, and Snapshot with the scores of the whole pool
// once, early. It is not safe for use by several goroutines at once.
type TrainRecorder struct {
	n, classes int
	now        []bool
	correct    [][]bool
	early      [][][]float64
}

// NewTrainRecorder records n examples of a problem with the given number of classes.
func NewTrainRecorder(n, classes int) *TrainRecorder {
	return &TrainRecorder{n: n, classes: classes, now: make([]bool, max(n, 0))}
}

// Observe takes the scores (logits or probabilities) [len(index), classes] of the examples with these indices, and
// their labels. The last observation within an epoch counts; an example that is not observed in an epoch keeps its
// state of the one before.
func (r *TrainRecorder) Observe(index []int, scores []float32, labels []int) error {
	if len(labels) != len(index) || len(scores) != len(index)*r.classes {
		return fmt.Errorf("curate: recorder got %d scores and %d labels of %d examples with %d classes", len(scores), len(labels), len(index), r.classes)
	}
	for k, i := range index {
		if i < 0 || i >= r.n {
			return fmt.Errorf("curate: recorder got example %d; there are %d", i, r.n)
		}
		best := 0
		row := scores[k*r.classes : (k+1)*r.classes]
		for c, v := range row {
			if v > row[best] {
				best = c
			}
		}
		r.now[i] = best == labels[k]
	}
	return nil
}

func (r *TrainRecorder) observe(probs [][]float64, labels []int) { copy(r.now, correct(probs, labels)) }

// EndEpoch closes an epoch.
func (r *TrainRecorder) EndEpoch() { r.correct = append(r.correct, append([]bool(nil), r.now...)) }

// Snapshot keeps the softmax of the logits [n, classes] of the whole pool, in its order, as one model's early
// probabilities. Snapshots of several models make EL2N less noisy.
func (r *TrainRecorder) Snapshot(logits []float32) error {
	if len(logits) != r.n*r.classes {
		return fmt.Errorf("curate: recorder got %d logits; %d examples with %d classes have %d", len(logits), r.n, r.classes, r.n*r.classes)
	}
	p, err := Softmax(logits, r.classes)
	if err != nil {
		return err
	}
	r.early = append(r.early, p)
	return nil
}

// Correct returns what was right, [epoch][example].
func (r *TrainRecorder) Correct() [][]bool { return r.correct }

// Early returns the snapshots, [model][example][class].
func (r *TrainRecorder) Early() [][][]float64 { return r.early }

// Forgetting returns the forgetting score of every example.
func (r *TrainRecorder) Forgetting() ([]float64, error) { return Forgetting(r.correct) }

// EL2N returns the EL2N score of every example over all snapshots.
func (r *TrainRecorder) EL2N(labels []int) ([]float64, error) { return EL2N(r.early, labels) }

// Softmax turns logits [n, classes], row-major, into probabilities. Logits that are not finite are an error.
func Softmax(logits []float32, classes int) ([][]float64, error) {
	if classes < 1 || len(logits)%classes != 0 {
		return nil, fmt.Errorf("curate: %d logits are not rows of %d classes", len(logits), classes)
	}
	n := len(logits) / classes
	flat, out := make([]float64, len(logits)), make([][]float64, n)
	for i := range out {
		row := logits[i*classes : (i+1)*classes]
		p := flat[i*classes : (i+1)*classes]
		largest := math.Inf(-1)
		for c, v := range row {
			if f := float64(v); math.IsNaN(f) || math.IsInf(f, 0) {
				return nil, fmt.Errorf("curate: logit %d of example %d is %g; the training has diverged", c, i, f)
			}
			largest = max(largest, float64(v))
		}
		sum := 0.
		for c, v := range row {
			p[c] = math.Exp(float64(v) - largest)
			sum += p[c]
		}
		for c := range p {
			p[c] /= sum
		}
		out[i] = p
	}
	return out, nil
}

package curate

import (
	"context"
	"fmt"
	"math"

	"gonum.org/v1/gonum/floats"
	"gonum.org/v1/gonum/mat"

	"github.com/lathe-ml/lathe/internal/cluster"
)

// Clusters groups examples around unit centroids: Centroids [k, d], Assignment and Distance (1-cos) of each example.
type Clusters = cluster.Result

// PrototypeScores scores examples without labels by their distance to the nearest of k prototypes, 1 - cos, in [0, 2]
// (self-supervised prototypes, arXiv:2206.14486, section 5): spherical k-means (k-means++ start, at most 100
// iterations, an empty cluster takes the farthest point) on the rows of emb [n, d], which should come from a
// self-supervised model and need not have unit length. The paper finds k insensitive over an order of magnitude; use
// between one and ten times the number of classes.
//
// Refused are a row of zeros (by index), values that are not finite, k above n, and embeddings of fewer than k distinct
// directions.
func PrototypeScores(emb *mat.Dense, k int, seed uint64) (scores []float64, cl *Clusters, err error) {
	return prototypeScores(context.Background(), emb, k, seed)
}

func prototypeScores(ctx context.Context, emb *mat.Dense, k int, seed uint64) ([]float64, *Clusters, error) {
	cl, err := cluster.KMeans{K: k, Spherical: true, MaxIter: 100, Seed: seed}.Fit(ctx, emb)
	if err != nil {
		return nil, nil, fmt.Errorf("curate: prototypes: %w", err)
	}
	return floatsClone(cl.Distance), cl, nil
}

// ScorePrototypes scores examples by their distance, 1 - cos, to the nearest of given prototypes [k, d], and returns
// which one it is.
func ScorePrototypes(emb, prototypes *mat.Dense) (scores []float64, assignment []int, err error) {
	assignment, scores, err = cluster.Assign(emb, prototypes, true)
	if err != nil {
		return nil, nil, fmt.Errorf("curate: prototypes: %w", err)
	}
	return scores, assignment, nil
}

// ClassPrototypeScores scores examples by their distance, 1 - cos, in [0, 2], to the prototype of their own class: the
// normalised mean of its unit embeddings (supervised prototypes). Labels are 0 and up. Where a class's embeddings
// cancel, its prototype has no direction and its examples score 1.
func ClassPrototypeScores(emb *mat.Dense, labels []int) ([]float64, error) {
	if emb == nil || emb.IsEmpty() {
		return nil, fmt.Errorf("curate: no embeddings; at least one row is needed")
	}
	n, d := emb.Dims()
	if len(labels) != n {
		return nil, fmt.Errorf("curate: %d labels for %d embeddings; both must be of equal length", len(labels), n)
	}
	unit, err := cluster.UnitRows(emb)
	if err != nil {
		return nil, fmt.Errorf("curate: class prototypes: %w", err)
	}
	sum, count := map[int][]float64{}, map[int]float64{}
	for i, y := range labels {
		if y < 0 {
			return nil, fmt.Errorf("curate: label %d of example %d; labels are 0 and up", y, i)
		}
		if sum[y] == nil {
			sum[y] = make([]float64, d)
		}
		floats.Add(sum[y], unit.RawRowView(i))
		count[y]++
	}
	for y, s := range sum {
		norm := math.Sqrt(floats.Dot(s, s))
		if norm <= 1e-12*count[y] {
			clear(s)
			continue
		}
		floats.Scale(1/norm, s)
	}
	out := make([]float64, n)
	for i, y := range labels {
		out[i] = min(2, max(0, 1-floats.Dot(unit.RawRowView(i), sum[y])))
	}
	return out, nil
}

func floatsClone(x []float64) []float64 { return append([]float64(nil), x...) }

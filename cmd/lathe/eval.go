package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/gomlx/compute"
	"github.com/gomlx/gomlx/core/tensors"
	"github.com/spf13/cobra"

	"github.com/lathe-ml/lathe/data"
	"github.com/lathe-ml/lathe/internal/rng"
	"github.com/lathe-ml/lathe/internal/stat"
	"github.com/lathe-ml/lathe/lab/report"
	"github.com/lathe-ml/lathe/nn"
)

// labelled is a set of images with labels.
type labelled struct{ *data.Images }

// labelledSets lists the data sets that train and eval take.
func labelledSets() []string { return []string{"fashion-mnist", "mnist", "digits"} }

// loadLabelled loads one part of a data set. digits has no split of its own: a fixed random third is its test part.
func loadLabelled(ctx context.Context, name string, train bool) (labelled, error) {
	switch name {
	case "fashion-mnist":
		m, err := data.FashionMNIST(ctx, train)
		return labelled{m}, err
	case "mnist":
		m, err := data.MNIST(ctx, train)
		return labelled{m}, err
	case "digits":
		m, err := data.Digits(ctx)
		if err != nil {
			return labelled{}, err
		}
		order := rng.New(0, "digits:split").Perm(m.N)
		cut := m.N - m.N/3
		if train {
			order = order[:cut]
		} else {
			order = order[cut:]
		}
		m, err = m.Subset(order)
		return labelled{m}, err
	}
	return labelled{}, chooseOne("data", name, labelledSets())
}

// batch returns images, flattened for a network of plain vectors, and labels.
func (l labelled) batch(idx []int, flat bool) ([]*tensors.Tensor, error) {
	labels, err := l.LabelsTensor(idx)
	if err != nil {
		return nil, err
	}
	dims := []int{len(idx), l.H, l.W, l.C}
	if flat {
		dims = []int{len(idx), l.H * l.W * l.C}
	}
	return []*tensors.Tensor{tensors.FromFlatDataAndDimensions(l.Floats(idx, nil), dims...), labels}, nil
}

// quality is how well a classifier does.
type quality struct {
	Examples int       `json:"examples"`
	Accuracy float64   `json:"accuracy"` // share, 0 to 1
	Low      float64   `json:"accuracy_low"`
	High     float64   `json:"accuracy_high"` // 95 % interval (Wilson)
	Loss     float64   `json:"loss"`          // mean negative log-likelihood, nats
	PerClass []float64 `json:"recall"`        // share of each class that is found
	Classes  []string  `json:"classes"`
}

// evaluate runs a classifier over all examples.
func evaluate(ctx context.Context, b compute.Backend, net *nn.Network, set labelled, batch int, progress func(done, total int)) (q quality, err error) {
	if len(net.Inputs) != 1 || len(net.Outputs) != 1 {
		return q, fmt.Errorf("the network has %d inputs and %d outputs; a classifier has one of each", len(net.Inputs), len(net.Outputs))
	}
	in := net.Inputs[0].Shape
	flat := in.Rank() == 2
	want := []int{set.H, set.W, set.C}
	if flat {
		want = []int{set.H * set.W * set.C}
	}
	if in.Rank() != len(want)+1 || fmt.Sprint(in.Dimensions[1:]) != fmt.Sprint(want) {
		return q, fmt.Errorf("the network takes inputs of shape %v, the data's are %v (height, width, channels)", in.Dimensions[1:], []int{set.H, set.W, set.C})
	}
	r, err := nn.NewRunner(b, net, nn.RunOptions{})
	if err != nil {
		return q, err
	}
	defer r.Finalize()
	q = quality{Examples: set.N, Classes: set.ClassNames, PerClass: make([]float64, set.Classes())}
	count := make([]float64, set.Classes())
	right := 0
	for at := 0; at < set.N; at += batch {
		if err := ctx.Err(); err != nil {
			return q, err
		}
		idx := make([]int, min(batch, set.N-at))
		for i := range idx {
			idx[i] = at + i
		}
		in, err := set.batch(idx, flat)
		if err != nil {
			return q, err
		}
		out, err := r.Run(in[0])
		if err != nil {
			return q, err
		}
		logits := nn.Floats(out[0])
		n := len(logits) / len(idx)
		if n < set.Classes() {
			return q, fmt.Errorf("the network has %d outputs, the data %d classes", n, set.Classes())
		}
		for i, k := range idx {
			row := logits[i*n : (i+1)*n]
			best, sum, top := 0, 0., float64(row[0])
			for j, v := range row {
				if v > row[best] {
					best, top = j, float64(v)
				}
			}
			for _, v := range row {
				sum += math.Exp(float64(v) - top)
			}
			label := int(set.Labels[k])
			q.Loss += (top + math.Log(sum) - float64(row[label])) / float64(set.N)
			count[label]++
			if best == label {
				right++
				q.PerClass[label]++
			}
		}
		progress(at+len(idx), set.N)
	}
	for i := range q.PerClass {
		if count[i] > 0 {
			q.PerClass[i] /= count[i]
		}
	}
	q.Accuracy = float64(right) / float64(set.N)
	q.Low, q.High = stat.Wilson(right, set.N, .95)
	return q, nil
}

func shortHash(s string) string {
	h := sha256.Sum256([]byte(s))
	return hex.EncodeToString(h[:4])
}

func newEvalCommand(a *app) *cobra.Command {
	var dataName string
	var batch, limit int
	cmd := &cobra.Command{
		Use:   "eval MODEL",
		Short: "Evaluate a classifier on the test part of a data set",
		Long: `Evaluate a classifier, a safetensors file that lathe wrote or an ONNX file, on the test part of a data set: accuracy
with its 95 % interval, loss, and the share of each class that is found.`,
		Example: `  lathe eval vit.safetensors
  lathe eval digits.safetensors --data digits --json`,
		Args: exactArgs("a model"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if dataName != "" && !slices.Contains(labelledSets(), dataName) {
				return chooseOne("data", dataName, labelledSets())
			}
			if batch < 1 || batch > 1<<16 || limit < 0 {
				return usageErrorf("--batch %d, --limit %d: must be positive", batch, limit)
			}
			ctx := cmd.Context()
			net, err := readNetwork(args[0], nil)
			if err != nil {
				return err
			}
			if dataName == "" {
				if dataName = trainedOn(net); dataName == "" {
					return usageErrorf("%s does not say what it was trained on; give --data %s", args[0], strings.Join(labelledSets(), "|"))
				}
			}
			set, err := loadLabelled(ctx, dataName, false)
			if err != nil {
				return err
			}
			if limit > 0 && limit < set.N {
				set = labelled{set.First(limit)}
			}
			backend, err := a.backend()
			if err != nil {
				return err
			}
			bar := a.progress("evaluating")
			defer bar.Close()
			started := time.Now()
			q, err := evaluate(ctx, backend, net, set, batch, bar.Set)
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			bar.Close()
			out := struct {
				Model string `json:"model"`
				Data  string `json:"data"`
				quality
				Parameters int     `json:"parameters"`
				Seconds    float64 `json:"seconds"`
			}{args[0], dataName, q, net.Params.Count(), time.Since(started).Seconds()}
			return a.emit(out, func(w io.Writer) error {
				if _, err := fmt.Fprintf(w, "accuracy %.2f %% (%.2f to %.2f), loss %.4f on %d test examples of %s, %.1f s\n\n", 100*q.Accuracy, 100*q.Low, 100*q.High, q.Loss, q.Examples, dataName, out.Seconds); err != nil {
					return err
				}
				t := report.Table{Columns: []string{"class", "found"}}
				for i, p := range q.PerClass {
					t.Rows = append(t.Rows, []string{q.Classes[i], fmt.Sprintf("%.1f %%", 100*p)})
				}
				return report.WriteTable(w, t, a.width())
			})
		},
	}
	cmd.Flags().StringVar(&dataName, "data", "", "data set: "+strings.Join(labelledSets(), ", ")+" (default: what it was trained on)")
	cmd.Flags().IntVar(&batch, "batch", 256, "examples at a time")
	cmd.Flags().IntVar(&limit, "limit", 0, "only the first so many test examples (0: all)")
	_ = cmd.RegisterFlagCompletionFunc("data", oneOf(labelledSets()...))
	return cmd
}
